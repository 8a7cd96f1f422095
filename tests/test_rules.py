"""Rules. Oracle: the textbook formula on the layer's own dense matrix, in numpy float64 (the matrix read off torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
import torch.nn.functional as F

from onnxcrp import Explainer, backward
from onnxcrp.backward import compile as compile_model
from onnxcrp.composite import load
from onnxcrp.errors import CompositeError
from onnxcrp.lrp import RULES
from onnxcrp.session import Session
from tests.support.canonical import parse, session

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RNG = np.random.default_rng(1)
EPS = 1e-6


def stab(z: np.ndarray, eps: float = EPS) -> np.ndarray:
    return z + eps * np.where(z >= 0, 1.0, -1.0)


# ---- the formulas, entry by entry: M [out, in], b [out], a [in], R [out] -> [in] -------------------------------------
def zero(M: Any, b: Any, a: Any, R: Any) -> Any:
    z = M @ a + b
    return a * (M.T @ np.where(np.abs(z) > 1e-9, R / np.where(np.abs(z) > 1e-9, z, 1), 0))


def epsilon(M: Any, b: Any, a: Any, R: Any, epsilon: float = EPS) -> Any:
    return (a * M / stab(M @ a + b, epsilon)[:, None]).T @ R


def zplus(M: Any, b: Any, a: Any, R: Any) -> Any:
    share = np.maximum(M * a, 0)
    return (share / stab(share.sum(1) + np.maximum(b, 0))[:, None]).T @ R


def alpha_beta(M: Any, b: Any, a: Any, R: Any, alpha: float = 2.0, beta: float = 1.0) -> Any:
    share = np.minimum(M * a, 0)
    return alpha * zplus(M, b, a, R) - beta * (share / stab(share.sum(1) + np.minimum(b, 0))[:, None]).T @ R


def gamma(M: Any, b: Any, a: Any, R: Any, gamma: float = 0.25) -> Any:
    z = M @ a + b
    contribution, out = M * a, np.zeros(len(a))
    for j in range(len(z)):
        if z[j] == 0:
            continue
        push = np.maximum if z[j] > 0 else np.minimum  # what drives z_j where it is gets the extra gamma
        share = contribution[j] + gamma * push(contribution[j], 0)
        total = share.sum() + b[j] + gamma * push(b[j], 0)
        out += share / stab(np.array(total)) * R[j]
    return out


def zbox(M: Any, b: Any, a: Any, R: Any, low: float = -2.0, high: float = 2.5) -> Any:
    plus, minus = np.maximum(M, 0), np.minimum(M, 0)
    share = M * a - plus * low - minus * high
    return (share / stab(share.sum(1) + b - np.maximum(b, 0) - np.minimum(b, 0))[:, None]).T @ R


def wsquare(M: Any, b: Any, a: Any, R: Any) -> Any:
    return (M**2 / stab((M**2).sum(1) + b**2)[:, None]).T @ R


def gradient(M: Any, b: Any, a: Any, R: Any) -> Any:
    return M.T @ R


FORMULAS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (zero, epsilon, zplus, alpha_beta, gamma, zbox, wsquare, gradient)
}


def flat(connected: np.ndarray, R: np.ndarray) -> np.ndarray:
    return (connected / stab(connected.sum(1))[:, None]).T @ R


# ---- layers ----------------------------------------------------------------------------------------------------------
CONV = {"pads": [1, 1, 0, 1], "strides": [2, 1]}


def conv2d(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 0)), W, stride=(2, 1))


LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any], Callable[..., torch.Tensor]]] = {
    "conv": ("Conv", (2, 5, 4), (3, 2, 3, 3), CONV, conv2d),
    "conv_stride1": ("Conv", (2, 5, 4), (3, 2, 3, 3), {"pads": [1] * 4}, lambda x, W: F.conv2d(x, W, padding=1)),
    "conv_grouped": ("Conv", (4, 5, 4), (6, 2, 3, 3), {"group": 2, "pads": [1] * 4}, lambda x, W: F.conv2d(x, W, padding=1, groups=2)),
    "conv_depthwise": ("Conv", (3, 5, 4), (3, 1, 3, 3), {"group": 3}, lambda x, W: F.conv2d(x, W, groups=3)),
    "conv_1d": ("Conv", (2, 9), (3, 2, 3), {"strides": [2], "dilations": [2]}, lambda x, W: F.conv1d(x, W, stride=2, dilation=2)),
    "conv_transpose": ("ConvTranspose", (2, 3, 4), (2, 3, 3, 3), {"strides": [2, 2], "pads": [1] * 4}, lambda x, W: F.conv_transpose2d(x, W, stride=2, padding=1)),
    "gemm": ("Gemm", (6,), (4, 6), {"transB": 1}, lambda x, W: x @ W.T),
    "matmul": ("MatMul", (5, 6), (6, 4), {}, lambda x, W: x @ W),
}  # fmt: skip


def matrix(size: tuple[int, ...], W: np.ndarray, f: Callable[..., torch.Tensor]) -> tuple[np.ndarray, tuple[int, ...]]:
    eye = torch.eye(int(np.prod(size)), dtype=torch.float64).reshape(-1, *size)
    out = f(eye, torch.from_numpy(W).double())
    return out.reshape(len(eye), -1).numpy().T, tuple(out.shape[1:])


def model(
    op: str,
    size: tuple[int, ...],
    W: np.ndarray,
    b: np.ndarray | None,
    attrs: dict[str, Any],
    *,
    relu_before: bool = False,
) -> onnx.ModelProto:
    nodes, source = [], "x"
    if relu_before:
        nodes.append(oh.make_node("Relu", ["x"], ["a"], name="relu"))
        source = "a"
    initializers = [onnx.numpy_helper.from_array(W, "layer.weight")]
    if op == "MatMul" and b is not None:
        nodes.append(oh.make_node("MatMul", [source, "layer.weight"], ["m"], name="layer"))
        nodes.append(oh.make_node("Add", ["m", "layer.bias"], ["y"], name="bias"))
    else:
        nodes.append(
            oh.make_node(
                op, [source, "layer.weight", *(["layer.bias"] if b is not None else [])], ["y"], name="layer", **attrs
            )
        )
    if b is not None:
        initializers.append(onnx.numpy_helper.from_array(b, "layer.bias"))
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", 1, ["batch", *size])],
        [oh.make_tensor_value_info("y", 1, None)],
        initializers,
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)


def composite(rule: str, tmp_path: Any, family: str, extra: str = "") -> Any:
    path = tmp_path / "one.toml"
    path.write_text(
        f'seed = "one"\n{extra}\n[[layer]]\nop = ["{family}"]\nrule = "{rule}"\n'
        + PARAMETERS.get(rule, "")
        + '[[layer]]\nop = ["activation", "scale"]\nrule = "pass"\n'
    )
    return load(path)


PARAMETERS = {"zbox": "low = -2.0\nhigh = 2.5\n"}


def answer(proto: onnx.ModelProto, composed: Any, x: np.ndarray, R: np.ndarray, **options: Any) -> np.ndarray:
    relevance = compile_model(proto, composed, **options)
    onnx.checker.check_model(relevance, full_check=True)
    return Session(relevance).run({"x": x, "target": R})["relevance.x"]


def close(ours: np.ndarray, theirs: np.ndarray, bound: float = 1e-4) -> None:
    assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs) + 1e-12, (ours, theirs)


# zbox reads the input itself, so it never stands behind a ReLU
RULES_AND_SIGNS = [(rule, sign) for rule in [*FORMULAS, "flat"] for sign in ("signed", "positive")]
RULES_AND_SIGNS.remove(("zbox", "positive"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("rule", "sign"), RULES_AND_SIGNS)
def test_rule_equals_its_dense_formula(rule: str, layer: str, bias: bool, sign: str, tmp_path: Any) -> None:
    op, size, shape, attrs, f = LAYERS[layer]
    W = RNG.standard_normal(shape).astype(np.float32)
    M, out = matrix(size, W, f)
    channels = out[-1] if op == "MatMul" else out[0]
    B = RNG.standard_normal(channels).astype(np.float32) if bias else None
    spread = (
        np.zeros(out)
        if B is None
        else np.broadcast_to(B if op == "MatMul" else B.reshape(-1, *[1] * (len(out) - 1)), out)
    )
    b = np.ascontiguousarray(spread, np.float64).reshape(-1)
    x = RNG.standard_normal((2, *size)).astype(np.float32)
    if op in ("Conv", "ConvTranspose"):
        attrs = {"kernel_shape": list(shape[2:]), **attrs}
    R = RNG.standard_normal((2, *out)).astype(np.float32)
    if rule in ("zero", "epsilon", "gradient", "zbox"):  # nothing between a number and its stabilizer
        z = x.reshape(2, -1).astype(np.float64) @ M.T + b
        R = (R.reshape(2, -1) * np.minimum(z**2, 1)).reshape(R.shape).astype(np.float32)
    positive = sign == "positive"
    proto = model(op, size, W, B, attrs, relu_before=positive)
    family = "dense" if op in ("Gemm", "MatMul") else "convolution"
    ours = answer(proto, composite(rule, tmp_path, family), x, R)
    a = np.maximum(x, 0) if positive else x
    for n in range(2):
        if rule == "flat":
            connected, _ = matrix(size, np.ones_like(W), f)
            theirs = flat((connected > 0).astype(np.float64), R[n].reshape(-1))
        else:
            theirs = FORMULAS[rule](M, b, a[n].reshape(-1).astype(np.float64), R[n].reshape(-1).astype(np.float64))
        close(ours[n].reshape(-1), theirs)


@pytest.mark.parametrize("after", ["Relu", "Clip"])
@pytest.mark.parametrize("layer", ["conv", "conv_stride1", "conv_depthwise", "conv_1d", "conv_transpose", "gemm"])
@pytest.mark.parametrize("sign", ["signed", "positive"])
@pytest.mark.parametrize("rule", ["epsilon", "zplus", "alpha_beta", "gamma"])
def test_rules_before_a_relu_which_ask_no_signs(rule: str, sign: str, layer: str, after: str, tmp_path: Any) -> None:
    """R = 0 wherever z <= 0; and z is small beside its positive and its negative part, which must not matter."""
    op, size, shape, attrs, f = LAYERS[layer]
    W, b = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(1).astype(np.float32)
    M, out = matrix(size, W, f)
    B = np.full(out[0], b)
    x = RNG.standard_normal((2, *size)).astype(np.float32) * 3 + (10 if sign == "positive" else 0)
    if op in ("Conv", "ConvTranspose"):
        attrs = {"kernel_shape": list(shape[2:]), **attrs}
    proto = model(op, size, W, B, attrs, relu_before=sign == "positive")
    ends = [onnx.numpy_helper.from_array(np.array(end, np.float32), name) for name, end in (("low", 0), ("high", 6))]
    proto.graph.initializer.extend(ends if after == "Clip" else [])
    proto.graph.node.append(
        oh.make_node(after, ["y", *(["low", "high"] if after == "Clip" else [])], ["r"], name="after")
    )
    proto.graph.output[0].name = "r"
    composed = composite(rule, tmp_path, "dense" if op == "Gemm" else "convolution")
    target = RNG.random((2, *out)).astype(np.float32)
    ours = answer(proto, dataclasses.replace(composed, seed="output"), x, target)
    for n in range(2):
        a = x[n].reshape(-1).astype(np.float64)
        a = np.maximum(a, 0) if sign == "positive" else a
        R = target[n].reshape(-1) * np.clip(M @ a + b, 0, 6 if after == "Clip" else None)
        close(ours[n].reshape(-1), FORMULAS[rule](M, np.full(len(M), b, np.float64), a, R))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


ABOVE_A_RELU = {  # h [N, 4, 6, 4] -> y
    "Identity": ("y = Identity(h)", {}),
    "Dropout": ("y = Dropout(h)", {}),
    "Reshape": ("y = Reshape(h, s)", {"s": ints(0, 2, -1)}),
    "Flatten": ("y = Flatten<axis=1>(h)", {}),
    "Unsqueeze": ("y = Unsqueeze(h, s)", {"s": ints(2)}),
    "Squeeze": ("p = Unsqueeze(h, s) q = Neg(p) r = Squeeze(q, s) y = Neg(r)", {"s": ints(2)}),
    "Transpose": ("y = Transpose<perm=[0,3,1,2]>(h)", {}),
    "Expand": ("p = Unsqueeze(h, s) y = Expand(p, t)", {"s": ints(2), "t": ints(1, 1, 3, 1, 1)}),
    "Concat": ("n = Neg(h) y = Concat<axis=1>(h, n, h)", {}),
    "Split": ("p, q, r = Split<axis=2, num_outputs=3>(h) y = Sub(r, p)", {}),
    "Slice": ("y = Slice(h, s, e, a, t)", {"s": ints(5), "e": ints(0), "a": ints(2), "t": ints(-2)}),
    "Gather": ("y = Gather<axis=1>(h, i)", {"i": ints(2, 0, 2)}),
    "DepthToSpace": ("y = DepthToSpace<blocksize=2>(h)", {}),
    "SpaceToDepth": ("y = SpaceToDepth<blocksize=2>(h)", {}),
    "MaxPool": ("y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(h)", {}),
    "GlobalMaxPool": ("y = GlobalMaxPool(h)", {}),
    "ReduceMax": ("y = ReduceMax(h, a)", {"a": ints(1, 3)}),
    "ReduceMin": ("y = ReduceMin(h, a)", {"a": ints(3)}),
    "Max": ("y = Max(h, c)", {"c": np.float32(0.4)}),
    "Min": ("n = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(h) y = Min(h, n)", {}),
    # of these it is not claimed, since it need not be so
    "ReduceLogSumExp": ("y = ReduceLogSumExp(h, a)", {"a": ints(1)}),
    "Resize": ('y = Resize<mode="linear">(h, , s)', {"s": np.array([1, 1, 1.5, 0.5], np.float32)}),
    "Pad": ('y = Pad<mode="reflect">(h, s)', {"s": ints(0, 0, 2, 1, 0, 0, 1, 2)}),
    "Tile": ("y = Tile(h, s)", {"s": ints(1, 2, 1, 2)}),
    "Div": ("k = Add(h, c) y = Div(c, k)", {"c": np.float32(0.7)}),
    "Softmax": ("y = Softmax<axis=1>(h)", {}),
    "LRN": ("y = LRN<size=3>(h)", {}),
    "a reader beside it": ("m = Mul(z, c) y = Add(h, m)", {"c": np.float32(0.5)}),
}


@pytest.mark.parametrize("rule", ["epsilon", "alpha_beta", "gamma"])
@pytest.mark.parametrize("above", ABOVE_A_RELU)
def test_where_a_relu_is_zero_but_its_relevance_may_not_be(above: str, rule: str, tmp_path: Any) -> None:
    """Formulas on the relevance that arrives at z, recorded: right whatever the operator above sends to zeros."""
    body, constants = ABOVE_A_RELU[above]
    W, b = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)
    text = f"g (float[N,3,6,4] x) => (float y) {{ z = Conv(x, W, b) h = Relu(z) {body} }}"
    proto = parse(text, W=W, b=b, **{name: np.asarray(array) for name, array in constants.items()})
    proto.graph.node[0].name = "conv"
    proto.graph.output[0].type.CopyFrom(onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=1)))
    (tmp_path / "one.toml").write_text(f'extends = "base"\n[[layer]]\nop = "convolution"\nrule = "{rule}"\n')
    x = RNG.standard_normal((2, 3, 6, 4)).astype(np.float32)
    answer = Explainer(proto, tmp_path / "one.toml", cache=False).explain(
        x, np.ones(session(proto).run(None, {"x": x})[0].shape, np.float32), seed="abs", record=["conv"]
    )
    R, ours = answer.relevance["conv"], answer.relevance["x"]
    assert np.abs(R).sum() > 0
    theirs = np.zeros(x.shape)
    for n, h, w in np.ndindex(2, 6, 4):
        theirs[n, :, h, w] = FORMULAS[rule](W[..., 0, 0].astype(float), b.astype(float), x[n, :, h, w], R[n, :, h, w])
    close(ours, theirs)


def test_all_that_is_said_to_move_entries_is_tested() -> None:
    assert ABOVE_A_RELU.keys() >= backward._MOVES


@pytest.mark.parametrize(
    ("parameters", "given"),
    [({"epsilon": 0.1}, "epsilon"), ({"gamma": 0.5}, "gamma"), ({"alpha": 3.0, "beta": 2.0}, "alpha_beta")],
)
def test_parameters_reach_the_formula(parameters: dict[str, float], given: str, tmp_path: Any) -> None:
    op, size, shape, attrs, f = LAYERS["gemm"]
    W, B = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(shape[0]).astype(np.float32)
    M, out = matrix(size, W, f)
    x, R = RNG.standard_normal((1, *size)).astype(np.float32), RNG.standard_normal((1, *out)).astype(np.float32)
    composed = load(composite(given, tmp_path, "dense"), **parameters)
    close(
        answer(model(op, size, W, B, attrs), composed, x, R)[0],
        FORMULAS[given](M, B.astype(float), x[0].astype(float), R[0].astype(float), **parameters),
    )


def test_bias_and_stabilizer_settings(tmp_path: Any) -> None:
    op, size, shape, attrs, f = LAYERS["conv"]
    W, B = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal(shape[0]).astype(np.float32)
    M, out = matrix(size, W, f)
    x, R = RNG.standard_normal((1, *size)).astype(np.float32), np.abs(RNG.standard_normal((1, *out))).astype(np.float32)
    attrs = {"kernel_shape": [3, 3], **attrs}
    for rule in ("epsilon", "zplus", "gamma", "wsquare"):
        ours = answer(model(op, size, W, B, attrs), composite(rule, tmp_path, "convolution", 'bias = "drop"'), x, R)
        if rule == "epsilon":
            continue
        theirs = FORMULAS[rule](M, np.zeros(len(M)), x[0].reshape(-1).astype(float), R[0].reshape(-1).astype(float))
        close(ours[0].reshape(-1), theirs, 1e-3)
    a = x[0].reshape(-1).astype(float)
    share = np.maximum(M * a, 0)
    b = np.repeat(np.maximum(B, 0), len(M) // len(B))
    ours = answer(model(op, size, W, B, attrs), composite("zplus", tmp_path, "convolution", "stabilizer = 0.1"), x, R)
    close(ours[0].reshape(-1), (share / (share.sum(1) + b + 0.1)[:, None]).T @ R[0].reshape(-1).astype(float))


def test_alpha_minus_beta_must_be_one(tmp_path: Any) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[[layer]]\nop = "dense"\nrule = "alpha_beta"\nalpha = 2.0\nbeta = 2.0\n')
    op, size, shape, attrs, _ = LAYERS["gemm"]
    with pytest.raises(CompositeError, match="alpha"):
        compile_model(model(op, size, np.ones(shape, np.float32), None, attrs), path)


# ---- sums, means, windows --------------------------------------------------------------------------------------------


def small(
    nodes: list[onnx.NodeProto], shapes: dict[str, tuple[int, ...]], initializers: list[onnx.TensorProto] | None = None
) -> onnx.ModelProto:
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(n, 1, ["batch", *s]) for n, s in shapes.items()],
        [oh.make_tensor_value_info("y", 1, None)],
        initializers or [],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)


def ask(
    proto: onnx.ModelProto, composed: Any, feeds: dict[str, np.ndarray], R: np.ndarray, **options: Any
) -> dict[str, np.ndarray]:
    relevance = compile_model(proto, composed, **options)
    onnx.checker.check_model(relevance, full_check=True)
    return Session(relevance).run({**feeds, "target": R})


def ones(rule: str, op: str, tmp_path: Any) -> Any:
    path = tmp_path / "sum.toml"
    path.write_text(f'seed = "one"\n[[layer]]\nop = "{op}"\nrule = "{rule}"\n')
    return load(path)


def test_norm_shares_out_a_sum(tmp_path: Any) -> None:
    u, v, R = (RNG.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(3))
    add = oh.make_node("Add", ["u", "v"], ["y"], name="add")
    got = ask(small([add], {"u": (3, 4), "v": (3, 4)}), ones("norm", "Add", tmp_path), {"u": u, "v": v}, R)
    close(got["relevance.u"], u / stab(u + v) * R)
    close(got["relevance.v"], v / stab(u + v) * R)
    sub = oh.make_node("Sub", ["u", "v"], ["y"], name="sub")
    got = ask(small([sub], {"u": (3, 4), "v": (3, 4)}), ones("norm", "Sub", tmp_path), {"u": u, "v": v}, R)
    close(got["relevance.u"], u / stab(u - v) * R)
    close(got["relevance.v"], -v / stab(u - v) * R)
    for rule, shares in (("equal", (0.5, 0.5)), ("first", (1.0, 0.0)), ("flat", (0.5, 0.5))):
        got = ask(small([add], {"u": (3, 4), "v": (3, 4)}), ones(rule, "Add", tmp_path), {"u": u, "v": v}, R)
        close(got["relevance.u"], shares[0] * R)
        close(got["relevance.v"], shares[1] * R)


def test_norm_before_a_relu(tmp_path: Any) -> None:
    u, v, target = (RNG.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(3))
    nodes = [oh.make_node("Add", ["u", "v"], ["z"], name="add"), oh.make_node("Relu", ["z"], ["y"], name="relu")]
    path = tmp_path / "sum.toml"
    path.write_text('seed = "output"\n[[layer]]\nop = "Add"\nrule = "norm"\n[[layer]]\nop = "Relu"\nrule = "pass"\n')
    got = ask(small(nodes, {"u": (3, 4), "v": (3, 4)}), load(path), {"u": u, "v": v}, target)
    R = target * np.maximum(u + v, 0)
    close(got["relevance.u"], u / stab(u + v) * R)
    close(got["relevance.v"], v / stab(u + v) * R)


def test_norm_sums_broadcast_axes_back(tmp_path: Any) -> None:
    u, v, R = (RNG.standard_normal(s).astype(np.float32) for s in ((2, 3, 4), (2, 3, 1), (2, 3, 4)))
    add = oh.make_node("Add", ["u", "v"], ["y"], name="add")
    got = ask(small([add], {"u": (3, 4), "v": (3, 1)}), ones("norm", "Add", tmp_path), {"u": u, "v": v}, R)
    close(got["relevance.v"], (v / stab(u + v) * R).sum(2, keepdims=True))


def test_a_constant_summand_counts_as_bias(tmp_path: Any) -> None:
    u, c, R = (RNG.standard_normal(s).astype(np.float32) for s in ((2, 3, 4), (1, 3, 4), (2, 3, 4)))
    nodes = [oh.make_node("Add", ["u", "c"], ["y"], name="add")]
    proto = small(nodes, {"u": (3, 4)}, [onnx.numpy_helper.from_array(c, "c")])
    got = ask(proto, ones("norm", "Add", tmp_path), {"u": u}, R)
    close(got["relevance.u"], u / stab(u + c) * R)


def test_one_input_in_both_places_gets_both_shares(tmp_path: Any) -> None:
    u, R = (RNG.standard_normal((2, 3)).astype(np.float32) for _ in range(2))
    got = ask(
        small([oh.make_node("Add", ["u", "u"], ["y"], name="add")], {"u": (3,)}),
        ones("norm", "Add", tmp_path),
        {"u": u},
        R,
    )
    close(got["relevance.u"], R)


def pool_matrix(f: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, ...]) -> np.ndarray:
    n = int(np.prod(size))
    return f(torch.eye(n, dtype=torch.float64).reshape(n, *size)).reshape(n, -1).numpy().T


def test_average_pool_and_mean(tmp_path: Any) -> None:
    x = RNG.standard_normal((2, 3, 7, 6)).astype(np.float32)
    for include in (0, 1):
        node = oh.make_node(
            "AveragePool",
            ["x"],
            ["y"],
            name="pool",
            kernel_shape=[3, 2],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
            count_include_pad=include,
        )
        M = pool_matrix(
            lambda e, include=include: F.avg_pool2d(e, (3, 2), 2, 1, count_include_pad=bool(include)), (3, 7, 6)
        )
        R = np.abs(RNG.standard_normal((2, 3, 4, 4))).astype(np.float32)
        for rule, formula in (("norm", epsilon), ("epsilon", epsilon)):
            got = ask(small([node], {"x": (3, 7, 6)}), ones(rule, "average", tmp_path), {"x": x}, R)["relevance.x"]
            for n in range(2):
                close(
                    got[n].reshape(-1),
                    formula(M, 0, x[n].reshape(-1).astype(float), R[n].reshape(-1).astype(float)),
                    2e-4,
                )
        got = ask(small([node], {"x": (3, 7, 6)}), ones("flat", "average", tmp_path), {"x": x}, R)["relevance.x"]
        for n in range(2):
            close(got[n].reshape(-1), flat((M > 0).astype(float), R[n].reshape(-1)))
    node = oh.make_node("GlobalAveragePool", ["x"], ["y"], name="pool")
    R = RNG.standard_normal((2, 3, 1, 1)).astype(np.float32)
    got = ask(small([node], {"x": (3, 7, 6)}), ones("norm", "average", tmp_path), {"x": x}, R)["relevance.x"]
    close(got, x / 42 / stab(x.mean((2, 3), keepdims=True)) * R)


def test_flat_max_pool_and_winner(tmp_path: Any) -> None:
    x = RNG.standard_normal((1, 2, 7, 7)).astype(np.float32)
    node = oh.make_node("MaxPool", ["x"], ["y"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    R = np.abs(RNG.standard_normal((1, 2, 4, 4))).astype(np.float32)
    flat_R, winner_R = np.zeros((2, 7, 7)), np.zeros((2, 7, 7))
    for c, i, j in np.ndindex(2, 4, 4):
        window = (c, slice(max(2 * i - 1, 0), 2 * i + 2), slice(max(2 * j - 1, 0), 2 * j + 2))
        flat_R[window] += R[0, c, i, j] / x[0][window].size
        best = np.unravel_index(np.argmax(x[0][window]), x[0][window].shape)
        winner_R[window][best] += R[0, c, i, j]
    close(ask(small([node], {"x": (2, 7, 7)}), ones("flat", "max", tmp_path), {"x": x}, R)["relevance.x"][0], flat_R)
    close(
        ask(small([node], {"x": (2, 7, 7)}), ones("winner", "max", tmp_path), {"x": x}, R)["relevance.x"][0], winner_R
    )


def test_lrn_against_its_taylor_expansion(tmp_path: Any) -> None:
    """First order at 0 of own and neighbour terms: R_in computed channel by channel."""
    size, alpha, beta, k = 3, 0.3, 0.6, 1.2
    x, R = (RNG.standard_normal((1, 5, 2, 2)).astype(np.float32) for _ in range(2))
    b = alpha / size
    expected = np.zeros((5, 2, 2))
    for i, j in np.ndindex(2, 2):
        v = x[0, :, i, j].astype(float)
        window = [range(max(n - 1, 0), min(n + 2, 5)) for n in range(5)]
        S = np.array([sum(v[m] ** 2 for m in window[n]) for n in range(5)])
        for n in range(5):
            terms = {n: v[n] * (k + b * v[n] ** 2) ** -beta}
            for m in window[n]:
                if m != n:
                    terms[m] = -2 * b * beta * v[n] * v[m] ** 2 * (k + b * S[n]) ** (-beta - 1)
            total = sum(terms.values())
            for m, term in terms.items():
                expected[m, i, j] += term / stab(np.array(total)) * R[0, n, i, j]
    node = oh.make_node("LRN", ["x"], ["y"], name="lrn", size=size, alpha=alpha, beta=beta, bias=k)
    close(ask(small([node], {"x": (5, 2, 2)}), ones("lrn", "lrn", tmp_path), {"x": x}, R)["relevance.x"][0], expected)


def test_batchnorm_that_stays_passes_or_shares_with_its_shift(tmp_path: Any) -> None:
    x, R = (RNG.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))
    scale, shift, mean, variance = (np.abs(RNG.standard_normal(3)).astype(np.float32) + 0.5 for _ in range(4))
    constants = [
        onnx.numpy_helper.from_array(c, n) for c, n in zip((scale, shift, mean, variance), "sbmv", strict=True)
    ]
    # behind a nonlinearity, so that it is no preprocessing of the input
    nodes = [
        oh.make_node("Tanh", ["x"], ["a"], name="tanh"),
        oh.make_node("BatchNormalization", ["a", *"sbmv"], ["y"], name="bn"),
    ]
    path = tmp_path / "bn.toml"
    for rule in ("pass", "epsilon"):
        path.write_text(
            f'seed = "one"\n[[layer]]\nop = "normalization"\nrule = "{rule}"\n[[layer]]\nop = "activation"\nrule = "pass"\n'
        )
        got = ask(small(nodes, {"x": (3, 4)}, constants), path, {"x": x}, R)["relevance.x"]
        a = np.tanh(x.astype(float))
        w = (scale / np.sqrt(variance + 1e-5)).reshape(3, 1)
        z = w * (a - mean.reshape(3, 1)) + shift.reshape(3, 1)
        close(got, R if rule == "pass" else a * w / stab(z) * R)


def test_preprocessing_inside_the_graph(tmp_path: Any) -> None:
    """uint8 pixels, Cast, -mean, /std, NHWC -> NCHW: relevance passes, and zbox' bounds follow the same way."""
    W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    mean, std = np.array([100, 110, 120], np.float32), np.array([50, 60, -70], np.float32)
    constants = [onnx.numpy_helper.from_array(v, n) for v, n in ((W, "W"), (mean, "mean"), (std, "std"))]
    nodes = [
        oh.make_node("Cast", ["x"], ["f"], name="cast", to=1),
        oh.make_node("Sub", ["f", "mean"], ["g"], name="mean"),
        oh.make_node("Div", ["g", "std"], ["h"], name="std"),
        oh.make_node("Transpose", ["h"], ["a"], name="layout", perm=[0, 3, 1, 2]),
        oh.make_node("Conv", ["a", "W"], ["y"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", 2, ["batch", 5, 5, 3])],
        [oh.make_tensor_value_info("y", 1, None)],
        constants,
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "box.toml"
    path.write_text(
        'seed = "one"\n[[layer]]\nop = "Conv"\nrule = "zbox"\nlow = 0\nhigh = 255\n'
        '[[layer]]\nop = "scale"\nrule = "pass"\n[[layer]]\nop = "sum"\nrule = "norm"\n'
    )
    x = RNG.integers(0, 256, (1, 5, 5, 3)).astype(np.uint8)
    R = np.abs(RNG.standard_normal((1, 4, 5, 5))).astype(np.float32)
    got = ask(proto, path, {"x": x}, R)["relevance.x"]
    assert got.shape == (1, 5, 5, 3)
    assert got.dtype == np.float32
    M, _ = matrix((3, 5, 5), W, lambda e, w: F.conv2d(e, w, padding=1))
    a = ((x - mean) / std).transpose(0, 3, 1, 2)[0].reshape(-1).astype(float)
    ends = np.stack([(0 - mean) / std, (255 - mean) / std])
    low, high = (np.repeat(end, 25) for end in (ends.min(0), ends.max(0)))
    theirs = zbox(M, np.zeros(len(M)), a, R.reshape(-1).astype(float), low, high).reshape(3, 5, 5)
    close(got[0].transpose(2, 0, 1), theirs)


def test_comparison_methods(tmp_path: Any) -> None:
    x, R = (RNG.standard_normal((2, 8)).astype(np.float32) for _ in range(2))
    expected = {
        "gradient": R * (x > 0),
        "guided_backprop": np.maximum(R, 0) * (x > 0),
        "deconvnet": np.maximum(R, 0),
        "beta_smooth": R / (1 + np.exp(-10.0 * x)),
        "pass": R,
    }
    node = oh.make_node("Relu", ["x"], ["y"], name="relu")
    for rule, theirs in expected.items():
        close(ask(small([node], {"x": (8,)}), ones(rule, "Relu", tmp_path), {"x": x}, R)["relevance.x"], theirs)


def test_signs_are_asked_for_where_they_can_be_either_alone() -> None:
    """Behind the last layer: everywhere else a ReLU follows, or there are no terms of both signs to add up."""
    for rules in ("epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box(low=0, high=1)"):
        written = compile_model(FIXTURES / "shapes" / "net.onnx", rules).graph.node
        asked = [node.name.rpartition("/")[0] for node in written if node.op_type == "GreaterOrEqual"]
        assert asked == ["R/fc/epsilon", *(["R/conv1/zbox"] if "box" in rules else [])]


def test_every_rule_is_tested_here() -> None:
    here = {*FORMULAS, "flat", "norm", "equal", "first", "pass", "winner", "lrn"}
    comparison = {"guided_backprop", "deconvnet", "beta_smooth"}
    elsewhere = {"half", "signal", "matmul", "softmax", "layernorm", "embedding"}  # test_attention.py
    elsewhere |= {"share", "taylor", "bag"}  # test_kernels.py, test_bags.py
    assert {
        name for name, rule in RULES.items() if rule.function.__module__ == "onnxcrp.lrp"
    } == here | comparison | elsewhere
