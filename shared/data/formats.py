"""What a file holds: one small reader a format, in one table keyed by suffix, and the rule that makes images of arrays.

A reader opens a `Member` and yields the arrays in it, of which it reads rows when they are asked for; what is wrong
with the file it raises as any exception. A new format is one such function and one line of `FORMATS`.

The rule of axes, (H, W) rows and columns, C from 1 to 4 channels, N images:
    2 axes                  (H, W)
    4 axes                  (N, C, H, W) if the second is at most 4, otherwise (N, H, W, C)
    3 axes, the only file of SOURCE (N, H, W)
    3 axes, a file among several    (C, H, W) if the first is at most 4, (H, W, C) if the last is, otherwise (N, H, W)
Where both fit, channels come first. Row 0 of an image is its top, and y grows from the last row to the first; FITS
stores the bottom row first, and is turned over. Values keep their units: nothing is scaled but what FITS itself scales
(BSCALE, BZERO), so 8 bits give 0...255 and 16 bits 0...65535. Palettes become their colours; a transparency that hides
nothing is dropped, one that hides something is an error.
"""

import io
import math
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import IO, Any, NamedTuple, cast

import numpy as np

from shared.data.cache import read_npy_header
from shared.data.pickles import load_object_array
from shared.errors import UserError

MAX_CHANNELS = 4
MAX_PIXELS = 1 << 26  # of one image, channels included: 8192 x 8192, a quarter of a gigabyte as float32
MAX_HELD = 1 << 30  # bytes of a file held in memory at once, where its format or an archive leaves no other way
BLOCK = 1 << 24  # bytes read at once from a file of many images
CONDITION = "condition_"  # before the name of what lenses were asked to be, in samples.npz of `lens-ldm sample`
UNITS = {"axion_mass": "eV"}  # of the parameters that files hold beside their images
EVERY = "*"  # the key of all arrays of a file


class Member(NamedTuple):
    """One file, in a folder, in an archive, or alone."""

    name: str  # below SOURCE, with "/"
    size: int  # bytes
    stamp: int  # time of the last change, or checksum: differs when the content does
    open: Callable[[], IO[bytes]]  # seekable, though backwards it may be slow
    packed: bool  # in an archive


class Array(NamedTuple):
    """An array in an open file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]  # (start, stop) -> array[start:stop]
    number: int | None = None  # its place in the file, where the format counts
    chunk: int = 1  # rows that are stored, and so best read, together
    upward: bool = False  # row 0 of an image is its bottom
    parameters: dict[str, float] = {}  # noqa: RUF012, never written to
    fault: str = ""  # why it cannot be read, if it is the one that is wanted

    def __str__(self) -> str:
        number = "" if self.number is None or str(self.number) == self.name else f"{self.number} = "
        return f"{number}{self.name} {self.shape} {self.dtype}"


Reader = Callable[[Member], AbstractContextManager[list[Array]]]


@contextmanager
def _npy(member: Member) -> Iterator[list[Array]]:
    with member.open() as stream:
        yield [_npy_array(lambda: stream, member.size)]


def _npy_array(stream: Callable[[], IO[bytes]], size: int, name: str = "") -> Array:
    """stream() is an .npy file of `size` bytes, at its beginning when first asked for."""
    shape, fortran, dtype, offset = read_npy_header(stream())
    if dtype.hasobject and dtype.names is None:
        return _image_and_mass(stream(), size - offset, name)
    expected = offset + dtype.itemsize * math.prod(shape)
    if size < expected:
        raise ValueError(f"is truncated ({size} of {expected} bytes)")
    if size > expected:
        raise ValueError(f"has {size - expected} bytes after its array: more than one array was saved to it")
    row = dtype.itemsize * math.prod(shape[1:])

    def rows(start: int, stop: int) -> np.ndarray:
        stream().seek(offset + start * row)
        content = _exactly(stream(), (stop - start) * row)
        return np.frombuffer(content, dtype).reshape(stop - start, *shape[1:])

    whole = cache(lambda: _fortran(stream(), offset, shape, dtype))
    return Array(name, shape, dtype, (lambda start, stop: whole()[start:stop]) if fortran else rows)


def _fortran(stream: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if isinstance(stream, io.BufferedReader):  # a file of its own, and not one of an archive
        return np.memmap(stream, dtype, "r", offset, shape, "F")
    size = dtype.itemsize * math.prod(shape)
    if size > MAX_HELD:
        raise ValueError(f"is {size / 1e9:.1f} GB in Fortran order within an archive: unpack it first")
    stream.seek(offset)
    return np.frombuffer(_exactly(stream, size), dtype).reshape(shape, order="F")


def _image_and_mass(stream: IO[bytes], size: int, name: str) -> Array:
    """np.array([image, mass], dtype=object), as the files of DeepLense's class `axion` are."""
    if size > 8 * MAX_PIXELS:
        raise ValueError(f"is a pickle of {size / 1e9:.1f} GB, too large for an image")
    items = load_object_array(stream.read())
    images = [item for item in items if isinstance(item, np.ndarray)]
    numbers = [item for item in items if not isinstance(item, np.ndarray)]
    if len(images) != 1 or len(numbers) > 1:
        raise ValueError(f"is an object array of {len(images)} arrays and {len(numbers)} numbers, not [image, mass]")
    image, parameters = images[0], {"axion_mass": numbers[0]} if numbers else {}
    return Array(name, image.shape, image.dtype, lambda start, stop: image[start:stop], parameters=parameters)


