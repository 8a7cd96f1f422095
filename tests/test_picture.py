"""Oracles: colours worked out by hand, pixels counted in what was drawn, matplotlib's colormaps. No golden pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxcrp import picture
from onnxcrp.errors import InputError, OnnxcrpError
from onnxcrp.picture import Panel, Scale, colormap, heatmap_rgb, overlay, panels, resized, save, writable
from onnxcrp.picture.signals import ticks_of
from onnxcrp.picture.text import HAIRLINE

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
GREY = np.full((8, 8, 3), 128, np.uint8)


def count(image, color) -> int:
    return int((np.asarray(image.convert("RGB")) == np.array(color)).all(-1).sum())


# --------------------------------------------------------------------------------------------------------- colormaps


def test_bwr_by_hand():
    R = np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    expected = [BLUE, (128, 128, 255), WHITE, (255, 128, 128), RED]
    np.testing.assert_array_equal(heatmap_rgb(R)[0], expected)


@pytest.mark.parametrize("cmap", ["bwr", "seismic"])
def test_zero_is_exactly_white_and_signs_mirror_each_other(cmap):
    R = np.random.default_rng(0).normal(size=(20, 20))
    R[3, 4] = 0
    rgb = heatmap_rgb(R, cmap)
    assert tuple(rgb[3, 4]) == WHITE
    assert (rgb[R > 0][:, 0] >= rgb[R > 0][:, 2]).all()
    assert (rgb[R < 0][:, 2] >= rgb[R < 0][:, 0]).all()
    if cmap == "bwr":
        np.testing.assert_array_equal(heatmap_rgb(-R, cmap), rgb[..., ::-1])


@pytest.mark.parametrize("cmap", sorted(picture.COLORMAPS))
@pytest.mark.parametrize("R", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.full((3, 3), -np.inf)])
def test_nothing_is_white(cmap, R):
    assert (heatmap_rgb(R, cmap) == 255).all()


def test_holes_are_white_and_do_not_change_the_scale():
    rgb = heatmap_rgb(np.array([[np.nan, np.inf, 1.0]]))
    np.testing.assert_array_equal(rgb[0], [WHITE, WHITE, RED])


@pytest.mark.parametrize("name", ["bwr", "seismic", "gray", "viridis", "coolwarm", "RdBu_r"])
def test_matplotlib_agrees(name):
    matplotlib = pytest.importorskip("matplotlib")
    t = np.linspace(0, 1, 256)
    reference = matplotlib.colormaps[name](t, bytes=True)[:, :3].astype(int)
    assert np.abs(colormap(name)(t).astype(int) - reference).max() <= (
        20 if name == "viridis" else 1
    )  # ours has ten points


def test_unknown_colormap():
    with pytest.raises(InputError, match=r"unknown colormap 'virdis' \(hint: did you mean viridis"):
        heatmap_rgb(np.ones((2, 2)), "virdis")


def test_one_sided_colormaps_start_at_zero_unless_something_is_negative():
    np.testing.assert_array_equal(heatmap_rgb(np.array([[0.0, 1.0]]), "gray")[0, :, 0], [0, 255])
    np.testing.assert_array_equal(heatmap_rgb(np.array([[-1.0, 0.0, 1.0]]), "gray")[0, :, 0], [0, 128, 255])
    assert Scale.of(np.array([0.0, 4.0]), cmap="gray").ends == ("0", "", "4")
    assert Scale.of(np.array([0.0, 4.0]), cmap="bwr").ends == ("-4", "0", "4")


def test_amax_and_percentile():
    R = np.r_[np.linspace(-1, 1, 201), 1000.0][None]
    assert tuple(heatmap_rgb(R)[0, 0]) == (255, 255, 255)  # one outlier hides everything ...
    assert tuple(heatmap_rgb(R, percentile=99)[0, 0]) == BLUE  # ... unless it is clipped
    assert tuple(heatmap_rgb(R, amax=2)[0, 0]) == (128, 128, 255)
    assert Scale.of(np.r_[np.zeros(99), 5.0], percentile=90).amax == 5  # a percentile of 0 would say nothing


# ---------------------------------------------------------------------------------------------------------- overlays


def test_an_overlay_shows_the_picture_where_relevance_is_zero():
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    R = np.zeros((8, 8))
    bare = overlay(photo, R)
    assert (bare[..., 0] == bare[..., 1]).all()  # grey
    assert (bare[..., 0] == bare[..., 2]).all()
    order = np.argsort(photo @ np.array([0.299, 0.587, 0.114]), axis=None)
    assert (np.diff(bare[..., 0].ravel()[order].astype(int)) >= 0).all()  # as light and dark as the picture
    R[2, 3], R[4, 5] = 1, -1
    marked = overlay(photo, R)
    assert marked[2, 3, 0] > 200 > 60 > marked[2, 3, 2]
    assert marked[4, 5, 2] > 200 > 60 > marked[4, 5, 0]
    R[2, 3] = R[4, 5] = 0
    untouched = np.ones((8, 8), bool)
    untouched[[2, 4], [3, 5]] = False
    np.testing.assert_array_equal(marked[untouched], bare[untouched])


def test_relevance_of_another_size_is_laid_on_the_picture():
    marked = overlay(GREY, np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert (marked[:4, :4] == marked[0, 0]).all()
    assert (marked[4:] == marked[7, 7]).all()


def test_resizing_invents_no_values():
    R = np.random.default_rng(0).normal(size=(7, 5))
    for shape in ((14, 10), (224, 224), (7, 9)):
        assert set(resized(R, shape).ravel()) <= set(R.ravel())
    np.testing.assert_allclose(resized(R.repeat(4, 0).repeat(4, 1), (7, 5)), R, rtol=1e-6)  # smaller: block means


# ------------------------------------------------------------------------------------------------------------- panels


def test_every_panel_is_labelled_and_large_enough():
    R = np.ones((28, 28))
    with_label = np.asarray(panels([Panel("heatmap", R=R, note="class 3")]))
    without = np.asarray(panels([Panel("", R=R)]))
    assert with_label.shape[1] >= 224
    dark = (with_label.max(-1) < 60).sum()
    assert dark > 50  # ink of the label
    assert (without.max(-1) < 60).sum() == 0
    assert (with_label == np.array(RED)).all(-1).sum() >= 224 * 224


def test_longer_labels_have_more_ink_and_at_most_two_lines():
    ink = [
        (np.asarray(panels([Panel(text, R=np.zeros((8, 8)))])).max(-1) < 60).sum() for text in ("a", "a b c d e f g")
    ]
    assert ink[1] > ink[0]
    one, two, many = (panels([Panel("word " * n, R=np.zeros((8, 8)))]).height for n in (1, 12, 200))
    assert one < two == many


@pytest.mark.parametrize("label", ["größer", "狗", "Łódź ‘x’", "a\nb", "x" * 500])
def test_any_label_can_be_drawn(label):
    assert (np.asarray(panels([Panel(label, R=np.zeros((8, 8)), note=label)], title=label)).max(-1) < 60).any()


def test_margins_are_white():
    figure = np.asarray(panels([Panel("heatmap", R=np.ones((8, 8)))] * 3, title="title"))
    for edge in (figure[:8], figure[-8:], figure[:, :8], figure[:, -8:]):
        assert (edge == 255).all()


def test_joint_scaling_compares_panels_and_each_does_not():
    strong, weak = np.full((8, 8), 2.0), np.full((8, 8), 1.0)
    shown = [Panel("strong", R=strong), Panel("weak", R=weak)]
    each, joint = panels(shown, normalize="each"), panels(shown, normalize="joint")
    area = 320 * 320
    assert count(each, RED) >= 2 * area
    assert area <= count(joint, RED) < 2 * area
    assert count(joint, (255, 128, 128)) >= area
    with pytest.raises(InputError, match="each or joint"):
        panels(shown, normalize="both")


def test_colour_bars_one_for_all_or_one_each():
    R = np.zeros((8, 8))
    R[0, 0] = 1  # nothing negative: blue is found in bars only
    shown = [Panel("a", R=R), Panel("b", R=R)]
    each, joint = (int(bluish(panels(shown, normalize=n)).sum()) for n in ("each", "joint"))
    assert each > joint > 0
    assert len(np.flatnonzero(np.diff(bluish(panels(shown, normalize="each")).any(0).astype(int)))) == 4  # two spans


def test_rows_start_on_a_line_of_their_own_and_long_rows_continue():
    tile = Panel("x", R=np.zeros((8, 8)))
    one, two = panels([tile] * 4), panels([[tile] * 2] * 2)
    assert (two.width, two.height) < (one.width, one.height) or two.width < one.width
    assert two.height > one.height
    assert panels([tile] * 20).width < 2400


def test_all_panels_of_a_figure_have_the_same_size():
    large, small = np.full((64, 64), 1.0), np.full((7, 7), 1.0)
    figure = panels([Panel("a", R=large), Panel("b", R=small)])
    assert count(figure, RED) >= 2 * 320 * 320


def test_large_pictures_are_reduced():
    assert max(panels([Panel("a", picture=np.zeros((3000, 1000, 3), np.uint8))]).size) < 1000


def test_an_empty_panel_or_figure():
    with pytest.raises(InputError, match="nothing to show"):
        panels([Panel("a")])
    with pytest.raises(InputError, match="at least one panel"):
        panels([])


# ------------------------------------------------------------------------------------------------------------ signals


def reddish(image) -> np.ndarray:
    rgb = np.asarray(image).astype(int)
    return (rgb[..., 0] - rgb[..., 2] > 40) & (rgb[..., 0] > 120)


def bluish(image) -> np.ndarray:
    rgb = np.asarray(image).astype(int)
    return (rgb[..., 2] - rgb[..., 0] > 40) & (rgb[..., 2] > 120)


def test_a_signal_is_coloured_where_it_is_relevant():
    signal = np.sin(np.linspace(0, 6, 100))[None]
    R = np.zeros((1, 100))
    R[0, 20:30], R[0, 70:80] = 1, -1
    plain = panels([Panel("signal", signal=signal)])
    assert not reddish(plain).any()
    assert not bluish(plain).any()
    image = panels([Panel("signal", signal=signal, R=R)], normalize="joint")
    body = np.asarray(image)[60:240]
    red, blue = np.flatnonzero(reddish(body).any(0)), np.flatnonzero(bluish(body).any(0))
    left = np.flatnonzero((body[90] == HAIRLINE).all(-1))[0]  # the frame
    width = body.shape[1] - 32 - left
    assert np.abs(np.array([red[0], red[-1]]) - (left + width * np.array([0.2, 0.3]))).max() < 0.02 * width
    assert np.abs(np.array([blue[0], blue[-1]]) - (left + width * np.array([0.7, 0.8]))).max() < 0.02 * width


def test_the_line_follows_the_signal():
    signal = np.linspace(0, 1, 50)[None]
    body = np.asarray(panels([Panel("", signal=signal)]))
    ink = body.max(-1) < 60
    columns = np.flatnonzero(ink.any(0))
    rows = [np.flatnonzero(ink[:, x]).mean() for x in columns]
    assert len(columns) > 700
    assert (np.diff(rows) <= 0.5).all()  # rises, that is, its row number falls


def test_one_row_per_lead_and_relevance_for_all_leads_together():
    signal = np.random.default_rng(0).normal(size=(3, 50))
    one, three = (panels([Panel("", signal=signal[:n], R=np.ones((n, 50)))]) for n in (1, 3))
    assert three.height > one.height
    assert three.width == one.width
    shared = panels([Panel("", signal=signal, R=np.ones(50))])
    np.testing.assert_array_equal(np.asarray(shared), np.asarray(three))
    with pytest.raises(InputError, match=r"relevance \[2, 50\] does not belong to a signal \[3, 50\]"):
        panels([Panel("", signal=signal, R=np.ones((2, 50)))])


@pytest.mark.parametrize("signal", [np.zeros((1, 30)), np.full((1, 30), np.nan), np.ones((1, 1)), np.eye(2) * 1e-30])
def test_odd_signals_can_be_drawn(signal):
    assert panels([Panel("a", signal=signal, R=np.zeros(signal.shape))], rate=250, leads=["I"]).width > 900


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [(0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 149, 8, [0, 20, 40, 60, 80, 100, 120, 140]), (-1, 1, 3, [-1, 0, 1]),
     (3, 3, 4, [3])],
)  # fmt: skip
def test_ticks_are_round_numbers(low, high, most, expected):
    np.testing.assert_allclose(ticks_of(low, high, most), expected, atol=1e-12)


def test_ticks_between_features_are_no_fractions():
    assert ticks_of(0, 1, 8, whole=True) == [0, 1]
    assert ticks_of(0, 4, 8, whole=True) == [0, 1, 2, 3, 4]
    assert ticks_of(0, 149, 8, whole=True) == ticks_of(0, 149, 8)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.PNG", "a.webp"])
def test_pictures_are_written_whole(tmp_path, name):
    image = Image.new("RGB", (20, 10), "red")
    save(image, tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.size == (20, 10)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_pictures_that_cannot_be_written(tmp_path):
    image = Image.new("RGB", (2, 2))
    for name in ("a.xyz", "a"):
        with pytest.raises(InputError, match="cannot write a picture with the ending"):
            save(image, tmp_path / name)
    with pytest.raises(OnnxcrpError, match=r"cannot write .*nowhere"):
        save(image, tmp_path / "nowhere" / "a.png")
    assert list(tmp_path.iterdir()) == []
    assert writable(tmp_path / "a.png") == tmp_path / "a.png"
