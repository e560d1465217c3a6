"""What backbones share: the embedding of time and condition, attention, and layers that start as nothing."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shared.errors import UserError
from shared.layers import GroupNorm


class Waves(nn.Module):
    """Time (N,) in [0, 1] as sines and cosines (N, 2 count): Vaswani et al. 2017, §3.5, with t as 1,000 ticks."""

    def __init__(self, count: int):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 1000 ** torch.linspace(0, 1, count), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


class Embedding(nn.Module):
    """Time (N,) in [0, 1] and condition (N, cond_dim), or None where cond_dim is 0, as one vector (N, width)."""

    def __init__(self, width: int, cond_dim: int = 0, frequencies: int = 64):
        super().__init__()
        self.waves = Waves(frequencies)
        self.time = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.cond = nn.Sequential(nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, width)) if cond_dim else None

    def mute(self) -> None:
        """Let the condition begin as nothing, for a network with the weights of one that has none."""
        if self.cond is not None:
            zeroed(self.cond[-1])  # type: ignore[arg-type]

    def parts(self, t: Tensor, cond: Tensor | None) -> list[Tensor]:
        """One vector (N, width) for the time and, where there is one, one for the condition."""
        return [self.time(self.waves(t)), *([] if self.cond is None else [self.cond(cond)])]

    def forward(self, t: Tensor, cond: Tensor | None) -> Tensor:
        time, *rest = self.parts(t, cond)
        return time + rest[0] if rest else time


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(N, T, 3 heads d) -> queries, keys and values (3, N, heads, T, d)."""
    return rearrange(qkv, "n t (three heads d) -> three n heads t d", three=3, heads=heads)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries, keys and values (N, heads, T, d) -> what each token attends to, (N, T, heads d)."""
    if not q.is_cpu:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    # A CPU's kernel of half precision takes up to 7 times as long backwards as that of float32 (64 tokens, AVX-512 with
    # bf16, torch 2.15); of 1,000 tokens and more the two take the same time.
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    return attended.to(v.dtype).transpose(1, 2).flatten(2)


def require_heads(backbone: str, channels: int, heads: int) -> None:
    if channels % heads:
        raise UserError(f"{backbone}: a level of {channels} channels does not divide by heads = {heads}; change either")


def require_levels(backbone: str, attention: Sequence[int], levels: int) -> None:
    if wrong := [level for level in attention if not 0 <= level < levels]:
        raise UserError(f"{backbone}: attention at level {wrong[0]}, but multipliers has levels 0 to {levels - 1}")


def group_norm(channels: int) -> GroupNorm:
    return GroupNorm(math.gcd(8, channels), channels)


def zeroed(module: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """A last layer that starts at zero, so that a block starts as the identity and the network as nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
