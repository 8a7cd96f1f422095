"""Oracles: made-up contenders of known speed, torchvision's own modules, zennit; the benchmarks on their smallest net."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from benchmarks import all as all_nets
from benchmarks import gpu, plain
from benchmarks import nets as zoo
from benchmarks.all import as_timings
from benchmarks.common import Timing, alone, interleaved
from benchmarks.contenders import CONTENDERS
from benchmarks.nets import NETS, channels
from benchmarks.worker import WorkerError, workers
from onnxcrp import Explainer
from onnxcrp.session import Session
from tests.support import peers


def test_contenders_run_in_turn_for_so_many_rounds_or_seconds() -> None:
    ran = []
    runs = {"a": lambda: ran.append("a"), "b": lambda: (ran.append("b"), time.sleep(0.02))}
    found = interleaved(runs, rounds=3, warmup=2)
    assert ran == ["a", "b"] * 5
    assert found["b"].rounds == 3
    assert found["b"].median >= 0.02 > found["a"].median
    assert interleaved(runs, rounds=50, seconds=0.0)["b"].rounds == 1


def test_timings_survive_json() -> None:
    timing = Timing.of([1.0, 2.0, 3.0]).times(4)
    assert (timing.median, timing.extrapolated) == (8.0, True)
    assert timing.show(Timing.of([2.0])) == "4.00* ± 1.00"
    written = json.loads(json.dumps({"x": {"y": timing.__dict__, "z": "why not"}}))
    assert as_timings(written) == {"x": {"y": timing, "z": "why not"}}


def test_a_process_that_fails_or_takes_too_long() -> None:
    assert "No module named" in alone("benchmarks.nothing")["error"]
    assert alone("timeit", "-n1", "-r1", "import time; time.sleep(20)", timeout=0.5)["error"] == "not done within 0 s"


def test_conditions_differ() -> None:
    assert channels(3, 8) == [[0], [1], [2]]
    assert channels(4, 2) == [[0], [1], [0, 1], [1, 0]]
    many = [tuple(sorted(each)) for each in channels(256, 128)]
    assert len(set(many)) == len(many)


def test_a_net_written_by_hand_has_torchvisions_layers() -> None:
    """The same weights in torchvision's module give the same logits: BatchNorm is the identity but for its shift."""
    peers.need()
    name = "resnet50"
    import torchvision

    model = plain.NETS[name]()
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    net = getattr(torchvision.models, name)(weights=None).eval()
    norms = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}
    with torch.no_grad():
        for layer, module in net.named_modules():
            if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                continue
            module.weight.copy_(torch.from_numpy(weights.pop(f"{layer}.weight").copy()))
            bias = torch.from_numpy(weights.pop(f"{layer}.bias").copy())
            if module.bias is not None:
                module.bias.copy_(bias)
                continue
            stem, _, last = layer.rpartition(".")
            norm = net.get_submodule(f"{stem}.{norms[last]}" if stem else norms[last])
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(bias)
        x = zoo.sample(name)
        want = net(torch.from_numpy(x)).numpy()
    assert not weights
    have = Session(model).run({"input": x})["logits"]
    np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    names = {known for info in Explainer(model).layers for known in info.names}
    assert set(NETS[name].layers) <= names


def test_without_a_gpu_the_benchmark_says_so_and_ends_well() -> None:
    if gpu.why_not() is None:
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(gpu.main)
    assert done.exit_code == 0
    assert done.output.startswith("no GPU benchmark here: ")


def test_the_gpu_benchmark_on_the_cpu(tmp_path, monkeypatch) -> None:
    """All of it but the device."""
    peers.need()
    monkeypatch.setattr(gpu, "COUNT", 4)
    monkeypatch.setattr(gpu, "PEER_COUNT", 2)
    found = gpu.measure("ecg", tmp_path, batch=2, rounds=1, peer=None, warmup=0, device="cpu")
    assert found["parity"] < 1e-4
    assert set(found["times faster"]) == {
        "one heatmap, than zennit",
        "one heatmap, than zennit-crp",
        "4 conditions, than zennit-crp",
        "an indexed sample, than zennit-crp",
    }
    assert found["in forward passes"]["one heatmap"] > 1
    assert found["fallbacks"]  # everything ran on the CPU, and CUDA was asked about
    assert gpu.rows_of("ecg", found)


def test_contenders_answer_the_same_question(tmp_path) -> None:
    """Shapes of what each gives; that relevance agrees is what the parity tests show."""
    peers.need()
    path = zoo.export("ecg", tmp_path)
    made = {name: kind("ecg", path, "epsilon_gamma_box") for name, kind in CONTENDERS.items() if name != "captum"}
    own = made["onnxcrp"].heatmap()().relevance["input"]
    assert made["forward"].heatmap()()["logits"].shape == (1, 5)
    gradient = made["torch gradient"].heatmap()()[0].numpy()
    assert gradient.shape == own.shape
    made["zennit"].heatmap()()
    made["zennit-crp"].heatmap()()
    made["zennit-crp"].conditions(["block2.conv", "block3.conv"], 1)()
    assert made["onnxcrp"].conditions(["block2.conv", "block3.conv"], 3)().heatmap.shape == (1, 3, 150)
    assert CONTENDERS["zennit"]("ecg", path, "attnlrp").heatmap() is None


def test_a_net_that_is_too_slow_goes_with_the_processes_it_started(monkeypatch) -> None:
    """The stand-in starts a process of its own and says which."""
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    started = []
    popen = all_nets.subprocess.Popen

    def stand_in(command, **options):
        started.append(popen([sys.executable, "-c", code], **{**options, "stdout": all_nets.subprocess.PIPE}))
        started.append(int(started[0].stdout.readline()))
        return started[0]

    monkeypatch.setattr(all_nets.subprocess, "Popen", stand_in)
    assert all_nets.measured("ecg", quick=True, seconds=0.2) == {"error": "not done in time"}
    process, child = started
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == -9
    for _ in range(100):
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} is still there")


def test_a_worker_runs_when_it_is_told_to(tmp_path) -> None:
    peers.need()
    path = zoo.export("ecg", tmp_path)
    with workers("ecg", path, "epsilon_plus_flat") as started:
        runs = {who: started[who].asks() for who in ("forward", "onnxcrp")}
        runs["four"] = started["onnxcrp"].asks(["block3.conv"], 4)
        found = interleaved(runs, rounds=2, warmup=0)
        assert 0 < found["forward"].median < found["onnxcrp"].median < found["four"].median
        assert started["forward"].asks(["block3.conv"], 4) is None
        with pytest.raises(WorkerError, match=r"KeyError: .*block9"):
            started["onnxcrp"].asks(["block9.conv"], 1)
        started["zennit"]._process.kill()
        with pytest.raises(WorkerError, match="the process of zennit ended"):
            started["zennit"].asks()


def test_the_page_of_speed_says_what_was_measured() -> None:
    page = all_nets.PAGE.read_text(encoding="utf-8")
    written = json.loads(all_nets.PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    assert all_nets.filled(page, all_nets.text(written)) == page, "benchmarks.all --from docs/speed.json --page"
    assert set(written["results"]) == set(NETS)
