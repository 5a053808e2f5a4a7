"""Compilations kept between plans: a folder of JSON files, one for each program that was compiled.

A plan of a large model compiles for minutes, a search does so several times; what the compiler said is kept, so that a
search that was interrupted goes on where it stopped. The name of a file is the hash of everything that its content
depends on (`key`), so an entry is right or absent and nothing ever has to be invalidated. Entries are written whole or
not at all, with a checksum: one that is damaged is as good as absent, and is made again. Processes may share the
folder, and anyone may delete it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maxlm import __version__
from maxlm.errors import StorageError
from maxlm.files import write_atomically

# What an entry holds, and how it is made from the compiler's text: raise it with every change of the analysis (hlo,
# census, buffers, compile), and all entries are made anew.
SCHEMA = 3

# Variables that change what the compilers make.
COMPILER_VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")


def folder() -> Path:
    """Where entries lie: `$MAXLM_CACHE/plans`, or ~/.cache/maxlm/plans where the variable is not set."""
    root = os.environ.get("MAXLM_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "maxlm") / "plans"


def key(program: str, options: Mapping[str, Any], topology: str, versions: Mapping[str, str | None]) -> str:
    """The name of a compilation: a hash of the program and of all that decides what comes of it.

    Args:
        program: the lowered program's text (StableHLO) without locations, which move with every edit, or its hash.
        options: the compiler's options.
        topology: the devices that it is compiled for, slices included.
        versions: of jax and of the compiler.

    The same in every process; also of the version of maxlm, of `SCHEMA` and of the compilers' variables.
    """
    parts = {
        "maxlm": __version__,
        "schema": SCHEMA,
        "program": hashlib.sha256(program.encode()).hexdigest(),
        "options": dict(options),
        "topology": topology,
        "versions": dict(versions),
        "environment": {name: os.environ.get(name, "") for name in COMPILER_VARIABLES},
    }
    return hashlib.sha256(_text(parts).encode()).hexdigest()


def load(name: str) -> Any | None:
    """The value kept under a key, or None where there is none that can be trusted."""
    try:
        entry = json.loads(_path(name).read_bytes())
        value, checksum = entry["value"], entry["sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return value if checksum == _checksum(name, value) else None


def store(name: str, value: Any) -> None:
    """Keeps a value (plain data, as JSON has it) under a key, in place of any before. Raises StorageError."""
    write_atomically(_path(name), _text({"sha256": _checksum(name, value), "value": value}))


def remember(name: str, make: Callable[[], Any]) -> Any:
    """The value kept under a key; where there is none, what `make` returns, which is kept.

    The value is as JSON gives it back, whether it was made or read: tuples are lists. Where it cannot be kept (a full
    disk, a folder that may not be written) that is said on standard error, and the value returned.
    """
    value = load(name)
    if value is None:
        value = json.loads(_text(make()))
        try:
            store(name, value)
        except StorageError as error:
            print(f"note: the compilation is not kept: {error}; MAXLM_CACHE names another folder", file=sys.stderr)
    return value


def _path(name: str) -> Path:
    return folder() / f"{name}.json"


def _checksum(name: str, value: Any) -> str:
    """With the name in it: a file that was copied or renamed is not another compilation's."""
    return hashlib.sha256(f"{name} {_text(value)}".encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
