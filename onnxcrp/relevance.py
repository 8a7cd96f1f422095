"""The relevance models of one model under one composite: compiled when first needed, kept as sessions, with sizes."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp import captured
from onnxcrp.condition import mask
from onnxcrp.device import is_device_array
from onnxcrp.errors import CompositeError, InputError, QuestionError, UnsupportedError
from onnxcrp.inputs import check_array, check_device_array
from onnxcrp.session import CPU, metadata, on_cpu, providers
from onnxcrp.stages import Staged, split

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from onnxcrp.cache import Cache
    from onnxcrp.canonize import Canonical
    from onnxcrp.composite import Composite
    from onnxcrp.facts import Facts
    from onnxcrp.session import Session

Shape = tuple[int | str | None, ...]
SIZE = "onnxcrp.bytes_of_weights"  # in the metadata of what is run here
CACHE = 20 << 20  # bytes: messages of so many questions stay in a processor's cache
LEAST = 4  # questions at a time
ABOVE = 8  # a run costs at most an eighth more for the way from the target to the first mask, which its questions share
FEW = 300  # multiplications for each number that layers make: fewer, and passes over messages take as long


@dataclass(frozen=True)
class Plan:
    """What a relevance model is compiled for; layers by the names the model gives them, sorted."""

    conditions: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    start_from: str = "activation"
    seed: str = "output"
    bypass: str = "cut"
    record: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass
class Program:
    """A compiled relevance model: its session (a `Staged` where asked for), what its inputs and outputs stand for."""

    session: Any
    plan: Plan
    feeds: dict[str, str]  # role ("target", "mask.<layer>", "seed.<layer>") -> input
    relevance: dict[str, str]  # "input/<name>" or "layer/<name>" -> output
    activation: dict[str, str]  # layer -> output
    explained: str
    outputs: list[str]
    shares_forward: bool
    size: int  # bytes


@dataclass
class _Cell:
    lock: threading.Lock = field(default_factory=threading.Lock)
    program: Program | None = None


@dataclass(frozen=True)
class Layer:
    """A layer as conditions, records and starts see it: the tensor that it puts out."""

    name: str
    tensor: str
    shape: Shape
    axis: int  # of its concepts
    heads: bool = False  # axis 1 are attention heads

    def mask(self, concepts: Any) -> np.ndarray:
        """Concepts as an array of the layer's rank; raises QuestionError."""
        return mask(concepts, layer=self.name, shape=self.shape, axis=self.axis, heads=self.heads)


