"""Entries picked and put by index: what is picked sends its message back to where it came from.

Messages and indices may differ in batch (1 or N, see the design's list of traps), and the operators that pick and put
element by element do not broadcast: both are expanded to the larger of the two first.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.geometry import common_batch, scatter_axis
from onnxcrp.ops.registry import KEEPS, Node, Parts, carries_none, transpose


def _axis(node: Node, default: int = 0) -> int:
    return int(node.attrs.get("axis", default)) % node.rank(0)


def _integers(op: Graph, node: Node, index: int) -> Value:
    """Input `index` as int64."""
    return op.Cast(op.value(node.node.inputs[index]), to=7)


def _zeros(op: Graph, node: Node, batch: Value) -> Value:
    """Zeros of the size of input 0, `batch` (int64 [1]) along axis 0."""
    return op.Expand(0.0, op.Concat(batch, node.size(0, 1), axis=0) if node.rank(0) > 1 else batch)


def _put_back(op: Graph, node: Node, s: Value, indices: Value, axis: int) -> Value:
    """s added to zeros where `indices` say along `axis`: the transpose of picking element by element."""
    s, indices = common_batch(op, [s, indices], node.rank(0))
    zeros = _zeros(op, node, op.shape(s, 0, 1))
    return op.ScatterElements(zeros, indices, s, axis=axis, reduction="add")


@transpose("TopK", family="rearrangement", sign=KEEPS)
def top_k(op: Graph, node: Node, s: list[Value]) -> Value:
    """The k values back to their places."""
    return _put_back(op, node, s[0], op.value(node.node.outputs[1]), _axis(node, -1))


@transpose("GatherElements", family="rearrangement", sign=KEEPS)
def gather_elements(op: Graph, node: Node, s: Value) -> Value:
    """s added to the entries it was picked from."""
    return _put_back(op, node, s, _integers(op, node, 1), _axis(node))


def _scatter_family(node: gs.Node, data: int) -> str:
    return "rearrangement" if node.attrs.get("reduction", "none") == "none" else "sum"


def _check_reduction(node: Node) -> None:
    reduction = node.attrs.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise UnsupportedError(f"{node!r}: reduction {reduction!r}", hint="none and add have a transpose")


@transpose("ScatterElements", family=_scatter_family, sign=KEEPS)
def scatter_elements(op: Graph, node: Node, s: Value) -> Value | Parts:
    """What was put gets the s of its place; what was overwritten gets none."""
    _check_reduction(node)
    indices, axis = _integers(op, node, 1), _axis(node)
    s, indices = common_batch(op, [s, indices], node.rank(0))
    parts = Parts()
    if 0 in node.data:
        covered = node.attrs.get("reduction", "none") == "none"
        nothing = op.Expand(0.0, op.shape(indices))
        parts.append(op.ScatterElements(s, indices, nothing, axis=axis) if covered else s)
    if 2 in node.data:
        parts.append(op.GatherElements(s, indices, axis=axis))
    return parts if len(parts) > 1 else parts[0]


@transpose("GatherND", family="rearrangement", sign=KEEPS)
def gather_nd(op: Graph, node: Node, s: Value) -> Value:
    """s added to the entries it was picked from.

    Indices [B, ..., r] below batch axes count within a sample: they become one index each into the r axes made flat.
    Without batch axes they name samples, so that the message must be as large as the forward pass.
    """
    batch_axes, depth = int(node.attrs.get("batch_dims", 0)), node.dims(1)[-1]
    indices = _integers(op, node, 1)
    if batch_axes == 0:
        whole = op.Expand(s, op.shape(node.output()))
        return op.ScatterND(op.Expand(0.0, op.shape(node.input(0))), indices, whole, reduction="add")
    sizes = [size for size in node.dims(0)[batch_axes:] if size is not None]
    if depth is None or len(sizes) < node.rank(0) - batch_axes:
        raise UnsupportedError(f"{node!r}: the sizes of its data are not known", hint="export with static sizes")
    lengths, rest = sizes[:depth], int(np.prod(sizes[depth:]))
    strides = [int(np.prod(lengths[i + 1 :])) for i in range(depth)]
    indices = op.Where(op.Less(indices, op.as_value([0])), op.Add(indices, op.as_value(lengths)), indices)
    flat = op.ReduceSum(op.Mul(indices, op.as_value(strides)), [-1], keepdims=0)

    def rows(value: Value, *last: int) -> Value:  # [B, batch axes, ...] -> [B, batch axes, -1, rest]
        return op.Reshape(value, op.Concat(op.shape(value, 0, batch_axes), list(last), axis=0))

    flat, picked = common_batch(op, [rows(flat, -1, 1), rows(s, -1, rest)], batch_axes + 2)
    zeros = op.Expand(0.0, op.Concat(op.shape(picked, 0, batch_axes), [int(np.prod(lengths)), rest], axis=0))
    back = op.ScatterElements(zeros, op.Expand(flat, op.shape(picked)), picked, axis=batch_axes, reduction="add")
    return op.Reshape(back, node.full_size(0))


@transpose("ScatterND", family=_scatter_family, sign=KEEPS)
def scatter_nd(op: Graph, node: Node, s: Value) -> Value | Parts:
    """What was put gets the s of its place; what was overwritten gets none. Indices name samples as well."""
    _check_reduction(node)
    indices = _integers(op, node, 1)
    whole = op.Expand(s, op.shape(node.output()))
    parts = Parts()
    if 0 in node.data:
        covered = node.attrs.get("reduction", "none") == "none"
        nothing = op.Expand(0.0, op.shape(op.value(node.node.inputs[2])))
        parts.append(op.ScatterND(whole, indices, nothing) if covered else whole)
    if 2 in node.data:
        parts.append(op.GatherND(whole, indices))
    return parts if len(parts) > 1 else parts[0]


@transpose("Compress", family="rearrangement", sign=KEEPS)
def compress(op: Graph, node: Node, s: Value) -> Value:
    """s at the entries that were kept."""
    if "axis" not in node.attrs:
        raise UnsupportedError(f"{node!r}: it picks from all samples at once", hint="give it an axis")
    kept = op.Reshape(op.NonZero(op.value(node.node.inputs[1])), [-1])
    return scatter_axis(op, node, s, _axis(node), kept)


@transpose("MaxUnpool", family="rearrangement", sign=KEEPS)
def max_unpool(op: Graph, node: Node, s: Value) -> Value:
    """The s of the place that an entry was put at; its index counts through the whole tensor."""
    size = op.ReduceProd(op.shape(node.output(), 1), keepdims=1)
    indices = op.Mod(_integers(op, node, 1), size)
    places = op.Reshape(indices, op.Concat(op.shape(indices, 0, 1), [-1], axis=0))
    flat, places = common_batch(op, [op.Reshape(s, op.Concat(op.shape(s, 0, 1), [-1], axis=0)), places], 2)
    return op.Reshape(op.GatherElements(flat, places, axis=1), node.full_size(0))


@transpose("ReverseSequence", family="rearrangement", sign=KEEPS)
def reverse_sequence(op: Graph, node: Node, s: Value) -> Value:
    """Reversed again."""
    axes = {name: int(node.attrs.get(name, default)) for name, default in (("batch_axis", 1), ("time_axis", 0))}
    lengths = _integers(op, node, 1)
    if axes["batch_axis"] == 0:
        s, lengths = _same_batch(op, s, lengths, node.rank(0))
    return op.ReverseSequence(s, lengths, **axes)


def _same_batch(op: Graph, s: Value, lengths: Value, rank: int) -> tuple[Value, Value]:
    batch = op.Max(op.shape(s, 0, 1), op.shape(lengths, 0, 1))
    return op.Expand(s, op.Concat(batch, [1] * (rank - 1), axis=0)), op.Expand(lengths, batch)


@transpose("Trilu", family="rearrangement", sign=KEEPS)
def trilu(op: Graph, node: Node, s: Value) -> Value:
    """The same triangle."""
    k = op.value(node.node.inputs[1]) if node.has(1) else None
    return op.Trilu(s, k, upper=int(node.attrs.get("upper", 1)))


carries_none("NonMaxSuppression", why="positions, not values")
