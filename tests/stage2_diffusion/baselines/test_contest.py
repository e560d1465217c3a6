"""Systems in a contest: what a step costs, how many are within a budget, and that nothing is done twice."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import main
from shared.config import load_config, to_dict
from shared.errors import UserError
from shared.flops import count
from shared.schema import Adversarial, Stage2
from stage2_diffusion.baselines import contest
from stage2_diffusion.baselines.compare import configs_in
from stage2_diffusion.baselines.contest import Budget, StepCost, step_cost, within
from stage2_diffusion.generator import build_denoiser
from tests.blobs import blobs

UNET = """
name: {name}
autoencoder: pixels
data: {{batch_size: 8}}
backbone: {{name: unet, width: 8, multipliers: [1, 2], blocks: 1, attention: [], heads: 1}}
sampling: {{steps: 3}}
trainer: {{precision: fp32, accelerator: cpu, progress: false, watched: 4, previews: 2}}
"""
GAN = """
name: gan
autoencoder: pixels
data: {batch_size: 8}
gan: {noise: 4, width: 8, multipliers: [1, 2], attention: []}
adversary: {width: 8, strides: 1}
trainer: {precision: fp32, accelerator: cpu, progress: false, watched: 4, previews: 2}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contest, "TIMED", 3)
    blobs(Path("data/blobs"), 400)
    Path("systems").mkdir()
    Path("systems/one.yaml").write_text(UNET.format(name="one"))
    Path("systems/gan.yaml").write_text(GAN)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "steps"), [("10min", 300), ("90s", 45), ("1h", 1800), ("2.5 min", 75), ("30TFLOP", 6000), ("0.1s", 1)]
)
def test_a_budget_is_so_many_steps(text: str, steps: int) -> None:
    assert Budget.of(text).steps(StepCost(seconds=2.0, gflop=5.0)) == steps


@pytest.mark.parametrize("text", ["10", "ten minutes", "-3s", "0h", "5 days", "min"])
def test_what_is_no_budget_is_told(text: str) -> None:
    with pytest.raises(UserError, match="such as 10min"):
        Budget.of(text)


def test_configs_that_come_with_the_installation_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "pixel-ddpm-150" in [path.stem for path in configs_in("baselines")]
    assert configs_in("configs/baselines") == configs_in("baselines")
    assert configs_in("nowhere") == []
    Path("baselines").mkdir()
    Path("baselines/mine.yaml").write_text(UNET.format(name="mine"))
    assert [path.stem for path in configs_in("baselines")] == ["mine"]


def config_of(path: str, **more: Any) -> Any:
    return load_config(Stage2, [path], {"data": {"path": "data/blobs"}, **more})


def test_a_step_costs_three_forward_passes(home: Path) -> None:
    config = config_of("systems/one.yaml", optimizer={"name": "adamw"})
    blocks = to_dict(config)
    network = build_denoiser(blocks["backbone"], blocks["diffusion"], (1, 30, 30))
    once = count(lambda: network(torch.zeros(8, 1, 30, 30), torch.full((8,), 0.5)))
    found = step_cost(config)
    # Less the gradient of the input of the first layer.
    assert 2.8 * once < found.gflop <= 3 * once
    assert 0 < found.seconds < 5
    assert step_cost(config_of("systems/one.yaml", optimizer={"name": "adamw"})).gflop == found.gflop
    twice = config_of(
        "systems/one.yaml", optimizer={"name": "adamw"}, diffusion={"ssim": 0.1}, trainer={"accumulate": 2}
    )
    assert step_cost(twice).gflop >= found.gflop
    assert not list(Path().glob("checkpoints*"))


def test_the_steps_of_a_gan_are_those_of_both_sides(home: Path) -> None:
    config = config_of("systems/gan.yaml")
    assert isinstance(config, Adversarial)
    quiet = config_of("systems/gan.yaml", adversary={"updates": 10**6, "width": 8, "strides": 1})
    assert step_cost(config).gflop > 1.1 * step_cost(quiet).gflop  # whose generator never learns


def test_a_short_run_warms_up_and_is_saved_within_itself(home: Path) -> None:
    config = within(config_of("systems/one.yaml"), 40)
    assert config.optimizer.warmup_steps == 4
    t = config.trainer
    assert (t.max_steps, t.validate_every, t.checkpoint_every, t.log_every) == (40, 40, 4, 2)
    assert within(config_of("systems/one.yaml"), 1).trainer.checkpoint_every == 1


