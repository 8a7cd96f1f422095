"""Oracle: the original model on onnxruntime, and values computed with numpy."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcrp.canonize import canonize
from tests.support.canonical import check, ops, parse, random, said


@pytest.mark.parametrize(
    ("way", "weight"),
    [
        ("k = Identity(w)", [4, 3, 3, 3]),
        ("k = Transpose<perm=[3,2,0,1]>(w)", [3, 3, 3, 4]),  # HWIO, as TensorFlow stores it
        ("k = Reshape(w, shape)", [108]),
        ("h = Cast<to=10>(w) k = Cast<to=1>(h)", [4, 3, 3, 3]),
        ("q, s, z = DynamicQuantizeLinear(w) k = DequantizeLinear(q, s, z)", [4, 3, 3, 3]),
        ("t = Mul(w, two) k = Sub(t, w)", [4, 3, 3, 3]),
        ("k = Constant<value_floats=[0.5, -0.5]>()", None),
    ],
)
def test_weights_that_arrive_by_detours(way, weight):
    reshape = "r = Reshape(k, small) " if weight is None else ""
    model = parse(
        f"""net (float[N,{3 if weight else 1},6,6] x) => (float[] y) {{
            {way} {reshape}
            y = Conv(x, {"r" if reshape else "k"}) }}""",
        w=random(*weight or [1]),
        shape=np.array([4, 3, 3, 3], np.int64),
        small=np.array([2, 1, 1, 1], np.int64),
        two=np.float32(2) * np.ones([], np.float32),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv"]
    if weight:
        assert list(canonical.weights.values()) == ["w"]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_dequantized_weights(axis):
    rng = np.random.default_rng(0)
    q = rng.integers(-128, 128, [4, 3, 3, 3]).astype(np.int8)
    count = [] if axis is None else [q.shape[axis]]
    scale = rng.uniform(0.01, 0.1, count).astype(np.float32)
    zero = rng.integers(-5, 5, count).astype(np.int8)
    model = parse(
        f"""net (float[N,3,6,6] x) => (float[] y) {{
            w = DequantizeLinear<axis={axis or 0}>(q, scale, zero)
            b = DequantizeLinear(bias, bias_scale)
            y = Conv(x, w, b) }}""",
        q=q,
        scale=scale,
        zero=zero,
        bias=rng.integers(-1000, 1000, 4).astype(np.int32),
        bias_scale=np.array(1e-3, np.float32),
    )
    canonical = check(model, tolerance=1e-6)
    assert ops(canonical) == ["Conv"]
    shape = [-1 if i == axis else 1 for i in range(4)]
    expected = (q.astype(np.float64) - zero.reshape(shape)) * scale.reshape(shape)
    np.testing.assert_allclose(canonical.graph.nodes[0].inputs[1].values, expected, rtol=1e-6)


def test_quantized_and_dequantized_weights_keep_their_rounding():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            q = QuantizeLinear(w, s, z)
            k = DequantizeLinear(q, s, z)
            y = Conv(x, k) }""",
        w=random(4, 3, 3, 3),
        s=np.array(0.1, np.float32),
        z=np.array(3, np.uint8),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv"]
    assert len(np.unique(canonical.graph.nodes[0].inputs[1].values)) <= 21


