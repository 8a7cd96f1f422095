"""Control flow that is known before the model runs is written out.

- If with a constant condition is the branch that is taken.
- Loop: body(t, go on, states) -> go on, states, values, for t = 0, 1, ... as often as a constant says or as the body
  says, computed from constants. The states of one turn are read by the next, the values are stacked along a new axis.
- Scan: body(states, slices) -> states, values, once for each slice of its inputs.

What depends on constants alone (the turn's number, a counter among the states) is computed while writing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.build import Build, Declined, arguments, read_outputs
from onnxcrp.canonize.constants import evaluate
from onnxcrp.canonize.edit import detach, pinned
from onnxcrp.canonize.report import PassReport

TURNS = 256  # at most
NODES = 10_000  # that one loop may become, at most


def inline_control_flow(graph: gs.Graph) -> PassReport:
    """Replace If by its branch, Loop and Scan by their turns, where all that decides is constant.

    Declined, with the reason: a condition or a number of turns that is computed from data or from a size that is not
    known, more than 256 turns or 10 000 nodes.
    """
    report = PassReport("control flow")
    while True:  # what a branch holds may be control flow again
        form = _Form(graph)
        report.declined.clear()
        before = len(report.done)
        for node in graph.nodes:
            rewrite = {"If": form.branch, "Loop": form.loop, "Scan": form.scan}.get(node.op)
            if rewrite is not None and not node.domain:
                bodies = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
                count = len(report.done)
                form.write.replace(node, rewrite, report)
                if len(report.done) > count:
                    for body in bodies:
                        _detach(body)
        form.write.finish()
        if len(report.done) == before:
            return report


class _Form:
    """Writes bodies out."""

    def __init__(self, graph: gs.Graph) -> None:
        self.write = Build(graph)
        self.pins = pinned(graph)
        self.constants = {id(t): t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}

    def branch(self, node: gs.Node) -> str:
        """The branch that a constant condition takes."""
        condition = _constant(node.inputs[0])
        if condition is None:
            raise Declined("its condition is computed")
        name = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
        body = node.attrs[name]
        for tensor, result in zip(node.outputs, self.inline(body, {}, ""), strict=True):
            self.write("Identity", result, output=tensor)
        return f"its {name}, {len(body.nodes)} nodes"

    def loop(self, node: gs.Node) -> str:
        """The states after the last turn, then the values of all turns, stacked."""
        body = node.attrs["body"]
        most, go_on, *states = arguments(node, 2)
        turns = None if most is None else _constant(most)
        if most is not None and turns is None:
            raise Declined("its number of turns is computed")
        limit = TURNS + 1 if turns is None else int(turns.reshape(-1)[0])
        going: gs.Tensor = go_on or self.write.constant(True, f"{node.name}/condition", bool)
        current = [state if state is not None else gs.Variable.empty() for state in states]
        values: list[list[gs.Tensor]] = [[] for _ in body.outputs[1 + len(states) :]]
        turn = 0
        while turn < limit:
            condition = _constant(going)
            if condition is None:
                raise Declined("whether it goes on is computed")
            if not condition.reshape(-1)[0]:
                break
            _check(turn + 1, body)
            number = self.write.constant(turn, f"{node.name}/{turn}", np.int64)
            read = dict(zip((tensor.name for tensor in body.inputs), (number, going, *current), strict=True))
            going, *results = self.inline(body, read, f"/{turn}")
            current = results[: len(current)]
            for stack, value in zip(values, results[len(current) :], strict=True):
                stack.append(value)
            turn += 1
        self.results(node, current, values, [0] * len(values))
        return f"{turn} turns"

    def scan(self, node: gs.Node) -> str:
        """The states after the last slice, then the values of all slices, stacked."""
        body, count = node.attrs["body"], int(node.attrs["num_scan_inputs"])
        inputs = arguments(node, 0)
        current = [tensor for tensor in inputs[: len(inputs) - count] if tensor is not None]
        scanned = [tensor for tensor in inputs[len(inputs) - count :] if tensor is not None]
        outputs = len(body.outputs) - len(current)
        axes = list(node.attrs.get("scan_input_axes", [0] * count))
        shapes = [tensor.shape for tensor in scanned]
        lengths = {shape[axis] for shape, axis in zip(shapes, axes, strict=True) if shape is not None}
        length = next(iter(lengths), None)
        if any(shape is None for shape in shapes) or len(lengths) != 1 or not isinstance(length, int):
            raise Declined("the length of its inputs is not known")
        _check(length, body)
        sliced = [self.slices(node, x, axis, length) for x, axis in zip(scanned, axes, strict=True)]
        for index, backward in enumerate(node.attrs.get("scan_input_directions", [])):
            sliced[index] = sliced[index][::-1] if backward else sliced[index]
        values: list[list[gs.Tensor]] = [[] for _ in range(outputs)]
        for turn in range(length):
            reads = (*current, *(pieces[turn] for pieces in sliced))
            results = self.inline(body, dict(zip((t.name for t in body.inputs), reads, strict=True)), f"/{turn}")
            current = results[: len(current)]
            for stack, value in zip(values, results[len(current) :], strict=True):
                stack.append(value)
        for index, backward in enumerate(node.attrs.get("scan_output_directions", [])):
            values[index] = values[index][::-1] if backward else values[index]
        self.results(node, current, values, list(node.attrs.get("scan_output_axes", [0] * outputs)))
        return f"{length} slices"

    def slices(self, node: gs.Node, x: gs.Tensor, axis: int, length: int) -> list[gs.Tensor]:
        """x[..., t, ...] for each t."""
        axis = axis % len(x.shape)
        shape = [size for index, size in enumerate(x.shape) if index != axis]
        pieces = [x]
        if length > 1:
            names = [self.write.names.fresh(f"{node.name}/{x.name}/{t}") for t in range(length)]
            pieces = [gs.Variable(name, dtype=x.dtype, shape=[*shape[:axis], 1, *shape[axis:]]) for name in names]
            self.write("Split", x, output=pieces[0], axis=axis, num_outputs=length)
            self.write.nodes[-1].outputs.extend(pieces[1:])
        return [self.write("Squeeze", piece, self.write.axes(axis), dtype=x.dtype, shape=shape) for piece in pieces]

    def results(
        self, node: gs.Node, states: Sequence[gs.Tensor], values: list[list[gs.Tensor]], axes: list[int]
    ) -> None:
        """The outputs of a loop."""
        read = read_outputs(node, self.pins)
        for index, tensor in enumerate(node.outputs):
            if index not in read:
                continue
            if index < len(states):
                self.write("Identity", states[index], output=tensor)
                continue
            stack, axis = values[index - len(states)], axes[index - len(states)]
            if not stack:
                raise Declined(f"it has no turns, and {tensor.name!r} is read")
            raised = [self.write("Unsqueeze", value, self.write.axes(axis), dtype=value.dtype) for value in stack]
            self.write("Concat", *raised, output=tensor, axis=axis)

    # ------------------------------------------------------------------------------------------------------- one body

    def inline(self, body: gs.Graph, reads: dict[str, gs.Tensor], turn: str) -> list[gs.Tensor]:
        """Append the nodes of a body whose inputs are `reads`; its outputs."""
        tensors = dict(reads)
        for node in body.nodes:
            inputs = [self.outer(tensor, tensors) for tensor in node.inputs]
            constant = all(tensor.is_empty() or isinstance(tensor, gs.Constant) for tensor in inputs)
            if constant and not node.domain and not any(True for _ in node.subgraphs()):
                plain = gs.Node(node.op, node.name, node.attrs, inputs, [gs.Variable(t.name) for t in node.outputs])
                values = evaluate(plain, self.write.graph.opset)
                detach(plain)
                if not isinstance(values, str):
                    for tensor, array in zip(node.outputs, values, strict=True):
                        tensors[tensor.name] = self.write.constant(array, f"{self.write.name}{turn}/{tensor.name}")
                    continue
            outputs = []
            for tensor in node.outputs:
                if not tensor.is_empty():
                    name = self.write.names.fresh(f"{self.write.name}{turn}/{tensor.name}" if turn else tensor.name)
                    tensors[tensor.name] = gs.Variable(name, dtype=tensor.dtype, shape=tensor.shape)
                outputs.append(gs.Variable.empty() if tensor.is_empty() else tensors[tensor.name])
            name = f"{self.write.name}{turn}/{node.name or node.op}" if turn or not node.name else node.name
            attrs = {key: self.nested(value, tensors) for key, value in node.attrs.items()}
            self.write.nodes.append(
                gs.Node(node.op, self.write.names.fresh(name), attrs, inputs, outputs, domain=node.domain)
            )
        return [self.outer(tensor, tensors) for tensor in body.outputs]

    def outer(self, tensor: gs.Tensor, tensors: dict[str, gs.Tensor]) -> gs.Tensor:
        """What a body's tensor is in the graph around it."""
        if tensor.is_empty():
            return gs.Variable.empty()
        if tensor.name in tensors:
            return tensors[tensor.name]
        if not isinstance(tensor, gs.Constant):
            return tensor  # of the graph around it already
        if id(tensor) not in self.constants:
            self.constants[id(tensor)] = gs.Constant(self.write.names.fresh(tensor.name), tensor.values)
        return self.constants[id(tensor)]

    def nested(self, value: object, tensors: dict[str, gs.Tensor]) -> object:
        """An attribute; a body inside a body reads the tensors of this turn."""
        if not isinstance(value, gs.Graph):
            return value
        around = {t.name: t for g in (value, *value.subgraphs(recursive=True)) for n in g.nodes for t in n.inputs}
        return value.copy({name: tensors.get(name, tensor) for name, tensor in around.items() if name})


def _constant(tensor: gs.Tensor) -> np.ndarray | None:
    return tensor.values if isinstance(tensor, gs.Constant) else None


def _check(turns: int, body: gs.Graph) -> None:
    """Declines what becomes too large."""
    if turns > TURNS or turns * len(body.nodes) > NODES:
        count = len(body.nodes)
        raise Declined(f"{turns} turns or more of {count} nodes: at most {TURNS} and {NODES} nodes in all are written")


def _detach(body: gs.Graph) -> None:
    """Empty the nodes of a body, which tensors of the graph around it know as readers."""
    for graph in (body, *body.subgraphs(recursive=True)):
        for node in graph.nodes:
            detach(node)
