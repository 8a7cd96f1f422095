"""Compute what does not depend on any input, and take out what does nothing.

- A node whose inputs are all constants is replaced by its value, as the operator's reference implementation computes
  it: weights that arrive through Identity, Transpose, Reshape, Cast, DequantizeLinear; axes and sizes that are
  computed.
- Sizes that are only partly known are followed through Shape, Gather, Slice, Concat, Unsqueeze, Squeeze, Cast,
  integer arithmetic, Equal and Where. Expand(x [n, 1, 8], [n, 4, 8]) is Expand(x, [1, 4, 8]). Reshape(x [n, 512, 1,
  1], [n, 512]) is Reshape(x, [0, 512]), 0 being "as before"; one unknown entry elsewhere is -1, since x has one
  number of elements only. [-1, 512] is [0, 512] where the axes after the first hold as many elements before and
  after.
- y = x for Identity, Dropout outside training, Cast to the type x has, Concat of one tensor, Pad by nothing,
  Transpose that moves nothing: y's readers read x. If y is an output of the model, x's producer writes y instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcrp.canonize.edit import (
    Names,
    describe,
    detach,
    given,
    pinned,
    producer,
    prune,
    rank,
    replace_reads,
    set_constant,
    set_output,
    value,
)
from onnxcrp.canonize.quantize import dequantize
from onnxcrp.canonize.report import PassReport

RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
GROWS = 64  # MB: no constant larger than this is written down unless what it is made of is as large

Sizes = list[int | str | None]  # what is known of a 1-D (or 0-D) tensor of integers; a str names an unknown size


def fold_constants(graph: gs.Graph, *, batch_unknown: bool = False) -> PassReport:
    """Replace what can be computed now by constants; `batch_unknown`: axis 0 of a tensor is not a size to rely on.

    The batch may be about to be freed, and a size that was written down cannot be freed as easily as one that is
    computed.
    """
    report = PassReport("fold constants")
    names = Names(graph)
    pins = pinned(graph)
    sizes: dict[str, Sizes] = {}
    folded: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain or not node.outputs or any(True for _ in node.subgraphs()):
            continue
        if any(tensor.name in pins for tensor in node.outputs):
            continue
        inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
        if node.op == "CastLike" and isinstance(inputs[1].dtype, np.dtype) and isinstance(inputs[0], gs.Constant):
            values: list[np.ndarray] | str = [inputs[0].values.astype(inputs[1].dtype)]
        elif all(isinstance(tensor, gs.Constant) for tensor in inputs):
            values = evaluate(node, graph.opset)
        else:
            known = _sizes(node, sizes, batch_unknown)
            if known is None:
                continue
            sizes[node.outputs[0].name] = known
            axes = rank(node.outputs[0])
            if axes is None or axes > 1 or not all(isinstance(size, int) for size in known):
                continue
            kind = np.dtype(bool) if node.op == "Equal" else _integer(node.outputs[0])
            values = [np.array(known if axes else known[0], kind)]
        if isinstance(values, str):
            report.declined.append(f"{describe(node)}: {values}")
            continue
        outputs = list(node.outputs)
        detach(node)
        for tensor, array in zip(outputs, values, strict=False):
            if tensor.outputs:
                replace_reads(tensor, gs.Constant(tensor.name, array))
        folded[node.op] = folded.get(node.op, 0) + 1
    report.done += [f"{count} {op} computed" for op, count in sorted(folded.items())]
    for node in graph.nodes:
        if node.op in _TO_SIZES and node.inputs and not node.domain:
            line = _TO_SIZES[node.op](node, sizes, names, batch_unknown)
            report.done += [line] if line else []
    _drop(graph, pins, report)
    prune(graph)
    return report


# -------------------------------------------------------------------------------------------------------------- values


def evaluate(node: gs.Node, opset: int) -> list[np.ndarray] | str:
    """The outputs of a node of constants, or why they are not computed."""
    if node.op in RANDOM:
        return "random"
    inputs = [value(node, index) for index in range(len(node.inputs))]
    if node.op == "DequantizeLinear" and not set(node.attrs) - {"axis"} and inputs[0] is not None:
        zero = inputs[2] if len(inputs) > 2 else None
        return [dequantize(inputs[0], np.asarray(inputs[1]), zero, int(node.attrs.get("axis", 1)))]
    read = sum(array.nbytes for array in inputs if array is not None)
    expected = _bytes(node, inputs)
    if expected > max(GROWS << 20, 2 * read):
        return f"its {expected >> 20} MB stay computed"
    feeds = {t.name: array for t, array in zip(node.inputs, inputs, strict=True) if array is not None}
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            proto = onnx.helper.make_graph(
                [OnnxExporter.export_node(node)],
                "node",
                [onnx.helper.make_tensor_value_info(name, _kind(array), array.shape) for name, array in feeds.items()],
                [onnx.helper.make_empty_tensor_value_info(t.name) for t in node.outputs if not t.is_empty()],
            )
            model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)])
            results = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:  # the reference implementation has no error class of its own
        return f"cannot be computed: {type(error).__name__}: {error}"
    if not all(isinstance(array, np.ndarray | np.generic) for array in results):
        return "does not give tensors"
    found = iter(np.asarray(array) for array in results)
    return [np.zeros(0) if tensor.is_empty() else next(found) for tensor in node.outputs]


def _kind(array: np.ndarray) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _bytes(node: gs.Node, inputs: list[np.ndarray | None]) -> int:
    """How large the result will be: from its shape where that is inferred, from the inputs where they say it."""
    first = inputs[0] if inputs else None
    if first is None:
        return 0
    match node.op:
        case "ConstantOfShape":
            return 8 * int(np.prod(first, dtype=np.float64))
        case "Expand" if inputs[1] is not None:
            shape = np.broadcast_shapes(first.shape, tuple(int(n) for n in inputs[1]))
            return first.itemsize * int(np.prod(shape, dtype=np.float64))
        case "Tile" if inputs[1] is not None:
            return first.nbytes * int(np.prod(inputs[1], dtype=np.float64))
        case "Range" if inputs[1] is not None and inputs[2] is not None and inputs[2] != 0:
            return 8 * max(0, int((inputs[1] - first) / inputs[2]))
    shape = node.outputs[0].shape
    if shape is not None and all(isinstance(size, int) for size in shape):
        return 8 * int(np.prod(shape, dtype=np.float64))
    return 0


# --------------------------------------------------------------------------------------------------------------- sizes


def _integer(tensor: gs.Tensor) -> np.dtype:
    return np.dtype(tensor.dtype) if isinstance(tensor.dtype, np.dtype) else np.dtype(np.int64)


def _sizes(node: gs.Node, sizes: dict[str, Sizes], batch_unknown: bool) -> Sizes | None:
    """What is known of the integers a node writes; None if nothing is."""

    def read(index: int) -> Sizes | None:
        if not given(node, index):
            return None
        array = value(node, index)
        if array is not None:
            return [int(n) for n in array.ravel()] if array.dtype.kind in "iub" and array.ndim < 2 else None
        return sizes.get(node.inputs[index].name)

    match node.op:
        case "Shape":
            shape = node.inputs[0].shape
            if shape is None:
                return None
            known = _named(node.inputs[0], batch_unknown) or []
            start, end = node.attrs.get("start", 0), node.attrs.get("end", len(known))
            return known[start:end]
        case "Size":
            shape = node.inputs[0].shape
            if batch_unknown or shape is None or not all(isinstance(size, int) for size in shape):
                return None
            return [int(np.prod(shape, dtype=np.int64))]
        case "Identity" | "Unsqueeze" | "Squeeze" | "Reshape":
            return read(0)
        case "Cast":
            to = node.attrs.get("to")
            return read(0) if to in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, np.int64, np.int32) else None
        case "Concat":
            parts = [read(index) for index in range(len(node.inputs))]
            return None if None in parts else [size for part in parts for size in part or []]
        case "Gather":
            data, indices = read(0), value(node, 1)
            if data is None or indices is None or indices.ndim > 1 or (abs(indices + 0.5) > len(data)).any():
                return None
            return [data[int(index)] for index in indices.ravel()]
        case "Slice":
            data, bounds = read(0), [value(node, index) for index in range(1, len(node.inputs))]
            if data is None or any(bound is None or bound.size != 1 for bound in bounds):
                return None
            start, end, *rest = [int(bound.ravel()[0]) for bound in bounds if bound is not None]
            return data[slice(start, end, rest[1] if len(rest) > 1 else 1)]
        case "Add" | "Sub" | "Mul" | "Div" | "Equal":
            return _arithmetic(node.op, read(0), read(1))
        case "Where":
            return _chosen(read(0), read(1), read(2))
    return None


def _arithmetic(op: str, a: Sizes | None, b: Sizes | None) -> Sizes | None:
    if a is None or b is None or not (len(a) == len(b) or 1 in (len(a), len(b))):
        return None
    compute: dict[str, Callable[[int, int], int | None]] = {
        "Add": lambda x, y: x + y,
        "Sub": lambda x, y: x - y,
        "Mul": lambda x, y: x * y,
        "Div": lambda x, y: x // y if x >= 0 < y else None,
        "Equal": lambda x, y: int(x == y),
    }

    def one(x: int | str | None, y: int | str | None) -> int | None:
        if isinstance(x, int) and isinstance(y, int):
            return compute[op](x, y)
        if op != "Equal" or x is None or y is None:
            return None
        # a size that has a name is equal to itself and to no negative number
        return 1 if x == y else 0 if any(isinstance(size, int) and size < 0 for size in (x, y)) else None

    return [one(x, y) for x, y in zip(*_broadcast(a, b), strict=True)]


def _chosen(which: Sizes | None, a: Sizes | None, b: Sizes | None) -> Sizes | None:
    """Where: entries of a or b, as far as the choice is known."""
    if which is None or a is None or b is None or len({len(which), len(a), len(b)} - {1}) > 1:
        return None
    choices = zip(*_broadcast(which, a, b), strict=True)
    return [{1: x, 0: y}.get(w) if isinstance(w, int) else None for w, x, y in choices]


def _broadcast(*lists: Sizes) -> list[Sizes]:
    """Lists of one entry as long as the others."""
    length = 0 if any(not each for each in lists) else max(map(len, lists))
    return [each * length if len(each) == 1 else each for each in lists]


def _named(tensor: gs.Tensor, batch_unknown: bool) -> Sizes | None:
    """Sizes of a tensor, unknown ones by name: equal names are equal sizes."""
    if tensor.shape is None:
        return None
    known: Sizes = []
    for axis, size in enumerate(tensor.shape):
        if isinstance(size, int | np.integer) and size >= 0:
            known.append(f"batch {size}" if batch_unknown and axis == 0 else int(size))
        else:
            known.append(size if isinstance(size, str) else f"{tensor.name}[{axis}]")
    return known


def _reshape(node: gs.Node, sizes: dict[str, Sizes], names: Names, batch_unknown: bool) -> str | None:
    """The target with 0 for sizes that stay where they are, and -1 for one that is unknown."""
    constant = value(node, 1)
    before: Sizes | None = sizes.get(node.inputs[1].name) if constant is None else [int(n) for n in constant]
    data = _named(node.inputs[0], batch_unknown) or []
    if not before or (node.attrs.get("allowzero", 0) and 0 in before):
        return None
    after: Sizes = list(before)
    for axis, size in enumerate(before[: len(data)]):
        if isinstance(size, str) and size == data[axis]:
            after[axis] = 0
    unknown = [axis for axis, size in enumerate(after) if not isinstance(size, int)]
    if len(unknown) == 1 and -1 not in after:
        after[unknown[0]] = -1
    if after[0] == -1 and data and (count := _product(data[1:])) and count == _product(after[1:]):
        after[0] = 0
    if after == before or not all(isinstance(size, int) for size in after):
        return None
    set_constant(node, 1, np.array(after, np.int64), names.fresh(f"{node.name}/shape"))
    node.attrs.pop("allowzero", None)
    return f"{describe(node)}: to {after}"


def _expand(node: gs.Node, sizes: dict[str, Sizes], names: Names, batch_unknown: bool) -> str | None:
    """The target with 1 for sizes that stay as they are."""
    target, data = sizes.get(node.inputs[1].name), _named(node.inputs[0], batch_unknown)
    if value(node, 1) is not None or not target or data is None:
        return None
    before: Sizes = [*[None] * (len(target) - len(data)), *data][-len(target) :]
    after = [1 if isinstance(size, str) and size == old else size for size, old in zip(target, before, strict=True)]
    if not all(isinstance(size, int) for size in after):
        return None
    set_constant(node, 1, np.array(after, np.int64), names.fresh(f"{node.name}/shape"))
    return f"{describe(node)}: to {after}"


def _product(sizes: Sizes) -> int | None:
    """Of sizes that are all known."""
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(sizes) else None


def _resize(node: gs.Node, sizes: dict[str, Sizes], names: Names, batch_unknown: bool) -> str | None:
    """Resize to [?, C, H, W] -> Resize of axes 1, 2, 3 to [C, H, W]: a batch is never resized."""
    known = sizes.get(node.inputs[3].name) if given(node, 3) else None
    if known is None or "axes" in node.attrs or isinstance(known[0], int):
        return None
    if not all(isinstance(size, int) for size in known[1:]):
        return None
    node.attrs["axes"] = list(range(1, len(known)))
    if (roi := value(node, 1)) is not None and roi.size:
        set_constant(node, 1, roi.reshape(2, -1)[:, 1:].ravel(), names.fresh(f"{node.name}/roi"))
    set_constant(node, 3, np.array(known[1:], np.int64), names.fresh(f"{node.name}/sizes"))
    return f"{describe(node)}: to {known[1:]}, the batch left alone"


_TO_SIZES = {"Reshape": _reshape, "Resize": _resize, "Expand": _expand}


# ---------------------------------------------------------------------------------------------------- what does nothing


def _drop(graph: gs.Graph, pins: set[str], report: PassReport) -> None:
    """Take out nodes that hand on what they read."""
    ends = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    dropped: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain or not node.inputs or node.op not in NOTHING:
            continue
        reason = NOTHING[node.op](node, pins)
        if reason is not None:
            if reason:
                report.declined.append(f"{describe(node)}: {reason}")
            continue
        x, y = node.inputs[0], node.outputs[0]
        if y.name not in pins:
            detach(node)
            replace_reads(y, x)
        else:
            source = producer(x)
            if source is None or x.name in pins or y.name not in ends or len(source.outputs) != 1:
                report.declined.append(f"{describe(node)}: stays between {x.name!r} and the output {y.name!r}")
                continue
            detach(node)
            replace_reads(x, y)
            set_output(source, y)
        dropped[node.op] = dropped.get(node.op, 0) + 1
    report.done += [f"{count} {op} dropped" for op, count in sorted(dropped.items())]


def _identity(node: gs.Node, pins: set[str]) -> str | None:
    return None


def _dropout(node: gs.Node, pins: set[str]) -> str | None:
    """y = x outside training."""
    if given(node, 2):
        training = value(node, 2)
        if training is None or bool(training.any()):
            return "is in training mode" if training is not None else "may be in training mode"
    if len(node.outputs) > 1 and (node.outputs[1].outputs or node.outputs[1].name in pins):
        return "its mask is read"
    return None


def _cast(node: gs.Node, pins: set[str]) -> str | None:
    """y = x where the type stays."""
    to = node.attrs.get("to")
    dtype = node.inputs[0].dtype
    if dtype is None or to is None:
        return ""
    same = (dtype if isinstance(dtype, int) else _number(dtype)) == (to if isinstance(to, int) else _number(to))
    return None if same else ""


def _number(dtype: np.dtype | type) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _concat(node: gs.Node, pins: set[str]) -> str | None:
    return None if len(node.inputs) == 1 else ""


def _pad(node: gs.Node, pins: set[str]) -> str | None:
    pads = value(node, 1)
    return None if pads is not None and not pads.any() else ""


def _transpose(node: gs.Node, pins: set[str]) -> str | None:
    perm = node.attrs.get("perm")
    return None if perm is not None and list(perm) == list(range(len(perm))) else ""


# Why a node stays ("" where that goes without saying); None if it does nothing.
NOTHING: dict[str, Callable[[gs.Node, set[str]], str | None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Concat": _concat,
    "Pad": _pad,
    "Transpose": _transpose,
}
