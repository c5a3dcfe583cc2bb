"""YAML files read into typed records, with errors that name the file, the line, the rule and the value."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from hwnas.errors import InputError

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _key(location: tuple[int | str, ...]) -> str:
    """`("stages", 2, "kernel")` as a person writes it: `stages[2].kernel`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def check(kind: type[T], value: object, *, source: str, lines: dict[str, int] | None = None) -> T:
    """Build `kind` (a dataclass or pydantic model) from plain dicts, lists and scalars.

    Args:
        kind: the record's class.
        value: what a YAML or JSON file held.
        source: the file's name, for messages.
        lines: line numbers by key, as `read_yaml` finds them.

    Raises:
        InputError: one line with file, line, key, rule and value of the first mistake.
    """
    try:
        made: T = _adapter(cast(Any, kind)).validate_python(value)
        return made
    except ValidationError as error:
        # A misspelled key first: it explains the missing one.
        unknown = ("unexpected_keyword_argument", "extra_forbidden")
        first = min(error.errors(include_url=False), key=lambda e: e["type"] not in unknown)
        location = first["loc"]
        rule = first["msg"].removeprefix("Value error, ")
        if first["type"] in unknown:
            rule = f"is not a known key here: remove it or correct its spelling (value {first['input']!r})"
        elif first["type"] in ("missing", "missing_argument"):
            rule = "is missing: add it"
        elif first["type"] != "value_error":
            rule = f"{rule[0].lower()}{rule[1:]}, not {first['input']!r}"
        key = _key(location)
        # A missing key, or an element that a check of the whole record names, has its parent's line.
        line = None
        for end in range(len(location), -1, -1):
            line = line or (lines or {}).get(_key(location[:end]))
        where = source if line is None else f"{source}:{line}"
        raise InputError(f"{where}: {key}{': ' if key else ''}{rule}") from None


def put(record: dict[str, Any], key: str, value: object) -> None:
    """Set a value by its dotted key: `put(record, "biggest.dropout", 0.3)`.

    Raises:
        InputError: what stands before a dot is a single value.
    """
    *path, leaf = key.split(".")
    for step in path:
        record = record.setdefault(step, {})
        if not isinstance(record, dict):
            raise InputError(f"{key}: {step} is a single value, it has no {leaf!r}")
    record[leaf] = value


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """The content of a YAML file, and the line of each of its keys (`stages[2].kernel` -> 14).

    Raises:
        InputError: the file is missing, is not YAML, or writes one key twice.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    lines: dict[str, int] = {}
    if node is None:
        raise InputError(f"{path}: is empty")

    def visit(node: yaml.Node, location: tuple[int | str, ...]) -> None:
        lines.setdefault(_key(location), node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                visit(child, (*location, index))
        elif isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                name = _key((*location, str(key.value)))
                if name in lines:
                    raise InputError(f"{path}:{key.start_mark.line + 1}: {name} is written twice: remove one")
                lines[name] = key.start_mark.line + 1
                visit(child, (*location, str(key.value)))

    visit(node, ())
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")), lines
    except yaml.YAMLError as error:  # values that compose but cannot be constructed, such as !!python tags
        raise InputError(f"{path}: not plain YAML: {str(error).splitlines()[0]}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
