"""Move samples to axis 0 where a model has them elsewhere: [T, N, C] -> [N, T, C], [N k, C] -> [N, k, C].

torch's MultiheadAttention is exported with time first, its heads merged into the batch and its rows into [T N, C];
windows of Swin become [N k, T, C]. With samples on axis 0 throughout, all conditions on a sample share one forward
pass. Numbers stay the same: axes are renumbered, every operator computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.build import Build, Declined
from onnxcrp.canonize.edit import describe, given, insert, pinned, prune, set_input, set_inputs, value
from onnxcrp.canonize.report import PassReport
from onnxcrp.canonize.samples import (
    FIRST,
    Layout,
    axis_of,
    broadcasts,
    grown,
    places,
    reduced,
    two_batches,
)

Edit = Callable[[], None]


def _nothing() -> None:
    """The edit of what may stay as it is."""


def samples_first(graph: gs.Graph) -> PassReport:
    """Renumber axes so that samples are on axis 0.

    `graph` has its shapes inferred and its constants folded. Nodes connected by tensors that have samples elsewhere are
    a region; one is left as it was, and the report says why, where an operator of it cannot be renumbered, e.g. a
    convolution over [N k, C, H, W].
    """
    report = PassReport("samples first")
    if not any(map(_may_move, graph.nodes)):
        return report
    shapes = two_batches(graph)
    mover = _Mover(graph, places(graph, shapes), set(grown(shapes)))
    for nodes in mover.regions():
        try:
            edits = [mover.edit(node) for node in nodes]
        except Declined as reason:
            report.declined.append(f"samples stay where they are: {reason}")
            continue
        for edit in edits:
            edit()
        moved = mover.moves(nodes)
        tensors = f"{moved} tensors" if moved > 1 else "a tensor"
        report.done.append(f"samples come first in {tensors} from {describe(nodes[0])} to {describe(nodes[-1])}")
    if report.done:
        mover.finish()
    return report


def _may_move(node: gs.Node) -> bool:
    """Whether a node may take samples from axis 0, as far as it can be told without two inferences."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return not perm or perm[0] != 0
    if node.op in ("Unsqueeze", "Squeeze"):
        axes = value(node, 1)
        return axes is None or bool((axes <= 0).any())
    if node.op == "Flatten":
        return node.attrs.get("axis", 1) != 1
    if node.op != "Reshape":
        return False
    shape, before, after = value(node, 1), node.inputs[0].shape, node.outputs[0].shape
    if shape is not None and shape.size and shape.reshape(-1)[0] == 0 and not node.attrs.get("allowzero"):
        return False
    sides = [side[1:] if side else [None] for side in (before, after)]
    known = all(isinstance(size, int) for side in sides for size in side)
    return not known or prod(sides[0]) != prod(sides[1])


