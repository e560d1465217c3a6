import pytest
import torch

from shared.data.normalise import PixelTransform
from stage1_vqvae.losses import ReconstructionLoss, chi, stretched_l1
from stage1_vqvae.noise import NoiseLaw


def law(a: float = 1e-4, b: float = 0.0) -> NoiseLaw:
    law = NoiseLaw()
    law.a.fill_(a)
    law.b.fill_(b)
    return law


def test_chi_is_half_the_mean_square_of_small_residuals_in_units_of_noise() -> None:
    target = torch.full((1, 1, 4, 4), 0.5)
    assert float(chi(target + 0.001, target, law())) == pytest.approx(0.5 * 0.01, rel=1e-2)
    assert float(chi(target + 10.0, target, law(), delta=3.0)) == pytest.approx(3.0 * 1000, rel=1e-2)  # linear far away


def test_chi_finds_the_mean_where_weights_from_the_target_would_not() -> None:
    torch.manual_seed(0)
    truth, photon = 0.02, 0.01
    target = torch.poisson(torch.full((200_000,), truth / photon)) * photon
    guess = torch.tensor(0.015, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        chi(guess.expand_as(target), target, law(1e-6, photon), delta=100.0).backward()
        optimizer.step()
    assert float(guess.detach()) == pytest.approx(float(target.mean()), rel=0.02)


def test_stretched_l1_weighs_faint_pixels_as_bright_ones() -> None:
    zero, ten = torch.zeros(1), torch.full((1,), 0.5)
    faint = float(stretched_l1(zero + 0.01, zero))
    assert faint > 5 * float(stretched_l1(ten + 0.01, ten))
    assert float(stretched_l1(torch.ones(1), zero)) == pytest.approx(1.0)


def test_the_loss_is_the_weighted_sum_and_terms_of_no_weight_are_left_out() -> None:
    output, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    weights, unit = {"l1": 2.0, "stretched": 0.0, "mse": 3.0, "chi": 0.0}, PixelTransform(0.0, 1.0)
    total, terms = ReconstructionLoss(**weights, law=law(), transform=unit)(output, target)
    assert set(terms) == {"l1", "mse"}
    expected = 2 * (output - target).abs().mean() + 3 * (output - target).square().mean()
    assert torch.allclose(total, expected)
