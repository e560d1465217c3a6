"""The whole judgement at toy size: what is planted is said, what compares is compared, and damages are what they are called."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.cli import run
from shared.data.cache import LensImages
from shared.errors import UserError
from shared.evaluation import comparison, damage, judge, page
from shared.evaluation.comparison import short_names
from shared.evaluation.measure import ImageSet, of_data
from shared.evaluation.reference import halves
from shared.evaluation.verdict import LEVEL, _lenses, fewer, stands_out, summary, verdict
from shared.simulate.again import Simulation
from shared.simulate.preset import Preset
from shared.simulate.run import simulate_to
from tests.blobs import blobs


class Means:
    """A network that sees means over 4 x 4 blocks."""

    metric, extractor, resizer = "fd_test", "means", "none"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 4).flatten(1)


def options(**changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    judge.add_options(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **changed})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LensImages:
    return LensImages(blobs(tmp_path_factory.mktemp("data") / "blobs", 600))


def judged(data: LensImages, samples: ImageSet, **changed: Any) -> judge.Evaluation:
    plan = judge.plan(options(**{"skip": ["two-sample"], **changed}), data, [Means()], len(samples))
    return judge.judge(plan, {"samples": samples}, {})


@pytest.mark.slow
def test_what_is_planted_is_said(data: LensImages) -> None:
    n = 40
    real = of_data(data, halves(data, n)[1])
    whole = judged(data, real, skip=[])
    assert {"distances", "distributions", "physics", "spectrum", "noise", "memory", "protocols"} <= set(whole.metrics)
    assert whole.metrics["memory"]["turned"]["copies"] == 0
    assert "lens_fits" not in whole.metrics  # no preset is known
    lines = verdict(whole.metrics)
    assert any(
        "all 12 quantities measured on each image are distributed as in real images" in text for _, text in lines
    )
    assert any("training images among them" in text for _, text in lines)

    broken = judged(data, real.changed("brighter", lambda x, _: 1.5 * x))
    (near, distance), _, (alike, quantities), *_ = verdict(broken.metrics)
    assert not near
    assert "further from real images" in distance
    assert not alike
    assert "flux" in quantities

    train = of_data(data, data.split("train"))
    copies = judged(data, train.subset(np.arange(n)))
    assert copies.metrics["memory"]["as they are"]["copies"] == n
    assert not verdict(copies.metrics)[-1][0]
    shown = page.report(broken, {**broken.metrics, "model": "m", "reference": "r"})
    assert "not so" in "".join(shown.blocks)
    json.dumps(whole.metrics)


def test_too_little_is_refused_before_anything_is_measured(
    data: LensImages, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"was not simulated here: name the preset of its lenses"):
        judge.plan(options(fit=3), data, [Means()], 4)
    with pytest.raises(UserError, match=r"makes images \(1, 150, 150\)"):
        judge.plan(options(fit=3, preset="deeplense"), data, [Means()], 4)
    with pytest.raises(UserError, match="no protocol 'nativ150'"):
        judge.plan(options(protocol=["nativ150"]), data, [Means()], 4)
    assert judge.plan(options(), data, [Means()], 4).fitter is None


def test_samples_that_were_asked_for_real_images_are_not_judged_beside_these(data: LensImages) -> None:
    """What does just as it is told makes twins of images of one half: nearer to them than to any image it has learned."""
    n = 40
    half = of_data(data, halves(data, n)[1])
    twins = half.changed(
        "twins", lambda x, _: x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    plan = judge.plan(options(skip=["two-sample", "distributions"]), data, [Means()], n)
    found = judge.judge(plan, {"samples": twins}, {"x": np.arange(n, dtype=float)}).metrics["memory"]["as they are"]
    assert abs(found["nearer"] - found["nearer_expected"]) < 4 * found["nearer_sd"]
    assert found["copies"] <= 1
    alone = judge.judge(plan, {"samples": twins}, {}).metrics["memory"]["as they are"]
    assert alone["nearer"] < alone["nearer_expected"] - 4 * alone["nearer_sd"]


def test_only_samples_of_the_class_that_is_fitted_are_fitted() -> None:
    preset = Preset.load("deeplense-test1")
    kinds = np.array(["no", "vort", "no", "sphere"])
    assert judge.fittable(preset, {"class": kinds}, 4).tolist() == [0, 2]
    assert judge.fittable(preset, {"class": kinds[[1, 3]]}, 2).tolist() == []
    assert judge.fittable(preset, {}, 4).tolist() == [0, 1, 2, 3]
    assert judge.fittable(Preset.load("deeplense"), {}, 4).tolist() == [0, 1, 2, 3]


def test_where_no_parameters_were_compared_none_are_called_alike() -> None:
    fits = {"n": 15, "share": 1.0, "interval": [0.8, 1.0]}
    _, text = _lenses(fits, {**fits, "n": 20}, {})
    assert "no parameter" not in text
    assert "not compared" in text


# --- damages ----------------------------------------------------------------------------------------------------------


def test_damages_are_what_they_are_called(data: LensImages) -> None:
    n = 8
    sets = damage.damaged(data, n)
    plan = judge.plan(options(), data, [Means()], n)
    images = {name: one.first(n) for name, one in sets.items()}
    real = images["other real images"]
    torch.testing.assert_close(images["the reference itself"], plan.near.first(n))
    for half in (plan.near, plan.far):
        assert not any(torch.equal(x, y) for x in real for y in half.first(n))
    assert "noise removed" not in sets  # these images were not simulated

    diverged = images["10 % diverged"]
    changed = [not torch.equal(x, y) for x, y in zip(real, diverged, strict=True)]
    for k in np.flatnonzero(changed):
        torch.testing.assert_close(diverged[k] - data.value_range[0], 2 * (real[k] - data.value_range[0]))
    torch.testing.assert_close(images["mirrored halves"].flip(-1), images["mirrored halves"])
    torch.testing.assert_close(images["mirrored halves"][..., :15], real[..., :15])
    halves = images["halves of two lenses"]
    torch.testing.assert_close(halves[..., :15], real[..., :15])
    torch.testing.assert_close(halves[..., 15:], real.roll(1, 0)[..., 15:])
    torch.testing.assert_close(images["10 % fainter"] - data.value_range[0], 0.9 * (real - data.value_range[0]))
    train = data.batch(data.split("train"))
    copies = [any(torch.equal(x, y) for y in train) for x in images["a tenth copied from training"]]
    assert 0 < sum(copies) <= 4
    assert float(images["blur 1 px"].mean()) == pytest.approx(float(real.mean()), rel=0.02)
    assert float(images["blur 1 px"].std()) < float(images["blur 0.5 px"].std()) < float(real.std())
    block = images["blocks of 8, 10 %"] - 0.9 * real
    torch.testing.assert_close(block[..., :8, :8], block[..., :1, :1].expand(-1, -1, 8, 8), atol=1e-6, rtol=0)


def test_repeated_images_are_few(data: LensImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "REPEATED", 3)
    repeated = damage.damaged(data, 8)["3 images repeated"].first(8)
    assert len({x.numpy().tobytes() for x in repeated}) == 3


@pytest.mark.slow
def test_damages_to_noise_leave_the_light(tmp_path: Path) -> None:
    preset = Preset.load("deeplense", {"pixels": 30, "pixel_scale": 0.25, "supersampling": 1, "scaling": "none"})
    simulate_to(tmp_path / "data", preset, 120, 0, workers=1, progress=False)
    data = LensImages(tmp_path / "data")
    n = 6
    sets = damage.damaged(data, n)
    base = data.shuffled("test")[2 * n : 3 * n]
    clean = Simulation(data)(base, data.batch(base))[0]
    real = sets["other real images"].first(n)
    torch.testing.assert_close(sets["noise removed"].first(n), clean)
    torch.testing.assert_close(sets["noise doubled"].first(n) - clean, 2 * (real - clean))


def metrics_of(excess: float = 0.0, ratio: float = 1.0, p: float = 0.5, **more: Any) -> dict[str, Any]:
    score = {"distance": 1 + excess, "floor": 1.0, "floor_sd": 0.1, "excess": excess, "n": 50}
    return {
        "n": 50, "reference": "data/x", "reference_fingerprint": "abc", "model": "m",
        "distances": {"fd_test": {"samples": score}},
        "physics": {"samples": {"flux": {"w1": 0.1, "floor": 0.1, "ratio": ratio, "p": p, "p_holm": p}}},
        "spectrum": {"k": [0.1], "samples": {"mean": [1.0], "mean_low": [0.9], "mean_high": [1.1]}},
        **more,
    }  # fmt: skip


def test_a_spectrum_that_differs_is_said_by_how_much() -> None:
    spectrum = {
        "mean": [1.09, 0.93, 1.02, None],
        "mean_low": [0.9, 0.92, 1.01, None],
        "mean_high": [1.1, 0.94, 1.03, None],
    }
    lines = verdict(metrics_of(spectrum={"k": [0.1, 0.2, 0.3, 0.4], "samples": spectrum}))
    assert lines[1][0] is False
    assert "agrees at 33% of its frequencies, at the others it is up to 7% off" in lines[1][1]


def test_the_table_marks_what_is_seen() -> None:
    table = damage.rows({"fine": metrics_of(), "damaged": metrics_of(5.0, 7.0, 1e-9)})
    assert table == [
        ["", "fine", "damaged"],
        ["fd_test, excess", "0.00", "**5.00**"],
        ["power spectrum, share of k as in real", "100%", "100%"],
        ["flux, W1 over real", "1.0", "**7.0**"],
    ]
    assert damage.rows({"x": metrics_of(0.29)})[1][1] == "0.29"
    assert damage.rows({"x": metrics_of(ratio=7.0, p=0.2)})[3][1] == "7.0"  # far, and may be an accident


# --- compare ----------------------------------------------------------------------------------------------------------


def scored(folder: Path, **more: Any) -> str:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({**metrics_of(0.5), **more}))
    return str(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_evaluations_are_compared(home: Path) -> None:
    fits = {"n": 20, "share": 0.5, "interval": [0.3, 0.7], "chi2": 1.1, "chi2_lit": 1.2, "parameters": {}}
    fits |= {"share_lit": 0.25, "interval_lit": [0.1, 0.5]}
    told = {"auc": 0.6, "auc_interval": [0.5, 0.7]}
    full = {"lens_fits": {"real": fits, "samples": fits}, "two_sample": {"samples": told, "real": told}}
    runs = [
        scored(home / "a" / "unet", cost={"gflop": 2.0, "milliseconds": 7.0}, **full),
        scored(home / "b" / "unet", cost={"gflop": 4.0, "milliseconds": None}, **full),
    ]
    run("compare", [*runs, "--out", "tables/two"])
    header, _, first, second = Path("tables/two.md").read_text().splitlines()[:4]
    assert "fd_test, excess (floor 1.00 ± 0.10)" in header
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "a/unet", "0.50 ± 0.10", "–", "–", "0 of 1", "50% of 20 (30% to 70%)", "25%, 1.20", "0.60 (0.50 to 0.70)", "–", "2.00",
        "7.00",
    ]  # fmt: skip
    assert second.rstrip().endswith("| 4.00         | –         |")
    assert Image.open("tables/two.png").width > 400


@pytest.mark.parametrize(
    ("change", "said"),
    [({"reference_fingerprint": "other"}, "another reference"), ({"n": 40}, "another number of images")],
)
def test_what_does_not_compare_is_refused(home: Path, change: dict[str, Any], said: str) -> None:
    runs = [scored(home / "a"), scored(home / "b", **change)]
    with pytest.raises(UserError, match=said):
        comparison.require_comparable([comparison.read(Path(folder)) for folder in runs], runs)


def test_what_has_no_scores_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(call: Callable[[], object]) -> str:
        with pytest.raises(SystemExit):
            call()
        return capsys.readouterr().err

    assert "run `lens-ldm evaluate none" in fails(lambda: run("compare", ["none"]))
    (home / "metrics.json").write_text("{}")
    assert "score it again" in fails(lambda: run("compare", ["metrics.json"]))
    (home / "metrics.json").write_text("{")
    assert fails(lambda: run("compare", ["metrics.json"])).count("\n") == 1


def fits_of(share: float, interval: tuple[float, float]) -> dict[str, Any]:
    lit = {"share_lit": share, "interval_lit": list(interval)}
    return {"n": 100, "share": share, "interval": list(interval), "chi2": 1.0, "chi2_lit": 1.0, "parameters": {}, **lit}


def test_one_lens_less_is_no_fault_and_ten_are() -> None:
    real = fits_of(1.0, (0.963, 1.0))
    assert not fewer(fits_of(0.99, (0.946, 0.998)), real)
    assert fewer(fits_of(0.9, (0.826, 0.945)), real)


def test_lenses_whose_light_is_wrong_under_a_sky_that_is_right_are_said() -> None:
    real, samples = fits_of(1.0, (0.963, 1.0)), fits_of(0.99, (0.946, 0.998))
    fine = verdict(metrics_of(lens_fits={"real": real, "samples": samples}, population={"samples": {}}))[-1]
    assert fine[0]
    samples |= {"share_lit": 0.75, "interval_lit": [0.66, 0.82]}
    broken = verdict(metrics_of(lens_fits={"real": real, "samples": samples}, population={"samples": {}}))[-1]
    assert not broken[0]
    assert "by the pixels they light alone 75%, of real images 100%" in broken[1]


def test_a_floor_of_few_splits_is_no_certainty() -> None:
    rng = np.random.default_rng(0)
    for splits in (5, 10):
        draws = rng.normal(0, 1, (4000, splits + 1))  # a distance, and those of the splits, of one distribution
        floors = draws[:, 1:]
        found = [
            stands_out({"excess": x - f.mean(), "floor_sd": f.std(ddof=1), "splits": splits})
            for x, f in zip(draws[:, 0], floors, strict=True)
        ]
        assert np.mean(found) == pytest.approx(LEVEL, abs=0.006)


def test_a_summary_is_for_reading() -> None:
    text = summary(metrics_of(5.0, None, 0.0))  # type: ignore[arg-type]
    assert "flux inf" in text
    assert text.count("not so") == 2


def test_models_are_called_by_what_tells_their_paths_apart() -> None:
    assert short_names(["a/unet/evaluation-64", "a/dit/evaluation/metrics.json", "b/dit/model"]) == [
        "a/unet",
        "a/dit",
        "b/dit",
    ]
    assert short_names(["runs/unet/evaluation", "runs/dit"]) == ["unet", "dit"]
