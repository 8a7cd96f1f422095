"""Oracle: onnxruntime on the model with its If, Loop and Scan."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from onnxcrp.canonize import canonize

from .support.canonical import check, ops, parse, random, said

PASS = "control flow"
CONTROL = {"If", "Loop", "Scan"}
BRANCHES = """then_branch = t () => (float[N, 4] o) { k = Mul(h, w) o = Relu(k) },
              else_branch = e () => (float[N, 4] o2) { k2 = Add(h, w) a = Constant<value_float = 2.0>() o2 = Mul(k2, a) }"""


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_a_constant_condition(condition) -> None:
    text = f"m (float[N, 4] x) => (float[N, 4] y) {{ h = Neg(x) i = If (c) <{BRANCHES}> y = Neg(i) }}"
    canonical = check(parse(text, c=np.array(condition), w=random(4)))
    assert ops(canonical) == (["Neg", "Mul", "Relu", "Neg"] if condition else ["Neg", "Add", "Mul", "Neg"])


@pytest.mark.parametrize("opset", [11, 16])
def test_if_as_torch_exports_squeeze(opset) -> None:
    """Whether an axis is 1 long follows from the shapes."""
    squeeze = "Squeeze<axes = [1]>(x)" if opset < 13 else "Squeeze(x, ax)"
    body = f"""s = Shape(x) g = Gather(s, one) c = Equal(g, one) i = If (c) <
        then_branch = t () => (float[N, 4] o) {{ {"" if opset < 13 else "ax = Constant<value_ints = [1]>()"} o = {squeeze} }},
        else_branch = e () => (float[N, 1, 4] p) {{ p = Identity(x) }}> y = Relu(i)"""
    canonical = check(parse(f"m (float[N, 1, 4] x) => (float[N, 4] y) {{ {body} }}", opset, one=np.array(1)))
    assert ops(canonical) == ["Squeeze", "Relu"]


def test_nested_branches_and_branches_that_hand_on() -> None:
    text = """m (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y, z = If (c) <
        then_branch = t () => (float[N, 4] o, float[N, 4] q) {
            o = If (d) <then_branch = a () => (float[N, 4] r) { r = Identity(x) },
                        else_branch = b () => (float[N, 4] u) { u = Neg(x) }>
            q = Add(o, x) },
        else_branch = e () => (float[N, 4] v, float[N, 4] v2) { v = Relu(x) v2 = Relu(x) }> }"""
    canonical = check(parse(text, c=np.array(True), d=np.array(False)))
    assert ops(canonical) == ["Neg", "Add"]


def test_a_computed_condition_stays() -> None:
    text = f"m (float[N, 4] x, bool c) => (float[N, 4] y) {{ h = Neg(x) y = If (c) <{BRANCHES}> }}"
    proto = parse(text, w=random(4))
    canonical = canonize(proto)
    assert ops(canonical) == ["Neg", "If"]
    assert "its condition is computed" in said(canonical, PASS)


# ------------------------------------------------------------------------------------------------------------------- Loop


def loop(turns: str = "n", go_on: str = "going", body: str = "", **constants) -> onnx.ModelProto:
    body = body or "s1 = Mul(s, w) f = Cast<to = 1>(t) s2 = Add(s1, f) v = Relu(s2) g2 = Identity(g)"
    text = f"""m (float[N, 4] x) => (float[N, 4] y, float[T, N, 4] z) {{ h = Neg(x) y, z = Loop ({turns}, {go_on}) <
        body = b (int64 t, bool g, float[N, 4] s) => (bool g2, float[N, 4] s2, float[N, 4] v) {{ {body} }}> }}"""
    text = text.replace(f"Loop ({turns}, {go_on})", f"Loop ({turns}, {go_on}, h)")
    return parse(text, w=random(4), **constants)


@pytest.mark.parametrize("turns", [1, 3])
def test_loop(turns) -> None:
    canonical = check(loop(n=np.array(turns), going=np.array(True)))
    assert not CONTROL & set(ops(canonical))
    assert ops(canonical).count("Mul") == turns
    weights = {id(t) for node in canonical.graph.nodes for t in node.inputs if t.name == "w"}
    assert len(weights) == 1


def test_loop_until_a_counter_says_stop() -> None:
    body = """s2 = Mul(s, w) v = Relu(s2) one = Constant<value_int = 1>() next = Add(t, one)
              five = Constant<value_int = 5>() g2 = Less(next, five)"""
    canonical = check(loop(n=np.array(2**62), going=np.array(True), body=body))
    assert ops(canonical).count("Mul") == 5


def test_loop_that_reads_slices() -> None:
    """A recurrent net as TensorFlow writes one: each turn gathers its step."""
    text = """m (float[N, 3, 4] x) => (float[N, 4] y, float[3, N, 4] z) { y, z = Loop (n, go, s0) <
        body = b (int64 t, bool g, float[N, 4] s) => (bool g2, float[N, 4] s2, float[N, 4] v) {
            e = Gather<axis = 1>(x, t) a = MatMul(s, w) c = Add(a, e) s2 = Tanh(c) v = Identity(s2) g2 = Identity(g) }> }"""
    proto = parse(text, w=random(4, 4), n=np.array(3), go=np.array(True), s0=np.zeros((2, 4), np.float32))
    canonical = check(proto, size=2)
    assert ops(canonical).count("Tanh") == 3
    assert not CONTROL & set(ops(canonical))


def test_if_inside_a_loop() -> None:
    body = """one = Constant<value_int = 1>() c = Equal(t, one) g2 = Identity(g) v = Relu(s)
              s2 = If (c) <then_branch = a () => (float[N, 4] p) { p = Neg(s) },
                           else_branch = b2 () => (float[N, 4] q) { q = Mul(s, w) }>"""
    canonical = check(loop(n=np.array(3), going=np.array(True), body=body))
    assert ops(canonical).count("Mul") == 2
    assert ops(canonical).count("Neg") == 2
    assert not CONTROL & set(ops(canonical))


@pytest.mark.parametrize(
    ("given", "body", "reason"),
    [
        ({"n": np.array(300)}, "", "257 turns or more"),
        ({"n": np.array(3)}, "v = Relu(s) s2 = Mul(s, w) k = ReduceSum<keepdims = 0>(s2) z0 = Constant<value_float = 0.0>() g2 = Less(k, z0)", "whether it goes on is computed"),
        ({}, "", "its number of turns is computed"),
        ({"n": np.array(0)}, "", "it has no turns"),
    ],
)  # fmt: skip
def test_loops_that_stay(given, body, reason) -> None:
    proto = loop(going=np.array(True), body=body, **given)
    if not given:
        proto.graph.input.append(oh.make_tensor_value_info("n", 7, []))
    canonical = canonize(proto)
    assert ops(canonical) == ["Neg", "Loop"]
    assert reason in said(canonical, PASS)


# ------------------------------------------------------------------------------------------------------------------- Scan


def scan(shape: str = "float[3, N, 4] x", **attributes) -> onnx.ModelProto:
    text = f"""m (float[N, 4] h, {shape}) => (float[N, 4] y, float[A, B, C] z) {{ y, z = Scan<num_scan_inputs = 1,
        body = b (float[N, 4] s, float[N, 4] e) => (float[N, 4] s2, float[N, 4] v) {{
            m0 = Mul(s, w) a = Add(m0, e) s2 = Tanh(a) v = Relu(s2) }}>(h, x) }}"""
    proto = parse(text, w=random(4))
    proto.graph.node[0].attribute.extend(oh.make_attribute(name, value) for name, value in attributes.items())
    return proto


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ("float[3, N, 4] x", {}),
        ("float[1, N, 4] x", {}),
        ("float[N, 3, 4] x", {"scan_input_axes": [1], "scan_output_axes": [1]}),
        ("float[N, 4, 3] x", {"scan_input_axes": [-1], "scan_output_axes": [-1]}),
        ("float[3, N, 4] x", {"scan_input_directions": [1]}),
        ("float[3, N, 4] x", {"scan_input_directions": [1], "scan_output_directions": [1]}),
    ],
)
def test_scan(shape, attributes) -> None:
    canonical = check(scan(shape, **attributes))
    assert not CONTROL & set(ops(canonical))
    assert ops(canonical).count("Tanh") == (1 if "[1" in shape else 3)


def test_scan_of_unknown_length_stays() -> None:
    canonical = canonize(scan("float[T, N, 4] x"))
    assert ops(canonical) == ["Scan"]
    assert "the length of its inputs is not known" in said(canonical, PASS)


# ---------------------------------------------------------------------------------------------------------- real exporters


def test_a_scripted_loop_and_branch(tmp_path) -> None:
    import torch

    class Net(torch.nn.Module):
        """A recurrent net by hand."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            h = x[:, 0]
            for t in range(x.shape[1]):
                h = torch.relu(self.linear(h) + x[:, t])
                if x.shape[2] == 4:
                    h = torch.tanh(h)
            return h

    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        net = torch.jit.script(Net().eval())
        torch.onnx.export(
            net, (torch.rand(2, 3, 4),), str(path), input_names=["x"], dynamo=False, do_constant_folding=False
        )
    assert CONTROL & {node.op_type for node in onnx.load(path).graph.node}
    canonical = check(path)
    assert not CONTROL & set(ops(canonical))
    assert [op for op in ops(canonical) if op in ("Linear", "Relu", "Tanh")] == ["Linear", "Relu", "Tanh"] * 3
