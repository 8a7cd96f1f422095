"""Oracle: onnxruntime on the model as it came, graph optimisation off; one quantization step of difference is allowed."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest

from onnxcrp.canonize import canonize

from .support.canonical import check, ops, said

PASS = "integer operators"


def model(body: str, inputs: str, outputs: str, opset: int = 18, **constants) -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> m ({inputs}) => ({outputs})'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in constants.items():
        assert name in used, name
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def scale(*values: float) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], np.float32)


def u8(*values: int) -> np.ndarray:
    return np.array(values if len(values) > 1 else values[0], np.uint8)


def weights(*shape: int, dtype: type = np.int8) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.random.default_rng(len(shape)).integers(info.min // 2, info.max // 2, shape).astype(dtype)


STEP = 1 / 100  # one step of integers that reach 100 at least
X8 = "uint8[N, 3, 6, 6] x"
X = {"xs": scale(0.02), "xz": u8(128)}
Y = {"ys": scale(0.05), "yz": u8(120)}


def float_ops(canonical) -> list[str]:
    return [op for op in ops(canonical) if op not in ("QuantizeLinear", "DequantizeLinear")]


# ---------------------------------------------------------------------------------------------------------- one operator


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_qlinear_conv(per_channel, bias) -> None:
    body = (
        f"y = QLinearConv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, xs, xz, w, ws, wz, ys, yz{', b' if bias else ''})"
    )
    given = {"ws": scale(*np.linspace(0.001, 0.004, 4)), "wz": np.zeros(4, np.int8)} if per_channel else {}
    given = given or {"ws": scale(0.002), "wz": np.int8(0)}
    given |= {"b": np.array([500, -300, 0, 9], np.int32)} if bias else {}
    proto = model(body, X8, "uint8[N, 4, 3, 3] y", w=weights(4, 3, 3, 3), **X, **Y, **given)
    canonical = check(proto, tolerance=STEP)
    assert ops(canonical) == ["DequantizeLinear", "Conv", "QuantizeLinear"]
    conv = canonical.graph.nodes[1]
    expected = weights(4, 3, 3, 3) * np.broadcast_to(given["ws"], [4]).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(conv.inputs[1].values, expected, rtol=1e-6)
    if bias:
        np.testing.assert_allclose(conv.inputs[2].values, given["b"] * 0.02 * given["ws"], rtol=1e-6)


def test_qlinear_matmul_with_a_constant_and_with_two_data_paths() -> None:
    body = """h = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz)
              y = QLinearMatMul(h, ys, yz, z, xs, xz, ys, yz)"""
    given = {"w": weights(6, 6, dtype=np.uint8), "ws": scale(*np.linspace(0.01, 0.03, 6)), "wz": u8(*range(100, 106))}
    proto = model(body, f"{X8}, uint8[N, 3, 6, 6] z", "uint8[N, 3, 6, 6] y", **X, **Y, **given)
    canonical = check(proto, tolerance=2 * STEP)
    assert float_ops(canonical) == ["Linear", "MatMul"]


def test_integers_without_scales_are_numbers() -> None:
    """Exact: small integers are float32 numbers."""
    body = "i = MatMulInteger(x, w, xz, wz) y = Cast<to = 1>(i) j = ConvInteger(x, v, xz) z = Mul(j, two)"
    given = {"w": weights(6, 6), "wz": np.arange(6, dtype=np.int8), "v": weights(4, 3, 3, 3), "xz": u8(120)}
    outputs = "float[N, 3, 6, 6] y, int32[N, 4, 4, 4] z"
    canonical = check(model(body, X8, outputs, two=np.int32(2), **given), tolerance=0)
    assert sorted(float_ops(canonical)) == ["Cast", "Conv", "Linear", "Mul"]


def test_qgemm() -> None:
    inputs, outputs = "uint8[N, 6] x", "uint8[N, 4] y, float[N, 4] z"
    body = """y = com.microsoft.QGemm<alpha = 0.5, transB = 1>(x, xs, xz, w, ws, wz, b, ys, yz)
              z = com.microsoft.QGemm<transB = 1>(x, xs, xz, w, ws, wz, b)"""
    given = {"w": weights(4, 6), "ws": scale(0.01, 0.02, 0.03, 0.04), "wz": np.zeros(4, np.int8)}
    given |= {"b": np.array([500, -300, 0, 9], np.int32)}
    canonical = check(model(body, inputs, outputs, **X, **Y, **given), tolerance=STEP)
    assert float_ops(canonical) == ["Linear", "Linear"]
    assert ops(canonical).count("DequantizeLinear") == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = com.microsoft.QLinearAdd(x, xs, xz, z, ys, yz, ys, yz)", ["Add"]),
        ("y = com.microsoft.QLinearMul(x, xs, xz, z, ys, yz, ys, yz)", ["Mul"]),
        ("y = com.microsoft.QLinearConcat<axis = 1>(ys, yz, x, xs, xz, z, ys, yz)", ["Concat"]),
        ("a = com.microsoft.QLinearLeakyRelu<alpha = 0.1>(x, xs, xz, ys, yz) y = Identity(a)", ["LeakyRelu"]),
        ("y = com.microsoft.QLinearSigmoid(x, xs, xz, ps, pz)", ["Sigmoid"]),
        ("y = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(x, xs, xz, ps, pz)", ["Softmax"]),
        (
            "y = com.microsoft.QLinearAveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x, xs, xz, xs, xz)",
            ["AveragePool"],
        ),
        ("y = com.microsoft.QLinearGlobalAveragePool<channels_last = 0>(x, xs, xz, xs, xz)", ["GlobalAveragePool"]),
        (
            "y = com.microsoft.QLinearGlobalAveragePool<channels_last = 1>(x, xs, xz, xs, xz)",
            ["Transpose", "GlobalAveragePool", "Transpose"],
        ),
        ("y = com.microsoft.NhwcMaxPool<kernel_shape = [2, 2]>(x)", ["Transpose", "MaxPool", "Transpose"]),
    ],
)
def test_operators_of_onnxruntime(body, expected) -> None:
    given = {**X, **Y, "ps": scale(1 / 256), "pz": u8(0)}
    used = {name: array for name, array in given.items() if f" {name}" in body.replace("(", "( ")}
    inputs = X8 + (", uint8[N, 3, 6, 6] z" if " z," in body else "")
    canonical = check(model(body, inputs, "uint8[N, A, B, C] y", **used), tolerance=STEP)
    assert float_ops(canonical) == expected
    assert {"DequantizeLinear", "QuantizeLinear"} <= set(ops(canonical)) or "MaxPool" in expected


def test_what_moves_integers_moves_numbers() -> None:
    """MaxPool, Reshape and the like of a quantized tensor stand between DequantizeLinear and QuantizeLinear."""
    body = """q = QuantizeLinear(x, xs, xz) m = MaxPool<kernel_shape = [2, 2]>(q) t = Transpose<perm = [0, 2, 3, 1]>(m)
              f = Flatten(t) y = DequantizeLinear(f, xs, xz)"""
    canonical = check(model(body, "float[N, 3, 6, 6] x", "float[N, 75] y", **X), tolerance=0)
    for node in canonical.graph.nodes:
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[0].dtype == np.float32
    assert float_ops(canonical) == ["MaxPool", "Transpose", "Flatten"]


def test_dynamic_matmul_as_onnxruntime_fuses_it() -> None:
    body = """y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)
              q, s, z = DynamicQuantizeLinear(x) v = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz, b)"""
    given = {"w": weights(6, 4), "ws": scale(0.01, 0.02, 0.03, 0.04), "wz": np.zeros(4, np.int8)}
    given |= {"b": np.ones(4, np.float32)}
    outputs = "float[N, 3, 4] y, float[N, 3, 4] v"
    canonical = check(model(body, "float[N, 3, 6] x", outputs, **given), tolerance=1e-5)
    assert sorted(float_ops(canonical)) == ["DynamicQuantizeLinear", "DynamicQuantizeLinear", "Linear", "Linear"]


def test_quantized_attention() -> None:
    """Dequantized, then taken apart as Attention is."""
    body = "y = com.microsoft.QAttention<num_heads = 2>(x, w, b, xs, ws, m, xz, wz)"
    given = {"w": weights(6, 24), "ws": scale(0.01), "wz": np.int8(0), "b": np.linspace(-1, 1, 24, dtype=np.float32)}
    inputs = "uint8[N, 5, 6] x, int32[N] m"
    canonical = check(model(body, inputs, "float[N, 5, 8] y", **given, **X), tolerance=1e-4)
    assert ops(canonical).count("Linear") == 3
    assert "Softmax" in ops(canonical)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz)", "its data has a scale per row or channel"),
        (
            "q, s, z = DynamicQuantizeLinear(f) y = QLinearConv(x, xs, xz, w, s, wz, ys, yz, b)",
            "its scales are computed",
        ),
    ],
)
def test_declined_with_a_reason(body, reason) -> None:
    rows = {"xs": scale(0.01, 0.02), "xz": u8(3, 4)} if "MatMul" in body else X
    conv = "Conv" in body
    given = {"w": weights(*((4, 3, 3, 3) if conv else (6, 4))), "wz": np.int8(0), **rows, **Y}
    given |= {"b": np.zeros(4, np.int32)} if conv else {"ws": scale(0.1)}
    inputs = f"{X8}, float[N] f" if conv else "uint8[2, 6] x"
    canonical = canonize(model(body, inputs, "uint8[A, B, C, D] y" if conv else "uint8[2, 4] y", **given))
    assert any(op.startswith("QLinear") for op in ops(canonical))
    assert reason in said(canonical, PASS)


# --------------------------------------------------------------------------------------------- as onnxruntime writes them


class Reader:
    def __init__(self, **feeds):
        self.left = [feeds]

    def get_next(self):
        return self.left.pop() if self.left else None


def float_net() -> onnx.ModelProto:
    """Conv, Relu, MaxPool, Conv, Add, AveragePool, Concat, Sigmoid, Flatten, Gemm, and MatMul."""
    rng = np.random.default_rng(0)
    body = """a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Relu(a) c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
              d = Conv<pads = [1, 1, 1, 1]>(c, w2, b2) e = Add(c, d) f = AveragePool<kernel_shape = [2, 2]>(e)
              g = Sigmoid(f) h = Concat<axis = 1>(f, g) i = Flatten(h) j = Gemm<transB = 1>(i, w3, b3) k = Relu(j)
              y = MatMul(k, w4)"""
    shapes = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,), "w3": (8, 32), "b3": (8,), "w4": (8, 5)}
    given = {name: rng.normal(size=shape).astype(np.float32) / 3 for name, shape in shapes.items()}
    return model(body, "float[N, 3, 6, 6] x", "float[N, 5] y", **given)


@pytest.mark.parametrize("per_channel", [False, True])
def test_static_quantization_in_operator_form(per_channel, tmp_path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    source, path = str(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    onnx.save(float_net(), source)
    reader = Reader(x=np.random.default_rng(1).normal(size=(16, 3, 6, 6)).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            source, path, reader, quant_format=QuantFormat.QOperator, per_channel=per_channel,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    before = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QLinearConv", "QLinearAdd", "QLinearMatMul", "QGemm"} <= before
    canonical = check(path, tolerance=0.05)  # steps add up from layer to layer
    assert not any("QLinear" in op or op == "QGemm" for op in ops(canonical))
    found = float_ops(canonical)
    assert found.count("Conv") == found.count("Linear") == 2
    assert {"MaxPool", "Add", "AveragePool", "Sigmoid", "Concat"} <= set(found)
    kinds = {n.inputs[0].dtype for n in canonical.graph.nodes if n.op not in ("DequantizeLinear", "QuantizeLinear")}
    assert kinds == {np.dtype(np.float32)}


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantization(per_channel, tmp_path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, path = str(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    onnx.save(float_net(), source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(source, path, per_channel=per_channel, weight_type=QuantType.QUInt8)
    before = {node.op_type for node in onnx.load(path).graph.node}
    assert {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"} <= before
    canonical = check(path, tolerance=0.02)
    found = ops(canonical)
    assert not {"ConvInteger", "MatMulInteger", "Cast", "Mul"} & set(found)
    assert found.count("Conv") == found.count("Linear") == 2
    assert found.count("DynamicQuantizeLinear") == found.count("DequantizeLinear")
    # optimised by onnxruntime: DynamicQuantizeMatMul
    fused = tmp_path / "fused.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(fused), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert "DynamicQuantizeMatMul" in {node.op_type for node in onnx.load(fused).graph.node}
    assert not {"ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"} & set(ops(check(fused, tolerance=0.02)))
