"""The one table of every part a config or a checkpoint may name.

Short names and not dotted paths: a renamed class orphans no checkpoint, and no file can name a module to import; the
backbone `custom`, which has a dotted path, imports only what the user has said to trust. A part is imported when it is
built and not before, so `shared` needs neither stage.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from shared.errors import UserError, hint

PARTS: dict[str, dict[str, str]] = {
    "autoencoder": {
        "vqvae": "stage1_vqvae.vqvae:VQVAE",
        "pixels": "shared.autoencoder:Pixels",
    },
    "quantizer": {
        "vq": "stage1_vqvae.quantizers:VQ",
        "simvq": "stage1_vqvae.quantizers:LinearVQ",
        "fsq": "stage1_vqvae.quantizers:FiniteScalar",
        "fsp": "stage1_vqvae.quantizers:FiniteScalarPerturbation",
        "kl": "stage1_vqvae.quantizers:KL",
        "none": "stage1_vqvae.quantizers:NoQuantizer",
    },
    "backbone": {
        "unet": "stage2_diffusion.backbones.unet:UNet",
        "dit": "stage2_diffusion.backbones.dit:DiT",
        "uvit": "stage2_diffusion.backbones.uvit:UViT",
        "karras_unet": "stage2_diffusion.backbones.karras_unet:KarrasUNet",
        "custom": "stage2_diffusion.backbones.custom:custom",
    },
    "gan": {
        "sagan": "stage2_diffusion.gan:Synthesis",
    },
    "sampler": {
        "ddpm": "stage2_diffusion.samplers:ddpm",
        "ddim": "stage2_diffusion.samplers:ddim",
        "dpmpp": "stage2_diffusion.samplers:dpmpp",
        "dpmpp_sde": "stage2_diffusion.samplers:dpmpp_sde",
        "dpmpp3": "stage2_diffusion.samplers:dpmpp3",
        "unipc": "stage2_diffusion.samplers:unipc",
        "heun": "stage2_diffusion.samplers:heun",
        "ab2": "stage2_diffusion.samplers:ab2",
        "ab3": "stage2_diffusion.samplers:ab3",
        "consistency": "stage2_diffusion.samplers:consistency",
    },
}


def names(kind: str) -> list[str]:
    """What a config may name of a kind."""
    return list(PARTS[kind])


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The class or function behind a name. UserError for a name that is not in the table; it lists those that are."""
    if name not in PARTS[kind]:
        raise UserError(f"unknown {kind} {name!r}{hint(name, names(kind))}")
    module, _, attribute = PARTS[kind][name].partition(":")
    return getattr(import_module(module), attribute)


def build(kind: str, spec: Mapping[str, Any], **interface: Any) -> Any:
    """Construct the part that `spec`, {"name": ..., option: value, ...}, describes.

    interface   what the caller knows and no config says, such as latent_shape
    UserError   for an unknown name, and for options that the part does not take
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    part = resolve(kind, spec.get("name", ""))
    try:
        # Bound before the call, so that a TypeError from inside the constructor stays what it is: our mistake.
        inspect.signature(part).bind(**interface, **options)
    except TypeError as error:
        raise UserError(f"{kind} {spec['name']!r}: {error}; the config or checkpoint is of another version") from error
    return part(**interface, **options)
