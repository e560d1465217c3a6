"""One contract for every backbone of the registry, then what is particular to each."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import SwiGLU as DiffusersSwiGLU
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from shared.autoencoder import Pixels
from shared.checkpoint import autoencoder_config, publish, state_of
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.optimizer import build_optimizer
from shared.registry import build, names, resolve
from shared.training import recompute_blocks
from stage2_diffusion.backbones import custom, dit, karras_unet, unet
from stage2_diffusion.backbones.dit import DiT, SwiGLU, rotary_angles, rotate
from stage2_diffusion.backbones.karras_unet import KarrasUNet
from stage2_diffusion.backbones.unet import UNet
from stage2_diffusion.backbones.uvit import UViT
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.generator import Generator, build_denoiser

SHAPE = (3, 7, 6)
SIZES = {"width": 32, "depth": 3, "blocks": 1, "heads": 2}  # of a small network, where its constructor has such a word
OWN = "stage2_diffusion.backbones.unet.UNet"  # stands for a class of the user's own
every = pytest.mark.parametrize("name", names("backbone"))


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "TRUSTED", {"stage2_diffusion"})


def spec(name: str, **options: Any) -> dict[str, Any]:
    """The block of a config: small, and with those of the options that this backbone has."""
    known = inspect.signature(UNet if name == "custom" else resolve("backbone", name)).parameters
    chosen = {key: value for key, value in {**SIZES, **options}.items() if key in known}
    return {"name": name, "class_path": OWN, "options": chosen} if name == "custom" else {"name": name, **chosen}


def small(name: str, shape=SHAPE, cond_dim=0, **options: Any) -> nn.Module:
    return build("backbone", spec(name, **options), latent_shape=shape, cond_dim=cond_dim)


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


@every
@pytest.mark.parametrize(
    "shape", [(8, 15, 15), (4, 19, 19), (2, 25, 25), (5, 10, 10), (5, 15, 22), (1, 30, 30), (3, 7, 13), (1, 1, 1)]
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_any_grid_goes_through_any_depth_and_starts_at_zero(name, shape, depth):
    net = small(name, shape, multipliers=(1, 2, 2)[: depth + 1], attention=(depth,), patch=depth + 1)
    out = net(*inputs(shape, n=2))
    assert out.shape == (2, *shape)
    assert not out.any()


@every
def test_pixels_go_through_as_well(name):
    shape = (1, 150, 150)
    net = small(name, shape, width=16, multipliers=(1, 1, 1, 1, 1), attention=(4,), patch=10)
    assert net(*inputs(shape, n=1)).shape == (1, *shape)


@every
def test_time_condition_its_absence_and_every_pixel_matter_after_training(name):
    net = trained(small(name, cond_dim=3), cond_dim=3).eval()
    x, t, cond = inputs(cond_dim=3)
    out = net(x, t, cond)
    assert (net(x, t, cond + 1) - out).abs().amax((1, 2, 3)).min() > 1e-3
    assert (net(x, t, torch.zeros_like(cond)) - out).abs().amax((1, 2, 3)).min() > 1e-3
    assert (net(x, 1 - t, cond) - out).abs().max() > 1e-3
    nudged = x.clone()
    nudged[:, :, 0, 0] += 1
    reach = (net(nudged, t, cond) - out).abs().amax((0, 1))
    assert (reach > 1e-6).all()  # attention carries one corner to the other


@every
def test_samples_of_a_batch_do_not_meet(name):
    net = trained(small(name, cond_dim=3), cond_dim=3).eval()
    x, t, cond = inputs(cond_dim=3)
    torch.testing.assert_close(net(x[2:3], t[2:3], cond[2:3]), net(x, t, cond)[2:3], rtol=0, atol=1e-5)


@every
def test_position_matters(name):
    """The same content elsewhere is answered differently: a lens sits in the middle."""
    net = trained(small(name)).eval()
    flat = torch.ones(1, *SHAPE)
    assert net(flat, torch.tensor([0.5])).std((2, 3)).min() > 1e-4


@every
def test_gradient_reaches_every_parameter(name):
    net = trained(small(name, cond_dim=3, multipliers=(1, 2), attention=(0, 1), patch=2), cond_dim=3)
    net.zero_grad()
    net(*inputs(cond_dim=3)).square().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@every
def test_blocks_computed_twice_have_the_same_gradients(name):
    net = trained(small(name, dropout=0.2))
    gradients = []
    for _ in range(2):
        net.zero_grad()
        torch.manual_seed(3)
        net(*inputs()).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
        assert any(getattr(block, "recomputable", False) for block in net.modules())
        recompute_blocks(net)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@every
def test_dropout_is_for_training_alone(name):
    net = trained(small(name, dropout=0.5))
    x, t, _ = inputs()
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@every
def test_the_same_seed_trains_the_same_network(name):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(trained(small(name)).state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@every
def test_a_published_model_is_the_one_that_was_trained(name, tmp_path: Path):
    blocks = {"schedule": "flow", "prediction": "velocity", "time": "uniform", "shift": 1.0}
    pixels = Pixels(SHAPE, PixelTransform(0.0, 1.0))
    pixels.fit_latents([torch.rand(4, *SHAPE)])
    told = Conditions(labels=2)
    denoiser = build_denoiser(spec(name), blocks, SHAPE, told)
    trained(denoiser.backbone, cond_dim=3)
    assert set(denoiser.backbone.state_dict()) == {key for key, _ in denoiser.backbone.named_parameters()}
    state = state_of(autoencoder=pixels, denoiser=denoiser)
    config = {"autoencoder": autoencoder_config(pixels, {"name": "pixels"}), "backbone": spec(name)}
    config |= {"diffusion": blocks, "conditions": told.to_config(), "precision": "fp32", "sampling": {}}
    publish(tmp_path / "model", "diffusion", config, state, "card")
    torch.manual_seed(9)
    generator = Generator.from_pretrained(tmp_path / "model", "cpu")
    x, t, cond = inputs(cond_dim=2)
    denoiser.eval()
    torch.testing.assert_close(generator.denoiser(x, t, cond), denoiser(x, t, cond), rtol=0, atol=1e-5)
    assert (generator.denoiser(x, t) - denoiser(x, t, cond)).abs().max() > 1e-3


@every
def test_bfloat16_and_channels_last_change_the_answer_by_rounding_alone(name):
    net = trained(small(name)).eval()
    x, t, _ = inputs()
    exact = net(x, t)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x, t), exact, rtol=0, atol=1e-5)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.contiguous(memory_format=torch.channels_last), t)
        out.float().square().mean().backward()
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@every
@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_compiles_in_one_graph(name, half):
    """Traced as for inductor, but run by PyTorch: no minute of waiting for the compiler."""
    net = trained(small(name)).eval()
    x, t, _ = inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        torch.testing.assert_close(compiled(x, t), net(x, t), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_code_gives_the_same_answer():
    net = trained(small("dit", depth=1)).eval()
    x, t, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x, t), net(x, t), rtol=0, atol=1e-5)


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
    for backbone in (UNet, KarrasUNet):
        with pytest.raises(UserError, match="attention at level 2, but multipliers has levels 0 to 1"):
            backbone(SHAPE, attention=(2,))
        with pytest.raises(UserError, match="20 channels does not divide by heads = 8"):
            backbone(SHAPE, width=10, heads=8)
    for backbone in (DiT, UViT):
        with pytest.raises(UserError, match="width = 100 does not divide by 4 x heads = 24"):
            backbone(SHAPE, width=100)
    with pytest.raises(UserError, match="depth = 4 is even"):
        UViT(SHAPE, depth=4)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (N, heads, T, d) -> (N, T, heads d), written out."""
    weights = torch.exp(torch.einsum("nhid,nhjd->nhij", q, k) / math.sqrt(q.shape[-1]))
    mixed = torch.einsum("nhij,nhjd->nihd", weights / weights.sum(-1, keepdim=True), v)
    return mixed.flatten(2)


