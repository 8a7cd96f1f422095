"""Normalizations that exporters split into arithmetic become one node again.

    layer norm  y = gamma (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) + beta
    RMS norm    y = gamma x / sqrt(mean(x^2) + eps)

means over the normalized axes, gamma and beta of their shape. What is recognised is the function, not its spelling: a
region of arithmetic is evaluated on a few tensors, from which gamma, beta and eps follow.

    beta = y(0);  gamma = (y(x) - beta) / n(x)  for large x, n(x) the same norm without gamma, beta and eps;
    r = (y(x) - beta) / (gamma n(x)) = sqrt(v / (v + eps))  for x of variance v;  eps = v (1 / r^2 - 1)

and it is one of the two if the formula with these gives y on other tensors, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import DOMAIN, Names, describe, detach, given, insert, pinned, prune, rank
from onnxcrp.canonize.pattern import Region, constant, regions
from onnxcrp.canonize.report import PassReport

LIMIT = 20  # nodes of a norm with its casts, at most
TOLERANCE = 1e-6
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
ENDS = {"Add", "Sub", "Mul", "Div", "Cast"}


def fuse_norms(graph: gs.Graph) -> PassReport:
    """Replace arithmetic by `LayerNormalization(x, Scale, B; axis, epsilon)` and `RmsNorm(x, g; axis, epsilon)`.

    `RmsNorm` is an operator of the domain "onnxcrp", also for RMSNormalization of opset 23; a missing gamma is ones,
    a missing beta is left out. Axes that are not the last ones (the channels of [N, C, H, W]) become so by a Transpose
    before and the inverse after. Casts to float32 around the arithmetic of a half-precision norm belong to it.
    InstanceNormalization and GroupNormalization are single nodes already, whose statistics stay within a sample.
    Declined, with the reason: where something else reads a tensor inside, where the batch axis or an axis of unknown
    size is normalized.
    """
    report = PassReport("fuse normalizations")
    for node in graph.nodes:
        if line := _rename(node):
            report.done.append(line)
        elif not node.domain and node.op in ("InstanceNormalization", "GroupNormalization"):
            report.declined.append(f"{describe(node)}: is one node already")
    order, names, pins = {id(node): i for i, node in enumerate(graph.nodes)}, Names(graph), pinned(graph)
    fused: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}
    for last in reversed(graph.nodes) if any(node.op in REDUCTIONS for node in graph.nodes) else ():
        if not last.outputs or last.op not in ENDS or not _is_arithmetic(last):
            continue  # fused already, or nothing that could end a norm
        for region, found in _norms(last, order):
            parts = ", ".join(node.op for node in region.nodes)
            if reason := found.reason or region.read_elsewhere(pins):
                report.declined.append(f"{found.op} ({parts}) at {last.name!r}: {reason}")
                continue
            nodes = _write(region, found, names)
            fused[id(last)] = (nodes, [])
            report.done.append(f"{describe(nodes[len(nodes) // 2])} from {parts}")
            break
    insert(graph, fused)
    prune(graph)
    return report


def _rename(node: gs.Node) -> str | None:
    """RMSNormalization -> RmsNorm, and both norms with their attributes explicit; tells what it did."""
    if node.domain or node.op not in ("LayerNormalization", "RMSNormalization"):
        return None
    attrs = {"axis": int(node.attrs.get("axis", -1)), "epsilon": _short(node.attrs.get("epsilon", 1e-5))}
    if (axes := rank(node.inputs[0])) is not None and attrs["axis"] >= 0:
        attrs["axis"] = int(attrs["axis"]) - axes
    if node.op == "LayerNormalization":
        kept = {key: value for key, value in node.attrs.items() if key == "stash_type" and value != 1}
        node.attrs = attrs | kept
        return None
    old = describe(node)
    node.op, node.domain, node.attrs = "RmsNorm", DOMAIN, attrs
    return f"{describe(node)} from {old.split()[0]}"


# ---------------------------------------------------------------------------------------- which arithmetic is looked at


def _is_arithmetic(node: gs.Node) -> bool:
    """Whether the node is something that a split norm is made of."""
    if node.op not in ARITHMETIC or node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return False
    if node.op == "Cast":
        return all(_is_float(tensor) for tensor in (node.inputs[0], node.outputs[0]))
    if node.op in REDUCTIONS or node.op in ("Unsqueeze", "Squeeze"):
        return _axes(node) is not None
    return True


def _is_float(tensor: gs.Tensor) -> bool:
    if isinstance(tensor.dtype, int):  # no type of numpy's
        return bool(tensor.dtype == onnx.TensorProto.BFLOAT16)
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind == "f"


def _axes(node: gs.Node) -> list[int] | None:
    """Axes that a node reduces, adds or takes out, None where they are not constants."""
    values = constant(node.inputs[1]) if given(node, 1) else node.attrs.get("axes")
    return None if values is None else [int(axis) for axis in np.ravel(values)]


def _reduce(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A reduction as `Region.values` calls it."""

    def evaluate(attrs: dict, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
        over = attrs["axes"] if axes is None else axes
        return function(x, axis=tuple(int(a) for a in np.ravel(over)), keepdims=bool(attrs.get("keepdims", 1)))

    return evaluate


def _pick(attrs: dict, axes: np.ndarray | None) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.ravel(attrs["axes"] if axes is None else axes))


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a / b,
    "Pow": lambda _, a, b: np.power(a, np.float64(b)),
    "Neg": lambda _, a: -a,
    "Sqrt": lambda _, a: np.sqrt(a),
    "Reciprocal": lambda _, a: 1 / a,
    "Cast": lambda _, a: a,
    "Unsqueeze": lambda attrs, a, axes=None: np.expand_dims(a, _pick(attrs, axes)),
    "Squeeze": lambda attrs, a, axes=None: np.squeeze(a, _pick(attrs, axes)),
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceSumSquare": _reduce(lambda x, **over: (x * x).sum(**over)),
    "ReduceL2": _reduce(lambda x, **over: np.sqrt((x * x).sum(**over))),
}


