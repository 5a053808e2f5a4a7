"""A sweep on the console: its grid, and where its runs are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from maxlm.console import print_json, print_table
from maxlm.planning.hardware import GIB
from maxlm.scaling.collect import Progress
from maxlm.scaling.ladder import Ladder, PlannedRun
from maxlm.training.progress import short_number, short_time

REFRESH_SECONDS = 2.0


def print_plan(ladder: Ladder, json_wanted: bool) -> None:
    """Prints the grid, what it takes altogether, and what there is to say against it."""
    if json_wanted:
        print_json(plan_dict(ladder))
        return
    rows = [plan_row(run) for run in ladder.runs]
    if any(run.trunk for run in ladder.runs):
        rows = [row | {"begins at": run.begins} for row, run in zip(rows, ladder.runs, strict=True)]
    print_table(rows, False)
    totals = plan_dict(ladder)["totals"]
    words = [f"{len(ladder.runs)} runs", f"{short_number(totals['n_tokens'])} tokens", f"{totals['flops']:.4g} FLOPs"]
    if totals["seconds"] is not None:
        words.append(f"{short_time(totals['seconds'])} on {hardware_name(ladder)}")
    if totals["cost"] is not None:
        words.append(f"cost {totals['cost']:,.2f}")
    print("\n" + ", ".join(words))
    for reason in ladder.left_out:
        print(f"left out: {reason}")
    for warning in ladder.warnings:
        print(f"warning: {warning}")


def plan_dict(ladder: Ladder) -> dict[str, Any]:
    """The grid as plain data: `runs`, `totals` (of the steps that are made, those of a trunk once), `warnings`."""
    hardware = ladder.sweep.spec.hardware
    seconds = [run.seconds for run in ladder.runs if run.seconds is not None]
    costs = [run.cost for run in ladder.runs if run.cost is not None]
    return {
        "name": ladder.sweep.spec.name,
        "folder": str(ladder.sweep.folder),
        "runs": [run.to_dict() for run in ladder.runs],
        "totals": {
            "n_tokens": sum(round(run.tokens * run.share) for run in ladder.runs),
            "flops": sum(run.flops * run.share for run in ladder.runs),
            "seconds": sum(seconds) / (hardware.concurrent if hardware else 1) if seconds else None,
            "cost": sum(costs) if costs else None,
        },
        "left_out": list(ladder.left_out),
        "warnings": list(ladder.warnings),
    }


def hardware_name(ladder: Ladder) -> str:
    """The hardware that time is told of."""
    hardware = ladder.sweep.spec.hardware
    assert hardware is not None
    where = hardware.topology or f"a machine of {(hardware.flops_per_second or 0) / 1e9:,.3g} GFLOP/s a run"
    slices = f"{hardware.slices} slices of " if hardware.slices > 1 else ""
    return f"{slices}{where}" + (f", {hardware.concurrent} runs at once" if hardware.concurrent > 1 else "")


def plan_row(run: PlannedRun) -> dict[str, Any]:
    """A run of the grid as it is printed: figures short enough for a line."""
    model, config = run.config.model, run.config
    row: dict[str, Any] = {
        "run": run.name,
        "heads": f"{model.n_heads}/{model.kv_heads}" if model.kv_heads != model.n_heads else str(model.n_heads),
        "d_ff": str(model.d_ff),
        "params": short_number(run.count.total),
        "non-emb.": short_number(run.count.non_embedding),
        "tokens": short_number(run.tokens),
        "D/N": short_number(run.tokens_per_parameter),
        "steps": run.steps,
        "batch": config.train.global_batch_tokens,
        "lr": f"{config.optimizer.learning_rate:.3g}",
        "FLOPs": f"{run.flops:.4g}",
        "off": f"{100 * (run.flops / run.budget - 1):+.2f}%" if run.budget else "",
        "GiB": f"{run.memory_bytes / GIB:.2f}" if run.memory_bytes is not None else "",
    }
    if run.seconds is not None:
        row["time"] = short_time(run.seconds)
    if run.cost is not None:
        row["cost"] = f"{run.cost:,.2f}"
    return row


def status_row(state: Progress) -> dict[str, Any]:
    """A run's state as it is printed."""
    loss = state.loss if state.loss is not None else state.train_loss
    return {
        "run": state.run,
        "state": state.state,
        "step": f"{state.step:,}/{state.steps:,}",
        "loss": "" if loss is None else f"{loss:.4f}" + ("" if state.loss is not None else " (train)"),
        "tokens/s": "" if state.tokens_per_second is None else short_number(state.tokens_per_second),
        "left": "" if state.seconds_left is None else short_time(state.seconds_left),
        "note": state.note,
    }


def print_status(found: Sequence[Progress], json_wanted: bool) -> None:
    """Prints where the runs are."""
    print_table([status_row(state) for state in found], json_wanted, as_json=[state.to_dict() for state in found])
    if not json_wanted:
        print(counted(found))


def counted(found: Sequence[Progress]) -> str:
    """`12 done, 2 running, 6 waiting`."""
    names = dict.fromkeys(state.state for state in found)
    return ", ".join(f"{sum(each.state == name for each in found)} {name}" for name in names)


def watch(look: Callable[[], Sequence[Progress]]) -> None:
    """Shows the table live until every run has ended, or the user has seen enough (Ctrl-C)."""
    from rich import box
    from rich.live import Live
    from rich.table import Table

    def table(found: Sequence[Progress]) -> Table:
        colours = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "waiting": "dim"}
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, caption=counted(found), caption_justify="left")
        rows = [status_row(state) for state in found]
        for name in rows[0] if rows else ():
            shown.add_column(name, justify="right" if name in ("step", "loss", "tokens/s", "left") else "left")
        for state, row in zip(found, rows, strict=True):
            shown.add_row(*row.values(), style=colours[state.state])
        return shown

    found = look()
    try:
        with Live(table(found), refresh_per_second=4) as live:
            while not all(state.ended or state.state == "failed" for state in found):
                time.sleep(REFRESH_SECONDS)
                found = look()
                live.update(table(found))
    except KeyboardInterrupt:
        return
