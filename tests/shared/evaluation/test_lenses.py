"""Obedience by lens fits: a bias that was planted in what lenses were asked to be is found, and a round source has no angle."""

import numpy as np
import pytest

from shared.evaluation.lenses import fit_images, lens_share, population, told_and_found
from shared.evaluation.measure import of_tensor
from shared.evaluation.tables import fit_rows
from shared.metrics import obedience
from shared.metrics.lens_fit import LensFitter
from shared.simulate.images import observe, render
from shared.simulate.preset import Preset, draw_parameters


@pytest.mark.slow
def test_fits_find_what_was_planted():
    changes = {
        "pixels": 50,
        "pixel_scale": 0.15,
        "supersampling": 1,
        "gamma": 0,
        "gamma_angle": 0,
        "q_s": "uniform(0.4, 1)",
    }
    preset = Preset.load("deeplense", {**changes, "PA_s": "uniform(0, 180)"})
    parameters = draw_parameters(preset, 0, range(8))
    parameters["q_s"][0] = 1.0
    images, _ = observe(preset, render(preset, parameters), 0, range(8))
    fitter = LensFitter(preset)
    fits = fit_images(of_tensor(images), fitter)
    asked = {**parameters, "theta_E": parameters["theta_E"] - 0.1, "class": np.array(["sphere"] * 8)}
    del asked["y_s"]
    found = {**lens_share(fits), "parameters": told_and_found(fits, asked)}
    assert found["n"] == 8
    assert found["share"] == found["share_lit"] == 1
    assert set(found["parameters"]) == {"theta_E", "x_s", "q_s", "PA_s"}
    assert found["parameters"]["theta_E"]["bias"] == pytest.approx(0.1, abs=0.01)
    assert found["parameters"]["theta_E"]["scatter"] < 0.01
    assert found["parameters"]["x_s"]["r2"] > 0.99
    assert found["parameters"]["PA_s"]["n"] < 8  # one of them is round
    assert found["parameters"]["PA_s"]["r2"] > 0.98
    angles, errors = fits.parameters["PA_s"], fits.errors["PA_s"]
    narrow = {"PA_s": (angles[np.argmin(errors)] + np.linspace(-3, 3, 8)) % 180}  # a spread of 2 degrees
    few = told_and_found(fits, narrow)["PA_s"]["n"]
    assert few == (errors < obedience.spread_of_axes(narrow["PA_s"]) / 3).sum()
    assert 0 < few < found["parameters"]["PA_s"]["n"]
    nothing = {**lens_share(fits), "parameters": told_and_found(fits, {})}
    header, share, lit, chi2, *rows = fit_rows({"real": found, "samples": nothing})
    assert header == ["lens fits", "real", "samples"]
    assert share[1:] == lit[1:] == ["100% of 8 (68% to 100%)"] * 2
    assert 0.8 < float(chi2[1]) < 1.2
    assert [row[2] for row in rows] == ["–"] * 4
    assert fit_rows(None) == []
    assert {name: s["w1"] for name, s in population(fits, fits, fits).items()} == dict.fromkeys(fits.parameters, 0.0)
