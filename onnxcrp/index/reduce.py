"""From samples to scores: one run of one relevance model per batch, all layers and criteria together.

Sums, maxima and positions over a concept's neurons are computed inside the graph, so that only arrays [B, C] leave the
device. Score of concept c, with T its sum or maximum of relevance or activation (CRP Eq. 35): T_c / sum_c' |T_c'|.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxcrp.errors import OnnxcrpError, QuestionError
from onnxcrp.index.state import Rows

if TYPE_CHECKING:
    from onnxcrp.explainer import Explainer

CRITERIA = {"relmax": "relevance", "actmax": "activation"}
AGGREGATES = ("sum", "max")
LINEAR = ("convolution", "dense")
STREAMS = 4  # runs at once on a CPU, at most: each needs memory for a batch
ON_DEVICE = 2  # on a GPU: one computes while the scores of the other are fetched and sorted in


@dataclass(frozen=True)
class LayerRow:
    """A layer of an index; `shape` is that of one sample, `axis` its concepts' axis therein, `C` their number."""

    name: str
    op: str
    channels: int
    shape: tuple[int, ...]
    axis: int


@dataclass
class Scores:
    """What one run found: {criterion: {layer: rows}}, and what was wrong with a sample."""

    rows: dict[str, dict[str, Rows]]
    bad: dict[int, str]  # sample -> why none of its rows are here
    negative: int
    count: int  # rows of relevance, of activation where there is none
    explained: np.ndarray  # float32 [B, classes]


def choose_layers(explainer: Explainer, patterns: str | Sequence[str] | None) -> list[str]:
    """Layer names for globs, in execution order; by default every Conv, Gemm and MatMul but the output's.

    Raises QuestionError for a pattern that fits none.
    """
    facts = explainer.facts
    below = facts.between([facts.explained], None)
    known = {layer.name: layer for layer in explainer.layers}
    if patterns is None:
        linear = [layer.name for layer in explainer.layers if layer.family in LINEAR]
        found = [name for name in linear if not _only_rearranged(facts, facts.names.resolve(name))]
        if not found:
            raise QuestionError("the model has no linear layer below its output", hint="name the layers to index")
        return found
    wanted: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        nodes = [node for node in facts.names.glob(pattern) if node.outputs[0].name in below]
        names = {facts.names.of(node) for node in nodes} or {facts.names.of(facts.names.resolve(pattern))}
        wanted |= names & known.keys()
        if not names & known.keys():
            raise QuestionError(f"layer {pattern!r} does not lie between the inputs and the explained output")
    return [name for name in known if name in wanted]


def _only_rearranged(facts: Any, node: Any) -> bool:
    """Whether a node's output becomes the explained one without another layer's help: an output layer."""
    tensors, seen = [node.outputs[0].name], set()
    while tensors:
        name = tensors.pop()
        if name == facts.explained:
            return True
        for reader in facts.readers.get(name, []):
            family = facts.family(reader) if facts.carries(reader) else ""
            if family in ("rearrangement", "scale") and reader.name not in seen:
                seen.add(reader.name)
                tensors.extend(t.name for t in reader.outputs)
    return False


