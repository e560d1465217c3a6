"""A student of few steps: on Gaussian data, where the path from each noise ends is known; then from model to model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.autoencoder import Pixels
from shared.checkpoint import amend, load, publish
from shared.cli import main
from shared.config import load_config
from shared.data.cache import CacheWriter, LensImages
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.schema import Distill, Stage2
from stage2_diffusion import distillation
from stage2_diffusion.conditions import Conditions, Entry
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.distillation import distill, end_error, solve
from stage2_diffusion.generator import Generator
from stage2_diffusion.grids import tune
from stage2_diffusion.pipeline import train
from stage2_diffusion.samplers import SeededNoise, consistency
from stage2_diffusion.schedule import NoiseSchedule
from tests.blobs import blobs

MEAN, STD = torch.tensor([0.8, -0.5]).reshape(2, 1, 1), torch.tensor([0.3, 1.2]).reshape(2, 1, 1)
SHAPE = (2, 1, 1)


def exact(schedule: NoiseSchedule, consistent: bool):
    """E[x_0 | x_t] for normal data or, `consistent`, the end of the path through x_t: both are linear in x_t."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        variance = (alpha * STD) ** 2 + sigma**2
        slope = STD / variance.sqrt() if consistent else alpha * STD**2 / variance
        return MEAN + slope * (x_t - alpha * MEAN)

    return denoise


class Tiny(nn.Module):
    """(x, t, cond) -> like x: linear in x, with a slope and an offset that depend on t."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        slope, offset = self.net(t.float()[:, None])[..., None, None].chunk(2, 1)
        return slope * x + offset


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
def test_the_loss_is_zero_for_the_end_of_the_path_and_for_nothing_else(name: str) -> None:
    schedule = NoiseSchedule(name)
    times = schedule.times(200)
    states, x_0 = solve(exact(schedule, False), schedule, SeededNoise(range(64)), SHAPE, times)
    assert states.shape == (200, 64, *SHAPE)
    right = end_error(exact(schedule, True), schedule, states, x_0, times[:-1], points=4)
    wrong = end_error(exact(schedule, False), schedule, states, x_0, times[:-1], points=4)
    assert right.shape == (4, 64)
    assert right.mean() < 1e-3
    assert wrong.mean() > 100 * right.mean()


def test_the_first_point_is_pure_noise_and_the_others_are_not() -> None:
    schedule = NoiseSchedule("flow")
    times = schedule.times(6)
    states, x_0 = solve(exact(schedule, False), schedule, SeededNoise(range(32)), SHAPE, times)
    seen: list[Tensor] = []
    end_error(lambda x, t: seen.append(t) or x, schedule, states, x_0, times[:-1], points=3)
    first, rest = seen[0][:32], seen[0][32:]
    assert (first == 1).all()
    assert len(rest) == 64
    assert 0 < rest.min() < rest.max() < 1


@pytest.mark.parametrize(("schedule", "prediction"), [("flow", "velocity"), ("cosine", "v"), ("cosine", "x0")])
def test_a_student_learns_the_ends_of_paths_and_beats_its_teacher_at_one_step(schedule: str, prediction: str) -> None:
    torch.manual_seed(0)
    process = NoiseSchedule(schedule)
    student, teacher = Denoiser(Tiny(), process, prediction), exact(process, False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    times = process.times(24, shift=3.0)
    for _ in range(400):
        states, x_0 = solve(teacher, process, lambda shape: torch.randn(64, *shape), SHAPE, times)
        optimizer.zero_grad()
        end_error(student, process, states, x_0, times[:-1], points=4).mean().backward()
        optimizer.step()
        decay.step()
    noise = SeededNoise(range(512))(SHAPE)
    end = exact(process, True)(noise, torch.ones(512))  # the closed form
    with torch.no_grad():
        one_step = {
            name: float((consistency(denoise, process, lambda shape: noise, SHAPE, 1) - end).square().mean().sqrt())
            for name, denoise in (("student", student), ("teacher", teacher))
        }
    assert one_step["student"] < 0.1
    assert one_step["teacher"] > 0.5  # all that it says of pure noise is the mean
    for steps in (1, 2):
        with torch.no_grad():
            samples = consistency(student, process, SeededNoise(range(4000)), SHAPE, steps)
        torch.testing.assert_close(samples.mean(0), MEAN, atol=0.08, rtol=0)
        torch.testing.assert_close(samples.std(0), STD, atol=0.1, rtol=0)


# --- from model to model ----------------------------------------------------------------------------------------------

TRAINER = {"max_steps": 4, "precision": "fp32", "accelerator": "cpu", "progress": False, "validate_every": 4}
QUIET = {"logger": {"wandb": "disabled"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of blobs that has hardly begun to learn: as good as any to go from here to there."""
    home = tmp_path_factory.mktemp("home")
    config = {
        "name": "teacher", "output": str(home), "autoencoder": "pixels",
        "data": {"path": str(blobs(home / "blobs")), "batch_size": 8, "augment": "none"},
        "backbone": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "heads": 1},
        "trainer": TRAINER, **QUIET,
    }  # fmt: skip
    return train(load_config(Stage2, [], config)).parent


