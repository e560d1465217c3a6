"""Stage 2 from a config to a published generator: encode the latents once, train on them, publish."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared.autoencoder import Autoencoder
from shared.checkpoint import fingerprint, load_autoencoder, pretrained, publish, start_from, state_of
from shared.config import changed, to_dict
from shared.data.cache import LensImages
from shared.data.symmetries import Turns, apply, apply_each, turns
from shared.errors import UserError
from shared.models import network_name
from shared.precision import autocast, choose_device, resolve_precision
from shared.processes import is_main_process
from shared.registry import build
from shared.run import Run
from shared.schema import Adversarial, Custom, Stage2
from shared.training import fit
from stage2_diffusion.backbones.custom import trust
from stage2_diffusion.backbones.layers import Embedding
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.gan import GANModule
from stage2_diffusion.generator import ONE_STEP, Generator, build_denoiser
from stage2_diffusion.grids import tune
from stage2_diffusion.module import DiffusionModule, Latents
from stage2_diffusion.watch import Distance

FEW = 256  # images that need no progress bar
UNGUIDED = {"guide": {"max_steps": 0}, "sampling": {"guidance": 1.0}}  # what a config says of a network alone


def train(config: Stage2 | Adversarial, resume: str = "auto") -> Path:
    """Config -> the folder of the published generator, by diffusion or against an adversary."""
    if isinstance(config, Stage2) and isinstance(config.backbone, Custom):
        trust(config.backbone.class_path)
    images = LensImages(config.data.path)
    autoencoder, autoencoder_config = autoencoder_of(config, images)
    turned = turns(images, config.data.augment)
    conditions = conditions_of(config, images, turned)
    made_from = {"data": images.fingerprint, "autoencoder": fingerprint(config.autoencoder)}
    made_from |= turned.fingerprint | conditions.fingerprint(images)
    made_from |= pretrained(config.pretrained if isinstance(config, Stage2) else None)
    weaker = guide_config(config) if isinstance(config, Stage2) and config.guide.max_steps else None
    if weaker is not None and isinstance(weaker.backbone, Custom):
        trust(weaker.backbone.class_path)
    run = Run(config, resume)
    if run.is_complete(made_from):
        tqdm.write(f"{run.folder} is complete")
        return run.model
    precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    train_split, held_out_split = images.split("train"), images.shuffled("validation")[: config.trainer.watched]
    if not len(held_out_split):
        raise UserError(f"{config.data.path} has {len(images)} images, none of them for validation: prepare more")
    if config.autoencoder == "pixels":
        autoencoder.fit_latents(images.batches(train_split))
    batches = turned_latents(autoencoder, images, train_split, turned, conditions, config, precision)
    held_out = encode(autoencoder, images, held_out_split, config, precision)

    distance = (
        Distance(images, config.trainer.score_count) if config.trainer.score_every and is_main_process() else None
    )
    data = Latents(batches, len(train_split), turned.chances, held_out)
    known = conditions.of(images, held_out_split)
    module = module_of(config, data, autoencoder, precision, conditions, known, distance)  # what it refuses is told now
    if weaker is not None:
        trained, its_run = module_of(weaker, data, autoencoder, precision, conditions, known), Run(weaker, resume)
        if not its_run.last.exists():
            tqdm.write(f"first the guide, {weaker.trainer.max_steps} steps")
        fit(trained, its_run, made_from)
        module.guide = [trained.shadow]  # type: ignore[list-item]
    fit(module, run, made_from)
    if is_main_process():
        finish(module, autoencoder, autoencoder_config, images, run, precision, made_from)
    return run.model


def guide_config(config: Stage2) -> Stage2:
    """The training of the guide of a run, in a folder of the run: as that of the run, but for what `guide` says."""
    steps = config.guide.max_steps
    return changed(config, {
        **UNGUIDED, "name": "guide", "output": str(Path(config.output) / config.name), "pretrained": None,
        "backbone": config.guide.backbone, "ema": {"lengths": []}, "logger": {"wandb": "disabled"},
        "trainer": {"max_steps": steps, "validate_every": steps, "score_every": 0, "compile": False},
        "optimizer": {"warmup_steps": min(config.optimizer.warmup_steps, steps // 10)},
    })  # fmt: skip


def autoencoder_of(config: Stage2 | Adversarial, images: LensImages) -> tuple[Autoencoder, dict[str, Any]]:
    """What the config's latents are those of, for these images, and its own config."""
    return load_autoencoder(config.autoencoder, images.image_shape, images.transform, to_dict(config)["pixels"])


