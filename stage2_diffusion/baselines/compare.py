"""Several systems in one table, and their quality against what a lens costs.

lens-ldm compare checkpoints/unet checkpoints/dit
lens-ldm compare configs/baselines --budget 10min --reference data/lenses --autoencoder checkpoints/vqvae

RUN is what `lens-ldm evaluate` has scored: the folder of a model, that of an evaluation, or a metrics.json. All of them need
the same reference, the same number of images and the same networks, or nothing would compare. Writes OUT.md and OUT.png.

With --reference, models are scored first, and RUN may be a config of stage 2, or a folder of them: each is trained in OUT for
the same time (--budget 10min) or the same operations (--budget 30TFLOP), then draws COUNT lenses that are scored. Then
OUT-lenses.png has some of each, below real ones. One system at a time; the same command goes on where it stopped.
Any key of the configs may be given, for all: --seed 1. Folders that come with the installation: baselines, variants.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.cli import Parser, at_least, positive
from shared.config import CONFIGS
from shared.data.export import stored_rows
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.evaluation.comparison import read, require_comparable, short_names, write
from shared.evaluation.verdict import SKIPPABLE
from shared.files import make_folder, require_name
from shared.report import rows, save_picture

COUNT, FITS, SHOWN = 500, 60, 8
OF_SCORES = ("metrics.json", "evaluation", "model", "config.json", "last.ckpt")  # what a folder of configs has none of


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm compare`."""
    parser = Parser(
        "lens-ldm compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a model or an evaluation, a metrics.json, or configs to train"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="OUT.md, OUT.png, runs in OUT (default: %(default)s)"
    )
    parser.add_argument("--reference", metavar="data/NAME", help="train on this data set, and score by its test split")
    parser.add_argument("--budget", help="of training each config: a time, 10min or 2h, or operations, 30TFLOP")
    parser.add_argument("--autoencoder", metavar="MODEL", help="of the configs on latents (default: each one's own)")
    parser.add_argument("--count", type=positive, help=f"lenses of each system that are scored (default: {COUNT})")
    parser.add_argument(
        "--fit", type=at_least(0), help=f"lens fits of each (default: {FITS} where the preset is known)"
    )
    parser.add_argument("--skip", nargs="+", choices=SKIPPABLE, help="of the scores")
    a, overrides = parser.parse_known_args(argv)
    require_name(a.out)
    make_folder(a.out.parent)
    if a.reference is not None:
        trained_and_scored(a, overrides)
        return
    if (
        given := [name for name in ("budget", "autoencoder", "count", "fit", "skip") if getattr(a, name) is not None]
        + overrides[:1]
    ):
        raise UserError(
            f"--{given[0].removeprefix('--')} is for training and scoring: say on what, --reference data/NAME"
        )
    if configs := [run for run in a.runs if configs_in(run)]:
        raise UserError(
            f"{configs[0]} is to be trained: say on what and for how long, --reference data/NAME --budget 10min"
        )
    found = [read(Path(run)) for run in a.runs]
    require_comparable(found, a.runs)
    print(write(a.out, found, short_names(a.runs)))
    print(f"{a.out}.md, {a.out}.png")


def configs_in(run: str) -> list[Path]:
    """The configs that RUN stands for, one or all of a folder, which may be one that came with the installation; none if it is
    a model or scores."""
    path = Path(run)
    if path.suffix in (".yaml", ".yml"):
        return [path]
    if any((folder / name).exists() for folder in (path, "checkpoints" / path) for name in OF_SCORES):
        return []
    found = (sorted(folder.glob("*.yaml")) for folder in (path, CONFIGS / path, CONFIGS.parent / path))
    return next(filter(None, found), [])


def trained_and_scored(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train what is to be trained and score what has no scores, one system at a time; all results anew after each."""
    a, out = options, options.out
    given = {run: configs_in(run) for run in a.runs}
    configs = [path for run in a.runs for path in given[run]]
    others = [run for run in a.runs if not given[run]]
    scores = [run for run in others if Path(run).is_file() or (Path(run) / "metrics.json").is_file()]
    if configs and a.budget is None:
        raise UserError("configs are trained for the same time each: say for which, --budget 10min")
    if a.budget is not None and not configs:
        raise UserError("--budget is for configs that are to be trained, and there are none")

    # here and below, for they take many seconds: not for a table or a mistake
    from stage2_diffusion.baselines.contest import Budget, score, systems, trained

    budget = Budget.of(a.budget) if configs else None
    count = a.count or COUNT
    real, transform, fits = _reference(a.reference, count, a.fit)
    models = [run for run in others if run not in scores]
    contestants = systems(configs, models, budget, a.reference, a.autoencoder, out, overrides)
    found, names = [read(Path(run)) for run in scores], short_names(scores)
    pictures = {f"{a.reference}: images that no system has seen": transform.unit(real)}
    for k, system in enumerate(contestants):
        print(f"[{k + 1}/{len(contestants)}] {system.name}", flush=True)
        folder = score(system, out, a.reference, count, fits, a.skip or [])
        found.append({**read(folder), "training": trained(system)})
        names.append(system.name)
        require_comparable(found, [*scores, *names[len(scores) :]])
        pictures[system.name] = transform.unit(_first_of(out / system.name / "samples" / "samples.npz"))
        text = write(out, found, names)
        save_picture(out.with_name(out.name + "-lenses.png"), rows(pictures))
    print(text)
    print(f"{out}.md, {out}.png, {out}-lenses.png")


def _reference(path: str, count: int, fits: int | None) -> tuple[Tensor, PixelTransform, int]:
    """Some test images, how their values are to be shown, and how many lens fits there are to be. UserError if there are too
    few images for the scores."""
    from shared.data.cache import LensImages
    from shared.evaluation.lenses import lens_fitter
    from shared.evaluation.reference import check_count, halves
    from shared.simulate.again import preset_of

    images = LensImages(path)
    check_count(images, path, count)
    if fits is None:
        fits = FITS if preset_of(images) is not None else 0
    if fits:
        lens_fitter(None, images)
    return images.batch(halves(images, count)[1][:SHOWN]), images.transform, fits


def _first_of(samples: Path) -> Tensor:
    return torch.from_numpy(next(stored_rows([samples], "images"))[:SHOWN].copy())
