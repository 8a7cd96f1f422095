"""What all benchmarks share: interleaved rounds, medians and spread, memory of a process of its own, the machine."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("onnxcrp", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "zennit", "zennit-crp", "captum")


class Seconds(float):
    """What a run took, where a run measures itself."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: median, quartiles, how often it ran; `extrapolated` if it was not run in full."""

    median: float
    low: float
    high: float
    rounds: int
    extrapolated: bool = False

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        """Median and quartiles."""
        low, median, high = np.percentile(seconds, [25, 50, 75])
        return Timing(float(median), float(low), float(high), len(seconds))

    def times(self, factor: float) -> Timing:
        """The same, extrapolated to `factor` times the work."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.rounds, True)

    def show(self, unit: Timing | None = None) -> str:
        """In milliseconds, or as a multiple of `unit`; a star marks what is extrapolated."""
        star = "*" if self.extrapolated else ""
        if unit is None:
            return f"{self.median * 1e3:.1f} ms{star}"
        spread = (self.high - self.low) / 2 / unit.median
        return f"{self.median / unit.median:.2f}{star} ± {spread:.2f}"


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float | None = None,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run all contenders in turn, `rounds` times, so that a slow minute of the machine hits all of them alike.

    The first `warmup` rounds do not count. After `seconds` no new round begins, but one is always measured. `clock`:
    time.process_time counts CPU seconds. A contender that returns Seconds has measured itself.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for number in range(warmup + rounds):
        if number > warmup and seconds is not None and time.perf_counter() - begin > seconds:
            break
        for name, run in contenders.items():
            gc.collect()
            start = clock()
            told = run()
            took = told if isinstance(told, Seconds) else clock() - start
            if number >= warmup:
                found[name].append(float(took))
    return {name: Timing.of(each) for name, each in found.items()}


def alone(module: str, *arguments: str, timeout: float | None = None, **environment: str) -> dict[str, Any]:
    """`python -m module arguments` in a process of its own; its last line of output is JSON."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {timeout:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **versions,
    }


def report(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout, with the machine above it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(120, sum(len(c) for c in columns) + 40))
    about = machine()
    console.print(f"[bold]{title}[/bold]")
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim", highlight=False)
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def filled(page: str, content: str) -> str:
    """A page of docs/ with new content between its marks."""
    return re.sub(r"(<!-- figures -->\n).*?(<!-- /figures -->)", lambda m: f"{m[1]}{content}\n{m[2]}", page, flags=re.S)


def write_json(path: str | None, content: Any) -> None:
    """Timings and the machine, for those who plot."""
    if path:
        plain = json.dumps({"machine": machine(), "results": content}, indent=1, default=_plain)
        temporary = Path(f"{path}.part")
        temporary.write_text(plain, encoding="utf-8")
        temporary.replace(path)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Timing) else str(value)
