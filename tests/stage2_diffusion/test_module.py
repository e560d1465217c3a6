"""Stage 2's loop: resumed, split and averaged as it should be; what it is watched by tells what it should."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.autoencoder import Pixels
from shared.checkpoint import read_config
from shared.config import load_config, merge, to_dict, to_yaml
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from shared.data.symmetries import FORMAT, group
from shared.run import Run
from shared.schema import Stage2
from shared.training import Monitor, StageModule, fit
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import Generator, build_denoiser
from stage2_diffusion.module import DiffusionModule, Latents
from stage2_diffusion.pipeline import train
from stage2_diffusion.schedule import NoiseSchedule
from stage2_diffusion.watch import Distance, Memorisation, gap_z
from tests.blobs import blobs
from tests.processes import run_one

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "autoencoder": "pixels",
    "backbone": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [], "heads": 1},
    "optimizer": {"warmup_steps": 3},
    "trainer": {"max_steps": 12, "precision": "fp32", "accelerator": "cpu", "log_every": 1, "validate_every": 12,
                "checkpoint_every": 4, "progress": False},
    "logger": {"wandb": "disabled"},
}  # fmt: skip


def config(data: Path, output: Path, /, name: str = "run", size: int = 8, **overrides: Any) -> Stage2:
    own = {"name": name, "output": str(output), "data": {"path": str(data), "batch_size": size}}
    return load_config(Stage2, [], merge(merge(TINY, own), overrides))


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


def dying(step: int, keys: dict[str, Any]) -> None:
    """Train, and be killed after the first step of this number."""
    before = Monitor.on_train_batch_end

    def watched(self: Monitor, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Monitor.on_train_batch_end = watched  # type: ignore[method-assign]
    train(load_config(Stage2, [], keys))


def test_how_to_sample_may_be_changed_after_the_training(data: Path, tmp_path: Path) -> None:
    model = train(config(data, tmp_path))
    weights, before = (model / "model.safetensors").read_bytes(), read_config(model)
    train(config(data, tmp_path, sampling={"steps": 3, "shift": 2.0}))
    after = read_config(model)
    assert (before["sampling"]["steps"], after["sampling"]["steps"], after["sampling"]["shift"]) == (8, 3, 2.0)
    assert (model / "model.safetensors").read_bytes() == weights
    (tmp_path / "run" / "last.ckpt").unlink()  # then there is nothing to publish again
    train(config(data, tmp_path, sampling={"steps": 5}))
    assert read_config(model)["sampling"]["steps"] == 3


def test_previews_are_guided_as_samples_will_be(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Generator] = []
    monkeypatch.setattr(
        "stage2_diffusion.module.save_previews", lambda folder, step, generator, *rest: shown.append(generator)
    )
    guide = {"guide": {"max_steps": 4, "backbone": {"width": 4}}, "sampling": {"guidance": 1.5}}
    model = train(config(data, tmp_path, **guide))
    own, network = shown  # the guide's own, and the network's
    assert own.guide is None
    published = Generator.from_pretrained(model, "cpu")
    assert network.guide is not None
    assert published.guide is not None
    weights = published.guide.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in network.guide.state_dict().items())


def test_killed_in_the_training_of_its_guide_and_again_in_its_own_it_ends_bit_identical(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = {"guide": {"max_steps": 8, "backbone": {"width": 4}}, "sampling": {"guidance": 1.5}}
    whole = train(config(data, tmp_path / "whole", **guide)) / "model.safetensors"
    assert "first the guide, 8 steps" in capsys.readouterr().out
    torn = config(data, tmp_path / "torn", **guide)
    for step, announced in ((6, True), (10, False)):  # of the guide, which goes on from step 4, and of the network
        ended = run_one(tmp_path, dying, step, torn.model_dump(mode="json"))
        assert ended.returncode == -signal.SIGKILL
        assert ("first the guide" in ended.output) is announced
    assert (train(torn) / "model.safetensors").read_bytes() == whole.read_bytes()


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
    assert f"{next(iter(published))} " in capsys.readouterr().out  # of all, first
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


def test_smaller_pixels_are_trained_on_published_and_sampled_in_the_size_of_the_data(
    data: Path, tmp_path: Path
) -> None:
    model = train(config(data, tmp_path, pixels={"size": 12, "crop": 24}, diffusion={"ssim": 0.5}))
    generator = Generator.from_pretrained(model, "cpu")
    assert generator.autoencoder.latent_shape == (1, 12, 12)
    assert generator.denoiser.ssim == 0.5
    assert generator.images(range(2), steps=2).shape == (2, 1, 30, 30)
    plain = train(config(data, tmp_path, "plain", pixels={"size": 12, "crop": 24}))
    assert (model / "model.safetensors").read_bytes() != (plain / "model.safetensors").read_bytes()


def test_a_model_from_before_there_were_sizes_still_loads(data: Path, tmp_path: Path) -> None:
    model = train(config(data, tmp_path))
    images = Generator.from_pretrained(model, "cpu").images(range(2), steps=2)
    published = json.loads((model / "config.json").read_text())
    published["autoencoder"]["spec"] = {"name": "pixels"}
    del published["diffusion"]["ssim"], published["training"]["pixels"]
    (model / "config.json").write_text(json.dumps(published))
    assert torch.equal(Generator.from_pretrained(model, "cpu").images(range(2), steps=2), images)


class Copies:
    """A generator that gives back images, as a network that has learned them by heart would."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def sample(self, seeds: range, batch_size: int) -> Any:
        yield list(seeds), self.images[: len(seeds)]


