"""Tables that should not be believed: each is flagged in words, and none is fitted silently."""

import numpy as np
import pytest
from synthetic import KNOWN, chinchilla

from maxlm.errors import ConfigError, DataError
from maxlm.scaling.fitting import fit
from maxlm.scaling.result import FitOptions
from maxlm.scaling.table import RunTable

QUICK = FitOptions(resamples=100)
TRUTH = KNOWN["chinchilla"].truth


def clean(rows=120, seed=0):
    return KNOWN["chinchilla"].table(seed, rows=rows, noise=0.003)


def made(size, tokens, noise=0.003):
    size, tokens = np.broadcast_arrays(np.asarray(size, float), np.asarray(tokens, float))
    error = noise * np.random.default_rng(0).standard_normal(len(size))
    return RunTable({"n_params": size, "n_tokens": tokens, "loss": chinchilla(size, tokens, **TRUTH) * np.exp(error)})


def kinds(result):
    return {finding.kind for finding in result.findings}


def said(result, *words):
    return any(all(word in warning for word in words) for warning in result.warnings)


def test_a_good_table_is_trusted():
    result = fit(clean(), options=QUICK)
    assert result.trusted
    assert result.warnings == []
    assert "Nothing found speaks against" in result.verdict


def test_outliers_are_named_and_hardly_move_the_fit():
    table = clean()
    loss = table.columns["loss"].copy()
    loss[[5, 60, 77]] *= (1.3, 0.8, 1.2)
    result = fit(table.with_column("loss", loss), options=QUICK)
    assert said(result, "lines 6, 61, 78", "outliers")
    before = fit(table, options=QUICK)
    for name in ("alpha", "beta"):
        inside = before.parameters[name]
        assert inside.low <= result.parameters[name].value <= inside.high


def test_one_budget_is_not_trusted():
    size = np.geomspace(1e8, 1e10, 60)
    result = fit(made(size, 1e21 / 6 / size), options=QUICK)
    assert not result.trusted
    assert said(result, "one budget", "cannot be told apart")


def test_one_size_is_not_trusted():
    result = fit(made(1e9, np.geomspace(1e9, 1e12, 60)), options=QUICK)
    assert not result.trusted
    assert said(result, "one size")
    assert said(result, "flat direction", "E and A")
    assert "Do not trust" in result.verdict


def test_one_ratio_of_tokens_to_parameters_is_not_trusted():
    size = np.geomspace(1e8, 1e10, 60)
    result = fit(made(size, 20 * size), options=QUICK)
    assert not result.trusted
    assert said(result, "N and D rise together")


def test_losses_that_are_no_numbers_are_left_out_by_name():
    table = clean()
    loss = table.columns["loss"].copy()
    loss[[2, 3]] = np.nan, np.inf
    result = fit(table.with_column("loss", loss), options=QUICK)
    assert len(result.rows) == 118
    assert said(result, "lines 3, 4", "left out")
    expected = fit(table.take(np.r_[:2, 4:120]), options=QUICK)
    assert result.parameters["alpha"].value == expected.parameters["alpha"].value


def test_a_table_without_a_single_loss_is_refused():
    table = clean()
    with pytest.raises(DataError, match="no row can be fitted"):
        fit(table.with_column("loss", np.full(120, np.nan)))


def test_duplicated_rows_count_once():
    table = clean()
    twice = table.take(np.r_[:120, 7, 8, 9])
    result = fit(twice, options=QUICK)
    assert len(result.rows) == 120
    assert said(result, "lines 8, 9, 10", "equal in every column")
    assert result.objective == fit(table, options=QUICK).objective


def test_flops_that_contradict_6nd_are_flagged():
    table = clean()
    flops = 6 * table.columns["n_params"] * table.columns["n_tokens"]
    flops[11] *= 8
    assert said(fit(table.with_column("flops", flops), options=QUICK), "line 12", "contradict 6ND")


def test_few_rows_are_flagged_and_fewer_refused():
    assert said(fit(clean(12), options=QUICK), "few rows: 12 for 5 parameters")
    with pytest.raises(DataError, match="chinchilla has 5 parameters and needs more rows"):
        fit(clean(5))


def test_a_narrow_range_is_flagged():
    size = np.geomspace(1e9, 2e9, 40)
    result = fit(made(size, np.tile(np.geomspace(1e9, 1e12, 8), 5)), options=QUICK)
    assert said(result, "narrow", "size is only 2 times the smallest")
    assert not result.trusted


def test_losses_that_no_law_describes_are_flagged():
    table = clean()
    result = fit(table.with_column("loss", np.random.default_rng(1).uniform(2, 4, 120)), options=QUICK)
    assert not result.trusted
    assert said(result, "does not describe these runs")


def test_a_bound_that_is_hit_is_named():
    size, tokens = clean().columns["n_params"], clean().columns["n_tokens"]
    result = fit(RunTable({"n_params": size, "n_tokens": tokens, "loss": 3 * (size / 1e9) ** 0.1}), options=QUICK)
    assert said(result, "A is at its lower bound, 0")
    assert not result.trusted


def test_data_that_was_never_repeated_does_not_tell_what_repeating_costs():
    table = clean()
    result = fit(table.with_column("unique_tokens", table.columns["n_tokens"]), "data-constrained", QUICK)
    assert said(result, "no run repeats its data")
    assert not result.trusted


def test_budgets_far_beyond_the_table_are_called_extrapolation():
    result = fit(clean(), options=FitOptions(resamples=100, budgets=(1e26,)))
    assert said(result, "extrapolating", "1e+26 FLOPs")
    assert result.optimum[0].flops == 1e26


def test_the_back_test_tells_when_the_largest_runs_do_not_follow():
    """Above 1e22 FLOPs the loss of this table stops falling, as of a model that repeats its data."""
    table = clean()
    flops = 6 * table.columns["n_params"] * table.columns["n_tokens"]
    floor = np.where(flops > np.quantile(flops, 0.9), 1.08, 1.0)
    result = fit(table.with_column("loss", table.columns["loss"] * floor), options=QUICK)
    assert result.backtest is not None
    assert result.backtest.mean_error == pytest.approx(1 / 1.08 - 1, abs=0.01)
    assert said(result, "back-test", "missed by")
    assert not result.trusted


def test_the_back_test_of_a_law_that_holds_is_within_its_noise():
    result = fit(clean(240), options=QUICK)
    assert result.backtest is not None
    assert len(result.backtest.held_out) == 24
    assert abs(result.backtest.mean_error) < 0.005


def test_an_unknown_law_names_the_laws():
    with pytest.raises(ConfigError, match="no law 'gopher'; there are chinchilla, kaplan-n"):
        fit(clean(), "gopher")
