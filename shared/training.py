"""The loop both stages share: a Lightning Trainer that counts in steps, logs, and can be killed at any of them.

Everything random in step k is keyed by (seed, k): the batch and how its images are turned are those of the whole batch,
of which each process takes its part; the rest because the global generator is reseeded before each step, by the rank, too.
So a run that was killed and resumed ends with the weights of one that was not.
"""

import contextlib
import csv
import hashlib
import io
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from shared.config import to_dict
from shared.data.cache import StepSampler
from shared.errors import UserError
from shared.files import write_atomically
from shared.optimizer import build_optimizer
from shared.precision import resolve_precision
from shared.processes import is_main_process, local_world, world
from shared.run import Run

SILENCE = 20.0  # seconds between lines of progress where there is no terminal
ELEMENT_STREAM = 1  # of a step's random numbers
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that ask a run to stop
AGREE = 10  # steps between the times at which processes tell each other that one was asked to stop
AGAIN = 1.0  # seconds within which a signal is the one before it, told twice


class EMA(nn.Module):
    """A shadow of `network` whose parameters are an exponential moving average; its buffers are copies.

    Early on the average is over the steps there were, so that a young shadow is not its initialisation.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = deepcopy(network).requires_grad_(False).eval()
        # The others are constants, such as the levels of FSQ.
        saved = network.state_dict().keys()
        self.learned = [name for name, _ in network.named_buffers() if name in saved]

    def kept(self, step: int) -> float:
        """The share of the average that is kept at a step; the rest is the network of that step."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1.0 - self.kept(step))
        mine, theirs = dict(self.module.named_buffers()), dict(network.named_buffers())
        for name in self.learned:
            mine[name].copy_(theirs[name])

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # a quantiser in train mode would go on learning


