"""Write ONNX nodes as arithmetic: a small eDSL over onnx-graphsurgeon.

    op = Graph(opset=18)
    x = op.value(some_gs_variable)
    y = op.Relu(x) / (1 + op.Exp(-x))      # appends Relu, Neg, Exp, Add, Div

A `Value` is a tensor of the graph under construction. Python numbers take the graph's float type, lists of ints become
int64 constants (axes, shapes), equal nodes are written once, constants are computed at once, and a value known to be
zero is a symbolic zero: it swallows products, vanishes from sums and never becomes a node.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

Operand = "Value | float | int | np.ndarray | Sequence[int]"

_SMALL = 4096  # what follows from constants is stored up to this many elements, larger ones are written as nodes
_SHARED = 1 << 16  # constants up to this many elements are shared by content, larger ones by identity


@dataclass(frozen=True)
class Product:
    """A message times `factors` over `divisors`, which are the same for all questions; not written yet."""

    message: Value
    factors: tuple[Value, ...] = ()
    divisors: tuple[Value, ...] = ()

    def times(self, factor: Value) -> Product:
        """With one more factor."""
        return Product(self.message, (*self.factors, factor), self.divisors)

    def over(self, divisor: Value) -> Product:
        """With one more divisor."""
        return Product(self.message, self.factors, (*self.divisors, divisor))

    @property
    def factor(self) -> Value:
        """Factors over divisors as one value, computed once for all questions.

        Each factor over its divisor: along a chain of sums these are shares, while all factors together would overflow.
        """
        found = self.message.graph.as_value(1.0)
        for factor, divisor in itertools.zip_longest(self.factors, self.divisors):
            found = found if factor is None else found * factor
            found = found if divisor is None else found / divisor
        return found

    def shared(self, other: Product) -> tuple[Product, Product, Product] | None:
        """What two products have in common (as a product of nothing), and what is left of each; None if not worth it.

        a . x + a . y = a . (x + y) saves a pass over the questions where one of the sides is left without a factor.
        """
        factors, mine, theirs = _common(self.factors, other.factors)
        divisors, under_mine, under_theirs = _common(self.divisors, other.divisors)
        left, right = Product(self.message, mine, under_mine), Product(other.message, theirs, under_theirs)
        if not (factors or divisors) or not (left.is_bare or right.is_bare):
            return None
        return Product(self.message, factors, divisors), left, right

    @property
    def is_bare(self) -> bool:
        """Whether it is the message alone."""
        return not self.factors and not self.divisors


def _common(
    mine: tuple[Value, ...], theirs: tuple[Value, ...]
) -> tuple[tuple[Value, ...], tuple[Value, ...], tuple[Value, ...]]:
    """What is in both, and what is left of each; by identity, with multiplicity."""
    both, rest, left = [], [], list(theirs)
    for value in mine:
        if value in left:
            left.remove(value)
            both.append(value)
        else:
            rest.append(value)
    return tuple(both), tuple(rest), tuple(left)


class Value:
    """A tensor of the graph being written: a variable, a constant, or a symbolic zero.

    `nonnegative` and `nonpositive` are static facts: no element is below (above) zero. `message` says that it depends
    on what is asked, so that it may have as many rows as there are questions, while what is no message is computed once
    for the sample. A product of a message and such factors is written late: divided by another factor it stays one
    product, and a . T(s) / z costs one pass over the questions, not two; a . x + a . y is written as a . (x + y), and
    (a . x + b . y) / z, where there are many questions for a sample, as (a / z) . x + (b / z) . y.
    """

    __array_ufunc__ = None  # numpy must not swallow `array * value`
    __hash__ = object.__hash__

    def __init__(
        self,
        graph: Graph,
        tensor: gs.Tensor | None,
        array: np.ndarray | None = None,
        *,
        nonnegative: bool = False,
        message: bool = False,
        product: Product | None = None,
    ) -> None:
        self.graph = graph
        self._tensor = tensor
        self.array = array
        self.message = message
        self.product = product
        self.addends: tuple[Value, Value] | None = None  # of a sum of products, or of such sums
        self._scope = list(graph._scope) if product else []
        self.nonnegative = nonnegative or (array is not None and array.dtype.kind in "fiu" and bool((array >= 0).all()))
        self._nonpositive = False

    @property
    def nonpositive(self) -> bool:
        """True if no element is above zero."""
        if self.array is not None and self.array.dtype.kind in "fiu" and not self.nonnegative:
            return bool((self.array <= 0).all())
        return self._nonpositive or self.is_zero

    @property
    def is_zero(self) -> bool:
        """True for the symbolic zero."""
        return self._tensor is None and self.array is None and self.product is None

    @property
    def is_constant(self) -> bool:
        """True if the value is known while writing."""
        return self.array is not None

    @property
    def tensor(self) -> gs.Tensor:
        """The graphsurgeon tensor; made on first use for constants and products."""
        if self._tensor is None:
            if self.product is not None:
                with self.graph.back_in(self._scope):
                    self._tensor = self.graph.Mul(self.product.message, self.product.factor).tensor
                return self._tensor
            if self.array is None:
                raise ValueError("a symbolic zero has no tensor: it must not reach a node")
            self._tensor = gs.Constant(self.graph.unique("constant"), np.asarray(self.array, order="C"))
        return self._tensor

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.tensor.name

    def __bool__(self) -> bool:
        raise TypeError("a Value has no truth value while the graph is written; use Where")

    def __repr__(self) -> str:
        if self.is_zero:
            return "Value(0)"
        if self._tensor is None and self.product is not None:
            return f"Value({self.product.message!r} * {self.product.factors!r} / {self.product.divisors!r})"
        return f"Value({self.name}{', constant' if self.is_constant else ''})"

    # A sum drops zeros, a product is swallowed by them: this is where branches that cannot matter disappear.
    def __add__(self, other: Any) -> Value:
        other = self.graph.as_value(other)
        if self.is_zero:
            return other
        if other.is_zero or other._is_scalar(0):
            return self
        if self._is_scalar(0):
            return other
        found = self._combined(self.graph.Add, other)
        if all(value.product or value.addends for value in (self, other)):
            found.addends = (self, other)
        return found._if(
            nonnegative=self.nonnegative and other.nonnegative, nonpositive=self.nonpositive and other.nonpositive
        )

    def __sub__(self, other: Any) -> Value:
        other = self.graph.as_value(other)
        if other.is_zero or other._is_scalar(0):
            return self
        return -other if self.is_zero else self._combined(self.graph.Sub, other)

    def _combined(self, how: Callable[..., Value], other: Value) -> Value:
        """Sum or difference of two values; factors that both share are multiplied afterwards."""
        shared = self.product and other.product and self.product.shared(other.product)
        if not shared:
            return how(self, other)
        common, mine, theirs = shared
        message = how(self.graph.delayed(mine), self.graph.delayed(theirs))
        return self.graph.delayed(Product(message, common.factors, common.divisors))

    def __mul__(self, other: Any) -> Value:
        other = self.graph.as_value(other)
        if self.is_zero or other._is_scalar(1):
            return self
        if other.is_zero or self._is_scalar(1):
            return other
        nonnegative = self.nonnegative and other.nonnegative
        if self.message != other.message:
            factor, message = (other, self) if self.message else (self, other)
            return self.graph.delayed((message.product or Product(message)).times(factor))._if(nonnegative=nonnegative)
        return self.graph.Mul(self, other)._if(nonnegative=nonnegative)

    def __truediv__(self, other: Any) -> Value:
        other = self.graph.as_value(other)
        if other.is_zero:
            raise ZeroDivisionError("division by a symbolic zero")
        if self.is_zero or other._is_scalar(1):
            return self
        nonnegative = self.nonnegative and other.nonnegative
        if self.product is not None and not other.message:
            return self.graph.delayed(self.product.over(other))._if(nonnegative=nonnegative)
        if self.addends is not None and self.graph.many and not other.message:
            return self.addends[0] / other + self.addends[1] / other
        return self.graph.Div(self, other)._if(nonnegative=nonnegative)

    def __matmul__(self, other: Any) -> Value:
        other = self.graph.as_value(other)
        return self.graph.zero if self.is_zero or other.is_zero else self.graph.MatMul(self, other)

    def __neg__(self) -> Value:
        return self if self.is_zero else self.graph.Neg(self)

    def __radd__(self, other: Any) -> Value:
        return self.graph.as_value(other) + self

    def __rsub__(self, other: Any) -> Value:
        return self.graph.as_value(other) - self

    def __rmul__(self, other: Any) -> Value:
        return self.graph.as_value(other) * self

    def __rtruediv__(self, other: Any) -> Value:
        return self.graph.as_value(other) / self

    def __rmatmul__(self, other: Any) -> Value:
        return self.graph.as_value(other) @ self

    def __gt__(self, other: Any) -> Value:
        return self.graph.Greater(self, other)

    def __ge__(self, other: Any) -> Value:
        return self.graph.GreaterOrEqual(self, other)

    def __lt__(self, other: Any) -> Value:
        return self.graph.Less(self, other)

    def __le__(self, other: Any) -> Value:
        return self.graph.LessOrEqual(self, other)

    def _is_scalar(self, number: float) -> bool:
        return self.array is not None and self.array.ndim == 0 and self.array == number

    def _know(self, array: np.ndarray) -> Value:
        """Written as nodes, known all the same."""
        self.array, self.nonnegative = array, array.dtype.kind in "fiu" and bool((array >= 0).all())
        return self

    def _if(self, *, nonnegative: bool = False, nonpositive: bool = False) -> Value:
        self.nonnegative |= nonnegative
        self._nonpositive |= nonpositive
        return self


class Graph:
    """The nodes of one ONNX graph, in the order they were written; `graph.Conv(x, W, strides=[2, 2])` appends one.

    `opset` and the float type are set explicitly. Errors: ValueError where a symbolic zero reaches an operator that has
    no rule for it.
    """

    def __init__(
        self,
        *,
        opset: int,
        nodes: Sequence[gs.Node] = (),
        taken: Iterable[str] = (),
        dtype: Any = np.float32,
        flip_convolutions: bool = True,
        store_weights: bool = False,
    ) -> None:
        self.opset = opset
        self.flip_convolutions = flip_convolutions  # stride-1 transposes as convolutions: twice as fast on CPU
        self.store_weights = store_weights  # W+, flipped kernels ... as constants, not as nodes that a runtime folds
        self.many = False  # questions on one sample: passes over what they share save passes over messages
        self.dtype = np.dtype(dtype)
        self.nodes: list[gs.Node] = list(nodes)
        self.zero = Value(self, None, nonnegative=True)
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._taken = set(taken)
        for node in self.nodes:
            self._taken.add(node.name)
            self._taken.update(tensor.name for tensor in [*node.inputs, *node.outputs])
        self._written: dict[Any, Any] = {}
        self._constants: dict[Any, Value] = {}
        self._values: dict[str, Value] = {}

    # ---- values ------------------------------------------------------------------------------------------------
    def value(self, tensor: gs.Tensor, *, nonnegative: bool = False) -> Value:
        """The Value of a tensor that already exists (one per tensor name)."""
        if tensor.name not in self._values:
            array = tensor.values if isinstance(tensor, gs.Constant) else None
            self._values[tensor.name] = Value(self, tensor, array, nonnegative=nonnegative)
        return self._values[tensor.name]

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """A constant; small equal ones are shared."""
        array = np.asarray(array, dtype=dtype)
        if array.size > _SHARED:
            return Value(self, None, array)
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = Value(self, None, array)
        return self._constants[key]

    def as_value(self, operand: Any) -> Value:
        """Numbers take the graph's float type, lists of ints are int64, arrays stay as they are."""
        if isinstance(operand, Value):
            return operand
        if isinstance(operand, np.ndarray | np.generic):
            return self.constant(operand)
        if isinstance(operand, bool):
            return self.constant(np.bool_(operand))
        if isinstance(operand, int | float):
            return self.constant(operand, self.dtype)
        return self.constant(operand, np.int64)

    # ---- names -------------------------------------------------------------------------------------------------
    @contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Nodes written inside are named after `names`: R/layer1.0.conv1/zplus/Div."""
        self._scope.extend(names)
        try:
            yield
        finally:
            del self._scope[-len(names) :]

    @contextmanager
    def back_in(self, scope: list[str]) -> Iterator[None]:
        """Write what was thought of earlier under the name it had then."""
        now, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = now

    def unique(self, name: str) -> str:
        """A name nobody has yet, below the current scope."""
        base = "/".join([*self._scope, name])
        while True:
            count = self._counts.get(base, 0)
            self._counts[base] = count + 1
            candidate = f"{base}_{count}" if count else base
            if candidate not in self._taken:
                self._taken.add(candidate)
                return candidate

    # ---- nodes -------------------------------------------------------------------------------------------------
    def __getattr__(self, op: str) -> Callable[..., Any]:
        if not op[:1].isupper():
            raise AttributeError(op)
        return lambda *inputs, **attrs: self.node(op, inputs, attrs)

    def node(
        self,
        op: str,
        inputs: Sequence[Any],
        attrs: dict[str, Any] | None = None,
        *,
        outputs: int = 1,
        domain: str | None = None,
    ) -> Any:
        """Append a node (or find its equal) and return its output Value, or a tuple of them where `outputs` > 1.

        None among the inputs is an omitted optional input; trailing Nones are dropped.
        """
        values = [None if operand is None else self.as_value(operand) for operand in inputs]
        while values and values[-1] is None:
            values.pop()
        if any(value is not None and value.is_zero for value in values):
            raise ValueError(f"a symbolic zero reached {op}")
        attrs = {name: value for name, value in (attrs or {}).items() if value is not None}
        key = _key(op, values, attrs, outputs, domain)
        if key in self._written:
            return self._written[key][0]
        folded = self._fold(op, values, attrs) if outputs == 1 and not domain else None
        if folded is not None and self._stores(folded):
            result: Any = self.constant(folded)
        else:
            name = self.unique(op)
            tensors = [gs.Variable(name if outputs == 1 else self.unique(op)) for _ in range(outputs)]
            node_inputs = [gs.Variable.empty() if value is None else value.tensor for value in values]
            self.nodes.append(
                gs.Node(op=op, name=name, attrs=attrs, inputs=node_inputs, outputs=tensors, domain=domain)
            )
            made = tuple(self.value(tensor) for tensor in tensors)
            for each in made:
                each.message = any(value is not None and value.message for value in values)
            result = made[0] if outputs == 1 else made
            if folded is not None:
                result._know(folded)
        self._written[key] = (result, values)  # keeps the operands alive, so that no id is used twice
        return result

    def adopt(self, node: gs.Node) -> None:
        """A node that is there already, of one output: whoever writes its equal gets this one's."""
        values = [self.value(tensor) for tensor in node.inputs]
        key = _key(node.op, values, node.attrs, 1, node.domain or None)
        self._written[key] = (self.value(node.outputs[0]), values)

    def _stores(self, array: np.ndarray) -> bool:
        """Whether an array that follows from constants goes into the file, not the nodes that make it."""
        return self.store_weights or array.size <= _SMALL

    def _fold(self, op: str, values: Sequence[Value | None], attrs: dict[str, Any]) -> np.ndarray | None:
        if op not in _NUMPY or attrs or any(value is None or value.array is None for value in values):
            return None
        arrays = [value.array for value in values if value is not None and value.array is not None]
        if sum(array.size for array in arrays) < np.prod(np.broadcast_shapes(*(a.shape for a in arrays))) / 4:
            return None  # an outer product would only make the file larger
        result = np.asarray(_NUMPY[op](*arrays))
        return result if result.dtype.kind == "b" else result.astype(arrays[-1].dtype, copy=False)

    # ---- what arithmetic alone does not say --------------------------------------------------------------------
    def delayed(self, product: Product) -> Value:
        """The value of a product that is written when somebody reads it."""
        if product.is_bare:
            return product.message
        key = ("product", id(product.message), tuple(map(id, product.factors)), tuple(map(id, product.divisors)))
        if key not in self._written:
            self._written[key] = (Value(self, None, message=True, product=product), [product])
        return self._written[key][0]

    def where(self, condition: Value, yes: Any, no: Any) -> Value:
        """`yes` where the condition holds, else `no`; zeros allowed."""
        yes, no = self.as_value(yes), self.as_value(no)
        if yes.is_zero and no.is_zero:
            return self.zero
        if yes.product is not None and no.is_zero and not condition.message:
            return self.delayed(Product(yes.product.message).times(self.where(condition, yes.product.factor, 0.0)))
        yes, no = (self.as_value(0.0) if value.is_zero else value for value in (yes, no))
        return self.Where(condition, yes, no)._if(nonnegative=yes.nonnegative and no.nonnegative)

    def float(self, value: Value) -> Value:
        """Cast of a boolean, integer or half-precision value to the graph's float type."""
        import onnx

        if value.is_constant and value.array is not None:
            return value if value.array.dtype == self.dtype else self.constant(value.array.astype(self.dtype))
        return self.Cast(value, to=onnx.helper.np_dtype_to_tensor_dtype(self.dtype))

    def shape(self, value: Value, start: int = 0, end: int | None = None) -> Value:
        """Shape of a value at run time, int64 [end - start]."""
        return self.Shape(value, start=start, end=end)

    def derive(
        self, x: Value, what: str, function: Callable[[np.ndarray], np.ndarray], nodes: Callable[[Value], Value]
    ) -> Value:
        """`function` of a constant under the name `what`; a symbolic zero if nothing is left of it.

        Large ones are written as `nodes`, which runtimes fold when they load the file: it need not hold W and W+.
        """
        key = (what, id(x))
        if key not in self._written:
            array = function(x.array)  # type: ignore[arg-type]
            if not array.any():
                result = self.zero
            else:
                result = self.constant(array) if self._stores(array) else nodes(x)._know(array)
            self._written[key] = (result, [x])
        return self._written[key][0]

    def sum(self, values: Sequence[Value]) -> Value:
        """Sum of any number of values; the symbolic zero if there is none."""
        total = self.zero
        for value in values:
            total = total + value
        return total


