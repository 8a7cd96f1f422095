"""Oracle: which tensor holds the logits, read off small models by eye."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from onnxcrp.canonize.head import find_head
from onnxcrp.canonize.load import load
from onnxcrp.canonize.shapes import infer_shapes
from tests.support.canonical import parse, random

Q = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
QUANTIZE, DEQUANTIZE = "QuantizeLinear({}, s, z)", "DequantizeLinear({}, s, z)"


def typed_graph(model):
    """As it is in the file: other passes may move a head's nodes."""
    graph = load(model).graph
    infer_shapes(graph)
    return graph


@pytest.mark.parametrize(
    ("nodes", "output", "explained", "skipped"),
    [
        ("y = Gemm(x, w)", "y", "y", []),
        ("g = Gemm(x, w) y = Softmax(g)", "y", "g", ["Softmax"]),
        ("g = Gemm(x, w) y = LogSoftmax(g)", "y", "g", ["LogSoftmax"]),
        ("g = Gemm(x, w) y = Sigmoid(g)", "y", "g", ["Sigmoid"]),
        ("g = Gemm(x, w) y = Relu(g)", "y", "y", []),
        (f"g = Gemm(x, w) p = Softmax(g) y = {QUANTIZE.format('p')}", "uint8 y", "g", ["Softmax", "QuantizeLinear"]),
        # The int8 MobileNetV2: integers, their real values, Softmax, integers again.
        (
            f"g = Gemm(x, w) q = {QUANTIZE.format('g')} r = Reshape(q, t) d = {DEQUANTIZE.format('r')} "
            f"p = Softmax(d) y = {QUANTIZE.format('p')}",
            "uint8 y",
            "d",
            ["Softmax", "QuantizeLinear"],
        ),
        (
            f"g = Gemm(x, w) p = Softmax(g) q = {QUANTIZE.format('p')} y = {DEQUANTIZE.format('q')}",
            "y",
            "g",
            ["Softmax", "QuantizeLinear", "DequantizeLinear"],
        ),
        (f"g = Gemm(x, w) y = {QUANTIZE.format('g')}", "uint8 y", "g", ["QuantizeLinear"]),
        (f"g = Gemm(x, w) q = {QUANTIZE.format('g')} y = {DEQUANTIZE.format('q')}", "y", "y", []),
        (f"g = Gemm(x, w) q = {QUANTIZE.format('g')} y = Reshape(q, t)", "uint8 y", "g", ["QuantizeLinear", "Reshape"]),
        ("g = Gemm(x, w) p = Softmax(g) y = Reshape(p, t)", "y", "g", ["Softmax", "Reshape"]),
        ("g = Gemm(x, w) f = Reshape(g, t) p = Softmax(f) y = Unsqueeze(p, t)", "y", "f", ["Softmax", "Unsqueeze"]),
        ("g = Gemm(x, w) y = Reshape(g, t)", "y", "y", []),
        ("g = Gemm(x, w) p = Softmax(g) y = Cast<to=11>(p)", "double y", "g", ["Softmax", "Cast"]),
        ("g = Gemm(x, w) h = Sigmoid(g) y = Mul(h, g)", "y", "y", []),  # a gate, not a head
        ("p = Softmax(x) y = Gemm(p, w)", "y", "y", []),
        ("g = Gemm(x, w) h = Softmax(g) r = Relu(h) y = Softmax(r)", "y", "r", ["Softmax"]),
    ],
)
def test_heads(nodes, output, explained, skipped):
    typed = output if " " in output else f"float {output}"
    kind, name = typed.split()
    model = parse(f"net (float[N,4] x) => ({kind}[] {name}) {{ {nodes} }}", w=random(4, 5), t=np.array([0, -1]), **Q)
    if "Unsqueeze" in nodes:
        model.graph.node[-1].input[1] = "one"
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    tensor, head = find_head(typed_graph(model), "y")
    assert (tensor, [node.op for node in head]) == (explained, skipped)


def test_each_output_has_its_own_head():
    model = parse(
        """net (float[N,4] x) => (float[] a, float[] b) {
            g = Gemm(x, w)
            a = Softmax(g)
            h = Gemm(x, w)
            b = Sigmoid(h) }""",
        w=random(4, 5),
    )
    graph = typed_graph(model)
    assert [find_head(graph, name)[0] for name in ("a", "b")] == ["g", "h"]


def test_a_softmax_of_older_opsets():
    """Upgraded, it flattens, and folds back what it flattened."""
    model = parse("net (float[N,4,1,1] x) => (float[] y) { c = Conv(x, w) y = Softmax(c) }", 11, w=random(5, 4, 1, 1))
    graph = typed_graph(model)
    tensor, head = find_head(graph, "y")
    assert [node.op for node in head] == ["Softmax", "Reshape"]
    assert tensor in {t.name for node in graph.nodes if node.op == "Flatten" for t in node.outputs}
