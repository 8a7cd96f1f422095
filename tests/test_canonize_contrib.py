"""Oracle: onnxruntime on the file as its own optimizer, or a test, wrote it."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest

from onnxcrp.canonize import canonize

from .support.canonical import check, ops, random, said, session

PASS = "composite operators"


def model(body: str, inputs: str, outputs: str, opset: int = 18, **constants) -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> m ({inputs}) => ({outputs})'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


# ---------------------------------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize(
    "attributes", ["alpha = 1.0", "alpha = 0.5", "alpha = 0.5, transB = 1", "transA = 1, transB = 1"]
)
@pytest.mark.parametrize("name", ["FusedMatMul", "TransposeMatMul"])
def test_fused_matmul(name, attributes) -> None:
    a, b = "float[N, 3, 5] a", "float[N, 5, 4] b"
    if "transA" in attributes:
        a = "float[N, 5, 3] a"
    if "transB" in attributes:
        b = "float[N, 4, 5] b"
    canonical = check(model(f"y = com.microsoft.{name}<{attributes}>(a, b)", f"{a}, {b}", "float[N, 3, 4] y"))
    assert "MatMul" in ops(canonical)
    assert ("Mul" in ops(canonical)) == ("0.5" in attributes)


def test_fused_matmul_with_a_constant() -> None:
    body = "y = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(a, w)"
    w = random(4, 5)
    canonical = check(model(body, "float[N, 3, 5] a", "float[N, 3, 4] y", w=w))
    assert ops(canonical) == ["Linear"]
    np.testing.assert_array_equal(canonical.graph.nodes[0].inputs[1].values, w / 2)


def test_fused_matmuls_in_a_row_where_ranks_are_unknown() -> None:
    """A rank is known only once what comes before has been rewritten."""
    body = """g = com.microsoft.BiasGelu(a, c) h = com.microsoft.FusedMatMul<transA = 1>(g, g)
              k = com.microsoft.FusedMatMul<transB = 1>(h, a) y = com.microsoft.FusedMatMul<transA = 1>(k, h)"""
    canonical = check(model(body, "float[N, 3, 5] a", "float[N, A, B] y", c=random(5)))
    assert ops(canonical).count("MatMul") == 3
    assert said(canonical, PASS) == ""


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ('activation = "Relu"', "Relu"),
        ('activation = "Tanh"', "Tanh"),
        ('activation = "Sigmoid"', "Sigmoid"),
        ('activation = "LeakyRelu", activation_params = [0.1]', "LeakyRelu"),
        ('activation = "Clip", activation_params = [0.0, 0.5]', "Clip"),
        ('activation = "HardSigmoid", activation_params = [0.2, 0.5]', "HardSigmoid"),
    ],
)
def test_fused_conv(activation, expected) -> None:
    body = f"y = com.microsoft.FusedConv<{activation}, pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b)"
    canonical = check(model(body, "float[N, 3, 6, 6] x", "float[N, 4, 3, 3] y", w=random(4, 3, 3, 3), b=random(4)))
    assert ops(canonical) == ["Conv", expected]


def test_fused_conv_with_a_sum() -> None:
    body = 'y = com.microsoft.FusedConv<activation = "Relu">(x, w, b, z)'
    io = "float[N, 3, 6, 6] x, float[N, 4, 6, 6] z", "float[N, 4, 6, 6] y"
    canonical = check(model(body, *io, w=random(4, 3, 1, 1), b=random(4)))
    assert ops(canonical) == ["Conv", "Add", "Relu"]


def test_fused_gemm() -> None:
    body = """h = com.microsoft.FusedGemm<activation = "LeakyRelu", activation_alpha = 0.2, transB = 1>(x, w, b)
              y = com.microsoft.FusedGemm<activation = "Relu", alpha = 0.5>(h, v)"""
    canonical = check(model(body, "float[N, 5] x", "float[N, 3] y", w=random(4, 5), b=random(4), v=random(4, 3)))
    assert ops(canonical) == ["Linear", "LeakyRelu", "Linear", "Relu"]
    assert canonical.graph.nodes[1].attrs["alpha"] == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------- activations and norms


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = com.microsoft.Gelu(x)", ["Gelu"]),
        ("y = com.microsoft.BiasGelu(x, b)", ["Add", "Gelu"]),
        ("y = com.microsoft.FastGelu(x)", ["Gelu"]),
        ("y = com.microsoft.FastGelu(x, b)", ["Add", "Gelu"]),
        ("y = com.microsoft.QuickGelu(x)", ["Silu"]),
    ],
)
def test_gelus(body, expected) -> None:
    given = {"b": random(6)} if ", b)" in body else {}
    canonical = check(model(body, "float[N, 4, 6] x", "float[N, 4, 6] y", **given), tolerance=1e-4)
    assert ops(canonical) == expected


def test_simplified_layer_norm() -> None:
    body = "y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.001>(x, g)"
    canonical = check(model(body, "float[N, 4, 6] x", "float[N, 4, 6] y", g=random(6)))
    assert [(n.op, n.domain, n.attrs) for n in canonical.graph.nodes] == [
        ("RmsNorm", "onnxcrp", {"axis": -1, "epsilon": 0.001})
    ]


@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_skip_layer_norm(simple, bias, total) -> None:
    name = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
    names = ["g"] if simple else ["g", "b"]
    names += ["c"] if bias else []
    given = {n: random(6, seed=i) for i, n in enumerate(names)}
    proto = onnx.helper.make_node(
        name, ["x", "z", *names], ["y", "", "", "t"] if total else ["y"], domain="com.microsoft", epsilon=0.01
    )
    whole = model("y = Relu(x)", "float[N, 4, 6] x, float[N, 4, 6] z", "float[N, 4, 6] y", **given)
    del whole.graph.node[:]
    whole.graph.node.append(proto)
    if total:
        whole.graph.output.append(onnx.helper.make_tensor_value_info("t", 1, ["N", 4, 6]))
    canonical = check(whole)
    norm = "RmsNorm" if simple else "LayerNormalization"
    assert ops(canonical) == [*["Add"] * bias, "Add", norm]


@pytest.mark.parametrize("how", ["plain", "segments", "positions", "mask"])
def test_embed_layer_norm(how) -> None:
    tables = {"w": random(9, 6), "p": random(7, 6), "s": random(2, 6), "g": random(6, seed=1), "b": random(6, seed=2)}
    inputs, outputs = ["ids", "", "w", "p", "", "g", "b"], ["y", "m"]
    if how != "plain":
        inputs[1], inputs[4] = "segments", "s"
    else:
        tables.pop("s")
    if how == "mask":
        inputs, outputs = [*inputs, "mask"], ["y", "m", "sum"]
    if how == "positions":
        inputs += ["", "places"]
    node = onnx.helper.make_node("EmbedLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=1e-6)
    whole = model("y = Relu(x)", "float[N, 4, 6] x", "float[N, T, 6] y", **tables)
    del whole.graph.node[:], whole.graph.input[:]
    whole.graph.node.append(node)
    integers = [name for name in ("ids", "segments", "mask") if name in inputs]
    whole.graph.input.extend(onnx.helper.make_tensor_value_info(name, 6, ["N", 5]) for name in integers)
    if how == "positions":
        whole.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[3, 1, 0, 2, 6]], np.int32), "places"))
        whole.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        whole.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    if how == "mask":
        whole.graph.output.append(onnx.helper.make_tensor_value_info("m", 6, ["N"]))
        whole.graph.output.append(onnx.helper.make_tensor_value_info("sum", 1, ["N", 5, 6]))
    canonical = canonize(whole)
    written = session(canonical.to_onnx())
    rng = np.random.default_rng(0)
    x = {name: rng.integers(0, 2, (1, 5)).astype(np.int32) for name in integers}
    if "mask" in x:
        x["mask"] = np.array([[1, 1, 1, 0, 0]], np.int32)
    for expected, got in zip(session(whole).run(None, x), written.run(None, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert "LayerNormalization" in ops(canonical)
    assert ops(canonical).count("Add") == (1 if how == "plain" else 2)


# -------------------------------------------------------------------------------------------------------------- attention

WEIGHTS = {"w": random(6, 24, seed=3), "b": random(24, seed=4)}
LINEARS = ["Linear"] * 3


@pytest.mark.parametrize("attributes", ["", ", scale = 0.3", ", unidirectional = 1"])
def test_attention(attributes) -> None:
    body = f"y = com.microsoft.Attention<num_heads = 2{attributes}>(x, w, b)"
    canonical = check(model(body, "float[N, 5, 6] x", "float[N, 5, 8] y", **WEIGHTS))
    assert ops(canonical).count("Linear") == 3
    assert ops(canonical).count("Softmax") == 1
    assert len(ops(canonical)) == (16 if "uni" in attributes else 15)
    names = [node.name.split("/")[-1] for node in canonical.graph.nodes]
    assert {"query", "key", "value", "scores", "context"} <= set(names)


def test_attention_without_bias() -> None:
    """As with a bias of 0: onnxruntime's kernel itself reads a bias that is absent, and crashes."""
    io = "float[N, 5, 6] x", "float[N, 5, 8] y"
    ours = canonize(model("y = com.microsoft.Attention<num_heads = 2>(x, w)", *io, w=WEIGHTS["w"]))
    zero = model("y = com.microsoft.Attention<num_heads = 2>(x, w, b)", *io, w=WEIGHTS["w"], b=np.zeros(24, np.float32))
    x = {"x": random(2, 5, 6)}
    (expected,), (got,) = session(zero).run(None, x), session(ours.to_onnx()).run(None, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_attention_of_other_sizes_and_dynamic_length() -> None:
    body = "y = com.microsoft.Attention<num_heads = 2, qkv_hidden_sizes = [8, 8, 4], unidirectional = 1>(x, w, b)"
    w, b = random(6, 20), random(20)
    check(model(body, "float[N, T, 6] x", "float[N, T, 4] y", w=w, b=b), size=3)


@pytest.mark.parametrize("mask", ["int32[N, 5] m", "int32[N, 5, 5] m", "int32[N] m"])
def test_attention_masks(mask) -> None:
    body = "y = com.microsoft.Attention<num_heads = 2>(x, w, b, m)"
    canonical = check(model(body, f"float[N, 5, 6] x, {mask}", "float[N, 5, 8] y", **WEIGHTS))
    assert "Where" in ops(canonical)


def test_attention_with_a_sum() -> None:
    body = "y = com.microsoft.Attention<num_heads = 2>(x, w, b, , , r)"
    check(model(body, "float[N, 5, 6] x, float[N, 2, 5, 5] r", "float[N, 5, 8] y", **WEIGHTS))


@pytest.mark.parametrize("mask", ["", "int32[N, 4] m"])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(mask, bias) -> None:
    reads = ["q", "k", "v", *(["b"] if bias or mask else []), *(["m"] if mask else [])]
    body = f"y = com.microsoft.MultiHeadAttention<num_heads = 2, scale = 0.4>({', '.join(reads)})"
    given = {"b": random(20)} if "b" in reads else {}
    inputs = "float[N, 5, 6] q, float[N, 4, 6] k, float[N, 4, 8] v" + (f", {mask}" if mask else "")
    canonical = check(model(body, inputs, "float[N, 5, 8] y", **given))
    assert "Softmax" in ops(canonical)


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("y, p = com.microsoft.Attention<num_heads = 2>(x, w, b, , o)", "float[2, N, 2, 3, 4] o", "past, present"),
        ("y, p = com.microsoft.Attention<num_heads = 2>(x, w, b)", "", "its output 1 ('p') is read"),
        ("y = com.microsoft.Attention<num_heads = 2, do_rotary = 1>(x, w, b)", "", "rotary"),
        ("y = com.microsoft.Attention<num_heads = 2>(x, v, b)", "float[6, 24] v", "its weights are computed"),
        ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x)", "", "packed"),
        ("y = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>(x, x, x, , , i, i)", "int32[N] i", "cached"),
        ("y = com.microsoft.NhwcFusedConv(x, w, b)", "", "not 'all'"),
        ("y = com.microsoft.CDist<metric = \"euclidean\">(x, x)", "", "no standard form of it is known"),
        ("y = com.microsoft.FusedMatMul<transBatchA = 1>(x, x)", "", "batch axes"),
    ],
)  # fmt: skip
def test_declined_with_a_reason(body, inputs, reason) -> None:
    outputs = "float[A, B, C] y" + (", float[A, B, C, D, E] p" if "y, p" in body else "")
    proto = model(body, ", ".join(filter(None, ["float[N, 5, 6] x", inputs])), outputs, **WEIGHTS)
    from onnxcrp.canonize.contrib import expand_composites
    from onnxcrp.canonize.load import load

    graph = load(proto).graph
    report = expand_composites(graph)
    assert report.done == []
    assert reason in "\n".join(report.declined)
    assert [node.op for node in graph.nodes] == [node.op_type for node in proto.graph.node]


