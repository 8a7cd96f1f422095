"""Oracles: LRP-epsilon written densely in numpy float64 on a small net; one question at a time in a plain loop; the
identities of partitions; the same calls one after the other instead of in threads. No stored results."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcrp import Explainer, NegativeLogitWarning
from onnxcrp.errors import CompositeError, InputError, QuestionError, UnsupportedError
from onnxcrp.result import channel_axis
from onnxcrp.run import Run

EPS = 1e-6
SIZES = (6, 5, 4, 3)


def make(nodes, inputs, outputs, weights, opset=18):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


# --- a dense net, and LRP-epsilon on it by hand -----------------------------------------------------------------------


class DenseNet:
    """fc1 - ReLU - fc2 - ReLU - fc3 with LRP-epsilon as its definition has it, in float64."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.W = [rng.normal(size=(out, size)) for size, out in itertools.pairwise(SIZES)]
        self.b = [0.1 * rng.normal(size=out) for out in SIZES[1:]]
        self.x = rng.normal(size=(4, SIZES[0])).astype(np.float32)

    def model(self):
        nodes, weights, last = [], {}, "x"
        for number, (W, b) in enumerate(zip(self.W, self.b, strict=True), 1):
            weights |= {f"fc{number}.weight": W, f"fc{number}.bias": b}
            nodes.append(
                helper.make_node("Gemm", [last, f"fc{number}.weight", f"fc{number}.bias"], [f"z{number}"], transB=1)
            )
            last = f"z{number}"
            if number < 3:
                nodes.append(helper.make_node("Relu", [last], [f"a{number}"]))
                last = f"a{number}"
        return make(nodes, [("x", TensorProto.FLOAT, ["N", SIZES[0]])], [("z3", ["N", SIZES[-1]])], weights)

    def forward(self, x):
        a, z = [x.astype(np.float64)], []
        for number, (W, b) in enumerate(zip(self.W, self.b, strict=True)):
            z.append(a[-1] @ np.float64(np.float32(W)).T + np.float64(np.float32(b)))
            a.append(np.maximum(z[-1], 0) if number < 2 else z[-1])
        return a, z

    def relevance(self, x, seed, *, masks=None, start=None):
        """Relevance [n, ...] at x, fc1, fc2, fc3 for one seed row each; masks {layer number: array}."""
        a, z = self.forward(x)
        top = 3 if start is None else start
        R, found = seed, {}
        for number in range(top, 0, -1):
            found[f"fc{number}"] = R
            R = R * (masks or {}).get(number, 1)
            W = np.float64(np.float32(self.W[number - 1]))
            s = R / (z[number - 1] + EPS * np.where(z[number - 1] >= 0, 1, -1))
            R = a[number - 1] * (s @ W)
        return found | {"x": R}


@pytest.fixture(scope="module")
def net():
    return DenseNet()


@pytest.fixture(scope="module")
def dense(net):
    return Explainer(net.model(), "epsilon")


def one_hot(index, count=SIZES[-1]):
    return np.eye(count)[index]


