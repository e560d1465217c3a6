"""Fit the grid of times of a few evaluations to a published model, and keep it in the model.

lens-ldm tune-grid checkpoints/unet --steps 4 6 8

On the fitted grid a sampler ends nearer to where the same noise ends after many small steps. `lens-ldm sample` takes it for
that sampler and number of steps unless --shift is given. The weights stay as they are, and so does their hash.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import softmax
from torch import Tensor
from tqdm import tqdm

from shared.checkpoint import amend
from shared.cli import Parser, guard, positive, share
from shared.errors import UserError
from shared.registry import names
from shared.sampling import NOISY
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import add_model, load_model

FINE = 64  # evaluations of the solution that a grid is to come near to
FITTED, HELD_OUT = 2**30, 2**31  # first seeds of the noises of the fit, and of those that errors are reported for
NUDGE = 0.03  # of a logarithm: a derivative far above the rounding of float32, and of bf16


class Tuned(NamedTuple):
    """A fitted grid, `times` (steps + 1), and the errors {grid: error} of it and of even grids on held-out noises.

    An error is the root mean square of a sample's latents, whose variance is about 1: its geometric mean over samples.
    """

    times: list[float]
    errors: dict[str, float]


def tune(generator: Generator, sampler: str, steps: int, *, count: int = 32, last: float | None = None) -> Tuned:
    """Fit the inner times of `sampler` with `steps` evaluations to the solution that the same noises have in FINE.

    count   noises of the fit; as many others are held out
    last    the share of noise c = sigma / (alpha + sigma) at the last evaluation, of the grid and of the solution alike,
            whose estimate there is the sample. None: the solution goes on to c = 0, and the grid ends as the fit has it

    Quasi-Newton over the widths of the steps in c = sigma / (alpha + sigma), from the better even grid; derivatives are
    differences, which take no more memory than sampling. A geometric mean, so that no few hard noises decide.
    """
    if sampler in NOISY:
        raise UserError(f"{sampler} draws noise at every step, on any grid: tune a sampler that follows the ODE")
    intervals = steps - (last is not None)
    if intervals < 2:
        raise UserError(f"a grid of {steps} evaluations leaves no time to choose: take more")
    schedule = generator.denoiser.schedule
    c_max = float(schedule.c(torch.tensor(schedule.t_max, dtype=torch.float64)))
    if last is not None and not 0 < last < c_max:
        raise UserError(f"the share of noise at the last evaluation is above 0 and below {c_max:.3g}, not {last:g}")

    def times(inner: np.ndarray) -> list[float]:
        """Falling shares of noise (n - 1,) -> the times (n + 1,) of n evaluations."""
        return [schedule.t_max, *(round(t, 6) for t in schedule.time_at(torch.from_numpy(inner)).tolist()), 0.0]

    def latents(first: int, sampler: str, times: Sequence[float]) -> Tensor:
        bar.update()
        drawn = generator.sample(range(first, first + count), sampler=sampler, eta=0.0, times=times, latents=True)
        return torch.cat([x_0.flatten(1).cpu() for _, x_0 in drawn])

    bar = tqdm(desc=f"grid of {steps} evaluations of {sampler}", unit="try", disable=None, leave=False)
    fine = times(np.linspace(c_max, last or 0.0, FINE + (last is None))[1:FINE])
    solution = {first: latents(first, "unipc", fine) for first in (FITTED, HELD_OUT)}

    def log_error(first: int, times: Sequence[float]) -> float:
        difference = latents(first, sampler, times) - solution[first]
        return difference.double().square().mean(1).clamp(min=1e-24).log().mean().item() / 2

    def grid(widths: np.ndarray) -> list[float]:
        """Logarithms of the widths in c over that of the first, (intervals - 1,), to times."""
        return times((c_max - (c_max - (last or 0.0)) * np.cumsum(softmax([0.0, *widths])))[: steps - 1])

    even = {f"shift {s:g}": schedule.times(steps, s).tolist() for s in sorted({1.0, generator.defaults["shift"]})}
    start = torch.tensor(min(even.values(), key=partial(log_error, FITTED)), dtype=torch.float64)
    widths = -np.diff(schedule.c(start))[:intervals]
    fitted = minimize(
        lambda widths: log_error(FITTED, grid(widths)),
        np.log(widths[1:] / widths[0]),
        method="L-BFGS-B",
        bounds=[(-4, 4)] * (intervals - 1),
        options={"eps": NUDGE, "ftol": 1e-3, "maxiter": 8},
    )
    grids = {**even, "fitted": grid(fitted.x)}
    errors = {name: math.exp(log_error(HELD_OUT, times)) for name, times in grids.items()}
    bar.close()
    return Tuned(grids["fitted"], errors)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm tune-grid", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model(parser)
    parser.add_argument("--steps", type=positive, nargs="+", default=[4, 6, 8], help="evaluations (default: 4 6 8)")
    parser.add_argument("--sampler", choices=names("sampler"), help="default: the model's")
    parser.add_argument("--count", type=positive, default=32, help="noises to fit to (default: %(default)s)")
    parser.add_argument("--last", type=share, help="share of noise at the last evaluation (default: as the fit has it)")
    a = parser.parse_args(argv)
    generator = load_model(a)
    sampler = a.sampler or generator.defaults["sampler"]
    print(f"{sampler}: error of latents against {FINE} evaluations, on {a.count} noises that no grid was fitted to")
    for steps in a.steps:
        tuned = tune(generator, sampler, steps, count=a.count, last=a.last)
        amend(a.model, "diffusion", {"sampling": {"grids": {sampler: {str(steps): tuned.times}}}})
        found = ", ".join(f"{name} {error:.4f}" for name, error in tuned.errors.items())
        print(f"{steps:3} evaluations: {found}; times {' '.join(f'{t:.3f}' for t in tuned.times)}")


if __name__ == "__main__":
    guard(main)
