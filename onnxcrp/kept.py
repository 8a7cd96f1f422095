"""Samples whose forward pass is kept: further questions cost a backward pass only."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from onnxcrp.device import owned
from onnxcrp.errors import CompositeError, QuestionError, UnsupportedError
from onnxcrp.question import Asked
from onnxcrp.relevance import Plan, Program, RelevanceModels
from onnxcrp.result import Result
from onnxcrp.run import Run


class Kept:
    """Samples [B, ...] and what is known of them, on the device: activations, and the factors of plans asked so far.

    Made by `Explainer.at`. Thread-safe. Raises QuestionError for models whose conditions do not share a forward pass.
    """

    def __init__(self, models: RelevanceModels, feeds: dict[str, Any], batch: int, memory_limit: int) -> None:
        if models.fixed is not None or not models.facts.shares_forward:
            raise QuestionError(
                "no forward pass can be kept: samples and conditions do not share one in this model",
                hint="explain; `onnxcrp inspect` says where axis 0 is not the batch",
            )
        self.models, self.batch, self.memory_limit = models, batch, memory_limit
        self.feeds: dict[str, Any] = {name: owned(array) for name, array in feeds.items()}  # read by every question
        self._lock = threading.Lock()
        self._activations: dict[int, dict[str, Any]] = {}  # sample -> OrtValues
        self._factors: dict[tuple[int, Plan], dict[str, Any]] = {}
        self.forwards = 0  # passes run so far

    def explain(self, target: Any = None, *, return_ortvalue: bool = False, **question: Any) -> Result:
        """What `Explainer.explain(x, target, **question)` answers, for the samples that are kept."""
        run = _Run(self)
        asked = Asked(self.models, self.batch, run.forward, target=target, **question)
        if return_ortvalue:
            return run.on_device(asked)
        result = run.all(asked)
        asked.warn(result.explained)
        return result

    def known(self, program: Program, row: int) -> dict[str, Any]:
        """All that a relevance model's last stage reads of a sample, computed where it is not there yet."""
        with self._lock:
            inputs = {
                name: array[row : row + 1] if self.models.is_batched(name) else array
                for name, array in self.feeds.items()
            }
            there = self._activations.setdefault(row, {})
            if not there.keys() >= set(program.session.activations):
                there |= program.session.forward(inputs)
                self.forwards += 1
            if (row, program.plan) not in self._factors:
                self._factors[row, program.plan] = program.session.same_for_all({**inputs, **there})
            return {**inputs, **there, **self._factors[row, program.plan]}


class _Run(Run):
    """One call on samples that are kept."""

    def __init__(self, kept: Kept) -> None:
        super().__init__(kept.models, kept.feeds, kept.batch, kept.memory_limit)
        self.kept = kept

    def forward(self) -> np.ndarray:
        """The explained output [B, ...]."""
        try:
            program = self.models.program(self.models.everything, "every plan")
        except (CompositeError, UnsupportedError):  # no relevance comes to the inputs; to layers it may
            program = self.models.program(Plan(), "every plan")
        return np.concatenate([self.kept.known(program, row)[program.explained].numpy() for row in range(self.batch)])

    def all(self, asked: Asked) -> Result:
        """Every question for every sample, sample by sample."""
        for plan, numbers in asked.by_plan().items():
            self._few_at_a_time(asked, self.models.program(plan, "every plan"), numbers)
        return self._result(asked, self._relevance)

    def on_device(self, asked: Asked) -> Result:
        """All questions in one run, results left where they are; raises QuestionError if one run cannot answer."""
        groups = asked.by_plan()
        if len(groups) > 1 or self.batch > 1:
            raise QuestionError(
                "return_ortvalue is for questions that one run can answer",
                hint="one set of condition layers and one sample",
            )
        ((plan, numbers),) = groups.items()
        program = self.models.program(plan, "every plan")
        feeds = self._question_feeds(asked, program, [(0, number) for number in numbers])
        rest = self._without_questions(program)
        found = program.session.answer(
            {**self.kept.known(program, 0), **feeds}, [*program.relevance.values(), *rest.values()]
        )
        self._rest = {name: found[output] for name, output in rest.items()}
        return self._result(asked, {name: found[output] for name, output in program.relevance.items()})

    def _known(self, program: Program, row: int) -> dict[str, Any]:
        return self.kept.known(program, row)
