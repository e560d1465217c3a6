"""Images in the formats that others read, written a block at a time: files of any number of images in bounded memory.

`lens-ldm prepare` reads each of them back (shared/data/formats.py); the values are the data's own, but for the 16 bits of
PNG. Nothing that is written tells the time: the same images and the same facts are the same bytes.
"""

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from shared.data.cache import read_npy_header
from shared.data.formats import BLOCK, CONDITION
from shared.errors import UserError

WHITE = 65535  # of 16 bits


@dataclass(frozen=True)
class Stack:
    """Images that are read a block at a time, and what is known of them.

    shape     (n, C, H, W)
    blocks    () -> the images in their order, (m, C, H, W) float32 each; asked for once a file, or twice
    columns   {"seeds": (n,), "condition_NAME": (n,)}, as samples.npz has them
    about     facts of all of them, in JSON's types
    measured  such facts as differ each time, which .npz alone holds
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, np.ndarray]:
        """`columns` under the names that people know: seed, theta_E, ..."""
        return {"seed" if k == "seeds" else k.removeprefix(CONDITION): v for k, v in self.columns.items()}


def write_npz(path: Path, stack: Stack) -> None:
    """images, the columns, and metadata as a JSON string; no pickle. The images are first, and not compressed."""
    metadata = np.asarray(json.dumps({**stack.about, **stack.measured}))
    with zipfile.ZipFile(path, "w") as archive:
        # zipfile stamps what it opens by name with the time, and a ZipInfo with 1980.
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member:
            _write_blocks(member, stack)
        for name, values in {**stack.columns, "metadata": metadata}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)


def write_npy(path: Path, stack: Stack) -> None:
    """The images alone, (n, C, H, W)."""
    with open(path, "wb") as file:
        _write_blocks(file, stack)


def _write_blocks(stream: Any, stack: Stack) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(stack.shape)}
    np.lib.format.write_array_header_1_0(stream, header)
    for block in stack.blocks():
        stream.write(np.ascontiguousarray(block, "<f4").data)


def write_fits(path: Path, stack: Stack) -> None:
    """A cube (n, H, W), or (n, C, H, W) of several channels, with the facts in its header, and a table of the columns."""
    from astropy.io import fits

    n, channels, height, width = stack.shape
    header = fits.Header()
    header["SIMPLE"], header["BITPIX"], header["NAXIS"] = True, -32, 3 if channels == 1 else 4
    for k, length in enumerate([width, height, *([] if channels == 1 else [channels]), n]):
        header[f"NAXIS{k + 1}"] = length
    header["EXTEND"] = True
    header["ORIGIN"] = f"lens-ldm {version('lens-ldm')}"
    for name, (keyword, comment) in CARDS.items():
        if (value := stack.about.get(name)) is not None:
            # A card has 80 characters, of which a long value leaves none.
            header[keyword] = _card(value), "" if len(str(value)) > 20 else comment
    if (low_high := stack.about.get("value_range")) is not None:
        header["PIXLOW"], header["PIXHIGH"] = low_high
        header.comments["PIXLOW"] = "pixel range of the training data, in its units"
        header.comments["PIXHIGH"] = "its other end"
    header["COMMENT"] = "Pixels are in the units of the training data. FACTS is all that is known, as JSON."
    header["FACTS"] = _card(json.dumps(stack.about))
    path.unlink(missing_ok=True)  # or else it would be added to
    stream = fits.StreamingHDU(path, header)
    try:
        for block in stack.blocks():
            upward = block[:, :, ::-1]  # FITS stores the bottom row first
            stream.write(np.ascontiguousarray(upward[:, 0] if channels == 1 else upward, "f4"))
    finally:
        stream.close()
    if stack.columns:
        # Text in FITS is ASCII, of a fixed length.
        table = {k: np.char.encode(v, "ascii", "backslashreplace") if v.dtype.kind == "U" else v
                 for k, v in stack.table.items()}  # fmt: skip
        rows = np.empty(n, [(name, values.dtype) for name, values in table.items()])
        for name, values in table.items():
            rows[name] = values
        fits.append(path, rows, fits.Header([("EXTNAME", "SAMPLES")]), verify=False)


# Facts of `lens-ldm sample` -> the keyword of a card, and what it means.
CARDS = {
    "model": ("MODEL", "the model as it was named"),
    "weights_sha256": ("WSHA256", "hash of its weights"),
    "sampler": ("SAMPLER", ""),
    "steps": ("STEPS", "evaluations of the network"),
    "shift": ("SHIFT", "of the grid of times"),
    "eta": ("ETA", "noise added on the way"),
    "guidance": ("GUIDANCE", "1: none"),
    "observed": ("OBSERVED", "with pixel noise"),
    "first_seed": ("SEED", "of the first image; each has the next"),
    "count": ("COUNT", "images"),
}


def _card(value: Any) -> Any:
    return value.encode("ascii", "backslashreplace").decode() if isinstance(value, str) else value


def write_hdf5(path: Path, stack: Stack) -> None:
    """Datasets as in .npz, images in chunks of about a megabyte; facts are attributes of the file, blocks as JSON."""
    import h5py

    n, *image = stack.shape
    rows = max(1, min(n, (1 << 20) // (4 * math.prod(image))))
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", stack.shape, "<f4", chunks=(rows, *image))
        start = 0
        for block in stack.blocks():
            images[start : start + len(block)] = block
            start += len(block)
        for name, values in stack.columns.items():
            text = values.dtype.kind == "U"
            file.create_dataset(
                name, data=values.astype(object) if text else values, dtype=h5py.string_dtype() if text else None
            )
        for name, fact in stack.about.items():
            file.attrs[name] = fact if isinstance(fact, str | int | float) else json.dumps(fact)


def write_png(path: Path, stack: Stack) -> None:
    """A folder of grey pictures of 16 bits, SEED.png: value = low + (high - low) pixel / 65535, see `png_scale`.

    Each has its seed, the scale and what it was asked to be in its text chunk `parameters`, as JSON.
    """
    path.mkdir()
    low, high = png_scale(stack)
    names, rows = list(stack.table), zip(*(v.tolist() for v in stack.table.values()), strict=True)
    for block in stack.blocks():
        # In double precision: float32 has too few digits to round to the nearest of 65536 levels.
        pixels = ((block[:, 0].astype(np.float64) - low) * (WHITE / (high - low))).round().astype(np.uint16)
        for picture, row in zip(pixels, rows, strict=False):
            facts, info = dict(zip(names, row, strict=True)), PngImagePlugin.PngInfo()
            info.add_text("parameters", json.dumps({**facts, "low": low, "high": high}))
            # Noise hardly shrinks, however long it is tried.
            Image.fromarray(picture).save(path / f"{facts['seed']:010d}.png", pnginfo=info, compress_level=1)


def png_scale(stack: Stack) -> tuple[float, float]:
    """What black and white stand for: the pixel range of the data, or beyond it as far as these images go."""
    low, high = stack.about["value_range"]
    for block in stack.blocks():
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    return float(low), float(high)


def columns_csv(stack: Stack) -> bytes:
    """The columns as text, for formats that hold pixels alone: a line an image."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(stack.table)
    writer.writerows(zip(*(values.tolist() for values in stack.table.values()), strict=True))
    return stream.getvalue().encode()


# The format -> the name of the file or folder, and what writes it.
FORMATS: dict[str, tuple[str, Callable[[Path, Stack], None]]] = {
    "npz": ("samples.npz", write_npz),
    "npy": ("samples.npy", write_npy),
    "fits": ("samples.fits", write_fits),
    "hdf5": ("samples.hdf5", write_hdf5),
    "png": ("png", write_png),
}


def check_formats(formats: Sequence[str], image_shape: tuple[int, int, int]) -> None:
    """UserError if one of the formats cannot hold such images."""
    if "png" in formats and image_shape[0] != 1:
        raise UserError(f"PNG of 16 bits holds one channel, these images have {image_shape[0]}: take fits, hdf5 or npz")


def stored_rows(files: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    """The rows of an array that lies in several .npz, in their order, some at a time.

    Raises OSError, ValueError, KeyError, EOFError or BadZipFile for a file that is damaged.
    """
    for file in files:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as stream:
            shape, _, dtype, _ = read_npy_header(stream)
            row = dtype.itemsize * math.prod(shape[1:])
            for start in range(0, shape[0], step := max(1, BLOCK // row)):
                count = min(step, shape[0] - start)
                yield np.frombuffer(stream.read(count * row), dtype).reshape(count, *shape[1:])
