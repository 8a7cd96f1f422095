"""What an index keeps, as accumulators that do not mind in which order, or in how many parts, samples come.

The k best rows of every concept are ordered by (score, sample, target), counts and histograms are integers, and means
and variances come from exact fixed-point sums. So `merge` is associative and commutative to the last bit, and memory
does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from onnxcrp.errors import OnnxcrpError

EMPTY = np.uint64(2**64 - 1)  # a key behind all others
CHUNK = 32  # rows of one class that are inserted at once
TOP_OF_CLASS = 10  # rows kept for every class: the mean of the 10 highest says which classes a concept serves
ALL = 0  # the "class" of lists over all classes

Criterion = tuple[str, str]  # ("relmax" | "actmax", "sum" | "max")
RELMAX_SUM: Criterion = ("relmax", "sum")


def encode(score: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Keys that sort by descending score, then ascending sample: float32 and uint32 -> uint64, broadcast."""
    bits = (np.asarray(score, np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ascending = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(1 << 31))
    return (~ascending).astype(np.uint64) << np.uint64(32) | np.asarray(sample).astype(np.uint64)


def decode(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `encode`: (score float32, sample int32)."""
    ascending = ~(key >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ascending >> 31 != 0, ascending & np.uint32(2**31 - 1), ~ascending)
    return bits.view(np.float32), (key & np.uint64(0xFFFFFFFF)).astype(np.int32)


@dataclass(frozen=True)
class Layout:
    """What is kept: layers with their numbers of concepts, criteria with aggregates, and how many of each."""

    layers: Mapping[str, int]
    criteria: tuple[Criterion, ...]
    k: int
    normalize: bool

    @property
    def edges(self) -> np.ndarray:
        """Histogram edges, inner ones only: bin 0 lies below the first, the last bin above the last.

        Powers of 10 in quarters, on both sides of 0: scores are shares up to 1 where normalized, else anything.
        """
        low, high = (-6, 0) if self.normalize else (-4, 6)
        positive = 10.0 ** (np.arange(4 * low, 4 * high + 1) / 4)
        return np.concatenate([-positive[::-1], positive])


class Rows(NamedTuple):
    """Scores of some rows, a row being a sample under a target, for one layer and criterion."""

    score: dict[str, np.ndarray]  # aggregate -> float32 [n, C]
    position: np.ndarray  # int32 [n, C]
    sample: np.ndarray  # int64 [n]
    target: np.ndarray  # int32 [n]


# --------------------------------------------------------------------------------------------------------------- lists


class Lists:
    """The k best rows of every (class, channel), for the channels that `chosen` names for a class (None: all).

    One array row per pair; pairs of a class are neighbours, classes stand in the order in which they were first met.
    Rows are as wide as the longest list has needed so far, at most k.
    """

    def __init__(self, channels: int, k: int, *, targets: bool, chosen: Mapping[int, np.ndarray] | None = None):
        self.channels, self.k, self.chosen = channels, k, chosen
        self.targets = targets  # a sample may come several times, under different targets, which are kept
        self.span: dict[int, slice] = {}
        self.channel = np.empty(0, np.int32)  # [pairs]
        self.key = np.empty((0, 1), np.uint64)  # [pairs, width] ascending: the best first, EMPTY behind the last
        self.position = np.empty((0, 1), np.int32)
        self.target = np.empty((0, int(targets)), np.int32)
        self.used = 0

    def channels_of(self, cls: int) -> np.ndarray:
        """The channels that keep a list for a class."""
        if self.chosen is None:
            return np.arange(self.channels, dtype=np.int32)
        return self.chosen.get(cls, np.empty(0, np.int32))

    def span_of(self, cls: int) -> slice:
        """Where the lists of a class stand; made if it is new."""
        if cls not in self.span:
            channels = self.channels_of(cls)
            start, stop = self.used, self.used + len(channels)
            if stop > len(self.key):
                self._resize(max(stop, len(self.key) * 3 // 2), self.key.shape[1])
            self.channel[start:stop] = channels
            self.used = stop
            self.span[cls] = slice(start, stop)
        return self.span[cls]

    def _resize(self, size: int, width: int) -> None:
        """Room for `size` lists of `width` entries; never less than there is."""
        rows, columns = size - len(self.key), width - self.key.shape[1]
        self.channel = np.pad(self.channel, (0, rows))
        self.key = np.pad(self.key, ((0, rows), (0, columns)), constant_values=EMPTY)
        self.position = np.pad(self.position, ((0, rows), (0, columns)))
        self.target = np.pad(self.target, ((0, rows), (0, columns if self.targets else 0)))

    def _widen(self, need: int) -> None:
        """Room for lists of `need` entries, with some to spare."""
        if need > self.key.shape[1]:
            self._resize(len(self.key), min(self.k, max(need, 2 * self.key.shape[1])))

    def add(self, key: np.ndarray, position: np.ndarray, target: np.ndarray, classes: np.ndarray | None = None) -> None:
        """Rows [n, C] of keys and positions, their targets and classes [n] (None: all are of class ALL)."""
        n = len(key)
        if classes is None:
            groups, step = [(ALL, np.arange(n))], max(n, 1)
        else:
            order = np.argsort(classes, kind="stable")
            found, first = np.unique(classes[order], return_index=True)
            groups = [(int(c), rows) for c, rows in zip(found, np.split(order, first[1:]), strict=True)]
            step = CHUNK
        padded = np.concatenate([key, np.full((1, key.shape[1]), EMPTY)])  # row n stands for none
        places = np.concatenate([position, np.zeros((1, key.shape[1]), np.int32)])
        targets = np.concatenate([target, np.zeros(1, np.int32)])
        for at in range(0, max((len(rows) for _, rows in groups), default=0), step):
            now = [(self.span_of(cls), rows[at : at + step]) for cls, rows in groups if len(rows) > at]
            width = max(len(rows) for _, rows in now)
            which = np.full((len(now), width), n)
            for line, (_, members) in enumerate(now):
                which[line, : len(members)] = members
            sizes = [span.stop - span.start for span, _ in now]
            pairs = np.concatenate([np.arange(span.start, span.stop) for span, _ in now])
            owner = np.repeat(np.arange(len(now)), sizes)
            channel = self.channel[pairs][:, None]
            keys = padded[which[owner], channel]
            best = keys.min(axis=1)
            worst = self.key[pairs, -1] if self.key.shape[1] == self.k else EMPTY
            better = best <= worst if self.targets else best < worst  # of equal keys the smaller target stays
            keys, chosen = _foremost(keys[better], which[owner[better]], np.broadcast_to(worst, best.shape)[better])
            columns = (places[chosen, channel[better]], targets[chosen])
            self._insert(pairs[better], keys, columns[0], columns[1] if self.targets else None)

    def _insert(self, pairs: np.ndarray, key: np.ndarray, position: np.ndarray, target: np.ndarray | None) -> None:
        """Candidates [pairs, m] into the lists of these pairs (each once)."""
        if not len(pairs):
            return
        key = np.concatenate([self.key[pairs], key], axis=1)
        position = np.concatenate([self.position[pairs], position], axis=1)
        if target is None:
            order = np.argsort(key, axis=1)
        else:
            target = np.concatenate([self.target[pairs], target], axis=1)
            order = np.lexsort((target, key), axis=1)
        need = min(self.k, int((key != EMPTY).sum(axis=1).max()))
        self._widen(need)
        order = order[:, :need]
        self.key[pairs, :need] = np.take_along_axis(key, order, 1)
        self.position[pairs, :need] = np.take_along_axis(position, order, 1)
        if target is not None:
            self.target[pairs, :need] = np.take_along_axis(target, order, 1)

    def merge(self, other: Lists) -> None:
        """Take in the lists of another; channels that this one keeps no list for are left out."""
        for cls, span in other.span.items():
            mine = self.span_of(cls)
            at = np.searchsorted(self.channel[mine], other.channel[span])  # channels of a class ascend
            at = np.minimum(at, max(mine.stop - mine.start - 1, 0))
            known = self.channel[mine][at] == other.channel[span] if mine.stop > mine.start else np.zeros(0, bool)
            theirs = np.arange(span.start, span.stop)[: len(known)][known]
            pairs = mine.start + at[: len(known)][known]
            target = other.target[theirs] if self.targets else None
            self._insert(pairs, other.key[theirs], other.position[theirs], target)

    def put(self, cls: np.ndarray, channel: np.ndarray, rank: np.ndarray, *columns: np.ndarray) -> None:
        """Fill empty lists from table rows: (class, channel, rank) -> key, position (and target)."""
        pairs = np.empty(len(cls), np.int64)
        order = np.argsort(cls, kind="stable")
        found, first = np.unique(cls[order], return_index=True)
        for each, rows in zip(found, np.split(order, first[1:]), strict=True):
            span = self.span_of(int(each))
            pairs[rows] = span.start + np.searchsorted(self.channel[span], channel[rows])
        self._widen(int(rank.max(initial=0)) + 1)
        self.key[pairs, rank], self.position[pairs, rank] = columns[:2]
        if self.targets:
            self.target[pairs, rank] = columns[2]

    def renumber(self, offset: np.ndarray) -> None:
        """Give samples new numbers, offset[old]; their order must stay."""
        score, sample = decode(self.key)
        full = self.key != EMPTY
        self.key[full] = encode(score[full], offset[sample[full]])


def _foremost(keys: np.ndarray, rows: np.ndarray, worst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of candidates [pairs, n] as many columns as hold all that may enter lists that end with `worst` [pairs]."""
    most = int((keys <= worst[:, None]).sum(axis=1).max(initial=0))
    if 2 * most > keys.shape[1] or not most:
        return keys, rows
    first = np.argpartition(keys, most - 1, axis=1)[:, :most]
    return np.take_along_axis(keys, first, 1), np.take_along_axis(rows, first, 1)


# ------------------------------------------------------------------------------------------------------------- moments


class Moments:
    """Count, sum and sum of squares per (class, channel), exact: fixed-point numbers in two 64-bit halves.

    A score x counts as the multiple of 2^-60 next to it (2^-38 where scores are not normalized), so that the sum of
    many depends on no order.
    """

    def __init__(self, channels: int, *, normalize: bool) -> None:
        self.channels = channels
        self.high = 2.0**30 if normalize else 2.0**8
        self.low = 2.0**30
        self.slot: dict[int, int] = {}
        self.sums = np.zeros((0, 4, channels), np.int64)  # sum high, low, squares high, low
        self.room = 0.0  # of 2^63 that the largest sum may have taken

    def slots(self, classes: Iterable[int]) -> np.ndarray:
        """Where classes stand; new ones are appended."""
        for cls in classes:
            self.slot.setdefault(int(cls), len(self.slot))
        if len(self.slot) > len(self.sums):
            size = max(len(self.slot), len(self.sums) * 3 // 2)
            self.sums = np.concatenate([self.sums, np.zeros((size - len(self.sums), 4, self.channels), np.int64)])
        return np.array([self.slot[int(cls)] for cls in classes], np.int64)

    def add(self, score: np.ndarray, classes: np.ndarray) -> None:
        """Scores [n, C] of rows of these classes [n]."""
        if not len(score):
            return
        order = np.argsort(classes, kind="stable")
        found, first = np.unique(classes[order], return_index=True)
        x = score[order].astype(np.float64)
        largest = float(np.abs(x).max())
        self.room += len(x) * max(largest, largest**2) * self.high / 2.0**62
        if self.room > 1:
            raise OnnxcrpError(
                f"scores up to {largest:.3g} are too large for exact statistics",
                hint="normalize=True; or is the composite unstable on this model?",
            )
        at = self.slots(found)
        for half, values in ((0, x), (2, x * x)):
            scaled = values * self.high
            whole = np.rint(scaled)
            rest = np.rint((scaled - whole) * self.low)
            self.sums[at, half] += np.add.reduceat(whole.astype(np.int64), first, axis=0)
            self.sums[at, half + 1] += np.add.reduceat(rest.astype(np.int64), first, axis=0)

    def merge(self, other: Moments) -> None:
        """Add the sums of another."""
        classes = list(other.slot)
        at = self.slots(classes)  # first: it may make room
        self.sums[at] += other.sums[: len(classes)]
        self.room += other.room

    def mean_and_variance(self, cls: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Float64 [C] each; the variance of the rows themselves (divided by their number)."""
        sums = self.sums[self.slot[cls]].astype(np.float64)
        mean = (sums[0] / self.high + sums[1] / (self.high * self.low)) / count
        square = (sums[2] / self.high + sums[3] / (self.high * self.low)) / count
        return mean, np.maximum(square - mean * mean, 0.0)


# --------------------------------------------------------------------------------------------------------------- state


class LayerState:
    """The accumulators of one layer.

    `served`: {class: channels} whose lists per class are kept in full, None for all. Where it is given, or k is less
    than 10, every pair also keeps its 10 best rows (RelMax, sum).
    """

    def __init__(self, channels: int, layout: Layout, served: Mapping[int, np.ndarray] | None) -> None:
        k = layout.k
        self.channels = channels
        self.top = {criterion: Lists(channels, k, targets=True) for criterion in layout.criteria}
        self.of_class = {criterion: Lists(channels, k, targets=False, chosen=served) for criterion in layout.criteria}
        short = (served is not None or k < TOP_OF_CLASS) and RELMAX_SUM in layout.criteria
        self.brief = Lists(channels, TOP_OF_CLASS, targets=False) if short else None
        self.moments = Moments(channels, normalize=layout.normalize)
        self.histogram = {c: np.zeros((channels, len(layout.edges) + 1), np.int64) for c in layout.criteria}
        for each in self.top.values():
            each.span_of(ALL)

    def add(self, criterion: str, rows: Rows, edges: np.ndarray) -> None:
        """Rows of relevance (`relmax`) or of activation (`actmax`)."""
        for aggregate, score in rows.score.items():
            name = (criterion, aggregate)
            if name == RELMAX_SUM:
                self.moments.add(score, rows.target)
            if name not in self.top:
                continue
            key = encode(score, rows.sample[:, None])
            self.top[name].add(key, rows.position, rows.target)
            self.of_class[name].add(key, rows.position, rows.target, rows.target)
            if name == RELMAX_SUM and self.brief is not None:
                self.brief.add(key, rows.position, rows.target, rows.target)
            bins = self.histogram[name].shape[1]
            flat = np.searchsorted(edges, score, side="right") + np.arange(self.channels) * bins
            self.histogram[name] += np.bincount(flat.ravel(), minlength=self.channels * bins).reshape(-1, bins)

    def merge(self, other: LayerState) -> None:
        """Take in another state of the same layer and layout."""
        for name in self.top:
            self.top[name].merge(other.top[name])
            self.of_class[name].merge(other.of_class[name])
        if self.brief is not None:
            self.brief.merge(other.of_class[RELMAX_SUM] if other.brief is None else other.brief)
        self.moments.merge(other.moments)
        for name, counts in other.histogram.items():
            self.histogram[name] += counts

    def class_scores(self, cls: int) -> np.ndarray:
        """Mean of the 10 highest scores (RelMax, sum) of every channel in a class, float64 [C]."""
        lists = self.of_class[RELMAX_SUM] if self.brief is None else self.brief
        score, _ = decode(lists.key[lists.span[cls], :TOP_OF_CLASS])
        full = lists.key[lists.span[cls], :TOP_OF_CLASS] != EMPTY
        return np.where(full, score.astype(np.float64), 0).sum(axis=1) / np.maximum(full.sum(axis=1), 1)


@dataclass
class State:
    """All accumulators, and which samples they have seen."""

    layout: Layout
    served: dict[str, dict[int, np.ndarray]] | None = None  # layer -> class -> channels with lists in full; None: all
    layers: dict[str, LayerState] = field(init=False)
    rows: dict[int, int] = field(default_factory=dict)  # class -> rows of relevance
    skipped: dict[int, str] = field(default_factory=dict)  # sample -> why
    samples: int = 0  # read, those skipped not counted
    negative: int = 0  # rows whose explained output is below zero, so that all signs are inverted
    done: dict[str, set[int]] = field(default_factory=dict)  # dataset -> blocks

    def __post_init__(self) -> None:
        served = self.served
        self.layers = {
            name: LayerState(channels, self.layout, None if served is None else served.get(name, {}))
            for name, channels in self.layout.layers.items()
        }

    def add(self, rows: Mapping[str, Mapping[str, Rows]], pool: Executor | None = None) -> None:
        """{criterion: {layer: rows}} of some samples; the threads of `pool` take a layer each."""
        edges = self.layout.edges

        def sort_in(name: str) -> None:
            for criterion, of_layer in rows.items():
                if name in of_layer:
                    self.layers[name].add(criterion, of_layer[name], edges)

        names = dict.fromkeys(name for of_layer in rows.values() for name in of_layer)
        for _ in (map if pool is None else pool.map)(sort_in, names):
            pass
        first = next(iter(rows.get("relmax", rows.get("actmax", {})).values()), None)
        if first is not None:
            for cls, count in zip(*np.unique(first.target, return_counts=True), strict=True):
                self.rows[int(cls)] = self.rows.get(int(cls), 0) + int(count)

    def merge(self, other: State) -> State:
        """A state as if it had seen the samples of both; raises OnnxcrpError if a block is in both."""
        for name, blocks in other.done.items():
            if twice := blocks & self.done.get(name, set()):
                raise OnnxcrpError(
                    f"both parts hold samples of {name} (block {min(twice)})", hint="each shard may be merged once"
                )
        merged = self
        if not _same_choice(self.served, other.served):
            merged = State(self.layout, _common(self, other))
            merged._take(self)
        merged._take(other)
        return merged

    def _take(self, other: State) -> None:
        for name, layer in other.layers.items():
            self.layers[name].merge(layer)
        for cls, count in other.rows.items():
            self.rows[cls] = self.rows.get(cls, 0) + count
        self.skipped |= other.skipped
        self.samples += other.samples
        self.negative += other.negative
        for name, blocks in other.done.items():
            self.done[name] = self.done.get(name, set()) | blocks

    def renumber(self, offset: np.ndarray) -> None:
        """Give samples new numbers, offset[old]; their order must stay."""
        for layer in self.layers.values():
            brief = [] if layer.brief is None else [layer.brief]
            for lists in (*layer.top.values(), *layer.of_class.values(), *brief):
                lists.renumber(offset)
        self.skipped = {int(offset[sample]): reason for sample, reason in self.skipped.items()}

    def serves_most(self, classes: int) -> dict[str, dict[int, np.ndarray]]:
        """layer -> class -> the channels for which it is among the `classes` they serve most (mean of the highest)."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for name, layer in self.layers.items():
            seen = sorted(self.rows)
            scores = np.stack([layer.class_scores(cls) for cls in seen])  # [classes, C]
            best = np.argsort(-scores, axis=0, kind="stable")[:classes]
            of_class: dict[int, np.ndarray] = {}
            for at, cls in enumerate(seen):
                channels = np.flatnonzero((best == at).any(axis=0)).astype(np.int32)
                if len(channels):
                    of_class[cls] = channels
            found[name] = of_class
        return found


def _same_choice(one: dict | None, other: dict | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        one[n].keys() == other[n].keys() and all(np.array_equal(one[n][c], other[n][c]) for c in one[n]) for n in one
    )


def _common(one: State, other: State) -> dict[str, dict[int, np.ndarray]]:
    """The pairs whose lists are complete in both: kept there, or of a class that was never met there."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, channels in one.layout.layers.items():
        of_class: dict[int, np.ndarray] = {}
        for cls in sorted({*one.rows, *other.rows}):
            kept = np.ones(channels, bool)
            for state in (one, other):
                if cls in state.rows and state.served is not None:
                    here = np.zeros(channels, bool)
                    here[state.served[name].get(cls, np.empty(0, np.int32))] = True
                    kept &= here
            if kept.any():
                of_class[cls] = np.flatnonzero(kept).astype(np.int32)
        found[name] = of_class
    return found


def ranges(blocks: Iterable[int]) -> list[list[int]]:
    """Block numbers as [start, stop) ranges."""
    found: list[list[int]] = []
    for block in sorted(blocks):
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return found


def from_ranges(found: Sequence[Sequence[int]]) -> set[int]:
    """The inverse of `ranges`."""
    return {block for start, stop in found for block in range(start, stop)}
