"""Free a batch that was exported as 1, and prove by running that samples do not touch one another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import set_input
from onnxcrp.canonize.report import PassReport
from onnxcrp.canonize.shapes import infer_shapes
from onnxcrp.canonize.write import write
from onnxcrp.errors import OnnxcrpError


class Type(NamedTuple):
    """What is known of a tensor."""

    dtype: np.dtype | None
    shape: Sequence[int | str | None] | None


Types = dict[str, Type]
Arrays = dict[str, np.ndarray]
Run = Callable[[gs.Graph, Sequence[Arrays]], list[Arrays]]

FREE_SIZES = (64, 224)  # what other symbolic axes (height, width, length) get in the check
KEEPS_SHAPE = {"Softmax", "LogSoftmax", "Sigmoid", "QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Clip"}


class _FixedError(Exception):
    """Why the batch cannot be freed."""


def free_batch(graph: gs.Graph, *, run: Run | None = None) -> tuple[PassReport, str]:
    """Make axis 0 of inputs and outputs symbolic where it was exported as 1: "dynamic" (it was), "freed" or "fixed".

    What froze it is rewritten: Reshape [1, C] -> [0, C], or -> [-1, C] where axis 0 of its input is not the batch (also
    [4, C] -> [-1, C] where rows were merged); Flatten(axis=0) -> Flatten(axis=1); `sizes` of a Resize lose axis 0; a
    constant in a Concat is expanded to the batch of its neighbour. Then two random samples together must give what the
    unchanged graph gives for one after the other. If not, or if that cannot be run, the graph is left as it was and the
    report says why. Shapes of values that the batch reaches become None, so that inference can start again.

    `graph` is [1, ...] -> [batch, ...], constants folded. `run(graph, feeds)` gives the outputs for each of the feeds;
    None runs it on onnxruntime with graph optimisation off.
    """
    report = PassReport("free batch")
    if any(tensor.shape is None for tensor in graph.inputs):
        return report, "dynamic"
    batched = [tensor for tensor in graph.inputs if tensor.shape]
    names = [tensor.name for tensor in batched if tensor.shape[0] == 1]
    was_dynamic = any(not _is_fixed(tensor.shape[0]) for tensor in batched)
    known = _infer(graph)
    if was_dynamic and not _rewrite(graph.copy(), [], known, minus_one=False):
        return report, "dynamic"  # nothing inside is frozen either
    try:
        if not was_dynamic and not names:
            sizes = ", ".join(f"{tensor.name!r} has {list(tensor.shape)}" for tensor in graph.inputs)
            raise _FixedError(f"no input was exported with batch 1: {sizes}")
        plan, shapes = _attempt(graph, [] if was_dynamic else names, known, run or _run)
    except _FixedError as reason:
        report.declined.append(f"the batch stays fixed: {reason}")
        return report, "fixed"
    if plan is None:
        report.declined.append("constant shapes are left alone: two samples together work as it is")
        return report, "dynamic"
    free, minus_one = plan
    report.done += _rewrite(graph, free, known, minus_one=minus_one)
    report.done.append("checked: two samples together equal one after the other")
    for tensor in graph.outputs:
        tensor.shape = shapes[tensor.name]
    return report, "freed"


Plan = tuple[list[str], bool]  # inputs to free; whether Reshapes take -1 throughout


def _attempt(graph: gs.Graph, names: list[str], known: Types, run: Run) -> tuple[Plan | None, dict[str, list | None]]:
    """The first plan that holds, and the outputs' shapes under it; the plan is None if `graph` works as it is."""
    ranks = {tensor.name: len(tensor.shape) for tensor in graph.inputs}
    highest = max((ranks[name] for name in names), default=0)
    subsets = [names, [n for n in names if ranks[n] >= 2], [n for n in names if ranks[n] == highest]]
    distinct = [subset for i, subset in enumerate(subsets) if subset not in subsets[:i] and (subset or not names)]
    plans: list[Plan | None] = [(subset, minus_one) for subset in distinct for minus_one in (False, True)]
    reasons: list[str] = []
    for plan in plans if names else [None, *plans]:
        trial = graph.copy()
        try:
            if plan is not None:
                _rewrite(trial, plan[0], known, minus_one=plan[1])
            _check(graph, trial, known, run)
            return plan, {tensor.name: tensor.shape for tensor in trial.outputs}
        except (_FixedError, OnnxcrpError) as error:
            reasons.append(str(error))
    raise _FixedError(reasons[-1])


