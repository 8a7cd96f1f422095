"""Reference samples as a picture: what `onnxcrp index show` and `onnxcrp concepts` draw of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcrp.errors import InputError, QuestionError
from onnxcrp.picture import number
from onnxcrp.picture.gallery import TILE, Group, Strip, dimmed, gallery, heatmap_tile, picture_tile
from onnxcrp.picture.signals import pieces_image, signal_tile

if TYPE_CHECKING:
    import pandas
    from PIL import Image

    from onnxcrp.index.query import Index
    from onnxcrp.index.reference import Reference, ReferenceSamples

STYLES = {  # -> what they need
    "full": ("field",),
    "crop": ("field",),
    "heatmap": ("heatmap",),
    "masked": ("heatmap",),
}
CRITERIA = {"relmax": "RelMax", "actmax": "ActMax"}
SIGNAL_TILE = (216, 92)
PIECES = (420, 300)  # of signal pieces over each other
MOST = 24  # concepts in one picture
SCORES = "Above each sample the concept's share of its layer's total there."
COLORS = "Heatmaps: red speaks for the concept, blue against it, each on a scale of its own."
BOXES = "Orange: the receptive field of the concept's strongest neuron."
WHOLE = "The strongest neurons of these concepts see the whole sample."
CROPS = "Crops: the receptive field of the concept's strongest neuron."
MASKS = "Masked: {} where the blurred heatmap exceeds 40 % of its maximum."
PIECES_SAID = "Lines over each other: the receptive fields of the strongest neurons (orange), dark their mean."


def parts_for(styles: Sequence[str]) -> tuple[str, ...]:
    """What `Index.reference_samples` must find for these styles; raises QuestionError for an unknown one."""
    for style in styles:
        if style not in STYLES:
            raise QuestionError(f"style is {style!r}", hint=f"one of {', '.join(STYLES)}")
    return tuple(dict.fromkeys(part for style in styles for part in STYLES[style]))


def figure(index: Index, concepts: Sequence[ReferenceSamples], styles: Sequence[str]) -> Image.Image:
    """One group of strips for each concept; raises InputError for what cannot be drawn, or too much of it."""
    check_count(len(concepts))
    groups = [group(index, found, styles) for found in concepts]
    return gallery(groups, foot=legend(index, concepts, styles))


def check_count(concepts: int) -> None:
    """Raises InputError for more concepts than a picture holds."""
    if concepts > MOST:
        raise InputError(f"{concepts} concepts in one picture", hint=f"at most {MOST}: draw several")


def legend(index: Index, concepts: Sequence[ReferenceSamples], styles: Sequence[str], heatmaps: str = COLORS) -> str:
    """What the figures and colours of these styles mean; `heatmaps`: what is said of those, where there are any."""
    samples = [each for found in concepts for each in found.samples]
    pieces = "crop" in styles and any(each.center is not None for each in samples)
    captioned = not pieces or any(style != "crop" for style in styles)
    words = [SCORES] if captioned and index.manifest["question"]["normalize"] else []
    words += [heatmaps] if "heatmap" in styles or heatmaps != COLORS else []
    if {"full", "crop"} & set(styles):
        boxes = WHOLE if all(map(_everything, samples)) else BOXES if "full" in styles else CROPS
        words.append(PIECES_SAID if pieces else boxes)
    if "masked" in styles:
        words.append(MASKS.format("dark" if any(each.signal is not None for each in samples) else "bright"))
    return " ".join(words)


def group(index: Index, found: ReferenceSamples, styles: Sequence[str]) -> Group:
    """A concept's reference samples, a strip for each style; pieces of signals over each other to their left."""
    of = f", of {short(index.class_name(found.cls))}" if found.cls is not None else ""
    heading = concept_name(found.layer, found.channel)
    note = f"{CRITERIA[found.criterion]}, {found.aggregate}{of}"
    if not found.samples:
        return Group(heading, f"{note}: no sample {'uses' if found.criterion == 'relmax' else 'excites'} it")
    if {"heatmap", "masked"} & set(styles):
        note += f", heatmaps from its {found.start}"
    if served := serves(index, found.layer, found.channel):
        note += f"; serves most: {served}"
    pieces = pieces_of(index, found) if "crop" in styles else None
    return Group(heading, note, captions(index, found), strips(found, styles), lead=pieces)


def concept_name(layer: str, channel: int) -> str:
    """`features.28, channel 102`; `layer 6, channel 3` where the layer's name is a number."""
    return f"{'layer ' if layer[:1].isdigit() else ''}{layer}, channel {channel}"


