"""Datasets: what an index is built over, as numbered samples with names, labels and a hash of the listing.

Folders of pictures or arrays, .npz and .npy files, WebDataset tars, the same behind any URL that fsspec opens, and
arrays in memory. Nothing is decoded before it is asked for, and every sample can be read from any thread.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from onnxcrp.data import ARRAYS, PICTURES, Sample, read_inputs
from onnxcrp.errors import InputError, OnnxcrpError
from onnxcrp.preprocessing import Preprocessing, Shape, fits, show

LABELS_FILE = "labels.csv"
SIGNALS = (".csv", ".tsv")
LABEL_KEYS = ("y", "labels", "label", "targets", "target", "classes")  # of an .npz file
PROBES = 64  # rows of an array that its hash looks at
NO_LABEL = -1


@dataclass(frozen=True)
class Port:
    """The model's input as a reader of samples needs it."""

    preprocessing: Preprocessing
    shape: Shape
    dtype: np.dtype
    name: str


class Samples:
    """One dataset: `len`, names and labels of its samples, and the samples themselves, by number."""

    kind = ""

    def __init__(self, name: str, source: str | None, labels: np.ndarray | None) -> None:
        self.name = name
        self.source = source  # as it can be opened again; None for arrays in memory
        self.labels = None if labels is None else np.asarray(labels, np.int64)  # [n], NO_LABEL where there is none
        self.left_out: list[str] = []  # files beside the samples that hold none

    def __len__(self) -> int:
        raise NotImplementedError

    def title(self, number: int) -> str:
        """The sample's name: a path below the dataset's own, or `[12]`."""
        raise NotImplementedError

    def load(self, number: int, port: Port) -> Sample:
        """The sample as the model takes it; raises InputError naming it where it cannot be read."""
        raise NotImplementedError

    def _fingerprint(self) -> Iterator[str]:
        """What the listing consists of, in order."""
        raise NotImplementedError

    @cached_property
    def sha256(self) -> str:
        """Hash of the listing: names, sizes, labels; of arrays also some rows."""
        digest = hashlib.sha256(self.kind.encode())
        for entry in self._fingerprint():
            digest.update(entry.encode("utf-8", "surrogateescape") + b"\0")
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    @property
    def has_pictures(self) -> bool:
        """Whether samples need the preprocessing of pictures."""
        return False


# -------------------------------------------------------------------------------------------------------------- arrays


class Arrays(Samples):
    """Rows of an array [n, ...], memory-mapped where it comes from a file; taken as already preprocessed."""

    kind = "array"

    def __init__(self, name: str, source: str | None, x: np.ndarray, labels: np.ndarray | None) -> None:
        super().__init__(name, source, labels)
        self.x = x
        if labels is not None and len(labels) != len(x):
            raise InputError(
                f"{name}: {len(x)} samples and {len(labels)} labels", hint="one label for each row of the array"
            )

    def __len__(self) -> int:
        return len(self.x)

    def title(self, number: int) -> str:  # noqa: D102
        return f"[{number}]"

    def load(self, number: int, port: Port) -> Sample:  # noqa: D102
        where = f"{self.name}{self.title(number)}"
        return Sample(where, _as_input(where, self.x[number : number + 1], port), None, self.source or where)

    def _fingerprint(self) -> Iterator[str]:
        yield f"{self.x.dtype} {self.x.shape}"
        for row in np.unique(np.linspace(0, len(self.x) - 1, PROBES).astype(int)) if len(self.x) else ():
            yield hashlib.sha256(np.ascontiguousarray(self.x[row]).tobytes()).hexdigest()


