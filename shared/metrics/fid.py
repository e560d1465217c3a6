"""Fréchet distance between sets of images, on the features of a network that the name of the number states.

On Inception-v3 of December 2015 it is `fid` (Heusel et al. 2017, arXiv 1706.08500), on EfficientNet-Lite0
`fd_efflite0`, on another scale. Each comes with its floor: the distance of real images from other real images.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.files import sha256
from shared.metrics import Images, batches

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # the leading digits, which its publishers put into the name of the file


class Network(Protocol):
    """What turns uint8 images (N, C, H, W) into features (N, d), and says which distance that makes."""

    metric: str
    extractor: str
    resizer: str

    def __call__(self, images: Tensor) -> Tensor: ...


def to_uint8(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return images quantised to 0 ... 255: clamped to value_range = (low, high), then rounded.

    Always with the range of the data set, never of the image, and for real and generated images alike. Truncating on
    one side, as `.byte()` does, makes a distance of 0.5 on EfficientNet-Lite0 between equal sets.

    Linear: give images of a high dynamic range stretched (`PixelTransform.unit`), or distances see the brightest pixels
    alone. Of 250 galaxies of 6,000 to 60,000 counts on a sky of 8 counts' noise, those without their arcs of 150 counts
    had an excess of 0.5 on a linear scale and of 74 on asinh; those without noise, of 0.1 and of 122.
    """
    low, high = value_range
    if not low < high:
        raise UserError(f"value_range must be (low, high) with low < high, got ({low}, {high}).")
    return ((images - low) / (high - low) * 255).clamp(0, 255).round().to(torch.uint8)


