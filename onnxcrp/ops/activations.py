"""Elementwise nonlinearities, each by its derivative. LRP passes relevance through them; `gradient` multiplies."""

from __future__ import annotations

from math import pi, sqrt

import onnx_graphsurgeon as gs

from onnxcrp.graph import Graph, Value
from onnxcrp.ops.registry import KEEPS, NONNEGATIVE, Node, activation


@activation("Relu", sign=NONNEGATIVE)
def relu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > 0."""
    return op.float(x > 0.0)


@activation("LeakyRelu", sign=KEEPS)
def leaky_relu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > 0, else alpha."""
    return op.where(x > 0.0, 1.0, float(node.attrs.get("alpha", 0.01)))


@activation("PRelu")
def prelu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > 0, else the slope."""
    return op.where(x > 0.0, 1.0, node.input(1))


@activation("ThresholdedRelu", sign=KEEPS)
def thresholded_relu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > alpha."""
    return op.float(x > float(node.attrs.get("alpha", 1.0)))


@activation("Elu", sign=KEEPS)
def elu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > 0, else alpha exp(x) = y + alpha."""
    return op.where(x > 0.0, 1.0, y + float(node.attrs.get("alpha", 1.0)))


@activation("Celu", sign=KEEPS)
def celu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where x > 0, else exp(x / alpha)."""
    return op.where(x > 0.0, 1.0, y / float(node.attrs.get("alpha", 1.0)) + 1.0)


@activation("Selu", sign=KEEPS)
def selu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """gamma where x > 0, else gamma alpha exp(x) = y + gamma alpha."""
    alpha, gamma = (
        float(node.attrs.get("alpha", 1.6732632423543772)),
        float(node.attrs.get("gamma", 1.0507009873554805)),
    )
    return op.where(x > 0.0, gamma, y + alpha * gamma)


