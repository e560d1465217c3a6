import pytest
import torch

from shared.data.normalise import PixelTransform
from stage1_vqvae.losses import ReconstructionLoss, chi, stretched_l1
from stage1_vqvae.noise import NoiseLaw


def law(a: float = 1e-4, b: float = 0.0) -> NoiseLaw:
    law = NoiseLaw()
    law.dark[0] = a
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


DEEP = PixelTransform(-40.0, 60000.0, scale=5.0, pivot=100.0)


def test_chi_of_asinh_data_is_that_of_their_own_units() -> None:
    torch.manual_seed(0)
    clean = 100 + 10 ** (4.5 * torch.rand(4, 1, 30, 30))
    noisy = clean + (25 + 2 * (clean - 100)).sqrt() * torch.randn_like(clean)
    own, network = law(25.0, 2.0), law(25.0 / 5**2, 2.0 / 5)  # in counts, and in counts of 5
    own.background.fill_(100.0)
    weights = {"l1": 0.0, "stretched": 0.0, "mse": 0.0, "chi": 1.0}
    loss = ReconstructionLoss(**weights, law=network, transform=DEEP)
    total, _ = loss(DEEP.unit(clean), DEEP.unit(noisy))
    assert float(total) == pytest.approx(float(chi(clean, noisy, own)), rel=1e-4)
    assert 0.3 < float(total) < 0.6  # half of chi² = 1, somewhat less for its robust tail


@pytest.mark.parametrize(("term", "bias"), [("chi", 0.0), ("mse", -0.18)])
def test_under_asinh_chi_alone_finds_the_mean_of_the_light(term: str, bias: float) -> None:
    torch.manual_seed(0)
    truth = torch.tensor(105.0)  # one scale above the sky, where the asinh bends most
    target = DEEP.unit(truth + 5 * torch.randn(50_000))
    weights = {"l1": 0.0, "stretched": 0.0, "mse": 0.0, "chi": 0.0, term: 1.0}
    loss = ReconstructionLoss(**weights, law=law(1.0), transform=DEEP)
    guesses = truth + 5 * torch.linspace(-0.5, 0.5, 101)  # the noise is the same for all: the least loss is the optimum
    losses = [float(loss(DEEP.unit(guess).expand_as(target), target)[0]) for guess in guesses]
    assert float(guesses[losses.index(min(losses))] - truth) / 5 == pytest.approx(
        bias, abs=0.025
    )  # in units of the noise


def test_what_is_stretched_already_is_not_stretched_again() -> None:
    output, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    weights = {"l1": 0.0, "stretched": 1.0, "mse": 0.0, "chi": 0.0}
    found = {t.scale: ReconstructionLoss(**weights, law=law(), transform=t)(output, target)[0]
             for t in (PixelTransform(0.0, 1.0), DEEP)}  # fmt: skip
    assert float(found[5.0]) == pytest.approx(float((output - target).abs().mean()))
    assert float(found[None]) == pytest.approx(float(stretched_l1(output, target)))


def test_the_loss_is_the_weighted_sum_and_terms_of_no_weight_are_left_out() -> None:
    output, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    weights, unit = {"l1": 2.0, "stretched": 0.0, "mse": 3.0, "chi": 0.0}, PixelTransform(0.0, 1.0)
    total, terms = ReconstructionLoss(**weights, law=law(), transform=unit)(output, target)
    assert set(terms) == {"l1", "mse"}
    expected = 2 * (output - target).abs().mean() + 3 * (output - target).square().mean()
    assert torch.allclose(total, expected)
