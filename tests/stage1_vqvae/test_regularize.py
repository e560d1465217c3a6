"""The regularisers of the latents: what they do to known latents, how often, and that off is off."""

import pytest
import torch
from torch import Tensor, nn

from shared.data.normalise import PixelTransform
from stage1_vqvae.regularize import Regularizer, Transformation, draw_transformation
from stage1_vqvae.vqvae import VQVAE


def small(shape: tuple[int, int, int] = (1, 30, 30), **options: object) -> VQVAE:
    torch.manual_seed(0)
    options = {"quantizer": {"name": "fsq", "levels": [5, 5, 5, 5]}, **options}
    model = VQVAE(
        shape, PixelTransform(0.0, 1.0), widths=(8, 8), encoder_blocks=1, decoder_blocks=1, latent_channels=4, **options
    )
    for part in model.modules():  # whose blocks are the identity at first, which hides much
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.3)
    return model


def error(model: VQVAE, scaled: Tensor, regularize: Regularizer | None) -> float:
    output, target, *_ = model(scaled, regularize=regularize)
    assert output.shape == target.shape
    return float((output - target).detach().abs().max())


# --- T ----------------------------------------------------------------------------------------------------------------


def test_turning_a_known_image_and_turning_it_back() -> None:
    image = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])[None, None]
    turned = Transformation(1, (2, 3), (2, 3))(image)
    assert turned[0, 0].tolist() == [[2.0, 5.0], [1.0, 4.0], [0.0, 3.0]]
    assert torch.equal(Transformation(3, (3, 2), (3, 2))(turned), image)
    assert torch.equal(Transformation(2, (2, 3), (2, 3))(Transformation(2, (2, 3), (2, 3))(image)), image)


def test_scaling_keeps_a_plane_a_plane_and_a_mean_a_mean() -> None:
    """Pixel i of n has its middle at (i + 1/2) / n: a plane is where it was, away from the edges, and so is the light."""
    y, x = torch.meshgrid((torch.arange(60) + 0.5) / 60, (torch.arange(40) + 0.5) / 40, indexing="ij")
    small = Transformation(0, (6, 4), (3, 2))((2 * x - y)[None, None])
    assert small.shape == (1, 1, 30, 20)
    y, x = torch.meshgrid((torch.arange(30) + 0.5) / 30, (torch.arange(20) + 0.5) / 20, indexing="ij")
    assert torch.allclose(small[0, 0, 2:-2, 2:-2], (2 * x - y)[2:-2, 2:-2], atol=1e-6)
    noise = torch.rand(1, 1, 60, 40)
    assert float(Transformation(0, (6, 4), (3, 2))(noise).mean()) == pytest.approx(float(noise.mean()), abs=0.01)


def test_latents_and_images_keep_in_step() -> None:
    for turns in range(4):
        t = Transformation(turns, (15, 20), (9, 12))
        latents, images = t(torch.rand(2, 5, 15, 20)), t(torch.rand(2, 1, 150, 200))
        assert images.shape[-2:] == tuple(10 * side for side in latents.shape[-2:])
        assert latents.shape[-2:] == ((12, 9) if turns % 2 else (9, 12))


