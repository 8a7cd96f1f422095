"""Oracle: the original model on onnxruntime, and the folded weights written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.canonical import check, ops, parse, random, said


def statistics(channels: int, prefix: str = "", shift: bool = True) -> dict[str, np.ndarray]:
    made = {
        "gamma": random(channels, seed=1, low=0.5, high=2) * np.where(np.arange(channels) % 3 == 1, -1, 1),
        "beta": random(channels, seed=2),
        "mean": random(channels, seed=3) * shift,
        "var": random(channels, seed=4, low=0.2, high=2),
    }
    if not shift:
        made["beta"] = np.zeros(channels)
    return {prefix + name: array.astype(np.float32) for name, array in made.items()}


LAYERS = {
    "conv1d": ("Conv<pads=[1,1]>", [6, 4, 3], "N,4,9"),
    "conv2d": ("Conv<pads=[1,0,2,1], strides=[2,1]>", [6, 4, 3, 3], "N,4,9,8"),
    "conv3d": ("Conv<dilations=[1,2,1]>", [6, 4, 2, 2, 2], "N,4,5,6,5"),
    "grouped": ("Conv<group=2>", [6, 2, 3, 3], "N,4,6,6"),
    "depthwise": ("Conv<group=6>", [6, 1, 3, 3], "N,6,6,6"),
    "transposed1d": ("ConvTranspose<strides=[2]>", [4, 6, 3], "N,4,9"),
    "transposed2d": ("ConvTranspose<strides=[2,2], pads=[1,1,0,0]>", [4, 6, 3, 3], "N,4,5,5"),
    "transposed3d": ("ConvTranspose<output_padding=[1,1,1], strides=[2,2,2]>", [4, 6, 2, 2, 2], "N,4,3,3,3"),
    "transposed grouped": ("ConvTranspose<group=2>", [4, 3, 3, 3], "N,4,5,5"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_after_a_convolution_it_folds(layer, bias):
    op, weight, shape = LAYERS[layer]
    head, attributes = op.split("<")
    model = parse(
        f"""net (float[{shape}] x) => (float[] y) {{
            z = {head}<{attributes}(x, w{", b" * bias})
            n = BatchNormalization(z, gamma, beta, mean, var)
            y = Relu(n) }}""",
        w=random(*weight),
        **({"b": random(6)} if bias else {}),
        **statistics(6),
    )
    assert ops(check(model)) == [head, "Relu"]


@pytest.mark.parametrize("bias", [True, False])
def test_after_gemm_it_folds(bias):
    model = parse(
        f"""net (float[N,4] x) => (float[] y) {{
            z = Gemm<transB=1>(x, w{", b" * bias})
            y = BatchNormalization<epsilon=0.01>(z, gamma, beta, mean, var) }}""",
        w=random(6, 4),
        **({"b": random(6)} if bias else {}),
        **statistics(6),
    )
    assert ops(check(model)) == ["Linear"]


def test_after_matmul_and_add_it_folds():
    model = parse(
        """net (float[N,4] x) => (float[] y) {
            p = MatMul(x, w)
            z = Add(b, p)
            y = BatchNormalization(z, gamma, beta, mean, var) }""",
        w=random(4, 6),
        b=random(6),
        **statistics(6),
    )
    assert ops(check(model)) == ["Linear"]


def test_the_folded_weights_are_the_formula():
    w, b, s = random(2, 1, 1, 1), random(2), statistics(2)
    model = parse(
        """net (float[N,1,3,3] x) => (float[] y) {
            z = Conv(x, w, b)
            y = BatchNormalization<epsilon=0.5>(z, gamma, beta, mean, var) }""",
        w=w,
        b=b,
        **s,
    )
    (layer,) = check(model).graph.nodes
    scale = s["gamma"] / np.sqrt(s["var"] + 0.5)
    np.testing.assert_allclose(layer.inputs[1].values, w * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(layer.inputs[2].values, (b - s["mean"]) * scale + s["beta"], rtol=1e-6)
    assert layer.inputs[1].name == "w"


def test_per_token_layers_keep_it():
    """[N, T, C]: BatchNorm normalizes tokens, the layer writes features."""
    model = parse(
        """net (float[N,5,4] x) => (float[] y) {
            z = MatMul(x, w)
            y = BatchNormalization(z, gamma, beta, mean, var) }""",
        w=random(4, 5),
        **statistics(5),
    )
    canonical = check(model)
    assert ops(canonical) == ["Linear", "BatchNormalization"]
    assert "axis 1 is not the output axis" in said(canonical, "fold BatchNorm")


def test_a_second_reader_keeps_it():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            z = Conv(x, w)
            n = BatchNormalization(z, gamma, beta, mean, var)
            y = Add(n, z) }""",
        w=random(4, 3, 3, 3),
        **statistics(4),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv", "BatchNormalization", "Add"]
    assert "read by others too" in said(canonical, "fold BatchNorm")
    assert canonical.graph.nodes[1].attrs == {"epsilon": pytest.approx(1e-5)}


