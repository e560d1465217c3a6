"""Published models: a folder of config.json + model.safetensors + README.md that rebuilds itself from one path.

Nothing in it is ever executed: the config names parts by the registry's short names, the weights are tensors.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.autoencoder import Autoencoder, Pixels
from shared.config import merge
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.files import sha256, write_atomically
from shared.registry import build

FORMAT = 1
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # as which weights may be stored
KINDS = {"autoencoder": "stage 1", "diffusion": "stage 2"}


def publish(folder: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], card: str) -> None:
    """Write the model folder, whole or not at all.

    config   all that rebuilds the model, in JSON's types; format, kind, versions and the weights' hash are added
    state    tensors by name
    card     the text of README.md
    """
    temporary, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = temporary / "model.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, weights, metadata={"format": "pt"})
        full = {"format": FORMAT, "kind": kind, **config, "versions": versions(), "sha256": sha256(weights)}
        (temporary / "config.json").write_text(json.dumps(full, indent=1) + "\n")
        (temporary / "README.md").write_text(card)
        weights.chmod((temporary / "README.md").stat().st_mode)  # safetensors leaves it to its owner alone
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that a disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the model {folder}: {getattr(error, 'strerror', None) or error}; the same command tries again"
        ) from error


def amend(path: str | Path, kind: str, changes: dict[str, Any]) -> None:
    """Merge `changes`, block by block, into the config.json of a published model; its weights and their hash stay."""
    file = find_model(path) / "config.json"
    full = merge(read_config(path, kind), changes)
    try:
        write_atomically(file, (json.dumps(full, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def folders() -> list[Path]:
    """Where models are found by name: ./checkpoints, and the one of the checkout that this package lies in."""
    checkout = Path(__file__).resolve().parents[1]
    # Beside an installed package anything may lie.
    return [Path("checkpoints"), *([checkout / "checkpoints"] if (checkout / "pyproject.toml").is_file() else [])]


def find_run(path: str | Path) -> Path:
    """The folder of a run or of a model, by its path or its name.

    In this order: the path; ./checkpoints/NAME; checkpoints/NAME of the checkout; and, for owner/name alone, the hub, where
    the package huggingface_hub is installed. What comes from there is three files, of which none is ever executed.
    """
    for place in (Path(path), *(folder / path for folder in folders())):
        if _holds_model(place) is not None:
            return place
        if (place / "last.ckpt").exists():
            raise UserError(
                f"{place} is a run that is not finished: run its training command again, it goes on where it stopped"
            )
    if Path(path).exists():
        raise UserError(
            f"{path} holds no model: expected config.json and model.safetensors, or a run's folder with model/"
        )
    if hub := _from_hub(str(path)):
        return hub
    known = [name for name, _ in known_models(Path(path).parent)]
    wanted = Path(path).name
    near = [name for name in known if wanted and wanted in name][:3] or get_close_matches(wanted, known, n=3)
    said = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:8])}" if known else ""
    raise UserError(
        f"no model at {path}: there is no such folder" + (f"; {said} (`lens-ldm models` lists them)" if said else "")
    )


def known_models(*more: Path) -> list[tuple[str, Path]]:
    """(name, folder of config.json) of the models in `folders()` and others, those that hide none of the same name."""
    found: dict[str, Path] = {}
    for parent in (*more, *folders()):
        for folder in sorted(parent.glob("*/")):
            if (model := _holds_model(folder)) is not None:
                found.setdefault(folder.name, model)
    return sorted(found.items())


def _holds_model(folder: Path) -> Path | None:
    return next((place for place in (folder, folder / "model") if (place / "config.json").is_file()), None)


def find_model(path: str | Path) -> Path:
    """`find_run`, and of a run the folder of its model."""
    model = _holds_model(find_run(path))
    assert model is not None
    return model


HUB = "config.json", "model.safetensors", "README.md"  # all that is ever fetched


@cache
def _from_hub(name: str) -> Path | None:
    """The folder of a repository owner/name, which is fetched unless it is here; None if the name cannot be one."""
    owner, _, _ = name.partition("/")
    # A folder that is there was meant, and its model is misspelt.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or owner == "checkpoints" or Path(owner).exists():
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"no model at {name}: there is no such folder, and to look on the hub takes `pip install -e '.[hub]'`"
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB)))
    except Exception as error:  # of a dozen types, from no network to no such repository
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"no model at {name}: there is no such folder, and from the hub: {reason[0]}") from error
    if _holds_model(folder) != folder:
        raise UserError(f"{name} on the hub holds no model of lens-ldm: it has no config.json")
    return folder


class _Published(dict[str, Any]):
    """A config.json. UserError for a key that it lacks."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.folder = folder

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.folder / 'config.json'} has no {key!r}: train or download the model again")


def read_config(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The config.json of a model, checked for format and kind."""
    folder = find_model(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        found, form = config["kind"], config["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged: train or download the model again") from error
    if form != FORMAT:
        raise UserError(f"{folder} has format {form}; this version of lens-ldm reads format {FORMAT}")
    if kind is not None and found != kind:
        raise UserError(f"{folder} is a model of {KINDS.get(found, found)}; here one of {KINDS[kind]} is needed")
    return _Published(folder, config)


def require_intact(folder: Path, config: Mapping[str, Any]) -> Path:
    """The weights of a published model. UserError if they are not there, or not those of its config."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no model.safetensors: train or download the model again")
    if sha256(weights) != config.get("sha256"):
        raise UserError(
            f"{weights} is truncated or altered (its hash is not config.json's): train or download it again"
        )
    return weights


def load(path: str | Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a published model, fp32 where they are stored as half of that. Truncated or altered
    weights are refused."""
    folder, config = find_model(path), read_config(path, kind)
    weights = require_intact(folder, config)
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{weights} is no safetensors file: {error}") from error
    return config, {name: x.float() if x.dtype in HALF.values() else x for name, x in tensors.items()}


def state_of(**parts: nn.Module) -> dict[str, Tensor]:
    """The tensors of several networks as those of one model; `parts_of` has them apart again."""
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def parts_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model of stage 2, of its autoencoder, its denoiser and its guide."""
    parts: dict[str, dict[str, Tensor]] = {"autoencoder": {}, "denoiser": {}, "guide": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


def load_part(path: str | Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a model and the tensors of its `autoencoder` or `denoiser`. One of stage 1 is an autoencoder and no
    more."""
    config, state = load(path, "diffusion" if part == "denoiser" else None)
    return config, parts_of(state)[part] if config["kind"] == "diffusion" else state


def autoencoder_config(autoencoder: Autoencoder, spec: dict[str, Any]) -> dict[str, Any]:
    """What `build_autoencoder` needs: the spec of the config, and the shapes and units the data gave it."""
    return {"spec": spec, "image_shape": list(autoencoder.image_shape), **autoencoder.transform.to_config()}


def build_autoencoder(config: dict[str, Any], state: dict[str, Tensor]) -> Autoencoder:
    """Rebuild an autoencoder, frozen and in eval mode, from `autoencoder_config` and its tensors."""
    try:
        shape, transform = tuple(config["image_shape"]), PixelTransform.from_config(config)
        model = build("autoencoder", config["spec"], image_shape=shape, transform=transform)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the model's config is damaged ({error}): train or download it again") from error
    fill(model, state, "autoencoder")
    return model.require_latents().freeze()


def fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"the weights of the {what} do not fit the config: {str(error).splitlines()[1].strip()[:200]}"
        ) from error


def load_autoencoder(
    path: str, image_shape: tuple[int, int, int], transform: PixelTransform, pixels: Mapping[str, Any] | None = None
) -> tuple[Autoencoder, dict]:
    """What stage 2 stands on: a model of stage 1, that inside a model of stage 2, or `pixels`. Returns it with its
    `autoencoder_config`.

    image_shape, transform   of the data that it will meet; a model made for others is refused
    pixels                   options of `pixels`
    """
    if path == "pixels":
        model: Autoencoder = Pixels(image_shape, transform, **(pixels or {}))
        return model, autoencoder_config(model, {"name": "pixels", **(pixels or {})})
    config, state = load_part(path, "autoencoder")
    model = build_autoencoder(config["autoencoder"], state)
    if model.image_shape != tuple(image_shape):
        raise UserError(
            f"{path} was trained on images of shape {model.image_shape}, the data have {tuple(image_shape)}"
        )
    require_units(model, transform, path)
    return model, config["autoencoder"]


def require_units(model: Autoencoder, transform: PixelTransform, what: str) -> None:
    """Refuse data of another normalisation than a model's, or of a range so different that they are in other units."""
    if not model.transform.agrees(transform):
        raise UserError(
            f"{what} was trained on {model.transform}, the data have {transform}: prepare them in the same units, "
            f"with --normalise {model.transform.option}"
        )


def fingerprint(path: str | Path) -> str:
    """The hash of a published model's weights; for `pixels` the word itself."""
    return "pixels" if str(path) == "pixels" else str(read_config(path)["sha256"])


def pretrained(path: str | None) -> dict[str, str]:
    """What a run was made from, if it starts from the weights of a model."""
    return {} if path is None else {"pretrained": fingerprint(path)}


def start_from(path: str, network: nn.Module, part: str, new: str | None = None) -> dict[str, Any]:
    """Give a network the weights of a model's `autoencoder` or `denoiser`; its config. UserError if they are of another
    network.

    new   layers of this name begin as they are where the model has none
    """
    config, state = load_part(path, part)
    if new and not any(new in name for name in state):
        state = {**{name: tensor for name, tensor in network.state_dict().items() if new in name}, **state}
    fill(network, state, f"{part} of {path}")
    return config


def versions() -> dict[str, str]:
    return {"lens-ldm": version("lens-ldm"), "torch": str(torch.__version__)}
