"""What a simulation draws: the priors and numbers of a preset, and the parameters of image i of a seed.

Imports no torch, so that a mistake in a preset is reported before anyone has waited for it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from scipy import special

from shared.config import CONFIGS, load_config, merge
from shared.errors import UserError, hint, meant

# What a drawn lens may have, in the order of the index. theta_E and mass are those of the main halo and of the prior:
# where the preset counts substructure into the mass, theta_E is what is left. shared/simulate/lens.py says what each
# does to the light; N_p and mass_p [Msun] are the number and the total of the point masses.
UNITS = {"theta_E": "arcsec", "mass": "Msun", "z_l": "", "z_s": "", "gamma": "", "gamma_angle": "deg"}
UNITS |= {"x_s": "arcsec", "y_s": "arcsec", "q_s": "", "PA_s": "deg", "n_s": "", "R_s": "arcsec"}
UNITS |= {"I_s": "counts/s/pixel", "magnitude_s": "mag", "q_l": "", "PA_l": "deg"}
UNITS |= {"R_light": "arcsec", "q_light": "", "PA_light": "deg", "n_light": "", "I_light": "counts/s/pixel"}
UNITS |= {"magnitude_light": "mag", "N_p": "", "mass_p": "Msun", "x_v": "arcsec", "y_v": "arcsec", "theta_v": "arcsec"}
UNITS |= {"half_length_v": "arcsec", "angle_v": "deg", "mass_v": "Msun", "axion_mass": "eV", "exposure": "s"}
# What turns with the image: every angle is that of an axis, the same after half a turn, and places lie x to the right and
# y upwards of the centre.
AXES = tuple(name for name, unit in UNITS.items() if unit == "deg")
PLACES = (("x_s", "y_s"), ("x_v", "y_v"))
# Beside them a lens has its single point masses, [arcsec], (N, K) each, padded with masses of Einstein radius 0.
POINTS = ("x_p", "y_p", "theta_p")

# The random numbers of an image come in independent streams, so that a change of the noise leaves the lenses alone, and
# one of the substructure the main halo and the source.
PARAMETER_STREAM, NOISE_STREAM, SUBSTRUCTURE_STREAM, POINTS_STREAM = 0, 1, 2, 3

# de Broglie wavelength of an axion, the half-length of its vortex [arcsec eV], for a halo at z = 0.5 (DeepLenseSim).
AXION_LENGTH = 0.03e-22
SIGMAS = 8.3  # a uniform number of 53 bits never takes a normal one further than this


@dataclass(frozen=True)
class Prior:
    """A distribution of one number, or a number: `law` with its `numbers`."""

    law: str
    numbers: tuple[float, ...]

    def __call__(self, u: np.ndarray) -> np.ndarray:
        """The quantile of u, uniform in [0, 1): one random number a draw, whatever the law."""
        a, b, c = (*self.numbers, 0.0, 0.0)[:3]
        if self.law == "normal":
            return a + b * special.ndtri(np.maximum(u, 2.0**-54))
        if self.law == "loguniform":
            return a * (b / a) ** u
        if self.law == "power_law":
            return b * (c / b) ** u if a == -1 else (b ** (a + 1) + (c ** (a + 1) - b ** (a + 1)) * u) ** (1 / (a + 1))
        if self.law == "poisson":
            return np.searchsorted(special.pdtr(np.arange(self.high), a), u, side="right").astype(float)
        return a + (self.high - a) * u

    @property
    def low(self) -> float:
        """The lowest number it draws."""
        a, b = (*self.numbers, 0.0)[:2]
        return {"normal": a - SIGMAS * b, "power_law": b, "poisson": 0.0}.get(self.law, a)

    @property
    def high(self) -> float:
        """The highest number it draws."""
        a, b = self.numbers[0], self.numbers[-1]
        if self.law == "poisson":  # beyond it lies less than 2^-53
            return float(math.ceil(a + 12 * math.sqrt(a) + 20))
        return a + SIGMAS * b if self.law == "normal" else b

    @property
    def fixed(self) -> bool:
        """Whether it is a number."""
        return self.law != "poisson" and self.low == self.high

    @property
    def whole(self) -> bool:
        """Whether it draws whole numbers alone."""
        return self.law == "poisson" or (self.fixed and self.low.is_integer())

    def __str__(self) -> str:
        return str(self.low) if self.fixed else f"{self.law}({', '.join(map(str, self.numbers))})"


LAWS = {
    "uniform": "low, high",
    "normal": "mean, sigma",
    "loguniform": "low, high",
    "power_law": "slope, low, high",
    "poisson": "mean",
}


def _prior(value: object) -> Prior:
    text = str(value).strip()
    call = re.fullmatch(r"(\w+)\s*\((.*)\)", text)
    known = ", ".join(f"{law}({numbers})" for law, numbers in LAWS.items())
    if call and call[1] not in LAWS:
        raise ValueError(f"{text!r}: no distribution {call[1]!r}{meant(call[1], LAWS)} (known: a number, {known})")
    law, words = (call[1], call[2].split(",")) if call else ("uniform", 2 * [text])
    try:
        numbers = tuple(map(float, words))
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor one of {known}") from None
    if len(numbers) != len(LAWS[law].split(",")):
        raise ValueError(f"{text!r}: expected {law}({LAWS[law]})")
    a, b = numbers[0], numbers[-1]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{text!r} needs finite numbers")
    if law == "normal" and b < 0:
        raise ValueError(f"{text!r} needs sigma >= 0")
    if law == "poisson" and not 0 <= a <= 1e5:
        raise ValueError(f"{text!r} needs a mean from 0 to 100000")
    if law in ("uniform", "loguniform", "power_law") and not numbers[-2] <= b:
        raise ValueError(f"{text!r} needs finite numbers, low <= high")
    if law in ("loguniform", "power_law") and not numbers[-2] > 0:
        raise ValueError(f"{text!r} needs low > 0")
    if law == "power_law" and not all(1e-250 < _power(limit, a + 1) < 1e250 for limit in numbers[1:]):
        raise ValueError(f"{text!r} is too steep for its numbers")
    return Prior(law, numbers)


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


Law = Annotated[Prior, BeforeValidator(_prior), PlainSerializer(str)]
# As the number it was before it could be drawn: data sets made then keep their name.
Exposure = Annotated[
    Prior, BeforeValidator(_prior), PlainSerializer(lambda prior: prior.low if prior.fixed else str(prior))
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Known = Annotated[float, Field(allow_inf_nan=False)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LensPriors(_Block):
    """Main halo, source, lens light, exposure.

    The order is that of an image's random numbers, each name has its own: never change it, append.
    """

    z_l: Law | None = None
    z_s: Law | None = None
    mass: Law | None = None
    gamma: Law | None = None
    gamma_angle: Law | None = None
    r_s: Law | None = None
    azimuth_s: Law | None = None
    q_s: Law | None = None
    PA_s: Law | None = None
    n_s: Law | None = None
    R_s: Law | None = None
    I_s: Law | None = None
    theta_E: Law | None = None
    x_s: Law | None = None
    y_s: Law | None = None
    magnitude_s: Law | None = None
    q_l: Law | None = None
    PA_l: Law | None = None
    R_light: Law | None = None
    q_light: Law | None = None
    turn_light: Law | None = None  # deg, of the major axis of the light from that of the mass (of a sphere: from x)
    n_light: Law | None = None
    I_light: Law | None = None
    magnitude_light: Law | None = None
    exposure: Exposure | None = None


class SubstructurePriors(_Block):
    """Number of point masses, and the line of mass; the order is as final as that of LensPriors."""

    N_p: Law | None = None
    x_v: Law | None = None
    y_v: Law | None = None
    half_length_v: Law | None = None
    angle_v: Law | None = None
    mass_v: Law | None = None
    fraction_v: Law | None = None  # of the mass of the lens
    axion_mass: Law | None = None  # eV, in place of half_length_v


class PointPriors(_Block):
    """Each of the point masses: mass [Msun] and position; the order is as final as that of LensPriors."""

    m_p: Law | None = None
    r_p: Law | None = None
    azimuth_p: Law | None = None


class Priors(PointPriors, SubstructurePriors, LensPriors):
    """What a class of lenses draws its own way: over, or beside, the priors of the preset."""


LENS, SUBSTRUCTURE, POINT = (tuple(block.model_fields) for block in (LensPriors, SubstructurePriors, PointPriors))

# What belongs together, "|" between the ways of giving it. A component with "?" may be missing, all of it.
COMPONENTS = {
    "the main halo": "theta_E | mass",
    "the redshifts?": "z_l z_s",
    "its ellipticity?": "q_l PA_l",
    "the external shear?": "gamma gamma_angle",
    "the source": "q_s PA_s n_s R_s",
    "the position of the source": "r_s azimuth_s | x_s y_s",
    "the flux of the source": "I_s | magnitude_s",
    "the light of the lens?": "R_light q_light turn_light n_light",
    "the flux of the lens?": "I_light | magnitude_light",
    "the point masses?": "N_p m_p r_p azimuth_p",
    "the line of mass?": "x_v y_v angle_v",
    "the length of the line?": "half_length_v | axion_mass",
    "the mass of the line?": "mass_v | fraction_v",
}
WHOLES = (  # components that have or lack their parts together
    ("the light of the lens?", "the flux of the lens?"),
    ("the line of mass?", "the length of the line?", "the mass of the line?"),
)
POSITIVE = (
    *("mass", "theta_E", "R_s", "I_s", "R_light", "I_light"),
    *("half_length_v", "mass_v", "axion_mass", "m_p", "exposure"),
)
AXIS_RATIOS = ("q_s", "q_l", "q_light")
# A name that takes the place of other ones.
RIVALS = {"theta_E": "mass", "mass": "theta_E", "r_s": "x_s y_s", "azimuth_s": "x_s y_s"}
RIVALS |= {"x_s": "r_s azimuth_s", "y_s": "r_s azimuth_s", "I_s": "magnitude_s", "magnitude_s": "I_s"}
RIVALS |= {"I_light": "magnitude_light", "magnitude_light": "I_light", "half_length_v": "axion_mass"}
RIVALS |= {"axion_mass": "half_length_v", "mass_v": "fraction_v", "fraction_v": "mass_v"}

# The numbers of the instrument that each kind of noise needs.
NOISE = {
    "poisson": ("exposure", "sky"),
    "poisson-gaussian": ("exposure", "background_rms"),
    "ccd": ("exposure", "exposures", "zero_point", "sky_brightness", "read_noise", "gain"),
    "none": (),
}
PIXEL_UNITS = {"poisson": "counts", "poisson-gaussian": "counts", "ccd": "e-/s", "none": "counts/s"}


class Preset(Priors):
    """The numbers of a simulation; the files in configs/simulate say what each one means, and its unit."""

    name: str
    pixels: int = Field(gt=0)
    pixel_scale: Positive
    supersampling: int = Field(gt=0)
    H0: Positive | None = None
    Om0: float | None = Field(None, gt=0, lt=1)
    distances: Literal["luminosity", "angular-diameter"] | None = None
    psf_sigma: Positive
    noise: Literal["poisson", "poisson-gaussian", "ccd", "none"] = "poisson"
    sky: float | None = Field(None, ge=0, allow_inf_nan=False)
    background_rms: float | None = Field(None, ge=0, allow_inf_nan=False)
    exposures: int | None = Field(None, gt=0)
    zero_point: Known | None = None
    sky_brightness: Known | None = None
    read_noise: float | None = Field(None, ge=0, allow_inf_nan=False)
    gain: Positive | None = None
    scaling: Literal["min-max", "none"]
    mass_includes_substructure: bool = False
    classes: dict[str, Priors] = {}

    @property
    def priors(self) -> list[dict[str, Prior]]:
        """The priors of each class by name; of the whole preset if it has no classes."""
        own = _given(self)
        return [own | _given(block) for block in self.classes.values()] or [own]

    def number(self, name: str) -> float:
        """A number of the instrument or the cosmology that only some presets give."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"preset {self.name} has no {name}")
        return float(value)

    @property
    def pixel_unit(self) -> str:
        """The unit of the pixels of an observed image."""
        return PIXEL_UNITS[self.noise] if self.scaling == "none" else "of the range of the image"

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """The class (N,) of each image: they take turns."""
        return np.array([i % max(len(self.classes), 1) for i in indices])

    def select(self, names: Sequence[str]) -> Self:
        """The preset with these of its classes alone, in its own order.

        Raises UserError for a class that it does not have.
        """
        if names and not self.classes:
            raise UserError(f"preset {self.name} has no classes: leave out --class")
        if unknown := [name for name in names if name not in self.classes]:
            raise UserError(f"preset {self.name} has no class {unknown[0]!r}{hint(unknown[0], self.classes)}")
        return self.model_copy(update={"classes": {k: v for k, v in self.classes.items() if k in names or not names}})

    def request(self) -> dict[str, Any]:
        """What identifies it: enough for Preset(**...) to be the same."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        missing = [name for name in NOISE[self.noise] if getattr(self, name) is None and name != "exposure"]
        problems = [f"noise {self.noise!r} needs {', '.join(missing)}"] if missing else []
        found = [_problems(self, priors) for priors in self.priors]
        for k, own in enumerate(found):
            for problem in own:  # one that all classes share is one of the preset
                shared = all(problem in others for others in found)
                problems.append(problem if shared else f"class {list(self.classes)[k]}: {problem}")
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return self

    @classmethod
    def load(cls, name: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Load configs/simulate/<name>.yaml, or the YAML file at a path.

        overrides   {"theta_E": "uniform(0.8, 2)", "pixels": 64}: put in place, a prior also within the classes that
                    have their own; one that takes another's place (theta_E that of mass) removes it

        Raises UserError for an unknown name, and for a file with unknown, missing or impossible entries.
        """
        known = presets()
        path = known.get(str(name), Path(name))
        if not path.is_file():
            raise UserError(f"no preset and no file {str(name)!r}{hint(name, known)}")
        preset = load_config(cls, [path], {"name": path.stem})
        if not overrides:
            return preset
        tree: dict[str, Any] = {"name": path.stem}
        for key, value in overrides.items():
            change = dict.fromkeys(name for name in RIVALS.get(key, "").split() if name not in overrides) | {key: value}
            own = [name for name, block in preset.classes.items() if block.model_fields_set & set(change)]
            tree = merge(tree, {"classes": dict.fromkeys(own, change)} if own else {})
            tree = merge(tree, change if not own or preset.model_fields_set & set(change) else {})
        return load_config(cls, [path], tree, label="--prior/--set")


