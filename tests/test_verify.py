"""Oracle: nets computed by hand, torch's autograd for what a bias gives back; and things broken on purpose must be found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from onnxcrp.analysis import balance as balances
from onnxcrp.analysis import verify as verifying
from onnxcrp.analysis.verify import Report, check_outputs, verify
from onnxcrp.errors import InputError, QuestionError
from onnxcrp.lrp import RULES

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"

# x = [1, 2]; z1 = [3, -1, 4]; a1 = [3, 0, 4]; z2 = [4.5, ...]
W1 = np.asarray([[1, 0.5], [1, -1.5], [-1, 2]], np.float32)
B1 = np.asarray([1, 1, 1], np.float32)
W2 = np.asarray([[2, 1, -0.5], [1, 1, 1]], np.float32)
B2 = np.asarray([0.5, 3], np.float32)
X = np.asarray([[1, 2]], np.float32)


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    return model


def two_layers() -> onnx.ModelProto:
    return parse(
        """net (float[N, 2] x) => (float[N, 2] y) {
            z1 = Gemm<transB = 1>(x, W1, B1)
            a1 = Relu(z1)
            y = Gemm<transB = 1>(a1, W2, B2)
        }""",
        W1=W1, B1=B1, W2=W2, B2=B2,
    )  # fmt: skip


def flow(report: Report, layer: str) -> verifying.Flow:
    (found,) = [f for f in report.flows if f.layer == layer]
    return found


def check(report: Report, name: str) -> verifying.Check:
    (found,) = [c for c in report.checks if c.name == name]
    return found


def broken(monkeypatch: pytest.MonkeyPatch, rule: str, change) -> None:
    original = RULES[rule]
    monkeypatch.setitem(
        RULES, rule, dataclasses.replace(original, function=lambda *a, **k: change(original.function(*a, **k)))
    )


# -------------------------------------------------------------------------------------------------------------- by hand


def test_losses_of_epsilon_by_hand():
    """y0 = 2*3 - 0.5*4 + 0.5 = 4.5: R1 = [6, 0, -2]; the biases keep 0.5 and 1*6/3 + 1*(-2)/4 = 1.5."""
    report = verify(two_layers(), X, composite="epsilon(epsilon=1e-9)", target=0)
    assert report.ok, report.checks
    top, bottom = flow(report, "y"), flow(report, "z1")
    assert top.received == pytest.approx(4.5)
    assert top.losses["bias"] == pytest.approx(0.5)
    assert bottom.received == pytest.approx(4.0)
    assert bottom.losses["bias"] == pytest.approx(1.5)
    assert bottom.sent == pytest.approx(2.5)
    assert flow(report, "x").received == pytest.approx(2.5)
    assert report.losses["bias"] == pytest.approx(2.0)
    assert abs(report.losses["stabilizer"]) < 1e-6


def test_losses_of_zplus_by_hand():
    """Denominators of the first layer: 1*1 + 0.5*2 + 1 = 3 and 2*2 + 1 = 5; of the second 2*3 + 0.5 = 6.5."""
    report = verify(two_layers(), X, composite="alpha1_beta0", target=0)
    assert report.ok, report.checks
    top, bottom = flow(report, "y"), flow(report, "z1")
    assert top.losses["bias"] == pytest.approx(4.5 * 0.5 / 6.5, rel=1e-5)
    R = 4.5 * 6 / 6.5  # all to the first unit: the third has a negative weight
    assert bottom.losses["bias"] == pytest.approx(R * 1 / 3, rel=1e-5)
    assert flow(report, "x").received == pytest.approx(R * 2 / 3, rel=1e-5)


def test_losses_to_the_stabilizer_by_hand():
    """With epsilon 0.5 the output 4.5 is divided by 5: a tenth of the relevance is lost there."""
    report = verify(two_layers(), X, composite="epsilon(epsilon=0.5)", target=0)
    assert flow(report, "y").losses["stabilizer"] == pytest.approx(0.45)
    assert flow(report, "y").losses["bias"] == pytest.approx(0.45)


def test_cancellation_at_a_signed_add():
    """Terms 10 and -8 make 2: nine times the relevance flows."""
    model = parse(
        """net (float[N, 2] x) => (float[N, 1] y) {
            left = Gemm<transB = 1>(x, A)
            right = Gemm<transB = 1>(x, B)
            y = Add(left, right)
        }""",
        A=np.asarray([[10, 0]], np.float32), B=np.asarray([[0, -4]], np.float32),
    )  # fmt: skip
    report = verify(model, X, composite="epsilon", target=0)
    assert report.ok, report.checks
    assert report.flows[0].cancellation == pytest.approx(9)
    assert "9 times" in check(report, "conservation").detail


def test_spread_bias_by_hand():
    """Dense formulas: R_i += sum_j b_j s_j / n, and what is given back to the hidden layer travels on."""
    report = verify(two_layers(), X, composite="epsilon(epsilon=1e-9)", target=0, spread_bias=True)
    assert check(report, "spread bias").ok
    z1 = W1 @ X[0] + B1
    R1 = np.maximum(z1, 0) * W2[0] + B2[0] / 3  # n = 3 hidden units
    s = R1 / z1
    expected = X[0] * (W1.T @ s) + (B1 * s).sum() / 2
    np.testing.assert_allclose(report.spread["x"][0], expected, rtol=1e-4)
    assert report.spread["x"].sum() == pytest.approx(4.5, rel=1e-5)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_bias_gives_back_is_the_transpose_of_ones(transposed, group):
    """Oracle: torch's gradient of <conv(x, 1), b s / n>, n = conv(1, 1)."""
    attrs = {"strides": [2, 1], "pads": [1, 0, 1, 0], "dilations": [1, 2], "group": group, "kernel_shape": [3, 2]}
    x = torch.rand(2, 4, 7, 6, dtype=torch.double, requires_grad=True)
    shape = (4, 6 // group, 3, 2) if transposed else (6, 4 // group, 3, 2)
    ones = torch.ones(shape, dtype=torch.double)
    op = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    extra = {"dilation": (1, 2), "groups": group, "stride": (2, 1), "padding": (1, 0)}
    reach = op(x, ones, **extra)
    count = op(torch.ones_like(x), ones, **extra).detach()
    absorbed = torch.rand_like(reach)
    ((absorbed / count) * reach).sum().backward()

    import onnx_graphsurgeon as gs

    node = gs.Node(
        "ConvTranspose" if transposed else "Conv", "layer", attrs,
        [gs.Variable("x"), gs.Constant("W", ones.numpy())], [gs.Variable("z")],
    )  # fmt: skip
    value = {"x": x.detach().numpy(), "W": ones.numpy()}
    layer = balances.Layer(node, [0], lambda t: value[t.name], {"stabilizer": 1e-6, "bias": "keep"})
    (ours,) = balances.spread(layer, absorbed.numpy())
    np.testing.assert_allclose(ours, x.grad.numpy(), rtol=1e-12)
    assert ours.sum() == pytest.approx(absorbed.sum().item())


# ---------------------------------------------------------------------------------------------------- whole nets hold


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def zoo(*, resize: bool = True) -> onnx.ModelProto:
    """A small net with every kind of node whose balance is special."""
    interpolation = 's = Resize<mode = "linear">(p, , scales)' if resize else "s = Neg(p)"
    return parse(
        """net (float[N, 3, 12, 11] x) => (float[N, 5] y) {
            c1 = Conv<pads = [1, 1, 1, 1], strides = [2, 1]>(x, W1, b1)
            r1 = Relu(c1)
            n1 = LRN<size = 3, alpha = 0.5>(r1)
            c2 = Conv<group = 2, pads = [0, 1, 1, 0]>(n1, W2, b2)
            k = Add(c2, shift)
            m = MaxPool<kernel_shape = [3, 2], strides = [1, 1], pads = [1, 0, 1, 1]>(k)
            bn = BatchNormalization(m, g, be, mu, var)
            lr = LeakyRelu(bn)
            a, b = Split<axis = 1, num_outputs = 2>(lr)
            d = Sub(a, b)
            e = Concat<axis = 1>(d, a)
            u = ConvTranspose<strides = [2, 2]>(e, W3, b3)
            p = Pad(u, pads)
            INTERPOLATION
            v = AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(s)
            h = Mul(v, half)
            q = GlobalAveragePool(h)
            f = Flatten(q)
            y = Gemm<transB = 1>(f, W4, b4)
        }""".replace("INTERPOLATION", interpolation),
        W1=random(8, 3, 3, 3, scale=0.4), b1=random(8, seed=1), W2=random(4, 4, 2, 2, seed=2, scale=0.4),
        b2=random(4, seed=3), shift=random(1, 4, 1, 1, seed=4), g=random(4, seed=5), be=random(4, seed=6),
        mu=random(4, seed=7), var=np.abs(random(4, seed=8)) + 0.5, W3=random(4, 6, 2, 3, seed=9), b3=random(6, seed=10),
        pads=np.asarray([0, 0, 1, 0, 0, 0, 0, 2]), scales=np.asarray([1, 1, 1.5, 2], np.float32),
        half=np.asarray(0.5, np.float32), W4=random(5, 6, seed=11), b4=random(5, seed=12),
    )  # fmt: skip


COMPOSITES = [
    "epsilon_plus_flat",
    "epsilon(epsilon=0.1)",
    "epsilon_gamma_box(low=-3, high=3)",
    "epsilon_alpha2_beta1_flat",
    "alpha2_beta1",
    "zero",
    "wsquare",
    "flat",
    "excitation_backprop",
]


@pytest.mark.parametrize("composite", COMPOSITES)
def test_every_kind_of_layer_balances(composite):
    model = zoo(resize=composite != "flat")  # which has no line for interpolation
    report = verify(model, random(2, 3, 12, 11, seed=20), composite=composite, target=[0, 3])
    assert {c.name: c.ok for c in report.checks if c.ok is not True} == {}
    assert not report.losses["not itemised"]


@pytest.mark.parametrize(("composite", "kinds"), [("epsilon", {"bias", "stabilizer"}), ("flat", {"padding"})])
def test_every_loss_is_found(composite, kinds):
    """What starts is what arrives and what is lost, to rounding."""
    report = verify(zoo(resize=False), random(1, 3, 12, 11, seed=20), composite=composite, target=0)
    start, arrived = report.flows[0].received, report.flows[-1].received
    gross = max(f.tolerance for f in report.flows) / verifying.SUM_TOLERANCE
    assert abs(start - arrived - sum(report.losses.values())) < 1e-5 * gross
    assert {kind for kind, amount in report.losses.items() if abs(amount) > 1e-8} >= kinds


@pytest.mark.parametrize("name", ["shapes", "digits", "ecg", "int8"])
def test_fixtures(name):
    path = ROOT / "fixtures" / name / "net.onnx"
    report = verify(path, float64=True, spread_bias=True)
    assert {c.name: (c.ok, c.detail) for c in report.checks if c.ok is not True} == {}
    assert report.model == str(path)


@pytest.mark.parametrize("composite", ["attnlrp(gamma=0.25)", "epsilon"])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt", "vit_gated"])
def test_transformers(name, composite, tmp_path):
    """Attention, softmax, layer normalization, gates, embeddings: sums by numpy against the relevance model's."""
    from tests.support import transformers

    net = transformers.build(name)
    path = transformers.export(net, "torchscript", tmp_path)
    x = {key: value.numpy() for key, value in net.example(1, seed=9).items()}
    target = (5, 3) if name == "gpt" else 1
    report = verify(path, x, composite=composite, target=target, float64=True, spread_bias=True)
    assert {c.name: (c.ok, c.detail) for c in report.checks if c.ok is not True} == {}
    assert not report.losses["not itemised"]
    assert bool(report.losses["softmax"]) == (composite != "epsilon")
    assert report.losses["bias"]


def test_losses_of_a_softmax_by_hand():
    """Scores [2, 0, 0] closed at the third: s = [0.881, 0.119, 0]; R_in = x (R - s sum R), only x0 = 2 counts."""
    model = parse(
        """net (float[N, 3] x) => (float[N, 1] y) {
            h = Gemm<transB = 1>(x, A)
            r = Relu(h)
            m = Add(r, mask)
            p = Softmax(m)
            y = Gemm<transB = 1>(p, B)
        }""",
        A=np.eye(3, dtype=np.float32), B=np.asarray([[3, 1, 5]], np.float32),
        mask=np.asarray([[0, 0, -np.inf]], np.float32),
    )  # fmt: skip
    report = verify(model, np.asarray([[2, 0, 0]], np.float32), composite="attnlrp", target=0)
    p = np.exp(2) / (np.exp(2) + 1)
    R = np.asarray([3 * p, 1 - p])
    assert report.flows[0].received == pytest.approx(R.sum(), rel=1e-6)
    sent = 2 * (R[0] - p * R.sum())
    assert flow(report, "p").sent == pytest.approx(sent, rel=1e-5)
    assert flow(report, "p").losses["softmax"] == pytest.approx(R.sum() - sent, rel=1e-5)
    assert check(report, "conservation").ok


@pytest.mark.parametrize("name", ["squeezenet1_0_imagenet", "mobilenet_v2_imagenet_int8"])
def test_real_models(name):
    path = DATA / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("the real models of ../shared/data are not here")
    report = verify(path, float64=True)
    assert {c.name: (c.ok, c.detail) for c in report.checks if c.ok is not True} == {}


def test_numpy_alone_gives_the_same(monkeypatch):
    reports = [
        verify(zoo(), random(1, 3, 12, 11, seed=20), target=0, float64=True, backend=b) for b in ("numpy", "torch")
    ]
    for one, other in zip(*(r.flows for r in reports), strict=True):
        assert one.sent == pytest.approx(other.sent, rel=1e-9)
        assert one.losses == pytest.approx(other.losses, rel=1e-6, abs=1e-9)
    assert all(r.ok for r in reports)


# -------------------------------------------------------------------------------------------- broken things are found


def test_a_wrong_rule_is_found(monkeypatch):
    """A hundredth too much in one rule: the layer below receives more than it should."""
    broken(monkeypatch, "zplus", lambda back: back * 1.01)
    report = verify(zoo(), random(1, 3, 12, 11, seed=20), target=0)
    assert not report.ok
    assert check(report, "conservation").ok is False
    assert "receives" in check(report, "conservation").detail
    wrong = [f.layer for f in report.flows if not f.ok]
    assert set(wrong) == {"n1", "e"}  # what the convolutions c2 and u read
    assert check(report, "conditional sums, cut").ok  # wrong, but linear


def test_a_rule_that_is_not_linear_is_found(monkeypatch):
    def change(back):
        graph = back.graph
        return back + graph.Abs(back) * 0.1

    broken(monkeypatch, "zplus", change)
    report = verify(zoo(), random(1, 3, 12, 11, seed=20), target=0)
    assert check(report, "conditional sums, cut").ok is False
    assert check(report, "conditional sums, keep").ok is False


def test_a_changed_relevance_model_is_found(monkeypatch):
    """One weight of the backward pass is another."""
    original = verifying._Question.relevance_model

    def corrupt(self):
        model = original(self)
        (transpose,) = [n for n in model.graph.node if n.name.startswith("R/y/") and n.op_type in ("MatMul", "Gemm")]
        weights = next(i for i in model.graph.initializer if i.name == transpose.input[1])
        array = numpy_helper.to_array(weights).copy()
        array[0, 1] += 0.01  # of the target's row
        changed = numpy_helper.from_array(array, "changed")
        transpose.input[1] = "changed"
        model.graph.initializer.append(changed)
        return model

    monkeypatch.setattr(verifying._Question, "relevance_model", corrupt)
    report = verify(zoo(), random(1, 3, 12, 11, seed=20), target=0)
    assert check(report, "conservation").ok is False
    assert [f.layer for f in report.flows if not f.ok] == ["f"]


def test_a_canonical_model_with_another_weight_is_found():
    good, bad = two_layers(), two_layers()
    changed = W1.copy()
    changed[0, 0] += 1e-3
    bad.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "W1"))
    assert check_outputs(good, good, {"x": X}, quantized=False).ok is True
    found = check_outputs(good, bad, {"x": X}, quantized=False)
    assert found.ok is False
    assert "relative L2" in found.detail


