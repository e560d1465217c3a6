"""Quantisers behind one call: features of the encoder -> what the decoder takes, indices (N, h, w), auxiliary loss.

Those with codes are vector-quantize-pytorch's. What is set here is set because its defaults are not neutral: decay 0.8,
commitment 1.0, no revival of dead codes. Each runs in float32: in bfloat16 FSQ uses half its codes.

LFQ (Yu et al. 2023) is left out: with one bit a channel 1024 codes take 10 channels, all of which stage 2 would have to
diffuse, and its entropy loss is one more thing to balance.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from vector_quantize_pytorch import FSP, FSQ, SimVQ, VectorQuantize

from shared.errors import UserError
from shared.processes import world

Quantized = tuple[Tensor, Tensor, Tensor]


def in_float32(method: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A method of one tensor, outside autocast and in float32."""

    @functools.wraps(method)
    def inner(self: Any, x: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x.float() if x.is_floating_point() else x)

    return inner


class Quantizer(nn.Module):
    """Features (N, inputs, h, w) of the encoder -> latents (N, channels, h, w) -> their codes, likewise.

    channels   of the latents, which are what stage 2 diffuses
    inputs     channels that the encoder must give
    codes      how many there are; 0 where nothing is quantised
    heads      so many codebooks side by side, `codes` in each; if more than one, indices are (N, h, w, heads)
    levels     of each dimension, where codes are the points of a grid
    advice     what to change where the codes collapse
    """

    codes: int = 0
    heads: int = 1
    levels: tuple[int, ...] = ()
    warmup_steps: int = 0  # training steps during which the encoder learns without it
    advice: str = ""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.inputs = channels

    def quantize(self, features: Tensor) -> Quantized:
        raise NotImplementedError

    @in_float32
    def forward(self, features: Tensor) -> Quantized:
        """features (N, inputs, h, w) -> quantised (N, channels, h, w), indices (N, h, w) int64, loss ()."""
        return self.quantize(features)

    def latent(self, features: Tensor) -> Tensor:
        """features (N, inputs, h, w) -> the continuous latents (N, channels, h, w) that stage 2 diffuses."""
        return features

    def decodable(self, raw: Tensor) -> Tensor:
        """Continuous latents, an encoder's or generated -> what the decoder takes, both (N, channels, h, w).

        Codes do not learn from them.
        """
        return self(raw)[0]

    def relaxed(self, raw: Tensor) -> Tensor:
        """As `decodable`, but without the rounding to codes: for a decoder whose quantiser is left out."""
        return raw

    def snap(self, codes: Tensor) -> Tensor:
        """Values near codes, such as generated ones (N, channels, h, w) -> those codes. It leaves codes as they are."""
        return self.decodable(codes)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices, as `forward` gives them -> quantised (N, channels, h, w)."""
        raise UserError("there are no codes to look up: the quantizer of this autoencoder has none")


class VQ(Quantizer):
    """van den Oord et al. 2017 with moving-average codes, k-means start, revival of dead codes and the rotation trick
    (Fifty et al. 2024). With several heads a code is a product: each head looks its share of the channels up in a
    codebook of its own, so that 2 × 256 entries make 65 536 codes."""

    advice = (
        "raise quantizer.threshold_ema_dead_code (0 revives no code), set kmeans_init true, lower codebook_dim or "
        "optimizer.lr, or take quantizer.name fsq, which cannot collapse so"
    )

    def __init__(
        self,
        channels: int,
        *,
        codebook_size: int = 1024,
        codebook_dim: int | None = None,
        heads: int = 1,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 0.2,
        rotation_trick: bool = True,
        warmup_steps: int = 150,
    ) -> None:
        super().__init__(channels)
        # It would look for a process group itself, but Lightning makes one only later; torchrun sets this before.
        several = world() > 1
        if several and heads > 1 and kmeans_init:
            raise UserError(
                f"k-means starts one codebook in several processes, not {heads}: train in one process, or set "
                "autoencoder.quantizer.kmeans_init false"
            )
        self.codes, self.heads, self.warmup_steps = codebook_size, heads, warmup_steps
        # It warns of codes that are there twice where a first batch has fewer vectors than codes. Those are soon revived.
        (logger.disable if threshold_ema_dead_code > 0 else logger.enable)("vector_quantize_pytorch")
        self.vq = VectorQuantize(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim or channels // heads,
            heads=heads,
            separate_codebook_per_head=heads > 1,
            decay=decay,
            commitment_weight=commitment_weight,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            rotation_trick=rotation_trick,
            accept_image_fmap=True,
            sync_codebook=several,
        )

    def quantize(self, features: Tensor) -> Quantized:
        quantized, indices, loss = self.vq(features)
        return quantized, indices, loss.sum()

    @in_float32
    def decodable(self, raw: Tensor) -> Tensor:
        return self.vq(raw, freeze_codebook=True)[0]

    @in_float32
    def relaxed(self, raw: Tensor) -> Tensor:
        if not self.vq.has_projections:
            return raw
        return self.vq.project_out(self.vq.project_in(raw.movedim(1, -1))).movedim(-1, 1)

    @in_float32
    def lookup(self, indices: Tensor) -> Tensor:
        codebook = self.vq.codebook.view(self.heads, self.codes, -1)
        per_head = indices.reshape(*indices.shape[:3], self.heads).unbind(-1)
        codes = torch.cat([book[index] for book, index in zip(codebook, per_head, strict=True)], dim=-1)
        return self.vq.project_out(codes).movedim(-1, 1)


class LinearVQ(Quantizer):
    """SimVQ (Zhu et al. 2024): fixed random codes behind a learned linear map, so that all of them move at once."""

    advice = "lower quantizer.codebook_size, raise quantizer.warmup_steps or lower optimizer.lr"

    def __init__(
        self,
        channels: int,
        *,
        codebook_size: int = 1024,
        commitment_weight: float = 0.25,
        rotation_trick: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(channels)
        self.codes, self.warmup_steps = codebook_size, warmup_steps
        self.simvq = SimVQ(
            dim=channels,
            codebook_size=codebook_size,
            channel_first=True,
            rotation_trick=rotation_trick,
            input_to_quantize_commit_loss_weight=commitment_weight,
        )

    def quantize(self, features: Tensor) -> Quantized:
        quantized, indices, loss = self.simvq(features)
        # Where there is no gradient to send, a code exactly and not one that was rotated to.
        return quantized if self.training else self.lookup(indices), indices, loss

    @in_float32
    def lookup(self, indices: Tensor) -> Tensor:
        return self.simvq.codebook[indices].movedim(-1, 1)


class Grid(Quantizer):
    """Codes that are the points of a grid, a dimension a channel: no codebook, nothing to collapse but the encoder.

    With fewer dimensions than channels a linear map comes first, and stage 2 learns channels the decoder never sees.
    """

    advice = "lower optimizer.lr, or take fewer latent_channels with fewer levels: the images fill no more"

    def __init__(self, channels: int, levels: Sequence[int]) -> None:
        super().__init__(channels)
        self.levels, self.codes = tuple(levels), math.prod(levels)
        self.sizes: Tensor
        self.strides: Tensor
        # Here and in int64: the library counts codes in int32 and float32, which end at 2^24 of them.
        self.register_buffer("sizes", torch.tensor(self.levels), persistent=False)
        strides = [math.prod(self.levels[:k]) for k in range(len(self.levels))]
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def number(self, places: Tensor) -> Tensor:
        """Places on the grid (..., dimensions) -> indices (...)."""
        return (places.long() * self.strides).sum(-1)

    def places(self, indices: Tensor) -> Tensor:
        """indices (...) -> places on the grid (..., dimensions), each 0 to its level - 1."""
        return indices.unsqueeze(-1) // self.strides % self.sizes


class FiniteScalar(Grid):
    """FSQ (Mentzer et al. 2023): each of a few channels is bounded by tanh and rounded to a few levels."""

    def __init__(self, channels: int, *, levels: tuple[int, ...] = (16, 16, 16, 16, 16)) -> None:
        super().__init__(channels, levels)
        self.fsq = FSQ(list(levels), dim=channels, return_indices=False)

    def quantize(self, features: Tensor) -> Quantized:
        codes = self.fsq.quantize(self.fsq.project_in(features.movedim(1, -1)))
        half = self.sizes // 2
        indices = self.number((codes.detach() * half).round() + half)
        return self.fsq.project_out(codes).movedim(-1, 1), indices, features.new_zeros(())

    @in_float32
    def relaxed(self, raw: Tensor) -> Tensor:
        half = (self.sizes - 1) * (1 + 1e-3) / 2  # FSQ's own: tanh reaches the outer levels within finite features
        offset = torch.where(self.sizes % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(self.fsq.project_in(raw.movedim(1, -1)) + torch.atanh(offset / half)) * half - offset
        return self.fsq.project_out(bounded / (self.sizes // 2)).movedim(-1, 1)

    @in_float32
    def snap(self, codes: Tensor) -> Tensor:
        # Not `decodable`, whose tanh would push a code outside the middle to the next one.
        half = self.sizes // 2
        step = (codes.movedim(1, -1) * half).round()
        return (torch.minimum(torch.maximum(step, -half), self.sizes - 1 - half) / half).movedim(-1, 1)

    @in_float32
    def lookup(self, indices: Tensor) -> Tensor:
        half = self.sizes // 2
        return self.fsq.project_out((self.places(indices) - half) / half).movedim(-1, 1)


class FiniteScalarPerturbation(Grid):
    """FSP (arXiv 2602.17133): each channel goes through the normal CDF and is rounded to the middle of one of its bins,
    or, for a share of the features in training, only shifted by noise as wide as a bin.

    Latents are drawn towards zero mean and unit variance, codes are uniform with unit variance.
    """

    def __init__(
        self, channels: int, *, levels: tuple[int, ...] = (16, 16, 16, 16, 16), quantize_rate: float = 0.5
    ) -> None:
        super().__init__(channels, levels)
        self.fsp = FSP(
            levels, dim=channels, channel_first=True, act_name="normal", quantize_rate=quantize_rate, vector_norm="none"
        )

    def quantize(self, features: Tensor) -> Quantized:
        quantized, _, _, info = self.fsp(features)
        # The paper's weights. Not the library's loss, whose higher moments are nan of a channel that is constant.
        variance, mean = torch.var_mean(self.fsp.project_in(features.movedim(1, -1)), (0, 1, 2), correction=0)
        loss = (0.1 * mean.square() + 0.07 * (variance - 1).square()).mean()
        return quantized, self.number(info["level_indices"]), loss

    @in_float32
    def relaxed(self, raw: Tensor) -> Tensor:
        return self._decoded(self.fsp.act_func(self.fsp.project_in(raw.movedim(1, -1))))

    @in_float32
    def snap(self, codes: Tensor) -> Tensor:
        place = ((codes.movedim(1, -1) / math.sqrt(12) + 0.5) * self.sizes).floor()
        return self._decoded((torch.minimum(place.clamp_min(0), self.sizes - 1) + 0.5) / self.sizes)

    @in_float32
    def lookup(self, indices: Tensor) -> Tensor:
        return self._decoded((self.places(indices) + 0.5) / self.sizes)

    def _decoded(self, share: Tensor) -> Tensor:
        """Uniform in [0, 1] (N, h, w, dimensions) -> of unit variance (N, channels, h, w)."""
        return self.fsp.project_out((share - 0.5) * math.sqrt(12)).movedim(-1, 1)


class KL(Quantizer):
    """The other bottleneck of Rombach et al. 2022: a Gaussian for each latent, sampled in training; its mean is the latent.

    weight   of the divergence from N(0, 1) in nats, averaged over latents and pixels of the grid
    """

    def __init__(self, channels: int, *, weight: float = 1e-6) -> None:
        super().__init__(channels)
        self.inputs, self.weight = 2 * channels, weight

    def quantize(self, features: Tensor) -> Quantized:
        mean, log_variance = features.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)  # either end of what float32 can still tell apart
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        sample = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return sample, _no_indices(mean), self.weight * divergence

    @in_float32
    def latent(self, features: Tensor) -> Tensor:
        return features.chunk(2, dim=1)[0]

    def decodable(self, raw: Tensor) -> Tensor:
        return raw


class NoQuantizer(Quantizer):
    """A plain autoencoder: the control beside which a quantiser is judged."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def quantize(self, features: Tensor) -> Quantized:
        return features, _no_indices(features), features.new_zeros(())


