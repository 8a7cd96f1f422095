"""Fixtures that more than one test file asks for."""

from __future__ import annotations

import gc
import shutil

import pytest

from tests.support import peers
from tests.support.cases import NETS


@pytest.fixture(scope="session", params=list(NETS))
def parity(request, tmp_path_factory):
    """One reference net after the other, each with all its tests in both parity files; exports leave with it."""
    peers.need()
    from tests.support.parity import Parity

    folder = tmp_path_factory.mktemp(request.param)
    yield Parity(request.param, folder)
    shutil.rmtree(folder)  # the two VGG alone are 2 GB, on disk and in memory
    gc.collect()
