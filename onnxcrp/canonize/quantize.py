"""Quantized models: what DequantizeLinear means, and what stays of Q/DQ pairs.

x = (q - zero_point) scale, scale and zero point scalars or along one axis. A weight (or an int32 bias) that is
dequantized is a constant and folds to float. The Q/DQ pairs of activations are the model: rounding them away would
change its outputs, so they stay, and relevance passes through them unchanged.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.report import PassReport


def dequantize(q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, axis: int) -> np.ndarray:
    """(q - zero_point) scale: [any] -> the same shape, in the type of `scale`; both are [] or [size of axis]."""
    shape = [1] * q.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    wide = q.astype(np.float32 if q.dtype.itemsize < 4 else np.float64)
    if zero_point is not None:
        wide = wide - zero_point.astype(wide.dtype).reshape(shape if zero_point.size > 1 else [1] * q.ndim)
    x = wide.astype(np.float32) * scale.astype(np.float32).reshape(shape if scale.size > 1 else [1] * q.ndim)
    return np.asarray(x.astype(scale.dtype)).reshape(q.shape)


def keep_quantization(graph: gs.Graph) -> PassReport:
    """Tell which Q/DQ pairs stay in the forward pass; nothing changes."""
    report = PassReport("quantization")
    counts = Counter(node.op for node in graph.nodes)
    q, dq = counts["QuantizeLinear"], counts["DequantizeLinear"]
    if q or dq:
        report.declined.append(f"{q} QuantizeLinear and {dq} DequantizeLinear stay: they are part of the model")
    return report