def positive(x: Value) -> Value:
    """x+ = max(x, 0) elementwise; x itself where that is a static fact."""
    if x.is_zero or x.nonnegative:
        return x
    if x.array is not None:
        return x.graph.derive(x, "positive", lambda array: np.maximum(array, 0), x.graph.Relu)
    return x.graph.Relu(x)._if(nonnegative=True)


def negative(x: Value) -> Value:
    """x- = min(x, 0) elementwise; a symbolic zero where x is known to be >= 0."""
    if x.is_zero or x.nonnegative:
        return x.graph.zero
    if x.array is not None:
        return x.graph.derive(x, "negative", lambda array: np.minimum(array, 0), lambda x: x.graph.Min(x, 0.0))
    return x.graph.Min(x, 0.0)._if(nonpositive=True)


def stabilize(z: Value, epsilon: float) -> Value:
    """stab(z) = z + epsilon * sign(z) with sign(0) = +1, so that nothing is divided by zero (ONNX Sign(0) is 0)."""
    graph = z.graph
    if z.is_zero:
        return graph.as_value(float(epsilon))
    if z.nonnegative:
        return z + float(epsilon)
    if z.nonpositive:  # known of sums of terms of one sign alone: where it is 0 so are these, and either sign will do
        return (z - float(epsilon))._if(nonpositive=True)
    # twice epsilon less epsilon is exact, and a product faster than Where
    return z + (graph.float(z >= 0.0) * (2 * float(epsilon)) - float(epsilon))


def _key(
    op: str, values: Sequence[Value | None], attrs: dict[str, Any], outputs: int, domain: str | None
) -> tuple[Any, ...]:
    """What equal nodes have in common."""
    return op, domain, outputs, tuple(map(id, values)), _frozen(attrs)


def _frozen(attrs: dict[str, Any]) -> tuple:
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in attrs.items()))


_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
}
