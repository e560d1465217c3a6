"""Memorisation: are generated images copies of training images, and are they nearer to them than to test images?

An image is described by the means of a grid of blocks: they hold the lens and hardly any pixel noise, so that a copy
under other noise is still near. Distances to the nearest training image are judged by those to the nearest test image,
which no generator has seen: a set of poor or of uniform images is far from, or near to, both alike. Test images take the
same measurements and say what chance does. Copies planted in the same call say what the answer is worth.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from shared.data.symmetries import Subgroup, apply, apply_each, compose, group
from shared.errors import UserError
from shared.metrics import Readable, take
from shared.metrics.two_sample import RESIDUAL

# Of 4,500 lenses of 150x150 pixels the grid of 25 found most of what it should: 99 % of 200 of them under noise of three
# times their variance, and of as many decoded from their latents. Finer ones lose copies in noise, coarser ones reconstructions.
# Here lenses whose nine parameters all differ by 2 % of their range are two (1 of 60 found), and by 0.5 % one (55 of 60).
GRID = 25
BATCH = 256
FALSE_ALARMS = 0.001  # of test images, or none where they are fewer than a thousand
FEWEST = 20
PLANTED = 50  # of each kind at least, for a rate that means something
FOUND = 0.95  # of each planted kind, or nothing follows from having found none among the generated
DRAWS = 9999
CLOSEST = 10

Describe = Callable[[Tensor], Tensor]


def blocks(images: Tensor) -> Tensor:
    """Images (N, C, H, W) -> their block means (N, C 25 25) less the mean and of unit length.

    Of unit length, for a copy that is 10 % brighter is one; where the brightest pixel sets the scale, noise makes such.
    """
    rows, columns = (min(GRID, side) for side in images.shape[-2:])
    means = F.adaptive_avg_pool2d(images, (rows, columns)).flatten(1)
    return F.normalize(means - means.mean(1, keepdim=True))


def noised(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) with new pixel noise over their own, as strong as it is where it is: a little stronger on
    sharp arcs, whose light passes for noise."""
    channels = images.shape[1]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    residual = F.conv2d(padded, RESIDUAL.expand(channels, 1, 3, 3), groups=channels)
    variance = F.avg_pool2d(F.pad(residual.square(), (3, 3, 3, 3), mode="replicate"), 7, stride=1)
    return images + variance.sqrt() * torch.randn(images.shape, generator=generator)


@dataclass(frozen=True)
class Memorisation:
    """What was found among m generated images, each training image looked for in every place of `elements`.

    elements   of the square's group
    ratio      (m,) distance to the nearest training image over distance to the nearest test image
    ratio_test (n,) the same of each test image, among the others: what chance does
    threshold  of the ratio, below which an image is called a copy: at most 0.1 % of the test images are
    copies     how many generated images are
    expected   how many would be by chance, at most
    p_copies   the chance of as many where the generated are like the test images
    nearer     the share of generated images whose nearest real image is a training image
    nearer_expected, nearer_sd  the same, and its standard deviation, where training images are like test images to them
    p          the chance of such a share, or a higher one, there: exact for any generator, however poor (at least 1e-4)
    planted    {kind: (found, planted)} copies of training images
    closest    the ten smallest ratios: places of the `generated` and the `train` image, their distance and ratio, and the
               element that turns the training image into the generated one
    """

    elements: Subgroup
    n_train: int
    ratio: np.ndarray
    ratio_test: np.ndarray
    threshold: float
    copies: int
    expected: float
    p_copies: float
    nearer: float
    nearer_expected: float
    nearer_sd: float
    p: float
    planted: dict[str, tuple[int, int]]
    closest: list[dict[str, Any]]

    @property
    def blind(self) -> list[str]:
        """The kinds of planted copies that were not found reliably: where there are any, `copies` says nothing of them."""
        return [kind for kind, (found, planted) in self.planted.items() if found < FOUND * planted]

    @property
    def verdict(self) -> str:
        """In a sentence."""
        found = "; ".join(f"{found} of {n} planted {kind}" for kind, (found, n) in self.planted.items())
        if self.blind:
            why = "do test images repeat training images?"
            return f"this test cannot find {' and '.join(self.blind)} here ({why}): it found {found}"
        chance = f"{self.expected:.1f} by chance, p = {self.p_copies:.2g}"
        near = (
            f"{self.nearer:.1%} are nearest to a training image, {self.nearer_expected:.1%} by chance, p = {self.p:.2g}"
        )
        return f"{self.copies} of {len(self.ratio)} are copies ({chance}); {near}; it found {found}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with quantiles for the ratios."""
        levels = (0.01, 0.05, 0.25, 0.5, 0.75)

        def quantiles(ratio: np.ndarray) -> dict[str, float]:
            return {f"{level:.0%}": float(q) for level, q in zip(levels, np.quantile(ratio, levels), strict=True)}

        plain = {**vars(self), "elements": list(self.elements), "verdict": self.verdict, "blind": self.blind}
        ratios = {"ratio": quantiles(self.ratio), "ratio_test": quantiles(self.ratio_test)}
        numbers = {"n_generated": len(self.ratio), "n_test": len(self.ratio_test)}
        planted = {kind: {"found": found, "planted": n} for kind, (found, n) in self.planted.items()}
        return {**plain, **ratios, **numbers, "planted": planted}


