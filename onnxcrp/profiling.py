"""Where the time of a run goes: onnxruntime's profile, node by node, under the names of the relevance model."""

from __future__ import annotations

import bisect
import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from onnxcrp.errors import OnnxcrpError

KERNEL = "_kernel_time"
BLOCKED = "_nchwc"  # what onnxruntime appends to nodes that it rewrites for its blocked layout
OURS = "layout/"  # how names begin of nodes that keep tensors blocked (blocked.py)
ON_SHAPES = (
    1024  # bytes that a node may read and write to count as arithmetic on shapes, which runs on the CPU on purpose
)
LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost"})  # written by the runtime itself


@dataclass(frozen=True)
class NodeTime:
    """A node of a model that ran: its name there, its operator, who ran it, and seconds for one call.

    `bytes`: what it read and wrote in the largest of its runs, weights left out.
    """

    name: str
    op: str
    provider: str
    seconds: float
    bytes: int = 0


def read_profile(path: str | os.PathLike[str], *, calls: int, warmup: int = 0) -> list[NodeTime]:
    """Nodes in the order they first ran, with the median time of a call; the first `warmup` of `calls` are left out.

    A call may be several runs of the model, each call as many. Raises OnnxcrpError for a file that is no profile.
    """
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        starts = sorted(e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run")
        if not starts:
            raise ValueError("no run of a model")
        kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith(KERNEL)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OnnxcrpError(f"{path} is no profile of onnxruntime: {error}") from error
    found: dict[tuple[str, str, str], list[float]] = {}
    moved: dict[tuple[str, str, str], int] = {}
    for event in kernels:
        call = (bisect.bisect_right(starts, event["ts"]) - 1) * calls // len(starts)
        if call >= warmup:
            name = event["name"].removesuffix(KERNEL).removesuffix(BLOCKED)
            key = (name, event["args"]["op_name"], event["args"].get("provider", ""))
            found.setdefault(key, [0.0] * (calls - warmup))[call - warmup] += event["dur"] * 1e-6
            read_and_written = (int(event["args"].get(size) or 0) for size in ("activation_size", "output_size"))
            moved[key] = max(moved.get(key, 0), sum(read_and_written))
    return [NodeTime(*key, statistics.median(seconds), moved[key]) for key, seconds in found.items()]


def merged(profiles: Iterable[list[NodeTime]]) -> list[NodeTime]:
    """Profiles of several models as one: nodes of the same name, operator and provider add up."""
    found: dict[tuple[str, str, str], NodeTime] = {}
    for node in (node for profile in profiles for node in profile):
        key = (node.name, node.op, node.provider)
        known = found.get(key, replace(node, seconds=0.0))
        found[key] = replace(node, seconds=node.seconds + known.seconds, bytes=max(node.bytes, known.bytes))
    return list(found.values())
