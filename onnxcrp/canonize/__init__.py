"""model.onnx -> canonical model: one spelling for every layer, the outputs unchanged.

Each pass is a function `graph -> PassReport` in a file of its own, with its algebra in the docstring.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field

import onnx
import onnx_graphsurgeon as gs

from onnxcrp.canonize.activations import fuse_activations
from onnxcrp.canonize.batch import free_batch as free
from onnxcrp.canonize.batchnorm import fold_batchnorm
from onnxcrp.canonize.bfloat16 import widen_bfloat16
from onnxcrp.canonize.constants import fold_constants
from onnxcrp.canonize.contrib import expand_composites
from onnxcrp.canonize.control import inline_control_flow
from onnxcrp.canonize.edit import DOMAIN, collector_paused
from onnxcrp.canonize.kernels import rewrite_kernels
from onnxcrp.canonize.linear import normalize_linear
from onnxcrp.canonize.load import SCOPE, Source
from onnxcrp.canonize.load import load as read
from onnxcrp.canonize.machines import fuse_kernels
from onnxcrp.canonize.norms import fuse_norms
from onnxcrp.canonize.pads import explicit_pads
from onnxcrp.canonize.qlinear import dequantize_operators
from onnxcrp.canonize.quantize import keep_quantization
from onnxcrp.canonize.recurrent import is_recurrent, unroll_recurrent
from onnxcrp.canonize.report import PassReport
from onnxcrp.canonize.samples_first import samples_first
from onnxcrp.canonize.shapes import infer_shapes
from onnxcrp.canonize.strided import gather_in_samples
from onnxcrp.canonize.write import write as to_model
from onnxcrp.ops.registry import key_of
from onnxcrp.plugins import discover

__all__ = ["Canonical", "PassReport", "canonize"]

RENAMED = {"Linear"}  # canonical operators that stand for one node of the file


@dataclass
class Canonical:
    """A model in canonical form, and what is known of where it came from."""

    graph: gs.Graph
    reports: list[PassReport]
    sha256: str  # of the source model: the bytes of its file and of its external data, or of the serialized protobuf
    source_opset: int
    source_ir: int
    batch: str  # "dynamic" | "freed" | "fixed": samples must run one by one
    scopes: dict[str, str] = field(default_factory=dict)  # node name -> "layer1.0.conv1", where the exporter tells
    weights: dict[str, str] = field(default_factory=dict)  # node name -> "layer1.0.conv1.weight", where it has a name
    sources: dict[str, str] = field(default_factory=dict)  # node name -> op type in the file, where that is another
    metadata: dict[str, str] = field(default_factory=dict)  # metadata_props of the source
    stored: bool = False  # handed out by a cache: what is compiled from it may be kept under its source's digest

    def to_onnx(self) -> onnx.ModelProto:
        """The canonical model in standard operators, opset >= 18, IR version 10."""
        model = to_model(self.graph)
        onnx.helper.set_model_props(model, self.metadata)
        for node in model.graph.node:
            if node.name in self.scopes:
                node.metadata_props.add(key=SCOPE, value=self.scopes[node.name])
        return model


def canonize(model: str | os.PathLike | onnx.ModelProto, *, free_batch: bool = True) -> Canonical:
    """Bring a model (a path or ModelProto, which is left as it is) into canonical form; errors: ModelError.

    `free_batch`: a batch that was exported as 1 is made symbolic where two samples together then give what each
    gives alone.
    """
    discover()
    source = read(model)
    unrolled = any(is_recurrent(node) for node in source.graph.nodes)
    with collector_paused() if unrolled else nullcontext():
        return _canonical(source, free_batch)


def _canonical(source: Source, free_batch: bool) -> Canonical:
    """All passes in their order."""
    graph = source.graph
    reports = [source.report, widen_bfloat16(graph)]
    infer_shapes(graph)
    reports.append(rewrite_kernels(graph))
    reports.append(fold_constants(graph, batch_unknown=free_batch))
    if reports[-1].done:
        infer_shapes(graph)
    for step in (inline_control_flow, dequantize_operators, expand_composites):
        while (report := step(graph)).done:  # only then are there shapes and constants after what was taken apart
            report.declined.clear()  # what stayed is looked at again
            reports.append(report)
            infer_shapes(graph)
            reports.append(fold_constants(graph, batch_unknown=free_batch))
            infer_shapes(graph)
        reports.append(report)
    reports.append(unroll_recurrent(graph, source.scopes))
    if reports[-1].done:
        infer_shapes(graph)
        reports.append(fold_constants(graph, batch_unknown=free_batch))
    if free_batch:
        report, batch = free(graph)
        reports.append(report)
        if report.done:
            infer_shapes(graph, forget=True)
        reports.append(fold_constants(graph))
    else:
        batch = "dynamic" if _is_dynamic(graph) else "fixed"
    reports += [fuse_norms(graph), fuse_activations(graph)]
    reports += [
        step(graph) for step in (normalize_linear, fuse_kernels, explicit_pads, fold_batchnorm, keep_quantization)
    ]
    for node in graph.nodes:  # what no pass has rewritten must not be taken for the standard's operator of that name
        if node.domain not in ("", None, DOMAIN) and "::" not in node.op:
            node.op = key_of(node.op, node.domain)
    infer_shapes(graph)
    reports += _fold(graph)
    for step in (gather_in_samples, samples_first):
        reports.append(step(graph))
        if reports[-1].done:
            infer_shapes(graph)
            reports += _fold(graph)
    names = {node.name for node in graph.nodes}
    return Canonical(
        graph=graph,
        reports=_merged(reports),
        sha256=source.sha256,
        source_opset=source.opset,
        source_ir=source.ir,
        batch=batch,
        scopes={name: scope for name, scope in source.scopes.items() if name in names},
        weights={name: weight for name, weight in source.weights.items() if name in names},
        sources={n.name: source.ops[n.name] for n in graph.nodes if n.op in RENAMED and source.ops.get(n.name)},
        metadata=source.metadata,
    )


def _fold(graph: gs.Graph) -> list[PassReport]:
    """Fold constants until inference tells no further sizes."""
    reports = []
    while (report := fold_constants(graph)).done:
        reports.append(report)
        infer_shapes(graph)
    return reports


def _is_dynamic(graph: gs.Graph) -> bool:
    """Whether axis 0 of some input is not a number."""
    return any(tensor.shape is None or not isinstance((*tensor.shape, 1)[0], int) for tensor in graph.inputs)


def _merged(reports: list[PassReport]) -> list[PassReport]:
    """One report for each pass, though it may have run twice."""
    merged: dict[str, PassReport] = {}
    for report in reports:
        into = merged.setdefault(report.name, PassReport(report.name))
        into.done += report.done
        into.declined += [line for line in report.declined if line not in into.declined]
    return list(merged.values())