# ------------------------------------------------------------------------------------------------------------ rewriting


def _rewrite(graph: gs.Graph, free: list[str], known: Types, *, minus_one: bool) -> list[str]:
    """Free axis 0 of the inputs named in `free` and of what they reach, in place; one line for each change."""
    symbol = "batch"
    while any(symbol in (tensor.shape or ())[1:] for tensor in graph.inputs):
        symbol += "_"
    taken = set(graph.tensors()) | {node.name for node in graph.nodes}
    lines, reached = [], {tensor.name for tensor in graph.inputs if tensor.shape and not _is_fixed(tensor.shape[0])}
    for tensor in graph.inputs:
        if tensor.name in free:
            tensor.shape = [symbol, *tensor.shape[1:]]
            reached.add(tensor.name)
            lines.append(f"input {tensor.name!r}: axis 0 is {symbol!r}")
    batch = {(known[name].shape or [None])[0] for name in reached}  # how axis 0 was written before: 1, or a symbol
    for node in list(graph.nodes):
        if not any(tensor.name in reached for tensor in node.inputs):
            continue
        rewrite = REWRITES.get(node.op)
        if rewrite and (line := rewrite(_Site(graph, node, reached, known, batch, taken, minus_one))):
            lines.append(f"{node.op} {node.name!r}: {line}")
        reached.update(tensor.name for tensor in node.outputs)
    if lines:
        ends = {tensor.name for tensor in graph.outputs}
        for tensor in (tensor for node in graph.nodes for tensor in node.outputs if tensor.name in reached):
            if tensor.name not in ends:
                tensor.shape = None
            elif tensor.shape and tensor.shape[0] == 1:
                tensor.shape = [symbol, *tensor.shape[1:]]
    return lines


class _Site(NamedTuple):
    """A node that the batch reaches, and what its rewrite may need."""

    graph: gs.Graph
    node: gs.Node
    reached: set[str]
    known: Types
    batch: set[int | str | None]
    taken: set[str]
    minus_one: bool

    def leads_with_batch(self, tensor: gs.Tensor) -> bool:
        """Whether axis 0 is the batch as far as shapes tell."""
        shape = self.known[tensor.name].shape if tensor.name in self.known else None
        return shape is not None and len(shape) > 0 and shape[0] in self.batch

    def sizes(self, tensor: gs.Tensor) -> list[int]:
        """The exported shape, [] where it is not all numbers."""
        shape = self.known[tensor.name].shape if tensor.name in self.known else None
        numbers = [int(n) for n in shape or () if isinstance(n, int)]
        return numbers if len(numbers) == len(shape or ()) else []

    def constant(self, name: str, values: Sequence[int]) -> gs.Constant:
        return gs.Constant(self.fresh(name), np.array(values, np.int64))

    def fresh(self, name: str) -> str:
        """A name of its own for a new node or tensor."""
        fresh, n = f"{self.node.name}/{name}", 1
        while fresh in self.taken:
            n += 1
            fresh = f"{self.node.name}/{name}~{n}"
        self.taken.add(fresh)
        return fresh


def _reshape(site: _Site) -> str | None:
    """[1, C] -> [0, C] or [-1, C]: all axes are written down, so more than one sample does not fit."""
    node = site.node
    data, shape = node.inputs[:2]
    if data.name not in site.reached or not isinstance(shape, gs.Constant) or shape.values.size == 0:
        return None
    old = new = [int(n) for n in shape.values]
    if old[0] in (0, -1) or (node.attrs.get("allowzero") and 0 in old):
        return None
    leads = old[0] == 1 and not site.minus_one and site.leads_with_batch(data)
    if -1 in old and not leads:  # [4, -1]: the batch would hide in the -1, which belongs on axis 0
        new = site.sizes(node.outputs[0]) or old
        if -1 in new and old[0] != 1:
            return None
    new = [0 if leads or -1 in new else -1, *new[1:]]
    node.attrs.pop("allowzero", None)
    set_input(node, 1, site.constant("shape", new))
    return f"{old} -> {new}"


