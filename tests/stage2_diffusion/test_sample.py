"""Samples in shards are the samples of one process; what is there is not drawn again."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astropy.io import fits
from PIL import Image
from torch import nn

from shared.checkpoint import load, publish, read_config
from shared.cli import main
from shared.config import load_config
from shared.data.sources import Source
from shared.schema import Stage2
from stage2_diffusion.generator import Generator
from stage2_diffusion.pipeline import train
from stage2_diffusion.samplers import SeededNoise
from tests.blobs import blobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = blobs(folder / "blobs")
    config = {
        "name": "run", "output": str(folder), "data": {"path": str(data), "batch_size": 8}, "autoencoder": "pixels",
        "backbone": {"name": "unet", "width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [], "heads": 1},
        "trainer": {"max_steps": 3, "precision": "fp32", "accelerator": "cpu", "progress": False},
        "logger": {"wandb": "disabled"},
    }  # fmt: skip
    path = train(load_config(Stage2, [], config))
    # A network of three steps says the same at all times: one of random weights does not.
    published, state = load(path, "diffusion")
    rng = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if name.startswith("denoiser.") and weight.is_floating_point():
            state[name] = weight + 0.05 * torch.randn(weight.shape, generator=rng)
    publish(path, "diffusion", published, state, "")
    return path


def draw(model: Path, out: Path, *options: str) -> None:
    main(
        [
            "sample",
            str(model),
            "--count",
            "10",
            "--seed",
            "5",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
            *options,
        ]
    )


def read(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    with np.load(path, allow_pickle=False) as file:
        return file["images"], file["seeds"], json.loads(str(file["metadata"]))


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of each call of `Generator.sample`, from now on."""
    drawn: list[list[int]] = []
    before = Generator.sample

    def counted(self: Generator, seeds: Iterable[int], *arguments: Any, **options: Any) -> Any:
        drawn.append(list(seeds))
        return before(self, drawn[-1], *arguments, **options)

    monkeypatch.setattr(Generator, "sample", counted)
    return drawn


