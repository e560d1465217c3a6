"""The benchmark: its arithmetic against a clock that is set by hand, its systems at small size."""

import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from shared import training
from shared.autoencoder import Pixels
from shared.checkpoint import autoencoder_config, publish, state_of
from shared.cli import main
from shared.data.normalise import PixelTransform
from shared.errors import UserError
from shared.flops import count
from shared.training import fit
from stage2_diffusion.baselines import benchmark, systems
from stage2_diffusion.baselines.benchmark import Worker, one_round, require_libraries, summary, table, tasks
from stage2_diffusion.baselines.systems import (
    Diffusers,
    DiffusersShort,
    Ours,
    PixelDDPM,
    Plan,
    System,
    matched,
    most_memory,
    turns,
    work,
)
from stage2_diffusion.generator import build_denoiser

UNET = {"name": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "heads": 2}
DIFFUSION = {"schedule": "flow", "prediction": "velocity", "time": "uniform", "shift": 1.0}
SHAPE = (1, 10, 13)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A model of random weights on a grid that no level halves evenly."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    autoencoder = Pixels(SHAPE, PixelTransform(-3.0, 3.0))
    autoencoder.fit_latents([torch.randn(64, *SHAPE)])
    denoiser = build_denoiser(UNET, DIFFUSION, SHAPE)
    state = state_of(autoencoder=autoencoder, denoiser=denoiser)
    config = {
        "autoencoder": autoencoder_config(autoencoder, {"name": "pixels"}), "backbone": UNET, "diffusion": DIFFUSION,
        "sampling": {"sampler": "ab2", "steps": 4, "shift": 3.0}, "precision": "fp32",
        "data": {"name": "noise", "images": 64},
        "training": {
            "name": "run", "autoencoder": "pixels", "data": {"path": "noise", "batch_size": 4}, "backbone": UNET,
            "diffusion": DIFFUSION,
        },
    }  # fmt: skip
    publish(folder / "model", "diffusion", config, state, "")
    return Plan(str(folder / "model"), str(folder), batch=4, lenses=3, pixel_batch=2, pixel_steps=3)


class Stop(Exception):
    pass


def stop_after(steps: int, seen: Callable[[], Any] = lambda: None) -> tuple[Callable[[], None], list[Any]]:
    """`between` that ends a task after so many steps, and what it saw before each of them and after the last."""
    found: list[Any] = []

    def between() -> None:
        found.append(seen())
        if len(found) > steps:
            raise Stop

    return between, found


# --- turns, rounds and ratios -----------------------------------------------------------------------------------------


class Pipe:
    """Questions that were put in beforehand, and the answers; then nobody asks any more."""

    def __init__(self, *questions: tuple[Any, ...]) -> None:
        self.questions, self.answers = list(questions), []

    def recv(self) -> tuple[Any, ...]:
        if not self.questions:
            raise EOFError
        return self.questions.pop(0)

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


class Fake(System):
    """Steps of a fixed length by a clock of its own; a convolution is what it computes."""

    batch, lenses, steps, taken, parameters, gflop = 8, 4, 1000, 2, 1, 1.0

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0
        self.layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)

    def train(self, between: Callable[[], None]) -> None:
        x = torch.zeros(self.batch, 3, 6, 7, requires_grad=True)
        while True:
            between()
            self.layer(x).sum().backward()
            self.now += self.seconds

    def sample(self, between: Callable[[], None]) -> None:
        while True:
            between()
            self.now += self.seconds


def answers(system: Fake, task: str, *questions: tuple[Any, ...]) -> list[Any]:
    pipe = Pipe(*questions)
    running = turns(pipe, system, task, "cpu", clocks=(lambda: system.now, lambda: system.now / 2))
    with pytest.raises(EOFError):
        getattr(system, task)(lambda: next(running))
    return pipe.answers


