"""How much memory this process takes."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Largest resident size of this process so far (or since `forget_peak`), bytes.

    From /proc where there is one: rusage also counts the process that started this one.
    """
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Measure the peak from now on, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5", encoding="utf-8")
