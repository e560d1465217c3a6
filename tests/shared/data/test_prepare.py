"""`lens-ldm prepare`: what users have becomes a cache, what is broken is named or left out, nothing is lost."""

import io
import json
import resource
import shutil
import signal
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.cli import main
from shared.data import prepare as command
from shared.data.cache import CacheWriter, LensImages
from shared.data.prepare import prepare
from shared.data.sources import Source, class_labels, natural_key
from shared.errors import UserError
from tests.processes import kill_after

SHAPE = (1, 4, 6)


def random_images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def save_all(folder: Path, files: dict[str, np.ndarray]) -> Path:
    for name, array in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, array)
    return folder


def zip_of(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def lens_files(folder: Path, count: int = 12) -> tuple[Path, np.ndarray]:
    images = random_images(count).astype(np.float64)
    names = [f"{'no' if i < count // 2 else 'vort'}/sample{i + 1}.npy" for i in range(count)]
    return save_all(folder, dict(zip(names, images, strict=True))), images


def test_folder_zip_and_single_file_make_the_same_images(tmp_path, capsys):
    folder, images = lens_files(tmp_path / "Samples")
    for junk in ("__MACOSX/no/sample1.npy", "no/._sample2.npy", ".DS_Store", "no/.ipynb_checkpoints/sample1.npy"):
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / junk).write_bytes(b"junk")
    (folder / "README.txt").write_text("not an image")
    np.save(tmp_path / "one.npy", images[:, 0])
    np.save(tmp_path / "two.npy", np.asfortranarray(images))
    caches = [
        prepare(source, tmp_path / "out" / str(i))
        for i, source in enumerate([folder, zip_of(folder), tmp_path / "one.npy", tmp_path / "two.npy"])
    ]
    for cache in caches:
        np.testing.assert_array_equal(cache.images, images.astype(np.float32))
        assert cache.index["hashes"] == caches[0].index["hashes"]
        assert cache.value_range == (0.0, 1.0)
    for cache in caches[:2]:
        assert cache.index["classes"] == ["no", "vort"]
        assert cache.index["labels"] == [0] * 6 + [1] * 6
        assert cache.index["files"][:2] == ["no/sample1.npy", "no/sample2.npy"]
    assert caches[2].index["classes"] == ["none"]
    printed = capsys.readouterr().out
    assert printed.count("  images   12 of 6 × 4, 1 channel") == printed.count("written in") == 4
    for cache in caches:
        assert Image.open(cache.path / "contact_sheet.png").width > 500


def test_natural_order_and_classes():
    names = ["b/x.npy", "a/s10.npy", "a/s2.npy", "a/s2b.npy", "a/s02.npy", "10.npy", "9.npy"]
    in_order = ["9.npy", "10.npy", "a/s02.npy", "a/s2.npy", "a/s2b.npy", "a/s10.npy", "b/x.npy"]
    assert sorted(names, key=natural_key) == in_order
    assert class_labels(["a.npy", "b.npy"]) == (["none"], [0, 0])
    assert class_labels(["vort/a.npy", "no/x/b.npy", "no/c.npy"]) == (["no", "vort"], [1, 0, 0])
    assert class_labels(["Samples/a.npy", "Samples/b.npy"]) == (["Samples"], [0, 0])
    assert class_labels(["train/no/a.npy", "val/no/b.npy", "val/vort/c.npy"]) == (["no", "vort"], [0, 0, 1])
    assert class_labels(["train/a.npy", "val/b.npy"]) == (["train", "val"], [0, 1])
    assert class_labels(["set/no/a.npy", "set/vort/b.npy"]) == (["no", "vort"], [0, 1])  # as archives are often packed
    assert class_labels(["set/no/a.npy", "set/b.npy"]) == (["set"], [0, 0])


