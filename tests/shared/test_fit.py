"""`lens-ldm fit`: from a data set, an archive of samples or a folder to a table, for people and for programs."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.cli import main
from shared.data.cache import LensImages
from shared.simulate.preset import Preset
from shared.simulate.run import simulate_to

COUNT = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "lenses"
    simulate_to(folder, Preset.load("deeplense"), COUNT, 3, workers=1, progress=False)
    return folder


def fit(*arguments: object) -> None:
    main(["fit", *map(str, arguments)])


def test_a_data_set_is_fitted_and_compared_with_its_truth(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(dataset, "--out", tmp_path / "deep" / "fits")
    shown = capsys.readouterr().out
    assert f"{COUNT} of {COUNT}, 100.0% (95 %: 61.0% to 100.0%)" in shown  # Wilson's interval
    assert "pull" in shown
    with open(tmp_path / "deep" / "fits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == COUNT
    assert all(0.95 < float(row["chi2"]) < 1.05 for row in rows)
    assert {"theta_E", "theta_E_error", "chi2_lit", "consistent", "consistent_lit"} <= set(rows[0])
    assert Image.open(tmp_path / "deep" / "fits.png").size[0] > 6 * 150


def test_images_without_truth_are_fitted_alike(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.load(dataset / "images.npy")[:2]
    np.savez(tmp_path / "samples.npz", images=images, seeds=np.arange(2), metadata=np.asarray("{}"))
    np.save(tmp_path / "many.npy", images[:, 0])
    tables = []
    for source in (dataset, tmp_path / "samples.npz", tmp_path / "many.npy"):
        fit(source, "--count", 2, "--out", tmp_path / "fits")
        tables.append((tmp_path / "fits.csv").read_text())
    assert tables[0] == tables[1] == tables[2]
    assert "pull" not in capsys.readouterr().out.splitlines()[-4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "no such"),
        (["{data}", "--preset", "deeplens"], "did you mean 'deeplense'"),
        (["{data}", "--preset", "model-2", "--class", "no_sub"], "64x64"),
        (["{data}", "--class", "vort"], "has no classes"),
        (["{data}", "--preset", "model-1"], "--noise A,B"),
        (["{data}", "--free", "n_s,colour"], "free in colour"),
        (["{data}", "--free", "q_l"], "has no q_l"),
        (["{data}", "--margin", "75"], "leaves nothing"),
        (["{data}", "--count", "0"], "--count"),
        (["{data}", "--out", "{data}/images.npy/fits"], "choose another --out"),
        (["{data}", "--out", "."], "--out . is no name for files: give one, such as --out result"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(*(a.format(tmp=tmp_path, data=dataset) for a in arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_images_rescaled_for_training_are_fitted_in_their_own_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = Preset.load("model-2").select(["no_sub"])
    simulate_to(tmp_path / "own", preset, 8, 3, workers=1, progress=False)
    main(["prepare", str(tmp_path / "own" / "images.npy"), "--out", str(tmp_path / "scaled"), "--normalise", "minmax"])
    fit(tmp_path / "scaled", "--preset", "model-2", "--out", tmp_path / "fits.of.2")
    assert "8 of 8" in capsys.readouterr().out
    assert (tmp_path / "fits.of.2.csv").exists()


def test_what_is_no_lens_has_no_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(0.5, 0.1, (2, 150, 150)))
    fit(tmp_path / "noise.npy", "--out", tmp_path / "fits")
    shown = capsys.readouterr().out
    assert "0 of 2" in shown
    assert "theta_E  " not in shown


def test_samples_are_compared_with_what_they_were_asked_for(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.load(dataset / "images.npy")[:3]
    asked = np.array(LensImages(dataset).index["parameters"]["theta_E"]["values"])[:3]
    off = {
        "condition_theta_E": asked - 0.1,
        "condition_q_s": np.full(3, np.nan),
        "condition_class": np.array(["a"] * 3),
    }
    np.savez(tmp_path / "samples.npz", images=images, seeds=np.arange(3), metadata=np.asarray("{}"), **off)
    fit(tmp_path / "samples.npz", "--out", tmp_path / "fits")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert float(rows["theta_E"][6]) == pytest.approx(0.1, abs=0.01)  # the bias
    assert len(rows["q_s"]) == len(rows["theta_E"]) - 3  # nothing was asked for
