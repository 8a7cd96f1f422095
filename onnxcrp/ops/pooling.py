"""Pooling, reductions and interpolation: weighted sums within one tensor, and the largest entry of a window."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate import evaluate_node
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.geometry import expand_batch, pooled, scatter, separable, window
from onnxcrp.ops.registry import KEEPS, NONNEGATIVE, Node, Ones, transpose


def _again(op: Graph, node: Node, a: Value, W: Value, b: Value) -> Value:
    """The node on another input; its weights are fixed, W is a scalar factor."""
    return op.node(node.op, [a, *[node.graph.value(t) for t in node.node.inputs[1:]]], dict(node.attrs)) * W


# ---- windows ---------------------------------------------------------------------------------------------------------


class _Windows:
    """Sums over the windows of a pooling node, for each channel by itself: one ConvTranspose of a single channel."""

    def __init__(self, op: Graph, node: Node) -> None:
        self.op, self.node = op, node
        self.kernel = list(node.attrs["kernel_shape"])
        self.one = op.constant(np.ones((1, 1, *self.kernel), op.dtype))

    def counts(self) -> Value:
        """How many positions of the input each window covers, [1, 1, h...] (padding does not count)."""
        op, node = self.op, self.node
        strides, dilations, before, after = window(node, self.kernel)
        field = op.Expand(1.0, op.Concat([1, 1], node.size(0, 2), axis=0))
        attrs = {"strides": strides, "dilations": dilations, "kernel_shape": self.kernel}
        if not node.attrs.get("ceil_mode", 0):
            return op.Conv(field, self.one, **attrs, pads=[*before, *after])
        sizes = [size for size in node.dims(0)[2:] if size is not None]
        if len(sizes) < len(self.kernel):
            raise UnsupportedError(
                f"{node!r}: ceil_mode needs a static input size here", hint="export the model with a fixed size"
            )
        # the windows that ceil_mode adds reach beyond the padding, the ones it drops do not use all of it
        small = [pooled(node, axis, size, k) for axis, (size, k) in enumerate(zip(sizes, self.kernel, strict=True))]
        ends = [
            max((h - 1) * s + d * (k - 1) + 1 - p - size, 0)
            for h, s, d, k, p, size in zip(small, strides, dilations, self.kernel, before, sizes, strict=True)
        ]
        return op.Conv(field, self.one, **attrs, pads=[*before, *ends])

    def spread(self, s: Value) -> Value:
        """s [N, C, h...] -> [N, C, H...]: every position of a window gets the window's s."""
        op, node = self.op, self.node
        single = op.Reshape(s, op.Concat([-1, 1], op.shape(s, 2), axis=0))
        back = scatter(op, node, single, self.one, self.kernel, group=1)
        return op.Reshape(back, op.Concat([-1], node.size(0, 1, 2), op.shape(back, 2), axis=0))


def _window_ones(op: Graph, node: Node) -> Ones:
    windows = _Windows(op, node)
    return Ones(windows.counts(), windows.spread)


@transpose("AveragePool", family="average", sign=KEEPS, forward=_again, ones=_window_ones)
def average_pool(op: Graph, node: Node, s: Value) -> Value:
    """s [N, C, h...] -> [N, C, H...]: s times the pool's own weight, given to every position of the window.

    The weight is read off the operator itself, as its answer to a field of ones over the positions a window covers, so
    that count_include_pad and ceil_mode mean what the runtime makes of them.
    """
    windows = _Windows(op, node)
    kernel = float(np.prod(windows.kernel))
    if not any(node.attrs.get("pads") or []) and not node.attrs.get("ceil_mode", 0):
        return windows.spread(s * (1.0 / kernel))
    if not node.attrs.get("count_include_pad", 0):
        return windows.spread(s / windows.counts())
    field = op.Expand(1.0, op.Concat([1, 1], node.size(0, 2), axis=0))
    weights = op.node("AveragePool", [field], dict(node.attrs)) / windows.counts()
    return windows.spread(s * weights)


@transpose("MaxPool", family="max", sign=KEEPS, ones=_window_ones)
def max_pool(op: Graph, node: Node, s: Value) -> Value:
    """s [N, C, h...] -> [N, C, H...]: all to the window's maximum, the first one on ties; overlapping windows add up.

    The Indices of ONNX count through the whole tensor, so for sample n they are n C H W too large.
    """
    a = node.input(0)
    attrs = dict(node.attrs)
    attrs.pop("storage_order", None)
    if _tiles(node):
        return _max_pool_of_tiles(op, node, a, s, attrs)
    indices = op.node("MaxPool", [a], attrs, outputs=2)[1]
    size = op.ReduceProd(node.size(0, 1), keepdims=1)
    # a message that does not depend on the sample (a seed of ones) has batch 1 where the winners have more
    s = expand_batch(op, s, op.Max(op.shape(s, 0, 1), op.shape(a, 0, 1)), node.rank(0))
    flat = op.Reshape(s, op.Concat(op.shape(s, 0, 1), [-1], axis=0))
    places = op.Expand(op.Reshape(op.Mod(indices, size), op.Concat(op.shape(a, 0, 1), [-1], axis=0)), op.shape(flat))
    zeros = op.Expand(0.0, op.Concat(op.shape(s, 0, 1), size, axis=0))
    return op.Reshape(op.ScatterElements(zeros, places, flat, axis=1, reduction="add"), node.full_size(0))


