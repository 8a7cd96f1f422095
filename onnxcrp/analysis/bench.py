"""How fast a model is explained on this machine, and why: what `onnxcrp bench` prints.

Everything is a ratio: the forward pass, one heatmap and the conditions run in turn, round by round, so that a slow
minute of the machine hits them alike. Memory and start-up are measured in a fresh process each.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.analysis.memory import forget_peak, peak_memory
from onnxcrp.errors import OnnxcrpError, QuestionError

if TYPE_CHECKING:
    from onnxcrp.canonize import Canonical
    from onnxcrp.explainer import Explainer, LayerInfo
    from onnxcrp.facts import Facts
    from onnxcrp.profiling import NodeTime

FORWARD, HEATMAP = "forward pass", "one heatmap"
CPU = "CPUExecutionProvider"
SCATTER = frozenset({"ScatterElements", "ScatterND", "Scatter", "GatherElements", "GatherND"})
DEFAULT_CONDITIONS = 16
UNSTEADY = 1.5  # a median so many times the time without other work is told
BESIDE = 1e-3  # seconds that a call takes beside its nodes, at most


@dataclass(frozen=True)
class Times:
    """Seconds of one contender: median, quartiles and fastest of `rounds` runs."""

    median: float
    low: float
    high: float
    fastest: float
    rounds: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        """Median, quartiles, fastest."""
        low, median, high = np.percentile(seconds, [25, 50, 75])
        return Times(float(median), float(low), float(high), min(seconds), len(seconds))


@dataclass(frozen=True)
class Step:
    """A node of the relevance model that ran, as the walk (or, in the forward pass, the layer) names it."""

    name: str
    op: str
    part: str  # "forward" | "backward" | "layout": written by the runtime
    provider: str
    seconds: float
    share: float  # of all nodes
    on_shapes: bool = False  # arithmetic on shapes


@dataclass
class Bench:
    """What was measured. `conditions`: how many at once; `each`: forward passes that one more costs, by the fastest."""

    model: str
    composite: str
    machine: dict[str, Any]
    providers: list[str]
    layer: str | None
    conditions: int
    times: dict[str, Times] = field(default_factory=dict)
    each: float | None = None
    start: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)  # of one heatmap, and of the conditions
    reasons: list[str] = field(default_factory=list)

    def ratio(self, what: str) -> float:
        """In forward passes: medians."""
        return self.times[what].median / self.times[FORWARD].median

    def best(self, what: str) -> float:
        """In forward passes: the fastest of both, which other work on the machine disturbs least."""
        return self.times[what].fastest / self.times[FORWARD].fastest

    @property
    def unsteady(self) -> tuple[str, float]:
        """The contender whose median is most above what it takes without other work, and by what factor."""
        factors = {what: times.median / self.undisturbed(what) for what, times in self.times.items()}
        return max(factors.items(), key=lambda item: item[1], default=("", 1.0))

    def undisturbed(self, what: str) -> float:
        """Seconds without other work on the machine: of the fastest run, or of the nodes where these take less.

        Threads that wait for a busy core can slow down every run.
        """
        fastest = self.times[what].fastest
        if self.providers != [CPU] or what not in self.steps:  # devices time what launches a node
            return fastest
        return min(fastest, BESIDE + sum(step.seconds for step in self.steps[what]))

    def parts(self, what: str) -> dict[str, float]:
        """Share of the time by part."""
        shares: dict[str, float] = {}
        for step in self.steps[what]:
            shares[step.part] = shares.get(step.part, 0.0) + step.share
        return shares

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        ratios = {name: {"median": self.ratio(name), "fastest": self.best(name)} for name in self.times}
        parts = {what: self.parts(what) for what in self.steps}
        return asdict(self) | {"ratios": ratios, "parts": parts, "unsteady": self.unsteady[1]}


def bench(
    model: str | os.PathLike[str],
    x: Any = None,
    *,
    composite: str | os.PathLike[str] = "epsilon_plus_flat",
    target: Any = "top",
    layer: str | None = None,
    conditions: int = DEFAULT_CONDITIONS,
    rounds: int = 5,
    alone: bool = True,
    canonical: Canonical | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Bench:
    """Measure the model in the file `model` on `x` (None: random values), one sample of it.

    `layer`: whose channels are the `conditions` (None: the last convolution with several channels, else dense layer,
    below the one that makes the explained output). `alone`: also memory and start-up, in processes of their own, which
    start the model anew. `canonical`: its canonical form, where it is made already. `options` go to the Explainer.
    Raises what Explainer and explain raise.
    """
    from onnxcrp.analysis.verify import sample
    from onnxcrp.canonize import canonize
    from onnxcrp.explainer import Explainer
    from onnxcrp.plugins import loaded
    from onnxcrp.session import Session

    progress("compiling")
    explainer = Explainer(canonical or canonize(model), composite, cache=False, **options)
    feeds = sample(explainer.facts) if x is None else x
    question: dict[str, Any] = {"target": _one_class(explainer, feeds, target), "seed": "abs"}
    layer, asked = _conditions(explainer, layer, conditions)
    plain = Session(model, options.get("providers"), threads=options.get("threads"))
    runs: dict[str, Callable[[], Any]] = {
        FORWARD: lambda: plain.run(feeds if isinstance(feeds, Mapping) else {next(iter(plain.inputs)): feeds}),
        HEATMAP: lambda: explainer.explain(feeds, **question),
    }
    many = f"{len(asked)} conditions"
    if len(asked) > 1:
        runs["1 condition"] = lambda: explainer.explain(feeds, conditions=asked[:1], **question)
        runs[many] = lambda: explainer.explain(feeds, conditions=asked, **question)
    progress("measuring")
    found = Bench(
        model=os.fspath(model),
        composite=explainer.composite.name,
        machine=machine(),
        providers=plain.providers,
        layer=layer,
        conditions=len(asked),
        times=interleaved(runs, rounds=rounds),
    )
    if len(asked) > 1:
        found.each = (found.best(many) - found.best("1 condition")) / (len(asked) - 1)
    progress("profiling")
    found.steps[HEATMAP] = steps(explainer.facts, explainer.profile(feeds, **question))
    if len(asked) > 1:
        found.steps[many] = steps(explainer.facts, explainer.profile(feeds, conditions=asked, **question))
    found.reasons = reasons(explainer.inspect(), found)
    if alone:
        spec = {
            "plugins": loaded(),
            "composite": explainer.composite.text,
            "options": {**options, "preprocessing": None},
            "layer": layer,
        }
        for what in (HEATMAP, *([many] if len(asked) > 1 else [])):
            progress(f"memory of {what}")
            count = 0 if what == HEATMAP else len(asked)
            told = _alone({**spec, "model": os.fspath(model), "conditions": count, "question": question}, feeds)
            found.memory[what] = told["peak"]
            found.start = found.start or told["start"]
    return found


def _one_class(explainer: Explainer, feeds: Any, target: Any) -> Any:
    """What "top" stands for, so that no call looks for it again; other targets as they are."""
    from onnxcrp.condition import top_count

    if top_count(target) is None:
        return target
    found = explainer.explain(feeds, target, seed="abs").targets
    return int(np.ravel(found)[0]) if isinstance(found, np.ndarray) else target


def _conditions(explainer: Explainer, layer: str | None, count: int) -> tuple[str | None, list[dict[str, list[int]]]]:
    """The layer by its own name, and its first channels as conditions; raises QuestionError where it has none."""
    found = next((info for info in explainer.layers if layer in info.names), None) if layer else late_layer(explainer)
    if layer and found is None:
        explainer.facts.names.resolve(layer)  # raises, with the nearest names
    if found is None:
        return None, []
    if not found.channels:
        raise QuestionError(f"layer {found.name} has no fixed number of channels", hint="name another one")
    return found.name, [{found.name: [channel]} for channel in range(min(count, found.channels))]


def late_layer(explainer: Explainer) -> LayerInfo | None:
    """The deepest convolution (else dense layer) with several channels below what makes the explained output."""
    facts = explainer.facts
    for family in ("convolution", "dense"):
        found = [
            info
            for info in explainer.layers
            if info.family == family
            and (info.channels or 0) > 1
            and facts.names.resolve(info.name).outputs[0].name != facts.explained
        ]
        if found:
            return max(reversed(found), key=lambda info: info.depth)
    return None


def interleaved(runs: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, Times]:
    """All in turn, `rounds` times, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times.of(each) for name, each in seconds.items()}


