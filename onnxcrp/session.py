"""The runtime, seen from here: which provider runs a model, from many threads, and models above 2 GB on disk."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from onnxcrp.device import DeviceArray
from onnxcrp.errors import InputError, ModelError, OnnxcrpError, RuntimeMissingError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
INSTALL = 'pip install "onnxcrp[cpu]" (or pip install "onnxcrp[gpu]" on a machine with a CUDA device)'
PROTOBUF_LIMIT = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the graph needs a little room beside the weights
SMALL = 1024  # bytes: tensors below stay in the .onnx file, so that shapes and axes can be read without the data file
ALIGNMENT = 64  # bytes: so that tensors mapped from the data file suit every vector instruction

Provider = str | tuple[str, dict[str, str]]

_REPLAYS = ("would replay the addresses of the first run, whatever is asked", "Explainer(..., cuda_graph=True)")
_REFUSED = {  # options of providers that make answers wrong: why, and what to do instead
    "enable_cuda_graph": _REPLAYS,
    "trt_cuda_graph_enable": _REPLAYS,
    "fuse_conv_bias": ("makes convolutions wrong from the second run on (onnxruntime 1.31.1)", "leave it out"),
}


class Port(NamedTuple):
    """An input or output: `shape` holds int, symbol or None, `dtype` is None for sequences and maps."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype | None


# ------------------------------------------------------------------------------------------------------------ providers


def providers(
    requested: Provider | Sequence[Provider] | None = None, *, allow_tf32: bool = False, capture: bool = False
) -> list[tuple[str, dict[str, str]]]:
    """(name, options) of providers, best first: what is `requested`, else CUDA where there is a device; the CPU last.

    `requested` is a name ("cuda", "CUDAExecutionProvider"), a (name, options) pair, or several of them. TensorRT and
    others are taken on request only. On CUDA, TF32 is off unless `allow_tf32` or the options say otherwise: with its
    10-bit mantissa relevance is not accurate enough. `capture` lets CUDA record the first run and replay it, for
    sessions that keep to one set of buffers (captured.py). Options that would make answers wrong are refused.
    Raises RuntimeMissingError without onnxruntime or for what it lacks.
    """
    available = _onnxruntime().get_available_providers()
    if requested is None:
        wanted: list[Provider] = [CUDA] if CUDA in available and _cuda_devices() else []
    elif isinstance(requested, str):
        wanted = [requested]
    elif len(requested) == 2 and isinstance(requested[1], Mapping):
        wanted = [cast(Provider, requested)]
    else:
        wanted = list(cast(Sequence[Provider], requested))
    chosen: dict[str, tuple[str, dict[str, str]]] = {}
    for entry in wanted:
        asked, options = (entry, {}) if isinstance(entry, str) else entry
        name = _provider_name(asked, available)
        defaults = {"use_tf32": str(int(allow_tf32))} if name == CUDA else {}
        if capture and name == CUDA:
            defaults["enable_cuda_graph"] = "1"
        chosen[name] = (name, {**defaults, **options})
        for option, (why, hint) in _REFUSED.items():
            if str(options.get(option, "0")).lower() in ("1", "true"):
                raise RuntimeMissingError(f"{option} {why}", hint=hint)
    for name, given in (("allow_tf32", allow_tf32), ("cuda_graph", capture)):
        if given and CUDA not in chosen:
            raise RuntimeMissingError(
                f"{name} is for CUDA, which is not used", hint='providers="cuda", or leave it out'
            )
    if capture and next(iter(chosen)) != CUDA:
        raise RuntimeMissingError("cuda_graph is for CUDA alone", hint='providers="cuda", or leave it out')
    chosen.setdefault(CPU, (CPU, {}))  # onnxruntime puts it last anyway: nodes that the others cannot run go there
    return list(chosen.values())


def on_cpu(requested: Provider | Sequence[Provider] | None = None) -> bool:
    """Whether the CPU is the best of the providers of a request, so that no device is waited for."""
    return providers(requested)[0][0] == CPU


_providers = providers  # inside Session a parameter hides the name


def _provider_name(asked: str, available: Sequence[str]) -> str:
    """`cuda` or `CUDAExecutionProvider` -> `CUDAExecutionProvider`."""
    for name in available:
        if asked.lower() in (name.lower(), name.lower().removesuffix("executionprovider")):
            return name
    raise RuntimeMissingError(
        f"the installed onnxruntime offers no {asked!r}, expected one of {', '.join(available)}",
        hint='for CUDA: pip install "onnxcrp[gpu]" in an environment without the [cpu] extra',
    )


