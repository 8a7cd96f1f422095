"""Kernel machines: f_p(x) = sum_s alpha_ps K(x, v_s) + b_p over support vectors v_s, one node each.

    Kernel      a differentiable K: rbf exp(-gamma |x - v|^2), polynomial (gamma x.v + coef0)^degree,
                sigmoid tanh(gamma x.v + coef0)
    SumKernel   a K that is a sum over features, sum_d k(x_d, v_d): intersection, k = min

Inputs: x [N, D], V [S, D], alpha [P, S], b [P] or none. Output: [N, P].
"""

from __future__ import annotations

from onnxcrp.graph import Graph, Value
from onnxcrp.ops.linear import turned
from onnxcrp.ops.registry import Node, transpose


class Machine:
    """The node again: its value and its derivative, at its input or anywhere else."""

    def __init__(self, op: Graph, node: Node) -> None:
        self.op = op
        self.x, self.V, self.alpha = node.input(0), node.input(1), node.input(2)
        self.kind = str(node.attrs["kind"])
        self.gamma, self.coef0, self.degree = (float(node.attrs.get(n, 0.0)) for n in ("gamma", "coef0", "degree"))
        vectors = node.array(1)
        assert vectors is not None
        self.features = vectors.shape[1]

    def _product(self, x: Value) -> Value:
        """u = gamma x.v + coef0."""
        return x @ turned(self.op, self.V) * self.gamma + self.coef0

    def kernel(self, x: Value) -> Value:
        """K(x, v_s): [N, D] -> [N, S]."""
        op = self.op
        if self.kind == "polynomial":
            return op.Pow(self._product(x), self.degree)
        if self.kind == "sigmoid":
            return op.Tanh(self._product(x))
        if self.kind == "intersection":
            return op.ReduceSum(self.terms, [2], keepdims=0)
        apart = op.Unsqueeze(x, [1]) - self.V
        return op.Exp(op.ReduceSum(apart * apart, [2], keepdims=0) * -self.gamma)

    def __call__(self, x: Value) -> Value:
        """f(x) - b: [N, D] -> [N, P]."""
        return self.kernel(x) @ turned(self.op, self.alpha)

    # ---- differentiable kernels --------------------------------------------------------------------------------
    def slope(self, x: Value) -> Value:
        """What v (rbf: x - v) is multiplied by in dK/dx, [N, S]."""
        if self.kind == "polynomial":
            return self.op.Pow(self._product(x), self.degree - 1) * (self.degree * self.gamma)
        if self.kind == "sigmoid":
            K = self.kernel(x)
            return (1.0 - K * K) * self.gamma
        return self.kernel(x) * (-2 * self.gamma)

    def back(self, w: Value, x: Value) -> Value:
        """Of w = m slope, [..., S], sum_s m_s dK(x, v_s)/dx_d, [..., D]."""
        if self.kind == "rbf":
            return x * self.op.ReduceSum(w, [-1], keepdims=1) - w @ self.V
        return w @ self.V

    def T(self, s: Value, x: Value) -> Value:
        """The transpose at x: s [N, P] -> [N, D]."""
        return self.back((s @ self.alpha) * self.slope(x), x)

    def jacobian(self, x: Value) -> Value:
        """df_p/dx_d, [N, P, D]."""
        return self.back(self.alpha * self.op.Unsqueeze(self.slope(x), [1]), self.op.Unsqueeze(x, [1]))

    # ---- sums over features ------------------------------------------------------------------------------------
    @property
    def terms(self) -> Value:
        """k(x_d, v_sd), [N, S, D]."""
        return self.op.Min(self.op.Unsqueeze(self.x, [1]), self.V)

    def over_vectors(self, s: Value, terms: Value) -> Value:
        """sum_ps s_p alpha_ps terms_sd: s [N, P], terms [N, S, D] -> [N, D]."""
        return self.op.Squeeze(self.op.Unsqueeze(s @ self.alpha, [1]) @ terms, [1])


@transpose("Kernel", family="kernel")
def kernel(op: Graph, node: Node, s: Value) -> Value:
    """s [N, P] -> [N, D]: sum_ps s_p alpha_ps dK(x, v_s)/dx_d."""
    machine = Machine(op, node)
    return machine.T(s, machine.x)


@transpose("SumKernel", family="kernel")
def sum_kernel(op: Graph, node: Node, s: Value) -> Value:
    """s [N, P] -> [N, D]: sum_ps s_p alpha_ps where x_d is the smaller one."""
    machine = Machine(op, node)
    smaller = op.Unsqueeze(machine.x, [1]) < machine.V
    return machine.over_vectors(s, op.where(smaller, 1.0, 0.0))
