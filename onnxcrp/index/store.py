"""The files of an index: Parquet tables and manifest.json, see docs/index.md for every column.

All is written into a temporary folder and renamed, the manifest last: a folder with a manifest is whole. What a build
has seen so far is kept the same way, as an index of a part of the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp.errors import InputError, OnnxcrpError
from onnxcrp.index.dataset import NO_LABEL, Data, titles
from onnxcrp.index.state import (
    ALL,
    EMPTY,
    RELMAX_SUM,
    Criterion,
    Layout,
    Lists,
    State,
    decode,
    encode,
    from_ranges,
    ranges,
)

FORMAT = 1
MANIFEST = "manifest.json"
TABLES = (
    "top",
    "class_top",
    "class_top10",
    "classes",
    "sums",
    "histograms",
    "served",
    "skipped",
)
SAMPLES = "samples"
GROUP = 1 << 20  # rows of a row group, roughly
NAMES = 1 << 16  # sample names written at once

SampleRows = Iterable[tuple[str, list[str], "np.ndarray | None"]]  # dataset, names, labels


def pyarrow() -> Any:
    """The modules (pyarrow, pyarrow.parquet); raises OnnxcrpError without them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OnnxcrpError("an index needs pyarrow", hint='pip install "onnxcrp[index]"') from None
    return pyarrow, pyarrow.parquet


# ------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses, as one clear error."""
    pa, _ = pyarrow()
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        hint = "make room and run the same command again: it continues"
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)):
            hint = "name a folder that you may write to"
        raise OnnxcrpError(f"cannot write {path}: {reason}", hint=hint) from error


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, which it becomes when all went well and whose files are on the disk then."""
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(final):
            temporary.mkdir(parents=True)
        yield temporary
        with writing(final):
            for file in temporary.iterdir():
                sync(file)
            temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """To the disk itself: else a full disk may show only after the rename."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an index, None where there is none; raises InputError for one that cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error})", hint="build the index again") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise InputError(f"{path}: not the manifest of an index", hint="name another folder")
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{path}: format {manifest['format']}, this version reads {FORMAT}", hint="build the index again"
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """manifest.json; keys in the order given, so that equal contents are equal bytes."""
    with writing(folder / MANIFEST):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(temporary: Path, out: Path) -> None:
    """Move the tables of a finished index to their place, the manifest last."""
    with writing(out):
        files = sorted(temporary.iterdir(), key=lambda file: file.name == MANIFEST)
        for file in files:
            sync(file)
        for file in files:
            file.replace(out / file.name)


