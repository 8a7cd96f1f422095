"""Pooling, reductions and interpolation: weighted sums within one tensor, and the largest entry of a window."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate import Attributes, evaluate_node, resize_matrix
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.geometry import copied, pads_itself, scatter, separable, window
from onnxcrp.ops.registry import KEEPS, NONNEGATIVE, Node, Ones, transpose


def _again(op: Graph, node: Node, a: Value, W: Value, b: Value) -> Value:
    """The node on another input; its weights are fixed, W is a scalar factor."""
    return op.node(node.op, [a, *[node.graph.value(t) for t in node.node.inputs[1:]]], dict(node.attrs)) * W


# ---- windows ---------------------------------------------------------------------------------------------------------


def _left_over(node: Node) -> list[int] | None:
    """How many positions lie behind the last window along each axis; None unless windows stand side by side.

    They do where stride = kernel, nothing is padded or dilated, and sizes are static. With ceil_mode a window would
    reach beyond the input instead.
    """
    kernel = list(node.attrs["kernel_shape"])
    strides, dilations, before, after = window(node, kernel)
    sizes = node.dims(0)[2:]
    padded = any(before) or any(after) or pads_itself(node)
    if strides != kernel or set(dilations) != {1} or padded or None in sizes:
        return None
    rest = [int(size) % k for size, k in zip(sizes, kernel, strict=True)]  # type: ignore[arg-type]
    return None if any(rest) and node.attrs.get("ceil_mode", 0) else rest


def _with_rest(op: Graph, x: Value, rest: list[int]) -> Value:
    """x [N, C, h k...] -> [N, C, H...]: zeros where no window reaches."""
    return op.Pad(x, [0] * (len(rest) + 4) + rest) if any(rest) else x


class _Windows:
    """Sums over the windows of a pooling node, for each channel by itself.

    Windows side by side are filled with copies, others are one ConvTranspose of a single channel.
    """

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
        if pads_itself(node):
            return op.Conv(field, self.one, **attrs, auto_pad=node.attrs["auto_pad"])
        if not node.attrs.get("ceil_mode", 0):
            return op.Conv(field, self.one, **attrs, pads=[*before, *after])
        # a last window reaches beyond the padding: enough of it is written, and the windows that there are cut out
        ends = [max(p, d * (k - 1)) for p, d, k in zip(after, dilations, self.kernel, strict=True)]
        whole, n = op.Conv(field, self.one, **attrs, pads=[*before, *ends]), len(self.kernel)
        return op.Slice(whole, op.constant(np.zeros(n, np.int64)), op.shape(node.output(), 2), list(range(2, n + 2)))

    def spread(self, s: Value, weight: float = 1.0) -> Value:
        """s [N, C, h...] -> [N, C, H...]: every position of a window gets `weight` times the window's s."""
        op, node, rest = self.op, self.node, _left_over(self.node)
        if rest is not None:
            return _with_rest(op, copied(op, s * weight, self.kernel), rest)
        each = op.constant(np.full((1, 1, *self.kernel), weight, op.dtype))
        windows = node.dims(output=True)[2:]
        known = None not in windows and not node.attrs.get("ceil_mode", 0)
        single = op.Reshape(s, [-1, 1, *windows] if known else op.Concat([-1, 1], op.shape(s, 2), axis=0))
        return op.Reshape(scatter(op, node, single, each, self.kernel, group=1), node.full_size(0))


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
    if not any(node.attrs.get("pads") or []) and not node.attrs.get("ceil_mode", 0) and not pads_itself(node):
        return windows.spread(s, 1.0 / kernel)
    if not node.attrs.get("count_include_pad", 0):
        return windows.spread(s / windows.counts())
    field = op.Expand(1.0, op.Concat([1, 1], node.size(0, 2), axis=0))
    weights = op.node("AveragePool", [field], dict(node.attrs)) / windows.counts()
    return windows.spread(s * weights)


