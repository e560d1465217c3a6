"""Score a published model against real images it has never seen.

lens-ldm evaluate checkpoints/unet --reference data/lenses --count 500
python stage2_diffusion/evaluate.py checkpoints/unet --reference data/lenses --count 500

The test split gives two disjoint halves of COUNT images: the reference, and the other half, whose distance to the
reference is the floor that no generator can be expected to beat, and whose reconstructions show what stage 1 costs. A
conditional model is asked for the lenses of the other half; --fit measures whether it gives them: the parameters of what it
draws, by a lens fit, beside those of the real images and of their reconstructions, fitted likewise.
Writes metrics.json and report.html.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from shared.checkpoint import versions
from shared.cli import Parser, guard, positive
from shared.data.cache import LensImages
from shared.data.formats import CONDITION
from shared.data.normalise import PixelTransform, hint
from shared.errors import UserError
from shared.evaluation import (
    BATCH,
    NOISE_SEEDS,
    Measured,
    add_options,
    check_reference,
    chosen_networks,
    compare,
    finite,
    halves,
    lens_fitter,
    lens_share,
    physics_rows,
    score_rows,
    spectra,
)
from shared.files import make_folder, write_atomically
from shared.metrics import fid
from shared.metrics.lens_fit import LensFitter
from shared.metrics.obedience import obedience
from shared.report import Report, grid, loss_curves
from shared.simulate.preset import AXES
from stage2_diffusion.conditions import CLASS
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import (
    GUIDANCE,
    SETTINGS,
    add_model,
    add_settings,
    chosen_settings,
    draw,
    load_model,
    seed_range,
)

SHOWN = 24
LOOSE = 5.0  # degrees: angles with larger errors of their fit are not compared


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model(parser)
    add_options(parser)
    parser.add_argument("--samples", type=Path, help="samples.npz of this model, instead of drawing new ones")
    parser.add_argument("--seed", type=int, help="of the first sample (default: 0)")
    parser.add_argument(
        "--fit", type=positive, metavar="N", help="fit lens models to N images of each kind; 0.4 s each on a CPU"
    )
    parser.add_argument("--preset", default="deeplense", help="of those lens models (default %(default)s)")
    add_settings(parser)
    a = parser.parse_args(argv)

    if a.samples and (given := [k for k in ("seed", *SETTINGS, *GUIDANCE) if getattr(a, k) is not None]):
        raise UserError(f"--{given[0]} says how to draw samples, and --samples brings them: give one of the two")
    # Whatever can be wrong is found before the first minute of work.
    networks = chosen_networks(a)
    generator = load_model(a)
    reference = LensImages(a.reference)
    count = check_reference(generator.autoencoder, reference, a.reference, a.count, generator.config["data"]["name"])
    fitter, of_kind = lens_fitter(a.preset, reference) if a.fit else (None, np.array([]))
    out = a.out or Path(a.model) / "evaluation"
    make_folder(out)
    other = halves(reference, count)[1]
    if a.samples:
        samples, sampling, asked = read_samples(a.samples, count, generator)
    else:
        asked = generator.conditions.of(reference, other)
        if missing := [name for name in generator.conditions.names if name not in asked]:
            print(f"{a.reference} knows no {', '.join(missing)}: the samples may have any", file=sys.stderr)
        sampling = chosen_settings(a, generator, asked=asked)
        samples = draw(generator, seed_range(a.seed or 0, count), cond=asked, **sampling)

    metrics, sets, measured = evaluate(generator, reference, samples, networks)
    if fitter is not None:
        truth = {name: np.array(v["values"], float)[other] for name, v in reference.index.get("parameters", {}).items()}
        chosen = np.flatnonzero(of_kind[other])[: a.fit]
        if not len(chosen):
            raise UserError(f"--fit: none of the images is of the first class of preset {a.preset}")
        metrics["lens_fits"] = {
            name: fit(fitter, sets[name][places], {key: values[places] for key, values in told.items()})
            for name, places, told in (
                ("real", chosen, truth),
                ("reconstructions", chosen, truth),
                ("samples", fittable(fitter, asked, count)[: a.fit], asked),
            )
        }
    metrics |= {"model": a.model, "reference": str(a.reference), "sampling": sampling, "versions": versions()}
    write_atomically(out / "metrics.json", (json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n").encode())
    report(generator, metrics, sets, measured, Path(a.model)).write(out / "report.html")
    for rows in (score_rows(metrics), fit_rows(metrics.get("lens_fits"))):
        print("\n".join(" ".join(f"{x:>24}" if k else f"{x:34}" for k, x in enumerate(row)) for row in rows))
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")


def read_samples(path: Path, count: int, generator: Generator) -> tuple[Tensor, dict[str, Any], dict[str, np.ndarray]]:
    """The first `count` images of a samples.npz that this very model has drawn, how it drew them and what was asked for."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, metadata = file["images"], json.loads(str(file["metadata"]))
            asked = {n: file[CONDITION + n][:count] for n in generator.conditions.names if CONDITION + n in file}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no samples.npz of `lens-ldm sample` ({error}): draw the samples again") from error
    if metadata.get("weights_sha256") != generator.config["sha256"]:
        raise UserError(f"{path} was drawn from another model ({metadata.get('model')}): draw the samples again")
    if not metadata["observed"]:
        raise UserError(f"{path} holds clean images, which real ones are not: draw the samples without --clean")
    if len(images) < count:
        raise UserError(f"{path} holds {len(images)} samples, {count} are to be scored: draw more, or lower --count")
    sampling = {k: metadata.get(k) for k in (*SETTINGS, *GUIDANCE, "guide", "times", "lenses_per_second")}
    return torch.from_numpy(images[:count]), sampling, asked


