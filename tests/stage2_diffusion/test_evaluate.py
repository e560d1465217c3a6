"""What drawing costs, and by whom samples in a file were guided."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from shared.cli import main
from shared.data.cache import LensImages
from stage2_diffusion import evaluate
from stage2_diffusion.evaluate import cost, digest, guide_of, read_samples
from stage2_diffusion.generator import Generator
from stage2_diffusion.train import main as train
from tests.blobs import blobs
from tests.stage2_diffusion.test_publish import make

SAMPLING = {"sampler": "ab2", "steps": 4, "shift": 3.0, "eta": 0.0, "guidance": 1.5, "guidance_interval": [0, 1]}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(Path("strong"))
    make(Path("weak"), seed=1)
    weak, strong = (json.loads(Path(name, "config.json").read_text()) for name in ("weak", "strong"))
    assert weak["sha256"] != strong["sha256"]
    return tmp_path


def options(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", trust=None, **more)


def test_guided_samples_are_timed_with_their_guide(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = Generator.from_pretrained("strong", "cpu")
    main(
        ["sample", "strong", "--guide", "strong", "--guidance", "1.5", "--count", "4", "--device", "cpu", "--out", "s"]
    )
    sampling, _ = read_samples(Path("s/samples.npz"), 4, generator)
    guide = guide_of(sampling, options())
    assert guide is not None
    found = cost(generator, guide, {}, sampling)
    alone = cost(generator, None, {}, {**sampling, "guidance": 1.0})
    assert found["gflop"] == pytest.approx(2 * alone["gflop"])  # two networks; pixels need no decoder
    capsys.readouterr()
    assert guide_of({**sampling, "guide": "weak"}, options()) is None  # another model of that name
    assert guide_of({**sampling, "guide": "gone"}, options()) is None
    assert capsys.readouterr().err.count("neither timed nor filmed") == 2


def test_what_takes_long_is_timed_on_one_lens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, drawn = Generator.from_pretrained("strong", "cpu"), []
    images = generator.images
    monkeypatch.setattr(generator, "images", lambda seeds, **more: drawn.append(len(seeds)) or images(seeds, **more))
    monkeypatch.setattr(evaluate, "TIMED", 8)
    quick = cost(generator, None, {}, {**SAMPLING, "guidance": 1.0})
    assert quick["at_once"] == 8
    assert drawn == [1, 1, 2, 4, 8, 8, 8, 1]
    drawn.clear()
    monkeypatch.setattr(evaluate, "PATIENCE", 0.0)
    slow = cost(generator, None, {}, {**SAMPLING, "guidance": 1.0})
    assert slow["at_once"] == 1
    assert drawn == [1, 1]  # timed, and its operations counted
    assert slow["gflop"] == quick["gflop"]
    assert slow["milliseconds"] > 0


@pytest.mark.slow
def test_samples_of_a_guide_that_is_gone_are_scored(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs(Path("data/blobs"), 400)
    config = (
        "{name: p, autoencoder: pixels, backbone: {name: unet, width: 8, multipliers: [1], blocks: 1, attention: []}}"
    )
    for name, steps in (("strong", 2), ("weak", 1)):
        Path("p.yaml").write_text(config.replace("name: p", f"name: {name}-p"))
        trainer = ["--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu", "--trainer.progress", "false"]
        train(["--config", "p.yaml", "--data.path", "data/blobs", "--logger.wandb", "disabled", *trainer])
    model = ["checkpoints/strong-p", "--device", "cpu", "--steps", "2"]
    main(["sample", *model, "--guide", "checkpoints/weak-p", "--guidance", "2", "--count", "20", "--out", "s"])
    scored = [
        "evaluate",
        "checkpoints/strong-p",
        "--samples",
        "s/samples.npz",
        "--reference",
        "data/blobs",
        "--device",
        "cpu",
    ]
    scored += ["--count", "20", "--fit", "0", "--skip", "two-sample", "memory", "distributions", "--out"]
    main([*scored, "with"])
    assert json.loads(Path("with/metrics.json").read_text())["cost"]["gflop"] > 0
    Path("checkpoints/weak-p").rename("elsewhere")
    main([*scored, "without"])
    metrics = json.loads(Path("without/metrics.json").read_text())
    assert "cost" not in metrics
    assert metrics["n"] == 20 <= len(LensImages("data/blobs").split("test")) / 2
    assert "neither timed nor filmed" in capsys.readouterr().err


def test_lenses_that_were_asked_for_anew_are_drawn_anew() -> None:
    """A corrected table of parameters leaves the pixels of a data set, and so its fingerprint, as they are."""
    told = {"theta_E": [1.0, 1.2], "class": ["no", "vort"]}
    assert digest(told) == digest(dict(reversed(told.items())))
    assert digest(told) != digest(told | {"theta_E": [1.0, 1.3]}) != digest(told | {"class": ["no", "no"]})
    assert digest({}) == ""
