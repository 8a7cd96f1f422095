"""Operators without a kernel here, computed by onnx.reference where that keeps the precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from onnxcrp.errors import UnsupportedError
from onnxcrp.evaluate.registry import Attributes


def by_reference(op: str, attrs: Attributes, inputs: Sequence[Any], opset: int, outputs: int | None = None) -> Any:
    """The operator by onnx.reference; raises UnsupportedError where that fails or computes in another precision."""
    from onnx.reference import ReferenceEvaluator

    try:
        count = outputs or onnx.defs.get_schema(op, opset, "").min_output
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
        results = [f"y{i}" for i in range(count)]
        given = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, inputs, strict=True)
            if n
        ]
        node = onnx.helper.make_node(op, names, results, **attrs)
        graph = onnx.helper.make_graph([node], op, given, [onnx.ValueInfoProto(name=n) for n in results])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        values = ReferenceEvaluator(model).run(None, {n: x for n, x in zip(names, inputs, strict=True) if n})
    except Exception as error:  # whatever goes wrong in there means that the operator is missing here
        raise UnsupportedError(f"there is no kernel for it, and onnx.reference fails: {first_line(error)}") from error
    if any(getattr(x, "dtype", None) == np.float64 for x in inputs):
        for value in values:
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype != np.float64:
                raise UnsupportedError(f"there is no kernel for it, and onnx.reference computes in {value.dtype}")
    return tuple(values)


def first_line(error: BaseException) -> str:
    """The first line of a message; the type's name where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
