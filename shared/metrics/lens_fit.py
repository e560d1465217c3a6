"""Fit a lens model to images: which lens is it, and is it one at the noise level?

    fitted = LensFitter(Preset.load("deeplense")).fit(images)
    fitted.chi2            (N,) chi^2 per pixel: 1 +- 0.01 if the image is a lens of this family plus its photon noise

The model is the simulator's own (shared/simulate/lens.py, blurred and pixelised likewise), free in what the preset draws
and fixed in what it fixes. Brightnesses and the level of the sky are linear and solved for exactly; the rest starts at the
best of some thousand lenses of the preset, then Levenberg-Marquardt for all images at once, coarse to fine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import ceil, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, vmap
from tqdm import tqdm

from shared.errors import UserError
from shared.metrics import Images, batches
from shared.simulate.lens import Parameters, surface_brightness
from shared.simulate.preset import Preset, draw_parameters

LIBRARY = 8192  # lenses of the preset that an image is compared with to find where to start
STARTS = 3


@dataclass(frozen=True)
class LensFits:
    """What was found for N images.

    chi2        (N,) chi^2 per pixel that was fitted, by the noise of the model itself
    chi2_lit    (N,) the same over the pixels that the lens lights by 5 sigma of the sky: blind to the sky, where most are
    snr         (N,) significance of the lens, in standard deviations over an empty sky
    parameters  {name: (N,)}, the free ones, in the units of shared.simulate.preset.UNITS; axes' angles in [0, 180)
    errors      {name: (N,)}, one standard deviation each, from the curvature of chi^2
    amplitude   (N,) units of the images per unit of I_s; `background` (N,) level of the sky, units of the images
    law         (N, 2) a, b of the noise: variance = a + b (clean - background), see `variance`
    clean       (N, 1, H, W) the best model, without noise
    converged   (N,) whether the last step was below a tenth of the error
    """

    chi2: np.ndarray
    chi2_lit: np.ndarray
    snr: np.ndarray
    parameters: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    amplitude: np.ndarray
    background: np.ndarray
    law: np.ndarray
    clean: np.ndarray
    converged: np.ndarray

    def __len__(self) -> int:
        return len(self.chi2)

    def variance(self, i: int) -> np.ndarray:
        """(1, H, W) variance of the noise in image i."""
        a, b = self.law[i]
        return a + b * np.maximum(self.clean[i] - self.background[i], 0)

    def consistent(self, limit: float = 1.2) -> np.ndarray:
        """(N,) bool: there is a lens (10 sigma) and nothing else but its noise, chi^2 per pixel between 1/limit and limit."""
        return (self.snr > 10) & (self.chi2 < limit) & (self.chi2 > 1 / limit)

    @classmethod
    def joined(cls, parts: "Sequence[LensFits]") -> "LensFits":
        """Fits of several batches as one."""

        def column(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], dict):
                return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
            return np.concatenate(values)

        return cls(**{field.name: column(field.name) for field in fields(cls)})


class Grid:
    """An image plane at some resolution, as a linear operator: points -> pixels of that plane after the PSF.

    pixels  of a side, each of `scale` arcsec and sampled by points x points points; the PSF is the simulator's
    """

    def __init__(self, pixels: int, scale: float, points: int, psf_sigma: float, device: torch.device) -> None:
        sigma = psf_sigma / scale
        margin = ceil(4 * sigma)
        side = (pixels + 2 * margin) * points
        axis = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * (scale / points)
        kernel = torch.exp(-0.5 * (torch.arange(-margin, margin + 1, dtype=torch.float64) / sigma) ** 2)
        operator = torch.zeros(pixels, side, dtype=torch.float64)
        for offset, weight in enumerate(kernel / kernel.sum()):
            for point in range(points):
                operator[torch.arange(pixels), (torch.arange(pixels) + offset) * points + point] += weight / points
        self.pixels = pixels
        self.operator = operator.float().to(device)
        self.x, self.y = axis.float().to(device)[None, :], axis.flip(0).float().to(device)[:, None]

    def image(self, brightness: Tensor) -> Tensor:
        """(side, side) at the points -> (pixels * pixels,), flattened."""
        return (self.operator @ brightness @ self.operator.T).flatten()


class Coordinates:
    """The free parameters of a preset as a vector without bounds, and back.

    Scales become logarithms, axis ratios and shears with their angles the two components of a spin-2 quantity of modulus
    below 1, so that a round source or no shear is an ordinary point and no border.
    """

    SCALES = ("theta_E", "n_s", "R_s", "n_light", "R_light")
    SPINS = (("gamma", "gamma_angle"), ("q_l", "PA_l"), ("q_s", "PA_s"), ("q_light", "PA_light"))
    POSITIONS = ("x_s", "y_s")

    def __init__(self, free: Iterable[str], fixed: dict[str, float]) -> None:
        free = set(free)
        self.scales = [name for name in self.SCALES if name in free]
        self.spins = [pair for pair in self.SPINS if pair[0] in free]
        self.positions = [name for name in self.POSITIONS if name in free]
        taken = {*self.scales, *self.positions, *(name for pair in self.spins for name in pair)}
        if unknown := free - taken:
            raise UserError(f"a lens model cannot be free in {', '.join(sorted(unknown))}")
        self.names = [*self.scales, *self.positions, *(name for pair in self.spins for name in pair)]
        self.fixed = {name: value for name, value in fixed.items() if name not in taken}

    def __len__(self) -> int:
        return len(self.names)

    def physical(self, u: Tensor) -> Parameters:
        """u (P,) -> the parameters of one lens, the fixed ones among them."""
        p = {name: torch.as_tensor(value, dtype=u.dtype, device=u.device) for name, value in self.fixed.items()}
        parts = iter(u.unbind())
        p |= {name: next(parts).exp() for name in self.scales}
        p |= {name: next(parts) for name in self.positions}
        for size, angle in self.spins:
            first, second = next(parts), next(parts)
            modulus = torch.sqrt((first * first + second * second) / (1 + first * first + second * second) + 1e-12)
            p[size] = modulus if size == "gamma" else (1 - modulus) / (1 + modulus)
            p[angle] = torch.atan2(second, first) * (90 / pi)
        return p

    def vector(self, p: Parameters) -> Tensor:
        """{name: (N,)} -> (N, P), the inverse."""
        columns = [p[name].log() for name in self.scales] + [p[name] for name in self.positions]
        for size, angle in self.spins:
            modulus = p[size] if size == "gamma" else (1 - p[size]) / (1 + p[size])
            stretched = modulus / torch.sqrt(1 - modulus * modulus)
            columns += [stretched * torch.cos(p[angle] * (pi / 90)), stretched * torch.sin(p[angle] * (pi / 90))]
        return torch.stack(columns, 1)

    def reported(self, u: Tensor) -> Tensor:
        """u (P,) -> (P,) in the order of `names`."""
        p = self.physical(u)
        return torch.stack([p[name] for name in self.names])


class _Descent(NamedTuple):
    u: Tensor  # (N, P)
    chi2: Tensor  # (N,) per pixel
    chi2_lit: Tensor  # (N,) per pixel that is lit
    snr: Tensor  # (N,)
    c: Tensor  # (N, K + 1) amplitudes, then the level of the sky
    model: Tensor  # (N, n)
    hessian: Tensor  # (N, P, P) half the second derivative of chi^2
    converged: Tensor  # (N,)


class LensFitter:
    """Fits lenses of a preset to images on its pixel grid.

    preset  what may be: parameters that it draws are free, those that it fixes are fixed
    free    names of parameters to free beside those
    noise   (a, b) of the images: variance = a + b (model - background), in their units; None: photon noise of the
            preset's exposure and sky, with each image's gain from its own amplitude (needs a fixed I_s)
    margin  pixels at the border that are left out
    """

    def __init__(
        self,
        preset: Preset,
        *,
        free: Sequence[str] = (),
        noise: tuple[float, float] | None = None,
        margin: int = 0,
        device: str = "cpu",
    ) -> None:
        self.preset, self.noise, self.margin, self.device = preset, noise, margin, torch.device(device)
        drawn = draw_parameters(preset, 0, range(LIBRARY))
        known = {name for pair in Coordinates.SPINS for name in pair} | {*Coordinates.SCALES, *Coordinates.POSITIONS}
        drawn = {name: values for name, values in drawn.items() if name in known}
        varying = {name for name, values in drawn.items() if np.ptp(values) > 0}
        self.coordinates = Coordinates(
            varying | set(free), {name: float(values[0]) for name, values in drawn.items() if name not in varying}
        )
        tensors = {name: torch.from_numpy(values).float().to(self.device) for name, values in drawn.items()}
        self.library = self.coordinates.vector(tensors)
        coarse = max(f for f in range(1, preset.pixels + 1) if preset.pixels % f == 0 and preset.pixels // f >= 30)
        middle = 2 if preset.pixels % 2 == 0 else 1
        self.coarse, self.middle = coarse, middle
        self.batch = 32 if self.device.type == "cpu" else 512
        self.points_at_once = 60_000 if self.device.type == "cpu" else 20_000_000  # the cache of a core
        self.grids = {
            (factor, points): Grid(
                preset.pixels // factor, preset.pixel_scale * factor, points, preset.psf_sigma, self.device
            )
            for factor, points in {(coarse, 2), (middle, 1), (1, 1), (1, preset.supersampling)}
        }
        light = vmap(lambda u: self._light(u, self.grids[coarse, 2]), chunk_size=16)
        self.templates = light(self.library)  # (LIBRARY, K, n)

    def _light(self, u: Tensor, grid: Grid) -> Tensor:
        """u (P,) -> (K, pixels * pixels), the images of unit brightness whose amplitudes are free."""
        p = self.coordinates.physical(u) | {"I_s": torch.ones((), device=u.device)}
        return grid.image(surface_brightness(p, grid.x, grid.y))[None]

    @torch.no_grad()
    def fit(self, images: Images, progress: bool = False) -> LensFits:
        """Fit images (N, 1, H, W) on the preset's grid, in any linear units; see LensFits.

        Some 0.2 s an image on one CPU core at 150x150. Raises UserError for images of another size, NaN among them.
        """
        side = self.preset.pixels
        total = len(images) if isinstance(images, Tensor | np.ndarray) else None
        parts = []
        with tqdm(total=total, unit="image", desc="fitting lenses", disable=None if progress else True) as bar:
            for batch in batches(images, self.batch):
                if tuple(batch.shape[1:]) != (1, side, side):
                    shape = "x".join(map(str, batch.shape[1:]))
                    raise UserError(f"preset {self.preset.name} makes images of 1x{side}x{side}, these are {shape}")
                parts.append(self._fit(batch.to(self.device)))
                bar.update(len(batch))
        return LensFits.joined(parts)

    def _fit(self, images: Tensor) -> LensFits:
        n, side, names = len(images), self.preset.pixels, self.coordinates.names
        starts = self._starts(images).flatten(0, 1)
        found = self._descend(starts, images.repeat_interleave(STARTS, 0), self.middle, 1, 10)
        best = found.chi2.view(n, STARTS).argmin(1)
        u = found.u.view(n, STARTS, -1)[torch.arange(n, device=self.device), best]
        # Coarse sampling of the points first: the same basin at a fraction of the cost.
        u = self._descend(u, images, 1, 1, 4).u
        found = self._descend(u, images, 1, self.preset.supersampling, 10)
        values = vmap(self.coordinates.reported)(found.u).double()
        slope = vmap(jacfwd(self.coordinates.reported))(found.u).double()
        errors = (slope @ torch.linalg.pinv(found.hessian) @ slope.mT).diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        parameters = {name: values[:, k].cpu().numpy() for k, name in enumerate(names)}
        for _, angle in self.coordinates.spins:
            parameters[angle] = parameters[angle] % 180
        return LensFits(
            chi2=found.chi2.cpu().numpy(),
            chi2_lit=found.chi2_lit.cpu().numpy(),
            snr=found.snr.cpu().numpy(),
            parameters=parameters,
            errors={name: errors[:, k].cpu().numpy() for k, name in enumerate(names)},
            amplitude=found.c[:, 0].cpu().numpy(),
            background=found.c[:, -1].cpu().numpy(),
            law=torch.cat(self._law(found.c), 1).cpu().numpy(),
            clean=found.model.view(n, 1, side, side).cpu().numpy(),
            converged=found.converged.cpu().numpy(),
        )

    def _pooled(self, images: Tensor, factor: int) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, factor)

    def _law(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """c (N, K + 1) -> a, b of the noise, each (N, 1)."""
        if self.noise is not None:
            a, b = self.noise
            return torch.full_like(c[:, :1], a), torch.full_like(c[:, :1], b)
        gain = c[:, :1].clamp_min(1e-12) / self.preset.exposure
        return gain * gain * (self.preset.sky * self.preset.exposure), gain

    def _variance(self, model: Tensor, c: Tensor) -> Tensor:
        """Of a pixel of full size. model (N, n), c (N, K + 1) -> (N, n)."""
        a, b = self._law(c)
        return a + b * (model - c[:, -1:]).clamp_min(0)

    def _starts(self, images: Tensor) -> Tensor:
        """The lenses of the library that are nearest to the images, (N, STARTS, P)."""
        flat = images.flatten(1)
        middle = flat.median(1, keepdim=True).values  # most pixels are sky
        below = torch.where(flat < middle, middle - flat, torch.nan)
        sigma = 1.4826 * below.nanmedian(1, keepdim=True).values.nan_to_num(0).clamp_min(1e-10)
        data = self._pooled(images, self.coarse).flatten(1)
        # Photon noise grows with the signal; with one weight for all, the brightest pixels alone would choose.
        w = 1 / (sigma.square() + 0.05 * sigma * (data - middle).clamp_min(0))
        # Weighted least squares of amplitude and sky, in closed form for every pair of image and template.
        t = self.templates[:, 0]
        one, mean, square = w.sum(1, keepdim=True), w @ t.T, w @ (t * t).T
        target, total = (w * data).sum(1, keepdim=True), (w * data) @ t.T
        covariance, variance = one * total - mean * target, (one * square - mean * mean).clamp_min(1e-30)
        explained = torch.where(covariance > 0, covariance.square() / variance, 0.0)
        return self.library[explained.topk(STARTS, dim=1).indices]

    def _descend(self, u: Tensor, images: Tensor, factor: int, points: int, steps: int) -> "_Descent":
        """Levenberg-Marquardt from u (N, P) on images pooled by `factor`, until each moves by less than 0.1 sigma."""
        grid = self.grids[factor, points]
        data = self._pooled(images, factor).flatten(1)
        m = ceil(self.margin / factor)
        keep = torch.zeros(grid.pixels, grid.pixels, device=data.device)
        keep[m : grid.pixels - m, m : grid.pixels - m] = factor * factor  # a pooled pixel has so much less noise
        keep = keep.flatten()
        chunk = max(1, self.points_at_once // grid.x.numel() ** 2)
        light = vmap(lambda v: self._light(v, grid), chunk_size=chunk)
        slope = vmap(jacfwd(lambda v: self._light(v, grid)), chunk_size=chunk)

        design = self._design(light(u))
        c = _solve_linear(design, data, keep.expand_as(data))
        for _ in range(2):
            c = _solve_linear(design, data, keep / self._variance(_combine(c, design), c))
        hessian = torch.eye(u.shape[1], device=u.device, dtype=torch.float64).repeat(len(u), 1, 1)
        damping = torch.full((len(u), 1), 1e-3, device=u.device, dtype=torch.float64)
        active = torch.arange(len(u), device=u.device)
        for _ in range(steps):
            d, y, a = design[active], data[active], c[active]
            model = _combine(a, d)
            w = keep / self._variance(model, a)
            residual = y - model
            j = (slope(u[active]) * a[:, :-1, None, None]).sum(1).mT  # (N, P, n)
            # What the amplitudes can absorb is no slope (variable projection; Kaufman 1975).
            wd = d * w[:, None]
            j = j - torch.linalg.solve(wd @ d.mT, wd @ j.mT).mT @ d
            h = ((j * w[:, None]) @ j.mT).double()
            gradient = ((j * w[:, None]) @ residual[:, :, None]).double()
            ridge = h.diagonal(dim1=1, dim2=2).clamp_min(1e-12) * damping[active]
            step = torch.linalg.solve(h + torch.diag_embed(ridge), gradient)
            moved = u[active] + step[..., 0].float().clamp(-0.5, 0.5)
            trial_design = self._design(light(moved))
            trial_c = _solve_linear(trial_design, y, w)
            trial = (w * (y - _combine(trial_c, trial_design)).square()).sum(1)
            better = (trial < (w * residual * residual).sum(1)) & (trial_c[:, 0] > 0)
            taken = active[better]
            u[taken], design[taken], c[taken] = moved[better], trial_design[better], trial_c[better]
            hessian[active] = h
            damping[active] *= torch.where(better, 0.1, 10.0)[:, None]
            size = (step.mT @ h @ step)[:, 0, 0]  # of the step, in standard deviations squared
            active = active[(size > 1e-2) & (damping[active, 0] < 1e8)]
            if not len(active):
                break
        model = _combine(c, design)
        w = keep / self._variance(model, c)
        squares = w * (data - model).square()
        chi2 = squares.sum(1)
        lit = (model - c[:, -1:] > 5 * self._law(c)[0].sqrt()) & (keep > 0)
        chi2_lit = (squares * lit).sum(1) / lit.sum(1).clamp_min(1)
        sky = (w * data).sum(1, keepdim=True) / w.sum(1, keepdim=True)
        snr = ((w * (data - sky).square()).sum(1) - chi2).clamp_min(0).sqrt()
        converged = torch.ones(len(u), dtype=torch.bool, device=u.device)
        converged[active] = False
        return _Descent(u, chi2 / (keep > 0).sum(), chi2_lit, snr, c, model, hessian, converged)

    @staticmethod
    def _design(light: Tensor) -> Tensor:
        """(N, K, n) -> (N, K + 1, n): the level of the sky is one more image whose brightness is free."""
        return torch.cat([light, torch.ones_like(light[:, :1])], 1)


def _combine(c: Tensor, design: Tensor) -> Tensor:
    return (c[:, None] @ design)[:, 0]


def _solve_linear(design: Tensor, data: Tensor, w: Tensor) -> Tensor:
    """Weighted least squares of data (N, n) by design (N, K, n) -> (N, K)."""
    wd = design * w[:, None]
    normal, right = (wd @ design.mT).double(), (wd @ data[:, :, None]).double()
    return torch.linalg.solve(normal, right)[..., 0].float()
