"""Our Chinchilla fit (approach 3) beside a grid of 4,500 L-BFGS-B starts in SciPy, on the same synthetic runs.

    python benchmarks/scaling_fit.py
    python benchmarks/scaling_fit.py --rows 240 --out benchmarks/results/scaling_fit.json

The grid is that of Hoffmann et al. (arXiv:2203.15556, section D.2): alpha and beta in 0 to 2, e in -1 to 1, a and b in
0 to 25, where e, a and b are logarithms of E, A and B. SciPy gets the same summed objective with its gradient in NumPy,
once with tolerances that let it end where it should, and once with its own.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from maxlm.console import print_table
from maxlm.scaling.bootstrap import resampled
from maxlm.scaling.fitting import solve
from maxlm.scaling.laws import find_law

DELTA = 1e-3
REPEATS = 5
# The published re-fit: E, A, B, alpha, beta.
TRUTH = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
CONSTANT = (-1.0, -0.5, 0.0, 0.5, 1.0)
COEFFICIENTS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
PRECISE = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 20000}


def table(rows: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """Runs of 44 million to 16 billion parameters, as Hoffmann et al. have, with noise in the logarithm of the loss."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(4.4e7), np.log(1.6e10), rows))
    tokens = size * np.exp(rng.uniform(np.log(2), np.log(200), rows))
    E, A, B, alpha, beta = TRUTH
    loss = (E + A / size**alpha + B / tokens**beta) * np.exp(noise * rng.standard_normal(rows))
    return {"n_params": size, "n_tokens": tokens, "loss": loss}


def summed_huber(columns: dict[str, np.ndarray]):
    """The objective over (e, a, b, alpha, beta) and its gradient."""
    n, d, y = (np.log(columns[name]) for name in ("n_params", "n_tokens", "loss"))

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = x
        parts = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
        top = parts.max(axis=0)
        share = np.exp(parts - top)
        total = share.sum(axis=0)
        r = top + np.log(total) - y
        share /= total
        slope = np.clip(r, -DELTA, DELTA)
        jacobian = np.stack([share[0], share[1], share[2], -n * share[1], -d * share[2]])
        inner = np.minimum(np.abs(r), DELTA)
        return float(np.sum(inner * (np.abs(r) - 0.5 * inner))), jacobian @ slope

    return value


def grid() -> list[tuple[float, ...]]:
    """The 4,500 starts (e, a, b, alpha, beta)."""
    return [
        (e, a, b, alpha, beta)
        for alpha, beta, e, a, b in itertools.product(EXPONENTS, EXPONENTS, CONSTANT, COEFFICIENTS, COEFFICIENTS)
    ]


def theirs(columns: dict[str, np.ndarray], options: dict[str, float]) -> dict[str, float]:
    """SciPy from every start: the best objective, seconds, and how many starts reached it."""
    value = summed_huber(columns)
    begin = time.perf_counter()
    with np.errstate(over="ignore"):
        found = [minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun for start in grid()]
    seconds = time.perf_counter() - begin
    best = float(np.min(found))
    return {
        "objective": best, "seconds": seconds, "starts": len(found),
        "starts_agreeing": int(np.sum(np.array(found) <= best * (1 + 1e-6))),
    }  # fmt: skip


def ours(columns: dict[str, np.ndarray]) -> tuple[dict[str, float], float]:
    """Our fit, the median of `REPEATS`, and the seconds of 4,000 resamples."""
    law = find_law("chinchilla")
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found = solve(law, columns, "huber", DELTA)
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    samples = resampled(found.fitted, np.arange(len(columns["loss"])), 4000, 0)
    seconds = time.perf_counter() - begin
    assert len(samples) > 3900
    rows = {
        "objective": float(found.minima.objective[found.best]), "seconds": float(np.median(times)),
        "starts": len(found.minima.objective), "starts_agreeing": int(found.agreeing.sum()),
    }  # fmt: skip
    return rows, seconds


def main() -> None:
    """Prints a table, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--noise", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", help="what else is to be known, such as other work on the machine")
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    columns = table(args.rows, args.noise, args.seed)
    mine, bootstrap = ours(columns)
    rows = [{"fit": "maxlm", **mine}]
    rows += [
        {"fit": f"scipy L-BFGS-B, {what}", **theirs(columns, options)}
        for what, options in (("to the optimum", PRECISE), ("default tolerances", {}))
    ]
    for row in rows:
        row["above_best"] = row["objective"] / min(each["objective"] for each in rows) - 1
        row["times_maxlm"] = row["seconds"] / mine["seconds"]
    print_table(rows, False)
    print(f"4,000 bootstrap resamples of {args.rows} rows: {bootstrap:.2f} s")
    if args.out:
        about = {
            "date": date.today().isoformat(),
            "command": "python " + " ".join(sys.argv),
            "note": args.note,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scipy")}},
        }
        found = {"rows": args.rows, "noise": args.noise, "fits": rows, "bootstrap_4000_seconds": bootstrap}
        args.out.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