def ask(explainer, *args, **kwargs):
    """explain without the warning about negative logits, which random nets earn often."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NegativeLogitWarning)
        return explainer.explain(*args, **kwargs)


def close(have, want, tolerance=1e-4):
    want = np.asarray(want)
    assert have.shape == want.shape
    assert have.dtype == np.float32
    np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-9))


def test_batch_of_one_class(net, dense):
    result = ask(dense, net.x, 1, record=["fc1", "fc2"])
    z = net.forward(net.x)[1]
    want = net.relevance(net.x, z[2] * one_hot([1] * 4))
    for name in ("x", "fc1", "fc2"):
        close(result.relevance[name], want[name])
    close(result.output, z[2])
    close(result.explained, z[2])
    close(result.activation["fc1"], z[0])  # before the nonlinearity
    assert result.targets.tolist() == [1] * 4
    np.testing.assert_array_equal(result.heatmap, result.relevance["x"])


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (2, one_hot([2] * 4)),
        ((2,), one_hot([2] * 4)),
        ([0, 1, 2, 1], one_hot([0, 1, 2, 1])),
        (np.array([0, 1, 2, 1]), one_hot([0, 1, 2, 1])),
        ({0: 1, 2: -0.5}, np.tile([1, 0, -0.5], (4, 1))),
        (np.array([0.5, 0.1, -2.0]), np.tile([0.5, 0.1, -2.0], (4, 1))),
        (np.arange(12.0).reshape(4, 3), np.arange(12.0).reshape(4, 3)),
    ],
)
@pytest.mark.parametrize("seed", [None, "output", "abs", "one"])
def test_targets_and_seeds(net, dense, target, weights, seed):
    z = net.forward(net.x)[1][2]
    factor = {None: z, "output": z, "abs": np.abs(z), "one": 1.0}[seed]
    result = ask(dense, net.x, target, seed=seed)
    close(result.relevance["x"], net.relevance(net.x, weights * factor)["x"])


def test_top_and_top_k(net, dense):
    z = net.forward(net.x)[1][2]
    order = np.argsort(-z, axis=1)
    top = ask(dense, net.x, "top")
    assert top.targets.tolist() == order[:, 0].tolist()
    close(top.relevance["x"], net.relevance(net.x, z * one_hot(order[:, 0]))["x"])
    top2 = ask(dense, net.x, "top2", record="fc1")
    np.testing.assert_array_equal(top2.targets, order[:, :2])
    assert top2.relevance["x"].shape == (4, 2, 6)
    assert top2.activation["fc1"].shape == (4, 5)
    for k in range(2):
        want = net.relevance(net.x, z * one_hot(order[:, k]))
        close(top2.relevance["x"][:, k], want["x"])
        close(top2.relevance["fc1"][:, k], want["fc1"])


def test_a_seed_array_is_used_as_it_is(net, dense):
    seed = np.random.default_rng(3).normal(size=(4, 3))
    close(ask(dense, net.x, seed=seed).relevance["x"], net.relevance(net.x, np.float32(seed))["x"])


CONDITIONS = [
    {"fc2": [1]},
    {"fc2": [0, 3], "fc1": [2]},
    {},
    {"fc1": {0: 0.5, 4: -2}},
    {"fc2": []},
    {"y": 2, "fc2": [1, 2]},
    {"fc2": np.array([0.1, 0.2, 0.3, 0.4])},
    {"y": {0: 1, 1: -1}},
    {"y": "top", "fc1": [1, 2, 3]},
]


def masks_of(condition):
    masks = {}
    for layer, concepts in condition.items():
        if layer == "y":
            continue
        mask = np.zeros(SIZES[int(layer[2])])
        if isinstance(concepts, np.ndarray):
            mask[:] = concepts
        else:
            for channel in concepts:
                mask[channel] = concepts[channel] if isinstance(concepts, dict) else 1
        masks[int(layer[2])] = mask
    return masks


def weights_of(condition, z, default):
    own = condition.get("y", default)
    if isinstance(own, dict):
        return np.tile([own.get(k, 0) for k in range(3)], (len(z), 1))
    return one_hot(z.argmax(1)) if own == "top" else one_hot([own] * len(z))


@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize("memory_limit", [2 << 30, 1])
def test_conditions_in_the_order_asked(net, bypass, memory_limit):
    """In a chain nothing goes round, so cut and keep are the same."""
    explainer = Explainer(net.model(), "epsilon", memory_limit=memory_limit)
    z = net.forward(net.x)[1][2]
    result = ask(explainer, net.x, 1, conditions=CONDITIONS, bypass=bypass, record=["fc1"])
    assert result.relevance["x"].shape == (4, len(CONDITIONS), 6)
    assert result.heatmap.shape == (4, len(CONDITIONS), 6)
    assert result.explained.shape == (4, 3)
    for number, condition in enumerate(CONDITIONS):
        want = net.relevance(net.x, z * weights_of(condition, z, 1), masks=masks_of(condition))
        close(result.relevance["x"][:, number], want["x"])
        close(result.relevance["fc1"][:, number], want["fc1"])  # recorded before the mask


def test_one_condition_has_no_axis_of_its_own(net, dense):
    alone = ask(dense, net.x, 1, conditions={"fc2": [1]})
    listed = ask(dense, net.x, 1, conditions=[{"fc2": [1]}])
    assert alone.relevance["x"].shape == (4, 6)
    np.testing.assert_allclose(listed.relevance["x"], alone.relevance["x"][:, None], rtol=1e-5, atol=1e-6)


def test_masks_of_their_own_for_every_sample(net, dense):
    mask = np.random.default_rng(5).normal(size=(4, 4))
    z = net.forward(net.x)[1][2]
    want = net.relevance(net.x, z * one_hot([0] * 4), masks={2: np.float32(mask)})
    result = ask(dense, net.x, 0, conditions=[{"fc2": mask}, {"fc2": [1]}])
    close(result.relevance["x"][:, 0], want["x"])


def test_pairwise(net, dense):
    z = net.forward(net.x)[1][2]
    asked = [CONDITIONS[0], CONDITIONS[1], CONDITIONS[5], {"fc2": [3]}]
    result = ask(dense, net.x, [0, 1, 0, 2], conditions=asked, pairwise=True)
    assert result.relevance["x"].shape == (4, 6)
    assert result.targets.tolist() == [0, 1, 2, 2]
    for row, condition in enumerate(asked):
        default = [0, 1, 0, 2][row]
        seed = (z * weights_of(condition, z, default))[row : row + 1]
        want = net.relevance(net.x[row : row + 1], seed, masks=masks_of(condition))["x"]
        close(result.relevance["x"][row : row + 1], want)


def test_hidden_starts(net, dense):
    z = net.forward(net.x)[1][1]
    pick = np.array([0, 1, 0, 0.5])
    begin = {"fc2": {1: 1.0, 3: 0.5}}
    close(
        ask(dense, net.x, start=begin).relevance["x"],
        net.relevance(net.x, np.maximum(z, 0) * pick, start=2)["x"],  # only a ReLU reads fc2
    )
    close(
        ask(dense, net.x, start=begin, start_from="one").relevance["x"],
        net.relevance(net.x, 0 * z + pick, start=2)["x"],
    )
    top = net.forward(net.x)[1][2]
    close(
        ask(dense, net.x, 1, start=begin, start_from="relevance").relevance["x"],
        net.relevance(net.x, top * one_hot([1] * 4), masks={2: pick})["x"],
    )
    several = ask(dense, net.x, start=[begin, {"fc1": [0]}, {"fc2": [2], "fc1": [1]}], conditions={"fc1": [0, 1]})
    assert several.targets is None
    assert several.relevance["x"].shape == (4, 3, 6)
    lower = np.array([1, 1, 0, 0, 0])
    want = net.relevance(net.x, np.maximum(z, 0) * pick, start=2, masks={1: lower})["x"]
    close(several.relevance["x"][:, 0], want)


def test_start_and_conditions_pair_up(net, dense):
    result = ask(dense, net.x, start=[{"fc2": [0]}, {"fc2": [1]}], conditions=[{"fc1": [1]}, {}])
    for number, (start, condition) in enumerate([({"fc2": [0]}, {"fc1": [1]}), ({"fc2": [1]}, {})]):
        single = ask(dense, net.x, start=start, conditions=condition)
        np.testing.assert_allclose(result.relevance["x"][:, number], single.relevance["x"], rtol=1e-5, atol=1e-6)


def test_negative_logits_warn(net, dense):
    z = net.forward(net.x)[1][2]
    row, column = np.argwhere(z < 0)[0]
    with pytest.warns(NegativeLogitWarning, match=rf"target {column} is negative.*signs") as caught:
        dense.explain(net.x[row : row + 1], int(column))
    assert caught[0].filename == __file__
    for seed in ("abs", "one"):
        dense.explain(net.x[row : row + 1], int(column), seed=seed)
    row, column = np.argwhere(z > 0)[0]
    dense.explain(net.x[row : row + 1], int(column))


def test_what_warns_is_the_weighted_sum(net, dense):
    z = net.forward(net.x)[1][2]
    row = next(r for r in range(len(z)) if z[r].min() < 0 < z[r].max())
    x, low, high = net.x[row : row + 1], int(z[row].argmin()), int(z[row].argmax())
    dense.explain(x, {high: 1, low: -1})  # warnings are errors
    factor = 1 + abs(float(z[row, low] / z[row, high]))
    dense.explain(x, {high: factor, low: 1})
    value = float(z[row, low] - z[row, high])
    with pytest.warns(NegativeLogitWarning) as caught:
        dense.explain(x, conditions=[{"y": {low: 1, high: -1}}, {"y": low}, {"y": low, "fc1": [0]}])
    told = [re.findall(r"target (\S+) is negative \((\S+), sample 0\)", str(each.message)) for each in caught]
    contrast = f"{low}-{high}"
    assert told == [
        [(contrast, f"{value:.3g}")],
        [(str(low), f"{z[row, low]:.3g}")],
    ]  # a target under several conditions is named once


def test_only_what_is_wanted(net, dense):
    result = ask(dense, net.x, 1, inputs=(), record=["fc2"], conditions=[{"fc2": [1]}])
    assert set(result.relevance) == {"fc2"}
    with pytest.raises(QuestionError, match="no heatmap"):
        _ = result.heatmap


# --- a convolutional net with a skip connection -----------------------------------------------------------------------


def residual_net(batch="N", size=7):
    rng = np.random.default_rng(1)

    def conv(out, channels):
        return rng.normal(size=(out, channels, 3, 3)) / 3

    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["z1"], pads=[1] * 4),
        helper.make_node("Relu", ["z1"], ["a1"]),
        helper.make_node("Conv", ["a1", "conv2.weight", "conv2.bias"], ["z2"], pads=[1] * 4),
        helper.make_node("Relu", ["z2"], ["a2"]),
        helper.make_node("Conv", ["a2", "conv3.weight", "conv3.bias"], ["z3"], pads=[1] * 4),
        helper.make_node("Add", ["a1", "z3"], ["sum"], name="sum"),
        helper.make_node("Relu", ["sum"], ["a3"]),
        helper.make_node("GlobalAveragePool", ["a3"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    weights = {
        "conv1.weight": conv(4, 3),
        "conv2.weight": conv(4, 4),
        "conv3.weight": conv(4, 4),
        "fc.weight": rng.normal(size=(5, 4)),
    }
    weights |= {f"{name}.bias": 0.05 * rng.normal(size=4) for name in ("conv1", "conv2", "conv3")}
    weights["fc.bias"] = np.abs(rng.normal(size=5))
    return make(nodes, [("x", TensorProto.FLOAT, [batch, 3, size, size])], [("logits", [batch, 5])], weights)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(2).normal(size=(3, 3, 7, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def residual():
    return Explainer(residual_net(), "epsilon_plus_flat")


MANY = [
    {"conv2": [0]},
    {"conv3": [1]},
    {"conv2": [1, 3]},
    {},
    {"conv3": [2], "conv2": {1: 0.5}},
    {"conv2": np.random.default_rng(9).normal(size=(1, 1, 7, 7))},
    {"conv2": [2], "y": 4},
    {"sum": [1]},
    {"conv2": [2], "y": "top"},
]


@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize("memory_limit", [2 << 30, 60_000, 1])
def test_many_questions_equal_one_at_a_time(residual, image, bypass, memory_limit):
    explainer = Explainer(residual_net(), "epsilon_plus_flat", memory_limit=memory_limit)
    record = ["conv1"] if bypass == "cut" else ["conv1", "sum"]
    many = ask(explainer, image, 2, conditions=MANY, bypass=bypass, record=record)
    for row in range(3):
        for number, condition in enumerate(MANY):
            one = ask(residual, image[row : row + 1], 2, conditions=condition, bypass=bypass, record=record)
            for name in ("x", *record):
                close(many.relevance[name][row : row + 1, number], one.relevance[name], 1e-5)
            np.testing.assert_array_equal(many.activation["conv1"][row], one.activation["conv1"][0])
            assert many.targets[row, number] == one.targets[0]


@pytest.mark.parametrize("chunk", [3, 1])
def test_batches_equal_one_sample_at_a_time(residual, image, chunk):
    explainer = Explainer(residual_net(), "epsilon_plus_flat", memory_limit=(1 << 30) if chunk == 3 else 1)
    together = ask(explainer, image, [0, 3, 2], record=["conv2"])
    for row in range(3):
        alone = ask(residual, image[row : row + 1], [0, 3, 2][row], record=["conv2"])
        close(together.relevance["x"][row : row + 1], alone.relevance["x"], 1e-5)
        close(together.relevance["conv2"][row : row + 1], alone.relevance["conv2"], 1e-5)
    assert together.heatmap.shape == (3, 7, 7)
    np.testing.assert_allclose(together.heatmap, together.relevance["x"].sum(1), rtol=1e-6)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3", "sum"])
def test_partitions(residual, image, layer):
    parts = [{layer: [0, 3]}, {layer: [1]}, {layer: [2]}]
    full = {layer: range(4)}
    cut = ask(residual, image, 1, conditions=[*parts, full]).relevance["x"]
    close(cut[:, :3].sum(1), cut[:, 3], 1e-5)
    keep = ask(residual, image, 1, conditions=[*parts, {layer: []}, {}], bypass="keep").relevance["x"]
    close(keep[:, :3].sum(1) - 2 * keep[:, 3], keep[:, 4], 1e-5)
    if layer in ("conv1", "sum"):  # nothing goes round these
        close(cut[:, 3], keep[:, 4], 1e-5)


def test_permuted_conditions_permute_results(residual, image):
    order = np.random.default_rng(4).permutation(len(MANY))
    straight = ask(residual, image, 1, conditions=MANY)
    shuffled = ask(residual, image, 1, conditions=[MANY[at] for at in order])
    np.testing.assert_allclose(shuffled.heatmap, straight.heatmap[:, order], rtol=1e-4, atol=1e-6)


def test_threads_equal_one_after_the_other(image):
    explainer = Explainer(residual_net(), "epsilon_plus_flat")  # a fresh one: compiling races too
    calls = [(row, number, bypass) for row in range(3) for number in range(len(MANY)) for bypass in ("cut", "keep")]

    def answer(call, source=explainer):
        row, number, bypass = call
        return source.explain(image[row : row + 1], 1, conditions=MANY[number], bypass=bypass, seed="one").relevance[
            "x"
        ]

    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(answer, calls))
    again = Explainer(residual_net(), "epsilon_plus_flat")
    for call, found in zip(calls, threaded, strict=True):
        np.testing.assert_allclose(found, answer(call, again), rtol=1e-4, atol=1e-6)


def test_a_relevance_model_is_compiled_once(image, monkeypatch):
    import onnxcrp.backward

    compiled, real = [], onnxcrp.backward.compile

    def counted(*args, **kwargs):
        compiled.append(kwargs["conditions"])
        return real(*args, **kwargs)

    monkeypatch.setattr(onnxcrp.backward, "compile", counted)
    explainer = Explainer(residual_net())
    start = threading.Barrier(4)

    def together(_):
        start.wait()
        return explainer.explain(image, 1, conditions=[{"conv2": [1]}, {"conv3": [0]}, {"conv2": [3]}], seed="one")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(together, range(4)))
    assert sorted(compiled) == [("conv2",), ("conv3",)]
    small = Explainer(residual_net(), cache_limit=1)
    for _ in range(2):
        small.explain(image, 1, conditions=[{"conv2": [1]}, {"conv3": [0]}], seed="one")
    assert len(compiled) == 6


def test_stream_gives_the_same_in_parts(residual, image):
    whole = ask(residual, image, 1, conditions=MANY, record=["conv1"], seed="one")
    size = whole.relevance["x"][:, 0].nbytes + whole.relevance["conv1"][:, 0].nbytes
    explainer = Explainer(residual_net(), memory_limit=2 * size)
    parts = list(explainer.stream(image, 1, conditions=iter(MANY), record=["conv1"], seed="one"))
    assert [len(part.conditions) for part in parts] == [2, 2, 2, 2, 1]
    close(np.concatenate([part.relevance["conv1"] for part in parts], 1), whole.relevance["conv1"], 1e-5)
    rows = list(Explainer(residual_net(), memory_limit=1).stream(image, [0, 1, 2], seed="one"))
    assert [part.targets.tolist() for part in rows] == [[0], [1], [2]]
    with pytest.raises(QuestionError, match="list of conditions"):
        next(residual.stream(image, 1, conditions={"conv2": [1]}))


def test_stream_cuts_what_belongs_to_single_samples(residual, image):
    """The answer in one piece is the oracle: starts, seeds and targets of a sample go with the sample."""
    rng = np.random.default_rng(6)
    own, common = rng.random((3, 4, 1, 1)).astype(np.float32), np.ones((4, 1, 1), np.float32)
    small = Explainer(residual_net(), memory_limit=1)
    for question in (
        {"start": {"conv2": own}},
        {"start": [{"conv2": own}, {"conv2": common}, {"conv2": [1]}], "start_from": "one"},
        {"target": [0, 1, 2], "start": {"conv2": own}, "start_from": "relevance", "seed": "one"},
        {"seed": rng.random((3, 5))},
        {"target": np.array([2, 0, 1]), "seed": "one"},
    ):
        whole = ask(residual, image, **question).relevance["x"]
        parts = list(small.stream(image, **question))
        assert len(parts) == 3
        close(np.concatenate([part.relevance["x"] for part in parts]), whole, 1e-5)
    five, weights = image[[0, 1, 2, 0, 1]], np.arange(5)  # one weight per class, though there are as many samples
    parts = list(small.stream(five, seed=weights))
    close(np.concatenate([p.relevance["x"] for p in parts]), ask(residual, five, seed=weights).relevance["x"], 1e-5)


def test_the_result_file(residual, image, tmp_path):
    result = ask(residual, image, 1, conditions=[{"conv2": [1]}, {"conv2": {3: 0.5}, "y": 2}], record=["conv1"])
    result.save(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert set(file) == {
            "heatmap",
            "output",
            "explained",
            "targets",
            "conditions",
            "relevance/x",
            "relevance/conv1",
            "activation/conv1",
        }
        np.testing.assert_array_equal(file["relevance/x"], result.relevance["x"])
        np.testing.assert_array_equal(file["targets"], [[1, 2]] * 3)
        assert json.loads(str(file["conditions"])) == [{"conv2": [1]}, {"conv2": {"3": 0.5}, "y": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]
    ask(residual, image, {0: 1, 2: -1}).save(tmp_path / "contrast.npz")
    with np.load(tmp_path / "contrast.npz", allow_pickle=False) as file:
        assert json.loads(str(file["targets"])) == [{"0": 1.0, "2": -1.0}] * 3


def test_layers_and_inspect(residual):
    layers = {layer.name: layer for layer in residual.layers}
    assert layers["conv2"].channels == 4
    assert layers["conv2"].shape[1:] == (4, 7, 7)
    assert [layers[name].rule for name in ("conv1", "conv2", "sum", "fc")] == ["flat", "zplus", "norm", "epsilon"]
    assert [layers[name].depth for name in ("conv1", "conv2", "conv3", "fc")] == [1, 2, 3, 4]
    facts = json.loads(json.dumps(residual.inspect()))
    assert facts["shares_forward"] is True
    assert facts["inputs"]["x"]["dtype"] == "float32"
    assert facts["inputs"]["x"]["shape"][1:] == [3, 7, 7]
    assert [layer["name"] for layer in facts["layers"]] == [layer.name for layer in residual.layers]
    assert facts["unsupported"] == []


def test_results_on_the_device(residual, image):
    for asked in ({"conditions": MANY[:1] * 2}, {}):
        x = image[:1] if asked else image
        device = residual.explain(x, 1, return_ortvalue=True, record=["conv1"], **asked)
        host = ask(residual, x, 1, record=["conv1"], **asked)
        for name in ("x", "conv1"):
            np.testing.assert_array_equal(
                np.broadcast_to(device.relevance[name].numpy(), host.relevance[name].shape), host.relevance[name]
            )
    with pytest.raises(QuestionError, match="one run"):
        residual.explain(image, 1, conditions=MANY, return_ortvalue=True)


# --- other models -----------------------------------------------------------------------------------------------------


def two_inputs():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["a", "left.weight", "left.bias"], ["za"], transB=1),
        helper.make_node("Gemm", ["b", "right.weight"], ["zb"], transB=1),
        helper.make_node("Add", ["za", "zb"], ["both"], name="both"),
        helper.make_node("Relu", ["both"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "head.weight"], ["y"], transB=1),
        helper.make_node("Softmax", ["y"], ["p"], axis=1),
    ]
    weights = {
        "left.weight": rng.normal(size=(4, 3)),
        "left.bias": rng.normal(size=4),
        "right.weight": rng.normal(size=(4, 2)),
        "head.weight": rng.normal(size=(3, 4)),
    }
    inputs = [("a", TensorProto.FLOAT, ["N", 3]), ("b", TensorProto.FLOAT, ["N", 2])]
    return make(nodes, inputs, [("p", ["N", 3])], weights), weights


def test_two_inputs_and_a_softmax():
    model, weights = two_inputs()
    rng = np.random.default_rng(1)
    x = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(2, 2))}
    result = ask(Explainer(model, "epsilon"), x, 0)
    W, V, H = (weights[f"{name}.weight"] for name in ("left", "right", "head"))
    za, zb = x["a"] @ W.T + weights["left.bias"], x["b"] @ V.T
    hidden = np.maximum(za + zb, 0)
    logits = hidden @ H.T
    close(result.explained, logits)
    close(result.output, np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    share = hidden * H[0]  # of logit 0; epsilon is too small to see, so s = 1 at the top
    s = share / (za + zb)
    close(result.relevance["b"], x["b"] * (s @ V), 1e-3)
    close(result.relevance["a"], x["a"] * (s @ W), 1e-3)
    only = ask(Explainer(model, "epsilon", inputs=["b"]), x, 0)
    assert set(only.relevance) == {"b"}
    close(only.relevance["b"], result.relevance["b"], 1e-5)


def test_a_batch_that_cannot_be_freed():
    """Constants of batch 2 that a transposed Reshape would have to guess: samples run two by two."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Add", ["x", "shift"], ["moved"], name="moved"),
        helper.make_node("Gemm", ["moved", "fc.weight"], ["y"], transB=1),
    ]
    weights = {"shift": rng.normal(size=(2, 3)), "fc.weight": rng.normal(size=(4, 3))}
    model = make(nodes, [("x", TensorProto.FLOAT, [2, 3])], [("y", [2, 4])], weights)
    explainer = Explainer(model, "epsilon")
    if explainer.canonical.batch != "fixed":
        pytest.skip("canonize freed it")
    x = rng.normal(size=(5, 3)).astype(np.float32)
    result = ask(explainer, x, 1, conditions=[{}, {"moved": [0, 2]}])
    moved = x + weights["shift"][[0, 1, 0, 1, 0]]
    close(result.explained, moved @ weights["fc.weight"].T)
    want = weights["fc.weight"][1] * x  # of z = w (x + shift), relevance z: what the shift adds stays with it
    close(result.relevance["x"][:, 0], want, 1e-3)
    close(result.relevance["x"][:, 1], want * [1, 0, 1], 1e-3)