def heads_of(qkv: Tensor, heads: int) -> list[Tensor]:
    """(N, T, 3 c) -> q, k, v, each (N, heads, T, c / heads)."""
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)]


@pytest.mark.parametrize("of", [unet, karras_unet])
def test_attention_over_a_grid_is_softmax_attention(of):
    torch.manual_seed(0)
    attention = of.Attention(8, 2)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 8, 5, 3)
    if of is unet:
        q, k, v = heads_of(attention.qkv(attention.norm(x).flatten(2).mT), 2)
        expected = x + attention.out(softmax_attention(q, k, v)).mT.unflatten(2, (5, 3))
    else:
        rows = attention.qkv.weight / attention.qkv.weight.norm(dim=1, keepdim=True)
        q, k, v = (part / part.square().mean(-1, keepdim=True).sqrt() for part in heads_of(x.flatten(2).mT @ rows.T, 2))
        said = attention.out(softmax_attention(q, k, v)).mT.unflatten(2, (5, 3))
        expected = (0.7 * x + 0.3 * said) / math.sqrt(0.7**2 + 0.3**2)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-5)


def test_attention_over_tokens_is_softmax_attention_of_turned_unit_vectors():
    torch.manual_seed(0)
    attention, tokens = dit.Attention(16, 2), torch.randn(2, 6, 16)
    for norm in (attention.norm_q, attention.norm_k):
        nn.init.normal_(norm.weight)
    angles = rotary_angles(2, 3, 8)
    q, k, v = heads_of(attention.qkv(tokens), 2)
    q, k = (
        rotate(part / part.square().mean(-1, keepdim=True).sqrt() * norm.weight, angles.cos(), angles.sin())
        for part, norm in ((q, attention.norm_q), (k, attention.norm_k))
    )
    expected = attention.out(softmax_attention(q, k, v))
    torch.testing.assert_close(attention(tokens, angles.cos(), angles.sin()), expected, rtol=0, atol=1e-5)


