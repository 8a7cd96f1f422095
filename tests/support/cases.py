"""Which nets, composites, exporters and layers the parity tests run over; imports nothing heavy, so collection is quick."""

from __future__ import annotations

from dataclasses import dataclass

EXPORTERS = ("torchscript", "dynamo")
COMPOSITES = ("epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box", "epsilon")
LOW, HIGH = -3.0, 3.0  # the box that every sample lies in
TOLERANCE = 1e-4  # relative L2, float32 against float64


@dataclass(frozen=True)
class Net:
    """A reference net: the shape of one sample and two conditionable layers, the later one first.

    `fused`: whether the TorchScript-based exporter may fold BatchNorm, so that both kinds of file are met.
    """

    name: str
    shape: tuple[int, ...]
    layers: tuple[str, str]
    samples: int = 2
    fused: bool = True


NETS = {
    net.name: net
    for net in (
        Net("ecg", (1, 150), ("block3.conv", "block2.conv")),
        Net("squeezenet1_1", (3, 64, 64), ("features.12.squeeze", "features.7.expand1x1")),
        Net("mobilenet_v2", (3, 64, 64), ("features.16.conv.1.0", "features.8.conv.0.0"), fused=False),
        Net("resnet18", (3, 64, 64), ("layer3.1.conv1", "layer2.0.conv2"), fused=False),
        Net("resnet50", (3, 64, 64), ("layer4.1.conv2", "layer2.1.conv1")),
        Net("googlenet", (3, 64, 64), ("inception5a.branch2.1.conv", "inception4b.branch3.0.conv")),
        Net(
            "densenet121",
            (3, 64, 64),
            ("features.denseblock3.denselayer10.conv1", "features.denseblock2.denselayer5.conv1"),
        ),
        Net("vgg16", (3, 224, 224), ("features.28", "features.17"), 1),
        Net("vgg16_bn", (3, 224, 224), ("features.40", "features.24"), 1),
    )
}
