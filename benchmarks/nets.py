"""The nets of the benchmarks: torchvision's architectures with random weights, as ONNX files; nothing is downloaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = (3, 224, 224)
LOW, HIGH = -3.0, 3.0  # of the input, for z-box
CNN = ("epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat")


@dataclass(frozen=True)
class Net:
    """A net: shape of a sample, layers by torch's names, from the input up, and the composites that fit it.

    `channels_first`: the concepts of its layers are on axis 1, as zennit-crp takes them.
    """

    layers: tuple[str, str, str]  # early, middle, late: also the chain of three
    shape: tuple[int, ...] = PIXELS
    composites: tuple[str, ...] = CNN
    channels_first: bool = True

    @property
    def places(self) -> dict[str, str]:
        """late, middle, early -> layer."""
        return dict(zip(("late", "middle", "early"), reversed(self.layers), strict=True))


NETS = {
    "vgg16": Net(("features.5", "features.14", "features.28")),
    "resnet18": Net(("layer1.1.conv1", "layer3.0.conv1", "layer4.1.conv1")),
    "resnet50": Net(("layer1.1.conv2", "layer3.1.conv2", "layer4.1.conv2")),
    "densenet121": Net(
        (
            "features.denseblock1.denselayer3.conv1",
            "features.denseblock3.denselayer6.conv1",
            "features.denseblock4.denselayer12.conv1",
        )
    ),
    "mobilenet_v2": Net(("features.3.conv.0.0", "features.10.conv.0.0", "features.18.0")),
    "efficientnet_b0": Net(("features.2.1.block.0.0", "features.5.1.block.0.0", "features.8.0")),
    "convnext_tiny": Net(
        ("features.1.1.block.3", "features.5.4.block.3", "features.7.2.block.3"),
        composites=("epsilon_plus_flat", "attnlrp"),
        channels_first=False,
    ),
    "vit_b_16": Net(
        (
            "encoder.layers.encoder_layer_1.mlp.0",
            "encoder.layers.encoder_layer_6.mlp.0",
            "encoder.layers.encoder_layer_10.mlp.0",
        ),
        composites=("attnlrp",),
        channels_first=False,
    ),
    "ecg": Net(("block1.conv", "block2.conv", "block3.conv"), shape=(1, 150)),
    "squeezenet1_0": Net(("features.3.expand3x3", "features.7.expand3x3", "features.12.expand3x3")),
}


def build(name: str) -> Any:
    """The torch module in eval mode; convnets with random weights and statistics as large as what flows through.

    As torch initializes them, nets of fifty layers answer with nothing but denormal numbers, which cost extra time.
    """
    from tests.support import peers

    peers.load()
    import torch
    import torchvision

    from tests.support.nets import ECGNet, randomise

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # which no exporter knows
    net = (ECGNet() if name == "ecg" else getattr(torchvision.models, name)(weights=None)).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim == 2 and not parameter.any():  # ViT starts with a head of zeros
            torch.nn.init.normal_(parameter, std=0.02)
    if NETS[name].channels_first:
        randomise(net, torch.from_numpy(sample(name)).repeat(2, *[1] * len(NETS[name].shape)), scale=3.0)
    return net


def export(name: str, folder: Path) -> str:
    """The net as an .onnx file of dynamic batch."""
    import torch

    path = folder / f"{name}.onnx"
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            build(name), torch.from_numpy(sample(name)), str(path), dynamo=False, input_names=["input"],
            output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    return str(path)


def sample(name: str, count: int = 1) -> np.ndarray:
    """Random samples [count, ...] inside LOW and HIGH."""
    draw = np.random.default_rng(0).standard_normal((count, *NETS[name].shape))
    return draw.clip(LOW, HIGH).astype(np.float32)


def channels(count: int, number: int) -> list[list[int]]:
    """`count` conditions on a layer of `number` channels: one channel each, then pairs of neighbours."""
    return [[at % number] if at < number else [at % number, (at + at // number) % number] for at in range(count)]
