"""Files as other tools write them, explained. Oracle: the dense formulas in numpy, float64, on the same weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

from onnxcrp import Explainer

DRAW = np.random.default_rng(6)


def parsed(text: str, **arrays: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text and its weights."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def epsilon_shares(a: np.ndarray, W: np.ndarray, R: np.ndarray, b: np.ndarray | float = 0.0) -> np.ndarray:
    """a [B, in], W [in, out], R [B, out] -> [B, in]."""
    z = a @ W + b
    return a * ((R / (z + 1e-6 * np.where(z >= 0, 1, -1))) @ W.T)


def test_dynamically_quantized_layers() -> None:
    """onnxruntime's quantize_dynamic: activations are rounded by a scale that only the run knows."""
    codes = DRAW.integers(0, 255, (4, 3)).astype(np.uint8)
    model = parsed(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 3] y) <uint8 zero = {128}, float scale = {0.02}> {
            q, s, z = DynamicQuantizeLinear(x)
            i = MatMulInteger(q, W, z, zero)
            f = Cast<to = 1>(i)
            factor = Mul(s, scale)
            y = Mul(f, factor)
        }""",
        W=codes,
    )
    x = DRAW.normal(size=(2, 4)).astype(np.float32)
    result = Explainer(model, "epsilon").explain(x, 1)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    a = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step  # what the integers stand for
    W = (codes.astype(float) - 128) * 0.02
    seed = np.zeros((2, 3))
    seed[:, 1] = (a @ W)[:, 1]
    np.testing.assert_allclose(result.explained, a @ W, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.relevance["x"], epsilon_shares(a, W, seed), rtol=1e-3, atol=1e-4)
