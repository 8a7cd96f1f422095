"""torch's kernels in double precision, for the operators whose time matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcrp.evaluate.convolution import crop, integers, transpose_geometry, window_geometry
from onnxcrp.evaluate.registry import Attributes, torch_kernel


def _to_torch(torch: Any, x: np.ndarray) -> Any:
    """Without a copy where torch can do without (it wants writable memory and no negative strides)."""
    return torch.from_numpy(x if x.flags.writeable and x.flags.c_contiguous else np.array(x, order="C"))


def _torch_pads(pads: Sequence[tuple[int, int]]) -> list[int]:
    return [p for pair in reversed(pads) for p in pair]


@torch_kernel("Conv")
def _torch_conv(torch: Any, attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None) -> Any:
    rank, group = x.ndim - 2, attrs.get("group", 1)
    if not 1 <= rank <= 3 or group == x.shape[1] > 1:  # torch's depthwise convolution is slow in float64
        return NotImplemented
    functional = torch.nn.functional
    strides, dilations, pads = window_geometry(attrs, x.shape[2:], W.shape[2:])
    t, padding = _to_torch(torch, x), [p for p, _ in pads]
    if any(p != q for p, q in pads):
        t, padding = functional.pad(t, _torch_pads(pads)), [0] * rank
    bias = None if b is None else _to_torch(torch, b)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return conv(t, _to_torch(torch, W), bias, strides, padding, dilations, group).numpy()


@torch_kernel("ConvTranspose")
def _torch_conv_transpose(
    torch: Any, attrs: Attributes, x: np.ndarray, W: np.ndarray, b: np.ndarray | None = None
) -> Any:
    rank, group = x.ndim - 2, attrs.get("group", 1)
    if not 1 <= rank <= 3 or group == x.shape[1] > 1:
        return NotImplemented
    strides, dilations, begin, size = transpose_geometry(attrs, x.shape[2:], W.shape[2:])
    functional = torch.nn.functional
    conv = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    t = conv(_to_torch(torch, x), _to_torch(torch, W), None, strides, 0, 0, group, dilations)
    z = crop(t.numpy(), begin, size)
    return z if b is None else z + b.reshape(-1, *[1] * rank)


def _torch_pool(attrs: Attributes, x: np.ndarray) -> tuple[Any, ...] | None:
    """Kernel, strides, dilations and pads where torch pools as ONNX does: pads symmetric, at most half a window."""
    kernel_shape = integers(attrs, "kernel_shape", [])
    strides, dilations, pads = window_geometry(attrs, x.shape[2:], kernel_shape)
    fits = 3 <= x.ndim <= 5 and all(p == q and 2 * p <= k for (p, q), k in zip(pads, kernel_shape, strict=True))
    return (kernel_shape, strides, dilations, [p for p, _ in pads]) if fits else None


@torch_kernel("MaxPool")
def _torch_max_pool(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    geometry = _torch_pool(attrs, x)
    if geometry is None or attrs.get("storage_order", 0):
        return NotImplemented
    kernel_shape, strides, dilations, pads = geometry
    functional = torch.nn.functional
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[x.ndim - 3]
    y, index = pool(_to_torch(torch, x), kernel_shape, strides, pads, dilations, bool(attrs.get("ceil_mode", 0)), True)
    planes = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return y.numpy(), index.numpy() + planes * math.prod(x.shape[2:])


@torch_kernel("AveragePool")
def _torch_average_pool(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    geometry = _torch_pool(attrs, x)
    if geometry is None or any(d != 1 for d in geometry[2]):
        return NotImplemented
    kernel_shape, strides, _, pads = geometry
    functional = torch.nn.functional
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.ndim - 3]
    ceil, include = bool(attrs.get("ceil_mode", 0)), bool(attrs.get("count_include_pad", 0))
    return pool(_to_torch(torch, x), kernel_shape, strides, pads, ceil, include).numpy()


@torch_kernel("Gemm")
def _torch_gemm(torch: Any, attrs: Attributes, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> Any:
    left, right = _to_torch(torch, a), _to_torch(torch, b)
    y = ((left.T if attrs.get("transA", 0) else left) @ (right.T if attrs.get("transB", 0) else right)).numpy()
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    return alpha * y if c is None else alpha * y + beta * c


@torch_kernel("MatMul")
def _torch_matmul(torch: Any, attrs: Attributes, a: np.ndarray, b: np.ndarray) -> Any:
    return torch.matmul(_to_torch(torch, a), _to_torch(torch, b)).numpy()


@torch_kernel("Erf")
def _torch_erf(torch: Any, attrs: Attributes, x: np.ndarray) -> Any:
    return torch.special.erf(_to_torch(torch, x)).numpy()
