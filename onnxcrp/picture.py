"""Relevance as pictures: colormaps, overlays, labelled panels, signals coloured by relevance. Pillow and numpy only.

Red is evidence for, blue evidence against, zero exactly white (cmap "bwr"); the scale is symmetric, so that equal
strength looks equal. Every figure states its scale.
"""

from __future__ import annotations

import difflib
import math
import os
import secrets
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onnxcrp.errors import InputError, OnnxcrpError

COLORMAPS: dict[str, tuple[tuple[int, int, int], ...]] = {  # colours at equal distances, linear between them
    "bwr": ((0, 0, 255), (255, 255, 255), (255, 0, 0)),
    "seismic": ((0, 0, 76), (0, 0, 255), (255, 255, 255), (255, 0, 0), (128, 0, 0)),
    "coldnhot": ((0, 255, 255), (0, 0, 255), (0, 0, 0), (255, 0, 0), (255, 255, 0)),
    "gray": ((0, 0, 0), (255, 255, 255)),
    "hot": ((10, 0, 0), (133, 0, 0), (255, 0, 0), (255, 128, 0), (255, 255, 0), (255, 255, 128), (255, 255, 255)),
    "viridis": (
        (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
        (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ),
}  # fmt: skip
DIVERGING = {
    "bwr", "seismic", "coldnhot", "coolwarm", "berlin", "managua", "vanimo", "PiYG", "PRGn", "BrBG", "PuOr", "RdGy",
    "RdBu", "RdYlBu", "RdYlGn", "Spectral",
}  # fmt: skip

INK, SOFT, HAIRLINE, PAPER = (34, 34, 38), (120, 120, 128), (218, 218, 222), (255, 255, 255)
SIDE = 320  # a tile is enlarged, in whole steps, until its longer side has this many pixels
LARGEST = 768  # and reduced beyond
MARGIN, GAP = 32, 20
LABEL, NOTE, TITLE = 19, 15, 24  # font sizes
BAR = 10  # height of a colour bar
WIDEST = 2200  # of a row of tiles, before it is continued on the next line

SIGNAL_WIDTH, LEAD_HEIGHT = 960, 132
SUPERSAMPLING = 3


# --------------------------------------------------------------------------------------------------------- colormaps


def diverging(cmap: str) -> bool:
    """Whether zero is the middle of the colormap, always; others span 0..max where nothing is negative."""
    return cmap.removesuffix("_r") in DIVERGING


@cache
def colormap(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Values 0..1 [...] -> uint8 RGB [..., 3]. Names of matplotlib's are known where it is installed.

    Raises InputError for an unknown name.
    """
    if name in COLORMAPS:
        colors = np.array(COLORMAPS[name], np.float64)
        at = np.linspace(0, 1, len(colors))

        def mapped(t: np.ndarray) -> np.ndarray:
            rgb = np.stack([np.interp(t, at, colors[:, channel]) for channel in range(3)], -1)
            return np.rint(rgb).astype(np.uint8)

        return mapped
    try:
        from matplotlib import colormaps
    except ImportError:
        found, known = None, list(COLORMAPS)
    else:
        known = [*COLORMAPS, *colormaps]
        found = colormaps.get(name)
    if found is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COLORMAPS)}, or a matplotlib colormap"
        raise InputError(f"unknown colormap {name!r}", hint=hint)
    return lambda t: found(np.asarray(t), bytes=True)[..., :3]


@dataclass(frozen=True)
class Scale:
    """From relevance to colour: `amax` is what the strongest colour stands for."""

    amax: float
    signed: bool
    cmap: str

    @staticmethod
    def of(*relevance: np.ndarray, cmap: str = "bwr", percentile: float | None = None) -> Scale:
        """The common scale of these arrays: the largest absolute value, or that percentile of them."""
        values = np.concatenate([np.asarray(R, np.float64).ravel() for R in relevance] or [np.zeros(0)])
        values = values[np.isfinite(values)]
        strength = np.abs(values)
        amax = 0.0
        if values.size:
            amax = float(strength.max() if percentile is None else np.percentile(strength, percentile))
            amax = amax or float(strength.max())  # more zeros than the percentile leaves out
        return Scale(amax, diverging(cmap) or bool((values < 0).any()), cmap)

    def position(self, R: np.ndarray) -> np.ndarray:
        """[...] -> 0..1 along the colormap; values beyond the scale take its ends."""
        share = np.clip(np.nan_to_num(np.asarray(R, np.float64) / (self.amax or 1.0)), -1, 1)
        return (share + 1) / 2 if self.signed else share

    def strength(self, R: np.ndarray) -> np.ndarray:
        """[...] -> |R| / amax, 0..1."""
        return np.clip(np.nan_to_num(np.abs(np.asarray(R, np.float64)) / (self.amax or 1.0)), 0, 1)

    def rgb(self, R: np.ndarray) -> np.ndarray:
        """[...] -> uint8 RGB [..., 3]; where nothing is finite or everything zero, it is white."""
        R = np.asarray(R, np.float64)
        colors = colormap(self.cmap)(self.position(R))
        blank = ~np.isfinite(R) if self.amax else np.ones(R.shape, bool)
        return np.where(blank[..., None], np.uint8(255), colors)

    @property
    def ends(self) -> tuple[str, str, str]:
        """What the left end, the middle and the right end of the colour bar stand for."""
        if self.signed:
            return (number(-self.amax), "0", number(self.amax))
        return ("0", "", number(self.amax))


def heatmap_rgb(
    R: np.ndarray, cmap: str = "bwr", amax: float | None = None, *, percentile: float | None = None
) -> np.ndarray:
    """Relevance [H, W] -> uint8 RGB [H, W, 3], symmetric around zero, by default up to the largest absolute value."""
    scale = Scale.of(R, cmap=cmap, percentile=percentile)
    return (scale if amax is None else Scale(float(amax), scale.signed, cmap)).rgb(R)


def overlay(
    picture: np.ndarray,
    R: np.ndarray,
    cmap: str = "bwr",
    amax: float | None = None,
    *,
    percentile: float | None = None,
) -> np.ndarray:
    """The picture, grey and light, under the relevance [h, w], which is resized to it: uint8 RGB [H, W, 3].

    The stronger the relevance, the more its colour covers the picture; where it is zero, only the picture is seen.
    """
    scale = Scale.of(R, cmap=cmap, percentile=percentile)
    return _overlay(picture, R, scale if amax is None else Scale(float(amax), scale.signed, cmap))


def _overlay(picture: np.ndarray, R: np.ndarray, scale: Scale) -> np.ndarray:
    R = np.nan_to_num(np.asarray(R, np.float64), posinf=0, neginf=0)
    if R.shape != picture.shape[:2]:
        R = resized(R, picture.shape[:2])
    grey = picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    ground = np.repeat((90 + grey * (165 / 255))[..., None], 3, -1)  # light, so that both colours stand out
    strength = scale.strength(R)
    pure = np.sign(R) * np.maximum(strength, 0.6) * scale.amax if diverging(scale.cmap) else R
    cover = (0.92 * strength**0.7)[..., None]
    return np.rint(ground * (1 - cover) + colormap(scale.cmap)(scale.position(pure)) * cover).astype(np.uint8)


def resized(R: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Relevance [h, w] -> [H, W]: averaged where it gets smaller, else blocks: no values that were not there."""
    height, width = shape
    if height < R.shape[0] or width < R.shape[1]:
        small = Image.fromarray(R.astype(np.float32)).resize(
            (min(width, R.shape[1]), min(height, R.shape[0])), Image.Resampling.BOX
        )
        R = np.asarray(small, np.float64)
    return R[(np.arange(height) * R.shape[0]) // height][:, (np.arange(width) * R.shape[1]) // width]


def number(value: float) -> str:
    """Three digits: what a colour bar says."""
    if value == 0:
        return "0"
    text = f"{value:.3g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text


# ------------------------------------------------------------------------------------------------------------- panels


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
    heading = _paragraph(title, TITLE, INK, wide) if title else None
    foot = _legend(joint, min(max(wide, 1), 280)) if joint and relevance else None
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
        return _signal(np.atleast_2d(panel.signal), panel.R, scale, rate, leads)
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
        rgb = scale.rgb(R) if seen is None else _overlay(rgb, R, scale)
    framed = Image.fromarray(np.pad(rgb, ((1, 1), (1, 1), (0, 0))))
    ImageDraw.Draw(framed).rectangle((0, 0, wide + 1, tall + 1), outline=HAIRLINE)
    return framed


def _texts(panel: Panel, width: int) -> Image.Image:
    """Label and note."""
    texts = [_paragraph(panel.label, LABEL, INK, width)]
    if panel.note:
        texts.append(_paragraph(panel.note, NOTE, SOFT, width))
    image = Image.new("RGB", (width, sum(text.height for text in texts)), PAPER)
    y = 0
    for text in texts:
        image.paste(text, (0, y))
        y += text.height
    return image


def _tile(texts: Image.Image, tall: int, body: Image.Image, scale: Scale | None) -> Image.Image:
    """Label and note in a height of `tall`, body, and a colour bar where the panel has a scale of its own."""
    bar = _bar(scale, body.width if body.width < SIGNAL_WIDTH else 280) if scale else None
    tile = Image.new("RGB", (body.width, tall + 8 + body.height + (8 + bar.height if bar else 0)), PAPER)
    tile.paste(texts, (0, 0))
    tile.paste(body, (0, tall + 8))
    if bar:
        tile.paste(bar, (body.width - bar.width, tile.height - bar.height))
    return tile


def _bar(scale: Scale, width: int) -> Image.Image:
    """A colour bar with its two ends and the middle written below."""
    font = _font(NOTE)
    image = Image.new("RGB", (width, BAR + 4 + _line_height(font)), PAPER)
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


def _legend(scale: Scale, width: int) -> Image.Image:
    """The colour bar for a whole figure."""
    font = _font(NOTE)
    text = "relevance"
    bar = _bar(scale, width)
    wide = math.ceil(font.getlength(text))
    image = Image.new("RGB", (wide + 12 + width, bar.height), PAPER)
    ImageDraw.Draw(image).text((0, (BAR - _line_height(font)) // 2 + 1), text, SOFT, font)
    image.paste(bar, (wide + 12, 0))
    return image


OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Arial.ttf")


@cache
def _font(size: int, other: bool = False) -> Any:
    """Pillow's own font; `other`: one of the system's with more letters, None if there is none."""
    if not other:
        return ImageFont.load_default(size)
    for name in OTHER_FONTS:
        try:
            return ImageFont.truetype(name, round(size * 0.92))
        except OSError:
            continue
    return None


@cache
def _drawable(character: str) -> bool:
    """Whether Pillow's own font, which holds little more than ASCII, has a glyph for it."""
    font = _font(20)
    return character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask("\ue123"))


def _font_for(text: str, size: int) -> tuple[str, Any]:
    """The text and a font that can draw it; where none is found, accents go and other letters become "?"."""
    if all(map(_drawable, text)):
        return text, _font(size)
    if other := _font(size, other=True):
        return text, other
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if _drawable(c) else "?" for c in plain), _font(size)


def _line_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


def _paragraph(text: str, size: int, color: tuple[int, int, int], width: int, *, most: int = 2) -> Image.Image:
    """Text in lines of at most `width` pixels, no more than `most`, the rest an ellipsis."""
    rest, font = _font_for(" ".join(text.split()), size)
    lines: list[str] = []
    while rest and len(lines) < most:
        cut = min(len(rest), width // 2)  # no letter is narrower than two pixels
        while cut > 1 and font.getlength(rest[:cut]) > width:
            blank = rest.rfind(" ", 1, cut)
            cut = blank if blank > 0 else cut - 1
        lines.append(rest[:cut].strip())
        rest = rest[cut:].strip()
    if rest:
        last = f"{lines[-1]} {rest[: width // 2]}"
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    pitch = _line_height(font) + 2
    image = Image.new("RGB", (width, max(1, len(lines)) * pitch), PAPER)
    draw = ImageDraw.Draw(image)
    for number_, line in enumerate(lines):
        draw.text((0, number_ * pitch), line, color, font)
    return image


# ------------------------------------------------------------------------------------------------------------ signals


def _signal(
    signal: np.ndarray, R: np.ndarray | None, scale: Scale | None, rate: float | None, leads: Sequence[str]
) -> Image.Image:
    """Signals [leads, L] one below the other, the line and the ground behind it coloured by relevance [leads, L]."""
    if R is not None:
        R = np.atleast_2d(np.asarray(R, np.float64))
        if R.shape not in (signal.shape, (1, signal.shape[1])):
            raise InputError(f"relevance {list(R.shape)} does not belong to a signal {list(signal.shape)}")
        R = np.broadcast_to(R, signal.shape)
    count, length = signal.shape
    tall = LEAD_HEIGHT + (60 if count == 1 else 0)
    font = _font(NOTE)
    names = [leads[row] if row < len(leads) else "" for row in range(count)]
    y_ticks = [_ticks(*_span(lead), 3) for lead in signal]
    left = 14 + math.ceil(max(font.getlength(_plain(value)) for ticks in y_ticks for value in ticks))
    wide = SIGNAL_WIDTH - left
    axis = 12 + 2 * _line_height(font)
    image = Image.new("RGB", (SIGNAL_WIDTH, count * tall + (count - 1) * 8 + axis), PAPER)
    draw = ImageDraw.Draw(image)
    x_ticks = _ticks(0, (length - 1) / (rate or 1), 8)
    place = [left + (tick * (rate or 1) + 0.5) * wide / length for tick in x_ticks]
    for row in range(count):
        top = row * (tall + 8)
        box = (left, top)
        image.paste(_lead(signal[row], None if R is None else R[row], scale, (wide, tall), place, left), box)
        draw.rectangle((left, top, SIGNAL_WIDTH - 1, top + tall - 1), outline=HAIRLINE)
        low, high = _span(signal[row])
        for tick in y_ticks[row]:
            y = top + _height(tick, low, high, tall)
            text = _plain(tick)
            draw.line((left - 4, y, left, y), HAIRLINE)
            draw.text((left - 8 - font.getlength(text), y - _line_height(font) / 2), text, SOFT, font)
        if names[row]:
            name, name_font = _font_for(names[row], NOTE)
            draw.text((left + 8, top + 5), name, SOFT, name_font, stroke_width=2, stroke_fill=PAPER)
    bottom = count * tall + (count - 1) * 8
    for x, tick in zip(place, x_ticks, strict=True):
        text = _plain(tick)
        draw.line((x, bottom, x, bottom + 4), HAIRLINE)
        at = min(max(x - font.getlength(text) / 2, 0), SIGNAL_WIDTH - font.getlength(text))
        draw.text((at, bottom + 7), text, SOFT, font)
    unit = "seconds" if rate else "sample"
    draw.text((left + (wide - font.getlength(unit)) / 2, bottom + 8 + _line_height(font)), unit, SOFT, font)
    return image


def _lead(
    signal: np.ndarray,
    R: np.ndarray | None,
    scale: Scale | None,
    size: tuple[int, int],
    ticks: Sequence[float],
    left: float,
) -> Image.Image:
    """One lead, drawn large and reduced: smooth lines."""
    s = SUPERSAMPLING
    wide, tall = size[0] * s, size[1] * s
    length = len(signal)
    image = Image.new("RGB", (wide, tall), PAPER)
    draw = ImageDraw.Draw(image)
    low, high = _span(signal)
    finite = np.nan_to_num(np.asarray(signal, np.float64), nan=low)
    x = (np.arange(length) + 0.5) * wide / length
    y = np.array([_height(value, low, high, tall) for value in finite])
    if R is not None and scale is not None:
        tint = 1 - 0.42 * scale.strength(R)[:, None]
        ground = np.rint(255 * tint + _pure(R, scale) * (1 - tint)).astype(np.uint8)
        nearest = np.minimum((np.arange(wide) * length) // wide, length - 1)
        image.paste(Image.fromarray(np.ascontiguousarray(np.broadcast_to(ground[nearest], (tall, wide, 3)))))
    for tick in ticks:
        at = (tick - left) * s
        draw.line((at, 0, at, tall), (236, 236, 239), s)
    thick = 2 * s + 1
    colors = np.full((length, 3), INK, np.float64)
    if R is not None and scale is not None:
        strength = scale.strength(R)[:, None] ** 0.5
        colors = np.array(INK) * (1 - strength) + _pure(R, scale) * strength
    for at in range(length - 1):
        middle = ((x[at] + x[at + 1]) / 2, (y[at] + y[at + 1]) / 2)
        first, second = (tuple(int(c) for c in np.rint(colors[i])) for i in (at, at + 1))
        draw.line((x[at], y[at], *middle), first, thick)
        draw.line((*middle, x[at + 1], y[at + 1]), second, thick)
        draw.circle((x[at + 1], y[at + 1]), thick / 2 - 0.5, second)
    if length == 1:
        draw.circle((x[0], y[0]), 2 * thick, tuple(int(c) for c in np.rint(colors[0])))
    return image.resize(size, Image.Resampling.BOX)


def _pure(R: np.ndarray, scale: Scale) -> np.ndarray:
    """[L] -> the colour of each sign at full strength, a little darker so that thin lines are seen: [L, 3]."""
    ends = np.sign(np.nan_to_num(R)) * scale.amax
    return colormap(scale.cmap)(scale.position(ends)).astype(np.float64) * 0.88


def _span(lead: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value of a lead with something to draw between them."""
    finite = np.asarray(lead, np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _height(value: float, low: float, high: float, tall: float) -> float:
    """Where a value is drawn; a tenth of the height stays free above and below."""
    return tall * (0.9 - 0.8 * (value - low) / (high - low))


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within low..high, about as many as asked: steps of 1, 2 or 5."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [tick * step for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _plain(value: float) -> str:
    return number(round(value, 10))


# --------------------------------------------------------------------------------------------------------------- files


def writable(path: str | os.PathLike[str]) -> Path:
    """The path, if its suffix is one that Pillow can write; InputError else."""
    path = Path(path)
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(
            f"{path}: cannot write a picture with the ending {path.suffix or '(none)'}",
            hint="use .png, .jpg, .webp or .pdf",
        )
    return path


def save(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture under a temporary name, then rename it; raises InputError or OnnxcrpError."""
    path = writable(path)
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        image.save(part, dpi=(144, 144), quality=95)
        part.replace(path)
    except (OSError, ValueError, KeyError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise OnnxcrpError(f"cannot write {path}: {reason}", hint="does the folder exist?") from None
    return path
