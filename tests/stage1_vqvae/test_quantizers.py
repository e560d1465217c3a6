"""What every quantiser of the registry keeps to, then what each promises alone, then how its codes are watched."""

import math

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import FSP, FSQ

from shared.errors import UserError
from shared.registry import build, names
from stage1_vqvae.quantizers import CodeUsage, Quantizer

CHANNELS = 4
SPECS = {
    "vq": {"name": "vq", "codebook_size": 16},
    "vq-projected": {"name": "vq", "codebook_size": 16, "codebook_dim": 2},
    "vq-heads": {"name": "vq", "codebook_size": 8, "heads": 2},
    "vq-heads-projected": {"name": "vq", "codebook_size": 8, "heads": 2, "codebook_dim": 3},
    "vq-straight": {"name": "vq", "codebook_size": 16, "kmeans_init": False, "rotation_trick": False},
    "simvq": {"name": "simvq", "codebook_size": 16},
    "fsq": {"name": "fsq", "levels": [5, 16, 8, 3]},
    "fsq-projected": {"name": "fsq", "levels": [5, 6]},
    "fsp": {"name": "fsp", "levels": [5, 16, 8, 3]},
    "fsp-projected": {"name": "fsp", "levels": [5, 6]},
    "kl": {"name": "kl"},
    "none": {"name": "none"},
}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
CODED = {name: spec for name, spec in SPECS.items() if spec["name"] not in ("kl", "none")}
coded = pytest.mark.parametrize("spec", CODED.values(), ids=CODED)
# A code is a latent: no linear map lies between the two.
DIRECT = {name: spec for name, spec in SPECS.items() if "projected" not in name}


def features(quantizer: Quantizer, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, quantizer.inputs, 5, 6, generator=generator)


