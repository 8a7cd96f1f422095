"""Runs a model before and after canonizing: the original on onnxruntime is the oracle, graph optimisation off."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort

from onnxcrp.canonize import Canonical, canonize

Arrays = dict[str, np.ndarray]
TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


def parse(text: str, opset: int = 18, ir_version: int = 8, **constants: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text `name (inputs) => (outputs) { nodes }`; `constants` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def random(*shape: int, seed: int = 0, low: float = -1, high: float = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(low, high, shape).astype(np.float32)


def session(model: onnx.ModelProto | str | os.PathLike) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feeds(of: ort.InferenceSession, size: int = 2, seed: int = 0) -> Arrays:
    """Random inputs; symbolic sizes are `size`."""
    made = {}
    for i, tensor in enumerate(of.get_inputs()):
        shape = [n if isinstance(n, int) else size for n in tensor.shape]
        rng = np.random.default_rng([seed, i])
        if tensor.type in TYPES:
            made[tensor.name] = rng.normal(size=shape).astype(TYPES[tensor.type])
        elif tensor.type == "tensor(bool)":
            made[tensor.name] = rng.random(shape) < 0.5
        else:
            kind = np.dtype(tensor.type.removeprefix("tensor(").removesuffix(")"))
            made[tensor.name] = rng.integers(0, 256 if kind.itemsize == 1 else 5, shape).astype(kind)
    return made


def distance(expected: np.ndarray, got: np.ndarray) -> float:
    """Largest difference over largest value; infinite for other shapes or types."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return np.inf
    if expected.size == 0 or expected.dtype.kind not in "fiu":
        return 0.0 if np.array_equal(expected, got) else np.inf
    a, b = expected.astype(np.float64), got.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))


def check(
    model: onnx.ModelProto | str | os.PathLike, *, size: int = 2, tolerance: float = 1e-5, free_batch: bool = True
) -> Canonical:
    """Canonize, and assert: same outputs by name, type, shape and value; a valid model; nothing left to do after that."""
    before = model.SerializeToString() if isinstance(model, onnx.ModelProto) else None
    canonical = canonize(model, free_batch=free_batch)
    if isinstance(model, onnx.ModelProto):
        assert model.SerializeToString() == before, "the user's model was changed"
    written = canonical.to_onnx()
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} <= {""}
    original, ours = session(model), session(written)
    assert [t.name for t in ours.get_inputs()] == [t.name for t in original.get_inputs()]
    assert [t.name for t in ours.get_outputs()] == [t.name for t in original.get_outputs()]
    for seed in range(2):
        x = feeds(original, size, seed)
        for tensor, a, b in zip(original.get_outputs(), original.run(None, x), ours.run(None, x), strict=True):
            assert distance(a, b) <= tolerance, f"{tensor.name}: {distance(a, b):.2g}"
    again = canonize(written, free_batch=free_batch)
    assert spelling(again) == spelling(canonical), "canonizing twice is not canonizing once"
    check_form(canonical)
    return canonical


def spelling(canonical: Canonical) -> list[tuple]:
    """Nodes with the names and values of what they read, less the names of constants."""
    return [
        (
            node.op,
            node.domain or "",
            node.name,
            {k: list(v) if isinstance(v, list | tuple) else v for k, v in node.attrs.items()},
            [t.values.tobytes() if hasattr(t, "values") else t.name for t in node.inputs],
            [t.name for t in node.outputs],
        )
        for node in canonical.graph.nodes
    ]


def check_form(canonical: Canonical) -> None:
    """What the rest of the project relies on: unique names, topological order, types, no leftovers."""
    graph = canonical.graph
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert all(names)
    seen = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        assert node.op not in ("Dropout", "Constant")
        assert node.domain in (None, "", "onnxcrp")
        for tensor in node.inputs:
            assert tensor.is_empty() or hasattr(tensor, "values") or tensor.name in seen, f"{node.name}: order"
            assert sum(other is node for other in tensor.outputs) == sum(t is tensor for t in node.inputs)
        for tensor in node.outputs:
            assert tensor.inputs == [node]
            assert tensor.is_empty() or tensor.dtype is not None, f"{tensor.name} has no type"
        outputs = [tensor.name for tensor in node.outputs if not tensor.is_empty()]
        assert not seen & set(outputs)
        seen |= set(outputs)


def ops(canonical: Canonical) -> list[str]:
    return [node.op for node in canonical.graph.nodes]


def said(canonical: Canonical, name: str, which: str = "declined") -> str:
    """What one pass reported."""
    return "\n".join(line for r in canonical.reports if r.name == name for line in getattr(r, which))
