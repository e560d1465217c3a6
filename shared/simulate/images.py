"""Parameters -> clean images -> observed images.

In an image x grows to the right and y upwards, from the last row to row 0; angles run from x towards y.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from shared.errors import UserError
from shared.precision import one_thread
from shared.simulate.lens import Parameters, surface_brightness
from shared.simulate.preset import NOISE_STREAM, POINTS, UNITS, Preset, draw_parameters, generator

ACCELERATOR_BATCH = 256  # lenses rendered at once where memory is wide
# On a CPU one at a time, where an image fits the cache of a core and a batch does not, unless an image is so small that
# starting an operation takes longer than the operation.
SMALL_IMAGE, SMALL_BATCH = 128 * 128, 32  # points of an image, lenses at once
# What shared/simulate/lens.py reads of a lens: each costs its time to move.
HISTORY = {"mass", "z_l", "z_s", "magnitude_s", "magnitude_light", "N_p", "mass_p", "mass_v", "axion_mass", "exposure"}
LIGHT = {*UNITS, *POINTS} - HISTORY


def observe_light(preset: Preset, p: Parameters) -> Tensor:
    """The clean image (H, W) [counts/s/pixel] of one lens, as the telescope would see it without noise.

    p   scalars, and (K,) point masses, as shared/simulate/lens.py names them; their dtype and device are the image's

    Pure and differentiable: torch.func.vmap, jacfwd and jacrev go through it.
    """
    return pixelise(preset, surface_brightness(p, *grid(preset, p["x_s"].dtype, p["x_s"].device)))


def grid(preset: Preset, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The points where light is evaluated, `supersampling` a pixel and axis: x (1, S) and y (S, 1) [arcsec].

    They reach as far outside the image as the PSF does.
    """
    fine = preset.supersampling
    side = (preset.pixels + 2 * _margin(preset)) * fine
    axis = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * preset.pixel_scale / fine
    axis = axis.to(dtype).to(device)
    return axis[None, :], axis.flip(0)[:, None]


