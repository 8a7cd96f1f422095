"""Numbers added to what a convolution or a dense layer puts out go into its bias, which spares a pass over the tensor.

    (W a + b) + e = W a + (b + e)        max(z, 0) + e = max(z + e, e)        min(z, 0) + e = min(z + e, e)

So a stabilizer added to a sum that is never negative costs nothing, and behind a ReLU it is one end of a Clip, which
runtimes compute within the convolution as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.graph import Graph

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


def into_biases(
    op: Graph, nodes: Sequence[gs.Node], *, written: Iterable[gs.Node], outputs: Iterable[str]
) -> list[gs.Node]:
    """`nodes` without those that add a number which a bias can add: of those `written` by us, read by nobody else.

    Changes the nodes that add it now. `outputs`: names of the tensors that the graph puts out. Subgraphs are those of
    the forward pass, which read nothing of what we wrote.
    """
    folding = _Folding(op, nodes, written, outputs)
    left = []
    for node in nodes:
        if not folding.folds(node):
            left.append(node)
    return left


class _Folding:
    def __init__(self, op: Graph, nodes: Sequence[gs.Node], written: Iterable[gs.Node], outputs: Iterable[str]) -> None:
        self.op, self.outputs = op, set(outputs)
        self.makers = {node.outputs[0].name: node for node in written if len(node.outputs) == 1}
        self.readers: dict[str, list[gs.Node]] = defaultdict(list)
        for node in nodes:
            for tensor in node.inputs:
                self.readers[tensor.name].append(node)

    def folds(self, node: gs.Node) -> bool:
        """Whether a node added a number and a bias does so now: it can go."""
        target = node.outputs[0]
        if node.op not in ("Add", "Sub") or target.name not in self.makers or target.name in self.outputs:
            return False
        for tensor, number in (node.inputs, node.inputs[::-1]) if node.op == "Add" else (node.inputs,):
            if _is_number(number) and self._add(tensor, number.values if node.op == "Add" else -number.values):
                self.readers[tensor.name] = self.readers[target.name]
                for reader in self.readers[target.name]:
                    reader.inputs = [tensor if each.name == target.name else each for each in reader.inputs]
                return True
        return False

    def _add(self, tensor: gs.Tensor, number: np.ndarray) -> bool:
        """Add a number to a tensor where it is made, if that is possible and nobody else reads it."""
        maker = self.makers.get(tensor.name)
        if maker is None or len(self.readers[tensor.name]) > 1 or tensor.name in self.outputs:
            return False
        if maker.op == "Add":
            return any(self._add(part, number) for part in maker.inputs)
        if maker.op == "Relu" or (maker.op == "Min" and _is_number(maker.inputs[1]) and maker.inputs[1].values == 0):
            if not self._add(maker.inputs[0], number):  # first, since it changes nothing where it cannot
                return False
            end = self.op.constant(number).tensor
            maker.inputs = [maker.inputs[0], *([end] if maker.op == "Relu" else [gs.Variable.empty(), end])]
            maker.op = "Clip"
            return True
        return maker.op in _WEIGHTED and self._add_to_bias(maker, number)

    def _add_to_bias(self, node: gs.Node, number: np.ndarray) -> bool:
        weights = self.op.value(node.inputs[1]).array
        if weights is None or (node.op == "Gemm" and node.attrs != {"transB": 1}):
            return False
        size = weights.shape[1] * node.attrs.get("group", 1) if node.op == "ConvTranspose" else weights.shape[0]
        bias = self.op.value(node.inputs[2]).array if len(node.inputs) > 2 else np.zeros(size, number.dtype)
        if bias is None or bias.shape != (size,):
            return False
        node.inputs = [*node.inputs[:2], self.op.constant(bias + number).tensor]
        return True


def _is_number(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not tensor.values.shape
