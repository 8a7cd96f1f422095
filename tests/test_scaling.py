"""Oracles: powers of known exponent, ImageNet's arithmetic by hand, the page rendered from its own JSON, torch."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from benchmarks import plain, scaling
from onnxcrp.session import Session


def test_slopes() -> None:
    values = np.array([1, 2, 4, 8, 16, 32])
    assert scaling.slope(values, 3.0 * values**1.5) == pytest.approx(1.5)
    assert scaling.slope(values, 100 + 0.001 * values) < 0.01
    assert scaling.slope(values, 0.001 + values) == pytest.approx(1, abs=1e-3)


def test_what_imagenet_takes() -> None:
    rate = {"seconds per sample": 3.6, "merge, seconds per shard": 36.0}
    hours = scaling.imagenet(rate, None)
    assert hours["core"] == pytest.approx(1281.167)
    assert hours["machine"] == pytest.approx(1281.167 / 64)
    assert hours["cluster"] == pytest.approx(1281.167 / 6400 + 1.0)  # 100 parts of 36 s
    assert hours["gpu"] is None
    gpu = {
        "results": {
            "resnet50": {"batch": 32, "device": "a card", "timings": {"all layers of a batch": {"median": 0.32}}}
        }
    }
    assert scaling.imagenet(rate, gpu)["gpu"] == pytest.approx(1281167 * 0.01 / 3600)
    assert [scaling.shown(hours) for hours in (None, 0.5, 30, 240)] == [
        "not measured", "30 minutes", "30 hours", "10 days",
    ]  # fmt: skip


def test_the_page_says_what_was_measured() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    measured = json.loads(scaling.FIGURES.read_text(encoding="utf-8"))
    assert scaling.filled(page, scaling.text(measured)) == page, "python -m benchmarks.scaling --from docs/scaling.json"
    for axis in measured["results"]["axes"].values():
        assert scaling.slope(axis["values"], axis["seconds"]) == pytest.approx(axis["slope"])
    assert scaling.imagenet(measured["results"]["index"], None)["core"] == measured["results"]["imagenet"]["core"]


def test_a_point_of_every_axis_is_asked_and_drawn(tmp_path) -> None:
    points = {"conditions": (1, 2), "side": (8, 16), "depth": (1, 2), "batch": (1, 2), "samples": (2, 4)}
    found = scaling.measure(rounds=1, memory=False, points=points)
    assert {what: len(axis["seconds"]) for what, axis in found.items()} == dict.fromkeys(points, 2)
    assert all(seconds > 0 for axis in found.values() for seconds in axis["seconds"])
    scaling.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_tower_is_what_it_says() -> None:
    model = plain.tower(2, 4, 8)
    W1, b1, W2, b2, W3, b3 = (
        torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in model.graph.initializer
    )
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.relu(torch.conv2d(torch.relu(torch.conv2d(x, W1, b1, padding=1)), W2, b2, padding=1))
    want = hidden.mean((2, 3)) @ W3.T + b3
    np.testing.assert_allclose(Session(model).run({"input": x.numpy()})["logits"], want, rtol=1e-4, atol=1e-5)
