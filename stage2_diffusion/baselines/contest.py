"""Train each of several systems, a config each, for the same time or the same operations, draw lenses from it and score
it: what `lens-ldm compare` does with configs.

How many steps a system gets follows from what a step costs, which is measured on a few before any training starts and kept
in <out>/plan.json: a system that is stopped goes on, and ends where it would have.
"""

import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from shared.checkpoint import find_model, find_run, read_config
from shared.config import changed, load_config, merge, parse_overrides, to_dict
from shared.data.cache import LensImages
from shared.data.symmetries import turns
from shared.errors import UserError
from shared.evaluation.comparison import short_names
from shared.files import make_folder, write_atomically
from shared.precision import resolve_precision
from shared.report import read_metrics
from shared.run import HARMLESS, Run, flatten
from shared.schema import Adversarial, Stage2
from shared.training import fit
from stage2_diffusion import evaluate, sample
from stage2_diffusion.module import Latents, steps_alone
from stage2_diffusion.pipeline import UNGUIDED, autoencoder_of, conditions_of, module_of, train

COUNTED = 3  # steps, at least, whose operations are counted before others are timed
TIMED, PATIENCE = 60, 15.0  # steps that are timed, or fewer of those that take long [s]
UNITS = {"s": ("seconds", 1.0), "min": ("seconds", 60.0), "h": ("seconds", 3600.0), "tflop": ("gflop", 1000.0)}
AT_ONCE = 16  # lenses: what a kill loses of systems that take long for one


@dataclass(frozen=True)
class StepCost:
    """Of a training step on this machine. gflop: of its forward and backward passes and what the optimiser multiplies."""

    seconds: float
    gflop: float


@dataclass(frozen=True)
class Budget:
    """The same for each system: `amount` of seconds of training, or of GFLOP."""

    text: str
    unit: str
    amount: float

    @classmethod
    def of(cls, text: str) -> "Budget":
        """UserError unless it is like 10min, 2h, 90s or 30TFLOP."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|tflop)", text.strip(), re.IGNORECASE)
        if found is None or float(found[1]) <= 0:
            raise UserError(
                f"--budget {text}: give a time or operations of training, such as 10min, 2h, 90s or 30TFLOP"
            )
        unit, scale = UNITS[found[2].lower()]
        return cls(text, unit, float(found[1]) * scale)

    def steps(self, cost: StepCost) -> int:
        """How many steps it is enough for, at least one."""
        return max(1, int(self.amount / getattr(cost, self.unit)))


Config = Stage2 | Adversarial


class Trial(Callback):
    """Counts the operations of a few steps, times some more, and ends the training by an exception."""

    class Over(Exception):
        pass

    def __init__(self, period: int = 1) -> None:
        """period: after so many steps the next ones are as those before"""
        self.counter, self.steps, self.seconds, self.gflop = FlopCounterMode(display=False), 0, 0.0, 0.0
        self.started, self.period, self.counted = 0.0, period, period * -(-COUNTED // period)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.steps == 0:
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        now, timed = time.perf_counter(), self.steps - self.counted
        if timed == 0:
            self.counter.__exit__(None, None, None)
            self.gflop, self.started = self.counter.get_total_flops() / 1e9 / self.counted, now
        elif timed >= COUNTED and timed % self.period == 0 and (timed >= TIMED or now - self.started > PATIENCE):
            self.seconds = (now - self.started) / timed
            raise Trial.Over


def step_cost(config: Config) -> StepCost:
    """What a step of this config costs here."""
    trial = Trial(1 if isinstance(config, Stage2) else min(config.adversary.updates, TIMED))
    try_out(config, trial)
    return StepCost(trial.seconds, trial.gflop)


def try_out(config: Config, callback: Callback) -> None:
    """Train on random latents until the callback raises Trial.Over. Nothing is kept."""
    images, batch = LensImages(config.data.path), config.data.batch_size
    if (count := len(images.split("train"))) < batch:
        raise UserError(f"{config.name}: {images.path} has {count} images to train on, fewer than a batch of {batch}")
    autoencoder, _ = autoencoder_of(config, images)
    conditions = conditions_of(config, images, turns(images, "none"))
    data = Latents.random(autoencoder.latent_shape, conditions, 2 * batch)
    precision = resolve_precision(config.trainer.precision, config.trainer.accelerator)
    with tempfile.TemporaryDirectory() as folder, suppress(Trial.Over):
        config = steps_alone(config, folder, compile=False)  # or a minute of it would be timed with the steps
        fit(module_of(config, data, autoencoder, precision, conditions), Run(config), {}, [callback])


@dataclass(frozen=True)
class System:
    """What is compared: a config that is to be trained, or a model as it is (config None)."""

    name: str
    model: Path
    config: Config | None = None
    plan: dict[str, Any] | None = None


def systems(
    configs: Sequence[Path],
    models: Sequence[str],
    budget: Budget | None,
    reference: str,
    autoencoder: str | None,
    out: Path,
    overrides: Sequence[str],
) -> list[System]:
    """All of them, once every config is right and the cost of its step is known.

    budget       of each config; None without configs
    autoencoder  of those configs that are not on pixels
    overrides    of all configs, as on a command line
    UserError    for whatever is wrong with any of them, before anything is trained
    """
    folders = [find_run(model) for model in models]
    labels = ("-".join(Path(name).parts) for name in short_names([str(folder.resolve()) for folder in folders]))
    as_they_are = [System(label, folder) for label, folder in zip(labels, folders, strict=True)]
    told = [
        system.name
        for system in as_they_are
        if read_config(find_model(system.model)).get("conditions", {}).get("entries")
    ]
    found: list[Config] = []
    for path in configs:
        given = merge(parse_overrides(overrides), {"output": str(out), "data": {"path": reference}})
        config: Config = load_config(Stage2, [path], given)
        links: dict[str, Any] = {}
        if config.autoencoder != "pixels":
            links["autoencoder"] = str(find_run(autoencoder or config.autoencoder))
        if config.logger.wandb == "auto":
            links["logger"] = {"wandb": "disabled"}  # a dozen short runs are noise there, unless they are asked for
        found.append(changed(config, links))
        if isinstance(config, Stage2) and (config.condition.parameters or to_dict(config)["condition"]["class"]):
            told.append(config.name)
    if told:
        raise UserError(
            f"{told[0]} is asked for its lenses, which is not done here: score it by `lens-ldm evaluate`, and compare that"
        )
    names = [config.name for config in found] + [system.name for system in as_they_are]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"two of them are called {twice[0]}: give one another name")
    plans, planned = Plans(out / "plan.json"), []
    for config in found:
        assert budget is not None
        plan = plans.of(config, budget)
        print(
            f"{config.name}: {plan['steps']} steps of {plan['seconds']:.3g} s and {plan['gflop']:.3g} GFLOP", flush=True
        )
        planned.append(System(config.name, out / config.name, within(config, plan["steps"]), plan))
    return planned + as_they_are


def within(config: Config, steps: int) -> Config:
    """The config for so many steps: validated once, saved now and then, and warmed up within a tenth of them. Without the
    guide, whose training no budget counts."""
    trainer = {
        "max_steps": steps, "validate_every": steps, "score_every": 0,
        "checkpoint_every": max(1, steps // 10), "log_every": max(1, steps // 20),
    }  # fmt: skip
    warmup = {"warmup_steps": min(config.optimizer.warmup_steps, steps // 10)}
    alone = UNGUIDED if isinstance(config, Stage2) else {}
    return changed(config, {"trainer": trainer, "optimizer": warmup, **alone})


def dear(config: Config) -> list[tuple[str, Any]]:
    """The keys that a step costs more or less by."""
    cheap = ("name", "seed", "guide", "diffusion", "optimizer", "ema", *HARMLESS)
    but = ("diffusion.ssim", "optimizer.name", "trainer.checkpoint_gradients")
    return [pair for pair in flatten(to_dict(config)) if not pair[0].startswith(cheap) or pair[0] in but]


def _digest(pairs: list[tuple[str, Any]], *more: str) -> str:
    return hashlib.sha256(" ".join([json.dumps(pairs, default=str), *more]).encode()).hexdigest()[:16]


class Plans:
    """plan.json: what a step of each config costs, and how many of them are within the budget.

    Configs whose steps cost the same by what is in them are measured once, so that they get the same number of steps and
    none has more for the rest of the machine's being idle.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kept = path, {}
        if path.is_file():
            try:
                self.kept = dict(json.loads(path.read_text()))
            except (ValueError, TypeError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): delete it to plan again") from error

    def of(self, config: Config, budget: Budget) -> dict[str, Any]:
        own = [pair for pair in flatten(to_dict(config)) if not pair[0].startswith(HARMLESS)]
        key = f"{config.name} {_digest(own, budget.text)}"  # beside those of other budgets: each goes on with its own
        plan = self.kept.get(key)
        if plan is None:
            like, threads = _digest(dear(config)), torch.get_num_threads()
            same = (one for one in self.kept.values() if (one.get("like"), one["threads"]) == (like, threads))
            known = next(same, None)
            cost = step_cost(config) if known is None else StepCost(known["seconds"], known["gflop"])
            plan = {
                "budget": budget.text, "steps": budget.steps(cost), **asdict(cost), "threads": threads, "like": like,
            }  # fmt: skip
            self.kept[key] = plan
            make_folder(self.path.parent)
            write_atomically(self.path, (json.dumps(self.kept, indent=1) + "\n").encode())
        return plan


