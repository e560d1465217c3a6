"""Stage 2 for Lightning: denoise latents that were encoded once, draw a few lenses now and then."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.autoencoder import Autoencoder
from shared.report import save_grid
from shared.training import StageModule
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import Generator

PREVIEWS = 16
LEVELS = 8  # noise levels at which the held-out loss is watched: overtraining shows first at the low ones


class DiffusionModule(StageModule):
    network: Denoiser

    def __init__(
        self,
        config: Any,
        network: Denoiser,
        autoencoder: Autoencoder,
        batches: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
        count: int,
        chances: Sequence[float],
        held_out: Tensor,
        precision: str,
        conditions: Conditions,
        held_out_known: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        super().__init__(config, network, batches, count, chances)
        self.held_out, self.conditions, self.known = held_out, conditions, held_out_known or {}
        # In a tuple, so that Lightning neither trains, moves nor saves what is frozen.
        self.frozen = (autoencoder,)
        self.sampling_precision = precision

    @property
    def compiled_part(self) -> nn.Module:
        return self.network.backbone

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.network.loss(batch, *beside).mean(), {}

    @torch.no_grad()
    def validate(self, folder: Path | None) -> dict[str, float]:
        shadow: Denoiser = self.shadow  # type: ignore[assignment]
        was_training = shadow.training
        shadow.eval()
        metrics, sampling = {}, self.config.sampling.model_dump()
        generator = Generator(
            self.frozen[0].to(self.device), shadow, self.sampling_precision, sampling, self.conditions
        )
        with torch.random.fork_rng(devices=[]), self.trainer.precision_plugin.forward_context():
            x_0 = self.held_out.to(self.device)
            cond = generator.condition(len(x_0), self.known)
            for k in range(LEVELS):
                torch.manual_seed(k)  # the same noise at every validation: what changes is the model
                eps, t = torch.randn(x_0.shape).to(x_0), torch.full((len(x_0),), (k + 0.5) / LEVELS, device=x_0.device)
                alpha, sigma = shadow.schedule(t)
                error = (shadow(alpha * x_0 + sigma * eps, t, cond) - x_0).square().mean()
                metrics[f"x0_error_t{(k + 0.5) / LEVELS:.2f}"] = float(error)
        metrics["x0_error"] = sum(metrics.values()) / LEVELS
        if folder is not None:
            n = min(PREVIEWS, len(self.held_out)) if self.known else PREVIEWS
            asked = {name: values[:n] for name, values in self.known.items()}  # of the first held-out images
            images = generator.images(range(n), cond=asked)
            title = (
                f"step {self.trainer.global_step}: {self.config.sampling.steps} steps of {self.config.sampling.sampler}"
            )
            pictures = self.frozen[0].transform.unit(images)
            save_grid(folder / f"{self.trainer.global_step:07d}.png", pictures, columns=8, title=title)
        shadow.train(was_training)
        return metrics
