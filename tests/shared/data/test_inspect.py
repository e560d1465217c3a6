"""`lens-ldm inspect`: the table tells the truth, the pictures show the images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.cli import main
from shared.data.cache import CacheWriter, LensImages
from shared.data.inspect import table, write_contact_sheet, write_histogram
from shared.errors import UserError


def write(folder: Path, images: np.ndarray, **columns) -> LensImages:
    writer = CacheWriter(folder, len(images), images.shape[1:], {"kind": "test", "name": "sky"}, 16)
    for indices in writer.pending():
        writer.write(indices, images[indices.start : indices.stop])
    writer.finish(**columns)
    return LensImages(folder)


def ramp(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Image i is i / count on its left half, and 1 less on its right."""
    images = np.zeros((count, *shape), np.float32) + (np.arange(count, dtype=np.float32) / count).reshape(-1, 1, 1, 1)
    images[..., shape[2] // 2 :] -= 1
    return images


def test_the_table(tmp_path):
    images = ramp(30, (1, 8, 10))
    images[29], images[28, 0] = images[0], 0.5
    labels, classes = np.arange(30) % 3, ["axion", "cdm", "no_$ub"]
    mass = {"axion_mass": {"unit": "eV", "values": [1e-23 * i if i % 3 == 0 else np.nan for i in range(30)]}}
    cache = write(tmp_path / "sky", images, labels=labels, classes=classes, parameters=mass)
    lines = dict(line.split(maxsplit=1) for line in table(cache).splitlines()[1:])
    assert lines["images"] == "30 of 10 × 8, 1 channel, 0.0 MB"
    assert lines["source"] == "test sky"
    assert lines["classes"] == "axion 10, cdm 10, no_$ub 10"
    assert lines["axion_mass"] == "10 values: 0 to 2.7e-22 eV"
    assert lines["checked"].startswith("no NaN or infinity, 1 constant, 1 duplicates")
    assert f"mean {images.mean(dtype=float):.4g}, max {images.max():.4g}" in lines["pixels"]
    splits = [int(part.split()[1]) for part in lines["splits"].split(", ")]
    assert sum(splits) == 30


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("labelled", [0, 1, 3, 12])
def test_the_contact_sheet_shows_images_of_every_class_to_scale(tmp_path, channels, labelled):
    images = ramp(48, (channels, 96, 100))
    classes = {"labels": np.arange(48) % labelled, "classes": [f"c{i}" for i in range(labelled)]} if labelled else {}
    cache = write(tmp_path / "a", images, **classes)
    write_contact_sheet(cache, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    rows = {0: 5, 1: 5, 3: 3, 12: 8}[labelled]
    columns = 4 if labelled == 12 else 8
    assert pixels.shape == (62 + rows * 100 - 4 + 18, 172 + 8 * 104 - 4 + 95, 3)
    # The first image of the sheet is image 0, its left half brighter than its right.
    corner = pixels[62 : 62 + 96, 172 : 172 + 100].astype(int).sum(-1)
    assert (corner[:, :50] == corner[0, 0]).all()
    assert (corner[:, 50:] == corner[0, 50]).all()
    assert corner[0, 0] > corner[0, 50]
    centres = [pixels[62 + 48, 172 + k * 104 + 25].astype(int).sum() for k in range(columns)]
    assert centres == sorted(centres)  # in order, and all on one scale
    assert len(set(centres)) == columns
    assert (pixels[62 : 62 + 96, 172 + 100 : 172 + 104] == 255).all()


def test_small_and_large_images_and_strange_names_fit(tmp_path):
    for shape in ((1, 5, 7), (1, 700, 500)):
        cache = write(tmp_path / f"$a_{shape[1]}$", ramp(3, shape), labels=[0, 0, 1], classes=["$x^2", "a" * 40])
        write_contact_sheet(cache, tmp_path / "sheet.png")
        write_histogram(cache, tmp_path / "histogram.png")
        width, height = Image.open(tmp_path / "sheet.png").size
        assert 500 < width < 2000
        assert 200 < height < 900


def test_the_command_writes_beside_the_data_or_where_it_is_told(tmp_path, capsys):
    write(tmp_path / "a", ramp(10, (1, 20, 20)))
    main(["inspect", str(tmp_path / "a")])
    assert "10 of 20 × 20" in capsys.readouterr().out
    for name in ("contact_sheet.png", "histogram.png"):
        assert Image.open(tmp_path / "a" / name).width > 400
    main(["inspect", str(tmp_path / "a"), "--out", str(tmp_path / "b" / "c")])
    assert sorted(path.name for path in (tmp_path / "b" / "c").iterdir()) == ["contact_sheet.png", "histogram.png"]
    (tmp_path / "file").write_text("")
    for arguments, said in (
        ([str(tmp_path / "none")], "no data set at"),
        ([str(tmp_path / "a"), "--out", str(tmp_path / "file")], "name another folder with --out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *arguments])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_histogram_counts_the_pixels(tmp_path, monkeypatch):
    from shared.data import inspect

    drawn = {}

    def keep(figure, path):
        drawn[path.name] = [[patch.get_data() for patch in axes.patches] for axes in figure.axes]

    monkeypatch.setattr(inspect, "_save", keep)
    images = ramp(40, (1, 10, 10))
    cache = write(tmp_path / "a", images, labels=np.arange(40) // 20, classes=["low", "high"])
    write_histogram(cache, tmp_path / "h.png")
    of_pixels, of_means = drawn["h.png"]
    for part, stairs in zip((images[:20], images[20:]), of_pixels, strict=True):
        np.testing.assert_allclose(stairs.values, np.histogram(part, stairs.edges)[0] / part.size)
    for part, stairs in zip((images[:20], images[20:]), of_means, strict=True):
        assert stairs.values.sum() == pytest.approx(1)
        assert (stairs.values[stairs.edges[1:] < part.mean((1, 2, 3)).min()] == 0).all()
    with pytest.raises(UserError, match="no data set"):
        LensImages(tmp_path / "none")


@pytest.mark.slow
def test_symmetries_and_another_data_set_are_asked_for_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, sigma in (("a", 0.1), ("b", 0.1), ("loud", 0.2)):
        images = np.zeros((800, 1, 16, 16), np.float32)
        images[..., 4:8, 4:8] = 1  # to the upper left, in all of them
        write(tmp_path / name, images + sigma * rng.standard_normal(images.shape).astype(np.float32))
    main(["inspect", str(tmp_path / "a"), "--symmetries", "--against", str(tmp_path / "b"), "--count", "800"])
    shown = capsys.readouterr().out
    assert re.search(r"flip_lr +broken", shown)
    assert re.search(r"rot180 +broken", shown)
    assert json.loads((tmp_path / "a" / "symmetries.json").read_text())["allowed"] == ["identity", "transpose"]
    interval = re.search(r"AUC [\d.]+ \(95 %: ([\d.]+) to ([\d.]+)", shown)
    assert interval is not None
    assert float(interval[1]) < 0.5 < float(interval[2])
    main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "loud")])
    louder = re.search(r"AUC ([\d.]+)", capsys.readouterr().out)
    assert louder is not None
    assert float(louder[1]) > 0.9
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "a")])
    assert "share none" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


def test_a_data_set_that_was_spoiled_since_is_one_line(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", ramp(20, (1, 16, 16)))
    pixels = np.lib.format.open_memmap(tmp_path / "data" / "images.npy", mode="r+")
    pixels[3, 0, 4, 4] = np.nan
    pixels.flush()
    with pytest.raises(UserError, match=r"data holds pixels that are NaN or infinite: delete the folder and prepare"):
        write_histogram(LensImages(dataset.path), tmp_path / "h.png")
