"""Oracle: the same relevance model as the runtime optimises it by itself, bit for bit; reorders counted in the graph.

Sums that a convolution takes over are the one thing that may differ, in the last bits: compared with and without them.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import onnxcrp
from onnxcrp import Explainer, blocked
from onnxcrp.blocked import known, start, stay_blocked
from onnxcrp.canonize.shapes import Described
from onnxcrp.errors import InputError
from onnxcrp.session import Session

ASYMMETRIC = 'coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


class Bottleneck(torch.nn.Module):
    """Residual block with a strided shortcut; `wide` channels may fill the runtime's blocks or not."""

    def __init__(self, into: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(into, wide, 1)
        self.conv2 = torch.nn.Conv2d(wide, wide, 3, stride, 1, groups=wide if wide == 32 else 1)
        self.conv3 = torch.nn.Conv2d(wide, 2 * wide, 1)
        self.shortcut = torch.nn.Conv2d(into, 2 * wide, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(self.conv3(h) + self.shortcut(x))


class Gated(torch.nn.Module):
    """Channels times a gate [N, C, 1, 1], as in squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


def net(*wides: int, gated: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)]
    into = 16
    for wide in wides:
        layers += [Bottleneck(into, wide, 2), *([Gated(2 * wide)] if gated else [])]
        into = 2 * wide
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(into, 5)
    ).eval()


def export(module: torch.nn.Module, path, *, sizes: bool = False) -> str:
    axes = {"x": {0: "batch", **({2: "h", 3: "w"} if sizes else {})}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        torch.onnx.export(
            module, torch.zeros(1, 3, 45, 64), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes
        )
    return str(path)


X = np.random.default_rng(0).standard_normal((2, 3, 45, 64)).astype(np.float32)


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat"])
@pytest.mark.parametrize(
    ("module", "sizes"),
    [(net(32, 64), False), (net(24, 32), False), (net(16, 32, gated=True), False), (net(32, 64), True)],
    ids=["full", "broken", "gated", "dynamic"],
)
def test_every_bit_is_what_the_runtime_alone_finds(module, sizes, composite, tmp_path, monkeypatch):
    path = export(module, tmp_path / "net.onnx", sizes=sizes)
    options = {
        "target": 1,
        "seed": "abs",
        "record": ["3.conv2", "4.conv1" if "4.conv1" in dict(module.named_modules()) else "5.conv1"],
    }
    options["conditions"] = [{"3.conv2": [0]}, {"3.conv2": [3]}, {"3.conv3": [5, 1]}]

    def ask():
        explainer = Explainer(path, composite, low=-3, high=3, cache=False)
        return explainer.explain(X, **options), explainer.at(X[:1]).explain(
            target=1, seed="abs", conditions=options["conditions"]
        )

    summed = ask()
    leave_sums(monkeypatch)
    found = ask()
    monkeypatch.setattr(blocked, "start", Session)
    for one, near, other in zip(found, summed, ask(), strict=True):
        for name, R in other.relevance.items():
            np.testing.assert_array_equal(one.relevance[name], R)
            np.testing.assert_allclose(near.relevance[name], R, rtol=0, atol=1e-6 * np.abs(R).max())
        for name, a in other.activation.items():
            np.testing.assert_array_equal(one.activation[name], a)
            np.testing.assert_array_equal(near.activation[name], a)


def leave_sums(monkeypatch):
    """No convolution takes over a sum."""
    monkeypatch.setattr(blocked._Rewriter, "_added_up", lambda self, node, sizes: False)


def written(model: onnx.ModelProto, folder, *, here: bool) -> Counter:
    """Operators of the optimised graph, with or without our pass."""
    make = start if here else Session
    make(model, "cpu", optimized=folder / "optimised.onnx")
    graph = onnx.load(folder / "optimised.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_reorders_between_convolutions_go(tmp_path):
    model = onnxcrp.compile(export(net(32, 64), tmp_path / "net.onnx"), "epsilon_plus_flat", conditions=["4.conv2"])
    alone, here = (written(model, tmp_path, here=here) for here in (False, True))
    assert alone["ReorderOutput"] > 20
    assert here["ReorderOutput"] + here["ReorderInput"] < (alone["ReorderOutput"] + alone["ReorderInput"]) / 2
    assert here["Resize"] == 0  # zeros between the strides are written on blocked tensors
    assert {op: here[op] for op in ("Conv", "Mul", "Div")} == {op: alone[op] for op in ("Conv", "Mul", "Div")}
    assert here["Add"] == alone["Add"] - 1  # above the last block convolutions take over what its shortcut sends


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ("p = Div(y, z)", 1),
        ("p = Sub(y, half)", 1),
        ("p = Mul(y, plane)", 0),  # its only reader is the output: the reorder would only move
        ("m = Mul(y, plane)  p = Conv(m, W)", 1),
        ("m = Mul(y, other)  p = Conv(m, W)", 1),
        ("p = Mul(y, column)", 0),
        ("g = GlobalAveragePool(y)  h = Conv(g, S)  p = Mul(y, h)", 0),  # [N, C, 1, 1] is blocked, of another shape
        ("m = Mul(y, fed)  p = Conv(m, W)", 0),  # one number by default, and whatever the caller feeds
        ("c = Greater(y, z)  p = Where(c, y, half)", 2),
        ("c = Greater(other, half)  w = Where(c, y, half)  p = Conv(w, W)", 1),
        ("c = Greater(y, z)  f = Concat <axis = 0> (c, c)  p = Cast <to = 1> (f)", 1),  # reordered as numbers
        (f'r = Abs(y)  p = Resize <mode = "nearest", {ASYMMETRIC}> (r, , twice)', 2),
        (f'r = Abs(y)  p = Resize <mode = "nearest", {ASYMMETRIC}> (r, , nearly)', 1),
        ("m = Mul(y, plane)  n = Conv(m, W)  o = Add(n, half)  p = Conv(o, W)", 2),
        ("a = Conv(x, D)  b, c = Split <axis = 1, num_outputs = 2> (a)  m = Mul(b, c)  p = Conv(m, W)", 2),
        ("a = Conv(x, D)  b, c = Split <axis = 1> (a, even)  m = Mul(b, c)  p = Conv(m, W)", 2),
        ("a = Conv(x, D)  b, c = Split <axis = 1> (a, odd)  m = Mul(b, b)  p = Concat <axis = 1> (m, c)", 0),
        ("a = Conv(x, D)  b, c = Split <axis = 2, num_outputs = 2> (a)  m = Mul(b, c)  p = Conv(m, P)", 0),
        ("a = Conv(x, D)  b = Slice(a, i16, i32, i1)  m = Mul(b, y)  p = Conv(m, W)", 2),
        ("a = Conv(x, D)  b = Slice(a, i1, i17, i1)  m = Mul(b, y)  p = Conv(m, W)", 1),  # parts of two blocks
        ("a = Conv(x, D)  b = Slice(a, i1, i32, i1, i2)  m = Mul(b, y)  p = Conv(m, W)", 1),  # every other channel
        ("a = Conv(x, D)  b = Slice(a, i16, i32, i1)  p = Identity(b)", 0),  # nothing reads it blocked
    ],
)
def test_what_is_taken_blocked(body, taken, tmp_path, monkeypatch):
    """Equal bit for bit; nodes counted."""
    counted = []
    leave_sums(monkeypatch)
    monkeypatch.setattr(blocked, "stay_blocked", lambda *args: counted.append(stay_blocked(*args)))
    compare(body, tmp_path)
    assert counted == [taken]


@pytest.mark.parametrize(
    ("body", "sums"),
    [
        ("m = Mul(z, plane)  o = Add(y, m)  p = Conv(o, W)", 1),
        ("m = Mul(z, plane)  p = Add(m, y)", 1),
        ("m = Mul(z, other)  o = Add(m, y)  p = Conv(o, W)", 1),
        ("m = Mul(z, third)  o = Add(m, y)  p = Conv(o, W)", 0),  # as many samples as third, or as x
        ("m = Mul(z, third)  n = Mul(y, third)  l = Conv(n, S)  o = Add(m, l)  p = Conv(o, W)", 1),
        ("m = Mul(z, plane)  o = Add(y, m)  q = Mul(o, y)  p = Conv(q, W)", 0),  # y is read once more
        ("m = Mul(z, plane)  o = Add(y, m)  q = Mul(o, m)  p = Conv(q, W)", 0),  # m cannot be overwritten
        ("m = Mul(z, plane)  l = Mul(m, y)  k = Conv(l, S)  o = Add(k, m)  p = Conv(o, W)", 1),
        ("m = Mul(z, plane)  v = Conv(other, S)  o = Add(y, m)  q = Add(v, o)  p = Conv(q, W)", 2),
        ("r = Relu(y)  m = Mul(z, plane)  o = Add(r, m)  p = Conv(o, W)", 0),  # what it makes is activated first
        ("m = Mul(y, y)  o = Add(m, m)  p = Conv(o, W)", 0),
        ("l = ReduceMax(third, i1)  m = Mul(l, y)  k = Conv(m, S)  o = Add(k, z)  p = Conv(o, W)", 0),
        ("a = Conv(x, D)  b, c = Split <axis = 1, num_outputs = 2> (a)  m = Mul(b, c)  o = Add(m, y)  p = Conv(o, W)", 1),
        ("a = Conv(x, D)  b = Slice(a, i16, i32, i1)  m = Mul(b, plane)  o = Add(m, y)  p = Conv(o, W)", 1),
        ("m = Mul(y, plane)  a = Concat <axis = 1> (m, y)  v = Conv(a, P)  o = Add(v, z)  q = Abs(o)  p = Conv(q, W)", 1),
        (f'a = Resize <mode = "nearest", {ASYMMETRIC}> (y, , twice)  m = Mul(a, big)  n = Abs(a)  k = Conv(n, S)  '
         "o = Add(k, m)  p = Conv(o, W)", 1),
    ],
)  # fmt: skip
def test_sums_that_convolutions_take_over(body, sums, tmp_path):
    """Equal to the last bits, whatever shapes are fed."""
    found = [node for node in compare(body, tmp_path, rtol=1e-5).node if node.op_type == "Conv" and len(node.input) > 3]
    assert len(found) == sums


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (  # what is not known to follow from others does not follow from a tensor without a name
            """(float[n, 16, 4, 8] x) => (float[a, b, c, d] p) {
            v, none = MaxPool <kernel_shape = [1, 1]> (x)  t = ReduceMax(v, zero)  y = Conv(v, W)  m = Mul(t, plane)
            o = Add(y, m)  r = Abs(o)  p = Conv(r, W) }""",
            {"x": (2, 16, 4, 8)},
        ),
        (  # `x` is an input, and what another one calls its number of samples
            """(float[n, 16, 4, 8] x, float[x, 16, 4, 8] right) => (float[n, 16, 4, 8] p, float[a, 16, 4, 8] q) {
            y = Conv(x, W)  m = Mul(y, plane)  z = Conv(x, V)  o = Add(z, m)  k = Mul(right, y)  q = Sigmoid(k)
            p = Mul(o, o) }""",
            {"x": (1, 16, 4, 8), "right": (2, 16, 4, 8)},
        ),
        (
            """(float[n, 16, 4, 8] x, float[x, 16, 4, 8] right) => (float[n, 16, 4, 8] p, float[a, 16, 4, 8] q) {
            y = Conv(x, W)  m = Mul(y, plane)  z = Conv(x, V)  o = Add(z, m)  k = Mul(right, y)  q = Sigmoid(k)
            p = Mul(o, o) }""",
            {"x": (2, 16, 4, 8), "right": (1, 16, 4, 8)},
        ),
    ],
    ids=["no name", "one sample", "two samples"],
)
def test_names_that_mean_something_else(text, shapes):
    model = onnx.parser.parse_model(f"{HEADER} net {text}")
    for node in model.graph.node:
        for at, name in enumerate(node.output):
            node.output[at] = "" if name == "none" else name
    rng = np.random.default_rng(1)
    for name, shape in {"W": (16, 16, 1, 1), "V": (16, 16, 1, 1), "plane": (1, 1, 4, 8)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zero"))
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    found, expected = (make(model, "cpu").run(feeds) for make in (start, Session))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max())


def compare(body, folder, *, rtol=0.0):
    """Two convolutions y and z, and what `body` makes of them: the graph that runs, held against the runtime alone.

    x and other call their samples the same; third may have one where they have two, as what is fed.
    """
    rng = np.random.default_rng(1)
    weights = {"W": (16, 16, 3, 3), "V": (16, 16, 3, 3), "D": (32, 16, 3, 3), "S": (16, 16, 1, 1), "P": (16, 32, 1, 1)}
    constants = {
        **{name: rng.standard_normal(shape) for name, shape in weights.items()},
        "half": np.array(0.5),
        "fed": np.ones((1, 1, 1, 1)),
        "plane": rng.standard_normal((1, 1, 8, 9)),
        "big": rng.standard_normal((1, 1, 16, 27)),
        "column": rng.standard_normal((1, 16, 1, 1)),
        "twice": np.array([1, 1, 2, 3]),
        "nearly": np.array([1, 1, 2.1, 2.05]),  # almost as large as twice, of other entries
    }
    numbers = {"i1": [1], "i2": [2], "i16": [16], "i17": [17], "i32": [32], "odd": [8, 24], "even": [16, 16]}
    text = f"""{HEADER} net (float[n, 16, 10, 11] x, float[n, 16, 8, 9] other, float[a, f, b, c] fed,
                             float[k, 16, 8, 9] third) => (float[n, g, d, e] p) {{
        y = Conv(x, W)  z = Conv(x, V)  {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for name, listed in numbers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(listed), name))
    here, alone = start(model, "cpu", optimized=folder / "optimised.onnx"), Session(model, "cpu")
    for n, k in ((2, 2), (2, 1), (1, 2)):
        shapes = {"x": (n, 16, 10, 11), "other": (n, 16, 8, 9), "fed": (k, 16, 8, 9), "third": (k, 16, 8, 9)}
        feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        found, expected = (session.run(feeds)["p"] for session in (here, alone))
        np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())
    return onnx.load(folder / "optimised.onnx", load_external_data=False).graph


def test_where_onnx_miscounts_nothing_is_taken():
    """A last window that would start behind the input: onnx counts it, runtimes do not, and 1 x 1 is broadcast."""
    text = f"""{HEADER} net (float[n, 16, 4, 4] x) => (float[n, 16, d, e] p) {{
        y = Conv(x, W)  q = MaxPool <kernel_shape = [1, 1], strides = [2, 2], ceil_mode = 1> (y)
        m = Sub(y, q)  p = Conv(m, U) }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for name, shape in {"W": (16, 16, 3, 3), "U": (16, 16, 1, 1)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    x = {"x": rng.standard_normal((2, 16, 4, 4)).astype(np.float32)}
    assert known(model) == {}
    np.testing.assert_array_equal(start(model, "cpu").run(x)["p"], Session(model, "cpu").run(x)["p"])


def test_masks_that_are_optional_are_no_numbers(tmp_path):
    """They are so by default; a mask that is fed has channels."""
    model = onnxcrp.compile(export(net(32, 64), tmp_path / "net.onnx"), "epsilon_plus_flat", conditions=["4.conv2"])
    mask = np.random.default_rng(0).random((3, 64, 1, 1)).astype(np.float32)
    feeds = {"x": X[:1], "target": np.eye(5, dtype=np.float32)[:1], "mask.4.conv2": mask}
    one, other = (make(model, "cpu").run(feeds) for make in (start, Session))
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array)


def test_the_pass_is_taken_and_not_the_way_out(tmp_path, monkeypatch):
    """What fails is run as the runtime has it: it must not fail."""
    made = []

    def session(model, *args, **options):
        made.append((model, options.get("optimize")))
        return Session(model, *args, **options)

    monkeypatch.setattr(blocked, "Session", session)
    for composite in ("epsilon_plus_flat", "epsilon_gamma_box(low=-3, high=3)", "epsilon_alpha2_beta1_flat"):
        start(onnxcrp.compile(export(net(32, 64), tmp_path / "net.onnx"), composite), "cpu")
        assert made[-1][1] is False
        assert made[-1][0].name == "model.onnx"


def test_names_are_free():
    """Tensors that are called as those would be that the pass writes."""
    text = f"""{HEADER} net (float[n, 16, 10, 11] x) => (float[n, 16, d, e] p) {{
        y = Conv(x, W)  "m/blocked" = Conv(x, V)  "q/blocked" = Abs("m/blocked")  "q/expanded" = Neg("q/blocked")
        m = Mul(y, q)  o = Add(m, "q/expanded")  p = Conv(o, W) }}"""
    text = text.replace('"m/blocked"', "m_blocked").replace('"q/blocked"', "q_blocked").replace('"q/expanded"', "q_exp")
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:  # the parser takes no slashes
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = name.replace("_blocked", "/blocked").replace("_exp", "/expanded")
    rng = np.random.default_rng(1)
    for name, shape in {"W": (16, 16, 3, 3), "V": (16, 16, 3, 3), "q": (1, 1, 8, 9)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    x = {"x": rng.standard_normal((2, 16, 10, 11)).astype(np.float32)}
    np.testing.assert_array_equal(start(model, "cpu").run(x)["p"], Session(model, "cpu").run(x)["p"])


def test_subgraphs_and_models_without_convolutions_stay(tmp_path):
    text = f"{HEADER} net (float[n, 16] x) => (float[n, 16] y) {{ y = Relu(x) }}"
    model = onnx.parser.parse_model(text)
    session = start(model, "cpu", optimized=tmp_path / "optimised.onnx")
    np.testing.assert_array_equal(session.run({"x": -np.ones((1, 16), np.float32)})["y"], 0)
    text = f"""{HEADER} net (bool c, float[n, 16] x) => (float[n, 16] y) {{
        y = If(c) <then_branch = g () => (float[n, 16] a) {{ a = Relu(x) }},
                   else_branch = h () => (float[n, 16] b) {{ b = Neg(x) }}> }}"""
    assert stay_blocked(onnx.parser.parse_model(text), {}) == 0


def test_without_room_for_the_graph_the_model_runs_as_it_is(tmp_path, monkeypatch):
    model = onnxcrp.compile(export(net(32), tmp_path / "net.onnx"), "epsilon_plus_flat")
    monkeypatch.setattr(blocked.tempfile, "tempdir", str(tmp_path / "no such folder"))
    session = start(model, "cpu")
    assert "x" in session.inputs
    with pytest.raises(InputError, match="no input 'y'"):
        session.run({"y": X})


def test_shapes_without_weights(tmp_path):
    path = export(net(32), tmp_path / "net.onnx")
    assert Described([None, 16, 23, 32], onnx.TensorProto.FLOAT) in known(onnx.load(path)).values()
