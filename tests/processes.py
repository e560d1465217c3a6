"""Processes of their own, to be killed or to train together, without the seconds that each new interpreter takes to import
torch and lightning: they are forked from a server that has imported them, and has run nothing yet."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

PRELOAD = ["stage1_vqvae.pipeline", "stage2_diffusion.pipeline", "shared.simulate.run", "shared.data.prepare", "pytest"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


class Ended(NamedTuple):
    returncode: int  # minus the number of the signal that killed it
    output: str  # both streams


def start(folder: Path, function: Callable[..., object], *arguments: Any) -> Any:
    """The process of function(*arguments), which has begun; a function of a module's top level. It writes folder/output."""
    (folder / "output").unlink(missing_ok=True)
    child = CONTEXT.Process(target=_call, args=(str(folder), Path.cwd(), dict(os.environ), function, arguments))
    child.start()
    return child


def run_one(folder: Path, function: Callable[..., object], *arguments: Any, timeout: float = 120) -> Ended:
    """Call function(*arguments) in a process of its own and wait for its end."""
    child = start(folder, function, *arguments)
    child.join(timeout)
    assert child.exitcode is not None, f"{child.kill()} still running after {timeout} s"
    return Ended(child.exitcode, (folder / "output").read_text())


def kill_after(lines: int, folder: Path, function: Callable[..., object], *arguments: Any) -> int:
    """Call function(*arguments) in a process of its own, killed once it has printed so many lines -> its exit code."""
    child = start(folder, function, *arguments)
    output = folder / "output"
    while child.is_alive() and not (output.exists() and output.read_text().count("\n") >= lines):
        time.sleep(0.001)
    child.kill()
    child.join()
    return child.exitcode


def run_two(function: Callable[..., object], *arguments: Any) -> None:
    """Call function(*arguments) in two processes that find each other, with the environment that torchrun gives them."""
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver")
    elastic_launch(config, _call)(None, Path.cwd(), {"OMP_NUM_THREADS": "1"}, function, arguments)


def _call(
    folder: str | None,
    home: Path,
    environment: dict[str, str],
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.chdir(home)
    os.environ.update(environment)
    if folder is not None:
        output = os.open(Path(folder) / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