def test_a_plan_survives_other_plans(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time budget is so many steps by a clock that never shows the same twice: what was measured once stays."""
    costs = iter([StepCost(0.5, 1.0), StepCost(0.4, 1.0), StepCost(0.3, 1.0)])
    monkeypatch.setattr(contest, "step_cost", lambda config: next(costs))
    config = config_of("systems/one.yaml")
    first = contest.Plans(Path("out/plan.json")).of(config, Budget.of("10min"))
    other = contest.Plans(Path("out/plan.json")).of(config, Budget.of("20min"))
    more = config_of("systems/one.yaml", trainer={"log_every": 3})
    again = contest.Plans(Path("out/plan.json")).of(more, Budget.of("10min"))
    assert (first["steps"], other["steps"], again["steps"]) == (1200, 2400, 1200)


def test_configs_of_one_cost_are_measured_once_and_get_as_many_steps(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = iter(
        (StepCost(2.0, 5.0), StepCost(4.0, 5.0), StepCost(8.0, 5.0), StepCost(16.0, 5.0))
    )  # ever slower, on a busy machine
    monkeypatch.setattr(contest, "step_cost", lambda config: next(costs))
    plans = contest.Plans(Path("out/plan.json"))

    def steps(**more: Any) -> int:
        return plans.of(config_of("systems/one.yaml", **more), Budget.of("10min"))["steps"]

    assert steps() == 300
    assert (
        steps(name="x0", seed=3, diffusion={"prediction": "x0"}, optimizer={"lr": 1e-2}, sampling={"steps": 9}) == 300
    )
    assert steps(name="wide", backbone={"width": 16}) == 150
    assert steps(name="similar", diffusion={"ssim": 0.1}) == 75
    assert steps(name="recomputed", trainer={"checkpoint_gradients": True}) == 37


@pytest.mark.slow
def test_systems_are_trained_scored_and_not_trained_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compare",
        "systems",
        "--reference",
        "data/blobs",
        "--budget",
        "0.002TFLOP",
        "--count",
        "30",
        "--fit",
        "0",
    ]
    command += ["--skip", "two-sample", "memory"]
    main(command)
    table = Path("comparison.md").read_text()
    plans = json.loads(Path("comparison/plan.json").read_text())
    for name, plan in ((key.split()[0], plan) for key, plan in plans.items()):
        assert plan["steps"] == max(1, int(2 / plan["gflop"]))
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
        assert f"{plan['steps']} steps, {plan['steps'] * plan['gflop'] / 1000:.3g} TFLOP" in row
    assert {key.split()[0] for key in plans} == {"one", "gan"}
    lenses = Image.open("comparison-lenses.png")
    assert lenses.size == (8 * 32 - 2, 3 * (30 + 18))
    assert len(set(map(tuple, np.asarray(lenses)[18:48, :254].reshape(-1, 3)))) > 50  # real ones above

    made = {path: path.stat().st_mtime_ns for path in Path("comparison").rglob("*") if path.is_file()}
    kept = [path for path in made if path.name in ("model.safetensors", "samples.npz", "metrics.json", "plan.json")]
    assert len(kept) == 7
    # A system more costs its own training alone, and a model that is there may take part as it is.
    Path("systems/two.yaml").write_text(UNET.format(name="two"))
    capsys.readouterr()
    main(command)
    assert "two" in Path("comparison.md").read_text()
    for path in kept:
        if path.name != "plan.json":
            assert path.stat().st_mtime_ns == made[path]
    os.rename("comparison/two", "theirs")
    main(["compare", "theirs", "comparison/one/evaluation-30", *command[2:4], *command[6:], "--out", "third"])
    scores = [
        line.split("|")[2:4] for line in Path("third.md").read_text().splitlines() if "-30" in line or "theirs" in line
    ]
    assert scores[0][0] == next(line.split("|")[3] for line in table.splitlines() if line.startswith("| one"))
    with pytest.raises(SystemExit):
        main([*command, "--seed", "3"])
    assert "is a run with another configuration (seed: 0 -> 3)" in capsys.readouterr().err


ASKED = ["--reference", "data/blobs", "--count", "30", "--fit", "0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["systems"], "say on what and for how long"),
        (["systems", "--budget", "1s"], "--budget is for training and scoring"),
        (["systems", "--reference", "data/blobs"], "say for which, --budget 10min"),
        (["systems", "--reference", "data/none", "--budget", "1s"], "no data set at data/none"),
        (["systems", "--reference", "data/blobs", "--budget", "1s", "--count", "9999"], "allow --count"),
        (["systems", *ASKED, "--budget", "soon"], "such as 10min"),
        (["systems", *ASKED, "--budget", "1s", "--out", "."], "--out . is no name for files"),
        (["systems", *ASKED, "--budget", "1s", "--backbne.width", "4"], "backbne: unknown key"),
        (["systems", "systems/one.yaml", *ASKED, "--budget", "1s"], "two of them are called one"),
        (["none.yaml", *ASKED, "--budget", "1s"], "none.yaml"),
        (["systems", *ASKED, "--budget", "1s", "--data.batch_size", "5000"], "fewer than a batch of 5000"),
        (["none", *ASKED], "no model at none"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", *arguments])
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not Path("comparison").exists()
