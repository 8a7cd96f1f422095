"""A relevance model in three stages, so that one forward pass serves many questions.

    forward    the model's own nodes: inputs -> activations that the backward pass reads
    factors    what is the same for all questions: activations -> denominators, a / z, masks of positive entries
    messages   what depends on target, masks and seeds: these, activations and factors -> relevance

Nodes are those of the one relevance model, each in the earliest stage that has all it reads; what follows from weights
alone is in every stage that reads it, where the runtime folds it. onnxruntime optimises the stages as it does the
whole, so that answers agree to rounding and mostly bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

if TYPE_CHECKING:
    from onnxcrp.session import Port, Session

BACKWARD = "R/"  # what the walk writes is named so

Ports = Mapping[str, "Port"]


@dataclass(frozen=True)
class Stage:
    """A part of a relevance model: its nodes in order, what it reads that other stages or the caller make."""

    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The three stages of a relevance model."""

    model: onnx.ModelProto
    constant: tuple[onnx.NodeProto, ...]  # follow from weights alone
    forward: Stage
    factors: Stage
    messages: Stage

    def made_by(self, stage: Stage) -> set[str]:
        """Names of the tensors that a stage computes."""
        return {name for node in stage.nodes for name in node.output if name}


def split(model: onnx.ModelProto, questions: Iterable[str]) -> Split:
    """The stages of a relevance model; `questions`: its inputs that ask (target, masks, seeds)."""
    from onnxcrp.canonize.load import names_read

    asked = set(questions)
    known = {tensor.name for tensor in model.graph.initializer} - asked
    backward: set[str] = set()
    fixed: list[onnx.NodeProto] = []
    parts: dict[str, list[onnx.NodeProto]] = {"forward": [], "factors": [], "messages": []}
    for node in model.graph.node:
        inputs = {name for name in names_read(node) if name}
        if node.name.startswith(BACKWARD) and inputs <= known:
            fixed.append(node)
            known.update(node.output)
            continue
        if inputs & asked:
            part, made = "messages", asked
        elif inputs & backward or node.name.startswith(BACKWARD):
            part, made = "factors", backward
        else:
            part, made = "forward", set()
        parts[part].append(node)
        made.update(name for name in node.output if name)

    def stage(nodes: list[onnx.NodeProto]) -> Stage:
        made = {name for node in nodes for name in node.output}
        inner = {name for node in nodes for name in _inside(node)}
        read = dict.fromkeys(name for node in nodes for name in names_read(node) if name)
        return Stage(tuple(nodes), tuple(name for name in read if name not in made | known | inner))

    return Split(model, tuple(fixed), *(stage(nodes) for nodes in parts.values()))


def _inside(node: onnx.NodeProto) -> Iterable[str]:
    """Names that belong to the subgraphs of a node alone."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            graph = attribute.g
            yield from (port.name for port in (*graph.input, *graph.initializer))
            for inner in graph.node:
                yield from inner.output
                yield from _inside(inner)


def part(split: Split, stage: Stage, outputs: Sequence[str], ports: Ports) -> onnx.ModelProto:
    """A stage as a model of its own; `ports` say the types and shapes of what it reads from other stages."""
    from onnxcrp.canonize.load import names_read

    source = split.model
    nodes = _needed([*split.constant, *stage.nodes], outputs)
    wanted = {name for node in nodes for name in names_read(node)}
    declared = {port.name: port for port in source.graph.input}
    inputs = []
    for name in stage.reads:
        if name in wanted:
            inputs.append(declared[name] if name in declared else _port(name, ports[name]))
    typed = {port.name: port for port in source.graph.output}
    ends = [typed.get(name, onnx.ValueInfoProto(name=name)) for name in outputs]
    graph = onnx.helper.make_graph([], source.graph.name, inputs, ends)
    graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    graph.value_info.extend(
        info for info in source.graph.value_info if info.name in made and info.name not in set(outputs)
    )
    model = onnx.helper.make_model(graph, opset_imports=list(source.opset_import), ir_version=source.ir_version)
    for tensor in source.graph.initializer:  # in place: a copied protobuf may be larger than 2 GB
        if tensor.name in wanted:
            model.graph.initializer.add().CopyFrom(tensor)
    return model


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that `outputs` depend on, in their order."""
    from onnxcrp.canonize.load import names_read

    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(names_read(node))
    return kept[::-1]


def _port(name: str, port: Port) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, list(port.shape))


class Staged:
    """The sessions of a relevance model's stages; `start(model, rest=...)` makes one. Thread-safe as sessions are.

    `outputs`: all that may be asked for. `keep`: further tensors of the forward stage that are computed with it, for
    other relevance models of the same canonical model.
    """

    def __init__(self, whole: Split, outputs: Sequence[str], keep: Iterable[str], start: Callable[..., Any]) -> None:
        forward, factors = whole.made_by(whole.forward), whole.made_by(whole.factors)
        later = {*whole.factors.reads, *whole.messages.reads, *outputs}
        self.activations = sorted(later & forward | set(keep) & forward)
        self.outputs = {name: "forward" if name in forward else "factors" if name in factors else "messages"
                        for name in outputs}  # fmt: skip
        self._sessions: dict[str, Session] = {}
        self._sessions["forward"] = start(part(whole, whole.forward, self.activations, {}), rest=True)
        ports = {**self._sessions["forward"].inputs, **self._sessions["forward"].outputs}
        self.factors = sorted({*whole.messages.reads, *outputs} & factors)
        if self.factors:
            self._sessions["factors"] = start(part(whole, whole.factors, self.factors, ports), rest=True)
            ports = {**ports, **self._sessions["factors"].outputs}
        self.answers = [name for name, stage in self.outputs.items() if stage == "messages"]
        if self.answers:
            self._sessions["messages"] = start(part(whole, whole.messages, self.answers, ports))

    @property
    def sessions(self) -> list[Any]:
        """One for each stage."""
        return list(self._sessions.values())

    def forward(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Activations, as OrtValues on the device, for the model's own inputs."""
        return self._sessions["forward"].run_ortvalues(_of(self._sessions["forward"], feeds), self.activations)

    def same_for_all(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Factors, as OrtValues, from inputs and activations."""
        if not self.factors:
            return {}
        return self._sessions["factors"].run_ortvalues(_of(self._sessions["factors"], known), self.factors)

    def answer(self, known: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Outputs by name, as OrtValues, from all that is known: inputs, activations, factors and the question."""
        asked = [name for name in outputs if self.outputs[name] == "messages"]
        made = self._sessions["messages"].run_ortvalues(_of(self._sessions["messages"], known), asked) if asked else {}
        return {name: made[name] if name in made else known[name] for name in outputs}


def _of(session: Session, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a session takes of all that is known."""
    return {name: values[name] for name in session.inputs if name in values}
