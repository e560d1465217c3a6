"""Data in units of their own through both stages and back: 16-bit integers with `fixed`, a high dynamic range with `asinh`."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.autoencoder import Autoencoder
from shared.checkpoint import load_autoencoder, read_config
from shared.cli import main
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from stage2_diffusion.generator import Generator

pytestmark = pytest.mark.slow
READ = 5.0  # counts of read noise; variance = READ² + light / gain
GAIN, SKY = {"bits": 0.005, "deep": 0.05}, {"bits": 3000.0, "deep": 100.0}  # electrons a count; counts
STEPS = {"bits": 400, "deep": 600}  # of stage 1
NORMALISE = {"bits": "fixed:0,65535", "deep": "asinh:auto"}


def lenses(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blobs of light on a sky (count, 30, 30), without noise and with it."""
    rng = np.random.default_rng(seed)
    axis = np.arange(30) - 14.5
    centre, width = rng.uniform(-3, 3, (count, 2, 1, 1)), rng.uniform(3.5, 5, (count, 1, 1))
    faintest, brightest = {"bits": (15_000, 40_000), "deep": (200, 20_000)}[kind]
    peak = faintest * (brightest / faintest) ** rng.random((count, 1, 1))
    r2 = (axis[:, None] - centre[:, 0]) ** 2 + (axis - centre[:, 1]) ** 2
    clean = SKY[kind] + peak * np.exp(-r2 / 2 / width**2)
    noisy = rng.poisson(clean * GAIN[kind]) / GAIN[kind] + READ * rng.standard_normal(clean.shape)
    return clean, noisy.clip(0, 65535).round().astype("<u2") if kind == "bits" else noisy.astype("<f4")


