"""Find the nodes between two tensors and put one in their place: what passes that fuse split operators share.

Exporters write the same function with other operand orders, associations and constants. So a region is not compared
with a picture of it: it is grown backwards from its last node until one tensor is left that it depends on, and then
*evaluated* on a few numbers. A pass compares these with the functions it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import Names, describe, detach

Evaluate = Callable[..., np.ndarray]  # (attributes, *inputs) -> output


@dataclass(frozen=True)
class Region:
    """Nodes in execution order that compute `out` from `x` and constants alone."""

    x: gs.Tensor
    nodes: tuple[gs.Node, ...]

    @property
    def out(self) -> gs.Tensor:
        """The output of the last node."""
        return self.nodes[-1].outputs[0]

    def read_elsewhere(self, pins: set[str]) -> str | None:
        """Why the region cannot become one node: what else reads a tensor inside it (`edit.pinned`); None if it can."""
        inside = {id(node) for node in self.nodes}
        for node in self.nodes[:-1]:
            tensor = node.outputs[0]
            if tensor.name in pins:
                return f"{tensor.name!r} is an output"
            if others := [reader for reader in tensor.outputs if id(reader) not in inside]:
                return f"{tensor.name!r} is also read by {describe(others[0])}"
        return None

    def fuse(self, op: str, name: str, *, domain: str = "", attrs: dict, constants: list[gs.Constant]) -> gs.Node:
        """One node from `x` to `out`; the region's nodes are emptied, `prune` takes them out."""
        x, out = self.x, self.out
        for node in self.nodes:
            detach(node)
        return gs.Node(op, name, attrs, [x, *constants], [out], domain=domain or None)

    def scoped_name(self, op: str, names: Names) -> str:
        """/layer1/act/Mul, /layer1/act/Sigmoid -> /layer1/act/Silu; the last node's name where there is no scope."""
        scopes = [node.name.split("/")[:-1] for node in self.nodes]
        shared = [part for part, *others in zip(*scopes, strict=False) if all(part == other for other in others)]
        wanted = "/".join([*shared, op])
        if not any(shared) or self.nodes[-1].name == wanted:  # as `lower` names the last of several nodes
            return self.nodes[-1].name
        return names.fresh(wanted)

    def values(self, x: np.ndarray, table: Mapping[str, Evaluate]) -> np.ndarray:
        """The output for input values `x`, computed in float64 by `table`'s function for each op."""
        known = {self.x.name: x}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                inputs = [None if t.is_empty() else known.get(t.name, constant(t)) for t in node.inputs]
                known[node.outputs[0].name] = table[node.op](node.attrs, *inputs)
        found = known[self.out.name]
        if found.ndim > x.ndim:  # a constant of higher rank: no function of x elementwise
            return np.full(x.shape, np.nan)
        return np.broadcast_to(found, x.shape)


def constant(tensor: gs.Tensor) -> np.ndarray | None:
    """The values of a constant, None for what is computed."""
    if isinstance(tensor, gs.Constant):
        return tensor.values
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant":
        value = next(iter(tensor.inputs[0].attrs.values()), None)  # a function's attribute that was left out
        return value.values if isinstance(value, gs.Constant) else None if value is None else np.asarray(value)
    return None


def regions(
    last: gs.Node, order: Mapping[int, int], allowed: Callable[[gs.Node], bool], limit: int = 12
) -> Iterator[Region]:
    """Regions that end with `last`, each larger than the one before, of at most `limit` nodes that are `allowed`.

    `order` gives the place of each node, by its id().
    """
    nodes: list[gs.Node] = []
    frontier = {last.outputs[0].name: last.outputs[0]}
    while len(nodes) < limit:
        newest = max(frontier.values(), key=lambda t: order[id(t.inputs[0])] if t.inputs else -1)
        if len(newest.inputs) != 1 or len(newest.inputs[0].outputs) != 1 or not allowed(newest.inputs[0]):
            return
        node = newest.inputs[0]
        nodes.append(node)
        del frontier[newest.name]
        frontier.update({t.name: t for t in node.inputs if not t.is_empty() and constant(t) is None})
        if not frontier:
            return  # a constant, which is folded elsewhere
        if len(frontier) == 1:
            yield Region(next(iter(frontier.values())), tuple(reversed(nodes)))
