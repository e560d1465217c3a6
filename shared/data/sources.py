"""What is at a path: a folder, an archive or one file, read as one sequence of images of one shape.

Files of a folder or a .zip come in natural order, searched recursively; their first folder is their class. An archive
is read in place. Nothing here knows a format (shared/data/formats.py) or writes anything (shared/data/prepare.py).
"""

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from shared.data.formats import FORMATS, UNITS, Images, Member, Part, open_images, suffix
from shared.errors import UserError

NO_CLASS = "none"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")


class Broken(NamedTuple):
    """An image, or a file of them, that cannot be used."""

    name: str
    kind: str  # one of KINDS
    reason: str  # completes a sentence that begins with the name


KINDS = UNREADABLE, DAMAGED, SHAPE, NOT_FINITE, CONSTANT, BEYOND = (
    "unreadable",
    "of a damaged archive",
    "of another shape",
    "with NaN or infinity",
    "constant",
    "beyond the stated range",
)


class BrokenImage(ValueError):
    """Says what is wrong with an image."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


class _File(NamedTuple):
    member: Member
    shape: tuple[int, int, int]
    parts: tuple[Part, ...]
    labels: list[str] | None
    parameters: dict[str, float]


class Source:
    """The images at a path: `read(i)` is the i-th, (C, H, W) float32. Close it, or use it in a `with` statement.

    path    a folder, a .zip or one file
    key     which array of a file, see `formats.open_images`
    labels  which array of a file holds the classes of its images
    only    suffix of the files to read, where a folder holds several formats

    Opening it reads the headers of all files, and leaves it with
    shape   (C, H, W) of most images
    broken  the files that cannot be used by their headers alone, those of another shape among them
    request identifies the images, for resuming

    Raises UserError if there is nothing to read or a choice is missing.
    """

    def __init__(self, path: Path, *, key: str | None = None, labels: str | None = None, only: str | None = None):
        self.path, self._key, self._label_key = path, key, labels
        self._archive, self._opened = ExitStack(), ExitStack()
        self._current: tuple[int, Images] | None = None
        options = {"key": key, "labels": labels, "only": only}
        try:
            kind, members = self._find(only)
            self._alone = len(members) == 1
            self.request = _request(path, kind, members) | {k: v for k, v in options.items() if v is not None}
            self._files, self.broken = self._read_headers(members)
        except OSError as error:
            self.close()
            raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise
        shapes: Counter[tuple[int, int, int]] = Counter()
        for file in self._files:
            shapes[file.shape] += sum(part.length for part in file.parts)
        self.shapes = shapes.most_common()
        self.shape = self.shapes[0][0] if shapes else (0, 0, 0)
        for file in self._files:
            if file.shape != self.shape:
                said = f"has images of shape {file.shape}, most are {self.shape}"
                self.broken.append(Broken(file.member.name, SHAPE, said))
        self._files = [file for file in self._files if file.shape == self.shape]
        self._starts = np.cumsum([0, *(sum(part.length for part in file.parts) for file in self._files)])
        self._kept = np.arange(self._starts[-1])

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._opened.close()
        self._archive.close()

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, i: int) -> np.ndarray:
        """Image i, finite and not constant; raises BrokenImage if it is not so."""
        try:
            image = self._read(*self._place(i))
            if image.shape != self.shape:
                raise ValueError("changed while it was read")
            stored = image
            with np.errstate(over="ignore"):
                image = image.astype(np.float32)
        except zipfile.BadZipFile as error:
            raise BrokenImage(DAMAGED, reason_of(error)) from error
        except Exception as error:  # a damaged file or disk raises anything
            raise BrokenImage(UNREADABLE, reason_of(error)) from error
        if not np.isfinite(image).all():
            wrong = np.count_nonzero(~np.isfinite(image))
            raise BrokenImage(NOT_FINITE, f"has {wrong} pixels that are NaN or infinite in float32")
        if image.min() == image.max():
            if stored.min() != stored.max():
                raise BrokenImage(
                    CONSTANT, f"has a contrast that float32 cannot hold beside {image.flat[0]:g}: subtract that"
                )
            raise BrokenImage(CONSTANT, f"is constant, {image.flat[0]:g} in every pixel")
        return image

    def name(self, i: int) -> str:
        """The file of image i, with [number] or [array] where it holds several."""
        file, place = self._place(i)
        name = self._files[file].member.name
        for part in self._files[file].parts:
            if place < part.length:
                return name + (f"[{part.name}]" if part.name else "") + (f"[{place}]" if part.numbered else "")
            place -= part.length
        raise IndexError(i)

    def leave_out(self, broken: Iterable[Broken]) -> list[Broken]:
        """Renumber the images without these, and say which are gone.

        A checksum that fails speaks for its whole file, though it is the last image of it that raises.
        """
        known = {image.name: image for image in broken}
        places, names = [self._place(i)[0] for i in range(len(self))], [self.name(i) for i in range(len(self))]
        damaged = {k: known[n] for k, n in zip(places, names, strict=True) if n in known and known[n].kind == DAMAGED}
        keep = np.ones(len(self), dtype=bool)
        gone = []
        for i, (k, name) in enumerate(zip(places, names, strict=True)):
            if found := known.get(name) or damaged.get(k):
                keep[i] = False
                gone.append(found._replace(name=name))
        self._kept = self._kept[keep]
        return gone

    def classes(self) -> tuple[list[str], list[int]]:
        """The class names, in natural order, and each image's index into them.

        The class of an image is what its file says (`labels`), or else its first folder, see `class_labels`.
        """
        of_folder, folder = class_labels([file.member.name for file in self._files])
        names = []
        for file, place in map(self._place, range(len(self))):
            labels = self._files[file].labels
            names.append(labels[place] if labels else of_folder[folder[file]])
        classes = sorted(set(names), key=natural_key)
        index = {name: i for i, name in enumerate(classes)}
        return classes, [index[name] for name in names]

    def parameters(self) -> dict[str, dict]:
        """What the files hold beside their images, as `CacheWriter.finish` takes it; NaN where a file has no such."""
        found = sorted({key for file in self._files for key in file.parameters})
        places = [self._place(i)[0] for i in range(len(self))] if found else []
        values = {key: [self._files[k].parameters.get(key, np.nan) for k in places] for key in found}
        return {key: {"unit": UNITS[key], "values": values[key]} for key in found}

    def _place(self, i: int) -> tuple[int, int]:
        """Which file image i is in, and its place there."""
        whole = int(self._kept[i])
        file = int(np.searchsorted(self._starts, whole, side="right")) - 1
        return file, whole - int(self._starts[file])

    def _read(self, file: int, place: int) -> np.ndarray:
        if self._current is None or self._current[0] != file:
            self._opened.close()
            self._current = None
            opened = open_images(self._files[file].member, self._alone, self._key, self._label_key)
            self._current = file, self._opened.enter_context(opened)
        return self._current[1].read(place)

    def _find(self, only: str | None) -> tuple[str, list[Member]]:
        path = self.path
        if only is not None and (only := f".{only.lstrip('.').lower()}") not in FORMATS:
            raise UserError(f"--only {only} is no format; choose one of {' '.join(FORMATS)}")
        if not path.exists():
            raise UserError(f"no such folder or file: {path}")
        if path.is_dir():
            return "folder", self._of_one_format(_folder_members(path), only)
        if path.suffix.lower() == ".zip":
            try:
                archive = self._archive.enter_context(zipfile.ZipFile(path))
            except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
                raise UserError(f"{path} is not a zip archive ({error}): is its download complete?") from error
            found = (i for i in archive.infolist() if not i.is_dir() and _is_meant(i.filename))
            members = [Member(i.filename, i.file_size, i.CRC, partial(archive.open, i), True) for i in found]
            return "zip", self._of_one_format(members, only)
        if suffix(path.name) not in FORMATS:
            raise UserError(f"{path} cannot be read: give a folder, a .zip, or one file of {' '.join(FORMATS)}")
        status = path.stat()
        alone = Member(path.name, status.st_size, status.st_mtime_ns, _opener(str(path)), False)
        return suffix(path.name)[1:], [alone]

    def _of_one_format(self, found: Iterable[Member], only: str | None) -> list[Member]:
        by_suffix: dict[str, list[Member]] = {}
        for member in found:
            by_suffix.setdefault(suffix(member.name), []).append(member)
        chosen = {only: by_suffix.get(only, [])} if only else {k: v for k, v in by_suffix.items() if k in FORMATS}
        there = ", ".join(f"{len(members)} {ending or 'without suffix'}" for ending, members in by_suffix.items())
        if not any(chosen.values()):
            raise UserError(f"no images in {self.path} ({there or 'it is empty'}): {' '.join(FORMATS)} are read")
        if len({FORMATS[ending] for ending in chosen}) > 1:
            raise UserError(
                f"{self.path} holds several formats ({there}): choose one with --only, as --only {min(chosen)}"
            )
        members = [member for of_suffix in chosen.values() for member in of_suffix]
        return sorted(members, key=lambda member: natural_key(member.name))

    def _read_headers(self, members: Sequence[Member]) -> tuple[list[_File], list[Broken]]:
        files, broken, silent = [], [], len(members) == 1
        for member in tqdm(members, unit="file", desc=f"checking {self.path}", disable=silent or None, leave=False):
            try:
                with open_images(member, self._alone, self._key, self._label_key) as images:
                    parts = _SINGLE if images.parts == _SINGLE else images.parts  # one tuple for 100,000 files
                    files.append(_File(member, images.shape, parts, images.labels, images.parameters))
            except UserError:
                raise
            except Exception as error:  # a damaged file raises anything
                broken.append(Broken(member.name, UNREADABLE, reason_of(error)))
        return files, broken


_SINGLE = (Part("", 1, False),)


def _folder_members(root: Path) -> Iterator[Member]:
    def fail(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(root, onerror=fail, followlinks=True):
        here = Path(top).resolve()
        folders[:] = [name for name in folders if (here / name).resolve() not in (here, *here.parents)]  # no loops
        for path in (Path(top, name) for name in files):
            relative = path.relative_to(root).as_posix()
            if not _is_meant(relative):
                continue
            status = path.stat() if path.exists() else path.lstat()  # a dangling link is reported with the broken files
            yield Member(relative, status.st_size, status.st_mtime_ns, _opener(str(path)), False)


def _opener(path: str) -> Callable[[], IO[bytes]]:
    return lambda: open(path, "rb")


def class_labels(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The classes, in natural order, and each file's index into them: its first folder, or "none" outside of any.

    Seen through are a lone folder around everything, as archives often have, and folders named after splits (train, val,
    test) that hold folders: a split is made by content here, whatever it was before.
    """
    parts = [name.split("/") for name in names]
    while all(len(p) > 2 and p[0] == parts[0][0] for p in parts) or all(
        len(p) > 2 and p[0].casefold() in SPLITS for p in parts
    ):
        parts = [p[1:] for p in parts]
    # A name that is no text, as old archives have, must be printable.
    of_each = [
        p[0].encode(errors="surrogateescape").decode(errors="replace") if len(p) > 1 else NO_CLASS for p in parts
    ]
    classes = sorted(set(of_each), key=natural_key)
    place = {name: i for i, name in enumerate(classes)}
    return classes, [place[name] for name in of_each]


def natural_key(name: str) -> tuple:
    """Sort key that puts sample2 before sample10."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line of reasonable length."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(said.split()) or type(error).__name__
    return line if len(line) <= 240 else f"{line[:237]}..."


def _is_meant(name: str) -> bool:
    # macOS and notebooks leave copies under __MACOSX, ._x.npy, .ipynb_checkpoints
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _request(path: Path, kind: str, members: Sequence[Member]) -> dict:
    digest = hashlib.sha256()
    for member in members:
        digest.update(f"{member.name}\0{member.size}\0{member.stamp}\n".encode(errors="surrogateescape"))
    return {"kind": kind, "name": path.resolve().name, "files": len(members), "fingerprint": digest.hexdigest()[:16]}
