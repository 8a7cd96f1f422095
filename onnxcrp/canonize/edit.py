"""Small edits of a graph that every pass needs, each linear in what it touches.

graphsurgeon links tensors and nodes both ways and unlinks by comparing whole nodes; a scale shared by 4000
QuantizeLinear makes that quadratic, so links are undone here by identity. Passes walk `graph.nodes` once, empty the
nodes they replace, and leave it to `prune` to take those out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

LINEAR = {"Conv", "ConvTranspose", "Linear"}
DOMAIN = "onnxcrp"  # of canonical operators that standard ONNX lacks


class Names:
    """Names no node and no tensor of the graph has yet."""

    def __init__(self, graph: gs.Graph) -> None:
        self.taken = {node.name for node in graph.nodes}
        self.taken.update(tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs))
        self.taken.update(tensor.name for tensor in (*graph.inputs, *graph.outputs))

    def fresh(self, name: str) -> str:
        """`name`, or `name~2`, `name~3` ... where that is taken."""
        fresh, n = name, 1
        while not fresh or fresh in self.taken:
            n += 1
            fresh = f"{name}~{n}"
        self.taken.add(fresh)
        return fresh


def value(node: gs.Node, index: int) -> np.ndarray | None:
    """The constant that is input `index`; None if it is computed or absent."""
    if index < len(node.inputs) and isinstance(node.inputs[index], gs.Constant):
        return node.inputs[index].values
    return None


def given(node: gs.Node, index: int) -> bool:
    """Whether the optional input `index` is there."""
    return index < len(node.inputs) and not node.inputs[index].is_empty()


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that writes `tensor`; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def pinned(graph: gs.Graph) -> set[str]:
    """Names that are read by more than nodes: the graph's outputs, and what subgraphs of control flow read."""
    names = {tensor.name for tensor in graph.outputs}
    for subgraph in graph.subgraphs(recursive=True):
        names.update(tensor.name for node in subgraph.nodes for tensor in node.inputs)
        names.update(tensor.name for tensor in subgraph.outputs)
    return names


def only_reader(tensor: gs.Tensor, pins: set[str]) -> gs.Node | None:
    """The one node that reads `tensor`, if nothing else does."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 and tensor.name not in pins else None


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Let `node` read `tensor`."""
    _unlink(node.inputs[index].outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def set_inputs(node: gs.Node, tensors: Iterable[gs.Tensor]) -> None:
    """Let `node` read `tensors` and nothing else."""
    for old in node.inputs:
        _unlink(old.outputs, node)
    list.clear(node.inputs)
    node.inputs.extend(list(tensors))


def set_output(node: gs.Node, tensor: gs.Tensor) -> None:
    """Let `node` write `tensor` as its only output."""
    for old in node.outputs:
        _unlink(old.inputs, node)
    list.clear(node.outputs)
    node.outputs.append(tensor)


def set_constant(node: gs.Node, index: int, values: np.ndarray, name: str) -> None:
    """Let `node` read a constant of its own; `index` may be one past its last input."""
    tensor = gs.Constant(name, values)
    if index < len(node.inputs):
        set_input(node, index, tensor)
    else:
        node.inputs.append(tensor)


def replace_reads(old: gs.Tensor, new: gs.Tensor) -> None:
    """Everything that reads `old` reads `new`."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, index, new)
                list.append(new.outputs, node)
    list.clear(old.outputs)


def detach(node: gs.Node) -> None:
    """Empty `node`, so that `prune` takes it out."""
    for tensor in node.inputs:
        _unlink(tensor.outputs, node)
    for tensor in node.outputs:
        _unlink(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)


def prune(graph: gs.Graph) -> None:
    """Take out nodes that nothing reads, in one walk from the last node to the first; inputs and outputs stay."""
    pins = pinned(graph)
    kept = []
    for node in reversed(graph.nodes):
        if any(tensor.outputs or tensor.name in pins for tensor in node.outputs):
            kept.append(node)
        else:
            detach(node)
    graph.nodes = kept[::-1]


def insert(graph: gs.Graph, where: dict[int, tuple[list[gs.Node], list[gs.Node]]]) -> None:
    """Write new nodes before and after existing ones: id(node) -> (before, after)."""
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        before, after = where.get(id(node), ([], []))
        nodes += [*before, node, *after]
    graph.nodes = nodes


def _unlink(links: list[gs.Node], node: gs.Node) -> None:
    for index, other in enumerate(links):
        if other is node:
            list.__delitem__(links, index)
            return


def rank(tensor: gs.Tensor) -> int | None:
    """Number of axes, where known."""
    return None if tensor.shape is None else len(tensor.shape)


def describe(node: gs.Node) -> str:
    """How reports name a node: Conv '/conv1/Conv'."""
    return f"{node.op} {node.name!r}"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cyclic collector goes through all nodes and tensors again and again while they only become more.

    Without it, graphs of ten thousand nodes are made in 60 % of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """graphsurgeon logs to stdout, which is for data."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity
