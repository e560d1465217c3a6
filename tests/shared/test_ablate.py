"""The cells of an ablation: what a file makes of them, and what is left to do of each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.ablate import Record, check_unchanged, chosen, continued, main
from shared.config import load_config, to_dict, unfold
from shared.errors import UserError
from shared.schema import Ablation, Stage1, Stage2

ROOT = Path(__file__).parents[2]


def ablation(**keys: Any) -> Ablation:
    return load_config(Ablation, [], {"cells": {"plain": {}}, **keys})


def test_dotted_keys_and_blocks_say_the_same() -> None:
    tree = {"a.b.c": 1, "a": {"b.d": 2}, "e": {"f.g": {"h.i": 3}}}
    assert unfold(tree) == {"a": {"b": {"c": 1, "d": 2}}, "e": {"f": {"g": {"h": {"i": 3}}}}}
    options_after_the_name = {"q.levels": [3], "q": {"name": "fsq"}}
    assert unfold(options_after_the_name) == {"q": {"name": "fsq", "levels": [3]}}


def test_a_cell_changes_its_keys_alone() -> None:
    cells = {"plain": {}, "vq": {"autoencoder.quantizer": {"name": "vq"}, "stage2": {"backbone.width": 32}}}
    a = ablation(cells=cells, seed=5, output="out", name="abl", budget={"steps": 321})
    (plain1, plain2), (vq1, vq2) = a.stages("plain"), a.stages("vq")
    assert (plain1.name, vq1.name, plain1.output, plain1.seed) == ("plain-stage1", "vq-stage1", "out/abl", 5)
    assert plain1.trainer.max_steps == vq1.trainer.max_steps == 321
    assert (plain1.autoencoder.quantizer.name, vq1.autoencoder.quantizer.name) == ("fsq", "vq")
    assert plain2 is not None
    assert vq2 is not None
    assert (plain2.autoencoder, vq2.autoencoder) == ("out/abl/plain-stage1", "out/abl/vq-stage1")
    assert (plain2.backbone.width, vq2.backbone.width) == (64, 32)
    assert vq1.model_copy(update={"name": plain1.name, "autoencoder": plain1.autoencoder}) == plain1
    assert ablation(stage2=None).stages("plain")[1] is None


def test_another_name_replaces_the_block_of_the_base() -> None:
    base = {"config": "stage1/quickstart.yaml", "overrides": {"autoencoder": {"quantizer.levels": [5, 5, 5, 5, 5]}}}
    a = ablation(stage1=base, cells={"fsq": {}, "none": {"autoencoder.quantizer": {"name": "none"}}})
    assert a.stages("fsq")[0].autoencoder.quantizer.model_dump() == {"name": "fsq", "levels": (5, 5, 5, 5, 5)}
    assert a.stages("none")[0].autoencoder.quantizer.model_dump() == {"name": "none"}


def test_factors_are_crossed() -> None:
    cross = {
        "quantizer": {"none": {"autoencoder.quantizer": {"name": "none"}}, "fsq": {}},
        "grid": {"f10": {}, "f15": {"autoencoder.strides": [3]}},
    }
    a = ablation(cells={}, cross=cross)
    assert list(a.overrides()) == ["none-f10", "none-f15", "fsq-f10", "fsq-f15"]
    stage1 = a.stages("none-f15")[0]
    assert (stage1.autoencoder.quantizer.name, stage1.autoencoder.strides) == ("none", (3,))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"cells": {}}, "there are no cells"),
        ({"cells": {"a-b": {}}, "cross": {"x": {"a": {}}, "y": {"b": {}}}}, "two cells are called a-b"),
        ({"budget": {"steps": 3, "tflop": 1.0}}, "budget.tflop: steps or tflop, not both"),
        ({"cells": {"no/slash": {}}}, "letters, digits"),
        ({"cell": {}}, "did you mean 'cells'?"),
        ({"cells": {"a": None}}, "cells.a: must be a block of keys, not null"),
    ],
)
def test_an_impossible_ablation_is_refused(keys: dict, told: str) -> None:
    with pytest.raises(UserError, match=None) as caught:
        ablation(**keys)
    assert told in str(caught.value)


def test_a_typo_in_a_cell_names_the_cell() -> None:
    with pytest.raises(UserError, match=r"cell odd, stage1: autoencoder.quantizer.nmae.*did you mean 'name'"):
        ablation(cells={"odd": {"autoencoder.quantizer.nmae": "vq"}}).stages("odd")
    with pytest.raises(UserError, match=r"cell odd, stage2: backbone.widht.*did you mean 'width'"):
        ablation(cells={"odd": {"stage2.backbone.widht": 3}}).stages("odd")


def test_a_value_where_a_block_must_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^cell odd: stage2 must be a block of keys of stage 2, not 3$"):
        ablation(cells={"odd": {"stage2": 3}}).stages("odd")
    with pytest.raises(UserError, match=r"^cell odd, stage1: data: must be a block of keys, not 3$"):
        ablation(cells={"odd": {"data": 3}}).stages("odd")


@pytest.mark.parametrize("key", ["name", "output", "data.path", "stage2.name"])
def test_what_all_cells_share_is_not_a_cells_to_change(key: str) -> None:
    with pytest.raises(UserError, match=f"cell odd: {key.removeprefix('stage2.')} is the same for all cells"):
        ablation(cells={"odd": {key: "x"}}).stages("odd")


def test_cells_are_chosen_in_the_order_of_the_file() -> None:
    a = ablation(cells={"a": {}, "b": {}, "c": {}})
    assert chosen(a, ["c", "a"]) == ["a", "c"]
    with pytest.raises(UserError, match="no such cell"):
        chosen(a, ["d"])


def planned(**changes: Any) -> Record:
    """What a cell is, as `plan` says it, with changed keys of stage 1."""
    stage1, stage2 = ablation(cells={"plain": changes}).stages("plain")
    assert stage2 is not None
    evaluate = {"count": 8, "steps": None, "fit": 0, "preset": None}
    return {"stage1": to_dict(stage1), "stage2": to_dict(stage2), "data": "d", "evaluate": evaluate, "tflop": 1.0}


def record(status: str, **changes: Any) -> Record:
    scores = {"tflop": 1.0, "psnr_observed": 30.0, **({"fd_excess": 1.0} if status == "done" else {})}
    return {"status": status, **planned(**changes), "seconds": {"train stage 1": 9.0}, "scores": scores}


def test_what_is_finished_is_not_repeated_and_the_rest_goes_on(tmp_path: Path) -> None:
    assert continued(None, planned(), tmp_path)["status"] == "begun"
    done = record("done")
    assert continued(done, planned(), tmp_path) is done  # though its runs were deleted
    assert continued(done, planned(**{"trainer.log_every": 3}), tmp_path) is done  # another log is no other training
    again = continued(done, planned() | {"evaluate": planned()["evaluate"] | {"count": 9}}, tmp_path)
    assert (again["status"], again["scores"], again["seconds"]) == ("begun", {"tflop": 1.0}, {})
    assert continued(done, planned(**{"loss.l1": 2.0}), tmp_path)["scores"] == {"tflop": 1.0}

    alone = planned() | {"stage2": None}  # stage 1 alone takes nothing away that stage 2 has given
    assert continued(done, alone, tmp_path) is done
    assert continued(record("done") | {"stage2": None}, planned(), tmp_path)["status"] == "begun"

    begun = record("begun")
    assert "psnr_observed" not in continued(begun, planned(), tmp_path)["scores"]  # stage 1 is gone, stage 2 needs it
    (tmp_path / "plain-stage1" / "model").mkdir(parents=True)
    assert continued(begun, planned(), tmp_path)["scores"]["psnr_observed"] == 30.0


def test_other_ways_to_sample_or_to_score_are_scored_again_and_what_is_redone_is_not_timed_twice(
    tmp_path: Path,
) -> None:
    seconds = {"train stage 1": 9.0, "score stage 1": 5.0, "train stage 2": 8.0, "score stage 2": 4.0}
    scores = {"tflop": 1.0, "psnr_observed": 30.0, "fd_excess": 1.0}
    done = planned() | {"status": "done", "seconds": seconds, "scores": scores}
    for stage in ("stage1", "stage2"):
        (tmp_path / f"plain-{stage}" / "model").mkdir(parents=True)
    assert continued(done, planned(), tmp_path) is done

    sampled = planned(stage2={"sampling": {"steps": 3}})
    fits = planned() | {"evaluate": planned()["evaluate"] | {"fit": 6}}
    older = done | {"evaluate": fits["evaluate"]}  # whose samples were not fitted
    kept = {"train stage 1": 9.0, "score stage 1": 5.0, "train stage 2": 8.0}
    for before, now in ((done, sampled), (older, fits)):
        again = continued(before, now, tmp_path)
        assert (again["status"], again["seconds"]) == ("begun", kept)
        assert "psnr_observed" in again["scores"]
        assert "fd_excess" not in again["scores"]
    new = continued(done, fits, tmp_path)  # reconstructions are fitted, too
    assert (new["seconds"], new["scores"]) == ({"train stage 1": 9.0, "train stage 2": 8.0}, {"tflop": 1.0})
    assert continued(older | {"scores": scores | {"fd_lens_share": 1.0}}, fits, tmp_path)["status"] == "done"
    interrupted = continued(done | {"status": "begun"}, planned(), tmp_path)
    assert interrupted["seconds"] == seconds


def test_a_failed_cell_stays_failed_until_its_run_is_deleted(tmp_path: Path) -> None:
    failed = record("failed") | {"error": "nan"}
    (tmp_path / "plain-stage1").mkdir()
    assert continued(failed, planned(), tmp_path) is failed
    (tmp_path / "plain-stage1").rmdir()
    assert continued(failed, planned(), tmp_path)["status"] == "begun"


def test_a_changed_config_is_noticed_while_its_run_is_there(tmp_path: Path) -> None:
    check_unchanged(tmp_path, "plain", record("done"), planned(**{"loss.l1": 2.0}))  # no run: it may start anew
    (tmp_path / "plain-stage1").mkdir()
    check_unchanged(tmp_path, "plain", record("done"), planned())
    with pytest.raises(UserError, match=r"cell plain .* of stage1 \(loss.l1: 1.0 -> 2.0\).*delete"):
        check_unchanged(tmp_path, "plain", record("done"), planned(**{"loss.l1": 2.0}))
    with pytest.raises(UserError, match="other data"):
        check_unchanged(tmp_path, "plain", record("done"), planned() | {"data": "e"})
    (tmp_path / "plain-stage2").mkdir()
    check_unchanged(tmp_path, "plain", record("done"), planned() | {"stage2": None})
    older = record("done")
    del older["stage1"]["loss"]["l1"]  # a key that was added since has its default
    check_unchanged(tmp_path, "plain", older, planned())


def test_the_list_shows_every_cell_without_torch(tmp_path: Path) -> None:
    code = "import sys, shared.ablate as a; a.main(sys.argv[1:]); assert not {'torch', 'numpy'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "ablations/stage1", "--list", "--output", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.returncode == 0, shown.stderr
    names = [line.split()[0] for line in shown.stdout.splitlines()]
    assert names == list(load_config(Ablation, ["ablations/stage1"]).overrides())
    assert all("to do" in line for line in shown.stdout.splitlines())


def test_every_cell_of_the_shipped_files_is_a_valid_training() -> None:
    for file in ("ablations/stage1", "ablations/latents", "ablations/smoke"):
        a = load_config(Ablation, [file])
        for cell in a.overrides():
            stage1, stage2 = a.stages(cell)
            assert isinstance(stage1, Stage1)
            assert isinstance(stage2, Stage2)


def test_an_unreadable_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ablation-smoke").mkdir()
    (tmp_path / "ablation-smoke" / "ablation.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        main(["ablations/smoke", "--output", str(tmp_path), "--list"])
