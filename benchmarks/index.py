"""Building an index against zennit-crp's FeatureVisualization, on the same net and pictures in one run.

    python -m benchmarks.index [--quick] [--only all|late|memory|size ...] [--device cuda] [--json FILE]

`all`: every convolution of resnet18; `late`: one late layer. Random weights and BatchNorm statistics, JPEG files of
500 x 375 pixels in folders of ten classes, read and cut to 224 x 224 by the same code for both; targets are the labels.
onnxcrp keeps sum and max at once, which the peer would need two runs for. Batches: 32 with the peer (its default), what
onnxcrp chooses with onnxcrp. Every run is a process of its own, in turn, and tells its peak memory, what it left on the
disk, and the processor time it took, imports and all: on a busy machine the fairer ratio. `memory`: an ECG net over
more and more samples. `size`: the bytes of an index of resnet18's 21 layers over 1000 classes with 50 samples each,
scores random.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import Timing, alone, report, write_json

NET = "resnet18"
LAYERS = {"all": None, "late": "layer4.0.conv2"}
PICTURE, SIGNAL = (3, 224, 224), (1, 150)
CLASSES, SIZE = 10, (500, 375)
BATCH = 32
COUNTS = (1_000, 10_000, 100_000)  # samples of the ECG net
LAYOUT = [("conv1", 64, 112)] + [  # channels and positions along one side of resnet18's convolutions, at 224 pixels
    (f"layer{stage}.{name}", 32 * 2**stage, 112 // 2**stage)
    for stage in range(1, 5)
    for name in ("0.conv1", "0.conv2", *(["0.downsample.0"] if stage > 1 else []), "1.conv1", "1.conv2")
]
LAYOUT += [("fc", 1000, 1)]
ALL_CLASSES, PER_CLASS = 1000, 50


# ---- the data --------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int) -> None:
    """Smooth random colours with some noise, as JPEG files in a folder for each class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def write_signals(path: Path, count: int) -> None:
    """Random signals [count, 1, 150] as .npy, written through a map."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, *SIGNAL))
    rng = np.random.default_rng(0)
    for at in range(0, count, 10_000):
        part = array[at : at + 10_000]
        part[:] = rng.random(part.shape, np.float32)
    array.flush()


def export(name: str, shape: tuple[int, ...], folder: Path) -> Path:
    """The net with random weights and BatchNorm statistics as an .onnx file."""
    import torch

    from tests.support import nets

    path = folder / f"{name}.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            nets.build(name)[0], torch.zeros(1, *shape), str(path), dynamo=False, input_names=["input"],
            output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    return path


# ---- contenders, each in a process of its own ------------------------------------------------------------------------


def onnxcrp(model: str, data: str, out: str, which: str, device: str) -> dict[str, float]:
    """onnxcrp, as a user calls it; the rate once started leaves out the time until the first batch is through."""
    from onnxcrp.index import build

    ticks: list[tuple[int, float]] = []
    begin = time.perf_counter()
    build(
        model, data, out, layers=LAYERS[which], preprocess="imagenet", providers=device,
        progress=lambda done, *_: ticks.append((done, time.perf_counter())),
    )  # fmt: skip
    end = time.perf_counter()
    done, first = ticks[0]
    return {"seconds": end - begin, "samples": ticks[-1][0], "steady": (ticks[-1][0] - done) / (end - first)}


def zennit_crp(model: str, data: str, out: str, which: str, device: str) -> dict[str, float]:
    """zennit-crp, as its tutorial calls it: EpsilonPlusFlat, BatchNorm merged; files decoded by the code of onnxcrp."""
    from tests.support import nets

    vars(np)["int"] = int  # which zennit-crp 0.6 still asks for
    import torch
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.visualization import FeatureVisualization
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer

    from onnxcrp.index.dataset import Port, open_data
    from onnxcrp.preprocessing import for_model

    shape = ("batch", *PICTURE)
    files = open_data(data, Port(for_model("imagenet", shape, np.float32), shape, np.dtype(np.float32), "input"))

    class Pictures:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(files.load(int(number)).x[0]), files.label(int(number))

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    net = nets.build(NET)[0].requires_grad_(True).to(device)
    every = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Conv2d)]
    layers = every if LAYERS[which] is None else [LAYERS[which]]
    begin = time.perf_counter()
    vision = FeatureVisualization(
        CondAttribution(net), Pictures(), {name: ChannelConcept() for name in layers}, path=out, device=device
    )
    with contextlib.redirect_stdout(io.StringIO()):
        vision.run(EpsilonPlusFlat(canonizers=[ResNetCanonizer()]), 0, len(files), batch_size=BATCH)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "samples": len(files), "steady": len(files) / seconds}


CONTENDERS: dict[str, Callable[[str, str, str, str, str], dict[str, float]]] = {
    "zennit-crp": zennit_crp,
    "onnxcrp": onnxcrp,
}


def on_disk(folder: str) -> dict[str, int]:
    """Bytes and number of the files below a folder."""
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return {"bytes": sum(sizes), "files": len(sizes)}


def signals(model: str, data: str, out: str) -> dict[str, float]:
    """An index of the ECG net; peak of the memory that is the process' own (a mapped file's pages are the system's)."""
    from onnxcrp.index import build

    private = 0

    def look(done: int, total: int, skipped: int) -> None:
        nonlocal private
        private = max(private, private_memory())

    begin = time.perf_counter()
    index = build(model, data, out, target="predicted", checkpoint=1, progress=look)
    return {"seconds": time.perf_counter() - begin, "samples": index.manifest["samples"], "private": private}


