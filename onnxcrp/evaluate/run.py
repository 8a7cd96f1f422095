"""Whole models and single nodes: which kernel, in which order, in which type."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcrp.errors import InputError, ModelError, RuntimeMissingError, UnsupportedError
from onnxcrp.evaluate.reference import by_reference, first_line
from onnxcrp.evaluate.registry import FLOATS, KERNELS, TORCH_KERNELS, Attributes, in_floats


def _torch_module(backend: str) -> Any:
    """The torch module for "torch" and, where it is installed, "auto"; None for numpy."""
    if backend not in ("auto", "numpy", "torch"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'torch', not {backend!r}")
    if backend == "numpy" or (backend == "auto" and importlib.util.find_spec("torch") is None):
        return None
    try:
        import torch
    except ImportError as error:
        if backend == "auto":
            return None
        raise RuntimeMissingError("torch is not installed", hint="pip install 'onnxcrp[torch]'") from error
    return torch


RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def evaluate_node(
    op: str,
    attrs: Mapping[str, Any],
    inputs: Sequence[np.ndarray | None],
    *,
    domain: str = "",
    opset: int = 18,
    outputs: int | None = None,
    floats: Any = None,
    backend: str = "numpy",
    name: str = "",
) -> list[np.ndarray]:
    """The outputs of one node, in the type of its inputs.

    `attrs` as plain Python values; a missing optional input is None; `outputs`: how many are wanted (None: all that
    the operator has); `floats`: the type of every float that Cast, Constant and the like make. Raises UnsupportedError,
    which names the operator and the node, where it cannot be evaluated.
    """
    torch = _torch_module(backend)
    given = Attributes(attrs, opset=opset, outputs=outputs, floats=None if floats is None else np.dtype(floats))
    values = _call(op, given, list(inputs), domain, torch, name)
    return values if outputs is None else values[:outputs]


def _call(op: str, attrs: Attributes, inputs: list[np.ndarray | None], domain: str, torch: Any, name: str) -> list[Any]:
    where = f"{op}" + (f" (node {name!r})" if name else "")
    if domain not in ("", "ai.onnx", "onnxcrp"):
        raise UnsupportedError(f"cannot evaluate {where}: operators of the domain {domain!r} are not known")
    if op in RANDOM:
        raise UnsupportedError(f"cannot evaluate {where}: it draws random numbers")
    while inputs and inputs[-1] is None:
        inputs.pop()
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are results like others
            result: Any = NotImplemented
            if torch is not None and op in TORCH_KERNELS and all(x is None or x.dtype.kind == "f" for x in inputs):
                result = TORCH_KERNELS[op](torch, attrs, *inputs)
            if result is NotImplemented and op in KERNELS:
                result = KERNELS[op](attrs, *inputs)
            if result is NotImplemented:
                result = by_reference(op, attrs, inputs, attrs.opset, attrs.outputs)
    except UnsupportedError as error:
        raise UnsupportedError(f"cannot evaluate {where}: {error.message}", hint=error.hint) from error
    except (ValueError, IndexError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        shapes = [None if x is None else list(x.shape) for x in inputs]
        raise ModelError(f"{where} fails on inputs of shape {shapes}: {first_line(error)}") from error
    values = result if isinstance(result, tuple) else (result,)
    return [y if isinstance(y, list) else np.asarray(y) for y in values]  # a list: an ONNX sequence


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values; tensors as arrays, subgraphs as they are."""
    values = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        values[attribute.name] = value
    return values


def evaluate(
    model: onnx.ModelProto,
    feeds: Mapping[str, Any],
    outputs: Sequence[str] | None = None,
    *,
    dtype: Any = np.float64,
    backend: str = "auto",
) -> dict[str, np.ndarray]:
    """Run a whole model with every floating tensor in `dtype`, integers as they are: {output name: array}.

    `feeds` may also give inner tensors, which are then not computed. `outputs` may name any tensor (None: the model's
    outputs); only what they need is computed, and what has no more readers is dropped. `backend`: "numpy", "torch", or
    "auto": torch's kernels where it is installed.
    Raises UnsupportedError, which names operator and node, for what cannot be evaluated, InputError for wrong feeds.
    """
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    floats, torch = np.dtype(dtype), _torch_module(backend)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 18))
    wanted = list(outputs) if outputs is not None else [o.name for o in model.graph.output]
    values: dict[str, np.ndarray] = _inputs(model.graph, feeds, floats)
    _run(model.graph, values, {}, wanted, floats=floats, opset=opset, torch=torch)
    return {name: values[name] for name in wanted}


