"""Where we stand: `benchmarks.explain` for every net, each in a process of its own, and one table of all.

    python -m benchmarks.all [--quick] [--only vgg16] [--seconds 240] [--json FILE]

`--quick` starts no net that would not be done within 15 minutes in all, and names those that are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Timing, write_json
from benchmarks.explain import tables
from benchmarks.nets import NETS

QUICK = 15 * 60  # seconds
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


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(NETS)))
@click.option("--quick", is_flag=True, help="One composite, fewer conditions and rounds, 15 minutes at most.")
@click.option("--seconds", "part", type=float, help="No round of a part of a net begins later.")
@click.option("--json", "path", metavar="FILE")
def main(only: tuple[str, ...], quick: bool, part: float | None, path: str | None) -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin, results = time.monotonic(), {}
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
    tables(results)


if __name__ == "__main__":
    sys.exit(main())
