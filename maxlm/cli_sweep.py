"""The commands of `maxlm sweep`: each imports what it runs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maxlm.cli_parsers import above_zero, add_command, at_least, with_json
from maxlm.errors import ConfigError

# As maxlm.scaling.laws and frontier have them; here because the grammar must not import NumPy. A test compares.
LAW_NAMES = (
    "chinchilla", "approach1", "approach2", "kaplan-n", "kaplan-d", "kaplan-c", "kaplan-nd", "saturating",
    "over-training", "data-constrained", "moe", "learning-rate", "batch", "downstream",
)  # fmt: skip


def add_sweep(commands: Any) -> None:
    """The group `sweep` in the grammar of the command line."""
    sweep = commands.add_parser("sweep", help="scaling laws: budgets to runs, runs to laws, laws to the next model")
    group = sweep.add_subparsers(metavar="COMMAND", required=True)
    _add_ladder(group)
    _add_fit(group)


def plan(args: argparse.Namespace) -> None:
    """Prints the runs that a sweep would make: shapes, tokens, FLOPs, memory, time, cost, and what to mind."""
    from maxlm.scaling.sweep import plan as plan_sweep
    from maxlm.scaling.tables import print_plan

    print_plan(plan_sweep(args.spec), args.json)


def run(args: argparse.Namespace) -> None:
    """Trains the runs of a sweep, from wherever they are, into one table; or renders them for a scheduler."""
    if args.prepare:
        from maxlm.scaling.sweep import prepare

        prepare(args.spec)
        return
    if args.render is not None:
        _render(args)
        return
    from functools import partial

    from maxlm.scaling.sweep import run as run_sweep

    say = partial(print, flush=True)
    run_sweep(args.spec, jobs=args.jobs, only=args.only, parquet=args.parquet, say=say)


def _render(args: argparse.Namespace) -> None:
    from maxlm.scaling.slurm import render
    from maxlm.scaling.sweep import plan as plan_sweep

    _, folder = args.render
    options = tuple(args.sbatch)
    *_, submit = render(plan_sweep(args.spec), args.spec, Path(folder), at_once=args.jobs, options=options)
    print(f"wrote {submit}; submit the sweep with: {submit}")


def status(args: argparse.Namespace) -> None:
    """Says where the runs of a sweep are, and brings their table up to date."""
    from maxlm.scaling.collect import collect
    from maxlm.scaling.sweep import plan as plan_sweep
    from maxlm.scaling.tables import print_status, watch

    ladder = plan_sweep(args.spec)
    if args.watch:
        watch(lambda: collect(ladder, parquet=args.parquet))
        return
    print_status(collect(ladder, parquet=args.parquet), args.json)


def _add_ladder(commands: Any) -> None:
    command = add_command(commands, "plan", plan)
    _with_spec(command)
    with_json(command)

    command = add_command(commands, "run", run)
    _with_spec(command)
    command.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="runs at once (default: 1)")
    command.add_argument(
        "--only", type=at_least(0), action="append", default=[], metavar="K",
        help="the runs of task K alone, from 0; may be given several times",
    )  # fmt: skip
    command.add_argument("--parquet", action="store_true", help="write runs.parquet beside runs.csv")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--prepare", action="store_true", help="tokenizer, token store and configs alone; no run")
    what.add_argument(
        "--render", nargs=2, action=_Scheduler, metavar=("SCHEDULER", "DIR"),
        help="slurm DIR: write scripts for an array job, --jobs tasks at once, in place of running",
    )  # fmt: skip
    command.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="--render: an option of sbatch, such as --sbatch=--gpus=8; may be given several times",
    )  # fmt: skip

    command = add_command(commands, "status", status)
    _with_spec(command)
    command.add_argument("--watch", action="store_true", help="stay, and show it live")
    command.add_argument("--parquet", action="store_true", help="write runs.parquet beside runs.csv")
    with_json(command)


def _with_spec(command: argparse.ArgumentParser) -> None:
    command.add_argument("spec", metavar="SPEC", help="a sweep's YAML file, or the name of a packaged one")


class _Scheduler(argparse.Action):
    """Two words, the first of which is a scheduler that we render for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values[0] != "slurm":
            parser.error(f"--render {values[0]}: not a scheduler that scripts can be made for; slurm is")
        setattr(namespace, self.dest, values)


def fit(args: argparse.Namespace) -> None:
    """Fits a scaling law to a table of runs, with intervals, a back-test, and what is wrong with it in words."""
    from maxlm.console import print_json
    from maxlm.scaling.fitting import fit as run
    from maxlm.scaling.result import FitOptions
    from maxlm.scaling.show import print_fit, print_laws

    if args.laws:
        print_laws(args.json)
        return
    if args.table is None:
        raise ConfigError("no table: give a CSV or Parquet file or a sweep's folder, or --laws")
    options = FitOptions(
        loss=args.loss,
        delta=args.delta,
        resamples=args.resamples,
        seed=args.seed,
        budgets=tuple(args.budget),
    )
    result = run(args.table, args.law, options, columns=dict(args.column))
    if args.json:
        print_json(result.to_dict())
    else:
        print_fit(result)


def _add_fit(commands: Any) -> None:
    command = add_command(commands, "fit", fit)
    command.add_argument("table", type=Path, nargs="?", metavar="TABLE", help="CSV, Parquet, or a sweep's folder")
    command.add_argument(
        "--law", choices=list(LAW_NAMES), default="chinchilla", metavar="NAME",
        help=f"which law (default: chinchilla): {', '.join(LAW_NAMES)}",
    )  # fmt: skip
    command.add_argument("--laws", action="store_true", help="list the laws: equation, source, columns")
    command.add_argument(
        "--loss", choices=["huber", "lad", "squared"], default="huber", help="of the residuals (default: huber)"
    )
    command.add_argument(
        "--delta", type=above_zero, metavar="X", help="where huber turns linear (default: the law's; 1e-3 of log loss)"
    )
    command.add_argument(
        "--resamples", type=at_least(0), default=2000, metavar="N", help="of the bootstrap (default: 2000; 0: none)"
    )
    command.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the bootstrap (default: 0)")
    command.add_argument(
        "--budget", type=above_zero, action="append", default=[], metavar="FLOPS",
        help="say the best size and tokens for these FLOPs; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--column", type=_renamed, action="append", default=[], metavar="NAME=THEIRS",
        help="which column of the table is which of ours, such as n_params=Size",
    )  # fmt: skip
    with_json(command)


def _renamed(text: str) -> tuple[str, str]:
    name, equals, theirs = text.partition("=")
    if not (name and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=THEIRS, such as n_params=Size")
    return name, theirs
