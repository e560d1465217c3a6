"""YAML files and dotted overrides -> one validated, frozen config, or one error that lists everything that is wrong.

Knows no schema: that is shared/schema.py. Imports no torch, so that a typo is reported before anyone has waited for it.

A config is made of layers, each over the one before: a file's `base:` and then the file, files from left to right,
then the command line. A block that changes its `name` replaces the block below it instead of merging with it, because
the options there belonged to the old name.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from shared.cli import Parser
from shared.errors import UserError, hint
from shared.explain import COMMAND_LINE, OPTIONS, Layer, describe, explain, shown

Config = TypeVar("Config", bound=BaseModel)
Tree = dict[str, Any]

HERE = Path(__file__).resolve().parent
# An installed wheel carries the configs inside this package; a checkout has them beside it.
CONFIGS = HERE / "configs" if (HERE / "configs").is_dir() else HERE.parent / "configs"


def load_config(
    schema: type[Config],
    files: Sequence[Path | str],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    label: str = COMMAND_LINE,
) -> Config:
    """Merge files left to right, then overrides, and validate.

    overrides   as on a command line, ["--backbone.name", "dit", "--trainer.max_steps=100"], or a nested mapping
    label       what errors call the overrides
    schema      or, where it has an attribute `instead`, {block: schema}, that of a config with such a block
    UserError   names every unknown key, wrong type and impossible combination at once, one a line
    """
    layers = [layer for file in files for layer in _file_layers(find_config(file))]
    layers.append((label, dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)))
    merged: Tree = {}
    for _, tree in layers:
        merged = merge(merged, tree)
    schema = next((other for key, other in _others(schema).items() if key in merged), schema)
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        raise UserError("\n".join(explain(schema, layers, error))) from None


def parse_arguments(
    argv: Sequence[str] | None, schema: type[Config], description: str | None, default_config: str | None = None
) -> tuple[Config, argparse.Namespace]:
    """The command line of a script -> its config, and the options beside it (`resume`).

    argv             None: the process's own
    default_config   what `--config` is when it is not given
    """
    told = dict.fromkeys(describe(schema))  # once, what parts have in common
    known = {key for key, _, _ in told}
    told |= dict.fromkeys(row for other in _others(schema).values() for row in describe(other) if row[0] not in known)
    keys = "\n".join(f"  --{key:<44} {default:<16} {text}" for key, default, text in told)
    parser = Parser(
        description=description,
        epilog=f"any key of the config, as --KEY VALUE or --KEY=VALUE with a value in YAML:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", nargs="+", action="extend", help="YAML files, merged left to right; later ones win"
    )
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", help="show the resolved config and stop"
    )
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="go on with a run of that name (default), or refuse"
    )
    ours, overrides = _split(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(ours)
    files = options.config or ([default_config] if default_config else [])
    if not files:
        raise UserError(f"no --config FILE given{hint('', _known_configs())}")
    config = load_config(schema, files, overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, options


def find_config(path_or_name: Path | str, beside: Path | None = None) -> Path:
    """A path as given or, failing that, within the configs that came with the installation; `.yaml` may be left out.

    beside   the folder that a relative path starts from; None: the working directory
    """
    given = Path(path_or_name)
    for folder in (beside or Path(), CONFIGS, CONFIGS.parent):
        for path in (folder / given, folder / f"{given}.yaml"):
            if path.is_file():
                return path
    known = _known_configs()
    stems = difflib.get_close_matches(given.stem, [Path(name).stem for name in known], n=1, cutoff=0.85)
    elsewhere = (name for name in known if Path(name).stem in stems)
    raise UserError(f"no config file {given}{hint(given.as_posix(), known, elsewhere)}")


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with these of its keys changed, checked as a whole."""
    return load_config(type(config), [], merge(to_dict(config), changes))


def to_dict(config: BaseModel) -> Tree:
    """Plain types, as YAML and JSON have them."""
    return config.model_dump(mode="json")


