"""`lens-ldm prepare`: what users have becomes a cache, what is broken is named, nothing is executed."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shared.data import readers
from shared.data.cache import LensImages
from shared.data.readers import class_labels, natural_key, prepare
from shared.errors import UserError

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
    assert capsys.readouterr().out.count("\n") == 3 * 4


def test_natural_order_and_classes():
    names = ["b/x.npy", "a/s10.npy", "a/s2.npy", "a/s2b.npy", "a/s02.npy", "10.npy", "9.npy"]
    in_order = ["9.npy", "10.npy", "a/s02.npy", "a/s2.npy", "a/s2b.npy", "a/s10.npy", "b/x.npy"]
    assert sorted(names, key=natural_key) == in_order
    assert class_labels(["a.npy", "b.npy"]) == (["none"], [0, 0])
    assert class_labels(["vort/a.npy", "no/x/b.npy", "no/c.npy"]) == (["no", "vort"], [1, 0, 0])
    assert class_labels(["Samples/a.npy", "Samples/b.npy"]) == (["Samples"], [0, 0])
    assert class_labels(["set/no/a.npy", "set/vort/b.npy"]) == (["no", "vort"], [0, 1])  # as archives are often packed
    assert class_labels(["set/no/a.npy", "set/b.npy"]) == (["set"], [0, 0])


def test_shapes_and_types_are_reconciled_and_units_kept(tmp_path, capsys):
    image = np.arange(24).reshape(4, 6)
    files = {"a": image, "b": image[None] + 1, "c": image[..., None] + 2}
    files |= {"d": (image + 3).astype(">f8"), "e": np.asfortranarray(image + 4.0), "f": (image + 5).astype(np.uint8)}
    files |= {"g": np.full((4, 6), 900), "h": image}
    cache = prepare(save_all(tmp_path / "in", {f"{k}.npy": v for k, v in files.items()}), tmp_path / "out")
    for i in range(6):
        np.testing.assert_array_equal(cache.images[i, 0], image + i)
    assert cache.value_range == (0, 900)
    printed = capsys.readouterr()
    assert "8 images (1, 4, 6), range [0, 900], classes: none 8; 1 duplicates" in printed.out
    assert f"mean {np.mean([f.mean() for f in files.values()]):.4g}" in printed.out
    assert "1 images are constant" in printed.err


def test_an_interrupted_prepare_reads_only_the_rest(tmp_path, monkeypatch, capsys):
    folder, images = lens_files(tmp_path / "in")
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4 * 96)
    real, read = readers._finite, []

    def finite(image):
        read.append(image)
        if len(read) == 10:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(readers, "_finite", finite)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out")
    with pytest.raises(UserError, match="unfinished"):
        LensImages(tmp_path / "out")
    np.testing.assert_array_equal(prepare(folder, tmp_path / "out").images, images.astype(np.float32))
    assert len(read) == 10 + 4
    assert "written" in capsys.readouterr().out
    prepare(folder, tmp_path / "out")
    assert len(read) == 10 + 4
    assert "already prepared" in capsys.readouterr().out
    np.save(folder / "no" / "sample1.npy", images[7])  # same name, same size, other content
    with pytest.raises(UserError, match=r"source\.fingerprint"):
        prepare(folder, tmp_path / "out")


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


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
    "channels": (lambda p: np.save(p, np.zeros((3, 4, 6))), r"has shape \(3, 4, 6\), not"),
    "scalar": (lambda p: np.save(p, 3.0), r"has shape \(\), not"),
    "no pixels": (lambda p: np.save(p, np.zeros((1, 0, 6))), "no pixels"),
    "object": (lambda p: np.save(p, np.array([GOOD, "axion"], dtype=object)), "pickled object array"),
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
    folder = save_all(tmp_path / "in", {f"s{i}.npy": GOOD for i in range(30)})
    for i in range(5, 20):
        (folder / f"s{i}.npy").write_text("lens")
    np.save(folder / "s25.npy", np.zeros((8, 8)))
    with pytest.raises(UserError) as caught:
        prepare(folder, tmp_path / "out")
    said = str(caught.value)
    assert "15 of 30 images" in said
    assert "s14.npy" in said
    assert "s15.npy" not in said
    assert "and 5 more" in said
    assert "14 of (1, 4, 6) such as s0.npy, 1 of (1, 8, 8) such as s25.npy" in said
    shutil.rmtree(folder)
    save_all(folder, {f"s{i}.npy": GOOD * (np.nan if i % 3 == 0 else 1) for i in range(30)})
    with pytest.raises(UserError, match="10 of 30 images"):
        prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hostile_pickle_is_never_run(tmp_path):
    target = tmp_path / "owned"
    folder = save_all(tmp_path / "in", {"a.npy": GOOD})
    np.save(folder / "b.npy", np.array([Payload(target)], dtype=object), allow_pickle=True)
    (folder / "c.npy").write_bytes(pickle.dumps(Payload(target)))
    for source in (folder, zip_of(folder), folder / "b.npy", folder / "c.npy"):
        with pytest.raises(UserError, match=r"pickled object array|not an .npy array"):
            prepare(source, tmp_path / "out")
    assert not target.exists()
    np.load(folder / "b.npy", allow_pickle=True)
    assert target.exists()  # the pickle was a live one


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
    np.save(tmp_path / "one.npy", np.zeros((4, 3, 8, 8)))
    np.save(tmp_path / "nan.npy", np.stack([GOOD[0], GOOD[0] * np.nan]))
    folder = save_all(tmp_path / "in", {"a.npy": GOOD})
    for source, said in (
        ("missing", "no such folder or file"),
        ("empty", "no .npy files in"),
        ("bad.zip", "not a zip archive.*download complete"),
        ("lenses.h5", "cannot be read: give a folder"),
        ("one.npy", r"has shape \(4, 3, 8, 8\).*\(N, H, W\)"),
        ("nan.npy", r"1 of 2 images in .*\n  nan.npy\[1\]: has 24 pixels"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(tmp_path / source, tmp_path / "out")
    with pytest.raises(UserError, match="lies inside SOURCE"):
        prepare(folder, folder / "out")
    (folder / "b.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(UserError, match=r"1 of 2 images in .*\n  b.npy: No such file"):
        prepare(folder, tmp_path / "out")


def test_linked_class_folders_are_read_and_loops_are_not(tmp_path):
    elsewhere = save_all(tmp_path / "disk2", {"x.npy": GOOD, "y.npy": GOOD * 2})
    folder = save_all(tmp_path / "in", {"no/a.npy": GOOD})
    (folder / "vort").symlink_to(elsewhere)
    (folder / "no" / "loop").symlink_to(folder)
    cache = prepare(folder, tmp_path / "out")
    assert cache.index["files"] == ["no/a.npy", "vort/x.npy", "vort/y.npy"]


def test_the_command_line(tmp_path, capsys):
    folder, _ = lens_files(tmp_path / "in")
    readers.main([str(folder), "--out", str(tmp_path / "out")])
    assert LensImages(tmp_path / "out").index["source"]["kind"] == "folder"
    assert "classes: no 6, vort 6" in capsys.readouterr().out
