"""Relevance as colour: colormaps, scales, overlays. Numpy and Pillow only.

Red is evidence for, blue evidence against, zero exactly white (cmap "bwr"); the scale is symmetric, so that equal
strength looks equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from onnxcrp.errors import InputError

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
    return overlay_at(picture, R, scale if amax is None else Scale(float(amax), scale.signed, cmap))


def overlay_at(picture: np.ndarray, R: np.ndarray, scale: Scale) -> np.ndarray:
    """`overlay` under a scale that is given."""
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
