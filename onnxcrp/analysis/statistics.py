"""What `onnxcrp index stats` says: tables of an index, as text and as JSON values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcrp.analysis.gallery import score, short

if TYPE_CHECKING:
    import pandas

    from onnxcrp.index.query import Index

TITLES = {
    "class": "class",
    "name": "",
    "layer": "layer",
    "channel": "channel",
    "count": "samples",
    "mean": "mean",
    "deviation": "+-",
    "top_mean": "mean of top 10",
}


@dataclass(frozen=True)
class Table:
    """A titled frame; `columns` and `rows` are its text."""

    name: str
    title: str
    frame: pandas.DataFrame
    columns: list[str]
    rows: list[list[str]]


def tables(
    index: Index,
    layer: str | None = None,
    channel: int | None = None,
    cls: int | None = None,
    *,
    retrieve: bool = False,
    by: str | None = None,
    k: int = 10,
) -> list[Table]:
    """What is asked: of a concept, a class, both, a layer, or the index as a whole; raises QuestionError."""
    if layer is not None and channel is not None:
        return _of_concept(index, layer, channel, cls, retrieve=retrieve, by=by or "top", k=k)
    if cls is not None:
        frame = index.concepts_used(cls, layer, k, by=by or "mean")
        where = f" in {layer}" if layer else ""
        return [_statistics(index, "concepts", f"Concepts that {index.class_name(cls)} uses most{where}", frame)]
    if layer is not None:
        return [_of_layer(index, layer, by=by or "top", k=k)]
    return _of_index(index)


def to_json(index: Index, found: list[Table]) -> dict[str, Any]:
    """{table: records}, of the index as a whole also its summary."""
    from onnxcrp.index.query import summary

    content: dict[str, Any] = {table.name: table.frame.to_dict("records") for table in found}
    return content | ({"index": summary(index.manifest)} if "layers" in content else {})


def _of_concept(
    index: Index, layer: str, channel: int, cls: int | None, *, retrieve: bool, by: str, k: int
) -> list[Table]:
    concept = f"{layer} channel {channel}"
    if cls is not None:
        frame = index.classes_served(layer, channel, None, by=by)
        frame = frame[frame["class"] == cls].reset_index(drop=True)
        return [_statistics(index, "classes", f"{concept} for {index.class_name(cls)}", frame)]
    if not retrieve:
        frame = index.classes_served(layer, channel, k, by=by)
        return [_statistics(index, "classes", f"Classes that {concept} serves most", frame)]
    found = index.retrieve(layer, channel, k, by=by)
    samples = found.samples
    rows = [
        [str(row.sample), _title(index, row), short(index.class_name(int(row.target))), score(index, row.score)]
        for row in samples.itertuples()
    ]
    return [
        _statistics(index, "classes", f"Classes that {concept} drives", found.classes),
        Table(
            "samples", f"Samples that {concept} drives", samples, ["sample", "", "explained as", "share of it"], rows
        ),
    ]


def _of_layer(index: Index, layer: str, *, by: str, k: int) -> Table:
    """The class that each concept of a layer serves most, the most one-sided concepts first."""
    column = "top_mean" if by == "top" else "mean"
    frame = index.statistics(layer)
    frame = frame.sort_values([column, "class", "channel"], ascending=[False, True, True])
    frame = frame.drop_duplicates("channel").head(k).reset_index(drop=True)
    frame.insert(2, "name", [index.class_name(int(cls)) for cls in frame["class"]])
    return _statistics(index, "concepts", f"The class that each concept of {layer} serves most", frame)


def _statistics(index: Index, name: str, title: str, frame: pandas.DataFrame) -> Table:
    shown = frame.assign(deviation=frame["variance"] ** 0.5)
    used = [column for column in TITLES if column in shown and not (column == "layer" and shown[column].nunique() == 1)]
    rows = []
    for row in shown[used].to_dict("records"):
        scores = {key: score(index, row[key]) for key in ("mean", "deviation", "top_mean")}
        named = {"name": short(str(row["name"]))} if "name" in row else {}
        rows.append([str({**row, **named, **scores}[column]) for column in used])
    return Table(name, title, frame, [TITLES[column] for column in used], rows)


def _title(index: Index, row: Any) -> str:
    """A sample's name, with its dataset where there are several."""
    return f"{row.dataset}/{row.name}" if len(index.manifest["datasets"]) > 1 else str(row.name)


def _of_index(index: Index) -> list[Table]:
    """Settings, layers, datasets, and what was skipped."""
    import pandas

    question = index.manifest["question"]
    settings = {
        "model": index.manifest["model"]["path"] or "(in memory)",
        "composite": question["composite"],
        "target": question["target"],
        "criteria": f"{', '.join(question['criteria'])}; {', '.join(question['aggregate'])}",
        "samples": f"{index.manifest['samples']}, best {question['k']} of each concept",
        "complete": "yes" if index.manifest["complete"] else "no, a part of the data",
    }
    layers = pandas.DataFrame(
        [{"layer": r.name, "op": r.op, "channels": r.channels, "shape": list(r.shape)} for r in index.layers.values()]
    )
    datasets = pandas.DataFrame(index.manifest["datasets"])[["name", "kind", "samples", "labels", "source"]]
    skipped = index.skipped[["sample", "reason"]]
    found = [
        _plain("settings", str(index.path), pandas.DataFrame({"what": settings.keys(), "value": settings.values()})),
        _plain("layers", "Layers", layers),
        _plain("datasets", "Datasets", datasets),
    ]
    return [*found, _plain("skipped", "Skipped", skipped)] if len(skipped) else found


def _plain(name: str, title: str, frame: pandas.DataFrame) -> Table:
    columns = [] if name == "settings" else list(frame.columns)
    return Table(name, title, frame, columns, [[str(cell) for cell in row] for row in frame.to_numpy().tolist()])
