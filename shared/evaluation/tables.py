"""Scores as tables and curves."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from shared.evaluation.measure import Measured
from shared.metrics.physics import spectrum_ratio
from shared.report import colour_of, panels, rasterise

FEW_PIXELS = 100  # in a bin of the noise curve, which is then left out
LENSES = ["lenses at the noise level", "lit pixels: lenses, chi²"]  # of a table with a row for each model
LIT = "_lit"  # of a share of lenses: by the pixels that they light alone
UNLIKELY = 0.01  # a p value below it is one of another distribution


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


SHOWN_AS = {
    "kid": "KID × 1000", "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage",
    "fd_infinity": "distance of infinitely many", "inception_score": "Inception score",
}  # fmt: skip


def distribution_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of shared/metrics/distribution.py, header first."""
    candidates = list(next(iter(next(iter(found.values()), {}).values()), {}))
    rows = [["", "real", *candidates]]
    for network, metrics in found.items():
        for metric, scores in metrics.items():
            digits = 2 if "interval" in next(iter(scores.values())) else 3
            one = next(iter(scores.values()))
            cells = [f"{one['floor']:.{digits}f} ± {one['floor_sd']:.{digits}f}"]
            for score in scores.values():
                cell = f"{score['value']:.{digits}f}"
                if "interval" in score:
                    cell += " ({:.2f} to {:.2f})".format(*score["interval"])
                cells.append(cell)
            rows.append([f"{SHOWN_AS[metric]}, {network.removeprefix('fd_')}", *cells])
    return rows


def physics_rows(scores: dict[str, Any]) -> list[list[str]]:
    """The table of quantities, header first: the distance between real sets, then distances with their ratio to it.

    Where all real images have one value, such as the peak of images that were scaled to it, there is no ratio. A mark is on
    those that are not distributed as in real images (Kolmogorov and Smirnov, Holm's correction, p below UNLIKELY).
    """

    def cell(score: dict[str, float]) -> str:
        ratio = f" (× {score['ratio']:.2f})" if score["floor"] else ""
        return f"{score['w1']:.2g}{ratio}{' !' if score.get('p_holm', 1) < UNLIKELY else ''}"

    rows = [["quantity", "real", *scores]]
    for quantity, first in next(iter(scores.values())).items():
        rows.append([quantity, f"{first['floor']:.2g}", *(cell(one[quantity]) for one in scores.values())])
    return rows


def spectra(sets: dict[str, Measured]) -> Any:
    """Azimuthal power spectra of sets of images, `real` among them, their ratio to it with its 95 % interval, the noise
    against the signal, and histograms of the pixels."""
    figure, (power, ratio, noise, histogram) = panels(4, width=4.0)
    transform, real = sets["real"].transform, sets["real"]
    edges = real.edges - transform.pivot
    for j, (name, one) in enumerate(sets.items()):
        style = {"color": "k"} if name == "real" else {"color": colour_of(j - 1), "ls": "--" if j == 1 else "-"}
        power.plot(one.k, one.power.mean(0), lw=1.3, label=name, **style)
        if name != "real" and min(len(one), len(real)) > 1:
            found = spectrum_ratio(real.power, one.power)
            ratio.plot(one.k, found.mean, lw=1.3, label=f"{name} / real", **style)
            ratio.fill_between(one.k, found.mean_low, found.mean_high, color=style["color"], alpha=0.2, lw=0)
        curve = one.noise
        some = (curve.pixels > FEW_PIXELS) & (curve.signal > 0) & (curve.variance > 0)
        noise.plot(curve.signal[some], curve.variance[some], lw=1.3, label=name, **style)
        density = one.counts / max(one.counts.sum(), 1) / np.diff(edges)
        histogram.stairs(density, edges, label=name, color=style["color"])
    power.set(title="power spectrum", xlabel="k [cycles / pixel]", yscale="log")
    ratio.set(title="over real", xlabel="k [cycles / pixel]", ylim=(0.5, 1.5))
    ratio.axhline(1, color="k", lw=0.6)
    noise.set(title="variance of the noise", xlabel="signal [the data's range]")
    if np.concatenate([line.get_xdata() for line in noise.lines]).size:  # a logarithmic axis cannot be empty
        noise.set(xscale="log", yscale="log")
    histogram.set(title="pixel values", yscale="log")
    if transform.scale is not None:
        histogram.set_xscale("asinh", linear_width=transform.scale)
        histogram.set_xlabel(f"above the sky, {transform.pivot:.4g}")
    for axis in (power, ratio, noise, histogram):
        axis.legend(fontsize=8)
    return rasterise(figure)


