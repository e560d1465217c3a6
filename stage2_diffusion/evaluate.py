"""Score a published model against real images it has never seen.

lens-ldm evaluate checkpoints/unet --reference data/lenses --count 500
python stage2_diffusion/evaluate.py checkpoints/unet --reference data/lenses --count 500

The test split gives two disjoint halves of COUNT images: the reference, and the other half, whose distance to the
reference is the floor that no generator can be expected to beat, and whose reconstructions show what stage 1 costs.
Writes metrics.json and report.html.
"""

import argparse
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from shared.checkpoint import require_units, versions
from shared.cli import guard
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform, hint
from shared.errors import UserError
from shared.files import write_atomically
from shared.metrics import efficientnet, fid, physics
from shared.report import Report, grid, loss_curves, panels, rasterise
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import (
    SETTINGS,
    add_settings,
    check_device,
    chosen_settings,
    draw,
    make_folder,
    positive,
    seed_range,
)

LARGEST = 2500  # images a side by default: 1/n has fallen below the differences of interest
NOISE_SEEDS = 1 << 31  # of the reconstructions' pixel noise, away from those of samples
SHOWN = 24


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "lens-ldm evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder of a run or of a published model")
    parser.add_argument("--reference", required=True, help="prepared data set, such as data/NAME")
    parser.add_argument(
        "--count", type=positive, help=f"images a side (default: half the test split, at most {LARGEST})"
    )
    parser.add_argument("--samples", type=Path, help="samples.npz of this model, instead of drawing new ones")
    parser.add_argument("--seed", type=int, help="of the first sample (default: 0)")
    add_settings(parser)
    parser.add_argument("--fid", action="store_true", help="also `fid` on Inception features; needs their weights")
    parser.add_argument("--inception-weights", type=Path, help="file of those weights; implies --fid")
    parser.add_argument("--download", action="store_true", help="fetch them once (91 MB); implies --fid")
    parser.add_argument("--out", type=Path, help="folder (default: evaluation/ beside the model)")
    a = parser.parse_args(argv)

    if a.samples and (given := [k for k in ("seed", *SETTINGS) if getattr(a, k) is not None]):
        raise UserError(f"--{given[0]} says how to draw samples, and --samples brings them: give one of the two")
    # Whatever can be wrong is found before the first minute of work.
    networks: list[fid.Network] = [efficientnet.efficientnet_lite0()]
    if a.fid or a.inception_weights or a.download:
        networks.append(fid.inception(a.inception_weights, a.download))
    generator = Generator.from_pretrained(a.model, check_device(a.device))
    reference = LensImages(a.reference)
    count = check_reference(generator, reference, a.reference, a.count)
    out = a.out or Path(a.model) / "evaluation"
    make_folder(out)
    if a.samples:
        samples, sampling = read_samples(a.samples, count, generator)
    else:
        sampling = chosen_settings(a, generator)
        samples = draw(generator, seed_range(a.seed or 0, count), **sampling)

    metrics, pictures = evaluate(generator, reference, samples, networks)
    metrics |= {"model": a.model, "reference": str(a.reference), "sampling": sampling, "versions": versions()}
    write_atomically(out / "metrics.json", (json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n").encode())
    report(generator, metrics, pictures, Path(a.model)).write(out / "report.html")
    print(
        "\n".join(
            " ".join(f"{cell:>20}" if k else f"{cell:34}" for k, cell in enumerate(row)) for row in score_rows(metrics)
        )
    )
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")


def check_reference(generator: Generator, reference: LensImages, name: str, count: int | None) -> int:
    """How many images a side there will be. UserError if the data are of another shape, or too few."""
    if generator.autoencoder.image_shape != reference.image_shape:
        raise UserError(
            f"the model makes images {generator.autoencoder.image_shape}, {name} has {reference.image_shape}"
        )
    require_units(generator.autoencoder, reference.transform, f"the model of {generator.config['data']['name']}")
    return check_count(reference, name, count)


def check_count(reference: LensImages, name: str, count: int | None) -> int:
    """`count`, or as many as there can be. UserError if the test split is too small for it."""
    most = len(reference.split("test")) // 2
    if most < 2 or (count or 2) > most:
        raise UserError(
            f"{name} has {2 * most} test images, which allow --count {most} (two disjoint halves, one of them for the floor), "
            f"not {count or 2}: ask for fewer, or prepare more images"
        )
    return count or min(most, LARGEST)


def read_samples(path: Path, count: int, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
    """The first `count` images of a samples.npz that this very model has drawn, and how it drew them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, metadata = file["images"], json.loads(str(file["metadata"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no samples.npz of `lens-ldm sample` ({error}): draw the samples again") from error
    if metadata.get("weights_sha256") != generator.config["sha256"]:
        raise UserError(f"{path} was drawn from another model ({metadata.get('model')}): draw the samples again")
    if not metadata["observed"]:
        raise UserError(f"{path} holds clean images, which real ones are not: draw the samples without --clean")
    if len(images) < count:
        raise UserError(f"{path} holds {len(images)} samples, {count} are to be scored: draw more, or lower --count")
    return torch.from_numpy(images[:count]), {k: metadata[k] for k in (*SETTINGS, "lenses_per_second")}


def evaluate(
    generator: Generator, reference: LensImages, samples: Tensor, networks: list[fid.Network]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Score samples (N, C, H, W), and reconstructions beside them: -> metrics, and the sets of images behind them."""
    n = len(samples)
    order = np.random.default_rng(0).permutation(reference.split("test"))
    halves = [reference.batch(np.sort(part)) for part in (order[:n], order[n : 2 * n])]
    reconstructions = torch.cat([
        generator.reconstruct(part, range(NOISE_SEEDS + 64 * k, NOISE_SEEDS + 64 * k + len(part)))
        for k, part in enumerate(halves[1].split(64))
    ])  # fmt: skip
    sets = {"reference": halves[0], "real": halves[1], "reconstructions": reconstructions, "samples": samples}
    transform = reference.transform
    if advice := hint(transform, reference.index["statistics"]):
        print(f"warning: {advice}", file=sys.stderr)
    metrics: dict[str, Any] = {"n": n, **transform.to_config(), "distances": {}}
    for network in networks:
        with tqdm(total=4 * n, desc=f"{network.metric} features", unit="image", disable=None, leave=False) as bar:
            found = {
                k: fid.features(network, transform.unit(images), (0.0, 1.0), progress=bar.update)
                for k, images in sets.items()
            }
        real = found.pop("reference"), found.pop("real")
        scores = fid.score(*real, found, network, reference.value_range, stretch=transform.stretched)
        metrics["distances"][network.metric] = {k: score.to_dict() for k, score in scores.items()}
    measured = {k: physics.summaries(images, reference.value_range) for k, images in sets.items()}
    metrics["physics"] = {
        k: physics.compare(measured["reference"], measured["real"], measured[k]) for k in ("reconstructions", "samples")
    }
    return metrics, sets


def finite(tree: Any) -> Any:
    """The same with null for what JSON has no number for, such as a ratio to a floor of 0."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def score_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """The table of distances, header first."""
    rows = [["distance to real images", "value", "floor (real)", "excess", "n"]]
    for name, scores in metrics["distances"].items():
        for what, s in scores.items():
            floor = f"{s['floor']:.2f} ± {s['floor_sd']:.2f}"
            rows.append([f"{name}, {what}", f"{s['distance']:.2f}", floor, f"{s['excess']:.2f}", str(s["n"])])
    return rows


def physics_rows(scores: dict[str, Any]) -> list[list[str]]:
    """One row a quantity: the distance between real sets, then distances with their ratio to it.

    Where all real images have one value, such as the peak of images that were scaled to it, there is no ratio.
    """

    def cell(score: dict[str, float]) -> str:
        return f"{score['w1']:.2g}" + (f" (× {score['ratio']:.2f})" if score["floor"] else "")

    both = zip(scores["reconstructions"].items(), scores["samples"].values(), strict=True)
    return [[quantity, f"{r['floor']:.2g}", cell(r), cell(s)] for (quantity, r), s in both]


def report(generator: Generator, metrics: dict[str, Any], sets: dict[str, Tensor], model: Path) -> Report:
    """The one-file report: pictures first, then the curves, then the numbers and how they came about."""
    n, transform = metrics["n"], PixelTransform.from_config(metrics)
    config, sampling = generator.config, metrics["sampling"]
    page = Report(
        f"lens-ldm: {config['training']['name']}",
        f"{n} samples, {sampling['steps']} steps of {sampling['sampler']} (shift {sampling['shift']:g}), beside {n} real "
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
    page.table(["quantity", "real", "reconstructions", "samples"], physics_rows(metrics["physics"]))
    page.picture(spectra(sets, config), "power spectra and noise law")

    runs = {"stage 2": model / "metrics.csv"}
    if config["training"]["autoencoder"] != "pixels":
        runs = {"stage 1": Path(config["training"]["autoencoder"]) / "metrics.csv", **runs}
    if curves := loss_curves(runs):
        page.section("Training").picture(curves, "loss curves")
    page.section("How it was made").listing(json.dumps({k: v for k, v in metrics.items() if k != "physics"}, indent=1))
    page.section("Configuration of stage 2").listing(yaml.safe_dump(config["training"], sort_keys=False))
    return page


def spectra(sets: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """Azimuthal power spectra of real and generated images, their ratio, and the histogram of pixel values."""
    figure, (power, ratio, histogram) = panels(3, width=4.4)
    means = {}
    for name, style in (("real", "k-"), ("reconstructions", "C0--"), ("samples", "C3-")):
        k, spectrum = physics.radial_power_spectrum(sets[name])
        means[name] = spectrum.mean(0)
        power.plot(k, means[name], style, lw=1.3, label=name)
        if name != "real":
            ratio.plot(k, means[name] / means["real"], style, lw=1.3, label=f"{name} / real")
        transform = PixelTransform.from_config(config["autoencoder"])
        edges = transform.inverse(torch.linspace(-1, 1, 101, dtype=torch.float64)).numpy() - transform.pivot
        histogram.stairs(
            np.histogram(sets[name].double().numpy() - transform.pivot, edges, density=True)[0],
            edges,
            label=name,
            color=style[:-1].strip("-"),
        )
    power.set(title="power spectrum", xlabel="k [cycles / pixel]", yscale="log")
    ratio.set(title="over real", xlabel="k [cycles / pixel]", ylim=(0.5, 1.5))
    ratio.axhline(1, color="k", lw=0.6)
    histogram.set(title="pixel values", yscale="log")
    if transform.scale is not None:
        histogram.set_xscale("asinh", linear_width=transform.scale)
        histogram.set_xlabel(f"above the sky, {transform.pivot:.4g}")
    for axis in (power, ratio, histogram):
        axis.legend(fontsize=8)
    return rasterise(figure)


if __name__ == "__main__":
    guard(main)
