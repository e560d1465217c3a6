"""Memorisation: planted copies are found, chance has the distribution that its formulas say, and quality is no memory."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from shared.data.symmetries import ELEMENTS, apply
from shared.errors import UserError
from shared.evaluation.measure import ImageSet
from shared.metrics.memorisation import Memorisation, _copies, _nearest, _nearness, blocks, memorisation, noised

SIDE, NOISE = 50, 0.02
AS_IT_IS = {"as it is": ("identity",)}


def lenses(n: int, seed: int) -> Tensor:
    """Pairs of spots at random places, of random brightness, within white noise."""
    rng = np.random.default_rng(seed)
    axis = np.arange(SIDE) - (SIDE - 1) / 2
    centre, light = rng.uniform(-15, 15, (2, n, 2, 1, 1)), rng.uniform(0.3, 1, (2, n, 1, 1))
    spots = light * np.exp(-((axis[:, None] - centre[:, :, 0]) ** 2 + (axis - centre[:, :, 1]) ** 2) / 40)
    return torch.from_numpy((spots.sum(0) + NOISE * rng.standard_normal((n, SIDE, SIDE))).astype(np.float32))[:, None]


@pytest.fixture(scope="module")
def train() -> Tensor:
    return lenses(600, 0)


@pytest.fixture(scope="module")
def test() -> Tensor:
    return lenses(200, 1)


def test_new_images_are_no_copies_and_planted_ones_are_found(train, test):
    found = memorisation(lenses(150, 2), train, test)
    assert list(found) == ["as it is", "turned"]
    for answer in found.values():
        assert answer.copies <= 3
        assert answer.p_copies > 0.01
        assert answer.p > 0.01
        assert abs(answer.nearer - 0.75) < 4 * answer.nearer_sd
        assert all(hits == planted == 50 for hits, planted in answer.planted.values())
        assert answer.blind == []
        assert "of 150 are copies" in answer.verdict
        json.dumps(answer.to_dict(), allow_nan=False)
    assert list(found["turned"].planted) == ["copies", "noisy copies", "turned copies"]


def test_a_generator_that_has_learnt_by_heart_is_found_out(train, test):
    memorised = noised(train[:75], torch.Generator().manual_seed(0))
    answer = memorisation(torch.cat([lenses(75, 2), memorised]), train, test, places=AS_IT_IS)["as it is"]
    assert answer.copies >= 73
    assert answer.p_copies < 1e-6
    assert answer.p < 1e-3
    first = answer.closest[0]
    assert first["generated"] == first["train"] + 75
    assert first["ratio"] == answer.ratio.min()
    assert len(answer.closest) == 10


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_turned_copy_is_found_where_it_is_looked_for_and_its_turn_is_named(train, test, element):
    answers = memorisation(apply(train[7:8], element), train[:100], test[:50])
    closest = answers["turned"].closest[0]
    assert (closest["train"], closest["element"]) == (7, element)
    assert closest["distance"] < 1e-5
    assert answers["as it is"].copies == (element == "identity")
    allowed = {"allowed": ("identity", "rot180")}
    answer = memorisation(apply(train[7:8], element), train[:100], test[:50], places=allowed)["allowed"]
    assert answer.copies == (element in allowed["allowed"])


@pytest.mark.parametrize("poor", ["blurred", "uniform", "noise"])
def test_poor_images_are_not_memory(train, test, poor):
    fake = lenses(150, 3)
    if poor == "blurred":
        fake = F.avg_pool2d(fake, 9, 1, 4, count_include_pad=False)
    elif poor == "uniform":  # one mode, as near to training as to test images
        fake = fake[:1] + 0.1 * (fake - fake[:1])
    else:
        fake = fake + 0.3 * torch.randn(fake.shape, generator=torch.Generator().manual_seed(0))
    answer = memorisation(fake, train, test, places=AS_IT_IS)["as it is"]
    assert answer.copies <= 3
    assert answer.p > 0.01


def test_a_test_that_is_blind_says_so(train, test):
    # The sum of the pixels knows exact copies at best.
    answer = memorisation(test[:20], train, test, describe=lambda x: x.sum((1, 2, 3))[:, None])["as it is"]
    assert "noisy copies" in answer.blind
    assert answer.verdict.startswith("this test cannot find")
    # Where the test set repeats training images, an exact copy is no exception.
    answer = memorisation(test[20:40], train, torch.cat([test, train[:20]]))["as it is"]
    assert answer.blind == ["copies", "noisy copies"]


def test_images_of_any_kind_and_known_descriptions_give_the_same(train, test):
    fake, done = lenses(30, 4), []
    whole = memorisation(fake, train, test)["turned"]
    stored = ImageSet("", 300, lambda k: train[k])
    first = memorisation(fake.numpy(), stored, test, progress=done.append)["turned"]
    again = memorisation(
        fake, train[:300].numpy(), test,
        known={"train": blocks(train[:300]).numpy(), "generated": blocks(fake).numpy()},
    )["turned"]  # fmt: skip
    assert sum(done) == 30 + 300 + 200
    np.testing.assert_allclose(first.ratio, again.ratio, rtol=1e-4)
    assert (first.copies, first.planted) == (again.copies, again.planted)
    assert (whole.ratio <= first.ratio + 1e-6).all()


@pytest.mark.parametrize(
    ("generated", "options", "message"),
    [
        (torch.rand(3, 1, 8, 9), {}, "cannot be compared"),
        (torch.rand(0, 1, 8, 8), {}, "0 generated.*too few"),
        (torch.full((3, 1, 8, 8), torch.nan), {}, "NaN"),
        (torch.rand(3, 1, 8, 8), {"known": {"train": np.zeros((3, 2))}}, "3 descriptions of 30 train images"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(generated, options, message):
    with pytest.raises(UserError, match=message):
        memorisation(generated, torch.rand(30, 1, 8, 8), torch.rand(30, 1, 8, 8), **options)


def test_oblong_images_are_turned_by_what_keeps_their_shape():
    fake, train, test = torch.rand(3, 1, 8, 12), torch.rand(30, 1, 8, 12), torch.rand(30, 1, 8, 12)
    assert memorisation(fake, train, test)["turned"].elements == ("identity", "flip_lr", "flip_ud", "rot180")
    with pytest.raises(UserError, match="cannot be turned by rot90"):
        memorisation(fake, train, test, places={"all": ("identity", "rot90")})


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_new_noise_is_as_strong_as_the_old():
    noise = 0.1 * torch.randn(4, 2, 60, 60, generator=torch.Generator().manual_seed(0))
    noise[..., 30:] *= 3
    change = noised(noise, torch.Generator().manual_seed(1)) - noise
    assert float(change[..., :26].std()) == pytest.approx(0.1, rel=0.1)
    assert float(change[..., 34:].std()) == pytest.approx(0.3, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([change.flatten(), noise.flatten()]))[0, 1])) < 0.03


def test_blocks_turn_as_their_images_do_and_forget_brightness():
    images = torch.rand(3, 2, 53, 40)
    for element in ("flip_lr", "flip_ud", "rot180"):
        turned = apply(blocks(images).reshape(3, 2, 25, 25), element).flatten(1)
        np.testing.assert_allclose(blocks(apply(images, element)), turned, atol=1e-6)
    np.testing.assert_allclose(blocks(3 * images + 1), blocks(images), atol=1e-6)


def test_the_nearest_are_those_of_all_distances():
    views, base = torch.randn(2, 30, 5), torch.randn(70, 5)
    base[:30] = views[0]
    own = np.arange(30)
    distance, which = _nearest(views, base.split(16), own)
    every = torch.cdist(views.double(), base.double())
    every[:, own, own] = torch.inf
    np.testing.assert_allclose(distance, every.min(2).values, rtol=1e-5)
    np.testing.assert_array_equal(which, every.argmin(2))
    assert (_nearest(views, base.split(16))[0][0] == 0).all()


def test_copies_by_chance_are_as_many_as_promised():
    rng = np.random.default_rng(0)
    found = [_copies(rng.random(400), rng.random(1500)) for _ in range(3000)]
    copies, expected, p = (np.array(column) for column in list(zip(*found, strict=True))[1:])
    assert np.mean(copies) == pytest.approx(expected[0], rel=0.1)
    assert expected[0] == pytest.approx(400 * 2 / 1501)
    assert np.mean(p <= 0.05) <= 0.06
    # With no false alarm in 99 test images, one of a single image is one in a hundred.
    assert _copies(np.array([-1.0]), np.arange(99.0)) == (0.0, 1, 0.01, pytest.approx(0.01))


def test_nearness_by_chance_has_a_p_value_that_is_uniform_even_with_hubs():
    rng, p = np.random.default_rng(1), []
    for _ in range(300):
        is_train = rng.permutation(np.arange(90) < 60)
        nearest = rng.integers(0, 8, 100) ** 2  # some real images are the neighbours of many
        p.append(_nearness(is_train[nearest], nearest, nearest, 60, 30, rng)[3])
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)


def test_nearness_has_its_closed_form():
    # m neighbours, all different, of 6 training and 4 test images: the hypergeometric distribution.
    rng = np.random.default_rng(2)
    places = np.arange(5)
    share, mean, sd, p = _nearness(np.array([True] * 4 + [False]), places, places, 6, 4, rng)
    law = stats.hypergeom(10, 6, 5)
    assert (share, mean) == (0.8, 0.6)
    assert sd == pytest.approx(law.std() / 5, rel=0.03)
    assert p == pytest.approx(law.sf(3), abs=0.02)


def test_the_answer_is_the_seeds(train, test):
    fake = lenses(20, 5)
    first, again, other = (memorisation(fake, train, test, places=AS_IT_IS, seed=s)["as it is"] for s in (0, 0, 1))
    assert isinstance(first, Memorisation)
    assert first.to_dict() == again.to_dict()
    np.testing.assert_array_equal(first.ratio.argmin(), other.ratio.argmin())
