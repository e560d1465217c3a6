"""Light through one lens: pure functions of its parameters, differentiable, made batches of by torch.func.vmap.

Deflections and light profiles are those of caustics (Stone et al. 2024, JOSS 9, 7081); angles run from x towards y. A
parameter that a lens lacks is absent from `p`, and so is the component that would need it:

    theta_E [arcsec]                            singular isothermal sphere in the middle
    q_l, PA_l [deg]                             makes it an ellipsoid of axis ratio q_l, major axis along PA_l
    gamma, gamma_angle [deg]                    external shear; images are stretched along gamma_angle
    x_p, y_p, theta_p [arcsec], each (K,)       point masses and their Einstein radii
    x_v, y_v, theta_v, half_length_v [arcsec], angle_v [deg]   a uniform line of mass, with the Einstein radius of its mass
    x_s, y_s, R_s [arcsec], q_s, PA_s [deg], n_s, I_s          Sersic profile of the source, on the source plane
    R_light [arcsec], q_light, PA_light [deg], n_light, I_light   Sersic profile of the lens galaxy, in the middle

R is the effective radius as the geometric mean of the half-axes, I the surface brightness there.

`PointMasses` and `MassLine` are the same masses as components of caustics, for its own simulators.
"""

from math import inf, pi

import torch
from caskade import Param, forward
from caustics import ThinLens, func
from torch import Tensor

Parameters = dict[str, Tensor]
SOFTENING = 1e-24  # arcsec^2: only keeps a point that falls on a point mass from being 0 / 0