def _as_input(where: str, x: np.ndarray, port: Port) -> np.ndarray:
    """One sample [1, ...] in the model's type and shape; raises InputError for what would be misread."""
    from onnxcrp.data import _cast

    if not fits(x.shape[1:], port.shape[1:]):
        raise InputError(
            f"{where}: one sample has shape {list(x.shape[1:])}, expected {show(port.shape[1:])}",
            hint="arrays are taken as already preprocessed, [B, ...]",
        )
    return _cast(where, x, port.dtype)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What a file that cannot be read raises, as one clear error."""
    from onnxcrp.data import _unreadable

    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", hint="check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, expected a file", hint="check the path") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise _unreadable(Path(path), error) from None


def _open_array(name: str, source: str, labels: np.ndarray | None, port: Port) -> Arrays:
    """Samples of PATH.npy, PATH.npz or PATH.npz:KEY, local or behind a URL."""
    path, key = source, None
    if match := re.fullmatch(r"(.+\.npz):([^/]+)", source, re.IGNORECASE):
        path, key = match.groups()
    with _reading(path):
        content: Any = io.BytesIO(Files(path).read("")) if "://" in path else path
        if path.lower().endswith(".npy"):
            return Arrays(name, source, np.load(content, None if "://" in path else "r", allow_pickle=False), labels)
        with np.load(content, allow_pickle=False) as archive:
            shapes = {entry: _member(path, archive, entry, only_shape=True) for entry in archive}
            key = key or _sample_key(path, shapes, port)
            if key not in shapes:
                raise InputError(f"{path}: holds no array {key!r}", hint=f"it holds {', '.join(shapes)}")
            x = _member(path, archive, key)
            if labels is None:
                usual = [k for k in LABEL_KEYS if k in shapes and shapes[k] == (len(x),) and k != key]
                labels = archive[usual[0]] if usual else None
        return Arrays(name, source, x, labels)


def _member(path: str, archive: Any, key: str, *, only_shape: bool = False) -> Any:
    """An array of an .npz file, mapped if it is stored without compression; or its shape alone."""
    entry = archive.zip.getinfo(key if key in archive.zip.namelist() else f"{key}.npy")
    with archive.zip.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        header = file.tell()
    if only_shape:
        return shape
    if entry.compress_type != zipfile.ZIP_STORED or "://" in path or dtype.hasobject:
        return archive[key]
    with open(path, "rb") as raw:
        raw.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
    offset = entry.header_offset + 30 + name + extra + header
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _sample_key(path: str, shapes: dict[str, tuple[int, ...]], port: Port) -> str:
    """Which array of an .npz file holds the samples: the input's name, the only one that fits, or a usual name."""
    fitting = [key for key, shape in shapes.items() if len(shape) > 1 and fits(shape[1:], port.shape[1:])]
    usual = [key for key in (port.name, "x", "X", "inputs", "images", "data", "arr_0") if key in fitting]
    if usual or len(fitting) == 1:
        return usual[0] if usual else fitting[0]
    raise InputError(
        f"{path}: holds {', '.join(f'{k} {list(s)}' for k, s in shapes.items())}; which are the samples, "
        f"{show(('n', *port.shape[1:]))}?",
        hint=f"name them: {path}:KEY; arrays are taken as already preprocessed",
    )


# --------------------------------------------------------------------------------------------------------------- files


