"""Stage 1 for Lightning: reconstruct, watch the codes, draw what comes out."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from tqdm import tqdm

from shared.data.cache import LensImages
from shared.data.symmetries import Turns, apply_each
from shared.errors import UserError
from shared.report import save_grid
from shared.training import StageModule
from stage1_vqvae.losses import ReconstructionLoss
from stage1_vqvae.noise import enough, estimate_law, recorrupt
from stage1_vqvae.quantizers import CodeUsage
from stage1_vqvae.regularize import Regularizer
from stage1_vqvae.vqvae import VQVAE

VALIDATION = 256  # images; PSNR to 0.05 dB
BATCH = 64  # of them at a time
SMALLEST = 6  # pixels a side: structural similarity reflects five
SETTLE = 100  # steps of a quantiser before its codes are judged


class VQVAEModule(StageModule):
    network: VQVAE

    def __init__(self, config: Any, network: VQVAE, images: LensImages, turns: Turns) -> None:
        train = images.split("train")

        def batch(places: Tensor) -> Tensor:
            turned, i = places // len(train), places % len(train)
            return apply_each(images.batch(train[i.numpy()]), turns.elements, turned)

        super().__init__(config, network, batch, len(train), turns.chances)
        self.held_out = images.batch(images.shuffled("validation")[: enough(VALIDATION, images.image_shape)])
        transform, sample = network.transform, images.batch(images.shuffled("train")[:VALIDATION])
        if not bool(self.held_out.isfinite().all() and sample.isfinite().all()):
            raise UserError(
                f"{images.path} holds pixels that are NaN or infinite: delete the folder and prepare it again"
            )
        light = transform.light(self.unit(transform(sample)))
        law = estimate_law(light)
        alpha = config.noise.recorrupt
        noisier = 1 + alpha**-2 if alpha > 0 else 1.0
        self.criterion = ReconstructionLoss(
            **config.loss.model_dump(), law=law, transform=transform, channels=network.image_shape[0], noisier=noisier
        )
        options = config.regularize.model_dump()
        self.regularize = Regularizer(**options) if any(options.values()) else None
        self.warned_of_collapse = False

    @staticmethod
    def unit(scaled: Tensor) -> Tensor:
        """[-1, 1] -> [0, 1]."""
        return (scaled + 1) / 2

    @property
    def beside(self) -> list[dict[str, Any]]:
        return self.criterion.groups

    @property
    def quantizing(self) -> bool:
        """Whether the encoder has learned long enough for a quantiser to start from its latents."""
        return self.trainer.global_step >= self.network.quantizer.warmup_steps

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        alpha, transform = self.config.noise.recorrupt, self.network.transform
        given = wanted = transform(batch)
        if alpha > 0:  # where the law of the criterion holds
            light = transform.light(self.unit(given))
            given, wanted = (2 * transform.from_light(x) - 1 for x in recorrupt(light, self.criterion.law, alpha))
        out = self.network(given, quantize=self.quantizing, regularize=self.regularize)
        target = out.target if alpha == 0 else self.network.alike(wanted, out.transformation)
        total, terms = self.criterion(
            self.unit(out.clean.float()), self.unit(target), self.trainer.global_step, out.log_ratio
        )
        return total + out.commitment, {**terms, "commitment": out.commitment}

    @torch.no_grad()
    def validate(self, folder: Path | None) -> dict[str, float]:
        q = self.network.quantizer
        # Not before a step was taken with it: a codebook starts from the latents that it first meets.
        quantizing = self.trainer.global_step > q.warmup_steps
        usage = CodeUsage(q.codes, q.heads, q.levels) if q.codes and quantizing else None
        squares = similar = 0.0
        shown: list[Tensor] = []
        for batch in self.held_out.split(BATCH):
            target = self.network.transform(batch.to(self.device))
            with self.trainer.precision_plugin.forward_context():
                out = self.shadow(target, quantize=quantizing)
            output, target = self.unit(out.clean.float()), self.unit(target)
            squares += float((output - target).square().mean()) * len(batch)
            similar += float(cast(Tensor, ssim(output, target, data_range=1.0))) * len(batch)
            shown = shown or [target[:8], output[:8]]
            if usage:
                usage.update(out.indices)
        n = len(self.held_out)
        metrics = {
            "psnr": -10 * math.log10(squares / n) if squares else math.inf,
            "ssim": similar / n,
            **(usage.compute() if usage else {}),
        }
        if usage:
            self.watch(usage)
        if folder is not None:
            target, output = shown
            pairs = torch.stack([target, output, ((target - output) * 10 + 0.5).clamp(0, 1)])
            title = f"step {self.trainer.global_step}: images, clean reconstructions, difference x 10 (mid-scale is 0)"
            save_grid(folder / f"{self.trainer.global_step:07d}.png", pairs.flatten(0, 1).cpu(), columns=8, title=title)
        return metrics

    def watch(self, usage: CodeUsage) -> None:
        """Say once, while there is time to stop the run, that its codes have collapsed."""
        step, q = self.trainer.global_step, self.network.quantizer
        if self.warned_of_collapse or step < q.warmup_steps + SETTLE:
            return
        if what := usage.collapse():
            self.warned_of_collapse = True
            tqdm.write(f"{self.config.name}: its codes collapse: at step {step} {what}; start again: {q.advice}")