def test_what_float32_cannot_do_is_found():
    """10^4 (x0 - x1) with x1 = x0 + 10^-6: float32 knows the difference to one digit."""
    model = parse(
        "net (float[N, 2] x) => (float[N, 1] y) { h = Gemm<transB = 1>(x, A)  r = Relu(h)  y = Gemm<transB = 1>(r, B) }",
        A=np.asarray([[1e4, -1e4 + 1e-3], [3, 1]], np.float32), B=np.asarray([[1, 1e-3]], np.float32),
    )  # fmt: skip
    x = np.asarray([[0.7000001, 0.70000005]], np.float32)
    assert check(verify(model, x, composite="epsilon", target=0, float64=True), "float64").ok is False


# ------------------------------------------------------------------------------------------------ what does not apply


@pytest.mark.parametrize("composite", ["gradient", "guided_backprop"])
def test_gradients_conserve_nothing(composite):
    report = verify(zoo(), random(1, 3, 12, 11, seed=20), composite=composite, target=0, spread_bias=True)
    assert check(report, "conservation").ok is None
    assert "no LRP" in check(report, "conservation").detail
    assert check(report, "spread bias").ok is None
    if composite == "guided_backprop":
        assert "not linear" in check(report, "conditional sums, cut").detail
    else:
        assert check(report, "conditional sums, cut").ok
    assert report.ok