def _onnxruntime() -> Any:
    """The module `onnxruntime`, imported when first needed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(f"onnxruntime is not installed ({error})", hint=INSTALL) from None
    if not hasattr(onnxruntime, "InferenceSession"):  # the folder left behind when one of two packages was uninstalled
        raise RuntimeMissingError("onnxruntime is incomplete", hint=f"uninstall every onnxruntime, then {INSTALL}")
    return onnxruntime


def _cuda_devices() -> int:
    """How many CUDA devices the driver sees; 0 without a driver (onnxruntime-gpu offers CUDA even there)."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):
            driver, count = ctypes.CDLL(name), ctypes.c_int(0)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
                return count.value
    return 0


# -------------------------------------------------------------------------------------------------------------- session


class Session:
    """A model ready to run; one Session may be used from many threads.

    `model` is a path or a ModelProto, which is not changed; above `size_threshold` bytes it goes through a
    temporary folder with external data. `optimize=False` turns off onnxruntime's own graph optimisation, "basic"
    leaves fusions out, `threads` sets the threads per operator, `log_severity` 4 is silent: what goes wrong is
    raised, onnxruntime would print it once more. `profile`: a folder for onnxruntime's profile, which `end_profile`
    writes. `optimized`: a file that the optimised graph is written to, to be loaded with `optimize=False` on the
    same kind of machine. `plan_memory=False`: keep no layout of memory for each set of shapes that was run: hardly
    slower, half as large where batches vary. `prepack=False`: for a session that only writes its `optimized` graph.
    `rest`: threads do not wait for more work when a run ends, which takes the cores from a session that runs next.
    `sizes`: what symbols in the shapes of inputs stand for, where all runs agree. `capture`: as in `providers`.
    Raises ModelError for what onnxruntime cannot load, RuntimeMissingError without onnxruntime or for a provider
    asked for that cannot start.
    """

    def __init__(
        self,
        model: onnx.ModelProto | str | os.PathLike[str],
        providers: Provider | Sequence[Provider] | None = None,
        *,
        optimize: bool | str = True,
        threads: int | None = None,
        log_severity: int = 4,
        size_threshold: int = PROTOBUF_LIMIT,
        allow_tf32: bool = False,
        profile: str | os.PathLike[str] | None = None,
        optimized: str | os.PathLike[str] | None = None,
        plan_memory: bool = True,
        prepack: bool = True,
        rest: bool = False,
        sizes: Mapping[str, int] | None = None,
        capture: bool = False,
    ) -> None:
        ort = _onnxruntime()
        chosen = _providers(providers, allow_tf32=allow_tf32, capture=capture)
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        levels = {True: level.ORT_ENABLE_ALL, False: level.ORT_DISABLE_ALL, "basic": level.ORT_ENABLE_BASIC}
        options.graph_optimization_level = levels[optimize]
        options.log_severity_level = log_severity
        options.enable_mem_pattern = plan_memory
        if rest:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for symbol, size in (sizes or {}).items():
            options.add_free_dimension_override_by_name(symbol, size)
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(Path(profile) / secrets.token_hex(4))
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
            data = f"{Path(optimized).name}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        names = [name for name, _ in chosen]
        if CUDA in names:
            _load_cuda(ort)
        with _loadable(model, size_threshold) as source:
            try:
                # without fallback: onnxruntime would print to stdout and go on with other providers
                self._session: onnxruntime.InferenceSession = ort.InferenceSession(
                    source, options, providers=chosen, enable_fallback=0
                )
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise _session_error(error, model) from error
        self.providers: list[str] = self._session.get_providers()
        missing = [name for name in names if name not in self.providers]
        if missing and providers is not None:
            raise RuntimeMissingError(f"{', '.join(missing)} was asked for and could not be started", hint=_CUDA_HINT)
        if missing:
            warnings.warn(f"{', '.join(missing)} could not be started, running on the CPU: {_CUDA_HINT}", stacklevel=2)
        self.inputs: dict[str, Port] = _ports(self._session.get_inputs())
        self.optional: dict[str, Port] = _ports(self._session.get_overridable_initializers())
        self.outputs: dict[str, Port] = _ports(self._session.get_outputs())

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """{output: array} in the order of `outputs` (None: all); raises InputError for feeds that do not fit."""
        wanted = self.check(feeds, outputs)
        if not wanted:
            return {}
        if not all(isinstance(value, np.ndarray) for value in feeds.values()):
            return {name: value.numpy() for name, value in self.run_ortvalues(feeds, wanted).items()}
        try:
            return dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:
            raise self._run_error(error, feeds) from error

    def run_ortvalues(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, onnxruntime.OrtValue]:
        """Like `run`, results left on the device as OrtValues (DLPack); feeds may be OrtValues and DeviceArrays too."""
        wanted = self.check(feeds, outputs)
        device, number = self.device
        binding = self._session.io_binding()
        arrays = {name: np.ascontiguousarray(v) for name, v in feeds.items() if isinstance(v, np.ndarray)}  # kept alive
        try:
            for name, value in feeds.items():
                if name in arrays:
                    binding.bind_cpu_input(name, arrays[name])
                else:
                    binding.bind_ortvalue_input(name, value.value if isinstance(value, DeviceArray) else value)
            for name in wanted:
                binding.bind_output(name, device, number)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return dict(zip(wanted, binding.get_outputs(), strict=True))
        except Exception as error:
            raise self._run_error(error, feeds) from error

    def bound(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """A run that reads and writes these OrtValues, again and again."""
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as error:
                raise self._run_error(error, {}) from error

        return run

    def check(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None) -> list[str]:
        """The outputs to compute, after refusing names that the model does not have."""
        known = {**self.inputs, **self.optional}
        if unknown := [name for name in feeds if name not in known]:
            raise InputError(f"the model has no input {unknown[0]!r}, expected {', '.join(known)}")
        if missing := [name for name in self.inputs if name not in feeds]:
            raise InputError(f"no value for the model's input {missing[0]!r}")
        if unknown := [name for name in outputs or () if name not in self.outputs]:
            raise InputError(f"the model has no output {unknown[0]!r}, expected {', '.join(self.outputs)}")
        return list(dict.fromkeys(self.outputs if outputs is None else outputs))

    @property
    def device(self) -> tuple[str, int]:
        """Where results are left: ("cuda", number) or ("cpu", 0)."""
        for name in (CUDA, TENSORRT):
            if name in self.providers:
                return "cuda", int(self._session.get_provider_options()[name].get("device_id", 0))
        return "cpu", 0

    def end_profile(self) -> Path:
        """Stop profiling; the file that onnxruntime wrote."""
        return Path(self._session.end_profiling())

    def _run_error(self, error: Exception, feeds: Mapping[str, Any]) -> OnnxcrpError:
        """What onnxruntime says while running, in one line; inputs that do not fit are told by name."""
        ports = {**self.inputs, **self.optional}
        for name, value in feeds.items():
            port, dtype = ports[name], getattr(value, "dtype", None)
            if not isinstance(value, np.ndarray):
                continue
            if port.dtype is not None and dtype != port.dtype:
                return InputError(f"input {name!r} is {dtype}, expected {port.dtype}")
            fits = len(value.shape) == len(port.shape) and all(
                not isinstance(want, int) or want == have for have, want in zip(value.shape, port.shape, strict=True)
            )
            if port.shape and not fits:
                return InputError(f"input {name!r} has shape {list(value.shape)}, expected {list(port.shape)}")
        message = _one_line(error)
        memory = "allocat" in message.lower()
        hint = "lower memory_limit" if memory else None
        if "captur" in str(error):
            hint = "CUDA cannot record this model: leave cuda_graph out"
        return OnnxcrpError(f"onnxruntime failed: {message}", hint=hint)


_CUDA_HINT = 'pip install "onnxcrp[gpu]" brings the CUDA and cuDNN libraries; providers="cpu" asks for the CPU'


def _ports(arguments: Iterable[Any]) -> dict[str, Port]:
    """NodeArgs of onnxruntime by name."""
    return {arg.name: Port(arg.name, tuple(arg.shape), dtype_of(arg.type)) for arg in arguments}


def dtype_of(text: str) -> np.dtype | None:
    """'tensor(float)' -> float32; None for what is no tensor."""
    import onnx

    if not text.startswith("tensor("):
        return None
    kind = text.removeprefix("tensor(").removesuffix(")").upper()
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind)))
    except (ValueError, KeyError):
        return None


