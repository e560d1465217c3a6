"""The GAN: its networks, who learns when, what is published of it, and that its collapse is seen."""

import csv
import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.checkpoint import read_config
from shared.config import load_config, merge
from shared.errors import UserError
from shared.patchgan import Discriminator
from shared.registry import build
from shared.schema import Adversarial, Distill, Stage2
from shared.training import recompute_blocks
from stage2_diffusion.distillation import distill
from stage2_diffusion.evaluate import cost
from stage2_diffusion.gan import GANModule, SelfAttention, Synthesis, spread
from stage2_diffusion.generator import Generator
from stage2_diffusion.pipeline import train
from stage2_diffusion.sample import main as sample
from stage2_diffusion.train import main

TINY: dict[str, Any] = {
    "autoencoder": "pixels",
    "gan": {"noise": 6, "width": 8, "multipliers": [1, 2, 2], "attention": [1]},
    "adversary": {"width": 8, "strides": 2},
    "trainer": {"max_steps": 12, "precision": "fp32", "accelerator": "cpu", "log_every": 1, "validate_every": 6,
                "checkpoint_every": 4, "progress": False},
    "logger": {"wandb": "disabled"},
}  # fmt: skip


def config(data: Path, output: Path, /, name: str = "run", **overrides: Any) -> Adversarial:
    own = {"name": name, "output": str(output), "data": {"path": str(data), "batch_size": 8}}
    resolved = load_config(Stage2, [], merge(merge(TINY, own), overrides))
    assert isinstance(resolved, Adversarial)
    return resolved


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(data, tmp_path_factory.mktemp("trained")))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 15, 15), (1, 30, 30), (2, 9, 14), (1, 16, 16)])
def test_a_generator_makes_grids_of_any_size_each_of_its_own_noise(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = Synthesis(shape, noise=6, width=8, multipliers=(1, 2, 2), attention=(0, 1))
    z = torch.randn(4, *net.noise_shape)
    for module in net.modules():
        if isinstance(module, SelfAttention):
            nn.init.ones_(module.gain)
    out = net(z)
    assert out.shape == (4, *shape)
    assert torch.allclose(net(z[2:3]), out[2:3], atol=1e-5)  # whatever is made beside it
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_attention_starts_as_the_identity_and_is_softmax_of_products() -> None:
    torch.manual_seed(0)
    block, x = SelfAttention(4).double(), torch.randn(2, 4, 3, 5).double()
    assert torch.equal(block(x), x)
    nn.init.constant_(block.gain, 0.5)
    q, k, v = block.qkv(x).flatten(2).chunk(3, 1)  # (N, c, hw)
    weights = torch.softmax(q.mT @ k / 2, -1)  # of sqrt(4) channels
    expected = x + 0.5 * block.out((v @ weights.mT).unflatten(2, (3, 5)))
    torch.testing.assert_close(block(x), expected)


def test_attention_that_is_computed_twice_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = Synthesis((1, 12, 12), noise=6, width=8, multipliers=(1, 2), attention=(0, 1))
    for block in (module for module in net.modules() if isinstance(module, SelfAttention)):
        nn.init.ones_(block.gain)
    twice, z = deepcopy(net), torch.randn(3, *net.noise_shape)
    recompute_blocks(twice)
    calls: list[nn.Module] = []
    for block in (module for module in twice.modules() if isinstance(module, SelfAttention)):
        block.qkv.register_forward_hook(lambda module, *_: calls.append(module))
    for one in (net, twice):
        one(z).square().sum().backward()
    assert len(calls) == 4  # two blocks, forward and again
    for ours, theirs in zip(twice.parameters(), net.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("strides", "patch"), [(1, 12), (2, 26), (3, 54), (4, 110)])
def test_a_discriminator_judges_patches_as_wide_as_it_says(strides: int, patch: int) -> None:
    torch.manual_seed(0)
    net = Discriminator(1, 2, strides).eval()
    image = torch.randn(1, 1, 192, 192, requires_grad=True)
    logits, features = net(image)
    assert len(features) == strides + 1
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = image.grad[0, 0].abs().sum(0).nonzero()  # type: ignore[index]
    assert int(seen.max() - seen.min()) + 1 == patch


# --- training ---------------------------------------------------------------------------------------------------------


class Snapshots:
    """The weights of both sides before each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generator: list[Tensor] = []
        self.discriminator: list[Tensor] = []
        before = GANModule.loss

        def loss(module: GANModule, *batch: Tensor) -> Any:
            for kept, side in ((self.generator, module.network), (self.discriminator, module.discriminator)):
                kept.append(torch.cat([p.detach().flatten() for p in side.parameters()]))
            return before(module, *batch)

        monkeypatch.setattr(GANModule, "loss", loss)


def test_the_discriminator_takes_three_steps_to_one_of_the_generator(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Snapshots(monkeypatch)
    train(config(data, tmp_path))
    moved = [[not torch.equal(a, b) for a, b in pairwise(side)] for side in (seen.generator, seen.discriminator)]
    assert moved[0] == [k % 3 == 2 for k in range(11)]
    assert all(moved[1])
    # The first step of Adam is as long as its learning rate, in every weight.
    assert float((seen.generator[3] - seen.generator[2]).abs().max()) == pytest.approx(2e-4, rel=1e-2)


def test_neither_side_s_gradient_reaches_the_other(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a step are those of the two losses, each with the other side held still."""
    found: list[tuple[Tensor, Tensor]] = []
    before = GANModule.loss

    def loss(module: GANModule, *batch: Tensor) -> Any:
        state, random = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
        total, terms = before(module, *batch)
        sides = [list(module.network.parameters()), list(module.discriminator.parameters())]
        if module.trainer.global_step == 2:
            for side, term in zip(sides, ("generator", "discriminator"), strict=True):
                ours = torch.autograd.grad(total, side, retain_graph=True)
                theirs = torch.autograd.grad(terms[term], side, retain_graph=True)
                found.append(tuple(torch.cat([g.flatten() for g in grads]) for grads in (ours, theirs)))  # type: ignore[arg-type]
            unused = torch.autograd.grad(terms["discriminator"], sides[0], allow_unused=True, retain_graph=True)
            assert all(g is None for g in unused)
            unused = torch.autograd.grad(terms["generator"], sides[1], allow_unused=True, retain_graph=True)
            assert all(g is None for g in unused)
        module.load_state_dict(state)
        torch.set_rng_state(random)
        return before(module, *batch)

    monkeypatch.setattr(GANModule, "loss", loss)
    train(config(data, tmp_path, trainer={"max_steps": 3}))
    assert len(found) == 2
    for ours, theirs in found:
        assert torch.equal(ours, theirs)
        assert float(ours.abs().sum()) > 0


def test_labels_are_smooth(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a discriminator that says 0, each term is log 2 whatever the label; of one that says x it tells the label."""

    def constant(self: Discriminator, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return 3.0 + 0 * self.head(self.layers[2](self.layers[1](self.layers[0](images)))), []

    monkeypatch.setattr(Discriminator, "forward", constant)
    train(config(data, tmp_path, trainer={"max_steps": 3}))
    softplus = float(torch.nn.functional.softplus(torch.tensor(3.0)))
    for row in rows(tmp_path / "run"):
        # -y log p - (1 - y) log(1 - p) is log(1 + e^x) - y x
        assert float(row["train/discriminator"]) == pytest.approx(2 * softplus - 3 * (0.9 + 0.1), rel=1e-4)
        assert float(row["train/generator"]) == pytest.approx(softplus - 3 * 0.9, rel=1e-4)
        assert float(row["train/loss"]) == pytest.approx(3 * softplus - 3 * 1.9, rel=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(data, tmp_path, "whole"))
    before = GANModule.loss

    def dying(self: GANModule, *batch: Tensor) -> Any:
        if self.trainer.global_step == 6:  # after the checkpoint at 4, within three steps of the discriminator
            raise KeyError("killed")
        return before(self, *batch)

    broken = config(data, tmp_path, "broken")
    with monkeypatch.context() as patch:
        patch.setattr(GANModule, "loss", dying)
        with pytest.raises(KeyError):
            train(broken)
    again = train(broken)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    states = [torch.load(tmp_path / n / "last.ckpt", weights_only=True)["state_dict"] for n in ("whole", "broken")]
    assert any(name.startswith("discriminator.") for name in states[0])
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_distances_are_logged_on_their_own_schedule_and_change_no_weight(
    data: Path, tmp_path: Path, model: Path
) -> None:
    scored = train(config(data, tmp_path, trainer={"score_every": 5, "score_count": 8}))
    assert [row["step"] for row in rows(tmp_path / "run") if row["validation/fd"]] == ["5", "10"]
    assert (model / "model.safetensors").read_bytes() == (scored / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_it_learns_where_blobs_are(data: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 400, "validate_every": 400, "checkpoint_every": 400, "log_every": 100}
    rates = {"optimizer": {"lr": 1e-3}, "adversary": {"lr": 3e-4, "strides": 3}, "ema": {"decay": 0.98}}
    options: dict[str, Any] = {"trainer": trainer, **rates}
    early = Generator.from_pretrained(train(config(data, tmp_path, "early", trainer={"max_steps": 3})), "cpu")
    late = Generator.from_pretrained(train(config(data, tmp_path, "late", **options)), "cpu")
    images = torch.from_numpy(np.load(data / "images.npy")).float()
    real = images.mean((0, 1))
    errors = [float((g.images(range(64)).mean((0, 1)) - real).square().mean()) for g in (early, late)]
    assert errors[1] < 0.3 * errors[0]
    assert 0.6 < read_config(tmp_path / "late")["spread"]["diversity"] < 1.6


# --- what is published ------------------------------------------------------------------------------------------------


def test_a_published_gan_draws_by_seed_in_one_evaluation(model: Path) -> None:
    generator = Generator.from_pretrained(model, "cpu")
    images = generator.images([3, 4, 5])
    assert images.shape == (3, 1, 30, 30)
    assert torch.allclose(generator.images([5], batch_size=1)[0], images[2], atol=1e-5)
    assert not torch.allclose(images[0], images[1], atol=1e-4)
    assert len(generator.trajectory([3, 4])) == 1
    spent = cost(generator, None, {}, {**generator.settings(), "guidance": 1.0})
    assert spent["gflop"] == generator.gflop() > 0
    state = torch.load(model.parent / "last.ckpt", weights_only=True)["state_dict"]
    published = generator.denoiser.state_dict()
    assert all(torch.equal(published[k], state[f"ema.module.{k}"]) for k in published)
    assert not all(torch.equal(published[k], state[f"network.{k}"]) for k in published)


def test_it_is_sampled_by_the_command_for_all_models(model: Path, tmp_path: Path) -> None:
    sample([str(model), "--count", "3", "--out", str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "samples.npz").is_file()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"steps": 4}, "steps"),
        ({"sampler": "ddim"}, "sampler"),
        ({"shift": 2.0}, "shift"),
        ({"eta": 0.5}, "eta"),
        ({"times": [1.0, 0.0]}, "times"),
    ],
)
def test_what_a_gan_has_no_use_for_is_refused_in_one_line(model: Path, options: dict[str, Any], wrong: str) -> None:
    generator = Generator.from_pretrained(model, "cpu")
    with pytest.raises(UserError, match=rf"^this model is a GAN, .*: leave out {wrong}$"):
        generator.images([0], **options)
    assert torch.equal(generator.images([0], **generator.settings()), generator.images([0]))


def test_it_neither_teaches_nor_is_guided(model: Path) -> None:
    generator = Generator.from_pretrained(model, "cpu")
    with pytest.raises(UserError, match="is a GAN and has no paths to learn"):
        distill(Distill(name="few", output=str(model.parent / "few"), teacher=str(model)))
    with pytest.raises(UserError, match="a GAN has no steps to be guided at"):
        generator.images([0], guide=generator, guidance=2.0)
    with pytest.raises(UserError, match="guidance needs a condition"):
        generator.images([0], guidance=2.0)


def test_networks_of_other_options_are_not_filled(model: Path, tmp_path: Path) -> None:
    published = json.loads((model / "config.json").read_text())
    assert build("gan", published["gan"], latent_shape=(1, 30, 30)).noise_shape == (6, 1, 1)
    copy = tmp_path / "model"
    copy.mkdir()
    published["gan"]["noise"] = 7
    (copy / "config.json").write_text(json.dumps(published))
    (copy / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="the weights of the denoiser do not fit the config"):
        Generator.from_pretrained(copy, "cpu")


# --- mode collapse ----------------------------------------------------------------------------------------------------


def test_spread_is_one_for_the_real_and_tells_one_mode_and_a_few() -> None:
    torch.manual_seed(0)
    real, more = torch.randn(2, 200, 3, 4, 4)
    assert list(spread(more, real).values()) == pytest.approx([1, 1], abs=0.05)
    assert list(spread(0.5 * more, real).values()) == pytest.approx([0.5, 0.5], abs=0.03)
    one, few = real[:1].expand(200, -1, -1, -1), real[:10].repeat(20, 1, 1, 1)
    assert spread(one, real) == {"diversity": 0.0, "spacing": 0.0}
    assert spread(few, real)["diversity"] == pytest.approx(1 - 1 / 10, abs=0.05)
    assert spread(few, real)["spacing"] == 0
    assert spread(few + 0.01 * more, real)["spacing"] < 0.1


def test_a_collapse_is_told_when_it_begins_and_at_the_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.9, 0.3, 0.2, 0.8, 0.4, 0.4, 0.4])
    monkeypatch.setattr("stage2_diffusion.gan.spread", lambda *_: {"diversity": 1.0, "spacing": next(found)})
    model = train(config(data, tmp_path, trainer={"validate_every": 2}))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run: ")]
    assert [line.rpartition(", ")[2] for line in told] == ["at step 4", "at step 10", told[2].rpartition(", ")[2]]
    assert told[2].startswith("run: its modes collapse: samples are 1.00 times as far apart as real images, and 0.40")
    assert [row["validation/spacing"] for row in rows(tmp_path / "run") if row["validation/spacing"]][:2] == [
        "0.9",
        "0.3",
    ]
    assert read_config(model)["spread"] == {"diversity": 1.0, "spacing": 0.4}
    assert "0.40 times as far from the next one" in (model / "README.md").read_text()


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [("sampling.steps=4", "sampling"), ("diffusion.schedule=flow", "diffusion"), ("backbone.name=dit", "backbone")],
)
def test_a_gan_with_keys_of_diffusion_is_refused_in_one_line(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        main(["--config", "stage2/gan.yaml", f"--{key}"])
    assert str(error.value).count("\n") == 0
    assert f"a gan makes a lens of noise in one evaluation and is told nothing: leave out {text}" in str(error.value)


def test_the_other_keys_are_checked_as_elsewhere() -> None:
    for override, problem in {
        "gan.attention=[3]": "gan.attention: no level [3]: multipliers make levels 0 to 2",
        "adversary.smoothing=0.5": "adversary.smoothing: must be less than 0.5, not 0.5",
        "gan.widht=3": "gan.widht: unknown key; did you mean 'width'?",
        "data.augment=labelled": "data.augment: 'labelled' is not known",
        "pixels.size=64": "pixels: size and crop are for autoencoder pixels",
    }.items():
        with pytest.raises(UserError) as error:
            load_config(Stage2, ["stage2/gan.yaml"], [override])
        assert str(error.value).startswith(f"command line: {problem}")
