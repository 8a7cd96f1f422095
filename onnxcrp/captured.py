"""CUDA graphs: what a model launches for one set of shapes is recorded, and launched as a whole from then on.

A question to a small net is mostly the launching of its kernels, one by one. CUDA replays a recording at the addresses
it was made with: so every set of shapes has a session of its own, whose memory nothing else touches, inputs are copied
into its buffers and answers out of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.errors import RuntimeMissingError

if TYPE_CHECKING:
    from onnxcrp.session import Port, Session

RECORDINGS = 4  # kept per model; each holds the model's weights once more
SEEN = 256  # sets of shapes remembered as having come once
STEERS = 16  # entries of an integer input that may be read on the CPU, as sizes are: another value, another recording


def check() -> None:
    """Raises RuntimeMissingError where onnxruntime cannot copy from one buffer of a device to another."""
    import onnxruntime

    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))
    try:
        value.update_inplace(value)
    except TypeError:
        raise RuntimeMissingError(
            f"cuda_graph needs a newer onnxruntime than {onnxruntime.__version__}",
            hint="pip install -U onnxruntime-gpu",
        ) from None


class Captured:
    """A Session whose runs are replayed from the second time on that inputs have these shapes. Thread-safe.

    `start(**options)` opens a Session of the model: without options as it is, with `sizes` and `capture` to record.
    Raises, when shapes come a second time, ModelError or OnnxcrpError for a model that CUDA cannot record.
    """

    def __init__(self, start: Callable[..., Session]) -> None:
        self._start = start
        self._session = start()
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._seen: set[Hashable] = set()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

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
        return self._answer(self._session.run, feeds, outputs, lambda value: value.numpy())

    def run_ortvalues(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """What `Session.run_ortvalues` answers, in memory that no later run writes to."""
        return self._answer(self._session.run_ortvalues, feeds, outputs, lambda value: value)

    def end_profile(self) -> Path:
        """Stop profiling; the file that onnxruntime wrote."""
        return self._session.end_profile()

    def _answer(
        self,
        plain: Callable[..., dict[str, Any]],
        feeds: Mapping[str, Any],
        outputs: Sequence[str] | None,
        given: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """By a recording, if inputs of these shapes have been there before, else by `plain`."""
        wanted = self._session.check(feeds, outputs)
        key = tuple(sorted((name, _shape(value), _kind(value), _steering(value)) for name, value in feeds.items()))
        with self._lock:
            again = key in self._seen
        if not again:
            found = plain(feeds, wanted)
            with self._lock:
                if len(self._seen) >= SEEN:
                    self._seen.clear()
                self._seen.add(key)
            return found
        return {name: given(value) for name, value in self._recording(key, feeds).run(feeds, wanted).items()}

    def _recording(self, key: Hashable, feeds: Mapping[str, Any]) -> _Recording:
        """What replays for inputs like these; made if it is not there."""
        with self._lock:
            if key in self._recordings:
                self._recordings.move_to_end(key)
                return self._recordings[key]
        with self._making:  # others go on replaying meanwhile
            with self._lock:
                if key in self._recordings:
                    return self._recordings[key]
            session = self._start(sizes=_sizes(self._session.inputs, feeds), capture=True)
            made = _Recording(session, feeds, self._session.run_ortvalues(feeds))
            with self._lock:
                self._recordings[key] = made
                if len(self._recordings) > RECORDINGS:
                    self._recordings.popitem(last=False)
            return made


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


def _steering(value: Any) -> bytes:
    """The values of a small integer input, likewise; nothing of others."""
    if np.dtype(_kind(value)).kind not in "iub" or np.prod(_shape(value), dtype=np.int64) > STEERS:
        return b""
    return np.asarray(value if isinstance(value, np.ndarray) else value.numpy()).tobytes()


def _sizes(ports: Mapping[str, Port], feeds: Mapping[str, Any]) -> dict[str, int]:
    """What the symbols in the shapes of inputs stand for; without those that stand for several sizes."""
    found: dict[str, set[int]] = {}
    for name, port in ports.items():
        for symbol, size in zip(port.shape, _shape(feeds[name]), strict=True):
            if isinstance(symbol, str):
                found.setdefault(symbol, set()).add(size)
    return {symbol: sizes.pop() for symbol, sizes in found.items() if len(sizes) == 1}
