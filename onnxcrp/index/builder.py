"""Building an index, and going on where a build was stopped.

What a run has seen lies in `parts/` of the index, each part an index of some blocks; a run that was stopped, however
rudely, goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp.errors import OnnxcrpError, QuestionError
from onnxcrp.index import store
from onnxcrp.index.state import RELMAX_SUM, State, from_ranges
from onnxcrp.index.work import Block, Recipe, Work
from onnxcrp.result import ExplanationWarning

PARTS = "parts"
SELECTION = "served.json"

Progress = Callable[[int, int, int], None]  # (samples done, samples in all, samples skipped)


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
    `aggregate` ("sum", "max"), `normalize` True, `bypass` "cut" (for what is drawn from the index), `batch_size` None
    (by the input's size, from 8 to 64), `preprocess` None (as `explain`), `labels`, `label_offset` 0, `full_classes`
    10 (classes per concept with lists in full), `workers` (threads that decode), `threads` (of the model; all cores),
    `providers`, `output`, `checkpoint` 60 (seconds between writes; 0: after every block).
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
    part = parse_shard(shard)
    _check_own(out)
    work = Work(Recipe(model=model, data=data, **settings))
    for samples in work.data.datasets:
        if count := len(samples.left_out):
            message = f"{samples.source}: passed over {count} {'file' if count == 1 else 'files'} without a sample: "
            message += samples.left_out[0] + (" ..." if count > 1 else "")
            warnings.warn(message, ExplanationWarning, stacklevel=2)
    with locked(out):
        return _Build(work, out, part, progress).run(engine, address=address, actors=actors)


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
    progress: Progress | bool | None
    parts: Path = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.out / PARTS

    def run(self, engine: str, **options: Any) -> Any:
        from onnxcrp.index.query import Index

        work, wanted = self.work, set(self.work.blocks(self.shard))
        state = self._so_far()
        have = {(name, block) for name, blocks in state.done.items() for block in blocks}
        if store.read_manifest(self.out) is not None and wanted <= have:
            return Index.open(self.out)
        missing = [block for block in work.blocks(self.shard) if block not in have]
        total = sum(len(work.samples_of(block)) for block in (*missing, *have))
        with _shown(self.progress, total, "samples") as show:
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
        differs = store.differences(mine, manifest["question"])
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
        samples = work.pilot_samples()
        with _shown(self.progress is True, len(samples), "classes that concepts serve") as show:
            served = work.pilot(samples, Meter(show, len(samples), 0, 0))
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
def _shown(progress: Progress | bool | None, total: int, what: str) -> Iterator[Progress | None]:
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
        task = bar.add_task(what, total=total, skipped="")

        def show(done: int, total: int, skipped: int) -> None:
            bar.update(task, completed=done, total=total, skipped=f"{skipped} skipped" if skipped else "")

        yield show


def _check_own(out: Path) -> None:
    """Raises OnnxcrpError for a file, and for a folder that holds something and no index."""
    if out.exists() and not out.is_dir():
        raise OnnxcrpError(
            f"cannot write {out}: it is a file", hint="the folder of an index is expected: -o NAME.index"
        )
    parts = out / PARTS
    if not out.is_dir() or store.read_manifest(out) or part_folders(parts) or (parts / SELECTION).is_file():
        return
    found = [entry for folder in (out, parts) if folder.is_dir() for entry in folder.iterdir() if entry != parts]
    if others := sorted(str(entry.relative_to(out)) for entry in found if not entry.name.startswith(".")):
        raise OnnxcrpError(
            f"cannot write {out}: the folder holds {others[0]} and is no index", hint="name another one: -o NAME.index"
        )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one build at a time writes to a folder; a lock dies with its process. Raises as `_check_own` does."""
    _check_own(out)
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
