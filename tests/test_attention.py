"""Attention, gates, embeddings. Oracle: dense float64 formulas in numpy, lxt, and an own float64 backward pass in torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onnxcrp.backward import compile as compile_model
from onnxcrp.backward import concept_axis
from onnxcrp.composite import load
from onnxcrp.errors import CompositeError, OnnxcrpError, UnsupportedError
from onnxcrp.explainer import Explainer, NegativeLogitWarning
from onnxcrp.session import Session
from tests.support import peers, transformers

RNG = np.random.default_rng(4)
EPS = 1e-6
EXPORTERS = ("torchscript", "dynamo")
TOLERANCE = 1e-4  # relative L2, float32 against float64


@pytest.fixture(scope="module")
def lxt() -> Any:
    """lxt's functional rules; its package imports without the libraries that its model patches want."""
    try:
        import lxt.explicit.functional as functional
    except ImportError as error:
        pytest.fail(f"the AttnLRP rules are compared with lxt ({error}); run: {peers.INSTALL}", pytrace=False)
    return functional


def stab(z: Any, eps: float = EPS) -> Any:
    return z + eps * np.where(np.asarray(z) >= 0, 1.0, -1.0)


def close(ours: np.ndarray, theirs: Any, bound: float = TOLERANCE) -> None:
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs) + 1e-12, (ours, theirs)


def array(*shape: int, low: float | None = None) -> np.ndarray:
    return (RNG.standard_normal(shape) if low is None else RNG.uniform(low, 2.0, shape)).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    shapes: dict[str, tuple[int, ...]],
    constants: dict[str, np.ndarray] | None = None,
    **kinds: int,
) -> onnx.ModelProto:
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(name, kinds.get(name, 1), ["batch", *shape]) for name, shape in shapes.items()],
        [oh.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=10)


def node(op: str, inputs: str, output: str = "y", **attrs: Any) -> onnx.NodeProto:
    return oh.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attrs)


def rules(tmp_path: Path, **assigned: str) -> Any:
    path = tmp_path / "rules.toml"
    lines = [f'[[layer]]\nop = "{family}"\nrule = "{rule}"\n' for family, rule in assigned.items()]
    path.write_text('extends = "base"\nseed = "one"\n' + "".join(lines))
    return load(path)


def ask(proto: onnx.ModelProto, composite: Any, feeds: dict[str, np.ndarray], R: np.ndarray) -> dict[str, np.ndarray]:
    relevance = compile_model(proto, composite)
    onnx.checker.check_model(relevance, full_check=True)
    found = Session(relevance).run({**feeds, "target": R})
    return {name.removeprefix("relevance."): value for name, value in found.items() if name.startswith("relevance.")}


