"""Read a model of any opset, size and exporter into a graph: the one place that knows what files look like.

Weights never pass through a protobuf after reading: they are taken out as arrays first, so that inlining, upgrading and
importing handle a small skeleton and a model may be larger than the 2 GB that one protobuf holds.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.inliner
import onnx.numpy_helper
import onnx.version_converter
import onnx_graphsurgeon as gs

from onnxcrp.canonize.edit import DOMAIN, Names, quiet, set_constant, set_output, value
from onnxcrp.canonize.report import PassReport
from onnxcrp.errors import ModelError
from onnxcrp.ops.registry import claimed, key_of
from onnxcrp.session import metadata

OPSET = 18  # what canonical graphs are written in, unless the file is newer
OLDEST = 7
BIG = 4096  # elements; larger constants stay out of the skeleton
SCOPE = "onnxcrp.scope"
REWRITTEN = (None, "", DOMAIN, "com.microsoft", "ai.onnx.ml")  # domains whose operators passes know by plain names
QUANTIZER = re.compile(r"_((de)?quant(ized)?|(Deq|Q)uantizeLinear(_Output)?)$")  # what quantizers append to a name
AUTOMATIC = re.compile(r"^(\d+|onnx::.*|/.*|_?val_\d+|_v_\d+|[cC]onst.*|.*ReadVariableOp.*|.*FakeQuant.*)$")
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"}
EXPECTED, EXPORT = "the path of an .onnx file is expected", "export the model to ONNX"
FORMATS = {  # how a file begins that is no model -> what it is, and what to do
    b"\x89PNG": ("a PNG picture", EXPECTED),
    b"\xff\xd8\xff": ("a JPEG picture", EXPECTED),
    b"PK\x03\x04": ("a zip archive, as torch, Keras and numpy write", EXPORT),
    b"\x89HDF": ("an HDF5 file, as Keras writes", EXPORT),
    b"version https://git-lfs": ("a pointer to a file in Git LFS", "git lfs pull fetches the file"),
}


@dataclass
class Source:
    """A model as read: its graph at opset >= 18, and what the file told about it."""

    graph: gs.Graph
    report: PassReport
    sha256: str
    opset: int
    ir: int
    scopes: dict[str, str]
    weights: dict[str, str]
    ops: dict[str, str]  # node name -> op type in the file
    metadata: dict[str, str]


def load(model: str | os.PathLike | onnx.ModelProto) -> Source:
    """Read a path or ModelProto, which is left as it is.

    Raises ModelError for what is no model, too old, too new, or a relevance model.
    """
    if isinstance(model, onnx.ModelProto):
        proto, folder, sha256 = model, None, hash_model(model)
    else:
        path = Path(model)
        proto = _read(path)
        folder = path.parent
        sha256 = hash_files([path, *_external_files(proto, folder)]).hexdigest()
    if "onnxcrp.map" in metadata(proto):
        name = "this" if isinstance(model, onnx.ModelProto) else repr(os.fspath(model))
        raise ModelError(
            f"{name} is a relevance model already, compiled by onnxcrp", hint="name the model that it was compiled from"
        )
    opset = _source_opset(proto)
    report = PassReport("load")
    skeleton, arrays = _split(proto, opset, folder, report)
    kept = _keep_functions(skeleton)
    if skeleton.functions:
        report.done.append(f"{len(skeleton.functions)} local function(s) inlined")
        skeleton = call(onnx.inliner.inline_local_functions, skeleton, True, what="local functions cannot be inlined")
        _take_constants(skeleton.graph, arrays, folder)
    _sort(skeleton.graph)
    hints = {output: node for node in skeleton.graph.node for output in node.output if output}
    scopes = {output: scope for output, node in hints.items() if (scope := _scope(node))}
    names = {output: (node.name, node.op_type) for output, node in hints.items()}
    upgraded = _upgrade(skeleton, opset, arrays, report)
    graph = import_graph(upgraded, arrays)
    graph.functions = _imported(kept, skeleton)
    for function in kept:
        report.done.append(f"local function {function.domain}::{function.name} kept: it has a transpose of its own")
    if opset <= 10:
        _old_resizes(graph)
    _name_nodes(graph, {output: name for output, (name, _) in names.items()})
    by_node = {node.name: [tensor.name for tensor in node.outputs] for node in graph.nodes}
    found = {name: next((scopes[o] for o in outputs if o in scopes), "") for name, outputs in by_node.items()}
    ops = {name: next((names[o][1] for o in outputs if o in names), "") for name, outputs in by_node.items()}
    return Source(
        graph=graph,
        report=report,
        sha256=sha256,
        opset=opset,
        ir=int(proto.ir_version),
        scopes={name: scope for name, scope in found.items() if scope},
        weights=_weights(graph),
        ops={name: op for name, op in ops.items() if op},
        metadata=metadata(proto),
    )


# ------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        found = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no file {str(path)!r}"
        raise ModelError(found, hint=EXPECTED)
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except MemoryError:
        raise
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}", hint=EXPECTED) from error
    except Exception as error:  # protobuf's error class depends on its implementation
        raise _no_model(path, _line(error)) from error
    if not proto.graph.node and not proto.graph.output:
        raise _no_model(path, "it holds no graph")
    return proto


def _no_model(path: Path, why: str) -> ModelError:
    """Of a file that onnx cannot read: by what it looks like, else by `why` where it is called a model."""
    with path.open("rb") as file:
        head = file.read(256)
    looks = next((known for start, known in FORMATS.items() if head.startswith(start)), None)
    if looks is None and head and all(byte >= 32 or byte in b"\t\n\f\r" for byte in head):
        looks = ("a text", EXPECTED)  # protobuf holds control characters
    if looks is not None:
        return ModelError(f"{str(path)!r} is not an ONNX model but {looks[0]}", hint=looks[1])
    if path.suffix.lower() not in ("", ".onnx"):
        return ModelError(f"{str(path)!r} is not an ONNX model", hint=EXPECTED)
    return ModelError(f"{str(path)!r} is not an ONNX model: {why}", hint="was it exported, and copied, whole?")


def _source_opset(proto: onnx.ModelProto) -> int:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise ModelError("the model does not say which opset its operators are of", hint="export it again")
    opset, newest = int(max(versions)), int(onnx.defs.onnx_opset_version())
    if opset < OLDEST:
        raise ModelError(f"opset {opset} is too old, {OLDEST} is the oldest", hint="export the model again")
    if opset > newest:
        raise ModelError(
            f"opset {opset} is newer than the installed onnx knows ({newest})",
            hint=f"pip install -U onnx, or export with opset_version={newest}",
        )
    if opset > 21 and not _runtime_knows(opset):  # every onnxruntime this project allows runs 21
        raise ModelError(
            f"opset {opset} is newer than the installed onnxruntime runs",
            hint="pip install -U onnxruntime, or export with a lower opset_version",
        )
    return opset


def _runtime_knows(opset: int) -> bool:
    """Whether onnxruntime starts a model of that opset; True where none is installed, since nothing can be asked."""
    try:
        import onnxruntime
    except ImportError:
        return True
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "probe", ends[:1], ends[1:])
    probe = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's errors share no base class
        return False
    return True


def files_of(path: Path) -> list[Path]:
    """The model file and its files of external data, in the order in which they are hashed."""
    return [path, *_external_files(_read(path), path.parent)]


def _external_files(proto: onnx.ModelProto, folder: Path) -> list[Path]:
    return sorted({_external_file(tensor, folder) for tensor in _tensors(proto) if _is_external(tensor)})


def hash_files(paths: Iterable[Path], start: Any = None) -> Any:
    """SHA-256 of files one after the other, going on from `start`, which is left as it is."""
    digest = hashlib.sha256() if start is None else start.copy()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest


def hash_model(model: onnx.ModelProto) -> str:
    """Of the serialized model; weights are hashed one by one where they do not fit into one protobuf."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 2**30:
        try:
            return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        except Exception:  # too large after all: protobuf's error class depends on its implementation
            pass
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        digest.update(np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- weights, skeleton


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors that may lie in files of their own."""
    yield from proto.graph.initializer
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from attribute.g.initializer
                nodes.extend(attribute.g.node)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _external_file(tensor: onnx.TensorProto, folder: Path | None) -> Path:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if folder is None:
        raise ModelError(
            f"the weight {tensor.name!r} lies in the file {location!r}, of which a ModelProto does not know the folder",
            hint="pass the path of the model, or load it with its external data",
        )
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(
            f"the weight {tensor.name!r} lies in {location!r}, outside the folder of the model",
            hint="external data must lie beside the model",
        )
    path = folder / location
    if not path.is_file():
        raise ModelError(
            f"the weight {tensor.name!r} lies in {location!r}, which is missing", hint="it must lie beside the model"
        )
    return path


def _array(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    """The values of a tensor, wherever they lie."""
    if not _is_external(tensor):
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _external_file(tensor, folder)
    offset = int(entries.get("offset", 0))
    length = int(entries.get("length", path.stat().st_size - offset))
    if offset < 0 or length < 0 or offset + length > path.stat().st_size:
        raise ModelError(f"the file {path.name!r} is too short for the weight {tensor.name!r}", hint="copy it again")
    raw = np.fromfile(path, np.uint8, length, offset=offset)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if length == dtype.itemsize * int(np.prod(tensor.dims, dtype=np.int64)):
        return raw.view(dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(list(tensor.dims))
    packed = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())  # int4
    return np.asarray(onnx.numpy_helper.to_array(packed))


def _dense(sparse: onnx.SparseTensorProto, folder: Path | None) -> np.ndarray:
    """[dims] of a tensor that is stored as values and their positions."""
    values, indices = _array(sparse.values, folder), _array(sparse.indices, folder)
    dense = np.zeros(list(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _split(
    proto: onnx.ModelProto, opset: int, folder: Path | None, report: PassReport
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A copy without weights, and the weights by name."""
    arrays = {tensor.name: _array(tensor, folder) for tensor in proto.graph.initializer}
    arrays |= {sparse.values.name: _dense(sparse, folder) for sparse in proto.graph.sparse_initializer}
    skeleton = onnx.ModelProto(ir_version=max(int(proto.ir_version), 8))
    skeleton.functions.extend(proto.functions)
    for entry in proto.opset_import:
        skeleton.opset_import.add(domain="" if entry.domain == "ai.onnx" else entry.domain, version=entry.version)
    graph = skeleton.graph
    graph.name = proto.graph.name or "graph"
    listed = [tensor.name for tensor in proto.graph.input if tensor.name in arrays]
    if listed:
        report.done.append(f"{len(listed)} initializer(s) that were listed as inputs are constants")
    graph.input.extend(tensor for tensor in proto.graph.input if tensor.name not in arrays)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(tensor for tensor in proto.graph.value_info if tensor.name not in arrays)
    for node in proto.graph.node:
        if (constant := _constant(node, folder)) is None:
            graph.node.append(node)
        else:
            arrays[node.output[0]] = constant
    foreign = {"SimplifiedLayerNormalization"} | ({"LayerNormalization"} if opset < 17 else set())
    for container in (graph, *skeleton.functions):
        _default_domain(container, foreign)
    if all(entry.domain != "com.microsoft" for entry in skeleton.opset_import):
        skeleton.opset_import.add(domain="com.microsoft", version=1)
    return skeleton, arrays


def _keep_functions(skeleton: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """Take out the local functions that somebody registered an operator for, and copies of what these call."""
    functions = {(function.domain, function.name): function for function in skeleton.functions}
    own = [key for key in functions if claimed(key[1], key[0])]
    if not own:
        return []
    needed, waiting = {}, list(own)
    while waiting:
        key = waiting.pop()
        if key in functions and key not in needed:
            needed[key] = functions[key]
            waiting += [(node.domain, node.op_type) for node in functions[key].node]
    kept = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in needed.values()]
    others = [functions[key] for key in functions if key not in own]
    others = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in others]
    del skeleton.functions[:]
    skeleton.functions.extend(others)
    return kept


