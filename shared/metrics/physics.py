"""Numbers an astronomer would measure on a lens image, and how far their distributions are from the real ones.

Each summary is one number per image. Two sets are compared summary by summary by their Wasserstein distance, in units
of that between two sets of real images: a ratio of 1 is a perfect score. Holzschuh et al. 2022 (arXiv 2203.11956).
"""

import numpy as np

from shared.errors import UserError
from shared.metrics import Images, batches

BATCH = 256
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


def wasserstein1(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Wasserstein-1 distance of the samples a (n,) and b (m,): the exact integral of |F_a - F_b|."""
    if min(len(a), len(b)) == 0:
        raise UserError(f"A Wasserstein distance needs two samples, got {len(a)} and {len(b)} values.")
    values = np.sort(np.concatenate([a, b]).astype(np.float64))
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), values[:-1], side="right") / len(x) for x in (a, b))
    return float((np.abs(cdf_a - cdf_b) * np.diff(values)).sum())


def compare(
    real_a: dict[str, np.ndarray],
    real_b: dict[str, np.ndarray],
    generated: dict[str, np.ndarray],
    splits: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return for each summary {w1: real from generated, floor: real from real, ratio: w1 / floor}.

    w1 is that of real_a, so that `generated` may be reconstructions of real_b: images must not be compared with
    themselves. The floor is a mean over random splits of both into as many. A summary that is constant in real images
    has floor 0: the ratio is then 1 if w1 is 0 too, and infinity if not.
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
        real = np.concatenate([real_a[name], real_b[name]])
        w1 = wasserstein1(real_a[name], values)
        floor = float(np.mean([wasserstein1(real[i[:n_a]], real[i[n_a:]]) for i in orders]))
        ratio = w1 / floor if floor else (np.inf if w1 else 1.0)
        result[name] = {"w1": w1, "floor": floor, "ratio": float(ratio)}
    return result


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
    edge = max(1, min(height, width) // 15)
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    background = np.median(x[:, border], axis=1)
    noise = MAD_TO_SIGMA * np.median(np.abs(x[:, border] - background[:, None]), axis=1)

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

    distance = np.hypot(dy[:, None], dx)
    radii, mean = _rings(np.where(distance <= min(height, width) / 2, np.rint(distance), -1), distance)
    profile = signal.reshape(len(x), -1) @ mean
    return {
        "flux": x.mean((1, 2)),
        "peak": x.max((1, 2)),
        "background": background,
        "noise": noise,
        "radius": np.sqrt(np.maximum(trace, 0)),
        "axis_ratio": np.sqrt(minor / np.where(major > 0, major, 1)),
        "ring_radius": _argmax(radii, profile),
    }


def _argmax(radii: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """Return where each profile (n, K) over radii (K,) is largest: the vertex of the parabola through three points."""
    i = profile.argmax(1)
    inside = np.clip(i, 1, len(radii) - 2)
    n = np.arange(len(profile))
    before, at, after = (profile[n, inside + step] for step in (-1, 0, 1))
    curvature = before - 2 * at + after
    shift = np.where(curvature < 0, (before - after) / np.where(curvature < 0, 2 * curvature, 1), 0)
    refined = radii[inside] + shift * (radii[inside + 1] - radii[inside - 1]) / 2
    return np.where(i == inside, refined, radii[i])