class Files:
    """The files below a folder, on this machine or behind a URL that fsspec opens."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.fs: Any = None
        if "://" in root:
            try:
                import fsspec
            except ImportError:
                raise OnnxcrpError(
                    f"{root}: URLs need fsspec", hint='pip install "onnxcrp[index]", and what the protocol needs (s3fs)'
                ) from None
            try:
                self.fs, self.path = fsspec.core.url_to_fs(root)
            except (ValueError, ImportError) as error:
                raise InputError(f"{root}: {error}", hint="install what fsspec needs for this protocol") from None

    def _full(self, name: str) -> str:
        if self.fs is None:
            return os.path.join(self.root, name) if name else self.root
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def is_folder(self) -> bool:
        """Whether the root is a folder."""
        return os.path.isdir(self.root) if self.fs is None else bool(self.fs.isdir(self.path))

    def sizes(self) -> dict[str, int]:
        """{path below the root with /: bytes} of all files, sorted; hidden ones left out."""
        found: dict[str, int] = {}
        if self.fs is None:
            for folder, folders, names in os.walk(self.root, followlinks=True):
                folders[:] = [f for f in folders if not f.startswith(".")]
                for name in names:
                    path = os.path.join(folder, name)
                    relative = os.path.relpath(path, self.root).replace(os.sep, "/")
                    found[relative] = os.stat(path).st_size if os.path.exists(path) else 0
        else:
            for path, about in self.fs.find(self.path, detail=True).items():
                found[path[len(self.path) :].strip("/")] = int(about.get("size") or 0)
        return {name: found[name] for name in sorted(found) if not any(p.startswith(".") for p in name.split("/"))}

    def subfolders(self) -> list[str]:
        """Names of the folders in the root, sorted; hidden ones left out."""
        if self.fs is None:
            found = [entry.name for entry in os.scandir(self.root) if entry.is_dir()]
        else:
            found = [e["name"].rstrip("/") for e in self.fs.ls(self.path, detail=True) if e["type"] == "directory"]
        return sorted(name for name in (PurePosixPath(each).name for each in found) if not name.startswith("."))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes of a file, or of a part of it."""
        if self.fs is not None:
            return self.fs.cat_file(self._full(name), start=start, end=stop)
        with open(self._full(name), "rb") as file:
            file.seek(start or 0)
            return file.read() if stop is None else file.read(stop - (start or 0))

    def open(self, name: str) -> Any:
        """A seekable binary file."""
        return open(self._full(name), "rb") if self.fs is None else self.fs.open(self._full(name), "rb")


class Folder(Samples):
    """Files of a folder, one sample each; labels from class subfolders in sorted order, or from a labels.csv."""

    kind = "folder"

    def __init__(
        self, name: str, source: str, files: Files, names: Sequence[str], sizes: Sequence[int], labels: Any
    ) -> None:
        super().__init__(name, source, labels)
        self.files, self.names, self.sizes = files, names, sizes

    def __len__(self) -> int:
        return len(self.names)

    def title(self, number: int) -> str:  # noqa: D102
        return self.names[number]

    def load(self, number: int, port: Port) -> Sample:  # noqa: D102
        name = self.names[number]
        if self.files.fs is None:
            preprocessing = port.preprocessing
            found = list(read_inputs([self.files._full(name)], preprocessing, port.shape, port.dtype))
            if len(found) != 1:
                raise InputError(f"{self.files._full(name)}: holds {len(found)} samples, expected one per file")
            return found[0]
        try:
            content = self.files.read(name)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.source}/{name}: cannot be read ({error})") from None
        return _decode(f"{self.source}/{name}", content, port)

    def _fingerprint(self) -> Iterator[str]:
        return (f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))

    @property
    def has_pictures(self) -> bool:  # noqa: D102
        return any(name.lower().endswith(PICTURES) for name in self.names)


