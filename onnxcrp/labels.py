"""Class names, and the small text files they come from: lines, JSON, CSV."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcrp.errors import InputError


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Class names by line: one per line, or a JSON list or {"0": "tench"}, or a CSV of index and name.

    A JSON value may be a list (["n01440764", "tench"]: the last is taken) and the object a Hugging Face config.json
    (`id2label`). Raises InputError.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if isinstance(content, Mapping) and isinstance(content.get("id2label"), Mapping):
            content = content["id2label"]
        if isinstance(content, list) and content:
            return [str(name[-1] if isinstance(name, list) and name else name) for name in content]
        if isinstance(content, Mapping) and content:
            return named(path, content)
        raise InputError(f"{path}: expected a list of class names or an object {{index: name}}")
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter(text)) if any(row)]
        if rows and not any(_is_whole(cell) for cell in rows[0]):
            rows = rows[1:]
        if not rows:
            raise InputError(f"{path}: holds no class names")
        column = next((i for i, cell in enumerate(rows[0]) if _is_whole(cell)), None)
        if column is None or len(rows[0]) == 1:
            return [row[-1].strip() for row in rows]
        try:
            return named(path, {row[column]: row[-1 if column < len(row) - 1 else 0] for row in rows})
        except IndexError:
            raise InputError(f"{path}: rows differ in length, expected an index and a name in each") from None
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise InputError(f"{path}: holds no class names", hint="one class per line, the first is class 0")
    return names


def named(path: Path, names: Mapping[Any, Any]) -> list[str]:
    """{index: name} -> list; indices nobody names keep their number."""
    if not names:
        raise InputError(f"{path}: holds no class names", hint="{index: name} for each class")
    try:
        by_index = {int(key): name[-1] if isinstance(name, list) else name for key, name in names.items()}
    except (ValueError, IndexError):
        raise InputError(f"{path}: expected class indices as keys, found {next(iter(names))!r}") from None
    if min(by_index) < 0 or max(by_index) > 10_000_000:
        raise InputError(f"{path}: class indices go from {min(by_index)} to {max(by_index)}")
    return [str(by_index.get(index, index)) for index in range(max(by_index) + 1)]


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"\s*\d+\s*", cell) is not None


def read_text(path: Path) -> str:
    """A text file in UTF-8; InputError otherwise."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", hint="check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; InputError otherwise."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from None


def delimiter(text: str) -> str:
    """The character that separates columns: of tab, semicolon, comma the first that occurs, else blanks."""
    head = text[:10_000]
    return next((character for character in "\t;," if character in head), " ")
