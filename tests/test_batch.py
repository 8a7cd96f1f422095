"""Oracle: the exported model itself, run on one sample after the other, with onnxruntime's graph optimisation off."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from onnxcrp.canonize.batch import free_batch
from onnxcrp.errors import OnnxcrpError
from onnxcrp.session import Session

INT8 = Path(__file__).parents[2] / "shared/data/models/mobilenet_v2_imagenet_int8.onnx"


def graph(text: str, opset: int = 18, **constants: np.ndarray) -> gs.Graph:
    """ONNX text -> graph; `constants` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    return gs.import_onnx(model)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def session(g: gs.Graph) -> Session:
    return Session(gs.export_onnx(g), "cpu", optimize=False, log_severity=4)


def assert_one_by_one(original: gs.Graph, freed: gs.Graph, samples: int = 3) -> None:
    """Several samples together through `freed` = one after the other through `original`, on other data than it used."""
    before, after = session(original), session(freed)
    rng = np.random.default_rng(99)
    feeds = {}
    for name, port in before.inputs.items():
        shape = (samples, *port.shape[1:])
        whole = port.dtype.kind in "iu"
        feeds[name] = (rng.integers(0, 200, shape) if whole else rng.normal(size=shape)).astype(port.dtype)
    together = after.run(feeds)
    for i in range(samples):
        alone = before.run({name: array[i : i + 1] for name, array in feeds.items()})
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i : i + 1], value, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- ways to freeze

