"""Priors, presets and what is drawn from them."""

from pathlib import Path

import numpy as np
import pytest
from astropy import constants, units
from astropy.cosmology import FlatLambdaCDM
from scipy import stats
from scipy.integrate import quad

from shared.errors import UserError
from shared.simulate import preset as module
from shared.simulate.preset import (
    LENS,
    POINT,
    SUBSTRUCTURE,
    UNITS,
    Preset,
    Prior,
    draw_parameters,
    einstein_radius,
    presets,
)
from tests.shared.simulate.oracle import lenses

DEEPLENSE = Preset.load("deeplense")
TEST1 = Preset.load("deeplense-test1")
FILE = Path(module.__file__).parents[2] / "configs/simulate/deeplense.yaml"
UNIFORM = np.random.default_rng(0).random(2000)


def follows(values: np.ndarray, name: str, *arguments: float) -> bool:
    return stats.kstest(values, name, arguments).pvalue > 1e-3


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "oracle"),
    [
        ("uniform(0.4, 0.6)", stats.uniform(0.4, 0.2)),
        ("normal(1, 0.5)", stats.norm(1, 0.5)),
        ("loguniform(1e-24, 1e-22)", stats.loguniform(1e-24, 1e-22)),
        ("power_law(-1, 2, 8)", stats.loguniform(2, 8)),
        ("power_law(2, 0.0001, 5)", stats.powerlaw(3, scale=5)),
        ("poisson(25)", stats.poisson(25)),
        ("poisson(0.3)", stats.poisson(0.3)),
        ("poisson(4000)", stats.poisson(4000)),
    ],
)
def test_a_law_is_its_quantile_function(text: str, oracle) -> None:
    prior = module._prior(text)
    u = np.concatenate([UNIFORM, [0.0, 2.0**-53, 1 - 2.0**-53]])
    drawn = prior(u)
    np.testing.assert_allclose(drawn[:2000], oracle.ppf(UNIFORM), rtol=1e-9, atol=1e-12)
    assert np.isfinite(drawn).all()
    assert prior.low <= drawn.min() <= drawn.max() <= prior.high  # the bounds that a preset is checked by
    assert module._prior(str(prior)) == prior


def test_a_power_law_has_its_slope() -> None:
    drawn = module._prior("power_law(-1.9, 1e6, 1e10)")(UNIFORM)
    assert follows((drawn**-0.9 - 1e6**-0.9) / (1e10**-0.9 - 1e6**-0.9), "uniform")


def test_a_number_is_a_prior_without_scatter() -> None:
    assert (module._prior(1.5)(UNIFORM) == 1.5).all()
    assert str(module._prior("1.5")) == "1.5"
    assert module._prior("uniform(2, 2)").fixed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom(1, 2)", "no distribution 'unifrom'; did you mean 'uniform'"),
        ("normal(1)", r"expected normal\(mean, sigma\)"),
        ("power_law(1, 2)", r"expected power_law\(slope, low, high\)"),
        ("uniform(1, two)", "neither a number nor"),
        ("wide", "neither a number nor"),
        ("uniform(2, 1)", "low <= high"),
        ("uniform(1, inf)", "finite"),
        ("nan", "finite"),
        ("normal(1, -1)", "sigma >= 0"),
        ("loguniform(0, 1)", "low > 0"),
        ("power_law(-1, -2, 1)", "low > 0"),
        ("poisson(-1)", "mean from 0"),
    ],
)
def test_a_wrong_law_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^--prior/--set: gamma: .*{message}") as error:
        Preset.load("deeplense", {"gamma": text})
    assert "\n" not in str(error.value)


# --- presets ----------------------------------------------------------------------------------------------------------


