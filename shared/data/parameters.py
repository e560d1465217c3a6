"""A table of what is known of images beside their pixels, as `lens-ldm prepare --parameters TABLE` takes it.

One image a row. A column `file` says which, or `index` where one file holds them all, or both for several such files; a
lone file of images needs neither, and has its rows in order. Every other column of numbers is a parameter, called as the
column is; `class` is each image's class. Units are read from a header such as `theta_E [arcsec]`, or from FITS and ECSV.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.data.sources import natural_key, reason_of
from shared.data.symmetries import AXIS, KINDS, PLACE, RULES, SCALAR, SHEAR, Rule
from shared.errors import UserError, hint
from shared.files import read_csv, sha256
from shared.simulate.preset import UNITS

FILE, INDEX, CLASS = "file", "index", "class"
FORMATS = {".csv": "", ".ecsv": "ascii.ecsv", ".fits": "fits", ".fit": "fits"}  # as astropy calls them
MISSING = ("", "nan", "na", "n/a", "null", "none", "--")
NAMED = 3  # names in an error


class ParameterTable:
    """The table at a path, read and checked; `match` it with the images before anything is asked of it.

    turns  "NAME=KIND" or "NAME,NAME=KIND": how names that the simulator does not have turn with an image,
           see `symmetries.KINDS`

    Raises UserError if the file cannot be read or its columns are none that a data set may have.
    """

    def __init__(self, path: Path, turns: Sequence[str] = ()):
        self.path = Path(path)
        columns, units = _read(self.path)
        self.request = {"name": self.path.name, "sha256": sha256(self.path)[:16], "turns": sorted(turns)}
        self._keys = {name: columns.pop(name, None) for name in (FILE, INDEX, CLASS)}
        self._count = len(next(iter(columns.values()), next(filter(None, self._keys.values()), [])))
        self._values: dict[str, list[float]] = {}
        self.left_out: list[str] = []  # columns of text
        for name, cells in columns.items():
            numbers = [_number(cell) for cell in cells]
            if all(number is None or math.isnan(number) for number in numbers):
                self.left_out.append(name)
                continue
            if None in numbers:
                row = numbers.index(None)
                raise UserError(
                    f"{path}: {name} is {str(cells[row])!r:.40} in row {row + 1}, which is no number: correct it, "
                    "or leave the cell empty where it is not known"
                )
            if not name.isidentifier():
                raise UserError(
                    f"{path}: {name!r} cannot be the name of a parameter: rename the column to letters, digits and _, with a "
                    "unit in brackets after them, such as theta_E [arcsec], or take it out"
                )
            self._values[name] = [number for number in numbers if number is not None]
        if not self._values and not self._keys[CLASS]:
            raise UserError(f"{path} has no column of numbers beside {FILE} and {INDEX}, and none called {CLASS}")
        self._rules = self._declared(turns)
        self._units = {name: self._in_our_unit(name, units.get(name, "")) for name in self._values}
        for rule in self._rules.values():
            if len({self._units[name] for name in rule[1:]}) > 1:
                raise UserError(f"{path}: {' and '.join(rule[1:])} turn into each other and need one unit: convert one")
        self._row: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def match(self, images: Sequence[str], *, labelled: bool, left_out: Iterable[str] = ()) -> None:
        """Find each image's row.

        images    their names as `Source.name` has them: a row may say `no/sample1.npy`, `sample1.npy` or `sample1`
        labelled  they have classes of their own, and need none of the table
        left_out  files that are no images of the data set: their rows are not wrong

        Raises UserError for rows of no image, of several, several rows of one, and an image without class where the
        table is to say it.
        """
        stacks = {_split(name)[0] for name in images}
        if (files := self._keys[FILE]) is not None:
            cells = [_text(cell) for cell in files]
            if self._keys[INDEX] is not None:
                cells = [f"{cell}[{i}]" for cell, i in zip(cells, self._places(), strict=True)]
            rows = self._named(cells, images, set(left_out))
        elif len(stacks) > 1:
            raise UserError(
                f"{self.path} has no column `{FILE}`: the images are in {len(stacks):,} files, say which each row is of, "
                f"as {images[0]}"
            )
        elif self._keys[INDEX] is not None:
            places = self._places()
            rows = [images[i] if 0 <= i < len(images) else None for i in places]
            self._refuse_unknown([str(i) for i, row in zip(places, rows, strict=True) if row is None], images)
        elif self._count != len(images):
            raise UserError(
                f"{self.path} has {self._count:,} rows for {len(images):,} images: without a column `{INDEX}` (from 0) or "
                f"`{FILE}` it needs one each, in order"
            )
        else:
            rows = list(images)
        for row, name in enumerate(rows):
            if name is not None and self._row.setdefault(name, row) != row:
                twice = [name for name, n in Counter(filter(None, rows)).items() if n > 1]
                raise UserError(f"{self.path} has several rows for {_some(twice, 'image')}: leave one of each")
        self._labelled = labelled
        self.classes(images)

    def parameters(self, images: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of these images, as `CacheWriter.finish` takes them; NaN where the table has no value."""
        rows = [self._row.get(name) for name in images]
        found = {}
        for name, values in self._values.items():
            found[name] = {
                "unit": self._units[name],
                "values": [math.nan if row is None else values[row] for row in rows],
            }
            if name in self._rules:
                found[name]["turns"] = list(self._rules[name])
        return found

    def classes(self, images: Sequence[str]) -> tuple[list[str], list[int]] | None:
        """The class names, in natural order, and each image's index into them; None where the table is not to say it.

        UserError if an image has none: unlike a number, a class cannot be left open in a data set.
        """
        if (cells := self._keys[CLASS]) is None or self._labelled:
            return None
        of_row = [_text(cell) for cell in cells]
        labels = [of_row[self._row[name]] if name in self._row else "" for name in images]
        if without := [name for name, label in zip(images, labels, strict=True) if not label]:
            raise UserError(
                f"{self.path} has no {CLASS} for {_some(without, 'image')}: every image needs one, or rename the column"
            )
        names = sorted(set(labels), key=natural_key)
        place = {name: i for i, name in enumerate(names)}
        return names, [place[label] for label in labels]

    def hints(self, images: Sequence[str]) -> list[str]:
        """What a user should know of how the table was taken, a line each."""
        lines = []
        if self.left_out:
            lines.append(f"{', '.join(self.left_out)} of {self.path} holds no numbers and is left out")
        if self._labelled and self._keys[CLASS] is not None:
            lines.append(f"{CLASS} of {self.path} is not used: the images have classes already")
        if without := [name for name in images if name not in self._row]:
            lines.append(
                f"{self.path} has no row for {_some(without, 'image')}: their parameters are taken as not known"
            )
        if unknown := [name for name in self._values if name not in RULES and name not in self._rules]:
            lines.append(
                f"no rule says how {', '.join(unknown)} would turn with an image, so a model is not told it of images that "
                f"training flips or rotates; where no turn changes it: --turns {','.join(unknown)}={SCALAR} (others: --help)"
            )
        return lines

    def _named(self, cells: Sequence[str], images: Sequence[str], left_out: set[str]) -> list[str | None]:
        """The image of each cell, None for a file that is left out: by its path, or else that without suffix, its name,
        or its name without suffix."""
        levels: list[dict[str, list[str]]] = [{}, {}, {}, {}]
        for name in dict.fromkeys((*images, *left_out)):
            path, number = _split(name)
            folder, slash, last = path.rpartition("/")
            stem = last.rpartition(".")[0] or last
            for level, alias in zip(levels, (path, folder + slash + stem, last, stem), strict=True):
                for called in {alias + number, alias}:  # a stack of one needs no number
                    level.setdefault(called, []).append(name)
        found: list[str | None] = []
        unknown = []
        for cell in cells:
            meant = next((level[cell] for level in levels if cell in level), [])
            if len(meant) > 1:
                numbered = all(_split(name)[0] == _split(meant[0])[0] for name in meant)
                how = f"add a column `{INDEX}`, from 0" if numbered else "write which, with its folder"
                raise UserError(f"{self.path}: {cell} may be {_some(meant, 'image')}: {how}")
            if not meant:
                unknown.append(cell or "an empty cell")
            found.append(meant[0] if meant and meant[0] not in left_out else None)
        self._refuse_unknown(unknown, images)
        return found

    def _refuse_unknown(self, unknown: Sequence[str], images: Sequence[str]) -> None:
        if not unknown:
            return
        if len(unknown) == self._count:
            raise UserError(
                f"no row of {self.path} is of an image: it has {', '.join(unknown[:NAMED])}, the images are "
                f"{', '.join(images[:NAMED])}"
            )
        raise UserError(f"{self.path} has {_some(unknown, 'row')} of no image: correct their names, or take them out")

    def _places(self) -> list[int]:
        numbers = [_number(cell) for cell in self._keys[INDEX] or ()]
        for row, number in enumerate(numbers, 1):
            if number is None or number != int(number if math.isfinite(number) else 0):
                raise UserError(f"{self.path}: {INDEX} is no whole number in row {row}: count images from 0")
        return [int(number) for number in numbers if number is not None]

    def _declared(self, turns: Sequence[str]) -> dict[str, Rule]:
        rules: dict[str, Rule] = {}
        for text in turns:
            names, _, kind = text.partition("=")
            each = [name.strip() for name in names.split(",")]
            if kind not in KINDS:
                raise UserError(
                    f"--turns {text}: expected NAME=KIND, of {', '.join(KINDS)}; as --turns {each[0]}={SCALAR}"
                )
            if kind in (PLACE, SHEAR) and len(each) != 2:
                raise UserError(f"--turns {text}: a {kind} has two names, as --turns {each[0]},OTHER={kind}")
            rule = (kind, *each) if kind in (PLACE, SHEAR) else (kind,)
            for name in each:
                if name not in self._values:
                    raise UserError(f"--turns {text}: {self.path} has no numbers {name!r}{hint(name, self.names)}")
                if RULES.get(name, rule) != rule:
                    raise UserError(
                        f"--turns {text}: {name} is a {RULES[name][0]} of the simulator's: rename yours if it is not"
                    )
                if name in rules:
                    raise UserError(f"--turns {text}: {name} is there twice")
                rules[name] = rule
        return rules

    def _in_our_unit(self, name: str, unit: str) -> str:
        """The unit of a column, with its values brought to the simulator's where it has the name; axes are in degrees."""
        ours = UNITS.get(name, "deg" if self._rules.get(name, ("",))[0] == AXIS else None)
        if ours is None or not unit or unit == ours:
            return unit if ours is None else ours
        from astropy import units

        try:
            factor = units.Unit(unit).to(units.Unit(ours))
        except (ValueError, TypeError) as error:
            what = f"in {ours}" if ours else "without unit"
            raise UserError(
                f"{self.path}: {name} is in {unit}, and must be {what}: convert it, or rename it"
            ) from error
        self._values[name] = [value * factor for value in self._values[name]]
        return ours


