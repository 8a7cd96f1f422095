"""Oracle: numpy computes what the small models compute; the file system tells what a failed write left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcrp import session
from onnxcrp.errors import InputError, ModelError, OnnxcrpError, RuntimeMissingError
from onnxcrp.session import Session, providers, save

W = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)


def linear(*, large: bool = True) -> onnx.ModelProto:
    """Gives y = relu(x @ W), z = x @ W, with an overridable initializer `mask` that multiplies y."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 18]>
        linear (float[N, 64] x, float[M, K] mask) => (float[A, 32] y, float[B, 32] z)
        {
            z = MatMul(x, W)
            r = Relu(z)
            y = Mul(r, mask)
        }""")
    weight = onnx.numpy_helper.from_array(W, "W")
    if not large:  # stored as numbers, not as bytes
        weight = onnx.helper.make_tensor("W", onnx.TensorProto.FLOAT, W.shape, W.ravel().tolist())
    model.graph.initializer.extend([weight, onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "mask")])
    model.metadata_props.add(key="note", value="kept")
    return model


def test_runs_and_names_ports() -> None:
    s = Session(linear())
    assert list(s.inputs) == ["x"]
    assert list(s.optional) == ["mask"]
    assert list(s.outputs) == ["y", "z"]
    assert s.inputs["x"].shape == ("N", 64)
    assert s.inputs["x"].dtype == np.float32
    result = s.run({"x": X})
    np.testing.assert_allclose(result["z"], X @ W, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result["y"], np.maximum(X @ W, 0), rtol=1e-4, atol=1e-5)
    masked = s.run({"x": X, "mask": np.full((1, 1), 2, np.float32)}, ["y"])
    assert list(masked) == ["y"]
    np.testing.assert_allclose(masked["y"], 2 * np.maximum(X @ W, 0), rtol=1e-4, atol=1e-5)
    assert s.run({"x": X}, []) == {}
    assert list(s.run({"x": X}, ["z", "y"])) == ["z", "y"]


def test_results_may_stay_on_the_device() -> None:
    s = Session(linear())
    first = s.run_ortvalues({"x": X[:, ::-1]})  # not contiguous
    np.testing.assert_allclose(first["z"].numpy(), X[:, ::-1] @ W, rtol=1e-4, atol=1e-5)
    chained = Session(linear()).run_ortvalues({"x": onnx_value(X)}, ["z"])
    np.testing.assert_allclose(chained["z"].numpy(), X @ W, rtol=1e-4, atol=1e-5)


def onnx_value(array: np.ndarray):
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def test_many_threads_share_one_session() -> None:
    s, wrong = Session(linear(), threads=1), []

    def work(seed: int) -> None:
        for step in range(20):
            x = np.random.default_rng(seed * 100 + step).normal(size=(1 + step % 3, 64)).astype(np.float32)
            if not np.allclose(s.run({"x": x}, ["z"])["z"], x @ W, rtol=1e-3, atol=1e-4):
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no value for the model's input 'x'"),
        ({"x": X, "q": X}, "no input 'q', expected x, mask"),
        ({"x": X.astype(np.float64)}, "'x' is float64, expected float32"),
        ({"x": X[:, :5]}, r"'x' has shape \[3, 5\], expected \['N', 64\]"),
        ({"x": X[0]}, r"'x' has shape \[64\]"),
    ],
)
def test_feeds_that_do_not_fit(feeds, message) -> None:
    s = Session(linear(), log_severity=4)
    with pytest.raises(InputError, match=message):
        s.run(feeds)
    with pytest.raises(InputError, match=message):
        s.run_ortvalues(feeds)


def test_unknown_output() -> None:
    with pytest.raises(InputError, match="no output 'q', expected y, z"):
        Session(linear()).run({"x": X}, ["q"])


def test_providers() -> None:
    assert providers()[-1][0] == "CPUExecutionProvider"
    assert [name for name, _ in providers("cpu")] == ["CPUExecutionProvider"]
    assert providers(["CPUExecutionProvider"]) == providers("cpu")
    assert providers(("cpu", {"use_arena": "0"})) == [("CPUExecutionProvider", {"use_arena": "0"})]
    assert providers([("cpu", {"use_arena": "0"})]) == [("CPUExecutionProvider", {"use_arena": "0"})]
    with pytest.raises(RuntimeMissingError, match=r"offers no 'Abacus', expected one of .*CPUExecutionProvider"):
        providers("Abacus")
    Session(linear(), ("cpu", {"use_arena": "0"}))


class FakeRuntime:
    """Stands for onnxruntime-gpu on a machine that the tests do not have."""

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_cuda_comes_first_without_tf32(monkeypatch) -> None:
    monkeypatch.setattr(session, "_onnxruntime", lambda: FakeRuntime)
    monkeypatch.setattr(session, "_cuda_devices", lambda: 1)
    assert providers() == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
    assert providers(("cuda", {"use_tf32": "1"}))[0] == ("CUDAExecutionProvider", {"use_tf32": "1"})
    assert [name for name, _ in providers(["tensorrt", "cuda"])] == FakeRuntime.get_available_providers()
    monkeypatch.setattr(session, "_cuda_devices", lambda: 0)
    assert providers() == [("CPUExecutionProvider", {})]


def test_missing_runtime_names_both_commands(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError) as caught:
        Session(linear())
    text = str(caught.value)
    assert 'pip install "onnxcrp[cpu]"' in text
    assert 'pip install "onnxcrp[gpu]"' in text
    assert "\n" not in text


def test_import_loads_no_runtime() -> None:
    code = "import sys, onnxcrp.session; print([m for m in ('onnxruntime', 'torch', 'onnx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_models_onnxruntime_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file at"):
        Session(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"cannot load .*bad\.onnx"):
        Session(tmp_path / "bad.onnx", log_severity=4)
    unknown = linear()
    unknown.graph.node[0].op_type = "MatMull"
    with pytest.raises(ModelError, match="hint") as caught:
        Session(unknown, log_severity=4)
    assert "\n" not in str(caught.value)
    newer = linear()
    newer.opset_import[0].version = 999
    with pytest.raises(ModelError, match="newer than the installed onnxruntime"):
        Session(newer, log_severity=4)


# ------------------------------------------------------------------------------------------------------- large models


@pytest.mark.parametrize("large", [True, False], ids=["bytes", "numbers"])
def test_external_data_round_trip(tmp_path: Path, large) -> None:
    model, path = linear(large=large), tmp_path / "net.onnx"
    before = model.SerializeToString()
    save(model, path, size_threshold=1 if large else 0)
    assert model.SerializeToString() == before
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert path.stat().st_size < W.nbytes / 4
    loaded = onnx.load(path)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), W)
    assert loaded.metadata_props[0].value == "kept"
    assert loaded.graph.node == model.graph.node
    np.testing.assert_allclose(Session(path).run({"x": X})["z"], X @ W, rtol=1e-4, atol=1e-5)
    save(loaded, path)  # smaller than the default threshold: one file
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), W)


def test_large_models_run_through_a_folder_that_is_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    s = Session(linear(), size_threshold=1)
    assert os.listdir(tmp_path) == []
    np.testing.assert_allclose(s.run({"x": X})["z"], X @ W, rtol=1e-4, atol=1e-5)
    broken = linear()
    broken.graph.node[0].op_type = "MatMull"
    with pytest.raises(ModelError):
        Session(broken, size_threshold=1, log_severity=4)
    assert os.listdir(tmp_path) == []


def test_more_than_2_gb_is_not_serialized_at_once() -> None:
    """Protobuf itself refuses: the size counts even when the threshold is too high to see it."""

    class Huge:
        graph = linear().graph

        def SerializeToString(self):
            raise ValueError("exceeds 2 GiB")

    assert session._serialize(Huge(), 2**40) is None
    with pytest.raises(ModelError, match="larger than 2 GB"):
        session._serialize(Huge(), None)


def test_data_that_was_not_loaded(tmp_path: Path) -> None:
    save(linear(), tmp_path / "net.onnx", size_threshold=1)
    half = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    with pytest.raises(ModelError, match="initializer 'W' lies in another file"):
        save(half, tmp_path / "copy.onnx", size_threshold=-1)
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]


@pytest.mark.parametrize("threshold", [1, 2**20])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch, threshold) -> None:
    path = tmp_path / "net.onnx"
    save(linear(), path, size_threshold=threshold)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(_file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "_flush", full)
    with pytest.raises(OnnxcrpError, match=r"cannot write .*net\.onnx: No space left on device"):
        save(linear(), path, size_threshold=threshold)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OnnxcrpError, match=r"cannot write .*: No such file or directory"):
        save(linear(), tmp_path / "absent" / "net.onnx")
    with pytest.raises(OnnxcrpError, match=r"cannot write .*: is a directory"):
        save(linear(), tmp_path)
    assert os.listdir(tmp_path) == []
