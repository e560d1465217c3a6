"""Few steps by distillation: a student that says at once where its teacher's path from noise ends.

A deterministic sampler joins each noise to one sample by a path, and the student D(x_t, t) learns the end of the path
from points on it: the consistency function of Song et al. 2023, by regression on solved paths (Luhman & Luhman 2021) and
not from its own estimate a little further on. In latents a path costs little: after three CPU minutes on the quickstart's
model the squared error of the end from noise is 0.014, by consistency tuning (Geng et al. 2024) 0.040, the teacher's 0.096.
"""

import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared.checkpoint import fingerprint, state_of
from shared.config import to_dict
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.precision import autocast, choose_device, resolve_precision
from shared.processes import is_main_process
from shared.run import Run
from shared.schema import Distill
from shared.training import StageModule, fit
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import Generator
from stage2_diffusion.module import save_previews
from stage2_diffusion.pipeline import publish_generator
from stage2_diffusion.samplers import Denoise, Noise, Schedule, SeededNoise, ab2, consistency

HELD_OUT = 64  # noises whose paths are watched
PREVIEWS = 16
EXACT = 32  # evaluations of the teacher a watched path
# Of its config.json: a student has learned guided paths, and nobody has scored it yet.
OF_THE_TEACHER = ("guide", "scores", "stored", "averages")


def distill(config: Distill, resume: str = "auto") -> Path:
    """Config -> the folder of the published student, a generator like its teacher."""
    precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    device = str(choose_device(config.trainer.accelerator))
    teacher = Generator.from_pretrained(config.teacher, device, config.trust)
    teacher.precision = precision
    if before := teacher.config.get("distilled"):
        raise UserError(f"{config.teacher} is distilled itself and has no paths to learn: give its teacher, {before}")
    if teacher.one_step:
        raise UserError(f"{config.teacher} is a GAN and has no paths to learn: give a diffusion model")
    asked, of_data = conditions_asked(config, teacher)
    # Its paths are those of its weights and guidance; its images are what the student may have memorised.
    guidance = [teacher.defaults[key] for key in ("guidance", "guidance_interval")]
    made_from = {"teacher": fingerprint(config.teacher), "teacher's guidance": json.dumps(guidance)}
    made_from |= {k: v for k, v in teacher.config.get("fingerprint", {}).items() if k == "data"} | of_data
    run = Run(config, resume)
    if run.is_complete(made_from):
        tqdm.write(f"{run.folder} is complete")
        return run.model
    module = Distillation(config, teacher, asked)
    fit(module, run, made_from)
    if is_main_process():
        finish(module, run, made_from)
    return run.model


def conditions_asked(config: Distill, teacher: Generator) -> tuple[Tensor | None, dict[str, str]]:
    """The conditions (n, d) of n training images as the data have them turned, and the fingerprint of that data set.

    (1, d) and no data set if labels of turns are all there is; None if there is no condition at all.
    """
    conditions = teacher.conditions
    if not conditions.entries:
        return conditions.vector(1), {}
    path = config.data.path or teacher.config["training"]["data"]["path"]
    images = LensImages(path)
    indices = images.split("train")
    known = conditions.of(images, indices)
    if missing := [name for name in conditions.names if name not in known]:
        raise UserError(
            f"{path} does not know {missing[0]}, which {config.teacher} can be asked for: give --data.path of its own data"
        )
    return conditions.vector(len(indices), known), {"data": images.fingerprint} | conditions.fingerprint(images)


@torch.no_grad()
def solve(
    denoise: Denoise, schedule: Schedule, noise: Noise, shape: tuple[int, ...], times: Tensor
) -> tuple[Tensor, Tensor]:
    """Paths from noise to data in K steps: x_t (K, N, *shape) at times[:-1] (K,), and their ends x_0 (N, *shape)."""
    states: list[Tensor] = []
    x_0 = ab2(
        denoise, schedule, noise, shape, times=times, on_step=lambda step, t, x_t, estimate: states.append(x_t)
    )  # fmt: skip
    return torch.stack(states), x_0


def end_error(denoise: Denoise, schedule: Schedule, states: Tensor, x_0: Tensor, times: Tensor, points: int) -> Tensor:
    """The loss of a student: how far from x_0 (N, ...) it takes paths to end, from `points` of each, -> (points, N).

    states   x_t (K, N, ...) at times (K,), the pure noise first; it is always one of the points, for every sampler
             starts there
    The squared error of x_0 is divided by c², c = sigma / (alpha + sigma): of the mean velocity along the rest of the path.
    """
    n = len(x_0)
    places = torch.cat([torch.zeros(1, n, dtype=torch.long), torch.randint(1, len(states), (points - 1, n))])
    x_t = states[places.to(states.device), torch.arange(n, device=states.device)].flatten(0, 1)
    t = times.float()[places].flatten().to(states.device)
    alpha, sigma = schedule(t)
    error = (denoise(x_t, t) - x_0.repeat(points, *[1] * (x_0.ndim - 1))) * (alpha + sigma) / sigma
    return error.square().flatten(1).mean(1).unflatten(0, (points, n))


