"""Oracle: torch in float64 (convolution, pooling, whole nets), onnxruntime in float32, onnx.reference, and by hand."""

from __future__ import annotations

import math
import re
import sys
import time

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcrp.errors import InputError, ModelError, UnsupportedError
from onnxcrp.evaluate import KERNELS, TORCH_KERNELS, evaluate, evaluate_node, kernel

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
BACKENDS = ("numpy", "torch")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def single(op: str, inputs: list, attrs: dict, outputs: int = 1, opset: int = 18) -> onnx.ModelProto:
    """A model of one node, its floats in float32."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in zip(names, inputs, strict=True)
        if n
    ]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attrs)], "g", given, [onnx.ValueInfoProto(name=n) for n in results]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def runtime(op: str, inputs: list, attrs: dict, outputs: int = 1, opset: int = 18) -> list[np.ndarray]:
    import onnxruntime

    inputs = [x.astype(np.float32) if x is not None and x.dtype == np.float64 else x for x in inputs]
    model = single(op, inputs, attrs, outputs, opset)
    for output, inferred in zip(model.graph.output, onnx.shape_inference.infer_shapes(model).graph.output, strict=True):
        output.CopyFrom(inferred)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None})


# ------------------------------------------------------------------------------------------ convolution, pooling


@st.composite
def convolutions(draw_from: st.DrawFn) -> tuple[int, dict, tuple[int, ...], tuple[int, ...], list[int]]:
    rank = draw_from(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return [draw_from(st.integers(low, high)) for _ in range(rank)]

    kernel_shape, strides, dilations = each(1, 3), each(1, 3), each(1, 2)
    begin, end = each(0, 2), each(0, 2)
    group, per_in, per_out = (draw_from(st.integers(1, 3)) for _ in range(3))
    span = [d * (k - 1) + 1 for k, d in zip(kernel_shape, dilations, strict=True)]
    spatial = [max(s, 1) + draw_from(st.integers(0, 5)) for s in span]
    attrs = {
        "kernel_shape": kernel_shape,
        "strides": strides,
        "dilations": dilations,
        "pads": [*begin, *end],
        "group": group,
    }
    x_shape = (draw_from(st.integers(1, 2)), group * per_in, *spatial)
    return rank, attrs, x_shape, (group * per_out, per_in, *kernel_shape), [begin, end]


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(BACKENDS), st.booleans())
def test_conv(config, backend, biased):
    rank, attrs, x_shape, w_shape, (begin, end) = config
    x, W, b = draw(*x_shape), draw(*w_shape), draw(w_shape[0]) if biased else None
    padded = F.pad(torch.from_numpy(x), [p for pair in zip(begin[::-1], end[::-1], strict=True) for p in pair])
    bias = None if b is None else torch.from_numpy(b)
    expected = CONV[rank](padded, torch.from_numpy(W), bias, attrs["strides"], 0, attrs["dilations"], attrs["group"])
    close(evaluate_node("Conv", attrs, [x, W, b], backend=backend)[0], expected.numpy())


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(BACKENDS), st.data())
def test_conv_transpose(config, backend, data):
    rank, attrs, x_shape, (out, per_in, *kernel_shape), _ = config
    group, strides, dilations = attrs["group"], attrs["strides"], attrs["dilations"]
    pads = [data.draw(st.integers(0, (d * (k - 1)) // 2)) for k, d in zip(kernel_shape, dilations, strict=True)]
    extra = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)]
    x, W, b = draw(*x_shape), draw(per_in * group, out // group, *kernel_shape), draw(out)
    expected = CONV_TRANSPOSE[rank](
        torch.from_numpy(x), torch.from_numpy(W), torch.from_numpy(b), strides, pads, extra, group, dilations
    )
    attrs = {**attrs, "pads": pads * 2, "output_padding": extra}
    close(evaluate_node("ConvTranspose", attrs, [x, W, b], backend=backend)[0], expected.numpy())


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.sampled_from(BACKENDS))
def test_conv_transpose_is_the_adjoint(config, backend):
    """<conv(v), s> = <v, conv_transpose(s)>, with asymmetric pads and strides that leave a remainder."""
    _, attrs, x_shape, w_shape, (begin, end) = config
    v, W = draw(*x_shape), draw(*w_shape)
    z = evaluate_node("Conv", attrs, [v, W], backend=backend)[0]
    s = draw(*z.shape, seed=1)
    size = zip(z.shape[2:], attrs["strides"], attrs["dilations"], attrs["kernel_shape"], strict=True)
    full = [(n - 1) * t + d * (k - 1) + 1 for n, t, d, k in size]
    rest = [n - (f - p - q) for n, f, p, q in zip(x_shape[2:], full, begin, end, strict=True)]
    back = evaluate_node("ConvTranspose", {**attrs, "output_padding": rest}, [s, W], backend=backend)[0]
    assert np.vdot(z, s) == pytest.approx(np.vdot(v, back), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
def test_auto_pad_as_onnxruntime(mode, strides, backend):
    x, W = draw(1, 2, 8, 11), draw(3, 2, 3, 4)
    attrs = {"auto_pad": mode, "strides": strides}
    for op, inputs, more in (
        ("Conv", [x, W], {}),
        ("MaxPool", [x], {"kernel_shape": [3, 4]}),
        ("AveragePool", [x], {"kernel_shape": [3, 4]}),
        ("ConvTranspose", [x, np.swapaxes(W, 0, 1)], {}),
    ):
        ours = evaluate_node(op, {**attrs, **more}, inputs, outputs=1, backend=backend)[0]
        close(ours, runtime(op, inputs, {**attrs, **more})[0], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_transpose_output_shape_as_onnxruntime(backend):
    x, W = draw(1, 2, 5, 4), draw(2, 3, 3, 3)
    attrs = {"strides": [2, 2], "output_shape": [10, 9]}
    ours = evaluate_node("ConvTranspose", attrs, [x, W], backend=backend)[0]
    close(ours, runtime("ConvTranspose", [x, W], attrs)[0], 1e-5)


@st.composite
def poolings(draw_from: st.DrawFn) -> tuple[dict, tuple[int, ...]]:
    rank = draw_from(st.integers(1, 3))
    kernel_shape = [draw_from(st.integers(1, 3)) for _ in range(rank)]
    pads = [draw_from(st.integers(0, k // 2)) for k in kernel_shape]
    attrs = {
        "kernel_shape": kernel_shape,
        "strides": [draw_from(st.integers(1, 3)) for _ in range(rank)],
        "pads": pads * 2,
        "dilations": [draw_from(st.integers(1, 2)) for _ in range(rank)],
        "ceil_mode": draw_from(st.integers(0, 1)),
    }
    spatial = [5 + draw_from(st.integers(0, 4)) for _ in range(rank)]
    return attrs, (draw_from(st.integers(1, 2)), 2, *spatial)


@settings(max_examples=60, deadline=None)
@given(poolings(), st.sampled_from(BACKENDS), st.booleans())
def test_max_pool(config, backend, ties):
    attrs, shape = config
    rank = len(shape) - 2
    x = np.round(draw(*shape)) if ties else draw(*shape)
    y, index = MAX_POOL[rank](
        torch.from_numpy(x), attrs["kernel_shape"], attrs["strides"], attrs["pads"][:rank], attrs["dilations"],
        bool(attrs["ceil_mode"]), True,
    )  # fmt: skip
    ours, where = evaluate_node("MaxPool", attrs, [x], backend=backend)
    close(ours, y.numpy())
    close(evaluate_node("MaxPool", attrs, [x], backend=backend, outputs=1)[0], y.numpy())
    np.testing.assert_array_equal(x.ravel()[where], ours)  # ONNX counts through the whole tensor
    np.testing.assert_array_equal(where % math.prod(shape[2:]), index.numpy())  # torch too takes the first on ties


@settings(max_examples=60, deadline=None)
@given(poolings(), st.sampled_from(BACKENDS), st.booleans())
def test_average_pool(config, backend, include):
    attrs, shape = config
    rank = len(shape) - 2
    attrs = {**attrs, "dilations": [1] * rank, "count_include_pad": int(include)}
    x = draw(*shape)
    expected = AVG_POOL[rank](
        torch.from_numpy(x), attrs["kernel_shape"], attrs["strides"], attrs["pads"][:rank],
        bool(attrs["ceil_mode"]), include,
    )  # fmt: skip
    close(evaluate_node("AveragePool", attrs, [x], backend=backend)[0], expected.numpy())


@pytest.mark.parametrize("include", [0, 1])
def test_average_pool_dilated_as_onnxruntime(include):
    x = draw(1, 2, 9, 8)
    attrs = {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 0, 2, 1], "count_include_pad": include}
    close(evaluate_node("AveragePool", attrs, [x], opset=19)[0], runtime("AveragePool", [x], attrs, opset=19)[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pads", [[0, 1, 1, 0], [1, 1, 0, 1]])
def test_max_pool_asymmetric_pads_and_indices_as_onnxruntime(pads, backend):
    x = np.round(draw(2, 3, 7, 6), 0)
    for order in (0, 1):
        attrs = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": pads, "storage_order": order}
        ours = evaluate_node("MaxPool", attrs, [x], backend=backend)
        theirs = runtime("MaxPool", [x], attrs, 2)
        close(ours[0], theirs[0], 1e-6)
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_max_pool_of_integers():
    x = np.arange(-32, 0, dtype=np.int8).reshape(1, 2, 4, 4)
    attrs = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    np.testing.assert_array_equal(evaluate_node("MaxPool", attrs, [x])[0], runtime("MaxPool", [x], attrs)[0])


# --------------------------------------------------------------------------------- everything else, against the runtime

X = draw(2, 3, 4, 5)
P = np.abs(draw(2, 3, 4, 5)) + 0.1
A = np.asarray
UNIT = np.tanh(X) * 0.9
BOOL = X > 0
INT = np.round(4 * X).astype(np.int64)
WILD = A([np.nan, np.inf, -np.inf, 1.0])
INDEX = A([[0, -1], [2, 1]])
RUNTIME = [
    *[(op, [X], {}) for op in re.findall(r"\w+", """
        Abs Neg Sign Reciprocal Exp Floor Ceil Round Sin Cos Atan Sinh Cosh Tanh Asinh Erf Relu Sigmoid Softplus
        Softsign HardSwish Mish Elu Selu Celu LeakyRelu ThresholdedRelu HardSigmoid Shrink Identity Dropout
        GlobalAveragePool GlobalMaxPool Flatten Shape Size Transpose Softmax LogSoftmax Hardmax
    """)],
    *[(op, [P], {}) for op in ("Sqrt", "Log", "ReduceLogSum")],
    *[(op, [UNIT], {}) for op in ("Asin", "Acos", "Atanh", "Tan")],
    ("Acosh", [P + 1], {}),
    *[(op, [X, draw(5, seed=1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "Greater",
                                                "LessOrEqual", "GreaterOrEqual", "Equal", "Sum", "Mean", "PRelu")],
    *[(op, [X, draw(4, 1, seed=1), draw(2, 1, 1, 5)], {}) for op in ("Max", "Min", "Sum", "Mean")],
    ("Pow", [P, draw(5)], {}), ("Pow", [X, A(3)], {}), ("Pow", [INT, A(2)], {}),
    ("Div", [INT, A(3)], {}), ("Div", [INT, A(-3)], {}), ("Mod", [INT, A(3)], {}), ("Mod", [INT, A(-3)], {}),
    ("Mod", [X, np.float64(0.7) * np.ones(1)], {"fmod": 1}),
    *[(op, [BOOL, BOOL[:, :, ::-1].copy()], {}) for op in ("And", "Or", "Xor")],
    ("Not", [BOOL], {}), ("Where", [BOOL, X, draw(5)], {}),
    ("IsNaN", [WILD], {}), ("IsInf", [WILD], {}), ("IsInf", [WILD], {"detect_negative": 0}),
    ("LeakyRelu", [X], {"alpha": 0.3}), ("Elu", [X], {"alpha": 0.3}), ("Celu", [X], {"alpha": 0.3}),
    ("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}), ("Shrink", [X], {"lambd": 0.3, "bias": 0.1}),
    ("Clip", [X, A(-0.5), A(0.7)], {}), ("Clip", [X, None, A(0.7)], {}), ("Clip", [X], {}),
    ("Cast", [X], {"to": TensorProto.INT64}), ("Cast", [X], {"to": TensorProto.BOOL}), ("Cast", [INT], {"to": 1}),
    ("CastLike", [INT, X], {}),
    *[("Softmax", [X], {"axis": a}) for a in (0, 1, 2)], ("LogSoftmax", [X], {"axis": 1}),
    ("Hardmax", [np.round(X)], {"axis": 1}),
    *[(op, [X, A([1, -1])], {"keepdims": k}) for k in (0, 1) for op in (
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
        "ReduceLogSumExp")],
    ("ReduceSum", [X], {}), ("ReduceMean", [X], {"keepdims": 0}),
    ("ReduceSum", [X, A([]).astype(np.int64)], {"noop_with_empty_axes": 1}),
    *[(op, [np.round(X)], {"axis": 2, "select_last_index": last, "keepdims": last}) for op in ("ArgMax", "ArgMin")
      for last in (0, 1)],
    *[("CumSum", [X, A(1)], {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)],
    ("Gemm", [X[0, 0], draw(5, 3), draw(3)], {}),
    ("Gemm", [X[0, 0].T, draw(3, 5), draw(4, 1)], {"transA": 1, "transB": 1, "alpha": 0.3, "beta": 1.7}),
    ("Gemm", [X[0, 0], draw(5, 3)], {}),
    ("MatMul", [X, draw(5, 3)], {}), ("MatMul", [X, draw(2, 1, 5, 3)], {}), ("MatMul", [X[0, 0, 0], draw(5, 3)], {}),
    ("Einsum", [X, draw(5, 6)], {"equation": "nchw,wk->nkc"}),
    ("BatchNormalization", [X, draw(3), draw(3), draw(3), np.abs(draw(3)) + 1], {"epsilon": 0.01}),
    ("InstanceNormalization", [X, draw(3), draw(3)], {}),
    ("LayerNormalization", [X, draw(4, 5), draw(4, 5)], {"axis": 2}), ("LayerNormalization", [X, draw(5)], {}),
    ("LRN", [draw(1, 7, 3, 2)], {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    ("Reshape", [X, A([0, -1, 2])], {}), ("Reshape", [X, A([60, 2])], {}),
    ("Transpose", [X], {"perm": [2, 0, 3, 1]}), ("Flatten", [X], {"axis": 2}), ("Flatten", [X], {"axis": 0}),
    ("Flatten", [X], {"axis": -1}),
    ("Squeeze", [X[:, :1, :, :1]], {}), ("Squeeze", [X[:, :1, :, :1], A([-1])], {}),
    ("Unsqueeze", [X, A([0, -1])], {}), ("Concat", [X, X[:, :1]], {"axis": 1}), ("Concat", [X, X], {"axis": -1}),
    ("Slice", [X, A([1, -3]), A([9, 2**31])], {}),
    ("Slice", [X, A([-1, 3]), A([-(2**31), 0]), A([-1, 2]), A([-2, -1])], {}),
    ("Slice", [X, A([0]), A([-1]), A([3]), A([2])], {}),
    ("Expand", [X[:, :, :1], A([3, 1, 5])], {}), ("Tile", [X, A([1, 2, 1, 3])], {}),
    ("Pad", [X, A([0, 0, 1, 2, 0, 0, 3, 0]), A(1.5)], {}), ("Pad", [X, A([1, 2, 0, 1]), None, A([2, -1])], {}),
    ("Pad", [X, A([0, 0, -1, 2, 0, 0, 3, -2])], {}),
    ("Pad", [X, A([0, 0, 1, 2, 0, 0, 3, 0])], {"mode": "reflect"}),
    ("Pad", [X, A([0, 0, 1, 2, 0, 0, 3, 0])], {"mode": "edge"}),
    ("DepthToSpace", [draw(2, 8, 2, 3)], {"blocksize": 2}),
    ("DepthToSpace", [draw(2, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [draw(2, 2, 4, 6)], {"blocksize": 2}),
    ("Trilu", [X], {}), ("Trilu", [X, A(-1)], {"upper": 0}),
    ("Gather", [X, INDEX], {"axis": 1}), ("Gather", [X, A(-1)], {"axis": 2}),
    ("GatherElements", [X, np.abs(INT[:, :2]) % 4 - 4], {"axis": 2}),
    ("GatherND", [X, A([[0, -1], [1, 2]])], {}), ("GatherND", [X, A([[[0, -1]], [[1, 2]]])], {"batch_dims": 1}),
    ("ScatterElements", [X, np.zeros((1, 3, 2, 2), np.int64) - [1, 3], X[:1, :, :2, :2]], {"axis": 3}),
    *[("ScatterElements", [X, np.abs(INT[:, :2]) % 3, X[:, 1:]], {"axis": 1, "reduction": r})
      for r in ("add", "mul", "max", "min")],
    ("ScatterND", [X, A([[0, -1], [1, 2]]), draw(2, 4, 5)], {}),
    ("ScatterND", [X, A([[0, 1], [0, 1]]), draw(2, 4, 5)], {"reduction": "add"}),
    ("OneHot", [A([0, 2, -1, 7]), A(3), draw(2)], {}), ("OneHot", [INDEX, A(3), draw(2)], {"axis": 0}),
    ("NonZero", [np.round(X)], {}), ("Shape", [X], {"start": 1, "end": -1}),
    ("Range", [A(2.0), A(5.1), A(0.5)], {}), ("Range", [A(9), A(2), A(-3)], {}),
    ("EyeLike", [X[0, 0]], {"k": 1}),
    ("ConstantOfShape", [A([2, 3])], {}),
    ("ConstantOfShape", [A([2])], {"value": numpy_helper.from_array(A([7]))}),
    ("QuantizeLinear", [20 * X, A(0.25), np.asarray(7, np.uint8)], {}),
    ("QuantizeLinear", [20 * X, np.asarray([0.5, 2, 0.125]), np.asarray([3, 0, -5], np.int8)], {"axis": 1}),
    ("DequantizeLinear", [INT.astype(np.int8), A(0.25), np.asarray(7, np.int8)], {}),
    ("DequantizeLinear", [INT.astype(np.uint8), A([0.5, 2, 0.125]), np.asarray([3, 0, 5], np.uint8)], {"axis": 1}),
    ("DequantizeLinear", [INT.astype(np.int32), A(0.25)], {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attrs"), RUNTIME, ids=[f"{c[0]}-{i}" for i, c in enumerate(RUNTIME)])
def test_as_onnxruntime(op, inputs, attrs):
    ours = evaluate_node(op, attrs, inputs, outputs=1)[0]
    theirs = runtime(op, inputs, attrs)[0]
    assert op in KERNELS
    assert ours.shape == theirs.shape
    assert ours.dtype == (np.float64 if theirs.dtype == np.float32 and op != "ConstantOfShape" else theirs.dtype) or (
        op == "Cast" and attrs["to"] == 1
    )
    np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    ours = evaluate_node("Gelu", {"approximate": approximate}, [X], opset=20)[0]
    close(ours, F.gelu(torch.from_numpy(X), approximate=approximate).numpy())


def test_activations_that_only_the_project_has():
    close(evaluate_node("Silu", {}, [X], domain="onnxcrp")[0], F.silu(torch.from_numpy(X)).numpy())
    close(evaluate_node("Swish", {"alpha": 1.5}, [X], opset=24)[0], X / (1 + np.exp(-1.5 * X)))
    W, b = draw(6, 5), draw(6)
    expected = F.linear(torch.from_numpy(X), torch.from_numpy(W), torch.from_numpy(b)).numpy()
    close(evaluate_node("Linear", {}, [X, W, b], domain="onnxcrp")[0], expected)


def test_norms_of_newer_opsets():
    x, gamma, beta = draw(2, 6, 3, 4), draw(6), draw(6)
    expected = F.group_norm(torch.from_numpy(x), 3, torch.from_numpy(gamma), torch.from_numpy(beta), 1e-5).numpy()
    close(evaluate_node("GroupNormalization", {"num_groups": 3}, [x, gamma, beta], opset=21)[0], expected, 1e-8)
    gamma = draw(3, 4)
    expected = F.rms_norm(torch.from_numpy(x), [3, 4], torch.from_numpy(gamma), 1e-5).numpy()
    close(evaluate_node("RMSNormalization", {"axis": 2}, [x, gamma], opset=23)[0], expected, 1e-8)


def test_blocked_dequantize():
    """By hand: a scale for every two rows."""
    q, scale = np.arange(8, dtype=np.int8).reshape(4, 2), np.asarray([[1.0, 2.0], [10.0, 20.0]])
    ours = evaluate_node("DequantizeLinear", {"axis": 0, "block_size": 2}, [q, scale], opset=21)[0]
    close(ours, np.asarray([[0.0, 2], [2, 6], [40, 100], [60, 140]]))


def test_erf_in_double():
    expected = torch.special.erf(torch.from_numpy(4 * X)).numpy()
    for backend in BACKENDS:
        close(evaluate_node("Erf", {}, [4 * X], backend=backend)[0], expected, 1e-15)


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_takes_the_lower_index_first(largest):
    x = np.round(draw(3, 40))
    attrs = {"largest": largest, "axis": 1}
    ours = evaluate_node("TopK", attrs, [x, A([17])])
    theirs = runtime("TopK", [x, A([17])], attrs, 2)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("inputs", "attrs", "outputs", "opset"),
    [
        ([X, A([1, 4])], {"axis": -1}, 2, 18),
        ([X], {"axis": -1, "num_outputs": 2}, 2, 18),
        ([X], {"axis": 2}, 2, 13),
        ([X], {"axis": 3, "split": [2, 3]}, 2, 11),
    ],
)
def test_split(inputs, attrs, outputs, opset):
    ours = evaluate_node("Split", attrs, inputs, outputs=outputs, opset=opset)
    for a, b in zip(ours, runtime("Split", inputs, attrs, outputs, opset), strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "opset"),
    [
        ("Softmax", [X], {"axis": 2}, 11),
        ("LogSoftmax", [X], {}, 11),
        ("Clip", [X], {"min": -0.3, "max": 0.5}, 6 + 1),
        ("Squeeze", [X[:, :1]], {"axes": [1]}, 11),
        ("Unsqueeze", [X], {"axes": [0, 2]}, 11),
        ("Slice", [X], {"starts": [1, 0], "ends": [2, 99], "axes": [1, 3]}, 9),
        ("ReduceMean", [X], {"axes": [1, 3], "keepdims": 0}, 13),
        ("Pad", [X], {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 2.0}, 9),
        ("TopK", [X], {"k": 2, "axis": 2}, 9),
        ("Upsample", [X], {"scales": [1.0, 1.0, 2.0, 3.0]}, 7),
        ("Upsample", [X, np.asarray([1, 1, 2, 2.0])], {"mode": "linear"}, 9),
        ("Resize", [X, np.asarray([1, 1, 2, 2.0])], {"mode": "nearest"}, 10),
        ("Scatter", [X, np.zeros((2, 1, 4, 5), np.int64), X[:, :1]], {"axis": 1}, 9),
    ],
)
def test_older_forms_as_onnxruntime(op, inputs, attrs, opset):
    count = 2 if op == "TopK" else 1
    for a, b in zip(
        evaluate_node(op, attrs, inputs, opset=opset), runtime(op, inputs, attrs, count, opset), strict=True
    ):
        close(a, b, 2e-5)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [(8, 10), (7, 4), (3, 11), (1, 5)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize(mode, size, align):
    expected = F.interpolate(torch.from_numpy(X), size, mode=mode, align_corners=align).numpy()
    attrs = {
        "mode": {"bilinear": "linear", "bicubic": "cubic"}[mode],
        "coordinate_transformation_mode": "align_corners" if align else "half_pixel",
    }
    close(evaluate_node("Resize", attrs, [X, None, None, A([2, 3, *size])])[0], expected)


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_as_onnxruntime(mode, coordinates, exclude):
    attrs = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "cubic":
        attrs["exclude_outside"] = exclude
    for scales in ([1, 1, 2.0, 2.5], [1, 1, 0.7, 0.5]):
        inputs = [X, None, np.asarray(scales)]
        close(evaluate_node("Resize", attrs, inputs, opset=19)[0], runtime("Resize", inputs, attrs, opset=19)[0], 1e-5)
        if mode == "nearest":
            for nearest in ("floor", "ceil", "round_prefer_ceil", "round_prefer_floor"):
                named = {**attrs, "nearest_mode": nearest}
                ours = evaluate_node("Resize", named, inputs, opset=19)[0]
                close(ours, runtime("Resize", inputs, named, opset=19)[0], 1e-5)


def test_resize_antialiased_as_onnxruntime():
    attrs = {"mode": "linear", "antialias": 1, "axes": [2, 3]}
    inputs = [X, None, None, A([2, 3])]
    close(evaluate_node("Resize", attrs, inputs)[0], runtime("Resize", inputs, attrs)[0], 1e-5)


def test_lrn_over_an_even_window():
    """By hand: size 4 takes one channel before and two after."""
    x = draw(1, 7, 3, 2)
    square = np.concatenate([np.zeros((1, 1, 3, 2)), x**2, np.zeros((1, 2, 3, 2))], 1)
    total = square[:, :7] + square[:, 1:8] + square[:, 2:9] + square[:, 3:10]
    close(evaluate_node("LRN", {"size": 4, "alpha": 0.5}, [x])[0], x / (1 + 0.125 * total) ** 0.75)


@pytest.mark.parametrize(
    ("op", "inputs", "attrs"),
    [("LpNormalization", [X], {"axis": 1}), ("GlobalLpPool", [X], {}), ("Det", [X[0, 0, :4, :4]], {})],
)
def test_what_has_no_kernel_falls_through_to_onnx_reference(op, inputs, attrs):
    assert op not in KERNELS
    try:
        expected = ReferenceEvaluator(single(op, inputs, attrs)).run(None, {"x0": inputs[0]})[0]
    except Exception:  # what onnx itself lacks is reported, not computed
        with pytest.raises(UnsupportedError, match=op):
            evaluate_node(op, attrs, inputs)
    else:
        close(evaluate_node(op, attrs, inputs)[0], expected)


def test_types_are_those_of_the_inputs():
    for dtype in (np.float16, np.float32, np.float64):
        x, W = X.astype(dtype), draw(2, 3, 3, 3).astype(dtype)
        assert evaluate_node("Conv", {}, [x, W])[0].dtype == dtype
        for op in (
            "Relu",
            "Sigmoid",
            "Softplus",
            "Gelu",
            "LeakyRelu",
            "Elu",
            "Clip",
            "ReduceMean",
            "LRN",
            "Softmax",
            "Erf",
        ):
            assert evaluate_node(op, {"size": 3} if op == "LRN" else {}, [x])[0].dtype == dtype, op
        assert evaluate_node("AveragePool", {"kernel_shape": [2, 2]}, [x])[0].dtype == dtype


# ------------------------------------------------------------------------------------------------------- whole graphs


def test_everything_is_in_float64():
    """A third is not a float32: what passes through Cast, Constant and float16 keeps its 53 bits."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float16[N] x) => (float[N] y, int64[1] n)
        {
            three = Constant<value = float[1] {3.0}>()
            one = ConstantOfShape<value = float16[1] {1}>(k)
            wide = Cast<to = 1>(x)
            third = Div(wide, three)
            half = Cast<to = 10>(third)
            sum = CastLike(half, one)
            y = Cast<to = 1>(sum)
            n = Shape(y)
        }""")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([1]), "k"))
    result = evaluate(model, {"x": np.asarray([1.0, 2.0])})
    assert result["y"].dtype == np.float64
    np.testing.assert_array_equal(result["y"], np.asarray([1 / 3, 2 / 3]))
    np.testing.assert_array_equal(result["n"], [2])
    assert evaluate(model, {"x": [1.0]}, dtype=np.float32)["y"].dtype == np.float32


def test_outputs_may_be_any_tensor_and_only_what_they_need_runs():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "other" : 1]>
        g (float[N] x) => (float[N] y)
        { a = Relu(x)  b = Neg(a)  y = other.Unknown(b) }""")
    result = evaluate(model, {"x": [-1.0, 2.0]}, ["b", "x", "a"])
    assert list(result) == ["b", "x", "a"]
    np.testing.assert_array_equal(result["b"], [0, -2])
    with pytest.raises(UnsupportedError, match=r"Unknown.*'y'.*'other'"):
        evaluate(model, {"x": [1.0]})


