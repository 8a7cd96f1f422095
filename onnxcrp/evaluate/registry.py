"""What a kernel is, and the tables of them: numpy kernels for every operator, torch's where time matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx

Kernel = Callable[..., Any]

KERNELS: dict[str, Kernel] = {}
"""Operator -> kernel(attributes, *inputs) -> array or tuple of arrays; missing optional inputs are None."""

TORCH_KERNELS: dict[str, Kernel] = {}
"""The same for operators whose time matters; a kernel returns NotImplemented where torch has no such configuration."""

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}


class Attributes(dict[str, Any]):
    """A node's attributes, and what else its meaning depends on.

    `opset`: version of the operator set; `outputs`: how many outputs are read (None: all); `floats`: the type that
    every floating tensor has in this run, whatever Cast or Constant say (None: as they say).
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        opset: int = 18,
        outputs: int | None = None,
        floats: np.dtype | None = None,
    ) -> None:
        super().__init__(values)
        self.opset = opset
        self.outputs = outputs
        self.floats = floats

    def float(self, name: str, default: float) -> float:
        """A float attribute; the default is rounded to float32, as a file would hold it."""
        return float(self.get(name, np.float32(default)))

    def floating(self, elem_type: int) -> np.dtype:
        """The numpy type of an ONNX element type, floating ones replaced by `floats`."""
        if self.floats is not None and elem_type in FLOATS:
            return self.floats
        return onnx.helper.tensor_dtype_to_np_dtype(elem_type)


def _register(registry: dict[str, Kernel], names: Iterable[str], function: Kernel) -> None:
    for name in names:
        if name in registry:
            raise ValueError(f"a kernel for {name} is registered already")
        registry[name] = function


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a numpy kernel for one or more operators; refuses to overwrite."""

    def register(function: Kernel) -> Kernel:
        _register(KERNELS, names, function)
        return function

    return register


def torch_kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a torch kernel, called as `kernel(torch, attributes, *inputs)`; refuses to overwrite."""

    def register(function: Kernel) -> Kernel:
        _register(TORCH_KERNELS, names, function)
        return function

    return register


def in_floats(x: np.ndarray, floats: np.dtype | None) -> np.ndarray:
    """x in the type that floats have in this run; x itself where it holds none."""
    if floats is not None and (x.dtype.kind == "f" or x.dtype.name == "bfloat16"):
        return x.astype(floats)
    return x