def presets() -> dict[str, Path]:
    """The presets that came with the installation: name -> file."""
    return {path.stem: path for path in sorted((CONFIGS / "simulate").glob("*.yaml"), key=lambda path: path.stem)}


def _given(block: Priors) -> dict[str, Prior]:
    values = {name: getattr(block, name) for name in (*LENS, *SUBSTRUCTURE, *POINT)}
    return {name: value for name, value in values.items() if value is not None}


def _problems(preset: Preset, priors: dict[str, Prior]) -> list[str]:
    """What the priors of a class lack, or have twice, and the conditions that some draw would break."""
    problems, has = [], {}
    for what, text in COMPONENTS.items():
        ways = [way.split() for way in text.split("|")]
        begun = [way for way in ways if set(way) & set(priors)]
        has[what] = bool(begun)
        if len(begun) > 1:
            both = " and ".join(" ".join(way) for way in begun)
            problems.append(f"{what.rstrip('?')}: given twice, by {both}; leave one out (`{begun[0][0]}: null`)")
        elif not begun and not what.endswith("?"):
            problems.append(f"{what}: {' or '.join(', '.join(way) for way in ways)} missing")
        elif begun and (missing := [name for name in begun[0] if name not in priors]):
            problems.append(f"{what.rstrip('?')}: {', '.join(missing)} missing")
    for whole in WHOLES:
        if any(has[what] for what in whole):
            lacking = [COMPONENTS[what].replace(" | ", " or ") for what in whole if not has[what]]
            problems += [f"{whole[0].rstrip('?')}: {', '.join(lacking)} missing"] if lacking else []
    masses = [name for name in ("mass", "m_p", "mass_v", "fraction_v", "z_l") if name in priors]
    if masses:
        missing = [key for key in ("z_l", "z_s") if key not in priors]
        missing += [key for key in ("H0", "Om0", "distances") if getattr(preset, key) is None]
        problems += [f"{masses[0]} needs {', '.join(missing)}, too"] if missing else []
    if {"magnitude_s", "magnitude_light"} & set(priors) and preset.zero_point is None:
        problems.append("a magnitude needs zero_point")
    if "exposure" in NOISE[preset.noise] and "exposure" not in priors:
        problems.append("exposure: is missing")
    if "N_p" in priors and not priors["N_p"].whole:
        problems.append("N_p must be a whole number or poisson(mean)")
    conditions = {}
    if "z_l" in priors and "z_s" in priors:
        conditions["0 < z_l < z_s"] = priors["z_l"].low > 0 and priors["z_l"].high < priors["z_s"].low
    conditions |= {f"0 < {q} <= 1": priors[q].low > 0 and priors[q].high <= 1 for q in AXIS_RATIOS if q in priors}
    conditions |= {f"{name} > 0": priors[name].low > 0 for name in POSITIVE if name in priors}
    if "theta_E" in priors:  # in other units than arcsec, or no lens of this image
        limit = 2 * preset.pixels * preset.pixel_scale
        conditions[f"theta_E below {limit:g} arcsec, twice the image"] = float(priors["theta_E"](np.array(0.5))) < limit
    if "gamma" in priors:
        conditions["0 <= gamma < 1"] = priors["gamma"].low >= 0 and priors["gamma"].high < 1
    # Below 0.164 the profile would rise outwards: k of shared/simulate/lens.py is negative there.
    conditions |= {f"{n} >= 0.2": priors[n].low >= 0.2 for n in ("n_s", "n_light") if n in priors}
    if "fraction_v" in priors:
        conditions["0 < fraction_v < 1"] = priors["fraction_v"].low > 0 and priors["fraction_v"].high < 1
    if "N_p" in priors:
        conditions["N_p >= 0"] = priors["N_p"].low >= 0
    broken = [condition for condition, holds in conditions.items() if not holds]
    return problems + ([f"every draw must have {' and '.join(broken)}"] if broken else [])


