"""Entries moved, copied or dropped: relevance follows them, whatever the composite."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.attention import embedding
from onnxcrp.ops.geometry import common_batch, scatter_axis, separable
from onnxcrp.ops.registry import KEEPS, Node, Parts, carries_none, transpose


@transpose("Identity", "Dropout", family="rearrangement", sign=KEEPS)
def identity(op: Graph, node: Node, s: Value) -> Value:
    """s."""
    return s


@transpose("Reshape", "Flatten", family="rearrangement", sign=KEEPS)
def reshape(op: Graph, node: Node, s: Value) -> Value:
    """s in the shape of the input; -1 for the batch, which may be larger than the forward pass'."""
    return op.Reshape(s, node.full_size(0)) if node.rank(0) > 1 else op.Reshape(s, [-1])


@transpose("Squeeze", family="rearrangement", sign=KEEPS)
def squeeze(op: Graph, node: Node, s: Value) -> Value:
    """The dropped axes of size 1 back."""
    rank = node.rank(0)
    axes = node.ints(1, []) if node.has(1) else [axis for axis, size in enumerate(node.dims(0)) if size == 1]
    return op.Unsqueeze(s, sorted(axis % rank for axis in axes))


@transpose("Unsqueeze", family="rearrangement", sign=KEEPS)
def unsqueeze(op: Graph, node: Node, s: Value) -> Value:
    """The added axes dropped."""
    axes = node.ints(1)
    rank = node.rank(0) + len(axes)
    return op.Squeeze(s, sorted(axis % rank for axis in axes))


@transpose("Transpose", family="rearrangement", sign=KEEPS)
def transpose_(op: Graph, node: Node, s: Value) -> Value:
    """s [permuted] -> [original]: the inverse permutation."""
    perm = node.attrs.get("perm") or list(range(node.rank(0)))[::-1]
    return op.Transpose(s, perm=[int(i) for i in np.argsort(perm)])


@transpose("Expand", family="rearrangement", sign=KEEPS)
def expand(op: Graph, node: Node, s: Value) -> Value:
    """s; the walk sums the expanded axes."""
    return s


def _axis(node: Node, default: int = 0) -> int:
    return int(node.attrs.get("axis", default)) % node.rank(0)


@transpose("Concat", family="rearrangement", sign=KEEPS)
def concat(op: Graph, node: Node, s: Value) -> Value | Parts:
    """Each data input its own piece of s."""
    axis = _axis(node)
    sizes = [node.size(i, axis, axis + 1) for i in range(len(node.node.inputs))]
    parts = Parts()
    start = op.as_value([0])
    for i, size in enumerate(sizes):
        end = start + size
        if i in node.data:
            parts.append(op.Slice(s, start, end, [axis]))
        start = end
    return parts if len(node.data) > 1 else parts[0]


@transpose("Split", family="rearrangement", sign=KEEPS)
def split(op: Graph, node: Node, s: list[Value]) -> Value:
    """The pieces side by side again; a piece nobody asked for is zero."""
    axis = _axis(node)
    rank = node.rank(0)
    pieces = [op.Expand(0.0, _without_batch(op, node, i)) if piece.is_zero else piece for i, piece in enumerate(s)]
    return op.Concat(*common_batch(op, pieces, rank), axis=axis)


def _without_batch(op: Graph, node: Node, output: int) -> Value:
    dims = node.dims(output, output=True)[1:]
    if None not in dims:
        return op.as_value([1, *[int(d) for d in dims if d is not None]])
    return op.Concat([1], op.shape(op.value(node.node.outputs[output]), 1), axis=0)


@transpose("Slice", family="rearrangement", sign=KEEPS)
def slice_(op: Graph, node: Node, s: Value) -> Value:
    """s at the places it was read from, zeros elsewhere; where only the run knows them, a range of indices is cut.

    A slice of nothing (windows shifted by 0) sends nothing back.
    """
    rank = node.rank(0)
    given = node.array(3) if node.has(3) else node.array(1)
    if given is None:
        raise UnsupportedError(f"{node!r}: which axes are cut is computed while running")
    axes = [int(a) % rank for a in given] if node.has(3) else list(range(len(given)))
    for position, axis in reversed(list(enumerate(axes))):
        if axis == 0 and leaves_batch(node.node, rank):
            continue
        start, end = (_entry(op, node, i, position) for i in (1, 2))
        step = _entry(op, node, 4, position) if node.has(4) else op.as_value([1])
        bounds = [int(v.array[0]) for v in (start, end, step) if v.array is not None]
        if len(bounds) == 3 and node.dims(0)[axis] is not None:
            s = _pad_back(op, node, s, axis, bounds)
            if s.is_zero:
                return s
            continue
        s = scatter_axis(op, node, s, axis, op.Slice(_every(op, node, axis), start, end, [0], step))
    return s


