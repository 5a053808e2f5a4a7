"""What the parsers of commands have in common: arguments that many take, and types of numbers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """A command that calls `run`, whose docstring is its help."""
    text = (run.__doc__ or "").strip().rstrip(".")
    command = commands.add_parser(name, help=text[0].lower() + text[1:], description=text + ".")
    command.set_defaults(run_command=run)
    return command


def with_config(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """A config and overrides of it."""
    command.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?" if optional else None,
        help="a YAML file, a run's folder or a preset's name",
    )
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="lay over the config, such as train.steps=100"
    )


def with_run(command: argparse.ArgumentParser) -> None:
    """A run's folder, and which of its checkpoints."""
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    command.add_argument("--step", type=at_least(0), metavar="N", help="which checkpoint (default: the newest)")


def with_json(command: argparse.ArgumentParser) -> None:
    """The choice to print JSON."""
    command.add_argument("--json", action="store_true", help="print JSON")


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of integers that are `minimum` or more."""

    def integer(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return int(text)

    return integer


def above_zero(text: str) -> float:
    """The type of finite numbers above 0."""
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) or not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def fraction(text: str) -> float:
    """The type of numbers above 0 and at most 1."""
    if not re.fullmatch(r"\d*\.?\d+([eE][-+]?\d+)?", text) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return float(text)
