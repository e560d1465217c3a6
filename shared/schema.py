"""What a config may say: every key with its type, its bounds, its default and what it is for.

The options of a part (`autoencoder`, `quantizer`, `backbone`, `loss`) are its constructor's arguments, under the same
names and with the same defaults; a test compares the two. A check of one key against another sits on the later of the
two, as a field validator, so that it is reported together with everything else that is wrong.
"""

import importlib.util
import itertools
import math
import sys
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from shared.config import load_config, merge, unfold
from shared.errors import UserError
from shared.sampling import NOISY

Value = TypeVar("Value")
AnyRun = TypeVar("AnyRun", bound="_Run")


def _check(value: Value, fine: bool, what: str) -> Value:
    """The value, or pydantic's kind of error."""
    if not fine:
        raise ValueError(what)
    return value


def key(default: Any, description: str, **bounds: Any) -> Any:
    """The default of a key (`...`: it has none), what it is for, and pydantic's bounds."""
    return Field(default, description=description, **bounds)


class Block(BaseModel):
    # Strict: neither "3" nor true is an integer, while 3 is a number where a float is wanted.
    # Defaults are validated because one that is fine by itself may not suit a key that was set.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


# YAML's lists arrive as lists; a frozen config keeps them as tuples.
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False), Field(min_length=1)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Fraction, Fraction], Strict(False)]


# --- stage 1 ----------------------------------------------------------------------------------------------------------


class VQ(Block):
    """A learned codebook, moved by averages of what falls to each code."""

    name: Literal["vq"] = "vq"
    codebook_size: int = key(1024, "number of codes", ge=2)
    codebook_dim: int | None = key(None, "dimensions a head looks codes up in; null: all its channels", ge=1)
    heads: int = key(1, "codebooks side by side, each for its share of the channels", ge=1)
    decay: Share = key(0.99, "of the moving averages that are the codes")
    commitment_weight: float = key(0.25, "pull of the encoder towards its codes", ge=0)
    kmeans_init: bool = key(True, "start the codes at the cluster centres of the first batch")
    kmeans_iters: int = key(10, "iterations of that k-means", ge=1)
    threshold_ema_dead_code: float = key(0.2, "reseed codes used less often than this a batch; 0: never", ge=0)
    rotation_trick: bool = key(True, "gradients by Fifty et al. 2024; false: straight through")
    warmup_steps: int = key(150, "steps the encoder learns before the quantiser acts", ge=0)


class SimVQ(Block):
    """Fixed random codes behind a learned linear map, which moves them all at once."""

    name: Literal["simvq"] = "simvq"
    codebook_size: int = key(1024, "number of codes", ge=2)
    commitment_weight: float = key(0.25, "pull of the encoder towards its codes; theirs towards it is 1", ge=0)
    rotation_trick: bool = key(True, "gradients by Fifty et al. 2024; false: straight through")
    warmup_steps: int = key(0, "steps the encoder learns before the quantiser acts", ge=0)


