"""Oracle: the original model on onnxruntime, and hand-computed pads."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcrp.canonize import canonize
from tests.support.canonical import check, ops, parse, random, said

INFINITY = np.array(-np.inf, np.float32)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (3, 2), (4, 3), (1, 2)])
@pytest.mark.parametrize("size", [7, 8])
def test_auto_pad_of_convolutions(auto, kernel, stride, size):
    model = parse(
        f"""net (float[N,3,{size},{size + 1}] x) => (float[] y) {{
            y = Conv<auto_pad="{auto}", strides=[{stride},{stride}]>(x, w) }}""",
        w=random(4, 3, kernel, kernel),
    )
    (layer,) = check(model).graph.nodes
    assert "auto_pad" not in layer.attrs
    if auto == "VALID":
        assert layer.attrs["pads"] == [0] * 4


def test_same_pads_by_hand():
    """Kernel 3, stride 2 on 8: 4 windows reach to 9, so one is padded: at the end, or at the start."""
    for auto, expected in (("SAME_UPPER", [0, 1]), ("SAME_LOWER", [1, 0])):
        model = parse(
            f'net (float[N,1,8] x) => (float[] y) {{ y = Conv<auto_pad="{auto}", strides=[2]>(x, w) }}',
            w=random(1, 1, 3),
        )
        assert check(model).graph.nodes[0].attrs["pads"] == expected


def test_same_pads_of_a_dilated_kernel_by_hand():
    """A kernel of 3 with dilation 2 spans 5: 4 are padded. onnxruntime declines to run it, so there is no oracle."""
    model = parse(
        'net (float[N,1,8] x) => (float[] y) { y = Conv<auto_pad="SAME_UPPER", dilations=[2]>(x, w) }',
        w=random(1, 1, 3),
    )
    assert canonize(model).graph.nodes[0].attrs["pads"] == [2, 2]


def test_same_pads_of_an_unknown_size():
    text = 'net (float[N,1,L] x) => (float[] y) {{ y = Conv<auto_pad="SAME_UPPER", strides=[{}]>(x, w) }}'
    assert check(parse(text.format(1), w=random(1, 1, 4)), size=7).graph.nodes[0].attrs["pads"] == [1, 2]
    canonical = check(parse(text.format(2), w=random(1, 1, 4)), size=7)
    assert canonical.graph.nodes[0].attrs["auto_pad"] == "SAME_UPPER"
    assert "not known" in said(canonical, "explicit pads")


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("ceil", [0, 1])
def test_auto_pad_of_pools(auto, pool, kernel, stride, ceil):
    model = parse(
        f"""net (float[N,2,7,8] x) => (float[] y) {{
            y = {pool}<auto_pad="{auto}", kernel_shape=[{kernel},{kernel}], strides=[{stride},{stride}],
                       ceil_mode={ceil}>(x) }}""",
        opset=19,
    )
    (node,) = check(model).graph.nodes
    assert "auto_pad" not in node.attrs
    assert node.attrs["dilations"] == [1, 1]


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 2), (5, 3)])
def test_auto_pad_of_transposed_convolutions(auto, kernel, stride):
    model = parse(
        f"""net (float[N,2,5,6] x) => (float[] y) {{
            y = ConvTranspose<auto_pad="{auto}", strides=[{stride},{stride}]>(x, w) }}""",
        w=random(2, 3, kernel, kernel),
    )
    (node,) = check(model).graph.nodes
    assert "auto_pad" not in node.attrs


@pytest.mark.parametrize("auto", ["", 'auto_pad="SAME_UPPER", ', 'auto_pad="SAME_LOWER", '])
@pytest.mark.parametrize("shape", [(9, 12), (10, 11), (8, 9)])
@pytest.mark.parametrize("padding", ["", "output_padding=[1,0], "])
def test_output_shape(auto, shape, padding):
    model = parse(
        f"""net (float[N,2,5,6] x) => (float[] y) {{
            y = ConvTranspose<{auto}{padding}strides=[2,2], output_shape=[{shape[0]},{shape[1]}]>(x, w) }}""",
        w=random(2, 3, 3, 3),
    )
    (node,) = check(model).graph.nodes
    assert "output_shape" not in node.attrs


def test_defaults_are_written_down():
    model = parse(
        """net (float[N,2,9,9] x) => (float[] y) {
            c = Conv(x, w)
            t = ConvTranspose(c, w)
            m = MaxPool<kernel_shape=[2,2]>(t)
            y = AveragePool<kernel_shape=[2,2]>(m) }""",
        w=random(2, 2, 3, 3),
    )
    canonical = check(model)
    window = {"strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4}
    kernel = [{"kernel_shape": [k, k]} for k in (3, 3, 2, 2)]
    conv, transposed, largest, average = (node.attrs for node in canonical.graph.nodes)
    assert conv == window | kernel[0] | {"group": 1}
    assert transposed == window | kernel[1] | {"group": 1, "output_padding": [0, 0]}
    assert largest == window | kernel[2] | {"ceil_mode": 0}
    del window["dilations"]  # of AveragePool since opset 19
    assert average == window | kernel[3] | {"ceil_mode": 0, "count_include_pad": 0}


def pad(amounts, **more):
    return {"amounts": np.array(amounts, np.int64), **more}


def test_a_pad_is_the_padding_of_the_convolution_after_it():
    model = parse(
        """net (float[N,2,7,8] x) => (float[] y) {
            p = Pad(x, amounts)
            y = Conv<pads=[1,0,0,1], strides=[2,2]>(p, w) }""",
        w=random(3, 2, 3, 3),
        **pad([0, 0, 1, 2, 0, 0, 0, 3]),
    )
    canonical = check(model)
    assert ops(canonical) == ["Conv"]
    assert canonical.graph.nodes[0].attrs["pads"] == [2, 2, 0, 4]


def test_a_pad_of_some_axes():
    model = parse(
        """net (float[N,2,7,8] x) => (float[] y) {
            p = Pad(x, amounts, , axes)
            y = Conv(p, w) }""",
        w=random(3, 2, 3, 3),
        **pad([1, 2], axes=np.array([-1], np.int64)),
    )
    canonical = check(model)
    assert canonical.graph.nodes[0].attrs["pads"] == [0, 1, 0, 2]


def test_a_pad_with_several_readers():
    text = """net (float[N,2,7,8] x) => (float[] y, float[] z) {{
            p = Pad(x, amounts)
            y = Conv(p, w)
            z = {}(p) }}"""
    weights = {"w": random(3, 2, 3, 3), **pad([0, 0, 1, 1, 0, 0, 1, 1])}
    assert ops(check(parse(text.format("Relu"), **weights))) == ["Pad", "Conv", "Relu"]
    assert ops(check(parse(text.format("AveragePool<kernel_shape=[2,2]>"), **weights))) == ["Conv", "AveragePool"]


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("pads", ["0,0,0,0", "1,1,1,1"])
def test_a_pad_before_an_average(ceil, include, pads):
    model = parse(
        f"""net (float[N,2,6,7] x) => (float[] y) {{
            p = Pad(x, amounts)
            y = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode={ceil}, count_include_pad={include},
                            pads=[{pads}]>(p) }}""",
        **pad([0, 0, 1, 0, 0, 0, 1, 1]),
    )
    folds = not ceil and (include == 1 or pads == "0,0,0,0")
    assert ops(check(model)) == ["AveragePool"] if folds else ["Pad", "AveragePool"]


def test_a_pad_wider_than_the_kernel_of_a_pool_stays():
    model = parse(
        """net (float[N,2,6,7] x) => (float[] y) {
            p = Pad(x, amounts)
            y = AveragePool<kernel_shape=[2,2]>(p) }""",
        **pad([0, 0, 2, 0, 0, 0, 0, 0]),
    )
    canonical = check(model)
    assert ops(canonical) == ["Pad", "AveragePool"]
    assert "more than the kernel" in said(canonical, "explicit pads")


@pytest.mark.parametrize(("fill", "folds"), [(0.0, False), (-np.inf, True), (np.finfo(np.float32).min, True)])
def test_a_pad_before_max_pooling(fill, folds):
    model = parse(
        """net (float[N,2,6,7] x) => (float[] y) {
            p = Pad(x, amounts, fill)
            y = MaxPool<kernel_shape=[3,3], strides=[2,2]>(p) }""",
        fill=np.array(fill, np.float32),
        **pad([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    assert ops(check(model)) == (["MaxPool"] if folds else ["Pad", "MaxPool"])


@pytest.mark.parametrize(
    ("attributes", "amounts", "fill", "reason"),
    [
        ('<mode="reflect">', [0, 0, 1, 1, 0, 0, 1, 1], 0, "mode reflect"),
        ("", [0, 0, 1, 1, 0, 0, 1, 1], 2, "pads with 2"),
        ("", [0, 0, -1, 0, 0, 0, 0, 0], 0, "crops"),
        ("", [0, 1, 0, 0, 0, 0, 0, 0], 0, "batch or channels"),
    ],
)
def test_other_pads_stay(attributes, amounts, fill, reason):
    model = parse(
        f"""net (float[N,2,6,7] x) => (float[] y) {{
            p = Pad{attributes}(x, amounts, fill)
            y = Conv(p, w) }}""",
        w=random(3, 2 + amounts[1], 2, 2),
        fill=np.array(fill, np.float32),
        **pad(amounts),
    )
    canonical = check(model)
    assert ops(canonical) == ["Pad", "Conv"]
    assert reason in said(canonical, "explicit pads")


def test_a_computed_pad_stays():
    model = parse(
        """net (float[N,2,6,7] x, int64[8] amounts) => (float[] y) {
            p = Pad(x, amounts)
            y = Conv(p, w) }""",
        w=random(3, 2, 2, 2),
    )
    assert "computed" in said(canonize(model), "explicit pads")


def test_a_pad_by_nothing_is_dropped():
    model = parse("net (float[N,2] x) => (float[] y) { p = Pad(x, amounts) y = Relu(p) }", **pad([0] * 4))
    assert ops(check(model)) == ["Relu"]


@pytest.mark.parametrize("op", ["MaxPool<", "AveragePool<", "AveragePool<count_include_pad=1, "])
def test_windows_that_runtimes_leave_out(op):
    """onnx's shape inference counts a last window that begins in the padding, runtimes do not."""
    model = parse(
        f"""net (float[N,2,7,6] x) => (float[] y) {{
            p = {op}kernel_shape=[3,3], strides=[3,2], pads=[0,0,2,2], ceil_mode=1>(x)
            r = Relu(p)
            y = Conv(r, w) }}""",
        w=random(3, 2, 1, 1),
    )
    canonical = check(model)
    assert canonical.graph.nodes[0].attrs["ceil_mode"] == 0
    assert canonical.graph.nodes[1].outputs[0].shape[1:] == [2, 3, 3]
