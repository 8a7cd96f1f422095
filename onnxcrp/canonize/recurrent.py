"""Recurrent layers written out step by step, so that relevance goes through them as through any other net.

With x_t the input of step t, h and c the states of the step before, [x h] side by side, f, g, k the activations (by
default sigmoid, tanh, tanh) and . the elementwise product (the formulas of the operators, and of Arras et al. 2017):

    RNN     h_t = f([x h] [W R]^T + b)

    LSTM    i = f([x h] [W_i R_i]^T + P_i . c + b_i)       GRU     z = f([x h] [W_z R_z]^T + b_z)
            f = f([x h] [W_f R_f]^T + P_f . c + b_f)               r = f([x h] [W_r R_r]^T + b_r)
            g = g([x h] [W_g R_g]^T + b_g)                         n = g([x (r . h)] [W_n R_n]^T + b_n), or, with
            c_t = f . c + i . g                                        linear_before_reset,
            o = f([x h] [W_o R_o]^T + P_o . c_t + b_o)             n = g(x W_n^T + Wb_n + r . (h R_n^T + Rb_n))
            h_t = o . k(c_t)                                       h_t = (1 - z) . n + z . h

Input and state of one gate are one Linear over [x h], b = Wb + Rb: what they contribute is shared out together. 1 - z
is written sigmoid(-a) where z = sigmoid(a), which shows it to be a gate. A state that starts as 0 is not written; one
that starts as another constant is a Linear of x_0 with W = 0, for its share is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import (
    DOMAIN,
    Names,
    describe,
    detach,
    given,
    pinned,
    producer,
    prune,
    replace_reads,
    value,
)
from onnxcrp.canonize.report import PassReport

LARGEST = 20_000  # nodes that one recurrent layer may become

GATES = {"RNN": "h", "GRU": "zrn", "LSTM": "iofg"}  # in the order in which W, R and B hold them
ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
PARAMETERS: dict[str, dict[str, float]] = {  # with their defaults; of ThresholdedRelu onnxruntime has another
    "Relu": {},
    "Tanh": {},
    "Sigmoid": {},
    "Softsign": {},
    "Softplus": {},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "LeakyRelu": {"alpha": 0.01},
    "Elu": {"alpha": 1.0},
}
NODES = {"RNN": 6, "GRU": 18, "LSTM": 20}  # at most, for each step


def unroll_recurrent(graph: gs.Graph, scopes: dict[str, str] | None = None) -> PassReport:
    """RNN, GRU and LSTM over T steps, T static -> T times the formulas above, in standard operators and Linear.

    X [T, N, in] -> Y [T, directions, N, hidden], Y_h and Y_c [directions, N, hidden] (batch first: layout = 1). Nodes
    are called `<node>/t3/i/Linear`, below `forward` or `reverse` where there are two directions; `scopes` (node name ->
    module) gets the entries of the new nodes. Transposes around the layer, and what reads single steps of Y, refer to
    the steps themselves, so that axis 0 stays the batch. Left alone, with the reason: a T known only while running,
    lengths that differ between samples, weights that are computed, `clip`.
    """
    report = PassReport("unroll recurrent layers")
    recurrent = [node for node in graph.nodes if is_recurrent(node)]
    if recurrent:
        _Unroller(graph, report, {} if scopes is None else scopes, recurrent).run()
    return report


def is_recurrent(node: gs.Node) -> bool:
    """RNN, GRU, LSTM."""
    return node.op in GATES and not node.domain


class _DeclinedError(Exception):
    """Why a layer is left alone."""


# ------------------------------------------------------------------------------------------- what a node says of itself


class Activation(NamedTuple):
    """An activation function: its operator and its parameters."""

    op: str
    attrs: dict[str, float]


@dataclass
class Gate:
    """What computes a gate: W [hidden, in], R [hidden, hidden], the biases of both [hidden]."""

    W: np.ndarray
    R: np.ndarray
    Wb: np.ndarray
    Rb: np.ndarray
    P: np.ndarray | None = None  # weights of the cell state, [hidden]
    constants: dict[str, gs.Constant] = field(default_factory=dict)  # shared by all steps


@dataclass
class Direction:
    """One direction of a layer."""

    path: str  # "", "forward/" or "reverse/"
    backwards: bool
    gates: dict[str, Gate]
    activations: list[Activation]


def _directions(node: gs.Node) -> list[Direction]:
    """Weights and activations by direction; raises _DeclinedError where they are not what is written here."""
    names = {"forward": ["forward"], "reverse": ["reverse"], "bidirectional": ["forward", "reverse"]}
    found = names.get(_text(node.attrs.get("direction", "forward")))
    if found is None:
        raise _DeclinedError(f"its direction is {_text(node.attrs['direction'])!r}")
    if node.attrs.get("clip"):
        raise _DeclinedError("it clips what its activations read")
    W, R = value(node, 1), value(node, 2)
    if W is None or R is None or (given(node, 3) and value(node, 3) is None):
        raise _DeclinedError("its weights are computed")
    letters = GATES[node.op]
    hidden = R.shape[-1]
    if W.ndim != 3 or R.shape != (len(found), len(letters) * hidden, hidden) or W.shape[:2] != R.shape[:2]:
        raise _DeclinedError(f"its weights are {list(W.shape)} and {list(R.shape)}")
    B = value(node, 3) if given(node, 3) else None
    if B is None:
        B = np.zeros([len(found), 2 * len(letters) * hidden], W.dtype)
    if given(node, 7) and value(node, 7) is None:
        raise _DeclinedError("its peepholes are computed")
    P = value(node, 7) if given(node, 7) else None
    functions = _activations(node, len(found))
    made = []
    for d, name in enumerate(found):
        slices = {letter: slice(k * hidden, (k + 1) * hidden) for k, letter in enumerate(letters)}
        Wb, Rb = B[d].reshape(2, -1)
        gates = {letter: Gate(W[d][at], R[d][at], Wb[at], Rb[at]) for letter, at in slices.items()}
        if P is not None:
            for letter, peephole in zip("iof", P[d].reshape(3, -1), strict=True):
                gates[letter].P = peephole if peephole.any() else None
        path = f"{name}/" if len(found) > 1 else ""
        made.append(Direction(path, name == "reverse", gates, functions[d]))
    return made


def _activations(node: gs.Node, directions: int) -> list[list[Activation]]:
    """By direction. Parameters are taken from two lists by those functions that have some, in order."""
    default = ACTIVATIONS[node.op]
    asked = [_text(name) for name in node.attrs.get("activations") or default * directions]
    spelled = {name.lower(): name for name in PARAMETERS}
    if unknown := [name for name in asked if name.lower() not in spelled]:
        raise _DeclinedError(f"the activation {unknown[0]} is not written out; known are {', '.join(PARAMETERS)}")
    lists: dict[str, Iterator[float]] = {k: iter(node.attrs.get(f"activation_{k}") or ()) for k in ("alpha", "beta")}
    functions = []
    for name in asked:
        op = spelled[name.lower()]
        functions.append(Activation(op, {k: float(np.float32(next(lists[k], d))) for k, d in PARAMETERS[op].items()}))
    if len(functions) != len(default) * directions:
        raise _DeclinedError(f"it names {len(functions)} activations")
    return [functions[d * len(default) : (d + 1) * len(default)] for d in range(directions)]


def _text(attribute: str | bytes) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else attribute


# ---------------------------------------------------------------------------------------------------- stacks of tensors


@dataclass
class Stack:
    """A tensor that is not written but known by its parts, each [N, features].

    `axes` names its axes in order: "s" an axis of `parts`, "n" the batch, "h" the features. Y [T, directions, N,
    hidden] is parts [T, directions], axes "ssnh".
    """

    parts: np.ndarray  # of gs.Tensor
    axes: str
    name: str  # of the node it came from

    def dim(self, axis: int) -> int:
        """Which axis of `parts` is axis `axis`."""
        return self.axes[:axis].count("s")

    def normal(self, axis: int) -> int:
        """`axis`, counted from the first."""
        return int(axis) % len(self.axes)


def _array(tensors: Iterable[gs.Tensor], *shape: int) -> np.ndarray:
    """An array of tensors; numpy would take them apart."""
    listed = list(tensors)
    array = np.empty(len(listed), object)
    for index, tensor in enumerate(listed):
        array[index] = tensor
    return array.reshape(shape)


def _picked(parts: np.ndarray) -> np.ndarray:
    """numpy hands out the only entry of an array of objects as it is."""
    return parts if isinstance(parts, np.ndarray) else _array([parts])


def _transpose(stack: Stack, node: gs.Node) -> Stack | None:
    perm = [int(i) for i in node.attrs.get("perm") or range(len(stack.axes))[::-1]]
    axes = "".join(stack.axes[i] for i in perm)
    if axes.index("n") > axes.index("h"):
        return None
    return Stack(stack.parts.transpose([stack.dim(i) for i in perm if stack.axes[i] == "s"]), axes, node.name)


def _squeeze(stack: Stack, node: gs.Node) -> Stack | None:
    axes = value(node, 1)
    if axes is None:
        return None
    at = {stack.normal(axis) for axis in axes.ravel()}
    if any(stack.axes[i] != "s" for i in at):
        return None
    parts = np.squeeze(stack.parts, tuple(stack.dim(i) for i in at))
    return Stack(parts, "".join(a for i, a in enumerate(stack.axes) if i not in at), node.name)


def _unsqueeze(stack: Stack, node: gs.Node) -> Stack | None:
    axes = value(node, 1)
    if axes is None:
        return None
    count = len(stack.axes) + axes.size
    added, old = {int(axis) % count for axis in axes.ravel()}, iter(stack.axes)
    spelled = "".join("s" if i in added else next(old) for i in range(count))
    at = [spelled[:i].count("s") for i in sorted(added)]
    return Stack(np.expand_dims(stack.parts, tuple(at)), spelled, node.name)


def _gather(stack: Stack, node: gs.Node) -> Stack | None:
    axis, indices = stack.normal(node.attrs.get("axis", 0)), value(node, 1)
    if indices is None or indices.ndim > 1 or stack.axes[axis] != "s":
        return None
    dim = stack.dim(axis)
    if (abs(indices + 0.5) > stack.parts.shape[dim]).any():
        return None
    rows = [np.take(stack.parts, int(i), dim) for i in indices.ravel()]
    if indices.ndim == 0:
        entry = rows[0] if isinstance(rows[0], np.ndarray) else _array([rows[0]]).reshape(())
        return Stack(entry, stack.axes[:axis] + stack.axes[axis + 1 :], node.name)
    return Stack(np.take(stack.parts, indices, dim), stack.axes, node.name)


def _slice(stack: Stack, node: gs.Node) -> Stack | None:
    bounds = [value(node, index) for index in range(1, len(node.inputs)) if given(node, index)]
    if len(bounds) < 2 or any(bound is None for bound in bounds):
        return None
    lists = [[int(n) for n in bound.ravel()] for bound in bounds if bound is not None]
    starts, ends = lists[:2]
    axes = lists[2] if len(lists) > 2 else list(range(len(starts)))
    steps = lists[3] if len(lists) > 3 else [1] * len(starts)
    parts = stack.parts
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = stack.normal(axis)
        if step != 1:
            return None
        if stack.axes[at] == "s":
            parts = parts[(slice(None),) * stack.dim(at) + (slice(start, end),)]
        elif start != 0 or end < 2**31 - 1:
            return None
    return Stack(parts, stack.axes, node.name) if parts.size else None


HANDED_ON: dict[str, Callable[[Stack, gs.Node], Stack | None]] = {
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Slice": _slice,
}


# ------------------------------------------------------------------------------------------------------------ unrolling


class _Unroller:
    """Walks the graph once; what is written goes to `nodes`, what is only known to `stacks`."""

    def __init__(
        self, graph: gs.Graph, report: PassReport, scopes: dict[str, str], recurrent: Iterable[gs.Node]
    ) -> None:
        self.graph, self.report, self.scopes = graph, report, scopes
        self.names = Names(graph)
        self.pins = pinned(graph)
        self.nodes: list[gs.Node] = []
        self.stacks: dict[str, Stack] = {}
        self.modules = self._modules(recurrent)
        self.node = gs.Node("")  # what is being replaced
        self.module = ""
        self.batch: int | str | None = None  # N, and the type, of what is written
        self.dtype: np.dtype | None = None

    def _modules(self, recurrent: Iterable[gs.Node]) -> dict[str, str]:
        """Node name -> module, layers of one module told apart as torch does: rnn.l0, rnn.l1."""
        found: dict[str, list[str]] = {}
        for node in recurrent:
            module = self.scopes.get(node.name) or node.name.strip("/").replace("/", ".")
            found.setdefault(module, []).append(node.name)
        return {
            name: f"{module}.l{i}" if len(names) > 1 else module
            for module, names in found.items()
            for i, name in enumerate(names)
        }

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if is_recurrent(node):
                try:
                    self.unroll(node)
                    continue
                except _DeclinedError as reason:
                    self.report.declined.append(f"{describe(node)}: {reason}")
            elif self.hand_on(node):
                continue
            for tensor in node.inputs:
                self.write(tensor)
            self.nodes.append(node)
        self.graph.nodes = self.nodes
        prune(self.graph)

    # ---- writing nodes ------------------------------------------------------------------------------------------
    def __call__(
        self,
        op: str,
        *inputs: gs.Tensor,
        at: str,
        features: int | None = None,
        output: gs.Tensor | None = None,
        domain: str = "",
        attrs: Mapping[str, object] | None = None,
    ) -> gs.Tensor:
        """Append a node below the one being replaced; its output, [N, features] where these are told."""
        base = "/".join(part for part in (self.node.name, at, op) if part)
        name, number = base, 0
        while name in self.names.taken:
            number += 1
            name = f"{base}_{number}"
        self.names.fresh(name)
        if output is None:
            shape = None if features is None else [self.batch, features]
            output = gs.Variable(self.names.fresh(f"{name}_output"), self.dtype, shape)
        self.nodes.append(gs.Node(op, name, dict(attrs or {}), list(inputs), [output], domain=domain or None))
        if self.module:
            self.scopes[name] = ".".join([self.module, *(part for part in at.split("/") if part)])
        return output

    def constant(self, name: str, values: np.ndarray | list[int]) -> gs.Constant:
        array = np.array(values, np.int64) if isinstance(values, list) else np.ascontiguousarray(values)
        return gs.Constant(self.names.fresh(f"{self.node.name}/{name}"), array)

    def write(self, tensor: gs.Tensor) -> None:
        """Compute a tensor that was only known by its parts."""
        stack = self.stacks.pop(tensor.name, None)
        if stack is None:
            return
        self.node, self.module = gs.Node("", stack.name), self.scopes.get(stack.name, "")
        self.dtype = tensor.dtype
        at = [i for i, axis in enumerate(stack.axes) if axis == "s"]
        if not at:
            self("Identity", stack.parts.item(), at="", output=tensor)
            return
        axes = self.constant("axes", at)
        self._concat(stack.parts, at, axes, tensor)

    def _concat(
        self, parts: np.ndarray | gs.Tensor, at: list[int], axes: gs.Constant, output: gs.Tensor | None
    ) -> gs.Tensor:
        """Parts side by side along the axes `at`."""
        if not at:
            return self("Unsqueeze", parts, axes, at="", output=output)
        assert isinstance(parts, np.ndarray)
        if len(parts) == 1:
            return self._concat(parts[0], at[1:], axes, output)
        pieces = [self._concat(part, at[1:], axes, None) for part in parts]
        return self("Concat", *pieces, at="", output=output, attrs={"axis": at[0]})

    # ---- what reads steps ---------------------------------------------------------------------------------------
    def hand_on(self, node: gs.Node) -> bool:
        """Whether what `node` makes of a stack is known by its parts too; then it need not be written."""
        if node.domain or not node.inputs or not any(tensor.name in self.stacks for tensor in node.inputs):
            return False
        self.node, self.module = node, self.scopes.get(node.name, "")
        stack = self.stacks.get(node.inputs[0].name)
        made: Stack | None = None
        if node.op == "Concat":
            made = self._joined(node)
        elif stack is not None and len(node.outputs) == 1:
            self.dtype = node.outputs[0].dtype
            made = self._reshaped(stack, node) if node.op == "Reshape" else None
            if node.op in HANDED_ON:
                made = HANDED_ON[node.op](stack, node)
        elif stack is not None and node.op == "Split":
            return self._split(stack, node)
        if made is None:
            return False
        self.replace(node, [made])
        return True

    def replace(self, node: gs.Node, stacks: Iterable[Stack | None]) -> None:
        """Empty `node`; its outputs are known by their parts."""
        outputs = list(node.outputs)
        detach(node)
        for tensor, stack in zip(outputs, stacks, strict=False):
            if tensor.is_empty() or stack is None:
                continue
            if "s" not in stack.axes:
                replace_reads(tensor, stack.parts.item())
            self.stacks[tensor.name] = stack
            if tensor.name in self.pins:
                module = self.module
                self.write(tensor)
                self.node, self.module = node, module

    def _joined(self, node: gs.Node) -> Stack | None:
        """Concat of stacks along an axis of their parts."""
        stacks = [self.stacks.get(tensor.name) for tensor in node.inputs]
        known = [stack for stack in stacks if stack is not None]
        if len(known) < len(stacks) or any(stack.axes != known[0].axes for stack in known):
            return None
        axis = known[0].normal(node.attrs.get("axis", 0))
        if known[0].axes[axis] != "s":
            return None
        return Stack(np.concatenate([stack.parts for stack in known], known[0].dim(axis)), known[0].axes, node.name)

    def _split(self, stack: Stack, node: gs.Node) -> bool:
        """Split along an axis of the parts."""
        axis, sizes = stack.normal(node.attrs.get("axis", 0)), value(node, 1)
        if stack.axes[axis] != "s" or (sizes is None and given(node, 1)):
            return False
        length = stack.parts.shape[stack.dim(axis)]
        each = -(-length // len(node.outputs))  # the last piece is the smaller one
        cuts = np.cumsum(sizes)[:-1] if sizes is not None else np.arange(1, len(node.outputs)) * each
        pieces = np.split(stack.parts, [int(cut) for cut in cuts], stack.dim(axis))
        if any(piece.size == 0 for piece in pieces):
            return False
        self.replace(node, [Stack(piece, stack.axes, node.name) for piece in pieces])
        return True

    def _reshaped(self, stack: Stack, node: gs.Node) -> Stack | None:
        """[..., directions, hidden] -> [..., directions hidden]."""
        to = value(node, 1)
        if to is None or stack.axes[-2:] != "sh" or to.size != len(stack.axes) - 1 or node.attrs.get("allowzero"):
            return None
        first = stack.parts.flat[0]
        batch, hidden = first.shape
        joined = stack.parts.shape[-1] * int(hidden)
        sizes = iter(stack.parts.shape)
        before = [next(sizes) if axis == "s" else batch for axis in stack.axes[:-2]]
        if any(int(n) not in (0, -1) and int(n) != size for n, size in zip(to, before, strict=False)):
            return None
        if int(to[-1]) not in (-1, joined):
            return None
        axes = f"{stack.axes[:-2]}h"
        shape = stack.parts.shape[:-1]
        if stack.parts.shape[-1] == 1:
            return Stack(stack.parts.reshape(shape), axes, node.name)
        self.dtype, self.batch = first.dtype, batch
        rows = stack.parts.reshape(-1, stack.parts.shape[-1])
        tensors = [self("Concat", *row, at=f"t{i}", features=joined, attrs={"axis": 1}) for i, row in enumerate(rows)]
        return Stack(_array(tensors, *shape), axes, node.name)

    # ---- a layer ------------------------------------------------------------------------------------------------
    def unroll(self, node: gs.Node) -> None:
        """Write the steps of `node`; raises _DeclinedError before anything is written."""
        directions = _directions(node)
        X, batch_first = node.inputs[0], bool(node.attrs.get("layout", 0))
        shape = X.shape or []
        length = shape[int(batch_first)] if len(shape) == 3 else None
        if not isinstance(length, int | np.integer) or length < 1:
            raise _DeclinedError("the number of its steps is known only while running: export it with a fixed length")
        length = int(length)
        if (count := length * len(directions) * NODES[node.op]) > LARGEST:
            raise _DeclinedError(f"{length} steps would become about {count} nodes, {LARGEST} are the most")
        steps = self._length(node, length)
        hidden = directions[0].gates[GATES[node.op][0]].R.shape[0]
        self.node, self.module = node, self.modules[node.name]
        self.batch, self.dtype = shape[int(not batch_first)], node.inputs[1].dtype
        states = [self._initial(node, index, len(directions), hidden, batch_first) for index in (5, 6)]
        x = self._steps(X, length, batch_first, directions[0].gates[GATES[node.op][0]].W.shape[1])
        y: list[list[gs.Tensor]] = []
        last: list[tuple[gs.Tensor, gs.Tensor]] = []
        for d, direction in enumerate(directions):
            order = range(steps)[::-1] if direction.backwards else range(steps)
            written: dict[int, gs.Tensor] = {}
            h, c = (self._start(direction, name, state[d], x[0]) for name, state in zip("hc", states, strict=True))
            for t in order:
                step = _Step(self, direction, f"{direction.path}t{t}", x[t], h, c)
                h, c = CELLS[node.op](step, node)
                written[t] = h
            if steps < length:
                sizes = self("Shape", h, at=f"{direction.path}after")
                sizes.dtype = np.dtype(np.int64)
                zero = self.constant("zero", np.zeros(1, self.dtype))
                after = self(
                    "ConstantOfShape", sizes, at=f"{direction.path}after", features=hidden, attrs={"value": zero}
                )
                written.update((t, after) for t in range(steps, length))
            y.append([written[t] for t in range(length)])
            last.append((h, c))
        parts = _array([tensor for row in y for tensor in row], len(directions), length).T
        end = "nsh" if batch_first else "snh"
        stacks: list[Stack | None] = [Stack(parts, "nssh" if batch_first else "ssnh", node.name)]
        stacks.append(Stack(_array([h for h, _ in last], len(directions)), end, node.name))
        if node.op == "LSTM":
            stacks.append(Stack(_array([c for _, c in last], len(directions)), end, node.name))
        self.scopes.setdefault(node.name, self.module)
        line = f"{describe(node)}: {length} steps" + (" in both directions" if len(directions) > 1 else "")
        self.replace(node, stacks)
        self.report.done.append(line)

    @staticmethod
    def _length(node: gs.Node, length: int) -> int:
        """How many steps are taken: all but where `sequence_lens` says less."""
        if not given(node, 4):
            return length
        lengths = value(node, 4)
        if lengths is None:
            raise _DeclinedError("sequence_lens is computed")
        if lengths.size == 0 or (lengths != lengths.flat[0]).any() or not 0 < lengths.flat[0] <= length:
            raise _DeclinedError(f"sequence_lens differ between samples: {lengths.tolist()}")
        return int(lengths.flat[0])

    def _steps(self, X: gs.Tensor, length: int, batch_first: bool, features: int) -> list[gs.Tensor]:
        """X as `length` tensors [N, in], read from before Transposes where these only moved the batch away."""
        stack = self.stacks.get(X.name)
        if stack is not None and stack.axes == ("nsh" if batch_first else "snh"):
            return list(stack.parts)
        node, module = self.node, self.module
        self.write(X)
        self.node, self.module, self.dtype = node, module, node.inputs[1].dtype
        pieces, axes = self._split_into(X, length, int(batch_first), at="x")
        return [self("Squeeze", piece, axes, at=f"t{t}/x", features=features) for t, piece in enumerate(pieces)]

    def _split_into(self, tensor: gs.Tensor, count: int, axis: int, *, at: str) -> tuple[list[gs.Tensor], gs.Constant]:
        """Pieces of size 1 along axis 0 or 1, N the other, and what Squeeze needs to drop it.

        They are read from before Transposes where these only moved the batch away from axis 0.
        """
        source, moved = tensor, [axis, 1 - axis, 2]  # where the pieces, the batch and the features lie
        while (before := producer(source)) is not None and before.op == "Transpose" and not before.domain:
            perm = before.attrs.get("perm") or [2, 1, 0]
            source, moved = before.inputs[0], [int(perm[axis]) for axis in moved]
            if moved[1] < moved[2]:
                tensor, axis = source, moved[0]
        pieces: list[gs.Tensor] = [tensor]
        if count > 1:
            name = f"{self.node.name}/{at}/Split_output"
            pieces = [gs.Variable(self.names.fresh(f"{name}_{i}"), self.dtype) for i in range(count)]
            self("Split", tensor, at=at, output=pieces[0], attrs={"axis": axis, "num_outputs": count})
            self.nodes[-1].outputs.extend(pieces[1:])
        return pieces, self.constant(f"{at}/axis", [axis])

    def _initial(
        self, node: gs.Node, index: int, directions: int, hidden: int, batch_first: bool
    ) -> list[gs.Tensor | np.ndarray | None]:
        """The initial state of each direction: [N, hidden] computed, [hidden] constant, or None for zeros."""
        if node.op != "LSTM" and index == 6:
            return [None] * directions
        if not given(node, index):
            return [None] * directions
        tensor, axis = node.inputs[index], int(batch_first)
        known = _state(tensor, directions, hidden, axis)
        if known is not None:
            return [row if row.any() else None for row in known.astype(self.dtype)]
        stack = self.stacks.get(tensor.name)
        if stack is not None and stack.axes == ("nsh" if batch_first else "snh"):
            return list(stack.parts)
        module = self.module
        self.write(tensor)
        self.node, self.module, self.dtype = node, module, node.inputs[1].dtype
        name = {5: "h", 6: "c"}[index]
        pieces, axes = self._split_into(tensor, directions, axis, at=name)
        return [self("Squeeze", piece, axes, at=name, features=hidden) for piece in pieces]

    def _start(
        self, direction: Direction, name: str, state: gs.Tensor | np.ndarray | None, x: gs.Tensor
    ) -> gs.Tensor | None:
        """A constant state as the bias of a layer without weights."""
        if not isinstance(state, np.ndarray):
            return state
        return self.bias_of(f"{direction.path}{name}0", state, x)

    def bias_of(self, at: str, bias: np.ndarray, x: gs.Tensor) -> gs.Tensor:
        """[hidden] -> [N, hidden]: x 0^T + bias."""
        weight = np.zeros([len(bias), int(x.shape[1])], bias.dtype)
        inputs = (x, self.constant(f"{at}.W", weight), self.constant(f"{at}.b", bias))
        return self("Linear", *inputs, at=at, features=len(bias), domain=DOMAIN)


def _state(tensor: gs.Tensor, directions: int, hidden: int, axis: int) -> np.ndarray | None:
    """[directions, hidden] where an initial state is constant and the same for every sample."""
    node = producer(tensor)
    if isinstance(tensor, gs.Constant):
        values = tensor.values
    elif node is not None and node.op == "Expand" and not node.domain and isinstance(node.inputs[0], gs.Constant):
        values = node.inputs[0].values
    else:
        number = _fill(tensor)
        return None if number is None else np.full([directions, hidden], number)
    values = values.reshape([1] * (3 - values.ndim) + list(values.shape)) if values.ndim < 3 else values
    values = np.moveaxis(values, axis, 0)  # [directions, N, hidden]
    if values.ndim != 3 or (values != values[:, :1]).any():
        return None
    return np.broadcast_to(values[:, 0], [directions, hidden])


FILLED = {"Expand", "Slice", "Gather", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Tile", "Split", "Cast"}


def _fill(tensor: gs.Tensor) -> float | None:
    """The number that every entry of a tensor is, however large it is."""
    if isinstance(tensor, gs.Constant):
        values = tensor.values
        same = values.size and values.dtype.kind in "fiu" and (values == values.flat[0]).all()
        return float(values.flat[0]) if same else None
    node = producer(tensor)
    if node is None or node.domain:
        return None
    if node.op == "ConstantOfShape":
        filled = node.attrs.get("value")
        if filled is None:
            return 0.0
        return float(np.asarray(filled.values if isinstance(filled, gs.Constant) else filled).flat[0])
    if node.op in FILLED:
        return _fill(node.inputs[0])
    if node.op == "Concat":
        numbers = {_fill(piece) for piece in node.inputs}
        return numbers.pop() if len(numbers) == 1 else None
    return None


# ---------------------------------------------------------------------------------------------------------------- cells


class _Step:
    """One step of one direction: what it reads, and the few things that all cells are made of."""

    def __init__(
        self, write: _Unroller, direction: Direction, at: str, x: gs.Tensor, h: gs.Tensor | None, c: gs.Tensor | None
    ) -> None:
        self.write, self.direction, self.at = write, direction, at
        self.x, self.h, self.c = x, h, c
        self.hidden = next(iter(direction.gates.values())).R.shape[0]
        self._joined: gs.Tensor | None = None

    def __call__(
        self, op: str, *inputs: gs.Tensor, at: str, domain: str = "", attrs: Mapping[str, object] | None = None
    ) -> gs.Tensor:
        """A node with output [N, hidden]."""
        return self.write(op, *inputs, at=f"{self.at}/{at}", features=self.hidden, domain=domain, attrs=attrs)

    def constant(self, letter: str, name: str, values: np.ndarray) -> gs.Constant:
        """A constant of a gate, one for all steps."""
        gate = self.direction.gates[letter]
        if name not in gate.constants:
            gate.constants[name] = self.write.constant(f"{self.direction.path}{letter}.{name}", values)
        return gate.constants[name]

    def layer(self, letter: str, a: gs.Tensor, which: str, *, at: str = "") -> gs.Tensor:
        """Linear(a) with the weights `which` of a gate, W, R or WR, and the biases that go with them."""
        gate = self.direction.gates[letter]
        weight = {"W": gate.W, "R": gate.R}.get(which)
        if weight is None:
            weight = np.concatenate([gate.W, gate.R], axis=1)
        return self.linear(letter, a, which, weight, {"W": gate.Wb, "R": gate.Rb}.get(which), at=at)

    def linear(
        self, letter: str, a: gs.Tensor, name: str, weight: np.ndarray, bias: np.ndarray | None = None, *, at: str = ""
    ) -> gs.Tensor:
        """a W^T + b; the bias Wb + Rb unless another is given."""
        gate = self.direction.gates[letter]
        inputs = [a, self.constant(letter, name, weight)]
        both = bias is None
        row = gate.Wb + gate.Rb if bias is None else bias
        if row.any():
            inputs.append(self.constant(letter, "b" if both else f"{name}b", row))
        return self("Linear", *inputs, at=at or letter, domain=DOMAIN)

    def joined(self) -> gs.Tensor:
        """[x h], written once."""
        if self._joined is None:
            assert self.h is not None
            features = int(self.x.shape[1]) + self.hidden
            self._joined = self.write(
                "Concat", self.x, self.h, at=f"{self.at}/xh", features=features, attrs={"axis": 1}
            )
        return self._joined

    def gate(self, letter: str) -> gs.Tensor:
        """[x h] [W R]^T + b, or x W^T + b as long as the state is 0."""
        gate = self.direction.gates[letter]
        if self.h is None:
            return self.linear(letter, self.x, "W", gate.W)
        return self.layer(letter, self.joined(), "WR")

    def peep(self, letter: str, a: gs.Tensor, c: gs.Tensor | None) -> gs.Tensor:
        """a + P . c."""
        P = self.direction.gates[letter].P
        if P is None or c is None:
            return a
        return self("Add", a, self("Mul", c, self.constant(letter, "P", P), at=letter), at=letter)

    def activate(self, index: int, a: gs.Tensor, *, at: str) -> gs.Tensor:
        """The activation function number `index`."""
        function = self.direction.activations[index]
        return self(function.op, a, at=at, attrs=function.attrs)

    def complement(self, index: int, a: gs.Tensor, gate: gs.Tensor, *, at: str) -> gs.Tensor:
        """1 - gate, gate = f(a): sigmoid(-a), and for a HardSigmoid the one with beta -> 1 - beta."""
        function = self.direction.activations[index]
        if function.op not in ("Sigmoid", "HardSigmoid"):
            one = self.constant(at, "one", np.array(1, self.write.dtype))
            return self("Sub", one, gate, at=at)
        attrs = dict(function.attrs)
        if "beta" in attrs:
            attrs["beta"] = float(np.float32(1 - attrs["beta"]))
        return self(function.op, self("Neg", a, at=at), at=at, attrs=attrs)


States = tuple[gs.Tensor, gs.Tensor | None]


def _rnn(step: _Step, node: gs.Node) -> States:
    """h_t = f([x h] [W R]^T + b)."""
    return step.activate(0, step.gate("h"), at="h"), None


def _gru(step: _Step, node: gs.Node) -> States:
    """h_t = (1 - z) . n + z . h."""
    a = step.gate("z")
    z = step.activate(0, a, at="z")
    fresh = step.complement(0, a, z, at="z")
    new = step.direction.gates["n"]
    if node.attrs.get("linear_before_reset", 0):
        candidate = step.layer("n", step.x, "W", at="n/x")
        recurrent = None
        if step.h is not None:
            recurrent = step.layer("n", step.h, "R", at="n/h")
        elif new.Rb.any():
            recurrent = step.write.bias_of(f"{step.at}/n/h", new.Rb, step.x)
        if recurrent is not None:
            r = step.activate(0, step.gate("r"), at="r")
            candidate = step("Add", candidate, step("Mul", r, recurrent, at="n"), at="n")
    elif step.h is None:
        candidate = step.gate("n")
    else:
        r = step.activate(0, step.gate("r"), at="r")
        kept = step("Mul", r, step.h, at="r")
        features = int(step.x.shape[1]) + step.hidden
        joined = step.write("Concat", step.x, kept, at=f"{step.at}/n", features=features, attrs={"axis": 1})
        candidate = step.layer("n", joined, "WR")
    n = step.activate(1, candidate, at="n")
    h = step("Mul", fresh, n, at="h")
    if step.h is not None:
        h = step("Add", h, step("Mul", z, step.h, at="h"), at="h")
    return h, None


def _lstm(step: _Step, node: gs.Node) -> States:
    """c_t = f . c + i . g, h_t = o . k(c_t)."""
    a = step.peep("i", step.gate("i"), step.c)
    i = step.activate(0, a, at="i")
    g = step.activate(1, step.gate("g"), at="g")
    c = step("Mul", i, g, at="c")
    if step.c is not None:
        if node.attrs.get("input_forget", 0):
            f = step.complement(0, a, i, at="f")
        else:
            f = step.activate(0, step.peep("f", step.gate("f"), step.c), at="f")
        c = step("Add", step("Mul", f, step.c, at="c"), c, at="c")
    o = step.activate(0, step.peep("o", step.gate("o"), c), at="o")
    return step("Mul", o, step.activate(2, c, at="c"), at="h"), c


CELLS = {"RNN": _rnn, "GRU": _gru, "LSTM": _lstm}
