"""The questions of one call, checked: conditions, starts, targets and seeds -> the arrays of a relevance model each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxcrp import condition as words
from onnxcrp.condition import Target
from onnxcrp.errors import QuestionError
from onnxcrp.relevance import Layer, Plan, RelevanceModels
from onnxcrp.result import NegativeLogitWarning

SEEDS = ("output", "abs", "one")
STARTS = ("activation", "relevance", "one")

Concepts = Mapping[str, Any]  # layer -> concepts


@dataclass
class Question:
    """One entry of axis N: what its relevance model is fed with, axis 0 of each array being 1 or B."""

    feeds: dict[str, np.ndarray]  # role ("target", "mask.<layer>", "seed.<layer>") -> array
    plan: Plan


class Asked:
    """What one call of `Explainer.explain` asks; its parameters are described there.

    `forward()` runs the plain model and gives the explained output [B, ...]; "top" needs it first.
    Raises QuestionError for whatever does not exist or does not fit.
    """

    def __init__(
        self,
        models: RelevanceModels,
        batch: int,
        forward: Callable[[], np.ndarray],
        *,
        target: Any = None,
        conditions: Any = None,
        record: str | Sequence[str] = (),
        seed: Any = None,
        start: Any = None,
        start_from: str = "activation",
        bypass: str = "cut",
        pairwise: bool = False,
        inputs: str | Sequence[str] | None = None,
    ) -> None:
        self.models, self.batch, self.pairwise = models, batch, pairwise
        self._forward = forward
        self._bypass, self._start_from = bypass, start_from
        _choice("start_from", start_from, STARTS)
        _choice("bypass", bypass, ("cut", "keep"))
        if start is None and start_from != "activation":
            raise QuestionError(f'start_from="{start_from}" needs start={{layer: concepts}}')
        self.inputs = self._known_inputs(inputs)
        self.record: dict[str, Layer] = {name: models.layer(name) for name in listed(record)}
        self.conditions = _as_list("conditions", conditions) or [{}]
        self.starts = _as_list("start", start)
        self.hidden = bool(self.starts) and start_from != "relevance"
        self._seed, self._target = self._choose_seed(seed, target)
        self.targets: list[Target] = []  # one per question, unless hidden
        self._plans: dict[tuple[str, ...], Plan] = {}
        self.many = not pairwise and any(
            given is not None and not isinstance(given, Mapping) for given in (conditions, start)
        )
        self.questions = self._all(self._pairs())
        if pairwise and len(self.questions) != batch:
            raise QuestionError(
                f"pairwise needs one condition per sample: {batch} samples, {len(self.questions)} conditions"
            )

    def _known_inputs(self, inputs: str | Sequence[str] | None) -> tuple[str, ...]:
        reached = self.models.facts.inputs
        names = reached if inputs is None else listed(inputs)
        for name in names:
            if name not in reached:
                raise QuestionError(
                    f"relevance does not reach an input {name!r}", hint=f"it reaches {', '.join(reached)}"
                )
        return tuple(name for name in reached if name in names)

    def _choose_seed(self, seed: Any, target: Any) -> tuple[str, Any]:
        """How relevance starts, and the target: an array given as the seed is the target of seed "one"."""
        own = self.models.composite.seed
        if self.hidden:
            if seed is not None or target is not None:
                raise QuestionError(
                    "a hidden start has neither target nor seed",
                    hint='start_from="relevance" begins with the relevance of a target',
                )
            return own, None
        if seed is None:
            return own, target
        if isinstance(seed, str):
            _choice("seed", seed, SEEDS)
            return seed, target
        if target is not None:
            raise QuestionError(
                "a seed array is used as it is, a target beside it has no meaning", hint="leave out target"
            )
        array = np.asarray(seed)
        if array.dtype.kind not in "iuf" or not array.ndim:
            raise QuestionError(f"seed must be one of {', '.join(SEEDS)} or an array of numbers, got {seed!r}")
        return "one", array.astype(np.float32)

    # --- targets ------------------------------------------------------------------------------------------------------

    @cached_property
    def _explained(self) -> np.ndarray:
        return self._forward()

    def _targets(self, asked: Any) -> list[Target]:
        """One target, K for "topK"."""
        shape = self.models.explained_shape[1:]
        if not all(isinstance(d, int) for d in shape):
            shape = self._explained.shape[1:]
        top = words.top_count(asked) is not None
        return words.target(
            asked,
            shape=[int(d) for d in shape if d is not None],
            batch=self.batch,
            explained=self._explained if top else None,
        )

    def _own_target(self, asked: Any) -> Target:
        """The target that a condition carries."""
        found = self._targets(asked)
        if len(found) != 1:
            raise QuestionError(f'a condition has one target, got "{asked}"', hint='{"y": "top"}, or {"y": 208}')
        return found[0]

    # --- questions ----------------------------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[Concepts, Concepts]]:
        """(condition, start) of every question; where both are lists they go in pairs."""
        starts = self.starts if self.starts is not None else [{}]
        count = max(len(self.conditions), len(starts))
        if {len(self.conditions), len(starts)} - {1, count}:
            raise QuestionError(
                f"{len(starts)} starts and {len(self.conditions)} conditions do not pair up",
                hint="give as many of both, or one of either",
            )
        conditions = self.conditions * (count if len(self.conditions) == 1 else 1)
        starts = starts * (count if len(starts) == 1 else 1)
        return list(zip(conditions, starts, strict=True))

    def _all(self, pairs: list[tuple[Concepts, Concepts]]) -> list[Question]:
        if self.hidden:
            if any(words.TARGET in condition for condition, _ in pairs):
                raise QuestionError(f'a hidden start has no target, a condition says "{words.TARGET}"')
            return [self._question(condition, start) for condition, start in pairs]
        common = [] if all(words.TARGET in condition for condition, _ in pairs) else self._targets(self._target)
        if words.top_count(self._target) and common:
            if self.many or self.pairwise:
                raise QuestionError(
                    f'target "{self._target}" asks {len(common)} questions of its own, beside those of the list',
                    hint='give every condition its own {"y": class}, or target="top"',
                )
            self.many = True
            self.targets = common
            pairs = pairs * len(common)
        else:
            self.targets = [
                self._own_target(condition[words.TARGET]) if words.TARGET in condition else common[0]
                for condition, _ in pairs
            ]
        return [self._question(*pair, target) for pair, target in zip(pairs, self.targets, strict=True)]

    def _question(self, condition: Concepts, start: Concepts, target: Target | None = None) -> Question:
        masks = {layer: concepts for layer, concepts in condition.items() if layer != words.TARGET}
        feeds: dict[str, np.ndarray] = {}
        if self.starts is not None and not start:
            raise QuestionError("start holds nothing to begin at", hint='start={"layer": [3]}')
        if target is None:
            feeds |= self._arrays("seed", start)
        else:
            feeds["target"] = target.weights
        feeds |= self._arrays("mask", masks)
        if target is not None and start:  # conditional relevance under cut of the same concepts
            if self._bypass != "cut":
                raise QuestionError('start_from="relevance" goes through the start alone: bypass must be "cut"')
            begin = self._arrays("mask", start)
            if both := begin.keys() & feeds.keys():
                raise QuestionError(f"layer {min(both)[len('mask.') :]} is both start and condition")
            feeds |= begin
        roles = tuple(feeds)
        if roles not in self._plans:
            self._plans[roles] = self._plan(roles)
        return Question(feeds, self._plans[roles])

    def _arrays(self, role: str, concepts: Concepts) -> dict[str, np.ndarray]:
        """Masks, or seeds, of the layers named."""
        arrays: dict[str, np.ndarray] = {}
        for name, each in concepts.items():
            layer = self.models.layer(name)
            if f"{role}.{layer.name}" in arrays:
                raise QuestionError(f"layer {layer.name} appears twice in one condition, once as {name}")
            array = layer.mask(each)
            if len(array) not in (1, self.batch):
                raise QuestionError(
                    f"layer {layer.name}: axis 0 of an array must be 1 or the number of samples, {self.batch}, "
                    f"got {len(array)}"
                )
            arrays[f"{role}.{layer.name}"] = array
        return arrays

    def _plan(self, roles: Sequence[str]) -> Plan:
        layers = {
            role: tuple(sorted(key[len(role) + 1 :] for key in roles if key.startswith(f"{role}.")))
            for role in ("mask", "seed")
        }
        return Plan(
            conditions=layers["mask"],
            start=layers["seed"],
            start_from=self._start_from if layers["seed"] else "activation",
            seed=self._seed,
            bypass=self._bypass if layers["mask"] else "cut",
            record=tuple(sorted({layer.name for layer in self.record.values()})),
            inputs=self.inputs,
        )

    def by_plan(self) -> dict[Plan, list[int]]:
        """The questions by number that one relevance model answers, for each."""
        groups: dict[Plan, list[int]] = {}
        for number, question in enumerate(self.questions):
            groups.setdefault(question.plan, []).append(number)
        return groups

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def labels(self) -> Any:
        """Targets for the result: int array [B] or [B, N] where all are single classes, else nested lists; or None."""
        if self.hidden:
            return None
        rows = [[_of(target.labels, row) for target in self.targets] for row in range(self.batch)]
        if self.pairwise:
            rows = [[labels[row]] for row, labels in enumerate(rows)]
        table = rows if self.many else [labels[0] for labels in rows]
        if all(isinstance(label, int) for labels in rows for label in labels):
            return np.array(table, np.int64)
        return table

    def warn(self, explained: np.ndarray) -> None:
        """A NegativeLogitWarning for each target whose explained output (the weighted sum) is negative."""
        if self.hidden or self._seed != "output":
            return
        found: dict[str, dict[int, float]] = {}  # target -> sample: value
        for number, target in enumerate(self.targets):
            for row in [number] if self.pairwise else range(self.batch):
                value = float(np.sum(explained[row] * _of(target.weights, row), dtype=np.float64))
                if value < 0:
                    found.setdefault(words.target_text(_of(target.labels, row)), {})[row] = value
        for label, rows in found.items():
            row, value = next(iter(rows.items()))
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            message = negative(label, value, f"sample {row}{more}", 'seed="abs"')
            warnings.warn(message, NegativeLogitWarning, stacklevel=3)


def negative(label: str, value: float, where: str, remedy: str) -> str:
    """What a NegativeLogitWarning says."""
    return (
        f"the explained output of target {label} is negative ({value:.3g}, {where}): all signs of its relevance are "
        f"inverted ({remedy} keeps them)"
    )


def listed(names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def _of(entries: Any, row: int) -> Any:
    """The entry of one sample, where there may be one for all."""
    return entries[row if len(entries) > 1 else 0]


def _as_list(what: str, given: Any) -> list[Concepts] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise QuestionError(f"{what} must be {{layer: concepts}} or a list of them, got {given!r}")
    entries = list(given)
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise QuestionError(f"{what}: each must be {{layer: concepts}}, got {entry!r}")
    if not entries:
        raise QuestionError(f"{what} is an empty list: nothing is asked", hint="[{}] asks without a condition")
    return entries


def _choice(what: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise QuestionError(f"{what} must be one of {', '.join(choices)}, got {given!r}")
