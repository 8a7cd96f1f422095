"""Samples, targets and conditions -> answers with heatmaps, and figures of them: what `onnxcrp explain` does.

Every target (or start) of a sample is asked without a condition, under each condition, and, where concepts are
ranked, under each of the most relevant ones alone.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp import condition as words
from onnxcrp.condition import TARGET
from onnxcrp.data import ARRAYS, PICTURES, Sample, locate, read_inputs, read_labels
from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.explainer import Explainer
from onnxcrp.picture import Panel, number, panels, save
from onnxcrp.preprocessing import Preprocessing, for_model
from onnxcrp.question import negative
from onnxcrp.relevance import shape_of
from onnxcrp.result import ExplanationWarning, NegativeLogitWarning, Result, as_drawn, plain

if TYPE_CHECKING:
    import onnx
    from PIL import Image

    from onnxcrp.canonize import Canonical
    from onnxcrp.composite import Composite
    from onnxcrp.facts import Facts

MOST_IN_A_FIGURE = 24  # samples
ABSORBED = 0.01  # less of the seed's relevance at the inputs than this is told


# ------------------------------------------------------------------------------------------------- model and samples


def open_model(
    model: str | os.PathLike[str],
    composite: str | os.PathLike[str] = "epsilon_plus_flat",
    *,
    preprocess: str | None = None,
    **options: Any,
) -> tuple[Explainer, Preprocessing]:
    """An Explainer of the file and the preprocessing of its main input; `options` go to the Explainer."""
    from onnxcrp.cache import Cache
    from onnxcrp.canonize import canonize

    cache = Cache.of(options.get("cache"))
    canonical = canonize(model) if cache is None else cache.canonical(model)
    preprocessing = preprocessing_of(canonical, preprocess, model)
    return Explainer(canonical, composite, preprocessing=preprocessing, **options), preprocessing


def classes(explainer: Explainer) -> int | None:
    """How many classes the explained output [B, C, ...] has, where that is static."""
    shape = shape_of(explainer.facts.tensors[explainer.facts.explained])
    return shape[1] if len(shape) > 1 and isinstance(shape[1], int) else None


def ports(canonical: Canonical) -> dict[str, tuple[tuple[Any, ...], np.dtype]]:
    """The model's inputs, the main one first: {name: (shape, dtype)}. That is the first with pictures or signals."""
    found = {t.name: (shape_of(t), np.dtype(t.dtype)) for t in canonical.graph.inputs}
    main = max(found, key=lambda name: (len(found[name][0]) in (3, 4), found[name][1].kind == "f"))
    return {main: found[main], **{name: port for name, port in found.items() if name != main}}


def preprocessing_of(
    canonical: Canonical, preprocess: str | None, model: str | os.PathLike[str] | None
) -> Preprocessing:
    """How pictures become the model's main input; see `preprocessing.for_model`."""
    name, (shape, dtype) = next(iter(ports(canonical).items()))
    return for_model(preprocess, shape, dtype, model, name=f"input {name}")


def read_samples(
    paths: Iterable[str | os.PathLike[str]], preprocessing: Preprocessing, canonical: Canonical
) -> Iterator[Sample]:
    """The samples of these files for this model, one by one; raises InputError."""
    (name, (shape, dtype)), *others = ports(canonical).items()
    return read_inputs(paths, preprocessing, shape, dtype, input_name=name, others=dict(others))


def one_sample(
    path: str | os.PathLike[str] | None, preprocessing: Preprocessing, canonical: Canonical
) -> dict[str, np.ndarray] | None:
    """The one sample of a file as {input: array}, None without a file; raises InputError where there are several."""
    if path is None:
        return None
    samples = read_samples([path], preprocessing, canonical)
    first = next(samples)
    if next(samples, None) is not None:
        raise InputError(f"{path}: holds several samples", hint=f'name one: "{path}[0]"')
    return dict(first.feeds)


def bounded(
    composite: str | os.PathLike[str] | Composite, canonical: Canonical, preprocess: str | None, model: Any
) -> Composite:
    """The composite with black and white for `low` and `high`, where it needs them and the preprocessing is known."""
    from onnxcrp.composite import load

    loaded = load(composite)
    if not loaded.missing:
        return loaded
    preprocessing = preprocessing_of(canonical, preprocess, model)
    known = {name: getattr(preprocessing, name, None) for name in loaded.missing}
    return loaded.with_parameters(**{name: value for name, value in known.items() if value is not None})