def _no_indices(latents: Tensor) -> Tensor:
    return torch.zeros_like(latents[:, 0], dtype=torch.long)


class CodeUsage:
    """How a quantiser uses its codes, counted over a whole validation set: per batch every number comes out too low.

    codes, heads, levels   the quantiser's
    """

    def __init__(self, codes: int, heads: int = 1, levels: Sequence[int] = ()) -> None:
        self.codes, self.heads, self.levels = codes, heads, tuple(levels)
        self.indices: list[Tensor] = []

    def update(self, indices: Tensor) -> None:
        self.indices.append(indices.reshape(-1, self.heads).cpu())

    def compute(self) -> dict[str, float]:
        """codes_used (a share), perplexity and dead_codes (a count).

        Of several heads: the mean share and perplexity, the sum of the dead codes, and the `_worst` head of each.
        Of a grid also levels_used, by at least one cell in a thousand: images can meet but few of a million codes, yet
        all of the levels, and features too large for their tanh meet a level between the ends now and then.
        """
        counts = [_counts(head) for head in torch.cat(self.indices).unbind(1)]
        used = [len(count) / self.codes for count in counts]
        perplexity = [_perplexity(count) for count in counts]
        metrics = {
            "codes_used": sum(used) / self.heads,
            "perplexity": sum(perplexity) / self.heads,
            "dead_codes": float(self.heads * self.codes - sum(map(len, counts))),
        }
        if self.heads > 1:
            metrics |= {"codes_used_worst": min(used), "perplexity_worst": min(perplexity)}
        if self.levels:
            share = self.levels_used()
            metrics |= {"levels_used": sum(share) / len(share), "levels_used_worst": min(share)}
        return metrics

    def counts(self) -> list[Tensor]:
        """How often each code of a head that was met is met; of a grid, how often each level of a dimension, (levels,)."""
        indices = torch.cat(self.indices)
        if not self.levels:
            return [_counts(head) for head in indices.unbind(1)]
        met, count = indices.unique(return_counts=True)
        counts, stride = [], 1
        for levels in self.levels:
            counts.append(torch.bincount(met // stride % levels, count.double(), levels))
            stride *= levels
        return counts

    def levels_used(self) -> list[float]:
        """Of each dimension of a grid, the share of its levels that at least one cell in a thousand meets."""
        return [float((count >= count.sum() / 1000).double().mean()) for count in self.counts()]

    def collapse(self) -> str | None:
        """What has collapsed, in words; None if nothing has.

        Most cells of a lens image are dark and share a few codes, and a validation set meets only so many: what tells a
        collapse is that fewer codes are met than a twentieth of those that could be, or hardly more than one. A grid
        is judged by its levels, of which a healthy encoder uses most, whatever the images.
        """
        metrics = self.compute()
        tokens = sum(map(len, self.indices))
        reachable = min(self.codes, tokens)
        perplexity = metrics.get("perplexity_worst", metrics["perplexity"])
        used = metrics.get("codes_used_worst", metrics["codes_used"]) * self.codes
        sparse = metrics["levels_used"] <= 0.2 if self.levels else used < 0.05 * reachable
        if not (sparse or perplexity < min(2.0, reachable / 4)):
            return None
        where = f"the worst of {self.heads} heads uses" if self.heads > 1 else "images use"
        levels = f", {metrics['levels_used']:.0%} of the levels" if self.levels else ""
        return f"{where} {used:.0f} of {self.codes} codes{levels}, with a perplexity of {perplexity:.1f}"


def _counts(indices: Tensor) -> Tensor:
    return indices.unique(return_counts=True)[1].double()  # of a codebook of any size


def _perplexity(counts: Tensor) -> float:
    p = counts / counts.sum()
    return float((-(p * p.log()).sum()).exp())
