"""Deflections and light against lenstronomy, caustics, quadrature and the theorems of the field."""

import caustics
import numpy as np
import pytest
import torch
from lenstronomy.LensModel.lens_model import LensModel
from scipy.integrate import quad
from torch import Tensor

from shared.simulate.lens import (
    MassLine,
    PointMasses,
    deflection,
    mass_line,
    mass_line_potential,
    point_masses,
    surface_brightness,
)
from tests.shared.simulate.oracle import lenstronomy_model

LENS = {"theta_E": 1.3, "gamma": 0.12, "gamma_angle": 25.0}
ELLIPSE = LENS | {"q_l": 0.7, "PA_l": 65.0}
LINE = {"x_v": 0.2, "y_v": -0.3, "theta_v": 0.25, "half_length_v": 0.6, "angle_v": 35.0}
POINTS = {"x_p": [0.5, -1.0, 0.2], "y_p": [0.9, 0.1, -1.4], "theta_p": [0.1, 0.02, 0.07]}
SOURCE = {"x_s": 0.1, "y_s": -0.05, "q_s": 0.6, "PA_s": 100.0, "n_s": 1.5, "R_s": 0.4, "I_s": 1.0}


def tensors(p: dict) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in p.items()}


def somewhere(n: int = 300) -> tuple[Tensor, Tensor]:
    x, y = np.random.default_rng(0).uniform(-2.5, 2.5, (2, n))
    return torch.from_numpy(x), torch.from_numpy(y)


