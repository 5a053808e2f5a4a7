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
    _add_fit(group)
    _add_report(group)


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


def report(args: argparse.Namespace) -> None:
    """Writes a page about a table of runs: what was run, what the laws say of the next model, whether to believe it."""
    from maxlm.console import print_json
    from maxlm.scaling.captions import the_next_model, trust, what_was_run
    from maxlm.scaling.reporting import report as write
    from maxlm.scaling.result import FitOptions

    options = FitOptions(resamples=args.resamples, seed=args.seed, budgets=tuple(args.budget))
    written = write(args.table, args.out, options, columns=dict(args.column))
    if args.json:
        fits = {law: result.to_dict() for law, result in written.study.fits.items()}
        pictures = [str(path) for path in written.pictures]
        print_json({"page": str(written.page), "pictures": pictures, "fits": fits, "refused": written.study.refused})
        return
    for say in (what_was_run, the_next_model, trust):
        if text := say(written.study):
            print(f"{text}\n")
    print(f"{written.page}, and {len(written.pictures)} pictures beside it")


def _add_report(commands: Any) -> None:
    command = add_command(commands, "report", report)
    command.add_argument("table", type=Path, metavar="TABLE_OR_SWEEP", help="CSV, Parquet, or a sweep's folder")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where to (default: report in a sweep's folder, NAME-report by a table)"
    )
    command.add_argument(
        "--resamples", type=at_least(0), default=2000, metavar="N", help="of the bootstrap (default: 2000; 0: none)"
    )
    command.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the bootstrap (default: 0)")
    command.add_argument(
        "--budget", type=above_zero, action="append", default=[], metavar="FLOPS",
        help="of the next model (default: the largest run's, and 10 times that); may be given several times",
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
