"""Reference samples as one looks at them: the sample again, where its strongest neuron looks, and the concept in it.

field    receptive field of the strongest neuron: relevance of the input under the preset `flat`, started with 1 at
         that neuron alone (CRP Eq. 25); `box` bounds it
heatmap  the concept's conditional relevance, from its activation or from its relevance for the target
mask     the heatmap blurred, where it exceeds 40 % of its maximum (CRP Fig. 8)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.errors import QuestionError
from onnxcrp.result import NegativeLogitWarning, as_drawn

if TYPE_CHECKING:
    import pandas

    from onnxcrp.data import Sample
    from onnxcrp.explainer import Explainer
    from onnxcrp.index.query import Index

STARTS = ("activation", "relevance")
PARTS = ("field", "heatmap")  # what takes a run of the model
THRESHOLD = 0.4  # of a blurred heatmap's maximum
BLUR = 70  # the blur's standard deviation is this part of the longer side: 3.2 of 224 pixels


@dataclass(frozen=True)
class Reference:
    """One reference sample of a concept. Arrays are [H, W] of a picture, [leads, L] of a signal, None if not asked for.

    `picture`: uint8 RGB [H, W, 3], `signal`: [leads, L]. `center`: where along a signal the strongest neuron looks.
    """

    number: int  # in the index
    name: str
    dataset: str
    label: int
    target: int
    score: float
    position: tuple[int, ...]  # of the strongest neuron in its layer: (y, x), (x,) or ()
    x: np.ndarray  # as the model takes it, [1, ...]
    picture: np.ndarray | None
    signal: np.ndarray | None
    field: np.ndarray | None
    heatmap: np.ndarray | None
    center: float | None

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Bounds of the receptive field: (rows, columns) of a picture, (samples,) of a signal; all without a field."""
        if self.field is not None:
            return bounds(self.field)[self.field.ndim - (2 if self.picture is not None else 1) :]
        shape = self.x.shape[1:] if self.signal is None else self.signal.shape[1:]
        if self.picture is not None:
            shape = self.picture.shape[:2]
        return tuple(slice(0, size) for size in shape)

    @cached_property
    def mask(self) -> np.ndarray | None:
        """Where the concept is: bool of the heatmap's shape."""
        return None if self.heatmap is None else mask_of(self.heatmap, signal=self.picture is None)


@dataclass(frozen=True)
class ReferenceSamples:
    """The reference samples of one concept, best first; `frame` are their rows as `Index.top` has them."""

    layer: str
    channel: int
    criterion: str
    aggregate: str
    cls: int | None
    start: str
    frame: pandas.DataFrame
    samples: list[Reference]