class PowerEMA(EMA):
    """A shadow whose weights in the average grow with a power of the step (Karras et al. 2024, arXiv 2312.02696, §3.1).

    length   standard deviation of those weights in time, over the time there was: as the run grows the average grows with
             it, so that one length suits runs of any number of steps
    """

    def __init__(self, network: nn.Module, length: float) -> None:
        super().__init__(network, decay=0.0)
        # length² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), their Eq. 126, has one root above 0 for lengths below 0.288.
        roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
        self.gamma = float(roots.real.max())

    def kept(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


class Steps:
    """The batches of a sampler, hiding their number: Lightning would take it for the length of an epoch, subtract the
    steps before a resume from it once more, and start the batches over."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class StageModule(lightning.LightningModule):
    """What to optimise, log and save, for either stage. A subclass gives `loss` and `validate`.

    network   trained; `shadow` is its moving average, or the network itself when the average is off
    batches   indices (N,) -> (N, ...) the data of a step, wherever they live; or a tuple of them and what `loss` takes
              beside them, each (N, ...)
    count     images
    chances   of the symmetries that may turn an image: index i + k count is image i, turned by the k-th of them
    """

    def __init__(
        self,
        config: Any,
        network: nn.Module,
        batches: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
        count: int,
        chances: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.config, self.batches, self.count, self.chances = config, batches, count, chances
        self.network = network
        self.ema = EMA(network, config.ema.decay) if config.ema.decay > 0 else None
        self.averages = nn.ModuleList()  # beside `ema`, for a stage that chooses among several

    @property
    def compiled_part(self) -> nn.Module:
        """What trainer.compile compiles: a module that the loss calls, for calling one of its methods compiles nothing."""
        return self.network

    @property
    def beside(self) -> list[dict[str, Any]]:
        """Groups of parameters outside the network that learn with it and are not published."""
        return []

    @property
    def shadow(self) -> nn.Module:
        return self.ema.module if self.ema is not None else self.network

    def loss(self, batch: Tensor, *beside: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """batch (N, ...), as `batches` gives it -> the scalar to minimise, and what to log beside it."""
        raise NotImplementedError

    def validate(self, folder: Path | None) -> dict[str, float]:
        """Metrics of the shadow, which is in eval mode, on held-out data; pictures into `folder` where one is given."""
        raise NotImplementedError

    def score(self) -> dict[str, float]:
        """Metrics of the shadow, which is in eval mode, that are too dear for `validate`: every trainer.score_every steps."""
        raise NotImplementedError

    def train_dataloader(self) -> "Steps":
        size, world, parts = self.config.data.batch_size, self.trainer.world_size, self.config.trainer.accumulate
        if size % (world * parts):
            times = f" times trainer.accumulate {parts}" if parts > 1 else ""
            raise UserError(
                f"data.batch_size {size} does not divide by the {world} processes{times}: "
                f"choose a multiple of {world * parts}"
            )
        sampler = StepSampler(
            self.count,
            size // world,
            self.config.seed,
            start_step=self.trainer.global_step,
            max_steps=self.config.trainer.max_steps,
            rank=self.trainer.global_rank,
            world=world,
        )
        return Steps(sampler)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(step_key(self.config.seed, self.trainer.global_step, self.trainer.global_rank))

    def training_step(self, indices: Any, batch_idx: int) -> dict[str, Any]:
        given = self.batches(torch.as_tensor(indices) + self.count * self.drawn(len(indices)))
        batch, *beside = (part.to(self.device, non_blocking=True) for part in _tuple(given))
        if self.config.trainer.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        # Parts of a step are a loop in here, where Lightning's own accumulation would make steps of them for everything
        # that counts. What DDP does is right as it is: it reduces gradients in the backward pass after this method alone,
        # and then all that has added up.
        parts = self.config.trainer.accumulate
        total: Any = 0
        logs: dict[str, Any] = {}
        for number, part in enumerate(zip(*(tensor.chunk(parts) for tensor in (batch, *beside)), strict=True), 1):
            loss, terms = self.loss(*part)
            loss = loss / parts
            logs = {name: logs.get(name, 0) + term.detach() / parts for name, term in terms.items()}
            if number < parts:
                with torch.autocast(self.device.type, enabled=False):  # of a backward pass torch advises against it
                    loss.backward()
                loss = loss.detach()
            total = total + loss  # the value is that of the batch, the graph that of its last part
        return {"loss": total, "logs": logs}

    def drawn(self, n: int) -> Tensor:
        """Which symmetry turns each of this process's n images of this step: a function of (seed, step) and their places
        in the whole batch."""
        if len(self.chances) == 1:
            return torch.zeros(n, dtype=torch.long)
        # A generator of its own, so that the noise of the step is the same whatever turns its images.
        key = step_key(self.config.seed, self.trainer.global_step, 0, ELEMENT_STREAM)
        generator, world = torch.Generator().manual_seed(key), self.trainer.world_size
        whole = torch.multinomial(torch.tensor(self.chances), n * world, replacement=True, generator=generator)
        return whole.chunk(world)[self.trainer.global_rank]

    def optimizer_zero_grad(self, *args: Any) -> None:
        pass  # Lightning would do it before the last part of a step: `optimizer_step` does

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # and what learns beside the network
        # Here and not in on_train_batch_end, which Lightning calls after the callbacks: a checkpoint would lack this step.
        for average in (*([self.ema] if self.ema is not None else []), *self.averages):
            average.update(self.network, self.trainer.global_step + 1)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        # By hand: Lightning refuses to clip for a fused optimiser under bf16. Not of what learns beside the network,
        # whose gradients would then change the length of the network's.
        if self.config.optimizer.gradient_clip > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.gradient_clip)

    def configure_optimizers(self) -> Any:
        o = self.config.optimizer
        optimizer = build_optimizer(
            self.network,
            name=o.name,
            lr=o.lr,
            betas=tuple(o.betas),
            weight_decay=o.weight_decay,
            beside=self.beside,
        )
        scale = learning_rate_scale(o.warmup_steps, self.config.trainer.max_steps, o.decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def recompute_blocks(network: nn.Module) -> None:
    """Let the blocks of a network forget all but their inputs and compute it again, with the same random numbers, when
    the backward pass needs it (Chen et al. 2016). A class of modules that may is marked `recomputable`: it has no state
    that a forward pass changes."""
    for block in network.modules():
        if getattr(block, "recomputable", False):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _tuple(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return given if isinstance(given, tuple) else (given,)


def step_key(*parts: int) -> int:
    """A 63-bit seed that is a function of its parts, such as (seed, step, rank)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def learning_rate_scale(warmup: int, steps: int, decay: str) -> Callable[[int], float]:
    """Step -> factor of the learning rate: linear warm-up, then `linear` or `cosine` decay to 1 %, or `constant`."""

    def scale(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, warmup))
        x = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        fall = {"linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x)), "constant": 1.0}[decay]
        return rise * (0.01 + 0.99 * fall)

    return scale


# --- callbacks --------------------------------------------------------------------------------------------------------


class Monitor(Callback):
    """Progress bar, logged metrics, held-out metrics and pictures; stops a run whose loss is no longer a number."""

    def __init__(self, config: Any, run: Run) -> None:
        self.config, self.run = config, run
        self.bar: tqdm | None = None
        self.mark = (0, 0.0)
        self.told = time.perf_counter()

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.mark = (trainer.global_step, time.perf_counter())
        if trainer.is_global_zero:
            self.bar = tqdm(
                desc=self.config.name, total=self.config.trainer.max_steps, initial=trainer.global_step,
                unit="step", disable=None if self.config.trainer.progress else True, dynamic_ncols=True, mininterval=1,
            )  # fmt: skip

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, t = trainer.global_step, self.config.trainer
        if step % t.log_every == 0 or step == t.max_steps:
            # Of the whole batch: each process has the mean of an equal part. All of them stop if one has no number.
            mean = partial(trainer.strategy.reduce, reduce_op="mean")
            loss, logs = float(mean(outputs["loss"])), {k: float(mean(v)) for k, v in outputs["logs"].items()}
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {self.config.name} became {loss} at step {step}: its last checkpoint is kept, but would "
                    f"meet the same end; start again with another --name and a lower --optimizer.lr (now "
                    f"{self.config.optimizer.lr}), or with --trainer.precision fp32"
                )
            now = time.perf_counter()
            speed = (step - self.mark[0]) * len(batch) * trainer.world_size / max(1e-9, now - self.mark[1])
            self.mark = (step, now)
            metrics = {"loss": loss, **logs, "images_per_second": speed}
            metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self._log(trainer, {f"train/{k}": v for k, v in metrics.items()})
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
                if t.progress and self.bar.disable and (now - self.told > SILENCE or step == t.max_steps):
                    self.told = now  # no terminal for a bar: a line now and then
                    left = (t.max_steps - step) * len(batch) * trainer.world_size / max(1e-9, speed) / 60
                    print(
                        f"step {step} of {t.max_steps}, loss {loss:.4f}, {speed:.0f} images/s, {left:.0f} min left",
                        flush=True,
                    )
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if trainer.is_global_zero:
            every = getattr(t, "score_every", 0)  # which stage 1 does not have
            validate, score = step % t.validate_every == 0 or step == t.max_steps, every > 0 and step % every == 0
            if validate or score:
                paused, was_training = time.perf_counter(), module.shadow.training
                module.shadow.eval()  # a quantiser in train mode would learn, and dropout drop
                metrics = module.score() if score else {}
                if validate:
                    metrics |= module.validate(self.run.folder / "samples")
                module.shadow.train(was_training)
                self._log(trainer, {f"validation/{k}": v for k, v in metrics.items()})
                self.mark = (self.mark[0], self.mark[1] + time.perf_counter() - paused)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()

    def _log(self, trainer: Any, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class Checkpoint(Callback):
    """Keeps last.ckpt: every so many steps, at the end, and when a signal asks the run to stop."""

    def __init__(self, config: Any, run: Run, fingerprint: dict[str, str]) -> None:
        self.every, self.path, self.fingerprint = config.trainer.checkpoint_every, run.last, fingerprint
        self.stopped_by = 0  # the number of the signal that asks for the end
        self.asked = 0.0  # when it came
        self.before: dict[int, Any] = {}  # the handlers that were there

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals that ask for the end as such, from the main thread."""
        self.before = {number: signal.signal(number, self.stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def stop(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        # A second Ctrl-C ends it at once. What comes with the first is that one again: `uv run` and torchrun hand on what a
        # cluster or a terminal has told the processes themselves.
        if self.stopped_by and world() == 1 and now > self.asked + AGAIN:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        if not self.stopped_by:
            self.stopped_by, self.asked = number, now

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # In place of Lightning's handler, with which processes talk about it in the middle of talking about gradients.
        if not self.stopped_by:
            signal.signal(signal.SIGTERM, self.stop)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["fingerprint"] = self.fingerprint

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stopped = self.stopped_by
        if trainer.world_size > 1:  # a signal reaches them at different steps, and they must stop at the same
            heard, stopped = torch.tensor(stopped, device=module.device), 0
            if trainer.global_step % AGREE == 0:
                stopped = int(trainer.strategy.reduce(heard, reduce_op="max"))
        if stopped or trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            # A checkpoint that cannot go on must not replace one that can. All processes have the same parameters.
            if all(bool(parameter.isfinite().all()) for parameter in module.parameters() if parameter.requires_grad):
                self._save(trainer)
            self.stopped_by = stopped or self.stopped_by
            trainer.should_stop = trainer.should_stop or bool(stopped)

    def _save(self, trainer: Any) -> None:
        temporary = self.path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(temporary)
            for logger in trainer.loggers:  # first: rows beyond the checkpoint are dropped, rows before it are not
                logger.save()
            if trainer.is_global_zero:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; "
                "the checkpoint before it is kept, and the same command goes on from there"
            ) from error


class Local(TorchCheckpointIO):
    """Checkpoints written where they belong. Lightning's own way leads through $TMPDIR, which may be small, and full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        content = io.BytesIO()  # torch reports a full disk as an error of its own
        torch.save(checkpoint, content)
        Path(path).write_bytes(content.getbuffer())


class CSVLog(Logger):
    """metrics.csv: one row a step. A resumed run keeps the rows up to the step it resumes from."""

    def __init__(self, path: Path, start_step: int) -> None:
        super().__init__()
        self.path, self.rows = path, {}
        if path.exists() and start_step > 0:
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("step", "").isdigit() and int(row["step"]) <= start_step:
                        self.rows[int(row["step"])] = {k: v for k, v in row.items() if v and k != "step"}

    name = version = None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update({k: f"{v:.6g}" for k, v in metrics.items()})

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml has them

    @rank_zero_only
    def save(self) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["step", *sorted({key for row in self.rows.values() for key in row})])
        writer.writeheader()
        writer.writerows({"step": step, **self.rows[step]} for step in sorted(self.rows))
        write_atomically(self.path, table.getvalue().encode())

    def finalize(self, status: str) -> None:
        pass  # saved with each checkpoint: rows beyond the last one belong to steps that will be repeated


