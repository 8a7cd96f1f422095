"""Tensors that stay in the runtime's blocked layout between convolutions, on the CPU.

onnxruntime computes convolutions on channels in blocks of 8 or 16 (NCHWc) and writes ReorderInput and ReorderOutput
around all it does not compute so itself: in a relevance model around every product of a message with a factor, a tenth
of the time. Products, quotients, sums and comparisons of tensors of one shape do not care in which order entries lie,
so here they take the blocked tensors, and the reorders between them go. Every number stays the same, bit for bit.

What may be taken blocked: tensors [N, C, H, W] of known C, H, W, C a multiple of 16 (no block is padded), that agree in
C, H and W; N may be 1 in some of them. Numbers are broadcast as ever, tensors [1, 1, H, W] after they were expanded.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcrp.errors import ModelError
from onnxcrp.profiling import BLOCKED
from onnxcrp.session import CPU, Provider, Session, skeleton
from onnxcrp.session import providers as best_first

NCHWC = "com.microsoft.nchwc"
WIDEST = 16  # channels of a block, at most
SMALL = 64  # entries of initializers that shapes may depend on
UNARY = {
    "Abs",
    "Cast",
    "Clip",
    "Erf",
    "Exp",
    "Identity",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sign",
    "Sqrt",
    "Tanh",
}
COMPARISONS = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Or"}
ELEMENTWISE = UNARY | COMPARISONS | {"Add", "Div", "Max", "Min", "Mul", "Sub", "Where"}

COPIES = {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}  # of a Resize

Shapes = Mapping[str, Sequence[int | None]]


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
    if isinstance(model, onnx.ModelProto) and optimize is True and names == [CPU] and _convolves(model):
        once = {name: value for name, value in options.items() if name != "profile"}
        with contextlib.suppress(OSError, ModelError), _file(optimized) as path:
            Session(model, providers, optimized=path, prepack=False, **once)
            graph = onnx.load(path, load_external_data=False)
            stay_blocked(graph, shapes(model))
            path.write_bytes(graph.SerializeToString())
            return Session(path, providers, optimize=False, **options)
    return Session(model, providers, optimize=optimize, optimized=optimized, **options)


def _convolves(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "Conv" for node in model.graph.node)


@contextlib.contextmanager
def _file(path: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the optimised graph goes: as asked, or into a folder that is gone afterwards."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="onnxcrp-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "model.onnx"


def shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Name -> sizes, None where unknown, of all that shape inference finds; weights count by their shapes alone."""
    slim = skeleton(model)
    ports = {port.name for port in slim.graph.input}
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            slim.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in ports:
            port = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            slim.graph.input.append(port)
    try:
        slim = onnx.shape_inference.infer_shapes(slim, data_prop=True)
    except Exception:  # onnx raises several kinds: what is not known stays as it is
        return {}
    return {
        port.name: [d.dim_value if d.HasField("dim_value") else None for d in port.type.tensor_type.shape.dim]
        for port in (*slim.graph.value_info, *slim.graph.input, *slim.graph.output)
        if port.type.tensor_type.HasField("shape")
    }


def stay_blocked(model: onnx.ModelProto, shapes: Shapes) -> int:
    """Change an optimised graph in place so that elementwise nodes between convolutions stay blocked.

    `shapes` are those of the model before it was optimised. Returns how many nodes now take blocked tensors.
    """
    if any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute):
        return 0  # subgraphs read tensors unseen
    return _Rewriter(model.graph, shapes).rewrite()


