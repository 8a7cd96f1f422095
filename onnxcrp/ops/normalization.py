"""Local response normalization."""

from __future__ import annotations

import numpy as np

from onnxcrp.graph import Graph, Value
from onnxcrp.ops.registry import KEEPS, Node, transpose


class LocalResponse:
    """y = x D^-c with D = k + b S and S the windowed sum of x^2 over channels (a 1x1 Conv with a band matrix M)."""

    def __init__(self, op: Graph, node: Node) -> None:
        size = int(node.attrs["size"])
        self.op, self.node = op, node
        self.b = float(node.attrs.get("alpha", 1e-4)) / size
        self.c = float(node.attrs.get("beta", 0.75))
        self.k = float(node.attrs.get("bias", 1.0))
        channels = node.dims(0)[1]
        if channels is None:
            raise ValueError(f"{node!r}: the number of channels is not known")
        own, other = np.indices((channels, channels))
        band = (other >= own - (size - 1) // 2) & (other <= own + size // 2)
        self.band = band.astype(op.dtype).reshape(channels, channels, *[1] * (node.rank(0) - 2))
        self.x = node.input(0)

    def M(self, v: Value) -> Value:
        """Windowed sum over channels, [N, C, ...] -> [N, C, ...]."""
        return self.op.Conv(v, self.op.constant(self.band))

    def MT(self, v: Value) -> Value:
        """Its transpose."""
        return self.op.Conv(v, self.op.constant(np.ascontiguousarray(self.band.swapaxes(0, 1))))

    def power(self, D: Value, exponent: float) -> Value:
        """D^exponent."""
        return self.op.Pow(D, exponent)


@transpose("LRN", family="lrn", sign=KEEPS)
def lrn(op: Graph, node: Node, s: Value) -> Value:
    """s D^-c - 2 b c x M^T(s x D^-(c+1))."""
    n = LocalResponse(op, node)
    D = n.M(n.x * n.x) * n.b + n.k
    return s * n.power(D, -n.c) - n.x * n.MT(s * (n.x * n.power(D, -n.c - 1))) * (2 * n.b * n.c)
