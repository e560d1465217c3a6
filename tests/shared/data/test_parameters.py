"""`lens-ldm prepare --parameters`: a table finds its images, and what it says of them reaches stage 2, or nothing does."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import MaskedColumn, Table

from shared.cli import main
from shared.data.cache import LensImages
from shared.data.parameters import ParameterTable
from shared.data.prepare import prepare
from shared.data.sources import Source
from shared.data.symmetries import ELEMENTS, Turns, apply_to_parameters, compose, how_they_turn
from shared.errors import UserError
from stage2_diffusion.conditions import Conditions

SPEC = {"class": False, "parameters": [], "dropout": 0.1, "subsets": 0.5}
FILES = ["no/a1.npy", "no/a2.npy", "vort/a1.npy", "vort/b1.npy"]


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    np.save(tmp_path / "stack.npy", np.random.default_rng(0).random((40, 6, 6), np.float32))
    return tmp_path / "stack.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in zip(FILES, np.random.default_rng(1).random((4, 6, 6), np.float32), strict=True):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / name, image)
    return tmp_path / "in"


def values(cache: LensImages, name: str) -> list[float | None]:
    return cache.index["parameters"][name]["values"]


# --- rows find their images -------------------------------------------------------------------------------------------


def test_a_row_may_call_its_image_by_path_name_or_stem(tmp_path, folder):
    rows = [["vort/a1.npy", 3], ["b1", 4], ["no/a1", 1], ["a2.npy", 2]]
    cache = prepare(folder, tmp_path / "out", parameters=table(tmp_path / "t.csv", ["file", "theta_E"], rows))
    assert cache.index["files"] == FILES
    assert values(cache, "theta_E") == [1, 2, 3, 4]
    assert cache.index["classes"] == ["no", "vort"]


def test_images_of_a_file_are_counted_or_in_order(tmp_path, stack):
    theta = np.random.default_rng(2).permutation(40)
    rows = [[i, theta[i]] for i in np.random.default_rng(3).permutation(40)]
    for name, header, lines in (("index", ["index", "theta_E"], rows), ("order", ["theta_E"], theta[:, None].tolist())):
        cache = prepare(stack, tmp_path / name, parameters=table(tmp_path / f"{name}.csv", header, lines))
        assert values(cache, "theta_E") == theta.tolist()


def test_several_files_of_images_need_both_columns(tmp_path):
    images = np.random.default_rng(0).random((4, 8, 6, 6), np.float32)
    (tmp_path / "in").mkdir()
    for name, part in zip("ab", (images[:2], images[2:]), strict=True):
        np.save(tmp_path / "in" / f"{name}.npy", part.reshape(16, 1, 6, 6))
    rows = [[name, i, 100 * k + i] for i in range(16) for k, name in enumerate("ab")]
    told = table(tmp_path / "t.csv", ["file", "index", "theta_E"], rows)
    cache = prepare(tmp_path / "in", tmp_path / "out", parameters=told)
    assert values(cache, "theta_E") == [*range(16), *range(100, 116)]
    with pytest.raises(UserError, match=r"a may be 16 images \(a\.npy\[0\], .*add a column `index`"):
        prepare(tmp_path / "in", tmp_path / "x", parameters=table(tmp_path / "u.csv", ["file", "q"], [["a", 1]]))


def test_fits_and_ecsv_say_units_and_what_is_missing(tmp_path, folder):
    for ending in (".fits", ".ecsv"):
        columns = Table({"FILE": FILES, "theta_E": [1000.0, 1100, 1200, 1300], "n": MaskedColumn([1, 2, 3, 4]),
                         "note": ["x", "y", "z", ""], "spectrum": np.zeros((4, 3))})  # fmt: skip
        columns["theta_E"].unit = "mas"
        columns["n"].mask = [False, True, False, False]
        columns.write(tmp_path / f"t{ending}")
        cache = prepare(folder, tmp_path / ending[1:], parameters=tmp_path / f"t{ending}", turns=["n=scalar"])
        assert cache.index["parameters"].keys() == {"theta_E", "n"}
        assert cache.index["parameters"]["theta_E"]["unit"] == "arcsec"
        np.testing.assert_allclose(values(cache, "theta_E"), [1, 1.1, 1.2, 1.3])  # type: ignore[arg-type]
        assert values(cache, "n") == [1, None, 3, 4]


def test_left_out_images_take_their_rows_with_them(tmp_path, stack):
    images = np.load(stack)
    images[3], images[7, 0, 0] = 0.5, np.nan
    np.save(stack, images)
    told = table(tmp_path / "t.csv", ["theta_E"], [[i] for i in range(40)])
    for _ in range(2):  # done, and done already
        cache = prepare(stack, tmp_path / "out", parameters=told, skip_bad=True)
        assert values(cache, "theta_E") == [i for i in range(40) if i not in (3, 7)]


def test_classes_come_from_the_table_where_images_have_none(tmp_path, stack, folder, capsys):
    kinds = ["cdm", "axion"]
    told = table(tmp_path / "t.csv", ["index", "class"], [[i, kinds[i % 2]] for i in range(40)])
    cache = prepare(stack, tmp_path / "out", parameters=told)
    assert [cache.index["classes"][label] for label in cache.index["labels"]] == kinds * 20
    rows = [[name, "mine"] for name in FILES]
    cache = prepare(folder, tmp_path / "own", parameters=table(tmp_path / "u.csv", ["file", "class"], rows))
    assert cache.index["classes"] == ["no", "vort"]
    assert "class of" in (said := capsys.readouterr().err)
    assert "is not used: the images have classes already" in said


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["file", "q"], [[f"x{i}", i] for i in range(5)], r"no row of .* is of an image: it has x0, x1, x2, the images are no"),
        (["file", "q"], [["a2", 1], *([f"x{i}", i] for i in range(4))], r"has 4 rows \(x0, x1, x2, \.\.\.\) of no image"),
        (["file", "q"], [["a2", 1], ["no/a2.npy", 1]], r"several rows for 1 image \(no/a2\.npy\)"),
        (["file", "q"], [["a1", 1]], r"a1 may be 2 images \(no/a1\.npy, vort/a1\.npy\): write which, with its folder"),
        (["file", "q"], [["a2", 1], ["b1", "wide"]], "q is 'wide' in row 2, which is no number"),
        (["file", "q"], [["a2", 1], ["b1", "inf"]], "q is 'inf' in row 2, which is no number"),
        (["file", "theta E"], [["a2", 1]], "'theta E' cannot be the name of a parameter"),
        (["file", ""], [["a2", 1]], "'' cannot be the name of a parameter"),
        (["file", "name"], [["a2", "x"]], "has no column of numbers"),
        (["file", "q", "q [deg]"], [["a2", 1, 2]], "the column q twice"),
        (["file", "q"], [["a2"]], "line 2: has other columns"),
        (["file", "q"], [], "lines of values below it"),
        (["q"], [[1]], r"no column `file`: the images are in 4 files, say which each row is of, as no/a1\.npy"),
        (["index", "q"], [[0, 1]], "no column `file`"),
        (["file", "theta_E [kpc]"], [["a2", 1]], "theta_E is in kpc, and must be in arcsec"),
        (["file", "gamma [deg]"], [["a2", 1]], "gamma is in deg, and must be without unit"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_an_image_is_read(tmp_path, folder, monkeypatch, header, rows, message):
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(UserError, match=message) as caught:
        prepare(folder, tmp_path / "out", parameters=table(tmp_path / "t.csv", header, rows))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["q"], [[i] for i in range(39)], "has 39 rows for 40 images"),
        (["index", "q"], [[39, 1], [40, 1]], r"has 1 row \(40\) of no image"),
        (["index", "q"], [[1, 1], [0.5, 1]], "index is no whole number in row 2"),
        (["index", "q"], [[1, 1], ["", 1]], "index is no whole number in row 2"),
        (["index", "q"], [[1, 1], [1, 2]], r"several rows for 1 image \(stack\.npy\[1\]\)"),
        (["index", "class"], [[i, "cdm" if i else ""] for i in range(40)], r"no class for 1 image \(stack\.npy\[0\]\)"),
        (["index", "low"], [[1, 1]], "the data have a low of their own"),
    ],
)
def test_mistakes_with_counted_images(tmp_path, stack, header, rows, message):
    with pytest.raises(UserError, match=message):
        prepare(stack, tmp_path / "x", parameters=table(tmp_path / "t.csv", header, rows), normalise="minmax")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("q", "expected NAME=KIND, of scalar, axis, place, shear; as --turns q=scalar"),
        ("q=fixed", "expected NAME=KIND"),
        ("p=scalar", "has no numbers 'p'"),
        ("theta_E=axis", "theta_E is a scalar of the simulator's"),
        ("q=place", "a place has two names, as --turns q,OTHER=place"),
        ("q,q=shear", "q is there twice"),
        ("q,r=shear", "q and r turn into each other and need one unit"),
    ],
)
def test_mistakes_of_turns(tmp_path, turns, message):
    told = table(tmp_path / "t.csv", ["theta_E", "q", "r [deg]"], [[1, 1, 1]])
    with pytest.raises(UserError, match=message):
        ParameterTable(told, [turns])


def test_the_command_line_answers_in_one_line(tmp_path, stack, capsys):
    np.savetxt(tmp_path / "t.txt", [1.0])
    (tmp_path / "bad.fits").write_text("nothing")
    for arguments, message in (
        (["--parameters", tmp_path / "none.csv"], "none.csv cannot be read as CSV: No such file or directory"),
        (["--parameters", tmp_path / "none.fits"], "none.fits cannot be read as a table: No such file or directory"),
        (["--parameters", tmp_path / "bad.fits"], "bad.fits cannot be read as a table"),
        (["--parameters", tmp_path / "t.txt"], "cannot be read as a table: give one of .csv .ecsv .fits .fit"),
        (["--turns", "q=scalar"], "--turns is of the columns of --parameters"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["prepare", str(stack), "--out", str(tmp_path / "out"), *map(str, arguments)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1


def test_another_table_is_another_data_set(tmp_path, stack):
    told = table(tmp_path / "t.csv", ["theta_E"], [[i] for i in range(40)])
    prepare(stack, tmp_path / "out", parameters=told)
    prepare(stack, tmp_path / "out", parameters=told)
    table(told, ["theta_E"], [[i + 1] for i in range(40)])
    with pytest.raises(UserError, match=r"holds another data set \(source\.parameters\.sha256"):
        prepare(stack, tmp_path / "out", parameters=told)
    with pytest.raises(UserError, match="holds another data set"):
        prepare(stack, tmp_path / "out")


# --- what a turn makes of them ----------------------------------------------------------------------------------------

TURNS = ["mass=scalar", "phi=axis", "x,y=place", "e1,e2=shear"]


def test_declared_names_turn_as_the_simulators_do(tmp_path):
    rng = np.random.default_rng(0)
    phi, e, x, y = rng.uniform(0, 180, 40), rng.uniform(0.1, 0.5, 40), *rng.normal(size=(2, 40))
    e1, e2 = e * np.cos(np.deg2rad(2 * phi)), e * np.sin(np.deg2rad(2 * phi))
    np.save(tmp_path / "s.npy", rng.random((40, 6, 6)))
    header = ["mass", "phi [rad]", "x", "y", "e1", "e2", "x_s", "y_s", "PA_s", "seeing"]
    rows = np.stack([e, np.deg2rad(phi), x, y, e1, e2, x, y, phi, e], 1).tolist()
    told = table(tmp_path / "t.csv", header, rows)
    cache = prepare(tmp_path / "s.npy", tmp_path / "out", parameters=told, turns=TURNS)
    known = {name: np.array(column["values"], float) for name, column in cache.index["parameters"].items()}
    assert cache.index["parameters"]["phi"]["unit"] == "deg"
    rules = how_they_turn(cache)
    for element in ELEMENTS:
        turned = apply_to_parameters(known, element, rules)
        np.testing.assert_allclose(turned["mass"], e)
        np.testing.assert_allclose((turned["phi"] - turned["PA_s"] + 90) % 180, 90)
        np.testing.assert_allclose([turned["x"], turned["y"]], [turned["x_s"], turned["y_s"]])
        angle = np.deg2rad(2 * turned["PA_s"])
        np.testing.assert_allclose([turned["e1"], turned["e2"]], [e * np.cos(angle), e * np.sin(angle)], atol=1e-12)
        assert np.isnan(turned["seeing"]).all() == (element != "identity")
        for second in ELEMENTS:
            both = apply_to_parameters(turned, second, rules)
            once = apply_to_parameters(known, compose(second, element), rules)
            for name in ("x", "y", "e1", "e2"):
                np.testing.assert_allclose(both[name], once[name], atol=1e-12)


def test_a_model_is_told_what_is_known_and_of_turned_images_what_has_a_rule(tmp_path, stack, capsys):
    rows = [[i, "" if i % 4 == 0 else 1 + i / 40, 0.1 * i, 0.2 * i, 9 * i % 180] for i in range(36)]
    header = ["index", "theta_E", "seeing", "z_l2", "phi"]
    told = table(tmp_path / "t.csv", header, rows)
    cache = prepare(stack, tmp_path / "out", parameters=told, turns=["z_l2=scalar", "phi=axis"])
    said = capsys.readouterr().err
    assert "no rule says how seeing would turn" in said
    assert "no row for 4 images (stack.npy[36], stack.npy[37], stack.npy[38], ...)" in said
    train = cache.split("train")
    both = Turns(("identity", "flip_lr"), [0, 0], [0.5, 0.5], {})
    conditions = Conditions.learn({**SPEC, "parameters": header[1:]}, cache, train, both)
    assert [entry.width for entry in conditions.entries] == [1, 1, 1, 2]  # an angle is the same after half a turn
    assert Conditions.from_config(json.loads(json.dumps(conditions.to_config()))) == conditions
    everything = np.arange(40)
    for element, seeing in (("identity", True), ("flip_lr", False)):
        vector = conditions.vector(40, conditions.of(cache, everything, element))
        assert vector is not None
        known = vector.isfinite().numpy()
        rows_known = everything < 36
        np.testing.assert_array_equal(known[:, 0], rows_known & (everything % 4 > 0))
        np.testing.assert_array_equal(known[:, 1], rows_known & seeing)
        np.testing.assert_array_equal(known[:, 2:], np.broadcast_to(rows_known[:, None], (40, 3)))
    upright, mirrored = (conditions.vector(40, conditions.of(cache, everything, g)) for g in both.elements)
    np.testing.assert_allclose(upright[:, 2], mirrored[:, 2])  # type: ignore[index]
    assert (upright[1:36, 4] - mirrored[1:36, 4]).abs().max() > 1  # type: ignore[index]
    assert math.isclose(conditions.require("seeing").mean[0], float(np.nanmean(0.1 * train[train < 36])), rel_tol=1e-6)
    assert conditions.fingerprint(cache)["table of parameters"].endswith(" phi=axis z_l2=scalar")
