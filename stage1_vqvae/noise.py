"""The noise law: how far an image strays from the clean light a decoder gives, and how to stray likewise.

No latent small enough to diffuse can carry white pixel noise, so the decoder learns the clean image and the noise is
drawn after it. A photon-counting detector behind a linear scale has

    variance(s) = a + b s,       s = clean - background, not below 0,

and a third central moment of `skew` times the variance (for pure Poisson noise skew = b, for Gaussian noise 0).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The fourth difference in both directions. Scaled to pass white noise with unit variance, it cancels every surface that
# is cubic along rows or along columns, so what a decoder gets smoothly wrong does not count as noise.
_FOURTH = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0])
HIGH_PASS = (_FOURTH[:, None] * _FOURTH[None, :] / _FOURTH.square().sum())[None, None]

Generators = torch.Generator | Sequence[torch.Generator] | None


class NoiseLaw(nn.Module):
    """a, b, background, skew: scalars in the data's own units (variance in their square); all 0 means no noise."""

    a: Tensor
    b: Tensor
    background: Tensor
    skew: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "background", "skew"):
            self.register_buffer(name, torch.zeros(()))

    def variance(self, clean: Tensor) -> Tensor:
        """clean, any shape -> variance of a pixel's noise, the same shape."""
        return self.a + self.b * (clean - self.background).clamp_min(0)

    def forward(self, clean: Tensor, generator: Generators = None) -> Tensor:
        """clean (N, C, H, W) -> clean + noise. A sequence of generators holds one for each image."""
        z = standard_normal(clean, generator)
        # Cornish–Fisher to first order: z + g/6 (z² - 1) has skewness g. With g = skew/sd the second term loses its sd;
        # its own variance, skew²/18, is taken out of the first.
        sd = (self.variance(clean) - self.skew.square() / 18).clamp_min(0).sqrt()
        return clean + sd * z + self.skew / 6 * (z.square() - 1)

    @torch.no_grad()
    def fit(self, images: Tensor, clean: Tensor) -> dict[str, list[float]]:
        """Fit the law to images and their clean decodings, both (N, C, H, W); return the variance–signal curve.

        The law is fitted to the high-passed residual, which is free of the decoder's own smooth error; the curve also
        holds the variance of the plain residual, and what it has over the law is that error.
        """
        frame = max(2, min(clean.shape[-2:]) // 15)
        border = torch.ones(clean.shape[-2:], dtype=torch.bool, device=clean.device)
        border[frame:-frame, frame:-frame] = False
        self.background.copy_(clean[..., border].median())

        residual = images - clean
        # The filter mixes the variances of 25 pixels with the squares of its weights: so must the signal beside it.
        signal = _filter(clean, HIGH_PASS.square()).flatten() - self.background
        noise = _filter(residual, HIGH_PASS).square().flatten()
        inner = residual[..., 2:-2, 2:-2].square().flatten()

        edges = torch.cat([torch.quantile(_thin(signal), torch.linspace(0, 0.8, 9, device=signal.device)),
                           torch.linspace(0, 1, 25, device=signal.device)[1:] * signal.max()]).unique()  # fmt: skip
        bins = torch.bucketize(signal, edges[1:-1])
        count = torch.bincount(bins, minlength=len(edges) - 1).double()
        keep = count >= min(200, float(count.max()))  # of a few small images the fullest bin must do

        def mean(values: Tensor) -> Tensor:
            return (torch.bincount(bins, values.double(), len(edges) - 1) / count.clamp_min(1))[keep]

        s, v, total = mean(signal.clamp_min(0)), mean(noise), mean(inner)
        a, b = _affine(s, v, count[keep])
        self.a.copy_(a)
        self.b.copy_(b)

        dark = (clean - self.background) < 2 * self.a.sqrt()
        r = residual[dark].double()
        r = r - r.mean()
        self.skew.copy_((r.pow(3).mean() / r.square().mean().clamp_min(1e-60)).clamp(0, float(3 * self.a.sqrt())))
        curve = {"signal": s, "variance": v, "residual_variance": total, "law": a + b * s, "pixels": count[keep]}
        return {key: value.tolist() for key, value in curve.items()}


def estimate_law(images: Tensor) -> NoiseLaw:
    """A first law from images alone, (N, C, H, W), before there is a decoder: a 5 px mean stands in for the clean light.

    Good to some per cent where the light is smooth over five pixels; the training loss weighs its pixels by it.
    """
    channels = images.shape[1]
    box = torch.full((channels, 1, 5, 5), 1 / 25, device=images.device)
    smooth = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), box, groups=channels)
    law = NoiseLaw().to(images.device)
    law.fit(images, smooth)
    return law


def standard_normal(like: Tensor, generator: Generators) -> Tensor:
    """White noise of the shape of `like`, drawn on the CPU so that a seed means the same on every device."""
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
    return torch.stack([torch.randn(like.shape[1:], generator=g, device=g.device) for g in generator]).to(like)


def _filter(images: Tensor, kernel: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H - 4, W - 4), each channel convolved with a 5×5 kernel where it fits."""
    n, c, h, w = images.shape
    return F.conv2d(images.reshape(n * c, 1, h, w), kernel.to(images)).reshape(n, c, h - 4, w - 4)


def _thin(values: Tensor, limit: int = 1_000_000) -> Tensor:
    return values[:: max(1, len(values) // limit)][:limit]  # torch.quantile takes 16 M values at most


def _affine(s: Tensor, v: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of v = a + b s with a > 0, b >= 0. A variance estimated from n squares has a variance of 2 v²/n."""
    fitted, least = v, (1e-9 * v.max()).clamp_min(1e-60)  # relative: units may be counts or janskys
    for _ in range(4):
        w = count / fitted.clamp_min(least).square()
        sm, vm = (w * s).sum() / w.sum(), (w * v).sum() / w.sum()
        b = ((w * (s - sm) * (v - vm)).sum() / (w * (s - sm).square()).sum().clamp_min(1e-30)).clamp_min(0)
        a = (vm - b * sm).clamp_min(least)
        fitted = a + b * s
    return a, b
