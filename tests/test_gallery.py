"""Pictures of reference samples. Oracles: pixels by hand, and pictures found again where they were put."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pandas", reason="the index needs the extra [index]")

import pandas
from PIL import Image

from onnxcrp.analysis import gallery as drawing
from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.index.reference import Reference, ReferenceSamples
from onnxcrp.picture import plot
from onnxcrp.picture.gallery import BAR_WIDTH, Group, Strip, dimmed, gallery, heatmap_tile, picture_tile
from onnxcrp.picture.signals import MARK, PALE, pieces_image, signal_tile
from onnxcrp.picture.text import INK

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def boxes(image: Image.Image, color) -> tuple[slice, slice] | None:
    """The smallest box around all pixels of a colour."""
    found = (np.asarray(image) == np.array(color)).all(-1)
    if not found.any():
        return None
    rows, columns = (np.flatnonzero(found.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def test_outside_the_mask_it_is_dark():
    picture = np.full((2, 2, 3), 200, np.uint8)
    found = dimmed(picture, np.array([[True, False], [False, True]]))
    assert found[0, 0].tolist() == found[1, 1].tolist() == [200] * 3
    assert found[0, 1].tolist() == found[1, 0].tolist() == [60] * 3  # 0.3 of it


def test_a_picture_is_fitted_into_a_square_and_its_box_marked():
    picture = np.zeros((50, 100, 3), np.uint8)
    tile = picture_tile(picture, side=100, box=(slice(10, 30), slice(40, 60)))
    assert tile.size == (100, 100)
    rows, columns = boxes(tile, MARK)
    assert (rows.start, rows.stop) == (25 + 9, 25 + 31)  # 25 white rows above, a line outside the box
    assert (columns.start, columns.stop) == (39, 61)
    assert tile.getpixel((50, 10)) == tile.getpixel((50, 90)) == WHITE


def test_few_pixels_stay_blocks():
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 0] = 255
    tile = np.asarray(picture_tile(picture, side=80))
    assert (tile[2:39, 2:39] == 255).all()
    assert (tile[42:78, 2:78] == 0).all()


def test_zero_is_white_and_signs_have_colours():
    R = np.zeros((4, 4))
    R[0, 0], R[3, 3] = 2, -2
    tile = np.asarray(heatmap_tile(R, side=80))
    assert tuple(tile[10, 10]) == RED
    assert tuple(tile[70, 70]) == BLUE
    assert (tile[25:55, 25:55] == 255).all()
    over = np.asarray(heatmap_tile(R, np.full((4, 4, 3), 100, np.uint8), side=80))
    assert over[10, 10, 0] > 230
    assert over[10, 10, 1] < 60
    assert len({tuple(p) for p in over[25:55, 25:55].reshape(-1, 3)}) == 1  # the picture alone


def test_groups_hold_their_tiles_in_order():
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 10)]
    tiles = [Image.new("RGB", (60, 60), color) for color in colors]
    lead = Image.new("RGB", (90, 90), (1, 2, 3))
    image = gallery(
        [
            Group("one", "note", [("a", "b"), ("c", "")], [Strip("up", tiles[:2]), Strip("down", tiles[2:])], lead),
            Group("two", bar=-0.5),
        ],
        foot="what colours mean",
    )
    places = [boxes(image, color) for color in (*colors, (1, 2, 3))]
    assert all(place is not None for place in places)
    for rows, columns in places[:4]:
        assert (rows.stop - rows.start, columns.stop - columns.start) == (60, 60)
    assert places[0][0] == places[1][0]
    assert places[2][0] == places[3][0]
    assert places[0][1] == places[2][1]
    assert places[0][0].start == places[4][0].start  # the lead begins where the strips do
    assert places[4][1].stop < places[0][1].start < places[1][1].start
    rows, columns = boxes(image, BLUE)  # half of the bar, and it speaks against
    assert columns.stop - columns.start == BAR_WIDTH // 2 + 1
    assert rows.start > places[2][0].stop


def test_more_columns_than_fit_go_on_below():
    colors = [(200, shade, 30) for shade in range(0, 240, 12)]
    tiles = [Image.new("RGB", (200, 40), color) for color in colors]
    image = gallery([Group("many", strips=[Strip("a", tiles)])])
    assert image.width < 2300
    places = [boxes(image, color) for color in colors]
    assert [columns.start for _, columns in places[:10]] == [columns.start for _, columns in places[10:]]
    assert places[10][0].start == places[0][0].stop + 8


def test_signals_are_marked_and_masked():
    signal = np.sin(np.linspace(0, 20, 100))[None]
    tile = signal_tile(signal, span_of=(25, 50), size=(200, 80))
    rows, columns = boxes(tile, MARK)
    assert (columns.start, columns.stop) == (50, 101)
    assert rows.start > 70
    mask = np.zeros((1, 100), bool)
    mask[0, :50] = True
    dark = (np.asarray(signal_tile(signal, mask=mask, size=(200, 80))) < 80).all(-1)
    assert dark[:, 5:95].any(0).all()
    assert not dark[:, 106:].any()


def test_pieces_lie_over_each_other_at_their_neuron():
    """Three bumps of other heights around zero: their mean is a bump in the middle."""
    pieces = []
    for height in (1.0, 2.0, 3.0):
        t = np.arange(-20, 21) + 0.0
        pieces.append((t, height * np.exp(-0.5 * (t / 3) ** 2)[None]))
    image = np.asarray(pieces_image(pieces, size=(401, 300)))
    dark = np.abs(image.astype(int) - np.array(INK)).max(-1) < 40
    plot_area = dark[:230, 2:399]
    top = np.argwhere(plot_area)[0]  # the highest dark pixel
    assert abs(top[1] + 2 - 200) <= 3
    pale = np.abs(image.astype(int) - np.array(PALE)).max(-1) < 30
    assert np.argwhere(pale[:230])[0][0] < top[0]  # the highest piece is higher than the mean
    mark = np.abs(image[40].astype(int) - np.array(MARK)).sum(-1).argmin()
    assert abs(mark - 200) <= 1


def test_the_mean_is_drawn_where_half_the_pieces_are():
    pieces = [(np.arange(0, 10) + 0.0, np.ones((1, 10))), (np.arange(0, 40) + 0.0, 2 * np.ones((1, 40)))]
    pieces.append((np.arange(0, 10) + 0.0, np.zeros((1, 10))))
    image = np.asarray(pieces_image(pieces, size=(400, 300)))
    dark = (np.abs(image.astype(int) - np.array(INK)).max(-1) < 40)[:230]
    columns = np.flatnonzero(dark.any(0))
    assert columns.max() < 110  # 10 of 40 samples


def test_styles_ask_for_what_they_need():
    assert drawing.parts_for(["full"]) == ("field",)
    assert drawing.parts_for(["masked", "heatmap"]) == ("heatmap",)
    assert set(drawing.parts_for(list(drawing.STYLES))) == {"field", "heatmap"}
    with pytest.raises(QuestionError, match="style is 'nice'"):
        drawing.parts_for(["nice"])


def reference(**given) -> Reference:
    """A picture of 8 x 8 under no field, unless told."""
    usual = {"number": 0, "name": "a", "dataset": "d", "label": 0, "target": 0, "score": 0.5, "position": (1, 1)}
    arrays = {"x": np.zeros((1, 3, 8, 8)), "picture": np.zeros((8, 8, 3), np.uint8), "signal": None, "field": None}
    return Reference(**(usual | arrays | {"heatmap": None, "center": None} | given))


def test_crops_that_are_the_full_picture_are_not_drawn_twice():
    part = np.zeros((8, 8))
    part[2:5, 3] = 1
    for fields, expected in (([np.ones((8, 8))] * 2, ["full"]), ([np.ones((8, 8)), part], ["full", "crop"])):
        found = ReferenceSamples(
            "a", 0, "relmax", "sum", None, "activation", FRAME, [reference(field=f) for f in fields]
        )
        strips = drawing.strips(found, ["full", "crop"])
        assert [strip.label or "full" for strip in strips] == expected
        assert [len(drawing.strips(found, ["crop"])[0].tiles)] == [2]
    assert reference(field=part).box == (slice(2, 5), slice(3, 4))
    assert boxes(drawing.tile(reference(field=np.ones((8, 8))), "full"), MARK) is None
    assert boxes(drawing.tile(reference(field=part), "full"), MARK) is not None


@pytest.mark.parametrize(
    "drawn",
    [{"picture": np.full((8, 8, 3), 200, np.uint8)}, {"picture": None, "signal": np.zeros((1, 8))}],
    ids=["picture", "signal"],
)
def test_the_legend_says_how_the_mask_is_drawn(drawn):
    """Oracle: which half of the tile has the darker pixels, the one that the mask keeps or the other."""
    heatmap = np.zeros((8, 8) if "signal" not in drawn else (1, 8))
    heatmap[:, :4] = 1
    each = reference(heatmap=heatmap, **drawn)
    kept, other = np.split(np.asarray(drawing.tile(each, "masked").convert("L"))[2:-2, 2:-2], 2, 1)
    found = ReferenceSamples("a", 0, "relmax", "sum", None, "activation", FRAME, [each])
    index = SimpleNamespace(manifest={"question": {"normalize": False}})
    word = "dark" if kept.min() < other.min() else "bright"
    assert drawing.legend(index, [found], ["masked"]).startswith(f"Masked: {word} where")


def test_what_is_neither_picture_nor_signal_is_refused():
    with pytest.raises(InputError, match=r"an input \[6\] cannot be drawn"):
        drawing.tile(reference(picture=None, x=np.zeros((1, 6), np.int64)), "full")


# ---------------------------------------------------------------------------------------------------------------- plot

FRAME = pandas.DataFrame(
    {
        "layer": ["a", "b", "a", "b"],
        "one": ["relmax sum"] * 4,
        "other": ["relmax max"] * 2 + ["actmax sum"] * 2,
        "overlap": [0.5, 0.6, 0.9, 1.0],
        "jaccard": [0.4, 0.5, 0.8, 1.0],
        "overlap_std": [0.1] * 4,
    }
)


def test_the_plot_is_written(tmp_path):
    plot.agreement(FRAME, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    text = plot.agreement(FRAME, tmp_path / "a.svg").read_text()
    assert text.count("<path") > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg"]
    with pytest.raises(InputError, match=r"ending \.xyz"):
        plot.agreement(FRAME, tmp_path / "a.xyz")
    with pytest.raises(OnnxcrpError, match="cannot write"):
        plot.agreement(FRAME, tmp_path / "nowhere" / "a.png")


def test_without_matplotlib_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OnnxcrpError, match="plots need matplotlib") as error:
        plot.agreement(FRAME, tmp_path / "a.png")
    assert "onnxcrp[plot]" in error.value.hint
