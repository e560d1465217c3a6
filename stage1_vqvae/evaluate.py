"""Score a published autoencoder on images it has never seen.

lens-ldm evaluate-vqvae checkpoints/vqvae --reference data/lenses
python stage1_vqvae/evaluate.py checkpoints/vqvae --reference data/lenses --count 500 --fit 100

One half of the test split is reconstructed and compared with the other half: the distance between the two is the floor.
Where the data set is a simulation, its clean images are made again, and reconstructions are judged by them. Writes
metrics.json, report.html and its pictures: reconstructions.png, worst.png, noise.png, spectra.png, codes.png.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from shared import simulate
from shared.checkpoint import build_autoencoder, find_run, load, versions
from shared.cli import Parser, guard, positive
from shared.data.cache import LensImages
from shared.data.normalise import hint, sky
from shared.errors import UserError
from shared.evaluation.lenses import fit_images, lens_fitter, lens_share
from shared.evaluation.measure import BATCH, Measured, of_data, source
from shared.evaluation.reference import NOISE_SEEDS, add_options, check_reference, chosen_networks, halves
from shared.evaluation.scores import compare
from shared.evaluation.tables import finite, score_rows
from shared.files import make_folder, write_atomically
from shared.flops import flops
from shared.metrics import fid
from shared.precision import autocast, check_device, named_device, usable_precision
from shared.report import save_picture
from shared.simulate.again import Simulation
from stage1_vqvae.noise import LIT, NoiseLaw, NoiseLaws, law_of
from stage1_vqvae.quantizers import CodeUsage, Quantizer
from stage1_vqvae.report import SHOWN, draw, quality_rows, report
from stage1_vqvae.vqvae import VQVAE

LAGS = 5
FITTED_TO = 512  # validation images, where a model has no noise law and one must be fitted here
WORST = 16
TIMED = 1.0  # seconds
TRUTH, AGAIN = "truth + fitted noise", "truth + new noise"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm evaluate-vqvae", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a stage-1 run or of a published autoencoder")
    add_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    parser.add_argument(
        "--fit", type=positive, metavar="N", help="fit lens models to N reconstructions; 0.4 s each on a CPU"
    )
    parser.add_argument("--preset", help="of those lens models (default: that of the simulation)")
    a = parser.parse_args(argv)

    # Whatever can be wrong is found before the first minute of work.
    networks = chosen_networks(a)
    where = named_device(check_device(a.device))
    config, state = load(a.model, "autoencoder")
    model = cast(VQVAE, build_autoencoder(config["autoencoder"], state))
    model.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = LensImages(a.reference)
    count = check_reference(model, reference, a.reference, a.count, config["data"]["name"])
    fitted = LensShare(a.preset, reference, min(a.fit, count)) if a.fit else None
    run = find_run(a.model)
    out = a.out or run / "evaluation"
    make_folder(out)

    if config["training"].get("loss", {}).get("perceptual", 0) > 0:
        print(
            f"warning: {a.model} was trained against fd_efflite0 (loss.perceptual): no other model's compares with it"
        )
    precision = usable_precision(config["precision"], where)
    metrics, found = evaluate(model, reference, count, networks, precision, fitted)
    about = {"model": a.model, "weights_sha256": config["sha256"], "reference": str(a.reference)}
    metrics = finite({**about, **metrics, "versions": versions()})
    pictures = draw(metrics, found)
    for name, picture in pictures.items():
        save_picture(out / f"{name}.png", picture)
    report(metrics, pictures, config, run).write(out / "report.html")
    # Last, so that whoever finds it finds all of the rest.
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    for rows in (score_rows(metrics), quality_rows(metrics)):
        print("\n".join(" ".join(f"{x:>20}" if k else f"{x:38}" for k, x in enumerate(row)) for row in rows), "\n")
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")


# --- sums over pixels -------------------------------------------------------------------------------------------------


class Residuals:
    """What is left of images when a clean version is taken off: its variance against the signal, and how its pixels are
    correlated with their neighbours. White noise has no correlation.

    edges   (B - 1,) between B bins of the signal above the background; the first bin is all that is darker
    """

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges
        self.bins = torch.zeros(5, len(edges) + 1, dtype=torch.float64)  # pixels, signal, residual, its square, the law
        self.pairs = torch.zeros(2, 2, LAGS + 1, 2, dtype=torch.float64)  # all or lit, x or y, lag: products, pairs

    def add(self, signal: Tensor, residual: Tensor, variance: Tensor, lit: Tensor) -> None:
        """Each (N, C, H, W), on the CPU: signal above the background, residual, its expected variance, which are lit."""
        where = torch.bucketize(signal.flatten(), self.edges)
        values = (torch.ones_like(signal), signal, residual, residual.square(), variance)
        for row, value in zip(self.bins, values, strict=True):
            row += torch.bincount(where, value.flatten().double(), len(row))
        z = residual / variance.clamp_min(1e-60).sqrt()
        for axis, dim in enumerate((-1, -2)):
            for lag in range(min(LAGS, z.shape[dim] - 1) + 1):
                n = z.shape[dim] - lag
                products = z.narrow(dim, 0, n) * z.narrow(dim, lag, n)
                both = lit.narrow(dim, 0, n) & lit.narrow(dim, lag, n)
                for k, chosen in enumerate((products, products[both])):
                    self.pairs[k, axis, lag] += torch.tensor([float(chosen.double().sum()), chosen.numel()])

    def curve(self) -> dict[str, list[float]]:
        """Of each bin with pixels: their number, mean signal, variance and mean of the residual, mean of the law."""
        count, signal, mean, square, law = self.bins[:, self.bins[0] > 1]
        values = {
            "pixels": count,
            "signal": signal / count,
            "variance": square / count - (mean / count).square(),
            "bias": mean / count,
            "law": law / count,
        }
        return {key: value.tolist() for key, value in values.items()}

    def correlation(self) -> dict[str, dict[str, list[float]]]:
        """{all, lit: {x, y: at lags 1 ... LAGS}} of residuals in units of their noise."""
        mean = self.pairs[..., 0] / self.pairs[..., 1]
        rho = mean[..., 1:] / mean[..., :1]
        return {
            name: {axis: rho[k, j].tolist() for j, axis in enumerate("xy")} for k, name in enumerate(("all", "lit"))
        }


class Sums(defaultdict[str, Any]):
    """Sums by name, in double precision: of pixels (N, C, H, W) those of each band, (C,)."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self[name] += value.double().sum((0, 2, 3)).numpy() if isinstance(value, Tensor) else value

    def ratio(self, over: str, under: str) -> float:
        """The mean over the bands, none of which may hide behind the noise of another."""
        above, below = np.atleast_1d(self[over]), np.atleast_1d(self[under])
        return float((above[below > 0] / below[below > 0]).mean()) if (below > 0).any() else math.nan

    def similarity(self, output: Tensor, target: Tensor, name: str) -> None:
        """output, target (N, C, H, W) in [0, 1]."""
        alike = float(cast(Tensor, ssim(output, target, data_range=1.0)))
        self.add(**{f"{name} mse": float((output - target).double().square().sum()), f"{name} pixels": output.numel()})
        self.add(**{f"{name} ssim": alike * len(output), f"{name} images": len(output)})

    def similar(self, name: str) -> dict[str, float]:
        mse = self.ratio(f"{name} mse", f"{name} pixels")
        psnr = -10 * math.log10(mse) if mse > 0 else math.inf
        return {"psnr": psnr, "ssim": self.ratio(f"{name} ssim", f"{name} images")}