def test_concepts_of_tokens_are_on_the_last_axis():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "fc1.weight"], ["z1"]),
        helper.make_node("Relu", ["z1"], ["a1"]),
        helper.make_node("MatMul", ["a1", "fc2.weight"], ["z2"]),
    ]
    weights = {"fc1.weight": rng.normal(size=(3, 4)), "fc2.weight": rng.normal(size=(4, 2))}
    model = make(nodes, [("x", TensorProto.FLOAT, ["N", 5, 3])], [("z2", ["N", 5, 2])], weights)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    hidden = np.maximum(x @ weights["fc1.weight"], 0)
    share = np.zeros_like(hidden)
    share[:, 4] = hidden[:, 4] * weights["fc2.weight"][:, 1]  # of the logit (4, 1)
    share *= [0, 1, 0, 0.5]
    s = np.divide(share, hidden, out=np.zeros_like(share), where=hidden > 0)
    want = x * (s @ weights["fc1.weight"].T)
    explainer = Explainer(model, "epsilon")
    close(ask(explainer, x, (4, 1), conditions={"fc1": {1: 1, 3: 0.5}}).relevance["x"], want, 1e-3)
    close(ask(explainer, x, (4, 1), conditions={"fc1": {1: 1, 3: 0.5}}).heatmap, want.sum(2), 1e-3)