def test_the_order_of_random_numbers_is_for_ever() -> None:
    """A name that is moved, or one put in between, would change every data set there is; new ones go to the end."""
    assert LENS[:6] == ("z_l", "z_s", "mass", "gamma", "gamma_angle", "r_s")
    assert LENS[6:12] == ("azimuth_s", "q_s", "PA_s", "n_s", "R_s", "I_s")
    assert LENS[12:18] == ("theta_E", "x_s", "y_s", "magnitude_s", "q_l", "PA_l")
    assert LENS[18:25] == ("R_light", "q_light", "turn_light", "n_light", "I_light", "magnitude_light", "exposure")
    assert SUBSTRUCTURE[:5] == ("N_p", "x_v", "y_v", "half_length_v", "angle_v")
    assert SUBSTRUCTURE[5:8] == ("mass_v", "fraction_v", "axion_mass")
    assert POINT[:3] == ("m_p", "r_p", "azimuth_p")


def test_old_data_sets_of_deeplense_are_still_its_own() -> None:
    """What their index says of the preset, as it was before there were others."""
    assert DEEPLENSE.request() == {
        **{"name": "deeplense", "pixels": 150, "pixel_scale": 0.05, "supersampling": 2, "H0": 70.0, "Om0": 0.3},
        **{"distances": "luminosity", "psf_sigma": 0.086, "exposure": 100.0, "sky": 0.1, "scaling": "min-max"},
        **{"z_l": "uniform(0.4, 0.6)", "z_s": "uniform(0.8, 1.2)", "mass": "1000000000000.0"},
        **{"gamma": "uniform(0.0, 0.3)", "gamma_angle": "uniform(0.0, 6.283185307)", "r_s": "uniform(0.0, 0.5)"},
        **{"azimuth_s": "uniform(0.0, 360.0)", "q_s": "uniform(0.4, 1.0)", "PA_s": "uniform(0.0, 6.283185307)"},
        **{"n_s": "1.5", "R_s": "0.5", "I_s": "1.0"},
    }


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_read_back_from_its_request(name: str) -> None:
    preset = Preset.load(name)
    assert Preset(**preset.request()) == preset
    assert preset.name == name


def test_the_presets_are_those_the_papers_name() -> None:
    expected = {name: [] for name in ("deeplense",)} | {"deeplense-test1": ["no", "sphere", "vort"]}
    expected |= {f"model-{k}": ["no_sub", "cdm", "axion"] for k in (1, 2, 3)} | {"wide": ["dark", "light"]}
    assert {name: list(Preset.load(name).classes) for name in presets()} == expected


