"""Building an index: batches of samples through one relevance model into accumulators, and now and then to the disk.

Samples are cut into blocks, and blocks into batches that never cross them, so that a batch holds the same samples
whatever part of the data a run is about. What a run has seen lies in `parts/` of the index, each part an index of some
blocks; a run that was stopped, however rudely, goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.index import store
from onnxcrp.index.dataset import NO_LABEL, Data, Port, open_data
from onnxcrp.index.reduce import AGGREGATES, CRITERIA, LayerRow, Reducer, Scores, choose_layers, describe_layers
from onnxcrp.index.state import RELMAX_SUM, Layout, Rows, State, from_ranges

BLOCK = 256  # samples
FULL_CLASSES = 10  # per concept, with lists per class in full
PILOT_PER_CLASS = 4  # samples of a pilot per class, where data has more classes than FULL_CLASSES
PILOT_SHARE = 20  # or this part of all samples, if that is more
AHEAD = 3  # batches decoded ahead of the model
AT_ONCE = 1 << 20  # scores of one kind that are sorted in at once
PARTS = "parts"
SELECTION = "served.json"

T = TypeVar("T")
Progress = Callable[[int, int, int], None]  # (samples done, samples in all, samples skipped)
Block = tuple[str, int]  # (dataset, number)


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
    batch_size: int = 32
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
        self.data: Data = open_data(recipe.data, self.port, labels=recipe.labels, label_offset=recipe.label_offset)
        self.target = recipe.target or ("label" if self.data.labelled else "predicted")
        self.reducer = Reducer(
            explainer,
            choose_layers(explainer, recipe.layers),
            criteria=recipe.criteria,
            aggregate=recipe.aggregate,
            target=self.target,
            normalize=recipe.normalize,
            batch_size=recipe.batch_size,
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
        raise InputError(f"none of the first {min(len(self.data), self.recipe.block)} samples can be read: {first}")

    def _question(self) -> dict[str, Any]:
        """What the numbers of an index depend on, but for the data: what may not change while it grows."""
        recipe, explainer = self.recipe, self.explainer
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
            "batch_size": recipe.batch_size,
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
                for at in range(0, len(samples), self.recipe.batch_size):
                    rest = at + self.recipe.batch_size
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

    def pilot(self) -> dict[str, dict[int, np.ndarray]]:
        """layer -> class -> channels that keep lists per class in full, from a run over a part of the data."""
        state = State(self.layout, {name: {} for name in self.layout.layers})
        chosen = self._pilot_samples()
        steps = [chosen[at : at + self.recipe.batch_size] for at in range(0, len(chosen), self.recipe.batch_size)]
        for _ in self._into(state, ((None, step, step is steps[-1]) for step in steps)):
            pass
        return state.serves_most(self.recipe.full_classes)

    def _pilot_samples(self) -> Sequence[int]:
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
        for entry, batch, scores in ahead(self._scored(batches)):
            if scores is not None:
                for sample, why in scores.bad.items():
                    if sample not in state.skipped:
                        state.skipped[sample] = why
                        state.samples -= 1
                state.negative += scores.negative
                waiting.append(scores.rows)
                rows += scores.count
            if waiting and (rows >= enough or (scores is None and entry[2])):
                state.add(_joined(waiting))
                waiting, rows = [], 0
            if scores is None:
                state.skipped |= batch.failed
                state.samples += len(batch.sample)
                yield entry, len(batch.failed)

    def _scored(
        self, batches: Iterable[tuple[Any, Sequence[int], bool]]
    ) -> Generator[tuple[tuple[Any, Sequence[int], bool], Batch, Scores | None], None, None]:
        """What the runs of every batch found, and None when it is through."""
        for entry, batch in self._decoded(batches):
            if batch.x is not None:
                for scores in self.reducer(batch.sample, batch.x, batch.label):
                    yield entry, batch, scores
            yield entry, batch, None

    def _decoded(self, batches: Iterable[tuple[Any, Sequence[int], bool]]) -> Iterator[tuple[Any, Batch]]:
        """Batches in order, decoded by threads ahead of their use."""
        workers = self.recipe.workers or min(8, (os.cpu_count() or 1) + 1)
        waiting: deque[tuple[Any, list[Future]]] = deque()
        with ThreadPoolExecutor(workers, "decode") as pool:
            try:
                for entry in batches:
                    samples = entry[1]
                    size = -(-len(samples) // workers)
                    parts = [samples[at : at + size] for at in range(0, len(samples), size)]
                    waiting.append((entry, [pool.submit(self._load, part) for part in parts]))
                    if len(waiting) >= AHEAD:
                        ready, futures = waiting.popleft()
                        yield ready, self._batch([f.result() for f in futures])
                while waiting:
                    ready, futures = waiting.popleft()
                    yield ready, self._batch([f.result() for f in futures])
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, samples: Sequence[int]) -> list[tuple[int, np.ndarray | str, int]]:
        """(sample, array or what is wrong with it, label)."""
        found: list[tuple[int, np.ndarray | str, int]] = []
        for sample in samples:
            label = self.data.label(sample)
            if self.target == "label" and label == NO_LABEL:
                found.append((sample, f"{self._name(sample)}: has no label", label))
                continue
            try:
                found.append((sample, self.data.load(sample).x, label))
            except InputError as error:
                found.append((sample, f"{self._name(sample)}: {error.message}", label))
        return found

    def _name(self, sample: int) -> str:
        samples, number = self.data.locate(sample)
        return f"{samples.name}/{samples.title(number)}"

    @staticmethod
    def _batch(parts: list[list[tuple[int, np.ndarray | str, int]]]) -> Batch:
        entries = [entry for part in parts for entry in part]
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


def ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """Items in their order, each made by a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        try:
            coming: Future[Any] = pool.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = pool.submit(next, items, end)
                yield item
        finally:
            pool.shutdown()
            items.close()


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
        if number < 1:
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