def test_inspect_a_model_that_cannot_be_explained():
    nodes = [
        helper.make_node("Det", ["x"], ["largest"], name="largest"),
        helper.make_node("Relu", ["largest"], ["y"]),
    ]
    model = make(nodes, [("x", TensorProto.FLOAT, ["N", 3, 3])], [("y", ["N"])], {})
    explainer = Explainer(model, "epsilon")
    assert [layer["op"] for layer in explainer.inspect()["unsupported"]] == ["Det"]
    with pytest.raises(UnsupportedError, match="Det"):
        explainer.explain(np.ones((1, 3, 3), np.float32), 0)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 7, 7), np.uint8), "input x is uint8, expected float32.*raw pixels"),
        (np.zeros((2, 3, 7, 7), np.int64), "input x is int64, expected float32"),
        (np.zeros((3, 7, 7), np.float32), r"shape \[3, 7, 7\], expected \[B, 3, 7, 7\].*batch axis is missing"),
        (np.zeros((2, 7, 7, 3), np.float32), r"shape \[2, 7, 7, 3\].*channels first.*moveaxis\(x, -1, 1\)"),
        (np.zeros((2, 3, 7, 8), np.float32), r"expected \[B, 3, 7, 7\]"),
        (np.zeros((0, 3, 7, 7), np.float32), "no samples"),
        (np.full((1, 3, 7, 7), np.nan), r"147 values that are NaN or infinite, the first at \[0, 0, 0, 0\]"),
        (np.full((1, 3, 7, 7), 1e300), "NaN or infinite"),
        ({"y": 1}, "no input 'y', expected x"),
        ({}, "no value for the model's input 'x'"),
        ("cat.png", "input x"),
        ([[1.0], [1.0, 2.0]], "input x"),
        (None, "input x"),
    ],
)
def test_inputs_that_do_not_fit(residual, x, message):
    with pytest.raises(InputError, match=message) as caught:
        residual.explain(x, 1)
    assert "\n" not in str(caught.value)


