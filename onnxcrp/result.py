"""What an Explainer found: arrays, a heatmap of them, and their file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcrp import condition as words
from onnxcrp.errors import OnnxcrpError, QuestionError


class ExplanationWarning(UserWarning):
    """An answer is not what its reader may take it for."""


class NegativeLogitWarning(ExplanationWarning):
    """The explained output is negative, so that the signs of all relevance are the wrong way round."""


@dataclass
class Result:
    """What `Explainer.explain` found: numpy arrays [B, ...]; relevance [B, N, ...] where N questions were asked.

    `relevance`: of inputs and of recorded layers (before their mask). `activation`: of recorded layers (before the
    nonlinearity). `outputs`: all of the model's own. `explained`: the logits. `targets` [B] or [B, N]: the classes
    explained; lists of labels where they are no single numbers, None for a hidden start.
    """

    relevance: dict[str, Any]
    activation: dict[str, Any]
    outputs: dict[str, Any]
    explained: Any
    targets: Any
    conditions: list[Mapping[str, Any]]
    starts: list[Mapping[str, Any]] | None
    many: bool  # whether relevance has an axis N
    image: str | None  # the input that `heatmap` shows
    main: str  # the model's output that is explained

    @property
    def output(self) -> Any:
        """The model's output that is explained, as the model gives it (after Softmax where it has one)."""
        return self.outputs[self.main]

    @property
    def heatmap(self) -> np.ndarray:
        """Relevance of the first float input summed over channels: [B, H, W] or [B, L]; [B, N, ...] with N questions.

        A model without float inputs shows its first one. Raises QuestionError if no input's relevance was asked for.
        """
        if self.image is None:
            raise QuestionError("there is no heatmap: no input's relevance was asked for", hint="leave out inputs=()")
        R = _numpy(self.relevance[self.image])
        lead = 2 if self.many else 1
        axis = channel_axis((0, *R.shape[lead:]))
        return R if axis is None else R.sum(axis + lead - 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz: heatmap, output, explained, targets, conditions (JSON), relevance/<name>, activation/<name>.

        Targets that are no single numbers are JSON too. Raises OnnxcrpError when the disk refuses; the file is then
        as it was before.
        """
        arrays: dict[str, Any] = {
            "output": self.output,
            "explained": self.explained,
            "targets": self.targets if isinstance(self.targets, np.ndarray) else json.dumps(plain(self.targets)),
            "conditions": json.dumps([words.to_json(each) for each in self.conditions]),
        }
        if self.image is not None:
            arrays["heatmap"] = self.heatmap
        if self.starts is not None:
            arrays["starts"] = json.dumps([words.to_json(each) for each in self.starts])
        arrays |= {f"relevance/{name}": array for name, array in self.relevance.items()}
        arrays |= {f"activation/{name}": array for name, array in self.activation.items()}
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **{name: _numpy(array) for name, array in arrays.items()})  # type: ignore[arg-type]
            temporary.replace(path)
        except OSError as error:
            raise OnnxcrpError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _numpy(value: Any) -> np.ndarray:
    """An array, also of what onnxruntime left on the device."""
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)


def channel_axis(shape: Sequence[Any]) -> int | None:
    """Axis of the channels of an input [B, ...]; None below rank 3.

    The layout is told from the shape as for inputs: NCHW or NHWC, NCL or NLC; axis 1 for other ranks.
    """
    from onnxcrp.preprocessing import detect_layout

    if len(shape) < 3:
        return None
    layout = detect_layout(tuple(shape))
    return layout.index("C") if layout else 1


def as_drawn(R: np.ndarray, layout: str) -> np.ndarray | None:
    """One sample's input relevance as pictures show it: [H, W], channels summed; [leads, L]; None for other ranks."""
    if R.ndim == 3:
        return R.sum(-1 if layout == "NHWC" else 0)
    if R.ndim == 2:
        return R.T if layout == "NLC" else R
    return R[None] if R.ndim == 1 else None


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {words.target_text(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
