"""The public face: ask a model questions and get relevance.

A question is a start (the target's logit, or a hidden layer) and a condition. Questions that need the same relevance
model (same start layers, same conditioned layers) run together: one forward pass at batch 1 for all conditions of a
sample where axis 0 is the batch throughout, else the sample repeated for each. Results come in the order asked.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.condition import concepts
from onnxcrp.errors import CompositeError, QuestionError, UnsupportedError
from onnxcrp.question import Asked, listed
from onnxcrp.relevance import RelevanceModels, shape_of
from onnxcrp.result import NegativeLogitWarning, Result, plain
from onnxcrp.run import Run

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from onnxcrp.cache import Cache
    from onnxcrp.canonize import Canonical
    from onnxcrp.composite import Composite
    from onnxcrp.facts import Facts
    from onnxcrp.kept import Kept
    from onnxcrp.profiling import NodeTime

__all__ = ["Explainer", "LayerInfo", "NegativeLogitWarning", "Result"]

GIB = 1 << 30


@dataclass(frozen=True)
class LayerInfo:
    """What can be named: a node that relevance passes, with the tensor that conditions and records refer to."""

    name: str
    op: str
    family: str
    shape: tuple[int | str | None, ...]
    axis: int  # of the concepts
    channels: int | None  # how many concepts, where that is static
    concepts: Mapping[str, list[int | None]]  # what can be asked about by number: condition.concepts
    depth: int
    rule: str | None  # None for rearrangements and where no line of the composite fits
    parameters: Mapping[str, Any]
    names: tuple[str, ...]  # all names it answers to


class Explainer:
    """Explains one model under one composite; one Explainer may be used from many threads.

    `model`: path, ModelProto or Canonical. `composite`: preset, file or object. `output`: the model output to explain
    (the first one). `inputs`: those whose relevance is asked for (None: all that relevance reaches). `keep_head`:
    explain after a terminal Softmax or Sigmoid, not before. `providers`, `threads`: onnxruntime's (best first).
    `allow_tf32`: let CUDA round to TF32, faster and not accurate enough for most rules. `cuda_graph`: CUDA
    launches all kernels at once, from the second question of the same shapes on, for up to four sets of shapes, each
    with the weights once more; not for what `at` keeps.
    `memory_limit`: bytes that one run may take, roughly; `cache_limit`: bytes of compiled relevance models to keep.
    `low`, `high` (or `preprocessing`: an object that has them, a preset or a file): the range of input values, for
    composites that need it. `cache`: a folder in which canonical and compiled models are kept for the next process
    (None: what the environment variable ONNXCRP_CACHE names, False: none). A Canonical of one's own is not kept: no
    digest says how it was made.
    Raises ModelError, CompositeError, QuestionError (no such output or input).
    """

    def __init__(
        self,
        model: Any,
        composite: str | os.PathLike[str] | Composite = "epsilon_plus_flat",
        *,
        providers: Any = None,
        output: str | None = None,
        inputs: Sequence[str] | None = None,
        keep_head: bool = False,
        memory_limit: int = 2 * GIB,
        cache_limit: int = 4 * GIB,
        threads: int | None = None,
        allow_tf32: bool = False,
        cuda_graph: bool = False,
        preprocessing: Any = None,
        low: Any = None,
        high: Any = None,
        flip_convolutions: bool = True,
        cache: str | os.PathLike[str] | bool | Cache | None = None,
    ) -> None:
        from onnxcrp.cache import Cache
        from onnxcrp.canonize import Canonical, canonize
        from onnxcrp.composite import load
        from onnxcrp.facts import Facts

        self._options: dict[str, Any] = {
            "providers": providers,
            "output": output,
            "inputs": inputs,
            "keep_head": keep_head,
            "memory_limit": memory_limit,
            "cache_limit": cache_limit,
            "threads": threads,
            "preprocessing": preprocessing,
            "low": low,
            "high": high,
            "flip_convolutions": flip_convolutions,
            "allow_tf32": allow_tf32,
            "cuda_graph": cuda_graph,
            "cache": cache,
        }
        stored = Cache.of(cache)
        if isinstance(model, Canonical):
            self.canonical: Canonical = model
        else:
            self.canonical = canonize(model) if stored is None else stored.canonical(model)
        self.facts: Facts = Facts(self.canonical, output=output, inputs=inputs, keep_head=keep_head)
        self.composite: Composite = _bounded(load(composite), self.facts, preprocessing, low, high)
        self.memory_limit = memory_limit
        self._models = RelevanceModels(
            self.canonical,
            self.facts,
            self.composite,
            compile_options={
                "output": output,
                "inputs": inputs,
                "keep_head": keep_head,
                "flip_convolutions": flip_convolutions,
            },
            session_options={
                "providers": providers,
                "threads": threads,
                "allow_tf32": allow_tf32,
                "cuda_graph": cuda_graph,
            },
            cache_limit=cache_limit,
            cache=stored if self.canonical.stored else None,
        )

    # --- what the model is --------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> dict[str, tuple[np.dtype, tuple[int | str | None, ...]]]:
        """The model's inputs: name -> (dtype, shape)."""
        return self._models.inputs

    @cached_property
    def layers(self) -> list[LayerInfo]:
        """All that can be conditioned, recorded or started from, in execution order, with the rule each gets."""
        from onnxcrp.ops import OPS

        facts = self.facts
        below = facts.between([facts.explained], None)
        found = []
        for node in facts.nodes:
            if not facts.carries(node) or node.outputs[0].name not in below:
                continue
            hindered = node.op not in OPS or facts.obstacle(node) is not None
            family = "unsupported" if hindered else facts.family(node)
            rule, parameters = self._rule(node, family)
            layer = self._models.layer(facts.names.of(node))
            channels = layer.shape[layer.axis] if layer.axis < len(layer.shape) else None
            found.append(
                LayerInfo(
                    name=layer.name,
                    op=node.op,
                    family=family,
                    shape=layer.shape,
                    axis=layer.axis,
                    channels=channels if isinstance(channels, int) else None,
                    concepts=concepts(layer.shape, layer.axis, dense=family == "dense", heads=layer.heads),
                    depth=facts.depth[node.name],
                    rule=rule,
                    parameters=parameters,
                    names=tuple(facts.names.all_of(node)),
                )
            )
        return found

    def _rule(self, node: gs.Node, family: str) -> tuple[str | None, dict[str, Any]]:
        """The rule that the walk will use for a node, None where it would fail or needs none."""
        from onnxcrp.backward import assign

        if family == "rearrangement":
            return None, {}
        try:
            rule, parameters = assign(self.facts, self.composite, [node])[node.name]
        except (CompositeError, UnsupportedError):
            return None, {}
        return rule, {name: value for name, value in parameters.items() if name != "unchanged"}

    def inspect(self) -> dict[str, Any]:
        """What the model is, as plain JSON values: inputs, canonizers, layers, what is unsupported, how batches run."""
        facts, canonical, composite = self.facts, self.canonical, self.composite
        ruled = {layer.name for layer in self.layers if layer.rule}  # by a line that names the operator
        unsupported = [
            node
            for node in facts.unsupported(facts.between([facts.explained], None))
            if facts.names.of(node) not in ruled
        ]
        return {
            "inputs": {name: {"dtype": str(kind), "shape": list(shape)} for name, (kind, shape) in self.inputs.items()},
            "outputs": {
                t.name: {"dtype": str(np.dtype(t.dtype)) if t.dtype is not None else None, "shape": list(shape_of(t))}
                for t in facts.graph.outputs
            },
            "output": facts.output,
            "explained": {"tensor": facts.explained, "shape": list(shape_of(facts.tensors[facts.explained]))},
            "head": [f"{node.name} ({node.op})" for node in facts.head],
            "relevance_of": list(facts.inputs),
            "sha256": canonical.sha256,
            "opset": canonical.source_opset,
            "ir_version": canonical.source_ir,
            "batch": canonical.batch,
            "canonizers": [
                {"name": report.name, "done": list(report.done), "declined": list(report.declined)}
                for report in canonical.reports
            ],
            "composite": {
                "name": composite.name,
                "description": composite.description,
                "seed": composite.seed,
                "missing": list(composite.missing),
            },
            "layers": [
                {
                    "name": layer.name,
                    "op": layer.op,
                    "family": layer.family,
                    "shape": list(layer.shape),
                    "channels": layer.channels,
                    "concepts": dict(layer.concepts),
                    "depth": layer.depth,
                    "rule": layer.rule,
                    "parameters": plain(layer.parameters),
                    "names": list(layer.names),
                }
                for layer in self.layers
            ],
            "unsupported": [{"name": facts.names.of(node), "op": node.op} for node in unsupported],
            "shares_forward": facts.shares_forward,
            "batch_breaks": list(facts.batch_breaks),
            "quantized": self._models.is_quantized,
        }

    def under(self, composite: str | os.PathLike[str] | Composite) -> Explainer:
        """The same model with the same options under another composite; raises CompositeError."""
        return Explainer(self.canonical, composite, **self._options)

    # --- asking -------------------------------------------------------------------------------------------------------

    def explain(
        self,
        x: Any,
        target: Any = None,
        *,
        conditions: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
        record: str | Sequence[str] = (),
        seed: Any = None,
        start: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        start_from: str = "activation",
        bypass: str = "cut",
        pairwise: bool = False,
        inputs: Sequence[str] | None = None,
        return_ortvalue: bool = False,
    ) -> Result:
        """Relevance of the inputs, and of the layers in `record`, for `target` under each of `conditions`.

        `x`: array [B, ...], or {input: array}. `target`: as in condition.py; "topK" asks K questions. `conditions`: one
        condition, or a list of N of them, which gives relevance an axis N, [B, N, ...]; with `pairwise` the N = B
        conditions belong to one sample each, [B, ...]. `seed`: "output", "abs", "one", an array that relevance starts
        with, or None for the composite's own. `start`: {layer: concepts} to begin at instead of the target, or a list
        of them; `start_from`: "activation", "one", or "relevance", which is the target's under cut of these concepts.
        `bypass`: "cut" or "keep". `inputs`: those whose relevance is wanted (None: all, (): none). `return_ortvalue`:
        results stay on the device as they leave the model ([N, ...] for one sample), for what one run can answer, and
        an `x` that speaks DLPack is read where it is (`torch.from_dlpack(result.relevance["x"])` takes a result back).
        Raises InputError, QuestionError, CompositeError, UnsupportedError; warns with NegativeLogitWarning.
        """
        feeds, batch = self._models.check_inputs(x, stay=return_ortvalue)
        run = Run(self._models, feeds, batch, self.memory_limit)
        asked = Asked(
            self._models,
            batch,
            run.forward,
            target=target,
            conditions=conditions,
            record=record,
            seed=seed,
            start=start,
            start_from=start_from,
            bypass=bypass,
            pairwise=pairwise,
            inputs=inputs,
        )
        result = run.on_device(asked) if return_ortvalue else run.all(asked)
        if not return_ortvalue:
            asked.warn(result.explained)
        return result

    def at(self, x: Any) -> Kept:
        """Samples whose forward pass is kept on the device: `explainer.at(x).explain(target, conditions=...)`.

        Questions are those of `explain`, as often as you like: the forward pass runs once, what all questions of a set
        of layers share runs once for the set. Arrays of the host are copied, what lies on another device must stay as
        it is. Raises InputError, and QuestionError where conditions share no forward pass.
        """
        from onnxcrp.kept import Kept

        return Kept(self._models, *self._models.check_inputs(x, stay=True), self.memory_limit)

    def stream(
        self,
        x: Any,
        target: Any = None,
        *,
        conditions: Iterable[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """The answers of `explain` in parts, in order, each small enough for `memory_limit`.

        With `conditions` (any iterable, read as it is needed) the parts follow each other along N, else along the
        samples. Raises what `explain` does.
        """
        if isinstance(conditions, Mapping):
            raise QuestionError("stream takes a list of conditions, got one", hint="explain answers a single condition")
        if options.get("pairwise"):
            raise QuestionError("stream does not pair samples with conditions", hint="explain(..., pairwise=True)")
        feeds, batch = self._models.check_inputs(x)
        inputs = options.get("inputs")
        names = [self._models.layer(name).tensor for name in listed(options.get("record", ()))]
        names += self.facts.inputs if inputs is None else listed(inputs)
        sizes = self._models.elements(feeds)
        each = max(1, 4 * sum(sizes.get(name, 0) for name in names))
        if conditions is None:
            count = max(1, self.memory_limit // each)
            for at in range(0, batch, count):
                rows = slice(at, min(at + count, batch))
                part = {name: array[rows] if self._models.is_batched(name) else array for name, array in feeds.items()}
                cut = {name: self._of_rows(name, value, rows, batch) for name, value in options.items()}
                yield self.explain(part, self._of_rows("target", target, rows, batch), **cut)
            return
        count = max(1, self.memory_limit // (each * batch))
        remaining = iter(conditions)
        while part_of_them := list(itertools.islice(remaining, count)):
            yield self.explain(feeds, target, conditions=part_of_them, **options)

    def _of_rows(self, name: str, value: Any, rows: slice, batch: int) -> Any:
        """The part of an argument of `explain` that belongs to some of the samples: of target, seed and start."""
        if name == "start" and isinstance(value, (list, tuple)):
            return [self._of_rows(name, each, rows, batch) for each in value]
        if name == "start" and isinstance(value, Mapping):
            return {layer: self._concepts_of_rows(layer, concepts, rows, batch) for layer, concepts in value.items()}
        if name == "target" and isinstance(value, (list, range)):
            return list(value)[rows]
        if name not in ("target", "seed") or not isinstance(value, np.ndarray) or not value.ndim or len(value) != batch:
            return value
        is_list = name == "target" and value.ndim == 1 and value.dtype.kind in "iu"
        return value[rows] if is_list or value.ndim == len(self._models.explained_shape) else value

    def _concepts_of_rows(self, layer: str, concepts: Any, rows: slice, batch: int) -> Any:
        mask = self._models.layer(layer).mask(concepts)
        return mask[rows] if len(mask) == batch > 1 else concepts

    def profile(self, x: Any, target: Any = None, *, calls: int = 5, **question: Any) -> list[NodeTime]:
        """Where the time of `explain(x, target, **question)` goes: nodes as they run, median seconds of a call.

        Measured in sessions of their own (profiling slows them down), after a call that is not counted.
        """
        from onnxcrp.profiling import merged, read_profile

        twin = copy.copy(self)
        with tempfile.TemporaryDirectory(prefix="onnxcrp-", ignore_cleanup_errors=True) as folder:
            twin._models = self._models.with_sessions(profile=folder, cuda_graph=False)
            for _ in range(1 + calls):
                twin.explain(x, target, **question)
            profiles = [session.end_profile() for session in twin._models.sessions()]
            return merged(read_profile(path, calls=1 + calls, warmup=1) for path in profiles)


def _bounded(composite: Composite, facts: Facts, preprocessing: Any, low: Any, high: Any) -> Composite:
    """The composite with `low` and `high` where they are needed and known; else compiling says what is missing."""
    if isinstance(preprocessing, (str, os.PathLike)):
        from onnxcrp.preprocessing import Preprocessing

        preprocessing = Preprocessing.load(preprocessing)
    kinds = [np.dtype(t.dtype) for t in facts.graph.inputs if t.name in facts.inputs]
    pixels = np.iinfo(kinds[0]) if kinds and kinds[0] in (np.uint8, np.int8) else None
    given: dict[str, Any] = {}
    for name, value in (("low", low), ("high", high)):
        if name not in composite.missing:
            continue  # bounds that no rule needs are no mistake: the same call serves every composite
        if value is None:
            value = getattr(preprocessing, name, None)
        if value is None and pixels is not None:
            value = float(pixels.min if name == "low" else pixels.max)
        if value is not None:
            given[name] = value
    return composite.with_parameters(**given)
