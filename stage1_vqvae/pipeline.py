"""Stage 1 from a config to a published autoencoder: train, fit the noise law, fit the latent statistics, publish."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shared.checkpoint import autoencoder_config, pretrained, publish, start_from
from shared.config import to_dict
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from shared.data.symmetries import turns
from shared.errors import UserError
from shared.flops import flops
from shared.precision import autocast, choose_device, resolve_precision
from shared.processes import is_main_process
from shared.registry import build
from shared.run import Run
from shared.schema import Stage1
from shared.training import fit
from stage1_vqvae.module import SMALLEST, VALIDATION, VQVAEModule
from stage1_vqvae.noise import LIT, enough, estimate_law, law_of
from stage1_vqvae.vqvae import VQVAE


def train(config: Stage1, resume: str = "auto") -> Path:
    """Config -> the folder of the published autoencoder."""
    images = LensImages(config.data.path)
    if not len(images.split("validation")):
        raise UserError(f"{config.data.path} has {len(images)} images, none of them for validation: prepare more")
    if min(images.image_shape[1:]) < SMALLEST:
        height, width = images.image_shape[1:]
        raise UserError(
            f"{config.data.path} has images of {height} × {width} pixels: an autoencoder needs {SMALLEST} on each side"
        )
    choose_device(config.trainer.accelerator)  # one that is not there is told now
    turned = turns(images, config.data.augment)
    fingerprint = {"data": images.fingerprint, **turned.fingerprint, **pretrained(config.pretrained)}
    run = Run(config, resume)
    if run.is_complete(fingerprint):
        tqdm.write(f"{run.folder} is complete")
        return run.model
    spec = to_dict(config)["autoencoder"]
    torch.manual_seed(config.seed)
    network = build("autoencoder", spec, image_shape=images.image_shape, transform=images.transform)
    if config.pretrained:
        start_from(config.pretrained, network, "autoencoder")
    module = VQVAEModule(config, network, images, turned)
    fit(module, run, fingerprint)
    if is_main_process():
        finish(module, images, run, spec, fingerprint)
    return run.model


@torch.no_grad()
def finish(module: VQVAEModule, images: LensImages, run: Run, spec: dict, fingerprint: dict[str, str]) -> None:
    """Freeze the trained network: noise law on validation images, latent statistics on training images, publication."""
    config = module.config
    autoencoder: VQVAE = module.shadow.eval()  # type: ignore[assignment]
    device = choose_device(config.trainer.accelerator)
    autoencoder.to(device)
    train = images.split("train")
    held_out = images.shuffled("validation")[: enough(config.noise.images, images.image_shape)]

    precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    # As it was trained and will be used, so that the law and the statistics are those of that precision.
    with autocast(device, precision):
        autoencoder.fit_latents(batch.to(device) for batch in images.batches(train))
        real = images.batch(held_out).to(device)
        decoded = [autoencoder.decode_clean(autoencoder.encode(b)) for b in real.split(64)]
    transform = autoencoder.transform
    clean = torch.cat([images for images, _ in decoded])
    said = torch.cat([s for _, s in decoded if s is not None]) if autoencoder.predict_variance else None
    residual = real - clean
    # As during training: of what the network sees, which under asinh says more than its brightest pixels do.
    seen, drawn = transform.stretch(real), transform.stretch(clean)
    metrics: dict[str, Any] = {
        "psnr": float(-10 * ((seen - drawn) / transform.span).square().mean().log10()),
        "step": config.trainer.max_steps,
        "gflop": flops(autoencoder),
    }
    curve: dict[str, Any] = {}
    autoencoder.noise.load_state_dict(law_of(images.image_shape[0]).state_dict())  # `pretrained` brought that of others
    if config.noise.law != "none":
        law = autoencoder.noise
        if said is not None:  # relative to the law that the decoder was trained beside, here in the data's units
            law.load_state_dict(estimate_law(images.batch(images.shuffled("train")[:VALIDATION])).state_dict())
        curve = law.fit(real, clean, config.noise.law, said)
        lit = drawn - transform.stretch(law.background) > LIT * transform.span
        if bool(lit.any()):  # the mean of the bands
            left, noise = ((x * lit).double().sum((0, 2, 3)) for x in (residual.square(), law.variance(clean)))
            metrics["clean_error_over_noise"] = float((left / noise)[noise > 0].mean() - 1)
        metrics["noise"] = law.told()
    published = {
        "autoencoder": autoencoder_config(autoencoder, spec),
        "precision": precision,
        "data": {"name": images.name, "images": len(train)},
        "fingerprint": fingerprint,
        "metrics": metrics,
        "noise_curve": curve,
        "training": to_dict(config),
    }
    publish(run.model, "autoencoder", published, autoencoder.state_dict(), card(config, published))
    tqdm.write(f"{run.model}: PSNR {metrics['psnr']:.2f} dB, noise {metrics.get('noise', 'not fitted')}")


def card(config: Stage1, published: dict) -> str:
    m = published["metrics"]
    return f"""# {config.name}: autoencoder (stage 1 of lens-ldm)

Images {published["autoencoder"]["image_shape"]} <-> a small latent grid, {m["gflop"]["encode"]:.2f} GFLOP to encode and
{m["gflop"]["decode"]:.2f} to decode; {config.trainer.max_steps} steps of
{config.data.batch_size} images of `{published["data"]["name"]}` ({published["data"]["images"]} for training).

PSNR of clean reconstructions of held-out images: {m["psnr"]:.2f} dB. It is bounded by the pixel noise, which the
decoder leaves out and `decode(observed=True)` draws anew: {m.get("noise", "not fitted")}.
Images and noise are in the data's own units, {PixelTransform.from_config(published["autoencoder"])}; PSNR is in the network's.

Made by `python stage1_vqvae/train.py`; `training` in config.json is the whole configuration. Licence of the code: MIT.
"""
