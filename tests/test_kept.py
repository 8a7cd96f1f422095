"""Oracles: `Explainer.explain` on the same samples, bit by bit; the nodes of the relevance model, each in one stage."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcrp
from onnxcrp import Explainer, relevance
from onnxcrp.canonize.load import names_read
from onnxcrp.errors import InputError, QuestionError, UnsupportedError
from onnxcrp.relevance import Plan
from onnxcrp.result import NegativeLogitWarning
from onnxcrp.stages import Staged, split

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NETS = {
    "shapes": ["layer2.0.conv2", "layer3.0.conv1", "layer1.0"],
    "ecg": ["3", "6"],
    "digits": ["features.5", "features.8"],
    "int8": ["layer2.0.conv2", "layer3.0.conv2"],
}
RULES = ["epsilon_plus_flat", "epsilon_gamma_box(low=0, high=2)"]


@pytest.fixture(scope="module", params=[(name, rules) for name in NETS for rules in RULES], ids=lambda p: p[0])
def asked(request):
    name, rules = request.param
    explainer = Explainer(FIXTURES / name / "net.onnx", rules)
    ((dtype, shape),) = explainer.inputs.values()
    x = np.random.default_rng(0).uniform(0, 2, (2, *shape[1:])).astype(dtype)
    return explainer, x, explainer.at(x), NETS[name]


def one_by_one(explainer, x, target, **question):
    """Relevance of each sample asked alone, [B, N, ...]: how many samples run at once changes rounding."""
    found = [explainer.explain(x[row : row + 1], target[row], **question) for row in range(len(x))]
    return {name: np.concatenate([each.relevance[name] for each in found]) for name in found[0].relevance}


def test_the_same_bit_by_bit_from_one_forward_pass(asked):
    explainer, x, kept, layers = asked
    questions = [
        {"conditions": [{}, {}], "record": [layers[0]]},
        {"conditions": [{layer: [c]} for layer in layers for c in range(3)], "bypass": "keep"},
        {"conditions": [{layers[0]: [1], layers[1]: [2, 3]}, {layers[0]: [0], layers[1]: [1]}], "bypass": "keep"},
    ]
    for question in questions:
        have = kept.explain([1, 2], seed="abs", **question)
        want = one_by_one(explainer, x, [1, 2], seed="abs", **question)
        assert want.keys() == have.relevance.keys()
        for name in want:
            np.testing.assert_array_equal(have.relevance[name], want[name])
    assert kept.forwards == len(x)


def test_cuts_from_the_same_forward_pass(asked):
    """A cut reads fewer activations, so that the runtime may fuse its own forward pass differently: to rounding."""
    explainer, x, kept, layers = asked
    question = {"conditions": [{layer: [c]} for layer in layers for c in range(3)] + [{layers[0]: [1]}], "seed": "abs"}
    have, want = kept.explain([1, 2], **question), one_by_one(explainer, x, [1, 2], **question)
    for name in want:
        assert np.linalg.norm(have.relevance[name] - want[name]) <= 1e-5 * np.linalg.norm(want[name])
    assert kept.forwards == len(x)


@pytest.mark.parametrize("name", NETS)
def test_every_node_has_one_stage(name):
    model = onnxcrp.compile(FIXTURES / name / "net.onnx", conditions=[NETS[name][0]], masks="required")
    names = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "onnxcrp.map"))
    asking = {names["target"], *names["masks"].values()}
    stages = split(model, asking)
    every = [*stages.constant, *stages.forward.nodes, *stages.factors.nodes, *stages.messages.nodes]
    assert sorted(node.name for node in every) == sorted(node.name for node in model.graph.node)
    depends, backward, weights = set(asking), set(), {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:  # by hand: what depends on the question, what comes after the walk's own nodes
        reads = {read for read in names_read(node) if read}
        if node.name.startswith("R/") and reads <= weights:
            weights.update(node.output)
            continue
        if reads & depends:
            depends.update(node.output)
        if reads & backward or node.name.startswith("R/"):
            backward.update(node.output)
    assert stages.made_by(stages.messages) == depends - asking
    assert stages.made_by(stages.factors) == backward - depends
    assert not any(node.op_type in ("Conv", "Gemm") and node.name.startswith("R/") for node in stages.forward.nodes)
    assert set(stages.forward.reads) == {port.name for port in model.graph.input} - asking


def test_where_strides_put_entries_is_no_question():
    """A strided shortcut spreads its message by copies times zeros and ones: these are the same for all questions."""
    model = onnxcrp.compile(FIXTURES / "shapes" / "net.onnx", masks="required")
    names = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "onnxcrp.map"))
    asked = [n for n in split(model, {names["target"]}).messages.nodes if n.name.startswith("R/layer2.0.downsample.0/")]
    assert {node.op_type for node in asked} >= {"Conv", "Resize"}
    assert not {node.op_type for node in asked} & {"ConvTranspose", "Shape", "Expand"}


@pytest.fixture(scope="module")
def shapes():
    explainer = Explainer(FIXTURES / "shapes" / "net.onnx")
    x = np.random.default_rng(1).normal(size=(3, 3, 64, 64)).astype(np.float32)
    return explainer, x, explainer.at(x)


@pytest.mark.parametrize(
    "question",
    [
        {"target": "top"},
        {"target": "top2"},
        {"target": [0, 1, 2], "record": ["layer2.0.conv2", "fc"]},
        {"target": 1, "conditions": {"layer2.0.conv2": [3]}, "bypass": "keep"},
        {"target": 1, "conditions": [{"layer2.0.conv2": [c]} for c in (1, 5, 7)], "pairwise": True, "bypass": "keep"},
        {
            "target": 1,
            "conditions": [{"layer2.0.conv2": [1]}, {"layer1.0.conv1": [5]}, {"layer2.0.conv2": [7]}],
            "pairwise": True,
        },
        {"start": {"layer2.0.conv2": [3]}, "start_from": "one", "seed": None},
        {"target": {2: 1.0, 3: -1.0}, "inputs": (), "record": "layer1.0.conv1"},
        {"seed": np.eye(6, dtype=np.float32)[:3]},
    ],
    ids=lambda question: "-".join(question),
)
def test_every_kind_of_question(shapes, question):
    explainer, x, kept = shapes
    question = {"seed": "abs", **question}
    have, want = kept.explain(**question), explainer.explain(x, **question)
    for part in ("relevance", "activation", "outputs"):
        assert getattr(have, part).keys() == getattr(want, part).keys()
        for name, array in getattr(want, part).items():
            np.testing.assert_allclose(getattr(have, part)[name], array, rtol=1e-4, atol=1e-5 * np.abs(array).max())
    np.testing.assert_allclose(have.explained, want.explained, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(have.targets, want.targets)
    assert have.conditions == want.conditions


def test_the_forward_pass_runs_once_for_every_sample(monkeypatch):
    explainer = Explainer(FIXTURES / "ecg" / "net.onnx")
    calls = []
    forward = Staged.forward
    monkeypatch.setattr(Staged, "forward", lambda self, feeds: calls.append(len(feeds)) or forward(self, feeds))
    kept = explainer.at(np.random.default_rng(0).random((2, 1, 150), np.float32))
    assert calls == []
    for question in ({"target": "top"}, {"target": 1}, {"target": 2, "conditions": [{"6": [1]}, {"3": [1]}]}):
        kept.explain(seed="abs", **question)
        kept.explain(seed="abs", **question)
    assert calls == [1, 1]


@pytest.mark.parametrize("torch_tensor", [False, True], ids=["numpy", "torch"])
def test_what_is_kept_stays_when_the_array_is_overwritten(torch_tensor):
    """A buffer that the next frame goes into: later questions are still about the sample that was given."""
    explainer = Explainer(FIXTURES / "digits" / "net.onnx", "epsilon")
    ((_, shape),) = explainer.inputs.values()
    x = np.random.default_rng(0).random((1, *shape[1:]), np.float32)
    question = {"target": 1, "seed": "abs", "conditions": [{"features.5": [1]}]}
    want = explainer.explain(x, **question).heatmap
    buffer = pytest.importorskip("torch").from_numpy(x) if torch_tensor else x
    kept = explainer.at(buffer)
    kept.explain(2, seed="abs")
    x[:] = 0.3  # which the tensor shares
    have = kept.explain(**question).heatmap
    assert np.linalg.norm(have - want) <= 1e-5 * np.linalg.norm(want)


def test_layers_above_what_has_no_transpose_can_be_asked_about():
    weights = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Det", ["x"], ["d"]),
        helper.make_node("Gemm", ["d", "w"], ["y"], name="y"),
        helper.make_node("Softmax", ["y"], ["p"]),
    ]
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 2, 2])]
    ends = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 5])]
    graph = helper.make_graph(nodes, "g", ports, ends, [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    explainer = Explainer(model, "epsilon")
    x = np.random.default_rng(1).normal(size=(2, 4, 2, 2)).astype(np.float32)
    have = explainer.at(x).explain("top", record=["y"], inputs=())
    z = np.linalg.det(x.astype(float)) @ weights
    np.testing.assert_allclose(have.relevance["y"], np.where(z == z.max(1, keepdims=True), z, 0), rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedError, match="Det"):
        explainer.at(x).explain("top", seed="abs")


def test_many_threads(shapes):
    explainer, x, _ = shapes
    kept, found = explainer.at(x[:1]), {}

    def ask(channel: int) -> None:
        found[channel] = kept.explain(1, seed="abs", conditions=[{"layer3.0.conv2": [channel]}] * 2).heatmap

    threads = [threading.Thread(target=ask, args=(channel,)) for channel in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for channel in range(8):
        np.testing.assert_array_equal(
            found[channel], kept.explain(1, seed="abs", conditions=[{"layer3.0.conv2": [channel]}] * 2).heatmap
        )
    assert kept.forwards == 1


def test_results_on_the_device(shapes):
    explainer, x, kept = shapes
    question = {"conditions": [{"layer2.0.conv2": [c]} for c in range(3)], "record": ["layer2.0.conv2"], "seed": "abs"}
    one = explainer.at(x[:1])
    device, host = one.explain(1, return_ortvalue=True, **question), one.explain(1, **question)
    np.testing.assert_array_equal(device.relevance["input"].numpy(), host.relevance["input"][0])
    np.testing.assert_array_equal(device.activation["layer2.0.conv2"].numpy(), host.activation["layer2.0.conv2"])
    with pytest.raises(QuestionError, match="one run"):
        kept.explain(1, return_ortvalue=True, **question)


def test_warnings_and_errors(shapes):
    explainer, x, kept = shapes
    worst = int(explainer.explain(x[:1], 0, seed="abs").explained[0].argmin())
    with pytest.warns(NegativeLogitWarning):
        explainer.at(x[:1]).explain(worst)
    with pytest.raises(QuestionError, match=r"layer9"):
        kept.explain(1, conditions={"layer9": [1]})
    with pytest.raises(InputError, match="expected"):
        explainer.at(x[:, :1])


def test_where_there_is_no_forward_pass_to_keep():
    """Frames of two samples are merged for a convolution and parted again: axis 0 is no batch in between."""
    nodes = [
        helper.make_node("Reshape", ["x", "frames"], ["merged"]),
        helper.make_node("Conv", ["merged", "conv.weight"], ["z"]),
        helper.make_node("Reshape", ["z", "samples"], ["y"]),
    ]
    weights = {
        "frames": np.array([-1, 3, 4, 4]),
        "samples": np.array([-1, 10]),
        "conv.weight": np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "frames",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(QuestionError, match="no forward pass can be kept"):
        Explainer(model, "epsilon").at(np.ones((1, 2, 3, 4, 4), np.float32))


# --------------------------------------------------------------------------------------------- explain in stages, too


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Any model counts as light, and its messages of four questions fill the cache."""
    monkeypatch.setattr(relevance, "FEW", 10**9)
    monkeypatch.setattr(relevance, "ABOVE", 0)

    def of(explainer, x):
        largest = max(explainer._models.elements({next(iter(explainer.inputs)): x}).values())
        monkeypatch.setattr(relevance, "CACHE", 16 * largest)

    return of


