"""Where the time of a run goes: onnxruntime's profile, node by node, under the names of the relevance model."""

from __future__ import annotations

import bisect
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from onnxcrp.errors import OnnxcrpError

KERNEL = "_kernel_time"
BLOCKED = "_nchwc"  # what onnxruntime appends to nodes that it rewrites for its blocked layout
OURS = "layout/"  # how names begin of nodes that keep tensors blocked (blocked.py)
SIZES = frozenset({"int64", "int32", "bool"})  # types of what is computed about shapes,
FEW = 64  # and how many entries that has at most
LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost"})  # written by the runtime itself


@dataclass(frozen=True)
class NodeTime:
    """A node of a model that ran: its name there, its operator, who ran it, and seconds for one call.

    `on_shapes`: whether all it makes is a few integers, as arithmetic on shapes does, which is on the CPU on purpose.
    """

    name: str
    op: str
    provider: str
    seconds: float
    on_shapes: bool = False


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
    on_shapes: dict[tuple[str, str, str], bool] = {}
    for event in kernels:
        call = (bisect.bisect_right(starts, event["ts"]) - 1) * calls // len(starts)
        if call >= warmup:
            name = event["name"].removesuffix(KERNEL).removesuffix(BLOCKED)
            key = (name, event["args"]["op_name"], event["args"].get("provider", ""))
            found.setdefault(key, [0.0] * (calls - warmup))[call - warmup] += event["dur"] * 1e-6
            on_shapes[key] = on_shapes.get(key, True) and _few_integers(event["args"].get("output_type_shape") or [])
    return [NodeTime(*key, statistics.median(seconds), on_shapes[key]) for key, seconds in found.items()]


def _few_integers(outputs: list[dict[str, list[int]]]) -> bool:
    """Whether outputs [{type: shape}] are a few integers each."""
    return bool(outputs) and all(
        kind in SIZES and math.prod(shape) <= FEW for each in outputs for kind, shape in each.items()
    )


def merged(profiles: Iterable[list[NodeTime]]) -> list[NodeTime]:
    """Profiles of several models as one: nodes of the same name, operator and provider add up."""
    found: dict[tuple[str, str, str], NodeTime] = {}
    for node in (node for profile in profiles for node in profile):
        key = (node.name, node.op, node.provider)
        known = found.get(key, replace(node, seconds=0.0))
        found[key] = replace(node, seconds=node.seconds + known.seconds, on_shapes=node.on_shapes and known.on_shapes)
    return list(found.values())
