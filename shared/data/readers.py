"""`lens-ldm prepare SOURCE --out data/NAME`: what users have, made into a data cache.

SOURCE is a folder of .npy files, searched recursively, or a .zip of such a folder, one image a file, shaped
(1, H, W), (H, W) or (H, W, 1), of any float or integer type; or one .npy file of shape (N, H, W) or (N, 1, H, W).
Images keep their units, but for --normalise minmax. Class sub-folders become labels. An interrupted run goes on with
the same command.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from shared.data.cache import CacheWriter, LensImages, read_npy_header
from shared.data.normalise import CHOICES, Normalisation, hint
from shared.errors import UserError

LISTED = 10  # broken files named in an error
CHUNK_BYTES = 1 << 25

# Whatever a damaged file, archive or disk can raise between opening a member and holding its array.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Member(NamedTuple):
    """One file of a folder or of an archive."""

    name: str  # below SOURCE, with "/"
    size: int  # bytes
    stamp: int  # time of the last change, or checksum: differs when the content does
    open: Callable[[], IO[bytes]]


class Source(NamedTuple):
    """Images to be prepared: `read(i)` -> (1, H, W) float32, or ValueError saying what is wrong with image i."""

    request: dict  # identifies them, for resuming
    names: Sequence[str]
    shape: tuple[int, int, int]
    read: Callable[[int], np.ndarray]


def main(argv: list[str] | None = None) -> None:
    """The command line of `lens-ldm prepare`."""
    parser = argparse.ArgumentParser(prog="lens-ldm prepare", description="Make a data set out of .npy images.")
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder or .zip of .npy images, or one .npy of many"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="data/NAME", help="where to write the data set")
    parser.add_argument(
        "--normalise", default="none", metavar="HOW",
        help=f"between the data's units and the network's range: {CHOICES} (default %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    prepare(arguments.source, arguments.out, arguments.normalise)


def prepare(source: Path, out: Path, normalise: str = "none") -> LensImages:
    """Check the images of `source`, write them to a cache at `out`, print a summary, return the open cache.

    Raises one UserError that names every kind of fault found, the first ten faulty files and how many there are.
    """
    started = time.monotonic()
    normalisation = Normalisation.parse(normalise)
    try:
        opened = open_source(Path(source), Path(out))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror or error}") from error
    shape, count = opened.shape, len(opened.names)
    chunk = max(1, min(256, CHUNK_BYTES // (4 * math.prod(shape))))
    writer = CacheWriter(Path(out), count, shape, opened.request, chunk, normalisation)
    pending = writer.pending()
    faults: list[str] = []
    with tqdm(total=count, initial=count - sum(map(len, pending)), unit="image", desc=str(out), disable=None) as bar:
        for indices in pending:
            images = np.empty((len(indices), *shape), np.float32)
            for row, i in enumerate(indices):
                try:
                    images[row] = normalisation.check(opened.read(i))
                except _UNREADABLE as error:
                    faults.append(f"{opened.names[i]}: {_reason(error)}")
                bar.update()
            if not faults:  # the rest is read to the end only to name every fault
                writer.write(indices, images)
    if faults:
        writer.discard()
        raise _fault_error(source, faults, count)
    classes, labels = class_labels(opened.names)
    known = writer.complete
    writer.finish(classes=classes, labels=labels, files=list(opened.names))
    dataset = LensImages(out)
    _print_summary(dataset, "was already prepared" if known else f"written in {time.monotonic() - started:.0f} s")
    return dataset


def open_source(path: Path, out: Path) -> Source:
    """Find and check the images at `path` by their headers alone; raises UserError, see `prepare`."""
    if not path.exists():
        raise UserError(f"no such folder or file: {path}")
    if path.is_dir():
        if out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--out {out} lies inside SOURCE {path}, and would be read as images: choose another --out")
        return _image_per_file(path, "folder", _folder_members(path))
    if path.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is not a zip archive ({error}): is its download complete?") from error
        found = [Member(i.filename, i.file_size, i.CRC, partial(archive.open, i)) for i in archive.infolist()]
        return _image_per_file(path, "zip", found)
    if path.suffix.lower() == ".npy":
        return _images_in_one_file(path)
    raise UserError(f"{path} cannot be read: give a folder or a .zip of .npy images, or one .npy of shape (N, H, W)")


def _folder_members(root: Path) -> Iterator[Member]:
    def fail(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(root, onerror=fail, followlinks=True):
        here = Path(top).resolve()
        folders[:] = [name for name in folders if (here / name).resolve() not in (here, *here.parents)]  # no loops
        for path in (Path(top, name) for name in files if _is_image(name)):
            status = path.stat() if path.exists() else path.lstat()  # a dangling link is reported with the broken files
            relative = path.relative_to(root).as_posix()
            yield Member(relative, status.st_size, status.st_mtime_ns, _opener(path))


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _image_per_file(path: Path, kind: str, found: Iterable[Member]) -> Source:
    members = sorted((m for m in found if _is_image(m.name)), key=lambda member: natural_key(member.name))
    if not members:
        raise UserError(f"no .npy files in {path}")
    faults, shapes = [], {}
    for member in tqdm(members, unit="file", desc=f"checking {path}", disable=None, leave=False):
        try:
            shapes[member.name] = _image_shape(_checked_header(member))
        except _UNREADABLE as error:
            faults.append(f"{member.name}: {_reason(error)}")
    kinds = Counter(shapes.values())
    first = {shape: name for name, shape in reversed(shapes.items())}
    mixed = [f"{n} of {shape} such as {first[shape]}" for shape, n in kinds.most_common()]
    if faults or len(mixed) > 1:
        raise _fault_error(path, faults, len(members), mixed)
    shape = next(iter(kinds))

    def read(i: int) -> np.ndarray:
        with members[i].open() as stream:
            image = np.lib.format.read_array(stream, allow_pickle=False)
        if _image_shape(image.shape) != shape:
            raise ValueError("changed while it was read")
        return _finite(image.reshape(shape))

    return Source(_request(path, kind, members), [member.name for member in members], shape, read)


def _images_in_one_file(path: Path) -> Source:
    status = path.stat()
    member = Member(path.name, status.st_size, status.st_mtime_ns, _opener(path))
    try:
        stored = _checked_header(member)
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    if len(stored) not in (3, 4) or (len(stored) == 4 and stored[1] != 1) or min(stored) < 1:
        raise UserError(f"{path} has shape {stored}: one file of many images is (N, H, W) or (N, 1, H, W)")
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (1, stored[-2], stored[-1])
    names = [f"{path.name}[{i}]" for i in range(stored[0])]
    return Source(_request(path, "npy", [member]), names, shape, lambda i: _finite(images[i].reshape(shape)))


def class_labels(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The classes, in natural order, and each file's index into them: its first folder, or "none" outside of any.

    A lone folder that holds folders and nothing else, as archives often have, is seen through.
    """
    parts = [name.split("/") for name in names]
    while all(len(p) > 2 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    of_each = [p[0] if len(p) > 1 else "none" for p in parts]
    classes = sorted(set(of_each), key=natural_key)
    place = {name: i for i, name in enumerate(classes)}
    return classes, [place[name] for name in of_each]


def natural_key(name: str) -> tuple:
    """Sort key that puts sample2 before sample10."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def _is_image(name: str) -> bool:
    parts = name.split("/")  # macOS and notebooks leave copies under __MACOSX, ._x.npy, .ipynb_checkpoints
    return name.lower().endswith(".npy") and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _checked_header(member: Member) -> tuple[int, ...]:
    with member.open() as stream:
        shape, _, dtype, offset = read_npy_header(stream)
    if dtype.hasobject:
        raise ValueError("is a pickled object array, which can run code and is not loaded: save it as plain numbers")
    if dtype.kind not in "fiu":
        raise ValueError(f"holds {dtype}, not real numbers")
    expected = offset + dtype.itemsize * math.prod(shape)
    if member.size < expected:
        raise ValueError(f"is truncated ({member.size} of {expected} bytes)")
    if member.size > expected:
        raise ValueError(f"has {member.size - expected} bytes after its array: more than one array was saved to it")
    return shape


def _image_shape(stored: tuple[int, ...]) -> tuple[int, int, int]:
    if len(stored) == 3 and 1 in (stored[0], stored[2]):
        height, width = stored[1:] if stored[0] == 1 else stored[:2]
    elif len(stored) == 2:
        height, width = stored
    else:
        raise ValueError(f"has shape {stored}, not (1, H, W), (H, W) or (H, W, 1)")
    if min(height, width) < 1:
        raise ValueError(f"has no pixels, shape {stored}")
    return 1, height, width


def _finite(image: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise ValueError(f"has {np.count_nonzero(~np.isfinite(image))} pixels that are NaN or infinite in float32")
    return image


def _request(path: Path, kind: str, members: Sequence[Member]) -> dict:
    digest = hashlib.sha256()
    for member in members:
        digest.update(f"{member.name}\0{member.size}\0{member.stamp}\n".encode(errors="surrogateescape"))
    return {"kind": kind, "name": path.resolve().name, "files": len(members), "fingerprint": digest.hexdigest()[:16]}


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__


def _fault_error(path: Path, faults: Sequence[str], count: int, mixed: Sequence[str] = ()) -> UserError:
    parts = []
    if faults:
        more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:LISTED])
        parts.append(f"{len(faults)} of {count} images in {path} cannot be used; repair or remove them:{listed}{more}")
    if len(mixed) > 1:
        shown = ", ".join(mixed[:LISTED]) + (", ..." if len(mixed) > LISTED else "")
        parts.append(f"the images in {path} differ in shape ({shown}): a data set has one shape, prepare them apart")
    return UserError("\n".join(parts))


def _print_summary(dataset: LensImages, done: str) -> None:
    index, statistics = dataset.index, dataset.index["statistics"]
    if constant := statistics["constant_images"]:
        print(f"warning: {constant} images are constant, one value in every pixel; they were kept", file=sys.stderr)
    per_class = np.bincount(index["labels"], minlength=len(index["classes"]))
    shown = ", ".join(f"{name} {n}" for name, n in zip(index["classes"], per_class, strict=True))
    classes = f"classes: {shown}" if len(per_class) <= LISTED else f"{len(per_class)} classes"
    duplicates = len(dataset) - len(set(index["hashes"]))
    print(
        f"{dataset.path} {done}: {len(dataset)} images {dataset.image_shape}, {dataset.transform}, "
        f"{classes}; {duplicates} duplicates"
    )
    print("splits: " + ", ".join(f"{name} {len(dataset.split(name))}" for name in index["split"]["fractions"]))
    print(", ".join(f"{key} {statistics[key]:.4g}" for key in ("mean", "std", "median", "min", "max")))
    if advice := hint(dataset.transform, statistics):
        print(f"hint: {advice}", file=sys.stderr)
