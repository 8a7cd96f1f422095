"""Shapes and constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate.registry import Attributes, in_floats, kernel


@kernel("Shape")
def _shape(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.asarray(x.shape[attrs.get("start", 0) : attrs.get("end")], np.int64)


@kernel("Size")
def _size(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.asarray(x.size, np.int64)


def _array(value: Any) -> np.ndarray:
    """A tensor attribute as onnx, numpy or graphsurgeon hold it."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(getattr(value, "values", value))


@kernel("Constant")
def _constant(attrs: Attributes) -> np.ndarray:
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in attrs:
            return in_floats(np.asarray(attrs[name], dtype), attrs.floats)
    if "value_ints" in attrs:
        return np.asarray(attrs["value_ints"], np.int64)
    if "value" not in attrs:
        raise UnsupportedError("Constant of strings or of a sparse tensor is not evaluated")
    return in_floats(_array(attrs["value"]), attrs.floats)


@kernel("ConstantOfShape")
def _constant_of_shape(attrs: Attributes, shape: np.ndarray) -> np.ndarray:
    value = _array(attrs["value"]).reshape(-1)[:1] if "value" in attrs else np.zeros(1, np.float32)
    value = in_floats(value, attrs.floats)
    return np.full([int(n) for n in shape], value[0], value.dtype)


@kernel("Range")
def _range(attrs: Attributes, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> np.ndarray:
    count = max(math.ceil((limit.item() - start.item()) / delta.item()), 0)
    return (start + np.arange(count) * delta).astype(start.dtype)


@kernel("EyeLike")
def _eye_like(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    dtype = attrs.floating(attrs["dtype"]) if "dtype" in attrs else x.dtype
    return np.eye(x.shape[0], x.shape[1], k=attrs.get("k", 0), dtype=dtype)