# ----------------------------------------------------------------------------------------------- what a region computes


class Found(NamedTuple):
    """A norm over `axes`, gamma and beta of their sizes; `reason` if it cannot be one."""

    op: str
    axes: tuple[int, ...] = ()
    gamma: np.ndarray = np.ones(0)
    beta: np.ndarray = np.zeros(0)
    epsilon: float = 0.0
    reason: str = ""


def _norms(last: gs.Node, order: dict[int, int]) -> list[tuple[Region, Found]]:
    """Regions that end with `last` and compute a norm in one type, layer norms before RMS norms, small before large.

    The second half of a layer norm is the RMS norm of x - mean(x).
    """
    norms = []
    for region in regions(last, order, _is_arithmetic, LIMIT):
        reductions = [node for node in region.nodes if node.op in REDUCTIONS]
        if not reductions or region.x.dtype != region.out.dtype or region.x.shape is None:
            continue
        if found := _recognise(region, reductions):
            norms.append((region, found))
    return sorted(norms, key=lambda pair: pair[1].op)


def _recognise(region: Region, reductions: list[gs.Node]) -> Found | None:
    """The norm that a region computes, if any."""
    shape = list(region.x.shape or [])
    every = {tuple(sorted(axis % len(shape) for axis in _axes(node) or [])) for node in reductions} if shape else set()
    if len(every) != 1 or not (axes := every.pop()):
        return None
    op = "LayerNormalization" if len(reductions) > 1 else "RmsNorm"
    unknown = [axis for axis in axes if not isinstance(shape[axis], int)]
    if axes[0] == 0:
        return Found(op, reason="normalizes the batch axis") if len(reductions) > 1 else None
    if unknown:
        return Found(op, reason=f"the size of axis {unknown[0]} is not known") if len(reductions) > 1 else None
    if (count := int(np.prod([shape[axis] for axis in axes]))) < 2:
        return None
    probe = _Probe(region, axes, [n if a in axes else (1 if n == 1 else 2) for a, n in enumerate(shape)])
    try:
        found = probe.fit(count)
    except (ValueError, TypeError, IndexError):  # numpy's: shapes that belong together only for other sizes
        return None
    return found


