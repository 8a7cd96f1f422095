"""Concepts, conditions and targets: what a question says -> the arrays that a relevance model takes.

A condition is `{layer: concepts}`: within a layer the concepts are alternatives, across layers all must hold. Concepts
become a mask at the layer's own rank, [1, C, 1, 1] for channels, that multiplies the relevance there. The key "y"
holds a target of the condition's own. A target becomes weights on the entries of the explained output.

On the command line (`parse_condition`, `parse_target`):

    LAYER=3,7   LAYER=3*0.5,7*2   LAYER=            channels, weighted channels, nothing at all
    LAYER@pos=y:x   LAYER@token=5   LAYER@head=3    positions ([N, C, H, W]; x alone in 1-D), tokens, attention heads
    LAYER=3@pos=4:5,4:6                             both: channel 3 at two positions
    A=3+B=7,9                                       joined into one condition
    y=208+A=3                                       with its own target: y=208, y=1234,1, y=207-281 or y=top

Layer names may hold dots, slashes, `#`, and even `=`, `+` or `@`: a name ends where a concept that can be read follows,
and a concept ends at `+` or at the end. Only a name that itself looks like `LAYER=3+...` must be given from Python.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcrp.errors import QuestionError

Shape = Sequence[int | str | None]
TARGET = "y"  # the key of a condition that holds its own target


@dataclass(frozen=True)
class Selection:
    """Concepts as the command line writes them: weighted channels, and places that they are limited to."""

    channels: tuple[tuple[int, float], ...] | None = None  # None: all of them
    places: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()  # ("pos", ((4, 5), (4, 6)))

    def __str__(self) -> str:
        channels = ""
        if self.channels is not None:
            channels = "=" + ",".join(f"{c}" if w == 1 else f"{c}*{w:g}" for c, w in self.channels)
        return channels + "".join(
            f"@{kind}={','.join(':'.join(map(str, entry)) for entry in entries)}" for kind, entries in self.places
        )


# --- concepts -> mask -------------------------------------------------------------------------------------------------


def mask(concepts: Any, *, layer: str, shape: Shape, axis: int, heads: bool = False) -> np.ndarray:
    """Mask of a layer with output `shape` and concept axis `axis`: float32 [1, C, 1, ...], or as large as it must be.

    `heads`: whether axis 1 of [B, heads, T, d] are attention heads.

    `concepts`: a channel, a list of them, `{channel: weight}`, a Selection, or an array: of the layer's rank, without
    its batch axis, or one weight per channel. Axis 0 is 1, or B for a mask of its own for every sample.
    Raises QuestionError naming the layer and what it has.
    """
    rank, count = len(shape), shape[axis]
    if type(concepts) is int and isinstance(count, int) and 0 <= concepts < count:  # most questions, by far
        return _one_channel(concepts, count, axis, rank)
    if isinstance(concepts, Selection):
        keep = np.ones((1,) * rank, np.float32)
        if concepts.channels is not None:
            keep = _channels(dict(concepts.channels), layer, shape, axis)
        for kind, entries in concepts.places:
            keep = keep * _places(kind, entries, layer, shape, axis, heads)
        return keep
    if isinstance(concepts, Mapping):
        return _channels(concepts, layer, shape, axis)
    if isinstance(concepts, (set, frozenset, range)):
        concepts = sorted(concepts)
    if isinstance(concepts, (list, tuple)) and len(concepts) == 0:
        return _channels({}, layer, shape, axis)
    if concepts is None or isinstance(concepts, (str, bytes)):
        raise QuestionError(
            f"layer {layer}: concepts must be channels, weights or an array, got {concepts!r}",
            hint=f'{{"{layer}": [3, 7]}}, {{"{layer}": {{3: 0.5}}}} or an array',
        )
    array = _array(concepts, f"layer {layer}: concepts")
    listed = isinstance(concepts, (list, tuple))
    if array.dtype.kind in "iu" and array.ndim <= 1:
        return _channels({int(c): 1.0 for c in np.atleast_1d(array)}, layer, shape, axis)
    if listed and array.ndim <= 1:
        raise QuestionError(
            f"layer {layer}: a list names channels by whole numbers, got {_short(concepts)}",
            hint=f'weights are {{"{layer}": {{3: 0.5}}}} or a numpy array',
        )
    return _from_array(array, layer, shape, axis)


@functools.lru_cache(maxsize=1024)
def _one_channel(channel: int, count: int, axis: int, rank: int) -> np.ndarray:
    """Ones at one channel; the same array for all who ask, so nobody may write to it."""
    keep = np.zeros([count if at == axis else 1 for at in range(rank)], np.float32)
    keep.reshape(-1)[channel] = 1
    keep.setflags(write=False)
    return keep


def _channels(weights: Mapping[Any, Any], layer: str, shape: Shape, axis: int) -> np.ndarray:
    count = shape[axis]
    if not isinstance(count, int):
        raise QuestionError(
            f"layer {layer}: the number of its channels is not known before the model runs",
            hint=f"give a mask array of rank {len(shape)}",
        )
    keep = np.zeros(count, np.float32)
    for channel, weight in weights.items():
        if isinstance(channel, (bool, np.bool_)) or not isinstance(channel, (int, np.integer)):
            raise QuestionError(
                f"layer {layer}: channels are whole numbers, got {channel!r}", hint=f'{{"{layer}": [3, 7]}}'
            )
        if not 0 <= channel < count:
            raise QuestionError(
                f"layer {layer}: channel {channel} is out of range, it has {count} channels, 0..{count - 1}",
                hint="channels count from 0",
            )
        keep[channel] = _weight(weight, f"layer {layer}: the weight of channel {channel}")
    return keep.reshape([count if at == axis else 1 for at in range(len(shape))])


def concepts(shape: Shape, axis: int, *, dense: bool, heads: bool) -> dict[str, list[int | None]]:
    """What a layer with output `shape` can be asked about by number: {kind: how many}, the concepts first.

    {"channels": [64], "positions": [7, 7]}; {"features": [32], "tokens": [9]}, "neurons" where a `dense` layer made
    them; {"features": [8], "heads": [4]} inside attention.
    """
    rank, sizes = len(shape), [d if isinstance(d, int) else None for d in shape]
    if rank < 2:
        return {}
    last = axis % rank == rank - 1 and rank > 2
    others = [at for at in range(1, rank) if at != axis % rank]
    found = {"neurons" if dense else "features" if last or rank == 2 else "channels": [sizes[axis]]}
    if heads:
        return found | {"heads": [sizes[1]]}
    if others:
        found["tokens" if last and len(others) == 1 else "positions"] = [sizes[at] for at in others]
    return found


def _places(
    kind: str, entries: Sequence[tuple[int, ...]], layer: str, shape: Shape, axis: int, heads: bool
) -> np.ndarray:
    """Mask that keeps places only: 1 at each of `entries`, indices on the axes that `kind` stands for."""
    rank = len(shape)
    shown = f"layer {layer} [{', '.join(map(str, ('N', *shape[1:])))}]"
    others = [at for at in range(1, rank) if at != axis % rank]
    if kind == "pos":
        axes = others
        if not axes:
            raise QuestionError(f"{shown}: has no positions, only channels", hint=f"{layer}=3 keeps channel 3")
    elif kind == "token":
        if len(others) != 1:
            raise QuestionError(f"{shown}: has no token axis, @token needs [B, T, C]", hint="places are @pos=y:x")
        axes = others
    elif kind == "head":
        if not heads:
            raise QuestionError(
                f"{shown}: has no attention heads, @head needs [B, heads, T, d]", hint=f"{layer}=3 keeps channel 3"
            )
        axes = [1]
    else:
        raise QuestionError(f"layer {layer}: @{kind} is unknown", hint="there are @pos, @token and @head")
    size: list[int] = []
    for at in axes:
        length = shape[at]
        if not isinstance(length, int):
            raise QuestionError(
                f"{shown}: the size of axis {at} is not known before the model runs", hint="give a mask array"
            )
        size.append(length)
    keep = np.zeros(size, np.float32)
    for entry in entries:
        if len(entry) != len(axes):
            raise QuestionError(
                f"{shown}: @{kind} takes {len(axes)} number{'s'[: len(axes) > 1]}, got {':'.join(map(str, entry))}",
                hint=f"{layer}@{kind}={':'.join('0' * len(axes))}",
            )
        if any(not 0 <= index < length for index, length in zip(entry, size, strict=True)):
            limits = ":".join(f"0..{length - 1}" for length in size)
            raise QuestionError(
                f"{shown}: @{kind}={':'.join(map(str, entry))} is out of range {limits}", hint="places count from 0"
            )
        keep[entry] = 1
    return keep.reshape([size[axes.index(at)] if at in axes else 1 for at in range(rank)])


def _from_array(array: np.ndarray, layer: str, shape: Shape, axis: int) -> np.ndarray:
    rank, count = len(shape), shape[axis]
    given = array.shape
    if array.ndim == 1 and (given[0] == count or not isinstance(count, int)):
        array = array.reshape([given[0] if at == axis % rank else 1 for at in range(rank)])
    elif array.ndim == rank - 1:
        array = array[None]
    fits = array.ndim == rank and all(
        size in (1, expected) or not isinstance(expected, int)
        for size, expected in zip(array.shape[1:], shape[1:], strict=True)
    )
    if not fits or array.size == 0:
        shown = ", ".join(map(str, ("N", *shape[1:])))
        raise QuestionError(
            f"layer {layer}: a mask of shape {list(given)} does not fit [{shown}]",
            hint=f"rank {rank} with 1 or the full size on every axis"
            + (f", or {count} weights, one per channel" if isinstance(count, int) else ""),
        )
    return array.astype(np.float32)


# --- target -> weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Weights on the explained output, [1, ...] for all samples alike or [B, ...]; `labels`: what they stand for."""

    weights: np.ndarray
    labels: tuple[Any, ...]  # one or B: int, index tuple, {index: weight} or "weights"


