"""`lens-ldm COMMAND`: a table of commands, each importing its script only when called."""

import argparse
import errno
import math
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from shared.errors import UserError, meant

COMMANDS = {
    "quickstart": ("shared.quickstart:main", "nothing -> simulated data, both stages, samples, scores, report.html"),
    "prepare": ("shared.data.prepare:main", "images as they come: a folder, a zip or a file -> data/NAME"),
    "inspect": ("shared.data.inspect:main", "a data set -> table, histogram.png, contact_sheet.png"),
    "simulate": ("shared.simulate.command:main", "simulated lenses -> data/NAME"),
    "train-vqvae": ("stage1_vqvae.train:main", "stage 1; also: python stage1_vqvae/train.py"),
    "train-diffusion": ("stage2_diffusion.train:main", "stage 2; also: python stage2_diffusion/train.py"),
    "distill": (
        "stage2_diffusion.distill:main",
        "few-step student of a model; also: python stage2_diffusion/distill.py",
    ),
    "sample": ("stage2_diffusion.sample:main", "lenses from a trained model; also: python stage2_diffusion/sample.py"),
    "models": ("shared.models:main", "what can be sampled by name: published models and runs"),
    "publish": ("stage2_diffusion.publish:main", "a run's model -> a folder to share, with scores, at half precision"),
    "tune-grid": ("stage2_diffusion.grids:main", "a few evaluations made the most of: times fitted to a trained model"),
    "evaluate-vqvae": (
        "stage1_vqvae.evaluate:main",
        "scores of the autoencoder alone; also: python stage1_vqvae/evaluate.py",
    ),
    "evaluate": (
        "stage2_diffusion.evaluate:main",
        "scores with their floors; also: python stage2_diffusion/evaluate.py",
    ),
    "compare": (
        "stage2_diffusion.baselines.compare:main",
        "several evaluations in one table, and quality against cost",
    ),
    "test-metrics": (
        "shared.evaluation.damage:main",
        "what each metric sees of damaged real images, and what it misses",
    ),
    "sweep": ("stage2_diffusion.sweep:main", "scores, physics and lens fits against the number of evaluations"),
    "benchmark": (
        "stage2_diffusion.baselines.benchmark:main",
        "operations, time and memory of training and sampling beside other people's systems",
    ),
    "ablate": (
        "shared.ablate:main",
        "configs/ablations/NAME.yaml -> every cell trained through both stages, one table",
    ),
    "fit": ("shared.fit:main", "lens models fitted to images: which lenses, and whether they are any"),
}


def main(argv: list[str] | None = None) -> None:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: lens-ldm COMMAND [--help] ...\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        return
    run(command, rest)


def run(command: str, arguments: list[str]) -> None:
    if command not in COMMANDS:
        _fail(f"no command {command!r}; there are {', '.join(COMMANDS)}")
    module, _, attribute = COMMANDS[command][0].partition(":")
    guard(lambda: getattr(import_module(module), attribute)(arguments))


def guard(script: Callable[[], object]) -> None:
    """Call a script; a user's mistake ends in one line on stderr and exit code 2, Ctrl-C in one line and 130."""
    try:
        script()
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a full disk can strike any write; what must survive it is written atomically
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(
            f"the disk is full{where}: free some space and run the same command again; what was kept is not done again"
        )
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


class Parser(argparse.ArgumentParser):
    """argparse's, but for its errors: one line, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += meant(unknown[1], [name for action in self._actions for name in action.option_strings])
        raise UserError(f"{message} (`{self.prog} --help` shows what there is)")


def at_least(low: int) -> Callable[[str], int]:
    """argparse's type of a whole number from `low` on."""

    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return number


positive = at_least(1)


def between(low: float, high: float, what: str, *, open_below: bool = False) -> Callable[[str], float]:
    """argparse's type of a finite number from `low` (or above it) to `high`, described as `what`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (open_below and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {what}")
        return value

    return number


above_zero = between(0, math.inf, "above 0", open_below=True)
zero_or_above = between(0, math.inf, "from 0 on")
share = between(0, 1, "from 0 to 1")


def two_numbers(what: str, fine: Callable[[float, float], bool]) -> Callable[[str], tuple[float, float]]:
    """argparse's type of two finite numbers A,B for which `fine` holds, described as `what`."""

    def numbers(text: str) -> tuple[float, float]:
        try:
            a, b = map(float, text.split(","))
        except ValueError:
            a, b = math.nan, math.nan
        if not (math.isfinite(a) and math.isfinite(b) and fine(a, b)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return a, b

    return numbers


def part(text: str) -> tuple[int, int]:
    """argparse's type of the K-th of N parts, K/N: (K, N)."""
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 3/8")
    return int(numbers[1]), int(numbers[2])


def _fail(message: str) -> None:
    print(f"lens-ldm: error: {message}", file=sys.stderr)
    raise SystemExit(2)
