"""Stage 2's loop: resumed, split and averaged as it should be; what it is watched by tells what it should."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.checkpoint import read_config
from shared.config import load_config
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.schema import Stage2
from shared.training import StageModule, fit
from stage2_diffusion.generator import Generator
from stage2_diffusion.module import DiffusionModule
from stage2_diffusion.pipeline import train
from stage2_diffusion.watch import Distance, Memorisation, gap_z
from tests.blobs import blobs

TINY: dict[str, Any] = {
    "autoencoder": "pixels",
    "backbone": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [], "heads": 1},
    "optimizer": {"warmup_steps": 3},
    "trainer": {"max_steps": 12, "precision": "fp32", "accelerator": "cpu", "log_every": 1, "validate_every": 6,
                "checkpoint_every": 4, "progress": False},
    "logger": {"wandb": "disabled"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs(tmp_path_factory.mktemp("data") / "blobs")


def config(data: Path, output: Path, name: str = "run", **overrides: Any) -> Stage2:
    base: dict[str, Any] = {"name": name, "output": str(output), "data": {"path": str(data), "batch_size": 8}, **TINY}
    for block, keys in overrides.items():
        base[block] = {**base.get(block, {}), **keys}
    return load_config(Stage2, [], base)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


class Waits(TorchDispatchMode):
    """The steps in which a tensor became a number of Python's, or its length hung on its content."""

    def __init__(self, module: StageModule) -> None:
        super().__init__()
        self.module, self.steps = module, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.steps.add(self.module.trainer.global_step)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("planted", [False, True])
def test_a_host_waits_for_no_gpu_between_rows_of_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    often = {"log_every": 6, "validate_every": 12, "checkpoint_every": 12}
    waited = []

    def watched(module: StageModule, *rest: Any) -> None:
        with Waits(module) as waits:
            fit(module, *rest)
        waited.append(waits.steps)

    before = DiffusionModule.loss

    def slow(self: DiffusionModule, *batch: Tensor) -> Any:
        loss, terms = before(self, *batch)
        return loss * (1.0 if float(loss) < 1e9 else 0.0), terms

    monkeypatch.setattr("stage2_diffusion.pipeline.fit", watched)
    if planted:
        monkeypatch.setattr(DiffusionModule, "loss", slow)
    lengths = {"lengths": [0.1]}
    train(config(data, tmp_path, trainer=often, ema=lengths, optimizer={"name": "adamw"}))
    assert waited == [set(range(13)) if planted else {6, 12}]


def test_the_best_average_on_held_out_images_is_published_and_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = config(data, tmp_path, ema={"decay": 0.5, "lengths": [0.02, 0.25]})
    model = train(c)
    published = read_config(model)["averages"]
    assert set(published) == {"decay 0.5", "length 0.02", "length 0.25"}
    assert list(published.values()) == sorted(published.values())
    assert f"{next(iter(published))} " in capsys.readouterr().err  # of all, first
    # What was published is what has that error, and no other of them.
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    prefix = {"decay 0.5": "ema.module.", "length 0.02": "averages.0.module.", "length 0.25": "averages.1.module."}
    weights = Generator.from_pretrained(model, "cpu").denoiser.state_dict()
    alike = [n for n, p in prefix.items() if all(torch.equal(weights[k], state[p + k]) for k in weights)]
    assert alike == [next(iter(published))]


def test_averages_beside_it_change_nothing_else(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, "one"))
    train(config(data, tmp_path, "more", ema={"lengths": [0.1]}))
    one, more = (torch.load(tmp_path / n / "last.ckpt", weights_only=True)["state_dict"] for n in ("one", "more"))
    assert all(torch.equal(more[k], v) for k, v in one.items())
    assert {k.split(".")[0] for k in more.keys() - one.keys()} == {"averages"}
    assert read_config(tmp_path / "one" / "model")["averages"] == {}


def test_a_resumed_run_with_averages_ends_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(data, tmp_path, "whole", ema={"lengths": [0.1]}))
    before = DiffusionModule.loss

    def dying(self: DiffusionModule, *batch: Tensor) -> Any:
        if self.trainer.global_step == 7:
            raise KeyError("killed")
        return before(self, *batch)

    broken = config(data, tmp_path, "broken", ema={"lengths": [0.1]})
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "loss", dying)
        with pytest.raises(KeyError):
            train(broken)
    again = train(broken)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_distances_are_logged_on_their_own_schedule_and_change_no_weight(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, "plain"))
    c = config(data, tmp_path, "scored", trainer={"score_every": 5, "score_count": 8})
    train(c)
    scored = [row for row in rows(tmp_path / "scored") if row["validation/fd"]]
    assert [row["step"] for row in scored] == ["5", "10"]
    for row in scored:
        fd, floor, excess = (float(row[f"validation/{k}"]) for k in ("fd", "fd_floor", "fd_excess"))
        assert fd > floor > 0  # noise is not blobs
        assert excess == pytest.approx(fd - floor, rel=1e-3)
    plain, again = (tmp_path / n / "model" / "model.safetensors" for n in ("plain", "scored"))
    assert plain.read_bytes() == again.read_bytes()
    train(config(data, tmp_path, "scored", trainer={"score_every": 3}))  # the same run


class Copies:
    """A generator that gives back images, as a network that has learned them by heart would."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def sample(self, seeds: range, batch_size: int) -> Any:
        yield list(seeds), self.images[: len(seeds)]


def test_the_distance_of_real_images_is_near_the_floor_and_of_copies_the_neighbours_are_near(data: Path) -> None:
    images = LensImages(data)
    distance = Distance(images, 16)
    training, test = (images.batch(images.split(s)[: distance.n]) for s in ("train", "test"))
    copies, fresh = (distance(Copies(x), {}) for x in (training, test))  # type: ignore[arg-type]
    assert copies["nearest"] == pytest.approx(0, abs=1e-6)
    assert 0.5 < fresh["nearest"] < 2
    assert abs(fresh["fd_excess"]) < fresh["fd_floor"]


def test_memorisation_is_told_once_and_only_where_the_errors_part() -> None:
    torch.manual_seed(0)
    scatter = torch.randn(2, 256)  # of images: far more than what changes

    def errors(held_out: float, seen: float) -> tuple[Tensor, Tensor]:
        return scatter[0] + held_out + 0.02 * torch.randn(256), scatter[1] + seen + 0.02 * torch.randn(256)

    healthy, bad, noisy = Memorisation(), Memorisation(), Memorisation()
    assert not any(healthy(*errors(-0.1 * k, -0.1 * k - 0.05 * (k > 5))) for k in range(20))
    assert not any(noisy(*errors(level, level)) for level in (0.0, 0.2, -0.1, 0.3, 0.1))  # both rise, both fall
    assert [bad(*errors(*e)) for e in ((0.0, 0.0), (-0.1, -0.1), (-0.05, -0.2), (0.0, -0.3))] == [False, False, True, False]


def test_the_gap_has_the_standard_error_of_its_estimate() -> None:
    torch.manual_seed(0)
    z = torch.tensor([gap_z(torch.randn(100), 3 * torch.randn(50)) for _ in range(2000)])
    assert abs(float(z.mean())) < 0.1
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    assert gap_z(torch.randn(100) + 1, torch.randn(50)) > 3