@pytest.mark.parametrize("name", ["shapes", "ecg", "digits"])
@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_many_conditions_in_stages(name, bypass, few_at_a_time, monkeypatch):
    """The same answers as from whole relevance models, recorded layers and outputs among them."""
    path, layers = FIXTURES / name / "net.onnx", NETS[name]
    explainer = Explainer(path)
    ((_, shape),) = explainer.inputs.values()
    x = np.random.default_rng(0).uniform(0, 2, (2, *shape[1:])).astype(np.float32)
    conditions = [{layers[0]: [c % 3], layers[1]: [c]} for c in range(9)] + [{layers[1]: [c]} for c in range(7)] + [{}]
    question = {"conditions": conditions, "record": [layers[0]], "seed": "abs", "bypass": bypass}
    want = explainer.explain(x, [1, 2], **question)
    assert len(explainer._models.sessions()) == 3
    few_at_a_time(explainer, x)
    staged = Explainer(path)
    have = staged.explain(x, [1, 2], **question)
    assert {stages for _, stages in staged._models._programs} == {"one plan", ""}  # of the two with many questions
    assert have.relevance.keys() == want.relevance.keys()
    for name, R in want.relevance.items():
        assert np.linalg.norm(have.relevance[name] - R) <= 1e-5 * np.linalg.norm(R)
    np.testing.assert_allclose(have.explained, want.explained, rtol=1e-5)
    np.testing.assert_allclose(have.activation[layers[0]], want.activation[layers[0]], rtol=1e-4, atol=1e-5)


