"""Explicit pads: nothing about a window's place is left for the runtime to work out.

- auto_pad of convolutions and pooling, by axis with k' = (k - 1) d + 1, size n, stride s:
  SAME has ceil(n/s) outputs, so it pads p = max((ceil(n/s) - 1) s + k' - n, 0) in all, which is k' - 1 for s = 1
  whatever n is; SAME_UPPER puts the odd one at the end, SAME_LOWER at the start. VALID pads nothing.
- ConvTranspose: output_shape o asks for p = s (n - 1) + output_padding + k' - o in all, and SAME for o = n s; here
  SAME_UPPER puts the odd one at the end and everything else at the start.
- Pad with zeros before a Conv is that Conv's padding; before an AveragePool it is, too, with count_include_pad = 1.
  MaxPool pads with -infinity: only a Pad of that value (or less than any float) is its padding.
- ceil_mode: a last window that would begin beyond the input and its padding before is left out by runtimes, but not by
  onnx's shape inference; where that happens, pads that end with the last window say the same without ceil_mode.
- Attributes with a default are written down.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import describe, given, pinned, prune, rank, set_input, value
from onnxcrp.canonize.report import PassReport

CONVOLUTIONS = {"Conv", "ConvTranspose"}
POOLS = {"MaxPool", "AveragePool", "LpPool"}


def explicit_pads(graph: gs.Graph) -> PassReport:
    """auto_pad and Pad nodes -> the attribute `pads`, where that is exact."""
    report = PassReport("explicit pads")
    pins = pinned(graph)
    unsure: set[str] = set()  # tensors after a window that onnx's inference counts and runtimes do not
    for node in graph.nodes:
        if any(tensor.name in unsure for tensor in node.inputs):
            _forget(node, pins, unsure)
        if node.domain or node.op not in CONVOLUTIONS | POOLS:
            continue
        auto = node.attrs.get("auto_pad", "NOTSET")
        reason = _explicit(node, graph.opset)
        if reason:
            report.declined.append(f"{describe(node)}: {reason}")
        elif node.op in POOLS and _round_down(node):
            _forget(node, pins, unsure)
            report.done.append(f"{describe(node)}: without ceil_mode its pads are {node.attrs['pads']}")
        elif auto != "NOTSET":
            report.done.append(f"{describe(node)}: auto_pad {auto} is pads {node.attrs['pads']}")
    for node in graph.nodes:
        if node.op == "Pad" and not node.domain and node.outputs[0].name not in pins:
            _fold_pad(node, report)
    prune(graph)
    return report


def _explicit(node: gs.Node, opset: int) -> str | None:
    """Write down every attribute of a window; the reason where that cannot be done."""
    attrs = node.attrs
    if node.op in CONVOLUTIONS:
        weight = node.inputs[1]
        kernel = list(attrs.get("kernel_shape") or (weight.shape or ())[2:])
        if not kernel or not all(isinstance(size, int | np.integer) for size in kernel):
            return "the size of its kernel is not known"
        attrs["group"] = int(attrs.get("group", 1))
    else:
        kernel = list(attrs["kernel_shape"])
    kernel = [int(size) for size in kernel]
    axes = len(kernel)
    attrs["kernel_shape"] = kernel
    strides = attrs["strides"] = [int(n) for n in attrs.get("strides") or [1] * axes]
    dilations = [int(n) for n in attrs.get("dilations") or [1] * axes]
    if node.op != "AveragePool" or opset >= 19:  # average windows could not be dilated before
        attrs["dilations"] = dilations
    if node.op in POOLS:
        attrs["ceil_mode"] = int(attrs.get("ceil_mode", 0))
    if node.op == "AveragePool":
        attrs["count_include_pad"] = int(attrs.get("count_include_pad", 0))
    if node.op == "ConvTranspose":
        return _explicit_transpose(node, kernel)
    auto = attrs.get("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        attrs["pads"] = [int(n) for n in attrs.get("pads") or [0] * 2 * axes] if auto == "NOTSET" else [0] * 2 * axes
    else:
        sizes = _spatial(node, axes)
        starts, ends = [], []
        for k, s, d, n in zip(kernel, strides, dilations, sizes, strict=True):
            if s == 1:
                total = (k - 1) * d
            elif n is None:
                return f"auto_pad {auto} with a stride on a size that is not known"
            else:
                total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small, large = total // 2, total - total // 2
            starts.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        attrs["pads"] = starts + ends
        if "ceil_mode" in attrs:
            attrs["ceil_mode"] = 0  # SAME knows its number of outputs, rounding up could add one
    attrs.pop("auto_pad", None)
    return None


def _forget(node: gs.Node, pins: set[str], unsure: set[str]) -> None:
    """The shapes that inference found for what a node writes, and for what follows."""
    for tensor in node.outputs:
        unsure.add(tensor.name)
        if tensor.name not in pins:
            tensor.shape = None


def _round_down(node: gs.Node) -> bool:
    """ceil_mode -> pads that end with the last window, where one is left out and sizes are known."""
    attrs, kernel = node.attrs, node.attrs["kernel_shape"]
    axes = len(kernel)
    before, after, sizes = attrs["pads"][:axes], attrs["pads"][axes:], _spatial(node, axes)
    if not attrs["ceil_mode"] or None in sizes:
        return False
    ends, fewer = [], False
    strides, dilations = attrs["strides"], attrs.get("dilations", [1] * axes)
    for k, s, d, n, b, a in zip(kernel, strides, dilations, sizes, before, after, strict=True):
        windows = -(-(n + b + a - (k - 1) * d - 1) // s) + 1
        if (windows - 1) * s >= n + b:
            windows, fewer = windows - 1, True
        ends.append(max((windows - 1) * s + (k - 1) * d + 1 - b - n, 0))
    counted = attrs.get("count_include_pad", 0) and any(end > a for end, a in zip(ends, after, strict=True))
    if not fewer or counted or any(end >= k for end, k in zip(ends, kernel, strict=True)):
        return False
    attrs["pads"], attrs["ceil_mode"] = [*before, *ends], 0
    return True


def _explicit_transpose(node: gs.Node, kernel: list[int]) -> str | None:
    """pads of a ConvTranspose from output_shape or auto_pad."""
    attrs, axes = node.attrs, len(kernel)
    padding = attrs["output_padding"] = [int(n) for n in attrs.get("output_padding") or [0] * axes]
    auto, wanted = attrs.get("auto_pad", "NOTSET"), attrs.get("output_shape")
    if not wanted and auto in ("NOTSET", "VALID"):
        attrs["pads"] = [int(n) for n in attrs.get("pads") or [0] * 2 * axes] if auto == "NOTSET" else [0] * 2 * axes
    else:
        sizes = _spatial(node, axes)
        starts, ends, extra = [], [], list(padding)
        targets = list(wanted)[-axes:] if wanted else [None] * axes
        for axis, (k, s, d, n, o) in enumerate(
            zip(kernel, attrs["strides"], attrs["dilations"], sizes, targets, strict=True)
        ):
            width = (k - 1) * d + 1
            if o is None:
                total = width + padding[axis] - s  # o = n s
            elif n is None:
                return "output_shape on a size that is not known"
            else:
                total = s * (n - 1) + padding[axis] + width - int(o)
            if total < 0:
                extra[axis] += -total
                total = 0
                if extra[axis] >= max(s, d):
                    return f"output_shape asks for {extra[axis]} rows that no input reaches"
            small, large = total // 2, total - total // 2
            starts.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        attrs["pads"], attrs["output_padding"] = starts + ends, extra
    attrs.pop("auto_pad", None)
    attrs.pop("output_shape", None)
    return None


def _spatial(node: gs.Node, axes: int) -> list[int | None]:
    """Sizes of the axes a window moves over."""
    shape = node.inputs[0].shape
    if shape is None or len(shape) != axes + 2:
        return [None] * axes
    return [int(n) if isinstance(n, int | np.integer) else None for n in shape[2:]]


def _fold_pad(node: gs.Node, report: PassReport) -> None:
    """Pad -> pads of each window that reads it; the Pad goes when nothing reads it any more."""
    readers = [reader for reader in node.outputs[0].outputs if reader.op in {"Conv", "MaxPool", "AveragePool"}]
    if not readers:
        return
    windows = _pad_amounts(node)
    for reader in readers:
        reason = windows if isinstance(windows, str) else _cannot_pad(node, reader, windows)
        if reason:
            report.declined.append(f"{describe(node)}: {reason}")
            continue
        reader.attrs["pads"] = [a + b for a, b in zip(reader.attrs["pads"], windows, strict=True)]
        if reader.op == "AveragePool":
            reader.attrs["count_include_pad"] = 1
        set_input(reader, 0, node.inputs[0])
        report.done.append(f"{describe(node)}: pads of {describe(reader)}")


def _pad_amounts(node: gs.Node) -> list[int] | str:
    """[starts..., ends...] of the spatial axes, or why it is not that simple."""
    mode = node.attrs.get("mode", "constant")
    if mode != "constant":
        return f"stays, it pads with mode {mode}"
    pads, axes = value(node, 1), value(node, 3)
    total = rank(node.inputs[0])
    if pads is None or (given(node, 3) and axes is None):
        return "stays, its pads are computed"
    if axes is None:
        total = pads.size // 2
        axes = np.arange(total)
    if total is None:
        return "stays, the rank of its data is not known"
    starts, ends = [0] * total, [0] * total
    for axis, start, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        starts[int(axis)], ends[int(axis)] = int(start), int(end)
    if min(starts + ends, default=0) < 0:
        return "stays, it crops"
    if any(starts[:2] + ends[:2]):
        return "stays, it pads batch or channels"
    return starts[2:] + ends[2:]


def _cannot_pad(node: gs.Node, reader: gs.Node, amounts: list[int]) -> str | None:
    """Why a Pad is not the padding of the window that reads it."""
    if any(tensor is node.outputs[0] for tensor in reader.inputs[1:]):
        return f"stays, {describe(reader)} reads it as its weight"
    if "pads" not in reader.attrs or reader.attrs.get("auto_pad") or len(reader.attrs["pads"]) != len(amounts):
        return f"stays, the pads of {describe(reader)} are not known"
    fill = value(node, 2)
    if given(node, 2) and fill is None:
        return "stays, what it pads with is computed"
    number = 0.0 if fill is None or fill.size == 0 else float(fill.ravel()[0])
    if reader.op == "MaxPool":
        if number > np.finfo(np.float32).min:
            return f"stays, it pads with {number:g} and {describe(reader)} with -infinity"
    elif number != 0:
        return f"stays, it pads with {number:g} and {describe(reader)} with 0"
    if reader.op == "Conv":
        return None
    if reader.attrs["ceil_mode"]:
        return f"stays, {describe(reader)} rounds up, and leaves out windows that begin in its own padding"
    kernel, pads = reader.attrs["kernel_shape"], reader.attrs["pads"]
    if any(a + b >= k for a, b, k in zip(pads, amounts, kernel * 2, strict=True)):
        return f"stays, it pads more than the kernel of {describe(reader)}"
    if reader.op == "AveragePool" and any(pads) and not reader.attrs["count_include_pad"]:
        return f"stays, {describe(reader)} does not count its own padding"
    return None
