"""Fit a lens model to images: which lens is it, and is it one at the noise level?

    fitted = LensFitter(Preset.load("deeplense")).fit(images)
    fitted.chi2            (N,) chi^2 per pixel: 1 +- 0.01 if the image is a lens of this family plus its photon noise

The model is the simulator's own (shared/simulate/lens.py, blurred and pixelised likewise), free in what the preset draws
and fixed in what it fixes. Brightnesses and the level of the sky are linear and solved for exactly; the rest starts at the
best of some thousand lenses of the preset, then Levenberg-Marquardt for all images at once, coarse to fine.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from math import ceil, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, vmap
from torch.nn.functional import avg_pool2d, conv2d
from tqdm import tqdm

from shared.errors import UserError
from shared.metrics import Images, batches
from shared.precision import one_thread
from shared.simulate.lens import Parameters, sersic, surface_brightness
from shared.simulate.preset import Preset, draw_parameters

# Of torch about torch, at its first derivative in forward mode.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

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

    def consistent(self, limit: float = 1.2, lit: bool = False) -> np.ndarray:
        """(N,) bool: there is a lens (10 sigma) and nothing else but its noise, chi^2 per pixel between 1/limit and limit.

        lit     of the pixels that it lights: a stricter question, for most of an image is sky, which is easily right
        """
        chi2 = self.chi2_lit if lit else self.chi2
        return (self.snr > 10) & (chi2 < limit) & (chi2 > 1 / limit)

    @classmethod
    def joined(cls, parts: "Sequence[LensFits]") -> "LensFits":
        """Fits of several batches as one."""

        def column(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], dict):
                return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
            return np.concatenate(values)

        return cls(**{field.name: column(field.name) for field in fields(cls)})

    def columns(self) -> dict[str, np.ndarray]:
        """All but `clean`, one array (N, ...) each, for a file: {"chi2": ..., "parameters theta_E": ...}."""
        columns: dict[str, np.ndarray] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                columns |= {f"{field.name} {key}": array for key, array in value.items()}
            elif field.name != "clean":
                columns[field.name] = value
        return columns

    @classmethod
    def of_columns(cls, columns: Mapping[str, np.ndarray]) -> "LensFits":
        """What `columns` gave; `clean` is (N, 0)."""
        parts: dict[str, Any] = {"clean": np.empty((len(columns["chi2"]), 0)), "parameters": {}, "errors": {}}
        for name, array in columns.items():
            field, _, key = name.partition(" ")
            if key:
                parts[field][key] = array
            else:
                parts[field] = array
        return cls(**parts)


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
    NAMES = (*SCALES, *POSITIONS, *chain(*SPINS))

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

    preset   what may be: parameters that it draws are free, those that it fixes are fixed
    kind     of a preset with classes, the one; default: its first. Point masses and lines of mass are left out
    free     names of parameters to free beside those
    noise    (a, b) of the images: variance = a + b (model - background), in their units; None: that of the preset's
             instrument, and where it scales each image, with the gain of each (see `_law`)
    margin   pixels at the border that are left out

    Raises UserError if the preset has no noise that is affine in the signal and none is given.
    """

    def __init__(
        self,
        preset: Preset,
        *,
        kind: str | None = None,
        free: Sequence[str] = (),
        noise: tuple[float, float] | None = None,
        margin: int = 0,
        device: str = "cpu",
    ) -> None:
        if kind or preset.classes:
            preset = preset.select([kind or next(iter(preset.classes))])
        if not 0 <= margin < preset.pixels // 2:
            raise UserError(f"a margin of {margin} leaves nothing of images of {preset.pixels} pixels")
        self.preset, self.noise, self.margin, self.device = preset, noise, margin, torch.device(device)
        drawn = draw_parameters(preset, 0, range(LIBRARY))
        self.instrument = None if noise else _instrument(preset, drawn)
        wanted = {name for name in Coordinates.NAMES if name in drawn and np.ptp(drawn[name]) > 0} | set(free)
        if lacking := sorted(name for name in wanted if name in Coordinates.NAMES and name not in drawn):
            raise UserError(f"preset {preset.name} has no {', '.join(lacking)} that could be free")
        # An angle is free with what it is the angle of.
        wanted |= {size for size, angle in Coordinates.SPINS if angle in wanted}
        self.coordinates = Coordinates(
            wanted, {name: float(drawn[name][0]) for name in Coordinates.NAMES if name in drawn}
        )
        tensors = {name: torch.from_numpy(drawn[name]).float().to(self.device) for name in self.coordinates.names}
        self.library = self.coordinates.vector(tensors)
        self.lit = "I_light" in drawn
        pixels, fine = preset.pixels, preset.supersampling
        # Pixels pooled for the first comparison and for the first descent.
        self.coarse = max(f for f in range(1, pixels + 1) if pixels % f == 0 and pixels // f >= min(30, pixels))
        self.middle = 2 if pixels % 2 == 0 else 1
        self.batch = 32 if self.device.type == "cpu" else 512
        self.points_at_once = 60_000 if self.device.type == "cpu" else 20_000_000  # the cache of a core
        self.grids = {
            (factor, points): Grid(pixels // factor, preset.pixel_scale * factor, points, preset.psf_sigma, self.device)
            for factor, points in {(self.coarse, 2), (self.middle, 1), (1, 1), (1, fine)}
        }
        light = vmap(lambda u: self._light(u, self.grids[self.coarse, 2]), chunk_size=16)
        templates = light(self.library)  # (LIBRARY, K, n)
        self.templates = self._design(templates).transpose(0, 1).contiguous()  # (K + 1, LIBRARY, n)

    def _light(self, u: Tensor, grid: Grid) -> Tensor:
        """u (P,) -> (K, pixels * pixels), the images of unit brightness whose amplitudes are free: source, lens light."""
        p, one = self.coordinates.physical(u), torch.ones((), device=u.device)
        images = [grid.image(surface_brightness(p | {"I_s": one}, grid.x, grid.y))]
        if self.lit:
            images.append(grid.image(sersic(p | {"I_light": one}, "light", 0.0, 0.0, grid.x, grid.y)))
        return torch.stack(images)

    @torch.no_grad()
    def fit(self, images: Images, progress: bool = False) -> LensFits:
        """Fit images (N, 1, H, W) on the preset's grid, in any linear units; see LensFits. Of a preset
        that does not scale its images, and where `noise` is given, in those units.

        Some 0.2 s an image on one CPU core at 150x150. Raises UserError for images of another size, NaN among them.
        """
        side = self.preset.pixels
        total = len(images) if isinstance(images, Tensor | np.ndarray) else None
        parts = []
        bar = tqdm(total=total, unit="image", desc="fitting lenses", disable=None if progress else True)
        with bar, one_thread():
            for batch in batches(images, self.batch):
                if tuple(batch.shape[1:]) != (1, side, side):
                    shape = "x".join(map(str, batch.shape[1:]))
                    raise UserError(f"preset {self.preset.name} makes images of 1x{side}x{side}, these are {shape}")
                parts.append(self._fit(batch.to(self.device)))
                bar.update(len(batch))
        return LensFits.joined(parts)

    def _fit(self, images: Tensor) -> LensFits:
        n, side, names = len(images), self.preset.pixels, self.coordinates.names
        # In units of each image's brightest pixel: whatever the user's unit is, float32 holds its square.
        brightest = images.flatten(1).abs().amax(1, keepdim=True)
        unit = torch.where(brightest > 0, brightest, 1.0)
        images = images / unit[..., None, None]
        scales = torch.cat([_sky_noise(images), unit], 1)
        starts = self._starts(images, scales[:, :1]).flatten(0, 1)
        wide, wide_scales = images.repeat_interleave(STARTS, 0), scales.repeat_interleave(STARTS, 0)
        found = self._descend(starts, wide, wide_scales, self.middle, 1, 10)
        best = found.chi2.view(n, STARTS).argmin(1)
        u = found.u.view(n, STARTS, -1)[torch.arange(n, device=self.device), best]
        # Coarse sampling of the points first: the same basin at a fraction of the cost.
        u = self._descend(u, images, scales, 1, 1, 4).u
        found = self._descend(u, images, scales, 1, self.preset.supersampling, 10)
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
            amplitude=(found.c[:, 0] * unit[:, 0]).cpu().numpy(),
            background=(found.c[:, -1] * unit[:, 0]).cpu().numpy(),
            law=(torch.cat(self._law(found.c, scales), 1).double() * torch.cat([unit * unit.double(), unit], 1))
            .cpu()
            .numpy(),
            clean=(found.model * unit).view(n, 1, side, side).cpu().numpy(),
            converged=found.converged.cpu().numpy(),
        )

    def _pooled(self, images: Tensor, factor: int) -> Tensor:
        return avg_pool2d(images, factor)

    def _law(self, c: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """c (N, K + 1), scales (N, 2) -> a, b of the noise, each (N, 1), where an image is 1 at its brightest pixel.

        scales   standard deviation of the sky in that unit, and that unit in the user's own

        An image that was scaled to its own range has a gain of its own: that of its source's amplitude where the preset
        fixes I_s, otherwise that which makes the noise of the sky what is measured.
        """
        sigma, unit = scales[:, :1], scales[:, 1:]
        a, b, per_I_s = self.instrument or (*(self.noise or (0.0, 0.0)), 0.0)
        if self.instrument is None:
            return a / unit / unit, b / unit
        if self.preset.scaling == "none":
            gain = 1 / unit
        elif per_I_s:
            gain = c[:, :1].clamp_min(1e-12) / per_I_s
        else:
            gain = sigma / a**0.5
        return gain * gain * a, gain * b

    def _variance(self, model: Tensor, c: Tensor, scales: Tensor) -> Tensor:
        """Of a pixel of full size. model (N, n), c (N, K + 1), scales (N, 2) -> (N, n)."""
        a, b = self._law(c, scales)
        return a + b * (model - c[:, -1:]).clamp_min(0)

    def _starts(self, images: Tensor, sigma: Tensor) -> Tensor:
        """The lenses of the library that are nearest to the images, (N, STARTS, P)."""
        data = self._pooled(images, self.coarse).flatten(1)
        above = (data - data.median(1, keepdim=True).values).clamp_min(0)  # most pixels are sky
        # Photon noise grows with the signal; with one weight for all, the brightest pixels alone would choose.
        w = 1 / (sigma.square() + 0.05 * sigma * above)
        # Weighted least squares of the amplitudes and the sky, for every pair of image and template.
        t = self.templates
        right = torch.stack([(w * data) @ part.T for part in t], -1).double()
        normal = torch.stack([torch.stack([w @ (i * j).T for j in t], -1) for i in t], -1).double()
        scale = normal.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()
        normal = normal / (scale[..., None] * scale[..., None, :]) + 1e-6 * torch.eye(len(t), device=w.device)
        solution = torch.linalg.solve(normal, (right / scale)[..., None])[..., 0]
        explained = (solution * right / scale).sum(-1)
        explained = torch.where(solution[..., 0] > 0, explained, -torch.inf)
        return self.library[explained.topk(STARTS, dim=1).indices]

    def _descend(self, u: Tensor, images: Tensor, scales: Tensor, factor: int, points: int, steps: int) -> "_Descent":
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
            c = _solve_linear(design, data, keep / self._variance(_combine(c, design), c, scales))
        hessian = torch.eye(u.shape[1], device=u.device, dtype=torch.float64).repeat(len(u), 1, 1)
        damping = torch.full((len(u), 1), 1e-3, device=u.device, dtype=torch.float64)
        active = torch.arange(len(u), device=u.device)
        for _ in range(steps):
            d, y, a = design[active], data[active], c[active]
            model = _combine(a, d)
            w = keep / self._variance(model, a, scales[active])
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
        w = keep / self._variance(model, c, scales)
        squares = w * (data - model).square()
        chi2 = squares.sum(1)
        lit = (model - c[:, -1:] > 5 * self._law(c, scales)[0].sqrt()) & (keep > 0)
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


def _instrument(preset: Preset, drawn: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """a, b of the noise in the unit of its detector, variance = a + b signal; and that unit per I_s, 0 if I_s varies."""
    if "exposure" not in drawn or np.ptp(drawn["exposure"]) > 0 or preset.noise not in ("poisson", "ccd"):
        raise UserError(
            f"the noise of preset {preset.name} is not the same affine function of the signal in every image: "
            "say what it is (--noise A,B)"
        )
    exposure, I_s = float(drawn["exposure"][0]), drawn["I_s"]
    fixed = float(I_s[0]) if np.ptp(I_s) == 0 else 0.0
    if preset.noise == "poisson":  # counts
        return preset.number("sky") * exposure, 1.0, exposure * fixed
    n = preset.number("exposures")  # e-/s
    sky = 10 ** (-0.4 * (preset.number("sky_brightness") - preset.number("zero_point"))) * preset.pixel_scale**2
    read = preset.number("read_noise") ** 2 + preset.number("gain") ** 2 / 12  # a step of the gain, rounded
    return sky / (exposure * n) + read / (exposure**2 * n), 1 / (exposure * n), fixed


def _sky_noise(images: Tensor) -> Tensor:
    """(N, 1, H, W) -> (N, 1), the standard deviation of the pixel noise in the darker half of each image.

    From second differences in both directions, which cancel the light, and their median, which a star does not move.
    """
    second = torch.tensor([1.0, -2.0, 1.0], device=images.device)
    rough = conv2d(images, (second[:, None] * second / 6)[None, None]).flatten(1).abs()
    smooth = avg_pool2d(images, 3, stride=1).flatten(1)
    dark = smooth <= smooth.median(1, keepdim=True).values
    sigma = torch.where(dark, rough, torch.nan).nanmedian(1, keepdim=True).values * 1.4826
    return sigma.clamp_min(1e-10 * (1 + images.flatten(1).abs().amax(1, keepdim=True)))


def _combine(c: Tensor, design: Tensor) -> Tensor:
    return (c[:, None] @ design)[:, 0]


def _solve_linear(design: Tensor, data: Tensor, w: Tensor) -> Tensor:
    """Weighted least squares of data (N, n) by design (N, K, n) -> (N, K)."""
    wd = design * w[:, None]
    normal, right = (wd @ design.mT).double(), (wd @ data[:, :, None]).double()
    return torch.linalg.solve(normal, right)[..., 0].float()
