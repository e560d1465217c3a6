"""The contract between the stages, and `Pixels`, the autoencoder that learns nothing.

Stage 2 knows of stage 1 what is written here and no more: two shapes, `encode` and `decode`. Scale, padding, the
quantiser and the pixel noise are the autoencoder's own business, so no caller can forget one of them.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data.normalise import PixelTransform
from shared.errors import UserError

Shape = tuple[int, int, int]
DECODED = 16  # images at once on a CPU: what more of them have on the way leaves its cache, and takes a third longer


def _shape(sizes: Sequence[int]) -> Shape:
    channels, height, width = sizes
    return channels, height, width


class Autoencoder(nn.Module):
    """Images <-> standardised latents.

    images   (N, C, H, W)  float32, in the data set's own units
    latents  (N, c, h, w)  float32, zero mean and unit variance per channel over the training set

    A subclass gives `to_raw` and `from_raw` between the network's range and unstandardised latents and, where its
    decoder gives clean images of noisy data, `observe`, with what `from_raw` has said of their noise.
    """

    frozen = False
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, image_shape: Shape, latent_shape: Shape, transform: PixelTransform) -> None:
        super().__init__()
        self.image_shape, self.latent_shape = _shape(image_shape), _shape(latent_shape)
        self.transform = transform
        # nan until `fit_latents`: an autoencoder without its statistics must not pass for one that has them.
        self.register_buffer("latent_mean", torch.full((latent_shape[0], 1, 1), torch.nan))
        self.register_buffer("latent_std", torch.full((latent_shape[0], 1, 1), torch.nan))

    def encode(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) -> latents (N, c, h, w), standardised."""
        return (self.to_raw(self.transform(images)).float() - self.latent_mean) / self.latent_std

    def decode(
        self,
        latents: Tensor,
        *,
        observed: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """latents (N, c, h, w) -> images (N, C, H, W).

        observed   with pixel noise, as a telescope would deliver them; False: the clean light
        generator  of the pixel noise; a sequence holds one for each image
        """
        clean, said = self.decode_clean(latents)
        return self.observe(clean, generator, said) if observed else clean

    def decode_clean(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """latents (N, c, h, w) -> clean images (N, C, H, W), and what the decoder says of their noise, for `observe`."""
        if latents.is_cpu and len(latents) > DECODED and not torch.is_grad_enabled():
            clean, saids = zip(*map(self.decode_clean, latents.split(DECODED)), strict=True)
            return torch.cat(clean), None if saids[0] is None else torch.cat(saids)
        scaled, said = self.from_raw(latents * self.latent_std + self.latent_mean)
        return self.transform.inverse(scaled.float()), said

    @torch.no_grad()
    def fit_latents(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of the raw latents per channel over `batches` of images, in float64."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            raw = self.to_raw(self.transform(images)).double()
            count += raw.numel() // raw.shape[1]
            total = total + raw.sum((0, 2, 3))
            squares = squares + raw.square().sum((0, 2, 3))
        if count == 0:
            raise ValueError("fit_latents needs at least one batch")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.latent_mean.copy_(mean[:, None, None])
        # A channel the encoder leaves constant carries nothing; unit scale keeps it finite.
        self.latent_std.copy_(torch.where(std > 1e-6, std, 1.0)[:, None, None])

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The least and the largest value (c, 1, 1) that a latent can have, if there are such."""
        return None

    def require_latents(self) -> "Autoencoder":
        """Return self, or say that the latent statistics were never fitted."""
        if not bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all()):
            raise UserError("the autoencoder has no latent statistics: its training did not finish; run stage 1 again")
        return self

    def freeze(self) -> "Autoencoder":
        """Return self, without gradients and in eval mode for good: a codebook in train mode learns without gradients."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Autoencoder":
        return super().train(mode and not self.frozen)

    def to_raw(self, scaled: Tensor) -> Tensor:
        raise NotImplementedError

    def from_raw(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents -> clean images in the network's range, and what the decoder says of their noise, for `observe`."""
        raise NotImplementedError

    def observe(
        self,
        clean: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        said: Tensor | None = None,
    ) -> Tensor:
        """Clean images -> images as the data show them. Here: unchanged."""
        return clean


class Pixels(Autoencoder):
    """The pixels themselves, which turns stage 2 into diffusion on pixels: the literature's baselines without a second
    code path. The identity, unless images are to be diffused smaller than they are.

    size   of the shorter side, to which `encode` resizes by antialiased bilinear interpolation, and `decode` back
    crop   side of the square in the centre that is kept, before that. Beyond it `decode` mirrors what is within, which
           for a lens in the centre is sky with its noise
    UserError for a crop that cannot be in the centre, or has too little to mirror

    Its statistics make the pixels zero-mean and of unit variance; its decoder clips to the data's range, and so does
    sampling at every step (`bounds`).
    """

    def __init__(
        self, image_shape: Shape, transform: PixelTransform, *, size: int | None = None, crop: int | None = None
    ) -> None:
        channels, *sides = _shape(image_shape)
        margins = [0 if crop is None else side - crop for side in sides]
        if any(
            margin < 0 or margin % 2 or margin // 2 >= side - margin
            for margin, side in zip(margins, sides, strict=True)
        ):
            raise UserError(
                f"pixels.crop {crop} is no square in the centre of images of {sides[0]} x {sides[1]}: take one that is "
                "smaller by an even number of pixels, and larger than a third of them"
            )
        self.inner = [side - margin for side, margin in zip(sides, margins, strict=True)]
        self.margins = [margin // 2 for margin in margins]
        self.small = [max(1, round(side * size / min(self.inner))) for side in self.inner] if size else self.inner
        super().__init__(image_shape, _shape((channels, *self.small)), transform)

    def to_raw(self, scaled: Tensor) -> Tensor:
        (top, left), (height, width) = self.margins, self.inner
        return resized(scaled[..., top : top + height, left : left + width], self.small)

    def bounds(self) -> tuple[Tensor, Tensor]:
        return (-1.0 - self.latent_mean) / self.latent_std, (1.0 - self.latent_mean) / self.latent_std

    def from_raw(self, raw: Tensor) -> tuple[Tensor, None]:
        (top, left), inner = self.margins, resized(raw, self.inner).clamp(-1.0, 1.0)
        return F.pad(inner, (left, left, top, top), mode="reflect") if top or left else inner, None


def resized(images: Tensor, sides: Sequence[int]) -> Tensor:
    """Images (N, C, H, W) of other sides, bilinear with antialiasing as PIL and torchvision have it; as they are, if those are
    the sides they have."""
    if list(images.shape[-2:]) == list(sides):
        return images
    return F.interpolate(images, list(sides), mode="bilinear", antialias=True)
