"""Samples as arrays: what a model takes, and what would be misread is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcrp.device import DeviceArray, on_host, taken
from onnxcrp.errors import InputError


def check_array(name: str, value: Any, kind: np.dtype, shape: tuple[int | str | None, ...]) -> np.ndarray:
    """One input as the model takes it; raises InputError for what would be misread."""
    try:
        array = np.asarray(on_host(name, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"input {name}: not an array: {str(error).splitlines()[0]}") from error
    if array.dtype == object:
        raise InputError(f"input {name}: not an array of numbers", hint=f"expected {kind}")
    if array.dtype != kind:
        array = _cast(name, array, kind)
    _check_shape(name, array, shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = ~np.isfinite(array)
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise InputError(f"input {name} holds {int(bad.sum())} values that are NaN or infinite, the first at {where}")
    return np.ascontiguousarray(array)


def check_device_array(name: str, value: Any, kind: np.dtype, shape: tuple[int | str | None, ...]) -> DeviceArray:
    """One input that stays where it is; raises InputError for another type or shape, values are not looked at."""
    array = taken(name, value)
    if array.dtype != kind:
        raise InputError(f"input {name} is {array.dtype}, expected {kind}", hint="arrays on a device are not converted")
    _check_shape(name, array, shape)
    return array


def _check_shape(name: str, array: np.ndarray | DeviceArray, shape: tuple[int | str | None, ...]) -> None:
    if array.ndim != len(shape):
        hint = "the batch axis is missing: x[None]" if array.ndim == len(shape) - 1 else None
    elif any(isinstance(want, int) and have != want for have, want in zip(array.shape[1:], shape[1:], strict=True)):
        hint = _layout_hint(array.shape, shape)
    else:
        return
    expected = ", ".join("B" if not at and not isinstance(d, int) else str(d) for at, d in enumerate(shape))
    raise InputError(f"input {name} has shape {list(array.shape)}, expected [{expected}]", hint=hint)


def _cast(name: str, array: np.ndarray, kind: np.dtype) -> np.ndarray:
    have = array.dtype
    if kind.kind == "f" and have.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(kind)
    if kind.kind in "iu" and have.kind in "iu":
        limits = np.iinfo(kind)
        if array.size == 0 or (array.min() >= limits.min and array.max() <= limits.max):
            return array.astype(kind)
        raise InputError(
            f"input {name} holds {array.min()}..{array.max()}, {kind} goes from {limits.min} to {limits.max}"
        )
    hint = f"x.astype(np.{kind}) if the values are right as they are"
    if kind.kind == "f" and have == np.uint8:
        hint = "these look like raw pixels: scale and normalize them as in training, then x.astype(np.float32)"
    elif kind == np.uint8:
        hint = "the model takes pixels 0..255 as they are, not normalized"
    raise InputError(f"input {name} is {have}, expected {kind}", hint=hint)


def _layout_hint(have: Sequence[int], want: Sequence[Any]) -> str | None:
    """Channels last where they should be first, or the other way round."""
    if len(have) < 3:
        return None
    for order, moved in (("0, -1, 1", (have[0], have[-1], *have[1:-1])), ("0, 2, 1", (have[0], *have[2:], have[1]))):
        if all(not isinstance(w, int) or h == w for h, w in zip(moved[1:], want[1:], strict=True)):
            first = "first" if order == "0, -1, 1" else "last"
            source = "-1, 1" if first == "first" else "1, -1"
            return f"the model wants channels {first}: np.moveaxis(x, {source})"
    return None
