"""The noise law: how far an image strays from the clean light a decoder gives, and how to stray likewise.

No latent small enough to diffuse can carry white pixel noise, so the decoder learns the clean image and the noise is
drawn after it. A photon-counting detector behind a linear scale has

    variance(s) = a + b s,       s = clean - background, not below 0,

which is the law `affine`, with normal noise. The law `image` adds what real images have beside it, as far as they show
it: a background of their own, on which a depends (exposures differ); noise that is not normal (few photons, cut at 0);
whole counts; a scale of their own (each image from 0 to 1). Where variance and counts are those of photons, photons are
drawn, and the scale is taken from them as it was from the real ones. A decoder may also say by how much the law is wrong.
Images of several bands have a law for each.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor, nn

from stage1_vqvae.curve import HIGH_PASS, affine, binned, count_step, filtered, thin
from stage1_vqvae.draws import Generators, poisson, standard_normal

NORMAL = torch.linspace(-5, 5, 41)  # where the table holds its quantiles: a normal variable's values
SIGNALS = 16  # rows of the table, from dark to bright
FEW = 1000  # pixels do not tell a shape
LEVEL_SHARE = 0.1  # of an image is taken to be background
# Of full scale, as the network sees it, above the background: where a lens is bright enough for its noise to matter to a fit.
LIT = 0.1
ENOUGH = 20_000_000  # pixels: more of them make no better law, and all are held in memory at once
COUNTED = 256  # images whose counts are looked at
OF_PHOTONS = 0.1  # how far variances may be from those of photons, relative


class NoiseLaw(nn.Module):
    """What is added to clean images of one band; fresh, nothing. Buffers, in the data's own units:

    dark, low    variance of the background: dark · (1, x, x²) of an image whose `level` lies x above low
    b            what a unit of signal above the background adds to the variance
    background   the median level, and `a` the variance there
    table        (SIGNALS, 41) quantiles of noise / sd at the values NORMAL of a normal variable, for as many signal-to-noise
    signal       ratios (clean - low) / sd, whose roots run evenly between these (2,)
    step         images hold multiples of it (of one count); 0: any value
    gain         where the noise is that of photons, the value of one in an image whose `level` lies x above low: gain · (1, x)
    least        and how many of them scaling took from all pixels of an image, on average: those of its darkest pixel
    scale        (2,) least and greatest value of every image, where each was scaled to them; equal: none was
    """

    dark: Tensor
    low: Tensor
    b: Tensor
    background: Tensor
    table: Tensor
    signal: Tensor
    step: Tensor
    gain: Tensor
    least: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "b", "background", "step", "least"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("gain", torch.zeros(2))
        self.register_buffer("dark", torch.zeros(3))
        self.register_buffer("signal", torch.tensor([0.0, 1.0]))
        self.register_buffer("table", NORMAL.expand(SIGNALS, -1).clone())
        self.register_buffer("scale", torch.zeros(2))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("gain", "least"):  # which models of version 0.1.0 do not have
            state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def a(self) -> Tensor:
        """Variance of the background of the median image."""
        return self._dark(self.background)

    @property
    def scaled(self) -> bool:
        """Whether each image was scaled to the same least and greatest value."""
        return bool(self.scale[0] < self.scale[1])

    def level(self, images: Tensor) -> Tensor:
        """The background of each image (N, 1, H, W) -> (N, 1, 1, 1): low among its means over some 5 × 5 pixels."""
        side = max(1, min(images.shape[-2:]) // 30)
        means = F.avg_pool2d(images, side).flatten(2)
        return means.kthvalue(1 + int(LEVEL_SHARE * (means.shape[-1] - 1)), dim=2).values[..., None, None]

    def variance(self, clean: Tensor) -> Tensor:
        """clean (N, 1, H, W) -> variance of the noise of a pixel, the same shape."""
        level = self.level(clean)
        return self._dark(level) + self.b * (clean - level).clamp_min(0)

    def forward(self, clean: Tensor, generator: Generators = None, log_ratio: Tensor | None = None) -> Tensor:
        """clean (N, 1, H, W) -> images with noise. A sequence of generators holds one for each image.

        log_ratio   of the true variance to the law's, where a decoder has said it, (N, 1, H, W)

        The noise has no gradient: that of the images is the gradient of the clean ones.
        """
        if clean.requires_grad:
            return clean + (self(clean.detach(), generator, log_ratio) - clean.detach())
        images = self.drawn(clean, standard_normal(clean, generator), log_ratio)
        return _scaled(images, self.scale) if self.scaled else images

    def drawn(self, clean: Tensor, z: Tensor, log_ratio: Tensor | None = None, photon: Tensor | None = None) -> Tensor:
        """clean and white noise z, both (N, 1, H, W) -> images before they are scaled, if they are.

        photon   (N, 1, 1, 1) the value of one, if not that of this band's own level
        """
        if log_ratio is None and bool(self.gain.any()):
            photon = self.photon(self.level(clean)) if photon is None else photon
            return self.dark_end + photon * poisson(z, self.photons(clean, photon))
        sd = self.variance(clean).sqrt()
        if log_ratio is not None:
            sd = sd * (0.5 * log_ratio.detach()).exp()
        images = clean + sd * self._shaped(z, (clean - self.low) / sd.clamp_min(torch.finfo(sd.dtype).tiny))
        if self.step > 0:
            images = ((images - self.low) / self.step).round().clamp_min(0) * self.step + self.low
        return images

    def told(self) -> dict[str, Any]:
        """What a user is told of it: a and b of the variance, the background, the step of counts, whether it scales."""
        numbers = {name: float(getattr(self, name)) for name in ("a", "b", "background", "step")}
        return {**numbers, "scaled": self.scaled}

    def _dark(self, level: Tensor) -> Tensor:
        x = (level - self.low).clamp_min(0)
        return self.dark[0] + x * (self.dark[1] + x * self.dark[2])

    @property
    def dark_end(self) -> Tensor:
        """Where there are no photons: at the least value of images that were scaled, at 0 of others."""
        return self.low if self.scaled else torch.zeros_like(self.low)

    def photons(self, clean: Tensor, photon: Tensor) -> Tensor:
        """How many of this value a pixel of clean (N, 1, H, W) has on average."""
        return ((clean - self.dark_end) / photon + self.least).clamp_min(0)

    def photon(self, level: Tensor) -> Tensor:
        """The value of one photon in images of these levels."""
        least = 0.1 * self._at(self.background)  # of the darkest images
        return self._at(level).clamp_min(least)

    def _at(self, level: Tensor) -> Tensor:
        return self.gain[0] + self.gain[1] * (level - self.low)

    def _shaped(self, z: Tensor, ratio: Tensor) -> Tensor:
        """Normal z -> noise of variance 1 at a signal-to-noise ratio, by the table; beyond its ends, as at its ends."""
        row = (ratio.clamp_min(0).sqrt() - self.signal[0]) / (self.signal[1] - self.signal[0])
        places = torch.stack([z / NORMAL[-1], 2 * row - 1], -1).reshape(len(z), 1, -1, 2)
        table = self.table.expand(len(z), 1, -1, -1)  # an image at a time, which is how threads share the work
        return F.grid_sample(table, places, padding_mode="border", align_corners=True).view_as(z)

    # --- fitting ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self,
        images: Tensor,
        clean: Tensor,
        law: str = "affine",
        log_ratio: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> dict[str, list[float]]:
        """Fit the law to images and their clean decodings, both (N, 1, H, W); return the variance–signal curve.

        law         affine or image
        log_ratio   what a decoder says of the variance, (N, 1, H, W): the law is then what it was, and its shape is fitted
        scale       (2,) to which they were scaled together with other bands: `least` is then a first guess

        The variance is that of the high-passed residual, which is free of the decoder's own smooth error; the curve also
        holds the variance of the plain residual, and what it has over the law is that error.
        """
        level = self.level(clean)
        residual = images - clean
        # The filter mixes the variances of 25 pixels with the squares of its weights: so must the signal beside it.
        signal = (filtered(clean, HIGH_PASS.square()) - level).clamp_min(0)
        noise = filtered(residual, HIGH_PASS).square()
        if log_ratio is None:
            self.background.copy_(level.median())
            self.low.copy_(images.min() if scale is None else scale[0])
            self._fit_variance(signal, noise, level, of_each=law == "image")
        if law == "image":
            self.scale.copy_(_scale(images) if scale is None else scale)
            self._fit_counts(images, clean, level, alone=scale is None)
            self._fit_shape(residual, clean, log_ratio)
        said = 1.0 if log_ratio is None else filtered(log_ratio.exp(), HIGH_PASS.square())
        drawn = (self._dark(level) + self.b * signal) * said
        columns = binned(signal, noise, residual[..., 2:-2, 2:-2].square(), drawn)
        names = ("signal", "variance", "residual_variance", "law", "pixels")
        return {name: values.tolist() for name, values in zip(names, columns, strict=True)}

    def _fit_variance(self, signal: Tensor, noise: Tensor, level: Tensor, of_each: bool) -> None:
        """dark and b from the squares of the high-passed residual, alternately, each pixel weighed by its variance."""
        # Least is relative: units may be counts or janskys.
        least = (1e-9 * noise.mean()).clamp_min(1e-60)
        x = (level - self.low).clamp_min(0)
        faint = signal <= signal.flatten(2).quantile(0.5, dim=2)[..., None, None]
        share = faint.double().mean((2, 3)).clamp_min(1e-12)

        def mean(values: Tensor) -> Tensor:
            return (values.double() * faint).mean((2, 3)) / share

        own, above = mean(noise).flatten(), mean(signal).flatten()  # of each image's darker half
        a, b = affine(*binned(signal, noise))
        powers = torch.stack([x.flatten().double() ** k for k in range(3)], 1)
        if not of_each or len(own) < 8:
            self.dark.copy_(torch.stack([a, 0 * a, 0 * a]))
        else:
            for _ in range(4):
                fitted = own.clamp_min(float(least))
                matrix, target = (
                    (powers / fitted[:, None]).numpy(force=True),
                    ((own - b * above) / fitted).numpy(force=True),
                )
                lengths = np.maximum(np.abs(matrix).max(0), 1e-300)
                coefficients = torch.from_numpy(nnls(matrix / lengths, target)[0] / lengths).to(own)
                self.dark.copy_(coefficients)
                dark = self._dark(level).expand_as(signal)
                weight = 1 / (dark + b * signal).clamp_min(least).double().square()
                slope = (weight * signal * (noise - dark)).sum() / (weight * signal.square()).sum().clamp_min(1e-60)
                b = slope.clamp_min(0).to(b)
        self.b.copy_(b)
        self.dark[0].add_(least * (self.dark.sum() == 0))  # a law without noise would weigh pixels infinitely

    def _fit_counts(self, images: Tensor, clean: Tensor, level: Tensor, alone: bool) -> None:
        """Whether images hold whole counts, and whether they are of photons."""
        steps = torch.tensor([count_step(image) for image in images[:COUNTED]]).to(images)
        self.step.copy_(steps.mean() if bool((steps > 0).all()) else torch.zeros(()))
        self._fit_photons(steps, clean[:COUNTED], level[:COUNTED], alone)

    def _fit_photons(self, steps: Tensor, clean: Tensor, level: Tensor, alone: bool) -> None:
        """gain and least of counts of these sizes (n,), zero if their variance is not that of photons.

        An image that was scaled to its own range has lost as many photons in every pixel as its darkest one had. That number
        differs from image to image, and the decoder gives the mean. With `least` photons more than that, the darkest pixels of
        what is drawn have so many on average: what scaling takes away again.
        """
        self.no_photons()
        x = (level - self.dark_end).flatten()
        if not bool((steps > 0).all()) or abs(float(self.b / steps.mean()) - 1) > OF_PHOTONS:
            return
        if not self.scaled:
            self.gain[0] = steps.mean()
        elif bool((x > 0).all()):
            self.gain[1] = (steps * x).sum() / x.square().sum()  # as the sky has the same number of photons in all
        else:
            return
        if self.scaled:
            photon = self.photon(level)
            self.least.copy_(
                (self._dark(level) / photon.square() - (level - self.dark_end) / photon).median().clamp_min(0)
            )
            if alone:
                settle([self], clean, photon)
        if not self.of_photons(level):
            self.no_photons()

    def of_photons(self, level: Tensor) -> bool:
        """Whether dark pixels of images of these levels have the variance of their photons."""
        photon = self.photon(level)
        expected = self._dark(level) / photon.square() / ((level - self.dark_end) / photon + self.least)
        return float((expected - 1).median().abs()) <= OF_PHOTONS

    def no_photons(self) -> None:
        self.gain.zero_()
        self.least.zero_()

    def _fit_shape(self, residual: Tensor, clean: Tensor, log_ratio: Tensor | None) -> None:
        """The table: what the residual's distribution is like, at mean 0 and the variance of its high-passed part."""
        law = self.variance(clean) * (1.0 if log_ratio is None else log_ratio.exp())
        sd = law.sqrt().clamp_min(torch.finfo(law.dtype).tiny)
        passed = filtered(residual, HIGH_PASS).square() / filtered(law, HIGH_PASS.square()).clamp_min(1e-30)
        ratio, noise = (clean - self.low) / sd, residual / sd
        inner = ratio[..., 2:-2, 2:-2].flatten()
        ratio, noise, passed = ratio.flatten(), noise.flatten(), passed.flatten()
        roots, within = ratio.clamp_min(0).sqrt(), inner.clamp_min(0).sqrt()
        first, last = torch.quantile(thin(roots), torch.tensor([0.02, 0.999], device=roots.device))
        if not bool(last > first):
            return
        self.signal.copy_(torch.stack([first, last]))
        rows, inside = (
            ((SIGNALS - 1) * (r - first) / (last - first)).round().clamp(0, SIGNALS - 1).long() for r in (roots, within)
        )
        chance = torch.special.ndtr(NORMAL.double()).to(noise)
        weight = torch.exp(-0.5 * NORMAL.to(noise).square())
        weight = weight / weight.sum()
        found: dict[int, Tensor] = {}
        for k in range(SIGNALS):
            members, squares = thin(noise[rows == k], 8_000_000), passed[inside == k]
            if min(len(members), len(squares)) < FEW:
                continue
            quantiles = torch.quantile(members, chance)
            # Of a normal variable through the table, by the trapezoidal rule.
            mean = (weight * quantiles).sum()
            variance = (weight * (quantiles - mean).square()).sum()
            found[k] = (quantiles - mean) * (squares.mean() / variance).sqrt()
        for k in range(SIGNALS if found else 0):  # a row without pixels is as the nearest that has some
            self.table[k] = found[min(found, key=lambda other: abs(other - k))]