def test_shards_join_to_what_one_process_draws(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(model, tmp_path / "whole")
    for k in (2, 3, 1):  # in any order; of sizes 3, 3 and 4
        assert not (tmp_path / "parts" / "samples.npz").exists()
        draw(model, tmp_path / "parts", "--shard", f"{k}/3")
    assert "2 of 3 shards are not there yet: samples-1-of-3.npz, samples-3-of-3.npz" in capsys.readouterr().out
    images, seeds, metadata = read(tmp_path / "parts" / "samples.npz")
    expected, expected_seeds, whole = read(tmp_path / "whole" / "samples.npz")
    assert np.allclose(images, expected, atol=1e-5)
    assert images.std() > 0.01
    assert seeds.tolist() == expected_seeds.tolist() == list(range(5, 15))
    assert {k: v for k, v in metadata.items() if k != "lenses_per_second"} == {
        k: v for k, v in whole.items() if k != "lenses_per_second"
    }
    assert json.loads(Image.open(tmp_path / "parts" / "grid.png").info["parameters"]) == metadata


def test_only_what_is_missing_or_damaged_or_of_another_request_is_drawn_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = count_draws(monkeypatch)
    for k in (1, 1, 2):
        draw(model, tmp_path, "--shard", f"{k}/2")
    assert drawn == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    first = tmp_path / "samples-1-of-2.npz"
    first.write_bytes(first.read_bytes()[:1000])
    draw(model, tmp_path, "--shard", "2/2")
    draw(model, tmp_path, "--shard", "1/2")
    draw(model, tmp_path, "--shard", "2/2", "--clean")
    assert [seeds[0] for seeds in drawn[2:]] == [5, 10]
    guided = ["--guide", str(model), "--guidance", "1"]  # nothing else is told otherwise
    for more in (guided, [], guided):
        draw(model, tmp_path, "--shard", "2/2", *more)
    assert [seeds[0] for seeds in drawn[4:]] == [10, 10, 10]
    assert not [*tmp_path.glob(".*"), *tmp_path.glob("unfinished*")]  # no leftovers


@pytest.mark.parametrize(
    ("given", "said"), [("0/2", "not K/N"), ("3/2", "not K/N"), ("x", "not K/N"), ("1/11", "empty")]
)
def test_a_shard_that_cannot_be_is_one_line(
    model: Path, tmp_path: Path, given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        draw(model, tmp_path, "--shard", given)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert "Traceback" not in error


def test_processes_of_torchrun_draw_a_shard_each(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(model, tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        draw(model, tmp_path / "parts")
    drawn = [read(tmp_path / name / "samples.npz")[0] for name in ("parts", "whole")]
    assert np.allclose(*drawn, atol=1e-5)


def test_compiled_samples_are_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(model, tmp_path / "plain")
    compiled, before = [], nn.Module.compile

    def traced(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        before(self, backend="eager", fullgraph=True)  # C++ would take minutes

    monkeypatch.setattr(nn.Module, "compile", traced)
    draw(model, tmp_path / "compiled", "--compile")
    assert compiled == ["UNet"]
    (one, *_), (other, *_) = (read(tmp_path / name / "samples.npz") for name in ("compiled", "plain"))
    assert np.allclose(one, other, atol=1e-4)


def test_the_sampler_of_distilled_models_is_warned_of(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, tmp_path / "usual")
    assert "warning" not in capsys.readouterr().err
    draw(model, tmp_path / "blurred", "--sampler", "consistency")
    assert capsys.readouterr().err.count("warning: sampler consistency is for distilled models") == 1


def test_what_was_drawn_before_an_interruption_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, tmp_path / "whole", "--batch-size", "3")
    capsys.readouterr()
    before, calls = SeededNoise.__init__, []

    def interrupted(self: SeededNoise, seeds: Any, *arguments: Any, **options: Any) -> None:
        calls.append(list(seeds))
        if 11 in calls[-1] and len(calls) < 7:
            raise KeyboardInterrupt
        before(self, seeds, *arguments, **options)

    monkeypatch.setattr("stage2_diffusion.generator.SeededNoise.__init__", interrupted)
    out = tmp_path / "parts"
    with pytest.raises(SystemExit) as stopped:
        draw(model, out, "--batch-size", "3")
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    (unfinished,) = out.glob("unfinished-*")
    assert not (out / "samples.npz").exists()

    drawn = count_draws(monkeypatch)
    draw(model, out, "--batch-size", "3", "--clean")  # another request has a folder of its own
    assert unfinished.exists()
    draw(model, out, "--batch-size", "3")
    assert drawn == [list(range(5, 15)), list(range(11, 15))]
    assert not unfinished.exists()
    (images, seeds, metadata), (expected, *_) = (read(tmp_path / name / "samples.npz") for name in ("parts", "whole"))
    assert np.array_equal(images, expected)
    assert seeds.tolist() == list(range(5, 15))
    assert metadata["lenses_per_second"] > 0
    draw(model, out, "--batch-size", "3")
    assert "is complete" in capsys.readouterr().out
    assert len(drawn) == 2


@pytest.mark.slow
def test_a_killed_process_loses_the_piece_it_was_at_and_no_more(model: Path, tmp_path: Path) -> None:
    """kill -9 by itself, in the middle of the third piece, and again while the results are written."""
    code = """
import os, signal, sys
from shared.cli import main
from stage2_diffusion import shards
which, when = sys.argv[1:3]
before, calls = getattr(shards, which), []
def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments, **options)
setattr(shards, which, killed)
main(sys.argv[3:])
"""
    out = tmp_path / "out"
    command = [
        "sample",
        str(model),
        "--count",
        "10",
        "--seed",
        "5",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--batch-size",
        "3",
    ]
    for which, when, left in (("write_atomically", "3", 2), ("sync_folder", "1", 4)):
        run = [sys.executable, "-c", code, which, when, *command, "--out", str(out)]
        process = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert len(list(out.glob("unfinished-*/images/*.npz"))) == left
    draw(model, tmp_path / "whole", "--batch-size", "3")
    draw(model, out, "--batch-size", "3")
    assert np.array_equal(read(out / "samples.npz")[0], read(tmp_path / "whole" / "samples.npz")[0])


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, room = os.fsync, [2]

    def fsync(file: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        before(file)

    drawn = count_draws(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SystemExit):
            draw(model, tmp_path, "--batch-size", "4")
    error = capsys.readouterr().err
    assert "No space left on device; what is drawn is kept, and the same command goes on" in error
    assert error.count("\n") == 1
    draw(model, tmp_path, "--batch-size", "4")
    assert drawn == [list(range(5, 15)), list(range(9, 15))]


def test_two_processes_do_not_draw_the_same_into_one_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "sample", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            draw(model, tmp_path)
    (lock,) = tmp_path.glob("unfinished-*/lock")
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            draw(model, tmp_path)
    assert "another process draws these lenses" in capsys.readouterr().err
    draw(model, tmp_path)
    assert (tmp_path / "samples.npz").exists()


def test_every_format_is_read_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = ["npz", "npy", "fits", "hdf5", "png"]
    draw(model, tmp_path, "--format", *formats)
    images, _, metadata = read(tmp_path / "samples.npz")
    about = json.loads((tmp_path / "samples.json").read_text())
    assert set(about["files"]) == {"samples.npy", "samples.fits", "samples.hdf5", "png"}
    scale = about["files"]["png"]
    assert scale["low"] <= images.min() < images.max() <= scale["high"]
    level = (scale["high"] - scale["low"]) / 65535
    for name in ("samples.npz", "samples.npy", "samples.fits", "samples.hdf5", "png"):
        with Source(tmp_path / name) as source:
            found = np.stack([source.read(i) for i in range(len(source))])
        assert found.shape == images.shape
        if name == "png":
            error = np.abs(scale["low"] + found * level - images).max()
            assert 0 < error <= 0.501 * level
        else:
            assert np.array_equal(found, images), name
    with open(tmp_path / "samples.csv", newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == [str(seed) for seed in range(5, 15)]
    picture = Image.open(tmp_path / "png" / "0000000007.png")
    assert json.loads(picture.info["parameters"]) == {"seed": 7, **scale}
    with fits.open(tmp_path / "samples.fits") as file:
        file.verify("exception")
        header, table = file[0].header, file[1].data
        assert (header["NAXIS1"], header["NAXIS2"], header["NAXIS3"]) == (30, 30, 10)
        assert (header["SEED"], header["COUNT"], header["STEPS"], header["SAMPLER"]) == (5, 10, 2, metadata["sampler"])
        assert header["WSHA256"] == read_config(model)["sha256"]
        assert [header["PIXLOW"], header["PIXHIGH"]] == metadata["value_range"]
        assert json.loads(header["FACTS"])["first_seed"] == 5
        assert table["seed"].tolist() == list(range(5, 15))

    files = ["samples.npy", "samples.fits", "samples.hdf5", "png/0000000007.png", "samples.csv"]
    before = {name: (tmp_path / name).read_bytes() for name in files}
    drawn = count_draws(monkeypatch)
    capsys.readouterr()
    draw(model, tmp_path, "--format", "fits", "png")
    assert "is complete" in capsys.readouterr().out
    (tmp_path / "samples.fits").unlink()
    draw(model, tmp_path, "--format", "fits", "png")  # from samples.npz
    assert not drawn
    (again := tmp_path / "again").mkdir()
    (again / "png").mkdir()
    (again / "png" / "holiday.png").touch()
    with pytest.raises(SystemExit):
        draw(model, again, "--format", *formats[1:])
    assert "holds holiday.png, which is no sample" in capsys.readouterr().err
    assert not drawn  # it is said before any work
    (again / "png" / "holiday.png").unlink()
    draw(model, again, "--format", *formats[1:])
    assert not (again / "samples.npz").exists()
    assert {name: (again / name).read_bytes() for name in files} == before


def test_shards_join_to_any_format(model: Path, tmp_path: Path) -> None:
    draw(model, tmp_path / "whole", "--format", "fits", "--batch-size", "5")
    for k in (1, 2):
        draw(model, tmp_path / "parts", "--shard", f"{k}/2", "--format", "fits", "--batch-size", "5")
    one, other = ((tmp_path / name / "samples.fits").read_bytes() for name in ("whole", "parts"))
    assert one == other
    assert not (tmp_path / "parts" / "samples.npz").exists()


def test_a_shard_whose_pixels_are_damaged_is_named_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(model, tmp_path, "--shard", "1/2")
    first = tmp_path / "samples-1-of-2.npz"
    content = bytearray(first.read_bytes())
    content[5000] ^= 1
    first.write_bytes(content)
    with pytest.raises(SystemExit):
        draw(model, tmp_path, "--shard", "2/2")
    error = capsys.readouterr().err
    assert f"{first} is damaged (Bad CRC-32" in error
    assert error.count("\n") == 1


def test_the_way_to_the_lenses_is_kept_on_request(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trajectory", "2", "--gif", "--batch-size", "4", "--steps", "6", "--sampler", "ddim"]
    draw(model, tmp_path, *more, "--clean")
    states = np.load(tmp_path / "trajectory.npy")
    assert states.shape == (10, 4, 1, 30, 30)  # of six evaluations the first, the third, the fifth and the last
    images, *_ = read(tmp_path / "samples.npz")
    assert np.allclose(states[:, -1], images, atol=1e-4)  # the last estimate of ddim is the image
    everything = Generator.from_pretrained(model, "cpu").trajectory(range(5, 15), sampler="ddim", steps=6)
    for k, evaluation in enumerate((0, 2, 4, 5)):
        assert np.allclose(states[:, k], everything[evaluation].numpy(), atol=1e-4)
    assert np.ptp(states[:, 0] - states[:, 1]) > 0.01
    assert Image.open(tmp_path / "denoising.gif").n_frames == 6
    width, height = Image.open(tmp_path / "trajectory.png").size
    assert (width, height) == (4 * 32 - 2, 8 * 32 - 2 + 18)  # eight lenses, four columns, a line of text
    drawn = count_draws(monkeypatch)
    draw(model, tmp_path, *more, "--clean")
    assert "is complete" in capsys.readouterr().out
    assert not drawn
    with pytest.raises(SystemExit):
        draw(model, tmp_path, "--gif", "--shard", "1/2")
    assert "--gif and --trajectory" in capsys.readouterr().err


def test_guidance_shows_in_what_lenses_are_taken_to_be(model: Path) -> None:
    generator, guide = (Generator.from_pretrained(model, "cpu") for _ in range(2))
    with torch.no_grad():
        for weight in guide.denoiser.parameters():
            weight.mul_(0.9)
    options = {"sampler": "ddim", "steps": 3, "guide": guide, "guidance": 2.0}
    states = generator.trajectory([1, 2], **options)
    assert len(states) == 3
    assert torch.allclose(states[-1], generator.images([1, 2], observed=False, **options), atol=1e-4)
    assert not torch.allclose(states[-1], generator.images([1, 2], observed=False, sampler="ddim", steps=3), atol=1e-3)
