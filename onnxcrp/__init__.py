"""Layer-wise and Concept Relevance Propagation for exported ONNX models, compiled to plain ONNX.

    from onnxcrp import Explainer
    result = Explainer("model.onnx").explain(x, target=208, conditions=[{"features.28": [102]}])

What is named here is imported when it is first used, so that `import onnxcrp` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcrp.backward import compile
    from onnxcrp.composite import Composite
    from onnxcrp.composite import load as load_composite
    from onnxcrp.errors import (
        CompositeError,
        InputError,
        ModelError,
        OnnxcrpError,
        PluginError,
        QuestionError,
        RuntimeMissingError,
        UnsupportedError,
    )
    from onnxcrp.explainer import Explainer, NegativeLogitWarning, Result
    from onnxcrp.lrp import rule
    from onnxcrp.ops import Parts, activation, carries_none, transpose
    from onnxcrp.plugins import load_plugin

__version__ = "0.1.0"

_HOME = {
    "Explainer": "explainer",
    "Result": "explainer",
    "NegativeLogitWarning": "explainer",
    "compile": "backward",
    "Composite": "composite",
    "load_composite": "composite.load",
    "OnnxcrpError": "errors",
    "ModelError": "errors",
    "UnsupportedError": "errors",
    "CompositeError": "errors",
    "QuestionError": "errors",
    "InputError": "errors",
    "RuntimeMissingError": "errors",
    "PluginError": "errors",
    "load_plugin": "plugins",
    "transpose": "ops",
    "activation": "ops",
    "carries_none": "ops",
    "Parts": "ops",
    "rule": "lrp",
}

__all__ = [
    "Composite",
    "CompositeError",
    "Explainer",
    "InputError",
    "ModelError",
    "NegativeLogitWarning",
    "OnnxcrpError",
    "Parts",
    "PluginError",
    "QuestionError",
    "Result",
    "RuntimeMissingError",
    "UnsupportedError",
    "__version__",
    "activation",
    "carries_none",
    "compile",
    "load_composite",
    "load_plugin",
    "rule",
    "transpose",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxcrp' has no attribute {name!r}")
    from importlib import import_module

    module, _, inner = _HOME[name].partition(".")
    value = getattr(import_module(f"onnxcrp.{module}"), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