def test_inputs_of_different_batches_or_missing():
    model, _ = two_inputs()
    explainer = Explainer(model)
    with pytest.raises(InputError, match="number of samples: a 2, b 1"):
        explainer.explain({"a": np.zeros((2, 3)), "b": np.zeros((1, 2))}, 1)
    with pytest.raises(InputError, match="2 inputs: a, b"):
        explainer.explain(np.zeros((2, 3)), 1)


def test_float64_is_taken(residual, image):
    np.testing.assert_array_equal(
        ask(residual, image.astype(np.float64), 1).relevance["x"], ask(residual, image, 1).relevance["x"]
    )


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"target": None}, "no target"),
        ({"target": 5}, r"class 5 is out of range, the explained output has 0\.\.4"),
        ({"target": [1, 2]}, "2 targets for 3 samples"),
        ({"target": 1, "conditions": [{"conv9": [1]}]}, "no layer 'conv9'.*conv"),
        ({"target": 1, "conditions": [{"conv2": [4]}]}, "layer conv2: channel 4 is out of range, it has 4 channels"),
        (
            {"target": 1, "conditions": [{"conv2": np.ones((2, 4, 1, 1))}]},
            "axis 0 .* 1 or the number of samples, 3, got 2",
        ),
        ({"target": 1, "conditions": []}, "empty list"),
        ({"target": 1, "conditions": ["conv2"]}, "each must be"),
        ({"target": 1, "conditions": "conv2=1"}, "list of them"),
        ({"target": 1, "conditions": [{"conv2": [1], "z2": [2]}]}, "conv2 appears twice.*z2"),
        ({"target": "top2", "conditions": [{"conv2": [1]}]}, "questions of its own"),
        ({"target": 1, "conditions": [{"conv2": [1], "y": "top2"}]}, "one target"),
        ({"target": 1, "record": ["nothing"]}, "no layer 'nothing'"),
        ({"target": 1, "seed": "logit"}, "seed must be one of output, abs, one"),
        ({"target": 1, "seed": np.ones((3, 5))}, "leave out target"),
        ({"seed": np.ones((3, 4))}, "do not fit"),
        ({"target": 1, "bypass": "around"}, "bypass must be one of"),
        ({"target": 1, "inputs": ["z"]}, "does not reach an input 'z'"),
        ({"target": 1, "conditions": [{}], "pairwise": True}, "3 samples, 1 conditions"),
        ({"target": 1, "start": {"conv2": [1]}}, "neither target nor seed"),
        ({"start": {}}, "nothing to begin at"),
        ({"start": []}, "nothing is asked"),
        ({"target": 1, "start_from": "one"}, "needs start"),
        ({"start": {"conv2": [1]}, "start_from": "end"}, "start_from must be one of"),
        ({"start": {"conv2": [1]}, "conditions": {"y": 1}}, "hidden start has no target"),
        ({"target": 1, "start": {"conv2": [1]}, "start_from": "relevance", "bypass": "keep"}, '"cut"'),
        ({"start": [{"conv2": [1]}] * 2, "conditions": [{}] * 3}, "2 starts and 3 conditions"),
        ({"target": 1, "conditions": [{"conv1": [1], "fc": [1]}], "record": ["conv9"]}, "conv9"),
    ],
)
def test_questions_that_make_no_sense(residual, image, question, message):
    with pytest.raises(QuestionError, match=message) as caught:
        ask(residual, image, **question)
    assert "\n" not in str(caught.value)


