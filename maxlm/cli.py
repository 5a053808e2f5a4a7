"""The command line: one function a command, which imports what it runs when it runs.

`maxlm --help` must stay fast, so nothing heavy is imported at the top.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxlm import __version__
from maxlm.cli_parsers import above_zero, add_command, at_least, fraction, with_config, with_json, with_run
from maxlm.cli_sweep import add_sweep
from maxlm.console import print_json, print_table
from maxlm.errors import CheckpointError, ConfigError, MaxlmError, StorageError

if TYPE_CHECKING:
    from maxlm.config_keys import KeyRow

EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13

STORAGE_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or choose another folder",
    errno.EDQUOT: "make room within the quota, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
}

EXAMPLES = """examples:
  maxlm config quickstart                          the resolved config
  maxlm tokenizer train quickstart                 text in, tokenizer out
  maxlm data prepare quickstart                    text in, token store out
  maxlm train quickstart train.steps=100           one run; the same command again resumes it
  maxlm plan llama3-8b --topology v5p:4x4x4 train.global_batch_tokens=1048576
  maxlm train quickstart --simulate-devices 8 mesh.data=2 mesh.tensor=2
  maxlm generate runs/quickstart --prompt 'def '
  maxlm export runs/quickstart OUT --to hf         for transformers; --to gguf for llama.cpp
  maxlm import hf:DIR runs/theirs                  a Hugging Face model's folder as a run

exit codes: 0 done, 1 other, 2 config, 3 data, 4 checkpoint, 5 storage, 6 cluster. MAXLM_DEBUG=1 shows tracebacks.
"""


def train(args: argparse.Namespace) -> None:
    """Trains, or resumes, the run that a config describes."""
    flags = {
        "distributed.coordinator": args.coordinator,
        "distributed.num_processes": args.num_processes,
        "distributed.process_id": args.process_id,
    }
    flagged = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    from maxlm.config import load_config

    config = load_config(args.config, [*args.overrides, *flagged])
    if args.simulate_devices:
        simulate_devices(args.simulate_devices)
    from maxlm.train import train as run

    run(config)


def plan(args: argparse.Namespace) -> None:
    """Says what a run would need and how long it would take, by compiling its step for hardware that is not here."""
    from maxlm.planning.topology import parse_topology

    topology = parse_topology(args.topology, args.slices)
    if args.kernel:
        plan_kernel(args, topology)
        return
    if args.config is None:
        raise ConfigError("no config: give a file or a preset's name, or --kernel NAME")
    from maxlm.config import load_config
    from maxlm.plan import make_plan
    from maxlm.planning.report import print_report, show

    config = load_config(args.config, args.overrides)
    if args.search:
        plan_search(args, config, topology)
        return
    result = make_plan(config, topology, compiled=not args.no_compile)
    result |= {"config": args.config, "overrides": args.overrides}
    if args.html:
        from maxlm.planning.page import write_page

        write_page(result, args.html)
    if args.json:
        print_json(result)
        return
    print_report(show(result))
    if args.html:
        print(f"wrote {args.html}")


def plan_search(args: argparse.Namespace, config: Any, topology: Any) -> None:
    """The fastest meshes, remat policies and microbatches that fit, and a config with the best."""
    from functools import partial

    from maxlm.plan import make_plan
    from maxlm.planning.report import print_report, show_search
    from maxlm.planning.search import search, write_config

    plan_one = partial(make_plan, topology=topology, compiled=not args.no_compile, relief=False)
    found = search(
        config,
        topology,
        plan_one=plan_one,
        source=args.config,
        overrides=args.overrides,
        compile_best=args.best,
        progress=not args.json,
    )
    if args.out and found.best:
        write_config(found, args.out)
    if args.json:
        print_json(found.to_dict())
        return
    print_report(show_search(found))
    if args.out and found.best:
        print(f"wrote {args.out}; train it with: maxlm train {args.out}")


def plan_kernel(args: argparse.Namespace, topology: Any) -> None:
    """The final schedule of one of our Pallas kernels: static cycles, use of each unit, spills."""
    from maxlm.planning.kernel_report import kernel_report, show

    found = kernel_report(args.kernel, topology)
    if args.json:
        print_json(found.to_dict())
    else:
        print(show(found))


def evaluate(args: argparse.Namespace) -> None:
    """Scores a run's checkpoint on its held-out documents."""
    run = run_folder(args.run)
    from maxlm.evaluation.evaluate import evaluate_run

    scores = evaluate_run(run, step=args.step)
    print_table([{"score": name, "value": value} for name, value in scores.items()], args.json, as_json=scores)


