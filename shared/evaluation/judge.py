"""The whole judgement of samples: every metric beside what real images get by it, a verdict, a page.

`plan` finds whatever can be wrong before anything is measured, `judge` measures and compares.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from shared.cli import at_least
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation import lenses, protocols, scores
from shared.evaluation.measure import ImageSet, Measured, of_data
from shared.evaluation.protocols import Protocol
from shared.evaluation.reference import halves
from shared.evaluation.verdict import SKIPPABLE
from shared.metrics import fid, memorisation
from shared.metrics.lens_fit import LensFits, LensFitter
from shared.simulate.again import preset_of
from shared.simulate.preset import Preset

FITTED = 100  # images of each set, where their preset is known
WORST = 8
CLASS = "class"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is measured beside distances and physics, published protocols among it."""
    add_parts(parser)
    parser.add_argument(
        "--protocol", nargs="+", default=[], metavar="NAME",
        help=f"also as published numbers were taken: {', '.join(protocols.PROTOCOLS)}, all",
    )  # fmt: skip


def add_parts(parser: argparse.ArgumentParser) -> None:
    """What is measured beside distances and physics."""
    parser.add_argument(
        "--fit", type=at_least(0), metavar="N",
        help=f"fit lens models to N images of each set, some 0.2 s each (default: {FITTED} where the preset is known)",
    )  # fmt: skip
    parser.add_argument("--preset", help="of those lens models (default: that of the simulation)")
    parser.add_argument("--skip", nargs="+", default=[], choices=SKIPPABLE, help="leave out what takes long")


@dataclass
class Plan:
    """What is compared with what, by what. `near` is the reference, `far` the other half of the real images."""

    reference: LensImages
    networks: list[fid.Network]
    near: ImageSet
    far: ImageSet
    near_places: np.ndarray
    far_places: np.ndarray
    fitter: LensFitter | None
    of_kind: np.ndarray
    fits: int
    protocols: list[Protocol]
    skip: list[str]


def plan(options: argparse.Namespace, reference: LensImages, networks: list[fid.Network], count: int) -> Plan:
    """UserError if the data do not allow what the options ask for."""
    near, far = halves(reference, count)
    fits, fitter, of_kind = options.fit, None, np.ones(len(reference), bool)
    if fits is None:
        fits = FITTED if options.preset is not None or preset_of(reference) is not None else 0
    if fits:
        try:
            fitter, of_kind = lenses.lens_fitter(options.preset, reference)
        except UserError as error:
            if options.fit or options.preset:
                raise
            print(f"no lens fits: {error}")
            fits = 0
    if fits and min(of_kind[near].sum(), of_kind[far].sum()) < 2:
        few = f"fewer than two images in a half are of the first class of preset {fitter.preset.name if fitter else ''}"
        if options.fit or options.preset:
            raise UserError(f"--fit: {few}")
        print(f"no lens fits: {few}")
        fits, fitter = 0, None
    return Plan(
        reference, networks, of_data(reference, near), of_data(reference, far), near, far, fitter, of_kind,
        min(fits, int(of_kind[near].sum()), int(of_kind[far].sum())),
        protocols.chosen(options.protocol, reference, count), options.skip,
    )  # fmt: skip


@dataclass
class Evaluation:
    """Numbers, and the sets and what was measured of them, for pictures.

    lenses  {set: {parameter: (N,)}} of the lens fits, if there are any
    worst   the samples that a lens model fits worst, and these fits
    """

    metrics: dict[str, Any]
    reference: LensImages
    sets: dict[str, ImageSet]
    measured: dict[str, Measured]
    lenses: dict[str, dict[str, np.ndarray]]
    worst: tuple[np.ndarray, LensFits] | None


