"""The lenses of a preset in other programs: lenstronomy, and the simulator of caustics. For tests and benchmark.py."""

from collections.abc import Callable, Iterable
from functools import cache

import caustics
import numpy as np
import torch
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from torch import Tensor

from shared.simulate.lens import MassLine, PointMasses
from shared.simulate.preset import Preset

Lens = dict[str, np.ndarray]  # of one image: scalars, and (K,) point masses


def lenses(parameters: dict[str, np.ndarray]) -> list[Lens]:
    """Drawn parameters -> those of each image, without what it lacks and without padding."""
    found = []
    for i in range(len(parameters["theta_E"])):
        lens = {name: values[i] for name, values in parameters.items() if np.isfinite(values[i]).all()}
        if "theta_p" in lens:
            lens |= {name: lens[name][: int(lens["N_p"])] for name in ("x_p", "y_p", "theta_p")}
        found.append(lens)
    return found


def psf_kernel(preset: Preset) -> np.ndarray:
    reach = int(np.ceil(4 * preset.psf_sigma / preset.pixel_scale))
    profile = np.exp(-0.5 * (np.arange(-reach, reach + 1) * preset.pixel_scale / preset.psf_sigma) ** 2)
    return np.outer(profile, profile) / profile.sum() ** 2


def lenstronomy_model(lens: Lens, line_points: int = 100) -> tuple[list[str], list[dict]]:
    """The mass of a lens as lenstronomy's names and arguments; a line is `line_points` point masses."""
    if "q_l" in lens:
        e1, e2 = _ellipticity(lens["q_l"], lens["PA_l"])
        names, arguments = ["SIE"], [{"theta_E": lens["theta_E"], "e1": e1, "e2": e2, "center_x": 0, "center_y": 0}]
    else:
        names, arguments = ["SIS"], [{"theta_E": lens["theta_E"], "center_x": 0, "center_y": 0}]
    names.append("SHEAR_GAMMA_PSI")
    arguments.append({"gamma_ext": lens["gamma"], "psi_ext": np.deg2rad(lens["gamma_angle"])})
    points: Iterable = ()
    if "theta_p" in lens:
        points = zip(lens["theta_p"], lens["x_p"], lens["y_p"], strict=True)
    elif "theta_v" in lens:
        # The middles of equal pieces: the integral of the continuous line by the midpoint rule.
        along = (2 * (np.arange(line_points) + 0.5) / line_points - 1) * lens["half_length_v"]
        angle, theta = np.deg2rad(lens["angle_v"]), np.full(line_points, lens["theta_v"] / line_points**0.5)
        points = zip(theta, lens["x_v"] + along * np.cos(angle), lens["y_v"] + along * np.sin(angle), strict=True)
    for theta, x, y in points:
        names.append("POINT_MASS")
        arguments.append({"theta_E": theta, "center_x": x, "center_y": y})
    return names, arguments


def lenstronomy_image(preset: Preset, lens: Lens, line_points: int = 100, border: int = 15) -> np.ndarray:
    """The clean image (H, W) [counts/s/pixel], row 0 at the top; light from `border` pixels outside is blurred in."""
    scale, side = preset.pixel_scale, preset.pixels + 2 * border
    origin = -(side - 1) / 2 * scale
    names, mass = lenstronomy_model(lens, line_points)
    model = ImageModel(
        _pixel_grid(side, origin, scale),
        PSF(psf_type="PIXEL", kernel_point_source=psf_kernel(preset)),
        lens_model_class=_lens_model(tuple(names)),
        source_model_class=LightModel(["SERSIC_ELLIPSE_Q_PHI"]),
        lens_light_model_class=LightModel(["SERSIC_ELLIPSE_Q_PHI"] if "I_light" in lens else []),
        kwargs_numerics={"supersampling_factor": preset.supersampling, "supersampling_convolution": False},
    )
    source = [_sersic(lens, "s") | {"center_x": lens["x_s"], "center_y": lens["y_s"]}]
    light = [_sersic(lens, "light") | {"center_x": 0, "center_y": 0}] if "I_light" in lens else []
    image = model.image(mass, source, kwargs_lens_light=light) / scale**2
    return image[::-1][border : side - border, border : side - border]


