"""The report of an evaluation: one file, the verdict first, then pictures, curves, tables with their floors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.data.symmetries import apply
from shared.evaluation import lenses, tables
from shared.evaluation.judge import Evaluation
from shared.evaluation.verdict import unseen, verdict
from shared.report import Report, grid
from shared.simulate.again import preset_of

SHOWN, WORST = 24, 16


def report(evaluation: Evaluation, metrics: Mapping[str, Any]) -> Report:
    """The page, but for how it was made."""
    sets, measured, n = evaluation.sets, evaluation.measured, metrics["n"]
    transform = measured["real"].transform
    sampling = metrics.get("sampling")
    preset = preset_of(evaluation.reference)
    real = "real" if preset is None else f"real (here: simulated, preset {preset.name})"
    drawn = ""
    if sampling:
        times = "a grid fitted to the model" if sampling.get("times") else f"shift {sampling['shift']:g}"
        drawn = f", {sampling['steps']} steps of {sampling['sampler']} ({times})"
    page = Report(
        f"lens-ldm: {metrics['model']}",
        f"{n} samples{drawn}, beside {n} {real} images of the test split of {metrics['reference']}. All pictures are on one "
        f"scale, {transform.low:g} to {transform.high:g}, {transform.stretched}.",
    )
    page.verdict(verdict(metrics))
    if missing := unseen(metrics):
        page.note(missing[0].upper() + missing[1:] + ".")
    for name, heading in (
        ("samples", "Generated: the first samples, none picked"),
        ("real", "Real: test images, none picked"),
        ("reconstructions", "The same test images through the autoencoder and back"),
    ):
        if name in sets:
            page.section(heading).picture(grid(transform.unit(sets[name].first(SHOWN)), 8), heading)
    page.section("The worst samples: furthest from real ones in any one quantity").picture(
        grid(transform.unit(sets["samples"].get(worst(evaluation))), 8), "worst samples"
    )

    header, *rows = tables.score_rows(dict(metrics))
    page.section(
        "Distances",
        "Fréchet distance between sets of images; 0 would be the same distribution. A finite number of images keeps even "
        "real images from real images apart: that is the floor, and the excess over it hardly depends on n.",
    ).table(header, rows)
    for name, found in metrics["distances"].items():
        s = found["samples"]
        levels = f"{s['stretch']} grey levels, clamped and rounded to uint8"
        page.section("", f"{name}: features of {s['extractor']}, resized {s['resizer']}, {levels}.")
    if found := metrics.get("distributions"):
        header, *rows = tables.distribution_rows(found)
        page.section(
            "Distributions",
            "In the same features. KID: kernel distance, unbiased, with its 95 % interval. Precision and density: whether "
            "samples are where real images are; recall and coverage: whether they are everywhere there. Real: between real "
            "sets of as many images, mean and standard deviation over splits; to differ from it either way is a fault.",
        ).table(header, rows)
    if found := metrics.get("protocols"):
        header, *rows = tables.protocol_rows(found)
        page.section(
            "By published protocols",
            "Images treated as they were where such a number was published, each beside the floor of its own protocol. "
            "Published numbers are FIDs, on Inception features: compare them with rows called fid alone (--fid). "
            + "; ".join(f"{name}: {one['about']}" for name, one in found.items()) + ".",
        ).table(header, rows)  # fmt: skip
    if found := metrics.get("two_sample"):
        header, *rows = tables.told_apart_rows(found)
        page.section(
            "Told apart", "A small network learns to tell a set from real images; 0.5 is what chance gives."
        ).table(header, rows)

    header, *rows = tables.physics_rows(metrics["physics"])
    page.section(
        "Physics",
        "Wasserstein-1 distance of each quantity to real images, and how many times that between real images it is: 1 is "
        "perfect. Lengths in pixels, brightness in the data's range, angles in degrees. An exclamation mark: not distributed "
        f"as in real images (p below {tables.UNLIKELY:g}, Holm's correction).",
    ).table(header, rows)
    shown = {name: one for name, one in measured.items() if name != "reference"}
    page.picture(tables.spectra(shown), "power spectra, noise and pixel values")
    page.picture(
        tables.histograms({name: one.summaries for name, one in shown.items()}), "histograms of the quantities"
    )
    if found := metrics.get("memory"):
        header, *rows = tables.memory_rows(found)
        page.section(
            "Memory",
            "Training images looked for among the samples: a copy is nearer to one, over how near it is to test images, than "
            "all but 0.1 % of test images are. Planted copies say what the search is worth. Below: the samples that are "
            "nearest to a training image in either way, each above that image.",
        ).table(header, rows)
        for where, one in found.items():
            page.picture(closest(evaluation, one["closest"]), f"closest training images, {where}")
    if found := metrics.get("use"):
        header, *rows = tables.use_rows(found)
        page.section(
            "Use", "A classifier of the classes that samples were asked to be, trained and tested on either. Where the ceiling, "
            "real → real, is at chance (AUC 0.5), the others say nothing.",
        ).table(header, rows)  # fmt: skip
    if rows := tables.fit_rows(metrics.get("lens_fits")):
        page.section(
            "Lens fits",
            "A lens model fitted to each image: how many are lenses and nothing else but noise (chi² per pixel below 1.2 and "
            "above 1/1.2, at 10 sigma), 95 % intervals. Parameters against the true ones of real images and of their "
            "reconstructions, and against those that samples were asked for: median and robust standard deviation of the "
            "difference, share of the variance found.",
        ).table(rows[0], rows[1:])
        page.picture(tables.histograms(evaluation.lenses), "histograms of the fitted parameters")
        if evaluation.worst is not None:
            images, fits = evaluation.worst
            page.picture(
                lenses.residuals(images, fits, np.arange(len(fits))), "the samples that a lens model fits worst"
            )
        header, *rows = tables.physics_rows(metrics["population"])
        page.section("", "How these lenses are distributed: Wasserstein-1 distance of each fitted parameter.").table(
            header, rows
        )
    return page


def worst(evaluation: Evaluation) -> np.ndarray:
    """Places of the samples that are furthest from real images in any one quantity."""
    real, samples = (evaluation.measured[name].summaries for name in ("real", "samples"))
    apart = np.zeros(len(next(iter(samples.values()))))
    for name, values in samples.items():
        low, middle, high = np.quantile(real[name], [0.05, 0.5, 0.95])
        if high > low:
            apart = np.maximum(apart, np.abs(values - middle) / (high - low))
    return np.sort(np.argsort(-apart)[:WORST])


def closest(evaluation: Evaluation, pairs: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The samples that are nearest to a training image, above that image, turned as it is there."""
    transform, train = evaluation.reference.transform, evaluation.reference.split("train")
    samples = evaluation.sets["samples"].get(np.array([pair["generated"] for pair in pairs]))
    images = evaluation.reference.batch(train[[pair["train"] for pair in pairs]])
    turned = [apply(image[None], pair["element"]) for image, pair in zip(images, pairs, strict=True)]
    title = "distance to training over distance to test: " + ", ".join(f"{pair['ratio']:.2f}" for pair in pairs)
    return grid(transform.unit(torch.cat([samples, *turned])), len(pairs), title=title)
