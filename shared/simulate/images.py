"""Parameters -> clean images -> observed images.

In an image x grows to the right and y upwards, from the last row to row 0; angles run from x towards y.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from shared.errors import UserError
from shared.simulate.lens import surface_brightness
from shared.simulate.preset import NOISE_STREAM, Preset, draw_parameters, generator


@torch.no_grad()
def render(preset: Preset, parameters: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> Tensor:
    """Render clean images (N, 1, H, W) [counts/s/pixel]: lensed source, averaged over pixels, then blurred by the PSF.

    parameters  {name: (N,)} as `draw_parameters` returns them

    Points outside the image are rendered as far as the PSF reaches. The PSF is a normalised Gaussian at pixel centres.
    """
    sigma = preset.psf_sigma / preset.pixel_scale
    margin = ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-margin, margin + 1, dtype=dtype) / sigma) ** 2)
    kernel /= kernel.sum()
    fine = preset.supersampling
    side = (preset.pixels + 2 * margin) * fine
    axis = ((torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * preset.pixel_scale / fine).to(dtype)
    x, y = axis[None, :], axis.flip(0)[:, None]
    columns = {name: torch.from_numpy(values).to(dtype) for name, values in parameters.items()}
    images = torch.empty(len(columns["theta_E"]), 1, preset.pixels, preset.pixels, dtype=dtype)
    # One at a time and on one thread: an image fits the cache of a core, a batch does not, and no rounding can depend
    # on the batch or on where threads cut an image.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(len(images)):
            light = surface_brightness({name: values[i] for name, values in columns.items()}, x, y)
            pixels = avg_pool2d(light[None, None], fine)
            images[i] = conv2d(conv2d(pixels, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0]
    finally:
        torch.set_num_threads(threads)
    return images


def observe(preset: Preset, clean: Tensor, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Add photon noise to clean images and scale each to [0, 1]: -> observed, clean on the same scale, float32.

    clean    (N, 1, H, W) [counts/s/pixel]
    indices  N: the noise of image i depends on (seed, i) alone

    Raises UserError if an image has no contrast.
    """
    exposure, sky = preset.exposure, preset.sky
    observed, scaled = torch.empty(clean.shape), torch.empty(clean.shape)
    for k, i in enumerate(indices):
        rate = clean[k].double().numpy() + sky
        counts = generator(seed, i, NOISE_STREAM).poisson(rate * exposure)
        low, high = counts.min(), counts.max()
        if low == high:
            raise UserError(f"image {i} of preset {preset.name} has no contrast: raise exposure or I_s")
        observed[k] = torch.from_numpy((counts - low) / (high - low))
        scaled[k] = torch.from_numpy((rate * exposure - low) / (high - low))
    return observed, scaled


def simulate(preset: Preset, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Simulate images `indices` of a seed: -> observed, clean (both (N, 1, H, W) in [0, 1]), parameters {name: (N,)}.

    The clean images are the expectation of the observed ones on the same scale, so their sky lies a little above 0.
    """
    parameters = draw_parameters(preset, seed, indices)
    return *observe(preset, render(preset, parameters), seed, indices), parameters