def serves(index: Index, layer: str, channel: int, k: int = 3) -> str:
    """The classes that a concept serves most, with the mean of their 10 highest scores; empty where not counted."""
    if ("relmax", "sum") not in [(c, a) for c in index.criteria for a in index.aggregates]:
        return ""
    frame = index.classes_served(layer, channel, k)
    found = [(name, mean) for name, mean in zip(frame["name"], frame["top_mean"], strict=True) if mean > 0]
    return ", ".join(f"{short(str(name))} ({score(index, mean)})" for name, mean in found)


def captions(index: Index, found: ReferenceSamples) -> list[tuple[str, str]]:
    """For each sample its class, and its score; what it was explained as, and its dataset, where that differs."""
    several = len(index.manifest["datasets"]) > 1
    return [_caption(index, each, several) for each in found.samples]


def _caption(index: Index, each: Reference, several: bool) -> tuple[str, str]:
    target = short(index.class_name(each.target))
    known = each.label >= 0
    words = [score(index, each.score)]
    words += [f"as {target}"] if known and each.target != each.label else []
    words += [each.dataset] if several else []
    return short(index.class_name(each.label)) if known else f"as {target}", ", ".join(words)


def short(name: str) -> str:
    """A class name without its synonyms."""
    return name.split(",")[0]


def score(index: Index, value: float) -> str:
    """A share where the index is normalized, else a number."""
    return f"{value:.1%}" if index.manifest["question"]["normalize"] else number(value)


# --------------------------------------------------------------------------------------------------------------- tiles


def strips(found: ReferenceSamples, styles: Sequence[str]) -> list[Strip]:
    """A strip for each style; none for crops that show the full samples again.

    The crops of signals are drawn over each other instead, see `pieces_of`.
    """
    skip = found.samples[0].picture is None or ("full" in styles and all(map(_everything, found.samples)))
    wanted = [style for style in styles if style != "crop" or not skip]
    labels = wanted if len(wanted) > 1 else [""] * len(wanted)
    return [
        Strip(label, [tile(each, style) for each in found.samples]) for label, style in zip(labels, wanted, strict=True)
    ]


def tile(each: Reference, style: str, *, side: int = TILE) -> Image.Image:
    """One sample in one style; raises InputError where the input is neither a picture nor a signal."""
    if each.picture is not None:
        if style == "heatmap":
            assert each.heatmap is not None
            return heatmap_tile(each.heatmap, side=side)
        if style == "masked":
            assert each.mask is not None
            return picture_tile(dimmed(each.picture, each.mask), side=side)
        if style == "crop":
            return picture_tile(each.picture[each.box], side=side)
        return picture_tile(each.picture, box=() if _everything(each) else each.box, side=side)
    if each.signal is None:
        raise InputError(f"{each.name}: an input {list(each.x.shape[1:])} cannot be drawn")
    span = None if each.field is None else (each.box[0].start, each.box[0].stop)
    return signal_tile(
        each.signal,
        each.heatmap if style == "heatmap" else None,
        mask=each.mask if style == "masked" else None,
        span_of=span if style == "full" else None,
        size=(SIGNAL_TILE[0], max(SIGNAL_TILE[1], 36 * len(each.signal))),
    )


def _everything(each: Reference) -> bool:
    """Whether the strongest neuron sees the whole sample."""
    seen = each.picture if each.picture is not None else each.signal
    sizes = () if seen is None else seen.shape[:2] if each.picture is not None else seen.shape[1:]
    return all((part.start, part.stop) == (0, size) for part, size in zip(each.box, sizes, strict=False))


def pieces_of(index: Index, found: ReferenceSamples, size: tuple[int, int] = PIECES) -> Image.Image | None:
    """The receptive fields of a concept's reference signals over each other, their strongest neurons aligned."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    for each in found.samples:
        if each.signal is not None and each.center is not None:
            (part,) = each.box
            pieces.append((np.arange(part.start, part.stop) + 0.5 - each.center, each.signal[:, part]))
    if not pieces:
        return None
    tall = max(size[1], 90 * len(pieces[0][1]))
    return pieces_image(pieces, size=(size[0], tall), rate=index.preprocessing.rate)


# --------------------------------------------------------------------------------------------------------------- table


def table(index: Index, frame: pandas.DataFrame) -> list[list[str]]:
    """Reference samples as lines of text: rank, sample, class, target, score, strongest neuron."""
    several = len(index.manifest["datasets"]) > 1
    return [
        [
            str(row["rank"]),
            f"{row['dataset']}/{row['name']}" if several else str(row["name"]),
            short(index.class_name(row["label"])) if row["label"] >= 0 else "",
            f"as {short(index.class_name(row['target']))}" if row["target"] != row["label"] else "",
            score(index, row["score"]),
        ]
        for row in frame.to_dict("records")
    ]
