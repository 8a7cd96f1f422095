"""How cost grows with conditions, input size, depth, batch and samples: plots with the slope stated, docs/scaling.md.

    python -m benchmarks.scaling [--quick] [--json FILE] [--gpu FILE]      measure, then write pictures and page
    python -m benchmarks.scaling --from FILE                               write them from what was measured

The net is a tower of 3 x 3 convolutions (64 channels, ReLU) but for ImageNet's arithmetic, which is ResNet-50's. Times
are CPU seconds of one thread, which other work on the machine does not change much: medians of rounds in which all
points take turns. Memory is the peak of a process of its own beyond what it had before the model was there. `--gpu`:
what `python -m benchmarks.gpu --json FILE` wrote.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import plain
from benchmarks.common import alone, filled, interleaved, write_json
from benchmarks.contenders import TARGET

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE, FIGURES, ON_GPU = (
    ROOT / "docs" / name for name in ("scaling.md", "images/scaling.png", "scaling.json", "gpu.json")
)
CHANNELS, DEPTH, SIDE = 64, 8, 56
POINTS = {
    "conditions": (1, 2, 4, 8, 16, 32, 64),
    "side": (28, 56, 112, 224),
    "depth": (4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16),
    "samples": (16, 32, 64, 128),
}
NAMES = {
    "conditions": "conditions on one sample",
    "side": "side of the input, pixels",
    "depth": "convolutions",
    "batch": "samples in a batch, a heatmap each",
    "samples": "samples indexed",
}
IMAGENET, NODES, CORES = 1_281_167, 100, 64


def question(what: str, value: int, folder: str) -> Callable[[], Any]:
    """One call that asks at this point of an axis."""
    from onnxcrp import Explainer

    at = {"side": SIDE, "depth": DEPTH, "batch": 1, "conditions": 0, what: value}
    model = plain.tower(at["depth"], CHANNELS, at["side"])
    draw = np.random.default_rng(0)
    if what == "samples":
        return lambda: indexed(model, draw.standard_normal((value, 3, SIDE, SIDE)).astype(np.float32), folder)
    explainer = Explainer(model, threads=1, cache=False)
    x = draw.standard_normal((at["batch"], 3, at["side"], at["side"])).astype(np.float32)
    asked = [{f"conv{at['depth'] // 2}": [channel]} for channel in range(at["conditions"])] or None
    return lambda: explainer.explain(x, TARGET, conditions=asked, seed="one")


def indexed(model: Any, x: np.ndarray, folder: str) -> None:
    """An index of all layers over samples, in a folder of its own."""
    from onnxcrp.index import build

    with tempfile.TemporaryDirectory(dir=folder) as out:
        build(model, x, Path(out) / "index", target="predicted", batch_size=16, threads=1)


def measure(*, rounds: int, memory: bool, points: Mapping[str, Sequence[int]] = POINTS) -> dict[str, Any]:
    """Seconds and bytes at every point of every axis, and the rate of an index of ResNet-50."""
    found: dict[str, Any] = {}
    for what, values in points.items():
        click.echo(f"{what} ...", err=True)
        with tempfile.TemporaryDirectory() as folder:
            runs = {str(value): question(what, value, folder) for value in values}
            timings = interleaved(runs, rounds=rounds, clock=time.process_time)
        seconds = [timings[str(value)].median for value in values]
        found[what] = {"values": list(values), "seconds": seconds, "slope": slope(values, seconds)}
        if memory:
            told = [alone("benchmarks.scaling", "--child", what, str(value)) for value in values]
            if any("error" in each for each in told):
                raise click.ClickException(next(each["error"] for each in told if "error" in each))
            sizes = [each["bytes"] - each["before"] for each in told]
            found[what] |= {"bytes": sizes, "memory slope": slope(values, sizes)}
    return found


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of cost ~ value^p between the upper half of the points, where constants matter least."""
    half = min(len(values) // 2, len(values) - 2)
    x, y = np.log(np.asarray(values[half:], float)), np.log(np.maximum(np.asarray(costs[half:], float), 1e-12))
    return float(np.polyfit(x, y, 1)[0])


def index_rate(few: int, many: int) -> dict[str, Any]:
    """CPU seconds of one more sample in an index of all layers of ResNet-50, start-up taken out; and of a merge.

    Batches are of `few` samples in both, of which `many` is a multiple: the first one of a size costs much more.
    """
    from onnxcrp.index import build, merge

    model, draw = plain.resnet50(), np.random.default_rng(0)
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (few, many):
            np.save(folder / f"{count}.npy", draw.standard_normal((count, 3, 224, 224), np.float32))
            start = time.process_time()
            build(
                model,
                str(folder / f"{count}.npy"),
                folder / f"index{count}",
                target="predicted",
                batch_size=few,
                threads=1,
            )
            seconds.append(time.process_time() - start)
        start = time.process_time()
        merge([folder / f"index{count}" for count in (few, many)], folder / "merged")
        merging = (time.process_time() - start) / 2
    each = (seconds[1] - seconds[0]) / (many - few)
    return {"seconds per sample": each, "samples": [few, many], "seconds": seconds, "merge, seconds per shard": merging}


def imagenet(rate: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> dict[str, Any]:
    """Hours for an index of all layers of ResNet-50 over ImageNet's training set.

    CORES cores are the CPU machine; NODES of these are the cluster, whose parts are merged one after the other. The
    GPU's rate is that of a batch of which all layers were recorded.
    """
    core_hours = IMAGENET * rate["seconds per sample"] / 3600
    hours: dict[str, Any] = {
        "core": core_hours,
        "machine": core_hours / CORES,
        "cluster": core_hours / CORES / NODES + NODES * rate["merge, seconds per shard"] / 3600,
        "gpu": None,
    }
    if gpu is not None:
        net = gpu["results"]["resnet50"]
        hours["gpu"] = IMAGENET * net["timings"]["all layers of a batch"]["median"] / net["batch"] / 3600
        hours["device"] = net["device"]
    return hours


# ---- picture and page ------------------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Time (and memory) against every axis, both logarithmic, the slope in each title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    rows = 1 + any("bytes" in axis for axis in found.values())
    figure, grid = pyplot.subplots(rows, len(found), figsize=(3.1 * len(found), 2.9 * rows), squeeze=False)
    for column, (what, axis) in enumerate(found.items()):
        lines = [(np.array(axis["seconds"]) * 1e3, axis["slope"], "ms", "C0")]
        if "bytes" in axis:
            lines.append((np.array(axis["bytes"]) / 2**20, axis["memory slope"], "MiB", "C1"))
        for row, (costs, exponent, unit, colour) in enumerate(lines):
            panel = grid[row, column]
            panel.loglog(axis["values"], np.maximum(costs, 1e-3), "o-", color=colour, markersize=4)
            panel.set_title(f"{'CPU time' if unit == 'ms' else 'memory'} $\\sim n^{{{exponent:.2f}}}$", fontsize=10)
            panel.xaxis.set_major_locator(FixedLocator(axis["values"]))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
            panel.set_xlabel(NAMES[what], fontsize=9)
            if not column:
                panel.set_ylabel(unit, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def shown(hours: float | None) -> str:
    """Hours as people say them."""
    if hours is None:
        return "not measured"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"


def text(measured: Mapping[str, Any]) -> str:
    """What docs/scaling.md says between its marks."""
    found, about = measured["results"], measured["machine"]
    axes, rate, hours = found["axes"], found["index"], found["imagenet"]
    rows = ["| n | CPU time grows as | memory grows as |", "|---|---|---|"]
    for what, axis in axes.items():
        memory = f"n^{axis['memory slope']:.2f}" if "memory slope" in axis else ""
        values = f"{axis['values'][0]} to {axis['values'][-1]}"
        rows.append(f"| {NAMES[what]} ({values}) | n^{axis['slope']:.2f} | {memory} |")
    few, many = rate["samples"]
    merging = f"{rate['merge, seconds per shard']:.1f} s to merge each node's part"
    by_hand = "`python -m benchmarks.gpu --json FILE`, then `--gpu FILE` here"
    table = [
        ("one CPU machine", f"{CORES} such cores, shards side by side", "machine"),
        ("one GPU", f"all layers recorded, time of one {hours['device']} alone" if hours["gpu"] else by_hand, "gpu"),
        ("a Ray cluster", f"{NODES} nodes of {CORES} such cores, {merging}", "cluster"),
    ]
    return "\n".join(
        [
            *rows,
            "",
            f"Measured on {about['cpu']} with onnxruntime {about.get('onnxruntime')}, one thread.",
            "",
            "## ImageNet's training set, all layers of ResNet-50",
            "",
            f"An index of all layers costs {rate['seconds per sample']:.2f} core seconds for one more image ({few} and "
            f"{many} images, start-up",
            f"taken out). {IMAGENET:,} images are {hours['core']:,.0f} core hours:",
            "",
            "| | how | time |",
            "|---|---|---|",
            *(f"| {name} | {how} | {shown(hours[key])} |" for name, how, key in table),
            "",
            "Shards share nothing while they run, so cores and nodes are taken to add up; decoding pictures and a slow",
            "file system come on top.",
        ]
    )


def write_page(measured: Mapping[str, Any]) -> None:
    """The picture, and the figures in docs/scaling.md."""
    draw(measured["results"]["axes"], PICTURE)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(page, text(measured)), encoding="utf-8")


def child(what: str, value: int) -> None:
    """One point alone: the peak of its memory while it runs, and what the process had before the model was there."""
    from onnxcrp import Explainer
    from onnxcrp.analysis.memory import forget_peak, peak_memory

    Explainer(plain.tower(2, 8, 8), cache=False).explain(np.ones((1, 3, 8, 8), np.float32), TARGET, seed="one")
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = question(what, value, folder)
        run()
        forget_peak()
        run()
        print(json.dumps({"bytes": peak_memory(), "before": before}))


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Two rounds, no memory, eight images of ResNet-50.")
@click.option("--json", "path", metavar="FILE", default=str(FIGURES), show_default=True)
@click.option("--gpu", metavar="FILE", default=str(ON_GPU), show_default=True, help="What benchmarks.gpu wrote.")
@click.option("--from", "known", metavar="FILE", help="Measure nothing: draw and write from this.")
@click.option("--child", "alone_as", nargs=2, hidden=True)
def main(quick: bool, path: str, gpu: str, known: str | None, alone_as: tuple[str, str] | None) -> None:
    """Measure, draw, write."""
    if alone_as:
        child(alone_as[0], int(alone_as[1]))
        return
    if known is None:
        axes = measure(rounds=2 if quick else 3, memory=not quick)
        rate = index_rate(4, 12) if quick else index_rate(8, 24)
        on_gpu = json.loads(Path(gpu).read_text(encoding="utf-8")) if Path(gpu).is_file() else None
        hours = imagenet(rate, on_gpu)
        write_json(path, {"axes": axes, "index": rate, "imagenet": hours})
    write_page(json.loads(Path(known or path).read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
