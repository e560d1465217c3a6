"""`lens-ldm fit SOURCE`: which lenses are these, and are they lenses at the level of their noise?

SOURCE is a data set (data/NAME), samples.npz of `lens-ldm sample`, or whatever else `lens-ldm prepare` reads, on the pixel
grid of the preset. Fits a lens model of the preset to each image (shared/metrics/lens_fit.py), compares the parameters
with the preset's priors and with the truth: what the data set knows, or what samples were asked for; writes OUT.csv and OUT.png.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
from scipy import stats

from shared.cli import Parser, at_least, positive, two_numbers
from shared.data.cache import INDEX, LensImages
from shared.data.formats import CONDITION
from shared.data.sources import BrokenImage, Source
from shared.errors import UserError
from shared.evaluation.lenses import lens_share, residuals
from shared.evaluation.tables import LIT
from shared.files import require_name, write_atomically
from shared.metrics.lens_fit import Coordinates, LensFits, LensFitter
from shared.metrics.obedience import difference, spread
from shared.metrics.two_sample import holm
from shared.report import save_picture
from shared.simulate.preset import Preset, draw_parameters

PRIOR_DRAWS = 20_000
SHOWN = 6
ANGLES = [angle for _, angle in Coordinates.SPINS]


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm fit`."""
    parser = Parser("lens-ldm fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="data/NAME, samples.npz, a folder of .npy, ...")
    parser.add_argument("--preset", default="deeplense", help="name in configs/simulate or .yaml file: what may be")
    parser.add_argument("--class", dest="kind", metavar="NAME", help="of the preset (default: its first)")
    parser.add_argument("--key", metavar="NAME", help="which array of a file with several, as of `lens-ldm prepare`")
    parser.add_argument("--count", type=positive, default=300, help="the first of the images (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="of a data set (default: all of it)")
    parser.add_argument(
        "--free", default="", metavar="n_s,R_s", help="parameters to free beside those the preset draws"
    )
    parser.add_argument(
        "--noise",
        type=two_numbers("A,B with A > 0 and B >= 0", lambda a, b: a > 0 and b >= 0),
        metavar="A,B",
        help="variance A + B signal, not the preset's photon noise",
    )
    parser.add_argument(
        "--margin", type=at_least(0), default=0, help="pixels at the border that are left out (default: 0)"
    )
    parser.add_argument("--out", type=Path, help="OUT.csv and OUT.png (default: fits-NAME here)")
    a = parser.parse_args(argv)
    if a.out is not None:
        require_name(a.out)
    preset = Preset.load(a.preset)
    kind = a.kind or next(iter(preset.classes), None)
    images, truth = load_images(a.source, a.split, a.count, a.key, kind)
    free = [name for name in a.free.split(",") if name]
    fitter = LensFitter(preset, kind=kind, free=free, noise=a.noise, margin=a.margin)
    fits = fitter.fit(images, progress=True)
    source = a.source.resolve()
    out = a.out or Path(f"fits-{source.name if source.is_dir() else source.stem}")
    csv_file, picture = (out.with_name(out.name + suffix) for suffix in (".csv", ".png"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(csv_file, table(fits).encode())
        worst = np.argsort(fits.chi2)[::-1][:SHOWN]
        save_picture(picture, residuals(images, fits, worst))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    print(summary(fits, fitter.preset, truth))
    print(f"{csv_file}, {picture}: every fit, and the {SHOWN} worst")


def load_images(
    source: Path, split: str | None, count: int, key: str | None, kind: str | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The first `count` images of SOURCE, (N, C, H, W), and what is known of their parameters, {name: (N,)}.

    Of a data set with the class `kind`, the images of that class.
    """
    if (source / INDEX).exists():
        data = LensImages(source)
        chosen = np.arange(len(data)) if split is None else data.split(split)
        classes = data.index.get("classes") or []
        if kind in classes:
            of_kind = np.asarray(data.index["labels"])[chosen] == classes.index(kind)
            if not of_kind.all():
                print(f"{of_kind.sum()} of {len(chosen)} images are of class {kind} (--class for others)")
            chosen = chosen[of_kind]
        chosen = chosen[:count]
        if not len(chosen):
            raise UserError(f"{source} has no such images: choose another --split or --class")
        known = data.index.get("parameters", {})
        truth = {name: np.array(column["values"], float)[chosen] for name, column in known.items()}
        return data.originals(chosen), truth  # in the units of the preset, not of --normalise minmax
    if split is not None:
        raise UserError(f"--split is for data sets of `lens-ldm prepare` and `simulate`, which {source} is not")
    with Source(source, key=key) as images:
        for broken in images.broken[:1]:
            raise UserError(f"{broken.name} {broken.reason}")
        try:
            read = np.stack([images.read(i) for i in range(min(count, len(images)))])
            return read, asked_for(source, len(images), len(read))
        except BrokenImage as error:
            raise UserError(f"{source}: an image {error}") from error


def asked_for(source: Path, among: int, count: int) -> dict[str, np.ndarray]:
    """What the first `count` of `among` lenses in a samples.npz were asked to be, {name: (count,)}; of other sources nothing."""
    if source.suffix.lower() != ".npz":
        return {}
    try:
        with np.load(source, allow_pickle=False) as file:
            names = [name for name in file.files if name.startswith(CONDITION)]
            asked = {name.removeprefix(CONDITION): file[name] for name in names}
    except ValueError as error:
        raise UserError(f"{source}: what its lenses were asked to be cannot be read ({error})") from error
    return {k: v[:count] for k, v in asked.items() if v.dtype.kind == "f" and v.shape == (among,)}


def table(fits: LensFits) -> str:
    """Every fit as CSV, one line an image."""
    columns = {name: getattr(fits, name) for name in ("chi2", "chi2_lit", "snr", "amplitude", "background")}
    for name, values in fits.parameters.items():
        columns |= {name: values, f"{name}_error": fits.errors[name]}
    columns |= {"converged": fits.converged.astype(int), "consistent": fits.consistent().astype(int)}
    columns["consistent_lit"] = fits.consistent(lit=True).astype(int)
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["image", *columns])
    for i in range(len(fits)):
        writer.writerow([i, *(f"{values[i]:.6g}" for values in columns.values())])
    return stream.getvalue()


def summary(fits: LensFits, preset: Preset, truth: dict[str, np.ndarray]) -> str:
    """A table for people: how good the fits are, and what lenses they found, against the priors and the truth."""
    n, good, share = len(fits), fits.consistent(), lens_share(fits)
    lines = [f"{n} images, lens model of preset {preset.name}, free in {', '.join(fits.parameters)}"]
    for name, label in (("chi2", "chi2 / pixel"), ("chi2_lit", "  of lit pixels")):
        values = getattr(fits, name)
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
        near = np.mean(np.abs(values - 1) < 0.05)
        lines.append(f"{label:16} median {middle:.3f}, 90 % in {low:.3f} to {high:.3f}; within 0.05 of 1: {near:.1%}")
    for of, label in (
        ("", "lenses at the noise level (chi2 below 1.2, above 1/1.2; 10 sigma)"),
        (LIT, "by lit pixels alone"),
    ):
        low, high = share[f"interval{of}"]
        part = share[f"share{of}"]
        lines.append(f"{label}: {round(n * part)} of {n}, {part:.1%} (95 %: {low:.1%} to {high:.1%})")
    if not good.any():
        unit = f"in {preset.pixel_unit}, " if preset.scaling == "none" else ""
        lines.append(
            f"none is: are they on the grid of {preset.pixel_scale:g} arcsec a pixel, {unit}and of this preset?"
        )
        return "\n".join(lines)
    known = [name for name in fits.parameters if name in truth and np.isfinite(truth[name][good]).any()]
    lines.append(f"\nparameters of the {good.sum()}:")
    header = f"{'':12}{'median':>9}{'16 %':>9}{'84 %':>9}{'error':>9}{'KS p':>8}"
    lines.append(header + (f"{'bias':>10}{'scatter':>9}{'pull':>7}" if known else ""))
    drawn = draw_parameters(preset, 0, range(PRIOR_DRAWS))
    tests, found = {}, {}
    for name, values in fits.parameters.items():
        prior = drawn[name]
        found[name] = _same_turn(name, values[good], prior)
        if np.ptp(prior) > 0:
            tests[name] = stats.ks_2samp(found[name], _same_turn(name, prior, prior)).pvalue
    adjusted = holm(tests)
    for name, values in found.items():
        low, middle, high = np.quantile(values, [0.16, 0.5, 0.84])
        errors = fits.errors[name][good]
        p = f"{adjusted[name]:8.3f}" if name in adjusted else f"{'-':>8}"
        line = f"{name:12}{middle:9.4f}{low:9.4f}{high:9.4f}{np.median(errors):9.4f}{p}"
        if name in known:
            apart = difference(truth[name][good], values, name in ANGLES)
            apart, errors = apart[np.isfinite(apart)], errors[np.isfinite(apart)]
            line += f"{np.median(apart):10.4f}{spread(apart):9.4f}{spread(apart / errors):7.2f}"
        lines.append(line)
    lines.append("error: median standard deviation of a fit; KS p: against the preset's prior, Holm's correction")
    if known:
        lines.append("bias, scatter (robust) of the difference to the truth; pull: its scatter in units of the errors")
    return "\n".join(lines)


def _same_turn(name: str, values: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Angles of axes are known up to half a turn: the one within half a turn of the prior's middle."""
    if name not in ANGLES:
        return values
    middle = (prior.min() + prior.max()) / 2
    return (values - middle + 90) % 180 - 90 + middle
