import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.normalise import PixelTransform
from stage1_vqvae.losses import ReconstructionLoss
from stage1_vqvae.noise import NoiseLaw
from stage1_vqvae.vqvae import VQVAE

QUANTIZERS = {
    "vq": {"name": "vq", "codebook_size": 16},
    "vq-projected": {"name": "vq", "codebook_size": 16, "codebook_dim": 2},
    "vq-heads": {"name": "vq", "codebook_size": 16, "heads": 2},
    "simvq": {"name": "simvq", "codebook_size": 16},
    "fsq": {"name": "fsq", "levels": [5, 16, 8, 3]},
    "fsq-projected": {"name": "fsq", "levels": [5, 5]},
    "fsp": {"name": "fsp", "levels": [5, 16, 8, 3]},
    "kl": {"name": "kl"},
    "none": {"name": "none"},
}
every = pytest.mark.parametrize("spec", QUANTIZERS.values(), ids=QUANTIZERS)
# Downsampling of 150 × 150: stem, strides. As the config names them.
GEOMETRIES = {5: (5, ()), 6: (3, (2,)), 8: (4, (2,)), 10: (5, (2,)), 15: (5, (3,))}


def small(shape: tuple[int, int, int] = (1, 30, 30), **options: object) -> VQVAE:
    torch.manual_seed(0)
    options = {"quantizer": {"name": "none"}, "widths": (8, 8), **options}
    model = VQVAE(shape, PixelTransform(0.0, 1.0), encoder_blocks=1, decoder_blocks=1, latent_channels=4, **options)
    model.eval()
    return model


def shaped(shape: tuple[int, int, int], stem: int, strides: tuple[int, ...], **options: object) -> VQVAE:
    return small(shape, stem=stem, strides=strides, widths=(8,) * (len(strides) + 1), **options)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(5, 43), st.integers(5, 43), st.integers(1, 3),
    st.sampled_from([*GEOMETRIES.values(), (1, ()), (1, (2,)), (1, (3, 2)), (2, (3,)), (3, (3,)), (4, (2, 2)), (43, ())]),
)  # fmt: skip
def test_any_size_goes_in_and_comes_out(
    height: int, width: int, channels: int, geometry: tuple[int, tuple[int, ...]]
) -> None:
    stem, strides = geometry
    factor = stem * math.prod(strides)
    model = shaped((channels, height, width), stem, strides)
    images = torch.rand(2, channels, height, width)
    with torch.no_grad():
        model.fit_latents([images])
    latents = model.encode(images)
    assert latents.shape == (2, *model.latent_shape)
    assert model.latent_shape == (4, -(-height // factor), -(-width // factor))
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    decoded.square().mean().backward()
    gradients = [p.grad for p in (*model.encoder.parameters(), *model.decoder.parameters())]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("factor", "grid"), [(5, 30), (6, 25), (8, 19), (10, 15), (15, 10)])
def test_150_pixels_go_to_a_grid_of_their_own(factor: int, grid: int) -> None:
    stem, strides = GEOMETRIES[factor]
    assert factor == stem * math.prod(strides)
    model = shaped((1, 150, 150), stem, strides)
    assert model.latent_shape == (4, grid, grid)
    assert model.padding == ((1, 1, 1, 1) if factor == 8 else (0, 0, 0, 0))
    with torch.no_grad():
        assert model(torch.rand(1, 1, 150, 150))[0].shape == (1, 1, 150, 150)


def test_a_pixel_is_seen_by_its_own_cell_and_by_no_stride_left_out() -> None:
    # Kernels as wide as their stride: each pixel of the fine grid has a weight in exactly one coarse cell.
    for stem, strides in GEOMETRIES.values():
        convolutions = [m for m in shaped((1, 150, 150), stem, strides).encoder if isinstance(m, torch.nn.Conv2d)]
        strided = [m for m in convolutions if m.stride != (1, 1)]
        assert [m.stride for m in strided] == [(s, s) for s in strides]
        assert all(m.kernel_size == m.stride and m.padding == (0, 0) for m in strided)


def test_padding_repeats_the_edge_and_is_cropped_off_where_it_was_put_on() -> None:
    model = shaped((1, 13, 7), 5, ())
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model.decoder = torch.nn.Identity()
    image = torch.rand(1, 1, 13, 7)
    model.features(image)
    assert torch.equal(model._image(seen[0])[0], image)
    assert torch.equal(seen[0][0, 0, 0, 1:8], image[0, 0, 0])
    assert seen[0].shape == (1, 1, 15, 10)


@every
def test_continuous_latents_are_quantised_in_the_decoder(spec: dict) -> None:
    model, images = small(quantizer=spec), torch.rand(6, 1, 30, 30)
    with torch.no_grad():
        model.fit_latents([images])
        raw = model.to_raw(model.transform(images))
        quantized = model.quantizer(model.features(model.transform(images)))[0]
        direct = model.transform.inverse(model.decoder(quantized))
        assert torch.allclose(model.decode(model.encode(images), observed=False), direct, atol=1e-5)
        if spec["name"] not in ("kl", "none"):
            assert not torch.allclose(raw, quantized, atol=1e-3)
        after = small(quantizer=spec, latents="quantized")
        after.load_state_dict(model.state_dict())
        assert torch.allclose(after.to_raw(after.transform(images)), quantized, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "projected" not in name])
