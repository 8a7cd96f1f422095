"""Files as other tools write them, explained. Oracle: the dense formulas in numpy, float64, on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import torch

from onnxcrp import Explainer
from tests.support import functional

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
    result = Explainer(model, "epsilon").explain(x, 1, seed="abs")
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    a = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step  # what the integers stand for
    W = (codes.astype(float) - 128) * 0.02
    seed = np.zeros((2, 3))
    seed[:, 1] = np.abs(a @ W)[:, 1]
    np.testing.assert_allclose(result.explained, a @ W, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.relevance["x"], epsilon_shares(a, W, seed), rtol=1e-3, atol=1e-4)


def test_positions_that_the_graph_computes_take_their_share() -> None:
    """A positional embedding looked up while running is a constant summand as much as one that is stored."""
    words, places = (DRAW.normal(size=(n, 4)).astype(np.float32) for n in (9, 6))
    W = DRAW.normal(size=(4, 3)).astype(np.float32)
    model = parsed(
        """<ir_version: 8, opset_import: ["": 18]>
        g (int64[N, 5] ids) => (float[N, 5, 3] y) <int64 zero = {0}, int64 one = {1}> {
            looked = Gather(words, ids)
            shape = Shape(ids)
            length = Gather(shape, one)
            at = Range(zero, length, one)
            placed = Gather(places, at)
            x = Add(looked, placed)
            y = MatMul(x, W)
        }""",
        words=words,
        places=places,
        W=W,
    )
    ids = DRAW.integers(0, 9, (2, 5))
    result = Explainer(model, "attnlrp").explain({"ids": ids}, (2, 1), seed="abs")
    w, p = words[ids].astype(float), places[:5].astype(float)
    seed = np.zeros((2, 5, 3))
    seed[:, 2, 1] = np.abs((w + p) @ W)[:, 2, 1]
    R = epsilon_shares(w + p, W.astype(float), seed)
    s = R / (w + p + 1e-6 * np.where(w + p >= 0, 1, -1))
    np.testing.assert_allclose(result.relevance["ids"], (w * s).sum(-1), rtol=1e-4, atol=1e-5)


def twin(arrays: dict[str, np.ndarray]) -> Any:
    """Conv 5 x 5 SAME, ReLU, MaxPool, dense: the net that the files below hold, in torch."""
    from torch import nn

    net = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    weights = (arrays["W"], arrays["b"].reshape(-1), arrays["V"].reshape(64, 3).T, arrays["c"].reshape(-1))
    for parameter, values in zip(net.parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(np.ascontiguousarray(values))
    return net.eval()


BODY = """
    z = Conv<auto_pad = "SAME_UPPER", kernel_shape = [5, 5], strides = [1, 1], dilations = [1, 1], group = 1>(x, W)
    shifted = Add(z, b)
    a = Relu(shifted)
    p = MaxPool<auto_pad = "VALID", kernel_shape = [2, 2], strides = [2, 2]>(a)
    flat = Reshape(p, rows)
    M = Reshape(V, matrix)
    product = MatMul(flat, M)
"""
FORMS = {
    # CNTK's exports: biases by Add, weights through Reshape, initializers among the inputs, a batch of 1
    "CNTK": (
        """<ir_version: 3, opset_import: ["": %d]>
        g (float[1, 2, 8, 8] x, float[4, 2, 5, 5] W, float[4, 1, 1] b, float[4, 4, 4, 3] V, float[1, 3] c,
           int64[2] rows, int64[2] matrix) => (float[1, 3] y) { %s y = Add(product, c) }""",
        {"rows": np.array([1, 64]), "matrix": np.array([64, 3])},
    ),
    # a branch whose condition is a constant, a function of the file's own
    "control flow": (
        """<ir_version: 8, opset_import: ["": %d, "own": 1]>
        g (float[N, 2, 8, 8] x) => (float[N, 3] y) {
            %s
            y0 = If (yes) <then_branch = t () => (float[N, 3] u) { u = Identity(product) },
                           else_branch = e () => (float[N, 3] w) { w = Neg(product) }>
            y = own.shift(y0, c)
        }
        <domain: "own", opset_import: ["": 18]>
        shift (left, right) => (both) { both = Add(left, right) }""",
        {"rows": np.array([-1, 64]), "matrix": np.array([64, 3]), "yes": np.array(True)},
    ),
}


@pytest.mark.parametrize(("form", "opset"), [("CNTK", 7), ("CNTK", 8), ("CNTK", 9), ("control flow", 18)])
@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon"])
def test_the_same_net_in_old_and_odd_spellings(form: str, opset: int, composite: str) -> None:
    draw = np.random.default_rng(3)
    shapes = {"W": (4, 2, 5, 5), "b": (4, 1, 1), "V": (4, 4, 4, 3), "c": (1, 3)}
    arrays = {
        name: (draw.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    text, more = FORMS[form]
    model = parsed(text % (opset, BODY), **arrays, **more)
    x = draw.normal(size=(2, 2, 8, 8)).astype(np.float32)
    explainer = Explainer(model, composite)
    assert {node.op for node in explainer.facts.nodes} == {"Conv", "Relu", "MaxPool", "Reshape", "Linear"}
    result = explainer.explain(x, 1, seed="abs")
    theirs = functional.relevance(twin(arrays), {"x": x}, composite, (1,))
    ours = result.relevance["x"] * np.sign(result.explained[:, 1])[:, None, None, None]
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