def histograms(sets: dict[str, dict[str, np.ndarray]], columns: int = 4) -> Any:
    """Distributions of quantities {set: {quantity: (N,)}}, `real` among the sets: a row of panels, `columns` wide, a line
    for each set."""
    quantities = list(sets["real"])
    figure, axes = panels(len(quantities), width=3.4, height=2.4, columns=columns)
    for axis, quantity in zip(axes, quantities, strict=True):
        both = np.concatenate([values[quantity] for values in sets.values()])
        low, high = np.quantile(both, [0.002, 0.998])
        whole = np.issubdtype(both.dtype, np.integer)
        edges = (
            np.arange(np.floor(low) - 0.5, np.ceil(high) + 1)
            if whole
            else np.linspace(low, high if high > low else low + 1, 31)
        )
        for j, (name, values) in enumerate(sets.items()):
            style = (
                {"color": "k", "fill": True, "alpha": 0.15}
                if name == "real"
                else {"color": colour_of(j - 1), "ls": "--" if j == 1 else "-"}
            )
            axis.stairs(np.histogram(values[quantity], edges, density=True)[0], edges, label=name, lw=1.3, **style)
        axis.set(xlabel=quantity.replace("_", " "), yticks=[])
        axis.locator_params(axis="x", nbins=5)
    axes[0].legend(fontsize=8)
    return rasterise(figure)


def fit_rows(fits: dict[str, Any] | None) -> list[list[str]]:
    """The table of lens fits, header first; empty where there are none."""
    if not fits:
        return []
    rows = [
        ["lens fits", *fits],
        ["lenses at the noise level", *(share_of(one) for one in fits.values())],
        ["by lit pixels alone", *(share_of(one, LIT) for one in fits.values())],
        ["chi² of lit pixels, median", *(f"{one['chi2_lit']:.2f}" for one in fits.values())],
    ]
    for name in dict.fromkeys(name for one in fits.values() for name in one["parameters"]):
        found = [one["parameters"].get(name) for one in fits.values()]
        rows.append([
            f"{name}: bias ± scatter, R²",
            *(obeyed(s) for s in found),
        ])  # fmt: skip
    return rows


def obeyed(s: dict[str, Any] | None) -> str:
    """Bias, scatter and R² of a parameter, where there are any."""
    if not s or not s["n"]:
        return "–"
    r2 = "–" if s["r2"] is None or math.isnan(s["r2"]) else f"{s['r2']:.3f}"  # of what is all one value there is none
    return f"{s['bias']:.3f} ± {s['scatter']:.3f}, {r2}"


def share_of(fits: Mapping[str, Any], of: str = "") -> str:
    """A share of lenses with its interval; of LIT: by the pixels that they light alone."""
    low, high = fits[f"interval{of}"]
    return f"{fits[f'share{of}']:.0%} of {fits['n']} ({low:.0%} to {high:.0%})"


def lens_cells(fits: Mapping[str, Any]) -> list[str]:
    """What stands under LENSES: the share of lenses, and by the pixels that they light alone the share and the median chi²."""
    share = f"{fits[f'share{LIT}']:.0%}, " if f"share{LIT}" in fits else ""  # which older results do not have
    return [share_of(fits), f"{share}{fits[f'chi2{LIT}']:.2f}"]


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


def memory_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of copies, header first."""
    rows = [
        ["training images", "copies", "by chance", "p", "nearest is of training", "by chance", "p", "planted and found"]
    ]
    for where, one in found.items():
        planted = ", ".join(f"{kind} {k['found']} of {k['planted']}" for kind, k in one["planted"].items())
        near = [f"{one['nearer']:.1%}", f"{one['nearer_expected']:.1%} ± {one['nearer_sd']:.1%}", f"{one['p']:.2g}"]
        copies = [f"{one['copies']} of {one['n_generated']}", f"{one['expected']:.1f}", f"{one['p_copies']:.2g}"]
        rows.append([where, *copies, *near, planted])
    return rows


def use_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table of classifiers, header first."""
    rows = [["trained → tested", "AUC (95 %)", "right answers (95 %)", "trained on", "tested on"]]
    for name, one in found.items():
        cells = [
            f"{one[k]:.2f} ({one[f'{k}_interval'][0]:.2f} to {one[f'{k}_interval'][1]:.2f})"
            for k in ("auc", "accuracy")
        ]
        rows.append([name, *cells, str(one["n_train"]), str(one["n_test"])])
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
