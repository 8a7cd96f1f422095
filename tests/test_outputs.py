"""Which output, which entry, which input. Oracle: dense formulas on torch's functions in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from onnxcrp import Explainer
from onnxcrp.errors import OnnxcrpError
from onnxcrp.explainer import NegativeLogitWarning
from tests.support import peers

peers.need()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from onnxcrp.cli import main  # noqa: E402
from tests.support import functional  # noqa: E402


class Detector(nn.Module):
    """[B, 3, 16, 16] -> boxes [B, 40, 4], scores [B, 40, 3] after Softmax: two scales, two anchors each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.boxes = nn.ModuleList(nn.Conv2d(8, 2 * 4, 3, 1, 1) for _ in range(2))
        self.classes = nn.ModuleList(nn.Conv2d(8, 2 * 3, 3, 1, 1) for _ in range(2))
        self.softmax = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = self.stem(x)
        levels = [fine, self.down(fine)]
        boxes, scores = (
            torch.cat(
                [
                    head(level).permute(0, 2, 3, 1).reshape(x.shape[0], -1, size)
                    for head, level in zip(heads, levels, strict=True)
                ],
                1,
            )
            for heads, size in ((self.boxes, 4), (self.classes, 3))
        )
        return boxes, scores.softmax(-1) if self.softmax else scores


class Masker(nn.Module):
    """[B, 3, 16, 16] -> [B, 4, 16, 16]: a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        )
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(9, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, self.up(self.down(x)).relu()], 1))


class Two(nn.Module):
    """A picture and a row of numbers -> [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.row = nn.Conv2d(3, 8, 3), nn.Linear(5, 6)
        self.head = nn.Linear(14, 3)

    def forward(self, image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.conv(image).relu().mean((2, 3)), self.row(row).relu()], 1))


def exported(net: nn.Module, names: list[str], outputs: list[str], folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # the exporter warns about itself
        torch.manual_seed(1)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
        x = tuple(torch.randn(2, 5) if name == "row" else torch.randn(2, 3, 16, 16) for name in names)
        axes = {name: {0: "batch"} for name in (*names, *outputs)}
        path = folder / "model.onnx"
        torch.onnx.export(net, x, str(path), dynamo=False, dynamic_axes=axes, input_names=names, output_names=outputs)
    return path, {name: value.numpy() for name, value in zip(names, x, strict=True)}


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("output", "index", "target"), [("boxes", 0, (37, 2)), ("scores", 1, (5, 1))])
def test_detector_heads_by_name_and_tuple(output: str, index: int, target: tuple[int, ...], tmp_path: Path) -> None:
    """A box coordinate and a class score of one anchor; scores are explained before their Softmax."""
    net = Detector().eval()
    path, feeds = exported(net, ["x"], ["boxes", "scores"], tmp_path)
    net.softmax = False
    explainer = Explainer(path, output=output)
    result = explainer.explain(feeds["x"], target, seed="abs")
    with torch.no_grad():
        expected = net(torch.from_numpy(feeds["x"]))[index].numpy()
    np.testing.assert_allclose(result.explained, expected, rtol=1e-4, atol=1e-5)
    sign = np.sign(expected[(slice(None), *target)])[:, None, None, None]
    theirs = functional.relevances(net, feeds, "epsilon_plus_flat", target, index)["x"]
    assert distance(result.relevance["x"] * sign, theirs) < 1e-4
    assert result.output.shape == expected.shape

    np.save(tmp_path / "x.npy", feeds["x"][0])
    words = ["--output", output, "--target", ",".join(map(str, target)), "--seed", "abs", "-o", str(tmp_path / "r.npz")]
    ran = CliRunner().invoke(main, ["explain", str(path), str(tmp_path / "x.npy"), *words])
    assert ran.exit_code == 0, ran.output
    with np.load(tmp_path / "r.npz") as stored:
        assert distance(stored["relevance/x"].reshape(3, 16, 16), result.relevance["x"][0]) < 1e-5
        assert json.loads(str(stored["targets"])) == [list(target)]


def test_an_output_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path, feeds = exported(Detector().eval(), ["x"], ["boxes", "scores"], tmp_path)
    with pytest.raises(OnnxcrpError, match=r"no output 'masks'.*boxes, scores"):
        Explainer(path, output="masks")
    with pytest.raises(OnnxcrpError, match=r"index \(40, 0\) is out of range, the explained output has 0..39, 0..3"):
        Explainer(path).explain(feeds["x"], (40, 0))


def test_a_target_over_positions(tmp_path: Path) -> None:
    """One pixel's class; a class over all pixels; a class over a region, as weights."""
    net = Masker().eval()
    path, feeds = exported(net, ["x"], ["y"], tmp_path)
    explainer = Explainer(path)
    region = np.zeros((4, 16, 16))
    region[2, 3:9, 5:12] = 1
    questions = [((1, 4, 7), (1, 4, 7)), (2, (2,)), (region, region)]
    for asked, theirs in questions:
        warnings.filterwarnings("ignore", category=NegativeLogitWarning)
        ours = explainer.explain(feeds["x"], asked).relevance["x"]
        assert distance(ours, functional.relevances(net, feeds, "epsilon_plus_flat", theirs)["x"]) < 1e-4


def test_every_input_gets_its_relevance(tmp_path: Path) -> None:
    net = Two().eval()
    path, feeds = exported(net, ["image", "row"], ["y"], tmp_path)
    theirs = functional.relevances(net, feeds, "epsilon_plus_flat", (1,))
    result = Explainer(path).explain(feeds, 1, seed="abs")
    sign = np.sign(result.explained[:, 1])
    for name, R in theirs.items():
        ours = result.relevance[name] * sign.reshape(-1, *[1] * (R.ndim - 1))
        assert distance(ours, R) < 1e-4
    only = Explainer(path, inputs=["row"]).explain(feeds, 1, seed="abs")
    assert list(only.relevance) == ["row"]
    assert result.heatmap.shape == (2, 16, 16)
