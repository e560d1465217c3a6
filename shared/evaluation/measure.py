"""Sets of images that can be had again, and what is measured of each image: a chunk at a time, in bounded memory, kept in
files, so that whoever measures the same set again goes on where it stopped."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.data import normalise
from shared.data.cache import LensImages
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.files import DAMAGED, write_atomically
from shared.metrics import efficientnet, fid, morphology, physics, two_sample

BATCH = 32  # images at once; with 64 an evaluation takes 0.2 GB more and no less time
CHUNK = 128  # images a file: what a kill loses
BINS = 100  # of the histogram of pixel values


@dataclass(frozen=True)
class ImageSet:
    """n images (C, H, W) in the data's own units, of which any can be had again; never all of them in memory.

    key   says which images they are: measurements are kept under it
    get   places (m,) in 0 ... n - 1 -> images (m, C, H, W) float32 on the CPU
    kept  folder for measurements of them; None: they are not kept
    """

    key: str
    n: int
    get: Callable[[np.ndarray], Tensor]
    kept: Path | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: np.ndarray) -> Tensor:
        return self.get(np.asarray(places))

    def first(self, count: int) -> Tensor:
        return self.get(np.arange(min(count, self.n)))

    def stored(self) -> "ImageSet":
        """The same, drawn once: batches of images are kept in files beside the measurements, until `forget`."""
        if self.kept is None:
            return self
        folder = self.kept / f"images-{short_hash(self.key)}"

        def batch(start: int) -> Tensor:
            places, file = np.arange(start, min(start + BATCH, self.n)), folder / f"{start}.npz"
            found = _read(file)
            if found is None:
                found = {"images": self.get(places).numpy()}
                _write(file, found)
            return torch.from_numpy(found["images"])

        def get(places: np.ndarray) -> Tensor:
            starts = np.asarray(places) // BATCH * BATCH
            images: list[Tensor] = [torch.empty(0)] * len(places)
            for start in np.unique(starts):
                drawn = batch(int(start))
                for k in np.flatnonzero(starts == start):
                    images[k] = drawn[int(places[k]) - int(start)]
            return torch.stack(images)

        return replace(self, get=get)

    def forget(self) -> None:
        """Delete the chunks of `stored`; measurements stay."""
        if self.kept is not None:
            shutil.rmtree(self.kept / f"images-{short_hash(self.key)}", ignore_errors=True)

    def subset(self, places: np.ndarray) -> "ImageSet":
        digest = hashlib.sha256(np.ascontiguousarray(places, np.int64).data).hexdigest()[:16]
        return ImageSet(f"{self.key} at {digest}", len(places), lambda chosen: self.get(places[chosen]), self.kept)

    def changed(self, how: str, change: Callable[[Tensor, np.ndarray], Tensor]) -> "ImageSet":
        """The same images after change(images (m, C, H, W), places (m,)), which `how` tells from every other change."""
        return ImageSet(f"{self.key}, {how}", self.n, lambda places: change(self.get(places), places), self.kept)


def of_data(images: LensImages, indices: np.ndarray) -> ImageSet:
    """These images of a data set, whose folder keeps what is measured of them, if it may be written to."""
    kept = images.path / "measured" if os.access(images.path, os.W_OK) else None
    whole = ImageSet(f"data {images.fingerprint}", len(images), images.batch, kept)
    return whole.subset(np.asarray(indices))


def of_tensor(images: Tensor) -> ImageSet:
    """Images (N, C, H, W) that are in memory."""
    digest = hashlib.sha256(np.ascontiguousarray(images.numpy()).data).hexdigest()[:16]
    return ImageSet(f"images {digest}", len(images), lambda places: images[torch.from_numpy(places)])


@dataclass(frozen=True)
class Measure:
    """What is measured of images: `call`, images (n, C, H, W) -> {column: (n, ...)}, or sums over them, (1, ...).

    identity  changes with whatever changes the numbers, so that kept ones of another kind are not taken for these
    """

    name: str
    identity: str
    call: Callable[[Tensor], Mapping[str, np.ndarray]]


def source(*modules: ModuleType) -> str:
    """What tells the code of modules, or of whole packages, from that of other versions."""
    digest = hashlib.sha256()
    for module in modules:
        file = Path(str(module.__file__))
        for part in sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def remembered(images: ImageSet, what: str, make: Callable[[], Any]) -> Any:
    """make(), of plain types, or what it gave before for these images and the same `what`."""
    folder = None if images.kept is None else images.kept / short_hash(images.key)
    file = None if folder is None else folder / f"{short_hash(what)}.json"
    if file is not None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(file.read_text())
    found = make()
    if file is not None:
        _keep(file, json.dumps(found).encode())
    return json.loads(json.dumps(found))  # as a file would give it back


def measure(
    images: ImageSet, measures: Iterable[Measure], progress: Callable[[int], object] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """-> {measure: {column: (N, ...)}}; `progress` is told how many images are done."""
    measures = list(measures)
    parts: dict[str, list[Mapping[str, np.ndarray]]] = {one.name: [] for one in measures}
    for start in range(0, len(images), CHUNK):
        places = np.arange(start, min(start + CHUNK, len(images)))
        files = {one.name: _file(images, one, start, len(places)) for one in measures}
        found = {name: _read(file) for name, file in files.items()}
        missing = [one for one in measures if found[one.name] is None]
        if missing:
            made: dict[str, list[Mapping[str, np.ndarray]]] = {one.name: [] for one in missing}
            drawn = images.get(places)
            if not (fine := drawn.flatten(1).isfinite().all(1)).all():
                number = start + int((~fine).nonzero()[0])
                raise UserError(
                    f"image {number} of {images.key} holds NaN or infinity: leave such images out, and report how many there were"
                )
            for batch in drawn.split(BATCH):
                for one in missing:
                    made[one.name].append(one.call(batch))
                if progress is not None:
                    progress(len(batch))
            for one in missing:
                found[one.name] = joined(made[one.name])
                _write(files[one.name], found[one.name])
        elif progress is not None:
            progress(len(places))
        for name, rows in found.items():
            parts[name].append(rows or {})
    return {name: joined(rows) for name, rows in parts.items()}


def joined(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of several chunks as one."""
    return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]} if parts else {}