def generate(args: argparse.Namespace) -> None:
    """Continues prompts with a run's model, all of them as one batch."""
    run = run_folder(args.run)
    from maxlm.inference.generate import generate_run

    texts = generate_run(
        run,
        args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        greedy=args.greedy,
        seed=args.seed,
        step=args.step,
    )
    pairs = [{"prompt": prompt, "continuation": text} for prompt, text in zip(args.prompt, texts, strict=True)]
    if args.json:
        print_json(pairs)
        return
    for i, pair in enumerate(pairs):
        if i:
            print("-" * 40)
        print(pair["prompt"] + pair["continuation"])


def export(args: argparse.Namespace) -> None:
    """Writes a run's model in a format that others read."""
    run = run_folder(args.run)
    if args.to == "gguf":
        from maxlm.interop import gguf

        gguf.export_run(run, args.out, dtype=args.dtype, step=args.step)
        print(f"wrote {args.out}; llama.cpp loads it: llama-cli -m {args.out}")
        return
    from maxlm.interop import huggingface

    huggingface.export_run(run, args.out, dtype=args.dtype, step=args.step)
    print(f"wrote {args.out}; transformers loads it with AutoModelForCausalLM.from_pretrained({str(args.out)!r})")


def import_(args: argparse.Namespace) -> None:
    """Reads a model of others as a run."""
    from maxlm.interop.huggingface import import_model

    import_model(args.model, args.out, dtype=args.dtype)
    if (args.out / "tokenizer").is_dir():
        print(f"wrote {args.out}; try: maxlm generate {args.out} --prompt 'Hello'")
    else:
        print(f"wrote {args.out}, without a tokenizer: name one as tokenizer.path in its config.yaml to sample from it")


def data_prepare(args: argparse.Namespace) -> None:
    """Reads a config's documents into a token store."""
    from maxlm.config import load_config
    from maxlm.data.prepare import prepare

    config = load_config(args.config, args.overrides)
    prepare(config.data, config.tokenizer)


def data_inspect(args: argparse.Namespace) -> None:
    """Says what a token store holds."""
    from maxlm.data.prepare import inspect

    facts = inspect(args.store)
    rows = [{"what": name, "value": value} for name, value in _flat(facts) if name != "samples"]
    print_table(rows, args.json, as_json=facts)
    for sample in () if args.json else facts["samples"]:
        print(f"\n{sample['split']} document {sample['document']:,}, {sample['tokens']:,} tokens:\n{sample['text']}")


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(value) if name == "sources" else value


def tokenizer_train(args: argparse.Namespace) -> None:
    """Trains a tokenizer on a config's documents."""
    from maxlm.config import load_config
    from maxlm.data.tokenizer import train_from_config

    config = load_config(args.config, args.overrides)
    tokenizer = train_from_config(config.tokenizer, config.data)
    print(f"wrote {config.tokenizer.path}: {tokenizer.vocab_size:,} tokens; next: maxlm data prepare {args.config}")


