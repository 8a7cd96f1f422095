"""Where the logits are: the head stays in the model, only the seed starts before it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import producer

SQUASH = {"Softmax", "LogSoftmax", "Sigmoid"}
REARRANGE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"}
HANDS_ON = REARRANGE | {"QuantizeLinear", "DequantizeLinear", "Cast"}


def find_head(graph: gs.Graph, output_name: str) -> tuple[str, list[gs.Node]]:
    """The tensor to be explained for an output of the model, and the nodes between the two in execution order.

    It is what the last Softmax, LogSoftmax or Sigmoid reads, looking from the output through QuantizeLinear, Cast,
    Reshape and the like. Without one it is the output itself, or where that holds integers, the last floating-point
    tensor before it.
    """
    start = next(tensor for tensor in graph.outputs if tensor.name == output_name)
    skipped: list[gs.Node] = []
    tensor = start
    while (node := producer(tensor)) is not None and not node.domain and node.op in SQUASH | HANDS_ON:
        skipped.append(node)
        tensor = node.inputs[0]
        if node.op in SQUASH:
            return (tensor.name, skipped[::-1]) if isinstance(tensor, gs.Variable) else (output_name, [])
    skipped, tensor = [], start
    while not _is_float(tensor) and (node := producer(tensor)) is not None and node.op in HANDS_ON:
        skipped.append(node)
        tensor = node.inputs[0]
    return (tensor.name, skipped[::-1]) if _is_float(tensor) else (output_name, [])


def _is_float(tensor: gs.Tensor) -> bool:
    """Unknown types count as floating-point."""
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return True
    return np.dtype(tensor.dtype).kind == "f"
