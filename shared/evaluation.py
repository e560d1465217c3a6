"""What the evaluations of both stages have in common: two halves of the test split, sets of images that are measured
batch by batch and so need not fit in memory, the tables and the curves of a report."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from shared.autoencoder import Autoencoder
from shared.checkpoint import require_units
from shared.cli import positive
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.metrics import efficientnet, fid, physics
from shared.metrics.lens_fit import LensFits, LensFitter
from shared.report import panels, rasterise
from shared.simulate.preset import Preset

LARGEST = 2500  # images a side by default: 1/n has fallen below the differences of interest
BATCH = 32  # images at once; with 64 an evaluation takes 0.2 GB more and no less time
NOISE_SEEDS = 1 << 31  # of the reconstructions' pixel noise, away from those of samples
BINS = 100  # of the histogram of pixel values


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every evaluation: what it compares with, by which networks, where to."""
    parser.add_argument("--reference", required=True, help="prepared data set, such as data/NAME")
    parser.add_argument(
        "--count", type=positive, help=f"images a side (default: half the test split, at most {LARGEST})"
    )
    parser.add_argument("--fid", action="store_true", help="also `fid` on Inception features; needs their weights")
    parser.add_argument("--inception-weights", type=Path, help="file of those weights; implies --fid")
    parser.add_argument("--download", action="store_true", help="fetch them once (91 MB); implies --fid")
    parser.add_argument("--out", type=Path, help="folder (default: evaluation/ beside the model)")


def chosen_networks(options: argparse.Namespace) -> list[fid.Network]:
    """The networks whose features are compared. UserError if one is asked for whose weights are not there."""
    networks: list[fid.Network] = [efficientnet.efficientnet_lite0()]
    if options.fid or options.inception_weights or options.download:
        networks.append(fid.inception(options.inception_weights, options.download))
    return networks


def check_reference(
    autoencoder: Autoencoder, reference: LensImages, name: str, count: int | None, trained_on: str
) -> int:
    """How many images a side there will be. UserError if the data are of another shape or unit, or too few."""
    if autoencoder.image_shape != reference.image_shape:
        raise UserError(f"the model makes images {autoencoder.image_shape}, {name} has {reference.image_shape}")
    require_units(autoencoder, reference.transform, f"the model of {trained_on}")
    return check_count(reference, name, count)


def check_count(reference: LensImages, name: str, count: int | None) -> int:
    """`count`, or as many as there can be. UserError if the test split is too small for it."""
    most = len(reference.split("test")) // 2
    if most < 2 or (count or 2) > most:
        raise UserError(
            f"{name} has {2 * most} test images, which allow --count {most} (two disjoint halves, one of them for the floor), "
            f"not {count or 2}: ask for fewer, or prepare more images"
        )
    if count == 1:
        raise UserError("a distance between sets of images needs --count 2 at least")
    return count or min(most, LARGEST)


