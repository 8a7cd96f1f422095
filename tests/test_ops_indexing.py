"""Transposes of what picks, puts, samples and measures. Oracle: the operator itself, run by onnxruntime.

Every operator is held to (<f(v + h d), s> - <f(v - h d), s>) / 2 h = <d, T(s)> at a random v, for random d and s; where
f is linear, that is <f(d), s> = <d, T(s)> for any h.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxcrp.errors import UnsupportedError
from onnxcrp.graph import Graph
from onnxcrp.ops import OPS, Node, Parts
from tests.test_ops import OPSET, run, shapes_of, w

DRAW = np.random.default_rng(11)


class Case:
    """An operator with inputs for `batch` samples; `data`: which of them carry, `fixed`: which are constants."""

    def __init__(
        self,
        op: str,
        inputs: Any,
        attrs: Any = None,
        *,
        data: Any = (0,),
        fixed: Any = (),
        outputs: int = 1,
        h: float = 1,
    ) -> None:
        self.op, self.inputs, self.attrs, self.data = op, inputs, attrs or {}, list(data)
        self.fixed, self.outputs, self.h = set(fixed), outputs, h

    def __repr__(self) -> str:
        return f"{self.op}-{'-'.join(f'{k}_{v}' for k, v in self.attrs.items())}"


def ints(*shape: int, below: int) -> np.ndarray:
    return DRAW.integers(0, below, shape)


def grid(batch: int, *size: int) -> np.ndarray:
    """Positions in and around a picture, none on a kink."""
    return DRAW.uniform(-1.3, 1.3, (batch, *size, len(size))).astype(np.float32)


def unique(batch: int, count: int, below: int, *after: int) -> np.ndarray:
    """[batch, count, *after]: different indices along axis 1."""
    rows = [DRAW.permutation(below)[:count] for _ in range(batch * int(np.prod(after)))]
    return np.moveaxis(np.array(rows).reshape(batch, *after, count), -1, 1)


def between_steps(*shape: int) -> np.ndarray:
    """Numbers at least 0.1 away from the next integer."""
    return (DRAW.integers(-3, 3, shape) + DRAW.uniform(0.1, 0.9, shape)).astype(np.float32)


CASES = [
    Case("TopK", lambda n: [w(n, 3, 7), np.array([4])], {"axis": -1}, fixed=[1], outputs=2, h=1e-4),
    Case("TopK", lambda n: [w(n, 6, 3), np.array([2])], {"axis": 1, "largest": 0}, fixed=[1], outputs=2, h=1e-4),
    Case("GatherElements", lambda n: [w(n, 6, 3), ints(n, 4, 3, below=6)], {"axis": 1}),
    Case("GatherElements", lambda n: [w(n, 6, 3), ints(n, 6, 5, below=3) - 3], {"axis": -1}),
    Case("ScatterElements", lambda n: [w(n, 6, 3), unique(n, 4, 6, 3), w(n, 4, 3)], {"axis": 1}, data=[0, 2]),
    Case("ScatterElements", lambda n: [w(n, 6, 3), unique(n, 4, 6, 3), w(n, 4, 3)], {"axis": 1}, data=[2]),
    Case(
        "ScatterElements",
        lambda n: [w(n, 6, 3), ints(n, 4, 3, below=6), w(n, 4, 3)],
        {"axis": 1, "reduction": "add"},
        data=[0, 2],
    ),
    Case("GatherND", lambda n: [w(n, 5, 4), ints(n, 3, 1, below=5)], {"batch_dims": 1}),
    Case("GatherND", lambda n: [w(n, 5, 4, 2), ints(n, 3, 2, below=4)], {"batch_dims": 1}),
    Case("GatherND", lambda n: [w(n, 3, 5, 2), ints(n, 3, 4, 1, below=5) - 5], {"batch_dims": 2}),
    Case("Compress", lambda n: [w(n, 5, 3), np.array([True, False, True, True])], {"axis": 1}),
    Case("MaxUnpool", lambda n: [w(n, 2, 2, 3), unpool(n)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("ReverseSequence", lambda n: [w(n, 5, 3), ints(n, below=5) + 1], {"batch_axis": 0, "time_axis": 1}),
    Case("Trilu", lambda n: [w(n, 4, 5)], {"upper": 0}),
    Case("Trilu", lambda n: [w(n, 4, 5), np.array(1)], {"upper": 1}, fixed=[1]),
    Case("CumSum", lambda n: [w(n, 4, 5), np.array(1)], fixed=[1]),
    Case("CumSum", lambda n: [w(n, 4, 5), np.array(-1)], {"exclusive": 1, "reverse": 1}, fixed=[1]),
    Case(
        "LpPool", lambda n: [w(n, 2, 6, 6)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 0]}, h=1e-3
    ),
    Case("LpPool", lambda n: [w(n, 2, 6)], {"kernel_shape": [2], "p": 3}, h=1e-3),
    Case("LpPool", lambda n: [w(n, 2, 6)], {"kernel_shape": [2], "p": 1}, h=1e-4),
    Case("GlobalLpPool", lambda n: [w(n, 2, 6, 3)], {"p": 2}, h=1e-3),
    Case("LpNormalization", lambda n: [w(n, 5, 4)], {"axis": 1, "p": 2}, h=1e-3),
    Case("LpNormalization", lambda n: [w(n, 5, 4)], {"axis": -1, "p": 1}, h=1e-4),
    Case("ReduceLogSumExp", lambda n: [w(n, 5, 4), np.array([1])], {"keepdims": 0}, fixed=[1], h=1e-3),
    Case("GridSample", lambda n: [w(n, 2, 4, 5), grid(n, 3, 6)], {"align_corners": 1}),
    Case("GridSample", lambda n: [w(n, 2, 4, 5), grid(n, 3, 6)], {"padding_mode": "border"}),
    Case("GridSample", lambda n: [w(n, 2, 4, 5), grid(n, 3, 6)], {"mode": "nearest"}),
    Case("GridSample", lambda n: [w(n, 2, 3, 4, 5), grid(n, 2, 3, 4)], {"mode": "linear"}),
    Case("DFT", lambda n: [w(n, 8, 2), np.array(8), np.array(1)], fixed=[1, 2]),
    Case("DFT", lambda n: [w(n, 7, 1), np.array(7), np.array(1)], {"onesided": 1}, fixed=[1, 2]),
    Case("DFT", lambda n: [w(n, 6, 3, 2), np.array(6), np.array(1)], {"inverse": 1}, fixed=[1, 2]),
    Case("CastLike", lambda n: [w(n, 3), w(1)], fixed=[1]),
    Case("Mod", lambda n: [between_steps(n, 30) * np.float32(0.7), np.float32(0.7)], {"fmod": 1}, fixed=[1], h=1e-5),
]


def unpool(batch: int) -> np.ndarray:
    """Places of [batch, 2, 2, 3] entries in [batch, 2, 4, 6], one in every window, counted through the whole tensor."""
    n, c, y, x = np.indices((batch, 2, 2, 3))
    return ((n * 2 + c) * 4 + 2 * y + ints(batch, 2, 2, 3, below=2)) * 6 + 2 * x + ints(batch, 2, 2, 3, below=2)


@pytest.mark.parametrize("conditions", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_transpose(case: Case, conditions: int) -> None:
    """With several conditions the forward pass has one sample and the message three rows."""
    arrays = [np.asarray(array) for array in case.inputs(1 if conditions > 1 else 2)]
    tensors: list[Any] = [
        gs.Constant(f"c{i}", array) if i in case.fixed else gs.Variable(f"x{i}", array.dtype, list(array.shape))
        for i, array in enumerate(arrays)
    ]
    outputs = [gs.Variable(f"y{i}") for i in range(case.outputs)]
    node = gs.Node(case.op, "node", case.attrs, tensors, outputs)
    inputs = [t for t in tensors if isinstance(t, gs.Variable)]
    shapes_of(node, inputs)
    feeds = {t.name: array for t, array in zip(tensors, arrays, strict=True) if isinstance(t, gs.Variable)}
    moves = {f"x{i}": DRAW.choice([-1.0, 1.0], arrays[i].shape).astype(np.float32) for i in case.data}
    up, down = (
        run([node], inputs, outputs[:1], feeds | {k: feeds[k] + sign * case.h * d for k, d in moves.items()})[0]
        for sign in (1, -1)
    )
    rows = conditions if conditions > 1 else len(up)
    message = DRAW.normal(size=(rows, *up.shape[1:])).astype(np.float32)
    op = Graph(opset=OPSET, nodes=[node])
    s = gs.Variable("s", np.float32, [None] * message.ndim)
    view = Node(op, node, data=case.data, nonnegative=set(), name="layer")
    arriving: Any = [op.value(s)] + [op.zero] * (case.outputs - 1) if case.outputs > 1 else op.value(s)
    back = OPS[case.op].transpose(op, view, arriving)
    ends = [gs.Variable(f"end{i}", np.float32) for i in case.data]
    for part, end in zip(back if isinstance(back, Parts) else [back], ends, strict=True):
        op.nodes.append(gs.Node("Identity", f"node_{end.name}", inputs=[part.tensor], outputs=[end]))
    results = run(op.nodes, [*inputs, s], ends, {**feeds, "s": message})
    slope = (up.astype(np.float64) - down) / (2 * case.h)
    for row in range(rows):
        pick = slice(row, row + 1) if conditions > 1 else slice(None)
        left = (slope * message[pick]).sum()
        right = sum((moves[f"x{i}"] * R[pick].astype(float)).sum() for i, R in zip(case.data, results, strict=True))
        scale = sum(np.abs(R[pick]).sum() for R in results)
        assert abs(left - right) < (1e-5 if case.h == 1 else 3e-3) * scale
    for i, R in zip(case.data, results, strict=True):
        assert R.shape == (max(conditions, arrays[i].shape[0]), *arrays[i].shape[1:])


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter_and_gather_by_tuples_that_name_samples(reduction: str) -> None:
    """ScatterND and GatherND without batch axes: the message has as many rows as the forward pass."""
    v, updates = w(2, 5, 3), w(4, 3)
    places = np.array([[0, 1], [1, 0], [1, 4], [0, 3]])
    x, at, u = (gs.Variable(n, a.dtype, list(a.shape)) for n, a in (("x", v), ("at", places), ("u", updates)))
    node = gs.Node("ScatterND", "put", {"reduction": reduction}, [x, at, u], [gs.Variable("y", np.float32, [2, 5, 3])])
    message = w(2, 5, 3)
    op = Graph(opset=OPSET, nodes=[node])
    s = gs.Variable("s", np.float32, [None] * 3)
    back = OPS["ScatterND"].transpose(op, Node(op, node, data=[0, 2], nonnegative=set(), name="n"), op.value(s))
    ends = [gs.Variable("end0", np.float32), gs.Variable("end1", np.float32)]
    for part, end in zip(back, ends, strict=True):
        op.nodes.append(gs.Node("Identity", f"node_{end.name}", inputs=[part.tensor], outputs=[end]))
    kept, put = run(op.nodes, [x, at, u, s], ends, {"x": v, "at": places, "u": updates, "s": message})
    expected = message.copy()
    if reduction == "none":
        expected[tuple(places.T)] = 0
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(put, message[tuple(places.T)])

    node = gs.Node("GatherND", "pick", {}, [x, at], [gs.Variable("z", np.float32, [4, 3])])
    op = Graph(opset=OPSET, nodes=[node])
    s = gs.Variable("s", np.float32, [None] * 2)
    back = OPS["GatherND"].transpose(op, Node(op, node, data=[0], nonnegative=set(), name="n"), op.value(s))
    end = gs.Variable("end", np.float32)
    op.nodes.append(gs.Node("Identity", "end", inputs=[back.tensor], outputs=[end]))
    (R,) = run(op.nodes, [x, at, s], [end], {"x": v, "at": places, "s": updates})
    expected = np.zeros_like(v)
    expected[tuple(places.T)] = updates
    np.testing.assert_array_equal(R, expected)


@pytest.mark.parametrize(
    ("op_type", "attrs", "count"),
    [
        ("ScatterElements", {"reduction": "mul"}, 3),
        ("Compress", {}, 2),
        ("GridSample", {"padding_mode": "reflection"}, 2),
        ("GridSample", {"mode": "cubic"}, 2),
    ],
)
def test_what_has_no_transpose_says_so(op_type: str, attrs: dict[str, Any], count: int) -> None:
    inputs = [gs.Variable(f"x{i}", np.float32, [2, 3, 4, 4]) for i in range(count)]
    node = gs.Node(op_type, "node", attrs, inputs, [gs.Variable("y", np.float32, [2, 3, 4, 4])])
    op = Graph(opset=OPSET)
    s, view = op.value(gs.Variable("s", np.float32, [None] * 4)), Node(op, node, data=[0], nonnegative=set(), name="n")
    with pytest.raises(UnsupportedError, match="node"):
        OPS[op_type].transpose(op, view, s)
