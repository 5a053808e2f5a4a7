"""The commands of `maxlm sweep`: each imports what it runs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from maxlm.cli_parsers import above_zero, add_command, at_least, fraction, with_config, with_json
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
    _add_optimum(group)
    _add_report(group)
    _add_coordinates(group)


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
        "--budget", type=above_zero, action="append", default=[], metavar="FLOPS",
        help="say the best size and tokens for these FLOPs; may be given several times",
    )  # fmt: skip
    _with_fit(command)
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
        "--budget", type=above_zero, action="append", default=[], metavar="FLOPS",
        help="of the next model (default: the largest run's, and 10 times that); may be given several times",
    )  # fmt: skip
    _with_fit(command)
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


def _with_fit(command: argparse.ArgumentParser) -> None:
    """How a table is read and how its fit is resampled."""
    command.add_argument(
        "--resamples", type=at_least(0), default=2000, metavar="N", help="of the bootstrap (default: 2000; 0: none)"
    )
    command.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the bootstrap (default: 0)")
    command.add_argument(
        "--column", type=_renamed, action="append", default=[], metavar="NAME=THEIRS",
        help="which column of the table is which of ours, such as n_params=Size",
    )  # fmt: skip


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(at_least(1)(part.strip()) for part in text.split(","))


def _renamed(text: str) -> tuple[str, str]:
    name, equals, theirs = text.partition("=")
    if not (name and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=THEIRS, such as n_params=Size")
    return name, theirs


# As maxlm.scaling.optimum has them, for the same reason as LAW_NAMES.
OPTIMUM_LAW_NAMES = ("chinchilla", "over-training", "kaplan-nd", "data-constrained", "approach1", "approach2")


def optimum(args: argparse.Namespace) -> None:
    """Says which model to train for a FLOP budget, by a law fitted to a table of runs, and writes its config."""
    from maxlm.console import print_json
    from maxlm.errors import DataError
    from maxlm.scaling.optimum import Question
    from maxlm.scaling.optimum import optimum as run
    from maxlm.scaling.result import FitOptions
    from maxlm.scaling.show_optimum import print_answer

    table, base = args.table, args.config
    if table.suffix in (".yaml", ".yml"):
        from maxlm.scaling.spec import load_sweep

        base = base or (str(table) if args.out or args.topology else None)
        table = load_sweep(table).folder
    if args.out and base is None:
        raise ConfigError("--out needs --config BASE, whose family the model is of: a config or a specification")
    hardware, flops, reasons = _budget(args, base)
    question = Question(
        flops=flops, served_tokens=args.served_tokens or 0.0, same_loss=args.same_loss, max_tokens=args.max_tokens,
        unique_tokens=args.unique_tokens, max_params=args.max_params, reasons=reasons,
    )  # fmt: skip
    options = FitOptions(resamples=args.resamples, seed=args.seed)
    columns = dict(args.column)
    found = run(table, question, args.law, options, columns=columns, base=base, hardware=hardware)
    if args.json:
        print_json(found.to_dict())
    else:
        print_answer(found)
    if args.out is None:
        return
    if not found.fit.trusted and not args.force:
        raise DataError(
            f"{args.out}: not written, since the fit is not to be trusted. Mend what its warnings name (more budgets, "
            "sizes or runs), or write the config all the same with --force"
        )
    from maxlm.scaling.next_model import write_model

    write_model(found, args.out)
    if not args.json:
        print(f"\nwrote {args.out}; train it with: maxlm train {args.out}")


def _budget(args: argparse.Namespace, base: str | None) -> tuple[Any, float, dict[str, str]]:
    """The hardware if there is any, the FLOPs, and where they come from."""
    if args.topology is None:
        if args.days is not None or args.mfu is not None or args.slices > 1:
            raise ConfigError("--days, --mfu and --slices are of hardware; name it with --topology")
        if args.flops is None:
            raise ConfigError("no budget: give --flops, or --topology with --days")
        return None, args.flops, {}
    from maxlm.planning.topology import parse_topology
    from maxlm.scaling.hardware import DEFAULT_MFU, Hardware

    hardware = Hardware(parse_topology(args.topology, args.slices), args.days, args.mfu or DEFAULT_MFU)
    available = hardware.flops()
    if available is None and args.mfu is not None:
        raise ConfigError(f"--mfu {args.mfu:g} says how many FLOPs --days have; give --days too")
    if available is None and base is None:
        raise ConfigError("--topology alone says nothing: give --days for its FLOPs, or --config BASE for its memory")
    if available is None and args.flops is None:
        raise ConfigError("no budget: give --flops, or --days of the topology")
    if available is not None and (args.flops is None or available < args.flops):
        return hardware, available, {"flops": hardware.label}
    return hardware, args.flops, {}


def _add_optimum(commands: Any) -> None:
    command = add_command(commands, "optimum", optimum)
    command.add_argument("table", type=Path, metavar="TABLE", help="CSV, Parquet, a sweep's folder or specification")
    command.add_argument("--flops", type=above_zero, metavar="C", help="the budget, in FLOPs")
    command.add_argument(
        "--law", choices=list(OPTIMUM_LAW_NAMES), default="chinchilla", metavar="NAME",
        help=f"by which law (default: chinchilla): {', '.join(OPTIMUM_LAW_NAMES)}",
    )  # fmt: skip
    what = command.add_argument_group("what bounds the answer")
    what.add_argument(
        "--served-tokens", type=above_zero, metavar="T",
        help="tokens that the model will serve: the budget is of training and serving, 6ND + 2NT",
    )  # fmt: skip
    what.add_argument(
        "--same-loss", action="store_true",
        help="with --served-tokens: the loss that --flops of training reach, for the fewest FLOPs in all",
    )  # fmt: skip
    what.add_argument("--max-tokens", type=above_zero, metavar="D", help="train on no more tokens")
    what.add_argument(
        "--unique-tokens", type=above_zero, metavar="U",
        help="the tokens that there are; with --law data-constrained they may be repeated",
    )  # fmt: skip
    what.add_argument("--max-params", type=above_zero, metavar="N", help="no larger model")
    what.add_argument("--topology", metavar="T", help="with --config: the model must fit it: v5p:4x4x4, h100:16x8")
    what.add_argument("--slices", type=at_least(1), default=1, metavar="N", help="TPU slices (default: 1)")
    what.add_argument("--days", type=above_zero, metavar="X", help="the FLOPs of so many days of the topology")
    what.add_argument("--mfu", type=fraction, metavar="M", help="that --days are counted at (default: 0.4)")
    model = command.add_argument_group("the model")
    model.add_argument(
        "--config", metavar="BASE", help="a config or a sweep's specification, whose family the model is of"
    )
    model.add_argument("--out", type=Path, metavar="FILE", help="write the model's config")
    model.add_argument("--force", action="store_true", help="write it though the fit is not to be trusted")
    _with_fit(command)
    with_json(command)
