"""Simulate strong lenses into a data set.

    lens-ldm simulate --preset deeplense --count 6000 --seed 0 --out data/deeplense
    lens-ldm simulate --preset deeplense-test1 --class no,vort --prior "theta_E=uniform(0.8, 2)" --count 6000 --out data/x

Image i of a seed depends on (seed, i) alone, whatever the batch, the chunks, the parts and the number of workers.
"""

import argparse
from pathlib import Path
from typing import Any

from shared.cli import Parser, at_least, part, positive
from shared.config import parse_overrides
from shared.errors import UserError, hint
from shared.simulate.preset import Preset, Priors, presets


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm simulate`."""
    parser = Parser(
        prog="lens-ldm simulate",
        description="Simulate a data set of strong lenses.",
        epilog=f"presets, each a file of configs/simulate that says what it holds and why:\n{_list()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="show the presets and stop")
    parser.add_argument(
        "--preset", default="deeplense", help="one of those below, or a .yaml file (default: deeplense)"
    )
    parser.add_argument(
        "--class", dest="classes", metavar="NAME", action="append", default=[], help="only this class, or these: a,b"
    )
    parser.add_argument(
        "--prior",
        metavar="NAME=LAW",
        action="append",
        default=[],
        help="another prior: a number, uniform(low, high), normal(mean, sigma), loguniform(low, high), "
        "power_law(slope, low, high) or poisson(mean)",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any other key of the preset, e.g. noise=none"
    )
    parser.add_argument("--count", type=positive, help="number of images")
    parser.add_argument("--seed", type=at_least(0), default=0, help="image i depends on (seed, i) only")
    parser.add_argument("--out", type=Path, help="folder of the data set, e.g. data/deeplense")
    parser.add_argument("--workers", type=positive, help="processes of one thread each (default: all cores)")
    parser.add_argument(
        "--device", help="render in batches on a device of torch, e.g. cuda (default: the CPU, by workers)"
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--shard", type=part, metavar="K/N", help="only the K-th of N parts, 1/N to N/N, into OUT.shard-K-of-N"
    )
    parts.add_argument("--merge", type=positive, metavar="N", help="put the N parts of --shard together, checked")
    options = parser.parse_args(argv)
    if options.list:
        print(_list())
        return
    if missing := [f"--{name}" for name in ("count", "out") if getattr(options, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    preset = Preset.load(options.preset, _overrides(options.prior, options.set))
    preset = preset.select([name for text in options.classes for name in text.split(",")])

    from shared.simulate.run import merge, part_folder, simulate_to  # with torch, for which no typo should have to wait

    if options.merge:
        merge(options.out, preset, options.count, options.seed, options.merge)
        print(
            f"{options.out}: {options.count} images; its {options.merge} parts ({options.out}.shard-*) can be deleted"
        )
        return
    simulate_to(
        options.out, preset, options.count, options.seed, options.workers, device=options.device, part=options.shard
    )
    if options.shard:
        k, n = options.shard
        print(f"{part_folder(options.out, k, n)}: part {k} of {n}; when all are there: the same with --merge {n}")
    else:
        print(f"{options.out}: {options.count} images")


def _list() -> str:
    """Each preset with the first line of its file."""
    lines = {}
    for name, path in presets().items():
        with open(path, encoding="utf-8") as file:
            lines[name] = file.readline().lstrip("# ").strip()
    width = max(map(len, lines), default=0)
    return "\n".join(f"  {name:{width}}  {line}" for name, line in lines.items())


def _overrides(priors: list[str], numbers: list[str]) -> dict[str, Any]:
    """["theta_E=uniform(1, 2)"], ["pixels=64"] -> {"theta_E": "uniform(1, 2)", "pixels": 64}."""
    for text in priors:
        name = text.partition("=")[0]
        if "=" not in text:
            raise UserError(f'--prior {text}: expected NAME=LAW, e.g. --prior "theta_E=uniform(0.8, 2)"')
        if name not in Priors.model_fields:
            raise UserError(f"--prior {text}: no prior {name!r}{hint(name, Priors.model_fields)}")
    for text in numbers:
        if "=" not in text:
            raise UserError(f"--set {text}: expected KEY=VALUE, e.g. --set noise=none")
    return parse_overrides([f"--{text}" for text in (*priors, *numbers)])