def top_count(target: Any) -> int | None:
    """0 for "top", K for "topK", None for every other target; raises QuestionError for other words."""
    if not isinstance(target, str):
        return None
    found = re.fullmatch(r"top(\d*)", target)
    if not found or found[1].startswith("0"):
        raise QuestionError(
            f'target "{target}" is unknown',
            hint='words are "top" and "topK" with K >= 1, such as "top3"; classes are numbers, 208',
        )
    return int(found[1] or 0)


def target(question: Any, *, shape: Sequence[int], batch: int, explained: np.ndarray | None = None) -> list[Target]:
    """The targets that a question asks for: K for "topK", else one. `shape`: of the explained output less its batch.

    An index (int or tuple) counts as in numpy: one that leaves axes open means all entries there. A list or 1-D
    integer array holds one target per sample, `{index: weight}` is a weighted sum, a float array of the output's shape
    holds weights. "top" needs `explained` [B, ...] and means the largest entry of each sample.
    Raises QuestionError naming what is out of range.
    """
    count = top_count(question)
    if count is not None:
        if explained is None:
            raise ValueError("top needs the explained output")
        return _top(count, explained)
    if question is None:
        raise QuestionError("no target given", hint='a class such as target=208, or target="top"')
    if isinstance(question, (list, range)) or (
        isinstance(question, np.ndarray) and question.ndim == 1 and question.dtype.kind in "iu"
    ):
        entries = list(question)
        if len(entries) != batch:
            raise QuestionError(
                f"{len(entries)} targets for {batch} sample{'s'[: batch != 1]}",
                hint="a list holds one target per sample; (1234, 1) is an index, {281: 1, 282: 1} a sum",
            )
        single = [_single(entry, shape) for entry in entries]
        return [Target(np.stack([weights for weights, _ in single]), tuple(label for _, label in single))]
    if isinstance(question, np.ndarray) and question.ndim:
        return [_weights(question, shape, batch)]
    weights, label = _single(question, shape)
    return [Target(weights[None], (label,))]


