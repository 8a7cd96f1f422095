"""torchvision: the smallest member of every family of classifiers, video, segmentation and detection nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.zoo.case import CNN, TRANSFORMER, Case, Made, images, seeded, settled


def _vision(name: str, size: int | tuple[int, ...] = 64, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        import torch

        from tests.support import nets, peers

        peers.load()
        from torchvision import models

        x = images(*((size, size) if isinstance(size, int) else size))
        if name in nets.NETS and not options and size == nets.NETS[name].shape[-1]:
            net, calm = nets.build(name)
            return net, {"input": calm.numpy()[[0, -1]]}
        find = models.get_model
        net = seeded(lambda: find(name, weights=None, **options))
        return settled(net, torch.from_numpy(x)), {"input": x}

    return make


def _part(name: str, size: int, wrap: str, **options: Any) -> Callable[[], Made]:
    """A segmentation net's main output, or a detector up to its scores and boxes (before anchors and suppression)."""

    def make() -> Made:
        import torch
        from torch import nn

        from tests.support import peers

        peers.load()
        from torchvision import models

        class Segmentation(nn.Module):
            def __init__(self, net: Any) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Any) -> Any:
                return self.net(x)["out"]

        class Detector(nn.Module):
            def __init__(self, net: Any) -> None:
                super().__init__()
                self.backbone, self.head = net.backbone, net.rpn.head if hasattr(net, "rpn") else net.head

            def forward(self, x: Any) -> Any:
                features = list(self.backbone(x).values())
                found = self.head(features)
                if isinstance(found, dict):
                    return found["cls_logits"], found["bbox_regression"]
                scores, boxes = ([level.flatten(1) for level in levels] for levels in found)
                return torch.cat(scores, 1), torch.cat(boxes, 1)

        x = images(size, size)
        net = seeded(lambda: models.get_model(name, weights=None, weights_backbone=None, **options))
        net = {"segmentation": Segmentation, "detector": Detector}[wrap](net.eval())
        return settled(net, torch.from_numpy(x)), {"input": x}

    return make


VISION = {  # family -> smallest member, size of its input, whether zennit's modules suffice
    "alexnet": (224, False),
    "convnext_tiny": (64, False),
    "densenet121": (64, True),
    "efficientnet_b0": (64, False),
    "efficientnet_v2_s": (64, False),
    "googlenet": (64, True),
    "inception_v3": (96, False),
    "maxvit_t": (224, False),
    "mnasnet0_5": (64, False),
    "mobilenet_v2": (64, True),
    "mobilenet_v3_small": (64, False),
    "mobilenet_v3_large": (64, False),
    "regnet_x_400mf": (64, False),
    "regnet_y_400mf": (64, False),
    "resnet18": (64, True),
    "resnet50": (64, True),
    "resnext50_32x4d": (64, False),
    "shufflenet_v2_x0_5": (64, False),
    "squeezenet1_0": (64, False),
    "squeezenet1_1": (64, True),
    "swin_t": (64, False),
    "swin_v2_t": (64, False),
    "vgg11": (224, False),
    "vgg11_bn": (224, False),
    "vit_b_16": (64, False),
    "vit_b_32": (64, False),
    "wide_resnet50_2": (64, False),
}
NAMED = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": True},
    "vit_b_16": {"image_size": 64},
    "vit_b_32": {"image_size": 64},
}
ATTENTION = ("swin", "vit", "maxvit", "mvit")


def rows() -> list[Case]:
    """Every row of torchvision."""
    cases = []
    for name, (size, parity) in VISION.items():
        options = {} if parity else NAMED.get(name, {})
        composite = TRANSFORMER if name.startswith(ATTENTION) else CNN
        if name in ("maxvit_t", "swin_v2_t"):  # epsilon alone amplifies through this many convolutions
            composite = f"{TRANSFORMER}(gamma=0.25)"
        cases.append(
            Case(
                name,
                "torchvision",
                _vision(name, size, **options),
                composite,
                oracle="zennit" if parity else "functions",
                small=name == "squeezenet1_1",
            )
        )
    for name, size in (
        ("r3d_18", (8, 32, 32)),
        ("mc3_18", (8, 32, 32)),
        ("r2plus1d_18", (8, 32, 32)),
    ):
        cases.append(Case(name, "torchvision video", _vision(name, size), oracle="functions"))
    cases.append(
        Case("swin3d_t", "torchvision video", _vision("swin3d_t", (8, 64, 64)), TRANSFORMER, oracle="functions")
    )
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50"):
        cases.append(
            Case(name, "torchvision segmentation", _part(name, 64, "segmentation", num_classes=4), oracle="functions")
        )
    for name, size in (
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 64),
        ("maskrcnn_resnet50_fpn", 64),
        ("retinanet_resnet50_fpn", 64),
        ("fcos_resnet50_fpn", 64),
        ("ssd300_vgg16", 300),
        ("ssdlite320_mobilenet_v3_large", 96),
    ):
        cases.append(
            Case(name, "torchvision detection", _part(name, size, "detector", num_classes=4), oracle="functions")
        )
    return cases