def features(
    network: Callable[[Tensor], Tensor],
    images: Images,
    value_range: tuple[float, float],
    batch_size: int = 50,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Return the features float64 (N, d) of images in the units of their data set.

    network   uint8 (n, C, H, W) -> (n, d), on the device of its parameters
    images    (N, C, H, W), tensor, array or memory map; or an iterable of such batches
    progress  called with the number of images of each batch when it is done, as `tqdm(...).update` likes.
    """
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    rows = []
    for batch in batches(images, batch_size):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            rows.append(network(to_uint8(batch.to(device), value_range)).double().cpu().numpy())
        if progress:
            progress(len(batch))
    return np.concatenate(rows)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |mean difference|² + tr(A + B - 2 (A B)^½) of two feature matrices (N, d), A and B their covariances.

    With X = centred features / √(N - 1), A = X_aᵀ X_a, and tr (A B)^½ is the sum of the singular values of X_a X_bᵀ:
    exact for any N and d, of the size of the smaller, and without the square root of a product that is not symmetric.
    Raises UserError for fewer than two rows and for features that are not finite. Dowson & Landau 1982.
    """
    for x in (a, b):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise UserError(f"A Fréchet distance needs two matrices (N >= 2, d), got {a.shape} and {b.shape}.")
        if not np.isfinite(x).all():
            raise UserError("A Fréchet distance needs finite features, got NaN or infinity; look at the images.")
    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    x_a = torch.from_numpy((a - mean_a) / np.sqrt(len(a) - 1))
    x_b = torch.from_numpy((b - mean_b) / np.sqrt(len(b) - 1))
    overlap = torch.linalg.svdvals(_short(x_a) @ _short(x_b).T).sum()
    squared = float(((mean_a - mean_b) ** 2).sum()) + x_a.square().sum() + x_b.square().sum() - 2 * overlap
    return max(float(squared), 0.0)  # equal sets differ from 0 by rounding, to either side


def _short(x: Tensor) -> Tensor:
    """Return a matrix of min(N, d) rows with the xᵀ x of x (N, d)."""
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x


class Inception(nn.Module):
    """The network of FID: uint8 (N, 1 or 3, H, W) -> features (N, 2048)."""

    metric = "fid"
    extractor = f"Inception-v3 2015-12-05 {INCEPTION_SHA256}"
    resizer = "bilinear of TensorFlow 1, 299x299"
    num_features = 2048

    def __init__(self, weights: Path):
        """weights: a file whose hash has been checked."""
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch-fidelity unpickles whatever the file says; reading it as tensors first refuses a file that says more.
        torch.load(weights, map_location="cpu", weights_only=True)
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(f"Inception-v3 takes 1 or 3 channels, got {images.shape[1]}; choose one band or three.")
        return self.network(images.expand(-1, 3, -1, -1))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the logits float64 (N, 1008) of features (N, 2048), without bias: those of the Inception score.

        The classifier is one linear layer on the features, so they need no second pass.
        """
        return features @ self.network.fc.weight.detach().double().cpu().numpy().T


def inception(weights: Path | None = None, download: bool = False) -> Inception:
    """Return the network of FID on the weights at `weights`, by default torch-fidelity's file in torch.hub's cache.

    download  fetch a missing file (91 MB); otherwise nothing here reaches for a network.
    Raises UserError if the file is missing or another one, or if torch-fidelity is not installed.
    """
    if weights is None:
        weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    try:
        if download and not weights.is_file():
            _download(weights)
        if not weights.is_file():
            raise UserError(
                f"FID needs the weights of Inception-v3, and there are none at {weights}; put torch-fidelity's "
                f"{INCEPTION_FILE} there, or name it with --inception-weights PATH, or fetch it with --download."
            )
        digest = sha256(weights)
        if not digest.startswith(INCEPTION_SHA256):
            raise UserError(
                f"{weights} is not the network of FID: sha256 {digest[:8]}, expected {INCEPTION_SHA256}; "
                f"use torch-fidelity's {INCEPTION_FILE}."
            )
        return Inception(weights)
    except ModuleNotFoundError as error:
        raise UserError(
            "FID needs torch-fidelity and torchvision; install them with: pip install 'torchmetrics[image]'"
        ) from error


def _download(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    weights.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(weights), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # no connection; another file than expected
        raise UserError(
            f"{URL_INCEPTION_V3} could not be fetched ({error}); bring the file from elsewhere to {weights}."
        ) from error


@dataclass(frozen=True)
class Score:
    """A Fréchet distance with all that is needed to compare it with another."""

    metric: str  # "fid" or "fd_efflite0": never compared with one another
    distance: float  # of n generated images from the reference
    floor: float  # of n real images from n_reference others, mean over splits
    floor_sd: float  # standard deviation over the splits, and an estimate of the error of the excess
    excess: float  # distance - floor
    n: int
    n_reference: int
    extractor: str
    resizer: str
    value_range: tuple[float, float]
    stretch: str = "linear"  # from value_range to grey levels
    splits: int = 10  # that the floor is a mean over

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.distance:.2f}, floor {self.floor:.2f} ± {self.floor_sd:.2f}, "
            f"excess {self.excess:+.2f} ({self.n} against {self.n_reference} images; {self.extractor}; {self.resizer}; "
            f"range {self.value_range[0]:g} to {self.value_range[1]:g}"
            f"{'' if self.stretch == 'linear' else ', ' + self.stretch})"
        )


def score(
    reference: np.ndarray,
    held_out: np.ndarray,
    candidates: dict[str, np.ndarray],
    network: Network,
    value_range: tuple[float, float],
    splits: int = 10,
    seed: int = 0,
    stretch: str = "linear",
) -> dict[str, Score]:
    """Return the distance of each candidate from `reference`, beside the floor: that of other real images.

    reference   features of real images (N, d)
    held_out    features of other real images (n, d)
    candidates  name -> features of generated images (n, d)
    network     what made all of them, with `value_range` and `stretch`; they only label the scores

    A Fréchet distance shrinks with n, so each candidate needs the n of `held_out` (UserError otherwise); the excess
    over the floor hardly depends on n. The floor is the mean over random splits of the pooled real features into N and
    n: with 150 toy lenses a side, real images had an excess of 0.0 ± 0.33 over it, against 0.1 ± 0.53 over one split's,
    and floor_sd was 0.35 on average, a fair estimate of that error.
    """
    for name, candidate in candidates.items():
        if len(candidate) != len(held_out):
            raise UserError(
                f"{name} has {len(candidate)} images and the floor {len(held_out)}; a Fréchet distance depends on the "
                "number, so take as many of both."
            )
    real = np.concatenate([reference, held_out])
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(real)) for _ in range(splits)]
    floors = [frechet_distance(real[i[: len(reference)]], real[i[len(reference) :]]) for i in orders]
    floor, floor_sd = float(np.mean(floors)), float(np.std(floors, ddof=1))
    scores = {}
    for name, candidate in candidates.items():
        distance = frechet_distance(reference, candidate)
        scores[name] = Score(
            metric=network.metric,
            distance=distance,
            floor=floor,
            floor_sd=floor_sd,
            excess=distance - floor,
            n=len(candidate),
            n_reference=len(reference),
            extractor=network.extractor,
            resizer=network.resizer,
            value_range=value_range,
            stretch=stretch,
            splits=splits,
        )
    return scores