def test_nodes_that_do_nothing_go():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            a = Identity(x)
            b = Cast<to=1>(a)
            c = Transpose<perm=[0,1,2,3]>(b)
            d = Concat<axis=1>(c)
            e, mask = Dropout(d, ratio)
            f = Relu(e)
            y = Identity(f) }""",
        ratio=np.array(0.5, np.float32),
    )
    assert ops(check(model)) == ["Relu"]


def test_outputs_keep_their_names():
    """Identities between an input, a hidden tensor or a constant and outputs, and one tensor that is two outputs."""
    model = parse(
        """net (float[N,3] x) => (float[] a, float[] b, float[] c, float[] d) {
            a = Identity(x)
            h = Relu(x)
            b = Identity(h)
            c = Identity(b)
            d = Identity(k) }""",
        k=random(2, 3),
    )
    canonical = check(model)
    assert ops(canonical) == ["Identity", "Relu", "Identity", "Identity"]
    assert [tensor.name for tensor in canonical.graph.outputs] == ["a", "b", "c", "d"]
    assert canonical.graph.nodes[1].outputs[0].name == "b"
    assert "the output 'a'" in said(canonical, "fold constants")


def test_a_hidden_tensor_that_is_read_and_is_an_output():
    model = parse(
        """net (float[N,3] x) => (float[] y, float[] z) {
            h = Relu(x)
            y = Identity(h)
            z = Sigmoid(h) }"""
    )
    canonical = check(model)
    assert ops(canonical) == ["Relu", "Sigmoid"]
    assert canonical.graph.nodes[1].inputs[0].name == "y"


def test_a_constant_output_stays():
    model = parse(
        """net (float[N,3] x) => (float[] y, float[] z) {
            y = Relu(x)
            z = Constant<value_floats=[1.0, 2.0]>() }"""
    )
    assert ops(check(model)) == ["Relu"]


def test_dropout_in_training_is_declined():
    model = parse(
        "net (float[N,3] x) => (float[] y) { h = Dropout(x, r, t) y = Relu(h) }",
        r=np.array(0.5, np.float32),
        t=np.array(True),
    )
    canonical = canonize(model)
    assert ops(canonical) == ["Dropout", "Relu"]
    assert "training mode" in said(canonical, "fold constants")


def test_a_dropout_whose_mask_is_read_stays():
    model = parse("net (float[N,3] x) => (float[] y, bool[] m) { h, m = Dropout(x) y = Relu(h) }")
    canonical = canonize(model)
    assert ops(canonical) == ["Dropout", "Relu"]
    assert "mask" in said(canonical, "fold constants")


def test_random_constants_stay_random():
    model = parse("net (float[N,3] x) => (float[] y) { r = RandomNormal<shape=[3]>() y = Add(x, r) }")
    canonical = canonize(model)
    assert ops(canonical) == ["RandomNormal", "Add"]
    assert "random" in said(canonical, "fold constants")


def test_constants_that_would_be_huge_stay_computed():
    model = parse(
        "net (float[N,1,1] x) => (float[] y) { c = ConstantOfShape(s) y = Add(x, c) }",
        s=np.array([9000, 9000], np.int64),
    )
    canonical = canonize(model)
    assert ops(canonical) == ["ConstantOfShape", "Add"]
    assert "stay computed" in said(canonical, "fold constants")


@pytest.mark.parametrize(
    "shape",
    [
        "s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, axis) t = Concat<axis=0>(u, rest)",
        "u = Shape<start=0, end=1>(x) t = Concat<axis=0>(u, rest)",
        "s = Shape(x) u = Slice(s, axis, one) t = Concat<axis=0>(u, rest)",
        "s = Shape(x) n = Gather(s, zero) u = Reshape(n, minus) t = Concat<axis=0>(u, rest)",
        "s = Shape(x) a = Slice(s, axis, one) b = Slice(s, one, end) "
        "p = ReduceProd<keepdims=1>(b) t = Concat<axis=0>(a, p)",
        "s = Shape(x) a = Gather(s, zero) i = Cast<to=6>(a) j = Cast<to=7>(i) u = Unsqueeze(j, axis) "
        "c = Gather(s, onescalar) w = Mul(c, thirty) v = Unsqueeze(w, axis) t = Concat<axis=0>(u, v)",
    ],
)
@pytest.mark.parametrize("batch", ["N", "1"])
def test_a_reshape_by_a_computed_shape(shape, batch):
    model = parse(
        f"net (float[{batch},3,5,6] x) => (float[] y) {{ {shape} r = Reshape(x, t) y = Relu(r) }}",
        zero=np.array(0, np.int64),
        onescalar=np.array(1, np.int64),
        thirty=np.array(30, np.int64),
        axis=np.array([0], np.int64),
        one=np.array([1], np.int64),
        end=np.array([4], np.int64),
        minus=np.array([-1], np.int64),
        rest=np.array([90], np.int64),
    )
    canonical = check(model)
    assert ops(canonical) == ["Reshape", "Relu"]
    assert canonical.graph.nodes[0].inputs[1].values.tolist() == [0, 90]
    assert canonical.batch == ("dynamic" if batch == "N" else "freed")


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ("N,8,2,3", [-1, 48], [0, 48]),
        ("N,8,2,3", [-1, 8, 6], [0, 8, 6]),
        ("N,8,2,3", [-1, 6], [-1, 6]),  # windows become rows: axis 0 is not the batch
        ("N,8,2,H", [-1, 48], [-1, 48]),
        ("N,8,2,3", [0, -1], [0, -1]),
    ],
)
def test_a_reshape_says_whether_axis_0_stays(shape, target, expected):
    model = parse(
        f"net (float[{shape}] x) => (float[] y) {{ r = Reshape(x, t) y = Relu(r) }}", t=np.array(target, np.int64)
    )
    canonical = check(model, size=3)
    assert canonical.graph.nodes[0].inputs[1].values.tolist() == expected
    assert (canonical.graph.outputs[0].shape[0] == "N") == (expected[0] == 0)


def test_the_batch_may_be_read_far_from_where_it_is_used():
    """As `x.view(batch, -1)` is exported, with batch read from another tensor."""
    text = """net (float[{batch},3,4,4] x) => (float[] y) {{
            s = Shape(x)
            n = Gather(s, zero)
            c = Conv(x, w)
            u = Unsqueeze(n, axis)
            t = Concat<axis=0>(u, minus)
            y = Reshape(c, t) }}"""
    constants = {"zero": np.array(0), "axis": np.array([0]), "minus": np.array([-1]), "w": random(5, 3, 3, 3)}
    for batch in ("N", 1):
        canonical = check(parse(text.format(batch=batch), **constants))
        assert ops(canonical) == ["Conv", "Reshape"]
        assert canonical.graph.nodes[1].inputs[1].values.tolist() == [0, -1]


def test_a_shape_with_two_unknown_sizes_elsewhere_stays_computed():
    model = parse(
        """net (float[N,3,H,6] x) => (float[] y) {
            a = Shape<start=0, end=1>(x)
            b = Shape<start=2, end=3>(x)
            t = Concat<axis=0>(b, rest, a)
            y = Reshape(x, t) }""",
        rest=np.array([18], np.int64),
    )
    assert ops(check(model, size=3)) == ["Shape", "Shape", "Concat", "Reshape"]


def test_a_resize_to_a_computed_size_leaves_the_batch_alone():
    model = parse(
        """net (float[N,3,4,4] x) => (float[] y) {
            a = Shape<start=0, end=2>(x)
            t = Concat<axis=0>(a, rest)
            y = Resize<mode="nearest">(x, , , t) }""",
        rest=np.array([8, 6], np.int64),
    )
    canonical = check(model)
    assert ops(canonical) == ["Resize"]
    assert canonical.graph.nodes[0].attrs["axes"] == [1, 2, 3]


def test_a_crop_to_a_computed_size_loses_the_batch_of_its_region_too():
    model = parse(
        """net (float[N,3,7,6] x) => (float[] y) {
            a = Shape<start=0, end=2>(x)
            t = Concat<axis=0>(a, rest)
            y = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(x, roi, , t) }""",
        rest=np.array([5, 4], np.int64),
        roi=np.array([0, 0, 0.1, 0.2, 1, 1, 0.9, 0.8], np.float32),
    )
    (node,) = check(model).graph.nodes
    np.testing.assert_allclose(node.inputs[1].values, [0, 0.1, 0.2, 1, 0.9, 0.8], rtol=1e-6)


def test_casts_like_a_tensor_of_known_type():
    model = parse("net (float[N,3] x) => (float[] y) { c = CastLike(k, x) y = Add(x, c) }", k=np.array([1, 2, 3]))
    assert ops(check(model)) == ["Add"]


def test_control_flow_is_left_alone():
    model = parse(
        """net (float[N,3] x, bool c) => (float[] y) {
            k = Identity(w)
            y = If(c) <then_branch = a () => (float[N,3] p) { p = Add(x, k) },
                       else_branch = b () => (float[N,3] q) { q = Identity(x) }> }""",
        w=random(3),
    )
    canonical = canonize(model)
    assert ops(canonical) == ["Identity", "If"]


EXPAND = """net (float[{sizes}] x) => (float[] y) {{
    s = Shape<start=0, end=1>(x)  t = Concat<axis=0>(s, rest)  kept = Equal(t, minus)
    u = Where(kept, ones, t)  e = Expand(x, u)  y = Relu(e) }}"""


@pytest.mark.parametrize(
    ("sizes", "rest", "expected"),
    [
        ("N,1,5", [4, -1], [1, 4, 1]),  # x.expand(-1, 4, -1)
        ("N,1,5", [4, 5], [1, 4, 5]),
        ("N,2,1,5", [-1, 4, -1], [1, 1, 4, 1]),
    ],
)
def test_a_tensor_expanded_to_its_own_batch(sizes, rest, expected):
    """As torch writes `expand`: entries of -1 become 1."""
    count = len(rest) + 1
    model = parse(
        EXPAND.format(sizes=sizes), rest=np.array(rest), minus=np.full(count, -1), ones=np.ones(count, np.int64)
    )
    canonical = check(model, size=3)
    assert ops(canonical) == ["Expand", "Relu"]
    assert canonical.graph.nodes[0].inputs[1].values.tolist() == expected


def test_a_constant_expanded_to_the_batch_stays_computed():
    """Nothing in the constant has the size of the batch."""
    model = parse(
        """net (float[N,1,5] x) => (float[] y) { s = Shape<start=0, end=1>(x)  t = Concat<axis=0>(s, rest)
            e = Expand(token, t)  y = Concat<axis=1>(e, x) }""",
        rest=np.array([1, 5]), token=random(1, 1, 5),
    )  # fmt: skip
    assert ops(check(model, size=3)) == ["Shape", "Concat", "Expand", "Concat"]


def test_sizes_may_be_compared_with_each_other():
    """Equal and Where on sizes of which one has a name: what is certain is computed, what is not stays."""
    model = parse(
        """net (float[N,4,5] x) => (float[] y, int64[] z) {
            s = Shape(x)  same = Equal(s, s)  u = Where(same, s, five)  y = Reshape(x, u)
            first = Shape<start=0, end=1>(x)  maybe = Equal(first, one)  z = Where(maybe, five, one) }""",
        five=np.array([5]), one=np.array([1]),
    )  # fmt: skip
    canonical = check(model, size=3)
    assert ops(canonical) == ["Reshape", "Shape", "Equal", "Where"]
    for size in (1, 2):
        check(model, size=size)
