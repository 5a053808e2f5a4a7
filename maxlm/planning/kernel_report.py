"""What the TPU compiler made of a Pallas kernel: static cycles, filled slots of the units, spills. No TPU is needed.

Static cycles are bundles of the final schedule times how often they run (`bundles`): not a time, since a kernel also
waits for its DMAs, but what remains when it does not, and exact enough to compare one version of a kernel with another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maxlm.errors import ConfigError, MaxlmError
from maxlm.planning.bundles import SPILLS, Schedule, parse_schedule
from maxlm.planning.topology import Topology

KERNELS = ("attention-forward", "attention-backward")
UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
"""Units shown as columns; the dump has more."""

WIDTH = 110


@dataclass(frozen=True)
class Shape:
    """The arrays of one call of a kernel on one device."""

    batch: int = 1
    seq_len: int = 4096
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as it was compiled, by the name of its instruction."""

    name: str
    settings: dict[str, Any]
    """What its author noted beside it: the sizes of its blocks, for splash attention."""
    schedule: Schedule

    def to_dict(self) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "name": self.name,
            "settings": self.settings,
            "bundles": schedule.n_bundles,
            "static_cycles": schedule.static_cycles,
            "every_loop_counted": schedule.complete,
            "loops": [_loop(schedule, index) for index in range(len(schedule.loops))],
            "outside_loops": len(schedule.own(None)),
        }


@dataclass(frozen=True)
class KernelReport:
    """The kernels that a name stands for, at one shape, on one TPU."""

    name: str
    topology: Topology
    shape: Shape
    kernels: tuple[CompiledKernel, ...]

    @property
    def cores(self) -> int:
        """TensorCores of a JAX device. Where there are two, a kernel whose grid has a parallel axis runs on both, each
        with half of that axis, and its cycles are one core's; another kernel runs on one core while the other waits."""
        return self.topology.chip.cores_per_chip // self.topology.chip.devices_per_chip

    def to_dict(self) -> dict[str, Any]:
        return {
            "kernel": self.name,
            "topology": self.topology.name,
            "shape": asdict(self.shape),
            "cores": self.cores,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }


def kernel_report(name: str, topology: Topology, **shape: Any) -> KernelReport:
    """Compiles a kernel of ours for one device of a topology and reads its final schedule: 20 s of CPU as it stands.

    Args:
        name: one of `KERNELS`. Attention is causal and over packed segments, as in training; its forward kernel saves
            what backward needs.
        topology: of TPUs.
        shape: fields of `Shape`.

    Raises:
        ConfigError: an unknown kernel, a cluster of GPUs, or a shape that the kernel does not take.
        CompilerMissingError: no libtpu here.
        MaxlmError: the compiler failed; its last lines are in the message.
    """
    if name not in KERNELS:
        raise ConfigError(f"no kernel {name!r}; they are {', '.join(KERNELS)}")
    if not topology.is_tpu:
        raise ConfigError(f"{topology.name}: reports of kernels are of TPUs; give one, like v5p:2x2x2")
    from maxlm.planning.compile import require_compiler

    require_compiler(topology)
    chosen = Shape(**shape)
    request = {"kernel": name, "topology": topology.name, "shape": asdict(chosen)}
    with tempfile.TemporaryDirectory(prefix="maxlm-kernel-") as folder:
        found = _compile(request, Path(folder))
        kernels = tuple(
            CompiledKernel(kernel["name"], kernel["settings"], read_schedule(Path(folder), kernel["name"]))
            for kernel in found
        )
    return KernelReport(name, topology, chosen, kernels)


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """The schedule of a kernel in a folder that the compiler dumped to.

    Raises MaxlmError where it is not there or cannot be read.
    """
    texts = []
    for kind in ("final_bundles", "final_hlo-static-per-bundle-utilization"):
        name = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{kind}\.txt")
        files = [file for file in folder.iterdir() if name.fullmatch(file.name)]
        if len(files) != 1:
            raise MaxlmError(
                f"the compiler dumped {len(files)} files {kind} of kernel {kernel}: its dump is not what libtpu "
                "0.0.42.1 writes"
            )
        texts.append(files[0].read_text())
    try:
        return parse_schedule(*texts)
    except ValueError as error:
        raise MaxlmError(f"schedule of kernel {kernel}: {error}") from error


