"""What a training step and a lens cost, beside other people's systems: operations, time and memory, side by side.

lens-ldm benchmark
lens-ldm benchmark checkpoints/unet --against diffusers --rounds 9 --threads 2

ours             a published model or a run: its network and batch trained on by our loop, lenses drawn by its own defaults
diffusers        a UNet2DModel as large and as dear as our network, trained by diffusers' example script, 50 steps of DDIM
diffusers-short  the same, drawing in as many steps as ours
pixel-ddpm       denoising-diffusion-pytorch at 128 pixels and 1,000 steps, of which a few are timed and multiplied

The last three need `pip install -e '.[benchmark]'`. Each has a process of its own for training and one for sampling.
They take turns, round by round: a machine that is slow for a while is slow for all of them, and the ratios of a round are
what counts. Writes benchmark.json after each round, and benchmark.md; the same command again goes on where it stopped, with
more --rounds it adds some. Nothing here needs data: speed does not depend on what is learned.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shared.checkpoint import read_config, versions
from shared.cli import Parser, above_zero, positive
from shared.errors import UserError
from shared.files import make_folder, markdown, resumed, write_atomically
from shared.precision import check_device, named_device, usable_precision
from stage2_diffusion.baselines.systems import OURS, SYSTEMS, TIMESTEPS, Plan, work
from stage2_diffusion.sample import add_model

Job = tuple[str, str]  # a system, and train or sample
Ask = Callable[..., Any]
Round = dict[
    str, dict[str, list[float]]
]  # of each system: train, in images/s, and sample, in seconds a lens; by each clock
CLOCKS = ("time", "processor time")
RATES = {"train": "images/s", "sample": "seconds a lens"}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model(parser, default="deeplense-unet")
    known = others(SYSTEMS)
    parser.add_argument("--against", nargs="*", default=known, metavar="SYSTEM", help="default: all; or none")
    parser.add_argument("--rounds", type=positive, default=5, help="default %(default)s")
    parser.add_argument("--seconds", type=above_zero, default=2.0, help="a turn, at least (default %(default)s)")
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="default: torch's, %(default)s"
    )
    parser.add_argument(
        "--batch", type=positive, help="images of a training step on latents (default: the model's own)"
    )
    parser.add_argument("--lenses", type=positive, default=16, help="drawn at once on latents (default %(default)s)")
    parser.add_argument(
        "--pixel-batch", type=positive, default=4, help="images of a step of pixel-ddpm, in both (default %(default)s)"
    )
    parser.add_argument(
        "--pixel-steps",
        type=positive,
        default=2,
        help=f"of the {TIMESTEPS:,} of a lens that are timed (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder (default %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    if unknown := [name for name in a.against if name not in known]:
        raise UserError(f"--against {unknown[0]}: there are {', '.join(known)}")
    chosen = [name for name in SYSTEMS if name == OURS or name in a.against]
    require_libraries(chosen)
    config = read_config(a.model, "diffusion")
    device = named_device(check_device(a.device))
    if device.index:
        raise UserError(
            f"training runs on the first GPU that is seen: CUDA_VISIBLE_DEVICES={device.index}, --device cuda"
        )
    precision = a.precision or usable_precision(config["precision"], device)
    plan = Plan(
        a.model, "", a.trust, device.type, precision, a.batch or config["training"]["data"]["batch_size"],
        a.lenses, a.pixel_batch, a.pixel_steps,
    )  # fmt: skip
    about = {
        "model": config["sha256"], "systems": chosen, "machine": machine(device, a.threads), "precision": plan.precision,
        "batch": plan.batch, "lenses": plan.lenses, "pixel_batch": plan.pixel_batch, "pixel_steps": plan.pixel_steps,
        "seconds": a.seconds, "versions": versions_of(chosen),
    }  # fmt: skip
    make_folder(a.out)
    path = a.out / "benchmark.json"
    rounds: list[Round] = resumed(path, about, "rounds") or []
    facts: dict[str, Any] = resumed(path, about, "facts") or {}
    content = {"command": shlex.join(["lens-ldm", "benchmark", *argv]), "name": a.model, **about}
    if len(rounds) < a.rounds:
        jobs = [(name, task) for name in chosen for task in tasks(name, config)]
        numbers = range(len(rounds), a.rounds)
        for now, found in measure(jobs, plan, a.threads, a.seconds, numbers, facts):
            facts = now
            rounds.append(found)
            kept = {**content, "facts": facts, "rounds": rounds, "summary": summary(rounds)}
            write_atomically(path, (json.dumps(kept, indent=1) + "\n").encode())
    page = f"{table(facts, rounds)}\n\n{notes(content, facts, len(rounds))}"
    write_atomically(a.out / "benchmark.md", f"{page}\n".encode())
    print(page)
    print(f"\n{path}, {a.out / 'benchmark.md'}")


def others(systems: Iterable[str]) -> list[str]:
    return [name for name in systems if name != OURS]


def require_libraries(systems: Sequence[str]) -> None:
    """UserError for the first of these systems that needs a package which is not here."""
    for name in others(systems):
        for library in SYSTEMS[name].libraries:
            package = library.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                rest = [other for other in others(systems) if package not in str(SYSTEMS[other].libraries)]
                without = " ".join(["--against", *rest])
                raise UserError(
                    f"{name} needs {package.replace('_', '-')}: `pip install -e '.[benchmark]'`, or leave it out: {without}"
                )


def tasks(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is measured of a system. Our loop is that of denoisers: of a GAN or a distilled student, sampling alone."""
    if name == OURS and ("gan" in config or "teacher" in config["training"]):
        return ("sample",)
    return SYSTEMS[name].tasks


