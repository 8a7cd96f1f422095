"""The exporters: a model and samples of its inputs -> a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from benchmarks.zoo.case import Arrays


def _keras(model: Any, exporter: str, path: Path) -> Path:
    """By tf2onnx from the function that the model is, or by Keras' own export."""
    if exporter == "keras":
        model.export(str(path), format="onnx", verbose=False)
        return path
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec(tensor.shape, tensor.dtype, name=f"input_{i}") for i, tensor in enumerate(model.inputs)]
    function = tf.function(lambda *x: model(x[0] if len(x) == 1 else list(x), training=False), signature)
    tf2onnx.convert.from_function(function, input_signature=signature, opset=17, output_path=str(path))
    return path


def export(model: Any, feeds: Arrays, exporter: str, folder: Path) -> Path:
    """Write a model as its exporter does by default, the batch symbolic where it can be."""
    path = folder / "model.onnx"
    if exporter in ("tf2onnx", "keras"):
        return _keras(model, exporter, path)
    if exporter == "skl2onnx":
        from skl2onnx import to_onnx

        x = next(iter(feeds.values()))
        try:
            proto = to_onnx(model, x, options={"zipmap": False})
        except NameError:  # regressors and LinearSVC know no such option
            proto = to_onnx(model, x, options={})
        path.write_bytes(proto.SerializeToString())
        return path
    import torch

    args = tuple(torch.from_numpy(value) for value in feeds.values())
    names = {"input_names": list(feeds), "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # exporters warn about themselves and about parts of torch that they use
        if exporter == "torchscript":
            axes = {name: {0: "batch"} for name in (*feeds, "logits")}
            torch.onnx.export(model, args, str(path), dynamo=False, dynamic_axes=axes, **names)
        else:
            shape = tuple({0: torch.export.Dim("batch")} for _ in args)
            first = model.forward.__code__.co_flags & 4  # *values: the shapes of its one variadic argument
            torch.onnx.export(
                model, args, str(path), dynamo=True, dynamic_shapes=(shape,) if first else shape, verbose=False, **names
            )
    return path