# --- lens fits --------------------------------------------------------------------------------------------------------


class LensShare:
    """Which share of images are lenses at the level of their noise, by a lens fit of the first n that a preset can make.

    UserError if there is no such preset, or if it makes images of another size.
    """

    def __init__(self, name: str | None, reference: LensImages, n: int) -> None:
        self.fitter, of_kind = lens_fitter(name, reference)
        self.preset, self.n, self.places = self.fitter.preset.name, n, np.flatnonzero(of_kind)
        self.reference, self.indices, self.images = reference, list[np.ndarray](), list[Tensor]()

    def add(self, indices: np.ndarray, images: Tensor) -> None:
        """Reconstructions (n, C, H, W) of images at these places of the data set; what is not needed is not kept."""
        missing = self.n - sum(map(len, self.images))
        chosen = np.flatnonzero(np.isin(indices, self.places))[: max(0, missing)]
        self.indices.append(indices[chosen])
        self.images.append(images[chosen])

    def score(self) -> dict[str, Any]:
        """{n, preset, of `real` images and their `reconstructions` what `lens_share` says}."""
        images, indices = torch.cat(self.images), np.concatenate(self.indices)
        if not len(images):
            raise UserError(f"--fit: none of the test images is of the first class of preset {self.preset}")
        fits = {
            "real": fit_images(of_data(self.reference, indices), self.fitter),
            "reconstructions": self.fitter.fit(images, progress=True),
        }
        return {"preset": self.preset, "n": len(images)} | {name: lens_share(found) for name, found in fits.items()}


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: VQVAE,
    reference: LensImages,
    n: int,
    networks: list[fid.Network],
    precision: str = "fp32",
    lens_fits: LensShare | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score reconstructions of n test images against n others -> metrics, and what pictures are drawn from.

    One pass over the images, BATCH at a time: memory does not grow with them.
    """
    transform = reference.transform
    if advice := hint(transform, reference.index["statistics"]):
        print(f"warning: {advice}", file=sys.stderr)
    half, other = halves(reference, n)
    simulation: Simulation | None = None
    try:
        simulation = Simulation(reference)
    except UserError as error:
        print(error)

    # Of the data and not of the model: pixels that are lit are the same for every model.
    bands = reference.batch(other[:256]).split(1, 1)
    background = torch.tensor([float(np.median(sky(band.numpy())[0])) for band in bands])[:, None, None]
    law, own_law = noise_law(model, reference, precision)
    dark_noise = float(law.a.sqrt().median())
    bright = transform.high - float(background.median())
    edges = torch.from_numpy(np.geomspace(min(2 * dark_noise, bright / 4), bright, 24)).float()
    residuals, noise = Residuals(edges), Residuals(edges)
    sums, truth_sums, indices_met = Sums(), Sums(), list[Tensor]()
    dark: dict[str, list[np.ndarray]] = {"real": [], "reconstructions": []}
    worst = np.zeros(n)

    def lit(clean: Tensor) -> Tensor:
        return transform.stretch(clean) - transform.stretch(background) > LIT * transform.span

    with tqdm(total=(4 if simulation else 3) * n, desc="scoring", unit="image", disable=None, leave=False) as bar:
        measured = {  # of real images what was measured for another model is kept
            "reference": Measured.of(of_data(reference, half), networks, transform, bar.update),
            "real": Measured.of(of_data(reference, other), networks, transform, bar.update),
            "reconstructions": Measured(networks, transform),
            TRUTH: Measured(networks, transform),
        }
        for start in range(0, n, BATCH):
            indices = other[start : start + BATCH]
            real = reference.batch(indices)
            clean, observed, codes, said = reconstruct(model, real, start, precision)
            indices_met.append(codes)
            measured["reconstructions"].add(observed)
            for name, some in (("real", real), ("reconstructions", observed)):
                dark[name].append(np.stack([sky(band.numpy())[1] for band in some.split(1, 1)]))
            variance, bright_pixels = spread(law, clean, said), lit(clean)
            residual = real - clean
            residuals.add(clean - background, residual, variance, bright_pixels)
            sums.similarity(transform.unit(clean), transform.unit(real), "observed")
            sums.add(residual=residual.square() * bright_pixels, law=variance * bright_pixels)
            chi2 = residual.square() / variance.clamp_min(1e-60)
            # An image that lights nothing is judged by all of its pixels.
            seen = bright_pixels | ~bright_pixels.flatten(1).any(1)[:, None, None, None]
            worst[start : start + len(indices)] = (chi2 * seen).flatten(1).sum(1) / seen.flatten(1).sum(1)
            if lens_fits:
                lens_fits.add(indices, observed)
            if simulation:
                try:
                    truth, _ = simulation(indices, real)
                except UserError as error:
                    print(error)
                    simulation = None
                else:
                    seeds = generators(start, len(truth))
                    where = model.latent_mean.device
                    heard = None if said is None else said.to(where)
                    measured[TRUTH].add(model.observe(truth.to(where), seeds, heard).cpu())
                    light = lit(truth)
                    noise.add(truth - background, real - truth, law.variance(truth), light)
                    truth_sums.similarity(transform.unit(clean), transform.unit(truth), "truth")
                    error2, noise2 = (clean - truth).square(), (real - truth).square()
                    truth_sums.add(lit_error=error2 * light, lit_noise=noise2 * light, lit=light)
                    truth_sums.add(dark_error=error2 * ~light, dark_noise=noise2 * ~light, all=torch.ones_like(light))
            bar.update(len(indices))
        if simulation:
            exposed = of_data(reference, other).changed(
                f"{AGAIN} {source(simulate)}", partial(_again, simulation, other)
            )
            measured[AGAIN] = Measured.of(exposed, networks, transform, bar.update)

    counts: list[np.ndarray] = []
    with_truth = (TRUTH, AGAIN) if simulation else ()
    candidates = {name: measured[name] for name in ("reconstructions", *with_truth)}
    scores = compare(measured["reference"], measured["real"], candidates)
    ratio = measured["reconstructions"].power.mean(0) / measured["real"].power.mean(0)
    metrics: dict[str, Any] = {
        "n": n,
        **transform.to_config(),
        "precision": precision,
        "latent_shape": list(model.latent_shape),
        "distances": scores["distances"],
        "truth": None,
        "observed": sums.similar("observed") | {"clean_error_over_noise": sums.ratio("residual", "law") - 1},
        "physics": scores["physics"],
        "spectrum": {"k": measured["real"].k.tolist(), "ratio": ratio.tolist()},
        "noise": {
            "law": {name: value.tolist() for name, value in law.state_dict().items()},
            "of_the_model": own_law,
            "background": background.flatten().tolist() if len(background) > 1 else float(background),
            "dark": {name: np.median(np.concatenate(parts, 1), 1).tolist() for name, parts in dark.items()},
            "residuals": residuals.curve(),
            "correlation": residuals.correlation(),
        },
        "codes": None,
        "worst": {"index": other[np.argsort(-worst)[:WORST]].tolist(), "chi2_lit": np.sort(worst)[::-1][:WORST].tolist()},
        "cost": cost(model, reference.batch(other[:BATCH]), precision),
    }  # fmt: skip
    if simulation:
        metrics["truth"] = truth_sums.similar("truth") | {
            "lit_error_over_noise": truth_sums.ratio("lit_error", "lit_noise"),
            "dark_error_over_noise": truth_sums.ratio("dark_error", "dark_noise"),
            "lit_share": truth_sums.ratio("lit", "all"),
        }
        metrics["noise"] |= {"true": noise.curve(), "true_correlation": noise.correlation()}
    if model.quantizer.codes:
        metrics["codes"], counts = code_use(torch.cat(indices_met), model.quantizer)
    if lens_fits:
        metrics["lens_fits"] = lens_fits.score()
    found = {
        "sets": {name: measured[name] for name in ("real", *candidates)},
        "codes": counts,
        "shown": pictured(model, reference, other[:SHOWN], law, precision),
        "worst": pictured(model, reference, np.array(metrics["worst"]["index"]), law, precision),
    }
    return metrics, found


def _again(simulation: Simulation, places: np.ndarray, images: Tensor, chosen: np.ndarray) -> Tensor:
    """Other exposures of images, of those places of the data set that are chosen."""
    return simulation(places[chosen], images)[1]


def generators(first: int, count: int) -> list[torch.Generator]:
    """Of the pixel noise of reconstructions first ... first + count - 1: one an image, whatever the batch."""
    return [torch.Generator().manual_seed(NOISE_SEEDS + first + k) for k in range(count)]


@torch.no_grad()
def reconstruct(
    model: VQVAE, images: Tensor, first: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """images (n, C, H, W) -> clean and observed reconstructions, codes (n, h, w) or (n, h, w, heads), and what the decoder
    says of the noise, if it does; on the CPU."""
    device = model.latent_mean.device
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    with autocast(device, precision):
        latents = model.encode(images)
        clean, said = model.decode_clean(latents)
        observed = model.observe(clean, generators(first, len(images)), said)
        codes = model.quantizer(model.features(model.transform(images)))[1]
    said = None if said is None else said.cpu()
    return clean.cpu().contiguous(), observed.cpu().contiguous(), codes.cpu(), said


def spread(law: NoiseLaw | NoiseLaws, clean: Tensor, said: Tensor | None) -> Tensor:
    """Variance of the noise of each pixel, by the law and what the decoder says of it."""
    return law.variance(clean) * (1.0 if said is None else said.exp())


def code_use(indices: Tensor, quantizer: Quantizer) -> tuple[dict[str, Any], list[np.ndarray]]:
    """indices as the quantiser gives them -> {codes, heads, codes_used, perplexity}, means over the heads, with the sum of
    the `dead` codes, or of a grid with `levels_used`, of each dimension; and how often codes or levels are met.

    The counts are of each head, most first, or of each dimension, by level: images meet but few codes of a large grid.
    """
    usage = CodeUsage(quantizer.codes, quantizer.heads, quantizer.levels)
    usage.update(indices)
    found, counts = usage.compute(), [count.numpy() for count in usage.counts()]
    metrics: dict[str, Any] = {"codes": quantizer.codes, "heads": quantizer.heads}
    metrics |= {key: found[key] for key in ("codes_used", "perplexity")}
    if quantizer.levels:
        return metrics | {"levels_used": usage.levels_used()}, counts
    return metrics | {"dead": int(found["dead_codes"])}, [np.sort(count)[::-1] for count in counts]


@torch.no_grad()
def noise_law(model: VQVAE, reference: LensImages, precision: str) -> tuple[NoiseLaw | NoiseLaws, bool]:
    """The model's noise law on the CPU, and True; where it has none one that is fitted to validation images, and False."""
    law = deepcopy(model.noise).cpu()
    if bool((law.a > 0).any()):
        return law, True
    held_out = reference.shuffled("validation")
    real = reference.batch((held_out if len(held_out) else reference.shuffled("test"))[:FITTED_TO])
    law = law_of(reference.image_shape[0])
    law.fit(real, torch.cat([reconstruct(model, batch, 0, precision)[0] for batch in real.split(BATCH)]))
    return law, False


@torch.no_grad()
def cost(model: VQVAE, images: Tensor, precision: str) -> dict[str, float]:
    """GFLOP an image, two operations for a multiplication and addition, and images a second, of both directions."""
    device, gflop = model.latent_mean.device, flops(model)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    with autocast(device, precision):
        latents = model.encode(images)
        return {
            "encode_gflop": gflop["encode"],
            "decode_gflop": gflop["decode"],
            "encoded_per_second": len(images) / seconds(lambda: model.encode(images), device),
            "decoded_per_second": len(images) / seconds(lambda: model.decode(latents), device),
        }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median over TIMED seconds of calls, after one that warms up."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    taken: list[float] = []
    while sum(taken) < TIMED:
        taken.append(once())
    return float(np.median(taken))


def pictured(
    model: VQVAE, reference: LensImages, indices: np.ndarray, law: NoiseLaw | NoiseLaws, precision: str
) -> tuple[Tensor, ...]:
    """Images, their clean and their observed reconstructions, and the variance of their noise, each (n, C, H, W)."""
    real = reference.batch(indices)
    clean, observed, _, said = reconstruct(model, real, 0, precision)
    return real, clean, observed, spread(law, clean, said)


if __name__ == "__main__":
    guard(main)
