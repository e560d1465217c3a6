"""Several systems in one table, and their quality against what a lens costs.

lens-ldm compare checkpoints/unet checkpoints/dit
lens-ldm compare configs/baselines --budget 10min --reference data/lenses --autoencoder checkpoints/vqvae

RUN is what `lens-ldm evaluate` has scored: the folder of a model, that of an evaluation, or a metrics.json. All of them need
the same reference, the same number of images and the same networks, or nothing would compare. Writes OUT.md and OUT.png.

With --reference, models are scored first, and RUN may be a config of stage 2, or a folder of them: each is trained in OUT for
the same time (--budget 10min) or the same operations (--budget 30TFLOP), then draws COUNT lenses that are scored. Then
OUT-lenses.png has some of each, below real ones. One system at a time; the same command goes on where it stopped.
Any key of the configs may be given, for all: --seed 1.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shared.cli import Parser, at_least, positive
from shared.data.cache import LensImages
from shared.data.export import stored_rows
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.evaluation import tables
from shared.evaluation.verdict import FAR, OPTIONAL, off
from shared.files import make_folder, markdown, write_atomically
from shared.report import colour_of, panels, rasterise, save_picture
from shared.report import rows as rows_of_pictures

Metrics = Mapping[str, Any]
COSTS = {"gflop": "GFLOP a lens", "milliseconds": "ms a lens"}
COUNT, FITS, SHOWN, NAMED = 500, 60, 8, 3
ABOUT = """n = {n} samples of each, against {reference}. Excess: of the Fréchet distance of samples over that of other real \
images, whose scatter is behind ±; its decoder alone: that of real images through its encoder and decoder. Quantities: \
whose Wasserstein-1 distance is over {far:g} times that of real sets. Lenses: of {fits} samples, those that a lens model \
fits at the level of their noise, with the 95 % interval. Told apart: by a classifier of samples and real images; 0.5 is \
perfect. Copies: of training images among the samples. GFLOP and time of a lens: drawing and decoding it.
"""
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
    parser.add_argument("--skip", nargs="+", choices=OPTIONAL, help="of the scores")
    a, overrides = parser.parse_known_args(argv)
    make_folder(a.out.parent)
    if a.reference is not None:
        contest(a, overrides)
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
    """The configs that RUN stands for; none if it is a model or scores."""
    path = Path(run)
    if path.is_dir() and not any((path / name).exists() for name in OF_SCORES):
        return sorted(path.glob("*.yaml"))
    return [path] if path.suffix in (".yaml", ".yml") else []


def contest(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train what is to be trained and score what has no scores, one system at a time; all results anew after each."""
    a, out = options, options.out
    configs = [path for run in a.runs for path in configs_in(run)]
    others = [run for run in a.runs if not configs_in(run)]
    scores = [run for run in others if Path(run).is_file() or (Path(run) / "metrics.json").is_file()]
    if configs and a.budget is None:
        raise UserError("configs are trained for the same time each: say for which, --budget 10min")
    if a.budget is not None and not configs:
        raise UserError("--budget is for configs that are to be trained, and there are none")
    stage2 = import_module("stage2_diffusion.contest")  # by name: `shared` imports neither stage
    budget = stage2.Budget.of(a.budget) if configs else None
    count = a.count or COUNT
    real, transform, fits = _reference(a.reference, count, a.fit)
    models = [run for run in others if run not in scores]
    systems = stage2.systems(configs, models, budget, a.reference, a.autoencoder, out, overrides)
    found, names = [read(Path(run)) for run in scores], short_names(scores)
    pictures = {f"{a.reference}: images that no system has seen": transform.unit(real)}
    for k, system in enumerate(systems):
        print(f"[{k + 1}/{len(systems)}] {system.name}", flush=True)
        folder = stage2.score(system, out, a.reference, count, fits, a.skip or [])
        found.append({**read(folder), "training": stage2.trained(system)})
        names.append(system.name)
        require_comparable(found, [*scores, *names[len(scores) :]])
        pictures[system.name] = transform.unit(_first_of(out / system.name / "samples" / "samples.npz"))
        text = write(out, found, names)
        save_picture(out.with_name(out.name + "-lenses.png"), rows_of_pictures(pictures))
    print(text)
    print(f"{out}.md, {out}.png, {out}-lenses.png")


def _reference(path: str, count: int, fits: int | None) -> tuple[Tensor, PixelTransform, int]:
    """Some test images, how their values are to be shown, and how many lens fits there are to be. UserError if there are too
    few images for the scores."""
    from shared.evaluation.lenses import lens_fitter  # seconds that a table needs not wait for
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


def write(out: Path, found: Sequence[Metrics], names: Sequence[str]) -> str:
    """OUT.md and OUT.png -> the table."""
    text = markdown(rows(found, names))
    fits = found[0].get("lens_preset", {}).get("fits", 0)
    about = ABOUT.format(n=found[0]["n"], reference=found[0]["reference"], far=FAR, fits=fits)
    write_atomically(out.with_name(out.name + ".md"), f"{text}\n\n{about}".encode())
    save_picture(out.with_name(out.name + ".png"), figure(found, names))
    return text


def read(path: Path) -> dict[str, Any]:
    """The metrics.json of a run. UserError if there is none of `lens-ldm evaluate`."""
    tried = [path] if path.is_file() else [path / "metrics.json", path / "evaluation" / "metrics.json"]
    file = next((one for one in tried if one.is_file()), None)
    if file is None:
        raise UserError(f"{path} has not been scored: run `lens-ldm evaluate {path} --reference data/NAME` first")
    try:
        metrics = json.loads(file.read_text())
        for key in ("n", "distances", "physics", "reference", "reference_fingerprint"):
            metrics[key]
        metrics["physics"]["samples"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        why = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{file} is no result of this version of `lens-ldm evaluate` ({why}): score it again"
        ) from error
    return metrics


