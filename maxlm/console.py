"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from typing import Any


def print_json(value: Any) -> None:
    """Prints plain data as JSON; a number that is not finite is null."""
    from pydantic_core import to_json

    print(to_json(value, indent=2, inf_nan_mode="null").decode())


def print_table(rows: list[dict[str, Any]], json_wanted: bool, *, as_json: Any = None) -> None:
    """Prints rows as a table, or as JSON: the rows, or `as_json` where that says it better."""
    if json_wanted:
        print_json(rows if as_json is None else as_json)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def cell(value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")