class NoiseLaws(nn.Module):
    """A law for each band, fitted to it; to use as a `NoiseLaw`, whose numbers are (C, 1, 1) here.

    scale   (2,) least and greatest value of every image over all of its bands, where they were scaled together
    """

    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bands = nn.ModuleList(NoiseLaw() for _ in range(channels))
        self.register_buffer("scale", torch.zeros(2))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if prefix + "dark" in state_dict:  # one law of all bands, of version 0.1.0
            for name in [name for name, _ in NoiseLaw().named_buffers() if prefix + name in state_dict]:
                value = state_dict.pop(prefix + name)
                state_dict |= {f"{prefix}bands.{k}.{name}": value for k in range(len(self.bands))}
            state_dict[prefix + "scale"] = state_dict[prefix + "bands.0.scale"]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def laws(self) -> list[NoiseLaw]:
        return list(self.bands)  # type: ignore[arg-type]

    @property
    def a(self) -> Tensor:
        return torch.stack([law.a for law in self.laws])[:, None, None]

    @property
    def background(self) -> Tensor:
        return torch.stack([law.background for law in self.laws])[:, None, None]

    @property
    def together(self) -> bool:
        """Whether the bands of an image were scaled together."""
        return bool(self.scale[0] < self.scale[1])

    def variance(self, clean: Tensor) -> Tensor:
        return torch.cat([law.variance(band) for law, band in self._bands(clean)], 1)

    def forward(self, clean: Tensor, generator: Generators = None, log_ratio: Tensor | None = None) -> Tensor:
        if clean.requires_grad:
            return clean + (self(clean.detach(), generator, log_ratio) - clean.detach())
        photon = self._photons(clean).mean(1, keepdim=True) if self.together else None
        z, said = standard_normal(clean, generator).split(1, 1), self._split(log_ratio)
        parts = zip(self._bands(clean), z, said, strict=True)
        drawn = [(law, law.drawn(light, own, of_it, photon)) for (law, light), own, of_it in parts]
        if self.together:
            return _scaled(torch.cat([band for _, band in drawn], 1), self.scale)
        return torch.cat([_scaled(band, law.scale) if law.scaled else band for law, band in drawn], 1)

    @torch.no_grad()
    def fit(
        self, images: Tensor, clean: Tensor, law: str = "affine", log_ratio: Tensor | None = None
    ) -> dict[str, Any]:
        """Fit each to its band; return the variance–signal curve of each, {"bands": [...]}."""
        if law == "image":
            apart = all(bool(_scale(band).any()) for band in images.split(1, 1))
            self.scale.copy_(torch.zeros(2) if apart else _scale(images))
        scale = self.scale if self.together else None
        parts = zip(self._bands(images), clean.split(1, 1), self._split(log_ratio), strict=True)
        curves = [own.fit(image, light, law, said, scale) for (own, image), light, said in parts]
        if law == "image" and self.together and not self._settled(clean[:COUNTED]):
            for own in self.laws:
                own.no_photons()
        return {"bands": curves}

    def _settled(self, clean: Tensor) -> bool:
        """Whether bands that were scaled together are of photons of one value. Then they have lost as many each: those of
        the darkest pixel of them all, which `least` becomes."""
        if not all(bool(law.gain.any()) for law in self.laws):
            return False
        photons = self._photons(clean)
        if bool(((photons / photons[:, :1] - 1).median(0).values.abs() > OF_PHOTONS).any()):
            return False
        settle(self.laws, clean, photons.mean(1, keepdim=True))
        return all(law.of_photons(law.level(band)) for law, band in self._bands(clean))

    def _photons(self, clean: Tensor) -> Tensor:
        """The value of one in each band, (N, C, 1, 1)."""
        return torch.cat([law.photon(law.level(band)) for law, band in self._bands(clean)], 1)

    def _bands(self, images: Tensor) -> Iterator[tuple[NoiseLaw, Tensor]]:
        """The law of each band of images (N, C, H, W), and the band, (N, 1, H, W)."""
        return zip(self.laws, images.split(1, 1), strict=True)

    def told(self) -> dict[str, list[Any]]:
        """What `NoiseLaw.told` says, of each band."""
        told = [law.told() for law in self.laws]
        return {key: [own[key] for own in told] for key in told[0]}

    def _split(self, log_ratio: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(self.bands) if log_ratio is None else log_ratio.split(1, 1)


def settle(laws: Sequence[NoiseLaw], clean: Tensor, photon: Tensor) -> None:
    """Find `least` of bands (N, C, H, W) that were scaled together, whose photons have this value: with so many more, the
    darkest pixel of an image has so many on average."""
    z = standard_normal(clean, torch.Generator().manual_seed(0)).split(1, 1)
    for _ in range(6):  # each is some five times nearer
        drawn = [
            poisson(own, law.photons(band, photon)) for law, own, band in zip(laws, z, clean.split(1, 1), strict=True)
        ]
        least = torch.cat(drawn, 1).amin((1, 2, 3)).mean()
        for law in laws:
            law.least.copy_(least)


def law_of(channels: int) -> NoiseLaw | NoiseLaws:
    """What adds nothing yet to images of so many bands."""
    return NoiseLaw() if channels == 1 else NoiseLaws(channels)


def enough(n: int, image_shape: Sequence[int]) -> int:
    """How many of n such images to hold in memory at once: ENOUGH pixels, and at least eight images."""
    return min(n, max(8, ENOUGH // math.prod(image_shape)))


def estimate_law(images: Tensor) -> NoiseLaw | NoiseLaws:
    """A first law from images alone, (N, C, H, W), before there is a decoder: a 5 px mean stands in for the clean light.

    Good to some per cent where the light is smooth over five pixels; the training loss weighs its pixels by it.
    """
    images = images[: enough(len(images), images.shape[1:])]
    law = law_of(images.shape[1]).to(images.device)
    law.fit(images, smooth(images))
    return law


def recorrupt(images: Tensor, law: NoiseLaw | NoiseLaws, alpha: float) -> tuple[Tensor, Tensor]:
    """images (N, C, H, W) -> two of each whose noises do not correlate: images + alpha e and images - e / alpha, e drawn by
    the law (R2R, Pang et al. 2021).

    An encoder that is given the one and judged by the other cannot win by passing on noise. The law need not be exact,
    and its variance is that of smoothed images: where it is affine, the noises are then uncorrelated on average.
    """
    drawn = law.variance(smooth(images)).sqrt() * torch.randn_like(images)
    return images + alpha * drawn, images - drawn / alpha


def smooth(images: Tensor) -> Tensor:
    """The mean over 5 × 5 pixels, the same shape."""
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def _scale(images: Tensor) -> Tensor:
    """(2,): least and greatest value of images (N, C, H, W), if all have the same; else zeros."""
    least, greatest = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    same = len(images) > 1 and bool((least == least[0]).all() and (greatest == greatest[0]).all())
    return torch.stack([least[0], greatest[0]]) if same else torch.zeros(2).to(images)


def _scaled(images: Tensor, scale: Tensor) -> Tensor:
    """Each image (C, H, W) from the one value of scale (2,) to the other."""
    least, greatest = images.amin((-3, -2, -1), keepdim=True), images.amax((-3, -2, -1), keepdim=True)
    share = (images - least) / torch.where(greatest > least, greatest - least, 1.0)
    return scale[0] + (scale[1] - scale[0]) * share
