"""torch's as_strided, exported as a Gather among the entries of all samples, picks within each sample.

x [N, ...] with S entries in a sample, read as Gather(Reshape(x, [-1]), n S + k) for n = 0 .. N-1 and constant k with
0 <= k < S, is Gather(Reshape(x, [0, S]), k, axis=1), and nothing but a Reshape where k counts from 0 to S-1.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import Names, describe, insert, producer, prune, set_inputs, value
from onnxcrp.canonize.report import PassReport

_WIDE = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, np.int64, np.int32)  # types that no count of samples leaves


class Steps(NamedTuple):
    """Integers n stride + offsets [1, ...] for n = 0 .. (samples of `like`) - 1 on axis 0."""

    stride: int
    offsets: np.ndarray
    like: gs.Tensor


def gather_in_samples(graph: gs.Graph) -> PassReport:
    """Indices into all samples together -> into each; the batch axis of `graph` is a symbol, its constants folded."""
    report = PassReport("views by stride")
    names = Names(graph)
    new: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}
    for node in graph.nodes:
        if node.op != "Gather" or node.domain or node.attrs.get("axis", 0):
            continue
        x, steps = _flattened(node.inputs[0]), _steps(node.inputs[1])
        if x is None or steps is None or not _fits(x, steps):
            continue
        offsets = steps.offsets[0]
        in_order = np.array_equal(offsets.reshape(-1), np.arange(steps.stride))
        sizes = np.array([0, *(offsets.shape if in_order else [steps.stride])], np.int64)
        read: list[gs.Tensor] = [x, gs.Constant(names.fresh(f"{node.name}/shape"), sizes)]
        if in_order:
            node.op, node.attrs = "Reshape", {}
            set_inputs(node, read)
            report.done.append(f"{describe(node)} was a Gather of every entry in order")
            continue
        rows = gs.Variable(names.fresh(f"{node.name}/rows"), x.dtype, [x.shape[0], steps.stride])
        new[id(node)] = ([gs.Node("Reshape", names.fresh(f"{node.name}/Reshape"), {}, read, [rows])], [])
        node.attrs = {"axis": 1}
        set_inputs(node, [rows, gs.Constant(names.fresh(f"{node.name}/places"), offsets)])
        report.done.append(f"{describe(node)} picks within samples")
    insert(graph, new)
    prune(graph)
    return report


def _flattened(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, where a tensor is Reshape(x, [-1])."""
    node = producer(tensor)
    if node is None or node.op != "Reshape":
        return None
    shape = value(node, 1)
    return node.inputs[0] if shape is not None and shape.tolist() == [-1] else None


def _fits(x: gs.Tensor, steps: Steps) -> bool:
    """Whether there is a step for each sample of x, and it stays among the entries of that sample."""
    if not x.shape or not all(isinstance(size, int) for size in x.shape[1:]):
        return False
    samples = (steps.like.shape or [None])[0]
    alike = steps.like is x or (isinstance(samples, str) and samples == x.shape[0])
    offsets = steps.offsets
    within = bool(offsets.size) and offsets.min() >= 0 and offsets.max() < steps.stride
    return bool(alike and within and prod(x.shape[1:]) == steps.stride)


def _steps(tensor: gs.Tensor) -> Steps | None:
    """What is computed from the number of samples by Range, products and sums with constants."""
    node = producer(tensor)
    if node is None or node.domain:
        return None
    if node.op == "Range":
        like, start, delta = _counted(node.inputs[1]), value(node, 0), value(node, 2)
        from_zero = start is not None and delta is not None and (start.item(), delta.item()) == (0, 1)
        return Steps(1, np.zeros(1, np.int64), like) if from_zero and like is not None else None
    if node.op == "Identity" or (node.op == "Cast" and node.attrs.get("to") in _WIDE):
        return _steps(node.inputs[0])
    if node.op == "Unsqueeze":
        found, axes = _steps(node.inputs[0]), value(node, 1)
        if found is None or axes is None:
            return None
        places = [int(axis) % (found.offsets.ndim + axes.size) for axis in axes.reshape(-1)]
        return found._replace(offsets=np.expand_dims(found.offsets, tuple(places))) if 0 not in places else None
    if node.op not in ("Add", "Mul"):
        return None
    for left, right in ((0, 1), (1, 0)):
        found, constant = _steps(node.inputs[left]), value(node, right)
        if found is None or constant is None or constant.dtype.kind != "i" or constant.ndim > found.offsets.ndim:
            continue
        if node.op == "Mul" and constant.size == 1:
            factor = int(constant.reshape(()))
            return Steps(found.stride * factor, found.offsets * factor, found.like)
        if node.op == "Add" and (constant.ndim < found.offsets.ndim or constant.shape[0] == 1):  # alike for all samples
            return found._replace(offsets=found.offsets + constant)
    return None


def _counted(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, where a number is the size of its axis 0."""
    node = producer(tensor)
    while node is not None and node.op in ("Squeeze", "Cast", "Identity", "Reshape"):
        node = producer(node.inputs[0])
    if node is None:
        return None
    last = node.attrs.get("end")
    if node.op == "Gather":
        index, node, last = value(node, 1), producer(node.inputs[0]), 1
        if node is None or index is None or index.reshape(-1).tolist() != [0]:
            return None
    return node.inputs[0] if node.op == "Shape" and (node.attrs.get("start", 0), last) == (0, 1) else None
