"""Makes the plans under benchmarks/plans again: `python benchmarks/plans.py [NAME ...]`, all of them without a name.

Each is a process of its own, so that memory and processor time are its own. TPU plans need the `tpu` extra, those
of GPUs the `cuda12` extra; what is not installed is left out with a word. About two minutes each on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PLANS = HERE / "plans"
FULL, MINIMAL = "model.remat={policy: full}", "model.remat={policy: names, names: [%s]}"
OFFLOADED = "model.remat={policy: names, offload: [layer_input]}"
QKV = "q, k, v"
PRODUCTS = f"{QKV}, attention_out, mlp_gate, mlp_up, mlp_out"


@dataclass(frozen=True)
class Wanted:
    """One plan: its file's name, a config, a topology, rows a device (below 1 of rows that several share), and what
    else is set."""

    name: str
    config: str
    topology: str
    rows: float
    seq_len: int = 8192
    overrides: tuple[str, ...] = (FULL,)
    slices: int = 1
    baseline: str | None = None
    """the row of MaxText's figures that it is compared with"""


def _mesh(**sizes: int) -> str:
    return "mesh={" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items()) + "}"


REFERENCE = [
    Wanted("llama3-8b_v5e-256", "llama3-8b", "v5e-256", 2, baseline="llama3-8b_v5e-256_fsdp_full"),
    Wanted("llama3-8b_v5p-128", "llama3-8b", "v5p-128", 2, baseline="llama3-8b_v5p-128_fsdp_full"),
    Wanted("llama3-8b_v6e-256", "llama3-8b", "v6e-256", 2),
    Wanted("llama3-8b_2xv6e-256", "llama3-8b", "v6e-256", 2, overrides=(FULL, _mesh(data=2, fsdp=256)), slices=2),
    Wanted("llama3-8b_tpu7x-128", "llama3-8b", "tpu7x-128", 2),
    Wanted("llama3-8b_h100-128", "llama3-8b", "h100-128", 2, overrides=(FULL, _mesh(data=16, fsdp=8))),
    Wanted("llama3-70b_v5e-256", "llama3-70b", "v5e-256", 1),  # does not fit: kept for its relief
    Wanted("llama3-70b_v5e-256_offload", "llama3-70b", "v5e-256", 1, overrides=(OFFLOADED,)),
    Wanted("llama3-70b_v5p-128", "llama3-70b", "v5p-128", 2),
    Wanted("llama3-70b_v6e-256", "llama3-70b", "v6e-256", 1),
    Wanted("llama3-70b_2xv6e-256", "llama3-70b", "v6e-256", 1, overrides=(FULL, _mesh(data=2, fsdp=256)), slices=2),
    Wanted("llama3-70b_tpu7x-128", "llama3-70b", "tpu7x-128", 2),
    Wanted("llama3-70b_h100-128", "llama3-70b", "h100-128", 1),
    Wanted("llama3-405b_v5p-2048", "llama3-405b", "v5p-2048", 1),
    Wanted("llama3-405b_tpu7x-512", "llama3-405b", "tpu7x-512", 1),
    # Pipeline, context and expert.
    Wanted(
        "llama3-405b_4xv5p-512",
        "llama3-405b",
        "v5p-512",
        1,
        overrides=(FULL, _mesh(pipeline=4, fsdp=64, tensor=4), "pipeline={schedule: 1f1b, microbatches: 16}"),
        slices=4,
    ),
    Wanted("llama3-8b_128k_v5p-128", "llama3-8b", "v5p-128", 1 / 4, 2**17, (FULL, _mesh(fsdp=16, context=4))),
    Wanted("llama3-8b_1m_v5p-512", "llama3-8b", "v5p-512", 1 / 32, 2**20, (FULL, _mesh(fsdp=8, context=32))),
    Wanted("qwen3-30b-a3b_v5p-128", "qwen3-30b-a3b", "v5p-128", 4, 4096, (FULL, _mesh(fsdp=16, expert=4))),
    Wanted("deepseek-v2-lite_v5p-128", "deepseek-v2-lite", "v5p-128", 4, 4096, (FULL, _mesh(fsdp=16, expert=4))),
    Wanted("deepseek-v3_v5p-1024", "deepseek-v3", "v5p-1024", 2, 4096, (FULL, _mesh(fsdp=64, expert=8))),
    Wanted("deepseek-v3_tpu7x-512", "deepseek-v3", "tpu7x-512", 2, 4096, (FULL, _mesh(fsdp=64, expert=8))),
]


def _against(row: str, config: str, topology: str, rows: int, seq_len: int, *overrides: str) -> Wanted:
    path = HERE / "configs" / f"{config}.yaml"
    known = str(path) if path.exists() else config
    return Wanted(f"maxtext_{row}", known, topology, rows, seq_len, overrides or (FULL,), baseline=row)


