"""Running sums, lengths of windows, pictures sampled at given positions, spectra: weighted sums within one tensor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.geometry import expand_batch
from onnxcrp.ops.pooling import _kept, _reduce_ones, _window_ones, _Windows
from onnxcrp.ops.registry import KEEPS, NONNEGATIVE, Node, Ones, carries_none, transpose

# ---- running sums ----------------------------------------------------------------------------------------------------


def _sum_back(op: Graph, node: Node, s: Value) -> Value:
    attrs = {"exclusive": int(node.attrs.get("exclusive", 0)), "reverse": 1 - int(node.attrs.get("reverse", 0))}
    return op.CumSum(s, op.value(node.node.inputs[1]), **attrs)


def _running_ones(op: Graph, node: Node) -> Ones:
    field = op.Expand(1.0, node.full_size(0, batch=1))
    count = op.node("CumSum", [field, op.value(node.node.inputs[1])], dict(node.attrs))
    return Ones(count, lambda s: _sum_back(op, node, s))


@transpose("CumSum", family="average", sign=KEEPS, ones=_running_ones)
def cum_sum(op: Graph, node: Node, s: Value) -> Value:
    """The running sum from the other end."""
    return _sum_back(op, node, s)


# ---- lengths: y = (sum |x|^p)^(1/p), dy/dx = sign(x) |x|^(p-1) / y^(p-1) ---------------------------------------------


def _length_back(op: Graph, node: Node, s: Value, spread: Callable[[Value], Value]) -> Value:
    """sign(x) |x|^(p-1) T(s / y^(p-1)), T that of the plain sum; where y is 0, so is every x."""
    p, x, y = int(node.attrs.get("p", 2)), node.input(0), node.output()
    if p == 1:
        return op.Sign(x) * spread(s)
    y = op.Where(y > 0.0, y, 1.0)
    slope, size = (x, y) if p == 2 else (op.Sign(x) * op.Pow(op.Abs(x), float(p - 1)), op.Pow(y, float(p - 1)))
    return slope * spread(s / size)


@transpose("LpPool", family="average", sign=NONNEGATIVE, ones=_window_ones)
def lp_pool(op: Graph, node: Node, s: Value) -> Value:
    """By share an entry gets |x|^p of its window's sum of them."""
    return _length_back(op, node, s, _Windows(op, node).spread)


@transpose("GlobalLpPool", family="average", sign=NONNEGATIVE, ones=_reduce_ones)
def global_lp_pool(op: Graph, node: Node, s: Value) -> Value:
    """By share an entry gets |x|^p of the sum of them."""
    return _length_back(op, node, s, lambda v: node.like(_kept(op, node, v)))


@transpose("LpNormalization", family="layernorm", sign=KEEPS)
def lp_normalization(op: Graph, node: Node, s: Value) -> Value:
    """y = x / n: s / n - sum(s x) / n^2 dn/dx, dn/dx = x / n or sign(x)."""
    x, axis, p = node.input(0), int(node.attrs.get("axis", -1)) % node.rank(0), int(node.attrs.get("p", 2))
    n = (op.ReduceL2 if p == 2 else op.ReduceL1)(x, [axis], keepdims=1)
    n = op.Where(n > 0.0, n, 1.0)
    slope = x / n if p == 2 else op.Sign(x)
    return s / n - slope * (op.ReduceSum(s * x, [axis], keepdims=1) / (n * n))


# ---- a smooth maximum ------------------------------------------------------------------------------------------------


@transpose("ReduceLogSumExp", family="max", ones=_reduce_ones)
def reduce_log_sum_exp(op: Graph, node: Node, s: Value) -> Value:
    """exp(x - y) s: every entry its share of the sum of exponentials, the largest the most."""
    return op.Exp(node.input(0) - _kept(op, node, node.output())) * _kept(op, node, s)


# ---- pictures sampled at positions -----------------------------------------------------------------------------------


@transpose("GridSample", family="average", sign=KEEPS)
def grid_sample(op: Graph, node: Node, s: Value) -> Value:
    """X [N, C, H...] read at grid [N, h..., n] (x before y): s [N, C, h...] back to the 2^n pixels each was mixed from.

    The grid is a position and gets no relevance.
    """
    mode, padding = str(node.attrs.get("mode", "linear")), str(node.attrs.get("padding_mode", "zeros"))
    if mode in ("cubic", "bicubic") or padding not in ("zeros", "border"):
        raise UnsupportedError(
            f"{node!r}: mode {mode} with padding {padding}",
            hint="linear and nearest with zeros or border are supported",
        )
    n, channels = node.rank(0) - 2, node.dims(0)[1]
    if channels is None:
        raise UnsupportedError(f"{node!r}: the number of channels is not known")
    grid = node.input(1)
    batch = op.Max(op.shape(s, 0, 1), op.shape(grid, 0, 1))
    flat = expand_batch(op, op.Reshape(s, op.Concat(op.shape(s, 0, 1), [channels, -1], axis=0)), batch, 3)
    back, total = op.zero, op.ReduceProd(node.size(0, 2), keepdims=1)
    zeros = op.Expand(0.0, op.Concat(batch, [channels], total, axis=0))
    for weight, place in _corners(op, node, grid, n, linear=mode in ("linear", "bilinear"), border=padding == "border"):
        weight, place = (op.Reshape(v, op.Concat(op.shape(v, 0, 1), [1, -1], axis=0)) for v in (weight, place))
        message = flat * weight
        places = op.Expand(place, op.shape(message))
        back = back + op.ScatterElements(zeros, places, message, axis=2, reduction="add")
    return op.Reshape(back, node.full_size(0))


