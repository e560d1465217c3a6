"""The shape of the light of a lens: what galaxies are classified by, and how many images and how much of a ring it has.

Gini after Lotz et al. 2004 (arXiv astro-ph/0311352), asymmetry after Conselice 2003 (arXiv astro-ph/0303065). They were
made for galaxies with a bright middle; a ring has none, so that the asymmetry is measured about the point that it is least
about. M20 and concentration of the same papers and the ellipticity are not here: of a dozen kinds of damage they saw none
that the others and `physics.summaries` do not see better.
"""

import numpy as np
from scipy import ndimage

from shared.metrics import Images, batches
from shared.metrics.physics import ring_radius, sky
from shared.metrics.two_sample import RESIDUAL

BATCH = 64
SMOOTH = 1 / 75  # of the shorter side: sigma of the Gaussian that the light is looked for in, and at least one pixel
ISOPHOTE = 0.1  # of the smooth peak: where a lens ends, whatever the exposure
DETECTION = 5.0  # or where it drowns, in sigma of the smooth sky
PETROSIAN, APERTURE = 0.2, 1.5  # light of a radius over that within it; radius of the aperture in that radius
PROMINENCE, SIGNIFICANCE = 0.05, 5.0  # of an image over the pass to a brighter one: of the smooth peak, and in sigma
RING, ANGLES = 0.5, 180  # of the smooth peak: the light of a ring's arcs; rays on which it is looked for


