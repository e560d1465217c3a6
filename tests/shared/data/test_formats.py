"""Every format is read back exactly, alone, in a folder and in an archive; what is hostile is one line and harmless."""

import io
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from PIL import Image

from shared.data import formats
from shared.data.sources import BrokenImage, Source
from shared.errors import UserError

SHAPE = (6, 9)
LENSES = np.random.default_rng(0).integers(0, 256, (7, *SHAPE)).astype(np.uint8)


def save_h5(path: Path, array: np.ndarray, **options) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("lenses/images", data=array, **options)


def save_fits(path: Path, array: np.ndarray) -> None:
    fits.writeto(path, array[..., ::-1, :])  # the bottom row first, as FITS has it


def save_tiff(path: Path, array: np.ndarray) -> None:
    first, *rest = [Image.fromarray(page) for page in array.reshape(-1, *SHAPE)]
    first.save(path, save_all=True, append_images=rest, compression="tiff_lzw")


def save_png(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


STACKS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "npy": np.save,
    "npz": lambda path, array: np.savez(path, images=array),
    "compressed.npz": lambda path, array: np.savez_compressed(path, images=array),
    "h5": save_h5,
    "chunked.hdf5": lambda path, array: save_h5(path, array, chunks=(3, 4, 4), compression="gzip"),
    "fits": save_fits,
    "tif": save_tiff,
}