class RelevanceModels:
    """A canonical model, its composite, and the sessions of the relevance models asked for so far; thread-safe."""

    def __init__(
        self,
        canonical: Canonical,
        facts: Facts,
        composite: Composite,
        *,
        compile_options: Mapping[str, Any],
        session_options: Mapping[str, Any],
        cache_limit: int,
        cache: Cache | None = None,
    ) -> None:
        self.canonical, self.facts, self.composite = canonical, facts, composite
        self.cache_limit = cache_limit  # bytes of compiled relevance models to keep
        self._cache = cache
        # quantized models run without the runtime's folding
        self._compile_options = {**compile_options, "store_weights": self.is_quantized}
        self._session_options = session_options
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._programs: OrderedDict[tuple[Plan, str], _Cell] = OrderedDict()
        self._layers: dict[str, Layer] = {}  # by the names they were asked for
        self._sizes: dict[tuple[tuple[int, ...], ...], dict[str, int]] = {}
        self._of_question: dict[tuple[Plan, tuple[tuple[int, ...], ...]], tuple[int, int]] = {}
        self._paces: dict[tuple[Plan, tuple[tuple[int, ...], ...]], tuple[int, bool]] = {}

    def with_sessions(self, **options: Any) -> RelevanceModels:
        """The same relevance models in sessions of their own, with other options."""
        return RelevanceModels(
            self.canonical,
            self.facts,
            self.composite,
            compile_options=self._compile_options,
            session_options={**self._session_options, **options},
            cache_limit=self.cache_limit,
        )

    # --- layers and inputs --------------------------------------------------------------------------------------------

    def layer(self, name: str) -> Layer:
        """A layer as the user names it; raises QuestionError listing the nearest names."""
        if not isinstance(name, str):
            raise QuestionError(f"layers are named by strings, got {name!r}")
        if name not in self._layers:
            self._layers[name] = self._found(name)
        return self._layers[name]

    def _found(self, name: str) -> Layer:
        from onnxcrp.backward import concept_axis

        node = self.facts.names.resolve(name)
        tensor = node.outputs[0]
        if tensor.shape is None:
            return Layer(self.facts.names.of(node), tensor.name, (), 1)
        axis = self.facts.seen_axis(tensor.name, concept_axis(self.facts, node))
        shape = as_shape(self.facts.seen(tensor.name))
        heads = len(shape) == 4 and axis % 4 != 1 and self.facts.is_attention(node)
        return Layer(self.facts.names.of(node), tensor.name, shape, axis, heads)

    @cached_property
    def inputs(self) -> dict[str, tuple[np.dtype, Shape]]:
        """The model's inputs: name -> (dtype, shape)."""
        return {t.name: (np.dtype(t.dtype), shape_of(t)) for t in self.facts.graph.inputs}

    @cached_property
    def explained_shape(self) -> Shape:
        """Of the explained output."""
        return shape_of(self.facts.tensors[self.facts.explained])

    @cached_property
    def fixed(self) -> int | None:
        """Samples per run where the batch could not be freed, else None."""
        if self.canonical.batch != "fixed":
            return None
        return next((shape[0] for _, shape in self.inputs.values() if shape and isinstance(shape[0], int)), 1)

    @cached_property
    def is_quantized(self) -> bool:
        """Whether activations are rounded: the runtime's fusions then move values by whole steps, so it gets none."""
        return any(node.op in ("QuantizeLinear", "DynamicQuantizeLinear") for node in self.facts.nodes)

    @property
    def is_unrolled(self) -> bool:
        """Whether it holds recurrent layers written out: looking for fusions in so many small nodes does not pay."""
        return any(report.name == "unroll recurrent layers" and report.done for report in self.canonical.reports)

    @property
    def optimization(self) -> bool | str:
        """How far the runtime may optimise the graph of a Session: all the way, unless one of these says no."""
        return not self.is_quantized and ("basic" if self.is_unrolled else True)

    @cached_property
    def on_device(self) -> bool:
        """Whether sessions run on something else than the CPU."""
        return not on_cpu(self._session_options.get("providers"))

    def _providers(self, *, capture: bool = False) -> list[tuple[str, dict[str, str]]]:
        """What sessions are asked to run on; raises RuntimeMissingError for what there is not."""
        asked = self._session_options
        return providers(asked.get("providers"), allow_tf32=asked.get("allow_tf32", False), capture=capture)

    def is_batched(self, name: str) -> bool:
        """Whether axis 0 of this input counts samples."""
        shape = self.inputs[name][1]
        return bool(shape) and (not isinstance(shape[0], int) or self.fixed is not None)

    def check_inputs(self, x: Any, *, stay: bool = False) -> tuple[dict[str, Any], int]:
        """{input: array} as the model takes it, and the number of samples; raises InputError.

        With `stay`, arrays that speak DLPack are taken where they are, as DeviceArrays; their values are not looked at.
        """
        known = self.inputs
        if not isinstance(x, Mapping):
            if len(known) > 1:
                raise InputError(f"the model has {len(known)} inputs: {', '.join(known)}", hint="pass {input: array}")
            x = {next(iter(known)): x}
        for name in x:
            if name not in known:
                raise InputError(f"the model has no input {name!r}, expected {', '.join(known)}")
        for name in known:
            if name not in x:
                raise InputError(f"no value for the model's input {name!r}", hint=f"it takes {', '.join(known)}")
        feeds = {
            name: (check_device_array if stay and is_device_array(x[name]) else check_array)(name, x[name], kind, shape)
            for name, (kind, shape) in known.items()
        }
        counts = {name: len(array) for name, array in feeds.items() if self.is_batched(name)}
        if len(set(counts.values())) > 1:
            sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(f"inputs differ in the number of samples: {sizes}")
        batch = next(iter(counts.values()), 1)
        if batch == 0:
            raise InputError("there are no samples: axis 0 is empty")
        if batch > 1 and self.facts.explained in self.facts.places:
            axis = self.facts.places[self.facts.explained].place.axis
            raise InputError(
                f"output {self.facts.explained!r} has samples on axis {axis}, not on axis 0: it can be explained for "
                "one sample at a time",
                hint="export it with the batch first to ask for several",
            )
        return feeds, batch

    # --- compiled models ----------------------------------------------------------------------------------------------

    def program(self, plan: Plan, stages: str = "") -> Program:
        """The session of a plan, compiled when first needed and kept while there is room.

        `stages`: "one plan" in stages, or "every plan", whose forward stage serves the others' as well.
        """
        key = (plan, stages)
        with self._lock:
            cell = self._programs.setdefault(key, _Cell())
            self._programs.move_to_end(key)
        with cell.lock:  # other plans go on meanwhile
            if cell.program is None:
                cell.program = self._compile(plan, stages)
                self._make_room(key)
        return cell.program

    @property
    def everything(self) -> Plan:
        """The question without a condition for the relevance of all inputs."""
        return Plan(inputs=tuple(self.facts.inputs), seed=self.composite.seed)

    @cached_property
    def _activations(self) -> list[str]:
        """What the backward pass of that question reads of the forward pass; nothing where it has no answer."""
        try:
            model = self._write(self.everything)
        except (CompositeError, UnsupportedError):  # relevance of some layers may be had all the same
            return []
        whole = split(model, _questions(model))
        return [*whole.factors.reads, *whole.messages.reads]

    def sessions(self) -> list[Any]:
        """The sessions there are by now, each stage's its own."""
        with self._lock:
            found = [cell.program.session for cell in self._programs.values() if cell.program is not None]
        return [each for session in found for each in (session.sessions if isinstance(session, Staged) else [session])]

    def _make_room(self, newest: tuple[Plan, str]) -> None:
        with self._lock:
            total = 0
            for plan in reversed(list(self._programs)):
                program = self._programs[plan].program
                total += program.size if program is not None else 0
                if total > self.cache_limit and plan != newest and program is not None:
                    del self._programs[plan]

    def _compile(self, plan: Plan, stages: str) -> Program:
        session: Any
        if self._session_options.get("cuda_graph", False):
            self._providers(capture=True)
            captured.check()
        # batches of conditions vary from chunk to chunk
        start = partial(self._start, plan_memory=not plan.conditions and not stages)
        if stages:
            model = self._write(plan)
            outputs = [port.name for port in model.graph.output]
            keep = self._activations if stages == "every plan" and plan != self.everything else []
            start = partial(start, capture=False, rest=stages == "one plan")  # all of whose stages take turns
            session = Staged(split(model, _questions(model)), outputs, keep, start)
            about = metadata(model)
        elif self._cache is None:
            model = self._write(plan)
            session, about = start(model), metadata(model)
        else:
            chosen = self._providers()
            key: dict[str, Any] = {"sha256": self.canonical.sha256, "composite": self._composite(plan).text}
            key |= {"plan": asdict(plan), "options": dict(self._compile_options), "providers": chosen}
            cpu = [name for name, _ in chosen] == [CPU]
            session, about = self._cache.session(key, lambda: self._write(plan), start, cpu=cpu)
        names = json.loads(about["onnxcrp.map"])
        relevance = {f"input/{name}": output for name, output in names["inputs"].items()}
        relevance |= {f"layer/{name}": output for name, output in names["relevance"].items()}
        return Program(
            session=session,
            plan=plan,
            feeds=_feeds(names),
            relevance=relevance,
            activation=names["activation"],
            explained=names["explained"],
            outputs=names["outputs"],
            shares_forward=json.loads(about["onnxcrp.facts"])["shares_forward"],
            size=int(about[SIZE]),
        )

    def _start(
        self,
        model: Any,
        *,
        optimize: bool = True,
        optimized: Any = None,
        plan_memory: bool = True,
        capture: bool = True,
        rest: bool = False,
    ) -> Session | captured.Captured:
        """A session as the caller of this class wants them, with `capture` one that records if that was asked for."""
        from onnxcrp import blocked

        options = dict(self._session_options)
        record = options.pop("cuda_graph", False) and capture
        options |= {"optimize": optimize and self.optimization, "plan_memory": plan_memory, "rest": rest}
        start = partial(blocked.start, model, optimized=optimized, **options)
        return captured.Captured(start) if record else start()

    def _composite(self, plan: Plan) -> Composite:
        return self.composite if plan.seed == self.composite.seed else replace(self.composite, seed=plan.seed)

    def _write(self, plan: Plan) -> onnx.ModelProto:
        """The relevance model of a plan; its masks and targets have no defaults."""
        from onnxcrp.backward import compile

        with self._compiling:
            model = compile(
                self.canonical,
                self._composite(plan),
                conditions=plan.conditions,
                record=plan.record,
                activations=plan.record,
                start=plan.start,
                start_from=plan.start_from,
                bypass=plan.bypass,
                relevance_of=plan.inputs,
                **self._compile_options,
            )
        # all of them are always fed, and onnxruntime binds no initializer to a device
        fed = _questions(model)
        for at in reversed(range(len(model.graph.initializer))):
            if model.graph.initializer[at].name in fed:
                del model.graph.initializer[at]
        size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        model.metadata_props.add(key=SIZE, value=str(size))
        return model

    # --- sizes --------------------------------------------------------------------------------------------------------

    def elements(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Numbers per sample in every data tensor, for inputs of these shapes; dimensions nobody knows count as 1."""
        key = _shapes(feeds)
        with self._lock:
            if key in self._sizes:
                return self._sizes[key]
        facts = self.facts
        shapes = {name: shape_of(tensor) for name, tensor in facts.tensors.items() if name in facts.data}
        if any(not isinstance(d, int) for shape in shapes.values() for d in shape[1:]):
            inferred = self._inferred(feeds)
            shapes = {name: inferred.get(name, shape) for name, shape in shapes.items()}
        sizes = {
            name: int(np.prod([d for d in shape[1:] if isinstance(d, int)], dtype=np.int64))
            for name, shape in shapes.items()
        }
        with self._lock:
            self._sizes[key] = sizes
        return sizes

    def numbers_of_question(self, plan: Plan, feeds: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """For one more question of a plan: numbers in the largest tensor below its first mask, and in its answers."""
        key = (plan, _shapes(feeds))
        if key not in self._of_question:
            sizes, facts = self.elements(feeds), self.facts
            layers = [self.layer(name).tensor for name in (*plan.conditions, *plan.start)]
            below = facts.between([*layers, *([] if plan.start else [facts.explained])], None)
            recorded = [self.layer(name).tensor for name in plan.record]
            self._of_question[key] = (
                max((sizes.get(name, 0) for name in below), default=0),
                sum(sizes.get(name, 0) for name in (*plan.inputs, *recorded)),
            )
        return self._of_question[key]

    def at_once(self, plan: Plan, feeds: Mapping[str, np.ndarray]) -> int:
        """How many questions of a plan are answered fastest at a time, once a forward pass is there, on the CPU.

        As many as stay in its cache, but enough that the way from the target to the first mask is soon paid for.
        """
        return self._pace(plan, feeds)[0]

    def pays_in_stages(self, plan: Plan, feeds: Mapping[str, np.ndarray], count: int) -> bool:
        """Whether so many questions for a sample are answered faster `at_once` after `at_once` on one forward pass.

        On the CPU, where these stay in the cache, and layers multiply so little for each number they make that passes
        over messages take as long. A model that is kept on disk is kept whole.
        """
        if count <= LEAST or self.on_device or self._cache is not None or self.fixed is not None:
            return False
        some, pays = self._pace(plan, feeds)
        return pays and count > some and self.facts.shares_forward

    def _pace(self, plan: Plan, feeds: Mapping[str, np.ndarray]) -> tuple[int, bool]:
        """(`at_once`, whether so many of a model like this are faster than all), by shapes alone."""
        key = (plan, _shapes(feeds))
        if key not in self._paces:
            largest, _ = self.numbers_of_question(plan, feeds)
            costs, sizes, facts = self._multiplications(feeds), self.elements(feeds), self.facts
            masked = [self.layer(name).tensor for name in (*plan.conditions, *plan.start)] or [facts.explained]
            begin = masked if plan.start else [facts.explained]
            whole, below = (sum(costs.get(name, 0) for name in facts.between(of, None)) for of in (begin, masked))
            some = max(LEAST, CACHE // max(1, 4 * largest), ABOVE * (whole - below) // max(1, below))
            light = sum(costs.values()) < FEW * sum(sizes.get(name, 0) for name in costs)
            self._paces[key] = (some, light and 4 * some * largest <= 2 * CACHE)
        return self._paces[key]

    def _multiplications(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Of every layer with weights, by its output, for one sample of these shapes."""
        sizes, found = self.elements(feeds), {}
        for node in self.facts.nodes:
            if node.op in ("Conv", "ConvTranspose", "Linear"):
                of = (node.inputs if node.op == "ConvTranspose" else node.outputs)[0].name
                each = np.prod([d for d in shape_of(node.inputs[1])[1:] if isinstance(d, int)], dtype=np.int64)
                found[node.outputs[0].name] = sizes.get(of, 0) * int(each)
        return found

    def _inferred(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Shape]:
        """Shapes in a model with dynamic sizes, for inputs of these shapes; nothing where onnx cannot tell."""
        import onnx

        from onnxcrp.canonize.shapes import described

        with self._compiling:
            model = self.canonical.to_onnx()
        for port in model.graph.input:
            for dim, size in zip(port.type.tensor_type.shape.dim, feeds[port.name].shape, strict=False):
                dim.dim_value = size
        del model.graph.value_info[:]
        for port in model.graph.output:
            port.type.tensor_type.ClearField("shape")
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:  # onnx raises several kinds; these sizes only guide how questions are cut into chunks
            return {}
        found = described((*model.graph.value_info, *model.graph.output))
        return {name: tuple(each.sizes) for name, each in found.items()}


def _shapes(feeds: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    """Of one sample, input by input."""
    return tuple(feeds[name].shape[1:] for name in sorted(feeds))


def _questions(model: onnx.ModelProto) -> set[str]:
    """The inputs of a relevance model that ask: target, masks, seeds."""
    return set(_feeds(json.loads(metadata(model)["onnxcrp.map"])).values())


def _feeds(names: Mapping[str, Any]) -> dict[str, str]:
    """Role ("target", "mask.<layer>", "seed.<layer>") -> input, from the map in a relevance model's metadata."""
    feeds = {f"mask.{layer}": name for layer, name in names["masks"].items()}
    feeds |= {f"seed.{layer}": name for layer, name in names["seeds"].items()}
    return feeds | ({"target": names["target"]} if names["target"] else {})


def shape_of(tensor: gs.Tensor) -> Shape:
    """Shape of a tensor: ints where static, symbols or None elsewhere; () where not even the rank is known."""
    return as_shape(tensor.shape if tensor.shape is not None else ())


def as_shape(sizes: Iterable[Any]) -> Shape:
    """Sizes as ints where static, symbols or None elsewhere."""
    found: list[int | str | None] = []
    for d in sizes:
        if isinstance(d, (int, np.integer)):
            found.append(int(d) if d >= 0 else None)
        else:
            found.append(str(d) if d else None)
    return tuple(found)