def test_bounds_of_the_input_are_asked_for_and_taken(image):
    box = Explainer(residual_net(), "epsilon_gamma_box")
    with pytest.raises(CompositeError, match=r"low and high.*epsilon_gamma_box\(low=\.\.\., high=\.\.\.\)"):
        ask(box, image, 1)
    assert [layer.rule for layer in box.layers if layer.name in ("conv1", "conv2")] == [None, "gamma"]

    class Preprocessing:
        low, high = (-9.0, -8.0, -7.0), (7.0, 8.0, 9.0)

    named = Explainer(residual_net(), "epsilon_gamma_box(low=[-9, -8, -7], high=[7, 8, 9])")
    want = ask(named, image, 1).heatmap
    filled = Explainer(residual_net(), "epsilon_gamma_box", preprocessing=Preprocessing())
    np.testing.assert_array_equal(ask(filled, image, 1).heatmap, want)
    direct = Explainer(residual_net(), "epsilon_gamma_box", low=Preprocessing.low, high=Preprocessing.high)
    np.testing.assert_array_equal(ask(direct, image, 1).heatmap, want)
    unused = Explainer(residual_net(), "epsilon", low=0, high=1)  # the same call serves every composite
    assert unused.composite.name == "epsilon"


def test_pixels_bound_themselves():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "conv.weight"], ["z"]),
        helper.make_node("GlobalAveragePool", ["z"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["y"]),
    ]
    weights = {"conv.weight": rng.normal(size=(2, 3, 3, 3))}
    model = make(nodes, [("x", TensorProto.UINT8, ["N", 3, 5, 5])], [("y", ["N", 2])], weights)
    explainer = Explainer(model, "epsilon_gamma_box")
    assert explainer.composite.name == "epsilon_gamma_box(low=0.0, high=255.0)"
    x = rng.integers(0, 256, size=(2, 3, 5, 5))
    result = ask(explainer, x.astype(np.uint8), 0)
    np.testing.assert_array_equal(ask(explainer, x, 0).heatmap, result.heatmap)  # whole numbers that fit are taken
    assert result.heatmap.shape == (2, 5, 5)
    with pytest.raises(InputError, match=r"uint8 goes from 0 to 255"):
        explainer.explain(x + 1, 0)
    with pytest.raises(InputError, match=r"float64, expected uint8.*pixels 0\.\.255"):
        explainer.explain(x / 255, 0)


