"""Reference samples and statistics of all concepts over a dataset.

    from onnxcrp.index import Index, build
    index = build("model.onnx", "images/", "images.index", progress=True)
    index.top("features.28", 102)

What is named here is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcrp.index.builder import build
    from onnxcrp.index.dataset import open_data
    from onnxcrp.index.merger import merge
    from onnxcrp.index.query import Index

_HOME = {"Index": "query", "build": "builder", "merge": "merger", "open_data": "dataset"}

__all__ = ["Index", "build", "merge", "open_data"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxcrp.index' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"onnxcrp.index.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