def _tiles(node: Node) -> bool:
    """Whether the windows tile the input exactly: stride = kernel, no padding, static size divisible by it."""
    kernel = list(node.attrs["kernel_shape"])
    strides, dilations, before, after = window(node, kernel)
    sizes = node.dims(0)[2:]
    return (
        strides == kernel
        and set(dilations) == {1}
        and not any(before)
        and not any(after)
        and all(size is not None and size % k == 0 for size, k in zip(sizes, kernel, strict=True))
    )


def _max_pool_of_tiles(op: Graph, node: Node, a: Value, s: Value, attrs: dict[str, Any]) -> Value:
    """Windows that do not overlap: [N, C, h, 1, w, 1] times a mask [1, C, h, k, w, k] of the winners.

    The mask is made once for the sample, so N conditions cost one product each.
    """
    kernel, channels = attrs["kernel_shape"], node.dims(0)[1]
    if channels is None:
        raise UnsupportedError(f"{node!r}: the number of channels is not known")
    small = [int(d) // k for d, k in zip(node.dims(0)[2:], kernel, strict=True)]  # type: ignore[arg-type]
    indices = op.node("MaxPool", [a], attrs, outputs=2)[1]
    size = op.ReduceProd(node.size(0, 1), keepdims=1)
    places = op.Reshape(op.Mod(indices, size), op.Concat(op.shape(a, 0, 1), [-1], axis=0))
    zeros = op.Expand(0.0, op.Concat(op.shape(a, 0, 1), size, axis=0))
    winners = op.ScatterElements(zeros, places, op.Expand(1.0, op.shape(places)), axis=1)
    tiles = [n for pair in zip(small, kernel, strict=True) for n in pair]
    spots = [n for h in small for n in (h, 1)]
    split = op.Reshape(winners, [-1, channels, *tiles]) * op.Reshape(s, [-1, channels, *spots])
    return op.Reshape(split, node.full_size(0))


# ---- whole axes ------------------------------------------------------------------------------------------------------


def _axes(node: Node) -> list[int]:
    """The axes a reduction sums over, nonnegative and sorted."""
    rank = node.rank(0)
    if node.op.startswith("Global"):
        return list(range(2, rank))
    axes = node.ints(1, []) if node.has(1) else []
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return []
    return sorted(axis % rank for axis in axes) if axes else list(range(rank))


def _kept(op: Graph, node: Node, s: Value) -> Value:
    """s with the reduced axes back, each of size 1."""
    if node.op.startswith("Global") or node.attrs.get("keepdims", 1):
        return s
    return op.Unsqueeze(s, _axes(node))


def _number(op: Graph, node: Node) -> Value:
    """How many entries each output is made of."""
    sizes = [node.dims(0)[axis] for axis in _axes(node)]
    if None not in sizes:
        return op.as_value(float(np.prod([size for size in sizes if size is not None])))
    each = [node.size(0, axis, axis + 1) for axis in _axes(node)]
    return op.float(op.ReduceProd(op.Concat(*each, axis=0), keepdims=0))


def _reduce_ones(op: Graph, node: Node) -> Ones:
    return Ones(_number(op, node), lambda s: node.like(_kept(op, node, s)))


@transpose("GlobalAveragePool", "ReduceMean", family="average", sign=KEEPS, forward=_again, ones=_reduce_ones)
def mean(op: Graph, node: Node, s: Value) -> Value:
    """s over the number of entries, to every entry."""
    return node.like(_kept(op, node, s / _number(op, node)))


@transpose("ReduceSum", family="average", sign=KEEPS, forward=_again, ones=_reduce_ones)
def reduce_sum(op: Graph, node: Node, s: Value) -> Value:
    """s to every entry of the sum."""
    return node.like(_kept(op, node, s))


def _length(op: Graph, node: Node) -> Value:
    """The output with the reduced axes back, 1 where it is 0: there every entry is 0, too."""
    y = _kept(op, node, node.output())
    return op.Where(y > 0.0, y, 1.0)


@transpose("ReduceL2", family="average", sign=NONNEGATIVE, ones=_reduce_ones)
def reduce_l2(op: Graph, node: Node, s: Value) -> Value:
    """s x / y, y the length: by share an entry gets x^2 / y^2 of the relevance."""
    return node.input(0) * (_kept(op, node, s) / _length(op, node))


@transpose("ReduceL1", family="average", sign=NONNEGATIVE, ones=_reduce_ones)
def reduce_l1(op: Graph, node: Node, s: Value) -> Value:
    """s sign(x): by share an entry gets |x| / y of the relevance."""
    return op.Sign(node.input(0)) * _kept(op, node, s)


@transpose("GlobalMaxPool", "ReduceMax", family="max", sign=KEEPS, ones=_reduce_ones)
def reduce_max(op: Graph, node: Node, s: Value) -> Value:
    """All to the largest entry, the first one on ties."""
    return _winner(op, node, s, op.ArgMax)


@transpose("ReduceMin", family="max", sign=KEEPS, ones=_reduce_ones)
def reduce_min(op: Graph, node: Node, s: Value) -> Value:
    """All to the smallest entry, the first one on ties."""
    return _winner(op, node, s, op.ArgMin)


def _winner(op: Graph, node: Node, s: Value, arg: Any) -> Value:
    a, axes, rank = node.input(0), _axes(node), node.rank(0)
    rest = [axis for axis in range(rank) if axis not in axes]
    if not rest or rest[0] != 0:
        raise UnsupportedError(f"{node!r}: a maximum over the batch axis cannot be explained sample by sample")
    # reduced axes to the end, then flat: position of the winner among [0, size)
    order = rest + axes
    inverse = [order.index(axis) for axis in range(rank)]
    moved = a if order == list(range(rank)) else op.Transpose(a, perm=order)
    flat = op.Reshape(moved, [*[0] * len(rest), -1])
    best = arg(flat, axis=-1, keepdims=1)
    zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
    mask = op.float(op.Equal(best, op.Range(zero, op.Squeeze(op.shape(flat, len(rest)), [0]), one)))
    mask = op.Reshape(mask, op.shape(moved))
    if order != list(range(rank)):
        mask = op.Transpose(mask, perm=inverse)
    return mask * _kept(op, node, s)


# ---- interpolation ---------------------------------------------------------------------------------------------------


def resize_matrices(node: Node) -> dict[int, np.ndarray]:
    """Interpolation along each resized axis as a matrix [out, in], read off the operator itself."""
    small, large = node.dims(0), node.dims(output=True)
    scales = node.array(2)
    matrices: dict[int, np.ndarray] = {}
    for axis, (n, m) in enumerate(zip(small, large, strict=True)):
        if axis == 0:
            continue
        position = _position(node, axis)
        scale = float(scales[position]) if scales is not None and scales.size and position is not None else None
        if n is None or m is None:
            if scale == 1.0:
                continue
            raise UnsupportedError(
                f"{node!r}: interpolation needs static sizes", hint="export the model with a fixed input size"
            )
        if n == m and scale in (None, 1.0):
            continue
        matrices[axis] = _interpolation(node.attrs, n, m, scale)
    return matrices


def _position(node: Node, axis: int) -> int | None:
    axes = node.attrs.get("axes")
    if axes is None:
        return axis
    axes = [a % node.rank(0) for a in axes]
    return axes.index(axis) if axis in axes else None


def _interpolation(attrs: dict[str, Any], n: int, m: int, scale: float | None) -> np.ndarray:
    """What Resize does along one axis of length n -> m, [m, n]: its answer to the identity."""
    kept = {name: value for name, value in attrs.items() if name not in ("axes", "keep_aspect_ratio_policy")}
    scales = None if scale is None else np.array([1.0, scale])
    sizes = np.array([n, m]) if scale is None else None
    return np.asarray(evaluate_node("Resize", kept, [np.eye(n), None, scales, sizes])[0]).T


def _resize_family(node: gs.Node, data: int) -> str:
    return "rearrangement" if node.attrs.get("mode", "nearest") == "nearest" else "average"


def _resize_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    return node.inputs[0].name in nonnegative and node.attrs.get("mode", "nearest") != "cubic"


def _block(node: Node) -> list[int] | None:
    """The integer factors of a nearest-neighbour upsampling that copies every entry into a block of its own."""
    scales, attrs = node.array(2), node.attrs
    how = (attrs.get("coordinate_transformation_mode", "half_pixel"), attrs.get("nearest_mode", "round_prefer_floor"))
    plain = (how[0] == "half_pixel" and how[1].startswith("round")) or how == ("asymmetric", "floor")
    if scales is None or attrs.get("mode", "nearest") != "nearest" or not plain or attrs.get("axes") is not None:
        return None
    if not np.array_equal(scales, scales.round()) or list(scales[:2]) != [1, 1]:
        return None
    return [int(scale) for scale in scales[2:]]


def _resize_ones(op: Graph, node: Node) -> Ones:
    rank = node.rank(0)
    connected = {axis: (matrix != 0).astype(np.float64) for axis, matrix in resize_matrices(node).items()}
    count = np.ones([1] * rank)
    for axis, matrix in connected.items():
        count = count * matrix.sum(1).reshape([-1 if i == axis else 1 for i in range(rank)])
    return Ones(op.constant(count.astype(op.dtype)), lambda s: separable(op, s, connected, rank))


@transpose("Resize", family=_resize_family, sign=_resize_sign, forward=_again, ones=_resize_ones)
def resize(op: Graph, node: Node, s: Value) -> Value:
    """The transposed interpolation matrices, axis by axis; each axis is resampled by itself in every mode."""
    block = _block(node) if None in node.dims(0)[1:] else None
    if block:
        return op.AveragePool(s, kernel_shape=block, strides=block) * float(np.prod(block))
    return separable(op, s, resize_matrices(node), node.rank(0))
