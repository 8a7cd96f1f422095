"""Oracle: onnxruntime on the model as exported, and the activation's textbook formula in numpy."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from onnxcrp.canonize.activations import fuse_activations
from onnxcrp.canonize.constants import fold_constants
from onnxcrp.canonize.load import load
from onnxcrp.canonize.write import write
from onnxcrp.session import Session

X = np.concatenate([np.linspace(-8, 8, 61), [-90, -20, 20, 90]]).astype(np.float32).reshape(1, 5, 13)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf(x):
    return np.vectorize(math.erf)(x)


def model(body: str, *, opset: int = 18, inputs: str = "float[N, 5, L] x", outputs: str = "float[N, 5, L] y"):
    """ONNX text -> ModelProto; numbers in the text such as {0.5} become float constants."""
    parts, constants = body.split("{"), []
    text = parts[0]
    for part in parts[1:]:
        number, rest = part.split("}", 1)
        constants.append(f"c{len(constants)} = Constant <value_float = {float(number)!r}> ()")
        text += f"c{len(constants) - 1}{rest}"
    header = f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]> m ({inputs}) => ({outputs})'
    return onnx.parser.parse_model(f"{header} {{ {' '.join(constants)} {text} }}")


def fused(proto: onnx.ModelProto):
    """The graph after fusing, and the report; outputs are checked to be what onnxruntime makes of the exported model."""
    graph = load(proto).graph
    fold_constants(graph)
    report = fuse_activations(graph)
    feeds = {tensor.name: X.astype(tensor.dtype) for tensor in graph.inputs}
    with np.errstate(all="ignore"):
        before = Session(proto, "cpu", optimize=False).run(feeds)
        after = Session(write(graph), "cpu", optimize=False).run(feeds)
    assert list(before) == list(after)
    for name, expected in before.items():
        half = expected.dtype == np.float16
        keep = np.isfinite(expected) & (np.abs(feeds["x"]) <= (8 if half else np.inf))  # log(1 + exp x) overflows
        got = after[name]
        np.testing.assert_allclose(got[keep], expected[keep], rtol=2e-3 if half else 1e-4, atol=2e-3 if half else 2e-5)
    return graph, report


def only_node(proto: onnx.ModelProto) -> gs.Node:
    graph, report = fused(proto)
    assert [node.op for node in graph.nodes] == [graph.nodes[0].op], report
    return graph.nodes[0]


# ------------------------------------------------------------------------------------------------- as exporters write them

R2, TANH = math.sqrt(2), math.sqrt(2 / math.pi)

WRITTEN = {
    "Silu": [
        "s = Sigmoid(x) y = Mul(x, s)",
        "s = Sigmoid(x) y = Mul(s, x)",
        "n = Neg(x) e = Exp(n) d = Add(e, {1}) y = Div(x, d)",
    ],
    "Silu 1.702": [
        "t = Mul(x, {1.702}) s = Sigmoid(t) y = Mul(x, s)",
        "t = Mul({1.7021}, x) s = Sigmoid(t) y = Mul(s, x)",
    ],
    "Gelu none": [
        f"d = Div(x, {{{R2}}}) e = Erf(d) a = Add(e, {{1}}) m = Mul(x, a) y = Mul(m, {{0.5}})",
        f"d = Div(x, {{{R2}}}) e = Erf(d) a = Add({{1}}, e) h = Mul({{0.5}}, x) y = Mul(h, a)",
        f"d = Mul(x, {{{1 / R2}}}) e = Erf(d) a = Add({{1}}, e) h = Mul({{0.5}}, a) y = Mul(x, h)",
        f"d = Mul({{{1 / R2}}}, x) e = Erf(d) h = Mul(e, {{0.5}}) a = Add(h, {{0.5}}) y = Mul(a, x)",
        "d = Div(x, {1.4142}) e = Erf(d) a = Add(e, {1}) m = Mul(x, a) y = Div(m, {2})",
        "s = Sqrt({2}) d = Div(x, s) e = Erf(d) a = Add(e, {1}) m = Mul(a, x) y = Mul(m, {0.5})",
    ],
    "Gelu tanh": [
        f"""p = Pow(x, {{3}}) c = Mul(p, {{0.044715}}) i = Add(x, c) s = Mul(i, {{{TANH}}}) t = Tanh(s)
            a = Add(t, {{1}}) h = Mul(x, {{0.5}}) y = Mul(h, a)""",
        f"""q = Mul(x, x) p = Mul(q, x) c = Mul({{0.044715}}, p) i = Add(c, x) s = Mul({{{TANH}}}, i) t = Tanh(s)
            a = Add({{1}}, t) h = Mul({{0.5}}, a) y = Mul(x, h)""",
        f"""q = Mul(x, x) c = Mul(q, {{0.044715}}) f = Add(c, {{1}}) g = Mul(f, {{{TANH}}}) s = Mul(x, g) t = Tanh(s)
            a = Add(t, {{1}}) m = Mul(x, a) y = Mul(m, {{0.5}})""",
    ],
    "HardSwish": [
        "s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, s)",
        "a = Add(x, {3}) c = Clip(a, {0}, {6}) d = Div(c, {6}) y = Mul(x, d)",
        "a = Add({3}, x) c = Clip(a, {0}, {6}) m = Mul(x, c) y = Div(m, {6})",
        "a = Add(x, {3}) r = Relu(a) c = Min(r, {6}) d = Mul(c, {0.16666667}) y = Mul(d, x)",
    ],
    "HardSigmoid": [
        "a = Add(x, {3}) c = Clip(a, {0}, {6}) y = Div(c, {6})",
        "a = Add(x, {3}) c = Clip(a, {0}, {6}) y = Mul({0.16666667}, c)",
    ],
    "Mish": [
        "s = Softplus(x) t = Tanh(s) y = Mul(x, t)",
        "e = Exp(x) a = Add(e, {1}) s = Log(a) t = Tanh(s) y = Mul(t, x)",
    ],
    "Softplus": ["e = Exp(x) a = Add(e, {1}) y = Log(a)", "e = Exp(x) a = Add({1}, e) y = Log(a)"],
    "Sigmoid": ["n = Neg(x) e = Exp(n) a = Add({1}, e) y = Div({1}, a)", "n = Neg(x) e = Exp(n) a = Add({1}, e) y = Reciprocal(a)"],
    "Softsign": ["b = Abs(x) a = Add(b, {1}) y = Div(x, a)"],
    "Relu": ["y = Max(x, {0})", "y = Max({0}, x)"],
    "Clip": ["a = Max(x, {0}) y = Min(a, {6})", "a = Min({6}, x) y = Max(a, {0})", "a = Relu(x) y = Min(a, {6})"],
    "LeakyRelu": ["m = Mul(x, {0.1}) y = Max(x, m)"],
}  # fmt: skip

FORMULA = {
    "Silu": lambda x: x * sigmoid(x),
    "Silu 1.702": lambda x: x * sigmoid(1.702 * x),
    "Gelu none": lambda x: x * 0.5 * (1 + erf(x / R2)),
    "Gelu tanh": lambda x: x * 0.5 * (1 + np.tanh(TANH * (x + 0.044715 * x**3))),
    "HardSwish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "HardSigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "Mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "Softplus": lambda x: np.logaddexp(x, 0),
    "Sigmoid": sigmoid,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Relu": lambda x: np.maximum(x, 0),
    "Clip": lambda x: np.clip(x, 0, 6),
    "LeakyRelu": lambda x: np.where(x < 0, 0.1 * x, x),
}


@pytest.mark.parametrize(("name", "body"), [(name, body) for name, bodies in WRITTEN.items() for body in bodies])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_split_functions_become_one_node(name, body, half) -> None:
    if half and "Pow" in body:
        pytest.skip("onnxruntime has no float16 Pow")
    kind = {"inputs": "float16[N, 5, L] x", "outputs": "float16[N, 5, L] y"} if half else {}
    proto = model(body, **kind)
    for node in proto.graph.node if half else []:
        if node.op_type == "Constant":
            array = np.array(node.attribute[0].f, np.float16)
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))
    node = only_node(proto)
    op, *detail = name.split()
    assert node.op == op
    assert node.domain == ("onnxcrp" if op in ("Silu", "Gelu") else None)
    assert node.outputs[0].name == "y"
    assert [t.name for t in node.inputs][:1] == ["x"]
    if op == "Silu":
        assert node.attrs == ({"alpha": 1.702} if detail else {})
    if op == "Gelu":
        assert node.attrs == {"approximate": detail[0]}
    if op == "Clip":
        assert [float(t.values) for t in node.inputs[1:]] == [0, 6]
    if not half:
        graph = gs.Graph([node], [node.inputs[0]], [node.outputs[0]], opset=18)
        got = Session(write(graph), "cpu", optimize=False).run({"x": X})["y"]
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(got, FORMULA[name](X.astype(np.float64)), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("body", "opset", "op", "attrs"),
    [
        ("y = Swish(x)", 24, "Silu", {}),
        ("y = Swish<alpha = 1.702>(x)", 24, "Silu", {"alpha": 1.702}),
        ("y = Gelu(x)", 20, "Gelu", {"approximate": "none"}),
        ('y = Gelu<approximate = "tanh">(x)', 20, "Gelu", {"approximate": "tanh"}),
        ("y = com.microsoft.Gelu(x)", 18, "Gelu", {"approximate": "none"}),
        ("y = com.microsoft.FastGelu(x)", 18, "Gelu", {"approximate": "tanh"}),
        ("y = com.microsoft.QuickGelu(x)", 18, "Silu", {"alpha": 1.702}),
        ("y = com.microsoft.QuickGelu<alpha = 1.0>(x)", 18, "Silu", {}),
    ],
)
def test_operators_under_another_name(body, opset, op, attrs) -> None:
    node = only_node(model(body, opset=opset))
    assert (node.op, node.domain) == (op, "onnxcrp")
    assert node.attrs == pytest.approx(attrs) if "alpha" in attrs else node.attrs == attrs


# -------------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid(x) t = Mul(s, {0.9}) y = Mul(x, t)",  # not a SiLU: another scale
        "a = Add(x, {3}) c = Clip(a, {0}, {6}) y = Mul(x, c)",  # six HardSwish
        "d = Div(x, {1.5}) e = Erf(d) a = Add(e, {1}) m = Mul(x, a) y = Mul(m, {0.5})",  # not sqrt 2
        "y = Clip(x, {0}, {6})",
        "y = Relu(x)",
        "m = Mul(x, {2}) y = Add(m, {1})",
        "m = Mul(x, {3}) y = Div(m, {3})",  # the identity is no activation
        "a = Add(x, x) y = Mul(a, x)",
    ],
)
def test_other_arithmetic_stays(body) -> None:
    proto = model(body)
    graph, report = fused(proto)
    assert [node.op for node in graph.nodes] == [
        node.op_type for node in proto.graph.node if node.op_type != "Constant"
    ]
    assert report.done == []
    assert report.declined == []


def test_channel_scales_are_no_activation() -> None:
    proto = model("b = Mul(x, w) s = Sigmoid(b) y = Mul(b, s)")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 5, 1), np.float32) * 2, "w"))
    graph, _ = fused(proto)
    assert [node.op for node in graph.nodes] == ["Mul", "Silu"]
    proto = model("s = Sigmoid(x) m = Mul(s, one) y = Mul(x, m)", outputs="float[1, N, 5, L] y")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one"))
    graph = load(proto).graph
    assert fuse_activations(graph).done == []  # the constant adds an axis


def test_two_tensors_are_a_gate_not_an_activation() -> None:
    proto = model("s = Sigmoid(g) y = Mul(x, s)", inputs="float[N, 5, L] x, float[N, 5, L] g")
    graph, report = fused(proto)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Mul"]
    assert report.done == []


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("s = Sigmoid(x) y = Mul(x, s) z = Relu(s)", "float[N, 5, L] y, float[N, 5, L] z", "'s' is also read by Relu"),
        ("s = Sigmoid(x) y = Mul(x, s)", "float[N, 5, L] y, float[N, 5, L] s", "'s' is an output"),
    ],
)
def test_declined_where_something_else_reads_a_part(body, outputs, reason) -> None:
    graph, report = fused(model(body, outputs=outputs))
    assert "Silu" not in [node.op for node in graph.nodes]
    assert report.done == []
    assert len(report.declined) == 1
    assert reason in report.declined[0]


def test_a_part_may_still_be_fused_where_the_whole_is_not() -> None:
    """HardSwish whose HardSigmoid is an output too."""
    body = "a = Add(x, {3}) c = Clip(a, {0}, {6}) h = Div(c, {6}) y = Mul(x, h)"
    graph, report = fused(model(body, outputs="float[N, 5, L] y, float[N, 5, L] h"))
    assert [node.op for node in graph.nodes] == ["HardSigmoid", "Mul"]
    assert "HardSwish" in report.declined[0]


def test_chains_and_neighbours() -> None:
    body = "s = Sigmoid(x) a = Mul(x, s) t = Sigmoid(a) b = Mul(t, a) c = Mul(b, {2}) d = Add(c, a) y = Relu(d)"
    graph, _ = fused(model(body))
    assert [node.op for node in graph.nodes] == ["Silu", "Silu", "Mul", "Add", "Relu"]


# ------------------------------------------------------------------------------------------------------------- real exporters


def torch_nets():
    import torch
    from torch import nn

    class Written(nn.Module):
        """An activation written out, as in Hugging Face's models."""

        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    cube = 0.044715
    return {
        "silu": (nn.SiLU(), "Silu", {}),
        "swish by hand": (Written(lambda x: x * torch.sigmoid(x)), "Silu", {}),
        "quick gelu": (Written(lambda x: x * torch.sigmoid(1.702 * x)), "Silu", {"alpha": 1.702}),
        "gelu": (nn.GELU(), "Gelu", {"approximate": "none"}),
        "gelu tanh": (nn.GELU(approximate="tanh"), "Gelu", {"approximate": "tanh"}),
        "gelu by hand": (Written(lambda x: x * 0.5 * (1.0 + torch.erf(x / R2))), "Gelu", {"approximate": "none"}),
        "new gelu": (
            Written(lambda x: 0.5 * x * (1.0 + torch.tanh(TANH * (x + cube * torch.pow(x, 3.0))))),
            "Gelu", {"approximate": "tanh"},
        ),
        "hardswish": (nn.Hardswish(), "HardSwish", {}),
        "hardswish by hand": (Written(lambda x: x * nn.functional.relu6(x + 3) / 6), "HardSwish", {}),
        "hardsigmoid by hand": (Written(lambda x: nn.functional.relu6(x + 3) / 6), "HardSigmoid", None),
        "mish": (nn.Mish(), "Mish", {}),
        "relu6": (nn.ReLU6(), "Clip", {}),
        "softplus by hand": (Written(lambda x: torch.log(1 + torch.exp(x))), "Softplus", {}),
    }  # fmt: skip


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_exported_modules(exporter, tmp_path: Path) -> None:
    import torch
    from torch import nn

    acts = torch_nets()
    net = nn.ModuleDict({str(i): nn.Sequential(nn.Conv1d(5, 5, 1), act) for i, (act, _, _) in enumerate(acts.values())})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = net

        def forward(self, x):
            return tuple(block(x) for block in self.blocks.values())

    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(
            Net().eval(), (torch.zeros(1, 5, 13),), str(path), input_names=["x"], dynamo=exporter == "dynamo"
        )
    proto = onnx.load(path)
    graph, report = fused(proto)
    nodes = [node for node in graph.nodes if node.op not in ("Conv",)]
    assert [node.op for node in nodes] == [op for _, op, _ in acts.values()], report
    for node, (name, (_, _, attrs)) in zip(nodes, acts.items(), strict=True):
        if attrs is not None:
            assert node.attrs == attrs, name
    if exporter == "torchscript":
        assert nodes[0].name == "/blocks/0/blocks/0/0.1/Silu" or nodes[0].name.endswith("/Silu")
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