def conditions_of(config: Stage2 | Adversarial, images: LensImages, turned: Turns) -> Conditions:
    """What the network is told of an image; a GAN nothing."""
    if not isinstance(config, Stage2):
        return Conditions()
    return Conditions.learn(to_dict(config)["condition"], images, images.split("train"), turned)


def module_of(
    config: Stage2 | Adversarial,
    data: Latents,
    autoencoder: Autoencoder,
    precision: str,
    conditions: Conditions,
    known: Mapping[str, np.ndarray] | None = None,
    distance: Distance | None = None,
) -> DiffusionModule | GANModule:
    """A new network, from the config's seed or a model's weights, for Lightning to train; `known` of the held-out images."""
    torch.manual_seed(config.seed)
    blocks = to_dict(config)
    if isinstance(config, Stage2):
        network = build_denoiser(blocks["backbone"], blocks["diffusion"], autoencoder.latent_shape, conditions)
        if config.pretrained:
            model = start_from(config.pretrained, network, "denoiser", new=".embedding.cond.")
            if not model.get("conditions"):
                for module in network.modules():
                    if isinstance(module, Embedding):
                        module.mute()
            theirs = model["diffusion"]
            for name in ("schedule", "prediction"):
                if theirs[name] != blocks["diffusion"][name]:
                    raise UserError(
                        f"{config.pretrained} was trained with diffusion.{name} {theirs[name]}, which is to go on with "
                        f"{blocks['diffusion'][name]}: give --diffusion.{name} {theirs[name]}"
                    )
        return DiffusionModule(config, network, data, autoencoder, precision, conditions, known, distance)
    synthesis = build("gan", blocks["gan"], latent_shape=autoencoder.latent_shape)
    return GANModule(config, synthesis, data, autoencoder, precision, distance)


