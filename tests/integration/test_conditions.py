"""Lenses on request, from training to the command line: the network heeds what it is asked for, in whole and in part."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cli import main
from shared.data.cache import CacheWriter, LensImages
from shared.data.symmetries import FILE as SYMMETRIES
from shared.errors import UserError
from shared.metrics.obedience import obedience
from shared.metrics.use import use
from shared.report import read_metrics
from stage2_diffusion.generator import Generator
from stage2_diffusion.schedule import NoiseSchedule

pytestmark = pytest.mark.slow
COUNT, SIDE = 400, 6
CLASSES = ["left", "right"]
AXIS = np.arange(SIDE) - (SIDE - 1) / 2
BLOBS = np.stack([np.exp(-((AXIS - x) ** 2 + AXIS[:, None] ** 2) / 2) for x in (-1.5, 1.5)])  # one a class


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs as bright as their theta_E says, in the half that their class says, and two models that were told so."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    theta, side = rng.uniform(0.5, 1.5, COUNT), rng.integers(0, 2, COUNT)
    images = theta[:, None, None] * BLOBS[side]
    images = (images + 0.05 * rng.standard_normal(images.shape)).astype(np.float32)[:, None]
    writer = CacheWriter(home / "data", COUNT, (1, SIDE, SIDE), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    theta[::10] = np.nan
    parameters = {
        "theta_E": {"unit": "arcsec", "values": theta},
        "count": {"unit": "", "values": rng.uniform(0, 1, COUNT)},  # which an option of `sample` is called
    }
    writer.finish(parameters=parameters, classes=CLASSES, labels=side)
    for name, steps in (("good", "500"), ("weak", "60")):
        main(["train-diffusion", *options(home, name), "--trainer.max_steps", steps, "--condition.class", "true",
              "--condition.parameters", "[theta_E, count]"])  # fmt: skip
    main(["train-diffusion", *options(home, "plain"), "--trainer.max_steps", "2"])
    return home


def options(home: Path, name: str) -> list[str]:
    return [
        "--config", "stage2/unet.yaml", "--name", name, "--output", str(home), "--data.path", str(home / "data"),
        "--autoencoder", "pixels", "--data.batch_size", "32", "--backbone.width", "16", "--backbone.blocks", "1",
        "--diffusion.prediction", "velocity", "--diffusion.weighting", "uniform",  # which learns such blobs soonest
        "--backbone.heads", "1", "--ema.decay", "0.97", "--optimizer.lr", "1e-2", "--optimizer.warmup_steps", "20",
        "--logger.wandb", "disabled", "--trainer.precision", "fp32",
        "--trainer.validate_every", "1000", "--trainer.progress", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def generator(home: Path) -> Generator:
    return Generator.from_pretrained(home / "good", "cpu")


def brightness(images: torch.Tensor) -> np.ndarray:
    """theta_E of blobs."""
    return amplitudes(images).max(1)


def on_the_right(images: torch.Tensor) -> np.ndarray:
    return amplitudes(images).argmax(1) == 1


def amplitudes(images: torch.Tensor) -> np.ndarray:
    """(N, 2): of the best fit of each blob."""
    return np.einsum("nyx,kyx->nk", images[:, 0].numpy(), BLOBS) / (BLOBS**2).sum((1, 2))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip()


def test_samples_are_what_was_asked_for(generator: Generator) -> None:
    asked = np.random.default_rng(1).uniform(0.6, 1.4, 200)
    found = obedience(asked, brightness(generator.images(range(200), cond={"theta_E": asked, "class": "right"})))
    assert found.r2 > 0.9
    assert abs(found.bias) < 0.05
    unasked = generator.images(range(200))  # the same seeds: what obeyed was not the noise
    assert obedience(asked, brightness(unasked)).r2 < 0.3


def test_any_part_may_be_asked_for(generator: Generator) -> None:
    asked = np.linspace(0.6, 1.4, 100)
    brightness_alone = generator.images(range(100), cond={"theta_E": asked})
    assert obedience(asked, brightness(brightness_alone)).r2 > 0.7
    assert 0.2 < on_the_right(brightness_alone).mean() < 0.8
    kinds = np.array(CLASSES)[np.arange(100) % 2]
    class_alone = generator.images(range(100), cond={"class": kinds})
    assert (on_the_right(class_alone) == (kinds == "right")).mean() > 0.95
    assert brightness(class_alone).std() > 0.15
    nothing = generator.images(range(100))
    assert 0.2 < on_the_right(nothing).mean() < 0.8


def test_a_lens_depends_on_its_seed_and_condition_alone(generator: Generator) -> None:
    together = generator.images([3, 4, 5], cond={"theta_E": [0.7, 1.0, 1.3]}, guidance=1.5, batch_size=2)
    alone = generator.images([5], cond={"theta_E": 1.3}, guidance=1.5)
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(generator.images([5], cond={"theta_E": np.nan}), generator.images([5]))


def test_guidance_pulls_away_from_what_nobody_asked_for(home: Path, generator: Generator) -> None:
    seeds, cond = range(100), {"class": "right"}
    plain = generator.images(seeds, cond=cond)
    torch.testing.assert_close(generator.images(seeds, cond=cond, guidance=1.0), plain)
    none = generator.images(seeds, cond=cond, guidance=0.0)
    torch.testing.assert_close(none, generator.images(seeds), atol=1e-4, rtol=0)
    outside = generator.images(seeds, cond=cond, guidance=3.0, guidance_interval=(1.0, 1.0), steps=1)
    assert not torch.allclose(outside, generator.images(seeds, cond=cond, steps=1), atol=1e-3)  # a step from pure noise
    guide = Generator.from_pretrained(home / "weak", "cpu")
    for options in ({}, {"cond": cond}):
        guided = generator.images(seeds, guide=guide, guidance=1.5, **options)  # type: ignore[arg-type]
        assert not torch.allclose(guided, generator.images(seeds, **options), atol=1e-2)  # type: ignore[arg-type]
        itself = generator.images(seeds, guide=generator, guidance=1.5, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(itself, generator.images(seeds, **options), atol=1e-4, rtol=0)  # type: ignore[arg-type]


def test_a_guide_must_share_latents_and_schedule(home: Path, generator: Generator) -> None:
    other = Generator.from_pretrained(home / "weak", "cpu")
    with pytest.raises(UserError, match="needs a weight"):
        generator.images([0], guide=other)
    other.autoencoder.latent_mean += 0.1
    with pytest.raises(UserError, match="another autoencoder"):
        generator.images([0], guide=other, guidance=1.5)
    other = Generator.from_pretrained(home / "weak", "cpu")
    other.denoiser.schedule.shift = 2.0
    with pytest.raises(UserError, match="another noise schedule"):
        generator.images([0], guide=other, guidance=1.5)
    other = Generator.from_pretrained(home / "weak", "cpu")
    other.denoiser.schedule = NoiseSchedule("flow", zero_terminal=False)
    with pytest.raises(UserError, match="predicts eps"):
        generator.images([0], guide=other, guidance=1.5)


def test_the_command_line_asks_and_samples_remember(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "asked"
    model = str(home / "good")
    main(["sample", model, "--theta-E", "0.8:1.2", "--class", "left", "--set", "count=0.5", "--count", "6",
          "--out", str(out), "--guidance", "1.5", "--guidance-interval", "0,0.9", "--seed", "2"])  # fmt: skip
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        first = {name: file[name] for name in file.files}
    assert first["condition_class"].tolist() == ["left"] * 6
    assert first["condition_count"].tolist() == [0.5] * 6
    assert np.ptp(first["condition_theta_E"]) > 0.05
    metadata = json.loads(str(first["metadata"]))
    assert metadata["conditions"] == {"class": "left", "theta_E": "0.8:1.2", "count": "0.5"}
    assert metadata["guidance"] == 1.5
    # The same lenses from a table, as Python has them too.
    table = home / "lenses.csv"
    values = first["condition_theta_E"]
    table.write_text("theta_E,class,count\n" + "".join(f"{value!r},left,0.5\n" for value in values.tolist()))
    settings = ["--guidance", "1.5", "--guidance-interval", "0,0.9", "--seed", "2"]
    main(["sample", model, "--conditions", str(table), "--out", str(out), *settings])
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["images"], first["images"], atol=1e-5)
    assert capsys.readouterr().err.count("warning") == 0
    # Options may come first; and lenses that were asked for are not those that nothing is asked of.
    for asked in (["--theta-E", "1.2"], []):
        main(["sample", *asked, model, "--count", "2", "--out", str(home / "either")])
        with np.load(home / "either" / "samples.npz", allow_pickle=False) as file:
            assert ("condition_theta_E" in file) is bool(asked)
    main(["sample", model, "--theta_E=-3:-2", "--count", "1", "--out", str(out)])
    main(["sample", model, "--theta-E", "-3:-2", "--count", "1", "--out", str(out), "--guide", str(home / "weak"),
          "--guidance", "1.2"])  # fmt: skip
    warned = capsys.readouterr().err.strip().splitlines()
    assert [line for line in warned if line.startswith("warning: theta_E is asked for far outside")] == warned
    assert len(warned) == 2
    main(
        ["prepare", str(out / "samples.npz"), "--out", str(home / "again")]
    )  # a reader of images finds them among the rest


def test_what_a_model_can_be_asked_for_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sample", str(home / "good"), "--list-conditions"])
    listed = capsys.readouterr().out
    assert "class          one of left, right" in listed
    assert "arcsec" in listed
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(home / "good"), "--help"])
    assert stopped.value.code == 0
    assert "--theta-E VALUE, --theta_E VALUE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--help"])
    assert stopped.value.code == 0
    main(["sample", str(home / "plain"), "--list-conditions"])
    assert "has no conditions" in capsys.readouterr().out


def test_mistakes_are_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = home / "good", home / "plain"
    table = home / "two.csv"
    table.write_text("theta_E\n1.0\n1.1\n")
    for arguments, message in (
        ((model, "--theta", "1"), "cannot be asked for 'theta'; did you mean 'theta_E'"),
        ((plain, "--theta-E", "1"), "trained without conditions"),
        ((plain, "--set", "theta_E=1"), "trained without conditions"),
        ((model, "--theta-E", "wide"), "neither a number nor a range"),
        ((model, "--class", "middle"), "no class 'middle'"),
        ((model, "--set", "theta_E"), "expected NAME=VALUE"),
        ((model, "--theta-E", "1", "--set", "theta_E=2"), "asked for twice"),
        ((model, "--theta-E", "1", "--conditions", table), "leave out one of the two"),
        ((model, "--conditions", table, "--count", "3"), "has 2 lenses, --count asks for 3"),
        ((model, "--guidance", "2"), "guidance needs a condition"),
        ((model, "--guide", home / "weak"), "a guide needs a weight"),
    ):
        error = fails(capsys, "sample", *arguments, "--out", home / "never")
        assert message in error, arguments
        assert len(error.splitlines()) == 1
    assert not (home / "never").exists()
    wrong = options(home, "wrong")
    assert "did you mean 'theta_E'" in fails(capsys, "train-diffusion", *wrong, "--condition.parameters", "[thetaE]")
    assert "guidance needs a guide (guide.max_steps) or a condition" in fails(
        capsys, "train-diffusion", *wrong, "--sampling.guidance", "2"
    )
    assert "a guide (guide.max_steps) is for nothing with guidance 1" in fails(
        capsys, "train-diffusion", *wrong, "--guide.max_steps", "2"
    )
    assert "is there twice" in fails(capsys, "train-diffusion", *wrong, "--condition.parameters", "[theta_E, theta_E]")


def test_images_and_parameters_of_ones_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, theta = LensImages(home / "data"), np.random.default_rng(3).uniform(0.5, 1.5, COUNT)
    np.save(home / "own.npy", images.images)
    rows = [f"{i},{'' if i % 5 == 0 else theta[i]},{theta[i]},{i % 3}" for i in range(COUNT - 40)]
    prepared = ["prepare", str(home / "own.npy"), "--out", str(home / "own"), "--parameters", str(home / "own.csv")]
    (home / "own.csv").write_text("\n".join(["index,theta_E [arcsec],seeing,z_l", *rows]))
    main(prepared)
    report = {"format": 1, "data": LensImages(home / "own").fingerprint, "allowed": ["identity", "flip_lr"]}
    (home / "own" / SYMMETRIES).write_text(json.dumps(report))
    train = ["train-diffusion", *options(home, "owned"), "--data.path", str(home / "own"), "--trainer.max_steps", "12",
             "--trainer.log_every", "2", "--condition.parameters", "[theta_E, seeing, z_l]"]  # fmt: skip
    main(train)
    losses = [row["train/loss"] for row in read_metrics(home / "owned" / "metrics.csv") if "train/loss" in row]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    main(
        ["sample", str(home / "owned"), "--theta-E", "1.1", "--seeing", "0.8", "--count", "2", "--out", str(home / "o")]
    )
    with np.load(home / "o" / "samples.npz", allow_pickle=False) as file:
        assert np.isfinite(file["images"]).all()
        assert file["condition_seeing"].tolist() == [0.8] * 2
    main(train)  # complete
    shutil.rmtree(home / "own")
    main([*prepared, "--turns", "seeing=scalar"])  # the same images, and the model would have been told more of them
    (home / "own" / SYMMETRIES).write_text(json.dumps(report))
    capsys.readouterr()
    assert "owned was trained with another table of parameters" in fails(capsys, *train)


def test_a_model_from_before_there_were_conditions_is_what_it_was(home: Path) -> None:
    path = home / "plain" / "model" / "config.json"
    config = json.loads(path.read_text())
    before = Generator.from_pretrained(home / "plain", "cpu").images(range(2), steps=2)
    del config["conditions"], config["training"]["condition"]
    for name in ("guidance", "guidance_interval"):
        del config["sampling"][name], config["training"]["sampling"][name]
    path.write_text(json.dumps(config))
    assert torch.equal(Generator.from_pretrained(home / "plain", "cpu").images(range(2), steps=2), before)


def test_a_conditional_model_is_scored_under_the_conditions_of_real_images(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.metrics.use.use", partial(use, steps=20))
    main(["evaluate", str(home / "good"), "--reference", str(home / "data"), "--count", "30", "--device", "cpu"])
    metrics = json.loads((home / "good" / "evaluation" / "metrics.json").read_text())
    assert metrics["n"] == 30
    assert metrics["physics"]["samples"]["peak"]["ratio"] < 20
    assert {name: one["n_test"] for name, one in metrics["use"].items()} == dict.fromkeys(
        ("real → real", "generated → real", "real → generated"), 30
    )
    assert "trained → tested" in (home / "good" / "evaluation" / "report.html").read_text()
