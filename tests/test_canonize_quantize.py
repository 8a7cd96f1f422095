"""Oracle: the original model on onnxruntime without graph optimisation; DequantizeLinear in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcrp.canonize import canonize
from onnxcrp.canonize.quantize import dequantize
from tests.support.canonical import check, feeds, ops, parse, random, said, session

SCALES = {"s": np.array(0.05, np.float32), "z": np.array(120, np.uint8)}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("axis", [None, 0, 2, -1])
@pytest.mark.parametrize("zero", [True, False])
def test_dequantize(dtype, axis, zero):
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype)
    q = rng.integers(max(limits.min, -(2**20)), min(limits.max, 2**20), [3, 4, 5], endpoint=True).astype(dtype)
    count = [] if axis is None else [q.shape[axis]]
    scale = rng.uniform(0.01, 1, count).astype(np.float32)
    point = rng.integers(0, 9, count).astype(dtype) if zero else None
    shape = [-1 if axis is not None and i == axis % 3 else 1 for i in range(3)]
    offset = 0 if point is None else point.astype(np.float64).reshape(shape)
    expected = (q.astype(np.float64) - offset) * scale.astype(np.float64).reshape(shape)
    got = dequantize(q, scale, point, 0 if axis is None else axis)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_activations_stay_quantized():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            k = DequantizeLinear(w, ws, wz)
            c = Conv(d, k)
            r = QuantizeLinear(c, s, z)
            y = DequantizeLinear(r, s, z) }""",
        w=np.random.default_rng(0).integers(-128, 128, [4, 3, 3, 3]).astype(np.int8),
        ws=np.array(0.01, np.float32),
        wz=np.array(0, np.int8),
        **SCALES,
    )
    canonical = check(model, tolerance=1e-6)
    expected = ["QuantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear"]
    assert ops(canonical) == expected
    assert "2 QuantizeLinear and 2 DequantizeLinear stay" in said(canonical, "quantization")
    assert canonical.weights == {canonical.graph.nodes[2].name: "w"}


def test_redundant_pairs_stay():
    """Values that are on the grid already do not change, but the pass cannot know what a runtime rounds."""
    model = parse(
        """net (uint8[N,4] x) => (uint8[] y) {
            a = DequantizeLinear(x, s, z)
            b = QuantizeLinear(a, s, z)
            c = DequantizeLinear(b, s, z)
            y = QuantizeLinear(c, s, z) }""",
        **SCALES,
    )
    assert len(ops(check(model))) == 4


def test_integer_tensors_between_q_and_dq():
    """Reshape, Transpose, MaxPool and Concat on uint8, NHWC uint8 in, uint8 out."""
    model = parse(
        """net (uint8[1,6,6,3] x) => (uint8[1,40] y) {
            t = Transpose<perm=[0,3,1,2]>(x)
            d = DequantizeLinear(t, s, z)
            c = Conv(d, w)
            q = QuantizeLinear(c, s, z)
            m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(q)
            k = Concat<axis=1>(m, m)
            i = Identity(k)
            r = Reshape(i, shape)
            f = DequantizeLinear(r, s, z)
            p = Softmax(f)
            y = QuantizeLinear(p, s, z) }""",
        w=random(5, 3, 3, 3),
        shape=np.array([1, 40], np.int64),
        **SCALES,
    )
    canonical = check(model, tolerance=0)
    assert canonical.batch == "freed"
    assert canonical.graph.outputs[0].shape == ["batch", 40]
    written = canonical.to_onnx()
    hidden = {tensor.name: tensor for node in canonical.graph.nodes for tensor in node.outputs}
    del written.graph.output[:]
    written.graph.output.extend(onnx.ValueInfoProto(name=name) for name in hidden)
    run = session(written)
    for name, got in zip(hidden, run.run(None, feeds(run, size=1)), strict=True):
        assert np.dtype(hidden[name].dtype) == got.dtype
        assert hidden[name].shape == ["batch", *got.shape[1:]]


@pytest.mark.parametrize("per_channel", [True, False])
def test_what_the_quantizer_of_onnxruntime_writes(tmp_path, per_channel):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter([{"x": random(1, 3, 8, 8, seed=i)} for i in range(4)])

        def get_next(self):
            return next(self.samples, None)

    model = parse(
        """net (float[1,3,8,8] x) => (float[1,5] y) {
            c = Conv<pads=[1,1,1,1]>(x, conv_weight, conv_bias)
            r = Relu(c)
            m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
            d = Conv(m, second_weight)
            g = GlobalAveragePool(d)
            f = Flatten(g)
            y = Gemm<transB=1>(f, fc_weight, fc_bias) }""",
        ir_version=9,
        conv_weight=random(4, 3, 3, 3),
        conv_bias=random(4),
        second_weight=random(6, 4, 3, 3),
        fc_weight=random(5, 6),
        fc_bias=random(5),
    )
    model.graph.node[0].name, model.graph.node[3].name, model.graph.node[6].name = "first", "second", "fc"
    onnx.save_model(model, tmp_path / "float.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            tmp_path / "float.onnx",
            tmp_path / "int8.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
        )
    canonical = check(tmp_path / "int8.onnx", tolerance=2e-2)  # one step of the last QuantizeLinear
    kinds = [node.op for node in canonical.graph.nodes if "Quantize" not in node.op and "Dequantize" not in node.op]
    assert [op for op in kinds if op in ("Conv", "Linear")] == ["Conv", "Conv", "Linear"]
    layers = {node.name: node for node in canonical.graph.nodes if node.op in ("Conv", "Linear")}
    assert all(hasattr(tensor, "values") for layer in layers.values() for tensor in layer.inputs[1:])
    assert sorted(canonical.weights.values()) == ["conv_weight", "fc_weight", "second_weight"]


def test_scales_that_are_computed_stay():
    model = parse(
        """net (float[N,4] x, float s) => (float[] y) {
            w = DequantizeLinear(q, s)
            y = MatMul(x, w) }""",
        q=np.arange(20, dtype=np.int8).reshape(4, 5),
    )
    assert ops(canonize(model)) == ["DequantizeLinear", "MatMul"]
