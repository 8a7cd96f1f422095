"""Merging indexes of parts of the data: shards of one listing, or different datasets, into one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp.errors import InputError, OnnxcrpError
from onnxcrp.index import store
from onnxcrp.index.builder import locked
from onnxcrp.index.dataset import unique_name
from onnxcrp.index.state import State, from_ranges, ranges


def merge(indexes: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Any:
    """One index of the samples of all `indexes`, in the folder `out`; returns an Index.

    Shards of one listing give, byte for byte, the tables of a build over all of it. Datasets keep their order; two of
    one name but different content are told apart as `val`, `val~2`. Where there are more classes than `full_classes`,
    a (concept, class) keeps its full lists only if they are complete in every index. Raises InputError for what is no
    index, OnnxcrpError where the indexes answer different questions or hold the same samples.
    """
    from onnxcrp.index.query import Index

    folders, out = [Path(path) for path in indexes], Path(out)
    if not folders:
        raise InputError("there is nothing to merge")
    manifests = [_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        _same_question(folders[0], manifests[0], folder, manifest)
    datasets, names = _datasets(manifests)
    offsets = np.cumsum([0, *(each["samples"] for each in datasets)])
    with locked(out):
        if store.read_manifest(out) is not None:
            raise OnnxcrpError(f"{out} holds an index", hint="merge into another folder")
        merged: State | None = None
        for folder, manifest, called in zip(folders, manifests, names, strict=True):
            state = store.read_state(folder, manifest)
            places = [next(i for i, d in enumerate(datasets) if d["name"] == name) for name in called]
            sizes = [each["samples"] for each in manifest["datasets"]]
            starts = np.repeat([offsets[place] for place in places], sizes)
            within = np.concatenate([np.arange(size) for size in sizes])
            state.renumber(_ordered(folder, starts + within))
            state.done = {
                name: state.done[each["name"]] for name, each in zip(called, manifest["datasets"], strict=True)
            }
            merged = state if merged is None else merged.merge(state)
        assert merged is not None
        for each in datasets:
            each["done"] = ranges(merged.done.get(each["name"], set()))
        _write(out, merged, manifests, folders, datasets, names)
    return Index.open(out)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = store.read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: no index there, or an unfinished one", hint="run `onnxcrp index build` again")
    return manifest


def _same_question(one: Path, first: Mapping[str, Any], other: Path, second: Mapping[str, Any]) -> None:
    differs = store.differences(first["question"], second["question"])
    if differs or first["layers"] != second["layers"]:
        raise OnnxcrpError(
            f"{one} and {other} are indexes of different things: {', '.join(differs) or 'shapes of layers'} differ",
            hint="build both with the same model and settings",
        )


def _datasets(manifests: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The datasets of all, each once, and for every index what its own are called now."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    names: list[list[str]] = []
    for manifest in manifests:
        called = []
        for each in manifest["datasets"]:
            identity = (each["name"], each["listing_sha256"])
            if identity not in known:
                taken = {entry["name"] for entry in known.values()}
                known[identity] = {**each, "name": unique_name(each["name"], taken)}
            called.append(known[identity]["name"])
        names.append(called)
    return list(known.values()), names


def _ordered(folder: Path, numbers: np.ndarray) -> np.ndarray:
    """New sample numbers; their order must be the old one, for it decides ties."""
    if (np.diff(numbers) <= 0).any():
        raise OnnxcrpError(
            f"{folder} holds its datasets in another order than the indexes before it",
            hint="name the index with most datasets first",
        )
    return numbers


def _write(
    out: Path,
    state: State,
    manifests: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    datasets: list[dict[str, Any]],
    names: Sequence[Sequence[str]],
) -> None:
    temporary = out / f".new.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with store.writing(out):
            temporary.mkdir(parents=True)
        rows = store.write_tables(temporary, state)
        rows[store.SAMPLES] = store.write_samples(
            temporary, [each["name"] for each in datasets], _sample_rows(manifests, folders, datasets, names)
        )
        complete = all(sum(b - a for a, b in each["done"]) == each["blocks"] for each in datasets)
        manifest = {
            **manifests[0],
            "complete": complete,
            "datasets": datasets,
            "served": "all" if state.served is None else "listed",
            "samples": state.samples,
            "skipped": len(state.skipped),
            "negative": state.negative,
            "rows": sorted([cls, count] for cls, count in state.rows.items()),
            "tables": rows,
        }
        store.write_manifest(temporary, manifest)
        store.publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sample_rows(
    manifests: Sequence[Mapping[str, Any]],
    folders: Sequence[Path],
    datasets: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> store.SampleRows:
    """Names and labels of all samples, from the first index that holds each dataset."""
    _, pq = store.pyarrow()
    for each in datasets:
        at = next(i for i, called in enumerate(names) if each["name"] in called)
        own = manifests[at]["datasets"][names[at].index(each["name"])]["name"]
        table = pq.read_table(folders[at] / f"{store.SAMPLES}.parquet", filters=[("dataset", "=", own)])
        yield each["name"], table["name"].to_pylist(), table["label"].to_numpy()


def done_blocks(manifest: Mapping[str, Any]) -> dict[str, set[int]]:
    """Dataset -> the blocks that an index has seen."""
    return {each["name"]: from_ranges(each["done"]) for each in manifest["datasets"]}