# --------------------------------------------------------------------------------------------------------------- build


def build(
    model: Any,
    data: Any,
    out: str | os.PathLike[str],
    *,
    engine: str = "local",
    shard: tuple[int, int] | str | None = None,
    progress: Progress | bool | None = None,
    address: str | None = None,
    actors: int | None = None,
    **settings: Any,
) -> Any:
    """Build the index of a model over data in the folder `out`, or go on where a build was stopped; returns an Index.

    `data`: see `open_data`. Further settings with their defaults:
    `layers` None (globs; every Conv, Gemm and MatMul but the output's), `target` None ("label" where all samples have
    one, else "predicted"; "top3", "all"), `composite` "epsilon_plus_flat", `k` 40, `criteria` ("relmax", "actmax"),
    `aggregate` ("sum", "max"), `normalize` True, `bypass` "cut" (for what is drawn from the index), `batch_size` 32,
    `preprocess` None (as `explain`), `labels`, `label_offset` 0, `full_classes` 10 (classes per concept with lists in
    full), `workers` (threads that decode), `providers`, `threads`, `output`, `checkpoint` 60 (seconds between
    writes; 0: after every block).
    `engine`: "local" or "ray" (`address` of a cluster, `actors` how many). `shard`: (number, of how many) or "3/8"
    (the fourth of eight counted from 0): only this part of the data, to be merged later. `progress`: True for a bar on
    stderr, or a function (done, total, skipped).

    Raises InputError, QuestionError, and OnnxcrpError where `out` holds an index of something else or cannot be
    written.
    """
    for name in ("criteria", "aggregate"):
        if isinstance(settings.get(name), str):
            settings[name] = tuple(part.strip() for part in settings[name].split(","))
        elif name in settings:
            settings[name] = tuple(settings[name])
    unknown = settings.keys() - {f.name for f in dataclasses.fields(Recipe)}
    if unknown:
        raise QuestionError(f"build has no setting {min(unknown)!r}")
    if engine not in ("local", "ray"):
        raise QuestionError(f"engine is {engine!r}", hint="local or ray")
    store.pyarrow()
    out = Path(out)
    work = Work(Recipe(model=model, data=data, **settings))
    part = parse_shard(shard)
    with locked(out):
        return _Build(work, out, part).run(engine, progress, address=address, actors=actors)


def parse_shard(shard: tuple[int, int] | str | None) -> tuple[int, int] | None:
    """(3, 8) of "3/8", counted from 0; raises QuestionError."""
    if shard is None:
        return None
    try:
        number, of = (int(n) for n in (shard.split("/") if isinstance(shard, str) else shard))
    except (ValueError, TypeError):
        number, of = -1, 0
    if not 0 <= number < of:
        raise QuestionError(f"shard is {shard!r}", hint='"0/8" is the first of eight, "7/8" the last')
    return number, of