def leaves_batch(node: gs.Node, rank: int) -> bool:
    """Whether a Slice takes all of axis 0."""
    starts, ends, axes, steps = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2, 3, 4)]
    if axes is None or axes.is_empty():
        position = 0
    elif isinstance(axes, gs.Constant):
        named = [int(a) % rank for a in axes.values]
        if 0 not in named:
            return True
        position = named.index(0)
    else:
        return False
    if not isinstance(starts, gs.Constant) or not isinstance(ends, gs.Constant):
        return False
    step = int(steps.values[position]) if isinstance(steps, gs.Constant) else 1
    return int(starts.values[position]) == 0 and int(ends.values[position]) >= 2**31 - 1 and step == 1


def _entry(op: Graph, node: Node, index: int, position: int) -> Value:
    array = node.array(index)
    if array is not None:
        return op.as_value([int(np.clip(array[position], -(2**62), 2**62))])
    return op.Cast(op.Slice(op.value(node.node.inputs[index]), [position], [position + 1], [0]), to=7)


def _pad_back(op: Graph, node: Node, s: Value, axis: int, bounds: list[int]) -> Value:
    """One axis of a static Slice."""
    size = int(node.dims(0)[axis])  # type: ignore[arg-type]
    indices = np.arange(size)[slice(*_python_slice(bounds, size))]
    if len(indices) == size and bounds[2] == 1:
        return s
    if bounds[2] == 1 and len(indices):
        pads = [0] * 2 * node.rank(0)
        pads[axis], pads[axis + node.rank(0)] = int(indices[0]), size - 1 - int(indices[-1])
        return op.Pad(s, pads)
    if not len(indices):
        return op.zero
    return separable(op, s, {axis: np.eye(size)[indices]}, node.rank(0))


def _python_slice(bounds: list[int], size: int) -> tuple[int, int | None, int]:
    """ONNX clamps an end below -size to 'before the first' for negative steps; Python says None for that."""
    start, end, step = bounds
    if step < 0 and end < -size:
        return start, None, step
    return start, end, step


def _gather_family(node: gs.Node, data: int) -> str:
    return "embedding" if isinstance(node.inputs[0], gs.Constant) else "rearrangement"


@transpose("Gather", family=_gather_family, sign=KEEPS)
def gather(op: Graph, node: Node, s: Value) -> Value:
    """s added to the entries it was gathered from; token ids get the sum over what they picked."""
    if isinstance(node.node.inputs[0], gs.Constant):
        return embedding(op, node, s)
    indices = node.array(1)
    axis = _axis(node)
    if indices is None or (axis == 0 and node.rank(0) == 1):
        return _gather_back(op, node, s, axis)
    if axis == 0 and node.dims(0)[0] is None:
        raise UnsupportedError(f"{node!r}: entries are picked from the batch axis")
    size = node.dims(0)[axis]
    if indices.ndim == 0:
        s = op.Unsqueeze(s, [axis])
    elif indices.ndim > 1:
        rank = node.rank(0) - 1 + indices.ndim
        shape = [op.shape(s, 0, axis), op.as_value([indices.size])]
        if axis + indices.ndim < rank:
            shape.append(op.shape(s, axis + indices.ndim))
        s = op.Reshape(s, op.Concat(*shape, axis=0))
    flat = indices.reshape(-1).astype(np.int64)
    if size is not None:
        flat = flat % size
        if len(flat) == 1:
            pads = [0] * 2 * node.rank(0)
            pads[axis], pads[axis + node.rank(0)] = int(flat[0]), size - 1 - int(flat[0])
            return op.Pad(s, pads)
        if len(flat) == size and np.array_equal(np.sort(flat), np.arange(size)):
            return op.Gather(s, [int(i) for i in np.argsort(flat)], axis=axis)
    elif (flat < 0).any():  # counted from an end that only the run knows
        ends = op.Mul(op.constant((flat < 0).astype(np.int64)), node.size(0, axis, axis + 1))
        return scatter_axis(op, node, s, axis, op.Add(op.constant(flat), ends))
    return scatter_axis(op, node, s, axis, op.constant(flat))


