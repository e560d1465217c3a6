"""Two-sample tests of images: can a set be told from another one, or from itself turned about?

`classifier_two_sample` trains a small CNN and scores it on images that it has not seen (Lopez-Paz & Oquab 2017,
arXiv 1610.06545). `paired_test` asks whether the members of pairs, such as an image and its mirror image, could change
places; it is exact for any number of images, because then every change of places was as likely as what is seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, optimize, stats
from torch import Tensor, nn

from shared.errors import UserError
from shared.metrics import Images, batches

CONFIDENCE = 0.95  # of every interval
Interval = tuple[float, float]


@dataclass(frozen=True)
class Stretch:
    """arcsinh((x - median) / std) over all pixels of a sample: faint arcs and bright ones are both of order 1."""

    median: float
    std: float

    @classmethod
    def of(cls, images: Tensor) -> "Stretch":
        """UserError if the images have no contrast."""
        std = float(images.double().std())
        if not std > 0:
            raise UserError("images without any contrast cannot be compared")
        return cls(float(images.median()), std)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.arcsinh((images - self.median) / self.std)


# --- a classifier -----------------------------------------------------------------------------------------------------

RESIDUAL = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6  # white noise keeps its variance


@dataclass(frozen=True)
class Classified:
    """How well a classifier tells two sets of n_a and n_b distinct images apart, with intervals of 95 %.

    auc       the chance that it gives an image of a the higher score, rather than one of b; 0.5 for equal sets
    accuracy  the mean of its shares of right answers on a and on b: how often it is right where both are as frequent
    """

    n_a: int
    n_b: int
    auc: float
    auc_interval: Interval
    accuracy: float
    accuracy_interval: Interval


def classifier_two_sample(
    a: Images, b: Images, *, folds: int = 5, steps: int = 120, batch_size: int = 32, width: int = 8, seed: int = 0
) -> Classified:
    """Train a small CNN to tell images a from images b, each scored by a network that has not seen it.

    a, b   (N, C, H, W) each, in the same units; repetitions within a set count once
    folds  of the cross-validation
    steps  of each fold's training; half of a batch is of a, half of b, whatever their numbers

    The network sees the stretched light at full resolution, and beside it the second difference in both directions,
    where the pixel noise stands alone. Deterministic in the seed, on one machine.

    Raises UserError for sets that do not fit together or have fewer than two images a fold.
    """
    samples = [distinct(torch.cat(list(batches(images, 256)))) for images in (a, b)]
    if min(samples[0].shape[-2:]) < 2:
        raise UserError("images of one row or column cannot be told apart")
    if samples[0].shape[1:] != samples[1].shape[1:]:
        raise UserError(f"images of {tuple(samples[0].shape[1:])} and {tuple(samples[1].shape[1:])} cannot be compared")
    if min(map(len, samples)) < 2 * folds:
        raise UserError(
            f"{len(samples[0])} and {len(samples[1])} distinct images are too few for {folds} folds: "
            f"at least {2 * folds} of each are needed"
        )
    images = prepare(torch.cat(samples))
    is_a = torch.arange(len(images)) < len(samples[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fold = torch.cat([torch.randperm(len(sample)) % folds for sample in samples])
        scores = torch.empty(len(images))
        for k in range(folds):
            network = train([images[(fold != k) & one] for one in (is_a, ~is_a)], steps, batch_size, width)
            held_out = torch.where(fold == k)[0]
            scores[held_out] = score(network, images[held_out])
    # Scores of two networks have no common scale: only those of one fold are compared.
    pairs = [(scores[(fold == k) & is_a], scores[(fold == k) & ~is_a]) for k in range(folds)]
    won = sum(float((x[:, None] > y).sum() + 0.5 * (x[:, None] == y).sum()) for x, y in pairs)
    auc = won / sum(len(x) * len(y) for x, y in pairs)
    right = [int((scores[is_a] > 0).sum()), int((scores[~is_a] <= 0).sum())]
    n_a, n_b = len(samples[0]), len(samples[1])
    return Classified(
        n_a, n_b, auc, auc_interval(auc, n_a, n_b), (right[0] / n_a + right[1] / n_b) / 2,
        accuracy_interval(right[0], n_a, right[1], n_b),
    )  # fmt: skip


def distinct(images: Tensor) -> Tensor:
    """The images without repetitions: a copy is no further evidence, and in another fold it would be known already."""
    first: dict[bytes, int] = {}
    for i, image in enumerate(images.numpy()):
        first.setdefault(image.tobytes(), i)
    return images[list(first.values())]


def prepare(images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3 C, H, W): the stretched light, the residual of a smooth image in units of its scatter, and the
    residual's modulus, so that the strength of the noise is linear in what the network sees."""
    channels = images.shape[1]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    residual = F.conv2d(padded, RESIDUAL.expand(channels, 1, 3, 3), groups=channels)
    residual = torch.arcsinh(2 * residual / residual.std().clamp_min(1e-12))
    return torch.cat([Stretch.of(images)(images), residual, residual.abs() - residual.abs().mean()], 1)


