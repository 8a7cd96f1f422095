"""How far the relevance of a quantized or rounded model is from that of the float model it was made of.

Both are asked the same question: same sample, same composite, same weights on the explained output. What both have a
name for is compared: the explained outputs, relevance of the input, relevance of every layer in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.analysis.balance import relative
from onnxcrp.errors import InputError, QuestionError

if TYPE_CHECKING:
    from onnxcrp.explainer import Explainer
    from onnxcrp.result import Result

COMPARED = ("convolution", "dense", "sum", "average", "max", "product", "matmul", "layernorm", "embedding", "kernel")


@dataclass
class Difference:
    """Relevance at one place in both: |R - R_float| / |R_float| (L2), their cosine, their sums."""

    layer: str
    op: str
    relative_l2: float
    cosine: float
    total: float
    total_float: float


@dataclass
class Comparison:
    """All differences, the explained output first, then the input, then layers from the output down."""

    model: str
    differences: list[Difference]
    only_here: list[str]  # layers the float model has not, or in another shape
    top: tuple[int, int] | None  # the largest explained entry here and there, where they are not the same
    whole: bool  # whether relevance of the input was compared entry by entry, not as heatmaps

    @property
    def input(self) -> Difference:
        """That of the input."""
        return self.differences[1]

    @property
    def detail(self) -> str:
        """One line."""
        output, R = self.differences[:2]
        how = R.layer if self.whole else f"heatmap ({R.layer} is laid out otherwise)"
        line = f"relevance of {how}: cosine {R.cosine:.4g}; {output.layer}: relative L2 {output.relative_l2:.2g}"
        line += f"; {len(self.differences) - 2} layers compared"
        if self.only_here:
            line += f", {len(self.only_here)} have no counterpart"
        if self.top:
            line += f"; the largest output is {self.top[0]}, that of the float model {self.top[1]}"
        return line


def compare(
    explainer: Explainer,
    feeds: Mapping[str, np.ndarray],
    weights: np.ndarray,
    other: Explainer,
    other_feeds: Mapping[str, np.ndarray],
    *,
    name: str = "",
) -> Comparison:
    """Ask both models; `weights` [B, ...] are those on the explained output.

    Raises QuestionError where the float model explains an output of another shape.
    """
    layers = {layer.name: layer for layer in explainer.layers}
    theirs = {layer.name: layer for layer in other.layers}
    facts = explainer.facts
    top = facts.names.of(facts.producer[facts.explained])  # the explained output itself
    wanted = [name for name, layer in reversed(layers.items()) if layer.family in COMPARED and name != top]
    shared = [name for name in wanted if name in theirs and theirs[name].shape[1:] == layers[name].shape[1:]]
    shape = _explained(explainer)
    if _explained(other)[1:] != shape[1:]:
        raise QuestionError(
            f"{name or 'the other model'} explains an output of shape {list(_explained(other))}, not {list(shape)}",
            hint="both must have the same classes; --output names one",
        )
    here, there = (_ask(asked, given, weights, shared) for asked, given in ((explainer, feeds), (other, other_feeds)))
    found = [_difference(facts.explained, "explained", here.explained, there.explained)]
    image = facts.inputs[0]
    R, S = here.relevance[image], there.relevance[other.facts.inputs[0]]
    whole = R.shape == S.shape
    if not whole:
        R, S = here.heatmap, there.heatmap
        if R.shape != S.shape:
            raise InputError(
                f"the heatmap of the float model is {list(S.shape)}, not {list(R.shape)}",
                hint="both must see the sample at the same size",
            )
    found.append(_difference(image, "input", R, S))
    found += [_difference(n, layers[n].op, here.relevance[n], there.relevance[n]) for n in shared]
    largest = [int(result.explained.reshape(-1).argmax()) for result in (here, there)]
    return Comparison(
        model=name,
        differences=found,
        only_here=[name for name in wanted if name not in shared],
        top=None if largest[0] == largest[1] else (largest[0], largest[1]),
        whole=whole,
    )


def _explained(explainer: Explainer) -> tuple[Any, ...]:
    from onnxcrp.facts import dims

    return tuple(dims(explainer.facts.tensors[explainer.facts.explained]))


def _ask(explainer: Explainer, feeds: Mapping[str, np.ndarray], weights: np.ndarray, layers: list[str]) -> Result:
    from onnxcrp.result import ExplanationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        return explainer.explain(dict(feeds), weights, record=layers)


def _difference(layer: str, op: str, R: np.ndarray, S: np.ndarray) -> Difference:
    a, b = (np.asarray(array, np.float64).ravel() for array in (R, S))
    sizes = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / sizes if sizes else float(not a.any() and not b.any())
    return Difference(layer, op, relative(a, b), cosine, float(a.sum()), float(b.sum()))


def fitting(feeds: Mapping[str, np.ndarray], other: Explainer) -> dict[str, np.ndarray]:
    """The same arrays for the float model; raises InputError where they do not fit it."""
    if len(feeds) != len(other.inputs):
        raise InputError(f"the float model has {len(other.inputs)} inputs, this one {len(feeds)}")
    fitted = {}
    for (name, array), (theirs, (dtype, shape)) in zip(feeds.items(), other.inputs.items(), strict=True):
        sizes = zip(array.shape[1:], shape[1:], strict=False)
        same = len(array.shape) == len(shape) and all(not isinstance(b, int) or a == b for a, b in sizes)
        if not same or (array.dtype.kind != dtype.kind):
            raise InputError(
                f"input {name!r} is {array.dtype}{list(array.shape)}, that of the float model {dtype}{list(shape)}",
                hint="give a picture, which is preprocessed for each of them",
            )
        fitted[theirs] = array.astype(dtype)
    return fitted


__all__ = ["Comparison", "Difference", "compare", "fitting"]
