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
    return _exponential(denoise, schedule, noise, shape, steps, times, on_step, order=2)


def dpmpp_sde(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 32,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M): `dpmpp` of the reverse SDE (Lu et al. 2022, DPM-Solver++). As much new noise on the way as in
    `ddpm`, under which errors of earlier estimates are forgotten, and fewer steps.
    """
    return _exponential(denoise, schedule, noise, shape, steps, times, on_step, order=2, noisy=True)


def dpmpp3(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 16,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Third order in the half log-SNR: the parabola through three estimates, integrated exactly.

    This is UniPC's predictor. The 3M of Lu et al.'s code weighs the parabola's bend by half, which is of second order.
    """
    return _exponential(denoise, schedule, noise, shape, steps, times, on_step, order=3)


def unipc(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 8,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC-3, B_2(h), predicting x_0 (Zhao et al. 2023, Algorithms 5 and 6): each step of `dpmpp3` is taken again as soon
    as there is an estimate at its end, which no evaluation is made for alone.
    """
    return _exponential(denoise, schedule, noise, shape, steps, times, on_step, order=3, correct=True)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 15,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method on the straight path of `ab2`, second order (Karras et al. 2022, Algorithm 1, whose path is another).

    An interval takes two estimates and spans two steps of the grid; the last takes one, for at t = 0 there is none to
    ask for, and the first as well if `steps` is even. So `steps` counts estimates here, too.
    """
    path = _path(schedule, steps, times)
    nodes = path[-2::-2][::-1]
    single = [path[-1]]  # where intervals of one estimate end
    if nodes[0] is not path[0]:
        nodes, single = [path[0], *nodes], [nodes[0], *single]
    u = path[0].c * noise(shape)
    i = 0
    for here, there in pairwise([*nodes, path[-1]]):
        slope = (u - _estimate(denoise, on_step, i, here, (here.alpha + here.sigma) * u)) / here.c
        end = u + (there.c - here.c) * slope
        i += 1
        if there not in single:
            slope_there = (end - _estimate(denoise, on_step, i, there, (there.alpha + there.sigma) * end)) / there.c
            end = u + (there.c - here.c) * (slope + slope_there) / 2
            i += 1
        u = end
    return (path[-1].alpha + path[-1].sigma) * u


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
    return _adams(denoise, schedule, noise, shape, steps, times, on_step, order=2)


def ab3(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int = 8,
    *,
    times: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """`ab2` of third order."""
    return _adams(denoise, schedule, noise, shape, steps, times, on_step, order=3)


def _adams(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int,
    times: Tensor | None,
    on_step: OnStep | None,
    order: int,
) -> Tensor:
    path = _path(schedule, steps, times)
    u = path[0].c * noise(shape)
    known: list[tuple[float, Tensor]] = []  # c and the slope there, of earlier steps, the latest first
    for i, (here, there) in enumerate(pairwise(path)):
        slope = (u - _estimate(denoise, on_step, i, here, (here.alpha + here.sigma) * u)) / here.c
        h = there.c - here.c
        nodes = [((c - here.c) / h, earlier) for c, earlier in known]
        u = u + h * _mean(slope, nodes, [1 / (j + 2) for j in range(len(nodes))])
        known = [(here.c, slope), *known][: order - 1]
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


def _exponential(
    denoise: Denoise,
    schedule: Schedule,
    noise: Noise,
    shape: Sequence[int],
    steps: int,
    times: Tensor | None,
    on_step: OnStep | None,
    order: int,
    correct: bool = False,
    noisy: bool = False,
) -> Tensor:
    path = _path(schedule, steps, times)
    x_t = start = path[0].sigma * noise(shape)
    known: list[tuple[float, Tensor]] = []  # half log-SNR and the estimate of x_0 there, the latest first
    for i, (here, there) in enumerate(pairwise(path)):
        x_0 = _estimate(denoise, on_step, i, here, x_t)
        if correct and i > 0:
            x_t = _exponential_step(start, path[i - 1], here, [*known, (here.half_log_snr, x_0)])
        start = x_t
        # Lower orders towards the end, where the log-SNR runs away (diffusers' `lower_order_final`).
        known = [(here.half_log_snr, x_0), *known][: min(order, len(path) - 1 - i)]
        kept = math.exp(here.half_log_snr - there.half_log_snr) if noisy else 1.0
        x_t = _exponential_step(start, here, there, known, kept)
        if noisy and there.sigma > 0:
            x_t = x_t + there.sigma * math.sqrt(1 - kept**2) * noise(shape)
    return x_t


def _exponential_step(
    x_t: Tensor, here: "_Point", there: "_Point", known: list[tuple[float, Tensor]], kept: float = 1.0
) -> Tensor:
    """Integrate d(x_t / sigma) = x_0 d(alpha / sigma) from `here`, the first of `known`, to `there`.

    x_0 is a polynomial in the half log-SNR: a constant where that is infinite, at pure noise and at sigma = 0.
    kept   of the noise in x_t, if the caller makes up for the rest with new noise
    """
    (start, x_0), *others = known
    h = there.half_log_snr - start
    nodes = [((at - start) / h, other) for at, other in others if math.isfinite(at)] if math.isfinite(h) else []
    moments = [1 / 2]  # B_2(h)'s, of second order like the exact one
    if len(nodes) > 1:
        integral = whole = -math.expm1(-h)  # of h exp(h (s - 1)) s^j over 0 ... 1, by parts from j = 0 on
        moments = [(integral := 1 - j / h * integral) / whole for j in range(1, len(nodes) + 1)]
    decay = there.sigma / here.sigma * kept
    return decay * x_t + (there.alpha - here.alpha * decay) * _mean(x_0, nodes, moments)


def _mean(value: Tensor, nodes: list[tuple[float, Tensor]], moments: list[float]) -> Tensor:
    """The mean over a step, s = 0 ... 1, of the polynomial through `value` at s = 0 and through `nodes`, (s, value).

    moments   the means of s, s², ..., which are those of the step's weight
    """
    if not nodes:
        return value
    powers = torch.tensor([[s ** (j + 1) for s, _ in nodes] for j in range(len(nodes))], dtype=torch.float64)
    weights = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
    return value + sum(weight * (other - value) for weight, (_, other) in zip(weights, nodes, strict=True))


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
