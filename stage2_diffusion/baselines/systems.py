"""Ways to make lenses that `lens-ldm benchmark` measures: this project, diffusers, the pixel DDPM of most of the field.

Each as its own people write it: ours by its own loop and generator, the others as their example script and trainer do
it, but for reading files, of which none reads any here: all learn noise that lies in memory.
"""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain, product, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from shared.config import load_config, merge
from shared.errors import UserError
from shared.flops import count
from shared.precision import autocast
from shared.run import Run
from shared.schema import Stage2
from stage2_diffusion.generator import Generator

Between = Callable[[], None]
IMAGES = 1024  # to learn, or a batch if that is more
TIMESTEPS = 1000  # of a DDPM
DDIM_STEPS = 50  # of diffusers' pipelines, unless they are told otherwise


@dataclass(frozen=True)
class Plan:
    """What all systems are told.

    model, trust   our side, as for `Generator.from_pretrained`
    folder         for what our training writes
    device         cpu or cuda
    precision      fp32 or bf16
    batch, lenses  images of a training step and lenses drawn at once, of those that work on latents
    pixel_batch    both, of those that work on pixels
    pixel_steps    of the TIMESTEPS of a lens on pixels that are taken, to be multiplied
    """

    model: str
    folder: str
    trust: str | None = None
    device: str = "cpu"
    precision: str = "fp32"
    batch: int = 16
    lenses: int = 16
    pixel_batch: int = 4
    pixel_steps: int = 2

    def generator(self) -> Generator:
        return Generator.from_pretrained(self.model, self.device, self.trust, self.precision)


class System:
    """One way to make lenses.

    train, sample  go on for ever, and call `between` before each step of training and before each batch of lenses
    tasks          which of the two are measured
    libraries      modules that it needs beside this one, loaded before its memory is measured
    batch, lenses  images of a step of training, and lenses drawn at once
    steps, taken   evaluations of the network a lens, and those of them that a turn of `sample` takes
    parameters     of the network
    gflop          of one evaluation of the network for one lens
    """

    tasks: tuple[str, ...] = ("train", "sample")
    libraries: tuple[str, ...] = ()
    batch: int
    lenses: int
    steps: int
    taken: int
    parameters: int
    gflop: float

    def __init__(self, plan: Plan) -> None:
        self.plan, self.device = plan, torch.device(plan.device)
        self.batch, self.lenses = plan.batch, plan.lenses

    def train(self, between: Between) -> None:
        raise NotImplementedError

    def sample(self, between: Between) -> None:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        names = ("batch", "lenses", "steps", "taken", "parameters", "gflop")
        return {name: getattr(self, name) for name in names}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def evaluation(generator: Generator) -> float:
    """GFLOP of its network, for one lens."""
    x_t = torch.zeros(1, *generator.noise_shape, device=generator.device)
    return count(generator.denoiser, x_t, torch.full((1,), 0.5, device=generator.device))


class Ours(System):
    """This project: a published model as `Generator.images` draws from it, its network as `shared.training.fit` trains it."""

    libraries = ("shared.training", "stage2_diffusion.module")  # both load much that no sampling needs

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.generator = plan.generator()
        self.steps = self.taken = self.generator.settings()["steps"]
        self.parameters, self.gflop = parameters(self.generator.denoiser), evaluation(self.generator)

    def train(self, between: Between) -> None:
        from lightning.pytorch.callbacks import LambdaCallback

        from shared.training import fit
        from stage2_diffusion.module import DiffusionModule, Latents

        own, config = self.generator, self.config()
        data = Latents.random(own.autoencoder.latent_shape, own.conditions, max(IMAGES, self.batch))
        network = deepcopy(own.denoiser).requires_grad_(True)
        module = DiffusionModule(config, network, data, own.autoencoder, self.plan.precision, own.conditions)
        fit(module, Run(config), {}, [LambdaCallback(on_train_batch_start=lambda *step: between())])

    def config(self) -> Stage2:
        """That of the model's own training, for its steps alone."""
        from stage2_diffusion.module import steps_alone

        changes = {"name": "benchmark", "data": {"batch_size": self.batch}}
        own = merge({"autoencoder": "-", **self.generator.config["training"]}, changes)
        accelerator = "cpu" if self.device.type == "cpu" else "gpu"
        config = load_config(Stage2, [], own)
        return steps_alone(config, self.plan.folder, precision=self.plan.precision, accelerator=accelerator)

    def sample(self, between: Between) -> None:
        while True:
            between()
            self.generator.images(range(self.lenses), batch_size=self.lenses)


