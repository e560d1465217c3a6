"""How fast stage 2 trains and samples, beside loops as diffusers' example scripts write them, and where its time goes.

python -m tests.stage2_diffusion.benchmark_training --repeats 30

All have the network of configs/stage2/quickstart.yaml and, for latents, the untrained autoencoder of stage1/quickstart.yaml;
one thread, CPU time of the process, which other programs disturb less than the clock; ours and theirs take turns, step by step.
Theirs is restated without accelerate, from examples/unconditional_image_generation and text_to_image, with diffusers' own
DDPMScheduler, EMAModel and DDIMScheduler; their images are tensors in memory, so that nothing is decoded from files.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shared.autoencoder import Autoencoder
from shared.config import load_config, to_dict
from shared.data.normalise import PixelTransform
from shared.optimizer import Muon
from shared.registry import build
from shared.run import Run
from shared.schema import Stage1, Stage2
from shared.training import StageModule, fit
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.generator import Generator, build_denoiser
from stage2_diffusion.module import DiffusionModule, Latents

IMAGES, SHAPE = 256, (1, 150, 150)
PIXEL_BATCH = 2  # a step on pixels takes a minute a batch of 32
WARMUP = 3


class Spent:
    """CPU seconds within functions, call by call; what a function spends within another counts for the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inner = [0.0]
        self.stopped = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.inner.append(0.0)
            started = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                took = time.process_time() - started
                own = took - self.inner.pop()
                if not self.stopped:
                    self.seconds[name] = self.seconds.get(name, 0.0) + own
                self.inner[-1] += took

        return call

    def watch(self, owner: Any, **methods: str) -> None:
        for method, name in methods.items():
            setattr(owner, method, self.timed(name, getattr(owner, method)))


