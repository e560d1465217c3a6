"""`lens-ldm ablate` at toy size: two cells and one that diverges, interrupted, gone on with, and changed."""

import json
import os
from pathlib import Path

import pytest

import stage2_diffusion.evaluate
from shared.cli import main
from shared.files import claimed
from shared.simulate.preset import Preset
from shared.simulate.run import simulate_to

pytestmark = pytest.mark.slow
FILE = """
name: toy
data: {path: data}
stage1:
  config: stage1/quickstart.yaml
  overrides:
    data: {batch_size: 8}
    autoencoder: {widths: [8, 8], encoder_blocks: 1, decoder_blocks: 1, latent_channels: 2, quantizer.levels: [5, 5]}
    optimizer: {name: adamw, warmup_steps: 0}
    trainer: {log_every: 1, validate_every: 100, checkpoint_every: 100, accelerator: cpu, progress: false}
stage2:
  config: stage2/quickstart.yaml
  overrides:
    data: {batch_size: 8}
    backbone: {width: 8, multipliers: [1, 1], heads: 1}
    trainer: {max_steps: 3, log_every: 1, validate_every: 100, accelerator: cpu, progress: false}
budget: {tflop: 0.002}
evaluate: {count: 4, steps: 2}
cells:
  fsq: {}
  diverges: {optimizer.lr: 1.0e+30}
  none: {autoencoder.quantizer: {name: none}}
"""


@pytest.fixture(autouse=True)
def one_call_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage1_vqvae.evaluate.TIMED", 1e-9)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    preset = Preset.load("deeplense", {"pixels": 30, "pixel_scale": 0.25, "supersampling": 1})
    simulate_to(folder / "data", preset, 120, 0, workers=1, progress=False)
    (folder / "toy.yaml").write_text(FILE)
    return folder


def ablate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", "toy.yaml", *arguments])
    return int(str(stopped.value.code))


def records() -> dict:
    return json.loads(Path("checkpoints/toy/ablation.json").read_text())["cells"]


def models() -> dict[str, int]:
    return {path.parts[2]: path.stat().st_mtime_ns for path in Path().glob("checkpoints/toy/*/model/config.json")}


def test_an_ablation_is_interrupted_goes_on_and_notices_changes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(stage2_diffusion.evaluate, "main", interrupted)
        assert ablate("--only", "fsq") == 130
    assert "the same command goes on" in capsys.readouterr().err
    before, begun = models(), records()
    assert before.keys() == {"fsq-stage1", "fsq-stage2"}
    assert begun["fsq"]["status"] == "begun"
    assert begun["fsq"]["scores"]["psnr"] > 0
    assert begun["fsq"]["seconds"].keys() == {"train stage 1", "score stage 1", "train stage 2", "score stage 2"}
    assert " (not finished) " in Path("checkpoints/toy/ablation.md").read_text()

    assert ablate() == 2  # one of the others fails
    done = records()
    assert {name: record["status"] for name, record in done.items()} == {
        "fsq": "done",
        "diverges": "failed",
        "none": "done",
    }
    assert list(done) == ["fsq", "diverges", "none"]
    assert "became nan" in done["diverges"]["error"]
    assert before.items() <= models().items()
    assert done["fsq"]["seconds"]["score stage 1"] == begun["fsq"]["seconds"]["score stage 1"]
    assert models().keys() == {"fsq-stage1", "fsq-stage2", "none-stage1", "none-stage2"}

    # 2e9 operations make the steps of a cell: what is left out is less than one step's.
    step = done["fsq"]["tflop"] / done["fsq"]["stage1"]["trainer"]["max_steps"]
    assert 0 < done["fsq"]["stage1"]["trainer"]["max_steps"] == round(0.002 / step)
    scores = json.loads(Path("checkpoints/toy/none-stage1/evaluation/metrics.json").read_text())
    assert done["none"]["scores"]["psnr"] == scores["truth"]["psnr"]
    assert done["none"]["scores"]["gflop"] * 1e-3 * 3 * 8 == pytest.approx(step, rel=0.05)
    table = Path("checkpoints/toy/ablation.md").read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in table if line.startswith("|")][2:]
    assert rows[0] == "fsq"
    assert rows[1].startswith("diverges (failed: the loss of diverges-stage1 became nan")
    assert rows[2] == "none"

    finished = models()
    capsys.readouterr()
    assert ablate() == 2
    assert models() == finished
    assert records() == done
    main(["ablate", "toy.yaml", "--only", "none", "fsq"])  # both are done: nothing to complain about
    main(["ablate", "toy.yaml", "--list"])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["fsq", "done"], ["diverges", "failed"], ["none", "done"],
    ]  # fmt: skip

    assert ablate("--only", "none", "--cells.none.loss.l1", "2.0") == 2
    assert "cell none was begun with another configuration of stage1 (loss.l1: 1.0 -> 2.0)" in capsys.readouterr().err
    assert ablate("--only", "nnoe") == 2
    assert "no such cell; did you mean 'none'?" in capsys.readouterr().err
    assert models() == finished


def test_a_disk_that_cannot_be_written_is_no_result_of_a_cell(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("other").mkdir()
    Path("other/toy").mkdir()
    Path("other/toy/fsq-stage1").write_text("a file where a folder must be")
    assert ablate("--output", "other", "--only", "fsq", "none") == 2
    assert "cannot write the run's folder" in capsys.readouterr().err
    cells = json.loads(Path("other/toy/ablation.json").read_text())["cells"]
    assert {name: record["status"] for name, record in cells.items()} == {"fsq": "begun"}
    assert not os.path.exists("other/toy/none-stage1")


def test_a_cell_that_another_process_is_at_is_left_to_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("both/toy").mkdir(parents=True)
    with claimed(Path("both/toy/.none.lock")) as mine:
        assert mine
        main(["ablate", "toy.yaml", "--output", "both", "--only", "none", "--stage2", "null"])
    assert "[1/1] none: another process is at it" in capsys.readouterr().out
    assert not Path("both/toy/ablation.json").exists()
    assert not Path("both/toy/none-stage1").exists()
