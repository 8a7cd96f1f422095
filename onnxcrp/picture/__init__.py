"""Relevance as pictures: colours, labelled panels, signals, galleries of reference samples. Pillow and numpy only.

Red is evidence for, blue evidence against, zero exactly white (cmap "bwr"); the scale is symmetric, so that equal
strength looks equal. `plot.py` alone needs matplotlib.
"""

from onnxcrp.picture.colors import (
    COLORMAPS,
    DIVERGING,
    Scale,
    colormap,
    diverging,
    heatmap_rgb,
    number,
    overlay,
    resized,
)
from onnxcrp.picture.files import save, writable
from onnxcrp.picture.panels import Panel, panels

__all__ = [
    "COLORMAPS",
    "DIVERGING",
    "Panel",
    "Scale",
    "colormap",
    "diverging",
    "heatmap_rgb",
    "number",
    "overlay",
    "panels",
    "resized",
    "save",
    "writable",
]