@contextmanager
def _npz(member: Member) -> Iterator[list[Array]]:
    with ExitStack() as outer, ExitStack() as stack:
        file = outer.enter_context(_seekable(member, stream_beyond=BLOCK))
        with _said_to_be("an .npz archive"):
            archive = outer.enter_context(zipfile.ZipFile(file))
        last: list[zipfile.ZipInfo] = []
        streams: list[IO[bytes]] = []

        def stream(info: zipfile.ZipInfo) -> IO[bytes]:
            if last != [info]:  # one is open at a time, for there may be any number
                stack.close()
                last[:], streams[:] = [info], [stack.enter_context(archive.open(info))]
            return streams[0]

        found = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        arrays = []
        for info in found:
            try:
                arrays.append(_npy_array(partial(stream, info), info.file_size, info.filename.removesuffix(".npy")))
            except ValueError:  # text and objects beside the images do no harm
                if len(found) == 1:
                    raise
        yield arrays


@contextmanager
def _hdf5(member: Member) -> Iterator[list[Array]]:
    import h5py

    arrays, seen, elsewhere = [], set(), []

    def walk(group: Any) -> None:
        for name in group:
            path = f"{group.name.rstrip('/')}/{name}".lstrip("/")
            # Links may lead to any file of this machine, and so may datasets: they are not followed.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                elsewhere.append(path)
                continue
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(item, h5py.Group):
                walk(item)
            elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                elsewhere.append(path)
            elif isinstance(item, h5py.Dataset) and item.shape:
                arrays.append(_hdf5_array(item, path))

    with _seekable(member) as stream:
        with _said_to_be("an HDF5 file"):
            file = h5py.File(stream, "r")
        with file:
            walk(file)
            if elsewhere and not any(len(array.shape) > 1 for array in arrays):
                raise ValueError(
                    f"{elsewhere[0]!r} is a link, perhaps to another file, which is not opened: copy it in"
                )
            yield arrays


def _hdf5_array(dataset: Any, path: str) -> Array:
    import h5py

    def rows(start: int, stop: int) -> np.ndarray:
        text = h5py.check_string_dtype(dataset.dtype) is not None
        return (dataset.asstr() if text else dataset)[start:stop]

    fault = "" if dataset.id.get_storage_size() else "has a shape and no data"
    if (held := math.prod(dataset.chunks or ()) * dataset.dtype.itemsize) > MAX_HELD:
        fault = f"is stored in chunks of {held / 1e9:.1f} GB: repack it in smaller ones"
    return Array(path, dataset.shape, dataset.dtype, rows, chunk=(dataset.chunks or (1,))[0], fault=fault)