def _imported(functions: list[onnx.FunctionProto], model: onnx.ModelProto) -> list[gs.Function]:
    """What every model that is written carries along."""
    empty = onnx.helper.make_graph([], "none", [], [])
    holder = onnx.helper.make_model(empty, functions=functions, opset_imports=model.opset_import)
    with quiet():
        return list(gs.import_onnx(holder).functions) if functions else []


def _default_domain(container: onnx.GraphProto | onnx.FunctionProto, foreign: set[str]) -> None:
    """`ai.onnx` is another name of the standard domain, into which onnxruntime's optimizer writes `foreign` ops."""
    for node in container.node:
        if node.domain in ("", "ai.onnx"):
            node.domain = "com.microsoft" if node.op_type in foreign else ""
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _default_domain(graph, foreign)


def _constant(node: onnx.NodeProto, folder: Path | None) -> np.ndarray | None:
    """What a Constant node holds."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    match attribute.name:
        case "value":
            return _array(attribute.t, folder)
        case "sparse_value":
            return _dense(attribute.sparse_tensor, folder)
        case "value_float":
            return np.array(attribute.f, np.float32)
        case "value_floats":
            return np.array(attribute.floats, np.float32)
        case "value_int":
            return np.array(attribute.i, np.int64)
        case "value_ints":
            return np.array(attribute.ints, np.int64)
        case "value_string":
            return np.array(attribute.s.decode(), object)
        case "value_strings":
            return np.array([s.decode() for s in attribute.strings], object)
    return None


def _take_constants(graph: onnx.GraphProto, arrays: dict[str, np.ndarray], folder: Path | None = None) -> None:
    """Move what Constant nodes and initializers hold into `arrays`."""
    kept = []
    for node in graph.node:
        if (constant := _constant(node, folder)) is None:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
        else:
            arrays[node.output[0]] = constant
    for tensor in graph.initializer:
        arrays[tensor.name] = _array(tensor, folder)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)


def _sort(graph: onnx.GraphProto) -> None:
    """Nodes in topological order, in the file's order where that is one; errors: ModelError for a cycle."""
    made = {output for node in graph.node for output in node.output if output}
    reads = [[name for name in names_read(node) if name in made] for node in graph.node]
    done: set[str] = set()
    in_order = True
    for node, names in zip(graph.node, reads, strict=True):
        in_order = in_order and all(name in done for name in names)
        done.update(node.output)
    if in_order:
        return
    waiting = [len(set(names)) for names in reads]
    readers: dict[str, list[int]] = {}
    for index, names in enumerate(reads):
        for name in set(names):
            readers.setdefault(name, []).append(index)
    ready = deque(index for index, count in enumerate(waiting) if count == 0)
    order: list[int] = []
    while ready:
        index = ready.popleft()
        order.append(index)
        for name in graph.node[index].output:
            for reader in readers.get(name, ()):
                waiting[reader] -= 1
                if waiting[reader] == 0:
                    ready.append(reader)
    if len(order) < len(graph.node):
        stuck = next(node for index, node in enumerate(graph.node) if waiting[index])
        raise ModelError(f"the graph has a cycle at {stuck.op_type} {stuck.name!r}", hint="export the model again")
    nodes = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(nodes)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node reads, its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from names_read(inner)
            yield from (tensor.name for tensor in attribute.g.output)


