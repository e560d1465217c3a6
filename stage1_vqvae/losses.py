"""What a reconstruction is trained on. Every function takes pixels in [0, 1] (the network's range) and gives a scalar."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data.normalise import PixelTransform
from stage1_vqvae.noise import NoiseLaw

KNEE = 0.02  # of full scale: about where a lens image goes over from background to arc


def stretched_l1(output: Tensor, target: Tensor) -> Tensor:
    """L1 after asinh(x / 0.02), which gives faint arcs the weight that bright ones have in plain L1."""
    scale = torch.asinh(torch.tensor(1 / KNEE))
    return F.l1_loss(torch.asinh(output / KNEE) / scale, torch.asinh(target / KNEE) / scale)


def chi(output: Tensor, target: Tensor, law: NoiseLaw, delta: float = 3.0) -> Tensor:
    """Residuals in units of the noise: quadratic up to about `delta` standard deviations, linear beyond (pseudo-Huber).

    The pixels are linear in the data, as the law is. The noise is that of the output, without gradient:
    quasi-likelihood, whose optimum is the mean of the clean image but for the tail it takes linearly (0.4 % low at 10
    counts a pixel), where weights taken from the noisy target would be biased towards its low pixels.
    """
    residual = (output - target) / law.variance(output.detach()).sqrt().clamp_min(1e-6)
    return (delta**2 * ((1 + (residual / delta).square()).sqrt() - 1)).mean()


class ReconstructionLoss(nn.Module):
    """Weighted sum; a term of weight 0 is not computed.

    transform   of the pixels
    law         of the noise in `transform.light`, for `chi`; estimated from the images before training

    The noise law holds in the data's own units, so `chi` goes back to them: there alone is its optimum the mean of the
    light and not of its asinh. `stretched` finds asinh data stretched already.
    """

    def __init__(
        self, *, l1: float, stretched: float, mse: float, chi: float, law: NoiseLaw, transform: PixelTransform
    ) -> None:
        super().__init__()
        self.weights = {"l1": l1, "stretched": stretched, "mse": mse, "chi": chi}
        self.law, self.transform = law, transform

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """output, target (N, C, H, W) in [0, 1] -> loss (), {term: its unweighted value}."""
        stretched, light = (stretched_l1 if self.transform.scale is None else F.l1_loss), self.transform.light
        terms = {
            "l1": lambda: F.l1_loss(output, target),
            "stretched": lambda: stretched(output, target),
            "mse": lambda: F.mse_loss(output, target),
            "chi": lambda: chi(light(output), light(target), self.law),
        }
        values = {name: terms[name]() for name, weight in self.weights.items() if weight > 0}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return total, values
