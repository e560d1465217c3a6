"""Scores of an autoencoder, against what they are by definition and against noise whose statistics are known."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.checkpoint import autoencoder_config, publish
from shared.cli import main
from shared.data.cache import CacheWriter, LensImages
from shared.data.normalise import Normalisation
from shared.errors import UserError
from shared.evaluation.reference import halves
from shared.simulate.again import Simulation
from shared.simulate.images import simulate
from shared.simulate.preset import Preset
from shared.simulate.run import simulate_to
from stage1_vqvae.evaluate import Residuals, Sums, code_use, evaluate, generators
from stage1_vqvae.noise import NoiseLaw
from stage1_vqvae.quantizers import VQ, FiniteScalar
from stage1_vqvae.report import quality_rows
from stage1_vqvae.vqvae import VQVAE

SPEC = {
    "name": "vqvae", "widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1, "latent_channels": 4,
    "quantizer": {"name": "fsq", "levels": [5, 5]}, "latents": "continuous",
}  # fmt: skip
SEED, COUNT, SIDE = 3, 120, 8


def preset(**changes: object) -> Preset:
    return Preset.load("deeplense", {"pixels": 30, "pixel_scale": 0.25, "supersampling": 1, **changes})


@pytest.fixture(scope="module", autouse=True)
def one_call_timed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage1_vqvae.evaluate.TIMED", 1e-9)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated data set, and an untrained autoencoder of it that has a noise law."""
    folder = tmp_path_factory.mktemp("stage1")
    simulate_to(folder / "data", preset(), COUNT, SEED, workers=1, progress=False)
    images = LensImages(folder / "data")
    torch.manual_seed(0)
    model = VQVAE(images.image_shape, images.transform, **{k: v for k, v in SPEC.items() if k != "name"})
    model.eval()
    model.fit_latents([images.batch(images.split("train"))])
    model.noise.dark[0] = 4e-4
    model.noise.b.fill_(1e-3)
    config = {
        "autoencoder": autoencoder_config(model, SPEC), "precision": "fp32", "data": {"name": "data", "images": 60},
        "training": {"name": "untrained"},
    }  # fmt: skip
    publish(folder / "model", "autoencoder", config, model.state_dict(), "")
    publish(folder / "other", "diffusion", config, {}, "")
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="module")
def scored(home: Path) -> dict:
    command = ["evaluate-vqvae", str(home / "model"), "--reference", str(home / "data"), "--count", str(SIDE)]
    main([*command, "--out", str(home / "out"), "--device", "cpu"])
    return json.loads((home / "out" / "metrics.json").read_text())


