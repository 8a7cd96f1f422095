"""Kernel machines spelled in standard operators become one node, so that a rule can be about the whole of them.

x [N, D], constant support vectors V [S, D], constant alpha [P, S], b [P]; the sums are over the last axis:

    Kernel, rbf             d = x[:, None] - V;  Linear(exp(-gamma sum d^2), alpha, b)
    SumKernel, intersection                      Linear(sum min(x[:, None], V), alpha, b)

d^2 is a Mul or a Pow, -gamma a Mul, a Div or a Neg. Polynomial and sigmoid kernels in standard operators are networks
with a hidden layer, which nothing tells apart, and stay that.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import (
    DOMAIN,
    Names,
    describe,
    detach,
    insert,
    only_reader,
    pinned,
    producer,
    prune,
    rank,
    set_output,
    value,
)
from onnxcrp.canonize.report import PassReport


def fuse_kernels(graph: gs.Graph) -> PassReport:
    """Fuse the patterns above; nothing else is touched."""
    report = PassReport("kernel machines")
    pins, names = pinned(graph), Names(graph)
    flat: dict[str, gs.Constant] = {}
    for node in list(graph.nodes):
        if node.op != "Linear" or not node.inputs or rank(node.inputs[0]) != 2:
            continue
        found = _machine(node.inputs[0], pins)
        if found is None:
            continue
        op, attrs, x, vectors = found
        if vectors.values.ndim > 2:  # others may read them as they are
            if vectors.name not in flat:
                matrix = vectors.values.reshape(vectors.values.shape[-2:])
                flat[vectors.name] = gs.Constant(names.fresh(f"{vectors.name}/matrix"), np.ascontiguousarray(matrix))
            vectors = flat[vectors.name]
        old, output = describe(node), node.outputs[0]
        machine = gs.Node(op, node.name, attrs, [x, vectors, *node.inputs[1:]], domain=DOMAIN)
        detach(node)
        set_output(machine, output)
        insert(graph, {id(node): ([], [machine])})
        report.done.append(f"{old} and the kernel before it: {op}, {attrs['kind']}, {len(vectors.values)} vectors")
    prune(graph)
    return report


def _machine(K: gs.Tensor, pins: set[str]) -> tuple[str, dict, gs.Tensor, gs.Constant] | None:
    """Operator, attributes, x and V of the kernels K [N, S]; None where it is another thing."""
    node = _maker(K, pins)
    if node is None:
        return None
    if node.op == "Exp":
        factor, node = _scaled(_maker(node.inputs[0], pins), pins)
        if factor >= 0 or node is None:
            return None
        inner = _summed(node, pins)
        found = _difference(_squared(inner, pins), pins)
        return None if found is None else ("Kernel", {"kind": "rbf", "gamma": -factor}, *found)
    inner = _summed(node, pins)
    if inner is None or inner.op != "Min" or len(inner.inputs) != 2:
        return None
    found = _pair(inner)
    return None if found is None else ("SumKernel", {"kind": "intersection"}, *found)


def _maker(tensor: gs.Tensor, pins: set[str]) -> gs.Node | None:
    """The standard operator that makes a tensor which nothing else reads."""
    node = producer(tensor)
    return node if node is not None and not node.domain and only_reader(tensor, pins) is not None else None


def _scaled(node: gs.Node | None, pins: set[str]) -> tuple[float, gs.Node | None]:
    """The product of all constants that a sum is multiplied by, and the node before them."""
    factor = 1.0
    while node is not None and node.op in ("Mul", "Div", "Neg"):
        if node.op == "Neg":
            factor, data = -factor, node.inputs[0]
        else:
            constants = {i: array for i in (0, 1) if (array := value(node, i)) is not None and array.size == 1}
            if not constants or (node.op == "Div" and 1 not in constants):
                break
            at, array = constants.popitem()
            number = float(array.reshape(()))
            factor = factor / number if node.op == "Div" else factor * number
            data = node.inputs[1 - at]
        node = _maker(data, pins)
    return factor, node


def _summed(node: gs.Node | None, pins: set[str]) -> gs.Node | None:
    """What a sum over the last of three axes is of."""
    if node is None or node.op != "ReduceSum" or node.attrs.get("keepdims", 1) or rank(node.inputs[0]) != 3:
        return None
    axes = value(node, 1)
    if axes is None or [int(axis) % 3 for axis in axes.reshape(-1)] != [2]:
        return None
    return _maker(node.inputs[0], pins)


def _squared(node: gs.Node | None, pins: set[str]) -> gs.Node | None:
    """What is multiplied by itself."""
    if node is None:
        return None
    if node.op == "Mul" and node.inputs[0] is node.inputs[1]:
        source = producer(node.inputs[0])
        others = [reader for reader in node.inputs[0].outputs if reader is not node]
        return source if source is not None and not others and node.inputs[0].name not in pins else None
    power = value(node, 1)
    if node.op == "Pow" and power is not None and power.size == 1 and float(power.reshape(())) == 2:
        return _maker(node.inputs[0], pins)
    return None


def _difference(node: gs.Node | None, pins: set[str]) -> tuple[gs.Tensor, gs.Constant] | None:
    return _pair(node) if node is not None and node.op == "Sub" else None


def _pair(node: gs.Node) -> tuple[gs.Tensor, gs.Constant] | None:
    """x [N, D] and V [S, D] or [1, S, D] of a node of x [N, 1, D] and a constant V, in either order."""
    for at in (0, 1):
        vectors, apart = value(node, 1 - at), producer(node.inputs[at])
        if vectors is None or vectors.ndim < 2 or vectors[..., 0, 0].size != 1:
            continue
        if apart is None or apart.op not in ("Unsqueeze", "Reshape") or rank(apart.inputs[0]) != 2:
            continue
        shape = node.inputs[at].shape
        if shape is None or len(shape) != 3 or shape[1] != 1 or shape[2] != vectors.shape[-1]:
            continue
        if apart.inputs[0].shape[1] != shape[2]:
            continue
        return apart.inputs[0], node.inputs[1 - at]
    return None
