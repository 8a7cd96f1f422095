"""Tensors that stay in the runtime's blocked layout between convolutions, on the CPU.

onnxruntime computes convolutions on channels in blocks of 8 or 16 (NCHWc) and writes ReorderInput and ReorderOutput
around all it does not compute so itself: in a relevance model around every product of a message with a factor, a tenth
of the time. Products, quotients, sums and comparisons of tensors of one shape do not care in which order entries lie,
so here they take the blocked tensors, and the reorders between them go. Every number stays the same, bit for bit, but
for sums that convolutions take over (below).

What may be taken blocked: tensors [N, C, H, W] of known C, H, W, C a multiple of 16 (no block is padded), that agree in
C, H and W; N may be 1 in some of them. Numbers are broadcast as ever, tensors [1, 1, H, W] after they were expanded.
Channels are parted between blocks.

A message that is added to what a convolution finds, as at every skip, is where that convolution adds up its products:
the one place where the order of a sum changes, and with it the last bit. Both have the same N, or it stays.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from onnxcrp.canonize.shapes import Described, described
from onnxcrp.errors import ModelError
from onnxcrp.ops.geometry import CHANNEL_BLOCK, COPIES, pooled
from onnxcrp.profiling import BLOCKED, OURS
from onnxcrp.session import CPU, Provider, Session, skeleton
from onnxcrp.session import providers as best_first

NCHWC, CONTRIB = "com.microsoft.nchwc", "com.microsoft"
SMALL = 64  # entries of initializers that shapes may depend on
FLOAT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
UNARY = {"Abs", "Cast", "Clip", "Erf", "Exp", "Identity", "Neg", "Not", "Reciprocal", "Relu", "Sigmoid", "Sign", "Sqrt"}
COMPARISONS = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or"}
ELEMENTWISE = UNARY | COMPARISONS | {"Add", "Div", "Max", "Min", "Mul", "Sub", "Tanh", "Where"}
POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
BY_SAMPLE = POOLS | {"Conv", "ConvTranspose", "QuickGelu", "ReorderInput", "ReorderOutput", "Upsample"}  # N as it was


def start(
    model: onnx.ModelProto | str | os.PathLike[str],
    providers: Provider | Sequence[Provider] | None = None,
    *,
    optimize: bool | str = True,
    optimized: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Session:
    """A Session of a relevance model as fast as it can be: blocked where the CPU runs it, else as the runtime has it.

    Parameters are those of Session; where the graph cannot be written to a temporary folder, it runs as it is.
    """
    names = [name for name, _ in best_first(providers, allow_tf32=options.get("allow_tf32", False))]
    if isinstance(model, onnx.ModelProto) and optimize is True and names == [CPU] and (tensors := _blockable(model)):
        once = {name: value for name, value in options.items() if name != "profile"}
        with contextlib.suppress(OSError, ModelError), _file(optimized) as path:
            Session(model, providers, optimized=path, prepack=False, **once)
            graph = onnx.load(path, load_external_data=False)
            stay_blocked(graph, tensors, path.parent)
            path.write_bytes(graph.SerializeToString())
            return Session(path, providers, optimize=False, **options)
    return Session(model, providers, optimize=optimize, optimized=optimized, **options)


def _blockable(model: onnx.ModelProto) -> dict[str, Described]:
    """What is known of a model's tensors; nothing where no convolution fills its blocks."""
    convolved = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    tensors = known(model) if convolved else {}
    return tensors if any(name in tensors and _fills_blocks(tensors[name]) for name in convolved) else {}


def _fills_blocks(tensor: Described) -> bool:
    """float or bool [N, C, H, W] of known sizes, whose blocks are full."""
    if len(tensor.sizes) != 4:
        return False
    _, channels, *sizes = tensor.sizes
    full = channels is not None and channels % CHANNEL_BLOCK == 0
    return full and None not in sizes and tensor.kind in (FLOAT, BOOL)


