"""What pixels tell of their noise: its variance along the signal, and whether they hold counts."""

import torch
import torch.nn.functional as F
from torch import Tensor

# The fourth difference in both directions. Scaled to pass white noise with unit variance, it cancels every surface that
# is cubic along rows or along columns, so what a decoder gets smoothly wrong does not count as noise.
_FOURTH = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0])
HIGH_PASS = (_FOURTH[:, None] * _FOURTH[None, :] / _FOURTH.square().sum())[None, None]

WHOLE = 0.02  # of a count: how far a whole one may be off


def filtered(images: Tensor, kernel: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 4, W - 4), each channel convolved with a 5×5 kernel where it fits."""
    n, c, h, w = images.shape
    return F.conv2d(images.reshape(n * c, 1, h, w), kernel.to(images)).reshape(n, c, h - 4, w - 4)


def _edges(signal: Tensor) -> Tensor:
    """Bins of signal: some by the number of pixels, where most are dark, and some by brightness."""
    shares = torch.quantile(thin(signal.flatten()), torch.linspace(0, 0.8, 9, device=signal.device))
    return torch.cat([shares, torch.linspace(0, 1, 25, device=signal.device)[1:] * signal.max()]).unique()


def binned(signal: Tensor, *others: Tensor) -> list[Tensor]:
    """Means of signal and others in each bin of signal that is full enough, and last its number of pixels."""
    edges = _edges(signal)
    bins = torch.bucketize(signal, edges[1:-1]).flatten()
    count = torch.bincount(bins, minlength=max(1, len(edges) - 1)).double()
    keep = count >= min(200, float(count.max()))  # of a few small images the fullest bin must do
    means = [torch.bincount(bins, x.flatten().double(), len(count)) / count.clamp_min(1) for x in (signal, *others)]
    return [column[keep] for column in (*means, count)]


def thin(values: Tensor, limit: int = 1_000_000) -> Tensor:
    return values[:: max(1, len(values) // limit)][:limit]  # torch.quantile takes 16 M values at most


def affine(s: Tensor, v: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of v = a + b s with a > 0, b >= 0. A variance estimated from n squares has a variance of 2 v²/n."""
    fitted, least = v, (1e-9 * v.max()).clamp_min(1e-60)  # relative: units may be counts or janskys
    for _ in range(4):
        w = count / fitted.clamp_min(least).square()
        sm, vm = (w * s).sum() / w.sum(), (w * v).sum() / w.sum()
        b = ((w * (s - sm) * (v - vm)).sum() / (w * (s - sm).square()).sum().clamp_min(1e-30)).clamp_min(0)
        a = (vm - b * sm).clamp_min(least)
        fitted = a + b * s
    return a, b


def count_step(image: Tensor) -> float:
    """The step between an image's values where they are whole multiples of one above its least, else 0."""
    values = image.unique().double()
    if len(values) < 3 or len(values) > image.numel() / 2:
        return 0.0
    gaps = values.diff()
    gap = gaps[gaps > 0.5 * gaps.max() / image.numel()].min()  # float32 may tell equal counts apart
    for _ in range(3):  # sharper by all values than by two
        counts = ((values - values[0]) / gap).round()
        gap = (values[-1] - values[0]) / counts[-1]
    return float(gap) if float(((values - values[0]) / gap - counts).abs().max()) < WHOLE else 0.0
