"""One net: onnxruntime's forward pass, torch's gradient, zennit, zennit-crp, captum and onnxcrp, in turn.

    python -m benchmarks.explain [--quick] [--only vgg16 --only ecg] [--seconds 240] [--json FILE]

At batch 1 on random weights, in multiples of onnxruntime's forward pass on the same model: one heatmap under every
composite that fits; conditions (single channels) on a late, a middle and an early layer and on a chain of all three;
seconds from a fresh process to the first heatmap, without and with a cache; peak memory; size of the files. The peer
gets 16 conditions in batches of 8, one batch where these take long, and is extrapolated beyond (marked *).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Timing, alone, interleaved, report, write_json
from benchmarks.contenders import BATCH, CONTENDERS, TARGET
from benchmarks.nets import HIGH, LOW, NETS, export, sample
from benchmarks.worker import Worker, WorkerError, workers

COUNTS = (16, 64, 256)
PEER = 16  # conditions that the peer is asked at most
CHAIN = "chain"


def heatmaps(started: Mapping[str, Worker], *, rounds: int, seconds: float) -> dict[str, Any]:
    """One heatmap of every contender: {who: Timing, or why there is none}."""
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for who, worker in started.items():
        try:
            run = worker.asks()
        except WorkerError as error:  # a peer that cannot do it is a row of the table
            if who in ("forward", "onnxcrp"):
                raise
            found[who] = str(error)
            continue
        if run is None:
            found[who] = "no such composite"
        else:
            runs[who] = run
    return interleaved(runs, rounds=rounds, seconds=seconds, warmup=0) | found


def conditions(
    started: Mapping[str, Worker],
    layers: Sequence[str],
    counts: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    peers: bool = True,
) -> dict[str, Any]:
    """Conditions on one layer, or on each of several at once: the forward pass, onnxcrp and the peer.

    The peer gets a whole batch of conditions at least: one alone would cost it more than its share.
    """
    runs: dict[str, Any] = {"forward": started["forward"].asks()}
    runs |= {f"onnxcrp {count}": started["onnxcrp"].asks(layers, count) for count in (1, *counts)}
    found: dict[str, Any] = {}
    measured = 0
    try:
        if peers and (one := started["zennit-crp"].asks(layers, 1)):
            measured = max(BATCH, min(PEER, int(seconds / 4 / one())))
            runs[f"zennit-crp {measured}"] = started["zennit-crp"].asks(layers, measured)
    except WorkerError as error:
        measured, found["zennit-crp"] = 0, str(error)
    found = interleaved(runs, rounds=rounds, seconds=seconds, warmup=0) | found
    if measured:
        for count in counts:
            if count != measured:
                found[f"zennit-crp {count}"] = found[f"zennit-crp {measured}"].times(count / measured)
    first, last = found[f"onnxcrp {counts[0]}"], found[f"onnxcrp {counts[-1]}"]
    few, many = (1, counts[0]) if len(counts) == 1 else (counts[0], counts[-1])
    if few == 1:
        first, last = found["onnxcrp 1"], first
    found["each"] = (last.median - first.median) / (many - few) / found["forward"].median
    return found


def measure(net: str, folder: Path, *, quick: bool, seconds: float | None = None) -> dict[str, Any]:
    """All figures of one net; no round of a part begins after `seconds`."""
    path = export(net, folder)
    about = NETS[net]
    rounds = 3 if quick else 9
    if seconds is None:
        seconds = 6.0 if quick else 240.0
    found: dict[str, Any] = {"heatmap": {}, "conditions": {}}
    main, *others = about.composites[:1] if quick else about.composites
    with workers(net, path, main) as started:
        found["heatmap"][main] = heatmaps(started, rounds=rounds, seconds=seconds)
        for place, layer in about.places.items():
            counts = COUNTS if not quick else COUNTS[:2] if place == "late" else COUNTS[:1]
            found["conditions"][place] = {
                "layer": layer,
                **conditions(
                    started,
                    [layer],
                    counts,
                    rounds=max(2, rounds // 3),
                    seconds=seconds,
                    peers=not quick or place == "late",
                ),
            }
        found["conditions"][CHAIN] = {
            "layer": " + ".join(about.layers),
            **conditions(
                started, about.layers, COUNTS[:1], rounds=max(2, rounds // 3), seconds=seconds, peers=not quick
            ),
        }
    for composite in others:
        with workers(net, path, composite, without=["captum"]) as started:  # whose rules are always its own
            found["heatmap"][composite] = heatmaps(started, rounds=rounds, seconds=seconds)
    wanted = [("onnxcrp", "heatmap"), ("onnxcrp", "64")]
    if about.channels_first:
        wanted += [("zennit-crp", "heatmap")] if quick else [("zennit-crp", "heatmap"), ("zennit-crp", "16")]
    found["memory"] = {
        f"{who} {what}": alone(__spec__.name, "--child", who, net, what, path, timeout=600) for who, what in wanted
    }
    cache = str(folder / f"{net}.cache")
    found["start"] = alone(__spec__.name, "--child", "start", net, "", path, ONNXCRP_CACHE="")
    alone(__spec__.name, "--child", "cached", net, "", path, ONNXCRP_CACHE=cache)
    found["cached"] = alone(__spec__.name, "--child", "cached", net, "", path, ONNXCRP_CACHE=cache)
    found["file"] = _sizes(path, folder, main)
    return found


def _sizes(path: str, folder: Path, composite: str) -> dict[str, Any]:
    """Bytes of the source and of the relevance model of one heatmap, and their ratio."""
    import onnxcrp
    from onnxcrp.session import save

    save(onnxcrp.compile(path, composite), folder / "relevance.onnx")
    source, written = (os.path.getsize(each) for each in (path, folder / "relevance.onnx"))
    return {"source": source, "relevance": written, "ratio": written / source}


# ---- a process of its own --------------------------------------------------------------------------------------------


def child(who: str, net: str, what: str, path: str) -> None:
    """One contender alone: its peak memory, or seconds of a first start, as a line of JSON."""
    if who in ("start", "cached"):
        print(json.dumps(_start(net, path, stepwise=who == "start")))
        return
    from onnxcrp.analysis.memory import forget_peak, peak_memory

    contender = CONTENDERS[who](net, path, NETS[net].composites[0])
    run = contender.heatmap() if what == "heatmap" else contender.conditions([NETS[net].places["late"]], int(what))
    assert run is not None
    run()
    forget_peak()  # what compiling took
    run()
    print(json.dumps({"bytes": peak_memory()}))


def _start(net: str, path: str, *, stepwise: bool) -> dict[str, float]:
    """Seconds from a fresh process to the first heatmap, step by step; with a cache there are two."""
    x, laps, used, begin = sample(net), {}, time.process_time(), time.perf_counter()

    def lap(what: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        laps[what], begin = now - begin, now

    import onnxruntime  # noqa: F401

    import onnxcrp
    from onnxcrp import Explainer

    lap("import")
    bounds = {"low": LOW, "high": HIGH}
    if stepwise:
        from onnxcrp.canonize import canonize
        from onnxcrp.session import Session

        canonical = canonize(path)
        lap("canonize")
        model = onnxcrp.compile(canonical, NETS[net].composites[0])
        lap("compile")
        Session(model)
        lap("session")
        laps["to the first session"] = sum(laps.values())
        return laps | {"of the processor": time.process_time() - used}
    explainer = Explainer(path, NETS[net].composites[0], **bounds)
    lap("open")
    explainer.explain(x, target=TARGET, seed="abs")
    lap("session and first heatmap")
    laps["to the first heatmap"] = sum(laps.values())
    return laps | {"of the processor": time.process_time() - used}


# ---- tables ----------------------------------------------------------------------------------------------------------


def _cell(timing: Any, unit: Timing) -> str:
    return timing.show(unit) if isinstance(timing, Timing) else timing or ""


def tables(results: Mapping[str, Any]) -> None:
    """What was measured, on stdout."""
    rows = []
    for net, found in results.items():
        for composite, timings in found.get("heatmap", {}).items():
            unit = timings["forward"]
            cells = [_cell(timings.get(who), unit) for who in CONTENDERS if who != "forward"]
            rows.append([net, composite, unit.show(), *cells])
    report(
        "One heatmap, in forward passes of onnxruntime on the same model",
        ["net", "composite", "forward", *(who for who in CONTENDERS if who != "forward")],
        rows,
    )
    rows = []
    for net, found in results.items():
        for place, timings in found.get("conditions", {}).items():
            for who in ("onnxcrp", "zennit-crp"):
                cells = [_cell(timings.get(f"{who} {count}"), timings["forward"]) for count in COUNTS]
                if any(cells):
                    each = f"{timings['each']:.2f}" if who == "onnxcrp" else ""
                    rows.append([net, f"{place}: {timings['layer']}", who, *cells, each])
    columns = ["net", "conditions on", "", *(f"{count}" for count in COUNTS), "each further"]
    report("Conditions on one sample, in forward passes (* extrapolated)", columns, rows)
    rows = []
    for net, found in results.items():
        if "error" in found:
            rows.append([net, found["error"]])
            continue
        rows.append(
            [
                net,
                _laps(found["start"]),
                _laps(found["cached"]),
                ", ".join(f"{what} {_size(told)}" for what, told in found["memory"].items()),
                f"{found['file']['source'] / 1e6:.1f} MB x {found['file']['ratio']:.2f}",
            ]
        )
    report("Start, memory, file", ["net", "first start", "with a cache", "peak memory, GiB", "source, relevance"], rows)


def _laps(laps: Mapping[str, Any]) -> str:
    return laps["error"] if "error" in laps else ", ".join(f"{step} {seconds:.2f} s" for step, seconds in laps.items())


def _size(told: Mapping[str, Any]) -> str:
    return told["error"] if "error" in told else f"{told['bytes'] / 2**30:.2f}"


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(NETS)))
@click.option(
    "--quick", is_flag=True, help="One composite, fewer conditions and rounds; the peer on the late layer only."
)
@click.option("--seconds", type=float, help="No round of a part begins later (default 240, quick 6).")
@click.option("--json", "path", metavar="FILE")
@click.option("--child", "alone_as", nargs=4, hidden=True)
def main(
    only: tuple[str, ...], quick: bool, seconds: float | None, path: str | None, alone_as: tuple[str, ...] | None
) -> None:
    """Measure and print."""
    if alone_as:
        child(*alone_as)
        return
    results: dict[str, Any] = {}
    for name in only or NETS:
        click.echo(f"{name} ...", err=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder), quick=quick, seconds=seconds)
        write_json(path, results)
    tables(results)


if __name__ == "__main__":
    sys.exit(main())
