"""Labelled panels in rows, the figures of `onnxcrp explain`. Every figure states its scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from onnxcrp.errors import InputError
from onnxcrp.picture.colors import Scale, colormap, overlay_at, resized
from onnxcrp.picture.signals import SIGNAL_WIDTH, signal_image
from onnxcrp.picture.text import HAIRLINE, INK, LABEL, NOTE, PAPER, SOFT, TITLE, font_of, line_height, paragraph

SIDE = 320  # a tile is enlarged, in whole steps, until its longer side has this many pixels
LARGEST = 768  # and reduced beyond
MARGIN, GAP = 32, 20
BAR = 10  # height of a colour bar
WIDEST = 2200  # of a row of tiles, before it is continued on the next line


@dataclass(frozen=True)
class Panel:
    """One labelled field of a figure: a picture, relevance, relevance over a picture, or a signal.

    picture: uint8 RGB [H, W, 3]; R: [h, w], or [leads, L] beside signal [leads, L]; with both picture and R it is an
    overlay. note: a second, softer line.
    """

    label: str
    picture: np.ndarray | None = None
    R: np.ndarray | None = None
    signal: np.ndarray | None = None
    note: str = ""


def panels(
    rows: Sequence[Panel] | Sequence[Sequence[Panel]],
    *,
    title: str = "",
    cmap: str = "bwr",
    normalize: str = "each",
    percentile: float | None = None,
    rate: float | None = None,
    leads: Sequence[str] = (),
) -> Image.Image:
    """A figure of labelled panels, row by row, with a colour bar for all ("joint") or under each ("each").

    percentile: clip the scale there, against single outliers. rate: samples per second of signals, else the axis
    counts samples; leads: their names. Raises InputError for an unknown colormap or normalization.
    """
    if normalize not in ("each", "joint"):
        raise InputError(f"normalize is {normalize!r}", hint="each or joint")
    colormap(cmap)
    table: list[list[Panel]] = [[row] if isinstance(row, Panel) else list(row) for row in rows]
    if rows and isinstance(rows[0], Panel):
        table = [[panel for row in table for panel in row]]
    every = [panel for row in table for panel in row]
    relevance = [panel.R for panel in every if panel.R is not None]
    if not every:
        raise InputError("a figure needs at least one panel")
    joint = Scale.of(*relevance, cmap=cmap, percentile=percentile) if normalize == "joint" else None
    of = {
        id(panel): joint or Scale.of(panel.R, cmap=cmap, percentile=percentile)
        for panel in every
        if panel.R is not None
    }
    side = max(map(_side, every))
    bodies = {id(panel): _body(panel, of.get(id(panel)), side, rate, leads) for panel in every}
    lines = [line for row in table for line in _wrapped(row, bodies)]
    tiles = []
    for line in lines:
        texts = [_texts(panel, bodies[id(panel)].width) for panel in line]
        tall = max(text.height for text in texts)
        bars = [of.get(id(panel)) if joint is None else None for panel in line]
        tiles.append([_tile(t, tall, bodies[id(p)], bar) for p, t, bar in zip(line, texts, bars, strict=True)])
    column = [
        max(tiles[y][x].width for y in range(len(tiles)) if x < len(tiles[y])) for x in range(max(map(len, tiles)))
    ]
    wide = sum(column) + GAP * (len(column) - 1)
    heading = paragraph(title, TITLE, INK, wide) if title else None
    foot = legend(joint, min(max(wide, 1), 280)) if joint and relevance else None
    heights = [max(tile.height for tile in line) for line in tiles]
    height = 2 * MARGIN + sum(heights) + GAP * (len(heights) - 1)
    height += (heading.height + GAP if heading else 0) + (foot.height + GAP if foot else 0)
    figure = Image.new("RGB", (max(wide, foot.width if foot else 0) + 2 * MARGIN, height), PAPER)
    y = MARGIN
    if heading:
        figure.paste(heading, (MARGIN, y))
        y += heading.height + GAP
    for row_of_tiles, tall in zip(tiles, heights, strict=True):
        x = MARGIN
        for tile, width in zip(row_of_tiles, column, strict=False):
            figure.paste(tile, (x, y))
            x += width + GAP
        y += tall + GAP
    if foot:
        figure.paste(foot, (figure.width - MARGIN - foot.width, y))
    return figure


def _wrapped(row: Sequence[Panel], bodies: dict[int, Image.Image]) -> list[list[Panel]]:
    """A row in as many lines as its width needs, signals one below the other; lines of nearly equal length."""
    widest = max(bodies[id(panel)].width for panel in row)
    fit = 1 if any(panel.signal is not None for panel in row) else max(1, (WIDEST + GAP) // (widest + GAP))
    count = math.ceil(len(row) / fit)
    per_line = math.ceil(len(row) / count)
    return [list(row[at : at + per_line]) for at in range(0, len(row), per_line)]


def _side(panel: Panel) -> int:
    """The longer side of a panel, enlarged in whole steps until it is large enough to look at."""
    shown = panel.picture if panel.picture is not None else panel.R
    if panel.signal is not None or shown is None:
        return SIDE
    longer = max(shown.shape[:2])
    return min(longer * math.ceil(SIDE / longer), LARGEST)


def _body(panel: Panel, scale: Scale | None, side: int, rate: float | None, leads: Sequence[str]) -> Image.Image:
    """What a panel shows, without its label."""
    if panel.signal is not None:
        return signal_image(np.atleast_2d(panel.signal), panel.R, scale, rate, leads)
    R = None if panel.R is None else np.where(np.isfinite(panel.R), panel.R, 0.0)
    seen = panel.picture
    if seen is None and R is None:
        raise InputError(f"panel {panel.label!r} has nothing to show")
    shape = seen.shape[:2] if seen is not None else R.shape if R is not None else (1, 1)
    tall, wide = (max(1, round(length * side / max(shape))) for length in shape)
    if seen is not None:
        rgb = np.asarray(Image.fromarray(seen).resize((wide, tall), Image.Resampling.BICUBIC))
    if R is not None and scale is not None:
        R = resized(resized(R, shape), (tall, wide))  # first to what the model saw, then enlarged with it
        rgb = scale.rgb(R) if seen is None else overlay_at(rgb, R, scale)
    framed = Image.fromarray(np.pad(rgb, ((1, 1), (1, 1), (0, 0))))
    ImageDraw.Draw(framed).rectangle((0, 0, wide + 1, tall + 1), outline=HAIRLINE)
    return framed


def _texts(panel: Panel, width: int) -> Image.Image:
    """Label and note."""
    texts = [paragraph(panel.label, LABEL, INK, width)]
    if panel.note:
        texts.append(paragraph(panel.note, NOTE, SOFT, width))
    image = Image.new("RGB", (width, sum(text.height for text in texts)), PAPER)
    y = 0
    for text in texts:
        image.paste(text, (0, y))
        y += text.height
    return image


def _tile(texts: Image.Image, tall: int, body: Image.Image, scale: Scale | None) -> Image.Image:
    """Label and note in a height of `tall`, body, and a colour bar where the panel has a scale of its own."""
    bar = bar_image(scale, body.width if body.width < SIGNAL_WIDTH else 280) if scale else None
    tile = Image.new("RGB", (body.width, tall + 8 + body.height + (8 + bar.height if bar else 0)), PAPER)
    tile.paste(texts, (0, 0))
    tile.paste(body, (0, tall + 8))
    if bar:
        tile.paste(bar, (body.width - bar.width, tile.height - bar.height))
    return tile


def bar_image(scale: Scale, width: int) -> Image.Image:
    """A colour bar with its two ends and the middle written below."""
    font = font_of(NOTE)
    image = Image.new("RGB", (width, BAR + 4 + line_height(font)), PAPER)
    steps = np.linspace(-scale.amax if scale.signed else 0, scale.amax, width)
    image.paste(Image.fromarray(np.repeat(scale.rgb(steps)[None], BAR, 0)), (0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, BAR - 1), outline=HAIRLINE)
    low, middle, high = scale.ends
    y = BAR + 4
    draw.text((0, y), low, SOFT, font)
    draw.text(((width - font.getlength(middle)) / 2, y), middle, SOFT, font)
    draw.text((width - font.getlength(high), y), high, SOFT, font)
    return image


def legend(scale: Scale, width: int) -> Image.Image:
    """The colour bar for a whole figure."""
    font = font_of(NOTE)
    text = "relevance"
    bar = bar_image(scale, width)
    wide = math.ceil(font.getlength(text))
    image = Image.new("RGB", (wide + 12 + width, bar.height), PAPER)
    ImageDraw.Draw(image).text((0, (BAR - line_height(font)) // 2 + 1), text, SOFT, font)
    image.paste(bar, (wide + 12, 0))
    return image
