"""QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxcrp.evaluate.registry import Attributes, kernel


def _per_axis(parameter: np.ndarray, x: np.ndarray, axis: int, block: int) -> np.ndarray:
    """A scale or zero point (scalar, per axis, or per block of an axis) made to broadcast against `x`."""
    if parameter.size == 1 and not block:
        return parameter.reshape(())
    axis %= x.ndim
    if block:
        return np.take(np.repeat(parameter, block, axis), range(x.shape[axis]), axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


@kernel("QuantizeLinear")
def _quantize(attrs: Attributes, x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> Any:
    """saturate(round_half_even(x / scale) + zero point)."""
    dtype = np.dtype(np.uint8)
    if zero is not None:
        dtype = zero.dtype
    elif attrs.get("output_dtype", 0):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(attrs["output_dtype"])
    if dtype.kind not in "iu":  # the 4- and 8-bit types of ml_dtypes: onnx.reference knows them
        return NotImplemented
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    q = np.rint(x / _per_axis(scale, x, axis, block))
    if zero is not None:
        q = q + _per_axis(zero, x, axis, block).astype(q.dtype)
    limits = np.iinfo(dtype)
    return np.clip(q, limits.min, limits.max).astype(dtype)


@kernel("DequantizeLinear")
def _dequantize(attrs: Attributes, x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> np.ndarray:
    """(x - zero point) * scale."""
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)
    value = x.astype(scale.dtype)
    if zero is not None:
        value = value - _per_axis(zero, x, axis, block).astype(scale.dtype)
    value = value * _per_axis(scale, x, axis, block)
    return value.astype(attrs.floating(attrs["output_dtype"])) if attrs.get("output_dtype", 0) else value