def fittable(fitter: LensFitter, asked: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """The places, of n samples, that a fitter is for: where classes were asked for, those of the first of its preset."""
    kind = next(iter(fitter.preset.classes), None)
    return np.flatnonzero(asked[CLASS] == kind) if CLASS in asked and kind in asked[CLASS] else np.arange(n)


def fit(fitter: LensFitter, images: Tensor, truth: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Lens fits of images (N, C, H, W): how many are lenses at the level of their noise, and how far their parameters are
    from the truth, {name: (N,)}, where there is one."""
    fits = fitter.fit(images, progress=True)
    parameters = {}
    for name, values in fits.parameters.items():
        if name in truth:
            axis = name in AXES
            # What is almost round has no angle, whatever was asked for.
            known = np.where(fits.errors[name] < LOOSE, values, np.nan) if axis else values
            parameters[name] = obedience(np.asarray(truth[name], float), known, axis)._asdict()
    return {**lens_share(fits), "parameters": parameters}


def fit_rows(fits: dict[str, Any] | None) -> list[list[str]]:
    """The tables of lens fits, header first; empty where there are none."""
    if not fits:
        return []
    rows = [
        ["lens fits", *fits],
        ["lenses at the noise level", *(f"{one['share']:.0%} of {one['n']}" for one in fits.values())],
        ["chi² of lit pixels, median", *(f"{one['chi2_lit']:.2f}" for one in fits.values())],
    ]
    for name in fits["real"]["parameters"]:
        found = [one["parameters"].get(name) for one in fits.values()]
        rows.append([
            f"{name}: bias ± scatter, R²",
            *(f"{s['bias']:.3f} ± {s['scatter']:.3f}, {s['r2']:.3f}" if s and s["n"] else "-" for s in found),
        ])  # fmt: skip
    return rows


def evaluate(
    generator: Generator, reference: LensImages, samples: Tensor, networks: list[fid.Network]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Measured]]:
    """Score samples (N, C, H, W), and reconstructions beside them.

    -> metrics, the sets of images behind them, what was measured of those
    """
    n = len(samples)
    half, other = (reference.batch(part) for part in halves(reference, n))
    reconstructions = torch.cat([
        generator.reconstruct(part, range(NOISE_SEEDS + BATCH * k, NOISE_SEEDS + BATCH * k + len(part)))
        for k, part in enumerate(other.split(BATCH))
    ])  # fmt: skip
    sets = {"reference": half, "real": other, "reconstructions": reconstructions, "samples": samples}
    transform = reference.transform
    if advice := hint(transform, reference.index["statistics"]):
        print(f"warning: {advice}", file=sys.stderr)
    measured = {name: Measured(networks, transform) for name in sets}
    with tqdm(total=4 * n, desc="features", unit="image", disable=None, leave=False) as bar:
        for name, images in sets.items():
            measured[name].add_all(images, bar.update)
    candidates = {name: measured[name] for name in ("reconstructions", "samples")}
    scores = compare(measured["reference"], measured["real"], candidates)
    return {"n": n, **transform.to_config(), **scores}, sets, measured


def report(
    generator: Generator, metrics: dict[str, Any], sets: dict[str, Tensor], measured: dict[str, Measured], model: Path
) -> Report:
    """The one-file report: pictures first, then the curves, then the numbers and how they came about."""
    n, transform = metrics["n"], PixelTransform.from_config(metrics)
    config, sampling = generator.config, metrics["sampling"]
    grid_of_times = "a grid fitted to the model" if sampling["times"] else f"shift {sampling['shift']:g}"
    page = Report(
        f"lens-ldm: {config['training']['name']}",
        f"{n} samples, {sampling['steps']} steps of {sampling['sampler']} ({grid_of_times}), beside {n} real "
        f"images of the test split of {metrics['reference']}. All pictures are on one scale, {transform.low:g} to "
        f"{transform.high:g}, {transform.stretched}.",
    )
    for key, heading in (
        ("samples", "Generated: the first samples, none picked"),
        ("real", "Real: test images, none picked"),
        ("reconstructions", "The same test images through the autoencoder and back"),
    ):
        page.section(heading).picture(grid(transform.unit(sets[key][:SHOWN]), 8), heading)

    header, *rows = score_rows(metrics)
    page.section(
        "Distances",
        "Fréchet distance between sets of images; 0 would be the same distribution. A finite number of images keeps even "
        "real images from real images apart: that is the floor, and the excess over it hardly depends on n.",
    ).table(header, rows)
    for name, scores in metrics["distances"].items():
        s = scores["samples"]
        page.section(
            "",
            f"{name}: features of {s['extractor']}, resized {s['resizer']}, {s['stretch']} grey levels, "
            "clamped and rounded to uint8.",
        )

    page.section(
        "Physics",
        "Wasserstein-1 distance of each quantity to real images, and how many times that between real images it is: 1 is "
        "perfect. Lengths in pixels, brightness in the data's range.",
    )
    header, *rows = physics_rows(metrics["physics"])
    page.table(header, rows)
    page.picture(spectra({k: one for k, one in measured.items() if k != "reference"}), "power spectra and pixel values")

    if rows := fit_rows(metrics.get("lens_fits")):
        page.section(
            "Lens fits",
            "Parameters by a lens fit against the true ones of real images and of their reconstructions, and against those "
            "that samples were asked for: median and robust standard deviation of the difference, share of the variance found.",
        ).table(rows[0], rows[1:])
    runs = {"stage 2": model / "metrics.csv"}
    if config["training"]["autoencoder"] != "pixels":
        runs = {"stage 1": Path(config["training"]["autoencoder"]) / "metrics.csv", **runs}
    if curves := loss_curves(runs):
        page.section("Training").picture(curves, "loss curves")
    page.section("How it was made").listing(json.dumps({k: v for k, v in metrics.items() if k != "physics"}, indent=1))
    page.section("Configuration of stage 2").listing(yaml.safe_dump(config["training"], sort_keys=False))
    return page


if __name__ == "__main__":
    guard(main)
