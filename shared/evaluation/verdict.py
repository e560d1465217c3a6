"""What an evaluation comes to, in a few lines."""

import math
from collections.abc import Mapping
from typing import Any

from shared.evaluation import tables

FAR = 2.0  # times the distance between real sets: what is said to be off, if it is no accident


def verdict(metrics: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Whether samples are as real images are, and how they are not: (as real, line)."""
    lines = [_distance(metric, found["samples"]) for metric, found in metrics["distances"].items()]
    lines.append(_quantities(metrics["physics"]["samples"]))
    if fits := metrics.get("lens_fits"):
        share, real = fits["samples"], fits["real"]
        text = f"lenses at the level of their noise: {tables.share_of(share)}, of real images {tables.share_of(real)}"
        lines.append((share["interval"][1] >= real["share"], text))
    if told := metrics.get("two_sample"):
        auc, (low, high), of_real = told["samples"]["auc"], told["samples"]["auc_interval"], told["real"]["auc"]
        text = f"a classifier tells them from real images with an AUC of {auc:.2f} ({low:.2f} to {high:.2f})"
        lines.append((low <= 0.5, f"{text}, real images from others {of_real:.2f}; chance is 0.5"))
    for where, found in metrics.get("memory", {}).items():
        fine = not found["blind"] and min(found["p_copies"], found["p"]) > tables.UNLIKELY
        lines.append((fine, f"training images {where} among the samples: {found['verdict']}"))
    if found := metrics.get("use"):
        ceiling, learnt = found["real → real"], found["generated → real"]
        if ceiling["auc_interval"][0] > 0.5:
            text = f"a classifier trained on them knows real classes with an AUC of {learnt['auc']:.2f}"
            low, high = learnt["auc_interval"]
            line = f"{text} ({low:.2f} to {high:.2f}), one trained on real images {ceiling['auc']:.2f}"
            lines.append((high >= ceiling["auc"], line))
    return lines


def _distance(metric: str, s: Mapping[str, Any]) -> tuple[bool, str]:
    near = s["excess"] <= 2 * s["floor_sd"]
    word = "no further from real images than others of them" if near else "further from real images than others of them"
    floor = f"the floor of {s['floor']:.2f} ± {s['floor_sd']:.2f}"
    return near, f"{metric}: {s['excess']:+.2f} over {floor} (n = {s['n']}), {word}"


def off(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times further off than between real sets, of the quantities where that is far and no accident; most first."""
    # A quantity that is constant in real images has no ratio: any difference is beyond all measure.
    ratios = {name: math.inf if s["ratio"] is None else s["ratio"] for name, s in scores.items()}
    found = [name for name, s in scores.items() if ratios[name] > FAR and s["p_holm"] < tables.UNLIKELY]
    return {name: ratios[name] for name in sorted(found, key=lambda name: -ratios[name])}


def _quantities(scores: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
    if not (found := off(scores)):
        return True, f"all {len(scores)} quantities measured on each image are distributed as in real images"
    said = ", ".join(f"{name.replace('_', ' ')} {ratio:.1f}" for name, ratio in found.items())
    return (
        False,
        f"{len(found)} of {len(scores)} quantities are further off than between real sets, by these times: {said}",
    )


def summary(metrics: Mapping[str, Any]) -> str:
    """Tables and verdict for a terminal."""
    parts = [tables.score_rows(dict(metrics)), tables.fit_rows(metrics.get("lens_fits"))]
    if metrics.get("protocols"):
        parts.append(tables.protocol_rows(metrics["protocols"]))
    marks = [f"{'as real' if fine else 'not so':8} {line}" for fine, line in verdict(metrics)]
    return "\n\n".join([*(tables.aligned(rows) for rows in parts if rows), "\n".join(marks)])
