"""What an evaluation comes to, in a few lines."""

import math
from collections.abc import Mapping
from typing import Any

from scipy import stats

from shared.evaluation import tables

LEVEL = 0.01  # at which each test finds fault with real images; some do more often, see the page of this package
FAR = 2.0  # times the distance between real sets: what is said to be off, if it is no accident
SMOOTH = 0.2  # share of the frequencies whose 95 % interval may miss 1

SKIPPABLE = ("distributions", "two-sample", "memory", "use")  # what --skip may leave out
Line = tuple[bool, str]
Fits = Mapping[str, Any]


def verdict(metrics: Mapping[str, Any]) -> list[Line]:
    """Whether samples are as real images are, and how they are not: (as real, line)."""
    lines = [_distance(metric, found["samples"]) for metric, found in metrics["distances"].items()]
    lines += [_spread(found) for found in metrics.get("distributions", {}).values()]
    lines.append(_quantities(metrics["physics"]["samples"], metrics["spectrum"]["samples"]))
    if fits := metrics.get("lens_fits"):
        lines.append(_lenses(fits["samples"], fits["real"], metrics["population"].get("samples", {})))
    if told := metrics.get("two_sample"):
        auc, (low, high), of_real = told["samples"]["auc"], told["samples"]["auc_interval"], told["real"]["auc"]
        text = f"a classifier tells them from real images with an AUC of {auc:.2f} ({low:.3f} to {high:.3f})"
        lines.append((low <= 0.5, f"{text}, real images from others {of_real:.2f}; chance is 0.5"))
    if memory := metrics.get("memory"):
        lines.append(_memory(memory))
    if found := metrics.get("use"):
        ceiling, learnt = found["real → real"], found["generated → real"]
        if ceiling["auc_interval"][0] > 0.5:
            low, high = learnt["auc_interval"]
            text = f"a classifier trained on them knows real classes with an AUC of {learnt['auc']:.2f} ({low:.2f} to {high:.2f})"
            # As if of two independent errors, each half of its interval: both classifiers judge the same images, which is stricter.
            apart = math.hypot(high - learnt["auc"], ceiling["auc"] - ceiling["auc_interval"][0])
            fine = ceiling["auc"] - learnt["auc"] <= apart
            lines.append((fine, f"{text}, one trained on real images {ceiling['auc']:.2f}"))
    return lines


PARTS = {
    "distributions": "precision, recall and coverage",
    "lens_fits": "whether they are lenses",
    "two_sample": "whether a classifier tells them from real images",
    "memory": "copies of training images",
}


def unseen(metrics: Mapping[str, Any]) -> str:
    """What a verdict was reached without; empty where nothing is missing."""
    missing = [text for part, text in PARTS.items() if not metrics.get(part)]
    return f"not looked at: {', '.join(missing)}" if missing else ""


def stands_out(score: Mapping[str, Any], step: float = 0.0, both: bool = True) -> bool:
    """Whether an excess over a floor is no accident, at LEVEL; see `least_seen`."""
    excess = abs(score["excess"]) if both else score["excess"]
    return bool(excess > least_seen(score, step, both))


def least_seen(score: Mapping[str, Any], step: float = 0.0, both: bool = True) -> float:
    """The excess over a floor from where on it is no accident: Student's t, for the scatter of a few splits is itself uncertain.

    step  the smallest scatter to count with: shares come in steps, and few splits may all have one value
    both  an excess of either sign is one
    """
    splits = score.get("splits", 5)
    reach = stats.t.ppf(1 - LEVEL / (1 + both), splits - 1) * math.sqrt(1 + 1 / splits)
    return float(reach * max(score["floor_sd"], step))


def fewer(fits: Fits, real: Fits, of: str = "") -> bool:
    """Whether the share of lenses is below that of real images: the 95 % interval of the difference lies below 0 (Newcombe 1998,
    Stat. Med. 17, 873, method 10)."""
    share, its, interval = f"share{of}", real[f"share{of}"], f"interval{of}"
    above, below = fits[interval][1] - fits[share], its - real[interval][0]
    return bool(fits[share] - its + math.hypot(above, below) < 0)