def _flatten(site: _Site) -> str | None:
    """Flatten(axis=0) of one sample is Flatten(axis=1)."""
    if site.node.attrs.get("axis", 1) != 0 or not site.leads_with_batch(site.node.inputs[0]):
        return None
    site.node.attrs["axis"] = 1
    return "axis 0 -> 1"


def _resize(site: _Site) -> str | None:
    """Sizes [1, C, H, W] -> [C, H, W] for axes 1, 2, 3 (opset 18)."""
    node = site.node
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    if site.graph.opset < 18 or not isinstance(sizes, gs.Constant) or "axes" in node.attrs:
        return None
    old = [int(n) for n in sizes.values]
    if len(old) < 2 or old[0] != 1:
        return None
    if isinstance(node.inputs[1], gs.Constant) and node.inputs[1].values.size:
        roi = node.inputs[1].values.reshape(2, -1)[:, 1:].ravel()
        set_input(node, 1, gs.Constant(site.fresh("roi"), roi))
    set_input(node, 3, site.constant("sizes", old[1:]))
    node.attrs["axes"] = list(range(1, len(old)))
    return f"sizes {old} -> {old[1:]}"


def _concat(site: _Site) -> str | None:
    """A constant [1, ...] beside [batch, ...] (a class token) is expanded to that batch."""
    node = site.node
    data = next(tensor for tensor in node.inputs if tensor.name in site.reached)
    ones = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant) and t.values.ndim > 1]
    ones = [i for i in ones if node.inputs[i].values.shape[0] == 1]
    if not ones or node.attrs.get("axis") in (0, -node.inputs[ones[0]].values.ndim):
        return None
    made: list[gs.Node] = []

    def add(op: str, inputs: list[gs.Tensor], dtype: np.dtype, **attrs: object) -> gs.Variable:
        name = site.fresh(op)
        out = gs.Variable(site.fresh(f"{op}_output"), dtype=dtype)
        made.append(gs.Node(op, name, attrs, inputs, [out]))
        return out

    int64 = np.dtype(np.int64)
    shape = add("Shape", [data], int64)
    batch = add("Slice", [shape, site.constant("starts", [0]), site.constant("ends", [1])], int64)
    for i in ones:
        values = node.inputs[i].values
        sizes = add("Concat", [batch, site.constant("ones", [1] * (values.ndim - 1))], int64, axis=0)
        set_input(node, i, add("Expand", [node.inputs[i], sizes], values.dtype))
    at = next(i for i, other in enumerate(site.graph.nodes) if other is node)
    site.graph.nodes[at:at] = made
    return f"{len(ones)} constant(s) expanded to the batch"


REWRITES = {"Reshape": _reshape, "Flatten": _flatten, "Resize": _resize, "Concat": _concat}


def _is_fixed(size: object) -> bool:
    """Whether a dimension is a number; exporters wrote 0 or -1 for unknown ones."""
    return isinstance(size, int | np.integer) and int(size) > 0


def _infer(graph: gs.Graph) -> Types:
    """Type and shape of every tensor, as exported."""
    light = graph.copy()
    with contextlib.suppress(OnnxcrpError):  # what inference cannot do, the check will show
        infer_shapes(light)
    return {tensor.name: Type(tensor.dtype, tensor.shape) for tensor in light.tensors().values()}


# ------------------------------------------------------------------------------------------------------------- checking


