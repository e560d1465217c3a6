"""What a backbone costs, and what it learns for as many operations as the others.

python -m tests.stage2_diffusion.benchmark
python -m tests.stage2_diffusion.benchmark --autoencoder checkpoints/quickstart-stage1 --data data/quickstart --tflop 2

The first measures forward passes and training steps of a batch of 32 latents of 15×15×5 on one thread, in seconds of the
processor, which other programs on it disturb little. The second trains each with the objective and the optimiser of
configs/stage2/quickstart.yaml, and gives the error of x_0 at 8 noise levels on held-out latents.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shared.checkpoint import load_autoencoder
from shared.config import load_config
from shared.data.cache import LensImages
from shared.flops import count
from shared.optimizer import build_optimizer
from shared.schema import Stage2
from shared.training import EMA, learning_rate_scale
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import build_denoiser
from stage2_diffusion.pipeline import encode

SHAPE, BATCH, LEVELS = (5, 15, 15), 32, 8
# About as dear as the quickstart's U-Net, each.
CELLS = {
    "unet": {"name": "unet", "blocks": 1},
    "unet, no attention": {"name": "unet", "blocks": 1, "attention": []},
    "karras_unet": {"name": "karras_unet", "width": 48},
    "dit, patch 1": {"name": "dit", "width": 72, "depth": 4, "heads": 3},
    "dit, patch 2": {"name": "dit", "width": 128, "depth": 6, "heads": 4, "patch": 2},
    "uvit, patch 1": {"name": "uvit", "width": 64, "depth": 5, "heads": 4},
    "uvit, patch 2": {"name": "uvit", "width": 128, "depth": 5, "heads": 4, "patch": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser("benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--autoencoder", help="of stage 1: train, too")
    parser.add_argument("--data", help="data set whose latents are learned")
    parser.add_argument("--tflop", type=float, default=2.0, help="of all training steps (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="BACKBONE")
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(Stage2, ["stage2/quickstart.yaml"], ["--trainer.accelerator", "cpu"])
    latents = [torch.randn(BATCH, *SHAPE)] * 2
    if a.autoencoder:
        images = LensImages(a.data)
        autoencoder, _ = load_autoencoder(a.autoencoder, images.image_shape, images.transform)
        parts = images.split("train"), images.split("validation")[:256]
        latents = [encode(autoencoder, images, part, config, "fp32") for part in parts]
    learned = " steps | error of x_0 |" if a.autoencoder else " forward, ms a lens | training step, ms a lens |"
    print(f"| backbone | parameters | GFLOP |{learned}\n|{'---|' * 5}")
    for label in a.only:
        torch.manual_seed(0)
        denoiser = build_denoiser(CELLS[label], config.diffusion.model_dump(), tuple(latents[0].shape[1:]))
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        gflop = count(denoiser, latents[0][:1], torch.zeros(1))
        size = sum(p.numel() for p in denoiser.parameters()) / 1e6
        if a.autoencoder:
            steps = round(1000 * a.tflop / (3 * BATCH * gflop))
            cells = f"{steps} | {error(train(denoiser, latents[0], steps, config), latents[1]):.4f}"
        else:
            forward, step = costs(denoiser, latents[0])
            cells = f"{1000 * forward / BATCH:.2f} | {1000 * step / BATCH:.2f}"
        print(f"| {label} | {size:.2f} M | {gflop:.3f} | {cells} |", flush=True)


def costs(denoiser: Denoiser, batch: Tensor) -> tuple[float, float]:
    """Seconds of the processor for a forward pass and for a training step, the fastest of five each."""

    def fastest(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(6):
            started = time.process_time()
            call()
            taken.append(time.process_time() - started)
        return min(taken[1:])

    optimizer = build_optimizer(denoiser, name="muon", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> None:
        denoiser.loss(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        forward = fastest(lambda: denoiser(batch, torch.full((len(batch),), 0.5)))
    return forward, fastest(step)


def train(denoiser: Denoiser, latents: Tensor, steps: int, config: Stage2) -> nn.Module:
    """The moving average of the weights after so many steps, which depend on the seed alone."""
    o = config.optimizer
    optimizer = build_optimizer(denoiser, name=o.name, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_scale(o.warmup_steps, steps, o.decay))
    ema = EMA(denoiser, config.ema.decay)
    for step in range(steps):
        torch.manual_seed(step)
        batch = latents[torch.randint(len(latents), (BATCH,))].contiguous(memory_format=torch.channels_last)
        denoiser.loss(batch).mean().backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), o.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update(denoiser, step + 1)
    return ema.module


@torch.no_grad()
def error(denoiser: nn.Module, latents: Tensor) -> float:
    """Mean squared error of x_0 over noise levels, as in training's `validation/x0_error`."""
    errors = []
    for level in range(LEVELS):
        torch.manual_seed(level)
        t = torch.full((len(latents),), (level + 0.5) / LEVELS)
        alpha, sigma = denoiser.schedule(t)  # type: ignore[operator]
        x_t = alpha * latents + sigma * torch.randn(latents.shape)
        errors.append((denoiser(x_t, t) - latents).square().mean().item())
    return sum(errors) / LEVELS


if __name__ == "__main__":
    main()