def unused_lines(facts: Facts, composite: Composite) -> list[str]:
    """Lines of the user's own composite file that fit no node which relevance passes: `table 1 (line 3) name = x*`."""
    from onnxcrp.ops import OPS

    own = [line for line in composite.lines if line.own]
    if not own:
        return []
    reach = facts.between([facts.explained], None)
    nodes = []
    for node in facts.nodes:
        family = facts.family(node) if node.op in OPS and facts.carries(node) else "rearrangement"
        if family == "rearrangement" or not any(t.name in reach for t in node.outputs):
            continue
        source = facts.canonical.sources.get(node.name, node.op) if family == "dense" else node.op
        about = {"op": node.op, "source_op": source, "family": family}
        nodes.append({**about, "names": facts.names.all_of(node), "depth": facts.depth[node.name]})
    return [line.shown for line in own if not any(line.fits(**node) for node in nodes)]


def warn_of_unused_lines(facts: Facts, composite: Composite) -> None:
    """One ExplanationWarning for all of them."""
    if unused := unused_lines(facts, composite):
        message = f"composite {composite.name}: lines that fit nothing: {'; '.join(unused)}"
        warnings.warn(message, ExplanationWarning, stacklevel=2)


@dataclass(frozen=True)
class ClassNames:
    """What classes are called: line index + offset of the labels."""

    names: Sequence[str] = ()
    offset: int = 0

    @staticmethod
    def of(preprocessing: Preprocessing, path: str | os.PathLike[str] | None, classes: Any) -> ClassNames:
        """From a file, else from the preprocessing; the offset (a background line) counts where the file has it."""
        names = preprocessing.labels if path is None else tuple(read_labels(path))
        offset = preprocessing.label_offset
        if path is not None and isinstance(classes, int):
            if len(names) < classes:
                raise InputError(f"{path}: holds {len(names)} class names, the explained output {classes} classes")
            offset = offset if len(names) == classes + offset else 0
            if len(names) > classes + offset:
                warnings.warn(
                    f"{path}: holds {len(names)} class names, the explained output {classes} classes: "
                    f"the last {len(names) - classes} are not used",
                    ExplanationWarning,
                    stacklevel=2,
                )
        return ClassNames(names, offset)

    def target(self, text: str) -> Any:
        """A target as `condition.parse_target` reads it, or a class by its name, whatever the case; QuestionError."""
        try:
            return words.parse_target(text)
        except QuestionError as error:
            wanted = text.strip().lower()
            known = self.names[self.offset :]
            found = [i for i, name in enumerate(known) if wanted in (name.lower(), name.split(",")[0].strip().lower())]
            if len(found) == 1:
                return found[0]
            if len(found) > 1:
                listed = ", ".join(map(str, found[:6]))
                raise QuestionError(f'target "{text}" names several classes', hint=f"give a number: {listed}") from None
            short = {name.split(",")[0].strip().lower(): name.split(",")[0].strip() for name in known}
            near = difflib.get_close_matches(wanted, short, n=1)
            hint = error.hint
            if near:
                hint = f"did you mean {short[near[0]]!r}?"
            elif known:
                some = ", ".join(list(short.values())[:6])
                hint = f"{hint}, or a class name: {some}{' ...' if len(short) > 6 else ''}"
            elif re.search(r"[^\W\d]", text) and not wanted.startswith("top"):
                hint = f"no class names are known (--labels), so only numbers work: {hint}"
            raise QuestionError(error.message, hint=hint) from None

    def __call__(self, label: Any) -> str:
        """`disc`, `disc + ball`, the label itself where it has no name."""
        if isinstance(label, Mapping):
            text = ""
            for index, weight in label.items():
                factor = "" if abs(weight) == 1 else f"{abs(weight):g} "
                text += ("- " if weight < 0 else "+ " if text else "") + factor + self(index) + " "
            return text.strip()
        if isinstance(label, int) and 0 <= label + self.offset < len(self.names):
            return self.names[label + self.offset].split(",")[0]
        return words.target_text(label)


