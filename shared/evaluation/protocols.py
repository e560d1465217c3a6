"""Protocols by name: what was done to images before a published distance was taken, how many of them there were, and which
real ones they were compared with. A number of the literature is answered on its own terms, and no others.

Each distance has beside it the floor of its own protocol: that of real images that no generator was trained on. The network
of a distance resizes to its own input in its own way (`Score.resizer`), which published code did in others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.autoencoder import resized
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation.measure import ImageSet, of_data


@dataclass(frozen=True)
class Protocol:
    """n images a side, as `view` shows them: images (N, C, H, W), the data's range being [0, 1] -> the same in [0, 1], which
    the network of the distance is given as 8 bits.

    rule      what of an image becomes 0 and 1
    against   the split that is the reference: "train", or "held-out" for images that the generator has not seen
    smallest  images that the protocol is for have this side at least
    """

    name: str
    about: str
    n: int
    against: Literal["train", "held-out"]
    view: Callable[[Tensor], Tensor]
    rule: str = "the data's range"
    smallest: int = 1

    def sets(self, reference: LensImages) -> tuple[ImageSet, ImageSet]:
        """Real images to compare with, and other real ones (held out) whose distance to those is the floor.

        UserError if the data set has too few, or too small ones.
        """
        if min(reference.image_shape[1:]) < self.smallest:
            raise UserError(f"protocol {self.name} is for images of {self.smallest} pixels a side and more")
        # Of held-out images the same halves as elsewhere: reconstructions are those of the other half.
        test = reference.shuffled("test")
        pool, others = (reference.shuffled("train"), test) if self.against == "train" else (test, test[self.n :])
        if min(len(pool), len(others)) < self.n:
            needed = f"{self.n} training and {self.n}" if self.against == "train" else f"{2 * self.n}"
            raise UserError(
                f"protocol {self.name} needs {needed} test images, {reference.path} has "
                f"{len(reference.split('train'))} and {len(test)}"
            )
        return of_data(reference, pool[: self.n]), of_data(reference, others[: self.n])


def crop(images: Tensor, side: int) -> Tensor:
    """The middle of images (N, C, H, W)."""
    top, left = ((full - side) // 2 for full in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def resize(images: Tensor, side: int) -> Tensor:
    return resized(images, (side, side))


def lanczos(images: Tensor, side: int) -> Tensor:
    """As PIL resizes floating-point images."""
    n, channels = images.shape[:2]
    planes = [
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.LANCZOS))
        for plane in images.flatten(0, 1).float().numpy()
    ]
    return torch.from_numpy(np.stack(planes)).reshape(n, channels, side, side)


def clip(images: Tensor, low: float = 0.01, high: float = 0.99) -> Tensor:
    """Each image's own quantiles become 0 and 1. All else is cut off: noise below, the brightest arcs above."""
    ends = torch.quantile(images.flatten(1), torch.tensor([low, high]), dim=1)[:, :, None, None, None]
    return ((images - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-12)).clamp(0, 1)


def min_max(images: Tensor) -> Tensor:
    """Each image's own extremes become 0 and 1, however far off they are: this hides samples that have diverged."""
    return clip(images, 0.0, 1.0)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "crop128-2500-train",
            "middle 128x128, 2,500 against 2,500 training images (published FID, the lowest near full size: 3.53, 100,000 steps)",
            2500, "train", lambda x: crop(x, 128), smallest=128,
        ),
        Protocol(
            "clip64-1000-train",
            "Lanczos to 64x64, each clipped to its 1 to 99 %, 1,000 against 1,000 training images (lowest published FID: 2.20)",
            1000, "train", lambda x: clip(lanczos(x, 64)), "1 and 99 % of each image",
        ),
        Protocol(
            "resize160-1000-heldout",
            "enlarged to 160x160, each image scaled to its own minimum and maximum, 1,000 held-out images (published FID: 8.03)",
            1000, "held-out", lambda x: min_max(resize(x, 160)), "extremes of each image",
        ),
        Protocol(
            "28px-100",
            "shrunk to 28x28, 100 against 100 training images (published FID: 27.9): the floor is most of any number found so",
            100, "train", lambda x: resize(x, 28),
        ),
    )
}  # fmt: skip
NATIVE = "native150"  # what `lens-ldm evaluate` does anyway: full resolution, held-out images, the data's own range


def chosen(names: list[str], reference: LensImages, available: int) -> list[Protocol]:
    """The protocols of these names; "all" stands for those that the data set and so many samples allow.

    UserError for another name, and for one that they do not allow.
    """
    wanted = {name for name in names if name not in (NATIVE, "all")}
    if unknown := sorted(wanted - PROTOCOLS.keys()):
        raise UserError(f"no protocol {unknown[0]!r}: choose from {NATIVE}, {', '.join(PROTOCOLS)}, all")
    found = []
    for name, protocol in PROTOCOLS.items():
        if name not in wanted and "all" not in names:
            continue
        try:
            if available < protocol.n:
                raise UserError(
                    f"protocol {name} needs {protocol.n} samples, these are {available} (--count {protocol.n}, with at least "
                    f"{2 * protocol.n} test images)"
                )
            protocol.sets(reference)
        except UserError as error:
            if name in wanted:
                raise
            print(f"left out: {error}")
        else:
            found.append(protocol)
    return found
