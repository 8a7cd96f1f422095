"""A graph as a protobuf of standard operators, of any size."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcrp.canonize.edit import quiet
from onnxcrp.canonize.lower import lower


def write(graph: gs.Graph, *, largest: int | None = None, claims: bool = True) -> onnx.ModelProto:
    """The lowered canonical graph as a model; arguments as for `export`."""
    return export(lower(graph), largest=largest, claims=claims)


def export(
    graph: gs.Graph, *, largest: int | None = None, claims: bool = True, ir_version: int = 10
) -> onnx.ModelProto:
    """A graph of standard operators as a model, which may hold more than 2 GB in memory.

    `largest`: constants of more elements become typed inputs, which leaves a skeleton for shape inference;
    `claims=False`: outputs are written without their shapes, so that what the file says cannot contradict inference.
    """
    tensors: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        tensors.update((tensor.name, tensor) for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty())
    tensors.update((tensor.name, tensor) for tensor in graph.outputs)
    constants = [tensor for tensor in tensors.values() if isinstance(tensor, gs.Constant)]
    heavy = [tensor for tensor in constants if largest is not None and tensor.values.size > largest]
    inputs = graph.inputs + heavy
    ends = {tensor.name for tensor in (*inputs, *graph.outputs)}
    hidden = [tensor for name, tensor in tensors.items() if name not in ends and isinstance(tensor, gs.Variable)]
    absent = {tensor.name for tensor in heavy}
    info = OnnxExporter.export_value_info_proto
    with quiet():
        light = onnx.helper.make_graph(
            [_node(node) for node in graph.nodes],
            graph.name or "graph",
            [info(tensor, False) for tensor in inputs],
            [info(tensor, False) for tensor in graph.outputs],
            doc_string=graph.doc_string or "",
            value_info=[info(tensor, False) for tensor in hidden if tensor.dtype is not None],
        )
    for output in light.output:
        if not claims and output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    imports = graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]
    model = onnx.helper.make_model(light, opset_imports=imports, ir_version=ir_version, producer_name="onnxcrp")
    model.functions.extend(OnnxExporter.export_function(function) for function in graph.functions)
    imported = {entry.domain for entry in model.opset_import}
    for entry in (entry for function in model.functions for entry in function.opset_import):
        if entry.domain not in imported:
            imported.add(entry.domain)
            model.opset_import.append(entry)
    for tensor in constants:  # in place: copying a protobuf serializes it, which 2 GB end
        if tensor.name not in absent:
            _fill(model.graph.initializer.add(), tensor)
    return model


def _node(node: gs.Node) -> onnx.NodeProto:
    """A node by the name its operator has in its domain, `my.domain::MyOp` being ours."""
    proto = OnnxExporter.export_node(node)
    proto.op_type = node.op.rpartition("::")[2]
    return proto


def _fill(proto: onnx.TensorProto, constant: gs.Constant) -> None:
    """Write a constant, its bytes as they are."""
    values = constant.values
    proto.name = constant.name
    proto.dims.extend(values.shape)
    if values.dtype == object:
        proto.data_type = onnx.TensorProto.STRING
        proto.string_data.extend(str(value).encode() for value in values.ravel())
    elif values.dtype.isbuiltin == 1 and values.dtype.isnative:
        proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        proto.raw_data = np.ascontiguousarray(values).tobytes()
    else:  # bfloat16, 4 bits: types that numpy does not have, or bytes that are packed
        proto.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), constant.name))