def short_hash(text: str) -> str:
    """Of a key, what names a file."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(images: ImageSet, one: Measure, start: int, count: int) -> Path | None:
    if images.kept is None:
        return None
    return images.kept / short_hash(images.key) / f"{short_hash(f'{one.name} {one.identity}')}-{start}-{count}.npz"


def _read(file: Path | None) -> dict[str, np.ndarray] | None:
    """None where there is no such file, or half of one."""
    try:
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as columns:
            return dict(columns)
    except DAMAGED:
        return None


def _write(file: Path | None, columns: Mapping[str, np.ndarray] | None) -> None:
    if file is None or columns is None:
        return
    stream = io.BytesIO()
    np.savez(stream, **columns)  # type: ignore[arg-type]
    _keep(file, stream.getvalue())


def _keep(file: Path, content: bytes) -> None:
    """Write a file, or say once that it cannot be: what is kept saves time and nothing depends on it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        if (folder := file.parent.parent) not in _TOLD:
            _TOLD.add(folder)
            print(f"warning: measurements are not kept in {folder}: {error.strerror or error}", file=sys.stderr)


_TOLD: set[Path] = set()


# --- what is measured of every set ------------------------------------------------------------------------------------


def features_of(network: fid.Network, transform: PixelTransform) -> Measure:
    """The features of a network, as it gave them: {"features": (N, d)} float32."""

    def call(images: Tensor) -> dict[str, np.ndarray]:
        return {"features": fid.features(network, transform.unit(images), (0.0, 1.0)).astype(np.float32)}

    identity = f"{network.extractor} {network.resizer} {transform.to_config()} {source(fid, efficientnet, normalise)}"
    return Measure(f"features {network.metric}", identity, call)


