"""What a denoiser may be told of an image: how it was turned, its class, the parameters of its lens.

A condition is a vector of entries side by side. NaN stands for what is not known, from index.json to the network: any part
of a condition may be left out. A value is a number, an angle of an axis in degrees, or the name of a class.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.data.cache import LensImages
from shared.data.symmetries import AXIS, Turns, apply_to_parameters, how_they_turn
from shared.errors import UserError, hint
from shared.files import read_csv

CLASS = "class"
FAR = 0.1  # of the range in training: a value further outside than that is worth a word


@dataclass(frozen=True)
class Entry:
    """One thing that may be asked for.

    limits      lowest and highest in training, in `unit`
    mean, std   of its raw vector in training: the number; cos and sin of twice the angle of an axis, which is the same after
                half a turn
    classes     names, of the entry `class` alone, which has none of the above
    """

    name: str
    unit: str = ""
    limits: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return len(self.classes or self.mean)

    @property
    def axis(self) -> bool:
        """Whether it is the angle of an axis."""
        return len(self.mean) == 2

    def vector(self, values: np.ndarray) -> Tensor:
        """Values (N,), numbers or names of classes -> (N, width), standardised; NaN where a value is NaN or empty."""
        if self.classes:
            rows = torch.cat([one_hot(len(self.classes)), torch.full((1, self.width), torch.nan)])
            return rows[[self._class(value) for value in values]]
        raw = _raw(_numbers(self.name, values), self.axis)
        return torch.from_numpy((raw - np.array(self.mean)) / np.array(self.std)).float()

    def _class(self, value: Any) -> int:
        if value is None or value == "" or value != value:
            return -1
        if str(value) not in self.classes:
            raise UserError(f"the model knows no class {str(value)!r}{hint(value, self.classes)}")
        return self.classes.index(str(value))

    def outside(self, values: np.ndarray) -> bool:
        """Whether some value is far outside of what training has shown."""
        if self.classes:
            return False
        low, high = self.limits
        values, margin = _numbers(self.name, values), FAR * (high - low)
        if self.axis:
            values = (values - low + margin) % 180 + low - margin
        return bool(((values < low - margin) | (values > high + margin)).any())

    def __str__(self) -> str:
        if self.classes:
            return "one of " + ", ".join(self.classes)
        return f"{self.limits[0]:.4g} to {self.limits[1]:.4g} {self.unit}".strip()


@dataclass(frozen=True)
class Conditions:
    """What a denoiser's condition is made of.

    labels   of how a training image was turned, one-hot, if there are any. Samples are always asked for as the data have
             them, so that no turn leaks into them (Karras et al. 2022, arXiv 2206.00364, §F.2)
    entries  after them
    dropout  share of training images that are told no entry
    subsets  share of the others that are told a random part of them, of any size alike
    """

    labels: int = 0
    entries: tuple[Entry, ...] = ()
    dropout: float = 0.0
    subsets: float = 0.0

    @property
    def groups(self) -> list[int]:
        """The widths of what is known or unknown together: the labels, then each entry."""
        return [self.labels] * (self.labels > 0) + [entry.width for entry in self.entries]

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Conditions":
        """Back from `to_config`. UserError if that is damaged."""
        try:
            entries = []
            for entry in config.get("entries", []):
                fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
                entries.append(Entry(**fields))
            shares = {key: config.get(key, 0.0) for key in ("dropout", "subsets")}
            return cls(config.get("orientation", 0), tuple(entries), **shares)
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"the model's config has damaged conditions ({error}): train or download it again"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """In JSON's types, for config.json; empty where there are none."""
        config: dict[str, Any] = {"orientation": self.labels} if self.labels else {}
        if self.entries:
            entries = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e).items()} for e in self.entries]
            config |= {"entries": entries, "dropout": self.dropout, "subsets": self.subsets}
        return config

    @classmethod
    def learn(cls, spec: Mapping[str, Any], images: LensImages, indices: np.ndarray, turns: Turns) -> "Conditions":
        """The `condition` block of a config -> conditions with the ranges, means and deviations of these images.

        UserError for a name that the data set does not know, or that is the same for all of these images.
        """
        labels = max(turns.labels) + 1 if max(turns.labels) else 0
        entries = []
        if spec[CLASS]:
            classes = tuple(images.index.get("classes") or ())
            if len(classes) < 2:
                raise UserError(f"condition.class: {images.path} has no classes to tell apart: leave it out")
            entries.append(Entry(CLASS, classes=classes))
        known, rules = _parameters(images), how_they_turn(images)
        for name in spec["parameters"]:
            if name not in known:
                raise UserError(f"condition.parameters: {images.path} knows no {name!r}{hint(name, known)}")
            # As training turns them: with labels, an angle takes values far from those that samples are asked for.
            turned = [apply_to_parameters(_at(known, indices), element, rules)[name] for element in turns.elements]
            axis, own = rules.get(name, ("",))[0] == AXIS, known[name][indices]
            raw = _raw(np.concatenate(turned), axis)
            if not np.isfinite(own).any() or np.nanmin(own) == np.nanmax(own):
                raise UserError(
                    f"condition.parameters: {name} is the same in all training images of {images.path}: leave it out"
                )
            mean, std = np.nanmean(raw, 0), np.nanstd(raw, 0)
            unit = images.index.get("parameters", {}).get(name, {}).get("unit", "")
            std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
            limits = float(np.nanmin(own)), float(np.nanmax(own))
            entries.append(Entry(name, unit, limits, tuple(mean.tolist()), tuple(std.tolist())))
        shares = {key: spec[key] for key in ("dropout", "subsets")} if entries else {}
        return cls(labels, tuple(entries), **shares)

    def of(self, images: LensImages, indices: np.ndarray, element: str = "identity") -> dict[str, np.ndarray]:
        """What a data set knows of these images of it, turned by an element: {name: (N,)}, of the entries that it has."""
        turned = apply_to_parameters(_at(_parameters(images), indices), element, how_they_turn(images))
        found = {name: turned[name] for name in self.names if name in turned}
        for entry in self.entries:
            if entry.classes and images.index.get("classes"):
                names = np.array([name if name in entry.classes else "" for name in images.index["classes"]])
                found[CLASS] = names[np.asarray(images.index["labels"])[indices]]
        return found

    def fingerprint(self, images: LensImages) -> dict[str, str]:
        """What a run must not go on without: the table of the data set's parameters, if they are not those of a simulation."""
        table = images.index["source"].get("parameters") if self.entries else None
        return {"table of parameters": " ".join([table["sha256"], *table["turns"]])} if table else {}

    def vector(self, n: int, asked: Mapping[str, Any] | None = None, label: int = 0) -> Tensor | None:
        """(n, sum of `groups`): what is asked for, NaN where nothing is, of images with this label; None without groups.

        asked   {name: a value, or n of them}; UserError for an unknown name, and for another number of them
        """
        asked = asked or {}
        for name in asked:
            self.require(name)
        parts = [one_hot(self.labels)[label].expand(n, -1)] if self.labels else []
        for entry in self.entries:
            values = np.asarray(asked.get(entry.name, np.nan))
            if values.ndim and values.shape != (n,):
                raise UserError(f"{entry.name}: {n} lenses need one value or {n}, these are {len(values)}")
            parts.append(entry.vector(np.broadcast_to(values, (n,))))
        return torch.cat(parts, 1) if parts else None

    def require(self, name: str) -> Entry:
        """The entry of that name; UserError if there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        if not self.entries:
            raise UserError(
                f"the model cannot be asked for {name}: it was trained without conditions (condition.parameters)"
            )
        raise UserError(f"the model cannot be asked for {name!r}{hint(name, self.names)}")

    def parse(self, name: str, text: str, seeds: Sequence[int]) -> np.ndarray:
        """What a user has written for an entry -> a value for each seed: a number, LOW:HIGH or a class.

        Of a range each seed draws its own, uniformly, whatever else is drawn with it.
        """
        entry = self.require(name)
        if entry.classes:
            entry.vector(np.array([text]))
            return np.full(len(seeds), text)
        try:
            low, high = [float(part) for part in text.split(":")] if ":" in text else [float(text)] * 2
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise UserError(f"{name} {text!r} is neither a number nor a range LOW:HIGH; in training it was {entry}")
        key = zlib.crc32(name.encode())
        u = (
            np.array([np.random.Generator(np.random.Philox(key=[seed, key])).random() for seed in seeds])
            if low < high
            else 0
        )
        return np.full(len(seeds), low) + (high - low) * u

    def read_table(self, path: Path) -> dict[str, np.ndarray]:
        """A CSV file with a column for each entry that is asked for, one lens a row -> {name: (N,)}; empty: not asked for."""
        columns: dict[str, Any] = dict(read_csv(path, ",".join(self.names[:2])))
        for name, values in columns.items():
            entry = self.require(name)
            columns[name] = np.array(values) if entry.classes else _numbers(name, values)
            entry.vector(columns[name])
        return columns

    def warnings(self, asked: Mapping[str, Any]) -> list[str]:
        """A line for each entry that is asked for far outside of what training has shown."""
        far = [entry for entry in self.entries if entry.name in asked and entry.outside(np.asarray(asked[entry.name]))]
        return [f"warning: {entry.name} is asked for far outside of what the model has seen, {entry}" for entry in far]


def one_hot(labels: int) -> Tensor:
    """(labels, labels): the vector of each label, one-hot with the mean square of a standardised parameter.

    With entries of 0 and 1 a network takes up to twice as many steps to heed them (DiT, 8 labels, 400 against 200).
    """
    return labels**0.5 * torch.eye(labels)


def _parameters(images: LensImages) -> dict[str, np.ndarray]:
    """All parameters that a data set knows, {name: (count,)}, those that all its images share among them."""
    columns = {name: np.array(column["values"], float) for name, column in images.index.get("parameters", {}).items()}
    shared = {name: float(constant["value"]) for name, constant in images.index.get("constants", {}).items()}
    return columns | {name: np.full(len(images), value) for name, value in shared.items()}


def _at(parameters: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[indices] for name, values in parameters.items()}


def _raw(values: np.ndarray, axis: bool) -> np.ndarray:
    """(N,) -> (N, 1), or (N, 2) for the angle of an axis."""
    if not axis:
        return values[:, None]
    turns = np.deg2rad(2 * values)
    return np.stack([np.cos(turns), np.sin(turns)], 1)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.array(
            [value if value != "" and value is not None else np.nan for value in np.atleast_1d(values)], float
        )
    except (TypeError, ValueError):
        raise UserError(f"{name} must be numbers, not {np.atleast_1d(values)[0]!s:.40}") from None