@dataclass
class _Build:
    """One call of `build` once the model and the data are known."""

    work: Work
    out: Path
    shard: tuple[int, int] | None
    parts: Path = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.out / PARTS

    def run(self, engine: str, progress: Progress | bool | None, **options: Any) -> Any:
        from onnxcrp.index.query import Index

        work, wanted = self.work, set(self.work.blocks(self.shard))
        state = self._so_far()
        have = {(name, block) for name, blocks in state.done.items() for block in blocks}
        if store.read_manifest(self.out) is not None and wanted <= have:
            return Index.open(self.out)
        missing = [block for block in work.blocks(self.shard) if block not in have]
        total = sum(len(work.samples_of(block)) for block in (*missing, *have))
        with _shown(progress, total) as show:
            meter = Meter(show, total, total - sum(len(work.samples_of(b)) for b in missing), len(state.skipped))
            if engine == "ray":
                from onnxcrp.index.on_ray import run_on_ray

                state = run_on_ray(work, state, missing, self.parts, meter, **options)
            else:
                keeper = Keeper(work, self.parts, f"local-{uuid.uuid4().hex[:8]}")
                keeper.replaces = part_folders(self.parts)

                def done(block: Block | None, samples: int, skipped: int) -> None:
                    meter(samples, skipped)
                    if block is not None:
                        keeper.maybe(state)

                work.run(state, missing, done)
        self._finish(state)
        return Index.open(self.out)

    # --- what is there ------------------------------------------------------------------------------------------------

    def _so_far(self) -> State:
        """What earlier runs have seen; raises OnnxcrpError where that was about something else."""
        finished = store.read_manifest(self.out)
        if finished is not None:
            self._check(finished, self.out)
        folders = part_folders(self.parts)
        found: State | None = store.read_state(self.out, finished) if finished is not None else None
        for folder in folders:
            manifest = store.read_manifest(folder)
            assert manifest is not None
            self._check(manifest, self.out)
            found = merged_if_new(found, store.read_state(folder, manifest))
        if found is not None:
            return found
        return State(self.work.layout, self._served())

    def _check(self, manifest: Mapping[str, Any], where: Path) -> None:
        """Refuse to mix; raises OnnxcrpError naming what differs."""
        mine = json.loads(json.dumps(self.work.question))
        differs = [name for name, value in mine.items() if manifest["question"].get(name) != value]
        if differs:
            raise OnnxcrpError(
                f"{where} is an index of something else: {', '.join(differs)} differ",
                hint="build into another folder, or delete this one",
            )
        have = {each["name"]: each["listing_sha256"] for each in manifest["datasets"]}
        now = {samples.name: samples.sha256 for samples in self.work.data.datasets}
        if have != now:
            changed = sorted(name for name in have.keys() | now.keys() if have.get(name) != now.get(name))
            raise OnnxcrpError(
                f"{where} is an index of other data: {', '.join(changed)} changed",
                hint="build an index of the new data into another folder, and merge the two if you want both",
            )

    def _served(self) -> dict[str, dict[int, np.ndarray]] | None:
        """Which pairs keep lists per class in full: all, or those that a pilot finds (and that are then kept)."""
        work = self.work
        if work.few_classes():
            return None
        if RELMAX_SUM not in work.layout.criteria:
            return {name: {} for name in work.layout.layers}
        path = self.parts / SELECTION
        question = hashlib.sha256(
            json.dumps([work.question, [s.sha256 for s in work.data.datasets]]).encode()
        ).hexdigest()
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["question"] == question:
                return {
                    name: {int(cls): np.array(channels, np.int32) for cls, channels in of_class.items()}
                    for name, of_class in kept["served"].items()
                }
        served = work.pilot()
        content = {
            "question": question,
            "served": {
                name: {str(cls): channels.tolist() for cls, channels in of_class.items()}
                for name, of_class in served.items()
            },
        }
        with store.writing(path):
            self.parts.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{SELECTION}.{uuid.uuid4().hex[:8]}.tmp")
            temporary.write_text(json.dumps(content))
            store.sync(temporary)
            temporary.replace(path)
        return served

    def _finish(self, state: State) -> None:
        """Write the index itself, then drop the parts."""
        work = self.work
        everything = len(work.blocks()) == sum(len(blocks) for blocks in state.done.values())
        temporary = self.out / f".new.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with store.writing(self.out):
                temporary.mkdir(parents=True)
            rows = store.write_tables(temporary, state)
            names = [samples.name for samples in work.data.datasets]
            rows[store.SAMPLES] = store.write_samples(temporary, names, store.sample_rows(work.data))
            store.write_manifest(temporary, work.manifest(state, complete=everything) | {"tables": rows})
            store.publish(temporary, self.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.parts, ignore_errors=True)
        for leftover in self.out.glob(".new.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


def part_folders(parts: Path) -> list[Path]:
    """Parts, those with most samples first: one that a crash left beside its successor comes after it."""
    if not parts.is_dir():
        return []
    found = [(store.read_manifest(f), f) for f in sorted(parts.iterdir()) if not f.name.startswith(".")]
    known = [(manifest, folder) for manifest, folder in found if manifest is not None]
    return [folder for _, folder in sorted(known, key=lambda pair: (-block_count(pair[0]), pair[1].name))]


def merged_if_new(state: State | None, part: State) -> State:
    """Both, unless the part holds blocks that are there already: its others will be run again."""
    if state is None:
        return part
    if any(blocks & state.done.get(name, set()) for name, blocks in part.done.items()):
        return state
    return state.merge(part)


def block_count(manifest: Mapping[str, Any]) -> int:
    """How many blocks an index has seen."""
    return sum(len(from_ranges(each["done"])) for each in manifest["datasets"])


class Keeper:
    """Writes what a process has seen to `parts/`, each time under a new name, then drops the one before."""

    def __init__(self, work: Work, parts: Path, name: str) -> None:
        self.work, self.parts, self.name = work, parts, name
        self.replaces: list[Path] = []  # what the next part makes superfluous
        self._number = 0
        self._last = time.monotonic()
        self._took = 0.0

    def maybe(self, state: State) -> None:
        """Write if it is time: never more than a twentieth of all time goes into it, unless `checkpoint` is 0."""
        often = self.work.recipe.checkpoint
        if time.monotonic() - self._last >= (max(often, 20 * self._took) if often else 0):
            self.write(state)

    def write(self, state: State) -> Path:
        """The state as a part; raises OnnxcrpError when the disk refuses."""
        start = time.monotonic()
        folder = self.parts / f"{self.name}-{self._number:06d}"
        self._number += 1
        with store.new_folder(folder) as temporary:
            rows = store.write_tables(temporary, state)
            store.write_manifest(temporary, self.work.manifest(state, complete=False) | {"tables": rows})
        for old in self.replaces:
            shutil.rmtree(old, ignore_errors=True)
        self.replaces = [folder]
        self._last = time.monotonic()
        self._took = self._last - start
        return folder


# ------------------------------------------------------------------------------------------------------------ progress


class Meter:
    """Counts samples and tells whoever wants to know."""

    def __init__(self, show: Progress | None, total: int, done: int, skipped: int) -> None:
        self.show, self.total, self.done, self.skipped = show, total, done, skipped

    def __call__(self, samples: int, skipped: int) -> None:
        """Some more samples, of which some were skipped."""
        self.done += samples
        self.skipped += skipped
        if self.show is not None:
            self.show(self.done, self.total, self.skipped)


@contextlib.contextmanager
def _shown(progress: Progress | bool | None, total: int) -> Iterator[Progress | None]:
    """A function that shows progress: the caller's, a bar on stderr, or none."""
    if not progress or callable(progress):
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            from rich.text import Text

            return Text(f"{task.speed:.1f} samples/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[skipped]}"),
    )
    with Bar(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("samples", total=total, skipped="")

        def show(done: int, total: int, skipped: int) -> None:
            bar.update(task, completed=done, total=total, skipped=f"{skipped} skipped" if skipped else "")

        yield show


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one build at a time writes to a folder; a lock dies with its process."""
    with store.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with store.writing(out):
        file = (out / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OnnxcrpError(f"{out}: another build is writing to it", hint="wait for it, or stop it") from None
        yield
