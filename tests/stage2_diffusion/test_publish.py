"""Models by name: where they are found, how they are listed, and how they are published at half precision."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared import checkpoint
from shared.autoencoder import Pixels
from shared.checkpoint import autoencoder_config, find_model, publish, read_config
from shared.cli import main
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from stage2_diffusion.generator import Generator, build_denoiser
from stage2_diffusion.publish import at_precision

UNET = {"name": "unet", "width": 8, "multipliers": [1], "blocks": 1, "attention": [], "heads": 1}
DIFFUSION = {"schedule": "flow", "prediction": "velocity", "time": "uniform", "shift": 1.0}


def make(folder: Path, seed: int = 0, blocks: int = 1) -> Path:
    """A generator of random weights, published as a run publishes its own."""
    autoencoder = Pixels((1, 8, 8), PixelTransform(-3.0, 3.0))
    autoencoder.fit_latents([torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))])
    torch.manual_seed(seed)
    unet = {**UNET, "blocks": blocks}
    denoiser = build_denoiser(unet, DIFFUSION, (1, 8, 8))
    state = {f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()}
    state |= {f"denoiser.{k}": v + 0.05 * torch.randn_like(v) for k, v in denoiser.state_dict().items()}
    config = {
        "autoencoder": autoencoder_config(autoencoder, {"name": "pixels"}), "backbone": unet, "diffusion": DIFFUSION,
        "sampling": {"sampler": "ab2", "steps": 4, "shift": 3.0}, "precision": "fp32",
        "data": {"name": "noise", "images": 64},
        "training": {
            "name": "run", "data": {"path": "/somewhere/of/mine/noise", "batch_size": 2}, "trainer": {"max_steps": 3},
        },
    }  # fmt: skip
    publish(folder, "diffusion", config, state, "")
    return folder


def scores(model: Path, **more: Any) -> None:
    """An evaluation of a run, as `lens-ldm evaluate` leaves it."""
    one = {"distance": 1.5, "floor": 1.0, "floor_sd": 0.1, "excess": 0.5, "n": 100}
    share = {"n": 50, "share": 0.8, "interval": [0.67, 0.89], "share_lit": 0.5, "interval_lit": [0.37, 0.63],
             "parameters": {"theta_E": {"n": 49, "bias": 0.01, "scatter": 0.05, "r2": 0.95}}}  # fmt: skip
    real = {"n": 50, "share": 0.96, "interval": [0.87, 0.99], "share_lit": 0.94, "interval_lit": [0.84, 0.98]}
    physics = {"flux": {"w1": 3.0, "floor": 1.0, "ratio": 3.0, "p_holm": 1e-6}}
    metrics = {
        "model": "m", "reference": "/somewhere/of/mine/noise", "weights_sha256": read_config(model)["sha256"],
        "distances": {"fd_efflite0": {"samples": one, "reconstructions": one}}, "physics": {"samples": physics},
        "spectrum": {"k": [0.1], "samples": {"mean": [1.0], "mean_low": [0.9], "mean_high": [1.1]}},
        "population": {"samples": {}}, "lens_fits": {"samples": share, "real": real},
        "cost": {"gflop": 0.25, "milliseconds": 7.5, "device": "cpu", "threads": 2, "precision": "fp32"},
        "sampling": {"sampler": "ab2", "steps": 4, "shift": 3.0, "eta": 0.0, "times": None, "guidance": 1.0,
                     "guidance_interval": [0.0, 1.0], "first_seed": 0}, **more,
    }  # fmt: skip
    folder = model.parent / "evaluation"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, beside a checkout with models of its own."""
    (checkout := tmp_path / "checkout").mkdir()
    (checkout / "pyproject.toml").touch()
    monkeypatch.setattr(checkpoint, "__file__", str(checkout / "shared" / "checkpoint.py"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_name_is_a_path_then_a_model_of_the_working_directory_then_one_of_the_checkout(home: Path) -> None:
    checkout = home.parent / "checkout" / "checkpoints"
    assert find_model(make(checkout / "a").name) == checkout / "a"
    make(checkout / "b")
    make(home / "checkpoints" / "a" / "model")
    assert find_model("a") == Path("checkpoints/a/model")
    assert find_model("b") == checkout / "b"
    (home / "a").mkdir()
    (home / "a" / "samples.npz").touch()  # `--out a`: a folder that holds no model hides none
    assert find_model("a") == Path("checkpoints/a/model")
    make(home / "a" / "model")
    assert find_model("a") == Path("a/model")
    first = Generator.from_pretrained("b", "cpu").images([0])
    assert torch.equal(first, Generator.from_pretrained(checkout / "b", "cpu").images([0]))


def test_a_package_that_is_installed_looks_at_nothing_beside_it(home: Path) -> None:
    make(home.parent / "checkout" / "checkpoints" / "a")
    (home.parent / "checkout" / "pyproject.toml").unlink()
    with pytest.raises(UserError, match="no model at a"):
        find_model("a")


def test_a_miss_is_one_line_with_the_nearest_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at dit: there is no such folder" in fails(capsys, "sample", "dit")
    make(home.parent / "checkout" / "checkpoints" / "deeplense-dit")
    make(home / "checkpoints" / "other" / "model")
    for missed in ("deeplens-dit", "checkpoints/deeplense-dti", "lense"):
        assert "did you mean deeplense-dit?" in fails(capsys, "sample", missed)
    assert "there are deeplense-dit, other" in fails(capsys, "sample", "xyz")
    (home / "checkpoints" / "young").mkdir()
    (home / "checkpoints" / "young" / "last.ckpt").touch()
    assert "not finished" in fails(capsys, "sample", "young")
    (home / "empty").mkdir()
    assert "holds no model" in fails(capsys, "sample", "empty")


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub of one repository, and what was asked of it."""
    asked: list[tuple[str, Any]] = []

    def snapshot_download(name: str, allow_patterns: Any = None) -> str:
        asked.append((name, allow_patterns))
        if name == "someone/nothing":
            os.makedirs(home.parent / "nothing", exist_ok=True)
            return str(home.parent / "nothing")
        if name != "someone/lenses":
            raise OSError("404: no such repository\nand more of it")
        return str(home.parent / "hub")

    make(home.parent / "hub")
    package = ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    checkpoint._from_hub.cache_clear()
    return asked


def test_the_hub_is_asked_for_three_files_of_owner_and_name(
    home: Path, hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert torch.isfinite(Generator.from_pretrained("someone/lenses", "cpu").images([0])).all()
    assert hub == [
        ("someone/lenses", ["config.json", "model.safetensors", "README.md"])
    ]  # once, however often it is read
    error = fails(capsys, "sample", "someone/else")
    assert "no model at someone/else" in error
    assert "404: no such repository" in error
    assert "holds no model" in fails(capsys, "sample", "someone/nothing")


@pytest.mark.parametrize(
    "name", ["lenses", "a/b/c", "./lenses", "../lenses", "/some/lenses", "checkpoints/lenses", "here/x"]
)
def test_nothing_else_is_asked_of_the_hub(home: Path, hub: list[tuple[str, Any]], name: str) -> None:
    (home / "here").mkdir()
    with pytest.raises(UserError, match="there is no such folder"):
        find_model(name)
    assert hub == []


def test_without_the_package_the_hub_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"\.\[hub\]"):
        find_model("someone/lenses")


def test_models_are_listed_with_what_they_are_worth(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    assert "there is no model in checkpoints" in capsys.readouterr().out
    make(home / "checkpoints" / "mine" / "model")
    scores(make(home / "checkpoints" / "known" / "model", seed=1))
    scores(make(home / "checkpoints" / "changed" / "model"), weights_sha256="of others")
    make(home.parent / "checkout" / "checkpoints" / "published")
    (home / "checkpoints" / "broken").mkdir()
    (home / "checkpoints" / "broken" / "config.json").write_text("{")
    main(["models"])
    out = capsys.readouterr().out
    rows = [line.replace("|", " ").split() for line in out.splitlines() if line]
    lines = {row[0]: " ".join(row) for row in rows}
    size = (home / "checkpoints/mine/model/model.safetensors").stat().st_size / 1e6
    assert lines["mine"] == lines["changed"].replace("changed", "mine")
    assert lines["mine"] == f"mine noise, 64 8×8×1 unet 4 ab2 {size:.1f} – –"
    assert lines["known"] == f"known noise, 64 8×8×1 unet 4 ab2 {size:.1f} 0.50 (100) 80%"
    assert "published" in lines
    assert "damaged" in lines["broken:"]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_published_model_is_smaller_and_draws_the_same(
    home: Path, dtype: str, kind: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(home / "checkpoints" / "run" / "model")
    scores(model)
    out = home / "checkpoints" / "shared"
    main(
        [
            "publish",
            "run",
            "--out",
            str(out),
            "--dtype",
            dtype,
            "--failure",
            "all of them are noise",
            "--licence",
            "CC0",
        ]
    )
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    stored, before = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert {str(stored[name].dtype) for name in stored if name.endswith("weight") and stored[name].ndim > 1} == {
        str(kind)
    }
    assert stored["autoencoder.latent_std"].dtype == torch.float32
    assert stored.keys() == before.keys()

    found, original = Generator.from_pretrained("shared", "cpu"), Generator.from_pretrained("run", "cpu")
    assert {p.dtype for p in found.denoiser.parameters()} == {torch.float32}
    difference = (found.images(range(32), observed=False) - original.images(range(32), observed=False)) / 6
    rms = float(difference.square().flatten(1).mean(1).sqrt().max())
    config = read_config("shared")
    assert config["stored"]["difference"] == pytest.approx(rms, abs=1e-6)
    assert (rms > 0) == (dtype != "fp32")
    assert rms < 0.01
    assert (os.path.getsize(out / "model.safetensors") < 0.8 * os.path.getsize(model / "model.safetensors")) == (
        rms > 0
    )

    assert config["stored"]["of_sha256"] == read_config(model)["sha256"] != config["sha256"] or dtype == "fp32"
    assert config["training"]["data"]["path"] == "noise"
    text = (out / "README.md").read_text()
    assert "somewhere" not in text + json.dumps(config)
    assert "1.50, floor 1.00 ± 0.10, excess +0.50 (n = 100)" in text
    assert "80% of 50 (67% to 89%); of real images 96%" in text
    assert "by the pixels they light alone" in text
    assert "50% of 50 (37% to 63%); of real images 94%" in text
    assert "theta_E as asked" in text
    assert "0.010 ± 0.050, 0.950 (n = 49)" in text
    assert "7.5 (cpu, threads: 2, fp32)" in text
    for failure in ("all of them are noise", "flux 3.0", "further from real images"):
        assert failure in text.split("Known failures")[1]
    assert "license: cc0" in text
    main(["models"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| shared "))
    assert "0.50 (100)" in line


def test_a_model_is_not_published_if_that_changes_what_it_draws(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(home / "checkpoints" / "run" / "model")
    command = ["publish", "run", "--out", "shared"]
    error = fails(capsys, *command, "--tolerance", "1e-7")
    assert "more than --tolerance 1e-07" in error
    assert not (home / "shared").exists()
    with pytest.raises(UserError, match=r"a\.weight has numbers beyond float16"):
        at_precision({"a.weight": torch.tensor([[1e6]])}, torch.float16)
    scores(model, weights_sha256="of others")
    assert "scores of other weights" in fails(capsys, *command)
    usual = json.loads((home / "checkpoints/run/evaluation/metrics.json").read_text())["sampling"]
    for other, said in (
        ({"steps": 50}, "steps 50, not 4"),
        ({"guide": "weak", "guidance": 1.5}, "guide weak, not None; guidance 1.5, not 1.0"),
        ({"times": [1.0, 0.5, 0.2, 0.1, 0.0], "shift": None}, "shift None, not 3.0"),  # by a grid that it has no more
    ):
        scores(model, sampling={**usual, **other})
        assert said in fails(capsys, *command)
        main(["models"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| run "))
        assert "0.50 (100)" not in line
    (home / "checkpoints/run/evaluation/metrics.json").unlink()
    main(command)
    assert "Not scored yet" in (home / "shared" / "README.md").read_text()
    main(command)  # what was published is replaced
    assert "choose another --out" in fails(capsys, "publish", "run", "--out", "checkpoints/run")
    assert "no metrics.json" in fails(capsys, *command, "--scores", "none.json")


def test_a_guide_is_kept_in_the_model_it_guides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    strong, weak = make(Path("strong/model")), make(Path("weak/model"), seed=1)
    scores(strong)  # of samples without the guide
    main(["publish", "strong", "--guide", "weak", "--guidance", "1.5", "--out", "guided", "--dtype", "fp32"])
    generator, apart = Generator.from_pretrained("guided", "cpu"), Generator.from_pretrained("weak", "cpu")
    given = Generator.from_pretrained(strong, "cpu").images(range(3), guide=apart, guidance=1.5)
    torch.testing.assert_close(generator.images(range(3)), given, rtol=0, atol=0)
    assert "scores" not in read_config("guided")
    assert "led away from it by 1.5" in Path("guided/README.md").read_text()

    main(["publish", "guided", "--out", "half", "--dtype", "bf16", "--tolerance", "0.1"])  # and it stays in it
    assert load_file("half/model.safetensors")["guide.backbone.stem.weight"].dtype == torch.bfloat16
    assert Generator.from_pretrained("half", "cpu").defaults["guidance"] == 1.5
    assert len({file.stat().st_mode for file in Path("half").iterdir()}) == 1  # who may read one may read all

    make(Path("deeper/model"), seed=2, blocks=2)
    for first, second in (("weak", "deeper"), ("deeper", "weak")):  # another guide in the place of one
        main(["publish", "strong", "--guide", first, "--guidance", "1.5", "--out", f"by-{first}", "--dtype", "fp32"])
        main(["publish", f"by-{first}", "--guide", second, "--guidance", "1.2", "--out", f"{first}-{second}",
              "--tolerance", "0.1"])  # fmt: skip
        found = Generator.from_pretrained(f"{first}-{second}", "cpu").images(range(3))
        guide = Generator.from_pretrained(second, "cpu")
        given = Generator.from_pretrained(strong, "cpu").images(range(3), guide=guide, guidance=1.2)
        torch.testing.assert_close(found, given, rtol=0, atol=0.2)  # bf16

    config = json.loads((weak / "config.json").read_text())
    config["diffusion"]["prediction"] = "v"
    (weak / "config.json").write_text(json.dumps(config))
    for options, said in (
        (["--guide", "weak", "--guidance", "1.5"], "other prediction"),
        (["--guide", "weak"], "needs a weight"),
        (["--guidance", "1.5"], "--guide MODEL"),
    ):
        with pytest.raises(SystemExit):
            main(["publish", "strong", *options, "--out", "none"])
        assert said in capsys.readouterr().err
        assert not Path("none").exists()
