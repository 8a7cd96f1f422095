"""The shapes net as practitioners store it: quantized by onnxruntime in every form, in half precision, weights as half."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper

from fixtures.shapes import make as shapes

SOURCE = Path(shapes.__file__).resolve().parent
FLOAT, HALF, BFLOAT = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def pictures(n: int = 8) -> np.ndarray:
    """Scenes as the net wants them, [N, 3, 64, 64]."""
    with np.load(SOURCE / "samples.npz") as stored:
        images = stored["images"][:n]
    return ((images.transpose(0, 3, 1, 2).astype(np.float32) - 128) / 64).astype(np.float32)


def folded(folder: Path) -> Path:
    """The float net with its BatchNorms folded, which quantizers and converters want: weights keep their names."""
    from onnxcrp.canonize import canonize

    model = canonize(SOURCE / "net.onnx").to_onnx()
    path = folder / "float.onnx"
    onnx.save(model, path)
    return path


def static(source: Path, target: Path, *, form: str, activations: str, weights: str, per_channel: bool) -> None:
    """Q/DQ or operator form, by onnxruntime's quantizer."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"input": x[None]} for x in pictures(16)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    _silently(
        lambda: quantize_static(
            source, target, Reader(), quant_format=QuantFormat[form], per_channel=per_channel,
            activation_type=kinds[activations], weight_type=kinds[weights],
        )
    )  # fmt: skip


def dynamic(source: Path, target: Path, *, weights: str = "uint8") -> None:
    """DynamicQuantizeLinear, ConvInteger and MatMulInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}[weights]
    _silently(lambda: quantize_dynamic(source, target, weight_type=kind))


def _silently(quantize: Callable[[], None]) -> None:
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantize()
    finally:
        logger.setLevel(level)


def narrowed(source: Path, target: Path, kind: int, *, ends: bool = False) -> None:
    """All of the net in half precision or bfloat16; its input and output as well with `ends`, else cast there."""
    model = onnx.load(source)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(_narrow(tensor, kind))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(_narrow(attribute.t, kind))
    del graph.value_info[:]
    for port in (*graph.input, *graph.output):
        port.type.tensor_type.elem_type = kind if ends else port.type.tensor_type.elem_type
    if not ends:
        (x,), (y,) = graph.input, graph.output
        for node in graph.node:
            node.input[:] = ["narrow_input" if name == x.name else name for name in node.input]
            node.output[:] = ["narrow_output" if name == y.name else name for name in node.output]
        graph.node.insert(0, oh.make_node("Cast", [x.name], ["narrow_input"], "cast_input", to=kind))
        graph.node.append(oh.make_node("Cast", ["narrow_output"], [y.name], "cast_output", to=FLOAT))
    onnx.save(model, target)


def half_weights(source: Path, target: Path, kind: int = HALF) -> None:
    """Weights stored in half precision behind a Cast, computed in float32."""
    model = onnx.load(source)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT and np.prod(tensor.dims) > 1:
            name = tensor.name
            tensor.CopyFrom(_narrow(tensor, kind))
            tensor.name = f"{name}_half"
            casts.append(oh.make_node("Cast", [f"{name}_half"], [name], f"{name}_cast", to=FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def _narrow(tensor: onnx.TensorProto, kind: int) -> onnx.TensorProto:
    array = onnx.numpy_helper.to_array(tensor)
    return oh.make_tensor(
        tensor.name, kind, array.shape, array.astype(oh.tensor_dtype_to_np_dtype(kind)).tobytes(), raw=True
    )