def memorisation(
    generated: Readable,
    train: Readable,
    test: Readable,
    *,
    places: Mapping[str, Subgroup] | None = None,
    describe: Describe = blocks,
    known: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Memorisation]:
    """Look for training images among generated ones.

    generated, train, test  (N, C, H, W) each, as a network sees them: of a high dynamic range, stretched
    places    {name: subgroup} in which training images are looked for, one answer each; by default `as it is` and
              `turned`, in all places that the shape of the image allows. Of a set with known symmetries give these
    describe  images (n, C, H, W) -> (n, d), where near means alike. Features of EfficientNet-Lite0 found none of 50 copies
              under new noise, and 46 where the images were first averaged over 6x6 pixels; `blocks` found all
    known     (N, d) descriptions of "generated", "train", "test", where they are known already
    progress  called with the number of images of each batch when it is done; N of all three sets in total

    The whole training set is searched, batch by batch; descriptions of the other images are held in memory, one for each
    element: 0.1 GB for 2,500 generated and 2,500 test images in all eight places.

    Copies. An image is a copy if its ratio (see `Memorisation`) is below those of all but 0.1 % of the test images. Test
    images meet the same training images, and as many test images less one: that training images are more, and so
    nearer, is in their ratios, too. Where the generated were like the test images their number is beta-binomial.

    Nearness. The nearest of all real images to a generated one is a training image as often as these are among all, if the
    generator makes no difference between them. Its p value comes of dealing out the labels `training` and `test` anew: it
    holds whatever the generator's quality, and if many generated images have one neighbour (a test of three samples,
    as that of Meehan et al. 2020, arXiv 2004.05675, who compare with the distances of test images instead).

    Planted are exact copies of training images, turned ones, and ones under new noise (see `noised`).

    Raises UserError for sets that do not fit together, and for fewer than 20 test images or none of the others.
    """
    sets = {"generated": generated, "train": train, "test": test}
    if len(test) < FEWEST or not len(generated) or not len(train):
        raise UserError(
            f"{len(generated)} generated, {len(train)} training and {len(test)} test images are too few to look for copies: "
            f"at least 1, 1 and {FEWEST} are needed"
        )
    shapes = {name: tuple(take(images, np.arange(1)).shape[1:]) for name, images in sets.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"images of {' and of '.join(map(str, shapes.values()))} cannot be compared")
    for name, rows in (known or {}).items():
        if len(rows) != len(sets[name]):
            raise UserError(f"{len(rows)} descriptions of {len(sets[name])} {name} images: describe them again")
    whole = group(*shapes["train"][1:])
    places = places or {"as it is": ("identity",), "turned": whole}
    if odd := {g for named in places.values() for g in named} - {*whole}:
        raise UserError(f"images of {shapes['train']} cannot be turned by {odd.pop()}: leave it out")
    elements = tuple(g for g in whole if any(g in named for named in places.values()))

    # The key of a set of images: what they are, and the one answer that they are planted for, or "" for all answers.
    told = {name: torch.from_numpy(np.asarray(rows, np.float32)) for name, rows in (known or {}).items()}
    rng = np.random.default_rng(seed)
    plants = _plants(train, min(max(PLANTED, math.ceil(0.01 * len(generated))), len(train)), places, rng)
    described = {
        (name, ""): torch.cat(list(_described(sets[name], elements, describe, told.get(name), progress)), 1)
        for name in ("generated", "test")
    }
    described |= {key: torch.cat(list(_described(images, elements, describe)), 1) for key, images in plants.items()}
    ends = np.cumsum([rows.shape[1] for rows in described.values()])
    views = torch.cat(list(described.values()), 1)
    centre = views[0].mean(0)  # without it products of large numbers would lose the digits of small distances
    views -= centre
    of_test = views[elements.index("identity"), len(generated) : len(generated) + len(test)]
    own = np.full(views.shape[1], -1)  # the place of each in the test set
    own[len(generated) : len(generated) + len(test)] = np.arange(len(test))
    to_test, which_test = _nearest(views, of_test.split(BATCH), own)
    of_train = _described(train, ("identity",), describe, told.get("train"), progress)
    to_train, which_train = _nearest(views, (part[0] - centre for part in of_train))

    answers = {}
    for name, allowed in places.items():
        turns = [elements.index(g) for g in allowed]
        near, at, turn = _best(to_train[turns], which_train[turns])
        far, other, _ = _best(to_test[turns], which_test[turns])
        tiny = 1e-6 * max(float(np.median(far)), 1e-12)  # a copy of a training and a test image has the ratio 1
        ratio = dict(zip(described, np.split((near + tiny) / (far + tiny), ends[:-1]), strict=True))
        mine, chance = ratio["generated", ""], ratio["test", ""]
        threshold, copies, expected, p_copies = _copies(mine, chance)
        closest = [
            {
                "generated": int(i), "train": int(at[i]), "distance": float(near[i]), "ratio": float(mine[i]),
                "element": _inverse(allowed[turn[i]]),
            }
            for i in np.argsort(mine, kind="stable")[:CLOSEST]
        ]  # fmt: skip
        m = len(generated)
        answers[name] = Memorisation(
            tuple(allowed), len(train), mine, chance, threshold, copies, expected, p_copies,
            *_nearness(near[:m] < far[:m], at[:m], other[:m], len(train), len(test), rng),
            {kind: (int((ratio[kind, to] < threshold).sum()), len(plants[kind, to]))
             for kind, to in plants if to in ("", name)},
            closest,
        )  # fmt: skip
    return answers


