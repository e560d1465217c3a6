"""Simulate strong lenses: the priors of a preset -> parameters -> clean image -> observed image.

    lens-ldm simulate --preset deeplense --count 6000 --seed 0 --out data/deeplense

Image i of a seed depends on (seed, i) alone, whatever the batch, the chunks and the number of workers. The formulas of
deflection and light are those of caustics (Stone et al. 2024, JOSS 9, 7081). In an image x grows to the right and y
upwards, from the last row to row 0; angles run from x towards y.
"""

import argparse
import difflib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from math import ceil, pi
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from caustics import func
from caustics.constants import G_over_c2, c_km_s, rad_to_arcsec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d
from tqdm import tqdm

from shared.config import CONFIGS, load_config
from shared.data import CacheWriter
from shared.errors import UserError
from shared.explain import hint

# x_s, y_s: position of the source; R_s, I_s, q_s, PA_s, n_s: its Sersic profile; configs/simulate/ explains the rest.
UNITS = {"theta_E": "arcsec", "mass": "Msun", "z_l": "", "z_s": "", "gamma": "", "gamma_angle": "deg"}
UNITS |= {"x_s": "arcsec", "y_s": "arcsec", "q_s": "", "PA_s": "deg", "n_s": "", "R_s": "arcsec"}
UNITS |= {"I_s": "counts/s/pixel"}
# The random numbers of an image come in independent streams, so that a change of the noise leaves the lenses alone.
PARAMETER_STREAM, NOISE_STREAM = 0, 1
CHUNK = 128  # images a worker hands over at once


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
    u = np.array([_generator(seed, i, PARAMETER_STREAM).random(len(priors)) for i in indices])
    drawn = {name: prior.low + (prior.high - prior.low) * u[:, k] for k, (name, prior) in enumerate(priors.items())}
    r, azimuth = drawn["r_s"], np.deg2rad(drawn["azimuth_s"])
    drawn |= {"x_s": r * np.cos(azimuth), "y_s": r * np.sin(azimuth)}
    drawn["theta_E"] = einstein_radius(preset, drawn["mass"], drawn["z_l"], drawn["z_s"])
    return {name: drawn[name] for name in UNITS}


