"""Oracles: addresses of memory, which show what was copied; the same questions asked with numpy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from onnxcrp import Explainer, session
from onnxcrp.device import DeviceArray, is_device_array, on_host, taken
from onnxcrp.errors import InputError, QuestionError, RuntimeMissingError
from onnxcrp.session import Session, providers

NET = Path(__file__).resolve().parents[1] / "fixtures" / "shapes" / "net.onnx"
X = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
LAYER = "layer2.0.conv2"


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return Explainer(NET)


def test_torch_to_onnxruntime_and_back_without_a_copy() -> None:
    x = torch.from_numpy(X.copy())
    array = taken("x", x)
    assert array.value.data_ptr() == x.data_ptr()
    assert (array.shape, array.dtype, array.ndim, len(array)) == ((2, 3, 64, 64), np.float32, 4, 2)
    back = torch.from_dlpack(array.value)
    assert back.data_ptr() == x.data_ptr()
    x[0, 0, 0, 0] = 7  # the same memory
    assert array.numpy()[0, 0, 0, 0] == 7


def test_a_question_whose_arrays_stay(explainer, monkeypatch) -> None:
    x, fed = torch.from_numpy(X.copy()), []
    inner = Session.run_ortvalues
    monkeypatch.setattr(
        Session, "run_ortvalues", lambda self, feeds, out=None: fed.append(feeds) or inner(self, feeds, out)
    )
    result = explainer.explain(x, 1, seed="abs", record=[LAYER], return_ortvalue=True)
    assert fed[0]["input"].value.data_ptr() == x.data_ptr()
    R = torch.from_dlpack(result.relevance["input"])
    assert R.data_ptr() == result.relevance["input"].data_ptr()
    want = explainer.explain(X, 1, seed="abs", record=[LAYER])
    np.testing.assert_array_equal(R.numpy(), want.relevance["input"])
    np.testing.assert_array_equal(torch.from_dlpack(result.relevance[LAYER]).numpy(), want.relevance[LAYER])
    np.testing.assert_array_equal(result.heatmap, want.heatmap)


def test_every_way_to_give_a_sample(explainer) -> None:
    want = explainer.explain(X, 1, seed="abs").heatmap
    value = onnxruntime.OrtValue.ortvalue_from_numpy(X)
    for x in (torch.from_numpy(X), value, DeviceArray(value)):
        np.testing.assert_array_equal(explainer.explain(x, 1, seed="abs").heatmap, want)
        for asked in (x, {"input": x}):
            stays = explainer.explain(asked, 1, seed="abs", return_ortvalue=True)
            np.testing.assert_array_equal(stays.heatmap, want)
    top = explainer.explain(torch.from_numpy(X), "top", seed="abs", return_ortvalue=True)
    np.testing.assert_array_equal(top.targets, explainer.explain(X, "top", seed="abs").targets)


def test_conditions_and_a_kept_forward_pass(explainer) -> None:
    conditions = [{LAYER: [c]} for c in range(3)]
    want = explainer.explain(X[:1], 1, seed="abs", conditions=conditions)
    x = torch.from_numpy(X[:1].copy())
    stays = explainer.explain(x, 1, seed="abs", conditions=conditions, return_ortvalue=True)
    np.testing.assert_array_equal(torch.from_dlpack(stays.relevance["input"]).numpy(), want.relevance["input"][0])
    kept = explainer.at(x).explain(1, seed="abs", conditions=conditions)
    np.testing.assert_allclose(kept.heatmap, want.heatmap, rtol=1e-4, atol=1e-6)
    with pytest.raises(QuestionError, match="all at once"):
        explainer.at(torch.from_numpy(X)).explain(1, seed="abs")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "is float64, expected float32"),
        (torch.zeros(2, 3, 64, 65), r"has shape \[2, 3, 64, 65\]"),
        (torch.zeros(3, 64, 64), "the batch axis is missing"),
        (torch.zeros(2, 64, 64, 3).permute(0, 3, 1, 2), "is not contiguous"),
        (torch.zeros(2, 3, 64, 64, requires_grad=True), "detach"),
    ],
    ids=["type", "size", "rank", "strides", "gradient"],
)
def test_arrays_that_cannot_be_shared(explainer, x, message) -> None:
    with pytest.raises(InputError, match=message):
        explainer.explain(x, 1, return_ortvalue=True)


def test_what_is_a_device_array() -> None:
    assert is_device_array(torch.zeros(1))
    assert is_device_array(onnxruntime.OrtValue.ortvalue_from_numpy(X))
    assert not is_device_array(X)
    assert not is_device_array([1.0])
    assert on_host("x", X) is X
    with pytest.raises(QuestionError):
        taken("x", torch.from_numpy(X))[[0, 0]]

    class Elsewhere:
        """A torch tensor that says it lies on a GPU."""

        def __dlpack__(self, **options):
            return torch.from_numpy(X).__dlpack__(**options)

        def __dlpack_device__(self):
            return (2, 0)

    np.testing.assert_array_equal(on_host("x", Elsewhere()), X)


def test_an_onnxruntime_without_dlpack(monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "OrtValue", type("OrtValue", (), {}))
    with pytest.raises(InputError, match="takes no DLPack"):
        taken("x", torch.zeros(1))


class FakeRuntime:
    """Stands for onnxruntime-gpu on a machine that the tests do not have."""

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_tf32_only_where_it_is_allowed(monkeypatch) -> None:
    with pytest.raises(RuntimeMissingError, match="allow_tf32 is for CUDA"):
        Explainer(NET, allow_tf32=True, providers="cpu").explain(X, 1)
    monkeypatch.setattr(session, "_onnxruntime", lambda: FakeRuntime)
    monkeypatch.setattr(session, "_cuda_devices", lambda: 1)
    assert providers(allow_tf32=True)[0] == ("CUDAExecutionProvider", {"use_tf32": "1"})
    assert providers()[0] == ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert providers(("cuda", {"device_id": "1"}))[0][1] == {"use_tf32": "0", "device_id": "1"}
    assert providers(capture=True)[0][1]["enable_cuda_graph"] == "1"
    for option in ("enable_cuda_graph", "fuse_conv_bias"):
        with pytest.raises(RuntimeMissingError, match=option):
            providers(("cuda", {option: "1"}))
        providers(("cuda", {option: "0"}))


def test_where_results_are_left() -> None:
    def said(names: list[str], options: dict[str, dict[str, str]]) -> tuple[str, int]:
        made = Session.__new__(Session)
        made.providers = names
        made._session = type("Inner", (), {"get_provider_options": lambda self: options})()
        return made.device

    cuda, tensorrt, cpu = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
    assert said([cpu], {}) == ("cpu", 0)
    assert said([cuda, cpu], {cuda: {"device_id": "2"}}) == ("cuda", 2)
    assert said([tensorrt, cuda, cpu], {tensorrt: {"device_id": "1"}, cuda: {"device_id": "1"}}) == ("cuda", 1)
