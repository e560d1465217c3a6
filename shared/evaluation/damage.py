"""`lens-ldm test-metrics data/NAME`: what does each metric see, and what is it blind to?

Real images take the place of samples: as they are, and damaged in ways that generators fail in. Every metric of
`lens-ldm evaluate` judges each of these sets; what stands out is marked. A metric that marks undamaged images cannot be
trusted, one that marks nothing that no other marks is not needed. Writes OUT/damage.md and OUT/damage.json, set by set: a run
that is stopped goes on there. The damages to noise need images of `lens-ldm simulate`, whose clean light is known.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm import tqdm

from shared import evaluation, metrics
from shared.cli import Parser, positive
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation import judge, tables
from shared.evaluation.measure import ImageSet, of_data, source
from shared.evaluation.reference import LARGEST, add_networks, chosen_networks, halves
from shared.evaluation.verdict import LEVEL, SMOOTH, agreeing, fewer, off, stands_out
from shared.files import make_folder, markdown, resumed, write_atomically
from shared.metrics.physics import summaries
from shared.simulate.again import Simulation

Damage = Callable[[Tensor, np.ndarray], Tensor]  # images (n, C, H, W) and their places in the set -> the same, damaged
REPEATED = 32
KEPT = 0.7  # share of the ring radii that a dropped mode leaves


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm test-metrics`."""
    parser = Parser("lens-ldm test-metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="data/NAME", help="prepared or simulated images")
    parser.add_argument(
        "--count", type=positive, help=f"images a set (default: a third of the test split, at most {LARGEST})"
    )
    add_networks(parser)
    judge.add_parts(parser)
    parser.add_argument("--out", type=Path, help="folder (default: damage-NAME)")
    a = parser.parse_args(argv)
    networks, reference = chosen_networks(a), LensImages(a.reference)
    most = len(reference.split("test")) // 3
    if most < 20 or (a.count or 20) > most:
        raise UserError(f"{a.reference} allows --count 20 to {most}, a third of its test images, not {a.count or 20}")
    count = a.count or min(most, LARGEST)
    a.protocol = []
    plan = judge.plan(a, reference, networks, count)
    sets = damaged(reference, count)
    out = a.out or Path(f"damage-{reference.name}")
    make_folder(out)
    about = {
        "reference": reference.fingerprint, "n": count, "fit": plan.fits, "skip": sorted(plan.skip),
        "preset": plan.fitter.preset.name if plan.fitter else None, "networks": [network.metric for network in networks],
        "code": source(metrics, evaluation),
    }  # fmt: skip
    found = resumed(out / "damage.json", about, "sets") or {}
    for name, images in tqdm(sets.items(), desc="sets", unit="set", disable=None):
        if name not in found:
            found[name] = tables.finite(judge.judge(plan, {"samples": images}, {}).metrics)
            write_atomically(out / "damage.json", (json.dumps({**about, "sets": found}, indent=1) + "\n").encode())
    text = markdown(rows({name: found[name] for name in sets}))
    write_atomically(out / "damage.md", (text + "\n").encode())
    print(text)
    print(f"n = {count}; **bold**: seen. {out / 'damage.md'}, {out / 'damage.json'}")


# --- damages ----------------------------------------------------------------------------------------------------------


def damaged(reference: LensImages, n: int) -> dict[str, ImageSet]:
    """{damage: n images}: of the test split what `halves` leaves, so that none of them is the reference or the floor."""
    rest = reference.shuffled("test")[2 * n :]
    base = rest[:n]
    images = of_data(reference, base)
    low, code = reference.value_range[0], source(sys.modules[__name__])

    def changed(how: str, damage: Damage) -> ImageSet:
        return images.changed(f"{how} {code}", damage)

    def diverged(x: Tensor, places: np.ndarray) -> Tensor:
        strength = torch.from_numpy(1.0 + (places % 10 == 0)).float()
        return low + (x - low) * strength[:, None, None, None]

    def other_half(x: Tensor, places: np.ndarray) -> Tensor:
        partners = reference.batch(np.roll(base, 1)[places])
        return torch.cat([x[..., : x.shape[-1] // 2], partners[..., x.shape[-1] // 2 :]], -1)

    def mirrored(x: Tensor, _: np.ndarray) -> Tensor:
        half = x[..., : x.shape[-1] // 2]
        return torch.cat([x[..., : x.shape[-1] - half.shape[-1]], half.flip(-1)], -1)

    train = reference.split("train")
    sets = {
        "the reference itself": of_data(reference, halves(reference, n)[0]),
        "other real images": images,
        "blur 0.5 px": changed("blurred 0.5", lambda x, _: blurred(x, 0.5)),
        "blur 1 px": changed("blurred 1", lambda x, _: blurred(x, 1.0)),
        "blocks of 8, 10 %": changed("blocks", lambda x, _: 0.9 * x + 0.1 * blocks(x)),
        "10 % fainter": changed("fainter", lambda x, _: low + 0.9 * (x - low)),
        "10 % diverged": changed("diverged", diverged),
        "halves of two lenses": changed("halves", other_half),
        "mirrored halves": changed("mirrored", mirrored),
        f"{REPEATED} images repeated": images.subset(np.arange(n) % REPEATED),
        "a tenth copied from training": copied(images, of_data(reference, train)),
    }
    if (rings := without_large_rings(reference, n, rest)) is not None:
        sets["no large rings"] = rings
    try:
        simulation = Simulation(reference)
        simulation(base[:1], reference.batch(base[:1]))
    except UserError as error:
        print(f"no damages to noise: {error}")
        return sets

    def noise(factor: float) -> Damage:
        def change(x: Tensor, places: np.ndarray) -> Tensor:
            clean = simulation(base[places], x)[0]
            return clean + factor * (x - clean)

        return change

    return sets | {
        "noise removed": changed("without noise", noise(0.0)),
        "noise 10 % too strong": changed("noise by 1.1", noise(1.1)),
        "noise doubled": changed("noise by 2", noise(2.0)),
    }


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images (n, C, H, W) after a Gaussian of sigma pixels."""
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))


def blocks(x: Tensor, side: int = 8) -> Tensor:
    """Images (n, C, H, W) as means over squares."""
    means = F.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False)
    return means.repeat_interleave(side, -2).repeat_interleave(side, -1)[..., : x.shape[-2], : x.shape[-1]]


def copied(images: ImageSet, train: ImageSet) -> ImageSet:
    """Every tenth of the images is a training image."""

    def change(x: Tensor, places: np.ndarray) -> Tensor:
        copies = places % 10 == 0
        if copies.any():
            x = x.clone()
            x[torch.from_numpy(copies)] = train.get(places[copies] % len(train))
        return x

    return images.changed(f"with copies of {train.key}, {source(sys.modules[__name__])}", change)


def without_large_rings(reference: LensImages, n: int, rest: np.ndarray) -> ImageSet | None:
    """Real images whose ring radius is not among the largest; None if there are too few."""
    pool = np.concatenate([rest, reference.split("validation")])
    radii = np.concatenate(
        [summaries(batch, reference.value_range)["ring_radius"] for batch in reference.batches(pool)]
    )
    small = pool[radii <= np.quantile(radii, KEPT)]
    return of_data(reference, small[:n]) if len(small) >= n else None


# --- the table --------------------------------------------------------------------------------------------------------


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each metric, a column for each damage; what is seen is bold."""
    seen = {name: cells(metrics) for name, metrics in found.items()}
    names = list(dict.fromkeys(metric for one in seen.values() for metric in one))
    table = [["", *seen]]
    for metric in names:
        row = [one.get(metric, ("–", False)) for one in seen.values()]
        table.append([metric, *(f"**{text}**" if noticed else text for text, noticed in row)])
    return table


def cells(metrics: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """{metric: (its value in words, whether it stands out from real images)}."""
    found = {}
    for metric, scores in metrics["distances"].items():
        s = scores["samples"]
        found[f"{metric}, excess"] = (f"{s['excess']:.2f}", stands_out(s))
    for network, several in metrics.get("distributions", {}).items():
        for metric, scores in several.items():
            s = scores["samples"]
            name = f"{tables.SHOWN_AS[metric]}, {network.removeprefix('fd_')}"
            step = 0 if "interval" in s else 1 / s["n"]  # shares come in steps, and few splits may all have one
            found[name] = (f"{s['value']:.2f}", stands_out(s, step))
    agree = agreeing(metrics["spectrum"]["samples"])
    found["power spectrum, share of k as in real"] = (f"{agree:.0%}", agree < 1 - SMOOTH)
    noticed = off(metrics["physics"]["samples"])
    for quantity, s in metrics["physics"]["samples"].items():
        ratio = "∞" if s["ratio"] is None else f"{s['ratio']:.1f}"
        found[f"{quantity.replace('_', ' ')}, W1 over real"] = (ratio, quantity in noticed)
    if fits := metrics.get("lens_fits"):
        share, real = fits["samples"], fits["real"]
        found["lenses at the noise level"] = (f"{share['share']:.0%}", fewer(share, real))
        populations = off(metrics["population"]["samples"])
        worst = max((s["ratio"] or 0 for s in metrics["population"]["samples"].values()), default=0)
        found["fitted parameters, worst W1 over real"] = (f"{worst:.1f}", bool(populations))
    if told := metrics.get("two_sample"):
        s = told["samples"]
        found["told apart, AUC"] = (f"{s['auc']:.2f}", s["auc_interval"][0] > 0.5)
    for where, one in metrics.get("memory", {}).items():
        found[f"copies, {where}"] = (f"{one['copies']}", min(one["p_copies"], one["p"]) < LEVEL / 2)
    return found