# ------------------------------------------------------------------------------------------------------ upgrade, import


def _upgrade(
    skeleton: onnx.ModelProto, opset: int, arrays: dict[str, np.ndarray], report: PassReport
) -> onnx.ModelProto:
    """At opset 18 or newer, constants of up to BIG elements as initializers and larger ones as typed inputs."""
    for name, array in arrays.items():
        if array.size > BIG:
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            skeleton.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
        else:
            skeleton.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if opset >= OPSET:
        return skeleton
    converted = call(
        onnx.version_converter.convert_version,
        skeleton,
        OPSET,
        what=f"opset {opset} cannot be upgraded to {OPSET}",
    )
    report.done.append(f"opset {opset} upgraded to {OPSET}")
    small: dict[str, np.ndarray] = {}
    _take_constants(converted.graph, small)
    arrays |= {name: array for name, array in small.items() if name not in arrays or arrays[name].size <= BIG}
    for name, array in small.items():
        converted.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return converted


def call(function, *arguments, what: str):
    """Call into onnx's C++ code, whose errors share no base class."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ModelError(f"{what}: {_line(error)}", hint="export the model again with a newer opset") from error


def _line(error: Exception) -> str:
    """The first line of an error, less the place in onnx's sources."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\S*\.(cc|h):\d+: *", "", lines[0])


