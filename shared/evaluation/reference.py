"""What an evaluation compares with: two halves of the test split, by networks that are chosen, and what can be wrong there."""

import argparse
from pathlib import Path

import numpy as np

from shared.autoencoder import Autoencoder
from shared.checkpoint import require_units
from shared.cli import positive
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.metrics import efficientnet, fid

LARGEST = 2500  # images a side by default: 1/n has fallen below the differences of interest
NOISE_SEEDS = 1 << 31  # of the reconstructions' pixel noise, away from those of samples


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every evaluation: what it compares with, by which networks, where to."""
    parser.add_argument("--reference", required=True, help="prepared data set, such as data/NAME")
    parser.add_argument(
        "--count", type=positive, help=f"images a side (default: half the test split, at most {LARGEST})"
    )
    add_networks(parser)
    parser.add_argument("--out", type=Path, help="folder (default: evaluation/ in that of the model, beside samples)")


def add_networks(parser: argparse.ArgumentParser) -> None:
    """By which networks."""
    parser.add_argument("--fid", action="store_true", help="also `fid` on Inception features; needs their weights")
    parser.add_argument("--inception-weights", type=Path, help="file of those weights; implies --fid")
    parser.add_argument("--download", action="store_true", help="fetch them once (91 MB); implies --fid")


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
    """`count`, or as many as there can be. UserError if the test split is too small for it, or its images have bands that
    no score is of."""
    if (bands := reference.image_shape[0]) not in (1, 3):
        raise UserError(f"{name} has images of {bands} bands: scores are of one band, or of three")
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
    """Two disjoint sets of n test images in random order, as indices (n,): the reference, and the other half."""
    order = reference.shuffled("test")
    return order[:n], order[n : 2 * n]
