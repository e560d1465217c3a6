"""A network made into a denoiser, D(x_t, t, cond) -> estimate of x_0, and the loss that trains it."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stage2_diffusion.schedule import NoiseSchedule

LEAST = 0.05  # share of noise


def target(prediction: str, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked for, given x_t = alpha x_0 + sigma eps; the shape of x_0.

    eps (Ho et al. 2020) | x0 | v = alpha eps - sigma x_0 (Salimans & Ho 2022) | velocity = dx_t/dt of the unshifted
    flow, eps - x_0 (Lipman et al. 2023).
    """
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x_0
        case "v":
            return alpha * eps - sigma * x_0
        case "velocity":
            return eps - x_0
    raise ValueError(f"unknown prediction {prediction!r}; one of eps, x0, v, velocity")


def to_x0(prediction: str, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x_0 that an output of the network stands for: `target` inverted. velocity holds for alpha + sigma = 1."""
    match prediction:
        case "eps":
            return (x_t - sigma * out) / alpha
        case "x0":
            return out
        case "v":
            return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)
        case "velocity":
            return x_t - sigma * out
    raise ValueError(f"unknown prediction {prediction!r}; one of eps, x0, v, velocity")


def slope(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """By how much `to_x0` moves as the output of the network does, d x_0 / d out but for its sign."""
    match prediction:
        case "eps":
            return sigma / alpha
        case "x0":
            return torch.ones_like(sigma)
        case "v":
            return sigma / (alpha**2 + sigma**2)
        case "velocity":
            return sigma
    raise ValueError(f"unknown prediction {prediction!r}; one of eps, x0, v, velocity")


def min_snr(prediction: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of a squared error in the prediction's own space, the shape of alpha (Hang et al. 2023, Eq. 8).

    In x_0 it is min(SNR, gamma) with SNR = (alpha / sigma)². Elsewhere an error counts by what it does to x_0: so eps has
    min(SNR, gamma) / SNR, and v, where alpha² + sigma² = 1, min(SNR, gamma) / (SNR + 1).
    """
    return (alpha / sigma).square().clamp(max=gamma) * slope(prediction, alpha, sigma) ** 2


def of_velocity(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The weight of a squared error in the prediction's own space with which it counts as one of the flow's velocity, the
    shape of alpha.

    In x_0 it is 1 / c², c = sigma / (alpha + sigma), and below c = LEAST no more than there: a network that says x_0 itself
    errs as much without noise (Li & He 2025, arXiv 2511.13720, who predict x_0 with it).
    """
    c = (sigma / (alpha + sigma)).clamp(min=LEAST)
    return (slope(prediction, alpha, sigma) / c) ** 2


def similarity(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of x_0 (N, c, h, w) and estimates of it -> (N,), 1 where they are equal.

    Its constants are for a range, which is that of each x_0, from its darkest to its brightest value. Sides of 6 or more.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds that no sampling needs

    low, high = x_0.flatten(1).aminmax(dim=1)
    low, span = (v[:, None, None, None] for v in (low, (high - low).clamp_min(1e-6)))
    with torch.autocast(
        x_0.device.type, enabled=False
    ):  # bf16 has two digits, and variances are differences of squares
        pair = (estimate - low) / span, (x_0 - low) / span
        return cast(Tensor, structural_similarity_index_measure(*pair, data_range=1.0, reduction="none"))


class Denoiser(nn.Module):
    """backbone(x_t, t, cond) made into D(x_t, t, cond) -> x_0.

    backbone           (N, c, h, w), (N,), (N, cond_dim) or None -> (N, c, h, w). A conditional one has an attribute
                       `cond_dim`, the width of what it receives: the condition, and a flag for each group of it that says
                       that it is there
    prediction         eps | x0 | v | velocity (flow only); see `target`
    time_distribution  of training: uniform, or logit_normal with the given mean and deviation (Esser et al. 2024,
                       §3.1); over 0 ... schedule.t_max, before the schedule's shift. On the flow schedule logit_normal
                       is EDM's log-normal sigma / alpha, of the same mean and deviation (Karras et al. 2022, Table 1)
    weighting          of the loss: uniform, min_snr with gamma, or velocity; see `min_snr` and `of_velocity`
    ssim               weight in the loss of 1 - `similarity` of the estimate of x_0, at all times alike; 0: none
    groups             widths of the parts of a condition, side by side; a part that holds NaN is not known. None: one part
    always             how many of the first parts no sample loses
    cond_dropout       share of samples that lose all others in `loss`, in training mode
    cond_subsets       share of the rest that keep each of them with a chance that is drawn for the sample
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        prediction: str,
        time_distribution: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        cond_dropout: float = 0.1,
        weighting: str = "uniform",
        gamma: float = 5.0,
        ssim: float = 0.0,
        groups: Sequence[int] | None = None,
        always: int = 0,
        cond_subsets: float = 0.0,
    ):
        super().__init__()
        if prediction not in ("eps", "x0", "v", "velocity"):
            raise ValueError(f"unknown prediction {prediction!r}; one of eps, x0, v, velocity")
        if time_distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"unknown time distribution {time_distribution!r}; one of uniform, logit_normal")
        if weighting not in ("uniform", "min_snr", "velocity"):
            raise ValueError(f"unknown weighting {weighting!r}; one of uniform, min_snr, velocity")
        if prediction == "velocity" and schedule.name != "flow":
            raise ValueError(f"prediction velocity needs schedule flow, got {schedule.name}; eps, x0 and v go with any")
        alpha, _ = schedule(torch.tensor([schedule.t_max]))
        if prediction == "eps" and alpha.item() == 0:
            raise ValueError(
                f"prediction eps cannot start from the pure noise of schedule {schedule.name}: "
                "build it with zero_terminal=False, or predict v, x0 or velocity"
            )
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction
        self.time_distribution, self.time_mean, self.time_std = time_distribution, time_mean, time_std
        self.cond_dropout, self.cond_subsets, self.always = cond_dropout, cond_subsets, always
        self.weighting, self.gamma, self.ssim = weighting, gamma, ssim
        if groups is None:
            groups = [width for width in [getattr(backbone, "cond_dim", 0) - 1] if width > 0]
        self.groups, self.cond_dim = groups, sum(groups)
        self.group_of: Tensor  # of each number of a condition
        places = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups, dtype=torch.long))
        self.register_buffer("group_of", places, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Estimate of x_0, float32, the shape of x_t (N, c, h, w), at times t (N,). cond (N, d), NaN for any; None for all NaN."""
        alpha, sigma = self.schedule(t)
        out = self.backbone(x_t, t, self._flagged(cond, x_t)).float()
        return to_x0(self.prediction, out, x_t.float(), alpha, sigma)

    def loss(
        self,
        x_0: Tensor,
        cond: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """Weighted mean squared error in the prediction's own space, and `ssim`: (N,) for x_0 (N, c, h, w), cond (N, d) or None.

        generator   of times, noise and dropped conditions; None: torch's global one
        share       (k, n): x_0 is the k-th of n equal parts of a batch, for all of which they are drawn: in n processes
                    with generators alike they are those that one process would draw
        """
        x_0 = x_0.float()
        part, parts = share
        batch = torch.cat([x_0] * parts)
        t = self._draw_times(len(batch), x_0.device, generator).chunk(parts)[part]
        eps = torch.empty_like(batch).normal_(generator=generator).chunk(parts)[part]
        alpha, sigma = self.schedule(t)
        if cond is not None and self.training:
            draw = torch.rand(len(batch), len(self.groups) - self.always + 3, device=x_0.device, generator=generator)
            cond = self.dropped(cond, draw.chunk(parts)[part])
        x_t = alpha * x_0 + sigma * eps
        out = self.backbone(x_t, t, self._flagged(cond, x_0)).float()
        error = (out - target(self.prediction, x_0, eps, alpha, sigma)).square().flatten(1).mean(1)
        if self.weighting == "min_snr":
            error = error * min_snr(self.prediction, alpha, sigma, self.gamma).flatten()
        elif self.weighting == "velocity":
            error = error * of_velocity(self.prediction, alpha, sigma).flatten()
        if self.ssim > 0:
            error = error + self.ssim * (1 - similarity(to_x0(self.prediction, out, x_t, alpha, sigma), x_0))
        return error

    def _draw_times(self, n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """(N,): one from each n-th of the distribution, in random order, which quiets the mean loss of a batch."""
        u = torch.randperm(n, device=device, generator=generator) + torch.rand(n, device=device, generator=generator)
        u = u / n
        if self.time_distribution == "logit_normal":
            u = torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u))
        return self.schedule.t_max * u

    def dropped(self, cond: Tensor, draw: Tensor | None = None) -> Tensor:
        """cond (N, d) as a step of training tells it: some samples lose all of it, others a random part.

        draw   (N, 3 + parts that can be lost), uniform in 0 ... 1; None: from torch's global generator
        """
        if draw is None:
            draw = torch.rand(len(cond), len(self.groups) - self.always + 3, device=cond.device)
        keep = (draw[:, 3:] < draw[:, 2:3]) | (draw[:, 1:2] >= self.cond_subsets)
        keep &= draw[:, :1] >= self.cond_dropout
        keep = torch.cat([keep.new_ones(len(cond), self.always), keep], 1)
        return cond.masked_fill(~keep[:, self.group_of], torch.nan)

    def _flagged(self, cond: Tensor | None, like: Tensor) -> Tensor | None:
        """(N, d + groups): the condition, and a one for each part that is known; zeros where it is not."""
        if cond is None:
            return like.new_zeros(len(like), self.cond_dim + len(self.groups)) if self.cond_dim else None
        if cond.shape != (len(like), self.cond_dim):
            raise ValueError(f"a condition here is ({len(like)}, {self.cond_dim}), got {tuple(cond.shape)}")
        known = torch.stack([part.isfinite().all(1) for part in cond.split(list(self.groups), 1)], 1)
        return torch.cat([cond.float().where(known[:, self.group_of], 0.0), known.float()], 1)
