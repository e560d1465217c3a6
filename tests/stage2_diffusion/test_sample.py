"""Samples in shards are the samples of one process; what is there is not drawn again."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from shared.cli import main
from shared.config import load_config
from shared.schema import Stage2
from stage2_diffusion import sample
from stage2_diffusion.pipeline import train
from tests.blobs import blobs


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
    return train(load_config(Stage2, [], config))


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
    assert (tmp_path / "parts" / "grid.png").exists()


def test_only_what_is_missing_or_damaged_or_of_another_request_is_drawn_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    before = sample.draw

    def counted(generator: object, seeds: range, **options: object) -> object:
        drawn.append(list(seeds))
        return before(generator, seeds, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sample, "draw", counted)
    for k in (1, 1, 2):
        draw(model, tmp_path, "--shard", f"{k}/2")
    assert drawn == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    first = tmp_path / "samples-1-of-2.npz"
    first.write_bytes(first.read_bytes()[:1000])
    draw(model, tmp_path, "--shard", "2/2")
    draw(model, tmp_path, "--shard", "1/2")
    draw(model, tmp_path, "--shard", "2/2", "--clean")
    assert [seeds[0] for seeds in drawn[2:]] == [5, 10]
    assert not list(tmp_path.glob(".*"))  # no leftovers


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
