"""One contract for both backbones, then what is particular to each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import UserError
from stage2_diffusion.dit import DiT, rotary_angles, rotate
from stage2_diffusion.unet import UNet

SMALL = {
    "unet": lambda shape, cond_dim=0, **o: UNet(shape, cond_dim, **{"width": 16, "blocks": 1, "heads": 2, **o}),
    "dit": lambda shape, cond_dim=0, **o: DiT(shape, cond_dim, **{"width": 32, "depth": 2, "heads": 2, **o}),
}
SHAPE = (3, 7, 6)
both = pytest.mark.parametrize("name", SMALL)


def inputs(shape=SHAPE, cond_dim=0, n=4) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(n, *shape, generator=generator), torch.rand(n, generator=generator)
    return x, t, torch.randn(n, cond_dim, generator=generator) if cond_dim else None


def trained(net: nn.Module, steps=3, shape=SHAPE, cond_dim=0) -> nn.Module:
    """A few steps from zero output: the first moves the last layer, the next those behind its zeros."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, t, cond = inputs(shape, cond_dim)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x, t, cond) - x.flip(0)).square().mean().backward()
        optimizer.step()
    return net


@both
@pytest.mark.parametrize("shape", [(8, 15, 15), (4, 19, 19), (2, 25, 25), (1, 20, 12), (3, 7, 13), (1, 1, 1)])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_any_grid_goes_through_any_depth_and_starts_at_zero(name, shape, depth):
    options = {"multipliers": (1, 2, 2)[: depth + 1], "attention": (depth,)} if name == "unet" else {"patch": depth + 1}
    net = SMALL[name](shape, **options)
    out = net(*inputs(shape, n=2))
    assert out.shape == (2, *shape)
    assert not out.any()


@both
def test_time_condition_and_every_pixel_matter_after_training(name):
    net = trained(SMALL[name](SHAPE, 3), cond_dim=3).eval()
    x, t, cond = inputs(cond_dim=3)
    out = net(x, t, cond)
    assert (net(x, t, cond + 1) - out).abs().amax((1, 2, 3)).min() > 1e-3
    assert (net(x, 1 - t, cond) - out).abs().max() > 1e-3
    nudged = x.clone()
    nudged[:, :, 0, 0] += 1
    reach = (net(nudged, t, cond) - out).abs().amax((0, 1))
    assert (reach > 1e-6).all()  # attention carries one corner to the other


@both
def test_samples_of_a_batch_do_not_meet(name):
    net = trained(SMALL[name](SHAPE, 3), cond_dim=3).eval()
    x, t, cond = inputs(cond_dim=3)
    torch.testing.assert_close(net(x[2:3], t[2:3], cond[2:3]), net(x, t, cond)[2:3], rtol=0, atol=1e-5)


@both
def test_position_matters(name):
    """The same content elsewhere is answered differently: a lens sits in the middle."""
    net = trained(SMALL[name](SHAPE)).eval()
    flat = torch.ones(1, *SHAPE)
    assert net(flat, torch.tensor([0.5])).std((2, 3)).min() > 1e-4


@both
def test_gradient_reaches_every_parameter(name):
    options = {"multipliers": (1, 2), "attention": (0, 1)} if name == "unet" else {"patch": 2}
    net = trained(SMALL[name](SHAPE, 3, **options), cond_dim=3)
    net.zero_grad()
    net(*inputs(cond_dim=3)).square().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@both
def test_dropout_is_for_training_alone(name):
    net = trained(SMALL[name](SHAPE, dropout=0.5))
    x, t, _ = inputs()
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@both
def test_the_same_seed_trains_the_same_network(name):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(trained(SMALL[name](SHAPE)).state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@both
def test_a_state_dict_is_all_there_is(name):
    net = trained(SMALL[name](SHAPE, 3), cond_dim=3).eval()
    torch.manual_seed(9)
    other = SMALL[name](SHAPE, 3).eval()
    x, t, cond = inputs(cond_dim=3)
    assert not torch.equal(other(x, t, cond), net(x, t, cond))
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(x, t, cond), net(x, t, cond))
    assert set(net.state_dict()) == {key for key, _ in net.named_parameters()}  # what a config implies is not stored


@both
def test_bfloat16_and_channels_last_change_the_answer_by_rounding_alone(name):
    net = trained(SMALL[name](SHAPE)).eval()
    x, t, _ = inputs()
    exact = net(x, t)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x, t), exact, rtol=0, atol=1e-5)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.contiguous(memory_format=torch.channels_last), t)
        out.float().square().mean().backward()
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@both
@pytest.mark.slow
def test_compiles_in_one_graph(name):
    """Traced as for inductor, but run by PyTorch: no compiler, and no minute of waiting for it."""
    net = trained(SMALL[name](SHAPE)).eval()
    x, t, _ = inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), net(x, t), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- particular


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_sizes_are_as_intended():
    assert parameters(UNet((8, 15, 15))) == pytest.approx(1.9e6, rel=0.05)
    assert parameters(DiT((8, 15, 15))) == pytest.approx(4.18e6, rel=0.05)


def test_a_token_turns_by_its_place_and_attention_sees_the_difference_alone():
    """The product of a query and a key, turned by their places, depends on the step between the places only."""
    angles = rotary_angles(5, 7, 16)
    assert angles.shape == (35, 8)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (rotate(v.expand(35, 16), angles.cos(), angles.sin()) for v in (q, k))
    scores = (turned_q @ turned_k.T).reshape(5, 7, 5, 7)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[2, 1, 4, 4], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores[1, 2, 1, 2], q @ k, rtol=0, atol=1e-4)
    assert (scores[0, 0, 2, 3] - scores[0, 0, 2, 4]).abs() > 1e-2
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 3]).abs() > 1e-2
    assert (scores[0, 0, 2, 3] - scores[2, 3, 0, 0]).abs() > 1e-2


def test_impossible_sizes_are_named():
    with pytest.raises(UserError, match="attention at level 2, but multipliers has levels 0 to 1"):
        UNet(SHAPE, attention=(2,))
    with pytest.raises(UserError, match="20 channels does not divide by heads = 8"):
        UNet(SHAPE, width=10, heads=8)
    with pytest.raises(UserError, match="width = 100 does not divide by 4 x heads = 24"):
        DiT(SHAPE, width=100)
