"""Galleries: groups of small pictures in strips, one group for each concept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from onnxcrp.picture.colors import Scale, colormap, overlay_at, resized
from onnxcrp.picture.panels import MARGIN, WIDEST
from onnxcrp.picture.signals import MARK
from onnxcrp.picture.text import HAIRLINE, INK, NOTE, PAPER, SOFT, TITLE, paragraph

TILE = 136  # pixels of a tile's longer side
NEAR, APART = 8, 30  # between tiles, between groups
HEADING, CAPTION = 18, 14  # font sizes
GUTTER = 86  # for the names of strips
BAR_WIDTH = 160  # of a share of 100 %
DIMMED = 0.3  # brightness outside a mask


@dataclass(frozen=True)
class Strip:
    """Tiles beside each other, one for each column of the group, and what they are."""

    label: str
    tiles: Sequence[Image.Image]


@dataclass(frozen=True)
class Group:
    """What belongs to one concept: strips under a heading, to their left (`lead`) a larger picture of it.

    `captions`: (line, softer line) of each column. `bar`: a share of -1..1 drawn beside the heading.
    """

    title: str
    note: str = ""
    captions: Sequence[tuple[str, str]] = ()
    strips: Sequence[Strip] = ()
    lead: Image.Image | None = None
    lead_caption: tuple[str, str] | None = None
    bar: float | None = None


# -------------------------------------------------------------------------------------------------------------- tiles


def picture_tile(picture: np.ndarray, *, side: int = TILE, box: Sequence[slice] = ()) -> Image.Image:
    """A picture [H, W, 3] in a square of `side` pixels, `box` (rows, columns) outlined in it."""
    tall, wide = _fitted(picture.shape[:2], side)
    image = Image.fromarray(picture).resize((wide, tall), _resampling(picture.shape[:2], side))
    if box:
        rows, columns = box
        y = [edge * tall / picture.shape[0] for edge in (rows.start, rows.stop)]
        x = [edge * wide / picture.shape[1] for edge in (columns.start, columns.stop)]
        corners = (max(x[0] - 1, 0), max(y[0] - 1, 0), min(x[1], wide - 1), min(y[1], tall - 1))
        ImageDraw.Draw(image).rectangle(corners, outline=MARK, width=2)
    return _framed(image, side)


def heatmap_tile(R: np.ndarray, picture: np.ndarray | None = None, *, side: int = TILE) -> Image.Image:
    """Relevance [H, W] on a scale of its own, over the picture where one is given."""
    tall, wide = _fitted(R.shape, side)
    small = resized(np.nan_to_num(R.astype(np.float64), posinf=0, neginf=0), (tall, wide))
    scale = Scale.of(small)
    if picture is None:
        return _framed(Image.fromarray(scale.rgb(small)), side)
    seen = np.asarray(Image.fromarray(picture).resize((wide, tall), _resampling(picture.shape[:2], side)))
    return _framed(Image.fromarray(overlay_at(seen, small, scale)), side)


def dimmed(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture, dark outside the mask."""
    return np.where(mask[..., None], picture, np.rint(picture * DIMMED).astype(np.uint8))


def _fitted(shape: Sequence[int], side: int) -> tuple[int, int]:
    """(height, width) of a picture whose longer side becomes `side`."""
    longer = max(shape)
    return max(1, round(shape[0] * side / longer)), max(1, round(shape[1] * side / longer))


def _resampling(shape: Sequence[int], side: int) -> Image.Resampling:
    """Blocks where few pixels are enlarged, so that each is seen."""
    return Image.Resampling.NEAREST if max(shape) * 4 <= side else Image.Resampling.LANCZOS