def _gather_back(op: Graph, node: Node, s: Value, axis: int) -> Value:
    """Entries picked by an index that only the run knows, or from one flat tensor of all samples."""
    if axis == 0 and node.rank(0) > 1:
        raise UnsupportedError(f"{node!r}: entries are picked from the batch axis")
    picked, inner = op.value(node.node.inputs[1]), node.rank(1)
    if axis == 0:  # what was picked from the flat tensor has no batch of its own: it must be there in full
        s = op.Expand(s, op.shape(node.output()))
    around = [op.shape(s, 0, axis)] if axis else []
    after = [op.shape(s, axis + inner)] if axis + 1 < node.rank(0) else []
    s = op.Reshape(s, op.Concat(*around, [-1], *after, axis=0) if around or after else [-1])
    flat = op.Cast(op.Reshape(picked, [-1]), to=7)
    size = op.Squeeze(node.size(0, axis, axis + 1), [0])
    flat = op.Where(op.Less(flat, op.constant(np.int64(0))), op.Add(flat, size), flat)
    return scatter_axis(op, node, s, axis, flat)


@transpose("Pad", family="rearrangement", sign=KEEPS)
def pad(op: Graph, node: Node, s: Value) -> Value:
    """s without the border; what a reflected, replicated or wrapped border mirrors is added to its source."""
    rank, mode = node.rank(0), node.attrs.get("mode", "constant")
    if node.array(1) is None:
        if mode != "constant":
            raise UnsupportedError(f"{node!r}: {mode} padding by a size that is computed while running")
        axes_given = op.value(node.node.inputs[3]) if node.has(3) else None
        return op.Pad(s, op.Neg(op.value(node.node.inputs[1])), None, axes_given)
    pads = node.ints(1)
    axes = [int(a) % rank for a in node.ints(3)] if node.has(3) else list(range(rank))
    before, after = dict(zip(axes, pads[: len(axes)], strict=True)), dict(zip(axes, pads[len(axes) :], strict=True))
    moved = [axis for axis in axes if before[axis] or after[axis]]
    if mode == "constant":
        back = [0] * 2 * rank
        for axis in moved:
            back[axis], back[axis + rank] = -before[axis], -after[axis]
        return op.Pad(s, back) if moved else s
    for axis in moved:  # where every entry comes from: the operator's own answer to 0, 1, 2 ...
        places = op.Pad(_every(op, node, axis), op.constant([before[axis], after[axis]], np.int64), mode=mode)
        s = scatter_axis(op, node, s, axis, places)
    return s


def _every(op: Graph, node: Node, axis: int) -> Value:
    """0, 1, 2 ... along an axis of the input."""
    zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
    return op.Range(zero, op.Squeeze(node.size(0, axis, axis + 1), [0]), one)


@transpose("Tile", family="rearrangement", sign=KEEPS)
def tile(op: Graph, node: Node, s: Value) -> Value:
    """The sum over the copies: [..., r n, ...] -> [..., r, n, ...] -> [..., n, ...]."""
    rank = node.rank(0)
    for axis, repeat in enumerate(node.ints(1)):
        if repeat == 1:
            continue
        if axis == 0:
            raise UnsupportedError(f"{node!r}: copies of the batch cannot be explained sample by sample")
        after = [op.shape(s, axis + 1)] if axis + 1 < rank else []
        parted = op.Reshape(s, op.Concat(op.shape(s, 0, axis), [repeat, -1], *after, axis=0))
        s = op.ReduceSum(parted, [axis], keepdims=0)
    return s


@transpose("DepthToSpace", family="rearrangement", sign=KEEPS)
def depth_to_space(op: Graph, node: Node, s: Value) -> Value:
    """Blocks back into channels."""
    b = int(node.attrs["blocksize"])
    back = op.SpaceToDepth(s, blocksize=b)
    if node.attrs.get("mode", "DCR") == "DCR":
        return back
    channels = node.dims(0)[1]
    if channels is None:
        raise UnsupportedError(f"{node!r}: the number of channels is not known")
    # SpaceToDepth lays channels out as [b*b, C']; CRD wants [C', b*b]
    order = np.arange(channels).reshape(b * b, channels // (b * b)).T.reshape(-1)
    return op.Gather(back, [int(i) for i in order], axis=1)


@transpose("SpaceToDepth", family="rearrangement", sign=KEEPS)
def space_to_depth(op: Graph, node: Node, s: Value) -> Value:
    """Channels back into blocks."""
    return op.DepthToSpace(s, blocksize=int(node.attrs["blocksize"]), mode="DCR")


carries_none("Shape", "Size", "ConstantOfShape", "Range", "EyeLike", why="made from shapes, not from values")
carries_none("ArgMax", "ArgMin", "NonZero", "OneHot", why="positions, not values")
carries_none("Constant", why="the same whatever the input")
carries_none("SequenceLength", "OptionalHasElement", why="a count or a truth value")
carries_none("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", why="bits, not values")
carries_none("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf",
             why="a truth value")  # fmt: skip
carries_none("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
             why="noise")  # fmt: skip
carries_none("Sign", why="piecewise constant")
