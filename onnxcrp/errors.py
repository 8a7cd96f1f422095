"""What can go wrong, said in one line: every error names the thing, what was expected, and carries a hint."""

from __future__ import annotations


class OnnxcrpError(Exception):
    """Base of all errors a user can cause; `str(error)` is one line, `error.hint` says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ModelError(OnnxcrpError):
    """The .onnx file cannot be read, upgraded or brought into canonical form."""


class UnsupportedError(ModelError):
    """The model holds operators through which relevance cannot be sent back."""


class CompositeError(OnnxcrpError):
    """A composite is unknown, malformed, or does not say which rule an operator gets."""


class PluginError(OnnxcrpError, ValueError):
    """A plugin cannot be run, or registers what is registered already."""


class QuestionError(OnnxcrpError):
    """A layer, concept, target or seed does not exist or does not fit the model."""


class InputError(OnnxcrpError):
    """The sample to be explained is of the wrong type or shape, or not finite."""


class RuntimeMissingError(OnnxcrpError):
    """No onnxruntime is installed."""