class Reducer:
    """The relevance model of an index and its sessions.

    `target`: "label", "predicted", "top<K>" or "all". Raises QuestionError where the model has no classes.
    """

    def __init__(
        self,
        explainer: Explainer,
        layers: Sequence[str],
        *,
        criteria: Sequence[str],
        aggregate: Sequence[str],
        target: str,
        normalize: bool,
        batch_size: int,
        providers: Any = None,
        threads: int | None = None,
    ) -> None:
        from onnxcrp import blocked
        from onnxcrp.backward import compile
        from onnxcrp.session import metadata, on_cpu

        self.explainer, self.layers, self.normalize = explainer, list(layers), normalize
        self.criteria, self.aggregate, self.batch_size = tuple(criteria), tuple(aggregate), batch_size
        self.classes = class_count(explainer)
        self.target = target
        self.most = targets_per_sample(target, self.classes)
        models = explainer._models
        self.fixed = models.fixed
        self.input = next(iter(models.inputs))
        options: dict[str, Any] = {"output": explainer.facts.output, **models._compile_options, "inputs": ()}
        start = partial(blocked.start, providers=providers, optimize=models.optimization)
        relevance = compile(
            explainer.canonical,
            explainer.composite,
            record=self.layers if "relmax" in criteria else (),
            activations=self.layers if "actmax" in criteria else (),
            reduce=(*self.aggregate, "argmax"),
            **options,
        )
        about = metadata(relevance)
        names = json.loads(about["onnxcrp.map"])
        self.outputs: dict[str, dict[str, str]] = names["reduced"]  # layer -> "relevance.sum" -> output
        self.explained: str = names["explained"]
        self.shares_forward = bool(json.loads(about["onnxcrp.facts"])["shares_forward"])
        self.target_input: str = names["target"]
        if target == "predicted":
            _predict_inside(relevance, self.target_input, self.explained)
        self.streams, each = streams(threads) if on_cpu(providers) else (ON_DEVICE, threads)
        self.session = start(relevance, threads=each)
        self.forward = None
        if self.most > 1 and target != "all":
            plain = compile(explainer.canonical, explainer.composite, **options)
            self.forward = start(plain, threads=threads)

    def runs(self, samples: np.ndarray, x: np.ndarray, labels: np.ndarray) -> Iterator[Callable[[], Scores]]:
        """Scores of samples [B] with inputs x [B, ...] and labels [B]: the runs that find them, for any thread."""
        step = self.fixed or len(x)
        for at in range(0, len(x), step):
            part = slice(at, at + step)
            if self.most == 1:
                targets = None if self.target == "predicted" else labels[part]
                yield partial(self._run, samples[part], x[part], targets)
            else:
                yield from self._runs_of_several(samples[part], x[part])

    def _runs_of_several(self, samples: np.ndarray, x: np.ndarray) -> Iterator[Callable[[], Scores]]:
        """Runs over several targets of each sample."""
        if self.target == "all":
            chosen = np.broadcast_to(np.arange(self.classes), (len(x), self.classes))
        else:
            assert self.forward is not None
            ones = np.zeros((1, self.classes), np.float32)
            feeds = {self.input: self._filled(x)} | (
                {self.target_input: ones} if self.target_input in self.forward.inputs else {}
            )
            explained = self.forward.run(feeds, [self.explained])[self.explained][: len(x)]
            chosen = np.argsort(-explained, axis=1, kind="stable")[:, : self.most]
        for row in range(len(x)):
            sample, one = samples[row : row + 1], x[row : row + 1]
            for at in range(0, self.most, self.batch_size):
                targets = chosen[row, at : at + self.batch_size]
                if self.shares_forward and not self.fixed:
                    yield partial(self._run, sample, one, targets, first=at == 0)
                    continue
                width = self.fixed or len(targets)
                for start in range(0, len(targets), width):
                    part = targets[start : start + width]
                    several = np.repeat(one, len(part), axis=0)
                    yield partial(self._run, sample, several, part, first=at + start == 0)

    def _run(self, samples: np.ndarray, x: np.ndarray, targets: np.ndarray | None, *, first: bool = True) -> Scores:
        return self._scores(samples, targets, self._ask(x, targets), first=first)

    def _filled(self, x: np.ndarray) -> np.ndarray:
        """The last sample repeated up to a fixed batch."""
        missing = (self.fixed or 0) - len(x)
        return x if missing <= 0 else np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

    def _ask(self, x: np.ndarray, targets: np.ndarray | None) -> dict[str, np.ndarray]:
        feeds = {self.input: self._filled(x)}
        if self.target_input in self.session.inputs:
            assert targets is not None
            seeds = np.zeros((max(len(targets), self.fixed or 0), self.classes), np.float32)
            seeds[np.arange(len(targets)), targets] = 1
            feeds[self.target_input] = seeds
        wanted = [self.explained, *(name for of_layer in self.outputs.values() for name in of_layer.values())]
        return self.session.run(feeds, list(dict.fromkeys(wanted)))

    def _scores(
        self, samples: np.ndarray, targets: np.ndarray | None, found: Mapping[str, np.ndarray], *, first: bool
    ) -> Scores:
        """Rows of one run: as many as targets; of activations as many as samples, and only at the `first` run."""
        explained = found[self.explained][: len(samples)]
        if targets is None:
            targets = explained.argmax(axis=1)
        targets = targets.astype(np.int32)
        of_row = np.broadcast_to(samples, len(targets))
        logits = explained[np.arange(len(targets)) if len(explained) == len(targets) else 0, targets]
        rows: dict[str, dict[str, Rows]] = {}
        bad: dict[int, str] = {}
        for criterion in self.criteria:
            kind = CRITERIA[criterion]
            if criterion == "actmax" and not first:
                continue
            sample, target = (of_row, targets) if criterion == "relmax" else (samples, targets[: len(samples)])
            rows[criterion] = {}
            for layer in self.layers:
                outputs = self.outputs[layer]
                score = {how: self._normalized(found[outputs[f"{kind}.{how}"]], len(sample)) for how in self.aggregate}
                for each in score.values():
                    for at in np.flatnonzero(~np.isfinite(each).all(axis=1)):
                        bad.setdefault(int(sample[at]), f"{kind} of {layer} is not finite")
                position = found[outputs[f"{kind}.argmax"]].astype(np.int32)[: len(sample)]
                position = np.broadcast_to(position, (len(sample), position.shape[1]))
                rows[criterion][layer] = Rows(score, position, sample, target)
        if bad:
            rows = {c: {n: _without(each, bad) for n, each in of_layer.items()} for c, of_layer in rows.items()}
        return Scores(rows, bad, int((logits < 0).sum()), len(targets), explained)

    def _normalized(self, score: np.ndarray, rows: int) -> np.ndarray:
        """[B, C] -> float32 [rows, C], divided by the sum of magnitudes over C; all zero stays zero."""
        score = score[:rows]
        if self.normalize:
            with np.errstate(invalid="ignore", over="ignore"):
                exact = score.astype(np.float64)
                total = np.abs(exact).sum(axis=1, keepdims=True)
                score = (exact / np.where(total == 0, 1, total)).astype(np.float32)
        return np.broadcast_to(score, (rows, score.shape[1]))


