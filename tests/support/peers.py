"""The peers (torchvision, zennit, zennit-crp): `load()` imports them, or says in one line how to install them.

The torchvision wheel of the package index is built for CUDA. Beside a CPU-only torch its extension library does not
load, nothing declares `torchvision::nms` and `torchvision::qnms`, and the import fails while attaching shape functions
to them. Declaring the two signatures first is all the import asks for; detection operators stay unusable, which no
test minds. Where the extension library loads, nothing is declared.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

INSTALL = "pip install torch==2.13.0 tqdm matplotlib scipy && pip install --no-deps -r tests/peers.txt"
MODULES = ("torchvision", "torchvision.models", "zennit", "zennit.core", "zennit.rules", "zennit.canonizers",
           "zennit.composites", "zennit.layer", "zennit.types", "crp", "crp.attribution")  # fmt: skip

_declared = []  # a torch.library.Library takes its declarations back when it is collected


class PeersMissingError(ImportError):
    """A peer cannot be imported; parity then fails, it is never skipped."""


def declare_missing_operators() -> bool:
    """Declare the operators that torchvision's import looks up, if its library cannot do so itself; True if declared.

    Raises PeersMissingError when torch or torchvision is not installed.
    """
    if importlib.util.find_spec("torch") is None or (spec := importlib.util.find_spec("torchvision")) is None:
        raise PeersMissingError(f"parity tests need torch and torchvision; run: {INSTALL}")
    import torch

    try:
        for folder in spec.submodule_search_locations or ():
            for library in Path(folder).glob("_C*.so"):
                torch.ops.load_library(str(library))
                return False
    except OSError:  # built for CUDA, and this torch has none
        pass
    if not _declared:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(operators)
    return True


@functools.cache
def load() -> dict[str, ModuleType]:
    """Import every peer module: {name: module}. Raises PeersMissingError with the install command."""
    declare_missing_operators()
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    except ImportError as error:
        raise PeersMissingError(f"parity tests need the peers ({error}); run: {INSTALL}") from error


def need() -> None:
    """Fail the running test, in CI and elsewhere alike, unless the peers can be imported."""
    import pytest

    try:
        load()
    except PeersMissingError as error:
        pytest.fail(str(error), pytrace=False)
