"""Numbers an astronomer would measure on a lens image, and how far their distributions are from the real ones.

Each summary is one number per image. Two sets are compared summary by summary by their Wasserstein distance, in units
of that between two sets of real images: a ratio of 1 is a perfect score. Holzschuh et al. 2022 (arXiv 2203.11956).
Spectra and the noise are functions, of k and of the signal, and are compared as such.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, stats

from shared.errors import UserError
from shared.metrics import Images, batches
from shared.metrics.two_sample import CONFIDENCE, RESIDUAL, holm

BATCH = 256
AXES = ("position_angle",)  # quantities that are axes: the same after half a turn
HALF_TURN = 180.0  # degrees
NOISE_EDGES = np.concatenate([[-np.inf], np.geomspace(1e-3, 1, 19), [np.inf]])  # of the range, above the background
DETECTION = 3.0  # pixels this many sigma above the background enter the moments; the rest would outweigh them by r²
MAD_TO_SIGMA = 1.4826


def radial_power_spectrum(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Return k (K,) in cycles/pixel and the azimuthally averaged power (N, K), a mean over channels.

    images  (N, C, H, W), square or not; give real and generated ones in the same units.

    P(k) = |FFT|² / (H W): white noise of variance s² has P = s². Rings are 1/min(H, W) wide and end at the Nyquist
    frequency, and k is the mean |k| of a ring's modes. The mean of an image, k = 0, is left out.
    """
    k, power = np.empty(0), []
    for batch in batches(images, BATCH):
        height, width = batch.shape[-2:]
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
        ring = np.maximum(np.rint(frequency * min(height, width)), 1)  # no mode is too long for the first ring
        ring[(frequency == 0) | (ring > min(height, width) / 2)] = -1
        k, mean = _rings(ring, frequency)
        spectrum = np.abs(np.fft.fft2(batch.double().cpu().numpy())) ** 2 / (height * width)
        power.append(spectrum.mean(1).reshape(len(batch), -1) @ mean)
    return k, np.concatenate(power)


@dataclass(frozen=True)
class SpectrumRatio:
    """A set's power spectrum over that of real images, at each k, (K,) each, beside the 95 % interval of each.

    mean, mean_low, mean_high   of the mean power
    sd, sd_low, sd_high         of its standard deviation from image to image
    """

    mean: np.ndarray
    mean_low: np.ndarray
    mean_high: np.ndarray
    sd: np.ndarray
    sd_low: np.ndarray
    sd_high: np.ndarray


def spectrum_ratio(real_power: np.ndarray, power: np.ndarray, resamples: int = 1000, seed: int = 0) -> SpectrumRatio:
    """Compare spectra (N, K) of real images and (M, K) of others, as `radial_power_spectrum` gives them for the same k.

    The intervals are percentiles over bootstrap samples of the images of both sets (Efron & Tibshirani 1993, ch. 13), of
    each k by itself: of 20 of them one is expected to miss 1. NaN where real images have no power or all the same.
    Raises UserError unless both sets have two images and the same number of k.
    """
    if real_power.shape[1:] != power.shape[1:] or min(len(real_power), len(power)) < 2:
        raise UserError(
            f"spectra of the shapes {real_power.shape} and {power.shape} do not compare: "
            "two images or more of each are needed, of one size"
        )
    rng = np.random.default_rng(seed)

    def moments(x: np.ndarray) -> np.ndarray:
        """(1 + resamples, 2, K): mean and standard deviation of all images, then of each sample of them."""
        shares = np.vstack([np.ones(len(x)), rng.multinomial(len(x), np.full(len(x), 1 / len(x)), resamples)]) / len(x)
        centre = x.mean(0)  # squares of what is left are not rounded away
        mean = shares @ (x - centre)
        sd = np.sqrt(np.maximum(shares @ (x - centre) ** 2 - mean**2, 0) * len(x) / (len(x) - 1))
        return np.stack([centre + mean, sd], 1)

    real, other = moments(real_power.astype(np.float64)), moments(power.astype(np.float64))
    ratio = other / np.where(real > 0, real, np.nan)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratio[1:], [tail, 100 - tail], axis=0)
    return SpectrumRatio(ratio[0, 0], low[0], high[0], ratio[0, 1], low[1], high[1])


