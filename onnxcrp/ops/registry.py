"""What is known of each ONNX operator: its family, its transpose, how it is written again, what its sign is.

An op states once how a message travels back through it and nothing about relevance:

    @transpose("Transpose", family="rearrangement", sign=KEEPS)
    def transpose_(op, node, s):
        return op.Transpose(s, perm=...)

`op` is the graph being written, `node` a `Node`, `s` what arrives at the output. The result belongs to the node's data
inputs: one Value where the node has one, else `Parts` in the order of `node.data`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.errors import PluginError, UnsupportedError
from onnxcrp.graph import Graph, Value

FAMILIES = {
    "convolution": "linear in its input, weights shared over positions (Conv, ConvTranspose)",
    "dense": "linear in its input (Gemm, MatMul with a constant)",
    "average": "weighted sum within one tensor (average pooling, means, interpolation)",
    "sum": "sum of several tensors (residual Add, Sub, Sum, Mean)",
    "max": "the largest entry goes on (max pooling)",
    "activation": "elementwise nonlinearity",
    "normalization": "per-channel affine map (a BatchNormalization that could not be folded)",
    "lrn": "local response normalization",
    "product": "product of two tensors that both carry relevance: a gate and its signal",
    "matmul": "matrix product of two tensors that both carry relevance: attention",
    "softmax": "softmax inside the model",
    "layernorm": "normalization by the sample's own mean and deviation",
    "kernel": "kernel machine: a weighted sum of kernels over support vectors",
    "embedding": "rows of a constant table, picked by token ids",
    "scale": "product with a constant, change of sign or of number format",
    "other": "an operator of which only the transpose is known: a composite names its rule",
    "rearrangement": "entries are moved, copied or dropped; needs no line in a composite",
}

# Sign facts: what is provably >= 0 at an op's output.
KEEPS = "keeps"  # if every data and constant operand is
NONNEGATIVE = "nonnegative"  # always


class Parts(list):
    """One Value for each data input of an op with several; products work part by part."""

    def __mul__(self, other: Any) -> Parts:
        others = other if isinstance(other, list) else [other] * len(self)
        return Parts(mine * theirs for mine, theirs in zip(self, others, strict=True))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Ones:
    """A layer whose weights are all 1, for the rule `flat`; it treats channels alike, so one of them suffices.

    `count` is L(1,0)1, how many inputs each output has, so never below 0; `spread` is s -> T(1)s; `gather` sums, before
    anything is divided, the outputs that have the same inputs.
    """

    count: Value
    spread: Callable[[Value], Value]
    gather: Callable[[Value], Value] = lambda R: R

    def __post_init__(self) -> None:
        self.count._if(nonnegative=True)


class Node:
    """A node of the forward pass as ops and rules see it."""

    def __init__(self, graph: Graph, node: gs.Node, *, data: list[int], nonnegative: set[str], name: str) -> None:
        self.graph = graph
        self.node = node
        self.op = node.op
        self.attrs: dict[str, Any] = node.attrs
        self.data = data  # positions of the inputs that carry relevance
        self.name = name  # as users name it
        self._nonnegative = nonnegative

    def __repr__(self) -> str:
        return f"{self.node.name} ({self.op})"

    def _value(self, tensor: gs.Tensor) -> Value:
        value = self.graph.value(tensor, nonnegative=tensor.name in self._nonnegative)
        if tensor.dtype is not None and np.dtype(tensor.dtype) != self.graph.dtype:
            value = self.graph.float(value)
            value.nonnegative = value.nonnegative or tensor.name in self._nonnegative
        return value

    def input(self, index: int) -> Value:
        """Input `index` in the graph's float type."""
        return self._value(self.node.inputs[index])

    def output(self, index: int = 0) -> Value:
        """Output `index` in the graph's float type."""
        return self._value(self.node.outputs[index])

    def has(self, index: int) -> bool:
        """Whether optional input `index` is given."""
        return index < len(self.node.inputs) and not self.node.inputs[index].is_empty()

    def array(self, index: int, default: Any = None) -> np.ndarray | None:
        """The constant at input `index`; `default` if it is not given, None if it is no constant."""
        if not self.has(index):
            return default
        tensor = self.node.inputs[index]
        return tensor.values if isinstance(tensor, gs.Constant) else None

    def ints(self, index: int, default: list[int] | None = None) -> list[int]:
        """The constant integers at input `index`."""
        array = self.array(index)
        if array is None:
            if default is None:
                raise ValueError(f"{self!r}: input {index} must be a constant")
            return default
        return [int(i) for i in np.atleast_1d(array)]

    def dims(self, index: int = 0, *, output: bool = False) -> list[int | None]:
        """Static dimensions of input (or output) `index`; None where only the run knows."""
        tensor = (self.node.outputs if output else self.node.inputs)[index]
        if tensor.shape is None:
            raise ValueError(f"{self!r}: the rank of {tensor.name} is not known")
        return [int(d) if isinstance(d, int | np.integer) and d >= 0 else None for d in tensor.shape]

    def rank(self, index: int = 0) -> int:
        """Number of dimensions of input `index`."""
        return len(self.dims(index))

    def size(self, index: int, start: int, end: int | None = None) -> Value:
        """Dimensions start..end of input `index`, int64: a constant where they are static, else read at run time."""
        dims = self.dims(index)[start:end]
        if all(d is not None for d in dims):
            return self.graph.as_value(dims)
        return self.graph.shape(self.graph.value(self.node.inputs[index]), start, end)

    def full_size(self, index: int, *, batch: int = -1) -> Value:
        """Shape of input `index` with `batch` for axis 0: [-1, C, H, W] for Reshape, [1, C, H, W] for Expand."""
        rest = self.size(index, 1)
        if rest.is_constant and rest.array is not None:
            return self.graph.as_value([batch, *(int(i) for i in rest.array)])
        return self.graph.Concat([batch], rest, axis=0)

    def like(self, value: Value, index: int | None = None) -> Value:
        """`value` expanded to the full size of data input `index`."""
        return self.graph.Expand(value, self.full_size(self.data[0] if index is None else index, batch=1))