@contextlib.contextmanager
def _file(path: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the optimised graph goes: as asked, or into a folder that is gone afterwards."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="onnxcrp-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "model.onnx"


def known(model: onnx.ModelProto) -> dict[str, Described]:
    """Name -> what shape inference finds of a tensor; weights count by their shapes alone.

    Nothing at all where it miscounts the windows of a pool with ceil_mode: what follows would be wrong as well.
    """
    slim = skeleton(model)
    del slim.graph.value_info[:]
    ports = {port.name for port in slim.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in ports:  # a default, which a caller may replace by something of another shape
            continue
        if np.prod(tensor.dims) <= SMALL:
            slim.graph.initializer.add().CopyFrom(tensor)
        else:
            port = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            slim.graph.input.append(port)
    try:
        slim = onnx.shape_inference.infer_shapes(slim, data_prop=True)
    except Exception:  # onnx raises several kinds: what is not known stays as it is
        return {}
    found = described((*slim.graph.value_info, *slim.graph.input, *slim.graph.output))
    return found if all(_counted(node, found) for node in slim.graph.node) else {}


def _counted(node: onnx.NodeProto, found: Mapping[str, Described]) -> bool:
    """Whether the inferred sizes of a pool are those of the runtime."""
    attrs = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    if not attrs.get("ceil_mode") or node.input[0] not in found or node.output[0] not in found:
        return True
    small, large = (found[name].sizes[2:] for name in (node.output[0], node.input[0]))
    view: Any = SimpleNamespace(attrs=attrs)
    return all(
        h is None or size is None or h == pooled(view, axis, size, k)
        for axis, (h, size, k) in enumerate(zip(small, large, attrs["kernel_shape"], strict=True))
    )


def stay_blocked(model: onnx.ModelProto, tensors: Mapping[str, Described], folder: Path = Path()) -> int:
    """Change an optimised graph in place so that elementwise nodes between convolutions stay blocked.

    `tensors`: those of the model before it was optimised; `folder`: where its external data lie. Returns how many nodes
    now take blocked ones.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute):
        return 0  # subgraphs read tensors unseen
    return _Rewriter(model.graph, tensors, folder).rewrite()


def _in_blocks(plane: np.ndarray, channels: int) -> np.ndarray:
    """[1, 1, H, W] the same for all channels, [1, C, H, W] as it lies in memory: [1, C / block, H, W, block]."""
    _, _, height, width = plane.shape
    blocks = plane.reshape(1, 1, height, width, 1).repeat(channels // _block(), 1).repeat(_block(), 4)
    return blocks.reshape(1, channels, height, width)


@functools.cache
def _block() -> int:
    """How many channels lie together in a blocked tensor on this machine: by so much a channel's second entry moves."""
    counted = np.arange(2 * CHANNEL_BLOCK, dtype=np.float32).reshape(1, CHANNEL_BLOCK, 1, 2)
    ports = [onnx.helper.make_tensor_value_info(name, FLOAT, counted.shape) for name in ("usual", "blocked")]
    node = onnx.helper.make_node("ReorderInput", ["usual"], ["blocked"], domain=NCHWC)
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(NCHWC, 1)]
    graph = onnx.helper.make_graph([node], "block", ports[:1], ports[1:])
    session = Session(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), CPU, optimize=False)
    return int(np.flatnonzero(session.run({"usual": counted})["blocked"].ravel() == 1)[0])


