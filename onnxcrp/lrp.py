"""The rules of Layer-wise Relevance Propagation, each written as its formula.

Symbols (Montavon et al. 2019): `a` a layer's input, `z` its output, `W` and `b` its weights and bias, `R` the relevance
of its output, `s` a message. `layer(a, W, b)` is the same node again with other operands, `layer.T(s, W)` its exact
transpose, `layer.stab(z) = z + eps sign(z)` the guard against division by zero. x+ = max(x, 0), x- = min(x, 0).

Divide first, then one transpose per branch, then multiply. A branch known to be zero (a- behind a ReLU) is a symbolic
zero and is never written.

Sources: Bach et al. 2015 (PLoS ONE 10(7)); Montavon et al. 2017 (Deep Taylor), 2019 (LRP overview); Kohlbrenner et al.
2020; Andeol et al. 2021 (generalized gamma); Achtibat et al. 2023 (CRP).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcrp.errors import CompositeError, PluginError
from onnxcrp.graph import Graph, Value, negative, positive, stabilize
from onnxcrp.ops.attention import Normalization, softmax_axis
from onnxcrp.ops.kernels import Machine
from onnxcrp.ops.linear import batchnorm_scale
from onnxcrp.ops.normalization import LocalResponse
from onnxcrp.ops.registry import FAMILIES, Node, Op, Parts, about

LINEAR = frozenset({"convolution", "dense"})
SUMMING = frozenset({"average", "sum"})
ELEMENTWISE = frozenset({"activation", "scale", "normalization"})
BILINEAR = frozenset({"product", "matmul"})
OTHER = frozenset({"other"})  # operators of which only the transpose is known
EVERY = frozenset({*LINEAR, *SUMMING, *ELEMENTWISE, *BILINEAR, *OTHER, "max", "lrn", "softmax", "layernorm", "kernel"})


@dataclass(frozen=True)
class Rule:
    """A rule: its formula, the op families it applies to, its parameters with defaults."""

    name: str
    function: Callable[..., Any]
    families: frozenset[str]
    parameters: Mapping[str, Any]
    doc: str

    def __call__(self, layer: Layer, R: Any, **parameters: Any) -> Any:
        """Relevance of the layer's data inputs from that of its output."""
        return self.function(layer, R, **parameters)


RULES: dict[str, Rule] = {}


