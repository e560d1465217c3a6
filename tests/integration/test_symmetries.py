"""Training on turned images, through both stages: the right ones, reproducibly, and without a trace in the samples."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.checkpoint import load_autoencoder, read_config
from shared.config import load_config
from shared.data.cache import CacheWriter, LensImages
from shared.data.symmetries import ELEMENTS, FILE, Turns, apply, cosets
from shared.errors import UserError
from shared.schema import Stage1, Stage2
from shared.training import Monitor, StageModule
from stage1_vqvae import pipeline as stage1
from stage2_diffusion import pipeline as stage2
from stage2_diffusion.conditions import Conditions, one_hot
from stage2_diffusion.generator import Generator

HALF_TURN = ("identity", "rot180")
TRAINER = {"max_steps": 8, "precision": "fp32", "accelerator": "cpu", "log_every": 4, "validate_every": 8,
           "checkpoint_every": 4, "progress": False}  # fmt: skip
VQVAE = {"widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1,
         "quantizer": {"name": "vq", "codebook_size": 16, "warmup_steps": 2, "kmeans_iters": 2}}  # fmt: skip
UNET = {"name": "unet", "width": 8, "blocks": 1, "heads": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Spots to the upper left."""
    rng = np.random.default_rng(0)
    axis = np.arange(20) - 9.5
    centre = rng.uniform(-2, 2, (120, 2, 1, 1)) - np.array([2.0, 5.0])[:, None, None]
    images = np.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / 12)[:, None]
    images = (images + 0.02 * rng.standard_normal(images.shape)).clip(0, 1).astype(np.float32)
    writer = CacheWriter(tmp_path / "data", 120, (1, 20, 20), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    writer.finish()
    return tmp_path / "data"


def allow(data: Path, *elements: str) -> None:
    report = {"format": 1, "data": LensImages(data).fingerprint, "allowed": list(elements)}
    (data / FILE).write_text(json.dumps(report))


def first(data: Path, name: str = "first", augment: str = "symmetries") -> Stage1:
    return load_config(Stage1, [], {
        "name": name, "output": str(data.parent), "data": {"path": str(data), "batch_size": 8, "augment": augment},
        "autoencoder": VQVAE, "trainer": TRAINER, "logger": {"wandb": "disabled"},
    })  # fmt: skip


def second(data: Path, name: str = "second", augment: str = "symmetries", **changes: Any) -> Stage2:
    return load_config(Stage2, [], {
        "name": name, "output": str(data.parent), "data": {"path": str(data), "batch_size": 8, "augment": augment},
        "autoencoder": "pixels", "backbone": UNET, "sampling": {"steps": 2}, "trainer": TRAINER,
        "logger": {"wandb": "disabled"}, **changes,
    })  # fmt: skip


def published(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


# --- which element turns which image ----------------------------------------------------------------------------------


class Watching(StageModule):
    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return batch.sum(), {}


def drawn(elements: int, step: int, rank: int = 0, seed: int = 0, n: int = 400, world: int = 1) -> Tensor:
    config: Any = SimpleNamespace(seed=seed, ema=SimpleNamespace(decay=0), trainer=SimpleNamespace(channels_last=False))
    module = Watching(config, nn.Linear(1, 1), lambda places: places.float(), 1000, [1 / elements] * elements)
    module._trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world)  # type: ignore[assignment]
    places = module.batches(torch.arange(n) + 1000 * module.drawn(n))
    assert isinstance(places, Tensor)
    assert torch.equal(places % 1000, torch.arange(n).float())
    return places // 1000


def test_elements_are_uniform_and_a_function_of_seed_step_and_place():
    one = drawn(8, step=3)
    torch.manual_seed(1)
    assert torch.equal(drawn(8, step=3), one)
    shares = [drawn(8, step=3, rank=rank, n=200, world=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), one)  # two processes turn what one does
    assert (shares[0] == shares[1]).float().mean() < 0.25
    for other in (drawn(8, step=4), drawn(8, step=3, seed=1)):
        assert (other == one).float().mean() < 0.25
    counts = torch.bincount(torch.cat([drawn(8, step=k) for k in range(25)]).long(), minlength=8)
    assert ((counts - 1250) ** 2 / 1250).sum() < 24.3  # chi² of 7, p = 0.001
    assert not drawn(1, step=3).any()


def test_without_symmetries_the_noise_of_a_step_is_left_alone():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    drawn(1, step=0)
    assert not drawn(2, step=0, n=8).eq(2).any()
    torch.manual_seed(0)
    config: Any = SimpleNamespace(seed=0, ema=SimpleNamespace(decay=0))
    module = Watching.__new__(Watching)
    StageModule.__init__(module, config, nn.Identity(), lambda places: places, 10, [0.5, 0.5])
    module._trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)  # type: ignore[assignment]
    module.drawn(8)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("autoencoder", ["pixels", "first"])
