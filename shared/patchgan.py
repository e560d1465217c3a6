"""The discriminator of whoever learns against one."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004) under spectral norms (Miyato et al. 2018, arXiv 1802.05957).

    images (N, channels, H, W) of any size -> logits (N, 1, h, w), [the features (N, c, h, w) of its layers]

    width     channels of the first layer; they double from layer to layer, up to 8 times
    strides   layers that halve the grid: it judges patches 26 pixels wide with 2, 54 with 3, 110 with 4
    """

    def __init__(self, channels: int, width: int, strides: int = 2) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(strides + 1)]
        halving = [
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=2))
            for a, b in zip([channels, *widths[:-2]], widths[:-1], strict=True)
        ]
        self.layers = nn.ModuleList([*halving, spectral_norm(nn.Conv2d(widths[-2], widths[-1], 3, padding=1))])
        self.head = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = images, []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.head(x), features