def test_inner_tensors_can_be_given():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "other" : 1]>
        g (float[N] x) => (float[N] y) { a = other.Unknown(x)  b = Neg(a)  y = Add(b, x) }""")
    np.testing.assert_array_equal(evaluate(model, {"x": [1.0], "a": [5.0]})["y"], [-4])


def test_one_output_of_a_node_can_be_given():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[1, 1, 3] x) => (float[1, 1, 2] y, int64[1, 1, 2] i) { y, i = MaxPool<kernel_shape = [2]>(x) }""")
    chosen = np.asarray([[[0, 1]]])
    result = evaluate(model, {"x": [[[1.0, 1.0, 0.0]]], "i": chosen})
    np.testing.assert_array_equal(result["i"], chosen)
    np.testing.assert_array_equal(result["y"], [[[1, 1]]])


def test_default_of_an_input_can_be_overridden():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[N] x, float[N] mask) => (float[N] y) { y = Mul(x, mask) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "mask"))
    assert evaluate(model, {"x": [3.0]})["y"] == [3]
    assert evaluate(model, {"x": [3.0], "mask": [2.0]})["y"] == [6]
    with pytest.raises(InputError, match="'x' is missing"):
        evaluate(model, {})
    with pytest.raises(InputError, match="no input 'z'"):
        evaluate(model, {"x": [1.0], "z": [1.0]})


