"""Draw lenses from a published model.

lens-ldm sample checkpoints/unet --count 64 --seed 0 --steps 8 --out samples
python stage2_diffusion/sample.py checkpoints/unet --count 64 --seed 0 --steps 8 --out samples

Writes samples.npz (images, seeds, metadata as a JSON string; loads without pickle) and grid.png (the same metadata in
its text chunk `parameters`). Lens k has the seed SEED + k, and is the same lens whatever else is drawn with it.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.checkpoint import versions
from shared.cli import guard, positive
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.files import make_folder
from shared.precision import check_device
from shared.registry import names
from shared.report import save_grid
from stage2_diffusion.generator import Generator

SHOWN = 64
SETTINGS = ("sampler", "steps", "shift", "eta")  # of sampling; a model has its own defaults
SEEDS = 2**32  # what torch's CPU generator tells apart


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "lens-ldm sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="folder of a run or of a published model")
    parser.add_argument("--count", type=positive, default=64, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default %(default)s)")
    add_settings(parser)
    parser.add_argument("--clean", action="store_true", help="without pixel noise")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder (default %(default)s)")
    a = parser.parse_args(argv)
    seeds = seed_range(a.seed, a.count)
    generator = Generator.from_pretrained(a.model, check_device(a.device), a.trust)
    settings = chosen_settings(a, generator)
    make_folder(a.out)
    started = time.perf_counter()
    images = draw(generator, seeds, observed=not a.clean, batch_size=a.batch_size, **settings)
    seconds = time.perf_counter() - started
    metadata = {
        "model": str(a.model), "weights_sha256": generator.config["sha256"], **settings, "observed": not a.clean,
        "first_seed": a.seed, "count": a.count, **generator.autoencoder.transform.to_config(),
        "device": str(generator.device), "lenses_per_second": round(a.count / seconds, 2), "versions": versions(),
    }  # fmt: skip
    save_samples(a.out, images, seeds, metadata)
    print(
        f"{a.out / 'samples.npz'}, {a.out / 'grid.png'}: {a.count} lenses in {seconds:.1f} s ({a.count / seconds:.1f} a second)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options of whatever draws samples: SETTINGS, the device, and whose code a model may run."""
    parser.add_argument("--steps", type=positive, help="evaluations of the network a lens (default: the model's)")
    parser.add_argument("--sampler", choices=names("sampler"), help="default: the model's")
    parser.add_argument("--shift", type=above_zero, help="of the grid of times; above 1: shorter steps at high noise")
    parser.add_argument("--eta", type=share, help="of ddim: 0 adds no noise on the way, 1 as much as ddpm")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    parser.add_argument(
        "--trust", metavar="PACKAGE", help="whose code on this machine a model may run for its backbone"
    )


def chosen_settings(options: argparse.Namespace, generator: Generator) -> dict[str, Any]:
    """SETTINGS as given, or else the model's own; `times` is its fitted grid where that is used."""
    return generator.settings(**{key: getattr(options, key) for key in SETTINGS})


def seed_range(first: int, count: int) -> range:
    if not 0 <= first <= SEEDS - count:
        raise UserError(f"--seed {first}: seeds run from 0 to {SEEDS - 1}, and {count} of them are needed")
    return range(first, first + count)


def draw(generator: Generator, seeds: range, progress: bool = True, **options: Any) -> Tensor:
    """`Generator.sample` with a progress bar in lenses a second: (N, C, H, W) on the CPU."""
    with tqdm(total=len(seeds), unit="lens", desc="sampling", disable=None if progress else True, leave=False) as bar:
        parts = []
        for chunk, images in generator.sample(seeds, **options):
            parts.append(images.cpu())
            bar.update(len(chunk))
    return torch.cat(parts)


def save_samples(folder: Path, images: Tensor, seeds: range, metadata: dict[str, Any]) -> None:
    """samples.npz and grid.png; the old ones stay until the new ones are whole."""
    temporary = folder / ".samples.tmp.npz"
    try:
        np.savez(
            temporary,
            images=images.numpy(),
            seeds=np.asarray(seeds, np.int64),
            metadata=np.asarray(json.dumps(metadata)),
        )
        os.replace(temporary, folder / "samples.npz")
        shown = PixelTransform.from_config(metadata).unit(images[:SHOWN])
        save_grid(folder / "grid.png", shown, columns=8, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write the samples to {folder}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def above_zero(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    guard(main)
