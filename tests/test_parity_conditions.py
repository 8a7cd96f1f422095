"""Oracles: zennit-crp (cut), masks hooked into zennit's float64 gradient (keep), a residual net written out in numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcrp import Explainer
from tests.support.cases import COMPOSITES, EXPORTERS, TOLERANCE


def check(parity, composite, bypass, exporter):
    from tests.support.parity import errors

    reference = parity.conditional(composite, bypass)
    record = parity.layers if bypass == "keep" else ()  # zennit-crp records after the mask
    result = parity.explainer(exporter, composite).explain(
        parity.x[:1], parity.targets[0], conditions=parity.conditions, bypass=bypass, record=record
    )
    worst = {name: float(errors(result.relevance[name][0], R, 1).max()) for name, R in reference.items()}
    print(f"PARITY {parity.name} {composite} {exporter} {bypass} {worst}")  # pytest -rP shows it
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_conditions_on_two_layers(parity, bypass, exporter):
    check(parity, COMPOSITES[0], bypass, exporter)


@pytest.mark.parametrize("parity", ["squeezenet1_1", "resnet18"], indirect=True, scope="session")
@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize("composite", COMPOSITES[1:])
def test_conditions_under_other_composites(parity, composite, bypass):
    check(parity, composite, bypass, EXPORTERS[0])


# ---- a residual net small enough to write out ------------------------------------------------------------------------


LENGTH, CLASSES, TARGET = 5, 3, 2
CHANNELS = {"c1": (2, 4), "c2": (4, 6), "c3": (6, 4), "c4": (4, 6), "c5": (6, 4)}  # in, out


class Residual:
    """x -> c1 -> relu -> [c2 relu c3] + skip -> relu -> [c4 relu c5] + skip -> relu -> fc, convolutions as matrices.

    Relevance in float64, on paper: flat for c1, z+ for the others, epsilon for fc, shares at the two sums.
    """

    def __init__(self):
        rng = np.random.default_rng(5)
        self.W = {name: rng.normal(size=(out, into, 3)) for name, (into, out) in CHANNELS.items()}
        self.b = {name: 0.3 * rng.normal(size=out) for name, (_, out) in CHANNELS.items()}
        self.W["fc"], self.b["fc"] = rng.normal(size=(CLASSES, 4 * LENGTH)), rng.normal(size=CLASSES)
        self.b["fc"][TARGET] += 5
        self.x = rng.normal(size=(2, LENGTH))

    def model(self) -> onnx.ModelProto:
        nodes, made = [], {}
        for name in (*CHANNELS, "fc"):
            made[f"{name}.weight"] = self.W[name].astype(np.float32)
            made[f"{name}.bias"] = self.b[name].astype(np.float32)

        def node(op, inputs, output, **attributes):
            nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"/{output}", **attributes))
            return output

        def conv(name, source):
            return node("Conv", [source, f"{name}.weight", f"{name}.bias"], name, kernel_shape=[3], pads=[1, 1])

        h = node("Relu", [conv("c1", "input")], "h0")
        for first, second, out in (("c2", "c3", "h1"), ("c4", "c5", "h2")):
            branch = conv(second, node("Relu", [conv(first, h)], f"{first}.relu"))
            h = node("Relu", [node("Add", [branch, h], f"{out}.add")], out)
        node("Gemm", [node("Flatten", [h], "flat"), "fc.weight", "fc.bias"], "logits", transB=1)
        tensor = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            nodes,
            "residual",
            [tensor("input", onnx.TensorProto.FLOAT, ["batch", 2, LENGTH])],
            [tensor("logits", onnx.TensorProto.FLOAT, ["batch", CLASSES])],
            [onnx.numpy_helper.from_array(array, name) for name, array in made.items()],
        )
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)

    def matrix(self, name: str) -> np.ndarray:
        """The convolution of width 3 and padding 1 as a matrix [out * L, in * L]."""
        W = self.W[name]
        M = np.zeros((W.shape[0], LENGTH, W.shape[1], LENGTH))
        for at in range(LENGTH):
            for tap in range(3):
                if 0 <= at + tap - 1 < LENGTH:
                    M[:, at, :, at + tap - 1] = W[:, :, tap]
        return M.reshape(W.shape[0] * LENGTH, W.shape[1] * LENGTH)

    def relevance(self, masks: dict[str, np.ndarray], cut: bool) -> dict[str, np.ndarray]:
        """{"input" and every layer: relevance}, that of a masked layer before its mask; masks {layer: [C]}."""
        M = {name: self.matrix(name) for name in CHANNELS}
        a, z = {"c1": self.x.ravel()}, {}

        def run(name, source):
            a[name] = source
            z[name] = M[name] @ source + np.repeat(self.b[name], LENGTH)
            return z[name]

        h0 = np.maximum(run("c1", a["c1"]), 0)
        branch1 = run("c3", np.maximum(run("c2", h0), 0))
        h1 = np.maximum(branch1 + h0, 0)
        branch2 = run("c5", np.maximum(run("c4", h1), 0))
        h2 = np.maximum(branch2 + h1, 0)
        logit = self.W["fc"][TARGET] @ h2 + self.b["fc"][TARGET]

        def stab(value):
            return value + 1e-6 * np.where(value >= 0, 1.0, -1.0)

        found = {}

        def back(name, R):
            """Through one convolution, its mask first: z+ (inputs are >= 0 here), flat for c1."""
            found[name] = R.reshape(-1, LENGTH)
            R = (found[name] * masks.get(name, np.ones(len(found[name])))[:, None]).ravel()
            if name == "c1":
                ones = (M[name] != 0).astype(float)
                return ones.T @ (R / stab(ones.sum(1)))
            plus = np.maximum(M[name], 0)
            bias = np.repeat(np.maximum(self.b[name], 0), LENGTH)
            return a[name] * (plus.T @ (R / stab(plus @ a[name] + bias)))

        def block(R, first, second, branch, skip):
            """Through relu(branch + skip); under cut a mask in the branch closes the skip."""
            share = R / stab(branch + skip)
            closed = cut and (first in masks or second in masks)
            inside = back(first, back(second, branch * share))
            return inside if closed else inside + skip * share

        R = h2 * self.W["fc"][TARGET] * logit / stab(logit)
        R = block(R, "c4", "c5", branch2, h1)
        R = block(R, "c2", "c3", branch1, h0)
        found["input"] = back("c1", R).reshape(self.x.shape)
        return found


def few(*channels):
    return np.isin(np.arange(6), channels).astype(float)


@pytest.fixture(scope="module")
def residual():
    return Residual()


@pytest.fixture(scope="module")
def explainer(residual):
    return Explainer(residual.model())


QUESTIONS = [
    {"c4": [0, 3], "c2": [1, 2, 5]},
    {"c4": [1]},
    {"c2": [0, 4]},
    {"c4": [], "c2": [1]},
    {"c4": {0: 0.5, 2: -2.0}, "c2": [1, 2, 5]},
]


@pytest.mark.parametrize("condition", QUESTIONS, ids=str)
@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_a_residual_net_written_out(residual, explainer, condition, bypass):
    masks = {}
    for layer, concepts in condition.items():
        masks[layer] = few(*concepts)
        for channel, weight in concepts.items() if isinstance(concepts, dict) else ():
            masks[layer][channel] = weight
    expected = residual.relevance(masks, cut=bypass == "cut")
    record = [*condition, "c5"]
    x = residual.x[None].astype(np.float32)
    result = explainer.explain(x, TARGET, conditions=[condition], bypass=bypass, record=record)
    for name in ["input", *record]:
        scale = max(np.linalg.norm(expected[name]), 1e-3)
        assert np.linalg.norm(result.relevance[name][0, 0] - expected[name]) < 1e-5 * scale, name


@pytest.mark.parametrize("layer", ["c2", "c3", "c4", "c5"])
@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_parts_of_a_layer_add_up(residual, explainer, layer, bypass):
    channels = CHANNELS[layer][1]
    parts = [list(range(0, channels, 3)), list(range(1, channels, 3)), list(range(2, channels, 3))]
    conditions = [{layer: part} for part in (*parts, [], list(range(channels)))]
    x = residual.x[None].astype(np.float32)
    R = explainer.explain(x, TARGET, conditions=conditions, bypass=bypass).relevance["input"][0]
    empty, whole = R[-2], R[-1]
    expected = residual.relevance({layer: np.ones(channels)} if bypass == "cut" else {}, cut=bypass == "cut")["input"]
    assert np.allclose(whole, expected, atol=1e-5 * np.abs(expected).max())
    assert np.allclose(R[:3].sum(0) - 2 * empty, expected, atol=1e-5 * np.abs(expected).max())
    if bypass == "cut":
        assert not empty.any()