def private_memory() -> int:
    """Resident bytes of this process that are no pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def synthetic(out: str) -> dict[str, float]:
    """Tables of resnet18's layers over 1000 classes, from random scores that fall off as relevance does."""
    from onnxcrp.index.reduce import AGGREGATES, CRITERIA
    from onnxcrp.index.state import Layout, Rows, State
    from onnxcrp.index.store import write_tables

    criteria = tuple((c, a) for c in CRITERIA for a in AGGREGATES)
    layout = Layout({name: channels for name, channels, _ in LAYOUT}, criteria, 40, True)
    rng = np.random.default_rng(0)
    served = {
        name: _served(rng, channels) for name, channels, _ in LAYOUT
    }  # ten classes for each channel, as a pilot would choose
    state = State(layout, served)
    step = 2 * ALL_CLASSES
    for start in range(0, ALL_CLASSES * PER_CLASS, step):
        sample, target = np.arange(start, start + step), np.arange(step, dtype=np.int32) % ALL_CLASSES
        for name, channels, side in LAYOUT:
            for criterion in CRITERIA:
                score = {}
                for aggregate in AGGREGATES:
                    raw = rng.standard_exponential((step, channels), np.float32) ** 2
                    score[aggregate] = raw / raw.sum(axis=1, keepdims=True)
                position = rng.integers(0, side * side, (step, channels), np.int32)
                state.layers[name].add(criterion, Rows(score, position, sample, target), layout.edges)
    state.rows = dict.fromkeys(range(ALL_CLASSES), PER_CLASS)
    Path(out).mkdir()
    begin = time.perf_counter()
    write_tables(Path(out), state)
    return {"seconds": time.perf_counter() - begin, "samples": ALL_CLASSES * PER_CLASS}


def _served(rng: np.random.Generator, channels: int) -> dict[int, np.ndarray]:
    chosen = np.argsort(rng.random((channels, ALL_CLASSES), np.float32), axis=1)[:, :10]
    pairs = [(cls, np.flatnonzero((chosen == cls).any(axis=1)).astype(np.int32)) for cls in range(ALL_CLASSES)]
    return {cls: found for cls, found in pairs if len(found)}


def child(what: str, *arguments: str) -> None:
    """One run alone, as a line of JSON."""
    from onnxcrp.analysis.memory import peak_memory

    if what in CONTENDERS:
        found = CONTENDERS[what](*arguments)
        out = arguments[2]
    elif what == "signals":
        model, data, out = arguments
        found = signals(model, data, out)
    else:
        (out,) = arguments
        found = synthetic(out)
    print(json.dumps({**found, "cpu": time.process_time(), "peak": peak_memory(), **on_disk(out)}))


# ---- what is measured ------------------------------------------------------------------------------------------------


def run(what: str, *arguments: str) -> dict[str, Any]:
    """One run in a process of its own; raises ClickException with its last line where that fails."""
    found = alone("benchmarks.index", "--child", json.dumps([what, *arguments]))
    if "error" in found:
        raise click.ClickException(f"{what}: {found['error']}")
    return found


