"""Muon: momentum whose update is orthogonalised, for weight matrices; AdamW for everything else.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the step scaled as in Liu et al. 2025 (arXiv 2502.16982,
Eq. 4), so that one learning rate serves both. Unlike there, the first and the last layer and joined q, k, v are
orthogonalised too: they are layers like others in networks this small.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic iteration that takes all singular values near 1, fast rather than exactly: to 0.7 ... 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalize(matrix: Tensor) -> Tensor:
    """(m, n) = U S Vᵀ -> about U Vᵀ, by products of matrices alone; zero stays zero."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    x = direct(x.bfloat16()) if x.is_cuda else through_gram(x.float())
    return (x.mT if tall else x).to(matrix)


def direct(x: Tensor) -> Tensor:
    """The iteration as published: it forgives bf16, which GPUs are fast at."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def through_gram(x: Tensor) -> Tensor:
    """The same in fp32, which it needs, with all but two products on the short side: a kernel is nine times as wide as
    high, and a CPU waits for every product."""
    a, b, c = NEWTON_SCHULZ

    def polynomial(gram: Tensor) -> Tensor:
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        return step

    gram = x @ x.mT
    whole = step = polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = step @ gram @ step
        step = polynomial(gram)
        whole = step @ whole
    return whole @ x


class Muon(torch.optim.Optimizer):
    """Muon over the groups of parameters with `orthogonal`, kernels taken as (out, rest); AdamW over the others.

    betas   of AdamW's two averages; Muon's one momentum is 0.95, with Nesterov's look ahead
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * update(parameter.grad, self.state[parameter], group))
        return loss

    @staticmethod
    def _orthogonal(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, MOMENTUM).flatten(1))
        # An orthogonal (m, n) has entries of RMS 1/√max(m, n): this makes it 0.2, that of AdamW's steps in practice.
        return (0.2 * max(update.shape) ** 0.5 * update).view_as(gradient)

    @staticmethod
    def _adam(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        square = state["square"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2 ** state["step"])
        return mean / (square.sqrt() + group["eps"])


def build_optimizer(
    network: nn.Module,
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    beside: Sequence[dict[str, Any]] = (),
) -> torch.optim.Optimizer:
    """`muon` or `adamw` over the trainable parameters of a network.

    beside   further groups, {"params": ..., "lr": ..., "betas": ...}, for AdamW in either case and not decayed

    The weights of linear layers and convolutions are decayed and, by Muon, orthogonalised; gains, biases and positional
    maps are neither, for they are no maps from one space to another. A layer with a method `renormalize` has it called
    after each step.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    matrices = {layer.weight: None for layer in layers if layer.weight.requires_grad}  # ordered, and each once
    others = [p for p in network.parameters() if p.requires_grad and p not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": list(matrices), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        *({**group, "weight_decay": 0.0} for group in beside),
    ]
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    else:
        groups[0]["orthogonal"] = True
        optimizer = Muon(groups, lr=lr, betas=betas)
    kept: list[Any] = [layer.renormalize for layer in layers if hasattr(layer, "renormalize")]

    def renormalize(*_: Any) -> None:
        for keep in kept:
            keep()

    if kept:
        optimizer.register_step_post_hook(renormalize)
    return optimizer
