"""The loop: resumed is uninterrupted, bit by bit; what a user does wrong is said; nothing good is overwritten."""

import csv
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import load_config, merge
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.run import Run
from shared.schema import Stage1
from shared.training import AGAIN, EMA, Checkpoint, Monitor, StageModule, fit, learning_rate_scale, step_key
from stage1_vqvae.module import VQVAEModule
from stage1_vqvae.pipeline import train
from tests.processes import Ended, run_one

TINY = {
    "autoencoder": {
        "widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1,
        "quantizer": {"name": "vq", "codebook_size": 16, "warmup_steps": 4, "kmeans_iters": 2},
    },
    "optimizer": {"warmup_steps": 3},
    "trainer": {"max_steps": 12, "precision": "fp32", "accelerator": "cpu", "log_every": 3, "validate_every": 6,
                "checkpoint_every": 4, "progress": False},
    "logger": {"wandb": "disabled"},
}  # fmt: skip


def config(data: Path, output: Path, /, name: str = "run", **overrides: object) -> Stage1:
    own = {"name": name, "output": str(output), "data": {"path": str(data), "batch_size": 8}}
    return load_config(Stage1, [], merge(merge(TINY, own), overrides))


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


def dying(step: int, number: int, keys: dict[str, Any]) -> None:
    """Train, and meet a signal after a step."""
    before = Monitor.on_train_batch_end

    def watched(self: Monitor, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    Monitor.on_train_batch_end = watched  # type: ignore[method-assign]
    train(load_config(Stage1, [], keys))


def killed_at(step: int, number: signal.Signals, config: Stage1) -> Ended:
    folder = Path(config.output)
    return run_one(folder, dying, step, int(number), config.model_dump(mode="json"))


REGULARISED = {
    "regularize": {"equivariance": 0.5, "latent_noise": 0.3, "bypass": 0.3},
    "trainer": {**TINY["trainer"], "accumulate": 2, "checkpoint_gradients": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    # between checkpoints, after the codebook was born; behind the last but one
    [({}, (6, 11)), (REGULARISED, (6,))],
    ids=["plain", "regularised, in parts"],
)
def test_killed_and_resumed_ends_bit_identical(
    data: Path, tmp_path: Path, options: dict[str, object], steps: tuple[int, ...]
) -> None:
    train(config(data, tmp_path, "whole", **options))
    for step in steps:
        broken = config(data, tmp_path, f"killed{step}", **options)
        assert killed_at(step, signal.SIGKILL, broken).returncode == -signal.SIGKILL
        assert not (tmp_path / broken.name / "model").exists()
        assert (tmp_path / broken.name / "metrics.csv").read_text().count("\n") >= 2  # rows up to the last checkpoint
        train(broken)
        assert same(weights(tmp_path / "whole"), weights(tmp_path / broken.name))
        whole, again = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in ("whole", broken.name))
        assert whole == again


@pytest.mark.slow
def test_an_adversarial_run_that_was_killed_ends_bit_identical_too(data: Path, tmp_path: Path) -> None:
    terms = {"adversarial": 0.1, "feature_matching": 1.0, "spectrum": 1.0, "ssim": 0.1}
    loss = {**terms, "adversarial_start": 5, "discriminator_width": 4}
    whole, broken = (config(data, tmp_path, name, loss=loss) for name in ("whole", "killed"))
    train(whole)
    assert killed_at(7, signal.SIGKILL, broken).returncode == -signal.SIGKILL  # its last checkpoint is before the start
    model = train(broken)
    state = weights(tmp_path / "whole")
    assert same(state, weights(tmp_path / "killed"))
    assert any(key.startswith("criterion.adversary.discriminator.") for key in state)
    published = (model / "model.safetensors").read_bytes()
    assert published == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert not [key for key in load_file(model / "model.safetensors") if "adversary" in key or "criterion" in key]
    with open(tmp_path / "killed" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for term in ("ssim", "spectrum", "discriminator"):
        assert all(row[f"train/{term}"] for row in rows)
    for term in ("adversarial", "feature_matching"):
        assert [bool(row[f"train/{term}"]) for row in rows] == [False, True, True, True]


def test_until_its_start_an_adversary_changes_nothing_but_itself(data: Path, tmp_path: Path) -> None:
    def errors(name: str, **loss: float) -> list[str]:
        """Those of each logged step, before its update."""
        train(config(data, tmp_path, name, loss={**loss, "discriminator_width": 4}))
        with open(tmp_path / name / "metrics.csv") as file:
            return [row["train/l1"] for row in csv.DictReader(file)]

    plain, adversary = errors("plain"), {"adversarial": 10.0, "feature_matching": 10.0}
    assert errors("late", **adversary, adversarial_start=11) == plain
    early = errors("early", **adversary, adversarial_start=8)
    assert early[:3] == plain[:3]  # steps 2, 5 and 8
    assert early[3] != plain[3]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_where_it_is_and_says_how_to_go_on(
    data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    train(config(data, tmp_path, "whole"))
    stopped = config(data, tmp_path, "stopped")
    process = killed_at(7, number, stopped)
    assert process.returncode == code
    assert "step 7 of 12" in process.output
    assert "Traceback" not in process.output
    assert torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)["global_step"] == 7
    train(stopped)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    with open(tmp_path / "stopped" / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [3, 6, 9, 12]


def test_a_signal_told_twice_is_one_and_a_later_one_ends_it_at_once(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        checkpoint = Checkpoint(c, Run(c), {})
        with checkpoint.listening():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # as `uv run` hands on what the whole group has got
            assert checkpoint.stopped_by == signal.SIGINT
            checkpoint.asked -= 2 * AGAIN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_killed_after_the_last_step_publishes_the_same_bits(data: Path, tmp_path: Path) -> None:
    model = train(config(data, tmp_path))
    whole = (model / "model.safetensors").read_bytes()
    shutil.rmtree(model)
    train(config(data, tmp_path))
    assert (model / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_published_again(data: Path, tmp_path: Path, damaged: str) -> None:
    model = train(config(data, tmp_path))
    whole = (model / damaged).read_bytes()
    (model / damaged).write_bytes(whole[:-100])
    train(config(data, tmp_path))
    assert (model / damaged).read_bytes() == whole
    (model / damaged).write_bytes(whole[:-100])
    (tmp_path / "run" / "last.ckpt").unlink()
    with pytest.raises(UserError, match=rf"{damaged} is .* train or download"):
        train(config(data, tmp_path))


def test_validation_does_not_start_a_codebook(data: Path, tmp_path: Path) -> None:
    """Nor does anything else about it change a weight, at the step at which the quantiser begins to act."""
    found = []
    for every in (4, 12):
        options = {"trainer": {"validate_every": every}, "ema": {"decay": 0.0}}
        train(config(data, tmp_path, name=f"every-{every}", **options))
        found.append(weights(tmp_path / f"every-{every}"))
    assert same(*found)


def test_checkpoints_do_not_need_the_folder_for_temporary_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(data, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("mkstemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, full)
    train(c)


def test_metrics_are_on_disk_before_the_checkpoint_that_goes_on_behind_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, known = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if Path(target).name == "last.ckpt":
            with open(tmp_path / "run" / "metrics.csv", newline="") as file:
                known.append([int(row["step"]) for row in csv.DictReader(file)][-1])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    train(config(data, tmp_path, trainer={"log_every": 1}))
    assert known == [4, 8, 12]


def test_two_processes_do_not_train_one_run(data: Path, tmp_path: Path) -> None:
    mine, other = config(data, tmp_path), config(data, tmp_path, optimizer={"lr": 0.003})
    with Run(mine).locked(), pytest.raises(UserError, match=r"another process is training .*run"):
        train(mine)
    late = Run(other)  # nothing has begun yet: neither refuses
    with Run(mine).locked():
        with pytest.raises(UserError, match=r"another process is training .*run"):
            train(other)
        assert "lr: 0.002" in (tmp_path / "run" / "config.yaml").read_text()  # and not the other's
    train(mine)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.002 -> 0\.003"), late.locked():
        raise AssertionError("trains into the run of another config")
    assert "lr: 0.002" in (tmp_path / "run" / "config.yaml").read_text()


def test_each_training_of_a_process_has_a_wandb_log_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    short = {"trainer": {"max_steps": 6}, "logger": {"wandb": "offline"}}
    for name in ("first", "second"):
        train(config(data, tmp_path, name=name, **short))
        (log,) = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
        assert b"train/loss" in log.read_bytes()


def test_a_complete_run_is_left_alone(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path)
    model = train(c)
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert train(c) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--resume never"):
        train(c, resume="never")


def test_another_config_or_other_data_are_not_mixed_into_a_run(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path)
    train(c)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.002 -> 0\.003"):
        train(config(data, tmp_path, optimizer={"lr": 0.003}))
    train(config(data, tmp_path, trainer={"log_every": 5}))  # what changes no weight may change
    (tmp_path / "run" / "model").rename(tmp_path / "elsewhere")
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    checkpoint["fingerprint"]["data"] = "other"
    for step in (4, 12):  # unfinished, and trained to the end but not published
        checkpoint["global_step"] = step
        torch.save(checkpoint, tmp_path / "run" / "last.ckpt")
        with pytest.raises(UserError, match="another data"):
            train(c)


def test_a_published_model_of_other_data_is_not_taken_for_this_one(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path)
    path = train(c) / "config.json"
    published = json.loads(path.read_text())
    published["fingerprint"]["data"] = "other"
    path.write_text(json.dumps(published))
    with pytest.raises(UserError, match="run was trained with another data"):
        train(c)


def test_a_truncated_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    c = config(data, tmp_path)
    run = Run(c)
    with run.locked():
        run.last.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read"):
        train(c)


def test_fewer_images_than_a_batch(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch"):
        train(config(data, tmp_path, data={"batch_size": 500}))


class Waits(TorchDispatchMode):
    """The steps in which a tensor became a number of Python's: there a host waits for its GPU."""

    def __init__(self, module: StageModule) -> None:
        super().__init__()
        self.module, self.steps = module, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.steps.add(self.module.trainer.global_step)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_host_waits_for_no_gpu_between_rows_of_the_log(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Of our own loop; a codebook of vector-quantize-pytorch waits in every step to hear whether one of its codes died."""
    often = {"log_every": 6, "validate_every": 12, "checkpoint_every": 12, "accumulate": accumulate}
    quantizer = {"name": "fsq", "levels": [5, 5, 5, 5, 5]}
    c = config(data, tmp_path, autoencoder={"quantizer": quantizer}, trainer=often)
    waited = []

    def watched(module: StageModule, *rest: Any) -> None:
        with Waits(module) as waits:
            fit(module, *rest)
        waited.append(waits.steps)

    monkeypatch.setattr("stage1_vqvae.pipeline.fit", watched)
    train(c)
    assert waited == [{6, 12}]


def test_compile_reaches_what_the_loss_calls(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    train(config(data, tmp_path, trainer={"compile": True}))
    assert [type(module).__name__ for module in compiled] == ["VQVAE"]


def test_an_accelerator_that_is_not_there_is_told_at_once(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"trainer\.accelerator is gpu, but torch finds no GPU"):
        train(config(data, tmp_path, trainer={"accelerator": "gpu"}))


def test_a_full_disk_at_publication_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("shared.checkpoint.save_file", full)
    with pytest.raises(UserError, match=r"cannot write the model .* No space left"):
        train(config(data, tmp_path))
    monkeypatch.undo()
    train(config(data, tmp_path))


class Exploding(StageModule):
    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scale = 1.0 if self.trainer.global_step < 5 else float("nan")
        return self.network(batch).square().mean() * scale, {}

    def validate(self, folder: Path | None) -> dict[str, float]:
        return {}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_checkpoint(data: Path, tmp_path: Path) -> None:
    c, images = config(data, tmp_path), LensImages(data)
    run = Run(c)
    module = Exploding(c, nn.Conv2d(1, 1, 3), lambda i: images.batch(i.numpy()), 100)
    with pytest.raises(UserError, match=r"became nan at step 6.*lower --optimizer\.lr"):
        fit(module, run, {})
    state = weights(run.folder)
    assert torch.load(run.last, weights_only=True)["global_step"] == 4
    assert all(torch.isfinite(v).all() for v in state.values())


def test_no_checkpoint_is_kept_of_a_discriminator_that_is_no_number(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = VQVAEModule.loss

    def spoiled(self: VQVAEModule, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.trainer.global_step == 6:
            next(self.criterion.adversary.parameters()).data.fill_(torch.nan)
        return before(self, *batch)

    monkeypatch.setattr(VQVAEModule, "loss", spoiled)
    c = config(data, tmp_path, loss={"adversarial": 0.1, "discriminator_width": 4, "adversarial_start": 11})
    with pytest.raises(UserError, match="became nan"):
        train(c)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_full_disk_keeps_the_checkpoint_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning

    c = config(data, tmp_path)
    save = lightning.Trainer.save_checkpoint

    def full(self: lightning.Trainer, path: Path, *rest: object) -> None:
        if self.global_step > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(c)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not list((tmp_path / "run").glob("*.tmp"))
    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", save)
    train(c)


def test_ema_averages_parameters_and_copies_buffers() -> None:
    network = nn.BatchNorm1d(2)
    ema = EMA(network, 0.9)
    nn.init.constant_(network.weight, 3.0)
    network.running_mean.fill_(5.0)
    ema.update(network, step=10_000)
    assert torch.allclose(ema.module.weight, torch.full((2,), 0.9 * 1 + 0.1 * 3))
    assert torch.equal(ema.module.running_mean, network.running_mean)
    assert not any(m.training for m in ema.train().modules())


def test_ema_leaves_constants_alone() -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("constant", torch.zeros(3), persistent=False)
    ema = EMA(network, 0.9)
    network.constant.fill_(1.0)
    ema.update(network, step=1)
    assert torch.equal(ema.module.constant, torch.zeros(3))


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    scale = learning_rate_scale(10, 110, "linear")
    assert [scale(k) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0], rel=1e-6)
    assert scale(60) == pytest.approx(0.01 + 0.99 * 0.5)
    assert scale(110) == pytest.approx(0.01)
    assert learning_rate_scale(10, 110, "cosine")(60) == pytest.approx(0.505)
    assert learning_rate_scale(0, 100, "constant")(99) == 1.0


def test_step_keys_differ_in_every_part() -> None:
    keys = {step_key(a, b, c) for a in range(3) for b in range(50) for c in range(3)}
    assert len(keys) == 3 * 50 * 3
    assert all(0 <= k < 2**63 for k in keys)
