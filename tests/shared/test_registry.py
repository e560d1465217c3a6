"""The table of parts, and that it, the schema and the constructors tell the same story."""

import inspect
import subprocess
import sys
from importlib import import_module
from itertools import product
from typing import get_args

import pytest
from pydantic import ValidationError

from shared import schema
from shared.errors import UserError
from shared.registry import PARTS, build, names, resolve

# What the caller of `build` knows and no config says.
INTERFACE = {
    "autoencoder": {"image_shape", "transform"},
    "quantizer": {"channels"},
    "backbone": {"latent_shape", "cond_dim"},
    "gan": {"latent_shape"},
}
SCHEMAS = {
    "autoencoder": [schema.VQVAE],
    "quantizer": get_args(schema.VQVAE.model_fields["quantizer"].annotation),
    "backbone": get_args(schema.Stage2.model_fields["backbone"].annotation),
    "gan": [schema.GAN],
}
CONFIGURED = [(kind, block.model_fields["name"].default, block) for kind, blocks in SCHEMAS.items() for block in blocks]


def options_of(part) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(part).parameters)


def plain(value):
    return list(value) if isinstance(value, list | tuple) else value


def agree(block, parameters: dict[str, inspect.Parameter]) -> None:
    """A block's keys are the constructor's options, with the same defaults."""
    fields = {key: field for key, field in block.model_fields.items() if key != "name"}
    assert fields.keys() == parameters.keys()
    for key, field in fields.items():
        default = parameters[key].default
        if default is not inspect.Parameter.empty:
            assert plain(default) == plain(field.default), f"{block.__name__}.{key}"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schema_and_the_table_have_the_same_names(kind):
    in_schema = {name for k, name, _ in CONFIGURED if k == kind}
    # `pixels` is what stage 2 says in place of a path; its options are a block of their own.
    assert in_schema == set(names(kind)) - {"pixels"}


def test_the_schema_and_the_table_have_the_same_samplers():
    blocks = (schema.Sampling, schema.FewSteps)  # what a model is sampled by, and what a distilled one is
    assert {name for block in blocks for name in get_args(block.model_fields["sampler"].annotation)} == set(
        names("sampler")
    )


@pytest.mark.slow  # the import of torch
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, parts in PARTS.items() for name in parts])
def test_every_entry_is_something_to_call(kind, name):
    assert callable(resolve(kind, name))


@pytest.mark.parametrize(("kind", "name", "block"), CONFIGURED)
def test_a_block_has_the_options_of_its_constructor(kind, name, block):
    parameters = options_of(resolve(kind, name))
    options = {key: parameter for key, parameter in parameters.items() if key not in INTERFACE[kind]}
    if name == "vqvae":
        assert options["quantizer"].default in (inspect.Parameter.empty, {"name": "vq"})
        options["quantizer"] = options["quantizer"].replace(default=inspect.Parameter.empty)
    agree(block, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {}),
        ("unet", {"width": 12}),
        ("unet", {"attention": [2]}),
        ("unet", {"attention": [0, 1], "heads": 3}),
        ("unet", {"attention": [], "heads": 3}),
        ("unet", {"width": 16, "multipliers": [1, 3], "heads": 3}),
        ("unet", {"width": 16, "multipliers": [1, 3], "heads": 5}),
        ("dit", {"width": 64, "heads": 4, "depth": 1}),
        ("dit", {"width": 64, "heads": 6, "depth": 1}),
        ("dit", {"width": 100, "heads": 10, "depth": 1}),
        ("uvit", {"width": 64, "heads": 4, "depth": 1}),
        ("uvit", {"width": 64, "heads": 4, "depth": 2}),
        ("uvit", {"width": 64, "heads": 6, "depth": 3}),
        ("karras_unet", {"width": 12}),
        ("karras_unet", {"attention": [2]}),
        ("karras_unet", {"width": 16, "multipliers": [1, 3], "heads": 5}),
    ],
)
def test_what_the_schema_calls_impossible_the_backbone_refuses_too_and_nothing_else(name, options):
    def refused(function) -> bool:
        try:
            function()
        except (ValidationError, UserError):
            return True
        return False

    block = dict(zip(names("backbone"), SCHEMAS["backbone"], strict=True))[name]
    impossible = refused(lambda: block.model_validate(options))
    assert impossible == refused(lambda: build("backbone", {"name": name, **options}, latent_shape=(2, 6, 6)))


