"""Where we stand: `benchmarks.explain` for every net, each in a process of its own, and one table of all.

    python -m benchmarks.all [--quick] [--only vgg16] [--seconds 240] [--json FILE] [--from FILE] [--page]

`--quick` starts no net that would not be done within 15 minutes in all, and names those that are left.
`--page` writes the figures of docs/speed.md from what --json wrote: `--from docs/speed.json --page`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Timing, filled, write_json
from benchmarks.explain import tables
from benchmarks.nets import NETS

QUICK = 15 * 60  # seconds
PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
ORDER = ("ecg", "squeezenet1_0", "resnet18", "mobilenet_v2", "resnet50", "vgg16", "efficientnet_b0", "densenet121",
         "convnext_tiny", "vit_b_16")  # fmt: skip


def measured(net: str, *, quick: bool, seconds: float | None, part: float | None = None) -> dict[str, Any]:
    """What `benchmarks.explain` finds for one net within `seconds`, or {"error": why not}; `part`: its --seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.explain", "--only", net, "--json", str(path)]
        process = subprocess.Popen(
            command + ["--quick"] * quick + (["--seconds", str(part)] if part else []),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": "not done in time"}
        finally:
            if process.poll() is None:  # too slow, or interrupted: it goes with the processes it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode or not path.is_file():
            return {"error": (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
        return json.loads(path.read_text(encoding="utf-8"))["results"][net]


def as_timings(found: Any) -> Any:
    """Timings, which JSON made dictionaries of, again."""
    if isinstance(found, dict):
        if found.keys() == set(Timing.__dataclass_fields__):
            return Timing(**found)
        return {name: as_timings(entry) for name, entry in found.items()}
    return found


def text(written: Mapping[str, Any]) -> str:
    """What docs/speed.md says between its marks, of what --json wrote."""
    about, results = written["machine"], as_timings(written["results"])
    rows, columns = [], [""]
    for net, found in results.items():
        if "error" in found:
            rows.append([net, found["error"]])
            continue
        main, *others = found["heatmap"]
        heatmap = {composite: _ratio(ran["onnxcrp"], ran["forward"]) for composite, ran in found["heatmap"].items()}
        peer, late = found["heatmap"][main]["zennit-crp"], found["conditions"]["late"]
        forward = found["heatmap"][main]["forward"].median * 1e3
        row = {
            "": net if main == "epsilon_plus_flat" else f"{net}, {main}",
            "forward": f"{forward:.{1 if forward > 1 else 2}f} ms",
            "one heatmap": f"**{heatmap[main]}**",
            "other composites": ", ".join(heatmap[other] for other in others),
            "zennit-crp": _ratio(peer, found["heatmap"][main]["forward"]),
            "64 conditions, late": f"**{_ratio(late['onnxcrp 64'], late['forward'])}**",
            "each further: late, middle, early": ", ".join(
                f"{found['conditions'][place]['each']:.2f}" for place in ("late", "middle", "early")
            ),
            "zennit-crp, 64": _ratio(late.get("zennit-crp 64"), late["forward"]),
            "first session, cached heatmap": f"{found['start']['to the first session']:.1f}, "
            f"{found['cached']['to the first heatmap']:.1f} s",
            "GiB: heatmap, 64": ", ".join(
                f"{found['memory'][f'onnxcrp {what}']['bytes'] / 2**30:.1f}" for what in ("heatmap", "64")
            ),
            "file": f"{found['file']['ratio']:.2f}",
        }
        rows.append(list(row.values()))
        columns = list(row)
    versions = ", ".join(f"{package} {about[package]}" for package in ("onnxruntime", "torch", "zennit-crp"))
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        [f"{about['cores']} cores ({about['cpu']}), {versions}.", "", *(f"| {' | '.join(row)} |" for row in table)]
    )


def _ratio(timing: Any, unit: Timing) -> str:
    if not isinstance(timing, Timing):
        return "" if timing is None or timing.startswith("no such") else "fails"
    ratio = timing.median / unit.median
    return f"{ratio:.{0 if ratio >= 100 else 1}f}{'*' if timing.extrapolated else ''}"


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(NETS)))
@click.option("--quick", is_flag=True, help="One composite, fewer conditions and rounds, 15 minutes at most.")
@click.option("--seconds", "part", type=float, help="No round of a part of a net begins later.")
@click.option("--json", "path", metavar="FILE")
@click.option("--from", "known", metavar="FILE", help="Measure nothing: print, or write, what is there.")
@click.option("--page", is_flag=True, help="Write docs/speed.md, from --json or --from.")
def main(
    only: tuple[str, ...], quick: bool, part: float | None, path: str | None, known: str | None, page: bool
) -> None:
    """Measure and print."""
    if page and not (known or path):
        raise click.UsageError("--page needs --json or --from")
    if known is None:
        tables(measure(only, quick, part, path))
    else:
        tables(as_timings(json.loads(Path(known).read_text(encoding="utf-8"))["results"]))
    if page:
        written = json.loads(Path(known or path or "").read_text(encoding="utf-8"))
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), text(written)), encoding="utf-8")


def measure(only: tuple[str, ...], quick: bool, part: float | None, path: str | None) -> dict[str, Any]:
    """All nets, one after the other."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin, results = time.monotonic(), dict[str, Any]()
    for net in only or ORDER:
        left = QUICK - (time.monotonic() - begin) if quick else None
        if left is not None and left < 30:
            results[net] = {"error": "left out: 15 minutes are over"}
            continue
        click.echo(f"{net} ...", err=True)
        start = time.monotonic()
        results[net] = as_timings(measured(net, quick=quick, seconds=left, part=part))
        click.echo(f"{net}: {time.monotonic() - start:.0f} s", err=True)
        write_json(path, results)
    write_json(path, results)
    return results


if __name__ == "__main__":
    sys.exit(main())