# ------------------------------------------------------------------------------------------------- questions, answers


@dataclass(frozen=True)
class Questions:
    """What is asked of every sample."""

    targets: Sequence[Any] = ("top",)
    conditions: Sequence[Mapping[str, Any]] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    start_from: str = "activation"
    seed: str | None = None
    bypass: str = "cut"
    top_concepts: Sequence[tuple[str, int]] = ()  # (layer, how many)
    by: str = "relevance"  # or "abs"
    record: Sequence[str] = ()

    @property
    def hidden(self) -> bool:
        """Whether relevance begins at hidden layers and not at a target."""
        return bool(self.starts) and self.start_from != "relevance"


@dataclass(frozen=True)
class Concept:
    """A concept of a layer and its relevance for an answer: R_c, and its share R_c / sum |R| over the concepts."""

    layer: str
    index: int
    relevance: float
    share: float


@dataclass
class Answer:
    """One question's answer. `heatmap`: [H, W] of a picture, [leads, L] of a signal, None for other inputs."""

    target: Any  # class, index tuple or {index: weight}; None for a hidden start
    name: str  # of the target
    value: float | None  # of the explained output at the target
    start: Mapping[str, Any] | None
    condition: Mapping[str, Any]
    concept: Concept | None
    heatmap: np.ndarray | None
    relevance: float  # sum over the input
    recorded: Mapping[str, float] = field(default_factory=dict)  # sum over each recorded layer

    @property
    def label(self) -> str:
        """The condition on one line, else the start, else the target's name."""
        if self.condition:
            return words.text(self.condition)
        return words.text(self.start) if self.start else self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": plain(self.target) if not isinstance(self.target, tuple) else words.target_text(self.target),
            "name": self.name,
            "value": self.value,
            "start": words.text(self.start) if self.start else None,
            "condition": words.text(self.condition) if self.condition else None,
            "concept": vars(self.concept) if self.concept else None,
            "relevance": self.relevance,
            **({"recorded": dict(self.recorded)} if self.recorded else {}),
        }


@dataclass
class Explanation:
    """All answers for one sample, by target: first without a condition, then under each, then concept by concept."""

    sample: Sample
    predictions: list[tuple[int, str, float]]  # class, name, explained output; the largest first
    answers: list[Answer]
    result: Result = field(repr=False)

    @property
    def drawable(self) -> bool:
        """Whether the input is a picture or a signal."""
        x = self.sample.x
        return all(a.heatmap is not None for a in self.answers) and (self.sample.display is not None or x.ndim <= 3)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.sample.name,
            "source": self.sample.source,
            "predictions": [{"class": c, "name": name, "value": value} for c, name, value in self.predictions],
            "answers": [answer.to_dict() for answer in self.answers],
        }


def explain(
    explainer: Explainer,
    samples: Iterable[Sample],
    questions: Questions,
    *,
    layout: str = "",
    names: ClassNames | None = None,
) -> Iterator[Explanation]:
    """Answers sample by sample. `layout`: of the main input, so that channels are summed. Raises QuestionError.

    Warns with NegativeLogitWarning for every target of a sample that is negative, and, once, with ExplanationWarning
    where next to nothing of the relevance arrives at the inputs.
    """
    silent = False
    for sample in samples:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", NegativeLogitWarning
            )  # which counts samples by the call, and may come twice
            found = _explain(explainer, sample, questions, layout, names or ClassNames())
        _warn_of_negative(explainer, found, questions)
        silent = silent or _warn_of_absorbed(explainer, found, questions)
        yield found


def _warn_of_negative(explainer: Explainer, found: Explanation, asked: Questions) -> None:
    """A warning for each target of this sample whose explained output is negative, where that is the seed."""
    if (asked.seed or explainer.composite.seed) != "output":
        return
    values = {a.name: a.value for a in found.answers if a.value is not None and a.value < 0}
    for label, value in values.items():
        message = negative(label, value, found.sample.source, "--seed abs")
        warnings.warn(message, NegativeLogitWarning, stacklevel=3)