# --- small things -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3, 8, 8), 1),
        ((2, 8, 8, 3), 3),
        ((2, 1, 150), 1),
        ((2, 150, 1), 2),
        ((2, 3, 8, 4), 1),
        ((2, 10), None),
        ((2,), None),
    ],
)
def test_channel_axis(shape, axis):
    assert channel_axis(shape) == axis


def test_import_is_cheap():
    code = (
        "import sys, time; start = time.perf_counter(); import onnxcrp; spent = time.perf_counter() - start;"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'matplotlib', 'rich', 'onnx_graphsurgeon'} & set(sys.modules);"
        "assert not heavy, heavy; assert spent < 0.1, spent; assert onnxcrp.__version__; onnxcrp.Explainer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_named_is_there():
    import onnxcrp

    for name in onnxcrp.__all__:
        assert getattr(onnxcrp, name) is not None
    assert set(onnxcrp.__all__) <= set(dir(onnxcrp))
    with pytest.raises(AttributeError, match="nothing"):
        _ = onnxcrp.nothing


def test_the_model_itself_is_not_changed(image):
    model = residual_net()
    before = model.SerializeToString(deterministic=True)
    ask(Explainer(model), image, "top", conditions=MANY)
    assert model.SerializeToString(deterministic=True) == before
    assert onnx.ModelProto.FromString(before) == model