def _framed(image: Image.Image, side: int) -> Image.Image:
    square = Image.new("RGB", (side, side), PAPER)
    at = ((side - image.width) // 2, (side - image.height) // 2)
    square.paste(image, at)
    ImageDraw.Draw(square).rectangle((*at, at[0] + image.width - 1, at[1] + image.height - 1), outline=HAIRLINE)
    return square


# ------------------------------------------------------------------------------------------------------------- layout


def gallery(groups: Sequence[Group], *, title: str = "", foot: str = "") -> Image.Image:
    """The groups one below the other, with a title, and a line at the foot that says what colours mean."""
    images = [_group(group) for group in groups]
    wide = max(image.width for image in images)
    lines = [paragraph(title, TITLE, INK, wide)] if title else []
    after = [paragraph(foot, NOTE, SOFT, wide, most=4)] if foot else []
    every = [*lines, *images, *after]
    figure = Image.new("RGB", (wide + 2 * MARGIN, sum(i.height + APART for i in every) - APART + 2 * MARGIN), PAPER)
    y = MARGIN
    for image in every:
        figure.paste(image, (MARGIN, y))
        y += image.height + APART
    return figure


def _group(group: Group) -> Image.Image:
    under = max((_caption(each, TILE).height for each in (*group.captions, group.lead_caption) if each), default=0)
    lead = _lead(group, under)
    left = lead.width + 2 * NEAR if lead else 0
    body = _strips(group, under, WIDEST - left)
    wide = max(left + (body.width if body else 0), 420)
    heading = paragraph(group.title, HEADING, INK, wide - (BAR_WIDTH + NEAR if group.bar is not None else 0), most=1)
    note = paragraph(group.note, NOTE, SOFT, wide) if group.note else None
    top = heading.height + (note.height if note else 0) + NEAR
    tall = max(lead.height if lead else 0, body.height if body else 0)
    image = Image.new("RGB", (wide, top + tall), PAPER)
    image.paste(heading, (0, 0))
    if group.bar is not None:
        _draw_bar(image, group.bar, (_text_width(heading) + 2 * NEAR, (heading.height - 12) // 2))
    if note:
        image.paste(note, (0, heading.height))
    if lead:
        image.paste(lead, (0, top))
    if body:
        image.paste(body, (left, top))
    return image


def _text_width(image: Image.Image) -> int:
    """Where the writing on paper ends."""
    used = np.flatnonzero((np.asarray(image) != np.array(PAPER)).any((0, 2)))
    return int(used[-1]) + 1 if len(used) else 0


def _draw_bar(image: Image.Image, share: float, at: tuple[int, int]) -> None:
    """A share of -1..1 as a length, red for and blue against."""
    x, y = at
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + BAR_WIDTH, y + 11), outline=HAIRLINE)
    end = tuple(int(c) for c in colormap("bwr")(np.array(1.0 if share >= 0 else 0.0)))
    draw.rectangle((x, y, x + round(min(abs(share), 1) * BAR_WIDTH), y + 11), fill=end)


def _lead(group: Group, top: int) -> Image.Image | None:
    """The larger picture below `top` pixels for captions, so that it begins where the strips do."""
    if group.lead is None:
        return None
    image = Image.new("RGB", (group.lead.width, group.lead.height + top), PAPER)
    if group.lead_caption:
        image.paste(_caption(group.lead_caption, group.lead.width), (0, 0))
    image.paste(group.lead, (0, top))
    return image


def _strips(group: Group, top: int, most: int) -> Image.Image | None:
    """The strips, one below the other, below `top` pixels for the captions of their columns.

    Columns that would go beyond `most` pixels are continued below.
    """
    strips = [strip for strip in group.strips if strip.tiles]
    if not strips:
        return None
    gutter = GUTTER if any(strip.label for strip in strips) else 0
    width = max(tile.width for strip in strips for tile in strip.tiles)
    columns = max(len(strip.tiles) for strip in strips)
    lines = math.ceil(columns / max(1, (most - gutter + NEAR) // (width + NEAR)))
    per_line = math.ceil(columns / lines)
    heights = [max(tile.height for tile in strip.tiles) for strip in strips]
    tall = top + sum(heights) + NEAR * (len(strips) - 1)
    image = Image.new("RGB", (gutter + per_line * (width + NEAR) - NEAR, lines * (tall + NEAR) - NEAR), PAPER)

    def place(column: int) -> tuple[int, int]:
        return gutter + column % per_line * (width + NEAR), column // per_line * (tall + NEAR)

    for column, caption in enumerate(group.captions[:columns]):
        image.paste(_caption(caption, width), place(column))
    for number, strip in enumerate(strips):
        below = top + sum(heights[:number]) + NEAR * number
        words = paragraph(strip.label, CAPTION, SOFT, gutter - NEAR, most=4) if strip.label else None
        for line in range(lines):
            if words:
                middle = max((heights[number] - words.height) // 2, 0)
                image.paste(words, (0, line * (tall + NEAR) + below + middle))
        for column, tile in enumerate(strip.tiles):
            x, y = place(column)
            image.paste(tile, (x, y + below))
    return image


def _caption(caption: tuple[str, str], width: int) -> Image.Image:
    """Two short lines, the second softer, nothing for an empty one."""
    lines = [
        paragraph(text, CAPTION, color, width, most=1) for text, color in zip(caption, (INK, SOFT), strict=True) if text
    ]
    image = Image.new("RGB", (width, sum(line.height for line in lines) + 4), PAPER)
    y = 0
    for line in lines:
        image.paste(line, (0, y))
        y += line.height
    return image