def to_yaml(config: BaseModel) -> str:
    """The resolved config, every key spelt out; `load_config` of it gives the same config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _others(schema: type[Config]) -> dict[str, type[Config]]:
    """{block: the schema of a config that has it}: such as a GAN among the configs of stage 2."""
    return getattr(schema, "instead", {})


# --- layers -----------------------------------------------------------------------------------------------------------


def merge(old: Tree, new: Mapping[str, Any]) -> Tree:
    """`new` over `old`, block by block; a block under another `name` replaces the old one, lists are replaced whole.

    A block with a `class_path` is that of another part for each, called `custom`.
    """
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(value, dict) and "class_path" in value:
            value = {"name": "custom", **value}
        if isinstance(before, dict) and isinstance(value, dict):
            renamed = any(k in before and k in value and before[k] != value[k] for k in ("name", "class_path"))
            value = value if renamed else merge(before, value)
        merged[key] = value
    return merged


def parse_overrides(arguments: Sequence[str]) -> Tree:
    """["--a.b", "1", "--a.c=x"] -> {"a": {"b": 1, "c": "x"}}; a bare "a.b=1" will do, too."""
    pairs: list[tuple[list[str], Any]] = []
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not equals:
            if not token.startswith("--") or not queue or queue[0].startswith("--"):
                raise UserError(f"{COMMAND_LINE}: {token}: expected --KEY VALUE or --KEY=VALUE")
            text = queue.pop(0)
        pairs.append((key.split("."), _parse(text, f"{COMMAND_LINE}: {key}")))
    return _blocks(pairs)


def unfold(tree: Mapping[str, Any]) -> Tree:
    """Dotted keys as blocks, at any depth: {"a.b": 1, "a": {"c.d": 2}} -> {"a": {"b": 1, "c": {"d": 2}}}."""
    return _blocks([
        (key.split("."), unfold(value) if isinstance(value, Mapping) else value) for key, value in tree.items()
    ])  # fmt: skip


def _blocks(pairs: list[tuple[list[str], Any]]) -> Tree:
    # Names first: whatever the order, the options given beside a new name are options of that name.
    pairs = sorted(pairs, key=lambda pair: pair[0][-1] != "name")
    tree: Tree = {}
    for keys, value in pairs:
        for key in reversed(keys):
            value = {key: value}
        tree = merge(tree, value)
    return tree


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments for argparse, and overrides: every `--x` that is no option. argparse would give `--a={b: c}`, which
    holds a space, to `--config` as one more file."""
    ours: list[str] = []
    overrides: list[str] = []
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--") or token.partition("=")[0].replace("_", "-") in OPTIONS:
            ours.append(token)
            continue
        overrides.append(token)
        if "=" not in token and queue and not queue[0].startswith("--"):
            overrides.append(queue.pop(0))
    return ours, overrides


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """A file's bases, the deepest first, and the file."""
    label, chain = _label(path), (*above, path.resolve())
    if path.resolve() in above:
        raise UserError(f"{label}: base: these files are each other's base: {' -> '.join(map(_label, chain))}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label}: cannot be read as text: {error}") from error
    tree = _parse(text, label)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{label}: must be a block of `key: value`, not {shown(tree)}")
    base = tree.pop("base", None)
    if base is None:
        return [(label, tree)]
    if not isinstance(base, str):
        raise UserError(f"{label}: base: must be the path of another YAML file, not {shown(base)}")
    try:
        below = find_config(base, beside=path.parent)
    except UserError as error:
        raise UserError(f"{label}: base: {error}") from None
    return [*_file_layers(below, chain), (label, tree)]


def _label(path: Path) -> str:
    path = path.resolve()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _known_configs() -> list[str]:
    # configs/simulate belongs to the simulator, whose files are no configs of a run.
    files = (path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
    return sorted(path.as_posix() for path in files if path.parts[0] != "simulate")


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 has them: 3e-4 is a number, `no` and `off` are words, 010 is not eight. No key twice."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            mapping[key.value] = self.construct_object(value, deep=True)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Blocks as blocks, lists in one line; quotes what either version of YAML would take for other than text."""


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)

_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _parse(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: nothing in the text is executed
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{label}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{label}: not valid YAML: {error}") from None