def halves(reference: LensImages, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of n test images, as sorted indices (n,): the reference, and the other half."""
    order = np.random.default_rng(0).permutation(reference.split("test"))
    return np.sort(order[:n]), np.sort(order[n : 2 * n])


def lens_fitter(preset_name: str, reference: LensImages) -> tuple[LensFitter, np.ndarray]:
    """The fitter of a preset, of its first class if it has some, and which images (len(reference),) bool it is for.

    UserError if there is no such preset, or if it makes images of another size.
    """
    preset = Preset.load(preset_name)
    made = (1, preset.pixels, preset.pixels)
    if reference.image_shape != made:
        raise UserError(f"--preset {preset_name} makes images {made}, {reference.path} has {reference.image_shape}")
    kind, classes = next(iter(preset.classes), None), reference.index.get("classes") or []
    of_kind = np.ones(len(reference), bool)
    if kind in classes:
        of_kind = np.asarray(reference.index["labels"]) == classes.index(kind)
    return LensFitter(preset, kind=kind), of_kind


def lens_share(fits: LensFits) -> dict[str, Any]:
    """{n, share of lenses at the level of their noise, its 95 % interval (Wilson), median chi2 per pixel and per lit pixel}."""
    good = int(fits.consistent().sum())
    interval = stats.binomtest(good, len(fits)).proportion_ci(method="wilson")
    return {
        "n": len(fits), "share": good / len(fits), "interval": [float(interval.low), float(interval.high)],
        "chi2": float(np.median(fits.chi2)), "chi2_lit": float(np.median(fits.chi2_lit)),
    }  # fmt: skip


class Measured:
    """All that is measured of a set of images, collected batch by batch.

    features    {metric: (N, d)} of each network, float32
    summaries   {quantity: (N,)} of shared/metrics/physics.py
    k, power    (K,) [cycles/pixel], (N, K)
    edges       (BINS + 1,) of the histogram `counts` (BINS,) of pixel values, even in what the network sees
    """

    def __init__(self, networks: Iterable[fid.Network], transform: PixelTransform) -> None:
        self.networks, self.transform = list(networks), transform
        ends = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
        self.edges, self.counts = transform.inverse(ends).numpy(), np.zeros(BINS)
        self.k = np.empty(0)
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, images: Tensor) -> None:
        """images (n, C, H, W), in the data's own units."""
        seen = self.transform.unit(images)
        for network in self.networks:
            features = fid.features(network, seen, (0.0, 1.0))
            self._collect(f"features {network.metric}", features.astype(np.float32))  # as the network gave them
        for name, values in physics.summaries(images, (self.transform.low, self.transform.high)).items():
            self._collect(f"summaries {name}", values)
        self.k, power = physics.radial_power_spectrum(images)
        self._collect("power", power)
        self.counts += np.histogram(images.double().numpy(), self.edges)[0]

    def add_all(self, images: Tensor, progress: Callable[[int], object] | None = None) -> None:
        """`add` of images (N, C, H, W), BATCH at a time; `progress` is told how many are done."""
        for batch in images.split(BATCH):
            self.add(batch)
            if progress is not None:
                progress(len(batch))

    def _collect(self, name: str, values: np.ndarray) -> None:
        self._parts.setdefault(name, []).append(values)

    def _named(self, kind: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"{kind} "): np.concatenate(parts)
            for key, parts in self._parts.items()
            if key.startswith(f"{kind} ")
        }

    @property
    def features(self) -> dict[str, np.ndarray]:
        return self._named("features")

    @property
    def summaries(self) -> dict[str, np.ndarray]:
        return self._named("summaries")

    @property
    def power(self) -> np.ndarray:
        return np.concatenate(self._parts["power"])

    def __len__(self) -> int:
        return sum(map(len, self._parts.get("power", [])))


def compare(reference: Measured, real: Measured, candidates: dict[str, Measured]) -> dict[str, Any]:
    """Scores of each candidate beside the floor, that of the other half of the real images, as plain types:

    distances   {metric: {candidate: Score}}
    physics     {candidate: {quantity: {w1, floor, ratio}}}
    """
    transform, distances = reference.transform, {}
    for network in reference.networks:
        found = {name: one.features[network.metric] for name, one in candidates.items()}
        near, far = (one.features[network.metric] for one in (reference, real))
        value_range = (transform.low, transform.high)
        scores = fid.score(near, far, found, network, value_range, stretch=transform.stretched)
        distances[network.metric] = {name: score.to_dict() for name, score in scores.items()}
    pairs = reference.summaries, real.summaries
    compared = {name: physics.compare(*pairs, one.summaries) for name, one in candidates.items()}
    return {"distances": distances, "physics": compared}


def finite(tree: Any) -> Any:
    """The same with null for what JSON has no number for, such as a ratio to a floor of 0."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
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
    """The table of quantities, header first: the distance between real sets, then distances with their ratio to it.

    Where all real images have one value, such as the peak of images that were scaled to it, there is no ratio.
    """

    def cell(score: dict[str, float]) -> str:
        return f"{score['w1']:.2g}" + (f" (× {score['ratio']:.2f})" if score["floor"] else "")

    rows = [["quantity", "real", *scores]]
    for quantity, first in next(iter(scores.values())).items():
        rows.append([quantity, f"{first['floor']:.2g}", *(cell(one[quantity]) for one in scores.values())])
    return rows


def spectra(sets: dict[str, Measured]) -> Any:
    """Azimuthal power spectra of sets of images, `real` among them, their ratio to it, and histograms of the pixels."""
    figure, (power, ratio, histogram) = panels(3, width=4.4)
    transform, real = sets["real"].transform, sets["real"].power.mean(0)
    edges = sets["real"].edges - transform.pivot
    for j, (name, one) in enumerate(sets.items()):
        style = {"color": "k"} if name == "real" else {"color": f"C{j - 1}", "ls": "--" if j == 1 else "-"}
        mean = one.power.mean(0)
        power.plot(one.k, mean, lw=1.3, label=name, **style)
        if name != "real":
            ratio.plot(one.k, mean / real, lw=1.3, label=f"{name} / real", **style)
        density = one.counts / max(one.counts.sum(), 1) / np.diff(edges)
        histogram.stairs(density, edges, label=name, color=style["color"])
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
