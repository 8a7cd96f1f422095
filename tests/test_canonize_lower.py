"""Oracle: the canonical operators' formulas in numpy, run on onnxruntime."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxcrp.canonize.lower import lower
from onnxcrp.canonize.shapes import infer_shapes
from onnxcrp.canonize.write import write
from tests.support.canonical import random, session


def one_node(op: str, shape: list, *constants: np.ndarray, opset: int = 18, **attrs: object) -> gs.Graph:
    x = gs.Variable("x", np.float32, shape)
    y = gs.Variable("y", np.float32)
    inputs = [x, *(gs.Constant(f"c{i}", values) for i, values in enumerate(constants))]
    node = gs.Node(op, "layer", dict(attrs), inputs, [y], domain="onnxcrp")
    return gs.Graph([node], [x], [y], opset=opset)


def run(graph: gs.Graph, x: np.ndarray) -> np.ndarray:
    infer_shapes(graph)
    model = write(graph)
    onnx.checker.check_model(model, full_check=True)
    return session(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_any_rank(shape, bias):
    x, w, b = random(*shape), random(5, 4), random(5)
    graph = one_node("Linear", list(shape), w, *[b] * bias)
    np.testing.assert_allclose(run(graph, x), x @ w.T + b * bias, rtol=1e-5, atol=1e-6)
    lowered = [node.op for node in lower(graph).nodes]
    assert lowered == (["Gemm"] if len(shape) == 2 else ["MatMul", "Add"][: 1 + bias])


@pytest.mark.parametrize("alpha", [1, 1.702])
def test_silu(alpha):
    x = random(3, 5, low=-6, high=6)
    graph = one_node("Silu", [3, 5], **({"alpha": alpha} if alpha != 1 else {}))
    np.testing.assert_allclose(run(graph, x), x / (1 + np.exp(-alpha * x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(opset, approximate):
    x = random(3, 5, low=-6, high=6)
    if approximate == "tanh":
        phi = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    else:
        phi = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    graph = one_node("Gelu", [3, 5], opset=opset, approximate=approximate)
    np.testing.assert_allclose(run(graph, x), x * phi, rtol=1e-4, atol=1e-6)


def test_lowering_leaves_the_canonical_graph_alone():
    graph = one_node("Linear", ["N", 4], random(5, 4))
    lowered = lower(graph)
    assert [node.op for node in graph.nodes] == ["Linear"]
    assert len(graph.inputs[0].outputs) == 1
    assert [node.name for node in lowered.nodes] == ["layer"]
    assert [tensor.name for tensor in lowered.outputs] == ["y"]


def test_a_shared_weight_is_transposed_once():
    x, h, y = (gs.Variable(name, np.float32, [2, 3, 4]) for name in "xhy")
    weight = gs.Constant("w", random(4, 4))
    nodes = [gs.Node("Linear", name, {}, [a, weight], [b], "onnxcrp") for name, a, b in (("1", x, h), ("2", h, y))]
    lowered = lower(gs.Graph(nodes, [x], [y], opset=18))
    assert lowered.nodes[0].inputs[1] is lowered.nodes[1].inputs[1]
