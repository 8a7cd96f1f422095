"""The eDSL. Oracle: numpy on the same numbers, and counts of the nodes that a person would write by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxcrp.canonize.write import export
from onnxcrp.graph import Graph, Value, negative, positive, stabilize
from onnxcrp.session import Session

SHAPES = {"a": (1, 4), "b": (1, 4), "z": (1, 4), "x": (3, 4), "y": (3, 4)}


@pytest.fixture
def op() -> Graph:
    return Graph(opset=18)


@pytest.fixture
def v(op: Graph) -> dict[str, Value]:
    """a, b, z are the same for all questions; x and y are messages of three."""
    values = {name: op.value(gs.Variable(name, np.float32, shape)) for name, shape in SHAPES.items()}
    for name in "xy":
        values[name].message = True
    return values


def run(op: Graph, result: Value) -> tuple[np.ndarray, dict[str, np.ndarray], Counter[str]]:
    """The result, what was fed, and how many nodes of which operator read a message (three rows)."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    out = gs.Node("Identity", "out", inputs=[result.tensor], outputs=[gs.Variable("result", np.float32)])
    nodes, read = [out], {result.name}
    for node in reversed(op.nodes):
        if read & {t.name for t in node.outputs}:
            nodes.insert(0, node)
            read |= {t.name for t in node.inputs}
    inputs = [op.value(gs.Variable(name, np.float32, shape)).tensor for name, shape in SHAPES.items() if name in read]
    proto = export(gs.Graph(nodes=nodes, inputs=inputs, outputs=nodes[-1].outputs, opset=18), ir_version=10)
    fed = {t.name: feeds[t.name] for t in inputs}
    messages: set[str] = {"x", "y"}
    passes: Counter[str] = Counter()
    for node in nodes[:-1]:
        if messages & {t.name for t in node.inputs}:
            messages.update(t.name for t in node.outputs)
            passes[node.op] += 1
    return Session(proto).run(fed)["result"], feeds, passes


def test_factors_of_a_message_cost_one_pass(op: Graph, v: dict[str, Value]) -> None:
    got, f, passes = run(op, v["a"] * v["x"] / v["z"] * v["b"])
    np.testing.assert_allclose(got, f["a"] * f["x"] / f["z"] * f["b"], rtol=1e-5)
    assert passes == {"Mul": 1}


@pytest.mark.parametrize(
    ("write", "passes"),
    [
        (lambda a, b, z, x, y: a * x + a * y, {"Add": 1, "Mul": 1}),
        (lambda a, b, z, x, y: a * x - y * a, {"Sub": 1, "Mul": 1}),
        (lambda a, b, z, x, y: (a * x / z) * b + y * a, {"Add": 1, "Mul": 2}),
        (lambda a, b, z, x, y: y * a / z - a * a * x / z / b, {"Sub": 1, "Mul": 2}),
        (lambda a, b, z, x, y: a * x * a + y * a * b, {"Add": 1, "Mul": 2}),  # nothing is saved: as it is written
        (lambda a, b, z, x, y: a * x + b * y, {"Add": 1, "Mul": 2}),
        (lambda a, b, z, x, y: a * x * 2.0 - a * y * 1.0, {"Sub": 1, "Mul": 2}),
    ],
)
def test_sums_multiply_by_what_both_sides_share(op: Graph, v: dict[str, Value], write: Any, passes: Any) -> None:
    result = write(*v.values())
    got, f, counted = run(op, result)
    np.testing.assert_allclose(got, write(*f.values()), rtol=2e-5, atol=1e-5)
    assert counted == passes


def test_a_shared_factor_goes_on_as_a_product(op: Graph, v: dict[str, Value]) -> None:
    """(a x + a y) / z is one sum and one product."""
    got, f, passes = run(op, (v["a"] * v["x"] + v["a"] * v["y"]) / v["z"])
    np.testing.assert_allclose(got, f["a"] * (f["x"] + f["y"]) / f["z"], rtol=1e-4)
    assert passes == {"Add": 1, "Mul": 1}


@pytest.mark.parametrize(("many", "passes"), [(False, {"Mul": 2, "Add": 1, "Div": 1}), (True, {"Mul": 2, "Add": 1})])
def test_many_questions_divide_what_they_share(op: Graph, v: dict[str, Value], many: bool, passes: Any) -> None:
    """(a x + b y) / z: a / z and b / z once for all questions."""
    op.many = many
    got, f, counted = run(op, (v["a"] * v["x"] + v["b"] * v["y"]) / v["z"])
    np.testing.assert_allclose(got, (f["a"] * f["x"] + f["b"] * f["y"]) / f["z"], rtol=1e-5)
    assert counted == passes


def test_many_questions_divide_every_term(op: Graph, v: dict[str, Value]) -> None:
    """((a x + b y) + b x) / z is three products and two sums; (a x + y) / z stays, a division is as dear as a product."""
    op.many = True
    three = v["a"] * v["x"] + v["b"] * v["y"] + v["b"] * v["x"]
    got, f, counted = run(op, three / v["z"])
    np.testing.assert_allclose(got, (f["a"] * f["x"] + f["b"] * f["y"] + f["b"] * f["x"]) / f["z"], rtol=1e-4)
    assert counted == {"Mul": 3, "Add": 2}
    got, f, counted = run(op, (v["a"] * v["x"] + v["y"]) / v["z"])
    np.testing.assert_allclose(got, (f["a"] * f["x"] + f["y"]) / f["z"], rtol=1e-5)
    assert counted == {"Mul": 1, "Add": 1, "Div": 1}


def test_signs_are_known_where_they_are_provable(op: Graph, v: dict[str, Value]) -> None:
    x, minus = positive(v["a"]), negative(v["a"])
    assert x.nonnegative
    assert minus.nonpositive
    assert not (x + minus).nonnegative
    assert not (x + minus).nonpositive
    assert (minus + negative(v["b"])).nonpositive
    assert op.constant(np.array([-1.0, 0.0], np.float32)).nonpositive
    assert not op.constant(np.array([-1.0, 1.0], np.float32)).nonpositive


@pytest.mark.parametrize("write", [lambda z: stabilize(z, 0.5), lambda z: stabilize(positive(z), 0.5)])
def test_the_stabilizer_of_zero_is_positive(op: Graph, v: dict[str, Value], write: Any) -> None:
    zero = v["a"] - v["a"]
    got, _, _ = run(op, write(zero))
    np.testing.assert_array_equal(got, np.full((1, 4), 0.5, np.float32))
