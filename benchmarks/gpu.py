"""On one GPU: parity with zennit; time per heatmap, condition and indexed sample against zennit and zennit-crp there.

    python -m benchmarks.gpu [--only resnet50] [--batch 32] [--no-parity] [--json FILE]

Needs a GPU host with Python, onnxruntime-gpu and onnx-graphsurgeon. Where torch sees the GPU and the peers are
installed, they run beside it, else the table says why not, and the nets are those of benchmarks/plain.py. Without a GPU
it says so and exits 0. Heatmaps and forward passes are of a whole batch that is on the device already; TF32 is off on
both sides. Every question has sessions of its own: after a change of shapes cuDNN plans all convolutions anew, which
takes longer than running them.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks import plain
from benchmarks.common import interleaved, report, write_json
from benchmarks.contenders import TARGET, one_line, zennit_composite
from benchmarks.nets import HIGH, LOW, NETS, build, channels, export, sample

if TYPE_CHECKING:
    from onnxcrp import Explainer

CUDA = "CUDAExecutionProvider"
COUNT = 64  # conditions
PEER_COUNT, PEER_BATCH = 16, 8
GRAPH = "heatmap of one sample, as a CUDA graph"


def why_not() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install onnxruntime-gpu"
    import onnxruntime

    from onnxcrp.session import _cuda_devices

    if CUDA not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime {onnxruntime.__version__} has no CUDA provider: pip install onnxruntime-gpu"
    if not _cuda_devices():
        return "there is no CUDA device"
    return None


def fallbacks(explainer: Explainer, x: np.ndarray, **question: Any) -> list[str]:
    """Nodes that ran on the CPU though CUDA was asked for, except arithmetic on shapes, which is there on purpose."""
    nodes = explainer.profile(x, TARGET % 3, seed="abs", **question)
    return [f"{node.name} ({node.op})" for node in nodes if node.provider != CUDA and not node.on_shapes]


def peers() -> str | None:
    """Why the peers cannot run on the GPU; None where they can."""
    try:
        import torch

        from tests.support import peers as installed

        installed.load()
    except ImportError as error:
        return one_line(error)
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return None


def parity(net: str, composite: str, device: str) -> float | None:
    """Largest relative L2 of input relevance against zennit in float64; None for nets that the parity tests lack.

    Theirs are asked here, random nets with their units clear of 0 and of ties, where rounding would decide.
    """
    from onnxcrp import Explainer
    from tests.support.cases import NETS as known
    from tests.support.parity import Parity, errors

    if net not in known:
        return None
    with tempfile.TemporaryDirectory() as folder:
        case = Parity(net, Path(folder))
        explainer = Explainer(case.canonical("torchscript"), composite, providers=device, low=LOW, high=HIGH)
        have = explainer.explain(case.x, conditions=[{"y": target} for target in case.targets]).relevance["input"]
    return float(errors(have, case.reference(composite)["input"], 2).max())


def _moved(composite: Any, device: str) -> Any:
    """Bounds of z-box, if there are any, on the device."""
    for part in (composite, *getattr(composite, "composites", [])):
        for name, value in vars(part).items():
            if hasattr(value, "is_cuda"):
                setattr(part, name, value.to(device))
    return composite


def own_runs(
    net: str, path: str, composite: str, x: np.ndarray, device: str
) -> tuple[Explainer, dict[str, Callable[[], Any]]]:
    """The forward pass and onnxcrp, arrays staying on the device."""
    import onnxruntime

    from onnxcrp import Explainer
    from onnxcrp.session import Session

    explainer = Explainer(path, composite, providers=device, low=LOW, high=HIGH)
    there = {
        which: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
        for which, array in (("all", x), ("one", x[:1]))
    }
    layer = NETS[net].places["late"]
    number = next(info.channels for info in explainer.layers if layer in info.names)
    asked = [{layer: each} for each in channels(COUNT, number or 1)]
    names = [info.name for info in explainer.layers if info.family == "convolution"]

    def forward(which: str) -> Callable[[], Any]:
        session = Session(path, device)
        return lambda: session.run_ortvalues({"input": there[which]})

    def ask(which: str, *, cuda_graph: bool = False, **question: Any) -> Callable[[], Any]:
        own = Explainer(explainer.canonical, composite, providers=device, low=LOW, high=HIGH, cuda_graph=cuda_graph)
        return lambda: own.explain(there[which], TARGET, seed="one", return_ortvalue=True, **question)

    runs = {
        "forward": forward("all"),
        "forward of one": forward("one"),
        "heatmap": ask("all"),
        "heatmap of one": ask("one"),
        "2 conditions": ask("one", conditions=asked[:2]),
        f"{COUNT} conditions": ask("one", conditions=asked),
        "all layers of a batch": ask("all", record=names, inputs=()),
    }
    if device == "cuda":
        runs[GRAPH] = ask("one", cuda_graph=True)
    return explainer, runs


def peer_runs(net: str, composite: str, x: np.ndarray, device: str) -> dict[str, Callable[[], Any]]:
    """zennit and zennit-crp on the same device."""
    import torch
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from zennit.attribution import Gradient

    module = build(net).to(device)
    rules = _moved(zennit_composite(net, composite), device)
    data, layer = torch.from_numpy(x).to(device), NETS[net].places["late"]
    attribution = CondAttribution(module)
    layers = [name for name, part in module.named_modules() if isinstance(part, torch.nn.modules.conv._ConvNd)]
    concept = ChannelConcept()
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def heatmap() -> None:
        with Gradient(model=module, composite=rules) as attributor:
            attributor(data, lambda out: torch.eye(out.shape[1], device=out.device)[[TARGET]] * out)
        finish()

    def crp_heatmap() -> None:
        attribution(data.clone().requires_grad_(True), [{"y": [TARGET]}] * len(data), rules)
        finish()

    def conditions() -> None:
        asked = [{"y": [TARGET], layer: [channel]} for channel in range(PEER_COUNT)]
        for start in range(0, PEER_COUNT, PEER_BATCH):
            attribution(data[:1].clone().requires_grad_(True), asked[start : start + PEER_BATCH], rules)
        finish()

    def every_layer() -> None:
        found = attribution(
            data.clone().requires_grad_(True), [{"y": [TARGET]}] * len(data), rules, record_layer=layers
        )
        for name in layers:
            concept.attribute(found.relevances[name], layer_name=name, abs_norm=True)
        finish()

    return {
        "zennit heatmap": heatmap,
        "zennit-crp heatmap": crp_heatmap,
        f"zennit-crp {PEER_COUNT} conditions": conditions,
        "zennit-crp all layers of a batch": every_layer,
    }


def measure(
    net: str,
    folder: Path,
    *,
    batch: int,
    rounds: int,
    peer: str | None,
    warmup: int = 3,
    device: str = "cuda",
    compare: bool = True,
) -> dict[str, Any]:
    """All figures of one net; `device` "cpu" is for trying this out."""
    composite = NETS[net].composites[0]
    path = export(net, folder) if peer is None else plain.write(net, folder)
    x = sample(net, batch)
    explainer, runs = own_runs(net, path, composite, x, device)
    found: dict[str, Any] = {"composite": composite, "batch": batch, "device": device_name()}
    late = NETS[net].places["late"]
    found["fallbacks"] = fallbacks(explainer, x[:1]) + fallbacks(
        explainer, x[:1], conditions=[{late: [0]}, {late: [1]}]
    )
    comparable = peer is None and zennit_composite(net, composite) is not None and NETS[net].channels_first
    found["peer"] = "yes" if comparable else peer or "no such composite"
    if comparable:
        found["parity"] = parity(net, composite, device) if compare else None
        runs |= peer_runs(net, composite, x, device)
    timings = interleaved(runs, rounds=rounds, warmup=warmup)
    found["timings"] = timings
    unit, one = timings["forward"].median, timings["forward of one"].median
    many, few = timings[f"{COUNT} conditions"].median, timings["2 conditions"].median
    found["in forward passes"] = {
        "one heatmap": timings["heatmap"].median / unit,
        "one heatmap of one sample": timings["heatmap of one"].median / one,
        f"{COUNT} conditions": many / one,
        "each further condition": (many - few) / (COUNT - 2) / one,
        "all layers of a batch": timings["all layers of a batch"].median / unit,
    }
    if GRAPH in timings:
        found["in forward passes"][f"one {GRAPH}"] = timings[GRAPH].median / one
    if comparable:
        peer_each = timings[f"zennit-crp {PEER_COUNT} conditions"].median / PEER_COUNT
        found["times faster"] = {
            **{
                f"one heatmap, than {who}": timings[f"{who} heatmap"].median / timings["heatmap"].median
                for who in ("zennit", "zennit-crp")
            },
            f"{COUNT} conditions, than zennit-crp": peer_each * COUNT / many,
            "an indexed sample, than zennit-crp": timings["zennit-crp all layers of a batch"].median
            / timings["all layers of a batch"].median,
        }
    return found


def rows_of(net: str, found: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for one net."""
    rows = [[net, f"batch {found['batch']}, {found['composite']}", found["timings"]["forward"].show()]]
    rows += [["", f"{what}, forward passes", f"{ratio:.2f}"] for what, ratio in found["in forward passes"].items()]
    rows += [["", f"times faster: {what}", f"{ratio:.1f}"] for what, ratio in found.get("times faster", {}).items()]
    if found.get("parity") is not None:
        rows.append(["", "relative L2 to zennit in float64", f"{found['parity']:.1e}"])
    if found["peer"] != "yes":
        rows.append(["", "peers", found["peer"]])
    rows.append(["", "nodes on the CPU", ", ".join(found["fallbacks"][:4]) or "none"])
    return rows


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(NETS)))
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--parity/--no-parity", "compare", default=True, show_default=True, help="zennit in float64, minutes.")
@click.option("--json", "path", metavar="FILE")
def main(only: tuple[str, ...], batch: int, rounds: int, compare: bool, path: str | None) -> None:
    """Measure and print."""
    if reason := why_not():
        click.echo(f"no GPU benchmark here: {reason}")
        return
    peer = peers()
    nets = only or tuple(plain.NETS)
    if peer and (missing := [net for net in nets if net not in plain.NETS]):
        raise click.UsageError(f"{', '.join(missing)} cannot be built: {peer}")
    begin, results, rows = time.perf_counter(), {}, []
    for net in nets:
        click.echo(f"{net} ...", err=True)
        with tempfile.TemporaryDirectory() as folder:
            results[net] = measure(net, Path(folder), batch=batch, rounds=rounds, peer=peer, compare=compare)
        rows += rows_of(net, results[net])
        write_json(path, results)
    report(f"On {device_name()}", ["net", "", ""], rows)
    click.echo(f"{time.perf_counter() - begin:.0f} s", err=True)


def device_name() -> str:
    """What the GPU is called."""
    try:
        import torch

        return str(torch.cuda.get_device_name(0))
    except (ImportError, RuntimeError, AssertionError):
        return "one CUDA device"


if __name__ == "__main__":
    sys.exit(main())