def _warn_of_absorbed(explainer: Explainer, found: Explanation, asked: Questions) -> bool:
    """Whether it was told that nearly all relevance of some plain answer is lost on the way, under an LRP composite."""
    from onnxcrp.analysis.balance import GRADIENTS

    composite = explainer.composite
    explained = np.asarray(found.result.explained)[0]
    for place, answer in enumerate(found.answers):
        if answer.target is None or answer.condition or answer.start or answer.concept:
            continue
        begun = abs(_seed(explained, answer.target, asked.seed or composite.seed))
        arrived = sum(_sum(found.result, name, place) for name in explainer.facts.inputs)
        if abs(arrived) < ABSORBED * begun and not any(layer.rule in GRADIENTS for layer in explainer.layers):
            plain_name, paren, given = composite.name.partition("(")
            call = f"{plain_name}({given[:-1]}, bias='drop')" if paren else f"{plain_name}(bias='drop')"
            kept = f'biases absorbed the rest: `onnxcrp verify` itemises it, --composite "{call}" shares it out'
            if composite.bias == "drop":  # outputs whose biases alone make them positive have no share for any input
                kept = "the rest comes to outputs that no input speaks for: `onnxcrp verify` itemises it as stabilizer"
            warnings.warn(
                f"target {answer.name}: only {arrived:.3g} of {begun:.3g} arrives at the inputs, {kept}",
                ExplanationWarning,
                stacklevel=3,
            )
            return True
    return False


def _seed(explained: np.ndarray, target: Any, seed: str) -> float:
    """The sum of what relevance starts with."""
    how = {"output": explained, "abs": np.abs(explained), "one": np.ones_like(explained)}[seed]
    return _value(how, target)


def _sum(result: Result, name: str, place: int) -> float:
    """Of the relevance of an input or a recorded layer, for one question of one sample."""
    R = np.asarray(result.relevance[name])[0]
    return float((R[place] if result.many else R).sum(dtype=np.float64))


def _explain(explainer: Explainer, sample: Sample, asked: Questions, layout: str, names: ClassNames) -> Explanation:
    options: dict[str, Any] = {"seed": asked.seed, "bypass": asked.bypass}
    bases = _bases(explainer, sample, asked)
    concepts = _top_concepts(explainer, sample, asked, bases, options)
    own = [c for c in asked.conditions if TARGET in c]
    questions: list[tuple[Any, Mapping[str, Any] | None, Mapping[str, Any], Concept | None]] = []
    for number_, (target, start) in enumerate(bases):
        questions.append((target, start, {}, None))
        questions += [(target, start, c, None) for c in asked.conditions if TARGET not in c]
        questions += [(target, start, {c.layer: [c.index]}, c) for c in concepts[number_]]
    questions += [(None, None, condition, None) for condition in own]
    result = _ask(explainer, sample, questions, asked, record=asked.record, **options)
    explained = np.asarray(result.explained)[0]
    labels = _labels(result, len(questions))
    answers = []
    for place, ((_, start, condition, concept), target) in enumerate(zip(questions, labels, strict=True)):
        heatmap, total = _heatmap(result, place, layout)
        answers.append(
            Answer(
                target=target,
                name="" if target is None else names(target),
                value=None if target is None else _value(explained, target),
                start=start,
                condition={layer: c for layer, c in condition.items() if layer != TARGET},
                concept=concept,
                heatmap=heatmap,
                relevance=total,
                recorded={name: _sum(result, name, place) for name in asked.record},
            )
        )
    return Explanation(sample, _predictions(explained, names), answers, result)


def _bases(explainer: Explainer, sample: Sample, asked: Questions) -> list[tuple[Any, Mapping[str, Any] | None]]:
    """Every (target, start) that is asked, once; "topK" becomes K classes."""
    if asked.hidden:
        return [(None, start) for start in asked.starts]
    targets: list[Any] = []
    explained: np.ndarray | None = None
    for target in asked.targets:
        if words.top_count(target) is None:
            targets.append(target)
            continue
        if explained is None:
            explained = np.asarray(explainer.explain(sample.feeds, "top", inputs=()).explained)
        found = words.target(target, shape=explained.shape[1:], batch=1, explained=explained)
        targets += [each.labels[0] for each in found]
    targets = [target for at, target in enumerate(targets) if target not in targets[:at]]
    starts: Sequence[Mapping[str, Any] | None] = asked.starts or (None,)
    return [(target, start) for target in targets for start in starts]