def _check(graph: gs.Graph, trial: gs.Graph, known: Types, run: Run) -> None:
    """Two samples through `trial` at once = one after the other through `graph`; raises _FixedError if not."""
    free = [tensor for tensor in trial.inputs if tensor.shape and not _is_fixed(tensor.shape[0])]
    symbolic = any(not _is_fixed(n) for tensor in trial.inputs for n in (tensor.shape or ())[1:])
    reason = ""
    for size in FREE_SIZES if symbolic else FREE_SIZES[:1]:
        samples = [_sample(trial.inputs, free, size, seed) for seed in (0, 1)]
        joined = {name: np.concatenate([samples[0][name], samples[1][name]]) for name in (t.name for t in free)}
        try:
            alone = run(_watched(graph, known), samples)
            break
        except OnnxcrpError as error:
            reason = f"the model cannot be run on a random sample: {error.message}"
    else:
        raise _FixedError(reason)
    try:
        together, first = run(_watched(trial, known), [{**samples[0], **joined}, samples[0]])
    except OnnxcrpError as error:
        raise _FixedError(f"two samples together fail: {error.message}") from error
    tolerance = 2e-2 if any(_is_coarse(node) for node in graph.nodes) else 1e-4
    for name in alone[0]:
        a, b = (result[name] for result in alone)
        both = together[name]
        if both.shape == a.shape and a.shape == b.shape and np.array_equal(a, b):
            continue  # does not depend on the sample
        if a.ndim == 0 or a.shape[0] != 1 or both.shape != (2, *a.shape[1:]):
            raise _FixedError(f"{name!r} is {list(a.shape)} for one sample and {list(both.shape)} for two")
        for expected, got in ((a, both[:1]), (b, both[1:]), (a, first[name])):
            if _distance(expected, got) > tolerance:
                raise _FixedError(f"{name!r} of a sample depends on the other samples of its batch")
    for tensor in trial.outputs:  # outputs that do not depend on the sample keep their 1
        if tensor.name in together and together[tensor.name].shape == alone[0][tensor.name].shape:
            tensor.shape = list(together[tensor.name].shape)


def _watched(graph: gs.Graph, known: Types) -> gs.Graph:
    """A copy with more outputs: what stands before a saturating head, where two samples differ more."""
    watched = graph.copy()
    seen = {tensor.name for tensor in [*watched.outputs, *watched.inputs]}
    for tensor in list(watched.outputs):
        while tensor.inputs and tensor.inputs[0].op in KEEPS_SHAPE:
            tensor = tensor.inputs[0].inputs[0]
            if not isinstance(tensor, gs.Variable) or tensor.name in seen:
                break
            tensor.dtype = tensor.dtype or known.get(tensor.name, Type(None, None)).dtype
            if tensor.dtype is not None:
                seen.add(tensor.name)
                watched.outputs.append(tensor)
    return watched


def _sample(inputs: Iterable[gs.Tensor], free: list[gs.Tensor], size: int, seed: int) -> Arrays:
    """Random values of each input's type; inputs without a batch get the same ones in every sample."""
    arrays = {}
    for i, tensor in enumerate(inputs):
        has_batch = any(tensor is t for t in free)
        rng = np.random.default_rng([i, seed if has_batch else 0])
        shape = [int(n) if _is_fixed(n) else size for n in tensor.shape or ()]
        if has_batch:
            shape[0] = 1
        if tensor.dtype is None or isinstance(tensor.dtype, int):  # bfloat16 and smaller
            raise _FixedError(f"input {tensor.name!r} is of a type that numpy lacks")
        dtype = np.dtype(tensor.dtype)
        if dtype.kind == "f":
            arrays[tensor.name] = rng.normal(size=shape).astype(dtype)
        elif dtype.kind == "b":
            arrays[tensor.name] = rng.random(shape) < 0.5
        elif dtype.kind in "iu":  # 8 bits are pixels; more may be indices into a table whose size is not known
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max + 1) if dtype.itemsize == 1 else (0, 10)
            arrays[tensor.name] = rng.integers(low, high, shape).astype(dtype)
        else:
            raise _FixedError(f"input {tensor.name!r} holds {dtype}, of which no random sample can be made")
    return arrays


def _is_coarse(node: gs.Node) -> bool:
    """Whether rounding in this node may turn the last bit of a float32 into a visible step."""
    half = any(tensor.dtype == np.float16 or isinstance(tensor.dtype, int) for tensor in (*node.inputs, *node.outputs))
    return half or node.op == "QuantizeLinear"


def _distance(expected: np.ndarray, got: np.ndarray) -> float:
    """Relative L2."""
    if expected.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(expected, got) else np.inf
    a, b = expected.astype(np.float64), got.astype(np.float64)
    both_finite = np.isfinite(a) == np.isfinite(b)
    if not both_finite.all():
        return np.inf
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-12))


def _run(graph: gs.Graph, feeds: Sequence[Arrays]) -> list[Arrays]:
    """The outputs for each of `feeds`, on onnxruntime's CPU provider as the graph is written."""
    from onnxcrp.session import Session

    session = Session(write(graph), "cpu", optimize=False, log_severity=4)
    return [session.run(feed) for feed in feeds]