# ------------------------------------------------------------------------------------------- composites of newer opsets


@pytest.mark.parametrize(
    ("body", "inputs", "shape", "opset"),
    [
        ("y = Attention(q, k, v)", "float[N, 2, 5, 4] q, float[N, 2, 3, 4] k, float[N, 2, 3, 4] v", "N, 2, 5, 4", 23),
        ("y = Attention<is_causal = 1>(q, q, q)", "float[N, 2, 5, 4] q", "N, 2, 5, 4", 23),
        ("y = Attention(q, q, q, m)", "float[N, 2, 5, 4] q, float[5, 5] m", "N, 2, 5, 4", 24),
        (
            "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, k)",
            "float[N, 5, 8] q, float[N, 3, 8] k", "N, 5, 8", 23,
        ),
        ("y = RotaryEmbedding(q, c, s)", "float[N, 2, 5, 4] q, float[N, 5, 2] c, float[N, 5, 2] s", "N, 2, 5, 4", 23),
        ("y = MeanVarianceNormalization<axes = [2, 3]>(q)", "float[N, 2, 5, 4] q", "N, 2, 5, 4", 18),
    ],
)  # fmt: skip
def test_expanded_by_their_function_bodies(body, inputs, shape, opset) -> None:
    canonical = check(model(body, inputs, f"float[{shape}] y", opset=opset))
    found = set(ops(canonical))
    assert not found & {"Attention", "RotaryEmbedding", "MeanVarianceNormalization"}
    if "Attention" in body:
        assert {"MatMul", "Softmax"} <= found


