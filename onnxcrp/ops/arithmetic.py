"""Sums of tensors, products with constants, changes of number format."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.graph import Graph, Value
from onnxcrp.ops.registry import KEEPS, Node, Parts, transpose


def _each(node: Node, factors: list[float], s: Value) -> Value | Parts:
    parts = Parts(s * factors[i] if factors[i] != 1 else s for i in node.data)
    return parts if len(parts) > 1 else parts[0]


@transpose("Add", "Sum", family="sum", sign=KEEPS)
def add(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s to every summand."""
    return _each(node, [1.0] * len(node.node.inputs), s)


@transpose("Sub", family="sum")
def sub(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s to the minuend, -s to the subtrahend."""
    return _each(node, [1.0, -1.0], s)


@transpose("Mean", family="sum", sign=KEEPS)
def mean_of(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s over the number of summands, to every one."""
    n = len(node.node.inputs)
    return _each(node, [1.0 / n] * n, s)


def _product_family(node: gs.Node, data: int) -> str:
    return "product" if data > 1 else "scale"


@transpose("Mul", family=_product_family, sign=KEEPS)
def mul(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s times the other factor."""
    parts = Parts(s * node.input(1 - i) for i in node.data)
    return parts if len(parts) > 1 else parts[0]


@transpose("Div", family=_product_family, sign=KEEPS)
def div(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s over the divisor; to the divisor itself -s y over it."""
    divisor = node.input(1)
    parts = Parts(s / divisor if i == 0 else -(s * node.output() / divisor) for i in node.data)
    return parts if len(parts) > 1 else parts[0]


@transpose("Neg", family="scale")
def neg(op: Graph, node: Node, s: Value) -> Value:
    """-s."""
    return -s


def _cast_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    dtype: Any = node.inputs[0].dtype
    return node.inputs[0].name in nonnegative or (dtype is not None and np.dtype(dtype).kind == "u")


@transpose("Cast", "CastLike", family="scale", sign=_cast_sign)
def cast(op: Graph, node: Node, s: Value) -> Value:
    """s: rounding is taken for the identity."""
    return s


def _dequantize_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    """The real value is >= 0 where it was before it was quantized, or where the zero point is the smallest code."""
    if node.inputs[0].name in nonnegative:
        return True
    if len(node.inputs) > 2 and isinstance(node.inputs[2], gs.Constant):
        zero = node.inputs[2].values
        return zero.dtype.kind in "iu" and bool((zero == np.iinfo(zero.dtype).min).all())
    dtype: Any = node.inputs[0].dtype
    return dtype is not None and np.dtype(dtype).kind == "u"


@transpose("QuantizeLinear", "DynamicQuantizeLinear", family="scale", sign=KEEPS)
def quantize(op: Graph, node: Node, s: Value) -> Value:
    """s: rounding is taken for the identity."""
    return s


@transpose("DequantizeLinear", family="scale", sign=_dequantize_sign)
def dequantize(op: Graph, node: Node, s: Value) -> Value:
    """s: quantized values stand for the real ones."""
    return s
