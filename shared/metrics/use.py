"""Use: does a classifier that has seen generated lenses alone know real ones, and the reverse?

A small CNN learns the classes of one set of images and is asked for those of another: trained on generated and tested on
real images it says how far generated ones can stand in for real ones (the classification accuracy score of Ravuri &
Vinyals 2019, arXiv 1905.10887), the reverse whether they are what their labels say. Trained and tested on real images it
gives the ceiling of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from shared.data.symmetries import apply_each
from shared.errors import UserError
from shared.metrics import Readable, take
from shared.metrics.two_sample import Interval, Stretch, auc_interval

Labelled = tuple[Readable, np.ndarray]  # images (N, C, H, W), and their classes (N,), from 0 on
FEWEST = 10  # images of a class


@dataclass(frozen=True)
class Classifier:
    """How well classes are told apart on n_test images, after n_train others, with intervals of 95 % (of the test images;
    another training differs, too).

    auc       of each class against the rest, their mean; 0.5 by chance. Its interval is the mean of theirs, and wide
    accuracy  share of right answers
    by_class  AUC of each class against the rest
    """

    n_train: int
    n_test: int
    auc: float
    auc_interval: Interval
    accuracy: float
    accuracy_interval: Interval
    by_class: dict[str, float]


def use(
    real_train: Labelled,
    real_test: Labelled,
    generated: Labelled,
    classes: Sequence[str],
    *,
    elements: Sequence[str] = ("identity",),
    steps: int = 800,
    batch_size: int = 32,
    width: int = 16,
    seed: int = 0,
) -> dict[str, Classifier]:
    """Train on real and on generated images, test on both: {"real → real", "generated → real", "real → generated"}.

    classes   names of the labels 0, 1, ...
    elements  the allowed symmetries (shared/data/symmetries.py): training turns images by them
    steps     of each of the two trainings; every class is a batch's with the same frequency

    Both trainings see as many images of each class: the smaller number of the two sets. The network sees images at half
    their resolution where they are 128 pixels wide or more, and so on: 800 steps of 32 images of 150x150 are 45 s on a
    core. Deterministic in the seed, on one machine.

    Where the ceiling, real → real, is at chance, the other two say nothing: its classes take more images to learn.

    Raises UserError for fewer than two classes, or fewer than 10 images of one in any set.
    """
    sets = {"real training": real_train, "real test": real_test, "generated": generated}
    if len(classes) < 2:
        raise UserError(
            "images without classes give a classifier nothing to learn: use is measured of sets with classes"
        )
    places = {name: _by_class(name, labelled, classes) for name, labelled in sets.items()}
    if len(shapes := {tuple(take(images, np.arange(1)).shape[1:]) for images, _ in sets.values()}) > 1:
        raise UserError(f"images of {' and of '.join(map(str, shapes))} cannot be compared")
    rng = np.random.default_rng(seed)
    trained = {}
    for name in ("real training", "generated"):
        sizes = [min(map(len, pair)) for pair in zip(places["real training"], places["generated"], strict=True)]
        chosen = [rng.permutation(of)[:n] for of, n in zip(places[name], sizes, strict=True)]
        trained[name] = Trained(sets[name][0], chosen, elements, steps, batch_size, width, seed)
    real, fake = trained["real training"], trained["generated"]
    return {
        "real → real": evaluate(real, real_test, classes),
        "generated → real": evaluate(fake, real_test, classes),
        "real → generated": evaluate(real, generated, classes),
    }


def _by_class(name: str, labelled: Labelled, classes: Sequence[str]) -> list[np.ndarray]:
    """The places of each class in a set."""
    images, labels = labelled
    if len(images) != len(labels):
        raise UserError(f"{len(labels)} labels of {len(images)} {name} images: give each image one")
    places = [np.flatnonzero(np.asarray(labels) == k) for k in range(len(classes))]
    if sum(map(len, places)) < len(labels):
        raise UserError(f"{name} images have labels other than those of {', '.join(classes)}: leave these images out")
    for kind, of in zip(classes, places, strict=True):
        if len(of) < FEWEST:
            raise UserError(f"{len(of)} {name} images of class {kind} are too few: at least {FEWEST} are needed")
    return places


class Trained:
    """A CNN trained on images of each class: called with images (n, C, H, W), it returns log probabilities (n, K)."""

    def __init__(
        self,
        images: Readable,
        places: Sequence[np.ndarray],
        elements: Sequence[str],
        steps: int,
        batch_size: int,
        width: int,
        seed: int,
    ) -> None:
        """places: of the images of each class."""
        rng = np.random.default_rng(seed)
        self.n = sum(map(len, places))
        self.stretch = Stretch.of(take(images, np.sort(rng.permutation(np.concatenate(places))[:256])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            channels, *sides = take(images, np.arange(1)).shape[1:]
            self.pool = max(1, min(sides) // 64)  # as good in half the time
            widths = [channels, width, 2 * width, 4 * width, 4 * width, 4 * width]
            # To 3x3 or fewer: what tells the classes apart is faint, small and anywhere on an arc.
            layers = [layer for a, b in pairwise(widths) for layer in _block(a, b)]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(places))]
            self.network = nn.Sequential(*layers, *head)
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
            for _ in range(steps):
                labels = rng.integers(len(places), size=batch_size)
                batch = self.seen(take(images, np.array([rng.choice(places[k]) for k in labels])))
                batch = apply_each(batch, elements, torch.from_numpy(rng.integers(len(elements), size=batch_size)))
                loss = F.cross_entropy(self.network(batch), torch.from_numpy(labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(self.seen(images)).log_softmax(1)

    def seen(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(self.stretch(images), self.pool)


def _block(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def evaluate(trained: Trained, labelled: Labelled, classes: Sequence[str]) -> Classifier:
    images, labels = labelled[0], np.asarray(labelled[1])
    split = np.array_split(np.arange(len(images)), -(-len(images) // 64))
    scores = torch.cat([trained(take(images, part)) for part in split]).numpy()
    right = stats.binomtest(int((scores.argmax(1) == labels).sum()), len(labels))
    accuracy = right.proportion_ci(0.95, "wilson")
    aucs = [auc(scores[labels == k, k], scores[labels != k, k]) for k in range(len(classes))]
    sizes = [int((labels == k).sum()) for k in range(len(classes))]
    # Of images that the classifier has not seen each is its own evidence.
    intervals = [auc_interval(a, n, len(labels) - n, counted=1.0) for a, n in zip(aucs, sizes, strict=True)]
    low, high = np.mean(intervals, 0)
    return Classifier(
        trained.n, len(labels), float(np.mean(aucs)), (float(low), float(high)), float(right.statistic),
        (float(accuracy.low), float(accuracy.high)), dict(zip(classes, aucs, strict=True)),
    )  # fmt: skip


def auc(a: np.ndarray, b: np.ndarray) -> float:
    """The chance that one of a (n,) is larger than one of b (m,), equal ones counted half: Mann & Whitney's U over n m."""
    ranks = stats.rankdata(np.concatenate([a, b]))
    return float((ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))