def test_integer_inputs_take_no_floats():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
        g (int64[N] x) => (float[N] y) { y = Cast<to = 1>(x) }""")
    assert evaluate(model, {"x": [3]})["y"].dtype == np.float64
    with pytest.raises(InputError, match="holds int64"):
        evaluate(model, {"x": [3.5]})


def test_if_and_local_functions():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[N] x, bool flag) => (float[N] y)
        {
            d = local.Double(x)
            y = If (flag) <
                then_branch = t () => (float[N] p) { p = Neg(d) },
                else_branch = e () => (float[N] q) { q = Relu(d) }
            >
        }
        <domain: "local", opset_import: ["" : 18]> Double (a) => (b) { b = Add(a, a) }""")
    np.testing.assert_array_equal(evaluate(model, {"x": [-1.0, 2.0], "flag": True})["y"], [2, -4])
    np.testing.assert_array_equal(evaluate(model, {"x": [-1.0, 2.0], "flag": False})["y"], [0, 4])


def test_errors_name_operator_and_node():
    node = helper.make_node("Bernoulli", ["x"], ["y"], name="dice")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]))
    with pytest.raises(UnsupportedError, match=r"Bernoulli.*'dice'"):
        evaluate(model, {"x": [1.0]})
    with pytest.raises(UnsupportedError, match="NoSuchOperator"):
        evaluate_node("NoSuchOperator", {}, [X])
    with pytest.raises(ModelError, match=r"MatMul \(node 'm'\).*\[2, 3\], \[2, 3\]"):
        evaluate_node("MatMul", {}, [draw(2, 3), draw(2, 3)], name="m")
    with pytest.raises(ValueError, match="backend"):
        evaluate(model, {"x": [1.0]}, backend="tensorflow")