def _compile(request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    flags = (
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final.*",  # without it: half a gigabyte of every pass
    )
    environment = {
        **os.environ,
        "LIBTPU_INIT_ARGS": " ".join(flags).strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is taken from a cache is not dumped
    }
    command = [sys.executable, "-m", "maxlm.planning.kernel_compile", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise MaxlmError(f"{request['kernel']} did not compile for {request['topology']}:\n{last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ConfigError(f"{request['kernel']}: {answer['error']}")
    return answer["kernels"]


def _loop(schedule: Schedule, index: int) -> dict[str, Any]:
    loop, own = schedule.loops[index], len(schedule.own(index))
    times = schedule.executions(index)
    return {
        "depth": loop.depth,
        "bundles": own,
        "iterations": loop.iterations,
        "executions": times,
        "static_cycles": None if times is None else times * own,
        "skippable": [branch.bundles for branch in schedule.skippable(index)],
        "utilisation": {
            unit: round(schedule.utilisation(unit, index), 4) for unit in schedule.units if unit not in SPILLS
        },
        "fills": schedule.filled("VLOAD:FILL", index),
        "spills": schedule.filled("VSTORE:SPILL", index),
    }


def show(report: KernelReport) -> str:
    """The report as text of about 110 columns."""
    shape = report.shape
    lines = [
        f"{report.name} on {report.topology.name}: batch {shape.batch}, {shape.seq_len} positions, {shape.heads} heads "
        f"({shape.kv_heads} of keys) of {shape.head_dim}, {shape.dtype}",
    ]
    for kernel in report.kernels:
        lines += ["", kernel.name, *_settings(kernel.settings), *_table(kernel.to_dict())]
    lines += [
        "",
        "Static cycles: bundles of the final schedule times how often they run, as if no branch skipped any.",
        "Stalls, DMAs and HBM are not in them, so they are no time. The loop over a kernel's grid runs once or twice",
        "more than the grid has steps, to fill and drain its pipeline. Units: share of their slots that is filled.",
    ]
    if report.cores > 1:
        lines += [
            f"A device of {report.topology.chip.name} is {report.cores} cores. Runs and cycles are one core's: half of "
            "the grid where an axis of it is",
            "declared parallel, else all of it, while the other core waits.",
        ]
    return "\n".join(lines)


def _settings(settings: dict[str, Any]) -> list[str]:
    blocks = {name: value for name, value in settings.items() if name.startswith("block_")}
    text = ", ".join(f"{name} {value}" for name, value in blocks.items())
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _table(kernel: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, ...]] = [("loop", "bundles", "runs", "cycles", *UNITS, "fills", "spills")]
    notes: list[str] = []
    for loop in kernel["loops"]:
        runs, cycles = loop["executions"], loop["static_cycles"]
        rows.append(
            (
                ">" * loop["depth"],
                f"{loop['bundles']:,}",
                "?" if runs is None else f"{runs:,}",
                "?" if cycles is None else f"{cycles:,}",
                *(f"{loop['utilisation'][unit]:.0%}" for unit in UNITS),
                f"{loop['fills']:,}",
                f"{loop['spills']:,}",
            )
        )
        if loop["skippable"]:
            pieces = ", ".join(f"{bundles:,}" for bundles in loop["skippable"])
            notes.append(f"  of {'>' * loop['depth']} a branch may skip: {pieces} bundles")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  " + "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    total = f"  {kernel['static_cycles']:,} static cycles in all, {kernel['outside_loops']:,} of them in no loop"
    if not kernel["every_loop_counted"]:
        total = f"  at least{total[1:]}"
        notes.append("  of ? the bounds are no constants: it counts as one iteration")
    return [*table, *notes, total]