class _Probe:
    """A region, evaluated on tensors whose other axes are 2 (or 1) long."""

    def __init__(self, region: Region, axes: tuple[int, ...], shape: list[int]) -> None:
        self.region, self.axes, self.shape = region, axes, shape
        self.rng = np.random.default_rng(0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.region.values(x, ARITHMETIC)

    def spread(self, count: int) -> np.ndarray:
        """Values of both signs, none near their mean of about 0."""
        signs = np.where(np.arange(count) % 2 == 0, 1.0, -1.0).reshape(
            [n if axis in self.axes else 1 for axis, n in enumerate(self.shape)]
        )
        return signs * self.rng.uniform(0.5, 1.5, self.shape)

    def norm(self, x: np.ndarray, centred: bool, epsilon: float) -> np.ndarray:
        """The norm with gamma 1, beta 0."""
        x = x - x.mean(self.axes, keepdims=True) if centred else x
        return x / np.sqrt((x * x).mean(self.axes, keepdims=True) + epsilon)

    def fit(self, count: int) -> Found | None:
        """Gamma, beta, epsilon; None if the formula with these is not what the region computes."""
        x = self.spread(count)
        large = self(x * 1e6)
        shifted = self(x * 1e6 + 5e5)
        if not (np.isfinite(large).all() and np.isfinite(shifted).all()):
            return None
        centred = bool(np.allclose(large, shifted, rtol=0, atol=TOLERANCE * np.abs(large).max()))
        beta = self(np.zeros(self.shape))
        if not np.isfinite(beta).all():  # 0 / 0: no epsilon
            beta = np.zeros(self.shape)
        gamma = (large - beta) / self.norm(x * 1e6, centred, 0.0)
        epsilon = self.epsilon(x, beta, gamma, centred)
        if epsilon is None:
            return None
        gamma = (large - beta) / self.norm(x * 1e6, centred, epsilon)
        first = tuple(slice(None) if axis in self.axes else slice(0, 1) for axis in range(len(self.shape)))
        gamma, beta = gamma[first], beta[first]
        if not centred and np.abs(beta).max() > 0:
            return None
        for scale in (1.0, np.sqrt(epsilon) or 1e-3, 30.0):
            x = scale * (self.rng.normal(size=self.shape) + self.rng.normal())
            got, expected = self(x), self.norm(x, centred, epsilon) * gamma + beta
            if not np.allclose(got, expected, rtol=0, atol=TOLERANCE * max(np.abs(expected).max(), 1e-30)):
                return None
        sizes = [self.shape[axis] for axis in self.axes]
        op = "LayerNormalization" if centred else "RmsNorm"
        return Found(op, self.axes, gamma.reshape(sizes), beta.reshape(sizes), epsilon)

    def epsilon(self, x: np.ndarray, beta: np.ndarray, gamma: np.ndarray, centred: bool) -> float | None:
        """Once from a small variance, then once more from one of the size of epsilon."""
        where = int(np.argmax(np.abs(gamma)))
        if gamma.flat[where] == 0:
            return None
        epsilon = 1e-6
        for _ in range(2):
            small = x * np.sqrt(max(epsilon, 1e-30))
            moved = small - small.mean(self.axes, keepdims=True) if centred else small
            variance = np.broadcast_to((moved * moved).mean(self.axes, keepdims=True), small.shape)
            expected = self.norm(small, centred, 0.0) * gamma
            r = (self(small) - beta).flat[where] / expected.flat[where]
            if not r > 0:
                return None
            epsilon = float(variance.flat[where] * (1 / r**2 - 1))
            if epsilon < 1e-16:  # none, but for rounding
                return 0.0 if epsilon > -1e-16 else None
        return _short(epsilon)


def _short(number: float) -> float:
    """The shortest decimal number that is the same in float32."""
    return float(str(np.float32(number)))


# ------------------------------------------------------------------------------------------------------------- writing


def _write(region: Region, found: Found, names: Names) -> list[gs.Node]:
    """The norm, between two Transposes where it is not over the last axes; the region's nodes are emptied."""
    x, out, name = region.x, region.out, region.scoped_name(found.op, names)
    axes = list(range(len(x.shape)))
    last = axes[len(axes) - len(found.axes) :]
    parameters = [_parameter(region, found, found.gamma, names, f"{name}/gamma")]
    if found.op == "LayerNormalization" and found.beta.any():
        parameters.append(_parameter(region, found, found.beta, names, f"{name}/beta"))
    for node in region.nodes:
        detach(node)
    attrs = {"axis": -len(found.axes), "epsilon": found.epsilon}
    domain = None if found.op == "LayerNormalization" else DOMAIN
    if last == list(found.axes):
        return [gs.Node(found.op, name, attrs, [x, *parameters], [out], domain=domain)]
    perm = [axis for axis in axes if axis not in found.axes] + list(found.axes)
    there, back = (names.fresh(f"{name}/Transpose") for _ in range(2))
    moved, normed = (
        gs.Variable(names.fresh(f"{n}_output"), dtype=x.dtype, shape=[x.shape[axis] for axis in perm])
        for n in (there, name)
    )
    return [
        gs.Node("Transpose", there, {"perm": perm}, [x], [moved]),
        gs.Node(found.op, name, attrs, [moved, *parameters], [normed], domain=domain),
        gs.Node("Transpose", back, {"perm": [int(axis) for axis in np.argsort(perm)]}, [normed], [out]),
    ]


def _parameter(region: Region, found: Found, values: np.ndarray, names: Names, name: str) -> gs.Constant:
    """Gamma or beta: the region's own constant where that is it, else a new one of the type of `x`."""
    dtype = region.x.dtype
    for node in region.nodes:
        for tensor in node.inputs:
            array = None if tensor.is_empty() or not isinstance(tensor, gs.Constant) else tensor.values
            if array is None or array.size != values.size or isinstance(dtype, int) or array.dtype != dtype:
                continue
            same = np.allclose(array.astype(np.float64).reshape(values.shape), values, rtol=TOLERANCE, atol=1e-12)
            if same:
                array = array.reshape(values.shape)
                return tensor if tensor.shape == array.shape else gs.Constant(names.fresh(tensor.name), array)
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else np.dtype(dtype)
    return gs.Constant(names.fresh(name), np.ascontiguousarray(values).astype(kind))
