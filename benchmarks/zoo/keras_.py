"""Keras 3: applications and own small nets, random weights, channels last; on TensorFlow and on torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.zoo.case import CNN, TRANSFORMER, Arrays, Case, Made, images

EXPORTERS = ("tf2onnx", "keras")
APPLICATIONS = {  # name -> size of its input
    "ConvNeXtTiny": 64,
    "DenseNet121": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "InceptionResNetV2": 96,
    "InceptionV3": 96,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "NASNetMobile": 64,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "VGG16": 64,
    "Xception": 96,
}
ON_TORCH = ("MobileNet", "ResNet50V2")


def _keras(backend: str) -> Any:
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    keras.utils.set_random_seed(0)
    return keras


def _settled(net: Any, feeds: Arrays) -> Made:
    """Running statistics of the net's own activations."""
    norms = [layer for layer in net._flatten_layers() if hasattr(layer, "moving_mean")]
    for norm in norms:
        norm.momentum = 0.0
    x = list(feeds.values())
    net(x[0] if len(x) == 1 else x, training=True)
    return net, dict(zip((tensor.name for tensor in net.inputs), x, strict=True))


def _application(name: str, backend: str) -> Callable[[], Made]:
    def make() -> Made:
        keras, size = _keras(backend), APPLICATIONS[name]
        net = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
        pictures = images(size, size).transpose(0, 2, 3, 1).copy()
        if "include_preprocessing" in name or name.startswith(("EfficientNet", "MobileNetV3", "ConvNeXt")):
            pictures = 127.5 + 60 * pictures  # they scale pixels themselves
        return _settled(net, {"input": pictures})

    return make


def _own(name: str, backend: str) -> Callable[[], Made]:
    def make() -> Made:
        keras = _keras(backend)
        k = keras.layers
        draw = np.random.default_rng(4)
        signal = draw.normal(size=(2, 30, 2)).astype(np.float32)
        words = draw.integers(1, 30, (2, 9)).astype(np.int32)

        def sequential(shape: tuple[int, ...], *layers: Any) -> Any:
            return keras.Sequential([keras.Input(shape), *layers])

        def attention() -> Any:
            x = ids = keras.Input((9,), dtype="int32")
            x = k.Embedding(30, 16)(x)
            x = k.LayerNormalization()(x + k.MultiHeadAttention(2, 8)(x, x))
            x = k.LayerNormalization()(x + k.Dense(16)(k.Dense(32, activation="gelu")(x)))
            return keras.Model(ids, k.Dense(3)(k.GlobalAveragePooling1D()(x)))

        def unet() -> Any:
            x = keras.Input((32, 32, 3))
            u = k.Conv2D(8, 3, padding="same", activation="relu")(x)
            d = k.Conv2D(12, 3, strides=2, padding="same", activation="relu")(u)
            d = k.Conv2DTranspose(8, 3, strides=2, padding="same")(d)
            return keras.Model(x, k.Conv2D(4, 3, padding="same")(k.Concatenate()([u, d])))

        def conv1d() -> Any:
            parts = [k.Conv1D(8, 5, padding="same", activation="relu"), k.MaxPooling1D(2), k.BatchNormalization()]
            parts += [k.Conv1D(8, 3, strides=2, padding="causal", activation="relu"), k.GlobalAveragePooling1D()]
            return sequential((30, 2), *parts, k.Dense(3, activation="softmax"))

        def separable() -> Any:
            parts = [k.SeparableConv2D(8, 3, padding="same", strides=2), k.BatchNormalization(), k.ReLU()]
            parts += [k.DepthwiseConv2D(3, padding="same"), k.LeakyReLU(), k.AveragePooling2D(padding="same")]
            return sequential((32, 32, 3), *parts, k.Flatten(), k.Dense(4))

        picture = images(32, 32).transpose(0, 2, 3, 1).copy()
        nets: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
            "Conv1D": (conv1d, signal),
            "SeparableConv2D": (separable, picture),
            "U-Net": (unet, picture),
            "LSTM": (lambda: sequential((30, 2), k.LSTM(8), k.Dense(3)), signal),
            "GRU": (lambda: sequential((30, 2), k.GRU(8), k.Dense(3)), signal),
            "bidirectional LSTM": (lambda: sequential((30, 2), k.Bidirectional(k.LSTM(6)), k.Dense(3)), signal),
            "attention": (attention, words),
        }
        build, x = nets[name]
        return _settled(build(), {"input": x})

    return make


OWN = ("Conv1D", "SeparableConv2D", "U-Net", "LSTM", "GRU", "bidirectional LSTM", "attention")


def rows() -> list[Case]:
    """Every row of Keras."""
    found = [
        Case(name, "Keras", _application(name, "tensorflow"), CNN, EXPORTERS, needs="keras") for name in APPLICATIONS
    ]
    for name in OWN:
        composite = TRANSFORMER if name == "attention" else CNN
        found.append(Case(f"Keras {name}", "Keras", _own(name, "tensorflow"), composite, EXPORTERS, needs="keras"))
    for name in ON_TORCH:
        found.append(Case(f"{name} (on torch)", "Keras", _application(name, "torch"), CNN, ("keras",), needs="keras"))
    for name in ("Conv1D", "SeparableConv2D"):
        found.append(Case(f"Keras {name} (on torch)", "Keras", _own(name, "torch"), CNN, ("keras",), needs="keras"))
    return found