def score(system: System, out: Path, reference: str, count: int, fits: int, skip: Sequence[str]) -> Path:
    """Train a system where it is to be trained, draw `count` lenses, evaluate them -> the folder of its scores. What is
    there is not done again."""
    folder = out / system.name
    if system.config is not None:
        train(system.config)
    drawn, scored = folder / "samples", folder / f"evaluation-{count}"
    common = ["--count", str(count), "--out"]
    options = ["--samples", str(drawn / "samples.npz"), "--reference", reference, "--fit", str(fits)]
    options += ["--skip", *skip] if skip else []
    command = [str(system.model), *options, *common, str(scored)]
    wanted = {
        "command": shlex.join(["lens-ldm", "evaluate", *command]),
        "weights_sha256": read_config(find_model(system.model))["sha256"],
        "reference_fingerprint": LensImages(reference).fingerprint,
    }
    with suppress(OSError, ValueError, AttributeError):
        if json.loads((scored / "metrics.json").read_text()).items() >= wanted.items():
            return scored
    sample.main([str(system.model), "--batch-size", str(AT_ONCE), *common, str(drawn)])
    evaluate.main(command)
    return scored


def trained(system: System) -> dict[str, Any]:
    """What its training took: {steps, seconds, tflop}; empty for a model that was there."""
    if system.config is None or system.plan is None:
        return {}
    rows = [row for row in read_metrics(system.model / "metrics.csv") if "train/images_per_second" in row]
    before = [0.0, *(row["step"] for row in rows)]
    seconds = sum(
        (row["step"] - last) * system.config.data.batch_size / row["train/images_per_second"]
        for row, last in zip(rows, before, strict=False)
    )
    steps = system.plan["steps"]
    return {"steps": steps, "seconds": seconds, "tflop": steps * system.plan["gflop"] / 1000}
