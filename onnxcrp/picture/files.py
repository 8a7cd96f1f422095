"""Picture files, written under a temporary name."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from PIL import Image

from onnxcrp.errors import InputError, OnnxcrpError


def writable(path: str | os.PathLike[str]) -> Path:
    """The path, if its suffix is one that Pillow can write; InputError else."""
    path = Path(path)
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(
            f"{path}: cannot write a picture with the ending {path.suffix or '(none)'}",
            hint="use .png, .jpg, .webp or .pdf",
        )
    return path


def save(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture under a temporary name, then rename it; raises InputError or OnnxcrpError."""
    path = writable(path)
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        image.save(part, dpi=(144, 144), quality=95)
        part.replace(path)
    except (OSError, ValueError, KeyError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise OnnxcrpError(f"cannot write {path}: {reason}", hint="does the folder exist?") from None
    return path
