"""Fold per-channel scales and shifts into the linear layer beside them, where that leaves the outputs as they are.

BatchNorm in inference is a scale and a shift per channel, y = s z + t with

    s = gamma / sqrt(variance + epsilon),    t = beta - s mean.

*After* a layer z = W a + b (Conv, ConvTranspose, Linear), if nothing else reads z:

    W'_o = s_o W_o,    b'_o = s_o b_o + t_o.

Mul, Div, Add and Sub by a constant per output channel are the same with t = 0 or s = 1. They may stand behind
Transpose, Squeeze and Unsqueeze, as where channels come last: those move channels and change none. Grouped convolutions
scale rows of W [out, in/group, k...]; ConvTranspose has W [in, out/group, k...], where output o = g out/group + j is
W[g-th block, j].

*Before* a layer z = W (s a + t) + b:

    W'_oi = W_oi s_i,    b'_o = b_o + sum_i t_i sum_k W_oik,

but only where every window lies inside the input: zero padding pads s a + t, not a, so with padding t must be 0. The
outputs of a ConvTranspose sum different parts of the kernel at different places, so there t must be 0 too.

A weight that two layers share stays as it is: folding would take what makes it one weight.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import (
    LINEAR,
    Names,
    describe,
    detach,
    given,
    only_reader,
    pinned,
    producer,
    prune,
    rank,
    replace_reads,
    set_constant,
    set_output,
    value,
)
from onnxcrp.canonize.report import PassReport

MOVES = {"Transpose", "Squeeze", "Unsqueeze"}
Affine = tuple[np.ndarray, np.ndarray]  # s, t: [C] or [1], float64


def fold_batchnorm(graph: gs.Graph) -> PassReport:
    """BatchNormalization and constants per channel -> weights of the layer before, else of the layers after."""
    report = PassReport("fold BatchNorm")
    names, pins = Names(graph), pinned(graph)
    for node in graph.nodes:
        if node.domain or not node.inputs or node.op not in ("BatchNormalization", "Mul", "Div", "Add", "Sub"):
            continue
        found = _batchnorm(node, pins) if node.op == "BatchNormalization" else _constant(node)
        if found is None:
            continue
        if isinstance(found, str):
            report.declined.append(f"{describe(node)}: {found}")
            continue
        data, affine = found
        op = describe(node)
        layer, moves, _ = _source(data)
        before = _fold_after(layer, moves, node, affine, names, pins)
        if before is None:
            assert layer is not None
            report.done.append(f"{op}: folded into {describe(layer)} before it")
            continue
        if node.op != "BatchNormalization":
            if layer is not None and layer.op in LINEAR:
                report.declined.append(f"{op}: {before}")
            continue
        after = _fold_before(node, affine, names, pins)
        if isinstance(after, list):
            report.done.append(f"{op}: folded into {', '.join(describe(reader) for reader in after)} after it")
        else:
            report.declined.append(f"{op}: stays, a scale and a shift per channel ({before}; {after})")
            node.attrs = {"epsilon": float(np.float32(node.attrs.get("epsilon", 1e-5)))}  # as a file holds it
    prune(graph)
    return report


def _batchnorm(node: gs.Node, pins: set[str]) -> tuple[gs.Tensor, Affine] | str:
    """s and t of a BatchNorm in inference."""
    if node.attrs.get("training_mode", 0):
        return "is in training mode: its statistics are those of the batch"
    parameters = [value(node, index) for index in range(1, 5)]
    if any(parameter is None for parameter in parameters):
        return "its parameters are no constants"
    if any(tensor.outputs or tensor.name in pins for tensor in node.outputs[1:]):
        return "its statistics are read"
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    # The attribute is a float32: 1e-5 as a double is another number.
    s = gamma / np.sqrt(variance + np.float64(np.float32(node.attrs.get("epsilon", 1e-5))))
    return node.inputs[0], (s, beta - s * mean)


def _source(data: gs.Tensor) -> tuple[gs.Node | None, list[gs.Node], int | None]:
    """The node whose output `data` is, what has moved its axes since, and the axis of its channels in `data`."""
    moves: list[gs.Node] = []
    maker = producer(data)
    while maker is not None and maker.op in MOVES and not maker.domain:
        moves.insert(0, maker)
        maker = producer(maker.inputs[0])
    if maker is None or maker.op not in LINEAR:
        return producer(data), [], 1
    axes = rank(maker.outputs[0])
    channel = None if axes is None else axes - 1 if maker.op == "Linear" else 1
    for move in moves:
        channel = None if channel is None else _moved(move, channel)
    return maker, moves, channel


def _moved(move: gs.Node, axis: int) -> int | None:
    """Where a Transpose, Squeeze or Unsqueeze puts an axis; None where that is not known."""
    before, after = rank(move.inputs[0]), rank(move.outputs[0])
    if before is None or after is None:
        return None
    if move.op == "Transpose":
        return list(move.attrs.get("perm") or range(before)[::-1]).index(axis)
    axes = value(move, 1)
    if axes is None:
        return None
    named = {int(a) % (before if move.op == "Squeeze" else after) for a in np.ravel(axes)}
    if move.op == "Squeeze":
        return None if axis in named else axis - sum(a < axis for a in named)
    return [a for a in range(after) if a not in named][axis]


def _constant(node: gs.Node) -> tuple[gs.Tensor, Affine] | None:
    """s and t of Mul, Div, Add, Sub after a linear layer; None if that is not what the node is."""
    constants = [value(node, 0), value(node, 1)]
    index = 0 if constants[0] is not None else 1
    constant, data = constants[index], node.inputs[1 - index]
    layer, _, channel = _source(data)
    if constant is None or constant.dtype.kind != "f" or layer is None or layer.op not in LINEAR:
        return None
    axes = rank(data)
    if axes is None or channel is None or constant.ndim > axes:
        return None
    sizes = [1] * (axes - constant.ndim) + list(constant.shape)
    if any(size != 1 for axis, size in enumerate(sizes) if axis != channel):
        return None
    c = constant.astype(np.float64).ravel()
    if c.size not in (1, _channels(layer)):
        return None
    one, zero = np.ones(1), np.zeros(1)
    match node.op:
        case "Mul":
            return data, (c, zero)
        case "Div" if index == 1 and (c != 0).all():
            return data, (1 / c, zero)
        case "Add":
            return data, (one, c)
        case "Sub":
            return data, (one, -c) if index == 1 else (-one, c)
    return None


def _channels(layer: gs.Node) -> int | None:
    """Output channels of a linear layer with constant weights."""
    weight = value(layer, 1)
    if weight is None:
        return None
    return int(weight.shape[1] * layer.attrs.get("group", 1) if layer.op == "ConvTranspose" else weight.shape[0])


def _shared(layer: gs.Node) -> bool:
    """Whether the weight is another layer's too."""
    return sum(node is not layer for node in layer.inputs[1].outputs) > 0


