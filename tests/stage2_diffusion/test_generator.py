"""A generator without training: what it does with its settings, for every objective and sampler."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.autoencoder import Pixels
from shared.checkpoint import amend, autoencoder_config, publish, read_config, state_of
from shared.cli import main
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.registry import names
from shared.schema import Diffusion, Sampling
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.generator import Generator, build_denoiser
from stage2_diffusion.grids import tune
from stage2_diffusion.schedule import CURVES, NoiseSchedule
from tests.stage2_diffusion.test_samplers import exact_denoiser

ALLOWED = [(p, s) for p in ("eps", "x0", "v", "velocity") for s in CURVES if p != "velocity" or s == "flow"]
UNET = {"name": "unet", "width": 8, "multipliers": [1], "blocks": 1, "attention": [], "heads": 1}


def pixels(shape: tuple[int, int, int]) -> Pixels:
    autoencoder = Pixels(shape, PixelTransform(-3.0, 3.0))
    autoencoder.fit_latents([torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))])
    return autoencoder


def untrained(diffusion: dict[str, Any], **sampling: Any) -> Generator:
    torch.manual_seed(0)
    denoiser = build_denoiser(UNET, diffusion, (1, 8, 8))
    for parameter in denoiser.parameters():  # the last layer's begin at zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return Generator(pixels((1, 8, 8)), denoiser.requires_grad_(False), "fp32", sampling)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A model of before there were eta, weightings and fitted grids."""
    diffusion = {"schedule": "flow", "prediction": "velocity", "time": "uniform", "shift": 1.0}
    generator = untrained(diffusion)
    config = {
        "autoencoder": autoencoder_config(generator.autoencoder, {"name": "pixels"}), "backbone": UNET,
        "diffusion": diffusion, "sampling": {"sampler": "ab2", "steps": 4, "shift": 3.0}, "precision": "fp32",
    }  # fmt: skip
    state = state_of(autoencoder=generator.autoencoder, denoiser=generator.denoiser)
    publish(tmp_path / "model", "diffusion", config, state, "")
    return tmp_path / "model"


@pytest.mark.parametrize("units", [True, False])
def test_a_model_trained_in_bf16_is_used_in_what_the_machine_has(
    units: bool, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: units, raising=False)
    assert Generator.from_pretrained(published, "cpu").precision == "fp32"  # as it was trained
    edited = json.loads((published / "config.json").read_text()) | {"precision": "bf16"}
    (published / "config.json").write_text(json.dumps(edited))
    generator = Generator.from_pretrained(published, "cpu")
    assert generator.precision == ("bf16" if units else "fp32")
    exact = Generator.from_pretrained(published, "cpu", precision="fp32")
    assert exact.precision == "fp32"
    difference = (generator.images(range(4)) - exact.images(range(4))).abs().max()
    assert bool(difference > 0) == units
    assert difference < 0.05  # bf16 has eight bits


@pytest.mark.parametrize("target", [("velocity", "flow"), ("v", "cosine")])
def test_a_guide_of_its_own_guides_as_one_that_is_given(target: tuple[str, str], tmp_path: Path) -> None:
    prediction, schedule = target
    diffusion = {"schedule": schedule, "prediction": prediction, "time": "uniform", "shift": 1.0}
    strong, weak = untrained(diffusion), untrained(diffusion)
    for parameter in weak.denoiser.parameters():
        parameter.data.mul_(0.8)
    seeds = range(3)
    plain = strong.images(seeds, steps=4)
    given = strong.images(seeds, steps=4, guide=weak, guidance=1.5)
    assert (given - plain).abs().mean() > 1e-3

    defaults = {"sampler": "ddim", "steps": 4, "guidance": 1.5}
    own = Generator(strong.autoencoder, strong.denoiser, "fp32", defaults, guide=weak.denoiser)
    torch.testing.assert_close(own.images(seeds), given, rtol=0, atol=0)
    torch.testing.assert_close(own.images(seeds, guidance=1.0), plain, rtol=0, atol=0)
    assert own.gflop() > 1.9 * own.gflop(guidance=1.0)
    other = strong.images(seeds, steps=4, guide=strong, guidance=3.0)  # away from itself: nowhere
    torch.testing.assert_close(own.images(seeds, guide=strong, guidance=3.0), other, rtol=0, atol=0)
    x_t, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.9)
    expected = weak.denoise(None)(x_t, t) + 1.5 * (strong.denoise(None)(x_t, t) - weak.denoise(None)(x_t, t))
    low, high = strong.autoencoder.bounds()
    torch.testing.assert_close(own.denoise(None)(x_t, t), expected.clamp(low, high))  # what a student is taught

    config = {
        "autoencoder": autoencoder_config(own.autoencoder, {"name": "pixels"}), "backbone": UNET, "diffusion": diffusion,
        "sampling": defaults, "precision": "fp32", "guide": {"backbone": UNET, "max_steps": 1},
    }  # fmt: skip
    state = state_of(autoencoder=own.autoencoder, denoiser=own.denoiser, guide=weak.denoiser)
    publish(tmp_path / "model", "diffusion", config, state, "")
    torch.testing.assert_close(Generator.from_pretrained(tmp_path / "model", "cpu").images(seeds), given)