@dataclass(frozen=True)
class NoiseCurve:
    """Sums over pixels, by their signal; those of two batches are added with +.

    edges    (B + 1,) of the bins of the signal, the light above the background in units of the range
    pixels   (B,) in each bin; `light` (B,) the sum of their signals, `squares` (B,) of the squares of their noise
    """

    edges: np.ndarray
    pixels: np.ndarray
    light: np.ndarray
    squares: np.ndarray

    def __add__(self, other: "NoiseCurve") -> "NoiseCurve":
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("noise curves of different bins cannot be added")
        return NoiseCurve(
            self.edges, self.pixels + other.pixels, self.light + other.light, self.squares + other.squares
        )

    @property
    def signal(self) -> np.ndarray:
        """(B,) mean signal of each bin, in units of the range; NaN where there is no pixel."""
        return self.light / np.where(self.pixels > 0, self.pixels, np.nan)

    @property
    def variance(self) -> np.ndarray:
        """(B,) variance of the pixel noise in each bin, in units of the range squared; NaN where there is no pixel."""
        return self.squares / np.where(self.pixels > 0, self.pixels, np.nan)


def noise_curve(images: Images, value_range: tuple[float, float], edges: np.ndarray = NOISE_EDGES) -> NoiseCurve:
    """Return the variance of the pixel noise against the signal, from images alone.

    images  (N, C, H, W) of 3 pixels each way or more, the mean over channels; value_range = (low, high), the unit
    edges   (B + 1,) of the bins, in units of the range above each image's background (see `summaries`)

    The noise of a pixel is the mixed second difference of its 3×3 neighbours, w * x, with sum w² = 1: white noise keeps
    its variance, light that is smooth over some pixels cancels, and noise that neighbours share is not seen in full. The
    signal is w² * x, so that a variance affine in the light (Poisson noise of source and sky) comes out affine with
    the same numbers. Where the signal is within a few sigma of the sky, bins mix pixels of either side.
    """
    weights = RESIDUAL.double().numpy()
    low, high = value_range
    sums = np.zeros((3, len(edges) - 1))
    for batch in batches(images, BATCH):
        x = (batch.double().mean(1).cpu().numpy() - low) / (high - low)
        signal = x - sky(x)[0][:, None, None]
        inner = (slice(None), slice(1, -1), slice(1, -1))
        noise, smooth = (ndimage.correlate(signal, w[None])[inner].ravel() for w in (weights, weights**2))
        bins = np.searchsorted(edges, smooth, side="right") - 1
        inside = (bins >= 0) & (bins < len(edges) - 1)
        for total, values in zip(sums, (None, smooth, noise**2), strict=True):
            total += np.bincount(bins[inside], None if values is None else values[inside], len(edges) - 1)
    return NoiseCurve(edges, sums[0].astype(np.int64), sums[1], sums[2])


