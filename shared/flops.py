"""What a forward pass costs, counted and not estimated: torch watches one."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.autoencoder import Autoencoder


@torch.no_grad()
def count(call: Callable[..., Any], *inputs: Any) -> float:
    """GFLOP of call(*inputs): its convolutions, matrix products and attention; a multiplication and addition are two."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops() / 1e9


def flops(model: Autoencoder) -> dict[str, float]:
    """GFLOP an image to `encode` and to `decode`, the search for its codes included where that belongs to one."""
    model = deepcopy(model).cpu().eval()
    images, raw = (torch.zeros(1, *shape) for shape in (model.image_shape, model.latent_shape))
    with torch.no_grad():
        model.from_raw(model.to_raw(images))  # what is done once, such as finding first codes, is not counted
    return {"encode": count(model.to_raw, images), "decode": count(model.from_raw, raw)}