def _single(entry: Any, shape: Sequence[int]) -> tuple[np.ndarray, Any]:
    """Weights [*shape] and label of one target of one sample."""
    weights = np.zeros(shape, np.float32)
    if isinstance(entry, Mapping):
        if not entry:
            raise QuestionError("a target without entries explains nothing", hint="{281: 1, 282: 1}")
        for index, weight in entry.items():
            weights[_index(index, shape)] += _weight(weight, f"the weight of target {index}")
        return weights, {_plain(index): float(weight) for index, weight in entry.items()}
    weights[_index(entry, shape)] = 1
    return weights, _plain(entry)


def _index(entry: Any, shape: Sequence[int]) -> tuple[int, ...]:
    parts = entry if isinstance(entry, tuple) else (entry,)
    for part in parts:
        if isinstance(part, (bool, np.bool_)) or not (
            isinstance(part, (int, np.integer))
            or (isinstance(part, np.ndarray) and not part.ndim and part.dtype.kind in "iu")
        ):
            raise QuestionError(
                f"a target is a class number or an index, got {_short(entry)}",
                hint='208, (1234, 1), {281: 1, 282: 1}, [208, 3] (one per sample), a float array of weights, "top"',
            )
    if parts == (0,) and not shape:
        return ()  # a model with a single output value per sample
    if len(parts) > len(shape) or any(not 0 <= part < size for part, size in zip(parts, shape, strict=False)):
        limits = ", ".join(f"0..{size - 1}" for size in shape) or "0"
        name = "class" if len(shape) <= 1 else "index"
        raise QuestionError(
            f"target {name} {_plain(entry)} is out of range, the explained output has {limits}",
            hint="classes count from 0" if name == "class" else f"one number for each of its {len(shape)} axes, from 0",
        )
    return tuple(int(part) for part in parts)


