"""An adversary for stage 1: it learns to tell images from observed reconstructions while the decoder learns to pass.

It never sees a clean reconstruction: those it would know by their lack of noise, and the decoder would learn to paint
noise that carries nothing. Both learn from one backward and one step of one optimiser. The generator's terms go through
the discriminator with its parameters detached, the discriminator's term through a detached reconstruction, so neither
gradient reaches the other side.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from shared.patchgan import Discriminator

BETAS = (0.5, 0.9)  # little momentum: what fools a discriminator moves with every step


def feature_distance(draws: Sequence[Tensor], real: Tensor) -> Tensor:
    """Share of the variance of features (N, c, h, w) that two independently observed reconstructions leave unexplained.

    The mean of (first - real) (second - real), and not of a square: the square also has the variance that the noise of
    the observation gives the features, which the decoder would lower by moving away from the clean image. The product
    has its optimum where the mean features agree. It has the variance from the noise of `real` as its floor.
    """
    first, second = draws
    unexplained = ((first - real) * (second - real)).mean()
    return unexplained / real.var((0, 2, 3), correction=0).mean().clamp_min(1e-8)


class Adversary(nn.Module):
    """The hinge losses of both sides (Lim & Ye 2017), and the distance of the discriminator's features.

    start      steps the discriminator learns alone: one that knows nothing has nothing to teach
    matching   whether to compare features as well
    """

    def __init__(self, channels: int, *, width: int, start: int, matching: bool) -> None:
        super().__init__()
        self.discriminator = Discriminator(channels, width)
        self.start, self.matching = start, matching

    def forward(self, draws: Sequence[Tensor], real: Tensor, step: int) -> dict[str, Tensor]:
        """draws: observed reconstructions, each (N, C, H, W); real (N, C, H, W) -> {term: ()}.

        `discriminator` is for the discriminator alone: 2 where it cannot tell, 0 where it always can. `adversarial` and
        `feature_matching` are for the decoder alone, from `start` on.
        """
        n, fake = len(real), torch.cat(list(draws))
        logits, features = self.discriminator(torch.cat([real, fake.detach()]))
        values = {"discriminator": F.relu(1 - logits[:n]).mean() + F.relu(1 + logits[n:]).mean()}
        if step >= self.start:
            frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
            against, seen = functional_call(self.discriminator, frozen, (fake,))
            values["adversarial"] = -against.mean()
            if self.matching:
                pairs = zip(seen, features, strict=True)
                distances = [feature_distance(theirs.split(n), ours[:n].detach()) for theirs, ours in pairs]
                values["feature_matching"] = torch.stack(distances).mean()
        return values
