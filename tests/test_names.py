"""Oracle: torch's own module names (`named_modules`) of nets exported by both exporters; else names written by hand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest

from onnxcrp.canonize import canonize
from onnxcrp.errors import QuestionError
from onnxcrp.names import Names, name_layers, path_scope, safe_name


def nodes(*names: str) -> list[gs.Node]:
    """Nodes "Op name" (the output tensor is called out_<name>)."""
    split = [text.split(" ", 1) for text in names]
    return [gs.Node(op, name, outputs=[gs.Variable(f"out_{name}")]) for op, name in split]


def named(*texts: str, weights: dict[str, str] | None = None, scopes: dict[str, str] | None = None) -> list[str]:
    return list(name_layers(nodes(*texts), weights=weights or {}, scopes=scopes or {}).values())


# ---------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("features.28.weight", "features.28"),
        ("0.weight", "0"),
        ("conv1/kernel:0", "conv1"),
        ("fire2/conv1x1_1.weight", "fire2/conv1x1_1"),
        ("attn.in_proj_weight", "attn.in_proj"),
        ("onnx::Conv_123", "node"),
        ("val_17", "node"),
        ("MatMul_12", "node"),
        ("const_weights", "const"),
        ("weight", "node"),
        ("", "node"),
    ],
)
def test_linear_layers_are_called_after_their_weight(weight, layer) -> None:
    assert named("Conv node", weights={"node": weight}) == [layer]


def test_the_weight_wins_over_the_scope_for_linear_layers_only() -> None:
    weights = {"c": "conv1.weight", "b": "norm7.weight"}  # the exporter stored two equal weights of BatchNorms once
    scopes = {"c": "bn1", "b": "bn1.norm"}
    assert named("Conv c", "BatchNormalization b", weights=weights, scopes=scopes) == ["conv1", "bn1.norm"]


def test_second_calls() -> None:
    weights = dict.fromkeys(["a", "b", "c"], "conv.weight")
    assert named("Conv a", "Conv b", "Conv c", weights=weights) == ["conv", "conv#2", "conv#3"]
    scopes = {
        "a": "conv",
        "b": "conv_1",
        "c": "decoder.conv",
    }  # equal weights of another module are no call of this one
    assert named("Conv a", "Conv b", "Conv c", weights=weights, scopes=scopes) == ["conv", "conv#2", "decoder.conv"]


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/features/features.0/features.0.2/Clip", "features.0.2"),
        ("/model/backbone/layer1/layer1.0/Add_1", "model.backbone.layer1.0"),
        ("/Flatten", ""),
        ("node_add_65", ""),
        ("fire2/relu", ""),
        ("Net/conv/Relu6;Net/conv/Conv2D;Net/other/bias", "Net/conv"),
    ],
)
def test_scopes_in_paths(name, scope) -> None:
    assert path_scope(name) == scope


def test_one_node_in_a_module_has_its_name() -> None:
    texts = ["Conv /l/l.0/conv/Conv", "Relu /l/l.0/relu/Relu", "Add /l/l.0/Add", "Relu /l/l.0/relu_1/Relu"]
    assert named(*texts) == ["l.0.conv", "l.0.relu", "l.0", "l.0.relu_1"]


def test_several_nodes_in_a_module() -> None:
    texts = ["Add /b/b.0/Add", "LayerNorm /b/b.0/norm/LN", "Add /b/b.0/Add_3"]
    assert named(*texts) == ["b.0.Add", "b.0.norm", "b.0.Add_3"]
    scopes = {"a": "b.0", "n": "b.0.norm", "m": "b.0"}
    assert named("Add a", "LayerNorm n", "Add m", scopes=scopes) == ["b.0.Add", "b.0.norm", "b.0.Add_1"]
    assert named("Relu a", "Relu b", scopes={"a": "act", "b": "act"}) == ["act", "act#2"]  # one module, called twice
    assert named("Pad p", "Conv c", "Mul m", scopes=dict.fromkeys("pcm", "conv")) == ["conv.Pad", "conv", "conv.Mul"]


def test_without_a_module() -> None:
    assert named("Flatten /Flatten", "Add node_add_1") == ["Flatten", "node_add_1"]
    assert list(name_layers([gs.Node("Relu", "", outputs=[gs.Variable("t")])], weights={}, scopes={}).values()) == ["t"]


def test_tensorflow_lite() -> None:
    texts = ["Transpose N/c/Relu6;N/c/Conv2D;N/c/b__3", "Conv N/c/Relu6;N/c/Conv2D;N/c/b", "Clip Relu6__5", "Add N/add"]
    assert named(*texts) == ["N/c.Transpose", "N/c", "Relu6__5", "N/add"]


def some() -> Names:
    texts = [
        "Conv n1",
        "Relu /l/l.0/relu/Relu",
        "Conv n2",
        "Add n3",
        "Relu /l/l.0/relu_1/Relu",
        "Concat n4",
        "Slice n5",
    ]
    return Names(
        nodes(*texts),
        weights={"n1": "l.0.conv1.weight", "n2": "l.0.conv1.weight"},
        scopes={"n1": "l.0.bn1", "n2": "l.0.bn1", "n3": "l.0", "n4": "l.0", "n5": "mix"},
    )


def test_every_name_of_a_node_is_accepted() -> None:
    names = some()
    assert list(names) == ["l.0.conv1", "l.0.relu", "l.0.conv1#2", "l.0.Add", "l.0.relu_1", "l.0.Concat", "mix"]
    by = {node.name: node for node in names.nodes}
    for given, node in {
        "l.0.conv1": "n1", "n1": "n1", "out_n1": "n1", "l.0.conv1#2": "n2", "l.0.conv1_1": "n2", "out_n2": "n2",
        "/l/l.0/relu/Relu": "/l/l.0/relu/Relu", "l/l.0/relu/Relu": "/l/l.0/relu/Relu",
        "l.0.relu#2": "/l/l.0/relu_1/Relu", "l.0": "n3", "l.0.Add": "n3", "mix": "n5", "mix.Slice": "n5",
    }.items():  # fmt: skip
        assert names.resolve(given) is by[node], given
    assert names.of(by["n3"]) == "l.0.Add"
    assert set(names.all_of(by["n3"])) == {"l.0.Add", "l.0", "n3", "out_n3"}
    assert names.all_of(by["n3"])[0] == "l.0.Add"


def test_ambiguous_and_unknown_names() -> None:
    names = some()
    with pytest.raises(QuestionError, match=r"'l\.0\.bn1' is ambiguous") as caught:
        names.resolve("l.0.bn1")
    assert caught.value.hint == "it may mean l.0.conv1 (Conv), l.0.conv1#2 (Conv)"
    with pytest.raises(QuestionError, match=r"no layer 'l\.0\.Conv1'") as caught:
        names.resolve("l.0.Conv1")
    assert caught.value.hint.startswith("nearest: l.0.conv1,")
    with pytest.raises(QuestionError) as caught:
        names.resolve("l")
    assert "l.0.Concat" in caught.value.hint
    with pytest.raises(QuestionError) as caught:
        names.resolve("zzzzzz")
    assert caught.value.hint.startswith("layers: l.0.conv1, ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("66", "layers: 0, 3, fc"),
        ("f", "layers: 0, 3, fc"),
        ("FC", "nearest: fc"),
        ("fcc", "nearest: fc"),
        ("fc.out", "nearest: fc"),
    ],
)
def test_what_is_near_a_short_name(name: str, hint: str) -> None:
    names = Names(
        nodes("Conv a", "Conv b", "Gemm c"), weights={"a": "0.weight", "b": "3.weight", "c": "fc.weight"}, scopes={}
    )
    with pytest.raises(QuestionError) as caught:
        names.resolve(name)
    assert caught.value.hint == hint


def test_globs() -> None:
    names = some()
    assert [names.of(node) for node in names.glob("l.0.conv1*")] == ["l.0.conv1", "l.0.conv1#2"]
    assert [names.of(node) for node in names.glob("out_n*")] == [
        "l.0.conv1",
        "l.0.conv1#2",
        "l.0.Add",
        "l.0.Concat",
        "mix",
    ]
    assert names.glob("nothing*") == []


def test_names_of_files() -> None:
    assert safe_name("mask.layer#2", set()) == "mask.layer_2"
    assert safe_name("relevance.a/b-c_d~e.0", set()) == "relevance.a/b-c_d~e.0"
    assert safe_name("relevance.größe:0", set()) == "relevance.gr__e_0"
    assert safe_name("x", {"x", "x~2"}) == "x~3"
    assert safe_name("target", set(), {"target"}) == "onnxcrp.target"
    assert safe_name("target", {"onnxcrp.target"}, {"target"}) == "onnxcrp.target~2"
    assert safe_name("target", set(), {"target", "onnxcrp.target"}) == "onnxcrp.target~2"


# ------------------------------------------------------------------------------------------------ real exports


@pytest.fixture(scope="module", params=["torchscript", "dynamo"])
def exported(request, tmp_path_factory):
    """{net: (torch module, Names, canonical)} of small-weighted torchvision nets."""
    from tests.support import peers

    peers.need()
    import torch
    import torchvision
    from torch import nn

    torch.manual_seed(0)
    nets = {name: getattr(torchvision.models, name)().eval() for name in ("resnet18", "mobilenet_v2")}
    vgg = torchvision.models.vgg16(init_weights=False)
    vgg.avgpool = nn.Identity()
    for i, (a, b) in {0: (512, 8), 3: (8, 8), 6: (8, 10)}.items():  # the real ones weigh 500 MB
        vgg.classifier[i] = nn.Linear(a, b)
    nets["vgg16"] = vgg.eval()
    found = {}
    for name, net in nets.items():
        path: Path = tmp_path_factory.mktemp(name) / "net.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own
            torch.onnx.export(
                net, (torch.zeros(1, 3, 32, 32),), str(path), input_names=["x"], dynamo=request.param == "dynamo"
            )
        canonical = canonize(path)
        names = Names(canonical.graph.nodes, weights=canonical.weights, scopes=canonical.scopes)
        found[name] = (net, names, canonical)
    return found


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg16"])
def test_linear_layers_have_torchs_names(exported, name) -> None:
    from torch import nn

    net, names, _ = exported[name]
    expected = [key for key, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = [names.of(node) for node in names.nodes if node.op in ("Conv", "Linear")]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg16"])
def test_activations_and_pooling_have_torchs_names(exported, name) -> None:
    from torch import nn

    net, names, _ = exported[name]
    kinds = nn.ReLU | nn.ReLU6 | nn.MaxPool2d
    expected = {key for key, module in net.named_modules() if isinstance(module, kinds)}
    found = {re.sub(r"(relu)(_1|#2)$", r"\1", names.of(n)) for n in names.nodes if n.op in ("Relu", "Clip", "MaxPool")}
    assert found == expected


def test_names_that_the_issue_mentions(exported) -> None:
    def op(net: str, layer: str) -> str:
        return exported[net][1].resolve(layer).op

    assert op("vgg16", "features.28") == "Conv"
    assert op("vgg16", "classifier.6") == "Linear"
    assert op("vgg16", "features.28.weight") == "Conv"
    assert op("resnet18", "layer3.1.conv1") == "Conv"
    assert op("resnet18", "layer3.1") == op("resnet18", "layer3.1.Add") == "Add"
    assert op("resnet18", "layer3.1.relu#2") == op("resnet18", "layer3.1.relu_1") == "Relu"
    assert op("mobilenet_v2", "features.3") == "Add"
    with pytest.raises(QuestionError, match="no layer 'layer3'"):
        exported["resnet18"][1].resolve("layer3")
    assert len(exported["resnet18"][1].glob("layer4.*")) == 11  # 5 Conv, 4 Relu, 2 Add


def test_both_exporters_name_a_shared_layer_alike(tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv1d(2, 2, 3, padding=1), nn.ReLU()

        def forward(self, x):
            return self.conv(self.act(self.conv(self.act(self.conv(x)))))

    for dynamo in (False, True):
        path = tmp_path / f"{dynamo}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Twice().eval(), (torch.zeros(1, 2, 8),), str(path), dynamo=dynamo)
        canonical = canonize(path)
        names = Names(canonical.graph.nodes, weights=canonical.weights, scopes=canonical.scopes)
        order = ["conv", "act", "conv#2", "act#2", "conv#3"]
        assert [names.resolve(name) for name in order] == names.nodes
