"""Conditions: what is asked for becomes a vector and a flag each, and what is not known stays open."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.data.cache import CacheWriter, LensImages
from shared.data.symmetries import ELEMENTS, Turns, apply, apply_to_parameters
from shared.errors import UserError
from shared.simulate.images import render
from shared.simulate.preset import AXES, PLACES, UNITS, Preset, draw_parameters
from stage2_diffusion.conditions import Conditions, Entry
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.schedule import NoiseSchedule

THETA = Entry("theta_E", "arcsec", (0.5, 1.5), (1.0,), (0.25,))
ANGLE = Entry("PA_s", "deg", (0.0, 180.0), (0.0, 0.0), (0.5, 0.5))
CLASS = Entry("class", classes=("sphere", "cdm", "axion"))
ALL = Conditions(entries=(CLASS, THETA, ANGLE), dropout=0.1, subsets=0.5)
PLAIN = Turns(("identity",), [0], [1.0], {})
SPEC = {"class": False, "parameters": [], "dropout": 0.1, "subsets": 0.5}


# --- parameters turn with their images --------------------------------------------------------------------------------


def test_every_angle_and_place_of_the_simulator_is_known_to_turn():
    assert {name for name in UNITS if "angle" in name or name.startswith("PA_")} == set(AXES)
    assert {name for name in UNITS if name[:2] in ("x_", "y_")} == {name for pair in PLACES for name in pair}


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_turned_image_is_the_lens_of_turned_parameters(element):
    changes = {
        "pixels": 32, "pixel_scale": 0.2, "supersampling": 1, "gamma_angle": "uniform(0, 180)", "PA_s": "uniform(0, 180)",
        "q_l": "uniform(0.5, 0.9)", "PA_l": "uniform(0, 180)", "x_v": "uniform(-1, 1)", "y_v": "uniform(-1, 1)",
        "angle_v": "uniform(0, 180)", "half_length_v": 0.5, "mass_v": 1e11, "R_light": 0.4, "q_light": 0.5,
        "turn_light": "uniform(0, 180)", "n_light": 2, "I_light": 1,
    }  # fmt: skip
    preset = Preset.load("deeplense", changes)
    parameters = draw_parameters(preset, 3, range(4))
    images = render(preset, parameters, dtype=torch.float64)
    again = render(preset, apply_to_parameters(parameters, element), dtype=torch.float64)
    torch.testing.assert_close(again, apply(images, element), rtol=1e-6, atol=1e-6)
    if element != "identity":  # and it matters
        assert (apply(images, element) - images).abs().max() > 0.1 * images.max()


def test_half_a_place_is_turned_as_far_as_it_is_known():
    half = {"x_s": np.array([0.3, -0.1]), "theta_E": np.array([1.0, 1.2])}
    assert apply_to_parameters(half, "rot180")["x_s"].tolist() == [-0.3, 0.1]
    assert np.isnan(apply_to_parameters(half, "rot90")["x_s"]).all()
    assert "y_s" not in apply_to_parameters(half, "rot90")
    assert apply_to_parameters(half, "rot90")["theta_E"].tolist() == [1.0, 1.2]


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_values_are_standardised_and_what_is_not_asked_for_is_nan():
    vector = ALL.vector(2, {"theta_E": [1.25, math.nan], "PA_s": 45.0, "class": ["cdm", ""]})
    assert vector is not None
    nan = math.nan
    expected = [[0, 3**0.5, 0, 1.0, 0, 2], [nan, nan, nan, nan, 0, 2]]
    torch.testing.assert_close(vector, torch.tensor(expected), equal_nan=True)
    assert ALL.vector(3).isnan().all()  # type: ignore[union-attr]
    assert Conditions().vector(3) is None
    labels = Conditions(labels=2, entries=(THETA,)).vector(1, {}, 1)
    torch.testing.assert_close(labels, torch.tensor([[0, 2**0.5, nan]]), equal_nan=True)


def test_angles_of_axes_are_the_same_after_half_a_turn():
    def vector(angle):
        return ALL.vector(1, {"PA_s": angle})

    torch.testing.assert_close(vector(10.0), vector(190.0), equal_nan=True)
    torch.testing.assert_close(vector(0.001), vector(179.999), equal_nan=True, atol=1e-3, rtol=0)
    assert (vector(0.0) - vector(90.0)).nan_to_num().abs().max() > 1


def test_conditions_survive_config_json():
    assert Conditions.from_config(ALL.to_config()) == ALL
    assert Conditions.from_config({}) == Conditions()
    assert Conditions(labels=4).to_config() == {"orientation": 4}  # as models from before parameters have it
    assert Conditions.from_config({"orientation": 4}).groups == [4]
    with pytest.raises(UserError, match="damaged conditions"):
        Conditions.from_config({"entries": [{"what": 1}]})


def test_ranges_are_uniform_and_a_function_of_the_seed():
    drawn = ALL.parse("theta_E", "0.8:1.6", range(2000))
    assert drawn[5:7].tolist() == ALL.parse("theta_E", "0.8:1.6", [5, 6]).tolist()
    assert abs(np.sort(drawn) - np.linspace(0.8, 1.6, 2000)).max() < 0.03
    assert abs(np.corrcoef(drawn, ALL.parse("PA_s", "0:180", range(2000)))[0, 1]) < 0.08
    assert ALL.parse("theta_E", "1.2", range(2)).tolist() == [1.2, 1.2]
    assert ALL.parse("class", "cdm", range(2)).tolist() == ["cdm", "cdm"]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: ALL.vector(1, {"theta": 1}), "cannot be asked for 'theta'; did you mean 'theta_E'"),
        (lambda: Conditions().vector(1, {"theta_E": 1}), "trained without conditions"),
        (lambda: ALL.vector(1, {"class": "cdn"}), "no class 'cdn'; did you mean 'cdm'"),
        (lambda: ALL.vector(3, {"theta_E": [1.0, 2.0]}), "3 lenses need one value or 3, these are 2"),
        (lambda: ALL.vector(1, {"theta_E": "big"}), "theta_E must be numbers, not big"),
        (lambda: ALL.parse("theta_E", "2:1", range(2)), "neither a number nor a range LOW:HIGH; in training it was 0.5 to"),
        (lambda: ALL.parse("theta_E", "1:2:3", range(2)), "neither a number nor a range"),
        (lambda: ALL.parse("theta_E", "inf", range(2)), "neither a number nor a range"),
        (lambda: ALL.parse("class", "0:1", range(2)), "no class '0:1'"),
    ],
)  # fmt: skip
def test_a_users_mistakes_are_one_line(ask, message):
    with pytest.raises(UserError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_a_table_is_a_lens_a_row(tmp_path: Path):
    file = tmp_path / "lenses.csv"
    file.write_text("theta_E, class\n1.0, cdm\n, sphere\n1.4,\n")
    table = ALL.read_table(file)
    np.testing.assert_array_equal(table["theta_E"], [1.0, np.nan, 1.4])
    assert table["class"].tolist() == ["cdm", "sphere", ""]
    for text, message in (
        ("theta_E\n", "a line of names"),
        ("", "a line of names"),
        ("theta_E,theta_E\n1,2\n", "each once"),
        ("theta_E,class\n1\n", "line 2"),
        ("theta\n1\n", "did you mean 'theta_E'"),
        ("theta_E\nwide\n", "must be numbers"),
        ("class\nsphere\nround\n", "no class 'round'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            ALL.read_table(file)
    with pytest.raises(UserError, match="cannot be read"):
        ALL.read_table(tmp_path / "none.csv")


def test_far_outside_of_the_training_range_is_worth_a_word():
    assert ALL.warnings({"theta_E": 1.55, "PA_s": 1000.0, "class": "cdm"}) == []
    (line,) = ALL.warnings({"theta_E": np.array([1.0, 1.7])})
    assert line == "warning: theta_E is asked for far outside of what the model has seen, 0.5 to 1.5 arcsec"
    narrow = Conditions(entries=(Entry("PA_s", "deg", (170.0, 190.0), (0.0, 0.0), (1.0, 1.0)),))
    assert narrow.warnings({"PA_s": np.array([0.0, 9.0, 171.0, 351.0])}) == []
    assert len(narrow.warnings({"PA_s": 90.0})) == 1


# --- from a data set --------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> LensImages:
    rng = np.random.default_rng(0)
    writer = CacheWriter(tmp_path / "data", 60, (1, 6, 6), {"kind": "test"})
    for chunk in writer.pending():
        writer.write(chunk, rng.random((len(chunk), 1, 6, 6), np.float32))
    theta = rng.uniform(0.5, 1.5, 60)
    theta[::5] = np.nan
    columns = {"theta_E": ("arcsec", theta), "x_s": ("arcsec", rng.normal(0.3, 0.1, 60)),
               "y_s": ("arcsec", rng.normal(0.0, 0.1, 60)), "PA_s": ("deg", rng.uniform(0, 6, 60))}  # fmt: skip
    writer.finish(
        parameters={name: {"unit": unit, "values": values} for name, (unit, values) in columns.items()},
        classes=["axion", "cdm"], labels=rng.integers(0, 2, 60), about={"constants": {"mass": {"unit": "", "value": 1.0}}},
    )  # fmt: skip
    return LensImages(tmp_path / "data")


def test_a_data_set_gives_ranges_and_standardised_vectors(images: LensImages):
    spec = {**SPEC, "class": True, "parameters": ["theta_E", "PA_s"]}
    train = images.split("train")
    conditions = Conditions.learn(spec, images, train, PLAIN)
    values = conditions.of(images, train)
    vector = conditions.vector(len(train), values)
    assert vector is not None
    labels = np.asarray(images.index["labels"])[train]
    assert values["class"].tolist() == [["axion", "cdm"][label] for label in labels]
    numbers = vector[:, 2:].numpy()
    np.testing.assert_array_equal(np.isnan(numbers[:, 0]), train % 5 == 0)  # unknown there
    np.testing.assert_allclose(np.nanmean(numbers, 0), 0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(numbers, 0), 1, atol=1e-5)
    assert vector[:, :2].square().mean().item() == pytest.approx(1)
    known = values["theta_E"][np.isfinite(values["theta_E"])]
    assert conditions.require("theta_E").limits == (known.min(), known.max())
    assert str(conditions.require("theta_E")).endswith("arcsec")


def test_vectors_are_of_the_turned_lens(images: LensImages):
    turned = Turns(("identity", "flip_lr"), [0, 1], [0.5, 0.5], {})
    conditions = Conditions.learn({**SPEC, "parameters": ["x_s", "PA_s"]}, images, images.split("train"), turned)
    assert conditions.labels == 2
    some = np.arange(5)
    upright, mirrored = conditions.of(images, some), conditions.of(images, some, "flip_lr")
    np.testing.assert_allclose(mirrored["x_s"], -upright["x_s"])
    np.testing.assert_allclose(mirrored["PA_s"], (180 - upright["PA_s"]) % 180)
    a, b = conditions.vector(5, upright, 0), conditions.vector(5, mirrored, 1)
    assert a is not None
    assert b is not None
    torch.testing.assert_close(b[:, 2], -a[:, 2])  # over both halves the mean is 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": ["thetaE"]}, r"knows no 'thetaE'; did you mean 'theta_E'"),
        ({"parameters": ["mass"]}, "mass is the same in all training images"),
    ],
)
def test_what_a_data_set_does_not_tell_cannot_be_learned(images: LensImages, change, message):
    with pytest.raises(UserError, match=message):
        Conditions.learn({**SPEC, **change}, images, images.split("train"), PLAIN)
    del images.index["classes"]
    with pytest.raises(UserError, match="no classes to tell apart"):
        Conditions.learn({**SPEC, "class": True}, images, images.split("train"), PLAIN)


# --- in the denoiser --------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    cond_dim = 9

    def forward(self, x, t, cond):
        self.cond = cond
        return x


def denoiser(**options) -> Denoiser:
    return Denoiser(Recorder(), NoiseSchedule("flow"), "velocity", groups=[2, 3, 1], **options)


def test_each_part_has_its_flag():
    model, nan = denoiser(), math.nan
    cond = torch.tensor([[1.0, 2, 3, 4, 5, 6], [nan, nan, 3, 4, 5, nan], [nan] * 6])
    model(torch.zeros(3, 1, 2, 2), torch.full((3,), 0.5), cond)
    assert model.backbone.cond.tolist() == [
        [1, 2, 3, 4, 5, 6, 1, 1, 1],
        [0, 0, 3, 4, 5, 0, 0, 1, 0],
        [0] * 9,
    ]
    model(torch.zeros(3, 1, 2, 2), torch.full((3,), 0.5))
    assert not model.backbone.cond.any()


def test_dropping_keeps_the_first_and_reaches_every_subset():
    torch.manual_seed(0)
    n, model = 20_000, denoiser(always=1, cond_dropout=0.2, cond_subsets=0.5)
    model.train().loss(torch.zeros(n, 1, 1, 1), torch.ones(n, 6))
    seen = model.backbone.cond
    flags = seen[:, 6:]
    assert torch.equal(seen[:, :6], flags.repeat_interleave(torch.tensor([2, 3, 1]), 1))
    assert flags[:, 0].all()
    shares = {tuple(row): float((flags[:, 1:] == torch.tensor(row)).all(1).float().mean()) for row in
              ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])}  # fmt: skip
    # 0.2 lose all; of the rest half keep all, and half keep each with a chance u: both u² -> 1/3, one u (1 - u) -> 1/6
    expected = {(0, 0): 0.2 + 0.4 / 3, (1, 0): 0.4 / 6, (0, 1): 0.4 / 6, (1, 1): 0.4 + 0.4 / 3}
    assert shares == pytest.approx(expected, abs=0.015)
    model.eval().loss(torch.zeros(n, 1, 1, 1), torch.ones(n, 6))
    assert model.backbone.cond.all()
