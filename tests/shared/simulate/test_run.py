"""Data sets: workers, interruptions, parts, accelerators, and the command line."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cli import run as run_command
from shared.data.cache import CacheWriter, LensImages
from shared.errors import UserError
from shared.simulate import run as simulator
from shared.simulate.command import main
from shared.simulate.images import simulate
from shared.simulate.preset import UNITS, Preset, presets
from shared.simulate.run import merge, part_folder, simulate_to

DEEPLENSE = Preset.load("deeplense")
SMALL = DEEPLENSE.model_copy(update={"pixels": 24, "pixel_scale": 0.3})
CLASSES = Preset.load("deeplense-test1", {"pixels": 24, "pixel_scale": 0.3})
FILE = Path(simulator.__file__).parents[2] / "configs/simulate/deeplense.yaml"


def same(a: Path, b: Path) -> None:
    """Two data sets hold the same bytes, but for their names."""
    assert (a / "images.npy").read_bytes() == (b / "images.npy").read_bytes()
    first, second = (json.loads((folder / "index.json").read_text()) for folder in (a, b))
    assert first | {"name": ""} == second | {"name": ""}
    assert list(first) == list(second)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> list[range]:
    """Ctrl-C at the next chunk after so many; returns a list of what was written."""
    write, written = CacheWriter.write, []

    def interrupted(self: CacheWriter, indices: range, images: np.ndarray) -> None:
        if len(written) == chunks:
            raise KeyboardInterrupt
        written.append(indices)
        write(self, indices, images)

    monkeypatch.setattr(CacheWriter, "write", interrupted)
    return written


# --- data sets --------------------------------------------------------------------------------------------------------


def test_progress_is_drawn_on_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = ["--set", "pixels=24", "--set", "pixel_scale=0.3", "--count", "4", "--workers", "1", "--out"]
    main([*part, str(tmp_path / "piped"), "--shard", "1/2"])
    main([*part, str(tmp_path / "piped"), "--shard", "2/2"])
    main([*part, str(tmp_path / "piped"), "--merge", "2"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main([*part, str(tmp_path / "terminal")])
    assert "4/4" in capsys.readouterr().err


def test_a_data_set_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 3)
    for workers in (1, 2, 3):
        simulate_to(tmp_path / str(workers), SMALL, 32, 4, workers, progress=False)
    expected, _, parameters = simulate(SMALL, 4, range(32))
    for workers in (1, 2, 3):
        data = LensImages(tmp_path / str(workers))
        np.testing.assert_array_equal(data.images, expected)
    assert data.value_range == (0, 1)
    stored = data.index["parameters"]
    constants = {"mass": 1e12, "n_s": 1.5, "R_s": 0.5, "I_s": 1.0, "exposure": 100.0}
    assert set(stored) == set(parameters) - set(constants)  # the varying ones
    assert all(entry["unit"] == UNITS[name] for name, entry in stored.items())
    assert all(entry["values"] == parameters[name].tolist() for name, entry in stored.items())
    assert data.index["constants"] == {k: {"unit": UNITS[k], "value": v} for k, v in constants.items()}
    assert data.index["unit"] == "of the range of the image"
    assert "classes" not in data.index
    source = json.loads((tmp_path / "2" / "index.json").read_text())["source"]
    assert set(source) == {"kind", "preset", "seed"}
    assert Preset(**source["preset"]) == SMALL
    assert source["seed"] == 4


def test_a_data_set_of_classes_says_who_is_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 4)
    for workers in (1, 2):
        simulate_to(tmp_path / str(workers), CLASSES, 11, 0, workers, progress=False)
    same(tmp_path / "1", tmp_path / "2")
    data = LensImages(tmp_path / "1")
    observed, _, parameters = simulate(CLASSES, 0, range(11))
    np.testing.assert_array_equal(data.images, observed)
    assert data.index["classes"] == data.index["source"]["classes"] == ["no", "sphere", "vort"]
    assert data.index["labels"] == [i % 3 for i in range(11)]
    stored = data.index["parameters"]
    for name in ("N_p", "mass_p", "x_v", "y_v", "half_length_v", "angle_v", "mass_v", "theta_v"):
        values = stored[name]["values"]
        assert [value is None for value in values] == np.isnan(parameters[name]).tolist()
        assert [value for value in values if value is not None] == parameters[name][
            ~np.isnan(parameters[name])
        ].tolist()
    assert "x_p" not in stored  # the single ones are drawn again from (seed, i)


def test_a_selection_of_classes_is_another_request(tmp_path: Path) -> None:
    chosen = CLASSES.select(["vort", "no"])
    simulate_to(tmp_path / "x", chosen, 6, 0, 1, progress=False)
    data = LensImages(tmp_path / "x")
    assert data.index["classes"] == ["no", "vort"]
    assert data.index["labels"] == [0, 1, 0, 1, 0, 1]
    assert "N_p" not in data.index["parameters"]
    np.testing.assert_array_equal(data.images, simulate(chosen, 0, range(6))[0])
    assert Preset(**data.index["source"]["preset"]) == chosen
    with pytest.raises(UserError, match="another data set"):
        simulate_to(tmp_path / "x", CLASSES, 6, 0, 1, progress=False)


def test_images_that_are_not_scaled_keep_their_unit(tmp_path: Path) -> None:
    for name, unit in (("model-1", "counts"), ("model-2", "e-/s")):
        preset = Preset.load(name, {"pixels": 20})
        simulate_to(tmp_path / name, preset, 6, 0, 1, progress=False)
        data = LensImages(tmp_path / name)
        assert data.index["unit"] == unit
        assert data.value_range == (float(data.images.min()), float(data.images.max()))
    axion = LensImages(tmp_path / "model-1").index["parameters"]["axion_mass"]
    assert axion["unit"] == "eV"
    assert [value is None for value in axion["values"]] == [True, True, False, True, True, False]
    # One that only some classes have is a column even where it has no scatter: who has it says the class.
    assert LensImages(tmp_path / "model-2").index["parameters"]["N_p"]["values"] == [None, 25, None, None, 25, None]


def test_an_interrupted_data_set_goes_on_and_a_finished_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 4)
    with monkeypatch.context() as patch:
        first = interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)
    with monkeypatch.context() as patch:
        rest = interrupt_after(patch, 100)
        simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)
        simulate_to(tmp_path / "x", SMALL, 30, 4, progress=False)
    assert sorted(i for indices in [*first, *rest] for i in indices) == list(range(30))  # each image once
    assert len(first) + len(rest) == 8
    np.testing.assert_array_equal(LensImages(tmp_path / "x").images, simulate(SMALL, 4, range(30))[0])
    with pytest.raises(UserError, match="seed is 4 there, 5 here"):
        simulate_to(tmp_path / "x", SMALL, 30, 5, progress=False)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="a spawned worker does not see the patched function")
def test_a_killed_worker_is_reported_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CHUNK", 4)
    monkeypatch.setattr(simulator, "_simulate_chunk", _die)
    with pytest.raises(UserError, match="--workers"):
        simulate_to(tmp_path / "x", SMALL, 30, 4, 2, progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=simulate_to, args=(tmp_path / "x", SMALL, 10**6, 0, 2, False))
    parent.start()
    deadline = time.monotonic() + 20
    workers: list[str] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        time.sleep(0.1)
    time.sleep(0.5)
    parent.kill()
    parent.join()
    assert len(workers) == 2
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if _alive(worker)]
    for worker in left:
        os.kill(int(worker), signal.SIGKILL)
    assert not left


def _alive(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # a zombie has ended
    except OSError:
        return False


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole data set beside `x`, whose four parts are made."""
    monkeypatch.setattr(simulator, "CHUNK", 4)
    simulate_to(tmp_path / "whole", CLASSES, 23, 7, 1, progress=False)
    for k in (3, 1, 4, 2):  # in any order
        simulate_to(tmp_path / "x", CLASSES, 23, 7, 1, progress=False, part=(k, 4))
    return tmp_path / "x"


