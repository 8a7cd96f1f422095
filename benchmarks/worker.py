"""A contender in a process of its own, which runs when it is told to and is still otherwise.

In one process they disturb each other: the threads of a runtime spin for a while after each run, and the next one
starts on half the cores. What is told is a line of JSON: [layers, count], or [[], 0] for a heatmap.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.common import Seconds
from benchmarks.contenders import CONTENDERS, Run, one_line

ENOUGH = 0.2  # seconds of runs for one measurement: the first warms caches up, the median of the others counts


class WorkerError(Exception):
    """What went wrong in a worker, in one line."""


class Worker:
    """`who` on a net under a composite; raises WorkerError where the process ends."""

    def __init__(self, who: str, net: str, path: str, composite: str) -> None:
        self.who = who
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.worker", who, net, path, composite],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def asks(self, layers: Sequence[str] = (), count: int = 0) -> Callable[[], Seconds] | None:
        """A run of one heatmap, or of `count` conditions on `layers`, done once by now; None where it cannot answer.

        Raises WorkerError for what the contender raises.
        """
        if self._told([list(layers), count]) is None:
            return None
        return lambda: Seconds(self._told([list(layers), count]))

    def _told(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process of {self.who} ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def workers(net: str, path: str, composite: str, *, without: Sequence[str] = ()) -> Iterator[dict[str, Worker]]:
    """A worker for every contender; their processes end with the block."""
    started = {who: Worker(who, net, path, composite) for who in CONTENDERS if who not in without}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.close()


def taken(run: Run) -> float:
    """Seconds of a run: the median of many short ones that are warm, or what a long one took."""
    gc.collect()
    found: list[float] = []
    begin = time.perf_counter()
    while not found or time.perf_counter() - begin < ENOUGH:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:] or found)


def serve(who: str, net: str, path: str, composite: str) -> None:
    """Answer the lines of stdin: seconds, None for what cannot be asked, or what went wrong."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    contender, runs = None, {}
    for line in sys.stdin:
        layers, count = json.loads(line)
        key = (tuple(layers), count)
        try:
            if contender is None:
                contender = CONTENDERS[who](net, path, composite)
            if key not in runs:
                runs[key] = contender.conditions(layers, count) if layers else contender.heatmap()
                if runs[key] is not None:
                    runs[key]()  # what compiling and planning take is not counted
            answer = {"seconds": None if runs[key] is None else taken(runs[key])}
        except Exception as error:
            answer = {"error": one_line(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(*sys.argv[1:])
