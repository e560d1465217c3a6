from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.image import StructuralSimilarityIndexMeasure

from shared.data.normalise import PixelTransform
from shared.errors import UserError
from stage1_vqvae.losses import Perceptual, ReconstructionLoss, chi, focal_frequency, ssim_loss, stretched_l1
from stage1_vqvae.noise import NoiseLaw, NoiseLaws, law_of, recorrupt


def law(a: float = 1e-4, b: float = 0.0) -> NoiseLaw:
    law = NoiseLaw()
    law.dark[0] = a
    law.b.fill_(b)
    return law


def law_of_bands(channels: int, a: float, b: float) -> NoiseLaw | NoiseLaws:
    """Of the first band as `law`, of each next one of four times the variance of the one before."""
    laws = law_of(channels)
    for k, band in enumerate(laws.bands if isinstance(laws, NoiseLaws) else [laws]):
        band.load_state_dict(law(a * 4**k, b).state_dict())
    return laws


def test_each_band_is_judged_in_units_of_its_own_noise() -> None:
    target = torch.full((2, 2, 4, 4), 0.5)
    residual = torch.tensor([0.001, 0.002])[:, None, None]
    laws = law_of_bands(2, 1e-4, 0.0)
    assert float(chi(target + residual, target, laws)) == pytest.approx(0.5 * 0.01, rel=1e-2)
    one = chi(target[:, :1] + 0.001, target[:, :1], law())
    assert float(chi(target + residual, target, laws)) == pytest.approx(float(one), rel=1e-5)


def test_chi_is_half_the_mean_square_of_small_residuals_in_units_of_noise() -> None:
    target = torch.full((1, 1, 4, 4), 0.5)
    assert float(chi(target + 0.001, target, law())) == pytest.approx(0.5 * 0.01, rel=1e-2)
    assert float(chi(target + 10.0, target, law(), delta=3.0)) == pytest.approx(3.0 * 1000, rel=1e-2)  # linear far away