def test_the_distance_of_real_images_is_near_the_floor_and_of_copies_the_neighbours_are_near(data: Path) -> None:
    images = LensImages(data)
    distance = Distance(images, 16)
    training, test = (images.batch(images.shuffled(s)[: distance.n]) for s in ("train", "test"))
    copies, fresh = (distance(Copies(x)) for x in (training, test))  # type: ignore[arg-type]
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
    assert [bad(*errors(*e)) for e in ((0.0, 0.0), (-0.1, -0.1), (-0.05, -0.2), (0.0, -0.3))] == [
        False,
        False,
        True,
        False,
    ]


def test_a_resumed_run_remembers_what_was_told_of_memorisation(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path, trainer={"max_steps": 4, "validate_every": 2, "checkpoint_every": 2})
    assert run_one(tmp_path, dying, 3, c.model_dump(mode="json")).returncode == -signal.SIGKILL
    last = tmp_path / "run" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["memorisation"]["best"] is not None
    saved["memorisation"]["told"] = True
    torch.save(saved, last)
    train(c)
    assert torch.load(last, weights_only=True)["memorisation"]["told"]


def small_blobs(count: int, seed: int) -> Tensor:
    """(count, 1, 8, 8): blobs of any place and width under noise, standardised."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(8.0) - 3.5
    centre = 4 * torch.rand(count, 2, 1, 1, generator=generator) - 2
    width = 1 + 3 * torch.rand(count, 1, 1, generator=generator)
    x = torch.exp(-((axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2) / (2 * width))[:, None]
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return (x - x.mean()) / x.std()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "warned"), [(32, 1), (4096, 0)])
def test_a_run_on_few_images_is_warned_of_memorising_and_one_on_many_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, warned: int
) -> None:
    trainer = {"max_steps": 250, "log_every": 250, "validate_every": 50, "checkpoint_every": 250}
    options: dict[str, Any] = {"optimizer": {"lr": 4e-3}, "ema": {"decay": 0.98}}
    c = config(tmp_path, tmp_path, trainer=trainer, **options, size=32)
    latents = small_blobs(count, 1)
    torch.manual_seed(0)
    network = build_denoiser({**to_dict(c)["backbone"], "width": 16}, to_dict(c)["diffusion"], (1, 8, 8))
    autoencoder = Pixels((1, 8, 8), PixelTransform(0.0, 1.0))
    held_out = small_blobs(256, 2)
    data = Latents(lambda i: latents[i], count, (1.0,), held_out)
    module = DiffusionModule(c, network, data, autoencoder, "fp32", Conditions())
    fit(module, Run(c), {})
    assert capsys.readouterr().out.count("begins to memorise") == warned
    z = [float(row["validation/memorisation_z"]) for row in rows(tmp_path / "run") if row["validation/memorisation_z"]]
    assert len(z) == 5
    assert (z[-1] > 6) if warned else all(abs(value) < 3 for value in z)


def test_the_gap_has_the_standard_error_of_its_estimate() -> None:
    torch.manual_seed(0)
    z = torch.tensor([gap_z(torch.randn(100), 3 * torch.randn(50)) for _ in range(2000)])
    assert abs(float(z.mean())) < 0.1
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    assert gap_z(torch.randn(100) + 1, torch.randn(50)) > 3


def symmetric(data: Path) -> Path:
    """A data set whose images may be turned in all ways."""
    images = LensImages(data)
    found = {"format": FORMAT, "data": images.fingerprint, "allowed": group(30, 30)}
    (data / "symmetries.json").write_text(json.dumps(found))
    return data


SCRIPT = """
import os, signal, sys, time
import shared.training
from shared.cli import guard
from stage2_diffusion.train import main
before = shared.training.Monitor.on_train_batch_end
def asked(self, trainer, *rest):
    before(self, trainer, *rest)
    if trainer.global_step == 13 and os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGTERM)  # to torchrun, which tells all its processes
        time.sleep(2)
if sys.argv.pop(1) == "stopped":
    shared.training.Monitor.on_train_batch_end = asked
