"""The training step of stage 1, in whatever units the data are."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.checkpoint import read_config
from shared.config import load_config, to_dict
from shared.data.cache import CacheWriter, LensImages
from shared.data.normalise import Normalisation
from shared.data.symmetries import turns
from shared.errors import UserError
from shared.registry import build
from shared.schema import Stage1
from stage1_vqvae.module import VQVAEModule
from stage1_vqvae.pipeline import train

SKY, NOISE = 100.0, 5.0  # counts


def lights(count: int) -> np.ndarray:
    """Blobs of 2000 counts on a sky, without noise, (count, 1, 30, 30)."""
    rng = np.random.default_rng(0)
    axis = np.arange(30) - 14.5
    centre = rng.uniform(-5, 5, (count, 2, 1, 1))
    return (SKY + 2000 * np.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / 60))[:, None]


def prepared(folder: Path, images: np.ndarray, normalise: str = "none") -> Path:
    writer = CacheWriter(
        folder, len(images), images.shape[1:], {"kind": "test"}, normalise=Normalisation.parse(normalise)
    )
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    writer.finish()
    return folder


def noisy(clean: np.ndarray) -> np.ndarray:
    return (clean + NOISE * np.random.default_rng(1).standard_normal(clean.shape)).astype(np.float32)


def config(data: Path, **blocks: object) -> Stage1:
    autoencoder = {
        "widths": [8, 8],
        "decoder_blocks": 1,
        "quantizer": {"name": "none"},
        "predict_variance": bool(blocks),
    }
    base = {"name": "run", "output": str(data.parent), "data": {"path": str(data)}, "autoencoder": autoencoder}
    return load_config(Stage1, [], {**base, **blocks})


def module(data: Path) -> VQVAEModule:
    images, spec = LensImages(data), to_dict(config(data))["autoencoder"]
    network = build("autoencoder", spec, image_shape=images.image_shape, transform=images.transform)
    module = VQVAEModule(config(data), network, images, turns(images, "none"))
    module._trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    return module


def test_a_data_set_that_was_spoiled_is_told_before_it_is_trained_on(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", noisy(lights(100)))
    pixels = np.lib.format.open_memmap(data / "images.npy", mode="r+")
    pixels[LensImages(data).split("train")[3], 0, 4, 4] = np.nan
    pixels.flush()
    with pytest.raises(UserError, match=r"data holds pixels that are NaN or infinite: delete the folder and prepare"):
        module(data)


def test_images_that_come_class_by_class_are_judged_by_all_of_them(tmp_path: Path) -> None:
    clean = lights(1200)
    noise = (
        np.random.default_rng(1).standard_normal(clean.shape)
        * np.where(np.arange(1200) < 600, 1, 9)[:, None, None, None]
    )
    step = module(prepared(tmp_path / "data", (clean + noise).astype(np.float32)))
    span = float(step.network.transform.span)
    assert float(step.criterion.law.a.sqrt()) * span > 3  # that of the first half alone is 1


def test_each_band_is_published_with_the_noise_it_has(tmp_path: Path) -> None:
    clean, deviations = lights(200), np.array([NOISE, 6 * NOISE])[:, None, None]
    images = clean + deviations * np.random.default_rng(1).standard_normal((200, 2, 30, 30))
    data = prepared(tmp_path / "data", images.astype(np.float32))
    trainer = {"max_steps": 2, "accelerator": "cpu", "precision": "fp32", "progress": False}
    published = train(config(data, loss={"likelihood": 0.05}, trainer=trainer, logger={"wandb": "disabled"}))
    law = read_config(published)["metrics"]["noise"]
    assert law["a"] == pytest.approx([NOISE**2, 36 * NOISE**2], rel=0.1)
    assert law["background"] == pytest.approx([SKY, SKY], abs=3 * NOISE)


def test_images_that_are_too_small_are_told(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "data", 100, (1, 5, 9), {"kind": "test"}, normalise=Normalisation.parse("none"))
    for chunk in writer.pending():
        writer.write(chunk, np.random.default_rng(0).random((len(chunk), 1, 5, 9), np.float32))
    writer.finish()
    with pytest.raises(UserError, match="images of 5 × 9 pixels: an autoencoder needs 6 on each side"):
        train(config(tmp_path / "data"))


@pytest.mark.parametrize("normalise", ["none", "fixed:-1000,65535", "asinh:5"])
def test_images_are_recorrupted_with_their_own_noise_whatever_their_units(tmp_path: Path, normalise: str) -> None:
    clean = lights(200)
    step = module(prepared(tmp_path / "data", noisy(clean), normalise))
    seen: list[Tensor] = []
    step.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    step.criterion.register_forward_pre_hook(lambda _, given: seen.append(2 * given[1] - 1))
    torch.manual_seed(0)
    step.loss(torch.from_numpy(noisy(clean)))
    given, target = (step.network.transform.inverse(x.double()) - torch.from_numpy(clean) for x in seen)
    assert float(given.var()) == pytest.approx(2 * NOISE**2, rel=0.1)
    assert float(target.var()) == pytest.approx(2 * NOISE**2, rel=0.1)
    assert float((given * target).mean()) == pytest.approx(0, abs=0.1 * NOISE**2)


@pytest.mark.parametrize("normalise", ["fixed:-1000,65535", "asinh:5"])
def test_what_a_decoder_says_is_published_beside_the_law_in_the_datas_units(tmp_path: Path, normalise: str) -> None:
    data = prepared(tmp_path / "data", noisy(lights(200)), normalise)
    trainer = {"max_steps": 2, "accelerator": "cpu", "precision": "fp32", "progress": False}
    published = train(config(data, loss={"likelihood": 0.05}, trainer=trainer, logger={"wandb": "disabled"}))
    law = read_config(published)["metrics"]["noise"]
    assert law["a"] == pytest.approx(NOISE**2, rel=0.1)
    assert law["background"] == pytest.approx(SKY, abs=3 * NOISE)