def judge(plan: Plan, candidates: Mapping[str, ImageSet], asked: Mapping[str, np.ndarray]) -> Evaluation:
    """Score candidates, `samples` among them, as many as there are images in either half.

    asked  what the samples were asked to be, {name: (N,)}
    """
    sets = {"reference": plan.near, "real": plan.far, **candidates}
    transform = plan.reference.transform
    n, measured = len(plan.near), {}
    fits = f", {plan.fits} lens fits of each" if plan.fitter is not None else ""
    print(f"measuring {len(sets)} sets of {n} images{fits}; what is done is kept", flush=True)
    with tqdm(total=len(sets) * n, desc="measuring", unit="image", disable=None, leave=False) as bar:
        for name, images in sets.items():
            bar.set_postfix_str(name)
            measured[name] = Measured.of(images, plan.networks, transform, bar.update)
    others = {name: measured[name] for name in candidates}
    near, far = measured["reference"], measured["real"]
    metrics = {"n": n, **transform.to_config(), **scores.compare(near, far, others), **scores.curves(far, others)}
    if "distributions" not in plan.skip:
        metrics["distributions"] = scores.distributions(near, far, others)
    found: dict[str, LensFits] = {}
    worst: tuple[np.ndarray, LensFits] | None = None
    if plan.fitter is not None:
        with _left_out("no lens fits"):
            more, found, places = fitted(plan, sets, asked)
            metrics |= more
            lost = sets["samples"].get(places[np.argsort(-found["samples"].chi2)[:WORST]]).numpy()
            worst = lost, plan.fitter.fit(lost)  # once more, for the models, which are not kept
    if "two-sample" not in plan.skip and n >= scores.FEWEST:
        with _left_out("no classifier of samples and real images"):
            metrics["two_sample"] = scores.told_apart(plan.near, plan.far, candidates)
    # What samples were asked for are far images: beside these, each would have a twin, nearer to it than any copy.
    unseen = np.setdiff1d(plan.reference.split("test"), plan.far_places if asked else [])
    if "memory" not in plan.skip and len(unseen) >= memorisation.FEWEST:
        metrics["memory"] = scores.memory(plan.reference, unseen, candidates["samples"])
    if "use" not in plan.skip and CLASS in asked:
        with _left_out("no classifier of classes"):
            metrics["use"] = scores.usefulness(plan.reference, plan.near_places, candidates["samples"], asked[CLASS])
    metrics["protocols"] = {
        one.name: scores.under_protocol(one, plan.reference, candidates, plan.networks) for one in plan.protocols
    }
    return Evaluation(
        metrics, plan.reference, sets, measured, {name: one.parameters for name, one in found.items()}, worst
    )


@contextlib.contextmanager
def _left_out(what: str) -> Iterator[None]:
    """What one part cannot measure is said, and does not cost the others."""
    try:
        yield
    except UserError as error:
        print(f"{what}: {error}")


def fitted(
    plan: Plan, sets: Mapping[str, ImageSet], asked: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, LensFits], np.ndarray]:
    """{lens_fits: {set: shares, chi2 and how far parameters are from the truth}, lens_preset, population: {candidate: ...}},
    the fits of each set but the reference, and which samples were fitted. UserError if there are none to fit.

    Of the first class of the preset, whose fitter it is; of all, real ones too, where it is not known which samples are.
    """
    assert plan.fitter is not None
    known = plan.reference.index.get("parameters", {})
    truth = {name: np.array(column["values"], float)[plan.far_places] for name, column in known.items()}
    classes = plan.reference.index.get("classes") or []
    if not np.isin(asked.get(CLASS, ""), classes).any():
        asked = {name: values for name, values in asked.items() if name != CLASS}
    of_kind = plan.of_kind if CLASS in asked else np.ones_like(plan.of_kind)
    near, far = (np.flatnonzero(of_kind[places]) for places in (plan.near_places, plan.far_places))
    ours = {"reference": near, "samples": fittable(plan.fitter.preset, asked, len(plan.near))}
    if not len(ours["samples"]):
        raise UserError(f"none of the samples was asked to be of the first class of preset {plan.fitter.preset.name}")
    fits, found = {}, {}
    for name, images in sets.items():
        places = ours.get(name, far)[: plan.fits]
        fits[name] = lenses.fit_images(images.subset(places), plan.fitter, f"lens fits, {name}")
        told = {"reference": {}, "samples": asked}.get(name, truth)
        told = {key: values[places] for key, values in told.items() if key != CLASS}
        found[name] = {**lenses.lens_share(fits[name]), "parameters": lenses.told_and_found(fits[name], told)}
    reference, real = fits.pop("reference"), fits["real"]
    del found["reference"]
    compared = {
        name: lenses.population(reference, real, one)
        for name, one in fits.items()
        if name != "real" and len(one) == len(real)
    }
    preset = {"name": plan.fitter.preset.name, "free": plan.fitter.coordinates.names, "fits": plan.fits}
    return {"lens_fits": found, "lens_preset": preset, "population": compared}, fits, ours["samples"][: plan.fits]


def fittable(preset: Preset, asked: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """The places, of n samples, that the fitter of a preset is for: of its first class, where they were asked for classes."""
    kind = next(iter(preset.classes), None)
    return np.flatnonzero(asked[CLASS] == kind) if CLASS in asked and kind is not None else np.arange(n)
