"""What a schema knows, put into words: the keys that `--help` lists, and what is wrong with a config that fails it."""

import json
import re
from collections.abc import Iterator
from inspect import isclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shared.errors import hint

Layer = tuple[str, dict[str, Any]]  # where it comes from, as an error names it, and what it says
COMMAND_LINE = "command line"
OPTIONS = ("--config", "--print-config", "--resume", "--help")  # what a script takes beside the keys of its config

# What pydantic calls by the names of Python's types.
WORDS = {
    "bool_type": "true or false",
    "dict_type": "a block of keys",
    "float_type": "a number",
    "int_type": "an integer",
    "model_attributes_type": "a block of keys",
    "model_type": "a block of keys",
    "string_pattern_mismatch": "letters, digits, '-', '_' and '.' alone",
    "string_too_short": "text that is not empty",
    "string_type": "text (is it without quotes?)",
    "too_long": "a shorter list",
    "too_short": "a list that is not empty",
    "tuple_type": "a list",
}


def describe(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every dotted key of a schema, its default and what it is for."""
    for key, field in schema.model_fields.items():
        blocks = _blocks(field)
        for block in blocks:
            yield from describe(block, f"{prefix}{key}.")
        if not blocks:
            default = "" if field.is_required() else field.default
            default = default if isinstance(default, str) else shown(default)
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            text = field.description or (schema.__doc__ or "").split("\n")[0]
            yield prefix + key, default, text + (f" ({' | '.join(choices)})" if len(choices) > 1 else "")


def _blocks(field: FieldInfo) -> list[type[BaseModel]]:
    """The schemas that a field's block may have: none for a plain value, several where a `name` chooses."""
    members = get_args(field.annotation) or (field.annotation,)
    return [member for member in members if isclass(member) and issubclass(member, BaseModel)]


def _locate(schema: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """pydantic's location -> the path of keys, without its labels of unions, and the schema of the block it is in."""
    path: list[str] = []
    parts = list(location)
    while parts:
        path.append(str(parts.pop(0)))
        field = schema.model_fields.get(path[-1])
        blocks = _blocks(field) if field else []
        if not blocks:
            named = field is not None and get_origin(field.annotation) is dict
            path += [str(part) for part in parts if isinstance(part, int) or (named and part != "[key]")]
            break
        if field and get_origin(field.annotation) is dict and parts:
            path.append(str(parts.pop(0)))  # a block of blocks: the next part is the name of one
        elif len(blocks) > 1 and parts:
            tag = parts.pop(0)
            blocks = [block for block in blocks if block.model_fields["name"].default == tag]
        if parts:
            schema = blocks[0]
    return tuple(path), schema


def explain(schema: type[BaseModel], layers: list[Layer], error: ValidationError) -> Iterator[str]:
    """One line for each thing that is wrong: who said it, where, what is wrong, what was meant."""
    found: dict[tuple[str, ...], list[ErrorDetails]] = {}
    blocks = {}
    for item in error.errors(include_url=False):
        path, block = _locate(schema, item["loc"])
        path += ("name",) if item["type"].startswith("union_tag") else ()
        found.setdefault(path, []).append(item)
        blocks[path] = block
    for path, items in found.items():
        kind, block = items[0]["type"], blocks[path]
        label = _origin(layers, path)
        if kind == "extra_forbidden":
            what = _unknown_key(schema, block, path, label)
        elif kind == "union_tag_not_found":
            names = [member.model_fields["name"].default for member in _blocks(block.model_fields[path[-2]])]
            what = f"is missing: it says which part this block configures{hint('', names)}"
        else:
            what = _wrong_value(items)
        yield ": ".join(filter(None, (label, ".".join(path), what)))


def _origin(layers: list[Layer], path: tuple[str, ...]) -> str:
    """The last layer that says anything at `path` or, failing that, in the block above it, or else the last file."""

    def says(node: Any, keys: tuple[str, ...]) -> bool:
        return not keys or (isinstance(node, dict) and keys[0] in node and says(node[keys[0]], keys[1:]))

    for depth in range(len(path), 0, -1):
        for label, tree in reversed(layers):
            if says(tree, path[:depth]):
                return label
    return ([label for label, _ in layers if label != COMMAND_LINE] or [COMMAND_LINE])[-1]


def _unknown_key(schema: type[BaseModel], block: type[BaseModel], path: tuple[str, ...], label: str) -> str:
    known = list(block.model_fields)
    if label == COMMAND_LINE and len(path) == 1:
        known += OPTIONS
    # A right word in a wrong place. The same place is another part's, whose name was changed away.
    elsewhere = (key for key, _, _ in describe(schema) if key.split(".")[-1] == path[-1] and key != ".".join(path))
    return f"unknown key{hint(path[-1], known, elsewhere)}"


def _wrong_value(items: list[ErrorDetails]) -> str:
    kind, context, value = items[0]["type"], items[0].get("ctx", {}), items[0]["input"]
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    choices = re.findall(r"'([^']*)'", context.get("expected_tags", context.get("expected", "")))
    if choices and len(items) == 1:
        value = context.get("tag", value)
        return f"{shown(value)} is not known{hint(value, choices)}"
    wanted = [WORDS.get(item["type"], item["msg"].removeprefix("Input should be ")) for item in items]
    expected = " or ".join(wanted).replace("greater than or equal to", "at least")
    return f"must be {expected}, not {shown(value)}"


def shown(value: Any) -> str:
    """A value as YAML could have it, cut to what fits a line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