def import_graph(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> gs.Graph:
    """The skeleton as a graph, its constants those of `arrays`."""
    with quiet():
        graph = gs.import_onnx(model)
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in arrays]
    graph.opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    graph.ir_version = 10
    used = {node.domain for node in graph.nodes}
    graph.import_domains = [entry for entry in model.opset_import if entry.domain == "" or entry.domain in used]
    for node in graph.nodes:
        if node.domain not in REWRITTEN:
            node.op = key_of(node.op, node.domain)
    everything = [tensor for node in graph.nodes for tensor in node.inputs] + graph.outputs
    for subgraph in graph.subgraphs(recursive=True):
        everything += [tensor for node in subgraph.nodes for tensor in node.inputs if not tensor.inputs]
    for tensor in everything:
        if tensor.name not in arrays:
            continue
        if isinstance(tensor, gs.Variable):
            tensor.to_constant(arrays[tensor.name])
        elif not isinstance(tensor._values, np.ndarray):
            tensor.values = arrays[tensor.name]
    return graph


# ----------------------------------------------------------------------------------------------- names, scopes, weights


def _old_resizes(graph: gs.Graph) -> None:
    """Until opset 10 an output pixel i was read at i / scale, which the version converter forgets to say.

    `nearest` was not defined closer; the runtime rounds down, but up along an axis that shrinks.
    """
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op != "Resize":
            continue
        node.attrs["coordinate_transformation_mode"] = "asymmetric"
        if node.attrs.get("mode", "nearest") != "nearest":
            continue
        scales = value(node, 2)
        node.attrs["nearest_mode"] = "ceil" if scales is not None and (scales <= 1).all() else "floor"
        if scales is not None and (scales < 1).any() and (scales > 1).any():  # one node grows, the next one shrinks
            name, output = f"{node.name}/shrink", node.outputs[0]
            grown = gs.Variable(f"{output.name}/grown", dtype=output.dtype)
            set_output(node, grown)
            set_constant(node, 2, np.maximum(scales, 1), f"{name}/grown")
            factors = gs.Constant(f"{name}/scales", np.minimum(scales, 1))
            attrs = {**node.attrs, "nearest_mode": "ceil"}
            nodes.append(gs.Node("Resize", name, attrs, [grown, gs.Variable.empty(), factors], [output]))
    graph.nodes = nodes


