"""Oracle: the file itself, read with onnx, hashlib and onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcrp.canonize import canonize
from onnxcrp.canonize import load as loading
from onnxcrp.errors import ModelError
from tests.support.canonical import check, distance, feeds, ops, parse, random, said, session

NET = """net (float[N,3,6,6] x) => (float[] y) {
    a = Conv(x, conv1.weight, conv1.bias)
    r = Relu(a)
    y = Conv(r, conv2.weight) }""".replace("conv1.", "conv1_").replace("conv2.", "conv2_")


def net(opset: int = 18, ir_version: int = 8) -> onnx.ModelProto:
    return parse(
        NET,
        opset,
        ir_version,
        conv1_weight=random(4, 3, 3, 3),
        conv1_bias=random(4),
        conv2_weight=random(2, 4, 3, 3),
    )


# ----------------------------------------------------------------------------------------------------- files that fail


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file '.*nothing\.onnx'") as error:
        canonize(tmp_path / "nothing.onnx")
    assert error.value.hint


@pytest.mark.parametrize("content", [b"", b"this is a text, no model", b"\x00" * 100, b"\x08\x07"])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not an ONNX model"):
        canonize(path)


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"\x89PNG\r\n\x1a\n", " but a PNG picture"),
        (b"\xff\xd8\xff\xe0", " but a JPEG picture"),
        (b"PK\x03\x04\x14\x00", " but a zip archive"),
        (b"\x89HDF\r\n\x1a\n", " but an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", " but a pointer to a file in Git LFS"),
        ("# Größe\n".encode(), " but a text"),
        (b"\x08\x07\x12", ": Error parsing"),
    ],
)
def test_what_a_file_looks_like_that_is_no_model(tmp_path, content, looks):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"model.onnx' is not an ONNX model{looks}") as error:
        canonize(path)
    assert error.value.hint


def test_other_files_need_no_reason(tmp_path):
    """A bitmap, which only its name tells from a model that is cut off."""
    (tmp_path / "picture.bmp").write_bytes(b"BM\x00\x01\x02")
    with pytest.raises(ModelError, match=r"picture\.bmp' is not an ONNX model \(hint: the path of an \.onnx file"):
        canonize(tmp_path / "picture.bmp")


def test_a_folder(tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        canonize(tmp_path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(net().SerializeToString()[:200])
    with pytest.raises(ModelError, match="is not an ONNX model"):
        canonize(path)


@pytest.mark.parametrize(("opset", "message"), [(6, "too old"), (99, "newer than the installed onnx knows")])
def test_opsets_out_of_range(opset, message):
    with pytest.raises(ModelError, match=rf"opset {opset} .*{message}") as error:
        canonize(net(opset))
    assert error.value.hint


def test_an_opset_the_runtime_does_not_run(monkeypatch):
    monkeypatch.setattr(loading, "_runtime_knows", lambda opset: opset < 22)
    canonize(net(21))
    with pytest.raises(ModelError, match="opset 22 is newer than the installed onnxruntime runs"):
        canonize(net(22))


def test_what_the_runtime_runs_is_found_by_trying():
    assert loading._runtime_knows(18)
    assert not loading._runtime_knows(99)


def test_a_model_without_an_opset():
    model = net()
    del model.opset_import[:]
    with pytest.raises(ModelError, match="does not say which opset"):
        canonize(model)


def test_an_operator_that_cannot_be_upgraded_is_named():
    model = parse("net (float[N,3] x) => (float[] y) { h = Relu(x) y = NoSuchOperator(h) }", opset=9)
    with pytest.raises(ModelError, match=r"opset 9 cannot be upgraded to 18.*NoSuchOperator"):
        canonize(model)


def test_a_cycle():
    model = parse("net (float[N,3] x) => (float[] y) { y = Add(x, z) z = Relu(y) }")
    with pytest.raises(ModelError, match="cycle"):
        canonize(model)


# --------------------------------------------------------------------------------------------------- files that are odd


@pytest.mark.parametrize("opset", range(7, 24))
def test_every_opset(opset):
    canonical = check(net(opset))
    assert ops(canonical) == ["Conv", "Relu", "Conv"]
    assert canonical.graph.opset == max(opset, 18)
    assert canonical.source_opset == opset
    assert canonical.source_ir == 8


OLD = {
    "upsample 7": ('Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(x)', 7, {}),
    "upsample 9": ('Upsample<mode="linear">(x, s)', 9, {"s": np.array([1, 1, 1.5, 3], np.float32)}),
    "resize 10": ('Resize<mode="nearest">(x, s)', 10, {"s": np.array([1, 1, 1.5, 2.3], np.float32)}),
    "resize 10 down": ('Resize<mode="nearest">(x, s)', 10, {"s": np.array([1, 1, 0.6, 0.4], np.float32)}),
    "resize 10 both": ('Resize<mode="nearest">(x, s)', 10, {"s": np.array([1, 1, 0.6, 2.3], np.float32)}),
    "dropout": ("Dropout<ratio=0.5>(x)", 7, {}),
    "clip": ("Clip<min=-0.5, max=0.5>(x)", 7, {}),
    "slice": ("Slice<starts=[1], ends=[5], axes=[2]>(x)", 7, {}),
    "pad": ('Pad<pads=[0,0,1,0,0,0,0,2], mode="reflect">(x)', 7, {}),
    "reduce": ("ReduceMean<axes=[2,3], keepdims=0>(x)", 7, {}),
    "softmax over all": ("Softmax<axis=1>(x)", 11, {}),
    "softmax over the last": ("LogSoftmax<axis=3>(x)", 11, {}),
    "split": ("Split<axis=1, split=[2, 1]>(x)", 7, {}),
    "batchnorm": ("BatchNormalization(x, s, s, s, s)", 7, {"s": random(3, low=0.5)}),
    "add": ("Add(x, s)", 7, {"s": random(3, 1, 1)}),
    "squeeze": ("Unsqueeze<axes=[0]>(x)", 11, {}),
    "pool": ("MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)", 10, {}),
}


@pytest.mark.parametrize("case", OLD)
def test_old_operators(case):
    call, opset, constants = OLD[case]
    outputs = "h, g" if case == "split" else "h"
    check(parse(f"net (float[N,3,6,7] x) => (float[] y) {{ {outputs} = {call} y = Relu(h) }}", opset, **constants))


def test_initializers_that_are_listed_as_inputs():
    model = net(ir_version=3)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    canonical = canonize(model)
    assert [tensor.name for tensor in canonical.graph.inputs] == ["x"]
    assert "3 initializer(s)" in said(canonical, "load", "done")
    x = {"x": random(2, 3, 6, 6)}
    (expected,) = session(net()).run(None, x)
    (got,) = session(canonical.to_onnx()).run(None, x)
    assert distance(expected, got) < 1e-6


def test_the_standard_domain_under_its_long_name():
    model = net()
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"
    canonical = canonize(model)
    assert [node.domain or "" for node in canonical.graph.nodes] == [""] * 3
    onnx.checker.check_model(canonical.to_onnx(), full_check=True)


def test_nodes_in_any_order():
    model = net()
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [node.op for node in canonize(model).graph.nodes] == ["Conv", "Relu", "Conv"]


def test_nodes_without_names_and_with_the_same_name():
    model = net()
    model.graph.node[0].name = model.graph.node[1].name = "same"
    names = [node.name for node in canonize(model).graph.nodes]  # onnxruntime refuses such names
    assert names == ["same", "same~2", "Conv_2"]


def test_local_functions_are_inlined():
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18, "mine": 1]>
        net (float[N,3] x) => (float[N,3] y) { h = mine.twice(x) y = mine.twice(h) }
        <domain: "mine", opset_import: ["": 18]>
        twice (a) => (b) { two = Constant<value_float=2.0>() c = Mul(a, two) b = Relu(c) }"""
    )
    canonical = check(model)
    assert ops(canonical) == ["Mul", "Relu", "Mul", "Relu"]
    assert "1 local function" in said(canonical, "load", "done")


