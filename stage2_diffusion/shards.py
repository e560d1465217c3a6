"""Files of samples, whole or in shards that several processes draw: never all in memory, never found half written.

What is drawn goes into a folder `unfinished-HASH` beside the results, a piece at a time; HASH is that of the request, so the
same request goes on with the pieces that are missing, and another one has a folder of its own. When all of it is there, the
results are written in that folder and moved to their places, and it is removed.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shared.data.export import FORMATS, Stack, columns_csv, png_scale, stored_rows
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.files import DAMAGED, claimed, sync_folder, write_atomically
from shared.report import save_grid

SHOWN = 64
SPEED = "lenses_per_second"
SIDECAR = "samples.json"


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
    except DAMAGED:
        return None
    return metadata if all(metadata.get(key) == value for key, value in request.items()) else None


class Pieces:
    """The rows of an array of n, drawn in pieces, each a file (FIRST-STOP.npz) that is there whole or not at all."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> dict[range, Path]:
        return {range(*map(int, file.stem.split("-"))): file for file in sorted(self.folder.glob("*.npz"))}

    def gaps(self) -> list[range]:
        """The rows that are missing."""
        ends = [0, *(end for rows in self.files() for end in (rows.start, rows.stop)), self.n]
        return [range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]

    def add(self, first: int, rows: np.ndarray, seconds: float) -> None:
        """rows (m, ...), which took so long; when this returns, they survive a kill and a power cut."""
        buffer = io.BytesIO()
        np.savez(buffer, rows=np.ascontiguousarray(rows), seconds=np.array([seconds]))
        write_atomically(self.folder / f"{first:010d}-{first + len(rows):010d}.npz", buffer.getvalue())

    def blocks(self) -> Iterator[np.ndarray]:
        return _rows(list(self.files().values()), "rows")

    def seconds(self) -> float:
        """All pieces together took, whenever that was."""
        return sum(float(seconds[0]) for seconds in _rows(list(self.files().values()), "seconds"))


def _rows(files: list[Path], name: str) -> Iterator[np.ndarray]:
    for file in files:
        try:
            yield from stored_rows([file], name)
        except DAMAGED as error:
            raise UserError(f"{file} is damaged ({error}): delete it and run the same command again") from error


def stack_of(files: list[Path], metadata: list[dict[str, Any]]) -> Stack:
    """The samples of some .npz one after the other, with their metadata."""
    with zipfile.ZipFile(files[0]) as shard:
        names = [name.removesuffix(".npy") for name in shard.namelist()]
    columns = {k: np.concatenate([*_rows(files, k)]) for k in names if k not in ("images", "metadata")}
    about = {key: value for key, value in metadata[0].items() if key != SPEED}
    speed = round(sum(one[SPEED] for one in metadata), 2)
    shape = (len(columns["seeds"]), *next(_rows(files, "images")).shape[1:])
    return Stack(shape, lambda: _rows(files, "images"), columns, about, {SPEED: speed})