def wandb_logger(config: Any, run: Run) -> WandbLogger | None:
    """wandb where it is wanted: online with an account, offline without one; never a prompt, never a crash."""
    mode = config.logger.wandb
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "")
        if mode not in ("online", "offline"):
            try:
                mode = "online" if wandb.login(prompt=False, timeout=20) else "offline"
            except Exception:  # no network, a key that is refused: the run matters more than its log
                mode = "offline"
    try:
        options = {"dir": str(run.folder), "mode": mode, "settings": wandb.Settings(init_timeout=20, silent=True)}
        experiment = wandb.init(project=config.logger.project, name=config.name, config=to_dict(config), **options)
    except Exception as error:
        tqdm.write(f"wandb is off for this run ({type(error).__name__}: {error}); metrics.csv has everything")
        return None
    if mode == "offline":
        tqdm.write(
            f"wandb: no account here, logging offline; `wandb sync {Path(experiment.dir).parent}` uploads it later"
        )
    return WandbLogger(experiment=experiment)


# --- fit --------------------------------------------------------------------------------------------------------------


def fit(module: StageModule, run: Run, fingerprint: dict[str, str], callbacks: Sequence[Callback] = ()) -> None:
    """Train `module` to trainer.max_steps, from last.ckpt where there is one, as the only process that does (of its group).

    fingerprint   what must not change between a run and its continuation, beyond the config: the data, the autoencoder
    callbacks     of Lightning, beside those that every run has
    SystemExit    130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1 (a cluster's warning), once the state is saved
    """
    with run.locked() if is_main_process() else contextlib.nullcontext():
        _fit(module, run, fingerprint, callbacks)