def test_an_operator_the_evaluator_lacks_is_named(monkeypatch):
    from onnxcrp import evaluate

    monkeypatch.setitem(evaluate.KERNELS, "Relu", lambda *a: NotImplemented)
    monkeypatch.setattr(evaluate.run, "by_reference", _fails)
    found = check(verify(two_layers(), X, target=0, float64=True), "float64")
    assert found.ok is None
    assert "Relu" in found.detail


def _fails(*args: object) -> None:
    from onnxcrp.errors import UnsupportedError

    raise UnsupportedError("there is no kernel for it")


def test_a_canonical_model_has_no_original_to_compare_with():
    from onnxcrp.canonize import canonize

    report = verify(canonize(two_layers()), X, target=0)
    assert check(report, "canonical outputs").ok is None
    assert report.ok
    assert check(verify(two_layers(), X, target=0, canonical=canonize(two_layers())), "canonical outputs").ok


def test_a_layer_can_be_chosen():
    report = verify(zoo(), random(1, 3, 12, 11, seed=20), target=0, layer="c1", parts=3)
    assert "3 parts of the 8 concepts" in check(report, "conditional sums, cut").detail
    with pytest.raises(QuestionError, match="no layer 'nothing'"):
        verify(two_layers(), X, target=0, layer="nothing")


