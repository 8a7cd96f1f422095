"""Oracle: the original model on onnxruntime, for torchvision's nets from both exporters and for real models."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcrp.canonize import canonize
from tests.support.canonical import check, ops, parse, random, said

DATA = Path(__file__).parents[2] / "shared" / "data"
LINEAR = {"Conv", "ConvTranspose", "Linear"}

# What is left of the BatchNorms, and how many layers there are.
NETS = {
    "vgg_bn": (0, 4),
    "resnet18": (0, 21),
    "squeezenet1_1": (0, 26),
    "mobilenet_v2": (0, 53),
    "googlenet": (0, 58),
    "densenet121": (62, 121),
}


def export(name: str, exporter: str, folder: Path) -> Path:
    """An export that leaves as much as possible to do: no folded constants, no merged BatchNorm."""
    import torch

    from tests.support import nets

    net, path = small_vgg() if name == "vgg_bn" else nets.build(name)[0], folder / "net.onnx"
    x = torch.zeros(2, 3, 56 if name == "vgg_bn" else 64, 56 if name == "vgg_bn" else 64)
    names = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            kept = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
            torch.onnx.export(
                net, (x,), path, dynamo=False, dynamic_axes={"x": {0: "N"}, "y": {0: "N"}}, **names, **kept
            )
        else:
            batch = ({0: torch.export.Dim("N")},)
            torch.onnx.export(
                net, (x,), path, dynamo=True, dynamic_shapes=batch, optimize=False, verbose=False, **names
            )
    return path


def small_vgg():
    """As torchvision builds it, with two convolutions and narrow dense layers."""
    import torch
    from torch import nn

    from tests.support import nets

    torch.manual_seed(0)
    net = nets.vgg.VGG(nets.vgg.make_layers([16, "M", 32, "M"], batch_norm=True), init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(32 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", NETS)
def test_torchvision(name, exporter, tmp_path):
    kept, layers = NETS[name]
    canonical = check(export(name, exporter, tmp_path), tolerance=2e-5)
    found = ops(canonical)
    assert sum(op in LINEAR for op in found) == layers
    assert found.count("BatchNormalization") == kept
    assert not set(found) & {
        "Identity",
        "Constant",
        "Dropout",
        "Gemm",
        "MatMul",
        "Shape",
        "Gather",
        "Expand",
        "CastLike",
    }
    assert canonical.batch == "dynamic"
    linear = [node for node in canonical.graph.nodes if node.op in LINEAR]
    assert all(hasattr(tensor, "values") for node in linear for tensor in node.inputs[1:])
    weights = [canonical.weights[node.name] for node in linear]
    assert all(weight.endswith(".weight") for weight in weights)
    assert len(set(weights)) == layers
    assert all(tensor.shape[0] == "N" for node in canonical.graph.nodes for tensor in node.outputs)
    if kept:
        assert "no linear layer" in said(canonical, "fold BatchNorm")


def test_both_exporters_agree(tmp_path):
    """The same net, the same canonical weights under the same names."""
    layers = {}
    for exporter in ("torchscript", "dynamo"):
        (tmp_path / exporter).mkdir()
        canonical = canonize(export("resnet18", exporter, tmp_path / exporter))
        layers[exporter] = {
            canonical.weights[node.name]: node.inputs[1].values for node in canonical.graph.nodes if node.op in LINEAR
        }
    assert list(layers["torchscript"]) == list(layers["dynamo"])
    for name, weight in layers["torchscript"].items():
        np.testing.assert_allclose(weight, layers["dynamo"][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("opset", [7, 9, 11, 13])
def test_older_opsets_of_a_whole_net(opset, tmp_path):
    import torch

    from tests.support import nets

    net, path = nets.build("squeezenet1_1" if opset == 7 else "mobilenet_v2")[0], tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(1, 3, 64, 64),), path, dynamo=False, opset_version=opset, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE, keep_initializers_as_inputs=opset < 9,
        )  # fmt: skip
    canonical = check(path)
    assert canonical.batch == "freed"
    assert canonical.source_opset == opset
    assert "BatchNormalization" not in ops(canonical)


REAL = {
    "models/squeezenet1_0_imagenet.onnx": (
        "dynamic",
        {"Conv", "Relu", "Concat", "MaxPool", "GlobalAveragePool", "Flatten"},
    ),
    "models/mobilenet_v2_imagenet_int8.onnx": (
        "freed",
        {"Conv", "Clip", "Add", "Reshape", "Transpose", "AveragePool", "Softmax", "QuantizeLinear", "DequantizeLinear"},
    ),
    "ecg/ecg_net.onnx": ("dynamic", {"Conv", "Relu", "MaxPool", "AveragePool", "Reshape", "Linear"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name):
    if not (DATA / name).exists():
        pytest.skip("needs the models of ../shared/data")
    batch, expected = REAL[name]
    canonical = check(DATA / name, tolerance=1e-5)
    assert canonical.batch == batch
    assert set(ops(canonical)) == expected
    convolutions = [node for node in canonical.graph.nodes if node.op == "Conv"]
    assert all(hasattr(tensor, "values") for node in convolutions for tensor in node.inputs[1:])
    assert all("pads" in node.attrs and "auto_pad" not in node.attrs for node in convolutions)


def test_a_canonical_model_is_a_model(tmp_path):
    """Written and read again it is the same, dynamo's scopes included."""
    path = export("resnet18", "dynamo", tmp_path)
    canonical = canonize(path)
    onnx.save_model(canonical.to_onnx(), tmp_path / "canonical.onnx")
    again = canonize(tmp_path / "canonical.onnx")
    assert again.scopes == canonical.scopes
    assert again.weights == canonical.weights


def test_without_freeing_the_batch():
    model = parse("net (float[1,3] x) => (float[1,3] y) { y = Relu(x) }")
    assert check(model, free_batch=False).batch == "fixed"
    assert check(model).batch == "freed"
    dynamic = parse("net (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    assert check(dynamic, free_batch=False).batch == "dynamic"


def test_every_pass_reports_once():
    model = parse(
        """net (float[N,3,6,6] x) => (float[] y) {
            i = Identity(x)
            c = Conv(i, w)
            s = Sigmoid(c)
            m = Mul(c, s)
            f = Flatten(m)
            g = Gemm(f, v)
            y = Identity(g) }""",
        w=random(2, 3, 3, 3),
        v=random(32, 5),
    )
    canonical = check(model)
    names = [report.name for report in canonical.reports]
    assert len(set(names)) == len(names)
    assert {"load", "fold constants", "fold BatchNorm", "linear layers", "explicit pads", "quantization"} <= set(names)
    assert ops(canonical) == ["Conv", "Silu", "Flatten", "Linear"]
    assert list(canonical.sources.values()) == ["Gemm"]


def test_unused_nodes_and_inputs():
    """What nothing reads goes, but the model keeps its inputs."""
    model = parse(
        "net (float[N,3] x, float[N,3] unused) => (float[] y) { dead = Relu(unused) y = Relu(x) }",
    )
    canonical = check(model)
    assert ops(canonical) == ["Relu"]
    assert [tensor.name for tensor in canonical.graph.inputs] == ["x", "unused"]


def test_importing_the_package_is_not_importing_torch():
    import subprocess
    import sys

    code = (
        "import sys, onnxcrp.canonize; print([m for m in ('torch', 'matplotlib', 'onnxruntime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
