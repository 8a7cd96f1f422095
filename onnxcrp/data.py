"""Inputs: pictures, arrays and signals from files -> arrays as the model wants them, and the picture it saw.

Arrays and signals are taken as already preprocessed. Every mistake in a file is an InputError that names the file.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnxcrp.errors import InputError
from onnxcrp.labels import delimiter, read_labels, read_text
from onnxcrp.preprocessing import Preprocessing, Shape, find_beside, fits, for_model, show, static

__all__ = ["Preprocessing", "Sample", "find_beside", "for_model", "load_inputs", "locate", "read_inputs", "read_labels"]

ARRAYS = (".npy", ".npz")
TABLES = (".csv", ".tsv", ".txt")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")  # of a directory


@dataclass(frozen=True)
class Sample:
    """One thing to explain: `x` [1, ...] as the model wants it, `display` uint8 RGB [H, W, 3] as the model saw it."""

    name: str
    x: np.ndarray
    display: np.ndarray | None
    source: str
    others: Mapping[str, np.ndarray] = field(default_factory=dict)  # a model's further inputs, by name
    input: str = ""  # the name of the one that `x` is

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """All inputs by name."""
        return {self.input: self.x, **self.others}


class Place(NamedTuple):
    """Where samples are: PATH, PATH.npz:KEY, and any of them with [3] or [3:8] behind it."""

    path: Path
    key: str | None
    rows: slice | int | None


def locate(text: str | os.PathLike[str]) -> Place:
    """`beats.npz:x[12]` -> its parts. A file that exists under the whole name is taken as it is."""
    name = os.fspath(text)
    if Path(name).exists():
        return Place(Path(name), None, None)
    rows: slice | int | None = None
    if match := re.fullmatch(r"(.+)\[(-?\d*)(:?)(-?\d*)\]", name):
        name, start, colon, stop = match.groups()
        if not colon and not start:
            raise InputError(f"{text}: [] names no sample", hint="[3] is the fourth sample, [3:8] are five")
        rows = slice(int(start) if start else None, int(stop) if stop else None) if colon else int(start)
    key = None
    if not Path(name).exists() and (match := re.fullmatch(r"(.+\.npz):(.+)", name, re.IGNORECASE)):
        name, key = match.groups()
    return Place(Path(name), key, rows)


def load_inputs(
    paths: Iterable[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    shape: Shape,
    dtype: Any,
    *,
    input_name: str = "",
    others: Mapping[str, tuple[Shape, Any]] | None = None,
) -> list[Sample]:
    """All samples of these files in order; see `read_inputs`."""
    return list(read_inputs(paths, preprocessing, shape, dtype, input_name=input_name, others=others))


def read_inputs(
    paths: Iterable[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    shape: Shape,
    dtype: Any,
    *,
    input_name: str = "",
    others: Mapping[str, tuple[Shape, Any]] | None = None,
) -> Iterator[Sample]:
    """Samples of pictures, .npy, .npz and .csv files one by one, directories sorted by name.

    shape, dtype: the model's input; others: its further inputs {name: (shape, dtype)}, which only an .npz with their
    names as keys can give. Raises InputError naming the file, what was expected and what to do; of one that is not
    there, or a folder without any, before the first is read.
    """
    reader = _Reader(preprocessing, shape, np.dtype(dtype), input_name, others or {})
    for place in places(paths):
        yield from reader.read(place)


def places(paths: Iterable[str | os.PathLike[str]]) -> list[Place]:
    """Every file of these paths, directories sorted by name; raises InputError for what is not there."""
    return [found for path in paths for found in _files(locate(path))]


@dataclass(frozen=True)
class _Reader:
    """What every file of one model needs to know."""

    preprocessing: Preprocessing
    shape: Shape
    dtype: np.dtype
    input_name: str
    others: Mapping[str, tuple[Shape, Any]]

    def read(self, place: Place) -> Iterator[Sample]:
        path, suffix = place.path, place.path.suffix.lower()
        if suffix in ARRAYS:
            wanted = (self.input_name, *self.others)
            if suffix == ".npy" or place.key is not None:
                self._only_input(path)
            if suffix == ".npy":
                arrays = {self.input_name: _load_npy(path)}
            else:
                arrays = _load_npz(path, place.key, wanted, self.shape)
            yield from self._samples(place, arrays)
        elif suffix in TABLES:
            self._only_input(path)
            yield from self._samples(place, {self.input_name: _signals(path, self.shape, self.preprocessing.layout)})
        else:
            self._only_input(path)
            yield self._picture(path)

    def _port(self, name: str) -> tuple[Shape, np.dtype]:
        """Shape and type of an input."""
        shape, dtype = self.others.get(name, (self.shape, self.dtype))
        return shape, np.dtype(dtype)

    def _only_input(self, path: Path) -> None:
        if self.others:
            names = ", ".join((self.input_name, *self.others))
            raise InputError(
                f"{path}: the model has {1 + len(self.others)} inputs ({names})",
                hint="pass an .npz that holds one array per input, named as the input",
            )

    def _picture(self, path: Path) -> Sample:
        if len(self.shape) == 3:
            raise InputError(
                f"{path}: the model takes 1-D signals {show(self.shape)}", hint="pass a .npy, .npz or .csv file"
            )
        if len(self.shape) != 4:
            raise InputError(
                f"{path}: the model takes arrays {show(self.shape)}, not pictures", hint="pass a .npy or .npz file"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures and odd metadata: what cannot be read still raises
                with Image.open(path) as picture:
                    x, display = self.preprocessing.apply(picture)
        except UnidentifiedImageError:
            raise InputError(
                f"{path}: not a picture that Pillow can read",
                hint="pictures, .npy, .npz and .csv files can be explained",
            ) from None
        except InputError as error:
            raise InputError(f"{path}: {error.message}", hint=error.hint) from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: the picture cannot be read ({error})", hint="is the file complete?") from None
        self._check_shape(path, x.shape, hint="correct resize and crop in the preprocessing file")
        return Sample(path.stem, x, display, os.fspath(path), input=self.input_name)

    def _check_shape(self, path: Path, shape: tuple[int, ...], *, hint: str) -> None:
        """`shape` is that of one sample, [1, ...]."""
        if not fits(shape[1:], self.shape[1:]):
            raise InputError(
                f"{path}: one sample has shape {list(shape[1:])}, expected {show(self.shape[1:])}", hint=hint
            )

    def _samples(self, place: Place, arrays: Mapping[str, np.ndarray]) -> Iterator[Sample]:
        path = place.path
        batches = {
            name: _batched(path if len(arrays) == 1 else f"{path}:{name}", array, self._port(name)[0])
            for name, array in arrays.items()
        }
        counts = {len(batch) for batch in batches.values()}
        if len(counts) > 1:
            sizes = ", ".join(f"{name} {len(batch)}" for name, batch in batches.items())
            raise InputError(f"{path}: the arrays differ in the number of samples ({sizes})")
        total = counts.pop()
        if total == 0:
            raise InputError(f"{path}: holds no samples")
        for row in _rows(path, place.rows, total):
            name = path.stem if total == 1 else f"{path.stem}[{row}]"
            where = os.fspath(path) if total == 1 else f"{path}[{row}]"
            feeds = {key: _cast(where, batch[row : row + 1], self._port(key)[1]) for key, batch in batches.items()}
            x = feeds.pop(self.input_name)
            display = self.preprocessing.to_display(x) if x.ndim == 4 else None
            yield Sample(name, x, display, where, feeds, self.input_name)


def _files(place: Place) -> list[Place]:
    path = place.path
    if not path.exists():
        nearest = difflib.get_close_matches(path.name, _siblings(path), n=1, cutoff=0.75)
        raise InputError(
            f"{path}: no such file",
            hint=f"did you mean {path.with_name(nearest[0])}?" if nearest else "check the path",
        )
    if not path.is_dir():
        return [place]
    if found := sorted(p for p in path.iterdir() if p.suffix.lower() in (*PICTURES, *ARRAYS)):
        return [Place(file, None, None) for file in found]
    raise InputError(
        f"{path}: the folder holds no pictures and no .npy or .npz files", hint="name files, or another folder"
    )


def _siblings(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir()]
    except OSError:
        return []


def _rows(path: Path, rows: slice | int | None, total: int) -> range:
    """The samples asked for, of `total`."""
    if isinstance(rows, int):
        rows = slice(rows, None if rows == -1 else rows + 1) if -total <= rows < total else slice(0, 0)
    chosen = range(total)[rows or slice(None)]
    if not chosen:
        raise InputError(f"{path}: there is no such sample", hint=f"it holds {total}; [0] is the first")
    return chosen


# -------------------------------------------------------------------------------------------------- arrays and signals


def _load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped and not read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, error) from None


def _load_npz(path: Path, key: str | None, wanted: Sequence[str], shape: Shape) -> dict[str, np.ndarray]:
    """{input: array} of a .npz file: the `key` asked for, else one array per model input, else the one that fits."""
    first = wanted[0]
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.keys())
            if key is not None:
                if key not in keys:
                    raise InputError(f"{path}: holds no array {key!r}", hint=f"it holds {', '.join(keys) or 'nothing'}")
                return {first: archive[key]}
            if all(name in keys for name in wanted):
                return {name: archive[name] for name in wanted}
            if len(wanted) > 1:
                missing = ", ".join(name for name in wanted if name not in keys)
                raise InputError(
                    f"{path}: lacks arrays for the model's inputs {missing}", hint=f"it holds {', '.join(keys)}"
                )
            if len(keys) == 1:
                return {first: archive[keys[0]]}
            shapes = {name: _header(archive, name) for name in keys}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise _unreadable(path, error) from None
    fitting = [name for name in keys if _batch_shape(shapes[name], shape) is not None]
    usual = [name for name in ("x", "X", "inputs", "images", "data", "arr_0") if name in fitting]
    if len(fitting) == 1 or usual:
        return _load_npz(path, fitting[0] if len(fitting) == 1 else usual[0], wanted, shape)
    holds = ", ".join(f"{name} {list(shapes[name])}" for name in keys) or "nothing"
    if not fitting:
        raise InputError(
            f"{path}: no array has shape {show(('B', *shape[1:]))}; it holds {holds}",
            hint="arrays are taken as already preprocessed",
        )
    raise InputError(f"{path}: holds {holds}; which is the input?", hint=f"name it: {path}:{fitting[0]}")


def _header(archive: Any, name: str) -> tuple[int, ...]:
    """The shape of one array of an .npz archive, read without the array."""
    with archive.zip.open(name if name in archive.zip.namelist() else f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)[0]


def _unreadable(path: Path, error: Exception) -> InputError:
    if "Object arrays" in str(error) or "Python objects" in str(error):
        return InputError(
            f"{path}: holds Python objects (dtype object), which are not loaded",
            hint="save a plain number array: numpy.save(path, x.astype(numpy.float32))",
        )
    return InputError(f"{path}: not a readable {path.suffix} file", hint="write it with numpy.save or numpy.savez")


def _batch_shape(shape: tuple[int, ...], declared: Shape) -> tuple[int, ...] | None:
    """The shape [B, ...] in which the model takes an array of this shape, or None; single samples get B = 1."""
    if fits(shape[1:], declared[1:]) and len(shape) == len(declared):
        return shape
    return (1, *shape) if len(shape) == len(declared) - 1 and fits(shape, declared[1:]) else None


def _batched(where: object, array: np.ndarray, declared: Shape) -> np.ndarray:
    """[B, ...] of an array of samples or of a single one."""
    shape = _batch_shape(array.shape, declared)
    if shape is None:
        expected = show(("B", *declared[1:]))
        if len(declared) == 4 and array.ndim in (3, 4) and _swapped(array.shape, declared):
            hint = f"the channels are on the wrong axis: numpy.moveaxis(x, {_swapped(array.shape, declared)})"
        else:
            hint = "arrays are taken as already preprocessed, [B, ...] or a single sample"
        raise InputError(f"{where}: has shape {list(array.shape)}, expected {expected}", hint=hint)
    return array.reshape(shape)


def _swapped(shape: tuple[int, ...], declared: Shape) -> str:
    """The moveaxis arguments that turn NHWC into the declared NCHW or back, empty if neither helps."""
    batch, one = shape[:-3], shape[-3:]
    for source, target, moved in ((-1, -3, (one[2], one[0], one[1])), (-3, -1, (one[1], one[2], one[0]))):
        if _batch_shape((*batch, *moved), declared):
            return f"{source}, {target}"
    return ""


def _cast(where: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """One sample in the model's type, if its values allow it."""
    if x.dtype.kind not in "biuf":
        raise InputError(f"{where}: holds {x.dtype} values, expected {dtype.name}")
    if dtype.kind == "f" and x.dtype.kind != "f":
        hint = f"save x.astype(numpy.{dtype.name}) if the values are right as they are"
        if x.dtype == np.uint8:
            hint = "these look like raw pixels: scale and normalize them as in training, or pass a picture file"
        raise InputError(f"{where}: holds {x.dtype} values, expected {dtype.name}", hint=hint)
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(
            f"{where}: holds {'NaN' if np.isnan(x).any() else 'infinite'} values", hint="fill or drop them"
        )
    if dtype.kind in "iu" and x.size:
        limits = np.iinfo(dtype)
        if x.min() < limits.min or x.max() > limits.max or (x.dtype.kind == "f" and (x != np.rint(x)).any()):
            raise InputError(
                f"{where}: {x.dtype} values {x.min():.4g} .. {x.max():.4g} do not fit the model's {dtype.name} input",
                hint="a quantized model takes pixels 0..255, not normalized values",
            )
    with np.errstate(over="ignore"):
        cast = np.array(x, dtype=dtype, order="C")  # out of the file's map, in native byte order
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        raise InputError(f"{where}: values up to {np.abs(x).max():.4g} overflow the model's {dtype.name} input")
    return cast


