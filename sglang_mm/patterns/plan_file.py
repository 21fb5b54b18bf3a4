"""Plan files: JSON on disk. Whatever does not fit is a ConfigError that names file and field.

plan.json: layers[3].groups[1].heads[2].pattern.window: -5 in AShape. Allowed: a whole number from 1 to ...
"""

import re
from pathlib import Path
from typing import Any

import msgspec

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, KBoundary, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, Pattern, TriShape, VerticalSlash
from sglang_mm.patterns.plan import SCHEMA, Model, Plan

KINDS = {struct.__struct_config__.tag: struct for struct in (Dense, AShape, TriShape, VerticalSlash, Grid, Blocks)}
BOUNDARIES = {struct.__struct_config__.tag: struct for struct in (NoBoundary, KBoundary, QBoundary, Boundary2D)}
ADVICE = "mend the field, or write the file with sglang_mm.patterns.plan_file.save"


def load(path: str | Path) -> Plan:
    """Read and check a plan file. Raises ConfigError, naming the field, for whatever does not fit."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "a readable plan file", "check the path") from error
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}", "one whole JSON object", "write the file again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: {type(raw).__name__}", "a JSON object", "pass a plan file")
    if raw.get("schema") != SCHEMA:
        given = f"{path}: schema: {raw.get('schema')!r}"
        raise ConfigError(given, f"{SCHEMA}", "make the plan with this version of sglang_mm")
    try:
        return msgspec.convert(raw, Plan)
    except msgspec.ValidationError as error:
        raise _named(path, raw, error) from error


def save(plan: Plan, path: str | Path) -> Path:
    """Write a plan as indented JSON and return where. Raises ConfigError when the place cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(plan)) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "a place for a file", "check the path") from error
    return Path(path)


def read_model(folder: str | Path) -> Model:
    """The numbers of the checkpoint in `folder`. Raises ConfigError unless its config.json has them."""
    path = Path(folder) / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return Model.of_config(config, name=str(folder))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "a checkpoint's folder", "check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", "the config.json of a checkpoint", "check the path") from error


def _named(path: str | Path, raw: dict, error: msgspec.ValidationError) -> ConfigError:
    """The error with file and field in front. A check of ours starts with its field's name; msgspec's has a path."""
    message, _, place = str(error).partition(" - at `$")
    field, where = _resolve(raw, place.rstrip("`").removeprefix("."))
    if isinstance(error.__cause__, ConfigError):
        cause = error.__cause__
        given = f"{path}: {field}.{cause.given}" if field else f"{path}: {cause.given}"
        return ConfigError(given, cause.allowed, cause.remedy)
    given = f"{path}: {field}: {message}" if field else f"{path}: {message}"
    return ConfigError(given, _allowed(field, message, where), ADVICE)


def _resolve(raw: Any, field: str) -> tuple[str, Any]:
    """The field's path with the key of a mapping, which msgspec leaves out (`pairs[...]`), and what is there."""
    named = ""
    for name, index in re.findall(r"(\w[\w-]*)|\[(\d+|\.\.\.)\]", field):
        if index == "...":
            key = next(key for key, value in raw.items() if not _is_pattern(value))
            named, raw = f"{named}.{key}", raw[key]
        elif index:
            named, raw = f"{named}[{index}]", raw[int(index)]
        else:
            named, raw = f"{named}.{name}", raw.get(name)
    return named.removeprefix("."), raw


def _is_pattern(value: Any) -> bool:
    try:
        msgspec.convert(value, Pattern)
    except msgspec.ValidationError:
        return False
    return True


def _allowed(field: str, message: str, where: Any) -> str:
    """What the schema has at a field."""
    for tag, structs in (("kind", KINDS), ("boundary", BOUNDARIES)):
        if field.endswith(f".{tag}") or f"`{tag}`" in message:
            return " | ".join(structs)
    if isinstance(where, dict):
        struct = KINDS.get(str(where.get("kind"))) or BOUNDARIES.get(str(where.get("boundary")))
        if struct:
            return ", ".join((struct.__struct_config__.tag_field, *struct.__struct_fields__))
    return f"what schema {SCHEMA} has there"
