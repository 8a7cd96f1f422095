"""A canonical graph as a protobuf of standard operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcrp.canonize.edit import quiet
from onnxcrp.canonize.lower import lower


def write(graph: gs.Graph, *, largest: int | None = None, claims: bool = True) -> onnx.ModelProto:
    """The lowered graph as a model, IR version 10.

    `largest`: constants of more elements become typed inputs, which leaves a skeleton for shape inference;
    `claims=False`: outputs are written without their shapes, so that what the file says cannot contradict inference.
    """
    lowered = lower(graph)
    tensors: dict[str, gs.Tensor] = {}
    for node in lowered.nodes:
        tensors.update((tensor.name, tensor) for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty())
    tensors.update((tensor.name, tensor) for tensor in lowered.outputs)
    constants = [tensor for tensor in tensors.values() if isinstance(tensor, gs.Constant)]
    heavy = [tensor for tensor in constants if largest is not None and tensor.values.size > largest]
    inputs = lowered.inputs + heavy
    ends = {tensor.name for tensor in (*inputs, *lowered.outputs)}
    hidden = [tensor for name, tensor in tensors.items() if name not in ends and isinstance(tensor, gs.Variable)]
    absent = {tensor.name for tensor in heavy}
    info = OnnxExporter.export_value_info_proto
    with quiet():
        proto = onnx.helper.make_graph(
            [OnnxExporter.export_node(node) for node in lowered.nodes],
            graph.name or "graph",
            [info(tensor, False) for tensor in inputs],
            [info(tensor, False) for tensor in lowered.outputs],
            [_tensor(tensor) for tensor in constants if tensor.name not in absent],
            doc_string=graph.doc_string or "",
            value_info=[info(tensor, False) for tensor in hidden if tensor.dtype is not None],
        )
    for output in proto.output:
        if not claims and output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return onnx.helper.make_model(proto, opset_imports=lowered.import_domains, ir_version=10, producer_name="onnxcrp")


def _tensor(constant: gs.Constant) -> onnx.TensorProto:
    """A constant with its bytes as they are."""
    values = constant.values
    if values.dtype == object:
        return onnx.helper.make_tensor(
            constant.name, onnx.TensorProto.STRING, values.shape, [str(v).encode() for v in values.ravel()]
        )
    return onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), constant.name)
