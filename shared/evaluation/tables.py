"""Scores as tables and curves."""

import math
from typing import Any

import numpy as np

from shared.evaluation.measure import Measured
from shared.report import panels, rasterise


def finite(tree: Any) -> Any:
    """The same with null for what JSON has no number for, such as a ratio to a floor of 0."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def score_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """The table of distances, header first."""
    rows = [["distance to real images", "value", "floor (real)", "excess", "n"]]
    for name, scores in metrics["distances"].items():
        for what, s in scores.items():
            floor = f"{s['floor']:.2f} ± {s['floor_sd']:.2f}"
            rows.append([f"{name}, {what}", f"{s['distance']:.2f}", floor, f"{s['excess']:.2f}", str(s["n"])])
    return rows


def physics_rows(scores: dict[str, Any]) -> list[list[str]]:
    """The table of quantities, header first: the distance between real sets, then distances with their ratio to it.

    Where all real images have one value, such as the peak of images that were scaled to it, there is no ratio.
    """

    def cell(score: dict[str, float]) -> str:
        return f"{score['w1']:.2g}" + (f" (× {score['ratio']:.2f})" if score["floor"] else "")

    rows = [["quantity", "real", *scores]]
    for quantity, first in next(iter(scores.values())).items():
        rows.append([quantity, f"{first['floor']:.2g}", *(cell(one[quantity]) for one in scores.values())])
    return rows


def spectra(sets: dict[str, Measured]) -> Any:
    """Azimuthal power spectra of sets of images, `real` among them, their ratio to it, and histograms of the pixels."""
    figure, (power, ratio, histogram) = panels(3, width=4.4)
    transform, real = sets["real"].transform, sets["real"].power.mean(0)
    edges = sets["real"].edges - transform.pivot
    for j, (name, one) in enumerate(sets.items()):
        style = {"color": "k"} if name == "real" else {"color": f"C{j - 1}", "ls": "--" if j == 1 else "-"}
        mean = one.power.mean(0)
        power.plot(one.k, mean, lw=1.3, label=name, **style)
        if name != "real":
            ratio.plot(one.k, mean / real, lw=1.3, label=f"{name} / real", **style)
        density = one.counts / max(one.counts.sum(), 1) / np.diff(edges)
        histogram.stairs(density, edges, label=name, color=style["color"])
    power.set(title="power spectrum", xlabel="k [cycles / pixel]", yscale="log")
    ratio.set(title="over real", xlabel="k [cycles / pixel]", ylim=(0.5, 1.5))
    ratio.axhline(1, color="k", lw=0.6)
    histogram.set(title="pixel values", yscale="log")
    if transform.scale is not None:
        histogram.set_xscale("asinh", linear_width=transform.scale)
        histogram.set_xlabel(f"above the sky, {transform.pivot:.4g}")
    for axis in (power, ratio, histogram):
        axis.legend(fontsize=8)
    return rasterise(figure)


def fit_rows(fits: dict[str, Any] | None) -> list[list[str]]:
    """The table of lens fits, header first; empty where there are none."""
    if not fits:
        return []
    rows = [
        ["lens fits", *fits],
        ["lenses at the noise level", *(share_of(one) for one in fits.values())],
        ["chi² of lit pixels, median", *(f"{one['chi2_lit']:.2f}" for one in fits.values())],
    ]
    for name in dict.fromkeys(name for one in fits.values() for name in one["parameters"]):
        found = [one["parameters"].get(name) for one in fits.values()]
        rows.append([
            f"{name}: bias ± scatter, R²",
            *(f"{s['bias']:.3f} ± {s['scatter']:.3f}, {s['r2']:.3f}" if s and s["n"] else "-" for s in found),
        ])  # fmt: skip
    return rows


def share_of(fits: dict[str, Any]) -> str:
    """A share of lenses with its interval."""
    low, high = fits["interval"]
    return f"{fits['share']:.0%} of {fits['n']} ({low:.0%} to {high:.0%})"


def told_apart_rows(two_sample: dict[str, Any]) -> list[list[str]]:
    """The table of the classifier two-sample test, header first."""
    rows = [["told from real images by a classifier", "AUC (95 %)", "right answers (95 %)", "n"]]
    for name, one in two_sample.items():
        cells = [
            f"{one[k]:.2f} ({one[i][0]:.2f} to {one[i][1]:.2f})"
            for k, i in (("auc", "auc_interval"), ("accuracy", "accuracy_interval"))
        ]
        rows.append([name, *cells, f"{one['n_a']} + {one['n_b']}"])
    return rows


def protocol_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of distances by published protocols, header first."""
    rows = [["protocol", "distance", "of", "value", "floor (real)", "excess", "n"]]
    for name, protocol in found.items():
        for metric, candidates in protocol["distances"].items():
            for candidate, s in candidates.items():
                floor = f"{s['floor']:.2f} ± {s['floor_sd']:.2f}"
                numbers = [f"{s['distance']:.2f}", floor, f"{s['excess']:.2f}", str(s["n"])]
                rows.append([name, metric, candidate, *numbers])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(x.rjust(w) if k else x.ljust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
