"""Layers of both stages that PyTorch's own are slower than."""

from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm in the precision of its weights, as autocast has it on a GPU.

    PyTorch's kernel of bf16 on CPUs takes three to five times as long as that of float32 where pixels lie channel by channel
    and a group has not a multiple of 16 (EPYC, AVX-512 bf16, torch 2.15); both reckon in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))
