"""Draw lenses from a published model.

lens-ldm sample checkpoints/unet --count 64 --seed 0 --steps 8 --out samples
python stage2_diffusion/sample.py checkpoints/unet --count 64 --seed 0 --steps 8 --out samples

Writes samples.npz (images, seeds, metadata as a JSON string; loads without pickle) and grid.png (the same metadata in
its text chunk `parameters`). Lens k has the seed SEED + k, and is the same lens whatever else is drawn with it.
MODEL is a folder, or the name of a model that `lens-ldm models` lists.

Any number of lenses is drawn in the same memory, and kept as it is drawn: after an interruption the same command goes on
where it stopped, in OUT/unfinished-HASH; another request has a folder of its own.

--format writes others than .npz, or several: npy, fits (a cube with the facts in its header, and a table), hdf5, and png, a
folder of 16 bits of grey each; of npy and png samples.csv has the seeds. samples.json says how they were made.
--gif shows how the first lenses come about; --trajectory keeps it of all, as trajectory.npy (n, evaluations, C, H, W) and,
of the first, as trajectory.png, a row a lens.

A conditional model (configs/stage2/conditional.yaml) can be asked for lenses: `lens-ldm sample MODEL --help` says for which.
lens-ldm sample checkpoints/conditional --theta-E 1.2 --x-s 0.1:0.3
Of a range each lens draws its own value; what is not asked for may be anything. samples.npz holds what was asked for, an
array `condition_NAME` each.

Several processes or machines share the work: each is told `--shard 3/8` beside the same arguments, or torchrun starts
them. Each writes samples-3-of-8.npz, and the last one to finish joins all into samples.npz. The same command again draws
only the shards that are missing; once joined they can be deleted.
"""

import argparse
import contextlib
import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.checkpoint import read_config, versions
from shared.cli import Parser, above_zero, guard, part, positive, share, two_numbers, zero_or_above
from shared.data.export import FORMATS, Stack, check_formats, write_npy
from shared.data.formats import CONDITION
from shared.errors import UserError
from shared.files import make_folder
from shared.precision import check_device
from shared.processes import rank, world
from shared.registry import names
from shared.report import gif, grid, save_grid
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.generator import Generator
from stage2_diffusion.shards import (
    SPEED,
    Pieces,
    Results,
    disk_errors,
    first_of,
    folder_of,
    hold,
    join,
    read_shard,
    shard_files,
    stack_of,
    write_samples,
)

# A model has its own defaults of both.
SETTINGS, GUIDANCE = ("sampler", "steps", "shift", "eta"), ("guidance", "guidance_interval")
GIF, TRAJECTORY = "denoising.gif", "trajectory.npy"
FILMED, FRAMES = 16, 24
ROWS, COLUMNS = 8, 12  # of trajectory.png
HELD = 1 << 27  # bytes of trajectories held at once
SEEDS = 2**32  # what torch's CPU generator tells apart


