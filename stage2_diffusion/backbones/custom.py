"""A backbone that is a class of the user's own, named by its dotted path:

    backbone: {class_path: my_package.my_module.MyNet, options: {width: 64}}

    class MyNet(nn.Module):
        def __init__(self, latent_shape, cond_dim, width): ...  # (c, h, w); the width of cond, 0 for none
        def forward(self, x, t, cond): ...  # (N, c, h, w), (N,) in [0, 1], (N, cond_dim) or None -> like x

Samples of a batch must not meet in it. To import a module is to run it, so a class is built only if the user trusts it:
by naming it in the config of a training, or by `trust` before a model is loaded. What a model says of itself does not
count.
"""

import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError, hint

TRUSTED: set[str] = set()  # packages, modules and classes, in this process


def trust(name: str) -> None:
    """Let the classes of a package or a module, or the one of this dotted path, be imported and built."""
    TRUSTED.add(name)


def custom(
    latent_shape: tuple[int, int, int],
    cond_dim: int = 0,
    *,
    class_path: str,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """The backbone class_path(latent_shape=..., cond_dim=..., **options), tried once on zeros.

    UserError   if it is not trusted, is not there, takes other arguments, fails, or does not give the shape of its input
    """
    module, _, name = class_path.rpartition(".")
    if not any(f"{class_path}.".startswith(f"{trusted}.") for trusted in TRUSTED):
        package = class_path.partition(".")[0]
        raise UserError(
            f"the backbone is a class of its author's own, {class_path}, and to load it is to run it: if you trust "
            f"{package} as it is on this machine, add --trust {package}, in Python "
            f'Generator.from_pretrained(path, trust="{package}")'
        )
    with told(f"backbone {class_path}: {module} cannot be imported (is its folder in PYTHONPATH?)"):
        found = import_module(module)
    if not inspect.isclass(kind := getattr(found, name, None)) or not issubclass(kind, nn.Module):
        known = [key for key, value in vars(found).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
        raise UserError(f"backbone {class_path}: {module} has no torch.nn.Module {name}{hint(name, known)}")
    arguments = {"latent_shape": latent_shape, "cond_dim": cond_dim, **options}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UserError(f"backbone {class_path}: {error}; it is given {', '.join(arguments)}") from error
    with told(f"backbone {class_path} cannot be built"):
        network = kind(**arguments)
    network.__dict__["cond_dim"] = cond_dim  # what the denoiser asks a backbone for
    with told(f"backbone {class_path} fails on latents of zeros"):
        out = dry_run(network, latent_shape, cond_dim)
    if not isinstance(out, Tensor) or out.shape != (2, *latent_shape):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"backbone {class_path} makes {given} of latents {(2, *latent_shape)}: it must keep their shape"
        )
    return network


@torch.no_grad()
def dry_run(network: nn.Module, latent_shape: tuple[int, int, int], cond_dim: int) -> Any:
    """What a network makes of two latents of zeros; its state and the random numbers stay as they are."""
    network.eval()
    with torch.random.fork_rng(devices=[]):
        out = network(
            torch.zeros(2, *latent_shape), torch.full((2,), 0.5), torch.zeros(2, cond_dim) if cond_dim else None
        )
    network.train()
    return out


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever goes wrong in the user's code as one line, with the last place that is neither torch's nor ours."""
    try:
        yield
    except Exception as error:
        ours = (str(Path(torch.__file__).parent), __file__, "<")
        places = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(ours)]
        where = f" (line {places[-1].lineno} of {places[-1].filename})" if places else ""
        message = " ".join(str(error).split())
        raise UserError(f"{what}: {type(error).__name__}: {message}{where}") from error