def test_a_turn_is_as_many_steps_as_fill_its_seconds() -> None:
    system = Fake(0.5)
    assert answers(system, "sample", ("time", 1.2), ("time", 0.1)) == [pytest.approx([62.5, 31.25])] * 2
    assert system.now == 0.5 * (3 + 1)


def test_a_rate_is_of_images_in_training_and_of_whole_lenses_in_sampling() -> None:
    assert answers(Fake(0.25), "train", ("time", 1.0)) == [pytest.approx([8 / 0.25, 8 / 0.125])]
    # 2 of 1,000 steps of 4 lenses in 0.25 s.
    assert answers(Fake(0.25), "sample", ("time", 1.0)) == [pytest.approx([0.25 / 4 * 500, 0.125 / 4 * 500])]


def test_what_passes_between_turns_counts_for_nobody() -> None:
    system = Fake(0.5)

    class Waiting(Pipe):
        def recv(self) -> tuple[Any, ...]:
            system.now += 1000.0
            return super().recv()

    pipe = Waiting(("time", 0.5), ("time", 0.5))
    running = turns(pipe, system, "sample", "cpu", clocks=(lambda: system.now, lambda: system.now / 2))
    with pytest.raises(EOFError):
        system.sample(lambda: next(running))
    assert pipe.answers == [pytest.approx([62.5, 31.25])] * 2


def test_operations_of_the_backward_pass_count_too() -> None:
    forward = 2 * 3 * 5 * 9 * 6 * 7 / 1e9  # a multiplication and an addition for each weight and pixel
    assert answers(Fake(1.0), "train", ("count",), ("count",)) == pytest.approx([3 * forward] * 2)


def test_all_take_turns_and_none_always_follows_the_same() -> None:
    asked: list[str] = []
    jobs = [("ours", "train"), ("ours", "sample"), ("pixel-ddpm", "sample")]

    def worker(name: str) -> Callable[..., float]:
        return lambda what, seconds: asked.append(name) or len(asked) * seconds

    workers = {job: worker(" ".join(job)) for job in jobs}
    rates = [dict(one_round(workers, number, 2.0)) for number in range(4)]
    assert asked[:3] == ["ours train", "ours sample", "pixel-ddpm sample"]
    assert asked[3:6] == ["ours sample", "pixel-ddpm sample", "ours train"]
    assert asked[9:] == asked[:3]
    assert all(rate.keys() == set(jobs) for rate in rates)
    assert rates[1]["ours", "train"] == 12.0  # the sixth to be asked


def rounds() -> list[dict[str, dict[str, list[float]]]]:
    """Ours trains 3 times as fast and draws in a 50th of the time, on a machine whose speed changes from round to round;
    by the processor's clock it draws in a 40th, always."""
    return [
        {
            "pixel-ddpm": {"train": [30 * speed * wrong, 30], "sample": [1.0 / speed, 0.8]},
            "diffusers-short": {"sample": [0.04 / speed, 0.06]},
            "ours": {"train": [90 * speed, 90], "sample": [0.02 / speed, 0.02]},
        }
        for speed, wrong in ((1.0, 1.0), (0.1, 1.2), (0.5, 0.8))
    ]


def test_ratios_are_of_one_round_and_a_slow_round_leaves_them_alone() -> None:
    found = summary(rounds())
    assert list(found) == ["ours", "diffusers-short", "pixel-ddpm"]
    assert found["pixel-ddpm"]["sample"]["time"] == pytest.approx([50, 50, 50])
    assert found["pixel-ddpm"]["sample"]["processor time"] == pytest.approx([40, 40, 40])
    assert found["pixel-ddpm"]["sample"]["median"] == pytest.approx(2.0)
    assert found["pixel-ddpm"]["train"]["time"] == pytest.approx([3, 3 / 1.2, 3 / 0.8])
    assert found["ours"]["train"] == {"median": 45.0, "time": [1, 1, 1], "processor time": [1, 1, 1]}
    assert found["diffusers-short"].keys() == {"sample"}


