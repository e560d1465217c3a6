"""Normalisation: what goes to the network comes back in the data's own units, whatever they are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.autoencoder import Autoencoder, Pixels
from shared.checkpoint import autoencoder_config, build_autoencoder, require_units
from shared.data.cache import LensImages
from shared.data.normalise import Normalisation, PixelTransform, hint, rescale, restore, sky
from shared.data.prepare import prepare
from shared.errors import UserError

HDR = PixelTransform(-40.0, 60000.0, scale=5.0, pivot=100.0)

# Units from janskys to photons, dynamic ranges from 2 to a million.
UNITS = st.floats(-8, 8).map(lambda x: 10.0**x)
DYNAMIC = st.floats(0.3, 6).map(lambda x: 10.0**x)


@st.composite
def transforms(draw: st.DrawFn) -> PixelTransform:
    span, offset = draw(UNITS), draw(st.floats(-2, 2))
    low, high = span * offset, span * (offset + 1)
    assume(high - low > 0.1 * span)
    if draw(st.booleans()):
        return PixelTransform(low, high)
    return PixelTransform(low, high, scale=span / draw(DYNAMIC), pivot=low + draw(st.floats(0, 1)) * span)


# The transform


@settings(max_examples=300, deadline=None)
@given(transforms(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_data_to_network_to_data_is_the_identity_to_rounding(transform, dtype, seed):
    u = torch.rand(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.4 - 0.2  # and beyond
    x = (transform.low + (transform.high - transform.low) * u).to(dtype)
    scaled = transform(x)
    assert scaled.dtype == transform.inverse(scaled).dtype == dtype
    inside = (x >= transform.low) & (x <= transform.high)
    eps = torch.finfo(dtype).eps
    assert (scaled[inside].abs() <= 1 + 8 * eps * transform.span).all()
    error = (transform.inverse(scaled) - x).abs().double()
    # The network's value is held to eps of itself; that is so much of x as the slope of the inverse makes of it.
    slope, beyond = transform.span, 0.0
    if transform.scale is not None:
        nearest = x.double().clamp(transform.low, transform.high)
        beyond = (x - nearest).abs() / transform.scale
        slope = transform.span * ((nearest - transform.pivot).square() + transform.scale**2).sqrt()
    # Numbers of the size of pivot, low and high are taken from one another; beyond the range that tilts the straight line.
    size = abs(transform.pivot) + abs(transform.low) + abs(transform.high)
    assert (error <= 8 * eps * (slope * (1 + scaled.abs().double()) + size * (1 + beyond))).all()
    assert torch.allclose(transform.unit(x), (scaled + 1) / 2, atol=8 * eps, rtol=8 * eps)


@settings(max_examples=100, deadline=None)
@given(transforms())
def test_the_ends_of_the_range_are_those_of_the_network_and_light_is_linear_in_the_data(transform):
    x = torch.linspace(transform.low, transform.high, 31, dtype=torch.float64)
    scaled = transform(x)
    assert scaled[[0, -1]].tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert (scaled.diff() > 0).all()
    light = transform.light((scaled + 1) / 2)
    assert torch.allclose(transform.from_light(light), (scaled + 1) / 2, atol=1e-5)
    step = (light[-1] - light[0]) / 30
    assert torch.allclose(light.diff(), step.expand(30), rtol=1e-4)


def test_linear_and_asinh_are_what_they_are_called():
    x = torch.tensor([-40.0, 100.0, 105.0, 60000.0], dtype=torch.float64)
    linear = PixelTransform(-40.0, 60000.0)
    assert torch.allclose(linear(x), (x + 40) / 60040 * 2 - 1)
    first, last = np.arcsinh((-40 - 100) / 5), np.arcsinh((60000 - 100) / 5)
    expected = (np.arcsinh((x.numpy() - 100) / 5) - first) / (last - first) * 2 - 1
    np.testing.assert_allclose(HDR(x).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(HDR.light(HDR.unit(x)).numpy(), (x.numpy() - 100) / 5, rtol=1e-9)


def test_sixteen_bits_survive_float32_either_way():
    counts = torch.arange(65536, dtype=torch.float32)
    for transform in (PixelTransform(0, 65535), PixelTransform(0, 65535, scale=5.0, pivot=300.0)):
        assert torch.equal(transform.inverse(transform(counts)).round(), counts)


def test_beyond_its_range_asinh_goes_on_straight_both_ways():
    x = torch.tensor([-1e6, -100.0, 60000.0, 60100.0, 1e9], dtype=torch.float64)
    assert torch.allclose(HDR.inverse(HDR(x)), x, rtol=1e-9)
    before, after = HDR.inverse(torch.tensor([0.9999, 1.0, 1.0001], dtype=torch.float64)).diff()
    assert float(after / before) == pytest.approx(1, abs=1e-3)  # no kink
    far = torch.tensor([-50.0, 50.0], requires_grad=True)  # what an untrained decoder may give: e^200 without this
    HDR.inverse(far).sum().backward()
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()
    assert float(HDR.inverse(torch.tensor(3.0))) < 60000 * 20


@pytest.mark.parametrize(
    "wrong", [(1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (0.0, 1.0, 0.0), (0.0, 1.0, -1.0), (0.0, np.nan)]
)
def test_a_transform_that_is_no_map_is_refused(wrong):
    with pytest.raises(ValueError, match="no map"):
        PixelTransform(*wrong)


# What outlives a run


@settings(max_examples=50, deadline=None)
@given(transforms())
def test_a_transform_comes_back_from_json(transform):
    assert PixelTransform.from_config(json.loads(json.dumps(transform.to_config()))) == transform


def test_a_linear_model_is_kept_as_it_always_was_and_others_say_more():
    model = Pixels((1, 2, 2), PixelTransform(0.0, 40.0))
    model.fit_latents([40 * torch.rand(4, 1, 2, 2)])
    config = autoencoder_config(model, {"name": "pixels"})
    assert config == {"spec": {"name": "pixels"}, "image_shape": [1, 2, 2], "value_range": [0.0, 40.0]}
    assert build_autoencoder(config, model.state_dict()).transform == model.transform
    model.transform = HDR
    config = json.loads(json.dumps(autoencoder_config(model, {"name": "pixels"})))
    assert config["transform"] == {"scale": 5.0, "pivot": 100.0}
    assert build_autoencoder(config, model.state_dict()).transform == HDR
    for damage in (
        {"transform": {"scale": "a"}},
        {"transform": {"code": 1}},
        {"value_range": [3]},
        {"value_range": [1, 0]},
    ):
        with pytest.raises(UserError, match="config is damaged"):
            build_autoencoder({**config, **damage}, model.state_dict())


def require(ours: PixelTransform, theirs: PixelTransform) -> None:
    require_units(Autoencoder((1, 2, 2), (1, 2, 2), ours), theirs, "the model of a")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (PixelTransform(0, 1), PixelTransform(0, 255), r"on range \[0, 1\], the data have range \[0, 255\]: .*fixed:0,1$"),
        (PixelTransform(0, 1), PixelTransform(0, 1, per_image=True), r"the data have range \[0, 1\] of each image"),
        (PixelTransform(0, 1, per_image=True), PixelTransform(0, 1), "--normalise minmax$"),
        (PixelTransform(-40, 60000), HDR, r"\(asinh, scale 5 about 100\): .*fixed:-40,60000$"),
        (HDR, PixelTransform(-40, 60000), "--normalise asinh:5$"),
        (HDR, PixelTransform(-4.0, 6000.0, 0.5, 10.0), "scale 0.5 about 10"),  # the same in other units
        (HDR, PixelTransform(-40, 60000, 5.0, 400.0), "about 400"),  # another sky
    ],
)  # fmt: skip
def test_data_of_other_units_are_refused_in_one_line(ours, theirs, said):
    with pytest.raises(UserError, match=said) as caught:
        require(ours, theirs)
    assert "\n" not in str(caught.value)


def test_another_part_of_the_same_survey_is_welcome():
    require(PixelTransform(-3, 100), PixelTransform(-2, 90))
    require(HDR, PixelTransform(-30, 90000, 4.5, 104.0))  # half as bright again: a tenth of an asinh


# The choice


@settings(max_examples=100, deadline=None)
@given(st.one_of(
    st.sampled_from(["none", "minmax", "asinh:auto"]),
    st.floats(1e-9, 1e9).map(lambda x: f"asinh:{x}"),
    st.tuples(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9)).map(lambda x: f"fixed:{x[0]},{x[0] + x[1]}"),
))  # fmt: skip
def test_a_choice_comes_back_from_its_text(text):
    choice = Normalisation.parse(text)
    assert Normalisation.parse(str(choice)) == choice


def test_equal_choices_have_one_text():
    assert {str(Normalisation.parse(t)) for t in ("fixed:0,65535", "fixed:0.0,65535", " fixed:0, 6.5535e4")} == {
        "fixed:0,65535"
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("asihn:3", "there is no such choice"),
        ("", "there is no such choice"),
        ("fixed:3,1", "LOW must be below HIGH"),
        ("fixed", "LOW must be below HIGH"),
        ("fixed:0,inf", "LOW must be below HIGH"),
        ("fixed:0,nan", "LOW must be below HIGH"),
        ("fixed:a,b", "'a,b' is not what it takes"),
        ("asinh", "SCALE must be above 0, or auto"),
        ("asinh:0", "SCALE must be above 0, or auto"),
        ("asinh:inf", "SCALE must be above 0, or auto"),
        ("minmax:0,1", "there is no such choice|is not what it takes"),
    ],
)
def test_a_mistyped_choice_is_one_line(text, said):
    with pytest.raises(UserError, match=said) as caught:
        Normalisation.parse(text)
    assert "choose none, minmax, fixed:LOW,HIGH, asinh:SCALE or asinh:auto" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 0.7, (0, 1)), (0.0, 1.0, (0, 1)), (-0.1, 0.7, (-0.1, 0.7)), (0, 900, (0, 900)), (0, 3e-6, (0, 3e-6))],
)
def test_the_range_is_that_of_the_units_or_the_one_observed(low, high, expected):
    found = Normalisation().transform({"min": low, "max": high})
    assert (found.low, found.high) == expected
    assert Normalisation().transform({"min": low, "max": high}, (-5, 1e3)) == PixelTransform(-5, 1e3)


def test_units_that_cannot_be_learned_are_refused():
    for low, high, said in ((3, 3, "every pixel is 3"), (0, 1e-18, "other units"), (0, 1e20, "other units")):
        with pytest.raises(UserError, match=said):
            Normalisation().transform({"min": low, "max": high})


# The sky


def field(count: int, level: float, noise: float) -> np.ndarray:
    """Sky with a gradient, a bright galaxy and a cosmic ray in each image (count, 1, 60, 60)."""
    rng = np.random.default_rng(0)
    axis = np.arange(60) - 29.5
    galaxy = 3e4 * np.exp(-np.hypot(axis[:, None], axis) / 0.7)
    images = level + 0.1 * axis + galaxy + noise * rng.standard_normal((count, 1, 60, 60))
    images[:, :, 1, 20:24] += 1e4
    return images.astype(np.float32)


def test_the_noise_and_level_of_the_sky_are_found_beside_bright_things():
    level, noise = sky(field(40, 300.0, 7.0))
    assert level.shape == noise.shape == (40,)
    assert np.median(level) == pytest.approx(300, abs=1)
    assert np.median(noise) == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize("shape", [(3, 2, 4, 30), (3, 1, 30, 4), (3, 1, 5, 5)])
def test_the_sky_of_narrow_images(shape):
    images = np.random.default_rng(0).standard_normal((400, *shape[1:])).astype(np.float32)
    assert np.median(sky(images)[1]) == pytest.approx(1, rel=0.15)


def test_images_too_small_for_an_estimate_have_none():
    assert np.isnan(sky(np.zeros((2, 1, 4, 4)))[1]).all()


# minmax


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["uint8", "int16", "uint16", "float16", "float32"]), UNITS, st.integers(0, 999))
def test_minmax_gives_the_originals_back(dtype, unit, seed):
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        originals = (rng.normal(0, 1, (5, 1, 6, 7)) * (1.0 if dtype == "float16" else unit)).astype(dtype)
    else:
        originals = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (5, 1, 6, 7), dtype, endpoint=True)
    scaled, limits = rescale(originals)
    assert scaled.dtype == np.float32
    assert (scaled.reshape(5, -1).min(1) == 0).all()
    assert (scaled.reshape(5, -1).max(1) == 1).all()
    back = restore(scaled, *limits.T)
    if dtype.startswith("float"):
        span = (limits[:, 1] - limits[:, 0])[:, None, None, None]
        assert (np.abs(back - originals.astype(np.float64)) <= 1.2e-7 * (span + np.abs(originals))).all()
    else:
        np.testing.assert_array_equal(np.rint(back), originals)


# `lens-ldm prepare --normalise`


def save(path: Path, images: np.ndarray) -> Path:
    np.save(path, images)
    return path


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["none", "minmax", "fixed", "asinh:auto", "asinh:30"]),
    st.sampled_from(["uint8", "<u2", ">i2", ">i4", "float16", "float32", ">f8"]),
)
def test_any_file_through_cache_and_network_and_back(tmp_path_factory, how, dtype):
    tmp_path = tmp_path_factory.mktemp("prepare")
    wide = np.random.default_rng(1).gamma(0.6, 25, (30, 8, 9)) + np.random.default_rng(0).normal(30, 3, (30, 8, 9))
    images = wide.clip(0, 250).astype(dtype)
    cache = prepare(
        save(tmp_path / "a.npy", images), tmp_path / "a", normalise="fixed:0,250" if how == "fixed" else how
    )
    originals = images.astype(np.float32)[:, None]
    batch = cache.batch(range(30))
    assert cache.index["normalisation"] == ("fixed:0,250" if how == "fixed" else how)
    assert float(cache.transform(batch).abs().max()) <= 1 + 1e-6
    back = cache.transform.inverse(cache.transform(batch))
    assert torch.allclose(back, batch, atol=1e-3, rtol=1e-6)
    if how == "minmax":
        assert float(batch.max()) == 1
        np.testing.assert_allclose(cache.originals(range(30)), originals, atol=5e-5)
        assert cache.originals([3, 1]).tolist() == cache.originals(range(30))[[3, 1]].tolist()
    else:
        np.testing.assert_array_equal(cache.images, originals)
        np.testing.assert_array_equal(cache.originals([2, 7]), originals[[2, 7]])
    if how.startswith("asinh"):
        assert cache.transform.scale == (30 if how == "asinh:30" else cache.index["statistics"]["noise"])
        assert cache.transform.pivot == cache.index["statistics"]["background"]


def test_minmax_keeps_each_images_low_and_high(tmp_path):
    images = np.random.default_rng(0).normal(0, 50, (7, 4, 6)).astype(np.float32)
    cache = prepare(save(tmp_path / "a.npy", images), tmp_path / "a", normalise="minmax")
    assert cache.value_range == (0, 1)
    for name, values in (("low", images.min((1, 2))), ("high", images.max((1, 2)))):
        assert cache.index["parameters"][name]["values"] == values.tolist()
    assert str(cache.transform) == "range [0, 1] of each image (minmax)"


def test_images_that_a_choice_cannot_take_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 90, (5, 4, 6)).astype(np.int32)
    images[2] = 7
    images[4, 0, 0] = -1
    source = save(tmp_path / "a.npy", images)
    with pytest.raises(UserError, match=r"1 of 5 images .*\n  a\.npy\[2\]: is constant, 7 in every pixel"):
        prepare(source, tmp_path / "out", normalise="minmax")
    with pytest.raises(
        UserError,
        match=r"2 of 5 images .*\n  a\.npy\[2\]: is constant.*\n  a\.npy\[4\]: has values in \[-1, 80\], beyond fixed:0,90",
    ):
        prepare(source, tmp_path / "out", normalise="fixed:0,90")
    with pytest.raises(UserError, match="no such choice"):
        prepare(source, tmp_path / "out", normalise="max")
    assert not (tmp_path / "out").exists()


def test_asinh_of_noiseless_images_asks_for_its_scale(tmp_path):
    images = np.zeros((5, 9, 9), np.float32)
    images[:, 4, 4] = 500
    source = save(tmp_path / "a.npy", images)
    with pytest.raises(
        UserError, match=r"not written: asinh: the noise of the sky, 0, .*--normalise asinh:SCALE"
    ) as caught:
        prepare(source, tmp_path / "out", normalise="asinh:auto")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert prepare(source, tmp_path / "out", normalise="asinh:2").transform == PixelTransform(0, 500, 2.0, 0.0)


def test_another_choice_is_another_data_set(tmp_path):
    source = save(tmp_path / "a.npy", field(9, 300, 7)[:, 0])
    first = prepare(source, tmp_path / "none")
    with pytest.raises(UserError, match=r"normalisation is 'none' there, 'asinh:auto' here.*choose another --out"):
        prepare(source, tmp_path / "none", normalise="asinh:auto")
    others = [
        prepare(source, tmp_path / str(k), normalise=how)
        for k, how in enumerate(("asinh:auto", "asinh:9", "fixed:0,65535"))
    ]
    assert len({cache.fingerprint for cache in (first, *others)}) == 4  # no run goes on with another
    assert all(cache.index["hashes"] == first.index["hashes"] for cache in others)
    assert prepare(source, tmp_path / "0", normalise="asinh:auto").transform == others[0].transform


def test_a_cache_of_old_says_nothing_and_is_linear(tmp_path):
    source = save(tmp_path / "a.npy", np.random.default_rng(0).random((5, 4, 6)))
    before = prepare(source, tmp_path / "a")
    index = json.loads((tmp_path / "a/index.json").read_text())
    assert "transform" not in index
    del index["normalisation"], index["statistics"]["p99"]
    (tmp_path / "a/index.json").write_text(json.dumps(index))
    after = prepare(source, tmp_path / "a")  # and it is still this request's
    assert (after.transform, after.fingerprint) == (before.transform, before.fingerprint)
    assert hint(after.transform, after.index["statistics"]) is None
    (tmp_path / "a/index.json").write_text(json.dumps({**index, "transform": {"scale": [1]}}))
    with pytest.raises(UserError, match=r"index\.json has a damaged range or transform"):
        LensImages(tmp_path / "a")


def test_data_that_are_black_on_a_linear_scale_get_a_hint(tmp_path, capsys):
    source = save(tmp_path / "a.npy", field(20, 300, 7)[:, 0])
    prepare(source, tmp_path / "linear")
    assert "grey levels of range" in capsys.readouterr().err
    prepare(source, tmp_path / "asinh", normalise="asinh:auto")
    printed = capsys.readouterr()
    assert "asinh" not in printed.err
    assert re.search(r"range .* \(asinh, scale (6\.|7)[\d.]* about 300", printed.out)
    np.save(source, np.random.default_rng(0).random((5, 4, 6)))
    prepare(source, tmp_path / "bright")
    assert "asinh" not in capsys.readouterr().err
