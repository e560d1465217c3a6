"""Less memory, the same gradients: blocks that are computed twice, batches that are computed in parts."""

import csv
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import load_config
from shared.data.cache import CacheWriter, LensImages
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.run import Run
from shared.schema import Stage1, Stage2
from shared.training import StageModule, fit, recompute_blocks
from stage1_vqvae.vqvae import VQVAE
from stage2_diffusion.generator import build_denoiser
from tests.processes import run_two


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def peak(function: Callable[[], object]) -> int:
    with Peak() as mode:
        function()
    return mode.peak


def test_the_measure_of_memory_is_right() -> None:
    def two_at_once() -> None:
        a = torch.empty(1000)
        b = a + 1
        del a
        a = b.exp()
        del b
        c = a.view(10, 100)  # the same memory
        assert c.shape == (10, 100)

    assert peak(two_at_once) == 8000


def autoencoder(**quantizer: Any) -> VQVAE:
    return VQVAE(
        (1, 40, 40), PixelTransform(0.0, 1.0), widths=(8, 16), encoder_blocks=2, decoder_blocks=3, latent_channels=4,
        quantizer=quantizer,
    )  # fmt: skip


def stage1() -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Tensor]:
    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        output, target, _, commitment, *_ = network(batch)
        return (output - target).square().mean() + commitment

    return autoencoder(name="vq", codebook_size=16), loss, torch.rand(16, 1, 40, 40)


def stage2(**backbone: Any) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Tensor]:
    diffusion = {"schedule": "flow", "prediction": "velocity", "time": "uniform", "shift": 1.0}
    network = build_denoiser({**backbone, "dropout": 0.3}, diffusion, latent_shape=(4, 8, 8))
    return network, lambda network, batch: network.loss(batch).mean(), torch.rand(16, 4, 8, 8)