@transpose("MaxPool", family="max", sign=KEEPS, ones=_window_ones)
def max_pool(op: Graph, node: Node, s: Value) -> Value:
    """s [N, C, h...] -> [N, C, H...]: all to a window's maximum, the first one on ties; overlapping windows add up."""
    attrs = dict(node.attrs)
    attrs.pop("storage_order", None)
    rest = _left_over(node)
    if rest is not None:
        return _with_rest(op, copied(op, s, attrs["kernel_shape"]) * _winners(op, node, rest, attrs), rest)
    field = [size for size in node.dims(0)[2:] if size is not None]
    known = len(field) == node.rank(0) - 2
    size = op.as_value([int(np.prod(field))]) if known else op.ReduceProd(node.size(0, 2), keepdims=1)
    places = _places(op, node, size, attrs)
    if node.rank(0) > 3:
        s, places = op.Reshape(s, [0, 0, -1]), op.Reshape(places, [0, 0, -1])
    batch = op.shape(s, 0, 1)
    zeros = op.Expand(0.0, op.Concat(batch, node.size(0, 1, 2), size, axis=0))
    places = op.Expand(places, op.Concat(batch, [1, 1], axis=0))
    scattered = op.ScatterElements(zeros, places, s, axis=2, reduction="add")
    return op.Reshape(scattered, node.full_size(0)) if node.rank(0) > 3 else scattered


def _places(op: Graph, node: Node, size: Value, attrs: dict[str, Any]) -> Value:
    """Which of the `size` = H... positions of its channel each window takes, [N, C, h...].

    The Indices of ONNX count through the whole tensor: those of channel c of sample n are (n C + c) H... too large,
    which is taken off: a remainder would take several times as long. Windows without a maximum (of NaN, or wholly in
    the padding) have Indices before their channel; they take its first position.
    """
    channels = node.size(0, 1, 2)
    end = op.Squeeze(node.size(0, 0, 1) * (channels * size), [0])
    first = op.Range(op.constant(np.int64(0)), end, op.Squeeze(size, [0]))
    around = op.Concat([-1], channels, [1] * (node.rank(0) - 2), axis=0)
    return op.Max(_indices(op, node, attrs) - op.Reshape(first, around), op.constant(np.int64(0)))


def _indices(op: Graph, node: Node, attrs: dict[str, Any]) -> Value:
    """Which entry of its input each window takes: from the forward pass itself, where that costs nothing there.

    Pools over [N, C, H, W] run in the runtime's blocked layout on the CPU only as long as nobody asks them for Indices.
    """
    pool = next(iter(node.output().tensor.inputs), None)
    if node.rank(0) == 4 or pool is None or pool.op != "MaxPool" or node.attrs.get("storage_order", 0):
        return op.node("MaxPool", [node.input(0)], attrs, outputs=2)[1]
    if len(pool.outputs) == 1:
        pool.outputs.append(gs.Variable(op.unique("Indices"), np.dtype(np.int64)))
    return op.value(pool.outputs[1])