def rule(families: Iterable[str], name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule under its function's name for these op families; its parameters are keyword-only numbers.

    Errors: PluginError if there is a rule of that name, or no such family.
    """
    treats = frozenset([families] if isinstance(families, str) else families)
    if unknown := sorted(treats - FAMILIES.keys()):
        raise PluginError(f"rule for unknown family {unknown[0]!r}", hint=f"one of {', '.join(FAMILIES)}")

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        key = name or function.__name__
        if key in RULES:
            raise PluginError(f"rule {key} is registered already", hint="give the function another name")
        parameters = {
            p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        RULES[key] = Rule(key, function, treats, parameters, (function.__doc__ or "").strip())
        return function

    return add


class Layer:
    """A node as a rule sees it: a, z, W, b, the node again and its transpose.

    `bias="drop"` acts as if b were 0. For sums of several tensors `a` and `layer.T(s)` are `Parts`.
    """

    def __init__(self, op: Graph, node: Node, *, stabilizer: float = 1e-6, bias: str = "keep") -> None:
        self.op = op
        self.node = node
        self.about: Op = about(node.op)
        self.stabilizer = stabilizer
        self.bias = bias
        self.vanishes = False  # a static fact: R = 0 wherever z <= 0
        self.gates: set[int] = set()  # a static fact: which inputs are gates
        self.bounds: Callable[[Any], np.ndarray] | None = (
            None  # a value at the model's input -> the same at this layer's
        )

    @property
    def family(self) -> str:
        """The op family of the node."""
        return self.about.family_of(self.node.node, len(self.node.data))

    @property
    def a(self) -> Any:
        """The input [N, in...]; Parts where several inputs carry relevance."""
        if self.family in ("sum", "other"):
            parts = Parts(self.node.input(i) for i in self.node.data)
            return parts if len(parts) > 1 else parts[0]
        return self.node.input(self.node.data[0])

    @property
    def W(self) -> Value:
        """Weights; the scalar 1 where an op has none (pooling, means)."""
        if self.node.op == "BatchNormalization":
            return self.op.constant(batchnorm_scale(self.node)[0].astype(self.op.dtype))
        return self.node.input(1) if self.about.weighted else self.op.as_value(1.0)

    @property
    def b(self) -> Value:
        """Bias; a symbolic zero where there is none."""
        if self.bias == "drop":
            return self.op.zero
        if self.node.op == "BatchNormalization":
            return self.op.constant(batchnorm_scale(self.node)[1].astype(self.op.dtype))
        at = 3 if self.family == "kernel" else 2
        if (self.about.weighted or self.family == "kernel") and self.node.has(at):
            bias = self.node.input(at)
            return bias if bias.array is None or bias.array.any() else self.op.zero
        return self.op.zero

    @property
    def z(self) -> Value:
        """The output L(W,b)a as the forward pass computed it; without the bias if that is dropped."""
        if self.bias == "keep":
            return self.node.output()
        if self.family == "kernel":
            return self.node.output() - (self.node.input(3) if self.node.has(3) else 0.0)
        if self.family == "sum":
            shares = self.a * self.T(self.op.as_value(1.0))
            return self.op.sum(shares) if isinstance(shares, Parts) else shares
        return self(self.a, self.W) if self.about.weighted and self.node.has(2) else self.node.output()

    def __call__(self, a: Value, W: Value | None = None, b: Value | None = None) -> Value:
        """L(W,b)a: the node again with its own stride, pads, dilation and group."""
        W = self.W if W is None else W
        b = self.op.zero if b is None else b
        if a.is_zero or W.is_zero:
            if not b.is_zero:  # only the bias is left: the layer's answer to a field of zeros
                return self(self.op.Mul(self.node.input(self.node.data[0]), 0.0), self.W, b)
            return self.op.zero
        assert self.about.forward is not None
        z = self.about.forward(self.op, self.node, a, W, b)
        alike = (a.nonnegative and W.nonnegative) or (a.nonpositive and W.nonpositive)
        unlike = (a.nonnegative and W.nonpositive) or (a.nonpositive and W.nonnegative)
        return z._if(nonnegative=alike and b.nonnegative, nonpositive=unlike and b.nonpositive)

    def T(self, s: Any, W: Value | None = None) -> Any:
        """The transpose of L(W,0): [N, out...] -> [N, in...]."""
        if isinstance(s, Value) and s.is_zero:
            return s
        if self.about.weighted:
            W = self.W if W is None else W
            return W if W.is_zero else self.about.transpose(self.op, self.node, s, W)
        back = self.about.transpose(self.op, self.node, s)
        return back if W is None else back * W

    def counted(self, z: Value) -> Value:
        """z as far as it counts: max(z, 0) where R is exactly 0 for all z <= 0, since that needs no look at signs."""
        return positive(z) if self.vanishes else z

    def stab(self, z: Value, epsilon: float | None = None) -> Value:
        """z + eps sign(z), sign(0) = +1."""
        return stabilize(z, self.stabilizer if epsilon is None else epsilon)


# ---- rules for layers with weights ---------------------------------------------------------------------------------


@rule(LINEAR | SUMMING | OTHER | {"normalization"})
def zero(layer: Layer, R: Value) -> Any:
    """LRP-0, also LRP-z (Bach et al. 2015; Kohlbrenner et al. 2020, Eq. 1): R_i = sum_j a_i w_ij / z_j R_j.

    Outputs with |z_j| <= 1e-9 pass nothing on.
    """
    op, z = layer.op, layer.z
    large = op.Abs(z) > 1e-9
    s = op.where(large, R / op.where(large, z, 1.0), 0.0)
    return layer.a * layer.T(s)


@rule(LINEAR | SUMMING | OTHER | {"normalization"})
def epsilon(layer: Layer, R: Value, *, epsilon: float = 1e-6) -> Any:
    """LRP-epsilon (Kohlbrenner et al. 2020, Eq. 2; CRP Eq. 32): R_i = sum_j a_i w_ij / (z_j + epsilon sign z_j) R_j."""
    s = R / layer.stab(layer.counted(layer.z), epsilon)
    return layer.a * layer.T(s)


def _joined(layer: Layer, V: Value, U: Value, b: Value) -> Value:
    """L(V,b)a+ + L(U,0)a-."""
    return layer(positive(layer.a), V, b) + layer(negative(layer.a), U)


def _parted(layer: Layer, s: Value, V: Value, U: Value) -> Value:
    """a+ . T(V)s + a- . T(U)s."""
    return positive(layer.a) * layer.T(s, V) + negative(layer.a) * layer.T(s, U)


@rule(LINEAR)
def zplus(layer: Layer, R: Value) -> Value:
    """LRP-z+, alpha 1 beta 0 (CRP Eq. 34): only positive contributions; R_i = sum_j (a_i w_ij)+ / z_j+ R_j."""
    W, b = layer.W, layer.b
    z = _joined(layer, positive(W), negative(W), positive(b))
    return _parted(layer, R / layer.stab(z), positive(W), negative(W))


@rule(LINEAR)
def alpha_beta(layer: Layer, R: Value, *, alpha: float = 2.0, beta: float = 1.0) -> Value:
    """LRP-alpha-beta (Kohlbrenner et al. 2020, Eq. 3, beta >= 0 here): alpha z+ less beta times its negative twin.

    Errors: CompositeError unless alpha - beta = 1 and both are >= 0.
    """
    if abs(alpha - beta - 1) > 1e-9 or alpha < 0 or beta < 0:
        raise CompositeError(
            f"alpha_beta needs alpha - beta = 1 and both >= 0, not alpha={alpha:g}, beta={beta:g}",
            hint=f"did you mean beta={alpha - 1:g}?" if alpha >= 1 else "alpha=2, beta=1 is usual",
        )
    W, b = layer.W, layer.b
    if beta == 0:
        return zplus(layer, R)
    down = layer.stab(_joined(layer, negative(W), positive(W), negative(b)))
    if layer.vanishes and down.nonpositive:  # there is a z-, and where R counts z > 0: in z + |z-| nothing cancels
        up = positive(layer.z) - down
    else:
        up = layer.stab(_joined(layer, positive(W), negative(W), positive(b)))
    activating = _parted(layer, R / up, positive(W), negative(W))
    inhibiting = _parted(layer, R / down, negative(W), positive(W))
    return activating * float(alpha) - inhibiting * float(beta)


@rule(LINEAR)
def gamma(layer: Layer, R: Value, *, gamma: float = 0.25) -> Value:
    """LRP-gamma (Montavon et al. 2019), generalized to signed input and output (Andeol et al. 2021).

    G+ = W + gamma W+, G- = W + gamma W-: where z > 0 what drives z up is favoured, where z < 0 what drives it down.
    """
    if gamma == 0:
        return epsilon(layer, R, epsilon=layer.stabilizer)  # nothing is favoured: both halves are one
    op, a, W, b = layer.op, layer.a, layer.W, layer.b
    favoured = float(gamma)
    up_W, down_W = W + positive(W) * favoured, W + negative(W) * favoured
    up_b, down_b = b + positive(b) * favoured, b + negative(b) * favoured
    x, y = positive(a), negative(a)

    z = layer.stab(positive(layer(x, up_W, up_b) + layer(y, down_W)))  # where layer.z > 0 so is this
    p = R / z if layer.vanishes else R * op.float(layer.z > 0.0) / z
    back = x * layer.T(p, up_W) + y * layer.T(p, down_W)
    if layer.vanishes:
        return back

    z = layer.stab(negative(layer(x, down_W, down_b) + layer(y, up_W)))
    q = R * op.float(layer.z < 0.0) / z
    return back + x * layer.T(q, down_W) + y * layer.T(q, up_W)


@rule(LINEAR)
def zbox(layer: Layer, R: Value, *, low: Any, high: Any) -> Value:
    """z^B of Deep Taylor (Montavon et al. 2017): for layers that read pixels, which are bounded, low <= a <= high.

    R_i = sum_j (a_i w_ij - l_i w_ij+ - h_i w_ij-) / (sum of that over i) R_j; low, high in the model's input units, a
    scalar or one per channel. Errors: CompositeError where the path from the input to the layer is not affine.
    """
    assert layer.bounds is not None
    a, W, b = layer.a, layer.W, layer.b
    ends = layer.bounds(low), layer.bounds(high)  # a negative scale in the preprocessing swaps them
    l, h = (  # noqa: E741
        layer.node.like(layer.op.constant(end, layer.op.dtype)) for end in (np.minimum(*ends), np.maximum(*ends))
    )
    z = layer(a, W, b) - layer(l, positive(W), positive(b)) - layer(h, negative(W), negative(b))
    s = R / layer.stab(z)
    return a * layer.T(s) - l * layer.T(s, positive(W)) - h * layer.T(s, negative(W))


@rule(LINEAR | SUMMING)
def wsquare(layer: Layer, R: Value) -> Value:
    """LRP-w^2 (Montavon et al. 2017): R_i = sum_j w_ij^2 / (sum_i w_ij^2 + b_j^2) R_j; what the bias takes is lost."""
    if not layer.about.weighted:
        return flat(layer, R)
    op, W, b = layer.op, layer.W, layer.b
    ones = op.Expand(1.0, op.Concat([1], layer.node.size(0, 1), axis=0))
    s = R / layer.stab(layer(ones, W * W, b * b))
    return layer.T(s, W * W)


@rule(LINEAR | SUMMING | {"max"})
def flat(layer: Layer, R: Value) -> Any:
    """LRP-flat (Lapuschkin et al. 2019; thesis Eq. 2.27): all inputs alike, R_i = sum_j R_j / (number of inputs of j).

    Zero padding is no input, so border windows share among fewer.
    """
    if layer.family == "sum" or layer.node.op in ("Max", "Min"):
        return equal(layer, R)
    if layer.about.ones is None:
        raise CompositeError(f"rule flat cannot be used for {layer.node.op}")
    ones = layer.about.ones(layer.op, layer.node)
    s = ones.gather(R) / layer.stab(ones.count)
    return ones.spread(s)


# ---- rules for sums, products, windows -----------------------------------------------------------------------------


@rule(SUMMING | OTHER)
def norm(layer: Layer, R: Value) -> Any:
    """Every summand its share (thesis Eq. 2.39): R_i = x_i J_i^T[R / stab(f(x))]. A constant summand counts as bias."""
    s = R / layer.stab(layer.counted(layer.z))
    return layer.a * layer.T(s)


@rule(frozenset({"sum"}))
def equal(layer: Layer, R: Value) -> Any:
    """Every data input of a sum the same, whatever it adds: a work-around for unstable residual sums."""
    n = len(layer.node.data)
    return Parts([R / float(n)] * n) if n > 1 else R


@rule(frozenset({"sum"}))
def first(layer: Layer, R: Value) -> Any:
    """All to the first data input of a sum: a work-around for unstable residual sums."""
    n = len(layer.node.data)
    return Parts([R] + [layer.op.zero] * (n - 1)) if n > 1 else R


@rule(ELEMENTWISE | OTHER | {"softmax"}, name="pass")
def pass_(layer: Layer, R: Value) -> Value:
    """R unchanged (thesis Eq. 2.37): elementwise functions have nothing to share out."""
    return R


@rule(frozenset({"max"}))
def winner(layer: Layer, R: Value) -> Any:
    """All to the maximum (thesis Eq. 2.33), the first one on ties; overlapping windows add up."""
    return layer.T(R)


@rule(frozenset({"lrn"}))
def lrn(layer: Layer, R: Value) -> Value:
    """Local response normalization, first-order Taylor (thesis Eq. 2.46, neighbour term negative).

    With D = k + b S: own = (k + b x^2)^-c, cross = 2 b c D^-(c+1), v = x own - x cross (S - x^2), s = R / stab(v):
    R_in = x own s - x^2 (M^T(x cross s) - x cross s).
    """
    n = LocalResponse(layer.op, layer.node)
    x = n.x
    square = x * x
    S = n.M(square)
    own = n.power(square * n.b + n.k, -n.c)
    cross = n.power(S * n.b + n.k, -n.c - 1) * (2 * n.b * n.c)
    v = x * own - x * cross * (S - square)
    s = R / layer.stab(v)
    message = x * cross * s
    return x * own * s - square * (n.MT(message) - message)


# ---- gates and attention -------------------------------------------------------------------------------------------


@rule(frozenset({"product"}))
def half(layer: Layer, R: Value) -> Any:
    """Both factors of a product the same (Achtibat et al. 2024, AttnLRP, Prop. 3.2); a divisor gets none."""
    if layer.node.op == "Div":
        return Parts([R, layer.op.zero])
    return Parts([R * 0.5, R * 0.5])


@rule(BILINEAR)
def signal(layer: Layer, R: Value) -> Any:
    """The signal all, the gate none (Arras et al. 2017); a gate is what comes out of Sigmoid, HardSigmoid or Softmax.

    Without one gate on exactly one side both factors are alike: `half`, for matrix products `matmul`.
    """
    if layer.node.op == "Div" or len(layer.gates) != 1:
        return half(layer, R) if layer.family == "product" else matmul(layer, R)
    (closed,) = layer.gates
    if layer.family == "product":
        return Parts(layer.op.zero if i == closed else R for i in (0, 1))
    s = R / layer.stab(layer.z)
    back = layer.T(s)
    return Parts(layer.op.zero if i == closed else layer.node.input(i) * back[i] for i in (0, 1))


@rule(frozenset({"matmul"}))
def matmul(layer: Layer, R: Value) -> Any:
    """Product of two tensors (AttnLRP Prop. 3.3): N = R / (2 A B + eps); R_A = A . (N B^T), R_B = B . (A^T N)."""
    N = R / layer.stab(layer.z * 2.0, 1e-8)
    back = layer.T(N)
    return Parts([layer.node.input(0) * back[0], layer.node.input(1) * back[1]])


@rule(frozenset({"softmax"}))
def softmax(layer: Layer, R: Value) -> Value:
    """AttnLRP Prop. 3.1 for a softmax inside the model, which does not conserve: R_in = x . (R - s sum R), s = softmax.

    x counts as 0 where it is infinite or s = 0: closed by a mask.
    """
    op, x, s = layer.op, layer.a, layer.z
    if layer.node.op == "LogSoftmax":
        raise CompositeError(
            "a LogSoftmax has no relevance rule", hint="explain the logits before it, without keep_head"
        )
    x = op.where(op.And(s > 0.0, op.Abs(x) < 1e30), x, 0.0)
    return x * (R - s * op.ReduceSum(R, [softmax_axis(layer.node)], keepdims=1))


@rule(frozenset({"layernorm"}))
def layernorm(layer: Layer, R: Value) -> Value:
    """Layer normalization (AttnLRP Prop. 3.4): the mean is differentiated, sigma held constant.

    s = R / stab(y), y with the bias; u = s gamma / sigma; R_in = x . (u - mean(u)). RMS normalization and that to unit
    length pass.
    """
    if layer.node.op in ("RmsNorm", "LpNormalization"):
        return R
    n = Normalization(layer.op, layer.node)
    u = R / layer.stab(layer.z) * (n.gamma / n.sigma)
    return n.x * (u - n.mean(layer.op, u))


@rule(frozenset({"embedding"}))
def embedding(layer: Layer, R: Value) -> Value:
    """A token's relevance is the sum over the features it looked up: [B, T, C] -> [B, T]."""
    return layer.T(R)


# ---- kernel machines and bags of words ------------------------------------------------------------------------------


@rule(frozenset({"kernel", "dense"}))
def share(layer: Layer, R: Value) -> Value:
    """Linear models and kernels that are sums over features, by share (Bach et al. 2015): f_p = sum_d f_pd + b_p.

    R_d = sum_p (f_pd + b_p / D) R_p / f_p, f_pd = sum_s alpha_ps k(x_d, v_sd), or x_d w_pd for a linear model.
    """
    op, s = layer.op, R / layer.stab(layer.z)
    if layer.node.op == "Kernel":
        raise CompositeError(
            f"rule share is for kernels that are sums over features, {layer.node!r} is none", hint="use rule taylor"
        )
    machine = Machine(op, layer.node) if layer.family == "kernel" else None
    back = machine.over_vectors(s, machine.terms) if machine else layer.a * layer.T(s)
    features = machine.features if machine else layer.W.array.shape[1]  # type: ignore[union-attr]
    if layer.b.is_zero:
        return back
    return back + op.ReduceSum(s * layer.b, [-1], keepdims=1) * (1 / features)


@rule(frozenset({"average"}))
def bag(layer: Layer, R: Value) -> Value:
    """From the bins of a bag to its local descriptors (Bach et al. 2015): each its share, all alike if a bin is empty.

    R_l = sum_d m_d(l) / sum_l' m_d(l') R_d, and R_d / number of descriptors for the bins that no descriptor fills.
    """
    op, z = layer.op, layer.z
    filled = op.Abs(z) > 1e-30
    s = op.where(filled, R / op.where(filled, z, 1.0), 0.0)
    return layer.a * layer.T(s) + flat(layer, op.where(filled, 0.0, R))


@rule(frozenset({"kernel"}))
def taylor(layer: Layer, R: Value, *, reference: Any = 0.0, at: str = "sample") -> Value:
    """Differentiable kernels by first-order Taylor decomposition (Bach et al. 2015; thesis 2.4).

    R_d = sum_p [(x - x0)_d df_p/dx_d + f_p(x0) / D] R_p / f_p. The reference point x0 is `reference`, a number or one
    per feature; the derivative is that at the sample, or at x0 (`at`). What is of higher order is lost.
    `reference="boundary"`: x0_p = x - f_p g_p / |g_p|^2, where the tangent at the sample is 0, so that nothing is lost:
    R_d = sum_p g_pd^2 / |g_p|^2 R_p, with g_p = df_p/dx.
    """
    op = layer.op
    if layer.node.op != "Kernel":
        raise CompositeError(f"rule taylor needs a derivative, the kernel of {layer.node!r} has none", hint="use share")
    machine = Machine(op, layer.node)
    x = machine.x
    if isinstance(reference, str):
        if at != "sample":
            raise CompositeError("the boundary is found from the sample", hint='leave out at = "reference"')
        square = machine.jacobian(x) * machine.jacobian(x)
        shares = square / layer.stab(op.ReduceSum(square, [2], keepdims=1), 1e-30)
        return op.Squeeze(op.Unsqueeze(R, [1]) @ shares, [1])
    if np.size(reference) not in (1, machine.features):
        raise CompositeError(f"{np.size(reference)} reference values for {machine.features} features of {layer.node!r}")
    point = np.broadcast_to(np.asarray(reference, op.dtype).reshape(1, -1), (1, machine.features))
    x0 = op.constant(np.ascontiguousarray(point))
    s = R / layer.stab(layer.z)
    rest = op.ReduceSum(s * (machine(x0) + layer.b), [-1], keepdims=1) * (1 / machine.features)
    return (x - x0) * machine.T(s, x if at == "sample" else x0) + rest


# ---- comparison methods, not LRP -----------------------------------------------------------------------------------


@rule(EVERY)
def gradient(layer: Layer, R: Any) -> Any:
    """The gradient: R_in = J^T R (Simonyan et al. 2013)."""
    return layer.T(R)


@rule(frozenset({"activation"}))
def guided_backprop(layer: Layer, R: Value) -> Value:
    """Guided backpropagation (Springenberg et al. 2014): the gradient of a ReLU, negative messages set to 0."""
    return layer.T(positive(R))


@rule(frozenset({"activation"}))
def deconvnet(layer: Layer, R: Value) -> Value:
    """DeconvNet (Zeiler and Fergus 2014): a ReLU on the message instead of on the forward pass."""
    return positive(R)


@rule(frozenset({"activation"}))
def beta_smooth(layer: Layer, R: Value, *, beta: float = 10.0) -> Value:
    """The gradient of softplus with sharpness beta for the ReLU's (Dombrowski et al. 2019): R sigmoid(beta x)."""
    return R * layer.op.Sigmoid(layer.a * float(beta))


BUILT_IN = frozenset(RULES)  # what is registered after this comes from outside
