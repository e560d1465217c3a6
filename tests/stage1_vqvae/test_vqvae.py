import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.normalise import PixelTransform
from stage1_vqvae.quantizers import VQ, CodeUsage, FiniteScalar, NoQuantizer
from stage1_vqvae.vqvae import VQVAE

QUANTIZERS = ({"name": "vq", "codebook_size": 16}, {"name": "fsq", "levels": [5, 5]}, {"name": "none"})


def small(shape: tuple[int, int, int] = (1, 30, 30), **options: object) -> VQVAE:
    torch.manual_seed(0)
    options = {"quantizer": {"name": "none"}, **options}
    model = VQVAE(
        shape, PixelTransform(0.0, 1.0), widths=(8, 8), encoder_blocks=1, decoder_blocks=1, latent_channels=4, **options
    )
    model.eval()
    return model


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 43), st.integers(5, 43), st.integers(1, 3))
def test_any_size_goes_in_and_comes_out(height: int, width: int, channels: int) -> None:
    model = small((channels, height, width))
    images = torch.rand(2, channels, height, width)
    model.fit_latents([images])
    latents = model.encode(images)
    assert latents.shape == (2, *model.latent_shape)
    assert model.latent_shape == (4, -(-height // 10), -(-width // 10))
    assert model.decode(latents).shape == images.shape


def test_150_pixels_need_no_padding() -> None:
    model = small((1, 150, 150))
    assert model.latent_shape == (4, 15, 15)
    assert not any(model.padding)


@pytest.mark.parametrize("spec", QUANTIZERS, ids=lambda s: s["name"])
def test_continuous_latents_are_quantised_in_the_decoder(spec: dict) -> None:
    model, images = small(quantizer=spec), torch.rand(6, 1, 30, 30)
    with torch.no_grad():
        model.fit_latents([images])
        raw = model.to_raw(model.transform(images))
        quantized = model.quantizer(raw)[0]
        direct = model.transform.inverse(model.decoder(quantized))
        assert torch.allclose(model.decode(model.encode(images), observed=False), direct, atol=1e-5)
        if spec["name"] != "none":
            assert not torch.allclose(raw, quantized, atol=1e-3)
        after = small(quantizer=spec, latents="quantized")
        after.load_state_dict(model.state_dict())
        assert torch.allclose(after.to_raw(after.transform(images)), quantized, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [{"name": "vq", "codebook_size": 16}, {"name": "fsq", "levels": [5, 16, 8, 3]}, {"name": "none"}],
    ids=lambda s: s["name"],
)  # fmt: skip
def test_quantised_latents_decode_to_what_was_trained(spec: dict) -> None:
    model, images = small(quantizer=spec, latents="quantized"), torch.rand(6, 1, 30, 30)
    with torch.no_grad():
        model.encoder[-1].weight.mul_(20)  # to the outermost codes, which a second tanh would move most
        model.fit_latents([images])
        trained = model.transform.inverse(model(model.transform(images))[0])
        assert torch.allclose(model.decode(model.encode(images), observed=False), trained, atol=1e-5)


def test_values_off_the_grid_snap_to_the_nearest_level() -> None:
    quantizer = FiniteScalar(2, levels=(4, 5))
    values = torch.tensor([[-9.0, -0.6, 0.2, 0.49], [-9.0, 0.3, 0.8, 9.0]]).reshape(1, 2, 1, 4)
    expected = torch.tensor([[-1.0, -0.5, 0.0, 0.5], [-1.0, 0.5, 1.0, 1.0]]).reshape(1, 2, 1, 4)
    assert torch.equal(quantizer.snap(values), expected)


@pytest.mark.parametrize("spec", QUANTIZERS, ids=lambda s: s["name"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [VQ(4, codebook_size=32), FiniteScalar(4, levels=(5, 5)), NoQuantizer(4)])
def test_quantisers_work_in_float32_under_autocast(quantizer: torch.nn.Module, dtype: torch.dtype) -> None:
    quantizer.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        quantized, indices, loss = quantizer(torch.randn(3, 4, 5, 6).to(dtype))
    assert quantized.dtype == torch.float32
    assert quantized.shape == (3, 4, 5, 6)
    assert indices.shape == (3, 5, 6)
    assert indices.dtype == torch.int64
    assert loss.shape == ()
    assert quantizer.codes == 0 or int(indices.max()) < quantizer.codes


def test_vq_gives_the_nearest_code() -> None:
    quantizer = VQ(3, codebook_size=8, kmeans_init=False)
    quantizer.eval()
    raw = torch.randn(2, 3, 4, 4)
    quantized, indices, _ = quantizer(raw)
    codes = quantizer.vq.codebook
    flat = raw.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(flat, codes).argmin(1)
    assert torch.equal(indices.flatten(), nearest)
    assert torch.allclose(quantized.permute(0, 2, 3, 1).reshape(-1, 3), codes[nearest], atol=1e-5)


def test_code_usage_counts_over_all_batches() -> None:
    usage = CodeUsage(8)
    usage.update(torch.tensor([[0, 1], [2, 3]]))
    usage.update(torch.tensor([0, 1, 2, 3]))
    assert usage.compute() == {"codes_used": 0.5, "perplexity": pytest.approx(4.0)}
