"""Files of samples, whole or in shards that several processes draw: written so that none is ever found half."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.report import save_grid

SHOWN = 64


def shard_files(folder: Path, parts: int) -> list[Path]:
    """Where each of so many shards goes; a single one is the whole."""
    if parts == 1:
        return [folder / "samples.npz"]
    return [folder / f"samples-{k}-of-{parts}.npz" for k in range(1, parts + 1)]


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