def test_tokens_turn_and_are_gated_as_in_diffusers():
    torch.manual_seed(0)
    angles, vectors = rotary_angles(4, 5, 16), torch.randn(2, 3, 20, 16)
    twice = torch.cat([angles, angles], -1)
    expected = apply_rotary_emb(vectors, (twice.cos(), twice.sin()), use_real_unbind_dim=-2)
    torch.testing.assert_close(rotate(vectors, angles.cos(), angles.sin()), expected)

    ours, tokens = SwiGLU(24, 4.0), torch.randn(2, 5, 24)
    theirs = DiffusersSwiGLU(24, 64)
    theirs.proj.load_state_dict(ours.expand.state_dict())
    torch.testing.assert_close(ours(tokens), ours.contract(theirs(tokens)))


def test_long_skips_lead_from_the_first_block_to_the_last():
    """Blocks that add their own number and joins that keep the skip alone show where each skip comes from."""
    net = UViT((1, 4, 4), width=8, depth=7, heads=1)
    for number, block in enumerate([*net.into, *net.middle, *net.out_of]):
        for layer in (block.attention.out, block.mlp.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(block.attention.out.bias, 10.0**number)
        if block.join is not None:
            block.join.weight.data = torch.cat([torch.zeros(8, 8), torch.eye(8)], 1)
            nn.init.zeros_(block.join.bias)
    nn.init.zeros_(net.stem.weight)
    nn.init.zeros_(net.stem.bias)
    nn.init.zeros_(net.position)
    seen = []
    for block in net.out_of:
        block.register_forward_hook(lambda module, given, out: seen.append(out[0, -1, 0].item()))
    net(torch.randn(1, 1, 4, 4), torch.rand(1))
    assert seen == [pytest.approx(n) for n in (111 + 1e4, 11 + 1e5, 1 + 1e6)]


# ----------------------------------------------------------------------------------------- magnitude-preserving


def magnitude(x: Tensor) -> float:
    return x.detach().square().mean().sqrt().item()


def test_layers_give_the_magnitude_that_they_are_given():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, c, 32, 32, generator=generator) for c in (64, 24))
    vectors = torch.randn(4096, 96, generator=generator)
    assert magnitude(karras_unet.silu(a)) == pytest.approx(1, rel=0.01)
    assert magnitude(karras_unet.mix(a, a.roll(1, 0), 0.3)) == pytest.approx(1, rel=0.01)
    assert magnitude(karras_unet.unit(7 * a, 1)) == pytest.approx(1, rel=1e-5)
    assert magnitude(karras_unet.Linear(96, 50)(vectors)) == pytest.approx(1, rel=0.02)
    assert magnitude(karras_unet.Conv(64, 64, 3)(a)[..., 1:-1, 1:-1]) == pytest.approx(1, rel=0.02)
    joined = karras_unet.join(a, b)
    assert magnitude(joined) == pytest.approx(1, rel=0.01)
    says = [part.square().sum().item() for part in joined.split([64, 24], 1)]
    assert says[0] == pytest.approx(says[1], rel=0.02)


def test_magnitude_is_kept_throughout_the_network_and_whatever_the_weights_have_grown_to():
    torch.manual_seed(0)
    net = KarrasUNet((5, 16, 16), multipliers=(1, 2, 2), attention=(1, 2)).eval()
    nn.init.normal_(net.out.weight, std=0.01)
    seen = []
    for block in [*net.entering, net.bottom, *net.leaving]:
        block.register_forward_hook(lambda module, given, out: seen.append(magnitude(out)))
    x, t, _ = inputs((5, 16, 16))
    out = net(x, t)
    assert len(seen) == 7
    assert all(0.7 < one < 1.1 for one in seen)  # neighbours of a feature map correlate, and its border is of zeros
    for layer in net.modules():
        if isinstance(layer, karras_unet.UnitRows):
            layer.weight.data.mul_(1000)
    torch.testing.assert_close(net(x, t), out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimiser_leaves_rows_of_length_one(optimizer):
    torch.manual_seed(0)
    net = trained(small("karras_unet"))
    net.zero_grad()
    net(*inputs()).square().mean().backward()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    build_optimizer(net, name=optimizer, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0).step()
    layers = {key: layer for key, layer in net.named_modules() if isinstance(layer, karras_unet.UnitRows)}
    for key, layer in layers.items():
        lengths = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        turned = F.cosine_similarity(layer.weight.flatten(1), before[f"{key}.weight"].flatten(1))
        assert turned.mean() < 0.999
    assert not torch.allclose(net.out.weight.flatten(1).norm(dim=1), torch.ones(SHAPE[0]))
