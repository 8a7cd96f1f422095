"""What transformers add: products of two tensors, softmax, normalization by the sample itself, embeddings, masks."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.registry import KEEPS, NONNEGATIVE, Node, Parts, transpose


def _turned(op: Graph, x: Value, rank: int) -> Value:
    """The last two axes exchanged."""
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _product_family(node: gs.Node, data: int) -> str:
    return "matmul" if data > 1 else "average"


@transpose("MatMul", family=_product_family, sign=KEEPS)
def matmul(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s [..., m, n] -> s B^T [..., m, k], A^T s [..., k, n]."""
    ranks = node.rank(0), node.rank(1)
    if min(ranks) < 2 or (len(node.data) > 1 and ranks[0] != ranks[1]) or any(ranks[i] < max(ranks) for i in node.data):
        raise UnsupportedError(f"{node!r}: a matrix product of ranks {ranks[0]} and {ranks[1]}")
    both = {0: lambda: s @ _turned(op, node.input(1), ranks[1]), 1: lambda: _turned(op, node.input(0), ranks[0]) @ s}
    parts = Parts(both[i]() for i in node.data)
    return parts if len(parts) > 1 else parts[0]


def softmax_axis(node: Node) -> int:
    """The axis that sums to one."""
    return int(node.attrs.get("axis", -1)) % node.rank(0)


@transpose("Softmax", family="softmax", sign=NONNEGATIVE)
def softmax(op: Graph, node: Node, s: Value) -> Value:
    """y (s - sum(s y))."""
    y = node.output()
    return y * (s - op.ReduceSum(s * y, [softmax_axis(node)], keepdims=1))


@transpose("Hardmax", family="softmax", sign=NONNEGATIVE)
def hardmax(op: Graph, node: Node, s: Value) -> Value:
    """0: constant wherever it has a derivative."""
    return op.zero


@transpose("LogSoftmax", family="softmax")
def log_softmax(op: Graph, node: Node, s: Value) -> Value:
    """s - exp(y) sum(s)."""
    return s - op.Exp(node.output()) * op.ReduceSum(s, [softmax_axis(node)], keepdims=1)


@transpose("Einsum", family=_product_family, sign=KEEPS)
def einsum(op: Graph, node: Node, s: Value) -> Value | Parts:
    """Z = A B summed over letters: to A the einsum of s and B with its own letters as the result, to B that of s, A."""
    inputs, _, result = str(node.attrs["equation"]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    parts = Parts()
    for i in node.data:
        others = [k for k in range(len(terms)) if k != i]
        known = {*result, *(letter for k in others for letter in terms[k])}
        if "." in inputs or not result or len(set(terms[i])) < len(terms[i]) or not set(terms[i]) <= known:
            raise UnsupportedError(
                f"{node!r}: equation {node.attrs['equation']} has an ellipsis, a diagonal, no result or a plain sum",
                hint="write it as MatMul and ReduceSum",
            )
        equation = f"{','.join([result, *(terms[k] for k in others)])}->{terms[i]}"
        parts.append(op.Einsum(s, *(node.input(k) for k in others), equation=equation))
    return parts if len(parts) > 1 else parts[0]


class Normalization:
    """y = gamma (x - mean) / sigma + beta over the normalized axes; RmsNorm has no mean and no beta.

    LayerNormalization, RmsNorm: the axes from `axis` on; InstanceNormalization: all positions of a channel;
    GroupNormalization: all positions of the channels of a group.
    """

    def __init__(self, op: Graph, node: Node) -> None:
        rank = node.rank(0)
        self.x = node.input(0)
        self.has_mean = node.op != "RmsNorm"
        self.gamma = node.input(1) if node.has(1) else op.as_value(1.0)
        self.groups, self.channels, self.rank = int(node.attrs.get("num_groups", 0)), node.dims(0)[1], rank
        if node.op in ("InstanceNormalization", "GroupNormalization"):
            self.axes = list(range(2, rank))
            if self.groups and self.channels is None:
                raise UnsupportedError(f"{node!r}: the number of channels is not known")
            scale = node.array(1)
            if scale is None:
                raise UnsupportedError(f"{node!r}: its scale is computed while running")
            each = (self.channels or 0) // self.groups if self.groups and scale.size == self.groups else 1
            self.gamma = op.constant(np.repeat(scale, each).reshape(-1, *[1] * (rank - 2)), op.dtype)
        else:
            self.axes = list(range(int(node.attrs.get("axis", -1)) % rank, rank))
        self.centred = self.x - self.mean(op, self.x) if self.has_mean else self.x
        variance = self.mean(op, self.centred * self.centred)
        self.sigma = op.Sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))

    def mean(self, op: Graph, v: Value) -> Value:
        """Mean over the normalized axes, in a shape that broadcasts against v."""
        if not self.groups:
            return op.ReduceMean(v, self.axes, keepdims=1)
        channels = int(self.channels or 0)
        of_groups = op.ReduceMean(op.Reshape(v, [0, self.groups, -1]), [2], keepdims=1)
        of_channels = op.Expand(of_groups, [1, self.groups, channels // self.groups])
        return op.Reshape(of_channels, [-1, channels, *[1] * (self.rank - 2)])


@transpose("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RmsNorm", family="layernorm")
def layer_normalization(op: Graph, node: Node, s: Value) -> Value:
    """u = s gamma / sigma; u - mean(u) - centred mean(u centred) / sigma^2."""
    n = Normalization(op, node)
    u = s * n.gamma / n.sigma
    spread = n.centred * (n.mean(op, u * n.centred) / (n.sigma * n.sigma))
    return (u - n.mean(op, u) if n.has_mean else u) - spread


def embedding(op: Graph, node: Node, s: Value) -> Value:
    """s [B, T, features...] -> [B, T]: a token's relevance is the sum over its features."""
    table = node.array(0)
    assert table is not None
    if int(node.attrs.get("axis", 0)) % table.ndim != 0:
        raise UnsupportedError(f"{node!r}: token ids pick along axis {node.attrs['axis']} of the table")
    rank = node.rank(1)
    return op.ReduceSum(s, list(range(rank, rank + table.ndim - 1)), keepdims=0) if table.ndim > 1 else s


def _where_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    return all(
        t.name in nonnegative or (isinstance(t, gs.Constant) and bool((t.values >= 0).all())) for t in node.inputs[1:]
    )


@transpose("Where", family="rearrangement", sign=_where_sign)
def where(op: Graph, node: Node, s: Value) -> Value | Parts:
    """s to the branch that was taken, 0 to the other."""
    condition = op.value(node.node.inputs[0])
    parts = Parts(op.where(condition, s, 0.0) if i == 1 else op.where(condition, 0.0, s) for i in node.data)
    return parts if len(parts) > 1 else parts[0]


@transpose("Max", "Min", family="max", sign=KEEPS)
def extreme(op: Graph, node: Node, s: Value) -> Value | Parts:
    """All to the operand that wins, the first one on ties."""
    y, left = node.output(), s
    parts = {}
    for i in range(len(node.node.inputs)):
        wins = op.Equal(node.input(i), y)
        parts[i] = op.where(wins, left, 0.0)
        left = op.where(wins, 0.0, left)
    found = Parts(parts[i] for i in node.data)
    return found if len(found) > 1 else found[0]