def test_a_few_at_a_time(few_at_a_time, monkeypatch):
    """Four questions in a run, as equally long as they can be, and one forward pass for each sample."""
    explainer = Explainer(FIXTURES / "ecg" / "net.onnx")
    x = np.random.default_rng(0).normal(size=(2, 1, 150)).astype(np.float32)
    few_at_a_time(explainer, x)
    ran: list[tuple[str, int]] = []

    def told(name):
        whole = getattr(Staged, name)

        def run(self, feeds, *rest):
            ran.append((name, max((len(v) for k, v in feeds.items() if k.startswith("mask.")), default=0)))
            return whole(self, feeds, *rest)

        monkeypatch.setattr(Staged, name, run)

    for name in ("forward", "same_for_all", "answer"):
        told(name)
    explainer.explain(x, 1, seed="abs", conditions=[{"6": [c]} for c in range(9)])
    assert ran == [("forward", 0), ("same_for_all", 0), ("answer", 3), ("answer", 3), ("answer", 3)] * 2
    ran.clear()
    explainer.at(x).explain(1, seed="abs", conditions=[{"6": [c]} for c in range(8)])
    assert [count for name, count in ran if name == "answer"] == [4, 4, 4, 4]


def test_when_stages_pay(few_at_a_time, tmp_path, monkeypatch):
    path = FIXTURES / "ecg" / "net.onnx"
    explainer = Explainer(path)
    feeds = {next(iter(explainer.inputs)): np.zeros((1, 1, 150), np.float32)}
    plan, early = (Plan(conditions=(layer,), inputs=tuple(explainer.facts.inputs)) for layer in ("6", "0"))
    assert not explainer._models.pays_in_stages(plan, feeds, 64)  # of so small a net all questions fit into the cache
    few_at_a_time(explainer, feeds["input"] if "input" in feeds else next(iter(feeds.values())))
    models = Explainer(path)._models
    assert models.pays_in_stages(plan, feeds, 5)
    assert not models.pays_in_stages(plan, feeds, 4)
    assert not Explainer(path, cache=tmp_path)._models.pays_in_stages(plan, feeds, 5)
    monkeypatch.setattr(relevance, "FEW", 1)
    assert not Explainer(path)._models.pays_in_stages(plan, feeds, 5)
    monkeypatch.setattr(relevance, "FEW", 10**9)
    monkeypatch.setattr(relevance, "ABOVE", 8)
    models = Explainer(path)._models
    assert models.at_once(early, feeds) > models.at_once(plan, feeds)  # its questions share a long way down
    assert not models.pays_in_stages(early, feeds, 64)


