"""Write nodes in the place of one: what passes that take an operator apart share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import Names, describe, detach, insert, prune, set_output
from onnxcrp.canonize.report import PassReport


class Declined(Exception):
    """Why a node is left alone."""


class Build:
    """Appends nodes in the place of the node that is being replaced; `finish` writes them into the graph.

    The node that stands for the replaced one should get its name (`at=""`), so that names of layers stay.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.name = ""
        self.nodes: list[gs.Node] = []
        self._new: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}
        self._obsolete: list[gs.Node] = []

    def replace(self, node: gs.Node, rewrite: Callable[[gs.Node], str], report: PassReport) -> None:
        """Let `rewrite` append what computes the outputs of `node`; it tells what that is, or raises `Declined`."""
        old = f"{node.domain}.{describe(node)}" if node.domain and "::" not in node.op else describe(node)
        self.name, self.nodes, self._obsolete = node.name, [], [node]
        try:
            line = rewrite(node)
        except Declined as reason:
            for written in self.nodes:
                detach(written)
            report.declined.append(f"{old}: {reason}")
            return
        for gone in self._obsolete:
            detach(gone)
        self._new[id(node)] = (self.nodes, [])
        report.done.append(f"{old}: {line}")

    def also(self, node: gs.Node) -> gs.Tensor:
        """The output of a node after the replaced one, which goes with it."""
        self._obsolete.append(node)
        return node.outputs[0]

    def __call__(
        self,
        op: str,
        *inputs: gs.Tensor | None,
        output: gs.Tensor | None = None,
        at: str | None = None,
        domain: str = "",
        dtype: np.dtype | type | int | None = None,
        shape: list | tuple | None = None,
        **attrs: Any,
    ) -> gs.Tensor:
        """Append a node and return its output; `at`: its name under the replaced node's, "" being that name itself."""
        part = op if at is None else at
        name = self.names.fresh(f"{self.name}/{part}") if part else self.name
        if output is None:
            kind = np.dtype(dtype) if isinstance(dtype, type) else dtype
            output = gs.Variable(self.names.fresh(f"{name}_output"), dtype=kind, shape=shape)
        given = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
        while given and given[-1].is_empty():
            given.pop()
        node = gs.Node(op, name, attrs, given, domain=domain or None)
        set_output(node, output)
        self.nodes.append(node)
        return output

    def constant(self, values: np.ndarray | float | list[int], name: str, dtype: Any = None) -> gs.Constant:
        """A constant of a name that is still free."""
        return gs.Constant(self.names.fresh(name), np.array(values, dtype))

    def axes(self, *axes: int) -> gs.Constant:
        """Axes, or a shape, as the operators of opset 18 read them."""
        return self.constant(list(axes), f"{self.name}/axes", np.int64)

    def finish(self) -> None:
        """Write what was appended, take out what is not read any more."""
        insert(self.graph, self._new)
        prune(self.graph)


def arguments(node: gs.Node, count: int) -> list[gs.Tensor | None]:
    """`count` inputs, None for those that are absent."""
    inputs = [None if tensor.is_empty() else tensor for tensor in node.inputs]
    return inputs + [None] * (count - len(inputs))


def kept(node: gs.Node, *names: str) -> dict[str, Any]:
    """Those of a node's attributes."""
    return {name: node.attrs[name] for name in names if name in node.attrs}


def read_outputs(node: gs.Node, pins: set[str]) -> list[int]:
    """Numbers of the outputs that something reads."""
    return [i for i, t in enumerate(node.outputs) if not t.is_empty() and (t.outputs or t.name in pins)]
