"""`lens-ldm inspect data/NAME`: what is in a data set, as a table, a histogram and a contact sheet.

Writes contact_sheet.png and histogram.png into the folder of the data set, or into --out. --symmetries tests which of the
eight flips and rotations leave the distribution of the images alone, and writes symmetries.json, by which training turns
its images. --against asks how well a small network tells the images from those of another data set.
"""

import errno
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from shared.cli import Parser, at_least, positive
from shared.data.cache import LensImages
from shared.data.sources import NO_CLASS
from shared.errors import UserError
from shared.files import write_atomically
from shared.report import colour, panels

CONTACT_SHEET, HISTOGRAM = "contact_sheet.png", "histogram.png"
COLUMNS, CLASSES_SHOWN = 8, 8
SAMPLED_PIXELS = 1 << 24  # of the histogram, from whole images evenly spaced
SHOWN_PERCENT = (0.5, 99.5)
GREY = "#5a5a66"


def main(argv: list[str] | None = None) -> None:
    """The command line of `lens-ldm inspect`."""
    parser = Parser(prog="lens-ldm inspect", description=__doc__)
    parser.add_argument("data", type=Path, metavar="data/NAME", help="a data set of `prepare` or `simulate`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to put the pictures (default: the data set)")
    parser.add_argument("--symmetries", action="store_true", help="test them on the training images")
    parser.add_argument("--against", type=Path, metavar="data/OTHER", help="tell the two apart, cross-validated")
    parser.add_argument("--count", type=positive, default=2000, help="images for either (default %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of either (default %(default)s)")
    options = parser.parse_args(argv)
    dataset, out = LensImages(options.data), options.out or options.data
    other = LensImages(options.against) if options.against else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_contact_sheet(dataset, out / CONTACT_SHEET)
        write_histogram(dataset, out / HISTOGRAM)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from error
    print(table(dataset))
    print(f"pictures: {out / CONTACT_SHEET}, {out / HISTOGRAM}")
    if options.symmetries:
        from shared.data.symmetries import main_symmetries

        print(f"\n{main_symmetries(options.data, options.count, options.seed)}")
    if other is not None:
        print(f"\n{_told_apart(dataset, other, options.count, options.seed)}")


def _told_apart(a: LensImages, b: LensImages, count: int, seed: int) -> str:
    from shared.metrics.two_sample import classifier_two_sample

    if (a.transform.scale is None, a.transform.per_image) != (b.transform.scale is None, b.transform.per_image):
        raise UserError(f"{a.path} has {a.transform}, {b.path} has {b.transform}: prepare them alike to compare them")
    if twins := len(set(a.index["hashes"]) & set(b.index["hashes"])):
        raise UserError(f"{twins} images are in both {a.path} and {b.path}: compare sets that share none")
    found = classifier_two_sample(*(data.images[_evenly(np.arange(len(data)), count)] for data in (a, b)), seed=seed)
    (low, high), (least, most) = found.auc_interval, found.accuracy_interval
    return (
        f"a small network, cross-validated, tells {found.n_a} images of {a.path} from {found.n_b} of {b.path}\n"
        f"  right in {found.accuracy:.1%} (95 %: {least:.1%} to {most:.1%}; 50 % is chance), "
        f"AUC {found.auc:.3f} (95 %: {low:.3f} to {high:.3f}; 0.5 is chance)"
    )


def table(dataset: LensImages) -> str:
    """A data set in a dozen lines: size, source, values, classes, parameters, splits, and what was wrong with it."""
    index, statistics, (channels, height, width) = dataset.index, dataset.index["statistics"], dataset.image_shape
    source = index["source"]
    values = ", ".join(f"{key} {statistics[key]:.4g}" for key in ("min", "median", "mean", "max", "std"))
    duplicates = len(dataset) - len(set(index["hashes"]))
    files = f", {source['files']:,} files" if source.get("files", 1) > 1 else ""
    splits = ", ".join(f"{name} {len(dataset.split(name)):,}" for name in index["split"]["fractions"])
    rows = [
        (
            "images",
            f"{len(dataset):,} of {width} × {height}, {_channels(channels)}, {_size(dataset.images.nbytes)}",
        ),
        ("source", f"{source.get('kind', 'unknown')} {source.get('name', '')}".strip() + files),
        ("units", str(dataset.transform)),
        ("pixels", values),
    ]
    if index.get("classes") not in (None, [], [NO_CLASS]):
        counts = sorted(((name, len(i)) for name, i in _class_indices(dataset).items()), key=lambda item: -item[1])
        more = f", and {len(counts) - CLASSES_SHOWN} classes more" if len(counts) > CLASSES_SHOWN else ""
        rows.append(("classes", ", ".join(f"{name} {n:,}" for name, n in counts[:CLASSES_SHOWN]) + more))
    for name, parameter in index.get("parameters", {}).items():
        known = [value for value in parameter["values"] if value is not None]
        spread = f": {min(known):.4g} to {max(known):.4g}" if known else ""
        rows.append((name, f"{len(known):,} values{spread} {parameter['unit']}".rstrip()))
    rows.append(("splits", splits))
    faults = f"no NaN or infinity, {statistics['constant_images']:,} constant, {duplicates:,} duplicates"
    rows.append(("checked", faults + (" (each in the split of its twin)" if duplicates else "")))
    if skipped := source.get("skipped"):
        first = f"{skipped[0]['file']} {skipped[0]['reason']}"
        rows.append(("left out", f"{len(skipped):,}, all in index.json; the first: {first}"))
    column = max(len(name) for name, _ in rows)
    return "\n".join([str(dataset.path), *(f"  {name:{column}}  {text}" for name, text in rows)])


