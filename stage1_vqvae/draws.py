"""Noise of which a seed makes the same on every device: normal numbers are drawn on the CPU, and photons made of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
MANY = 16  # photons, from where on their quantiles are those of an expansion, to a count in one of a hundred pixels


def standard_normal(like: Tensor, generator: Generators) -> Tensor:
    """White noise of the shape of `like`, drawn on the CPU so that a seed means the same on every device."""
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
    return torch.stack([torch.randn(like.shape[1:], generator=g, device=g.device) for g in generator]).to(like)


def poisson(z: Tensor, rate: Tensor) -> Tensor:
    """Normal z -> whole numbers, Poisson-distributed at rates of the same shape: as many as lie below z's place in the
    distribution. Unlike drawing them, this takes one random number each, so that a seed means the same on every device."""
    root = rate.clamp_min(MANY).sqrt()  # Cornish and Fisher 1938, to the fourth cumulant
    x = z + (z.square() - 1) / (6 * root) + ((z**3 - 3 * z) / 24 - (2 * z**3 - 5 * z) / 36) / root.square()
    numbers = (rate + root * x - 0.5).ceil().clamp_min(0)
    for image, own, mean in zip(numbers, z, rate, strict=True):  # one at a time stays in the processor's cache
        few = mean < MANY
        if bool(few.any()):
            # In double precision, where no chance is rounded to 1: it would be that of infinitely many.
            image[few] = _counted(torch.special.ndtr(own[few].double()), mean[few].double()).to(image.dtype)
    return numbers


def _counted(below: Tensor, rate: Tensor) -> Tensor:
    """The Poisson quantiles of chances `below`, by adding up."""
    chance = (-rate).exp()
    total, number = chance.clone(), torch.zeros_like(rate)
    for k in range(1, 6 * MANY):
        more = below > total
        if not bool(more.any()):
            break
        number += more
        total += chance.mul_(rate).div_(k)
    return number