def surface_brightness(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """Surface brightness at the points (x, y) [arcsec] of the image plane, in the units of I_s and I_light."""
    beta_x, beta_y = x, y
    # One by one, not their sum: the last bit decides whether a photon falls, and data sets are to stay what they were.
    for alpha_x, alpha_y in _deflections(p, x, y):
        beta_x, beta_y = beta_x - alpha_x, beta_y - alpha_y
    light = sersic(p, "s", p["x_s"], p["y_s"], beta_x, beta_y)
    if "I_light" in p:
        light = light + sersic(p, "light", 0.0, 0.0, x, y)
    return light


def deflection(p: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced deflection [arcsec] at the points (x, y) [arcsec] of the image plane."""
    (alpha_x, alpha_y), *others = _deflections(p, x, y)
    for more_x, more_y in others:
        alpha_x, alpha_y = alpha_x + more_x, alpha_y + more_y
    return alpha_x, alpha_y


def _deflections(p: Parameters, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    # The softening only keeps a point that falls on the centre from being 0 / 0.
    if "q_l" in p:
        alpha = func.reduced_deflection_angle_sie(
            0.0, 0.0, p["q_l"], p["PA_l"] * (pi / 180), p["theta_E"], x, y, s=1e-12
        )
    else:
        alpha = func.reduced_deflection_angle_sis(0.0, 0.0, p["theta_E"], x, y, s=1e-12)
    parts = [alpha]
    if "gamma" in p:
        angle = p["gamma_angle"] * (pi / 90)
        gamma_1, gamma_2 = p["gamma"] * torch.cos(angle), p["gamma"] * torch.sin(angle)
        parts.append(func.reduced_deflection_angle_external_shear(0.0, 0.0, gamma_1, gamma_2, x, y))
    if "theta_p" in p:
        parts.append(point_masses(p["x_p"], p["y_p"], p["theta_p"], x, y))
    if "theta_v" in p:
        parts.append(mass_line(p["x_v"], p["y_v"], p["theta_v"], p["half_length_v"], p["angle_v"] * (pi / 180), x, y))
    return parts


def point_masses(x0: Tensor, y0: Tensor, theta_E: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced deflection [arcsec] of point masses at (x0, y0) with Einstein radii theta_E, each (K,), added up.

    One of Einstein radius 0 adds exactly nothing.
    """
    alpha_x = alpha_y = torch.zeros_like(x + y)
    for k in range(len(x0)):  # one by one, so that an image stays in the cache of a core
        dx, dy = x - x0[k], y - y0[k]
        pull = theta_E[k] * theta_E[k] / (dx * dx + dy * dy + SOFTENING)
        alpha_x, alpha_y = torch.addcmul(alpha_x, dx, pull), torch.addcmul(alpha_y, dy, pull)
    return alpha_x, alpha_y


def mass_line(
    x0: Tensor, y0: Tensor, theta_E: Tensor, half_length: Tensor, angle: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Reduced deflection [arcsec] of a line of uniform mass per length, with the Einstein radius of its whole mass.

    angle [rad]. The integral of a point's theta_E^2 / conj(z - w) over w in [-L, L], z along the line:
    conj(alpha) = theta_E^2 / (2 L) [log(z + L) - log(z - L)] with L = half_length.
    """
    along, across, c, s = _line_frame(x0, y0, angle, x, y)
    right, left = along + half_length, along - half_length
    tiny = torch.finfo(along.dtype).tiny
    scale = theta_E * theta_E / (2 * half_length)
    # Real and imaginary part of the difference of logarithms; the angle between the two ends as seen from the point.
    a = scale * 0.5 * torch.log((right * right + across * across + tiny) / (left * left + across * across + tiny))
    b = scale * torch.atan2(2 * half_length * across, right * left + across * across)
    return c * a - s * b, s * a + c * b


def mass_line_potential(
    x0: Tensor, y0: Tensor, theta_E: Tensor, half_length: Tensor, angle: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """Lensing potential [arcsec^2] of `mass_line`: a point's theta_E^2 log|z - w|, integrated as there.

    psi = theta_E^2 / (2 L) Re[(z + L) log(z + L) - (z - L) log(z - L) - 2 L]
    """
    along, across, _, _ = _line_frame(x0, y0, angle, x, y)
    right, left = along + half_length, along - half_length
    tiny = torch.finfo(along.dtype).tiny
    ends = [
        end * 0.5 * torch.log(end * end + across * across + tiny) - across * torch.atan2(across, end)
        for end in (right, left)
    ]
    return theta_E * theta_E / (2 * half_length) * (ends[0] - ends[1] - 2 * half_length)


class PointMasses(ThinLens):
    """K point masses as one component of caustics: x0, y0, Rein [arcsec], each (K,)."""

    def __init__(self, cosmology, x0=None, y0=None, Rein=None, z_l=None, z_s=None, name=None):
        super().__init__(cosmology, z_l, name=name, z_s=z_s)
        self.x0 = Param("x0", x0, shape=(None,), units="arcsec")
        self.y0 = Param("y0", y0, shape=(None,), units="arcsec")
        self.Rein = Param("Rein", Rein, shape=(None,), units="arcsec", valid=(0, None))

    @forward
    def reduced_deflection_angle(self, x, y, x0, y0, Rein):
        """Reduced deflection [arcsec] at (x, y) [arcsec]."""
        return point_masses(x0, y0, Rein, x, y)

    @forward
    def potential(self, x, y, x0, y0, Rein):
        """Lensing potential [arcsec^2] at (x, y) [arcsec]."""
        return sum(func.potential_point(x0[k], y0[k], Rein[k], x, y) for k in range(len(x0)))

    @forward
    def convergence(self, x, y, x0, y0):
        """Infinite at a mass and 0 elsewhere, as that of caustics' Point."""
        return sum(func.convergence_point(x0[k], y0[k], x, y) for k in range(len(x0)))


class MassLine(ThinLens):
    """A line of uniform mass per length as a component of caustics, all parameters scalars.

    x0, y0, half_length [arcsec], phi [rad] from x towards y, Rein [arcsec] of the mass of the whole line
    """

    def __init__(
        self, cosmology, x0=None, y0=None, Rein=None, half_length=None, phi=None, z_l=None, z_s=None, name=None
    ):
        super().__init__(cosmology, z_l, name=name, z_s=z_s)
        self.x0 = Param("x0", x0, shape=(), units="arcsec")
        self.y0 = Param("y0", y0, shape=(), units="arcsec")
        self.Rein = Param("Rein", Rein, shape=(), units="arcsec", valid=(0, None))
        self.half_length = Param("half_length", half_length, shape=(), units="arcsec", valid=(0, None))
        self.phi = Param("phi", phi, shape=(), units="radians", valid=(0, pi), cyclic=True)

    @forward
    def reduced_deflection_angle(self, x, y, x0, y0, Rein, half_length, phi):
        """Reduced deflection [arcsec] at (x, y) [arcsec]."""
        return mass_line(x0, y0, Rein, half_length, phi, x, y)

    @forward
    def potential(self, x, y, x0, y0, Rein, half_length, phi):
        """Lensing potential [arcsec^2] at (x, y) [arcsec]."""
        return mass_line_potential(x0, y0, Rein, half_length, phi, x, y)

    @forward
    def convergence(self, x, y, x0, y0, half_length, phi):
        """Infinite on the line and 0 elsewhere."""
        along, across, _, _ = _line_frame(x0, y0, phi, x, y)
        return torch.where((across == 0) & (along.abs() <= half_length), inf, 0.0)


def _line_frame(x0: Tensor, y0: Tensor, angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy = x - x0, y - y0
    c, s = torch.cos(angle), torch.sin(angle)
    return c * dx + s * dy, c * dy - s * dx, c, s


def sersic(p: Parameters, of: str, x0: Tensor | float, y0: Tensor | float, x: Tensor, y: Tensor) -> Tensor:
    """Surface brightness of the profile whose parameters end in `of`, centred at (x0, y0) [arcsec]."""
    q, n = p[f"q_{of}"], p[f"n_{of}"]
    major = p[f"R_{of}"] / torch.sqrt(q)  # the radius that caustics asks for
    return func.brightness_sersic(
        x0, y0, q, p[f"PA_{of}"] * (pi / 180), n, major, p[f"I_{of}"], x, y, func.k_lenstronomy(n)
    )