@activation("Sigmoid", sign=NONNEGATIVE)
def sigmoid(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """y (1 - y)."""
    return y * (1.0 - y)


@activation("HardSigmoid", sign=NONNEGATIVE)
def hard_sigmoid(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """alpha inside the slope."""
    return op.where(op.And(y > 0.0, y < 1.0), float(node.attrs.get("alpha", 0.2)), 0.0)


@activation("Tanh", sign=KEEPS)
def tanh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 - y^2."""
    return 1.0 - y * y


@activation("Softplus", sign=NONNEGATIVE)
def softplus(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """sigmoid(x)."""
    return op.Sigmoid(x)


@activation("Softsign", sign=KEEPS)
def softsign(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / (1 + |x|)^2."""
    d = op.Abs(x) + 1.0
    return 1.0 / (d * d)


@activation("Silu", sign=KEEPS)
def silu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """x sigmoid(alpha x): sigmoid + alpha y (1 - sigmoid)."""
    alpha = float(node.attrs.get("alpha", 1.0))
    gate = op.Sigmoid(x * alpha if alpha != 1 else x)
    return gate + y * (1.0 - gate) * alpha if alpha != 1 else gate + y * (1.0 - gate)


@activation("HardSwish", sign=KEEPS)
def hard_swish(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """x hardsigmoid(x): 0 below -3, 1 above 3, (2 x + 3) / 6 between."""
    inner = op.where(x >= 3.0, 1.0, x * (1 / 3) + 0.5)
    return op.where(x > -3.0, inner, 0.0)


@activation("Mish", sign=KEEPS)
def mish(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """x tanh(softplus(x)): t + x (1 - t^2) sigmoid(x)."""
    t = op.Tanh(op.Softplus(x))
    return t + x * (1.0 - t * t) * op.Sigmoid(x)


@activation("Gelu", sign=KEEPS)
def gelu(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """x Phi(x): Phi(x) + x phi(x), or the derivative of the tanh form."""
    if node.attrs.get("approximate", "none") == "tanh":
        c = sqrt(2 / pi)
        t = op.Tanh((x + x * x * x * 0.044715) * c)
        return (t + 1.0) * 0.5 + x * (1.0 - t * t) * (x * x * (3 * 0.044715) + 1.0) * (0.5 * c)
    cumulative = (op.Erf(x * (1 / sqrt(2))) + 1.0) * 0.5
    return cumulative + x * op.Exp(x * x * -0.5) * (1 / sqrt(2 * pi))


def _clip_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    low = node.inputs[1] if len(node.inputs) > 1 else None
    bounded = isinstance(low, gs.Constant) and low.values.size == 1 and float(low.values.reshape(())) >= 0
    return bounded or (node.inputs[0].name in nonnegative and _upper_bound(node) >= 0)


def _upper_bound(node: gs.Node) -> float:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return float("inf")
    high = node.inputs[2]
    return float(high.values.reshape(())) if isinstance(high, gs.Constant) else -1.0


@activation("Clip", sign=_clip_sign)
def clip(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 where nothing is cut off."""
    return op.float(op.Equal(x, y))


@activation("Erf", sign=KEEPS)
def erf(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """2 / sqrt(pi) exp(-x^2)."""
    return op.Exp(-(x * x)) * (2 / sqrt(pi))


@activation("Exp", sign=NONNEGATIVE)
def exp(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """y."""
    return y


@activation("Log")
def log(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / x."""
    return 1.0 / x


@activation("Sqrt", sign=NONNEGATIVE)
def sqrt_(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / (2 y)."""
    return 0.5 / y


@activation("Reciprocal", sign=KEEPS)
def reciprocal(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """-y^2."""
    return -(y * y)


@activation("Abs", sign=NONNEGATIVE)
def abs_(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """sign(x)."""
    return op.Sign(x)


@activation("Pow", sign=KEEPS)
def power(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """p x^(p - 1); y log(base) where the exponent is what varies."""
    if node.data == [1]:
        return y * op.Log(node.input(0))
    p = node.input(1)
    return p * op.Pow(x, p - 1.0)


@activation("Sin")
def sin(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """cos x."""
    return op.Cos(x)


@activation("Cos")
def cos(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """-sin x."""
    return -op.Sin(x)


@activation("Tan")
def tan(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 + y^2."""
    return y * y + 1.0


@activation("Asin", sign=KEEPS)
def asin(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / sqrt(1 - x^2)."""
    return 1.0 / op.Sqrt(1.0 - x * x)


@activation("Acos", sign=NONNEGATIVE)
def acos(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """-1 / sqrt(1 - x^2)."""
    return -1.0 / op.Sqrt(1.0 - x * x)


@activation("Atan", sign=KEEPS)
def atan(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / (1 + x^2)."""
    return 1.0 / (x * x + 1.0)


@activation("Sinh", sign=KEEPS)
def sinh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """cosh x."""
    return op.Cosh(x)


@activation("Cosh", sign=NONNEGATIVE)
def cosh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """sinh x."""
    return op.Sinh(x)


@activation("Asinh", sign=KEEPS)
def asinh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / sqrt(x^2 + 1)."""
    return 1.0 / op.Sqrt(x * x + 1.0)


@activation("Acosh", sign=NONNEGATIVE)
def acosh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / sqrt(x^2 - 1)."""
    return 1.0 / op.Sqrt(x * x - 1.0)


@activation("Atanh", sign=KEEPS)
def atanh(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 / (1 - x^2)."""
    return 1.0 / (1.0 - x * x)


@activation("Shrink")
def shrink(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1 outside [-lambda, lambda]."""
    return op.float(op.Abs(x) > float(node.attrs.get("lambd", 0.5)))


@activation("Mod")
def modulo(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1: the divisor is taken off a whole number of times."""
    return op.as_value(1.0)


@activation("Round", "Floor", "Ceil", sign=KEEPS)
def rounding(op: Graph, node: Node, x: Value, y: Value) -> Value:
    """1: rounding is taken for the identity (straight through)."""
    return op.as_value(1.0)