def test_without_training_of_ours_there_is_no_ratio_of_it() -> None:
    found = summary([{"ours": {"sample": [0.1, 0.1]}, "pixel-ddpm": {"train": [3.0, 2.0], "sample": [1.0, 2.0]}}])
    assert found["pixel-ddpm"]["train"] == {"median": 3.0, "time": None, "processor time": None}
    assert found["pixel-ddpm"]["sample"]["time"] == pytest.approx([10] * 3)


def test_the_table_says_every_number_once() -> None:
    def facts(gflop: float, **counted: float) -> dict[str, Any]:
        return {
            "batch": 4, "lenses": 2, "steps": 1000, "taken": 2, "parameters": 1.5e6, "gflop": gflop,
            "counted": counted, "memory": dict.fromkeys(counted, 2.5e8),
        }  # fmt: skip

    known = {
        "ours": facts(0.25, train=1.0, sample=2.0), "diffusers-short": facts(0.3, sample=2.5),
        "pixel-ddpm": facts(11.6, train=35.0, sample=11600.0),
    }  # fmt: skip
    rows = {}
    for line in table(known, rounds()).splitlines():
        text, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(text, []).append(cells)
    assert rows[""] == [["ours", "diffusers-short", "pixel-ddpm"]]
    assert rows["images/s in training"] == [["45", "–", "12"]]
    assert rows["ours over it, in time"] == [["1", "–", "3 (2.5 to 3.75)"]]
    assert rows["ours over it, in processor time"] == [["1", "–", "3 (3 to 3)"]]
    assert rows["GFLOP a lens, decoder included"] == [["2", "2.5", "11,600"]]
    assert rows["it over ours"] == [["1", "1.25", "5,800"]]
    assert rows["it over ours, in time"] == [["1", "2 (2 to 2)", "50 (50 to 50)"]]
    assert rows["it over ours, in processor time"] == [["1", "3 (3 to 3)", "40 (40 to 40)"]]
    assert rows["peak memory in training, MB"] == [["250", "–", "250"]]


