"""Obedience on planted biases and scatters."""

import numpy as np
import pytest

from shared.metrics.obedience import difference, obedience, spread, spread_of_axes


def test_a_planted_bias_and_scatter_are_found():
    rng = np.random.default_rng(0)
    asked = rng.uniform(0.8, 1.6, 20_000)
    found = obedience(asked, asked + 0.05 + 0.02 * rng.standard_normal(asked.size))
    assert found.bias == pytest.approx(0.05, abs=5e-4)
    assert found.scatter == pytest.approx(0.02, rel=0.02)
    assert found.r2 == pytest.approx(1 - (0.05**2 + 0.02**2) / (0.8**2 / 12), abs=2e-3)


def test_perfect_indifferent_and_unknown():
    asked = np.linspace(0, 1, 101)
    assert obedience(asked, asked) == (101, 0, 0, 1)
    assert obedience(asked, np.full(101, 0.5)).r2 == pytest.approx(0)
    assert obedience(asked, 1 - asked).r2 == pytest.approx(-3)
    gaps = np.where(asked < 0.5, np.nan, asked)
    assert obedience(gaps, asked) == (51, 0, 0, 1)
    assert np.isnan(obedience(np.full(5, 2.0), np.arange(5.0)).r2)
    assert obedience(np.array([np.nan]), np.array([1.0])).n == 0


def test_axes_have_no_seam():
    rng = np.random.default_rng(1)
    asked = rng.uniform(0, 180, 20_000)
    found = obedience(asked, (asked + 3 + 2 * rng.standard_normal(asked.size)) % 180, axis=True)
    assert found.bias == pytest.approx(3, abs=0.06)
    assert found.scatter == pytest.approx(2, rel=0.03)
    # |e^{2i a} - e^{2i m}|^2 is twice 1 - cos, over a variance of 1
    assert found.r2 == pytest.approx(1 - 2 * (1 - np.cos(np.deg2rad(6)) * np.exp(-2 * np.deg2rad(2) ** 2)), abs=2e-3)
    assert difference(np.array([1.0]), np.array([179.0]), axis=True) == pytest.approx(-2)
    assert obedience(asked, (asked + 90) % 180, axis=True).r2 == pytest.approx(-3, abs=0.1)


@pytest.mark.parametrize("middle", [0.0, 60.0, 179.0])
def test_the_spread_of_axes_has_no_seam(middle):
    angles = (middle + np.linspace(-3, 3, 3001)) % 180
    assert spread_of_axes(angles) == pytest.approx(6 / 12**0.5, rel=1e-3)
    assert spread_of_axes(np.append(angles, np.nan)) == spread_of_axes(angles)


def test_the_spread_of_a_gaussian_is_its_deviation_and_outliers_leave_it_alone():
    values = np.random.default_rng(2).normal(1, 3, 40_000)
    assert spread(values) == pytest.approx(3, rel=0.02)
    values[:400] = 1e9
    assert spread(values) == pytest.approx(3, rel=0.05)