def _ask(
    explainer: Explainer,
    sample: Sample,
    questions: Sequence[tuple[Any, Mapping[str, Any] | None, Mapping[str, Any], Any]],
    asked: Questions,
    **options: Any,
) -> Result:
    """One call for all questions; relevance has no axis N where it is a single plain one."""
    given: dict[str, Any] = {}
    if asked.starts:
        given = {"start": [start for _, start, _, _ in questions], "start_from": asked.start_from}
        if None in given["start"]:
            raise QuestionError("a condition with a target of its own (y=...) has no start", hint="ask them apart")
    conditions = [
        condition if target is None else {TARGET: target, **condition} for target, _, condition, _ in questions
    ]
    if len(questions) == 1 and not asked.starts and questions[0][0] is not None:
        return explainer.explain(sample.feeds, questions[0][0], conditions=None, **given, **options)
    return explainer.explain(sample.feeds, conditions=conditions, **given, **options)


def _labels(result: Result, count: int) -> list[Any]:
    """The target of each question, None for hidden starts."""
    if result.targets is None:
        return [None] * count
    row = result.targets[0]
    return [_label(entry) for entry in (row if result.many else [row])]


def _label(entry: Any) -> Any:
    return entry.item() if isinstance(entry, np.generic) else entry


def _value(explained: np.ndarray, target: Any) -> float:
    """Of the explained output (less its batch axis), summed where the target leaves axes open."""
    if isinstance(target, Mapping):
        return float(sum(weight * _value(explained, index) for index, weight in target.items()))
    if explained.ndim == 0:
        return float(explained)
    return float(np.sum(explained[target]))


def _predictions(explained: np.ndarray, names: ClassNames, most: int = 3) -> list[tuple[int, str, float]]:
    if explained.ndim != 1:
        return []
    order = np.argsort(-explained, kind="stable")[:most]
    return [(int(index), names(int(index)), float(explained[index])) for index in order]


def _heatmap(result: Result, place: int, layout: str) -> tuple[np.ndarray | None, float]:
    """The main input's relevance for one question, ready to be drawn, and its sum."""
    if result.image is None:
        return None, 0.0
    R = np.asarray(result.relevance[result.image])[0]
    R = R[place] if result.many else R
    return as_drawn(R, layout), float(R.sum(dtype=np.float64))


# ----------------------------------------------------------------------------------------------------------- concepts


def rank(R: np.ndarray, axis: int, count: int, *, by: str = "relevance") -> list[tuple[int, float, float]]:
    """The `count` most relevant concepts of one sample's R [C, ...]: (concept, R_c, R_c / sum of all |R_c|).

    R_c sums R over every axis but `axis`. by: "relevance" (most positive first) or "abs" (strongest first). Concepts
    without relevance are left out.
    """
    R_c = np.moveaxis(np.asarray(R, np.float64), axis, 0).reshape(R.shape[axis], -1).sum(1)
    total = np.abs(R_c).sum() or 1.0
    order = np.argsort(-(np.abs(R_c) if by == "abs" else R_c), kind="stable")
    return [(int(c), float(R_c[c]), float(R_c[c] / total)) for c in order if R_c[c]][:count]


def parse_top_concepts(explainer: Explainer, text: str, default: int = 5) -> tuple[str, int]:
    """`LAYER` or `LAYER:K` -> (layer, how many); a layer whose own name ends so is taken as it is.

    Raises QuestionError, also for more than the layer has.
    """
    names = explainer.facts.names
    try:
        return names.of(names.resolve(text)), default
    except QuestionError:
        layer, colon, count = text.rpartition(":")
        if not colon:
            raise
    node = names.resolve(layer)
    if not count.isdigit() or int(count) < 1:
        raise QuestionError(f"top concepts {text!r}: {count!r} is no number of concepts", hint=f"{layer}:5")
    most = next((info.channels for info in explainer.layers if info.name == names.of(node)), None)
    if most is not None and int(count) > most:
        raise QuestionError(f"top concepts {text!r}: the layer has {most} concepts only", hint=f"{layer}:{most}")
    return names.of(node), int(count)