def born(spec: dict, seed: int = 0) -> Quantizer:
    """A quantiser in eval mode whose codes have met features."""
    torch.manual_seed(seed)
    quantizer = build("quantizer", spec, channels=CHANNELS)
    quantizer(features(quantizer, seed))
    return quantizer.eval()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_every_quantizer_of_the_registry_is_tried() -> None:
    assert {spec["name"] for spec in SPECS.values()} == set(names("quantizer"))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_float32_under_autocast(spec: dict, dtype: torch.dtype) -> None:
    quantizer = born(spec)
    given = features(quantizer, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        quantized, indices, loss = quantizer(given.to(dtype))
        raw = quantizer.latent(given.to(dtype))
        codes = [quantizer.decodable(raw), quantizer.lookup(indices)] if quantizer.codes else []
        relaxed = quantizer.relaxed(raw)
    assert all(latents.shape == (3, CHANNELS, 5, 6) for latents in (raw, quantized, relaxed, *codes))
    assert all(latents.dtype == torch.float32 for latents in (quantized, loss, *codes))
    assert indices.shape == ((3, 5, 6) if quantizer.heads == 1 else (3, 5, 6, quantizer.heads))
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert int(indices.max()) < max(1, quantizer.codes)
    assert loss.shape == ()
    assert quantizer.inputs == CHANNELS * (2 if spec["name"] == "kl" else 1)


@every
def test_bfloat16_features_meet_the_same_codes_as_their_float32_copies(spec: dict) -> None:
    quantizer = born(spec)
    given = features(quantizer, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices, _ = quantizer(given)
    expected, places, _ = quantizer(given.float())
    assert torch.equal(indices, places)
    assert torch.equal(quantized, expected)


@every
def test_in_eval_mode_nothing_is_drawn_and_nothing_changes(spec: dict) -> None:
    quantizer = born(spec)
    before, given = state(quantizer), features(quantizer, 1)
    first, second = quantizer(given), quantizer(given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    raw = quantizer.latent(given)
    assert torch.equal(quantizer.decodable(raw), first[0])
    quantizer.relaxed(raw)
    if spec in DIRECT.values():
        quantizer.snap(first[0])
    assert same(before, state(quantizer))


@coded
def test_indices_are_enough_to_decode(spec: dict) -> None:
    quantizer = born(spec)
    quantized, indices, _ = quantizer(features(quantizer, 1, scale=2.0))
    assert torch.allclose(quantizer.lookup(indices), quantized, atol=1e-6)
    assert len(indices.unique()) > 3


@pytest.mark.parametrize("name", ["kl", "none"])
def test_without_codes_there_is_nothing_to_look_up(name: str) -> None:
    quantizer = born(SPECS[name])
    with pytest.raises(UserError, match="no codes"):
        quantizer.lookup(quantizer(features(quantizer))[1])


@pytest.mark.parametrize("spec", DIRECT.values(), ids=DIRECT)
def test_snap_leaves_codes_as_they_are_and_catches_what_is_near_them(spec: dict) -> None:
    quantizer = born(spec)
    codes = quantizer(features(quantizer, 1, scale=3.0))[0]  # 3: out to the last levels, which tanh would push inwards
    assert torch.allclose(quantizer.snap(codes), codes, atol=1e-6)
    if quantizer.codes:
        near = codes + 1e-3 * torch.randn_like(codes)
        assert torch.allclose(quantizer.snap(near), codes, atol=1e-6)


@every
def test_the_gradient_reaches_the_encoder(spec: dict) -> None:
    quantizer = born(spec).train()
    given = features(quantizer, 1).requires_grad_()
    quantized, _, loss = quantizer(given)
    ((quantized * torch.randn_like(quantized)).sum() + loss).backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())
    assert float((given.grad != 0).double().mean()) > 0.9


@every
def test_a_state_dict_is_the_whole_state(spec: dict) -> None:
    quantizer, other = born(spec, seed=0), build("quantizer", spec, channels=CHANNELS).eval()
    other.load_state_dict(quantizer.state_dict(), strict=True)
    for scale in (0.5, 3.0):
        given = features(quantizer, 1, scale)
        assert all(torch.equal(a, b) for a, b in zip(quantizer(given), other(given), strict=True))


@every
def test_codes_do_not_learn_from_latents_that_are_only_decoded(spec: dict) -> None:
    quantizer = born(spec).train()
    before, raw = state(quantizer), quantizer.latent(features(quantizer, 1, scale=5.0))
    quantizer.decodable(raw)
    quantizer.relaxed(raw)
    assert same(before, state(quantizer))
    if spec["name"] == "vq":
        quantizer(raw)
        assert not same(before, state(quantizer))  # as they do in training


@pytest.mark.parametrize("name", ["fsq", "fsp"])
def test_relaxed_latents_differ_from_codes_by_half_a_level_at_most(name: str) -> None:
    quantizer = born(SPECS[name])
    raw = features(quantizer, 1, scale=2.0)
    sizes = torch.tensor(quantizer.levels)[:, None, None]
    spacing = 1 / (sizes // 2) if name == "fsq" else math.sqrt(12) / sizes
    error = (quantizer.relaxed(raw) - quantizer.decodable(raw)).abs() / spacing
    assert 0.45 < float(error.max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("name", ["vq-projected", "vq-heads-projected"])
def test_relaxed_latents_are_codes_where_there_is_one_for_each(name: str) -> None:
    quantizer = build("quantizer", {**SPECS[name], "codebook_size": 90, "kmeans_init": False}, channels=CHANNELS).eval()
    raw = features(quantizer)
    with torch.no_grad():
        inside = quantizer.vq.project_in(raw.movedim(1, -1).flatten(0, 2))
        quantizer.vq._codebook.embed.copy_(inside.view(90, quantizer.heads, -1).movedim(1, 0))
    assert not torch.allclose(quantizer.relaxed(raw), raw, atol=1e-2)
    assert torch.allclose(quantizer.relaxed(raw), quantizer.decodable(raw), atol=1e-5)


# --- each alone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vq", "vq-heads"])
def test_each_head_gives_the_nearest_of_its_codes(name: str) -> None:
    quantizer = born(SPECS[name])
    raw = features(quantizer, 1)
    quantized, indices, _ = quantizer(raw)
    books = quantizer.vq.codebook.reshape(quantizer.heads, quantizer.codes, -1)
    parts = raw.movedim(1, -1).flatten(0, 2).chunk(quantizer.heads, dim=1)
    nearest = torch.stack([torch.cdist(part, book).argmin(1) for part, book in zip(parts, books, strict=True)], dim=-1)
    assert torch.equal(indices.reshape(-1, quantizer.heads), nearest)
    codes = torch.cat([book[k] for book, k in zip(books, nearest.unbind(-1), strict=True)], dim=1)
    assert torch.allclose(quantized.movedim(1, -1).flatten(0, 2), codes, atol=1e-6)


def test_heads_that_share_the_channels_need_no_projection() -> None:
    assert not born({"name": "vq", "heads": 2, "codebook_size": 8}).vq.has_projections
    assert born({"name": "vq", "heads": 2, "codebook_size": 8, "codebook_dim": 3}).vq.has_projections


def test_k_means_of_several_heads_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"kmeans_init false"):
        build("quantizer", SPECS["vq-heads"], channels=CHANNELS)
    build("quantizer", {**SPECS["vq-heads"], "kmeans_init": False}, channels=CHANNELS)
    build("quantizer", SPECS["vq"], channels=CHANNELS)


def test_codes_of_simvq_move_together_and_only_by_the_map() -> None:
    quantizer = born(SPECS["simvq"]).train()
    assert [name for name, _ in quantizer.named_parameters()] == ["simvq.code_transform.weight"]
    quantizer(features(quantizer))[2].backward()
    before = quantizer.simvq.codebook.detach()
    with torch.no_grad():
        quantizer.simvq.code_transform.weight.sub_(0.1 * quantizer.simvq.code_transform.weight.grad)
    assert bool((quantizer.simvq.codebook.detach() - before).norm(dim=1).gt(0).all())


@pytest.mark.parametrize("levels", [[5, 16, 8, 3], [7], [4, 4, 4, 4, 4, 4]])
def test_a_grid_counts_as_the_library_does(levels: list[int]) -> None:
    raw = 2 * torch.randn(3, len(levels), 5, 6)
    fsq = build("quantizer", {"name": "fsq", "levels": levels}, channels=len(levels)).eval()
    codes, indices = FSQ(levels)(raw)
    assert torch.equal(fsq(raw)[1], indices)
    assert torch.allclose(fsq(raw)[0], codes, atol=1e-6)
    fsp = build("quantizer", {"name": "fsp", "levels": levels}, channels=len(levels)).eval()
    library = FSP(levels, channel_first=True, act_name="normal", vector_norm="var").eval()
    codes, indices, *_ = library(raw)
    assert torch.equal(fsp(raw)[1], indices.long())
    assert torch.allclose(fsp.lookup(indices.long()), library.indices_to_codes(indices), atol=1e-6)


@pytest.mark.parametrize("name", ["fsq", "fsp"])
def test_more_codes_than_32_bits_count_are_told_apart(name: str) -> None:
    quantizer = build("quantizer", {"name": name, "levels": [16] * 10}, channels=10).eval()
    assert quantizer.codes == 2**40
    quantized, indices, _ = quantizer(3 * torch.randn(2, 10, 8, 8))
    assert indices.max() > 2**32
    assert torch.allclose(quantizer.lookup(indices), quantized, atol=1e-6)


def test_values_off_the_grid_snap_to_the_nearest_level() -> None:
    quantizer = build("quantizer", {"name": "fsq", "levels": [4, 5]}, channels=2)
    values = torch.tensor([[-9.0, -0.6, 0.2, 0.49], [-9.0, 0.3, 0.8, 9.0]]).reshape(1, 2, 1, 4)
    expected = torch.tensor([[-1.0, -0.5, 0.0, 0.5], [-1.0, 0.5, 1.0, 1.0]]).reshape(1, 2, 1, 4)
    assert torch.equal(quantizer.snap(values), expected)
    quantizer = build("quantizer", {"name": "fsp", "levels": [4, 5]}, channels=2)
    bins = torch.tensor([[0, 0, 2, 3], [0, 2, 3, 4]]).reshape(1, 2, 1, 4)
    sizes = torch.tensor([4, 5])[:, None, None]
    middle = ((bins + 0.5) / sizes - 0.5) * math.sqrt(12)
    shift = torch.tensor([-9.0, 0.2, -0.2, 9.0])
    assert torch.allclose(quantizer.snap(middle + shift * torch.tensor([[1.0], [1.0]])[:, :, None]), middle)


def test_fsp_shifts_what_it_does_not_round_by_noise_as_wide_as_a_bin() -> None:
    quantizer = build("quantizer", {"name": "fsp", "levels": [8, 8, 8, 8], "quantize_rate": 0.0}, channels=4).train()
    raw = torch.zeros(8, 4, 32, 32)  # the middle of the range: no noise leaves it
    noise = quantizer(raw)[0] / math.sqrt(12)
    assert float(noise.abs().max()) <= 1 / 16
    assert float(noise.std()) == pytest.approx(1 / 8 / math.sqrt(12), rel=0.02)
    quantizer = build("quantizer", {"name": "fsp", "levels": [8, 8, 8, 8], "quantize_rate": 0.3}, channels=4).train()
    rounded = torch.isclose(quantizer(raw)[0], torch.tensor(0.5 / 8 * math.sqrt(12)))
    assert float(rounded.double().mean()) == pytest.approx(0.3, abs=0.02)


def test_fsp_draws_latents_towards_a_unit_normal() -> None:
    quantizer = build("quantizer", SPECS["fsp"], channels=4).train()
    normal, wide = torch.randn(64, 4, 16, 16), 3 * torch.randn(64, 4, 16, 16)
    assert float(quantizer(normal)[2]) < 1e-3
    assert float(quantizer(wide)[2]) == pytest.approx(0.07 * (9 - 1) ** 2, rel=0.05)
    shifted = quantizer(0.5 + normal)
    assert float(shifted[2]) == pytest.approx(0.1 * 0.5**2, rel=0.05)
    constant = torch.zeros(2, 4, 3, 3, requires_grad=True)
    quantizer(constant)[2].backward()
    assert constant.grad is not None
    assert bool(constant.grad.isfinite().all())
    codes = quantizer.eval()(normal)[0]
    assert torch.allclose(codes.std((0, 2, 3)), torch.ones(4), atol=0.1)  # of few levels a little below


def test_kl_is_the_divergence_of_its_gaussians_and_samples_them_in_training() -> None:
    quantizer = build("quantizer", {"name": "kl", "weight": 0.5}, channels=2)
    mean = torch.tensor([2.0, -1.0])[None, :, None, None].expand(4, 2, 64, 64)
    variance = torch.tensor([0.25, 4.0])[None, :, None, None].expand(4, 2, 64, 64)
    given = torch.cat([mean, variance.log()], dim=1)
    sample, indices, loss = quantizer.train()(given)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
    )
    assert float(loss) == pytest.approx(0.5 * float(exact.mean()), rel=1e-5)
    assert torch.allclose(sample.mean((0, 2, 3)), torch.tensor([2.0, -1.0]), atol=0.05)
    assert torch.allclose(sample.var((0, 2, 3)), torch.tensor([0.25, 4.0]), rtol=0.05)
    assert int(indices.abs().max()) == 0
    assert torch.equal(quantizer.eval()(given)[0], mean)
    assert torch.equal(quantizer.latent(given), mean)
    extreme = torch.full((1, 4, 2, 2), 1e4)
    assert all(bool(x.isfinite().all()) for x in quantizer.train()(extreme))


# --- how codes are watched --------------------------------------------------------------------------------------------


def usage(indices: Tensor, codes: int, heads: int = 1, levels: tuple[int, ...] = ()) -> CodeUsage:
    counted = CodeUsage(codes, heads, levels)
    for part in indices.split(2):
        counted.update(part)
    return counted


def test_usage_counts_over_all_batches() -> None:
    counted = CodeUsage(8)
    counted.update(torch.tensor([[0, 1], [2, 3]]))
    counted.update(torch.tensor([0, 1, 2, 3]))
    assert counted.compute() == {"codes_used": 0.5, "perplexity": pytest.approx(4.0), "dead_codes": 4}


def test_usage_of_heads_tells_the_worst() -> None:
    indices = torch.stack([torch.arange(8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])], dim=-1)  # one a cell
    assert usage(indices.view(4, 2, 1, 2), codes=8, heads=2).compute() == {
        "codes_used": (1 + 0.25) / 2, "perplexity": pytest.approx((8 + 2) / 2), "dead_codes": 6,
        "codes_used_worst": 0.25, "perplexity_worst": pytest.approx(2.0),
    }  # fmt: skip


def test_usage_of_a_grid_tells_its_levels() -> None:
    quantizer = build("quantizer", {"name": "fsq", "levels": [4, 5]}, channels=2)
    indices = quantizer.number(torch.tensor([[[0, 1]], [[1, 1]], [[2, 1]], [[2, 3]]]))
    metrics = usage(indices, quantizer.codes, levels=quantizer.levels).compute()
    assert metrics["codes_used"] == 4 / 20
    assert metrics["levels_used"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert metrics["levels_used_worst"] == pytest.approx(2 / 5)


def dark_images(codes: int, seed: int = 0) -> Tensor:
    """256 images of 15 × 15 cells, nine tenths of them dark: those share a hundredth of the codes, the rest use all."""
    g = torch.Generator().manual_seed(seed)
    shape = (256, 15, 15)
    dark = torch.randint(0, max(2, codes // 100), shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.9, dark, torch.randint(0, codes, shape, generator=g))


@pytest.mark.parametrize("codes", [2, 16, 1024, 2**18])
def test_dark_images_are_no_collapse_whatever_the_codebook(codes: int) -> None:
    assert usage(dark_images(codes), codes).collapse() is None


def test_few_images_or_a_million_codes_are_no_collapse() -> None:
    assert usage(torch.arange(450).view(2, 15, 15), 1024).collapse() is None
    levels = (16,) * 5
    assert usage(dark_images(16**5), 16**5, levels=levels).collapse() is None


@pytest.mark.parametrize("codes", [16, 1024])
def test_one_code_for_everything_is_a_collapse(codes: int) -> None:
    assert "1 of" in (usage(torch.zeros(256, 15, 15, dtype=torch.long), codes).collapse() or "")


def test_a_few_codes_or_one_dead_head_are_a_collapse() -> None:
    few = dark_images(1024) % 40
    assert usage(few, 1024).collapse() == (
        f"images use 40 of 1024 codes, with a perplexity of {usage(few, 1024).compute()['perplexity']:.1f}"
    )
    heads = torch.stack([dark_images(256), torch.full((256, 15, 15), 7)], dim=-1)
    assert "the worst of 2 heads uses 1 of 256 codes" in (usage(heads, 256, heads=2).collapse() or "")
    assert usage(torch.stack([dark_images(256), dark_images(256, 1)], dim=-1), 256, heads=2).collapse() is None


@pytest.mark.parametrize("name", ["fsq", "fsp"])
@pytest.mark.parametrize(("scale", "collapsed"), [(1e-3, True), (1e3, True), (1.0, False)])
def test_a_grid_collapses_in_its_middle_or_at_its_ends(name: str, scale: float, collapsed: bool) -> None:
    quantizer = build("quantizer", {"name": name}, channels=5).eval()
    raw = scale * torch.randn(64, 5, 15, 15)
    counted = usage(quantizer(raw)[1], quantizer.codes, levels=quantizer.levels)
    assert (counted.collapse() is not None) == collapsed
