"""`lens-ldm compare RUN RUN ...`: several models in one table, and their quality against what a lens costs.

RUN is what `lens-ldm evaluate` has scored: the folder of a model, that of an evaluation, or a metrics.json. All of them need
the same reference, the same number of images and the same networks, or nothing would compare. Writes OUT.md and OUT.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shared.cli import Parser
from shared.errors import UserError
from shared.evaluation import tables
from shared.evaluation.verdict import FAR, off
from shared.files import make_folder, markdown, write_atomically
from shared.report import colour_of, panels, rasterise, save_picture

Metrics = Mapping[str, Any]
COSTS = {"gflop": "GFLOP a lens", "milliseconds": "ms a lens"}


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm compare`."""
    parser = Parser("lens-ldm compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a model or an evaluation, or a metrics.json")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="OUT.md and OUT.png (default: %(default)s)"
    )
    a = parser.parse_args(argv)
    found = [read(Path(run)) for run in a.runs]
    require_comparable(found, a.runs)
    names = short_names(a.runs)
    make_folder(a.out.parent)
    text = markdown(rows(found, names))
    write_atomically(a.out.with_name(a.out.name + ".md"), (text + "\n").encode())
    save_picture(a.out.with_name(a.out.name + ".png"), figure(found, names))
    print(text)
    print(f"{a.out}.md, {a.out}.png")


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
    header = ["model", *(f"{m}, excess ({f})" for m, f in zip(metrics, floor, strict=True))]
    header += [
        f"quantities over {FAR:g} × real",
        "lenses at the noise level",
        "chi² lit",
        "told apart, AUC",
        *COSTS.values(),
    ]
    table = [header]
    for name, one in zip(names, found, strict=True):
        cells = [
            f"{one['distances'][m]['samples']['excess']:.2f} ± {one['distances'][m]['samples']['floor_sd']:.2f}"
            for m in metrics
        ]
        cells.append(", ".join(quantity.replace("_", " ") for quantity in off(one["physics"]["samples"])) or "none")
        fits, told, cost = one.get("lens_fits"), one.get("two_sample"), one.get("cost") or {}
        cells += [tables.share_of(fits["samples"]), f"{fits['samples']['chi2_lit']:.2f}"] if fits else ["–", "–"]
        interval = "({:.2f} to {:.2f})".format(*told["samples"]["auc_interval"]) if told else ""
        cells.append(f"{told['samples']['auc']:.2f} {interval}" if told else "–")
        cells += [f"{cost[key]:.2f}" if cost.get(key) else "–" for key in COSTS]
        table.append([name, *cells])
    return table


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