class Distillation(StageModule):
    """The student for Lightning. Its data are noises, drawn anew at every step.

    asked   conditions (n, d) that paths are solved under, dropped as in the teacher's training; None without conditions
    """

    network: Denoiser

    def __init__(self, config: Distill, teacher: Generator, asked: Tensor | None) -> None:
        student = deepcopy(teacher.denoiser).requires_grad_(True).train()
        shape = teacher.autoencoder.latent_shape

        def draw(places: Tensor) -> tuple[Tensor, ...]:
            noise = torch.randn(len(places), *shape)
            return (noise,) if asked is None else (noise, asked[torch.randint(len(asked), (len(places),))])

        super().__init__(config, student, draw, config.data.batch_size)
        self.frozen = (teacher,)  # in a tuple, so that Lightning neither trains, moves nor saves it
        noise = SeededNoise(range(HELD_OUT), stream=1)(shape)
        self.held_out = (noise, None if asked is None else asked[torch.arange(HELD_OUT) % len(asked)])
        self.ends: Tensor | None = None  # of the paths of `held_out`

    @property
    def compiled_part(self) -> nn.Module:
        return self.network.backbone

    def times(self, steps: int) -> Tensor:
        return self.network.schedule.times(steps, self.frozen[0].defaults["shift"])

    @torch.no_grad()
    def paths(self, noise: Tensor, cond: Tensor | None, steps: int) -> tuple[Tensor, Tensor]:
        """The teacher's paths from noise (N, c, h, w) under conditions (N, d), as `solve` gives them."""
        teacher, schedule = self.frozen[0], self.network.schedule
        return solve(teacher.denoise(cond), schedule, lambda shape: noise, noise.shape[1:], self.times(steps))

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        d, cond = self.config.data, self.network.dropped(beside[0]) if beside else None
        states, x_0 = self.paths(batch, cond, d.steps)
        everywhere = None if cond is None else cond.repeat(d.points, 1)
        errors = end_error(
            lambda x_t, t: self.network(x_t.contiguous(memory_format=torch.channels_last), t, everywhere),
            self.network.schedule, states, x_0, self.times(d.steps)[:-1], d.points,
        )  # fmt: skip
        return errors.mean(), {"from_noise": errors[0].mean()}

    @torch.no_grad()
    def validate(self, folder: Path | None) -> dict[str, float]:
        shadow: Denoiser = self.shadow  # type: ignore[assignment]
        teacher = self.frozen[0]
        sampling = self.config.sampling.model_dump()
        generator = Generator(teacher.autoencoder, shadow, teacher.precision, sampling, teacher.conditions)
        noise, cond = self.held_out[0].to(self.device), self.held_out[1]
        cond = None if cond is None else cond.to(self.device)
        with autocast(self.device, teacher.precision):
            if self.ends is None:
                self.ends = self.paths(noise, cond, EXACT)[1]
            guess = consistency(generator.denoise(cond), shadow.schedule, lambda shape: noise, noise.shape[1:], 1)
        metrics = {"end_error": float((guess - self.ends).square().mean())}
        if folder is not None:
            save_previews(folder, self.trainer.global_step, generator, PREVIEWS)
        return metrics


def finish(module: Distillation, run: Run, made_from: dict[str, str]) -> None:
    """Publish the student as its teacher was, with the autoencoder in it."""
    config, teacher = to_dict(module.config), module.frozen[0]
    published = {
        **{key: value for key, value in teacher.config.items() if key not in OF_THE_TEACHER},
        "sampling": config["sampling"],
        "precision": teacher.precision,
        "distilled": config["teacher"],
        "fingerprint": made_from,
        "training": {**config, "autoencoder": teacher.config["training"]["autoencoder"]},
    }
    student: Denoiser = module.shadow  # type: ignore[assignment]
    state = state_of(autoencoder=teacher.autoencoder, denoiser=student)
    publish_generator(run, state, published, card(published))


def card(published: dict) -> str:
    t, s = published["training"], published["sampling"]
    return f"""# {t["name"]}: few-step generator (stage 2 of lens-ldm)

A student of `{t["teacher"]}` (`{published["backbone"]["name"]}`) that takes {s["steps"]} evaluations a lens, or one: it
says at once where its teacher's path from a noise ends. It learned for {t["trainer"]["max_steps"]} steps of
{t["data"]["batch_size"]} paths. The autoencoder is in the same file.

    lens-ldm sample FOLDER --count 64 --out samples
    lens-ldm evaluate FOLDER --reference data/NAME

Made by `python stage2_diffusion/distill.py`; `training` in config.json is the whole configuration. Licence of the code: MIT.
"""
