"""Tests run side by side, one file on one core: each process has one thread, or all would wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest

from tests.blobs import blobs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few small images, prepared: what a stage is trained on where it matters not what it learns."""
    return blobs(tmp_path_factory.mktemp("data") / "blobs")
