"""The symmetries of a data set: which flips and rotations of its images leave their distribution alone.

The eight symmetries of the square have names; rows run down, columns to the right, and `rot90` turns counterclockwise as
`torch.rot90` does. `symmetries` tests them, `save` keeps the answer as data/NAME/symmetries.json beside the images, and
`allowed` is what training asks for: the elements that may turn an image into another one of the same distribution.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.data.cache import LensImages
from shared.errors import UserError
from shared.files import write_atomically
from shared.metrics.two_sample import Described, Paired, Stretch, describe, holm, paired_test
from shared.processes import is_main_process
from shared.simulate.preset import AXES, PLACES, UNITS

FORMAT = 1
FILE = "symmetries.json"

# --- the group of the square ------------------------------------------------------------------------------------------

# Whether rows and columns change places, and which of (rows, columns) of the result are then turned round.
_MOVES: dict[str, tuple[bool, tuple[int, ...]]] = {
    "identity": (False, ()),
    "flip_lr": (False, (-1,)),
    "flip_ud": (False, (-2,)),
    "rot180": (False, (-2, -1)),
    "rot90": (True, (-2,)),
    "rot270": (True, (-1,)),
    "transpose": (True, ()),
    "antitranspose": (True, (-2, -1)),
}
ELEMENTS = tuple(_MOVES)
Subgroup = tuple[str, ...]  # in the order of ELEMENTS, so the identity is the first


def apply(images: Tensor, element: str) -> Tensor:
    """Images (..., H, W) turned by an element: (..., H, W), or (..., W, H) where rows and columns change places."""
    swapped, reversed_axes = _MOVES[element]
    turned = images.transpose(-2, -1) if swapped else images
    return turned.flip(reversed_axes) if reversed_axes else turned


def apply_each(images: Tensor, elements: Sequence[str], drawn: Tensor) -> Tensor:
    """Image i of (N, ..., H, W) turned by elements[drawn[i]]; square images wherever an element needs them."""
    turned = images
    for k, element in enumerate(elements):
        chosen = drawn.to(images.device) == k
        if element != "identity" and bool(chosen.any()):
            turned = turned.clone() if turned is images else turned
            turned[chosen] = apply(images[chosen], element)
    return turned


# How a quantity turns with its image: a scalar not at all; the angle of an axis [deg], counterclockwise from x and the same
# after half a turn; places x to the right and y upwards of the centre; the two components of a shear or an ellipticity,
# which go as the cosine and the sine of twice the angle of their axis. The names of a pair follow, in their order.
SCALAR, AXIS, PLACE, SHEAR = KINDS = ("scalar", "axis", "place", "shear")
Rule = Sequence[str]
RULES: dict[str, Rule] = {
    **dict.fromkeys((*UNITS, "low", "high"), (SCALAR,)),  # the last two of `minmax`
    **dict.fromkeys(AXES, (AXIS,)),
    **{name: (PLACE, *pair) for pair in PLACES for name in pair},
}


def how_they_turn(images: LensImages) -> dict[str, Rule]:
    """The rules of the simulator's names, and of those that `lens-ldm prepare --turns` was told of."""
    told = {name: column["turns"] for name, column in images.index.get("parameters", {}).items() if "turns" in column}
    return RULES | told


