"""The noise law against noise of a known law: what is planted must come back."""

import pytest
import scipy.stats
import torch

from stage1_vqvae.curve import HIGH_PASS
from stage1_vqvae.draws import MANY, poisson, standard_normal
from stage1_vqvae.losses import likelihood
from stage1_vqvae.noise import NoiseLaw, estimate_law, law_of, recorrupt

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
    variance, expected = torch.tensor(curve["variance"]), torch.tensor(curve["law"])
    assert ((variance / expected - 1).abs() < 0.15).all()


def test_each_band_has_noise_of_its_own() -> None:
    """Of photons, of few, and of none; one law of all three is the control."""
    torch.manual_seed(0)
    clean = rings(100).repeat(1, 3, 1, 1)
    images = torch.cat([photons(clean[:, :1]), photons(clean[:, 1:2] / 4) * 4, 0.02 * torch.randn(100, 1, 96, 96)], 1)
    images[:, 2:] += clean[:, 2:]
    own, one = law_of(3), NoiseLaw()
    own.fit(images, clean, "image")
    one.fit(images, clean, "image")
    dark, lit = clean[:, 0] < 1.2 * SKY / COUNTS, clean[:, 0] > 0.5
    for law, most in ((own, 0.06), (one, 0.5)):
        noise, drawn = images - clean, law(clean) - clean
        wrong = [
            abs(float(drawn[:, c][part].var() / noise[:, c][part].var()) - 1) for c in range(3) for part in (dark, lit)
        ]
        assert max(wrong) < most if law is own else max(wrong) > most
    assert own.told()["step"] == pytest.approx([1 / COUNTS, 4 / COUNTS, 0], rel=1e-3)
    assert own.told()["scaled"] == [False, False, False]
    assert own.variance(clean).shape == clean.shape


def test_bands_scaled_together_are_drawn_so() -> None:
    torch.manual_seed(3)
    clean = torch.cat([rings(40), 0.5 * rings(40)], 1)
    noisy = clean + torch.tensor([0.01, 0.03])[:, None, None] * torch.randn_like(clean)
    low, high = noisy.amin((1, 2, 3), keepdim=True), noisy.amax((1, 2, 3), keepdim=True)
    law, light = law_of(2), (clean - low) / (high - low)
    law.fit(scaled(noisy), light, "image")
    drawn = law(light, torch.Generator().manual_seed(0))
    assert law.told()["scaled"] == [True, True]
    assert torch.equal(drawn.amin((1, 2, 3)), torch.zeros(40))
    assert torch.equal(drawn.amax((1, 2, 3)), torch.ones(40))
    # The band that is neither darkest nor brightest keeps its own range.
    assert float(drawn[:, 1].amax((1, 2)).mean()) == pytest.approx(
        float(scaled(noisy)[:, 1].amax((1, 2)).mean()), rel=0.05
    )
    light.requires_grad_()
    (slope,) = torch.autograd.grad(law(light).sum(), light)
    assert torch.equal(slope, torch.ones_like(slope))  # the noise has none


@pytest.mark.parametrize("peaks", [(800, 800, 800), (800, 500, 300)])
def test_photons_of_bands_scaled_together_are_drawn_as_they_fall(peaks: tuple[int, ...]) -> None:
    """The darkest pixel of all bands takes from all: the true counts, drawn anew and scaled, are the control."""
    torch.manual_seed(11)
    n = 150
    mean = SKY + (rings(n) - SKY / COUNTS) * torch.tensor(peaks)[:, None, None]
    counts, again = torch.poisson(mean), torch.poisson(mean)
    least, span = counts.amin((1, 2, 3)).mean(), counts.amax((1, 2, 3)) - counts.amin((1, 2, 3))
    decoded = (mean - least) / span[:, None, None, None]
    law = law_of(3)
    law.fit(scaled(counts), decoded, "image")
    assert float(law.bands[1].least) == pytest.approx(float(least), abs=0.1)
    drawn = law(decoded, torch.Generator().manual_seed(0))
    steps = [1 / float(image.unique().diff()[1:-1].min()) for image in drawn[:20]]  # one grid of counts for all bands
    assert sum(steps) / 20 == pytest.approx(float(span.mean()), rel=0.05)
    for band in range(3):
        real, control, ours = (dark_levels(x[:, band : band + 1]) for x in (scaled(counts), scaled(again), drawn))
        assert ranks(real, control) < 0.2
        assert ranks(real, ours) < 0.2
        assert float(ours.std()) == pytest.approx(float(real.std()), rel=0.2)