def write_contact_sheet(dataset: LensImages, path: Path) -> None:
    """Rows of images of each class, evenly spaced among them, on one scale of colours."""
    classes = _class_indices(dataset)
    largest = sorted(classes, key=lambda name: -len(classes[name]))[:CLASSES_SHOWN]
    shown = {name: _evenly(classes[name], COLUMNS * max(1, 5 // len(largest))) for name in classes if name in largest}
    every = dataset.images[np.unique(np.concatenate(list(shown.values())))]
    low, high = (float(v) for v in np.percentile(every, SHOWN_PERCENT))
    high = high if high > low else low + 1
    bright, _ = _stretch(dataset)  # as the network will see them
    darkest, brightest = bright(np.array([low, high])).tolist()
    channels, height, width = dataset.image_shape
    scale = min(max(max(width, height), 96), 192) / max(width, height)
    cell, gap = (max(1, round(width * scale)), max(1, round(height * scale))), 4
    lines = sum(-(-len(indices) // COLUMNS) for indices in shown.values())
    sheet = Image.new("RGB", (COLUMNS * (cell[0] + gap) - gap, lines * (cell[1] + gap) - gap), "white")
    left, right, top, bottom = 172, 95, 62, 18  # dots, as all lengths here
    size = left + sheet.width + right, top + sheet.height + bottom
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / size[0], 1 - y / size[1], text, **style)

    line = 0
    for name, indices in shown.items():
        y = line * (cell[1] + gap)
        if len(classes) > 1:
            write(16, top + y + cell[1] * 0.42, _short(name), fontsize=11, weight="bold")
            write(16, top + y + cell[1] * 0.42 + 18, f"{len(classes[name]):,} images", fontsize=9, color=GREY)
        for place, picture in enumerate(colour(bright(dataset.images[indices]), (darkest, brightest))):
            row, column = divmod(place, COLUMNS)
            fitted = Image.fromarray(picture).resize(
                cell, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
            )
            sheet.paste(fitted, (column * (cell[0] + gap), y + row * (cell[1] + gap)))
        line += -(-len(indices) // COLUMNS)
    figure.figimage(np.asarray(sheet), left, bottom)
    several = f", the first of {channels} channels" if channels in (2, 4) else ""
    write(
        16,
        30,
        _escape(f"{dataset.name}: {len(dataset):,} images of {width} × {height}{several}"),
        fontsize=13,
        weight="bold",
    )
    more = f"; the {len(shown)} largest of {len(classes)} classes" if len(classes) > len(shown) else ""
    note = "colours from {} % to {} % of the pixels shown, {:.3g} to {:.3g} in the units of the data"
    write(16, 50, note.format(*SHOWN_PERCENT, low, high) + more, fontsize=9, color=GREY)
    if channels != 3:
        tall = min(sheet.height, 300)
        box = np.array((size[0] - 80, size[1] - top - tall, 13, tall)) / (size * 2)
        scalar = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(darkest, brightest), "inferno")
        ticks = _ticks(dataset, low, high)
        bar = figure.colorbar(scalar, cax=figure.add_axes(tuple(box)), ticks=bright(ticks).tolist())
        bar.set_ticklabels([f"{tick:.4g}" for tick in ticks])
        bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def write_histogram(dataset: LensImages, path: Path) -> None:
    """Pixel values, and the mean of each image, by class."""
    classes = _class_indices(dataset)
    if len(classes) > CLASSES_SHOWN:
        classes = {"all": np.arange(len(dataset))}
    each = max(1, SAMPLED_PIXELS // (math.prod(dataset.image_shape) * len(classes)))
    chosen = {name: _evenly(indices, each) for name, indices in classes.items()}
    low, high = dataset.index["statistics"]["min"], dataset.index["statistics"]["max"]
    edges = _spread(dataset, low, high if high > low else low + 1, 121)
    edges[[0, -1]] = low, max(high, edges[-1])  # rounding must lose no pixel
    figure, (of_pixels, of_means) = panels(2, width=5.6, height=3.8)
    means = {}
    for name, indices in chosen.items():
        counts, means_of_class = np.zeros(len(edges) - 1), []
        for batch in dataset.batches(indices):
            counts += np.histogram(batch.numpy(), edges)[0]
            means_of_class.append(batch.double().mean((1, 2, 3)).numpy())
        of_pixels.stairs(counts / counts.sum(), edges, label=_short(name), lw=1.3)
        means[name] = np.concatenate(means_of_class)
    every = np.concatenate(list(means.values()))
    if not np.isfinite(every).all():  # `prepare` lets none in: it was damaged since
        raise UserError(f"{dataset.path} holds pixels that are NaN or infinite: delete the folder and prepare it again")
    fewest = min(map(len, means.values()))
    bins = np.histogram_bin_edges(every, bins=int(np.clip(2 * math.sqrt(fewest), 5, 40)))
    for name, of_class in means.items():
        of_means.stairs(np.histogram(of_class, bins)[0] / len(of_class), bins, label=_short(name), lw=1.3)
    of_pixels.set(yscale="log", xlabel="pixel value, in the units of the data", ylabel="fraction of the pixels")
    of_means.set(xlabel="mean of an image", ylabel="fraction of the images", ylim=(0, None))
    if dataset.transform.scale is not None:
        of_pixels.set_xscale("function", functions=_stretch(dataset))
        of_pixels.set_xlim(low, high)
        ticks = _ticks(dataset, low, high)
        of_pixels.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks], fontsize=8)
    for axes in (of_pixels, of_means):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if len(classes) > 1:
        of_pixels.legend(fontsize=8, frameon=False)
    part = f"all {len(every):,}" if len(every) == len(dataset) else f"{len(every):,} of {len(dataset):,}"
    figure.suptitle(_escape(f"{dataset.name}: {part} images"), fontsize=11, weight="bold", x=0.01, ha="left")
    _save(figure, path)


def _stretch(dataset: LensImages) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """From the data's units to how bright they are shown, and back: as the network sees them where that is not linear."""
    transform = dataset.transform
    if transform.scale is None:
        return np.asarray, np.asarray

    def forward(values: np.ndarray) -> np.ndarray:
        return transform.unit(torch.from_numpy(np.array(values, np.float64))).numpy()

    def inverse(values: np.ndarray) -> np.ndarray:
        return transform.inverse(2 * torch.from_numpy(np.array(values, np.float64)) - 1).numpy()

    return forward, inverse


def _spread(dataset: LensImages, low: float, high: float, count: int) -> np.ndarray:
    """`count` values of the data from low to high, evenly apart as they are shown."""
    forward, inverse = _stretch(dataset)
    first, last = forward(np.array([low, high])).tolist()
    return inverse(np.linspace(first, last, count))


def _ticks(dataset: LensImages, low: float, high: float) -> np.ndarray:
    """Some round values of the data, evenly apart as they are shown."""
    if dataset.transform.scale is None:
        ticks = np.array(MaxNLocator(5).tick_values(low, high))
    else:
        ticks = _spread(dataset, low, high, 5)
        ticks = np.array([float(f"{tick:.2g}") for tick in ticks])
    return ticks[(ticks >= low) & (ticks <= high)]


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _class_indices(dataset: LensImages) -> dict[str, np.ndarray]:
    labels, classes = dataset.index.get("labels"), dataset.index.get("classes")
    if labels is None or classes in (None, [], [NO_CLASS]):
        return {"images": np.arange(len(dataset))}
    found = {name: np.flatnonzero(np.asarray(labels) == i) for i, name in enumerate(classes)}
    return {name: indices for name, indices in found.items() if len(indices)}


def _evenly(indices: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(indices))
    return indices[np.arange(count) * len(indices) // count]


def _channels(channels: int) -> str:
    return "1 channel" if channels == 1 else f"{channels} channels"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _short(name: str) -> str:
    return _escape(name if len(name) <= 16 else f"{name[:15]}…")


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read a formula
