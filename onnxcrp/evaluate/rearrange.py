"""Entries moved, copied, padded or interpolated."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate.reference import by_reference
from onnxcrp.evaluate.registry import Attributes, Kernel, kernel


def _axes(attrs: Attributes, axes: Any, rank: int) -> list[int]:
    """Axes given as input (opset 13 on) or attribute, made non-negative."""
    axes = attrs.get("axes", axes)
    return [int(a) % rank for a in axes]


@kernel("Reshape")
def _reshape(attrs: Attributes, x: np.ndarray, shape: Any = None) -> np.ndarray:
    sizes = [int(n) for n in attrs.get("shape", shape)]
    if not attrs.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@kernel("Flatten")
def _flatten(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axis = attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.size else x.reshape(math.prod(x.shape[:axis]), 0)


@kernel("Transpose")
def _transpose(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return x.transpose(attrs.get("perm"))


@kernel("Squeeze")
def _squeeze(attrs: Attributes, x: np.ndarray, axes: Any = None) -> np.ndarray:
    if attrs.get("axes", axes) is None:
        return x.squeeze()
    return x.squeeze(tuple(_axes(attrs, axes, x.ndim)))


@kernel("Unsqueeze")
def _unsqueeze(attrs: Attributes, x: np.ndarray, axes: Any = None) -> np.ndarray:
    given = attrs.get("axes", axes)
    return np.expand_dims(x, tuple(_axes(attrs, axes, x.ndim + len(given))))


@kernel("Concat")
def _concat(attrs: Attributes, *inputs: np.ndarray) -> np.ndarray:
    return np.concatenate(inputs, attrs.get("axis", 1))


@kernel("Split")
def _split(attrs: Attributes, x: np.ndarray, split: Any = None) -> tuple[np.ndarray, ...]:
    """Sizes as input (opset 13) or attribute; else `num_outputs` (opset 18) equal parts, the last one smaller."""
    axis, sizes = attrs.get("axis", 0), attrs.get("split", split)
    if sizes is None:
        parts = attrs.get("num_outputs", attrs.outputs)
        if parts is None:
            raise UnsupportedError("Split without sizes needs to know how many outputs it has")
        size = -(-x.shape[axis] // parts)
        sizes = [min(size, x.shape[axis] - i * size) for i in range(parts)]
    bounds = np.cumsum([0, *(int(n) for n in sizes)])
    return tuple(np.take(x, range(start, stop), axis) for start, stop in pairwise(bounds))


@kernel("Slice")
def _slice(
    attrs: Attributes, x: np.ndarray, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> np.ndarray:
    """As Python's slices, which clamp the same way; an `end` that reaches before index 0 of a backward step is None."""
    starts, ends = attrs.get("starts", starts), attrs.get("ends", ends)
    axes = attrs.get("axes", axes)
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        size, stop = x.shape[int(axis)], int(stop)
        index[int(axis)] = slice(int(start), None if step < 0 and stop < -size else stop, int(step))
    return x[tuple(index)]


@kernel("Expand")
def _expand(attrs: Attributes, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(n) for n in shape)))