def test_chi_finds_the_mean_where_weights_from_the_target_would_not() -> None:
    torch.manual_seed(0)
    truth, photon = 0.02, 0.01
    lit = torch.zeros(1, 1, 500, 500)
    lit[..., 100:] = 1.0  # the rest is a background without light
    target = torch.poisson(lit * truth / photon) * photon
    guess = torch.tensor(0.015, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        chi(guess * lit, target, law(1e-6, photon), delta=100.0).backward()
        optimizer.step()
    assert float(guess.detach()) == pytest.approx(float(target.mean() / lit.mean()), rel=0.02)


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
    target = DEEP.unit(truth + 5 * torch.randn(1, 1, 200, 250))
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


# --- SSIM, spectrum ---------------------------------------------------------------------------------------------------


def blobs(n: int, height: int = 31, width: int = 30) -> Tensor:
    """Clean lights (n, 1, height, width), a blob each on a sky of 0.05."""
    y, x = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    centre = 12 * (torch.rand(n, 2, 1, 1) - 0.5)
    return 0.05 + 0.7 * torch.exp(-((y[:, None] - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) / 20)[:, None]


@pytest.mark.parametrize("shape", [(3, 1, 31, 24), (2, 3, 20, 33)])
def test_ssim_is_one_less_that_of_torchmetrics(shape: tuple[int, ...]) -> None:
    output, target = torch.rand(shape), torch.rand(shape)
    reference = StructuralSimilarityIndexMeasure(data_range=1.0)(output, target)
    assert float(ssim_loss(output, target)) == pytest.approx(1 - float(reference), rel=1e-5)
    assert float(ssim_loss(target, target)) == pytest.approx(0.0, abs=1e-6)


def test_ssim_likes_too_much_contrast_by_as_much_as_its_docstring_says() -> None:
    torch.manual_seed(0)
    pattern = torch.sin(torch.arange(200.0))[:, None] * torch.sin(torch.arange(200.0))  # a variance of 1/4
    contrast, noise = 0.04, 0.02
    clean = 0.5 + 2 * contrast * pattern[None, None]
    target = clean + noise * torch.randn_like(clean)
    stretches = torch.linspace(0.9, 1.3, 81)
    losses = [float(ssim_loss(0.5 + k * (clean - 0.5), target)) for k in stretches]
    expected = 1 + noise**2 / (2 * contrast**2 + 0.03**2)
    assert float(stretches[losses.index(min(losses))]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("shape", [(2, 1, 31, 24), (1, 3, 20, 33)])
def test_focal_frequency_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    output, target = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    distance = np.abs(np.fft.fft2((output - target).numpy(), norm="ortho"))
    weight = distance / distance.max((-2, -1), keepdims=True)
    assert float(focal_frequency(output, target)) == pytest.approx((weight * distance**2).mean(), rel=1e-5)


def test_focal_frequency_of_one_frequency_is_the_mean_square_of_its_own_coefficients() -> None:
    wave = 0.1 * torch.cos(2 * torch.pi * 3 * torch.arange(32) / 32).expand(1, 1, 16, 32)
    assert float(focal_frequency(wave, torch.zeros_like(wave))) == pytest.approx(0.1**2 / 2, rel=1e-4)


def test_the_same_image_has_no_spectral_loss_and_a_finite_gradient() -> None:
    output = torch.rand(1, 1, 9, 7, requires_grad=True)
    focal_frequency(output, output.detach()).backward()
    assert output.grad is not None
    assert float(output.grad.abs().max()) == 0


def log_power(output: Tensor, target: Tensor) -> Tensor:
    """What `spectrum` is not."""
    power = [torch.fft.fft2(x, norm="ortho").abs().square().clamp_min(1e-12).log() for x in (output, target)]
    return F.l1_loss(*power)


@pytest.mark.parametrize(("term", "cleans"), [(focal_frequency, True), (log_power, False)])
def test_the_optimum_of_the_spectrum_is_the_clean_image_where_that_of_log_power_is_not(
    term: Callable[[Tensor, Tensor], Tensor], cleans: bool
) -> None:
    torch.manual_seed(0)
    clean, noise = blobs(1), law(4e-4, 4e-3)
    output = noise(clean).requires_grad_()
    start = float((output.detach() - clean).square().mean())
    optimizer = torch.optim.Adam([output], lr=0.01)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        optimizer.zero_grad()
        term(output.expand(64, -1, -1, -1), noise(clean.expand(64, -1, -1, -1))).backward()
        optimizer.step()
    left = float((output.detach() - clean).square().mean()) / start
    assert left < 0.02 if cleans else left > 0.3


# --- what compares images with observed reconstructions ---------------------------------------------------------------


UNIT = PixelTransform(0.0, 1.0)


def criterion(
    noise: NoiseLaw | None = None, transform: PixelTransform = UNIT, **terms: float | int
) -> ReconstructionLoss:
    weights = {"l1": 0.0, "stretched": 0.0, "mse": 0.0, "chi": 0.0, **terms}
    return ReconstructionLoss(**weights, law=noise or law(), transform=transform)  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", [UNIT, PixelTransform(-10.0, 90.0), DEEP])
def test_observed_reconstructions_have_the_noise_of_the_law(transform: PixelTransform) -> None:
    torch.manual_seed(0)
    clean = torch.full((1, 1, 300, 300), 0.4)
    light = transform.light(clean)
    noise = law(1e-4 * float(light.mean()) ** 2, 2e-4 * float(light.mean()))
    observed = transform.light(criterion(noise, transform).observe(clean))
    assert float(observed.mean()) == pytest.approx(float(light.mean()), rel=1e-3)
    assert float(observed.var()) == pytest.approx(float(noise.variance(light).mean()), rel=0.03)


def test_observed_reconstructions_stay_in_range_and_pass_the_gradient_on() -> None:
    clean = torch.full((1, 1, 64, 64), 0.02, requires_grad=True)
    observed = criterion(law(4e-4, 1.0)).observe(clean)
    assert float(observed.detach().min()) == 0
    observed.sum().backward()
    assert clean.grad is not None
    assert torch.equal(clean.grad, (observed > 0).float())  # of the image itself, and none through its noise


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return Perceptual()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [(30, 30), (41, 27)])
def test_features_of_any_image_have_a_gradient_and_none_for_the_network(
    perceptual: Perceptual, channels: int, size: tuple[int, int]
) -> None:
    output = torch.rand(2, channels, *size, requires_grad=True)
    value = perceptual([output, output], torch.rand(2, channels, *size))
    value.backward()
    assert float(value) > 0
    assert output.grad is not None
    assert float(output.grad.abs().min()) > 0
    assert not any(parameter.requires_grad for parameter in perceptual.network.parameters())
    same = torch.rand(2, channels, *size)
    assert float(perceptual([same, same], same)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_the_optimum_of_the_features_is_the_clean_image(perceptual: Perceptual) -> None:
    noise = law(4e-4, 4e-3)
    torch.manual_seed(0)
    clean = blobs(6)
    target, grain, loss = noise(clean).clamp(0, 1), noise(clean) - clean, criterion(noise)

    @torch.no_grad()
    def value(output: Tensor) -> float:
        torch.manual_seed(1)
        return float(perceptual([loss.observe(output), loss.observe(output)], target))

    at_clean = value(clean)
    for other in (0.9 * clean, 1.1 * clean, clean + 0.4 * grain, F.avg_pool2d(clean, 3, 1, 1)):
        assert value(other) > at_clean + 1e-3
    with torch.no_grad():  # a clean reconstruction beside a noisy image would be told to paint noise
        painted, bare = (float(perceptual([x, x], target)) for x in (clean + 0.4 * grain, clean))
    assert painted < bare


@pytest.mark.slow
@pytest.mark.parametrize("recorrupted", [True, False])
def test_passing_noise_on_pays_in_no_feature_where_the_targets_noise_is_another(
    perceptual: Perceptual, recorrupted: bool
) -> None:
    noise = law(4e-4, 4e-3)
    torch.manual_seed(0)
    clean = blobs(6)
    image = noise(clean)
    given, target = recorrupt(image, noise, 1.0) if recorrupted else (image, image)
    loss = ReconstructionLoss(
        l1=0.0, stretched=0.0, mse=0.0, chi=0.0, law=noise, transform=UNIT, noisier=1.0 + recorrupted
    )

    @torch.no_grad()
    def value(output: Tensor) -> float:
        torch.manual_seed(1)
        return float(perceptual([loss.observe(output), loss.observe(output)], target.clamp(0, 1)))

    passed = 0.3 * (given - clean)
    assert (value(clean + passed) > value(clean)) == recorrupted


def test_a_decoder_says_of_the_noise_of_images_and_not_of_what_recorruption_adds() -> None:
    torch.manual_seed(0)
    clean, noise, true = torch.full((4, 1, 100, 100), 0.5), law(1e-4), 3.0
    image = clean + (true * 1e-4) ** 0.5 * torch.randn_like(clean)
    _, target = recorrupt(image, noise, 0.5)
    loss = ReconstructionLoss(
        l1=0.0, stretched=0.0, mse=0.0, chi=0.0, likelihood=1.0, law=noise, transform=UNIT, noisier=1 + 0.5**-2
    )

    def slope(ratio: float) -> float:
        log_ratio = torch.tensor(ratio).log().requires_grad_()
        loss(clean, target, log_ratio=log_ratio.expand_as(clean))[0].backward()
        return float(log_ratio.grad)  # type: ignore[arg-type]

    assert abs(slope(true)) < 0.05 * abs(slope(1.0))
    assert slope(0.9 * true) < 0 < slope(1.1 * true)


def test_nothing_is_built_or_drawn_for_terms_of_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise UserError("built")

    monkeypatch.setattr("stage1_vqvae.losses.efficientnet_lite0", absent)
    state = torch.get_rng_state()
    loss = criterion(l1=1.0)
    assert (loss.perceptual, loss.adversary, loss.groups) == (None, None, [])
    assert set(loss(torch.zeros(1, 1, 9, 9), torch.ones(1, 1, 9, 9))[1]) == {"l1"}
    assert torch.equal(state, torch.get_rng_state())
    assert list(loss.state_dict()) == [f"law.{name}" for name in NoiseLaw().state_dict()]
    with pytest.raises(UserError, match="built"):
        criterion(perceptual=1.0)


def test_no_checkpoint_holds_the_weights_of_the_feature_network() -> None:
    assert list(criterion(perceptual=1.0).state_dict()) == [f"law.{name}" for name in NoiseLaw().state_dict()]


EVERY = {"l1": 1.0, "stretched": 0.3, "mse": 10.0, "chi": 0.05, "ssim": 0.1, "spectrum": 1.0, "perceptual": 0.1,
         "adversarial": 0.1, "feature_matching": 1.0, "adversarial_start": 0, "discriminator_width": 4}  # fmt: skip


@pytest.mark.parametrize("transform", [PixelTransform(0.0, 1.0), DEEP])
@pytest.mark.parametrize("shape", [(2, 1, 30, 30), (2, 3, 23, 31)])
def test_every_term_at_once_of_any_shape_transform_and_precision(
    transform: PixelTransform, shape: tuple[int, ...]
) -> None:
    noise = law_of_bands(shape[1], 1e-4 if transform.scale is None else 1.0, 1e-3)
    torch.manual_seed(0)
    loss = ReconstructionLoss(**EVERY, law=noise, transform=transform, channels=shape[1])  # type: ignore[arg-type]
    output, target, state = torch.rand(shape), torch.rand(shape), loss.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    found = []
    for enabled in (False, True):
        loss.load_state_dict(state)  # a pass moves the vectors of the spectral norms
        torch.manual_seed(1)
        leaf = output.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, values = loss(leaf, target)
        total.backward()
        assert values.keys() == (EVERY.keys() - {"adversarial_start", "discriminator_width"}) | {"discriminator"}
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        found.append((total.detach(), leaf.grad))
    assert total.dtype == torch.float32
    torch.testing.assert_close(found[0], found[1])  # nothing of it in bf16


def test_the_loss_is_the_weighted_sum_and_terms_of_no_weight_are_left_out() -> None:
    output, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    weights, unit = {"l1": 2.0, "stretched": 0.0, "mse": 3.0, "chi": 0.0}, PixelTransform(0.0, 1.0)
    total, terms = ReconstructionLoss(**weights, law=law(), transform=unit)(output, target)
    assert set(terms) == {"l1", "mse"}
    expected = 2 * (output - target).abs().mean() + 3 * (output - target).square().mean()
    assert torch.allclose(total, expected)
