"""How two sets of images differ as distributions, beside their Fréchet distance: on features (N, d) of `fid.features`.

Each number comes with its floor, the same statistic of real images against other real images, which a perfect generator
reaches: 0 for the distances in the mean, something below 1 for the shares. So each is read by its excess over the floor,
in units of the floor's scatter, and an excess of either sign is a fault. A sliced Wasserstein distance is not here: of
a dozen kinds of damage it saw none that another does not see as well.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from shared.errors import UserError
from shared.metrics.fid import frechet_distance

CONFIDENCE = 0.95  # of every interval
NEIGHBOURS = 5
SPLITS = 5  # of the real images, for a floor
CHUNK = 1024  # rows of a matrix of pairs at once: 80 MB with 10,000 images
BLOCKS = 8  # pairs of samples of n / 8, whose scatter is the error of the extrapolation
FEWEST = {"kid": 3, "neighbourhoods": NEIGHBOURS + 1, "fd_infinity": 2 * BLOCKS}  # images a side
Interval = tuple[float, float]


def scores(
    reference: np.ndarray,
    real: np.ndarray,
    candidates: dict[str, np.ndarray],
    *,
    logits: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """All metrics of this module: {metric: {candidate: {value, floor, floor_sd, excess, n, ...}}}, as plain types.

    reference   features of real images (N, d)
    real        features of other real images (n, d)
    candidates  name -> features of generated images (n, d)
    logits      of the network's classes, from features (`fid.Inception.logits`); without it no inception_score

    kid              1,000 times the squared kernel distance, unbiased, with its `interval`
    precision        share of generated images that are where real ones are; recall the reverse
    density          how many real images' neighbourhoods a generated one is in, 1 on average for equal sets
    coverage         share of real images with a generated one in their neighbourhood
    fd_infinity      Fréchet distance extrapolated to infinitely many images, with its `interval`
    inception_score  of the candidate alone, as of n images and not of ten parts of them

    The floor is that of random splits of the pooled real features: their mean and standard deviation, and excess is
    value - floor. Both sides have the same n, that of the smaller: of more images, n are drawn at random. A metric that
    needs more than n images (FEWEST) is left out. UserError unless the candidates are as many as `real`, and for
    features that are not finite.
    """
    for name, candidate in candidates.items():
        if len(candidate) != len(real):
            raise UserError(
                f"{name} has {len(candidate)} images and the floor {len(real)}; these metrics depend on the number, so "
                "take as many of both."
            )
    rng = np.random.default_rng(seed)
    n = min(len(reference), len(real))
    pool = np.concatenate([reference, real])
    halves = [rng.permutation(len(pool))[: 2 * n] for _ in range(SPLITS)]
    floors = [_measured(pool[i[:n]], pool[i[n:]], logits, seed) for i in halves]
    known = _drawn(reference, n, rng)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, candidate in candidates.items():
        for metric, measured in _measured(known, _drawn(candidate, n, rng), logits, seed).items():
            of_real = [floor[metric]["value"] for floor in floors]
            floor, floor_sd = float(np.mean(of_real)), float(np.std(of_real, ddof=1))
            score = {**measured, "floor": floor, "floor_sd": floor_sd, "excess": measured["value"] - floor}
            score |= {"n": n, "splits": SPLITS}
            found.setdefault(metric, {})[name] = score
    return found


def _drawn(features: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return features if len(features) == n else features[rng.permutation(len(features))[:n]]


def _measured(
    real: np.ndarray, generated: np.ndarray, logits: Callable[[np.ndarray], np.ndarray] | None, seed: int
) -> dict[str, dict[str, Any]]:
    """{metric: {value, interval where there is one}} of features (n, d) each."""
    found: dict[str, dict[str, Any]] = {}
    if len(real) >= FEWEST["kid"]:
        value, interval = kid(real, generated)
        found["kid"] = {"value": value, "interval": list(interval)}
    if len(real) >= FEWEST["neighbourhoods"]:
        found |= {name: {"value": value} for name, value in neighbourhoods(real, generated).items()}
    if len(real) >= FEWEST["fd_infinity"]:
        value, interval = fd_infinity(real, generated, seed)
        found["fd_infinity"] = {"value": value, "interval": list(interval)}
    if logits is not None:
        found["inception_score"] = {"value": inception_score(logits(generated))}
    return found


# --- kernel distance --------------------------------------------------------------------------------------------------


def kid(a: np.ndarray, b: np.ndarray) -> tuple[float, Interval]:
    """1,000 times the unbiased estimate of MMD² with the kernel (x·y / d + 1)³, and its interval of 95 %.

    a, b  features (m, d) and (n, d)

    Bińkowski et al. 2018 (arXiv 1801.01401), over all pairs and not over subsets. It may be negative, and is in half of
    all cases where the sets are equal. The interval is that of the MMD² of the two distributions that both sets are
    drawn from: another draw of both would give another value. A U-statistic of two samples has a variance of first and
    of second order in 1/n. Sutherland & Deka 2019 (arXiv 1906.02104) estimate the sum of both, which is what is done here
    from moments of rows: the first order vanishes for equal sets, where the usual estimate, which has it alone, fails.

    UserError for sets of fewer than three, of different d, or not finite.
    """
    x, y = _tensors(a, b, FEWEST["kid"])
    m, n = len(x), len(y)
    x_x, _, q_x = _kernel_moments(x, x)
    y_y, _, q_y = _kernel_moments(y, y)
    x_y, y_x, q = _kernel_moments(x, y)
    value = x_x.mean() + y_y.mean() - 2 * x_y.mean()
    second = 2 * q_x / (m * (m - 1)) + 2 * q_y / (n * (n - 1)) + 4 * q / (m * n)
    # The scatter of what single images tell holds that of pairs, each pair's once for either member.
    of_images = (2 * (x_x - x_y)).var() / m + (2 * (y_y - y_x)).var() / n
    pairs = 4 * q_x / (m * (m - 1)) + 4 * q_y / (n * (n - 1)) + 8 * q / (m * n)
    sd = float((of_images - pairs).clamp_min(0) + second) ** 0.5
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * sd
    return 1000 * float(value), (1000 * (float(value) - half), 1000 * (float(value) + half))


def _kernel_moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Means of the kernel over y (m,) and over x (n,), and its variance beyond those: pairs of one image left out."""
    same = x is y
    rows, columns, squares = [], torch.zeros(len(y), dtype=x.dtype), 0.0
    for start in range(0, len(x), CHUNK):
        kernel = (x[start : start + CHUNK] @ y.T).div_(x.shape[1]).add_(1).pow_(3)
        if same:
            kernel.diagonal(start).zero_()
        rows.append(kernel.sum(1) / (len(y) - same))
        columns += kernel.sum(0) / (len(x) - same)
        squares += float(kernel.square_().sum())
    of_x = torch.cat(rows)
    beyond = squares / (len(x) * (len(y) - same)) - of_x.mean() ** 2 - of_x.var() - columns.var()
    return of_x, columns, max(float(beyond), 0.0)


