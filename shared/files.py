"""Files: written so that nothing half-written is ever found, known by their hash."""

import contextlib
import csv
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except IsADirectoryError as error:
        raise UserError(f"cannot write {path}: there is a folder of that name") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path, option: str = "--out") -> None:
    """A folder for results, made before the work whose results they are. UserError, which names the option that chose it,
    if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another {option}") from error


def require_name(out: Path) -> None:
    """UserError for a path such as `.`, which has no name that OUT.png could be made of."""
    if not out.name:
        raise UserError(f"--out {out} is no name for files: give one, such as --out {out / 'result'}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this lock is this process's alone meanwhile; with `wait` it is, once no other's.

    It goes with the process, however that ends; where the system or the file system has no locks, whoever asks has it.
    """
    with open(path, "a") as file:
        mine = True
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            mine = not isinstance(error, BlockingIOError)
        yield mine


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resumed(path: Path, about: Mapping[str, Any], key: str) -> Any:
    """What a JSON file holds under `key`, or None if there is none. UserError if it was made of something else than `about`."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        found = content[key]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, or choose another --out") from error
    if changed := [name for name, value in about.items() if content.get(name) != value]:
        raise UserError(f"{path} is of another {changed[0]}: choose another --out, or delete it")
    return found


def read_csv(path: Path, example: str) -> dict[str, list[str]]:
    """{name: its cells, stripped, one a line} of a CSV file whose first line has the names, such as `example`.

    UserError if it cannot be read, lacks names or lines, or has a line of another length; empty lines are passed over.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            (_, header), *lines = [(reader.line_num, row) for row in reader if row] or [(0, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    names = [name.strip() for name in header]
    if not lines or len(set(names)) < len(names):
        raise UserError(f"{path} needs a line of names, each once, such as {example}, and lines of values below it")
    if wrong := [number for number, row in lines if len(row) != len(names)]:
        raise UserError(f"{path}, line {wrong[0]}: has other columns than the first line")
    return {name: [row[k].strip() for _, row in lines] for k, name in enumerate(names)}


DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what a file that is no .npz raises


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a file that people read as it is, too; the header first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
