"""One prediction in concepts: which ones carried it, where in the input, and the samples that show what they are.

Local (a heatmap for each concept) and global (its reference samples) at once: "glocal" (CRP paper, Fig. 1 and 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.analysis import gallery as drawing
from onnxcrp.analysis.explanation import Answer, ClassNames, Concept, Explanation, Questions, explain
from onnxcrp.errors import InputError, QuestionError
from onnxcrp.picture import number
from onnxcrp.picture.gallery import Group, Strip, gallery, heatmap_tile, picture_tile
from onnxcrp.picture.signals import signal_tile

if TYPE_CHECKING:
    from PIL import Image

    from onnxcrp.data import Sample
    from onnxcrp.explainer import Explainer
    from onnxcrp.index.query import Index
    from onnxcrp.index.reference import ReferenceSamples

SIDE = 224  # of the input and its heatmap
LEAD = 174  # of a concept's heatmap
SIGNAL = (560, 150)
COLORS = (
    "Heatmaps: red speaks for the class, blue against it, each on a scale of its own. Beside each channel its share "
    "R_c / sum |R_c| of the layer's relevance for the class, the bars relative to the largest."
)
OVERLAID = (330, 190)  # of signal pieces over each other


@dataclass(frozen=True)
class Used:
    """A concept that carried a prediction: what it gave, where, and its reference samples."""

    concept: Concept
    answer: Answer
    references: ReferenceSamples


@dataclass(frozen=True)
class Glocal:
    """One prediction: the answer for its target, and the concepts that carried it, layer by layer."""

    explanation: Explanation
    concepts: list[Used]

    @property
    def answer(self) -> Answer:
        """For the target, without a condition."""
        return self.explanation.answers[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = self.explanation.to_dict()
        return {
            **{key: about[key] for key in ("name", "source", "predictions")},
            "target": self.answer.to_dict(),
            "concepts": [
                {**vars(used.concept), "references": used.references.frame.to_dict("records")} for used in self.concepts
            ],
        }


def glocal(
    explainer: Explainer,
    sample: Sample,
    index: Index,
    layers: Sequence[tuple[str, int]],
    *,
    target: Any = "top",
    by: str = "relevance",
    k: int = 6,
    criterion: str = "relmax",
    aggregate: str = "sum",
    same_class: bool = False,
    start: str | None = None,
    styles: Sequence[str] = ("masked",),
) -> Glocal:
    """The most relevant concepts of each (layer, how many) for one target, with `k` reference samples each.

    `explainer`: as `index.explainer(model)` gives it. `same_class`: reference samples of the explained class alone.
    `start`: where their heatmaps begin.
    Raises QuestionError for layers that the index lacks and for a target that is not one class, InputError.
    """
    for layer, _ in layers:
        index.layer(layer)
    names = ClassNames(index.manifest["class_names"], index.manifest["label_offset"])
    sample = replace(sample, input=sample.input or next(iter(explainer.inputs)))  # one of the index has no name
    questions = Questions(targets=[target], top_concepts=layers, by=by, bypass=index.manifest["bypass"])
    found = next(explain(explainer, [sample], questions, layout=index.preprocessing.layout, names=names))
    if len({answer.name for answer in found.answers}) > 1:
        raise QuestionError(f"target {target} is several", hint='one class, or "top"')
    cls = found.answers[0].target
    if same_class and not isinstance(cls, int):
        raise QuestionError(f"target {found.answers[0].name} is no single class, so it has no reference samples")
    concepts = []
    for answer in found.answers:
        if answer.concept is None:
            continue
        references = index.reference_samples(
            answer.concept.layer,
            answer.concept.index,
            criterion,
            aggregate,
            cls=cls if same_class else None,
            k=k,
            start=start,
            parts=drawing.parts_for(styles),
            explainer=explainer,
        )
        concepts.append(Used(answer.concept, answer, references))
    return Glocal(found, concepts)


def figure(index: Index, found: Glocal, styles: Sequence[str]) -> Image.Image:
    """The input and its heatmap, below them each concept: share, heatmap, reference samples; raises InputError."""
    explanation, answer = found.explanation, found.answer
    if not explanation.drawable:
        raise InputError(
            f"{explanation.sample.source}: an input {list(explanation.sample.x.shape[1:])} cannot be drawn"
        )
    said = ", ".join(f"{drawing.short(name)} {number(value)}" for _, name, value in explanation.predictions)
    first = Group(
        f"{explanation.sample.name}: why {answer.name}?",
        f"predicted {said}" if said else "",
        [("input", ""), ("relevance", f"sum {number(answer.relevance)}"), ("both", "")],
        [Strip("", _views(index, explanation, answer))],
    )
    most = max((abs(used.concept.share) for used in found.concepts), default=0) or 1.0
    groups = [first, *(_group(index, explanation, used, styles, most) for used in found.concepts)]
    return gallery(groups, foot=drawing.legend(index, [used.references for used in found.concepts], styles, COLORS))


def _views(index: Index, explanation: Explanation, answer: Answer) -> list[Image.Image]:
    """The input and its heatmap."""
    sample = explanation.sample
    assert answer.heatmap is not None
    if sample.display is not None:
        picture = sample.display
        return [
            picture_tile(picture, side=SIDE),
            heatmap_tile(answer.heatmap, side=SIDE),
            heatmap_tile(answer.heatmap, picture, side=SIDE),
        ]
    signal = _signal(index, sample)
    return [signal_tile(signal, size=SIGNAL), signal_tile(signal, answer.heatmap, size=SIGNAL)]


def _signal(index: Index, sample: Sample) -> np.ndarray:
    from onnxcrp.result import as_drawn

    found = as_drawn(sample.x[0], index.preprocessing.layout)
    assert found is not None
    return found


def _group(index: Index, explanation: Explanation, used: Used, styles: Sequence[str], most: float) -> Group:
    """One concept's line."""
    sample, concept = explanation.sample, used.concept
    heatmap = used.answer.heatmap
    assert heatmap is not None
    title = f"{drawing.concept_name(concept.layer, concept.index)}: {concept.share:+.1%}"
    served = drawing.serves(index, concept.layer, concept.index)
    note = f"serves most: {served}" if served else ""
    references = used.references
    strips = drawing.strips(references, styles) if references.samples else []
    captions = drawing.captions(index, references)
    if sample.display is not None:
        lead = heatmap_tile(heatmap, sample.display, side=LEAD)
    else:
        lead = signal_tile(_signal(index, sample), heatmap, size=SIGNAL)
        if "crop" in styles and (pieces := drawing.pieces_of(index, references, OVERLAID)):
            strips, captions = [Strip("", [pieces]), *strips], []
    return Group(
        title,
        note,
        captions,
        strips,
        lead,
        ("what it saw here", f"R_c {number(concept.relevance)}"),
        concept.share / most,
    )