def off(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times further off than between real sets, of the quantities where that is far and no accident; most first."""
    # A quantity that is constant in real images has no ratio: any difference is beyond all measure.
    ratios = {name: math.inf if s["ratio"] is None else s["ratio"] for name, s in scores.items()}
    found = [name for name, s in scores.items() if ratios[name] > FAR and s["p_holm"] < tables.UNLIKELY]
    return {name: ratios[name] for name in sorted(found, key=lambda name: -ratios[name])}


def agreeing(spectrum: Mapping[str, Any]) -> float:
    """The share of frequencies at which the power may be that of real images."""
    apart = _apart(spectrum)
    return apart.count(0.0) / max(len(apart), 1)


def _apart(spectrum: Mapping[str, Any]) -> list[float]:
    """How far the power is from that of real images, at each frequency that has an interval: 0 where that holds 1."""
    curve = zip(spectrum["mean"], spectrum["mean_low"], spectrum["mean_high"], strict=True)
    return [0.0 if low <= 1 <= high else abs(mean - 1) for mean, low, high in curve if low is not None]


def _distance(metric: str, s: Mapping[str, Any]) -> Line:
    near = not stands_out(s, both=False)
    seen = least_seen(s, both=False)
    floor = f"the floor of {s['floor']:.2f} ± {s['floor_sd']:.2f}"
    word = (
        f"which other real images may be, too: from {seen:.2f} on it would be no accident"
        if near
        else "further from real images than others of them"
    )
    return near, f"{metric}: {s['excess']:+.2f} over {floor} (n = {s['n']}), {word}"


def _spread(found: Mapping[str, Mapping[str, Any]]) -> Line:
    """Fidelity and variety in one line."""
    shown = {name: scores["samples"] for name, scores in found.items() if name in ("precision", "recall", "coverage")}
    out = [name for name, s in shown.items() if stands_out(s, step=1 / s["n"])]
    said = ", ".join(f"{name} {s['value']:.3f} (real {s['floor']:.3f})" for name, s in shown.items())
    return not out, f"where real images are, and everywhere there: {said}"


def _quantities(scores: Mapping[str, Mapping[str, Any]], spectrum: Mapping[str, Any]) -> Line:
    found, agree = off(scores), agreeing(spectrum)
    most = max(_apart(spectrum), default=0.0)
    others = f", at the others it is up to {most:.0%} off" if most else ""
    smooth, text = agree >= 1 - SMOOTH, f"the power spectrum agrees at {agree:.0%} of its frequencies{others}"
    if not found:
        fine = f"all {len(scores)} quantities measured on each image are distributed as in real images"
        return smooth, f"{fine}; {text}" if smooth else f"{text}; {fine}"
    said = ", ".join(f"{name.replace('_', ' ')} {ratio:.1f}" for name, ratio in found.items())
    text = f"by these times: {said}; {text}"
    return False, f"{len(found)} of {len(scores)} quantities are further off than between real sets, {text}"


def _lenses(fits: Fits, real: Fits, population: Mapping[str, Mapping[str, Any]]) -> Line:
    text = f"lenses at the level of their noise: {tables.share_of(fits)}, of real images {tables.share_of(real)}"
    if lit := "share_lit" in fits:  # which older results do not have
        text += f"; by the pixels they light alone {fits['share_lit']:.0%}, of real images {real['share_lit']:.0%}"
    found = off(population)
    if not population:
        how = "their parameters are not compared, for as many fits as of real images are needed"
    elif found:
        said = ", ".join(f"{name} {ratio:.1f}" for name, ratio in found.items())
        how = f"their parameters are distributed otherwise, further off than real sets by these times: {said}"
    else:
        ratios = {name: math.inf if s["ratio"] is None else s["ratio"] for name, s in population.items()}
        furthest = max(ratios, key=lambda name: ratios[name], default="")
        apart = f" ({furthest} is furthest, {ratios[furthest]:.1f} times as far as real sets)" if furthest else ""
        how = f"no parameter is distributed otherwise as far as {fits['n']} fits can tell{apart}"
    less = fewer(fits, real) or (lit and fewer(fits, real, tables.LIT))
    return not less and not found, f"{how}; {text}" if found and not less else f"{text}; {how}"


def _memory(memory: Mapping[str, Mapping[str, Any]]) -> Line:
    where, worst = min(memory.items(), key=lambda item: (not item[1]["blind"], min(item[1]["p_copies"], item[1]["p"])))
    # Each is asked for twice, by copies and by nearness.
    fine = not worst["blind"] and min(worst["p_copies"], worst["p"]) > LEVEL / (2 * len(memory))
    return fine, f"training images among them, {where}: {worst['verdict']}"


def summary(metrics: Mapping[str, Any]) -> str:
    """Tables and verdict for a terminal."""
    parts = [tables.score_rows(dict(metrics)), tables.fit_rows(metrics.get("lens_fits"))]
    if metrics.get("protocols"):
        parts.append(tables.protocol_rows(metrics["protocols"]))
    marks = [f"{'as real' if fine else 'not so':8} {line}" for fine, line in verdict(metrics)]
    if missing := unseen(metrics):
        marks.append(f"{'':8} {missing}")
    return "\n\n".join([*(tables.aligned(rows) for rows in parts if rows), "\n".join(marks)])
