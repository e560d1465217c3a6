from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shared.optimizer import Muon, build_optimizer, direct, orthogonalize, through_gram


@pytest.mark.parametrize("iterate", [direct, through_gram])
@pytest.mark.parametrize("shape", [(4, 4), (3, 40), (48, 432)])
def test_iteration_keeps_singular_vectors_and_takes_values_near_one(
    shape: tuple[int, int], iterate: Callable[[Tensor], Tensor]
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    values = s / s.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(iterate(matrix / matrix.norm()), u @ values.diag() @ v, atol=1e-4, rtol=0)
    assert values.max() < 1.25


def test_iteration_survives_singular_values_below_rounding() -> None:
    u, _, v = torch.linalg.svd(torch.randn(64, 576, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    poor = u @ torch.logspace(0, -8, 64).diag() @ v
    torch.testing.assert_close(through_gram(poor / poor.norm()), direct(poor / poor.norm()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(40, 3), (3, 40)])
def test_either_side_may_be_the_longer(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(matrix.mT), orthogonalize(matrix).mT)


def test_zero_gradient_is_no_step() -> None:
    assert orthogonalize(torch.zeros(3, 5)).abs().max() == 0


def test_step_of_a_matrix_is_that_of_torch() -> None:
    reference = getattr(torch.optim, "Muon", None)
    if reference is None:
        pytest.skip("torch has Muon since 2.9")
    torch.manual_seed(0)
    mine, theirs = nn.Parameter(torch.randn(12, 30)), nn.Parameter(torch.randn(12, 30))
    theirs.data.copy_(mine.data)
    ours = Muon([{"params": [mine], "orthogonal": True, "weight_decay": 0.1}], lr=0.01)
    other = reference([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(12, 30)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        other.step()
    assert (mine - theirs).abs().max() < 2e-3  # torch iterates in bf16, ours on a CPU in fp32


def test_steps_of_the_rest_are_those_of_adamw() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(7))
    theirs.data.copy_(mine.data)
    ours = Muon([{"params": [mine], "weight_decay": 0.1}], lr=0.01, betas=(0.8, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(7)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        other.step()
    torch.testing.assert_close(mine, theirs)


def test_a_kernel_is_stepped_as_a_matrix_of_out_by_the_rest() -> None:
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.zeros(6, 2, 3, 3)), nn.Parameter(torch.zeros(6, 18))
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    gradient = torch.randn(6, 2, 3, 3)
    kernel.grad, matrix.grad = gradient.to(memory_format=torch.channels_last), gradient.flatten(1)
    Muon([{"params": [kernel, matrix], "orthogonal": True}], lr=0.01).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.norm, self.position = nn.GroupNorm(2, 8), nn.Parameter(torch.zeros(1, 8, 4, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_trainable_parameter_is_in_one_group(name: str) -> None:
    net = Net()
    optimizer = build_optimizer(net, name=name, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    matrices, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert matrices == {id(net.conv.weight), id(net.linear.weight)}
    assert others == {id(p) for p in (net.conv.bias, net.linear.bias, net.norm.weight, net.norm.bias, net.position)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_learns_beside_the_network_is_stepped_by_adamw_at_its_own_rate(name: str) -> None:
    torch.manual_seed(0)
    net, mine, theirs = Net(), nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    beside = [{"params": [mine], "lr": 0.03, "betas": (0.5, 0.9)}]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    ours = build_optimizer(net, name=name, **options, beside=beside)
    other = torch.optim.AdamW([theirs], lr=0.03, betas=(0.5, 0.9), weight_decay=0.0)
    for _ in range(5):
        mine.grad = torch.randn(4, 4)
        theirs.grad = mine.grad.clone()
        ours.step()
        other.step()
    torch.testing.assert_close(mine, theirs)


def test_a_saved_state_goes_on_with_the_same_bits() -> None:
    def run(stop: int | None) -> nn.Module:
        torch.manual_seed(0)
        net = Net()
        make = lambda: build_optimizer(net, name="muon", lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)  # noqa: E731
        optimizer = make()
        for step in range(6):
            if step == stop:
                state = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
            torch.manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()
        return net

    for whole, resumed in zip(run(None).parameters(), run(3).parameters(), strict=True):
        assert torch.equal(whole, resumed)