def test_registration_refuses_to_overwrite():
    with pytest.raises(ValueError, match="Conv is registered"):
        kernel("Conv")(lambda attrs, x: x)


def test_missing_torch_is_an_error_only_when_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    model = single("Conv", [X.astype(np.float32), draw(2, 3, 3, 3).astype(np.float32)], {})
    feeds = {"x0": X, "x1": draw(2, 3, 3, 3)}
    with pytest.raises(Exception, match="torch is not installed"):
        evaluate(model, feeds, backend="torch")
    assert evaluate(model, feeds)["y0"].shape == (2, 2, 2, 3)


def test_inputs_stay_as_they_are():
    x, W = draw(1, 2, 5, 5), draw(2, 2, 3, 3)
    x.flags.writeable = W.flags.writeable = False
    for backend in BACKENDS:
        for op, inputs, attrs in (
            ("Conv", [x, W], {}),
            ("ConvTranspose", [x, W], {}),
            ("MaxPool", [x], {"kernel_shape": [2, 2]}),
            ("AveragePool", [x], {"kernel_shape": [2, 2]}),
            ("ScatterElements", [x, np.zeros(x.shape, np.int64), x], {"reduction": "add"}),
            ("Erf", [x[..., ::-1]], {}),
        ):
            evaluate_node(op, attrs, inputs, backend=backend)
    assert set(TORCH_KERNELS) <= set(KERNELS)


