"""Guidance: a denoiser led further away from what a weaker one says. Wrappers, which know neither network nor sampler.

    D_w(x_t, t) = D_weak(x_t, t) + w (D(x_t, t) - D_weak(x_t, t))

With w = 1 it is D, and costs what D costs. The weaker one is the same network without its condition (classifier-free
guidance; Ho & Salimans 2022, arXiv 2207.12598), or a smaller or less trained one with it (autoguidance; Karras et al. 2024,
arXiv 2406.02507), which needs no condition. Both leave lenses less diverse than the data are, the more the higher w.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage2_diffusion.samplers import Denoise, Schedule

Conditional = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def classifier_free(
    denoiser: Conditional,
    schedule: Schedule,
    cond: Tensor,
    null: Tensor,
    weight: float,
    interval: Sequence[float] = (0.0, 1.0),
) -> Denoise:
    """denoiser(x_t, t, cond) led away from denoiser(x_t, t, null); cond and null (N, d). Both go through it in one batch."""

    def pair(x_t: Tensor, t: Tensor) -> Sequence[Tensor]:
        return denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([cond, null])).chunk(2)

    return _guided(lambda x_t, t: denoiser(x_t, t, cond), pair, schedule, weight, interval)


def autoguidance(
    denoise: Denoise, guide: Denoise, schedule: Schedule, weight: float, interval: Sequence[float] = (0.0, 1.0)
) -> Denoise:
    """`denoise` led away from `guide`, another estimate of the same x_0 from the same x_t."""
    return _guided(denoise, lambda x_t, t: (denoise(x_t, t), guide(x_t, t)), schedule, weight, interval)


def _guided(
    denoise: Denoise,
    pair: Callable[[Tensor, Tensor], Sequence[Tensor]],
    schedule: Schedule,
    weight: float,
    interval: Sequence[float],
) -> Denoise:
    """interval   of the share of noise, sigma / (alpha + sigma), within which to guide: at high noise guidance narrows the
    variety of samples, at low noise it does nothing (Kynkaanniemi et al. 2024, arXiv 2404.07724)
    """
    if weight == 1:
        return denoise

    def within(t: Tensor) -> bool:
        if interval[0] <= 0 and interval[1] >= 1:
            return True  # and no step waits for the device to say its time
        alpha, sigma = schedule(t[:1].double().cpu())
        return interval[0] <= float(sigma / (alpha + sigma)) <= interval[1]

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if not within(t):
            return denoise(x_t, t)
        good, weak = pair(x_t, t)
        return weak + weight * (good - weak)

    return guided
