"""A diffusion transformer on the latent grid (Peebles & Xie 2023), with the habits transformers have taken since."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shared.errors import UserError
from stage2_diffusion.backbones.layers import Embedding, attend, split_heads, zeroed


class Attention(nn.Module):
    """Self-attention with normalised queries and keys (Dehghani et al. 2023, §2), turned by their place in the grid."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(tokens), self.heads)
        # in float32, for a norm of float32 weights and bfloat16 vectors falls back to a slow path; on a GPU autocast casts back
        q = rotate(self.norm_q(q.float()), cos, sin)
        k = rotate(self.norm_k(k.float()), cos, sin)
        return self.out(attend(q, k, v))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020); two thirds of mlp_ratio, for its three matrices instead of two."""

    def __init__(self, width: int, mlp_ratio: float):
        super().__init__()
        hidden = 8 * max(1, round(mlp_ratio * width * 2 / 3 / 8))
        self.expand, self.contract = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.expand(tokens).chunk(2, -1)
        return self.contract(value * F.silu(gate))


class Block(nn.Module):
    """Attention and feed-forward, shifted, scaled and gated by the embedding; the identity at first (adaLN-Zero)."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, mlp_ratio)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedded)[:, None].chunk(6, -1)
        attended = self.attention(torch.addcmul(shift_1, self.norm(tokens), 1 + scale_1), cos, sin)
        tokens = tokens + gate_1 * self.dropout(attended)
        return tokens + gate_2 * self.dropout(self.mlp(torch.addcmul(shift_2, self.norm(tokens), 1 + scale_2)))


class DiT(nn.Module):
    """Transformer over patches: (x, t, cond) -> like x.

    latent_shape  (c, h, w) of x; a grid that patch does not divide is padded inside
    cond_dim      width of cond; 0 for none
    patch         side of a token in latent pixels; 1 is finest, and dearest by its fourth power in attention
    mlp_ratio     width of the feed-forward layers, counted as of an ungated one of the same cost
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        cond_dim: int = 0,
        *,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_pairs("dit", width, heads)
        channels, height, breadth = latent_shape
        self.cond_dim, self.patch = cond_dim, patch
        rows, columns = -(-height // patch), -(-breadth // patch)
        self.embedding = Embedding(width, cond_dim)
        self.stem = nn.Linear(patch**2 * channels, width)
        # rotary places are relative; a lens has a middle
        self.position = nn.Parameter(0.02 * torch.randn(1, rows * columns, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio, dropout) for _ in range(depth)])
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.out = zeroed(nn.Linear(width, patch**2 * channels))
        angles = rotary_angles(rows, columns, width // heads)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Like x (N, c, h, w), for times t (N,) in [0, 1] and cond (N, cond_dim), or None if cond_dim is 0."""
        embedded = F.silu(self.embedding(t, cond))
        tokens = self.stem(to_tokens(x, self.patch)) + self.position
        for block in self.blocks:
            tokens = block(tokens, embedded, self.cos, self.sin)
        shift, scale = self.modulation(embedded)[:, None].chunk(2, -1)
        return to_grid(self.out(torch.addcmul(shift, self.norm(tokens), 1 + scale)), x, self.patch)


def require_pairs(backbone: str, width: int, heads: int) -> None:
    if width % (4 * heads):
        raise UserError(
            f"{backbone}: width = {width} does not divide by 4 x heads = {4 * heads}, as rows and columns of pairs need; "
            "change either"
        )


def to_tokens(x: Tensor, patch: int) -> Tensor:
    """(N, c, h, w) -> (N, rows * columns, patch² c), padded with zeros below and on the right."""
    height, breadth = x.shape[-2:]
    padded = F.pad(x, (0, -breadth % patch, 0, -height % patch))
    return rearrange(padded, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)


def to_grid(tokens: Tensor, x: Tensor, patch: int) -> Tensor:
    """`to_tokens` undone: (N, rows * columns, patch² c) -> the shape of x."""
    height, breadth = x.shape[-2:]
    padded = rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", h=-(-height // patch), p=patch, q=patch)
    return padded[..., :height, :breadth]


def rotary_angles(rows: int, columns: int, dim: int) -> Tensor:
    """(rows * columns, dim / 2): a quarter of the dimensions turns with the row, a quarter with the column.

    Su et al. 2021 in two dimensions (Heo et al. 2024), with wavelengths from 6 tokens to some hundreds.
    """
    frequencies = 100 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([place.reshape(-1, 1) * frequencies for place in (row, column)], 1)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of vectors (..., T, dim) by its token's angles (T, dim / 2)."""
    first, second = vectors.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
