"""Clean images a second on one core: this repository, caustics' own simulator under vmap, and lenstronomy.

    uv run python -m tests.shared.simulate.benchmark [PRESET] [--count 32]

The same lenses of every class, the same PSF and as many points a pixel, float32 (lenstronomy knows float64 alone), one
thread, CPU time. caustics is given the batch that suits it best; it has no line of mass and takes that of this
repository. A line is 100 point masses for lenstronomy, as for DeepLenseSim. Lenses have 25 point masses each, where any.
The last column adds parameters, noise and scaling to the first.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from shared.simulate.images import render, simulate
from shared.simulate.preset import Preset, draw_parameters
from tests.shared.simulate.oracle import caustics_simulator, lenses, lenstronomy_image

BATCHES = (1, 4, 8, 32)
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="deeplense-test1")
    parser.add_argument("--count", type=int, default=32, help=f"lenses of each class, {ROUNDS} times each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    preset = Preset.load(options.preset)
    if any("N_p" in priors for priors in preset.priors):
        preset = Preset.load(options.preset, {"N_p": 25})
    print(f"{options.preset}, {options.count} lenses a class; images/s/core")
    print(f"{'class':10} {'here':>7} {'caustics (batch)':>17} {'lenstronomy':>12} {'with noise':>11}")
    for name in list(preset.classes) or [""]:
        one = preset.select([name] if name else [])
        row = _rates(one, options.count)
        batch = max(BATCHES, key=lambda size: row.get(f"caustics {size}", 0))
        best = f"{row[f'caustics {batch}']:.0f} ({batch})" if f"caustics {batch}" in row else "-"
        print(f"{name:10} {row['here']:7.0f} {best:>17} {row['lenstronomy']:12.0f} {row['noise']:11.0f}", flush=True)


@torch.no_grad()
def _rates(preset: Preset, count: int) -> dict[str, float]:
    """Images a second of CPU time of every program: the best of some rounds, in each of which all take their turn."""
    parameters = draw_parameters(preset, 0, range(count))
    here = lenses(parameters)
    work: dict[str, Callable[[], object]] = {
        "here": partial(render, preset, parameters),
        "noise": partial(simulate, preset, 0, range(count)),
        "lenstronomy": lambda: [lenstronomy_image(preset, lens, border=0) for lens in here],
    }
    columns = {k: torch.from_numpy(v).float() for k, v in parameters.items() if np.isfinite(v).all()}
    if "I_light" not in columns:
        simulator = caustics_simulator(preset, columns, points=25)
        for batch in BATCHES:
            work[f"caustics {batch}"] = partial(torch.func.vmap(simulator, chunk_size=batch), columns)
    best = dict.fromkeys(work, np.inf)
    for turn in range(ROUNDS + 1):
        for name, function in work.items():
            start = time.process_time()
            function()
            if turn:  # the first one warms up
                best[name] = min(best[name], time.process_time() - start)
    return {name: count / seconds for name, seconds in best.items()}


if __name__ == "__main__":
    main()
