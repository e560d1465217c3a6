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
    path: Path,
    reference: LensImages,
    span: tuple[float, float] | None = None,
    key: str | None = None,
    trusted: bool = False,
) -> ImageSet:
    """The images at a path, in the units of `reference`. Colours that are grey are one channel.

    span  (low, high): the values in the files that stand for the ends of the data set's range, such as 0, 255 of 8-bit
          PNG; None: they are in its units
    key   which array of a file with several
    trusted  they are known to be in those units, whatever they look like

    UserError if there are none, if one is broken, or if their shape or range is not that of the data.
    """
    source = Source(path, key=key)
    if source.broken:
        name, _, reason = source.broken[0]
        raise UserError(f"{path}: {name} {reason}")
    if not len(source):
        raise UserError(f"{path} holds no images")
    grey = source.shape == (3, *reference.image_shape[1:]) and reference.image_shape[0] == 1
    if source.shape != reference.image_shape and not grey:
        raise UserError(
            f"{path} has images {source.shape}, {reference.path} has {reference.image_shape} (channels, height, width): "
            "samples are scored at the resolution of the data (`--protocol` changes both sides alike)"
        )
    low, high = reference.value_range
    scale = 1.0 if span is None else (high - low) / (span[1] - span[0])

    def get(places: np.ndarray) -> Tensor:
        try:
            images = torch.from_numpy(np.stack([source.read(int(i)) for i in places]))
        except BrokenImage as error:
            raise UserError(f"{path}: an image {error}: leave such images out, and report how many") from error
        if grey:
            if not torch.equal(images.amin(1), images.amax(1)):
                raise UserError(f"{path} has images in colour, {reference.path} has one channel: make them grey")
            images = images[:, :1]
        return images if span is None else (images - span[0]) * scale + low

    identity = hashlib.sha256(
        json.dumps([source.request, span, reference.value_range], sort_keys=True, default=str).encode()
    ).hexdigest()
    images = ImageSet(f"files {identity}", len(source), get)
    if not trusted:
        _require_units(path, images, reference, span)
    return images


def _require_units(path: Path, images: ImageSet, reference: LensImages, span: tuple[float, float] | None) -> None:
    """A wrong unit is no property of the samples, and no score should say it is one."""
    tried = images.get(np.unique(np.linspace(0, len(images) - 1, TRIED).astype(int)))
    real = reference.batch(reference.shuffled("test")[:TRIED])
    (middle, width), (real_middle, real_width) = (
        (float(np.median(x.numpy())), float(np.ptp(np.quantile(x.numpy(), [0.01, 0.999])))) for x in (tried, real)
    )
    if real_width / APART < width < real_width * APART and abs(middle - real_middle) < real_width / APART:
        return
    raise UserError(
        f"the pixels of {path} span {width:.3g} about {middle:.3g}{' after --sample-range' if span else ''}, those of "
        f"{reference.path} {real_width:.3g} about {real_middle:.3g}: other units; say by --sample-range LOW,HIGH which values "
        f"in the files stand for the data's {reference.value_range[0]:g} and {reference.value_range[1]:g}"
    )