@pytest.mark.parametrize("grid", [(15, 15), (8, 12), (3, 1), (1, 1), (2, 2)])
def test_what_is_drawn(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    drawn = [draw_transformation(grid) for _ in range(4000)]
    scaled = [t for t in drawn if t.size != grid]
    for k in range(4):
        assert sum(t.turns == k for t in drawn) / 4000 == pytest.approx(0.25, abs=0.03)
    longer = {max(t.size) for t in scaled}
    assert longer == set(range(-(-max(grid) // 2), max(grid)))
    assert all(min(t.size) >= 1 and t.grid == grid for t in drawn)
    if max(grid) > 1:
        assert all(t.turns or t.size != grid for t in drawn)  # never the identity
        assert len(scaled) / 4000 == pytest.approx(0.25 + 0.75 / 2, abs=0.03)


# --- an autoencoder under T -------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """x + sign × a ramp from left to right, which knows where it is."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sign * torch.arange(x.shape[-1]) / 8


def perfect(encoder: nn.Module, decoder: nn.Module, shape: tuple[int, int, int], stem: int = 1) -> VQVAE:
    """An autoencoder without loss, of the given factor."""
    model = VQVAE(
        shape, PixelTransform(0.0, 1.0), stem=stem, strides=(), widths=(8,), latent_channels=1, encoder_blocks=1,
        decoder_blocks=1, quantizer={"name": "none"},
    )  # fmt: skip
    model.encoder, model.decoder = encoder, decoder
    return model.train()


def test_a_decoder_that_is_equivariant_has_no_loss_and_another_has() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 1, 12, 20)
    double, half = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    nn.init.constant_(half.weight, 0.5)
    equivariant = perfect(double, half, (1, 12, 20))
    other = perfect(Shifted(1.0), Shifted(-1.0), (1, 12, 20))
    assert error(equivariant, images, None) < 1e-6
    assert error(other, images, None) < 1e-6
    always = Regularizer(equivariance=1.0)
    for _ in range(20):
        assert error(equivariant, images, always) < 1e-5
        assert error(other, images, always) > 0.1


def test_turns_of_a_padded_oblong_image_are_compared_in_the_padded_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.rand(2, 1, 3, 4)
    images = nn.Upsample(scale_factor=10)(blocks)[..., 2:-3, 1:-2]  # 25 × 37, as padding to 30 × 40 undoes it
    model = perfect(nn.AvgPool2d(10), nn.Upsample(scale_factor=10), (1, 25, 37), stem=10)
    assert model.padding == (1, 2, 2, 3)
    for turns in range(4):
        drawn = Transformation(turns, (3, 4), (3, 4))
        monkeypatch.setattr("stage1_vqvae.regularize.draw_transformation", lambda grid, drawn=drawn: drawn)
        output, target, *_ = model(images, regularize=Regularizer(equivariance=1.0))
        assert output.shape == target.shape == (2, 1, *((40, 30) if turns % 2 else (30, 40)))
        assert torch.allclose(output, target, atol=1e-6)
        assert torch.allclose(target, torch.rot90(nn.Upsample(scale_factor=10)(blocks), turns, (2, 3)))


def test_the_decoder_takes_any_grid_and_the_encoder_learns_from_it() -> None:
    model = small((2, 25, 37)).train()
    regularize = Regularizer(equivariance=1.0, latent_noise=0.5, bypass=0.5)
    shapes = set()
    for _ in range(20):
        output, target, _, loss, *_ = model(torch.rand(2, 2, 25, 37) * 2 - 1, regularize=regularize)
        assert output.shape == target.shape
        shapes.add(tuple(target.shape[-2:]))
        model.zero_grad()
        ((output - target).square().mean() + loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert shapes == {(30, 40), (40, 30), (20, 20), (30, 20), (20, 30)}  # 3 × 4 cells; scaled to 2 × 3, or 2 × 2


# --- noise and bypass -------------------------------------------------------------------------------------------------


def test_latent_noise_has_the_level_that_was_asked_for() -> None:
    """u uniform in [0, tau): over many images the noise has a variance of tau² / 3 of a channel's own, and no image more
    than tau."""
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 7.0])[:, None, None]
    raw = torch.randn(600, 3, 20, 20) * scales + 5
    latents, transformation = Regularizer(latent_noise=0.4)(raw, raw.round())
    assert transformation is None
    noise = (latents - raw.round()) / scales
    for channel in range(3):
        assert float(noise[:, channel].var()) == pytest.approx(0.4**2 / 3, rel=0.1)
    level = noise.std((1, 2, 3))
    assert 0.38 < float(level.max()) < 0.42
    assert float(level.min()) < 0.02
    assert float(level.mean()) == pytest.approx(0.2, rel=0.1)


def test_bypass_takes_the_share_of_images_that_was_asked_for() -> None:
    torch.manual_seed(0)
    raw = torch.randn(4000, 2, 3, 3)
    latents, _ = Regularizer(bypass=0.3)(raw, raw.round())
    passed = (latents == raw).flatten(1).all(1)
    assert torch.equal(latents[~passed], raw.round()[~passed])  # whole images, one way or the other
    assert float(passed.float().mean()) == pytest.approx(0.3, abs=0.03)


def test_bypassed_images_keep_the_loss_of_the_quantiser() -> None:
    model, images = small(quantizer={"name": "vq", "codebook_size": 16}).train(), torch.rand(8, 1, 30, 30)
    torch.manual_seed(1)
    plain = model(images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    again = small(quantizer={"name": "vq", "codebook_size": 16}).train()
    torch.manual_seed(1)
    bypassed = again(images, regularize=Regularizer(bypass=1.0))
    assert torch.equal(plain[3], bypassed[3])
    assert float(plain[3].detach()) > 0
    assert torch.allclose(bypassed[0], model.eval()._image(model.features(images))[0], atol=1e-5)
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in again.state_dict().items())


# --- off --------------------------------------------------------------------------------------------------------------


def test_off_is_bit_identical_and_leaves_the_random_stream_alone() -> None:
    model, images = small().train(), torch.rand(4, 1, 30, 30)
    torch.manual_seed(3)
    plain, after = model(images), torch.rand(4)
    torch.manual_seed(3)
    off, after_off = model(images, regularize=Regularizer()), torch.rand(4)
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], off[:4], strict=True))
    assert torch.equal(after, after_off)
    assert plain[1] is images


def test_evaluation_knows_none_of_them() -> None:
    model, images = small().eval(), torch.rand(4, 1, 30, 30)
    everything = Regularizer(equivariance=1.0, latent_noise=1.0, bypass=1.0)
    with torch.no_grad():
        plain = model(images)
        assert all(torch.equal(a, b) for a, b in zip(plain[:4], model(images, regularize=everything)[:4], strict=True))
        model.train()
        assert not torch.equal(plain[0], model(images, regularize=everything)[0])


@pytest.mark.slow  # the compiler
def test_a_compiled_network_is_regularised_alike() -> None:
    model = small((1, 25, 30)).train()
    compiled = torch.compile(model, backend="eager")
    regularize = Regularizer(equivariance=0.7, latent_noise=0.3, bypass=0.3)
    for step in range(12):
        images = torch.rand(4, 1, 25, 30)
        torch.manual_seed(step)
        expected = model(images, regularize=regularize)
        torch.manual_seed(step)
        for a, b in zip(expected[:4], compiled(images, regularize=regularize)[:4], strict=True):
            assert torch.allclose(a, b, atol=1e-6)