def test_cached_latents_are_those_of_turned_images(data: Path, autoencoder: str) -> None:
    if autoencoder == "first":
        autoencoder = str(stage1.train(first(data)))
    images = LensImages(data)
    model, _ = load_autoencoder(autoencoder, images.image_shape, images.transform)
    chosen = images.split("train")
    if autoencoder == "pixels":
        model.fit_latents(images.batches(chosen))
    labels = cosets(ELEMENTS, HALF_TURN)
    turned = Turns(ELEMENTS, labels, [0.125] * 8, {})
    config = second(data, autoencoder=autoencoder)
    batches = stage2.turned_latents(model, images, chosen, turned, Conditions(labels=4), config, "fp32")
    n = len(chosen)
    for k, element in enumerate(ELEMENTS):
        latents, cond = batches(torch.tensor([0, 7, n - 1]) + k * n)
        expected = model.encode(apply(images.batch(chosen[[0, 7, n - 1]]), element))
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        assert cond.tolist() == [[2.0 * (label == labels[k]) for label in range(4)]] * 3
    half = Turns(HALF_TURN, [0, 0], [0.5, 0.5], {})
    alone = stage2.turned_latents(model, images, chosen, half, Conditions(), config, "fp32")
    assert isinstance(alone(torch.tensor([0, n])), Tensor)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_without_symmetries_json_a_run_is_what_it_was(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {
        augment: (
            published(stage1.train(first(data, f"1{augment}", augment))),
            published(stage2.train(second(data, f"2{augment}", augment))),
        )
        for augment in ("none", "symmetries")
    }
    assert weights["none"] == weights["symmetries"]
    assert capsys.readouterr().out.count("no symmetries.json: no image is turned") == 2
    allow(data, "identity")
    assert published(stage1.train(first(data, "alone"))) == weights["none"][0]
    allow(data, *HALF_TURN)
    assert published(stage1.train(first(data, "turned"))) != weights["none"][0]
    assert published(stage2.train(second(data, "turned2"))) != weights["none"][1]


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["symmetries", "labelled"])
def test_a_resumed_run_turns_the_same_images(data: Path, monkeypatch: pytest.MonkeyPatch, augment: str) -> None:
    allow(data, *HALF_TURN)
    runs = [(stage2.train, lambda name: second(data, f"2{name}", augment))]
    if augment == "symmetries":
        runs.append((stage1.train, lambda name: first(data, f"1{name}")))
    before = Monitor.on_train_batch_end

    def dying(self: Monitor, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        if trainer.global_step == 6:
            raise Killed

    for train, config in runs:
        whole = published(train(config("whole")))
        with monkeypatch.context() as patch:
            patch.setattr(Monitor, "on_train_batch_end", dying)
            with pytest.raises(Killed):
                train(config("killed"))
        assert torch.load(data.parent / config("killed").name / "last.ckpt", weights_only=True)["global_step"] == 4
        assert published(train(config("killed"))) == whole


def test_other_symmetries_are_another_run(data: Path) -> None:
    config = second(data)
    model = stage2.train(config)
    allow(data, "identity")
    assert stage2.train(config) == model  # found to have none: nothing changes
    allow(data, *HALF_TURN)
    with pytest.raises(UserError, match=r"trained with another symmetries\.json"):
        stage2.train(config)
    stage2.train(second(data, "turned"))
    (data / FILE).unlink()
    with pytest.raises(UserError, match=r"trained with another symmetries\.json"):
        stage2.train(second(data, "turned"))
    assert stage2.train(config) == model


def test_a_run_from_before_there_was_the_key_goes_on(data: Path) -> None:
    config = second(data)
    model = stage2.train(config)
    saved = data.parent / "second" / "config.yaml"
    text = saved.read_text()
    assert "  augment: symmetries\n" in text
    saved.write_text(text.replace("  augment: symmetries\n", ""))
    assert stage2.train(config) == model
    saved.write_text(text.replace("  augment: symmetries\n", "  augment: none\n"))
    with pytest.raises(UserError, match=r"data\.augment: none -> symmetries"):
        stage2.train(config)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [UNET, {"name": "dit", "width": 16, "depth": 1, "heads": 2}], ids=["unet", "dit"])
