"""How far each sampler ends from where the same noise ends in very many steps: the table of samplers and evaluations.

python -m tests.stage2_diffusion.benchmark_samplers
python -m tests.stage2_diffusion.benchmark_samplers checkpoints/quickstart-stage2 --count 64 --steps 4 6 8 --shift 1 3

Without a model: the exact denoiser of the tests' Gaussian mixture on the flow schedule, in float64. Root mean square of the
errors; for a model of its latents, the median over samples, and its fitted grids where it has some.
"""

import argparse

import torch
from torch import Tensor

from stage2_diffusion import samplers
from stage2_diffusion.generator import Generator
from stage2_diffusion.schedule import NoiseSchedule
from tests.stage2_diffusion.test_samplers import SHAPE, exact_denoiser, fixed_noise

NAMES = ("ddim", "dpmpp", "dpmpp3", "unipc", "heun", "ab2", "ab3")  # those that follow the ODE


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmark_samplers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a run or of a published model (default: the mixture)")
    parser.add_argument("--count", type=int, default=256, help="noises (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--shift", type=float, nargs="+", default=[1.0])
    parser.add_argument("--samplers", nargs="+", default=NAMES)
    parser.add_argument("--fine", type=int, help="evaluations of the reference (default: 64 of a model, or 4000)")
    a = parser.parse_args()
    generator = Generator.from_pretrained(a.model, "cpu") if a.model else None
    schedule = generator.denoiser.schedule if generator else NoiseSchedule("flow")

    def draw(name: str, times: list[float]) -> Tensor:
        if generator:
            drawn = generator.sample(range(a.count), sampler=name, eta=0.0, times=times, latents=True)
            return torch.cat([x_0 for _, x_0 in drawn])
        grid = torch.tensor(times, dtype=torch.float64)
        return getattr(samplers, name)(
            exact_denoiser(schedule), schedule, fixed_noise(a.count), SHAPE, len(times) - 1, times=grid
        )

    exact = draw("ab3", schedule.times(a.fine or (64 if generator else 4000)).tolist())
    print("| sampler | grid | " + " | ".join(map(str, a.steps)) + " |")
    print("|---" * (2 + len(a.steps)) + "|")
    for name in a.samplers:
        fitted = generator.defaults["grids"].get(name, {}) if generator else {}
        grids = {f"shift {s:g}": {n: schedule.times(n, s).tolist() for n in a.steps} for s in a.shift}
        grids |= {"fitted": {int(n): times for n, times in fitted.items()}} if fitted else {}
        for grid, times in grids.items():
            cells = []
            for n in a.steps:
                if n not in times:
                    cells.append("-")
                    continue
                error = (draw(name, times[n]) - exact).square().flatten(1).mean(1)
                cells.append(f"{(error.sqrt().median() if generator else error.mean().sqrt()).item():.4f}")
            print(f"| {name} | {grid} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