def test_one_law_of_all_bands_is_read_as_one_for_each() -> None:
    one, clean = NoiseLaw(), rings(40)
    one.fit(photons(clean), clean, "image")
    laws = law_of(3)
    laws.load_state_dict(one.state_dict())
    drawn = laws(clean.repeat(1, 3, 1, 1), torch.Generator().manual_seed(0))
    noise = torch.randn(40, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 1:2], one.drawn(clean, noise[:, 1:2]))
    assert set(law_of(3).state_dict()) == set(laws.state_dict())


def test_the_bands_of_an_image_are_drawn_by_its_generator() -> None:
    law = law_of(2)
    for band, dark in zip(law.bands, (1e-4, 4e-4), strict=True):
        band.dark[0] = dark
    clean = torch.full((3, 2, 20, 20), 0.5)
    one = law(clean, [torch.Generator().manual_seed(s) for s in (4, 5, 6)])
    other = law(clean[:2], [torch.Generator().manual_seed(s) for s in (6, 4)])
    assert torch.equal(one[[2, 0]], other)
    assert not torch.equal(one[0, 0], one[0, 1])
    said = torch.zeros_like(clean)
    said[:, 1] = torch.tensor(4.0).log()  # of a decoder: of the second band alone
    louder = law(clean, [torch.Generator().manual_seed(s) for s in (4, 5, 6)], said)
    torch.testing.assert_close(louder[:, 0], one[:, 0])
    torch.testing.assert_close(louder[:, 1] - 0.5, 2 * (one[:, 1] - 0.5))


def test_one_image_says_nothing_of_how_images_were_scaled() -> None:
    clean = rings(1)
    law = NoiseLaw()
    law.fit(photons(clean), clean)
    assert not law.scaled


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
    for name, power in (("a", 2), ("b", 1), ("background", 1)):
        assert float(getattr(scaled, name)) == pytest.approx(float(getattr(plain, name)) * unit**power, rel=1e-3), name


def test_gaussian_noise_of_constant_variance() -> None:
    clean = rings(100)
    law = NoiseLaw()
    law.fit(clean + 0.01 * torch.randn_like(clean), clean)
    assert float(law.a) == pytest.approx(1e-4, rel=0.03)
    assert float(law.b) < 3e-6


def test_estimate_from_images_alone() -> None:
    law = estimate_law(photons(rings(160)))
    assert float(law.a) == pytest.approx(SKY / COUNTS**2, rel=0.15)
    assert float(law.b) == pytest.approx(1 / COUNTS, rel=0.1)


def test_drawn_noise_obeys_the_law_it_is_drawn_from() -> None:
    law = NoiseLaw()
    law.dark[0] = 1.5e-5
    law.b.fill_(1.2e-3)
    torch.manual_seed(0)
    dark, lit = 0.0125, 0.5125
    clean = torch.full((1, 1, 1000, 1000), dark)
    clean[..., 500:] = lit
    noise = (law(clean) - clean).double()
    for half, variance in ((noise[..., :500], 1.5e-5), (noise[..., 500:], 1.5e-5 + 6e-4)):
        assert float(half.mean()) == pytest.approx(0, abs=4 * variance**0.5 / 700)
        assert float(half.var()) == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("kind", ["affine", "image"])
def test_a_law_fitted_to_its_own_noise_is_itself(kind: str) -> None:
    clean, law, again = rings(160), NoiseLaw(), NoiseLaw()
    law.fit(photons(clean), clean, kind)
    again.fit(law(clean), clean, kind)
    for name in ("a", "b"):
        assert float(getattr(again, name)) == pytest.approx(float(getattr(law, name)), rel=0.05)
    if kind == "image":
        assert float(again.step) == pytest.approx(1 / COUNTS, rel=1e-3)


