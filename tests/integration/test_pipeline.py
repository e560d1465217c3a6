"""The whole pipeline at its smallest: `lens-ldm quickstart --config smoke.yaml`, and what its users do next."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.checkpoint import load, load_autoencoder, load_part, read_config
from shared.cli import main
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.flops import flops
from shared.registry import names
from stage1_vqvae.noise import NoiseLaw
from stage2_diffusion.backbones import custom
from stage2_diffusion.generator import Generator
from tests.processes import run_two

pytestmark = pytest.mark.slow
OWN_NET = """
from torch import nn


class OwnNet(nn.Module):
    def __init__(self, latent_shape, cond_dim, kernel):
        super().__init__()
        self.conv = nn.Conv2d(latent_shape[0], latent_shape[0], kernel, padding="same")

    def forward(self, x, t, cond):
        return self.conv(x)
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke quickstart has run, in this process: importing torch twice is what takes time."""
    folder = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["quickstart", "--config", "smoke.yaml"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_quickstart_makes_what_it_names(at_home: Path) -> None:
    out = at_home / "checkpoints" / "smoke"
    report = (out / "report.html").read_text()
    assert report.count("<img") == 12
    assert "://" not in report  # nothing is loaded from anywhere
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 16
    for score in metrics["distances"]["fd_efflite0"].values():
        assert score["excess"] == pytest.approx(score["distance"] - score["floor"])
        assert score["floor"] > 0
    with np.load(out / "samples.npz", allow_pickle=False) as samples:
        assert samples["images"].shape == (16, 1, 150, 150)
        assert samples["images"].dtype == np.float32
        assert np.isfinite(samples["images"]).all()
        assert samples["seeds"].tolist() == list(range(16))
        metadata = json.loads(str(samples["metadata"]))
    assert metadata["steps"] == 4
    assert json.loads(Image.open(out / "grid.png").info["parameters"]) == metadata


def test_quickstart_again_keeps_every_part(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [*at_home.glob("checkpoints/*/model/model.safetensors"), at_home / "data/smoke/images.npy"]
    before = [f.stat().st_mtime_ns for f in files]
    assert len(files) == 3
    main(["quickstart", "--config", "smoke.yaml"])
    assert [f.stat().st_mtime_ns for f in files] == before
    assert capsys.readouterr().out.count("is complete") == 3  # two trainings, and the samples


def test_a_seed_is_a_lens_whatever_is_drawn_with_it(at_home: Path) -> None:
    generator = Generator.from_pretrained("checkpoints/smoke-stage2", "cpu")
    together = generator.images([3, 4, 5, 6, 7], batch_size=5)
    apart = generator.images([7, 3], batch_size=1)
    assert torch.allclose(apart[0], together[4], atol=1e-4)
    assert torch.allclose(apart[1], together[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    assert torch.equal(together, generator.images([3, 4, 5, 6, 7], batch_size=5))


def test_an_autoencoder_that_predicts_the_variance_of_its_noise_trains_and_is_scored(
    at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([
        "train-vqvae", "--config", "stage1/vqvae.yaml", "--name", "learned", "--data.path", "data/smoke",
        "--autoencoder.widths", "[16, 16]", "--autoencoder.decoder_blocks", "1", "--autoencoder.predict_variance", "true",
        "--autoencoder.quantizer.name", "none", "--loss.likelihood", "0.05", "--trainer.max_steps", "20",
        "--logger.wandb", "disabled",
    ])  # fmt: skip
    config, _ = load("checkpoints/learned", "autoencoder")
    assert config["metrics"]["noise"]["scaled"] is True  # deeplense scales each image to its own range
    assert config["metrics"]["noise"]["step"] > 0  # of whole counts
    monkeypatch.setattr("stage1_vqvae.evaluate.TIMED", 1e-9)
    main(["evaluate-vqvae", "learned", "--reference", "data/smoke", "--count", "8", "--device", "cpu"])
    metrics = json.loads(Path("checkpoints/learned/evaluation/metrics.json").read_text())
    assert metrics["distances"]["fd_efflite0"]["truth + fitted noise"]["n"] == 8
    # Images scaled as the data are: darkest at 0, brightest at 1.
    assert metrics["physics"]["reconstructions"]["peak"]["w1"] == 0


@pytest.mark.parametrize("sampler", names("sampler"))
def test_every_sampler_runs_from_the_same_checkpoint(at_home: Path, sampler: str) -> None:
    generator = Generator.from_pretrained("checkpoints/smoke-stage2", "cpu")
    images = generator.images(range(2), sampler=sampler, steps=5)
    assert images.shape == (2, 1, 150, 150)
    assert torch.isfinite(images).all()


def test_a_sweep_scores_as_evaluate_does_and_goes_on_where_it_stopped(
    at_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = ["--reference", "data/smoke", "--count", "16", "--device", "cpu"]
    sweep = ["sweep", "checkpoints/smoke-stage2", *scored, "--out", "swept", "--samplers", "ab2", "ddim", "--steps"]
    main([*sweep, "4"])
    main([*sweep, "1", "4"])
    cells = json.loads(Path("swept/sweep.json").read_text())["cells"]
    assert [(cell["sampler"], cell["steps"]) for cell in cells] == [("ab2", 4), ("ddim", 4), ("ab2", 1), ("ddim", 1)]
    assert Path("swept/sweep.png").stat().st_size > 10_000
    assert Path("swept/sweep.md").read_text().count("\n") == 6
    main(["evaluate", "checkpoints/smoke-stage2", *scored, "--out", "evaluated", "--sampler", "ab2", "--steps", "4"])
    alone = json.loads(Path("evaluated/metrics.json").read_text())
    assert cells[0]["distances"]["fd_efflite0"] == alone["distances"]["fd_efflite0"]["samples"]
    assert cells[0]["physics"] == {name: score["ratio"] for name, score in alone["physics"]["samples"].items()}
    assert cells[0]["gflop"] - cells[2]["gflop"] == pytest.approx(3 * (cells[2]["gflop"] - decoding()))
    monkeypatch.setattr("stage2_diffusion.sweep.Scorer", None)
    main([*sweep, "1", "4"])  # nothing is left to do
    other = fails(capsys, *sweep, "4", "--seed", "5")
    assert "another seed" in other
    assert other.count("\n") == 1
    with pytest.raises(TypeError):  # there is something to do: by the name of a model, its results lie where it does
        main(["sweep", "smoke-stage2", *scored, "--steps", "2"])
    assert Path("checkpoints/smoke-stage2/sweep").is_dir()
    assert not Path("smoke-stage2").exists()
    Path("swept/sweep.json").write_text("{")
    assert "delete it" in fails(capsys, *sweep, "4")


def decoding() -> float:
    return flops(Generator.from_pretrained("checkpoints/smoke-stage2", "cpu").autoencoder)["decode"]


def test_clean_and_observed_differ_by_pixel_noise_alone(at_home: Path) -> None:
    generator = Generator.from_pretrained("checkpoints/smoke-stage2", "cpu")
    clean, observed = generator.images([1], observed=False), generator.images([1])
    expected = generator.autoencoder.observe(clean, [torch.Generator().manual_seed(0)])
    inside = (clean > 0.2) & (clean < 0.8)
    assert float((observed - clean)[inside].std()) == pytest.approx(float((expected - clean)[inside].std()), rel=0.1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dit", ["--backbone.name", "dit", "--backbone.width", "16", "--backbone.depth", "1", "--backbone.heads", "2"]),
        (
            "uvit",
            ["--backbone.name", "uvit", "--backbone.width", "16", "--backbone.depth", "3", "--backbone.heads", "2"],
        ),
        ("karras", ["--backbone.name", "karras_unet", "--optimizer.name", "adamw"]),
        ("ddpm", ["--diffusion.schedule", "linear", "--diffusion.prediction", "eps", "--diffusion.time", "uniform"]),
        ("vpred", ["--diffusion.schedule", "cosine", "--diffusion.prediction", "v", "--sampling.sampler", "dpmpp"]),
        (
            "x0",
            [
                "--diffusion.schedule",
                "sigmoid",
                "--diffusion.prediction",
                "x0",
                "--sampling.sampler",
                "ddim",
                "--diffusion.weighting",
                "min_snr",
                "--sampling.tune",
                "[2]",
                "--sampling.steps",
                "2",
            ],
        ),
    ],
)
def test_other_backbones_and_objectives_are_a_word_away(at_home: Path, name: str, options: list[str]) -> None:
    common = ["--config", "stage2/unet.yaml", "--name", name, "--data.path", "data/smoke", "--data.batch_size", "8"]
    common += ["--autoencoder", "checkpoints/smoke-stage1", "--logger.wandb", "disabled", "--trainer.max_steps", "3"]
    small = (
        [] if name in ("dit", "uvit") else ["--backbone.width", "8", "--backbone.blocks", "1", "--backbone.heads", "1"]
    )
    main(["train-diffusion", *common, *small, *options])
    generator = Generator.from_pretrained(f"checkpoints/{name}", "cpu")
    assert torch.isfinite(generator.images(range(2), steps=3)).all()
    assert (generator.settings()["times"] is not None) == ("--sampling.tune" in options)  # fitted before publishing


def test_a_class_of_one_s_own_trains_and_is_loaded_by_those_who_trust_it(
    at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_net.py").write_text(OWN_NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(custom, "TRUSTED", set())
    main([
        "train-diffusion", "--config", "stage2/unet.yaml", "--name", "own", "--data.path", "data/smoke",
        "--data.batch_size", "8", "--autoencoder", "checkpoints/smoke-stage1", "--logger.wandb", "disabled",
        "--trainer.max_steps", "3", "--backbone.class_path", "own_net.OwnNet", "--backbone.options", "{kernel: 5}",
        "--guide.max_steps", "2", "--guide.backbone.options", "{kernel: 3}", "--sampling.guidance", "1.5",
    ])  # fmt: skip
    assert "`own_net.OwnNet`" in Path("checkpoints/own/model/README.md").read_text()
    draw = ["sample", "checkpoints/own", "--count", "2", "--steps", "2", "--out", str(tmp_path / "drawn")]
    main(draw)  # by who has trained it, in the same process
    assert (tmp_path / "drawn" / "samples.npz").is_file()

    monkeypatch.setattr(custom, "TRUSTED", set())  # as in another process
    monkeypatch.delitem(sys.modules, "own_net")
    error = fails(capsys, *draw)
    assert error.count("\n") == 1
    assert "own_net.OwnNet" in error
    assert "--trust own_net" in error
    assert "own_net" not in sys.modules
    teach = ["distill", "--teacher", "checkpoints/own", "--name", "own-few", "--trainer.max_steps", "1"]
    teach += ["--logger.wandb", "disabled"]
    for command in (
        ["tune-grid", "checkpoints/own"],
        ["evaluate", "checkpoints/own", "--reference", "data/smoke"],
        teach,
    ):
        assert "--trust own_net" in fails(capsys, *command)
    assert "own_net" not in sys.modules
    main([*teach, "--trust", "own_net"])
    main([*draw, "--trust", "own_net"])


def test_diffusion_on_pixels_is_the_same_code(at_home: Path) -> None:
    main([
        "train-diffusion", "--config", "stage2/pixels.yaml", "--data.path", "data/smoke", "--data.batch_size", "4",
        "--backbone.width", "8", "--backbone.multipliers", "[1, 1, 1]", "--backbone.blocks", "1", "--backbone.heads", "1",
        "--backbone.attention", "[2]", "--trainer.max_steps", "2", "--logger.wandb", "disabled",
    ])  # fmt: skip
    images = Generator.from_pretrained("checkpoints/pixels", "cpu").images(range(2), steps=2)
    assert images.shape == (2, 1, 150, 150)
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_training_starts_from_a_models_weights(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    still = ["--trainer.max_steps", "1", "--optimizer.lr", "1e-12", "--optimizer.weight_decay", "0"]
    model = "checkpoints/smoke-stage2"

    def differ(run: str, part: str, theirs: str = model) -> float:
        a, b = (load_part(path, part)[1] for path in (run, theirs))
        return max(float((a[k] - b[k]).abs().max()) for k, x in a.items() if x.is_floating_point() and "weight" in k)

    again = ["train-diffusion", "--config", f"{model}/config.yaml", "--name", "again", "--seed", "1", *still]
    main([*again, "--pretrained", model, "--autoencoder", model])
    assert differ("checkpoints/again", "denoiser") < 1e-6
    assert differ("checkpoints/again", "autoencoder") == 0
    assert "pretrained" in read_config("checkpoints/again")["fingerprint"]
    main([*again, "--name", "anew"])
    assert differ("checkpoints/anew", "denoiser") > 0.01
    # One that is told something begins as the one that was not.
    told = ["--name", "told", "--condition.parameters", "[theta_E]", "--guide.max_steps", "0"]
    main([*again, "--pretrained", model, "--autoencoder", model, *told])
    images = [
        Generator.from_pretrained(path, "cpu").images(range(2), guidance=1) for path in ("checkpoints/told", model)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)

    encoder = ["train-vqvae", "--config", "checkpoints/smoke-stage1/config.yaml", *still]
    encoder += ["--autoencoder.quantizer.warmup_steps", "0", "--seed", "1"]
    main([*encoder, "--name", "encoder", "--pretrained", model, "--noise.law", "none"])
    assert differ("checkpoints/encoder", "autoencoder") < 1e-3  # the averages of codes move without a rate
    # The weights, and not the noise of the images that they were trained on.
    noise, theirs = (load_part(path, "autoencoder")[1] for path in ("checkpoints/encoder", model))
    unfitted = {f"noise.{k}": v for k, v in NoiseLaw().state_dict().items()}
    assert all(torch.equal(noise[k], v) for k, v in unfitted.items())
    assert any(not torch.equal(theirs[k], v) for k, v in unfitted.items())
    main([*encoder, "--name", "encoder-anew"])
    assert differ("checkpoints/encoder-anew", "autoencoder") > 0.01

    for options, said in (
        (["--guide.backbone", "{widht: 8}"], "did you mean 'width'?"),
        (["--pretrained", "checkpoints/smoke-stage1"], "one of stage 2 is needed"),
        (["--pretrained", model, "--backbone.width", "24"], "do not fit"),
        (["--pretrained", model, "--diffusion.prediction", "v"], "--diffusion.prediction x0"),
        (["--pretrained", "checkpoints/nothing"], "no model at"),
    ):
        assert said in fails(capsys, *again, "--name", "wrong", *options)
        assert not Path("checkpoints/wrong/model").exists()


def test_published_models_survive_a_round_trip_and_refuse_damage(at_home: Path, tmp_path: Path) -> None:
    autoencoder, _ = load_autoencoder("checkpoints/smoke-stage1", (1, 150, 150), PixelTransform(0.0, 1.0))
    inside = Generator.from_pretrained("checkpoints/smoke-stage2", "cpu").autoencoder
    assert all(torch.equal(v, inside.state_dict()[k]) for k, v in autoencoder.state_dict().items())
    assert not any(p.requires_grad for p in autoencoder.parameters())

    again, config = load_autoencoder("checkpoints/smoke-stage2", (1, 150, 150), PixelTransform(0.0, 1.0))
    assert config == read_config("checkpoints/smoke-stage1")["autoencoder"]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in autoencoder.state_dict().items())

    copy = tmp_path / "model"
    shutil.copytree("checkpoints/smoke-stage2/model", copy)
    Generator.from_pretrained(copy, "cpu")  # the folder stands alone
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or altered"):
        load(copy, "diffusion")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_config(copy)
    with pytest.raises(UserError, match=r"\(2, 150, 150\)"):
        load_autoencoder("checkpoints/smoke-stage1", (2, 150, 150), PixelTransform(0.0, 1.0))


def test_a_users_mistakes_get_one_clear_line(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a model of stage 1" in fails(capsys, "sample", "checkpoints/smoke-stage1", "--out", "s")
    assert "did you mean smoke" in fails(capsys, "sample", "checkpoints/smok", "--out", "s")
    assert "allow --count" in fails(
        capsys, "evaluate", "checkpoints/smoke-stage2", "--reference", "data/smoke", "--count", "5000"
    )
    assert "lens-ldm prepare" in fails(capsys, "evaluate", "checkpoints/smoke-stage2", "--reference", "data/none")
    shutil.copy("checkpoints/smoke/samples.npz", "clean.npz")
    with np.load("clean.npz", allow_pickle=False) as file:
        arrays = dict(file)
    arrays["metadata"] = np.asarray(json.dumps({**json.loads(str(arrays["metadata"])), "observed": False}))
    np.savez("clean.npz", **arrays)
    score = ("evaluate", "checkpoints/smoke-stage2", "--reference", "data/smoke", "--count", "16")
    assert "without --clean" in fails(capsys, *score, "--samples", "clean.npz")
    assert "give one of the two" in fails(capsys, *score, "--samples", "clean.npz", "--steps", "3")
    assert "seeds run from 0" in fails(capsys, *score, "--seed", "-1")
    assert "none at" in fails(
        capsys, "evaluate", "checkpoints/smoke-stage2", "--reference", "data/smoke", "--inception-weights", "none.pth"
    )
    assert "cuda" in fails(capsys, "sample", "checkpoints/smoke-stage2", "--device", "cuda:99", "--out", "s")
    (at_home / "file").write_text("")
    assert "choose another --out" in fails(capsys, "sample", "checkpoints/smoke-stage2", "--out", "file/s")
    assert "no command 'smaple'" in fails(capsys, "smaple")


def test_a_typo_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    for script in ("stage1_vqvae/train.py", "stage2_diffusion/train.py", "stage2_diffusion/distill.py"):
        stage = "stage1/vqvae.yaml" if "stage1" in script else "stage2/unet.yaml"
        command = [
            sys.executable,
            "-X",
            "importtime",
            str(ROOT / script),
            "--config",
            stage,
            "--trainer.max_stepps",
            "3",
        ]
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert process.returncode == 2
        assert "did you mean 'max_steps'" in process.stderr
        imported = {
            line.split("|")[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")
        }
        assert "pydantic" in imported
        assert not imported & {"torch", "lightning", "numpy"}


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("stage1_vqvae", ["--config", "stage1/vqvae.yaml", "--autoencoder.widths", "[8, 8]",
                          "--autoencoder.quantizer.codebook_size", "8", "--autoencoder.quantizer.codebook_dim", "2",
                          "--autoencoder.quantizer.warmup_steps", "2", "--loss.adversarial", "0.1",
                          "--loss.feature_matching", "1", "--loss.adversarial_start", "1",
                          "--loss.discriminator_width", "4", "--loss.perceptual", "0.1"]),
        ("stage2_diffusion", ["--config", "stage2/unet.yaml", "--autoencoder", "checkpoints/smoke-stage1",
                              "--backbone.width", "8", "--backbone.blocks", "1", "--backbone.heads", "1",
                              "--guide.max_steps", "2", "--sampling.guidance", "1.5"]),
    ],
    ids=["stage1", "stage2"],
)  # fmt: skip
def test_two_processes_train_as_torchrun_starts_them(at_home: Path, stage: str, options: list[str]) -> None:
    command = [
        {"stage1_vqvae": "train-vqvae", "stage2_diffusion": "train-diffusion"}[stage], *options, "--name", f"ddp-{stage}",
        "--data.path", "data/smoke", "--data.batch_size", "8", "--trainer.max_steps", "4", "--trainer.accelerator", "cpu",
        "--logger.wandb", "disabled",
    ]  # fmt: skip
    run_two(main, command)
    assert (at_home / f"checkpoints/ddp-{stage}/model/model.safetensors").exists()
    assert ("guide" in read_config(f"checkpoints/ddp-{stage}")) == (stage == "stage2_diffusion")
