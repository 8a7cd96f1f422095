"""Numbers that go into biases. Oracle: the operators' definitions in float64, and what a person would leave of the graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F

from onnxcrp.biases import into_biases
from onnxcrp.canonize.write import export
from onnxcrp.graph import Graph, Value, negative, positive
from onnxcrp.session import Session

RNG = np.random.default_rng(0)
X = {
    "signal": RNG.standard_normal((2, 4, 9)),
    "picture": RNG.standard_normal((2, 4, 5, 6)),
    "rows": RNG.standard_normal((2, 4)),
}
X = {name: array.astype(np.float32) for name, array in X.items()}
E = 0.25  # large enough to be seen


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Net:
    """A graph under construction with one input."""

    def __init__(self, which: str) -> None:
        self.op = Graph(opset=18)
        self.array = X[which]
        self.input = gs.Variable("x", np.float32, self.array.shape)
        self.x = self.op.value(self.input)

    def finish(self, *results: Value, ours: int = 0) -> tuple[list[np.ndarray], Counter[str]]:
        """The results after folding, and the operators that are left; the first `ours` nodes are not ours."""
        names = [self.op.Identity(result).name for result in results]
        nodes = into_biases(self.op, self.op.nodes, written=self.op.nodes[ours:], outputs=names)
        graph = gs.Graph(
            nodes=nodes, inputs=[self.input], outputs=[gs.Variable(n, np.float32) for n in names], opset=18
        )
        found = Session(export(graph, ir_version=10), "cpu").run({"x": self.array})
        return [found[name] for name in names], Counter(node.op for node in nodes if node.op != "Identity")


def exact(name: str, x: np.ndarray, W: np.ndarray, b: np.ndarray | None, **how: int) -> np.ndarray:
    x, W, b = (None if v is None else torch.from_numpy(v).double() for v in (x, W, b))
    return getattr(F, name)(x, W, b, **how).numpy()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("which", "operator", "shape", "channels", "attributes", "torch_name", "how"),
    [
        ("picture", "Conv", (6, 4, 3, 3), 6, {}, "conv2d", {}),
        ("picture", "Conv", (6, 2, 3, 3), 6, {"group": 2}, "conv2d", {"groups": 2}),
        ("signal", "Conv", (6, 4, 3), 6, {"pads": [1, 1]}, "conv1d", {"padding": 1}),
        ("signal", "ConvTranspose", (4, 3, 3), 3, {}, "conv_transpose1d", {}),
        ("signal", "ConvTranspose", (4, 3, 3), 6, {"group": 2}, "conv_transpose1d", {"groups": 2}),
        ("rows", "Gemm", (6, 4), 6, {"transB": 1}, "linear", {}),
    ],
)
def test_a_number_goes_into_the_bias(which, operator, shape, channels, attributes, torch_name, how, with_bias):
    net = Net(which)
    W, b = numbers(*shape), numbers(channels) if with_bias else None
    z = net.op.node(operator, [net.x, net.op.constant(W), *([] if b is None else [net.op.constant(b)])], attributes)
    minus = net.op.node(operator, [net.x, net.op.constant(2 * W)], attributes)
    (plus, less), left = net.finish(z + E, minus - E)
    np.testing.assert_allclose(plus, exact(torch_name, net.array, W, b, **how) + E, atol=1e-5)
    np.testing.assert_allclose(less, exact(torch_name, net.array, 2 * W, None, **how) - E, atol=1e-5)
    assert left == {operator: 2}


def test_a_sum_of_two_takes_it_once():
    net, W = Net("picture"), numbers(6, 4, 3, 3)
    up, down = (net.op.Conv(part(net.x), net.op.constant(W)) for part in (positive, negative))
    (found,), left = net.finish((up + down) + E)
    np.testing.assert_allclose(found, exact("conv2d", net.array, W, None) + E, atol=1e-5)
    assert left == {"Conv": 2, "Add": 1, "Relu": 1, "Min": 1}


@pytest.mark.parametrize(("part", "bound", "number"), [(positive, np.maximum, E), (negative, np.minimum, -E)])
def test_behind_a_relu_or_its_negative_it_is_an_end(part, bound, number):
    net, W = Net("picture"), numbers(6, 4, 3, 3)
    (found,), left = net.finish(part(net.op.Conv(net.x, net.op.constant(W))) + number)
    np.testing.assert_allclose(found, bound(exact("conv2d", net.array, W, None), 0) + number, atol=1e-5)
    assert left == {"Conv": 1, "Clip": 1}


def test_weights_and_biases_that_are_written_as_nodes_count_too():
    net = Net("rows")
    W, b = net.op.constant(numbers(5000, 4)), net.op.constant(numbers(5000))
    z = net.op.Gemm(net.x, positive(W), positive(b), transB=1)
    (found,), left = net.finish(z + E)
    expected = exact("linear", net.array, np.maximum(numbers(5000, 4), 0), np.maximum(numbers(5000), 0))
    np.testing.assert_allclose(found, expected + E, atol=1e-5)
    assert left["Add"] == 0


def test_what_somebody_else_reads_stays_as_it_is():
    net, W, V = Net("picture"), numbers(6, 4, 3, 3), numbers(6, 4, 1, 1)
    z, y = (net.op.Conv(net.x, net.op.constant(weights)) for weights in (W, V))
    (first, doubled, raised, own), left = net.finish(z + E, z * 2.0, y + E, y)
    np.testing.assert_allclose(first, exact("conv2d", net.array, W, None) + E, atol=1e-5)
    np.testing.assert_allclose(doubled, 2 * exact("conv2d", net.array, W, None), atol=1e-5)
    np.testing.assert_allclose(raised, exact("conv2d", net.array, V, None) + E, atol=1e-5)
    np.testing.assert_allclose(own, exact("conv2d", net.array, V, None), atol=1e-5)
    assert left["Add"] == 2


def test_the_forward_pass_stays_as_it_is():
    net, W = Net("picture"), numbers(6, 4, 3, 3)
    z = net.op.Conv(net.x, net.op.constant(W))
    (found,), left = net.finish(z + E, ours=1)
    np.testing.assert_allclose(found, exact("conv2d", net.array, W, None) + E, atol=1e-5)
    assert left == {"Conv": 1, "Add": 1}


@pytest.mark.parametrize("case", ["number less", "column", "scaled", "weights fed", "bias fed", "least of two"])
def test_what_no_bias_can_do_stays(case):
    net, W = Net("rows"), numbers(4, 4)
    op, x, weights, bias, attributes = net.op, net.x, net.op.constant(W), net.op.constant(numbers(4)), {"transB": 1}
    W64, b64, x64 = W.astype(float), numbers(4).astype(float), net.array.astype(float)
    added = op.constant(np.full((1, 4), E, np.float32)) if case == "column" else E
    if case == "scaled":
        attributes["alpha"] = 0.5
        W64 = W64 / 2
    if case == "weights fed":
        weights = op.Reshape(op.Concat(x, x, axis=0), [4, 4])
        W64 = np.concatenate([x64, x64])
    if case == "bias fed":
        bias = op.Reshape(op.Slice(x, [0], [1], [0]), [4])
        b64 = x64[0]
    z = op.node("Gemm", [x, weights, bias], attributes)
    expected = x64 @ W64.T + b64
    if case == "least of two":
        z, expected = op.Min(z, 1.0), np.minimum(expected, 1)
    (found,), left = net.finish(E - z if case == "number less" else z + added)
    np.testing.assert_allclose(found, E - expected if case == "number less" else expected + E, atol=1e-5)
    assert left["Add"] + left["Sub"] == 1
