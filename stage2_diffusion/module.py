"""Stage 2 for Lightning: denoise latents that were encoded once, draw a few lenses now and then."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared.autoencoder import Autoencoder
from shared.config import changed
from shared.precision import autocast
from shared.report import save_grid
from shared.schema import Adversarial, Stage2
from shared.training import PowerEMA, StageModule, step_key
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import Generator
from stage2_diffusion.watch import Distance, Memorisation, gap_z

AnyConfig = TypeVar("AnyConfig", bound=Stage2 | Adversarial)
NEVER = 10**9
LEVELS = 8  # noise levels at which the held-out loss is watched: overtraining shows first at the low ones


def save_previews(
    folder: Path, step: int, generator: Generator, n: int, asked: Mapping[str, np.ndarray] | None = None
) -> None:
    """A picture of n lenses, always of the same seeds, by the generator's own settings."""
    pictures = generator.autoencoder.transform.unit(generator.images(range(n), cond=asked))
    title = f"step {step}: {generator.defaults['steps']} steps of {generator.defaults['sampler']}"
    save_grid(folder / f"{step:07d}.png", pictures, columns=8, title=title)


@dataclass(frozen=True)
class Latents:
    """What a network is trained on: batches, count and chances of `StageModule`, and latents (n, c, h, w) it never sees."""

    batches: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    count: int
    chances: Sequence[float]
    held_out: Tensor

    @classmethod
    def random(cls, shape: Sequence[int], conditions: Conditions, count: int) -> "Latents":
        """Noise of the shape of latents, asked for nothing: for whoever measures steps, and not what they learn."""
        latents, told = torch.randn(count, *shape), conditions.vector(count)
        return cls(
            lambda i: latents[i] if told is None else (latents[i], told[i]), count, (1.0,), torch.randn(2, *shape)
        )