@contextmanager
def _fits(member: Member) -> Iterator[list[Array]]:
    from astropy.io import fits

    with _seekable(member, stream_beyond=BLOCK) as stream:
        with _said_to_be("a FITS file"), _strict_astropy():
            file = fits.open(stream, memmap=False, lazy_load_hdus=False)
        with file:
            arrays, kinds = [], (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU)
            for number, hdu in enumerate(file):
                if isinstance(hdu, kinds) and not isinstance(hdu, fits.GroupsHDU) and hdu.shape:
                    arrays.append(_fits_array(hdu, number, member.size))
            yield arrays


def _fits_array(hdu: Any, number: int, size: int) -> Array:
    types = {8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}
    if (bits := hdu.header["BITPIX"]) not in types:
        raise ValueError(f"has BITPIX {bits}, which FITS does not know")
    dtype = np.dtype(types[bits])
    # Compressed images lie in a table, whose size says nothing of theirs.
    packed = "ZBITPIX" in hdu.header or type(hdu).__name__ == "CompImageHDU"
    expected = 0 if packed else hdu.fileinfo()["datLoc"] + dtype.itemsize * math.prod(hdu.shape)
    if expected > size:
        raise ValueError(f"is truncated, or its header lies ({size} of {expected} bytes)")

    def rows(start: int, stop: int) -> np.ndarray:
        with _strict_astropy():
            return hdu.section[start:stop]

    return Array(hdu.name or str(number), tuple(hdu.shape), dtype, rows, number, upward=True)


