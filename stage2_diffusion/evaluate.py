"""Score samples, or a model that draws them, against real images that it has never seen.

lens-ldm evaluate checkpoints/unet --reference data/lenses
lens-ldm evaluate samples.npz --reference data/lenses            (or a folder of .npy or .png, whoever made them)
python stage2_diffusion/evaluate.py checkpoints/unet --reference data/lenses --count 500 --fit 60

The test split gives two disjoint halves of COUNT images: the reference, and the other half, whose distance to the
reference is the floor that no generator can be expected to beat. Of a model, the reconstructions of that other half show
what stage 1 costs, and a conditional one is asked for its lenses. Writes metrics.json and report.html. What is measured of
each image is kept in OUT/measured, and of real ones beside their data: a run that is stopped goes on there.
"""

import argparse
import contextlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from shared.checkpoint import find_model, find_run, versions
from shared.cli import Parser, guard, two_numbers
from shared.data.cache import LensImages
from shared.data.formats import CONDITION
from shared.data.normalise import hint
from shared.errors import UserError
from shared.evaluation import judge
from shared.evaluation.files import of_files
from shared.evaluation.measure import BATCH, ImageSet, remembered, short_hash, source
from shared.evaluation.page import report
from shared.evaluation.reference import (
    LARGEST,
    NOISE_SEEDS,
    add_options,
    check_count,
    check_reference,
    chosen_networks,
)
from shared.evaluation.tables import finite
from shared.evaluation.verdict import summary
from shared.files import DAMAGED, make_folder, write_atomically
from shared.precision import check_device
from shared.report import Report, grid, loss_curves
from stage2_diffusion.generator import Generator
from stage2_diffusion.sample import (
    GUIDANCE,
    SETTINGS,
    add_model,
    add_settings,
    chosen_settings,
    join_negative,
    load_model,
    seed_range,
)