def _without(rows: Rows, bad: Mapping[int, str]) -> Rows:
    """The rows of all other samples."""
    kept = ~np.isin(rows.sample, list(bad))
    score = {how: each[kept] for how, each in rows.score.items()}
    return Rows(score, rows.position[kept], rows.sample[kept], rows.target[kept])


def streams(threads: int | None) -> tuple[int, int]:
    """How many runs at once on so many threads of a CPU (None: its cores), and threads of each.

    Two runs on one thread each keep both busy, where two threads of one run wait for each other at every node.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = threads or cores
    return min(most, STREAMS), max(1, most // STREAMS)


def class_count(explainer: Explainer) -> int:
    """Entries of the explained output [B, classes]; raises QuestionError where it is something else."""
    shape = explainer._models.explained_shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise QuestionError(
            f"an index needs class scores [B, classes], the explained output has shape {list(shape)}",
            hint="choose another one with `output`",
        )
    return shape[1]


def targets_per_sample(target: str, classes: int) -> int:
    """How many targets "label", "predicted", "top3" or "all" mean; raises QuestionError for another word."""
    if target in ("label", "predicted"):
        return 1
    if target == "all":
        return classes
    if target.startswith("top") and target[3:].isdigit() and 1 <= int(target[3:]) <= classes:
        return int(target[3:])
    raise QuestionError(f"target is {target!r}", hint=f"label, predicted, top1 .. top{classes}, or all")


def describe_layers(explainer: Explainer, layers: Sequence[str], x: np.ndarray) -> list[LayerRow]:
    """The layers with shapes as they are for inputs like x [1, ...]."""
    known = {layer.name: layer for layer in explainer.layers}
    shapes = {name: known[name].shape[1:] for name in layers}
    if any(not isinstance(d, int) for shape in shapes.values() for d in shape):
        found = explainer.explain(x, target=0, record=list(layers), inputs=(), seed="one")
        shapes = {name: found.activation[name].shape[1:] for name in layers}
    rows = []
    for name in layers:
        shape, axis = tuple(int(str(d)) for d in shapes[name]), known[name].axis - 1
        rows.append(LayerRow(name, known[name].op, shape[axis], shape, axis))
    return rows


def _predict_inside(model: onnx.ModelProto, target: str, explained: str) -> None:
    """Replace the input `target` by the one-hot maximum of `explained`, so that no forward pass goes before."""
    graph = model.graph
    source = next(node.input[0] for node in graph.node if list(node.output) == [explained])
    made = next((at for at, node in enumerate(graph.node) if source in node.output), -1)
    first = next((at for at, node in enumerate(graph.node) if target in node.input), len(graph.node))
    if made >= first:
        raise OnnxcrpError("the relevance model uses its target before the output is known")
    kept = [port for port in graph.input if port.name != target]
    del graph.input[:]
    graph.input.extend(kept)
    prefix = f"{target}.predicted"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1], np.float32), f"{prefix}/values"))
    nodes = [
        onnx.helper.make_node("ArgMax", [source], [f"{prefix}/argmax"], axis=1, keepdims=0),
        onnx.helper.make_node("Shape", [source], [f"{prefix}/classes"], start=1),
        onnx.helper.make_node("Squeeze", [f"{prefix}/classes"], [f"{prefix}/depth"]),
        onnx.helper.make_node("OneHot", [f"{prefix}/argmax", f"{prefix}/depth", f"{prefix}/values"], [target], axis=-1),
    ]
    rest = list(graph.node[first:])
    del graph.node[first:]
    graph.node.extend([*nodes, *rest])
