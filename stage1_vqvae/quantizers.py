"""Quantisers behind one call: raw latents (N, c, h, w) -> quantised latents, indices (N, h, w), auxiliary loss.

The quantisers are vector-quantize-pytorch's. What is set here is set because its defaults are not neutral: decay 0.8,
commitment 1.0, no revival of dead codes. Each runs in float32: in bfloat16 FSQ uses half its codes.
"""

import math
import os

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

Quantized = tuple[Tensor, Tensor, Tensor]


class Quantizer(nn.Module):
    """codes   how many there are; 0 where nothing is quantised"""

    codes: int = 0
    warmup_steps: int = 0  # training steps during which the encoder learns without it

    def quantize(self, raw: Tensor) -> Quantized:
        raise NotImplementedError

    def snap(self, codes: Tensor) -> Tensor:
        """Values near codes, such as generated ones (N, c, h, w) -> those codes. It leaves codes as they are."""
        return self(codes)[0]

    def forward(self, raw: Tensor) -> Quantized:
        """raw (N, c, h, w) -> quantised (N, c, h, w), indices (N, h, w) int64, loss ()."""
        with torch.autocast(raw.device.type, enabled=False):
            return self.quantize(raw.float())


class VQ(Quantizer):
    """van den Oord et al. 2017 with moving-average codes, k-means start, revival of dead codes and the rotation trick
    (Fifty et al. 2024)."""

    def __init__(
        self,
        channels: int,
        *,
        codebook_size: int = 1024,
        codebook_dim: int | None = None,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0.2,
        rotation_trick: bool = True,
        warmup_steps: int = 150,
    ) -> None:
        super().__init__()
        self.codes, self.warmup_steps = codebook_size, warmup_steps
        self.vq = VectorQuantize(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            decay=decay,
            commitment_weight=commitment_weight,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            rotation_trick=rotation_trick,
            accept_image_fmap=True,
            # It would look for a process group itself, but Lightning makes one only later; torchrun sets this before.
            sync_codebook=int(os.environ.get("WORLD_SIZE", "1")) > 1,
        )

    def quantize(self, raw: Tensor) -> Quantized:
        quantized, indices, loss = self.vq(raw)
        return quantized, indices, loss.sum()


class FiniteScalar(Quantizer):
    """FSQ (Mentzer et al. 2023): each of a few channels is rounded to a few levels; no codebook, nothing to collapse.

    With fewer levels than channels a linear map comes first, and stage 2 learns channels that the decoder never sees.
    """

    def __init__(self, channels: int, *, levels: tuple[int, ...] = (16, 16, 16, 16, 16)) -> None:
        super().__init__()
        self.codes = math.prod(levels)
        self.fsq = FSQ(list(levels), dim=channels)
        self.levels: Tensor
        self.register_buffer("levels", torch.tensor(levels)[:, None, None], persistent=False)

    def quantize(self, raw: Tensor) -> Quantized:
        quantized, indices = self.fsq(raw)
        return quantized, indices.long(), raw.new_zeros(())

    def snap(self, codes: Tensor) -> Tensor:
        # Not `quantize`, whose tanh would push a code outside the middle to the next one.
        half = self.levels // 2
        step = (codes.float() * half).round()
        return torch.minimum(torch.maximum(step, -half), self.levels - 1 - half) / half


class NoQuantizer(Quantizer):
    """A plain autoencoder: the control beside which a quantiser is judged."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def quantize(self, raw: Tensor) -> Quantized:
        return raw, raw.new_zeros(raw.shape[0], *raw.shape[2:], dtype=torch.long), raw.new_zeros(())


class CodeUsage:
    """Share of the codes in use and perplexity, counted over a whole validation set: per batch both come out too low."""

    def __init__(self, codes: int) -> None:
        self.codes = codes
        self.indices: list[Tensor] = []

    def update(self, indices: Tensor) -> None:
        self.indices.append(indices.flatten().cpu())

    def compute(self) -> dict[str, float]:
        counts = torch.cat(self.indices).unique(return_counts=True)[1].double()  # of a codebook of any size
        p = counts / counts.sum()
        return {"codes_used": len(p) / self.codes, "perplexity": float((-(p * p.log()).sum()).exp())}