def _corners(op: Graph, node: Node, grid: Value, n: int, *, linear: bool, border: bool) -> list[tuple[Value, Value]]:
    """The pixels that every output is mixed from: (weight [N, h...], index into the flat picture [N, h...])."""
    align = bool(node.attrs.get("align_corners", 0))
    axes: list[list[tuple[Value, Value]]] = []  # for every axis of the picture: (weight, index) of its neighbours
    strides: list[Value] = []
    for axis in range(n):
        size = op.float(node.size(0, axis + 2, axis + 3))  # [1]
        at = op.Gather(grid, op.constant(np.int64(n - 1 - axis)), axis=-1)
        at = (at + 1.0) * ((size - 1.0) * 0.5) if align else ((at + 1.0) * size - 1.0) * 0.5
        if border:
            at = op.Min(op.Max(at, op.as_value(0.0)), size - 1.0)
        below = op.Floor(at) if linear else op.Round(at)
        found = []
        for step in (0.0, 1.0) if linear else (0.0,):
            pixel = below + step
            weight = (at - below if step else 1.0 - (at - below)) if linear else op.float(op.Equal(pixel, pixel))
            inside = op.float(op.And(pixel >= 0.0, pixel <= size - 1.0))
            clipped = op.Min(op.Max(pixel, op.as_value(0.0)), size - 1.0)
            found.append((weight * inside, op.Cast(clipped, to=7)))
        axes.append(found)
        strides.append(op.ReduceProd(node.size(0, axis + 3), keepdims=1) if axis < n - 1 else op.as_value([1]))
    mixed = []
    for corner in product(*axes):
        weight, place = corner[0][0], op.Mul(corner[0][1], strides[0])
        for (w, i), stride in zip(corner[1:], strides[1:], strict=True):
            weight, place = weight * w, op.Add(place, op.Mul(i, stride))
        mixed.append((weight, place))
    return mixed


carries_none("AffineGrid", why="positions, not values")
carries_none("HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", why="made from sizes, not from values")


# ---- spectra ---------------------------------------------------------------------------------------------------------


@transpose("DFT", family="average")
def dft(op: Graph, node: Node, s: Value) -> Value:
    """The transposed matrix of the transform, real and imaginary parts side by side; read off numpy's transform."""
    rank = node.rank(0)
    axis = node.ints(2, [-2])[0] if node.has(2) or "axis" not in node.attrs else int(node.attrs["axis"])
    axis %= rank
    n, parts = node.dims(0)[axis], node.dims(0)[-1]
    m, out_parts = node.dims(output=True)[axis], node.dims(output=True)[-1]
    if n is None or m is None or parts is None or out_parts is None:
        raise UnsupportedError(f"{node!r}: the length of its signal is not known", hint="export with static sizes")
    length = node.ints(1, [n])[0] if node.has(1) else n
    matrix = _dft_matrix(node, length, n, parts, m, out_parts)
    order = [i for i in range(rank - 1) if i != axis] + [axis, rank - 1]
    moved = op.Transpose(s, perm=order)
    rows = op.Reshape(moved, op.Concat(op.shape(moved, 0, rank - 2), [m * out_parts], axis=0))
    back = op.Reshape(
        rows @ op.constant(matrix.astype(op.dtype)), op.Concat(op.shape(moved, 0, rank - 2), [n, parts], axis=0)
    )
    return op.Transpose(back, perm=[int(i) for i in np.argsort(order)])


def _dft_matrix(node: Node, length: int, n: int, parts: int, m: int, out_parts: int) -> np.ndarray:
    """[m out_parts, n parts]: the transform of each unit vector."""
    units = np.eye(n * parts).reshape(n * parts, n, parts)
    signal = units[..., 0] + (1j * units[..., 1] if parts == 2 else 0)
    if node.attrs.get("inverse", 0):
        if out_parts == 1:
            spectrum = np.fft.irfft(signal, length, axis=1) + 0j
        else:
            spectrum = np.fft.ifft(signal, length, axis=1)
    else:
        spectrum = np.fft.fft(signal, length, axis=1)
    found = np.stack([spectrum.real, spectrum.imag], -1)[:, :m, :out_parts]
    return found.reshape(n * parts, m * out_parts).T
