"""`lens-ldm models`: what can be sampled by name, from ./checkpoints and from the checkout that this package lies in.

Runs and published models alike. `excess` is the Fréchet distance to real images over that of real images to others, with
the number of images a side; `lenses` the share at the level of their noise. Both are those of `lens-ldm evaluate`, where it
has scored the very weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint import folders, known_models, read_config
from shared.cli import Parser
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.files import markdown
from shared.registry import build
from shared.sampling import SAMPLING, settings_of


def main(argv: list[str] | None = None) -> None:
    Parser("lens-ldm models", description=__doc__).parse_args(argv)
    rows = [["name", "data", "latent", "backbone", "evaluations", "MB", "excess", "lenses"]]
    for name, folder in known_models():
        try:
            config = read_config(folder)
            if config["kind"] == "diffusion":  # stage 1 alone draws nothing
                rows.append([name, *describe(folder, config)])
        except UserError as error:
            print(f"{name}: {error}")
    if len(rows) == 1:
        places = " nor in ".join(map(str, folders()))
        print(f"there is no model in {places}: `lens-ldm quickstart` makes one")
        return
    print(markdown(rows))
    print("\n`lens-ldm sample NAME` draws lenses, NAME/README.md has more")


def describe(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The cells of a model, from its config.json and what is known of its quality."""
    sampling, weights = config["sampling"], folder / "model.safetensors"
    channels, height, width = latent_shape(config["autoencoder"])
    scores = config.get("scores") or scores_of(folder, config) or {}
    distance, lenses = scores.get("fd_efflite0"), scores.get("lenses")
    return [
        f"{config['data']['name']}, {config['data']['images']}",
        f"{height}×{width}×{channels}",
        network_name(config),
        "1" if "gan" in config else f"{sampling['steps']} {sampling['sampler']}",
        f"{weights.stat().st_size / 1e6:.1f}" if weights.is_file() else "no weights",
        f"{distance['excess']:.2f} ({distance['n']})" if distance else "–",
        f"{lenses['share']:.0%}" if lenses else "–",
    ]


def network_name(config: Mapping[str, Any]) -> str:
    """Of a config.json of stage 2: a backbone of ours or its author's class, or a GAN."""
    network = config["gan"] if "gan" in config else config["backbone"]
    return str(network.get("class_path", network["name"]))


def latent_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Of the autoencoder of a config.json, without its weights."""
    try:
        with torch.device("meta"):
            transform = PixelTransform.from_config(config)
            model = build("autoencoder", config["spec"], image_shape=tuple(config["image_shape"]), transform=transform)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"its config.json is damaged ({error}): train or download it again") from error
    return model.latent_shape


def scores_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`headline` of the evaluation of a model, which lies beside it or in its run; None where there is none of these weights."""
    run = folder.parent if folder.name == "model" else folder
    try:
        metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    except (OSError, ValueError):
        return None
    its_own = metrics.get("weights_sha256") == config["sha256"] and not drawn_otherwise(metrics, config)
    return headline(metrics) if its_own else None


def drawn_otherwise(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How the samples of a metrics.json differ from what the model draws unless it is told otherwise, in words; empty if they
    do not: the same weights make other lenses by another sampler, grid or guidance."""
    drawn, own = metrics.get("sampling") or {}, SAMPLING | config["sampling"]
    usual = settings_of(own) | {"guide": None} | {key: own[key] for key in ("guidance", "guidance_interval")}
    return "; ".join(f"{key} {drawn.get(key)}, not {value}" for key, value in usual.items() if drawn.get(key) != value)


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of models says of a metrics.json of `lens-ldm evaluate`: its distances of samples by their names (each
    with n), lenses {share, interval, n; by lit pixels alone share_lit, interval_lit}, what was asked for and found in them
    {parameter: {n, bias, scatter, r2}}, and the cost of a lens (gflop, milliseconds, device, threads, precision)."""
    keys = ("distance", "floor", "floor_sd", "excess", "n")
    found: dict[str, Any] = {
        metric: {key: scores["samples"][key] for key in keys} for metric, scores in metrics["distances"].items()
    }
    if fits := metrics.get("lens_fits"):
        kept = ("share", "interval", "share_lit", "interval_lit", "n")
        for name, of in (("lenses", "samples"), ("real_lenses", "real")):
            found[name] = {key: fits[of][key] for key in kept if key in fits[of]}
        if asked := fits["samples"].get("parameters"):
            found["asked"] = asked
    return {**found, "reference": Path(metrics["reference"]).name, "cost": metrics.get("cost") or {}}