def show_config(args: argparse.Namespace) -> None:
    """Prints the resolved config, or explains keys, presets and what cannot go together."""
    from dataclasses import asdict

    from maxlm import config as configs

    if args.help_keys is not None:
        keys = configs.explain(args.help_keys or None)
        print_table([key_row(key) for key in keys], args.json, as_json=[asdict(key) for key in keys])
    elif args.presets:
        print_table(preset_rows(), args.json)
    elif args.support:
        from maxlm.parallel.support import reasons, table

        if args.json:
            print_json({"features": table(), "refused": reasons()})
        else:
            print_table(table(), False)
            print()
            print_table(reasons(), False)
    elif args.config is None:
        raise ConfigError("no config: give a file or a preset's name, or one of --presets, --help-keys, --support")
    elif args.json:
        print_json(configs.load_config(args.config, args.overrides).model_dump(mode="json"))
    else:
        print(configs.to_yaml(configs.load_config(args.config, args.overrides)), end="")


def key_row(row: KeyRow) -> dict[str, Any]:
    """A key as a row of the table that `--help-keys` prints."""
    default = "required" if row.required else None if row.type == "section" else json.dumps(row.default)
    return {"key": row.key, "type": row.type, "default": default, "unit": row.unit, "meaning": row.meaning}


def preset_rows() -> list[dict[str, Any]]:
    """Every preset with its size and the length of its run."""
    from maxlm.config import load_config
    from maxlm.config_file import preset_names
    from maxlm.models.flops import cache_bytes_per_token, count_parameters

    rows = []
    for name in preset_names():
        config = load_config(name)
        rows.append(
            {
                "preset": name,
                "parameters": count_parameters(config.model).total,
                "layers": config.model.n_layers,
                "d_model": config.model.d_model,
                "vocab_size": config.model.vocab_size,
                "cache_bytes_per_token": cache_bytes_per_token(config.model, config.precision),
                "seq_len": config.train.seq_len,
                "tokens": config.train.steps * config.train.global_batch_tokens,
            }
        )
    return rows