def _load_cuda(ort: Any) -> None:
    """Load the CUDA libraries that the [gpu] extra installed; what they print is no data and must not reach stdout."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


@contextlib.contextmanager
def _loadable(model: onnx.ModelProto | str | os.PathLike[str], size_threshold: int) -> Iterator[str | bytes]:
    """What InferenceSession takes: a path, or bytes; large models through a directory that is gone afterwards."""
    if isinstance(model, str | os.PathLike):
        if not Path(model).is_file():
            raise ModelError(f"no model file at {os.fspath(model)}")
        yield os.fspath(model)
        return
    serialized = _serialize(model, size_threshold)
    if serialized is not None:
        yield serialized
        return
    # onnxruntime maps or copies the data while it builds the session; where a mapped file cannot be removed, it is left
    with tempfile.TemporaryDirectory(prefix="onnxcrp-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save(model, path, size_threshold=size_threshold)
        yield str(path)


def _session_error(error: Exception, model: Any) -> OnnxcrpError:
    """Why onnxruntime refuses a model."""
    message, kind = _one_line(error), type(error).__name__
    hint = None
    if "opset" in message.lower() or "ir_version" in message.lower() or "ir version" in message.lower():
        hint = "the model is newer than the installed onnxruntime; upgrade onnxruntime or export at an older opset"
    elif kind in ("NotImplemented", "InvalidGraph") or "is not a registered function/op" in message:
        hint = 'an operator or type is not supported by this provider; try providers="cpu" or a newer onnxruntime'
    elif "graph capture" in message:
        hint = "CUDA records no model with nodes on the CPU, which `onnxcrp bench` names: leave cuda_graph out"
    elif "external" in message.lower():
        hint = "the external data file must lie beside the .onnx file under the name it was saved with"
    elif kind == "InvalidProtobuf":
        hint = "the file is not an ONNX model, or it is cut off"
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else model.graph.name or "the model"
    return ModelError(f"onnxruntime cannot load {name}: {message}", hint=hint)


def _one_line(error: Exception) -> str:
    """The first line of onnxruntime's message without its number, file and C++ signature."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = lines[0].split(" : ", 3)[-1]
    return re.sub(r"^\S+\.(cc|h):\d+ .*?\)( const)? (?=[A-Z])", "", message)[:400]