@kernel("Tile")
def _tile(attrs: Attributes, x: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    return np.tile(x, repeats)


@kernel("Pad")
def _pad(attrs: Attributes, x: np.ndarray, pads: Any = None, value: Any = None, axes: Any = None) -> np.ndarray:
    """Modes constant, reflect, edge, wrap; negative pads crop."""
    flat = [int(p) for p in attrs.get("pads", pads)]
    axes_ = list(range(x.ndim)) if axes is None else [int(a) % x.ndim for a in axes]
    widths = [(0, 0)] * x.ndim
    for axis, begin, end in zip(axes_, flat[: len(axes_)], flat[len(axes_) :], strict=True):
        widths[axis] = (begin, end)
    index = tuple(slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(widths, x.shape, strict=True))
    widths = [(max(b, 0), max(e, 0)) for b, e in widths]
    mode = attrs.get("mode", "constant")
    if mode == "constant":
        fill = attrs.get("value", 0) if value is None or value.size == 0 else value.reshape(())
        return np.pad(x[index], widths, constant_values=fill)
    return np.pad(x[index], widths, mode=mode)


@kernel("DepthToSpace")
def _depth_to_space(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    N, C, H, W = x.shape
    b = attrs["blocksize"]
    if attrs.get("mode", "DCR") == "DCR":
        y = x.reshape(N, b, b, C // b**2, H, W).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(N, C // b**2, b, b, H, W).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(N, C // b**2, H * b, W * b)


@kernel("SpaceToDepth")
def _space_to_depth(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    N, C, H, W = x.shape
    b = attrs["blocksize"]
    return x.reshape(N, C, H // b, b, W // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(N, C * b**2, H // b, W // b)


@kernel("Trilu")
def _trilu(attrs: Attributes, x: np.ndarray, k: np.ndarray | None = None) -> np.ndarray:
    return (np.triu if attrs.get("upper", 1) else np.tril)(x, 0 if k is None else int(k.reshape(-1)[0]))


_CUBIC = (  # weights of the four neighbours at distance r behind the second, Keys 1981
    lambda r, A: ((A * (r + 1) - 5 * A) * (r + 1) + 8 * A) * (r + 1) - 4 * A,
    lambda r, A: ((A + 2) * r - (A + 3)) * r**2 + 1,
    lambda r, A: ((A + 2) * (1 - r) - (A + 3)) * (1 - r) ** 2 + 1,
    lambda r, A: ((A * (2 - r) - 5 * A) * (2 - r) + 8 * A) * (2 - r) - 4 * A,
)
_NEAREST: dict[str, Kernel] = {
    "round_prefer_floor": lambda c: np.ceil(c - 0.5),
    "round_prefer_ceil": lambda c: np.floor(c + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _source_coordinates(mode: str, size: int, out: int, scale: float, dtype: type = np.float64) -> np.ndarray:
    """Where each of `out` samples lies on an axis of `size`: the specification's coordinate transformations."""
    c: np.ndarray = np.arange(out, dtype=dtype)
    scale = dtype(scale)
    if mode == "align_corners":
        return c * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    if mode == "asymmetric":
        return c / scale
    if mode == "pytorch_half_pixel" and out == 1:
        return np.zeros(1)
    start = size / 2 * (1 - out / (scale * size)) if mode == "half_pixel_symmetric" else 0
    return start + (c + 0.5) / scale - 0.5


def resize_matrix(
    attrs: Attributes, size: int, out: int, scale: float, window: tuple[float, float] = (0, 1)
) -> np.ndarray:
    """[out, size]: the interpolation along one axis, the edge repeated outside; `window`: what a crop takes of it.

    Which entry is nearest is decided in float32, as runtimes do: (3 + 0.5) / 0.7 - 0.5 is a tie there. Of a crop
    nothing is known outside (zeros; `extrapolation_value` is not part of the map).
    """
    mode, how = attrs.get("mode", "nearest"), attrs.get("coordinate_transformation_mode", "half_pixel")
    if how == "tf_crop_and_resize":
        ends = np.linspace(*window, out) if out > 1 else np.array([sum(window) / 2])
        coordinates = ends * (size - 1)
    else:
        rounded = mode == "nearest" and how != "half_pixel_symmetric"
        coordinates = _source_coordinates(how, size, out, scale, np.float32 if rounded else np.float64)
    floor = np.floor(coordinates)
    r = coordinates - floor
    if mode == "nearest":
        first = _NEAREST[attrs.get("nearest_mode", "round_prefer_floor")](coordinates)
        weights = [np.ones(out)]
    elif mode == "linear":
        first, weights = floor, [1 - r, r]
    else:
        first, weights = floor - 1, [w(r, attrs.float("cubic_coeff_a", -0.75)) for w in _CUBIC]
    matrix = np.zeros((out, size))
    for k, weight in enumerate(weights):
        position = first.astype(np.int64) + k
        if attrs.get("exclude_outside", 0):
            weight = weight * ((position >= 0) & (position < size))
        np.add.at(matrix, (np.arange(out), np.clip(position, 0, size - 1)), weight)
    if how == "tf_crop_and_resize":
        matrix[(coordinates < 0) | (coordinates > size - 1)] = 0
    return matrix / matrix.sum(1, keepdims=True) if attrs.get("exclude_outside", 0) else matrix


@kernel("Resize")
def _resize(attrs: Attributes, x: np.ndarray, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """One matrix per axis; sizes follow from scales in float32, as runtimes compute them."""
    if attrs.opset < 11:
        attrs = Attributes({**attrs, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})
        roi, scales = None, roi
    scales, sizes = (None if v is None or v.size == 0 else v for v in (scales, sizes))
    given = (scales is not None) != (sizes is not None)
    crops = attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if not given or crops or attrs.get("antialias", 0):
        inputs = [x, *(None if v is None else v.astype(np.float32) for v in (roi, scales)), sizes]
        return by_reference("Resize", attrs, inputs, max(attrs.opset, 18))
    y = x
    axes = attrs.get("axes") or range(x.ndim)
    policy = attrs.get("keep_aspect_ratio_policy", "stretch") if scales is None else "stretch"
    if policy != "stretch":  # one factor for all axes
        factors = [value / x.shape[axis] for axis, value in zip(axes, sizes, strict=True)]
        common = min(factors) if policy == "not_larger" else max(factors)
    for axis, value in zip(axes, scales if sizes is None else sizes, strict=True):
        size = x.shape[axis]
        out = int(value) if scales is None else int(np.float32(size) * np.float32(value))
        scale = out / size if scales is None else float(value)
        if policy != "stretch":
            out, scale = int(np.floor(common * size + 0.5)), common
        if out != size or scale != 1:
            matrix = resize_matrix(attrs, size, out, scale)
            y = np.moveaxis(np.tensordot(matrix, y.astype(np.float64), (1, axis)), 0, axis)
    return x if y.shape == x.shape else y.astype(x.dtype)  # runtimes copy where no size changes


@kernel("Upsample")
def _upsample(attrs: Attributes, x: np.ndarray, scales: Any = None) -> Any:
    factors = np.asarray(attrs.get("scales", scales), np.float32)
    mode = {"bilinear": "linear"}.get(attrs.get("mode", "nearest"), attrs.get("mode", "nearest"))
    return _resize(Attributes({"mode": mode}, opset=10), x, factors)