def summaries(images: Images, value_range: tuple[float, float]) -> dict[str, np.ndarray]:
    """Return the summaries of each image, name -> (N,), of the mean over its channels; always finite.

    flux         mean pixel, in units of value_range = (low, high), as the next three
    peak         brightest pixel
    background   median of the border, 1/15 of the shorter side wide
    noise        robust standard deviation of the border (median absolute deviation)
    radius       root of the flux-weighted second moment about the centroid, pixels
    axis_ratio   minor over major axis of the second moments
    ring_radius  radius of the maximum of the mean profile about the image's centre, pixels: a proxy of theta_E

    The moments weigh each pixel with its flux above the background, where that exceeds 3 times the noise. An image
    without such a pixel has radius and axis_ratio 0.
    """
    low, high = value_range
    parts = [
        _summaries((batch.double().mean(1).cpu().numpy() - low) / (high - low)) for batch in batches(images, BATCH)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def wasserstein1(a: np.ndarray, b: np.ndarray, period: float | None = None) -> float:
    """Return the Wasserstein-1 distance of the samples a (n,) and b (m,): the exact integral of |F_a - F_b|.

    period  of a circle that the values lie on, 180 for the axes of angles in degrees. The way between two of them is then
            the shorter one, and the distance the integral of |F_a - F_b - median of that|: Delon, Salomon & Sobolevski
            2010 (SIAM J. Appl. Math. 70, 2239).
    """
    values, gap = _steps(a, b, period)
    if period is None:
        return float((np.abs(gap[:-1]) * np.diff(values)).sum())
    lengths = np.diff(values, append=values[0] + period)
    order = np.argsort(gap)
    reached = np.cumsum(lengths[order])
    median = gap[order[np.searchsorted(reached, reached[-1] / 2)]]
    return float((np.abs(gap - median) * lengths).sum())


def same_distribution(a: np.ndarray, b: np.ndarray, period: float | None = None) -> float:
    """Return the two-sided p value that samples a (n,) and b (m,) are of one distribution.

    By Kolmogorov and Smirnov's largest |F_a - F_b|; on a circle of a period by Kuiper's, the largest difference either way
    together, which does not depend on where the circle is cut (Stephens 1970, J. R. Stat. Soc. B 32, 115). Both by
    their laws for large samples, fair from some 20 of each; equal values make p too large, never too small.
    """
    values, gap = _steps(a, b, period)
    if period is None:
        return float(stats.ks_2samp(a, b, method="asymp").pvalue)
    n = len(a) * len(b) / len(values)
    reach = (np.sqrt(n) + 0.155 + 0.24 / np.sqrt(n)) * (gap.max() - gap.min())
    if reach < 0.4:  # p = 1 to seven digits; the series needs the more terms
        return 1.0
    j2 = (np.arange(1, 20) * reach) ** 2
    return float(np.clip(2 * ((4 * j2 - 1) * np.exp(-2 * j2)).sum(), 0, 1))


def _steps(a: np.ndarray, b: np.ndarray, period: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return all values of both, sorted (n + m,), and F_a - F_b from each on (n + m,)."""
    if min(len(a), len(b)) == 0:
        raise UserError(f"Two distributions need two samples to compare, got {len(a)} and {len(b)} values.")
    a, b = (np.sort(x.astype(np.float64) if period is None else x % period) for x in (a, b))
    values = np.sort(np.concatenate([a, b]))
    cdf_a, cdf_b = (np.searchsorted(x, values, side="right") / len(x) for x in (a, b))
    return values, cdf_a - cdf_b


def compare(
    real_a: dict[str, np.ndarray],
    real_b: dict[str, np.ndarray],
    generated: dict[str, np.ndarray],
    splits: int = 20,
    seed: int = 0,
    axes: Collection[str] = AXES,
) -> dict[str, dict[str, float]]:
    """Return for each summary {w1: real from generated, floor: real from real, ratio: w1 / floor, p, p_holm}.

    axes  names of those that are angles of axes, in degrees: they are compared on their circle

    w1 is that of real_a, so that `generated` may be reconstructions of real_b: images must not be compared with
    themselves. The floor is a mean over random splits of both into as many. A summary that is constant in real images
    has floor 0: the ratio is then 1 if w1 is 0 too, and infinity if not. Whole numbers, which are those of an integer
    dtype, are constant in too few images only: their floor is at least 1 / n, one image that is one off.

    p is that of one distribution of real_a and generated (`same_distribution`), p_holm the same allowing for as many
    tests as there are summaries. With enough images any difference is significant: the ratio says how large it is.
    Raises UserError unless real_b and generated have the same number of images: the floor depends on it.
    """
    n_a, n_b = (len(next(iter(real.values()))) for real in (real_a, real_b))
    n = len(next(iter(generated.values())))
    if n != n_b:
        raise UserError(
            f"{n} generated and {n_b} real images do not compare: the floor depends on it; take as many of both."
        )
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n_a + n_b) for _ in range(splits)]
    result = {}
    for name, values in generated.items():
        period = HALF_TURN if name in axes else None
        real = np.concatenate([real_a[name], real_b[name]])
        w1 = wasserstein1(real_a[name], values, period)
        floor = float(np.mean([wasserstein1(real[i[:n_a]], real[i[n_a:]], period) for i in orders]))
        perfect = w1 == floor == 0
        if np.issubdtype(real.dtype, np.integer):
            floor = max(floor, 1 / n)
        ratio = 1.0 if perfect else w1 / floor if floor else np.inf
        p = same_distribution(real_a[name], values, period)
        result[name] = {"w1": w1, "floor": floor, "ratio": float(ratio), "p": p}
    for name, adjusted in holm({name: score["p"] for name, score in result.items()}).items():
        result[name]["p_holm"] = adjusted
    return result


def sky(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return level and noise (n,) of the border, 1/15 of the shorter side wide, of images (n, H, W): see `summaries`."""
    edge = max(1, min(x.shape[1:]) // 15)
    border = np.ones(x.shape[1:], bool)
    border[edge:-edge, edge:-edge] = False
    background = np.median(x[:, border], axis=1)
    return background, MAD_TO_SIGMA * np.median(np.abs(x[:, border] - background[:, None]), axis=1)


def ring_radius(signal: np.ndarray) -> np.ndarray:
    """Return the radius (n,) [pixels] of the maximum of the mean profile of signal (n, H, W) about the image's centre."""
    height, width = signal.shape[1:]
    distance = np.hypot(np.arange(height)[:, None] - (height - 1) / 2, np.arange(width) - (width - 1) / 2)
    radii, mean = _rings(np.where(distance <= min(height, width) / 2, np.rint(distance), -1), distance)
    return _argmax(radii, signal.reshape(len(signal), -1) @ mean)


def _rings(ring: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean radius (K,) of each ring and the matrix (H W, K) that averages over it.

    ring (H, W) numbers the ring of each pixel; pixels of negative number are in none.
    """
    members = ring.reshape(-1, 1) == np.unique(ring[ring >= 0])
    mean = members / members.sum(0)
    return radius.reshape(-1) @ mean, mean


def _summaries(x: np.ndarray) -> dict[str, np.ndarray]:
    """x (n, H, W) -> the summaries, name -> (n,)."""
    height, width = x.shape[1:]
    background, noise = sky(x)
    signal = x - background[:, None, None]
    weight = np.where(signal > DETECTION * noise[:, None, None], signal, 0)
    total = weight.sum((1, 2))
    weight /= np.where(total > 0, total, 1)[:, None, None]
    dy, dx = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    rows, columns = weight.sum(2), weight.sum(1)
    mean_y, mean_x = rows @ dy, columns @ dx
    yy, xx = rows @ dy**2 - mean_y**2, columns @ dx**2 - mean_x**2
    xy = np.einsum("nyx,y,x->n", weight, dy, dx) - mean_y * mean_x
    trace, gap = xx + yy, np.hypot(xx - yy, 2 * xy)
    minor, major = np.maximum(trace - gap, 0), trace + gap
    return {
        "flux": x.mean((1, 2)),
        "peak": x.max((1, 2)),
        "background": background,
        "noise": noise,
        "radius": np.sqrt(np.maximum(trace, 0)),
        "axis_ratio": np.sqrt(minor / np.where(major > 0, major, 1)),
        "ring_radius": ring_radius(signal),
    }


def _argmax(radii: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """Return where each profile (n, K) over radii (K,) is largest: the vertex of the parabola through three points."""
    i = profile.argmax(1)
    if len(radii) < 3:
        return radii[i]
    inside = np.clip(i, 1, len(radii) - 2)
    n = np.arange(len(profile))
    before, at, after = (profile[n, inside + step] for step in (-1, 0, 1))
    curvature = before - 2 * at + after
    shift = np.where(curvature < 0, (before - after) / np.where(curvature < 0, 2 * curvature, 1), 0)
    refined = radii[inside] + shift * (radii[inside + 1] - radii[inside - 1]) / 2
    return np.where(i == inside, refined, radii[i])
