"""What a reconstruction is trained on. Every function takes pixels in [0, 1] (the network's range) and gives a scalar.

Reconstructions are clean and images are not. A term either has its optimum at the clean image although its target is
noisy (l1, stretched, mse, chi, spectrum), or it compares the image with reconstructions that noise has been added to
(perceptual, adversarial, feature_matching). `ssim` does neither, see there.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from shared.data.normalise import PixelTransform
from shared.metrics.efficientnet import efficientnet_lite0
from stage1_vqvae.adversary import BETAS, Adversary, feature_distance
from stage1_vqvae.noise import NoiseLaw, NoiseLaws

KNEE = 0.02  # of full scale: about where a lens image goes over from background to arc


def stretched_l1(output: Tensor, target: Tensor) -> Tensor:
    """L1 after asinh(x / 0.02), which gives faint arcs the weight that bright ones have in plain L1."""
    scale = torch.asinh(torch.tensor(1 / KNEE))
    return F.l1_loss(torch.asinh(output / KNEE) / scale, torch.asinh(target / KNEE) / scale)


def chi(output: Tensor, target: Tensor, law: NoiseLaw | NoiseLaws, delta: float = 3.0, noisier: float = 1.0) -> Tensor:
    """Residuals in units of the noise: quadratic up to about `delta` standard deviations, linear beyond (pseudo-Huber).

    The pixels are linear in the data, as the law is. The noise is that of the output, without gradient:
    quasi-likelihood, whose optimum is the mean of the clean image but for the tail it takes linearly (0.4 % low at 10
    counts a pixel), where weights taken from the noisy target would be biased towards its low pixels.
    """
    residual = (output - target) / (noisier * law.variance(output.detach())).sqrt().clamp_min(1e-6)
    return (delta**2 * ((1 + (residual / delta).square()).sqrt() - 1)).mean()


def likelihood(residual: Tensor, variance: Tensor, log_ratio: Tensor, beta: float = 0.5) -> Tensor:
    """Negative log-likelihood of residuals whose variance is the law's times exp(log_ratio), each weighed by that to the
    power beta (Seitzer et al. 2022, arXiv 2203.09168): at beta = 0 pixels that are badly fitted could buy themselves off
    with a large variance. Less a constant."""
    wrong = residual.square() / variance.clamp_min(1e-12) * (-log_ratio).exp()
    return (0.5 * (wrong + log_ratio) * (beta * log_ratio.detach()).exp()).mean()


def ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004) with its constants for a range of 1.

    Its optimum is too contrasty where the target is noisy: by a share of about noise² / (2 contrast² + 0.03²), the
    variances those of a window of 11 pixels. Harmless while the noise is well below 0.03.
    """
    return 1 - cast(Tensor, structural_similarity_index_measure(output, target, data_range=1.0))


def focal_frequency(output: Tensor, target: Tensor) -> Tensor:
    """Focal frequency loss with alpha = 1 (Jiang et al. 2021, Eq. 8): |d|² of the Fourier coefficients d of the residual,
    weighted by |d| over the largest of its image and channel.

    Noise gives every d a symmetric error, and weight and square are even: the optimum is the mean of the target, the
    clean image. Distances of (log) power have no such optimum: the power of a noisy target holds that of its noise, and
    a decoder would have to paint noise to match it. With all weights 1 this is the mean squared error (Parseval). The
    weights have no gradient: it is the gradient that vanishes at the optimum, and the value need not be least there.
    """
    power = torch.fft.fft2((output - target).float(), norm="ortho").abs().square()
    distance = power.detach().sqrt()
    weight = distance / distance.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    return (weight * power).mean()


class Perceptual:
    """Distance of the features of EfficientNet-Lite0 at four resolutions, as a share of their variance.

    It is the network of `fd_efflite0`. A model trained with this term is trained against that score, so its score says
    nothing beside those of models that were not. Three channels are one picture in colour, any other number that many
    grey ones.

    No module, for what a package carries belongs in no checkpoint.
    """

    def __init__(self) -> None:
        self.network = efficientnet_lite0()

    def __call__(self, draws: Sequence[Tensor], real: Tensor) -> Tensor:
        """draws: two independently observed reconstructions, each (N, C, H, W); real (N, C, H, W) -> ()."""
        network = self.network.to(real.device)
        pictures = [255 * (x if x.shape[1] == 3 else x.flatten(0, 1)[:, None]) for x in (*draws, real)]
        with torch.no_grad():
            theirs = network.layers(pictures[-1])
        ours = network.layers(torch.cat(pictures[:-1]))
        pairs = zip(ours, theirs, strict=True)
        return torch.stack([feature_distance(x.chunk(2), y) for x, y in pairs]).mean()