class _Rewriter:
    """One pass over the nodes in order. A tensor may exist blocked, in the usual layout, or both."""

    def __init__(self, graph: onnx.GraphProto, shapes: Shapes) -> None:
        self.graph, self.shapes = graph, shapes
        self.numbers = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) == 1}
        self.outputs = {port.name for port in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.blocked: dict[str, str] = {}  # tensor -> its blocked form
        self.only_blocked: set[str] = set()  # tensors of which the usual form is not written yet
        self.same: dict[str, str] = {}  # output of a ReorderInput that goes -> what stands for it
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
                    self.same[target] = self.blocked[source]
                    continue
                self.blocked[source] = target
            for at, name in enumerate(node.input):
                node.input[at] = self.same.get(name, name)
            if self._elementwise(node) or self._copied(node):
                count += 1
                continue
            for name in node.input:
                self._usual(name)
            self.nodes.append(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        return count

    @staticmethod
    def _is_reorder(node: onnx.NodeProto, which: str) -> bool:
        last = any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute)
        return node.domain == NCHWC and node.op_type == which and not last

    def _fits(self, name: str) -> bool:
        """[N, C, H, W] of known sizes, whose blocks are full."""
        sizes = self.shapes.get(name, ())
        return len(sizes) == 4 and None not in sizes[1:] and sizes[1] % WIDEST == 0  # type: ignore[operator]

    def _is_number(self, name: str) -> bool:
        return not name or name in self.numbers or self.shapes.get(name) == []

    def _elementwise(self, node: onnx.NodeProto) -> bool:
        """Write the node on blocked tensors, if it can be and pays."""
        if node.domain or node.op_type not in ELEMENTWISE or len(node.output) != 1 or not self._fits(node.output[0]):
            return False
        target = node.output[0]
        sizes = list(self.shapes[target])[1:]
        tensors = [name for name in node.input if not self._is_number(name)]
        there = [name for name in tensors if name in self.blocked]
        if not there or not all(self._agrees(name, sizes) or self._is_plane(name, sizes) for name in tensors):
            return False
        if len(there) < len(tensors) and not any(map(self._takes_blocked, self.readers[target])):
            return False  # reorders would only move
        for at, name in enumerate(node.input):
            if not self._is_number(name):
                node.input[at] = self._as_blocked(name, sizes)
        node.output[0] = f"{target}/blocked"
        self.nodes.append(node)
        self._now_blocked(target, node.output[0])
        return True

    def _copied(self, node: onnx.NodeProto) -> bool:
        """Write a Resize that copies every entry over a window on blocked tensors: the runtime's Upsample."""
        if node.op_type != "Resize" or node.domain or len(node.input) != 3 or not self._fits(node.output[0]):
            return False
        source, target = node.input[0], node.output[0]
        how = {attribute.name: attribute.s for attribute in node.attribute if attribute.s}
        if source not in self.only_blocked or not how.items() >= COPIES.items():
            return False
        scales = [
            large // small if small and large and large % small == 0 else 0
            for small, large in zip(self.shapes[source][2:], self.shapes[target][2:], strict=True)
        ]
        if not all(scales) or self.shapes[source][1] != self.shapes[target][1]:
            return False
        form, how = f"{target}/blocked", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
        name = f"{node.name}{BLOCKED}"
        self._append("Upsample", [self.blocked[source]], form, name, domain=NCHWC, scales=[1, 1, *scales], **how)
        self._now_blocked(target, form)
        return True

    def _agrees(self, name: str, sizes: Sequence[int | None]) -> bool:
        return self._fits(name) and list(self.shapes[name])[1:] == sizes

    def _is_plane(self, name: str, sizes: Sequence[int | None]) -> bool:
        """[1, 1, H, W] beside [N, C, H, W]."""
        return list(self.shapes.get(name, ())) == [1, 1, *sizes[1:]]

    @staticmethod
    def _takes_blocked(node: onnx.NodeProto) -> bool:
        return node.op_type == "ReorderInput" or (not node.domain and node.op_type in ELEMENTWISE)

    def _as_blocked(self, name: str, sizes: Sequence[int | None]) -> str:
        """The blocked form of a tensor, written where it is needed first."""
        if not self._agrees(name, sizes):
            name = self._expanded(name, sizes)
        if name not in self.blocked:
            self.blocked[name] = f"{name}/blocked"
            self._append("ReorderInput", [name], self.blocked[name], domain=NCHWC)
        return self.blocked[name]

    def _expanded(self, plane: str, sizes: Sequence[int | None]) -> str:
        """[1, 1, H, W] -> [1, C, H, W], once."""
        name = f"{plane}/{sizes[0]}"
        if name not in self.blocked:
            shape = f"{name}/shape"
            self.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, *sizes], np.int64), shape))
            self._append("Expand", [plane, shape], name)
        return name

    def _now_blocked(self, name: str, form: str) -> None:
        self.blocked[name] = form
        self.only_blocked.add(name)
        if name in self.outputs:
            self._usual(name)

    def _usual(self, name: str) -> None:
        """Write the usual form of a tensor that is only there blocked."""
        if name in self.only_blocked:
            self.only_blocked.remove(name)
            self._append("ReorderOutput", [self.blocked[name]], name, domain=NCHWC, channels=self.shapes[name][1])

    def _append(self, op: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> None:
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=name or f"{output}/{op}", **attributes))
