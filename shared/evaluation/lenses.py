"""Which images are lenses, and which lenses: fits of a preset's lens model to sets of images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation.measure import ImageSet, Measure, measure, source
from shared.evaluation.tables import LIT
from shared.metrics import lens_fit, obedience, physics
from shared.metrics.lens_fit import LensFits, LensFitter
from shared.report import grid
from shared.simulate import lens
from shared.simulate import preset as preset_module
from shared.simulate.again import preset_of
from shared.simulate.preset import AXES, Preset

LOOSE = 5.0  # degrees: angles with larger errors of their fit are not compared,
NARROW = 1 / 3  # nor with errors above this part of the spread of what was asked


def lens_fitter(preset_name: str | None, reference: LensImages) -> tuple[LensFitter, np.ndarray]:
    """The fitter of a preset, of its first class if it has some, and which images (len(reference),) bool it is for.

    preset_name  None: of the preset that the images were simulated with
    UserError if there is no such preset, or if it makes images of another size.
    """
    preset = preset_of(reference) if preset_name is None else Preset.load(preset_name)
    if preset is None:
        raise UserError(
            f"{reference.path} was not simulated here: name the preset of its lenses, such as deeplense, or ask for no fits"
        )
    made = (1, preset.pixels, preset.pixels)
    if reference.image_shape != made:
        raise UserError(f"--preset {preset.name} makes images {made}, {reference.path} has {reference.image_shape}")
    kind, classes = next(iter(preset.classes), None), reference.index.get("classes") or []
    of_kind = np.ones(len(reference), bool)
    if kind in classes:
        of_kind = np.asarray(reference.index["labels"]) == classes.index(kind)
    return LensFitter(preset, kind=kind), of_kind


def fit_images(images: ImageSet, fitter: LensFitter, what: str = "lens fits") -> LensFits:
    """Fits of all these images, but for `clean`, which is left empty."""

    def call(batch: Tensor) -> dict[str, np.ndarray]:
        return fitter.fit(batch).columns()

    free = ", ".join(fitter.coordinates.names)
    identity = f"{fitter.preset.model_dump_json()} {free} {fitter.noise} {fitter.margin} {source(lens_fit, lens, preset_module)}"
    with tqdm(total=len(images), desc=what, unit="image", disable=None, leave=False) as bar:
        found = measure(images, [Measure("lens fits", identity, call)], bar.update)
    return LensFits.of_columns(found["lens fits"])


def lens_share(fits: LensFits) -> dict[str, Any]:
    """{n, share of lenses at the level of their noise, its 95 % interval (Wilson), both by lit pixels alone, median chi2 per
    pixel and per lit pixel}."""
    found: dict[str, Any] = {
        "n": len(fits),
        "chi2": float(np.median(fits.chi2)),
        "chi2_lit": float(np.median(fits.chi2_lit)),
    }
    for of in ("", LIT):
        good = int(fits.consistent(lit=of == LIT).sum())
        interval = stats.binomtest(good, len(fits)).proportion_ci(method="wilson")
        found |= {f"share{of}": good / len(fits), f"interval{of}": [float(interval.low), float(interval.high)]}
    return found


def told_and_found(fits: LensFits, truth: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How far fitted parameters are from the truth, {name: (N,)}, where there is one."""
    parameters = {}
    for name, values in fits.parameters.items():
        if name in truth:
            axis, asked = name in AXES, np.asarray(truth[name], float)
            # What is almost round has no angle, whatever was asked for; an angle out of few says less by its fit.
            loose = min(LOOSE, NARROW * obedience.spread_of_axes(asked)) if axis else np.inf
            known = np.where(fits.errors[name] < loose, values, np.nan) if axis else values
            parameters[name] = obedience.obedience(asked, known, axis)._asdict()
    return parameters


def population(reference: LensFits, real: LensFits, candidate: LensFits) -> dict[str, dict[str, float]]:
    """How far the lenses of `candidate` are distributed from real ones: {parameter: {w1, floor, ratio, ...}}."""
    return physics.compare(reference.parameters, real.parameters, candidate.parameters, axes=AXES)


def residuals(images: np.ndarray, fits: LensFits, places: np.ndarray) -> Image.Image:
    """At these places of images (N, C, H, W): image, model, and residual over the noise of each pixel, from -5 to 5."""
    image, model = images[places], fits.clean[places]
    low, high = image.min((1, 2, 3), keepdims=True), image.max((1, 2, 3), keepdims=True)
    span = np.maximum(high - low, 1e-30)
    sigma = np.sqrt([fits.variance(i) for i in places])
    rows = [(image - low) / span, (model - low) / span, (image - model) / np.maximum(sigma, 1e-30) / 10 + 0.5]
    chi2 = ", ".join(f"{fits.chi2[i]:.2f}" for i in places)
    title = f"image, lens model, residual +-5 sigma; the worst chi2 per pixel: {chi2}"
    return grid(np.concatenate(rows), columns=len(places), title=title)
