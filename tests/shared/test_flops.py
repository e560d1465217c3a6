import pytest
import torch
from torch import Tensor, nn

from shared.autoencoder import Pixels
from shared.data.normalise import PixelTransform
from shared.flops import count, flops
from stage1_vqvae.vqvae import VQVAE


def small(**options: object) -> VQVAE:
    transform = PixelTransform(0.0, 1.0)
    return VQVAE((1, 150, 150), transform, widths=(16, 24), decoder_blocks=1, latent_channels=4, **options)


def convolutions(module: nn.Module, given: Tensor) -> float:
    """GFLOP of the convolutions in a module, by hand: two for each weight and place of the output."""
    found = []

    def add(layer: nn.Conv2d, inputs: object, out: Tensor) -> None:
        found.append(2 * layer.weight.numel() * out.shape[-2] * out.shape[-1] / 1e9)

    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        module(given)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_a_convolution_is_counted_as_by_hand() -> None:
    layer = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    assert count(layer, torch.zeros(4, 3, 32, 20)) == pytest.approx(2 * 4 * (3 * 5 * 5) * 8 * 16 * 10 / 1e9)
    assert count(nn.Linear(7, 5), torch.zeros(11, 7)) == pytest.approx(2 * 11 * 7 * 5 / 1e9)


def test_an_autoencoder_costs_what_its_convolutions_cost() -> None:
    model = small(quantizer={"name": "none"})
    cost = flops(model)
    assert cost["encode"] == pytest.approx(convolutions(model.encoder, torch.zeros(1, 1, 150, 150)))
    assert cost["decode"] == pytest.approx(convolutions(model.decoder, torch.zeros(1, 4, 15, 15)))
    # The first layer alone: 25 pixels to 16 channels, 3 × 3, on 30 × 30.
    assert cost["encode"] > 2 * 25 * 16 * 9 * 900 / 1e9


def test_the_search_for_codes_belongs_to_where_latents_are_quantised() -> None:
    plain, search = flops(small(quantizer={"name": "none"})), 2 * 225 * 4 * 64 / 1e9
    for latents, part in (("continuous", "decode"), ("unquantized", None), ("quantized", "both")):
        cost = flops(small(quantizer={"name": "vq", "codebook_size": 64}, latents=latents))
        assert cost["encode"] - plain["encode"] == pytest.approx(search if part == "both" else 0, abs=1e-12)
        assert cost["decode"] - plain["decode"] == pytest.approx(search if part else 0, abs=1e-12)


def test_counting_changes_nothing() -> None:
    model = small(quantizer={"name": "vq", "codebook_size": 64}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flops(model)
    assert model.training
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in model.state_dict().items())


def test_pixels_cost_nothing() -> None:
    assert flops(Pixels((1, 20, 20), PixelTransform(0.0, 1.0))) == {"encode": 0, "decode": 0}