def chain(top: str, weight: float = 1.0) -> onnx.ModelProto:
    """Three convolutions of 4, 4 and 2 channels, the last one `top` into the output; `weight`: scale of the second."""
    draw = np.random.default_rng(5)
    W = [np.abs(draw.normal(size=shape)).astype(np.float32) for shape in ((4, 1, 3, 3), (4, 4, 3, 3), (2, 4, 3, 3))]
    W[1][1:] *= weight  # 0: all relevance in the first channel
    return parse(
        f"""net (float[N, 1, 7, 7] x) => (float[N, 2] y) {{
            c1 = Conv(x, A)  r1 = Relu(c1)  c2 = Conv(r1, B)  r2 = Relu(c2)  c3 = Conv(r2, C)  {top} }}""",
        A=W[0], B=W[1], C=W[2], shape=np.asarray([0, -1], np.int64),
    )  # fmt: skip


def test_the_layer_of_the_conditional_sums_is_not_the_top_one():
    x = np.abs(random(1, 1, 7, 7, seed=3))
    for top in ("y = Flatten(c3)", "t = Transpose<perm = [0, 2, 3, 1]>(c3)  y = Reshape(t, shape)"):
        report = verify(chain(top), x, target=0, composite="epsilon")
        assert "4 parts of the 4 concepts of c2" in check(report, "conditional sums, cut").detail
        assert check(report, "conditional sums, cut").ok
    single = verify(chain("y = Flatten(c3)", weight=0.0), x, target=0, composite="epsilon")
    assert "of the 4 concepts of c1" in check(single, "conditional sums, cut").detail  # c2 has relevance in one alone
    nothing = verify(chain("y = Flatten(c3)"), 0 * x, target=0, composite="epsilon")
    for name in ("conditional sums, cut", "conditional sums, keep"):
        assert check(nothing, name).ok is None
        assert check(nothing, name).detail.startswith("not applied: no layer below the top one has relevance")
    named = verify(chain("y = Flatten(c3)"), 0 * x, target=0, composite="epsilon", layer="c1")
    assert check(named, "conditional sums, cut").detail == "not applied: no relevance passes through c1"


def test_samples_need_a_size():
    model = parse("net (float[N, T] x) => (float[N, T] y) { y = Relu(x) }")
    with pytest.raises(InputError, match="size is open"):
        verify(model)
    with pytest.raises(InputError, match="expected float32"):
        verify(two_layers(), np.asarray([["a", "b"]]), target=0)
    with pytest.raises(InputError, match="no input 'z'"):
        verify(two_layers(), {"z": X}, target=0)


def test_report_is_json_and_tables():
    report = verify(two_layers(), X, target="top", composite="epsilon", float64=True, spread_bias=True)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["ok"] is True
    assert plain["target"] == "1"
    assert [entry["layer"] for entry in plain["layers"]] == [f.layer for f in report.flows]
    assert plain["spread"]["x"] == pytest.approx(plain["layers"][0]["received"], rel=1e-4)
    checks, layers = report.tables()
    assert all(len(row) == len(checks.columns) for row in checks.rows)
    assert all(len(row) == len(layers.columns) for row in layers.rows)
    assert "holds" in checks.rows[0]