def test_an_override_takes_the_place_of_what_it_replaces() -> None:
    preset = Preset.load("deeplense", {"theta_E": "uniform(0.8, 2)", "pixels": 64})
    assert (preset.mass, str(preset.theta_E), preset.pixels) == (None, "uniform(0.8, 2.0)", 64)
    assert follows(draw_parameters(preset, 0, range(1000))["theta_E"], "uniform", 0.8, 1.2)
    moved = Preset.load("deeplense", {"x_s": "normal(0, 0.1)", "y_s": 0})
    assert (moved.r_s, moved.azimuth_s) == (None, None)
    # One that a class has its own is replaced there, and nowhere else.
    heavy = Preset.load("deeplense-test1", {"N_p": 40, "mass_v": "2e10"})
    assert heavy.classes["sphere"].N_p == Prior("uniform", (40.0, 40.0))
    assert heavy.N_p is None
    assert heavy.classes["vort"].fraction_v is None
    assert lenses(draw_parameters(heavy, 0, range(3)))[2]["mass_v"] == 2e10
    assert heavy.classes["no"] == TEST1.classes["no"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gamma: ", "gama: ", "gama: unknown key; did you mean 'gamma'"),
        ("sky: 0.1", "", "noise 'poisson' needs sky"),
        ("pixels: 150", "pixels: 0", "pixels: must be greater than 0"),
        ("uniform(0.4, 0.6)", "uniform(0.4, 0.9)", "0 < z_l < z_s"),
        ("uniform(0.4, 1)", "uniform(0, 1)", "0 < q_s <= 1"),
        ("uniform(0.4, 1)", "normal(0.7, 0.1)", "0 < q_s <= 1"),
        ("distances: luminosity", "distances: comoving", "'comoving' is not known"),
        ("H0: 70", "", "needs H0, too"),
        ("z_s: uniform(0.8, 1.2)", "", "the redshifts: z_s missing"),
        ("I_s: 1 ", "magnitude_s: 20 ", "a magnitude needs zero_point"),
        ("I_s: 1 ", "", "the flux of the source: I_s or magnitude_s missing"),
        ("r_s: uniform(0, 0.5)", "r_s: 0.1\nx_s: 0.1", "given twice, by r_s azimuth_s and x_s y_s; leave one out"),
        ("sky: 0.1", "sky: 0.1\nN_p: 3", "the point masses: m_p, r_p, azimuth_p missing"),
        (
            "sky: 0.1",
            "sky: 0.1\nx_v: 0\ny_v: 0\nangle_v: 0",
            "the line of mass: half_length_v or axion_mass, mass_v or fraction_v missing",
        ),
        ("sky: 0.1", "sky: 0.1\nclasses: {a: {N_q: 3}}", "classes.a.N_q: unknown key; did you mean 'N_p'"),
        ("sky: 0.1", "sky: 0.1\nclasses: {a: {q_l: oval}}", "classes.a.q_l: 'oval' is neither a number"),
        (
            "sky: 0.1",
            "sky: 0.1\nN_p: uniform(1, 9)\nm_p: 1e9\nr_p: 1\nazimuth_p: 0",
            "N_p must be a whole number or poisson",
        ),
        ("sky: 0.1", "sky: 0.1\nclasses: {a: {}, b: {q_l: 0.5}}", "class b: its ellipticity: PA_l missing"),
        ("exposure: 100", "", "exposure: is missing"),
        ("sky: 0.1", "noise: ccd", "noise 'ccd' needs exposures, zero_point, sky_brightness, read_noise, gain"),
    ],
)
def test_a_wrong_preset_is_refused_with_its_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = FILE.read_text()
    assert old in text
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as error:
        Preset.load(path)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_or_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'deeplense'"):
        Preset.load("deeplens")
    with pytest.raises(UserError, match="no class 'vortex'; did you mean 'vort'"):
        TEST1.select(["no", "vortex"])
    with pytest.raises(UserError, match="deeplense has no classes"):
        DEEPLENSE.select(["no"])


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
    assert list(p) == [name for name in UNITS if name in p]  # in the order of the index
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
        assert follows(values, "uniform", low, high - low)
        assert low <= values.min() < values.max() <= high
    for name, value in {"mass": 1e12, "n_s": 1.5, "R_s": 0.5, "I_s": 1.0, "exposure": 100.0}.items():
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
    q = draw_parameters(TEST1, 7, [12346, 12347])  # of class sphere and vort
    assert (q["N_p"][0], q["x_v"][1]) == (27, pytest.approx(1.00277174, abs=1e-8))
    assert q["x_p"][0, 0] == pytest.approx(-0.296623, abs=1e-6)


def test_classes_take_turns_and_leave_the_rest_of_a_lens_alone() -> None:
    p, plain = draw_parameters(TEST1, 5, range(90)), draw_parameters(DEEPLENSE, 5, range(90))
    assert (TEST1.labels(range(90)) == np.arange(90) % 3).all()
    for name in ("z_l", "gamma", "x_s", "y_s", "q_s", "PA_s"):
        np.testing.assert_array_equal(p[name], plain[name])
    np.testing.assert_array_equal(p["theta_E"][::3], plain["theta_E"][::3])
    assert (p["theta_E"][1::3] < plain["theta_E"][1::3]).all()  # what the substructure has, the halo lacks
    for name, having in (("N_p", 1), ("mass_p", 1), ("theta_p", 1), ("x_v", 2), ("theta_v", 2), ("angle_v", 2)):
        there = np.isfinite(p[name]).reshape(90, -1)
        assert (there.all(1) == (np.arange(90) % 3 == having)).all()
        assert (there.any(1) == (np.arange(90) % 3 == having)).all()
    # The same image of the class alone is another one, of the same class.
    alone = draw_parameters(TEST1.select(["vort"]), 5, range(90))
    np.testing.assert_array_equal(alone["x_v"][2::3], p["x_v"][2::3])
    assert "N_p" not in alone


