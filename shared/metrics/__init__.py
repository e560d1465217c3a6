"""Metrics: arrays in, numbers out. Nothing here imports a model of ours."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

Images = Tensor | np.ndarray | Iterable[Tensor | np.ndarray]


class Readable(Protocol):
    """Images (N, C, H, W) that are read when they are asked for: images[places (n,)] are (n, C, H, W).

    A tensor, an array or a memory map is one, too.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any, /) -> Any: ...


def take(images: Readable, places: np.ndarray) -> Tensor:
    """The images (len(places), C, H, W) float32 at these places. UserError as of `batches`."""
    return next(batches(images[places], max(len(places), 1)))


def batches(images: Images, batch_size: int) -> Iterator[Tensor]:
    """Yield `images` as float32 tensors (n, C, H, W) with n <= batch_size.

    images  (N, C, H, W), tensor, array or memory map; or an iterable of such batches, of any length.
    Raises UserError for another shape, for pixels that are NaN or infinite, and for no images at all.
    """
    done = 0
    for block in [images] if isinstance(images, Tensor | np.ndarray) else images:
        if block.ndim != 4:
            raise UserError(f"images must be (N, C, H, W), got the shape {tuple(block.shape)}; add the missing axes.")
        for start in range(0, len(block), batch_size):
            part = block[start : start + batch_size]
            # np.array copies: torch does not take the read-only pixels of a memory map
            batch = part.detach().float() if isinstance(part, Tensor) else torch.from_numpy(np.array(part, np.float32))
            if not batch.isfinite().all():
                raise UserError(
                    f"images {done} to {done + len(batch) - 1} hold NaN or infinite pixels; remove or repair them."
                )
            done += len(batch)
            yield batch
    if not done:
        raise UserError("There are no images to measure.")