def run_folder(path: Path) -> Path:
    """`path`, which must be a run's folder. Raises CheckpointError otherwise."""
    if (path / "config.yaml").is_file():
        return path
    import difflib

    siblings = [str(config.parent) for config in sorted(path.parent.glob("*/config.yaml"))]
    near = difflib.get_close_matches(str(path), siblings, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`maxlm train CONFIG` makes one"
    raise CheckpointError(f"{path}: not a run's folder, there is no config.yaml in it; {hint}")


def report(args: argparse.Namespace) -> None:
    """Writes a run's page with its curves."""
    run = run_folder(args.run)
    from maxlm.evaluation.report import write_report

    print(f"wrote {write_report(run)}")


def simulate_devices(count: int) -> None:
    """Makes JAX, which must not have started yet, show the CPU as `count` devices."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="maxlm",
        description="Plan, train, resume, scale and export language models on JAX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"maxlm {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_plan(commands)
    _add_model_commands(commands)
    add_sweep(commands)

    data = commands.add_parser("data", help="text in, token store out").add_subparsers(metavar="COMMAND", required=True)
    with_config(add_command(data, "prepare", data_prepare))
    inspect = add_command(data, "inspect", data_inspect)
    inspect.add_argument("store", metavar="STORE", help="a token store: a folder or a URL")
    with_json(inspect)

    tokenizer = commands.add_parser("tokenizer", help="text in, tokenizer out")
    with_config(add_command(tokenizer.add_subparsers(metavar="COMMAND", required=True), "train", tokenizer_train))

    config = add_command(commands, "config", show_config)
    with_config(config, optional=True)
    what = config.add_mutually_exclusive_group()
    what.add_argument(
        "--help-keys", nargs="?", const="", metavar="SECTION", help="explain every key, or those of a section"
    )
    what.add_argument("--presets", action="store_true", help="list the presets")
    what.add_argument("--support", action="store_true", help="list what cannot go together, and why")
    with_json(config)
    return top


def _add_train(commands: Any) -> None:
    command = add_command(commands, "train", train)
    with_config(command)
    command.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of the run (distributed.coordinator)")
    command.add_argument("--num-processes", type=at_least(1), metavar="N", help="processes of the run")
    command.add_argument("--process-id", type=at_least(0), metavar="I", help="the number of this one, from 0")
    command.add_argument(
        "--simulate-devices",
        type=at_least(1),
        metavar="N",
        help="show the CPU as N devices, to try a mesh without having one; slower than one device",
    )


def _add_plan(commands: Any) -> None:
    command = add_command(commands, "plan", plan)
    with_config(command, optional=True)
    command.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:4x4x4 or v5p-128, v6e-256, tpu7x-128, h100:16x8, ..."
    )
    command.add_argument("--slices", type=at_least(1), default=1, metavar="N", help="TPU slices (default: 1)")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="look for the fastest mesh, remat policy and microbatches")
    what.add_argument("--kernel", metavar="NAME", help="read the final schedule of a Pallas kernel instead of a step")
    command.add_argument("--best", type=at_least(1), default=8, metavar="N", help="--search: plans made (default: 8)")
    command.add_argument("--out", type=Path, metavar="FILE", help="--search: write the best as a config here")
    command.add_argument("--no-compile", action="store_true", help="the roofline alone: a second, and no compiler")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the plan as a page with pictures")
    with_json(command)


def _add_model_commands(commands: Any) -> None:
    command = add_command(commands, "eval", evaluate)
    with_run(command)
    with_json(command)

    command = add_command(commands, "generate", generate)
    with_run(command)
    command.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    command.add_argument("--max-tokens", type=at_least(1), default=128, metavar="N", help="new tokens (default: 128)")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--greedy", action="store_true", help="always the likeliest token")
    choice.add_argument("--temperature", type=_temperature, default=1.0, metavar="X", help="(default: 1)")
    command.add_argument("--top-k", type=at_least(1), metavar="K", help="sample among the K likeliest tokens")
    command.add_argument("--top-p", type=fraction, metavar="P", help="sample among the likeliest that make up P")
    command.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="(default: 0)")
    with_json(command)

    command = add_command(commands, "export", export)
    with_run(command)
    command.add_argument("out", type=Path, metavar="OUT", help="hf: the folder to write; gguf: the file")
    command.add_argument(
        "--to", choices=["hf", "gguf"], required=True, help="hf: Hugging Face transformers; gguf: llama.cpp"
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "q8_0"],
        default="float32",
        help="of the weights (default: float32); q8_0, of GGUF alone: 8 bits and a scale to each 32 of them",
    )

    command = add_command(commands, "import", import_)
    command.add_argument(
        "model", type=_model_of_others, metavar="hf:DIR", help="a Hugging Face model's folder: config.json, safetensors"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="the run folder to write")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of parameters and compute (default: bfloat16 where all of the files is, else float32)",
    )

    command = add_command(commands, "report", report)
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder")


def _temperature(text: str) -> float:
    try:
        return above_zero(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (for the likeliest token, --greedy)") from error


def _model_of_others(text: str) -> Path:
    """The folder of `hf:DIR`; there is one format to import so far, so DIR alone is it too."""
    return Path(text.removeprefix("hf:"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line. Overrides may also follow flags, which argparse by itself does not allow."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    for text in rest:
        if "=" in text and not text.startswith("-") and hasattr(args, "overrides"):
            args.overrides.append(text)
        elif "=" in text and hasattr(args, "overrides"):
            top.error(f"unknown flag {text}; config keys are written without dashes: {text.lstrip('-')}")
        else:
            top.error(f"unknown argument {text}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        args.run_command(args)
        sys.stdout.flush()
    except MaxlmError as error:
        return _fail(error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has left (`maxlm config ... | head`).
        _leave_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in STORAGE_REMEDIES:
            raise
        _leave_stdout()
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{os.strerror(error.errno).lower()}; {STORAGE_REMEDIES[error.errno]}"
        return _fail(error, message, StorageError.exit_code)
    return 0


def _leave_stdout() -> None:
    """Keeps the interpreter from writing at exit what could not be written before."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("MAXLM_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        from maxlm.parallel.distributed import leave

        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