AGAINST_MAXTEXT = [
    _against("llama2-7b_v5p-64_fsdp_full", "llama2-7b", "v5p-64", 4, 4096),
    _against("llama2-7b_v5p-64_fsdp_minimal", "llama2-7b", "v5p-64", 4, 4096, MINIMAL % PRODUCTS),
    _against("llama2-7b_v5p-64_fsdp8tp4_full", "llama2-7b", "v5p-64", 4, 4096, FULL, _mesh(fsdp=8, tensor=4)),
    _against("llama3-8b_v5p-128_fsdp_minimal", "llama3-8b", "v5p-128", 2, 8192, MINIMAL % PRODUCTS),
    _against("llama3-8b_v5p-128_fsdp16tp4_full", "llama3-8b", "v5p-128", 2, 8192, FULL, _mesh(fsdp=16, tensor=4)),
    _against("llama3-8b_v5e-256_fsdp_saveqkv_b1", "llama3-8b", "v5e-256", 1, 8192, MINIMAL % QKV),
    _against("default16b_v5e-256_full_published", "default-16b", "v5e-256", 6, 2048),
    _against("default32b_v5e-256_fsdp_full", "default-32b", "v5e-256", 4, 2048),
    _against("default64b_v5e-256_pub", "default-64b", "v5e-256", 2, 2048),
    _against(
        "default32b_v5p-128_fsdp16tp4_minimal_published",
        "default-32b",
        "v5p-128",
        6,
        2048,
        MINIMAL % PRODUCTS,
        _mesh(fsdp=16, tensor=4),
    ),
    _against("mixtral-8x7b_v5p-128_fsdp_full", "mixtral-8x7b", "v5p-128", 4, 4096),
    _against("mixtral-8x7b_v5p-128_fsdp16tp4_full", "mixtral-8x7b", "v5p-128", 4, 4096, FULL, _mesh(fsdp=16, tensor=4)),
    _against("mixtral-8x7b_v5p-128_fsdp16ep4_full", "mixtral-8x7b", "v5p-128", 4, 4096, FULL, _mesh(fsdp=16, expert=4)),
    _against(
        "mixtral-8x7b_v5p-128_dense_cap1", "mixtral-8x7b", "v5p-128", 4, 4096, FULL, "model.moe.capacity_factor=1"
    ),
    _against("deepseek2-16b_v5p-128_fsdp_full", "deepseek-v2-lite", "v5p-128", 4, 4096),
    _against("deepseek3-671b_v5p-1024_fsdp_full", "deepseek-v3", "v5p-1024", 2, 4096),
    _against("llama2-70b_v5p-128_pub", "llama2-70b", "v5p-128", 2, 4096, MINIMAL % f"{QKV}, attention_out, mlp_out"),
    _against(
        "llama3.1-8b_v6e-256_pub2",
        "llama3-8b",
        "v6e-256",
        4,
        8192,
        f"model.remat={{policy: names, offload: [layer_input, attention_out, {QKV}]}}",
    ),
    _against(
        "default128b_v5e-256_pub",
        "default-128b",
        "v5e-256",
        1,
        2048,
        f"model.remat={{policy: names, offload: [{QKV}]}}",
        _mesh(fsdp=16, tensor=16),
    ),
]
ALL = REFERENCE + AGAINST_MAXTEXT


def overrides_of(wanted: Wanted) -> list[str]:
    """The overrides of a plan, its batch from the rows a device."""
    from maxlm.planning.topology import parse_topology

    tokens = round(parse_topology(wanted.topology, wanted.slices).n_devices * wanted.rows) * wanted.seq_len
    return [f"train.seq_len={wanted.seq_len}", f"train.global_batch_tokens={tokens}", *wanted.overrides]


def make(wanted: Wanted, python: str) -> str:
    """Makes a plan with nothing kept from earlier, writes it, and returns a line on it."""
    command = [python, "-m", "maxlm.cli", "plan", wanted.config, "--topology", wanted.topology]
    command += ["--slices", str(wanted.slices), "--json", *overrides_of(wanted)]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MAXLM_CACHE": empty})
    if done.returncode:
        return f"failed with code {done.returncode}: {done.stderr.strip()[-400:]}"
    plan = json.loads(done.stdout)
    if plan["not_compiled_because"]:
        return f"left out: {plan['not_compiled_because']}"
    plan["config"] = Path(wanted.config).stem
    plan["baseline"] = wanted.baseline
    (PLANS / f"{wanted.name}.json").write_text(json.dumps(plan, indent=1) + "\n")
    if plan["compiled"] is None:
        return f"out of memory: needs {plan['out_of_memory']['used'] / 2**30:.1f} GiB"
    compiled = plan["compiled"]
    cycles = compiled["cycles"]["total"] / 1e9 if compiled["cycles"] else float("nan")
    return (
        f"{compiled['memory']['temp'] / 2**30:.2f} GiB temp, {cycles:.3f}e9 cycles, "
        f"{compiled['cpu_seconds']:.0f} s of processor, {compiled['compile_seconds']:.0f} s"
    )


def main() -> None:
    """Makes the plans that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="only those that are not there")
    args = parser.parse_args()
    PLANS.mkdir(exist_ok=True)
    for wanted in ALL:
        if args.names and wanted.name not in args.names:
            continue
        if args.missing and (PLANS / f"{wanted.name}.json").exists():
            continue
        print(f"{wanted.name}: {make(wanted, sys.executable)}", flush=True)


if __name__ == "__main__":
    main()