def test_an_output_between_keeps_it():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] z, float[] y) {
            z = Conv(x, w)
            y = BatchNormalization(z, gamma, beta, mean, var) }""",
        w=random(4, 3, 3, 3),
        **statistics(4),
    )
    assert ops(check(model)) == ["Conv", "BatchNormalization"]


def test_a_shared_weight_keeps_it():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            a = Conv(x, w)
            b = BatchNormalization(a, gamma, beta, mean, var)
            c = Relu(b)
            d = Conv<pads=[1,1,1,1]>(c, w)
            y = BatchNormalization(d, gamma, beta, mean, var) }""",
        w=random(3, 3, 3, 3),
        **statistics(3),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv", "BatchNormalization", "Relu", "Conv", "BatchNormalization"]
    assert "the weight 'w' is shared by 2 layers" in said(canonical, "fold BatchNorm")


def test_a_shared_bias_does_not_matter():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            a = Conv(x, w, b)
            c = BatchNormalization(a, gamma, beta, mean, var)
            d = Conv<pads=[1,1,1,1]>(c, v, b)
            y = BatchNormalization(d, gamma, beta, mean, var) }""",
        w=random(3, 3, 3, 3),
        v=random(3, 3, 3, 3, seed=1),
        b=random(3),
        **statistics(3),
    )
    assert ops(check(model)) == ["Conv", "Conv"]


BEFORE = {
    "conv1d": ("Conv", [5, 4, 3], "N,4,9"),
    "conv2d": ("Conv<strides=[2,1]>", [5, 4, 3, 3], "N,4,9,8"),
    "conv3d": ("Conv", [5, 4, 2, 2, 2], "N,4,5,6,5"),
    "grouped": ("Conv<group=2>", [6, 2, 3, 3], "N,4,6,6"),
    "depthwise": ("Conv<group=4>", [8, 1, 3, 3], "N,4,6,6"),
    "gemm": ("Gemm<transB=1>", [5, 4], "N,4"),
}


@pytest.mark.parametrize("layer", BEFORE)
def test_before_an_unpadded_layer_it_folds(layer):
    op, weight, shape = BEFORE[layer]
    model = parse(
        f"""net (float[{shape}] x) => (float[] y) {{
            n = BatchNormalization(x, gamma, beta, mean, var)
            y = {op}(n, w, b) }}""",
        w=random(*weight),
        b=random(weight[0]),
        **statistics(4),
    )
    canonical = check(model)
    assert len(ops(canonical)) == 1, said(canonical, "fold BatchNorm")


def test_before_a_padded_layer_it_stays():
    model = parse(
        """net (float[N,4,6,6] x) => (float[] y) {
            n = BatchNormalization(x, gamma, beta, mean, var)
            y = Conv<pads=[0,0,0,1]>(n, w) }""",
        w=random(5, 4, 3, 3),
        **statistics(4),
    )
    canonical = check(model)
    assert ops(canonical) == ["BatchNormalization", "Conv"]
    assert "pads with zeros" in said(canonical, "fold BatchNorm")


@pytest.mark.parametrize(("op", "weight"), [("Conv<pads=[1,1,1,1]>", [5, 4, 3, 3]), ("ConvTranspose", [4, 5, 3, 3])])
def test_without_shift_padding_does_not_matter(op, weight):
    model = parse(
        f"""net (float[N,4,6,6] x) => (float[] y) {{
            n = BatchNormalization(x, gamma, beta, mean, var)
            y = {op}(n, w) }}""",
        w=random(*weight),
        **statistics(4, shift=False),
    )
    assert len(ops(check(model))) == 1


def test_before_several_layers_it_folds_into_all_or_none():
    text = """net (float[N,4,6,6] x) => (float[] y, float[] z) {{
            n = BatchNormalization(x, gamma, beta, mean, var)
            y = Conv(n, w)
            z = Conv<pads=[{pad},0,0,0]>(n, v) }}"""
    weights = {"w": random(5, 4, 3, 3), "v": random(3, 4, 1, 1), **statistics(4)}
    assert ops(check(parse(text.format(pad=0), **weights))) == ["Conv", "Conv"]
    assert ops(check(parse(text.format(pad=1), **weights))) == ["BatchNormalization", "Conv", "Conv"]


def test_preactivation_keeps_it():
    """A DenseNet layer: BatchNorm, ReLU, convolution."""
    model = parse(
        """net (float[N,4,6,6] x) => (float[] y) {
            n = BatchNormalization(x, gamma, beta, mean, var)
            r = Relu(n)
            y = Conv(r, w) }""",
        w=random(5, 4, 3, 3),
        **statistics(4),
    )
    canonical = check(model)
    assert ops(canonical) == ["BatchNormalization", "Relu", "Conv"]
    assert "no linear layer" in said(canonical, "fold BatchNorm")


def test_training_mode_is_declined():
    model = parse(
        """net (float[4,3,6,6] x) => (float[] y) {
            z = Conv(x, w)
            y, m, v = BatchNormalization<training_mode=1>(z, gamma, beta, mean, var) }""",
        opset=15,
        w=random(4, 3, 3, 3),
        **statistics(4),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv", "BatchNormalization"]
    assert "training mode" in said(canonical, "fold BatchNorm")


def test_computed_parameters_are_declined():
    model = parse(
        """net (float[N,3,6,6] x, float[3] g) => (float[] y) {
            z = Conv(x, w)
            y = BatchNormalization(z, g, beta, mean, var) }""",
        w=random(3, 3, 3, 3),
        **{k: v for k, v in statistics(3).items() if k != "gamma"},
    )
    assert "no constants" in said(check(model), "fold BatchNorm")


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("Add(z, c)", [4, 1, 1]),  # as CNTK writes a bias
        ("Add(c, z)", [1, 4, 1, 1]),
        ("Mul(z, c)", [4, 1, 1]),
        ("Sub(z, c)", [1, 1, 1]),
        ("Sub(c, z)", [4, 1, 1]),
        ("Div(z, c)", [1, 4, 1, 1]),
        ("Mul(c, z)", []),
    ],
)
def test_constants_per_channel_fold(expression, shape):
    model = parse(
        f"""net (float[N,3,6,6] x) => (float[] y) {{
            z = Conv(x, w)
            y = {expression} }}""",
        w=random(4, 3, 3, 3),
        c=np.asarray(random(*shape, low=0.5, high=2)),
    )
    assert ops(check(model)) == ["Conv"]


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("Add(z, c)", [4]),  # along the width
        ("Add(z, c)", [4, 4, 4]),
        ("Div(c, z)", [4, 1, 1]),
        ("Add(z, c)", [1, 1, 4, 1, 1]),  # one more axis
        ("Add(z, c)", [2, 4, 1, 1]),
    ],
)
def test_other_constants_stay(expression, shape):
    model = parse(
        f"""net (float[2,3,6,6] x) => (float[] y) {{
            z = Conv(x, w)
            y = {expression} }}""",
        w=random(4, 3, 3, 3),
        c=random(*shape, low=0.5, high=2),
    )
    assert len(ops(check(model, free_batch=False))) == 2


def test_constants_per_feature_fold_into_linear_layers():
    model = parse(
        """net (float[N,5,3] x) => (float[] y) {
            p = MatMul(x, w)
            a = Add(p, b)
            y = Mul(a, c) }""",
        w=random(3, 4),
        b=random(4),
        c=random(1, 1, 4),
    )
    assert ops(check(model)) == ["Linear"]


def test_one_channel_may_not_grow():
    """A constant of 3 channels broadcasts the single channel of the layer: more than a scale."""
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            z = Conv(x, w)
            y = Mul(z, c) }""",
        w=random(1, 3, 3, 3),
        c=random(3, 1, 1),
    )
    assert ops(check(model)) == ["Conv", "Mul"]