def test_shapes_and_types_are_reconciled_and_units_kept(tmp_path, capsys):
    image = np.arange(30).reshape(5, 6)
    files = {"a": image, "b": image[None] + 1, "c": image[..., None] + 2}
    files |= {"d": (image + 3).astype(">f8"), "e": np.asfortranarray(image + 4.0), "f": (image + 5).astype(np.uint8)}
    files |= {"g": image * 31, "h": image}
    cache = prepare(save_all(tmp_path / "in", {f"{k}.npy": v for k, v in files.items()}), tmp_path / "out")
    for i in range(6):
        np.testing.assert_array_equal(cache.images[i, 0], image + i)
    assert cache.value_range == (0, 899)
    printed = capsys.readouterr().out
    assert "images   8 of 6 × 5, 1 channel" in printed
    assert "[0, 899]" in printed
    assert "0 constant, 1 duplicates (each in the split of its twin)" in printed
    assert f"mean {np.mean([f.mean() for f in files.values()]):.4g}" in printed
    assert "classes" not in printed


def test_an_interrupted_prepare_reads_only_the_rest(tmp_path, monkeypatch, capsys):
    folder, images = lens_files(tmp_path / "in")
    monkeypatch.setattr(command, "CHUNK_BYTES", 4 * 96)
    real, read = Source.read, []

    def stopped(self, i):
        read.append(i)
        if len(read) == 10:
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr(Source, "read", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out")
    with pytest.raises(UserError, match="unfinished"):
        LensImages(tmp_path / "out")
    np.testing.assert_array_equal(prepare(folder, tmp_path / "out").images, images.astype(np.float32))
    assert len(read) == 10 + 4
    assert "written" in capsys.readouterr().out
    (tmp_path / "out" / "contact_sheet.png").unlink()  # as after a kill at the very end
    prepare(folder, tmp_path / "out")
    assert len(read) == 10 + 4
    assert "already prepared" in capsys.readouterr().out
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    np.save(folder / "no" / "sample1.npy", images[7])  # same name, same size, other content
    with pytest.raises(UserError, match=r"source\.fingerprint"):
        prepare(folder, tmp_path / "out")
    (tmp_path / "kept").mkdir()
    for path in (tmp_path / "in").iterdir():
        path.rename(tmp_path / "kept" / path.name)
    with pytest.raises(UserError, match="it is empty"):
        prepare(folder, tmp_path / "out")
    assert len(LensImages(tmp_path / "out")) == 12


def prepare_slowly(source: Path, out: Path) -> None:
    command.CHUNK_BYTES = 4 * 96
    write = CacheWriter.write

    def told(self: CacheWriter, indices: range, images: np.ndarray) -> None:
        write(self, indices, images)
        print(indices.start, flush=True)
        time.sleep(0.01)

    CacheWriter.write = told
    command.prepare(source, out, skip_bad=True)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip of stacks"])
def test_sigkill_at_any_time_and_the_same_command_goes_on(tmp_path, packed):
    images = random_images(300)
    images[100], images[200, 0, 1, 1] = 0.5, np.nan
    names = [f"{'no' if i < 150 else 'vort'}/s{i}.npy" for i in range(300)]
    if packed:
        save_all(tmp_path / "in", {"no/a.npy": images[:150], "vort/a.npy": images[150:]})
    else:
        save_all(tmp_path / "in", dict(zip(names, images, strict=True)))
    source = zip_of(tmp_path / "in") if packed else tmp_path / "in"
    for lines in (5, 20):
        assert kill_after(lines, tmp_path, prepare_slowly, source, tmp_path / "out") == -signal.SIGKILL
        with pytest.raises(UserError, match="unfinished"):
            LensImages(tmp_path / "out")
    cache = prepare(source, tmp_path / "out", skip_bad=True)
    good = [i for i in range(300) if i not in (100, 200)]
    np.testing.assert_array_equal(cache.images, images[good])
    assert cache.index["labels"] == [int(i >= 150) for i in good]
    assert [skipped["reason"].split(",")[0] for skipped in cache.index["source"]["skipped"]] == [
        "is constant",
        "has 1 pixels that are NaN or infinite in float32",
    ]
    if not packed:
        assert cache.index["files"] == [names[i] for i in good]


def test_a_full_disk_keeps_what_is_written(tmp_path):
    images = random_images(2000, shape=(1, 8, 8))
    np.save(tmp_path / "a.npy", images)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(UserError, match="run the same command again") as caught:
            prepare(tmp_path / "a.npy", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="unfinished"):
        LensImages(tmp_path / "out")
    done = json.loads((tmp_path / "out" / "progress.json").read_text())["done"]
    assert done == [0, 256, 512, 768]
    np.testing.assert_array_equal(prepare(tmp_path / "a.npy", tmp_path / "out").images, images)


# What is broken


def nested_header(path: Path) -> None:
    header = b"{'descr': " + b"(" * 5000
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


GOOD = random_images(1)[0]
FAULTS = {
    "nan": (lambda p: np.save(p, np.where(GOOD < 0.5, np.nan, GOOD)), "pixels that are NaN or infinite"),
    "overflow": (lambda p: np.save(p, GOOD.astype(np.float64) * 1e300), "infinite in float32"),
    "truncated": (lambda p: p.write_bytes(npy_bytes(GOOD)[:200]), r"truncated \(200 of 224 bytes\)"),
    "cut in the header": (lambda p: p.write_bytes(npy_bytes(GOOD)[:50]), "not an .npy array"),
    "empty": (lambda p: p.write_bytes(b""), "not an .npy array"),
    "text": (lambda p: p.write_text("lens"), "not an .npy array"),
    "nested header": (nested_header, "not an .npy array"),
    "two arrays": (lambda p: p.write_bytes(2 * npy_bytes(GOOD)), "224 bytes after its array"),
    "complex": (lambda p: np.save(p, GOOD + 1j), "complex64, not real numbers"),
    "text array": (lambda p: np.save(p, np.array([["a"]])), "not real numbers"),
    "channels": (lambda p: np.save(p, np.zeros((3, 4, 6))), r"has images of shape \(3, 4, 6\), most are \(1, 4, 6\)"),
    "constant": (lambda p: np.save(p, np.full((4, 6), 2)), "is constant, 2 in every pixel"),
    "five axes": (lambda p: np.save(p, np.zeros((1, 1, 1, 4, 6))), r"has shape \(1, 1, 1, 4, 6\), not"),
    "scalar": (lambda p: np.save(p, 3.0), r"has shape \(\), not"),
    "no pixels": (lambda p: np.save(p, np.zeros((1, 0, 6))), "no pixels"),
    "object": (lambda p: np.save(p, np.array([GOOD, "axion"], dtype=object)), "is a pickle of something else"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_named_and_nothing_is_left(tmp_path, fault, packed):
    folder = save_all(tmp_path / "in", {"no/a.npy": GOOD, "no/c.npy": GOOD})
    make, said = FAULTS[fault]
    make(folder / "no" / "b.npy")
    source = zip_of(folder) if packed else folder
    with pytest.raises(UserError, match=f"1 of 3 images in .*\n  no/b.npy: .*{said}"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    np.save(folder / "no" / "b.npy", GOOD)
    assert len(prepare(zip_of(folder) if packed else folder, tmp_path / "out")) == 3


def test_every_fault_is_reported_at_once(tmp_path):
    folder = save_all(tmp_path / "in", {f"s{i}.npy": GOOD + i for i in range(30)})
    for i in range(5, 20):
        (folder / f"s{i}.npy").write_text("lens")
    np.save(folder / "s25.npy", np.zeros((8, 8)))
    with pytest.raises(UserError) as caught:
        prepare(folder, tmp_path / "out")
    said = str(caught.value)
    assert "16 of 30 images" in said
    assert "(15 unreadable, 1 of another shape): repair or remove them, or leave them out with --skip-bad" in said
    assert "s14.npy" in said
    assert "s15.npy" not in said
    assert "and 6 more" in said
    assert "shapes: 14 of (1, 4, 6), 1 of (1, 8, 8)" in said
    shutil.rmtree(folder)
    save_all(folder, {f"s{i}.npy": GOOD * (np.nan if i % 3 == 0 else 0 if i == 1 else 1) for i in range(30)})
    with pytest.raises(UserError, match=r"11 of 30 images .* \(10 with NaN or infinity, 1 constant\)"):
        prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_images_are_left_out_and_recorded(tmp_path, capsys):
    images = random_images(12)
    folder = save_all(tmp_path / "in", {f"{'ab'[i % 2]}/s{i}.npy": image for i, image in enumerate(images)})
    (folder / "a" / "s0.npy").write_text("lens")
    np.save(folder / "b" / "s1.npy", images[1] * np.nan)
    np.save(folder / "b" / "s3.npy", np.zeros((4, 6)))
    np.save(folder / "a" / "s4.npy", np.zeros((8, 6)))
    for source in (folder, zip_of(folder)):
        cache = prepare(source, tmp_path / "out" / source.name, skip_bad=True)
        kept = [2, 6, 8, 10, 5, 7, 9, 11]
        np.testing.assert_array_equal(cache.images, images[kept])
        assert cache.index["labels"] == [0] * 4 + [1] * 4
        assert cache.index["source"]["skipped"] == [
            {"file": "a/s0.npy", "reason": "is not an .npy array"},
            {"file": "a/s4.npy", "reason": "has images of shape (1, 8, 6), most are (1, 4, 6)"},
            {"file": "b/s1.npy", "reason": "has 24 pixels that are NaN or infinite in float32"},
            {"file": "b/s3.npy", "reason": "is constant, 0 in every pixel"},
        ]
        assert "left out  4, all in index.json; the first: a/s0.npy is not an .npy array" in capsys.readouterr().out
        prepare(source, tmp_path / "out" / source.name, skip_bad=True)
        assert "already prepared" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"2 of 12 images .*1 unreadable, 1 of another shape"):
            prepare(source, tmp_path / "out" / source.name)
    shutil.rmtree(folder)
    save_all(folder, {"a.npy": np.zeros((4, 6)), "b.npy": np.zeros((4, 6))})
    with pytest.raises(UserError, match="2 of 2 images"):
        prepare(folder, tmp_path / "none", skip_bad=True)
    assert not (tmp_path / "none").exists()


def test_single_images_of_a_stack_are_left_out(tmp_path):
    images = random_images(9)
    images[4, 0, 2, 2] = np.inf
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(UserError, match=r"1 of 9 images in .*\n  a.npy\[4\]: has 1 pixels"):
        prepare(tmp_path / "a.npy", tmp_path / "out")
    cache = prepare(tmp_path / "a.npy", tmp_path / "out", skip_bad=True)
    np.testing.assert_array_equal(cache.images, np.delete(images, 4, 0))
    assert cache.index["files"][3:5] == ["a.npy[3]", "a.npy[5]"]


def test_an_archive_that_fails_its_checksum_loses_the_whole_stack(tmp_path):
    images = random_images(20, shape=(1, 32, 32))
    save_all(tmp_path / "in", {"a.npy": images[:10], "b.npy": images[10:]})
    source = tmp_path / "in.zip"
    with zipfile.ZipFile(source, "w") as archive:  # not compressed: only the checksum can tell
        for name in ("a.npy", "b.npy"):
            archive.write(tmp_path / "in" / name, name)
    content = bytearray(source.read_bytes())
    content[content.index(images[3].tobytes()[:32]) + 5] ^= 1
    source.write_bytes(content)
    with pytest.raises(UserError, match=r"of 20 images .*of a damaged archive(.|\n)*Bad CRC-32"):
        prepare(source, tmp_path / "out")
    cache = prepare(source, tmp_path / "out", skip_bad=True)
    np.testing.assert_array_equal(cache.images, images[10:])
    assert [skipped["file"] for skipped in cache.index["source"]["skipped"]] == [f"a.npy[{i}]" for i in range(10)]


def test_a_damaged_or_encrypted_member_of_a_zip_is_named(tmp_path):
    source = zip_of(save_all(tmp_path / "in", {"a.npy": GOOD, "b.npy": GOOD + 1}))
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        info = archive.getinfo("b.npy")
    content[info.header_offset + 30 + len("b.npy") + info.compress_size - 20] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 2 images in .*\n  b.npy"):
        prepare(source, tmp_path / "out")
    content = bytearray(zip_of(tmp_path / "in").read_bytes())
    content[6] |= 1  # the flag of an encrypted member, in its own header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    source.write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 2 images in .*encrypted"):
        prepare(source, tmp_path / "out")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and then the download stopped")
    (tmp_path / "lenses.h5").write_bytes(b"")
    (tmp_path / "lenses.csv").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.zeros((4, 5, 8, 8)))
    np.save(tmp_path / "nan.npy", np.stack([GOOD[0], GOOD[0] * np.nan]))
    folder = save_all(tmp_path / "in", {"a.npy": GOOD})
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.gif", "b.gif", "notes"):
        (texts / name).write_text("")
    for source, said in (
        ("missing", "no such folder or file"),
        ("empty", r"no images in .*empty \(it is empty\)"),
        (
            "texts",
            r"no images in .*\(2 .gif, 1 without suffix\)|\(1 without suffix, 2 .gif\): .npy .npz .h5 .* are read",
        ),
        ("bad.zip", "not a zip archive.*download complete"),
        ("lenses.csv", r"cannot be read: give a folder, a .zip, or one file of .npy .npz"),
        ("lenses.h5", "lenses.h5 is not an HDF5 file"),
        ("one.npy", r"one.npy has shape \(4, 5, 8, 8\), not \(H, W\)"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            prepare(tmp_path / source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"1 of 2 images in .*\n  nan.npy\[1\]: has 24 pixels"):
        prepare(tmp_path / "nan.npy", tmp_path / "out")
    with pytest.raises(UserError, match="lies inside SOURCE"):
        prepare(folder, folder / "out")
    (folder / "b.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(UserError, match=r"1 of 2 images in .*\n  b.npy: No such file"):
        prepare(folder, tmp_path / "out")
    (folder / "b.npy").unlink()
    prepare(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"is itself a data set.*lens-ldm inspect"):
        prepare(tmp_path / "out", tmp_path / "again")


def test_previews_beside_the_images_are_a_question(tmp_path):
    folder = save_all(tmp_path / "in", {"a.npy": GOOD, "b.npy": GOOD * 2})
    Image.fromarray(np.eye(5, dtype=np.uint8)).save(folder / "a.png")
    for source in (folder, zip_of(folder)):
        with pytest.raises(
            UserError, match=r"several formats \((2 .npy, 1 .png|1 .png, 2 .npy)\): choose one with --only"
        ):
            prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"--only .gif is no format; choose one of .npy"):
        prepare(folder, tmp_path / "out", only="gif")
    with pytest.raises(UserError, match="no images in"):
        prepare(folder, tmp_path / "out", only=".fits")
    assert prepare(folder, tmp_path / "out", only="PNG").image_shape == (1, 5, 5)
    assert len(prepare(folder, tmp_path / "npy", only=".npy")) == 2


def test_a_stack_is_prepared_in_little_memory(tmp_path, monkeypatch):
    images = random_images(3000, shape=(1, 64, 64))  # 49 MB
    np.save(tmp_path / "a.npy", images)
    expected, source = images[-1].copy(), tmp_path / "a.npy"
    del images
    monkeypatch.setattr(command, "write_contact_sheet", lambda *_: None)  # 60 MB, however many images
    prepare(source, tmp_path / "warm")  # what is imported only now is not counted
    tracemalloc.start()
    cache = prepare(source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(cache.images[-1], expected)
    assert peak < 30e6


def test_linked_class_folders_are_read_and_loops_are_not(tmp_path):
    elsewhere = save_all(tmp_path / "disk2", {"x.npy": GOOD, "y.npy": GOOD * 2})
    folder = save_all(tmp_path / "in", {"no/a.npy": GOOD})
    (folder / "vort").symlink_to(elsewhere)
    (folder / "no" / "loop").symlink_to(folder)
    cache = prepare(folder, tmp_path / "out")
    assert cache.index["files"] == ["no/a.npy", "vort/x.npy", "vort/y.npy"]


def test_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", lens=random_images(6)[:, 0], noise=random_images(6)[:, 0] * 0, kind=np.arange(6) % 2)
    main(["prepare", str(tmp_path / "a.npz"), "--out", str(tmp_path / "out"), "--key", "lens", "--labels", "kind"])
    assert LensImages(tmp_path / "out").index["source"]["kind"] == "npz"
    assert "classes  0 3, 1 3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", str(tmp_path / "a.npz"), "--out", str(tmp_path / "other")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert stopped.value.code == 0
    assert "(N, H, W) if it is in the only file of SOURCE" in capsys.readouterr().out


def test_what_a_strict_reader_tried(tmp_path: Path) -> None:
    from astropy.io import fits
    from PIL import Image

    images = random_images(6, 3)
    # Memoised tuples of tuples: whose repr doubles with each of 40 levels.
    bomb = b"\x80\x02cnumpy\ndtype\n" + b"U\x01aq\x00" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(40))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"
    (tmp_path / "bomb.npy").write_bytes(header.ljust(127) + b"\n" + bomb + b"\x85R.")
    with pytest.raises(UserError, match=r"bomb\.npy"):
        prepare(tmp_path / "bomb.npy", tmp_path / "bomb")
    np.save(tmp_path / "tenth.npy", images * np.float32(0.1) / images.max())
    assert prepare(tmp_path / "tenth.npy", tmp_path / "tenth", normalise="fixed:0,0.1").value_range == (0, 0.1)
    bands = np.random.default_rng(0).normal([[[[100]], [[1000]]]], 3, (8, 2, 30, 30))
    np.save(tmp_path / "bands.npy", bands)
    with pytest.raises(UserError, match="skies of their own"):
        prepare(tmp_path / "bands.npy", tmp_path / "bands", normalise="asinh:auto")
    prepare(tmp_path / "bands.npy", tmp_path / "bands")
    np.save(tmp_path / "offset.npy", 1e8 + np.random.default_rng(0).normal(0, 0.1, (4, 9, 9)))
    with pytest.raises(UserError, match="contrast that float32 cannot hold"):
        prepare(tmp_path / "offset.npy", tmp_path / "offset")
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).save(tmp_path / "white.tiff", tiffinfo={262: 0})
    with pytest.raises(UserError, match="without loss"):
        prepare(tmp_path / "white.tiff", tmp_path / "white")
    science = [fits.ImageHDU(images[k, 0], name="SCI", ver=k + 1) for k in range(3)]
    fits.HDUList([fits.PrimaryHDU(), *science]).writeto(tmp_path / "sci.fits")
    with pytest.raises(UserError, match="3 arrays named SCI"):
        prepare(tmp_path / "sci.fits", tmp_path / "sci", key="SCI")
    fits.HDUList([fits.PrimaryHDU(images[0, 0]), fits.ImageHDU(images[1:, 0])]).writeto(tmp_path / "mix.fits")
    assert len(prepare(tmp_path / "mix.fits", tmp_path / "mix", key="*")) == 6