# --- the law of each image --------------------------------------------------------------------------------------------


def ranks(x: torch.Tensor, y: torch.Tensor) -> float:
    """The greatest distance of two distribution functions (Kolmogorov and Smirnov)."""
    values = torch.cat([x, y]).unique()
    f, g = (torch.searchsorted(s.sort().values, values, right=True) / len(s) for s in (x, y))
    return float((f - g).abs().max())


def test_few_photons_are_drawn_as_they_fall() -> None:
    """At 10 counts normal noise is visibly wrong: too many dark pixels. The truth again is the control."""
    clean = rings(160) + torch.rand(160, 1, 1, 1) / COUNTS  # a level between counts, as a decoder's
    images, law, normal = photons(clean), NoiseLaw(), NoiseLaw()
    law.fit(images, clean, "image")
    normal.fit(images, clean)
    dark = clean < 1.3 * SKY / COUNTS
    again, drawn, wrong = (f(clean)[dark] for f in (photons, law, normal))
    counts = [(x * COUNTS).round() for x in (images[dark], again, drawn, wrong)]
    assert ranks(counts[0], counts[1]) < 0.004
    assert ranks(counts[0], counts[2]) < 0.008
    assert ranks(counts[0], counts[3]) > 0.015
    assert float(((drawn - clean[dark]) / (SKY**0.5 / COUNTS)).pow(3).mean()) == pytest.approx(SKY**-0.5, rel=0.15)
    assert float(law.step) == pytest.approx(1 / COUNTS, rel=1e-4)
    multiples = drawn * COUNTS
    assert float((multiples - multiples.round()).abs().max()) < 0.01


def scaled(images: torch.Tensor) -> torch.Tensor:
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low)


def test_images_scaled_one_by_one_are_drawn_so() -> None:
    torch.manual_seed(4)
    clean = rings(120)
    images = photons(clean)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    law = NoiseLaw()
    law.fit(scaled(images), (clean - low) / (high - low), "image")
    drawn = law((clean - low) / (high - low))
    assert torch.equal(drawn.amin((1, 2, 3)), torch.zeros(120))
    assert torch.equal(drawn.amax((1, 2, 3)), torch.ones(120))
    # Whole counts of its own range: as many steps from darkest to brightest as the real images have.
    steps = [1 / float(image.unique().diff()[1:-1].min()) for image in drawn[:20]]
    assert sum(steps) / 20 == pytest.approx(float(((high - low) * COUNTS).mean()), rel=0.02)


@pytest.mark.parametrize("rate", [0.0, 0.4, 3.0, 10.0, 15.9, 16.0, 40.0, 800.0])
def test_photons_are_the_quantiles_of_a_poisson_distribution(rate: float) -> None:
    z = torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0))
    found = poisson(z, torch.full_like(z, rate)).numpy()
    expected = scipy.stats.poisson.ppf(scipy.stats.norm.cdf(z.double().numpy()), rate)
    assert abs(found - expected).max() <= 1
    assert (found != expected).mean() < (1e-4 if rate < MANY else 0.01)


@pytest.mark.parametrize("rate", [0.1, 2.0, 9.0, 10.0, 15.0, 300.0])
def test_the_rarest_numbers_are_no_heaps_of_photons(rate: float) -> None:
    z = torch.tensor([[4.5, 5.0, 5.3, 5.48, 5.8, 6.5, -6.5]])
    expected = scipy.stats.poisson.isf(scipy.stats.norm.sf(z.double().numpy()), rate)
    assert abs(poisson(z, torch.full_like(z, rate)).numpy() - expected).max() <= 1


def test_photons_are_seen_above_a_bright_sky() -> None:
    """Whose darkest pixel has many photons: counts are from nothing, not from that pixel on."""
    torch.manual_seed(12)
    clean = 60 + 800 * (rings(80) - SKY / COUNTS)
    counts, law = torch.poisson(clean), NoiseLaw()
    law.fit(counts, clean, "image")
    assert law.gain.tolist() == [1, 0]
    dark, drawn = clean < 61, law(clean)
    assert float(drawn[dark].var()) == pytest.approx(60, rel=0.03)
    assert float(drawn[dark].mean()) == pytest.approx(60, rel=0.003)


