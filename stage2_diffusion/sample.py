"""Draw lenses from a published model.

lens-ldm sample checkpoints/unet --count 64 --seed 0 --steps 8 --out samples
python stage2_diffusion/sample.py checkpoints/unet --count 64 --seed 0 --steps 8 --out samples

Writes samples.npz (images, seeds, metadata as a JSON string; loads without pickle) and grid.png (the same metadata in
its text chunk `parameters`). Lens k has the seed SEED + k, and is the same lens whatever else is drawn with it.

Several processes or machines share the work: each is told `--shard 3/8` beside the same arguments, or torchrun starts
them. Each writes samples-3-of-8.npz, and the last one to finish joins all into samples.npz. The same command again draws
only the shards that are missing; once joined they can be deleted.
"""

import argparse
import json
import math
import os
import time
import zipfile
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
from shared.processes import rank, world
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
    parser.add_argument("--shard", type=shard, metavar="K/N", help="draw the K-th of N parts, K from 1 (see above)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute once, then faster on a GPU")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder (default %(default)s)")
    a = parser.parse_args(argv)
    seeds = seed_range(a.seed, a.count)
    part, parts = a.shard or (rank() + 1, world())
    if parts > a.count:
        raise UserError(f"{parts} shards of {a.count} lenses: some would be empty, ask for fewer shards")
    generator = Generator.from_pretrained(a.model, check_device(a.device), a.trust)
    settings = chosen_settings(a, generator)
    make_folder(a.out)
    request = {
        "model": str(a.model), "weights_sha256": generator.config["sha256"], **settings, "observed": not a.clean,
        "first_seed": a.seed, "count": a.count, **generator.autoencoder.transform.to_config(),
    }  # fmt: skip
    request = json.loads(json.dumps(request))  # as a file would give it back
    files = [a.out / (f"samples-{k}-of-{parts}.npz" if parts > 1 else "samples.npz") for k in range(1, parts + 1)]
    mine = files[part - 1]
    if parts > 1 and read_shard(mine, request) is not None:
        print(f"{mine} is complete")
    else:
        if a.compile:
            generator.denoiser.backbone.compile()
        own = seeds[len(seeds) * (part - 1) // parts : len(seeds) * part // parts]
        started = time.perf_counter()
        images = draw(generator, own, observed=not a.clean, batch_size=a.batch_size, **settings)
        seconds = time.perf_counter() - started
        speed = {"lenses_per_second": round(len(own) / seconds, 2)}
        metadata = {**request, "device": str(generator.device), **speed, "versions": versions()}
        save_samples(mine, {"images": images.numpy(), "seeds": np.asarray(own, np.int64)}, metadata)
        print(f"{mine}: {len(own)} lenses in {seconds:.1f} s ({len(own) / seconds:.1f} a second)")
    if parts > 1:
        join(files, request)


def shard(text: str) -> tuple[int, int]:
    """argparse's type of K/N: (K, N)."""
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 3/8")
    return int(k), int(n)


def read_shard(path: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The metadata of a shard, or None where there is none of this request."""
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return metadata if all(metadata.get(key) == value for key, value in request.items()) else None


def join(files: list[Path], request: dict[str, Any]) -> None:
    """Join shards to samples.npz beside them if all are there; whoever finishes last does."""
    found = [read_shard(file, request) for file in files]
    if missing := [file.name for file, metadata in zip(files, found, strict=True) if metadata is None]:
        print(f"{len(missing)} of {len(files)} shards are not there yet: {', '.join(missing[:8])}")
        return
    shards = [np.load(file, allow_pickle=False) for file in files]
    arrays = {key: np.concatenate([one[key] for one in shards]) for key in shards[0].files if key != "metadata"}
    speed = sum(metadata["lenses_per_second"] for metadata in found if metadata)
    whole = files[0].with_name("samples.npz")
    save_samples(whole, arrays, {**(found[0] or {}), "lenses_per_second": round(speed, 2)})
    print(f"{whole}: {len(arrays['seeds'])} lenses of {len(files)} shards")


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


def save_samples(path: Path, arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    """An .npz of samples and, of samples.npz, grid.png; the old ones stay until the new ones are whole.

    arrays   images (N, C, H, W) and what there is of each, such as its seed
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    try:
        np.savez(temporary, **arrays, metadata=np.asarray(json.dumps(metadata)))
        os.replace(temporary, path)
        if path.name == "samples.npz":
            shown = PixelTransform.from_config(metadata).unit(torch.from_numpy(arrays["images"][:SHOWN]))
            save_grid(path.with_name("grid.png"), shown, columns=8, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write the samples to {path.parent}: {error.strerror or error}") from error
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