@contextmanager
def _strict_astropy() -> Iterator[None]:
    """Of the warnings, those of lost or left-over bytes are errors, and the rest is of no use here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="(?s).*(truncated|corrupt|invalid value|Invalid)")
        yield


def _picture(kind: str) -> Reader:
    """Reads the pages of a TIFF, or the one picture of anything else, through Pillow."""

    @contextmanager
    def read(member: Member) -> Iterator[list[Array]]:
        from PIL import Image

        def opened() -> Any:
            with _said_to_be(f"a {kind} picture"):
                return Image.open(stream, formats=(kind,))

        def page(number: int) -> np.ndarray:
            pixels = _decoded(picture, number, shape)
            return pixels if low is None else pixels * np.uint16(256) + _decoded(low, number, shape, other_byte=True)

        def rows(start: int, stop: int) -> np.ndarray:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return np.stack([page(number) for number in range(start, stop)])

        with _seekable(member) as stream, ExitStack() as stack:
            with warnings.catch_warnings():  # of size, where `_layout` has its own limit, and of metadata
                warnings.simplefilter("ignore")
                picture = stack.enter_context(opened())
                _check_numbers(picture)
                pages, shape = getattr(picture, "n_frames", 1) if kind == "TIFF" else 1, _picture_shape(picture)
                deep = _deep_colours(picture)
                low = stack.enter_context(opened()) if deep else None
            dtype = {"F": "f4", "I": "i4"}.get(picture.mode, "u2" if deep or picture.mode.startswith("I;16") else "u1")
            yield [Array("", (pages, *shape), np.dtype(dtype), rows)]

    return read


def _check_numbers(picture: Any) -> None:
    """Refuse the TIFFs whose numbers Pillow changes: signed bytes, unsigned 32 bit, white that is zero."""
    tags = getattr(picture, "tag_v2", {})
    bits, form = tags.get(258, (8,)), tags.get(339, (1,))  # BitsPerSample, SampleFormat
    if (2 in form and 8 in bits) or (1 in form and 32 in bits) or tags.get(262) == 0:
        raise ValueError("is a TIFF that cannot be read without loss: save it as .npy or .fits")


def _picture_shape(picture: Any) -> tuple[int, int, int]:
    width, height = picture.size
    if picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16"):
        return 1, height, width
    if picture.mode in ("P", "RGB", "RGBA"):
        return 3, height, width
    raise ValueError(f"has colours of mode {picture.mode}: save it as grey or RGB")


def _deep_colours(picture: Any) -> bool:
    """Whether a picture has colours of 16 bits, of which Pillow keeps the first byte."""
    if any(raw.startswith("RGBX") for raw in _raw_modes(picture)):
        raise ValueError("has a fourth band of unknown meaning: save it as .npy or .fits")
    deep = any(";16" in raw for raw in _raw_modes(picture)) or 16 in getattr(picture, "tag_v2", {}).get(258, ())
    if not deep or picture.mode.startswith("I") or picture.mode == "F":
        return False
    in_planes = getattr(picture, "tag_v2", {}).get(284, 1) == 2
    if in_planes or not all(raw[:-1] in ("RGB;16", "RGBA;16") for raw in _raw_modes(picture)):
        raise ValueError("has 16 bits a channel in a way that cannot be read without loss: save it as .npy or .fits")
    return True


def _raw_modes(picture: Any) -> list[str]:
    arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in picture.tile]
    return [of_tile[0] for of_tile in arguments if isinstance(of_tile[0], str)]


def _decoded(picture: Any, number: int, shape: tuple[int, int, int], other_byte: bool = False) -> np.ndarray:
    """(C, H, W) of a page. other_byte: of each number of 16 bits not the first byte but the second."""
    if getattr(picture, "n_frames", 1) > 1:
        picture.seek(number)
    if (found := _picture_shape(picture)) != shape:
        raise ValueError(f"page {number} has shape {found}, the first {shape}")
    if other_byte:  # told that the numbers are of the other byte order, Pillow keeps the other byte
        native = "L" if sys.byteorder == "little" else "B"
        other = {"B": "L", "L": "B", "N": "B" if native == "L" else "L"}
        for i, tile in enumerate(picture.tile):
            raw, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            raw = raw[:-1] + other[raw[-1]]
            picture.tile[i] = tile._replace(args=(raw, *rest) if isinstance(tile.args, tuple) else raw)
    transparent = picture.mode in ("LA", "RGBA") or "transparency" in picture.info
    if transparent:
        picture = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    elif picture.mode in ("P", "1"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    pixels = np.asarray(picture).reshape(*shape[1:], -1)
    if transparent and (pixels[..., -1] != 255).any():
        raise ValueError("has transparent pixels: flatten it, or save four bands as .npy or .fits")
    return np.moveaxis(pixels[..., : shape[0]], 2, 0)


_tiff, _jpeg = _picture("TIFF"), _picture("JPEG")
FORMATS: dict[str, Reader] = {
    ".npy": _npy,
    ".npz": _npz,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".fits": _fits,
    ".fit": _fits,
    ".png": _picture("PNG"),
    ".tif": _tiff,
    ".tiff": _tiff,
    ".jpg": _jpeg,
    ".jpeg": _jpeg,
}


class Part(NamedTuple):
    """The images of one array of a file."""

    name: str  # of the array, where a file holds several that are read; otherwise ""
    length: int
    numbered: bool  # whether the array has an axis of images


class Images:
    """The images of one open file: `read(i)` gives the i-th, (C, H, W), of the type it is stored in.

    parts       of one file, in their order
    shape       (C, H, W) of each image
    labels      a class name an image, where the file holds them; otherwise None
    parameters  of the images, such as axion_mass
    """

    def __init__(self, stacks: Sequence[tuple[Array, int, tuple[int, int, int], str]], labels: list[str] | None):
        self._stacks, self.shape, self.labels, self.parameters = stacks, stacks[0][2], labels, stacks[0][0].parameters
        several = len(stacks) > 1
        self.parts = tuple(
            Part(array.name if several else "", count, axes.startswith("N") and array.shape != (1, *shape))
            for array, count, shape, axes in stacks
        )
        self._starts = np.cumsum([0, *(part.length for part in self.parts)])
        self._block: tuple[int, int, np.ndarray] = (0, 0, np.empty(0))
        self._careful = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> np.ndarray:
        if not self._block[0] <= i < self._block[1]:
            self._block = (0, 0, np.empty(0))  # two at once would be twice the memory
            try:
                self._block = self._load(i)
            except Exception:
                if self._careful:
                    raise
                self._careful = True  # one by one, to tell the damaged images from their neighbours
                self._block = self._load(i)
        return self._block[2][i - self._block[0]]

    def _load(self, i: int) -> tuple[int, int, np.ndarray]:
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        array, count, _, axes = self._stacks[k]
        first = int(self._starts[k])
        if axes.startswith("N"):
            row = array.dtype.itemsize * math.prod(self.shape)
            step = 1 if self._careful else max(1, BLOCK // row)
            if array.chunk > 1 and array.chunk * row <= MAX_HELD // 4 and not self._careful:
                step = -(-step // array.chunk) * array.chunk
            start = (i - first) // step * step
            stop = min(start + step, count)
            stored = array.rows(start, stop)
        else:
            start, stop, stored, axes = 0, 1, array.rows(0, array.shape[0])[None], f"N{axes}"
        if len(stored) != stop - start or stored.dtype.kind not in "fiu":
            raise ValueError("is damaged: it holds less than it says")
        if "C" not in axes:
            stored, axes = stored[:, None], "NCHW"
        images = np.moveaxis(stored, axes.index("C"), 1)
        return first + start, first + stop, images[:, :, ::-1] if array.upward else images


@contextmanager
def open_images(member: Member, alone: bool, key: str | None = None, label_key: str | None = None) -> Iterator[Images]:
    """The images of a file, by its headers; pixels are read when they are asked for.

    alone      whether it is the only file of its source, see the rule of axes
    key        which array of the file: its name, its number in FITS, or "*" for all; None: the only one that fits
    label_key  the array of the file that holds the classes of its images

    Raises UserError if a key must be chosen, otherwise whatever a damaged file raises.
    """
    with FORMATS[suffix(member.name)](member) as arrays:
        chosen = _choose(arrays, key, member.name)
        stacks = []
        for array in chosen:
            if array.dtype.kind not in "fiu":
                raise ValueError(f"holds {array.dtype}, not real numbers")
            if array.fault:
                raise ValueError(array.fault)
            stacks.append((array, *_layout(array.shape, alone and len(chosen) == 1)))
        if len({shape for _, _, shape, _ in stacks}) > 1:
            raise ValueError(f"holds arrays of several shapes ({_listed(chosen)})")
        labels = None
        if label_key is not None:
            labels = _labels(arrays, label_key, sum(count for _, count, _, _ in stacks))
        elif len(chosen) > 1 and all("/" in array.name for array in chosen):
            labels = [array.name.split("/")[0] for array, count, _, _ in stacks for _ in range(count)]
        yield Images(stacks, labels)


def suffix(name: str) -> str:
    """The ending by which a file's format is known, in lower case."""
    return f".{name.rpartition('.')[2].lower()}" if "." in name else ""