def test_what_stands_behind_moved_axes_folds():
    """Channels last, as Keras writes its layers: bias, mean, scale and shift on the last axis."""
    model = parse(
        """net (float[N,4,6,5] x) => (float[] y) {
            z = Conv(x, w)
            t = Transpose<perm=[0,2,3,1]>(z)
            c = Sub(t, mean)
            s = Mul(c, gamma)
            a = Add(s, beta)
            y = Relu(a) }""",
        w=random(6, 4, 3, 3),
        mean=random(6),
        gamma=random(1, 1, 1, 6),
        beta=random(6, seed=3),
    )
    assert ops(check(model)) == ["Conv", "Transpose", "Relu"]


def test_a_convolution_of_one_row_gets_its_bias():
    """Conv1D as TensorFlow lowers it: the row is squeezed out before the bias is added."""
    model = parse(
        """net (float[N,4,1,9] x) => (float[] y) {
            z = Conv(x, w)
            t = Squeeze(z, axes)
            y = Add(t, b) }""",
        w=random(6, 4, 1, 3),
        axes=np.array([2]),
        b=random(6, 1),
    )
    assert ops(check(model)) == ["Conv", "Squeeze"]


def test_what_is_no_constant_per_channel_stays_behind_moved_axes():
    model = parse(
        """net (float[N,4,6,5] x) => (float[] y, float[] also) {
            z = Conv(x, w)
            t = Transpose<perm=[0,2,3,1]>(z)
            y = Add(t, rows)
            m = Conv(x, v)
            also = Transpose<perm=[0,2,3,1]>(m)
            used = Add(also, b)
            u = Relu(used) }""",
        w=random(6, 4, 3, 3),
        v=random(6, 4, 3, 3, seed=5),
        rows=random(4, 1, 1),
        b=random(6),
    )
    assert ops(check(model)).count("Add") == 1  # of the rows; the other is read by nobody