def test_halo_and_substructure_weigh_what_the_prior_says() -> None:
    p = draw_parameters(TEST1, 0, range(60))
    unit = einstein_radius(TEST1, np.ones(60), p["z_l"], p["z_s"])  # of one solar mass
    halo = (p["theta_E"] / unit) ** 2
    points, line = np.nansum((p["theta_p"] / unit[:, None]) ** 2, 1), np.nan_to_num((p["theta_v"] / unit) ** 2)
    np.testing.assert_allclose(halo + points + line, 1e12, rtol=1e-9)
    np.testing.assert_allclose(points[1::3], p["mass_p"][1::3], rtol=1e-9)
    np.testing.assert_allclose(line[2::3], p["mass_v"][2::3], rtol=1e-9)
    # DeepLenseSim puts the substructure on top.
    model = draw_parameters(Preset.load("model-1"), 0, range(6))
    assert np.ptp(model["theta_E"]) == 0
    assert model["theta_E"][0] == pytest.approx(1.2815, abs=1e-4)


def test_a_lens_weighs_the_same_whatever_is_drawn_beside_it() -> None:
    preset = TEST1.select(["sphere"])
    together = draw_parameters(preset, 0, range(40))
    for i in range(40):
        alone = draw_parameters(preset, 0, [i])
        assert all(together[name][i] == alone[name][0] for name in alone if name in UNITS)


def test_substructure_heavier_than_its_lens_is_refused() -> None:
    preset = Preset.load("deeplense-test1", {"m_p": 1e11}).select(["sphere"])
    with pytest.raises(UserError, match=r"image \d+ of preset deeplense-test1: its substructure weighs more"):
        draw_parameters(preset, 0, range(4))


def test_substructure_follows_its_priors() -> None:
    p = draw_parameters(TEST1, 2, range(6000))
    sphere, vort = slice(1, None, 3), slice(2, None, 3)
    counts = p["N_p"][sphere]
    assert counts.mean() == pytest.approx(25, abs=4 * 5 / 2000**0.5)
    assert counts.var() == pytest.approx(25, abs=4 * 25 * (2 / 2000) ** 0.5)
    unit = einstein_radius(TEST1, np.ones(6000), p["z_l"], p["z_s"])[sphere, None]
    there = p["theta_p"][sphere] > 0
    assert (there.sum(1) == counts).all()
    masses = (p["theta_p"][sphere] / unit)[there] ** 2
    x, y = p["x_p"][sphere][there], p["y_p"][sphere][there]
    assert follows((masses[:5000] ** 0.1 - 1e6**0.1) / (1e10**0.1 - 1e6**0.1), "uniform")  # dN/dm ~ m^-0.9
    assert follows(np.hypot(x, y)[:5000], "uniform", 0, 2)
    assert follows(np.arctan2(y, x)[:5000], "uniform", -np.pi, 2 * np.pi)
    assert np.abs(np.corrcoef([masses[:5000], np.hypot(x, y)[:5000], x[:5000]]) - np.eye(3)).max() < 5 / 5000**0.5
    for values, name, *arguments in (
        (p["x_v"][vort], "norm", 0, 0.5),
        (p["y_v"][vort], "norm", 0, 0.5),
        (p["half_length_v"][vort], "uniform", 0.25, 0.75),
        (p["angle_v"][vort], "uniform", 0, 360),
        (p["mass_v"][vort], "uniform", 0.03e12, 0.025e12),
    ):
        assert follows(values, name, *arguments)


