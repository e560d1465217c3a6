"""Physical summaries: known images have known numbers."""

import numpy as np
import pytest
import torch
from astropy.stats import kuiper_two
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from scipy.stats import ks_2samp, wasserstein_distance

from shared.errors import UserError
from shared.metrics.physics import (
    compare,
    noise_curve,
    radial_power_spectrum,
    same_distribution,
    spectrum_ratio,
    summaries,
    wasserstein1,
)
from shared.simulate.images import simulate
from shared.simulate.preset import Preset


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x about the centre, in pixels."""
    return tuple(np.mgrid[:height, :width] - np.array([height - 1, width - 1])[:, None, None] / 2)


def ring(radius: float, size: int = 90, width: float = 3.0, noise: float = 0.0) -> np.ndarray:
    y, x = grid(size, size)
    image = np.exp(-0.5 * ((np.hypot(x, y) - radius) / width) ** 2)
    return (image + np.random.default_rng(0).normal(0, noise, image.shape))[None]


def summary(image: np.ndarray, value_range: tuple[float, float] = (0, 1)) -> dict[str, float]:
    return {name: float(values[0]) for name, values in summaries(image[None], value_range).items()}


@pytest.mark.parametrize("shape", [(64, 64), (63, 63), (48, 100), (100, 31)])
def test_white_noise_has_flat_power_equal_to_its_variance(shape):
    images = np.random.default_rng(0).normal(5, 0.3, (200, 1, *shape))
    k, power = radial_power_spectrum(images)
    assert power.shape == (200, len(k))
    assert len(k) == min(shape) // 2
    np.testing.assert_allclose(power.mean(0), 0.3**2, rtol=0.15)
    assert power.mean() == pytest.approx(0.3**2, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "cycles"), [((60, 60), (0, 9)), ((60, 60), (6, 8)), ((50, 120), (10, 0)), ((50, 120), (0, 36))]
)
def test_a_wave_has_its_power_at_its_own_frequency(shape, cycles):
    y, x = np.mgrid[: shape[0], : shape[1]]
    wave = np.sin(2 * np.pi * (cycles[0] * y / shape[0] + cycles[1] * x / shape[1]))
    k, power = radial_power_spectrum(wave[None, None])
    frequency = np.hypot(cycles[0] / shape[0], cycles[1] / shape[1])
    assert k[power[0].argmax()] == pytest.approx(frequency, abs=0.5 / min(shape))
    assert np.sort(power[0])[-2] < 1e-10


@pytest.mark.parametrize("shape", [(64, 64), (33, 70)])
def test_parseval_the_power_of_all_modes_is_the_variance(shape):
    spectrum = np.fft.fft2(np.random.default_rng(0).normal(0, 1, (3, 1, *shape)))
    radius = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1]))
    images = np.fft.ifft2(np.where(radius < 0.45, spectrum, 0)).real
    k, power = radial_power_spectrum(images)
    modes = np.bincount(np.rint(radius[radius > 0] * min(shape)).clip(1).astype(int))[1 : len(k) + 1]
    np.testing.assert_allclose(power @ modes / np.prod(shape), images.var((1, 2, 3)), rtol=1e-5)


def test_the_spectrum_does_not_depend_on_how_the_images_arrive():
    images = torch.rand(300, 2, 12, 16)
    k, power = radial_power_spectrum(images)
    np.testing.assert_allclose(radial_power_spectrum(iter(images.split(70)))[1], power)
    np.testing.assert_allclose(sum(radial_power_spectrum(images[:, i : i + 1])[1] for i in range(2)) / 2, power)
    assert (np.diff(k) > 0).all()


@pytest.mark.parametrize("radius", [12.0, 20.3, 30.75])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_ring_has_its_radius(radius, noise):
    found = summary(ring(radius, noise=noise))
    assert found["ring_radius"] == pytest.approx(radius, abs=0.3)
    assert found["radius"] == pytest.approx(np.sqrt(radius**2 + 3 * 3**2), rel=0.05 if noise else 1e-3)
    assert found["axis_ratio"] == pytest.approx(1, abs=0.02)
    assert found["noise"] == pytest.approx(noise, rel=0.1, abs=1e-6)
    assert found["background"] == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(("major", "minor", "angle"), [(9, 3, 0), (9, 6, 0.7), (8, 8, 0), (10, 2, 2.5)])
def test_an_ellipse_has_its_moments_wherever_it_lies(major, minor, angle):
    y, x = grid(90, 120)
    y, x = y - 5, x + 17
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    found = summary(0.2 + 0.5 * np.exp(-0.5 * ((u / major) ** 2 + (v / minor) ** 2))[None])
    assert found["radius"] == pytest.approx(np.hypot(major, minor), rel=0.01)
    assert found["axis_ratio"] == pytest.approx(minor / major, rel=0.01)
    assert found["background"] == pytest.approx(0.2, abs=1e-3)
    assert found["peak"] == pytest.approx(0.7, abs=0.01)
    assert found["flux"] == pytest.approx(0.2 + 0.5 * 2 * np.pi * major * minor / (90 * 120), rel=0.01)


def test_summaries_are_in_units_of_the_range():
    image = ring(20, noise=0.01)
    plain, other = summary(image), summary(image * 4 - 1, (-1, 3))
    assert plain.keys() == {"flux", "peak", "background", "noise", "radius", "axis_ratio", "ring_radius"}
    for name, value in plain.items():
        assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("image", [np.zeros((1, 30, 30)), np.full((3, 4, 5), 0.5), np.eye(16)[None], np.eye(2)[None]])
def test_degenerate_images_have_finite_summaries(image):
    found = summary(image)
    assert np.isfinite(list(found.values())).all()
    if np.ptp(image) == 0:
        assert (found["radius"], found["axis_ratio"]) == (0, 0)


def test_images_that_cannot_be_measured_are_refused():
    with pytest.raises(UserError, match="NaN"):
        summaries(np.full((1, 1, 8, 8), np.nan), (0, 1))
    with pytest.raises(UserError, match="no images"):
        radial_power_spectrum([])


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40).map(np.array)


@given(VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_the_wasserstein_distance_is_scipys(a, b):
    assert wasserstein1(a, b) == pytest.approx(wasserstein_distance(a, b), rel=1e-9, abs=1e-9)


def test_the_wasserstein_distance_has_its_closed_forms():
    x = np.random.default_rng(0).normal(0, 1, 500)
    assert wasserstein1(x, np.repeat(x, 3)) == pytest.approx(0, abs=1e-12)
    assert wasserstein1(x, x - 2.5) == pytest.approx(2.5)
    assert wasserstein1(np.array([0.0]), np.array([1.0, 3.0])) == 2
    with pytest.raises(UserError, match="got 0 and 500 values"):
        wasserstein1(x[:0], x)


def test_the_ratio_is_one_for_real_images_and_grows_with_the_error():
    rng = np.random.default_rng(0)
    a, b = ({"x": rng.normal(0, 1, 400), "y": rng.normal(0, 1, 400)} for _ in range(2))
    ratios = [compare(a, b, {name: rng.normal(0, 1, 400) for name in a})["x"]["ratio"] for _ in range(20)]
    assert 0.6 < np.mean(ratios) < 1.6
    found = compare(a, b, {"x": rng.normal(0.5, 1, 400), "y": rng.normal(0, 1, 400)})
    assert found["x"]["w1"] == pytest.approx(0.5, abs=0.15)
    assert found["x"]["ratio"] == found["x"]["w1"] / found["x"]["floor"] > 4
    assert found["y"]["ratio"] < 2.5


def test_perfect_reconstructions_score_one_though_they_are_half_of_the_real_images():
    rng = np.random.default_rng(0)
    pairs = [({"x": rng.normal(0, 1, 300)}, {"x": rng.normal(0, 1, 300)}) for _ in range(30)]
    assert np.mean([compare(a, b, b)["x"]["ratio"] for a, b in pairs]) == pytest.approx(1, abs=0.2)


def test_the_floor_is_a_mean_over_splits_and_not_the_given_one():
    values = np.arange(200.0)
    sorted_split = compare({"x": values[:100]}, {"x": values[100:]}, {"x": values[::2]})["x"]
    assert wasserstein1(values[:100], values[100:]) == 100
    assert sorted_split["floor"] < 20


def test_a_summary_constant_in_real_images_has_no_scale():
    one = {"peak": np.ones(10)}
    assert compare(one, one, one)["peak"]["ratio"] == 1
    found = compare(one, one, {"peak": np.full(10, 0.9)})["peak"]
    assert (found["w1"], found["floor"], found["ratio"]) == (pytest.approx(0.1), 0, np.inf)


def test_another_number_of_images_than_the_floors_is_refused():
    with pytest.raises(UserError, match="5 generated and 10 real images"):
        compare({"x": np.zeros(10)}, {"x": np.zeros(10)}, {"x": np.zeros(5)})


# --- axes, whole numbers, p values ------------------------------------------------------------------------------------

ANGLES = st.integers(1, 20).flatmap(lambda n: st.tuples(*2 * [st.lists(st.floats(0, 180), min_size=n, max_size=n)]))


@given(ANGLES)
@settings(max_examples=200, deadline=None)
def test_axes_are_moved_the_short_way_and_by_the_cheapest_plan(pair):
    a, b = map(np.array, pair)
    cost = np.abs((a[:, None] - b + 90) % 180 - 90)
    cheapest = cost[linear_sum_assignment(cost)].mean()
    assert wasserstein1(a, b, 180) == pytest.approx(cheapest, abs=1e-9)
    assert wasserstein1(a + 77, b - 103, 180) == pytest.approx(cheapest, abs=1e-9)


def test_an_axis_has_no_seam():
    assert wasserstein1(np.array([1.0]), np.array([179.0]), 180) == pytest.approx(2)
    rng = np.random.default_rng(0)
    along_x = [{"position_angle": rng.normal(0, 3, 400) % 180} for _ in range(3)]
    assert compare(*along_x)["position_angle"]["ratio"] < 2.5
    turned = {"position_angle": (along_x[2]["position_angle"] + 10) % 180}
    found = compare(*along_x[:2], turned)["position_angle"]
    assert found["w1"] == pytest.approx(10, abs=1)
    assert compare(*along_x[:2], turned, axes=())["position_angle"]["w1"] > 20
    assert found["p"] < 1e-10


@pytest.mark.parametrize("period", [None, 180.0])
def test_p_values_of_equal_distributions_are_uniform(period):
    rng = np.random.default_rng(0)
    p = np.array([same_distribution(*rng.normal(0, 2, (2, 300)) % 180, period) for _ in range(400)])
    for level in (0.05, 0.3, 0.7):
        assert (p < level).mean() == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 400))


@pytest.mark.parametrize("shift", [0.0, 8.0, 25.0])
def test_p_values_are_those_of_libraries(shift):
    rng = np.random.default_rng(3)
    a, b = rng.uniform(0, 60, 500), rng.uniform(shift, 60 + shift, 400)
    assert same_distribution(a, b) == ks_2samp(a, b, method="asymp").pvalue
    assert same_distribution(a, b, 180.0) == pytest.approx(kuiper_two(a, b)[1], rel=0.25)
    assert same_distribution(a + 150, b + 150, 180.0) == pytest.approx(same_distribution(a, b, 180.0))
    assert same_distribution(a, a, 180.0) == same_distribution(a, a) == 1


def test_p_holm_allows_for_the_number_of_quantities():
    rng = np.random.default_rng(0)
    a, b, generated = ({f"q{i}": rng.normal(0, 1, 200) for i in range(20)} for _ in range(3))
    generated["q7"] = rng.normal(0.6, 1, 200)
    found = compare(a, b, generated)
    assert found["q7"]["p"] < found["q7"]["p_holm"] == pytest.approx(20 * found["q7"]["p"])
    assert found["q7"]["p_holm"] < 1e-3
    assert min(score["p_holm"] for name, score in found.items() if name != "q7") > 0.05


def test_one_odd_image_of_whole_numbers_is_not_infinitely_far():
    two = {"number_of_images": np.full(100, 2)}
    odd = {"number_of_images": np.append(np.full(99, 2), 3)}
    assert compare(two, two, two)["number_of_images"]["ratio"] == 1
    assert compare(two, two, odd)["number_of_images"]["ratio"] == pytest.approx(1)
    assert compare(two, two, {"number_of_images": np.full(100, 4)})["number_of_images"]["ratio"] == pytest.approx(200)
    assert compare(odd, two, two)["number_of_images"]["ratio"] == pytest.approx(1)


# --- spectra ----------------------------------------------------------------------------------------------------------


def test_the_ratio_of_spectra_has_its_closed_forms():
    rng = np.random.default_rng(0)
    real, other = rng.exponential(1, (400, 50)) * 7, rng.exponential(1, (900, 50)) * 14
    found = spectrum_ratio(real, other)
    np.testing.assert_allclose(found.mean, other.mean(0) / real.mean(0))
    np.testing.assert_allclose(found.sd, other.std(0, ddof=1) / real.std(0, ddof=1))
    # The mean of n exponential numbers scatters by 1 / sqrt(n), their standard deviation by sqrt(2 / n), of themselves.
    error = 2 * np.sqrt(1 / 400 + 1 / 900)
    assert (found.mean_high - found.mean_low).mean() == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.sd_high - found.sd_low).mean() == pytest.approx(2 * 1.96 * np.sqrt(2) * error, rel=0.1)
    for low, high in ((found.mean_low, found.mean_high), (found.sd_low, found.sd_high)):
        assert ((low < 2) & (high > 2)).sum() >= 44
        assert not ((low < 1) & (high > 1)).any()


def test_less_scatter_from_image_to_image_shows_though_the_mean_is_right():
    rng = np.random.default_rng(1)
    real, collapsed = rng.normal(10, 2, (300, 30)), rng.normal(10, 1, (300, 30))
    found = spectrum_ratio(real, collapsed)
    assert ((found.mean_low < 1) & (found.mean_high > 1)).sum() >= 25
    assert (found.sd_high < 0.7).all()
    again = spectrum_ratio(real, collapsed)
    assert np.array_equal(found.sd_low, again.sd_low)


def test_spectra_that_do_not_compare_are_refused():
    with pytest.raises(UserError, match="two images or more"):
        spectrum_ratio(np.ones((1, 5)), np.ones((4, 5)))
    with pytest.raises(UserError, match=r"\(4, 6\)"):
        spectrum_ratio(np.ones((4, 5)), np.ones((4, 6)))


# --- noise ------------------------------------------------------------------------------------------------------------

COUNTS = Preset.load("deeplense").model_copy(update={"scaling": "none"})  # photons: variance = mean, the sky 10 a pixel
PEAK = 1000.0


@pytest.fixture(scope="module")
def lenses() -> tuple[torch.Tensor, torch.Tensor]:
    return simulate(COUNTS, 0, range(60))[:2]


def test_the_noise_of_simulated_lenses_is_that_of_photons(lenses):
    curve = noise_curve(lenses[0], (0, PEAK))
    assert curve.pixels.sum() == 60 * 148 * 148
    expected = (curve.signal * PEAK + COUNTS.number("sky") * COUNTS.exposure.low) / PEAK**2
    bright = (curve.signal > 0.05) & (curve.pixels > 3000)
    assert bright.sum() >= 7
    np.testing.assert_allclose(curve.variance[bright], expected[bright], rtol=0.05)
    seen = curve.pixels > 3000
    np.testing.assert_allclose(
        curve.variance[seen], expected[seen], rtol=0.5
    )  # the sky: bins of signal and noise mixed
    assert (noise_curve(lenses[1], (0, PEAK)).variance[bright] < 2e-3 * expected[bright]).all()  # light is not noise


def test_planted_noise_is_seen_where_it_is(lenses):
    observed, clean = lenses
    plain = noise_curve(observed, (0, PEAK))
    seen = (plain.pixels > 3000) & (plain.signal > 0.05)
    doubled = noise_curve(clean + 2 * (observed - clean), (0, PEAK))
    np.testing.assert_allclose(doubled.variance[seen] / plain.variance[seen], 4, rtol=0.05)
    only_bright = noise_curve(torch.where(clean > 210, clean + 2 * (observed - clean), observed), (0, PEAK))
    ratio = only_bright.variance / plain.variance
    np.testing.assert_allclose(ratio[seen & (plain.signal < 0.17)], 1, rtol=0.05)
    np.testing.assert_allclose(ratio[seen & (plain.signal > 0.24)], 4, rtol=0.05)
    blurred = noise_curve(gaussian_filter(observed.numpy(), (0, 0, 1, 1)), (0, PEAK))
    assert (blurred.variance[seen] < 0.01 * plain.variance[seen]).all()


def test_noise_curves_add_up_and_know_no_unit(lenses):
    images = lenses[0][:20]
    whole = noise_curve(images, (0, PEAK))
    parts = noise_curve(images[:7], (0, PEAK)) + noise_curve(images[7:], (0, PEAK))
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    np.testing.assert_allclose(parts.variance, whole.variance)
    np.testing.assert_allclose(parts.signal, whole.signal)
    other = noise_curve((images * 3 - 5).split(6), (-5, 3 * PEAK - 5))
    np.testing.assert_allclose(other.variance, whole.variance, rtol=1e-3)
    assert np.isnan(whole.variance[whole.pixels == 0]).all()
    with pytest.raises(ValueError, match="bins"):
        whole + noise_curve(images, (0, PEAK), np.array([0.0, 1.0]))