def _choose(arrays: list[Array], key: str | None, file: str) -> list[Array]:
    fitting = [array for array in arrays if 2 <= len(array.shape) <= 4 and array.dtype.kind in "fiu"]
    if key is not None and key != EVERY:
        found = [a for a in arrays if key in (a.name, str(a.number))] or [
            a for a in arrays if key.strip("/").casefold() == a.name.casefold()
        ]
        if not found:
            raise ValueError(f"has no array {key!r}; it has {_listed(arrays)}")
        if len(found) > 1:
            raise UserError(
                f"{file} holds {len(found)} arrays named {key} ({_listed(found)}): choose one by its number"
            )
        return found
    if not fitting:
        if len(arrays) == 1:
            return arrays  # what is wrong with it is said by the checks that follow
        raise ValueError(f"holds no images; it has {_listed(arrays)}")
    # A table of numbers beside the images has two axes, and is not meant while anything has more; of all, only if it fits.
    images = [array for array in fitting if len(array.shape) > 2]
    alike = {array.shape[-2:] for array in images if key == EVERY}
    fitting = [array for array in fitting if len(array.shape) > 2 or array.shape in alike] if images else fitting
    if len(fitting) > 1 and key != EVERY:
        raise UserError(
            f"{file} holds several arrays ({_listed(fitting)}): choose one with --key NAME, or all with '*'"
        )
    return fitting


