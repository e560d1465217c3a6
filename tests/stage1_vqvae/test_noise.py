"""The noise law against noise of a known law: what is planted must come back."""

import pytest
import torch

from stage1_vqvae.noise import HIGH_PASS, NoiseLaw, estimate_law, standard_normal

COUNTS = 800.0  # at the peak of a DeepLense image; its sky is 10
SKY = 10.0


def rings(n: int, size: int = 96) -> torch.Tensor:
    """Smooth rings (n, 1, size, size) in [sky, 1] of full scale, without noise."""
    torch.manual_seed(1)
    axis = torch.arange(size) - size / 2
    r = torch.hypot(axis[:, None] - 6 * torch.randn(n, 1, 1), axis[None, :] - 6 * torch.randn(n, 1, 1))
    radius = 18 + 8 * torch.rand(n, 1, 1)
    return (SKY / COUNTS + torch.exp(-0.5 * ((r - radius) / 5) ** 2))[:, None]


def photons(clean: torch.Tensor) -> torch.Tensor:
    return torch.poisson(clean * COUNTS) / COUNTS


def test_fit_recovers_poisson_noise() -> None:
    clean = rings(160)
    law = NoiseLaw()
    curve = law.fit(photons(clean), clean)
    assert float(law.background) == pytest.approx(SKY / COUNTS, rel=0.02)
    assert float(law.a) == pytest.approx(SKY / COUNTS**2, rel=0.03)
    assert float(law.b) == pytest.approx(1 / COUNTS, rel=0.03)
    assert float(law.skew) == pytest.approx(1 / COUNTS, rel=0.15)
    variance, expected = torch.tensor(curve["variance"]), torch.tensor(curve["law"])
    assert ((variance / expected - 1).abs() < 0.15).all()


def test_fit_is_blind_to_smooth_errors_of_the_decoder() -> None:
    clean = rings(160)
    noisy = photons(clean)
    wrong = clean * 1.02 + 0.003  # five times the variance of the noise where it is bright
    law = NoiseLaw()
    curve = law.fit(noisy, wrong)
    assert float(law.b) == pytest.approx(1 / COUNTS, rel=0.06)
    assert curve["residual_variance"][-1] > 1.2 * curve["law"][-1]  # and the curve shows them


@pytest.mark.parametrize("unit", [1e-9, 1e-5, 1e5, 1e9])
def test_the_fit_does_not_mind_the_units(unit: float) -> None:
    clean = rings(60)
    noisy = photons(clean)
    plain, scaled = NoiseLaw(), NoiseLaw()
    plain.fit(noisy, clean)
    scaled.fit(noisy * unit, clean * unit)
    for name, power in (("a", 2), ("b", 1), ("background", 1), ("skew", 1)):
        assert float(getattr(scaled, name)) == pytest.approx(float(getattr(plain, name)) * unit**power, rel=1e-3), name


def test_gaussian_noise_of_constant_variance() -> None:
    clean = rings(100)
    law = NoiseLaw()
    law.fit(clean + 0.01 * torch.randn_like(clean), clean)
    assert float(law.a) == pytest.approx(1e-4, rel=0.03)
    assert float(law.b) < 3e-6
    assert float(law.skew) < 2e-4


def test_estimate_from_images_alone() -> None:
    law = estimate_law(photons(rings(160)))
    assert float(law.a) == pytest.approx(SKY / COUNTS**2, rel=0.15)
    assert float(law.b) == pytest.approx(1 / COUNTS, rel=0.1)


def test_drawn_noise_obeys_the_law_it_is_drawn_from() -> None:
    law = NoiseLaw()
    for name, value in {"a": 1.5e-5, "b": 1.2e-3, "background": 0.0125, "skew": 1.2e-3}.items():
        getattr(law, name).fill_(value)
    torch.manual_seed(0)
    for level, variance in ((0.0125, 1.5e-5), (0.005, 1.5e-5), (0.5125, 1.5e-5 + 6e-4)):
        noise = (law(torch.full((1, 1, 1000, 1000), level)) - level).double()
        assert float(noise.mean()) == pytest.approx(0, abs=4 * variance**0.5 / 1000)
        assert float(noise.var()) == pytest.approx(variance, rel=0.01)
        assert float(noise.pow(3).mean() / noise.var()) == pytest.approx(1.2e-3, rel=0.1)


def test_a_law_fitted_to_its_own_noise_is_itself() -> None:
    clean, law, again = rings(160), NoiseLaw(), NoiseLaw()
    law.fit(photons(clean), clean)
    again.fit(law(clean), clean)
    for name, tolerance in (("a", 0.03), ("b", 0.03), ("skew", 0.2)):
        assert float(getattr(again, name)) == pytest.approx(float(getattr(law, name)), rel=tolerance)


def test_high_pass_keeps_white_noise_and_cancels_cubics() -> None:
    assert float(HIGH_PASS.square().sum()) == pytest.approx(1, abs=1e-6)
    x, y = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    assert abs(float((HIGH_PASS[0, 0] * (x**3 * y**2 + 4 * y**3 - x)).sum())) < 1e-4


def test_noise_of_an_image_belongs_to_its_generator() -> None:
    like = torch.zeros(3, 1, 5, 4)
    one = standard_normal(like, [torch.Generator().manual_seed(s) for s in (4, 5, 6)])
    other = standard_normal(like[:2], [torch.Generator().manual_seed(s) for s in (6, 4)])
    assert torch.equal(one[2], other[0])
    assert torch.equal(one[0], other[1])


def test_an_unfitted_law_adds_nothing() -> None:
    clean = rings(2)
    assert torch.equal(NoiseLaw()(clean), clean)


def test_a_few_small_images_give_a_law_of_some_kind():
    g = torch.Generator().manual_seed(0)
    clean = torch.zeros(2, 1, 10, 10)
    law = NoiseLaw()
    law.fit(clean + 0.1 * torch.randn(clean.shape, generator=g), clean)
    assert 0.003 < float(law.a) < 0.03  # 0.01, of 72 pixels that the filter correlates
    assert all(map(torch.isfinite, (law.b, law.background, law.skew)))
