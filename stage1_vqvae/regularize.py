"""What makes latents easy to diffuse: while it trains, the decoder meets latents that the encoder would not give it.

All of it is drawn anew for each batch from torch's global generator, and none of it outside training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.autoencoder import resized

Grid = tuple[int, int]


@dataclass(frozen=True)
class Transformation:
    """T of EQ-VAE: smaller, then turned. It does the same to latents and to what they stand for, whatever its resolution.

    turns   by 90 degrees, from the vertical axis to the horizontal one
    grid    (h, w) of the latents
    size    (h, w) that they are scaled to, before they are turned
    """

    turns: int
    grid: Grid
    size: Grid

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, C, h f, w f), f whole -> (N, C, h' f, w' f), (h', w') being `size` turned."""
        if self.size != self.grid:
            cell = x.shape[-1] // self.grid[1]
            size = [cell * side for side in self.size]
            x = resized(x.float(), size)  # on a CPU not in bf16
        return torch.rot90(x, self.turns, (-2, -1))


def draw_transformation(grid: Grid) -> Transformation:
    """One that is not the identity: turned by each multiple of 90 degrees alike; those not turned are all scaled, the
    others half of the time, by a factor that is uniform in [0.5, 1) on the longer side of the grid, in whole cells."""
    # On the CPU wherever the network is: a shape that comes from a GPU would make the host wait for it.
    kind, scale, factor = torch.rand(3, dtype=torch.float64).tolist()
    turns, longer = int(4 * kind), max(grid)
    if turns and scale < 0.5:
        return Transformation(turns, grid, grid)
    least = -(-longer // 2)
    shrunk = least + int(factor * (longer - least))
    height, width = (max(1, round(side * shrunk / longer)) for side in grid)
    return Transformation(turns, grid, (height, width))


class Regularizer:
    """The three of them; those that are 0 draw nothing.

    equivariance   share of the batches whose latents and targets are transformed alike, so that decode(T z) ~ T x:
                   EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509)
    latent_noise   tau: z + u std n for each image, u uniform in [0, tau), std that of each channel of the batch's
                   unquantised latents, n white (RAE, Zheng et al. 2025, arXiv 2510.11690; l-DeTok, arXiv 2507.15856)
    bypass         share of the images decoded from unquantised latents, so that the decoder takes both
    """

    def __init__(self, *, equivariance: float = 0.0, latent_noise: float = 0.0, bypass: float = 0.0) -> None:
        self.equivariance, self.latent_noise, self.bypass = equivariance, latent_noise, bypass

    @torch.compiler.disable  # its shapes change from batch to batch: what comes before and after it is compiled
    def __call__(self, raw: Tensor, quantized: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """Latents (N, c, h, w), before and after the quantiser -> what to decode, and T, or None for the identity."""
        n, _, height, width = raw.shape
        latents, transformation = quantized, None
        if self.bypass > 0:
            passes = torch.rand(n, 1, 1, 1, device=raw.device) < self.bypass
            latents = torch.where(passes, raw.to(latents), latents)
        if self.equivariance > 0 and float(torch.rand(())) < self.equivariance:
            transformation = draw_transformation((height, width))
            latents = transformation(latents)
        if self.latent_noise > 0:  # last: scaling would smooth it
            std = raw.detach().float().std((0, 2, 3), correction=0, keepdim=True)
            level = self.latent_noise * torch.rand(n, 1, 1, 1, device=raw.device)
            latents = latents + level * std * torch.randn_like(latents)
        return latents, transformation