class ReconstructionLoss(nn.Module):
    """Weighted sum; a term of weight 0 is not computed, and what it would need is not built.

    transform   of the pixels
    law         of the noise in `transform.light`; estimated from the images before training
    channels    of the images, for the discriminator
    noisier     how many times the variance of the law the noise of the targets has

    The noise law holds in the data's own units, so `chi` goes back to them: there alone is its optimum the mean of the
    light and not of its asinh. `stretched` finds asinh data stretched already. Under asinh the optimum of `spectrum` is,
    as that of `mse`, the mean of the asinh.
    """

    def __init__(
        self,
        *,
        l1: float,
        stretched: float,
        mse: float,
        chi: float,
        ssim: float = 0.0,
        spectrum: float = 0.0,
        perceptual: float = 0.0,
        likelihood: float = 0.0,
        adversarial: float = 0.0,
        feature_matching: float = 0.0,
        adversarial_start: int = 1000,
        discriminator_lr: float = 2e-4,
        discriminator_width: int = 32,
        law: NoiseLaw | NoiseLaws,
        transform: PixelTransform,
        channels: int = 1,
        noisier: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = {
            "l1": l1, "stretched": stretched, "mse": mse, "chi": chi, "ssim": ssim, "spectrum": spectrum,
            "perceptual": perceptual, "likelihood": likelihood, "adversarial": adversarial, "feature_matching": feature_matching,
            "discriminator": 1.0,
        }  # fmt: skip
        self.law, self.transform, self.discriminator_lr, self.noisier = law, transform, discriminator_lr, noisier
        self.perceptual = Perceptual() if perceptual > 0 else None
        self.adversary: Adversary | None = None
        if adversarial > 0:
            matching = feature_matching > 0
            self.adversary = Adversary(channels, width=discriminator_width, start=adversarial_start, matching=matching)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The discriminator's parameters, as an optimiser's groups; none without one."""
        if self.adversary is None:
            return []
        return [{"params": list(self.adversary.parameters()), "lr": self.discriminator_lr, "betas": BETAS}]

    def forward(
        self,
        output: Tensor,
        target: Tensor,
        step: int = 0,
        log_ratio: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """output, target (N, C, H, W) in [0, 1], training step -> loss (), {term: its unweighted value}.

        log_ratio   log of the noise's variance over the law's, (N, C, H, W), where a decoder predicts it

        The loss has the discriminator's own hinge loss in it, which gives the output no gradient.
        """
        # In float32: bf16 has two digits, and SSIM takes variances from differences of squares.
        with torch.autocast(output.device.type, enabled=False):
            values = self._values(output.float(), target.float(), step)
            if log_ratio is not None and self.weights["likelihood"] > 0:
                light = self.transform.light(output.float())
                residual = light - self.transform.light(target.float())
                variance = self.noisier * self.law.variance(light.detach())
                # What recorruption has added is of the law: only the images' own noise is the decoder's to correct.
                of_target = torch.log1p(torch.expm1(log_ratio) / self.noisier)
                values["likelihood"] = likelihood(residual, variance, of_target)
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum(), values

    def _values(self, output: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        stretched, light = (stretched_l1 if self.transform.scale is None else F.l1_loss), self.transform.light
        terms = {
            "l1": lambda: F.l1_loss(output, target),
            "stretched": lambda: stretched(output, target),
            "mse": lambda: F.mse_loss(output, target),
            "chi": lambda: chi(light(output), light(target), self.law, noisier=self.noisier),
            "ssim": lambda: ssim_loss(output, target),
            "spectrum": lambda: focal_frequency(output, target),
        }
        values = {name: term() for name, term in terms.items() if self.weights[name] > 0}
        if self.perceptual is None and self.adversary is None:
            return values
        compares = self.perceptual is not None or self.weights["feature_matching"] > 0
        draws, real = [self.observe(output) for _ in range(2 if compares else 1)], target.clamp(0, 1)
        if self.perceptual is not None:
            values["perceptual"] = self.perceptual(draws, real)
        if self.adversary is not None:
            values |= self.adversary([self.in_noise(x) for x in draws], self.in_noise(real), step)
        return values

    def observe(self, clean: Tensor) -> Tensor:
        """clean (N, C, H, W) in [0, 1] -> the same with as much noise as targets have, within [0, 1] as the data are.

        The noise is that of the clean image, without gradient, as in `chi`: brightness must not pay by the noise it makes.
        """
        light = self.transform.light(clean)
        noise = (self.noisier * self.law.variance(light.detach())).sqrt() * torch.randn_like(light)
        return self.transform.from_light(light + noise).clamp(0, 1)

    def in_noise(self, unit: Tensor) -> Tensor:
        """Pixels in [0, 1] -> asinh of their light above the background in units of its noise.

        Noise and faint arcs then differ by about 1, which a discriminator under spectral norms can tell.
        """
        noise = self.law.a.sqrt().clamp_min(1e-3)  # of data without noise: some scale
        return torch.asinh((self.transform.light(unit) - self.law.background) / noise)
