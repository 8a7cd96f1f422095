"""Oracle: onnxruntime on the model as exported, and the norm's textbook formula in numpy."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime as ort
import pytest

from .support.canonical import check, feeds, ops, parse, random, said, session

PASS = "fuse normalizations"
GAMMA, BETA = random(6, seed=1, low=0.5, high=2), random(6, seed=2)
NUMBERS = {"two": 2.0, "one": 1.0, "half": 0.5, "minus": -0.5, "eps": 1e-5}


def model(body: str, x: str = "float[N, 4, 6] x", y: str = "float[N, 4, 6] y", opset: int = 18, **constants):
    numbers = {name: np.array(number, np.float32) for name, number in NUMBERS.items()}
    given = {"g": GAMMA, "b": BETA, "last": np.array([-1])} | numbers | constants
    text = f" {body} ".replace("(", " ( ").replace(")", " ) ").replace(",", " , ")
    used = {name: np.asarray(array) for name, array in given.items() if f" {name} " in text}
    return parse(f"m ({x}) => ({y}) {{ {body} }}", opset, 10, **used)


def only(canonical, op: str):
    (node,) = [node for node in canonical.graph.nodes if node.op == op]
    return node


# ------------------------------------------------------------------------------------------------ as exporters write them

MEAN = "m = ReduceMean(x, last) d = Sub(x, m)"
LAYER_NORMS = {
    "pow": f"{MEAN} q = Pow(d, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) o = Mul(n, g) y = Add(o, b)",
    "mul": f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(eps, v) s = Sqrt(e) n = Div(d, s) o = Mul(g, n) y = Add(b, o)",
    "reciprocal": f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(d, r) o = Mul(n, g) y = Add(o, b)",
    "power": f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) r = Pow(e, minus) n = Mul(d, r) o = Mul(n, g) y = Add(o, b)",
    "twice": f"{MEAN} c = Sub(x, m) q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) o = Mul(n, g) y = Add(o, b)",
    "sum": "t = ReduceSum(x, last) m = Mul(t, sixth) d = Sub(x, m) v = ReduceSumSquare(d, last) w = Mul(v, sixth) e = Add(w, eps) s = Sqrt(e) n = Div(d, s) o = Mul(n, g) y = Add(o, b)",
    "moments": "m = ReduceMean(x, last) q = Mul(x, x) k = ReduceMean(q, last) l = Mul(m, m) v = Sub(k, l) e = Add(v, eps) s = Sqrt(e) d = Sub(x, m) n = Div(d, s) o = Mul(n, g) y = Add(o, b)",
    "keras": f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) i = Mul(r, g) u = Mul(x, i) w = Mul(m, i) z = Sub(b, w) y = Add(u, z)",
    "squeezed": "k = ReduceMean<keepdims = 0>(x, last) m = Unsqueeze(k, last) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) o = Mul(n, g) y = Add(o, b)",
    "negated": f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) a = Neg(d) n = Div(a, s) z = Neg(g) o = Mul(n, z) y = Add(o, b)",
}  # fmt: skip


def layer_norm(x, axes, eps=1e-5):
    x = x.astype(np.float64)
    d = x - x.mean(axes, keepdims=True)
    return d / np.sqrt((d * d).mean(axes, keepdims=True) + eps)


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm(name) -> None:
    proto = model(LAYER_NORMS[name], sixth=np.float32(1 / 6))
    canonical = check(proto)
    assert ops(canonical) == ["LayerNormalization"]
    node = only(canonical, "LayerNormalization")
    assert node.attrs == {"axis": -1, "epsilon": 1e-5}
    np.testing.assert_allclose(node.inputs[1].values, GAMMA, rtol=1e-6)
    np.testing.assert_allclose(node.inputs[2].values, BETA, rtol=1e-6)
    x = random(2, 4, 6)
    (y,) = session(canonical.to_onnx()).run(None, {"x": x})
    np.testing.assert_allclose(y, layer_norm(x, -1) * GAMMA + BETA, rtol=1e-5, atol=1e-5)


def test_the_models_own_parameters_are_kept() -> None:
    node = only(check(model(LAYER_NORMS["pow"])), "LayerNormalization")
    assert [tensor.name for tensor in node.inputs[1:]] == ["g", "b"]


CORE = f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e)"


@pytest.mark.parametrize(
    ("tail", "gamma", "beta"),
    [
        ("y = Div(d, s)", np.ones(6), None),
        ("n = Div(d, s) y = Mul(n, g)", GAMMA, None),
        ("n = Div(d, s) y = Add(n, b)", np.ones(6), BETA),
        ("n = Div(d, s) y = Mul(n, two)", np.full(6, 2), None),
    ],
)
def test_layer_norm_with_missing_parameters(tail, gamma, beta) -> None:
    node = only(check(model(f"{CORE} {tail}")), "LayerNormalization")
    np.testing.assert_allclose(node.inputs[1].values, gamma, rtol=1e-6)
    assert len(node.inputs) == (2 if beta is None else 3)
    if beta is not None:
        np.testing.assert_allclose(node.inputs[2].values, beta, rtol=1e-6)


def test_layer_norm_in_a_residual_block() -> None:
    """What surrounds the norm stays: the sum before it, the scale after it that differs by position."""
    body = f"x = Add(w, w) {CORE} n = Div(d, s) o = Mul(n, g) p = Add(o, b) z = Mul(p, positions) y = Add(z, w)"
    proto = model(body, x="float[N, 4, 6] w", positions=random(4, 6))
    assert ops(check(proto)) == ["Add", "LayerNormalization", "Mul", "Add"]


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-3, 0.1])
def test_epsilon(epsilon) -> None:
    node = only(check(model(LAYER_NORMS["pow"], eps=np.float32(epsilon))), "LayerNormalization")
    assert node.attrs["epsilon"] == epsilon


def test_over_several_axes() -> None:
    body = f"{CORE} n = Div(d, s) o = Mul(n, g) y = Add(o, b)"
    canonical = check(model(body, last=np.array([1, 2]), g=random(4, 6, low=1, high=2), b=random(4, 6)))
    node = only(canonical, "LayerNormalization")
    assert node.attrs["axis"] == -2
    assert [t.shape for t in node.inputs[1:]] == [(4, 6), (4, 6)]


def test_over_channels() -> None:
    """ConvNeXt as its authors wrote it: means over axis 1 of [N, C, H, W], parameters [C, 1, 1]."""
    body = f"{CORE} n = Div(d, s) o = Mul(g, n) y = Add(o, b)"
    g, b = random(6, 1, 1, low=1, high=2), random(6, 1, 1)
    io = {"x": "float[N, 6, 3, W] x", "y": "float[N, 6, 3, W] y"}
    canonical = check(model(body, **io, last=np.array([1]), g=g, b=b))
    assert ops(canonical) == ["Transpose", "LayerNormalization", "Transpose"]
    assert canonical.graph.nodes[0].attrs["perm"] == [0, 2, 3, 1]
    np.testing.assert_array_equal(canonical.graph.nodes[1].inputs[1].values, g[:, 0, 0])


RMS_NORMS = {
    "llama": "q = Pow(x, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(x, r) y = Mul(g, n)",
    "one over": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Div(one, s) n = Mul(x, r) y = Mul(n, g)",
    "div": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, g)",
    "power": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) r = Pow(e, minus) n = Mul(r, x) y = Mul(n, g)",
    "gain first": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(r, g) y = Mul(x, n)",
    "gemma": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(x, s) h = Sub(g, one) k = Add(one, h) y = Mul(n, k)",
}  # fmt: skip


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm(name) -> None:
    canonical = check(model(RMS_NORMS[name]))
    assert ops(canonical) == ["RmsNorm"]
    node = canonical.graph.nodes[0]
    assert node.domain == "onnxcrp"
    assert node.attrs == {"axis": -1, "epsilon": 1e-5}
    np.testing.assert_allclose(node.inputs[1].values, GAMMA, rtol=1e-6)
    x = random(2, 4, 6)
    (y,) = session(canonical.to_onnx()).run(None, {"x": x})
    x = x.astype(np.float64)
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * GAMMA, rtol=1e-5)


def test_rms_norm_of_half_precision_with_its_casts() -> None:
    body = """w = Cast<to = 1>(x) q = Mul(w, w) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s)
              n = Mul(w, r) c = Cast<to = 10>(n) y = Mul(g, c)"""
    io = {"x": "float16[N, 4, 6] x", "y": "float16[N, 4, 6] y"}
    canonical = check(model(body, **io, g=GAMMA.astype(np.float16)), tolerance=2e-3)
    assert ops(canonical) == ["RmsNorm"]
    assert canonical.graph.nodes[0].inputs[1].values.dtype == np.float16


def test_layer_norm_of_half_precision_with_its_casts() -> None:
    core = CORE.replace("(x", "(w")
    body = f"w = Cast<to = 1>(x) {core} n = Div(d, s) o = Mul(n, g) p = Add(o, b) y = Cast<to = 10>(p)"
    canonical = check(model(body, x="float16[N, 4, 6] x", y="float16[N, 4, 6] y"), tolerance=2e-3)
    assert ops(canonical) == ["LayerNormalization"]


def test_a_unit_vector_is_an_rms_norm() -> None:
    """x / |x| = x / sqrt(mean(x^2)) / sqrt(size)."""
    node = only(check(model("n = ReduceL2(x, last) y = Div(x, n)")), "RmsNorm")
    assert node.attrs["epsilon"] == 0
    np.testing.assert_allclose(node.inputs[1].values, np.full(6, 6**-0.5), rtol=1e-6)


def test_rms_normalization_of_opset_23() -> None:
    proto = model("y = RMSNormalization<epsilon = 1e-6>(x, g)", opset=23)
    canonical = check(proto)
    assert ops(canonical) == ["RmsNorm"]
    assert canonical.graph.nodes[0].attrs == {"axis": -1, "epsilon": pytest.approx(1e-6)}
    assert [node.op_type for node in canonical.to_onnx().graph.node] == ["RMSNormalization"]


def test_layer_normalization_gets_explicit_attributes() -> None:
    canonical = check(model("y = LayerNormalization<axis = 1>(x, g)", g=random(4, 6)))
    assert only(canonical, "LayerNormalization").attrs == {"axis": -2, "epsilon": pytest.approx(1e-5)}


# -------------------------------------------------------------------------------------------------------- what is left alone


def test_other_arithmetic_stays() -> None:
    for body in (
        "m = ReduceMean(x, last) y = Sub(x, m)",
        "a = Abs(x) m = ReduceMean(a, last) y = Div(x, m)",
        f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) y = Add(v, eps)",
        f"{MEAN} q = Mul(d, d) v = ReduceMean(q, last) s = Sqrt(v) e = Add(s, half) y = Div(d, e)",  # eps outside
    ):
        proto = model(body, y="float[N, 4, K] y")
        canonical = check(proto)
        assert ops(canonical) == [node.op_type for node in proto.graph.node]


def test_group_and_instance_normalization_stay() -> None:
    body = "i = InstanceNormalization(x, g, b) y = GroupNormalization<num_groups = 2>(i, g, b)"
    g, b = random(4), random(4)
    canonical = check(model(body, opset=21, g=g, b=b))
    assert ops(canonical) == ["InstanceNormalization", "GroupNormalization"]
    assert said(canonical, PASS).count("is one node already") == 2


@pytest.mark.parametrize(
    ("body", "x", "reason"),
    [
        (f"{CORE} n = Div(d, s) o = Mul(n, g) y = Add(o, b) z = Relu(v)", "float[N, 4, 6] x", "is also read by Relu"),
        (f"{CORE} z = Div(d, s) y = Mul(z, g)", "float[N, 4, D] x", "the size of axis 2 is not known"),
    ],
)
def test_declined_with_a_reason(body, x, reason) -> None:
    y = "float[N, 4, D] y, float[N, 4, E] z"
    canonical = check(model(body, x=x, y=y), size=6)
    assert reason in said(canonical, PASS)
    assert "LayerNormalization" not in ops(canonical) or "Relu" not in reason


def test_declined_over_the_batch() -> None:
    canonical = check(model(f"{CORE} y = Div(d, s)", x="float[3, 6] x", y="float[3, 6] y", last=np.array([0])))
    assert "LayerNormalization" not in ops(canonical)
    assert "normalizes the batch axis" in said(canonical, PASS)


# ------------------------------------------------------------------------------------------------------------- real exporters


@pytest.mark.parametrize("exporter", ["torchscript", "torchscript 14", "dynamo"])
def test_exported_modules(exporter, tmp_path) -> None:
    import torch
    from torch import nn

    class ChannelsFirst(nn.Module):
        """ConvNeXt's, as its authors and Hugging Face wrote it."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))

        def forward(self, x):
            u = x.mean(1, keepdim=True)
            s = (x - u).pow(2).mean(1, keepdim=True)
            x = (x - u) / torch.sqrt(s + 1e-6)
            return self.weight[:, None, None] * x + self.bias[:, None, None]

    class LayerNorm2d(nn.LayerNorm):
        """torchvision's."""

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Rms(nn.Module):
        """Llama's."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6) + 0.5)

        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = ChannelsFirst(), LayerNorm2d(8), Rms()
            self.d = nn.LayerNorm(6, elementwise_affine=False)
            self.e = nn.RMSNorm(6, eps=1e-6) if exporter == "dynamo" else Rms()  # the older one does not know it

        def forward(self, x):
            x = self.b(torch.relu(self.a(x)))
            return self.e(torch.relu(self.d(torch.relu(self.c(x)))))

    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    kind = {"dynamo": exporter == "dynamo", "opset_version": 14 if "14" in exporter else 18}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(Net().eval(), (torch.rand(1, 8, 5, 6),), str(path), input_names=["x"], **kind)
    canonical = check(path, tolerance=1e-4)
    norm = ["Transpose", "LayerNormalization", "Transpose"]
    assert ops(canonical) == [*norm, "Relu", *norm, "RmsNorm", "Relu", "LayerNormalization", "Relu", "RmsNorm"]
    if exporter == "torchscript":
        names = [node.name for node in canonical.graph.nodes if "Norm" in node.op]
        assert names[:3] == ["/a/LayerNormalization", "/b/LayerNormalization", "/c/RmsNorm"]


def test_onnxruntime_agrees_with_itself() -> None:
    """The same nodes that onnxruntime's own optimizer fuses."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    proto = model(LAYER_NORMS["pow"])
    fused = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = feeds(fused)
    (expected,) = fused.run(None, x)
    (y,) = session(check(proto).to_onnx()).run(None, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