class Wild(nn.Module):
    """A network that is far from right: what it says of the noise leaves x_0 anywhere."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 3 * torch.ones_like(x)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "ab2"])
def test_estimates_of_pixels_keep_to_the_range_of_the_data_and_those_of_latents_have_none(sampler: str) -> None:
    schedule = NoiseSchedule("linear")
    autoencoder = pixels((1, 8, 8))
    seen: list[Tensor] = []
    generator = Generator(autoencoder, Denoiser(Wild(), schedule, "eps"), "fp32", {})
    generator.images(range(4), sampler=sampler, steps=6, seen=seen.append)
    scaled = torch.stack(seen) * autoencoder.latent_std + autoencoder.latent_mean
    assert scaled.abs().max() == pytest.approx(1.0)  # and not 150 times as far
    assert len(seen) == 6
    autoencoder.bounds = lambda: None  # type: ignore[method-assign,assignment,return-value]
    seen.clear()
    generator.images(range(4), sampler=sampler, steps=6, seen=seen.append)
    assert torch.stack(seen).abs().max() > 100


@pytest.mark.parametrize(("prediction", "schedule"), ALLOWED)
def test_every_objective_goes_with_every_sampler(prediction, schedule):
    block = Diffusion(schedule=schedule, prediction=prediction, weighting="min_snr").model_dump()
    generator = untrained(block)
    assert generator.denoiser.schedule.t_max == 1 or prediction == "eps"
    for sampler in names("sampler"):
        for steps in (1, 5):
            images = generator.images(range(2), sampler=sampler, steps=steps, shift=2.0)
            assert images.isfinite().all()
            assert images.std() > 0


def test_zero_terminal_is_a_choice_that_null_leaves_to_the_prediction():
    def t_max(prediction: str, **more: Any) -> float:
        block = {**Diffusion(schedule="cosine", prediction=prediction).model_dump(), **more}
        return build_denoiser(UNET, block, (1, 8, 8)).schedule.t_max

    assert t_max("v") == 1 > t_max("eps")
    assert t_max("v", zero_terminal=False) == t_max("eps") == t_max("eps", zero_terminal=False)
    with pytest.raises(ValueError, match="eps cannot start from pure noise: set false"):
        Diffusion(schedule="cosine", prediction="eps", zero_terminal=True)
    with pytest.raises(ValueError, match="linear never reaches pure noise: set false"):
        Diffusion(schedule="linear", prediction="v", zero_terminal=True)


# --------------------------------------------------------------------------------------------- settings


def test_a_fitted_grid_is_used_unless_another_is_asked_for():
    grid = [1.0, 0.8, 0.3, 0.0]
    generator = untrained(Diffusion().model_dump(), sampler="ab2", steps=3, shift=3.0, grids={"ab2": {"3": grid}})
    assert generator.settings()["times"] == grid
    assert generator.settings()["shift"] is None
    for other in ({"steps": 4}, {"sampler": "ddim"}, {"shift": 3.0}):
        assert generator.settings(**other)["times"] is None
        assert generator.settings(**other)["shift"] == 3.0
    assert generator.settings(**generator.settings()) == generator.settings()
    seen: list[float] = []
    generator.images([0], on_step=lambda i, t, *_: seen.append(t))
    assert seen == grid[:-1]
    seen.clear()
    generator.images([0], shift=3.0, on_step=lambda i, t, *_: seen.append(t))
    assert seen == pytest.approx([1.0, 6 / 7, 0.6])


def test_eta_is_the_noise_of_ddim_alone():
    generator = untrained(Diffusion().model_dump(), sampler="ddim", steps=6, eta=0.5, grids={"ddim": {"6": [1.0, 0.0]}})
    assert generator.settings()["eta"] == 0.5
    assert generator.settings()["times"] is None  # fitted to the ODE, which eta leaves
    assert generator.settings(sampler="ab2")["eta"] == 0
    images = [generator.images([0], eta=eta, shift=1.0) for eta in (None, 0.5, 0.0, 1.0)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert not torch.equal(images[1], images[3])
    with pytest.raises(UserError, match="eta is for sampler ddim, ab2 takes none"):
        generator.settings(sampler="ab2", eta=0.5)


def test_latents_are_what_is_decoded():
    generator = untrained(Diffusion().model_dump(), steps=2)
    ((seeds, latents),) = generator.sample([3, 4], latents=True)
    assert seeds == [3, 4]
    assert torch.equal(generator.autoencoder.decode(latents), generator.images([3, 4]))


# ------------------------------------------------------------------------------------------------ grids


class Exact(torch.nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.denoise = exact_denoiser(schedule)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: None) -> torch.Tensor:
        return self.denoise(x, t)


@pytest.fixture(scope="module")
def mixture() -> Generator:
    schedule = NoiseSchedule("cosine")
    return Generator(pixels((2, 1, 1)), Denoiser(Exact(schedule), schedule, "x0"), "fp32", {"shift": 3.0})


@pytest.mark.parametrize("sampler", ["ab2", "unipc", "heun"])
def test_a_fitted_grid_ends_nearer_to_the_solution_than_even_ones(mixture, sampler):
    tuned = tune(mixture, sampler, 4, count=64)
    assert tuned.errors.keys() == {"shift 1", "shift 3", "fitted"}
    assert tuned.errors["fitted"] < 0.9 * min(tuned.errors["shift 1"], tuned.errors["shift 3"])
    assert len(tuned.times) == 5
    assert tuned.times[0] == 1
    assert tuned.times[-1] == 0
    assert (np.diff(tuned.times) < 0).all()
    # The errors are those of noises that the fit has not seen.
    seeds = range(2**31, 2**31 + 64)
    fine = np.linspace(1, 0, 65)
    ends = []
    for name, times in ((sampler, tuned.times), ("unipc", mixture.denoiser.schedule.time_at(torch.from_numpy(fine)))):
        times = [1.0, *list(map(float, times))[1:-1], 0.0]
        ends.append(torch.cat([x for _, x in mixture.sample(seeds, sampler=name, times=times, latents=True)]))
    error = (ends[0] - ends[1]).double().square().flatten(1).mean(1).sqrt()
    assert tuned.errors["fitted"] == pytest.approx(error.log().mean().exp().item(), rel=0.02)


def test_the_last_evaluation_can_be_held(mixture):
    """What the exact denoiser says at c = 0.3 is not where the ODE ends, and the even grids go nearer to that."""
    tuned = tune(mixture, "dpmpp", 5, count=64, last=0.3)
    schedule = mixture.denoiser.schedule
    c = schedule.c(torch.tensor(tuned.times, dtype=torch.float64))
    assert float(c[-2]) == pytest.approx(0.3, abs=1e-5)
    even = [1.0, *schedule.time_at(torch.linspace(1, 0.3, 5, dtype=torch.float64))[1:].tolist(), 0.0]
    fine = [1.0, *schedule.time_at(torch.linspace(1, 0.3, 200, dtype=torch.float64))[1:].tolist(), 0.0]
    seeds = range(2**31, 2**31 + 64)
    ends = [torch.cat([x for _, x in mixture.sample(seeds, sampler="dpmpp", times=times, latents=True)])
            for times in (fine, even, tuned.times)]  # fmt: skip
    errors = [(end - ends[0]).double().square().flatten(1).mean(1).log().mean().exp().sqrt() for end in ends[1:]]
    assert errors[1] < 0.95 * errors[0]
    assert tuned.errors["fitted"] == pytest.approx(float(errors[1]), rel=0.1)


def test_what_has_no_grid_to_fit_is_refused(mixture):
    for sampler in ("ddpm", "consistency"):
        with pytest.raises(UserError, match=f"{sampler} draws noise at every step"):
            tune(mixture, sampler, 4)
    with pytest.raises(UserError, match="1 evaluations leaves no time to choose"):
        tune(mixture, "ab2", 1)
    with pytest.raises(UserError, match="2 evaluations leaves no time to choose"):
        tune(mixture, "ab2", 2, last=0.2)
    with pytest.raises(UserError, match="above 0 and below 1, not 1"):
        tune(mixture, "ab2", 4, last=1.0)
    for sampling in ({"sampler": "ddpm", "tune": [4]}, {"sampler": "ddim", "eta": 0.5, "tune": [4]}):
        with pytest.raises(ValueError, match="draws no noise on the way"):
            Sampling(**sampling)
    with pytest.raises(ValueError, match="above 0 is for sampler ddim, not ab2"):
        Sampling(eta=0.5)


def test_the_command_keeps_a_grid_in_the_model_and_sampling_says_that_it_was_used(published, tmp_path, capsys):
    before = read_config(published)
    untouched = Generator.from_pretrained(published, "cpu").images([1])
    command = ["tune-grid", str(published), "--steps", "3", "4", "--count", "4", "--device", "cpu"]
    main(command)
    assert capsys.readouterr().out.count("fitted 0.0") == 2
    after = read_config(published)
    grids = after["sampling"].pop("grids")
    assert after == before  # the hash of the weights among it
    assert {sampler: [*of] for sampler, of in grids.items()} == {"ab2": ["3", "4"]}

    sample = ["sample", str(published), "--count", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    for more, times in (([], grids["ab2"]["4"]), (["--steps", "3"], grids["ab2"]["3"]), (["--shift", "3"], None)):
        main([*sample, *more])
        with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as file:
            metadata, images = json.loads(str(file["metadata"])), file["images"]
        assert metadata["times"] == times
        assert metadata["shift"] == (None if times else 3.0)
    assert np.allclose(images[1], untouched, atol=1e-5)
    with pytest.raises(SystemExit):
        main([*sample, "--eta", "0.5"])
    assert "eta is for sampler ddim" in capsys.readouterr().err


def test_a_model_stays_whole_when_its_config_cannot_be_written(published, monkeypatch):
    before = (published / "config.json").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*config\.json: No space left"):
        amend(published, "diffusion", {"sampling": {"steps": 5}})
    assert (published / "config.json").read_bytes() == before
    assert {file.name for file in published.iterdir()} == {"config.json", "model.safetensors", "README.md"}