# --- rounds and ratios ------------------------------------------------------------------------------------------------


class Worker:
    """`work` in a process of its own. Call it with a question for the answer; UserError if there is none."""

    def __init__(self, job: Job, plan: Plan, threads: int) -> None:
        # Where one process can load all libraries for all: CUDA does not survive a fork.
        context: Any = get_context("forkserver" if plan.device == "cpu" and sys.platform != "win32" else "spawn")
        self.job = job
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *job, plan, threads), daemon=True)
        # Ctrl-C reaches all processes of a terminal: it is for this one, which ends the others, and they inherit that.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()

    def __call__(self, *question: Any) -> Any:
        try:
            self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise UserError(
                f"{' '.join(self.job)} ended with code {self.process.exitcode}, which is -9 where memory ran out: "
                "lower --batch, --lenses or --pixel-batch"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End it: by itself, unless it is in the middle of a step."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


def measure(
    jobs: Sequence[Job], plan: Plan, threads: int, seconds: float, numbers: Sequence[int], known: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Round]]:
    """The facts of each system and the numbered rounds, one by one; `known` has the facts of earlier rounds."""
    set_forkserver_preload([library for name, _ in jobs for library in SYSTEMS[name].libraries])
    with (
        ExitStack() as stack,
        tqdm(total=len(jobs) * (1 + len(numbers)), unit="turn", disable=None, dynamic_ncols=True) as bar,
    ):
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers: dict[Job, Worker] = {}
        for job in jobs:  # side by side: to load takes longer than a turn
            workers[job] = Worker(job, Plan(**{**vars(plan), "folder": folder}), threads)
            stack.callback(workers[job].close)
        facts: dict[str, Any] = {}
        for job, worker in workers.items():
            name, task = job
            bar.set_description_str(f"{name}, {task}: loading")
            own = facts.setdefault(name, {"memory": {}, "counted": {}}) | worker("facts")
            own["counted"][task] = worker("count")  # and so each has warmed up
            facts[name] = own
            bar.update()
        for number in numbers:
            found: Round = {}
            for job, rates in one_round(workers, number, seconds):
                name, task = job
                found.setdefault(name, {})[task] = rates
                before = known.get(name, {}).get("memory", {}).get(task, 0)
                facts[name]["memory"][task] = max(before, workers[job]("memory"))
                bar.set_description_str(f"{name}, {task}: {rates[0]:.3g} {RATES[task]}")
                bar.update()
            yield facts, found


def one_round(workers: Mapping[Job, Ask], number: int, seconds: float) -> Iterator[tuple[Job, list[float]]]:
    """Each job's rates, one after the other; each round begins with another one, so that none always follows the same way."""
    jobs = list(workers)
    start = number % len(jobs)
    for job in jobs[start:] + jobs[:start]:
        yield job, workers[job]("time", seconds)


