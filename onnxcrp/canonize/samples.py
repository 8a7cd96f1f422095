"""Where samples are in every tensor: axis 0 of most, but attention may have [T, N, C], windows [N k, C], rows [T N, C].

Which axis grows with the batch is read from the shapes for two sizes of it; in what order a merged axis holds samples
and the rest no shape tells, so places are followed from the inputs node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import given, value
from onnxcrp.canonize.load import BIG
from onnxcrp.canonize.shapes import described
from onnxcrp.canonize.write import write
from onnxcrp.ops.registry import about

BATCHES = (7, 11)  # two sizes of the batch to compare shapes for

BROADCASTING = frozenset(
    """Add Sub Mul Div Sum Mean Max Min Where And Or Xor Not Equal Greater GreaterOrEqual Less LessOrEqual IsNaN IsInf
    Identity Dropout Cast CastLike Neg Sign""".split()  # noqa: SIM905
)
ORDERED = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze"])  # entries stay in their order
_SAME_FOR_ALL = frozenset(["Expand", "ConstantOfShape"])
_SHUFFLE = frozenset(
    ["TopK", "GatherElements", "GatherND", "Compress", "ReverseSequence", "ScatterElements", "ScatterND"]
)
_LAST = frozenset(["Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RmsNorm"])  # axis -1 unless named

Shapes = dict[str, list[int | None]]


class Place(NamedTuple):
    """Where samples are: axis `axis` has outer * N * inner entries, sample by sample between the other two."""

    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def each(self) -> int:
        """How many entries of the axis a sample has."""
        return self.outer * self.inner


FIRST = Place()


class Layout(NamedTuple):
    """A tensor of N samples: where they are, and its sizes, that of their axis for one sample; None where unknown."""

    place: Place
    sizes: tuple[int | None, ...]

    @property
    def axes(self) -> list[list[int]]:
        """Where each axis is once samples come first: nowhere, at one place, or at two (outer and inner)."""
        found: list[list[int]] = []
        count = 1
        for axis in range(len(self.sizes)):
            parts = 1 if axis != self.place.axis else sum(size > 1 for size in self.place[1:])
            found.append(list(range(count, count + parts)))
            count += parts
        return found

    @property
    def rest(self) -> list[int | None]:
        """The sizes of axes 1.. once samples come first."""
        axis, outer, inner = self.place
        return [*self.sizes[:axis], *(size for size in (outer, inner) if size > 1), *self.sizes[axis + 1 :]]


def two_batches(graph: gs.Graph) -> tuple[Shapes, Shapes]:
    """Shapes of all tensors for two sizes of the batch, as far as onnx can tell."""
    small, large = (_shapes_for(graph, size) for size in BATCHES)
    return small, large


def _shapes_for(graph: gs.Graph, batch: int) -> Shapes:
    model = write(graph, largest=BIG, claims=False)
    ports = {tensor.name: tensor.shape for tensor in graph.inputs}
    for port in model.graph.input:
        if port.name in ports and ports[port.name] and not isinstance(ports[port.name][0], int):
            port.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx raises several kinds, and nothing is wrong where it cannot tell
        return {}
    found = described((*model.graph.value_info, *model.graph.output, *model.graph.input))
    return {name: each.sizes for name, each in found.items()}


def grown(shapes: tuple[Shapes, Shapes]) -> dict[str, tuple[int, tuple[int | None, ...]]]:
    """Tensor -> (the one axis that grows with the batch, its sizes for one sample); others are left out."""
    few, many = shapes
    found = {}
    for name in few.keys() & many.keys():
        pairs = list(zip(few[name], many[name], strict=False))
        axes = [axis for axis, (small, large) in enumerate(pairs) if small != large]
        if len(axes) == 1 and None not in pairs[axes[0]]:
            (axis,) = axes
            each = (few[name][axis] or 0) // BATCHES[0]
            if pairs[axis] == tuple(each * batch for batch in BATCHES):
                found[name] = (axis, (*few[name][:axis], each, *few[name][axis + 1 :]))
    return found


def places(graph: gs.Graph, shapes: tuple[Shapes, Shapes]) -> dict[str, Layout]:
    """The layout of every tensor that grows with the batch, as far as it can be followed from the inputs."""
    axes = grown(shapes)
    known = {t.name: Layout(FIRST, axes[t.name][1]) for t in graph.inputs if axes.get(t.name, (1,))[0] == 0}
    for node in graph.nodes:
        lost = any(tensor.name in axes and tensor.name not in known for tensor in node.inputs)
        for name in [tensor.name for tensor in node.outputs if tensor.name in axes]:
            axis, sizes = axes[name]
            place = FIRST if lost else _place(node, axis, sizes, known)  # mixed samples: [N, ...] is what it says
            if place is not None and (place.axis, place.each) == (axis, sizes[axis]):
                known[name] = Layout(place, sizes)
    return known


# ---- how a node moves samples --------------------------------------------------------------------------------------
def _place(node: gs.Node, axis: int, sizes: Sequence[int | None], known: Mapping[str, Layout]) -> Place | None:
    """Where samples are in an output of these sizes that grows along `axis`; None where nothing tells."""
    inputs = [known[tensor.name] for tensor in node.inputs if tensor.name in known]
    each = sizes[axis] or 0
    if not inputs:  # what is the same for all samples, made for their number
        return Place(axis, 1, each) if node.op in _SAME_FOR_ALL or each == 1 else None
    first, rank = inputs[0].place, len(inputs[0].sizes)
    if node.op in ORDERED:
        return in_order(inputs[0], axis, sizes)
    if node.op == "Transpose":
        perm = node.attrs.get("perm") or list(range(rank))[::-1]
        return first._replace(axis=perm.index(first.axis))
    if each == 1:  # one entry for each sample along this axis, and what follows puts none in the place of another
        return Place(axis)
    if broadcasts(node) or node.op in ("MatMul", "Expand"):
        return _from_the_right(inputs, len(sizes))
    if node.op == "Gather":
        return _gathered(node, known)
    if node.op.startswith("Reduce"):
        gone = [] if node.attrs.get("keepdims", 1) else reduced(node, rank) or []
        return first._replace(axis=first.axis - sum(before < first.axis for before in gone))
    alike = all(layout.place == first for layout in inputs) and len(sizes) == rank
    return first if alike and node.op not in _SHUFFLE else None


def broadcasts(node: gs.Node) -> bool:
    """Whether a node computes every entry of its output from those at the same place of its inputs."""
    return node.op in BROADCASTING or about(node.op).family == "activation"


def in_order(source: Layout, axis: int, sizes: Sequence[int | None]) -> Place | None:
    """Where samples are after a Reshape to these sizes, which are those of one sample on `axis`.

    As many of its entries lie before a sample as did, ((l outer + o) N + n) inner right + i right + r, and as many
    after it; one of these numbers tells the other.
    """
    at, outer, inner = source.place
    before, after = _product(source.sizes[:at], outer), _product(source.sizes[at + 1 :], inner)
    left, right = _product(sizes[:axis]), _product(sizes[axis + 1 :])
    each = sizes[axis] or 0
    if before and left:
        outer = before // left if before % left == 0 and each % (before // left) == 0 else 0
        return Place(axis, outer, each // outer) if outer else None
    if after and right:
        inner = after // right if after % right == 0 and each % (after // right) == 0 else 0
        return Place(axis, each // inner, inner) if inner else None
    return None


def _product(sizes: Sequence[int | None], factor: int = 1) -> int | None:
    """Of sizes that are all known and not 0."""
    return prod(size for size in sizes if size) * factor if all(sizes) else None


def _from_the_right(inputs: Sequence[Layout], rank: int) -> Place | None:
    """The place that all operands of a broadcast have, counted from the last axis."""
    found = {each.place._replace(axis=each.place.axis - len(each.sizes)) for each in inputs}
    if len(found) != 1:
        return None
    (place,) = found
    return place._replace(axis=place.axis + rank)


def _gathered(node: gs.Node, known: Mapping[str, Layout]) -> Place | None:
    data, indices = (known.get(tensor.name) for tensor in node.inputs)
    if data is None:  # rows of a table
        table = node.inputs[0].shape
        return indices.place if indices and table is not None and axis_of(node, len(table)) == 0 else None
    axis, picked = axis_of(node, len(data.sizes)), node.inputs[1].shape
    if indices is not None or picked is None or axis == data.place.axis:
        return None
    return data.place._replace(axis=data.place.axis + (len(picked) - 1 if axis < data.place.axis else 0))


def axis_of(node: gs.Node, rank: int) -> int:
    """The attribute `axis` of a node whose input has this rank, counted from the first."""
    return int(node.attrs.get("axis", -1 if node.op in _LAST else 0)) % rank


def reduced(node: gs.Node, rank: int) -> list[int] | None:
    """The axes of a reduction, None where they are computed."""
    axes = value(node, 1)
    if axes is None and given(node, 1):
        return None
    if axes is not None and axes.size:
        return sorted(int(axis) % rank for axis in axes.reshape(-1))
    return [] if node.attrs.get("noop_with_empty_axes") else list(range(rank))