# --------------------------------------------------------------------------------------------------------- large models


def save(model: onnx.ModelProto, path: str | os.PathLike[str], *, size_threshold: int = PROTOBUF_LIMIT) -> None:
    """Write `model` to `path`; above `size_threshold` bytes the weights go to `<name>.data` beside it.

    All is written under temporary names in the same directory and renamed, so an interrupted or failed write leaves
    what was there before. `model` is not changed. Raises OnnxcrpError when the disk refuses.
    """
    path = Path(path)
    mark = f".{secrets.token_hex(4)}.tmp"
    temporary, data = path.with_name(f".{path.name}{mark}"), path.with_name(f"{path.name}.data")
    temporary_data = path.with_name(f".{data.name}{mark}")
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory", str(path))
        serialized = _serialize(model, size_threshold)
        if serialized is None:
            with temporary_data.open("xb") as file:
                serialized = _serialize(_externalize(model, file, data.name), None)
                _flush(file)
        with temporary.open("xb") as file:
            file.write(serialized)  # type: ignore[arg-type]
            _flush(file)
        if temporary_data.exists() and temporary_data.stat().st_size:
            temporary_data.replace(data)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OnnxcrpError(f"cannot write {path}: {reason}", hint="nothing was changed there") from error
    finally:
        for leftover in (temporary, temporary_data):
            with contextlib.suppress(OSError):
                leftover.unlink()


def _flush(file: IO[bytes]) -> None:
    """To the disk itself: else a full disk may show only after the rename."""
    file.flush()
    os.fsync(file.fileno())


def _serialize(model: onnx.ModelProto, size_threshold: int | None) -> bytes | None:
    """The model's bytes, or None when it is larger than `size_threshold`; with None as threshold, an error instead."""
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    if size_threshold is not None and sum(len(tensor.raw_data) for tensor in model.graph.initializer) > size_threshold:
        return None
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        if size_threshold is None:
            raise ModelError(
                "the model is larger than 2 GB even without its initializers",
                hint="large tensors in attributes of Constant, If or Loop cannot be written as external data",
            ) from error
        return None


def _externalize(model: onnx.ModelProto, file: IO[bytes], location: str) -> onnx.ModelProto:
    """A copy of `model` whose large initializers refer to `location`; their data is appended to `file`.

    onnx.save_model would strip the caller's model of its weights, and a protobuf copy of more than 2 GB fails.
    """
    import onnx

    slim = skeleton(model)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"the data of initializer {tensor.name!r} lies in another file and was not loaded",
                hint="give the path of the .onnx file, or load it with onnx.load(path)",
            )
        if not tensor.raw_data and tensor.data_type != onnx.TensorProto.STRING and int(np.prod(tensor.dims)) >= SMALL:
            tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)  # to raw_data
        if len(tensor.raw_data) < SMALL:
            slim.graph.initializer.add().CopyFrom(tensor)
            continue
        file.write(bytes(-file.tell() % ALIGNMENT))
        entry = slim.graph.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=onnx.TensorProto.EXTERNAL
        )
        where = {"location": location, "offset": str(file.tell()), "length": str(len(tensor.raw_data))}
        for key, value in where.items():
            entry.external_data.add(key=key, value=value)
        file.write(tensor.raw_data)
    return slim


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of a model: key -> value."""
    return {entry.key: entry.value for entry in model.metadata_props}


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without its initializers, which may be more than a protobuf message can hold."""
    import onnx

    slim = onnx.ModelProto()
    _copy_fields(model, slim, but="graph")
    _copy_fields(model.graph, slim.graph, but="initializer")
    return slim


def _copy_fields(source: Any, target: Any, *, but: str) -> None:
    """Every field of a protobuf message except one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, str | bytes | int | float):
            setattr(target, field.name, value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)