class Views:
    """Looks at an index' samples through its model; receptive fields and sessions are kept from call to call."""

    def __init__(self, index: Index, explainer: Explainer) -> None:
        self.index, self.explainer = index, explainer
        self.layout: str = index.preprocessing.layout
        self._fields: dict[tuple[str, int, int], np.ndarray | None] = {}  # by layer, channel, position

    @cached_property
    def flat(self) -> Explainer:
        """The same model under the preset `flat`."""
        return self.explainer.under("flat")

    def of(
        self,
        layer: str,
        channel: int,
        criterion: str,
        aggregate: str,
        *,
        cls: int | None,
        k: int | None,
        start: str | None,
        parts: Sequence[str],
    ) -> ReferenceSamples:
        """See `Index.reference_samples`."""
        start = start or self.usual_start(layer, criterion)
        if start not in STARTS:
            raise QuestionError(f"start is {start!r}", hint=f"one of {', '.join(STARTS)}")
        if unknown := set(parts) - set(PARTS):
            raise QuestionError(f"part {min(unknown)!r} is unknown", hint=f"there are {', '.join(PARTS)}")
        frame = self.index.top(layer, channel, criterion, aggregate, cls=cls, k=k)
        frame = frame[frame["score"] > 0]
        samples = [self.index.sample(number) for number in frame["sample"]]
        positions = [int(p) for p in frame["position"]]
        empty: list[np.ndarray | None] = [None] * len(samples)
        fields, heatmaps = empty, empty
        centers: list[float | None] = [None] * len(samples)
        if "field" in parts and samples:
            fields = self.fields(layer, channel, samples[0].x, positions)
            centers = [self._center(layer, channel, s, p) for s, p in zip(samples, positions, strict=True)]
        if "heatmap" in parts and samples:
            heatmaps = self._heatmaps(layer, channel, samples, frame, start)
        found = [
            Reference(
                number=int(row["sample"]),
                name=str(row["name"]),
                dataset=str(row["dataset"]),
                label=int(row["label"]),
                target=int(row["target"]),
                score=float(row["score"]),
                position=tuple(int(p) for p in self.index.unravel(layer, row["position"])),
                x=sample.x,
                picture=self._picture(sample),
                signal=self._signal(sample),
                field=field,
                heatmap=heatmap,
                center=center,
            )
            for row, sample, field, heatmap, center in zip(
                frame.to_dict("records"), samples, fields, heatmaps, centers, strict=True
            )
        ]
        return ReferenceSamples(layer, channel, criterion, aggregate, cls, start, frame, found)

    def usual_start(self, layer: str, criterion: str) -> str:
        """Relevance for RelMax of a layer that more than a ReLU reads, as it may use negative activation; else it."""
        facts = self.explainer.facts
        rectified = facts.only_relu(facts.names.resolve(layer).outputs[0].name)
        return "activation" if rectified or criterion == "actmax" else "relevance"

    def _picture(self, sample: Sample) -> np.ndarray | None:
        if sample.display is not None or sample.x.ndim != 4:
            return sample.display
        return self.index.preprocessing.to_display(sample.x)

    def _signal(self, sample: Sample) -> np.ndarray | None:
        """None for pictures, and for token ids, which are no curve."""
        if sample.x.ndim > 3 or (sample.x.ndim == 2 and sample.x.dtype.kind in "iu"):
            return None
        return as_drawn(sample.x[0], self.layout)

    # --- receptive fields ---------------------------------------------------------------------------------------------

    def fields(self, layer: str, channel: int, x: np.ndarray, positions: Sequence[int]) -> list[np.ndarray | None]:
        """Receptive fields of a channel's neurons at these (flat) positions, as relevance of an input like `x`.

        The preset is blind to values, so one sample stands for all, and each neuron is asked once. Raises what
        `Explainer.explain` does, for models that `flat` has no rule for.
        """
        wanted = [p for p in dict.fromkeys(positions) if (layer, channel, p) not in self._fields]
        if wanted:
            starts = [{layer: self._neuron(layer, channel, p)} for p in wanted]
            result = self.flat.explain(x, start=starts, start_from="one")
            assert result.image is not None
            for place, position in enumerate(wanted):
                field = as_drawn(np.asarray(result.relevance[result.image])[0, place], self.layout)
                self._fields[layer, channel, position] = field
        return [self._fields[layer, channel, p] for p in positions]

    def _neuron(self, layer: str, channel: int, position: int) -> np.ndarray:
        """A mask [1, ...] of the layer's shape that is 1 at one neuron."""
        row = self.index.layer(layer)
        mask = np.zeros((1, *row.shape), np.float32)
        place = [int(at) for at in self.index.unravel(layer, position)]
        mask[(0, *place[: row.axis], channel, *place[row.axis :])] = 1
        return mask

    def _center(self, layer: str, channel: int, sample: Sample, position: int) -> float | None:
        """Where along a signal a neuron looks, the middle of its field; None if the layer has no positions."""
        row = self.index.layer(layer)
        places = math.prod(row.shape) // row.channels
        if sample.x.ndim > 3 or places == 1:
            return None
        field, middle = self.fields(layer, channel, sample.x, [position, places // 2])
        if field is None or middle is None:
            return None
        return center_of(bounds(field)[1], bounds(middle)[1], field.shape[-1], position, places)

    # --- heatmaps -----------------------------------------------------------------------------------------------------

    def _heatmaps(
        self, layer: str, channel: int, samples: Sequence[Sample], frame: pandas.DataFrame, start: str
    ) -> list[np.ndarray | None]:
        """Conditional relevance of each sample, all in one call."""
        x = np.concatenate([sample.x for sample in samples])
        concept: Mapping[str, Any] = {layer: [channel]}
        if start == "activation":
            result = self.explainer.explain(x, start=concept)
        else:
            targets = [int(target) for target in frame["target"]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NegativeLogitWarning)  # which would count samples of this call
                bypass = self.index.manifest["bypass"]
                result = self.explainer.explain(x, targets, conditions=concept, bypass=bypass)
            self._warn_of_negative(layer, channel, frame, np.asarray(result.explained)[np.arange(len(x)), targets])
        assert result.image is not None
        return [as_drawn(R, self.layout) for R in np.asarray(result.relevance[result.image])]

    def _warn_of_negative(self, layer: str, channel: int, frame: pandas.DataFrame, logits: np.ndarray) -> None:
        names = [f"{name} as {self.index.class_name(int(cls))}" for name, cls in frame[["name", "target"]].to_numpy()]
        if negative := [name for name, logit in zip(names, logits, strict=True) if logit < 0]:
            more = f" and {len(negative) - 1} more" if len(negative) > 1 else ""
            warnings.warn(
                f"{layer} channel {channel}: the logit of {negative[0]}{more} is negative, which inverts the signs "
                f"of its heatmap",
                NegativeLogitWarning,
                stacklevel=4,
            )


def bounds(field: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds everything but zeros, a slice per axis; the whole array if it holds nothing else."""
    found = []
    for axis in range(field.ndim):
        others = tuple(other for other in range(field.ndim) if other != axis)
        used = np.flatnonzero((field != 0).any(others))
        found.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, field.shape[axis]))
    return tuple(found)


def center_of(box: slice, middle: slice, length: int, position: int, places: int) -> float:
    """The middle of a neuron's field along a signal, what its ends (or padding) cut off restored.

    `middle`: the field of the neuron in the middle of the layer, which tells how wide fields are; where that is cut
    itself, all that is known is how far along its layer the neuron is.
    """
    if middle.start == 0 or middle.stop == length:
        return (position + 0.5) * length / places
    half = (middle.stop - middle.start) / 2
    return box.stop - half if position < places // 2 else box.start + half


def mask_of(heatmap: np.ndarray, *, signal: bool = False, threshold: float = THRESHOLD) -> np.ndarray:
    """Where a heatmap, blurred, exceeds `threshold` times its maximum: bool; nowhere if nothing in it is positive."""
    axes = (1,) if signal else (0, 1)
    sigma = max(heatmap.shape[axis] for axis in axes) / BLUR
    blurred = heatmap.astype(np.float64)
    for axis in axes:
        blurred = blur(blurred, sigma, axis)
    return (blurred > threshold * blurred.max()) & (blurred > 0)


def blur(array: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    """A Gaussian along one axis, cut at three sigma; zeros beyond the border."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    weights /= weights.sum()
    return np.apply_along_axis(lambda line: np.convolve(line, weights)[reach : reach + len(line)], axis, array)
