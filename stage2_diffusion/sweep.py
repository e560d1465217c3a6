"""Quality against the number of network evaluations: every sampler at every count, scored like `lens-ldm evaluate`.

lens-ldm sweep checkpoints/unet --reference data/lenses --samplers ab2 dpmpp ddim --steps 1 2 4 8 16 32 --fit 60
python stage2_diffusion/sweep.py checkpoints/unet --reference data/lenses

Writes sweep.json, sweep.md and sweep.png. All cells have the same seeds. The same command again goes on where it stopped,
with more samplers or steps it adds cells.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from shared.checkpoint import find_run
from shared.cli import Parser, above_zero, guard, positive
from shared.data.cache import LensImages
from shared.evaluation.judge import fittable
from shared.evaluation.lenses import lens_fitter, lens_share
from shared.evaluation.measure import ImageSet, Measured, of_data, of_tensor
from shared.evaluation.reference import add_options, check_reference, chosen_networks, halves
from shared.evaluation.scores import compare
from shared.evaluation.tables import LENSES, finite, lens_cells
from shared.files import make_folder, markdown, resumed, write_atomically
from shared.metrics import fid
from shared.metrics.lens_fit import LensFitter
from shared.registry import names
from shared.report import panels, rasterise, save_picture, style_of
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import add_model, draw, load_model, seed_range

Cell = dict[str, Any]  # sampler, steps, gflop, milliseconds; of `compare`: distances, physics; of fits: lenses
STEPS = (1, 2, 4, 8, 16, 32)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model(parser)
    add_options(parser)
    parser.add_argument(
        "--samplers", nargs="+", choices=names("sampler"), metavar="NAME", help=", ".join(names("sampler"))
    )
    parser.add_argument("--steps", nargs="+", type=positive, default=STEPS, metavar="N", help="evaluations a lens")
    parser.add_argument(
        "--shift", type=above_zero, help="of the grid of times (default: the model's, or its fitted grid)"
    )
    parser.add_argument("--fit", type=positive, metavar="N", help="also fit lens models to N samples of each cell")
    parser.add_argument("--preset", help="of the simulator, for --fit (default: that of the simulation)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default %(default)s)")
    a = parser.parse_args(argv)
    networks = chosen_networks(a)
    generator = load_model(a)
    reference = LensImages(a.reference)
    n = check_reference(generator.autoencoder, reference, a.reference, a.count, generator.config["data"]["name"])
    samplers = a.samplers or [generator.defaults["sampler"]]
    seeds = seed_range(a.seed, n)
    fitter = lens_fitter(a.preset, reference)[0] if a.fit else None
    about = {
        "model": generator.config["sha256"], "sampling": generator.defaults, "precision": generator.precision,
        "reference": reference.fingerprint,
        "n": n, "seed": a.seed, "shift": a.shift, "fit": [fitter.preset.name, a.fit] if fitter else None,
        "networks": [network.metric for network in networks],
    }  # fmt: skip
    about = json.loads(json.dumps(about))  # as a file would give it back
    out = a.out or find_run(a.model) / "sweep"
    make_folder(out)
    cells = read(out / "sweep.json", about)
    todo = [(s, k) for s in dict.fromkeys(samplers) for k in sorted(set(a.steps)) if (s, k) not in cells]
    if todo:
        scored = Scorer(generator, reference, seeds, networks, fitter, a.fit)
        for sampler, steps in tqdm(todo, desc="cells", unit="cell", disable=None):
            cells[sampler, steps] = scored(sampler, steps, a.shift)
            content = {**about, "cells": list(cells.values())}
            write_atomically(out / "sweep.json", (json.dumps(finite(content), indent=1) + "\n").encode())
    write_atomically(out / "sweep.md", (table(list(cells.values())) + "\n").encode())
    save_picture(out / "sweep.png", figure(list(cells.values())))
    print(table(list(cells.values())))
    print(f"{out / 'sweep.md'}, {out / 'sweep.png'}")


def read(path: Path, about: dict[str, Any]) -> dict[tuple[str, int], Cell]:
    """The finished cells of a sweep of this model and these images. UserError if the file is of another."""
    return {(cell["sampler"], cell["steps"]): cell for cell in resumed(path, about, "cells") or []}


class Scorer:
    """Cell by cell, against reference images that are measured once."""

    def __init__(
        self,
        generator: Generator,
        reference: LensImages,
        seeds: range,
        networks: list[fid.Network],
        fitter: LensFitter | None,
        fits: int | None,
    ) -> None:
        self.generator, self.seeds, self.fitter, self.fits = generator, seeds, fitter, fits
        self.networks, self.transform = networks, reference.transform
        half, other = halves(reference, len(seeds))
        self.reference, self.real = (self.measured(of_data(reference, part)) for part in (half, other))
        # What a conditional model is asked for, as in `evaluate`.
        self.asked = generator.conditions.of(reference, other)

    def measured(self, images: ImageSet) -> Measured:
        return Measured.of(images, self.networks, self.transform)

    def __call__(self, sampler: str, steps: int, shift: float | None) -> Cell:
        started = time.perf_counter()
        samples = draw(self.generator, self.seeds, cond=self.asked, sampler=sampler, steps=steps, shift=shift)
        seconds = time.perf_counter() - started
        first = {name: values[:1] for name, values in self.asked.items()}
        gflop = self.generator.gflop(sampler=sampler, steps=steps, shift=shift, cond=first)
        scores = compare(self.reference, self.real, {"samples": self.measured(of_tensor(samples))})
        cell = {
            "sampler": sampler, "steps": steps,
            "gflop": gflop, "milliseconds": 1000 * seconds / len(samples),
            "distances": {metric: found["samples"] for metric, found in scores["distances"].items()},
            "physics": {quantity: score["ratio"] for quantity, score in scores["physics"]["samples"].items()},
        }  # fmt: skip
        if self.fitter is not None:
            chosen = fittable(self.fitter.preset, self.asked, len(samples))[: self.fits]
            cell["lenses"] = lens_share(self.fitter.fit(samples[chosen], progress=True))
        return cell


def table(cells: Sequence[Cell]) -> str:
    """Markdown, a row for each cell."""
    metrics = cells[0]["distances"]
    fitted = any("lenses" in cell for cell in cells)
    header = ["sampler", "evaluations", "GFLOP", "ms", *(f"{metric}, excess" for metric in metrics)]
    header += ["physics over real", "furthest"]
    rows = [header + LENSES * fitted]
    for cell in cells:
        row = [cell["sampler"], str(cell["steps"]), f"{cell['gflop']:.2f}", f"{cell['milliseconds']:.1f}"]
        row += [f"{s['excess']:.2f} (floor {s['floor']:.2f} ± {s['floor_sd']:.2f})" for s in cell["distances"].values()]
        ratios = {name: math.inf if ratio is None else ratio for name, ratio in cell["physics"].items()}
        furthest = max(ratios, key=lambda name: ratios[name])
        row += [f"{typical(ratios.values()):.1f}", f"{furthest.replace('_', ' ')} {ratios[furthest]:.1f}"]
        if fitted:
            row += lens_cells(cell["lenses"])
        rows.append(row)
    return markdown(rows)


def figure(cells: Sequence[Cell]) -> Image.Image:
    """Against the evaluations of the network, for each sampler: excess of each distance, physics, lenses, chi² of lit pixels."""
    metrics, fitted = list(cells[0]["distances"]), any("lenses" in cell for cell in cells)
    drawing, axes = panels(len(metrics) + 1 + 2 * fitted, width=4.4, columns=2)
    for j, sampler in enumerate(dict.fromkeys(cell["sampler"] for cell in cells)):
        own = sorted((cell for cell in cells if cell["sampler"] == sampler), key=lambda cell: cell["steps"])
        steps = [cell["steps"] for cell in own]
        style = {**style_of(j), "ms": 4, "lw": 1.2}
        for axis, metric in zip(axes, metrics, strict=False):
            axis.plot(steps, [cell["distances"][metric]["excess"] for cell in own], label=sampler, **style)
        axes[len(metrics)].plot(steps, [typical(cell["physics"].values()) for cell in own], label=sampler, **style)
        if fitted:
            share = np.array([[cell["lenses"]["share"], *cell["lenses"]["interval"]] for cell in own]).T
            axes[-2].errorbar(steps, share[0], np.abs(share[1:] - share[0]), label=sampler, capsize=2, **style)
            axes[-1].plot(steps, [cell["lenses"]["chi2_lit"] for cell in own], label=sampler, **style)
    for axis, metric in zip(axes, metrics, strict=False):
        sd = cells[0]["distances"][metric]["floor_sd"]
        axis.axhspan(-sd, sd, color="0.9")
        axis.set(title=f"{metric}, excess over real images", yscale="symlog")
    axes[len(metrics)].axhline(1, color="k", lw=0.6)
    axes[len(metrics)].set(title="W1 of physics over that of real images", yscale="log")
    if fitted:
        axes[-2].set(title="share of lenses at the noise level", ylim=(-0.03, 1.03))
        axes[-1].axhline(1, color="k", lw=0.6)
        axes[-1].set(title="chi² of the pixels that the lens lights, median", yscale="log")
    evaluations = sorted({cell["steps"] for cell in cells})
    for axis in axes:
        axis.set(xscale="log", xlabel="evaluations of the network a lens")
        axis.set_xticks(evaluations, map(str, evaluations))
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    return rasterise(drawing)


def typical(ratios: Iterable[float | None]) -> float:
    """The geometric mean of those that are finite."""
    logs = [math.log(ratio) for ratio in ratios if ratio and math.isfinite(ratio)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


if __name__ == "__main__":
    guard(main)