class _Grid(Block):
    levels: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Strict(False), Field(min_length=1)] = key(
        (16, 16, 16, 16, 16), "levels of each dimension; best one for each latent channel"
    )

    @field_validator("levels")
    @classmethod
    def _countable(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        return _check(levels, math.prod(levels) < 2**63, "make more codes than a 64-bit integer can count: take fewer")


class FSQ(_Grid):
    """Rounding to a fixed grid: no codebook, nothing to collapse."""

    name: Literal["fsq"] = "fsq"


class FSP(_Grid):
    """Rounding to a grid or, in training, noise as wide as its bins; latents drawn towards a normal distribution."""

    name: Literal["fsp"] = "fsp"
    quantize_rate: float = key(0.5, "share that is rounded in training; the rest gets the noise", ge=0, le=1)


class KL(Block):
    """No codes: Gaussian latents, as in a variational autoencoder; stage 2 learns their means."""

    name: Literal["kl"] = "kl"
    weight: float = key(1e-6, "of the divergence from a unit Gaussian, per latent", ge=0)


class NoQuantizer(Block):
    """A plain autoencoder, as a control."""

    name: Literal["none"] = "none"


class VQVAE(Block):
    """PixelUnshuffle stem, strided residual encoder, its mirror image as decoder."""

    name: Literal["vqvae"] = "vqvae"
    stem: int = key(5, "first downsampling, without loss (PixelUnshuffle); 150 is divisible by 5", ge=1)
    strides: Annotated[Counts, Field(min_length=0)] = key((2,), "further downsampling: 5 x 2 makes 150 -> 15")
    widths: Counts = key((64, 128), "channels on each grid, fine to coarse: one more than strides; 8 divides")
    encoder_blocks: int = key(1, "residual blocks a grid", ge=1)
    decoder_blocks: int = key(3, "residual blocks a grid", ge=1)
    latent_channels: int = key(5, "what stage 2 sees is this many channels of 15 x 15", ge=1)
    quantizer: Annotated[VQ | SimVQ | FSQ | FSP | KL | NoQuantizer, Field(discriminator="name")] = VQ()
    latents: Literal["continuous", "quantized", "unquantized"] = key(
        "continuous", "diffused: before the quantiser, which decodes them; after it; before it and decoded without"
    )
    predict_variance: bool = key(False, "the decoder corrects the noise law pixel by pixel; needs loss.likelihood")

    @field_validator("quantizer")
    @classmethod
    def _heads_share(cls, quantizer: Block, info: ValidationInfo) -> Block:
        channels = info.data.get("latent_channels")
        if channels is None or not isinstance(quantizer, VQ) or quantizer.codebook_dim is not None:
            return quantizer
        what = f"heads {quantizer.heads} do not divide latent_channels {channels}: choose others, or set codebook_dim"
        return _check(quantizer, channels % quantizer.heads == 0, what)

    @field_validator("latents")
    @classmethod
    def _codes_are_latents(cls, latents: str, info: ValidationInfo) -> str:
        quantizer, channels = info.data.get("quantizer"), info.data.get("latent_channels")
        dimensions = channels
        if isinstance(quantizer, VQ) and quantizer.codebook_dim is not None:
            dimensions = quantizer.heads * quantizer.codebook_dim
        elif isinstance(quantizer, _Grid):
            dimensions = len(quantizer.levels)
        what = "quantized needs codes with as many dimensions as latent_channels: then a code is a latent"
        return _check(latents, latents != "quantized" or dimensions == channels, what)

    @field_validator("widths")
    @classmethod
    def _one_a_grid(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        _check(widths, all(w % 8 == 0 for w in widths), "every width must be a multiple of 8, the groups of its norm")
        grids = len(info.data.get("strides", widths[1:])) + 1
        return _check(widths, len(widths) == grids, f"{len(widths)} widths, but strides make {grids} grids")


class Loss(Block):
    """Weights of the reconstruction loss; 0 leaves a term out."""

    l1: float = key(1.0, "mean absolute error", ge=0)
    stretched: float = key(0.3, "the same after asinh, for faint arcs", ge=0)
    mse: float = key(10.0, "mean squared error", ge=0)
    chi: float = key(0.05, "residuals in units of the pixel noise, robust", ge=0)
    ssim: float = key(0.0, "1 - structural similarity; too contrasty where noise exceeds 0.03 of the range", ge=0)
    spectrum: float = key(0.0, "focal frequency loss: Fourier coefficients, the worst ones first", ge=0)
    perceptual: float = key(0.0, "features of the network of fd_efflite0: no score for such a model then", ge=0)
    likelihood: float = key(0.0, "of the noise that the decoder predicts; needs autoencoder.predict_variance", ge=0)
    adversarial: float = key(0.0, "patches that a discriminator takes for observed images", ge=0)
    feature_matching: float = key(0.0, "features of that discriminator", ge=0)
    adversarial_start: int = key(1000, "steps the discriminator learns before the decoder learns from it", ge=0)
    discriminator_lr: float = key(2e-4, "its peak learning rate, by AdamW", gt=0)
    discriminator_width: int = key(32, "channels of its first layer; it has 2 and 4 times as many further on", ge=1)

    @field_validator("feature_matching")
    @classmethod
    def _has_features(cls, matching: float, info: ValidationInfo) -> float:
        fine = matching == 0 or info.data.get("adversarial", 1) > 0
        return _check(matching, fine, "needs a discriminator: set adversarial greater than 0")

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        # An adversary alone knows what an image is, but not which one was wanted.
        direct = (
            self.l1,
            self.stretched,
            self.mse,
            self.chi,
            self.ssim,
            self.spectrum,
            self.perceptual,
            self.likelihood,
        )
        return _check(self, any(direct), "at least one weight beside the adversary's must be greater than 0")


class Regularize(Block):
    """What makes latents easy to diffuse, in training alone; 0 leaves it out."""

    equivariance: float = key(
        0.0, "share of the steps whose latents are turned or scaled like their images", ge=0, le=1
    )
    latent_noise: float = key(0.0, "of latents when decoded: up to that many of their standard deviations", ge=0)
    bypass: float = key(0.0, "share of the images decoded from latents that were not quantised", ge=0, le=1)


class Noise(Block):
    """What is drawn over decoded images, fitted after training; and what keeps noise out of the latents."""

    law: Literal["image", "affine", "none"] = key(
        "image", "affine: variance a + b signal, normal; image: as real images show it; none: decode clean images only"
    )
    images: int = key(512, "validation images it is fitted to", ge=1)
    recorrupt: float = key(
        1.0, "in training: encode images with that many times their noise added, and judge by others", ge=0
    )


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def _levels_exist(attention: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    levels = len(info.data.get("multipliers", ())) or 1 + max(attention, default=0)
    wrong = [level for level in attention if level >= levels]
    return _check(attention, not wrong, f"no level {wrong}: multipliers make levels 0 to {levels - 1}")


class UNet(Block):
    """A convolutional U-Net."""

    name: Literal["unet"] = "unet"
    width: int = key(64, "channels at full latent resolution", ge=1)
    multipliers: Counts = key((1, 2), "of the width, one a level; each further level halves the grid")
    blocks: int = key(2, "residual blocks a level", ge=1)
    attention: Levels = key((1,), "levels with self-attention; 0 is the finest")
    heads: int = key(4, "of the attention", ge=1)
    dropout: Share = key(0.0, "in residual blocks")
    positional: bool = key(True, "a learned map of position, for data whose frame is not arbitrary")

    @field_validator("attention")
    @classmethod
    def _levels(cls, attention: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        return _levels_exist(attention, info)

    @field_validator("heads")
    @classmethod
    def _divide(cls, heads: int, info: ValidationInfo) -> int:
        d = info.data  # holds what was valid
        for level in d.get("attention", ()) if {"width", "multipliers"} <= d.keys() else ():
            channels = d["width"] * d["multipliers"][level]
            _check(heads, channels % heads == 0, f"{heads} does not divide the {channels} channels of level {level}")
        return heads


class KarrasUNet(UNet):
    """A U-Net in which every layer keeps the magnitude of its input."""

    name: Literal["karras_unet"] = "karras_unet"  # type: ignore[assignment]
    blocks: int = key(1, "residual blocks a level", ge=1)


class DiT(Block):
    """A transformer."""

    name: Literal["dit"] = "dit"
    width: int = key(192, "of a token", ge=1)
    depth: int = key(6, "transformer blocks", ge=1)
    heads: int = key(6, "of the attention; 4 x heads divides the width", ge=1)
    patch: int = key(1, "latent pixels on a token's side", ge=1)
    mlp_ratio: float = key(4.0, "hidden width of the MLP over the width", gt=0)
    dropout: Share = key(0.0, "in the blocks")

    @field_validator("heads")
    @classmethod
    def _divide(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width", 4 * heads)
        return _check(heads, width % (4 * heads) == 0, f"4 x {heads} does not divide width {width}")


class UViT(DiT):
    """A transformer with long skips, to which time and condition are tokens."""

    name: Literal["uvit"] = "uvit"  # type: ignore[assignment]
    depth: int = key(5, "transformer blocks, an odd number: in, one in the middle, out", ge=1)

    @field_validator("depth")
    @classmethod
    def _middle(cls, depth: int) -> int:
        return _check(depth, depth % 2 == 1, f"{depth} is even: there is one block between as many in as out")


class Custom(Block):
    """A class of the user's own."""

    name: Literal["custom"] = "custom"
    class_path: str = key(..., "a class of your own, my_package.my_module.MyNet")
    options: dict[str, Any] = key({}, "what its constructor takes beside latent_shape and cond_dim")

    @field_validator("class_path")
    @classmethod
    def _is_there(cls, path: str) -> str:
        package, *rest = path.split(".")
        dotted = rest and all(part.isidentifier() for part in (package, *rest))
        _check(path, bool(dotted), f"must be the dotted path of a class, my_package.my_module.MyNet, not {path!r}")
        # A search for more than the package would import it, and torch with it.
        found = package in sys.modules or importlib.util.find_spec(package) is not None
        return _check(path, found, f"there is no module {package!r}: install it, or put its folder into PYTHONPATH")


class Pixels(Block):
    """Of `autoencoder: pixels`: smaller images to diffuse; samples are enlarged again."""

    size: int | None = key(None, "resize the shorter side to so many pixels, by antialiased interpolation", ge=4)
    crop: int | None = key(None, "before that, keep a square of so many pixels in the centre", ge=4)


class Diffusion(Block):
    schedule: Literal["linear", "cosine", "sigmoid", "flow"] = key("flow", "how data becomes noise: alpha(t), sigma(t)")
    prediction: Literal["eps", "x0", "v", "velocity"] = key("x0", "what the network is asked for")
    time: Literal["uniform", "logit_normal"] = key("logit_normal", "how training draws t")
    time_mean: float = key(0.0, "of logit(t), for logit_normal: below 0 trains more at low noise")
    time_std: float = key(1.0, "of logit(t), for logit_normal", gt=0)
    shift: float = key(1.0, "of sigma/alpha; above 1: more of training and sampling at high noise", gt=0)
    weighting: Literal["uniform", "min_snr", "velocity"] = key(
        "velocity",
        "of the loss over t: that of the prediction's own errors, or of those of x_0 or of the velocity they make",
    )
    gamma: float = key(5.0, "of min_snr: the signal-to-noise ratio from which on no error of x_0 counts more", gt=0)
    ssim: float = key(0.0, "weight of 1 - structural similarity of the estimate of x_0 beside the squared error", ge=0)
    zero_terminal: bool | None = key(None, "t reaches pure noise; null: unless eps is predicted, which needs false")

    @field_validator("zero_terminal")
    @classmethod
    def _noise_holds_data(cls, zero_terminal: bool | None, info: ValidationInfo) -> bool | None:
        eps, linear = info.data.get("prediction") == "eps", info.data.get("schedule") == "linear"
        _check(zero_terminal, not (zero_terminal and linear), "schedule linear never reaches pure noise: set false")
        what = "eps cannot start from pure noise: set false, or predict v, x0 or velocity"
        return _check(zero_terminal, not (zero_terminal and eps), what)

    @field_validator("prediction")
    @classmethod
    def _flows(cls, prediction: str, info: ValidationInfo) -> str:
        schedule = info.data.get("schedule", "flow")
        fine = prediction != "velocity" or schedule == "flow"
        return _check(prediction, fine, f"velocity needs schedule flow; with {schedule} use v")


# `class` is a word of Python's, and a key of ours.
_ByClass = create_model(
    "_ByClass", __base__=Block, **{"class": (bool, key(False, "tell the network an image's class"))}
)  # type: ignore[call-overload]


class Condition(_ByClass):  # type: ignore[misc, valid-type]
    """What the network is told of an image, and what samples may be asked for. Default: nothing."""

    parameters: Annotated[tuple[str, ...], Strict(False)] = key(
        (), "tell it these, as the data set names them (`lens-ldm inspect`); what is not known of an image is left open"
    )
    dropout: Share = key(0.1, "of the images that are told nothing, for guidance and for samples of any kind")
    subsets: float = key(
        0.5, "share of the others that are told a random part, so that any part may be asked for", ge=0, le=1
    )

    @field_validator("parameters")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, n in Counter(names).items() if n > 1]
        return _check(names, not twice, f"{', '.join(twice)} is there twice")


class Guide(Block):
    """A weaker network of the same latents, trained before the other one, which samples are led away from (Karras et al.
    2024, arXiv 2406.02507)."""

    max_steps: int = key(0, "of its training; 0: no guide", ge=0)
    backbone: dict[str, Any] = key({}, "what it has other than the backbone, such as {width: 32}")


class Sampling(Block):
    sampler: Literal["ddpm", "ddim", "dpmpp", "dpmpp_sde", "dpmpp3", "unipc", "heun", "ab2", "ab3"] = key(
        "ab2", "of previews; published as the default"
    )
    steps: int = key(8, "network evaluations a sample", ge=1)
    shift: float = key(3.0, "of the grid of times; above 1: shorter steps at high noise", gt=0)
    eta: float = key(0.0, "of ddim: 0 adds no noise, 1 as much as ddpm", ge=0, le=1)
    tune: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Strict(False)] = key(
        (), "after training, fit the grid of the sampler for each of these numbers of evaluations"
    )
    guidance: float = key(
        1.0, "away from the guide, or else from what the network says without its condition; 1: none", ge=0
    )
    guidance_interval: Interval = key(
        (0.0, 1.0), "guide where sigma / (alpha + sigma) is within: 0 is data, 1 is noise"
    )

    @field_validator("guidance_interval")
    @classmethod
    def _rises(cls, interval: tuple[float, float]) -> tuple[float, float]:
        return _check(interval, interval[0] <= interval[1], "must be two numbers that rise")

    @field_validator("eta")
    @classmethod
    def _of_ddim(cls, eta: float, info: ValidationInfo) -> float:
        sampler = info.data.get("sampler", "ddim")
        return _check(eta, eta == 0 or sampler == "ddim", f"above 0 is for sampler ddim, not {sampler}")

    @field_validator("tune")
    @classmethod
    def _follows_the_ode(cls, tune: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        fine = not tune or (info.data.get("sampler") not in NOISY and not info.data.get("eta"))
        return _check(
            tune, fine, "needs a sampler that draws no noise on the way: not ddpm or dpmpp_sde, nor eta above 0"
        )


class GAN(Block):
    """The generator: transposed convolutions with self-attention."""

    name: Literal["sagan"] = "sagan"
    noise: int = key(128, "numbers that a sample is made of", ge=1)
    width: int = key(64, "channels on the finest grid", ge=1)
    multipliers: Counts = key((1, 2, 4), "of the width, one a grid from the finest; each is half of the one before")
    attention: Levels = key((1,), "grids with self-attention; 0 is the finest")

    @field_validator("attention")
    @classmethod
    def _levels(cls, attention: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        return _levels_exist(attention, info)


class Adversary(Block):
    """The discriminator, and how the two learn against each other."""

    width: int = key(64, "channels of its first layer", ge=1)
    strides: int = key(
        2, "layers that halve the grid: it judges patches of 26 pixels with 2, 54 with 3, 110 with 4", ge=1
    )
    lr: float = key(2e-4, "its learning rate", gt=0)
    updates: int = key(3, "steps of the discriminator to one of the generator", ge=1)
    smoothing: float = key(0.1, "labels are this for samples and 1 less this for real ones", ge=0, lt=0.5)


# --- both stages ------------------------------------------------------------------------------------------------------


class Data(Block):
    path: str = key(..., "folder made by `lens-ldm simulate` or `lens-ldm prepare`", min_length=1)
    batch_size: int = key(8, "images a step, over all devices", ge=1)
    augment: Literal["symmetries", "none"] = key("symmetries", "turn images as symmetries.json allows; without it: not")


class LabelledData(Data):
    augment: Literal["symmetries", "labelled", "none"] = key(  # type: ignore[assignment]
        "symmetries", "turn images as symmetries.json allows; labelled: in all ways, told which; without it: not"
    )


class Optimizer(Block):
    """Muon for the weights of layers, AdamW for the rest; or AdamW for all."""

    name: Literal["muon", "adamw"] = key("muon", "Muon orthogonalises the steps of matrices")
    lr: float = key(2e-3, "peak learning rate", gt=0)
    betas: Annotated[tuple[Share, Share], Strict(False)] = key((0.9, 0.99), "of Adam's two averages")
    weight_decay: float = key(0.0, "of matrices and kernels alone", ge=0)
    warmup_steps: int = key(100, "linear rise from 0", ge=0)
    decay: Literal["linear", "cosine", "constant"] = key("linear", "after the rise, down to 1 %")
    gradient_clip: float = key(1.0, "largest norm of the gradient; 0: any", ge=0)


class Adam(Optimizer):
    name: Literal["muon", "adamw"] = key("adamw", "without weight decay this is Adam")
    lr: float = key(2e-4, "of the generator", gt=0)
    betas: Annotated[tuple[Share, Share], Strict(False)] = key((0.5, 0.999), "of both sides")
    warmup_steps: int = key(0, "linear rise from 0", ge=0)
    decay: Literal["linear", "cosine", "constant"] = key("constant", "after the rise, down to 1 %")
    gradient_clip: float = key(0.0, "largest norm of the generator's gradient; 0: any", ge=0)


class EMA(Block):
    decay: Share = key(0.998, "of the moving average of the weights, which is what is published; 0: off")


class Averages(EMA):
    lengths: Annotated[tuple[Annotated[float, Field(gt=0, lt=0.28)], ...], Strict(False)] = key(
        (), "averages beside it that grow with the run, as shares of it, such as [0.05, 0.1]; the best is published"
    )


class Trainer(Block):
    max_steps: int = key(5000, "optimiser steps", ge=1)
    precision: Literal["auto", "bf16", "fp32"] = key("auto", "auto: mixed bf16 where the hardware has it")
    accelerator: Literal["auto", "cpu", "gpu"] = key("auto", "auto: a GPU where there is one")
    channels_last: bool = key(True, "memory format of images; faster convolutions")
    compile: bool = key(False, "torch.compile: a minute once, then faster steps on a GPU")
    checkpoint_gradients: bool = key(False, "compute blocks twice instead of remembering: less memory, slower")
    accumulate: int = key(
        1, "parts of a batch, one after the other: less memory; a codebook starts from the first", ge=1
    )
    log_every: int = key(25, "steps between rows of metrics.csv", ge=1)
    validate_every: int = key(500, "steps between held-out metrics and pictures", ge=1)
    checkpoint_every: int = key(200, "steps between writes of last.ckpt", ge=1)
    progress: bool = key(True, "a progress bar")


class ScoredTrainer(Trainer):
    score_every: int = key(0, "steps between Frechet distances of samples to validation images; 0: none", ge=0)
    score_count: int = key(250, "samples of each such distance, at most as many as validation images", ge=2)
    watched: int = key(
        256, "images of the validation and of the training split whose errors are held-out metrics", ge=2
    )
    previews: int = key(16, "lenses of each picture; 0: none", ge=0)


class Logger(Block):
    wandb: Literal["auto", "online", "offline", "disabled"] = key("auto", "auto: online with an account")
    project: str = key("lens-ldm", "in wandb", min_length=1)


class _Run(Block):
    name: Name = key(..., "of the run, whose folder is <output>/<name>")
    seed: int = key(0, "of the weights, the batches and all noise", ge=0, lt=2**32)
    output: str = key("checkpoints", "folder of runs", min_length=1)
    data: Data

    @field_validator("trainer", check_fields=False)  # of both stages
    @classmethod
    def _parts_are_alike(cls, trainer: Trainer, info: ValidationInfo) -> Trainer:
        size = info.data["data"].batch_size if "data" in info.data else trainer.accumulate
        what = f"accumulate {trainer.accumulate} does not divide data.batch_size {size}"
        return _check(trainer, size % trainer.accumulate == 0, what)


class Stage1(_Run):
    """configs/stage1: an autoencoder and the noise law beside it."""

    pretrained: str | None = key(None, "a model of either stage, whose autoencoder this one starts from", min_length=1)
    autoencoder: VQVAE = VQVAE()
    loss: Loss = Loss()
    regularize: Regularize = Regularize()
    noise: Noise = Noise()
    optimizer: Optimizer = Optimizer()
    ema: EMA = EMA()
    trainer: Trainer = Trainer()
    logger: Logger = Logger()

    @field_validator("loss")
    @classmethod
    def _variance_is_learned(cls, loss: Loss, info: ValidationInfo) -> Loss:
        predicted = info.data["autoencoder"].predict_variance if "autoencoder" in info.data else loss.likelihood > 0
        what = "likelihood above 0 and autoencoder.predict_variance true need each other"
        return _check(loss, (loss.likelihood > 0) == predicted, what)

    @field_validator("noise")
    @classmethod
    def _variance_is_drawn(cls, noise: Noise, info: ValidationInfo) -> Noise:
        predicted = info.data["autoencoder"].predict_variance if "autoencoder" in info.data else False
        return _check(noise, noise.law != "none" or not predicted, "law none draws no noise: no variance to predict")

    @field_validator("trainer")
    @classmethod
    def _quantiser_acts(cls, trainer: Trainer, info: ValidationInfo) -> Trainer:
        warmup = getattr(info.data["autoencoder"].quantizer, "warmup_steps", 0) if "autoencoder" in info.data else 0
        what = f"max_steps {trainer.max_steps} must exceed autoencoder.quantizer.warmup_steps {warmup}"
        return _check(trainer, trainer.max_steps > warmup, what)

    @field_validator("trainer")
    @classmethod
    def _adversary_acts(cls, trainer: Trainer, info: ValidationInfo) -> Trainer:
        loss = info.data.get("loss")
        start = loss.adversarial_start if loss and loss.adversarial > 0 else 0
        what = f"max_steps {trainer.max_steps} must exceed loss.adversarial_start {start}"
        return _check(trainer, trainer.max_steps > start, what)


class _OnLatents(_Run):
    autoencoder: str = key(
        ..., "a run or model of stage 1, a model of stage 2 (the one inside it), or `pixels`", min_length=1
    )
    pixels: Pixels = Pixels()

    @field_validator("pixels")
    @classmethod
    def _are_diffused(cls, pixels: Pixels, info: ValidationInfo) -> Pixels:
        fine = pixels == Pixels() or info.data.get("autoencoder", "pixels") == "pixels"
        return _check(pixels, fine, "size and crop are for autoencoder pixels: a trained one has a size of its own")


class Adversarial(_OnLatents):
    """configs/stage2/gan.yaml: a GAN on the latents of an autoencoder, or on pixels."""

    gan: GAN = GAN()
    adversary: Adversary = Adversary()
    optimizer: Adam = Adam()
    ema: EMA = EMA()
    trainer: ScoredTrainer = ScoredTrainer()
    logger: Logger = Logger()

    @model_validator(mode="before")
    @classmethod
    def _one_evaluation(cls, tree: Any) -> Any:
        foreign = [
            k for k in ("backbone", "diffusion", "condition", "sampling") if isinstance(tree, dict) and k in tree
        ]
        what = f"a gan makes a lens of noise in one evaluation and is told nothing: leave out {', '.join(foreign)}"
        return _check(tree, not foreign, what)


class Stage2(_OnLatents):
    """configs/stage2: diffusion on the latents of an autoencoder, or on pixels."""

    instead: ClassVar = {"gan": Adversarial}  # a config with that block is one of another schema

    pretrained: str | None = key(None, "a model of stage 2, whose network this one starts from", min_length=1)
    data: LabelledData
    backbone: Annotated[UNet | DiT | UViT | KarrasUNet | Custom, Field(discriminator="name")] = UNet()
    diffusion: Diffusion = Diffusion()
    condition: Condition = Condition()
    guide: Guide = Guide()
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer()
    ema: Averages = Averages()
    trainer: ScoredTrainer = ScoredTrainer()
    logger: Logger = Logger()

    @field_validator("sampling")
    @classmethod
    def _can_be_guided(cls, sampling: Sampling, info: ValidationInfo) -> Sampling:
        told, guide = info.data.get("condition"), info.data.get("guide")
        by = (told is None or getattr(told, "class") or told.parameters, guide is None or guide.max_steps)
        what = "guidance needs a guide (guide.max_steps) or a condition (condition.class or condition.parameters)"
        _check(sampling, sampling.guidance == 1 or any(by), what)
        unused = "a guide (guide.max_steps) is for nothing with guidance 1: set it to 1.25, say, or train none"
        return _check(sampling, sampling.guidance != 1 or guide is None or not guide.max_steps, unused)


class Paths(Block):
    """A teacher's ways from noise to a sample, solved anew at every step; the student learns where they end."""

    path: str | None = key(
        None,
        "data set whose conditions are asked for; null: the teacher's own; no teacher without conditions needs one",
    )
    batch_size: int = key(16, "paths a step, over all devices", ge=1)
    steps: int = key(6, "evaluations of the teacher a path", ge=2)
    points: int = key(3, "points of a path to learn from, of which its start is one", ge=1)


class FewSteps(Block):
    sampler: Literal["consistency"] = key("consistency", "of previews; published as the default")
    steps: int = key(2, "network evaluations a sample", ge=1)
    shift: float = key(3.0, "of the grid of times; with two steps: 1 goes back to t = 0.5, 3 to 0.75", gt=0)


class Distill(_Run):
    """configs/stage2/distill.yaml: a student that samples in one or two evaluations, taught by a trained model of stage 2."""

    data: Paths = Paths()  # type: ignore[assignment]
    teacher: str = key(..., "folder of a stage-2 run or model, which the student starts from", min_length=1)
    trust: str | None = key(None, "package on this machine whose code the teacher's backbone may be", min_length=1)
    sampling: FewSteps = FewSteps()
    optimizer: Optimizer = Optimizer(lr=1e-3, betas=(0.9, 0.95), warmup_steps=20)
    ema: EMA = EMA(decay=0.99)
    trainer: Trainer = Trainer(max_steps=300, validate_every=150, checkpoint_every=50)
    logger: Logger = Logger()


# --- quickstart -------------------------------------------------------------------------------------------------------


class QuickstartData(Block):
    preset: str = key("deeplense", "of the simulator, a file of configs/simulate")
    count: int = key(6000, "images to simulate", ge=8)
    path: str = key("data/quickstart", "folder to write", min_length=1)


class QuickstartStage(Block):
    config: str = key(..., "the stage's file, as for --config")
    overrides: dict[str, Any] = key({}, "merged over that file")


class Samples(Block):
    count: int = key(500, "lenses to generate", ge=1)
    steps: int = key(8, "network evaluations a lens", ge=1)


class Evaluation(Block):
    count: int = key(500, "lenses to judge", ge=1)
    fit: int = key(60, "of them, and of real ones, to fit lens models to", ge=0)


class Seconds(Block):
    """How long each part takes on two idle cores: the time left that is shown starts from here."""

    simulate: float = key(20, "simulation", gt=0)
    stage1: float = key(200, "training", gt=0)
    stage2: float = key(270, "training", gt=0)
    samples: float = key(10, "sampling", gt=0)
    evaluate: float = key(100, "scores and report", gt=0)


class Quickstart(Block):
    """From nothing to scored samples: simulate, train both stages, sample, evaluate."""

    name: Name = "quickstart"
    seed: int = key(0, "of the simulation and of both stages", ge=0, lt=2**32)
    output: str = key("checkpoints", "folder of runs", min_length=1)
    data: QuickstartData = QuickstartData()
    stage1: QuickstartStage = QuickstartStage(config="stage1/quickstart.yaml")
    stage2: QuickstartStage = QuickstartStage(
        config="stage2/quickstart.yaml",
        overrides={"guide": {"max_steps": 400, "backbone": {"width": 32}}, "sampling": {"guidance": 1.5}},
    )
    samples: Samples = Samples()
    evaluate: Evaluation = Evaluation()
    seconds: Seconds = Seconds()

    @field_validator("evaluate")
    @classmethod
    def _there_are_enough(cls, evaluate: Evaluation, info: ValidationInfo) -> Evaluation:
        # Scores compare with half of the test split, which is a fifth of the images: refused here, not after training.
        for block, part, what in (("samples", 1, "samples.count"), ("data", 10, "a tenth of data.count")):
            most = info.data[block].count // part if block in info.data else evaluate.count
            _check(evaluate, evaluate.count <= most, f"count {evaluate.count} is more than {most}, {what}")
        return evaluate

    def stages(self) -> tuple[Stage1, Stage2]:
        """The configs of both stages, linked: its seed, data and output folder, and stage 2 on stage 1's run.

        Their `overrides` win over these links. UserError as from `load_config`.
        """
        links = {"seed": self.seed, "output": self.output, "data": {"path": self.data.path}}
        first = merge({"name": f"{self.name}-stage1", **links}, self.stage1.overrides)
        stage1 = load_config(Stage1, [self.stage1.config], first, label="stage1.overrides")
        links["autoencoder"] = f"{stage1.output}/{stage1.name}"
        second = merge({"name": f"{self.name}-stage2", **links}, self.stage2.overrides)
        return stage1, load_config(Stage2, [self.stage2.config], second, label="stage2.overrides")


# --- ablations --------------------------------------------------------------------------------------------------------


class AblationData(Block):
    path: str = key("data/quickstart", "prepared data set of every cell", min_length=1)


class Budget(Block):
    """Of training stage 1, the same for every cell; neither: as the configs say."""

    steps: int | None = key(None, "optimiser steps", ge=1)
    tflop: float | None = key(
        None, "10^12 operations, three times those of the autoencoder's forward passes: fair to small nets", gt=0
    )

    @field_validator("tflop")
    @classmethod
    def _one(cls, tflop: float | None, info: ValidationInfo) -> float | None:
        return _check(tflop, tflop is None or info.data.get("steps") is None, "steps or tflop, not both")


class AblationScores(Block):
    count: int | None = key(None, "test images a side, of both stages; null: half of the test split", ge=2)
    steps: int | None = key(None, "network evaluations a sample; null: as the model of stage 2 says", ge=1)
    fit: int = key(0, "lens fits of reconstructions, and of samples; 0: none", ge=0)
    preset: str | None = key(None, "of those lens models; null: that of the simulation", min_length=1)


Overrides = dict[str, Any]


class Ablation(Block):
    """Cells that differ in a few keys: each is trained through both stages and scored, one row of a table."""

    name: Name = key("ablation", "the results and the runs of all cells are in <output>/<name>")
    seed: int = key(0, "of both stages of every cell", ge=0, lt=2**32)
    output: str = key("checkpoints", "folder of runs", min_length=1)
    data: AblationData = AblationData()
    stage1: QuickstartStage = QuickstartStage(config="stage1/quickstart.yaml")
    stage2: QuickstartStage | None = QuickstartStage(config="stage2/quickstart.yaml")
    budget: Budget = Budget()
    evaluate: AblationScores = AblationScores()
    cells: dict[Name, Overrides] = key(
        {}, "name: keys of stage 1 to change, dotted or in blocks; of stage 2 in `stage2`"
    )
    cross: dict[str, dict[Name, Overrides]] = key({}, "factor: level: such keys; all combinations of levels are cells")

    @field_validator("cross")
    @classmethod
    def _some(cls, cross: dict[str, dict[str, Overrides]], info: ValidationInfo) -> dict[str, dict[str, Overrides]]:
        if "cells" not in info.data:  # which is told already
            return cross
        cells, levels = info.data["cells"], list(cross.values())
        names = ["-".join(names) for names in itertools.product(*levels)] if levels else []
        twice = [name for name, n in Counter([*names, *cells]).items() if n > 1]
        _check(cross, not twice, f"two cells are called {', '.join(twice)}: rename a cell or a level")
        return _check(cross, bool(names or cells), "there are no cells: write some under `cells` or `cross`")

    def overrides(self) -> dict[str, Overrides]:
        """Every cell by name, with what it changes, in blocks."""
        found = {name: unfold(cell) for name, cell in self.cells.items()}
        for chosen in itertools.product(*(factor.items() for factor in self.cross.values())) if self.cross else ():
            cell: Overrides = {}
            for _, level in chosen:
                cell = merge(cell, unfold(level))
            found["-".join(name for name, _ in chosen)] = cell
        return found

    def stages(self, cell: str, max_steps: int | None = None) -> tuple[Stage1, Stage2 | None]:
        """The configs of a cell; max_steps takes the place of the budget's steps. UserError as from `load_config`."""
        changes = self.overrides()[cell]
        folder = f"{self.output}/{self.name}"
        links: Overrides = {"seed": self.seed, "output": folder, "data": {"path": self.data.path}}
        steps = max_steps or self.budget.steps
        budget: Overrides = {"trainer": {"max_steps": steps}} if steps else {}

        def resolved(
            schema: type[AnyRun], stage: QuickstartStage, more: Overrides, change: Overrides, label: str
        ) -> AnyRun:
            base = load_config(schema, [stage.config], merge(unfold(stage.overrides), more), label=label)
            # Over the whole base, whose blocks say their names, so that another name replaces all of a block.
            return load_config(schema, [], merge(base.model_dump(mode="json"), change), label=f"cell {cell}, {label}")

        second = changes.pop("stage2", {})
        if not isinstance(second, dict):
            raise UserError(f"cell {cell}: stage2 must be a block of keys of stage 2, not {second!r}")
        second = unfold(second)
        for change in (changes, second):
            data = change.get("data")
            shared = isinstance(data, dict) and "path" in data
            if own := [k for k in ("name", "output") if k in change] + ["data.path"] * shared:
                raise UserError(f"cell {cell}: {own[0]} is the same for all cells: say it once, above `cells`")
        stage1 = resolved(Stage1, self.stage1, {"name": f"{cell}-stage1", **merge(links, budget)}, changes, "stage1")
        if self.stage2 is None:
            return stage1, None
        links |= {"name": f"{cell}-stage2", "autoencoder": f"{stage1.output}/{stage1.name}"}
        return stage1, resolved(Stage2, self.stage2, links, second, "stage2")