TIMED, REPEATS = 64, 3  # lenses
PATIENCE = 10.0  # seconds: what drawing some lenses to be timed, or filmed, may take
FILMED, FRAMES = 6, 12
OF_A_RUN = ("config.yaml", "last.ckpt", "config.json", "model")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model(parser, "folder of a run or of a published model, or samples: an .npz, a folder of .npy or .png, ...")
    add_options(parser)
    judge.add_options(parser)
    parser.add_argument("--samples", type=Path, help="samples.npz of this model, instead of drawing new ones")
    parser.add_argument("--seed", type=int, help="of the first sample (default: 0)")
    parser.add_argument("--guide", metavar="MODEL", help="a weaker model of the same stage 1 to be guided by")
    parser.add_argument(
        "--sample-range",
        type=two_numbers("LOW,HIGH with LOW < HIGH", lambda low, high: low < high),
        metavar="LOW,HIGH",
        help="of the values in files of samples: the ends of the data's range",
    )
    parser.add_argument("--key", metavar="NAME", help="which array of a file of samples with several")
    add_settings(parser)
    argv = join_negative(sys.argv[1:] if argv is None else argv)
    a = parser.parse_args(argv)

    # Whatever can be wrong is found before the first minute of work.
    networks = chosen_networks(a)
    reference = LensImages(a.reference)
    drawn = is_model(Path(a.model))
    path = find_run(a.model) if drawn else Path(a.model).resolve()
    out = a.out or (path / "evaluation" if drawn else path.with_name(f"{path.name}-evaluation"))
    kept = out / "measured"
    about: dict[str, Any] = {
        "command": shlex.join(["lens-ldm", "evaluate", *argv]),
        "model": a.model, "reference": a.reference, "reference_fingerprint": reference.fingerprint,
    }  # fmt: skip
    if drawn:
        if a.sample_range or a.key:
            raise UserError("--sample-range and --key are for files of samples that no model here has drawn")
        generator = load_model(a)
        count = check_reference(
            generator.autoencoder, reference, a.reference, a.count, generator.config["data"]["name"]
        )
        plan = judge.plan(a, reference, networks, count)
        guide = Generator.from_pretrained(a.guide, check_device(a.device), a.trust) if a.guide else None
        samples, asked, sampling = samples_of(a, generator, guide, reference, plan.far_places, kept)
        if guide is None and sampling.get("guide"):
            guide = guide_of(sampling, a)
        about |= {"weights_sha256": generator.config["sha256"], "sampling": sampling}
        candidates = {"reconstructions": reconstructions(generator, plan.far, kept), "samples": samples.stored()}
        if generator.config.get("fingerprint", {}).get("data") != reference.fingerprint and "memory" not in plan.skip:
            print(f"copies are not looked for: the model was not trained on {a.reference}", file=sys.stderr)
            plan.skip.append("memory")
    else:
        if given := [k for k in ("samples", "seed", "guide", *SETTINGS, *GUIDANCE) if getattr(a, k) is not None]:
            raise UserError(f"--{given[0].replace('_', '-')} is for a model, and {path} is none: leave it out")
        check_count(reference, a.reference, a.count)
        samples, asked = of_files(path, reference, a.sample_range, a.key), {}
        count = check_count(
            reference, a.reference, a.count or min(len(samples), LARGEST, len(reference.split("test")) // 2)
        )
        if len(samples) < count:
            raise UserError(
                f"{path} holds {len(samples)} samples, {count} are to be scored: bring more, or lower --count"
            )
        plan = judge.plan(a, reference, networks, count)
        # Files are often sorted, by class for one: any of them, and not the first.
        chosen = np.random.default_rng(0).permutation(len(samples))[:count]
        candidates = {"samples": replace(samples, kept=kept).subset(chosen)}
    if advice := hint(reference.transform, reference.index["statistics"]):
        print(f"warning: {advice}", file=sys.stderr)
    make_folder(out)
    about["samples"] = candidates["samples"].key
    evaluation = judge.judge(plan, candidates, asked)
    timed = drawn and (guide is not None or not sampling.get("guide"))
    if timed:
        # Measured once and kept, like the rest.
        about["cost"] = remembered(samples, f"cost on {machine()}", lambda: cost(generator, guide, asked, sampling))
    metrics = finite({**about, **evaluation.metrics, "versions": versions()})
    page = report(evaluation, metrics)
    if timed:
        film(page, generator, guide, asked, sampling, about["cost"]["milliseconds"])
    if drawn:
        about_training(page, path, generator.config)
    page.section("How it was made").listing(json.dumps(metrics, indent=1))
    page.write(out / "report.html")
    # Last, so that whoever finds it finds all of the rest.
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
    candidates["samples"].forget()
    print(summary(metrics))
    print(f"{out / 'metrics.json'}, {out / 'report.html'}")


def is_model(path: Path) -> bool:
    """Whether this is the folder of a model, and not samples. UserError if there is nothing, or a run without a model."""
    if path.is_file() or (path.is_dir() and not any((path / name).exists() for name in OF_A_RUN)):
        return False
    if not path.exists() and path.suffix:
        raise UserError(f"{path} does not exist: name the folder of a model, or samples")
    find_model(path)
    return True


def samples_of(
    options: argparse.Namespace,
    generator: Generator,
    guide: Generator | None,
    reference: LensImages,
    other: np.ndarray,
    kept: Path,
) -> tuple[ImageSet, dict[str, np.ndarray], dict[str, Any]]:
    """As many samples as places in `other`, drawn when they are needed: what they were asked for, and how they are drawn."""
    if options.samples:
        if given := [k for k in ("seed", "guide", *SETTINGS, *GUIDANCE) if getattr(options, k) is not None]:
            raise UserError(f"--{given[0]} says how to draw samples, and --samples brings them: give one of the two")
        sampling, asked = read_samples(options.samples, len(other), generator)
        images = of_files(options.samples, reference, key="images", trusted=True)
        return ImageSet(images.key, len(other), images.get, kept), asked, sampling
    asked = generator.conditions.of(reference, other)
    if missing := [name for name in generator.conditions.names if name not in asked]:
        print(f"{options.reference} knows no {', '.join(missing)}: the samples may have any", file=sys.stderr)
    sampling = chosen_settings(options, generator, guide, asked)
    seeds = np.asarray(seed_range(options.seed or 0, len(other)))
    whose = "" if guide is None else made_by(guide)
    told = {name: values.tolist() for name, values in asked.items()}

    def get(places: np.ndarray) -> Tensor:
        cond = {name: values[places] for name, values in asked.items()}
        return generator.images(seeds[places].tolist(), cond=cond, guide=guide, **sampling)

    key = f"samples {made_by(generator)} {json.dumps(sampling, sort_keys=True)} {seeds[0]} {whose} {digest(told)}"
    about = {**sampling, "first_seed": int(seeds[0]), **({"guide": options.guide} if guide else {})}
    return ImageSet(key, len(seeds), get, kept), asked, about


def digest(told: Mapping[str, Any]) -> str:
    """Of what lenses were asked to be, value by value."""
    return short_hash(json.dumps(told, sort_keys=True)) if told else ""


def made_by(generator: Generator) -> str:
    """What changes with whatever changes the images of a generator: weights, configuration, code, device, precision."""
    config = json.dumps(generator.config, sort_keys=True, default=str)
    decoder = sys.modules[type(generator.autoencoder).__module__.partition(".")[0]]
    code = source(sys.modules[Generator.__module__.partition(".")[0]], decoder)
    where = f"{generator.device.type} {generator.precision}"
    return f"{generator.config['sha256']} {short_hash(config)} {code} {where}"


def guide_of(sampling: Mapping[str, Any], options: argparse.Namespace) -> Generator | None:
    """What samples in a file were guided by; None, and a line that says so, where it is no longer there."""
    with contextlib.suppress(UserError):
        found = Generator.from_pretrained(sampling["guide"], check_device(options.device), options.trust)
        if found.config["sha256"] == sampling["guide_sha256"]:
            return found
    print(f"neither timed nor filmed: the guide of these samples, {sampling['guide']}, is not there", file=sys.stderr)
    return None


def read_samples(path: Path, count: int, generator: Generator) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """How this very model has drawn a samples.npz, and what the first `count` lenses in it were asked to be."""
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata, drawn = json.loads(str(file["metadata"])), len(file["seeds"])
            asked = {n: file[CONDITION + n][:count] for n in generator.conditions.names if CONDITION + n in file}
    except DAMAGED as error:
        raise UserError(f"{path} is no samples.npz of `lens-ldm sample` ({error}): draw the samples again") from error
    if metadata.get("weights_sha256") != generator.config["sha256"]:
        raise UserError(f"{path} was drawn from another model ({metadata.get('model')}): draw the samples again")
    if not metadata["observed"]:
        raise UserError(f"{path} holds clean images, which real ones are not: draw the samples without --clean")
    if drawn < count:
        raise UserError(f"{path} holds {drawn} samples, {count} are to be scored: draw more, or lower --count")
    return {k: metadata.get(k) for k in (*SETTINGS, *GUIDANCE, "guide", "guide_sha256", "times", "first_seed")}, asked


def reconstructions(generator: Generator, images: ImageSet, kept: Path) -> ImageSet:
    """These images through the autoencoder and back, with new pixel noise."""

    def get(chosen: np.ndarray) -> Tensor:
        parts = zip(images.get(chosen).split(BATCH), np.split(chosen, range(BATCH, len(chosen), BATCH)), strict=True)
        return torch.cat([generator.reconstruct(part, (NOISE_SEEDS + where).tolist()) for part, where in parts])

    return ImageSet(f"reconstructions {made_by(generator)} {NOISE_SEEDS} {images.key}", len(images), get, kept)


def machine() -> str:
    return f"{platform.node()} {platform.processor()} {torch.get_num_threads()} {torch.__version__}"


def options_of(
    guide: Generator | None, asked: Mapping[str, np.ndarray], sampling: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """What `Generator.sample` is told for the first `count` of the samples."""
    keys = (*SETTINGS, *GUIDANCE, "times")
    cond = {name: np.resize(values, count) for name, values in asked.items()}
    return {**{key: sampling[key] for key in keys if sampling.get(key) is not None}, "cond": cond, "guide": guide}


def cost(
    generator: Generator, guide: Generator | None, asked: Mapping[str, np.ndarray], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """GFLOP a lens, decoder and guide included, and milliseconds a lens, TIMED at once (median of REPEATS), or fewer where
    that would take longer than PATIENCE."""

    def seconds(count: int) -> float:
        told, started = options_of(guide, asked, sampling, count), time.perf_counter()
        generator.images(range(count), **told)
        return time.perf_counter() - started

    at_once, taken = 1, [seconds(1)]  # to warm up, and all there is of what takes minutes
    if taken[0] < PATIENCE:
        took = seconds(1)
        while at_once < TIMED and 2 * took < PATIENCE / REPEATS:  # several may take as long as one
            at_once = min(2 * at_once, TIMED)
            took = seconds(at_once)
        taken = [took, *(seconds(at_once) for _ in range(REPEATS - 1))]
    return {
        "gflop": generator.gflop(**options_of(guide, asked, sampling, 1)),
        "milliseconds": 1000 * float(np.median(taken)) / at_once, "at_once": at_once,
        "device": str(generator.device), "threads": torch.get_num_threads(), "precision": generator.precision,
    }  # fmt: skip


def film(
    page: Report,
    generator: Generator,
    guide: Generator | None,
    asked: Mapping[str, np.ndarray],
    sampling: Mapping[str, Any],
    milliseconds: float,
) -> None:
    """How the first lenses come about: what each is taken for at every step; fewer of those that take long."""
    first, transform = sampling["first_seed"], generator.autoencoder.transform
    count = max(1, min(FILMED, int(1000 * PATIENCE / milliseconds)))
    states = generator.trajectory(range(first, first + count), **options_of(guide, asked, sampling, count))
    chosen = sorted({round(k) for k in np.linspace(0, len(states) - 1, FRAMES)})
    title = "evaluation {} of {}: what each will be, without pixel noise"
    frames = [grid(transform.unit(states[k]), FILMED, title=title.format(k + 1, len(states))) for k in chosen]
    page.section("How lenses come about").film(frames, "the denoising of the first samples")


def about_training(page: Report, model: Path, config: Mapping[str, Any]) -> None:
    """Loss curves, where the model's runs are still there, and its configuration."""
    runs = {"stage 2": model / "metrics.csv"}
    if config["training"]["autoencoder"] != "pixels":
        runs = {"stage 1": Path(config["training"]["autoencoder"]) / "metrics.csv", **runs}
    if curves := loss_curves(runs):
        page.section("Training").picture(curves, "loss curves")
    page.section("Configuration of stage 2").listing(yaml.safe_dump(config["training"], sort_keys=False))


if __name__ == "__main__":
    guard(main)
