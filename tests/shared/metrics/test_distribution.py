"""Metrics of distributions: closed forms, brute force, other implementations, and how often intervals hold."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import UserError
from shared.metrics import distribution, fid
from shared.metrics.distribution import fd_infinity, inception_score, kid, neighbourhoods, scores

SHARES = ("precision", "recall", "density", "coverage")


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def held(found: list[tuple[float, tuple[float, float]]], truth: float) -> float:
    """In which share of cases the interval holds the truth."""
    return float(np.mean([low <= truth <= high for _, (low, high) in found]))


# --- kernel distance --------------------------------------------------------------------------------------------------


def squared_mmd(d: int, shift: float) -> float:
    """MMD² of two standard normal distributions, one of them shifted along all axes: from their first three moments."""
    s = d * shift**2
    return 3 / d * s + 3 / d**2 * s**2 + (s**3 + 6 * s**2 + (3 * d + 6) * s) / d**3


def test_torchmetrics_finds_the_same_kernel_distance():
    from torchmetrics.image.kid import poly_mmd

    a, b = gaussian(60, 12, 0), gaussian(60, 12, 1, 0.2)
    assert kid(a, b)[0] == pytest.approx(1000 * float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(20, 20), (30, 12)])
def test_the_kernel_distance_is_unbiased_whatever_the_numbers(m, n):
    found = [kid(gaussian(m, 8, 2 * i), gaussian(n, 8, 2 * i + 1, 0.5))[0] for i in range(400)]
    assert np.mean(found) == pytest.approx(1000 * squared_mmd(8, 0.5), abs=4 * np.std(found) / 20)


@pytest.mark.parametrize(("shift", "least", "most"), [(0.0, 0.93, 1.0), (0.1, 0.9, 0.99), (0.5, 0.9, 0.98)])
def test_the_interval_of_a_kernel_distance_holds_the_true_one(shift, least, most):
    found = [kid(gaussian(60, 32, 2 * i), gaussian(60, 32, 2 * i + 1, shift)) for i in range(300)]
    assert least <= held(found, 1000 * squared_mmd(32, shift)) <= most
    widths = [(high - low) / 2 / 1.96 for _, (low, high) in found]
    assert np.mean(widths) == pytest.approx(np.std([value for value, _ in found]), rel=0.3)


# --- neighbourhoods ---------------------------------------------------------------------------------------------------


def by_the_definition(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    def reach(x: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(x - row, axis=1))[k] for row in x]

    apart = [[np.linalg.norm(x - y) for y in generated] for x in real]
    n, reach_real, reach_generated = len(real), reach(real), reach(generated)
    inside = [[apart[i][j] <= reach_real[i] for j in range(n)] for i in range(n)]
    return {
        "precision": sum(any(inside[i][j] for i in range(n)) for j in range(n)) / n,
        "recall": sum(any(apart[i][j] <= reach_generated[j] for j in range(n)) for i in range(n)) / n,
        "density": sum(map(sum, inside)) / (k * n),
        "coverage": sum(map(any, inside)) / n,
    }


@pytest.mark.parametrize("k", [1, 5])
def test_shares_are_those_of_the_definition(k):
    real, generated = gaussian(40, 3, 0), 0.7 * gaussian(40, 3, 1, 0.5)
    found = neighbourhoods(real, generated, k)
    assert found == pytest.approx(by_the_definition(real, generated, k))
    assert len(set(found.values())) == 4


@pytest.mark.parametrize(("n", "k"), [(12, 3), (100, 5)])
def test_for_equal_sets_density_and_coverage_have_their_closed_forms(n, k):
    found = [neighbourhoods(gaussian(n, 4, 2 * i), gaussian(n, 4, 2 * i + 1), k) for i in range(200)]
    # Covered unless the k nearest of n - 1 real and n generated images are all real; 1 - 2^-k for large n.
    missed = np.prod([(n - 1 - j) / (2 * n - 1 - j) for j in range(k)])
    for name, expected in {"density": 1.0, "coverage": 1 - missed}.items():
        values = [one[name] for one in found]
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / 200**0.5)


def test_each_share_sees_its_own_fault():
    real = gaussian(200, 4, 0)
    repeated = neighbourhoods(real, gaussian(4, 4, 1).repeat(50, 0))
    assert repeated["precision"] > 0.9
    assert repeated["recall"] == 0
    assert repeated["coverage"] < 0.3
    shrunk = neighbourhoods(real, 0.5 * gaussian(200, 4, 1))
    assert shrunk["density"] > 1.2
    assert shrunk["recall"] < 0.8
    assert neighbourhoods(real, gaussian(200, 4, 1, 100.0)) == dict.fromkeys(SHARES, 0.0)
    assert neighbourhoods(real, real)["coverage"] == neighbourhoods(real, real)["recall"] == 1


def test_pairs_in_parts_are_the_same_pairs(monkeypatch):
    a, b = gaussian(50, 6, 0), gaussian(50, 6, 1, 0.3)
    whole = (*kid(a, b)[1], *neighbourhoods(a, b).values())
    monkeypatch.setattr(distribution, "CHUNK", 7)
    assert (*kid(a, b)[1], *neighbourhoods(a, b).values()) == pytest.approx(whole)


# --- Fréchet distance of infinitely many --------------------------------------------------------------------------------


@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_infinitely_many_gaussians_are_at_the_distance_of_their_widths(stretch):
    widths = 1 / np.sqrt(np.arange(1, 33))
    truth = ((stretch - 1) ** 2 * widths**2).sum() + (stretch > 1) * 32 * 0.1**2
    pairs = [(gaussian(160, 32, 2 * i), gaussian(160, 32, 2 * i + 1)) for i in range(60)]
    pairs = [(a * widths, b * widths * stretch + 0.1 * (stretch > 1)) for a, b in pairs]
    found = [fd_infinity(a, b) for a, b in pairs]
    values = [value for value, _ in found]
    biased = np.mean([fid.frechet_distance(a, b) for a, b in pairs]) - truth
    assert biased > 0.3
    assert np.mean(values) == pytest.approx(truth, abs=0.05 * biased + 4 * np.std(values) / 60**0.5)
    assert held(found, truth) >= 0.88
    halves = [(high - low) / 2 for _, (low, high) in found]
    assert np.mean(halves) < 2.365 * 3 * np.std(values)


# --- Inception score ----------------------------------------------------------------------------------------------------


def test_torchmetrics_finds_the_same_inception_score():
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * gaussian(50, 10, 0)
    theirs = InceptionScore(feature=nn.Identity(), splits=1)
    theirs.update(torch.from_numpy(logits))
    assert inception_score(logits) == pytest.approx(float(theirs.compute()[0]))


def test_the_inception_score_counts_classes_that_are_told_apart():
    assert inception_score(np.ones((9, 4))) == pytest.approx(1)
    assert inception_score(np.array([[1e3, 0, 0]] * 9)) == pytest.approx(1)
    assert inception_score(1e3 * np.eye(7)) == pytest.approx(7)
    assert inception_score(1e3 * np.eye(7)[[0, 1, 0, 1]]) == pytest.approx(2)
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    expected = np.exp((p * np.log(p / [0.6, 0.4])).sum() / 2)
    assert inception_score(np.log(p) + 5) == pytest.approx(expected)


# --- all of them ---------------------------------------------------------------------------------------------------------


def test_real_images_score_about_the_floor_and_others_far_from_it():
    real = gaussian(480, 12, 3)
    a, b, fresh = real[:160], real[160:320], real[320:]
    worse = {"shifted": fresh + 0.6, "repeated": fresh[:8].repeat(20, 0)}
    found = scores(a, b, {"fresh": fresh, **worse}, logits=lambda x: 3 * x)
    assert set(found) == {"kid", *SHARES, "fd_infinity", "inception_score"}
    for metric, scored in found.items():
        for one in scored.values():
            assert one["excess"] == one["value"] - one["floor"]
            assert one["n"] == 160
            assert one["floor_sd"] > 0
            assert ("interval" in one) == (metric in ("kid", "fd_infinity"))
        assert abs(scored["fresh"]["excess"]) < 6 * scored["fresh"]["floor_sd"]
    for metric, sign in {"kid": 1, "fd_infinity": 1, "coverage": -1, "recall": -1}.items():
        for name in worse:
            one = found[metric][name]
            assert sign * one["excess"] > 8 * one["floor_sd"]
    assert found["kid"]["shifted"]["value"] == kid(a, worse["shifted"])[0]
    assert found["inception_score"]["shifted"]["value"] == inception_score(3 * worse["shifted"])
    assert json.loads(json.dumps(found)) == found


def test_scores_follow_from_their_seed():
    real = gaussian(80, 4, 0)
    found = [scores(real[:40], real[40:], {"x": gaussian(40, 4, 1)}, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["fd_infinity"] != found[2]["fd_infinity"]


def test_the_larger_side_is_thinned_to_the_smaller_which_the_floor_is_of():
    real = gaussian(600, 4, 0)
    found = scores(real[:500], real[500:], {"x": gaussian(100, 4, 1)})["density"]["x"]
    assert found["n"] == 100
    assert found["value"] == pytest.approx(1, abs=0.3)  # of 500 against 100 it would be 1/5
    assert found["floor"] == pytest.approx(1, abs=0.15)
    assert scores(real[:30], real[500:], {"x": real[:100]})["density"]["x"]["n"] == 30


def test_of_few_images_there_are_fewer_metrics():
    real = gaussian(100, 4, 0)

    def known(n: int) -> set[str]:
        return set(scores(real[:n], real[-n:], {"x": gaussian(n, 4, 1)}))

    assert known(2) == set()
    assert known(5) == {"kid"}
    assert known(15) == {"kid", *SHARES}
    assert known(16) == {"kid", *SHARES, "fd_infinity"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: scores(x, x, {"unet": x[:20]}), "unet has 20 images and the floor 30"),
        (lambda x: kid(x[:2], x), "N >= 3"),
        (lambda x: kid(x, x[:, :2]), "Two sets of features"),
        (lambda x: kid(x, x * np.nan), "finite"),
        (lambda x: neighbourhoods(x, x[:20]), "as many real as generated images, got 30 and 20"),
        (lambda x: neighbourhoods(x[:5], x[:5]), "N >= 6"),
        (lambda x: fd_infinity(x[:15], x[:15]), "at least 16, got 15 and 15"),
        (lambda x: fd_infinity(x, x[:20]), "got 30 and 20"),
        (lambda x: inception_score(x * np.inf), "finite logits"),
        (lambda x: inception_score(x[:0]), "finite logits"),
    ],
)
def test_what_has_no_value_is_refused(call: Callable, message):
    with pytest.raises(UserError, match=message):
        call(gaussian(30, 3, 0))