def _top_concepts(
    explainer: Explainer,
    sample: Sample,
    asked: Questions,
    bases: Sequence[tuple[Any, Mapping[str, Any] | None]],
    options: Mapping[str, Any],
) -> list[list[Concept]]:
    """For each base the most relevant concepts of every layer asked for."""
    if not asked.top_concepts:
        return [[] for _ in bases]
    layers = {layer.name: layer for layer in explainer.layers}
    for name, _ in asked.top_concepts:
        if name not in layers:
            raise QuestionError(f"layer {name}: no relevance reaches it", hint="onnxcrp inspect lists the layers")
    record = list(dict.fromkeys(name for name, _ in asked.top_concepts))
    result = _ask(explainer, sample, [(*base, {}, None) for base in bases], asked, record=record, inputs=(), **options)
    found = []
    for place in range(len(bases)):
        concepts = []
        for name, count in asked.top_concepts:
            R = np.asarray(result.relevance[name])[0]
            R = R[place] if result.many else R
            axis = layers[name].axis % len(layers[name].shape) - 1
            concepts += [Concept(name, *entry) for entry in rank(R, axis, count, by=asked.by)]
        found.append(concepts)
    return found


# ------------------------------------------------------------------------------------------------------------ figures


def figure(
    explanations: Sequence[Explanation],
    *,
    title: str = "",
    cmap: str = "bwr",
    normalize: str = "each",
    percentile: float | None = None,
    layout: str = "",
    rate: float | None = None,
) -> Image.Image:
    """Input, heatmap, overlay, one panel per condition and per concept: a row per target and sample.

    Raises InputError where an input is neither a picture nor a signal.
    """
    rows = []
    for explanation in explanations:
        groups: list[list[Answer]] = []
        for answer in explanation.answers:
            same = groups and (groups[-1][0].target, groups[-1][0].start) == (answer.target, answer.start)
            if same and (answer.condition or not groups[-1]):
                groups[-1].append(answer)
            else:
                groups.append([answer])
        for group in groups:
            rows += _rows(explanation, group, layout)
    return panels(rows, title=title, cmap=cmap, normalize=normalize, percentile=percentile, rate=rate)


def _rows(explanation: Explanation, group: Sequence[Answer], layout: str) -> list[list[Panel]]:
    """One target's panels; concepts on a line of their own."""
    sample = explanation.sample
    said = [f"{name} {number(value)}" for _, name, value in explanation.predictions[:2]]
    note = f"predicted {', '.join(said)}" if said else ""
    if not explanation.drawable:
        raise InputError(
            f"{sample.source}: an input {list(sample.x.shape[1:])} cannot be drawn", hint="write arrays: -o out.npz"
        )
    shown = [answer for answer in group if answer.concept is None]
    ranked = [answer for answer in group if answer.concept is not None]
    if sample.display is None:
        signal = sample.x.reshape(1, -1) if sample.x.ndim == 2 else sample.x[0].T if layout == "NLC" else sample.x[0]
        row = [Panel(_title(answer, sample), R=answer.heatmap, signal=signal, note=_note(answer)) for answer in group]
        if note:
            row[0] = replace(row[0], note=f"{note} · {row[0].note}")
        return [row]
    row = [Panel(f"input: {sample.name}", picture=sample.display, note=note)]
    for answer in shown:
        label = _spaced(answer.label) if answer.condition else f"heatmap: {_spaced(answer.label)}"
        row.append(Panel(label, R=answer.heatmap, note=_note(answer)))
        if not answer.condition:
            row.append(Panel("overlay", picture=sample.display, R=answer.heatmap, note=" "))
    concepts = [Panel(_spaced(answer.label), R=answer.heatmap, note=_note(answer)) for answer in ranked]
    return [row, concepts] if concepts else [row]


def _title(answer: Answer, sample: Sample) -> str:
    return _spaced(answer.label) if answer.condition else f"{sample.name}: {_spaced(answer.label)}"


def _spaced(label: str) -> str:
    """With blanks where a line may end, so that a title does not break inside a number."""
    label = re.sub(r"(?<=\S)([=+])(?=\S)", r" \1 ", label)
    return re.sub(r",(?=\S)", ", ", label)


