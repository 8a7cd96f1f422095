"""Sizes, paddings and index arithmetic that the transposes of windows, slices and interpolations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.registry import Node

CHANNEL_BLOCK = 16  # channels that the runtime computes at once on a CPU, at most: full blocks need multiples of it

# Attributes of a Resize that copies: by whole factors, every entry fills a window.
COPIES = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def window(node: Node, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """strides, dilations, pads before, pads after of a node that slides a window of `kernel` over its input."""
    n = len(kernel)
    strides = list(node.attrs.get("strides") or [1] * n)
    dilations = list(node.attrs.get("dilations") or [1] * n)
    pads = list(node.attrs.get("pads") or [0] * 2 * n)
    return strides, dilations, pads[:n], pads[n:]


def pooled(node: Node, axis: int, size: int, k: int) -> int:
    """Number of windows of a pooling node along a spatial axis.

    With ceil_mode runtimes drop a last window that would start beyond the input and its padding before; onnx's shape
    inference does not always, so this is computed and not read.
    """
    strides, dilations, before, after = window(node, node.attrs["kernel_shape"])
    room = size + before[axis] + after[axis] - dilations[axis] * (k - 1) - 1
    stride = strides[axis]
    if not node.attrs.get("ceil_mode", 0):
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before[axis] else count


def scatter(op: Graph, node: Node, s: Value, W: Value, kernel: Sequence[int], *, group: int, index: int = 0) -> Value:
    """ConvTranspose of s [N, M, h...] to the size of the node's input: [N, C, H...], exact for every size.

    A window op reads H + pads = (h - 1) stride + dilation (k - 1) + 1 + r positions, 0 <= r. Where sizes are static,
    the padding before is taken off both ends, as runtimes on GPUs want it, and output_padding gives back what that is
    too much, or a slice takes the rest; else all is written (output_padding = stride - 1) and sliced to H, with zeros
    where nothing reaches.
    """
    strides, dilations, before, _ = window(node, kernel)
    n = len(kernel)
    attrs = {"strides": strides, "dilations": dilations, "group": group, "kernel_shape": list(kernel)}
    large = node.dims(index)[2:]
    missing = None if pads_itself(node) else _missing(node, kernel, node.dims(output=True)[2:], large)
    if missing is not None:
        extra = [max(size, 0) for size in missing]
        even = op.ConvTranspose(s, W, **attrs, pads=[*before, *before], output_padding=extra if any(extra) else None)
        if min(missing) >= 0:
            return even
        return op.Slice(even, [0] * n, op.constant(np.array(large, np.int64)), list(range(2, n + 2)))
    extra = [stride - 1 for stride in strides]
    whole = op.ConvTranspose(s, W, **attrs, pads=[0] * 2 * n, output_padding=extra if any(extra) else None)
    sizes, zeros = node.size(index, 2), op.constant(np.zeros(n, np.int64))
    start = _same_before(op, node, sizes, kernel) if pads_itself(node) else op.constant(np.array(before, np.int64))
    end = op.Add(start, sizes)
    short = op.Max(op.Sub(end, op.shape(whole, 2)), zeros)
    padded = op.Pad(whole, op.Concat(op.constant(np.zeros(n + 4, np.int64)), short, axis=0))
    return op.Slice(padded, start, end, list(range(2, n + 2)))


def _missing(
    node: Node, kernel: Sequence[int], small: Sequence[int | None], large: Sequence[int | None]
) -> list[int] | None:
    """By how much a ConvTranspose that takes the padding before off both ends falls short of the node's input.

    Negative: it is too long. None: sizes are dynamic, or a whole stride is missing, which output_padding cannot give.
    """
    strides, dilations, before, _ = window(node, kernel)
    missing = []
    for axis, (k, h, size) in enumerate(zip(kernel, small, large, strict=True)):
        if size is not None and node.attrs.get("ceil_mode", 0):
            h = pooled(node, axis, size, k)
        if h is None or size is None:
            return None
        reached = (h - 1) * strides[axis] + dilations[axis] * (k - 1) + 1 - 2 * before[axis]
        if size - reached >= strides[axis]:
            return None
        missing.append(size - reached)
    return missing


def pads_itself(node: Node) -> bool:
    """Whether the padding is `auto_pad` SAME still: it depends on a size that only the run knows."""
    return str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME")


def _same_before(op: Graph, node: Node, size: Value, kernel: Sequence[int]) -> Value:
    """Padding before [n] of `auto_pad` SAME: ceil(size / stride) windows, so p = (that - 1) stride + reach - size.

    Raises UnsupportedError for windows that leave out more than one place between them: runtimes then pad less than 0.
    """
    strides, dilations, _, _ = window(node, kernel)
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    if any(stride - r > 1 for stride, r in zip(strides, reach, strict=True)):
        raise UnsupportedError(
            f"{node!r}: auto_pad with a kernel that much smaller than its stride needs static sizes",
            hint="export a fixed size",
        )
    windows = op.Div(op.Add(size, [s - 1 for s in strides]), strides)
    needed = op.Sub(op.Add(op.Mul(op.Sub(windows, [1] * len(kernel)), strides), reach), size)
    total = op.Max(needed, op.constant(np.zeros(len(kernel), np.int64)))
    half = op.Div(total, [2] * len(kernel))
    return half if node.attrs["auto_pad"] == "SAME_UPPER" else op.Sub(total, half)


def spaced(op: Graph, node: Node, s: Value, strides: Sequence[int]) -> Value:
    """s [N, C, h...] -> [N, C, H...], the size of the node's input: one entry every `strides` places, zeros between.

    Every entry is copied over its whole stride, and a factor of zeros and ones keeps the first copy: it merges with the
    other factors of the message, so that the zeros cost nothing of their own. Dynamic sizes: for kernels of one place
    without padding.
    """
    n, small, large = len(strides), node.dims(output=True)[2:], node.dims(0)[2:]
    static = [size for size in large if size is not None]
    if len(static) == n:
        first = np.zeros((1, 1, *static), op.dtype)
        first[np.ix_([0], [0], *(range(0, size, stride) for size, stride in zip(static, strides, strict=True)))] = 1
        corner = op.constant(first)
    else:
        size = op.Concat([1, 1], op.shape(node.output(), 2), axis=0)
        one = op.constant(np.ones([1] * (n + 2), op.dtype))
        corner = scatter(op, node, op.Expand(1.0, size), one, [1] * n, group=1)
    copies = copied(op, s, strides)
    sizes = list(zip(small, large, strides, strict=True))
    if any(h is None or size is None or h * stride != size for h, size, stride in sizes):
        # a stride of s reads (h - 1) s + 1 .. h s positions
        copies = op.Slice(copies, op.constant(np.zeros(n, np.int64)), node.size(0, 2), list(range(2, n + 2)))
    return copies * corner


def copied(op: Graph, s: Value, times: Sequence[int]) -> Value:
    """s [N, C, h...] -> [N, C, h times...]: every entry fills a window."""
    return op.node("Resize", [s, None, op.constant(np.array([1, 1, *times], np.float32))], dict(COPIES))


def common_batch(op: Graph, values: Sequence[Value], rank: int) -> list[Value]:
    """Values of equal rank expanded to the largest of their batch sizes (each 1 or N), so that Concat accepts them."""
    if len(values) < 2:
        return list(values)
    batch = op.Max(*[op.shape(value, 0, 1) for value in values])
    return [expand_batch(op, value, batch, rank) for value in values]


def expand_batch(op: Graph, value: Value, batch: Value, rank: int) -> Value:
    """Value [1 or N, ...] expanded to `batch` (int64 [1]) along axis 0."""
    return op.Expand(value, batch if rank == 1 else op.Concat(batch, [1] * (rank - 1), axis=0))


def scatter_axis(op: Graph, node: Node, s: Value, axis: int, indices: Value, index: int = 0) -> Value:
    """Adds s along `axis` to the places `indices` (int64 [k]) of zeros as long as the node's input: T(Gather)."""
    rank = node.rank(index)
    around = [op.shape(s, 0, axis)] if axis else []
    around.append(node.size(index, axis, axis + 1))
    if axis + 1 < rank:
        around.append(op.shape(s, axis + 1))
    target = op.Concat(*around, axis=0) if len(around) > 1 else around[0]
    places = op.Expand(op.Reshape(indices, [-1, *[1] * (rank - 1 - axis)]), op.shape(s))
    return op.ScatterElements(op.Expand(0.0, target), places, s, axis=axis, reduction="add")


def separable(op: Graph, s: Value, matrices: Mapping[int, np.ndarray | Value], rank: int) -> Value:
    """Applies the transpose of M [out, in] along each axis: s [..., out, ...] -> [..., in, ...]."""
    for axis, matrix in matrices.items():
        last = rank - 1
        M = matrix if isinstance(matrix, Value) else op.constant(matrix.astype(op.dtype))
        if axis == last:
            s = s @ M
        elif axis == last - 1:
            turned = op.Transpose(M, perm=[1, 0]) if M.array is None else op.constant(np.ascontiguousarray(M.array.T))
            s = op.MatMul(turned, s)
        else:
            swap = list(range(rank))
            swap[axis], swap[last] = last, axis
            s = op.Transpose(op.Transpose(s, perm=swap) @ M, perm=swap)
    return s
