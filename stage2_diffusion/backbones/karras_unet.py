"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696), configuration G."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_diffusion.backbones.layers import Waves, attend, require_heads, require_levels, split_heads, zeroed

RESIDUAL = 0.3  # share of a block in the sum with what it was given


def unit(x: Tensor, dim: int) -> Tensor:
    """x with a mean square of 1 along dim; zero stays zero."""
    return x * (x.float().square().mean(dim, keepdim=True) + 1e-8).rsqrt().to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU over what it leaves of a normal variable's magnitude (Eq. 81)."""
    return F.silu(x) / 0.596


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, as large as independent a and b are (Eq. 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def join(a: Tensor, b: Tensor) -> Tensor:
    """a (N, n_a, h, w) and b (N, n_b, h, w) -> (N, n_a + n_b, h, w), both of the same say (Eq. 103)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([part * math.sqrt(total / 2 / part.shape[1]) for part in (a, b)], 1)


class UnitRows(nn.Module):
    """Weights whose rows have length 1: inputs of variance 1 that do not correlate give such outputs (Eq. 47, 66).

    The forward pass takes the length out. The optimiser calls `renormalize` after each step, or else rows would grow
    and learn ever slower (forced weight normalisation, §2.3).
    """

    weight: Tensor

    def unit_weight(self) -> Tensor:
        return F.normalize(self.weight.flatten(1)).view_as(self.weight)

    @torch.no_grad()
    def renormalize(self) -> None:
        self.weight.copy_(self.unit_weight())


class Linear(UnitRows, nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight)
        self.renormalize()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unit_weight())


class Conv(UnitRows, nn.Conv2d):
    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.normal_(self.weight)
        self.renormalize()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.unit_weight(), padding=self.padding)


class Attention(nn.Module):
    """x mixed with self-attention over the whole grid, of queries, keys and values of one length."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        require_heads("karras_unet", channels, heads)
        self.heads = heads
        self.qkv, self.out = Linear(channels, 3 * channels), Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (N, hw, c): a view, if x is in channels_last
        attended = attend(*unit(split_heads(self.qkv(tokens), self.heads), -1))
        return mix(x, self.out(attended).transpose(1, 2).reshape(n, c, h, w), RESIDUAL)


class Block(nn.Module):
    """x mixed with conv(conv(x)), scaled between by the embedding, then attention.

    entering   on the way in, where x is given unit length at each pixel first; on the way out it is not
    heads      of the attention; 0 for none
    """

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, inputs: int, outputs: int, embed_dim: int, heads: int, dropout: float, entering: bool):
        super().__init__()
        self.entering = entering
        self.resize = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.conv_1, self.conv_2 = Conv(outputs if entering else inputs, outputs, 3), Conv(outputs, outputs, 3)
        self.scale = zeroed(nn.Linear(embed_dim, outputs))
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(outputs, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        if self.entering:
            x = unit(self.resize(x), 1)
        h = self.conv_1(silu(x)) * (1 + self.scale(embedded))[..., None, None]
        h = self.conv_2(self.dropout(silu(h)))
        return self.attention(mix(x if self.entering else self.resize(x), h, RESIDUAL))


class KarrasUNet(nn.Module):
    """U-Net in which every layer keeps the magnitude of what it is given: (x, t, cond) -> like x.

    Neither norms of groups nor biases: weights of unit rows, sums and concatenations weighted to keep variance, pixels
    normalised on the way in, cosine attention, a skip from every block. Differences from the paper:

    * Rows have length 1 where the paper's entries have: a step of the optimiser, which is of one size for all networks
      here, then turns them as far as it turns other layers' weights. Its learning rate needs no inverse square root.
    * The last layer, and the scales by the embedding, are plain layers that start at zero, where the paper learns a
      scalar gain from zero in front of layers of unit rows. Such a gain moves by the learning rate a step, which is slow
      (error of x_0 after 150 steps of 32 latents at 4e-3: 0.057 with gains, 0.050 without).
    * x is not scaled to unit variance by its time, which is the schedule's to know; the first block's norm does it.
    * A level has no block of its own for resampling, the bottom one block, and a learned map of position takes the
      place of the constant channel. The frequencies of time are set and not drawn. No activation is clipped.

    latent_shape  (c, h, w) of x: odd and oblong grids included, for a level is half of the one above, rounded up
    cond_dim      width of cond, whose entries have a mean square of 1; 0 for none
    width         channels of the first level
    multipliers   of the channels, level by level
    blocks        residual blocks on each side of a level; one more in the middle
    attention     levels that attend, counted from 0, after each block; heads: of the attention
    positional    add a learned map to the first features: lenses sit in the middle of the image
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        cond_dim: int = 0,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (1,),
        heads: int = 4,
        dropout: float = 0.0,
        positional: bool = True,
    ):
        super().__init__()
        require_levels("karras_unet", attention, len(multipliers))
        channels, height, breadth = latent_shape
        self.cond_dim = cond_dim
        embed_dim = 4 * width
        self.waves, self.time = Waves(64), Linear(128, embed_dim)
        self.cond = Linear(cond_dim, embed_dim) if cond_dim else None
        self.stem = Conv(channels, width, 3)
        self.position = nn.Parameter(torch.zeros(1, width, height, breadth)) if positional else None

        def block(inputs: int, level: int, entering: bool) -> Block:
            attends = heads if level in attention else 0
            return Block(inputs, width * multipliers[level], embed_dim, attends, dropout, entering)

        self.blocks = blocks
        widths = [width * multiplier for multiplier in multipliers for _ in range(blocks)]
        levels = [level for level in range(len(multipliers)) for _ in range(blocks)]
        before, after = [width, *widths[:-1]], [widths[-1], *reversed(widths[1:])]
        self.entering = nn.ModuleList([block(n, level, True) for n, level in zip(before, levels, strict=True)])
        self.bottom = block(widths[-1], levels[-1], True)
        joined = zip(after, reversed(widths), reversed(levels), strict=True)
        self.leaving = nn.ModuleList([block(n + skip, level, False) for n, skip, level in joined])
        self.out = zeroed(nn.Conv2d(width * multipliers[0], channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Like x (N, c, h, w), for times t (N,) in [0, 1] and cond (N, cond_dim), or None if cond_dim is 0."""
        embedded = self.time(math.sqrt(2) * self.waves(t))
        if self.cond is not None:
            embedded = mix(embedded, self.cond(cond), 0.5)
        embedded = silu(embedded)
        h = self.stem(x)
        if self.position is not None:
            h = h + self.position
        skips = []
        for number, block in enumerate(self.entering):
            if number and number % self.blocks == 0:  # another level
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            h = block(h, embedded)
            skips.append(h)
        h = self.bottom(h, embedded)
        for block in self.leaving:
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:
                h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = block(join(h, skip), embedded)
        return self.out(h)
