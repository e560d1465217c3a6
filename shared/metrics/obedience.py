"""Obedience: do lenses have the parameters that they were asked to have?"""

from typing import NamedTuple

import numpy as np


class Obedience(NamedTuple):
    """Of one parameter, over n lenses.

    bias     median of measured - asked, in the parameter's unit
    scatter  of that difference, robust: see `spread`
    r2       share of the variance of what was asked that is found again: 1 - sum (measured - asked)^2 / sum (asked - mean)^2;
             1 is perfect, 0 as good as one answer for all; NaN where all were asked alike
    """

    n: int
    bias: float
    scatter: float
    r2: float


def obedience(asked: np.ndarray, measured: np.ndarray, axis: bool = False) -> Obedience:
    """asked, measured (N,), of those lenses where both are finite.

    axis   angles in degrees that are the same after half a turn: differences are within 90 either way, and r2 is that of
           the unit vectors of twice the angle
    """
    fine = np.isfinite(asked) & np.isfinite(measured)
    asked, measured = asked[fine], measured[fine]
    if not len(asked):
        return Obedience(0, np.nan, np.nan, np.nan)
    apart = difference(asked, measured, axis)
    a, m = (np.exp(2j * np.deg2rad(x)) if axis else x for x in (asked, measured))
    variance = np.sum(np.abs(a - a.mean()) ** 2)
    r2 = 1 - np.sum(np.abs(m - a) ** 2) / variance if np.ptp(asked) > 0 else np.nan
    return Obedience(len(asked), float(np.median(apart)), spread(apart), float(r2))


def difference(truth: np.ndarray, values: np.ndarray, axis: bool = False) -> np.ndarray:
    """values - truth, (N,); of angles of axes the one within 90 degrees either way."""
    apart = values - truth
    return (apart + 90) % 180 - 90 if axis else apart


def spread_of_axes(angles: np.ndarray) -> float:
    """Standard deviation in degrees of angles of axes, (N,), about their mean direction; NaN entries left out."""
    angles = angles[np.isfinite(angles)]
    mean = np.rad2deg(np.angle(np.exp(2j * np.deg2rad(angles)).mean())) / 2
    return float(np.sqrt(np.square(difference(mean, angles, axis=True)).mean()))


def spread(values: np.ndarray) -> float:
    """Standard deviation of the Gaussian with this median absolute deviation: a round source has no angle at all."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
