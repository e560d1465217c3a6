"""The training step of stage 1, in whatever units the data are."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import load_config, to_dict
from shared.data.cache import CacheWriter, LensImages
from shared.data.normalise import Normalisation
from shared.data.symmetries import turns
from shared.errors import UserError
from shared.registry import build
from shared.schema import Stage1
from stage1_vqvae.module import VQVAEModule

SKY, NOISE = 100.0, 5.0  # counts


def lights(count: int) -> np.ndarray:
    """Blobs of 2000 counts on a sky, without noise, (count, 1, 30, 30)."""
    rng = np.random.default_rng(0)
    axis = np.arange(30) - 14.5
    centre = rng.uniform(-5, 5, (count, 2, 1, 1))
    return (SKY + 2000 * np.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / 60))[:, None]


def module_of(folder: Path, normalise: str, images: np.ndarray) -> VQVAEModule:
    writer = CacheWriter(folder, len(images), (1, 30, 30), {"kind": "test"}, normalise=Normalisation.parse(normalise))
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    writer.finish()
    return module_on(folder)


def module_on(folder: Path) -> VQVAEModule:
    data = LensImages(folder)
    config = load_config(Stage1, [], {
        "name": "run", "data": {"path": str(folder)},
        "autoencoder": {"widths": [8, 8], "decoder_blocks": 1, "quantizer": {"name": "none"}},
    })  # fmt: skip
    spec = to_dict(config)["autoencoder"]
    network = build("autoencoder", spec, image_shape=data.image_shape, transform=data.transform)
    module = VQVAEModule(config, network, data, turns(data, "none"))
    module._trainer = SimpleNamespace(global_step=0)  # type: ignore[assignment]
    return module


def test_a_data_set_that_was_spoiled_is_told_before_it_is_trained_on(tmp_path: Path) -> None:
    module_of(tmp_path / "data", "none", lights(100).astype(np.float32))
    pixels = np.lib.format.open_memmap(tmp_path / "data" / "images.npy", mode="r+")
    pixels[LensImages(tmp_path / "data").split("train")[3], 0, 4, 4] = np.nan
    pixels.flush()
    with pytest.raises(UserError, match=r"data holds pixels that are NaN or infinite: delete the folder and prepare"):
        module_on(tmp_path / "data")


@pytest.mark.parametrize("normalise", ["none", "fixed:-1000,65535", "asinh:5"])
def test_images_are_recorrupted_with_their_own_noise_whatever_their_units(tmp_path: Path, normalise: str) -> None:
    clean = lights(200)
    noisy = (clean + NOISE * np.random.default_rng(1).standard_normal(clean.shape)).astype(np.float32)
    module = module_of(tmp_path / "data", normalise, noisy)
    network, transform = module.network, module.network.transform
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module.criterion.register_forward_pre_hook(lambda _, given: seen.append(2 * given[1] - 1))
    torch.manual_seed(0)
    module.loss(torch.from_numpy(noisy))
    given, target = (transform.inverse(x.double()) - torch.from_numpy(clean) for x in seen)
    assert float(given.var()) == pytest.approx(2 * NOISE**2, rel=0.1)
    assert float(target.var()) == pytest.approx(2 * NOISE**2, rel=0.1)
    assert float((given * target).mean()) == pytest.approx(0, abs=0.1 * NOISE**2)
