"""Convolutions and pooling: a matrix product or a maximum per position in the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from onnxcrp.evaluate.registry import Attributes, kernel


def integers(attrs: Attributes, name: str, default: Sequence[int]) -> list[int]:
    """A list of ints; the default where the attribute is missing or empty."""
    value = attrs.get(name)
    return [int(v) for v in (default if value is None or len(value) == 0 else value)]


def window_geometry(
    attrs: Attributes, spatial: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and (begin, end) pads per spatial axis, auto_pad resolved."""
    rank = len(spatial)
    strides, dilations = integers(attrs, "strides", [1] * rank), integers(attrs, "dilations", [1] * rank)
    mode = attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        flat = integers(attrs, "pads", [0] * (2 * rank))
        return strides, dilations, list(zip(flat[:rank], flat[rank:], strict=True))
    pads = []
    for size, k, s, d in zip(spatial, kernel_shape, strides, dilations, strict=True):
        total = 0 if mode == "VALID" else max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small = total // 2
        pads.append((total - small, small) if mode == "SAME_LOWER" else (small, total - small))
    return strides, dilations, pads


def _out_size(size: int, k: int, s: int, d: int, pads: tuple[int, int], *, ceil: bool = False) -> int:
    """Number of windows along one axis; with ceil_mode a window that would start in the end padding is left out."""
    span = size + sum(pads) - (d * (k - 1) + 1)
    n = (-(-span // s) if ceil else span // s) + 1
    return n - 1 if ceil and (n - 1) * s >= size + pads[0] else n


def _last(index: Iterable[Any]) -> Any:
    """An index into the last axes."""
    return (Ellipsis, *index)


def _windows(
    kernel_shape: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """For every position in the kernel: the slice of the padded input that it reads, one entry per window."""
    for k in np.ndindex(*kernel_shape):
        slices = (
            slice(i * d, i * d + (n - 1) * s + 1, s) for i, s, d, n in zip(k, strides, dilations, out, strict=True)
        )
        yield k, _last(slices)


def _pad_spatial(x: np.ndarray, pads: Sequence[tuple[int, int]], value: Any = 0) -> np.ndarray:
    if not any(map(any, pads)):
        return x
    return np.pad(x, [(0, 0), (0, 0), *pads], constant_values=value)


@kernel("Conv")
def _conv(attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Of x [N, C, *spatial], W [M, C/group, *kernel], b [M]: [N, M, *out], a matrix product per kernel position."""
    group, kernel_shape = attrs.get("group", 1), W.shape[2:]
    strides, dilations, pads = window_geometry(attrs, x.shape[2:], kernel_shape)
    out = [_out_size(*axis) for axis in zip(x.shape[2:], kernel_shape, strides, dilations, pads, strict=True)]
    x = _pad_spatial(x, pads)
    N, C, M = x.shape[0], x.shape[1], W.shape[0]
    x = x.reshape(N, group, C // group, *x.shape[2:])
    W = W.reshape(group, M // group, C // group, *kernel_shape)
    z = np.zeros((N, group, M // group, math.prod(out)), x.dtype)
    for k, window in _windows(kernel_shape, strides, dilations, out):
        patch = x[window].reshape(N, group, C // group, -1)
        w = W[_last(k)]
        z += w * patch if group == C else w @ patch  # depthwise: no sum over channels
    z = z.reshape(N, M, *out)
    return z if b is None else z + b.reshape(-1, *[1] * len(out))


def transpose_geometry(
    attrs: Attributes, spatial: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, begin pads and output size of a ConvTranspose, auto_pad and output_shape resolved."""
    rank = len(spatial)
    strides, dilations = integers(attrs, "strides", [1] * rank), integers(attrs, "dilations", [1] * rank)
    extra, mode = integers(attrs, "output_padding", [0] * rank), attrs.get("auto_pad", "NOTSET")
    full = [
        s * (n - 1) + e + d * (k - 1) + 1
        for n, k, s, d, e in zip(spatial, kernel_shape, strides, dilations, extra, strict=True)
    ]
    wanted = integers(attrs, "output_shape", [])[-rank:]
    if not wanted and mode.startswith("SAME"):
        wanted = [n * s for n, s in zip(spatial, strides, strict=True)]
    if not wanted:
        pads = [0] * (2 * rank) if mode == "VALID" else integers(attrs, "pads", [0] * (2 * rank))
        return strides, dilations, pads[:rank], [f - p - q for f, p, q in zip(full, pads, pads[rank:], strict=False)]
    total = [f - w for f, w in zip(full, wanted, strict=True)]
    begin = [t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total]
    return strides, dilations, begin, wanted


def crop(full: np.ndarray, begin: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """[N, C, *full] -> [N, C, *size], starting at `begin`; what lies outside (output_padding) is zero."""
    fill = [(max(-p, 0), max(p + n - f, 0)) for p, n, f in zip(begin, size, full.shape[2:], strict=True)]
    full = _pad_spatial(full, fill)
    return full[_last(slice(max(p, 0), max(p, 0) + n) for p, n in zip(begin, size, strict=True))]


@kernel("ConvTranspose")
def _conv_transpose(attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Of x [N, C, *spatial], W [C, M/group, *kernel]: [N, M, *out], kernel positions add to strided slices."""
    group, kernel_shape, spatial = attrs.get("group", 1), W.shape[2:], x.shape[2:]
    strides, dilations, begin, size = transpose_geometry(attrs, spatial, kernel_shape)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(spatial, strides, dilations, kernel_shape, strict=True)]
    N, C, M = x.shape[0], x.shape[1], W.shape[1]
    x = x.reshape(N, group, C // group, -1)
    W = np.swapaxes(W.reshape(group, C // group, M, *kernel_shape), 1, 2)
    z = np.zeros((N, group, M, *full), x.dtype)
    for k, window in _windows(kernel_shape, strides, dilations, spatial):
        w = W[_last(k)]
        z[window] += (w * x if group == C else w @ x).reshape(N, group, M, *spatial)
    z = crop(z.reshape(N, group * M, *full), begin, size)
    return z if b is None else z + b.reshape(-1, *[1] * len(size))


def _pool_geometry(attrs: Attributes, x: np.ndarray) -> tuple[Any, ...]:
    """Kernel, strides, dilations, pads, output size, and the end pads that the last window needs under ceil_mode."""
    kernel_shape, ceil = integers(attrs, "kernel_shape", []), bool(attrs.get("ceil_mode", 0))
    strides, dilations, pads = window_geometry(attrs, x.shape[2:], kernel_shape)
    out, reach = [], []
    for size, k, s, d, p in zip(x.shape[2:], kernel_shape, strides, dilations, pads, strict=True):
        n = _out_size(size, k, s, d, p, ceil=ceil)
        out.append(n)
        reach.append((p[0], max(p[1], (n - 1) * s + d * (k - 1) + 1 - size - p[0])))
    return kernel_shape, strides, dilations, pads, out, reach


@kernel("MaxPool")
def _max_pool(attrs: Attributes, x: np.ndarray) -> Any:
    """[N, C, *spatial] -> maxima and, flat through the whole tensor, the index of the first maximum of each window."""
    kernel_shape, strides, dilations, pads, out, reach = _pool_geometry(attrs, x)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    padded = _pad_spatial(x, reach, lowest)
    best = np.full((*x.shape[:2], *out), lowest, x.dtype)
    if attrs.outputs == 1:
        for _, window in _windows(kernel_shape, strides, dilations, out):
            np.maximum(best, padded[window], out=best)
        return best
    rank, shape = len(out), x.shape[2:]
    step = np.cumprod([1, *shape[:0:-1]])[::-1] if not attrs.get("storage_order", 0) else np.cumprod([1, *shape[:-1]])
    index = np.full(best.shape, -1, np.int64)
    for k, window in _windows(kernel_shape, strides, dilations, out):
        where = np.zeros((), np.int64)
        inside = np.ones((), bool)
        for axis in range(rank):
            position = np.arange(out[axis]) * strides[axis] + k[axis] * dilations[axis] - pads[axis][0]
            position = position.reshape([-1 if i == axis else 1 for i in range(rank)])
            inside = inside & (position >= 0) & (position < shape[axis])
            where = where + position * step[axis]
        better = ((padded[window] > best) | (index < 0)) & inside  # < 0: a window of nothing but -inf has an index too
        np.copyto(best, padded[window], where=better)
        np.copyto(index, np.broadcast_to(where, index.shape), where=better)
    planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * rank)
    return best, index + planes * math.prod(shape)


@kernel("AveragePool")
def _average_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    """[N, C, *spatial] -> means; divided by the window inside the input, or with count_include_pad inside its pads."""
    kernel_shape, strides, dilations, pads, out, reach = _pool_geometry(attrs, x)
    padded = _pad_spatial(x, reach)
    total = np.zeros((*x.shape[:2], *out), x.dtype)
    for _, window in _windows(kernel_shape, strides, dilations, out):
        total += padded[window]
    count = np.ones([1] * len(out))
    for axis, (size, k, s, d, p, n) in enumerate(
        zip(x.shape[2:], kernel_shape, strides, dilations, pads, out, strict=True)
    ):
        begin, end = (p[0], size + p[1]) if attrs.get("count_include_pad", 0) else (0, size)
        position = (np.arange(n) * s - p[0])[:, None] + np.arange(k) * d
        low = -begin
        inside = ((position >= low) & (position < end)).sum(1)
        count = count * inside.reshape([-1 if i == axis else 1 for i in range(len(out))])
    return total / count.astype(x.dtype)


@kernel("GlobalAveragePool")
def _global_average_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.mean(tuple(range(2, x.ndim)), keepdims=True)


@kernel("GlobalMaxPool")
def _global_max_pool(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.max(tuple(range(2, x.ndim)), keepdims=True)
