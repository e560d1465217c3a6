"""From nothing to scored lenses on two CPU cores: simulate, train both stages, sample, evaluate, report.

    lens-ldm quickstart                              # some ten minutes
    lens-ldm quickstart --config smoke.yaml          # the same in under a minute, too small for science

Every part goes on where it stopped, so the command can be interrupted and run again.
"""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from shared.config import parse_arguments
from shared.schema import Quickstart


def main(argv: list[str] | None = None) -> None:
    config, options = parse_arguments(argv, Quickstart, __doc__, default_config="quickstart.yaml")
    stage1, stage2 = config.stages()  # a mistake in either is reported before the first part starts
    out = Path(config.output) / config.name
    model = f"{stage2.output}/{stage2.name}"
    samples = ["--count", str(config.samples.count), "--steps", str(config.samples.steps), "--out", str(out)]
    scores = ["--reference", config.data.path, "--out", str(out)]
    scores += ["--count", str(config.evaluate.count), "--fit", str(config.evaluate.fit)]
    parts: dict[str, Callable[[], Any]] = {
        f"simulate {config.data.count} lenses of `{config.data.preset}` into {config.data.path}": lambda: simulate(
            config
        ),
        f"stage 1: train the autoencoder, {stage1.trainer.max_steps} steps": lambda: script("stage1_vqvae.pipeline")(
            stage1, options.resume
        ),
        f"stage 2: train the diffusion model, {stage2.trainer.max_steps} steps": lambda: script(
            "stage2_diffusion.pipeline"
        )(stage2, options.resume),
        f"sample {config.samples.count} lenses": lambda: script("stage2_diffusion.sample", "main")([model, *samples]),
        f"score {config.evaluate.count} of them and write the report": lambda: script(
            "stage2_diffusion.evaluate", "main"
        )([model, "--samples", str(out / "samples.npz"), *scores]),
    }
    expected = config.seconds.model_dump().values()
    started, left = time.perf_counter(), sum(expected)
    planned, took = 0.0, 0.0
    for k, ((what, part), seconds) in enumerate(zip(parts.items(), expected, strict=True)):
        # The plan is that of two idle cores; the parts that ran here tell how much slower or faster this machine is.
        pace = took / planned if planned else 1.0
        print(f"[{k + 1}/{len(parts)}] {what} (about {clock(left * pace)} left)", flush=True)
        begun = time.perf_counter()
        part()
        seconds_here = time.perf_counter() - begun
        if seconds_here > 0.3 * seconds:  # a part that was kept from an earlier call tells nothing
            planned, took = planned + seconds, took + seconds_here
        left -= seconds
    print(f"done in {clock(time.perf_counter() - started)}. Look at:")
    for file, what in (
        ("report.html", "real and generated lenses side by side, loss curves, scores with floors"),
        ("grid.png", "generated lenses"),
        ("samples.npz", f"all {config.samples.count} of them, as arrays with their seeds"),
        ("metrics.json", "the scores"),
    ):
        print(f"  {out / file}: {what}")
    print(f"More lenses: lens-ldm sample {model} --count 1000 --seed 1000 --out samples")


def simulate(config: Quickstart) -> None:
    from shared.data.cache import LensImages
    from shared.evaluation.reference import check_count
    from shared.simulate.preset import Preset
    from shared.simulate.run import simulate_to

    simulate_to(Path(config.data.path), Preset.load(config.data.preset), config.data.count, config.seed)
    # How many images the test split got is known only now, and not to be found out after training.
    check_count(LensImages(config.data.path), config.data.path, config.evaluate.count)


def script(module: str, function: str = "train") -> Callable[..., Any]:
    """A stage's script by name: `shared` imports neither stage."""
    return getattr(import_module(module), function)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