NETWORKS = {
    "vqvae": stage1,
    "unet": lambda: stage2(name="unet", width=16, multipliers=[1, 2], blocks=2, heads=2),
    "dit": lambda: stage2(name="dit", width=32, depth=4, heads=2),
    "uvit": lambda: stage2(name="uvit", width=32, depth=5, heads=2),
    "karras_unet": lambda: stage2(name="karras_unet", width=16, multipliers=[1, 2], blocks=2, heads=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_computed_twice_give_the_same_bits_for_less_memory(name: str) -> None:
    def step(recompute: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, int]:
        torch.manual_seed(0)
        network, loss, batch = NETWORKS[name]()
        for parameter in network.parameters():  # gates and last layers begin at zero, which hides what is behind them
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        network.train()
        loss(network, batch)  # a codebook is born
        network.zero_grad()
        if recompute:
            recompute_blocks(network)
        torch.manual_seed(1)
        used = peak(lambda: loss(network, batch).backward())
        state = {k: v.clone() for k, v in network.state_dict().items()}
        gradients = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        return gradients, state, torch.rand(4), used

    gradients, state, after, used = step(False)
    again, state_again, after_again, less = step(True)
    assert gradients.keys() == again.keys()
    assert all(torch.equal(again[k], v) for k, v in gradients.items())
    assert all(torch.equal(state_again[k].nan_to_num(), v.nan_to_num()) for k, v in state.items())  # codes: moved once
    assert torch.equal(after, after_again)
    assert any(v.abs().max() > 0 for v in gradients.values())
    assert less < 0.75 * used


def test_blocks_without_a_gradient_are_computed_once() -> None:
    network = autoencoder(name="none").eval()
    batch = torch.rand(2, 1, 40, 40)
    with torch.no_grad():
        before = network(batch)[0]
        recompute_blocks(network)
        assert torch.equal(network(batch)[0], before)


@pytest.mark.slow  # the compiler
def test_blocks_computed_twice_can_be_compiled() -> None:
    network, batch = autoencoder(name="fsq", levels=[5] * 4), torch.rand(4, 1, 40, 40)
    network(batch)[0].sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    recompute_blocks(network)
    torch.compile(network, backend="aot_eager")(batch)[0].sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


# --- parts of a batch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "noise"
    writer = CacheWriter(folder, 64, (1, 40, 40), {"kind": "test"})
    images = torch.rand(64, 1, 40, 40, generator=torch.Generator().manual_seed(0)).numpy()
    for chunk in writer.pending():
        writer.write(chunk, images[chunk.start : chunk.stop])
    writer.finish()
    return folder


class Recording(StageModule):
    """Mean squared error of an autoencoder, which is the mean of its parts; remembers what it was asked and answered."""

    def __init__(self, config: Stage1, images: LensImages) -> None:
        torch.manual_seed(0)
        super().__init__(config, autoencoder(name="none"), lambda i: images.batch(i.numpy()), 64)
        self.batches_seen: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        self.noise: list[Tensor] = []

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.batches_seen.append(batch)
        self.noise.append(torch.rand(2))
        error = (self.network(batch)[0] - batch).square().mean()
        return error, {"root": error.detach()}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append([p.grad.clone() for p in self.network.parameters()])

    def validate(self, folder: Path | None) -> dict[str, float]:
        return {}


def recorded(data: Path, output: Path, parts: int, **trainer: object) -> Recording:
    config = load_config(Stage1, [], {
        "name": f"parts{parts}", "output": str(output), "data": {"path": str(data), "batch_size": 16},
        "autoencoder": {"quantizer": {"name": "none"}}, "logger": {"wandb": "disabled"},
        "trainer": {"max_steps": 3, "precision": "fp32", "accelerator": "cpu", "log_every": 1, "validate_every": 3,
                    "checkpoint_every": 2, "progress": False, "accumulate": parts, **trainer},
    })  # fmt: skip
    module = Recording(config, LensImages(data))
    fit(module, Run(config), {})
    return module


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    scale = max(float(y.abs().max()) for y in b)  # a bias before a norm has a gradient of nothing but rounding
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6 * scale) for x, y in zip(a, b, strict=True))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_parts_add_up_to_the_whole(data: Path, tmp_path: Path) -> None:
    whole, parts = recorded(data, tmp_path, 1), recorded(data, tmp_path, 4)
    assert torch.equal(torch.cat(parts.batches_seen[:4]), whole.batches_seen[0])
    assert len(parts.batches_seen) == 4 * len(whole.batches_seen) == 12
    # Later steps start from weights that differ by rounding, which Muon passes on as it is, so the first is compared.
    assert close(parts.gradients[0], whole.gradients[0])
    assert len(parts.gradients) == len(whole.gradients) == 3  # optimiser steps
    one, four = rows(tmp_path / "parts1"), rows(tmp_path / "parts4")
    assert [row["step"] for row in four] == [row["step"] for row in one] == ["1", "2", "3"]
    for a, b in zip(one, four, strict=True):
        for name in ("train/loss", "train/root"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)
        assert a["train/lr"] == b["train/lr"]
    states = [torch.load(tmp_path / f"parts{k}" / "last.ckpt", weights_only=True) for k in (1, 4)]
    assert states[0]["global_step"] == states[1]["global_step"] == 3
    assert len({tuple(noise.tolist()) for noise in parts.noise}) == 12  # each part draws noise of its own


def test_parts_take_less_memory(data: Path, tmp_path: Path) -> None:
    whole = peak(lambda: recorded(data, tmp_path, 1, max_steps=1))
    assert peak(lambda: recorded(data, tmp_path, 8, max_steps=1)) < 0.5 * whole


@pytest.mark.parametrize("stage", [Stage1, Stage2])
def test_parts_of_different_size_are_refused(stage: type[Stage1] | type[Stage2]) -> None:
    given: dict[str, Any] = {"name": "x", "data": {"path": "d", "batch_size": 8}, "trainer": {"accumulate": 3}}
    if stage is Stage2:
        given["autoencoder"] = "pixels"
    with pytest.raises(UserError, match=r"trainer: accumulate 3 does not divide data\.batch_size 8"):
        load_config(stage, [], given)


def in_parts(data: Path, folder: Path) -> None:
    for parts in (1, 2):
        torch.save(recorded(data, folder, parts).gradients, folder / f"{parts}-{os.environ['RANK']}.pt")


@pytest.mark.slow
def test_processes_add_up_their_parts(data: Path, tmp_path: Path) -> None:
    """DDP averages over the processes once a step, after the last part, all that the parts have added up to."""
    run_two(in_parts, data, tmp_path)
    gradients = {(k, r): torch.load(tmp_path / f"{k}-{r}.pt", weights_only=True) for k in (1, 2) for r in (0, 1)}
    alone = recorded(data, tmp_path / "alone", 1).gradients[0]
    for several in gradients.values():
        assert len(several) == 3
        assert close(several[0], alone)
    for parts in (1, 2):
        for a, b in zip(gradients[parts, 0], gradients[parts, 1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
