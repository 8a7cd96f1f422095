"""What the tests of the index share: a tiny net with random weights, its data, and tables as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

CLASSES = 3
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[B, 1, 6, 6] x, float[5, 1, 3, 3] first, float[6, 5, 3, 3] second, float[N, 6] head, float[N] bias)
  => (float[B, N] logits)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, first)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1]> (b, second)
  d = Relu (c)
  e = GlobalAveragePool (d)
  f = Flatten (e)
  logits = Gemm <transB = 1> (f, head, bias)
}
"""


def model(path: Path, *, classes: int = CLASSES, seed: int = 0) -> Path:
    """Write the net, random weights `first.weight`, `second.weight`, `head.weight`, and return its path."""
    proto = onnx.parser.parse_model(TEXT.replace("N", str(classes)))
    rng = np.random.default_rng(seed)
    weights = {"first": (5, 1, 3, 3), "second": (6, 5, 3, 3), "head": (classes, 6), "bias": (classes,)}
    del proto.graph.input[1:]
    for name, shape in weights.items():
        called = f"{name}.weight" if name != "bias" else "head.bias"
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, called))
        for node in proto.graph.node:
            node.input[:] = [called if each == name else each for each in node.input]
    onnx.save(proto, path)
    return path


def data(n: int, *, classes: int = CLASSES, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random samples [n, 1, 6, 6] and labels [n]; some samples come twice, so that there are ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (n, 1, 6, 6)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    one, other = rng.permutation(n)[: n // 8 * 2].reshape(2, -1)
    x[one], labels[one] = x[other], labels[other]
    return x, labels


def tables(index: Any) -> dict[str, bytes]:
    """Every table of an index as it lies on the disk."""
    return {path.name: path.read_bytes() for path in sorted(Path(index.path).glob("*.parquet"))}
