"""Known laws are found again from noisy runs, and intervals cover the truth as often as they say."""

import numpy as np
import pytest
from synthetic import KNOWN

from maxlm.scaling.fitting import fit
from maxlm.scaling.laws import LAWS, find_law
from maxlm.scaling.result import FitOptions

pytestmark = pytest.mark.exhaustive

# Rows, seeds and resamples. Seeds are 50 at least, and more where two parameters that move together are all there is to
# count, so that chance alone does not leave 90 to 99%. Laws of many parameters get fewer resamples, to save time.
TABLES = {
    "chinchilla": (100, 50, 200), "kaplan-n": (40, 120, 200), "kaplan-d": (40, 100, 200), "kaplan-c": (40, 120, 200),
    "kaplan-nd": (80, 50, 200), "saturating": (60, 100, 200), "over-training": (100, 50, 200),
    "data-constrained": (120, 50, 120), "moe": (150, 50, 120), "learning-rate": (60, 80, 200), "batch": (60, 100, 200),
    "downstream": (80, 50, 200),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_exact_runs_give_the_exact_law(name):
    known, law = KNOWN[name], find_law(name)
    result = fit(known.table(1, noise=0.0), name, FitOptions(resamples=0))
    assert result.converged
    truth = np.array([known.truth[key] for key in law.parameters])
    found = np.array([result.parameters[key].value for key in law.parameters])
    # Residuals end at rounding, 1e-13 or so; the worst determined directions of a law multiply that by up to 1e8.
    np.testing.assert_allclose(found, truth, rtol=1e-4)


@pytest.mark.parametrize("name", LAWS)
def test_intervals_of_95_percent_cover_the_truth_90_to_99_percent_of_the_time(name):
    known, (rows, seeds, resamples) = KNOWN[name], TABLES[name]
    hits = []
    for seed in range(seeds):
        noise = (0.001, 0.003, 0.01)[seed % 3] if known.noise <= 0.005 else known.noise
        result = fit(known.table(seed, rows=rows, noise=noise), name, FitOptions(resamples=resamples, backtest=False))
        assert result.converged
        found = result.parameters
        hits += [found[key].low <= value <= found[key].high for key, value in known.truth.items()]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_more_resamples_do_not_move_an_interval_much():
    table = KNOWN["chinchilla"].table(0)
    few, many = (fit(table, options=FitOptions(resamples=n, backtest=False)) for n in (500, 2000))
    for name in ("alpha", "beta", "E"):
        a, b = few.parameters[name], many.parameters[name]
        # The 2.5% quantile of 500 is off by about 0.12 of the interval's half.
        assert abs(a.low - b.low) < 0.3 * (b.high - b.low)


def test_the_bootstrap_of_a_run_draws_all_its_points():
    """Points of a run that are equal to each other add nothing: intervals are those of the runs."""
    table = KNOWN["saturating"].table(0)
    thrice = table.take(np.repeat(np.arange(len(table)), 3))
    thrice.text["run"] = [f"r{i // 3:03d}" for i in range(len(thrice))]
    thrice.columns["seed"] = np.tile([1.0, 2.0, 3.0], len(table))
    alone, together = (fit(t, "saturating", FitOptions(resamples=400, backtest=False)) for t in (table, thrice))
    a, b = alone.parameters["alpha"], together.parameters["alpha"]
    assert b.value == pytest.approx(a.value, rel=1e-6)
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=1e-3)
