"""Samples as others bring them: an .npz, a folder of .npy or .png, whatever `lens-ldm prepare` reads."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.data.cache import LensImages
from shared.data.sources import BrokenImage, Source
from shared.errors import UserError
from shared.evaluation.measure import ImageSet

TRIED = 64  # images whose range is looked at
APART = 3.0  # times that of real images, or one such part of it: other units


def of_files(
    path: Path, reference: LensImages, span: tuple[float, float] | None = None, key: str | None = None
) -> ImageSet:
    """The images at a path, in the units of `reference`.

    span  (low, high): the values in the files that stand for the ends of the data set's range, such as 0, 255 of 8-bit
          PNG; None: they are in its units
    key   which array of a file with several

    UserError if there are none, if one is broken, or if their shape or range is not that of the data.
    """
    source = Source(path, key=key)
    if source.broken:
        name, _, reason = source.broken[0]
        raise UserError(f"{path}: {name} {reason}")
    if not len(source):
        raise UserError(f"{path} holds no images")
    if source.shape != reference.image_shape:
        raise UserError(
            f"{path} has images {source.shape}, {reference.path} has {reference.image_shape}: samples are scored at the "
            "resolution of the data (`--protocol` shrinks both sides alike, for published numbers)"
        )
    low, high = reference.value_range
    scale = 1.0 if span is None else (high - low) / (span[1] - span[0])

    def get(places: np.ndarray) -> Tensor:
        try:
            images = torch.from_numpy(np.stack([source.read(int(i)) for i in places]))
        except BrokenImage as error:
            raise UserError(f"{path}: an image {error}; leave it out, and say how many were") from error
        return images if span is None else (images - span[0]) * scale + low

    identity = hashlib.sha256(json.dumps([source.request, span], sort_keys=True, default=str).encode()).hexdigest()
    images = ImageSet(f"files {identity}", len(source), get)
    _require_units(path, images, reference, span)
    return images


def _require_units(path: Path, images: ImageSet, reference: LensImages, span: tuple[float, float] | None) -> None:
    """A wrong unit is no property of the samples, and no score should say it is one."""
    tried = images.get(np.unique(np.linspace(0, len(images) - 1, TRIED).astype(int)))
    test = reference.split("test")[:TRIED]
    widths = [float(np.ptp(np.quantile(x.numpy(), [0.01, 0.999]))) for x in (tried, reference.batch(test))]
    if not widths[1] / APART < widths[0] < widths[1] * APART:
        raise UserError(
            f"the pixels of {path} span {widths[0]:.3g}{' after --sample-range' if span else ''}, those of {reference.path} "
            f"{widths[1]:.3g}: they are in other units; say by --sample-range LOW,HIGH which values in the files stand for "
            f"the data's {reference.value_range[0]:g} and {reference.value_range[1]:g}"
        )
