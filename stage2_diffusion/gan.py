"""A generative adversarial network with self-attention: one evaluation makes a lens, as it was done before diffusion.

Transposed convolutions and self-attention (Zhang et al. 2019, arXiv 1805.08318) against a PatchGAN under spectral norms,
on latents or pixels. Both sides learn from one backward and one step of one optimiser, so that the loop, resuming and
its bits are those of diffusion: the discriminator sees samples without their graph, the generator a discriminator without
its gradients, and in steps in which it is not the generator's turn it has no gradient, which an optimiser passes over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from shared.autoencoder import Autoencoder
from shared.patchgan import Discriminator
from stage2_diffusion.backbones.layers import attend, group_norm, require_levels, split_heads
from stage2_diffusion.generator import ONE_STEP, Generator
from stage2_diffusion.module import Latents, SampledModule, save_previews
from stage2_diffusion.schedule import NoiseSchedule
from stage2_diffusion.watch import SCORE_SEEDS, Distance

COLLAPSED = 0.5  # samples less than that far apart, as a share of how far real images are


class SelfAttention(nn.Module):
    """x + gain * attention over the grid, the gain 0 at first (Zhang et al. 2019, Eq. 2 and 3)."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.qkv(x).flatten(2).transpose(1, 2)  # (N, hw, 3c)
        attended = attend(*split_heads(tokens, 1))
        return x + self.gain * self.out(attended.transpose(1, 2).reshape(n, c, h, w))


class Synthesis(nn.Module):
    """Pure noise (N, noise, 1, 1) -> latents (N, c, h, w), float32. To a `Generator` it is a denoiser that knows no time.

    latent_shape  (c, h, w) of any size: the finest grid is cropped to it
    noise         numbers that a sample is made of
    width         channels of the finest grid
    multipliers   of the channels, grid by grid from the finest, each half of the one before; it starts on the last
    attention     grids that attend, 0 the finest
    """

    one_step = True  # so a Generator knows it

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        *,
        noise: int = 128,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        attention: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        require_levels("sagan", attention, len(multipliers))
        channels, *self.sides = latent_shape
        self.noise_shape = (noise, 1, 1)
        self.schedule = NoiseSchedule("flow")  # whose end is noise without data
        widths = [width * m for m in multipliers]
        start = [-(-side // 2 ** (len(widths) - 1)) for side in self.sides]
        grids: list[nn.Module] = [nn.ConvTranspose2d(noise, widths[-1], (start[0], start[1]))]
        for level in range(len(widths) - 1, -1, -1):
            # Of groups, where its authors' is of batches: statistics of a batch would tie samples to each other, and be
            # those of the last weights beside an average of all.
            grids += [group_norm(widths[level]), nn.ReLU()]
            if level in attention:
                grids.append(SelfAttention(widths[level]))
            if level:
                grids.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        self.grids, self.out = nn.Sequential(*grids), nn.Conv2d(width, channels, 3, padding=1)

    @property
    def backbone(self) -> nn.Module:
        return self

    def forward(self, noise: Tensor, t: Tensor | None = None, cond: None = None) -> Tensor:
        (height, width), x = self.sides, self.grids(noise)
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return self.out(x[:, :, top : top + height, left : left + width]).float()


def spread(samples: Tensor, real: Tensor) -> dict[str, float]:
    """How far samples (n, ...) are apart over how far real ones are (m, ...), of the same number of each.

    diversity   of the mean distance of pairs: near 0 where all samples are one, 1 - 1/k where they are k equal heaps
    spacing     of the median distance to the nearest other one: near 0 where they are any few
    """
    n = min(len(samples), len(real))
    apart = []
    for rows in (samples[:n].flatten(1), real[:n].flatten(1)):
        # By differences: by products, equal rows are some way apart.
        distances = torch.cdist(rows.float(), rows.float(), compute_mode="donot_use_mm_for_euclid_dist")
        mean = float(distances.sum()) / max(1, n * (n - 1))
        apart.append((mean, float(distances.fill_diagonal_(torch.inf).amin(1).median())))
    diversity, spacing = (ours / max(theirs, 1e-12) for ours, theirs in zip(*apart, strict=True))
    return {"diversity": diversity, "spacing": spacing}


class GANModule(SampledModule):
    """The generator as the network that is averaged and published, and the discriminator beside it. Samples are compared
    with the latents that are held out."""

    network: Synthesis

    def __init__(
        self,
        config: Any,
        network: Synthesis,
        data: Latents,
        autoencoder: Autoencoder,
        precision: str,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(config, network, data, autoencoder, precision, distance)
        a = config.adversary
        self.discriminator = Discriminator(autoencoder.latent_shape[0], a.width, a.strides)
        self.held_out, self.spread, self.told = data.held_out, {"diversity": 1.0, "spacing": 1.0}, True

    @property
    def beside(self) -> list[dict[str, Any]]:
        o = self.config.optimizer
        return [
            {"params": list(self.discriminator.parameters()), "lr": self.config.adversary.lr, "betas": tuple(o.betas)}
        ]

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a, n = self.config.adversary, len(batch)
        its_turn = (self.trainer.global_step + 1) % a.updates == 0
        noise = torch.randn(n, *self.network.noise_shape, device=batch.device)
        with torch.set_grad_enabled(its_turn):
            fake = self.network(noise)
        logits, _ = self.discriminator(torch.cat([batch, fake.detach()]))
        discriminator = _cross_entropy(logits[:n], 1 - a.smoothing) + _cross_entropy(logits[n:], a.smoothing)
        if its_turn:
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            logits, _ = functional_call(self.discriminator, frozen, (fake,))
            generator = _cross_entropy(logits, 1 - a.smoothing)
        else:
            generator = _cross_entropy(logits[n:], 1 - a.smoothing).detach()  # no more than a number in the log
        return discriminator + generator, {"discriminator": discriminator, "generator": generator}

    def generator(self, network: Any) -> Generator:
        return Generator(self.frozen[0].to(self.device), network, self.sampling_precision, ONE_STEP)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`spread` of samples of the shadow, of always the same seeds, on held-out latents; kept in `spread`."""
        seeds = range(SCORE_SEEDS, SCORE_SEEDS + len(self.held_out))
        samples = torch.cat([x for _, x in self.generator(self.shadow).sample(seeds, latents=True)])
        self.spread = spread(samples, self.held_out.to(samples))
        return self.spread

    def validate(self, folder: Path | None) -> dict[str, float]:
        metrics = self.measure()
        collapsed = min(metrics.values()) < COLLAPSED
        if collapsed and not self.told:
            tqdm.write(f"{self.verdict()}, at step {self.trainer.global_step}")
        self.told = collapsed  # once each time it begins; a run starts with samples that are all alike
        if folder is not None and self.config.trainer.previews:
            save_previews(folder, self.trainer.global_step, self.generator(self.shadow), self.config.trainer.previews)
        return dict(metrics)

    def verdict(self) -> str:
        """One line on mode collapse, of what was measured last."""
        found = min(self.spread.values()) < COLLAPSED
        return (
            f"{self.config.name}: {'its modes collapse' if found else 'no mode collapse'}: samples are "
            f"{self.spread['diversity']:.2f} times as far apart as real images, and {self.spread['spacing']:.2f} times "
            "as far from the next one"
        )


def _cross_entropy(logits: Tensor, label: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