def layout_of(question: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Layout:
    """What the tables of an index hold, from its manifest."""
    criteria = tuple((c, a) for c in question["criteria"] for a in question["aggregate"])
    return Layout({each["name"]: each["channels"] for each in layers}, criteria, question["k"], question["normalize"])


# ------------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Writes one table, row group by row group."""

    def __init__(self, path: Path, columns: Mapping[str, Any]) -> None:
        self.pa, self.pq = pyarrow()
        self.path = path
        self.columns = columns  # name -> numpy type, or the list of strings that a column of numbers stands for
        self.schema = self.pa.schema([(name, self._type(kind)) for name, kind in columns.items()])
        self.file: Any = None
        self.rows: list[tuple[np.ndarray, ...]] = []
        self.count = self.total = 0

    def _type(self, kind: Any) -> Any:
        if kind is str:
            return self.pa.string()
        if isinstance(kind, list):
            return self.pa.dictionary(self.pa.int16(), self.pa.string())
        return self.pa.from_numpy_dtype(np.dtype(kind))

    def __enter__(self) -> _Writer:
        # floats are hardly ever the same, so dictionaries of them do not pay
        floats = [name for name, kind in self.columns.items() if kind in (np.float32, np.float64)]
        others = [name for name in self.columns if name not in floats]
        with writing(self.path):
            self.file = self.pq.ParquetWriter(
                self.path, self.schema, compression="zstd", use_dictionary=others, use_byte_stream_split=floats
            )
        return self

    def add(self, *columns: Any) -> None:
        """Some rows: arrays, or single values for all of them."""
        length = max(len(c) for c in columns if hasattr(c, "__len__"))
        if length:
            self.rows.append(tuple(c if hasattr(c, "__len__") else np.full(length, c) for c in columns))
            self.count += length
        if self.count >= GROUP:
            self.group()

    def group(self) -> None:
        """End a row group."""
        if not self.rows:
            return
        arrays = []
        for (_, kind), parts in zip(self.columns.items(), zip(*self.rows, strict=True), strict=True):
            if kind is str:
                arrays.append(self.pa.array([text for part in parts for text in part], self.pa.string()))
                continue
            values = np.concatenate(parts)
            if isinstance(kind, list):
                index = self.pa.array(values.astype(np.int16), mask=values < 0)
                arrays.append(self.pa.DictionaryArray.from_arrays(index, kind))
            else:
                arrays.append(self.pa.array(values.astype(kind)))
        with writing(self.path):
            self.file.write_table(self.pa.Table.from_arrays(arrays, schema=self.schema), row_group_size=1 << 30)
        self.total += self.count
        self.rows, self.count = [], 0

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.group()
        with writing(self.path) if kind is None else contextlib.suppress(Exception):
            self.file.close()


def write_tables(folder: Path, state: State) -> dict[str, int]:
    """All tables of a state but the samples' names -> {table: rows}."""
    layers = list(state.layers)
    combos = list(state.layout.criteria)
    criteria, aggregates = list(dict.fromkeys(c for c, _ in combos)), list(dict.fromkeys(a for _, a in combos))
    codes = {combo: (criteria.index(combo[0]), aggregates.index(combo[1])) for combo in combos}
    concept = {"layer": layers, "channel": np.int32}
    pair = {"layer": layers, "class": np.int32, "channel": np.int32}
    how = {"criterion": criteria, "aggregate": aggregates}
    entry = {"rank": np.int16, "sample": np.int32, "score": np.float32, "position": np.int32}
    rows: dict[str, int] = {}

    def table(name: str, columns: Mapping[str, Any], fill: Callable[[_Writer], None]) -> None:
        with _Writer(folder / f"{name}.parquet", columns) as writer:
            fill(writer)
        rows[name] = writer.total

    def top(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            for combo, lists in layer.top.items():
                for span in lists.span.values():
                    channel, rank, *values, target = _entries(lists, span, with_target=True)
                    writer.add(np.full(len(channel), at), channel, *codes[combo], rank, *values, target)
            writer.group()

    def class_top(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            for cls in sorted(state.rows):
                for combo, lists in layer.of_class.items():
                    if cls in lists.span:
                        channel, *values = _entries(lists, lists.span[cls])
                        writer.add(np.full(len(channel), at), cls, channel, *codes[combo], *values)
            writer.group()

    def class_top10(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            brief = layer.brief
            for cls in sorted(state.rows) if brief is not None else ():
                assert brief is not None
                channel, *values = _entries(brief, brief.span[cls])
                writer.add(np.full(len(channel), at), cls, channel, *values)
            writer.group()

    def classes(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            for cls in sorted(layer.moments.slot):
                channel, count = np.arange(layer.channels), state.rows[cls]
                mean, variance = layer.moments.mean_and_variance(cls, count)
                writer.add(np.full(len(channel), at), cls, channel, count, mean, variance, layer.class_scores(cls))
            writer.group()

    def sums(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            for cls in sorted(layer.moments.slot):
                channel = np.arange(layer.channels)
                writer.add(np.full(len(channel), at), cls, channel, *layer.moments.sums[layer.moments.slot[cls]])
            writer.group()

    def histograms(writer: _Writer) -> None:
        for at, layer in enumerate(state.layers.values()):
            for combo, counts in layer.histogram.items():
                channel, bin_ = np.nonzero(counts)
                writer.add(np.full(len(channel), at), channel, *codes[combo], bin_, counts[channel, bin_])
            writer.group()

    def served(writer: _Writer) -> None:
        for at, layer in enumerate(layers):
            for cls, channel in sorted((state.served or {}).get(layer, {}).items()):
                writer.add(np.full(len(channel), at), cls, channel)
            writer.group()

    def skipped(writer: _Writer) -> None:
        found = sorted(state.skipped.items())
        writer.add(np.array([s for s, _ in found], np.int32), [reason for _, reason in found])

    numbers = {f"{name}_{half}": np.int64 for name in ("sum", "square") for half in ("high", "low")}
    statistics = {"count": np.int64, "mean": np.float64, "variance": np.float64, "top_mean": np.float64}
    table("top", {**concept, **how, **entry, "target": np.int32}, top)
    table("class_top", {**pair, **how, **entry}, class_top)
    table("class_top10", {**pair, **entry}, class_top10)
    table("classes", {**pair, **statistics}, classes)
    table("sums", {**pair, **numbers}, sums)
    table("histograms", {**concept, **how, "bin": np.int16, "count": np.int64}, histograms)
    table("served", pair, served)
    table("skipped", {"sample": np.int32, "reason": str}, skipped)
    return rows


def _entries(lists: Lists, span: slice, *, with_target: bool = False) -> tuple[np.ndarray, ...]:
    """Rows of the lists in a span: channel, rank, sample, score, position (and target)."""
    key = lists.key[span]
    at, rank = np.nonzero(key != EMPTY)
    score, sample = decode(key[at, rank])
    found = (lists.channel[span][at], rank, sample, score, lists.position[span][at, rank])
    return (*found, lists.target[span][at, rank]) if with_target else found


def write_samples(folder: Path, datasets: Sequence[str], rows: SampleRows) -> int:
    """samples.parquet: every sample's number, dataset, name and label."""
    columns = {"sample": np.int32, "dataset": list(datasets), "name": str, "label": np.int32}
    with _Writer(folder / f"{SAMPLES}.parquet", columns) as writer:
        start = 0
        for dataset, names, labels in rows:
            label = np.full(len(names), NO_LABEL) if labels is None else labels
            writer.add(np.arange(start, start + len(names)), datasets.index(dataset), names, label)
            start += len(names)
    return start


def sample_rows(data: Data) -> SampleRows:
    """Names and labels of all samples, in parts."""
    for samples in data.datasets:
        of = titles(samples)
        for start in range(0, len(samples), NAMES):
            part = slice(start, min(start + NAMES, len(samples)))
            yield samples.name, of(part), None if samples.labels is None else samples.labels[part]


# ------------------------------------------------------------------------------------------------------------- reading


def read_state(folder: Path, manifest: Mapping[str, Any] | None = None) -> State:
    """The accumulators that `write_tables` wrote; raises InputError where tables are missing or damaged."""
    pa, _ = pyarrow()
    manifest = manifest or read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no index there, or an unfinished one", hint="run `onnxcrp index build` again")
    try:
        return _read_state(folder, manifest)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{folder}: damaged index ({error})", hint="build it again") from error


def _read_state(folder: Path, manifest: Mapping[str, Any]) -> State:
    layout = layout_of(manifest["question"], manifest["layers"])
    served: dict[str, dict[int, np.ndarray]] | None = None
    if manifest["served"] != "all":
        served = {name: {} for name in layout.layers}
        for layer, part in _parts(folder, "served"):
            for cls, run in _runs(part["class"]):
                served[layer][cls] = part["channel"][run]
    state = State(layout, served)
    state.rows = {int(cls): count for cls, count in manifest["rows"]}
    state.samples, state.negative = manifest["samples"], manifest["negative"]
    state.done = {each["name"]: from_ranges(each["done"]) for each in manifest["datasets"]}
    for layer, part in _parts(folder, "top"):
        for combo, rows in _combos(part):
            _put(state.layers[layer].top[combo], np.full(int(rows.sum()), ALL), part, rows)
    for layer, part in _parts(folder, "class_top"):
        for combo, rows in _combos(part):
            _put(state.layers[layer].of_class[combo], part["class"][rows], part, rows)
    for layer, part in _parts(folder, "class_top10"):
        brief = state.layers[layer].brief
        if brief is not None:
            _put(brief, part["class"], part, np.ones(len(part["class"]), bool))
    for layer, part in _parts(folder, "sums"):
        moments = state.layers[layer].moments
        for cls, run in _runs(part["class"]):
            numbers = [part[f"{name}_{half}"][run] for name in ("sum", "square") for half in ("high", "low")]
            slot = moments.slots([cls])[0]
            moments.sums[slot][:, part["channel"][run]] = np.stack(numbers)
        moments.room = float(np.abs(moments.sums.astype(np.float64)).max(initial=0)) / 2.0**62
    for layer, part in _parts(folder, "histograms"):
        for combo, rows in _combos(part):
            state.layers[layer].histogram[combo][part["channel"][rows], part["bin"][rows]] = part["count"][rows]
    _, pq = pyarrow()
    table = pq.read_table(folder / "skipped.parquet").to_pydict()
    state.skipped = dict(zip(table["sample"], table["reason"], strict=True))
    return state


def _parts(folder: Path, table: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(layer, columns) by row group; a row group holds rows of one layer."""
    pa, pq = pyarrow()
    with pq.ParquetFile(folder / f"{table}.parquet") as file:
        for number in range(file.num_row_groups):
            read = file.read_row_group(number)
            layer = str(read["layer"][0].as_py())
            columns = {}
            for name in read.column_names:
                column = read[name].combine_chunks()
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode() if name != "layer" else column
                if name != "layer":
                    columns[name] = column.to_numpy(zero_copy_only=False)
            yield layer, columns


def _runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """(value, rows) of the runs in a sorted column."""
    found, first = np.unique(values, return_index=True)
    for value, start, stop in zip(found, first, [*first[1:], len(values)], strict=True):
        yield int(value), slice(int(start), int(stop))


def _combos(part: Mapping[str, np.ndarray]) -> Iterator[tuple[Criterion, np.ndarray]]:
    """((criterion, aggregate), rows)."""
    for criterion in dict.fromkeys(part["criterion"]):
        for aggregate in dict.fromkeys(part["aggregate"]):
            rows = (part["criterion"] == criterion) & (part["aggregate"] == aggregate)
            if rows.any():
                yield (str(criterion), str(aggregate)), rows


def _put(lists: Lists, cls: np.ndarray, part: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
    columns = [encode(part["score"][rows], part["sample"][rows]), part["position"][rows]]
    if "target" in part:
        columns.append(part["target"][rows])
    lists.put(cls, part["channel"][rows], part["rank"][rows], *columns)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two questions of manifests do not share, by name."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def dataset_entries(data: Data, block: int, done: Mapping[str, set[int]], offset: int) -> list[dict[str, Any]]:
    """The datasets as a manifest tells of them."""
    return [
        {
            "name": samples.name,
            "source": samples.source,
            "kind": samples.kind,
            "samples": len(samples),
            "labels": samples.labels is not None,
            "label_offset": offset,
            "listing_sha256": samples.sha256,
            "blocks": -(-len(samples) // block),
            "done": ranges(done.get(samples.name, set())),
        }
        for samples in data.datasets
    ]


__all__ = ["FORMAT", "RELMAX_SUM", "TABLES", "new_folder", "publish", "read_manifest", "read_state", "write_tables"]
