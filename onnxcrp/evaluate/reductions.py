"""Reductions, sorting and cumulative sums along axes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from onnxcrp.evaluate.registry import Attributes, Kernel, kernel


def _log_sum_exp(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
    return total if keepdims else total.squeeze(axis)


_REDUCTIONS: dict[str, Kernel] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceL1": lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims),
    "ReduceL2": lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis, keepdims=keepdims)),
    "ReduceSumSquare": lambda x, axis, keepdims: np.square(x).sum(axis, keepdims=keepdims),
    "ReduceLogSum": lambda x, axis, keepdims: np.log(x.sum(axis, keepdims=keepdims)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduce(attrs: Attributes, x: np.ndarray, axes: Any = None, *, function: Kernel) -> np.ndarray:
    axes = attrs.get("axes", axes)
    if axes is None or len(axes) == 0:
        if attrs.get("noop_with_empty_axes", 0):
            return x
        axes = range(x.ndim)
    axis = tuple(int(a) % x.ndim for a in axes)
    return np.asarray(function(x, axis=axis, keepdims=bool(attrs.get("keepdims", 1)))).astype(x.dtype)


for _name, _function in _REDUCTIONS.items():
    kernel(_name)(functools.partial(_reduce, function=_function))


def _arg_reduce(attrs: Attributes, x: np.ndarray, *, function: Kernel) -> np.ndarray:
    axis = attrs.get("axis", 0) % x.ndim
    if attrs.get("select_last_index", 0):
        index = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
    else:
        index = function(x, axis=axis)
    return (np.expand_dims(index, axis) if attrs.get("keepdims", 1) else np.asarray(index)).astype(np.int64)


kernel("ArgMax")(functools.partial(_arg_reduce, function=np.argmax))
kernel("ArgMin")(functools.partial(_arg_reduce, function=np.argmin))


@kernel("TopK")
def _top_k(attrs: Attributes, x: np.ndarray, k: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k largest (smallest) along an axis in order, the lower index first on ties."""
    axis, count = attrs.get("axis", -1) % x.ndim, int(attrs["k"] if k is None else k.reshape(-1)[0])
    if attrs.get("largest", 1):  # a stable descending sort is an ascending one of the reversed array, reversed
        index = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        index = np.argsort(x, axis, kind="stable")
    index = np.take(index, range(count), axis)
    return np.take_along_axis(x, index, axis), index.astype(np.int64)


@kernel("CumSum")
def _cum_sum(attrs: Attributes, x: np.ndarray, axis: np.ndarray) -> np.ndarray:
    axis_ = int(axis.reshape(-1)[0])
    y = np.flip(x, axis_) if attrs.get("reverse", 0) else x
    total = np.cumsum(y, axis_).astype(x.dtype)
    if attrs.get("exclusive", 0):
        total = total - y
    return np.flip(total, axis_) if attrs.get("reverse", 0) else total