def main(argv: list[str] | None = None) -> None:
    argv = join_negative(sys.argv[1:] if argv is None else argv)
    conditions = conditions_of_command(argv)
    a, unknown = build_parser(conditions).parse_known_args(argv)
    assert conditions is not None  # or else the parser had something to say
    if unknown:
        conditions.require(unknown[0].lstrip("-").partition("=")[0].replace("-", "_"))  # says what is wrong with it
        raise UserError(f"{unknown[0]} is not understood: see `lens-ldm sample --help`")
    if a.list_conditions:
        print("\n".join(f"{entry.name:14} {entry}" for entry in conditions.entries) or f"{a.model} has no conditions")
        return
    seeds, asked, texts = requested(a, conditions)
    count = len(seeds)
    number, parts = a.shard or (rank() + 1, world())
    if parts > count:
        raise UserError(f"{parts} shards of {count} lenses: some would be empty, ask for fewer shards")
    for line in conditions.warnings(asked):
        print(line, file=sys.stderr)
    if parts > 1 and (a.gif or a.trajectory):
        raise UserError(
            "--gif and --trajectory are of lenses that one process draws: leave them out, or draw no shards"
        )
    generator = load_model(a)
    check_formats(a.format, generator.autoencoder.image_shape)
    guide = Generator.from_pretrained(a.guide, check_device(a.device), a.trust) if a.guide else None
    settings = chosen_settings(a, generator, guide, asked)
    make_folder(a.out)
    request = {
        "model": str(a.model), "weights_sha256": generator.config["sha256"], **settings, "observed": not a.clean,
        "precision": generator.precision, "first_seed": a.seed, "count": count,
        **generator.autoencoder.transform.to_config(),
        # There also where nothing is asked for: what has them and what has not are two requests.
        **dict.fromkeys(("conditions", "conditions_sha256", "guide", "guide_sha256")),
    }  # fmt: skip
    if asked:
        values = [[name, given.tolist()] for name, given in sorted(asked.items())]  # a table of that name may change
        request |= {"conditions": texts, "conditions_sha256": hashlib.sha256(json.dumps(values).encode()).hexdigest()}
    if guide is not None:
        request |= {"guide": str(a.guide), "guide_sha256": guide.config["sha256"]}
    request = json.loads(json.dumps(request))  # as a file would give it back
    if a.compile:
        generator.denoiser.backbone.compile()
    files = shard_files(a.out, parts)
    own = slice(count * (number - 1) // parts, count * number // parts)
    asked = {name: given[own] for name, given in asked.items()}
    drawing = Drawing(generator, seeds[own], asked, {**settings, "guide": guide}, not a.clean, a.batch_size)
    with disk_errors(a.out):
        if parts == 1:
            finish(drawing, a, request)
        else:
            draw_shard(drawing, files[number - 1], request)
            join(files, request, a.format)


class Drawing(NamedTuple):
    """Lenses that one process draws."""

    generator: Generator
    seeds: range
    asked: dict[str, np.ndarray]  # {name: (n,)}
    settings: dict[str, Any]
    observed: bool
    batch_size: int

    def stack(self, work: Path, request: dict[str, Any]) -> Stack:
        """All of them, of which those that are not in the folder yet are drawn."""
        pieces, generator = Pieces(work / "images", len(self.seeds)), self.generator
        gaps = pieces.gaps()
        with bar(len(self.seeds), "sampling", len(self.seeds) - sum(map(len, gaps))) as shown:
            for gap in gaps:
                cond = {name: values[gap.start : gap.stop] for name, values in self.asked.items()}
                options = {**self.settings, "observed": self.observed, "batch_size": self.batch_size}
                first, begun = gap.start, time.perf_counter()
                for chunk, images in generator.sample(self.seeds[gap.start : gap.stop], cond, **options):
                    rows = images.cpu().numpy()
                    pieces.add(first, rows, time.perf_counter() - begun)
                    first, begun = first + len(chunk), time.perf_counter()
                    shown.update(len(chunk))
        columns = {"seeds": np.asarray(self.seeds, np.int64)}
        columns |= {CONDITION + name: values for name, values in self.asked.items()}
        about = {**request, "device": str(generator.device), "versions": versions()}
        seconds = pieces.seconds()
        print(f"{len(self.seeds)} lenses in {seconds:.1f} s ({len(self.seeds) / seconds:.1f} a second)")
        measured = {SPEED: round(len(self.seeds) / seconds, 2)}
        shape = (len(self.seeds), *generator.autoencoder.image_shape)
        return Stack(shape, pieces.blocks, columns, about, measured)

    def trajectory(self, first: int, stop: int, every: int) -> list[Tensor]:
        """`Generator.trajectory` of some of them."""
        cond = {name: values[first:stop] for name, values in self.asked.items()}
        return self.generator.trajectory(self.seeds[first:stop], cond, every=every, **self.settings)


def finish(drawing: Drawing, options: argparse.Namespace, request: dict[str, Any]) -> None:
    """Whatever of what the options ask for is not in the folder yet."""
    out, results = options.out, Results(options.out, request)
    missing = [key for key in options.format if not results.has(FORMATS[key][0])]
    gif = options.gif and not results.has(GIF)
    every = options.trajectory if options.trajectory and not results.has(TRAJECTORY, every=options.trajectory) else 0
    if not (missing or gif or every):
        print(f"{out} is complete")
        return
    for key in missing:
        results.require_place(FORMATS[key][0])
    work = folder_of(out, request)
    with hold(work) as ours:
        if not ours:
            raise UserError(f"another process draws these lenses into {out}: wait for it, or choose another --out")
        whole = out / FORMATS["npz"][0]
        metadata = read_shard(whole, request)
        about = {**request, "versions": versions()}
        if missing:
            stack = drawing.stack(work, request) if metadata is None else stack_of([whole], [metadata])
            write_samples(results, missing, stack, work)
        if gif:
            save_gif(drawing, work / GIF)
            results.place(work / GIF, GIF, about)
        if every:
            save_trajectory(drawing, every, work, results, about)
        shutil.rmtree(work, ignore_errors=True)


def draw_shard(drawing: Drawing, file: Path, request: dict[str, Any]) -> None:
    """One shard of several, unless it is there already."""
    if read_shard(file, request) is not None:
        print(f"{file} is complete")
        return
    work = folder_of(file.parent, request, file.name)
    with hold(work) as ours:
        if not ours:
            raise UserError(f"another process draws {file}: each shard has one")
        results = Results(file.parent, request)
        write_samples(results, ["npz"], drawing.stack(work, request), work, file.name)
        shutil.rmtree(work, ignore_errors=True)


def save_gif(drawing: Drawing, path: Path) -> None:
    """The denoising of the first lenses as an animation."""
    states = drawing.trajectory(0, min(FILMED, len(drawing.seeds)), -(-drawing.settings["steps"] // FRAMES))
    transform = drawing.generator.autoencoder.transform
    title = "what each is taken to be, {} of {}"
    frames = [grid(transform.unit(x), 4, title=title.format(k + 1, len(states))) for k, x in enumerate(states)]
    path.write_bytes(gif(frames))


def save_trajectory(drawing: Drawing, every: int, work: Path, results: Results, about: dict[str, Any]) -> None:
    """trajectory.npy (n, evaluations, C, H, W), and the first as trajectory.png, a row a lens."""
    transform, n = drawing.generator.autoencoder.transform, len(drawing.seeds)
    pieces = Pieces(work / f"trajectory-{every}", n)
    held = 4 * math.prod(drawing.generator.autoencoder.image_shape) * -(-drawing.settings["steps"] // every)
    size = max(1, min(drawing.batch_size, HELD // held))
    gaps = pieces.gaps()
    with bar(n, "trajectories", n - sum(map(len, gaps))) as shown:
        for gap in gaps:
            for first in range(gap.start, gap.stop, size):
                begun, stop = time.perf_counter(), min(first + size, gap.stop)
                states = torch.stack(drawing.trajectory(first, stop, every), 1)
                pieces.add(first, states.numpy(), time.perf_counter() - begun)
                shown.update(len(states))
    first_rows = np.concatenate([*first_of(pieces.blocks(), ROWS)])
    write_npy(work / TRAJECTORY, Stack((n, *first_rows.shape[1:]), pieces.blocks))
    results.place(work / TRAJECTORY, TRAJECTORY, about, every=every)
    columns = np.unique(np.linspace(0, first_rows.shape[1] - 1, COLUMNS).round().astype(int))
    shown_rows = torch.from_numpy(first_rows[:, columns]).flatten(0, 1)
    title = f"what each lens is taken to be at evaluation {', '.join(str(1 + every * k) for k in columns[:-1])} and the last"
    save_grid(
        results.out / "trajectory.png", transform.unit(shown_rows), columns=len(columns), title=title, metadata=about
    )
    print(f"{results.out / TRAJECTORY}: {n} x {first_rows.shape[1]} images")


def build_parser(conditions: Conditions | None) -> argparse.ArgumentParser:
    """Of the command, with an option for each entry that a model can be asked for."""
    parser = Parser(
        "lens-ldm sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add_model(parser)
    parser.add_argument("--count", type=positive, help="how many (default: a lens each row of --conditions, or 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default %(default)s)")
    add_settings(parser)
    parser.add_argument("--guide", metavar="MODEL", help="a weaker model of the same stage 1 to be guided by")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="ask for it; as --NAME VALUE")
    parser.add_argument(
        "--conditions", type=Path, metavar="FILE.csv", help="ask for a lens a row; the first row has names"
    )
    parser.add_argument(
        "--list-conditions", action="store_true", help="what MODEL can be asked for, with its range; no more"
    )
    parser.add_argument("--clean", action="store_true", help="without pixel noise")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--shard", type=part, metavar="K/N", help="draw the K-th of N parts, K from 1 (see above)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute once, then faster on a GPU")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=["npz"], help="of the samples, one or several (default: npz)"
    )
    parser.add_argument("--gif", action="store_true", help=f"the denoising of the first {FILMED}, as {GIF}")
    parser.add_argument(
        "--trajectory", type=positive, nargs="?", const=1, default=0, metavar="K",
        help="every K-th estimate of each lens on the way, the first and the last always (default: K = 1)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder (default %(default)s)")
    if conditions is not None and conditions.entries:
        group = parser.add_argument_group(
            "what this model can be asked for", "a value, or LOW:HIGH; with the range in training"
        )
        for entry in conditions.entries:
            # A name that an option has already is there by --set alone.
            with contextlib.suppress(argparse.ArgumentError):
                spellings = dict.fromkeys([f"--{entry.name.replace('_', '-')}", f"--{entry.name}"])
                dest = CONDITION + entry.name
                group.add_argument(*spellings, dest=dest, metavar="VALUE", help=str(entry).replace("%", "%%"))
    return parser


def conditions_of_command(argv: list[str]) -> Conditions | None:
    """Of the model that a command line names; None if it names none, which is for the whole parser to say."""
    parser = build_parser(None)
    known = {option for action in parser._actions for option in action.option_strings}
    told = [argument for argument in argv if argument not in ("-h", "--help")]
    # The value of an option that only the model's conditions can explain must not be taken for the model.
    strange = {k for k, text in enumerate(told) if text.startswith("--") and text.partition("=")[0] not in known}
    values = {k + 1 for k in strange if "=" not in told[k] and not "".join(told[k + 1 : k + 2]).startswith("--")}
    try:
        a, _ = parser.parse_known_args([text for k, text in enumerate(told) if k not in strange | values])
    except UserError:
        return None
    return Conditions.from_config(read_config(a.model, "diffusion").get("conditions", {}))


def join_negative(argv: list[str]) -> list[str]:
    """--x-s -0.3:0.3 as --x-s=-0.3:0.3: argparse would take the range for one more option."""
    joined: list[str] = []
    for token in argv:
        if re.match(r"-[0-9.]", token) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def requested(
    options: argparse.Namespace, conditions: Conditions
) -> tuple[range, dict[str, np.ndarray], dict[str, str]]:
    """The seeds (n), what is asked for, {name: (n,)}, and how that was written: a value, a range, or a file's name."""
    table = conditions.read_table(options.conditions) if options.conditions else {}
    rows = len(next(iter(table.values()), []))
    if table and (options.count or rows) > rows:
        raise UserError(
            f"{options.conditions} has {rows} lenses, --count asks for {options.count}: add some, or ask for fewer"
        )
    seeds = seed_range(options.seed, options.count or rows or 64)
    texts = asked_for(options, conditions)
    if twice := sorted(texts.keys() & table.keys()):
        raise UserError(f"{twice[0]} is asked for by an option and in {options.conditions}: leave out one of the two")
    asked = {name: values[: len(seeds)] for name, values in table.items()}
    asked |= {name: conditions.parse(name, text, seeds) for name, text in texts.items()}
    return seeds, asked, {**dict.fromkeys(table, str(options.conditions)), **texts}


def asked_for(options: argparse.Namespace, conditions: Conditions) -> dict[str, str]:
    """What the options of a command line ask for, as it was written: {name: text}."""
    texts = {name: getattr(options, CONDITION + name, None) or "" for name in conditions.names}
    texts = {name: text for name, text in texts.items() if text}
    for pair in options.set:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected NAME=VALUE")
        if name in texts:
            raise UserError(f"{name} is asked for twice, {texts[name]} and {text}: leave out one of the two")
        conditions.require(name)
        texts[name] = text
    return texts


def add_model(
    parser: argparse.ArgumentParser,
    what: str = "folder of a run or of a published model",
    default: str | None = None,
) -> None:
    """Which model (one must be named where there is no default), where and how it runs, and whose code it may run."""
    if default is None:
        parser.add_argument("model", help=what)
    else:
        parser.add_argument("model", nargs="?", default=default, help=f"{what} (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="default: the model's; fp32 where the device has no units for bf16",
    )
    parser.add_argument(
        "--trust", metavar="PACKAGE", help="whose code on this machine a model may run for its backbone"
    )


def load_model(options: argparse.Namespace) -> Generator:
    """The model of `add_model`."""
    return Generator.from_pretrained(options.model, check_device(options.device), options.trust, options.precision)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options of whatever draws samples: SETTINGS and GUIDANCE."""
    parser.add_argument("--steps", type=positive, help="evaluations of the network a lens (default: the model's)")
    parser.add_argument("--sampler", choices=names("sampler"), help="default: the model's")
    parser.add_argument("--shift", type=above_zero, help="of the grid of times; above 1: shorter steps at high noise")
    parser.add_argument("--eta", type=share, help="of ddim: 0 adds no noise on the way, 1 as much as ddpm")
    parser.add_argument(
        "--guidance",
        type=zero_or_above,
        help="away from --guide, or the model's own guide, or the model unasked; 1: none",
    )
    parser.add_argument(
        "--guidance-interval",
        type=two_numbers("LOW,HIGH with 0 <= LOW <= HIGH <= 1", lambda low, high: 0 <= low <= high <= 1),
        metavar="LOW,HIGH",
        help="of the share of noise, 0 to 1, where to guide",
    )


def chosen_settings(
    options: argparse.Namespace, generator: Generator, guide: Generator | None = None, asked: Sized = ()
) -> dict[str, Any]:
    """SETTINGS and GUIDANCE as given, or else the model's own; `times` is its fitted grid where that is used."""
    settings = generator.settings(**{key: getattr(options, key) for key in SETTINGS})
    weight = generator.require_guidance(options.guidance, guide, len(asked) > 0)
    interval = options.guidance_interval or generator.defaults["guidance_interval"]
    if settings["sampler"] == "consistency" and not generator.one_step and "distilled" not in generator.config:
        print("warning: sampler consistency is for distilled models: of others it makes blurred means", file=sys.stderr)
    return {**settings, "guidance": weight, "guidance_interval": interval}


def seed_range(first: int, count: int) -> range:
    if not 0 <= first <= SEEDS - count:
        raise UserError(f"--seed {first}: seeds run from 0 to {SEEDS - 1}, and {count} of them are needed")
    return range(first, first + count)


def draw(generator: Generator, seeds: range, **options: Any) -> Tensor:
    """All of `Generator.sample` with a progress bar: (N, C, H, W) on the CPU."""
    with bar(len(seeds), "sampling") as shown:
        parts = []
        for chunk, images in generator.sample(seeds, **options):
            parts.append(images.cpu())
            shown.update(len(chunk))
    return torch.cat(parts)


def bar(total: int, what: str, done: int = 0) -> tqdm:
    """A progress bar in lenses a second, on a terminal."""
    return tqdm(total=total, initial=done, unit="lens", desc=what, disable=None, leave=False)


if __name__ == "__main__":
    guard(main)