def settings(teacher: Path, name: str = "student", **trainer: object) -> Distill:
    return load_config(Distill, [], {
        "name": name, "output": str(teacher.parent), "teacher": str(teacher),
        "data": {"batch_size": 4, "steps": 4}, "trainer": {**TRAINER, **trainer}, **QUIET,
    })  # fmt: skip


@pytest.mark.slow
def test_a_student_is_published_as_its_teacher_is_and_says_whose_it_is(teacher: Path) -> None:
    amend(teacher, "diffusion", {"scores": {"fd_efflite0": {"excess": 0.0, "n": 9}}, "stored": {"dtype": "bf16"}})
    folder = distill(settings(teacher))
    student, before = Generator.from_pretrained(folder, "cpu"), Generator.from_pretrained(teacher, "cpu")
    assert student.config["distilled"] == str(teacher)
    assert student.config["fingerprint"] == {
        "teacher": before.config["sha256"], "teacher's guidance": "[1.0, [0.0, 1.0]]",
        "data": before.config["fingerprint"]["data"],  # what it may have memorised
    }  # fmt: skip
    assert not {"scores", "stored"} & student.config.keys()
    assert student.config["data"] == before.config["data"]
    assert (student.defaults["sampler"], student.defaults["steps"]) == ("consistency", 2)
    inside, outside = student.autoencoder.state_dict(), before.autoencoder.state_dict()
    assert all(torch.equal(inside[k], outside[k]) for k in outside)
    weights, old = load(folder, "diffusion")[1], load(teacher, "diffusion")[1]
    assert weights.keys() == old.keys()
    assert any(not torch.equal(weights[k], old[k]) for k in old)
    images = student.images([3, 4])
    assert images.shape == (2, 1, 30, 30)
    assert torch.allclose(images[1], student.images([4])[0], atol=1e-5)  # of its seed alone
    assert "validation/end_error" in (folder.parent / "metrics.csv").read_text()
    assert str(teacher) in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_student_that_was_stopped_and_goes_on_is_one_that_was_not(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halted(distillation.Distillation):
        def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            if self.trainer.global_step == 3:
                raise RuntimeError("the power is gone")
            return super().loss(batch, *beside)

    whole, parts = (settings(teacher, name, checkpoint_every=2) for name in ("whole", "parts"))
    distill(whole)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "Distillation", Halted)
        with pytest.raises(RuntimeError, match="the power is gone"):
            distill(parts)
    last = Path(parts.output) / parts.name / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    a, b = (load(distill(c), "diffusion")[1] for c in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)


class Told(nn.Module):
    """A backbone whose velocity is one of the numbers it is told, where it is told it."""

    cond_dim = 5  # two labels, one number; a flag for each

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.cond = cond
        return self.gain * cond[:, 2].reshape(-1, 1, 1, 1).expand_as(x)


def conditional(**options: float) -> Generator:
    flow, theta = NoiseSchedule("flow"), Entry("theta_E", limits=(0.5, 1.5), mean=(1.0,), std=(0.5,))
    shares = {"cond_dropout": options.get("dropout", 0.0)}
    denoiser = Denoiser(Told(), flow, "velocity", groups=[2, 1], always=1, **shares)
    autoencoder = Pixels((1, 3, 3), PixelTransform(0.0, 1.0))
    autoencoder.latent_mean.zero_()
    autoencoder.latent_std.fill_(0.01)  # no path leaves the range of the data, -100 to 100
    return Generator(autoencoder, denoiser, conditions=Conditions(2, (theta,)))