def einstein_radius(preset: Preset, mass: np.ndarray, z_l: np.ndarray, z_s: np.ndarray) -> np.ndarray:
    """The Einstein radius [arcsec] of a mass [Msun] by the distances the preset names, float64.

    theta_E^2 = 4 G M / c^2  D_LS / (D_L D_S), flat universe without radiation (Hogg 1999, astro-ph/9905116).
    """
    from caustics.constants import G_over_c2, rad_to_arcsec

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
    from caustics.constants import c_km_s

    # Not that of caustics: it interpolates through a matrix product, whose rounding depends on the batch.
    H0, Om0 = preset.number("H0"), preset.number("Om0")
    integral = np.zeros_like(z)
    for node, weight in zip(*np.polynomial.legendre.leggauss(24), strict=True):
        x = 1 + z * (1 + node) / 2
        integral += weight * z / 2 / np.sqrt(Om0 * x * x * x + 1 - Om0)
    return c_km_s / H0 * integral


def draw_parameters(preset: Preset, seed: int, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Draw the parameters of these images from the priors: {name: (N,) float64}, in the units of UNITS.

    Also the x_p, y_p, theta_p (N, K) of their point masses. What an image of another class lacks is NaN there.

    Raises UserError if the substructure of an image weighs more than its lens, where it is a part of that.
    """
    indices, labels = list(indices), preset.labels(indices)
    drawn = []
    for label, priors in enumerate(preset.priors):
        members = np.flatnonzero(labels == label)
        drawn.append((members, _draw(preset, priors, seed, [indices[k] for k in members])))
    columns: dict[str, np.ndarray] = {}
    for name in (*UNITS, *POINTS):
        having = [(members, values[name]) for members, values in drawn if name in values and len(members)]
        if having:
            width = max(values.shape[1:] for _, values in having)
            columns[name] = np.full((len(indices), *width), np.nan)
            for members, values in having:
                padded = np.zeros((len(members), *width))
                padded[..., : values.shape[-1]] = values
                columns[name][members] = padded
    return columns


def _draw(preset: Preset, priors: dict[str, Prior], seed: int, indices: list[int]) -> dict[str, np.ndarray]:
    """The parameters of images of one class."""

    def numbers(stream: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        if not set(names) & set(priors):
            return {}
        u = np.array([generator(seed, i, stream).random(len(names)) for i in indices]).reshape(-1, len(names))
        return {name: priors[name](u[:, k]) for k, name in enumerate(names) if name in priors}

    p = numbers(PARAMETER_STREAM, LENS) | numbers(SUBSTRUCTURE_STREAM, SUBSTRUCTURE)
    if "r_s" in p:
        azimuth = np.deg2rad(p["azimuth_s"])
        p |= {"x_s": p["r_s"] * np.cos(azimuth), "y_s": p["r_s"] * np.sin(azimuth)}
    for of in ("s", "light"):
        if f"magnitude_{of}" in p:
            flux = 10 ** (-0.4 * (p[f"magnitude_{of}"] - preset.number("zero_point"))) * preset.pixel_scale**2
            p[f"I_{of}"] = flux / _sersic_flux(p[f"R_{of}"], p[f"n_{of}"])
    if "turn_light" in p:
        p["PA_light"] = np.mod(p.get("PA_l", 0) + p["turn_light"], 180)
    if "mass" in p:
        p["theta_E"] = einstein_radius(preset, p["mass"], p["z_l"], p["z_s"])
    elif "z_l" in p:
        p["mass"] = (p["theta_E"] / einstein_radius(preset, np.ones(len(indices)), p["z_l"], p["z_s"])) ** 2
    substructure = np.zeros(len(indices))
    if "N_p" in p:
        p |= _point_masses(preset, priors, seed, indices, p)
        substructure += p["mass_p"]
    if "x_v" in p:
        if "axion_mass" in p:
            p["half_length_v"] = AXION_LENGTH / p["axion_mass"]
        if "fraction_v" in p:
            p["mass_v"] = p["fraction_v"] * p["mass"]
        p["theta_v"] = einstein_radius(preset, p["mass_v"], p["z_l"], p["z_s"])
        substructure += p["mass_v"]
    if preset.mass_includes_substructure and ("N_p" in p or "x_v" in p):
        left = p["mass"] - substructure
        if (left <= 0).any():
            i = indices[int(np.argmin(left))]
            raise UserError(
                f"image {i} of preset {preset.name}: its substructure weighs more than its lens: raise mass"
            )
        p["theta_E"] = einstein_radius(preset, left, p["z_l"], p["z_s"])
    return p


def _point_masses(
    preset: Preset, priors: dict[str, Prior], seed: int, indices: list[int], p: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Their positions and Einstein radii, (N, K) each with zeros from N_p on, and their total mass."""
    counts = p["N_p"].astype(int)
    u = np.zeros((len(indices), max([0, *counts]), len(POINT)))
    for k, i in enumerate(indices):
        u[k, : counts[k]] = generator(seed, i, POINTS_STREAM).random((counts[k], len(POINT)))
    m, r, azimuth = (priors[name](u[..., k]) for k, name in enumerate(POINT))
    there = np.arange(u.shape[1]) < counts[:, None]
    m, r, azimuth = m * there, r * there, np.deg2rad(azimuth)
    theta = einstein_radius(preset, m, p["z_l"][:, None], p["z_s"][:, None])
    total = np.array([math.fsum(masses) for masses in m])  # exactly rounded, whatever the padding
    return {"mass_p": total, "x_p": r * np.cos(azimuth), "y_p": r * np.sin(azimuth), "theta_p": theta}


def _sersic_flux(R: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The flux of a Sersic profile over its surface brightness at R, [R^2] (Graham & Driver 2005, Eq. 4)."""
    k = 1.9992 * n - 0.3271  # as shared/simulate/lens.py has it
    return 2 * np.pi * n * R * R * np.exp(k) * k ** (-2 * n) * special.gamma(2 * n)


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    # Philox needs no seeding: the key names the image, the top word of the counter the stream.
    key, counter = np.array([seed, index], dtype=np.uint64), np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