def apply_to_parameters(
    parameters: Mapping[str, np.ndarray], element: str, rules: Mapping[str, Rule] = RULES
) -> dict[str, np.ndarray]:
    """{name: (N,)} of lenses -> those of their images turned by an element: angles of axes, places and shears turn, too.

    NaN, not known, is what has no rule: nobody has said what an element makes of it. So is a place whose other coordinate
    is not there, where an element mixes the two.
    """
    if element == "identity":
        return dict(parameters)
    swapped, reversed_axes = _MOVES[element]

    def turn(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = (-y, -x) if swapped else (x, y)  # rows run down, y upwards
        return -x if -1 in reversed_axes else x, -y if -2 in reversed_axes else y

    turned = {}
    for name, values in parameters.items():
        nothing = np.full(len(values), np.nan)
        kind, *pair = rules.get(name, ("",))
        if kind == SCALAR:
            turned[name] = values
        elif kind == AXIS:
            angle = np.deg2rad(values)
            x, y = turn(np.cos(angle), np.sin(angle))
            turned[name] = np.rad2deg(np.arctan2(y, x)) % 180
        elif kind == PLACE:
            turned[name] = turn(*(parameters.get(one, nothing) for one in pair))[pair.index(name)]
        elif kind == SHEAR:
            odd = swapped if name == pair[0] else len(reversed_axes) % 2
            turned[name] = -values if odd else values
        else:
            turned[name] = nothing
    return turned


@lru_cache
def compose(second: str, first: str) -> str:
    """The element that does what `first` and then `second` do."""
    square = torch.arange(4).reshape(2, 2)
    turned = apply(apply(square, first), second)
    return next(element for element in ELEMENTS if torch.equal(apply(square, element), turned))


def group(height: int, width: int) -> Subgroup:
    """The elements that keep the shape of an image: all eight, or four where it is oblong."""
    return tuple(element for element in ELEMENTS if height == width or not _MOVES[element][0])


@lru_cache
def subgroups(whole: Subgroup) -> tuple[Subgroup, ...]:
    """Every subgroup of a group, the smallest first: 10 for the square, 5 for a rectangle."""
    sets = (("identity", *rest) for k in range(len(whole)) for rest in combinations(whole[1:], k))
    return tuple(s for s in sets if all(compose(g, h) in s for g in s for h in s))


def cosets(whole: Subgroup, allowed: Subgroup) -> list[int]:
    """The label of each element of a group: 0 for the allowed ones, and in general one for each coset g H of them.

    Where x and h x have one distribution for every allowed h, so have g x and g h x: the elements of g H, and no others
    in general, make the same images.
    """
    labels: dict[frozenset[str], int] = {}
    return [labels.setdefault(frozenset(compose(g, h) for h in allowed), len(labels)) for g in whole]


# --- the tests --------------------------------------------------------------------------------------------------------

LEVEL = 0.05  # of one false alarm among all the elements
TOLD = 0.75  # a test that only sees rules which are right more often than this tells too little to allow anything
SAMPLE = 2000
# Generators of the cyclic subgroups, as views of either side. A quarter turn and its inverse are one question; beyond the
# half turn, which is tested by itself, it asks whether {x, half turn of x} and {quarter turns of x} may change places.
_TESTS: dict[str, tuple[Subgroup, Subgroup]] = {
    "flip_lr": (("identity",), ("flip_lr",)),
    "flip_ud": (("identity",), ("flip_ud",)),
    "rot180": (("identity",), ("rot180",)),
    "rot90": (("identity", "rot180"), ("rot90", "rot270")),
    "transpose": (("identity",), ("transpose",)),
    "antitranspose": (("identity",), ("antitranspose",)),
}


def symmetries(dataset: LensImages | str | Path, n: int = SAMPLE, seed: int = 0) -> dict[str, Any]:
    """Test the elements on n distinct training images, or on all of them where they are fewer.

    Returns what symmetries.json holds: `tests`, for each element but the identity its p value, the same after Holm's
    correction for several tests, the smallest visible effect (see `paired_test`) and the verdict, and `allowed`, the
    largest subgroup whose elements were all found unbroken by a test that could see enough.
    """
    images = dataset if isinstance(dataset, LensImages) else LensImages(dataset)
    train = images.split("train")
    _, first = np.unique(np.asarray(images.index["hashes"])[train], return_index=True)
    chosen = np.random.default_rng(seed).permutation(train[np.sort(first)])[:n]
    if not len(chosen):
        raise UserError(f"{images.path} has no training images to test: prepare more")
    whole = group(*images.image_shape[1:])
    if min(images.image_shape[1:]) < 2:
        raise UserError(f"{images.path} has images of one row or column: they have no symmetries to test")
    return {
        "format": FORMAT,
        "data": images.fingerprint,
        "n": len(chosen),
        "seed": seed,
        "level": LEVEL,
        **judge(measure(images.batch(chosen), whole, seed), whole),
    }


def measure(images: Tensor, whole: Subgroup, seed: int = 0) -> dict[str, Paired]:
    """`paired_test` of each element of a group that needs one, on distinct images (N, C, H, W)."""
    stretch = Stretch.of(images)
    parts: dict[str, list[Described]] = {g: [] for g in whole}
    for part in images.split(64):
        stretched = stretch(part)
        for g in whole:
            parts[g].append(describe(apply(stretched, g)))
    views = {g: tuple(torch.cat(kind) for kind in zip(*described, strict=True)) for g, described in parts.items()}
    return ask(views, seed)


def ask(views: dict[str, Described], seed: int = 0) -> dict[str, Paired]:
    """The tests of a group, given what `describe` finds in the images turned by each of its elements."""
    asked = [element for element in _TESTS if element in views]
    found = {}
    for k, element in enumerate(asked):
        a, b = ([views[g] for g in side] for side in _TESTS[element])
        found[element] = paired_test(a, b, seed=seed + k, level=LEVEL / len(asked))
    return found


def judge(tests: dict[str, Paired], whole: Subgroup) -> dict[str, Any]:
    """p values -> verdicts and the allowed subgroup.

    broken    the images change: the element's p value, times Holm's factor, is at most LEVEL
    too few   images to tell: no change was found, but only a gross one would have been
    left out  no change was found, but its products with other elements are broken
    """
    adjusted = holm({element: found.p for element, found in tests.items()})
    rows: dict[str, dict[str, Any]] = {}
    for element in whole[1:]:
        asked = "rot90" if element == "rot270" else element
        verdict = "broken" if adjusted[asked] <= LEVEL else "too few" if tests[asked].visible > TOLD else "left out"
        found = tests[asked]
        rows[element] = {"p": found.p, "adjusted": adjusted[asked], "visible": found.visible, "verdict": verdict}
    fine = [s for s in subgroups(whole) if all(rows[g]["verdict"] == "left out" for g in s[1:])]
    chosen = max(fine, key=lambda s: (len(s), min((rows[g]["p"] for g in s[1:]), default=1.0)))
    for element in chosen[1:]:
        rows[element]["verdict"] = "allowed"
    return {"tests": rows, "allowed": list(chosen)}


# --- symmetries.json --------------------------------------------------------------------------------------------------


def main_symmetries(dataset: str | Path, n: int = SAMPLE, seed: int = 0) -> str:
    """Test a data set, save the answer beside it, and return it as a table to print."""
    images = LensImages(dataset)
    report = symmetries(images, n, seed)
    path = images.path / FILE
    try:
        write_atomically(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return f"{table(report)}\n{path}"


def table(report: dict[str, Any]) -> str:
    lines = [f"{'element':15}{'verdict':10}{'p':>8}{'p (Holm)':>10}{'sees from':>14}"]
    lines += [
        f"{element:15}{row['verdict']:10}{row['p']:8.4f}{row['adjusted']:10.4f}{row['visible']:13.0%} "
        for element, row in report["tests"].items()
    ]
    lines.append(
        f"allowed: {', '.join(report['allowed'])}; n = {report['n']} distinct training images, {report['level']:.0%} for "
        "one false alarm among all. Sees from: a difference by which one could tell image from turned copy that often."
    )
    if any(row["verdict"] == "too few" for row in report["tests"].values()):
        lines.append(
            "too few images to tell those apart that are marked so: they stay out until there are more, some hundreds in all"
        )
    return "\n".join(line.rstrip() for line in lines)


class Turns(NamedTuple):
    """How training turns images, by `data.augment`.

    elements     the identity first
    labels       of each element: 0 for the identity's, and for all where none is needed
    chances      of each element to be drawn
    fingerprint  what a run must not go on without: empty where symmetries.json makes no difference
    """

    elements: Subgroup
    labels: list[int]
    chances: list[float]
    fingerprint: dict[str, str]


def turns(images: LensImages, augment: str) -> Turns:
    """symmetries: by the allowed elements, uniformly | labelled: by the whole group, with labels | none: not at all.

    With labels, half of the images keep to the allowed elements, uniformly too: they alone are what samples will be
    asked for, and a young network does not heed the label yet.
    """
    if augment == "none":
        return Turns(("identity",), [0], [1.0], {})
    known = allowed(images)
    fine = known or ("identity",)
    if known is None and is_main_process():
        what = "images are turned in all ways, each with its label" if augment == "labelled" else "no image is turned"
        tqdm.write(f"{images.path} has no {FILE}: {what} (`lens-ldm inspect {images.path} --symmetries` writes it)")
    elements = group(*images.image_shape[1:]) if augment == "labelled" else fine
    labels = cosets(elements, fine)
    own, other = (labels.count(0), len(labels) - labels.count(0))
    chances = [(0.5 / own if label == 0 else 0.5 / other) if other else 1.0 / own for label in labels]
    return Turns(elements, labels, chances, {FILE: "+".join(fine)} if len(fine) > 1 else {})


def allowed(images: LensImages) -> Subgroup | None:
    """The allowed elements that symmetries.json names, or None where there is no such file.

    Raises UserError if it is damaged, or of other images.
    """
    path = images.path / FILE
    again = f"run `lens-ldm inspect {images.path} --symmetries` again, or delete it"
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        form, data, named = report["format"], report["data"], tuple(report["allowed"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}): {again}") from error
    if form != FORMAT or named not in subgroups(group(*images.image_shape[1:])):
        raise UserError(f"{path} is not one that this version has written: {again}")
    if data != images.fingerprint:
        raise UserError(f"{path} was made from other images: {again}")
    return named