def line(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return p["x_v"], p["y_v"], p["theta_v"], p["half_length_v"], torch.deg2rad(p["angle_v"])


def off_the_line(x: Tensor, y: Tensor, distance: float) -> Tensor:
    angle = np.deg2rad(LINE["angle_v"])
    dx, dy = x - LINE["x_v"], y - LINE["y_v"]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return torch.hypot((along.abs() - LINE["half_length_v"]).clamp(min=0), across) > distance


@pytest.mark.parametrize("p", [LENS, ELLIPSE, ELLIPSE | POINTS | {"N_p": 3}], ids=["SIS", "SIE", "points"])
def test_deflections_are_those_of_lenstronomy(p: dict) -> None:
    x, y = somewhere()
    names, arguments = lenstronomy_model({name: np.array(value) for name, value in p.items()})
    expected = LensModel(names).alpha(x.numpy(), y.numpy(), arguments)
    for ours, theirs in zip(deflection(tensors(p), x, y), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_a_line_is_the_limit_of_many_points() -> None:
    x, y = somewhere()
    far = off_the_line(x, y, 0.01)
    x, y = x[far], y[far]
    p = {name: np.array(value) for name, value in (LENS | LINE).items()}
    names, arguments = lenstronomy_model(p, line_points=2000)
    expected = LensModel(names).alpha(x.numpy(), y.numpy(), arguments)
    for ours, theirs in zip(deflection(tensors(LENS | LINE), x, y), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)  # the midpoint rule's error at the ends of the line


def test_a_line_is_the_integral_of_points_also_close_to_it() -> None:
    p = tensors(LINE)
    angle, L, theta = float(torch.deg2rad(p["angle_v"])), LINE["half_length_v"], LINE["theta_v"]
    for along, across in ((0.3, 1e-3), (0.61, 1e-4), (-0.59, -0.02), (0.0, 0.3)):
        x = LINE["x_v"] + along * np.cos(angle) - across * np.sin(angle)
        y = LINE["y_v"] + along * np.sin(angle) + across * np.cos(angle)
        pulls = [
            quad(f, -L, L, points=[min(max(along, -L), L)], epsabs=1e-11, limit=200)[0] * theta**2 / (2 * L)
            for f in (
                lambda w, a=along, b=across: (a - w) / ((a - w) ** 2 + b * b),
                lambda w, a=along, b=across: b / ((a - w) ** 2 + b * b),
            )
        ]
        expected = pulls[0] * np.exp(1j * angle) + pulls[1] * 1j * np.exp(1j * angle)
        alpha_x, alpha_y = mass_line(*line(p), torch.tensor(x), torch.tensor(y))
        assert float(alpha_x) == pytest.approx(expected.real, abs=1e-8)
        assert float(alpha_y) == pytest.approx(expected.imag, abs=1e-8)


def test_point_masses_are_those_of_caustics() -> None:
    x, y = somewhere()
    p = tensors(POINTS)
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    singles = [
        caustics.Point(cosmology=cosmology, z_l=0.5, z_s=1.0, x0=a, y0=b, Rein=t).reduced_deflection_angle(x, y)
        for a, b, t in zip(p["x_p"], p["y_p"], p["theta_p"], strict=True)
    ]
    ours = point_masses(p["x_p"], p["y_p"], p["theta_p"], x, y)
    for k in range(2):
        torch.testing.assert_close(ours[k], sum(single[k] for single in singles), rtol=1e-10, atol=1e-12)


def test_a_point_mass_of_nothing_adds_exactly_nothing() -> None:
    x, y = (values.float() for values in somewhere())
    p = {name: values.float() for name, values in tensors(POINTS).items()}
    padding = torch.zeros(2)
    padded = (torch.cat([p[name], padding]) for name in ("x_p", "y_p", "theta_p"))
    for ours, expected in zip(point_masses(*padded, x, y), point_masses(*p.values(), x, y), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_point_on_a_mass_or_on_the_line_is_finite(dtype: torch.dtype) -> None:
    p = {name: values.to(dtype) for name, values in tensors(ELLIPSE | POINTS | LINE | SOURCE).items()}
    p |= {"angle_v": torch.zeros((), dtype=dtype)}
    x = torch.stack([*p["x_p"], p["x_v"], p["x_v"] + p["half_length_v"], torch.zeros((), dtype=dtype)])
    y = torch.stack([*p["y_p"], p["y_v"], p["y_v"], torch.zeros((), dtype=dtype)])
    assert surface_brightness(p, x, y).isfinite().all()


def components() -> dict[str, tuple[caustics.ThinLens, float]]:
    """Each component, and theta_E^2 of all its mass."""
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    p = tensors(POINTS | LINE)
    points = PointMasses(cosmology, p["x_p"], p["y_p"], p["theta_p"], z_l=0.5, z_s=1.0)
    one_line = MassLine(cosmology, *line(p), z_l=0.5, z_s=1.0)
    return {"points": (points, float((p["theta_p"] ** 2).sum())), "line": (one_line, LINE["theta_v"] ** 2)}


@pytest.mark.parametrize("name", ["points", "line"])
def test_a_component_obeys_the_theorems_of_lensing(name: str) -> None:
    component, theta_squared = components()[name]
    x, y = somewhere(100)
    keep = off_the_line(x, y, 0.02)
    x, y = x[keep], y[keep]
    alpha = torch.stack(component.reduced_deflection_angle(x, y))

    def potential(point: Tensor) -> Tensor:
        return component.potential(point[0], point[1])

    def pull(point: Tensor) -> Tensor:
        return torch.stack(component.reduced_deflection_angle(point[0], point[1]))

    points = torch.stack([x, y], 1)
    gradient = torch.func.vmap(torch.func.grad(potential))(points).T
    torch.testing.assert_close(gradient, alpha, rtol=1e-7, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacfwd(pull))(points)
    divergence, curl = jacobian[:, 0, 0] + jacobian[:, 1, 1], jacobian[:, 1, 0] - jacobian[:, 0, 1]
    size = jacobian.abs().amax((1, 2))
    assert (divergence.abs() < 1e-8 * size + 1e-12).all()  # no mass there: kappa = div / 2 = 0
    assert (curl.abs() < 1e-8 * size + 1e-12).all()
    assert (component.convergence(x, y) == 0).all()
    # Gauss: the flow through a circle around everything is 2 pi theta_E^2.
    angle = torch.linspace(0, 2 * torch.pi, 2001, dtype=torch.float64)[:-1]
    c, s = angle.cos(), angle.sin()
    flow_x, flow_y = component.reduced_deflection_angle(3 * c, 3 * s)
    assert float(((flow_x * c + flow_y * s) * 3).mean()) == pytest.approx(theta_squared, rel=1e-9)


def test_the_potential_of_a_line_is_the_mean_of_those_of_points() -> None:
    x, y = somewhere(50)
    p = tensors(LINE)
    w = (2 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 1) * p["half_length_v"]
    angle = torch.deg2rad(p["angle_v"])
    distance = torch.hypot(x[:, None] - p["x_v"] - w * angle.cos(), y[:, None] - p["y_v"] - w * angle.sin())
    expected = p["theta_v"] ** 2 * distance.log().mean(1)
    torch.testing.assert_close(mass_line_potential(*line(p), x, y), expected, rtol=0, atol=1e-5)


def test_mass_is_where_the_components_say() -> None:
    points, _ = components()["points"]
    assert torch.isinf(points.convergence(torch.tensor([-1.0, 0.0]), torch.tensor([0.1, 0.0]))).tolist() == [
        True,
        False,
    ]
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    lying = MassLine(cosmology, x0=0.0, y0=0.0, Rein=0.2, half_length=0.5, phi=0.0, z_l=0.5, z_s=1.0)
    kappa = lying.convergence(torch.tensor([0.4, 0.6, 0.0]), torch.tensor([0.0, 0.0, 0.1]))
    assert torch.isinf(kappa).tolist() == [True, False, False]


@pytest.mark.filterwarnings("ignore:Lens model")
def test_the_components_work_within_caustics() -> None:
    """A plane of them bends rays as the functions do, and magnifies as their Jacobian says."""
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    p = tensors(LENS | POINTS | LINE)
    parts = [part for part, _ in components().values()]
    parts.append(caustics.SIS(cosmology=cosmology, x0=0.0, y0=0.0, Rein=p["theta_E"], z_l=0.5, z_s=1.0))
    plane = caustics.SinglePlane(cosmology=cosmology, lenses=parts, z_l=0.5, z_s=1.0)
    x, y = somewhere(20)
    ray = torch.stack(plane.raytrace(x, y))
    alpha = torch.stack(deflection({name: v for name, v in p.items() if not name.startswith("gamma")}, x, y))
    torch.testing.assert_close(ray, torch.stack([x, y]) - alpha, rtol=1e-10, atol=1e-12)
    jacobian = torch.func.vmap(
        torch.func.jacfwd(lambda point: torch.stack(plane.raytrace(point[0], point[1]))),
    )(torch.stack([x, y], 1))
    torch.testing.assert_close(plane.magnification(x, y), 1 / torch.linalg.det(jacobian).abs(), rtol=1e-8, atol=0)


def test_light_can_be_differentiated_and_made_batches_of() -> None:
    p = tensors(ELLIPSE | POINTS | LINE | SOURCE)
    x, y = somewhere(40)
    slopes = torch.func.jacfwd(surface_brightness)(p, x, y)
    for name in ("theta_E", "q_l", "gamma", "half_length_v", "n_s"):
        up, down = ({**p, name: p[name] + h} for h in (1e-6, -1e-6))
        difference = (surface_brightness(up, x, y) - surface_brightness(down, x, y)) / 2e-6
        torch.testing.assert_close(slopes[name], difference, rtol=1e-4, atol=1e-6)
    batch = {name: torch.stack([values, values * 0.9]) for name, values in p.items()}
    both = torch.func.vmap(lambda q: surface_brightness(q, x, y))(batch)
    torch.testing.assert_close(both[0], surface_brightness(p, x, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        both[1], surface_brightness({n: v * 0.9 for n, v in p.items()}, x, y), rtol=1e-12, atol=0
    )
