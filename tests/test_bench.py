"""Oracles: profiles written by hand, names of the relevance model's own nodes, arrays of known size, the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import onnxcrp
from onnxcrp import Explainer
from onnxcrp.analysis import bench as study
from onnxcrp.analysis.bench import Bench, Step, Times, bench, late_layer, layer_of, reasons
from onnxcrp.composite import load
from onnxcrp.errors import OnnxcrpError, QuestionError
from onnxcrp.profiling import NodeTime, merged, read_profile

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SHAPES, ECG, INT8 = (FIXTURES / name / "net.onnx" for name in ("shapes", "ecg", "int8"))
CPU = "CPUExecutionProvider"


def event(name: str, ts: int, dur: int, op: str = "", provider: str = CPU) -> dict:
    if not op:
        return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "args": {}}
    args = {
        "op_name": op,
        "provider": provider,
        "output_type_shape": [{"int64": [4]} if op == "Shape" else {"float": [2]}],
    }
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_a_profile_is_read_call_by_call(tmp_path) -> None:
    """Two runs a call, three calls, the first of which does not count: medians of sums."""
    events = [event("session_initialization", 0, 5)]
    for run, dur in enumerate([900, 900, 10, 20, 50, 60]):
        start = 1000 * (run + 1)
        events += [event("a_nchwc", start + 1, dur, "Conv"), event("b", start + 100, 2, "Relu", "CUDA")]
        events += [event("c", start + 200, 1, "Shape")]
        events.append(event("model_run", start, 999))  # written when the run is over, stamped with its start
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    a, b, c = read_profile(path, calls=3, warmup=1)
    assert [node.on_shapes for node in (a, b, c)] == [False, False, True]
    assert (a.name, a.op, a.provider) == ("a", "Conv", CPU)
    assert a.seconds == pytest.approx(70e-6)  # (30 + 110) / 2
    assert (b.op, b.provider, b.seconds) == ("Relu", "CUDA", pytest.approx(4e-6))
    assert [node.seconds for node in merged([[a], [a, b]])] == pytest.approx([140e-6, 4e-6])


def test_ratios_by_hand() -> None:
    made = Bench("m", "c", {}, [CPU], None, 0)
    made.times = {"forward pass": Times.of([1.0, 2.0, 4.0]), "one heatmap": Times.of([3.0, 10.0, 90.0])}
    assert (made.ratio("one heatmap"), made.best("one heatmap")) == (5.0, 3.0)
    assert made.times["one heatmap"].low == 6.5
    assert made.to_dict()["ratios"]["one heatmap"] == {"median": 5.0, "fastest": 3.0}


def test_a_file_that_is_no_profile(tmp_path) -> None:
    for text in ("", "{}", '[{"cat": "Node"}]'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(OnnxcrpError, match="is no profile"):
            read_profile(tmp_path / "x.json", calls=1)


def test_nodes_bear_the_names_of_the_walk() -> None:
    found = bench(SHAPES, rounds=1, alone=False, conditions=4)
    rules = replace(load("epsilon_plus_flat"), seed="abs")
    written = {node.name for node in onnxcrp.compile(SHAPES, rules).graph.node}
    layers = {name for info in Explainer(SHAPES).layers for name in info.names}
    ran = found.steps["one heatmap"]
    assert sum(step.share for step in ran) == pytest.approx(1)
    assert [step.seconds for step in ran] == sorted((step.seconds for step in ran), reverse=True)
    assert {step.name for step in ran if step.part == "backward"} <= written
    assert {step.name for step in ran if step.part == "forward" and step.op == "Conv"} <= layers
    convolutions = [step for step in ran if step.op == "Conv" and step.part == "forward"]
    assert len(convolutions) == len({step.name for step in convolutions})  # none lost, none named twice
    assert found.layer == "layer3.0.conv2"
    assert set(found.times) == {"forward pass", "one heatmap", "1 condition", "4 conditions"}
    assert found.ratio("forward pass") == 1
    assert sum(found.parts("4 conditions").values()) == pytest.approx(1)
    json.dumps(found.to_dict())


def test_fused_nodes_are_the_layers_they_came_from() -> None:
    facts = Explainer(SHAPES).facts
    assert layer_of(facts, "/conv1/Conv", "Conv") == "conv1"
    assert layer_of(facts, "/relu/Relu_output_0", "Conv") == "conv1"  # Conv and Relu in one
    assert layer_of(facts, "nobody", "Conv") == "nobody"


def test_the_late_layer() -> None:
    """fc makes the logits; of the convolutions layer3.0.conv2 and not the shortcut beside it is the deepest."""
    assert late_layer(Explainer(SHAPES)).name == "layer3.0.conv2"


def test_layers_that_do_not_serve() -> None:
    with pytest.raises(QuestionError, match="layer3"):
        bench(SHAPES, layer="layer3.0.conv9", alone=False)
    assert bench(ECG, layer="3", conditions=0, rounds=1, alone=False).each is None


def test_reasons() -> None:
    told = "\n".join(bench(INT8, rounds=1, alone=False).reasons)
    assert "quantized" in told
    assert "16 conditions: " in told
    known = {"batch": "dynamic", "shares_forward": False, "batch_breaks": ["a", "b", "c", "d"], "quantized": False}
    ran = [
        Step("R/pool/winner/ScatterElements", "ScatterElements", "backward", CPU, 2.0, 0.5),
        Step("R/pool/winner/Shape", "Shape", "backward", CPU, 0.0, 0.0, on_shapes=True),
        Step("conv1", "Conv", "forward", "CUDAExecutionProvider", 2.0, 0.5),
    ]
    made = Bench("m", "c", {}, ["CUDAExecutionProvider", CPU], None, 0, steps={"one heatmap": ran})
    assert reasons(known, made) == [
        "conditions do not share the forward pass: axis 0 is not the batch at a, b, c and 1 more",
        "one heatmap: nodes that run on the CPU though CUDAExecutionProvider was asked for: 1, 50% of the time "
        "(R/pool/winner/ScatterElements)",
        "one heatmap: nodes that scatter or gather entries: 1, 50% of the time (R/pool/winner/ScatterElements)",
    ]
    assert reasons(known | {"batch": "fixed"}, made)[0].startswith("the batch is fixed")
    assert reasons(known | {"shares_forward": True}, Bench("m", "c", {}, [CPU], None, 0)) == []


@pytest.mark.parametrize(
    ("seconds", "nodes", "provider", "factor"),
    [
        ([1.0, 1.1, 1.2], 0.9, CPU, 1.2),  # 1.1 / (0.9 + 0.001)
        ([1.0, 2.0, 2.5], 1.5, CPU, 2.0),
        ([4.0, 4.1, 4.2], 1.0, CPU, 4.1),  # every run is slow, the nodes are not
        ([4.0, 4.1, 4.2], 1.0, "CUDAExecutionProvider", 1.025),
        ([3e-4, 3e-4, 3e-4], 1e-4, CPU, 1.0),  # a small net: calls cost more than its nodes
    ],
)
def test_a_busy_machine_is_told(seconds: list[float], nodes: float, provider: str, factor: float) -> None:
    times = {"forward pass": Times.of([1.0, 1.0, 1.0]), "one heatmap": Times.of(seconds)}
    ran = [Step("conv1", "Conv", "forward", provider, nodes, 1.0)]
    made = Bench("m", "c", {}, [provider], None, 0, times, steps={"one heatmap": ran})
    known = {"batch": "dynamic", "shares_forward": True, "quantized": False}
    told = [f"busy: one heatmap took {factor:.1f} times as long as without it; --threads 1"] if factor > 1.5 else []
    said = reasons(known, made)
    assert len(said) == len(told)
    assert all(part in line for part, line in zip(told, said, strict=True))
    assert made.to_dict()["unsteady"] == pytest.approx(factor, rel=0.02)


def test_memory_and_start_of_a_process_of_its_own() -> None:
    found = bench(ECG, rounds=1, conditions=2)
    assert set(found.memory) == {"one heatmap", "2 conditions"}
    assert all(2**24 < size < 2**31 for size in found.memory.values())
    assert list(found.start) == ["import", "canonize", "first answer"]
    assert all(0 < seconds < 60 for seconds in found.start.values())


def test_what_fails_in_that_process_is_told(monkeypatch) -> None:
    monkeypatch.setattr(study, "__spec__", type("Spec", (), {"name": "onnxcrp.no_such_module"}))
    with pytest.raises(OnnxcrpError, match=r"process of its own failed: .*no_such_module"):
        bench(ECG, rounds=1, conditions=0)


def test_peak_memory_is_that_of_arrays_of_known_size() -> None:
    code = """if True:
        import numpy as np
        from onnxcrp.analysis.memory import forget_peak, peak_memory
        before = peak_memory(); a = np.ones(1 << 26, np.uint8); high = peak_memory(); del a
        forget_peak(); print(before, high, peak_memory())"""
    before, high, after = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert high - before > 0.9 * (1 << 26)
    assert after < high if Path("/proc/self/clear_refs").exists() else after == high


def test_profile_of_a_question() -> None:
    explainer = Explainer(ECG)
    x = np.random.default_rng(0).random((1, 1, 150), np.float32)
    nodes = explainer.profile(x, 1, calls=2, seed="abs")
    assert all(isinstance(node, NodeTime) and node.provider == CPU and node.seconds >= 0 for node in nodes)
    assert any(node.name.startswith("R/0/flat") for node in nodes)
    assert len(explainer._models.sessions()) == 0  # the profiled ones are gone, its own are as they were
