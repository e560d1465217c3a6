"""The loader and the shipped configs: what merges, what replaces, what is refused, and in which words."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import shared.quickstart
from shared.config import CONFIGS, find_config, load_config, parse_arguments, to_dict, to_yaml
from shared.errors import UserError
from shared.schema import Ablation, Adversarial, Distill, DiT, Quickstart, Stage1, Stage2, UNet

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml") if p.parent.name != "simulate")
SCHEMAS: dict[str, type[BaseModel]] = {
    "stage1": Stage1,
    "stage2": Stage2,
    "ablations": Ablation,
    "": Quickstart,
    "baselines": Stage2,
    "variants": Stage2,
}
MINIMAL = "name: run\nautoencoder: pixels\ndata: {path: data/x}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into an empty working directory; errors then name it by its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def errors(schema, files, overrides=()) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(schema, files, overrides)
    return str(caught.value).splitlines()


# --- merging ----------------------------------------------------------------------------------------------------------


def test_files_merge_left_to_right_and_overrides_come_last(write):
    write("a.yaml", MINIMAL + "seed: 1\ntrainer: {max_steps: 10, log_every: 3}\n")
    write("b.yaml", "seed: 2\ntrainer: {max_steps: 20}\n")
    both = load_config(Stage2, ["a.yaml", "b.yaml"], ["--seed", "3"])
    assert (both.seed, both.trainer.max_steps, both.trainer.log_every) == (3, 20, 3)
    assert load_config(Stage2, ["b.yaml", "a.yaml"]).trainer.max_steps == 10


def test_base_is_relative_to_the_file_that_names_it_and_chains(write):
    write(
        "deep/grand.yaml", MINIMAL + "seed: 1\ntrainer: {max_steps: 10}\nbackbone: {name: unet, width: 8, heads: 2}\n"
    )
    write("deep/parent.yaml", "base: grand.yaml\nseed: 2\nbackbone: {blocks: 7}\n")
    write("child.yaml", "base: deep/parent.yaml\nname: child\n")
    config = load_config(Stage2, ["child.yaml"])
    assert (config.name, config.seed, config.trainer.max_steps) == ("child", 2, 10)
    assert config.backbone == UNet(width=8, heads=2, blocks=7)


def test_base_may_be_one_of_the_installation(write):
    write("mine.yaml", "base: stage2/unet.yaml\nname: mine\n")
    config = load_config(Stage2, ["mine.yaml"])
    assert config.model_copy(update={"name": "unet"}) == load_config(Stage2, ["stage2/unet"])


def test_bases_in_a_circle_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: a.yaml\n")
    assert errors(Stage2, ["a.yaml"]) == [
        "a.yaml: base: these files are each other's base: a.yaml -> b.yaml -> a.yaml",
    ]


def test_a_base_that_is_missing_or_no_path_is_refused(write):
    write("a.yaml", "base: stage2/unett.yaml\n")
    write("b.yaml", "base: [x, y]\n")
    (line,) = errors(Stage2, ["a.yaml"])
    assert line.startswith("a.yaml: base: no config file stage2/unett.yaml; did you mean 'stage2/unet.yaml'?")
    assert errors(Stage2, ["b.yaml"]) == ['b.yaml: base: must be the path of another YAML file, not ["x", "y"]']


UNET = MINIMAL + "backbone: {name: unet, width: 16, multipliers: [1, 2, 4], attention: [2], dropout: 0.3}\n"


def test_a_block_that_changes_its_name_replaces_the_old_one_in_a_base(write):
    write("unet.yaml", UNET)
    write("dit.yaml", "base: unet.yaml\nbackbone: {name: dit, depth: 2}\n")
    assert load_config(Stage2, ["dit.yaml"]).backbone == DiT(depth=2)  # neither width nor dropout leaks from the U-Net


def test_a_block_that_changes_its_name_replaces_the_old_one_between_files(write):
    write("unet.yaml", UNET)
    write("dit.yaml", "backbone: {name: dit, depth: 2}\n")
    assert load_config(Stage2, ["unet.yaml", "dit.yaml"]).backbone == DiT(depth=2)


def test_a_block_that_keeps_its_name_merges(write):
    write("unet.yaml", UNET)
    config = load_config(Stage2, ["unet.yaml"], ["--backbone.name", "unet", "--backbone.width", "32"])
    assert config.backbone == UNet(width=32, multipliers=(1, 2, 4), attention=(2,), dropout=0.3)


@pytest.mark.parametrize("order", list(itertools.permutations(["name=dit", "width=128", "heads=8"])))
def test_the_order_of_overrides_does_not_matter_to_a_changed_name(write, order):
    write("unet.yaml", UNET)
    config = load_config(Stage2, ["unet.yaml"], [f"--backbone.{option}" for option in order])
    assert config.backbone == DiT(width=128, heads=8)


def test_options_beside_a_name_that_is_given_twice_belong_to_the_last(write):
    write("unet.yaml", UNET)
    overrides = ["--backbone.name=unet", "--backbone.width=128", "--backbone.heads=8", "--backbone.name=dit"]
    assert load_config(Stage2, ["unet.yaml"], overrides).backbone == DiT(width=128, heads=8)


def test_a_block_within_a_block_is_replaced_alone():
    config = load_config(Stage1, ["stage1/vqvae"], ["--autoencoder.quantizer.name=fsq", "--autoencoder.stem=3"])
    assert to_dict(config.autoencoder.quantizer) == {"name": "fsq", "levels": [16, 16, 16, 16, 16]}
    assert config.autoencoder.stem == 3
    assert config.autoencoder.widths == (64, 128)


def test_another_name_of_the_run_replaces_nothing(write):
    write("unet.yaml", UNET)
    assert load_config(Stage2, ["unet.yaml"], ["--name", "other"]).backbone.width == 16


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        (["--optimizer.lr", "3e-4"], 3e-4),
        (["--optimizer.lr=3E-4"], 3e-4),
        (["optimizer.lr=.5"], 0.5),
        (["--optimizer.lr", "2"], 2.0),
        (["--optimizer.lr", "0.1", "--optimizer.lr", "0.2"], 0.2),
        (["--optimizer", "{lr: 1e-2}"], 0.01),
    ],
)
def test_overrides_are_yaml_in_either_form(override, value):
    lr = load_config(Stage2, ["stage2/unet"], override).optimizer.lr
    assert lr == value
    assert type(lr) is float


def test_override_values_may_be_negative_lists_words_or_hold_an_equals_sign():
    overrides = ["--backbone.attention", "[]", "--autoencoder", "a=b", "--data.path=x=y", "--trainer.compile", "true"]
    config = load_config(Stage2, ["stage2/unet"], overrides)
    assert (config.backbone, config.autoencoder, config.data.path) == (UNet(attention=()), "a=b", "x=y")
    assert config.trainer.compile is True
    line = "command line: optimizer.lr: must be greater than 0, not -0.1"
    assert errors(Stage2, ["stage2/unet"], ["--optimizer.lr", "-1e-1"]) == [line]


@pytest.mark.parametrize("overrides", [["--seed"], ["--seed", "--name", "x"], ["seed", "3"], ["3"]])
def test_an_override_without_a_value_is_refused(overrides):
    (line,) = errors(Stage2, ["stage2/unet"], overrides)
    assert line == f"command line: {overrides[0]}: expected --KEY VALUE or --KEY=VALUE"


def test_an_override_that_is_no_yaml_is_refused():
    (line,) = errors(Stage2, ["stage2/unet"], ["--backbone", "{name: dit"])
    assert line.startswith("command line: backbone, line 1: not valid YAML: ")


def test_a_mapping_of_overrides_has_a_label_of_its_own():
    with pytest.raises(UserError, match=re.escape("here: trainer.max_step: unknown key; did you mean 'max_steps'?")):
        load_config(Stage2, ["stage2/unet"], {"trainer": {"max_step": 3}}, label="here")
    assert load_config(Stage2, ["stage2/unet"], {"backbone": {"name": "dit"}}).backbone == DiT()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once_with_its_place(write):
    write(
        "base.yaml",
        MINIMAL + "backbone: {name: dit, width: 100, dept: 3}\ndiffusion: {schedule: cosine, prediction: velocity}\n",
    )
    write("run.yaml", "base: base.yaml\ntrainer: {max_steps: soon, precison: fp32}\nlr: 1e-3\n")
    known = (
        "(known: name, seed, output, data, autoencoder, pixels, pretrained, backbone, diffusion, condition, guide, sampling, "
        "optimizer, ema, trainer, logger"
    )
    trainer = (
        "max_steps, precision, accelerator, channels_last, compile, checkpoint_gradients, accumulate, "
        "log_every, validate_every, "
    )
    assert set(errors(Stage2, ["run.yaml"], ["--seed", "true", "--resum", "never"])) == {
        "base.yaml: backbone.heads: 4 x 6 does not divide width 100",
        "base.yaml: backbone.dept: unknown key; did you mean 'depth'? "
        "(known: name, width, depth, heads, patch, mlp_ratio, dropout)",
        "base.yaml: diffusion.prediction: velocity needs schedule flow; with cosine use v",
        "run.yaml: trainer.max_steps: must be an integer, not 'soon'",
        "run.yaml: trainer.precison: unknown key; did you mean 'precision'? "
        f"(known: {trainer}checkpoint_every, progress, score_every, score_count, watched, previews)",
        f"run.yaml: lr: unknown key; did you mean 'optimizer.lr'? {known})",
        "command line: seed: must be an integer, not true",
        "command line: resum: unknown key; did you mean '--resume'? "
        f"{known}, --config, --print-config, --resume, --help)",
    }


def test_an_error_names_the_last_file_that_set_the_key(write):
    write("a.yaml", MINIMAL + "seed: x\n")
    write("b.yaml", "seed: y\n")
    write("c.yaml", "output: elsewhere\n")
    assert errors(Stage2, ["a.yaml", "b.yaml", "c.yaml"]) == ["b.yaml: seed: must be an integer, not 'y'"]
    assert errors(Stage2, ["b.yaml", "a.yaml", "c.yaml"]) == ["a.yaml: seed: must be an integer, not 'x'"]


def test_missing_keys_are_named_with_the_file_that_should_have_them(write):
    write("a.yaml", "name: a\ndata: {batch_size: 2}\n")
    assert errors(Stage2, ["a.yaml"]) == ["a.yaml: data.path: is missing", "a.yaml: autoencoder: is missing"]


def test_a_part_that_is_unknown_or_unnamed_lists_the_known_ones(write):
    write("a.yaml", MINIMAL + "backbone: {width: 16}\n")
    assert errors(Stage2, ["a.yaml"]) == [
        "a.yaml: backbone.name: is missing: it says which part this block configures (known: unet, dit, uvit, karras_unet, custom)"
    ]
    assert errors(Stage2, ["a.yaml"], ["--backbone.name", "dti"]) == [
        "command line: backbone.name: 'dti' is not known; did you mean 'dit'? (known: unet, dit, uvit, karras_unet, custom)"
    ]
    assert errors(Stage1, ["stage1/vqvae"], ["--autoencoder.latents", "quantised"]) == [
        "command line: autoencoder.latents: 'quantised' is not known; did you mean 'quantized'? "
        "(known: continuous, quantized, unquantized)"
    ]


def test_an_option_of_the_other_part_is_unknown():
    (line,) = errors(Stage2, ["stage2/unet"], ["--backbone.name", "dit", "--backbone.multipliers", "[1]"])
    dit = "name, width, depth, heads, patch, mlp_ratio, dropout"
    assert line == f"command line: backbone.multipliers: unknown key (known: {dit})"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=3.0", "seed: must be an integer, not 3.0"),
        ("seed='3'", "seed: must be an integer, not '3'"),
        ("seed=-1", "seed: must be at least 0, not -1"),
        ("optimizer.lr=true", "optimizer.lr: must be a number, not true"),
        ("optimizer.lr=fast", "optimizer.lr: must be a number, not 'fast'"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a number, not '.inf'"),
        ("optimizer.lr=0", "optimizer.lr: must be greater than 0, not 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: is missing"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: must be less than 1, not 1.0"),
        ("backbone.multipliers=2", "backbone.multipliers: must be a list, not 2"),
        ("backbone.multipliers=[]", "backbone.multipliers: must be a list that is not empty, not []"),
        ("backbone.multipliers=[1, two]", "backbone.multipliers.1: must be an integer, not 'two'"),
        ("backbone.attention=[-1]", "backbone.attention.0: must be at least 0, not -1"),
        ("backbone=unet", "backbone: must be a block of keys, not 'unet'"),
        ("trainer=3", "trainer: must be a block of keys, not 3"),
        ("trainer.compile=1", "trainer.compile: must be true or false, not 1"),
        ("trainer.compile=yes", "trainer.compile: must be true or false, not 'yes'"),
        ("autoencoder=3", "autoencoder: must be text (is it without quotes?), not 3"),
        ("autoencoder.name=vqvae", "autoencoder: must be text (is it without quotes?), not {\"name\": \"vqvae\"}"),
        ("autoencoder=", "autoencoder: must be text (is it without quotes?), not null"),
        ("data.path=''", "data.path: must be text that is not empty, not ''"),
        ("name=../x", "name: must be letters, digits, '-', '_' and '.' alone, not '../x'"),
    ],
)  # fmt: skip
def test_wrong_types_and_bounds_are_refused(override, problem):
    assert errors(Stage2, ["stage2/unet"], [override]) == [f"command line: {problem}"]


@pytest.mark.parametrize(
    ("schema", "file", "overrides", "problem"),
    [
        (Stage2, "stage2/dit", ["backbone.heads=5"], "command line: backbone.heads: 4 x 5 does not divide width 192"),
        (Stage2, "stage2/unet", ["backbone.attention=[0, 2]"],
         "command line: backbone.attention: no level [2]: multipliers make levels 0 to 1"),
        (Stage2, "stage2/unet", ["backbone.heads=7"],
         "command line: backbone.heads: 7 does not divide the 128 channels of level 1"),
        (Stage2, "stage2/unet", ["diffusion.schedule=linear", "diffusion.prediction=velocity"],
         "command line: diffusion.prediction: velocity needs schedule flow; with linear use v"),
        (Stage1, "stage1/vqvae", ["autoencoder.strides=[2, 2]"],
         "configs/stage1/vqvae.yaml: autoencoder.widths: 2 widths, but strides make 3 grids"),
        (Stage1, "stage1/vqvae", ["autoencoder.widths=[64, 100]"],
         "command line: autoencoder.widths: every width must be a multiple of 8, the groups of its norm"),
        (Stage1, "stage1/fsq", ["autoencoder.quantizer.levels=[8, 2]"],
         "command line: autoencoder.quantizer.levels.1: must be at least 3, not 2"),
        (Stage1, "stage1/vqvae", ["autoencoder.latents=quantized", "autoencoder.quantizer.codebook_dim=2"],
         "command line: autoencoder.latents: "
         "quantized needs codes with as many dimensions as latent_channels: then a code is a latent"),
        (Stage1, "stage1/fsq", ["autoencoder.latents=quantized", "autoencoder.latent_channels=6"],
         "command line: autoencoder.latents: "
         "quantized needs codes with as many dimensions as latent_channels: then a code is a latent"),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer.heads=2"],
         "command line: autoencoder.quantizer: "
         "heads 2 do not divide latent_channels 5: choose others, or set codebook_dim"),
        (Stage1, "stage1/fsq", [f"autoencoder.quantizer.levels={[16] * 16}"],
         "command line: autoencoder.quantizer.levels: "
         "make more codes than a 64-bit integer can count: take fewer"),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer={name: simvq, warmup_steps: 5000}"],
         "configs/stage1/vqvae.yaml: trainer: "
         "max_steps 5000 must exceed autoencoder.quantizer.warmup_steps 5000"),
        (Stage1, "stage1/vqvae", ["loss={l1: 0, stretched: 0, mse: 0, chi: 0}"],
         "command line: loss: at least one weight beside the adversary's must be greater than 0"),
        (Stage1, "stage1/vqvae", ["loss={l1: 0, stretched: 0, mse: 0, chi: 0, adversarial: 1}"],
         "command line: loss: at least one weight beside the adversary's must be greater than 0"),
        (Stage1, "stage1/vqvae", ["loss.likelihood=0.05"],
         "command line: loss: likelihood above 0 and autoencoder.predict_variance true need each other"),
        (Stage1, "stage1/vqvae", ["autoencoder.predict_variance=true"],
         "configs/stage1/vqvae.yaml: loss: likelihood above 0 and autoencoder.predict_variance true need each other"),
        (Stage1, "stage1/vqvae", ["autoencoder.predict_variance=true", "loss.likelihood=0.05", "noise.law=none"],
         "command line: noise: law none draws no noise: no variance to predict"),
        (Stage1, "stage1/vqvae", ["loss.feature_matching=1"],
         "command line: loss.feature_matching: needs a discriminator: set adversarial greater than 0"),
        (Stage1, "stage1/vqvae", ["loss.adversarial=0.1", "trainer.max_steps=1000"],
         "command line: trainer: max_steps 1000 must exceed loss.adversarial_start 1000"),
        (Stage2, "stage2/unet", ["pixels.size=64"],
         "command line: pixels: size and crop are for autoencoder pixels: a trained one has a size of its own"),
        (Quickstart, "quickstart", ["samples.count=499"],
         "configs/quickstart.yaml: evaluate: count 500 is more than 499, samples.count"),
        (Quickstart, "quickstart", ["data.count=4999"],
         "configs/quickstart.yaml: evaluate: count 500 is more than 499, a tenth of data.count"),
        (Stage1, "stage1/vqvae", ["trainer.max_steps=150"],
         "command line: trainer: max_steps 150 must exceed autoencoder.quantizer.warmup_steps 150"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(monkeypatch, schema, file, overrides, problem):
    monkeypatch.chdir(ROOT)
    assert errors(schema, [file], overrides) == [problem]


@pytest.mark.parametrize(
    ("schema", "file", "overrides"),
    [
        (Stage2, "stage2/unet", ["diffusion.schedule=cosine", "diffusion.prediction=v"]),
        (Stage2, "stage2/unet", ["diffusion.schedule=cosine", "diffusion.prediction=eps"]),
        (Stage2, "stage2/unet", ["backbone.attention=[]", "backbone.heads=7"]),
        (Stage1, "stage1/vqvae", ["autoencoder.strides=[]", "autoencoder.widths=[8]"]),
        (Stage1, "stage1/vqvae", ["trainer.max_steps=151"]),
        (Stage1, "stage1/fsq", ["trainer.max_steps=1"]),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer.heads=5", "autoencoder.latents=quantized"]),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer.heads=2", "autoencoder.quantizer.codebook_dim=3"]),
        (
            Stage1,
            "stage1/vqvae",
            [
                "autoencoder.quantizer={name: vq, heads: 2, codebook_dim: 3}",
                "autoencoder.latent_channels=6",
                "autoencoder.latents=quantized",
            ],
        ),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer.codebook_dim=2", "autoencoder.latents=unquantized"]),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer={name: kl}", "autoencoder.latents=quantized"]),
        (Stage1, "stage1/vqvae", ["autoencoder.quantizer={name: none}", "autoencoder.latents=unquantized"]),
        (Stage1, "stage1/fsq", ["autoencoder.quantizer.name=fsp", "autoencoder.latents=quantized"]),
        (Stage1, "stage1/vqvae", ["loss={l1: 0, stretched: 0}"]),
        (Stage1, "stage1/vqvae", ["loss.adversarial=0.1", "loss.feature_matching=1", "trainer.max_steps=1001"]),
        (Stage1, "stage1/vqvae", ["loss.adversarial_start=9000"]),
    ],
)
def test_unusual_but_possible_combinations_pass(schema, file, overrides):
    load_config(schema, [file], overrides)


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("name: a\nname: b\n", 2, "duplicate key 'name'"),
        ("data:\n  path: x\n  batch_size: 3\n  path: y\n", 4, "duplicate key 'path'"),
        ("name: a\ndata: {path: x\nseed: 1\n", 3, ""),
        ("name: a\n\tseed: 1\n", 2, ""),
        ("name: a: b\n", 1, "mapping values are not allowed"),
        ("seed: 1\n[1, 2]: 3\n", 2, "a key must be a word"),
        ("name: !!python/object/apply:os.system ['touch pwned']\n", 1, "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(write, tmp_path, text, line, problem):
    write("bad.yaml", text)
    (message,) = errors(Stage2, ["bad.yaml"])
    assert message.startswith(f"bad.yaml, line {line}: not valid YAML: {problem}")
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad", b"name: \x00"])
def test_a_file_that_is_no_text_is_refused(write, tmp_path, content):
    write("bad.yaml", "")
    (tmp_path / "bad.yaml").write_bytes(content)
    assert errors(Stage2, ["bad.yaml"])[0].startswith("bad.yaml: ")


def test_a_file_that_is_a_list_is_refused_and_an_empty_one_says_nothing(write):
    write("list.yaml", "- 1\n")
    write("empty.yaml", "# nothing\n")
    assert errors(Stage2, ["list.yaml"]) == ["list.yaml: must be a block of `key: value`, not [1]"]
    assert load_config(Stage2, ["stage2/unet", "empty.yaml"]) == load_config(Stage2, ["stage2/unet"])


@pytest.mark.parametrize("word", ["no", "off", "1:30", "010", "2026-11-21", "1e", "0x1f"])
def test_words_that_old_yaml_takes_for_values_stay_words(word):
    assert load_config(Stage2, ["stage2/unet"], ["--data.path", word]).data.path == word


# --- finding files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["stage2/unet", "stage2/unet.yaml", "configs/stage2/unet.yaml", "configs/stage2/unet"]
)
def test_configs_of_the_installation_are_found_from_anywhere(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert find_config(given).samefile(CONFIGS / "stage2" / "unet.yaml")


def test_a_path_as_given_comes_first(write, tmp_path):
    write("stage2/unet.yaml", MINIMAL)
    assert find_config("stage2/unet").samefile(tmp_path / "stage2" / "unet.yaml")
    assert find_config(tmp_path / "stage2" / "unet.yaml").samefile(tmp_path / "stage2" / "unet.yaml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("stage2/untt.yaml", "; did you mean 'stage2/unet.yaml'?"),
        ("vqve", "; did you mean 'stage1/vqvae.yaml'?"),
        ("stage1", "; did you mean 'ablations/stage1.yaml'?"),  # beside it there is a folder of that name
        ("stage2", ""),  # a folder
        ("/nowhere/xyzzy.yaml", ""),
    ],
)
def test_a_file_that_is_missing_lists_near_ones(given, meant):
    with pytest.raises(UserError, match=f"^{re.escape(f'no config file {given}{meant} (known: ')}.*stage2/dit.yaml"):
        find_config(given)


def test_an_installed_wheel_finds_the_configs_it_carries(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "shared", site / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONFIGS, site / "shared" / "configs")
    code = (
        "import shared.config as c, shared.schema as s; print(c.load_config(s.Stage2, ['stage2/dit']).name, c.CONFIGS)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["dit", str((site / "shared" / "configs").resolve())], run.stderr


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_command_line_gives_config_and_options(write):
    write("a.yaml", UNET)
    write("b.yaml", "seed: 1\n")
    write("c d.yaml", "seed: 2\n")
    argv = [
        "--config",
        "a.yaml",
        "b.yaml",
        "--backbone={name: dit, depth: 2}",
        "--data.path",
        "my data",
        "--resume=never",
    ]
    config, options = parse_arguments([*argv, "--config", "c d.yaml", "--name", "x"], Stage2, "About.")
    assert (config.seed, config.backbone, config.data.path, config.name) == (2, DiT(depth=2), "my data", "x")
    assert options.resume == "never"
    assert parse_arguments(["--config", "a.yaml"], Stage2, None)[1].resume == "auto"


def test_a_script_may_have_a_default_config(write):
    write("a.yaml", UNET)
    assert parse_arguments(["--seed", "4"], Stage2, None, default_config="a.yaml")[0].seed == 4
    assert parse_arguments(["--config", "stage2/dit"], Stage2, None, default_config="a.yaml")[0].name == "dit"
    with pytest.raises(UserError, match=r"no --config FILE given \(known: .*stage2/unet.yaml"):
        parse_arguments(["--seed", "4"], Stage2, None)


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_print_config_shows_the_resolved_config_and_stops(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--config", "stage2/dit", flag, "--seed=7"], Stage2, None)
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == to_dict(load_config(Stage2, ["stage2/dit"], ["--seed=7"]))


@pytest.mark.parametrize("argument", ["--conf=stage2/dit", "--res=never", "--print", "--trainer.max_step=3"])
def test_nothing_may_be_abbreviated(argument):
    with pytest.raises(UserError):
        parse_arguments(["--config", "stage2/dit", argument], Stage2, None)


@pytest.mark.parametrize("argv", [["--resume", "maybe"], ["stray"], ["--config"], ["-x"], ["seed=3"]])
def test_what_is_no_option_is_told_in_a_line(argv):
    with pytest.raises(UserError, match=r"^[^\n]+ \(`.* --help` shows what there is\)$"):
        parse_arguments([*argv, "--seed", "1"], Stage2, None)


def test_help_describes_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"], Stage2, "What it does, 100 %.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("--seed", "--data.path", "--backbone.multipliers", "--backbone.patch", "--optimizer.lr", "--ema.decay"):
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [key])
        assert len(line.split()) > 3, line  # the key, its default and some words
    assert "What it does, 100 %." in text
    assert "after the rise, down to 1 % (linear | cosine | constant)" in text
    assert "--adversary.updates" in text  # of a config of the other kind
    assert "--resume" in text


# --- the shipped files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED)
def test_shipped_configs_are_valid_and_survive_a_round_trip(tmp_path, file):
    schema = Distill if file == "stage2/distill.yaml" else SCHEMAS[str(Path(file).parent).strip(".")]
    config = load_config(schema, [file])
    assert type(config) is (Adversarial if Path(file).stem.startswith("gan") else schema)
    schema = type(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(schema, [tmp_path / "config.yaml"]) == config
    assert schema.model_validate(yaml.safe_load(to_yaml(config))) == config  # any YAML reader understands it
    assert list(yaml.safe_load(to_yaml(config))) == list(schema.model_fields)  # in the order of the schema


@pytest.mark.parametrize("name", ["12e4", "1.5", "0x10", "017", "yes", "null", "1_000"])
def test_text_that_looks_like_something_else_survives_a_round_trip(tmp_path, name):
    config = load_config(Stage1, ["stage1/vqvae"]).model_copy(update={"name": name})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(Stage1, [tmp_path / "config.yaml"]).name == name
    assert yaml.safe_load(to_yaml(config))["name"] == name


def flatten(tree: dict, prefix: str = "") -> dict:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def differences(schema, one: str, other: str) -> set[str]:
    a, b = flatten(to_dict(load_config(schema, [one]))), flatten(to_dict(load_config(schema, [other])))
    return {key for key in a.keys() | b.keys() if a.get(key, ...) != b.get(key, ...)}


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        (Stage1, "stage1/vqvae.yaml"),
        (Stage2, "stage2/unet.yaml"),
        (Stage2, "stage2/gan.yaml"),
        (Distill, "stage2/distill.yaml"),
        (Quickstart, "quickstart.yaml"),
        (Ablation, "ablations/stage1.yaml"),
    ],
)
def test_a_reference_lists_every_key_of_its_schema(schema, file):
    written = flatten(yaml.safe_load((CONFIGS / file).read_text()))
    assert written.keys() == flatten(to_dict(load_config(schema, [file]))).keys()


def test_the_references_say_what_the_defaults_say():
    vqvae, unet = load_config(Stage1, ["stage1/vqvae"]), load_config(Stage2, ["stage2/unet"])
    assert vqvae == Stage1.model_validate({"name": "vqvae", "data": {"path": "data/lenses"}})
    assert unet.backbone == UNet()
    assert load_config(Quickstart, ["quickstart"]) == Quickstart()
    assert load_config(Distill, ["stage2/distill"]) == Distill(name="distilled", teacher="checkpoints/unet")
    plain = Stage2.model_validate({"name": "unet", "autoencoder": "x", "data": {"path": "x"}})
    gan = {"name": "gan", "autoencoder": "checkpoints/vqvae", "data": {"path": "data/lenses", "batch_size": 32}}
    steps = {"max_steps": 8000}
    assert load_config(Stage2, ["stage2/gan"]) == Adversarial.model_validate({**gan, "trainer": steps})
    assert (unet.diffusion, unet.sampling, unet.ema) == (plain.diffusion, plain.sampling, plain.ema)


@pytest.mark.parametrize("file", [file for file in SHIPPED if file.startswith(("baselines/", "variants/"))])
def test_a_baseline_is_a_base_and_at_most_ten_lines(file):
    text = (CONFIGS / file).read_text()
    tree = yaml.safe_load(text)
    assert tree["base"]
    assert tree["name"] == Path(file).stem
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 10
    load_config(Stage2, [file], ["--pixels.size=50", "--autoencoder=pixels"])


def test_swapping_a_part_is_the_whole_difference():
    assert all(key == "name" or key.startswith("backbone.") for key in differences(Stage2, "stage2/unet", "stage2/dit"))
    prefix = "autoencoder.quantizer."
    assert all(key == "name" or key.startswith(prefix) for key in differences(Stage1, "stage1/vqvae", "stage1/fsq"))


@pytest.mark.parametrize("file", ["quickstart", "smoke"])
def test_the_quickstart_links_its_stages(file):
    overrides = ["--seed", "5", "--output", "out", "--stage2.overrides.trainer.max_steps", "77"]
    quickstart = load_config(Quickstart, [file], overrides)
    stage1, stage2 = quickstart.stages()
    assert stage1.seed == stage2.seed == 5
    assert stage1.data.path == stage2.data.path == quickstart.data.path
    assert stage2.autoencoder == f"{stage1.output}/{stage1.name}" == f"out/{file}-stage1"
    assert stage2.name == f"{file}-stage2"
    assert stage2.trainer.max_steps == 77


@pytest.mark.parametrize("given", [[], ["--resume", "never"]])
def test_the_quickstart_hands_its_resume_on(tmp_path, monkeypatch, given):
    heard = []
    monkeypatch.setattr(shared.quickstart, "simulate", lambda config: None)
    monkeypatch.setattr(shared.quickstart, "script", lambda *_: lambda *arguments: heard.append(arguments[1:]))
    shared.quickstart.main(["--config", "smoke.yaml", "--output", str(tmp_path), *given])
    resume = given[-1] if given else "auto"
    assert heard == [(resume,), (resume,), (), ()]


def test_overrides_of_a_stage_win_over_the_links_and_are_checked():
    quickstart = load_config(Quickstart, ["quickstart"], ["--stage1.overrides.name=other", "--stage2.overrides.seed=9"])
    stage1, stage2 = quickstart.stages()
    assert (stage1.name, stage2.autoencoder, stage2.seed) == ("other", "checkpoints/other", 9)
    wrong = load_config(Quickstart, ["quickstart"], ["--stage2.overrides.trainer.max_step=9"])
    with pytest.raises(
        UserError, match=r"^stage2\.overrides: trainer\.max_step: unknown key; did you mean 'max_steps'"
    ):
        wrong.stages()


def test_the_smoke_run_is_tiny():
    smoke = load_config(Quickstart, ["smoke"])
    stage1, stage2 = smoke.stages()
    assert smoke.data.count <= 200
    assert smoke.samples.count <= 16
    assert stage1.trainer.max_steps <= 30
    assert stage2.trainer.max_steps <= 30
    assert stage1.logger.wandb == stage2.logger.wandb == "disabled"
    assert smoke.data.path != load_config(Quickstart, ["quickstart"]).data.path


def test_a_config_cannot_be_changed():
    config = load_config(Stage2, ["stage2/unet"])
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.max_steps = 3
