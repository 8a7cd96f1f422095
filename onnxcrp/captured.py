"""CUDA graphs: what a model launches for one set of shapes is recorded, and launched as a whole from then on.

A question to a small net is mostly the launching of its kernels, one by one. CUDA replays a recording at the addresses
it was made with: so every set of shapes has a session of its own, whose memory nothing else touches, inputs are copied
into its buffers and answers out of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnxcrp.session import Port, Session

RECORDINGS = 4  # kept per model; each holds the model's weights once more
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]  # (input, shape, dtype), sorted


class Captured:
    """A Session whose runs are replayed from the second time on that inputs have these shapes. Thread-safe.

    `start(**options)` opens a Session of the model: without options as it is, with `sizes` and `capture` to record.
    Raises RuntimeMissingError, when shapes come a second time, for a model that CUDA cannot record.
    """

    def __init__(self, start: Callable[..., Session]) -> None:
        self._start = start
        self._session = start()
        self._lock = threading.Lock()
        self._seen: set[Shapes] = set()
        self._recordings: OrderedDict[Shapes, _Recording] = OrderedDict()

    @property
    def inputs(self) -> dict[str, Port]:
        """The model's inputs."""
        return self._session.inputs

    @property
    def outputs(self) -> dict[str, Port]:
        """The model's outputs."""
        return self._session.outputs

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """What `Session.run` answers."""
        recording = self._recording(feeds)
        if recording is None:
            return self._session.run(feeds, outputs)
        wanted = self._session.check(feeds, outputs)
        return {name: value.numpy() for name, value in recording.run(feeds, wanted).items()}

    def run_ortvalues(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """What `Session.run_ortvalues` answers, in memory that no later run writes to."""
        recording = self._recording(feeds)
        if recording is None:
            return self._session.run_ortvalues(feeds, outputs)
        return recording.run(feeds, self._session.check(feeds, outputs))

    def end_profile(self) -> Path:
        """Stop profiling; the file that onnxruntime wrote."""
        return self._session.end_profile()

    def _recording(self, feeds: Mapping[str, Any]) -> _Recording | None:
        """What replays for inputs of these shapes; None where they come for the first time."""
        shapes = tuple(sorted((name, _shape(value), _kind(value)) for name, value in feeds.items()))
        with self._lock:
            if shapes not in self._seen:
                self._seen.add(shapes)
                return None
            if shapes not in self._recordings:
                sizes = _sizes(self._session.inputs, feeds)
                found = self._session.run_ortvalues(feeds)
                self._recordings[shapes] = _Recording(self._start(sizes=sizes, capture=True), feeds, found)
            self._recordings.move_to_end(shapes)
            if len(self._recordings) > RECORDINGS:
                self._recordings.popitem(last=False)
            return self._recordings[shapes]


class _Recording:
    """A session for one set of shapes, with the buffers that it reads and writes. Thread-safe."""

    def __init__(self, session: Session, feeds: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._inputs = {name: _buffer(session, _shape(value), _kind(value)) for name, value in feeds.items()}
        self._outputs = {name: _buffer(session, _shape(value), _kind(value)) for name, value in found.items()}
        self._session = session
        self._run = session.bound(self._inputs, self._outputs)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Outputs as OrtValues of their own."""
        with self._lock:
            for name, value in feeds.items():
                self._inputs[name].update_inplace(getattr(value, "value", value))
            self._run()
            found = {}
            for name in outputs:
                buffer = self._outputs[name]
                found[name] = _buffer(self._session, _shape(buffer), _kind(buffer))
                found[name].update_inplace(buffer)
            return found


def _buffer(session: Session, shape: Sequence[int], kind: str) -> Any:
    """An OrtValue on the session's device."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(kind), *session.device)


def _shape(value: Any) -> tuple[int, ...]:
    """Of an array, a DeviceArray or an OrtValue."""
    return tuple(value.shape() if callable(value.shape) else value.shape)


def _kind(value: Any) -> str:
    """The dtype's name, likewise."""
    from onnxcrp.session import dtype_of

    return str(value.dtype if hasattr(value, "dtype") else dtype_of(value.data_type()))


def _sizes(ports: Mapping[str, Port], feeds: Mapping[str, Any]) -> dict[str, int]:
    """What the symbols in the shapes of inputs stand for; without those that stand for several sizes."""
    found: dict[str, set[int]] = {}
    for name, value in feeds.items():
        for symbol, size in zip(ports[name].shape, _shape(value), strict=True):
            if isinstance(symbol, str):
                found.setdefault(symbol, set()).add(size)
    return {symbol: sizes.pop() for symbol, sizes in found.items() if len(sizes) == 1}