def speed(which: str, folder: Path, *, samples: int, rounds: int, device: str) -> dict[str, Any]:
    """Both contenders in turn over the same pictures."""
    model, data = folder / f"{NET}.onnx", folder / f"pictures{samples}"
    if not model.is_file():
        export(NET, PICTURE, folder)
    if not data.is_dir():
        write_pictures(data, samples)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory(dir=folder) as room:
                found = run(name, str(model), str(data), os.path.join(room, "out"), which, device)
            click.echo(f"  {which}, round {number}, {name}: {found['samples'] / found['seconds']:.2f} /s", err=True)
            runs[name].append(found)
    results: dict[str, Any] = {"samples": samples}
    for name, each in runs.items():
        results[name] = {
            "whole": Timing.of([r["seconds"] / r["samples"] for r in each]),
            "steady": Timing.of([1 / r["steady"] for r in each]),
            "cpu": Timing.of([r["cpu"] / r["samples"] for r in each]),
            **{key: max(r[key] for r in each) for key in ("peak", "bytes", "files")},
        }
    for what in ("whole", "steady", "cpu"):
        results[f"times_{what}"] = results["zennit-crp"][what].median / results["onnxcrp"][what].median
    return results


def memory(folder: Path, counts: tuple[int, ...]) -> dict[str, Any]:
    """One index each over so many samples."""
    model, found = export("ecg", SIGNAL, folder), {}
    for count in counts:
        data = folder / f"signals{count}.npy"
        write_signals(data, count)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            found[str(count)] = run("signals", str(model), str(data), os.path.join(room, "out"))
        data.unlink()
    return found


def speed_rows(which: str, found: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for both contenders."""
    rows = []
    for name in CONTENDERS:
        each = found[name]
        rates = [f"{1 / each[what].median:.2f}" for what in ("whole", "steady")]
        spread = (each["whole"].high - each["whole"].low) / 2 / each["whole"].median
        times = [f"{found[f'times_{what}']:.2f}" if name == "onnxcrp" else "1" for what in ("whole", "steady", "cpu")]
        rows.append(
            [
                which, name, f"{rates[0]} ± {spread:.0%}", rates[1], f"{each['cpu'].median * 1e3:.0f} ms",
                " / ".join(times), f"{each['peak'] / 2**30:.2f} GiB",
                f"{each['bytes'] / 1e6:.2f} MB in {each['files']}",
            ]
        )  # fmt: skip
        which = ""
    return rows


PARTS = ("all", "late", "memory", "size")


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(PARTS))
@click.option("--quick", is_flag=True, help="One round over few samples, and up to 10,000 signals.")
@click.option("--samples", type=int, default=None, help="Pictures (default 1024, quick 64).")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="For `all`, `late`."
)
@click.option("--json", "path", metavar="FILE")
@click.option("--child", "alone_as", hidden=True)
def main(
    only: tuple[str, ...], quick: bool, samples: int | None, device: str, path: str | None, alone_as: str | None
) -> None:
    """Measure and print."""
    if alone_as:
        child(*json.loads(alone_as))
        return
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    parts = only or PARTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for which in (part for part in parts if part in LAYERS):
            count, rounds = samples or (64 if quick else 1024), 1 if quick else 3
            results[which] = speed(which, folder, samples=count, rounds=rounds, device=device)
            rows += speed_rows(which, results[which])
            write_json(path, results)
        if rows:
            columns = [
                "layers", "", "samples/s", "once started", "CPU time each", "times: samples/s / once started / CPU",
                "peak memory", "on disk",
            ]  # fmt: skip
            report(f"Building an index of {NET}", columns, rows)
        if "memory" in parts:
            results["memory"] = memory(folder, COUNTS[:2] if quick else COUNTS)
            write_json(path, results)
            report(
                "Memory of an index over more and more samples, ECG net",
                ["samples", "own memory, peak", "with mapped files", "samples/s", "on disk"],
                [
                    [
                        f"{int(count):,}", f"{each['private'] / 2**20:.0f} MiB", f"{each['peak'] / 2**20:.0f} MiB",
                        f"{each['samples'] / each['seconds']:.0f}", f"{each['bytes'] / 1e6:.2f} MB",
                    ]
                    for count, each in results["memory"].items()
                ],
            )  # fmt: skip
        if "size" in parts:
            results["size"] = each = run("synthetic", os.path.join(name, "synthetic"))
            write_json(path, results)
            report(
                f"An index of {len(LAYOUT)} layers, {sum(c for _, c, _ in LAYOUT)} concepts, {ALL_CLASSES} classes",
                ["on disk", "files", "written in", "peak memory"],
                [[f"{each['bytes'] / 1e6:.0f} MB", str(each["files"]), f"{each['seconds']:.0f} s",
                  f"{each['peak'] / 2**30:.2f} GiB"]],
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