FROZEN = {
    "Reshape [1, -1]": graph(
        "a (float[1, 3, 4] x) => (float[1, 5] y) { f = Reshape(x, s) y = MatMul(f, W) }",
        s=ints(1, -1), W=weights(12, 5),
    ),
    "Reshape [1, C]": graph(
        "a (float[1, 3, 4] x) => (float[1, 5] y) { f = Reshape(x, s) y = MatMul(f, W) }",
        s=ints(1, 12), W=weights(12, 5),
    ),
    "Reshape [1, 0, -1]": graph(
        "a (float[1, 3, 4, 2] x) => (float[1, 3, 8] y) { y = Reshape(x, s) }", s=ints(1, 0, -1)
    ),
    "nothing but the input": graph("a (float[1, 3, 4] x) => (float[1, 12] y) { y = Flatten(x) }"),
    "Flatten(axis=0)": graph("a (float[1, 3, 4] x) => (float[1, 12] y) { y = Flatten<axis=0>(x) }"),
    "Squeeze of the other axes": graph(
        "a (float[1, 3, 1, 1] x) => (float[1, 3] y) { y = Squeeze(x, axes) }", axes=ints(2, 3)
    ),
    "MatMul on merged rows": graph(
        "a (float[1, 4, 5] x) => (float[1, 4, 6] y) { r = Reshape(x, s) m = MatMul(r, W) y = Reshape(m, t) }",
        s=ints(4, 5), t=ints(1, 4, 6), W=weights(5, 6),
    ),
    "MatMul on merged rows, the rest open": graph(
        "a (float[1, 4, 5] x) => (float[1, 4, 6] y) { r = Reshape(x, s) m = MatMul(r, W) y = Reshape(m, t) }",
        s=ints(4, -1), t=ints(1, 4, -1), W=weights(5, 6),
    ),
    "attention heads merged": graph(
        """a (float[1, 4, 6] x) => (float[1, 4, 6] y) {
            s = Reshape(x, to4) h = Transpose<perm=[0, 2, 1, 3]>(s) m = Reshape(h, to3) t = Transpose<perm=[0, 2, 1]>(m)
            a = MatMul(m, t) p = Softmax<axis=-1>(a) o = MatMul(p, m)
            b = Reshape(o, back4) c = Transpose<perm=[0, 2, 1, 3]>(b) y = Reshape(c, back3) }""",
        to4=ints(1, 4, 3, 2), to3=ints(3, 4, 2), back4=ints(1, 3, 4, 2), back3=ints(1, 4, 6),
    ),
    "class token in a Concat": graph(
        "a (float[1, 4, 6] x) => (float[1, 5, 6] y) { c = Concat<axis=1>(token, x) y = Add(c, pos) }",
        token=weights(1, 1, 6), pos=weights(1, 5, 6),
    ),
    "Resize to sizes": graph(
        'a (float[1, 2, 4, 4] x) => (float[1, 2, 7, 9] y) { y = Resize<mode="linear">(x, , , sizes) }',
        sizes=ints(1, 2, 7, 9),
    ),
    "Expand": graph("a (float[1, 3, 1] x) => (float[1, 3, 4] y) { y = Expand(x, s) }", s=ints(1, 3, 4)),
    "two inputs": graph(
        "a (float[1, 3, 4] x, float[1, 12] z) => (float[1, 12] y) { f = Reshape(x, s) y = Mul(f, z) }", s=ints(1, 12)
    ),
    "uint8 to uint8": graph(
        """a (uint8[1, 4, 4, 3] x) => (uint8[1, 5] y) {
            d = DequantizeLinear(x, s, z) f = Reshape(d, t) m = MatMul(f, W) p = Softmax(m)
            y = QuantizeLinear(p, q, z) }""",
        s=np.float32(0.02), z=np.uint8(0), q=np.float32(1 / 256), t=ints(1, 48), W=weights(48, 5),
    ),
    "float16": graph(
        "a (float16[1, 3, 4] x) => (float16[1, 12] y) { y = Reshape(x, s) }", s=ints(1, 12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FROZEN)
def test_freed(case) -> None:
    g = FROZEN[case].copy()
    report, kind = free_batch(g)
    assert (kind, report.declined) == ("freed", [])
    assert all(tensor.shape[0] == "batch" for tensor in [*g.inputs, *g.outputs])
    assert_one_by_one(FROZEN[case], g)
    assert free_batch(g)[1] == "dynamic"
    onnx.checker.check_model(gs.export_onnx(g), full_check=True)


def test_reshape_prefers_zero_where_the_batch_leads() -> None:
    g = FROZEN["Reshape [1, C]"].copy()
    report, _ = free_batch(g)
    assert any("[1, 12] -> [0, 12]" in line for line in report.done)
    report, _ = free_batch(FROZEN["MatMul on merged rows"].copy())
    assert any("[4, 5] -> [-1, 5]" in line for line in report.done)
    assert any("[1, 4, 6] -> [-1, 4, 6]" in line for line in report.done)


# -------------------------------------------------------------------------------------------------- what stays


STAYS = {
    "the batch is squeezed away": (
        graph("a (float[1, 3, 1] x) => (float[3] y) { y = Squeeze(x) }"),
        r"'y' is \[3\] for one sample and \[2, 3\] for two",
    ),
    "samples are subtracted from their mean": (
        graph("a (float[1, 5] x) => (float[1, 5] y) { m = ReduceMean(x, a) d = Sub(x, m) y = Add(d, x) }", a=ints(0)),
        "depends on the other samples",
    ),
    "softmax over the batch": (
        graph("a (float[1, 5] x) => (float[1, 5] y) { p = Softmax<axis=0>(x) y = Mul(p, x) }"),
        "depends on the other samples",
    ),
    "only the first sample is used": (
        graph(
            "a (float[1, 3, 4] x) => (float[1, 4] y) { f = Gather<axis=0>(x, i) y = ReduceMean(f, a) }",
            i=ints(0), a=ints(1),
        ),
        "is .* for one sample and .* for two",
    ),
    "a batch of eight": (
        graph("a (float[8, 3, 4] x) => (float[8, 12] y) { y = Flatten(x) }"),
        r"no input was exported with batch 1: 'x' has \[8, 3, 4\]",
    ),
    "time comes first": (
        graph("a (float[7, 1, 4] x) => (float[7, 1, 4] y) { y = Relu(x) }"),
        "no input was exported with batch 1",
    ),
    "text": (
        graph("a (string[1, 3] x) => (string[1, 3] y) { y = Identity(x) }"),
        "no random sample",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_stays_fixed_with_a_reason_and_unchanged(case) -> None:
    g, reason = STAYS[case]
    before = gs.export_onnx(g.copy()).SerializeToString()
    report, kind = free_batch(g)
    assert kind == "fixed"
    assert report.done == []
    assert len(report.declined) == 1
    assert re.search(reason, report.declined[0])
    assert gs.export_onnx(g.copy()).SerializeToString() == before


def test_an_input_without_a_batch_keeps_its_shape() -> None:
    """`scale` is shared: [4] against [1, 3, 4]."""
    text = "a (float[1, 3, 4] x, float[4] scale) => (float[1, 12] y) { m = Mul(x, scale) y = Reshape(m, s) }"
    g = graph(text, s=ints(1, 12))
    assert free_batch(g)[1] == "freed"
    assert [list(tensor.shape) for tensor in g.inputs] == [["batch", 3, 4], [4]]


def test_an_input_whose_one_is_no_batch() -> None:
    """`table` [1, 4] is gathered from: two rows would be another table, so only `x` is freed."""
    text = """a (float[1, 3, 4] x, float[1] table) => (float[1, 12] y) {
        f = Gather(table, zero) m = Mul(x, f) y = Reshape(m, s) }"""
    g = graph(text, s=ints(1, 12), zero=ints(0)[0])
    report, kind = free_batch(g)
    assert kind == "freed", report
    assert [list(tensor.shape) for tensor in g.inputs] == [["batch", 3, 4], [1]]


def test_an_output_without_a_batch_keeps_its_shape() -> None:
    text = "a (float[1, 3] x) => (float[1, 3] y, float[1, 2] table) { y = Relu(x) table = Identity(c) }"
    g = graph(text, c=weights(1, 2))
    assert free_batch(g)[1] == "freed"
    assert [list(tensor.shape) for tensor in g.outputs] == [["batch", 3], [1, 2]]


def test_values_between_forget_their_shape() -> None:
    g = gs.import_onnx(
        onnx.shape_inference.infer_shapes(gs.export_onnx(FROZEN["MatMul on merged rows"].copy()), strict_mode=True)
    )
    assert list(g.tensors()["m"].shape) == [4, 6]
    free_batch(g)
    assert g.tensors()["m"].shape is None
    inferred = gs.import_onnx(onnx.shape_inference.infer_shapes(gs.export_onnx(g), strict_mode=True))
    assert list(inferred.outputs[0].shape[1:]) == [4, 6]


def test_symbolic_sizes_beside_a_batch_of_one() -> None:
    g = graph("a (float[1, 2, H, W] x) => (float[1, 2] y) { p = GlobalAveragePool(x) y = Reshape(p, s) }", s=ints(1, 2))
    assert free_batch(g)[1] == "freed"
    assert list(g.inputs[0].shape) == ["batch", 2, "H", "W"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a (float[N, 3, 4] x) => (float[N, 12] y) { y = Flatten(x) }", "dynamic"),
        ("a (float[N, 3, 4] x) => (float[M, 12] y) { y = Reshape(x, s) }", "freed"),  # dynamic in name only
        ("a (float[N, 12] x) => (float[N, 12] y) { r = Reshape(c, s) y = Add(x, r) }", "dynamic"),
        ("a (float[N, 3, 4] x) => (float[M, 12] y) { m = ReduceMean(x, zero) y = Reshape(m, s) }", "fixed"),
    ],
)
def test_batch_that_is_declared_dynamic(text, kind) -> None:
    g = graph(text, s=ints(1, 12), c=weights(12), zero=ints(0))
    report, found = free_batch(g)
    assert found == kind, report


def test_without_a_runtime_the_batch_stays(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report, kind = free_batch(FROZEN["Reshape [1, C]"].copy())
    assert kind == "fixed"
    assert "onnxruntime is not installed" in report.declined[0]


def test_a_runner_of_the_callers_own() -> None:
    calls = []

    def run(g: gs.Graph, feeds):
        calls.append(len(feeds))
        return [session(g).run(feed) for feed in feeds]

    assert free_batch(FROZEN["Reshape [1, C]"].copy(), run=run)[1] == "freed"
    assert calls == [2, 2]

    def refuse(g: gs.Graph, feeds):
        raise OnnxcrpError("out of order")

    report, kind = free_batch(FROZEN["Reshape [1, C]"].copy(), run=refuse)
    assert kind == "fixed"
    assert "out of order" in report.declined[0]


@pytest.mark.skipif(not INT8.exists(), reason="the real int8 model of ../shared/data is not there")
def test_real_int8_mobilenet_is_freed() -> None:
    g = gs.import_onnx(onnx.load(INT8))
    report, kind = free_batch(g)
    assert kind == "freed", report
    assert list(g.inputs[0].shape) == ["batch", 224, 224, 3]
    assert list(g.outputs[0].shape) == ["batch", 1001]
    original = gs.import_onnx(onnx.load(INT8))
    x = np.random.default_rng(3).integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    together = session(g).run({"input": x})["MobilenetV2/Predictions/Softmax"]
    alone = session(original)
    for i in range(3):
        np.testing.assert_array_equal(together[i : i + 1], next(iter(alone.run({"input": x[i : i + 1]}).values())))