def zip_of(folder: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def read(path: Path, **options) -> tuple[np.ndarray, list[str]]:
    """All images of a source, read from the last to the first and then in order, and their names."""
    with Source(path, **options) as source:
        assert source.broken == []
        backwards = [source.read(i) for i in reversed(range(len(source)))]
        images = np.stack([source.read(i) for i in range(len(source))])
        np.testing.assert_array_equal(images, backwards[::-1])
        return images, [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize("name", STACKS)
def test_many_images_a_file_alone_in_a_folder_and_in_archives(tmp_path, monkeypatch, name):
    (tmp_path / "in").mkdir()
    for file, part in (("a", LENSES), ("b", LENSES[::-1])):
        STACKS[name](tmp_path / "in" / f"{file}.{name}", part)
    expected = LENSES[:, None].astype(np.float32)
    images, names = read(tmp_path / "in" / f"a.{name}")
    np.testing.assert_array_equal(images, expected)
    assert names == [f"a.{name}[{i}]" for i in range(7)]
    for block in (1 << 24, 100):  # all at once, and two images at a time, streamed from the archive
        monkeypatch.setattr(formats, "BLOCK", block)
        for source in (tmp_path / "in", zip_of(tmp_path / "in"), zip_of(tmp_path / "in", zipfile.ZIP_STORED)):
            images, names = read(source)
            np.testing.assert_array_equal(images, np.concatenate([expected, expected[::-1]]))
            assert names[6:8] == [f"a.{name}[6]", f"b.{name}[0]"]


@pytest.mark.parametrize("name", [*(name for name in STACKS if name != "chunked.hdf5"), "png", "tiff", "fit"])
def test_an_image_a_file(tmp_path, name):
    save = {**STACKS, "png": save_png, "tiff": save_tiff, "fit": save_fits}[name]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i, image in enumerate(LENSES):
        save(tmp_path / "in" / "sub" / f"s{i}.{name}", image)
    for source in (tmp_path / "in", zip_of(tmp_path / "in")):
        images, names = read(source)
        np.testing.assert_array_equal(images[:, 0], LENSES)
        assert names == [f"sub/s{i}.{name}" for i in range(7)]
    np.testing.assert_array_equal(read(tmp_path / "in" / "sub" / f"s3.{name}")[0][0, 0], LENSES[3])


TYPES = ["u1", "i1", "<u2", ">u2", "<i2", ">i4", "u8", "<f2", ">f4", "<f8"]


# FITS knows unsigned numbers of 16 and more bits by their BZERO, and neither halves nor signed bytes.
KINDS = [(name, dtype) for name in ("npy", "npz", "h5", "fits") for dtype in TYPES]


@pytest.mark.parametrize(("name", "dtype"), [k for k in KINDS if k[0] != "fits" or k[1] not in ("<f2", "i1")])
def test_numbers_of_every_type_keep_their_values(tmp_path, name, dtype):
    lenses = (LENSES.astype("f8") / 2 - (0 if dtype[-2] == "u" else 60)).astype(dtype)
    STACKS[name](tmp_path / f"a.{name}", lenses)
    np.testing.assert_array_equal(read(tmp_path / f"a.{name}")[0][:, 0], lenses.astype(np.float32))


# The rule of axes


@pytest.mark.parametrize(
    ("stored", "alone", "images"),
    [
        ((6, 9), True, (1, 1, 6, 9)),
        ((6, 9), False, (1, 1, 6, 9)),
        ((3, 6, 9), True, (3, 1, 6, 9)),
        ((3, 6, 9), False, (1, 3, 6, 9)),
        ((4, 6, 3), False, (1, 4, 6, 3)),  # both fit: channels come first
        ((6, 9, 4), False, (1, 4, 6, 9)),
        ((1, 6, 9), False, (1, 1, 6, 9)),
        ((6, 9, 1), False, (1, 1, 6, 9)),
        ((5, 6, 9), False, (5, 1, 6, 9)),
        ((5, 6, 9), True, (5, 1, 6, 9)),
        ((2, 4, 6, 9), False, (2, 4, 6, 9)),
        ((2, 6, 9, 3), True, (2, 3, 6, 9)),
        ((7, 3, 9, 4), True, (7, 3, 9, 4)),
        ((1, 1, 6, 9), False, (1, 1, 6, 9)),
    ],
)
def test_the_rule_of_axes(tmp_path, stored, alone, images):
    array = np.random.default_rng(1).random(stored, dtype=np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", array)
    if not alone:
        np.save(tmp_path / "in" / "b.npy", array)
    found = read(tmp_path / "in")[0][: images[0]]
    assert found.shape == images
    last = len(stored) > 2 and stored[-1] == images[1] != stored[-3]
    arranged = np.moveaxis(array, -1, -3) if last else array
    np.testing.assert_array_equal(found, arranged.reshape(images))


@pytest.mark.parametrize("stored", [(), (5,), (2, 5, 6, 9), (1, 1, 1, 6, 9), (0, 6, 9), (6, 0)])
def test_shapes_that_are_no_images(tmp_path, stored):
    np.save(tmp_path / "a.npy", np.zeros(stored))
    with Source(tmp_path / "a.npy") as source:
        assert len(source) == 0
        assert str(stored) in source.broken[0].reason


class Tape(io.BytesIO):
    """Counts how often it is wound back."""

    rewound = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        before = self.tell()
        after = super().seek(offset, whence)
        Tape.rewound += after < before
        return after


@pytest.mark.parametrize("name", ["npy", "npz", "fits"])
def test_a_stack_in_an_archive_is_read_in_one_go(tmp_path, monkeypatch, name):
    STACKS[name](tmp_path / f"a.{name}", LENSES)
    content = (tmp_path / f"a.{name}").read_bytes()
    monkeypatch.setattr(formats, "BLOCK", 60)  # an image at a time
    monkeypatch.setattr(Tape, "rewound", 0)
    member = formats.Member(f"a.{name}", len(content), 0, lambda: Tape(content), packed=True)
    with formats.open_images(member, alone=True) as images:
        np.testing.assert_array_equal(np.stack([images.read(i) for i in range(7)])[:, 0], LENSES)
    # To the end of an .npz and back for its table of contents, or to the end of a FITS for its extensions.
    assert Tape.rewound <= {"npy": 1, "npz": 6, "fits": 3}[name]


def test_arrays_in_fortran_order(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", np.asfortranarray(LENSES))
    for source in (tmp_path / "in" / "a.npy", zip_of(tmp_path / "in")):
        np.testing.assert_array_equal(read(source)[0][:, 0], LENSES)


# Which array of a file is meant


def holding_several(path: Path) -> None:
    arrays = {"lenses": LENSES, "noise": LENSES[::-1], "table": np.zeros((7, 5)), "name": np.array(list("babcabc"))}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[f"set/{name}"] = array.astype("S1") if name == "name" else array
            file.create_dataset("set/word", data=["one", "two", "one", "two", "one", "two", "thrée"])


@pytest.mark.parametrize(("suffix", "group"), [("npz", ""), ("h5", "set/")])
def test_a_key_is_asked_for_by_name_and_labels_are_read(tmp_path, suffix, group):
    path = tmp_path / f"a.{suffix}"
    holding_several(path)
    said = rf"holds several arrays \({group}lenses \(7, 6, 9\) uint8, {group}noise .*choose one with --key NAME"
    with pytest.raises(UserError, match=said) as caught:
        Source(path)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(read(path, key=f"{group}noise")[0][:, 0], LENSES[::-1])
    both, names = read(path, key="*") if suffix == "npz" else (None, None)
    if both is not None:
        assert names[0] == "a.npz[lenses][0]"
    with Source(path, key=f"{group}lenses", labels=f"{group}name") as source:
        assert source.classes() == (["a", "b", "c"], [1, 0, 1, 2, 0, 1, 2])
    if suffix == "h5":
        with Source(path, key="set/lenses", labels="set/word") as source:
            assert source.classes() == (["one", "thrée", "two"], [0, 2, 0, 2, 0, 2, 1])
    for options, said in (
        ({"key": "lens"}, "has no array 'lens'; it has .*noise"),
        ({"key": f"{group}name"}, "not real numbers"),
        ({"key": f"{group}lenses", "labels": "kind"}, "has no array 'kind' of labels"),
        ({"key": f"{group}lenses", "labels": f"{group}table"}, r"has labels .* of shape \(7, 5\) for 7 images"),
    ):
        with Source(path, **options) as source:
            assert len(source) == 0
            assert re.search(said, source.broken[0].reason)


def test_one_stack_beside_tables_and_text_needs_no_key(tmp_path):
    np.savez(tmp_path / "a.npz", images=LENSES, table=np.zeros((7, 5)), words=np.array(["x"]), objects=np.array([{}]))
    np.testing.assert_array_equal(read(tmp_path / "a.npz")[0][:, 0], LENSES)


def test_a_data_set_an_image_in_groups_that_are_classes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i, image in enumerate(LENSES):
            file[f"{'no' if i < 3 else 'vort'}/s{i}"] = image
    images, names = read(tmp_path / "a.h5", key="*")
    np.testing.assert_array_equal(images[:, 0], LENSES)
    assert names[3] == "a.h5[vort/s3]"
    with Source(tmp_path / "a.h5", key="*") as source:
        assert source.classes() == (["no", "vort"], [0, 0, 0, 1, 1, 1, 1])


# FITS


def test_fits_is_turned_over_so_that_y_grows_upwards(tmp_path):
    image = np.zeros(SHAPE, np.float32)
    image[0, 2] = 1  # in FITS the first row is the bottom of the sky
    fits.writeto(tmp_path / "a.fits", image)
    assert np.argwhere(read(tmp_path / "a.fits")[0][0, 0]).tolist() == [[SHAPE[0] - 1, 2]]
    (tmp_path / "in").mkdir()
    for name in "ab":
        fits.writeto(tmp_path / "in" / f"{name}.fits", np.stack([image, 2 * image, 3 * image], axis=-1))
    channels_last = read(tmp_path / "in")[0]
    assert np.argwhere(channels_last[0]).tolist() == [[c, SHAPE[0] - 1, 2] for c in range(3)]


def test_fits_scaling_blanks_extensions_and_compression(tmp_path):
    stored = LENSES.astype(np.int16)
    scaled = fits.PrimaryHDU(stored)
    scaled.header["BSCALE"], scaled.header["BZERO"] = 0.25, 100.0
    scaled.writeto(tmp_path / "scaled.fits")
    with fits.open(tmp_path / "scaled.fits", do_not_scale_image_data=True) as file:
        np.testing.assert_array_equal(file[0].data, stored)
    np.testing.assert_array_equal(read(tmp_path / "scaled.fits")[0][:, 0], stored[:, ::-1] * 0.25 + 100)

    blank = fits.PrimaryHDU(np.stack([stored[0], stored[1] // 256]))
    blank.data[0, 1, 1] = -7
    blank.header["BLANK"] = -7
    blank.writeto(tmp_path / "blank.fits")
    with Source(tmp_path / "blank.fits") as source, pytest.raises(BrokenImage, match="has 1 pixels that are NaN"):
        source.read(0)

    science, error = fits.ImageHDU(LENSES[0], name="SCI"), fits.ImageHDU(LENSES[1], name="ERR")
    table = fits.BinTableHDU(np.array([(1, 2.0)], dtype="i4,f4"))
    fits.HDUList([fits.PrimaryHDU(), science, error, table]).writeto(tmp_path / "many.fits")
    with pytest.raises(UserError, match=r"several arrays \(1 = SCI \(6, 9\) uint8, 2 = ERR .*choose one with --key"):
        Source(tmp_path / "many.fits")
    for key in ("ERR", "err", "2"):
        np.testing.assert_array_equal(read(tmp_path / "many.fits", key=key)[0][0, 0], LENSES[1, ::-1])
    images, names = read(tmp_path / "many.fits", key="*")
    np.testing.assert_array_equal(images[:, 0], LENSES[:2, ::-1])
    assert names == ["many.fits[SCI]", "many.fits[ERR]"]

    packed = fits.CompImageHDU(LENSES[0].astype(np.int32), compression_type="RICE_1")
    fits.HDUList([fits.PrimaryHDU(), packed]).writeto(tmp_path / "packed.fits")
    np.testing.assert_array_equal(read(tmp_path / "packed.fits")[0][0, 0], LENSES[0, ::-1])


# Pictures

DEEP = np.random.default_rng(2).integers(0, 65536, (*SHAPE, 4)).astype(np.uint16)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, colour: int, header: tuple[int, int] | None = None) -> bytes:
    """A PNG of (H, W, C) pixels, each row filtered in another way; header: the (width, height) that it claims."""
    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    rows, before, step = b"", np.zeros(width * channels * pixels.itemsize, np.uint8), channels * pixels.itemsize
    for y in range(height):
        row = np.frombuffer(pixels[y].astype(pixels.dtype.newbyteorder(">")).tobytes(), np.uint8)
        left = np.concatenate([np.zeros(step, np.uint8), row[:-step]])
        rows += bytes([y % 3]) + (row - [0 * row, left, before][y % 3]).tobytes()
        before = row
    head = struct.pack(">IIBBBBB", *(header or (width, height)), bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(
    pixels: np.ndarray, order: str = "<", planar: int = 1, size: tuple[int, int] | None = None, extra: int = 2
) -> bytes:
    """An uncompressed TIFF of (H, W, C) pixels in colours, of either byte order.

    size   the one that it claims
    extra  what the fourth band is: 2 transparency, 0 unknown
    """
    height, width, channels = pixels.shape
    data = np.moveaxis(pixels, -1, 0) if planar == 2 else pixels
    content = data.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{channels}H", *[8 * pixels.itemsize] * channels)
    strips, end = channels if planar == 2 else 1, 8 + len(content)
    lengths = struct.pack(f"{order}{strips}I", *[len(content) // strips] * strips)
    offsets = struct.pack(f"{order}{strips}I", *[8 + i * (len(content) // strips) for i in range(strips)])
    claimed = size or (width, height)
    many, offset = strips > 1, end + len(bits)
    entries = [
        (256, 4, 1, claimed[0]),
        (257, 4, 1, claimed[1]),
        (258, 3, channels, end),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
    ]
    entries += [(273, 4, strips, offset + len(lengths) if many else 8), (277, 3, 1, channels), (278, 4, 1, claimed[1])]
    entries += [(279, 4, strips, offset if many else len(content)), (284, 3, 1, planar)]
    entries += [(338, 3, 1, extra)] if channels == 4 else []
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(f"{order}HHI", tag, kind, count) + struct.pack(
            f"{order}{'HH' if short else 'I'}", *((value, 0) if short else (value,))
        )
    start = end + len(bits) + len(lengths) + len(offsets)
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return magic + content + bits + lengths + offsets + directory + bytes(4)


OPAQUE = DEEP.copy()
OPAQUE[..., 3] = 65535


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("grey.png", png(DEEP[..., :1], 0), DEEP[..., :1]),
        ("colour.png", png(DEEP[..., :3], 2), DEEP[..., :3]),
        ("opaque.png", png(OPAQUE, 6), DEEP[..., :3]),
        ("colour.tif", tiff(DEEP[..., :3]), DEEP[..., :3]),
        ("big endian.tif", tiff(DEEP[..., :3], ">"), DEEP[..., :3]),
        ("four.tif", tiff(OPAQUE), DEEP[..., :3]),
        ("8 bits.tif", tiff(LENSES[:3].transpose(1, 2, 0), planar=2), LENSES[:3].transpose(1, 2, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sixteen_bits_a_channel_are_read_without_loss(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(read(tmp_path / name)[0][0], expected.transpose(2, 0, 1))


def test_pages_of_sixteen_bits_a_channel(tmp_path):
    save_tiff(tmp_path / "a.tif", DEEP[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[0][0, 0], DEEP[..., 0])
    Image.fromarray(LENSES[0].astype(np.float32) / 7).save(tmp_path / "b.tif")
    np.testing.assert_array_equal(read(tmp_path / "b.tif")[0][0, 0], LENSES[0].astype(np.float32) / 7)
    pages = [Image.fromarray(LENSES[0]), Image.fromarray(LENSES[0, :4])]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    with Source(tmp_path / "c.tif") as source:
        source.read(0)
        with pytest.raises(BrokenImage, match="page 1 has shape"):
            source.read(1)


def test_what_is_not_read_without_loss_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(DEEP[..., :3], planar=2))
    (tmp_path / "b.png").write_bytes(png(DEEP[..., :2], 4))
    Image.fromarray(LENSES[0]).convert("CMYK").save(tmp_path / "c.tif")
    (tmp_path / "d.tif").write_bytes(tiff(DEEP, extra=0))
    for name, said in (
        ("d.tif", "fourth band"),
        ("a.tif", "without loss"),
        ("b.png", "without loss"),
        ("c.tif", "mode CMYK"),
    ):
        with Source(tmp_path / name) as source:
            assert said in source.broken[0].reason


def test_colours_palettes_transparency_and_one_bit(tmp_path):
    colours = LENSES[:3].transpose(1, 2, 0)
    full = np.full((*SHAPE, 1), 255, np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgb.png")
    Image.fromarray(np.concatenate([colours, full], -1)).save(tmp_path / "rgba.png")
    Image.fromarray(np.concatenate([colours[..., :1], full], -1)).save(tmp_path / "la.png")
    palette = Image.fromarray(LENSES[0] // 64)
    palette = palette.convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(LENSES[0] > 99).save(tmp_path / "bits.png")
    Image.fromarray(colours).resize((64, 64)).save(tmp_path / "photo.jpg", quality=100, subsampling=0)
    for name in ("rgb.png", "rgba.png"):
        np.testing.assert_array_equal(read(tmp_path / name)[0][0], LENSES[:3])
    np.testing.assert_array_equal(read(tmp_path / "la.png")[0][0, 0], LENSES[0])
    table = np.arange(10, 130, 10).reshape(4, 3)
    np.testing.assert_array_equal(read(tmp_path / "palette.png")[0][0], table[LENSES[0] // 64].transpose(2, 0, 1))
    np.testing.assert_array_equal(read(tmp_path / "bits.png")[0][0, 0], 255 * (LENSES[0] > 99))
    photo = np.asarray(Image.fromarray(colours).resize((64, 64))).transpose(2, 0, 1)
    assert np.abs(read(tmp_path / "photo.jpg")[0][0] - photo).mean() < 3
    full[2, 3] = 254
    for name, bands in (("rgba.png", colours), ("la.png", colours[..., :1])):
        Image.fromarray(np.concatenate([bands, full], -1)).save(tmp_path / name)
        with Source(tmp_path / name) as source, pytest.raises(BrokenImage, match="transparent pixels: flatten"):
            source.read(0)
    palette.save(tmp_path / "palette.png", transparency=int(LENSES[0, 0, 0] // 64))
    with Source(tmp_path / "palette.png") as source, pytest.raises(BrokenImage, match="transparent pixels"):
        source.read(0)


# Hostile files


def saved(save: Callable[[Path, np.ndarray], object], array: np.ndarray = LENSES) -> Callable[[Path], bytes]:
    def content(path: Path) -> bytes:
        save(path, array)
        return path.read_bytes()

    return content


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def in_h5(make: Callable[[h5py.File], object]) -> Callable[[Path], bytes]:
    def content(path: Path) -> bytes:
        with h5py.File(path.with_name("elsewhere.hdf5"), "w") as file:
            file["images"] = LENSES
        path.with_name("secret").write_bytes(LENSES.tobytes())
        with h5py.File(path, "w") as file:
            make(file)
        return path.read_bytes()

    return content


def external_storage(file: h5py.File) -> None:
    secret = str(Path(file.filename).with_name("secret"))
    file.create_dataset("x", LENSES.shape, "u1", external=[(secret, 0, LENSES.nbytes)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(LENSES.shape, "u1")
    layout[:] = h5py.VirtualSource(str(Path(file.filename).with_name("elsewhere.hdf5")), "images", LENSES.shape)
    file.create_virtual_dataset("x", layout)


def fits_with(card: bytes, other: bytes) -> Callable[[Path], bytes]:
    def content(path: Path) -> bytes:
        good = saved(save_fits)(path)
        assert card in good
        return good.replace(card, other)

    return content


NAXIS1 = b"NAXIS1  =                    9"
HOSTILE: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "npy truncated": ("npy", lambda p: saved(np.save)(p)[:-9], r"truncated \(497 of 506 bytes\)"),
    "npy text": ("npy", lambda p: b"lens", "not an .npy array"),
    "npy of 10^12 pixels": ("npy", lambda p: npy_header((1, 10**6, 10**6)), "truncated"),
    "npy of negative size": ("npy", lambda p: npy_header((-4, -6)) + bytes(96), "no pixels"),
    "npz truncated": ("npz", lambda p: saved(STACKS["npz"])(p)[:-30], "not an .npz archive, or damaged"),
    "npz text": ("npz", lambda p: b"lens", "not an .npz archive"),
    "npz of 10^12 pixels": ("npz", lambda p: zipped("a.npy", npy_header((1, 10**6, 10**6))), "truncated"),
    "npz bomb": (
        "npz",
        lambda p: zipped("a.npy", npy_header((1, 9000, 9000), "|u1") + bytes(81000000)),
        "81,000,000 pixels",
    ),
    "npz without arrays": ("npz", lambda p: zipped("a.txt", b"lens"), "holds no images; it has none"),
    "h5 truncated": ("h5", lambda p: saved(save_h5)(p)[:-9], "not an HDF5 file, or damaged .truncated"),
    "h5 text": ("h5", lambda p: b"lens", "not an HDF5 file, or damaged .file signature"),
    "h5 link": ("h5", in_h5(lambda f: f.update(x=h5py.ExternalLink("elsewhere.hdf5", "images"))), "'x' is a link"),
    "h5 storage elsewhere": ("h5", in_h5(external_storage), "'x' is a link"),
    "h5 virtual": ("h5", in_h5(virtual), "'x' is a link"),
    "h5 of 10^12 pixels": (
        "h5",
        in_h5(lambda f: f.create_dataset("x", (10**6, 10**3, 10**3), "f4", chunks=(1, 999, 999))),
        "has a shape and no data",
    ),
    "fits truncated": ("fits", lambda p: saved(save_fits)(p)[:3000], "not a FITS file, or damaged .*truncated"),
    "fits text": ("fits", lambda p: b"lens", "not a FITS file"),
    "fits lying": ("fits", fits_with(NAXIS1, NAXIS1.replace(b"     9", b"900000")), "not a FITS file, or damaged"),
    "fits of 10^18 pixels": ("fits", fits_with(NAXIS1, NAXIS1.replace(b" " * 18 + b"9", b"9" + b"0" * 18)), "FITS"),
    "fits bits": ("fits", fits_with(b"BITPIX  =                    8", b"BITPIX  =                   13"), "FITS"),
    "png truncated": ("png", lambda p: saved(save_png, LENSES[0])(p)[:70], "truncated|broken|not enough"),
    "png that is a jpeg": ("png", lambda p: saved(save_png, LENSES[0])(p.with_suffix(".jpg")), "not a PNG picture"),
    "png bomb": ("png", lambda p: png(LENSES[0, ..., None], 0, (60000, 60000)), "PNG picture, or damaged .*bomb"),
    "png smaller bomb": ("png", lambda p: png(LENSES[0, ..., None], 0, (9000, 9000)), "81,000,000 pixels"),
    "tif truncated": ("tif", lambda p: saved(save_tiff)(p)[:200], "."),
    "tif text": ("tif", lambda p: b"lens", "not a TIFF picture"),
    "tif bomb": ("tif", lambda p: tiff(DEEP[..., :3], size=(60000, 60000)), "TIFF picture, or damaged .*bomb"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_named_in_one_line_and_costs_no_memory(tmp_path, name, packed):
    suffix, make, said = HOSTILE[name]
    (tmp_path / "in").mkdir()
    content = make(tmp_path / f"hostile.{suffix}")
    (tmp_path / "in" / f"bad.{suffix}").write_bytes(content)
    save = {**STACKS, "png": save_png}[suffix]
    save(tmp_path / "in" / f"good.{suffix}", LENSES[0] if suffix == "png" else LENSES)
    source_path = zip_of(tmp_path / "in") if packed else tmp_path / "in"
    del content
    tracemalloc.start()
    with Source(source_path) as source:
        reasons = [(broken.name, broken.reason) for broken in source.broken]
        for i in range(len(source)):
            try:
                source.read(i)
            except BrokenImage as error:
                reasons.append((source.name(i), str(error)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons
    for file, reason in reasons:
        assert file.startswith(f"bad.{suffix}")
        assert "\n" not in reason
        assert len(reason) < 300
    assert re.search(said, reasons[-1][1])
    assert peak < 60e6
