"""A run's model as a folder to share: three files, with the weights at half precision and a card of what it is worth.

lens-ldm publish checkpoints/my-run --out checkpoints/my-model --dtype bf16

The weights of layers are stored as they are told, all else in fp32; whoever loads them computes with fp32 of them. Clean
samples of both are compared: an image may differ by --tolerance, in root mean square, as a share of the range of the pixels,
or else nothing is published. Scores come from the run's evaluation/metrics.json (`lens-ldm evaluate`), which must be of these
very weights; so do the known failures.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.checkpoint import HALF, HUB, find_run, load, parts_of, publish, state_of
from shared.cli import Parser, above_zero
from shared.errors import UserError
from shared.evaluation.tables import LIT, obeyed, share_of
from shared.evaluation.verdict import verdict
from shared.files import markdown
from shared.models import drawn_otherwise, headline, latent_shape, network_name
from stage2_diffusion.backbones import custom
from stage2_diffusion.generator import Generator

COMPARED = 32  # lenses
NOT_LOOKED = "Not looked for yet.\n"
DTYPES = {**HALF, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lens-ldm publish", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="folder of a run or of a model")
    parser.add_argument("--out", type=Path, required=True, help="the new folder, such as checkpoints/NAME")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the weights of layers (default %(default)s)"
    )
    parser.add_argument("--tolerance", type=above_zero, default=0.01, help="default %(default)s of the range")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="default: evaluation/metrics.json of the run")
    parser.add_argument("--guide", metavar="MODEL", help="a weaker model of the same stage 1, to be kept in this one")
    parser.add_argument(
        "--guidance", type=above_zero, metavar="W", help="how far samples are led away from it by default"
    )
    parser.add_argument("--failure", action="append", default=[], metavar="TEXT", help="one more that is known")
    parser.add_argument("--licence", default="MIT", help="of the weights (default %(default)s)")
    parser.add_argument("--trust", metavar="PACKAGE", help="whose code on this machine the model may run")
    a = parser.parse_args(argv)

    if a.trust:
        custom.trust(a.trust)
    if a.out.exists() and (strange := sorted({p.name for p in a.out.iterdir()} - set(HUB)) if a.out.is_dir() else [""]):
        raise UserError(f"{a.out} is there, with {strange[0] or 'a file'}: choose another --out, or delete it")
    run = find_run(a.run)
    config, state = load(run, "diffusion")
    metrics = read_scores(a.scores or run / "evaluation" / "metrics.json", config, a.scores is not None)
    original = Generator.from_pretrained(run, "cpu", precision="fp32")  # or else bf16 would hide what rounding does
    if a.guide:
        metrics = None  # which are of samples without it
        config, state = guided(original, a.guide, a.guidance, config, state)
    elif a.guidance is not None:
        raise UserError("--guidance is how far to lead away from a guide: say which, --guide MODEL")
    cast = at_precision(state, DTYPES[a.dtype])
    difference = disagreement(original, cast) if a.dtype != "fp32" else 0.0
    if difference > a.tolerance:
        raise UserError(
            f"with weights of {a.dtype} a sample differs by {difference:.2g} of the range, more than --tolerance "
            f"{a.tolerance:g}: take --dtype {'fp16 or fp32' if a.dtype == 'bf16' else 'fp32'}"
        )
    published: dict[str, Any] = without_paths(dict(config))
    published |= {"stored": {"dtype": a.dtype, "of_sha256": config["sha256"], "difference": difference}}
    if metrics is not None:
        published["scores"] = headline(metrics)
    else:
        published.pop("scores", None)
        print(
            f"{run} has no scores, and its card will say so: `lens-ldm evaluate {a.run} --reference data/NAME` makes some"
        )
    a.out.parent.mkdir(parents=True, exist_ok=True)
    publish(a.out, "diffusion", published, cast, card(a.out.name, published, metrics, a.failure, a.licence))
    size = (a.out / "model.safetensors").stat().st_size
    print(f"{a.out}: {size / 1e6:.1f} MB of {a.dtype}; clean samples differ by {difference:.2g} of the range at most")


def guided(
    generator: Generator, path: str, weight: float | None, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a model with a guide of its own, which the generator has from here on."""
    guide = Generator.from_pretrained(path, "cpu")
    weight = generator.require_guidance(weight, guide, False)
    for what, mine, theirs in (
        ("conditions", generator.conditions.to_config(), guide.conditions.to_config()),
        ("prediction", config["diffusion"]["prediction"], guide.config["diffusion"]["prediction"]),
    ):
        if mine != theirs:
            raise UserError(f"{path} has other {what} than the model ({theirs}, {mine}): take a guide trained like it")
    generator.guide, generator.defaults["guidance"] = guide.denoiser, weight
    about = {"backbone": guide.config["backbone"], "max_steps": guide.config["training"]["trainer"]["max_steps"]}
    return (
        {**config, "guide": about, "sampling": {**config["sampling"], "guidance": weight}},
        {**{k: v for k, v in state.items() if not k.startswith("guide.")}, **state_of(guide=guide.denoiser)},
    )


def at_precision(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors with the weights of layers in another type; biases, norms, statistics and the noise law weigh nothing."""

    def heavy(name: str, tensor: Tensor) -> bool:
        return name.endswith(".weight") and tensor.ndim > 1 and tensor.dtype == torch.float32

    cast = {name: tensor.to(dtype) if heavy(name, tensor) else tensor for name, tensor in state.items()}
    if endless := [name for name, tensor in cast.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise UserError(f"{endless[0]} has numbers beyond {dtype}: take --dtype bf16 or fp32".replace("torch.", ""))
    return cast


def disagreement(generator: Generator, cast: Mapping[str, Tensor]) -> float:
    """By how much a clean sample changes with the weights, which the generator has from here on: of COMPARED the largest root
    mean square difference, as a share of the range of the pixels."""
    before = generator.images(range(COMPARED), observed=False)
    for name, tensors in parts_of(cast).items():
        if tensors:
            getattr(generator, name).load_state_dict(tensors)
    unit = generator.autoencoder.transform.unit
    after = generator.images(range(COMPARED), observed=False)
    return float((unit(after) - unit(before)).square().flatten(1).mean(1).sqrt().max())


def read_scores(path: Path, config: Mapping[str, Any], wanted: bool) -> dict[str, Any] | None:
    """The metrics.json of a model's own samples; None where there is none and none was named."""
    if not path.is_file() and not wanted:
        return None
    try:
        metrics = json.loads(path.read_text())
        of = metrics.get("weights_sha256")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no metrics.json of `lens-ldm evaluate` ({error})") from error
    if of != config["sha256"]:
        raise UserError(f"{path} has the scores of other weights: run `lens-ldm evaluate` on this model first")
    if other := drawn_otherwise(metrics, config):
        raise UserError(
            f"{path} has the scores of samples that this model draws otherwise ({other}): run `lens-ldm evaluate` on it "
            "without such options first"
        )
    return metrics


def without_paths(tree: Any) -> Any:
    """The same with the last part of absolute paths alone: where things lay is nobody's business."""
    if isinstance(tree, dict):
        return {key: without_paths(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_paths(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and Path(tree).is_absolute() else tree


def card(
    name: str, config: Mapping[str, Any], metrics: Mapping[str, Any] | None, failures: list[str], licence: str
) -> str:
    """README.md of a published model."""
    t, sampling, stored = config["training"], config["sampling"], config["stored"]
    network = f"`{network_name(config)}`, "
    if "gan" in config:
        network, drawn = f"{network}a GAN", "1 evaluation"
    else:
        diffusion = config["diffusion"]
        network += f"{diffusion['prediction']} on the {diffusion['schedule']} schedule"
        drawn = f"{sampling['steps']} evaluations, `{sampling['sampler']}`"
    channels, height, width = latent_shape(config["autoencoder"])
    image = "×".join(map(str, config["autoencoder"]["image_shape"][1:]))
    spec, entries = config["autoencoder"]["spec"], config.get("conditions", {}).get("entries", [])
    asked = (
        f"    lens-ldm sample {name} --list-conditions                   # what lenses can be asked to be\n"
        if entries
        else ""
    )
    quantizer = f" with quantiser `{spec['quantizer']['name']}`" if "quantizer" in spec else ""
    rows = [
        ["", ""],
        ["data", f"`{config['data']['name']}`, {config['data']['images']} training images of {image}"],
        ["latent", f"{height}×{width}×{channels}, by `{spec['name']}`{quantizer}"],
        ["network", network],
        ["can be asked for", ", ".join(entry["name"] for entry in entries) or "nothing: unconditional"],
        ["budget", f"{t['trainer']['max_steps']} steps of {t['data']['batch_size']}"
                   + (f", from the weights of `{t['pretrained']}`" if t.get("pretrained") else "")
                   + (f", distilled from `{Path(config['distilled']).name}`" if config.get("distilled") else "")],
        ["sampling", drawn],
        *([["guide", f"trained for {guide['max_steps']} steps; samples are led away from it by {sampling['guidance']:g}"]]
          if (guide := config.get("guide")) else []),
        ["weights", f"{stored['dtype']}; clean samples differ from those of fp32 by {stored['difference']:.2g} of the "
                    f"range at most ({COMPARED} seeds)"],
    ]  # fmt: skip
    found = list(failures)
    scored = "Not scored yet: `lens-ldm evaluate` does.\n"
    if metrics is not None:
        scored = markdown(score_rows(config["scores"])) + "\n"
        found += [line for fine, line in verdict(metrics) if not fine]
    known = "".join(f"- {line}\n" for line in found) or "None is known, of those that were looked for.\n"
    return f"""---
license: {licence.lower()}
library_name: lens-ldm
---

# {name}

A latent diffusion model of strong gravitational lenses, of lens-ldm. config.json has the whole recipe (`training`), and the
autoencoder is in the same file as the network.

    lens-ldm sample {name} --count 64 --out samples
{asked}
{markdown(rows)}

## Scores

Of the weights before they were rounded, by `lens-ldm evaluate`; the floor is what real images score against others,
that is images of the data set that no training saw.

{scored}
## Known failures

{known if metrics is not None or failures else NOT_LOOKED}
## Licence

{licence}.
"""


def score_rows(scores: Mapping[str, Any]) -> list[list[str]]:
    """The table of a card, header first."""
    rows = [["score", "value"]]
    for metric, s in scores.items():
        if isinstance(s, dict) and "excess" in s:
            value = f"{s['distance']:.2f}, floor {s['floor']:.2f} ± {s['floor_sd']:.2f}, excess {s['excess']:+.2f}"
            rows.append([f"{metric} to unseen images of `{scores['reference']}`", f"{value} (n = {s['n']})"])
    if "lenses" in scores:
        for of, label in (("", "lenses at the level of their noise"), (LIT, "the same by the pixels they light alone")):
            if f"share{of}" in scores["lenses"]:
                real = f"of real images {scores['real_lenses'][f'share{of}']:.0%}"
                rows.append([label, f"{share_of(scores['lenses'], of)}; {real}"])
    for name, found in scores.get("asked", {}).items():
        rows.append([f"{name} as asked: bias ± scatter, R²", f"{obeyed(found)} (n = {found['n']})"])
    cost = scores["cost"]
    if cost.get("gflop"):
        rows.append(["GFLOP a lens", f"{cost['gflop']:.2f}"])
    if cost.get("milliseconds"):
        how = ", ".join([cost["device"], f"threads: {cost['threads']}", cost.get("precision", "")]).rstrip(", ")
        rows.append(["milliseconds a lens", f"{cost['milliseconds']:.1f} ({how})"])
    return rows