def summaries(images: Images, value_range: tuple[float, float]) -> dict[str, np.ndarray]:
    """Return the shape of each image, name -> (N,), of the mean over its channels; always finite.

    images   (N, C, H, W) of the data's units, value_range = (low, high)

    gini               inequality of the pixels of the segment: 0 all alike, 1 all light in one
    asymmetry          sum |x - x turned by 180°| / sum |x| of the smooth light in the aperture, less what the noise of
                       the sky adds: that is more than it adds where there is light, and much more unless x is smooth
    position_angle     of the major axis of the second moments of the light in the segment, degrees in [0, 180), from x to
                       the right towards y upwards: an axis has no seam, so that sets of it are compared on a circle
                       (shared.metrics.physics.AXES)
    number_of_images   maxima of the smooth light that stand out from the pass to any brighter one, whole numbers
    ring_completeness  share of the rays from the image's centre on which the smooth light reaches half its peak somewhere
                       beyond half the ring radius

    The segment is where the smooth light is above 10 % of its peak; all its pieces count, and the dark within a ring does
    not. The aperture is a circle of 1.5 Petrosian radii about the centre of asymmetry, the point in the middle half of the
    image, to half a pixel, about which the smooth light is nearest to itself turned by 180°; it lies where arcs and
    their counter-images have their middle. An image without light has 0 of everything.
    """
    low, high = value_range
    parts = [
        _summaries((batch.double().mean(1).cpu().numpy() - low) / (high - low)) for batch in batches(images, BATCH)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _summaries(x: np.ndarray) -> dict[str, np.ndarray]:
    """x (n, H, W) -> the shapes, name -> (n,)."""
    background, noise = sky(x)
    signal = x - background[:, None, None]
    sigma = max(1.0, SMOOTH * min(x.shape[1:]))
    quieter = 1 / (2 * np.sqrt(np.pi) * sigma)  # white noise after the Gaussian over before
    smooth = ndimage.gaussian_filter(signal, (0, sigma, sigma), mode="nearest")
    peak = smooth.max((1, 2))
    segment = smooth > np.maximum(ISOPHOTE * peak, DETECTION * quieter * noise)[:, None, None]
    light = np.where(segment, np.abs(signal), 0)  # |x| as in Lotz et al. 2004: less is made of the darkest pixels

    twice_y, twice_x = _twice_centre(np.where(segment, smooth, 0))
    lit = segment.any((1, 2))
    found = {
        "gini": _gini(light, segment),
        "asymmetry": _asymmetry(signal, smooth, quieter * noise, twice_y, twice_x),
        "position_angle": _position_angle(light),
        "number_of_images": _number_of_images(signal, smooth, segment, quieter),
        "ring_completeness": _ring_completeness(smooth, peak, ring_radius(signal)),
    }
    return {name: np.where(lit, values, 0) for name, values in found.items()}


def _gini(light: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Lotz et al. 2004, Eq. 6. light (n, H, W), 0 outside the segment (n, H, W)."""
    ascending = np.sort(light.reshape(len(light), -1), axis=1)
    pixels, count = ascending.shape[1], segment.sum((1, 2))[:, None]
    rank = np.arange(1, pixels + 1) - (pixels - count)  # pixels outside come first and add nothing
    weighed = ((2 * rank - count - 1) * ascending).sum(1)
    return weighed / (np.maximum(count[:, 0] - 1, 1) * _or_one(ascending.sum(1)))


def _position_angle(light: np.ndarray) -> np.ndarray:
    """Angle [deg] of the major axis of the second moments of light (n, H, W)."""
    total = _or_one(light.sum((1, 2)))
    y, x = -np.arange(light.shape[1]), np.arange(light.shape[2])
    rows, columns = light.sum(2) / total[:, None], light.sum(1) / total[:, None]
    mean_y, mean_x = rows @ y, columns @ x
    yy, xx = rows @ y**2 - mean_y**2, columns @ x**2 - mean_x**2
    xy = np.einsum("nyx,y,x->n", light, y, x) / total - mean_y * mean_x
    angle = np.rad2deg(np.arctan2(2 * xy, xx - yy) / 2) % 180
    return np.where(angle < 180, angle, 0)  # -1e-20 % 180 is 180


def _twice_centre(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twice the y and twice the x of the centre of asymmetry of light (n, H, W), whole numbers (n,).

    sum (x - x turned about c)² is least where the convolution of x with itself is greatest, at 2 c: one transform looks at
    all centres. It is a circular one: a centre and its antipode are told apart by the middle half.
    """
    spectrum = np.fft.rfft2(light)
    itself = np.fft.irfft2(spectrum**2, light.shape[1:])
    best = np.unravel_index(itself.reshape(len(light), -1).argmax(1), light.shape[1:])
    y, x = (np.where(at < (side + 1) // 2, at + side, at) for at, side in zip(best, light.shape[1:], strict=True))
    return y, x


def _asymmetry(
    signal: np.ndarray, smooth: np.ndarray, noise: np.ndarray, twice_y: np.ndarray, twice_x: np.ndarray
) -> np.ndarray:
    """Asymmetry of smooth (n, H, W), whose sky has this noise (n,), in the aperture of signal, about half of twice_y, _x."""
    n, height, width = signal.shape
    y, x = np.arange(height) - twice_y[:, None] / 2, np.arange(width) - twice_x[:, None] / 2
    distance = np.hypot(y[:, :, None], x[:, None])

    # Rings one pixel wide, as mean brightness times exact area: the pixels in a small circle are not its area.
    edges = np.arange(int(np.hypot(height, width)) + 2)
    ring = distance.astype(np.int64) + (np.arange(n) * (len(edges) - 1))[:, None, None]
    pixels, flux = (
        np.bincount(ring.ravel(), weights, n * (len(edges) - 1)).reshape(n, -1) for weights in (None, signal.ravel())
    )
    brightness = flux / np.maximum(pixels, 1)
    growth = np.concatenate([np.zeros((n, 1)), np.cumsum(brightness * np.pi * np.diff(edges**2), axis=1)], 1)
    middle = (edges[:-1] + edges[1:]) / 2
    within = (growth[:, :-1] + brightness * np.pi * (middle**2 - edges[:-1] ** 2)) / (np.pi * middle**2)
    bright = (brightness > PETROSIAN * within) & (pixels > 0)
    last = len(middle) - 1 - bright[:, ::-1].argmax(1)
    excess = brightness - PETROSIAN * within
    aperture = APERTURE * _crossing(middle, excess, np.where(bright.any(1), last, 0))

    row = np.arange(n)[:, None, None]
    # Indices run past the ends and around: what lies opposite there is sky, as all near the border is.
    opposite = smooth[row, ((twice_y[:, None] - np.arange(height)) % height)[:, :, None],
                      ((twice_x[:, None] - np.arange(width)) % width)[:, None]]  # fmt: skip
    inside = distance <= aperture[:, None, None]
    difference = np.where(inside, np.abs(smooth - opposite), 0).sum((1, 2))
    of_sky = inside.sum((1, 2)) * 2 / np.sqrt(np.pi) * noise  # E |a - b| of normal numbers
    return (difference - of_sky) / _or_one(np.where(inside, np.abs(smooth), 0).sum((1, 2)))


def _number_of_images(signal: np.ndarray, smooth: np.ndarray, segment: np.ndarray, quieter: float) -> np.ndarray:
    """How many maxima of `smooth` are cut off from any higher one at a level that is lower by a margin, (n,) int64."""
    peak = smooth.max((1, 2))
    # Photons make bright pixels noisier than the sky. Differences of neighbours see them through the light of a lens.
    second = ndimage.correlate(signal, RESIDUAL.double().numpy()[None], mode="nearest")
    bright = smooth > peak[:, None, None] / 2
    noise = np.sqrt((second**2 * bright).sum((1, 2)) / np.maximum(bright.sum((1, 2)), 1))
    margin = np.maximum(PROMINENCE * peak, SIGNIFICANCE * quieter * noise)
    maxima = segment & (smooth == ndimage.maximum_filter(smooth, (1, 3, 3), mode="nearest"))
    numbers = np.zeros(len(signal), np.int64)
    for i, image in enumerate(smooth):
        y, x = np.nonzero(maxima[i])
        order = np.argsort(-image[y, x], kind="stable")
        for j, k in enumerate(order):
            numbers[i] += j == 0 or _cut_off(image > image[y[k], x[k]] - margin[i], y, x, k, order[:j])
    return numbers


def _cut_off(above: np.ndarray, y: np.ndarray, x: np.ndarray, k: int, higher: np.ndarray) -> bool:
    """Whether no way through `above` (H, W) leads from point k to one of those that are higher."""
    land, _ = ndimage.label(above)
    return bool((land[y[higher], x[higher]] != land[y[k], x[k]]).all())


def _ring_completeness(smooth: np.ndarray, peak: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The share of rays on which `smooth` (n, H, W) reaches RING of its peak beyond half the ring radius (n,)."""
    n, height, width = smooth.shape
    angles, radii = np.arange(ANGLES)[:, None] * 2 * np.pi / ANGLES, np.arange(min(height, width) // 2)
    y = np.rint((height - 1) / 2 - radii * np.sin(angles)).astype(np.int64).clip(0, height - 1)
    x = np.rint((width - 1) / 2 + radii * np.cos(angles)).astype(np.int64).clip(0, width - 1)
    rays = smooth.reshape(n, -1)[:, y * width + x]
    lit = (rays >= RING * peak[:, None, None]) & (radii >= radius[:, None, None] / 2)
    return lit.any(2).mean(1)


def _crossing(at: np.ndarray, values: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Where values (n, K) at points `at` (K,) cross zero between k and k + 1 (n,), on a straight line; else at[k]."""
    n, after = np.arange(len(values)), np.minimum(k + 1, len(at) - 1)
    here, there = values[n, k], values[n, after]
    crosses = (here > 0) & (there <= 0)
    return at[k] + np.where(crosses, here / np.where(crosses, here - there, 1), 0) * (at[after] - at[k])


def _or_one(x: np.ndarray) -> np.ndarray:
    """x where it is above 0, else 1: a divisor that leaves the 0 of dark images alone."""
    return np.where(x > 0, x, 1)
