"""A small UNet for latent grids of any size."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_diffusion.backbones.layers import (
    Embedding,
    attend,
    group_norm,
    require_heads,
    require_levels,
    split_heads,
    zeroed,
)


class ResBlock(nn.Module):
    """x + conv(conv(x)), the second normalised, scaled and shifted by the embedding (Nichol & Dhariwal 2021, §C)."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, channels: int, embed_dim: int, dropout: float):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embed_dim, 2 * channels)
        self.norm_2, self.conv_2 = group_norm(channels), zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.film(embedded)[..., None, None].chunk(2, 1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = F.silu(torch.addcmul(shift, self.norm_2(h), 1 + scale))
        return x + self.conv_2(self.dropout(h))


class Attention(nn.Module):
    """x + self-attention over the whole grid."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, channels: int, heads: int):
        super().__init__()
        require_heads("unet", channels, heads)
        self.heads = heads
        self.norm, self.qkv = group_norm(channels), nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, hw, c): a view, if x is in channels_last
        attended = attend(*split_heads(self.qkv(tokens), self.heads))
        return x + self.out(attended).transpose(1, 2).reshape(n, c, h, w)


class Level(nn.Module):
    """Residual blocks at one resolution, with attention after each one, or between them at the bottom."""

    def __init__(self, channels: int, blocks: int, attentions: int, embed_dim: int, heads: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList([ResBlock(channels, embed_dim, dropout) for _ in range(blocks)])
        self.attentions = nn.ModuleList([Attention(channels, heads) for _ in range(attentions)])

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, embedded)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        return x


class UNet(nn.Module):
    """UNet with one skip a level (Ronneberger et al. 2015; Ho et al. 2020, §B): (x, t, cond) -> like x.

    latent_shape  (c, h, w) of x: odd and oblong grids included, for a level is half of the one above, rounded up
    cond_dim      width of cond; 0 for none
    width         channels of the first level
    multipliers   of the channels, level by level; (1,) is a plain residual network
    blocks        residual blocks on each side of a level; the last level has one more, and one side
    attention     levels that attend, counted from 0; heads: of the attention
    positional    add a learned map to the first features: lenses sit in the middle of the image
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        cond_dim: int = 0,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        heads: int = 4,
        dropout: float = 0.0,
        positional: bool = True,
    ):
        super().__init__()
        require_levels("unet", attention, len(multipliers))
        channels, height, breadth = latent_shape
        self.cond_dim = cond_dim
        embed_dim = 4 * width
        self.embedding = Embedding(embed_dim, cond_dim)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(1, width, height, breadth)) if positional else None

        widths = [width * m for m in multipliers]

        def level(i: int, n_blocks: int, attentions: int) -> Level:
            return Level(widths[i], n_blocks, attentions if i in attention else 0, embed_dim, heads, dropout)

        bottom = len(widths) - 1
        self.down_levels = nn.ModuleList([level(i, blocks, blocks) for i in range(bottom)])
        self.downs = nn.ModuleList([nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)])
        self.bottom = level(bottom, blocks + 1, blocks)
        self.ups = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in pairwise(widths)])
        self.skips = nn.ModuleList([nn.Conv2d(a, a, 1, bias=False) for a in widths[:-1]])
        self.up_levels = nn.ModuleList([level(i, blocks, blocks) for i in range(bottom)])
        self.norm, self.out = group_norm(width), zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Like x (N, c, h, w), for times t (N,) in [0, 1] and cond (N, cond_dim), or None if cond_dim is 0."""
        embedded = F.silu(self.embedding(t, cond))
        h = self.stem(x)
        if self.position is not None:
            h = h + self.position
        skips = []
        for level, down in zip(self.down_levels, self.downs, strict=True):
            skips.append(level(h, embedded))
            h = down(skips[-1])
        h = self.bottom(h, embedded)
        for level, up, skip in reversed(list(zip(self.up_levels, self.ups, self.skips, strict=True))):
            kept = skips.pop()
            # the 1x1 convolution of [upsampled, skip], taken apart: half of it runs on the small grid
            h = level(F.interpolate(up(h), size=kept.shape[-2:], mode="nearest") + skip(kept), embedded)
        return self.out(F.silu(self.norm(h)))