def dark_levels(images: torch.Tensor) -> torch.Tensor:
    """The median of the corners of each image, (n,)."""
    return torch.cat([images[..., :10, :10], images[..., -10:, -10:]], -1).flatten(1).median(1).values


def test_what_scaling_takes_away_is_drawn_anew_for_each_image() -> None:
    """The darkest pixel has no photon here and one there, so that the background is 10 photons here and 9 there: a decoder
    cannot know, and gives the mean. The true counts, drawn anew and scaled, are the control."""
    torch.manual_seed(11)
    n = 300
    peak = 750 + 100 * torch.rand(n, 1, 1, 1)
    mean = SKY + (rings(n, 120) - SKY / COUNTS) * peak
    counts, again = torch.poisson(mean), torch.poisson(mean)
    least, span = counts.amin((1, 2, 3)).mean(), (counts.amax((1, 2, 3)) - counts.amin((1, 2, 3)))[:, None, None, None]
    decoded = (mean - least) / span
    law = NoiseLaw()
    law.fit(scaled(counts), decoded, "image")
    assert float(law.least) == pytest.approx(float(least), abs=0.08)
    photon = law.gain[1] * law.level(decoded)
    assert float((photon * span).mean()) == pytest.approx(1, abs=0.01)
    shaped = NoiseLaw()
    shaped.load_state_dict(law.state_dict())
    shaped.gain.zero_()  # without photons: the table's noise about the decoded image
    real, control, drawn, other = (
        dark_levels(x) for x in (scaled(counts), scaled(again), law(decoded), shaped(decoded))
    )
    assert ranks(real, control) < 0.12
    assert ranks(real, drawn) < 0.12
    assert ranks(real, other) > 0.2
    assert float(drawn.std()) == pytest.approx(float(real.std()), rel=0.12)


def test_photons_are_not_seen_in_noise_of_twice_their_variance() -> None:
    clean = rings(80)
    twice = torch.poisson(torch.poisson(clean * COUNTS))  # as in Model I
    law = NoiseLaw()
    law.fit(twice, clean * COUNTS, "image")
    assert float(law.step) == 1
    assert not law.gain.any()
    law.fit(torch.poisson(clean * COUNTS), clean * COUNTS, "image")
    assert law.gain.tolist() == [1, 0]
    assert float(law.least) == 0


def test_a_law_from_before_there_were_photons_is_read() -> None:
    law, clean = NoiseLaw(), rings(40)
    law.fit(photons(clean), clean, "image")
    assert law.gain.any()
    old = {name: value for name, value in law.state_dict().items() if name not in ("gain", "least")}
    again = NoiseLaw()
    again.load_state_dict(old)
    assert not again.gain.any()
    assert torch.equal(again.table, law.table)


def test_neither_counts_nor_a_scale_are_seen_where_there_are_none() -> None:
    torch.manual_seed(5)
    clean = rings(40)
    law = NoiseLaw()
    law.fit(clean + 0.01 * torch.randn_like(clean), clean, "image")
    assert float(law.step) == 0
    assert not law.scaled


def test_exposures_differ_and_noise_is_cut_at_zero() -> None:
    """As in Model I: the background has a level of its own only because its noise is cut. One law for all is wrong."""
    torch.manual_seed(6)
    exposure = torch.linspace(300, 1000, 80)[:, None, None, None]

    def observe(light: torch.Tensor) -> torch.Tensor:
        return torch.poisson((light * exposure + 0.03 * exposure * torch.randn_like(light)).clamp_min(0))

    light = 0.3 * (rings(80) - SKY / COUNTS)
    mean, sigma = light * exposure, 0.03 * exposure
    clean = mean * torch.special.ndtr(mean / sigma) + sigma * (-0.5 * (mean / sigma) ** 2).exp() / (2 * torch.pi) ** 0.5
    images, one, own = observe(light), NoiseLaw(), NoiseLaw()
    one.fit(images, clean)
    own.fit(images, clean, "image")
    dark = (light < 1e-3).flatten(1)
    for law in (own, one):
        drawn = law(clean).flatten(1)
        wrong = [abs(float(drawn[i][dark[i]].std() / images.flatten(1)[i][dark[i]].std()) - 1) for i in (0, 20, 40, 79)]
        assert max(wrong) < 0.06 if law is own else max(wrong) > 0.3
    drawn, real = own(clean).flatten(1)[dark], images.flatten(1)[dark]
    assert float((drawn == 0).float().mean()) == pytest.approx(float((real == 0).float().mean()), abs=0.03)
    assert float(own.step) == 1
    assert not own.gain.any()


