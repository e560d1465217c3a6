"""Measurements in chunks: what was kept is not made again, and nothing kept is taken for what it is not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.evaluation.files import of_files
from shared.evaluation.measure import BATCH, CHUNK, ImageSet, Measure, Measured, measure, of_data, of_tensor, remembered
from shared.evaluation.protocols import PROTOCOLS, Protocol, chosen, clip, crop, lanczos, min_max, resize
from shared.evaluation.reference import halves
from shared.evaluation.scores import compare, under_protocol
from shared.metrics import physics
from tests.blobs import blobs

N = CHUNK + 20


class Means:
    """A network that sees means over 4 x 4 blocks."""

    metric, extractor, resizer = "fd_test", "means", "none"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 4).flatten(1)


class Counted:
    def __init__(self, images: Tensor) -> None:
        self.images, self.drawn = images, 0

    def __call__(self, places: np.ndarray) -> Tensor:
        self.drawn += len(places)
        return self.images[torch.from_numpy(places)]


def mean_of(identity: str = "1") -> Measure:
    return Measure("mean", identity, lambda images: {"mean": images.mean((1, 2, 3)).numpy()})


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    images = torch.rand(N, 1, 6, 5)
    get = Counted(images)
    one = ImageSet("a", N, get, tmp_path)
    expected = images.mean((1, 2, 3)).numpy()
    np.testing.assert_array_equal(measure(one, [mean_of()])["mean"]["mean"], expected)
    assert get.drawn == N
    np.testing.assert_array_equal(measure(one, [mean_of()])["mean"]["mean"], expected)
    assert get.drawn == N
    # Another code, another set, a part of the set: nothing that is kept is theirs.
    measure(one, [mean_of("2")])
    assert get.drawn == 2 * N
    measure(ImageSet("b", N, get, tmp_path), [mean_of()])
    assert get.drawn == 3 * N
    part = one.subset(np.array([5, 3]))
    np.testing.assert_array_equal(measure(part, [mean_of()])["mean"]["mean"], expected[[5, 3]])
    changed = one.changed("doubled", lambda x, places: 2 * x)
    np.testing.assert_allclose(measure(changed, [mean_of()])["mean"]["mean"], 2 * expected, rtol=1e-6)


def test_a_stop_loses_a_chunk_and_half_a_file_is_made_again(tmp_path: Path) -> None:
    images = torch.rand(N, 1, 6, 5)

    def stops(places: np.ndarray) -> Tensor:
        if places[0] >= CHUNK:
            raise KeyboardInterrupt
        return images[torch.from_numpy(places)]

    with pytest.raises(KeyboardInterrupt):
        measure(ImageSet("a", N, stops, tmp_path), [mean_of()])
    get = Counted(images)
    measure(ImageSet("a", N, get, tmp_path), [mean_of()])
    assert get.drawn == N - CHUNK
    (file,) = tmp_path.rglob(f"*-0-{CHUNK}.npz")
    file.write_bytes(file.read_bytes()[:100])
    found = measure(ImageSet("a", N, get, tmp_path), [mean_of()])["mean"]["mean"]
    np.testing.assert_array_equal(found, images.mean((1, 2, 3)).numpy())
    assert get.drawn == N


def test_images_are_drawn_once(tmp_path: Path) -> None:
    images = torch.rand(N, 1, 6, 5)
    get = Counted(images)
    one = ImageSet("a", N, get, tmp_path).stored()
    for places in (np.arange(N), np.array([N - 1, 3, 3]), np.arange(7)):
        assert torch.equal(one.get(places), images[torch.from_numpy(places)])
    assert get.drawn == N
    measure(one, [mean_of()])
    one.forget()
    measure(one, [mean_of()])  # what was measured stays
    assert get.drawn == N
    one.get(np.array([0]))
    assert get.drawn == N + BATCH


def test_answers_are_remembered_by_images_and_question(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, float]:
        made.append(1)
        return {"x": 0.1, "of": float(len(made))}

    one, other = (ImageSet(key, 3, lambda places: torch.rand(len(places)), tmp_path) for key in "ab")
    assert remembered(one, "what", make) == remembered(one, "what", make) == {"x": 0.1, "of": 1.0}
    assert remembered(one, "else", make)["of"] == 2
    assert remembered(other, "what", make)["of"] == 3


def test_what_cannot_be_kept_is_made_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    images = torch.rand(N, 1, 6, 5)
    found = measure(ImageSet("a", N, Counted(images), tmp_path / "file"), [mean_of()])["mean"]["mean"]
    np.testing.assert_array_equal(found, images.mean((1, 2, 3)).numpy())
    assert capsys.readouterr().err.count("are not kept") == 1


def test_nan_is_told_with_its_place() -> None:
    images = torch.rand(N, 1, 6, 5)
    images[CHUNK + 7, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=f"image {CHUNK + 7} of .* holds NaN"):
        measure(of_tensor(images), [mean_of()])


def test_a_set_that_was_measured_whole_or_in_parts_has_the_same_scores() -> None:
    images, transform = torch.rand(60, 1, 12, 12), PixelTransform(0.0, 1.0)
    whole = Measured.of(of_tensor(images), [Means()], transform)
    parts = Measured([Means()], transform)
    for batch in images.split(7):
        parts.add(batch)
    assert len(whole) == len(parts) == 60
    np.testing.assert_allclose(whole.features["fd_test"], parts.features["fd_test"])
    np.testing.assert_allclose(whole.summaries["flux"], images.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() == images.numel()
    k, power = physics.radial_power_spectrum(images)
    np.testing.assert_allclose(whole.k, k)
    np.testing.assert_allclose(whole.power, power)
    halves = [Measured.of(of_tensor(part), [Means()], transform) for part in images.split(30)]
    scores = compare(*halves, {"same": halves[0], "other": halves[1]})["distances"]["fd_test"]
    assert scores["same"]["distance"] == pytest.approx(0, abs=1e-9)
    assert scores["other"]["distance"] > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LensImages:
    return LensImages(blobs(tmp_path_factory.mktemp("data") / "blobs"))


def test_views_of_protocols() -> None:
    images = torch.rand(3, 1, 20, 20)
    assert torch.equal(crop(images, 10), images[..., 5:15, 5:15])
    flat = torch.full((2, 1, 20, 20), 0.3)
    for shrink in (resize, lanczos):
        torch.testing.assert_close(shrink(flat, 8), flat[..., :8, :8], atol=1e-6, rtol=0)
    assert lanczos(images, 9).shape == (3, 1, 9, 9)
    diverged = torch.cat([images, 40 * images])
    seen = min_max(diverged)
    torch.testing.assert_close(seen[:3], seen[3:])  # what it hides
    assert float(seen.amin()) == 0
    assert float(seen.amax()) == 1
    shown = clip(torch.arange(101.0).reshape(1, 1, 101, 1))[0, 0, :, 0]
    torch.testing.assert_close(shown[[0, 1, 50, 99, 100]], torch.tensor([0, 0, 0.5, 1, 1]))


def test_a_protocol_compares_as_it_says(data: LensImages) -> None:
    n = 8
    protocol = Protocol("small", "", n, "train", lambda x: resize(x, 10))
    near, far = protocol.sets(data)
    train, test = (data.batch(data.split(name)) for name in ("train", "test"))

    def within(images: ImageSet, pool: Tensor) -> bool:
        return all(any(torch.equal(one, other) for other in pool) for one in images.first(n))

    assert within(near, train)
    assert within(far, test)
    held_out = Protocol("held", "", n, "held-out", lambda x: x)
    sets = [one.first(n) for one in held_out.sets(data)]
    assert all(within(of_tensor(one), test) for one in sets)
    assert not any(torch.equal(one, other) for one in sets[0] for other in sets[1])
    # Reconstructions are those of the other half, which must not be what they are compared with.
    native, other_half = (data.batch(half) for half in halves(data, len(test) // 2))
    assert all(any(torch.equal(one, other) for other in native) for one in sets[0])
    assert not any(torch.equal(one, other) for one in sets[0] for other in other_half)
    scored = under_protocol(protocol, data, {"samples": near, "other": of_tensor(1 - near.first(n))}, [Means()])
    found = scored["distances"]["fd_test"]
    assert found["samples"]["distance"] == pytest.approx(0, abs=1e-9)
    assert found["samples"]["floor"] > 0
    assert found["other"]["excess"] > 100 * found["other"]["floor_sd"]
    assert found["samples"]["n"] == scored["n"] == n


def test_protocols_are_chosen_by_name(data: LensImages, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen([], data, 100) == []
    assert chosen(["all", "native150"], data, 10_000) == []
    assert capsys.readouterr().out.count("left out:") == len(PROTOCOLS)
    with pytest.raises(UserError, match="28px-100 needs 100 samples, these are 99"):
        chosen(["28px-100"], data, 99)
    with pytest.raises(UserError, match="for images of 128 pixels"):
        chosen(["crop128-2500-train"], data, 10_000)
    with pytest.raises(UserError, match="no protocol 'crop': choose from native150, crop128-2500-train"):
        chosen(["crop"], data, 100)


def test_samples_of_others(tmp_path: Path, data: LensImages) -> None:
    images = data.batch(np.arange(12)).numpy()
    np.save(tmp_path / "samples.npy", images)
    read = of_files(tmp_path / "samples.npy", data)
    assert len(read) == 12
    np.testing.assert_array_equal(read.get(np.array([7, 2])).numpy(), images[[7, 2]])
    np.save(tmp_path / "bytes.npy", (images * 255).round())
    with pytest.raises(UserError, match="other units; say by --sample-range LOW,HIGH"):
        of_files(tmp_path / "bytes.npy", data)
    low, high = data.value_range
    span = (low * 255, high * 255)
    np.testing.assert_allclose(of_files(tmp_path / "bytes.npy", data, span).first(12), images, atol=0.003)
    np.save(tmp_path / "centred.npy", 2 * images - 1)  # of the same width, or nearly
    with pytest.raises(UserError, match="other units"):
        of_files(tmp_path / "centred.npy", data)
    np.save(tmp_path / "grey.npy", images.repeat(3, 1))
    np.testing.assert_array_equal(of_files(tmp_path / "grey.npy", data).first(12), images)
    coloured = images.repeat(3, 1)
    coloured[:, 1] *= 0.9
    np.save(tmp_path / "coloured.npy", coloured)
    with pytest.raises(UserError, match="in colour"):
        of_files(tmp_path / "coloured.npy", data)
    np.save(tmp_path / "small.npy", images[:, :, :20])
    with pytest.raises(UserError, match=r"has images \(1, 20, 30\), .* has \(1, 30, 30\)"):
        of_files(tmp_path / "small.npy", data)
    damaged = images.copy()
    damaged[5, 0, 3, 3] = np.nan
    np.save(tmp_path / "nan.npy", damaged)
    with pytest.raises(UserError, match="1 pixels that are NaN"):
        of_files(tmp_path / "nan.npy", data).first(12)


def test_measurements_of_real_images_are_kept_beside_them(tmp_path: Path) -> None:
    images = LensImages(blobs(tmp_path / "blobs"))
    measure(of_data(images, np.arange(5)), [mean_of()])
    assert list((tmp_path / "blobs" / "measured").rglob("*.npz"))
    assert len(LensImages(tmp_path / "blobs")) == len(images)
