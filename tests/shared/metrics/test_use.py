"""Use: what is learnt from good images holds for real ones, and what is wrong with generated ones shows."""

import numpy as np
import pytest
import torch
from scipy import stats

from shared.errors import UserError
from shared.evaluation.measure import ImageSet
from shared.metrics.two_sample import auc_interval
from shared.metrics.use import Labelled, auc, use

CLASSES = ("spot", "ring", "bar")
QUICK = {"steps": 80, "batch_size": 24, "width": 8}


def shapes(n: int, seed: int, side: int = 32, noise: float = 0.05) -> Labelled:
    """Spots, rings and bars within white noise, n in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    axis = np.arange(side) - (side - 1) / 2
    centre = rng.uniform(-3, 3, (2, n, 1, 1))
    x, y = axis - centre[0], axis[:, None] - centre[1]
    r = np.hypot(x, y)
    kinds = np.exp(-(r**2) / 8), np.exp(-((r - 6) ** 2) / 2), np.exp(-(y**2) / 2) * (abs(x) < 10)
    images = np.choose(labels[:, None, None], kinds) + noise * rng.standard_normal((n, side, side))
    return torch.from_numpy(images.astype(np.float32))[:, None], labels


@pytest.fixture(scope="module")
def real() -> tuple[Labelled, Labelled]:
    return shapes(120, 0), shapes(90, 1)


def test_good_images_are_as_useful_as_real_ones(real):
    images, labels = shapes(150, 2)
    stored = ImageSet("", 150, lambda k: images[k])
    found = use(*real, (stored, labels), CLASSES, elements=("identity", "rot180"), **QUICK)
    assert list(found) == ["real → real", "generated → real", "real → generated"]
    assert [(f.n_train, f.n_test) for f in found.values()] == [(120, 90), (120, 90), (120, 150)]
    for one in found.values():
        assert one.auc > 0.95
        assert one.auc_interval[0] < one.auc <= one.auc_interval[1]
        assert one.accuracy_interval[0] < one.accuracy <= one.accuracy_interval[1]
        assert one.auc == pytest.approx(np.mean([one.by_class[kind] for kind in CLASSES]))


def test_labels_that_say_nothing_are_found_out(real):
    images, labels = shapes(120, 2)
    found = use(*real, (images, np.random.default_rng(0).permutation(labels)), CLASSES, **QUICK)
    assert found["real → real"].auc > 0.95
    low, high = found["real → generated"].auc_interval
    assert low < 0.5 < high
    assert abs(found["real → generated"].accuracy - 1 / 3) < 0.15
    assert found["generated → real"].auc < 0.85


def test_two_classes_that_changed_their_names_are_found_out(real):
    images, labels = shapes(120, 2)
    found = use(*real, (images, np.array([1, 0, 2])[labels]), CLASSES, **QUICK)
    for row in ("generated → real", "real → generated"):
        assert found[row].by_class["bar"] > 0.9
        assert max(found[row].by_class["spot"], found[row].by_class["ring"]) < 0.5


def test_both_trainings_see_as_many_images_of_each_class(real):
    images, labels = shapes(120, 2)
    few = np.flatnonzero((labels != 1) | (np.arange(120) < 45))
    found = use(*real, (images[few], labels[few]), CLASSES, **(QUICK | {"steps": 2}))
    assert found["real → real"].n_train == found["generated → real"].n_train == 40 + 15 + 40


def test_the_answer_is_the_seeds_and_not_the_callers(real):
    state = torch.random.get_rng_state()
    first, again, other = (use(*real, shapes(60, 2), CLASSES, **(QUICK | {"steps": 3}), seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_auc_counts_the_pairs_in_order():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 30).astype(float), rng.integers(0, 7, 40).astype(float)
    pairs = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    assert auc(a, b) == pytest.approx(pairs.mean())


def test_the_interval_of_a_classifier_that_others_trained_counts_every_image():
    assert auc_interval(0.7, 40, 60, counted=1.0) == auc_interval(0.7, 80, 120)
    rng, truth = np.random.default_rng(0), stats.norm.cdf(1 / np.sqrt(2))
    found = [auc(rng.normal(1, 1, 40), rng.normal(0, 1, 60)) for _ in range(300)]
    covered = [low <= truth <= high for low, high in (auc_interval(x, 40, 60, counted=1.0) for x in found)]
    assert 0.9 < np.mean(covered) < 0.99


@pytest.mark.parametrize(
    ("classes", "change", "message"),
    [
        ((), {}, "without classes"),
        (("a", "b"), {}, "0 real training images of class b are too few"),
        (CLASSES, {2: (shapes(60, 0)[0], np.full(60, 7))}, "labels other than"),
        (CLASSES, {2: (shapes(60, 0)[0], np.zeros(5))}, "5 labels of 60 generated"),
        (CLASSES, {2: shapes(60, 0, side=24)}, "cannot be compared"),
    ],
)
def test_sets_without_what_is_needed_are_refused(classes, change, message):
    sets = [shapes(60, k) for k in range(3)] if len(classes) != 2 else [(shapes(60, 0)[0], np.zeros(60))] * 3
    for k, one in change.items():
        sets[k] = one
    with pytest.raises(UserError, match=message):
        use(*sets, classes, **QUICK)