def test_labels_reach_the_network_and_samples_ask_for_the_identity(
    data: Path, monkeypatch: pytest.MonkeyPatch, backbone: dict[str, Any]
) -> None:
    allow(data, *HALF_TURN)
    autoencoder = str(stage1.train(first(data)))
    model = stage2.train(second(data, "labelled", "labelled", autoencoder=autoencoder, backbone=backbone))
    assert read_config(model)["conditions"] == {"orientation": 4}
    generator = Generator.from_pretrained(model, "cpu")
    seen: list[Tensor] = []
    forward = generator.denoiser.backbone.forward

    def watching(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(cond)
        return forward(x, t, cond)

    monkeypatch.setattr(generator.denoiser.backbone, "forward", watching)
    images = generator.images(range(3), steps=2)
    assert images.shape == (3, 1, 20, 20)
    assert torch.cat(seen).unique(dim=0).tolist() == [[2, 0, 0, 0, 1]]  # label 0, and that it is there
    plain = Generator.from_pretrained(stage2.train(second(data, "plain", autoencoder=autoencoder)), "cpu")
    assert plain.conditions == Conditions()
    assert plain.condition(3) is None


def test_stage_1_takes_no_labels(data: Path) -> None:
    with pytest.raises(UserError, match=r"data\.augment.*labelled"):
        first(data, augment="labelled")


@pytest.mark.slow
def test_turned_images_leave_no_trace_in_the_samples(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spots lie to the upper left, and so do the samples of a model that has seen them turned in all eight ways."""
    dit = {"name": "dit", "width": 64, "depth": 3, "heads": 4, "patch": 4}
    trainer = {**TRAINER, "max_steps": 700, "validate_every": 700, "checkpoint_every": 700}
    diffusion = {"prediction": "velocity", "weighting": "uniform"}  # which learns such spots soonest
    config = second(
        data, "labelled", "labelled", backbone=dit, trainer=trainer, ema={"decay": 0.98}, diffusion=diffusion
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 16})})
    generator = Generator.from_pretrained(stage2.train(config), "cpu")

    def left() -> float:
        images = generator.images(range(64), steps=8)
        return float((images[..., :10].sum((1, 2, 3)) > images[..., 10:].sum((1, 2, 3))).float().mean())

    assert left() > 0.85
    # Asked for the label of a mirror image, the same model mirrors: it is the label that keeps the samples upright.
    mirrored = one_hot(8)[ELEMENTS.index("flip_lr")]
    monkeypatch.setattr(generator, "condition", lambda n, cond=None: mirrored.expand(n, -1))
    assert left() < 0.4
