"""Signals as curves, coloured by relevance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from onnxcrp.errors import InputError
from onnxcrp.picture.colors import Scale, colormap, number
from onnxcrp.picture.text import HAIRLINE, INK, NOTE, PAPER, SOFT, font_for, font_of, line_height

SIGNAL_WIDTH, LEAD_HEIGHT = 960, 132
SUPERSAMPLING = 3
MARK, PALE = (230, 140, 30), (165, 178, 205)  # what points at a place, lines among many


def signal_image(
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
    font = font_of(NOTE)
    names = [leads[row] if row < len(leads) else "" for row in range(count)]
    y_ticks = [ticks_of(*span(lead), 3) for lead in signal]
    left = 14 + math.ceil(max(font.getlength(plain(value)) for ticks in y_ticks for value in ticks))
    wide = SIGNAL_WIDTH - left
    axis = 12 + 2 * line_height(font)
    image = Image.new("RGB", (SIGNAL_WIDTH, count * tall + (count - 1) * 8 + axis), PAPER)
    draw = ImageDraw.Draw(image)
    x_ticks = ticks_of(0, (length - 1) / (rate or 1), 8, whole=not rate)
    place = [left + (tick * (rate or 1) + 0.5) * wide / length for tick in x_ticks]
    for row in range(count):
        top = row * (tall + 8)
        box = (left, top)
        image.paste(lead_image(signal[row], None if R is None else R[row], scale, (wide, tall), place, left), box)
        draw.rectangle((left, top, SIGNAL_WIDTH - 1, top + tall - 1), outline=HAIRLINE)
        low, high = span(signal[row])
        for tick in y_ticks[row]:
            y = top + height_of(tick, low, high, tall)
            text = plain(tick)
            draw.line((left - 4, y, left, y), HAIRLINE)
            draw.text((left - 8 - font.getlength(text), y - line_height(font) / 2), text, SOFT, font)
        if names[row]:
            name, name_font = font_for(names[row], NOTE)
            draw.text((left + 8, top + 5), name, SOFT, name_font, stroke_width=2, stroke_fill=PAPER)
    bottom = count * tall + (count - 1) * 8
    for x, tick in zip(place, x_ticks, strict=True):
        text = plain(tick)
        draw.line((x, bottom, x, bottom + 4), HAIRLINE)
        at = min(max(x - font.getlength(text) / 2, 0), SIGNAL_WIDTH - font.getlength(text))
        draw.text((at, bottom + 7), text, SOFT, font)
    unit = "seconds" if rate else "sample"
    draw.text((left + (wide - font.getlength(unit)) / 2, bottom + 8 + line_height(font)), unit, SOFT, font)
    return image


def lead_image(
    signal: np.ndarray,
    R: np.ndarray | None,
    scale: Scale | None,
    size: tuple[int, int],
    ticks: Sequence[float] = (),
    left: float = 0,
    mask: np.ndarray | None = None,
) -> Image.Image:
    """One lead, drawn large and reduced: smooth lines. mask: bool [L], outside it the line is pale."""
    s = SUPERSAMPLING
    wide, tall = size[0] * s, size[1] * s
    length = len(signal)
    image = Image.new("RGB", (wide, tall), PAPER)
    draw = ImageDraw.Draw(image)
    low, high = span(signal)
    finite = np.nan_to_num(np.asarray(signal, np.float64), nan=low)
    x = (np.arange(length) + 0.5) * wide / length
    y = np.array([height_of(value, low, high, tall) for value in finite])
    if R is not None and scale is not None:
        tint = 1 - 0.42 * scale.strength(R)[:, None]
        ground = np.rint(255 * tint + pure(R, scale) * (1 - tint)).astype(np.uint8)
        nearest = np.minimum((np.arange(wide) * length) // wide, length - 1)
        image.paste(Image.fromarray(np.ascontiguousarray(np.broadcast_to(ground[nearest], (tall, wide, 3)))))
    for tick in ticks:
        at = (tick - left) * s
        draw.line((at, 0, at, tall), (236, 236, 239), s)
    thick = 2 * s + 1
    colors = np.full((length, 3), INK, np.float64)
    if R is not None and scale is not None:
        strength = scale.strength(R)[:, None] ** 0.5
        colors = np.array(INK) * (1 - strength) + pure(R, scale) * strength
    if mask is not None:
        colors[~mask] = HAIRLINE
    for at in range(length - 1):
        middle = ((x[at] + x[at + 1]) / 2, (y[at] + y[at + 1]) / 2)
        first, second = (tuple(int(c) for c in np.rint(colors[i])) for i in (at, at + 1))
        draw.line((x[at], y[at], *middle), first, thick)
        draw.line((*middle, x[at + 1], y[at + 1]), second, thick)
        draw.circle((x[at + 1], y[at + 1]), thick / 2 - 0.5, second)
    if length == 1:
        draw.circle((x[0], y[0]), 2 * thick, tuple(int(c) for c in np.rint(colors[0])))
    return image.resize(size, Image.Resampling.BOX)


def signal_tile(
    signal: np.ndarray,
    R: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    span_of: tuple[float, float] | None = None,
    size: tuple[int, int],
) -> Image.Image:
    """A signal [leads, L] without axes, its leads one below the other in `size`, relevance [leads, L] on a scale of
    its own; `span_of`: (start, stop) of what is marked below the curves.
    """
    scale = None if R is None else Scale.of(R)
    wide, tall = size
    count = len(signal)
    image = Image.new("RGB", size, PAPER)
    edges = [round(tall * row / count) for row in range(count + 1)]
    for row, (top, bottom) in enumerate(itertools.pairwise(edges)):
        R_row, mask_row = (None if each is None else each[row] for each in (R, mask))
        image.paste(lead_image(signal[row], R_row, scale, (wide, bottom - top), mask=mask_row), (0, top))
    draw = ImageDraw.Draw(image)
    if span_of is not None:
        start, stop = (edge * wide / signal.shape[1] for edge in span_of)
        draw.rectangle((start, tall - 5, stop, tall - 2), fill=MARK)
    draw.rectangle((0, 0, wide - 1, tall - 1), outline=HAIRLINE)
    return image


def pieces_image(
    pieces: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    size: tuple[int, int],
    rate: float | None = None,
    leads: Sequence[str] = (),
) -> Image.Image:
    """Pieces of signals over each other: (time in samples from where they are aligned [n], values [leads, n]) each.

    The darkest line is their mean, drawn where at least half of them are.
    """
    s, font = SUPERSAMPLING, font_of(NOTE)
    count = len(pieces[0][1])
    low_t, high_t = min(t.min() for t, _ in pieces), max(t.max() for t, _ in pieces)
    wide, tall = size[0], size[1] - 12 - 2 * line_height(font)
    image = Image.new("RGB", size, PAPER)
    grid = np.arange(np.ceil(low_t), np.floor(high_t) + 1)
    for row in range(count):
        top, bottom = tall * row // count, tall * (row + 1) // count
        low, high = span(np.concatenate([values[row] for _, values in pieces]))
        box = (wide * s, (bottom - top) * s)
        part = Image.new("RGB", box, PAPER)
        draw = ImageDraw.Draw(part)

        def points(t: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
            x = (t - low_t) / max(high_t - low_t, 1) * (box[0] - 1)  # noqa: B023
            return [(a, height_of(b, low, high, box[1])) for a, b in zip(x, values, strict=True)]  # noqa: B023

        zero = (0 - low_t) / max(high_t - low_t, 1) * (box[0] - 1)
        draw.line((zero, 0, zero, box[1]), MARK, s)
        for t, values in pieces:
            draw.line(points(t, values[row]), PALE, 2 * s, joint="curve")
        known = [np.interp(grid, t, values[row], left=np.nan, right=np.nan) for t, values in pieces]
        there = np.isfinite(known).sum(0) * 2 >= len(pieces)
        if there.sum() > 1:
            draw.line(points(grid[there], np.nanmean(np.array(known)[:, there], 0)), INK, 3 * s, joint="curve")
        image.paste(part.resize((wide, bottom - top), Image.Resampling.BOX), (0, top))
        ImageDraw.Draw(image).rectangle((0, top, wide - 1, bottom - 1), outline=HAIRLINE)
        if row < len(leads):
            ImageDraw.Draw(image).text((8, top + 4), leads[row], SOFT, font)
    draw = ImageDraw.Draw(image)
    for tick in ticks_of(low_t / (rate or 1), high_t / (rate or 1), 6, whole=not rate):
        x = (tick * (rate or 1) - low_t) / max(high_t - low_t, 1) * (wide - 1)
        draw.line((x, tall, x, tall + 4), SOFT)
        text = plain(tick)
        draw.text((min(max(x - font.getlength(text) / 2, 0), wide - font.getlength(text)), tall + 6), text, SOFT, font)
    unit = f"{'seconds' if rate else 'samples'} from the strongest neuron"
    draw.text(((wide - font.getlength(unit)) / 2, tall + 8 + line_height(font)), unit, SOFT, font)
    return image


def pure(R: np.ndarray, scale: Scale) -> np.ndarray:
    """[L] -> the colour of each sign at full strength, a little darker so that thin lines are seen: [L, 3]."""
    ends = np.sign(np.nan_to_num(R)) * scale.amax
    return colormap(scale.cmap)(scale.position(ends)).astype(np.float64) * 0.88


def span(lead: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value of a lead with something to draw between them."""
    finite = np.asarray(lead, np.float64)
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def height_of(value: float, low: float, high: float, tall: float) -> float:
    """Where a value is drawn; a tenth of the height stays free above and below."""
    return tall * (0.9 - 0.8 * (value - low) / (high - low))


def ticks_of(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers within low..high, about as many as asked: steps of 1, 2 or 5; `whole`: no fractions."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    step = max(step, 1) if whole else step
    return [tick * step for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A tick's number."""
    return number(round(value, 10))
