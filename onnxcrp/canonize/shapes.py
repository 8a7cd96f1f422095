"""Types and shapes of all tensors by onnx's inference, without a single large weight passing through a protobuf."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs

from onnxcrp.canonize.load import BIG, call
from onnxcrp.canonize.write import write

INVENTED = re.compile(r"^unk__\d+$")  # symbols that inference makes up; None says as much


class Described(NamedTuple):
    """What is known of a tensor without running it: sizes, None where only the run knows, and element type."""

    sizes: list[int | None]
    kind: int


def described(ports: Iterable[onnx.ValueInfoProto]) -> dict[str, Described]:
    """Name -> what ports say of themselves, for those whose rank they tell."""
    return {
        port.name: Described(
            [d.dim_value if d.HasField("dim_value") else None for d in port.type.tensor_type.shape.dim],
            port.type.tensor_type.elem_type,
        )
        for port in ports
        if port.type.tensor_type.HasField("shape")
    }


def infer_shapes(graph: gs.Graph, *, forget: bool = False) -> None:
    """Fill in the type and shape of every tensor, symbolic sizes kept; `forget` drops what was known of hidden tensors.

    What inference finds wins over what the file claims, and what it cannot find stays as the file says.
    """
    inner = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs if not tensor.is_empty()}
    if forget:
        ends = {tensor.name for tensor in graph.outputs}
        for name, tensor in inner.items():
            if name not in ends and isinstance(tensor, gs.Variable):
                tensor.shape = None
    skeleton = write(graph, largest=BIG, claims=False)
    inferred = call(_infer, skeleton, what="the shapes of the model cannot be inferred")
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = inner.get(info.name)
        if not isinstance(tensor, gs.Variable) or not info.type.HasField("tensor_type"):
            continue
        kind = info.type.tensor_type
        if kind.elem_type:
            tensor.dtype = _dtype(kind.elem_type)
        if kind.HasField("shape"):
            tensor.shape = _merge([_size(size) for size in kind.shape.dim], tensor.shape)


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inference that follows computed shapes, too (Shape, Gather, Concat, Reshape), unless onnx fails at these."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # onnx raises several kinds
        return onnx.shape_inference.infer_shapes(model)


def _dtype(kind: int) -> np.dtype | int:
    """numpy's name of a type; onnx's where numpy has none."""
    if kind == onnx.TensorProto.BFLOAT16 or kind > onnx.TensorProto.BFLOAT16:
        return kind
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


def _size(size: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if size.HasField("dim_value"):
        return int(size.dim_value)
    return size.dim_param if size.dim_param and not INVENTED.match(size.dim_param) else None


def _merge(found: list, known: list | None) -> list:
    """A size that inference found, else the one known before."""
    if known is None or len(known) != len(found):
        return found
    return [old if new is None else new for new, old in zip(found, known, strict=True)]