def caustics_simulator(preset: Preset, names: Iterable[str], points: int = 0) -> Callable[[dict[str, Tensor]], Tensor]:
    """LensSource, caustics' own simulator, of lenses with these parameters: p -> clean image (H, W), row 0 at the top.

    points   take that many of caustics' own Point in place of the component of this repository

    With supersampling it takes as many points a pixel as this repository does, but at Gauss-Legendre nodes.
    """
    names = set(names)
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    halo = caustics.SIE if "q_l" in names else caustics.SIS
    masses = [
        halo(cosmology=cosmology, x0=0.0, y0=0.0, s=1e-12, name="halo"),
        caustics.ExternalShear(cosmology=cosmology, x0=0.0, y0=0.0, name="shear"),
    ]
    if "theta_p" in names:
        own = [caustics.Point(cosmology=cosmology, s=1e-12, name=f"point{k}") for k in range(points)]
        masses += own or [PointMasses(cosmology, name="points")]
    masses += [MassLine(cosmology, name="line")] if "theta_v" in names else []
    fine = preset.supersampling
    simulator = caustics.LensSource(
        lens=caustics.SinglePlane(cosmology=cosmology, lenses=masses, z_l=0.5, z_s=1.0, name="plane"),
        source=caustics.Sersic(name="source", use_lenstronomy_k=True),
        pixelscale=preset.pixel_scale,
        pixels_x=preset.pixels,
        quad_level=fine if fine > 1 else None,
        psf=torch.from_numpy(psf_kernel(preset)),
    )

    def image(p: dict[str, Tensor]) -> Tensor:
        shear = p["gamma_angle"] * (np.pi / 90)
        values = {
            "halo": {"Rein": p["theta_E"]},
            "shear": {"gamma_1": p["gamma"] * shear.cos(), "gamma_2": p["gamma"] * shear.sin()},
            "source": {"x0": p["x_s"], "y0": p["y_s"], "q": p["q_s"], "phi": p["PA_s"] * (np.pi / 180), "n": p["n_s"]},
        }
        values["source"] |= {"Re": p["R_s"] / p["q_s"].sqrt(), "Ie": p["I_s"]}
        if "q_l" in names:
            values["halo"] |= {"q": p["q_l"], "phi": p["PA_l"] * (np.pi / 180)}
        if "theta_p" in names:
            values["points"] = {"x0": p["x_p"], "y0": p["y_p"], "Rein": p["theta_p"]}
            for k in range(points):
                values[f"point{k}"] = {name: value[k] for name, value in values["points"].items()}
        if "theta_v" in names:
            values["line"] = {"x0": p["x_v"], "y0": p["y_v"], "Rein": p["theta_v"]}
            values["line"] |= {"half_length": p["half_length_v"], "phi": p["angle_v"] * (np.pi / 180)}
        simulator.to(dtype=p["x_s"].dtype)
        return simulator([values[next(iter(x.parents)).name][x.name] for x in simulator.dynamic_params]).flip(0)

    return image


def _ellipticity(q: float, PA: float) -> tuple[float, float]:
    e = (1 - q) / (1 + q)
    return e * np.cos(2 * np.deg2rad(PA)), e * np.sin(2 * np.deg2rad(PA))


def _sersic(lens: Lens, of: str) -> dict:
    return {
        "amp": lens[f"I_{of}"],
        "R_sersic": lens[f"R_{of}"],
        "n_sersic": lens[f"n_{of}"],
        "q": lens[f"q_{of}"],
        "phi": np.deg2rad(lens[f"PA_{of}"]),
    }


@cache
def _lens_model(names: tuple[str, ...]) -> LensModel:
    return LensModel(list(names))


@cache
def _pixel_grid(side: int, origin: float, scale: float) -> ImageData:
    return ImageData(
        image_data=np.zeros((side, side)),
        ra_at_xy_0=origin,
        dec_at_xy_0=origin,
        transform_pix2angle=scale * np.eye(2),
    )