def turned_latents(
    autoencoder: Autoencoder,
    images: LensImages,
    indices: np.ndarray,
    turns: Turns,
    conditions: Conditions,
    config: Stage2 | Adversarial,
    precision: str,
) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    """Index i + k n (N,) -> latents (N, c, h, w) of image i of n, turned by the k-th element; where there are conditions,
    a tuple of them and the condition (N, d) of the turned images.

    An encoder does not turn its latents as its images turn, so each element has latents of its own: 4.5 kB an image and
    element at 15×15×5, 270 MB for all eight of 7,500. Pixels are turned when they are drawn.
    """
    count = len(indices)
    if config.autoencoder == "pixels":
        pixels = encode(autoencoder, images, indices, config, precision)

        def turned(places: Tensor) -> Tensor:
            return apply_each(pixels[places % count], turns.elements, places // count)
    else:
        latents = torch.cat([encode(autoencoder, images, indices, config, precision, g) for g in turns.elements])

        def turned(places: Tensor) -> Tensor:
            return latents[places]

    if not conditions.groups:
        return turned
    told = [
        conditions.vector(count, conditions.of(images, indices, element), label)
        for element, label in zip(turns.elements, turns.labels, strict=True)
    ]
    table = torch.cat([part for part in told if part is not None])
    return lambda places: (turned(places), table[places])


@torch.no_grad()
def encode(
    autoencoder: Autoencoder,
    images: LensImages,
    indices: np.ndarray,
    config: Stage2 | Adversarial,
    precision: str,
    element: str = "identity",
) -> Tensor:
    """The latents (n, c, h, w) of images turned by an element, computed once and held in memory."""
    device = choose_device(config.trainer.accelerator)
    autoencoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    show = None if config.trainer.progress and len(indices) > FEW else True
    parts = []
    with (
        autocast(device, precision),
        tqdm(desc="latents", total=len(indices), unit="image", disable=show, leave=False) as bar,
    ):
        for batch in images.batches(indices):
            batch = apply(batch.to(device), element).contiguous(memory_format=torch.channels_last)
            parts.append(autoencoder.encode(batch).float())
            bar.update(len(batch))
    return torch.cat(parts).contiguous()


def finish(
    module: DiffusionModule | GANModule,
    autoencoder: Autoencoder,
    autoencoder_config: dict,
    images: LensImages,
    run: Run,
    precision: str,
    made_from: dict[str, str],
) -> None:
    """Publish the shadow network with the autoencoder it belongs to: one path is enough to sample."""
    config = to_dict(module.config)
    module.to(choose_device(config["trainer"]["accelerator"]))
    if isinstance(module, GANModule):
        networks, parts = of_gan(module)
    else:
        networks, parts = of_diffusion(module, autoencoder, precision)
    published = {
        "autoencoder": autoencoder_config,
        **parts,
        "precision": precision,
        "data": {"name": images.name, "images": len(images.split("train"))},
        "fingerprint": made_from,
        "training": config,
    }
    publish_generator(run, state_of(autoencoder=autoencoder, **networks), published, card(published))


def of_diffusion(
    module: DiffusionModule, autoencoder: Autoencoder, precision: str
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks to publish, and what their config says of them."""
    config, sampling = to_dict(module.config), module.config.sampling
    denoiser: Denoiser = module.shadow  # type: ignore[assignment]
    averages: dict[str, float] = {}
    if config["ema"]["lengths"]:
        denoiser, averages = module.best_average()
        found = ", ".join(f"{name} {error:.4g}" for name, error in averages.items())
        tqdm.write(f"held-out error of each average, of which the first is published: {found}")
    # Before the model is published: a run that is stopped here has all that it needs to do this again.
    generator = Generator(autoencoder, denoiser, precision, sampling.model_dump(), module.conditions, *module.guide)
    generator.to(choose_device(module.config.trainer.accelerator))
    fitted = {str(steps): tune(generator, sampling.sampler, steps).times for steps in sampling.tune}
    parts = {
        "backbone": config["backbone"],
        "diffusion": config["diffusion"],
        "sampling": config["sampling"] | {"grids": {sampling.sampler: fitted} if fitted else {}},
        "conditions": module.conditions.to_config(),
        "averages": averages,
    }
    networks: dict[str, nn.Module] = {"denoiser": denoiser}
    for guide in module.guide:
        networks["guide"] = guide
        backbone = to_dict(guide_config(module.config))["backbone"]
        parts["guide"] = {"backbone": backbone, "max_steps": config["guide"]["max_steps"]}
    return networks, parts


def of_gan(module: GANModule) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The network to publish, and what its config says of it, mode collapse included."""
    spread = module.measure()
    tqdm.write(module.verdict())
    return {"denoiser": module.shadow}, {"gan": to_dict(module.config)["gan"], "sampling": ONE_STEP, "spread": spread}


def publish_generator(run: Run, state: dict[str, Tensor], config: dict[str, Any], card: str) -> None:
    """Write what `Generator.from_pretrained` reads, and say how to sample from it."""
    publish(run.model, "diffusion", config, state, card)
    tqdm.write(f"{run.model}: `lens-ldm sample {run.folder} --count 64 --out samples` draws lenses from it")


def card(published: dict) -> str:
    t = published["training"]
    if "gan" in published:
        spread = published["spread"]
        what = f"A GAN with self-attention (`{network_name(published)}`), one evaluation a lens,"
        asked = (
            f"Its samples are {spread['diversity']:.2f} times as far apart as real images, and {spread['spacing']:.2f} times "
            "as far from the next one: near 0 is mode collapse.\n"
        )
    else:
        diffusion = published["diffusion"]
        what = (
            f"A diffusion model (`{network_name(published)}`, {diffusion['prediction']} on the\n"
            f"{diffusion['schedule']} schedule)"
        )
        names = [entry["name"] for entry in published["conditions"].get("entries", [])]
        asked = f"It can be asked for {', '.join(names)}: `lens-ldm sample FOLDER --help`.\n" if names else ""
        if guide := published.get("guide"):
            weight = published["sampling"]["guidance"]
            asked += (
                f"Samples are led away, by {weight:g}, from a guide that was trained for {guide['max_steps']} steps.\n"
            )
    return f"""# {t["name"]}: generator (stage 2 of lens-ldm)

{what} of the latents of `{t["autoencoder"]}`, trained for
{t["trainer"]["max_steps"]} steps of {t["data"]["batch_size"]} on {published["data"]["images"]} images of
`{published["data"]["name"]}`. The autoencoder is in the same file.
{asked}
    lens-ldm sample FOLDER --count 64 --out samples
    lens-ldm evaluate FOLDER --reference data/NAME

Made by `python stage2_diffusion/train.py`; `training` in config.json is the whole configuration. Licence of the code: MIT.
"""
