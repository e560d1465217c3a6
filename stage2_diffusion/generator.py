"""What users hold: one path in, lenses out.

generator = Generator.from_pretrained("checkpoints/unet")
for seeds, images in generator.sample(range(64)):
    ...
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.autoencoder import Autoencoder
from shared.checkpoint import build_autoencoder, fill, load
from shared.errors import UserError
from shared.precision import autocast, choose_device
from shared.registry import build, resolve
from stage2_diffusion import custom
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.samplers import SeededNoise
from stage2_diffusion.schedule import NoiseSchedule

LATENT_NOISE, PIXEL_NOISE = 0, 1  # streams of a sample's seed, so that another sampler leaves the pixel noise alone


class Generator:
    """An autoencoder and a denoiser of its latents, ready to sample.

    precision   bf16 or fp32, as in training
    defaults    sampler, steps, shift and eta that `sample` uses when it is not told; `grids`, {sampler: {steps: times}},
                those that `lens-ldm tune-grid` has fitted to the model
    conditions  what the denoiser's condition is made of, {name: width}, side by side. `orientation` says how a training
                image was turned; samples are always asked for as the data have them, so that no turn leaks into them
                (Karras et al. 2022, arXiv 2206.00364, §F.2)
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        precision: str = "fp32",
        defaults: dict[str, Any] | None = None,
        conditions: dict[str, int] | None = None,
    ) -> None:
        self.autoencoder, self.denoiser, self.precision = autoencoder.eval(), denoiser.eval(), precision
        self.defaults = {"sampler": "ddim", "steps": 50, "shift": 1.0, "eta": 0.0, "grids": {}, **(defaults or {})}
        self.conditions = conditions or {}
        self.config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "auto", trust: str | None = None) -> "Generator":
        """Load a published model of stage 2 (its folder, or its run's); it carries the autoencoder with it.

        trust   a package on this machine whose code it may run, for a backbone that is a class of its author's own
        """
        if trust:
            custom.trust(trust)
        config, state = load(path, "diffusion")
        parts: dict[str, dict[str, Tensor]] = {"autoencoder": {}, "denoiser": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        autoencoder = build_autoencoder(config["autoencoder"], parts["autoencoder"])
        conditions = config.get("conditions", {})  # models from before there were any have none
        denoiser = build_denoiser(config["backbone"], config["diffusion"], autoencoder.latent_shape, conditions)
        fill(denoiser, parts["denoiser"], "denoiser")
        generator = cls(
            autoencoder, denoiser.requires_grad_(False), config["precision"], config["sampling"], conditions
        )
        generator.config = config
        return generator.to(device)

    def to(self, device: str) -> "Generator":
        where = choose_device() if device == "auto" else torch.device(device)
        for part in (self.autoencoder, self.denoiser):
            part.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def device(self) -> torch.device:
        return self.autoencoder.latent_mean.device

    def settings(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        eta: float | None = None,
        times: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """What `sample` makes of these, under their names: the model's own for those that are None.

        One of shift and times is None: a grid comes of either. Without both it is the model's fitted grid, if it has one
        for this sampler and number of steps.
        """
        sampler, steps = sampler or self.defaults["sampler"], steps or self.defaults["steps"]
        if eta and sampler != "ddim":
            raise UserError(f"eta is for sampler ddim, {sampler} takes none: leave it out, or take ddim")
        if eta is None:
            eta = self.defaults["eta"] if sampler == "ddim" else 0.0
        if times is None and shift is None and eta == 0:
            times = self.defaults["grids"].get(sampler, {}).get(str(steps))
        if times is not None:
            return {"sampler": sampler, "steps": len(times) - 1, "shift": None, "eta": eta, "times": list(times)}
        return {"sampler": sampler, "steps": steps, "shift": shift or self.defaults["shift"], "eta": eta, "times": None}

    @torch.no_grad()
    def sample(
        self,
        seeds: Iterable[int],
        cond: Tensor | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        eta: float | None = None,
        times: Sequence[float] | None = None,
        observed: bool = True,
        latents: bool = False,
        batch_size: int = 64,
        **options: Any,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (seeds, images (N, C, H, W) in the data's units) batch by batch.

        An image depends on its own seed alone: on no other, nor on its place in a batch (to rounding).

        cond      (len(seeds), d) or None: the conditions beside `orientation`
        shift     of the grid of times; above 1: shorter steps at high noise
        eta       of `ddim`
        times     another grid, falling from `t_max` of the schedule to 0; see `settings`
        observed  False: the clean light, without pixel noise
        latents   True: yield the latents, not decoded
        options   of the sampler
        """
        how = self.settings(sampler, steps, shift, eta, times)
        run, steps = resolve("sampler", how["sampler"]), how["steps"]
        if how["times"] is not None:
            options["times"] = torch.tensor(how["times"], dtype=torch.float64)
        elif how["shift"] != 1:  # or else the sampler's own grid
            options["times"] = self.denoiser.schedule.times(steps, how["shift"])
        if how["eta"]:
            options["eta"] = how["eta"]
        remaining, done = iter(seeds), 0
        while chunk := list(islice(remaining, batch_size)):
            conditions = self.condition(len(chunk), None if cond is None else cond[done : done + len(chunk)])
            done += len(chunk)

            def denoise(x_t: Tensor, t: Tensor, conditions: Tensor | None = conditions) -> Tensor:
                return self.denoiser(x_t.contiguous(memory_format=torch.channels_last), t, conditions)

            with autocast(self.device, self.precision):
                noise = SeededNoise(chunk, self.device, stream=LATENT_NOISE)
                x_0 = run(denoise, self.denoiser.schedule, noise, self.autoencoder.latent_shape, steps, **options)
                pixel_noise = SeededNoise(chunk, self.device, stream=PIXEL_NOISE).generators
                images = x_0 if latents else self.autoencoder.decode(x_0, observed=observed, generator=pixel_noise)
            yield chunk, images.float()

    def condition(self, n: int, cond: Tensor | None = None) -> Tensor | None:
        """The whole condition of n lenses as the data have them turned: label 0, then `cond` (n, d)."""
        parts = [] if cond is None else [cond.to(self.device)]
        if labels := self.conditions.get("orientation", 0):
            parts.insert(0, orientations(labels)[:1].to(self.device).expand(n, -1))
        return torch.cat(parts, 1) if parts else None

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


def orientations(labels: int) -> Tensor:
    """(labels, labels): the condition of each label, one-hot with the mean square of a standardised parameter.

    With entries of 0 and 1 a network takes up to twice as many steps to heed them (DiT, 8 labels, 400 against 200).
    """
    return labels**0.5 * torch.eye(labels)


def build_denoiser(
    backbone: dict[str, Any],
    diffusion: dict[str, Any],
    latent_shape: tuple[int, int, int],
    conditions: dict[str, int] | None = None,
) -> Denoiser:
    """The `backbone` and `diffusion` blocks of a config -> a denoiser of latents of that shape, under these conditions."""
    d = {"zero_terminal": None, **diffusion}  # models from before a key was there have its default
    if d["zero_terminal"] is None:
        # eps is asked what noise hid x_0, and from pure noise there is no answer: its schedule stops short of it.
        d["zero_terminal"] = d["prediction"] != "eps"
    schedule = NoiseSchedule(d["schedule"], zero_terminal=d["zero_terminal"], shift=d["shift"])
    training = {key: d[key] for key in ("time_mean", "time_std", "weighting", "gamma") if key in d}
    width = sum((conditions or {}).values())
    network = build("backbone", backbone, latent_shape=latent_shape, cond_dim=width + 1 if width else 0)  # + its flag
    # How an image was turned is told for every image: a sample that may come out turned is what the label is against.
    return Denoiser(network, schedule, d["prediction"], d["time"], cond_dropout=0.0, **training)
