"""The VQ-VAE: a convolutional encoder and decoder around a quantiser, all of it on a coarse grid.

A PixelUnshuffle stem takes 150×150 to 30×30 without loss, so that no convolution runs at full resolution: that is what
lets it train on two CPU cores.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.autoencoder import Autoencoder, Shape
from shared.data.normalise import PixelTransform
from shared.layers import GroupNorm
from shared.registry import build
from stage1_vqvae.draws import Generators
from stage1_vqvae.noise import law_of
from stage1_vqvae.quantizers import Quantizer
from stage1_vqvae.regularize import Regularizer, Transformation

LARGEST_RATIO = 6.0  # of logarithms: the law is within a factor of 400


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the identity at the start."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(8, width), GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def encoder(
    channels: int, stem: int, strides: Sequence[int], widths: Sequence[int], blocks: int, out: int
) -> nn.Module:
    """(N, channels, H, W) -> (N, out, H/f, W/f), f = stem × product of the strides."""
    layers: list[nn.Module] = [nn.PixelUnshuffle(stem), nn.Conv2d(channels * stem**2, widths[0], 3, padding=1)]
    layers += [ResidualBlock(widths[0]) for _ in range(blocks)]
    for stride, before, width in zip(strides, widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, width, stride, stride), *(ResidualBlock(width) for _ in range(blocks))]
    layers += [GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out, 1)]
    return nn.Sequential(*layers)


def decoder(
    channels: int, stem: int, strides: Sequence[int], widths: Sequence[int], blocks: int, into: int
) -> nn.Sequential:
    """(N, into, h, w) -> (N, channels, h f, w f). The last layer is linear: a sigmoid saturates on mostly black images."""
    layers: list[nn.Module] = [nn.Conv2d(into, widths[-1], 3, padding=1)]
    layers += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    for stride, before, width in zip(reversed(strides), reversed(widths[1:]), reversed(widths[:-1]), strict=True):
        layers += [
            nn.Conv2d(before, width * stride**2, 1),
            nn.PixelShuffle(stride),
            nn.Conv2d(width, width, 3, padding=1),
        ]
        layers += [ResidualBlock(width) for _ in range(blocks)]
    layers += [GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels * stem**2, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(stem))


class Reconstruction(NamedTuple):
    """What training sees of a batch.

    clean            (N, C, H, W) in [-1, 1]
    target           what it should be like: the batch itself, unless a regulariser has turned both, or made both smaller
    indices          (N, h, w) or (N, h, w, heads) of codes
    commitment       () the quantiser's own loss
    log_ratio        as `clean`: log of the variance of its noise over that of the noise law, if the decoder predicts it
    transformation   what the regulariser has done, for `alike`
    """

    clean: Tensor
    target: Tensor
    indices: Tensor
    commitment: Tensor
    log_ratio: Tensor | None
    transformation: Transformation | None


class VQVAE(Autoencoder):
    """van den Oord et al. 2017, with the quantiser inside the decoder as in Rombach et al. 2022.

    stem, strides      downsampling: PixelUnshuffle, then one strided convolution each; other sizes are padded inside
    widths             channels on each of the len(strides) + 1 grids, fine to coarse; multiples of 8
    latents            what stage 2 diffuses: `continuous`, before the quantiser, which decoding applies; `quantized`,
                       after it; or `unquantized`, before it and decoded without it
    predict_variance   the decoder also says by how much the noise of each pixel differs from the noise law
    """

    def __init__(
        self,
        image_shape: Shape,
        transform: PixelTransform,
        *,
        stem: int = 5,
        strides: Sequence[int] = (2,),
        widths: Sequence[int] = (64, 128),
        encoder_blocks: int = 1,
        decoder_blocks: int = 3,
        latent_channels: int = 5,
        quantizer: dict[str, Any],
        latents: str = "continuous",
        predict_variance: bool = False,
    ) -> None:
        channels, height, width = image_shape
        factor = stem * math.prod(strides)
        grid = (-(-height // factor), -(-width // factor))
        super().__init__(image_shape, (latent_channels, *grid), transform)
        bottom, right = grid[0] * factor - height, grid[1] * factor - width
        self.padding = (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)
        self.quantizer: Quantizer = build("quantizer", quantizer, channels=latent_channels)
        self.encoder = encoder(channels, stem, strides, widths, encoder_blocks, self.quantizer.inputs)
        outputs = 2 * channels if predict_variance else channels
        self.decoder = decoder(outputs, stem, strides, widths, decoder_blocks, latent_channels)
        if predict_variance:  # at first the law is right
            last = self.decoder[-2]
            for parameter in last.parameters():
                nn.init.zeros_(parameter[len(parameter) // 2 :])
        self.latents, self.predict_variance = latents, predict_variance
        self.noise = law_of(channels)

    def forward(self, scaled: Tensor, quantize: bool = True, regularize: Regularizer | None = None) -> Reconstruction:
        """scaled (N, C, H, W) in [-1, 1] -> its reconstruction.

        regularize   in training mode alone; what it transforms is not cropped
        """
        features = self.features(scaled)
        raw = self.quantizer.latent(features)
        if quantize:
            latents, indices, loss = self.quantizer(features)
        else:
            latents, loss = self.quantizer.relaxed(raw), raw.new_zeros(())
            indices = torch.zeros_like(raw[:, 0], dtype=torch.long)
        transformation = None
        if regularize is not None and self.training:
            latents, transformation = regularize(self.quantizer.relaxed(raw), latents)
        if transformation is None:
            clean, log_ratio = self._image(latents)
            return Reconstruction(clean, scaled, indices, loss, log_ratio, None)
        clean, log_ratio = self._split(self.decoder(latents))
        return Reconstruction(clean, self.alike(scaled, transformation), indices, loss, log_ratio, transformation)

    def alike(self, scaled: Tensor, transformation: Transformation | None) -> Tensor:
        """Images as a reconstruction should be like them that a regulariser has transformed."""
        return scaled if transformation is None else transformation(self._pad(scaled))

    def features(self, scaled: Tensor) -> Tensor:
        """scaled (N, C, H, W) in [-1, 1] -> what the quantiser is given, (N, quantizer.inputs, h, w)."""
        return self.encoder(self._pad(scaled))

    def to_raw(self, scaled: Tensor) -> Tensor:
        features = self.features(scaled)
        return self.quantizer(features)[0] if self.latents == "quantized" else self.quantizer.latent(features)

    def from_raw(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        q = self.quantizer
        decodable = {"continuous": q.decodable, "quantized": q.snap, "unquantized": q.relaxed}[self.latents]
        return self._image(decodable(raw))

    def observe(self, clean: Tensor, generator: Generators = None, said: Tensor | None = None) -> Tensor:
        low, high = self.transform.low, self.transform.high
        return self.noise(clean, generator, said).clamp(low, high)

    def _pad(self, scaled: Tensor) -> Tensor:
        return F.pad(scaled, self.padding, mode="replicate") if any(self.padding) else scaled

    def _image(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        left, _, top, _ = self.padding
        _, height, width = self.image_shape
        return self._split(self.decoder(raw)[..., top : top + height, left : left + width])

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.predict_variance:
            return output, None
        clean, log_ratio = output.chunk(2, dim=1)
        return clean, log_ratio.float().clamp(-LARGEST_RATIO, LARGEST_RATIO)