def pixelise(preset: Preset, light: Tensor) -> Tensor:
    """Light (S, S) on the points of `grid` -> image (H, W): averaged over pixels, then blurred by the PSF.

    The PSF is a Gaussian at pixel centres, cut beyond 4 sigma, of sum 1.
    """
    margin = _margin(preset)
    steps = torch.arange(-margin, margin + 1, dtype=light.dtype, device=light.device)
    kernel = torch.exp(-0.5 * (steps / (preset.psf_sigma / preset.pixel_scale)) ** 2)
    kernel = kernel / kernel.sum()
    pixels = light[None, None]
    if preset.supersampling > 1:
        pixels = avg_pool2d(pixels, preset.supersampling)
    if light.device.type == "cpu":
        return conv2d(conv2d(pixels, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0, 0]
    return _blur(_blur(pixels[0, 0], kernel).T, kernel).T


def _blur(pixels: Tensor, kernel: Tensor) -> Tensor:
    """(H + K - 1, W) -> (H, W), along the columns. Unlike a convolution no library does it in TF32, of three digits."""
    height = len(pixels) - len(kernel) + 1
    return sum((kernel[k] * pixels[k : k + height] for k in range(1, len(kernel))), kernel[0] * pixels[:height])


def _margin(preset: Preset) -> int:
    return ceil(4 * (preset.psf_sigma / preset.pixel_scale))


@torch.no_grad()
def render(
    preset: Preset,
    parameters: dict[str, np.ndarray],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> Tensor:
    """Render clean images (N, 1, H, W) [counts/s/pixel]; they come back to main memory.

    parameters  {name: (N,) or (N, K)} as `draw_parameters` returns them; NaN: this lens has no such component
    batch       lenses at once; None: what is fast on the device

    On a CPU an image comes out with the same bits whatever is rendered beside it, and on however many threads, unless
    `batch` changes; elsewhere to rounding.
    """
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    small = ((preset.pixels + 2 * _margin(preset)) * preset.supersampling) ** 2 <= SMALL_IMAGE
    batch = batch or ((SMALL_BATCH if small else 1) if on_cpu else ACCELERATOR_BATCH)
    count = len(parameters["theta_E"])
    used = {name: np.ascontiguousarray(values) for name, values in parameters.items() if name in LIGHT}
    columns = {name: torch.from_numpy(values).to(dtype).to(device) for name, values in used.items()}
    lacking = np.stack([np.isnan(values).reshape(count, -1).any(1) for values in used.values()], axis=1)
    masses = (used["theta_p"] > 0).sum(1) if "theta_p" in used else np.zeros(count, dtype=int)
    images = torch.empty(count, 1, preset.pixels, preset.pixels, dtype=dtype)
    with one_thread():
        for lacks in np.unique(lacking, axis=0):  # lenses of the same components go together
            names = [name for name, missing in zip(columns, lacks, strict=True) if not missing]
            members = np.flatnonzero((lacking == lacks).all(1))
            for start in range(0, len(members), batch):
                chosen = members[start : start + batch]
                # On a CPU a last batch is filled up with copies: a rounding may depend on the size of a batch.
                lot = np.resize(chosen, batch) if on_cpu else chosen
                index = int(lot[0]) if len(lot) == 1 else torch.from_numpy(lot).to(device)
                p = {name: columns[name][index] for name in names}
                # As few point masses as will do for these lenses: the rest is padding.
                p |= {name: p[name][..., : masses[chosen].max()] for name in POINTS if name in p}
                if len(lot) == 1:
                    images[index, 0] = observe_light(preset, p)
                else:
                    images[chosen, 0] = torch.func.vmap(partial(observe_light, preset))(p)[: len(chosen)].cpu()
    return images


def observe(
    preset: Preset, clean: Tensor, seed: int, indices: Sequence[int], exposure: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Add the noise of the preset's instrument to clean images: -> observed, clean on the same scale, float32.

    clean     (N, 1, H, W) [counts/s/pixel]
    indices   N: the noise of image i depends on (seed, i) alone
    exposure  (N,) [s], as drawn; None: the one that the preset fixes

    The clean images are the expectation of the observed ones, before both are scaled if the preset says so. Raises
    UserError if an image that must be scaled has no contrast.
    """
    if exposure is None:
        fixed = preset.exposure.low if preset.exposure is not None and preset.exposure.fixed else np.nan
        exposure = np.full(len(clean), fixed)
    observed, expected = torch.empty(clean.shape), torch.empty(clean.shape)
    for k, i in enumerate(indices):
        rng = generator(seed, i, NOISE_STREAM)
        try:
            counts, mean = _expose(preset, clean[k].double().numpy(), float(exposure[k]), rng)
        except ValueError as error:  # numpy counts photons up to 2^63
            raise UserError(
                f"image {i} of preset {preset.name} cannot be exposed ({error}): lower its flux, sky or exposure"
            ) from error
        if preset.scaling == "min-max":
            low, high = counts.min(), counts.max()
            if low == high:
                raise UserError(
                    f"image {i} of preset {preset.name} has no contrast: raise exposure or the source's flux"
                )
            counts, mean = (counts - low) / (high - low), (mean - low) / (high - low)
        observed[k], expected[k] = torch.from_numpy(counts), torch.from_numpy(mean)
    return observed, expected


def _expose(
    preset: Preset, rate: np.ndarray, exposure: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One noisy image and its expectation, in the preset's unit, from the light [counts/s/pixel]."""
    match preset.noise:
        case "none":
            return rate, rate
        case "poisson":  # whole photons of source and sky
            rate = rate + preset.number("sky")
            return rng.poisson(rate * exposure), rate * exposure
        case "poisson-gaussian":
            # As DeepLenseSim: normal noise of source and background, cut at 0, and Poisson noise of what that gives.
            mean, sigma = rate * exposure, np.sqrt(rate * exposure + (preset.number("background_rms") * exposure) ** 2)
            counts = rng.poisson(np.maximum(mean + sigma * rng.standard_normal(rate.shape), 0))
            t = mean / np.maximum(sigma, 1e-300)
            return counts, mean * special.ndtr(t) + sigma * np.exp(-0.5 * t * t) / np.sqrt(2 * np.pi)
        case _:
            # Each exposure is read out on its own, in whole steps of the gain; the sky is subtracted from their mean.
            read_noise, gain = preset.number("read_noise"), preset.number("gain")
            darkness = preset.number("sky_brightness") - preset.number("zero_point")
            sky, exposures = 10 ** (-0.4 * darkness) * preset.pixel_scale**2, int(preset.number("exposures"))
            total = np.zeros_like(rate)
            for _ in range(exposures):
                electrons = rng.poisson((rate + sky) * exposure) + read_noise * rng.standard_normal(rate.shape)
                total += gain * np.rint(electrons / gain)
            return total / (exposure * exposures) - sky, rate


def simulate(preset: Preset, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Simulate images `indices` of a seed: -> observed, clean (both (N, 1, H, W)), parameters {name: (N,) or (N, K)}.

    The clean images are the expectation of the observed ones on the same scale.
    """
    parameters = draw_parameters(preset, seed, indices)
    clean = render(preset, parameters)
    return *observe(preset, clean, seed, indices, parameters.get("exposure")), parameters
