"""Canonical models and relevance models on disk, so that a second process starts in a fraction of the time.

An entry is a folder named by the SHA-256 of all it depends on: the source model with its external data, the composite's
full text, every compile option, this package's files, the versions of onnx, graphsurgeon, numpy and onnxruntime, and,
where onnxruntime's optimised graph is stored, the processor. It is written under a temporary name and renamed, so other
processes see all of it or nothing. An entry that is cut off or cannot be read is made anew; what cannot be stored
faithfully is not stored, and nothing is while operators or rules of a plugin are registered, whose code no key knows.
Nothing is ever removed: delete the folder to make room.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcrp.errors import OnnxcrpError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from onnxcrp.canonize import Canonical

VARIABLE = "ONNXCRP_CACHE"
ABOUT, GRAPH, WEIGHTS, MODEL = "about.json", "graph.onnx", "weights.bin", "model.onnx"
ENDS = 1 << 16  # bytes at both ends of a file whose digest is kept beside its size
ALIGNMENT = 64


class Cache:
    """A folder of entries; made when something is stored first. Raises OnnxcrpError where that cannot be."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise OnnxcrpError(f"the cache {self.folder} is no folder", hint=f"name a folder, or unset {VARIABLE}")

    @staticmethod
    def of(cache: str | os.PathLike[str] | bool | Cache | None) -> Cache | None:
        """A folder or Cache as given; None: what the environment variable ONNXCRP_CACHE names; False: none."""
        if isinstance(cache, Cache):
            return cache
        if cache is None or cache is True:
            named = os.environ.get(VARIABLE)
            if cache is True and not named:
                raise OnnxcrpError("cache=True needs a folder", hint=f"cache=DIR, or set {VARIABLE}")
            return Cache(named) if named else None
        return Cache(cache) if cache is not False else None

    # --- canonical models ---------------------------------------------------------------------------------------------

    def canonical(self, model: str | os.PathLike[str] | onnx.ModelProto) -> Canonical:
        """The canonical form of `model`, read where it is stored, else made and stored; raises what canonize does.

        Its large weights are mapped from the file, and read when something is compiled.
        """
        from onnxcrp.canonize import canonize

        if extended():
            return canonize(model)
        sha256 = self._sha256(model)
        if sha256 is not None:
            path = self._entry("canonical", {"sha256": sha256})
            found = self._read(path, read_canonical)
            if found is not None:
                found.stored = True
                return found
        canonical = canonize(model)
        canonical.stored = True
        path = self._entry("canonical", {"sha256": canonical.sha256})
        if not path.exists():
            self._store(path, lambda folder: write_canonical(canonical, folder))
        if sha256 is None:
            self._remember_files(model)
        return canonical

    def _sha256(self, model: Any) -> str | None:
        """The source's digest as canonize computes it, without parsing the file; None for a file not seen before."""
        from onnxcrp.canonize.load import hash_files, hash_model

        if not isinstance(model, str | os.PathLike):
            return hash_model(model)
        path = Path(model)
        if not path.is_file():
            return None  # canonize says so
        digest = hash_files([path])
        others = self._read(self._entry("sources", {"file": digest.hexdigest()}), lambda f: _load(f)["files"])
        if others is None:
            return None
        beside = [path.parent / name for name in others]
        if not all(each.is_file() for each in beside):
            return None
        return hash_files(beside, digest).hexdigest()

    def _remember_files(self, model: Any) -> None:
        """Which files of external data belong to a model file."""
        from onnxcrp.canonize.load import files_of, hash_files

        path = Path(model)
        names = [os.path.relpath(each, path.parent) for each in files_of(path)[1:]]
        entry = self._entry("sources", {"file": hash_files([path]).hexdigest()})
        self._store(entry, lambda folder: {"files": names})

    # --- relevance models ---------------------------------------------------------------------------------------------

    def session(
        self,
        key: Mapping[str, Any],
        compile: Callable[[], onnx.ModelProto],
        start: Callable[..., Any],
        *,
        cpu: bool,
    ) -> tuple[Any, dict[str, str]]:
        """The session of a relevance model and its metadata, from the entry of `key`, else compiled and stored.

        `start(model, optimize=..., optimized=...)` makes the Session. With `cpu` the graph is stored as the runtime
        optimised it, for this processor; other providers' are optimised anew at every start.
        """
        from onnxcrp.session import metadata, save

        if extended():
            model = compile()
            return start(model), metadata(model)
        path = self._entry("relevance", {**key, "processor": processor() if cpu else ""})

        def read(folder: Path) -> tuple[Any, dict[str, str]]:
            return start(folder / MODEL, optimize=not cpu), _load(folder)["metadata"]

        found = self._read(path, read)
        if found is not None:
            return found
        model = compile()
        about = metadata(model)
        made: list[Any] = []

        def write(folder: Path) -> dict[str, Any]:
            if not cpu:
                save(model, folder / MODEL)
            made.append(start(model, optimized=folder / MODEL if cpu else None))
            return {"metadata": about}

        self._store(path, write)
        return made[0] if made else start(model), about

    # --- entries ------------------------------------------------------------------------------------------------------

    def _entry(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The folder of what depends on `key` and on this installation."""
        text = json.dumps({**installation(), **key}, sort_keys=True, default=str)
        return self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:40]

    def _read(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """What is stored, or None; an entry that is damaged is removed."""
        if not path.is_dir():
            return None
        try:
            for name, (size, ends) in _load(path)["written"].items():
                if (path / name).stat().st_size != size or _ends(path / name) != ends:
                    raise ValueError(f"{name} is not what was written")
            return read(path)
        except Exception:  # whatever is wrong with it, it can be made again
            shutil.rmtree(path, ignore_errors=True)
            return None

    def _store(self, path: Path, write: Callable[[Path], dict[str, Any] | None]) -> None:
        """Write an entry; where the disk refuses, warn and go on without."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.mkdir(parents=True)
            about = write(temporary)
            if about is None:  # cannot be stored faithfully
                return
            files = {file.name: (file.stat().st_size, _ends(file)) for file in sorted(temporary.iterdir())}
            text = json.dumps({**about, "written": files})
            (temporary / ABOUT).write_text(text, encoding="utf-8")
            temporary.rename(path)
        except OSError as error:
            if not path.is_dir():  # else another process was faster
                warnings.warn(f"the cache {self.folder} cannot be written: {error.strerror or error}", stacklevel=4)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def _ends(path: Path) -> str:
    """Digest of the first and last bytes: what is cut off or overwritten shows, at no cost for large files."""
    with path.open("rb") as file:
        head = file.read(ENDS)
        file.seek(max(0, path.stat().st_size - ENDS))
        return hashlib.sha256(head + file.read(ENDS)).hexdigest()


def extended() -> bool:
    """Whether operators or rules from outside this package are registered, by a plugin or by hand."""
    from onnxcrp.ops import BUILT_IN, CARRIES_NONE, OPS
    from onnxcrp.plugins import discover

    discover()
    lrp = sys.modules.get("onnxcrp.lrp")  # whoever registers a rule has imported it
    rules = lrp.RULES.values() if lrp is not None else ()
    return bool({*OPS, *CARRIES_NONE} - BUILT_IN) or any(
        not rule.function.__module__.startswith("onnxcrp.") for rule in rules
    )


@functools.cache
def installation() -> dict[str, str]:
    """Versions of all that writes a relevance model, and this package's own files (size and time of change)."""
    found = {}
    for name in ("onnx", "onnx-graphsurgeon", "numpy", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    files = sorted((str(p.relative_to(here)), p.stat().st_size, p.stat().st_mtime_ns) for p in here.rglob("*.py"))
    return found | {"onnxcrp": hashlib.sha256(repr(files).encode()).hexdigest()}


@functools.cache
def processor() -> str:
    """What onnxruntime's optimised graphs depend on: the processor and its instructions."""
    about = Path("/proc/cpuinfo")
    if not about.is_file():
        return f"{platform.machine()} {platform.processor()}"
    first = about.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    return "\n".join(line for line in first if line.split(":")[0].strip() in wanted)


# ------------------------------------------------------------------------------------------------- canonical models


def write_canonical(canonical: Canonical, folder: Path) -> dict[str, Any] | None:
    """A canonical model as files: a graph without large weights, these in one file, the rest returned as JSON.

    None where what was written does not read back the same.
    """
    from onnxcrp.canonize.load import BIG
    from onnxcrp.canonize.write import export

    graph = canonical.graph
    constants = {t.name: t for node in graph.nodes for t in node.inputs if _is_constant(t) and t.values.size > BIG}
    places, end = {}, 0
    with (folder / WEIGHTS).open("wb") as file:
        for name, tensor in constants.items():
            array = np.ascontiguousarray(tensor.values)
            if array.dtype == object or np.dtype(array.dtype.str) != array.dtype:
                return None  # bfloat16 and packed types: numpy cannot map them
            file.write(bytes(-end % ALIGNMENT))
            offset = end + -end % ALIGNMENT
            places[name] = (array.dtype.str, array.shape, offset)
            file.write(array.data if array.size else b"")
            end = offset + array.nbytes
    skeleton = export(graph, largest=BIG)
    (folder / GRAPH).write_bytes(skeleton.SerializeToString())
    fields = {
        name: getattr(canonical, name)
        for name in ("sha256", "source_opset", "source_ir", "batch", "scopes", "weights", "sources", "metadata")
    }
    about = {"weights": places, "canonical": fields, "reports": [asdict(report) for report in canonical.reports]}
    about = json.loads(json.dumps(about))
    return about if _alike(graph, _graph(folder, about)) else None


def read_canonical(folder: Path) -> Canonical:
    """The inverse of `write_canonical`."""
    from onnxcrp.canonize import Canonical, PassReport

    about = _load(folder)
    reports = [PassReport(**report) for report in about["reports"]]
    return Canonical(graph=_graph(folder, about), reports=reports, **about["canonical"])


def _graph(folder: Path, about: Mapping[str, Any]) -> gs.Graph:
    import onnx

    from onnxcrp.canonize.edit import DOMAIN
    from onnxcrp.canonize.load import import_graph

    arrays: dict[str, np.ndarray] = {}
    if about["weights"]:
        whole = np.memmap(folder / WEIGHTS, np.uint8, mode="r")
        for name, (kind, shape, offset) in about["weights"].items():
            dtype = np.dtype(kind)
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            arrays[name] = whole[offset : offset + size].view(dtype).reshape(shape)
    graph = import_graph(onnx.load_model_from_string((folder / GRAPH).read_bytes()), arrays)
    for node in graph.nodes:
        node.op = node.op.removeprefix(f"{DOMAIN}::")
    return graph


def _is_constant(tensor: gs.Tensor) -> bool:
    import onnx_graphsurgeon as gs

    return isinstance(tensor, gs.Constant)


def _alike(one: gs.Graph, other: gs.Graph) -> bool:
    """Whether two graphs have the same nodes in the same order, with the same types, shapes and values everywhere."""

    def of(tensor: gs.Tensor) -> tuple[Any, ...]:
        values = (tensor.values.dtype.str, tensor.values.tobytes()) if _is_constant(tensor) else ()
        shape = None if tensor.shape is None else tuple(tensor.shape)
        return (tensor.name, str(tensor.dtype), shape, *values)

    def attribute(value: Any) -> str:
        return value.values.tobytes().hex() if _is_constant(value) else repr(value)

    def node(each: gs.Node) -> tuple[Any, ...]:
        attrs = {name: attribute(value) for name, value in each.attrs.items()}
        return (
            each.op,
            each.domain or "",
            each.name,
            attrs,
            [of(t) for t in each.inputs],
            [of(t) for t in each.outputs],
        )

    ends = [[of(t) for t in (*graph.inputs, *graph.outputs)] for graph in (one, other)]
    return (
        ends[0] == ends[1]
        and not one.functions
        and one.opset == other.opset
        and not any(True for graph in (one, other) for _ in graph.subgraphs())
        and len(one.nodes) == len(other.nodes)
        and all(node(a) == node(b) for a, b in zip(one.nodes, other.nodes, strict=True))
    )
