import pytest
import torch

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