def quantities_of(transform: PixelTransform) -> list[Measure]:
    """What shared/metrics/physics.py and morphology.py measure, and the histogram of pixel values."""
    span, edges = (transform.low, transform.high), histogram_edges(transform)

    def counts(images: Tensor) -> np.ndarray:
        inside = images.double().clamp(edges[0], edges[-1]).numpy()  # what is beyond is in the last bins
        return np.stack([np.histogram(image, edges)[0] for image in inside])

    def spectrum(images: Tensor) -> dict[str, np.ndarray]:
        k, power = physics.radial_power_spectrum(images)
        return {"k": k[None], "power": power}

    def noise(images: Tensor) -> dict[str, np.ndarray]:
        curve = physics.noise_curve(images, span)
        return {"pixels": curve.pixels[None], "light": curve.light[None], "squares": curve.squares[None]}

    identity = f"{transform.to_config()} {edges[[0, -1]]} {source(physics, two_sample, normalise)}"
    return [
        Measure("summaries", identity, lambda images: physics.summaries(images, span)),
        Measure("spectrum", identity, spectrum),
        Measure("shapes", f"{identity} {source(morphology)}", lambda images: morphology.summaries(images, span)),
        Measure("noise", identity, noise),
        Measure("histogram", identity, lambda images: {"counts": counts(images)}),
    ]


def histogram_edges(transform: PixelTransform) -> np.ndarray:
    """(BINS + 1,), even in what the network sees."""
    return transform.inverse(torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)).numpy()


class Measured:
    """All that is measured of a set of images.

    features    {metric: (N, d)} of each network, float32
    summaries   {quantity: (N,)} of shared/metrics/physics.py and morphology.py
    k, power    (K,) [cycles/pixel], (N, K)
    noise       variance of the pixel noise against the signal
    edges       (BINS + 1,) of the histogram `counts` (BINS,) of pixel values, even in what the network sees
    """

    def __init__(self, networks: Iterable[fid.Network], transform: PixelTransform) -> None:
        self.networks, self.transform = list(networks), transform
        self.edges = histogram_edges(transform)
        self.measures = [*(features_of(network, transform) for network in self.networks), *quantities_of(transform)]
        self._parts: dict[str, list[Mapping[str, np.ndarray]]] = {one.name: [] for one in self.measures}

    @classmethod
    def of(
        cls,
        images: ImageSet,
        networks: Iterable[fid.Network],
        transform: PixelTransform,
        progress: Callable[[int], object] | None = None,
    ) -> "Measured":
        """Of a whole set; see `measure`."""
        measured = cls(networks, transform)
        for name, columns in measure(images, measured.measures, progress).items():
            measured._parts[name].append(columns)
        return measured

    def add(self, images: Tensor) -> None:
        """images (n, C, H, W), in the data's own units."""
        for one in self.measures:
            self._parts[one.name].append(one.call(images))

    def _columns(self, name: str) -> dict[str, np.ndarray]:
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [joined(parts)]
        return dict(parts[0]) if parts else {}

    @property
    def features(self) -> dict[str, np.ndarray]:
        return {network.metric: self._columns(f"features {network.metric}")["features"] for network in self.networks}

    @property
    def summaries(self) -> dict[str, np.ndarray]:
        return {**self._columns("summaries"), **self._columns("shapes")}

    @property
    def k(self) -> np.ndarray:
        return self._columns("spectrum")["k"][0]

    @property
    def power(self) -> np.ndarray:
        return self._columns("spectrum")["power"]

    @property
    def noise(self) -> physics.NoiseCurve:
        sums = self._columns("noise")
        return physics.NoiseCurve(physics.NOISE_EDGES, *(sums[name].sum(0) for name in ("pixels", "light", "squares")))

    @property
    def counts(self) -> np.ndarray:
        return self._columns("histogram")["counts"].sum(0)

    def __len__(self) -> int:
        return len(self._columns("spectrum").get("power", ()))
