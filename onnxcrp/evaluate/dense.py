"""Matrix products, normalization and softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate.registry import Attributes, kernel


@kernel("Gemm")
def _gemm(attrs: Attributes, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    y = (a.T if attrs.get("transA", 0) else a) @ (b.T if attrs.get("transB", 0) else b)
    if (alpha := attrs.get("alpha", 1.0)) != 1:
        y = alpha * y
    if c is None or (beta := attrs.get("beta", 1.0)) == 0:
        return y
    return y + (c if beta == 1 else beta * c)


@kernel("MatMul")
def _matmul(attrs: Attributes, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(a, b)


@kernel("Linear")
def _linear(attrs: Attributes, a: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """The project's own a [..., in] @ W.T + b, W [out, in]."""
    z = a @ W.T
    return z if b is None else z + b


@kernel("Einsum")
def _einsum(attrs: Attributes, *inputs: np.ndarray) -> np.ndarray:
    return np.einsum(attrs["equation"], *inputs, optimize=True)


def _channels(v: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[C] -> [C, 1, ...], to broadcast against x [N, C, ...]."""
    return v.reshape(-1, *[1] * (x.ndim - 2))


@kernel("BatchNormalization")
def _batch_normalization(
    attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> np.ndarray:
    if attrs.get("training_mode", 0):
        raise UnsupportedError("BatchNormalization in training mode is not evaluated", hint="export in eval mode")
    factor = scale / np.sqrt(var + attrs.float("epsilon", 1e-5))
    return (x - _channels(mean, x)) * _channels(factor, x) + _channels(b, x)


def _normalize(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = x.mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(np.square(x - mean).mean(axes, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


@kernel("InstanceNormalization")
def _instance_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray) -> np.ndarray:
    y, _, _ = _normalize(x, tuple(range(2, x.ndim)), attrs.float("epsilon", 1e-5))
    return y * _channels(scale, x) + _channels(b, x)


@kernel("GroupNormalization")
def _group_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray) -> np.ndarray:
    groups = attrs["num_groups"]
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _normalize(grouped, (2,), attrs.float("epsilon", 1e-5))[0].reshape(x.shape)
    if scale.shape[0] != x.shape[1]:  # until opset 20 scale and bias were per group
        scale, b = (np.repeat(v, x.shape[1] // groups) for v in (scale, b))
    return y * _channels(scale, x) + _channels(b, x)


@kernel("LayerNormalization")
def _layer_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray, b: np.ndarray | None = None) -> Any:
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    y, mean, inverse = _normalize(x, axes, attrs.float("epsilon", 1e-5))
    y = y * scale
    return (y if b is None else y + b), mean, inverse


@kernel("RMSNormalization", "RmsNorm")
def _rms_normalization(attrs: Attributes, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    axes = tuple(range(attrs.get("axis", -1) % x.ndim, x.ndim))
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + attrs.float("epsilon", 1e-5)) * scale


@kernel("LRN")
def _lrn(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    """Divide x by (bias + alpha / size * S)^beta, S the sum of x^2 over `size` neighbouring channels."""
    size = attrs["size"]
    before, after = (size - 1) // 2, size // 2
    square = np.pad(np.square(x), [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    S = sum(square[:, i : i + x.shape[1]] for i in range(size))
    return x / (attrs.float("bias", 1) + attrs.float("alpha", 0.0001) / size * S) ** attrs.float("beta", 0.75)


def _softmax_axes(attrs: Attributes, x: np.ndarray) -> tuple[int, ...]:
    """One axis; before opset 13 the axis and all after it, taken together."""
    if attrs.opset < 13:
        return tuple(range(attrs.get("axis", 1) % x.ndim, x.ndim))
    return (attrs.get("axis", -1) % x.ndim,)


@kernel("Softmax")
def _softmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    e = np.exp(x - x.max(axes, keepdims=True))
    return e / e.sum(axes, keepdims=True)


@kernel("LogSoftmax")
def _log_softmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    shifted = x - x.max(axes, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axes, keepdims=True))


@kernel("AffineGrid")
def _affine_grid(attrs: Attributes, theta: np.ndarray, size: np.ndarray) -> np.ndarray:
    """theta [N, n, n + 1] applied to the positions of [N, C, h...] in -1..1, x before y: [N, h..., n]."""
    if attrs.get("align_corners", 0):
        axes = [np.linspace(-1, 1, int(d)) for d in size[2:]]
    else:
        axes = [(2 * np.arange(int(d)) + 1) / d - 1 for d in size[2:]]
    places = np.meshgrid(*axes, indexing="ij")
    whole = np.stack([*places[::-1], np.ones_like(places[0])], -1)
    return np.einsum("...i,bji->b...j", whole, theta).astype(theta.dtype)


@kernel("Hardmax")
def _hardmax(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    axes = _softmax_axes(attrs, x)
    shape = (*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
    y = np.zeros_like(x).reshape(shape)
    first = np.expand_dims(x.reshape(shape).argmax(axes[0]), axes[0])
    np.put_along_axis(y, first, 1, axes[0])
    return y.reshape(x.shape)