def _decode(where: str, content: bytes, port: Port) -> Sample:
    """A picture or a .npy file in memory -> a sample; raises InputError naming it."""
    from PIL import Image

    try:
        if where.lower().endswith(".npy"):
            array = np.load(io.BytesIO(content), allow_pickle=False)
            array = array[None] if array.ndim == len(port.shape) - 1 else array
            return Sample(where, _as_input(where, array, port), None, where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: what cannot be read still raises
            with Image.open(io.BytesIO(content)) as picture:
                x, display = port.preprocessing.apply(picture)
    except InputError as error:
        raise InputError(f"{where}: {error.message}".replace(f"{where}: {where}", where), hint=error.hint) from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: the sample cannot be read ({error})", hint="is the file complete?") from None
    return Sample(where, _as_input(where, x, port), display, where)


def _open_folder(name: str, source: str, labels_from: str | None, port: Port) -> Samples:
    files = Files(source)
    sizes = files.sizes()
    tars = [n for n in sizes if n.lower().endswith(".tar")]
    endings = (*PICTURES, ".npy", *(SIGNALS if len(port.shape) != 4 else ()))
    names = [n for n in sizes if n.lower().endswith(endings) and PurePosixPath(n).name != LABELS_FILE]
    if tars and not names:
        found: Samples = Tars(name, source, files, tars)
        found.left_out = sorted(sizes.keys() - set(tars))
        return found
    if labels_from is not None or LABELS_FILE in sizes:
        classes = _read_table(labels_from or f"{source.rstrip('/')}/{LABELS_FILE}")
        names = sorted(classes)
        return Folder(name, source, files, names, [sizes.get(n, -1) for n in names], [classes[n] for n in names])
    if not names:
        raise InputError(
            f"{source}: the folder holds no pictures, arrays or tars",
            hint="pictures are .png, .jpg ..., arrays .npy files; an .npz is named itself"
            if len(port.shape) == 4
            else "1-D signals come as .npy, .npz or .csv files",
        )
    labels = None
    if all("/" in n for n in names):
        folders, filled = files.subfolders(), {n.split("/")[0] for n in names}
        if empty := [folder for folder in folders if folder not in filled]:
            raise InputError(
                f"{source}: {empty[0]} holds no samples, and subfolders are numbered as classes in sorted order",
                hint=f"move it away, or say the classes in a {LABELS_FILE}",
            )
        number = {folder: at for at, folder in enumerate(folders)}
        labels = [number[n.split("/")[0]] for n in names]
    found = Folder(name, source, files, names, [sizes[n] for n in names], labels)
    found.left_out = sorted(sizes.keys() - set(names))
    return found


def _read_table(where: str) -> dict[str, int]:
    """labels.csv -> {file: class index}; raises InputError for a missing file, missing columns and bad numbers."""
    with _reading(where):
        content = Files(where).read("")
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace")))
    if not {"file", "class_index"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"{where}: has columns {', '.join(rows.fieldnames or ()) or 'none'}", hint="expected file, class_index"
        )
    found: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        file = str(row["file"]).strip().replace(os.sep, "/")
        try:
            label = int(row["class_index"])
        except (TypeError, ValueError):
            raise InputError(
                f"{where}: line {line}: class_index is {row['class_index']!r}, expected a number",
                hint="classes are numbers, counted from 0 (or see label_offset)",
            ) from None
        if found.setdefault(file, label) != label:
            raise InputError(
                f"{where}: line {line}: {file} is of class {found[file]} as well as {label}",
                hint="one class for each file",
            )
    if not found:
        raise InputError(f"{where}: lists no files", hint="a line for each, such as a/1.png,0")
    return found


# ---------------------------------------------------------------------------------------------------------------- tars


@dataclass
class _Member:
    tar: str
    key: str
    ending: str
    start: int
    size: int


class Tars(Samples):
    """WebDataset tars, uncompressed: files that share a name up to the first dot are one sample.

    The sample is a picture or .npy; its label comes from .cls, .cls.txt, or .json with `label`, `class_index` or `cls`.
    """

    kind = "webdataset"

    def __init__(self, name: str, source: str, files: Files, tars: Sequence[str]) -> None:
        self.files = files
        self.members: list[_Member] = []
        labels: list[int] = []
        for tar in tars:
            for label, member in self._scan(tar):
                self.members.append(member)
                labels.append(label)
        if not self.members:
            raise InputError(
                f"{source}: holds no pictures and no .npy files", hint="a sample is KEY.png, KEY.jpg ... or KEY.npy"
            )
        super().__init__(name, source, np.array(labels) if any(n != NO_LABEL for n in labels) else None)

    def _scan(self, tar: str) -> Iterator[tuple[int, _Member]]:
        """(label, sample) of one tar in its order; only headers and labels are read."""
        where = self.files._full(tar)
        members: dict[str, _Member] = {}
        labels: dict[str, int] = {}
        try:
            with self.files.open(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                end = file.seek(0, os.SEEK_END)
                for entry in archive:
                    if entry.offset_data + entry.size > end or end % tarfile.BLOCKSIZE:
                        raise InputError(f"{where}: cut off at byte {end}", hint="copy it once more")
                    folder, _, last = entry.name.rpartition("/")
                    stem, dot, ending = last.partition(".")
                    if not entry.isfile() or not dot or not stem:
                        continue
                    key, ending = f"{folder}/{stem}" if folder else stem, f".{ending.lower()}"
                    if ending.endswith((*PICTURES, ".npy")):
                        members.setdefault(key, _Member(tar, key, ending, entry.offset_data, entry.size))
                    elif ending in (".cls", ".cls.txt", ".json"):
                        content = archive.extractfile(entry)
                        label = _label(content.read() if content else b"", ending)
                        if label is not None:
                            labels[key] = label
        except FileNotFoundError:
            raise InputError(f"{where}: no such file", hint="check the path") from None
        except (tarfile.TarError, OSError) as error:
            raise InputError(
                f"{where}: not an uncompressed tar ({error})",
                hint="is it whole? A .tar.gz must be unpacked first: gunzip FILE",
            ) from None
        for key, member in members.items():
            yield labels.get(key, NO_LABEL), member

    def __len__(self) -> int:
        return len(self.members)

    def title(self, number: int) -> str:  # noqa: D102
        member = self.members[number]
        return f"{member.tar}/{member.key}{member.ending}" if member.tar else f"{member.key}{member.ending}"

    def load(self, number: int, port: Port) -> Sample:  # noqa: D102
        member = self.members[number]
        where = f"{self.source}/{self.title(number)}"
        try:
            content = self.files.read(member.tar, member.start, member.start + member.size)
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: cannot be read ({error})") from None
        return _decode(where, content, port)

    def _fingerprint(self) -> Iterator[str]:
        return (f"{m.tar} {m.key}{m.ending} {m.start} {m.size}" for m in self.members)

    @property
    def has_pictures(self) -> bool:  # noqa: D102
        return any(member.ending.endswith(PICTURES) for member in self.members)


def _label(content: bytes, ending: str) -> int | None:
    """The class of a .cls or .json file; None if it names none."""
    try:
        if ending != ".json":
            return int(content.decode().strip())
        about = json.loads(content)
        found = next((about[k] for k in ("label", "class_index", "cls") if k in about), None)
        return None if found is None else int(found)
    except (ValueError, TypeError, AttributeError):
        return None


def _braces(source: str) -> list[str]:
    """`a-{000..012}.tar` -> its paths; anything else as it is."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if match is None:
        return [source]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [path for n in numbers for path in _braces(source.replace(match[0], str(n).zfill(len(first)), 1))]


# ------------------------------------------------------------------------------------------------------------- opening


@dataclass
class Data:
    """Several datasets, their samples numbered through: `offsets[d] + number within d`."""

    datasets: list[Samples]
    port: Port
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = np.cumsum([0, *map(len, self.datasets)]).tolist()

    def __len__(self) -> int:
        return self.offsets[-1]

    def locate(self, sample: int) -> tuple[Samples, int]:
        """The dataset that holds a sample, and its number there; raises InputError."""
        if not 0 <= sample < len(self):
            raise InputError(f"there is no sample {sample}", hint=f"there are {len(self)}")
        at = int(np.searchsorted(self.offsets, sample, "right")) - 1
        return self.datasets[at], sample - self.offsets[at]

    def load(self, sample: int) -> Sample:
        """One sample by its number; raises InputError naming it where it cannot be read."""
        samples, number = self.locate(sample)
        try:
            return samples.load(number, self.port)
        except InputError:
            raise
        except Exception as error:  # whatever a decoder or a file system throws is this sample's fault, not the build's
            raise InputError(f"{samples.name}/{samples.title(number)}: cannot be read ({error})") from error

    def label(self, sample: int) -> int:
        """The class of a sample; NO_LABEL where it has none."""
        samples, number = self.locate(sample)
        return NO_LABEL if samples.labels is None else int(samples.labels[number])

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(each.labels is not None and bool((each.labels != NO_LABEL).all()) for each in self.datasets)


def open_data(data: Any, port: Port, *, labels: Any = None, label_offset: int = 0) -> Data:
    """The datasets named by `data`: a path or URL, `name=path`, an array [n, ...], a pair (x, y), or several of them.

    A list is several datasets. `labels` (of a single dataset): an array, or a labels.csv (columns file, class_index).
    `label_offset` is added to every label. Raises InputError for what cannot be opened.
    """
    several = list(data) if isinstance(data, list) else [data]
    if not several:
        raise InputError("there is no data")
    if labels is not None and len(several) > 1:
        raise InputError("labels belong to a single dataset, several were given", hint="put a labels.csv into each")
    opened = []
    for each in several:
        samples = each if isinstance(each, Samples) else _open(each, port, labels)
        if samples.labels is not None and label_offset:
            known = samples.labels != NO_LABEL
            if (low := known & (samples.labels + label_offset < 0)).any():  # -1 would pass for no label
                first = int(np.flatnonzero(low)[0])
                raise InputError(
                    f"{samples.name}: the label of {samples.title(first)} is {samples.labels[first]}, "
                    f"label_offset {label_offset} makes it negative",
                    hint="label_offset is added to every label",
                )
            samples.labels = np.where(known, samples.labels + label_offset, NO_LABEL)
        if not len(samples):
            raise InputError(f"{samples.name}: holds no samples", hint="expected an array [n, ...] with n > 0")
        opened.append(samples)
    taken: set[str] = set()
    for samples in opened:
        samples.name = unique_name(samples.name, taken)
        taken.add(samples.name)
    return Data(opened, port)


def unique_name(name: str, taken: set[str]) -> str:
    """`val`, or `val~2` if that is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}~{number}"
    return found


def _open(each: Any, port: Port, labels: Any) -> Samples:
    if isinstance(each, tuple) and len(each) == 2:
        return Arrays("array", None, np.asarray(each[0]), None if each[1] is None else np.asarray(each[1]))
    if isinstance(each, np.ndarray):
        return Arrays("array", None, each, None if labels is None else np.asarray(labels))
    if not isinstance(each, (str, os.PathLike)):
        raise InputError(f"{type(each).__name__} is no dataset", hint="a path, a URL, an array, or a pair (x, labels)")
    name, source = "", os.fspath(each)
    if not os.path.exists(source) and (match := re.fullmatch(r"([\w.\-]+)=(.+)", source)):
        name, source = match.groups()
    plain = re.sub(r"(\.npz):[^/]+$", r"\1", source, flags=re.IGNORECASE)
    name = name or PurePosixPath(plain.replace(os.sep, "/").rstrip("/")).stem or "data"
    from_file = os.fspath(labels) if isinstance(labels, (str, os.PathLike)) else None
    if plain.lower().endswith(ARRAYS):
        return _open_array(name, source, None if labels is None else _label_array(labels), port)
    if plain.lower().endswith((".tar", ".tar.gz", ".tgz")):
        root, _, _ = source.rpartition("/")
        tars = _braces(source)
        if len(tars) == 1:
            return Tars(name, source, Files(source), [""])
        return Tars(name, source, Files(root or "."), [path[len(root) + 1 :] if root else path for path in tars])
    if not Files(source).is_folder():
        what = "one file is no dataset" if os.path.isfile(source) else "no such dataset"
        raise InputError(f"{source}: {what}", hint="a folder, an .npz or .npy file, .tar files, or a URL")
    return _open_folder(name, source, from_file, port)


def _label_array(labels: Any) -> np.ndarray:
    """Labels of an array: an array, a .npy file, or a CSV whose rows are in the array's order."""
    if not isinstance(labels, (str, os.PathLike)):
        return np.asarray(labels)
    path = os.fspath(labels)
    if path.lower().endswith(".npy"):
        with _reading(path):
            return np.load(path, allow_pickle=False)
    return np.array(list(_read_table(path).values()))


def titles(samples: Samples) -> Callable[[slice], list[str]]:
    """Names of a range of samples, without a list of all of them."""
    return lambda rows: [samples.title(number) for number in range(*rows.indices(len(samples)))]
