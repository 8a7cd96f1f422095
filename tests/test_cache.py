"""Oracle: the same question without a cache, bit by bit; the files on disk, cut, overwritten and counted."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxcrp
from onnxcrp import Explainer, backward, cache, canonize
from onnxcrp.analysis.explanation import open_model
from onnxcrp.cache import ABOUT, GRAPH, MODEL, WEIGHTS, Cache, extended
from onnxcrp.errors import ModelError, OnnxcrpError
from onnxcrp.lrp import RULES
from onnxcrp.ops import OPS
from onnxcrp.session import save

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NETS = {"shapes": "layer2.0.conv2", "ecg": "3", "digits": "features.5", "int8": "layer2.0.conv2"}
X = np.random.default_rng(0).standard_normal((2, 1, 150)).astype(np.float32)


@pytest.fixture
def net(tmp_path) -> Path:
    return Path(shutil.copy(FIXTURES / "ecg" / "net.onnx", tmp_path / "net.onnx"))


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """Whatever other tests have registered."""
    monkeypatch.setattr(cache, "extended", lambda: False)


def refuse(*_args, **_options):
    raise AssertionError("made anew")


@pytest.fixture
def nothing_is_made(monkeypatch):
    """Canonizing and compiling are errors."""

    def forbid() -> None:
        monkeypatch.setattr(backward, "compile", refuse)
        monkeypatch.setattr(canonize, "canonize", refuse)

    yield forbid
    monkeypatch.undo()


PLANS = 2  # without a condition and with one: a relevance model each


def ask(folder, model, layer="3", x=X, **options):
    question = {"target": [1, 2][: len(x)], "conditions": [{}, {layer: [0, 3]}], "record": [layer], "seed": "abs"}
    result = Explainer(model, cache=folder, **options).explain(x, **question)
    arrays = [result.explained, *result.relevance.values(), *result.activation.values(), *result.outputs.values()]
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("name", NETS)
def test_bit_by_bit_the_same_and_nothing_made_twice(name, tmp_path, nothing_is_made) -> None:
    model, layer = FIXTURES / name / "net.onnx", NETS[name]
    port = Explainer(model, cache=False).inputs
    (dtype, shape) = next(iter(port.values()))
    draw = np.random.default_rng(0).uniform(0, 2, (2, *shape[1:]))
    want = ask(False, model, layer, draw.astype(dtype))
    assert ask(tmp_path, model, layer, draw.astype(dtype)) == want
    nothing_is_made()
    assert ask(tmp_path, model, layer, draw.astype(dtype)) == want


@pytest.mark.parametrize("name", NETS)
def test_what_is_compiled_from_a_stored_canonical_model_is_the_same_file(name, tmp_path) -> None:
    model = FIXTURES / name / "net.onnx"
    stored = [Cache(tmp_path).canonical(model) for _ in range(2)]
    want = onnxcrp.compile(model, conditions=[NETS[name]]).SerializeToString(deterministic=True)
    for canonical in stored:
        assert onnxcrp.compile(canonical, conditions=[NETS[name]]).SerializeToString(deterministic=True) == want


def test_a_model_in_memory(tmp_path, nothing_is_made) -> None:
    proto = onnx.load(FIXTURES / "ecg" / "net.onnx")
    want = ask(tmp_path, proto)
    nothing_is_made()
    assert ask(tmp_path, proto) == want


def entries(folder: Path, kind: str) -> set[str]:
    return {path.name for path in (folder / kind).iterdir()}


def test_what_an_entry_depends_on(net, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "cache"
    asks = [
        {"composite": "epsilon"},
        {"composite": "epsilon(epsilon=0.1)"},
        {"composite": "epsilon(epsilon=0.1)", "flip_convolutions": False},
        {"composite": "epsilon(epsilon=0.1)", "providers": ("cpu", {"arena_extend_strategy": "kSameAsRequested"})},
    ]
    for count, options in enumerate(asks, 1):
        ask(folder, net, **options)
        assert len(entries(folder, "relevance")) == PLANS * count
    ask(folder, net, composite="epsilon(epsilon=0.1)")
    assert len(entries(folder, "relevance")) == PLANS * len(asks)
    monkeypatch.setattr(cache, "installation", lambda: {"onnxruntime": "9.9"})
    ask(folder, net, composite="epsilon")
    assert len(entries(folder, "relevance")) == PLANS * (len(asks) + 1)
    assert len(entries(folder, "canonical")) == 2
    monkeypatch.setattr(cache, "processor", lambda: "another one")
    ask(folder, net, composite="epsilon")
    assert len(entries(folder, "relevance")) == PLANS * (len(asks) + 2)


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same net with its last bias doubled."""
    bias = model.graph.initializer[-1]
    bias.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(bias), bias.name))
    return model


