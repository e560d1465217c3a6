"""Samplers: from noise to data, for anything that estimates x_0.

All have one signature, `sampler(denoise, schedule, noise, shape, steps)`, and return x_0 (N, *shape):

denoise    (x_t, t) -> estimate of x_0, with x_t (N, *shape) and t (N,); a `Denoiser`, or a formula
schedule   a `NoiseSchedule`
noise      shape -> standard normal (N, *shape), asked once for the start and once for each noisy step: a `SeededNoise`
shape      of one sample
times      the grid to walk instead of `schedule.times(steps)`, falling; the last entry should be 0
on_step    called as on_step(i, t, x_t, x_0) after each estimate: progress bars, films of the denoising

Gradients and autocast are the caller's to switch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Sequence[int]], Tensor]
OnStep = Callable[[int, float, Tensor, Tensor], None]


class Schedule(Protocol):
    t_max: float

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def times(self, steps: int) -> Tensor: ...


class SeededNoise:
    """Standard normal noise from one CPU generator a seed: sample k depends on seeds[k] alone, on any device.

    seeds    whole numbers from 0 to 2³² - 1, the part of a seed that torch's CPU generator reads
    stream   another use of the same seeds (the pixel noise of a decoded sample, say) takes another stream
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0):
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"a seed is a whole number from 0 to 2**32 - 1, got {wrong[0]}")
        self.device = device
        offset = stream * 0x9E3779B9  # 2³² over the golden ratio: the streams of small seeds stay apart
        self.generators = [torch.Generator().manual_seed((int(seed) + offset) % 2**32) for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """(N, *shape); each call continues every sample's own sequence."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self.generators]).to(self.device)


def ddpm(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 1000,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling on even steps of t (Ho et al. 2020, Algorithm 2): `ddim` with eta = 1."""
    if times is None:
        times = schedule.t_max * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return ddim(denoise, schedule, noise, shape, steps, eta=1.0, times=times, on_step=on_step)


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 50,
    *,
    eta: float = 0.0,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12): deterministic and of first order at eta = 0, Ho et al.'s posterior at eta = 1.

    Their Eq. 16 for the step's noise is written for alpha² + sigma² = 1; here it is the variance of
    q(x_s | x_t, x_0) for any alpha and sigma, which is the same thing there.
    """
    path = _path(schedule, steps, times)
    x_t = path[0].sigma * noise(shape)
    for i, (here, there) in enumerate(pairwise(path)):
        x_0 = _estimate(denoise, on_step, i, here, x_t)
        eps = (x_t - here.alpha * x_0) / here.sigma
        transition = here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2
        variance = eta**2 * (there.sigma / here.sigma) ** 2 * transition
        x_t = there.alpha * x_0 + math.sqrt(max(there.sigma**2 - variance, 0.0)) * eps
        if variance > 0:
            x_t = x_t + math.sqrt(variance) * noise(shape)
    return x_t


def dpmpp(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 16,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order in the half log-SNR (Lu et al. 2022, DPM-Solver++, Algorithm 2).

    First order where the log-SNR is infinite: a step from pure noise, the one after it, and the one to sigma = 0.
    """
    path = _path(schedule, steps, times)
    x_t = path[0].sigma * noise(shape)
    x_0_last, h_last = x_t, math.inf
    for i, (here, there) in enumerate(pairwise(path)):
        x_0 = _estimate(denoise, on_step, i, here, x_t)
        h = there.half_log_snr - here.half_log_snr
        ratio = 0.0 if math.isinf(h) else h / (2 * h_last)
        decay = there.sigma / here.sigma
        x_t = decay * x_t + (there.alpha - here.alpha * decay) * (x_0 + ratio * (x_0 - x_0_last))
        x_0_last, h_last = x_0, h
    return x_t


def ab2(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 8,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Second-order Adams–Bashforth on the straight path between data and noise, whatever the schedule.

    With u = x_t / (alpha + sigma) and c = sigma / (alpha + sigma), u = (1 - c) x_0 + c eps and du/dc = eps - x_0, which
    is finite from pure noise (c = 1) to data (c = 0). Hairer, Nørsett & Wanner 1993, §III.5, for unequal steps.
    """
    path = _path(schedule, steps, times)
    u = path[0].sigma / (path[0].alpha + path[0].sigma) * noise(shape)
    slope_last, h_last = u, math.inf
    for i, (here, there) in enumerate(pairwise(path)):
        x_0 = _estimate(denoise, on_step, i, here, (here.alpha + here.sigma) * u)
        slope = (u - x_0) / here.c
        h = there.c - here.c
        u = u + h * (slope + h / (2 * h_last) * (slope - slope_last))
        slope_last, h_last = slope, h
    return (path[-1].alpha + path[-1].sigma) * u


def consistency(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 2,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1): to the end at once, then back to less noise, anew.

    For a `denoise` that says where the path through x_t ends, as a distilled one does; any other gives blurred samples.
    """
    path = _path(schedule, steps, times)
    x_0 = torch.zeros(())
    for i, here in enumerate(path[:-1]):
        x_0 = _estimate(denoise, on_step, i, here, here.alpha * x_0 + here.sigma * noise(shape))
    return x_0


class _Point(NamedTuple):
    """A place on the way, in Python's own floats, so that no step waits for a device."""

    t: float
    alpha: float
    sigma: float

    @property
    def c(self) -> float:
        return self.sigma / (self.alpha + self.sigma)

    @property
    def half_log_snr(self) -> float:
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def _path(schedule: Schedule, steps: int, times: Tensor | None) -> list[_Point]:
    times = (schedule.times(steps) if times is None else times).detach().double().cpu()
    if len(times) < 2 or not (times.diff() < 0).all():
        raise ValueError(f"the times of a sampler fall at every step, got {times.tolist()}")
    alpha, sigma = schedule(times)
    return [_Point(*row) for row in torch.stack([times, alpha.flatten(), sigma.flatten()], 1).tolist()]


def _estimate(denoise: Denoise, on_step: OnStep | None, i: int, here: _Point, x_t: Tensor) -> Tensor:
    x_0 = denoise(x_t, torch.full((len(x_t),), here.t, dtype=x_t.dtype, device=x_t.device))
    if on_step is not None:
        on_step(i, here.t, x_t, x_0)
    return x_0
