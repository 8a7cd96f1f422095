"""Sizes that only the run knows, and what interpolation makes of sizes. Oracle: as in test_ops.py, by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.test_ops import check_transpose, w


def at(*values: float) -> np.ndarray:
    return np.array(values, np.float32 if any(isinstance(v, float) for v in values) else np.int64)


EMPTY = np.zeros(0, np.float32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("op_type", "shapes", "attrs", "constants"),
    [
        ("Slice", [(6, 7)], {}, {1: np.array([2]), 2: np.array([6]), 3: np.array([2])}),
        ("Slice", [(2, 6, 7)], {}, {1: np.array([1, 2]), 2: np.array([5, 6]), 3: np.array([2, 3])}),
        ("ReduceMean", [(3, 4, 5)], {"keepdims": 0}, {1: np.array([2, 3])}),
        ("GlobalMaxPool", [(3, 4, 5)], {}, {}),
        ("GlobalAveragePool", [(3, 4, 5)], {}, {}),
        ("Flatten", [(3, 4)], {}, {}),
        ("Concat", [(3, 4), (2, 4)], {"axis": 1}, {}),
        ("Concat", [(3, 4), (3, 5)], {"axis": 2}, {}),
        ("Resize", [(2, 3, 4)], {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
         {1: np.zeros(0, np.float32), 2: np.array([1, 1, 2, 3], np.float32)}),
        ("Gather", [(3, 5, 6)], {"axis": 2}, {1: at(-1, 2, -3, 2)}),
        ("Gather", [(3, 5, 6)], {"axis": -1}, {1: np.array(-2)}),
        ("Tile", [(3, 4, 5)], {}, {1: at(1, 2, 3, 1)}),
        ("Pad", [(3, 6, 5)], {"mode": "reflect"}, {1: at(0, 0, 2, 1, 0, 0, 1, 3)}),
        ("Pad", [(3, 6, 5)], {"mode": "edge"}, {1: at(2, -1, 1, 3), 2: np.float32(0), 3: at(-1, 2)}),
    ],
)  # fmt: skip
def test_dynamic_sizes(op_type: str, shapes: Any, attrs: Any, constants: Any, dynamic: bool) -> None:
    check_transpose(op_type, shapes, attrs, constants=constants, dynamic=dynamic)
    check_transpose(op_type, shapes, attrs, constants=constants, dynamic=dynamic, conditions=3)


@pytest.mark.parametrize("conditions", [1, 3])
@pytest.mark.parametrize("strides", [[1, 2], [2, 3], [3, 1]])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_windows_that_pad_themselves(auto_pad: str, strides: list[int], conditions: int) -> None:
    """With a stride the padding depends on the size: where only the run knows it, `auto_pad` stays."""
    attrs: dict[str, Any] = {"auto_pad": auto_pad, "strides": strides}
    for size in ((4, 7, 6), (4, 8, 9)):
        weights = {1: w(6, 2, 3, 4)}
        kernel = {"kernel_shape": [3, 4]}
        check_transpose(
            "Conv", [size], {**attrs, **kernel, "group": 2}, constants=weights, dynamic=True, conditions=conditions
        )
        for kind in ({}, {"count_include_pad": 1}):
            check_transpose("AveragePool", [size], {**attrs, **kernel, **kind}, dynamic=True, conditions=conditions)
        check_transpose("MaxPool", [size], {**attrs, **kernel}, dynamic=True, conditions=conditions)


HOW = ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric"]
ROUNDING = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", [*ROUNDING, "linear", "cubic"])
def test_resize_by_factors_that_are_no_whole_numbers(mode: str, how: str, dynamic: bool) -> None:
    """Where a pixel lies half way between two, in float32, the message goes to the one that the runtime took."""
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
    if mode in ROUNDING:
        attrs |= {"mode": "nearest", "nearest_mode": mode}
    for factors in ((1.3, 0.7), (0.6, 1.25), (2.0, 0.5), (1.1, 1.15)):
        scales = {1: EMPTY, 2: at(1.0, 1.0, *factors)}
        check_transpose("Resize", [(2, 7, 6)], attrs, constants=scales, dynamic=dynamic)
        check_transpose("Resize", [(2, 7, 6)], attrs, constants=scales, dynamic=dynamic, conditions=3)
    sizes = {1: EMPTY, 2: EMPTY, 3: at(5, 9)}
    check_transpose("Resize", [(2, 7, 6)], {**attrs, "axes": [-1, 2]}, constants=sizes, dynamic=dynamic)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_keeps_the_aspect_ratio(mode: str, policy: str) -> None:
    """One factor for all axes, not each axis' own size over size."""
    attrs = {"mode": mode, "axes": [2, 3], "keep_aspect_ratio_policy": policy}
    for sizes in (at(5, 12), at(12, 5), at(9, 9)):
        check_transpose("Resize", [(2, 7, 6)], attrs, constants={1: EMPTY, 2: EMPTY, 3: sizes})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("roi", [[0.1, 0.2, 0.9, 0.8], [-0.2, 0.2, 1.3, 0.8]])
def test_resize_of_a_crop(roi: list[float], mode: str) -> None:
    attrs = {"mode": mode, "axes": [2, 3], "coordinate_transformation_mode": "tf_crop_and_resize"}
    for fill in (0.0, 0.5):
        constants = {1: at(*roi), 2: EMPTY, 3: at(5, 4)}
        check_transpose("Resize", [(2, 7, 6)], {**attrs, "extrapolation_value": fill}, constants=constants)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_against_aliasing(mode: str, dynamic: bool) -> None:
    attrs = {"mode": mode, "axes": [2, 3], "antialias": 1}
    check_transpose("Resize", [(2, 7, 6)], attrs, constants={1: EMPTY, 2: EMPTY, 3: at(3, 4)}, dynamic=dynamic)