@torch.no_grad()
def by_hand(home: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Observed test images, their clean truth, the clean and the observed reconstructions."""
    from shared.checkpoint import build_autoencoder, load

    images = LensImages(home / "data")
    config, state = load(home / "model", "autoencoder")
    model = build_autoencoder(config["autoencoder"], state)
    places = halves(images, SIDE)[1]
    observed, truth, _ = simulate(preset(), SEED, places.tolist())
    latents = model.encode(images.batch(places))
    return (
        observed,
        truth,
        model.decode(latents, observed=False),
        model.decode(latents, generator=generators(0, SIDE)),
    )


def test_what_was_measured_of_real_images_is_kept_and_says_the_same(home: Path, scored: dict) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (home / "data" / "measured").rglob("*.npz")}
    assert len({path.parent for path in kept}) == 3  # each half, and the other exposures of one
    main(["evaluate-vqvae", str(home / "model"), "--reference", str(home / "data"), "--count", str(SIDE),
          "--out", str(home / "again"), "--device", "cpu"])  # fmt: skip
    again = json.loads((home / "again" / "metrics.json").read_text())
    assert {k: v for k, v in again.items() if k != "cost"} == {k: v for k, v in scored.items() if k != "cost"}
    assert {path: path.stat().st_mtime_ns for path in (home / "data" / "measured").rglob("*.npz")} == kept


def test_errors_against_the_truth_are_what_they_are_defined_to_be(home: Path, scored: dict) -> None:
    observed, truth, clean, _ = by_hand(home)
    found = scored["truth"]
    assert found["psnr"] == pytest.approx(float(-10 * (clean - truth).square().mean().log10()), abs=1e-3)
    lit = truth - scored["noise"]["background"] > 0.1
    assert 0.01 < found["lit_share"] < 0.9
    assert found["lit_share"] == pytest.approx(float(lit.double().mean()), abs=1e-9)
    for name, where in (("lit", lit), ("dark", ~lit)):
        expected = (clean - truth)[where].square().mean() / (observed - truth)[where].square().mean()
        assert found[f"{name}_error_over_noise"] == pytest.approx(float(expected), rel=1e-4)
    assert scored["observed"]["psnr"] == pytest.approx(
        float(-10 * (clean - observed).square().mean().log10()), abs=1e-3
    )


def test_spectrum_codes_and_worst_images_are_those_of_the_reconstructions(home: Path, scored: dict) -> None:
    observed, _, clean, drawn = by_hand(home)
    power = [torch.fft.fft2(x.double()).abs().square().mean(0)[0] for x in (drawn, observed)]
    # The first ring of 30 x 30 pixels: the eight modes about k = 0.
    ring = [sum(float(p[i, j]) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)) for p in power]
    assert scored["spectrum"]["ratio"][0] == pytest.approx(ring[0] / ring[1], rel=1e-3)
    assert scored["codes"]["codes"] == 25
    assert len(scored["codes"]["levels_used"]) == 2
    assert "dead" not in scored["codes"]
    lit = clean - scored["noise"]["background"] > 0.1
    variance = 4e-4 + 1e-3 * (clean - NoiseLaw().level(clean)).clamp_min(0)
    chi2 = [
        float(((x - c).square() / v)[m if m.any() else ...].mean())
        for x, c, v, m in zip(observed, clean, variance, lit, strict=True)
    ]
    places = halves(LensImages(home / "data"), SIDE)[1]
    assert scored["worst"]["index"][0] == int(places[int(np.argmax(chi2))])
    assert scored["worst"]["chi2_lit"][0] == pytest.approx(max(chi2), rel=1e-3)


def test_the_truth_with_new_noise_is_nearer_to_real_images_than_untrained_reconstructions(scored: dict) -> None:
    scores = scored["distances"]["fd_efflite0"]
    assert scores["truth + new noise"]["distance"] < 0.5 * scores["reconstructions"]["distance"]
    assert {score["n"] for score in scores.values()} == {SIDE}


def test_everything_is_written_and_the_report_stands_alone(home: Path, scored: dict) -> None:
    assert {path.name for path in (home / "out").iterdir()} == {
        "metrics.json", "report.html", "reconstructions.png", "worst.png", "noise.png", "spectra.png", "codes.png",
    }  # fmt: skip
    page = (home / "out" / "report.html").read_text()
    assert page.count("<img") == 5
    assert "://" not in page
    assert scored["cost"]["decode_gflop"] > scored["cost"]["encode_gflop"] > 0


@pytest.mark.slow
def test_images_that_are_not_the_simulations_have_no_truth(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = LensImages("data")
    source = data.index["source"]
    writer = CacheWriter(Path("shuffled"), len(data), data.image_shape, source)
    for place in writer.pending():
        writer.write(place, data.images[::-1][place.start : place.stop])
    writer.finish(value_range=(0.0, 1.0))
    main(["evaluate-vqvae", "model", "--reference", "shuffled", "--count", "4", "--out", "out2", "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.count("no clean truth") == 1
    metrics = json.loads(Path("out2/metrics.json").read_text())
    assert metrics["truth"] is None
    assert list(metrics["distances"]["fd_efflite0"]) == ["reconstructions"]
    with pytest.raises(UserError, match="not those that"):
        Simulation(LensImages("shuffled"))(np.arange(2), LensImages("shuffled").batch([0, 1]))


def test_a_part_of_a_data_set_knows_where_it_starts(tmp_path: Path) -> None:
    simulate_to(tmp_path / "all", preset(), 12, SEED, workers=1, progress=False, part=(2, 3))
    part = LensImages(tmp_path / "all.shard-2-of-3")
    truth = Simulation(part)(np.array([1, 3]), part.batch([1, 3]))[0]
    assert torch.equal(truth, simulate(preset(), SEED, [5, 7])[1])


def test_a_users_mistakes_get_one_line(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate-vqvae", *arguments])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "a model of stage 2; here one of stage 1 is needed" in told("other", "--reference", "data")
    assert "there is no such folder" in told("modle", "--reference", "data")
    assert "which allow --count" in told("model", "--reference", "data", "--count", "5000")
    assert "needs --count 2 at least" in told("model", "--reference", "data", "--count", "1")
    for key in ("autoencoder", "precision", "data"):
        config = json.loads(Path("model/config.json").read_text())
        shutil.copytree("model", f"without-{key}")
        Path(f"without-{key}/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        assert f"config.json has no '{key}'" in told(f"without-{key}", "--reference", "data")
    Path("taken/metrics.json").mkdir(parents=True)
    assert "there is a folder of that name" in told("model", "--reference", "data", "--count", "4", "--out", "taken")
    assert "makes images (1, 150, 150)" in told("model", "--reference", "data", "--fit", "3", "--preset", "deeplense")
    assert "no preset and no file" in told("model", "--reference", "data", "--fit", "3", "--preset", "deeplens")
    assert "cuda" in told("model", "--reference", "data", "--device", "cuda:99")
    simulate_to(Path("counts"), preset(scaling="none"), 40, 0, workers=1, progress=False)
    assert "prepare them in the same units" in told("model", "--reference", "counts")


def test_residuals_of_known_noise_follow_its_law_and_are_white() -> None:
    torch.manual_seed(0)
    residuals = Residuals(torch.tensor([0.1, 0.4]))
    signal = torch.linspace(0, 0.99, 100).expand(20, 1, 100, 100).contiguous()
    variance = 0.01 + 0.2 * signal
    for part in range(0, 20, 5):
        s, v = signal[part : part + 5], variance[part : part + 5]
        residuals.add(s, 0.3 + v.sqrt() * torch.randn(s.shape), v, s > 0.5)
    curve = residuals.curve()
    assert curve["pixels"] == [20 * 100 * n for n in (11, 30, 59)]
    assert curve["law"] == pytest.approx(
        [float(variance[..., m].double().mean()) for m in (slice(11), slice(11, 41), slice(41, 100))]
    )
    assert curve["variance"] == pytest.approx(curve["law"], rel=0.03)
    assert curve["bias"] == pytest.approx([0.3] * 3, abs=0.01)


def test_correlation_of_averaged_neighbours_is_one_half_along_their_axis_alone() -> None:
    torch.manual_seed(0)
    white = torch.randn(20, 1, 64, 65)
    residual = (white[..., 1:] + white[..., :-1]) / math.sqrt(2)  # along x: 0.5 at lag 1, then 0
    lit = torch.zeros_like(residual, dtype=torch.bool)
    lit[..., 20:40, 20:40] = True
    residuals = Residuals(torch.tensor([0.5]))
    residuals.add(torch.zeros_like(residual), residual * 3, torch.full_like(residual, 9.0), lit)
    for where, tolerance in (("all", 0.02), ("lit", 0.06)):
        found = residuals.correlation()[where]
        assert found["x"] == pytest.approx([0.5, 0, 0, 0, 0], abs=tolerance)
        assert found["y"] == pytest.approx([0] * 5, abs=tolerance)


def test_similarity_over_batches_is_that_of_all_images() -> None:
    torch.manual_seed(0)
    target = torch.rand(6, 1, 16, 16)
    output = target + torch.linspace(0, 0.1, 6)[:, None, None, None]
    sums = Sums()
    for part in (slice(4), slice(4, 6)):
        sums.similarity(output[part], target[part], "a")
    assert sums.similar("a")["psnr"] == pytest.approx(-10 * math.log10(float((output - target).square().mean())))
    assert 0 < sums.similar("a")["ssim"] < 1
    sums.similarity(target, target, "same")
    assert sums.similar("same") == {"psnr": math.inf, "ssim": pytest.approx(1.0)}


def test_codes_are_counted_head_by_head() -> None:
    one = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2)
    other = torch.tensor([0, 1, 2, 3]).reshape(1, 2, 2)
    metrics, counts = code_use(torch.stack([one, other], -1), VQ(4, codebook_size=8, heads=2))
    entropy = math.log(4) - 0.75 * math.log(3)
    assert metrics == {
        "codes": 8, "heads": 2, "codes_used": pytest.approx((2 + 4) / 16), "dead": 10,
        "perplexity": pytest.approx((math.exp(entropy) + 4) / 2),
    }  # fmt: skip
    assert [head.tolist() for head in counts] == [[3, 1], [1, 1, 1, 1]]
    assert code_use(one, VQ(4, codebook_size=8))[0]["perplexity"] == pytest.approx(math.exp(entropy))


def test_of_a_grid_levels_are_counted_channel_by_channel() -> None:
    grid = FiniteScalar(3, levels=(64, 3, 64))
    places = torch.tensor([[0, 1, 63], [63, 1, 62], [0, 2, 63], [0, 1, 0]])
    metrics, counts = code_use(grid.number(places).reshape(1, 2, 2), grid)
    assert metrics["codes"] == 64 * 3 * 64
    assert metrics["levels_used"] == pytest.approx([2 / 64, 2 / 3, 3 / 64])
    assert "dead" not in metrics
    assert [(count[0], count[-1], count.sum()) for count in counts] == [(3, 1, 4), (0, 1, 4), (1, 2, 4)]
    dark = {"real": [1.0, 2.0], "reconstructions": [1.1, 2.0]}
    rows = dict(quality_rows({"truth": None, "observed": {"psnr": 1, "ssim": 1, "clean_error_over_noise": 1}, "codes": metrics,
                              "noise": {"dark": dark}, "cost": dict.fromkeys(("encode_gflop", "decode_gflop", "encoded_per_second",
                                                     "decoded_per_second"), 1.0)}))  # fmt: skip
    assert rows["levels used, by channel"] == "3%, 67%, 5%"
    assert rows["noise of dark pixels over real, by band"] == "1.100, 1.000"
    assert not any("never" in row for row in rows)


def test_each_band_counts_by_its_own_sky_and_noise(tmp_path: Path) -> None:
    """A ring in three bands whose sky and noise differ; an autoencoder that always says the sky of each."""
    levels, deviations = np.array([0.05, 0.4, 0.1])[:, None, None], np.array([0.01, 0.02, 0.06])[:, None, None]
    axis = np.arange(40) - 19.5
    ring = 0.4 * np.exp(-0.5 * ((np.hypot(axis[:, None], axis) - 9) / 2) ** 2)
    images = levels + ring + deviations * np.random.default_rng(0).standard_normal((200, 3, 40, 40))
    writer = CacheWriter(
        tmp_path / "data", 200, (3, 40, 40), {"kind": "test"}, normalise=Normalisation.parse("fixed:0,1")
    )
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop].astype(np.float32).clip(0, 1))
    writer.finish()
    reference = LensImages(tmp_path / "data")
    spec = {"stem": 5, "strides": [], "widths": [8], "decoder_blocks": 1, "quantizer": {"name": "none"}}
    model = VQVAE((3, 40, 40), reference.transform, **spec).eval()
    light = torch.from_numpy(levels + ring).float()
    model._image = lambda raw: (reference.transform(light.expand(len(raw), -1, -1, -1)), None)  # type: ignore[method-assign]
    for law, deviation in zip(model.noise.bands, deviations.flatten(), strict=True):
        law.dark[0] = float(deviation) ** 2
    metrics, _ = evaluate(model, reference, 16, [])
    noise = metrics["noise"]
    assert noise["background"] == pytest.approx(levels.flatten().tolist(), abs=0.01)
    assert noise["dark"]["real"] == pytest.approx(deviations.flatten().tolist(), rel=0.1)
    assert noise["dark"]["reconstructions"] == pytest.approx(noise["dark"]["real"], rel=0.1)
    assert metrics["observed"]["clean_error_over_noise"] == pytest.approx(0, abs=0.05)

    wrong = light + torch.from_numpy(2 * deviations * np.array([1, 0, 0])[:, None, None]).float()
    model._image = lambda raw: (reference.transform(wrong.expand(len(raw), -1, -1, -1)), None)  # type: ignore[method-assign]
    metrics, _ = evaluate(model, reference, 16, [])
    # 2 sigma of the faintest noise: four times its variance in one band of three
    assert metrics["observed"]["clean_error_over_noise"] == pytest.approx(4 / 3, rel=0.1)
