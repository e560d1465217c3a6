"""The lens fitter against simulated truth, against faults planted in it, and against images that hold no lens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import UserError
from shared.metrics.lens_fit import Coordinates, Grid, LensFits, LensFitter
from shared.simulate.images import render, simulate
from shared.simulate.lens import surface_brightness
from shared.simulate.preset import Preset, draw_parameters

DEEPLENSE = Preset.load("deeplense")
N = 16


@pytest.fixture(scope="module")
def fitter() -> LensFitter:
    return LensFitter(DEEPLENSE)


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    return simulate(DEEPLENSE, 91, range(N))


@pytest.fixture(scope="module")
def fits(fitter: LensFitter, truth) -> LensFits:
    return fitter.fit(truth[0])


def axis_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - b + 90) % 180 - 90


def test_simulated_lenses_are_found_at_the_noise_level(fits: LensFits, truth) -> None:
    # chi^2 per pixel of 22,500 pixels of Poisson noise scatters by (2 + 1/rate)^0.5 / 150 = 0.0097
    assert np.abs(fits.chi2 - 1).max() < 4 * 0.0097
    assert abs(fits.chi2.mean() - 1) < 4 * 0.0097 / N**0.5
    assert fits.converged.all()
    assert fits.consistent().all()
    assert fits.snr.min() > 100
    np.testing.assert_allclose(fits.clean, truth[1].numpy(), atol=0.012)  # a third of the noise at a peak
    assert np.abs(fits.chi2_lit - 1).max() < 0.15
    assert abs(fits.chi2_lit.mean() - 1) < 0.02


def test_truth_lies_within_the_errors(fits: LensFits, truth) -> None:
    parameters = truth[2]
    pulls = []
    for name, values in fits.parameters.items():
        spin = name in ("gamma_angle", "PA_s")
        difference = axis_difference(values, parameters[name]) if spin else values - parameters[name]
        pulls.append(difference / fits.errors[name])
    assert set(fits.parameters) == {"theta_E", "gamma", "gamma_angle", "x_s", "y_s", "q_s", "PA_s"}
    assert 0.8 < np.std(pulls) < 1.3
    assert np.abs(np.median(pulls, 1)).max() < 1
    assert np.median(fits.errors["theta_E"]) < 0.001  # arcsec, a fiftieth of a pixel
    # The amplitude is exposure / (range of the counts): the gain that scaled the image.
    np.testing.assert_allclose(fits.amplitude, 100 / np.round(100 / fits.amplitude), rtol=0.01)


def test_profile_parameters_can_be_freed(truth) -> None:
    found = LensFitter(DEEPLENSE, free=["n_s", "R_s"]).fit(truth[0][:6])
    assert np.abs(found.parameters["n_s"] / 1.5 - 1).max() < 0.04
    assert np.abs(found.parameters["R_s"] / 0.5 - 1).max() < 0.02
    assert np.abs((found.parameters["R_s"] - 0.5) / found.errors["R_s"]).max() < 4


def test_units_do_not_matter(fitter: LensFitter, fits: LensFits, truth) -> None:
    scaled = LensFitter(DEEPLENSE, noise=(1.6e-5 * 9, 1.23e-3 * 3)).fit(truth[0][:3] * 3 - 7)
    np.testing.assert_allclose(scaled.parameters["theta_E"], fits.parameters["theta_E"][:3], atol=0.002)
    np.testing.assert_allclose(scaled.amplitude, fits.amplitude[:3] * 3, rtol=0.01)
    np.testing.assert_allclose(scaled.background, fits.background[:3] * 3 - 7, atol=0.002)
    np.testing.assert_allclose(scaled.chi2, fits.chi2[:3], atol=0.15)  # this law has one gain for all


@pytest.mark.parametrize("unit", [1e-18, 3.0, 1e12])
def test_a_preset_that_scales_its_images_knows_no_unit(fitter: LensFitter, fits: LensFits, truth, unit: float) -> None:
    scaled = fitter.fit(truth[0][:2].double() * unit)
    np.testing.assert_allclose(scaled.chi2, fits.chi2[:2], atol=1e-3)
    np.testing.assert_allclose(scaled.parameters["theta_E"], fits.parameters["theta_E"][:2], atol=1e-4)
    np.testing.assert_allclose(scaled.amplitude, fits.amplitude[:2] * unit, rtol=1e-3)
    np.testing.assert_allclose(scaled.variance(1) / unit**2, fits.variance(1), rtol=1e-2)
    assert scaled.consistent().all()


def test_noise_of_another_strength_is_seen(truth) -> None:
    observed, clean, _ = truth
    louder = clean + 1.2**0.5 * (observed - clean)
    chi2 = LensFitter(DEEPLENSE).fit(louder[:6]).chi2
    np.testing.assert_allclose(chi2, 1.2, atol=0.05)


def test_a_lens_that_is_none_of_the_preset_is_seen(fitter: LensFitter, truth) -> None:
    observed, clean, _ = truth
    blurred = torch.nn.functional.avg_pool2d(clean, 9, stride=1, padding=4, count_include_pad=False)
    torn = clean.roll(2, dims=-1).where(torch.arange(150)[:, None] < 75, clean)  # 0.1 arcsec off in the upper half
    for damaged in (blurred, torn, clean.flip(-1).lerp(clean, 0.9)):
        assert np.median(fitter.fit((damaged + observed - clean)[:6]).chi2) > 1.2
    assert not fitter.fit(clean[:4]).consistent().any()  # without its noise


def test_a_lump_of_mass_in_the_halo_is_seen(fitter: LensFitter) -> None:
    parameters = draw_parameters(DEEPLENSE, 5, range(4))
    columns = {name: torch.from_numpy(values).float() for name, values in parameters.items()}
    grid = fitter.grids[1, 2]
    rng = np.random.default_rng(0)
    for theta_p, at_least, at_most in ((0.0, 0.97, 1.03), (0.25, 1.15, np.inf)):
        images = []
        for i in range(4):
            p = {name: values[i] for name, values in columns.items()}
            p |= {"x_p": torch.tensor([0.9]), "y_p": torch.tensor([0.8]), "theta_p": torch.tensor([theta_p])}
            counts = rng.poisson(100 * (grid.image(surface_brightness(p, grid.x, grid.y)).numpy() + 0.1))
            images.append(counts.reshape(1, 150, 150) / np.ptp(counts))
        chi2 = fitter.fit(np.array(images)).chi2
        assert at_least < np.median(chi2) < at_most


def test_what_is_no_lens_is_not_taken_for_one(fitter: LensFitter) -> None:
    g = torch.Generator().manual_seed(0)
    noise = 0.012 + 0.004 * torch.randn(1, 150, 150, generator=g)
    star = torch.zeros(1, 150, 150)
    star[0, 70, 70] = 1
    images = torch.stack([torch.zeros(1, 150, 150), torch.full((1, 150, 150), 0.3), noise, star, star - 1e3 * noise])
    for law in (None, (1.6e-5, 1.23e-3)):
        found = LensFitter(DEEPLENSE, noise=law).fit(images)
        assert np.isfinite(found.chi2).all()
        assert not found.consistent().any()


def test_images_of_another_size_and_nan_are_refused(fitter: LensFitter) -> None:
    with pytest.raises(UserError, match="preset deeplense makes images of 1x150x150, these are 1x64x64"):
        fitter.fit(torch.zeros(2, 1, 64, 64))
    with pytest.raises(UserError, match="NaN"):
        fitter.fit(torch.full((2, 1, 150, 150), torch.nan))
    with pytest.raises(UserError, match="cannot be free in colour"):
        LensFitter(DEEPLENSE, free=["colour"])
    with pytest.raises(UserError, match="preset deeplense has no q_l that could be free"):
        LensFitter(DEEPLENSE, free=["q_l"])


@pytest.mark.parametrize(("name", "kind"), [("wide", "dark"), ("wide", "light"), ("model-2", "no_sub")])
def test_every_instrument_has_its_noise(name: str, kind: str) -> None:
    preset = Preset.load(name).select([kind])
    images, _, parameters = simulate(preset, 5, range(6))
    found = LensFitter(Preset.load(name), kind=kind).fit(images)
    assert abs(np.median(found.chi2) - 1) < 0.06
    assert abs(np.median(found.parameters["x_s"] - parameters["x_s"])) < 0.005


def test_an_angle_is_free_with_what_it_is_the_angle_of() -> None:
    preset = Preset.load("deeplense", {"gamma": "0.1", "gamma_angle": "uniform(0, 180)"})
    assert {"gamma", "gamma_angle"} <= set(LensFitter(preset).coordinates.names)


def test_a_border_is_left_out(truth, fits: LensFits) -> None:
    observed = truth[0][:2].clone()
    observed[..., :2, :] = 1
    assert (LensFitter(DEEPLENSE).fit(observed).chi2 > 2).all()
    np.testing.assert_allclose(LensFitter(DEEPLENSE, margin=2).fit(observed).chi2, fits.chi2[:2], atol=0.01)


def test_the_grid_is_the_simulators_camera() -> None:
    parameters = draw_parameters(DEEPLENSE, 3, range(3))
    images = render(DEEPLENSE, parameters)
    grid = Grid(150, 0.05, 2, 0.086, torch.device("cpu"))
    for i in range(3):
        p = {name: torch.tensor(values[i], dtype=torch.float32) for name, values in parameters.items()}
        image = grid.image(surface_brightness(p, grid.x, grid.y)).view(150, 150)
        assert (image - images[i, 0]).abs().max() < 1e-5 * images[i].max()


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.1, 10), st.floats(0.001, 0.9), st.floats(-89, 89), st.floats(0.05, 0.99), st.floats(0.3, 8)
)  # fmt: skip
def test_coordinates_are_a_round_trip(theta_E: float, gamma: float, angle: float, q: float, n: float) -> None:
    names = ("theta_E", "gamma", "gamma_angle", "q_s", "PA_s", "n_s", "x_s", "y_s")
    coordinates = Coordinates(names, {"R_s": 0.5})
    p = dict(zip(names, (theta_E, gamma, angle, q, -angle, n, 0.3, -0.2), strict=True))
    u = coordinates.vector({name: torch.tensor([value], dtype=torch.float64) for name, value in p.items()})
    back = coordinates.physical(u[0])
    for name, value in p.items():
        assert float(back[name]) == pytest.approx(value, rel=1e-3, abs=1e-3)
    assert float(back["R_s"]) == 0.5