def _weights(array: np.ndarray, shape: Sequence[int], batch: int) -> Target:
    array = _array(array, "target weights")
    rank = len(shape)
    if array.ndim == rank and array.shape == tuple(shape):
        array = array[None]
    if array.ndim != rank + 1 or array.shape[1:] != tuple(shape) or array.shape[0] not in (1, batch):
        expected = list(shape)
        raise QuestionError(
            f"target weights of shape {list(array.shape)} do not fit the explained output {['B', *expected]}",
            hint=f"float [{', '.join(map(str, (batch, *expected)))}] or [{', '.join(map(str, expected))}]",
        )
    return Target(array.astype(np.float32), ("weights",) * len(array))


def _top(count: int, explained: np.ndarray) -> list[Target]:
    shape = explained.shape[1:]
    flat = explained.reshape(len(explained), -1)
    if count > flat.shape[1]:
        raise QuestionError(
            f'target "top{count}": the explained output has {flat.shape[1]} entries only', hint=f"top{flat.shape[1]}"
        )
    order = np.argsort(-flat, axis=1, kind="stable")
    found = []
    for place in range(max(count, 1)):
        weights = np.zeros_like(flat, np.float32)
        weights[np.arange(len(flat)), order[:, place]] = 1
        indices = [tuple(int(part) for part in np.unravel_index(at, shape)) for at in order[:, place]]
        labels = tuple(index[0] if len(index) == 1 else index if index else 0 for index in indices)
        found.append(Target(weights.reshape(explained.shape), labels))
    return found


# --- the command line -------------------------------------------------------------------------------------------------

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
_CHANNELS = rf"(?:\d+(?:\*-?{_NUMBER})?(?:,\d+(?:\*-?{_NUMBER})?)*)?"
_PLACES = r"@(?:head|token|pos)=\d+(?::\d+)*(?:,\d+(?::\d+)*)*"
_OWN = r"y=(?P<own>top|\d+(?:,\d+)*(?:-\d+(?:,\d+)*)*)"
_TERM = re.compile(
    rf"(?:{_OWN}|(?P<layer>.+?)(?<!@head)(?<!@token)(?<!@pos)(?P<concepts>=(?P<channels>{_CHANNELS})(?:{_PLACES})*|(?:{_PLACES})+))(?:\+|$)"
)


def parse_condition(text: str) -> dict[str, Any]:
    """`A=3,7+B@pos=4:5` -> {"A": Selection, "B": Selection}; the grammar is in the module's docstring.

    Raises QuestionError for what cannot be read and for a layer named twice.
    """
    condition: dict[str, Any] = {}
    at = 0
    while at < len(text) or not text:
        found = _TERM.match(text, at)
        if re.match(rf"{TARGET}(=|@(head|token|pos)=)", text[at:]) and not (found and found["own"]):
            raise QuestionError(
                f'condition "{text}": the target "{text[at:].partition("+")[0]}" cannot be read',
                hint="y=208 (class), y=1234,1 (index), y=207-281 (contrast) or y=top",
            )
        if not found or (found.end() == len(text) and text.endswith("+")):
            rest = text[at:]
            raise QuestionError(
                f'condition "{text}": cannot read "{rest}"' if rest != text else f'condition "{text}" cannot be read',
                hint="LAYER=3,7 or LAYER=3*0.5 or LAYER@pos=y:x, LAYER@token=5, LAYER@head=3, joined by +",
            )
        at = found.end()
        if found["own"] is not None:
            key, value = TARGET, parse_target(found["own"])
        else:
            key, value = found["layer"], _parse_concepts(found["channels"], found["concepts"])
        if key in condition:
            raise QuestionError(
                f'condition "{text}": layer {key} appears twice', hint=f"list its concepts together: {key}=3,7"
            )
        condition[key] = value
    return condition