# -------------------------------------------------------------------------------------------- as onnxruntime writes them


def optimized(path, level=ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED) -> str:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath, options.log_severity_level = f"{path}.optimized.onnx", 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return f"{path}.optimized.onnx"


def torch_encoder(folder, exporter: str, opset: int = 18, dynamic: bool = True):
    """A BERT-like encoder from token ids: post-norm, GELU, a padding mask."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width=16, heads=2):
            super().__init__()
            self.heads = heads
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
            self.one, self.two = nn.Linear(width, 32), nn.Linear(32, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def split(self, x):
            return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

        def forward(self, x, mask):
            q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
            scores = q @ k.transpose(-1, -2) / 8**0.5 + mask
            y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
            y = y.view(y.shape[0], y.shape[1], 16)
            x = self.norm1(self.out(y) + x)
            return self.norm2(self.two(nn.functional.gelu(self.one(x))) + x)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.kinds = nn.Embedding(30, 16), nn.Embedding(8, 16), nn.Embedding(2, 16)
            self.register_buffer("ids", torch.arange(8).unsqueeze(0))
            self.norm = nn.LayerNorm(16, eps=1e-12)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask, token_type_ids):
            x = self.words(input_ids) + self.kinds(token_type_ids) + self.places(self.ids[:, : input_ids.shape[1]])
            x = self.norm(x)
            mask = (1 - attention_mask[:, None, None, :].float()) * -10000.0
            for block in self.blocks:
                x = block(x, mask)
            return self.head(x[:, 0])

    torch.manual_seed(0)
    path = folder / "encoder.onnx"
    ids = torch.randint(0, 30, (2, 6))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    kind = {"dynamic_axes": {name: {0: "batch", 1: "tokens"} for name in names}} if dynamic else {}
    if exporter == "dynamo":
        both = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=8)}
        kind = {"dynamic_shapes": (both, both, both)} if dynamic else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(
            Encoder().eval(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(path), input_names=names,
            opset_version=opset, dynamo=exporter == "dynamo", **kind,
        )  # fmt: skip
    return path


def ids(_: str = "", batch: int = 2, tokens: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, tokens), np.int64)
    mask[1, 4:] = 0
    return {
        "input_ids": rng.integers(0, 30, (batch, tokens)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, tokens)),
    }


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 14), ("torchscript", 18), ("dynamo", 18)])
def test_an_encoder_optimized_by_the_session(exporter, opset, tmp_path) -> None:
    path = optimized(torch_encoder(tmp_path, exporter, opset))
    fused = {node.op_type for node in onnx.load(path).graph.node if node.domain == "com.microsoft"}
    assert "FusedMatMul" in fused
    assert fused & {"BiasGelu", "SkipLayerNormalization"}
    compare(path)


def test_an_encoder_optimized_for_transformers(tmp_path) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    path = torch_encoder(tmp_path, "torchscript", 14)
    raw = FusionOptions("bert")
    raw.use_raw_attention_mask(True)
    found = set()
    for number, options in enumerate((FusionOptions("bert"), raw)):
        whole = optimizer.optimize_model(
            str(path), "bert", num_heads=2, hidden_size=16, optimization_options=options, opt_level=0
        )
        fused = str(tmp_path / f"fused{number}.onnx")
        whole.save_model_to_file(fused)
        found |= {node.op_type for node in onnx.load(fused).graph.node if node.domain == "com.microsoft"}
        compare(fused)
    assert {"BiasGelu", "SkipLayerNormalization", "Attention"} <= found


def compare(path) -> None:
    """The same logits, and nothing left of com.microsoft."""
    canonical = canonize(path)
    assert {node.domain for node in canonical.graph.nodes} <= {None, "", "onnxcrp"}, said(canonical, PASS)
    (expected,) = session(path).run(None, with_types(path))
    (got,) = session(canonical.to_onnx()).run(None, with_types(path))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    found = ops(canonical)
    assert found.count("LayerNormalization") == 5
    assert found.count("Softmax") == found.count("Gelu") == 2
    assert found.count("Linear") == 13


def with_types(path) -> dict[str, np.ndarray]:
    kinds = {
        t.name: onnx.helper.tensor_dtype_to_np_dtype(t.type.tensor_type.elem_type) for t in onnx.load(path).graph.input
    }
    return {name: array.astype(kinds[name]) for name, array in ids().items()}


def test_a_layout_of_the_processor_stays_with_a_reason(tmp_path) -> None:
    """Saved at level 'all', convolutions are in blocks of channels; at 'extended' they are FusedConv."""
    body = "a = Conv<pads = [1, 1, 1, 1]>(x, w, b) c = Relu(a) y = Conv(c, v)"
    given = {"w": random(16, 16, 3, 3), "b": random(16), "v": random(16, 16, 1, 1)}
    path = tmp_path / "net.onnx"
    onnx.save(model(body, "float[N, 16, 6, 6] x", "float[N, 16, 6, 6] y", **given), path)
    canonical = check(optimized(path))
    assert ops(canonical) == ["Conv", "Relu", "Conv"]
    blocked = optimized(path, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(blocked).graph.node):
        pytest.skip("onnxruntime has no blocked layout on this processor")
    assert "optimization level 'extended'" in said(canonize(blocked), PASS)
