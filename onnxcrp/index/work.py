"""A recipe made ready: samples in batches through the relevance model into accumulators.

Samples are cut into blocks, and blocks into batches that never cross them, so that a batch holds the same samples
whatever part of the data a run is about.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from onnxcrp.errors import InputError, QuestionError
from onnxcrp.index import store
from onnxcrp.index.dataset import NO_LABEL, Data, Port, open_data
from onnxcrp.index.reduce import AGGREGATES, CRITERIA, LayerRow, Reducer, Scores, choose_layers, describe_layers
from onnxcrp.index.state import Layout, Rows, State
from onnxcrp.plugins import loaded

BLOCK = 256  # samples
FULL_CLASSES = 10  # per concept, with lists per class in full
PILOT_PER_CLASS = 4  # samples of a pilot per class, where data has more classes than FULL_CLASSES
PILOT_SHARE = 20  # or this part of all samples, if that is more
AHEAD = 3  # batches decoded ahead of the model
AT_ONCE = 1 << 20  # scores of one kind that are sorted in at once
SORTERS = 4  # threads that sort in, a layer each, so that a GPU need not wait long
AHEAD_OF_SORTING = 4  # runs, and ends of batches, per stream that the model may be ahead
BATCH_NUMBERS = 1 << 20  # inputs of a batch where no size is asked for, as numbers: 7 pictures of 224 x 224
BATCH_SIZES = (8, 64)  # within these limits, four times that on a GPU

Block = tuple[str, int]  # (dataset, number)
Loaded = tuple[int, "np.ndarray | str", int]  # sample, array or what is wrong with it, label
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Recipe:
    """Everything that a build is made of, so that any worker can start from it alone."""

    model: Any
    data: Any
    layers: Any = None
    target: str | None = None
    composite: Any = "epsilon_plus_flat"
    k: int = 40
    criteria: tuple[str, ...] = ("relmax", "actmax")
    aggregate: tuple[str, ...] = ("sum", "max")
    normalize: bool = True
    bypass: str = "cut"
    batch_size: int | None = None
    preprocess: Any = None
    labels: Any = None
    label_offset: int = 0
    full_classes: int = FULL_CLASSES
    block: int = BLOCK
    workers: int | None = None
    providers: Any = None
    threads: int | None = None
    output: str | None = None
    checkpoint: float = 60.0


class Batch(NamedTuple):
    """Decoded samples, and those that could not be: {sample: why}."""

    sample: np.ndarray
    x: np.ndarray | None
    label: np.ndarray
    failed: dict[int, str]


class Work:
    """A recipe made ready: model, data and the relevance model's session; one per process.

    Raises what Explainer, open_data and Reducer do.
    """

    def __init__(self, recipe: Recipe) -> None:
        from onnxcrp.explainer import Explainer
        from onnxcrp.preprocessing import for_model

        self.recipe = _checked(recipe)
        path = recipe.model if isinstance(recipe.model, (str, os.PathLike)) else None
        explainer = Explainer(recipe.model, recipe.composite, providers=recipe.providers, output=recipe.output)
        if len(explainer.inputs) != 1:
            raise QuestionError(f"an index needs a model with one input, this one has {', '.join(explainer.inputs)}")
        name, (dtype, shape) = next(iter(explainer.inputs.items()))
        preprocessing = for_model(recipe.preprocess, shape, dtype, path)
        if explainer.composite.missing:
            explainer = Explainer(
                explainer.canonical,
                recipe.composite,
                providers=recipe.providers,
                output=recipe.output,
                preprocessing=preprocessing,
            )
        self.explainer = explainer
        self.port = Port(preprocessing, shape, np.dtype(dtype), name)
        self.batch_size = recipe.batch_size or batch_size(shape, recipe.providers)
        self.data: Data = open_data(recipe.data, self.port, labels=recipe.labels, label_offset=recipe.label_offset)
        self.target = recipe.target or ("label" if self.data.labelled else "predicted")
        self.reducer = Reducer(
            explainer,
            choose_layers(explainer, recipe.layers),
            criteria=recipe.criteria,
            aggregate=recipe.aggregate,
            target=self.target,
            normalize=recipe.normalize,
            batch_size=self.batch_size,
            providers=recipe.providers,
            threads=recipe.threads,
        )
        self._check_data()
        self.layers: list[LayerRow] = describe_layers(explainer, self.reducer.layers, self._example())
        self.question = self._question()
        self.layout: Layout = store.layout_of(self.question, [dataclasses.asdict(row) for row in self.layers])

    def _check_data(self) -> None:
        """What would fail for every sample, said once."""
        for samples in self.data.datasets:
            if samples.has_pictures and not self.port.preprocessing.known:
                from onnxcrp.preprocessing import ASK

                raise InputError(
                    f"nothing says which values the model's {self.port.dtype} input expects for a picture", hint=ASK
                )
            if self.target != "label":
                continue
            labels = samples.labels
            if labels is None or (labels == NO_LABEL).all():
                raise InputError(
                    f"{samples.name}: the samples have no labels", hint="target predicted, or a labels.csv"
                )
            wrong = np.flatnonzero(((labels < 0) & (labels != NO_LABEL)) | (labels >= self.reducer.classes))
            if len(wrong):
                raise InputError(
                    f"{samples.name}: the label of {samples.title(int(wrong[0]))} is {labels[wrong[0]]}, "
                    f"the model has classes 0 to {self.reducer.classes - 1}",
                    hint="label_offset is added to every label",
                )

    def _example(self) -> np.ndarray:
        """The first sample that can be read; raises InputError where none of the first block's can."""
        first: InputError | None = None
        for sample in range(min(len(self.data), self.recipe.block)):
            try:
                return self.data.load(sample).x
            except InputError as error:
                first = first or error
        assert first is not None
        count = min(len(self.data), self.recipe.block)
        none = "the one sample cannot" if count == 1 else f"none of the first {count} samples can"
        raise InputError(f"{none} be read: {first.message}", hint=first.hint)

    def _question(self) -> dict[str, Any]:
        """What the numbers of an index depend on, but for the data: what may not change while it grows."""
        recipe, explainer = self.recipe, self.explainer
        plugins = sorted(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in loaded())
        return {
            "model_sha256": explainer.canonical.sha256,
            "output": explainer.facts.output,
            "explained": explainer.facts.explained,
            "composite": explainer.composite.name,
            "composite_sha256": hashlib.sha256(explainer.composite.text.encode()).hexdigest(),
            "layers": self.reducer.layers,
            "target": self.target,
            "criteria": list(recipe.criteria),
            "aggregate": list(recipe.aggregate),
            "normalize": recipe.normalize,
            "k": recipe.k,
            "full_classes": recipe.full_classes,
            "block": recipe.block,
            "preprocessing": preprocessing_json(self.port.preprocessing),
            **({"plugins": plugins} if plugins else {}),
        }

    def manifest(self, state: State, *, complete: bool) -> dict[str, Any]:
        """The manifest of an index that holds this state; see docs/index.md."""
        recipe, explainer = self.recipe, self.explainer
        served = state.served is None
        path = os.fspath(recipe.model) if isinstance(recipe.model, (str, os.PathLike)) else None
        return {
            "format": store.FORMAT,
            "complete": complete,
            "question": self.question,
            "model": {"path": path, "sha256": explainer.canonical.sha256, "classes": self.reducer.classes},
            "input": {"name": self.port.name, "dtype": str(self.port.dtype), "shape": list(self.port.shape)},
            "composite": {"name": explainer.composite.name, "text": explainer.composite.text},
            "bypass": recipe.bypass,
            "class_names": list(self.port.preprocessing.labels),
            "label_offset": self.port.preprocessing.label_offset,
            "layers": [dataclasses.asdict(row) for row in self.layers],
            "datasets": store.dataset_entries(self.data, recipe.block, state.done, recipe.label_offset),
            "edges": self.layout.edges.tolist(),
            "served": "all" if served else "listed",
            "samples": state.samples,
            "skipped": len(state.skipped),
            "negative": state.negative,
            "rows": sorted([cls, count] for cls, count in state.rows.items()),
            "batch_size": self.batch_size,
            "versions": versions(),
        }

    # --- the work -----------------------------------------------------------------------------------------------------

    def blocks(self, shard: tuple[int, int] | None = None) -> list[Block]:
        """All blocks in order, or those of one shard (number, of how many), neighbours."""
        size = self.recipe.block
        found = [(s.name, n) for s in self.data.datasets for n in range(-(-len(s) // size))]
        if shard is None:
            return found
        number, of = shard
        return found[len(found) * number // of : len(found) * (number + 1) // of]

    def samples_of(self, block: Block) -> range:
        """Sample numbers of a block."""
        name, number = block
        at = next(i for i, samples in enumerate(self.data.datasets) if samples.name == name)
        start = self.data.offsets[at] + number * self.recipe.block
        return range(start, min(start + self.recipe.block, self.data.offsets[at + 1]))

    def run(
        self, state: State, blocks: Iterable[Block], done: Callable[[Block | None, int, int], None] | None = None
    ) -> None:
        """Blocks into the state; `done(block, samples, skipped)` after each batch, with the block after its last."""

        def batches() -> Iterator[tuple[Block, range, bool]]:
            for block in blocks:
                samples = self.samples_of(block)
                for at in range(0, len(samples), self.batch_size):
                    rest = at + self.batch_size
                    yield block, samples[at:rest], rest >= len(samples)

        for (block, samples, last), failed in self._into(state, batches()):
            if last:
                state.done.setdefault(block[0], set()).add(block[1])
            if done is not None:
                done(block if last else None, len(samples), failed)

    def few_classes(self) -> bool:
        """Whether full lists for all classes take no more room than those that a pilot would choose."""
        recipe = self.recipe
        if self.reducer.classes <= recipe.full_classes:
            return True
        if self.target != "label":
            return False
        labels = np.concatenate([np.zeros(0, np.int64) if s.labels is None else s.labels for s in self.data.datasets])
        counts = np.bincount(labels[labels != NO_LABEL])
        return np.count_nonzero(counts) * min(recipe.k, counts.max(initial=0)) <= recipe.full_classes * recipe.k

    def pilot(
        self, samples: Sequence[int], done: Callable[[int, int], None] | None = None
    ) -> dict[str, dict[int, np.ndarray]]:
        """layer -> class -> channels that keep lists per class in full, from a run over some samples.

        `done(samples, skipped)` after each batch.
        """
        state = State(self.layout, {name: {} for name in self.layout.layers})
        steps = [samples[at : at + self.batch_size] for at in range(0, len(samples), self.batch_size)]
        for (_, step, _), failed in self._into(state, ((None, step, step is steps[-1]) for step in steps)):
            if done is not None:
                done(len(step), failed)
        return state.serves_most(self.recipe.full_classes)

    def pilot_samples(self) -> Sequence[int]:
        """Samples spread evenly over every class where labels tell, else over the data."""
        count = max(self.reducer.classes * PILOT_PER_CLASS, len(self.data) // PILOT_SHARE)
        if count >= len(self.data):
            return range(len(self.data))
        if self.target != "label":
            return [int(i) for i in np.linspace(0, len(self.data) - 1, count)]
        labels = np.concatenate(
            [np.full(len(s), NO_LABEL) if s.labels is None else s.labels for s in self.data.datasets]
        )
        each = -(-count // len(np.unique(labels)))
        found: list[int] = []
        for cls in np.unique(labels):
            members = np.flatnonzero(labels == cls)
            found += members[np.unique(np.linspace(0, len(members) - 1, each).astype(int))].tolist()
        return sorted(found)

    def _into(
        self, state: State, batches: Iterable[tuple[Any, Sequence[int], bool]]
    ) -> Iterator[tuple[tuple[Any, Sequence[int], bool], int]]:
        """Batches into the state, each told when it is through, with how many of its samples were skipped.

        The model is at the next batch while the rows of the last ones are sorted in: many at once, but all of them
        before an entry is told that says it is the last one of its block.
        """
        waiting: list[Mapping[str, Mapping[str, Rows]]] = []
        enough = max(1, AT_ONCE // sum(self.layout.layers.values()))
        rows = 0
        with ThreadPoolExecutor(min(SORTERS, os.cpu_count() or 1), "sort") as pool:
            for (entry, batch), scores in self._scored(batches):
                if scores is not None:
                    for sample, why in scores.bad.items():
                        if sample not in state.skipped:
                            state.skipped[sample] = why
                            state.samples -= 1
                    state.negative += scores.negative
                    waiting.append(scores.rows)
                    rows += scores.count
                if waiting and (rows >= enough or (scores is None and entry[2])):
                    state.add(_joined(waiting), pool)
                    waiting, rows = [], 0
                if scores is None:
                    state.skipped |= batch.failed
                    state.samples += len(batch.sample)
                    yield entry, len(batch.failed)

    def _scored(
        self, batches: Iterable[tuple[Any, Sequence[int], bool]]
    ) -> Iterator[tuple[tuple[tuple[Any, Sequence[int], bool], Batch], Scores | None]]:
        """What the runs of every batch found, in order, and None when it is through."""

        def runs() -> Iterator[tuple[Any, Callable[[], Scores] | None]]:
            for entry, batch in self._decoded(batches):
                if batch.x is not None:
                    for run in self.reducer.runs(batch.sample, batch.x, batch.label):
                        yield (entry, batch), run
                yield (entry, batch), None

        streams = self.reducer.streams
        with ThreadPoolExecutor(streams, "model") as pool:
            yield from in_order(pool, runs(), AHEAD_OF_SORTING * streams)

    def _decoded(self, batches: Iterable[tuple[Any, Sequence[int], bool]]) -> Iterator[tuple[Any, Batch]]:
        """Batches in order, decoded by threads ahead of their use."""
        workers = self.recipe.workers or min(8, (os.cpu_count() or 1) + 1)

        def calls() -> Iterator[tuple[tuple[Any, bool], Callable[[], list[Loaded]]]]:
            for entry in batches:
                samples = entry[1]
                size = -(-len(samples) // workers)
                for at in range(0, len(samples), size):
                    yield (entry, at + size >= len(samples)), partial(self._load, samples[at : at + size])

        found: list[Loaded] = []
        with ThreadPoolExecutor(workers, "decode") as pool:
            for (entry, last), loaded in in_order(pool, calls(), AHEAD * workers):
                found += loaded or []
                if last:
                    yield entry, self._batch(found)
                    found = []

    def _load(self, samples: Sequence[int]) -> list[Loaded]:
        found: list[Loaded] = []
        for sample in samples:
            label = self.data.label(sample)
            if self.target == "label" and label == NO_LABEL:
                found.append((sample, f"{self._name(sample)}: has no label", label))
                continue
            try:
                found.append((sample, self.data.load(sample).x, label))
            except InputError as error:
                found.append((sample, error.message, label))
        return found

    def _name(self, sample: int) -> str:
        samples, number = self.data.locate(sample)
        return f"{samples.name}/{samples.title(number)}"

    @staticmethod
    def _batch(entries: list[Loaded]) -> Batch:
        good = [(sample, x, label) for sample, x, label in entries if not isinstance(x, str)]
        failed = {sample: x for sample, x, _ in entries if isinstance(x, str)}
        if good and len({x.shape for _, x, _ in good}) > 1:
            usual = good[0][1].shape
            failed |= {
                sample: f"has shape {list(x.shape)}, expected {list(usual)}"
                for sample, x, _ in good
                if x.shape != usual
            }
            good = [entry for entry in good if entry[1].shape == usual]
        return Batch(
            np.array([sample for sample, _, _ in good], np.int64),
            np.concatenate([x for _, x, _ in good]) if good else None,
            np.array([label for _, _, label in good], np.int64),
            failed,
        )


def batch_size(shape: Sequence[int | str | None], providers: Any) -> int:
    """Samples of a run where nobody says: enough to keep the cores busy, more would only need more memory."""
    from onnxcrp.session import on_cpu

    numbers = int(np.prod([size if isinstance(size, int) else 224 for size in shape[1:]]))
    low, high = BATCH_SIZES
    size = min(max(BATCH_NUMBERS // max(numbers, 1), low), high)
    return size if on_cpu(providers) else 4 * size


def in_order(
    pool: ThreadPoolExecutor, calls: Iterable[tuple[K, Callable[[], V] | None]], ahead: int
) -> Iterator[tuple[K, V | None]]:
    """(key, result) of calls in their order, while the pool is at up to `ahead` of the next ones; None stays None."""
    waiting: deque[tuple[K, Future[V] | None]] = deque()
    try:
        for key, call in calls:
            waiting.append((key, None if call is None else pool.submit(call)))
            while len(waiting) > ahead:
                ready, future = waiting.popleft()
                yield ready, None if future is None else future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, None if future is None else future.result()
    finally:
        for _, future in waiting:
            if future is not None:
                future.cancel()


def _joined(parts: Sequence[Mapping[str, Mapping[str, Rows]]]) -> dict[str, dict[str, Rows]]:
    """Rows of several runs as one."""
    if len(parts) == 1:
        return {criterion: dict(of_layer) for criterion, of_layer in parts[0].items()}
    found: dict[str, dict[str, Rows]] = {}
    for criterion in dict.fromkeys(c for part in parts for c in part):
        several = [part[criterion] for part in parts if criterion in part]
        found[criterion] = {
            layer: Rows(
                {how: np.concatenate([s[layer].score[how] for s in several]) for how in several[0][layer].score},
                *(np.concatenate(columns) for columns in zip(*(s[layer][1:] for s in several), strict=True)),
            )
            for layer in several[0]
        }
    return found


def _checked(recipe: Recipe) -> Recipe:
    for what, given, known in (("criteria", recipe.criteria, CRITERIA), ("aggregate", recipe.aggregate, AGGREGATES)):
        if not given or any(each not in known for each in given):
            raise QuestionError(f"{what} is {', '.join(given) or 'empty'}", hint=f"one or both of {', '.join(known)}")
    for what, number in (("k", recipe.k), ("batch_size", recipe.batch_size), ("block", recipe.block)):
        if number is not None and number < 1:
            raise QuestionError(f"{what} is {number}, expected at least 1")
    if recipe.k > 10_000:
        raise QuestionError(f"k is {recipe.k}", hint="at most 10000")
    if recipe.bypass not in ("cut", "keep"):
        raise QuestionError(f"bypass is {recipe.bypass!r}", hint="cut or keep")
    return recipe


def preprocessing_json(preprocessing: Any) -> dict[str, Any]:
    """A Preprocessing as JSON holds it, without class names and file name."""
    fields = dataclasses.asdict(preprocessing)
    for name in ("labels", "source", "label_offset"):
        del fields[name]
    return json.loads(json.dumps(fields))


def versions() -> dict[str, str]:
    """Of what made an index."""
    import onnxruntime

    import onnxcrp

    pa, _ = store.pyarrow()
    return {
        "onnxcrp": onnxcrp.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }
