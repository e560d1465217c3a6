"""Train and score the cells of an ablation, one after the other: FILE says in which keys they differ.

lens-ldm ablate ablations/stage1.yaml --list
lens-ldm ablate configs/ablations/stage1.yaml --only vq fsq --data.path data/lenses

A cell is trained through stage 1, scored, then through stage 2 on its latents, sampled and scored. <output>/<name> gets a
folder of each run, ablation.json and the table ablation.md, both written anew after every part. The same command goes on
where it stopped; a finished cell is not repeated, one that fails is noted and the next one goes on. Given a second time while
the first still runs, it takes cells that nobody is at: as many at once as there are idle cores or GPUs.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import Parser
from shared.config import load_config, to_dict
from shared.errors import UserError, hint
from shared.explain import describe
from shared.files import claimed, make_folder, markdown, write_atomically
from shared.quickstart import clock, script
from shared.schema import Ablation, AblationScores, Stage1, Stage2

if TYPE_CHECKING:
    from shared.data.cache import LensImages

Record = dict[str, Any]  # of a cell: status, stage1, stage2, data, evaluate, seconds, scores, error
FORWARD_TO_STEP = 3  # a training step takes a forward pass and, for the backward one, twice as much again
ABOUT = """\
Excesses: of the Fréchet distance over that of real images to real images, whose scatter is behind ±. rFD: of observed \
reconstructions; FD: of samples. PSNR and lit error / noise: of clean reconstructions against the clean truth; lenses: share of \
the observed ones, and of the samples, that a lens model fits at the noise level. GFLOP: of encoding and decoding an image. \
TFLOP: of training stage 1. Seconds: of all parts.
"""
STATES = {"done": "done", "failed": "failed", "begun": "begun, goes on", None: "to do"}


def main(argv: list[str] | None = None) -> None:
    keys = "\n".join(f"  --{key:<24} {default:<28} {text}" for key, default, text in describe(Ablation))
    parser = Parser(
        "lens-ldm ablate",
        description=__doc__,
        epilog=f"keys of FILE, also as --KEY VALUE:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="YAML, such as ablations/stage1.yaml")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cells alone")
    parser.add_argument("--list", action="store_true", help="show the cells and what is done, and stop")
    options, overrides = parser.parse_known_args(argv)
    ablation = load_config(Ablation, [options.file], overrides)
    cells = chosen(ablation, options.only)
    for cell in cells:
        ablation.stages(cell)  # a mistake in any cell is told before the first one starts
    results = Results(ablation)
    known = results.cells
    if options.list:
        for cell in cells:
            print(f"{cell:24} {STATES[known.get(cell, {}).get('status')]:16} {ablation.overrides()[cell]}")
        return
    failed = run(ablation, cells, results)
    print(results.table(cells))
    print(results.folder / "ablation.md")
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed, the others are done: {', '.join(failed)}")


def chosen(ablation: Ablation, only: Sequence[str] | None) -> list[str]:
    """The names of the cells to run, in the order of the file. UserError for one that is not there."""
    known = list(ablation.overrides())
    for name in only or ():
        if name not in known:
            raise UserError(f"--only {name}: no such cell{hint(name, known)}")
    return [name for name in known if not only or name in only]


class Results:
    """ablation.json and ablation.md of an ablation. Other cells of the file are left alone: several commands write it by
    turns."""

    def __init__(self, ablation: Ablation) -> None:
        self.ablation, self.folder = ablation, Path(ablation.output) / ablation.name

    @property
    def cells(self) -> dict[str, Record]:
        """As the file has them now. UserError if it cannot be read."""
        path = self.folder / "ablation.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text())["cells"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): delete it, and finished trainings are scored again"
            ) from error

    def save(self, cell: str, record: Record) -> None:
        order = {name: k for k, name in enumerate(self.ablation.overrides())}
        with claimed(self.folder / ".lock", wait=True):
            cells = sorted({**self.cells, cell: record}.items(), key=lambda item: order.get(item[0], len(order)))
            content = {"name": self.ablation.name, "cells": dict(cells)}
            write_atomically(self.folder / "ablation.json", (json.dumps(content, indent=1) + "\n").encode())
            about = f"# {self.ablation.name}\n\n{self.table()}\n\n{ABOUT}"
            write_atomically(self.folder / "ablation.md", about.encode())

    def table(self, cells: Sequence[str] | None = None) -> str:
        """Markdown: a row for each cell that was begun."""
        rows = [["cell", "rFD excess", "PSNR [dB]", "lit error / noise", "lenses", "FD excess", "samples: lenses", "GFLOP",
                 "codes used", "steps", "TFLOP", "seconds", "n"]]  # fmt: skip
        found = self.cells
        for name in found if cells is None else cells:
            record = found.get(name, {})
            s, state = record.get("scores", {}), record.get("status")
            note = {"done": "", "failed": f" (failed: {record.get('error')})"}.get(state or "", " (not finished)")
            values = [
                _excess(s, "rfd"), _number(s.get("psnr"), ".2f"), _number(s.get("lit_error_over_noise"), ".4f"),
                _number(s.get("lens_share"), ".0%"),
                _excess(s, "fd"), _number(s.get("fd_lens_share"), ".0%"), _number(s.get("gflop"), ".2f"),
                _number(s.get("codes_used"), ".1%") if s.get("levels_used") is None else f"{s['levels_used']:.0%} of levels",
                _number(record.get("stage1", {}).get("trainer", {}).get("max_steps"), "d"), _number(s.get("tflop"), ".1f"),
                _number(sum(record.get("seconds", {}).values()) or None, ".0f"), _number(s.get("n"), "d"),
            ]  # fmt: skip
            rows.append([name + note, *values])
        return markdown(rows)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _excess(scores: dict[str, Any], name: str) -> str:
    if scores.get(f"{name}_excess") is None:
        return "–"
    return f"{scores[f'{name}_excess']:.2f} ± {scores[f'{name}_floor_sd']:.2f} (floor {scores[f'{name}_floor']:.2f})"


# --- cells ------------------------------------------------------------------------------------------------------------


def run(ablation: Ablation, cells: Sequence[str], results: Results) -> list[str]:
    """Run these cells -> the names of those that failed."""
    from shared.data.cache import LensImages
    from shared.evaluation.reference import check_count

    images = LensImages(ablation.data.path)
    check_count(images, ablation.data.path, ablation.evaluate.count)
    if ablation.evaluate.fit:  # images that its lens models cannot make are told now, not after the first training
        script("stage1_vqvae.evaluate", "LensShare")(ablation.evaluate.preset, images, ablation.evaluate.fit)
    make_folder(results.folder, "--output")
    plans, known = {cell: plan(ablation, cell, images) for cell in cells}, results.cells
    for cell, planned in plans.items():
        check_unchanged(results.folder, cell, known.get(cell), planned)
    failed, begun = [], time.perf_counter()
    for k, (cell, planned) in enumerate(plans.items()):
        place = f"[{k + 1}/{len(plans)}] {cell}"
        with claimed(results.folder / f".{cell}.lock") as mine:
            if not mine:
                print(f"{place}: another process is at it", flush=True)
                continue
            record = continued(results.cells.get(cell), planned, results.folder)  # another may have done it meanwhile
            if record["status"] == "begun":
                print(f"{place}, {clock(time.perf_counter() - begun)} since the start", flush=True)
                record = run_cell(ablation, cell, record, results)
        if record["status"] == "failed":
            failed.append(cell)
            print(f"{place} failed: {record['error']}", flush=True)
    return failed


def plan(ablation: Ablation, cell: str, images: "LensImages") -> Record:
    """What makes a cell what it is: its resolved configs, the data, how it is scored, and what its training costs."""
    stage1, stage2 = ablation.stages(cell)
    operations = step_flops(stage1, images)
    if ablation.budget.tflop:
        stage1, _ = ablation.stages(cell, max(1, round(ablation.budget.tflop * 1e12 / operations)))
    return {
        "stage1": to_dict(stage1),
        "stage2": to_dict(stage2) if stage2 else None,
        "data": images.fingerprint,
        "evaluate": to_dict(ablation.evaluate),
        "tflop": operations * stage1.trainer.max_steps / 1e12,
    }


def step_flops(config: Stage1, images: "LensImages") -> float:
    """Operations of one training step of the autoencoder; what a loss computes beside it is not counted."""
    from shared.flops import flops
    from shared.registry import build

    spec = to_dict(config)["autoencoder"]
    network = build("autoencoder", spec, image_shape=images.image_shape, transform=images.transform).eval()
    return FORWARD_TO_STEP * 1e9 * sum(flops(network).values()) * config.data.batch_size


def check_unchanged(folder: Path, cell: str, record: Record | None, planned: Record) -> None:
    """UserError if the cell has been begun with other data or another config, and its runs are still there."""
    for stage, schema in (("stage1", Stage1), ("stage2", Stage2)):
        path = folder / f"{cell}-{stage}"
        if not record or not path.exists() or not record.get(stage) or not planned[stage]:
            continue
        other = record["data"] != planned["data"]
        if changed := "other data" if other else _changes(schema, record[stage], planned[stage]):
            raise UserError(
                f"cell {cell} was begun with another configuration of {stage} ({changed}): give the cell another name, "
                f"or delete {path}{' and what stands on it, ' + cell + '-stage2,' if stage == 'stage1' else ''} to run it again"
            )


def _resolved(schema: type[Stage1] | type[Stage2], tree: dict[str, Any] | None) -> dict[str, Any]:
    """A config of a record; keys that were added since had their defaults there."""
    with suppress(UserError):
        return to_dict(load_config(schema, [], tree)) if tree else {}
    return tree or {}


def _changes(schema: type[Stage1] | type[Stage2], before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """What makes these the configs of two runs, in words."""
    from shared.run import differences  # with torch, which --list and a typo need not wait for

    return differences(_resolved(schema, before), after or {})


def continued(record: Record | None, planned: Record, folder: Path) -> Record:
    """The record of a cell with what still holds of it: status `begun`, or `done` or `failed` if nothing is left to do."""
    fresh: Record = {"status": "begun", **planned, "seconds": {}, "scores": {"tflop": planned["tflop"]}}
    if record is None or record["data"] != planned["data"] or _changes(Stage1, record["stage1"], planned["stage1"]):
        return fresh
    second = planned["stage2"]  # without one nothing is asked of it
    # Of the same runs, but how samples are drawn may have changed, or what is measured of them.
    sampled = second is None or _resolved(Stage2, record["stage2"]).get("sampling") == second["sampling"]
    fitted = second is None or not planned["evaluate"]["fit"] or "fd_lens_share" in record["scores"]
    scored = {**to_dict(AblationScores()), **record["evaluate"]} == planned["evaluate"]
    runs = {stage: folder / planned[stage]["name"] for stage in ("stage1", "stage2") if planned[stage]}
    same = scored and sampled and not (second and _changes(Stage2, record["stage2"], second))
    # Whoever deletes the runs of a finished cell keeps its results; of a failed one, wants to try it again.
    if same and {"done": fitted, "failed": runs["stage1"].exists()}.get(record["status"]):
        return record
    first = scored and (runs["stage1"] / "model").exists()
    if first:
        fresh["scores"] |= {key: value for key, value in record["scores"].items() if not key.startswith("fd_")}
    redone = record["status"] != "begun"  # what was interrupted goes on, and its time with it
    for part, seconds in record["seconds"].items():
        what, _, number = part.partition(" stage ")
        there = f"stage{number}" in runs and runs[f"stage{number}"].exists()
        if there and (what == "train" or (first if number == "1" else not redone)):
            fresh["seconds"][part] = seconds
    return fresh


def run_cell(ablation: Ablation, cell: str, record: Record, results: Results) -> Record:
    """Do what is left of a cell, saving its record after each part -> the record, `done` or `failed`."""
    import torch

    stage1, stage2 = ablation.stages(cell, record["stage1"]["trainer"]["max_steps"])
    models = [f"{stage.output}/{stage.name}" for stage in (stage1, stage2) if stage]
    e, device = ablation.evaluate, "cpu" if stage1.trainer.accelerator == "cpu" else "auto"
    common = ["--reference", ablation.data.path, "--device", device, *(["--count", str(e.count)] if e.count else [])]
    common += ["--preset", e.preset] if e.preset else []
    scored = [*common, *(["--fit", str(e.fit)] if e.fit else [])]
    sampled = [*common, "--fit", str(e.fit), "--skip", "two-sample", *(["--steps", str(e.steps)] if e.steps else [])]
    parts: dict[str, Callable[[], Any]] = {
        "train stage 1": lambda: script("stage1_vqvae.pipeline")(stage1),
        "score stage 1": lambda: script("stage1_vqvae.evaluate", "main")([models[0], *scored]),
    }
    if "psnr_observed" in record["scores"]:  # the training is complete, and so are its scores
        parts = {}
    if stage2:
        parts |= {
            "train stage 2": lambda: script("stage2_diffusion.pipeline")(stage2),
            "score stage 2": lambda: script("stage2_diffusion.evaluate", "main")([models[1], *sampled]),
        }
    results.save(cell, record)
    try:
        for what, part in parts.items():
            print(f"{cell}: {what}", flush=True)
            started = time.perf_counter()
            try:
                part()
                if what.startswith("score"):
                    record["scores"] |= read_scores(Path(models[what == "score stage 2"]), what == "score stage 2")
            finally:  # an interrupted part has taken its time, too
                taken = record["seconds"].get(what, 0.0) + time.perf_counter() - started
                record["seconds"][what] = round(taken, 1)
                results.save(cell, record)
        record["status"] = "done"
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, UserError) and error.__cause__ is not None:
            raise  # it says what this machine lacks, such as space on its disk: that is no result of the cell
        record |= {"status": "failed", "error": str(error).splitlines()[0]}
    results.save(cell, record)
    return record


def read_scores(model: Path, of_samples: bool) -> dict[str, Any]:
    """What the table shows of a metrics.json of stage 1 or 2; null where a number is not known."""
    metrics = json.loads((model / "evaluation" / "metrics.json").read_text())
    distances = next(iter(metrics["distances"].values()))  # of fd_efflite0

    def excess(name: str, of: str) -> dict[str, Any]:
        return {f"{name}_{key}": distances[of][key] for key in ("excess", "floor", "floor_sd", "distance")}

    if of_samples:
        fits = metrics.get("lens_fits")
        return excess("fd", "samples") | ({"fd_lens_share": fits["samples"]["share"]} if fits else {})
    truth, cost, codes = metrics["truth"] or {}, metrics["cost"], metrics["codes"] or {}
    return excess("rfd", "reconstructions") | {
        "n": metrics["n"],
        "psnr": truth.get("psnr"),
        "lit_error_over_noise": truth.get("lit_error_over_noise"),
        "psnr_observed": metrics["observed"]["psnr"],
        "clean_error_over_noise": metrics["observed"]["clean_error_over_noise"],
        "gflop": cost["encode_gflop"] + cost["decode_gflop"],
        "codes_used": None if "levels_used" in codes else codes.get("codes_used"),
        "levels_used": sum(codes["levels_used"]) / len(codes["levels_used"]) if "levels_used" in codes else None,
        "perplexity": codes.get("perplexity"),
        **({"lens_share": metrics["lens_fits"]["reconstructions"]["share"]} if "lens_fits" in metrics else {}),
    }
