"""A data set that trains in seconds."""

from pathlib import Path

import numpy as np

from shared.data.cache import CacheWriter


def blobs(folder: Path, count: int = 160) -> Path:
    """Images (count, 1, 30, 30) of one round blob each, as a prepared data set in a new folder."""
    rng = np.random.default_rng(0)
    axis = np.arange(30) - 14.5
    centre = rng.uniform(-6, 6, (count, 2, 1, 1))
    images = np.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / 20)[:, None]
    images = (images + 0.01 * rng.standard_normal(images.shape)).clip(0, 1).astype(np.float32)
    writer = CacheWriter(folder, count, (1, 30, 30), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    writer.finish()
    return folder