def _plants(
    train: Readable, count: int, places: Mapping[str, Subgroup], rng: np.random.Generator
) -> dict[tuple[str, str], Tensor]:
    """{(kind, the answer that it is for or ""): copies (count, C, H, W) of training images}."""

    def some() -> Tensor:
        return take(train, np.sort(rng.choice(len(train), count, replace=False)))

    noise = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    plants = {("copies", ""): some(), ("noisy copies", ""): noised(some(), noise)}
    for name, allowed in places.items():
        if turns := [g for g in allowed if g != "identity"]:
            drawn = torch.from_numpy(rng.integers(len(turns), size=count))
            plants["turned copies", name] = apply_each(some(), turns, drawn)
    return plants


# --- distances --------------------------------------------------------------------------------------------------------


def _described(
    images: Readable,
    elements: Sequence[str],
    describe: Describe,
    known: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Tensor]:
    """Descriptions (elements, n, d) of images in every place, batch by batch."""
    for start in range(0, len(images), BATCH):
        batch = np.arange(start, min(start + BATCH, len(images)))
        places = {} if known is None else {"identity": known[start : start + BATCH]}
        if asked := [g for g in elements if g not in places]:
            pixels = take(images, batch)
            places |= {g: describe(apply(pixels, g).contiguous()).float() for g in asked}
        yield torch.stack([places[g] for g in elements])
        if progress:
            progress(len(batch))


