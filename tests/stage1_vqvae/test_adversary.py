"""The adversary: neither side's gradient reaches the other, features find the clean image, a blind start is waited for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vqvae.adversary import Adversary, Discriminator, feature_distance


def adversary(start: int = 0, matching: bool = True, channels: int = 1) -> Adversary:
    torch.manual_seed(0)
    return Adversary(channels, width=4, start=start, matching=matching)


def gradients(module: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    for parameter in module.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (31, 24), (150, 150)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_discriminator_judges_patches_of_images_of_any_size(channels: int, size: tuple[int, int]) -> None:
    logits, features = Discriminator(channels, 4)(torch.rand(2, channels, *size))
    half = [n // 2 + 1 for n in size]
    quarter = [n // 2 + 1 for n in half]
    assert [f.shape for f in features] == [(2, 4, *half), (2, 8, *quarter), (2, 16, *quarter)]
    assert logits.shape == (2, 1, *quarter)


def test_its_patches_are_26_pixels_wide() -> None:
    image = torch.rand(1, 1, 96, 96, requires_grad=True)
    logits, _ = Discriminator(1, 4)(image)
    logits[0, 0, 12, 12].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 26


def test_its_layers_have_spectral_norms_of_one() -> None:
    discriminator = Discriminator(1, 4)
    for _ in range(50):  # of power iteration, one a pass
        discriminator(torch.rand(1, 1, 9, 9))
    for layer in (*discriminator.layers, discriminator.head):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1.0, rel=1e-3)


def test_the_decoders_terms_reach_the_decoder_alone_and_the_discriminators_the_discriminator() -> None:
    sides = adversary()
    clean, real = torch.rand(2, 1, 20, 20, requires_grad=True), torch.rand(2, 1, 20, 20)
    draws = [clean + 0.1 * torch.randn_like(clean) for _ in range(2)]
    values = sides(draws, real, step=0)
    (values["adversarial"] + values["feature_matching"]).backward(retain_graph=True)
    assert gradients(sides) == []
    assert clean.grad is not None
    assert float(clean.grad.abs().sum()) > 0
    clean.grad = None
    values["discriminator"].backward()
    assert clean.grad is None
    assert len(gradients(sides)) == len(list(sides.parameters()))


def test_one_backward_gives_the_discriminator_the_gradient_of_its_hinge_loss_alone() -> None:
    one, other = adversary(), adversary()
    clean, real = torch.rand(2, 1, 20, 20), torch.rand(2, 1, 20, 20)
    output = clean.clone().requires_grad_()
    sum(one([output, output + 0.1], real, step=0).values()).backward()  # type: ignore[union-attr]
    logits, _ = other.discriminator(torch.cat([real, clean, clean + 0.1]))
    (F.relu(1 - logits[:2]).mean() + F.relu(1 + logits[2:]).mean()).backward()
    for mine, theirs in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_hinge_losses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = adversary(matching=False)
    monkeypatch.setattr(Discriminator, "forward", lambda self, images: (images.mean((2, 3), keepdim=True), []))
    real, fake = torch.full((2, 1, 3, 3), 0.25), torch.full((2, 1, 3, 3), -2.5)
    values = sides([fake], real, step=0)
    assert {name: float(value) for name, value in values.items()} == {"discriminator": 0.75, "adversarial": 2.5}
    assert float(sides([real], fake, step=0)["discriminator"]) == 3.5 + 1.25


def test_before_its_start_only_the_discriminator_learns() -> None:
    sides, real = adversary(start=3), torch.rand(2, 1, 12, 12)
    output = torch.rand(2, 1, 12, 12, requires_grad=True)
    for step in range(3):
        assert set(sides([output, output], real, step)) == {"discriminator"}
    assert set(sides([output, output], real, 3)) == {"discriminator", "adversarial", "feature_matching"}
    assert set(adversary(matching=False)([output], real, 3)) == {"discriminator", "adversarial"}


def test_a_discriminator_learns_to_tell_observed_from_clean_and_not_what_is_alike() -> None:
    def after(spoil: float) -> float:
        sides = adversary(start=1000)
        optimizer = torch.optim.Adam(sides.parameters(), lr=5e-3, betas=(0.5, 0.9))
        for step in range(80):
            torch.manual_seed(step)
            real, fake = torch.randn(8, 1, 24, 24), spoil * torch.randn(8, 1, 24, 24)
            loss = sides([fake], real, step)["discriminator"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert after(0.0) < 1.0
    assert after(1.0) > 1.8


@pytest.mark.parametrize("feature", [torch.square, lambda x: F.relu(x - 0.3), lambda x: torch.sigmoid(20 * (x - 0.4))])
def test_the_optimum_of_feature_distances_is_the_clean_image_and_with_one_draw_it_is_not(feature) -> None:
    torch.manual_seed(0)
    clean = torch.rand(64, 1, 40, 40)
    observe = lambda light: light + (0.1 + 0.2 * light.detach()) * torch.randn_like(light)  # noqa: E731
    real = feature(observe(clean))

    def slope(same: bool) -> float:
        """Of the distance along brightness, at the clean image, over its curvature: how far off the optimum is."""
        slopes = []
        for brightness in (0.97, 1.0, 1.03):
            torch.manual_seed(1)
            scale = torch.tensor(brightness, requires_grad=True)
            first, second = (feature(observe(scale * clean)) for _ in range(2))
            feature_distance((first, first if same else second), real).backward()
            slopes.append(float(scale.grad))  # type: ignore[arg-type]
        return slopes[1] / ((slopes[2] - slopes[0]) / 0.06)

    assert abs(slope(same=False)) < 0.01
    assert abs(slope(same=True)) > 0.03
