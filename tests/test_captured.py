"""Runs that are replayed. Oracle: the same questions to a plain session. What CUDA itself does is in test_gpu.py."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from onnxcrp import Explainer
from onnxcrp.captured import RECORDINGS, Captured
from onnxcrp.errors import InputError, RuntimeMissingError
from onnxcrp.session import Session

NET = str(Path(__file__).resolve().parents[1] / "fixtures" / "shapes" / "net.onnx")


class Opened:
    """Opens sessions on the CPU, which knows no graphs, and remembers what for."""

    def __init__(self) -> None:
        self.sizes: list[dict[str, int] | None] = []

    def __call__(self, *, sizes: dict[str, int] | None = None, capture: bool = False) -> Session:
        assert capture == (sizes is not None)
        self.sizes.append(sizes)
        return Session(NET, "cpu", sizes=sizes)


def feed(session: Any, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    ((name, port),) = session.inputs.items()
    return {name: np.random.default_rng(seed).uniform(0, 2, (count, *port.shape[1:])).astype(np.float32)}


def test_shapes_are_recorded_when_they_come_again() -> None:
    opened, plain = Opened(), Session(NET, "cpu")
    captured = Captured(opened)
    (port,) = plain.inputs.values()
    for seed, count in enumerate([2, 3, 2, 3, 2, 2]):
        x = feed(plain, count, seed)
        want = plain.run(x)
        for have in (captured.run(x), {n: v.numpy() for n, v in captured.run_ortvalues(x).items()}):
            assert have.keys() == want.keys()
            for output in want:
                np.testing.assert_allclose(have[output], want[output], rtol=1e-5, atol=1e-6)
    assert opened.sizes == [None, {port.shape[0]: 2}, {port.shape[0]: 3}]


def test_answers_are_not_written_over_and_may_be_chosen() -> None:
    captured = Captured(Opened())
    first, second = feed(captured, 1, 1), feed(captured, 1, 2)
    captured.run(first)
    (name,) = captured.outputs
    kept = captured.run_ortvalues(first)[name]
    before = kept.numpy().copy()
    other = captured.run(second, [name])
    assert not np.allclose(other[name], before)
    np.testing.assert_array_equal(kept.numpy(), before)
    ((entry, x),) = first.items()
    there = {entry: onnxruntime.OrtValue.ortvalue_from_numpy(x)}
    np.testing.assert_array_equal(captured.run(there)[name], before)
    with pytest.raises(InputError, match="no output 'other'"):
        captured.run(first, ["other"])


def test_recordings_are_few() -> None:
    opened = Opened()
    captured = Captured(opened)
    for count in [*range(1, RECORDINGS + 2), *range(1, RECORDINGS + 2)]:
        captured.run(feed(captured, count))
    assert len(opened.sizes) == 1 + RECORDINGS + 1
    captured.run(feed(captured, RECORDINGS + 1))  # the newest is there
    assert len(opened.sizes) == 1 + RECORDINGS + 1
    captured.run(feed(captured, 1))  # the oldest went
    assert len(opened.sizes) == 1 + RECORDINGS + 2


def test_many_threads_read_their_own_answers() -> None:
    captured, plain, gate = Captured(Opened()), Session(NET, "cpu"), threading.Barrier(8)
    captured.run(feed(plain, 2))

    def ask(seed: int) -> bool:
        gate.wait()
        x = feed(plain, 2, seed)
        want = plain.run(x)
        return all(
            np.allclose(have[name], want[name], rtol=1e-5, atol=1e-6)
            for have in (captured.run(x) for _ in range(10))
            for name in want
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_what_is_wrong_is_told_as_by_a_session() -> None:
    captured = Captured(Opened())
    x = feed(captured, 1)
    for _ in range(2):
        with pytest.raises(InputError, match="no input 'nope'"):
            captured.run({**x, "nope": x["input"]})
        with pytest.raises(InputError, match="expected float32"):
            captured.run({"input": x["input"].astype(np.float64)})
        captured.run(x)


def test_small_integers_may_steer_what_runs() -> None:
    """Of an input that onnxruntime reads on the CPU, as sizes are, another value is another recording."""
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        net (float[5] x, int64[1] n) => (float[k] y) { zero = Constant <value_ints = [0]> () y = Slice (x, zero, n) }
    """)
    opened: list[Any] = []

    def start(*, sizes: Any = None, capture: bool = False) -> Session:
        opened.append(sizes)
        return Session(model, "cpu", sizes=sizes)

    captured, x = Captured(start), np.arange(5, dtype=np.float32)
    for n in (2, 2, 3, 3, 2):
        np.testing.assert_array_equal(captured.run({"x": x, "n": np.array([n])})["y"], x[:n])
    assert len(opened) == 3


def test_without_cuda_there_is_nothing_to_record(tmp_path) -> None:
    """Nor is anything lost that is in a cache."""
    x = feed(Session(NET, "cpu"), 1)["input"]
    Explainer(NET, providers="cpu", cache=tmp_path).explain(x, 1, seed="abs")
    before = sorted(tmp_path.rglob("*"))
    explainer = Explainer(NET, providers="cpu", cuda_graph=True, cache=tmp_path)
    for ask in (explainer.explain, lambda x, *question, **more: explainer.at(x).explain(*question, **more)):
        with pytest.raises(RuntimeMissingError, match="cuda_graph is for CUDA"):
            ask(x, 1, seed="abs")
    assert sorted(tmp_path.rglob("*")) == before
