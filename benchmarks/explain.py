"""One heatmap and many conditions: onnxruntime's forward pass, torch's gradient, zennit-crp and onnxcrp in one run.

    python -m benchmarks.explain [--quick] [--only vgg16 --only ecg] [--json FILE]

All at batch 1 on random weights, composite epsilon_plus_flat; conditions are single channels of a late layer. The
peer is run up to 16 conditions, in batches of 8, and extrapolated beyond (marked *): 64 on vgg16 need over 24 GB.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import Timing, alone, interleaved, report, write_json
from onnxcrp.analysis.memory import peak_memory

NETS = {  # shape of a sample, late layer as torch names it
    "vgg16": ((3, 224, 224), "features.28"),
    "resnet50": ((3, 224, 224), "layer4.1.conv2"),
    "mobilenet_v2": ((3, 224, 224), "features.18.0"),
    "ecg": ((1, 150), "block3.conv"),
}
TARGET, BATCH = 3, 8
CONDITIONS = (16, 64)


def build(name: str) -> Any:
    """The torch module in eval mode, its random weights and BatchNorm statistics as large as what flows through.

    As torch initializes them, nets of fifty layers answer with nothing but denormal numbers, which cost extra time.
    """
    from tests.support import peers

    peers.load()
    import torch
    import torchvision

    from tests.support.nets import ECGNet, randomise

    torch.manual_seed(0)
    net = (ECGNet() if name == "ecg" else getattr(torchvision.models, name)(weights=None)).eval().requires_grad_(False)
    randomise(net, torch.from_numpy(sample(name)).repeat(2, *[1] * len(NETS[name][0])), scale=3.0)
    return net


def export(name: str, folder: Path) -> str:
    """The net as an .onnx file."""
    import torch

    path = folder / f"{name}.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            build(name), torch.from_numpy(sample(name)), str(path), dynamo=False, input_names=["input"],
            output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    return str(path)


def sample(name: str) -> np.ndarray:
    """A random sample [1, ...]."""
    return np.random.default_rng(0).standard_normal((1, *NETS[name][0])).astype(np.float32)


# ---- contenders: each prepares itself and returns {what: function} ---------------------------------------------------


def forward(name: str, path: str) -> dict[str, Callable[[], Any]]:
    """The plain forward pass: the unit of all ratios."""
    from onnxcrp.session import Session

    session, x = Session(path), sample(name)
    return {"forward": lambda: session.run({"input": x})}


def torch_gradient(name: str, path: str) -> dict[str, Callable[[], Any]]:
    """torch: forward pass and the gradient of one logit."""
    net = build(name)
    import torch

    x = torch.from_numpy(sample(name)).requires_grad_(True)

    def run() -> None:
        torch.autograd.grad(net(x)[0, TARGET], x)

    return {"heatmap": run}


def zennit_crp(name: str, path: str) -> dict[str, Callable[[], Any]]:
    """zennit-crp: EpsilonPlusFlat, BatchNorm merged."""
    net = build(name)
    import torch
    from crp.attribution import CondAttribution
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    canonizer = ResNetCanonizer() if name.startswith("resnet") else SequentialMergeBatchNorm()
    attribution, composite = CondAttribution(net), EpsilonPlusFlat(canonizers=[canonizer])
    layer, x = NETS[name][1], torch.from_numpy(sample(name))

    def ask(conditions: list[dict[str, list[int]]]) -> None:
        for start in range(0, len(conditions), BATCH):
            data = x.clone().requires_grad_(True)
            attribution(data, conditions[start : start + BATCH], composite)

    def many(count: int) -> Callable[[], None]:
        return lambda: ask([{"y": [TARGET], layer: [channel]} for channel in range(count)])

    return {"heatmap": lambda: ask([{"y": [TARGET]}]), "1": many(1), "16": many(16)}


def onnxcrp(name: str, path: str) -> dict[str, Callable[[], Any]]:
    """onnxcrp, through the Explainer as users call it."""
    from onnxcrp import Explainer

    explainer, x, layer = Explainer(path), sample(name), NETS[name][1]
    if layer not in {name for info in explainer.layers for name in info.names}:
        raise click.ClickException(f"{name} has no layer {layer}")

    def many(count: int) -> Callable[[], Any]:
        conditions = [{layer: [channel]} for channel in range(count)]
        return lambda: explainer.explain(x, target=TARGET, conditions=conditions, seed="abs")

    found = {"heatmap": lambda: explainer.explain(x, target=TARGET, seed="abs")}
    return found | {str(count): many(count) for count in (1, *CONDITIONS)}


CONTENDERS = {"forward": forward, "torch": torch_gradient, "zennit-crp": zennit_crp, "onnxcrp": onnxcrp}


def start_up(path: str) -> dict[str, float]:
    """Seconds from a fresh process to the first heatmap, by step."""
    begin = time.perf_counter()
    import onnxcrp as package
    from onnxcrp.canonize import canonize
    from onnxcrp.session import Session

    imported = time.perf_counter()
    canonical = canonize(path)
    canonized = time.perf_counter()
    model = package.compile(canonical)
    compiled = time.perf_counter()
    Session(model)
    return {
        "import": imported - begin,
        "canonize": canonized - imported,
        "compile": compiled - canonized,
        "session": time.perf_counter() - compiled,
    }


def measure(name: str, folder: Path, *, rounds: int) -> dict[str, Any]:
    """All figures of one net."""
    path = export(name, folder)
    runs = {(who, what): run for who, prepare in CONTENDERS.items() for what, run in prepare(name, path).items()}
    light = {key: run for key, run in runs.items() if key[1] in ("forward", "heatmap", "1")}
    heavy = {key: run for key, run in runs.items() if key not in light or key == ("forward", "forward")}
    timings: dict[tuple[str, str], Timing] = interleaved(light, rounds=rounds)  # type: ignore[arg-type]
    unit = timings["forward", "forward"]
    again: dict[tuple[str, str], Timing] = interleaved(heavy, rounds=max(2, rounds // 3))  # type: ignore[arg-type]
    heavy_unit = again.pop(("forward", "forward"))
    timings |= again
    timings["zennit-crp", "64"] = timings["zennit-crp", "16"].times(4)
    each = {
        who: (timings[who, "64"].median - timings[who, "16"].median) / 48 / heavy_unit.median
        if who == "onnxcrp"
        else timings[who, "16"].median / 16 / heavy_unit.median
        for who in ("zennit-crp", "onnxcrp")
    }
    del runs, light, heavy
    memory = {
        f"{who} {what}": alone("benchmarks.explain", "--child", who, name, what, path)
        for who, what in (("zennit-crp", "heatmap"), ("zennit-crp", "16"), ("onnxcrp", "heatmap"), ("onnxcrp", "64"))
    }
    return {
        "unit": unit,
        "unit_of_conditions": heavy_unit,
        "timings": {f"{who} {what}": timing for (who, what), timing in timings.items()},
        "each_condition": each,
        "memory": memory,
        "start": alone("benchmarks.explain", "--child", "start", name, "", path),
    }


def child(who: str, name: str, what: str, path: str) -> None:
    """One contender alone: its peak memory, or its start-up times, as a line of JSON."""
    if who == "start":
        print(json.dumps(start_up(path)))
        return
    CONTENDERS[who](name, path)[what]()
    print(json.dumps({"bytes": peak_memory()}))


def rows_of(name: str, found: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for one net."""
    rows = []
    for who in ("forward", "torch", "zennit-crp", "onnxcrp"):
        cells = [name, who]
        for what in ("forward" if who == "forward" else "heatmap", "16", "64"):
            timing = found["timings"].get(f"{who} {what}")
            unit = found["unit_of_conditions"] if what in ("16", "64") else found["unit"]
            cells.append("" if timing is None else timing.show() if who == "forward" else timing.show(unit))
        each = found["each_condition"].get(who)
        cells.append("" if each is None else f"{each:.2f}")
        sizes = [found["memory"].get(f"{who} {what}") for what in ("heatmap", "16", "64")]
        cells.append(" / ".join(f"{s['bytes'] / 2**30:.2f}" if "bytes" in s else s["error"] for s in sizes if s))
        rows.append(cells)
        name = ""
    start = found["start"]
    rows.append(["", "onnxcrp start", ", ".join(f"{step} {seconds:.2f} s" for step, seconds in start.items())])
    return rows


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(NETS)))
@click.option("--quick", is_flag=True, help="Three rounds instead of nine.")
@click.option("--json", "path", metavar="FILE")
@click.option("--child", "alone_as", nargs=4, hidden=True)
def main(only: tuple[str, ...], quick: bool, path: str | None, alone_as: tuple[str, ...] | None) -> None:
    """Measure and print."""
    if alone_as:
        child(*alone_as)
        return
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in only or NETS:
            click.echo(f"{name} ...", err=True)
            results[name] = measure(name, Path(folder), rounds=3 if quick else 9)
            rows += rows_of(name, results[name])
            write_json(path, results)
    columns = ["net", "", "one heatmap", "16 conditions", "64 conditions", "each condition", "peak memory, GiB"]
    report("Times in forward passes of onnxruntime on the same model (* extrapolated from 16)", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