def choices(key: str) -> tuple[str, ...]:
    return get_args(schema.Diffusion.model_fields[key].annotation)


@pytest.mark.slow  # the import of Lightning
@pytest.mark.parametrize(("schedule", "prediction"), list(product(choices("schedule"), choices("prediction"))))
def test_a_diffusion_block_that_the_schema_lets_pass_makes_a_denoiser(schedule, prediction):
    block = {"schedule": schedule, "prediction": prediction, "time": "uniform", "shift": 1.0}
    backbone = {"name": "unet", "width": 8, "heads": 1}
    build_denoiser = import_module("stage2_diffusion.generator").build_denoiser
    try:
        schema.Diffusion.model_validate(block)
    except ValidationError:
        with pytest.raises((UserError, ValueError)):
            build_denoiser(backbone, block, latent_shape=(2, 4, 4))
    else:
        denoiser = build_denoiser(backbone, block, latent_shape=(2, 4, 4))
        assert (denoiser.schedule.name, denoiser.prediction) == (schedule, prediction)


def test_the_diffusion_block_names_the_schedules_and_the_times_that_there_are():
    assert set(choices("schedule")) == set(import_module("stage2_diffusion.schedule").CURVES)
    build_denoiser = import_module("stage2_diffusion.generator").build_denoiser
    for time in choices("time"):
        block = {**schema.Diffusion().model_dump(), "time": time}
        assert build_denoiser({"name": "unet", "width": 8}, block, latent_shape=(2, 4, 4)).time_distribution == time


def test_the_loss_block_has_the_terms_of_the_loss():
    parameters = options_of(import_module("stage1_vqvae.losses").ReconstructionLoss)
    for known in ("law", "transform", "channels", "noisier"):
        parameters.pop(known)
    agree(schema.Loss, parameters)


def test_the_pixels_block_has_the_options_of_pixels():
    parameters = options_of(resolve("autoencoder", "pixels"))
    agree(schema.Pixels, {key: p for key, p in parameters.items() if key not in INTERFACE["autoencoder"]})


def test_the_regularize_block_has_the_options_of_the_regularizer():
    agree(schema.Regularize, options_of(import_module("stage1_vqvae.regularize").Regularizer))


# --- building ---------------------------------------------------------------------------------------------------------


class Part:
    def __init__(self, shape: tuple[int, ...], *, width: int = 4, spoil: bool = False) -> None:
        if spoil:
            raise TypeError("inside")
        self.shape, self.width = shape, width


@pytest.fixture
def part(monkeypatch):
    monkeypatch.setitem(PARTS, "thing", {"part": f"{__name__}:Part", "lost": "no_such_module:Part"})


def test_build_passes_options_and_interface(part):
    built = build("thing", {"name": "part", "width": 8}, shape=(1, 2))
    assert (built.shape, built.width) == ((1, 2), 8)


def test_an_unknown_name_lists_the_known(part):
    with pytest.raises(UserError, match=r"^unknown thing 'prt'; did you mean 'part'\? \(known: part, lost\)$"):
        build("thing", {"name": "prt"}, shape=())
    with pytest.raises(UserError, match=r"^unknown thing '' \(known: part, lost\)$"):
        build("thing", {"width": 3}, shape=())


def test_an_option_that_a_part_does_not_take_is_the_config_s_mistake(part):
    with pytest.raises(UserError, match="thing 'part': got an unexpected keyword argument 'depth'"):
        build("thing", {"name": "part", "depth": 8}, shape=())


def test_a_type_error_within_a_part_is_ours(part):
    with pytest.raises(TypeError, match=r"^inside$"):
        build("thing", {"name": "part", "spoil": True}, shape=())


def test_parts_are_imported_when_built_and_not_before(part):
    assert names("thing") == ["part", "lost"]
    with pytest.raises(ModuleNotFoundError):
        resolve("thing", "lost")


@pytest.mark.parametrize("module", ["config", "schema", "registry", "explain", "errors", "cli"])
def test_light_modules_load_nothing_heavy(module):
    heavy = ["torch", "lightning", "numpy", "matplotlib", "wandb", "caustics", "torchmetrics", "stage1_vqvae"]
    code = f"import sys, shared.{module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