class SampledModule(StageModule):
    """A network that is trained on frozen latents and sampled on the way; a subclass gives `generator`.

    precision   of sampling: bf16 or fp32
    distance    of samples from real images, for `score`; None: not measured
    """

    def __init__(
        self,
        config: Any,
        network: nn.Module,
        data: Latents,
        autoencoder: Autoencoder,
        precision: str,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(config, network, data.batches, data.count, data.chances)
        # In a tuple, so that Lightning neither trains, moves nor saves what is frozen.
        self.frozen = (autoencoder,)
        self.sampling_precision, self.distance = precision, distance

    def generator(self, network: Any) -> Generator:
        """What draws samples from a network, with the autoencoder on this module's device."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        assert self.distance is not None  # as trainer.score_every has it
        return self.distance(self.generator(self.shadow))


class DiffusionModule(SampledModule):
    network: Denoiser

    def __init__(
        self,
        config: Any,
        network: Denoiser,
        data: Latents,
        autoencoder: Autoencoder,
        precision: str,
        conditions: Conditions,
        held_out_known: Mapping[str, np.ndarray] | None = None,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(config, network, data, autoencoder, precision, distance)
        self.averages.extend(PowerEMA(network, length) for length in config.ema.lengths)
        self.conditions, self.known = conditions, held_out_known or {}
        self.held_out = data.held_out, conditions.vector(len(data.held_out), self.known)
        some = np.random.default_rng(0).permutation(data.count)  # which may be sorted by class
        seen = data.batches(torch.from_numpy(some[: config.trainer.watched]))  # none of them turned
        self.seen = (seen[0], seen[1]) if isinstance(seen, tuple) else (seen, None)
        self.memorisation = Memorisation()
        self.guide: list[Denoiser] = []  # in a list, and so no part of this module: of previews and scores in training
        self.noise: torch.Generator | None = None  # of the loss; None: torch's global one

    @property
    def compiled_part(self) -> nn.Module:
        return self.network.backbone

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # Several processes draw the noise of the whole batch, as one would, and take their parts; dropout is their own.
        if self.trainer.world_size > 1:
            key = step_key(self.config.seed, self.trainer.global_step, 0)
            self.noise = torch.Generator(self.device).manual_seed(key)

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        share = self.trainer.global_rank, self.trainer.world_size
        return self.network.loss(batch, *beside, generator=self.noise, share=share).mean(), {}

    def generator(self, denoiser: Denoiser) -> Generator:
        autoencoder, sampling = self.frozen[0].to(self.device), self.config.sampling.model_dump()
        guide = self.guide[0].to(self.device) if self.guide else None
        return Generator(autoencoder, denoiser, self.sampling_precision, sampling, self.conditions, guide)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["memorisation"] = vars(self.memorisation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vars(self.memorisation).update(checkpoint.get("memorisation", {}))

    @torch.no_grad()
    def errors(self, denoiser: Denoiser, latents: Tensor, cond: Tensor | None) -> Tensor:
        """(LEVELS, n): mean squared error of x_0 of each of n latents under their conditions, from low noise to high.

        The same noise at every validation: what changes is the model.
        """
        rows, x_0 = [], latents.to(self.device)
        cond = None if cond is None else cond.to(self.device)
        with torch.random.fork_rng(devices=[]), autocast(self.device, self.sampling_precision):
            for k in range(LEVELS):
                torch.manual_seed(k)
                eps, t = torch.randn(x_0.shape).to(x_0), torch.full((len(x_0),), (k + 0.5) / LEVELS, device=x_0.device)
                alpha, sigma = denoiser.schedule(t)
                rows.append((denoiser(alpha * x_0 + sigma * eps, t, cond) - x_0).square().flatten(1).mean(1))
        return torch.stack(rows).cpu()

    @torch.no_grad()
    def validate(self, folder: Path | None) -> dict[str, float]:
        shadow: Denoiser = self.shadow  # type: ignore[assignment]
        held_out, seen = self.errors(shadow, *self.held_out), self.errors(shadow, *self.seen)
        metrics: dict[str, float] = {}
        for prefix, errors in (("x0_error", held_out), ("train_x0_error", seen)):
            metrics |= {f"{prefix}_t{(k + 0.5) / LEVELS:.2f}": float(e) for k, e in enumerate(errors.mean(1))}
            metrics[prefix] = float(errors.mean())
        low = [errors[: LEVELS // 2].log().mean(0) for errors in (held_out, seen)]  # of each level the same weight
        metrics["memorisation_z"] = gap_z(*low)
        if self.memorisation(*low):
            tqdm.write(
                f"{self.config.name} begins to memorise: at step {self.trainer.global_step} the error at low noise rises on "
                "held-out images and falls on training images; stop earlier, or give it more images, backbone.dropout or less width"
            )
        n = self.config.trainer.previews
        if folder is not None and n:
            n = min(n, len(self.held_out[0])) if self.known else n
            asked = {name: values[:n] for name, values in self.known.items()}  # of the first held-out images
            save_previews(folder, self.trainer.global_step, self.generator(shadow), n, asked)
        return metrics

    def best_average(self) -> tuple[Denoiser, dict[str, float]]:
        """What to publish of the trained weights' averages, and the held-out error of each by its name, best first.

        The error is the geometric mean over levels of noise, or the highest would decide alone.
        """
        candidates: dict[str, Any] = {f"decay {self.config.ema.decay:g}": self.shadow}
        for average, length in zip(self.averages, self.config.ema.lengths, strict=True):
            candidates[f"length {length:g}"] = average.module
        errors = {
            name: float(self.errors(network.eval(), *self.held_out).mean(1).log().mean().exp())
            for name, network in candidates.items()
        }
        errors = dict(sorted(errors.items(), key=lambda item: item[1]))
        return candidates[next(iter(errors))], errors


def steps_alone(config: AnyConfig, folder: str, **trainer: Any) -> AnyConfig:
    """The config of a training without an end, of which only the steps are watched: nothing is measured, drawn, logged or
    kept beside them. `trainer`: keys of that block besides."""
    trainer |= dict.fromkeys(("max_steps", "validate_every", "checkpoint_every"), NEVER)
    trainer |= {"score_every": 0, "watched": 2, "progress": False}
    return changed(config, {"output": folder, "trainer": trainer, "logger": {"wandb": "disabled"}})