def test_a_student_and_a_gan_are_sampled_alone() -> None:
    assert tasks("ours", {"training": {}}) == ("train", "sample")
    assert tasks("ours", {"training": {"teacher": "unet"}}) == ("sample",)
    assert tasks("ours", {"training": {}, "gan": {}}) == ("sample",)
    assert tasks("pixel-ddpm", {"training": {}, "gan": {}}) == ("train", "sample")


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ema_pytorch" else object())
    require_libraries(["ours", "diffusers"])
    with pytest.raises(UserError, match=r"ema-pytorch: `pip install -e '\.\[benchmark\]'`.*--against diffusers$"):
        require_libraries(["ours", "diffusers", "pixel-ddpm"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"leave it out: --against$"):
        require_libraries(["ours", "pixel-ddpm"])


# --- the systems ------------------------------------------------------------------------------------------------------


def test_ours_is_trained_by_our_loop_one_step_after_another(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Ours(replace(plan, folder=str(tmp_path)))
    before = {k: v.clone() for k, v in system.generator.denoiser.state_dict().items()}
    made: list[Any] = []

    def watched(module: Any, *rest: Any) -> None:
        made.append(module)
        fit(module, *rest)

    monkeypatch.setattr(training, "fit", watched)
    between, found = stop_after(3, lambda: (made[0].trainer.global_step, weights(made[0].network)))
    with pytest.raises(Stop):
        system.train(between)
    assert [step for step, _ in found] == [0, 1, 2, 3]
    assert len({weight for _, weight in found}) == 4
    assert all(torch.equal(v, before[k]) for k, v in system.generator.denoiser.state_dict().items())
    assert not (tmp_path / "benchmark" / "last.ckpt").exists()


def weights(network: nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in network.parameters()))


def test_ours_draws_its_lenses_by_its_own_defaults(plan: Plan) -> None:
    system = Ours(plan)
    assert system.facts() == {
        "batch": 4, "lenses": 3, "steps": 4, "taken": 4, "parameters": system.parameters, "gflop": system.gflop,
    }  # fmt: skip
    assert system.steps * system.gflop == pytest.approx(system.generator.gflop())  # pixels have no decoder
    drawn: list[int] = []
    system.generator.denoiser.register_forward_hook(lambda module, given, out: drawn.append(len(out)))
    between, found = stop_after(2)
    with pytest.raises(Stop):
        system.sample(between)
    assert drawn == [3] * 4 * 2
    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.parametrize("latents", [(5, 15, 15), (4, 20, 13)])
def test_a_network_of_diffusers_is_as_large_and_as_dear(latents: tuple[int, int, int]) -> None:
    pytest.importorskip("diffusers")
    network, shape = matched(latents, gflop := 0.28, size := 1_850_000, "cpu")
    assert all(0 <= padded - side < 8 for padded, side in zip(shape, latents, strict=True))
    x_t = torch.randn(2, *shape)
    assert network(x_t, torch.tensor([3, 700])).sample.shape == x_t.shape
    for found, wanted in ((count(network, x_t[:1], 0), gflop), (systems.parameters(network), size)):
        assert abs(math.log(found / wanted)) < math.log(1.25)


@pytest.mark.slow
def test_diffusers_trains_and_draws_as_its_scripts_do(plan: Plan) -> None:
    pytest.importorskip("diffusers")
    system = Diffusers(plan)
    assert system.steps == 50
    assert DiffusersShort(plan).steps == 4
    assert system.shape == (1, 10, 14)  # which two levels halve evenly
    given: list[tuple[int, int]] = []
    system.network.register_forward_hook(lambda module, inputs, out: given.append((len(inputs[0]), inputs[1].ndim)))
    between, found = stop_after(3, lambda: weights(system.network))
    with pytest.raises(Stop):
        system.train(between)
    assert len(set(found)) == 4
    assert given == [(4, 1)] * 3
    given.clear()
    decoded: list[torch.Size] = []
    decode = system.autoencoder.decode
    system.autoencoder.decode = lambda x, **options: (decoded.append(x.shape), decode(x, **options))[1]  # type: ignore[method-assign]
    between, found = stop_after(1)
    with pytest.raises(Stop):
        system.sample(between)
    assert given == [(3, 0)] * 50
    assert decoded == [(3, *SHAPE)]


@pytest.mark.slow
def test_the_pixel_ddpm_takes_a_few_of_its_steps(plan: Plan) -> None:
    pytest.importorskip("denoising_diffusion_pytorch")
    system = PixelDDPM(plan, side=16, width=8)
    assert (system.steps, system.taken, system.batch, system.lenses) == (1000, 3, 2, 2)
    between, found = stop_after(2, lambda: weights(system.diffusion.model))
    with pytest.raises(Stop):
        system.train(between)
    assert len(set(found)) == 3
    times: list[int] = []
    system.diffusion.model.register_forward_hook(lambda module, given, out: times.append(int(given[1][0])))
    between, found = stop_after(2)
    with pytest.raises(Stop):
        system.sample(between)
    assert times == list(range(999, 993, -1))


@pytest.mark.slow
def test_the_pixel_ddpm_costs_what_was_measured_of_it(plan: Plan) -> None:
    pytest.importorskip("denoising_diffusion_pytorch")
    system = PixelDDPM(plan)
    assert system.gflop == pytest.approx(11.6, abs=0.1)
    assert system.parameters == pytest.approx(3.2e6, rel=0.05)


# --- processes and the command ----------------------------------------------------------------------------------------


def test_memory_is_what_was_held_at_once() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("what is held now is asked of Linux")
    _, resident, files, *_ = map(int, statm.read_text().split())
    before, now = most_memory("cpu"), (resident - files) * os.sysconf("SC_PAGE_SIZE")
    for _ in range(3):
        torch.ones((before - now + 200_000_000) // 4)
    assert most_memory("cpu") - before == pytest.approx(200e6, rel=0.2)


def test_a_process_answers_with_what_went_wrong(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe()
    work(pipe, "ours", "sample", replace(plan, model="nowhere/model"), torch.get_num_threads())
    monkeypatch.setattr(Ours, "libraries", ("torch_of_tomorrow",))
    work(pipe, "ours", "sample", plan, torch.get_num_threads())
    monkeypatch.setattr(Ours, "libraries", ())
    monkeypatch.setattr(Ours, "sample", lambda self, between: 1 / 0)
    work(pipe, "ours", "sample", plan, torch.get_num_threads())
    mistake, missing, fault = pipe.answers
    assert isinstance(mistake, UserError)
    assert "no model at nowhere/model" in str(mistake)
    assert isinstance(missing, UserError)
    assert "No module named 'torch_of_tomorrow'" in str(missing)
    assert isinstance(fault, RuntimeError)  # of ours, with its traceback
    assert "ZeroDivisionError" in str(fault)


@pytest.mark.slow
def test_a_process_trains_when_it_is_asked_and_its_death_is_told(plan: Plan, tmp_path: Path) -> None:
    worker = Worker(("ours", "train"), replace(plan, folder=str(tmp_path)), 1)
    facts = worker("facts")
    assert facts["batch"] == 4
    assert worker("count") > 3 * facts["gflop"]  # forward, backward and the optimiser
    assert all(rate > 0 for rate in worker("time", 0.01))
    assert 0 < worker("memory") < 1e9
    worker.process.kill()
    with pytest.raises(UserError, match=r"ours train ended with code -9.*lower --batch"):
        worker("facts")
    worker.close()


class Answering:
    """In the place of a process: its rates are the numbers of the questions."""

    asked: ClassVar[list[Any]] = []
    closed = 0

    def __init__(self, job: tuple[str, str], plan: Plan, threads: int) -> None:
        assert Path(plan.folder).is_dir()

    def __call__(self, what: str, *seconds: float) -> Any:
        self.asked.append(what)
        if what == "facts":
            return {"batch": 4, "lenses": 2, "steps": 4, "taken": 4, "parameters": 100, "gflop": 0.5}
        if what == "time":
            return [float(len(self.asked)), 1.0]
        return float(1000 - len(self.asked) if what == "memory" else len(self.asked))

    def close(self) -> None:
        Answering.closed += 1


def test_a_run_goes_on_where_it_stopped(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "Worker", Answering)
    command = ["benchmark", plan.model, "--against", "--seconds", "0.01", "--lenses", "2", "--out", str(tmp_path)]

    def kept(*more: str) -> dict[str, Any]:
        main([*command, *more])
        return json.loads((tmp_path / "benchmark.json").read_text())

    first = kept("--rounds", "1")
    assert [one.keys() for one in first["rounds"]] == [{"ours"}]
    assert first["facts"]["ours"]["memory"].keys() == {"train", "sample"}
    second = kept("--rounds", "3")
    assert second["rounds"][0] == first["rounds"][0]
    assert len(second["rounds"]) == 3
    assert Answering.asked.count("time") == 2 * 3
    assert second["summary"]["ours"]["train"]["median"] == summary(second["rounds"])["ours"]["train"]["median"]
    assert second["facts"]["ours"]["memory"] == first["facts"]["ours"]["memory"]  # the most that there ever was
    assert Answering.closed == 4
    capsys.readouterr()
    assert kept("--rounds", "3") == second  # nothing is left to do
    assert Answering.closed == 4
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--rounds", "3", "--batch", "3"])
    assert "is of another batch: choose another --out" in capsys.readouterr().err


def test_a_system_that_is_not_there_is_one_line(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", plan.model, "--against", "difusers"])
    assert "--against difusers: there are diffusers, diffusers-short, pixel-ddpm" in capsys.readouterr().err