def summary(rounds: Sequence[Round]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each system and task: `median` of its rates over rounds, and by each of CLOCKS [median, least, largest] over rounds
    of ours over its images/s, or of its seconds over ours: above 1 where ours is faster. None where ours has no such rate."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in SYSTEMS if name in rounds[0]}
    for name, rates in rounds[0].items():
        for task in rates:
            cell: dict[str, Any] = {"median": statistics.median(one[name][task][0] for one in rounds)}
            for k, clock in enumerate(CLOCKS):
                pairs = [(one[name][task][k], one[OURS][task][k]) for one in rounds if task in one[OURS]]
                ratios = [ours / its if task == "train" else its / ours for its, ours in pairs]
                cell[clock] = [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None
            found[name][task] = cell
    return found


# --- what it comes to -------------------------------------------------------------------------------------------------


def table(facts: Mapping[str, Any], rounds: Sequence[Round]) -> str:
    """Markdown: a column for each system."""
    found = summary(rounds)

    def rated(task: str, key: str) -> Callable[[str], str]:
        def cell(name: str) -> str:
            rate = found[name].get(task)
            if rate is None or rate[key] is None:
                return "–"
            if key == "median":
                return short(rate["median"])
            return "1" if name == OURS else "{} ({} to {})".format(*map(short, rate[key]))

        return cell

    def counted(task: str) -> Callable[[str], str]:
        return lambda name: short(facts[name]["counted"][task]) if task in facts[name]["counted"] else "–"

    def memory(task: str) -> Callable[[str], str]:
        return lambda name: short(facts[name]["memory"][task] / 1e6) if task in facts[name]["memory"] else "–"

    def times_ours(name: str) -> str:
        return short(facts[name]["counted"]["sample"] / facts[OURS]["counted"]["sample"])

    rows: list[tuple[str, Callable[[str], str]]] = [
        ("parameters, million", lambda name: short(facts[name]["parameters"] / 1e6)),
        ("GFLOP an evaluation of the network", lambda name: short(facts[name]["gflop"])),
        ("GFLOP a training step and image", counted("train")),
        ("images/s in training", rated("train", "median")),
        *((f"ours over it, in {clock}", rated("train", clock)) for clock in CLOCKS),
        ("peak memory in training, MB", memory("train")),
        ("evaluations a lens", lambda name: f"{facts[name]['steps']:,}"),
        ("GFLOP a lens, decoder included", counted("sample")),
        ("it over ours", times_ours),
        ("seconds a lens", rated("sample", "median")),
        *((f"it over ours, in {clock}", rated("sample", clock)) for clock in CLOCKS),
        ("peak memory in sampling, MB", memory("sample")),
    ]
    return markdown([["", *found], *([text, *map(cell, found)] for text, cell in rows)])


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def notes(about: Mapping[str, Any], facts: Mapping[str, Any], rounds: int) -> str:
    """How the table was made, and what of it is no plain measurement."""
    m = about["machine"]
    latents = facts[OURS]
    lines = [
        f"`{about['command']}`: {about['name']} on {m['name']} ({m['capability']}, {m['cores']} cores), "
        f"threads: {m['threads']}, {about['precision']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}.",
        f"Medians of {rounds} rounds, in which all took turns of {about['seconds']:g} s or more; ratios are of one round, "
        "their median with least and largest. Processor time leaves out what other programs took, and on a GPU its work.",
        f"Training on {latents['batch']} images a step, sampling {latents['lenses']} lenses at once. Peak memory is over that "
        "of Python and its libraries, or of tensors on a GPU.",
    ]
    if any(name.startswith("diffusers") for name in facts):
        other = next(f for name, f in facts.items() if name.startswith("diffusers"))
        lines.append(
            f"diffusers has a UNet2DModel of {other['gflop'] / latents['gflop']:.2f} times our GFLOP and "
            f"{other['parameters'] / latents['parameters']:.2f} times our parameters, our decoder, and latents that were "
            "encoded before, as ours."
        )
    if "pixel-ddpm" in facts:
        f = facts["pixel-ddpm"]
        lines.append(
            f"pixel-ddpm: {f['batch']} images at once; {f['taken']} of its {f['steps']:,} steps a lens were taken in a "
            "turn's batch, and time and GFLOP multiplied."
        )
    return "\n".join(f"* {line}" for line in lines)


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers are of."""
    if device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(device),
            "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
        )
    else:
        name, capability = processor(), torch.backends.cpu.get_cpu_capability()
    return {"name": name, "capability": capability, "cores": os.cpu_count(), "threads": threads}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions_of(systems: Sequence[str]) -> dict[str, str]:
    """Of this project, torch and the packages of these systems."""
    packages = dict.fromkeys(
        library.partition(".")[0].replace("_", "-") for name in others(systems) for library in SYSTEMS[name].libraries
    )
    return {**versions(), **{package: version(package) for package in packages}}
