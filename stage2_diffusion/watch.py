"""What a training run is watched by beside its loss: whether it memorises, how far its samples are from real images."""

import math

import numpy as np
import torch
from torch import Tensor

from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation.measure import BATCH
from shared.metrics import fid
from shared.metrics.efficientnet import efficientnet_lite0
from stage2_diffusion.generator import Generator

SURE = 4.0  # standard errors; a run is asked some tens of times
SCORE_SEEDS = 1 << 30  # of the samples that are scored, away from those of previews and of users


class Memorisation:
    """Notices that a network goes on to learn its training images and no longer what they have in common.

    Given errors under the same noise at every validation, an image is its own control: the difference to the best
    validation so far has little of the scatter of the errors. Where all errors go up or down together, as with a high
    learning rate, only their level changes; what tells is that those of held-out images rise while those of training
    images fall, each beyond `SURE` standard errors.
    """

    def __init__(self) -> None:
        self.best: tuple[Tensor, Tensor] | None = None
        self.told = False

    def __call__(self, held_out: Tensor, seen: Tensor) -> bool:
        """Log errors of held-out images (n,) and of training images (m,) -> whether to warn, which is once."""
        if self.best is None or held_out.mean() <= self.best[0].mean():
            self.best = held_out, seen
            return False
        rise, fall = (_z(now - then) for now, then in zip((held_out, seen), self.best, strict=True))
        warn = rise > SURE and fall < -SURE and not self.told
        self.told |= warn
        return warn


def gap_z(held_out: Tensor, seen: Tensor) -> float:
    """By how many standard errors the mean of one exceeds that of the other, (n,) and (m,)."""
    error = math.sqrt(float(held_out.var()) / len(held_out) + float(seen.var()) / len(seen))
    return float(held_out.mean() - seen.mean()) / max(error, 1e-12)


def _z(differences: Tensor) -> float:
    return float(differences.mean()) / max(float(differences.std()) / math.sqrt(len(differences)), 1e-12)


class Distance:
    """Fréchet distance (EfficientNet-Lite0) of n samples to validation images, with its floor: n training images.

    n   at most; as many as there are validation images. UserError if those are fewer than two
    """

    def __init__(self, images: LensImages, n: int) -> None:
        train, held_out = images.shuffled("train"), images.shuffled("validation")
        if len(held_out) < 2:
            raise UserError(
                f"trainer.score_every needs validation images, {images.path} has {len(held_out)}: prepare more"
            )
        self.n, self.transform, self.network = min(n, len(train), len(held_out)), images.transform, efficientnet_lite0()
        self.reference, self.real = (
            np.concatenate([self._features(batch) for batch in images.batches(split[: self.n], BATCH)])
            for split in (held_out, train)
        )

    def __call__(self, generator: Generator) -> dict[str, float]:
        """fd, fd_floor, fd_floor_sd, fd_excess of samples of always the same seeds, and nearest: the median distance of
        their features to the nearest training image over that to the nearest validation image, 1 for new lenses."""
        seeds = range(SCORE_SEEDS, SCORE_SEEDS + self.n)
        drawn = np.concatenate([self._features(x.cpu()) for _, x in generator.sample(seeds, batch_size=BATCH)])
        span = self.transform.low, self.transform.high
        s = fid.score(self.reference, self.real, {"samples": drawn}, self.network, span)["samples"]
        to_seen, to_new = (_nearest(drawn, features) for features in (self.real, self.reference))
        return {
            "fd": s.distance, "fd_floor": s.floor, "fd_floor_sd": s.floor_sd, "fd_excess": s.excess,
            "nearest": float(np.median(to_seen / np.maximum(to_new, 1e-12))),
        }  # fmt: skip

    def _features(self, images: Tensor) -> np.ndarray:
        return fid.features(self.network, self.transform.unit(images), (0.0, 1.0), BATCH)


def _nearest(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each row (n, d) to the nearest of (m, d)."""
    return torch.cdist(torch.from_numpy(rows), torch.from_numpy(others)).amin(1).numpy()
