"""On a CUDA device. Oracles: the same questions on the CPU, onnxruntime's profile, addresses of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import fallbacks, why_not
from onnxcrp import Explainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LAYERS = {"shapes": "layer2.0.conv2", "ecg": "3", "digits": "features.5"}
RULES = ["epsilon_plus_flat", "epsilon_gamma_box(low=0, high=2)", "epsilon_alpha2_beta1_flat"]


def sample(explainer: Explainer, count: int = 2) -> np.ndarray:
    ((dtype, shape),) = explainer.inputs.values()
    return np.random.default_rng(0).uniform(0, 2, (count, *shape[1:])).astype(dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rules", RULES)
def test_the_same_as_on_the_cpu(name, rules) -> None:
    host, device = (Explainer(FIXTURES / name / "net.onnx", rules, providers=where) for where in ("cpu", "cuda"))
    x = sample(host)
    for question in ({}, {"conditions": [{LAYERS[name]: [c]} for c in range(4)]}):
        want = host.explain(x, 1, seed="abs", record=[LAYERS[name]], **question)
        have = device.explain(x, 1, seed="abs", record=[LAYERS[name]], **question)
        for layer, R in want.relevance.items():
            assert np.linalg.norm(have.relevance[layer] - R) <= 1e-4 * np.linalg.norm(R)
        kept = device.at(x).explain(1, seed="abs", **question)
        assert np.linalg.norm(kept.heatmap - want.heatmap) <= 1e-4 * np.linalg.norm(want.heatmap)


@pytest.mark.parametrize("name", LAYERS)
def test_no_node_falls_back_to_the_cpu(name) -> None:
    explainer = Explainer(FIXTURES / name / "net.onnx", providers="cuda")
    question = {"conditions": [{LAYERS[name]: [c]} for c in range(4)]}
    assert fallbacks(explainer, sample(explainer, 1), **question) == []


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_launched_as_one_graph(name) -> None:
    """Every sample gets its own answer, recorded or not, whatever was asked between; conditions and kept samples too."""
    host = Explainer(FIXTURES / name / "net.onnx", providers="cpu")
    graphs = Explainer(FIXTURES / name / "net.onnx", providers="cuda", cuda_graph=True)
    samples = sample(host, 12)
    asked = {"conditions": [{LAYERS[name]: [c]} for c in range(4)]}
    for row in range(6):
        x, pair = samples[row : row + 1], samples[2 * row : 2 * row + 2]
        for each, question in ((x, {}), (pair, {}), (x, asked)):
            want = host.explain(each, row % 2, seed="abs", record=[LAYERS[name]], **question)
            have = graphs.explain(each, row % 2, seed="abs", record=[LAYERS[name]], **question)
            stays = graphs.explain(each, row % 2, seed="abs", record=[LAYERS[name]], return_ortvalue=True, **question)
            for layer, R in want.relevance.items():
                assert np.linalg.norm(have.relevance[layer] - R) <= 1e-4 * np.linalg.norm(R)
                left = stays.relevance[layer].numpy()  # [B, ...], or [N or 1, ...] for conditions
                assert np.linalg.norm(left - R.reshape(-1, *left.shape[1:])) <= 1e-4 * np.linalg.norm(R)
        kept = graphs.at(pair)
        for _ in range(3):
            R = host.explain(pair, 1, seed="abs", **asked).heatmap
            assert np.linalg.norm(kept.explain(1, seed="abs", **asked).heatmap - R) <= 1e-4 * np.linalg.norm(R)


def test_torch_on_the_device_without_copies() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch was built without CUDA")
    explainer = Explainer(FIXTURES / "shapes" / "net.onnx", providers="cuda")
    x = torch.from_numpy(sample(explainer)).cuda()
    torch.cuda.synchronize()
    result = explainer.explain(x, 1, seed="abs", return_ortvalue=True)
    assert result.relevance["input"].device_name() == "cuda"
    R = torch.from_dlpack(result.relevance["input"])
    assert R.is_cuda
    assert R.data_ptr() == result.relevance["input"].data_ptr()
    np.testing.assert_allclose(R.cpu().numpy(), explainer.explain(x, 1, seed="abs").relevance["input"], rtol=1e-5)