def test_constant_nodes_of_every_kind():
    model = parse(
        """net (float[N,2] x) => (float[] y) {
            a = Constant<value=float[2] {1.0, 2.0}>()
            b = Constant<value_float=3.0>()
            c = Constant<value_floats=[4.0, 5.0]>()
            i = Constant<value_ints=[1, 0]>()
            j = Constant<value_int=1>()
            p = Add(x, a) q = Add(p, b) r = Add(q, c)
            s = Gather<axis=1>(r, i)
            y = TopK_less(s) }""".replace("y = TopK_less(s)", "t = Gather<axis=1>(s, j) y = Relu(t)")
    )
    assert "Constant" not in ops(check(model))


def test_sparse_initializers():
    model = parse("net (float[N,3] x) => (float[] y) { y = Add(x, s) }")
    values = onnx.numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    indices = onnx.numpy_helper.from_array(np.array([0, 2]), "indices")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))
    add = canonize(model).graph.nodes[0]
    assert add.inputs[1].values.tolist() == [5, 0, 7]


# ---------------------------------------------------------------------------------------------- external data and large


def external(path: Path, model: onnx.ModelProto, **options: object) -> None:
    onnx.save_model(model, path, save_as_external_data=True, size_threshold=0, **options)


@pytest.mark.parametrize("together", [True, False])
def test_external_data(tmp_path, together):
    model = net()
    external(tmp_path / "model.onnx", model, all_tensors_to_one_file=together, location="w.bin" if together else None)
    canonical = canonize(tmp_path / "model.onnx")
    x = {"x": random(2, 3, 6, 6)}
    (expected,) = session(net()).run(None, x)
    (got,) = session(canonical.to_onnx()).run(None, x)
    assert distance(expected, got) == 0