def _inputs(graph: onnx.GraphProto, feeds: Mapping[str, Any], floats: np.dtype) -> dict[str, np.ndarray]:
    """The feeds, checked by name and brought to the declared type."""
    declared = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    initialized = {i.name for i in graph.initializer}
    inner = {name for node in graph.node for name in node.output}
    if unknown := set(feeds) - set(declared) - inner:
        raise InputError(
            f"the model has no input {sorted(unknown)[0]!r}", hint=f"its inputs are {', '.join(map(repr, declared))}"
        )
    if missing := [n for n in declared if n not in feeds and n not in initialized]:
        raise InputError(f"the model's input {missing[0]!r} is missing")
    values = {}
    for name, value in feeds.items():
        array = np.asarray(value)
        if name not in declared:
            values[name] = in_floats(array, floats)
            continue
        target = floats if declared[name] in FLOATS else onnx.helper.tensor_dtype_to_np_dtype(declared[name])
        if array.dtype.kind == "f" and target.kind != "f":
            raise InputError(f"the model's input {name!r} holds {target}, not {array.dtype}")
        values[name] = array.astype(target)
    return values


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads, the outer tensors of its subgraphs included."""
    names = {n for n in node.input if n}
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
            for inner in graph.node:
                names |= _reads(inner) - own
                own |= set(inner.output)
            names |= {o.name for o in graph.output} - own
    return names


def _run(
    graph: onnx.GraphProto,
    values: dict[str, np.ndarray],
    outer: Mapping[str, np.ndarray],
    wanted: Sequence[str],
    *,
    floats: np.dtype,
    opset: int,
    torch: Any,
) -> None:
    """Compute `wanted` into `values`; `outer`: the tensors around a subgraph."""
    needed, nodes, fixed = set(wanted), [], set(values)
    for node in reversed(graph.node):
        if needed.intersection(node.output) - fixed:
            nodes.append(node)
            needed |= _reads(node)
    readers = Counter(name for node in nodes for name in _reads(node))
    readers.update(wanted)  # never dropped
    initializers = {i.name: i for i in graph.initializer if i.name in needed}

    def value(name: str) -> np.ndarray:
        if name in values:
            return values[name]
        if name in initializers:  # converted when first read: the whole net in double need not lie in memory at once
            values[name] = in_floats(numpy_helper.to_array(initializers[name]), floats)
            return values[name]
        if name in outer:
            return outer[name]
        raise ModelError(f"no node, input or initializer makes the tensor {name!r}")

    for node in reversed(nodes):
        attrs = Attributes(attributes(node), opset=opset, outputs=len(node.output), floats=floats)
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            branch = attrs["then_branch" if np.any(value(node.input[0])) else "else_branch"]
            scope: dict[str, np.ndarray] = {}
            names = [o.name for o in branch.output]
            around = {n: value(n) for n in _reads(node) if n}
            _run(branch, scope, around, names, floats=floats, opset=opset, torch=torch)
            results = [scope[n] for n in names]
        else:
            given = [value(n) if n else None for n in node.input]
            results = _call(node.op_type, attrs, given, node.domain, torch, node.name or node.output[0])
            given.clear()
        for name, result in zip(node.output, results, strict=False):
            if name and readers[name] and name not in fixed:
                values[name] = in_floats(result, floats) if isinstance(result, np.ndarray) else result
        for name in _reads(node):
            readers[name] -= 1
            if not readers[name]:
                values.pop(name, None)
    for name in wanted:  # an output may be an input or an initializer
        values.setdefault(name, value(name))