def require_comparable(found: Sequence[Metrics], runs: Sequence[str]) -> None:
    """UserError unless all were scored against the same images, as many of them, by the same networks."""
    for what, of in (
        ("reference", lambda metrics: metrics["reference_fingerprint"]),
        ("number of images", lambda metrics: metrics["n"]),
        ("networks", lambda metrics: sorted(metrics["distances"])),
        ("lens model", lambda metrics: metrics.get("lens_preset", {}).get("name", "none")),
    ):
        for run, metrics in zip(runs, found, strict=True):
            if of(metrics) != of(found[0]):
                raise UserError(
                    f"{run} and {runs[0]} were scored with another {what} ({of(metrics)}, {of(found[0])}): score them alike"
                )


def short_names(runs: Sequence[str]) -> list[str]:
    """The last parts of paths that tell them apart."""
    parts = [[part for part in Path(run).parts if part not in ("evaluation", "metrics.json", "model")] for run in runs]
    depth = 1
    while len({tuple(one[-depth:]) for one in parts}) < len({tuple(one) for one in parts}):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def rows(found: Sequence[Metrics], names: Sequence[str]) -> list[list[str]]:
    """The table, header first."""
    metrics = list(found[0]["distances"])
    floor = [
        f"floor {s['floor']:.2f} ± {s['floor_sd']:.2f}" for m in metrics for s in [found[0]["distances"][m]["samples"]]
    ]
    trained = any(one.get("training") for one in found)
    header = ["model", *["trained for"] * trained]
    header += [*(f"{m}, excess ({f})" for m, f in zip(metrics, floor, strict=True)), "its decoder alone", "KID × 1000"]
    header += [f"quantities over {FAR:g} × real", "lenses at the noise level", "chi² lit", "told apart, AUC", "copies"]
    table = [[*header, *COSTS.values()]]
    for name, one in zip(names, found, strict=True):
        cells = [_training(one)] * trained
        cells += [
            f"{one['distances'][m]['samples']['excess']:.2f} ± {one['distances'][m]['samples']['floor_sd']:.2f}"
            for m in metrics
        ]
        rebuilt = one["distances"][metrics[0]].get("reconstructions")
        cells.append(f"{rebuilt['excess']:.2f}" if rebuilt else "–")
        kid = one.get("distributions", {}).get(metrics[0], {}).get("kid")
        cells.append(f"{kid['samples']['value']:.2f}" if kid else "–")
        physics = one["physics"]["samples"]
        far = [quantity.replace("_", " ") for quantity in off(physics)]
        cells.append(", ".join(far) if 0 < len(far) <= NAMED else f"{len(far)} of {len(physics)}")
        fits, told, cost = one.get("lens_fits"), one.get("two_sample"), one.get("cost") or {}
        cells += [tables.share_of(fits["samples"]), f"{fits['samples']['chi2_lit']:.2f}"] if fits else ["–", "–"]
        interval = "({:.2f} to {:.2f})".format(*told["samples"]["auc_interval"]) if told else ""
        cells.append(f"{told['samples']['auc']:.2f} {interval}" if told else "–")
        memory = one.get("memory")
        cells.append(str(max(found["copies"] for found in memory.values())) if memory else "–")
        cells += [f"{cost[key]:.{2 if cost[key] < 100 else 0}f}" if cost.get(key) else "–" for key in COSTS]
        table.append([name, *cells])
    return table


def _training(metrics: Metrics) -> str:
    """What `--budget` gave it."""
    training = metrics.get("training")
    if not training:
        return "as it was"
    return f"{training['steps']} steps, {training['tflop']:.3g} TFLOP, {training['seconds'] / 60:.1f} min"


def figure(found: Sequence[Metrics], names: Sequence[str]) -> Image.Image:
    """Excess of the first distance, and share of lenses where it is known, against either cost."""
    metric = next(iter(found[0]["distances"]))
    fitted = all("lens_fits" in one for one in found)
    drawing, axes = panels(len(COSTS) * (1 + fitted), width=4.6, height=3.4, columns=len(COSTS))
    for k, (key, label) in enumerate(COSTS.items()):
        axes[k].set(title=f"{metric}, excess over real", xlabel=label, yscale="symlog")
        if fitted:
            axes[k + len(COSTS)].set(title="lenses at the noise level", xlabel=label, ylim=(0, 1.02))
        for j, (name, one) in enumerate(zip(names, found, strict=True)):
            cost = (one.get("cost") or {}).get(key)
            if not cost:
                continue
            score, style = (
                one["distances"][metric]["samples"],
                {"fmt": "os^Dv<>P"[j % 8], "color": colour_of(j), "capsize": 2},
            )
            axes[k].errorbar(cost, score["excess"], score["floor_sd"], label=name, **style)
            if fitted:
                share, (low, high) = (one["lens_fits"]["samples"][key] for key in ("share", "interval"))
                axes[k + len(COSTS)].errorbar(cost, share, [[share - low], [high - share]], label=name, **style)
    sd = found[0]["distances"][metric]["samples"]["floor_sd"]
    for k, axis in enumerate(axes):
        if k < len(COSTS):
            axis.axhspan(-sd, sd, color="0.9", zorder=0)
        elif found[0]["lens_fits"].get("real"):
            axis.axhline(found[0]["lens_fits"]["real"]["share"], color="k", lw=0.6)
        if axis.has_data():
            axis.set_xscale("log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    return rasterise(drawing)
