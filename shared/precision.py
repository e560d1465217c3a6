"""Which device, bf16 or fp32, how many threads: what a machine has and is fast at, for use outside a Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import UserError
from shared.processes import local_rank


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 or fp32, for using a model outside a Trainer."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: no rounding depends on where threads cut a tensor, and small operations are faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device(accelerator: str = "auto") -> torch.device:
    """The device that a config's trainer.accelerator means on this machine, for this process of torchrun's."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        if accelerator == "gpu":
            raise UserError(
                "trainer.accelerator is gpu, but torch finds no GPU: use auto or cpu, or look at its driver"
            )
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def named_device(name: str) -> torch.device:
    """What --device means on this machine: `auto` or a device of torch, as `check_device` has let it pass."""
    return choose_device() if name == "auto" else torch.device(name)


def check_device(name: str) -> str:
    """The value of --device, `auto` or a device of torch. UserError if there is no such device here."""
    try:
        if name != "auto":
            torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name


def resolve_precision(precision: str, accelerator: str = "auto") -> str:
    """auto -> bf16 where the hardware multiplies it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(choose_device(accelerator)) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it has units for bf16: on a CPU without them it is slower than fp32, not faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    fast = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(check is not None and check() for check in fast)


def usable_precision(trained: str, device: torch.device) -> str:
    """What to use a model in that was trained in this precision: fp32 where the device would have to emulate bf16."""
    return trained if trained == "fp32" or multiplies_bf16(device) else "fp32"
