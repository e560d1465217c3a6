"""One data set on disk, written once and read by everything.

data/<name>/images.npy   (N, C, H, W) float32, a plain .npy file, memory-mapped; in the data set's own units
data/<name>/index.json   source, normalisation, range, transform, statistics, classes, labels, parameters, files, hashes,
                         split

`CacheWriter` writes such a folder chunk by chunk and goes on where it was interrupted; `LensImages` reads it;
`StepSampler` says which images the batch of a step holds. `lens-ldm prepare` (shared/data/prepare.py) and
`lens-ldm simulate` (shared/simulate/run.py) are the two ways to make one.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from shared.data.normalise import Normalisation, PixelTransform, rescale, restore, sky
from shared.errors import UserError
from shared.files import write_atomically

FORMAT = 1
SPLIT = {"train": 0.75, "validation": 0.05, "test": 0.20}
IMAGES, INDEX = "images.npy", "index.json"
# An unfinished cache carries these two names instead, so that it cannot be taken for a finished one.
PARTIAL, PROGRESS = "images.npy.partial", "progress.json"
LIMITS, LIMITS_SIZE = "limits.partial", 16  # beside them under `minmax`: each image's low and high, float64
MEDIAN_PIXELS = 1 << 20
AGAIN = "delete the folder and prepare it again"
NONE = Normalisation()


class CacheWriter:
    """Write a cache in chunks; after a kill at any moment the same request goes on with the chunks that are missing.

    folder       data/<name>; new, empty, or holding a cache of the same request
    count        number of images
    image_shape  (C, H, W)
    source       JSON-able, identifies the request: kind, every number, seed
    chunk        images a write; an interrupted cache keeps the chunk it began with
    normalise    between the data's units and the network's range; part of the request

    Raises UserError if the folder holds anything else, cannot be written, or the disk is too small.
    """

    complete: bool

    def __init__(
        self,
        folder: Path,
        count: int,
        image_shape: tuple[int, int, int],
        source: dict,
        chunk: int = 256,
        normalise: Normalisation = NONE,
    ):
        if count < 1:
            raise UserError(f"a data set of {count} images cannot be written to {folder}: ask for at least 1")
        self.folder, self.count, self.image_shape, self.chunk = Path(folder), count, tuple(image_shape), chunk
        self._normalise = normalise
        request = {"count": count, "image_shape": self.image_shape, "source": source, "normalisation": str(normalise)}
        self._request = json.loads(json.dumps(request))  # tuples become lists, as they will when read back
        self._header = _npy_header_bytes((count, *self.image_shape))
        self._done: set[int] = set()
        self.complete = False
        with self._disk_errors():
            self._open()

    def pending(self) -> list[range]:
        """The chunks not yet written, as ranges of image indices."""
        if self.complete:
            return []
        return [self._range(i) for i in range(0, self.count, self.chunk) if i not in self._done]

    def write(self, indices: range, images: np.ndarray) -> None:
        """Store one pending chunk; when this returns, the chunk survives a kill and a power cut.

        images  (len(indices), C, H, W), finite, in the data's own units; each one passes `Normalisation.check`
        """
        if self.complete or indices.start in self._done or indices != self._range(indices.start):
            raise ValueError(f"{indices} is not a pending chunk of {self.folder}")
        if images.shape != (len(indices), *self.image_shape):
            raise ValueError(f"chunk {indices} has shape {images.shape}, not {(len(indices), *self.image_shape)}")
        images = np.ascontiguousarray(images, dtype="<f4")
        if not np.isfinite(images).all():
            raise ValueError(f"chunk {indices} holds NaN or infinity")
        limits = None
        if self._normalise.name == "minmax":
            images, limits = rescale(images)
        # Ordinary writes and not a memory map: a full disk is then an OSError, where a map would die of SIGBUS.
        with self._disk_errors():
            if limits is not None:
                (self.folder / LIMITS).touch()
                _write_at(self.folder / LIMITS, {indices.start * LIMITS_SIZE: limits.astype("<f8").data})
            _write_at(self.folder / PARTIAL, {0: self._header, self._offset(indices.start): images.data})
            self._save_progress({*self._done, indices.start})
        self._done.add(indices.start)

    def finish(
        self,
        *,
        value_range: tuple[float, float] | None = None,
        parameters: dict[str, dict] | None = None,
        classes: list[str] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        files: list[str] | None = None,
        about: dict[str, Any] | None = None,
        hashes: list[str] | None = None,
    ) -> None:
        """Measure the images and write index.json, which makes the cache complete; on a complete one, do nothing.

        value_range  the range of the units, if it is known and not `fixed`; None: see `Normalisation.transform`
        parameters   {"theta_E": {"unit": "arcsec", "values": N numbers}, ...}; NaN, stored as null: has no such value.
                     `turns` of a name that the simulator does not have: its rule, see `symmetries.how_they_turn`
        labels       N indices into `classes`
        files        N names
        about        more keys of the index
        hashes       what the images must hash to, where they are copies

        Raises UserError, and discards the images, if they do not allow the normalisation or one has another hash.
        """
        if self.complete:
            return
        if missing := self.pending():
            raise ValueError(f"{self.folder} still lacks {len(missing)} chunks, the first {missing[0]}")
        columns: dict[str, Any] = {"classes": classes, "files": files}
        columns["labels"] = None if labels is None else np.asarray(labels).tolist()
        columns = {key: column for key, column in columns.items() if column is not None}
        lengths = {key: len(column) for key, column in columns.items() if key != "classes"}
        if self._normalise.name == "minmax":
            parameters = self._with_limits(parameters)
        if parameters is not None:
            columns["parameters"] = {k: {**v, "values": _numbers(v["values"])} for k, v in parameters.items()}
            lengths |= {k: len(v["values"]) for k, v in columns["parameters"].items()}
        for key, length in lengths.items():
            if length != self.count:
                raise ValueError(f"{key}: {length} values for {self.count} images")
        with self._disk_errors():
            statistics, found = _survey(self.folder / PARTIAL, with_sky=self._normalise.name == "asinh")
            if hashes is not None and (wrong := [i for i in range(self.count) if found[i] != hashes[i]]):
                self.discard()
                raise UserError(
                    f"{len(wrong)} images of {self.folder}, the first number {wrong[0]}, are not what their source says "
                    "they are: delete the part they come from, make it again and then copy again"
                )
            try:
                units = self._normalise.transform(statistics, value_range).to_config()
            except UserError as error:
                self.discard()
                raise UserError(f"{self.folder} was not written: {error}") from error
            os.replace(self.folder / PARTIAL, self.folder / IMAGES)
            index = {"format": FORMAT, "name": self.folder.resolve().name, **self._request}
            index |= {"range": units.pop("value_range"), **units, "statistics": statistics}
            index |= {**(about or {}), **columns, "hashes": found, "split": {"fractions": SPLIT}}
            _write_json(self.folder / INDEX, index)
            (self.folder / PROGRESS).unlink()
            (self.folder / LIMITS).unlink(missing_ok=True)
        self.complete = True

    def discard(self) -> None:
        """Remove an unfinished cache, for a request that turned out to be impossible."""
        for name in (PARTIAL, PROGRESS, LIMITS):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder stays if anything else is in it
            self.folder.rmdir()

    def _open(self) -> None:
        folder = self.folder
        if (folder / INDEX).exists():
            self._compare(LensImages(folder).index)
            self.complete = True
            with contextlib.suppress(OSError):  # left by a kill at the very last step
                (folder / PROGRESS).unlink(missing_ok=True)
                (folder / LIMITS).unlink()
        elif (folder / PROGRESS).exists():
            progress = _read_json(folder / PROGRESS, ("count", "image_shape", "source", "chunk", "done"))
            self._compare(progress)
            self.chunk = progress["chunk"]
            if (folder / IMAGES).exists():  # killed between the last two steps of `finish`
                os.replace(folder / IMAGES, folder / PARTIAL)
            (folder / PARTIAL).touch()
            size = (folder / PARTIAL).stat().st_size
            self._done = {i for i in progress["done"] if self._offset(self._range(i).stop) <= size}
            if self._normalise.name == "minmax":
                (folder / LIMITS).touch()
                size = (folder / LIMITS).stat().st_size
                self._done = {i for i in self._done if self._range(i).stop * LIMITS_SIZE <= size}
            self._check_space()
        else:
            if folder.is_dir() and (names := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise UserError(f"{folder} holds other files ({some}): choose another --out or delete it")
            folder.mkdir(parents=True, exist_ok=True)
            self._check_space()
            self._save_progress(set())
            (folder / PARTIAL).touch()

    def _with_limits(self, parameters: dict[str, dict] | None) -> dict[str, dict]:
        if taken := {"low", "high"} & set(parameters or {}):
            self.discard()
            raise UserError(f"the data have a column {taken.pop()!r}, a name that minmax needs for its own: rename it")
        low, high = np.fromfile(self.folder / LIMITS, "<f8").reshape(self.count, 2).T
        own = {name: {"unit": "data", "values": values} for name, values in (("low", low), ("high", high))}
        return {**(parameters or {}), **own}

    def _compare(self, found: dict) -> None:
        found = {"normalisation": str(NONE), **found}  # which older ones do not say
        there, here = _flat({key: found[key] for key in self._request}), _flat(self._request)
        keys = [key for key in here | there if here.get(key) != there.get(key)]
        differences = [f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in keys]
        if differences:
            some = ", ".join(differences[:4]) + (", ..." if len(differences) > 4 else "")
            raise UserError(f"{self.folder} holds another data set ({some}): choose another --out or delete it")

    def _check_space(self) -> None:
        needed = sum(map(len, self.pending())) * math.prod(self.image_shape) * 4
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder} needs {needed / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: "
                "free some, ask for fewer images or choose another --out"
            )

    def _save_progress(self, done: set[int]) -> None:
        _write_json(self.folder / PROGRESS, {**self._request, "chunk": self.chunk, "done": sorted(done)})

    def _range(self, start: int) -> range:
        return range(start, min(start + self.chunk, self.count))

    def _offset(self, i: int) -> int:
        return len(self._header) + i * math.prod(self.image_shape) * 4

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror or error}; what is finished is kept: "
                "put that right and run the same command again, or choose another --out"
            ) from error


class LensImages:
    """A finished cache, open for reading; cheap to open, to fork and to pickle, whatever its size.

    images       (N, C, H, W) float32, a read-only memory map
    index        what index.json holds
    image_shape  (C, H, W)
    transform    between the data set's units and the network's range
    value_range  (low, high) of the data set's units
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.index = _read_index(self.path)
        self.name: str = self.index["name"]
        channels, height, width = self.index["image_shape"]
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        try:
            self.transform = PixelTransform.from_config({**self.index, "value_range": self.index["range"]})
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path / INDEX} has a damaged range or transform ({error}): {AGAIN}") from error
        self.value_range = (self.transform.low, self.transform.high)
        # Of the pixels, their order and what a network sees of them: what a run and its continuation have in common.
        pixels, normalisation = "".join(self.index["hashes"]), self.index.get("normalisation", str(NONE))
        seen = "" if normalisation == str(NONE) else f"{normalisation} {self.transform}"
        self.fingerprint = hashlib.sha256((pixels + seen).encode()).hexdigest()[:16]
        self.images = _open_images(self.path / IMAGES, (self.index["count"], *self.image_shape))

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple:
        return LensImages, (self.path,)  # a pickled memory map would carry the whole array to each worker

    def split(self, name: str) -> np.ndarray:
        """The sorted indices of the images in "train", "validation" or "test".

        An image's place follows from the hash of its content alone: duplicates share a split, and it stays when
        other images come or go. A set of a few images may leave a split empty.
        """
        fractions = self.index["split"]["fractions"]
        if name not in fractions:
            raise UserError(f"{self.path} has no split {name!r}: choose one of {', '.join(fractions)}")
        u = np.frombuffer(bytes.fromhex("".join(self.index["hashes"])), dtype=">u8") / 2.0**64
        bounds = np.cumsum(list(fractions.values()))[:-1]
        return np.flatnonzero(np.searchsorted(bounds, u, side="right") == list(fractions).index(name))

    def shuffled(self, name: str) -> np.ndarray:
        """The indices of a split, always in the same random order: the first of them are a fair sample, while those of
        `split` are of one class where the images come class by class."""
        return np.random.default_rng(0).permutation(self.split(name))

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """A copy of these images, (len(indices), C, H, W) float32."""
        return torch.from_numpy(np.array(self.images[np.asarray(indices, dtype=np.int64)]))

    def originals(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """These images as they were before `minmax`, (len(indices), C, H, W) float32; other data were never changed."""
        indices = np.asarray(indices, dtype=np.int64)
        images = np.array(self.images[indices])
        if not self.transform.per_image:
            return images
        low, high = (np.array(self.index["parameters"][name]["values"])[indices] for name in ("low", "high"))
        return restore(images, low, high)

    def batches(self, indices: np.ndarray, size: int = 64) -> Iterator[Tensor]:
        """Copies of these images, `size` at a time."""
        return (self.batch(indices[i : i + size]) for i in range(0, len(indices), size))


class StepSampler(Sampler[list[int]]):
    """A batch sampler whose batch at step k depends on (seed, k, rank, world) alone: resuming repeats nothing.

    The images form an endless stream of permutations, one an epoch; step k takes the k-th run of batch_size * world
    of them, across the ends of epochs, and rank r the r-th part of that. Iterates over start_step ... max_steps - 1.

    Raises UserError if there are fewer images than a batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if count < batch_size * world:
            ranks = f" on each of {world} processes" if world > 1 else ""
            raise UserError(f"fewer images than a batch: {count} images, {batch_size} a batch{ranks}; lower batch_size")
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.start_step, self.max_steps = start_step, max_steps

    def batch(self, step: int) -> np.ndarray:
        """The (batch_size,) image indices of this rank at this step."""
        places = np.arange(self.batch_size) + (step * self.world + self.rank) * self.batch_size
        epochs, places = np.divmod(places, self.count)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = _permutation(self.count, self.seed, int(epoch))[places[epochs == epoch]]
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            yield self.batch(step).tolist()

    def __len__(self) -> int:
        return max(self.max_steps - self.start_step, 0)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # Sorted raw bits and not Generator.permutation: numpy keeps only the raw streams the same from version to version.
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Read the header of an .npy file: shape, whether in Fortran order, dtype, and the offset of the data.

    Raises ValueError on anything else; loads no data, runs no pickle.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python: a hostile one raises anything up to MemoryError
        raise ValueError("is not an .npy array") from error
    return shape, fortran, dtype, stream.tell()


def _npy_header_bytes(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _write_at(path: Path, parts: dict[int, Any]) -> None:
    """Write bytes at these offsets; when this returns, they survive a power cut."""
    with open(path, "r+b") as file:
        for offset, content in parts.items():
            file.seek(offset)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _survey(path: Path, with_sky: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Statistics over all pixels and a content hash of each image, a few megabytes at a time.

    with_sky   also `background` and `noise` of the sky: each the median over the images
    """
    with open(path, "rb") as file:  # read, not mapped: the pages of a map would count as ours, up to the whole file
        (count, *shape), _, _, _ = read_npy_header(file)
        return _survey_images(file, count, shape, with_sky)


def _survey_images(
    file: IO[bytes], count: int, shape: Sequence[int], with_sky: bool
) -> tuple[dict[str, Any], list[str]]:
    skies, size, hashes = [], math.prod(shape), list[str]()
    rows, per_image = max(1, (1 << 18) // size), min(size, -(-MEDIAN_PIXELS // count))
    sample, rng = np.empty((count, per_image), np.float32), np.random.default_rng(0)
    pixels, mean, squares, low, high, constant = 0, 0.0, 0.0, math.inf, -math.inf, 0
    for start in range(0, count, rows):
        part = np.fromfile(file, "<f4", min(rows, count - start) * size).reshape(-1, size)
        hashes += [hashlib.sha256(image.data).hexdigest()[:16] for image in part]
        chosen = np.arange(size) if per_image == size else rng.integers(size, size=per_image)
        sample[start : start + rows] = part[:, chosen]
        lows, highs = part.min(1), part.max(1)
        low, high, constant = min(low, lows.min()), max(high, highs.max()), constant + int((lows == highs).sum())
        # Chan, Golub & LeVeque 1983, Eq. 2.1: the moments of the whole from those of its parts, without cancellation.
        part_mean, total = float(part.mean(dtype=np.float64)), pixels + part.size
        squares += float(np.square(part.astype(np.float64) - part_mean).sum())
        squares += (part_mean - mean) ** 2 * pixels * part.size / total
        mean, pixels = mean + (part_mean - mean) * part.size / total, total
        if with_sky:
            images = part.reshape(-1, *shape)
            bands = [images[:, k : k + 1] for k in range(shape[0])] if shape[0] > 1 else []
            skies.append(np.stack([np.stack(sky(view)) for view in (images, *bands)]))  # (1 + bands, 2, N)
    of_all, *of_bands = np.median(np.concatenate(skies, 2), axis=2).tolist() if with_sky else [(None, None)]
    return {
        "mean": mean,
        "std": math.sqrt(squares / pixels),
        "min": float(low),
        "max": float(high),
        "median": float(np.median(sample, overwrite_input=True)),
        "p99": float(np.quantile(sample, 0.99)),
        "median_is": "exact" if per_image == size else f"of {per_image} random pixels of each image",
        "constant_images": constant,
        **({"background": of_all[0], "noise": of_all[1], "bands": of_bands or [of_all]} if with_sky else {}),
    }, hashes


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    make = f"run `lens-ldm prepare FOLDER --out {folder}` or `lens-ldm simulate --count 10000 --out {folder}`"
    if not folder.exists():
        there = [path.parent.name for path in folder.parent.glob(f"*/{INDEX}")]
        meant = get_close_matches(folder.name, there, n=1)
        raise UserError(f"no data set at {folder}: " + (f"did you mean {folder.parent / meant[0]}?" if meant else make))
    if not path.exists() and (folder / PROGRESS).exists():
        raise UserError(f"the data set at {folder} is unfinished: run the command that began it again, and it goes on")
    if not path.exists():
        raise UserError(
            f"{folder} is not a prepared data set (it has no {INDEX}): `lens-ldm prepare {folder} --out data/NAME`"
        )
    if (version := _read_json(path, ("format",))["format"]) != FORMAT:
        raise UserError(f"{path} has format {version!r}, this version reads {FORMAT}: prepare it again")
    index = _read_json(path, ("name", "count", "image_shape", "source", "range", "hashes", "split"))
    if len(index["hashes"]) != index["count"]:
        raise UserError(f"{path} has {len(index['hashes'])} hashes for {index['count']} images: {AGAIN}")
    return index


def _open_images(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            found, fortran, dtype, offset = read_npy_header(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}): {AGAIN}") from error
    if found != shape or dtype != "<f4" or fortran:
        raise UserError(f"{path} holds {dtype} {found}, its index says float32 {shape}: {AGAIN}")
    size, expected = path.stat().st_size, offset + math.prod(shape) * 4
    if size < expected:
        raise UserError(f"{path} is truncated ({size} of {expected} bytes): {AGAIN}")
    return np.lib.format.open_memmap(path, mode="r")


def _read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {AGAIN}") from error
    if missing or not isinstance(content, dict):
        raise UserError(f"{path} lacks {', '.join(missing) or 'its keys'}: {AGAIN}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, allow_nan=False).encode())


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in np.asarray(values).tolist()]


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
