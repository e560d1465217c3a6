"""The Fréchet distance: closed forms, an independent implementation, and no network without being asked."""

import json
import pickle
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.files import sha256
from shared.metrics import fid
from shared.metrics.fid import features, frechet_distance, inception, score, to_uint8


class Statistics(nn.Module):
    """A network for tests: mean, spread and corner of each image."""

    metric = "fd_test"
    extractor = "statistics"
    resizer = "none"

    def forward(self, images: Tensor) -> Tensor:
        x = images.float().flatten(1)
        return torch.stack([x.mean(1), x.std(1), x[:, 0]], 1)


def gaussian(n: int, d: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (n, d)) @ rng.normal(0, 1, (d, d)) / np.sqrt(d) + rng.normal(0, 1, d)


def by_the_formula(a: np.ndarray, b: np.ndarray) -> float:
    """The d x d formula, with the symmetric root: tr (A B)^½ = tr (A^½ B A^½)^½."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.mark.parametrize(
    ("pixel", "value_range", "expected"),
    [
        (0.999, (0, 1), 255),
        (1.01, (0, 1), 255),
        (-0.01, (0, 1), 0),
        (0.5 / 255 + 1e-4, (0, 1), 1),
        (0.5 / 255 - 1e-4, (0, 1), 0),
        (0.0, (-1, 1), 128),  # 127.5 to the even neighbour
        (2.0, (0, 4), 128),
        (-1.0, (-1, 1), 0),
        (200.0, (0, 255), 200),
    ],
)
def test_pixels_are_clamped_and_rounded(pixel, value_range, expected):
    assert to_uint8(torch.tensor([pixel]), value_range).tolist() == [expected]


def test_bytes_survive_the_way_to_floats_and_back():
    every = torch.arange(256)
    assert torch.equal(to_uint8(every.float() / 255, (0, 1)), every.byte())
    assert torch.equal(to_uint8(every.float() / 255 * 2 - 1, (-1, 1)), every.byte())


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(UserError, match="low < high"):
        to_uint8(torch.zeros(1), (1, 0))


@pytest.mark.parametrize("n", [20, 200])
def test_the_distance_has_its_closed_forms(n):
    a = gaussian(n, 50, 0)
    shift = np.random.default_rng(1).normal(0, 1, 50)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, np.concatenate([a, a])[np.random.default_rng(0).permutation(2 * n)]) < 1e-3 * n
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum())
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * np.trace(np.cov(a.T)))
    assert frechet_distance(a, 3 * centred) == pytest.approx(frechet_distance(3 * centred, a))


def test_gaussians_with_commuting_covariances_have_the_distance_of_their_widths():
    x = gaussian(300, 6, 0) - gaussian(300, 6, 0).mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    widths_a, widths_b = np.arange(1, 7), np.array([3, 1, 4, 1, 5, 9])
    assert frechet_distance(white * widths_a, white * widths_b) == pytest.approx(((widths_a - widths_b) ** 2).sum())


@pytest.mark.parametrize(("n_a", "n_b"), [(30, 30), (30, 25), (200, 150), (30, 200), (200, 30), (2, 2)])
def test_few_images_or_many_the_distance_is_that_of_the_formula(n_a, n_b):
    a, b = gaussian(n_a, 60, 0), gaussian(n_b, 60, 1, 1.5)
    assert frechet_distance(a, b) == pytest.approx(by_the_formula(a, b), rel=1e-6)


def test_torchmetrics_finds_the_same_distance():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(nn.Module):
        num_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    a, b = gaussian(120, 16, 0), gaussian(90, 16, 1)
    theirs = FrechetInceptionDistance(feature=Identity(), normalize=True)
    theirs.update(torch.from_numpy(a)[:, None, None], real=True)
    theirs.update(torch.from_numpy(b)[:, None, None], real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "N >= 2"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "two matrices"),
        (np.zeros(5), np.zeros(5), "two matrices"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "finite"),
        (np.full((5, 3), np.inf), np.zeros((5, 3)), "finite"),
    ],
)
def test_features_that_have_no_distance_are_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)


def test_features_do_not_depend_on_how_the_images_arrive(tmp_path):
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (23, 1, 5, 7)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    done: list[int] = []
    found = features(Statistics(), images, (-1, 1), batch_size=10, progress=done.append)
    assert found.shape == (23, 3)
    assert found.dtype == np.float64
    assert done == [10, 10, 3]
    assert found[:, 2].tolist() == np.rint((images[:, 0, 0, 0].clip(-1, 1) + 1) / 2 * 255).tolist()
    tensor = torch.from_numpy(images)
    memmap = np.load(tmp_path / "images.npy", mmap_mode="r")
    for other in (tensor, memmap, iter(tensor.split(7)), [images[:20], images[20:]], images.astype(np.float64)):
        np.testing.assert_array_equal(features(Statistics(), other, (-1, 1)), found)


def test_features_are_not_taken_in_half_precision():
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).requires_grad_(False)
    network.register_forward_pre_hook(lambda _, args: args[0].float())
    images = torch.rand(3, 1, 3, 3)
    expected = features(network, images, (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(features(network, images, (0, 1)), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 8, 8), r"\(N, C, H, W\), got the shape \(4, 8, 8\)"),
        (np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), np.nan)]), "images 0 to 1 hold NaN"),
        (torch.full((1, 1, 2, 2), torch.inf), "infinite"),
        ([], "no images"),
        (torch.zeros(0, 1, 8, 8), "no images"),
    ],
)
def test_images_without_features_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        features(Statistics(), images, (0, 1))


def test_real_images_score_about_the_floor_and_others_above_it():
    real = np.random.default_rng(1).normal(0, 1, (600, 20))
    a, b, fresh = real[:200], real[200:400], real[400:]
    scores = score(a, b, {"fresh": fresh, "shifted": fresh + 0.5}, Statistics(), (0, 1))
    found, shifted = scores["fresh"], scores["shifted"]
    assert found.distance == frechet_distance(a, fresh)
    assert found.floor == pytest.approx(1.25, abs=0.2)  # 1.25 ± 0.13 over 300 draws of two such sets
    assert 0.02 < found.floor_sd < 0.4
    assert found.excess == found.distance - found.floor == pytest.approx(0, abs=0.5)
    assert shifted.excess == pytest.approx(20 * 0.5**2, rel=0.1)
    assert (found.n, found.n_reference, found.metric) == (200, 200, "fd_test")


def test_the_floor_is_that_of_as_many_images_as_are_compared():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (420, 10))
    found = score(real[:400], real[400:], {"x": real[:20]}, Statistics(), (0, 1), splits=20)["x"]
    drawn = [frechet_distance(rng.normal(0, 1, (400, 10)), rng.normal(0, 1, (20, 10))) for _ in range(100)]
    assert found.floor == pytest.approx(np.mean(drawn), rel=0.15)


def test_a_score_can_be_kept_and_read():
    x = gaussian(60, 4, 0)
    found = score(x[:30], x[30:50], {"x": x[:20]}, Statistics(), (0.0, 1.0))["x"]
    assert score(x[:30], x[30:50], {"x": x[:20]}, Statistics(), (0.0, 1.0))["x"] == found
    kept = json.loads(json.dumps(found.to_dict()))
    assert fid.Score(**{**kept, "value_range": tuple(kept["value_range"])}) == found
    assert str(found).startswith(
        f"fd_test {found.distance:.2f}, floor {found.floor:.2f} ± {found.floor_sd:.2f}, excess "
    )
    assert str(found).endswith("(20 against 30 images; statistics; none; range 0 to 1)")


def test_a_score_says_how_brightness_became_grey():
    x = gaussian(60, 4, 0)
    found = score(x[:30], x[30:50], {"x": x[:20]}, Statistics(), (0.0, 9e4), stretch="asinh, scale 5 about 100")["x"]
    assert found.to_dict()["stretch"] == "asinh, scale 5 about 100"
    assert str(found).endswith("range 0 to 90000, asinh, scale 5 about 100)")


def test_a_score_of_another_number_of_images_is_refused():
    x = gaussian(60, 4, 0)
    with pytest.raises(UserError, match="unet has 10 images and the floor 20"):
        score(x[:40], x[40:], {"unet": x[:10]}, Statistics(), (0, 1))


def test_inception_without_its_weights_names_the_remedies_and_no_other_network(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    default = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError) as caught:
        inception()
    for remedy in (str(default), "--inception-weights PATH", "--download"):
        assert remedy in str(caught.value)
    with pytest.raises(UserError, match=r"none at .*elsewhere\.pth"):
        inception(tmp_path / "elsewhere.pth")
    default.parent.mkdir(parents=True)
    default.write_bytes(b"found there")
    with pytest.raises(UserError, match="is not the network of FID"):
        inception()


def test_other_weights_than_inceptions_are_refused_unread(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded before the hash was checked"))
    (tmp_path / "weights.pth").write_bytes(b"torchvision's Inception")
    digest = sha256(tmp_path / "weights.pth")[:8]
    with pytest.raises(UserError, match=f"weights.pth is not the network of FID: sha256 {digest}, expected 6726825d"):
        inception(tmp_path / "weights.pth")


def test_nothing_in_the_weights_is_executed(tmp_path, monkeypatch):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Planted(), protocol=2))
    monkeypatch.setattr(fid, "INCEPTION_SHA256", sha256(tmp_path / "weights.pth")[:8])
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        inception(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


def test_without_torch_fidelity_inception_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(fid, "INCEPTION_SHA256", sha256(tmp_path / "weights.pth")[:8])
    with pytest.raises(UserError, match=r"needs torch-fidelity.*pip install 'torchmetrics\[image\]'"):
        inception(tmp_path / "weights.pth")


def test_weights_are_fetched_on_request_only_and_checked(tmp_path, monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.URL_INCEPTION_V3 = "https://example.org/inception.pth"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    asked: list[tuple] = []

    def unreachable(url: str, path: str, hash_prefix: str) -> None:
        asked.append((url, path, hash_prefix))
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    weights = tmp_path / "new" / "weights.pth"
    with pytest.raises(UserError, match="there are none at"):
        inception(weights)
    assert not asked
    with pytest.raises(UserError, match=r"could not be fetched \(no route to host\)"):
        inception(weights, download=True)
    assert asked == [("https://example.org/inception.pth", str(weights), "6726825d")]


def test_logits_follow_from_features(tmp_path, monkeypatch):
    class Stub(nn.Module):
        def __init__(self, *_, **__):
            super().__init__()
            self.fc = nn.Linear(2048, 1008)

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stub)
    torch.save({}, tmp_path / "weights.pth")
    network = fid.Inception(tmp_path / "weights.pth")
    x = gaussian(3, 2048, 0).astype(np.float32)
    expected = network.network.fc(torch.from_numpy(x)) - network.network.fc.bias
    np.testing.assert_allclose(network.logits(x), expected.detach().numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_network_of_fid_is_the_one_of_torchmetrics(tmp_path, monkeypatch, no_network):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # the weights are not ours to ship: random ones, of the right shape
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        state = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for name, weight in state.items():
        if weight.ndim == 4:  # He et al. 2015: the images still count after ninety layers
            state[name] = torch.randn_like(weight) * (2 / weight[0].numel()) ** 0.5
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    monkeypatch.setattr(fid, "INCEPTION_SHA256", sha256(path)[:8])
    network = inception(path)
    images = torch.rand(6, 1, 150, 150)
    a, b = features(network, images[:3], (0, 1)), features(network, images[3:] ** 2, (0, 1))
    assert a.shape == (3, network.num_features)
    assert frechet_distance(a, b) > 1e-3
    classifier = NoTrainInceptionV3("inception-v3-compat", ["logits_unbiased"], str(path), antialias=False)
    logits = classifier(to_uint8(images[:3], (0, 1)).repeat(1, 3, 1, 1))
    np.testing.assert_allclose(network.logits(a), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))

    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path), antialias=False)
    theirs.update(to_uint8(images[:3], (0, 1)).repeat(1, 3, 1, 1), real=True)
    theirs.update(to_uint8(images[3:] ** 2, (0, 1)).repeat(1, 3, 1, 1), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-3)