def _nearest(views: Tensor, base: Iterable[Tensor], own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and place of, the nearest row of `base` (N, d) for each of `views` (elements, Q, d): (elements, Q) both.

    own  (Q,) the row that is not to count, or -1
    """
    best = torch.full(views.shape[:2], torch.inf)
    which = torch.zeros(views.shape[:2], dtype=torch.long)
    start = 0
    for rows in base:
        squares = rows.square().sum(1)
        for k, view in enumerate(views):
            closeness = torch.addmm(squares, view, rows.T, alpha=-2)  # less |view|², which is the same for all rows
            if own is not None:
                mine = np.flatnonzero((own >= start) & (own < start + len(rows)))
                closeness[mine, own[mine] - start] = torch.inf
            value, nearest = closeness.min(1)
            # From the pair itself: the product has no digits left for copies.
            distance = (view - rows[nearest]).norm(dim=1).where(value.isfinite(), torch.inf)
            better = distance < best[k]
            best[k][better], which[k][better] = distance[better], nearest[better] + start
        start += len(rows)
    return best.double().numpy(), which.numpy()


def _best(distance: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(elements, Q) -> the smallest distance, its place and the number of its element, (Q,) each."""
    turn = distance.argmin(0)
    column = np.arange(distance.shape[1])
    return distance[turn, column], which[turn, column], turn


def _inverse(element: str) -> str:
    return next(g for g in group(1, 1) if compose(g, element) == "identity")


# --- what chance does -------------------------------------------------------------------------------------------------


def _copies(ratio: np.ndarray, ratio_test: np.ndarray) -> tuple[float, int, float, float]:
    """Threshold, number of copies, the number expected and the p value of as many, all by chance.

    Of m + n ratios of one distribution, how many of the m lie below the (k+1)-th smallest of the n is beta-binomial.
    """
    m, n = len(ratio), len(ratio_test)
    k = int(FALSE_ALARMS * n)
    threshold = float(np.sort(ratio_test)[k])
    copies = int((ratio < threshold).sum())
    return threshold, copies, m * (k + 1) / (n + 1), float(stats.betabinom.sf(copies - 1, m, k + 1, n - k))


def _nearness(
    is_train: np.ndarray, train: np.ndarray, test: np.ndarray, n_train: int, n_test: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """The share of images whose nearest real one is a training image, and that share's mean, standard deviation and p value
    where the labels of real images are dealt out at random.

    is_train, train, test  (m,) which of the two is nearer, and the place of the nearest of either kind
    """
    nearest = Counter(zip(is_train.tolist(), np.where(is_train, train, test).tolist(), strict=True))
    left, drawn = np.full(DRAWS, n_train), np.zeros(DRAWS, int)
    for k, weight in enumerate(nearest.values()):  # labels are dealt to the neighbours alone, one after the other
        is_dealt = rng.random(DRAWS) * (n_train + n_test - k) < left
        left, drawn = left - is_dealt, drawn + weight * is_dealt
    m, seen = len(is_train), int(is_train.sum())
    p = (1 + int((drawn >= seen).sum())) / (1 + DRAWS)
    return seen / m, n_train / (n_train + n_test), float(drawn.std()) / m, p