def _read(path: Path) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The cells of each column, as text, numbers or None, and the units that the table gives."""
    if (ending := path.suffix.lower()) not in FORMATS:
        raise UserError(f"{path} cannot be read as a table: give one of {' '.join(FORMATS)}")
    found: list[tuple[str, list[Any], str]] = []
    if ending == ".csv":
        for header, cells in read_csv(path, f"{FILE},theta_E [arcsec]").items():
            name, bracket, unit = header.removesuffix("]").partition("[")
            whole = bracket and header.endswith("]")
            found.append((name.strip(), cells, unit.strip()) if whole else (header, cells, ""))
    else:
        found = _read_astropy(path, FORMATS[ending])
    keys = (FILE, INDEX, CLASS)  # FITS likes capitals
    found = [(name.lower() if name.lower() in keys else name, cells, unit) for name, cells, unit in found]
    twice = [name for name, n in Counter(name for name, _, _ in found).items() if n > 1]
    if twice:
        raise UserError(f"{path} has the column {twice[0]} twice: leave one out")
    return {name: cells for name, cells, _ in found}, {name: unit for name, _, unit in found}


def _read_astropy(path: Path, form: str) -> list[tuple[str, list[Any], str]]:
    from astropy.table import Column, Table

    try:
        with warnings.catch_warnings():  # of units and keywords that astropy does not know
            warnings.simplefilter("ignore")
            table = Table.read(path, format=form)
            table.convert_bytestring_to_unicode()
            columns = [(name, table[name]) for name in table.colnames]
            found = []
            for name, column in columns:
                plain = isinstance(column, Column) and column.ndim == 1  # others are left out, as text is
                cells = column.tolist() if plain else ["not a number"] * len(column)
                found.append((name, cells, str(column.unit or "") if plain else ""))
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"{path} cannot be read as a table: {reason_of(error)}") from error
    if not found or not found[0][1]:
        raise UserError(f"{path} has no rows")
    return found


def _number(cell: Any) -> float | None:
    """NaN for what is missing, None for what is no finite number."""
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in MISSING):
        return math.nan
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return None if math.isinf(number) else number


def _text(cell: Any) -> str:
    """A name or a class; empty for what is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell == int(cell) else str(cell).strip()


def _split(name: str) -> tuple[str, str]:
    """What `Source.name` calls an image -> its file, and the numbers in brackets behind it."""
    path = re.sub(r"(\[[^\[\]]*\])+$", "", name)
    return path, name[len(path) :]


def _some(names: Sequence[str], what: str) -> str:
    """How many they are, and the first of them."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,} {what}{'s' * (len(names) != 1)} ({', '.join(names[:NAMED])}{more})"
