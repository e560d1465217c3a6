"""The group of the square, the tests of its elements, and what training makes of the answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.data.cache import CacheWriter, LensImages
from shared.data.symmetries import (
    ELEMENTS,
    FILE,
    allowed,
    apply,
    apply_each,
    compose,
    cosets,
    group,
    holm,
    judge,
    main_symmetries,
    subgroups,
    symmetries,
    turns,
)
from shared.errors import UserError
from shared.metrics.two_sample import Paired

OBLONG = ("identity", "flip_lr", "flip_ud", "rot180")


def blobs(n: int, seed: int, turned: tuple[str, ...] = ("identity",), shape: tuple[int, int] = (24, 24)) -> Tensor:
    """A bright spot to the upper left of the middle, within noise, each image then turned by one of `turned`."""
    rng = np.random.default_rng(seed)
    y, x = (np.arange(side) - (side - 1) / 2 for side in shape)
    centre = rng.normal(0, 2, (n, 2, 1, 1)) - np.array([3.0, 5.0])[:, None, None]
    light = np.exp(-((y[:, None] - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) / 12)
    images = torch.from_numpy((light + 0.05 * rng.standard_normal(light.shape)).astype(np.float32))[:, None]
    return apply_each(images, turned, torch.from_numpy(rng.integers(len(turned), size=n)))


def write(folder: Path, images: Tensor) -> LensImages:
    writer = CacheWriter(folder, len(images), (1, images.shape[2], images.shape[3]), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop].numpy())
    writer.finish()
    return LensImages(folder)


# --- the group --------------------------------------------------------------------------------------------------------


def test_elements_are_what_their_names_say():
    x = torch.arange(12).reshape(1, 3, 4)
    for k, name in enumerate(("identity", "rot90", "rot180", "rot270")):
        assert torch.equal(apply(x, name), torch.rot90(x, k, (-2, -1)))
    assert torch.equal(apply(x, "flip_lr"), torch.fliplr(x[0])[None])
    assert torch.equal(apply(x, "flip_ud"), torch.flipud(x[0])[None])
    assert torch.equal(apply(x, "transpose"), x.mT)
    assert torch.equal(apply(x, "antitranspose"), torch.rot90(x, 2, (-2, -1)).mT)


def test_composition_is_application_one_after_the_other():
    x = torch.randn(2, 3, 5, 5)
    for g in ELEMENTS:
        assert {compose(g, h) for h in ELEMENTS} == set(ELEMENTS)
        for h in ELEMENTS:
            assert torch.equal(apply(apply(x, h), g), apply(x, compose(g, h)))
    assert compose("rot90", "flip_lr") != compose("flip_lr", "rot90")


def test_each_image_is_turned_by_its_own_element_and_none_is_changed():
    x = torch.randn(16, 1, 4, 4)
    before, drawn = x.clone(), torch.arange(16) % 8
    turned = apply_each(x, ELEMENTS, drawn)
    for i, k in enumerate(drawn):
        assert torch.equal(turned[i], apply(x[i], ELEMENTS[k]))
    assert torch.equal(x, before)
    assert apply_each(x, ELEMENTS, torch.zeros(16, dtype=torch.long)) is x


def test_the_square_has_ten_subgroups_and_the_rectangle_five():
    assert group(5, 5) == ELEMENTS
    assert group(5, 6) == OBLONG
    assert len(subgroups(ELEMENTS)) == 10
    assert len(subgroups(OBLONG)) == 5
    assert ("identity", "rot180", "rot90", "rot270") in subgroups(ELEMENTS)
    assert ("identity", "flip_lr", "rot90") not in subgroups(ELEMENTS)


@pytest.mark.parametrize("subgroup", subgroups(ELEMENTS))
def test_elements_share_a_label_exactly_where_they_make_the_same_images(subgroup):
    labels = cosets(ELEMENTS, subgroup)
    assert max(labels) + 1 == len(ELEMENTS) / len(subgroup)
    assert {g for g, label in zip(ELEMENTS, labels, strict=True) if label == 0} == set(subgroup)
    x = torch.randn(1, 5, 5)

    def made(element: str) -> set[bytes]:  # what turning a distribution that `subgroup` leaves alone makes of an image
        return {apply(apply(x, h), element).contiguous().numpy().tobytes() for h in subgroup}

    for g, a in zip(ELEMENTS, labels, strict=True):
        for h, b in zip(ELEMENTS, labels, strict=True):
            assert (made(g) == made(h)) == (a == b)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_holm_is_its_textbook_self():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def judged(visible: float = 0.6, **p: float) -> dict:
    tests = ("flip_lr", "flip_ud", "rot180", "rot90", "transpose", "antitranspose")
    return judge({g: Paired(1000, p.get(g, 0.5), visible) for g in tests}, ELEMENTS)


def test_what_is_allowed_is_a_group():
    assert judged()["allowed"] == list(ELEMENTS)
    broken = dict.fromkeys(("rot90", "transpose", "antitranspose"), 0.0005)
    assert judged(**broken)["allowed"] == list(OBLONG)
    # Two mirrors make a turn: when that is broken, the better of the two stays.
    found = judged(**broken, rot180=0.0005, flip_lr=0.3, flip_ud=0.4)
    assert found["allowed"] == ["identity", "flip_ud"]
    assert {g: row["verdict"] for g, row in found["tests"].items()} == {
        "flip_lr": "left out", "flip_ud": "allowed", "rot180": "broken", "rot90": "broken", "rot270": "broken",
        "transpose": "broken", "antitranspose": "broken",
    }  # fmt: skip
    # A quarter turn done twice is a half turn.
    assert "rot90" not in judged(rot180=0.0005)["allowed"]


def test_no_evidence_from_few_images_allows_nothing():
    found = judged(visible=0.9, transpose=0.0005)
    assert found["allowed"] == ["identity"]
    assert {row["verdict"] for row in found["tests"].values()} == {"too few", "broken"}


@pytest.mark.slow
@pytest.mark.parametrize("subgroup", [("identity", "flip_ud"), OBLONG, ELEMENTS], ids=len)
def test_the_symmetries_of_images_are_found(tmp_path, subgroup):
    report = symmetries(write(tmp_path / "d", blobs(900, 0, subgroup)), 600)
    assert report["n"] == 600
    assert tuple(report["allowed"]) == subgroup
    assert all(row["p"] <= 0.0005 for g, row in report["tests"].items() if g not in subgroup)


def test_oblong_images_have_no_quarter_turns(tmp_path):
    report = symmetries(write(tmp_path / "d", blobs(900, 1, ("identity", "flip_lr"), (20, 26))), 600)
    assert list(report["tests"]) == ["flip_lr", "flip_ud", "rot180"]
    assert report["allowed"] == ["identity", "flip_lr"]


def test_copies_are_no_evidence(tmp_path):
    one = blobs(10, 2, ELEMENTS)
    report = symmetries(write(tmp_path / "d", one.repeat(120, 1, 1, 1)))
    assert report["n"] <= 10
    assert report["allowed"] == ["identity"]
    assert "too few images" in main_symmetries(tmp_path / "d")


# --- symmetries.json --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LensImages:
    return write(tmp_path_factory.mktemp("data") / "d", blobs(60, 3))


def save(images: LensImages, **changes: object) -> Path:
    path = images.path / FILE
    path.write_text(json.dumps({"format": 1, "data": images.fingerprint, "allowed": ["identity", "rot180"], **changes}))
    return path


def test_the_answer_is_kept_beside_the_images(small):
    text = main_symmetries(small.path, seed=3)
    kept = json.loads((small.path / FILE).read_text())
    assert kept == symmetries(small, seed=3)
    assert allowed(small) == tuple(kept["allowed"])
    assert str(small.path / FILE) in text
    assert f"n = {kept['n']}" in text


def test_what_training_draws_from(small, capsys):
    save(small)
    assert turns(small, "symmetries") == (("identity", "rot180"), [0, 0], [0.5, 0.5], {FILE: "identity+rot180"})
    labelled = turns(small, "labelled")
    assert (labelled.elements, max(labelled.labels), labelled.fingerprint) == (ELEMENTS, 3, {FILE: "identity+rot180"})
    assert labelled.chances == [1 / 4, 1 / 12, 1 / 12, 1 / 4, *[1 / 12] * 4]  # half of the images as they are
    assert turns(small, "none") == (("identity",), [0], [1.0], {})
    assert "no symmetries.json" not in capsys.readouterr().out
    save(small, allowed=["identity"])
    assert turns(small, "symmetries") == (("identity",), [0], [1.0], {})
    save(small, allowed=list(ELEMENTS))
    assert turns(small, "labelled") == turns(small, "symmetries")  # nothing left to tell apart
    assert turns(small, "labelled").chances == [1 / 8] * 8
    (small.path / FILE).unlink()
    assert turns(small, "symmetries") == (("identity",), [0], [1.0], {})
    assert "lens-ldm inspect" in capsys.readouterr().out
    assert turns(small, "labelled")[:2] == (ELEMENTS, list(range(8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "0123"}, "made from other images"),
        ({"format": 9}, "not one that this version has written"),
        ({"allowed": ["identity", "flip_lr", "rot90"]}, "not one that this version"),
        ({"allowed": 3}, "cannot be read"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(small, changes, message):
    path = save(small, **changes)
    with pytest.raises(UserError, match=message):
        turns(small, "symmetries")
    path.write_text('{"format": 1')
    with pytest.raises(UserError, match=r"cannot be read.*inspect .* --symmetries"):
        allowed(small)
    assert turns(small, "none")[0] == ("identity",)
    path.unlink()
