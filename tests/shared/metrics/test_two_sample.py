"""Two-sample tests: what is equal is called equal as often as promised, and what was planted is found."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from shared.errors import UserError
from shared.metrics.two_sample import (
    Stretch,
    accuracy_interval,
    auc_interval,
    classifier_two_sample,
    describe,
    distinct,
    paired_test,
)


def blobs(n: int, seed: int, side: int = 16, noise: float = 0.05) -> Tensor:
    """Spots left of the middle, within white noise."""
    rng = np.random.default_rng(seed)
    axis = np.arange(side) - (side - 1) / 2
    centre = rng.uniform(-3, 3, (n, 2, 1, 1)) - np.array([0.0, 2.0])[:, None, None]
    light = np.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / 8)
    return torch.from_numpy((light + noise * rng.standard_normal(light.shape)).astype(np.float32))[:, None]


def blurred(images: Tensor) -> Tensor:
    kernel = torch.tensor([0.1, 0.8, 0.1])
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), (kernel[:, None] * kernel)[None, None])


# --- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_equal_sets_the_intervals_cover_chance():
    options = {"folds": 4, "steps": 20, "batch_size": 16, "width": 4}
    found = [classifier_two_sample(blobs(30, 2 * k), blobs(60, 2 * k + 1), seed=k, **options) for k in range(20)]
    for name in ("auc_interval", "accuracy_interval"):
        assert sum(low <= 0.5 <= high for low, high in (getattr(f, name) for f in found)) >= 18
    assert np.mean([f.auc for f in found]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "plant",
    [blurred, lambda x: x.flip(-1), lambda x: x + 0.033 * torch.randn(x.shape)],
    ids=["blur", "mirror", "noise"],
)
def test_what_was_planted_is_found(plant):
    torch.manual_seed(0)
    found = classifier_two_sample(plant(blobs(100, 0)), blobs(150, 1))
    assert (found.n_a, found.n_b) == (100, 150)
    assert found.auc_interval[0] > 0.5
    assert found.accuracy_interval[0] > 0.5
    assert found.auc > 0.7


def test_the_answer_is_the_seeds_and_not_the_callers():
    a, b = blobs(20, 0), blobs(20, 1)
    first = classifier_two_sample(a, b, steps=5, width=4)
    state = torch.random.get_rng_state()
    assert classifier_two_sample(a.numpy(), [b[:7], b[7:]], steps=5, width=4) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert classifier_two_sample(a, b, steps=5, width=4, seed=1) != first


def test_copies_count_once():
    a, b = blobs(20, 0), blobs(20, 1)
    assert torch.equal(distinct(torch.cat([a, a[3:5]])), a)
    found = classifier_two_sample(a.repeat(4, 1, 1, 1), b, steps=5, width=4)
    assert (found.n_a, found.n_b) == (20, 20)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            torch.rand(9, 1, 8, 8),
            torch.rand(50, 1, 8, 8),
            "9 and 50 distinct images are too few for 5 folds.* 10 of each",
        ),
        (torch.rand(20, 1, 8, 8), torch.rand(20, 1, 8, 9), "cannot be compared"),
        (torch.full((20, 1, 8, 8), torch.nan), torch.rand(20, 1, 8, 8), "NaN"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        classifier_two_sample(a, b)


def test_intervals_have_their_closed_forms():
    # At chance Hanley and McNeil's variance is that of the rank sum, (m + n + 1) / (12 m n), of half of the images.
    m, n = 20, 35
    low, high = auc_interval(0.5, 2 * m, 2 * n)
    half = high - 0.5
    assert low == pytest.approx(0.5 - half)
    assert half == pytest.approx(1.96 * np.sqrt((m + n + 1) / (12 * m * n)), rel=0.15)
    # No sample makes certain, not even where every pair was in order.
    assert auc_interval(1.0, 28, 280)[1] == pytest.approx(1)
    assert 0.7 < auc_interval(1.0, 28, 280)[0] < auc_interval(1.0, 280, 280)[0] < 0.999
    assert auc_interval(0.3, 40, 50) == pytest.approx([1 - x for x in auc_interval(0.7, 40, 50)[::-1]])
    # The mean of two equal shares varies half as much as one of them.
    exact = stats.binomtest(15, 30).proportion_ci(method="exact")
    low, high = accuracy_interval(30, 60, 30, 60)
    assert (low, high) == pytest.approx(
        (0.5 - (0.5 - exact.low) / np.sqrt(2), 0.5 + (exact.high - 0.5) / np.sqrt(2)), rel=1e-6
    )
    low, high = accuracy_interval(60, 60, 600, 600)
    assert high == 1.0
    assert low > 0.9


# --- pairs ------------------------------------------------------------------------------------------------------------


def described(images: Tensor) -> tuple[Tensor, ...]:
    return describe(Stretch.of(images)(images))


def oriented(n: int, seed: int, right: float) -> tuple[Tensor, Tensor]:
    """Spots on either side, on the left in a share `right` of the images, and their mirror images."""
    images = blobs(n, seed)
    rng = np.random.default_rng(seed)
    left = images[..., :8].sum((1, 2, 3)) > images[..., 8:].sum((1, 2, 3))
    stay = left == torch.from_numpy(rng.random(n) < right)
    turned = torch.where(stay[:, None, None, None], images, images.flip(-1))
    return turned, turned.flip(-1)


def test_exchangeable_pairs_have_p_values_that_are_uniform():
    p = []
    for k in range(60):
        a, b = oriented(25, k, 0.5)
        p.append(paired_test([described(a)], [described(b)], seed=k).p)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert min(p) > 1 / 4000


def test_what_should_be_visible_is_seen_in_four_of_five_samples():
    n, level = 150, 0.01
    a, b = oriented(n, 0, 0.5)
    visible = paired_test([described(a)], [described(b)], level=level).visible
    assert 0.6 < visible < 0.85

    def power(right: float) -> float:
        pairs = [oriented(n, k, right) for k in range(1, 13)]
        return float(np.mean([paired_test([described(a)], [described(b)], seed=3).p <= level for a, b in pairs]))

    assert power(visible) >= 0.6
    assert power(0.5 + 0.3 * (visible - 0.5)) <= 0.5


def test_a_change_of_places_throughout_changes_nothing():
    a, b = (described(x) for x in oriented(40, 0, 0.8))
    one, other = paired_test([a], [b]), paired_test([b], [a])
    assert one.p == other.p
    assert paired_test([a, a], [b, b]).p == one.p


def test_correlated_noise_is_an_orientation():
    torch.manual_seed(0)
    noise = torch.randn(200, 1, 20, 20)
    rows = noise + noise.roll(1, -1)  # read out along rows
    assert paired_test([described(noise)], [described(noise.mT)]).p > 0.01
    assert paired_test([described(rows)], [described(rows.mT)]).p <= 0.0005
    assert paired_test([described(rows)], [described(rows.flip(-1))]).p > 0.01


def test_what_cannot_be_told_is_not_told():
    a, b = (described(x) for x in oriented(1, 0, 1.0))
    assert paired_test([a], [b]).visible == 1.0
    round_spots = described(blobs(30, 0))
    assert paired_test([round_spots], [round_spots]).p == 1.0  # images that their turned copies equal
    assert paired_test([round_spots], [round_spots]).visible == 0.5
    with pytest.raises(UserError, match="contrast"):
        Stretch.of(torch.ones(5, 1, 4, 4))
