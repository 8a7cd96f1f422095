"""Oracle: torchvision's own layers; the contenders of the benchmark hold each other to the same reference samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from benchmarks import index as benchmark
from onnxcrp.index import Index
from tests.support import peers


def test_the_layout_is_that_of_resnet18():
    peers.need()
    import torch
    import torchvision

    net, found = torchvision.models.resnet18(weights=None).eval(), []
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(
                lambda _, __, z, name=name: found.append((name, z.shape[1], z.shape[-1] if z.ndim == 4 else 1))
            )
    net(torch.zeros(1, *benchmark.PICTURE))
    assert sorted(found) == sorted(benchmark.LAYOUT)


@pytest.mark.filterwarnings("ignore")  # of torch and of zennit-crp
def test_both_contenders_find_the_same_reference_samples(tmp_path):
    peers.need()
    from crp.helper import load_maximization

    model, data = benchmark.export(benchmark.NET, benchmark.PICTURE, tmp_path), tmp_path / "pictures"
    benchmark.write_pictures(data, 5)
    for name, run in benchmark.CONTENDERS.items():
        found = run(str(model), str(data), str(tmp_path / name), "late", "cpu")
        assert found["samples"] == 5
        assert benchmark.on_disk(str(tmp_path / name))["files"] > 5
    layer = benchmark.LAYERS["late"]
    for folder, criterion in (("RelMax_sum_normed", "relmax"), ("ActMax_sum_normed", "actmax")):
        samples, scores, _ = load_maximization(Path(tmp_path / "zennit-crp" / folder), layer)
        mine = Index.open(tmp_path / "onnxcrp").references(layer, criterion)
        np.testing.assert_allclose(mine.score[:, :5], scores.T, rtol=1e-3, atol=1e-3 * np.abs(scores).max())
        clear = scores[0] - scores[1] > 1e-3 * np.abs(scores).max()
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(mine.sample[clear, 0], samples[0][clear])