guard(main)
"""


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_go_on_learn_what_one_does(tmp_path: Path) -> None:
    """The same batches, turns, noise and so losses, to rounding; torchrun hands SIGTERM on, all stop at one step."""
    data = symmetric(blobs(tmp_path / "blobs"))
    several = {"optimizer": {"name": "adamw", "lr": 1e-3}, "trainer": {"max_steps": 24, "checkpoint_every": 100}}
    train(config(data, tmp_path, "alone", **several))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(to_yaml(config(data, tmp_path, "two", **several)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def torchrun(how: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        script = [str(tmp_path / "script.py"), how, "--config", str(tmp_path / "config.yaml")]
        return subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)

    stopped = torchrun("stopped")
    assert stopped.returncode != 0
    assert torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)["global_step"] == 20, stopped.stderr
    assert "stopped at step 20 of 24" in stopped.stdout
    again = torchrun("on")
    assert again.returncode == 0, again.stderr
    alone, two = rows(tmp_path / "alone"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in alone] == [str(k) for k in range(1, 25)]
    for a, b in zip(alone, two, strict=True):
        assert float(b["train/loss"]) == pytest.approx(float(a["train/loss"]), rel=1e-4)
    # Not the weights: of a bias before a norm Adam makes whole steps out of rounding.
    assert float(two[-1]["validation/x0_error"]) == pytest.approx(float(alone[-1]["validation/x0_error"]), rel=1e-3)


def test_parts_of_a_batch_are_given_the_noise_of_the_whole() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Recorder(nn.Module):
        cond_dim = 3

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            seen.append((x, t, cond))
            return torch.zeros_like(x)

    denoiser = Denoiser(Recorder(), NoiseSchedule("flow"), "velocity", cond_dropout=0.5)
    x_0, cond = torch.randn(8, 2, 5, 5).contiguous(memory_format=torch.channels_last), torch.ones(8, 2)
    torch.manual_seed(1)
    losses = [denoiser.loss(x_0, cond)]  # from the global generator
    for k, part in enumerate(x_0.split(2)):
        generator = torch.Generator().manual_seed(1)
        losses.append(denoiser.loss(part, cond[:2], generator=generator, share=(k, 4)))
    for whole, *parts in zip(*seen, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    assert 0 < float(seen[0][2].mean()) < 1  # some conditions are dropped
    assert torch.allclose(torch.cat(losses[1:]), losses[0])


def test_images_are_turned_the_same_in_any_number_of_processes() -> None:
    def turns(rank: int, world: int) -> Tensor:
        module = StageModule(config(Path("x"), Path("y")), nn.Conv2d(1, 1, 1), lambda i: i, 100, [0.25, 0.5, 0.25])
        module._trainer = SimpleNamespace(global_step=7, global_rank=rank, world_size=world)  # type: ignore[assignment]
        return module.drawn(12 // world)

    assert torch.equal(torch.cat([turns(k, 4) for k in range(4)]), turns(0, 1))
    assert turns(0, 1).unique().tolist() == [0, 1, 2]


def test_a_job_near_its_end_saves_and_queues_itself_again(tmp_path: Path) -> None:
    """configs/slurm/train.sbatch with a torchrun and a scontrol that write down what they are told."""
    (tmp_path / "torchrun").write_text(
        'trap "echo asked >> $HERE/told; exit 143" TERM\necho "$@" > $HERE/told\n'
        '[ "$4" = quick ] && exit 0\ntouch $HERE/started\nwhile true; do sleep 0.05; done\n'
    )
    (tmp_path / "scontrol").write_text('echo scontrol "$@" >> $HERE/told\n')
    for name in ("torchrun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/bash\n" + (tmp_path / name).read_text())
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HERE": str(tmp_path), "SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "2"}
    batch = ["bash", str(ROOT / "configs" / "slurm" / "train.sbatch")]

    for number, told, code in ((signal.SIGUSR1, ["asked", "scontrol requeue 42"], 0), (signal.SIGTERM, ["asked"], 143)):
        job = subprocess.Popen([*batch, "train.py", "--config", "x"], env=environment)
        for _ in range(400):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        (tmp_path / "started").unlink()
        job.send_signal(number)
        assert job.wait(timeout=30) == code
        assert (tmp_path / "told").read_text().splitlines() == [
            "--standalone --nproc_per_node 2 train.py --config x", *told
        ]  # fmt: skip
    assert subprocess.run([*batch, "quick"], env=environment, timeout=30).returncode == 0  # done: not queued again


def eagerly(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Let compilation trace and differentiate as ever, but not write C++, which takes minutes."""
    compiled, before = [], nn.Module.compile

    def traced(self: nn.Module) -> None:
        compiled.append(self)
        before(self, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", traced)
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", [{}, {"name": "dit", "width": 16, "depth": 1, "heads": 2, "patch": 5}], ids=["unet", "dit"]
)
def test_a_compiled_backbone_is_one_graph_and_learns_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: dict[str, Any]
) -> None:
    def run(name: str, **trainer: Any) -> list[float]:
        c = config(data, tmp_path, name, trainer={"max_steps": 3, "validate_every": 3, **trainer})
        train(load_config(Stage2, [], {**to_dict(c), "backbone": backbone or to_dict(c)["backbone"]}))
        return [float(row["train/loss"]) for row in rows(tmp_path / name)]

    plain = run("plain")
    compiled = eagerly(monkeypatch)
    assert run("compiled", compile=True) == pytest.approx(plain, rel=1e-4)
    assert len(compiled) == 1
