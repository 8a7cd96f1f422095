"""One reference net with its exports and its float64 references, each made when first asked for and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp import Explainer
from onnxcrp.canonize import Canonical, canonize

from . import nets
from .cases import EXPORTERS, HIGH, LOW, NETS
from .oracle import Oracle


class Parity:
    """A net, its samples x [B, ...], and what zennit says about them."""

    def __init__(self, name: str, folder: Path):
        self.name, self.layers = name, NETS[name].layers
        self._made: dict[tuple[str, ...], Any] = {}
        net, x = nets.build(name)
        self.paths = {exporter: nets.export(net, name, exporter, folder) for exporter in EXPORTERS}
        self.oracle = Oracle(net, x)
        self.x = x.numpy()
        self.logits = self.oracle.logits(self.x)
        best = [int(c) for c in np.argsort(-self.logits.mean(0))[:3]]
        self.targets: list[Any] = [best[0], best[1], {best[0]: 1.0, best[2]: -0.5}]

    def canonical(self, exporter: str) -> Canonical:
        return self._once(("canonical", exporter), lambda: canonize(self.paths[exporter]))

    def explainer(self, exporter: str, composite: str) -> Explainer:
        return Explainer(self.canonical(exporter), composite, low=LOW, high=HIGH, threads=2)

    def weights(self, targets: list[Any]) -> np.ndarray:
        """Targets as weights of the logits: [len(targets), classes]."""
        rows = np.zeros((len(targets), self.logits.shape[1]))
        for row, target in zip(rows, targets, strict=True):
            for index, weight in (target if isinstance(target, dict) else {target: 1.0}).items():
                row[index] = weight
        return rows

    def reference(self, composite: str) -> dict[str, np.ndarray]:
        """Relevance of input and recorded layers for every sample and target: {name: [B, targets, ...]}."""
        return self._once(("reference", composite), lambda: self._reference(composite))

    def conditional(self, composite: str, bypass: str) -> dict[str, np.ndarray]:
        """Relevance of the first sample's first target under each condition: {name: [conditions, ...]}."""
        return self._once(("conditional", composite, bypass), lambda: self._conditional(composite, bypass))

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, made once; functools.cache would keep every net alive to the end of the session."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _reference(self, composite: str) -> dict[str, np.ndarray]:
        count, asked = len(self.x), len(self.targets)
        rows = self.oracle.relevance(
            composite,
            np.repeat(self.x, asked, axis=0),
            np.tile(self.weights(self.targets), (count, 1)),
            record=self.layers,
        )
        return {name: R.reshape(count, asked, *R.shape[1:]) for name, R in rows.items()}

    @functools.cached_property
    def conditions(self) -> list[dict[str, list[int]]]:
        """Three conditions on both layers: few and many of the channels that matter to the first target."""
        ranked = {}
        for layer in self.layers:
            R = np.abs(self.reference("epsilon_plus_flat")[layer][0, 0])
            ranked[layer] = [int(c) for c in np.argsort(-R.reshape(len(R), -1).sum(1))]
        late, early = (ranked[layer] for layer in self.layers)
        picks = [(late[:1], early[:5]), (late[1:8], early[::2]), (late[: len(late) // 2], early[1:2])]
        return [dict(zip(self.layers, (sorted(a), sorted(b)), strict=True)) for a, b in picks]

    def _conditional(self, composite: str, bypass: str) -> dict[str, np.ndarray]:
        x = np.repeat(self.x[:1], len(self.conditions), axis=0)
        targets = self.weights([self.targets[0]] * len(x))
        if bypass == "cut":
            kept = {layer: [condition[layer] for condition in self.conditions] for layer in self.layers}
            return {"input": self.oracle.cut(composite, x, targets, kept)}
        masks = {}
        for layer in self.layers:
            masks[layer] = np.zeros((len(x), self.reference("epsilon_plus_flat")[layer].shape[2]))
            for row, condition in zip(masks[layer], self.conditions, strict=True):
                row[condition[layer]] = 1.0
        return self.oracle.relevance(composite, x, targets, masks=masks, record=self.layers)


def errors(ours: np.ndarray, reference: np.ndarray, axes: int) -> np.ndarray:
    """Relative L2 of each question; `axes` leading axes count questions. Shapes must agree."""
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    flat = (*reference.shape[:axes], -1)
    difference = np.linalg.norm((ours - reference).reshape(flat), axis=-1)
    return difference / np.linalg.norm(reference.reshape(flat), axis=-1)
