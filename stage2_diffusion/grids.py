"""Fit the grid of times of a few evaluations to a published model, and keep it in the model.

lens-ldm tune-grid checkpoints/unet --steps 4 6 8

On the fitted grid a sampler ends nearer to where the same noise ends after many small steps. `lens-ldm sample` takes it for
that sampler and number of steps unless --shift is given. The weights stay as they are, and so does their hash.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.special import softmax

from shared.checkpoint import amend
from shared.cli import guard, positive
from shared.errors import UserError
from shared.precision import check_device
from shared.registry import names
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import share

FINE = 64  # evaluations of the solution that a grid is to come near to
FITTED, HELD_OUT = 2**30, 2**31  # first seeds of the noises of the fit, and of those that errors are reported for
NUDGE = 0.03  # of a logarithm: a derivative far above the rounding of float32, and of bf16


class Tuned(NamedTuple):
    """A fitted grid, `times` (steps + 1), and the errors {grid: error} of it and of the even grids, on held-out noises.

    An error is the root mean square of a sample's latents, whose variance is about 1: the median over samples.
    """

    times: list[float]
    errors: dict[str, float]


def tune(generator: Generator, sampler: str, steps: int, *, count: int = 64, last: float | None = None) -> Tuned:
    """Fit the inner times of `sampler` with `steps` evaluations, one noise beside the other.

    count   noises of the fit; as many others are held out
    last    the share of noise c = sigma / (alpha + sigma) at the last evaluation, of the grid and of the fine solution:
            what the network says there is the sample. None: the solution goes on to c = 0, and the fit is free

    Least squares over the widths of the steps in c (Levenberg and Marquardt), from the better of the even grids. An error
    counts relative to that of the same noise there, or else a few hard noises decide.
    """
    if sampler == "ddpm":
        raise UserError("ddpm draws noise at every step, on any grid: tune a sampler that follows the ODE")
    schedule = generator.denoiser.schedule
    c_max = float(schedule.c(torch.tensor(schedule.t_max, dtype=torch.float64)))
    if last is not None and not 0 < last < c_max:
        raise UserError(f"the share of noise at the last evaluation is above 0 and below {c_max:.3g}, not {last:g}")
    if steps < 2 + (last is not None):
        raise UserError(f"{steps} evaluations leave no time to choose: take more")

    def times(c: np.ndarray) -> list[float]:
        """Shares of noise that fall from c_max to `last` or 0 -> the times of a sampler."""
        inner = schedule.time_at(torch.from_numpy(c[1:] if last else c[1:-1])).tolist()
        return [schedule.t_max, *(round(t, 6) for t in inner), 0.0]

    def shares(widths: np.ndarray) -> np.ndarray:
        """Logarithms of the widths of all steps but the first, whose own is 0, to such shares: one more."""
        return c_max - (c_max - (last or 0.0)) * np.cumsum([0.0, *softmax([0.0, *widths])])

    def latents(first: int, sampler: str, times: Sequence[float]) -> np.ndarray:
        drawn = generator.sample(range(first, first + count), sampler=sampler, eta=0.0, times=times, latents=True)
        return torch.cat([x_0.flatten(1).cpu() for _, x_0 in drawn]).double().numpy()

    fine = times(np.linspace(c_max, last or 0.0, FINE + (last is None)))
    solution = {first: latents(first, "ab2", fine) for first in (FITTED, HELD_OUT)}

    def errors(first: int, times: Sequence[float]) -> np.ndarray:
        return np.sqrt(np.mean((latents(first, sampler, times) - solution[first]) ** 2, axis=1))

    even = {f"shift {shift:g}": schedule.times(steps, shift).tolist() for shift in sorted({1.0, generator.defaults["shift"]})}
    start = min(even.values(), key=lambda grid: np.median(errors(FITTED, grid)))
    widths = -np.diff(schedule.c(torch.tensor(start, dtype=torch.float64)).numpy())[: steps - (last is not None)]
    scale = errors(FITTED, start)[:, None] * np.sqrt(solution[FITTED].shape[1] * count)

    def residuals(widths: np.ndarray) -> np.ndarray:
        return ((latents(FITTED, sampler, times(shares(widths))) - solution[FITTED]) / scale).ravel()

    def slopes(widths: np.ndarray) -> np.ndarray:
        here = residuals(widths)
        return np.stack([(residuals(widths + step) - here) / NUDGE for step in NUDGE * np.eye(len(widths))], axis=1)

    fitted = least_squares(residuals, np.log(widths[1:] / widths[0]), slopes, method="lm", ftol=0.01, xtol=0.01)
    grids = {**even, "fitted": times(shares(fitted.x))}
    return Tuned(grids["fitted"], {name: float(np.median(errors(HELD_OUT, grid))) for name, grid in grids.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "lens-ldm tune-grid", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder of a run or of a published model")
    parser.add_argument("--steps", type=positive, nargs="+", default=[4, 6, 8], help="evaluations (default: 4 6 8)")
    parser.add_argument("--sampler", choices=names("sampler"), help="default: the model's")
    parser.add_argument("--count", type=positive, default=64, help="noises to fit to (default: %(default)s)")
    parser.add_argument("--last", type=share, help="share of noise at the last evaluation (default: fitted)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    a = parser.parse_args(argv)
    generator = Generator.from_pretrained(a.model, check_device(a.device))
    sampler = a.sampler or generator.defaults["sampler"]
    print(f"{sampler}: median error of latents to {FINE} evaluations, {a.count} noises that no grid was fitted to")
    for steps in a.steps:
        tuned = tune(generator, sampler, steps, count=a.count, last=a.last)
        amend(a.model, "diffusion", {"sampling": {"grids": {sampler: {str(steps): tuned.times}}}})
        found = ", ".join(f"{name} {error:.4f}" for name, error in tuned.errors.items())
        print(f"{steps:3} evaluations: {found}; times {' '.join(f'{t:.3f}' for t in tuned.times)}")


if __name__ == "__main__":
    guard(main)