def test_the_hash_is_that_of_all_files(tmp_path):
    external(tmp_path / "model.onnx", net(), all_tensors_to_one_file=True, location="weights.bin")
    content = (tmp_path / "model.onnx").read_bytes() + (tmp_path / "weights.bin").read_bytes()
    assert canonize(tmp_path / "model.onnx").sha256 == hashlib.sha256(content).hexdigest()
    onnx.save_model(net(), tmp_path / "whole.onnx")
    assert canonize(tmp_path / "whole.onnx").sha256 == hashlib.sha256(net().SerializeToString()).hexdigest()
    assert canonize(net()).sha256 == hashlib.sha256(net().SerializeToString(deterministic=True)).hexdigest()


def test_external_data_that_is_missing_or_short_or_elsewhere(tmp_path):
    external(tmp_path / "model.onnx", net(), all_tensors_to_one_file=True, location="w.bin")
    content = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(content[:100])
    with pytest.raises(ModelError, match=r"'w\.bin' is too short"):
        canonize(tmp_path / "model.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"lies in 'w\.bin', which is missing"):
        canonize(tmp_path / "model.onnx")
    model = onnx.load_model(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(ModelError, match="does not know the folder"):
        canonize(model)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../w.bin"
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(content)
    onnx.save_model(model, tmp_path / "inner" / "model.onnx")
    with pytest.raises(ModelError, match="outside the folder"):
        canonize(tmp_path / "inner" / "model.onnx")


def test_no_weight_passes_through_a_protobuf(monkeypatch, tmp_path):
    """With a threshold of 8 elements this small net is as large as one of 2 GB: what onnx is given holds no weight."""
    import onnx.shape_inference
    import onnx.version_converter

    seen = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(model, *arguments):
            seen.append(name)
            assert all(np.prod(tensor.dims) <= 8 for tensor in model.graph.initializer)
            return original(model, *arguments)

        monkeypatch.setattr(module, name, watched)

    watch(onnx.version_converter, "convert_version")
    watch(onnx.shape_inference, "infer_shapes")
    monkeypatch.setattr("onnxcrp.canonize.load.BIG", 8)
    monkeypatch.setattr("onnxcrp.canonize.shapes.BIG", 8)
    external(tmp_path / "model.onnx", net(13), all_tensors_to_one_file=True, location="w.bin")
    canonical = check(tmp_path / "model.onnx")
    assert ops(canonical) == ["Conv", "Relu", "Conv"]
    assert canonical.graph.outputs[0].shape == ["N", 2, 2, 2]
    assert {"convert_version", "infer_shapes"} <= set(seen)


def test_the_file_is_not_changed(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(net(13), path)
    before = path.read_bytes()
    canonize(path).to_onnx()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# ------------------------------------------------------------------------------------------------------- names, metadata


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("/conv1/Conv", "conv1"),
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/layer2/layer2.0/downsample/downsample.0/Conv", "layer2.0.downsample.0"),
        ("/features/features.1/conv/conv.0/conv.0.0/Conv", "features.1.conv.0.0"),
        ("/inception3a/branch2/branch2.1/conv/Conv", "inception3a.branch2.1.conv"),
        ("/features/denseblock1/denselayer1/norm1/BatchNormalization", "features.denseblock1.denselayer1.norm1"),
        ("/Flatten", None),
        ("model/conv1/Conv2D", None),
        ("Conv_0", None),
    ],
)
def test_scopes_in_names(name, scope):
    model = net()
    model.graph.node[0].name = name
    assert canonize(model).scopes.get(name) == scope


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']"),
        ("namespace", ": models.ResNet/layer1: Sequential/layer1.0.conv1: Conv2d/conv2d_1: aten.conv2d.default"),
        ("onnxcrp.scope", "layer1.0.conv1"),
    ],
)
@pytest.mark.parametrize("opset", [13, 20])  # through the version converter, which drops such properties, and past it
def test_scopes_in_properties(key, text, opset):
    model = net(opset, ir_version=10)
    model.graph.node[0].metadata_props.add(key=key, value=text)
    canonical = canonize(model)
    first = canonical.graph.nodes[0].name
    assert canonical.scopes == {first: "layer1.0.conv1"}
    assert canonize(canonical.to_onnx()).scopes == {first: "layer1.0.conv1"}