class Diffusers(System):
    """Latent diffusion by diffusers: a UNet2DModel that is as large and as dear as our network, on the same latents.

    Trained as examples/unconditional_image_generation does it, drawn from as LDMPipeline does it, by DDIM; our decoder
    gives the images, and the latents lie in memory: encoding each batch anew, as examples/text_to_image does, costs more.
    """

    libraries = ("diffusers.models.unets.unet_2d", "diffusers.training_utils")

    ddim_steps: int | None = DDIM_STEPS  # None: as many as ours

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        ours = plan.generator()
        self.autoencoder = ours.autoencoder
        self.steps = self.taken = self.ddim_steps or ours.settings()["steps"]
        self.network, self.shape = matched(
            ours.autoencoder.latent_shape, evaluation(ours), parameters(ours.denoiser), self.device
        )
        self.parameters = parameters(self.network)
        self.gflop = count(self.network, torch.zeros(1, *self.shape, device=self.device), 0)

    def train(self, between: Between) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        network = self.network.train()
        scheduler: Any = DDPMScheduler(num_train_timesteps=TIMESTEPS)  # its methods are mixed in behind the types
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        for clean in endless(torch.randn(max(IMAGES, self.batch), *self.shape), self.batch):
            between()
            clean = clean.to(self.device)
            noise = torch.randn_like(clean)
            times = torch.randint(0, TIMESTEPS, (len(clean),), device=self.device).long()
            with autocast(self.device, self.plan.precision):
                out = network(scheduler.add_noise(clean, noise, times), times).sample
                loss = F.mse_loss(out.float(), noise.float())
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            loss.detach().item()  # their progress bar shows it

    @torch.no_grad()
    def sample(self, between: Between) -> None:
        from diffusers import DDIMScheduler

        network = self.network.eval()
        scheduler: Any = DDIMScheduler(num_train_timesteps=TIMESTEPS, clip_sample=False)
        _, height, width = self.autoencoder.latent_shape
        while True:
            between()
            scheduler.set_timesteps(self.steps)
            x = torch.randn(self.lenses, *self.shape, device=self.device) * scheduler.init_noise_sigma
            with autocast(self.device, self.plan.precision):
                for t in scheduler.timesteps:
                    x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
                seeds = [torch.Generator().manual_seed(k) for k in range(self.lenses)]
                self.autoencoder.decode(x[..., :height, :width], generator=seeds).float().cpu()


