"""Codes over a run: told when they collapse in stage 1, untouched by stage 2."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stage1_vqvae.module
import stage1_vqvae.pipeline
import stage1_vqvae.vqvae
import stage2_diffusion.pipeline
from shared.autoencoder import Autoencoder
from shared.checkpoint import autoencoder_config, load, load_autoencoder, publish
from shared.config import load_config
from shared.data.cache import LensImages
from shared.registry import build
from shared.schema import Stage1, Stage2
from stage2_diffusion.module import DiffusionModule

pytestmark = pytest.mark.slow

QUANTIZERS = {
    "vq": {"name": "vq", "codebook_size": 16, "kmeans_iters": 2},
    "vq-heads": {"name": "vq", "codebook_size": 8, "heads": 2, "kmeans_iters": 2},
    "simvq": {"name": "simvq", "codebook_size": 16},
    "fsq": {"name": "fsq", "levels": [5, 16, 8, 5]},
    "fsp": {"name": "fsp", "levels": [5, 16, 8, 5]},
    "kl": {"name": "kl"},
    "none": {"name": "none"},
}
AUTOENCODER = {"name": "vqvae", "widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1, "latent_channels": 4}
TRAINER = {"precision": "fp32", "accelerator": "cpu", "log_every": 3, "checkpoint_every": 50, "progress": False}


# --- stage 1 ----------------------------------------------------------------------------------------------------------


class Deaf(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return 0 * features


@pytest.mark.parametrize(
    ("name", "planted"),
    [*((name, True) for name in ("vq", "vq-heads", "simvq", "fsq", "fsp", "none")), ("vq", False), ("fsp", False)],
)
def test_a_collapse_is_told_once_and_a_healthy_run_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, planted: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(stage1_vqvae.module, "SETTLE", 5)
    if planted:
        whole = stage1_vqvae.vqvae.encoder
        monkeypatch.setattr(stage1_vqvae.vqvae, "encoder", lambda *shape: nn.Sequential(whole(*shape), Deaf()))
    spec = QUANTIZERS[name] | ({"warmup_steps": 5} if "vq" in name else {})
    config = load_config(Stage1, [], {
        "name": "run", "output": str(tmp_path), "data": {"path": str(data), "batch_size": 8},
        "autoencoder": {**AUTOENCODER, "quantizer": spec},
        "optimizer": {"warmup_steps": 3}, "trainer": {**TRAINER, "max_steps": 16, "validate_every": 4},
        "logger": {"wandb": "disabled"},
    })  # fmt: skip
    stage1_vqvae.pipeline.train(config)
    told = [line for line in capsys.readouterr().out.splitlines() if "codes collapse" in line]
    assert len(told) == (planted and name != "none")
    if told:
        first = 12 if "vq" in name else 8  # of the validations, the first after the quantiser has settled
        assert re.match(rf"run: its codes collapse: at step {first} .* uses? 1 of \d+ codes", told[0])
        assert ("threshold_ema_dead_code" in told[0]) == name.startswith("vq")
        assert "optimizer.lr" in told[0]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert ("validation/dead_codes" in rows[0]) == (name != "none")


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in everything(model).items() if not torch.equal(tensor, before[name])]


def published(data: Path, folder: Path, quantizer: dict, latents: str) -> Path:
    """An autoencoder whose codes have met images, as stage 1 publishes it."""
    images = LensImages(data)
    torch.manual_seed(0)
    spec = {**AUTOENCODER, "quantizer": quantizer, "latents": latents}
    model = build("autoencoder", spec, image_shape=images.image_shape, transform=images.transform)
    batch = images.batch(images.split("train")[:64])
    model(model.transform(batch))
    model.eval().fit_latents([batch])
    config = {"autoencoder": autoencoder_config(model, spec), "precision": "fp32"}
    publish(folder / "model", "autoencoder", config, model.state_dict(), "a test")
    return folder


@pytest.mark.parametrize(("name", "latents"), [*((name, "quantized") for name in QUANTIZERS), ("vq", "continuous")])
def test_stage_2_leaves_every_tensor_of_the_autoencoder_as_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, latents: str
) -> None:
    folder = published(data, tmp_path / "first", QUANTIZERS[name], latents)
    used: list[Autoencoder] = []
    before: list[dict[str, Tensor]] = []

    def loaded(*arguments: object) -> tuple[Autoencoder, dict]:
        model, config = load_autoencoder(*arguments)  # type: ignore[arg-type]
        used.append(model.train())  # before the latents are encoded
        before.append(everything(model))
        return model, config

    start = DiffusionModule.__init__

    def inside(self: DiffusionModule, config: object, network: object, autoencoder: Autoencoder, *rest: object) -> None:
        start(self, config, network, autoencoder, *rest)  # type: ignore[arg-type]
        self.within_reach = autoencoder  # a submodule: Lightning sets its mode as it sets that of the rest

    monkeypatch.setattr(stage2_diffusion.pipeline, "load_autoencoder", loaded)
    monkeypatch.setattr(DiffusionModule, "__init__", inside)
    monkeypatch.setattr(DiffusionModule, "on_train_batch_start", lambda self, *_: self.train())
    config = load_config(Stage2, [], {
        "name": "second", "output": str(tmp_path), "autoencoder": str(folder),
        "data": {"path": str(data), "batch_size": 8},
        "backbone": {"name": "unet", "width": 8, "blocks": 1, "heads": 1}, "sampling": {"steps": 2},
        "trainer": {**TRAINER, "max_steps": 4, "validate_every": 2}, "logger": {"wandb": "disabled"},
    })  # fmt: skip
    stage2_diffusion.pipeline.train(config)
    assert not any(module.training for module in used[0].modules())
    assert moved(used[0], before[0]) == []
    _, state = load(tmp_path / "second", "diffusion")
    first = load(folder, "autoencoder")[1]
    assert {f"autoencoder.{key}" for key in first} == {key for key in state if key.startswith("autoencoder.")}
    assert all(torch.equal(state[f"autoencoder.{key}"], tensor) for key, tensor in first.items())


def test_a_codebook_that_is_not_frozen_does_move(data: Path, tmp_path: Path) -> None:
    folder = published(data, tmp_path, QUANTIZERS["vq"], "quantized")
    images = LensImages(data)
    model, _ = load_autoencoder(str(folder), images.image_shape, images.transform)
    before, batch = everything(model), images.batch(images.split("train"))
    model.train()
    model.encode(batch)
    assert moved(model, before) == []
    model.frozen = False
    model.train()
    with torch.no_grad():
        model.encode(batch)
    assert "quantizer.vq._codebook.embed" in moved(model, before)
