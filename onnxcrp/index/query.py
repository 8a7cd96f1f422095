"""Reading an index: reference samples, classes and concepts, as arrays and pandas frames."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.index import store
from onnxcrp.index.dataset import Data, Port, open_data
from onnxcrp.index.reduce import AGGREGATES, CRITERIA, LayerRow

if TYPE_CHECKING:
    import pandas

    from onnxcrp.data import Sample
    from onnxcrp.explainer import Explainer
    from onnxcrp.index.reference import ReferenceSamples, Views

RANKINGS = ("top", "mean")


class References(NamedTuple):
    """Reference samples of all concepts of a layer, best first: arrays [C, k], -1 (score NaN) behind the last."""

    sample: np.ndarray  # int32
    score: np.ndarray  # float32
    position: np.ndarray  # int32, flat over the layer's positions
    target: np.ndarray  # int32


class Retrieved(NamedTuple):
    """What one concept drives: classes and samples, the strongest first."""

    classes: pandas.DataFrame
    samples: pandas.DataFrame


class Index:
    """An index, opened with `Index.open(path)`; nothing is read before it is asked for.

    Frames name samples by `sample` (its number), `dataset`, `name` and `label`. `criterion` is "relmax" or "actmax",
    `aggregate` "sum" or "max"; scores are shares of the layer's total where the index is normalized.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.layers: dict[str, LayerRow] = {
            row["name"]: LayerRow(row["name"], row["op"], row["channels"], tuple(row["shape"]), row["axis"])
            for row in manifest["layers"]
        }
        self.criteria: tuple[str, ...] = tuple(manifest["question"]["criteria"])
        self.aggregates: tuple[str, ...] = tuple(manifest["question"]["aggregate"])
        self.k: int = manifest["question"]["k"]
        self.classes: int = manifest["model"]["classes"]
        self._views: Views | None = None

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Index:
        """The index in a folder; raises InputError where there is none, or an unfinished one."""
        _pandas()
        folder = Path(path)
        manifest = store.read_manifest(folder)
        if manifest is None:
            unfinished = (folder / "parts").is_dir()
            raise InputError(
                f"{folder}: {'an unfinished index' if unfinished else 'no index there'}",
                hint="run `onnxcrp index build` again, it continues"
                if unfinished
                else "onnxcrp index build MODEL DATA",
            )
        return Index(folder, manifest)

    def __repr__(self) -> str:
        state = "" if self.manifest["complete"] else ", a part"
        return f"Index({str(self.path)!r}: {len(self.layers)} layers, {self.manifest['samples']} samples{state})"

    # --- what it is of ------------------------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> pandas.DataFrame:
        """Every sample of the data by its number: dataset, name, label (-1: none)."""
        return self._read(store.SAMPLES).set_index("sample")

    @cached_property
    def unlabelled(self) -> int:
        """How many samples of the data have no label."""
        return int((self.samples["label"] < 0).sum())

    @cached_property
    def skipped(self) -> pandas.DataFrame:
        """Samples that could not be used, and why: sample, reason, dataset, name."""
        return self._named(self._read("skipped"))

    def class_name(self, cls: int) -> str:
        """What a class is called, its number where nobody said."""
        names = self.manifest["class_names"]
        line = cls + self.manifest["label_offset"]
        return names[line] if 0 <= line < len(names) else str(cls)

    def name_classes(self, names: Sequence[str], offset: int = 0) -> None:
        """What classes are called from now on: class `c` is `names[c + offset]`."""
        self.manifest |= {"class_names": list(names), "label_offset": offset}

    def class_number(self, text: str) -> int:
        """A class by its number or its name, whatever the case; raises QuestionError naming the nearest."""
        if text.strip().isdigit() and int(text) < self.classes:
            return int(text)
        names = [self.class_name(cls) for cls in range(self.classes)]
        wanted = text.strip().lower()
        found = [c for c, name in enumerate(names) if wanted in (name.lower(), name.split(",")[0].strip().lower())]
        if len(found) != 1:
            near = difflib.get_close_matches(wanted, [name.lower() for name in names], n=1)
            several = f"class {text!r} is several" if found else f"there is no class {text!r}"
            hint = f"a number: {', '.join(map(str, found))}" if found else f"classes 0 to {self.classes - 1}"
            raise QuestionError(several, hint=f"did you mean {near[0]!r}?" if near and not found else hint)
        return found[0]

    def describe(self) -> str:
        """The index in one line."""
        about = self.manifest
        concepts = sum(row.channels for row in self.layers.values())
        samples = "1 sample" if about["samples"] == 1 else f"{about['samples']} samples"
        words = f"{len(self.layers)} layers, {concepts} concepts, {samples}"
        words += f", target {about['question']['target']}"
        words += f", {about['skipped']} skipped" if about["skipped"] else ""
        words += f", {about['negative']} with a negative logit" if about["negative"] else ""
        return words if about["complete"] else f"{words}; a part of the data"

    def layer(self, name: str) -> LayerRow:
        """A layer of the index; raises QuestionError naming the nearest."""
        if name not in self.layers:
            nearest = difflib.get_close_matches(name, self.layers, n=3, cutoff=0.3) or list(self.layers)[:5]
            raise QuestionError(f"the index has no layer {name!r}", hint=f"nearest: {', '.join(nearest)}")
        return self.layers[name]

    def unravel(self, layer: str, position: Any) -> tuple[np.ndarray, ...]:
        """A flat position as (y, x), or (x,) in a signal; () in a layer without positions."""
        row = self.layer(layer)
        places = row.shape[: row.axis] + row.shape[row.axis + 1 :]
        return np.unravel_index(np.asarray(position), places) if places else ()

    @cached_property
    def data(self) -> Data:
        """The datasets, opened again where they were; raises InputError if they are gone or were arrays in memory."""
        sources = {each["name"]: each["source"] for each in self.manifest["datasets"]}
        if gone := [name for name, source in sources.items() if source is None]:
            raise InputError(f"dataset {gone[0]} was an array in memory", hint="index.open_data(x)")
        try:
            return self.open_data([f"{name}={source}" for name, source in sources.items()])
        except InputError as error:
            raise InputError(
                f"the data of {self.path} cannot be read where it was: {error.message}",
                hint="--data PATH, or index.open_data(PATH), says where it lies now",
            ) from None

    def open_data(self, data: Any) -> Data:
        """Data to read this index' samples from, for example after it moved; its listing must be the same.

        It takes the place of `data`. Raises InputError where it is something else.
        """
        about = self.manifest["input"]
        shape = tuple(about["shape"])
        port = Port(self.preprocessing, shape, np.dtype(about["dtype"]), about["name"])
        opened = open_data(data, port)
        for samples, each in zip(opened.datasets, self.manifest["datasets"], strict=False):
            samples.name = each["name"]
        have, want = [len(s) for s in opened.datasets], [each["samples"] for each in self.manifest["datasets"]]
        if have != want:
            raise InputError(f"the data has {have} samples, the index is of {want}")
        self.__dict__["data"] = opened
        return opened

    @cached_property
    def preprocessing(self) -> Any:
        """The Preprocessing that the samples went through."""
        from onnxcrp.preprocessing import Preprocessing

        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.manifest["question"]["preprocessing"].items()
        }
        names, offset = tuple(self.manifest["class_names"]), self.manifest["label_offset"]
        return Preprocessing(**fields, labels=names, label_offset=offset, source=f"the index {self.path}")

    @cached_property
    def composite(self) -> Any:
        """The Composite that relevance was computed with."""
        from onnxcrp.composite import load

        about = self.manifest["composite"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "composite.toml"
            path.write_text(about["text"], encoding="utf-8")
            return dataclasses.replace(load(path), name=about["name"])

    def sample(self, number: int) -> Sample:
        """A sample as the model takes it, with its picture; raises InputError where it cannot be read."""
        return self.data.load(int(number))

    def explainer(self, model: Any = None, **options: Any) -> Explainer:
        """An Explainer of the indexed model under the index' composite, from where it was or from `model`.

        Raises OnnxcrpError for another model.
        """
        from onnxcrp.explainer import Explainer

        source = self.manifest["model"]["path"] if model is None else model
        if source is None:
            raise InputError("the index was built from a model in memory", hint="index.explainer(model)")
        options = {"composite": self.composite, "preprocessing": self.preprocessing, **options}
        explainer = Explainer(source, output=self.manifest["question"]["output"], **options)
        if explainer.canonical.sha256 != self.manifest["model"]["sha256"]:
            raise OnnxcrpError(f"{source} is not the model of {self.path}", hint="build its index")
        return explainer

    # --- reference samples --------------------------------------------------------------------------------------------

    def top(
        self,
        layer: str,
        channel: int,
        criterion: str = "relmax",
        aggregate: str = "sum",
        *,
        cls: int | None = None,
        k: int | None = None,
    ) -> pandas.DataFrame:
        """Reference samples of one concept, best first, over all classes or of one.

        Columns: rank, sample, score, position (flat), target, dataset, name, label. Classes that the concept hardly
        serves have 10 (RelMax, sum) or none. Raises QuestionError.
        """
        self._check(layer, criterion, aggregate)
        self._check_channel(layer, channel)
        if cls is None:
            frame = self._read("top", layer=layer, channel=channel, criterion=criterion, aggregate=aggregate)
        else:
            where = {"layer": layer, "class": int(cls), "channel": channel}
            frame = self._read("class_top", **where, criterion=criterion, aggregate=aggregate)
            if not len(frame) and (criterion, aggregate) == ("relmax", "sum"):
                frame = self._read("class_top10", **where)
            frame["target"] = frame.pop("class").astype(np.int32)
        frame = frame.sort_values("rank", ignore_index=True).drop(
            columns=["layer", "channel", "criterion", "aggregate"], errors="ignore"
        )
        return self._named(frame if k is None else frame.head(k))

    def references(
        self, layer: str, criterion: str = "relmax", aggregate: str = "sum", *, cls: int | None = None
    ) -> References:
        """Reference samples of all concepts of a layer as arrays [C, k], for `cls` as `top` has them; QuestionError."""
        self._check(layer, criterion, aggregate)
        shape = (self.layer(layer).channels, self.k)
        found = References(
            np.full(shape, -1, np.int32),
            np.full(shape, np.nan, np.float32),
            np.full(shape, -1, np.int32),
            np.full(shape, -1, np.int32),
        )
        if cls is None:
            frame = self._read("top", layer=layer, criterion=criterion, aggregate=aggregate)
        else:
            frame = self._read(
                "class_top", layer=layer, **{"class": int(cls)}, criterion=criterion, aggregate=aggregate
            )
            if (criterion, aggregate) == ("relmax", "sum"):
                brief = self._read("class_top10", layer=layer, **{"class": int(cls)})
                brief = brief[~brief["channel"].isin(frame["channel"])]
                frame = _pandas().concat([frame, brief[brief["rank"] < self.k]], ignore_index=True)
            frame["target"] = int(cls)
        place = (frame["channel"].to_numpy(), frame["rank"].to_numpy())
        for name in References._fields:
            getattr(found, name)[place] = frame[name].to_numpy()
        return found

    def reference_samples(
        self,
        layer: str,
        channel: int,
        criterion: str = "relmax",
        aggregate: str = "sum",
        *,
        cls: int | None = None,
        k: int | None = 8,
        start: str | None = None,
        parts: Sequence[str] = ("field", "heatmap"),
        explainer: Explainer | None = None,
    ) -> ReferenceSamples:
        """The best `k` of `top`, read again, each with its receptive field, conditional heatmap and mask.

        Samples with a score of 0 or less are left out: they do not use the concept, or do not excite it.
        `start`: heatmaps begin at the concept's "activation", or at its "relevance" for the row's target; by default at
        its relevance for RelMax where more than a ReLU reads the layer, so that negative activation counts. `parts`:
        "field" and "heatmap", each a run of the model. `explainer`: as `explainer()` gives it, which is also the
        default. Raises InputError where a sample cannot be read any more, QuestionError, and OnnxcrpError for another
        model.
        """
        return self.views(explainer).of(layer, channel, criterion, aggregate, cls=cls, k=k, start=start, parts=parts)

    def views(self, explainer: Explainer | None = None) -> Views:
        """What looks at samples through the model; kept, so that the next call is quick."""
        from onnxcrp.index.reference import Views

        if self._views is None or (explainer is not None and self._views.explainer is not explainer):
            self._views = Views(self, explainer or self.explainer())
        return self._views

    # --- classes and concepts -----------------------------------------------------------------------------------------

    def classes_served(self, layer: str, channel: int, k: int | None = 10, *, by: str = "top") -> pandas.DataFrame:
        """Classes that a concept serves most: by the mean of their 10 highest scores (`top`), or of all (`mean`).

        Columns: class, name, count, mean, variance, top_mean. RelMax, sum. Raises QuestionError.
        """
        self._check_channel(layer, channel)
        frame = self._statistics(layer=layer, channel=channel)
        return self._ranked(frame.drop(columns=["layer", "channel"]), by, ["class"], k)

    def concepts_used(
        self, cls: int, layer: str | None = None, k: int | None = 10, *, by: str = "mean"
    ) -> pandas.DataFrame:
        """Concepts that a class uses most, of one layer or of all: by the mean of all scores, or of the 10 highest.

        Columns: layer, channel, count, mean, variance, top_mean. RelMax, sum. Raises QuestionError.
        """
        if layer is not None:
            self.layer(layer)
        frame = self._statistics(**({"layer": layer} if layer else {}), **{"class": int(cls)})
        if not len(frame):
            raise QuestionError(f"the index holds no sample of class {cls}")
        return self._ranked(frame.drop(columns=["class"]), by, ["layer", "channel"], k)

    def statistics(self, layer: str | None = None, channel: int | None = None) -> pandas.DataFrame:
        """Count, mean, variance and top_mean of the scores (RelMax, sum) by layer, class and channel."""
        where: dict[str, Any] = {}
        if layer is not None:
            where["layer"] = self.layer(layer).name
        if channel is not None:
            where["channel"] = channel
        return self._statistics(**where)

    def retrieve(
        self, layer: str, channel: int, k: int | None = None, *, minimum: float = 0.0, by: str = "top"
    ) -> Retrieved:
        """The inverse search (CRP 4.3): for one concept, the classes and the samples that it drives.

        Classes as `classes_served`, those with a mean of at most `minimum` left out. Samples are the reference samples
        over all classes and of each of these classes together, scores above `minimum`, the strongest first.
        Raises QuestionError.
        """
        classes = self.classes_served(layer, channel, None, by=by)
        classes = classes[classes["top_mean" if by == "top" else "mean"] > minimum].reset_index(drop=True)
        pd = _pandas()
        where = {"layer": layer, "channel": channel}
        full = {"criterion": "relmax", "aggregate": "sum"}
        parts = [self._read("top", **where, **full)]
        for table, more in (("class_top", full), ("class_top10", {})):
            part = self._read(table, **where, **more)
            parts.append(part[part["class"].isin(classes["class"])].rename(columns={"class": "target"}))
        columns = ["sample", "target", "score", "position"]
        samples = pd.concat([part[columns] for part in parts], ignore_index=True).drop_duplicates(["sample", "target"])
        samples = samples[samples["score"] > minimum]
        samples = samples.sort_values(["score", "sample", "target"], ascending=[False, True, True], ignore_index=True)
        return Retrieved(classes.head(k) if k else classes, self._named(samples.head(k) if k else samples))

    def histogram(
        self, layer: str, channel: int | None = None, criterion: str = "relmax", aggregate: str = "sum"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(edges [n], counts [n + 1], or [C, n + 1] of all concepts): bin 0 lies below edges[0]; QuestionError."""
        self._check(layer, criterion, aggregate)
        edges = np.array(self.manifest["edges"])
        counts = np.zeros((self.layer(layer).channels, len(edges) + 1), np.int64)
        frame = self._read("histograms", layer=layer, criterion=criterion, aggregate=aggregate)
        counts[frame["channel"].to_numpy(), frame["bin"].to_numpy()] = frame["count"].to_numpy()
        if channel is None:
            return edges, counts
        self._check_channel(layer, channel)
        return edges, counts[channel]

    def compare(self, layers: Sequence[str] | None = None, k: int | None = None) -> pandas.DataFrame:
        """How far the criteria agree (CRP Fig. 12): similarity of their reference sets, per layer.

        Columns: layer, one, other (as "relmax sum"), overlap |A & B| / max(|A|, |B|), jaccard |A & B| / |A | B|, both
        averaged over concepts, and overlap_std. `k`: of the best k only. Samples with a score of 0 or less do not
        count, as they do not use the concept, and concepts without others are left out.
        """
        combos = [(c, a) for c in self.criteria for a in self.aggregates]
        pairs = [
            (one, other)
            for i, one in enumerate(combos)
            for other in combos[i + 1 :]
            if one[0] == other[0] or one[1] == other[1]
        ]
        rows = []
        for layer in layers or self.layers:
            sets = {combo: self._used(self.references(layer, *combo), k or self.k) for combo in combos}
            for one, other in pairs:
                overlap, jaccard = _similarity(sets[one], sets[other])
                figures = (overlap.mean(), jaccard.mean(), overlap.std()) if len(overlap) else (np.nan,) * 3
                rows.append((layer, " ".join(one), " ".join(other), *figures))
        columns = ["layer", "one", "other", "overlap", "jaccard", "overlap_std"]
        return _pandas().DataFrame(rows, columns=columns)

    @staticmethod
    def _used(found: References, k: int) -> list[set[int]]:
        """For each concept the samples among its best k that have a positive score."""
        rows = zip(found.sample[:, :k], found.score[:, :k], strict=True)
        return [set(sample[score > 0].tolist()) for sample, score in rows]

    # --- small things -------------------------------------------------------------------------------------------------

    def _read(self, table: str, **where: Any) -> pandas.DataFrame:
        pa, pq = store.pyarrow()
        filters = [(name, "=", value) for name, value in where.items()] or None
        try:
            return pq.read_table(self.path / f"{table}.parquet", filters=filters).to_pandas()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: damaged index ({error})", hint="build it again") from error

    def _statistics(self, **where: Any) -> pandas.DataFrame:
        if ("relmax", "sum") not in [(c, a) for c in self.criteria for a in self.aggregates]:
            raise QuestionError("statistics of classes need RelMax with sum", hint="build with both in the criteria")
        frame = self._read("classes", **where)
        frame["layer"] = frame["layer"].astype(str)
        return frame

    def _ranked(self, frame: pandas.DataFrame, by: str, ties: list[str], k: int | None) -> pandas.DataFrame:
        if by not in RANKINGS:
            raise QuestionError(f"classes are ranked by {by!r}", hint=f"one of {', '.join(RANKINGS)}")
        column = "top_mean" if by == "top" else "mean"
        if "layer" in frame:
            order = {name: at for at, name in enumerate(self.layers)}
            frame = frame.sort_values(
                [column, *ties],
                ascending=[False] + [True] * len(ties),
                ignore_index=True,
                key=lambda c: c.map(order) if c.name == "layer" else c,
            )
        else:
            frame = frame.sort_values([column, *ties], ascending=[False] + [True] * len(ties), ignore_index=True)
        if "class" in frame:
            frame.insert(1, "name", [self.class_name(int(cls)) for cls in frame["class"]])
        return frame.head(k) if k is not None else frame

    def _named(self, frame: pandas.DataFrame) -> pandas.DataFrame:
        frame = frame.reset_index(drop=True)
        about = self.samples.loc[frame["sample"]]
        for name in ("dataset", "name", "label"):
            column = about[name]
            frame[name] = (column.astype(str) if name == "dataset" else column).to_numpy()
        return frame

    def _check(self, layer: str, criterion: str, aggregate: str) -> None:
        self.layer(layer)
        for what, given, has, known in (
            ("criterion", criterion, self.criteria, tuple(CRITERIA)),
            ("aggregate", aggregate, self.aggregates, AGGREGATES),
        ):
            if given not in has:
                missing = given in known
                raise QuestionError(
                    f"the index was built without {given}" if missing else f"{what} is {given!r}",
                    hint=f"it has {', '.join(has)}",
                )

    def _check_channel(self, layer: str, channel: int) -> None:
        count = self.layer(layer).channels
        if not 0 <= channel < count:
            raise QuestionError(f"layer {layer} has no channel {channel}", hint=f"0 to {count - 1}")


def _similarity(one: Sequence[set[int]], other: Sequence[set[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs of sets: |A & B| over the larger one, and over the union; pairs of empty sets left out."""
    pairs = [(A, B) for A, B in zip(one, other, strict=True) if A or B]
    overlap = np.array([len(A & B) / max(len(A), len(B)) for A, B in pairs])
    return overlap, np.array([len(A & B) / len(A | B) for A, B in pairs])


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise OnnxcrpError("reading an index needs pandas", hint='pip install "onnxcrp[index]"') from None
    return pandas


def summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an index is, as plain JSON values, for people and programs."""
    keys = ("complete", "model", "bypass", "datasets", "samples", "skipped", "negative", "tables", "versions")
    return {"question": manifest["question"], **{key: manifest[key] for key in keys}}
