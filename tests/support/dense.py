"""LRP on any raw ONNX graph by dense float64 matrices: no canonical form, no transpose, no graph of ours.

Every node is run by onnxruntime on the unit vectors of its input, which gives its matrix J and its constant part b; the
rules are their textbook formulas over J. Batch 1, small tensors. A BatchNormalization behind a linear layer counts as
part of it. A sum's, mean's or interpolation's inputs get their shares; what is elementwise passes.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

EPS = 1e-6
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MOVES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat", "Split", "Slice", "Gather"}
MOVES |= {"Pad", "Tile", "Identity", "DepthToSpace", "SpaceToDepth", "Dropout"}
MEANS = {"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"}
LARGEST = {"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"}
SUMS = {"Add": lambda at, n: 1, "Sum": lambda at, n: 1, "Sub": lambda at, n: 1 - 2 * at, "Mean": lambda at, n: 1 / n}
FIRST_INPUT = MOVES - {"Concat"} | {"Resize", "Upsample", "Clip", "PRelu", "BatchNormalization", "Pow"}


def stab(z: np.ndarray) -> np.ndarray:
    return z + EPS * np.where(z >= 0, 1, -1)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Dense:
    """One net on one input {name: array [1, ...]}: the values of all tensors, then relevance under a rule."""

    def __init__(self, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
        self.opset = model.opset_import[0].version
        self.nodes = list(model.graph.node)
        every = onnx.ModelProto()
        every.CopyFrom(model)
        have = {output.name for output in model.graph.output}
        names = [name for node in self.nodes for name in node.output if name and name not in have]
        every.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        run = session(every)
        found = zip([output.name for output in run.get_outputs()], run.run(None, feeds), strict=True)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.value = dict(found) | feeds | constants
        self.outputs = have
        self.data = set(feeds)
        for node in self.nodes:
            if self.reads(node):
                self.data.update(node.output)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def reads(self, node: onnx.NodeProto) -> list[str]:
        """The inputs through which relevance goes, each once."""
        names = node.input[:1] if node.op_type in FIRST_INPUT else node.input
        return [name for name in dict.fromkeys(names) if name in self.data]

    def run(self, node: onnx.NodeProto, over: dict[str, np.ndarray], weights: dict | None = None) -> list[np.ndarray]:
        fixed = {name: self.value[name] for name in node.input if name and name not in over} | (weights or {})
        shapes = {name: v.shape for name, v in over.items()}
        key = node.SerializeToString(), tuple((k, v.tobytes()) for k, v in fixed.items()), tuple(shapes.items())
        found = _session(_Key(key, node, fixed, shapes, self.opset))
        return found.run(None, {name: v.astype(np.float32) for name, v in over.items()})

    def matrices(self, node: onnx.NodeProto, name: str, weights: dict | None = None) -> tuple[list, list]:
        """J [out, in] and b [out] of each output; the other data inputs are 0."""
        x = self.value[name]
        over = {other: np.zeros_like(self.value[other]) for other in self.reads(node)}
        b = [y.astype(np.float64).ravel() for y in self.run(node, over, weights)]
        columns: list[list[np.ndarray]] = [[] for _ in b]
        for unit in np.eye(x.size, dtype=np.float32):
            over[name] = unit.reshape(x.shape)
            for column, y, zero in zip(columns, self.run(node, over, weights), b, strict=True):
                column.append(y.astype(np.float64).ravel() - zero)
        return [np.stack(column, 1) for column in columns], b

    def batchnorm(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The BatchNormalization that alone reads a linear layer with a weight of its own."""
        readers = self.readers.get(node.output[0], [])
        alone = len(readers) == 1 and node.output[0] not in self.outputs and len(self.readers[node.input[1]]) == 1
        return readers[0] if alone and readers[0].op_type == "BatchNormalization" else None

    def relevance(self, output: str, R: np.ndarray, rule: str) -> dict[str, np.ndarray]:
        """R of every tensor below `output`."""
        arrived: dict[str, np.ndarray] = {output: np.asarray(R, np.float64)}
        merged: set[str] = set()
        for node in reversed(self.nodes):
            reads = self.reads(node)
            tops = [name for name in node.output if name]
            if node.op_type == "BatchNormalization" and any(
                node.input[0] in other.output and other.op_type in LINEAR and self.batchnorm(other) is not None
                for other in self.nodes
            ):
                merged.add(node.input[0])
                arrived[node.input[0]] = arrived.get(tops[0], 0)
                continue
            if not reads or not any(name in arrived for name in tops):
                continue
            parts = self.back(node, [arrived.get(name, np.zeros(self.value[name].shape)) for name in tops], rule)
            for name, part in zip(reads, parts, strict=True):
                arrived[name] = arrived.get(name, 0) + part.reshape(self.value[name].shape)
        return arrived

    def back(self, node: onnx.NodeProto, R: list[np.ndarray], rule: str) -> list[np.ndarray]:
        op, reads = node.op_type, self.reads(node)
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"nearest")
        if op in ("Resize", "Upsample"):
            op = "Reshape" if mode == b"nearest" else "ReduceMean"
        if op in LINEAR:
            return [self.linear(node, reads[0], R[0].ravel(), rule)]
        if op in MOVES:
            return [
                sum(J.T @ r.ravel() for J, r in zip(self.matrices(node, name)[0], R, strict=True)) for name in reads
            ]
        if op in MEANS:
            (J,), _ = self.matrices(node, reads[0])
            a = self.value[reads[0]].astype(np.float64).ravel()
            return [a * (J.T @ (R[0].ravel() / stab(self.value[node.output[0]].ravel())))]
        if op in LARGEST:
            return [self.winner(node, reads[0], R[0])]
        if op in SUMS:
            s = R[0] / stab(self.value[node.output[0]].astype(np.float64))
            shares = {name: np.zeros(1) for name in reads}
            for at, name in enumerate(node.input):
                if name in shares:
                    shares[name] = shares[name] + SUMS[op](at, len(node.input)) * self.value[name] * s
            return [narrowed(shares[name], self.value[name].shape) for name in reads]
        return [narrowed(R[0], self.value[reads[0]].shape)]  # elementwise: R unchanged

    def winner(self, node: onnx.NodeProto, name: str, R: np.ndarray) -> np.ndarray:
        """All to the first of the entries that are in the window and equal to what came out."""
        x, y = self.value[name].ravel(), self.value[node.output[0]].ravel()
        sign = -1 if node.op_type == "ReduceMin" else 1
        back, left = np.zeros(x.size), np.ones(y.size)
        for at in range(x.size):
            probe = np.full(x.size, -sign, np.float32)
            probe[at] = sign
            seen = self.run(node, {name: probe.reshape(self.value[name].shape)})[0].ravel() == sign
            takes = seen & (y == x[at]) & (left > 0)
            back[at], left[takes] = R.ravel()[takes].sum(), 0
        return back

    def linear(self, node: onnx.NodeProto, name: str, R: np.ndarray, rule: str) -> np.ndarray:
        (J,), (b,) = self.matrices(node, name)
        if (norm := self.batchnorm(node)) is not None:
            gamma, beta, mean, variance = (self.value[k].astype(np.float64) for k in norm.input[1:])
            scale = gamma / np.sqrt(variance + 1e-5)
            shape = self.value[node.output[0]].shape
            line = [1, -1, *[1] * (len(shape) - 2)]
            field, shift = (np.broadcast_to(v.reshape(line), shape).ravel() for v in (scale, beta - mean * scale))
            J, b = J * field[:, None], b * field + shift
        a = self.value[name].astype(np.float64).ravel()
        p, n, J_p, J_n = np.maximum(a, 0), np.minimum(a, 0), np.maximum(J, 0), np.minimum(J, 0)
        if rule == "epsilon":
            return a * (J.T @ (R / stab(J @ a + b)))
        if rule == "flat":
            ones = {k: np.ones_like(self.value[k]) for k in node.input if k not in self.data}
            ones |= {k: np.zeros_like(self.value[k]) for k in node.input[2:]}
            (J,), _ = self.matrices(node, name, ones)
            return J.T @ (R / stab(J.sum(1)))
        s = R / stab(J_p @ p + J_n @ n + np.maximum(b, 0))
        activating = p * (J_p.T @ s) + n * (J_n.T @ s)
        if rule == "zplus":
            return activating
        t = R / stab(J_n @ p + J_p @ n + np.minimum(b, 0))
        return 2 * activating - p * (J_n.T @ t) - n * (J_p.T @ t)  # alpha 2 beta 1


def narrowed(R: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over the axes along which it was broadcast."""
    R = R.sum(tuple(range(R.ndim - len(shape))))
    return R.sum(tuple(i for i, n in enumerate(shape) if n == 1 and R.shape[i] != 1), keepdims=True)


class _Key:
    """What a one-node session depends on."""

    def __init__(self, key: tuple, node: onnx.NodeProto, fixed: dict, shapes: dict, opset: int) -> None:
        self.key, self.node, self.fixed, self.shapes, self.opset = (key, opset), node, fixed, shapes, opset

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@functools.lru_cache(maxsize=512)
def _session(key: _Key) -> ort.InferenceSession:
    graph = helper.make_graph(
        [key.node],
        "node",
        [helper.make_tensor_value_info(name, 1, shape) for name, shape in key.shapes.items()],
        [onnx.ValueInfoProto(name=name) for name in key.node.output if name],
        [numpy_helper.from_array(array, name) for name, array in key.fixed.items()],
    )
    return session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", key.opset)], ir_version=8))