def test_another_model_of_the_same_name(net, tmp_path) -> None:
    before = ask(tmp_path / "cache", net)
    save(doubled(onnx.load(net)), net)
    after = ask(tmp_path / "cache", net)
    assert after != before
    assert after == ask(False, net)


def test_external_data_is_part_of_the_model(net, tmp_path, nothing_is_made) -> None:
    model, folder = onnx.load(net), tmp_path / "cache"
    save(model, net, size_threshold=1)
    before = ask(folder, net)
    shape = net.read_bytes()
    data = bytearray((tmp_path / "net.onnx.data").read_bytes())
    data[:4] = np.float32(0.5).tobytes()
    (tmp_path / "net.onnx.data").write_bytes(data)
    assert net.read_bytes() == shape
    after = ask(folder, net)
    assert after != before
    assert after == ask(False, net)
    nothing_is_made()
    assert ask(folder, net) == after
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(AssertionError):  # canonize is called, which says what is missing
        ask(folder, net)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        Explainer(tmp_path / "absent.onnx", cache=tmp_path / "cache")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_damaged_entries_are_made_anew(net, tmp_path) -> None:
    folder = tmp_path / "cache"
    want = ask(folder, net)
    names = {path.name for path in files(folder)}
    assert {ABOUT, GRAPH, WEIGHTS, MODEL} <= names
    for at in range(len(files(folder))):
        path = files(folder)[at]
        whole = path.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"\0" * len(whole)):
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            assert ask(folder, net) == want
            assert files(folder)[at] == path
            assert path.stat().st_size == len(whole) or path.name == ABOUT


def test_an_interrupted_write_leaves_no_entry(net, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "cache"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        want = None
        with pytest.warns(UserWarning, match=r"cache .* cannot be written: No space left"):
            want = ask(folder, net)
    assert files(folder) == []
    assert want == ask(False, net)
    assert ask(folder, net) == want


def test_two_at_once(net, tmp_path) -> None:
    """Both make the entry, one of them comes first."""
    folder, found = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: found.append(ask(folder, net))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ask(False, net)] * 4
    assert not list(folder.rglob("*.tmp"))


def test_where_the_cache_is(tmp_path, monkeypatch, nothing_is_made) -> None:
    monkeypatch.delenv("ONNXCRP_CACHE", raising=False)
    assert Cache.of(None) is None
    with pytest.raises(OnnxcrpError, match="cache=True needs a folder"):
        Cache.of(True)
    monkeypatch.setenv("ONNXCRP_CACHE", str(tmp_path / "cache"))
    assert Cache.of(False) is None
    assert Cache.of(None).folder == Cache.of(True).folder == tmp_path / "cache"
    assert Cache.of(tmp_path).folder == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(OnnxcrpError, match="is no folder"):
        Cache(tmp_path / "file")
    want = open_model(FIXTURES / "ecg" / "net.onnx")[0].explain(X, 1, seed="abs").heatmap
    nothing_is_made()
    np.testing.assert_array_equal(open_model(FIXTURES / "ecg" / "net.onnx")[0].explain(X, 1, seed="abs").heatmap, want)


def test_a_canonical_model_of_ones_own_is_not_kept(tmp_path) -> None:
    """Its source's digest does not say how it was made: this one has doubled weights."""
    model = FIXTURES / "ecg" / "net.onnx"
    want = ask(tmp_path, model)
    own = canonize.canonize(model)
    weight = next(node.inputs[1] for node in own.graph.nodes if node.op == "Conv")
    weight.values = 2 * weight.values
    before = files(tmp_path)
    assert ask(tmp_path, own) == ask(False, own) != want
    assert files(tmp_path) == before
    assert ask(tmp_path, Cache(tmp_path).canonical(model)) == want


def test_nothing_is_stored_while_a_plugin_is_registered(net, tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    registered = extended()
    with monkeypatch.context() as patch:
        patch.setitem(OPS, "my.domain::Swirl", OPS["Relu"])
        assert extended()
        want = ask(tmp_path / "cache", net)
        assert files(tmp_path / "cache") == []
    assert want == ask(False, net)
    with monkeypatch.context() as patch:
        patch.setitem(RULES, "mine", replace(RULES["pass"], function=ask))
        assert extended()
    assert extended() == registered


def test_what_does_not_read_back_the_same_is_not_stored(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_alike", lambda *_: False)
    model = FIXTURES / "ecg" / "net.onnx"
    assert Cache(tmp_path).canonical(model).sha256
    assert not (tmp_path / "canonical").exists() or not entries(tmp_path, "canonical")
    assert ask(tmp_path, model) == ask(False, model)
