"""The simulator against lenstronomy, astropy, the closed form of its noise, and statistics of the real images."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from scipy import stats

from shared.data.cache import CacheWriter, LensImages
from shared.errors import UserError
from shared.simulate import run as simulator
from shared.simulate.images import observe, render, simulate
from shared.simulate.preset import UNITS, Preset, draw_parameters, einstein_radius
from shared.simulate.run import main, simulate_to

DEEPLENSE = Preset.load("deeplense")
SMALL = DEEPLENSE.model_copy(update={"pixels": 24, "pixel_scale": 0.3})
YAML = (Path(simulator.__file__).parents[2] / "configs/simulate/deeplense.yaml").read_text()


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    observed, clean, parameters = simulate(DEEPLENSE, 0, range(400))
    return observed.numpy(), clean.numpy(), parameters


# --- parameters -------------------------------------------------------------------------------------------------------


def _astropy_radius(mass: float, z_l: np.ndarray, z_s: np.ndarray, distances: str) -> np.ndarray:
    cosmology = FlatLambdaCDM(H0=70, Om0=0.3)
    if distances == "luminosity":
        d_l, d_s = cosmology.luminosity_distance(z_l), cosmology.luminosity_distance(z_s)
        d_ls = d_s - d_l
    else:
        d_l, d_s = cosmology.angular_diameter_distance(z_l), cosmology.angular_diameter_distance(z_s)
        d_ls = d_s - d_l * (1 + z_l) / (1 + z_s)  # flat
    squared = 4 * constants.G * mass * units.Msun / constants.c**2 * d_ls / (d_l * d_s)
    return np.sqrt(squared.decompose().value) * units.rad.to(units.arcsec)


@pytest.mark.parametrize(("distances", "at_half_and_one"), [("luminosity", 1.2815), ("angular-diameter", 1.6645)])
def test_the_einstein_radius_is_that_of_astropy_distances(distances: str, at_half_and_one: float) -> None:
    preset = DEEPLENSE.model_copy(update={"distances": distances})
    rng = np.random.default_rng(0)
    z_l, z_s = np.append(rng.uniform(0.4, 0.6, 50), 0.5), np.append(rng.uniform(0.8, 1.2, 50), 1.0)
    theta_E = einstein_radius(preset, np.full(51, 1e12), z_l, z_s)
    np.testing.assert_allclose(theta_E, _astropy_radius(1e12, z_l, z_s, distances), rtol=1e-12)
    assert theta_E[-1] == pytest.approx(at_half_and_one, abs=1e-4)


def test_parameters_follow_the_priors() -> None:
    p = draw_parameters(DEEPLENSE, 1, range(3000))
    assert list(p) == list(UNITS)
    radius, azimuth = np.hypot(p["x_s"], p["y_s"]), np.arctan2(p["y_s"], p["x_s"])
    for values, low, high in (
        (p["z_l"], 0.4, 0.6),
        (p["z_s"], 0.8, 1.2),
        (p["gamma"], 0, 0.3),
        (p["gamma_angle"], 0, 2 * np.pi),  # degrees
        (p["q_s"], 0.4, 1),
        (p["PA_s"], 0, 2 * np.pi),  # degrees
        (radius, 0, 0.5),
        (azimuth, -np.pi, np.pi),
    ):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
        assert low <= values.min() < values.max() <= high
    for name, value in {"mass": 1e12, "n_s": 1.5, "R_s": 0.5, "I_s": 1.0}.items():
        assert (p[name] == value).all()
    np.testing.assert_allclose(np.quantile(p["theta_E"], [0.25, 0.5, 0.75]), [1.15, 1.28, 1.42], atol=0.015)
    assert 0.83 < p["theta_E"].min() < 0.9
    assert 1.6 < p["theta_E"].max() < 1.665
    correlations = np.corrcoef(
        [p[name] for name in ("z_l", "z_s", "gamma", "gamma_angle", "x_s", "y_s", "q_s", "PA_s")]
    )
    assert np.abs(correlations - np.eye(8)).max() < 5 / 3000**0.5


def test_a_seed_means_the_same_lens_for_ever() -> None:
    p = draw_parameters(DEEPLENSE, 7, [12345])
    assert p["z_l"][0] == pytest.approx(0.56705590536984, abs=1e-12)
    assert p["PA_s"][0] == pytest.approx(3.33022887654797, abs=1e-12)
    assert draw_parameters(DEEPLENSE, 8, [12345])["z_l"][0] != p["z_l"][0]


# --- clean images -----------------------------------------------------------------------------------------------------


def _lenstronomy(p: dict[str, np.ndarray], i: int) -> np.ndarray:
    """Image i by lenstronomy, on a grid so wide that nothing is cut off; counts/s/pixel, row 0 at the top."""
    side = 180
    origin = -(side - 1) / 2 * 0.05
    data = ImageData(
        image_data=np.zeros((side, side)), ra_at_xy_0=origin, dec_at_xy_0=origin, transform_pix2angle=0.05 * np.eye(2)
    )
    profile = np.exp(-0.5 * (np.arange(-7, 8) * 0.05 / 0.086) ** 2)
    psf = PSF(psf_type="PIXEL", kernel_point_source=np.outer(profile, profile) / profile.sum() ** 2)
    model = ImageModel(
        data,
        psf,
        lens_model_class=LensModel(["SIS", "SHEAR_GAMMA_PSI"]),
        source_model_class=LightModel(["SERSIC_ELLIPSE_Q_PHI"]),
        kwargs_numerics={"supersampling_factor": 2, "supersampling_convolution": False},
    )
    lens = [
        {"theta_E": p["theta_E"][i], "center_x": 0, "center_y": 0},
        {"gamma_ext": p["gamma"][i], "psi_ext": np.deg2rad(p["gamma_angle"][i])},
    ]
    source = {"amp": 1, "R_sersic": 0.5, "n_sersic": 1.5, "q": p["q_s"][i], "phi": np.deg2rad(p["PA_s"][i])}
    image = model.image(lens, [{**source, "center_x": p["x_s"][i], "center_y": p["y_s"][i]}]) / 0.05**2
    return image[::-1][15:-15, 15:-15]


def test_clean_images_are_those_of_lenstronomy_pixel_by_pixel() -> None:
    parameters = draw_parameters(DEEPLENSE, 3, range(8))
    # Far from the axes, where a sign or a unit of an angle cannot hide.
    parameters["gamma_angle"][4:], parameters["PA_s"][4:] = [20, 75, 110, 160], [50, 95, 10, 130]
    images = render(DEEPLENSE, parameters, torch.float64)
    assert images.shape == (8, 1, 150, 150)
    single = render(DEEPLENSE, parameters)
    assert single.dtype == torch.float32
    for i in range(8):
        oracle = _lenstronomy(parameters, i)
        assert np.abs(images[i, 0].numpy() - oracle).max() < 1e-5 * oracle.max()
        assert np.abs(single[i, 0].numpy() - oracle).max() < 3e-5 * oracle.max()


def test_arcs_are_stretched_along_x_and_turned_upwards() -> None:
    """As the real images are: their fitted shear angles lie in [0, 2 pi] degrees with row 0 at the top."""
    parameters = draw_parameters(DEEPLENSE, 0, [0])
    parameters |= {"gamma": np.array([0.25]), "gamma_angle": np.array([6.0]), "PA_s": np.array([6.0])}
    parameters |= {"x_s": np.zeros(1), "y_s": np.zeros(1)}
    light = render(DEEPLENSE, parameters)[0, 0].numpy()
    y, x = np.mgrid[74.5:-75:-1, -74.5:75]
    assert (light * x * x).sum() > 1.5 * (light * y * y).sum()
    assert (light * x * y).sum() > 0


def test_a_point_on_the_centre_of_the_lens_is_finite() -> None:
    preset = SMALL.model_copy(update={"pixels": 25, "supersampling": 1})
    assert render(preset, draw_parameters(preset, 0, range(2))).isfinite().all()


# --- noise and statistics ---------------------------------------------------------------------------------------------


def test_noise_is_poisson_of_source_and_sky() -> None:
    clean = render(DEEPLENSE, draw_parameters(DEEPLENSE, 0, range(30)))
    observed, scaled = (x.double().flatten(1) for x in observe(DEEPLENSE, clean, 0, range(30)))
    rate = clean.double().flatten(1)
    # The scale of each image, from two of its pixels: scaled = (counts - low) / (high - low).
    dark, bright = rate.argmin(1, keepdim=True), rate.argmax(1, keepdim=True)
    span = 100 * (rate.gather(1, bright) - rate.gather(1, dark)) / (scaled.gather(1, bright) - scaled.gather(1, dark))
    low = 100 * (rate.gather(1, dark) + 0.1) - scaled.gather(1, dark) * span
    counts, expected = observed * span + low, 100 * (rate + 0.1)
    assert (counts - counts.round()).abs().max() < 2e-3  # whole photons
    z2 = (counts - expected) ** 2 / expected
    for faint, loud in ((0, 11), (11, 30), (30, 150), (150, 2000)):
        part = z2[(expected > faint) & (expected <= loud)]
        assert part.mean() == pytest.approx(1, abs=5 * (2.1 / len(part)) ** 0.5)


def test_the_noise_law_of_the_scaled_images(drawn) -> None:
    observed, clean, _ = drawn
    signal, squared = (clean - 0.0105).ravel().astype(float), ((observed - clean).ravel().astype(float)) ** 2
    edges = np.unique(np.concatenate([np.quantile(signal, np.linspace(0, 1, 40)), np.linspace(0.2, 1, 15)]))
    bins = np.digitize(signal, edges)
    n = np.maximum(np.bincount(bins), 1)
    mean, variance, filled = np.bincount(bins, signal) / n, np.bincount(bins, squared) / n, n > 500
    slope, offset = np.polyfit(mean[filled], variance[filled], 1, w=(np.sqrt(n) / np.maximum(variance, 1e-9))[filled])
    assert slope == pytest.approx(1.23e-3, rel=0.04)
    assert offset == pytest.approx(1.43e-5, rel=0.04)


def test_every_image_spans_0_to_1_exactly(drawn) -> None:
    observed, clean, _ = drawn
    assert observed.dtype == clean.dtype == np.float32
    assert (observed.min((1, 2, 3)) == 0).all()
    assert (observed.max((1, 2, 3)) == 1).all()


def test_statistics_are_those_published_of_the_real_images(drawn) -> None:
    observed, _, _ = drawn
    # Four standard errors of 400 images (scatter of an image: mean 0.0086, mean square 0.0050, median 0.0017).
    assert observed.mean(dtype=float) == pytest.approx(0.0615, abs=4 * 0.0086 / 20)
    assert observed.std(dtype=float) == pytest.approx(0.1164, abs=4 * 0.0050 / 20 / (2 * 0.1164))
    assert np.median(observed) == pytest.approx(0.017, abs=4 * 0.0017 / 20 + 0.0005)
    shares = np.histogram(observed, [0, 0.005, 0.01, 0.015, 0.02])[0] / observed.size
    np.testing.assert_allclose(shares, [0.015, 0.144, 0.253, 0.160], rtol=0.1)


def test_an_image_without_contrast_is_refused() -> None:
    dark = SMALL.model_copy(update={"exposure": 1e-9})
    with pytest.raises(UserError, match=r"image 5 .* no contrast.*exposure"):
        simulate(dark, 0, [5])


# --- independence, data sets, command line ----------------------------------------------------------------------------


def test_an_image_depends_on_seed_and_index_only() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batch, clean, parameters = simulate(DEEPLENSE, 0, range(18))
        # Three threads cut an image where its vectors do not end: unless that is prevented, 13, 14 and 17 come out
        # with other roundings.
        torch.set_num_threads(3)
        again, clean_again, parameters_again = simulate(DEEPLENSE, 0, [17, 3, 13, 14])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(batch[[17, 3, 13, 14]], again)
    assert torch.equal(clean[[17, 3, 13, 14]], clean_again)
    assert all((parameters[name][[17, 3, 13, 14]] == parameters_again[name]).all() for name in UNITS)
    residuals = ((batch - clean) / clean.sqrt()).flatten(1)
    assert np.abs(np.corrcoef(residuals.numpy()) - np.eye(18)).max() < 5 / 150  # no two share their noise
    assert not torch.equal(simulate(DEEPLENSE, 1, [3])[0], again[1:2])


def test_a_data_set_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 3)
    for workers in (1, 2, 3):
        simulate_to(tmp_path / str(workers), SMALL, 32, 4, workers, progress=False)
    expected, _, parameters = simulate(SMALL, 4, range(32))
    for workers in (1, 2, 3):
        data = LensImages(tmp_path / str(workers))
        np.testing.assert_array_equal(data.images, expected)
    assert data.value_range == (0, 1)
    stored = data.index["parameters"]
    assert set(stored) == set(UNITS) - {"mass", "n_s", "R_s", "I_s"}  # the varying ones
    assert all(entry["unit"] == UNITS[name] for name, entry in stored.items())
    assert all(entry["values"] == parameters[name].tolist() for name, entry in stored.items())
    source = json.loads((tmp_path / "2" / "index.json").read_text())["source"]
    assert Preset(**source["preset"]) == SMALL
    assert source["seed"] == 4


def test_an_interrupted_data_set_goes_on_and_a_finished_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 4)
    write = CacheWriter.write
    written: list[range] = []
    limit = 3

    def interrupted(self: CacheWriter, indices: range, images: np.ndarray) -> None:
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(indices)
        write(self, indices, images)

    monkeypatch.setattr(CacheWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)
    limit = 100
    simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)
    assert sorted(i for indices in written for i in indices) == list(range(30))  # each image once
    np.testing.assert_array_equal(LensImages(tmp_path / "x").images, simulate(SMALL, 4, range(30))[0])
    simulate_to(tmp_path / "x", SMALL, 30, 4, progress=False)
    assert len(written) == 8
    with pytest.raises(UserError, match="seed is 4 there, 5 here"):
        simulate_to(tmp_path / "x", SMALL, 30, 5, progress=False)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="a spawned worker does not see the patched function")
def test_a_killed_worker_is_reported_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 4)
    monkeypatch.setattr(simulator, "_simulate_chunk", _die)
    with pytest.raises(UserError, match="--workers"):
        simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=simulate_to, args=(tmp_path / "x", SMALL, 10**6, 0, 2, False))
    parent.start()
    deadline = time.monotonic() + 20
    workers: list[str] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        time.sleep(0.1)
    time.sleep(0.5)
    parent.kill()
    parent.join()
    assert len(workers) == 2
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if _alive(worker)]
    for worker in left:
        os.kill(int(worker), signal.SIGKILL)
    assert not left


def _alive(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie has ended
    except OSError:
        return False


def test_the_command_makes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(YAML.replace("pixels: 150", "pixels: 20").replace("n_s: 1.5", "n_s: uniform(1, 4)"))
    main(["--preset", str(preset), "--count", "5", "--out", str(tmp_path / "x"), "--workers", "1"])
    data = LensImages(tmp_path / "x")
    assert data.image_shape == (1, 20, 20)
    assert 1 <= min(data.index["parameters"]["n_s"]["values"]) < max(data.index["parameters"]["n_s"]["values"]) <= 4
    assert "5 images" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--count", "0"], ["--count", "-3"], ["--workers", "0"], ["--seed", "-1"]])
def test_the_command_refuses_numbers_without_sense(bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--count", "5", "--out", str(tmp_path / "x"), *bad])
    assert stop.value.code == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gamma: ", "gama: ", "gama: unknown key; did you mean 'gamma'"),
        ("sky: 0.1", "", "sky: is missing"),
        ("pixels: 150", "pixels: 0", "pixels: must be greater than 0"),
        ("uniform(0.4, 0.6)", "uniform(0.6, 0.4)", "z_l: .*low <= high"),
        ("uniform(0.4, 0.6)", "normal(0.5, 0.1)", "z_l: .*neither a number nor uniform"),
        ("uniform(0.4, 0.6)", "uniform(0.4, 0.9)", "0 < z_l < z_s"),
        ("uniform(0.4, 1)", "uniform(0, 1)", "0 < q_s <= 1"),
        ("distances: luminosity", "distances: comoving", "'comoving' is not known"),
    ],
)
def test_a_wrong_preset_is_refused_with_its_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in YAML
    path = tmp_path / "wrong.yaml"
    path.write_text(YAML.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Preset.load(path)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'deeplense'"):
        Preset.load("deeplens")