def test_multiplications_by_hand():
    """Conv 3 -> 8, 3 x 3 over [10, 12], depthwise, transposed 8 -> 4, 2 x 2, and dense."""
    text = """<ir_version: 8, opset_import: ["" : 18]> net (float[N, 3, 10, 12] x) => (float[N, 5] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, A)  b = Relu(a)  c = Conv <group = 8> (b, B)
        d = ConvTranspose <strides = [2, 2]> (c, D)  e = GlobalAveragePool(d)  f = Flatten(e)  y = MatMul(f, F) }"""
    model = onnx.parser.parse_model(text)
    shapes = {"A": (8, 3, 3, 3), "B": (8, 1, 3, 3), "D": (8, 4, 2, 2), "F": (4, 5)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    explainer = Explainer(model)
    found = explainer._models._multiplications({"x": np.zeros((1, 3, 10, 12), np.float32)})
    assert found == {"a": 8 * 120 * 27, "c": 8 * 80 * 9, "d": 8 * 80 * 16, "y": 20}


def test_a_profile_of_stages(few_at_a_time):
    """Nodes of all of them, as often as they run in a call."""
    explainer = Explainer(FIXTURES / "ecg" / "net.onnx")
    x = np.random.default_rng(0).normal(size=(1, 1, 150)).astype(np.float32)
    conditions = [{"6": [c]} for c in range(8)]
    whole = {node.name for node in explainer.profile(x, 1, seed="abs", calls=1, conditions=conditions)}
    few_at_a_time(explainer, x)
    staged = {node.name for node in explainer.profile(x, 1, seed="abs", calls=1, conditions=conditions)}
    backward = {name for name in whole if name.startswith("R/")}
    assert backward
    assert len(staged & backward) > 0.8 * len(backward)
