import numpy as np
import pytest
import torch
from PIL import Image

from shared.autoencoder import Pixels
from shared.data.normalise import PixelTransform
from shared.errors import UserError


def test_transform_maps_the_range_to_minus_one_and_one_and_back() -> None:
    transform = PixelTransform(-3.0, 250.0)
    assert transform(torch.tensor([-3.0, 123.5, 250.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    x = torch.linspace(-10, 300, 101)
    assert torch.allclose(transform.inverse(transform(x)), x, atol=1e-4)


def test_latents_are_standardised_per_channel_whatever_the_batches() -> None:
    torch.manual_seed(0)
    images = torch.rand(37, 3, 8, 10) * torch.tensor([1.0, 5.0, 20.0]).view(3, 1, 1) + 7
    model = Pixels((3, 8, 10), PixelTransform(7.0, 27.0))
    model.fit_latents(images.split(5))
    latents = model.encode(images)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(latents.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    assert torch.allclose(model.decode(latents), images, atol=1e-4)


def test_a_constant_channel_stays_finite() -> None:
    model = Pixels((1, 4, 4), PixelTransform(0.0, 1.0))
    model.fit_latents([torch.full((3, 1, 4, 4), 0.25)])
    assert torch.isfinite(model.encode(torch.rand(2, 1, 4, 4))).all()


def test_an_autoencoder_without_statistics_says_so() -> None:
    with pytest.raises(UserError, match="run stage 1 again"):
        Pixels((1, 4, 4), PixelTransform(0.0, 1.0)).require_latents()


def test_pixels_are_clipped_to_the_data_once_at_the_end() -> None:
    model = Pixels((1, 2, 2), PixelTransform(0.0, 1.0))
    model.fit_latents([torch.rand(4, 1, 2, 2)])
    decoded = model.decode(torch.full((1, 1, 2, 2), 50.0))
    assert decoded.max() == 1.0


def test_an_asinh_is_undone_by_decode_and_clipped_in_the_datas_units() -> None:
    model = Pixels((1, 40, 40), PixelTransform(-40.0, 60000.0, scale=5.0, pivot=100.0))
    images = 100 + 5 * torch.randn(8, 1, 40, 40).clamp(-5, 5)
    images[:, :, 10:20, 10:20] = 10 ** (4.7 * torch.rand(8, 1, 10, 10))
    model.fit_latents(images.split(3))
    latents = model.encode(images)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-5)
    assert torch.allclose(model.decode(latents), images, rtol=1e-5, atol=1e-3)
    assert float(model.decode(torch.full((1, 1, 40, 40), 50.0)).max()) == pytest.approx(60000, rel=1e-5)


@pytest.mark.parametrize("size", [28, 64, 150, 160])
def test_resized_pixels_are_pils_and_come_back_in_their_own_size(size: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 1, 150, 150)
    model = Pixels((1, 150, 150), PixelTransform(0.0, 1.0), size=size)
    assert model.latent_shape == (1, size, size)
    model.fit_latents([images])
    raw = model.to_raw(images)
    theirs = [Image.fromarray(x[0].numpy()).resize((size, size), Image.Resampling.BILINEAR) for x in images]
    assert torch.allclose(raw, torch.stack([torch.from_numpy(np.array(x))[None] for x in theirs]), atol=1e-5)
    decoded = model.decode(model.encode(images))
    assert decoded.shape == images.shape
    assert float(decoded.mean()) == pytest.approx(float(images.mean()), abs=2e-3)


def test_shrinking_averages_noise_and_keeps_a_ramp() -> None:
    model = Pixels((1, 120, 120), PixelTransform(-10.0, 10.0), size=30)
    ramp = torch.linspace(-1, 1, 120).expand(1, 1, 120, 120)
    back = model.from_raw(model.to_raw(ramp))[0]
    assert torch.allclose(back[..., 6:-6], ramp[..., 6:-6], atol=1e-3)
    noise = torch.randn(1, 1, 120, 120, generator=torch.Generator().manual_seed(0))
    # A triangle four pixels to each side: per axis, the sum of its squared weights is (2 * 16 + 1) / (3 * 4 * 16).
    assert float(model.to_raw(noise).var()) == pytest.approx((33 / 192) ** 2, rel=0.2)


def test_an_oblong_image_keeps_its_shape() -> None:
    model = Pixels((3, 20, 31), PixelTransform(0.0, 1.0), size=10)
    assert model.latent_shape == (3, 10, 16)
    assert model.from_raw(model.to_raw(torch.rand(2, 3, 20, 31)))[0].shape == (2, 3, 20, 31)


def test_a_crop_keeps_the_centre_to_the_bit_and_mirrors_it_beyond() -> None:
    torch.manual_seed(0)
    images = 2 * torch.rand(3, 1, 150, 150) - 1
    model = Pixels((1, 150, 150), PixelTransform(-1.0, 1.0), crop=128)
    assert model.latent_shape == (1, 128, 128)
    back = model.from_raw(model.to_raw(images))[0]
    assert torch.equal(back[..., 11:-11, 11:-11], images[..., 11:-11, 11:-11])
    assert torch.equal(back[..., 10, 11:-11], images[..., 12, 11:-11])
    assert torch.equal(back[..., 11:-11, 149], images[..., 11:-11, 127])
    both = Pixels((1, 150, 150), PixelTransform(-1.0, 1.0), crop=128, size=64)
    assert both.latent_shape == (1, 64, 64)
    assert both.from_raw(both.to_raw(images))[0].shape == images.shape


def test_what_shrinks_pixels_turns_with_them() -> None:
    model = Pixels((1, 30, 30), PixelTransform(0.0, 1.0), size=14, crop=24)
    x = torch.rand(2, 1, 30, 30)
    for turn in (lambda y: y.flip(-1), lambda y: y.flip(-2), lambda y: y.mT):
        assert torch.allclose(model.to_raw(turn(x)), turn(model.to_raw(x)), atol=1e-6)


@pytest.mark.parametrize("crop", [151, 152, 149, 50])
def test_a_crop_without_a_centre_is_refused_in_one_line(crop: int) -> None:
    with pytest.raises(UserError, match=rf"^pixels\.crop {crop} is no square in the centre of images of 150 x 150"):
        Pixels((1, 150, 150), PixelTransform(0.0, 1.0), crop=crop)