@pytest.mark.parametrize("name", ["model-1", "model-2", "model-3"])
def test_the_models_draw_what_deeplensesim_draws(name: str) -> None:
    p = draw_parameters(Preset.load(name), 0, range(3000))
    for axis in ("x_s", "y_s"):
        assert follows(p[axis], "uniform", -0.35, 0.7)
    axion = slice(2, None, 3)
    assert follows(np.log10(p["axion_mass"][axion]), "uniform", -24, 2)
    np.testing.assert_allclose(p["half_length_v"][axion], 0.03 * 1e-22 / p["axion_mass"][axion])
    assert (p["N_p"][1::3] == 25).all()
    assert (np.hypot(p["x_p"], p["y_p"])[1::3] >= 0.25 - 1e-12).all()
    q, e = p["q_s"][0], np.hypot(0.1, 0.1)
    assert q == pytest.approx((1 - e) / (1 + e))
    # All deflections of models 2 and 3 are understood as those of a source at z = 2.5.
    shrink = 1.0 if name == "model-1" else 0.634
    assert p["theta_E"][0] == pytest.approx(1.2815 * shrink, rel=2e-4)
    assert p["gamma"][0] == pytest.approx(0.05 * shrink, rel=1e-3)
    assert p["mass_v"][2] == pytest.approx(3e10 * shrink, rel=1e-3)
    if name == "model-1":
        assert follows(np.log10(p["exposure"]), "uniform", 3, 0.5)


def test_a_magnitude_is_the_flux_of_the_whole_profile() -> None:
    p = draw_parameters(Preset.load("wide"), 0, range(12))
    for i in range(12):
        for of in ("s", "light")[: 1 + i % 2]:
            n, R = p[f"n_{of}"][i], p[f"R_{of}"][i]
            k = 1.9992 * n - 0.3271
            flux = quad(
                lambda r, n=n, R=R, k=k: 2 * np.pi * r * np.exp(-k * ((r / R) ** (1 / n) - 1)),
                *(0, np.inf),
                epsrel=1e-9,
                limit=500,
            )[0]
            counts = flux * p[f"I_{of}"][i] / 0.05**2  # of surface brightness per pixel
            assert -2.5 * np.log10(counts) + 25.94 == pytest.approx(p[f"magnitude_{of}"][i], abs=1e-5)


def test_wide_knows_no_direction() -> None:
    """Every angle is uniform over its whole period, nothing else has a direction: a flip or a quarter turn of a lens is
    as likely as the lens."""
    wide = Preset.load("wide")
    for name, period in {"PA_l": 180, "gamma_angle": 180, "PA_s": 180, "azimuth_s": 360}.items():
        assert getattr(wide, name) == Prior("uniform", (0.0, float(period)))
    assert wide.classes["light"].turn_light == Prior("normal", (0.0, 10.0))
    assert (wide.x_s, wide.y_s, wide.x_v) == (None, None, None)
    p = draw_parameters(wide, 0, range(4000))
    for a, b in ((p["x_s"], p["y_s"]), (p["x_s"], -p["x_s"]), (p["PA_l"], (p["PA_l"] + 90) % 180)):
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    light = p["PA_light"][1::2]
    assert stats.ks_2samp(light, -light % 180).pvalue > 1e-3
    turn = (light - p["PA_l"][1::2] + 90) % 180 - 90
    assert follows(turn, "norm", 0, 10)
    assert follows(p["theta_E"], "uniform", 0.6, 1.4)


@pytest.mark.parametrize(
    ("prior", "value", "message"),
    [
        ("n_s", "0.1", "n_s >= 0.2"),
        ("gamma", "5", "0 <= gamma < 1"),
        ("theta_E", "uniform(800, 2000)", "theta_E below 15 arcsec"),  # milliarcseconds
        ("m_p", "power_law(50, 1e6, 1e10)", "too steep"),
        ("m_p", "power_law(-59, 1e6, 1e10)", "too steep"),
    ],
)
def test_a_draw_without_physical_sense_is_refused(prior: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preset.load("deeplense-test1", {prior: value})