def _fit(module: StageModule, run: Run, fingerprint: dict[str, str], callbacks: Sequence[Callback]) -> None:
    t = run.config.trainer
    quiet()
    saved = read_checkpoint(run, fingerprint)
    start = int(saved["global_step"]) if saved else 0
    if t.channels_last:
        module.to(memory_format=torch.channels_last)
    if saved and start >= t.max_steps:
        module.load_state_dict(saved["state_dict"])
        return
    del saved  # or else it stays in memory until the last step
    if t.checkpoint_gradients:
        recompute_blocks(module.network)  # not its shadow, which has no backward pass
    if t.compile:
        module.compiled_part.compile()
    loggers: list[Logger] = [CSVLog(run.folder / "metrics.csv", start)]
    online = wandb_logger(run.config, run) if is_main_process() else None
    if online is not None:
        loggers.append(online)
    checkpoint = Checkpoint(run.config, run, fingerprint)
    trainer = lightning.Trainer(
        accelerator=t.accelerator,
        # Several devices are torchrun's to start: Lightning would start this whole command again in each process.
        devices=local_world(),
        num_nodes=world() // local_world(),
        # While a quantiser is not acting yet, its own parameters have no gradient.
        strategy="ddp_find_unused_parameters_true" if world() > 1 else "auto",
        precision="bf16-mixed" if resolve_precision(t.precision, t.accelerator) == "bf16" else "32-true",
        max_steps=t.max_steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=loggers,
        callbacks=[Monitor(run.config, run), checkpoint, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder,
        plugins=[Local()],
    )

    # The exception is Lightning's own, after our checkpoint; it would exit with 0.
    try:
        with checkpoint.listening(), contextlib.suppress(SIGTERMException):
            trainer.fit(module, ckpt_path=run.last if start else None, weights_only=True)
    finally:
        if online is not None:
            online.experiment.finish()  # or else the next training of this process, as after a guide's, goes on in its log
    if checkpoint.stopped_by or trainer.global_step < t.max_steps:
        tqdm.write(
            f"{run.config.name} stopped at step {trainer.global_step} of {t.max_steps}; the same command goes on"
        )
        raise SystemExit(128 + (checkpoint.stopped_by or signal.SIGTERM))


def read_checkpoint(run: Run, fingerprint: dict[str, str]) -> dict[str, Any] | None:
    """last.ckpt, or None where there is none. UserError if it is damaged, or not of this fingerprint."""
    if not run.last.exists():
        return None
    try:
        checkpoint = torch.load(run.last, weights_only=True, map_location="cpu")
        _, found = int(checkpoint["global_step"]), dict(checkpoint["fingerprint"])
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise UserError(
            f"{run.last} cannot be read ({type(error).__name__}): delete it to start this run again"
        ) from error
    run.compare(found, fingerprint)
    return checkpoint


def quiet() -> None:
    """Silence what Lightning says of every run and no user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
    torch.set_float32_matmul_precision("high")