def test_paths_are_solved_under_the_conditions_that_the_student_is_told(teacher: Path) -> None:
    asked = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, -2.0]])
    module = distillation.Distillation(settings(teacher), conditional(), asked)
    torch.manual_seed(0)
    noise, cond = module.batches(torch.arange(64))
    assert {tuple(row) for row in cond.tolist()} == {tuple(row) for row in asked.tolist()}
    _, x_0 = module.paths(noise, cond, 4)
    torch.testing.assert_close(x_0, noise - cond[:, 2:].reshape(-1, 1, 1, 1))  # a velocity of its own for each path
    loss, _ = module.loss(noise, cond)
    assert loss < 1e-10  # the student is told the same, point by point
    with torch.no_grad():
        module.network.backbone.gain.zero_()
    assert module.loss(noise, cond)[0].item() == pytest.approx(float(cond[:, 2].square().mean()), rel=1e-4)


def test_conditions_are_dropped_as_in_the_teachers_training(teacher: Path) -> None:
    asked = torch.tensor([[1.0, 0.0, 0.5]])
    module = distillation.Distillation(settings(teacher), conditional(dropout=0.5), asked)
    torch.manual_seed(0)
    loss, _ = module.loss(*module.batches(torch.arange(256)))
    assert loss < 1e-10
    labels, told = module.network.backbone.cond[:, :2], module.network.backbone.cond[:, 4]
    assert (labels == asked[:, :2]).all()  # samples are always asked for as the data have them turned
    assert 0.4 < told.mean() < 0.6


@pytest.mark.slow
def test_a_teacher_that_can_be_asked_has_such_a_student(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, known in (("data", "theta_E"), ("others", "gamma")):
        writer = CacheWriter(tmp_path / name, 60, (1, 6, 6), {"kind": "test"})
        for chunk in writer.pending():
            writer.write(chunk, rng.random((len(chunk), 1, 6, 6), np.float32))
        writer.finish(parameters={known: {"unit": "", "values": rng.uniform(0.5, 1.5, 60)}})
    teacher = train(load_config(Stage2, [], {
        "name": "teacher", "output": str(tmp_path), "autoencoder": "pixels",
        "data": {"path": str(tmp_path / "data"), "batch_size": 8, "augment": "none"},
        "condition": {"parameters": ["theta_E"]},
        "backbone": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "heads": 1},
        "trainer": TRAINER, **QUIET,
    })).parent  # fmt: skip
    config = settings(teacher)
    student = Generator.from_pretrained(distill(config), "cpu")
    assert student.conditions == Generator.from_pretrained(teacher, "cpu").conditions
    assert student.config["fingerprint"]["data"] == LensImages(tmp_path / "data").fingerprint
    one, other = (student.images([1], cond={"theta_E": value}) for value in (0.6, 1.4))
    assert one.shape == (1, 1, 6, 6)
    assert not torch.equal(one, other)
    others = config.model_copy(
        update={"name": "x", "data": config.data.model_copy(update={"path": str(tmp_path / "others")})}
    )
    with pytest.raises(UserError, match=r"others does not know theta_E, which .* can be asked for"):
        distill(others)


@pytest.mark.slow
def test_a_users_mistakes_get_one_clear_line(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = teacher.parent
    publish(home / "first", "autoencoder", {}, {"x": torch.zeros(1)}, "")
    distill(settings(teacher, "mine"))

    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["distill", "--output", str(home), "--logger.wandb", "disabled", *arguments])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "there is no such folder" in fails("--teacher", str(home / "teachr"))
    assert "a model of stage 1; here one of stage 2 is needed" in fails("--teacher", str(home / "first"))
    assert f"give its teacher, {teacher}" in fails("--teacher", str(home / "mine"))
    assert "another configuration" in fails("--teacher", str(teacher), "--name", "mine")
    assert "unknown key" in fails("--techer", str(teacher))
    foreign = home / "foreign"
    shutil.copytree(teacher / "model", foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["backbone"] = {"name": "custom", "class_path": "nowhere_to_be_found.Net"}
    (foreign / "config.json").write_text(json.dumps(config))
    assert "--trust nowhere_to_be_found" in fails("--teacher", str(foreign))
    assert "cannot be imported" in fails("--teacher", str(foreign), "--trust", "nowhere_to_be_found")
    with pytest.raises(UserError, match="consistency draws noise at every step"):
        tune(Generator.from_pretrained(home / "mine", "cpu"), "consistency", 4)
    main(["sample", str(home / "mine"), "--count", "1", "--sampler", "consistency", "--out", str(home / "samples")])
    assert "warning" not in capsys.readouterr().err
