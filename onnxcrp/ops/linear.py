"""Convolutions and dense layers: the operators with weights.

Transposes take the weights as a last argument, since rules send messages through W+, W- and others. `ones` gives
L(1,0)1 and T(1)s on one channel: a layer of ones treats all channels alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, Value
from onnxcrp.ops.geometry import CHANNEL_BLOCK, pads_itself, scatter, spaced, window
from onnxcrp.ops.registry import KEEPS, Node, Ones, transpose

_CONV_ATTRS = ("strides", "dilations", "pads", "group", "kernel_shape")


def _attrs(node: Node, *names: str) -> dict[str, Any]:
    return {name: node.attrs[name] for name in names if name in node.attrs}


def _kernel(node: Node) -> list[int]:
    """Spatial kernel size of a node with weights [., ., k...]."""
    return list(node.input(1).array.shape[2:])  # type: ignore[union-attr]


def _again(op: Graph, node: Node, a: Value, W: Value, b: Value) -> Value:
    return op.node(node.op, [a, W, None if b.is_zero else b], dict(node.attrs))


# ---- Conv ------------------------------------------------------------------------------------------------------------


def _conv_ones(op: Graph, node: Node) -> Ones:
    group = node.attrs.get("group", 1)
    out_channels, per_group = node.input(1).array.shape[:2]  # type: ignore[union-attr]
    kernel = _kernel(node)
    one = op.constant(np.ones((1, 1, *kernel), op.dtype))
    attrs = _attrs(node, "strides", "dilations", "pads", "kernel_shape", "auto_pad")
    field = op.Expand(1.0, op.Concat([1, 1], node.size(0, 2), axis=0))
    count = op.node("Conv", [field, one], attrs) * float(per_group)

    if group == 1:  # every output channel reads the same inputs

        def spread(s: Value) -> Value:
            single = scatter(op, node, s, one, kernel, group=1)
            return single if per_group == 1 else node.like(single)

        return Ones(count, spread, gather=lambda R: op.ReduceSum(R, [1], keepdims=1))
    full = op.constant(np.ones((out_channels, per_group, *kernel), op.dtype))
    return Ones(count, spread=lambda s: scatter(op, node, s, full, kernel, group=group))


@transpose("Conv", family="convolution", sign=KEEPS, forward=_again, ones=_conv_ones, weighted=True)
def conv(op: Graph, node: Node, s: Value, W: Value) -> Value:
    """s [N, M, h...], W [M, C/group, k...] -> [N, C, H...]; with stride 1 a convolution with the flipped kernel.

    A kernel of one place (the shortcuts of residual nets) needs its stride only to put the results where they belong.
    With one kernel per channel the multiplications are so few that those with zeros between the strides cost nothing.
    """
    kernel = _kernel(node)
    group = node.attrs.get("group", 1)
    strides, dilations, before, after = window(node, kernel)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    fits = all(r >= p for r, p in zip([*reach, *reach], [*before, *after], strict=True))
    if op.flip_convolutions and set(strides) == {1} and fits and W.is_constant and not pads_itself(node):
        pads = [r - p for r, p in zip([*reach, *reach], [*before, *after], strict=True)]
        return op.Conv(
            s, _flipped(op, W, group), strides=strides, dilations=dilations, pads=pads, group=group, kernel_shape=kernel
        )
    if op.flip_convolutions and set(kernel) == {1} and not any([*before, *after]) and W.is_constant:
        return spaced(op, node, op.Conv(s, _flipped(op, W, group), group=group, kernel_shape=kernel), strides)
    if op.flip_convolutions and fits and W.is_constant and _is_depthwise(node, group, strides):
        pads = [*(r - p for r, p in zip(reach, before, strict=True)), *before]
        s, W = spaced(op, node, s, strides), _flipped(op, W, group)
        return op.Conv(s, W, dilations=dilations, pads=pads, group=group, kernel_shape=kernel)
    return scatter(op, node, s, W, kernel, group=group)


def _is_depthwise(node: Node, group: int, strides: Sequence[int]) -> bool:
    """Whether every channel has a kernel of its own, in full blocks, and all messages find a place in the input.

    With strides s, message i stands at i s of a static size: the last one lies inside, and its window reaches the end.
    """
    alone = group % CHANNEL_BLOCK == 0 and node.input(1).array.shape[:2] == (group, 1)  # type: ignore[union-attr]
    if not alone or pads_itself(node) or None in (*node.dims(0)[2:], *node.dims(output=True)[2:]):
        return False
    sizes = zip(node.dims(output=True)[2:], strides, node.dims(0)[2:], strict=True)
    return all((h - 1) * stride < size <= h * stride for h, stride, size in sizes)  # type: ignore[operator]


def _flipped(op: Graph, W: Value, group: int) -> Value:
    """W [M, C/g, k...] -> [C, M/g, k...] with the kernel turned round: the weights of the transposed convolution."""

    def flip(array: np.ndarray) -> np.ndarray:
        out_channels, per_group, *kernel = array.shape
        grouped = array.reshape(group, out_channels // group, per_group, *kernel).swapaxes(1, 2)
        turned = np.flip(grouped, axis=tuple(range(3, 3 + len(kernel))))
        return np.ascontiguousarray(turned.reshape(group * per_group, out_channels // group, *kernel))

    def nodes(W: Value) -> Value:
        out_channels, per_group, *kernel = W.array.shape  # type: ignore[union-attr]
        n = len(kernel)
        if group > 1:
            W = op.Reshape(W, [group, out_channels // group, per_group, *kernel])
        rank = n + 2 + (group > 1)
        W = op.Transpose(W, perm=[*range(rank - n - 2), rank - n - 1, rank - n - 2, *range(rank - n, rank)])
        turned = [rank - n + axis for axis, k in enumerate(kernel) if k > 1]
        if turned:
            ends = op.constant(np.full(len(turned), np.iinfo(np.int64).min))
            W = op.Slice(W, [-1] * len(turned), ends, turned, [-1] * len(turned))
        return op.Reshape(W, [group * per_group, out_channels // group, *kernel]) if group > 1 else W

    return op.derive(W, f"flipped/{group}", flip, nodes)


# ---- ConvTranspose ---------------------------------------------------------------------------------------------------


def _conv_transpose_ones(op: Graph, node: Node) -> Ones:
    group = node.attrs.get("group", 1)
    W = op.constant(np.ones_like(node.input(1).array))
    channels = W.array.shape[0]  # type: ignore[union-attr]
    field = op.Expand(1.0, op.Concat([1, channels], node.size(0, 2), axis=0))
    count = op.node("ConvTranspose", [field, W], dict(node.attrs))
    return Ones(count, spread=lambda s: _back_through_conv_transpose(op, node, s, W, group))


@transpose("ConvTranspose", family="convolution", sign=KEEPS, forward=_again, ones=_conv_transpose_ones, weighted=True)
def conv_transpose(op: Graph, node: Node, s: Value, W: Value) -> Value:
    """s [N, M, H...], W [C, M/group, k...] -> [N, C, h...]: the convolution of which this is the transpose."""
    return _back_through_conv_transpose(op, node, s, W, node.attrs.get("group", 1))


def _back_through_conv_transpose(op: Graph, node: Node, s: Value, W: Value, group: int) -> Value:
    kernel = _kernel(node)
    if pads_itself(node) or node.attrs.get("output_shape"):
        raise UnsupportedError(f"{node!r}: auto_pad and output_shape need static sizes", hint="export a fixed size")
    strides, dilations, before, after = window(node, kernel)
    attrs = {"strides": strides, "dilations": dilations, "group": group, "kernel_shape": kernel}
    crop = [-min(p, 0) for p in [*before, *after]]
    if any(crop):  # negative pads enlarge the output of a ConvTranspose: those places belong to no input
        n = len(kernel)
        s = op.Pad(s, [0, 0, *[-c for c in crop[:n]], 0, 0, *[-c for c in crop[n:]]])
    pads = [max(p, 0) for p in [*before, *after]]
    return op.Conv(s, W, pads=pads, **attrs)


# ---- Linear: Gemm, MatMul with a constant ----------------------------------------------------------------------------


def _linear(op: Graph, node: Node, a: Value, W: Value, b: Value) -> Value:
    if node.rank(0) == 2:
        return op.Gemm(a, W, None if b.is_zero else b, transB=1)
    z = a @ turned(op, W)
    return z if b.is_zero else z + b


def turned(op: Graph, W: Value) -> Value:
    """W [out, in] -> [in, out]."""
    if not W.is_constant:
        return op.Transpose(W)
    return op.derive(W, "turned", lambda array: np.ascontiguousarray(array.T), lambda W: op.Transpose(W, perm=[1, 0]))


def _linear_ones(op: Graph, node: Node) -> Ones:
    features = node.input(1).array.shape[1]  # type: ignore[union-attr]
    return Ones(op.as_value(float(features)), gather=lambda R: op.ReduceSum(R, [-1], keepdims=1), spread=node.like)


@transpose("Linear", family="dense", sign=KEEPS, forward=_linear, ones=_linear_ones, weighted=True)
def linear(op: Graph, node: Node, s: Value, W: Value) -> Value:
    """s [N, ..., out], W [out, in] -> s W [N, ..., in]."""
    return s @ W


# ---- BatchNormalization that stays -----------------------------------------------------------------------------------


def batchnorm_scale(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """(gamma / sqrt(var + eps), beta - mean * that) per channel, shaped [C, 1, ...]: y = scale x + shift."""
    scale, beta, mean, variance = (np.asarray(node.array(i), np.float64) for i in range(1, 5))
    scale = scale / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    shape = [-1, *[1] * (node.rank(0) - 2)]
    return scale.reshape(shape), (beta - mean * scale).reshape(shape)


def _batchnorm_again(op: Graph, node: Node, a: Value, W: Value, b: Value) -> Value:
    return a * W + b


@transpose("BatchNormalization", family="normalization", forward=_batchnorm_again, weighted=True)
def batchnorm(op: Graph, node: Node, s: Value, W: Value) -> Value:
    """s [N, C, ...] -> s * gamma / sqrt(var + eps)."""
    return s * W