def test_operators_outside_modules_have_no_scope():
    model = net(ir_version=10)
    for node, scopes in zip(
        model.graph.node, ("['', 'view']", "['_empty_nn_module_stack', 'x']", "oops("), strict=True
    ):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert canonize(model).scopes == {}


def test_weights_keep_their_names():
    model = net()
    renamed = {"conv1_weight": "conv1.weight_quantized", "conv1_bias": "onnx::Conv_7", "conv2_weight": "onnx::Conv_8"}
    for tensor in model.graph.initializer:
        tensor.name = renamed[tensor.name]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    assert canonize(model).weights == {"Conv_0": "conv1.weight"}


def test_metadata_is_kept():
    model = net()
    onnx.helper.set_model_props(model, {"author": "someone"})
    canonical = canonize(model)
    assert canonical.metadata == {"author": "someone"}
    assert [(entry.key, entry.value) for entry in canonical.to_onnx().metadata_props] == [("author", "someone")]


def test_a_thousand_residual_blocks_take_seconds():
    """4000 nodes, one scale shared by a thousand: passes are linear."""
    import time

    count = 1000
    nodes, previous = [], "x"
    for i in range(count):
        nodes.append(
            f"c{i} = Conv(x{i}, w) b{i} = BatchNormalization(c{i}, s, s, s, s) r{i} = Relu(b{i}) "
            f"x{i + 1} = Add(r{i}, x{i})".replace("x0", previous)
        )
    text = "\n".join(nodes)
    model = parse(
        f"net (float[N,4,5,5] x) => (float[] x{count}) {{ {text} }}", w=random(4, 4, 1, 1), s=random(4, low=0.5)
    )
    started = time.perf_counter()
    canonical = canonize(model)
    assert time.perf_counter() - started < 20
    assert len(canonical.graph.nodes) == 4 * count
    assert set(feeds(session(net()))) == {"x"}
