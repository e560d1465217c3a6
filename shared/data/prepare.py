"""`lens-ldm prepare SOURCE --out data/NAME`: what users have, made into a data cache.

SOURCE is a folder (searched recursively), a .zip (never unpacked) or one file of .npy, .npz, HDF5, FITS, PNG, TIFF or
JPEG; files of many images are read everywhere. Images keep their units, but for --normalise minmax. Class sub-folders,
or --labels, become labels. An interrupted run goes on with the same command.

Axes: (H, W) is an image; (N, C, H, W) and (N, H, W, C) with at most 4 channels are many. An array of three axes is
(N, H, W) if it is in the only file of SOURCE; in a file among several it is (C, H, W) or (H, W, C) if the first or the
last axis is at most 4, and (N, H, W) otherwise. Where both fit, channels come first. FITS is turned over: its first
row is the bottom.

--parameters TABLE (.csv, .ecsv, .fits) says what is known of the images, one a row. Its column `file` is an image's path,
its name, or its name without suffix; `index`, from 0, counts the images of a file; a lone file of images needs neither, with
its rows in order. Every other column of numbers becomes a parameter that stage 2 can be told (condition.parameters), with
the unit of a header such as `theta_E [arcsec]`; `class` becomes the class of images that have none. Empty cells, and images
without a row, are trained as not known.

Training turns images by their symmetries, and what is known of them with them. The names of `lens-ldm simulate` have their
meaning there: PA_s and gamma_angle in degrees, counterclockwise from x, x_s to the right and y_s upwards of the centre, as
the contact sheet shows the image; their units are converted. What a turn makes of another name nobody knows, and a turned
image is taken not to know it, unless --turns says its kind: z_lens,mass=scalar (the same in any orientation), phi=axis (an
angle like PA_s), x,y=place, gamma1,gamma2=shear (or an ellipticity: e cos 2 phi, e sin 2 phi).
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shared.cli import Parser
from shared.data.cache import INDEX, PROGRESS, CacheWriter, LensImages
from shared.data.inspect import CONTACT_SHEET, table, write_contact_sheet
from shared.data.normalise import CHOICES, Normalisation, hint
from shared.data.parameters import ParameterTable
from shared.data.sources import BEYOND, Broken, BrokenImage, Source
from shared.data.sources import KINDS as FAULTS
from shared.data.symmetries import KINDS
from shared.errors import UserError

LISTED = 10  # broken images named in an error
CHUNK_BYTES = 1 << 25


def main(argv: list[str] | None = None) -> None:
    """The command line of `lens-ldm prepare`."""
    parser = Parser(prog="lens-ldm prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, .zip or file of images")
    parser.add_argument("--out", type=Path, required=True, metavar="data/NAME", help="where to write the data set")
    parser.add_argument(
        "--key", metavar="NAME", help="array of an .npz, dataset of HDF5, extension of FITS (name or number); '*': all"
    )
    parser.add_argument("--labels", metavar="NAME", help="array of the same file that holds a class for each image")
    parser.add_argument("--only", metavar="SUFFIX", help="read the files of this suffix alone, such as .fits")
    parser.add_argument(
        "--normalise",
        default="none",
        metavar="HOW",
        help=f"between the data's units and the network's range: {CHOICES} (default %(default)s)",
    )
    parser.add_argument(
        "--parameters", type=Path, metavar="TABLE", help="what is known of each image (default: nothing)"
    )
    parser.add_argument(
        "--turns",
        action="append",
        default=[],
        metavar="NAME[,NAME]=KIND",
        help=f"how a parameter turns with its image: {', '.join(KINDS)} (see above; default: the simulator's names alone "
        "are known); may be given several times",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave broken images out; index.json tells which")
    options = parser.parse_args(argv)
    prepare(
        options.source,
        options.out,
        key=options.key,
        labels=options.labels,
        only=options.only,
        normalise=options.normalise,
        parameters=options.parameters,
        turns=options.turns,
        skip_bad=options.skip_bad,
    )


def prepare(
    source: Path,
    out: Path,
    *,
    key: str | None = None,
    labels: str | None = None,
    only: str | None = None,
    normalise: str = "none",
    parameters: Path | None = None,
    turns: Sequence[str] = (),
    skip_bad: bool = False,
) -> LensImages:
    """Check the images of `source`, write them to a cache at `out` with a contact sheet, print a table, return the cache.

    key, labels, only  see `sources.Source`
    normalise          see `normalise.Normalisation`
    parameters, turns  a table of what is known of the images, see `parameters.ParameterTable`
    skip_bad           leave broken images out, and record them in index.json under source.skipped

    Raises one UserError that names every kind of fault found, the first ten broken images and how many there are. What
    is wrong with the table is found before the images are read.
    """
    started, source, out = time.monotonic(), Path(source), Path(out)
    normalisation = Normalisation.parse(normalise)
    _check_paths(source, out)
    if turns and parameters is None:
        raise UserError("--turns is of the columns of --parameters TABLE: give that, too")
    told = None if parameters is None else ParameterTable(parameters, turns)
    with Source(source, key=key, labels=labels, only=only) as images:
        if images.broken and not skip_bad:
            raise _fault_error(images, images.broken)
        if told is not None and len(images):
            _match(told, images, normalisation)
        skipped = list(images.broken)
        if skip_bad:
            skipped += images.leave_out(_skipped_before(out, images.request))
        while True:
            if not len(images):
                raise _fault_error(images, skipped)
            request = dict(images.request) | ({} if told is None else {"parameters": told.request})
            if skip_bad:
                request["skipped"] = [{"file": image.name, "reason": image.reason} for image in skipped]
            chunk = max(1, min(256, CHUNK_BYTES // (4 * math.prod(images.shape))))
            writer = CacheWriter(out, len(images), images.shape, request, chunk, normalisation)
            broken = _write(writer, images, normalisation, str(out))
            if not broken:
                break
            writer.discard()
            if not skip_bad:
                raise _fault_error(images, broken)
            skipped += images.leave_out(broken)
        known = writer.complete
        if not known:
            names = _names(images)
            classes, labels_of = images.classes()
            columns = images.parameters()
            if told is not None:
                columns |= told.parameters(names)
                classes, labels_of = told.classes(names) or (classes, labels_of)
            writer.finish(classes=classes, labels=labels_of, files=names, parameters=columns or None)
    dataset = LensImages(out)
    with suppress(PermissionError):  # of a data set that others share
        if not (out / CONTACT_SHEET).exists():
            write_contact_sheet(dataset, out / CONTACT_SHEET)
    print(table(dataset))
    print(f"{out} {'was already prepared' if known else f'written in {time.monotonic() - started:.0f} s'}")
    if empty := [name for name in ("train", "validation", "test") if not len(dataset.split(name))]:
        print(
            f"hint: no image has fallen into {' or '.join(empty)}; training needs more images than these",
            file=sys.stderr,
        )
    for line in told.hints(dataset.index["files"]) if told else []:
        print(f"hint: {line}", file=sys.stderr)
    if advice := hint(dataset.transform, dataset.index["statistics"]):
        print(f"hint: {advice}", file=sys.stderr)
    return dataset


def _write(writer: CacheWriter, images: Source, normalisation: Normalisation, name: str) -> list[Broken]:
    """Write what is pending; return the broken images, with which nothing more is written, only read."""
    pending, broken = writer.pending(), []
    done = len(images) - sum(map(len, pending))
    with tqdm(total=len(images), initial=done, unit="image", desc=name, disable=None) as bar:
        for indices in pending:
            chunk = np.empty((len(indices), *images.shape), np.float32)
            for row, i in enumerate(indices):
                try:
                    chunk[row] = normalisation.check(images.read(i))
                except BrokenImage as error:
                    broken.append(Broken(images.name(i), error.kind, str(error)))
                except ValueError as error:
                    broken.append(Broken(images.name(i), BEYOND, str(error)))
                bar.update()
            if not broken:
                writer.write(indices, chunk)
    return broken


def _names(images: Source) -> list[str]:
    return [images.name(i) for i in range(len(images))]


def _match(told: ParameterTable, images: Source, normalisation: Normalisation) -> None:
    """Find the row of each image. UserError for what the table cannot say of these images."""
    names = _names(images)
    told.match(names, labelled=len(images.classes()[0]) > 1, left_out=[image.name for image in images.broken])
    taken = {*images.parameters(), *(("low", "high") if normalisation.name == "minmax" else ())}
    if twice := [name for name in told.names if name in taken]:
        raise UserError(f"{told.path}: the data have a {twice[0]} of their own: rename the column, or take it out")


def _check_paths(source: Path, out: Path) -> None:
    if not source.is_dir():
        return
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies inside SOURCE {source}, and would be read as images: choose another --out")
    if (source / INDEX).exists() or (source / PROGRESS).exists():
        raise UserError(
            f"{source} is itself a data set that was prepared: train on it, or look with `lens-ldm inspect`"
        )


def _skipped_before(out: Path, request: dict) -> list[Broken]:
    """The images that an earlier run of the same request, perhaps stopped, had to leave out."""
    for name in (INDEX, PROGRESS):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads((out / name).read_text(encoding="utf-8"))["source"]
            if all(found[key] == value for key, value in request.items()):
                return [Broken(image["file"], "", image["reason"]) for image in found["skipped"]]
    return []


def _fault_error(images: Source, broken: Sequence[Broken]) -> UserError:
    count = max(len(images) + len(images.broken), len(broken))
    if images.path.is_file() and broken[0].name == images.path.name:
        return UserError(f"{images.path} {broken[0].reason}")
    kinds = Counter(image.kind for image in broken)
    summary = ", ".join(f"{kinds[kind]} {kind}" for kind in FAULTS if kinds[kind])
    listed = "".join(f"\n  {image.name}: {image.reason}" for image in broken[:LISTED])
    more = f"\n  and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    lines = f"{len(broken)} of {count} images in {images.path} cannot be used ({summary}): "
    lines += f"repair or remove them, or leave them out with --skip-bad{listed}{more}"
    if len(images.shapes) > 1:
        shown = ", ".join(f"{n} of {shape}" for shape, n in images.shapes[:LISTED])
        lines += f"\nshapes: {shown}; a data set has one shape, prepare them apart"
    return UserError(lines)
