"""Who may import whom, read from the source: nothing is imported to find out."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "stage1_vqvae", "stage2_diffusion")
STAGES = ("stage1_vqvae", "stage2_diffusion")
PROCESS = ("stage2_diffusion.schedule", "stage2_diffusion.denoiser", "stage2_diffusion.samplers")
MODELS = (*STAGES, "shared.autoencoder", "shared.registry", "shared.checkpoint", "shared.training")

# A module, or a package with all that is in it -> what it must not import, likewise.
NEVER = {
    "shared": STAGES,
    "stage1_vqvae": ("stage2_diffusion",),
    "stage2_diffusion": ("stage1_vqvae",),
    "stage2_diffusion.samplers": PACKAGES,
    "stage2_diffusion.schedule": PACKAGES,
    "stage2_diffusion.backbones": PROCESS,
    "shared.metrics": MODELS,
}
# Beside Python's own library, these may import what is listed and no more, wherever in the file.
TORCH_ONLY = {"stage2_diffusion.samplers": ("torch",), "stage2_diffusion.schedule": ("torch",)}
# What a command line goes through before anything is trained: what loads with them is light, all the way down.
LIGHT = ("shared.cli", "shared.config", "shared.errors", "shared.explain", "shared.registry", "shared.schema")
LIGHT_LIBRARIES = ("yaml", "pydantic", "pydantic_core")


def within(module: str, families: tuple[str, ...]) -> bool:
    return any(module == family or module.startswith(f"{family}.") for family in families)


def modules(root: Path) -> dict[str, Path]:
    files = (file for package in PACKAGES for file in (root / package).rglob("*.py"))
    names = {file: file.relative_to(root).with_suffix("").as_posix().replace("/", ".") for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imports(name: str, file: Path, deep: bool = True) -> Iterator[str]:
    """Every module that a file imports; with deep=False those alone that loading it imports."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if not deep and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)  # `from shared import data` is shared.data
        nodes += ast.iter_child_nodes(node)


def violations(root: Path) -> list[str]:
    known, found = modules(root), []
    for name, file in known.items():
        for target in imports(name, file):
            for family, never in NEVER.items():
                if within(name, (family,)) and within(target, never):
                    found.append(f"{name} imports {target}")
            library = target.split(".")[0]
            if name in TORCH_ONLY and library not in (*TORCH_ONLY[name], *sys.stdlib_module_names):
                found.append(f"{name} imports {target}")
    queue = [(name, name) for name in LIGHT if name in known]
    seen = set()
    while queue:
        name, path = queue.pop()
        seen.add(name)
        for target in imports(name, known[name], deep=False):
            library = target.split(".")[0]
            if target in known and target not in seen:
                queue.append((target, f"{path} -> {target}"))
            elif library not in (*LIGHT_LIBRARIES, *PACKAGES, *sys.stdlib_module_names):
                found.append(f"{path} loads {target}")
    return found


def test_the_packages_import_in_one_direction():
    assert violations(ROOT) == []


def test_every_rule_is_about_a_module_that_exists():
    known = modules(ROOT)
    rules = {*NEVER, *TORCH_ONLY, *LIGHT, *(name for names in NEVER.values() for name in names)}
    assert rules <= known.keys()


@pytest.mark.parametrize(
    ("module", "line", "reported"),
    [
        ("shared/report.py", "import stage1_vqvae.vqvae", "shared.report imports stage1_vqvae.vqvae"),
        (
            "shared/report.py",
            "def f():\n    from stage2_diffusion import backbones",
            "shared.report imports stage2_diffusion",
        ),
        (
            "stage1_vqvae/module.py",
            "from stage2_diffusion.backbones.unet import UNet",
            "stage1_vqvae.module imports stage2_",
        ),
        (
            "stage2_diffusion/backbones/unet.py",
            "from ..schedule import NoiseSchedule",
            "stage2_diffusion.backbones.unet imports stage2_diff",
        ),
        (
            "stage2_diffusion/backbones/unet.py",
            "from .. import schedule",
            "stage2_diffusion.backbones.unet imports stage2_diffusion.schedule",
        ),
        (
            "stage2_diffusion/samplers.py",
            "from shared.errors import UserError",
            "stage2_diffusion.samplers imports shared",
        ),
        ("stage2_diffusion/schedule.py", "import numpy as np", "stage2_diffusion.schedule imports numpy"),
        ("shared/metrics/fid.py", "from shared import autoencoder", "shared.metrics.fid imports shared.autoencoder"),
        ("shared/config.py", "if True:\n    import torch.nn as nn", "shared.config loads torch.nn"),
        ("shared/cli.py", "import shared.data", "shared.cli -> shared.data loads torch"),
        ("shared/schema.py", "class A:\n    import lightning", "shared.schema loads lightning"),
    ],
)
def test_a_planted_import_is_reported(tmp_path, module, line, reported):
    for path, text in {
        "shared/data.py": "import torch\n",
        "shared/autoencoder.py": "import torch\n",
        module: line,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert any(report.startswith(reported) for report in violations(tmp_path))


def test_a_light_module_may_import_within_a_function(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "cli.py").write_text("import yaml\ndef main():\n    import torch\n    import shared.data\n")
    (tmp_path / "shared" / "data.py").write_text("import torch\n")
    assert violations(tmp_path) == []
