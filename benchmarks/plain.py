"""ResNet-50 and VGG-16 written node by node with random weights, for hosts without torch; layers named as torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # channels, 0: max pooling
RESNET50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride


class _Writer:
    """Nodes of a net, each named by its layer; weights scaled so that activations keep their size."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.draw = np.random.default_rng(0)

    def node(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def weight(self, name: str, *shape: int, scale: float) -> str:
        array = self.draw.standard_normal(shape, np.float32) * np.float32(scale)
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def conv(self, name: str, x: str, channels: int, out: int, size: int, stride: int = 1, relu: bool = True) -> str:
        """Convolution with padding size // 2 and a bias, where a folded BatchNorm leaves one; ReLU behind it."""
        W = self.weight(f"{name}.weight", out, channels, size, size, scale=(2 / (channels * size * size)) ** 0.5)
        b = self.weight(f"{name}.bias", out, scale=0.05)
        z = self.node("Conv", name, x, W, b, pads=[size // 2] * 4, strides=[stride] * 2, kernel_shape=[size] * 2)
        return self.node("Relu", f"{name}.relu", z) if relu else z

    def dense(self, name: str, x: str, inputs: int, out: int) -> str:
        W = self.weight(f"{name}.weight", out, inputs, scale=(2 / inputs) ** 0.5)
        return self.node("Gemm", name, x, W, self.weight(f"{name}.bias", out, scale=0.05), transB=1)

    def model(self, logits: str, *, side: int = 224, classes: int = 1000) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, side, side])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def vgg16() -> onnx.ModelProto:
    """VGG-16, [B, 3, 224, 224] -> [B, 1000]."""
    net, x, channels, at = _Writer(), "input", 3, 0
    for out in VGG16:
        if not out:
            x = net.node("MaxPool", f"features.{at}", x, kernel_shape=[2, 2], strides=[2, 2])
            at += 1
            continue
        x, channels, at = net.conv(f"features.{at}", x, channels, out, 3), out, at + 2
    x = net.node("Flatten", "flatten", x)
    x = net.node("Relu", "classifier.1", net.dense("classifier.0", x, 512 * 49, 4096))
    x = net.node("Relu", "classifier.4", net.dense("classifier.3", x, 4096, 4096))
    return net.model(net.dense("classifier.6", x, 4096, 1000))


def resnet50() -> onnx.ModelProto:
    """ResNet-50 with its BatchNorms folded, [B, 3, 224, 224] -> [B, 1000]."""
    net = _Writer()
    x = net.conv("conv1", "input", 3, 64, 7, stride=2)
    x = net.node("MaxPool", "maxpool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, (width, blocks, first) in enumerate(RESNET50, 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", first if not block else 1
            y = net.conv(f"{name}.conv1", x, channels, width, 1)
            y = net.conv(f"{name}.conv2", y, width, width, 3, stride)
            y = net.conv(f"{name}.conv3", y, width, 4 * width, 1, relu=False)
            if not block:
                x = net.conv(f"{name}.downsample.0", x, channels, 4 * width, 1, stride, relu=False)
            x = net.node("Relu", f"{name}.relu", net.node("Add", name, y, x))
            channels = 4 * width
    x = net.node("Flatten", "flatten", net.node("GlobalAveragePool", "avgpool", x))
    return net.model(net.dense("fc", x, 2048, 1000))


def tower(depth: int, channels: int, side: int) -> onnx.ModelProto:
    """`depth` convolutions of 3 x 3 with ReLU, mean, one dense layer, [B, 3, side, side] -> [B, 10]."""
    net, x, before = _Writer(), "input", 3
    for number in range(1, depth + 1):
        x, before = net.conv(f"conv{number}", x, before, channels, 3), channels
    x = net.node("Flatten", "flatten", net.node("GlobalAveragePool", "mean", x))
    return net.model(net.dense("fc", x, channels, 10), side=side, classes=10)


NETS = {"resnet50": resnet50, "vgg16": vgg16}


def write(name: str, folder: Path) -> str:
    """The net as an .onnx file."""
    path = folder / f"{name}.onnx"
    onnx.save(NETS[name](), path)
    return str(path)