def _parse_concepts(channels: str | None, text: str) -> Selection:
    weighted = None
    if channels is not None:
        pairs = [entry.partition("*") for entry in channels.split(",") if entry]
        weighted = tuple((int(channel), float(weight or 1)) for channel, _, weight in pairs)
    places = []
    for kind, entries in re.findall(r"@(head|token|pos)=([\d:,]+)", text):
        places.append((kind, tuple(tuple(map(int, entry.split(":"))) for entry in entries.split(","))))
    return Selection(weighted, tuple(places))


def parse_target(text: str) -> Any:
    """`208` -> 208, `1234,1` -> (1234, 1), `281+282*0.5` and `207-281` -> {index: weight}, `top`, `top3` as they are.

    Raises QuestionError for everything else.
    """
    text = text.replace(" ", "")
    if text.startswith("top"):
        top_count(text)
        return text
    term = rf"\d+(?:,\d+)*(?:\*{_NUMBER})?"
    if not re.fullmatch(rf"{term}(?:[+-]{term})*", text):
        raise QuestionError(
            f'target "{text}" cannot be read',
            hint="208 (class), 1234,1 (index), 281+282 (sum), 207-281 (contrast), top or top3",
        )
    weights: dict[Any, float] = {}
    for sign, entry, weight in re.findall(rf"([+-]?)(\d+(?:,\d+)*)(?:\*({_NUMBER}))?", text):
        parts = tuple(map(int, entry.split(",")))
        index = parts if len(parts) > 1 else parts[0]
        weights[index] = weights.get(index, 0.0) + float(weight or 1) * (-1 if sign == "-" else 1)
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return weights


def text(condition: Mapping[str, Any]) -> str:
    """A condition on one line, in the command line's own words: for labels and messages."""
    return "+".join(f"{layer}{_concepts_text(layer, value)}" for layer, value in condition.items())


def target_text(label: Any) -> str:
    """A target's label on one line: `208`, `1234,1`, `207-281`."""
    if isinstance(label, tuple):
        return ",".join(map(str, label))
    if not isinstance(label, Mapping):
        return str(label)
    out = ""
    for index, weight in label.items():
        factor = "" if abs(weight) == 1 else f"*{abs(weight):g}"
        out += ("-" if weight < 0 else "+" if out else "") + target_text(index) + factor
    return out


def _concepts_text(layer: str, value: Any) -> str:
    if layer == TARGET:
        return f"={target_text(value) if not isinstance(value, (list, np.ndarray)) else _short(value)}"
    if isinstance(value, Selection):
        return str(value)
    if isinstance(value, Mapping):
        return str(Selection(tuple((c, float(w)) for c, w in value.items())))
    array = np.asarray(sorted(value) if isinstance(value, (set, frozenset)) else value)
    if (array.ndim <= 1 and array.dtype.kind in "iu") or array.size == 0:
        return "=" + ",".join(map(str, np.atleast_1d(array).tolist()))
    return f"=mask{list(array.shape)}"


def to_json(condition: Mapping[str, Any]) -> dict[str, Any]:
    """A condition as plain JSON values, for result files: large masks by their shape only."""

    def plain(value: Any) -> Any:
        if isinstance(value, Selection):
            return str(value)
        if isinstance(value, Mapping):
            return {
                target_text(key) if isinstance(key, tuple) else str(key): plain(weight) for key, weight in value.items()
            }
        if isinstance(value, (set, frozenset, range)):
            return sorted(value)
        if isinstance(value, np.ndarray):
            return value.tolist() if value.size <= 64 else {"mask": list(value.shape)}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value.item() if isinstance(value, np.generic) else value

    return {layer: plain(value) for layer, value in condition.items()}


# --- small helpers ----------------------------------------------------------------------------------------------------


def _array(value: Any, what: str) -> np.ndarray:
    """A numeric array without NaN or infinity."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise QuestionError(f"{what} must be an array, got lists of different lengths") from error
    if array.dtype.kind not in "iufb":
        raise QuestionError(f"{what} must be numbers, got {_short(value)}")
    if not np.isfinite(array).all():
        raise QuestionError(f"{what} must be finite, got NaN or infinity")
    return array


def _weight(value: Any, what: str) -> float:
    if isinstance(value, (str, bytes)) or np.ndim(value):
        raise QuestionError(f"{what} must be a number, got {_short(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise QuestionError(f"{what} must be a number, got {_short(value)}") from error
    if not np.isfinite(number):
        raise QuestionError(f"{what} must be finite, got {number}")
    return number


def _plain(entry: Any) -> Any:
    return tuple(map(int, entry)) if isinstance(entry, tuple) else int(entry)


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else shown[:57] + "..."
