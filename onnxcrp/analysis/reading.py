"""An index as the commands open it that read one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxcrp.analysis.explanation import ClassNames

if TYPE_CHECKING:
    from onnxcrp.index.query import Index


def open_index(
    path: str | os.PathLike[str], *, class_names: str | os.PathLike[str] | None = None, data: Sequence[str] = ()
) -> Index:
    """The index in a folder, its classes named by a file, its samples read from where they lie now; InputError."""
    from onnxcrp.index import Index

    index = Index.open(path)
    if class_names is not None:
        found = ClassNames.of(index.preprocessing, class_names, index.classes)
        index.name_classes(found.names, found.offset)
    if data:
        index.open_data(list(data))
    return index