def _winners(op: Graph, node: Node, rest: list[int], attrs: dict[str, Any]) -> Value:
    """Ones at the first maximum of every window, zeros elsewhere, for windows side by side: [N, C, h k...].

    All that are as large as their window's maximum get a rank, the first one of a window the highest; the highest wins.
    Made once for the sample, so that N conditions cost one product each.
    """
    a, kernel = node.input(0), attrs["kernel_shape"]
    reached = [int(size) - r for size, r in zip(node.dims(0)[2:], rest, strict=True)]  # type: ignore[arg-type]
    if any(rest):
        a = op.Slice(a, [0] * len(rest), reached, list(range(2, node.rank(0))))
    descending = np.arange(np.prod(kernel), 0, -1, dtype=op.dtype).reshape(kernel)
    rank = op.constant(np.tile(descending, [size // k for size, k in zip(reached, kernel, strict=True)])[None, None])
    ranks = op.float(op.Equal(a, copied(op, node.output(), kernel))) * rank
    best = op.node("MaxPool", [ranks], attrs)
    return op.float(op.Equal(ranks, copied(op, op.Max(best, 1.0), kernel)))  # no winner in a window without a maximum


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
    return Ones(_number(op, node), lambda s: _to_all(op, node, s))


def _to_all(op: Graph, node: Node, s: Value) -> Value:
    """s to every entry that was reduced; axis 0 among them is no batch, so it is there in full."""
    kept = _kept(op, node, s)
    return op.Expand(kept, op.shape(node.input(0))) if 0 in _axes(node) else node.like(kept)


@transpose("GlobalAveragePool", "ReduceMean", family="average", sign=KEEPS, forward=_again, ones=_reduce_ones)
def mean(op: Graph, node: Node, s: Value) -> Value:
    """s over the number of entries, to every entry."""
    return _to_all(op, node, s / _number(op, node))


@transpose("ReduceSum", family="average", sign=KEEPS, forward=_again, ones=_reduce_ones)
def reduce_sum(op: Graph, node: Node, s: Value) -> Value:
    """s to every entry of the sum."""
    return _to_all(op, node, s)


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


WHOLE = (0.0, 1.0)  # an axis that is not cropped
_OF_AXES = ("axes", "keep_aspect_ratio_policy")  # attributes that have no meaning for one axis alone


def resize_matrices(node: Node) -> dict[int, np.ndarray]:
    """Interpolation along each resized axis as a matrix [out, in], read off the operator itself."""
    small, large = node.dims(0), node.dims(output=True)
    crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    matrices: dict[int, np.ndarray] = {}
    if small[1:] == large[1:] and None not in small[1:] and not crops:
        return matrices  # runtimes copy where no size changes, whatever the factors
    for axis, (n, m) in enumerate(zip(small, large, strict=True)):
        if axis == 0:
            continue
        scale, window = _scale(node, axis), _crop(node, axis) if crops else WHOLE
        if n is None or m is None:
            if scale == 1.0 and window == WHOLE:
                continue
            raise UnsupportedError(
                f"{node!r}: interpolation needs static sizes", hint="export the model with a fixed input size"
            )
        if n == m and scale in (None, 1.0) and window == WHOLE:
            continue
        matrices[axis] = _interpolation(node, n, m, scale, window)
    return matrices


def _position(node: Node, axis: int) -> int | None:
    axes = node.attrs.get("axes")
    if axes is None:
        return axis
    axes = [a % node.rank(0) for a in axes]
    return axes.index(axis) if axis in axes else None


def _scale(node: Node, axis: int) -> float | None:
    """The factor of one axis where it is not simply out / in: as given, or the one that all axes have in common."""
    position, scales = _position(node, axis), node.array(2)
    if position is None:
        return 1.0
    if scales is not None and scales.size:
        return float(scales[position])
    policy, sizes = node.attrs.get("keep_aspect_ratio_policy", "stretch"), node.array(3)
    if policy == "stretch":
        return None
    factors = []
    for other in range(node.rank(0)):
        place, have = _position(node, other), node.dims(0)[other]
        if place is None:
            continue
        if sizes is None or have is None:
            raise UnsupportedError(f"{node!r}: {policy} needs static sizes", hint="export the model with a fixed size")
        factors.append(float(sizes[place]) / have)
    return min(factors) if policy == "not_larger" else max(factors)


def _crop(node: Node, axis: int) -> tuple[float, float]:
    """(start, end) of the region of interest along an axis, as parts of its length."""
    position, roi = _position(node, axis), node.array(1)
    if position is None:
        return WHOLE
    if roi is None:
        raise UnsupportedError(f"{node!r}: its region of interest is computed while running")
    return float(roi[position]), float(roi[position + len(roi) // 2])


def _interpolation(node: Node, n: int, m: int, scale: float | None, window: tuple[float, float]) -> np.ndarray:
    """What Resize does along one axis of length n -> m, [m, n]."""
    if not node.attrs.get("antialias", 0):
        return resize_matrix(Attributes(node.attrs, opset=18), n, m, m / n if scale is None else scale, window)
    kept = {name: value for name, value in node.attrs.items() if name not in _OF_AXES}
    scales, sizes = (None, np.array([n, m])) if scale is None else (np.array([1.0, scale]), None)
    matrix = np.asarray(evaluate_node("Resize", kept, [np.eye(n), None, scales, sizes])[0]).T  # the answer to identity
    if len(matrix) != m:
        raise UnsupportedError(f"{node!r}: {n} entries become {m} by a factor of {scale}, which cannot be followed")
    return matrix


def _resize_family(node: gs.Node, data: int) -> str:
    return "rearrangement" if node.attrs.get("mode", "nearest") == "nearest" else "average"


def _resize_sign(node: gs.Node, nonnegative: set[str]) -> bool:
    fills = node.attrs.get("extrapolation_value", 0.0)
    return node.inputs[0].name in nonnegative and node.attrs.get("mode", "nearest") != "cubic" and fills >= 0


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
    rank, count = node.rank(0), op.as_value(1.0)
    connected: dict[int, Value] = {}
    for axis, matrix in _interpolations(op, node).items():
        connected[axis] = op.float(op.Abs(matrix) > 1e-6)
        count = count * op.Reshape(op.ReduceSum(connected[axis], [1], keepdims=0), [-1, *[1] * (rank - 1 - axis)])
    return Ones(count, lambda s: separable(op, s, connected, rank))


@transpose("Resize", family=_resize_family, sign=_resize_sign, forward=_again, ones=_resize_ones)
def resize(op: Graph, node: Node, s: Value) -> Value:
    """The transposed interpolation matrices, axis by axis; each axis is resampled by itself in every mode."""
    block = _block(node) if None in node.dims(0)[1:] else None
    if block:
        return op.AveragePool(s, kernel_shape=block, strides=block) * float(np.prod(block))
    return separable(op, s, _interpolations(op, node), node.rank(0))


def _is_rounded(node: Node) -> bool:
    """Whether entries are picked by rounding, and not each copied into a block of its own or cut out."""
    how = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if node.attrs.get("mode", "nearest") != "nearest" or how == "tf_crop_and_resize" or policy != "stretch":
        return False
    return any(m % n for n, m in zip(node.dims(0)[1:], node.dims(output=True)[1:], strict=True))  # type: ignore[operator]


def _interpolations(op: Graph, node: Node) -> dict[int, Value]:
    """Interpolation along each resized axis [out, in].

    Where sizes vary it is what the operator makes of the identity; so it is, too, where the nearest of two entries is
    taken that may be equally near: only the runtime knows how it rounds.
    """
    static = None not in [*node.dims(0)[1:], *node.dims(output=True)[1:]]
    if static and not _is_rounded(node) and (not node.has(2) or node.array(2) is not None):
        return {axis: op.constant(matrix.astype(op.dtype)) for axis, matrix in resize_matrices(node).items()}
    attrs = {name: value for name, value in node.attrs.items() if name not in _OF_AXES}
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch" or attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise UnsupportedError(f"{node!r}: its kind of interpolation needs static sizes", hint="export a fixed size")
    scales = op.value(node.node.inputs[2]) if node.has(2) else None
    if scales is not None and scales.array is not None and not scales.array.size:
        scales = None
    matrices = {}
    for axis in range(1, node.rank(0)):
        position = _position(node, axis)
        if position is None or (scales is not None and scales.array is not None and scales.array[position] == 1):
            continue
        n, m = node.size(0, axis, axis + 1), op.shape(node.output(), axis, axis + 1)
        identity = op.EyeLike(op.Expand(0.0, op.Concat(n, n, axis=0)))
        if scales is None:
            turned = op.node("Resize", [identity, None, None, op.Concat(n, m, axis=0)], attrs)
        else:
            factor = op.Slice(scales, [position], [position + 1], [0])
            one = op.constant(np.ones(1, np.float32))
            turned = op.node("Resize", [identity, None, op.Concat(one, factor, axis=0)], attrs)
        matrices[axis] = op.Transpose(turned, perm=[1, 0])
    return matrices