@dataclass(frozen=True)
class Op:
    """One operator: see the module's docstring."""

    name: str
    family: str | Callable[[gs.Node, int], str]
    transpose: Callable[..., Any]
    sign: Any = None  # KEEPS, NONNEGATIVE or a function of (node, nonnegative names) -> bool
    forward: Callable[..., Value] | None = None
    ones: Callable[..., Ones] | None = None
    derivative: Callable[..., Value] | None = None
    weighted: bool = False  # input 1 are weights, input 2 is the bias
    summary: str = ""

    def family_of(self, node: gs.Node, data: int = 1) -> str:
        """The family of one node with `data` data inputs; a Mul of two is a product, of one a scale."""
        return self.family if isinstance(self.family, str) else self.family(node, data)


OPS: dict[str, Op] = {}
CARRIES_NONE: dict[str, str] = {}
BUILT_IN: set[str] = set()  # those of the standard and of canonical form that come with onnxcrp


def _free(name: str) -> None:
    if name in OPS or name in CARRIES_NONE:
        raise PluginError(
            f"operator {name} is registered already",
            hint="a composite can give it another rule; one of your own domain is registered as my.domain::"
            + name.rpartition("::")[2],
        )


def _register(op: Op) -> None:
    _free(op.name)
    if isinstance(op.family, str) and op.family not in FAMILIES:
        raise PluginError(f"operator {op.name}: unknown family {op.family!r}", hint=f"one of {', '.join(FAMILIES)}")
    OPS[op.name] = op


@functools.cache
def standard() -> frozenset[str]:
    """All operators of the ONNX standard."""
    import onnx.defs

    return frozenset(schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == "")


def key_of(op: str, domain: str | None) -> str:
    """The name in OPS of an operator of some domain: `MyOp` where that was registered, else `my.domain::MyOp`.

    A plain name stands for the standard's operator, or for one of any other domain if the standard and onnxcrp have
    none of that name.
    """
    full = f"{domain}::{op}" if domain else op
    if not domain or full in OPS or full in CARRIES_NONE:
        return full
    return op if op not in standard() | BUILT_IN and (op in OPS or op in CARRIES_NONE) else full


def claimed(op: str, domain: str | None) -> bool:
    """Whether an operator of another domain, or a local function, is registered."""
    return any(key_of(op, domain) in table for table in (OPS, CARRIES_NONE))


def about(name: str) -> Op:
    """What is known of an operator; one that nobody registered has no transpose, which some rules do without."""

    def missing(op: Graph, node: Node, s: Any) -> Any:
        raise UnsupportedError(f"{node!r} has no transpose", hint=REGISTER.format(name))

    return OPS.get(name) or Op(name, "other", missing)


REGISTER = 'register it, @onnxcrp.transpose("{}") in a file that --plugin names (docs/extending.md)'


def transpose(
    *names: str,
    family: str | Callable[[gs.Node, int], str] = "other",
    sign: Any = None,
    forward: Callable[..., Value] | None = None,
    ones: Callable[..., Ones] | None = None,
    weighted: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the transpose of an operator (of several that share it); errors: PluginError if it has one already.

    `names`: "GridSample", or "my.domain::MyOp"; "MyOp" is that operator of any domain. `family`: which rules it can
    have. `forward(op, node, a, W, b)` writes the node again with other inputs, where its family's rules need that;
    `ones(op, node)` returns its `Ones`, for the rule `flat`.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        for name in names:
            _register(Op(name, family, function, sign, forward, ones, None, weighted, summary))
        return function

    return add


def activation(*names: str, sign: Any = None) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register an elementwise nonlinearity by its derivative: `f(op, node, x, y) -> dy/dx`."""

    def add(derivative: Callable[..., Value]) -> Callable[..., Value]:
        def back(op: Graph, node: Node, s: Value) -> Value:
            return s * derivative(op, node, node.input(node.data[0]), node.output())

        summary = (derivative.__doc__ or "").strip().split("\n")[0]
        for name in names:
            _register(Op(name, "activation", back, sign, derivative=derivative, summary=summary))
        return derivative

    return add


def carries_none(*names: str, why: str) -> None:
    """State that an operator's output carries no relevance (shapes, positions, comparisons)."""
    for name in names:
        _free(name)
        CARRIES_NONE[name] = why


def supported() -> Iterator[Op]:
    """All operators with a transpose, by family and name."""
    order = list(FAMILIES)
    yield from sorted(OPS.values(), key=lambda op: (order.index(op.family) if op.family in order else 99, op.name))