TIME = {"", "t", "time", "index", "sample", "seconds", "second", "s", "ms", "id", "n"}
LABEL = {"y", "label", "labels", "class", "target"}


def _signals(path: Path, shape: Shape, layout: str) -> np.ndarray:
    """A CSV file -> [B, C, L] (or the model's [B, L, C], [B, features]).

    One row per sample (length or lead after lead), else one column or one row per lead, whichever fits the model's
    input. A header is skipped; a time column in front and a label column at the end are left out where only that fits.
    """
    if len(shape) not in (2, 3):
        raise InputError(
            f"{path}: a table holds 1-D signals, the model takes {show(shape)}", hint="pass a picture or .npy"
        )
    header, table = _table(path)
    trials = [table]
    if header is not None and table.shape[1] > 1:
        front, back = header[0].strip().lower() in TIME, header[-1].strip().lower() in LABEL
        trials += [table[:, 1:]] * front + [table[:, :-1]] * back + [table[:, 1:-1]] * (front and back)
    for trial in trials:
        if len(shape) == 2:
            if fits(trial.shape[1:], shape[1:]):
                return trial
            continue
        arranged = _arrange(trial, static(shape[layout.index("C")]), static(shape[layout.index("L")]))
        if arranged is not None:
            return arranged if layout == "NCL" else arranged.transpose(0, 2, 1)
    raise InputError(
        f"{path}: a table of {len(table)} rows x {table.shape[1]} columns does not fit the model's input {show(shape)}",
        hint="one row per sample, or one column per lead with one row per time step",
    )


