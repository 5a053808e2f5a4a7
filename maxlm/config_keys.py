"""The keys of a section class: listing them, naming near misses, and saying what is wrong with a value and where."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from maxlm.config_file import KeyPath, Tree, dotted, has
from maxlm.errors import ConfigError
from maxlm.section import Section

S = TypeVar("S", bound=Section)

# Errors of the value's type, as against its size: the expected type is added to these.
_TYPE_ERRORS = ("_type", "_parsing", "_from_float")


@dataclass(frozen=True)
class KeyRow:
    """A key of the config as `maxlm config --help-keys` shows it. In `key`, `*` stands for a number in a list."""

    key: str
    type: str
    default: Any
    """the default as plain data; where `required`, None"""
    required: bool
    unit: str | None
    meaning: str
    section: bool
    """whether the key holds other keys"""


def walk(cls: type[Section], prefix: KeyPath = ()) -> Iterator[KeyRow]:
    """Every key of a section class and of the sections in it, as they are declared, a section before its keys."""
    for name, info in cls.model_fields.items():
        path = (*prefix, name)
        inner = list(sections_in(info.annotation))
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        unit = extra.get("unit")
        yield KeyRow(
            key=dotted(path),
            type=type_name(info.annotation),
            default=None if info.is_required() else plain(info.get_default(call_default_factory=True)),
            required=info.is_required() and not inner,
            unit=None if unit is None else str(unit),
            meaning=info.description or "",
            section=bool(inner),
        )
        for step, section in inner:
            yield from walk(section, (*path, *step))


def sections_in(annotation: Any) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """The section classes that an annotation holds, with the steps that lead to them: none, or `*` through a list."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield (), annotation
    elif origin is Annotated:
        yield from sections_in(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for arm in get_args(annotation):
            yield from sections_in(arm)
    elif origin in (list, tuple, dict):
        for steps, section in sections_in(get_args(annotation)[1 if origin is dict else 0]):
            yield ("*", *steps), section


def type_name(annotation: Any) -> str:
    """A type as a user would say it: `integer`, `text or null`, `cosine | linear`, `list of text`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, UnionType):
        names = [type_name(arg) for arg in args if arg is not NoneType]
        return " or ".join([*names, "null"] if NoneType in args else names)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping to {type_name(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(annotation, str(annotation))


def plain(value: Any) -> Any:
    """A default as the plain data that stands for it in YAML."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def flatten(section: Section) -> dict[str, Any]:
    """Every leaf of a section as plain data by dotted key. Lists are leaves."""
    return flatten_plain(type(section), section.model_dump(mode="json"))


def flatten_plain(cls: type[Section], data: dict[str, Any], prefix: KeyPath = ()) -> dict[str, Any]:
    """As `flatten`, for the plain data of a section, which may have keys that the class has no more."""
    leaves: dict[str, Any] = {}
    for name, value in data.items():
        inner = dict(sections_in(cls.model_fields[name].annotation)) if name in cls.model_fields else {}
        if () in inner and isinstance(value, dict):
            leaves |= flatten_plain(inner[()], value, (*prefix, name))
        else:
            leaves[dotted((*prefix, name))] = value
    return leaves


def near(cls: type[Section], key: str) -> str | None:
    """The valid key that a user most likely meant by an unknown one, or None."""
    known = [row.key for row in walk(cls)]
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", key)
    section, _, name = re.sub(r"(?<=\.)\d+(?=\.)", "*", key).rpartition(".")
    beside = [k for k in known if k.rpartition(".")[0] == section]
    candidates = (
        [k for k in beside if k.rpartition(".")[2] in _close(name, beside)],
        difflib.get_close_matches(key, [k for k in known if k.rpartition(".")[2] == name], n=1, cutoff=0.0),
        [k for k in known if k.rpartition(".")[2] in _close(name, known)],
    )
    best = next((found[0] for found in candidates if found), "")
    for number in numbers:
        best = best.replace("*", number, 1)
    return best or None


def _close(name: str, keys: list[str]) -> list[str]:
    """The last part of a key that is nearest to `name`, if any is near."""
    return difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], n=1, cutoff=0.7)


def validate(cls: type[S], tree: Tree, source: str) -> S:
    """The section that a tree says. Types are strict: a number in quotes is text, and `true` is no integer.

    Raises ConfigError that lists everything wrong: the key, the value, what was expected, and where it was written.
    """
    try:
        return cls.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as error:
        problems: dict[tuple[str, str], list[str]] = {}
        for details in error.errors(include_url=False):
            for place, key, what in _explain_error(cls, tree, source, details):
                problems.setdefault((place, key), []).append(what)
    lines = [f"{place}: {key}{' or '.join(dict.fromkeys(whats))}" for (place, key), whats in problems.items()]
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError(f"{len(lines)} settings are wrong\n" + "\n".join(f"  {line}" for line in lines))


def _explain_error(
    cls: type[Section], tree: Tree, source: str, details: ErrorDetails
) -> Iterator[tuple[str, str, str]]:
    kind, value = details["type"], details["input"]
    path = _path_in(tree.data, details["loc"], missing=kind == "missing")
    name = dotted(path)
    where = tree.origin(path) or source
    info = _field(cls, path)
    if kind == "extra_forbidden":
        hint = near(cls, name)
        if hint == name:
            yield where, "", f"unknown key `{name}` with dots in it; write it as nested mappings"
            return
        section = f" {path[0]}" if len(path) > 1 else ""
        help_keys = f"`maxlm config --help-keys{section}` lists the keys"
        yield where, "", f"unknown key `{name}`; " + (f"did you mean `{hint}`?" if hint else help_keys)
    elif kind == "missing":
        meaning = f" ({info.description})" if info and info.description else ""
        yield where, "", f"`{name}` must be given{meaning}"
    elif kind == "value_error":
        for message in details["msg"].removeprefix("Value error, ").splitlines():
            yield _where_mentioned(tree, path, message) or where, "", f"{name}: {message}" if name else message
    else:
        what = details["msg"].replace("Input should", "must")
        if info and kind.endswith(_TYPE_ERRORS):
            what = f"expected {type_name(info.annotation)}"
        elif kind == "literal_error" and isinstance(value, str):
            close = difflib.get_close_matches(value, re.findall(r"'([^']*)'", what), n=1)
            what += f"; did you mean `{close[0]}`?" if close else ""
        yield where, f"{name} = {_shown(value)}: ", what


def _path_in(data: Any, loc: tuple[str | int, ...], *, missing: bool) -> KeyPath:
    """Pydantic's location without what is not in the data, such as the arms of unions."""
    path: KeyPath = ()
    for i, part in enumerate(loc):
        if has(data, part):
            data = data[part]
            path = (*path, part)
        elif missing and i == len(loc) - 1:
            path = (*path, part)
    return path


def _field(cls: type[Section], path: KeyPath) -> FieldInfo | None:
    """The declaration of the key at `path`; of the list or mapping, for an item of one."""
    info = None
    classes: list[type[Section]] = [cls]
    for part in path:
        holders = [c for c in classes if part in c.model_fields]
        if holders:
            info = holders[0].model_fields[str(part)]
            classes = [section for _, section in sections_in(info.annotation)]
    return info


def _where_mentioned(tree: Tree, path: KeyPath, message: str) -> str | None:
    """The places of the keys that a message names, each dotted in full or relative to `path`."""
    places: dict[str, None] = {}
    for word in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", message):
        for candidate in (tuple(word.split(".")), (*path, *word.split("."))):
            if (place := tree.origins.get(candidate)) and len(candidate) > max(1, len(path)):
                places[place] = None
    return ", ".join(places) or None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
