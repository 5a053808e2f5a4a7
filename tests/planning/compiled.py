"""The compiled programs under tests/planning/hlo, read once; how they were made is in make.py beside them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from maxlm.planning.hlo import Module, parse

FOLDER = Path(__file__).parent / "hlo"
FIXTURES: dict[str, dict[str, Any]] = json.loads((FOLDER / "fixtures.json").read_text())


def text(name: str) -> str:
    return gzip.decompress((FOLDER / f"{name}.hlo.gz").read_bytes()).decode()


@cache
def module(name: str) -> Module:
    return parse(text(name))