def test_the_level_is_that_of_the_background_with_noise_or_without() -> None:
    torch.manual_seed(7)
    clean = rings(20, 150)
    level, noisy = NoiseLaw().level(clean), NoiseLaw().level(photons(clean))
    assert level.shape == (20, 1, 1, 1)
    assert torch.allclose(level, torch.full_like(level, SKY / COUNTS), rtol=0.02)
    assert float((noisy / level).mean()) == pytest.approx(1, abs=0.1)


def test_what_a_decoder_says_of_the_variance_is_drawn() -> None:
    law = NoiseLaw()
    law.dark[0] = 1e-4
    clean = torch.full((1, 1, 400, 400), 0.5)
    said = torch.zeros_like(clean)
    said[..., 200:] = torch.tensor(4.0).log()
    noise = law(clean, torch.Generator().manual_seed(0), said) - clean
    assert float(noise[..., :200].var()) == pytest.approx(1e-4, rel=0.03)
    assert float(noise[..., 200:].var()) == pytest.approx(4e-4, rel=0.03)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_recorrupted_images_have_noises_that_do_not_correlate(alpha: float) -> None:
    """The slope of the one's noise on the other's; with the image itself for both it is 1."""
    torch.manual_seed(9)
    clean = rings(160)
    images = photons(clean)
    given, target = recorrupt(images, estimate_law(images), alpha)
    for part in (clean < 1.2 * SKY / COUNTS, (clean > 0.2) & (clean < 0.6)):
        noise, other = (given - clean)[part].double(), (target - clean)[part].double()
        variance = float((images - clean)[part].var())
        assert float((noise * other).mean() / variance) == pytest.approx(0, abs=0.05)
        assert float(noise.var()) == pytest.approx((1 + alpha**2) * variance, rel=0.05)
        assert float(other.var()) == pytest.approx((1 + alpha**-2) * variance, rel=0.05)
        assert float(other.mean()) == pytest.approx(0, abs=0.02 * variance**0.5)


def test_the_likelihood_is_that_of_a_normal_variable_and_finds_the_variance() -> None:
    torch.manual_seed(8)
    residual, variance = 0.3 * torch.randn(5_000), torch.full((5_000,), 0.01)
    f = torch.tensor(0.7)
    expected = -torch.distributions.Normal(0.0, (variance * f.exp()).sqrt()).log_prob(residual).mean()
    constant = 0.5 * (2 * torch.pi * variance).log().mean()
    assert float(likelihood(residual, variance, f.expand(5_000), beta=0.0) + constant) == pytest.approx(
        float(expected), rel=1e-5
    )
    for beta in (0.0, 0.5, 1.0):
        ratio = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([ratio], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            likelihood(residual, variance, ratio.expand(5_000), beta).backward()
            optimizer.step()
        assert float(ratio.detach().exp()) == pytest.approx(9.0, rel=0.05)


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
    assert torch.equal(law_of(2)(clean.repeat(1, 2, 1, 1)), clean.repeat(1, 2, 1, 1))


def test_a_few_small_images_give_a_law_of_some_kind():
    g = torch.Generator().manual_seed(0)
    clean = torch.zeros(2, 1, 10, 10)
    law = NoiseLaw()
    law.fit(clean + 0.1 * torch.randn(clean.shape, generator=g), clean)
    assert 0.003 < float(law.a) < 0.03  # 0.01, of 72 pixels that the filter correlates
    assert all(map(torch.isfinite, (law.b, law.background)))
    law.fit(clean + 0.1 * torch.randn(clean.shape, generator=g), clean, "image")
    assert bool(law(clean).isfinite().all())