# --- neighbourhoods ---------------------------------------------------------------------------------------------------


def neighbourhoods(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al.
    2020, arXiv 2002.09797).

    real, generated  features (n, d) each

    An image's neighbourhood is the ball that reaches to its k-th nearest neighbour in its own set. For equal sets the
    density is 1 and the coverage close to 1 - 2^-k; precision and recall have no such value. UserError unless both have
    the same n > k: more images of one side would have smaller neighbourhoods.
    """
    x, y = _tensors(real, generated, k + 1)
    n = len(x)
    if len(y) != n:
        raise UserError(f"neighbourhoods need as many real as generated images, got {n} and {len(y)}: take as many.")
    reach_x, reach_y = _reach(x, k), _reach(y, k)
    precise = torch.zeros(n, dtype=torch.bool)
    recalled, covered, inside = 0, 0, 0
    for start in range(0, n, CHUNK):
        distance = torch.cdist(x[start : start + CHUNK], y)
        within = distance <= reach_x[start : start + CHUNK, None]
        precise |= within.any(0)
        covered += int(within.any(1).sum())
        inside += int(within.sum())
        recalled += int((distance <= reach_y).any(1).sum())
    return {
        "precision": float(precise.double().mean()), "recall": recalled / n,
        "density": inside / (k * n), "coverage": covered / n,
    }  # fmt: skip


def _reach(x: Tensor, k: int) -> Tensor:
    """(n,): the distance of each row from its k-th nearest neighbour; the nearest is the row itself."""
    return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, k] for part in x.split(CHUNK)])


# --- Fréchet distance of infinitely many --------------------------------------------------------------------------------


def fd_infinity(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, Interval]:
    """The Fréchet distance of infinitely many images on both sides, and its interval of 95 %.

    a, b  features (n, d) each, n at least 16 (UserError otherwise)

    A line in 1/n (Chong & Forsyth 2020, arXiv 1911.07023), but on both sides together: with a fixed number of real
    images their share of the bias would stay. It goes through n and n / 2, where both pairs of random halves are
    averaged, so that every image counts as often at both. Smaller sets bend away from the line: of two times 500 lenses
    (floor 1.03, d = 1280) it leaves 0.11 of the bias, one through n / 4 too 0.23 and one through n / 8 too 0.44.

    The interval is from the scatter of 8 pairs of disjoint samples of n / 8, which has the scatter of all images to first
    order in 1/n (Student's t). To second order it has more: for equal sets it is two or three times as wide as need be.
    Both hold for independent draws: of a set and its copy the value is minus the bias.
    """
    if len(a) != len(b) or len(a) < FEWEST["fd_infinity"]:
        raise UserError(
            f"A Fréchet distance of infinitely many needs as many images of both sides, at least {FEWEST['fd_infinity']}, "
            f"got {len(a)} and {len(b)}."
        )
    rng = np.random.default_rng(seed)
    even = len(a) - len(a) % 2
    a, b = a[rng.permutation(len(a))[:even]], b[rng.permutation(len(b))[:even]]

    def parts(count: int) -> list[float]:
        size = len(a) // count
        starts = range(0, count * size, size)
        return [frechet_distance(a[i : i + size], b[i : i + size]) for i in starts]

    value = 2 * frechet_distance(a, b) - float(np.mean(parts(2)))
    error = float(np.std(parts(BLOCKS), ddof=1)) / BLOCKS**0.5
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, BLOCKS - 1)) * error
    return value, (value - half, value + half)


# --- Inception score ----------------------------------------------------------------------------------------------------


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of the classes of one image, p(y|x), from those of all, p(y).

    logits  (N, classes), of all images at once: parts of N / 10, as in Salimans et al. 2016 (arXiv 1606.03498), would
            lower it. From 1, for images that all look alike to the classifier, to the number of classes. It knows no
            real image and means something on the classifier's own classes only (Barratt & Sharma 2018,
            arXiv 1801.01973): of lenses it is published for comparison.
    """
    if logits.ndim != 2 or not len(logits) or not np.isfinite(logits).all():
        raise UserError(f"An Inception score needs finite logits (N >= 1, classes), got the shape {logits.shape}.")
    log_p = special.log_softmax(logits.astype(np.float64), axis=1)
    log_mean = special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    return float(np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean()))


def _tensors(a: np.ndarray, b: np.ndarray, fewest: int) -> tuple[Tensor, Tensor]:
    """UserError unless both are finite (N >= fewest, d)."""
    for x in (a, b):
        if x.ndim != 2 or x.shape[1:] != a.shape[1:] or len(x) < fewest:
            raise UserError(f"Two sets of features (N >= {fewest}, d) are needed, got {a.shape} and {b.shape}.")
        if not np.isfinite(x).all():
            raise UserError("Features must be finite, got NaN or infinity; look at the images.")
    return torch.from_numpy(a.astype(np.float64)), torch.from_numpy(b.astype(np.float64))
