"""Does what must be true hold for this model? The library function behind `onnxcrp verify`.

- canonical outputs: the canonical model computes what the original does;
- conservation: what every layer receives is what the layers above it send, by `balance.py` and not by the relevance
  model's own transposes; what biases, stabilizer and padding keep is itemised, cancellation at signed Adds reported;
- conditional sums: over a partition of a layer's concepts the conditional relevances add up;
- float64 (on request): the relevance model evaluated in double gives the same relevance;
- against (on request): the difference to the relevance of the float model that a quantized one was made of;
- spread bias (on request): what biases keep is given back to the layers' inputs, so that the sum is conserved.

A check that does not apply says why; a tolerance says where it comes from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.analysis.balance import (
    GRADIENTS,
    LOSSES,
    NOT_ITEMISED,
    NOT_LINEAR,
    Balance,
    Layer,
    balance,
    relative,
    spread,
)
from onnxcrp.errors import InputError, ModelError, QuestionError, UnsupportedError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from onnxcrp.analysis.against import Comparison
    from onnxcrp.canonize import Canonical
    from onnxcrp.explainer import Explainer
    from onnxcrp.facts import Facts

OUTPUTS_TOLERANCE = 1e-5
OUTPUTS_REASON = "float32 rounding: folding BatchNorm and constants changes the last bits of weights"
STEP_REASON = "quantized outputs may differ by one step where a value lies between two"
SUM_TOLERANCE = 1e-5
SUM_REASON = "float32 rounding of sums, relative to the magnitudes that are summed"
PARTS_TOLERANCE = 1e-4
PARTS_REASON = "float32 rounding, relative to the norms of the parts"
FLOAT64_TOLERANCE = 1e-4
HIDDEN_TOLERANCE = 1e-3
FLOAT64_REASON = "float32 rounding through the whole net; hidden layers may have 10 times as much"


@dataclass
class Check:
    """One statement: whether it holds (None: it does not apply), the figure, what it may be at most and why."""

    name: str
    ok: bool | None
    detail: str
    figure: float | None = None
    tolerance: float | None = None
    reason: str = ""


@dataclass
class Flow:
    """Relevance at one layer: what it receives, what it sends on, what it loses, and what is not explained by that.

    `received` and `sent` are sums over the tensor; `unexplained` is received less what the layers above send to it.
    `cancellation`: (|R1| + |R2|) / |R| where the layer is a sum of several tensors; `rounding`: the relative error that
    float32 brings in here, estimated.
    """

    layer: str
    op: str
    rule: str
    received: float
    sent: float
    losses: dict[str, float] = field(default_factory=dict)
    unexplained: float = 0.0
    tolerance: float = 0.0
    cancellation: float | None = None
    rounding: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether what is not explained is rounding."""
        return abs(self.unexplained) <= self.tolerance


@dataclass
class Table:
    """A table to print: titles of the columns, rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Report:
    """All that was found; `ok` unless something does not hold."""

    model: str
    composite: str
    target: str
    checks: list[Check] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    spread: dict[str, np.ndarray] = field(default_factory=dict)
    comparison: Comparison | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that applies holds."""
        return all(check.ok is not False for check in self.checks)

    @property
    def losses(self) -> dict[str, float]:
        """What all layers together lose, by kind."""
        return {kind: sum(flow.losses.get(kind, 0.0) for flow in self.flows) for kind in LOSSES}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; of spread relevance only the sums."""
        return {
            "ok": self.ok,
            "model": self.model,
            "composite": self.composite,
            "target": self.target,
            "checks": [_plain(vars(check)) for check in self.checks],
            "losses": _plain(self.losses),
            "layers": [_plain({**vars(flow), "ok": flow.ok}) for flow in self.flows],
            "against": None
            if self.comparison is None
            else {
                "model": self.comparison.model,
                "differences": [_plain(vars(each)) for each in self.comparison.differences],
                "no_counterpart": self.comparison.only_here,
            },
            "spread": {name: _plain(float(R.sum())) for name, R in self.spread.items()},
        }

    def tables(self) -> list[Table]:
        """The checks, and relevance layer by layer from the explained output down."""
        marks = {True: "holds", False: "FAILS", None: "-"}
        checks = [
            [check.name, marks[check.ok], _number(check.figure), _number(check.tolerance), check.detail]
            for check in self.checks
        ]
        tables = [Table("Checks", ["check", "", "figure", "at most", "what was found"], checks)]
        if self.flows:
            kinds = [kind for kind in LOSSES if any(flow.losses.get(kind) for flow in self.flows)]
            columns = ["layer", "op", "rule", "receives", "sends", *kinds, "unexplained", "|R1|+|R2| / |R|"]
            rows = [
                [
                    flow.layer,
                    flow.op,
                    flow.rule,
                    _number(flow.received),
                    _number(flow.sent),
                    *(_number(flow.losses.get(kind)) for kind in kinds),
                    _number(flow.unexplained) + ("" if flow.ok else " !"),
                    _number(flow.cancellation),
                ]
                for flow in self.flows
            ]
            tables.append(Table("Conservation", columns, rows))
        if self.comparison is not None:
            columns = ["layer", "op", "relative L2", "cosine", "sum", "sum, float"]
            rows = [
                [d.layer, d.op, *map(_number, (d.relative_l2, d.cosine, d.total, d.total_float))]
                for d in self.comparison.differences
            ]
            tables.append(Table(f"Relevance against {self.comparison.model or 'the float model'}", columns, rows))
        return tables


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """JSON has no infinities: they become text."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


