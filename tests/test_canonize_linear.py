"""Oracle: the original model on onnxruntime; W and b of small cases written out in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.support.canonical import check, ops, parse, random, said


@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product([0, 1], repeat=2)))
@pytest.mark.parametrize("c", [None, [5], [1, 5], [1], [], [1, 1]])
def test_gemm_with_a_constant_matrix(trans_a, trans_b, c):
    shape = "4,N" if trans_a else "N,4"
    constants = {"b": random(*([5, 4] if trans_b else [4, 5]))}
    if c is not None:
        constants["c"] = np.asarray(random(*c))
    model = parse(
        f"""net (float[{shape}] x) => (float[] y) {{
            y = Gemm<transA={trans_a}, transB={trans_b}, alpha=0.5, beta=-2.0>(x, b{", c" * (c is not None)}) }}""",
        **constants,
    )
    canonical = check(model)
    assert ops(canonical) == ["Transpose"] * trans_a + ["Linear"]
    layer = canonical.graph.nodes[-1]
    matrix = constants["b"] if trans_b else constants["b"].T
    np.testing.assert_allclose(layer.inputs[1].values, 0.5 * matrix, rtol=1e-6)
    if c is not None:
        np.testing.assert_allclose(layer.inputs[2].values, -2 * np.broadcast_to(constants["c"], [1, 5])[0], rtol=1e-6)
    assert canonical.sources[layer.name] == "Gemm"


def test_a_plain_gemm_keeps_its_constants():
    model = parse(
        "net (float[N,4] x) => (float[] y) { y = Gemm<transB=1>(x, fc_weight, fc_bias) }",
        **{"fc_weight": random(5, 4), "fc_bias": random(5)},
    )
    canonical = check(model)
    (layer,) = canonical.graph.nodes
    assert [tensor.name for tensor in layer.inputs] == ["x", "fc_weight", "fc_bias"]
    assert canonical.weights == {layer.name: "fc_weight"}


@pytest.mark.parametrize("c", [[3, 5], [3, 1]])
def test_gemm_with_rows_of_their_own_adds(c):
    model = parse("net (float[3,4] x) => (float[] y) { y = Gemm<beta=0.5>(x, b, c) }", b=random(4, 5), c=random(*c))
    assert ops(check(model, free_batch=False)) == ["Linear", "Add"]


def test_gemm_with_equal_rows_has_a_bias():
    model = parse(
        "net (float[3,4] x) => (float[] y) { y = Gemm(x, b, c) }", b=random(4, 5), c=np.tile(random(5), (3, 1))
    )
    assert ops(check(model, free_batch=False)) == ["Linear"]


def test_gemm_with_a_computed_addend():
    model = parse("net (float[N,4] x, float[N,5] c) => (float[] y) { y = Gemm<beta=0.5>(x, b, c) }", b=random(4, 5))
    assert ops(check(model)) == ["Linear", "Mul", "Add"]


@pytest.mark.parametrize(("trans_a", "trans_b"), list(itertools.product([0, 1], repeat=2)))
def test_gemm_with_the_constant_first(trans_a, trans_b):
    shape = "N,4" if trans_b else "4,N"
    model = parse(
        f"""net (float[{shape}] x) => (float[] y) {{
            y = Gemm<transA={trans_a}, transB={trans_b}, alpha=2.0>(a, x, c) }}""",
        a=random(*([4, 5] if trans_a else [5, 4])),
        c=random(5, 1),
    )
    assert ops(check(model)) == ["Transpose"] * (not trans_b) + ["Linear", "Transpose"]  # c is the bias


def test_gemm_of_two_data_paths_stays():
    model = parse("net (float[N,4] x, float[4,5] z) => (float[] y) { y = Gemm(x, z) }")
    canonical = check(model)
    assert ops(canonical) == ["Gemm"]
    assert "two data paths" in said(canonical, "linear layers")


@pytest.mark.parametrize("shape", ["4", "N,4", "N,3,4", "N,2,3,4"])
def test_matmul_with_a_constant_matrix(shape):
    model = parse(f"net (float[{shape}] x) => (float[] y) {{ y = MatMul(x, w) }}", w=random(4, 5))
    canonical = check(model)
    assert ops(canonical) == ["Linear"]
    assert canonical.graph.nodes[0].inputs[1].shape == (5, 4)
    assert canonical.sources == {canonical.graph.nodes[0].name: "MatMul"}


@pytest.mark.parametrize("c", [[5], [1, 5], [1, 1, 5], [], [1]])
@pytest.mark.parametrize("order", ["b, p", "p, b"])
def test_matmul_and_add(c, order):
    model = parse(
        f"""net (float[N,3,4] x) => (float[] y) {{
            p = MatMul(x, w)
            y = Add({order}) }}""",
        w=random(4, 5),
        b=np.asarray(random(*c)),
    )
    canonical = check(model)
    assert ops(canonical) == ["Linear"]
    assert canonical.graph.nodes[0].inputs[2].shape == (5,)


@pytest.mark.parametrize("c", [[3, 5], [3, 1], [1, 1, 1, 5]])
def test_an_add_that_is_more_than_a_bias_stays(c):
    model = parse(
        """net (float[N,3,4] x) => (float[] y) {
            p = MatMul(x, w)
            y = Add(p, b) }""",
        w=random(4, 5),
        b=random(*c),
    )
    assert ops(check(model)) == ["Linear", "Add"]


def test_a_product_that_is_read_twice_keeps_its_add():
    model = parse(
        """net (float[N,4] x) => (float[] y) {
            p = MatMul(x, w)
            a = Add(p, b)
            y = Mul(a, p) }""",
        w=random(4, 5),
        b=random(5),
    )
    assert ops(check(model)) == ["Linear", "Add", "Mul"]


def test_matmul_with_the_constant_first():
    model = parse("net (float[N,4,3] x) => (float[] y) { y = MatMul(w, x) }", w=random(5, 4))
    assert ops(check(model)) == ["Transpose", "Linear", "Transpose"]


def test_a_stack_of_one_matrix_is_a_matrix():
    model = parse("net (float[N,3,4] x) => (float[] y) { y = MatMul(x, w) }", w=random(1, 4, 5))
    assert ops(check(model)) == ["Linear"]
    model = parse("net (float[N,4,3] x) => (float[] y) { y = MatMul(w, x) }", w=random(1, 5, 4))
    assert ops(check(model)) == ["Transpose", "Linear", "Transpose"]


@pytest.mark.parametrize("shape", ["N,4", "N,3,4", "N,2,3,4"])
def test_a_constant_vector_is_a_matrix_of_one_column(shape):
    model = parse(f"net (float[{shape}] x) => (float[] y) {{ y = MatMul(x, w) }}", w=random(4))
    assert ops(check(model)) == ["Linear", "Squeeze"]
    if shape.count(",") > 1:
        model = parse(f"net (float[{shape}] x) => (float[] y) {{ y = MatMul(w, x) }}", w=random(3))
        assert ops(check(model)) == ["Transpose", "Linear", "Squeeze"]


@pytest.mark.parametrize(("x", "w"), [("2,3,4", [2, 4, 5]), ("N,4", [1, 4, 5])])
def test_other_products_stay(x, w):
    model = parse(f"net (float[{x}] x) => (float[] y) {{ y = MatMul(x, w) }}", w=random(*w))
    canonical = check(model, free_batch=False)
    assert ops(canonical) == ["MatMul"]
    assert "a matrix is expected" in said(canonical, "linear layers")


def test_a_transposed_weight_is_folded_first():
    """As unoptimized exports write a linear layer."""
    model = parse(
        """net (float[N,3,4] x) => (float[] y) {
            t = Transpose<perm=[1,0]>(fc_weight)
            p = MatMul(x, t)
            y = Add(fc_bias, p) }""",
        **{"fc_weight": random(5, 4), "fc_bias": random(5)},
    )
    canonical = check(model)
    assert ops(canonical) == ["Linear"]
    assert list(canonical.weights.values()) == ["fc_weight"]


def test_integers_stay():
    model = parse(
        "net (int32[N,4] x) => (int32[] y) { y = MatMul(x, w) }", w=np.arange(20, dtype=np.int32).reshape(4, 5)
    )
    assert ops(check(model)) == ["MatMul"]


def test_half_precision_keeps_its_type():
    model = parse(
        "net (float16[N,4] x) => (float16[] y) { y = Gemm<alpha=0.5>(x, w) }", w=random(4, 5).astype(np.float16)
    )
    canonical = check(model, tolerance=1e-3)
    assert canonical.graph.nodes[0].inputs[1].dtype == np.float16


def test_a_shared_weight_is_shared_by_both_layers():
    model = parse(
        """net (float[N,4] x) => (float[] y) {
            a = Gemm<transB=1>(x, w, b)
            r = Relu(a)
            y = Gemm<transB=1>(r, w, b) }""",
        w=random(4, 4),
        b=random(4),
    )
    canonical = check(model)
    assert ops(canonical) == ["Linear", "Relu", "Linear"]
    assert list(canonical.weights.values()) == ["w", "w"]