def by_autograd(f: Any, R: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """What a library of autograd functions with rules for gradients answers, in float64."""
    data = [torch.from_numpy(a).double().requires_grad_(True) for a in arrays]
    return [g.numpy() for g in torch.autograd.grad(f(*data), data, torch.from_numpy(R).double())]


# ---- matmul ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lead", [(), (3,)])
def test_matmul_entry_by_entry(lead: tuple[int, ...], tmp_path: Path, lxt: Any) -> None:
    A, B = array(2, *lead, 4, 5), array(2, *lead, 5, 6)
    R = array(2, *lead, 4, 6) * (A @ B) ** 2  # little where the product nearly cancels
    got = ask(
        model([node("MatMul", "A B")], {"A": A.shape[1:], "B": B.shape[1:]}),
        rules(tmp_path, matmul="matmul"),
        {"A": A, "B": B},
        R,
    )
    a, b, r = (v.astype(np.float64) for v in (A, B, R))
    terms = a[..., :, :, None] * b[..., None, :, :]  # [..., m, k, n], what R_mn is shared out over, twice
    share = terms / stab(2 * terms.sum(-2, keepdims=True), 1e-8) * r[..., :, None, :]
    close(got["A"], share.sum(-1))
    close(got["B"], share.sum(-3))
    for name, theirs in zip("AB", by_autograd(lxt.matmul, R, A, B), strict=True):
        close(got[name], theirs)
    close(sum(v.sum() for v in got.values()), r.sum(), 1e-3)  # half each: all of it


def test_matmul_where_nothing_comes_out_gives_nothing() -> None:
    A, B = np.zeros((1, 3, 4), np.float32), array(1, 4, 5)
    got = ask(
        model([node("MatMul", "A B")], {"A": (3, 4), "B": (4, 5)}),
        "attnlrp",
        {"A": A, "B": B},
        np.ones((1, 3, 5), np.float32),
    )
    assert not got["A"].any()
    assert not got["B"].any()


# ---- softmax ---------------------------------------------------------------------------------------------------------
def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def inner_softmax(axis: int) -> list[onnx.NodeProto]:
    """A softmax that is no head: something follows."""
    return [node("Softmax", "x", "s", axis=axis), node("Mul", "s two")]


TWO = {"two": np.float32(2.0)}


@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax(axis: int, tmp_path: Path, lxt: Any) -> None:
    x, R = array(2, 3, 4), array(2, 3, 4)
    got = ask(model(inner_softmax(axis), {"x": (3, 4)}, TWO), rules(tmp_path), {"x": x}, R)["x"]
    a, r = x.astype(np.float64), R.astype(np.float64)
    s = softmax(a, axis)
    expected = np.zeros_like(a)
    for index in np.ndindex(a.shape):  # x_i (R_i - s_i sum_j R_j)
        line = list(index)
        line[axis % 3] = slice(None)  # type: ignore[call-overload]
        expected[index] = a[index] * (r[index] - s[index] * r[tuple(line)].sum())
    close(got, expected)
    if axis == -1:
        (theirs,) = by_autograd(lambda v: lxt.softmax(v, -1), R, x)
        close(got, theirs)


@pytest.mark.parametrize("closed", [-np.inf, np.finfo(np.float32).min, -1e4])
def test_closed_positions_of_a_softmax_get_nothing(closed: float, tmp_path: Path) -> None:
    """The mask is a constant that is added; its message is never computed, and 0 * inf never happens."""
    x, R = array(2, 3, 4), array(2, 3, 4)
    mask = np.where(np.tril(np.ones((3, 4), bool)), 0, np.float32(closed)).astype(np.float32)[None]
    nodes = [node("Add", "x mask", "m"), node("Softmax", "m", "s", axis=-1), node("Mul", "s two")]
    got = ask(model(nodes, {"x": (3, 4)}, {"mask": mask, **TWO}), rules(tmp_path), {"x": x}, R)["x"]
    a, r, s = x.astype(np.float64), R.astype(np.float64), softmax((x + mask).astype(np.float64))
    expected = np.where(mask == 0, a * (r - s * r.sum(-1, keepdims=True)), 0)
    assert np.isfinite(got).all()
    close(got, expected)


def test_softmax_conserves_what_its_formula_says(tmp_path: Path) -> None:
    """sum_i R_in = sum_i x_i R_i - (sum x s)(sum R): not R; that is what `verify` itemises."""
    x, R = array(1, 5), array(1, 5)
    got = ask(model(inner_softmax(-1), {"x": (5,)}, TWO), rules(tmp_path), {"x": x}, R)["x"]
    a, r = x.astype(np.float64), R.astype(np.float64)
    np.testing.assert_allclose(got.sum(), (a * r).sum() - (a * softmax(a)).sum() * r.sum(), rtol=1e-4)


# ---- normalizations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm(axis: int, bias: bool, tmp_path: Path, lxt: Any) -> None:
    x, R = array(2, 3, 4), array(2, 3, 4)
    size = (4,) if axis == -1 else (3, 4)
    gain, shift = array(*size, low=0.5), array(*size)
    constants = {"gain": gain, "shift": shift} if bias else {"gain": gain}
    proto = model(
        [node("LayerNormalization", f"x {' '.join(constants)}", axis=axis, epsilon=1e-3)], {"x": (3, 4)}, constants
    )
    over = tuple(range(axis % 3, 3))
    a = x.astype(np.float64)
    sigma = np.sqrt(a.var(over, keepdims=True) + 1e-3)
    y = (a - a.mean(over, keepdims=True)) / sigma * gain + (shift if bias else 0)
    R = (R * np.minimum(y**2, 1)).astype(np.float32)
    got = ask(proto, rules(tmp_path), {"x": x}, R)["x"]
    # the matrix of x -> y with sigma held constant, one sample and one group of normalized entries at a time
    count = int(np.prod([a.shape[i] for i in over]))
    expected = np.zeros_like(a).reshape(-1, count)
    for i, (v, width, z, r) in enumerate(
        zip(
            a.reshape(-1, count),
            sigma.reshape(-1),
            y.reshape(-1, count),
            R.reshape(-1, count).astype(np.float64),
            strict=True,
        )
    ):
        M = gain.reshape(-1)[:, None] * (np.eye(count) - 1 / count) / width
        expected[i] = v * (M.T @ (r / stab(z)))
    close(got, expected.reshape(a.shape))
    if axis == -1:
        weights = [torch.from_numpy(g).double() for g in (gain, shift if bias else np.zeros_like(gain))]
        (theirs,) = by_autograd(lambda v: lxt.layer_norm(v, *weights, 1e-3), R, x)
        close(got, theirs)
    if not bias:
        np.testing.assert_allclose(got.sum(), R.sum(), rtol=1e-3)


def test_rms_norm_passes(tmp_path: Path, lxt: Any) -> None:
    x, R, gain = array(2, 3, 4), array(2, 3, 4), array(4, low=0.5)
    nodes = [
        node("Mul", "x x", "square"),
        node("ReduceMean", "square axes", "mean", keepdims=1),
        node("Add", "mean eps", "shifted"),
        node("Sqrt", "shifted", "root"),
        node("Div", "x root", "normed"),
        node("Mul", "normed gain", "out"),
        node("Neg", "out"),
    ]
    constants = {"axes": np.array([-1]), "eps": np.float32(1e-5), "gain": gain}
    proto = model(nodes, {"x": (3, 4)}, constants)
    got = ask(proto, rules(tmp_path), {"x": x}, R)["x"]
    close(got, R)
    (theirs,) = by_autograd(lambda v: lxt.rms_norm_identity(v.float(), torch.from_numpy(gain), 1e-5).double(), R, x)
    close(got, theirs)


# ---- products --------------------------------------------------------------------------------------------------------
def test_half_of_a_product(tmp_path: Path, lxt: Any) -> None:
    u, v, R = array(2, 3, 4), array(2, 3, 4), array(2, 3, 4)
    proto = model([node("Mul", "u v")], {"u": (3, 4), "v": (3, 4)})
    got = ask(proto, rules(tmp_path, product="half"), {"u": u, "v": v}, R)
    for name, theirs in zip("uv", by_autograd(lxt.mul2, R, u, v), strict=True):
        close(got[name], theirs)
        close(got[name], R / 2)


def test_half_sums_what_was_broadcast(tmp_path: Path) -> None:
    u, v, R = array(2, 3, 4), array(2, 3, 1), array(2, 3, 4)
    proto = model([node("Mul", "u v")], {"u": (3, 4), "v": (3, 1)})
    got = ask(proto, rules(tmp_path, product="half"), {"u": u, "v": v}, R)
    close(got["u"], R / 2)
    close(got["v"], R.sum(-1, keepdims=True) / 2)


def test_a_divisor_gets_none(tmp_path: Path) -> None:
    u, v, R = array(2, 4), array(2, 4, low=0.5), array(2, 4)
    for rule in ("half", "signal"):
        got = ask(
            model([node("Div", "u v")], {"u": (4,), "v": (4,)}), rules(tmp_path, product=rule), {"u": u, "v": v}, R
        )
        close(got["u"], R)
        assert not got["v"].any()


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid", "Softmax"])
@pytest.mark.parametrize("first", [True, False])
def test_signal_gets_all_and_the_gate_none(gate: str, first: bool, tmp_path: Path) -> None:
    u, v, R = array(2, 3), array(2, 3), array(2, 3)
    nodes = [node(gate, "u", "open"), node("Mul", "open v" if first else "v open")]
    got = ask(model(nodes, {"u": (3,), "v": (3,)}), rules(tmp_path), {"u": u, "v": v}, R)
    close(got["v"], R)
    assert not got["u"].any()


def test_signal_without_one_gate_is_half(tmp_path: Path) -> None:
    u, v, R = array(2, 3), array(2, 3), array(2, 3)
    for ops in (("Tanh", "Tanh"), ("Sigmoid", "Sigmoid")):
        nodes = [node(ops[0], "u", "a"), node(ops[1], "v", "b"), node("Mul", "a b")]
        got = ask(model(nodes, {"u": (3,), "v": (3,)}), rules(tmp_path), {"u": u, "v": v}, R)
        close(got["u"], R / 2)
        close(got["v"], R / 2)


def test_signal_of_attention_goes_to_the_values(tmp_path: Path) -> None:
    """Softmax(x) V: the attention is the gate, V gets all by share (the rule of recurrent nets and CNNs)."""
    x, V, R = array(2, 3, 4), array(2, 4, 5), array(2, 3, 5)
    nodes = [node("Softmax", "x", "s", axis=-1), node("MatMul", "s V")]
    got = ask(model(nodes, {"x": (3, 4), "V": (4, 5)}), rules(tmp_path), {"x": x, "V": V}, R)
    s, v = softmax(x.astype(np.float64)), V.astype(np.float64)
    terms = s[:, :, :, None] * v[:, None]
    close(got["V"], (terms / stab((s @ v)[:, :, None]) * R[:, :, None]).sum(1))
    assert not got["x"].any()


# ---- additions, embeddings, masks ------------------------------------------------------------------------------------
def test_residual_add_is_shared_as_in_lxt(tmp_path: Path, lxt: Any) -> None:
    u, v = array(2, 3, 4, low=0.1), array(2, 3, 4, low=0.1)
    R = array(2, 3, 4)
    got = ask(model([node("Add", "u v")], {"u": (3, 4), "v": (3, 4)}), rules(tmp_path), {"u": u, "v": v}, R)
    for name, theirs in zip("uv", by_autograd(lxt.add2, R, u, v), strict=True):
        close(got[name], theirs)


def test_dense_epsilon_is_lxts(tmp_path: Path, lxt: Any) -> None:
    x, W, b, R = array(2, 3, 4, low=0.1), array(4, 5, low=0.1), array(5, low=0.1), array(2, 3, 5)
    nodes = [node("MatMul", "x W", "m"), node("Add", "m b")]
    got = ask(model(nodes, {"x": (3, 4)}, {"W": W, "b": b}), rules(tmp_path, dense="epsilon"), {"x": x}, R)["x"]
    weights = torch.from_numpy(W.T.copy()).double(), torch.from_numpy(b).double()
    (theirs,) = by_autograd(lambda v: lxt.linear_epsilon(v, *weights), R, x)
    close(got, theirs)


def test_token_relevance_is_the_sum_over_features(tmp_path: Path) -> None:
    table, W, R = array(9, 4), array(4, 3), array(2, 5, 3)
    nodes = [node("Gather", "table ids", "e"), node("MatMul", "e W")]
    proto = model(nodes, {"ids": (5,)}, {"table": table, "W": W}, ids=7)
    ids = RNG.integers(0, 9, (2, 5))
    got = ask(proto, rules(tmp_path, dense="epsilon"), {"ids": ids}, R)["ids"]
    a, w = table[ids].astype(np.float64), W.astype(np.float64)
    close(got, (a * ((R / stab(a @ w)) @ w.T)).sum(-1))
    assert got.dtype == np.float32


def test_a_mask_that_closes_a_float_input(tmp_path: Path) -> None:
    """Where(mask, x, -inf): only what was let through has relevance."""
    x, R = array(2, 4), array(2, 4)
    keep = np.array([[True, False, True, True]])
    nodes = [node("Where", "keep x low", "m"), node("Softmax", "m", "s", axis=-1), node("Mul", "s two")]
    proto = model(nodes, {"x": (4,)}, {"keep": keep, "low": np.float32(-np.inf), **TWO})
    got = ask(proto, rules(tmp_path), {"x": x}, R)["x"]
    a, r = x.astype(np.float64), R.astype(np.float64)
    s = softmax(np.where(keep, a, -np.inf))
    close(got, np.where(keep, a * (r - s * r.sum(-1, keepdims=True)), 0))


def test_unmatched_families_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lacking.toml"
    path.write_text('[[layer]]\nop = "dense"\nrule = "epsilon"\n')
    with pytest.raises(CompositeError, match="MatMul"):
        compile_model(model([node("MatMul", "A B")], {"A": (3, 4), "B": (4, 5)}), path)


def test_a_log_softmax_inside_the_model_has_no_rule() -> None:
    nodes = [node("LogSoftmax", "x", "s"), node("Mul", "s two")]
    with pytest.raises(CompositeError, match="LogSoftmax"):
        compile_model(model(nodes, {"x": (4,)}, TWO), "attnlrp")


# ---- squeeze-and-excitation, HardSwish, SiLU -------------------------------------------------------------------------
class Squeeze(nn.Module):
    """Conv, Hardswish, x * hardsigmoid(fc2(relu(fc1(mean x)))), a classifier over the mean."""

    def __init__(self, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.act, self.gate, self.relu = activation(), gate(), nn.ReLU()
        self.fc1, self.fc2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        x = x * self.gate(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("activation", "gate"),
    [(nn.Hardswish, nn.Hardsigmoid), (nn.SiLU, nn.Sigmoid), (nn.ReLU, nn.Sigmoid), (nn.Mish, nn.Sigmoid)],
)
def test_squeeze_and_excitation(
    activation: type[nn.Module], gate: type[nn.Module], exporter: str, tmp_path: Path
) -> None:
    """The gate gets nothing, the activation passes: only convolution, pooling and classifier share out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Squeeze(activation, gate).eval().requires_grad_(False)
    x = array(2, 3, 5, 5)
    path = export(net, (torch.from_numpy(x),), exporter, tmp_path)
    explainer = Explainer(path, "epsilon")
    result = ask_explainer(explainer, x, 2)
    with torch.no_grad():
        d, v = net.double(), torch.from_numpy(x).double()
        z = d.conv(v)
        a = d.act(z)
        s = a * d.gate(d.fc2(d.relu(d.fc1(a.mean((2, 3), keepdim=True)))))
        pooled, W = s.mean((2, 3)), d.head.weight[2]
        y = pooled @ W + d.head.bias[2]
        R = pooled * W * (y / (y + EPS * y.sign()))[:, None]
        R = (
            s / 25 * (R / torch.from_numpy(stab(pooled.numpy())))[:, :, None, None]
        )  # the mean by share, then gate and SiLU pass
        n = R / torch.from_numpy(stab(z.numpy()))
        R = v * F.conv_transpose2d(n, d.conv.weight, padding=1)
    close(result.relevance["x"], R.numpy())
    rule_of = {layer.op: layer.rule for layer in explainer.layers}
    assert rule_of["Mul"] == "signal"


def export(net: nn.Module, args: tuple[torch.Tensor, ...], exporter: str, folder: Path) -> Path:
    path = folder / f"{exporter}.onnx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        options: dict[str, Any] = {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
        if exporter == "dynamo":
            options = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        torch.onnx.export(net, args, str(path), input_names=["x"], output_names=["y"], opset_version=18, **options)
    return path


def ask_explainer(explainer: Explainer, x: Any, target: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NegativeLogitWarning)
        return explainer.explain(x, target, **options)


# ---- whole encoders --------------------------------------------------------------------------------------------------
CASES = [(name, exporter) for name in transformers.NETS for exporter in EXPORTERS]
CONCEPTS = {"vit": 1, "vit_gated": 3, "bert": 2, "gpt": (4, 7), "gpt_merged": (4, 7)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Explainer]]:
    found = {}
    for name, exporter in CASES:
        net = transformers.build(name)
        path = transformers.export(net, exporter, tmp_path_factory.mktemp(f"{name}_{exporter}"))
        found[name, exporter] = net, Explainer(path, "attnlrp")
    return found


def question(net: Any, name: str, batch: int = 2) -> tuple[dict[str, np.ndarray], np.ndarray]:
    feeds = {key: value.numpy() for key, value in net.example(batch).items()}
    shape = (batch, 6, 20) if name.startswith("gpt") else (batch, 3 if name == "bert" else 5)
    target = np.zeros(shape, np.float32)
    index = CONCEPTS[name]
    target[(slice(None), *index) if isinstance(index, tuple) else (slice(None), index)] = 1
    return feeds, target


def named(explainer: Explainer, exporter: str, mark: str) -> str:
    """The layer that the oracle calls `mark`; a block ends with its last Add, heads come out of its last MatMul."""
    if mark.endswith(".heads"):
        return f"{mark.removesuffix('.heads')}.attention.MatMul_1"
    if mark.endswith(".up"):
        return mark
    return [layer.name for layer in explainer.layers if layer.op == "Add" and layer.name.startswith(f"{mark}.Add")][-1]


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_encoder_against_dense_formulas(name: str, exporter: str, encoders: Any) -> None:
    net, explainer = encoders[name, exporter]
    feeds, target = question(net, name)
    marks = ["blocks.0.heads", "blocks.1.heads", "blocks.0.up", "blocks.1.up", "blocks.0"]
    layers = {mark: named(explainer, exporter, mark) for mark in marks}
    result = ask_explainer(explainer, feeds, target, record=list(layers.values()))
    oracle = transformers.relevance(net, feeds, target)
    close(result.explained, oracle["logits"], 1e-5)
    assert set(result.relevance) == {*layers.values(), *(key for key in feeds if key in oracle)}
    for key in feeds:
        if key in oracle:
            close(result.relevance[key], oracle[key])
            assert result.relevance[key].shape == feeds[key].shape  # [B, T] for token ids
    for mark, layer in layers.items():
        close(result.relevance[layer], oracle[f"R {mark}"])
    assert "attention_mask" not in result.relevance


def masks_of(shape: tuple[int, ...], mark: str) -> dict[str, np.ndarray]:
    """Concept masks of the rank of a layer: heads, neurons or features, and tokens."""
    masks = {}
    lead = np.zeros((1, *shape[1:2], *[1] * (len(shape) - 2)), np.float32)
    lead[0, 1] = 1
    masks["head" if mark.endswith("heads") else "token"] = lead
    features = np.zeros((1, *[1] * (len(shape) - 2), shape[-1]), np.float32)
    features[..., [0, 3]] = 1, 0.5
    masks["features"] = features
    return masks


@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_conditions_on_heads_tokens_neurons_features(name: str, exporter: str, bypass: str, encoders: Any) -> None:
    net, explainer = encoders[name, exporter]
    feeds, target = question(net, name)
    for mark in ("blocks.0.heads", "blocks.1.up", "blocks.0"):
        layer = named(explainer, exporter, mark)
        whole = transformers.relevance(net, feeds, target)
        masks = masks_of(whole[f"R {mark}"].shape, mark)
        result = ask_explainer(
            explainer, feeds, target, conditions=[{layer: mask} for mask in masks.values()], bypass=bypass
        )
        for i, mask in enumerate(masks.values()):
            oracle = transformers.relevance(net, feeds, target, masks={mark: mask}, bypass=bypass)
            for key, R in result.relevance.items():
                assert np.linalg.norm(R[:, i] - oracle[key]) <= TOLERANCE * np.linalg.norm(whole[key]), (mark, key)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_words_of_the_command_line_mean_the_right_axes(exporter: str, encoders: Any) -> None:
    from onnxcrp.condition import parse_condition

    for name in ("vit", "gpt"):
        net, explainer = encoders[name, exporter]
        feeds, target = question(net, name)
        heads, block = (named(explainer, exporter, mark) for mark in ("blocks.0.heads", "blocks.0"))
        for text, mark, axis, index in (
            (f"{heads}@head=1", "blocks.0.heads", 1, 1),
            (f"{block}@token=2", "blocks.0", 1, 2),
            (f"{block}=5", "blocks.0", 2, 5),
            ("blocks.1.up=7", "blocks.1.up", 2, 7),
        ):
            result = ask_explainer(explainer, feeds, target, conditions=parse_condition(text), bypass="keep")
            whole = transformers.relevance(net, feeds, target)
            mask = np.zeros([n if i == axis else 1 for i, n in enumerate(whole[f"R {mark}"].shape)])
            mask.reshape(-1)[index] = 1
            oracle = transformers.relevance(net, feeds, target, masks={mark: mask})
            for key, R in result.relevance.items():
                assert np.linalg.norm(R.reshape(oracle[key].shape) - oracle[key]) <= TOLERANCE * np.linalg.norm(
                    whole[key]
                ), text


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_gamma_of_dense_layers_goes_with_attnlrp(exporter: str, tmp_path: Path) -> None:
    net = transformers.build("vit")
    explainer = Explainer(transformers.export(net, exporter, tmp_path), "attnlrp(gamma=0.25)")
    feeds, target = question(net, "vit")
    result = ask_explainer(explainer, feeds, target)
    close(result.relevance["pixels"], transformers.relevance(net, feeds, target, gamma=0.25)["pixels"])


@pytest.mark.parametrize("name", ["bert", "gpt", "gpt_merged"])
def test_samples_and_conditions_do_not_touch_one_another(name: str, encoders: Any) -> None:
    """Three samples and three conditions at once, against one at a time."""
    net, explainer = encoders[name, "dynamo"]
    feeds, target = question(net, name, batch=3)
    conditions: list[dict[str, Any]] = [{}, {"blocks.1.up": [0, 1, 2]}, {"blocks.1.up": {4: 0.5}}]
    together = ask_explainer(explainer, feeds, target, conditions=conditions)
    for row in range(3):
        part = {key: value[row : row + 1] for key, value in feeds.items()}
        for i, condition in enumerate(conditions):
            alone = ask_explainer(explainer, part, target[row : row + 1], conditions=condition)
            np.testing.assert_allclose(
                together.relevance["ids"][row, i], alone.relevance["ids"][0], rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_layers_whose_axis_0_does_not_count_samples(exporter: str, encoders: Any) -> None:
    """[B T, C] is asked about and recorded as [B, T, C], [3, B, heads, T, d] as [B, 3, heads, T, d]; batch against alone."""
    explainer = encoders["gpt_merged", exporter][1]
    net, _ = encoders["gpt_merged", exporter]
    feeds, target = question(net, "gpt_merged", batch=3)
    assert explainer.facts.shares_forward  # the canonical form has samples first
    layers = {layer.name: layer for layer in explainer.layers}
    up, moved = "blocks.0.up", "blocks.0.attention.Transpose"
    assert layers[up].shape[1:] == (6, 48)
    assert layers[up].axis == 2
    assert layers[moved].shape[1:] == (3, 4, 6, 4)
    together = ask_explainer(explainer, feeds, target, record=[up, moved])
    assert together.relevance[up].shape == together.activation[up].shape == (3, 6, 48)
    assert together.relevance[moved].shape == (3, 3, 4, 6, 4)
    for row in range(3):
        alone = ask_explainer(
            explainer, {"ids": feeds["ids"][row : row + 1]}, target[row : row + 1], record=[up, moved]
        )
        for layer in (up, moved):
            np.testing.assert_allclose(together.relevance[layer][row], alone.relevance[layer][0], rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(
                together.activation[layer][row], alone.activation[layer][0], rtol=1e-4, atol=1e-5
            )
    mask = np.zeros((1, 3, 1, 1, 1), np.float32)
    mask[0, 2] = 1  # what goes through the values
    conditions = [{moved: mask}, {moved: 1 - mask}]
    parts = ask_explainer(explainer, feeds, target, conditions=conditions).relevance["ids"]
    whole = ask_explainer(explainer, feeds, target, conditions={moved: np.ones_like(mask)}).relevance["ids"]
    np.testing.assert_allclose(parts.sum(1), whole.reshape(parts.shape[0], -1), rtol=1e-3, atol=1e-5)


def test_closed_tokens_get_nothing(encoders: Any) -> None:
    """Sample 0 of the BERT-like net has two padding tokens; a causal net gives nothing to later tokens."""
    net, explainer = encoders["bert", "torchscript"]
    feeds, target = question(net, "bert")
    result = ask_explainer(explainer, feeds, target)
    assert not result.relevance["ids"][0, 5:].any()
    assert result.relevance["ids"][1, 5:].all()
    net, explainer = encoders["gpt", "torchscript"]
    feeds, _ = question(net, "gpt")
    result = ask_explainer(explainer, feeds, (3, 7))
    assert not result.relevance["ids"][:, 4:].any()
    assert result.relevance["ids"][:, :4].all()


def test_concept_axes(encoders: Any) -> None:
    """Features are the last axis of [B, T, C], also where no dense layer lies below (embeddings, norms), and of heads."""
    for name, exporter in CASES:
        explainer = encoders[name, exporter][1]
        for layer in explainer.layers:
            current = explainer.facts.names.resolve(layer.name)
            if layer.family in ("dense", "embedding", "layernorm", "matmul", "softmax"):
                assert layer.axis == len(layer.shape) - 1, layer
                assert (
                    explainer.facts.seen_axis(current.outputs[0].name, concept_axis(explainer.facts, current))
                    == layer.axis
                )
            if layer.op == "Add" and layer.name.startswith("blocks") and "attention" not in layer.name:
                assert layer.axis == 2, layer
    heads = next(layer for layer in encoders["bert", "dynamo"][1].layers if layer.name == "blocks.0.attention.MatMul_1")
    assert heads.shape[1:] == (2, 7, 8)
    assert heads.axis == 3


# ---- conservation ----------------------------------------------------------------------------------------------------
class Promises(nn.Module):
    """Attention without anything that keeps relevance: no biases, scores that are a signal (softmax aside)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.q(x) @ x.transpose(1, 2) * 0.5) @ self.v(x)
        x = x + self.proj(F.gelu(mixed)) * 0.5
        return self.head((x * torch.sigmoid(x * 2)).mean(1))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("composite", ["attnlrp", "epsilon"])
def test_relevance_is_conserved_where_the_rules_promise_it(composite: str, exporter: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Promises().eval().requires_grad_(False)
    x = array(2, 5, 8)
    explainer = Explainer(export(net, (torch.from_numpy(x),), exporter, tmp_path), composite)
    result = ask_explainer(explainer, x, 1)
    np.testing.assert_allclose(result.relevance["x"].sum((1, 2)), result.explained[:, 1], rtol=1e-3)


def test_what_cannot_be_explained_is_one_error() -> None:
    """Ranks that broadcast a matrix product over the batch."""
    with pytest.raises(UnsupportedError, match="ranks"):
        compile_model(model([node("MatMul", "A B")], {"A": (2, 3, 4), "B": (4,)}), "attnlrp")
    with pytest.raises(OnnxcrpError):
        compile_model(model([node("MatMul", "A B")], {"A": (2, 3, 4), "B": (4, 5)}), "attnlrp")