# -------------------------------------------------------------------------------------------------------- where and why


def steps(facts: Facts, nodes: Sequence[NodeTime]) -> list[Step]:
    """The nodes of a profile, slowest first, under the names that conditions and records use."""
    from onnxcrp.profiling import LAYOUT, OURS

    total = sum(node.seconds for node in nodes) or 1.0
    found = []
    for node in nodes:
        name, part = node.name, "backward"
        if node.op in LAYOUT or name.startswith(OURS):
            part = "layout"
        elif not name.startswith(("R/", "output/")):
            name, part = layer_of(facts, name, node.op), "forward"
        found.append(Step(name, node.op, part, node.provider, node.seconds, node.seconds / total, node.on_shapes))
    return sorted(found, key=lambda step: -step.seconds)


def layer_of(facts: Facts, name: str, op: str) -> str:
    """The layer of a forward node, which the runtime names after itself or, fused, after the last tensor it makes."""
    named = {node.name: node for node in facts.nodes}
    node = named.get(name) or facts.producer.get(name)
    here = node
    while here is not None and here.op != op and here.inputs:  # Conv and Relu fused bear the name of the Relu's output
        here = facts.producer.get(here.inputs[0].name)
        node = here if here is not None and here.op == op else node
    if node is None:
        return name
    return facts.names.of(node) if facts.carries(node) else node.name


