"""Activation functions that exporters split into arithmetic become one node again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import DOMAIN, Names, describe, insert, pinned, prune
from onnxcrp.canonize.pattern import Region, constant, regions
from onnxcrp.canonize.report import PassReport

GRID = np.unique(np.r_[np.linspace(-12, 12, 193), [s * m for s in (-1, 1) for m in (20, 50, 100, 1e3, 1e4)]])


def fuse_activations(graph: gs.Graph) -> PassReport:
    """Replace elementwise arithmetic on one tensor x by the activation function that it computes.

    SiLU x sigmoid(alpha x) (alpha = 1.702: QuickGELU), GELU 0.5 x (1 + erf(x / sqrt 2)) or with tanh(sqrt(2 / pi) (x
    + 0.044715 x^3)), HardSwish x clip(x + 3, 0, 6) / 6, HardSigmoid clip(alpha x + beta, 0, 1), Mish x tanh(softplus
    x), Softplus log(1 + exp x), Sigmoid, Softsign, Relu, LeakyRelu and Clip (ReLU6), whichever way they are written:
    what is recognised is the function, by its values on a grid, with room for constants rounded to 4 digits. A
    function is left alone, with the reason, where something else reads a tensor inside it. `Silu(x; alpha=1)` and
    `Gelu(x; approximate)` are operators of the domain "onnxcrp"; Swish and Gelu of newer opsets and of com.microsoft
    become these too.
    """
    report = PassReport("fuse activations")
    for node in graph.nodes:
        if line := _rename(node):
            report.done.append(line)
    order, names, pins = {id(node): i for i, node in enumerate(graph.nodes)}, Names(graph), pinned(graph)
    fused: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}
    for last in reversed(graph.nodes):  # the largest first: HardSigmoid is a part of HardSwish
        if not last.outputs or not _is_scalar_arithmetic(last):
            continue  # fused already, or nothing that could end a function
        for region, found in reversed(list(_functions(last, order))):
            parts = ", ".join(node.op for node in region.nodes)
            if reason := region.read_elsewhere(pins):
                report.declined.append(f"{found.op} ({parts}) at {last.name!r}: {reason}")
                continue
            name = region.scoped_name(found.op, names)
            dtype = np.float32 if region.x.dtype is None else region.x.dtype
            bounds = [gs.Constant(names.fresh(f"{name}/{k}"), np.array(v, dtype)) for k, v in found.constants.items()]
            node = region.fuse(found.op, name, domain=found.domain, attrs=dict(found.attrs), constants=bounds)
            fused[id(last)] = ([node], [])
            report.done.append(f"{describe(node)} from {parts}")
            break
    insert(graph, fused)
    prune(graph)
    return report


def _functions(last: gs.Node, order: dict[int, int]) -> Iterator[tuple[Region, Found]]:
    """Regions that end with `last` and compute a known function, the smaller ones first."""
    for region in regions(last, order, _is_scalar_arithmetic):
        found = _recognise(region)
        if found and found.op not in {node.op for node in region.nodes}:  # relu(sigmoid(x)) has its Sigmoid already
            yield region, found


# ---------------------------------------------------------------------------------------- which arithmetic is looked at


def _clip(attrs: dict, x: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None) -> np.ndarray:
    """Clip takes its bounds as inputs since opset 11, as attributes before."""
    low = attrs.get("min", -np.inf) if low is None else low
    high = attrs.get("max", np.inf) if high is None else high
    return np.minimum(np.maximum(x, low), high)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


_erf = np.vectorize(math.erf, otypes=[np.float64])

ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "Add": lambda _, a, b: a + b,
    "Sum": lambda _, *terms: sum(terms),
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Pow": lambda _, a, b: np.power(a, np.float64(b)),
    "Neg": lambda _, a: -a,
    "Reciprocal": lambda _, a: 1 / a,
    "Abs": lambda _, a: np.abs(a),
    "Exp": lambda _, a: np.exp(a),
    "Log": lambda _, a: np.log(a),
    "Erf": lambda _, a: _erf(a),
    "Tanh": lambda _, a: np.tanh(a),
    "Sigmoid": lambda _, a: _sigmoid(a),
    "Softplus": lambda _, a: np.logaddexp(a, 0),
    "Relu": lambda _, a: np.maximum(a, 0),
    "Max": lambda _, *terms: np.maximum.reduce(np.broadcast_arrays(*terms)),
    "Min": lambda _, *terms: np.minimum.reduce(np.broadcast_arrays(*terms)),
    "Clip": _clip,
    "HardSigmoid": lambda attrs, a: np.clip(attrs.get("alpha", 0.2) * a + attrs.get("beta", 0.5), 0, 1),
    "Identity": lambda _, a: a,
}
CURVED = set(ARITHMETIC) - {"Add", "Sum", "Sub", "Mul", "Neg", "Identity"}  # the others alone make polynomials


def _is_scalar_arithmetic(node: gs.Node) -> bool:
    """Whether the node is elementwise and every constant in it is one number."""
    if node.op not in ARITHMETIC or node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return False
    ranks = [0 if t.shape is None else len(t.shape) for t in node.inputs if not t.is_empty() and constant(t) is None]
    for tensor in node.inputs:
        values = None if tensor.is_empty() else constant(tensor)
        # a constant [1, 1, 1] must not add axes to x, whose rank may be unknown
        if values is not None and (values.size != 1 or values.ndim > max([1, *ranks])):
            return False
    return bool(ranks)


# ------------------------------------------------------------------------------------------------- known functions of x


class Found(NamedTuple):
    """An activation node: its op, its attributes, its constant inputs and its values on the grid."""

    op: str
    values: np.ndarray
    domain: str = ""
    attrs: dict[str, float | str] = {}  # noqa: RUF012
    constants: dict[str, float] = {}  # noqa: RUF012


def _recognise(region: Region) -> Found | None:
    """The known function with the same values, if any."""
    ops = {node.op for node in region.nodes}
    if not ops & CURVED or (len(region.nodes) == 1 and not ops & {"Max", "Min"}):
        return None  # a single node is what it is called, but for these two
    got = region.values(GRID, ARITHMETIC)
    finite = np.isfinite(got)  # log(1 + exp(1000)) overflows, softplus does not
    if not finite[np.abs(GRID) <= 12].all():
        return None
    half = any(t.dtype == np.float16 or isinstance(t.dtype, int) for t in (region.x, region.out))  # int: bfloat16
    tolerance = 1e-3 if half else 1e-4
    best, error = None, tolerance
    for candidate in _candidates(got):
        scale = np.maximum(np.abs(candidate.values), 1)
        difference = float(np.max(np.abs(candidate.values - got)[finite] / scale[finite]))
        if difference < error:
            best, error = candidate, difference
    return best


@functools.cache
def _without_parameters() -> tuple[Found, ...]:
    x = GRID
    cubic, softplus = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3), np.logaddexp(x, 0)
    return (
        Found("Relu", np.maximum(x, 0)),
        Found("Gelu", 0.5 * x * (1 + _erf(x / math.sqrt(2))), DOMAIN, {"approximate": "none"}),
        Found("Gelu", 0.5 * x * (1 + np.tanh(cubic)), DOMAIN, {"approximate": "tanh"}),
        Found("HardSwish", x * np.clip(x / 6 + 0.5, 0, 1)),
        Found("Mish", x * np.tanh(softplus)),
        Found("Softplus", softplus),
        Found("Sigmoid", _sigmoid(x)),
        Found("Softsign", x / (1 + np.abs(x))),
    )


def _candidates(got: np.ndarray) -> list[Found]:
    """Known functions, those with parameters as they would have to be to explain a few of the values."""
    x, known = GRID, list(_without_parameters())
    at = dict(zip(x.tolist(), got.tolist(), strict=True))
    low, high = at[-1e4], at[1e4]
    if low > -1e3 or high < 1e3:
        bounds = {name: v for name, v, bound in (("min", low, low > -1e3), ("max", high, high < 1e3)) if bound}
        if "min" in bounds:  # a Clip without lower bound would need an empty input
            known.append(Found("Clip", _clip(bounds, x), constants=bounds))
    if 0 < at[1.0] < 1:  # x sigmoid(alpha x) at 1
        alpha = _neat(math.log(at[1.0] / (1 - at[1.0])), 1, 1.702)
        known.append(Found("Silu", x * _sigmoid(alpha * x), DOMAIN, {"alpha": alpha} if alpha != 1 else {}))
    if 0 < -at[-1.0] < 1:
        alpha = _neat(-at[-1.0], 0.01, 0.1, 0.2, 0.3)
        known.append(Found("LeakyRelu", np.where(x < 0, alpha * x, x), attrs={"alpha": alpha}))
    alpha, beta = _neat((at[0.125] - at[-0.125]) * 4, 1 / 6, 0.2), _neat(at[0.0], 0.5)
    if alpha > 0 and (alpha, beta) != (1, 0):
        values = np.clip(alpha * x + beta, 0, 1)
        known.append(Found("HardSigmoid", values, attrs={"alpha": alpha, "beta": beta}))
    return known


def _neat(value: float, *usual: float) -> float:
    """The usual value when it is meant."""
    return next((u for u in usual if abs(value - u) <= 1e-3 * abs(u)), value)


# ------------------------------------------------------------------------------------- activations under another name


def _rename(node: gs.Node) -> str | None:
    """Swish and Gelu of newer opsets or of com.microsoft -> Silu and Gelu of this project; tells what it did."""
    old = f"{node.domain}.{node.op}" if node.domain else node.op
    if old in ("Gelu", "com.microsoft.Gelu"):
        node.op, node.attrs = "Gelu", {"approximate": node.attrs.get("approximate", "none")}
    elif old == "com.microsoft.FastGelu" and len(node.inputs) == 1:
        node.op, node.attrs = "Gelu", {"approximate": "tanh"}
    elif old in ("Swish", "com.microsoft.QuickGelu"):
        alpha = _neat(float(node.attrs.get("alpha", 1 if old == "Swish" else 1.702)), 1, 1.702)
        node.op, node.attrs = "Silu", {"alpha": alpha} if alpha != 1 else {}
    else:
        return None
    node.domain = DOMAIN
    return f"{node.op} {node.name!r} from {old}"