class _Mover:
    """What becomes of each node, found before anything is changed."""

    def __init__(self, graph: gs.Graph, known: Mapping[str, Layout], grown: set[str]) -> None:
        self.graph, self.known, self.grown = graph, known, grown
        self.moved = {name: layout for name, layout in known.items() if layout.place != FIRST}
        self.fixed = pinned(graph) | {tensor.name for tensor in graph.inputs}
        self.build = Build(graph)
        self.new: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}

    def regions(self) -> list[list[gs.Node]]:
        """Nodes that read or write tensors to be moved, in their order, those connected by such tensors together."""
        region_of: dict[str, list[gs.Node]] = {}  # tensor -> the nodes of its region
        for node in self.graph.nodes:
            names = {tensor.name for tensor in (*node.inputs, *node.outputs)} & self.moved.keys()
            joined = list({id(region_of[name]): region_of[name] for name in names if name in region_of}.values())
            region = max(joined, key=len, default=[])
            for other in joined:
                if other is not region:
                    region.extend(other)
                    region_of.update((name, region) for name, nodes in region_of.items() if nodes is other)
            region.append(node)
            region_of.update((name, region) for name in names)
        order = {id(node): i for i, node in enumerate(self.graph.nodes)}
        regions = {id(region): region for region in region_of.values()}.values()
        return [sorted(region, key=lambda node: order[id(node)]) for region in regions]

    def moves(self, nodes: list[gs.Node]) -> int:
        """The tensors of a region that was changed have their new shapes; how many these are."""
        tensors = {t.name: t for node in nodes for t in node.outputs if t.name in self.moved}
        for name, tensor in tensors.items():
            tensor.shape = [None, *self.moved[name].rest]
        return len(tensors)

    def finish(self) -> None:
        insert(self.graph, self.new)
        prune(self.graph)

    def edit(self, node: gs.Node) -> Edit:
        """How the axes of a node are renumbered; raises Declined."""
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name in self.moved and tensor.name in self.fixed:
                raise Declined(f"{tensor.name} is an input or output, or a subgraph reads it")
        lost = [t.name for t in node.inputs if t.name in self.grown and t.name not in self.known]
        if node.op != "Shape":
            lost += [t.name for t in node.outputs if t.name not in self.known]
        if lost:
            raise Declined(f"{describe(node)}: where samples are in {lost[0]} is not known")
        if broadcasts(node):
            return self._broadcast(node)
        if node.op not in _EDITS:
            raise Declined(f"{describe(node)} cannot be renumbered")
        others = [] if node.op in _SEVERAL else [t.name for t in node.inputs[1:] if t.name in self.grown]
        if others:
            raise Declined(f"{describe(node)}: {others[0]} differs from sample to sample")
        return _EDITS[node.op](self, node)

    def _layout(self, node: gs.Node, index: int = 0) -> Layout:
        tensor = node.inputs[index]
        if tensor.name not in self.known:
            raise Declined(f"{describe(node)}: {tensor.name} is the same for all samples")
        return self.known[tensor.name]

    def _constant(self, node: gs.Node, values: Sequence[int]) -> gs.Constant:
        return self.build.constant(list(values), f"{node.name}/moved", np.int64)

    def _ints(self, node: gs.Node, index: int, values: list[int]) -> Edit:
        """Input `index` becomes a constant."""
        return lambda: set_input(node, index, self._constant(node, values))

    def _write(self, node: gs.Node, op: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Tensor:
        """A new node before this one; its output, integers unless it is said otherwise."""
        self.build.name, self.build.nodes = node.name, self.new.setdefault(id(node), ([], []))[0]
        return self.build(op, *inputs, dtype=np.int64, **attrs)

    def _rest(self, node: gs.Node) -> list[int]:
        """The sizes of the output after axis 0, once samples come first."""
        rest = self.known[node.outputs[0].name].rest
        known = [size for size in rest if size is not None]
        if len(known) < len(rest):
            raise Declined(f"{describe(node)}: the sizes of {node.outputs[0].name} are not known")
        return known

    @staticmethod
    def _together(*edits: Edit) -> Edit:
        def edit() -> None:
            for each in edits:
                each()

        return edit

    def _axis(self, node: gs.Node) -> Edit:
        """The attribute `axis`, which must not be that of samples."""
        layout = self._layout(node)
        axis = axis_of(node, len(layout.sizes))
        if axis == layout.place.axis:
            raise Declined(f"{describe(node)} works along the axis of samples")
        return lambda: node.attrs.update(axis=layout.axes[axis][0])

    # ---- rearrangements --------------------------------------------------------------------------------------------
    def _transpose(self, node: gs.Node) -> Edit:
        layout = self._layout(node)
        order = node.attrs.get("perm") or list(range(len(layout.sizes)))[::-1]
        perm = [0, *(axis for old in order for axis in layout.axes[old])]
        return lambda: node.attrs.update(perm=perm)

    def _reshape(self, node: gs.Node) -> Edit:
        """Reshape, Flatten: the entries of a sample keep their order."""
        self._layout(node)
        after = self.known[node.outputs[0].name]
        if 0 in after.rest or after.rest.count(None) > 1:
            raise Declined(f"{describe(node)}: the sizes of {node.outputs[0].name} are not known")
        sizes = [0, *(-1 if size is None else size for size in after.rest)]

        def edit() -> None:
            node.op, node.attrs = "Reshape", {}
            set_inputs(node, [node.inputs[0], self._constant(node, sizes)])

        return edit

    def _squeeze(self, node: gs.Node) -> Edit:
        """Squeeze, Unsqueeze: axes of size 1 are gone from the input, or new in the output."""
        layout = self._layout(node) if node.op == "Squeeze" else self.known[node.outputs[0].name]
        axes = value(node, 1)
        if axes is None:
            raise Declined(f"{describe(node)} does not name its axes")
        old = [int(axis) % len(layout.sizes) for axis in axes.reshape(-1)]
        return self._ints(node, 1, [new for axis in old for new in layout.axes[axis]])

    def _slice(self, node: gs.Node) -> Edit:
        layout, axes = self._layout(node), value(node, 3)
        if axes is None:
            raise Declined(f"{describe(node)} does not name its axes")
        old = [int(axis) % len(layout.sizes) for axis in axes.reshape(-1)]
        if layout.place.axis in old:
            raise Declined(f"{describe(node)} cuts the axis of samples")
        return self._ints(node, 3, [layout.axes[axis][0] for axis in old])

    def _concat(self, node: gs.Node) -> Edit:
        for index in range(len(node.inputs)):
            self._layout(node, index)
        return self._axis(node)

    def _gather(self, node: gs.Node) -> Edit:
        """Rows of a table for ids of whatever shape, or entries along an axis that is not that of samples."""
        if node.inputs[0].name in self.known:
            if node.inputs[1].name in self.known:
                raise Declined(f"{describe(node)}: {node.inputs[1].name} differs from sample to sample")
            return self._axis(node)
        return _nothing  # where samples are in its output was found, so its axis is 0

    def _expand(self, node: gs.Node) -> Edit:
        """Copies along other axes, or of what is the same for all samples as often as there are samples."""
        out = self.known[node.outputs[0].name]
        if node.inputs[0].name not in self.known:
            return self._together(self._operand(node, 0, out), self._to_sizes(node, 1))
        if len(self.known[node.inputs[0].name].sizes) != len(out.sizes):
            raise Declined(f"{describe(node)} adds axes before those of its input")
        return self._ints(node, 1, [1, *self._rest(node)])

    def _filled(self, node: gs.Node) -> Edit:
        """ConstantOfShape."""
        return self._to_sizes(node, 0)

    def _to_sizes(self, node: gs.Node, index: int) -> Edit:
        """Input `index`, the sizes of the output as the run computes them, becomes those with samples first."""
        out, rest = self.known[node.outputs[0].name], self._rest(node)
        if node.inputs[index].shape != [len(out.sizes)]:
            raise Declined(f"{describe(node)}: how many axes {node.inputs[index].name} counts is not known")

        def edit() -> None:
            samples = self._write(node, "Gather", node.inputs[index], self._constant(node, [out.place.axis]), axis=0)
            if out.place.each > 1:
                samples = self._write(node, "Div", samples, self._constant(node, [out.place.each]))
            set_input(node, index, self._write(node, "Concat", samples, self._constant(node, rest), axis=0))

        return edit

    def _shape(self, node: gs.Node) -> Edit:
        """The sizes the tensor had: N times outer and inner, and those of its other axes."""
        layout = self._layout(node)
        entries = list(enumerate(layout.sizes))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        if not entries:
            raise Declined(f"{describe(node)} asks for no size")

        def size_at(axis: int) -> gs.Tensor:
            return self._write(node, "Shape", node.inputs[0], start=axis, end=axis + 1)

        def part(axis: int, size: int | None) -> gs.Tensor:
            if axis != layout.place.axis:
                return self._constant(node, [size]) if size is not None else size_at(layout.axes[axis][0])
            each = layout.place.each
            return size_at(0) if each == 1 else self._write(node, "Mul", size_at(0), self._constant(node, [each]))

        def edit() -> None:
            parts = [part(axis, size) for axis, size in entries]
            node.op, node.attrs = "Concat", {"axis": 0}
            set_inputs(node, parts)

        return edit

    # ---- what computes ---------------------------------------------------------------------------------------------
    def _broadcast(self, node: gs.Node) -> Edit:
        out = self.known[node.outputs[0].name]
        return self._together(*(self._operand(node, i, out) for i, t in enumerate(node.inputs) if not t.is_empty()))

    def _operand(self, node: gs.Node, index: int, out: Layout) -> Edit:
        """An operand gets an axis for each that the output has there: those it lacks have size 1.

        One that is the same for all samples has size 1 beside them, which goes, or becomes two.
        """
        tensor, rank = node.inputs[index], len(out.sizes)
        if tensor.name in self.known:
            lacking = rank - len(self.known[tensor.name].sizes)  # all of them before the axis of samples
            return self._reshaped(node, index, "Unsqueeze", list(range(1, lacking + 1))) if lacking else _nothing
        if tensor.shape is None:
            raise Declined(f"{describe(node)}: the rank of {tensor.name} is not known")
        beside = len(tensor.shape) - (rank - out.place.axis)
        count = len(out.axes[out.place.axis])
        if beside < 0 or (count == 1 and tensor.shape[beside] == 1):
            return _nothing
        if tensor.shape[beside] != 1:
            raise Declined(f"{describe(node)}: {tensor.name}, the same for all samples, has entries along their axis")
        return self._reshaped(node, index, "Unsqueeze" if count else "Squeeze", [beside])

    def _reshaped(self, node: gs.Node, index: int, op: str, axes: list[int]) -> Edit:
        """Squeeze or Unsqueeze of an operand, at once if it is a constant."""
        change = np.expand_dims if op == "Unsqueeze" else np.squeeze

        def edit() -> None:
            tensor = node.inputs[index]
            if isinstance(tensor, gs.Constant):
                values = change(tensor.values, tuple(axes))
                set_input(node, index, self.build.constant(values, f"{node.name}/moved"))
            else:
                moved = self._write(node, op, tensor, self._constant(node, axes))
                moved.dtype = tensor.dtype
                set_input(node, index, moved)

        return edit

    def _scaled(self, node: gs.Node) -> Edit:
        """QuantizeLinear, DequantizeLinear by one scale."""
        scales = [value(node, index) for index in range(1, len(node.inputs))]
        if any(scale is None or scale.size != 1 for scale in scales):
            raise Declined(f"{describe(node)} has a scale for each entry of an axis")
        return _nothing

    def _linear(self, node: gs.Node) -> Edit:
        layout = self._layout(node)
        if layout.place.axis == len(layout.sizes) - 1:
            raise Declined(f"{describe(node)} works along the axis of samples")
        return _nothing

    def _matmul(self, node: gs.Node) -> Edit:
        """Samples on an axis before the matrices, or among the rows of the left one where the right one is all."""
        left, right = (self.known.get(tensor.name) for tensor in node.inputs)
        out = self.known[node.outputs[0].name]
        before_matrices = out.place.axis < len(out.sizes) - 2
        ranks = [len(tensor.shape or ()) for tensor in node.inputs]
        if left and right:
            fits = before_matrices and ranks == [len(out.sizes)] * 2
        elif left:
            fits = ranks[1] == 2 and left.place.axis < ranks[0] - 1
        else:
            fits = ranks[0] == 2 and before_matrices
        if not fits:
            raise Declined(f"{describe(node)}: samples are among the entries of its matrices")
        return _nothing

    def _layernorm(self, node: gs.Node) -> Edit:
        layout = self._layout(node)
        axis, rank = axis_of(node, len(layout.sizes)), len(layout.sizes)
        if axis <= layout.place.axis:
            raise Declined(f"{describe(node)} works along the axis of samples")
        return lambda: node.attrs.update(axis=axis - rank)

    def _reduce(self, node: gs.Node) -> Edit:
        layout = self._layout(node)
        axes = reduced(node, len(layout.sizes))
        if axes is None or layout.place.axis in axes or not given(node, 1):
            raise Declined(f"{describe(node)} works along the axis of samples")
        return self._ints(node, 1, [new for axis in axes for new in layout.axes[axis]])


_EDITS: dict[str, Callable[[_Mover, gs.Node], Edit]] = {
    "Transpose": _Mover._transpose,
    **dict.fromkeys(["Reshape", "Flatten"], _Mover._reshape),
    **dict.fromkeys(["Squeeze", "Unsqueeze"], _Mover._squeeze),
    **dict.fromkeys(["Split", "Softmax", "LogSoftmax", "Hardmax"], _Mover._axis),
    "Gather": _Mover._gather,
    "Concat": _Mover._concat,
    "Slice": _Mover._slice,
    "Expand": _Mover._expand,
    "ConstantOfShape": _Mover._filled,
    "Shape": _Mover._shape,
    "Linear": _Mover._linear,
    "MatMul": _Mover._matmul,
    **dict.fromkeys(["LayerNormalization", "RmsNorm"], _Mover._layernorm),
    **dict.fromkeys(["QuantizeLinear", "DequantizeLinear"], _Mover._scaled),
    **dict.fromkeys(
        """ReduceSum ReduceMean ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceSumSquare ReduceLogSum
        ReduceLogSumExp""".split(),  # noqa: SIM905
        _Mover._reduce,
    ),
}
_SEVERAL = frozenset(["Gather", "Concat", "MatMul"])  # of whose inputs several may have samples
