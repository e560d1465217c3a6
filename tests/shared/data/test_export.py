"""Files of samples are read back as they were: by their libraries, and by `lens-ldm prepare`."""

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.io import fits
from PIL import Image

from shared.data.cache import LensImages
from shared.data.export import FORMATS, Stack, check_formats, columns_csv, stored_rows, write_fits, write_npz, write_png
from shared.data.prepare import main as prepare
from shared.data.sources import Source
from shared.errors import UserError

N = 7


def stack(channels: int = 1, low: float = -2.0, high: float = 3.0) -> Stack:
    images = np.random.default_rng(channels).uniform(low, high, (N, channels, 6, 9)).astype(np.float32)
    theta = np.array([1.2, np.nan, *np.linspace(0.5, 1, N - 2)])
    columns = {"seeds": np.arange(40, 40 + N), "condition_theta_E": theta}
    columns["condition_class"] = np.array(["sphère", *["no_sub"] * (N - 1)])
    about = {
        "model": "modèle",
        "first_seed": 40,
        "count": N,
        "value_range": [low, high],
        "times": None,
        "observed": True,
    }
    about |= {"conditions": {"class": "x"}}
    return Stack(images.shape, lambda: iter([images[:3], images[3:]]), columns, about, {"lenses_per_second": 3.0})


def images_of(one: Stack) -> np.ndarray:
    return np.concatenate([*one.blocks()])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("key", ["npz", "npy", "fits", "hdf5", "png"])
def test_prepare_reads_what_is_written(tmp_path: Path, key: str, channels: int) -> None:
    one, (name, write) = stack(channels), FORMATS[key]
    if (key, channels) == ("png", 2):
        with pytest.raises(UserError, match="holds one channel, these images have 2"):
            check_formats([key], (2, 6, 9))
        return
    write(tmp_path / name, one)
    with Source(tmp_path / name) as source:
        found = np.stack([source.read(i) for i in range(N)])
    if key == "png":
        found = -2 + found * (5 / 65535)
        np.testing.assert_allclose(found, images_of(one), atol=0.501 * 5 / 65535, rtol=0)
    else:
        assert np.array_equal(found, images_of(one))


def test_pictures_go_through_prepare_as_a_whole(tmp_path: Path) -> None:
    """The whole command: a data set of values 0 to 65535, in the order of the seeds."""
    write_png(tmp_path / "png", stack())
    prepare([str(tmp_path / "png"), "--out", str(tmp_path / "data"), "--normalise", "fixed:0,65535"])
    data = LensImages(tmp_path / "data")
    found = -2 + data.batch(np.arange(N)).numpy() * (5 / 65535)
    np.testing.assert_allclose(found, images_of(stack()), atol=0.51 * 5 / 65535, rtol=0)


def test_the_scale_of_pictures_reaches_as_far_as_the_pixels(tmp_path: Path) -> None:
    one = stack()
    images = images_of(one)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -9.0, 11.0
    write_png(tmp_path / "png", Stack(one.shape, lambda: iter([images]), one.columns, one.about))
    facts = json.loads(Image.open(tmp_path / "png" / "0000000041.png").info["parameters"])
    assert (facts["low"], facts["high"], facts["seed"], facts["class"]) == (-9.0, 11.0, 41, "no_sub")
    assert np.asarray(Image.open(tmp_path / "png" / "0000000040.png"))[0, 0] == 0
    assert np.asarray(Image.open(tmp_path / "png" / "0000000041.png"))[0, 0] == 65535


def test_npz_holds_everything_and_needs_no_pickle(tmp_path: Path) -> None:
    one = stack()
    write_npz(tmp_path / "a.npz", one)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["images", "seeds", "condition_theta_E", "condition_class", "metadata"]
        assert np.array_equal(file["images"], images_of(one))
        assert file["condition_class"].tolist() == one.columns["condition_class"].tolist()
        assert json.loads(str(file["metadata"])) == {**one.about, **one.measured}
    write_npz(tmp_path / "b.npz", one)
    joined = np.concatenate([*stored_rows([tmp_path / "a.npz", tmp_path / "b.npz"], "images")])
    assert np.array_equal(joined, np.concatenate([images_of(one)] * 2))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[400] ^= 1  # a bit of a pixel
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        list(stored_rows([tmp_path / "a.npz"], "images"))


@pytest.mark.parametrize("channels", [1, 2])
def test_fits_has_a_cube_its_facts_and_a_table(tmp_path: Path, channels: int) -> None:
    one = stack(channels)
    write_fits(tmp_path / "a.fits", one)
    with fits.open(tmp_path / "a.fits") as file:
        file.verify("exception")
        cube, table, header = file[0].data, file["SAMPLES"].data, file[0].header
        expected = images_of(one)[:, :, ::-1]  # the bottom row is the first
        assert np.array_equal(cube, expected[:, 0] if channels == 1 else expected)
        assert table["seed"].tolist() == list(range(40, 47))
        np.testing.assert_array_equal(table["theta_E"], one.columns["condition_theta_E"])
        assert table["class"][1] == "no_sub"
        assert (header["SEED"], header["COUNT"], header["PIXLOW"], header["PIXHIGH"]) == (40, N, -2.0, 3.0)
        assert json.loads(header["FACTS"]) == one.about
        assert "DATE" not in header


def test_hdf5_has_chunks_columns_and_facts(tmp_path: Path) -> None:
    one = stack()
    FORMATS["hdf5"][1](tmp_path / "a.hdf5", one)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["images"].chunks == (N, 1, 6, 9)
        assert file["condition_class"].asstr()[:].tolist() == one.columns["condition_class"].tolist()
        np.testing.assert_array_equal(file["condition_theta_E"], one.columns["condition_theta_E"])
        assert file.attrs["model"] == "modèle"
        assert json.loads(file.attrs["conditions"]) == {"class": "x"}


@pytest.mark.parametrize("key", ["npz", "npy", "fits", "hdf5"])
def test_the_same_samples_are_the_same_bytes(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, (name, write) = stack(), FORMATS[key]
    write(tmp_path / f"a-{name}", one)
    monkeypatch.setattr("time.time", lambda: 1e9)
    write(tmp_path / f"b-{name}", one)
    assert (tmp_path / f"a-{name}").read_bytes() == (tmp_path / f"b-{name}").read_bytes()


def test_columns_as_text() -> None:
    lines = columns_csv(stack()).decode().splitlines()
    assert lines[:3] == ["seed,theta_E,class", "40,1.2,sphère", "41,nan,no_sub"]
    assert len(lines) == N + 1