def _note(answer: Answer) -> str:
    if answer.concept is not None:
        return f"{answer.concept.share:+.1%} of the layer's relevance"
    if answer.value is None or answer.condition:
        return f"relevance {number(answer.relevance)}"
    return f"output {number(answer.value)}, relevance {number(answer.relevance)}"


# -------------------------------------------------------------------------------------------------------------- files


def stack(explanations: Sequence[Explanation]) -> Result:
    """The results of several samples as one, [B, ...]; raises InputError where they do not go together."""
    results = [_without_targets(explanation.result) for explanation in explanations]
    first = results[0]
    asked = [json.dumps([words.to_json(condition) for condition in result.conditions]) for result in results]
    shapes = [[np.shape(array)[1:] for array in result.relevance.values()] for result in results]
    if len(set(asked)) > 1 or any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "the samples' answers do not fit into one file: their sizes or concepts differ",
            hint="write one file each: -o DIRECTORY",
        )

    def joined(arrays: Iterable[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(array) for array in arrays])

    def together(which: str) -> dict[str, np.ndarray]:
        return {name: joined(getattr(result, which)[name] for result in results) for name in getattr(first, which)}

    targets: Any = None
    if first.targets is not None:
        numbers = all(isinstance(result.targets, np.ndarray) for result in results)
        targets = joined(r.targets for r in results) if numbers else [row for r in results for row in r.targets]
    return replace(
        first,
        relevance=together("relevance"),
        activation=together("activation"),
        outputs=together("outputs"),
        explained=joined(result.explained for result in results),
        targets=targets,
    )


def _without_targets(result: Result) -> Result:
    """Conditions less the targets that were put in: `targets` holds those."""
    return replace(
        result, conditions=[{layer: c for layer, c in each.items() if layer != TARGET} for each in result.conditions]
    )


def keep_inputs(out: str | os.PathLike[str], model: str | os.PathLike[str] = "", inputs: Iterable[Any] = ()) -> None:
    """Raises OnnxcrpError if writing `out` would overwrite the model, its external data or one of the inputs."""
    if not os.path.exists(out):
        return
    reads = [Path(model), *_external_data(Path(model))] if model else []
    for place in map(locate, inputs):
        if place.path.is_dir():
            reads += [p for p in place.path.iterdir() if p.suffix.lower() in (*PICTURES, *ARRAYS)]
        else:
            reads.append(place.path)
    for read in reads:
        if os.path.exists(read) and os.path.samefile(read, out):
            raise OnnxcrpError(f"{os.fspath(out)} would overwrite what is read: {read}", hint="write to another name")


def _external_data(model: Path) -> list[Path]:
    """The files beside a model that hold its weights."""
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception:  # whatever is wrong with it, reading the model says so
        return []
    return [model.parent / location for location in dict.fromkeys(_locations(proto.graph))]


def _locations(graph: onnx.GraphProto) -> Iterator[str]:
    """The locations of external data in a graph and its subgraphs."""
    tensors = list(graph.initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        tensors += [attribute.t, *attribute.tensors]
        for inner in (attribute.g, *attribute.graphs):
            yield from _locations(inner)
    yield from (e.value for tensor in tensors for e in tensor.external_data if e.key == "location")


def write_both(
    explanation: Explanation,
    folder: Path,
    taken: set[str],
    *,
    keep: Callable[[Path], None] = lambda path: None,
    **drawing: Any,
) -> list[Path]:
    """NAME.npz and, where the input can be drawn, NAME.png in a folder that is made; names that are `taken` get ~2.

    `keep` is called with each path before it is written, and raises where that must stay.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxcrpError(f"cannot make the folder {folder}: {error.strerror}") from None
    stem = re.sub(r"[^\w.\[\]-]", "_", explanation.sample.name)
    name = next(n for n in itertools.chain([stem], (f"{stem}~{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    written = [folder / f"{name}.npz"]
    for suffix in (".npz", ".png") if explanation.drawable else (".npz",):
        keep(folder / f"{name}{suffix}")
    stack([explanation]).save(written[0])
    if explanation.drawable:
        written.append(save(figure([explanation], **drawing), folder / f"{name}.png"))
    return written


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz, written under a temporary name; raises OnnxcrpError."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OnnxcrpError(f"cannot write {path}: {error.strerror}", hint="does the folder exist?") from None