def export(net: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    import io
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net.eval(), (x,), buffer, dynamo=False, opset_version=17)
    return onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_whole_nets_as_torch_in_double(name):
    from tests.support import peers

    peers.load()
    import torchvision

    torch.manual_seed(0)
    net, x = getattr(torchvision.models, name)(weights=None), torch.randn(2, 3, 64, 64)
    model = export(net, x)
    net = net.eval()
    model32 = {k: v.double() for k, v in net.state_dict().items()}
    net = net.double()
    net.load_state_dict(model32)
    with torch.no_grad():
        expected = net(x.double()).numpy()
    for backend in BACKENDS:
        (ours,) = evaluate(model, {model.graph.input[0].name: x.numpy()}, backend=backend).values()
        assert ours.dtype == np.float64
        # the exporter folds BatchNorm in float32, so the weights themselves agree to float32 only
        assert np.linalg.norm(ours - expected) < (1e-12 if name.startswith("squeeze") else 1e-6) * np.linalg.norm(
            expected
        )


@pytest.mark.slow
def test_vgg_at_224_takes_seconds():
    from tests.support import peers

    peers.load()
    import torchvision

    torch.manual_seed(0)
    net, x = torchvision.models.vgg16(weights=None).eval(), torch.randn(1, 3, 224, 224)
    model = export(net, x)
    start = time.perf_counter()
    (ours,) = evaluate(model, {model.graph.input[0].name: x.numpy()}, backend="torch").values()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        expected = net.double()(x.double()).numpy()
    assert np.linalg.norm(ours - expected) < 1e-12 * np.linalg.norm(expected)
    assert seconds < 120  # and not hours; the machine may be busy


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize(("theta", "size"), [((2, 2, 3), [2, 3, 4, 5]), ((1, 3, 4), [1, 2, 3, 4, 2])])
def test_affine_grid_as_onnxruntime(theta, size, align):
    inputs, attrs = [draw(*theta), A(size)], {"align_corners": align}
    close(
        evaluate_node("AffineGrid", attrs, inputs, opset=20)[0], runtime("AffineGrid", inputs, attrs, opset=20)[0], 1e-5
    )
