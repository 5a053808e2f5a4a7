"""The table that the report's tests draw: a ladder of a known law, with a run that failed and one that diverged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import KNOWN, chinchilla

from maxlm.scaling.table import write_table

NOISE = 0.003
BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)
SIZES = np.geomspace(5e7, 1.6e9, 9)


def ladder_rows(seed: int = 0) -> list[dict[str, Any]]:
    """A row a run: at each budget the five sizes next to 20 tokens a parameter; one failed, one diverged."""
    rng = np.random.default_rng(seed)
    rows = []
    for budget in BUDGETS:
        centre = np.argmin(np.abs(np.log(SIZES / np.sqrt(budget / 120))))
        for size in SIZES[max(0, centre - 2) : centre + 3]:
            tokens = budget / (6 * size)
            loss = chinchilla(size, tokens, **KNOWN["chinchilla"].truth) * np.exp(NOISE * rng.standard_normal())
            rows.append(
                {
                    "run": f"c{budget:.0e}-n{size / 1e6:.0f}M".replace("+", ""), "budget": budget, "status": "done",
                    "n_params": float(size), "n_tokens": float(tokens), "loss": float(loss), "flops": 6 * size * tokens,
                    "note": "",
                }
            )  # fmt: skip
    rows[7] |= {"status": "failed", "loss": None, "note": "exit code 5: disk full"}
    rows[17] |= {"status": "diverged", "loss": 6.9}
    return rows


def write_sweep(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A ladder as a sweep's folder: runs.csv, and a folder a run with its config and its metrics."""
    write_table(folder / "runs.csv", rows)
    rng = np.random.default_rng(1)
    for row in rows:
        run = folder / row["run"]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"name: {row['run']}\n")
        lines = _metrics(row, rng)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _metrics(row: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    steps = 200
    lines = []
    for step in range(1, steps + 1):
        tokens = row["n_tokens"] * step / steps
        loss = float(chinchilla(row["n_params"], tokens, **KNOWN["chinchilla"].truth) + 0.03 * rng.standard_normal())
        if row["status"] == "diverged" and step > 120:
            loss += 0.04 * (step - 120)
        if row["status"] == "failed" and step > 80:
            break
        lines.append({"step": step, "tokens": tokens, "loss": loss, "nll": loss, "grad_norm": 1.0})
    if row["status"] == "done":
        lines.append({"step": steps, "tokens": row["n_tokens"], "eval_loss": row["loss"], "eval_bits_per_byte": 1.0})
    return lines