def _parameters(layer: gs.Node) -> str | None:
    """Why a layer's weight and bias cannot be changed."""
    if value(layer, 1) is None:
        return f"the weight of {describe(layer)} is no constant"
    if given(layer, 2) and value(layer, 2) is None:
        return f"the bias of {describe(layer)} is no constant"
    if _shared(layer):
        return f"the weight {layer.inputs[1].name!r} is shared by {len(layer.inputs[1].outputs)} layers"
    return None


def _fold_after(
    layer: gs.Node | None, moves: list[gs.Node], node: gs.Node, affine: Affine, names: Names, pins: set[str]
) -> str | None:
    """y = s (W a + b) + t, moved or not; the reason if it cannot be, None if it is done."""
    if layer is None or layer.op not in LINEAR:
        return "no linear layer before it"
    if any(only_reader(maker.outputs[0], pins) is None for maker in (layer, *moves)):
        return f"the output of {describe(layer)} is read by others too"
    if node.op == "BatchNormalization" and _source(node.inputs[0])[2] != 1:
        return f"axis 1 is not the output axis of {describe(layer)}"
    if reason := _parameters(layer):
        return reason
    s, t = affine
    out = _channels(layer)
    if out is None or s.size not in (1, out) or t.size not in (1, out):
        return f"{describe(layer)} has {out} channels, it has {max(s.size, t.size)}"
    weight = np.asarray(value(layer, 1))
    if layer.op == "ConvTranspose":
        group = int(layer.attrs.get("group", 1))
        blocks = weight.astype(np.float64).reshape(group, -1, *weight.shape[1:])
        scale = np.broadcast_to(s, [out]).reshape(group, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (blocks * scale).reshape(weight.shape)
    else:
        scaled = weight.astype(np.float64) * np.broadcast_to(s, [out]).reshape(-1, *[1] * (weight.ndim - 1))
    bias = value(layer, 2)
    shifted = s * (0 if bias is None else bias.astype(np.float64)) + t
    _write(layer, scaled, np.broadcast_to(shifted, [out]), names)
    output = node.outputs[0]
    detach(node)
    set_output(moves[-1] if moves else layer, output)
    return None


def _fold_before(node: gs.Node, affine: Affine, names: Names, pins: set[str]) -> list[gs.Node] | str:
    """z = W (s a + t) + b in every layer that reads it; the layers, or why not."""
    s, t = affine
    output = node.outputs[0]
    if output.name in pins:
        return "it is an output of the model"
    layers = list(output.outputs)
    for layer in layers:
        if reason := _cannot_fold_before(layer, output, s, t):
            return reason
    for layer in layers:
        weight = np.asarray(value(layer, 1)).astype(np.float64)
        bias = value(layer, 2)
        b = 0 if bias is None else bias.astype(np.float64)
        if layer.op == "ConvTranspose":
            _write(layer, weight * s.reshape(-1, *[1] * (weight.ndim - 1)), None, names)
            continue
        group = int(layer.attrs.get("group", 1))
        blocks = weight.reshape(group, -1, *weight.shape[1:])  # [group, out/group, in/group, k...]
        kernel = [1] * (weight.ndim - 2)
        scaled = (blocks * s.reshape(group, 1, -1, *kernel)).reshape(weight.shape)
        if bias is None and not t.any():
            _write(layer, scaled, None, names)
            continue
        lost = (blocks * t.reshape(group, 1, -1, *kernel)).reshape(len(weight), -1).sum(1)
        _write(layer, scaled, b + lost, names)
    x = node.inputs[0]
    detach(node)
    replace_reads(output, x)
    return layers


def _cannot_fold_before(layer: gs.Node, output: gs.Tensor, s: np.ndarray, t: np.ndarray) -> str | None:
    """Why s a + t cannot become part of W and b; None if it can."""
    if layer.op not in LINEAR or layer.inputs[0] is not output or any(x is output for x in layer.inputs[1:]):
        return f"{describe(layer)} after it is no linear layer"
    if reason := _parameters(layer):
        return reason
    if layer.op == "Linear" and rank(output) != 2:
        return f"axis 1 is not the input axis of {describe(layer)}"
    if t.any():
        if layer.op == "ConvTranspose":
            return f"its shift does not reach every output of {describe(layer)} alike"
        if layer.op == "Conv" and (
            layer.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(layer.attrs.get("pads", ()))
        ):
            return f"{describe(layer)} pads with zeros, where its shift would be missing"
    weight = np.asarray(value(layer, 1))
    width = weight.shape[0] if layer.op == "ConvTranspose" else weight.shape[1] * int(layer.attrs.get("group", 1))
    return None if width == s.size else f"{describe(layer)} reads {width} channels, it has {s.size}"


def _write(layer: gs.Node, weight: np.ndarray, bias: np.ndarray | None, names: Names) -> None:
    """Give a layer a weight and bias of its own, the weight under its old name."""
    dtype = np.asarray(value(layer, 1)).dtype
    set_constant(layer, 1, weight.astype(dtype), layer.inputs[1].name)
    if bias is None or (not given(layer, 2) and not bias.any()):
        return
    old = layer.inputs[2] if given(layer, 2) else None
    alone = old is not None and len(old.outputs) == 1
    name = old.name if old is not None and alone else names.fresh(f"{layer.name}/bias")
    set_constant(layer, 2, bias.astype(dtype), name)