@torch.no_grad()
def render(preset: Preset, parameters: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> Tensor:
    """Render clean images (N, 1, H, W) [counts/s/pixel]: lensed source, averaged over pixels, then blurred by the PSF.

    parameters  {name: (N,)} as `draw_parameters` returns them

    Points outside the image are rendered as far as the PSF reaches. The PSF is a normalised Gaussian at pixel centres.
    """
    sigma = preset.psf_sigma / preset.pixel_scale
    margin = ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-margin, margin + 1, dtype=dtype) / sigma) ** 2)
    kernel /= kernel.sum()
    fine = preset.supersampling
    side = (preset.pixels + 2 * margin) * fine
    axis = ((torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * preset.pixel_scale / fine).to(dtype)
    x, y = axis[None, :], axis.flip(0)[:, None]
    columns = {name: torch.from_numpy(values).to(dtype) for name, values in parameters.items()}
    images = torch.empty(len(columns["theta_E"]), 1, preset.pixels, preset.pixels, dtype=dtype)
    # One at a time and on one thread: an image fits the cache of a core, a batch does not, and no rounding can depend
    # on the batch or on where threads cut an image.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i in range(len(images)):
            light = _lensed_source({name: values[i] for name, values in columns.items()}, x, y)
            pixels = avg_pool2d(light[None, None], fine)
            images[i] = conv2d(conv2d(pixels, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0]
    finally:
        torch.set_num_threads(threads)
    return images


def _lensed_source(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Surface brightness at the points (x, y) [arcsec] of the image plane."""
    angle = p["gamma_angle"] * (pi / 180)
    gamma_1, gamma_2 = p["gamma"] * torch.cos(2 * angle), p["gamma"] * torch.sin(2 * angle)
    # The softening only keeps a point that falls on the centre from being 0 / 0.
    sis_x, sis_y = func.reduced_deflection_angle_sis(0.0, 0.0, p["theta_E"], x, y, s=1e-12)
    shear_x, shear_y = func.reduced_deflection_angle_external_shear(0.0, 0.0, gamma_1, gamma_2, x, y)
    # R_s is the geometric mean of the half-axes, the radius that caustics asks for is the major one.
    major = p["R_s"] / torch.sqrt(p["q_s"])
    shape = p["q_s"], p["PA_s"] * (pi / 180), p["n_s"], major, p["I_s"]
    beta_x, beta_y = x - sis_x - shear_x, y - sis_y - shear_y
    return func.brightness_sersic(p["x_s"], p["y_s"], *shape, beta_x, beta_y, func.k_lenstronomy(p["n_s"]))


def observe(preset: Preset, clean: Tensor, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Add photon noise to clean images and scale each to [0, 1]: -> observed, clean on the same scale, float32.

    clean    (N, 1, H, W) [counts/s/pixel]
    indices  N: the noise of image i depends on (seed, i) alone

    Raises UserError if an image has no contrast.
    """
    exposure, sky = preset.exposure, preset.sky
    observed, scaled = torch.empty(clean.shape), torch.empty(clean.shape)
    for k, i in enumerate(indices):
        rate = clean[k].double().numpy() + sky
        counts = _generator(seed, i, NOISE_STREAM).poisson(rate * exposure)
        low, high = counts.min(), counts.max()
        if low == high:
            raise UserError(f"image {i} of preset {preset.name} has no contrast: raise exposure or I_s")
        observed[k] = torch.from_numpy((counts - low) / (high - low))
        scaled[k] = torch.from_numpy((rate * exposure - low) / (high - low))
    return observed, scaled


def simulate(preset: Preset, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Simulate images `indices` of a seed: -> observed, clean (both (N, 1, H, W) in [0, 1]), parameters {name: (N,)}.

    The clean images are the expectation of the observed ones on the same scale, so their sky lies a little above 0.
    """
    parameters = draw_parameters(preset, seed, indices)
    return *observe(preset, render(preset, parameters), seed, indices), parameters


def simulate_to(
    folder: Path, preset: Preset, count: int, seed: int, workers: int | None = None, progress: bool = True
) -> None:
    """Simulate images 0 ... count - 1 of a seed into a data set folder; an interrupted one goes on.

    workers  processes of one thread each; None: one for each core this process may use

    Raises UserError if the folder holds something else, or if a worker is killed.
    """
    # Enough to simulate the same images again, with the clean ones beside them: Preset(**source["preset"]).
    source = {"kind": "simulation", "preset": preset.model_dump(mode="json"), "seed": seed}
    writer = CacheWriter(folder, count, (1, preset.pixels, preset.pixels), source, chunk=CHUNK)
    if writer.complete:
        return
    pending = writer.pending()
    todo = sum(map(len, pending))
    bar = tqdm(total=count, initial=count - todo, unit=" images", disable=not progress, smoothing=0.1)
    with bar, closing(_simulated(preset, seed, pending, min(workers or _cores(), len(pending)))) as chunks:
        for indices, images in chunks:
            writer.write(indices, images)
            bar.update(len(indices))
    parameters = draw_parameters(preset, seed, range(count))
    # Numbers that the preset fixes stay in `source`: a column without scatter cannot be a condition.
    varying = {name: values for name, values in parameters.items() if np.ptp(values) > 0}
    columns = {name: {"unit": UNITS[name], "values": values} for name, values in varying.items()}
    writer.finish(value_range=(0.0, 1.0), parameters=columns)


def _simulated(
    preset: Preset, seed: int, chunks: list[range], workers: int
) -> Generator[tuple[range, np.ndarray], None, None]:
    if workers < 2:
        for indices in chunks:
            yield indices, _simulate_chunk(preset, seed, indices)
        return
    # Where fork is safe it saves each worker the seconds of importing torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    reader, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reader, lifeline))
    waiting: deque[tuple[range, Future[np.ndarray]]] = deque()
    try:
        for indices in chunks:
            waiting.append((indices, pool.submit(_simulate_chunk, preset, seed, indices)))
            if len(waiting) > 2 * workers:  # bounds the memory where the disk is slower than the workers
                first, images = waiting.popleft()
                yield first, images.result()
        for first, images in waiting:
            yield first, images.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UserError("a worker was killed (out of memory?): run the same command with fewer --workers") from error
    finally:
        lifeline.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _simulate_chunk(preset: Preset, seed: int, indices: range) -> np.ndarray:
    return simulate(preset, seed, indices)[0].numpy()


def _start_worker(reader: Connection, lifeline: Connection) -> None:
    # Ctrl-C reaches the whole process group: the parent alone answers it. Its end of the lifeline closes when it gives
    # up and also when it is killed, and then its workers end at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline.close()
    threading.Thread(target=lambda: reader.poll(None) and os._exit(1), daemon=True).start()
    torch.set_num_threads(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    # Philox needs no seeding: the key names the image, the top word of the counter the stream.
    key, counter = np.array([seed, index], dtype=np.uint64), np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm simulate`."""
    parser = argparse.ArgumentParser(prog="lens-ldm simulate", description="Simulate a data set of strong lenses.")
    parser.add_argument("--preset", default="deeplense", help="name in configs/simulate, or a .yaml file")
    parser.add_argument("--count", type=_at_least(1), required=True, help="number of images")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="image i depends on (seed, i) only")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set, e.g. data/deeplense")
    parser.add_argument("--workers", type=_at_least(1), help="processes of one thread each (default: all cores)")
    options = parser.parse_args(argv)
    simulate_to(options.out, Preset.load(options.preset), options.count, options.seed, options.workers)
    print(f"{options.out}: {options.count} images")


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return number