def _arrange(table: np.ndarray, leads: int | None, length: int | None) -> np.ndarray | None:
    """[rows, columns] -> [B, C, L], or None if nothing fits."""
    rows, columns = table.shape
    if length is None:  # the number of leads has to tell
        if leads in (None, 1):
            return table.reshape(1, 1, -1) if 1 in (rows, columns) else table[:, None, :] if leads == 1 else None
        return table.T[None] if columns == leads else table[None] if rows == leads else None
    if rows == length and leads in (None, columns):
        return table.T[None]
    if rows == leads and columns == length:
        return table[None]
    if columns == length and leads in (None, 1):
        return table[:, None, :]
    return table.reshape(rows, leads, length) if leads and columns == leads * length else None


def _table(path: Path) -> tuple[list[str] | None, np.ndarray]:
    """The header, if the first row is one, and the numbers [rows, columns]."""
    text = "\n".join(line for line in read_text(path).splitlines() if line.strip() and not line.startswith("#"))
    separator = delimiter(text)
    if separator == " ":
        rows = [line.split() for line in text.splitlines()]
    else:
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=separator)]
        if rows and all(len(row) > 1 and not row[-1] for row in rows):  # a delimiter at the end of every line
            rows = [row[:-1] for row in rows]
    header = rows.pop(0) if rows and not any(_is_number(cell) for cell in rows[0]) else None
    if not rows:
        raise InputError(f"{path}: holds no numbers", hint="one row per sample, or one column per lead")
    first = 1 + (header is not None)
    for line, row in enumerate(rows, first):
        if len(row) != len(rows[0]):
            raise InputError(f"{path}: row {line} has {len(row)} columns, row {first} has {len(rows[0])}")
    try:
        return header, np.array(rows, np.float64)
    except ValueError:
        line, column, cell = next(
            (i, j, cell) for i, row in enumerate(rows, first) for j, cell in enumerate(row, 1) if not _is_number(cell)
        )
        raise InputError(
            f"{path}: row {line}, column {column} is {cell!r}, expected a number", hint="numbers with a decimal point"
        ) from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