def folder_of(out: Path, request: dict[str, Any], part: str = "") -> Path:
    """Where the pieces of a request are kept."""
    digest = hashlib.sha256(f"{json.dumps(request, sort_keys=True)} {part}".encode()).hexdigest()
    return out / f"unfinished-{digest[:12]}"


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full or broken disk in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the samples to {out}: {error.strerror or error}; what is drawn is kept, and the same command "
            "goes on"
        ) from error


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Whether this process alone has the folder, which is made; until the end, which a kill is, too."""
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / "lock") as mine:
        yield mine


class Results:
    """What of a request is in a folder already, by the metadata of samples.npz and by samples.json of all other files.

    request   what tells these samples from others
    """

    def __init__(self, out: Path, request: dict[str, Any]) -> None:
        self.out, self.request = out, request
        try:
            found = json.loads((out / SIDECAR).read_text())
            files = dict(found["files"]) if all(found.get(k) == v for k, v in request.items()) else {}
        except (OSError, ValueError, KeyError, TypeError):
            files = {}
        self._files: dict[str, dict[str, Any]] = {name: how for name, how in files.items() if (out / name).exists()}

    def has(self, name: str, **how: Any) -> bool:
        """Whether a file is there and was made so."""
        if name == "samples.npz":
            return read_shard(self.out / name, self.request) is not None
        return name in self._files and how.items() <= self._files[name].items()

    def require_place(self, name: str) -> None:
        """UserError if a folder of that name holds more than samples: it would be replaced."""
        target = self.out / name
        names = target.iterdir() if target.is_dir() else ()
        if strange := sorted(p.name for p in names if p.suffix != ".png" or not p.stem.isdecimal()):
            raise UserError(f"{target} holds {strange[0]}, which is no sample: choose another --out")

    def place(self, made: Path, name: str, about: dict[str, Any], **how: Any) -> None:
        """Move a finished file, or folder, to its place, and note down how it was made."""
        target = self.out / name
        if made.is_file():
            with open(made, "rb+") as opened:
                os.fsync(opened.fileno())
        elif hasattr(os, "sync"):  # thousands of files at once, and not one by one
            os.sync()
        if target.is_dir():
            self.require_place(name)
            shutil.rmtree(target)
        os.replace(made, target)
        sync_folder(self.out)
        if target.suffix != ".npz":  # those tell it themselves
            self._files[name] = how
            write_atomically(
                self.out / SIDECAR, (json.dumps({**about, "files": self._files}, indent=1) + "\n").encode()
            )


def write_samples(results: Results, formats: list[str], stack: Stack, work: Path, npz: str = "samples.npz") -> None:
    """Samples in each format, and grid.png of the first; the old ones stay until the new ones are whole.

    npz   the name of the .npz, which of a shard is another
    """
    if {"npy", "png"} & set(formats):
        write_atomically(results.out / "samples.csv", columns_csv(stack))
    if npz == "samples.npz":
        first = torch.from_numpy(np.concatenate([*first_of(stack.blocks(), SHOWN)]))
        metadata = {**stack.about, **stack.measured}
        save_grid(results.out / "grid.png", PixelTransform.from_config(metadata).unit(first), metadata=metadata)
    for key in formats:
        usual, write = FORMATS[key]
        name = npz if key == "npz" else usual
        made = work / f"writing-{name}"
        if made.is_dir():  # of a process that was killed
            shutil.rmtree(made)
        with tqdm(total=stack.shape[0], unit="lens", desc=f"writing {name}", disable=None, leave=False) as bar:
            write(made, replace(stack, blocks=partial(_told, stack, bar)))
        size = sum(file.stat().st_size for file in (made.iterdir() if made.is_dir() else [made]))
        how = dict(zip(("low", "high"), png_scale(stack), strict=True)) if key == "png" else {}
        results.place(made, name, stack.about, **how)
        print(f"{results.out / name}: {stack.shape[0]} lenses, {size / 1e6:.1f} MB")


def _told(stack: Stack, bar: tqdm) -> Iterator[np.ndarray]:
    for block in stack.blocks():
        yield block
        bar.update(len(block))


def first_of(blocks: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first rows of some blocks."""
    for block in blocks:
        yield block[:count]
        if (count := count - len(block)) <= 0:
            return


def join(files: list[Path], request: dict[str, Any], formats: list[str]) -> None:
    """Join shards to samples.npz beside them, or other formats, if all are there; whoever finishes last does."""
    found = [read_shard(file, request) for file in files]
    metadata = [one for one in found if one is not None]
    if missing := [file.name for file, one in zip(files, found, strict=True) if one is None]:
        print(f"{len(missing)} of {len(files)} shards are not there yet: {', '.join(missing[:8])}")
        return
    results = Results(files[0].parent, request)
    work = folder_of(results.out, request, "join")
    with hold(work) as ours:
        if not ours:
            print(f"another process joins the {len(files)} shards")
            return
        write_samples(results, formats, stack_of(files, metadata), work)
        shutil.rmtree(work, ignore_errors=True)
