"""Config files as trees whose every key remembers where it was written: YAML, `extends`, overrides, presets.

This is the mechanism; `config.py` says what a config is.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maxlm.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50

KeyPath = tuple[str | int, ...]

# YAML 1.2's core schema. PyYAML's own is YAML 1.1's: there 3e-4 is text, `no` is false, 010 is 8 and 10:30 is 630.
_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _name, _pattern, _first_characters in _CORE_SCHEMA:
    for _character in _first_characters:
        _RESOLVERS.setdefault("" if _character == "\0" else _character, []).append(
            (_TAG + _name, re.compile(f"^(?:{_pattern})$"))
        )

_LARGEST_EXACT_FLOAT = 2.0**53


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars, without aliases (`extends` does what they are for)."""

    yaml_implicit_resolvers = _RESOLVERS

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; use `extends`", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A float, or the integer that it stands for: `steps: 1e5` is 100000."""
        value = self.construct_yaml_float(node)
        whole = "e" in node.value.lower() and value.is_integer() and abs(value) < _LARGEST_EXACT_FLOAT
        return int(value) if whole else value


_Loader.add_constructor(_TAG + "float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as it was: text that looks like a number of YAML 1.2 is quoted."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, items: list) -> yaml.Node:
    flow = all(not isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence(_TAG + "seq", items, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


@dataclass
class Tree:
    """Nested dicts and lists of plain values, and for every path in them where it was written."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str | None:
        """Where the value at `path` was written, or the nearest thing that holds it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def merged_with(self, top: Tree) -> Tree:
        """This tree with `top` laid over it: dicts are merged, anything else is replaced."""
        data = _merge(self.data, top.data)
        return Tree(data, {path: o for path, o in self.origins.items() if _holds(data, path)} | top.origins)


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def has(data: Any, part: str | int) -> bool:
    """Whether `data[part]` is there: a key of a dict or a number of a list."""
    return part in range(len(data)) if isinstance(data, list) else isinstance(data, dict) and part in data


def _holds(data: Any, path: KeyPath) -> bool:
    for part in path:
        if not has(data, part):
            return False
        data = data[part]
    return True


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as a tree: the inverse of flattening."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree


def extended_as(parent: Path, path: Path) -> str:
    """What `extends` finds `parent` by from the file `path`: a preset's name, or the way from its folder."""
    if parent.resolve().parent == presets_folder().resolve() and not (path.parent / parent.stem).exists():
        return parent.stem
    return os.path.relpath(parent.resolve(), path.parent.resolve())


def dump(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def parse(text: str, source: str, *, lines: bool = True) -> Tree:
    """Reads YAML whose top level is a mapping. `source` names it in errors and origins, with the line if `lines`.

    Raises ConfigError on bad syntax, keys given twice, aliases, and tags that are not plain data.
    """
    builder = _Builder(source, lines)
    data = builder.read(text)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: holds {_kind(data)}; a config is a mapping of sections, such as `model:`")
    return Tree(data, builder.origins)


def apply_override(tree: Tree, text: str) -> Tree:
    """`tree` with `a.b=c` laid over it, whose value is YAML. Raises ConfigError.

    A part that is a number reaches into a list: `data.sources.0.weight=2`.
    """
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override `{text}`: not of the form key=value, such as `train.steps=100`")
    builder = _Builder(f"override `{text}`", lines=False)
    new = builder.read(value)
    origins = dict(tree.origins)

    def lay(below: Any, path: KeyPath, rest: list[str]) -> Any:
        if not rest:
            origins.update({path + inner: origin for inner, origin in builder.origins.items()})
            origins[path] = builder.source
            return _merge(below, new)
        part, *rest = rest
        if isinstance(below, list):
            index = int(part) if part.isdecimal() else len(below)
            if index >= len(below):
                raise ConfigError(
                    f"{builder.source}: `{dotted(path)}` is a list of {len(below)}, counted from 0, without a `{part}`"
                )
            return [*below[:index], lay(below[index], (*path, index), rest), *below[index + 1 :]]
        if below is not None and not isinstance(below, dict):
            origins[path], below = builder.source, {}
        origins.setdefault((*path, part), builder.source)
        below = below or {}
        return below | {part: lay(below.get(part), (*path, part), rest)}

    return Tree(lay(tree.data, (), parts), origins)


class _Builder:
    """Turns YAML's nodes into plain data, noting where each key stands."""

    def __init__(self, source: str, lines: bool):
        self.source, self.lines = source, lines
        self.origins: dict[KeyPath, str] = {}

    def read(self, text: str) -> Any:
        try:
            loader = _Loader(text)
            try:
                node = loader.get_single_node()
                return None if node is None else self._build(loader, node, ())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            raise ConfigError(f"{self._at(mark)}: not YAML: {problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.source}: not YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ConfigError(f"{self.source}: nested too deep; at most {MAX_DEPTH} levels are read") from None

    def _at(self, mark: yaml.Mark | None) -> str:
        return f"{self.source}:{mark.line + 1}" if self.lines and mark is not None else self.source

    def _build(self, loader: _Loader, node: yaml.Node, path: KeyPath) -> Any:
        where = self._at(node.start_mark)
        self.origins.setdefault(path, where)
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{where}: nested too deep; at most {MAX_DEPTH} levels are read")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._build_mapping(loader, node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._build(loader, item, (*path, i)) for i, item in enumerate(node.value)]
        if node.tag not in {_TAG + name for name in ("str", "int", "float", "bool", "null")}:
            raise ConfigError(f"{where}: {node.tag.replace(_TAG, '!!')} is not plain data; take the tag away")
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError):
            raise ConfigError(f"{where}: {node.value!r} is no {node.tag.replace(_TAG, '!!')}") from None

    def _build_mapping(self, loader: _Loader, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self._at(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key is a word, not a list or a mapping")
            here = (*path, key_node.value)
            if key_node.value in data:
                raise ConfigError(f"{where}: `{dotted(here)}` is given twice, first at {self.origins[here]}; keep one")
            self.origins[here] = where
            data[key_node.value] = self._build(loader, value_node, here)
        return data


def presets_folder() -> Path:
    """The folder of presets: inside an installed package, or at the top of a source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """The names that `maxlm train NAME` knows, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def find(path_or_preset: str | Path) -> Path:
    """The file of a config: a path, a run folder (its config.yaml), or a preset's name. Raises ConfigError."""
    text = str(path_or_preset)
    path = Path(text)
    if path.is_file():
        return path
    preset = presets_folder() / f"{text}.yaml"
    if "/" not in text and preset.is_file():
        return preset
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    what = "a folder without a config.yaml" if path.is_dir() else "not a file"
    near = difflib.get_close_matches(path.stem, preset_names(), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
        if near
        else f"they are {', '.join(preset_names())}"
    )
    raise ConfigError(f"{text}: {what}, and no preset has this name; {hint}")


def read_tree(path: Path, children: tuple[Path, ...] = ()) -> Tree:
    """Reads a config file over the one that it `extends`. Raises ConfigError, also where files extend in a circle."""
    tree = parse(_read_text(path), _shown(path))
    if "extends" not in tree.data:
        return tree
    parent = tree.data.pop("extends")
    where = tree.origins.pop(("extends",))
    if not isinstance(parent, str) or not parent:
        raise ConfigError(f"{where}: extends = {parent!r}: must be the name of a file or of a preset")
    beside = path.parent / parent
    try:
        parent_path = beside if beside.is_file() else find(parent)
    except ConfigError as error:
        raise ConfigError(f"{where}: extends: {error}") from None
    children = (*children, path.resolve())
    if parent_path.resolve() in children:
        circle = " -> ".join(p.name for p in (*children, parent_path))
        raise ConfigError(f"{where}: extends: files extend each other in a circle: {circle}")
    return read_tree(parent_path, children).merged_with(tree)


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes is too large for a config; at most {MAX_BYTES:,} are read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _shown(path: Path) -> str:
    """The path as it is shortest to say: from the working folder where it lies below it."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


def dotted(path: KeyPath) -> str:
    """A path as it is written in an override: `data.sources.0.weight`."""
    return ".".join(str(part) for part in path)


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}[type(value)]