def test_another_composite_keeps_model_and_options():
    net = Path(__file__).parent.parent / "fixtures/digits/net.onnx"
    explainer = Explainer(net, "epsilon", output="logits", threads=1, memory_limit=10**6)
    other = explainer.under("flat")
    assert other.canonical is explainer.canonical
    assert (other.composite.name, other.memory_limit) == ("flat", 10**6)
    x = np.random.default_rng(0).normal(0, 1, (1, 1, 32, 32)).astype(np.float32)
    expected = Explainer(net, "flat").explain(x, 3)
    np.testing.assert_array_equal(other.explain(x, 3).heatmap, expected.heatmap)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_on_a_device_all_runs_are_equally_long(residual, image, count):
    """The last one reaches back; answers are those of one run."""
    conditions = [{"conv1": [c % 3]} for c in range(count)]
    want = ask(residual, image, 1, conditions=conditions)
    explainer = Explainer(residual_net(), "epsilon_plus_flat")
    explainer._models.on_device = True
    each = Run(explainer._models, {"x": image}, len(image), 1)
    for limit in range(1, count + 1):
        each.memory_limit = limit
        runs = list(each._chunks(range(count), 1))
        assert len({len(run) for run in runs}) == 1
        assert len(runs[0]) <= limit
        assert sorted({entry for run in runs for entry in run}) == list(range(count))
    assert list(each._chunks([], 1)) == []
    for limit in (1, 20_000, 40_000):
        explainer.memory_limit = limit
        close(ask(explainer, image, 1, conditions=conditions).relevance["x"], want.relevance["x"], 1e-5)
