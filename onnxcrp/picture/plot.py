"""Plots of an index' figures. Needs matplotlib, which is imported when a plot is drawn."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcrp.errors import InputError, OnnxcrpError

if TYPE_CHECKING:
    import os

    import pandas


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OnnxcrpError("plots need matplotlib", hint='pip install "onnxcrp[plot]"') from None
    return Figure


def agreement(frame: pandas.DataFrame, path: str | os.PathLike[str]) -> Path:
    """What `Index.compare` found, layer by layer (CRP Fig. 12): a line for each pair, a band of one deviation.

    Raises InputError for an ending that matplotlib cannot write, OnnxcrpError without it or where the disk refuses.
    """
    Figure = _matplotlib()
    layers = list(dict.fromkeys(frame["layer"]))
    wide = max(6.0, 3.6 + 0.42 * len(layers))
    figure = Figure(figsize=(wide, 4.6), layout="constrained", dpi=144)
    axes = figure.subplots()
    for (one, other), part in frame.groupby(["one", "other"], sort=False):
        part = part.set_index("layer").loc[layers]
        (line,) = axes.plot(range(len(layers)), part["overlap"], marker="o", markersize=4, label=f"{one}, {other}")
        low, high = part["overlap"] - part["overlap_std"], part["overlap"] + part["overlap_std"]
        axes.fill_between(range(len(layers)), low.clip(0), high.clip(upper=1), color=line.get_color(), alpha=0.12, lw=0)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("same reference samples, |A & B| / max(|A|, |B|)")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    return _write(figure, Path(path))


def check(path: Path) -> None:
    """Raises InputError for an ending that matplotlib cannot write, OnnxcrpError without it."""
    if path.suffix.lower().lstrip(".") not in _matplotlib()().canvas.get_supported_filetypes():
        raise InputError(
            f"{path}: cannot draw a plot with the ending {path.suffix or '(none)'}", hint=".png, .pdf, .svg"
        )


def _write(figure: Any, path: Path) -> Path:
    check(path)
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        figure.savefig(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OnnxcrpError(f"cannot write {path}: {error.strerror or error}", hint="does the folder exist?") from None
    return path