def _name_nodes(graph: gs.Graph, known: dict[str, str]) -> None:
    """Every node a name of its own: the file's, else its operator and number."""
    names = Names(graph)
    names.taken.clear()
    for number, node in enumerate(graph.nodes):
        known_name = next((known[t.name] for t in node.outputs if known.get(t.name)), "")
        node.name = names.fresh(node.name or known_name or f"{node.op.rpartition('::')[2]}_{number}")


def _scope(node: onnx.NodeProto) -> str:
    """The module a node was exported from, "layer1.0.conv1", or "" where nothing tells."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    if SCOPE in properties:
        return properties[SCOPE]
    path: list[str] = []
    if "pkg.torch.onnx.name_scopes" in properties:  # "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d']"
        try:
            path = [str(part) for part in ast.literal_eval(properties["pkg.torch.onnx.name_scopes"])]
        except (ValueError, SyntaxError, TypeError):
            path = []
    elif "namespace" in properties:  # ": ResNet/layer1: Sequential/layer1.0.conv1: Conv2d/conv2d: aten.conv2d"
        path = [part.split(":")[0].strip() for part in properties["namespace"].split("/")]
    if len(path) >= 2:
        return "" if path[-2].startswith("_empty") else path[-2]
    return _path_scope(node.name)


def _path_scope(name: str) -> str:
    """The module in a node name of torch's older exporter: /layer1/layer1.0/conv1/Conv -> layer1.0.conv1."""
    if not name.startswith("/"):
        return ""
    parts: list[str] = []
    for part in name.split("/")[1:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        elif part:
            parts.append(part)
    return ".".join(parts)


def _weights(graph: gs.Graph) -> dict[str, str]:
    """Node name -> name of the initializer its weight comes from, through Identity, Transpose, DequantizeLinear ..."""
    origin: dict[str, str] = {}  # of tensors that depend on constants alone
    found = {}
    for node in graph.nodes:
        names = [t.name if isinstance(t, gs.Constant) else origin.get(t.name) for t in node.inputs if not t.is_empty()]
        if names and None not in names:
            origin.update((tensor.name, str(names[0])) for tensor in node.outputs)
        elif node.op in WEIGHTED and not node.domain:
            name = next((name for name in (names[1:2] + names[:1]) if name is not None), "")
            name = QUANTIZER.sub("", name)
            if name and not AUTOMATIC.match(name):
                found[node.name] = name
    return found
