"""What a simulation draws: the priors and numbers of a preset, and the parameters of image i of a seed."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from caustics.constants import G_over_c2, c_km_s, rad_to_arcsec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from shared.config import CONFIGS, load_config
from shared.errors import UserError
from shared.explain import hint

# x_s, y_s: position of the source; R_s, I_s, q_s, PA_s, n_s: its Sersic profile; configs/simulate/ explains the rest.
UNITS = {"theta_E": "arcsec", "mass": "Msun", "z_l": "", "z_s": "", "gamma": "", "gamma_angle": "deg"}
UNITS |= {"x_s": "arcsec", "y_s": "arcsec", "q_s": "", "PA_s": "deg", "n_s": "", "R_s": "arcsec"}
UNITS |= {"I_s": "counts/s/pixel"}
# The random numbers of an image come in independent streams, so that a change of the noise leaves the lenses alone.
PARAMETER_STREAM, NOISE_STREAM = 0, 1


@dataclass(frozen=True)
class Prior:
    """A uniform distribution over [low, high]; a fixed number where the two are equal."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"uniform({self.low}, {self.high})" if self.low < self.high else str(self.low)


def _prior(value: object) -> Prior:
    numbers = re.fullmatch(r"uniform\(([^,]+),([^,]+)\)", str(value).strip())
    try:
        low, high = map(float, numbers.groups() if numbers else 2 * (str(value),))
    except ValueError:
        raise ValueError(f"{value!r} is neither a number nor uniform(low, high)") from None
    if not -np.inf < low <= high < np.inf:
        raise ValueError(f"{value!r} needs finite numbers, low <= high")
    return Prior(low, high)


Uniform = Annotated[Prior, BeforeValidator(_prior), PlainSerializer(str)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preset(BaseModel):
    """The numbers of a simulation; configs/simulate/deeplense.yaml says what each one means, and its unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pixels: int = Field(gt=0)
    pixel_scale: Positive
    supersampling: int = Field(gt=0)
    H0: Positive
    Om0: float = Field(gt=0, lt=1)
    distances: Literal["luminosity", "angular-diameter"]
    psf_sigma: Positive
    exposure: Positive
    sky: float = Field(ge=0, allow_inf_nan=False)
    scaling: Literal["min-max"]
    # The priors, in the order in which an image draws them: a new one goes to the end, so that the old lenses stay.
    z_l: Uniform
    z_s: Uniform
    mass: Uniform
    gamma: Uniform
    gamma_angle: Uniform
    r_s: Uniform
    azimuth_s: Uniform
    q_s: Uniform
    PA_s: Uniform
    n_s: Uniform
    R_s: Uniform
    I_s: Uniform

    @property
    def priors(self) -> dict[str, Prior]:
        """The priors by name, in the order in which they are drawn."""
        return {name: value for name, value in self if isinstance(value, Prior)}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        conditions = {
            "0 < z_l < z_s": self.z_l.low > 0 and self.z_l.high < self.z_s.low,
            "0 < q_s <= 1": self.q_s.low > 0 and self.q_s.high <= 1,
        }
        conditions |= {f"{name} > 0": getattr(self, name).low > 0 for name in ("mass", "n_s", "R_s", "I_s")}
        if broken := [condition for condition, holds in conditions.items() if not holds]:
            raise ValueError(f"every draw must have {' and '.join(broken)}")
        return self

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Load configs/simulate/<name>.yaml, or the YAML file at a path.

        Raises UserError for an unknown name, and for a file with unknown, missing or impossible entries.
        """
        known = {path.stem: path for path in sorted((CONFIGS / "simulate").glob("*.yaml"))}
        path = known.get(str(name), Path(name))
        if not path.is_file():
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(f"no preset and no file {str(name)!r}{hint(near, list(known))}")
        return load_config(cls, [path], {"name": path.stem})


def einstein_radius(preset: Preset, mass: np.ndarray, z_l: np.ndarray, z_s: np.ndarray) -> np.ndarray:
    """The Einstein radius [arcsec] of a mass [Msun] by the distances the preset names, float64.

    theta_E^2 = 4 G M / c^2  D_LS / (D_L D_S), flat universe without radiation (Hogg 1999, astro-ph/9905116).
    """
    comoving_l, comoving_s = _comoving_distance(preset, z_l), _comoving_distance(preset, z_s)
    if preset.distances == "luminosity":
        d_l, d_s = comoving_l * (1 + z_l), comoving_s * (1 + z_s)
        d_ls = d_s - d_l
    else:
        d_l, d_s = comoving_l / (1 + z_l), comoving_s / (1 + z_s)
        d_ls = (comoving_s - comoving_l) / (1 + z_s)
    return rad_to_arcsec * np.sqrt(4 * G_over_c2 * mass * d_ls / (d_l * d_s))


def _comoving_distance(preset: Preset, z: np.ndarray) -> np.ndarray:
    """Comoving distance [Mpc] to a redshift (Hogg 1999, Eq. 15), by Gauss-Legendre quadrature."""
    # Not that of caustics: it interpolates through a matrix product, whose rounding depends on the batch.
    integral = np.zeros_like(z)
    for node, weight in zip(*np.polynomial.legendre.leggauss(24), strict=True):
        x = 1 + z * (1 + node) / 2
        integral += weight * z / 2 / np.sqrt(preset.Om0 * x * x * x + 1 - preset.Om0)
    return c_km_s / preset.H0 * integral


def draw_parameters(preset: Preset, seed: int, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Draw the parameters of these images from the priors: {name: (N,) float64}, in the units of UNITS."""
    priors = preset.priors
    u = np.array([generator(seed, i, PARAMETER_STREAM).random(len(priors)) for i in indices])
    drawn = {name: prior.low + (prior.high - prior.low) * u[:, k] for k, (name, prior) in enumerate(priors.items())}
    r, azimuth = drawn["r_s"], np.deg2rad(drawn["azimuth_s"])
    drawn |= {"x_s": r * np.cos(azimuth), "y_s": r * np.sin(azimuth)}
    drawn["theta_E"] = einstein_radius(preset, drawn["mass"], drawn["z_l"], drawn["z_s"])
    return {name: drawn[name] for name in UNITS}


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    # Philox needs no seeding: the key names the image, the top word of the counter the stream.
    key, counter = np.array([seed, index], dtype=np.uint64), np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