def _scales(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> list[float]:
    """By how much a Resize enlarges every axis; [] where only the run knows, and of other nodes."""
    given = len(node.input) == 3 and node.op_type == "Resize" and node.input[2] in constants
    if not given or any(attribute.name == "axes" for attribute in node.attribute):
        return []
    return onnx.numpy_helper.to_array(constants[node.input[2]]).tolist()


def _by_channels(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node puts channels together or takes some of them, one after another."""
    if node.op_type in ("Concat", "Split"):
        return any(attribute.name == "axis" and attribute.i in (1, -3) for attribute in node.attribute)
    if node.op_type != "Slice" or len(node.input) < 4 or not all(name in constants for name in node.input[1:]):
        return False
    axes, *steps = (onnx.numpy_helper.to_array(constants[name]).tolist() for name in node.input[3:])
    return axes in ([1], [-3]) and steps in ([], [[1]])


def _batches(
    graph: onnx.GraphProto, tensors: Mapping[str, Described], constants: Mapping[str, onnx.TensorProto]
) -> dict[str, frozenset[str]]:
    """Name of a tensor [N, C, H, W] -> the tensors that, broadcast together, have its N; none where N is 1.

    Tensors of the same ones have the same N. Inputs that call their first size the same count as the first of them,
    and what is not known to follow from others follows from itself.
    """
    found = {
        name: frozenset([name] if tensor.dims[0] != 1 else [])
        for name, tensor in constants.items()
        if len(tensor.dims) == 4
    }
    first: dict[str, str] = {}
    for port in graph.input:
        sizes = port.type.tensor_type.shape.dim
        if len(sizes) == 4:
            name = first.setdefault(sizes[0].dim_param, port.name) if sizes[0].dim_param else port.name
            found[port.name] = frozenset([name] if sizes[0].dim_value != 1 else [])
    for node in graph.node:
        read: list[str] | None = None  # whose N is known to make the node's
        if node.op_type in BY_SAMPLE or _scales(node, constants)[:1] == [1] or _by_channels(node, constants):
            read = [node.input[0], *(node.input[3:] if node.op_type == "Conv" else [])]
        elif node.op_type in ELEMENTWISE:
            read = [name for name in node.input if name and not (name in constants and _is_one(constants[name]))]
        known = node.domain in ("", NCHWC, CONTRIB) and read is not None and all(name in found for name in read)
        for name in filter(None, node.output):
            if known and read is not None:
                found[name] = frozenset().union(*(found[each] for each in read))
            elif node.domain == NCHWC or (name in tensors and len(tensors[name].sizes) == 4):
                found[name] = frozenset([name])
    return found


def _is_one(tensor: onnx.TensorProto) -> bool:
    """One number that changes no shape of four axes."""
    return np.prod(tensor.dims) == 1 and len(tensor.dims) <= 4


class _Rewriter:
    """One pass over the nodes in order. A tensor may exist blocked, in the usual layout, or both."""

    def __init__(self, graph: onnx.GraphProto, tensors: Mapping[str, Described], folder: Path) -> None:
        self.graph, self.tensors, self.folder = graph, tensors, folder
        fed = {port.name for port in graph.input}
        self.stored = {t.name: t for t in graph.initializer if t.name not in fed}
        self.constants = {name: tensor for name, tensor in self.stored.items() if np.prod(tensor.dims) <= SMALL}
        self.outputs = {port.name for port in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.taken = fed | {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            self.taken.update(node.output)
            for name in node.input:
                self.readers[name].append(node)
        self.blocked: dict[str, str] = {}  # tensor -> its blocked form
        self.only_blocked: set[str] = set()  # tensors of which the usual form is not written yet
        self.expanded: dict[tuple[str, int], str] = {}  # (tensor [1, 1, H, W], C) -> [1, C, H, W]
        self.stands_for: dict[str, str] = {}  # output of a ReorderInput that went -> the blocked tensor that was there
        self.batches = _batches(graph, tensors, self.stored)
        self.shapes: dict[str, list[str | int | None]] = {}  # of what a sum overwrites and of the sum
        self.symbols: dict[frozenset[str], str] = {}  # of N, for each set in `batches`
        self.nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> int:
        count = 0
        for node in list(self.graph.node):
            if self._is_reorder(node, "ReorderOutput") and self._fits(node.output[0]):
                self._now_blocked(node.output[0], node.input[0])
                continue
            if self._is_reorder(node, "ReorderInput") and self._fits(node.input[0]):
                source, target = node.input[0], node.output[0]
                if source in self.blocked:
                    self.stands_for[target] = self.blocked[source]
                    continue
                self.blocked[source] = target
            for at, name in enumerate(node.input):
                node.input[at] = self.stands_for.get(name, name)
            if self._elementwise(node) or self._copied(node) or self._parted(node):
                count += 1
                continue
            for name in node.input:
                self._usual(name)
            self.nodes.append(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.value_info.extend(onnx.helper.make_tensor_value_info(n, FLOAT, s) for n, s in self.shapes.items())
        return count

    @staticmethod
    def _is_reorder(node: onnx.NodeProto, which: str) -> bool:
        last = any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute)
        return node.domain == NCHWC and node.op_type == which and not last

    def _fits(self, name: str) -> bool:
        return name in self.tensors and _fills_blocks(self.tensors[name])

    def _kind(self, name: str) -> int:
        return self.tensors[name].kind

    def _is_number(self, name: str) -> bool:
        return not name or (name in self.constants and _is_one(self.constants[name]))

    def _elementwise(self, node: onnx.NodeProto) -> bool:
        """Write the node on blocked tensors, if it can be and pays."""
        if node.domain or node.op_type not in ELEMENTWISE or len(node.output) != 1 or not self._fits(node.output[0]):
            return False
        target = node.output[0]
        sizes = self.tensors[target].sizes[1:]
        tensors = [name for name in node.input if not self._is_number(name)]
        there = [name for name in tensors if name in self.blocked]
        if not there or not all(self._agrees(name, sizes) or self._is_plane(name, sizes) for name in tensors):
            return False
        if len(there) < len(tensors) and not any(map(self._takes_blocked, self.readers[target])):
            return False  # reorders would only move
        if self._added_up(node, sizes):
            return True
        for at, name in enumerate(node.input):
            if not self._is_number(name):
                node.input[at] = self._as_blocked(name, sizes)
        node.output[0] = self._free(f"{target}/blocked")
        self.nodes.append(node)
        self._now_blocked(target, node.output[0])
        return True

    def _added_up(self, node: onnx.NodeProto, sizes: Sequence[int | None]) -> bool:
        """Write the sum of a convolution that nothing else reads and a tensor of its shape as that convolution.

        The convolution comes last then, after the tensor, which nothing may read later: it is overwritten, as both are
        declared to be of one shape.
        """
        if node.op_type != "Add" or not all(self._agrees(name, sizes) for name in node.input):
            return False
        batch, other = (self.batches.get(name) for name in node.input)
        if batch is None or batch != other:
            return False
        for name, message in (node.input, node.input[::-1]):
            convolution = self._convolution(name)
            if convolution is None or self.readers[message][-1] is not node:
                continue
            added, summed = self._as_blocked(message, sizes), convolution.output[0]
            convolution.input.extend([""] * (3 - len(convolution.input)) + [added])
            n = self.symbols.setdefault(batch, f"{OURS}N{len(self.symbols)}") if batch else 1
            self.shapes[added] = self.shapes[summed] = [n, *sizes]
            self.nodes.remove(convolution)
            self.nodes.append(convolution)
            self.only_blocked.remove(name)
            self._now_blocked(node.output[0], summed)
            return True
        return False

    def _convolution(self, name: str) -> onnx.NodeProto | None:
        """The blocked convolution that makes a tensor for one reader alone, if it adds nothing to it yet."""
        if name not in self.only_blocked or len(self.readers[name]) > 1:
            return None
        form = self.blocked[name]
        maker = next(node for node in reversed(self.nodes) if form in node.output)
        activated = any(attribute.name == "activation" for attribute in maker.attribute)
        free = (maker.domain, maker.op_type) == (NCHWC, "Conv") and len(maker.input) < 4 and not activated
        return maker if free and len(self.readers[form]) < 2 else None

    def _parted(self, node: onnx.NodeProto) -> bool:
        """Write a Split or Slice between blocks of channels on blocked tensors."""
        if node.domain or node.op_type not in ("Split", "Slice") or not _by_channels(node, self.constants):
            return False
        source, targets = node.input[0], list(node.output)
        first = onnx.numpy_helper.to_array(self.constants[node.input[1]]).item() if node.op_type == "Slice" else 0
        if source not in self.only_blocked or not all(map(self._fits, targets)) or first % CHANNEL_BLOCK:
            return False
        if not any(self._takes_blocked(reader) for name in targets for reader in self.readers[name]):
            return False
        node.input[0] = self.blocked[source]
        self.nodes.append(node)
        for at, target in enumerate(targets):
            node.output[at] = self._free(f"{target}/blocked")
            self._now_blocked(target, node.output[at])
        return True

    def _copied(self, node: onnx.NodeProto) -> bool:
        """Write a Resize that copies every entry over a window on blocked tensors: the runtime's Upsample."""
        scales = _scales(node, self.constants)
        if len(scales) != 4 or node.domain:
            return False
        source, target = node.input[0], node.output[0]
        given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        copies = all(given.get(name) == value.encode() for name, value in COPIES.items())
        whole = scales[:2] == [1, 1] and all(scale.is_integer() for scale in scales)
        if not copies or not whole or source not in self.only_blocked or not self._fits(target):
            return False
        how = {"mode": COPIES["mode"], "scales": [int(scale) for scale in scales]}
        how["coordinate_transformation_mode"] = COPIES["coordinate_transformation_mode"]
        form = self._free(f"{target}/blocked")
        self._append("Upsample", [self.blocked[source]], form, f"{node.name}{BLOCKED}", domain=NCHWC, **how)
        self._now_blocked(target, form)
        return True

    def _agrees(self, name: str, sizes: Sequence[int | None]) -> bool:
        return self._fits(name) and self.tensors[name].sizes[1:] == sizes

    def _is_plane(self, name: str, sizes: Sequence[int | None]) -> bool:
        """float [1, 1, H, W] beside [N, C, H, W]."""
        return name in self.tensors and self.tensors[name] == Described([1, 1, *sizes[1:]], FLOAT)

    @staticmethod
    def _takes_blocked(node: onnx.NodeProto) -> bool:
        return node.op_type == "ReorderInput" or (not node.domain and node.op_type in ELEMENTWISE)

    def _as_blocked(self, name: str, sizes: Sequence[int | None]) -> str:
        """The blocked form of a tensor, written where it is needed first."""
        if not self._agrees(name, sizes):
            return self._plane(name, sizes)
        if name not in self.blocked:
            self.blocked[name] = self._free(f"{name}/blocked")
            self._reorder("ReorderInput", name, self.blocked[name], self._kind(name))
        return self.blocked[name]

    def _plane(self, name: str, sizes: Sequence[int | None]) -> str:
        """[1, 1, H, W] -> [1, C, H, W] blocked, once; of a constant while the session starts."""
        key = (name, int(sizes[0]))  # type: ignore[arg-type]
        if key in self.expanded:
            return self.expanded[key]
        if name in self.stored:
            self.expanded[key] = self._free(f"{name}/blocked")
            plane = onnx.numpy_helper.to_array(self.stored[name], str(self.folder))
            self.graph.initializer.append(onnx.numpy_helper.from_array(_in_blocks(plane, key[1]), self.expanded[key]))
            return self.expanded[key]
        shape, whole = self._free(f"{name}/shape"), self._free(f"{name}/expanded")
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, *sizes], np.int64), shape))
        self._append("Expand", [name, shape], whole)
        self.expanded[key] = self._free(f"{name}/blocked")
        self._reorder("ReorderInput", whole, self.expanded[key], FLOAT)
        return self.expanded[key]

    def _now_blocked(self, name: str, form: str) -> None:
        self.blocked[name] = form
        self.only_blocked.add(name)
        if name in self.outputs:
            self._usual(name)

    def _usual(self, name: str) -> None:
        """Write the usual form of a tensor that is only there blocked."""
        if name in self.only_blocked:
            self.only_blocked.remove(name)
            channels = self.tensors[name].sizes[1]
            self._reorder("ReorderOutput", self.blocked[name], name, self._kind(name), channels=channels)

    def _reorder(self, op: str, source: str, target: str, kind: int, **attributes: Any) -> None:
        """The runtime reorders floats alone: what is true or false goes there and back."""
        if kind == FLOAT:
            self._append(op, [source], target, domain=NCHWC, **attributes)
            return
        numbers, reordered = self._free(f"{target}/numbers"), self._free(f"{target}/reordered")
        self._append("Cast", [source], numbers, to=FLOAT)
        self._append(op, [numbers], reordered, domain=NCHWC, **attributes)
        self._append("Cast", [reordered], target, to=kind)

    def _free(self, name: str) -> str:
        """A name that no tensor has."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _append(self, op: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> None:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=name or f"{OURS}{output}", **attributes))
