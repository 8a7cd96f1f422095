"""Runs questions in chunks that fit the memory budget, and puts the answers where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from onnxcrp.errors import QuestionError
from onnxcrp.question import Asked
from onnxcrp.relevance import Plan, Program, RelevanceModels
from onnxcrp.result import Result
from onnxcrp.stages import Staged

LIVE_MESSAGES = (
    6  # tensors of the largest size that a walk holds at once: R, s, two branches, a skip, the runtime's own
)

Pair = tuple[int, int]  # (sample, question)


class Run:
    """One call: `feeds` are the model's inputs for `batch` samples; nothing here is shared between threads."""

    def __init__(self, models: RelevanceModels, feeds: dict[str, np.ndarray], batch: int, memory_limit: int) -> None:
        self.models, self.feeds, self.batch, self.memory_limit = models, feeds, batch, memory_limit
        self._relevance: dict[str, np.ndarray] = {}
        self._rest: dict[str, np.ndarray] = {}  # what has no axis N: "activation/<layer>", "output/<name>", "explained"
        self._filled: dict[str, np.ndarray] = {}  # which samples of `_rest` are there
        self._every = np.ones(batch, bool)
        self._sample: tuple[Plan, int] | None = None  # whose `_found` is there
        self._found: dict[str, Any] = {}

    def forward(self) -> np.ndarray:
        """The explained output [B, ...] by a plain forward pass."""
        program = self.models.program(Plan())
        whole: np.ndarray | None = None
        for rows in self._chunks(range(self.batch), self._bytes_forward()):
            feeds = self._samples(rows)
            for name in program.feeds.values():
                entries = [size if isinstance(size, int) else 1 for size in self.models.explained_shape[1:]]
                feeds[name] = np.zeros((1, *entries), np.float32)
            explained = program.session.run(feeds, [program.explained])[program.explained][: len(rows)]
            if whole is None:
                whole = np.empty((self.batch, *explained.shape[1:]), explained.dtype)
            whole[list(rows)] = explained
        assert whole is not None
        return whole

    def all(self, asked: Asked) -> Result:
        """Every question for every sample."""
        for plan, numbers in asked.by_plan().items():
            if not asked.pairwise and self.models.pays_in_stages(plan, self.feeds, len(numbers)):
                self._few_at_a_time(asked, self.models.program(plan, "one plan"), numbers)
                continue
            program = self.models.program(plan)
            together = program.shares_forward and self.models.fixed is None and len(numbers) > 1
            if together and not asked.pairwise:
                for row in range(self.batch):
                    for chunk in self._chunks(numbers, self._bytes_question(plan)):
                        self._answer(
                            asked, program, self._shared(asked, program, row, chunk), [(row, n) for n in chunk]
                        )
                continue
            pairs = [(row, n) for n in numbers for row in ([n] if asked.pairwise else range(self.batch))]
            for part in self._chunks(pairs, self._bytes_forward() + self._bytes_question(plan)):
                self._answer(asked, program, self._paired(asked, program, part), part)
        return self._result(asked, self._relevance)

    def _few_at_a_time(self, asked: Asked, program: Program, numbers: Sequence[int]) -> None:
        """Questions for one sample after the other, on the stages of a relevance model."""
        models, plan = self.models, program.plan
        most = None if models.on_device else models.at_once(plan, self.feeds)
        for row in range(self.batch):
            own = [number for number in numbers if number == row] if asked.pairwise else numbers
            for chunk in self._chunks(own, self._bytes_question(plan), most):
                pairs = [(row, number) for number in chunk]
                self._answer(asked, program, self._question_feeds(asked, program, pairs), pairs)

    def on_device(self, asked: Asked) -> Result:
        """All questions in one run, results left where they are; raises QuestionError if one run cannot answer."""
        plans = set(asked.by_plan())
        count = len(asked.questions)
        if len(plans) > 1 or self.models.fixed or (self.batch > 1 and count > 1 and not asked.pairwise):
            raise QuestionError(
                "return_ortvalue is for questions that one run can answer",
                hint="one set of condition layers, and one sample or one condition",
            )
        program = self.models.program(plans.pop())
        if count > 1 and not asked.pairwise and program.shares_forward:
            feeds = self._shared(asked, program, 0, range(count))
        else:
            pairs = (
                [(n, n) for n in range(count)]
                if asked.pairwise
                else [(r, n) for n in range(count) for r in range(self.batch)]
            )
            feeds = self._paired(asked, program, pairs)
        found = program.session.run_ortvalues(feeds)
        self._rest = {name: found[output] for name, output in self._without_questions(program).items()}
        return self._result(asked, {name: found[output] for name, output in program.relevance.items()})

    # --- feeds --------------------------------------------------------------------------------------------------------

    def _samples(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The model's own inputs for these samples; the last one fills up a fixed batch."""
        rows = [*rows, *[rows[-1]] * ((self.models.fixed or 0) - len(rows))]
        whole = rows == list(range(self.batch))
        return {
            name: array if whole or not self.models.is_batched(name) else array[rows]
            for name, array in self.feeds.items()
        }

    def _paired(self, asked: Asked, program: Program, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Sample and question go together: axis 0 is the number of pairs, or 1 where all are alike."""
        feeds = self._samples([row for row, _ in pairs])
        pairs = [*pairs, *[pairs[-1]] * ((self.models.fixed or 0) - len(pairs))]
        return feeds | self._question_feeds(asked, program, pairs)

    def _shared(self, asked: Asked, program: Program, row: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """One sample, many questions: the forward pass has batch 1, masks and targets are as many as they differ."""
        return self._samples([row]) | self._question_feeds(asked, program, [(row, number) for number in numbers])

    @staticmethod
    def _question_feeds(asked: Asked, program: Program, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        feeds = {}
        for role, name in program.feeds.items():
            arrays = [asked.questions[number].feeds[role] for _, number in pairs]
            alike = all(array is arrays[0] for array in arrays)
            if alike and (len(arrays[0]) == 1 or len({row for row, _ in pairs}) == 1):
                arrays, pairs_of_role = arrays[:1], pairs[:1]
            else:
                pairs_of_role = pairs
            rows = [array[row if len(array) > 1 else 0] for array, (row, _) in zip(arrays, pairs_of_role, strict=True)]
            shapes = {each.shape for each in rows}
            if len(shapes) > 1:
                rows = [np.broadcast_to(each, np.broadcast_shapes(*shapes)) for each in rows]
            feeds[name] = np.stack(rows) if len(rows) > 1 else rows[0][None]
        return feeds

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, asked: Asked, program: Program, feeds: dict[str, np.ndarray], pairs: Sequence[Pair]) -> None:
        """Run, and put relevance [n or 1, ...] to its place in [B, N, ...], the rest (once per sample) in [B, ...]."""
        rows, numbers = [row for row, _ in pairs], [number for _, number in pairs]
        rest = self._without_questions(program)
        new = any(name not in self._filled or not self._filled[name][rows].all() for name in rest)
        wanted = [*program.relevance.values(), *(rest.values() if new else ())]
        found = self._ask(program, feeds, list(dict.fromkeys(wanted)), rows)
        lead = (self.batch, len(asked.questions)) if asked.many else (self.batch,)
        whole = len(pairs) == prod(lead) and (self.batch == 1 or not asked.many)  # all there is, in its order
        for name, output in program.relevance.items():
            R = found[output]
            if whole and len(R) == len(pairs):
                self._relevance[name] = R.reshape(*lead, *R.shape[1:])
                continue
            if name not in self._relevance:
                self._relevance[name] = np.empty((*lead, *R.shape[1:]), R.dtype)
            place = (rows, numbers) if asked.many else (rows,)
            self._relevance[name][place] = R if len(R) == 1 else R[: len(rows)]
        if new:
            for name, output in rest.items():
                self._keep(name, found[output], rows)

    def _ask(
        self, program: Program, feeds: dict[str, np.ndarray], outputs: Sequence[str], rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Outputs of the relevance model for these samples; of its stages for one of them."""
        if not isinstance(program.session, Staged):
            return program.session.run(feeds, outputs)
        found = program.session.answer({**self._known(program, rows[0]), **feeds}, outputs)
        return {name: value.numpy() for name, value in found.items()}

    def _known(self, program: Program, row: int) -> dict[str, Any]:
        """What the last stage of a relevance model reads of a sample, until the next one is asked about."""
        if self._sample != (program.plan, row):
            inputs = self._samples([row])
            known = inputs | program.session.forward(inputs)
            self._sample, self._found = (program.plan, row), known | program.session.same_for_all(known)
        return self._found

    @staticmethod
    def _without_questions(program: Program) -> dict[str, str]:
        """What has no axis N -> output."""
        rest = {f"activation/{layer}": output for layer, output in program.activation.items()}
        rest |= {f"output/{name}": name for name in program.outputs}
        return rest | {"explained": program.explained}

    def _keep(self, name: str, array: np.ndarray, rows: Sequence[int]) -> None:
        without_batch = array.ndim == 0 or len(array) not in (1, len(rows), self.models.fixed)
        if without_batch or (len(array) == self.batch and len({*rows}) == self.batch):
            self._rest[name], self._filled[name] = array, self._every
            return
        if name not in self._rest:
            self._rest[name] = np.empty((self.batch, *array.shape[1:]), array.dtype)
            self._filled[name] = np.zeros(self.batch, bool)
        self._rest[name][rows] = array if len(array) == 1 else array[: len(rows)]
        self._filled[name][rows] = True

    def _result(self, asked: Asked, relevance: Mapping[str, Any]) -> Result:
        inputs = asked.inputs
        floats = [name for name in inputs if self.models.inputs[name][0].kind == "f"]
        of_layers = {name: relevance[f"layer/{layer.name}"] for name, layer in asked.record.items()}
        return Result(
            # an input wins over a layer of the same name
            relevance=of_layers | {name: relevance[f"input/{name}"] for name in inputs},
            activation={name: self._rest[f"activation/{layer.name}"] for name, layer in asked.record.items()},
            outputs={name[len("output/") :]: array for name, array in self._rest.items() if name.startswith("output/")},
            explained=self._rest["explained"],
            targets=asked.labels(),
            conditions=list(asked.conditions),
            starts=asked.starts,
            many=asked.many,
            image=next(iter([*floats, *inputs]), None),
            main=self.models.facts.output,
        )

    # --- chunks -------------------------------------------------------------------------------------------------------

    def _chunks(self, entries: Sequence[Any], each: int, most: int | None = None) -> Iterator[Sequence[Any]]:
        """Runs of entries that fit the memory budget (or the fixed batch), equally long but for the last one.

        `each`: bytes of an entry; `most`: so many in a run at most.

        On a device the last one reaches back into the one before and is as long: where shapes change, cuDNN plans
        every convolution anew, which takes longer than running it.
        """
        size = self.models.fixed
        if size is None:
            fitting = max(1, self.memory_limit // max(1, each))
            parts = -(-len(entries) // min(fitting, most or fitting))
            size = -(-len(entries) // max(1, parts))
        for at in range(0, len(entries), max(1, size)):
            if self.models.on_device and self.models.fixed is None:
                at = min(at, len(entries) - size)
            yield entries[at : at + size]

    def _bytes_forward(self) -> int:
        """Bytes that the forward pass keeps for one sample."""
        return 4 * sum(self.models.elements(self.feeds).values())

    def _bytes_question(self, plan: Plan) -> int:
        """Bytes that the backward pass takes for one more question: messages from its first mask down, and answers."""
        largest, answers = self.models.numbers_of_question(plan, self.feeds)
        return 4 * (LIVE_MESSAGES * largest + 2 * answers)