@pytest.fixture(scope="module", params=["bits", "deep"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder in which both stages have been trained on such data, made the current one."""
    folder = tmp_path_factory.mktemp(request.param)
    before = Path.cwd()
    os.chdir(folder)
    np.save("lenses.npy", lenses(request.param, 1200)[1])
    main(["prepare", "lenses.npy", "--out", "data", "--normalise", NORMALISE[request.param]])
    common = ["--data.path", "data", "--logger.wandb", "disabled", "--trainer.accelerator", "cpu"]
    common += ["--trainer.precision", "fp32", "--trainer.progress", "false", "--data.batch_size", "16"]
    main([
        "train-vqvae", "--config", "stage1/vqvae.yaml", "--name", "one", *common, "--trainer.max_steps", str(STEPS[request.param]),
        "--autoencoder.widths", "[16, 16]", "--autoencoder.decoder_blocks", "1", "--autoencoder.quantizer.name", "none",
        "--optimizer.warmup_steps", "20", "--ema.decay", "0.9",
    ])  # fmt: skip
    main([
        "train-diffusion", "--config", "stage2/unet.yaml", "--name", "two", *common, "--trainer.max_steps", "200",
        "--autoencoder", "checkpoints/one", "--backbone.width", "16", "--backbone.blocks", "1", "--backbone.heads", "1",
        "--backbone.multipliers", "[1, 1]", "--optimizer.warmup_steps", "20", "--ema.decay", "0.9",
    ])  # fmt: skip
    main(["sample", "checkpoints/two", "--count", "64", "--out", "samples"])
    yield request.param
    os.chdir(before)


def test_samples_come_out_in_the_datas_own_units(kind: str) -> None:
    with np.load("samples/samples.npz", allow_pickle=False) as file:
        images, metadata = file["images"], json.loads(str(file["metadata"]))
    real = LensImages("data")
    assert images.min() >= real.transform.low
    assert images.max() <= real.transform.high
    border = np.ones((30, 30), bool)
    border[2:-2, 2:-2] = False
    backgrounds = [np.median(x[:, 0, border]) for x in (images, real.images)]
    noise = np.sqrt(READ**2 + SKY[kind] / GAIN[kind])
    assert backgrounds[0] == pytest.approx(backgrounds[1], abs=0.5 * noise)
    assert 0.7 < np.median(images.max((1, 2, 3))) / np.median(real.images.max((1, 2, 3))) < 1.4
    assert np.abs(np.diff(images[:, 0, 0])).mean() == pytest.approx(
        np.abs(np.diff(real.images[:, 0, 0])).mean(), rel=0.25
    )
    assert PixelTransform.from_config(metadata) == real.transform


def test_the_law_fitted_after_training_is_the_one_the_data_were_made_with(kind: str) -> None:
    law = read_config("checkpoints/one")["metrics"]["noise"]
    assert law["b"] == pytest.approx(1 / GAIN[kind], rel=0.15)
    assert law["a"] == pytest.approx(READ**2 + law["background"] / GAIN[kind], rel=0.1)
    assert law["background"] == pytest.approx(SKY[kind], rel=0.05)


def test_clean_decodings_are_the_light_in_the_datas_units_faint_and_bright(kind: str) -> None:
    data = LensImages("data")
    model, _ = load_autoencoder("checkpoints/one", data.image_shape, data.transform)
    clean, test = lenses(kind, 1200)[0][:, None], data.split("test")
    decoded = model.decode(model.encode(data.batch(test)), observed=False).numpy()
    sigma = np.sqrt(READ**2 + clean[test] / GAIN[kind])
    error = (decoded - clean[test]) / sigma
    signal = clean[test] - SKY[kind]
    for low, high in ((-1, 50), (50, 500), (500, 5000), (5000, np.inf)):
        level = (signal >= low) & (signal < high)
        assert abs(error[level].mean()) < 0.5, low  # of the noise of one pixel
    assert np.median(np.abs(error)) < 0.5


def test_evaluation_measures_on_the_scale_of_the_data(kind: str) -> None:
    main(["evaluate", "checkpoints/two", "--reference", "data", "--count", "60", "--samples", "samples/samples.npz"])
    metrics = json.loads(Path("checkpoints/two/evaluation/metrics.json").read_text())
    score = metrics["distances"]["fd_efflite0"]["samples"]
    transform = LensImages("data").transform
    assert score["value_range"] == [transform.low, transform.high]
    assert score["stretch"] == transform.stretched
    assert score["stretch"].startswith("linear" if kind == "bits" else "asinh, scale")
    assert 0 < score["floor"] < score["distance"]
    assert PixelTransform.from_config(metrics) == transform
    report = Path("checkpoints/two/evaluation/report.html").read_text()
    assert f"{transform.low:g} to {transform.high:g}, {transform.stretched}." in report


def test_stage_1_is_scored_in_the_datas_units(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_vqvae.evaluate.TIMED", 1e-9)
    main(["evaluate-vqvae", "checkpoints/one", "--reference", "data", "--count", "60", "--device", "cpu"])
    assert capsys.readouterr().out.count("no clean truth") == 1  # these were not simulated by us
    metrics = json.loads(Path("checkpoints/one/evaluation/metrics.json").read_text())
    assert metrics["truth"] is None
    assert metrics["observed"]["psnr"] == pytest.approx(read_config("checkpoints/one")["metrics"]["psnr"], abs=1.0)
    assert metrics["noise"]["background"] == pytest.approx(SKY[kind], rel=0.05)
    curve = metrics["noise"]["residuals"]
    bins = [(s, v) for n, s, v in zip(curve["pixels"], curve["signal"], curve["variance"], strict=True) if n > 1000]
    assert len(bins) >= 3
    for signal, variance in bins:
        light = SKY[kind] + signal
        assert 0.8 < variance / (READ**2 + light / GAIN[kind]) < 1.6, signal


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("name", "how", "change"),
    [
        ("range", None, lambda x: x / 65535),
        ("minmax", "minmax", lambda x: x),
        ("kind", {"bits": "asinh:auto", "deep": "none"}, lambda x: x),
    ],
)
def test_data_of_other_units_or_another_normalisation_are_refused(
    kind: str, capsys: pytest.CaptureFixture[str], name: str, how: dict | str | None, change: Callable
) -> None:
    np.save(f"{name}.npy", change(lenses(kind, 60)[1].astype(np.float32)))
    how = how[kind] if isinstance(how, dict) else how or {"bits": "none", "deep": "asinh:auto"}[kind]
    main(["prepare", f"{name}.npy", "--out", name, "--normalise", how])
    capsys.readouterr()
    told = refused(capsys, ["evaluate", "checkpoints/two", "--reference", name, "--count", "4"])
    assert "the model of data was trained on range [" in told
    assert "with --normalise " in told
    told = refused(capsys, ["train-diffusion", "--config", "stage2/unet.yaml", "--name", "x", "--data.path", name,
                            "--autoencoder", "checkpoints/one"])  # fmt: skip
    assert "checkpoints/one was trained on range [" in told


def test_a_run_does_not_go_on_with_the_same_images_normalised_otherwise(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["prepare", "lenses.npy", "--out", "again", "--normalise", "fixed:-100,65535"])
    shutil.move("data", "kept")
    shutil.move("again", "data")
    capsys.readouterr()
    try:
        told = refused(capsys, ["train-vqvae", "--config", "checkpoints/one/config.yaml"])
    finally:
        shutil.move("data", "again")
        shutil.move("kept", "data")
    assert "was trained with another data" in told


def test_a_published_model_of_before_loads_as_linear(kind: str, tmp_path: Path) -> None:
    shutil.copytree("checkpoints/two/model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert ("transform" in config["autoencoder"]) == (kind == "deep")
    config["autoencoder"].pop("transform", None)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    old, new = (Generator.from_pretrained(path, "cpu") for path in (tmp_path / "model", "checkpoints/two"))
    low, high = config["autoencoder"]["value_range"]
    assert old.autoencoder.transform == PixelTransform(low, high)
    assert isinstance(old.autoencoder, Autoencoder)
    if kind == "bits":
        assert torch.equal(old.images(range(2), steps=2), new.images(range(2), steps=2))
    else:
        assert not torch.allclose(old.images(range(2), steps=2), new.images(range(2), steps=2), rtol=0.1)