# ------------------------------------------------------------------------------------------------------------- verify


def verify(
    model: Any,
    x: Any = None,
    *,
    composite: Any = "epsilon_plus_flat",
    target: Any = "top",
    output: str | None = None,
    keep_head: bool = False,
    layer: str | None = None,
    parts: int = 4,
    float64: bool = False,
    spread_bias: bool = False,
    against: Any = None,
    against_feeds: Mapping[str, np.ndarray] | None = None,
    against_options: Mapping[str, Any] | None = None,
    providers: Any = None,
    backend: str = "auto",
    canonical: Canonical | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Report:
    """Check one model under one composite on a sample `x` (None: a random one, always the same), for one `target`.

    `layer`: whose concepts are parted into `parts` for the conditional sums (None: the last convolution, else dense
    layer, below the one that makes the explained output, with relevance at several concepts). `float64` compares with a
    run in double, `spread_bias` also gives back what biases keep. `against`: the float model of a quantized one, a path
    or Canonical, whose relevance is compared; `against_feeds` is the sample as it wants it (None: the same arrays),
    `against_options` what its Explainer gets in place of `options`.
    `canonical`: the canonical form of `model`, where it is made already. `options` go to the Explainer (preprocessing,
    low, high); `progress` is told what is being done.
    Raises what Explainer and explain raise for a model or question that cannot be explained.
    """
    from onnxcrp.canonize import Canonical, canonize
    from onnxcrp.explainer import Explainer

    source = None if isinstance(model, Canonical) else model
    if canonical is None:
        canonical = model if isinstance(model, Canonical) else canonize(model)
    options.setdefault("cache_limit", 1)  # every relevance model is asked once: none need be kept
    explainer = Explainer(canonical, composite, output=output, keep_head=keep_head, providers=providers, **options)
    facts = explainer.facts
    feeds = sample(facts) if x is None else _feeds(facts, x)
    quantized = any(node.op in ("QuantizeLinear", "DequantizeLinear") for node in facts.nodes)
    report = Report(
        model="" if isinstance(model, Canonical) or hasattr(model, "graph") else str(model),
        composite=explainer.composite.name,
        target=str(target),
    )

    progress("canonical outputs")
    report.checks.append(check_outputs(source, canonical.to_onnx(), feeds, quantized=quantized, providers=providers))

    progress("conservation")
    question = _Question(explainer, feeds, target, quantized=quantized, providers=providers, backend=backend)
    report.target = question.label
    if question.gradients:
        listed = ", ".join(sorted(question.gradients))
        report.checks.append(
            Check("conservation", None, f"rule {listed} is a gradient method, no LRP: sums are not conserved")
        )
    else:
        report.flows = question.flows(question.values)
        report.checks.append(check_conservation(report.flows, facts.inputs))

    progress("conditional sums")
    report.checks += check_parts(
        explainer, feeds, question.target, layer=layer, parts=parts, concepts=question.concepts
    )

    if against is not None:
        progress("against the float model")
        from onnxcrp.analysis.against import compare, fitting

        theirs = against if isinstance(against, Canonical) else canonize(against)
        same = output if output in {tensor.name for tensor in theirs.graph.outputs} else None
        more = {**options, **(against_options or {}), "providers": providers, "keep_head": keep_head}
        other = Explainer(theirs, composite, output=same, **more)
        given = fitting(feeds, other) if against_feeds is None else against_feeds
        where = "" if isinstance(against, Canonical) or hasattr(against, "graph") else str(against)
        report.comparison = found = compare(explainer, feeds, question.target, other, given, name=where)
        report.checks.append(Check("against float", None, found.detail, found.input.relative_l2))
        del other

    del explainer  # and its relevance models, before others are made
    if float64:
        progress("float64")
        report.checks.append(check_float64(question, report.flows))
    if spread_bias:
        progress("spread bias")
        check, report.spread = check_spread(question)
        report.checks.append(check)
    return report


# ------------------------------------------------------------------------------------------------------------- inputs


def sample(facts: Facts) -> dict[str, np.ndarray]:
    """A random sample, always the same: normal numbers, bytes in their whole range, other integers 0 or 1.

    Raises InputError where a dimension other than the batch is open.
    """
    draw = np.random.default_rng(0)
    feeds = {}
    for tensor in facts.graph.inputs:
        shape = [1 if i == 0 and not isinstance(d, int) else d for i, d in enumerate(tensor.shape or [])]
        if tensor.shape is None or not all(isinstance(d, int | np.integer) for d in shape):
            raise InputError(
                f"input {tensor.name!r} has shape {tensor.shape}: its size is open, so no sample can be drawn",
                hint="give an input",
            )
        dtype = np.dtype(tensor.dtype)
        if dtype.kind == "f":
            feeds[tensor.name] = draw.normal(size=shape).astype(dtype)
        elif dtype.itemsize == 1 and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            feeds[tensor.name] = draw.integers(limits.min, limits.max + 1, shape).astype(dtype)
        else:
            feeds[tensor.name] = draw.integers(0, 2, shape).astype(dtype)
    return feeds


def _feeds(facts: Facts, x: Any) -> dict[str, np.ndarray]:
    """Array or {input: array} -> {input: array}; floating arrays take the input's own floating type."""
    inputs = {tensor.name: tensor for tensor in facts.graph.inputs}
    if not isinstance(x, Mapping):
        if len(inputs) > 1:
            raise InputError(f"the model has {len(inputs)} inputs", hint=f"give {{name: array}} of {', '.join(inputs)}")
        x = {next(iter(inputs)): x}
    feeds = {}
    for name, value in x.items():
        if name not in inputs:
            raise InputError(f"the model has no input {name!r}", hint=f"its inputs are {', '.join(inputs)}")
        array, dtype = np.asarray(value), np.dtype(inputs[name].dtype)
        if array.dtype != dtype and (array.dtype.kind, dtype.kind) not in (("f", "f"), ("i", "f"), ("u", "f")):
            raise InputError(f"input {name!r} is {array.dtype}, expected {dtype}")
        feeds[name] = array.astype(dtype)
    return feeds


# -------------------------------------------------------------------------------------------------- canonical outputs


def check_outputs(
    original: Any,
    canonical: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    *,
    quantized: bool,
    providers: Any = None,
) -> Check:
    """The outputs of both models on the sample and on noise of its size: relative L2 and largest difference.

    Quantized models run without graph optimisation: with it the runtime's own fusions change results.
    """
    from onnxcrp.session import Session

    name = "canonical outputs"
    if original is None:
        return Check(name, None, "the original model is not known: a canonical one was given")
    after_all = Session(canonical, providers, optimize=not quantized)
    try:
        sessions = [Session(original, providers, optimize=not quantized), after_all]
    except ModelError as error:  # bfloat16 on a CPU
        return Check(name, None, f"not applied: {error.message}")
    worst, largest, steps, changed, where = 0.0, 0.0, 0.0, 0, ""
    for given in (feeds, _noise(feeds)):
        before, after = (session.run(dict(given)) for session in sessions)
        if set(before) != set(after):
            return Check(name, False, f"outputs {', '.join(before)} have become {', '.join(after)}")
        for key, expected in before.items():
            found = after[key]
            if expected.shape != found.shape or expected.dtype != found.dtype:
                shapes = f"{expected.dtype}{list(expected.shape)} has become {found.dtype}{list(found.shape)}"
                return Check(name, False, f"{key}: {shapes}")
            wide, difference = expected.astype(np.float64), found.astype(np.float64) - expected
            distance = float(np.abs(difference).max(initial=0.0))
            if expected.dtype.kind in "iub":
                steps = max(steps, distance)
            else:
                ratio = relative(found, wide)
                worst, where = max((worst, where), (ratio, key))
                largest = max(largest, distance)
            if expected.ndim > 1:
                top = [v.reshape(len(v), -1).argmax(1) for v in (expected, found)]
                changed += int((top[0] != top[1]).sum())
    floats = f"largest difference {largest:.2g}, relative L2 {worst:.2g}" + (f" ({where})" if where else "")
    integers = f"largest difference {steps:g} steps" if steps or not where else ""
    ok = worst <= OUTPUTS_TOLERANCE and steps <= 1
    detail = "; ".join(part for part in (floats if where else "", integers) if part) or "the same"
    if changed:
        detail += f"; the largest entry is another one in {changed} samples"
    return Check(name, ok, detail, worst, OUTPUTS_TOLERANCE, STEP_REASON if quantized else OUTPUTS_REASON)


def _noise(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    noise = {}
    for name, array in feeds.items():
        if array.dtype.kind == "f":
            scale = float(array.std()) or 1.0
            noise[name] = (array.mean() + scale * draw.normal(size=array.shape)).astype(array.dtype)
        elif array.size:
            noise[name] = draw.permutation(array.ravel()).reshape(array.shape)
        else:
            noise[name] = array
    return noise


# -------------------------------------------------------------------------------------------------------- conservation


class _Question:
    """One sample and one target: the rules of the layers between, relevance models for it, and what they answer."""

    def __init__(
        self,
        explainer: Explainer,
        feeds: Mapping[str, np.ndarray],
        target: Any,
        *,
        quantized: bool,
        providers: Any,
        backend: str,
    ) -> None:
        from onnxcrp.backward import assign

        self.facts = facts = explainer.facts
        self.canonical, self.composite = explainer.canonical, explainer.composite
        self.feeds = dict(feeds)
        self._last: tuple[onnx.ModelProto, Any] | None = None
        self.quantized, self.providers, self.backend = quantized, providers, backend
        reach = facts.between([facts.explained], None)
        self.nodes: list[gs.Node] = [
            node
            for node in facts.nodes
            if any(t.name in reach for t in node.outputs)
            and any(node.inputs[i].name in reach for i in facts.carries(node))
        ]
        self.reach = reach
        self.rules = assign(facts, self.composite, self.nodes)
        self.names = {node.name: facts.names.of(node) for node in self.nodes}
        self.gradients = {rule for rule, _ in self.rules.values()} & GRADIENTS
        self.target, self.label = self._target(target)

    def _target(self, target: Any) -> tuple[np.ndarray, str]:
        """Weights on the explained output [B, ...], and what they are called."""
        from onnxcrp import condition
        from onnxcrp.facts import dims

        shape = dims(self.facts.tensors[self.facts.explained])
        static = all(isinstance(size, int) for size in shape[1:])
        model = self.model if static else self._compile(inputs=())  # which has no message that zeros must fit
        zeros = np.zeros([1, *(size if isinstance(size, int) else 1 for size in shape[1:])], np.float32)
        (explained,) = self._session(model).run({**self.feeds, "target": zeros}, ["explained"]).values()
        found = condition.target(target, shape=explained.shape[1:], batch=len(explained), explained=explained)
        if len(found) > 1:
            raise QuestionError(f"target {target!r} asks {len(found)} questions", hint="verify takes one")
        return found[0].weights, ", ".join(dict.fromkeys(condition.target_text(label) for label in found[0].labels))

    def _compile(self, **options: Any) -> onnx.ModelProto:
        from onnxcrp.backward import compile

        keep_head = not self.facts.head
        options = {"output": self.facts.output, "keep_head": keep_head, "per_sample": False, **options}
        return compile(self.canonical, self.composite, **options)

    def _session(self, model: onnx.ModelProto) -> Any:
        """A session of this model; that of the last one is kept, since spreading runs the same model many times."""
        from onnxcrp.session import Session

        if self._last is None or self._last[0] is not model:
            self._last = (model, Session(model, self.providers, optimize=not self.quantized))
        return self._last[1]

    def relevance_model(self) -> onnx.ModelProto:
        """Relevance and activation of every layer, and all choices that the graph makes."""
        names = list(self.names.values())
        model = self._compile(record=names, activations=names)
        return with_outputs(model, choices(model))

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The relevance model of this question; it stays in memory while the question does."""
        return self.relevance_model()

    @cached_property
    def values(self) -> _Values:
        """What it answers."""
        return self.run(self.model)

    def concepts(self, layer: str) -> int:
        """At how many concepts of a layer there is relevance."""
        from onnxcrp.backward import concept_axis

        node = self.facts.names.resolve(layer)
        R = self.values.relevance.get(node.outputs[0].name)
        if R is None:
            return 0
        axis = concept_axis(self.facts, node)
        return int(np.moveaxis(R, axis, 0).reshape(R.shape[axis], -1).any(1).sum())

    def run(self, model: onnx.ModelProto, seeds: Mapping[str, np.ndarray] | None = None) -> _Values:
        """Run a relevance model: {tensor: relevance} and {tensor: activation}; `seeds` in place of the target."""
        interface = interface_of(model)
        feeds = dict(self.feeds)
        if interface["target"]:
            feeds[interface["target"]] = self.target
        feeds.update({interface["seeds"][name]: seed.astype(np.float32) for name, seed in (seeds or {}).items()})
        return _Values(self, interface, self._session(model).run(feeds))

    def flows(self, values: _Values) -> list[Flow]:
        """The balance of every layer, from the explained output to the inputs."""
        facts = self.facts
        expected: dict[str, list[float]] = {}  # tensor -> sum sent to it, magnitudes that were summed
        unknown: set[str] = set()
        flows: list[Flow] = []
        for node in reversed(self.nodes):
            rule, parameters = self.rules[node.name]
            outputs = [t.name for t in node.outputs if t.name in self.reach]
            received = [values.relevance[name] for name in outputs if name in values.relevance]
            total = sum(float(R.sum(dtype=np.float64)) for R in received)
            total += sum(expected.get(name, [0.0, 0.0])[0] for name in outputs if name not in values.relevance)
            done = self._balance(node, rule, parameters, received, total, values, expected, outputs)
            flow = Flow(self.names[node.name], node.op, rule, total, 0.0)
            if done is None:
                done = self._unknown(node, values, total)
                unknown.update(node.inputs[i].name for i in self._data(node))
            for i, amount, gross in zip(self._data(node), done.sent, done.gross, strict=True):
                entry = expected.setdefault(node.inputs[i].name, [0.0, 0.0])
                entry[0] += amount
                entry[1] += gross
            flow.sent, flow.losses = sum(done.sent), done.losses
            flow.cancellation, flow.rounding = done.cancellation, done.rounding
            self._explain(flow, outputs[0], values, expected, unknown)
            flows.append(flow)
        for name in facts.inputs:
            R = values.relevance[name]
            flow = Flow(name, "input", "", float(R.sum(dtype=np.float64)), 0.0)
            self._explain(flow, name, values, expected, unknown)
            flows.append(flow)
        return flows

    def _data(self, node: gs.Node) -> list[int]:
        return [i for i in self.facts.carries(node) if node.inputs[i].name in self.reach]

    def layer(self, node: gs.Node, values: _Values) -> Layer:
        """The node with its numbers."""
        rule, parameters = self.rules[node.name]
        bounds = self.facts.bounds(node) if rule == "zbox" else None
        given = {"stabilizer": 1e-6, "bias": "keep", **parameters}
        gates = frozenset(self.facts.gates(node)) if rule == "signal" else frozenset()
        return Layer(node, self._data(node), values.value, given, bounds=bounds, gates=gates, backend=self.backend)

    def _balance(
        self,
        node: gs.Node,
        rule: str,
        parameters: Mapping[str, Any],
        received: Sequence[np.ndarray],
        total: float,
        values: _Values,
        expected: Mapping[str, Sequence[float]],
        outputs: Sequence[str],
    ) -> Balance | None:
        data = self._data(node)
        if len(received) < len(outputs):  # the further outputs of a Split have no name of their own: sums only
            gross = sum(expected.get(name, [0.0, 0.0])[1] for name in outputs)
            return Balance([total], [gross]) if rule in ("rearrangement", "pass") and len(data) == 1 else None
        own = _own(rule, parameters)
        R = [r.astype(np.float64) for r in received]
        with np.errstate(all="ignore"):  # masks are infinite
            return balance(self.layer(node, values), rule, R, own)

    def _unknown(self, node: gs.Node, values: _Values, total: float) -> Balance:
        """A rule that balance.py does not know: what arrives below is taken as sent where nothing else sends there."""
        sent = []
        for i in self._data(node):
            name = node.inputs[i].name
            alone = len([r for r in self.facts.readers.get(name, []) if r.name in self.rules]) == 1
            R = values.relevance.get(name)
            sent.append(float(R.sum(dtype=np.float64)) if alone and R is not None else 0.0)
        return Balance(sent, [0.0] * len(sent), {NOT_ITEMISED: total - sum(sent)})

    def _explain(
        self, flow: Flow, tensor: str, values: _Values, expected: Mapping[str, Sequence[float]], unknown: set[str]
    ) -> None:
        """What of the relevance at a tensor is not what its readers send."""
        if tensor == self.facts.explained or tensor not in values.relevance or tensor in unknown:
            return
        amount, gross = expected.get(tensor, (0.0, 0.0))
        R = values.relevance[tensor]
        size = float(np.abs(R).sum(dtype=np.float64))
        flow.unexplained = float(R.sum(dtype=np.float64)) - amount
        flow.tolerance = SUM_TOLERANCE * max(gross, size) + 1e-12


class _Values:
    """What a run of a relevance model gave, by tensor of the canonical graph."""

    def __init__(self, question: _Question, interface: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        facts = question.facts
        output = {question.names[node.name]: node.outputs[0].name for node in question.nodes}
        self.interface, self.arrays, self.facts, self.backend = interface, arrays, facts, question.backend
        self.relevance = {name: arrays[port] for name, port in interface["inputs"].items()}
        self.relevance.update({output[layer]: arrays[port] for layer, port in interface["relevance"].items()})
        self._known: dict[str, np.ndarray] = {}
        self._known.update({output[layer]: arrays[port] for layer, port in interface["activation"].items()})
        self._known.update(question.feeds)

    def value(self, tensor: gs.Tensor) -> np.ndarray:
        """A tensor's value, floats in float64; what was not recorded is evaluated."""
        import onnx_graphsurgeon as gs

        from onnxcrp.evaluate import evaluate_node

        if isinstance(tensor, gs.Constant):
            array = np.asarray(tensor.values)
        elif tensor.name in self._known:
            array = self._known[tensor.name]
        else:
            node = self.facts.producer[tensor.name]
            inputs = [None if t.is_empty() else self.value(t) for t in node.inputs]
            made = evaluate_node(
                node.op, node.attrs, inputs, domain=node.domain or "", outputs=len(node.outputs),
                floats=np.float64, backend=self.backend,
            )  # fmt: skip
            self._known.update((t.name, a) for t, a in zip(node.outputs, made, strict=True))
            array = self._known[tensor.name]
        return array.astype(np.float64) if array.dtype.kind == "f" else array


def interface_of(model: onnx.ModelProto) -> dict[str, Any]:
    """The map layer -> names of inputs and outputs that a relevance model carries."""
    for entry in model.metadata_props:
        if entry.key == "onnxcrp.map":
            return json.loads(entry.value)
    raise InputError("the model is no relevance model: it has no onnxcrp.map", hint="onnxcrp compile writes them")


def choices(model: onnx.ModelProto) -> list[str]:
    """Tensors in which a graph chooses between things: quantized values, indices of maxima."""
    found = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "ArgMax", "ArgMin", "Round", "Floor", "Ceil"):
            found.append(node.output[0])
        elif node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
            found.append(node.output[1])
    return found


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with further tensors as outputs; the model itself where there is none to add."""
    import onnx

    added = [name for name in names if name not in {o.name for o in model.graph.output}]
    if not added:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
    return copy


def check_conservation(flows: Sequence[Flow], inputs: Sequence[str]) -> Check:
    """Whether every layer receives what the layers above send."""
    seed, arrived = (
        flows[0].received,
        sum(flow.received for flow in flows if flow.layer in inputs and flow.op == "input"),
    )
    losses = {kind: sum(flow.losses.get(kind, 0.0) for flow in flows) for kind in LOSSES}
    share = [f"{kind} {amount:.4g}" for kind, amount in losses.items() if abs(amount) > 1e-9 * abs(seed)]
    detail = f"{seed:.5g} starts, {arrived:.5g} arrives at {', '.join(inputs)}; lost to " + (
        ", ".join(share) or "nothing"
    )
    wrong = [flow for flow in flows if not flow.ok]
    worst = max(flows, key=lambda flow: abs(flow.unexplained) / flow.tolerance if flow.tolerance else 0.0)
    scale = worst.tolerance / SUM_TOLERANCE
    figure = abs(worst.unexplained) / scale if scale else 0.0
    if wrong:
        first = wrong[0]
        detail = (
            f"{first.layer} ({first.op}) receives {first.received:.5g}, {first.unexplained:.2g} more than is sent to it"
            + (f"; {len(wrong) - 1} layers more do not balance" if len(wrong) > 1 else "")
        )
    signed = [flow for flow in flows if flow.cancellation and flow.cancellation > 1.5]
    if signed:
        strongest = max(signed, key=lambda flow: flow.cancellation or 0.0)
        detail += f"; at {strongest.layer} terms {strongest.cancellation:.3g} times the relevance cancel"
    return Check("conservation", not wrong, detail, figure, SUM_TOLERANCE, SUM_REASON)


# ----------------------------------------------------------------------------------------------------- conditional sums


def check_parts(
    explainer: Explainer,
    feeds: Mapping[str, np.ndarray],
    target: np.ndarray,
    *,
    layer: str | None,
    parts: int,
    concepts: Callable[[str], int],
) -> list[Check]:
    """Over a partition of a layer's channels (channel c in part c mod K), with R the relevance of the inputs.

    `concepts(layer)`: at how many concepts of a layer there is relevance.
    cut: the parts sum to what passes through the layer, which is R less what keep gives for the empty list;
    keep: sum of R_k - (K - 1) R_empty = R.
    """
    from onnxcrp.explainer import NegativeLogitWarning

    names = ("conditional sums, cut", "conditional sums, keep")
    layers = {info.name: info for info in explainer.layers}
    rules = {info.rule for info in layers.values()}
    if rules & NOT_LINEAR:
        why = f"not applied: rule {', '.join(sorted(str(rule) for rule in rules & NOT_LINEAR))} is not linear in R"
        return [Check(name, None, why) for name in names]
    if layer is not None:
        info = next((i for i in layers.values() if layer in i.names), None)
        if info is None:
            near = ", ".join(list(layers)[-5:])
            raise QuestionError(f"there is no layer {layer!r}", hint=f"the last ones are {near}")
    else:
        top = _makers(explainer.facts)
        linear = [i for i in layers.values() if i.channels and i.channels > 1 and i.name not in top]
        ordered = [i for kind in ("convolution", "dense") for i in reversed(linear) if i.family == kind]
        info = next((i for i in ordered if concepts(i.name) > 1), None)
    if info is None or not info.channels or info.channels < 2:
        why = (
            f"{layer} has a single concept" if info else "no layer below the top one has relevance at several concepts"
        )
        return [Check(name, None, f"not applied: {why}") for name in names]
    count = min(parts, info.channels)
    partition = [list(range(k, info.channels, count)) for k in range(count)]
    everything: list[int] = list(range(info.channels))

    def ask(entries: list[list[int]], bypass: str) -> list[np.ndarray]:
        asked = [{info.name: entry} for entry in entries]
        result = explainer.explain(feeds, target, conditions=asked, bypass=bypass)
        return [_flat([R[:, i] for R in result.relevance.values()]) for i in range(len(asked))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NegativeLogitWarning)  # the sums hold for either sign
        whole = _flat(list(explainer.explain(feeds, target).relevance.values()))
        *kept, empty = ask([*partition, []], "keep")
        *cut, through = ask([*partition, everything], "cut")
    if not through.any() and not any(part.any() for part in cut):
        why = f"not applied: no relevance passes through {info.name}"
        return [Check(name, None, why) for name in names]
    around = float(empty.sum()), float(whole.sum())
    what = f"{count} parts of the {info.channels} concepts of {info.name}"
    passes = f"{around[1] - around[0]:.4g} passes through it, {around[0]:.4g} goes round"
    scale = sum(float(np.linalg.norm(part)) for part in cut) + float(np.linalg.norm(whole))
    figure = max(_norm(sum(cut) - through), _norm(whole - empty - through)) / (scale or 1.0)
    first = Check(names[0], figure <= PARTS_TOLERANCE, f"{what}: {passes}", figure, PARTS_TOLERANCE, PARTS_REASON)
    scale = sum(float(np.linalg.norm(part)) for part in kept) + float(np.linalg.norm(whole))
    figure = _norm(sum(kept) - (count - 1) * empty - whole) / (scale or 1.0)
    detail = f"{what}: sum of the parts less {count - 1} times the rest is the whole"
    return [first, Check(names[1], figure <= PARTS_TOLERANCE, detail, figure, PARTS_TOLERANCE, PARTS_REASON)]


def _makers(facts: Facts) -> set[str]:
    """The layers that the explained output comes from by rearranging alone, and those that rearrange it."""
    from onnxcrp.ops import OPS

    found: set[str] = set()
    waiting = [facts.explained]
    while waiting:
        node = facts.producer.get(waiting.pop())
        if node is None or facts.names.of(node) in found:
            continue
        found.add(facts.names.of(node))
        if node.op in OPS and facts.family(node) == "rearrangement":
            waiting += [node.inputs[i].name for i in facts.carries(node)]
    return found


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(array).astype(np.float64) for array in arrays])


def _norm(array: Any) -> float:
    return float(np.linalg.norm(array))


# ------------------------------------------------------------------------------------------------------------- float64


def check_float64(question: _Question, flows: Sequence[Flow] = ()) -> Check:
    """The relative L2 difference of every relevance output to the same relevance model evaluated in double.

    Discrete choices (quantization steps, winners of pooling) are those of the float32 run: where two are equally near,
    either may be taken, and relevance then goes elsewhere.
    """
    from onnxcrp.evaluate import evaluate

    name = "float64"
    model, values = question.model, question.values
    ports = [*values.interface["inputs"].values(), *values.interface["relevance"].values(), "explained"]
    feeds = {**question.feeds, values.interface["target"]: question.target}
    feeds.update({name: values.arrays[name] for name in choices(model)})
    try:
        exact = evaluate(model, feeds, ports, backend=question.backend)
    except UnsupportedError as error:
        return Check(name, None, error.message)
    found = {port: relative(values.arrays[port], exact[port]) for port in ports}
    hidden = set(values.interface["relevance"].values())
    ok = all(figure <= (HIDDEN_TOLERANCE if port in hidden else FLOAT64_TOLERANCE) for port, figure in found.items())
    worst = max(hidden or found, key=lambda port: found[port])
    inputs = ", ".join(f"{port} {found[port]:.2g}" for port in values.interface["inputs"].values())
    detail = f"relative L2 of {inputs}; of hidden layers at most {found[worst]:.2g} ({worst})"
    if not ok and flows:
        cause = max(flows, key=lambda flow: flow.rounding)
        if cause.rounding > FLOAT64_TOLERANCE:
            detail += f"; float32 loses digits at {cause.layer} ({cause.op}), whose output is small against its terms"
    figure = max(found[port] for port in ports if port not in hidden)
    return Check(name, ok, detail, figure, FLOAT64_TOLERANCE, FLOAT64_REASON)


# ---------------------------------------------------------------------------------------------------------- spread bias


def check_spread(question: _Question) -> tuple[Check, dict[str, np.ndarray]]:
    """Relevance of the inputs with what biases keep given back, R_i += sum_j b_j s_j / n_j (see balance.spread).

    What is given back to a layer's input travels on by the rules and loses to biases again, so the walk is repeated
    with all of it as seeds, until nothing changes: after as many rounds as there are biases on a path it is exact.
    """
    name = "spread bias"
    if question.gradients:
        return Check(name, None, "gradient methods do not share out relevance"), {}
    facts = question.facts
    first = question.values
    holders = [node for node in question.nodes if _absorbed(question, node, first) is not None]
    if not holders:
        return Check(name, None, "no bias keeps relevance under this composite"), dict(_inputs_of(first, facts))
    top = facts.producer[facts.explained]
    sources = {t.name for node in holders for t in _sources(question, node)}
    makers = [node for node in question.nodes if node is top or any(t.name in sources for t in node.outputs)]
    unnamed = [t.name for n in holders for t in _sources(question, n) if _unnamed(t, facts)]
    if unnamed:
        return Check(name, None, f"tensor {unnamed[0]} has no layer name, nothing can be given back to it"), {}
    names = {node.outputs[0].name: question.names[node.name] for node in makers}
    layers = list(question.names.values())
    model = question._compile(start=list(names.values()), start_from="one", record=layers, activations=layers)
    seed = first.relevance[facts.explained]
    relevance: dict[str, np.ndarray] = {}
    before: np.ndarray | None = None
    values, kept = first, 0.0
    for _ in range(len(holders) + 1):
        given: dict[str, np.ndarray] = {facts.explained: seed}
        kept = 0.0  # at outputs that read nothing but padding
        for node in holders:
            absorbed = _absorbed(question, node, values)
            if absorbed is None:
                continue
            amounts = spread(question.layer(node, values), absorbed)
            kept += float(absorbed.sum()) - sum(float(amount.sum()) for amount in amounts)
            for tensor, amount in zip(_sources(question, node), amounts, strict=True):
                given[tensor.name] = given.get(tensor.name, 0) + amount
        at_inputs = {tensor: given.pop(tensor) for tensor in facts.inputs if tensor in given}
        values = question.run(model, {names[tensor]: amount for tensor, amount in given.items()})
        relevance = {tensor: R + at_inputs.get(tensor, 0) for tensor, R in _inputs_of(values, facts)}
        now = _flat(list(relevance.values()))
        if before is not None and _norm(now - before) <= 1e-6 * _norm(now):
            break
        before = now
    arrived, start = sum(float(R.sum()) for R in relevance.values()), float(seed.sum(dtype=np.float64))
    plain = sum(float(R.sum(dtype=np.float64)) for _, R in _inputs_of(first, facts))
    flows = question.flows(values)
    others = kept + sum(amount for flow in flows for kind, amount in flow.losses.items() if kind != "bias")
    scale = max(float(np.abs(seed).sum()), max(flow.tolerance for flow in flows) / SUM_TOLERANCE)
    figure = abs(start - arrived - others) / scale
    detail = f"{start:.5g} starts, {arrived:.5g} arrives with the biases' share given back ({plain:.5g} without)"
    if abs(others) > 1e-9 * scale:
        detail += f"; {others:.3g} is lost otherwise"
    return Check(name, figure <= PARTS_TOLERANCE, detail, figure, PARTS_TOLERANCE, SUM_REASON), relevance


def _own(rule: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rule itself, defaults included, without what all rules and the walk add to them."""
    from onnxcrp.lrp import RULES

    known = RULES[rule].parameters if rule in RULES else {}
    return {name: parameters.get(name, default) for name, default in known.items()}


def _inputs_of(values: _Values, facts: Facts) -> list[tuple[str, np.ndarray]]:
    return [(name, values.relevance[name].astype(np.float64)) for name in facts.inputs]


def _sources(question: _Question, node: gs.Node) -> list[gs.Tensor]:
    return [node.inputs[i] for i in question._data(node)]


def _unnamed(tensor: gs.Tensor, facts: Facts) -> bool:
    maker = facts.producer.get(tensor.name)
    return maker is not None and maker.outputs[0].name != tensor.name


def _absorbed(question: _Question, node: gs.Node, values: _Values) -> np.ndarray | None:
    """What the bias of a layer keeps of the relevance of its output, for each entry; None where it has none."""
    R = values.relevance.get(node.outputs[0].name)
    rule, parameters = question.rules[node.name]
    if R is None or rule == "rearrangement":
        return None
    own = _own(rule, parameters)
    with np.errstate(all="ignore"):
        done = balance(question.layer(node, values), rule, [R.astype(np.float64)], own)
    return None if done is None else done.absorbed


__all__ = ["Check", "Flow", "Report", "Table", "verify"]