def test_merged_parts_are_the_whole(parts: Path) -> None:
    counts = [len(LensImages(part_folder(parts, k, 4))) for k in (1, 2, 3, 4)]
    assert (counts, sum(counts)) == ([5, 6, 6, 6], 23)
    labels = LensImages(part_folder(parts, 2, 4)).index["labels"]
    assert labels == [i % 3 for i in range(5, 11)]
    merge(parts, CLASSES, 23, 7, 4, progress=False)
    same(parts, parts.with_name("whole"))
    for k in (1, 2, 3, 4):
        shutil.rmtree(part_folder(parts, k, 4))
    merge(parts, CLASSES, 23, 7, 4, progress=False)  # done is done, without its parts
    same(parts, parts.with_name("whole"))


def test_an_interrupted_part_and_an_interrupted_merge_go_on(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(part_folder(parts, 2, 4))
    for work in (
        lambda: simulate_to(parts, CLASSES, 23, 7, 1, progress=False, part=(2, 4)),
        lambda: merge(parts, CLASSES, 23, 7, 4, progress=False),
    ):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                work()
        with monkeypatch.context() as patch:
            before = interrupt_after(patch, 100)
            work()
            assert 0 not in [indices.start for indices in before]  # the first chunk was kept
    same(parts, parts.with_name("whole"))


def test_a_merge_names_the_parts_that_are_missing(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(part_folder(parts, 2, 4))
    (part_folder(parts, 4, 4) / "index.json").rename(part_folder(parts, 4, 4) / "progress.json")
    with pytest.raises(UserError, match=r"^2 of the 4 parts of .* missing or unfinished \(2, 4\).*--shard 2/4$"):
        merge(parts, CLASSES, 23, 7, 4, progress=False)
    assert not parts.exists()


def test_a_merge_refuses_parts_of_another_request(parts: Path) -> None:
    with pytest.raises(UserError, match=r"another data set .*seed is 7 there, 8 here"):
        merge(parts, CLASSES, 23, 8, 4, progress=False)
    with pytest.raises(UserError, match="another data set"):
        merge(parts, Preset.load("deeplense-test1", {"pixels": 24, "pixel_scale": 0.31}), 23, 7, 4, progress=False)
    assert not parts.exists()


def test_a_merge_notices_a_damaged_part(parts: Path) -> None:
    path = part_folder(parts, 3, 4) / "images.npy"
    content = bytearray(path.read_bytes())
    content[-4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1 images of .*, the first number 15, are not what"):
        merge(parts, CLASSES, 23, 7, 4, progress=False)
    assert not (parts / "index.json").exists()
    shutil.rmtree(part_folder(parts, 3, 4))
    simulate_to(parts, CLASSES, 23, 7, 1, progress=False, part=(3, 4))
    merge(parts, CLASSES, 23, 7, 4, progress=False)
    same(parts, parts.with_name("whole"))


def test_more_parts_than_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 images do not make 4 parts"):
        simulate_to(tmp_path / "x", SMALL, 3, 0, 1, progress=False, part=(1, 4))


# --- accelerators -----------------------------------------------------------------------------------------------------


def test_a_device_renders_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "ACCELERATOR_BATCH", 7)
    monkeypatch.setattr(simulator, "SLICE", 3)
    preset = Preset.load("model-1", {"pixels": 24})  # exposures that vary
    simulate_to(tmp_path / "workers", preset, 20, 2, 1, progress=False)
    simulate_to(tmp_path / "device", preset, 20, 2, 2, progress=False, device="cpu")
    same(tmp_path / "workers", tmp_path / "device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_renders_the_same_data_set_to_rounding(tmp_path: Path) -> None:
    preset = Preset.load("deeplense-test1", {"noise": "none"})
    simulate_to(tmp_path / "cpu", preset, 30, 2, 1, progress=False)
    simulate_to(tmp_path / "cuda", preset, 30, 2, 2, progress=False, device="cuda")
    a, b = (np.asarray(LensImages(tmp_path / name).images) for name in ("cpu", "cuda"))
    assert np.abs(a - b).max() < 1e-4


@pytest.mark.parametrize("device", ["cuda:97", "gpu"])
def test_a_device_that_is_not_there_is_one_line(device: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^--device {device} cannot be used here \(.*\): leave it out") as error:
        simulate_to(tmp_path / "x", SMALL, 4, 0, 1, progress=False, device=device)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


# --- command line -----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(FILE.read_text().replace("pixels: 150", "pixels: 20").replace("n_s: 1.5", "n_s: uniform(1, 4)"))
    main(["--preset", str(preset), "--count", "5", "--out", str(tmp_path / "x"), "--workers", "1"])
    data = LensImages(tmp_path / "x")
    assert data.image_shape == (1, 20, 20)
    assert 1 <= min(data.index["parameters"]["n_s"]["values"]) < max(data.index["parameters"]["n_s"]["values"]) <= 4
    assert "5 images" in capsys.readouterr().out


def test_the_command_takes_priors_numbers_classes_and_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--preset",
        "deeplense-test1",
        "--class",
        "no,vort",
        "--prior",
        "theta_E=uniform(0.8,2.0)",
        "--workers",
        "1",
    ]
    options += [
        "--set",
        "pixels=20",
        "--set",
        "scaling=none",
        "--count",
        "6",
        "--seed",
        "3",
        "--out",
        str(tmp_path / "x"),
    ]
    for part in ("1/2", "2/2"):
        main([*options, "--shard", part])
    main([*options, "--merge", "2"])
    assert "--merge 2" in capsys.readouterr().out
    data = LensImages(tmp_path / "x")
    preset = Preset.load("deeplense-test1", {"theta_E": "uniform(0.8, 2)", "pixels": 20, "scaling": "none"})
    np.testing.assert_array_equal(data.images, simulate(preset.select(["no", "vort"]), 3, range(6))[0])
    assert data.index["classes"] == ["no", "vort"]
    assert data.index["unit"] == "counts"
    whole = np.array(data.index["parameters"]["theta_E"]["values"])
    assert 0.75 < whole.min() < whole.max() < 2


def test_the_command_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(presets())
    assert all(len(line.split()) > 5 for line in lines)
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(line in text for line in lines)


def test_help_and_typos_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from shared.simulate.command import main\n"
        "from shared.errors import UserError\n"
        "try: main(['--count', '1', '--out', 'x', '--prior', 'gamma=uniform(1)'])\n"
        "except UserError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert "expected uniform(low, high)" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    "bad",
    [
        ["--count", "0"],
        ["--count", "-3"],
        ["--workers", "0"],
        ["--seed", "-1"],
        ["--shard", "3/2"],
        ["--shard", "0/2"],
        ["--shard", "one"],
        ["--shard", "1/2", "--merge", "2"],
        ["--merge", "0"],
    ],
)
def test_the_command_refuses_numbers_without_sense(bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--help"):
        main(["--count", "5", "--out", str(tmp_path / "x"), *bad])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--preset", "wid"], "did you mean 'wide'"),
        (["--prior", "theta=1"], "no prior 'theta'; did you mean 'theta_E'"),
        (["--prior", "theta_E"], "expected NAME=LAW"),
        (["--prior", "theta_E=unifrom(1,2)"], "did you mean 'uniform'"),
        (["--prior", "theta_E=uniform(-1,2)"], "every draw must have theta_E > 0"),
        (["--prior", "pixels=3"], "no prior 'pixels'"),
        (["--set", "noise"], "expected KEY=VALUE"),
        (["--set", "noise=loud"], "noise: 'loud' is not known"),
        (["--set", "pixel=3"], "pixel: unknown key; did you mean 'pixels'"),
        (["--class", "no"], "deeplense has no classes"),
        (["--preset", "wide", "--class", "bright"], "preset wide has no class 'bright'"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--shard", "1/9"], "5 images do not make 9 parts"),
        (["--merge", "2"], "2 of the 2 parts"),
    ],
)
def test_a_users_mistake_is_one_line(
    bad: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command("simulate", ["--count", "5", "--out", str(tmp_path / "x"), *bad])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prior", "I_s=1e20"], "cannot be exposed"), (["--set", "sky=1e20"], "cannot be exposed")],
)
def test_what_is_too_bright_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command("simulate", ["--count", "2", "--out", str(tmp_path / "out"), "--workers", "1", *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_parts_of_the_folder_one_is_in_have_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert part_folder(Path("."), 1, 2) == tmp_path.with_name(f"{tmp_path.name}.shard-1-of-2")
    with pytest.raises(UserError, match="name a folder"):
        part_folder(Path("/"), 1, 2)
