"""Between a data set's own units and the network's range: chosen once, by `lens-ldm prepare --normalise`.

none             images as they are; their range is the one observed
fixed:LOW,HIGH   images as they are; their range is stated, such as 0,65535 of a 16-bit detector
minmax           each image, all its channels together, rescaled to [0, 1] when it is prepared; its own `low` and `high`
                 are kept beside it
asinh:SCALE      images as they are; the network sees asinh((x - pivot) / SCALE), pivot the level of the sky: linear in
                 its noise, logarithmic in the light (Lupton, Gunn & Szalay 1999). SCALE is the noise of the sky in the
                 data's units; auto: measured

The choice is a `Normalisation`, part of what identifies a cache. What it comes to is a `PixelTransform`, kept in the
cache's index and in every model, and undone by `decode`: samples come out in the data's own units.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

CHOICES = "none, minmax, fixed:LOW,HIGH, asinh:SCALE or asinh:auto"
SPANS = (1e-12, 1e15)  # of a range: a noise law holds squares of its hundred-thousandth, in float32
LEVELS = 8  # of 256 grey levels: with fewer between the sky and the brightest hundredth, images of a range are black


@dataclass(frozen=True)
class PixelTransform:
    """The one map between a data set's own units and the network's range: [low, high] <-> [-1, 1].

    scale, pivot   of asinh((x - pivot) / scale), which then takes the place of x; scale None: linear
    per_image      the data were rescaled image by image, and their units are each image's own

    Every method works elementwise on tensors of any shape and keeps their dtype.
    """

    low: float
    high: float
    scale: float | None = None
    pivot: float = 0.0
    per_image: bool = False

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.pivot, 1.0 if self.scale is None else self.scale)
        if not all(map(math.isfinite, numbers)) or not self.low < self.high or not numbers[3] > 0:
            raise ValueError(f"no map of {asdict(self)}")

    def __call__(self, images: Tensor) -> Tensor:
        first, span = self._ends
        return (self.stretch(images) - first) * (2.0 / span) - 1.0

    def inverse(self, scaled: Tensor) -> Tensor:
        first, span = self._ends
        stretched = (scaled + 1.0) * (span / 2.0) + first
        return stretched if self.scale is None else self._sinh(stretched) * self.scale + self.pivot

    def unit(self, images: Tensor) -> Tensor:
        """The network's range as [0, 1]: what pictures show and what features are taken from."""
        first, span = self._ends
        return (self.stretch(images) - first) / span

    def light(self, unit: Tensor) -> Tensor:
        """`unit` -> what is linear in the data again, where a noise law holds: itself, or (x - pivot) / scale."""
        first, span = self._ends
        return unit if self.scale is None else self._sinh(unit * span + first)

    def from_light(self, light: Tensor) -> Tensor:
        """The inverse of `light`."""
        return light if self.scale is None else self.unit(light * self.scale + self.pivot)

    def stretch(self, images: Tensor) -> Tensor:
        """Images as they are, or their asinh; straight on beyond [low, high], so that no inverse grows like e^x."""
        if self.scale is None:
            return images
        inside = images.clamp(self.low, self.high)
        x = (inside - self.pivot) / self.scale
        return torch.asinh(x) + (images - inside) / self.scale / (1 + x.square()).sqrt()

    @property
    def span(self) -> float:
        """The length of the range of `stretch`."""
        return self._ends[1]

    def agrees(self, other: "PixelTransform") -> bool:
        """Whether data of another transform can be in these units: ends within a tenth of the network's range, or so.

        Ranges and noise are measured, and differ from one part of a survey to the next.
        """
        if (self.scale is None, self.per_image) != (other.scale is None, other.per_image):
            return False
        low, high = self(torch.tensor([other.low, other.high], dtype=torch.float64)).tolist()
        fine = abs(low + 1) + abs(high - 1) <= 0.4
        if self.scale is not None and other.scale is not None:
            fine &= 0.5 <= other.scale / self.scale <= 2 and abs(other.pivot - self.pivot) <= 3 * self.scale
        return fine

    def __str__(self) -> str:
        if self.per_image:
            return "range [0, 1] of each image (minmax)"
        return f"range [{self.low:g}, {self.high:g}]{'' if self.scale is None else f' ({self.stretched})'}"

    @property
    def stretched(self) -> str:
        """How brightness becomes grey, in words."""
        return "linear" if self.scale is None else f"asinh, scale {self.scale:.4g} about {self.pivot:.4g}"

    @property
    def option(self) -> str:
        """What `--normalise` takes for the same units."""
        if self.per_image:
            return "minmax"
        return f"fixed:{self.low:g},{self.high:g}" if self.scale is None else f"asinh:{self.scale:.4g}"

    def to_config(self) -> dict[str, Any]:
        """JSON's types; a linear transform has `value_range` alone."""
        rest = {f.name: getattr(self, f.name) for f in fields(self)[2:] if getattr(self, f.name) != f.default}
        return {"value_range": [self.low, self.high], **({"transform": rest} if rest else {})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PixelTransform":
        """From the keys of `to_config`, others beside them. ValueError or TypeError if they are damaged."""
        return cls(*config["value_range"], **config.get("transform", {}))

    def _sinh(self, stretched: Tensor) -> Tensor:
        first, span = self._ends
        inside = stretched.clamp(first, first + span)
        return torch.sinh(inside) + (stretched - inside) * torch.cosh(inside)

    @property
    def _ends(self) -> tuple[float, float]:
        if self.scale is None:
            return self.low, self.high - self.low
        first, last = (math.asinh((end - self.pivot) / self.scale) for end in (self.low, self.high))
        return first, last - first


@dataclass(frozen=True)
class Normalisation:
    """One of the family above, as it was asked for; `str` gives its text form back."""

    name: str = "none"
    numbers: tuple[float, ...] = ()  # LOW, HIGH of `fixed`; SCALE of `asinh`, none for auto

    @classmethod
    def parse(cls, text: str) -> "Normalisation":
        """The text of `--normalise` -> the choice. UserError for anything else."""
        name, _, rest = text.strip().partition(":")
        try:
            numbers = () if rest in ("", "auto") else tuple(map(float, rest.split(",")))
        except ValueError as error:
            raise UserError(f"--normalise {text}: {rest!r} is not what it takes; choose {CHOICES}") from error
        fine = {
            "none": not rest,
            "minmax": not rest,
            "fixed": len(numbers) == 2 and numbers[0] < numbers[1],
            "asinh": rest == "auto" or (len(numbers) == 1 and numbers[0] > 0),
        }
        if not fine.get(name) or not all(map(math.isfinite, numbers)):
            why = {"fixed": "LOW must be below HIGH, as in fixed:0,65535", "asinh": "SCALE must be above 0, or auto"}
            raise UserError(f"--normalise {text}: {why.get(name, 'there is no such choice')}; choose {CHOICES}")
        return cls(name, numbers)

    def __str__(self) -> str:
        rest = ",".join(repr(number).removesuffix(".0") for number in self.numbers)
        return self.name + (f":{rest or 'auto'}" if self.name in ("fixed", "asinh") else "")

    def check(self, image: np.ndarray) -> np.ndarray:
        """The same image, any shape; ValueError, to follow its name, if this normalisation cannot take it."""
        low, high = float(image.min()), float(image.max())
        if self.name == "minmax" and low == high:
            raise ValueError(f"is constant ({low:g} in every pixel), which minmax cannot rescale")
        if self.name == "fixed" and not np.float32(self.numbers[0]) <= low <= high <= np.float32(self.numbers[1]):
            raise ValueError(f"has values in [{low:g}, {high:g}], beyond {self}")
        return image

    def transform(self, statistics: dict[str, Any], value_range: tuple[float, float] | None = None) -> PixelTransform:
        """What the choice comes to for images of these statistics; UserError if they do not allow it.

        statistics    min and max of the images as stored; for `asinh` also `background` and `noise` of the sky
        value_range   of the units, for none and asinh, where it is known; None: (0, 1) if the images fill a tenth of it
                      or more and do not leave it, otherwise the observed (min, max)
        """
        low, high = statistics["min"], statistics["max"]
        if self.name == "fixed":
            value_range = (self.numbers[0], self.numbers[1])
        elif self.name == "minmax":
            return PixelTransform(0.0, 1.0, per_image=True)
        elif value_range is None:
            value_range = (0.0, 1.0) if low >= 0 and 0.1 <= high <= 1 else (low, high)
        low, high = map(float, value_range)
        if not SPANS[0] < high - low < SPANS[1]:
            same = f"every pixel is {low:g}" if low == high else f"the values span {high - low:g}"
            raise UserError(f"{same}: such data cannot be learned; give them in other units or look at the files")
        if self.name != "asinh":
            return PixelTransform(low, high)
        bands = np.array(
            statistics.get("bands") or [[statistics["background"], statistics["noise"]]]
        )  # (C, 2): level and noise of the sky of each channel
        if not np.isfinite(bands).all():
            raise UserError("asinh: images under 5 pixels have no sky to be measured: choose none, minmax or fixed")
        (lowest, quietest), (highest, loudest) = bands.min(0), bands.max(0)
        if highest - lowest > 3 * quietest or loudest > 2 * quietest:
            raise UserError(
                "asinh: the channels have skies of their own (levels "
                f"{', '.join(f'{level:.4g}' for level, _ in bands)}): bring them to one level and noise first"
            )
        scale, pivot = self.numbers[0] if self.numbers else statistics["noise"], statistics["background"]
        if not scale > (high - low) * 1e-9:
            raise UserError(
                f"asinh: the noise of the sky, {scale:g}, is nothing beside the range [{low:g}, {high:g}] (images "
                "without noise, or mostly of one value?): give its scale in the data's units, --normalise asinh:SCALE"
            )
        return PixelTransform(low, high, scale, pivot)


def rescale(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`minmax`: images (N, ...) -> the same in [0, 1], float32, and each one's low and high, float64 (N, 2)."""
    wide = np.asarray(images, np.float64).reshape(len(images), -1)
    low, high = wide.min(1), wide.max(1)
    if (low == high).any():
        raise ValueError("a constant image cannot be rescaled")
    scaled = (wide - low[:, None]) / (high - low)[:, None]
    return scaled.astype(np.float32).reshape(images.shape), np.stack([low, high], 1)


def restore(images: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """What `rescale` began with: images (N, ...) in [0, 1], low (N,), high (N,) -> float32, to rounding of the range."""
    shape = (-1, *[1] * (images.ndim - 1))
    low, high = (np.asarray(end, np.float64).reshape(shape) for end in (low, high))
    return (np.asarray(images, np.float64) * (high - low) + low).astype(np.float32)


def sky(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level and noise of the sky of each image: (N, C, H, W) -> (N,), (N,) in the data's units.

    Both are those of the border, 1/15 of the shorter side wide: its median, and 1.4826 median |2 x_i - x_(i-2) - x_(i+2)|
    / √6 along its edges (DER_SNR, Stoehr et al. 2008), which is blind to smooth light, to noise that neighbours share and
    to anything in less than half of the border. The noise is nan where an image is under 5 pixels each way.
    """
    images = np.asarray(images, np.float32)
    width = max(1, min(images.shape[-2:]) // 15)
    strips = [part for x in (images, images.swapaxes(-1, -2)) for part in (x[..., :width, :], x[..., -width:, :])]
    differences = [2 * x[..., 2:-2] - x[..., :-4] - x[..., 4:] for x in strips if x.shape[-1] >= 5]

    def median(parts: list[np.ndarray]) -> np.ndarray:
        return np.median(np.concatenate([part.reshape(len(images), -1) for part in parts], 1), axis=1).astype(
            np.float64
        )

    noise = median([np.abs(d) for d in differences]) if differences else np.full(len(images), np.nan)
    return median(strips), 1.4826 / math.sqrt(6) * noise


def hint(transform: PixelTransform, statistics: dict[str, Any]) -> str | None:
    """What to tell about data that are nearly all black on a linear scale; None where there is nothing to tell.

    statistics   of a cache's index; those of an old one have no `p99`, and nothing is told
    """
    levels = 255 * (statistics.get("p99", math.inf) - statistics["median"]) / (transform.high - transform.low)
    if transform.scale is not None or levels >= LEVELS:
        return None
    return (
        f"99 % of the pixels lie within {levels:.1f} of 256 grey levels of {transform}: networks and Fréchet distances "
        "see hardly more than the brightest pixels; `lens-ldm prepare --normalise asinh:auto` shows them the rest"
    )
