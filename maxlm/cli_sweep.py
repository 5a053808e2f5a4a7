"""The commands of `maxlm sweep`: each imports what it runs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maxlm.cli_parsers import above_zero, add_command, at_least, with_config, with_json
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
    _add_coordinates(group)


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


def coordinates(args: argparse.Namespace) -> None:
    """Checks that what a model computes changes alike at all widths (or depths), with model.transfer and without."""
    from maxlm.config import load_config
    from maxlm.scaling.coordinates import coordinate_check, language, print_check, store_batches
    from maxlm.scaling.coordinates_figure import draw_check

    config, along = load_config(args.config, args.overrides), "depth" if args.depths else "width"
    sizes = args.depths or args.widths or (64, 128, 256, 512)
    batches = (store_batches if args.store else language)(config, args.steps)
    check = coordinate_check(config, sizes, batches, along=along)
    if args.png is not None:
        draw_check(check, args.png)
    print_check(check, args.json)
    if args.png is not None and not args.json:
        print(f"wrote {args.png}")


def _add_coordinates(commands: Any) -> None:
    command = add_command(commands, "coordinates", coordinates)
    with_config(command)
    sizes = command.add_mutually_exclusive_group()
    sizes.add_argument("--widths", type=_sizes, metavar="N,N,...", help="values of d_model (default: 64,128,256,512)")
    sizes.add_argument("--depths", type=_sizes, metavar="N,N,...", help="values of n_layers, in place of widths")
    command.add_argument("--steps", type=at_least(1), default=10, metavar="N", help="of training (default: 10)")
    command.add_argument(
        "--store", action="store_true", help="train on the config's token store (default: on a made-up language)"
    )
    command.add_argument("--png", type=Path, metavar="FILE", help="draw the changes over the sizes")
    with_json(command)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(at_least(1)(part.strip()) for part in text.split(","))


def _renamed(text: str) -> tuple[str, str]:
    name, equals, theirs = text.partition("=")
    if not (name and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=THEIRS, such as n_params=Size")
    return name, theirs
