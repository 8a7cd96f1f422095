"""Where relevance goes in one layer: what a rule sends to each input, and what the bias and the stabilizer keep.

Every rule divides R by one or two sums z over inputs and bias and gives every summand its share (`Branch`). So what
arrives at the inputs is known without any transpose: sum_j (z_j - b_j) s_j with s = R / stab(z); the bias keeps
sum_j b_j s_j and the stabilizer sum_j (stab(z_j) - z_j) s_j. This is computed here in numpy and float64 from the
activations alone, so that it can be held against what a relevance model sends.

Symbols as in lrp.py: a a layer's input, z its output, W and b its weights and bias, R the relevance of its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.evaluate import evaluate_node
from onnxcrp.ops import OPS

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

ROUNDING = 2.0**-24  # half a unit in the last place of float32, relative

NOT_ITEMISED = "not itemised"
LOSSES = ("bias", "constant", "stabilizer", "zero output", "padding", "softmax", "remainder", NOT_ITEMISED)
"""Where relevance is lost: in biases and constants that are added, in others (a class token), to the stabilizer, at
outputs that are 0, on padded places, in a softmax inside the model, in what a Taylor decomposition leaves out, in rules
that are not known here."""

GRADIENTS = frozenset({"gradient", "guided_backprop", "deconvnet", "beta_smooth"})
"""Rules that are no LRP: nothing says that their sums stay the same."""

NOT_LINEAR = frozenset({"guided_backprop", "deconvnet"})
"""Rules whose result is not linear in R: parts of a partition do not add up."""


@dataclass
class Branch:
    """One division of a rule: `share` of R over stab(z), z = inputs + `bias` summed; `gross`: their magnitudes."""

    share: np.ndarray
    z: np.ndarray
    bias: Any
    gross: np.ndarray
    epsilon: float

    def __post_init__(self) -> None:
        stab = self.z + np.where(self.z >= 0, self.epsilon, -self.epsilon)
        safe = np.where(stab == 0, 1, stab)
        self.s = np.where(self.share == 0, 0.0, self.share / safe)

    @property
    def condition(self) -> np.ndarray:
        """How many times smaller z is than its terms: the factor by which rounding of the terms grows in R / z."""
        return self.gross / np.maximum(np.abs(self.z) + self.epsilon, 1e-30)


@dataclass
class Balance:
    """What a layer does with the relevance of its output.

    `sent`: to each data input; `gross`: the magnitudes that were summed for it, which rounding is relative to;
    `losses`: kind -> amount; `absorbed`: what the bias keeps, for each entry of the output; `cancellation`:
    (|R1| + |R2|) / |R| of a sum; `rounding`: the relative L2 error that float32 may bring in here at most, estimated
    from small outputs of large terms.
    """

    sent: list[float]
    gross: list[float]
    losses: dict[str, float] = field(default_factory=dict)
    absorbed: np.ndarray | None = None
    cancellation: float | None = None
    rounding: float = 0.0


class Layer:
    """A node with its numbers: a (one array per data input), z, W, b in float64, and the node again with others."""

    def __init__(
        self,
        node: gs.Node,
        data: list[int],
        value: Callable[[Any], np.ndarray],
        parameters: Mapping[str, Any],
        *,
        bounds: Callable[[Any], np.ndarray] | None = None,
        gates: frozenset[int] = frozenset(),
        backend: str = "auto",
    ) -> None:
        self.node, self.data, self.value, self.backend = node, data, value, backend
        self.bounds, self.gates = bounds, gates  # a value at the model's input -> here; which inputs are gates
        self.about = OPS[node.op]
        self.stabilizer = float(parameters["stabilizer"])
        self.keeps_bias = parameters["bias"] == "keep"

    @property
    def family(self) -> str:
        """The op family."""
        return self.about.family_of(self.node, len(self.data))

    @property
    def a(self) -> np.ndarray:
        """The first data input."""
        return self.value(self.node.inputs[self.data[0]])

    @property
    def W(self) -> np.ndarray:
        """Weights as stored (some are too large to be doubled in float64); of a BatchNormalization its factor."""
        return self._batchnorm[0] if self.node.op == "BatchNormalization" else np.asarray(self.node.inputs[1].values)

    @property
    def b(self) -> np.ndarray:
        """Bias per output channel, shaped to broadcast against z; 0 where there is none or it is dropped."""
        if not self.keeps_bias or not self.about.weighted:
            return np.zeros(())
        if self.node.op == "BatchNormalization":
            return self._batchnorm[1]
        if len(self.node.inputs) < 3 or self.node.inputs[2].is_empty():
            return np.zeros(())
        b = self.value(self.node.inputs[2])
        return b.reshape(-1, *[1] * (self.W.ndim - 2)) if self.family == "convolution" else b

    @property
    def _batchnorm(self) -> tuple[np.ndarray, np.ndarray]:
        gamma, beta, mean, variance = (self.value(t) for t in self.node.inputs[1:5])
        factor = gamma / np.sqrt(variance + self.node.attrs.get("epsilon", 1e-5))
        shape = [-1, *[1] * (self.a.ndim - 2)]
        return factor.reshape(shape), (beta - mean * factor).reshape(shape)

    @property
    def z(self) -> np.ndarray:
        """The output as the forward pass computed it; without the bias where that is dropped."""
        z = self.value(self.node.outputs[0])
        if self.keeps_bias:
            return z
        if self.family == "sum":
            return sum(self.summands) + np.zeros(())
        return self(self.a, self.W) if self.about.weighted else z

    def __call__(self, a: Any, W: Any = None, b: Any = None) -> np.ndarray:
        """L(W,b)a: the node on other operands, in their precision."""
        if self.node.op == "BatchNormalization":
            return a * W + (0 if b is None else b)
        if not self.about.weighted:
            inputs = [a, *(None if t.is_empty() else self.value(t) for t in self.node.inputs[1:])]
        else:
            bias = None if b is None or not np.any(b) else np.ravel(b).astype(a.dtype)
            inputs = [a, W.astype(a.dtype, copy=False), bias]
        return evaluate_node(
            self.node.op, self.node.attrs, inputs, domain=self.node.domain or "", backend=self.backend
        )[0]

    def gross(self, a: np.ndarray, W: np.ndarray, b: Any) -> np.ndarray:
        """L(|W|,|b|)|a|, the magnitudes that cancel in z; in float32, an order of magnitude being enough."""
        small = [None if v is None else np.abs(v.astype(np.float32, copy=False)) for v in (a, W, b)]
        return self(*small).astype(np.float64)

    @property
    def ones(self) -> np.ndarray:
        """L(1,0)1: from how many inputs each output comes (padding is none), [1, M or 1, h...]."""
        a, W = np.ones((1, *self.a.shape[1:])), self.W
        return self(a, np.ones_like(W))

    @property
    def summands(self) -> list[np.ndarray]:
        """What each data input adds to the output of a sum."""
        return [self._summand(i) for i in self.data]

    @property
    def constants(self) -> Any:
        """What the other inputs of a sum add."""
        others = [self._summand(i) for i in range(len(self.node.inputs)) if i not in self.data]
        return sum(others) if self.keeps_bias else 0.0

    def _summand(self, i: int) -> np.ndarray:
        count = len(self.node.inputs)
        factor = {"Sub": (1.0, -1.0)[i % 2], "Mean": 1 / count}.get(self.node.op, 1.0)
        return factor * self.value(self.node.inputs[i])


BRANCHES: dict[str, Callable[..., list[Branch]]] = {}


def branches(*names: str) -> Callable[[Callable[..., list[Branch]]], Callable[..., list[Branch]]]:
    """Register the divisions that a rule makes, `f(layer, R, **parameters)`; refuses to overwrite."""

    def register(function: Callable[..., list[Branch]]) -> Callable[..., list[Branch]]:
        for name in names:
            if name in BRANCHES:
                raise ValueError(f"the branches of rule {name} are registered already")
            BRANCHES[name] = function
        return function

    return register


def _positive(x: Any) -> Any:
    return np.maximum(x, 0)


def _negative(x: Any) -> Any:
    return np.minimum(x, 0)


def _by_output(layer: Layer, R: np.ndarray, epsilon: float) -> Branch:
    """R over the output itself: epsilon, zero and norm."""
    z = layer.z
    if layer.family == "sum":
        summands, constants = layer.summands, layer.constants
        return Branch(R, z, constants, sum(map(np.abs, summands)) + np.abs(constants), epsilon)
    if not layer.about.weighted:
        return Branch(R, z, 0.0, np.abs(layer(np.abs(layer.a))), epsilon)
    b = layer.b
    return Branch(R, z, b, layer.gross(layer.a, layer.W, b), epsilon)


@branches("epsilon")
def _epsilon(layer: Layer, R: np.ndarray, *, epsilon: float) -> list[Branch]:
    return [_by_output(layer, R, epsilon)]


@branches("norm")
def _norm(layer: Layer, R: np.ndarray) -> list[Branch]:
    return [_by_output(layer, R, layer.stabilizer)]


@branches("zero")
def _zero(layer: Layer, R: np.ndarray) -> list[Branch]:
    return [_by_output(layer, np.where(np.abs(layer.z) > 1e-9, R, 0.0), 0.0)]


def _of_sign(layer: Layer, share: np.ndarray, sign: int) -> Branch:
    """All contributions of one sign: L(W+,b+)a+ + L(W-,0)a- or L(W-,b-)a+ + L(W+,0)a-."""
    a, W, b = layer.a, layer.W, layer.b
    same, other = (_positive, _negative) if sign > 0 else (_negative, _positive)
    z = layer(_positive(a), same(W), same(b))
    if (a < 0).any():
        z = z + layer(_negative(a), other(W))
    return Branch(share, z, same(b), np.abs(z), layer.stabilizer)


@branches("zplus")
def _zplus(layer: Layer, R: np.ndarray) -> list[Branch]:
    return [_of_sign(layer, R, 1)]


@branches("alpha_beta")
def _alpha_beta(layer: Layer, R: np.ndarray, *, alpha: float, beta: float) -> list[Branch]:
    parts = [_of_sign(layer, alpha * R, 1)]
    return [*parts, _of_sign(layer, -beta * R, -1)] if beta else parts


@branches("gamma")
def _gamma(layer: Layer, R: np.ndarray, *, gamma: float) -> list[Branch]:
    a, W, b, z = layer.a, layer.W.astype(np.float64), layer.b, layer.z
    up_W, down_W = W + gamma * _positive(W), W + gamma * _negative(W)
    up_b, down_b = b + gamma * _positive(b), b + gamma * _negative(b)
    x, y = _positive(a), _negative(a)
    signed = bool((a < 0).any())
    both = []
    for chosen, first, second, bias in ((z > 0, up_W, down_W, up_b), (z < 0, down_W, up_W, down_b)):
        share = np.where(chosen, R, 0.0)
        if not share.any():
            continue
        total, gross = layer(x, first, bias), layer.gross(x, first, bias)
        if signed:
            total, gross = total + layer(y, second), gross + layer.gross(y, second, None)
        both.append(Branch(share, total, bias, gross, layer.stabilizer))
    return both


@branches("zbox")
def _zbox(layer: Layer, R: np.ndarray, *, low: Any, high: Any) -> list[Branch]:
    assert layer.bounds is not None
    a, W, b = layer.a, layer.W, layer.b
    ends = [np.broadcast_to(layer.bounds(v), (1, *a.shape[1:])) for v in (low, high)]
    low_, high_ = np.minimum(*ends), np.maximum(*ends)
    z = layer(a, W, b) - layer(low_, _positive(W), _positive(b)) - layer(high_, _negative(W), _negative(b))
    gross = layer.gross(np.maximum(np.abs(a), np.maximum(np.abs(low_), np.abs(high_))), W, b)
    return [Branch(R, z, 0.0, 2 * gross, layer.stabilizer)]


@branches("wsquare")
def _wsquare(layer: Layer, R: np.ndarray) -> list[Branch]:
    if not layer.about.weighted:
        return []
    square = np.square(layer.b)
    z = layer(np.ones((1, *layer.a.shape[1:])), np.square(layer.W, dtype=np.float64), square)
    return [Branch(R, z, square, z, layer.stabilizer)]


@branches("flat")
def _flat(layer: Layer, R: np.ndarray) -> list[Branch]:
    if not layer.about.weighted:
        return []  # no more than eps of the relevance is lost in windows of at least one entry
    count = layer.ones
    return [Branch(R, count, 0.0, count, layer.stabilizer)]


@branches("lrn")
def _lrn(layer: Layer, R: np.ndarray) -> list[Branch]:
    attrs, x = layer.node.attrs, layer.a
    size = int(attrs["size"])
    b, c, k = float(attrs.get("alpha", 1e-4)) / size, float(attrs.get("beta", 0.75)), float(attrs.get("bias", 1.0))
    before, after = (size - 1) // 2, size // 2
    padded = np.pad(np.square(x), [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    S = sum(padded[:, i : i + x.shape[1]] for i in range(size))
    own, cross = (k + b * np.square(x)) ** -c, 2 * b * c * (k + b * S) ** (-c - 1)
    others = cross * (S - np.square(x))
    return [Branch(R, x * own - x * others, 0.0, np.abs(x) * (own + others), layer.stabilizer)]


PER_CHANNEL = ("InstanceNormalization", "GroupNormalization")


@branches("layernorm")
def _layernorm(layer: Layer, R: np.ndarray) -> list[Branch]:
    """x . (u - mean u) sums to (x - mean) . u, and that is z less beta times s."""
    inputs, x = layer.node.inputs, layer.a
    gamma = layer.value(inputs[1]) if len(inputs) > 1 and not inputs[1].is_empty() else np.ones(())
    beta = layer.value(inputs[2]) if len(inputs) > 2 and not inputs[2].is_empty() else np.zeros(())
    if layer.node.op in PER_CHANNEL:
        groups = int(layer.node.attrs.get("num_groups", x.shape[1]))
        gamma, beta = (np.repeat(v, x.shape[1] // v.size).reshape(-1, *[1] * (x.ndim - 2)) for v in (gamma, beta))
        x = x.reshape(len(x), groups, -1)  # a group's own entries last
        axes: tuple[int, ...] = (2,)
    else:
        axes = tuple(range(int(layer.node.attrs.get("axis", -1)) % x.ndim, x.ndim))
    sigma = np.sqrt(x.var(axes, keepdims=True) + layer.node.attrs.get("epsilon", 1e-5))
    terms = (np.abs(x) + np.abs(x).mean(axes, keepdims=True)) / sigma
    terms = np.abs(gamma) * terms.reshape(layer.a.shape)
    return [Branch(R, layer.z, beta, terms + np.abs(beta), layer.stabilizer)]


def balance(layer: Layer, rule: str, R: list[np.ndarray], parameters: Mapping[str, Any]) -> Balance | None:
    """What `rule` does with R (one array per output) at this layer; None where the rule is not known here."""
    total, size = sum(float(r.sum()) for r in R), sum(float(np.abs(r).sum()) for r in R)
    count = len(layer.data)
    if rule == "rearrangement":
        return _moved(layer, R[0], total, size)
    if layer.node.op in ("Max", "Min") and rule == "winner":
        return _winners(layer, R[0], total)
    if rule in ("half", "signal", "matmul"):
        return _product(layer, rule, R[0], total, size)
    if rule == "softmax":
        return _softmax(layer, R[0], total)
    if rule == "bag":
        part = Branch(
            np.where(np.abs(layer.z) > 1e-30, R[0], 0.0), layer.z, 0.0, layer.gross(layer.a, layer.W, None), 0.0
        )
        return Balance([total], [size + float((part.gross * np.abs(part.s)).sum())])
    if rule == "share":
        return _share(layer, R[0], total)
    if rule == "taylor":
        return _taylor(layer, R[0], total, **parameters)
    if (rule in ("pass", "winner", "embedding") and count == 1) or layer.node.op == "RmsNorm":
        return Balance([total], [size])
    if layer.family == "sum" and rule in ("equal", "flat", "wsquare"):
        return Balance([total / count] * count, [size / count] * count)
    if rule == "first":
        return Balance([total, *[0.0] * (count - 1)], [size, *[0.0] * (count - 1)])
    if rule not in BRANCHES:
        return None
    found = BRANCHES[rule](layer, R[0], **parameters)
    if not found and rule in ("flat", "wsquare"):
        return Balance([total], [size])
    losses = {
        "bias": sum(float((part.bias * part.s).sum()) for part in found),
        "stabilizer": sum(float((part.share - part.z * part.s).sum()) for part in found),
        "zero output": total - sum(float(part.share.sum()) for part in found),
    }
    done = Balance([total - sum(losses.values())], [size], losses)
    done.gross[0] += sum(float((part.gross * np.abs(part.s)).sum()) for part in found)
    if any(np.any(part.bias) for part in found):
        done.absorbed = sum((part.bias * part.s for part in found), np.zeros(()))
    if found and size:
        error = _length([part.share * part.condition**2 for part in found])
        done.rounding = ROUNDING * error / _length([part.share for part in found]) if error else 0.0
    if layer.family == "sum":
        shares = [summand * found[0].s for summand in layer.summands]
        done.sent = [float(share.sum()) for share in shares]
        sizes = [float(np.abs(share).sum()) for share in shares]
        done.gross = sizes if layer.keeps_bias else [amount + done.gross[0] for amount in sizes]
        done.cancellation = sum(sizes) / size if size else None
    return done


def _length(arrays: Sequence[np.ndarray]) -> float:
    return math.hypot(*(float(np.linalg.norm(array)) for array in arrays))


def _moved(layer: Layer, R: np.ndarray, total: float, size: float) -> Balance:
    """Rearrangements lose nothing, but for what lies on padded places; a Concat gives every input its own."""
    node = layer.node
    if node.op == "Concat":
        axis = int(node.attrs["axis"])
        lengths = [layer.value(t).shape[axis] for t in node.inputs]
        pieces = np.split(R, np.cumsum(lengths)[:-1], axis)
        sent = [float(pieces[i].sum()) for i in layer.data]
        gross = [float(np.abs(pieces[i]).sum()) for i in layer.data]
        return Balance(sent, gross, {"constant": total - sum(sent)})
    if node.op == "Where":
        taken = np.broadcast_to(layer.value(node.inputs[0]), R.shape)
        pieces = [R[taken if i == 1 else ~taken] for i in layer.data]
        sent = [float(piece.sum()) for piece in pieces]
        return Balance(sent, [float(np.abs(piece).sum()) for piece in pieces], {"constant": total - sum(sent)})
    if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
        inside = R[_unpadded(layer, R.ndim)].sum()
        return Balance([float(inside)], [size], {"padding": total - float(inside)})
    return Balance([total], [size])


def _winners(layer: Layer, R: np.ndarray, total: float) -> Balance:
    """The largest (smallest) of several operands takes all, the first one on ties; what a constant takes is lost."""
    left, sent, gross = R, [], []
    z = layer.z
    for i, tensor in enumerate(layer.node.inputs):
        wins = np.broadcast_to(layer.value(tensor) == z, np.broadcast_shapes(z.shape, R.shape))
        if i in layer.data:
            share = np.where(wins, left, 0.0)
            sent.append(float(share.sum()))
            gross.append(float(np.abs(share).sum()))
        left = np.where(wins, 0.0, left)
    return Balance(sent, gross, {"constant": total - sum(sent)})


def _product(layer: Layer, rule: str, R: np.ndarray, total: float, size: float) -> Balance | None:
    """Products of two tensors: both sides the same, or all to the signal and none to the gate."""
    if len(layer.data) != 2:
        return None
    if layer.node.op == "Div":
        return Balance([total, 0.0], [size, 0.0])
    gate = next(iter(layer.gates)) if rule == "signal" and len(layer.gates) == 1 else None
    weights = [0.5, 0.5] if gate is None else [float(i != gate) for i in (0, 1)]
    if layer.family == "product":
        return Balance([w * total for w in weights], [w * size for w in weights])
    A, B = (np.abs(layer.value(t)) for t in layer.node.inputs)
    gross = np.einsum(layer.node.attrs["equation"], A, B) if layer.node.op == "Einsum" else A @ B
    factor, epsilon = (2.0, 1e-8) if gate is None else (1.0, layer.stabilizer)
    part = Branch(R, factor * layer.z, 0.0, factor * gross, epsilon)
    arrived, summed = float((part.z * part.s).sum()), size + float((part.gross * np.abs(part.s)).sum())
    done = Balance([w * arrived for w in weights], [w * summed for w in weights], {"stabilizer": total - arrived})
    if size:
        done.rounding = ROUNDING * _length([part.share * part.condition**2]) / _length([part.share])
    return done


def _softmax(layer: Layer, R: np.ndarray, total: float) -> Balance:
    """x . (R - s sum R) does not conserve; x is 0 where a mask has closed it."""
    x, s = layer.a, layer.z
    x = np.where((s > 0) & (np.abs(x) < 1e30), x, 0.0)
    axis = int(layer.node.attrs.get("axis", -1))
    back = x * (R - s * R.sum(axis, keepdims=True))
    gross = np.abs(x) * (np.abs(R) + s * np.abs(R).sum(axis, keepdims=True))
    return Balance([float(back.sum())], [float(gross.sum())], {"softmax": total - float(back.sum())})


def _share(layer: Layer, R: np.ndarray, total: float) -> Balance:
    """All of z is shared out, its bias as well; only the stabilizer keeps something."""
    inputs = layer.node.inputs
    dropped = layer.family == "kernel" and not layer.keeps_bias and len(inputs) > 3
    z = layer.z - (layer.value(inputs[3]) if dropped else 0.0)
    if layer.family == "kernel":
        x, V, alpha = layer.a, *(layer.value(tensor) for tensor in inputs[1:3])
        gross = np.abs(np.minimum(x[:, None], V)).sum(2) @ np.abs(alpha).T
    else:
        gross = layer.gross(layer.a, layer.W, layer.b)
    part = Branch(R, z, 0.0, gross, layer.stabilizer)
    sent = float((part.z * part.s).sum())
    return Balance([sent], [float((part.gross * np.abs(part.s)).sum())], {"stabilizer": total - sent})


def _taylor(layer: Layer, R: np.ndarray, total: float, *, reference: Any, at: str) -> Balance:
    """What of f(x) the expansion about x0 is, for each output; the rest is the remainder."""
    node, x = layer.node, layer.a
    V, alpha = (layer.value(tensor) for tensor in node.inputs[1:3])
    b = layer.value(node.inputs[3]) if len(node.inputs) > 3 and layer.keeps_bias else 0.0
    gamma, coef0, degree = (float(node.attrs.get(name, 0)) for name in ("gamma", "coef0", "degree"))

    def machine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f [N, P] and df/dx [N, P, D]."""
        apart = x[:, None] - V
        if node.attrs["kind"] == "rbf":
            K = np.exp(-gamma * (apart**2).sum(2))
            slope = -2 * gamma * K[:, :, None] * apart
        else:
            u = gamma * x @ V.T + coef0
            K = np.tanh(u) if node.attrs["kind"] == "sigmoid" else u**degree
            slope = 1 - K**2 if node.attrs["kind"] == "sigmoid" else degree * u ** (degree - 1)
            slope = gamma * slope[:, :, None] * V
        return K @ alpha.T + b, np.einsum("ps,nsd->npd", alpha, slope)

    f, g = machine(x)
    s = np.divide(R, f + np.where(f >= 0, layer.stabilizer, -layer.stabilizer))
    if isinstance(reference, str):
        gross = np.abs(R)
        return Balance([total], [float(gross.sum())], {"remainder": float((R * ((g**2).sum(2) == 0)).sum())})
    x0 = np.broadcast_to(np.asarray(reference, np.float64).reshape(1, -1), x[:1].shape)
    f0, g0 = machine(x0)
    terms = (x - x0)[:, None] * (g if at == "sample" else g0)
    sent = float((s * (terms.sum(2) + f0)).sum())
    lost = {"stabilizer": total - float((s * f).sum()), "remainder": float((s * f).sum()) - sent}
    size = float((np.abs(s) * (np.abs(terms).sum(2) + np.abs(alpha).sum(1) + np.abs(b) + np.abs(f0))).sum())
    return Balance([sent], [size], lost)


