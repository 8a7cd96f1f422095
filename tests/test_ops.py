"""Transposes. Oracle: the definition, <f(v), s> = <v, T(s)>, f run by onnxruntime itself; numeric derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph, positive
from onnxcrp.ops import CARRIES_NONE, OPS, Node, Parts, supported

RNG = np.random.default_rng(0)
OPSET = 20


def run(
    nodes: list[gs.Node], inputs: list[gs.Variable], outputs: list[gs.Variable], feeds: dict[str, Any]
) -> list[np.ndarray]:
    graph = gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, opset=OPSET)
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = 10
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def shapes_of(node: gs.Node, inputs: list[gs.Variable], opset: int = OPSET) -> None:
    """Static shapes of the node's outputs, by onnx's own inference."""
    outputs = [gs.Variable(t.name, None) for t in node.outputs]
    graph = gs.Graph(nodes=[node], inputs=inputs, outputs=list(node.outputs), opset=opset)
    inferred = onnx.shape_inference.infer_shapes(gs.export_onnx(graph, do_type_check=False), data_prop=True)
    for tensor, info in zip(node.outputs, inferred.graph.output, strict=True):
        tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        tensor.shape = [
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in info.type.tensor_type.shape.dim
        ]
    del outputs


def check_transpose(
    op_type: str,
    shapes: list[tuple[int, ...]],
    attrs: dict[str, Any] | None = None,
    *,
    constants: dict[int, Any] | None = None,
    outputs: int = 1,
    dynamic: bool = False,
    batch: int = 2,
    linear: bool = True,
    conditions: int = 1,
    **options: Any,
) -> None:
    """<f(v), s> = <v, T(s)> for random v, s; with `conditions` > 1 the forward pass has batch 1 and s more."""
    constants = constants or {}
    feeds, variables, data = {}, [], []
    count = len(shapes) + len(constants)
    remaining = iter(shapes)
    for i in range(count):
        if i in constants:
            variables.append(gs.Constant(f"c{i}", np.asarray(constants[i])))
            continue
        shape = (1 if conditions > 1 else batch, *next(remaining))
        known: list[Any] = ["batch", *shape[1:]]
        if dynamic:
            known = (
                ["batch", shape[1], *[f"d{i}_{axis}" for axis in range(2, len(shape))]]
                if len(shape) > 2
                else ["batch", None]
            )
        variables.append(gs.Variable(f"x{i}", np.float32, known))
        feeds[f"x{i}"] = RNG.standard_normal(shape).astype(np.float32)
        data.append(i)
    node = gs.Node(op_type, "node", dict(attrs or {}), variables, [gs.Variable(f"y{i}") for i in range(outputs)])
    inputs = [v for v in variables if isinstance(v, gs.Variable)]
    shapes_of(node, inputs)
    values = run([node], inputs, list(node.outputs), feeds)

    op = Graph(opset=OPSET, nodes=[node], taken=[], **options)
    view = Node(op, node, data=data, nonnegative=set(), name="layer")
    about = OPS[op_type]
    messages = [RNG.standard_normal((max(conditions, v.shape[0]), *v.shape[1:])).astype(np.float32) for v in values]
    s = [gs.Variable(f"s{i}", np.float32, [None] * m.ndim) for i, m in enumerate(messages)]
    arriving: Any = [op.value(t) for t in s] if outputs > 1 else op.value(s[0])
    back = about.transpose(op, view, arriving, view.input(1)) if about.weighted else about.transpose(op, view, arriving)
    parts = back if isinstance(back, Parts) else [back]
    ends = []
    for i, part in enumerate(parts):
        end = gs.Variable(f"back{i}", np.float32, [None] * 2)
        op.nodes.append(gs.Node("Identity", f"end{i}", inputs=[part.tensor], outputs=[end]))
        end.shape = None
        ends.append(end)
    results = run(op.nodes, [*inputs, *s], ends, {**feeds, **{t.name: m for t, m in zip(s, messages, strict=True)}})
    affine = linear and any(isinstance(v, gs.Constant) and v.values.dtype.kind == "f" for v in variables)
    if affine:  # take the constant part away: f(v) - f(0)
        nothing = run([node], inputs, list(node.outputs), {k: np.zeros_like(v) for k, v in feeds.items()})
        values = [v - n for v, n in zip(values, nothing, strict=True)]
    for n in range(max(conditions, 1)):
        pick = slice(n, n + 1) if conditions > 1 else slice(None)
        left = sum(float((v.astype(np.float64) * m[pick]).sum()) for v, m in zip(values, messages, strict=True))
        right = 0.0
        for i, result in zip(data, results, strict=True):
            v = feeds[f"x{i}"].astype(np.float64)
            r = result[pick]
            assert r.shape[0] == v.shape[0]
            right += float((v * unbroadcast(r, v.shape)).sum())
        scale = sum(float(np.abs(v * m[pick]).sum()) for v, m in zip(values, messages, strict=True))
        assert abs(left - right) <= 2e-5 * scale + 1e-6, (op_type, left, right)
    if conditions == 1 and op_type not in ("Add", "Sub", "Sum", "Mean", "Expand", "Min", "Max"):
        for i, result in zip(data, results, strict=True):
            assert result.shape == feeds[f"x{i}"].shape


def unbroadcast(r: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = tuple(i for i in range(1, len(shape)) if shape[i] == 1 and r.shape[i] != 1)
    return r.sum(axes, keepdims=True) if axes else r


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONVS = [
    # spatial input, weights, attributes
    ((3, 9), (4, 3, 3), {}),
    ((3, 10), (4, 3, 4), {"strides": [3], "pads": [1, 2]}),
    ((2, 7, 8), (5, 2, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 9, 8), (5, 2, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((2, 10, 11), (5, 2, 3, 2), {"strides": [2, 3], "pads": [0, 1, 1, 0]}),
    ((4, 9, 9), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((4, 9, 9), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((4, 9, 9), (8, 1, 3, 3), {"group": 4, "strides": [2, 2]}),
    ((2, 12, 11), (3, 2, 3, 3), {"dilations": [2, 3], "pads": [2, 1, 0, 2]}),
    ((2, 12, 11), (3, 2, 3, 3), {"dilations": [2, 2], "strides": [2, 2]}),
    ((2, 5, 5), (3, 2, 1, 1), {"pads": [1, 1, 1, 1]}),  # SqueezeNet 1.0 has such a layer
    ((2, 8, 8), (3, 2, 1, 1), {"strides": [2, 2]}),
    ((4, 7, 9), (6, 2, 1, 1), {"strides": [2, 3], "group": 2}),
    ((2, 10), (3, 2, 1), {"strides": [3]}),
    ((2, 5, 4, 5), (3, 2, 1, 1, 1), {"strides": [2, 1, 2]}),
    ((2, 7, 7), (3, 2, 2, 2), {"strides": [4, 4]}),
    # more padding before than after, by more than the strides can make up for
    ((2, 16), (3, 2, 3), {"dilations": [2], "pads": [1, 0]}),
    ((2, 15), (3, 2, 2), {"dilations": [3], "strides": [2], "pads": [2, 0]}),
    ((2, 14, 13), (3, 2, 3, 3), {"dilations": [4, 1], "strides": [1, 2], "pads": [4, 2, 1, 0]}),
    # one kernel per channel, in blocks of 16
    ((16, 9, 8), (16, 1, 3, 3), {"group": 16, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((32, 10, 12), (32, 1, 5, 4), {"group": 32, "strides": [2, 3], "pads": [2, 1, 2, 2]}),
    ((16, 12, 11), (16, 1, 3, 3), {"group": 16, "strides": [2, 2], "dilations": [2, 2], "pads": [2, 2, 1, 2]}),
    ((16, 8, 8), (16, 1, 3, 3), {"group": 16, "strides": [2, 2]}),  # the strides end before the input does
    ((16, 8, 8), (16, 1, 2, 2), {"group": 16, "strides": [2, 2], "pads": [1, 1, 1, 1]}),  # or after it
    ((16, 8, 8), (16, 1, 3, 3), {"group": 16, "strides": [2, 2], "pads": [2, 2, 2, 2]}),
    ((16, 9), (16, 1, 4), {"group": 16, "strides": [3], "pads": [3, 1]}),
    ((16, 9), (16, 1, 4), {"group": 16, "strides": [3], "pads": [1, 3]}),
    ((16, 20), (16, 1, 4), {"group": 16, "strides": [2], "pads": [1, 2]}),
    ((16, 5, 6, 5), (16, 1, 3, 2, 3), {"group": 16, "strides": [2, 2, 1], "pads": [1, 0, 1, 1, 1, 1]}),
    ((2, 5, 6, 7), (3, 2, 3, 2, 3), {"strides": [1, 2, 2], "pads": [1, 0, 1, 1, 1, 0]}),
]


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("size", "kernel", "attrs"), CONVS)
def test_conv(size: Any, kernel: Any, attrs: Any, dynamic: bool, flip: bool) -> None:
    attrs = {"kernel_shape": list(kernel[2:]), **attrs}
    check_transpose(
        "Conv", [size], attrs, constants={1: w(*kernel), 2: w(kernel[0])}, dynamic=dynamic, flip_convolutions=flip
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_conv_drawn(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(n)]  # noqa: E731
    kernel, strides, dilations = draw(1, 4), draw(1, 3), draw(1, 2)
    pads = [data.draw(st.integers(0, 3)) for _ in range(2 * n)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [max(data.draw(st.integers(1, 9)), r - b - a) for r, b, a in zip(reach, pads[:n], pads[n:], strict=True)]
    group = data.draw(st.sampled_from([1, 2]))
    weights = w(2 * group, 2, *kernel)
    attrs = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads, "group": group}
    check_transpose("Conv", [(2 * group, *size)], attrs, constants={1: weights}, dynamic=data.draw(st.booleans()),
                    flip_convolutions=data.draw(st.booleans()), conditions=data.draw(st.sampled_from([1, 3])))  # fmt: skip


@pytest.mark.parametrize(
    ("size", "kernel", "attrs"),
    [
        ((3, 5), (3, 2, 3), {}),
        ((3, 5), (3, 2, 4), {"strides": [3], "pads": [1, 1]}),
        ((3, 4, 5), (3, 2, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        ((4, 4, 5), (4, 3, 3, 2), {"strides": [2, 3], "group": 2, "pads": [0, 1, 1, 0]}),
        ((4, 4, 5), (4, 1, 2, 2), {"strides": [2, 2], "group": 4}),
        ((3, 4, 5), (3, 2, 3, 3), {"dilations": [2, 2], "pads": [1, 1, 1, 1]}),
        ((2, 3, 3, 4), (2, 3, 2, 2, 2), {"strides": [2, 2, 2]}),
    ],
)
def test_conv_transpose(size: Any, kernel: Any, attrs: Any) -> None:
    attrs = {"kernel_shape": list(kernel[2:]), **attrs}
    out = kernel[1] * attrs.get("group", 1)
    check_transpose("ConvTranspose", [size], attrs, constants={1: w(*kernel), 2: w(out)})
    check_transpose("ConvTranspose", [size], attrs, constants={1: w(*kernel)}, conditions=3)


POOLS = [
    ((3, 9), {"kernel_shape": [3], "strides": [2]}),
    ((3, 8), {"kernel_shape": [2], "strides": [2]}),
    ((3, 9), {"kernel_shape": [2], "strides": [2]}),
    ((3, 8, 8), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((3, 7, 11), {"kernel_shape": [2, 3], "strides": [2, 3]}),  # windows side by side, the last positions in none
    ((3, 7, 11), {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1}),
    ((3, 7, 11), {"kernel_shape": [2, 3], "strides": [2, 3], "pads": [0, 0, 1, 1]}),
    ((3, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2]}),
    ((3, 9, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((3, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
    ((3, 10, 9), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ((3, 9, 8), {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0, 1, 1, 0]}),
    ((2, 4, 6, 5), {"kernel_shape": [2, 3, 2], "strides": [2, 2, 2]}),
]


@pytest.mark.parametrize("conditions", [1, 3])
@pytest.mark.parametrize("dilations", [None, 2])
@pytest.mark.parametrize(("size", "attrs"), POOLS)
def test_max_pool(size: Any, attrs: Any, dilations: int | None, conditions: int) -> None:
    attrs = dict(attrs)
    if dilations:
        attrs["dilations"] = [dilations] * (len(size) - 1)
    check_transpose("MaxPool", [size], attrs, conditions=conditions)
    check_transpose("MaxPool", [size], attrs, conditions=conditions, dynamic=True)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("conditions", [1, 3])
@pytest.mark.parametrize(("size", "attrs"), POOLS)
def test_average_pool(size: Any, attrs: Any, include: int, conditions: int) -> None:
    attrs = {**attrs, "count_include_pad": include}
    check_transpose("AveragePool", [size], attrs, conditions=conditions)
    check_transpose("AveragePool", [size], attrs, conditions=conditions, dynamic=True)


def test_average_pool_with_gaps() -> None:
    """Dilated, with more padding before than after."""
    attrs = {"kernel_shape": [3], "strides": [2], "dilations": [3], "pads": [1, 0]}
    check_transpose("AveragePool", [(2, 7)], attrs)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_pools_drawn(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2))
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(n)]  # noqa: E731
    kernel, strides = draw(2, 4), draw(1, 3)
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    size = [max(data.draw(st.integers(2, 9)), k) for k in kernel]
    attrs = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": data.draw(st.integers(0, 1))}
    conditions = data.draw(st.sampled_from([1, 3]))
    check_transpose("MaxPool", [(2, *size)], attrs, conditions=conditions)
    if all(p < k for p, k in zip(pads, kernel * 2, strict=True)):
        include = data.draw(st.integers(0, 1))
        check_transpose("AveragePool", [(2, *size)], {**attrs, "count_include_pad": include}, conditions=conditions)


LINEAR_TABLE: list[tuple[str, list[tuple[int, ...]], dict[str, Any], dict[int, Any]]] = [
    ("BatchNormalization", [(3, 4, 4)], {"epsilon": 1e-3}, {1: w(3), 2: w(3), 3: w(3), 4: np.abs(w(3))}),
    ("BatchNormalization", [(3,)], {}, {1: w(3), 2: w(3), 3: w(3), 4: np.abs(w(3))}),
    ("GlobalAveragePool", [(3, 4, 5)], {}, {}),
    ("GlobalMaxPool", [(3, 4, 5)], {}, {}),
    ("ReduceMean", [(3, 4, 5)], {"keepdims": 0}, {1: np.array([2, 3])}),
    ("ReduceMean", [(3, 4, 5)], {"keepdims": 1}, {1: np.array([-1])}),
    ("ReduceSum", [(3, 4, 5)], {"keepdims": 0}, {1: np.array([1])}),
    ("ReduceMax", [(3, 4, 5)], {"keepdims": 0}, {1: np.array([2, 3])}),
    ("ReduceMax", [(3, 4, 5)], {"keepdims": 1}, {1: np.array([1])}),
    ("ReduceMin", [(3, 4, 5)], {"keepdims": 0}, {1: np.array([1, 3])}),
    ("Add", [(3, 4), (3, 4)], {}, {}),
    ("Add", [(3, 4), (1, 4)], {}, {}),
    ("Add", [(3, 4)], {}, {1: w(3, 4)}),
    ("Sub", [(3, 4), (3, 1)], {}, {}),
    ("Sub", [(3, 4)], {}, {0: w(3, 4)}),
    ("Sum", [(3, 4), (3, 4), (3, 4)], {}, {}),
    ("Mean", [(3, 4), (3, 4), (3, 4)], {}, {}),
    ("Mul", [(3, 4)], {}, {1: w(3, 1)}),
    ("Mul", [(3, 4)], {}, {0: w(3, 1)}),
    ("Div", [(3, 4)], {}, {1: w(3, 1)}),
    ("Neg", [(3, 4)], {}, {}),
    ("Cast", [(3, 4)], {"to": 1}, {}),
    ("Identity", [(3, 4)], {}, {}),
    ("Reshape", [(3, 4)], {}, {1: np.array([0, 2, 6])}),
    ("Reshape", [(3, 4)], {}, {1: np.array([-1, 12])}),
    ("Flatten", [(3, 4)], {}, {}),
    ("Squeeze", [(3, 1, 1)], {}, {1: np.array([2, 3])}),
    ("Unsqueeze", [(3,)], {}, {1: np.array([-1, 1])}),
    ("Transpose", [(3, 4, 5)], {"perm": [0, 2, 3, 1]}, {}),
    ("Expand", [(3, 1)], {}, {1: np.array([1, 3, 4])}),
    ("Concat", [(3, 4), (2, 4), (1, 4)], {"axis": 1}, {}),
    ("Concat", [(3, 4), (3, 4)], {"axis": -1}, {1: w(2, 3, 2)}),
    ("Slice", [(6, 7)], {}, {1: np.array([1, 2]), 2: np.array([5, 2**31 - 1]), 3: np.array([1, 2])}),
    ("Slice", [(6, 7)], {}, {1: np.array([-1]), 2: np.array([-(2**31)]), 3: np.array([1]), 4: np.array([-1])}),
    ("Slice", [(6, 7)], {}, {1: np.array([0]), 2: np.array([100]), 3: np.array([-1]), 4: np.array([2])}),
    ("Slice", [(6, 7)], {}, {1: np.array([-3]), 2: np.array([-1]), 3: np.array([2])}),
    ("Gather", [(6, 7)], {"axis": 1}, {1: np.array(2)}),
    ("Gather", [(6, 7)], {"axis": 1}, {1: np.array([2, 5, 2])}),
    ("Gather", [(6, 7)], {"axis": 2}, {1: np.array([[0, -1], [3, 3]])}),
    ("Gather", [(3, 7)], {"axis": 1}, {1: np.array([2, 0, 1])}),
    ("Pad", [(3, 4, 5)], {}, {1: np.array([0, 0, 1, 2, 0, 0, 0, 3])}),
    ("Pad", [(3, 4, 5)], {}, {1: np.array([0, 0, 1, 2, 0, 0, 0, 3]), 2: np.float32(1.5)}),
    ("Pad", [(3, 4, 5)], {"mode": "reflect"}, {1: np.array([0, 0, 1, 2, 0, 0, 0, 3])}),
    ("Pad", [(3, 4, 5)], {"mode": "edge"}, {1: np.array([0, 0, 1, 2, 0, 0, 0, 3])}),
    ("Pad", [(3, 6, 6)], {}, {1: np.array([0, 0, -1, 0, 0, 0, 1, -2])}),
    ("Pad", [(3, 6, 6)], {"mode": "reflect"}, {1: np.array([0, 0, -1, 2, 0, 0, 1, -2])}),
    ("Pad", [(3, 6, 6)], {"mode": "wrap"}, {1: np.array([3, -1, 1, 2]), 2: np.float32(0), 3: np.array([-1, 2])}),
    ("Tile", [(3, 4)], {}, {1: np.array([1, 2, 3])}),
    ("Where", [(3, 4)], {}, {0: RNG.random((1, 3, 4)) > 0.5, 2: np.float32(0)}),
    ("Where", [(3, 4), (3, 4)], {}, {0: RNG.random((1, 3, 4)) > 0.5}),
    ("Max", [(3, 4), (3, 4), (3, 4)], {}, {}),
    ("Min", [(3, 4), (3, 1)], {}, {}),
    ("DepthToSpace", [(12, 2, 3)], {"blocksize": 2}, {}),
    ("DepthToSpace", [(12, 2, 3)], {"blocksize": 2, "mode": "CRD"}, {}),
    ("SpaceToDepth", [(3, 4, 6)], {"blocksize": 2}, {}),
]


@pytest.mark.parametrize("conditions", [1, 3])
@pytest.mark.parametrize(("op_type", "shapes", "attrs", "constants"), LINEAR_TABLE)
def test_transpose(op_type: str, shapes: Any, attrs: Any, constants: Any, conditions: int) -> None:
    if op_type == "BatchNormalization":
        check_batchnorm(shapes[0], attrs, constants)
        return
    if op_type == "Concat" and constants:
        constants = {1: constants[1][: 1 if conditions > 1 else 2]}
        shapes = shapes[:1]
        constants[1] = np.zeros((1 if conditions > 1 else 2, 3, 2), np.float32)
    check_transpose(op_type, shapes, attrs, constants=constants, conditions=conditions)


def check_batchnorm(shape: tuple[int, ...], attrs: dict[str, Any], constants: dict[int, Any]) -> None:
    from onnxcrp.ops.linear import batchnorm_scale

    x = gs.Variable("x", np.float32, [2, *shape])
    node = gs.Node(
        "BatchNormalization",
        "bn",
        attrs,
        [x, *[gs.Constant(f"c{i}", c) for i, c in constants.items()]],
        [gs.Variable("y", np.float32, [2, *shape])],
    )
    scale, shift = batchnorm_scale(Node(Graph(opset=OPSET), node, data=[0], nonnegative=set(), name="bn"))
    v = RNG.standard_normal((2, *shape)).astype(np.float32)
    (y,) = run([node], [x], list(node.outputs), {"x": v})
    np.testing.assert_allclose(v * scale + shift, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("how", ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize("scales", [[2.0, 3.0], [0.5, 1.5]])
def test_resize(mode: str, how: str, scales: list[float]) -> None:
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
    if mode == "nearest":
        attrs["nearest_mode"] = "floor"
    constants = {1: np.zeros(0, np.float32), 2: np.array([1, 1, *scales], np.float32)}
    check_transpose("Resize", [(2, 4, 6)], attrs, constants=constants)
    sizes = {1: np.zeros(0, np.float32), 2: np.zeros(0, np.float32), 3: np.array([2, 2, 7, 5])}
    check_transpose("Resize", [(2, 4, 6)], attrs, constants=sizes)


@pytest.mark.parametrize("conditions", [1, 3])
def test_split(conditions: int) -> None:
    check_transpose(
        "Split", [(7, 4)], {"axis": 1}, constants={1: np.array([2, 4, 1])}, outputs=3, conditions=conditions
    )
    check_transpose("Split", [(6, 4)], {"axis": -1, "num_outputs": 2}, outputs=2, conditions=conditions)


def max_pool_back(node: gs.Node, s: gs.Variable, a: np.ndarray, R: np.ndarray) -> np.ndarray:
    """R through the transpose of a MaxPool node at its input a; `s` declares the shape of R."""
    op = Graph(opset=OPSET, nodes=[node])
    back = OPS["MaxPool"].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="pool"), op.value(s))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (found,) = run(op.nodes, [node.inputs[0], s], [end], {node.inputs[0].name: a, s.name: R})
    return found


def test_max_pool_gives_ties_to_the_first() -> None:
    for attrs in ({"kernel_shape": [2], "strides": [2]}, {"kernel_shape": [3], "strides": [1]}):
        x = gs.Variable("x", np.float32, [1, 1, 4])
        node = gs.Node("MaxPool", "pool", attrs, [x], [gs.Variable("y", np.float32, [1, 1, 2])])
        s = gs.Variable("s", np.float32, [None] * 3)
        r = max_pool_back(node, s, np.ones((1, 1, 4), np.float32), np.array([[[1, 2]]], np.float32))
        expected = [1, 0, 2, 0] if attrs["strides"] == [2] else [1, 2, 0, 0]
        assert r.reshape(-1).tolist() == expected


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (8, 9)])
def test_max_pool_over_tiles_gives_ties_to_the_first_of_each(size: tuple[int, int]) -> None:
    """Against a walk over the windows, on few different values; what no window reaches gets nothing."""
    rng = np.random.default_rng(0)
    a = rng.integers(-1, 1, (2, 3, *size)).astype(np.float32)
    R = rng.standard_normal((2, 3, 2, 4)).astype(np.float32)
    expected = np.zeros_like(a)
    for n, c, h, w in np.ndindex(*R.shape):
        tile = a[n, c, 3 * h : 3 * h + 3, 2 * w : 2 * w + 2]
        row, column = np.unravel_index(tile.argmax(), tile.shape)
        expected[n, c, 3 * h + row, 2 * w + column] = R[n, c, h, w]
    sizes = {"x": size, "y": (2, 4), "s": (2, 4)}
    x, y, s = (gs.Variable(name, np.float32, [None, 3, *size]) for name, size in sizes.items())
    attrs = {"kernel_shape": [3, 2], "strides": [3, 2]}
    node = gs.Node("MaxPool", "pool", attrs, [x], [y])
    np.testing.assert_array_equal(max_pool_back(node, s, a, R), expected)


EMPTY_WINDOWS = [  # the runtime's Indices are in front of the channel where a window lies wholly in the padding
    ((1, 2), {"kernel_shape": [1, 2], "strides": [1, 1], "dilations": [1, 3], "pads": [0, 1, 0, 1]}),
    ((1, 1), {"kernel_shape": [2, 2], "strides": [1, 1], "dilations": [2, 2], "pads": [1, 1, 1, 1]}),
    ((2,), {"kernel_shape": [2], "strides": [1], "dilations": [3], "pads": [1, 1]}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("size", "attrs"), EMPTY_WINDOWS)
def test_windows_of_max_pool_without_a_maximum_stay_in_their_channel(
    size: tuple[int, ...], attrs: dict[str, Any], dynamic: bool
) -> None:
    x = gs.Variable("x", np.float32, [None, 2, *([None] * len(size) if dynamic else size)])
    y = gs.Variable("y", np.float32, [None, 2, *[None] * len(size)])
    s = gs.Variable("s", np.float32, [None, 2, *[None] * len(size)])
    node = gs.Node("MaxPool", "pool", attrs, [x], [y])
    a = np.ones((3, 2, *size), np.float32)
    (pooled,) = run([node], [x], [y], {"x": a})
    R = np.arange(1, 1 + pooled.size, dtype=np.float32).reshape(pooled.shape)
    found = max_pool_back(node, s, a, R)
    axes = tuple(range(2, a.ndim))
    np.testing.assert_array_equal(found.sum(axes), R.sum(axes))


# ---- derivatives of what is not linear, against central differences of the operator itself --------------------------

ACTIVATIONS: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("Relu", {}, []),
    ("LeakyRelu", {"alpha": 0.2}, []),
    ("PRelu", {}, [np.full((3, 1), 0.3, np.float32)]),
    ("ThresholdedRelu", {"alpha": 0.5}, []),
    ("Elu", {"alpha": 1.5}, []),
    ("Celu", {"alpha": 1.5}, []),
    ("Selu", {}, []),
    ("Sigmoid", {}, []),
    ("HardSigmoid", {"alpha": 0.3}, []),
    ("Tanh", {}, []),
    ("Softplus", {}, []),
    ("Softsign", {}, []),
    ("HardSwish", {}, []),
    ("Mish", {}, []),
    ("Gelu", {}, []),
    ("Gelu", {"approximate": "tanh"}, []),
    ("Clip", {}, [np.float32(-0.5), np.float32(0.7)]),
    ("Erf", {}, []),
    ("Exp", {}, []),
    ("Log", {}, []),
    ("Sqrt", {}, []),
    ("Reciprocal", {}, []),
    ("Abs", {}, []),
    ("Pow", {}, [np.float32(3)]),
    ("Sin", {}, []),
    ("Cos", {}, []),
    *[(name, {}, []) for name in ("Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")],
    ("Shrink", {"lambd": 0.3, "bias": 0.1}, []),
    ("Softmax", {"axis": 1}, []),
    ("LogSoftmax", {"axis": -1}, []),
    ("LayerNormalization", {"axis": -1}, [w(40), w(40)]),
    ("LayerNormalization", {"axis": 1, "epsilon": 1e-3}, [w(3, 40)]),
    ("InstanceNormalization", {}, [w(3), w(3)]),
    ("InstanceNormalization", {"epsilon": 1e-3}, [w(3), w(3)]),
    ("GroupNormalization", {"num_groups": 2}, [w(2), w(2)]),
    ("GroupNormalization", {"num_groups": 3}, [w(3), w(3)]),
    ("LRN", {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 1.2}, []),
]
DEPENDENT = ("LRN", "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization")


@pytest.mark.parametrize(("op_type", "attrs", "constants"), ACTIVATIONS)
def test_derivative(op_type: str, attrs: dict[str, Any], constants: list[Any]) -> None:
    shape = {"LRN": (2, 5, 6, 4), "GroupNormalization": (2, 6, 20)}.get(op_type, (2, 3, 40))
    v = RNG.uniform(-2, 2, shape).astype(np.float32)
    if op_type in ("Log", "Sqrt", "Reciprocal"):
        v = np.abs(v) + 0.3
    if op_type in ("Tan", "Asin", "Acos", "Atanh"):
        v *= 0.35
    if op_type == "Acosh":
        v = np.abs(v) + 1.3
    x = gs.Variable("x", np.float32, list(shape))
    y = gs.Variable("y", np.float32, list(shape))
    node = gs.Node(
        op_type, "node", attrs, [x, *[gs.Constant(f"c{i}", np.asarray(c)) for i, c in enumerate(constants)]], [y]
    )
    direction = RNG.choice([-1.0, 1.0], shape).astype(np.float32)
    h = 2e-3
    (up,), (down,) = (run([node], [x], [y], {"x": v + sign * h * direction}) for sign in (1, -1))
    numeric = (up.astype(np.float64) - down) / (2 * h)
    op = Graph(opset=OPSET, nodes=[node])
    s = gs.Variable("s", np.float32, [None] * len(shape))
    message = RNG.standard_normal(shape).astype(np.float32)
    back = OPS[op_type].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (r,) = run(op.nodes, [x, s], [end], {"x": v, "s": message})
    left, right = numeric * message, r.astype(np.float64) * direction
    if op_type in DEPENDENT:  # entries of a sample depend on each other
        assert abs(left.sum() - right.sum()) < 2e-3 * np.abs(left).sum()
        return
    smooth = np.abs(left - right) < 2e-2 * (1 + np.abs(left))
    assert smooth.mean() > 0.98  # the rest sits on a kink


def test_every_op_with_a_transpose_is_tested_here() -> None:
    tested = {row[0] for row in LINEAR_TABLE} | {row[0] for row in ACTIVATIONS}
    tested |= {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Split"}
    tested |= {"MatMul", "Einsum", "ReduceL1", "ReduceL2"}
    from tests.test_ops_indexing import CASES

    tested |= {case.op for case in CASES} | {"ScatterND"}
    elsewhere = {"Linear", "Silu", "RmsNorm", "Dropout", "QuantizeLinear", "DequantizeLinear", "Round", "Floor", "Ceil"}
    elsewhere |= {"DynamicQuantizeLinear", "Hardmax", "Kernel", "SumKernel"}
    assert {op.name for op in supported()} - tested == elsewhere  # test_rules.py, test_canonize*.py ...
    assert not set(OPS) & set(CARRIES_NONE)


def test_at_least_120_operators_of_the_standard() -> None:
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert len(standard & (set(OPS) | set(CARRIES_NONE))) >= 120
    canonical = {"Linear", "Silu", "RmsNorm", "Kernel", "SumKernel"}  # standard ones once lowered
    assert set(OPS) - standard == canonical
    assert not set(CARRIES_NONE) - standard


def test_linear_and_silu() -> None:
    x, y = gs.Variable("x", np.float32, ["b", 5, 4]), gs.Variable("y", np.float32, ["b", 5, 3])
    weights = w(3, 4)
    node = gs.Node("Linear", "fc", {}, [x, gs.Constant("W", weights)], [y], domain="onnxcrp")
    op = Graph(opset=OPSET)
    s = gs.Variable("s", np.float32, [None] * 3)
    view = Node(op, node, data=[0], nonnegative=set(), name="fc")
    back = OPS["Linear"].transpose(op, view, op.value(s), view.input(1))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    message = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    (r,) = run(op.nodes, [s], [end], {"s": message})
    np.testing.assert_allclose(r, message @ weights, rtol=1e-5, atol=1e-6)

    x, y = gs.Variable("x", np.float32, [50]), gs.Variable("y", np.float32, [50])
    v = np.linspace(-4, 4, 50)
    for alpha in (1.0, 1.702):
        node = gs.Node("Silu", "silu", {"alpha": alpha}, [x], [y], domain="onnxcrp")
        op = Graph(opset=OPSET)
        s = gs.Variable("s", np.float32, [50])
        back = OPS["Silu"].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
        end = gs.Variable("end", np.float32)
        op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
        f = lambda u, alpha=alpha: u / (1 + np.exp(-alpha * u))  # noqa: E731
        feeds = {"x": v.astype(np.float32), "y": f(v).astype(np.float32), "s": np.ones(50, np.float32)}
        (r,) = run(op.nodes, [x, y, s], [end], feeds)
        np.testing.assert_allclose(r, (f(v + 1e-5) - f(v - 1e-5)) / 2e-5, rtol=1e-4, atol=1e-5)


# ---- the eDSL --------------------------------------------------------------------------------------------------------


def test_edsl() -> None:
    op = Graph(opset=OPSET)
    x = op.value(gs.Variable("x", np.float32, [2]))
    assert op.Relu(x) is op.Relu(x)
    assert (x + op.zero) is x
    assert (x * op.zero).is_zero
    assert x * 1 is x
    before = len(op.nodes)
    assert (op.as_value(2.0) * 3).array == 6
    assert len(op.nodes) == before
    with pytest.raises(TypeError, match="truth value"):
        bool(x > 0)
    with pytest.raises(ValueError, match="symbolic zero reached Conv"):
        op.Conv(op.zero, x)
    assert positive(positive(x)) is positive(x)
    with op.scope("R", "layer"):
        assert op.Exp(x).name == "R/layer/Exp"
        assert op.Exp(op.Exp(x)).name == "R/layer/Exp_1"


def test_registration_refuses_to_overwrite() -> None:
    from onnxcrp.ops import carries_none, transpose

    with pytest.raises(ValueError, match="registered already"):
        transpose("Conv", family="convolution")(lambda op, node, s: s)
    with pytest.raises(ValueError, match="registered already"):
        carries_none("Shape", why="again")


@pytest.mark.parametrize(
    ("op_type", "shapes", "f"),
    [
        ("MatMul", [(2, 3, 4), (2, 4, 5)], np.matmul),
        ("Mul", [(3, 4), (3, 4)], np.multiply),
        ("Mul", [(3, 4), (3, 1)], np.multiply),
        ("Div", [(3, 4), (3, 4)], np.divide),
    ],
)
def test_product_of_two_data_paths(op_type: str, shapes: list[tuple[int, ...]], f: Any) -> None:
    """<f(u + du, v + dv) - f(u - du, v - dv), s> = 2 (<du, T_u s> + <dv, T_v s>) for small du, dv."""
    arrays = [RNG.uniform(0.5, 1.5, (2, *shape)) for shape in shapes]
    steps = [1e-5 * RNG.standard_normal(array.shape) for array in arrays]
    up, down = (f(*[a + sign * d for a, d in zip(arrays, steps, strict=True)]) for sign in (1, -1))
    message = RNG.standard_normal(up.shape)
    inputs = [gs.Variable(f"x{i}", np.float32, list(a.shape)) for i, a in enumerate(arrays)]
    y, s = gs.Variable("y", np.float32, list(up.shape)), gs.Variable("s", np.float32, [None] * up.ndim)
    node = gs.Node(op_type, "node", {}, inputs, [y])
    op = Graph(opset=OPSET, nodes=[node])
    back = OPS[op_type].transpose(op, Node(op, node, data=[0, 1], nonnegative=set(), name="n"), op.value(s))
    ends = [gs.Variable(f"end{i}", np.float32) for i in range(2)]
    for part, end in zip(back, ends, strict=True):
        op.nodes.append(gs.Node("Identity", f"node_{end.name}", inputs=[part.tensor], outputs=[end]))
    feeds = {f"x{i}": a.astype(np.float32) for i, a in enumerate(arrays)} | {"s": message.astype(np.float32)}
    results = run(op.nodes, [*inputs, s], ends, feeds)
    left = ((up - down) * message).sum() / 2
    right = sum((d * unbroadcast(r.astype(float), d.shape)).sum() for d, r in zip(steps, results, strict=True))
    scale = sum(np.abs(d * unbroadcast(r, d.shape)).sum() for d, r in zip(steps, results, strict=True))
    assert abs(left - right) < 1e-4 * scale


def test_embedding_sums_what_a_token_looked_up() -> None:
    table = gs.Constant("table", w(10, 4))
    ids, y = gs.Variable("ids", np.int64, [2, 3]), gs.Variable("y", np.float32, [2, 3, 4])
    s = gs.Variable("s", np.float32, [None] * 3)
    node = gs.Node("Gather", "lookup", {}, [table, ids], [y])
    op = Graph(opset=OPSET)
    back = OPS["Gather"].transpose(op, Node(op, node, data=[1], nonnegative=set(), name="n"), op.value(s))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    message = w(2, 3, 4)
    (r,) = run(op.nodes, [s], [end], {"s": message})
    np.testing.assert_allclose(r, message.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("bghid,bghjd->bghij", [(2, 2, 3, 4, 5), (2, 2, 3, 6, 5)]),
        ("bhd,bhd->bh", [(2, 3, 4), (2, 3, 4)]),
        ("bij,kj->bik", [(2, 3, 4), (5, 4)]),
        ("bij->bji", [(2, 3, 4)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    arrays = [w(*shape) for shape in shapes]
    y = np.einsum(equation, *arrays)
    message = w(*y.shape)
    inputs = [gs.Variable(f"x{i}", np.float32, list(shape)) for i, shape in enumerate(shapes)]
    node = gs.Node("Einsum", "node", {"equation": equation}, inputs, [gs.Variable("y", np.float32, list(y.shape))])
    op = Graph(opset=OPSET, nodes=[node])
    s = gs.Variable("s", np.float32, list(y.shape))
    data = list(range(len(shapes)))
    back = OPS["Einsum"].transpose(op, Node(op, node, data=data, nonnegative=set(), name="n"), op.value(s))
    ends = [gs.Variable(f"end{i}", np.float32) for i in data]
    for part, end in zip(back if isinstance(back, Parts) else [back], ends, strict=True):
        op.nodes.append(gs.Node("Identity", f"node_{end.name}", inputs=[part.tensor], outputs=[end]))
    feeds = {f"x{i}": a for i, a in enumerate(arrays)} | {"s": message}
    for array, r in zip(arrays, run(op.nodes, [*inputs, s], ends, feeds), strict=True):  # bilinear: <Z, s> = <A, T_A s>
        assert r.shape == array.shape
        assert abs(float((y * message).sum()) - float((array * r).sum())) < 1e-4 * np.abs(y * message).sum()


@pytest.mark.parametrize("equation", ["...ij,...jk->...ik", "bii->bi", "bij->b"])
def test_einsum_that_has_no_transpose_says_so(equation: str) -> None:
    count = equation.count(",") + 1
    inputs = [gs.Variable(f"x{i}", np.float32, [2, 3, 3]) for i in range(count)]
    node = gs.Node("Einsum", "node", {"equation": equation}, inputs, [gs.Variable("y", np.float32)])
    op = Graph(opset=OPSET)
    view = Node(op, node, data=list(range(count)), nonnegative=set(), name="n")
    with pytest.raises(UnsupportedError, match="equation"):
        OPS["Einsum"].transpose(op, view, op.value(gs.Variable("s", np.float32, [2, 3, 3])))


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize(("op_type", "order"), [("ReduceL1", 1), ("ReduceL2", 2)])
def test_length_of_a_vector(op_type: str, order: int, keepdims: int) -> None:
    """Derivative sign(x) or x / |x|, and 0 for the zero vector."""
    v = w(2, 3, 4)
    v[1, 2] = 0
    y = np.linalg.norm(v.astype(np.float64), order, 2, keepdims=True)
    message = w(2, 3, 1)
    expected = message * (np.sign(v) if order == 1 else np.divide(v, y, out=np.zeros(v.shape), where=y > 0))
    x, s = gs.Variable("x", np.float32, [2, 3, 4]), gs.Variable("s", np.float32, [None] * (2 + keepdims))
    shape = [2, 3, 1] if keepdims else [2, 3]
    attrs, axes = {"keepdims": keepdims}, gs.Constant("axes", np.array([-1]))
    node = gs.Node(op_type, "node", attrs, [x, axes], [gs.Variable("y", np.float32, shape)])
    op = Graph(opset=OPSET, nodes=[node])
    back = OPS[op_type].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (r,) = run(op.nodes, [x, s], [end], {"x": v, "s": message.reshape(shape)})
    np.testing.assert_allclose(r, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "index"),
    [
        ((2, 6, 4), 1, [[0, -1], [3, 3]]),
        ((2, 6, 4), 1, 5),
        ((2, 3, 4), -1, [1, 2, 2]),
        ((24,), 0, [[3, -1], [3, 0], [7, 8]]),  # how as_strided is exported: from one flat tensor of all samples
    ],
)
def test_gather_by_an_index_that_only_the_run_knows(shape: tuple[int, ...], axis: int, index: Any) -> None:
    v, places = w(*shape), np.array(index)
    y = np.take(v, places, axis)
    message = w(*y.shape)
    x, at = gs.Variable("x", np.float32, list(shape)), gs.Variable("at", np.int64, list(places.shape))
    node = gs.Node("Gather", "pick", {"axis": axis}, [x, at], [gs.Variable("y", np.float32, list(y.shape))])
    op = Graph(opset=OPSET, nodes=[node])
    s, end = gs.Variable("s", np.float32, list(y.shape)), gs.Variable("end", np.float32)
    back = OPS["Gather"].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (r,) = run(op.nodes, [x, at, s], [end], {"x": v, "at": places, "s": message})
    assert r.shape == v.shape
    left, right = (float((a.astype(np.float64) * b).sum()) for a, b in ((y, message), (v, r)))
    assert abs(left - right) < 1e-5 * np.abs(y * message).sum()


def test_pad_by_a_size_that_only_the_run_knows() -> None:
    """The other way round: what was added is cut off, what was cut off comes back as zeros."""
    pads = np.array([0, 0, 2, 0, -1, 1])  # of [2, 3, 5]: one row less, two columns before, one after
    message = w(2, 2, 8)
    node = gs.Node(
        "Pad",
        "pad",
        {},
        [gs.Variable("x", np.float32, [2, 3, 5]), gs.Variable("pads", np.int64, [6])],
        [gs.Variable("y", np.float32, [2, None, None])],
    )
    s, end = gs.Variable("s", np.float32, [None] * 3), gs.Variable("end", np.float32)
    op = Graph(opset=OPSET)
    back = OPS["Pad"].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (r,) = run(op.nodes, [node.inputs[1], s], [end], {"pads": pads, "s": message})
    expected = np.zeros((2, 3, 5), np.float32)
    expected[:, :2] = message[:, :, 2:7]
    np.testing.assert_array_equal(r, expected)