def endless(images: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of a shuffled DataLoader, over and over."""
    loader = DataLoader(TensorDataset(images), batch_size=size, shuffle=True, drop_last=True)
    return (batch for (batch,) in chain.from_iterable(repeat(loader)))


GROUPS = 8  # of normalisation: widths are multiples of it


def matched(
    latent_shape: tuple[int, int, int], gflop: float, size: int, device: torch.device | str = "cpu"
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The UNet2DModel whose GFLOP and parameters are nearest to these, the worse of the two factors deciding, and the
    shape of latents it takes: it has no sizes but multiples of its coarsest grid's, so that they are padded."""
    channels, *sides = latent_shape
    levels = max(2, min(4, 1 + math.ceil(math.log2(max(sides) / GROUPS))))
    height, width = (math.ceil(side / 2 ** (levels - 1)) * 2 ** (levels - 1) for side in sides)
    shape = channels, height, width
    x_t = torch.zeros(1, *shape, device="meta")
    best: tuple[float, list[int], int] = (math.inf, [], 0)
    for layers, ratio in product((1, 2), (1.0, 2.0, 3.0, 4.0)):
        tried: list[list[int]] = []
        narrow = 64.0
        while len(tried) < 3:
            grown = (narrow * (1 + (ratio - 1) * k / (levels - 1)) for k in range(levels))
            widths = [GROUPS * max(1, round(width / GROUPS)) for width in grown]
            if widths in tried:
                break
            tried.append(widths)
            with torch.device("meta"):
                network = unet_2d(shape, widths, layers)
            found = count(network, x_t, 0)
            error = max(abs(math.log(found / gflop)), abs(math.log(parameters(network) / size)))
            best = min(best, (error, widths, layers))
            narrow *= math.sqrt(gflop / found)  # the cost goes with the square of the width, nearly
    return unet_2d(shape, *best[1:]).to(device), shape


def unet_2d(shape: tuple[int, int, int], widths: list[int], layers: int) -> nn.Module:
    """diffusers' UNet2DModel with attention on its coarsest grid alone."""
    from diffusers import UNet2DModel

    channels, *sides = shape
    plain = len(widths) - 1
    network: Any = UNet2DModel(
        sample_size=tuple(sides), in_channels=channels, out_channels=channels, layers_per_block=layers,
        block_out_channels=tuple(widths), norm_num_groups=GROUPS,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )  # fmt: skip
    return network


class DiffusersShort(Diffusers):
    """The same, in as many steps as ours: what is left is how each spends a step."""

    tasks = ("sample",)
    ddim_steps = None


class PixelDDPM(System):
    """denoising-diffusion-pytorch as the field uses it on these lenses: 128 × 128 pixels, 1,000 steps of ancestral sampling.

    A few of the steps of a lens are taken, to be multiplied: all of them cost the same, and nothing comes before or after.
    """

    libraries = ("denoising_diffusion_pytorch", "ema_pytorch")

    def __init__(self, plan: Plan, side: int = 128, width: int = 32) -> None:
        """side   of the images; width: of the network's finest level"""
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        super().__init__(plan)
        self.batch = self.lenses = plan.pixel_batch
        self.steps, self.taken = TIMESTEPS, plan.pixel_steps
        network = Unet(dim=width, dim_mults=(1, 2, 2, 4), channels=1)
        self.diffusion = GaussianDiffusion(network, image_size=side, timesteps=TIMESTEPS, objective="pred_x0")
        self.diffusion.to(self.device)
        self.shape = 1, side, side
        self.parameters = parameters(network)
        x_t, t = torch.zeros(1, *self.shape, device=self.device), torch.zeros(1, dtype=torch.long, device=self.device)
        self.gflop = count(network, x_t, t)

    def train(self, between: Between) -> None:
        self.learn(endless(torch.rand(max(64, self.batch), *self.shape), self.batch), between)

    def learn(self, batches: Iterator[Tensor], between: Between) -> None:
        """Train on batches of images in [0, 1], as its own Trainer does, which samples from `self.ema`."""
        from ema_pytorch import EMA

        optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.ema = ema = EMA(self.diffusion, beta=0.995, update_every=10).to(self.device)
        self.diffusion.train()
        for images in batches:
            between()
            with autocast(self.device, self.plan.precision):
                loss = self.diffusion(images.to(self.device))
            loss.item()  # their progress bar shows it
            loss.backward()
            nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

    @torch.no_grad()
    def sample(self, between: Between) -> None:
        self.diffusion.eval()
        x = torch.randn(self.lenses, *self.shape, device=self.device)
        times = chain.from_iterable(repeat(range(TIMESTEPS - 1, -1, -1)))
        # Less its inference mode, in which einsums of two types fail where operations are counted (torch 2.15, bf16).
        p_sample = type(self.diffusion).p_sample.__wrapped__
        while True:
            between()
            with autocast(self.device, self.plan.precision):
                for _ in range(self.taken):
                    x, _ = p_sample(self.diffusion, x, next(times))


OURS = "ours"
SYSTEMS: dict[str, type[System]] = {
    OURS: Ours,
    "diffusers": Diffusers,
    "diffusers-short": DiffusersShort,
    "pixel-ddpm": PixelDDPM,
}


# --- a process of its own for each system and task --------------------------------------------------------------------


def work(pipe: Connection, name: str, task: str, plan: Plan, threads: int) -> None:
    """A process that is one system at one task, and answers what it is asked in between: see `turns`."""
    error: Exception
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # as our training has it
    try:
        try:
            for library in SYSTEMS[name].libraries:
                import_module(library)
        except ImportError as missing:
            raise UserError(f"{name} cannot be loaded ({missing}): `pip install -e '.[benchmark]'`") from missing
        before = most_memory("cpu")
        system = SYSTEMS[name](plan)
        getattr(system, task)(partial(next, turns(pipe, system, task, plan.device, before)))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        return
    except torch.OutOfMemoryError:
        error = UserError(f"{name} has not enough memory on the GPU: lower --batch, --lenses or --pixel-batch")
    except UserError as mistake:
        error = mistake
    except Exception:
        error = RuntimeError(f"{name}, {task}: {traceback.format_exc()}")
    with suppress(BrokenPipeError):
        pipe.send(error)


def turns(
    pipe: Any,
    system: System,
    task: str,
    device: str,
    before: int = 0,
    clocks: Sequence[Callable[[], float]] = (time.perf_counter, time.process_time),
) -> Iterator[None]:
    """Answer what comes through a pipe, and yield whenever the system is to take one more step.

    facts          what the system says of itself
    count          GFLOP of one image of a step of training, the optimiser's included, or of one lens
    time, seconds  after steps of at least so many seconds: images/s, or seconds a lens, by each clock. That of the processor
                   counts all threads, and not what other programs take of it
    memory         most bytes so far, over those of libraries (`before`) or, on a GPU, of tensors
    """
    per_step = system.batch if task == "train" else system.lenses * system.taken / system.steps
    while True:
        what, *seconds = pipe.recv()
        if what == "facts":
            pipe.send(system.facts())
        elif what == "memory":
            pipe.send(most_memory(device) - (before if device == "cpu" else 0))
        elif what == "count":
            with FlopCounterMode(display=False) as counter:
                yield
            pipe.send(counter.get_total_flops() / 1e9 / per_step)
        else:
            steps, elapsed, started = 0, [0.0], [clock() for clock in clocks]
            while steps == 0 or elapsed[0] < seconds[0]:
                yield
                if device != "cpu":
                    torch.cuda.synchronize()
                steps += 1
                elapsed = [clock() - start for clock, start in zip(clocks, started, strict=True)]
            each = [spent / (steps * per_step) for spent in elapsed]
            pipe.send([1 / spent for spent in each] if task == "train" else each)


def most_memory(device: str) -> int:
    """The most bytes that this process has had in memory at once, beside what it maps from files, or tensors on its GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "RssFile:")}
        return 1024 * (kilobytes["VmHWM:"] - kilobytes["RssFile:"])  # pages of libraries only ever grow in number
    except (OSError, KeyError):  # no Linux; elsewhere it may begin with what the parent had
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
