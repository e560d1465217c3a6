"""What users hold: one path in, lenses out.

generator = Generator.from_pretrained("checkpoints/unet")
for seeds, images in generator.sample(range(64)):
    ...
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import flops
from shared.autoencoder import Autoencoder
from shared.checkpoint import build_autoencoder, fill, load, parts_of
from shared.errors import UserError
from shared.precision import autocast, named_device, usable_precision
from shared.registry import build, resolve
from shared.sampling import SAMPLING, settings_of
from stage2_diffusion.backbones import custom
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.guidance import autoguidance, classifier_free
from stage2_diffusion.samplers import Denoise, SeededNoise
from stage2_diffusion.schedule import NoiseSchedule

SSIM_SIDE = 6
ONE_STEP = {"sampler": "consistency", "steps": 1, "shift": 1.0, "eta": 0.0}  # what drawing from a GAN is
LATENT_NOISE, PIXEL_NOISE = 0, 1  # streams of a sample's seed, so that another sampler leaves the pixel noise alone


class Generator:
    """An autoencoder and a denoiser of its latents, ready to sample.

    precision   bf16 (mixed) or fp32
    defaults    sampler, steps, shift, eta, guidance and its interval that `sample` uses when it is not told; `grids`,
                {sampler: {steps: times}}, those that `lens-ldm tune-grid` has fitted to the model
    conditions  what lenses can be asked for
    guide       a weaker denoiser of the same latents and conditions, which samples are led away from (autoguidance) with the
                default weight, unless `sample` is told another one or another guide
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        precision: str = "fp32",
        defaults: dict[str, Any] | None = None,
        conditions: Conditions | None = None,
        guide: Denoiser | None = None,
    ) -> None:
        self.autoencoder, self.denoiser, self.precision = autoencoder.eval(), denoiser.eval(), precision
        self.defaults: dict[str, Any] = SAMPLING | (defaults or {})
        self.conditions = conditions or Conditions()
        self.guide = None if guide is None else guide.eval()
        self.config: dict[str, Any] = {}
        # A GAN is a denoiser of pure noise, which need not have the shape of latents.
        self.one_step: bool = getattr(denoiser, "one_step", False)
        self.noise_shape: tuple[int, ...] = getattr(denoiser, "noise_shape", autoencoder.latent_shape)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", trust: str | None = None, precision: str | None = None
    ) -> "Generator":
        """Load a published model of stage 2 (its folder, or its run's); it carries the autoencoder with it.

        trust       a package on this machine whose code it may run, for a backbone that is a class of its author's own
        precision   bf16 or fp32 (default: as in training, but fp32 where the device has no units for bf16)
        """
        if trust:
            custom.trust(trust)
        config, state = load(path, "diffusion")
        parts = parts_of(state)
        autoencoder = build_autoencoder(config["autoencoder"], parts["autoencoder"])
        conditions = Conditions.from_config(config.get("conditions", {}))  # models from before there were any have none
        if "gan" in config:
            denoiser = build("gan", config["gan"], latent_shape=autoencoder.latent_shape)
        else:
            denoiser = build_denoiser(config["backbone"], config["diffusion"], autoencoder.latent_shape, conditions)
        fill(denoiser, parts["denoiser"], "denoiser")
        guide = None
        if "guide" in config:
            network = config["guide"]["backbone"]
            guide = build_denoiser(network, config["diffusion"], autoencoder.latent_shape, conditions)
            fill(guide, parts["guide"], "guide")
            guide.requires_grad_(False)
        where = named_device(device)
        precision = precision or usable_precision(config["precision"], where)
        generator = cls(
            autoencoder, denoiser.requires_grad_(False), precision, config["sampling"], conditions, guide
        ).to(where)
        generator.config = config
        return generator

    def to(self, device: str | torch.device) -> "Generator":
        for part in (self.autoencoder, self.denoiser, self.guide):
            if part is not None:
                part.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def device(self) -> torch.device:
        return self.autoencoder.latent_mean.device

    def settings(self, **given: Any) -> dict[str, Any]:
        """`settings_of` this model; UserError for any of them where it is a GAN."""
        if self.one_step:
            if other := [k for k, value in given.items() if value not in (None, ONE_STEP.get(k))]:
                raise UserError(
                    f"this model is a GAN, which makes a lens in one evaluation without a sampler: leave out {other[0]}"
                )
            return {**ONE_STEP, "times": None}
        return settings_of(self.defaults, **given)

    @torch.no_grad()
    def sample(
        self,
        seeds: Iterable[int],
        cond: Mapping[str, Any] | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        eta: float | None = None,
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        guide: "Generator | None" = None,
        observed: bool = True,
        latents: bool = False,
        batch_size: int = 64,
        seen: Callable[[Tensor], object] | None = None,
        **options: Any,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (seeds, images (N, C, H, W) in the data's units) batch by batch.

        An image depends on its own seed alone: on no other, nor on its place in a batch (to rounding).

        cond      {"theta_E": 1.2, "class": "sphere"}: a value, or one for each seed, NaN where it may be any; see
                  `conditions.entries` for what there is
        shift     of the grid of times; above 1: shorter steps at high noise
        eta       of `ddim`
        times     another grid, falling from `t_max` of the schedule to 0; see `settings`
        guidance  1: none. Otherwise away from what `guide` says, a weaker model of the same latents; or else from the model's
                  own guide, if it has one; or else from what it says when nothing is asked for. See
                  stage2_diffusion/guidance.py; the interval likewise
        observed  False: the clean light, without pixel noise
        latents   True: yield the latents, not decoded
        seen      told at every evaluation what the images of a batch are taken to be, guidance included: latents (n, c, h, w)
        options   of the sampler
        """
        how = self.settings(sampler=sampler, steps=steps, shift=shift, eta=eta, times=times)
        run, steps = resolve("sampler", how["sampler"]), how["steps"]
        if how["times"] is not None:
            options["times"] = torch.tensor(how["times"], dtype=torch.float64)
        elif how["shift"] != 1:  # or else the sampler's own grid
            options["times"] = self.denoiser.schedule.times(steps, how["shift"])
        if how["eta"]:
            options["eta"] = how["eta"]
        weight = self.require_guidance(guidance, guide, bool(cond))
        seeds = list(seeds)
        conditions = self.condition(len(seeds), cond)
        shared = {k: v for k, v in (cond or {}).items() if guide is not None and k in guide.conditions.names}
        guides = None if guide is None else guide.condition(len(seeds), shared)
        for start in range(0, len(seeds), batch_size):
            chunk = seeds[start : start + batch_size]
            told, told_guide = (None if c is None else c[start : start + len(chunk)] for c in (conditions, guides))
            weaker = None if guide is None else partial(_denoised, guide.denoiser, condition=told_guide)
            denoise = self.denoise(told, weight, guidance_interval, weaker)
            if seen is not None:
                denoise = _watched(denoise, seen)
            with autocast(self.device, self.precision):
                noise = SeededNoise(chunk, self.device, stream=LATENT_NOISE)
                x_0 = run(denoise, self.denoiser.schedule, noise, self.noise_shape, steps, **options)
                pixel_noise = SeededNoise(chunk, self.device, stream=PIXEL_NOISE).generators
                images = x_0 if latents else self.autoencoder.decode(x_0, observed=observed, generator=pixel_noise)
            yield chunk, images.float()

    def trajectory(
        self, seeds: Sequence[int], cond: Mapping[str, Any] | None = None, *, every: int = 1, **options: Any
    ) -> list[Tensor]:
        """What each image is taken to be at every evaluation, without pixel noise: (N, C, H, W) each, on the CPU.

        every    evaluations from one to the next; the first and the last are always among them
        options  of `sample`
        """
        kept: list[Tensor] = []
        last: list[Tensor] = []
        evaluations = 0

        def see(x_0: Tensor) -> None:
            nonlocal evaluations
            last[:] = [x_0]
            if evaluations % every == 0:
                kept.append(x_0)
            evaluations += 1

        for _ in self.sample(seeds, cond, batch_size=len(seeds), latents=True, seen=see, **options):
            pass
        estimates = kept if (evaluations - 1) % every == 0 else kept + last
        with torch.no_grad(), autocast(self.device, self.precision):
            return [self.autoencoder.decode(x_0, observed=False).float().cpu() for x_0 in estimates]

    def condition(self, n: int, cond: Mapping[str, Any] | None = None) -> Tensor | None:
        """The whole condition (n, d) of lenses as the data have them turned, with `cond` as `sample` takes it."""
        vector = self.conditions.vector(n, cond)
        return None if vector is None else vector.to(self.device)

    def denoise(
        self,
        condition: Tensor | None,
        weight: float | None = None,
        interval: Sequence[float] | None = None,
        weaker: Denoise | None = None,
    ) -> Denoise:
        """The denoiser under a condition (N, d), as a sampler takes it: guided, and with its estimates of x_0 within the range
        of the data, where there is one.

        weight, interval   of guidance (default: the model's own where it has a guide, or else none)
        weaker             what to be guided by (default: the model's own guide, or else what it says without the condition)

        A network of pixels that predicts noise needs the range: at t = 1 of DDPM's schedule its error is 150 times as large in
        x_0 (Ho et al. 2020's code; Saharia et al. 2022, §2.3: static thresholding).
        """
        weight = weight if weight is not None else self.require_guidance(None, None, False)
        interval, schedule = interval or self.defaults["guidance_interval"], self.denoiser.schedule
        if weaker is None and self.guide is not None:
            weaker = partial(_denoised, self.guide, condition=condition)
        denoise: Denoise = partial(_denoised, self.denoiser, condition=condition)
        if weaker is not None:
            denoise = autoguidance(denoise, weaker, schedule, weight, interval)
        elif condition is not None and weight != 1:
            nothing = self.condition(len(condition))
            assert nothing is not None
            denoise = classifier_free(partial(_denoised, self.denoiser), schedule, condition, nothing, weight, interval)
        bounds = self.autoencoder.bounds()
        return denoise if bounds is None else lambda x_t, t: denoise(x_t, t).clamp(*bounds)

    def require_guidance(self, guidance: float | None, guide: "Generator | None", asked: bool) -> float:
        """The weight of the guidance, the model's own where none is given. UserError if there is nothing to guide by, or if
        the guide denoises other latents, or along another schedule."""
        if guide is None:
            guided = asked or self.guide is not None
            weight = guidance if guidance is not None else self.defaults["guidance"] if guided else 1.0
            if weight != 1 and not guided:
                raise UserError(
                    "guidance needs a condition, such as theta_E, or a weaker model to be guided by (--guide)"
                )
            return weight
        if self.one_step or guide.one_step:
            raise UserError("a GAN has no steps to be guided at, and guides none: leave out the guide")
        if guidance is None:
            raise UserError("a guide needs a weight, such as --guidance 1.5")
        mine, theirs = self.autoencoder.state_dict(), guide.autoencoder.state_dict()
        if mine.keys() != theirs.keys() or any(not torch.equal(v.cpu(), theirs[k].cpu()) for k, v in mine.items()):
            raise UserError(
                "the guide has another autoencoder, so its latents mean other things: train it on the same stage 1"
            )
        schedules = [generator.denoiser.schedule for generator in (self, guide)]
        if len({(schedule.name, schedule.shift) for schedule in schedules}) > 1:
            raise UserError("the guide was trained on another noise schedule (diffusion.schedule, diffusion.shift)")
        if schedules[1].t_max < schedules[0].t_max:
            raise UserError(
                "the guide predicts eps, which says nothing of pure noise, where this model starts: take one that does not"
            )
        return guidance

    def gflop(self, **options: Any) -> float:
        """GFLOP of one lens, drawn with these options of `sample`: the network as often as it is asked, guide and decoder."""
        return flops.count(lambda: self.images([0], **options))

    def images(self, seeds: Iterable[int], **options: Any) -> Tensor:
        """All of `sample` at once, on the CPU: (N, C, H, W)."""
        return torch.cat([images.cpu() for _, images in self.sample(seeds, **options)])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Iterable[int], *, observed: bool = True) -> Tensor:
        """images (N, C, H, W) through the autoencoder and back, with pixel noise of `seeds`."""
        generators = SeededNoise(list(seeds), self.device, stream=PIXEL_NOISE).generators
        with autocast(self.device, self.precision):
            latents = self.autoencoder.encode(images.to(self.device).contiguous(memory_format=torch.channels_last))
            return self.autoencoder.decode(latents, observed=observed, generator=generators).float().cpu()


def _denoised(network: Denoiser, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    return network(x_t.contiguous(memory_format=torch.channels_last), t, condition)


def _watched(denoise: Denoise, seen: Callable[[Tensor], object]) -> Denoise:
    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = denoise(x_t, t)
        seen(x_0)
        return x_0

    return watched


def build_denoiser(
    backbone: dict[str, Any],
    diffusion: dict[str, Any],
    latent_shape: tuple[int, int, int],
    conditions: Conditions | None = None,
) -> Denoiser:
    """The `backbone` and `diffusion` blocks of a config -> a denoiser of latents of that shape, under these conditions."""
    d = {"zero_terminal": None, **diffusion}  # models from before a key was there have its default
    if d["zero_terminal"] is None:
        # eps is asked what noise hid x_0, and from pure noise there is no answer: its schedule stops short of it.
        d["zero_terminal"] = d["prediction"] != "eps"
    schedule = NoiseSchedule(d["schedule"], zero_terminal=d["zero_terminal"], shift=d["shift"])
    training = {key: d[key] for key in ("time_mean", "time_std", "weighting", "gamma", "ssim") if key in d}
    if d.get("ssim") and min(latent_shape[1:]) < SSIM_SIDE:
        raise UserError(
            f"diffusion.ssim looks through a window that latents of {latent_shape[1]} x {latent_shape[2]} do not fill: "
            f"they need {SSIM_SIDE} a side; set it to 0"
        )
    told = conditions or Conditions()
    width = sum(told.groups) + len(told.groups)  # with their flags
    return Denoiser(
        build("backbone", backbone, latent_shape=latent_shape, cond_dim=width),
        schedule,
        d["prediction"],
        d["time"],
        groups=told.groups,
        # How an image was turned is told for every image: a sample that may come out turned is what the label is against.
        always=int(told.labels > 0),
        cond_dropout=told.dropout,
        cond_subsets=told.subsets,
        **training,
    )
