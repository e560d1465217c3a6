import pytest
import torch
from torch import nn

from shared.layers import GroupNorm


@pytest.mark.parametrize("width", [48, 64, 128])
def test_it_is_torchs_norm_in_float32_under_autocast_too(width: int) -> None:
    ours, theirs = GroupNorm(8, width), nn.GroupNorm(8, width)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    half = torch.randn(3, width, 7, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    expected = theirs(half.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(half)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(ours(half.float()), expected)
    # PyTorch's kernel of half precision says the same to its rounding, so models keep what they have learned.
    assert torch.allclose(theirs(half).float(), expected, rtol=2**-7, atol=2**-7)


def test_gradients_reach_an_input_of_half_precision() -> None:
    norm, half = GroupNorm(2, 6), torch.randn(2, 6, 4, 4).bfloat16().requires_grad_()
    whole = half.detach().float().requires_grad_()
    seen = torch.randn(2, 6, 4, 4)
    (norm(half) * seen).sum().backward()
    (norm(whole) * seen).sum().backward()
    assert half.grad is not None
    assert whole.grad is not None
    assert torch.equal(half.grad, whole.grad.bfloat16())


def test_a_network_of_double_precision_stays_so() -> None:
    assert GroupNorm(2, 4).double()(torch.randn(1, 4, 3, 3).double()).dtype == torch.float64
