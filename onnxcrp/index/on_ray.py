"""The same build on Ray: actors with a session each take blocks, write parts, and may die."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcrp.errors import OnnxcrpError
from onnxcrp.index import store
from onnxcrp.index.state import State

if TYPE_CHECKING:
    from onnxcrp.index.builder import Meter
    from onnxcrp.index.work import Block, Recipe, Work

SHARE = 8  # tasks per actor, so that a slow one holds nobody up
DEATHS = 3  # of actors per one that was asked for, before the build gives up


class Worker:
    """What an actor does: blocks into a state of its own, each task written as a part before it counts as done."""

    def __init__(
        self,
        recipe: Recipe,
        served: dict[str, dict[int, Any]] | None,
        parts: str,
        question: Any,
        plugins: Sequence[str] = (),
    ) -> None:
        from onnxcrp.index.builder import Keeper
        from onnxcrp.index.work import Work
        from onnxcrp.plugins import load_plugin

        for path in plugins:
            load_plugin(path)
        self.work = Work(recipe)
        if self.work.question != question:
            raise OnnxcrpError("a worker sees another model or other data than the driver", hint="is the path shared?")
        self.served = served
        self.keeper = Keeper(self.work, Path(parts), f"ray-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        self.state = State(self.work.layout, served)

    def ready(self) -> int:
        """The process, once model and data are open."""
        return os.getpid()

    def run(self, blocks: Sequence[Block]) -> tuple[int, int]:
        """(samples, skipped) of these blocks, when they are on the disk."""
        before = len(self.state.skipped)
        samples = sum(len(self.work.samples_of(block)) for block in blocks)
        self.work.run(self.state, blocks)
        self.keeper.write(self.state)
        return samples, len(self.state.skipped) - before


def run_on_ray(
    work: Work,
    state: State,
    missing: Sequence[Block],
    parts: Path,
    meter: Meter,
    *,
    address: str | None = None,
    actors: int | None = None,
) -> State:
    """All missing blocks on Ray actors, merged into the state.

    An actor that dies loses the blocks that it had not written, and is replaced. Raises OnnxcrpError without Ray, or
    where actors keep dying.
    """
    try:
        import ray
    except ImportError:
        raise OnnxcrpError("engine ray needs Ray", hint='pip install "onnxcrp[index,ray]"') from None
    from onnxcrp.index.builder import Keeper, merged_if_new, part_folders
    from onnxcrp.plugins import loaded

    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    if state.done:  # what earlier runs have seen becomes one part, beside those that the actors will write
        keeper = Keeper(work, parts, f"before-{uuid.uuid4().hex[:8]}")
        keeper.replaces = part_folders(parts)
        keeper.write(state)
    with store.writing(parts):
        parts.mkdir(parents=True, exist_ok=True)
    before = set(part_folders(parts))
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if work.recipe.providers is None else 0
    threads = work.recipe.threads or 1
    count, options = share(actors, gpus, int(resources.get("CPU", 1)), threads)
    recipe = dataclasses.replace(
        work.recipe,
        model=_absolute(work.recipe.model),
        data=_absolute(work.recipe.data),
        labels=_absolute(work.recipe.labels),
        composite=work.explainer.composite,
        preprocess=work.port.preprocessing,
        threads=threads,
    )
    Actor = ray.remote(Worker)

    def start() -> Any:
        return Actor.options(max_restarts=0, **options).remote(
            recipe, state.served, str(parts.resolve()), work.question, loaded()
        )

    size = max(1, -(-len(missing) // (count * SHARE)))
    waiting = [list(missing[at : at + size]) for at in range(0, len(missing), size)]
    count = min(count, len(waiting))
    busy: dict[Any, tuple[Any, list[Block]]] = {}
    written: dict[Any, list[list[Block]]] = {}
    deaths = 0
    workers = [start() for _ in range(count)]
    try:
        while waiting or busy:
            for worker in workers:
                if waiting and all(worker is not other for other, _ in busy.values()):
                    task = waiting.pop(0)
                    busy[worker.run.remote(task)] = (worker, task)
            ready, _ = ray.wait(list(busy))
            for done in ready:
                worker, task = busy.pop(done)
                try:
                    samples, skipped = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    deaths += 1
                    if deaths > DEATHS * count:
                        raise OnnxcrpError(
                            f"workers keep dying: {_first_line(error)}", hint="too little memory?"
                        ) from error
                    ray.kill(worker)  # one that is only out of reach must not write any more
                    workers[next(i for i, each in enumerate(workers) if each is worker)] = start()
                    waiting.insert(0, task)
                    continue
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, OnnxcrpError) else None
                    raise cause or OnnxcrpError(f"a worker failed: {_first_line(error)}") from error
                written.setdefault(worker, []).append(task)
                meter(samples, skipped)
    finally:
        for worker in workers:
            ray.kill(worker)
    for folder in part_folders(parts):
        if folder not in before:
            state = merged_if_new(state, store.read_state(folder))
    left = [block for block in missing if block[1] not in state.done.get(block[0], set())]
    if left:  # a worker died between writing a part and dropping the one before
        work.run(state, left)
    return state


def share(asked: int | None, gpus: int, cpus: int, threads: int) -> tuple[int, dict[str, float]]:
    """How many actors, and what each reserves: a GPU, or `threads` cores; less where that many would not fit."""
    kind, there, each = ("num_gpus", gpus, 1) if gpus else ("num_cpus", max(cpus, 1), threads)
    count = asked or max(1, there // each)
    least = there // count or there * 10_000 // count / 10_000  # Ray counts so: whole above 1, ten-thousandths below
    return count, {kind: min(each, least)}


def _absolute(data: Any) -> Any:
    """Local paths as actors see them, whose working folder is another."""
    if isinstance(data, list):
        return [_absolute(each) for each in data]
    if not isinstance(data, (str, os.PathLike)):
        return data
    text = os.fspath(data)
    name, equals, path = text.partition("=") if not os.path.exists(text) else ("", "", text)
    path = path if equals else text
    if "://" in path:
        return text
    return f"{name}{equals}{os.path.abspath(path)}" if equals else os.path.abspath(text)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


__all__ = ["Worker", "run_on_ray"]
