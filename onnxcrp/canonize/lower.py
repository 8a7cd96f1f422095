"""Canonical operators back to standard ones: the only place that knows how each is spelled in plain ONNX."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import DOMAIN, Names, rank


def lower(graph: gs.Graph) -> gs.Graph:
    """A copy of `graph` in standard operators; tensors keep their names, nodes too unless they become several.

    Linear -> Gemm(transB=1) for [N, in], else MatMul(+ Add);  Silu(x; alpha=1) = x sigmoid(alpha x);
    Gelu -> Gelu (opset >= 20), else x (1 + erf(x/sqrt 2))/2 or x (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3)))/2;
    RmsNorm -> RMSNormalization (opset >= 23), else x / sqrt(mean(x^2) + epsilon) g, in float32 at least;
    Kernel, SumKernel -> the kernels of all support vectors, then Gemm.
    """
    graph = graph.copy()
    write = _Write(graph)
    nodes = []
    for node in graph.nodes:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        write.nodes, write.name = [], node.name
        inputs, (output,), attributes = list(node.inputs), list(node.outputs), dict(node.attrs)
        node.inputs.clear()
        node.outputs.clear()
        WRITTEN[node.op](write, inputs, output, attributes)
        nodes += write.nodes
    graph.nodes = nodes
    others = [entry for entry in graph.import_domains or [] if entry.domain not in ("", DOMAIN)]
    graph.import_domains = [onnx.helper.make_opsetid("", graph.opset), *others]
    return graph


class _Write:
    """Appends standard nodes in the place of one canonical node."""

    def __init__(self, graph: gs.Graph) -> None:
        self.names = Names(graph)
        self.opset = graph.opset
        self.constants: dict[str, gs.Constant] = {}
        self.nodes: list[gs.Node] = []
        self.name = ""

    def __call__(
        self, op: str, *inputs: gs.Tensor, output: gs.Tensor | None = None, name: str = "", **attrs: float | str
    ) -> gs.Tensor:
        """Append a node; its output."""
        name = name or self.names.fresh(f"{self.name}/{op}")
        if output is None:
            output = gs.Variable(self.names.fresh(f"{name}_output"))
        self.nodes.append(gs.Node(op, name, attrs, list(inputs), [output]))
        return output

    def number(self, number: float, dtype: np.dtype) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{self.name}/number"), np.array(number, dtype))

    def axes(self, *axes: int) -> gs.Constant:
        return gs.Constant(self.names.fresh(f"{self.name}/axes"), np.array(axes, np.int64))

    def transposed(self, weight: gs.Constant) -> gs.Constant:
        """[out, in] -> [in, out], written once per weight."""
        if weight.name not in self.constants:
            self.constants[weight.name] = gs.Constant(self.names.fresh(f"{weight.name}.T"), weight.values.T)
        return self.constants[weight.name]


def _linear(write: _Write, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict) -> None:
    """a W^T + b."""
    a, weight, *bias = inputs
    bias = [tensor for tensor in bias if not tensor.is_empty()]
    if rank(a) == 2:
        write("Gemm", a, weight, *bias, output=output, name=write.name, transB=1)
    elif not bias:
        write("MatMul", a, write.transposed(weight), output=output, name=write.name)
    else:
        product = write("MatMul", a, write.transposed(weight), name=write.name)
        write("Add", product, bias[0], output=output)


def _silu(write: _Write, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict) -> None:
    """x sigmoid(alpha x)."""
    (x,) = inputs
    alpha = attrs.get("alpha", 1)
    scaled = x if alpha == 1 else write("Mul", x, write.number(alpha, np.dtype(x.dtype or np.float32)))
    write("Mul", x, write("Sigmoid", scaled), output=output, name=write.name)


def _gelu(write: _Write, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict) -> None:
    """x Phi(x), Phi exactly or by tanh."""
    (x,) = inputs
    approximate = attrs.get("approximate", "none")
    if write.opset >= 20:
        write("Gelu", x, output=output, name=write.name, approximate=approximate)
        return
    dtype = np.dtype(x.dtype or np.float32)
    if approximate == "tanh":
        cube = write("Mul", x, write("Mul", x, x))
        inner = write("Add", x, write("Mul", cube, write.number(0.044715, dtype)))
        squashed = write("Tanh", write("Mul", inner, write.number((2 / np.pi) ** 0.5, dtype)))
    else:
        squashed = write("Erf", write("Div", x, write.number(2**0.5, dtype)))
    doubled = write("Mul", x, write("Add", squashed, write.number(1, dtype)))
    write("Mul", doubled, write.number(0.5, dtype), output=output, name=write.name)


def _rms_norm(write: _Write, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict) -> None:
    """x / sqrt(mean(x^2) + epsilon) g, the mean over the axes from `axis` (< 0) to the last."""
    x, gain = inputs
    axis, epsilon = int(attrs["axis"]), float(attrs["epsilon"])
    if write.opset >= 23:
        write("RMSNormalization", x, gain, output=output, name=write.name, axis=axis, epsilon=epsilon)
        return
    half = isinstance(x.dtype, int) or x.dtype == np.float16
    wide = write("Cast", x, to=onnx.TensorProto.FLOAT) if half else x
    dtype = np.dtype(np.float32 if half or x.dtype is None else x.dtype)
    axes = gs.Constant(write.names.fresh(f"{write.name}/axes"), np.arange(axis, 0, dtype=np.int64))
    mean = write("ReduceMean", write("Mul", wide, wide), axes)
    root = write("Sqrt", write("Add", mean, write.number(epsilon, dtype)))
    normed = write("Div", wide, root)
    if half:
        to = x.dtype if isinstance(x.dtype, int) else onnx.TensorProto.FLOAT16
        normed = write("Cast", normed, to=to)
    write("Mul", normed, gain, output=output, name=write.name)


def _kernel(write: _Write, inputs: list[gs.Tensor], output: gs.Tensor, attrs: dict) -> None:
    """K(x, v_s) for all support vectors, then their weighted sum."""
    x, vectors, alpha, *bias = inputs
    kind, gamma = attrs["kind"], float(attrs.get("gamma", 0))
    if kind in ("polynomial", "sigmoid"):
        scaled = gs.Constant(f"{vectors.name}.gamma", (vectors.values.astype(np.float64) * gamma).astype(np.float32))
        shift = gs.Constant(f"{vectors.name}.coef0", np.full(len(vectors.values), attrs.get("coef0", 0), np.float32))
        product = write("Gemm", x, scaled, shift, transB=1)
        if kind == "sigmoid":
            values = write("Tanh", product)
        else:
            values = write("Pow", product, write.number(float(attrs["degree"]), np.dtype(np.float32)))
    else:
        apart = write("Unsqueeze", x, write.axes(1))
        if kind == "intersection":
            values = write("ReduceSum", write("Min", apart, vectors), write.axes(2), keepdims=0)
        else:
            difference = write("Sub", apart, vectors)
            distance = write("ReduceSum", write("Mul", difference, difference), write.axes(2), keepdims=0)
            values = write("Exp", write("Mul", distance, write.number(-gamma, np.dtype(np.float32))))
    write("Gemm", values, alpha, *bias, output=output, name=write.name, transB=1)


WRITTEN = {
    "Kernel": _kernel,
    "SumKernel": _kernel,
    "Linear": _linear,
    "Silu": _silu,
    "Gelu": _gelu,
    "RmsNorm": _rms_norm,
}