def _layout(shape: tuple[int, ...], alone: bool) -> tuple[int, tuple[int, int, int], str]:
    """Number of images, (C, H, W) of each, and the axes as stored, by the rule above."""
    if len(shape) == 2:
        axes = "HW"
    elif len(shape) == 3 and alone:
        axes = "NHW"
    elif len(shape) == 3:
        axes = "CHW" if shape[0] <= MAX_CHANNELS else "HWC" if shape[2] <= MAX_CHANNELS else "NHW"
    elif len(shape) == 4 and min(shape[1], shape[3]) <= MAX_CHANNELS:
        axes = "NCHW" if shape[1] <= MAX_CHANNELS else "NHWC"
    else:
        raise ValueError(f"has shape {shape}, not (H, W), nor that with 1 to {MAX_CHANNELS} channels or N images")
    size = dict(zip(axes, shape, strict=True))
    if min(shape) < 1:
        raise ValueError(f"has no pixels, shape {shape}")
    image = size.get("C", 1), size["H"], size["W"]
    if math.prod(image) > MAX_PIXELS:
        raise ValueError(f"has images of {math.prod(image):,} pixels, {image}: cut them into parts of {MAX_PIXELS:,}")
    return size.get("N", 1), image, axes


def _labels(arrays: list[Array], key: str, count: int) -> list[str]:
    found = [array for array in arrays if array.name == key.strip("/")]
    if not found:
        raise ValueError(f"has no array {key!r} of labels; it has {_listed(arrays)}")
    shape = found[0].shape
    if shape not in ((count,), (count, 1)):
        raise ValueError(f"has labels {key!r} of shape {shape} for {count} images")
    values = found[0].rows(0, count).reshape(-1).tolist()
    decoded = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]
    return [str(int(v)) if isinstance(v, float) and v == int(v) else str(v) for v in decoded]


def _listed(arrays: Sequence[Array]) -> str:
    return ", ".join(map(str, arrays[:8])) + (", ..." if len(arrays) > 8 else "") if arrays else "none"


@contextmanager
def _seekable(member: Member, stream_beyond: int = MAX_HELD) -> Iterator[IO[bytes]]:
    """The stream of a file whose reader goes to and fro; from an archive it comes into memory, nothing onto the disk.

    stream_beyond  bytes from which on it is better read from the archive itself
    """
    with member.open() as stream:
        if not member.packed:
            yield stream
        elif stream_beyond < member.size:
            if stream_beyond >= MAX_HELD:
                raise ValueError(f"is {member.size / 1e9:.1f} GB in an archive, and cannot be read in order: unpack it")
            yield cast(IO[bytes], _Forward(stream, member.size))
        else:
            held = io.BytesIO()
            shutil.copyfileobj(stream, held, 1 << 20)  # in parts: the archive's own read() needs three times the memory
            if held.tell() < member.size:
                raise ValueError(f"ends {member.size - held.tell()} bytes early")
            held.seek(0)
            yield held


class _Forward(io.RawIOBase):
    """A stream that goes where it is told only when it is read.

    In an archive, going back means to begin again, and readers like to come back to where they were for nothing.
    """

    def __init__(self, stream: IO[bytes], size: int):
        self._stream, self._size, self._place = stream, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        self._stream.seek(self._place)
        content = self._stream.read(size)
        self._place += len(content)
        return content


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise ValueError(f"ends {size - len(content)} bytes early")
    return content


@contextmanager
def _said_to_be(what: str) -> Iterator[None]:
    """Whatever a library raises when it opens a file, as one sentence."""
    try:
        yield
    except Exception as error:
        said = str(error).partition("(")[2].rpartition(")")[0] if what == "an HDF5 file" else str(error)
        raise ValueError(f"is not {what}, or damaged ({said or type(error).__name__})") from error
