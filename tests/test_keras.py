"""Keras 3 exports (fixtures/keras). Oracle: the same nets in torch with Keras' weights, explained by zennit in float64."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from onnxcrp import Explainer
from tests.support import peers

peers.need()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.support import functional  # noqa: E402
from tests.support.oracle import Oracle  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "keras"
EXPORTERS = ("tf2onnx", "keras", "torch")
TARGETS = {"image": 2, "signal": 1}  # with positive logits


class Skip(nn.Module):
    """x + f(x)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


class Average(nn.AvgPool2d):
    """SAME average pooling of 12 pixels to 6, one row and column beyond the end: TensorFlow does not count them.

    On torch Keras repeats the last row and column instead, so that the two backends differ.
    """

    def __init__(self, exporter: str) -> None:
        super().__init__(3, 2)
        self.mode = "replicate" if exporter == "torch" else "constant"
        ones = nn.functional.pad(torch.ones(1, 1, 12, 12), (0, 1, 0, 1), self.mode)
        self.register_buffer("counted", super().forward(ones))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1), self.mode)) / self.counted


def twin(name: str, exporter: str = "keras") -> nn.Module:
    """The net in torch, channels first."""
    with np.load(FOLDER / "weights.npz") as stored:
        weights = {key.removeprefix(f"{name}/"): stored[key] for key in stored if key.startswith(f"{name}/")}
    convolution = nn.Conv2d if name == "image" else nn.Conv1d

    def conv(layer: str, **options: int) -> nn.Module:
        kernel = weights[f"{layer}/kernel"]
        *size, before, after = kernel.shape
        turned = kernel.transpose(len(size) + 1, len(size), *range(len(size)))
        if layer == "depthwise":  # [h, w, channels, 1]
            turned, after, options = kernel.transpose(2, 3, 0, 1), before, options | {"groups": before}
        made = convolution(before, after, size, **options, bias=f"{layer}/bias" in weights)
        made.weight.data = torch.from_numpy(np.ascontiguousarray(turned))
        if made.bias is not None:
            made.bias.data = torch.from_numpy(weights[f"{layer}/bias"])
        return made

    def norm(layer: str) -> nn.Module:
        values = [
            torch.from_numpy(weights[f"{layer}/{k}"]) for k in ("gamma", "beta", "moving_mean", "moving_variance")
        ]
        made = nn.BatchNorm2d(len(values[0]), eps=1e-3)
        made.weight.data, made.bias.data, made.running_mean, made.running_var = values
        return made

    fc = nn.Linear(*weights["fc/kernel"].shape)
    fc.weight.data, fc.bias.data = (torch.from_numpy(weights[f"fc/{k}"].T.copy()) for k in ("kernel", "bias"))
    if name == "signal":
        parts = {"conv1": conv("conv1", padding=2), "relu1": nn.ReLU(), "pool": nn.MaxPool1d(2)}
        parts |= {"pad": nn.ConstantPad1d((1, 2), 0.0), "conv2": conv("conv2", stride=2), "relu2": nn.ReLU()}
        parts |= {"mean": nn.AdaptiveAvgPool1d(1)}
    else:
        parts = {"stem": conv("stem", padding=1), "stem_bn": norm("stem_bn"), "relu1": nn.ReLU6()}
        parts |= {
            "pad": nn.ZeroPad2d((0, 1, 0, 1)),
            "depthwise": conv("depthwise", stride=2),
            "depthwise_bn": norm("depthwise_bn"),
        }
        block = nn.Sequential(conv("block", padding=1), nn.ReLU())
        parts |= {"relu2": nn.ReLU6(), "block": Skip(block), "pool": Average(exporter)}
        parts |= {"last": conv("last", stride=2), "relu3": nn.ReLU(), "mean": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(OrderedDict([*parts.items(), ("flat", nn.Flatten()), ("fc", fc)])).eval()


def samples(name: str) -> np.ndarray:
    """Channels last."""
    shape = {"image": (2, 24, 24, 3), "signal": (2, 30, 2)}[name]
    return np.random.default_rng(8).normal(size=shape).astype(np.float32)


def first(x: np.ndarray) -> np.ndarray:
    """Channels first."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", TARGETS)
def test_heatmaps(name: str, exporter: str, composite: str) -> None:
    x, net = samples(name), twin(name, exporter)
    explainer = Explainer(FOLDER / f"{name}.{exporter}.onnx", composite)
    result = explainer.explain(x, TARGETS[name])
    with torch.no_grad():
        np.testing.assert_allclose(result.explained, net(torch.from_numpy(first(x))).numpy(), rtol=1e-4, atol=1e-5)
    theirs = functional.relevance(net, {"x": first(x)}, composite, (TARGETS[name],))
    ours = next(iter(result.relevance.values()))
    assert ours.shape == x.shape
    assert distance(first(ours), theirs) < 1e-4
    assert result.heatmap.shape == x.shape[:-1]
    assert all(node.op != "Add" or len(explainer.facts.carries(node)) > 1 for node in explainer.facts.nodes)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_conditions_on_a_sequential_net(exporter: str) -> None:
    """zennit's hooks and a mask on the layer's channels."""
    x, net = samples("signal")[:1], twin("signal")
    oracle = Oracle(net, torch.from_numpy(first(x)))
    explainer = Explainer(FOLDER / f"signal.{exporter}.onnx")
    layer = [info.name for info in explainer.layers if info.op == "Conv"][1]
    target = np.array([[0.0, 1.0, 0.0]])
    result = explainer.explain(x, 1, conditions=[{layer: [c]} for c in range(3)], record=[layer])
    for c in range(3):
        mask = np.eye(8)[[c]]
        theirs = oracle.relevance("epsilon_plus_flat", first(x), target, masks={"conv2": mask}, record=["conv2"])
        assert distance(first(result.heatmap[:, c][..., None]), theirs["input"].sum(1, keepdims=True)) < 1e-4
        ours = result.relevance[layer][0, c].reshape(8, -1)
        assert distance(ours, theirs["conv2"][0].reshape(8, -1)) < 1e-4


def test_the_script_makes_what_is_committed() -> None:
    """Without TensorFlow: the files hold the weights beside them, and nothing of the machine that wrote them."""
    for path in FOLDER.glob("*.onnx"):
        data = path.read_bytes()
        assert len(data) < 300_000
        assert b"site-packages" not in data
