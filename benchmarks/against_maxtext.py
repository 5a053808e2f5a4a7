"""Our plans beside MaxText's own compilations: `python benchmarks/against_maxtext.py BASELINES` prints tables.

BASELINES is the JSON file of MaxText's figures, of the same libtpu, each row with model, topology, batch, sequence and
remat class. Ours are benchmarks/plans/*.json that name a row. Ratios are ours over theirs: below 1 is less.

Cycles are the compiler's, of everything but attention's kernels and collectives, counted alike on both sides.
MaxText's collective bytes were counted by lines of text, where an asynchronous fusion stands three times. On v5e, and
with the options that it publishes (rows `_pub`), its gathers are such fusions, as ours are, and both are counted so;
elsewhere it has none, and ours count once. `peak less arguments` is what each heap really takes: `temp` has it and its
"fragmentation" once more. Seconds of processor are of other days and other machines: a hint, no more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PLANS = Path(__file__).parent / "plans"
GIB = 2**30
TARGETS = {"temp": 0.8, "cycles": 1.0, "collectives": 1.0, "compile": 1.0}


def sent_gb(plan: dict[str, Any], row: dict[str, Any]) -> float:
    """What a device's collectives move in a step, counted as MaxText's were."""
    fused = plan["topology"]["chip"] == "v5e" or row["name"].endswith(("_pub", "_pub2"))
    counted = "collective_bytes_as_written" if fused else "collective_bytes"
    return sum(plan["compiled"][counted].values()) / 1e9


def ratios(plan: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs, of memory, cycles, bytes that travel, and processor time of the compilation."""
    ours = plan["compiled"]
    return {
        "temp": ours["memory"]["temp"] / GIB / row["temp_gib"],
        "cycles": ours["cycles"]["total"] / row["xla_cycles"],
        "collectives": sent_gb(plan, row) / sum(row["collective_gb_per_step"].values()),
        "compile": ours["cpu_seconds"] / row["compile_cpu_seconds"],
    }


def table(baselines: dict[str, Any]) -> str:
    """A Markdown table, a row for each plan that has a counterpart; what misses its target in bold."""
    rows = {row["name"]: row for row in baselines["rows"] if "temp_gib" in row}
    lines = [
        "| MaxText's row | temp GiB, ours / theirs | ratio | peak less arguments GiB | ratio | cycles 1e9 | ratio "
        "| collectives GB | ratio | compile, CPU s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(PLANS.glob("*.json")):
        plan = json.loads(path.read_text())
        row = rows.get(plan.get("baseline") or "")
        if row is None or plan["compiled"] is None:
            continue
        found, ours = ratios(plan, row), plan["compiled"]
        shown = {
            name: f"**{value:.2f}**" if round(value, 3) > TARGETS[name] else f"{value:.2f}"
            for name, value in found.items()
        }
        ours_peak = (ours["memory"]["peak"] - ours["memory"]["argument"]) / GIB
        theirs_peak = row["peak_gib"] - row["argument_gib"]
        lines.append(
            f"| {row['name']} | {ours['memory']['temp'] / GIB:.2f} / {row['temp_gib']:.2f} | {shown['temp']} "
            f"| {ours_peak:.2f} / {theirs_peak:.2f} | {ours_peak / theirs_peak:.2f} "
            f"| {ours['cycles']['total'] / 1e9:.3f} / {row['xla_cycles'] / 1e9:.3f} | {shown['cycles']} "
            f"| {sent_gb(plan, row):.1f} / {sum(row['collective_gb_per_step'].values()):.1f} | {shown['collectives']} "
            f"| {ours['cpu_seconds']:.0f} / {row['compile_cpu_seconds']:.0f} | {shown['compile']} |"
        )
    return "\n".join(lines)


def reference_table() -> str:
    """A Markdown table of every plan of a public model."""
    lines = [
        "| plan | mesh | memory a device, of | step, s | MFU | tokens/s | bound by | compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(PLANS.glob("llama3-*.json")):
        plan = json.loads(path.read_text())
        mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        capacity = plan["topology"]["hbm_bytes_per_device"] / GIB
        if plan["compiled"] is None:
            need = plan["out_of_memory"]["used"] / GIB
            lines.append(f"| {path.stem} | {mesh} | **{need:.1f}** of {capacity:.1f} GiB | does not fit ||||| ")
            continue
        said, compiled = plan["prediction"], plan["compiled"]
        low, high = said["step_seconds"]
        need = compiled["memory"]["required"] / GIB
        fits = f"{need:.1f}" if plan["fits"] else f"**{need:.1f}**"
        basis = "" if said["basis"] != "roofline" else " (roofline)"
        lines.append(
            f"| {path.stem} | {mesh} | {fits} of {capacity:.1f} GiB | {low:.2f}–{high:.2f}{basis} "
            f"| {100 * said['mfu'][1]:.0f}–{100 * said['mfu'][0]:.0f}% "
            f"| {said['tokens_per_second'][1]:,.0f}–{said['tokens_per_second'][0]:,.0f} | {said['bound']} "
            f"| {compiled['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("baselines", type=Path, help="the JSON file of MaxText's figures")
    args = parser.parse_args()
    print(reference_table(), end="\n\n")
    print(table(json.loads(args.baselines.read_text())))


if __name__ == "__main__":
    main()
