"""bfloat16 -> float32, which holds every one of its numbers: runtimes have next to no kernels for it on CPUs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.report import PassReport

BFLOAT16 = onnx.TensorProto.BFLOAT16


def widen_bfloat16(graph: gs.Graph) -> PassReport:
    """All bfloat16 tensors, constants, inputs and outputs become float32; what was rounded between layers is not.

    So outputs agree with those of a runtime that computes in bfloat16 up to its 8 bits, and relevance is that of the
    numbers themselves.
    """
    report = PassReport("bfloat16")
    weights = 0
    for part in (graph, *graph.subgraphs(recursive=True)):
        tensors = [tensor for node in part.nodes for tensor in (*node.inputs, *node.outputs)]
        for tensor in (*tensors, *part.inputs, *part.outputs):
            if isinstance(tensor, gs.Constant):
                if _is_bfloat16(tensor.values.dtype):
                    tensor.values = tensor.values.astype(np.float32)
                    weights += 1
            elif _is_bfloat16(tensor.dtype):
                tensor.dtype = np.dtype(np.float32)
        for node in part.nodes:
            for name, value in node.attrs.items():
                if isinstance(value, gs.Constant) and _is_bfloat16(value.values.dtype):
                    value.values = value.values.astype(np.float32)
                elif name in ("to", "dtype", "output_dtype") and _is_bfloat16(value):
                    node.attrs[name] = onnx.TensorProto.FLOAT
                    report.done.append(f"{node.op} {node.name!r}: to float32")
    if weights:
        report.done.append(f"{weights} constants: float32")
    return report


def _is_bfloat16(kind: object) -> bool:
    return (isinstance(kind, int) and kind == BFLOAT16) or getattr(kind, "name", "") == "bfloat16"