def train(sides: Sequence[Tensor], steps: int, batch_size: int, width: int) -> nn.Module:
    """A CNN whose logit is high for images of the first side, trained from torch's global generator."""
    # No normalisation inside: it would hide how strong the noise is.
    network = nn.Sequential(
        nn.Conv2d(sides[0].shape[1], width, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * width, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    half = batch_size // 2
    target = torch.cat([torch.ones(half), torch.zeros(half)])
    for _ in range(steps):
        batch = torch.cat([side[torch.randint(len(side), (half,))] for side in sides])
        loss = F.binary_cross_entropy_with_logits(network(batch)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def score(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part)[:, 0] for part in images.split(64)])


# Each image is tested by a network that the others trained, and trains those that test the others: what two images tell
# of one another is counted twice. Where the sets are equal the variance is twice that of as many independent images
# (to first order in the training set, whose kernel is symmetric: Jacot et al. 2018), so half of them are counted. Short
# trainings lean less on single images, and their intervals are on the wide side.
HALF = 0.5


def auc_interval(auc: float, n_a: int, n_b: int, counted: float = HALF) -> Interval:
    """Interval of an AUC: every value that it lies close enough to (Newcombe 2006, Stat. Med. 25, 559).

    counted  the share of the images that is: half where it is cross-validated, all where others have trained the network

    Variances by Hanley & McNeil 1982, Eq. 1, the larger of the two that they give as a and b change places.
    """
    m, n = counted * n_a, counted * n_b
    z = stats.norm.ppf(0.5 + CONFIDENCE / 2)

    def excess(x: float) -> float:
        q_1, q_2 = x / (2 - x) - x * x, 2 * x * x / (1 + x) - x * x
        high, low = max(q_1, q_2), min(q_1, q_2)
        wide, narrow = max(m, n) - 1, min(m, n) - 1
        return (auc - x) ** 2 - z * z * (x * (1 - x) + wide * high + narrow * low) / (m * n)

    tiny = 1e-9
    middle = min(max(auc, 1e-6), 1 - 1e-6)  # at 0 and 1 themselves the variance vanishes
    low = optimize.brentq(excess, tiny, middle) if excess(tiny) > 0 else 0.0
    high = optimize.brentq(excess, middle, 1 - tiny) if excess(1 - tiny) > 0 else 1.0
    return float(low), float(high)


def accuracy_interval(right_a: int, n_a: int, right_b: int, n_b: int) -> Interval:
    """Interval of the mean of two cross-validated shares, from the exact binomial one of each (Clopper & Pearson 1934).

    The two are combined by squares (Zou & Donner 2008, Stat. Med. 27, 1693).
    """
    down = up = 0.0
    for right, n in ((HALF * right_a, HALF * n_a), (HALF * right_b, HALF * n_b)):
        low = stats.beta.ppf((1 - CONFIDENCE) / 2, right, n - right + 1) if right > 0 else 0.0
        high = stats.beta.ppf((1 + CONFIDENCE) / 2, right + 1, n - right) if right < n else 1.0
        down, up = down + (right / n - low) ** 2, up + (high - right / n) ** 2
    accuracy = (right_a / n_a + right_b / n_b) / 2
    return float(accuracy - math.sqrt(down) / 2), float(accuracy + math.sqrt(up) / 2)


# --- pairs ------------------------------------------------------------------------------------------------------------

LIGHT, GRADIENTS = 15, 5  # blocks on each side of an image
RIDGE = 0.3  # over the mean eigenvalue
FLIPS = 1999
RULES = 200
POWER = 0.8
Described = tuple[Tensor, ...]


@dataclass(frozen=True)
class Paired:
    """The answer of `paired_test`.

    p        of the hypothesis that the members of a pair may change places
    visible  how often a rule must order a pair rightly for 80 % of such samples to be noticed; 0.5 is chance, and 1.0
             says that not even a rule without fail would be
    """

    n: int
    p: float
    visible: float


def describe(images: Tensor) -> Described:
    """Stretched images (N, C, H, W) -> their light (N, C 15 15) and the orientation of its gradients (N, 2 C 5 5), both on a
    grid of blocks: where arcs and where correlated noise show their direction."""

    def blocks(x: Tensor, side: int) -> Tensor:
        return F.adaptive_avg_pool2d(x, (min(side, images.shape[-2] - 1), min(side, images.shape[-1] - 1)))

    def strength(difference: Tensor) -> Tensor:
        return blocks(difference.square(), GRADIENTS)

    # Of neighbours, for differences two pixels apart see nothing of how neighbours are correlated. Along the sides and
    # along the diagonals, for no mirror leaves both kinds alone.
    across, down = strength(images.diff(dim=-1)), strength(images.diff(dim=-2))
    falling = strength(images[..., 1:, 1:] - images[..., :-1, :-1])
    rising = strength(images[..., 1:, :-1] - images[..., :-1, 1:])
    pairs = ((across, down), (falling, rising))
    orientation = torch.cat([(one - other) / (one + other + 1e-12) for one, other in pairs], 1)
    return blocks(images, LIGHT).flatten(1), orientation.flatten(1)


def paired_test(a: Sequence[Described], b: Sequence[Described], seed: int = 0, level: float = 0.01) -> Paired:
    """Whether the members of N pairs, such as images and their mirror images, could change places unnoticed.

    a, b   the views of each member: an image may be described in several places of a group. View k holds kinds of
           features, each (N, d), as `describe` gives them
    level  of the test that `visible` is about

    With d_i = sum of phi(a_i) - sum of phi(b_i), s = 1 and the Gram matrix K of d, a kernel Fisher discriminant (Harchaoui
    et al. 2008, arXiv 0804.1026), that is Hotelling's T² with a ridge, has the statistic s' K (K + ridge)^-1 s. Pairs
    that change places change signs in s and nothing in K, so random signs s give the distribution it has by chance,
    exactly. Of the kinds of features counts the one that stands out most, which the random signs allow for.
    """
    n = len(a[0][0])
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (n, FLIPS))
    found: list[np.ndarray] = []
    visible = 0.5
    for kind in range(len(a[0])):
        gram = _gram([view[kind] for view in a], [view[kind] for view in b])
        scale = float(np.trace(gram)) / n
        if scale < 1e-12:  # pairs of equal members: nothing changes when they change places
            continue
        factor = np.linalg.cholesky(gram + RIDGE * scale * np.eye(n))

        def statistic(s: np.ndarray, factor: np.ndarray = factor, ridge: float = RIDGE * scale) -> np.ndarray:
            # s' K (K + r)^-1 s = n - r |L^-1 s|² with L L' = K + r: one factor for all signs
            return n - ridge * np.square(linalg.solve_triangular(factor, s, lower=True, check_finite=False)).sum(0)

        seen_and_null = np.append(statistic(np.ones((n, 1))), statistic(signs))
        null, spread = seen_and_null[1:], seen_and_null.std()
        if spread < 1e-9 * n:  # a single pair
            visible = 1.0
            continue
        found.append((seen_and_null - seen_and_null.mean()) / spread)
        # Rules as this kernel imagines them. One that is right in a share x of the pairs adds (2 x - 1)² of what one
        # adds that is never wrong.
        smooth = np.linalg.cholesky(gram + 1e-6 * scale * np.eye(n))
        never_wrong = np.median(statistic(np.sign(smooth @ rng.standard_normal((n, RULES))))) - null.mean()
        gain = np.quantile(null, 1 - level) - np.quantile(null, 1 - POWER)
        visible = max(visible, 0.5 + 0.5 * math.sqrt(min(1.0, gain / max(never_wrong, 1e-12))))
    if not found:
        return Paired(n, 1.0, visible)
    best = np.max(found, 0)
    return Paired(n, float(np.mean(best >= best[0] - 1e-9)), visible)


def holm(p: dict[str, float]) -> dict[str, float]:
    """p values of several tests, made larger so that comparing each with a level keeps that level for all together."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - k) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def _gram(a: list[Tensor], b: list[Tensor]) -> np.ndarray:
    """(N, N): the products <d_i, d_j> in the space of a Gaussian kernel, as wide as the median distance of images."""
    views = [view.double() for view in (*a, *b)]
    signs = [1.0] * len(a) + [-1.0] * len(b)
    few = [view[:256] for view in views]
    # Over all views alike: no change of places changes it.
    apart = ~torch.eye(len(few[0]), dtype=torch.bool)
    between = torch.cat([_squared_distance(x, y)[apart] for x in few for y in few])
    width = float(between.median()) if len(between) else 1.0
    total = torch.zeros(len(views[0]), len(views[0]), dtype=torch.float64)
    for i, x in enumerate(views):
        for j, y in enumerate(views[: i + 1]):
            kernel = torch.exp(_squared_distance(x, y) * (-0.5 / max(width, 1e-12)))
            total += signs[i] * signs[j] * (kernel if i == j else kernel + kernel.T)
    return total.numpy()


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