def test_quantised_latents_decode_to_what_was_trained(name: str) -> None:
    spec = QUANTIZERS[name]
    model, images = small(quantizer=spec, latents="quantized"), torch.rand(6, 1, 30, 30)
    with torch.no_grad():
        model.encoder[-1].weight.mul_(20)  # to the outermost codes, which a second tanh would move most
        model.fit_latents([images])
        trained = model.transform.inverse(model(model.transform(images))[0])
        assert torch.allclose(model.decode(model.encode(images), observed=False), trained, atol=1e-5)


@every
def test_unquantised_latents_are_decoded_without_the_quantiser(spec: dict) -> None:
    model, images = small(quantizer=spec, latents="unquantized"), torch.rand(6, 1, 30, 30)
    with torch.no_grad():
        model.fit_latents([images])
        scaled = model.transform(images)
        direct = model(scaled, quantize=False)[0]
        assert torch.allclose(model.transform(model.decode(model.encode(images), observed=False)), direct, atol=1e-4)
        continuous = small(quantizer=spec)
        continuous(scaled)  # a codebook starts with the first images it meets
        continuous.load_state_dict(model.state_dict() if spec["name"] != "vq" else continuous.state_dict())
        assert torch.equal(continuous.to_raw(scaled), model.to_raw(scaled))
        if spec["name"] in ("kl", "none"):
            assert torch.equal(continuous.from_raw(model.to_raw(scaled))[0], model.from_raw(model.to_raw(scaled))[0])


@every
def test_encoding_and_decoding_change_no_state(spec: dict) -> None:
    model = small(quantizer=spec)
    model.fit_latents([torch.rand(4, 1, 30, 30)])
    model(torch.rand(4, 1, 30, 30))  # a codebook starts with the first images it meets
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.decode(model.encode(torch.rand(4, 1, 30, 30)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_observed_images_differ_from_clean_ones_by_the_law_and_stay_in_range() -> None:
    model = small((1, 150, 150))
    images = torch.rand(4, 1, 150, 150) * 0.3 + 0.3
    model.fit_latents([images])
    model.noise.dark[0] = 1e-4
    latents = model.encode(images)
    seeds = [torch.Generator().manual_seed(s) for s in range(4)]
    clean, observed = model.decode(latents, observed=False), model.decode(latents, generator=seeds)
    inside = (clean > 0.1) & (clean < 0.9)
    assert float((observed - clean)[inside].var()) == pytest.approx(1e-4, rel=0.05)
    assert observed.min() >= 0
    assert observed.max() <= 1
    again = model.decode(latents, generator=[torch.Generator().manual_seed(s) for s in range(4)])
    assert torch.equal(observed, again)


def test_a_decoder_that_predicts_the_variance_starts_from_the_law_and_is_heard() -> None:
    model, images = small((2, 33, 47), predict_variance=True), torch.rand(3, 2, 33, 47)
    with torch.no_grad():
        model.fit_latents([images])
        out = model(model.transform(images))
        assert out.clean.shape == out.log_ratio.shape == images.shape
        assert not out.log_ratio.any()
        for law in model.noise.laws:
            law.dark[0] = 1e-6
        plain = model.decode(model.encode(images), generator=torch.Generator().manual_seed(0))
        # The last layer gives the pixels of a cell, first those of the image and then those of the variance.
        model.decoder[-2].bias[2 * 25 :] = torch.tensor(9.0).log()
        clean = model.decode(model.encode(images), observed=False)
        louder = model.decode(model.encode(images), generator=torch.Generator().manual_seed(0))
    inside = (clean > 0.05) & (clean < 0.95)
    assert torch.allclose((louder - clean)[inside], 3 * (plain - clean)[inside], atol=2e-6)


@pytest.mark.parametrize("predict_variance", [False, True])
def test_many_latents_are_decoded_as_a_few_are_and_in_the_same_order(predict_variance: bool) -> None:
    model, images = small(predict_variance=predict_variance), torch.rand(37, 1, 30, 30)
    with torch.no_grad():
        model.fit_latents([images])
        for parameter in model.decoder[-2].parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        latents = model.encode(images)
        clean, said = model.decode_clean(latents)
    whole, all_said = model.decode_clean(latents)  # with gradients nothing is taken apart
    assert whole.requires_grad
    assert torch.allclose(clean, whole, atol=1e-6)
    assert (said is None) == (all_said is None) == (not predict_variance)
    if predict_variance:
        assert float(said.std()) > 0
        assert torch.allclose(said, all_said, atol=1e-5)


def test_the_likelihood_teaches_the_variance_and_the_image() -> None:
    model, images = small(predict_variance=True), torch.rand(2, 1, 30, 30)
    law = NoiseLaw()
    law.dark[0] = 1e-3
    weights = {"l1": 0.0, "stretched": 0.0, "mse": 0.0, "chi": 0.0, "likelihood": 1.0}
    out = model(model.transform(images))
    total, terms = ReconstructionLoss(**weights, law=law, transform=model.transform)(
        (out.clean + 1) / 2, images, 0, out.log_ratio
    )
    assert set(terms) == {"likelihood"}
    total.backward()
    image, variance = model.decoder[-2].weight.grad.chunk(2)
    assert bool(image.any())
    assert bool(variance.any())
