"""Operators that onnxruntime's optimizer fused, and composite ones of newer opsets -> what they are made of.

Attention over H heads, Q, K, V [B, T, D] split into [B, H, T, D / H]:

    scores = scale Q K^T + mask      [B, H, T, T], scale = 1 / sqrt(D / H) unless told
    y = softmax(scores) V            the heads side by side again, [B, T, D]

with additive masks: 0 where a key may be seen, `mask_filter_value` (-10000) where not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcrp.canonize.build import Build, Declined, arguments, kept, read_outputs
from onnxcrp.canonize.edit import DOMAIN, pinned, producer, quiet, rank
from onnxcrp.canonize.report import PassReport
from onnxcrp.canonize.shapes import infer_shapes
from onnxcrp.ops.registry import claimed

MICROSOFT = "com.microsoft"
CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
EXPANDED = {"Attention", "RotaryEmbedding", "LinearAttention", "CausalConvWithState", "SwiGLU"}
EXPANDED |= {"MeanVarianceNormalization", "CenterCropPad", "ReduceSumSquare", "ReduceLogSum"}
LAYOUT = "its layout is a processor's own: save the model with optimization level 'extended', not 'all'"
NHWC = "its channels are last: save the model with optimization level 'extended', not 'all'"
CACHE = "keys and values are cached (past, present): export without a cache"
WHY = {  # operators of com.microsoft that are known, and why they stay
    "GroupQueryAttention": CACHE,
    "DecoderMaskedMultiHeadAttention": CACHE,
    "DecoderMaskedSelfAttention": CACHE,
    "DecoderAttention": CACHE,
    "PagedAttention": CACHE,
    "GatedRelativePositionBias": "relative positions",
    "RelativePositionBias": "relative positions",
    "PackedAttention": "its samples are packed into one axis",
    "PackedMultiHeadAttention": "its samples are packed into one axis",
    "NhwcConv": NHWC,
    "NhwcFusedConv": NHWC,
    "NhwcMaxPool": NHWC,
    "GroupNorm": NHWC,
    "SkipGroupNorm": NHWC,
}


class Unknown(Declined):
    """A shape is not known, and may be after inference."""


def expand_composites(graph: gs.Graph) -> PassReport:
    """Rewrite operators of com.microsoft as standard ones, and expand composite standard ones by their definitions.

    FusedMatMul, FusedGemm, FusedConv (with what they add and activate), Gelu with bias or by another name,
    SimplifiedLayerNormalization (RmsNorm), SkipLayerNormalization (Add, Add of the bias, norm),
    EmbedLayerNormalization (Gather each, Add, norm), Attention and MultiHeadAttention without a cache. Attention,
    RotaryEmbedding, LinearAttention, CausalConvWithState, SwiGLU, MeanVarianceNormalization, CenterCropPad,
    ReduceSumSquare and ReduceLogSum of the standard are replaced by their function bodies. Operators of other domains
    stay, with the reason.
    """
    report = PassReport("composite operators")
    while True:
        form = _Form(graph)
        for node in graph.nodes:
            if rewrite := form.find(node):
                form.write.replace(node, rewrite, report)
        form.write.finish()
        if not (form.unknown and form.done):
            return report
        report.declined.clear()  # what follows is looked at again, with the shapes that are known now
        infer_shapes(graph)


class _Form:
    """Rewrites one node after the other."""

    def __init__(self, graph: gs.Graph) -> None:
        self.write = Build(graph)
        self.pins = pinned(graph)
        self.unknown = self.done = False
        self.table: dict[str, Callable[[gs.Node], str]] = {
            "FusedMatMul": self.matmul,
            "TransposeMatMul": self.matmul,
            "FusedGemm": self.gemm,
            "FusedConv": self.conv,
            "Gelu": self.gelu,
            "BiasGelu": self.gelu,
            "FastGelu": self.gelu,
            "QuickGelu": self.quick_gelu,
            "LayerNormalization": self.layer_norm,
            "SimplifiedLayerNormalization": self.layer_norm,
            "SkipLayerNormalization": self.skip_layer_norm,
            "SkipSimplifiedLayerNormalization": self.skip_layer_norm,
            "EmbedLayerNormalization": self.embed_layer_norm,
            "Attention": self.attention,
            "MultiHeadAttention": self.multi_head_attention,
        }

    def find(self, node: gs.Node) -> Callable[[gs.Node], str] | None:
        """The function that rewrites `node`, or tells why it stays; None for standard operators."""
        domain = node.domain or ""
        if domain in ("", "ai.onnx"):
            if node.op == "SimplifiedLayerNormalization":  # onnxruntime's own, though in the standard's domain
                return self.counted(self.layer_norm)
            return self.counted(self.expand) if node.op in EXPANDED else None
        if domain in (DOMAIN, "ai.onnx.ml") or claimed(node.op.rpartition("::")[2], domain):
            return None
        if domain == MICROSOFT and node.op in self.table:
            return self.counted(self.table[node.op])
        return self.stays

    def counted(self, rewrite: Callable[[gs.Node], str]) -> Callable[[gs.Node], str]:
        """Remembers what came of it."""

        def counting(node: gs.Node) -> str:
            try:
                line = rewrite(node)
            except Unknown:
                self.unknown = True
                raise
            self.done = True
            return line

        return counting

    def stays(self, node: gs.Node) -> str:
        """Declined."""
        if node.domain == "com.microsoft.nchwc":
            raise Declined(LAYOUT)
        reason = WHY.get(node.op) if node.domain == MICROSOFT else None
        raise Declined(reason or "no standard form of it is known")

    # ------------------------------------------------------------------------------------------------------ helpers

    def number(self, value: float, x: gs.Tensor) -> gs.Constant:
        """A constant of the type of `x`."""
        return self.write.constant(value, f"{self.write.name}/number", _dtype(x))

    def add(self, a: gs.Tensor, b: gs.Tensor | None, at: str = "Add", output: gs.Tensor | None = None) -> gs.Tensor:
        """a + b; a where there is no b."""
        return a if b is None else self.write("Add", a, b, at=at, output=output, dtype=a.dtype)

    def turned(self, x: gs.Tensor) -> gs.Tensor:
        """The last two axes swapped."""
        if isinstance(x, gs.Constant):
            return self.write.constant(np.swapaxes(x.values, -1, -2), f"{x.name}.T")
        axes = rank(x)
        if axes is None:
            raise Unknown("the rank of its data is not known")
        return self.write("Transpose", x, perm=[*range(axes - 2), axes - 1, axes - 2], dtype=x.dtype)

    def only(self, node: gs.Node, *outputs: int) -> None:
        """Declines where an output is read that is not among `outputs`."""
        for index in read_outputs(node, self.pins):
            if index not in outputs:
                raise Declined(f"its output {index} ({node.outputs[index].name!r}) is read")

    def activate(self, x: gs.Tensor, op: str, parameters: list[float], y: gs.Tensor) -> None:
        """y = activation(x) as FusedConv and FusedGemm name it."""
        match op, parameters:
            case ("Relu" | "Tanh" | "Sigmoid" | "HardSwish", _):
                self.write(op, x, output=y)
            case ("LeakyRelu", [alpha, *_]):
                self.write(op, x, output=y, alpha=float(alpha))
            case ("HardSigmoid", [alpha, beta, *_]):
                self.write(op, x, output=y, alpha=float(alpha), beta=float(beta))
            case ("Clip", [low, high, *_]):
                self.write(op, x, self.number(low, x), self.number(high, x), output=y)
            case _:
                raise Declined(f"its activation {op!r} is not known")

    # --------------------------------------------------------------------------------------------- linear operators

    def matmul(self, node: gs.Node) -> str:
        """alpha A' B', either transposed."""
        a, b = node.inputs[0], node.inputs[1]
        if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
            raise Declined("its batch axes are transposed")
        a = self.turned(a) if node.attrs.get("transA", 0) else a
        b = self.turned(b) if node.attrs.get("transB", 0) else b
        alpha, output = float(node.attrs.get("alpha", 1.0)), node.outputs[0]
        if alpha != 1 and isinstance(b, gs.Constant):
            b, alpha = self.write.constant((b.values * alpha).astype(b.values.dtype), f"{b.name}.scaled"), 1
        product = self.write("MatMul", a, b, at="", output=output if alpha == 1 else None, dtype=a.dtype)
        if alpha != 1:
            self.write("Mul", product, self.number(alpha, a), output=output)
        return "MatMul"

    def gemm(self, node: gs.Node) -> str:
        """activation(alpha A' B' + beta C)."""
        activation = str(node.attrs.get("activation", ""))
        defaults = {"LeakyRelu": (0.01, 0.0), "HardSigmoid": (0.2, 0.5)}.get(activation, (0.0, 0.0))
        alpha, beta = (node.attrs.get(f"activation_{k}", v) for k, v in zip(("alpha", "beta"), defaults, strict=True))
        inputs, attrs = arguments(node, 3), kept(node, "alpha", "beta", "transA", "transB")
        out = self.write("Gemm", *inputs, at="", dtype=node.inputs[0].dtype, **attrs)
        self.activate(out, activation, [alpha, beta], node.outputs[0])
        return f"Gemm, {activation}"

    def conv(self, node: gs.Node) -> str:
        """activation(X * W + B + Z)."""
        x, w, b, z = arguments(node, 4)
        activation = str(node.attrs.get("activation", ""))
        assert x is not None
        y, plain = node.outputs[0], activation == ""
        output = y if plain and z is None else None
        out = self.write("Conv", x, w, b, at="", output=output, dtype=x.dtype, **kept(node, *CONV))
        if z is not None:
            out = self.add(out, z, output=y if plain else None)
        if not plain:
            self.activate(out, activation, list(node.attrs.get("activation_params", [])), y)
        return ", ".join(["Conv", *(["Add"] if z is not None else []), *([] if plain else [activation])])

    def gelu(self, node: gs.Node) -> str:
        """Gelu of x + bias; FastGelu's is the one with tanh."""
        x, bias = arguments(node, 2)[:2]
        assert x is not None
        approximate = "tanh" if node.op == "FastGelu" else "none"
        self.write("Gelu", self.add(x, bias), at="", domain=DOMAIN, output=node.outputs[0], approximate=approximate)
        return "Gelu" if bias is None else "Add, Gelu"

    def quick_gelu(self, node: gs.Node) -> str:
        """x sigmoid(alpha x)."""
        alpha = float(str(np.float32(node.attrs.get("alpha", 1.702))))
        attrs: dict[str, Any] = {} if alpha == 1 else {"alpha": alpha}
        self.write("Silu", node.inputs[0], at="", domain=DOMAIN, output=node.outputs[0], **attrs)
        return "Silu"

    # -------------------------------------------------------------------------------------------------------- norms

    def norm(self, x: gs.Tensor, node: gs.Node, gamma: gs.Tensor, beta: gs.Tensor | None, epsilon: float) -> None:
        """Layer norm, or RMS norm for the Simplified ones, to the first output of `node`."""
        simple, axis = "Simplified" in node.op, int(node.attrs.get("axis", -1))
        if axis >= 0:
            axes = rank(x)
            if axes is None:
                raise Unknown("the rank of its data is not known")
            axis -= axes
        epsilon = float(str(np.float32(node.attrs.get("epsilon", epsilon))))
        op, domain = ("RmsNorm", DOMAIN) if simple else ("LayerNormalization", "")
        parameters = (gamma,) if simple else (gamma, beta)
        y = node.outputs[0]
        self.write(op, x, *parameters, at="", domain=domain, output=y, axis=axis, epsilon=epsilon)

    def layer_norm(self, node: gs.Node) -> str:
        """X, Scale, B."""
        self.only(node, 0)
        x, gamma, beta = arguments(node, 3)
        assert x is not None
        assert gamma is not None
        self.norm(x, node, gamma, beta, 1e-5)
        return "RmsNorm" if "Simplified" in node.op else "LayerNormalization"

    def skip_layer_norm(self, node: gs.Node) -> str:
        """input, skip, gamma, beta (not of the simplified one), bias: norm(input + bias + skip)."""
        self.only(node, 0, 3)
        x, skip, gamma, *rest = arguments(node, 5)
        beta, bias = (None, rest[0]) if "Simplified" in node.op else (rest[0], rest[1])
        assert x is not None
        assert skip is not None
        assert gamma is not None
        if bias is not None:  # that of a linear layer, which is one of the two
            maker = producer(skip)
            if maker is not None and maker.op in ("MatMul", "Linear"):
                x, skip = skip, x
            x = self.add(x, bias, "bias")
        total = node.outputs[3] if 3 in read_outputs(node, self.pins) else None
        self.norm(self.add(x, skip, output=total), node, gamma, beta, 1e-12)
        return f"{'Add, ' if bias is not None else ''}Add, {'RmsNorm' if beta is None else 'LayerNormalization'}"

    def embed_layer_norm(self, node: gs.Node) -> str:
        """ids, segments, words, positions, segments' table, gamma, beta, mask, position ids."""
        self.only(node, 0, 1, 2)
        ids, segment_ids, words, positions, segments, gamma, beta, mask, position_ids = arguments(node, 9)
        read = read_outputs(node, self.pins)
        assert ids is not None
        assert words is not None
        assert gamma is not None
        if 1 in read and mask is None:
            raise Declined("its mask is read, and it has none")
        kind = words.dtype
        total = self.write("Gather", words, ids, at="words", axis=0, dtype=kind)
        if position_ids is not None:
            placed = self.write("Gather", positions, position_ids, at="positions", axis=0, dtype=kind)
        else:
            start, axis = self.write.axes(0), self.write.axes(0)
            end = self.write("Shape", ids, start=1, end=2, dtype=np.int64)
            placed = self.write("Slice", positions, start, end, axis, at="positions", dtype=kind)
        parts = [placed]
        if segments is not None:
            parts.append(self.write("Gather", segments, segment_ids, at="segments", axis=0, dtype=kind))
        for part in parts:
            whole = node.outputs[2] if part is parts[-1] and 2 in read else None
            total = self.add(total, part, output=whole)
        self.norm(total, node, gamma, beta, 1e-12)
        if 1 in read:
            axes = self.write.axes(1)
            self.write("ReduceSum", mask, axes, at="mask", output=node.outputs[1], keepdims=0)
        return "Gather, Add, LayerNormalization"

    # ---------------------------------------------------------------------------------------------------- attention

    def attention(self, node: gs.Node) -> str:
        """input, weights [in, Q + K + V], bias, mask, past, attention_bias: three linear layers, then heads."""
        x, weights, bias, mask, past, addend, *_ = arguments(node, 7)
        if past is not None:
            raise Declined(CACHE)
        self.only(node, 0)
        if node.attrs.get("do_rotary", 0):
            raise Declined("rotary positions are part of it")
        if not isinstance(weights, gs.Constant) or not (bias is None or isinstance(bias, gs.Constant)):
            raise Declined("its weights are computed")
        assert x is not None
        sizes = list(node.attrs.get("qkv_hidden_sizes", [])) or [weights.values.shape[1] // 3] * 3
        ends = np.cumsum(sizes)[:-1]
        split = zip(("query", "key", "value"), np.split(weights.values, ends, axis=1), strict=True)
        rows = [None] * 3 if bias is None else np.split(bias.values, ends)
        parts = []
        for (part, matrix), row in zip(split, rows, strict=True):
            w = self.write.constant(matrix, f"{weights.name}.{part}")
            b = None if row is None or bias is None else self.write.constant(row, f"{bias.name}.{part}")
            product = self.write("MatMul", x, w, at=part, dtype=x.dtype)
            parts.append(self.add(product, b, f"{part}/Add"))
        masks = [self.mask(node, mask, x, x), self.causal(node, x, x), addend]
        self.heads(node, parts, sizes[0], sizes[2], masks)
        return "MatMul, Add, Reshape, Transpose, Softmax"

    def multi_head_attention(self, node: gs.Node) -> str:
        """query, key, value, bias, key_padding_mask, attention_bias, past."""
        query, key, value, bias, mask, addend, *past = arguments(node, 10)
        if any(tensor is not None for tensor in past):
            raise Declined(CACHE)
        self.only(node, 0)
        if query is None or key is None or value is None:
            raise Declined("its query, key and value are packed into one tensor")
        for tensor in (query, key, value):
            if rank(tensor) is None:
                raise Unknown("the rank of its data is not known")
            if rank(tensor) != 3:
                raise Declined(f"{tensor.name!r} has {rank(tensor)} axes, 3 are expected")
        widths = [tensor.shape[-1] for tensor in (query, key, value)]
        if not all(isinstance(width, int) for width in widths):
            raise Unknown("the size of its data is not known")
        parts = [query, key, value]
        if bias is not None:
            if not isinstance(bias, gs.Constant):
                raise Declined("its bias is computed")
            rows = np.split(bias.values, np.cumsum(widths)[:-1])
            named = list(zip(("query", "key", "value"), parts, rows, strict=True))
            parts = [self.add(x, self.write.constant(row, f"{bias.name}.{part}"), part) for part, x, row in named]
        masks = [self.mask(node, mask, query, key), self.causal(node, query, key), addend]
        self.heads(node, parts, widths[0], widths[2], masks)
        return "Reshape, Transpose, MatMul, Softmax"

    def heads(self, node: gs.Node, parts: list[gs.Tensor], width: int, out: int, masks: list[gs.Tensor | None]) -> None:
        """softmax(scale Q K^T + masks) V to the output of `node`; Q, K of `width`, V of `out` features."""
        count, kind = int(node.attrs["num_heads"]), parts[0].dtype
        if width % count or out % count:
            raise Declined(f"{count} heads do not divide {width} features")
        split = []
        for part, x, size, perm in zip(
            ("query", "key", "value"),
            parts,
            (width, width, out),
            ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
            strict=True,
        ):
            shape = self.write.axes(0, 0, count, size // count)
            x = self.write("Reshape", x, shape, at=f"{part}/Reshape", dtype=kind)
            split.append(self.write("Transpose", x, at=f"{part}/Transpose", perm=perm, dtype=kind))
        q, k, v = split
        scale = float(node.attrs.get("scale", 0.0)) or (width // count) ** -0.5
        scores = self.write("MatMul", q, k, at="scores", dtype=kind)
        scores = self.write("Mul", scores, self.number(scale, scores), at="scores/Mul", dtype=kind)
        for mask in masks:
            scores = self.add(scores, mask, "scores/Add")
        weights = self.write("Softmax", scores, axis=-1, dtype=kind)
        mixed = self.write("MatMul", weights, v, at="context", dtype=kind)
        mixed = self.write("Transpose", mixed, at="context/Transpose", perm=[0, 2, 1, 3], dtype=kind)
        self.write("Reshape", mixed, self.write.axes(0, 0, out), at="", output=node.outputs[0])

    def mask(self, node: gs.Node, mask: gs.Tensor | None, q: gs.Tensor, k: gs.Tensor) -> gs.Tensor | None:
        """[B, keys] or [B, queries, keys] of ones where to look, or [B] numbers of keys, as an additive mask."""
        if mask is None:
            return None
        axes = rank(mask)
        if axes is None:
            raise Unknown("the rank of its mask is not known")
        if axes == 1:
            if q.shape is None:
                raise Unknown("the shape of its data is not known")
            if mask.shape[0] != q.shape[0]:
                raise Declined(f"its mask is {list(mask.shape)}, one number of keys per sample is expected")
            places = self.write("Cast", self.places(k, 1), at="mask/Cast", to=_onnx(mask), dtype=mask.dtype)
            lengths = self.write("Unsqueeze", mask, self.write.axes(1), at="mask/Unsqueeze", dtype=mask.dtype)
            seen = self.write("Less", places, lengths, at="mask/Less", dtype=bool)  # [B, keys]
            axes = 2
        elif axes in (2, 3):
            none = self.write.constant(0, f"{self.write.name}/zero", mask.dtype or np.int32)
            seen = self.write("Greater", mask, none, at="mask/Greater", dtype=bool)
        else:
            raise Declined(f"its mask has {axes} axes, at most 3 are expected")
        new = self.write.axes(*([1, 2] if axes == 2 else [1]))
        seen = self.write("Unsqueeze", seen, new, at="mask/Heads", dtype=bool)
        return self.additive(node, seen, q)

    def causal(self, node: gs.Node, q: gs.Tensor, k: gs.Tensor) -> gs.Tensor | None:
        """A query sees no later keys."""
        if not node.attrs.get("unidirectional", 0):
            return None
        rows = self.write("Unsqueeze", self.places(q, 1), self.write.axes(1), at="causal/Unsqueeze", dtype=np.int64)
        seen = self.write("LessOrEqual", self.places(k, 1), rows, at="causal/LessOrEqual", dtype=bool)
        return self.additive(node, seen, q)

    def places(self, x: gs.Tensor, axis: int) -> gs.Tensor:
        """0, 1, ... up to the size of an axis."""
        size = self.write("Shape", x, at="places/Shape", start=axis, end=axis + 1, dtype=np.int64)
        size = self.write("Squeeze", size, self.write.axes(0), at="places/Squeeze", dtype=np.int64)
        numbers = [self.write.constant(n, f"{self.write.name}/number", np.int64) for n in (0, 1)]
        return self.write("Range", numbers[0], size, numbers[1], at="places/Range", dtype=np.int64)

    def additive(self, node: gs.Node, seen: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
        """0 where seen, mask_filter_value elsewhere."""
        low = float(node.attrs.get("mask_filter_value", -10000.0))
        zero, low = self.number(0.0, like), self.number(low, like)
        return self.write("Where", seen, zero, low, at="mask/Where", dtype=like.dtype)

    # --------------------------------------------------------------------------------- standard composite operators

    def expand(self, node: gs.Node) -> str:
        """The function body of a standard operator."""
        proto = OnnxExporter.export_node(node)
        given = {tensor.name: tensor for tensor in node.inputs if not tensor.is_empty()}
        if any(tensor.dtype is None or tensor.shape is None for tensor in given.values()):
            raise Unknown("the types and shapes it reads are not known")
        inputs = [
            onnx.helper.make_tensor_value_info(name, _onnx(tensor), [n if isinstance(n, int) else None for n in shape])
            for name, tensor in given.items()
            for shape in [list(tensor.shape)]
        ]
        written = {tensor.name: tensor for tensor in node.outputs if not tensor.is_empty()}
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in written]
        whole = onnx.helper.make_graph([proto], "composite", inputs, outputs)
        opset = onnx.helper.make_opsetid("", self.write.graph.opset)
        model = onnx.helper.make_model(whole, opset_imports=[opset], ir_version=10)
        try:
            model = onnx.inliner.inline_selected_functions(model, [("", node.op)], inline_schema_functions=True)
        except Exception as error:  # onnx's C++ errors share no base class
            raise Declined(f"cannot be expanded: {str(error).splitlines()[0]}") from error
        if any(inner.op_type == node.op for inner in model.graph.node):
            raise Declined("onnx has no definition of it for these inputs")
        with quiet():
            body = gs.import_onnx(model)
        tensors: dict[str, gs.Tensor] = {**given, **written}
        for inner in body.nodes:
            name = self.write.names.fresh(f"{self.write.name}/{inner.op}")
            reads, writes = ([self.outer(t, tensors) for t in ends] for ends in (inner.inputs, inner.outputs))
            self.write.nodes.append(gs.Node(inner.op, name, inner.attrs, reads, writes, domain=inner.domain))
        return f"{len(body.nodes)} nodes"

    def outer(self, tensor: gs.Tensor, tensors: dict[str, gs.Tensor]) -> gs.Tensor:
        """The tensor of the graph for one of a function body."""
        if tensor.is_empty():
            return gs.Variable.empty()
        if tensor.name not in tensors:
            name = self.write.names.fresh(f"{self.write.name}/{tensor.name}")
            constant = isinstance(tensor, gs.Constant)
            tensors[tensor.name] = gs.Constant(name, tensor.values) if constant else gs.Variable(name)
        return tensors[tensor.name]


def _dtype(tensor: gs.Tensor) -> Any:
    """numpy's type of a floating-point tensor; unknown ones are float32."""
    if isinstance(tensor.dtype, int):
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)
    return np.float32 if tensor.dtype is None else tensor.dtype


def _onnx(tensor: gs.Tensor) -> int:
    """onnx's number of a type."""
    if isinstance(tensor.dtype, int):
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype or np.int32)))