def _unpadded(layer: Layer, rank: int) -> tuple[slice, ...]:
    pads = [int(p) for p in layer.value(layer.node.inputs[1])]
    given = layer.node.inputs[3:4]
    axes = [int(a) % rank for a in layer.value(given[0])] if given and not given[0].is_empty() else list(range(rank))
    index = [slice(None)] * rank
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        index[axis] = slice(max(begin, 0), -end if end > 0 else None)
    return tuple(index)


# ------------------------------------------------------------------------------------------------- bias, given back


def spread(layer: Layer, absorbed: np.ndarray) -> list[np.ndarray]:
    """What the bias kept, given back in equal parts to the inputs that each output came from; one array per data input.

    R_i += sum_j b_j s_j / n_j over the outputs j that input i reaches, n_j being the number of inputs of j (padding is
    none). `absorbed` [N, out...] = b s. What an output without any input holds stays lost. For sums and
    BatchNormalization, whose outputs have one entry of each data input, it is absorbed / number of data inputs; a layer
    normalization shares it among the entries it normalizes.
    """
    node, shape = layer.node, layer.a.shape[1:]
    absorbed = np.asarray(absorbed)
    if layer.family == "dense":
        return [np.broadcast_to(absorbed.sum(-1, keepdims=True) / shape[-1], (len(absorbed), *shape)).copy()]
    if node.op in PER_CHANNEL:
        parts = absorbed.reshape(len(absorbed), int(node.attrs.get("num_groups", absorbed.shape[1])), -1)
        return [np.broadcast_to(parts.mean(2, keepdims=True), parts.shape).reshape(absorbed.shape).copy()]
    if layer.family == "layernorm":
        axes = tuple(range(int(node.attrs.get("axis", -1)) % absorbed.ndim, absorbed.ndim))
        return [np.broadcast_to(absorbed.mean(axes, keepdims=True), absorbed.shape).copy()]
    if layer.family != "convolution":
        arrays = [layer.value(node.inputs[i]) for i in layer.data]
        return [_unbroadcast(absorbed / len(arrays), array.shape) for array in arrays]
    count = layer.ones
    s = np.divide(absorbed, count, out=np.zeros(np.broadcast_shapes(absorbed.shape, count.shape)), where=count > 0)
    group, channels = int(node.attrs.get("group", 1)), shape[0]
    kernel = layer.W.shape[2:]
    grouped = s.reshape(len(s), group, -1, *s.shape[2:]).sum(2)  # ones do not tell output channels apart
    one = np.ones((group, 1, *kernel))
    attrs = {"strides": node.attrs["strides"], "dilations": node.attrs["dilations"], "group": group}
    pads = [int(p) for p in node.attrs["pads"]]
    if node.op == "Conv":
        rest = [
            size - ((h - 1) * step + d * (k - 1) + 1 - begin - end)
            for size, h, k, step, d, begin, end in zip(
                shape[1:], s.shape[2:], kernel, attrs["strides"], attrs["dilations"],
                pads[: len(kernel)], pads[len(kernel) :], strict=True,
            )
        ]  # fmt: skip
        attrs |= {"pads": pads, "output_padding": rest}
        (back,) = evaluate_node("ConvTranspose", attrs, [grouped, one], backend=layer.backend)
    else:
        (back,) = evaluate_node("Conv", attrs | {"pads": pads}, [grouped, one], backend=layer.backend)
    return [np.repeat(back, channels // group, axis=1)]


def _unbroadcast(R: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums the axes along which an input was expanded; never the batch."""
    axes = tuple(i for i in range(1, R.ndim) if shape[i] == 1 and R.shape[i] != 1)
    return R.sum(axes, keepdims=True) if axes else R


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Relative L2 difference |a - b| / |b|; 0 where both are 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference, scale = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)
