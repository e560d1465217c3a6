"""What backbones share, against closed forms."""

import pytest
import torch

from stage2_diffusion.backbones.layers import attend, split_heads


def in_double(q, k, v):
    """Attention as Vaswani et al. 2017 write it (Eq. 1), (N, heads, T, d) -> (N, T, heads d)."""
    q, k, v = q.double(), k.double(), v.double()
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def test_split_heads_gives_queries_keys_and_values_of_each_head():
    n, tokens, heads, d = 2, 5, 3, 4
    qkv = torch.arange(n * tokens * 3 * heads * d).view(n, tokens, 3 * heads * d)
    q, k, v = split_heads(qkv, heads)
    assert q.shape == (n, heads, tokens, d)
    assert torch.equal(k[1, 2, 3], qkv[1, 3, (heads + 2) * d : (heads + 3) * d])
    assert torch.equal(torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).flatten(2), qkv)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_attend_is_scaled_dot_product_attention(half):
    """Of keys and values in half precision it loses nothing but the rounding of what comes out."""
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if half else torch.float32
    q, k, v = (3 * torch.randn(2, 4, 64, 8, generator=draw).to(dtype) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
    expected = in_double(q, k, v)
    slope = torch.randn(expected.shape, generator=draw).double()
    wanted = torch.autograd.grad((expected * slope).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        attended = attend(q, k, v)
    assert attended.dtype == dtype
    # half a unit in the last place of eight bits, and what float32 adds
    rtol = 2**-8 if half else 1e-5
    torch.testing.assert_close(attended.double(), expected, rtol=rtol, atol=2e-5)
    gradients = torch.autograd.grad((attended * slope.to(dtype)).sum(), (q, k, v))
    for gradient, right in zip(gradients, wanted, strict=True):
        assert (gradient.double() - right.double()).norm() < (2**-7 if half else 1e-5) * right.double().norm()


def test_attend_is_in_double_precision_where_all_else_is():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v), in_double(q, k, v), rtol=1e-12, atol=1e-12)
