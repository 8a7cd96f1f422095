"""Gather, scatter, one-hot and non-zero."""

from __future__ import annotations

import numpy as np

from onnxcrp.evaluate.registry import Attributes, kernel


@kernel("Gather")
def _gather(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.take(x, indices, attrs.get("axis", 0))


@kernel("GatherElements")
def _gather_elements(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return x[_along_axis(x, indices, attrs.get("axis", 0))]


@kernel("GatherND")
def _gather_nd(attrs: Attributes, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    batch = attrs.get("batch_dims", 0)
    lead = indices.shape[:batch]
    x = x.reshape(-1, *x.shape[batch:])
    flat = indices.reshape(x.shape[0], -1, indices.shape[-1])
    rows = np.arange(x.shape[0])[:, None]
    picked = x[(rows, *np.moveaxis(flat, -1, 0))]
    return picked.reshape(*lead, *indices.shape[batch:-1], *picked.shape[2:])


def _along_axis(x: np.ndarray, indices: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """Indices [..., m, ...] -> an index tuple into x; the other axes may be shorter than those of x."""
    axis %= x.ndim
    index = [np.arange(n).reshape([-1 if i == j else 1 for j in range(x.ndim)]) for i, n in enumerate(indices.shape)]
    index[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return tuple(index)


def _scatter(y: np.ndarray, index: tuple[np.ndarray, ...], updates: np.ndarray, reduction: str) -> np.ndarray:
    y = y.copy()
    if reduction == "none":
        y[index] = updates
    else:
        {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction].at(y, index, updates)
    return y


@kernel("ScatterElements", "Scatter")
def _scatter_elements(attrs: Attributes, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    index = _along_axis(x, indices, attrs.get("axis", 0))
    return _scatter(x, index, updates, attrs.get("reduction", "none"))


@kernel("ScatterND")
def _scatter_nd(attrs: Attributes, x: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    return _scatter(x, tuple(np.moveaxis(indices, -1, 0)), updates, attrs.get("reduction", "none"))


@kernel("OneHot")
def _one_hot(attrs: Attributes, indices: np.ndarray, depth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An index outside [-depth, depth) gives a row of the off value."""
    n = int(depth.reshape(-1)[0])
    axis = attrs.get("axis", -1) % (indices.ndim + 1)
    position = np.expand_dims(np.where(indices < 0, indices + n, indices), axis)
    columns = np.arange(n).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return np.where(position == columns, values[1], values[0])


@kernel("NonZero")
def _non_zero(attrs: Attributes, x: np.ndarray) -> np.ndarray:
    return np.stack(np.nonzero(x)).astype(np.int64)