class Theirs:
    """One step of diffusers' training scripts: images -> (perhaps encoded) -> noise -> loss -> AdamW -> EMA."""

    def __init__(
        self, network: nn.Module, images: Tensor, batch: int, encode: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.network, self.encode = network.train(), encode
        self.loader = DataLoader(TensorDataset(images), batch_size=batch, shuffle=True, drop_last=True)
        self.batches = iter(self.loader)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def __call__(self) -> None:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        clean = batch[0]
        if self.encode is not None:
            with torch.no_grad():
                clean = self.encode(clean)
        noise, steps = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        noisy = self.scheduler.add_noise(clean, noise, steps)
        loss = F.mse_loss(self.network(noisy, steps / 1000), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        loss.detach().item()  # their progress bar shows it


def config(optimizer: str, folder: str, steps: int) -> Stage2:
    return load_config(Stage2, ["stage2/quickstart.yaml"], {
        "name": optimizer, "output": folder, "optimizer": {"name": optimizer},
        "trainer": {"max_steps": steps, "checkpoint_every": 10**6, "validate_every": 10**6, "progress": False,
                    "precision": "fp32", "accelerator": "cpu"},
    })  # fmt: skip


def ours(
    optimizer: str,
    latents: Tensor,
    autoencoder: Autoencoder,
    between: Callable[[int], None],
    steps: int,
    spent: Spent | None,
) -> list[float]:
    """CPU seconds of each step of the real loop, Lightning's share included; `between` steps others have their turn."""
    with tempfile.TemporaryDirectory() as folder:
        c = config(optimizer, folder, steps)
        network = build_denoiser(to_dict(c)["backbone"], to_dict(c)["diffusion"], autoencoder.latent_shape)
        data = Latents(lambda i: latents[i], len(latents), (1.0,), latents[:2])
        module = DiffusionModule(c, network, data, autoencoder, "fp32", Conditions())
        taken: list[float] = []
        last = [0.0]

        def start(*arguments: Any) -> None:
            if last[0]:
                taken.append(time.process_time() - last[0])
            between(len(taken))
            if spent is not None and len(taken) == WARMUP:
                spent.seconds.clear()
            if spent is not None and len(taken) == steps - 1:
                spent.stopped = True  # the last step has no next one that would end it
            last[0] = time.process_time()
            StageModule.on_train_batch_start(module, *arguments)

        module.on_train_batch_start = start  # type: ignore[method-assign]
        module.validate = lambda folder: {}  # type: ignore[method-assign]
        if spent is not None:
            spent.watch(module, loss="forward", backward="backward", configure_gradient_clipping="clipping")
            spent.watch(module.ema, update="moving average")
            Muon.step = spent.timed("optimiser", Muon.step)  # type: ignore[method-assign]
        fit(module, Run(c), {})
    return taken[WARMUP:]


def sampling_loop(network: nn.Module, autoencoder: Autoencoder, count: int, steps: int) -> None:
    """As DDIMPipeline does, with latents: noise, then network and scheduler in turns, then the decoder."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        x = torch.randn(count, *autoencoder.latent_shape)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(count) / 1000), int(t), x).prev_sample
        autoencoder.decode(x, observed=True, generator=[torch.Generator().manual_seed(k) for k in range(count)])


def times(function: Callable[[], Any], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats + 1):
        started = time.process_time()
        function()
        taken.append(time.process_time() - started)
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser("benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pixels", type=int, default=2, help="repeats of a step on pixels; 0: none")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.rand(IMAGES, *SHAPE)
    first, second = to_dict(load_config(Stage1, ["stage1/quickstart.yaml"])), config("muon", "-", 1)
    autoencoder = build("autoencoder", first["autoencoder"], image_shape=SHAPE, transform=PixelTransform(0.0, 1.0))
    autoencoder.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    autoencoder.fit_latents(images.split(64))
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(part) for part in images.split(64)])
    batch, blocks = second.data.batch_size, to_dict(second)
    backbone = lambda shape: build("backbone", blocks["backbone"], latent_shape=shape, cond_dim=0)  # noqa: E731
    others: dict[str, tuple[Theirs, int]] = {
        "diffusers, latents in memory": (Theirs(backbone(autoencoder.latent_shape), latents, batch, None), batch),
        "diffusers, each batch encoded": (
            Theirs(backbone(autoencoder.latent_shape), images, batch, autoencoder.encode), batch,
        ),
    }  # fmt: skip
    speed: dict[str, list[float]] = {name: [] for name in others}

    def between(step: int) -> None:
        for name, (run, size) in others.items():
            started = time.process_time()
            run()
            if step >= WARMUP:
                speed[name].append(size / (time.process_time() - started))

    spent = Spent()
    steps = a.repeats + WARMUP
    for optimizer in ("muon", "adamw"):
        turn = between if optimizer == "muon" else lambda step: None
        taken = ours(optimizer, latents, autoencoder, turn, steps, spent if optimizer == "muon" else None)
        speed[f"ours, {optimizer}"] = [batch / seconds for seconds in taken]
        if optimizer == "muon":
            rest, parts = sum(taken), dict(spent.seconds)
    if a.pixels:
        pixels = Theirs(backbone(SHAPE), images, PIXEL_BATCH, None)
        speed["diffusers, pixels, the same network"] = [PIXEL_BATCH / seconds for seconds in times(pixels, a.pixels)]

    base = statistics.median(speed["ours, muon"])
    print(f"| training, batches of {batch} | images/s | ours, muon, over it | n |\n|---|---|---|---|")
    for name, values in speed.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3g} | {base / middle:.2f} | {len(values)} |")
    print("\n| a training step with Muon | share |\n|---|---|")
    rest_share = 1 - sum(parts.values()) / rest
    for name, seconds in {**parts, "reading the batch, Lightning": rest_share * rest}.items():
        print(f"| {name} | {100 * seconds / rest:.1f} % |")
    print(f"| whole | {1e3 * rest / len(speed['ours, muon']):.0f} ms |")

    denoiser = build_denoiser(blocks["backbone"], blocks["diffusion"], autoencoder.latent_shape)
    generator, count = Generator(autoencoder, denoiser, "fp32", blocks["sampling"]).to("cpu"), 64
    network = backbone(autoencoder.latent_shape).eval()
    drawn = {
        "ours, 8 steps of ab2": lambda: generator.images(range(count), steps=8),
        "diffusers, 8 steps of DDIM": lambda: sampling_loop(network, autoencoder, count, 8),
        "diffusers, 50 steps of DDIM, its default": lambda: sampling_loop(network, autoencoder, count, 50),
    }
    print("\n| sampling, decoded, 64 at once | lenses/s |\n|---|---|")
    for name, function in drawn.items():
        print(f"| {name} | {count / statistics.median(times(function, 5)):.1f} |")
    spent = Spent()
    spent.watch(denoiser, forward="network")
    spent.watch(autoencoder, decode_clean="decoder", observe="pixel noise")
    started = time.process_time()
    for _ in range(5):
        generator.images(range(count), steps=8)
    whole = time.process_time() - started
    print("\n| sampling, 8 steps | share |\n|---|---|")
    for name, seconds in {**spent.seconds, "seeds, sampler": whole - sum(spent.seconds.values())}.items():
        print(f"| {name} | {100 * seconds / whole:.1f} % |")


if __name__ == "__main__":
    main()
