"""Operators on integers -> dequantize, compute in floating point, quantize: what Q/DQ files say.

x = (q - z) s with scale s and zero point z. An operator of quantized tensors computes on integers what

    y = quantize(op(dequantize(x), dequantize(w)))

computes on numbers, but for the rounding of float32 sums (one quantization step where that decides over .5); written
so, weights are constants and every layer reads and writes numbers. Weights have one scale for all or one per output
channel; a bias is an integer of scale s_x s_w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.build import Build, Declined, arguments, kept
from onnxcrp.canonize.edit import only_reader, pinned, producer, rank
from onnxcrp.canonize.quantize import dequantize
from onnxcrp.canonize.report import PassReport

MICROSOFT = "com.microsoft"
CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
POOL = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")
UNARY = {
    "LeakyRelu": ("alpha",),
    "Sigmoid": (),
    "Softmax": ("axis",),
    "AveragePool": POOL,
    "GlobalAveragePool": (),
}
# f(q) = quantize(f(dequantize(q))): these move numbers, or pick the largest
COMMUTES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "DepthToSpace"}
COMMUTES |= {"SpaceToDepth", "Expand", "Tile"}


class Quantized(NamedTuple):
    """Integers and what they mean, (q - zero) scale."""

    q: gs.Tensor | None
    scale: gs.Tensor | None
    zero: gs.Tensor | None

    @property
    def constant(self) -> bool:
        """Whether it can be computed now."""
        return isinstance(self.q, gs.Constant) and isinstance(self.scale, gs.Constant)


def dequantize_operators(graph: gs.Graph) -> PassReport:
    """Rewrite QLinear*, QGemm, MatMulInteger, ConvInteger and the like as DequantizeLinear, operator, QuantizeLinear.

    MatMulInteger and ConvInteger compute (a - z_a) (w - z_w) as an integer, which the file then casts and multiplies by
    s_a s_w: where that is found, a is dequantized by s_a (that of DynamicQuantizeLinear, which stays) and w by s_w, and
    Cast and Mul go. Elsewhere a and w are dequantized by 1. MaxPool, Reshape, Transpose and the like on a quantized
    tensor read and write numbers, too. Declined with the reason: scales that are computed where the bias needs them,
    rows of a with scales of their own, recurrent layers whose states are quantized while they run.
    """
    report = PassReport("integer operators")
    form = _Form(graph)
    for node in graph.nodes:
        if not node.outputs:
            continue  # went with a node before it
        if node.op == "QuantizeLinear" and not node.domain:
            form.remember(node.outputs[0], Quantized(*arguments(node, 3)))
        elif rewrite := form.find(node):
            form.write.replace(node, rewrite, report)
    form.write.finish()
    return report


class _Form:
    """Rewrites one node after the other, in the order of the graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.write = Build(graph)
        self.pins = pinned(graph)
        self.known: dict[str, Quantized] = {}  # tensors of integers whose meaning was seen
        self.numbers: dict[tuple[str, str, str], gs.Tensor] = {}  # what they are dequantized to
        self.table: dict[tuple[str, str], Callable[[gs.Node], str]] = {
            **{(MICROSOFT, f"QLinear{op}"): self.qlinear_unary for op in UNARY},
            ("", "QLinearConv"): self.qlinear_conv,
            ("", "QLinearMatMul"): self.qlinear_matmul,
            ("", "MatMulInteger"): self.integer,
            ("", "ConvInteger"): self.integer,
            (MICROSOFT, "QLinearConv"): self.qlinear_conv,
            (MICROSOFT, "QGemm"): self.qgemm,
            (MICROSOFT, "QLinearAdd"): self.qlinear_binary,
            (MICROSOFT, "QLinearMul"): self.qlinear_binary,
            (MICROSOFT, "QLinearConcat"): self.qlinear_concat,
            (MICROSOFT, "QLinearWhere"): self.qlinear_where,
            (MICROSOFT, "NhwcMaxPool"): self.nhwc_max_pool,
            (MICROSOFT, "DynamicQuantizeMatMul"): self.dynamic_matmul,
            (MICROSOFT, "MatMulIntegerToFloat"): self.matmul_to_float,
            (MICROSOFT, "QAttention"): self.qattention,
            (MICROSOFT, "DynamicQuantizeLSTM"): self.lstm,
            (MICROSOFT, "QuantizeLinear"): self.standard,
            (MICROSOFT, "DequantizeLinear"): self.standard,
        }

    def find(self, node: gs.Node) -> Callable[[gs.Node], str] | None:
        """The function that rewrites `node`."""
        if not node.domain and node.op in COMMUTES and node.inputs and node.inputs[0].name in self.known:
            return self.commute if len(node.outputs) == 1 else None
        return self.table.get((node.domain or "", node.op))

    # --------------------------------------------------------------------------------------- quantized <-> numbers

    def remember(self, y: gs.Tensor, means: Quantized) -> None:
        """What the integers of `y` mean, where that is the same for all of them."""
        if isinstance(means.scale, gs.Constant) and means.scale.values.size == 1:
            self.known[y.name] = means._replace(q=y)

    def number(self, x: Quantized, axis: int = 1) -> gs.Tensor:
        """Dequantized: a constant, or a DequantizeLinear that all readers share; data has one scale."""
        if x.q is None or x.scale is None:
            raise Declined("an input is missing")
        if x.constant:
            scale, zero = _flat(x.scale), None if x.zero is None else _flat(x.zero)
            if zero is not None and zero.size > scale.size:
                scale = np.broadcast_to(scale, zero.shape)
            values = dequantize(x.q.values, scale, zero, axis)
            return self.write.constant(values, f"{x.q.name}.dequantized")
        _one_scale(x.scale, x.zero)
        key = (x.q.name, x.scale.name, "" if x.zero is None else x.zero.name)
        if key not in self.numbers or not self.numbers[key].inputs:
            one = self.scalar(x.scale), self.scalar(x.zero)
            self.numbers[key] = self.write("DequantizeLinear", x.q, *one, dtype=np.float32, shape=x.q.shape)
        return self.numbers[key]

    def quantize(self, x: gs.Tensor, scale: gs.Tensor | None, zero: gs.Tensor | None, y: gs.Tensor) -> str:
        """Append QuantizeLinear from `x` to `y`; what `Build.replace` reports."""
        if scale is None:
            raise Declined("its output has no scale")
        _one_scale(scale, zero)
        means = Quantized(y, self.scalar(scale), self.scalar(zero))
        self.write("QuantizeLinear", x, means.scale, means.zero, output=y)
        self.remember(y, means)
        return "dequantized before, quantized after"

    def scalar(self, tensor: gs.Tensor | None) -> gs.Tensor | None:
        """[1] -> []: a scale [1] would belong to an axis."""
        if isinstance(tensor, gs.Constant) and tensor.values.size == 1 and tensor.values.ndim:
            return self.write.constant(tensor.values.reshape(()), tensor.name)
        return tensor

    def bias(self, bias: gs.Tensor | None, x: Quantized, w: Quantized, factor: float = 1.0) -> gs.Tensor | None:
        """B s_x s_w."""
        if bias is None:
            return None
        if not all(isinstance(tensor, gs.Constant) for tensor in (bias, x.scale, w.scale)):
            raise Declined("its scales are computed")
        _one_scale(x.scale, None)
        values = bias.values.astype(np.float64) * _flat(x.scale) * _flat(w.scale) * factor
        return self.write.constant(values, f"{bias.name}.dequantized", np.float32)

    def channels_first(self, x: gs.Tensor, axes: int) -> gs.Tensor:
        """[N, ..., C] -> [N, C, ...]."""
        return self.write("Transpose", x, perm=[0, axes - 1, *range(1, axes - 1)], dtype=x.dtype)

    def channels_last(self, x: gs.Tensor, axes: int, output: gs.Tensor | None = None) -> gs.Tensor:
        """[N, C, ...] -> [N, ..., C]."""
        return self.write("Transpose", x, perm=[0, *range(2, axes), 1], dtype=x.dtype, output=output)

    # -------------------------------------------------------------------------------------------- linear operators

    def qlinear_conv(self, node: gs.Node) -> str:
        """x, s_x, z_x, w, s_w, z_w, s_y, z_y, B: B is an integer of scale s_x s_w."""
        *xw, s_y, z_y, integers = arguments(node, 9)
        q_x, q_w = Quantized(*xw[:3]), Quantized(*xw[3:])
        axes = rank(q_w.q) if node.attrs.get("channels_last", 0) else 0
        if axes is None:
            raise Declined("its channels are last, and its rank is not known")
        x, w, b = self.number(q_x), self.number(q_w, axis=0), self.bias(integers, q_x, q_w)
        x = self.channels_first(x, axes) if axes else x
        out = self.write("Conv", x, w, b, at="", dtype=np.float32, **kept(node, *CONV))
        return self.quantize(self.channels_last(out, axes) if axes else out, s_y, z_y, node.outputs[0])

    def qlinear_matmul(self, node: gs.Node) -> str:
        """a, s_a, z_a, b, s_b, z_b, s_y, z_y; rows of a constant a and columns of a constant b may have own scales."""
        *ab, s_y, z_y = arguments(node, 8)
        a, b = self.number(Quantized(*ab[:3]), axis=-2), self.number(Quantized(*ab[3:]), axis=-1)
        return self.quantize(self.write("MatMul", a, b, at="", dtype=np.float32), s_y, z_y, node.outputs[0])

    def qgemm(self, node: gs.Node) -> str:
        """A, s_a, z_a, B, s_b, z_b, C, s_y, z_y: alpha A' B' + C, C an integer of scale alpha s_a s_b."""
        *ab, c, s_y, z_y = arguments(node, 9)
        q_a, q_b = Quantized(*ab[:3]), Quantized(*ab[3:])
        a, b = self.number(q_a), self.number(q_b, axis=0 if node.attrs.get("transB", 0) else 1)
        addend = self.bias(c, q_a, q_b, float(node.attrs.get("alpha", 1.0)))
        output = node.outputs[0] if s_y is None else None
        attrs = kept(node, "alpha", "transA", "transB")
        out = self.write("Gemm", a, b, addend, at="", output=output, dtype=np.float32, **attrs)
        return "dequantized before" if s_y is None else self.quantize(out, s_y, z_y, node.outputs[0])

    def dynamic_matmul(self, node: gs.Node) -> str:
        """A, B, s_b, z_b, bias: A is quantized as it comes."""
        a, q_b, s_b, z_b, bias = arguments(node, 5)
        q = self.write("DynamicQuantizeLinear", a, dtype=np.uint8)
        scale = gs.Variable(self.write.names.fresh(f"{q.name}.scale"), dtype=np.dtype(np.float32))
        zero = gs.Variable(self.write.names.fresh(f"{q.name}.zero"), dtype=np.dtype(np.uint8))
        q.inputs[0].outputs.extend([scale, zero])
        x, w = self.number(Quantized(q, scale, zero)), self.number(Quantized(q_b, s_b, z_b), axis=-1)
        return self.product(x, w, bias, node.outputs[0])

    def matmul_to_float(self, node: gs.Node) -> str:
        """A, B, s_a, s_b, z_a, z_b, bias."""
        q_a, q_b, s_a, s_b, z_a, z_b, bias = arguments(node, 7)
        a, b = self.number(Quantized(q_a, s_a, z_a), axis=-2), self.number(Quantized(q_b, s_b, z_b), axis=-1)
        return self.product(a, b, bias, node.outputs[0])

    def product(self, a: gs.Tensor, b: gs.Tensor, bias: gs.Tensor | None, y: gs.Tensor) -> str:
        """a b + bias."""
        out = self.write("MatMul", a, b, at="", output=y if bias is None else None, dtype=np.float32)
        if bias is not None:
            self.write("Add", out, bias, output=y)
        return "dequantized before"

    def qattention(self, node: gs.Node) -> str:
        """input, weight, bias, s_x, s_w, mask, z_x, z_w, past -> Attention(input, weight, bias, mask, past)."""
        q_x, q_w, bias, s_x, s_w, mask, z_x, z_w, past = arguments(node, 9)
        if len(node.outputs) > 1:
            raise Declined("its keys and values are cached")
        x, w = self.number(Quantized(q_x, s_x, z_x)), self.number(Quantized(q_w, s_w, z_w), axis=-1)
        inputs = (x, w, bias, mask, past)
        self.write("Attention", *inputs, at="", domain=MICROSOFT, output=node.outputs[0], **node.attrs)
        return "dequantized before"

    def lstm(self, node: gs.Node) -> str:
        """Declined."""
        raise Declined("its states are quantized while it runs")

    # ------------------------------------------------------------------------------- (a - z_a) (w - z_w), an integer

    def integer(self, node: gs.Node) -> str:
        """a, w, z_a, z_w -> int32, which is cast and multiplied by s_a s_w."""
        op = node.op.removesuffix("Integer")
        q_a, q_w, z_a, z_w = arguments(node, 4)
        cast = self.cast_after(node.outputs[0])
        mul = None if cast is None else only_reader(cast.outputs[0], self.pins)
        one = self.write.constant(1.0, f"{node.name}/one", np.float32)
        s_a, s_w = self.scales(op, mul, cast, q_a, q_w) or (one, one)
        whole = s_a is not one
        a = self.number(Quantized(q_a, s_a, z_a), axis=-2)
        w = self.number(Quantized(q_w, s_w, z_w), axis=0 if op == "Conv" else -1)
        attrs = kept(node, *CONV) if op == "Conv" else {}
        if cast is None:
            sums = self.write(op, a, w, at="", dtype=np.float32, **attrs)
            self.write("Cast", sums, to=int(onnx.TensorProto.INT32), output=node.outputs[0])
            return "dequantized by 1 before, cast after"
        output = self.write.also(cast)
        if whole:
            output = self.write.also(mul)
        self.write(op, a, w, at="", output=output, **attrs)
        return "dequantized before, with Cast and Mul" if whole else "dequantized by 1 before, with Cast"

    def cast_after(self, y: gs.Tensor) -> gs.Node | None:
        """The Cast to float32 that alone reads an integer product."""
        cast = only_reader(y, self.pins)
        if cast is None or cast.op != "Cast" or cast.domain:
            return None
        to = cast.attrs.get("to")
        is_float = to == onnx.TensorProto.FLOAT if isinstance(to, int) else np.dtype(to) == np.float32
        return cast if is_float else None

    def scales(
        self, op: str, mul: gs.Node | None, cast: gs.Node | None, q_a: gs.Tensor | None, q_w: gs.Tensor | None
    ) -> tuple[gs.Tensor, gs.Tensor] | None:
        """The scales s_a and s_w that a product is multiplied by, if that is what it is multiplied by."""
        if mul is None or cast is None or mul.op != "Mul" or mul.domain or q_a is None or q_w is None:
            return None
        (factor,) = [tensor for tensor in mul.inputs if tensor is not cast.outputs[0]] or [None]
        maker = None if factor is None else producer(factor)
        if maker is None or maker.op != "Mul" or maker.domain:
            return None
        for s_a, s_w in (list(maker.inputs), list(maker.inputs)[::-1]):
            if _is_scale_of(s_a, q_a):
                if _is_scale_of(s_w, q_w):
                    return s_a, s_w
                columns = self.per_column(op, s_w, q_w)
                if columns is not None:
                    return s_a, columns
        return None

    def per_column(self, op: str, scale: gs.Tensor, q_w: gs.Tensor) -> gs.Constant | None:
        """A constant scale of a weight as [] or [out]; None if it is neither."""
        if not (isinstance(scale, gs.Constant) and isinstance(q_w, gs.Constant)):
            return None
        values = scale.values
        if values.size > 1:
            axis = -1 if op == "MatMul" else 1 - q_w.values.ndim  # of the product: [.., out] or [N, out, ..]
            out = q_w.values.shape[-1 if op == "MatMul" else 0]
            if values.ndim < -axis or values.shape[axis] != values.size or values.size != out:
                return None
        return self.write.constant(_flat(scale), scale.name)

    # --------------------------------------------------------------------------------------------- other operators

    def qlinear_unary(self, node: gs.Node) -> str:
        """x, s_x, z_x, s_y, z_y."""
        q, s_x, z_x, s_y, z_y = arguments(node, 5)
        op = node.op.removeprefix("QLinear")
        axes = None if q is None else rank(q)
        if axes is None and "kernel_shape" in node.attrs:
            axes = len(node.attrs["kernel_shape"]) + 2
        last = bool(node.attrs.get("channels_last", 0)) and op.endswith("Pool")
        if last and axes is None:
            raise Declined("its channels are last, and its rank is not known")
        old = op == "Softmax" and node.attrs.get("opset", 13) < 13
        if old and (axes is None or node.attrs.get("axis", 1) not in (-1, axes - 1)):
            raise Declined("it is over several axes (opset < 13)")
        x = self.number(Quantized(q, s_x, z_x))
        x = self.channels_first(x, axes or 0) if last else x
        out = self.write(op, x, at="", dtype=np.float32, **kept(node, *UNARY[op]))
        return self.quantize(self.channels_last(out, axes or 0) if last else out, s_y, z_y, node.outputs[0])

    def qlinear_binary(self, node: gs.Node) -> str:
        """a, s_a, z_a, b, s_b, z_b, s_y, z_y."""
        *ab, s_y, z_y = arguments(node, 8)
        a, b = self.number(Quantized(*ab[:3])), self.number(Quantized(*ab[3:]))
        out = self.write(node.op.removeprefix("QLinear"), a, b, at="", dtype=np.float32)
        return self.quantize(out, s_y, z_y, node.outputs[0])

    def qlinear_concat(self, node: gs.Node) -> str:
        """s_y, z_y, then x, s_x, z_x for each x."""
        s_y, z_y, *rest = arguments(node, 2)
        parts = [self.number(Quantized(*rest[i : i + 3])) for i in range(0, len(rest), 3)]
        out = self.write("Concat", *parts, at="", dtype=np.float32, axis=node.attrs["axis"])
        return self.quantize(out, s_y, z_y, node.outputs[0])

    def qlinear_where(self, node: gs.Node) -> str:
        """condition, a, s_a, z_a, b, s_b, z_b, s_y, z_y."""
        condition, *ab, s_y, z_y = arguments(node, 9)
        a, b = self.number(Quantized(*ab[:3])), self.number(Quantized(*ab[3:]))
        out = self.write("Where", condition, a, b, at="", dtype=np.float32)
        return self.quantize(out, s_y, z_y, node.outputs[0])

    def nhwc_max_pool(self, node: gs.Node) -> str:
        """The largest integer is the largest number."""
        q, y, axes, attrs = node.inputs[0], node.outputs[0], len(node.attrs["kernel_shape"]) + 2, kept(node, *POOL)
        means = self.known.get(q.name)
        x = self.channels_first(q if means is None else self.number(means), axes)
        out = self.write("MaxPool", x, at="", dtype=x.dtype, **attrs)
        if means is None:
            self.channels_last(out, axes, output=y)
            return "Transpose, MaxPool, Transpose"
        return self.quantize(self.channels_last(out, axes), means.scale, means.zero, y)

    def commute(self, node: gs.Node) -> str:
        """f(q) = quantize(f(dequantize(q)))."""
        means = self.known[node.inputs[0].name]
        x, y, rest = self.number(means), node.outputs[0], arguments(node, 1)[1:]
        out = self.write(node.op, x, *rest, at="", dtype=np.float32, shape=y.shape, **node.attrs)
        return self.quantize(out, means.scale, means.zero, y)

    def standard(self, node: gs.Node) -> str:
        """com.microsoft's QuantizeLinear and DequantizeLinear, once for 16 bits."""
        x, scale, zero = arguments(node, 3)
        per_axis = isinstance(scale, gs.Constant) and scale.values.size > 1
        attrs: dict[str, Any] = {"axis": int(node.attrs.get("axis", 1))} if per_axis else {}
        scale, zero = (scale, zero) if per_axis else (self.scalar(scale), self.scalar(zero))
        if self.write.graph.opset < 21 and any(t.dtype in (np.int16, np.uint16) for t in (x, zero) if t is not None):
            raise Declined("16 bits need opset 21")
        self.write(node.op, x, scale, zero, at="", output=node.outputs[0], **attrs)
        if node.op == "QuantizeLinear":
            self.remember(node.outputs[0], Quantized(None, scale, zero))
        return "the standard operator"


def _flat(tensor: gs.Tensor) -> np.ndarray:
    """[] or [n] of a scale or zero point."""
    if not isinstance(tensor, gs.Constant):
        raise Declined("a zero point is computed")
    return tensor.values.reshape(() if tensor.values.size == 1 else -1)


def _one_scale(scale: gs.Tensor | None, zero: gs.Tensor | None) -> None:
    """Declines where a tensor that is no weight has several."""
    if any(isinstance(tensor, gs.Constant) and tensor.values.size != 1 for tensor in (scale, zero)):
        raise Declined("its data has a scale per row or channel")


def _is_scale_of(scale: gs.Tensor, q: gs.Tensor) -> bool:
    """Whether DynamicQuantizeLinear wrote both."""
    maker = producer(q)
    return maker is not None and maker.op == "DynamicQuantizeLinear" and maker.outputs[1] is scale
