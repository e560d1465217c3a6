"""Several evaluations in one table, and their quality against what a lens costs."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.evaluation import tables
from shared.evaluation.verdict import FAR, off
from shared.files import markdown, write_atomically
from shared.report import colour_of, panels, rasterise, save_picture

Metrics = Mapping[str, Any]
COSTS = {"gflop": "GFLOP a lens", "milliseconds": "ms a lens"}
NAMELESS = re.compile(r"evaluation(-\d+)?|metrics\.json|model")  # parts of a path that say nothing of the model
NAMED = 3  # quantities that a cell names, and not only counts
ABOUT = """n = {n} samples of each, against {reference}. Excess: of the Fréchet distance of samples over that of other real \
images, whose scatter is behind ±; its decoder alone: that of real images through its encoder and decoder. Quantities: \
whose Wasserstein-1 distance is over {far:g} times that of real sets. Lenses: of {fits} samples, those that a lens model \
fits with a chi² per pixel within a factor of 1.2 of 1, with the 95 % interval; lit pixels: the same by the pixels that the \
lens lights by 5 sigma of the sky, and the median. Told apart: by a classifier of samples and real images; 0.5 is \
perfect. Copies: of training images among the samples. GFLOP and time of a lens: drawing and decoding it.
"""


def write(out: Path, found: Sequence[Metrics], names: Sequence[str]) -> str:
    """OUT.md and OUT.png -> the table."""
    text = markdown(rows(found, names))
    fits = " or ".join(map(str, sorted({one.get("lens_preset", {}).get("fits", 0) for one in found})))
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
    parts = [[part for part in Path(run).parts if not NAMELESS.fullmatch(part)] for run in runs]
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
    header += [f"quantities over {FAR:g} × real", *tables.LENSES, "told apart, AUC", "copies"]
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
        cells += tables.lens_cells(fits["samples"]) if fits else ["–"] * len(tables.LENSES)
        interval = "({:.2f} to {:.2f})".format(*told["samples"]["auc_interval"]) if told else ""
        cells.append(f"{told['samples']['auc']:.2f} {interval}" if told else "–")
        memory = one.get("memory")
        seeing = [found["copies"] for found in (memory or {}).values() if not found["blind"]]
        cells.append(str(max(seeing)) if seeing else "–")
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
    if handles := max((axis.get_legend_handles_labels() for axis in axes), key=lambda pair: len(pair[0]))[0]:
        drawing.legend(handles=handles, loc="outside right upper", fontsize=8)
    return rasterise(drawing)
