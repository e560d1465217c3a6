"""U-ViT (Bao et al. 2023, arXiv 2209.12152): time, condition and patches are all tokens, with skips as in a U-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from stage2_diffusion.backbones.dit import Attention, SwiGLU, require_pairs, rotary_angles, to_grid, to_tokens
from stage2_diffusion.backbones.layers import Embedding, zeroed


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added; on the way out, first the way in is joined."""

    recomputable = True  # with trainer.checkpoint_gradients

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, joins: bool):
        super().__init__()
        self.join = nn.Linear(2 * width, width) if joins else None
        self.norm_1, self.norm_2 = (nn.LayerNorm(width) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, mlp_ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.join is not None and skip is not None:
            tokens = self.join(torch.cat([tokens, skip], -1))
        tokens = tokens + self.dropout(self.attention(self.norm_1(tokens), cos, sin))
        return tokens + self.dropout(self.mlp(self.norm_2(tokens)))


class UViT(nn.Module):
    """Transformer over tokens of time, condition and patches, with long skips: (x, t, cond) -> like x.

    Nothing is modulated: a block learns of the time by attending to its token. As in the paper, skips are joined by a
    linear layer, positions are learned, and a 3x3 convolution ends the network. Unlike there, attention and
    feed-forward are `dit`'s (normalised queries and keys, rotary places, SwiGLU), and the output starts at zero.

    latent_shape  (c, h, w) of x; a grid that patch does not divide is padded inside
    cond_dim      width of cond; 0 for none
    depth         blocks, an odd number: as many on the way in as on the way out, and one between
    patch         side of a token in latent pixels
    mlp_ratio     width of the feed-forward layers, counted as of an ungated one of the same cost
    """

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        cond_dim: int = 0,
        *,
        width: int = 192,
        depth: int = 5,
        heads: int = 6,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_pairs("uvit", width, heads)
        if depth % 2 == 0:
            raise UserError(f"uvit: depth = {depth} is even; an odd one has a block between the ways in and out")
        channels, height, breadth = latent_shape
        self.cond_dim, self.patch = cond_dim, patch
        rows, columns = -(-height // patch), -(-breadth // patch)
        extra = 1 + (cond_dim > 0)  # tokens before those of the patches
        self.embedding = Embedding(width, cond_dim)
        self.stem = nn.Linear(patch**2 * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, extra + rows * columns, width))

        def blocks(count: int, joins: bool) -> nn.ModuleList:
            return nn.ModuleList([Block(width, heads, mlp_ratio, dropout, joins) for _ in range(count)])

        self.into, self.middle, self.out_of = blocks(depth // 2, False), blocks(1, False), blocks(depth // 2, True)
        self.norm, self.head = nn.LayerNorm(width), zeroed(nn.Linear(width, patch**2 * channels))
        # The identity at first: from zero, a layer of so few channels would be the slowest of all to learn.
        self.out = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        nn.init.dirac_(self.out.weight)
        angles = F.pad(rotary_angles(rows, columns, width // heads), (0, 0, extra, 0))  # time and condition do not turn
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Like x (N, c, h, w), for times t (N,) in [0, 1] and cond (N, cond_dim), or None if cond_dim is 0."""
        given = torch.stack(self.embedding.parts(t, cond), 1)
        tokens = torch.cat([given, self.stem(to_tokens(x, self.patch))], 1) + self.position
        skips = []
        for block in self.into:
            tokens = block(tokens, self.cos, self.sin)
            skips.append(tokens)
        tokens = self.middle[0](tokens, self.cos, self.sin)
        for block in self.out_of:
            tokens = block(tokens, self.cos, self.sin, skips.pop())
        patches = self.head(self.norm(tokens[:, given.shape[1] :]))
        return self.out(to_grid(patches, x, self.patch))