def reasons(known: Mapping[str, Any], found: Bench) -> list[str]:
    """What explains the figures, a sentence each; `known` is what `Explainer.inspect` says."""
    told = []
    what, factor = found.unsteady
    if factor > UNSTEADY:
        told.append(
            f"other work keeps the machine busy: {what} took {factor:.1f} times as long as without it; "
            "--threads 1 is steadier"
        )
    if known["batch"] == "fixed":
        told.append("the batch is fixed in the file: samples and conditions run one by one")
    elif not known["shares_forward"]:
        breaks = known["batch_breaks"]
        where = ", ".join(breaks[:3]) + (f" and {len(breaks) - 3} more" if len(breaks) > 3 else "")
        told.append(f"conditions do not share the forward pass: axis 0 is not the batch at {where}")
    if known["quantized"]:
        told.append(
            "the model is quantized: it runs without onnxruntime's graph optimisation, whose fusions move values"
        )
    for what, ran in found.steps.items():
        asked = [name for name in found.providers if name != CPU]
        for doing, chosen in (
            (
                f"run on the CPU though {', '.join(asked)} was asked for",
                [s for s in ran if asked and s.provider == CPU and not s.on_shapes],
            ),
            ("scatter or gather entries", [s for s in ran if s.op in SCATTER]),
            (
                "are ConvTranspose (strided layers going back), which the CPU runs slower than convolutions",
                [s for s in ran if s.op == "ConvTranspose" and s.part == "backward" and s.provider == CPU],
            ),
            ("are changes of layout or device by the runtime", [s for s in ran if s.part == "layout"]),
        ):
            if chosen:
                share = sum(step.share for step in chosen)
                told.append(f"{what}: nodes that {doing}: {len(chosen)}, {share:.0%} of the time ({_listed(chosen)})")
    return told


def _listed(chosen: Sequence[Step], most: int = 3) -> str:
    names = ", ".join(step.name for step in chosen[:most])
    return names + (f" and {len(chosen) - most} more" if len(chosen) > most else "")


def machine() -> dict[str, Any]:
    """Processor, cores and the versions that matter."""
    import onnx
    import onnxruntime

    from onnxcrp import __version__

    cpu = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.is_file():
        lines = about.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"onnxcrp": __version__, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    return {"cpu": cpu, "cores": cores, "python": platform.python_version(), **versions}


# -------------------------------------------------------------------------------------------- a process of its own


def _alone(spec: Mapping[str, Any], feeds: Any) -> dict[str, Any]:
    """`spec` measured in a fresh process; raises OnnxcrpError with what it says where it fails."""
    with tempfile.TemporaryDirectory(prefix="onnxcrp-", ignore_cleanup_errors=True) as folder:
        arrays = Path(folder) / "feeds.npz"
        named = feeds if isinstance(feeds, Mapping) else {"": feeds}
        np.savez(arrays, **{f"feed/{name}": np.asarray(array) for name, array in named.items()})  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __spec__.name, json.dumps(spec, default=os.fspath), str(arrays)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OnnxcrpError(f"measuring in a process of its own failed: {reason}", hint="leave memory out: --no-memory")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _child(spec: Mapping[str, Any], arrays: str) -> dict[str, Any]:
    """Seconds from a fresh process to the first answer by step, and the peak of memory while it is computed."""
    times, begin = {}, time.perf_counter()

    def lap(what: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        times[what], begin = now - begin, now

    with np.load(arrays) as file:
        feeds: Any = {name.removeprefix("feed/"): file[name] for name in file.files}
    feeds = feeds.get("", feeds)
    begin = time.perf_counter()
    import onnxruntime  # noqa: F401

    from onnxcrp.canonize import canonize
    from onnxcrp.explainer import Explainer
    from onnxcrp.plugins import load_plugin

    lap("import")
    for path in spec["plugins"]:
        load_plugin(path)
    canonical = canonize(spec["model"])
    lap("canonize")
    with tempfile.TemporaryDirectory(prefix="onnxcrp-") as folder:
        rules = Path(folder) / "composite.toml"
        rules.write_text(spec["composite"], encoding="utf-8")
        explainer = Explainer(canonical, rules, cache=False, **spec["options"])
    asked = [{spec["layer"]: [channel]} for channel in range(spec["conditions"])] or None
    explainer.explain(feeds, conditions=asked, **spec["question"])
    lap("first answer")
    forget_peak()  # what compiling took is given back by now
    explainer.explain(feeds, conditions=asked, **spec["question"])
    return {"start": times, "peak": peak_memory()}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]), sys.argv[2])))
