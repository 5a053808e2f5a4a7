"""The best split of a budget under bounds: against closed forms, brute force, scipy and published figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from maxlm.cli import main
from maxlm.cli_sweep import OPTIMUM_LAW_NAMES
from maxlm.errors import ConfigError
from maxlm.planning.topology import parse_topology
from maxlm.scaling.fitting import fit
from maxlm.scaling.hardware import Hardware
from maxlm.scaling.laws import LAWS
from maxlm.scaling.optimum import OPTIMUM_LAWS, Question, answer, optimum
from maxlm.scaling.result import Estimate, FitOptions, FitResult
from maxlm.scaling.surface import SURFACES, Surface
from maxlm.scaling.table import write_table
from tests.scaling import synthetic
from tests.scaling.synthetic import KNOWN

FORMULAS = {
    "chinchilla": synthetic.chinchilla, "over-training": synthetic.over_training,
    "kaplan-nd": synthetic.kaplan_nd, "data-constrained": synthetic.data_constrained,
}  # fmt: skip
# As printed in Hoffmann et al. (arXiv:2203.15556, section D.3), and with exponents of three digits, which Sardana et
# al. take (arXiv:2401.00448).
PRINTED = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
UNROUNDED = PRINTED | {"alpha": 0.336, "beta": 0.283}


@pytest.fixture(scope="module")
def fits() -> dict[str, FitResult]:
    """A fit of each law that splits a budget, which `of` then gives other parameters."""
    options = FitOptions(resamples=0, backtest=False)
    return {law: fit(KNOWN[law].table(0), law, options) for law in SURFACES}


def of(fitted: FitResult, truth: dict[str, float], samples: np.ndarray | None = None) -> FitResult:
    """The fit as if it had found these parameters, and the bootstrap those samples."""
    nan = float("nan")
    found = {name: Estimate(truth[name], nan, nan) for name in fitted.parameters}
    return replace(fitted, parameters=found, samples=np.empty((0, len(found))) if samples is None else samples)


def spread(law: str, n: int, seed: int) -> np.ndarray:
    """Parameters around the known ones, `[n, p]`: each up to 15% away."""
    truth = np.array([KNOWN[law].truth[name] for name in LAWS[law].parameters])
    return truth * np.random.default_rng(seed).uniform(0.85, 1.15, (n, len(truth)))


def formula(law: str, values: np.ndarray, size, tokens, unique=None):
    """The loss as the paper prints the law, in plain NumPy."""
    sizes = {"n_params": size, "n_params_nonembedding": size}
    named = dict(zip(LAWS[law].parameters, values, strict=True))
    with np.errstate(all="ignore"):
        fresh = tokens if unique is None else np.minimum(unique, tokens)
        return FORMULAS[law](**sizes, n_tokens=tokens, unique_tokens=fresh, **named)


@pytest.mark.parametrize("law", SURFACES)
def test_the_loss_is_the_one_that_the_law_predicts(law):
    natural = spread(law, 5, 1)
    rng = np.random.default_rng(2)
    size, tokens = 10 ** rng.uniform(6, 12, 40), 10 ** rng.uniform(7, 14, 40)
    columns = {"n_params": size, "n_params_nonembedding": size, "n_tokens": tokens, "flops": 6 * size * tokens}
    columns["unique_tokens"] = np.minimum(tokens, 3e10)
    surface = Surface(law, LAWS[law].parameters, natural, unique_tokens=3e10)
    found = surface.loss(np.tile(size, (5, 1)), np.tile(tokens, (5, 1)))
    np.testing.assert_allclose(found, LAWS[law].predict(natural, columns), rtol=1e-10)
    if law != "data-constrained":
        np.testing.assert_allclose(surface.tokens_for(np.tile(size, (5, 1)), found), np.tile(tokens, (5, 1)), rtol=1e-6)


def test_chinchillas_printed_constants_give_the_size_and_tokens_of_gophers_budget(fits):
    """5.76e23 FLOPs. G = (alpha A / (beta B))^(1 / 0.62) = 1.345; N* = G (C / 6)^(0.28 / 0.62); C = 6 N* D*."""
    found = answer(of(fits["chinchilla"], PRINTED), Question(5.76e23)).best
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert found.n_params.value == pytest.approx(g * (5.76e23 / 6) ** (0.28 / 0.62), rel=1e-6)
    assert found.n_params.value == pytest.approx(32.19e9, rel=1e-3)
    assert found.n_tokens.value == pytest.approx(2.982e12, rel=1e-3)
    assert found.loss is not None
    assert found.loss.value == pytest.approx(1.69 + 406.4 / 32.19e9**0.34 + 410.7 / 2.982e12**0.28, rel=1e-5)
    # Approach 3's prediction for this budget in Hoffmann et al., figure 4: 40 billion parameters.
    unrounded = answer(of(fits["chinchilla"], UNROUNDED), Question(5.76e23)).best
    assert unrounded.n_params.value == pytest.approx(40e9, rel=0.1)


def test_serving_two_trillion_tokens_at_13b_quality_takes_a_7b_model_and_17_percent_less(fits):
    """Sardana et al. (arXiv:2401.00448), figure 1: a 7B model in place of a 13B one saves 1.7e22 FLOPs, 17%."""
    both = 0.336 + 0.283
    g = (0.336 * 406.4 / (0.283 * 410.7)) ** (1 / both)
    flops = 6 * (13e9 / g) ** (both / 0.283)
    fitted = of(fits["chinchilla"], UNROUNDED)
    assert answer(fitted, Question(flops)).best.n_params.value == pytest.approx(13e9, rel=1e-6)
    found = answer(fitted, Question(flops, served_tokens=2e12, same_loss=True))
    total = found.best.training_flops.value + found.best.serving_flops.value
    saved = flops + 2 * 13e9 * 2e12 - total
    assert round(found.best.n_params.value / 1e9) == 7
    assert f"{saved:.1e}" == "1.7e+22"
    assert round(100 * saved / (saved + total)) == 17
    (serving,) = found.binding
    assert serving.flops_cost is not None
    assert serving.flops_cost.value == pytest.approx(-saved / (saved + total), rel=1e-6)
    assert found.best.loss is not None
    assert found.plain.loss is not None
    assert found.best.loss.value == found.plain.loss.value


@pytest.mark.parametrize("law", SURFACES)
@pytest.mark.parametrize("seed", range(6))
def test_no_size_within_the_bounds_is_better(fits, law, seed):
    """Every bound at random, against a scan of sizes, and tokens, with the printed formula."""
    rng = np.random.default_rng(seed)
    values = spread(law, 1, seed)[0]
    flops = 10 ** rng.uniform(19, 24)
    plain = answer(of(fits[law], dict(zip(LAWS[law].parameters, values, strict=True))), Question(flops)).best
    n, d = plain.n_params.value, plain.n_tokens.value
    question = Question(
        flops,
        served_tokens=d * 10 ** rng.uniform(-1, 1) if rng.random() < 0.6 else 0.0,
        max_tokens=d * 10 ** rng.uniform(-1, 1) if rng.random() < 0.5 else None,
        max_params=n * 10 ** rng.uniform(-1, 1) if rng.random() < 0.5 else None,
        unique_tokens=d * 10 ** rng.uniform(-1.5, 0.5) if rng.random() < 0.5 else None,
    )
    best = answer(of(fits[law], dict(zip(LAWS[law].parameters, values, strict=True))), question).best
    repeats = law == "data-constrained"
    cap = min(question.max_tokens or np.inf, (None if repeats else question.unique_tokens) or np.inf)
    sizes = np.geomspace(n * 1e-4, n * 1e4, 4001)
    tokens = (flops / sizes - 2 * question.served_tokens) / 6
    losses = []
    for share in (1.0, 0.7, 0.3):  # fewer tokens than the budget has are never better
        used = np.minimum(np.where(tokens > 0, tokens, np.nan) * share, cap)
        losses.append(formula(law, values, sizes, used, question.unique_tokens if repeats else None))
    allowed = sizes <= (question.max_params or np.inf)
    least = np.nanmin(np.where(allowed, losses, np.nan))
    assert best.loss is not None
    unique = question.unique_tokens if repeats else None
    reached = formula(law, values, best.n_params.value, best.n_tokens.value, unique)
    assert best.loss.value == pytest.approx(float(reached), rel=1e-9)
    # The scan's step of 0.5% is at most 1e-6 of the loss away from its minimum; at a bound it may be a step away.
    assert least * (1 - 1e-3) < best.loss.value <= least * (1 + 1e-9)
    assert best.n_params.value <= (question.max_params or np.inf) * (1 + 1e-9)
    assert best.n_tokens.value <= cap * (1 + 1e-9)
    total = best.training_flops.value + best.serving_flops.value
    assert total <= flops * (1 + 1e-9)


@pytest.mark.parametrize("law", ["chinchilla", "over-training", "kaplan-nd"])
def test_the_fewest_flops_for_a_loss_are_what_scipy_finds(fits, law):
    values = spread(law, 1, 3)[0]
    fitted = of(fits[law], dict(zip(LAWS[law].parameters, values, strict=True)))
    plain = answer(fitted, Question(1e22)).best
    assert plain.loss is not None
    n, loss, served = plain.n_params.value, plain.loss.value, 5 * plain.n_tokens.value
    surface = Surface(law, LAWS[law].parameters, values[None])

    def total(log_size: float) -> float:
        size = np.exp(log_size)
        tokens = surface.tokens_for(np.array([size]), np.array([loss]))[0]
        return float(np.log(6 * size * tokens + 2 * size * served)) if np.isfinite(tokens) else 1e3

    grid = np.log(n) + np.linspace(-4, 1, 501)
    start = grid[int(np.argmin([total(x) for x in grid]))]
    truth = minimize_scalar(total, bounds=(start - 0.02, start + 0.02), method="bounded", options={"xatol": 1e-9})
    best = answer(fitted, Question(1e22, served_tokens=served, same_loss=True)).best
    assert np.log(best.training_flops.value + best.serving_flops.value) == pytest.approx(truth.fun, abs=1e-10)
    assert np.log(best.n_params.value) == pytest.approx(truth.x, abs=1e-5)
    assert best.n_params.value < n
    assert best.n_tokens.value > plain.n_tokens.value


def test_a_loss_with_few_tokens_takes_a_larger_model_just_as_large_as_it_must_be(fits):
    fitted = of(fits["chinchilla"], KNOWN["chinchilla"].truth)
    plain = answer(fitted, Question(1e22)).best
    served, cap = 5 * plain.n_tokens.value, 0.6 * plain.n_tokens.value
    found = answer(fitted, Question(1e22, served_tokens=served, same_loss=True, max_tokens=cap))
    e, a, b, alpha, beta = KNOWN["chinchilla"].truth.values()
    assert plain.loss is not None
    size = (a / (plain.loss.value - e - b / cap**beta)) ** (1 / alpha)
    assert found.best.n_tokens.value == pytest.approx(cap, rel=1e-6)
    assert found.best.n_params.value == pytest.approx(size, rel=1e-5)
    tokens = next(each for each in found.binding if each.name == "max_tokens")
    assert tokens.flops_cost is not None
    assert tokens.flops_cost.value > 0


def test_intervals_are_percentiles_of_the_closed_form_over_the_bootstrap(fits):
    samples = spread("chinchilla", 400, 5)
    _, a, b, alpha, beta = samples.T
    sizes = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (1e22 / 6) ** (beta / (alpha + beta))
    found = answer(of(fits["chinchilla"], KNOWN["chinchilla"].truth, samples), Question(1e22)).best
    assert (found.n_params.low, found.n_params.high) == pytest.approx(
        tuple(np.quantile(sizes, (0.025, 0.975))), rel=1e-6
    )
    tokens = np.quantile(1e22 / 6 / sizes, (0.025, 0.975))
    assert (found.n_tokens.low, found.n_tokens.high) == pytest.approx(tuple(tokens), rel=1e-6)


def test_samples_without_an_optimum_are_told_of_and_a_law_without_one_is_refused(fits):
    samples = spread("chinchilla", 50, 6)
    samples[:10, 1] = 0.0  # A: the size does not matter, and the best is the smallest
    found = answer(of(fits["chinchilla"], KNOWN["chinchilla"].truth, samples), Question(1e22))
    assert any("10 of 50 resamples have no optimum" in note for note in found.notes)
    with pytest.raises(ConfigError, match="no optimum: a term is 0"):
        answer(of(fits["chinchilla"], KNOWN["chinchilla"].truth | {"B": 0.0}), Question(1e22))


def test_what_binds_is_named_with_what_it_costs_and_what_does_not_bind_is_not(fits):
    fitted = of(fits["chinchilla"], KNOWN["chinchilla"].truth)
    plain = answer(fitted, Question(1e22))
    n, d = plain.best.n_params.value, plain.best.n_tokens.value
    assert plain.binding == ()
    loose = answer(fitted, Question(1e22, max_params=2 * n, max_tokens=2 * d, unique_tokens=3 * d))
    assert loose.binding == ()
    assert loose.best.n_params.value == pytest.approx(n, rel=1e-6)

    small = answer(fitted, Question(1e22, max_params=n / 4))
    (size,) = small.binding
    truth = np.array(list(KNOWN["chinchilla"].truth.values()))
    assert size.name == "max_params"
    assert size.loss_cost is not None
    cost = formula("chinchilla", truth, n / 4, 4 * d) - formula("chinchilla", truth, n, d)
    assert size.loss_cost.value == pytest.approx(cost, rel=1e-6)
    assert f"at most {n / 4:.4g} parameters; without that {n:.4g} parameters" in size.message

    (tokens,) = answer(fitted, Question(1e22, max_tokens=d / 4)).binding
    assert tokens.name == "max_tokens"
    both = answer(fitted, Question(1e22, max_params=n / 4, max_tokens=d / 4))
    assert [each.name for each in both.binding] == ["max_params", "max_tokens"]
    assert any("6.2% of the budget is used" in note for note in both.notes)


def test_repeated_tokens_are_taken_where_the_law_knows_what_they_are_worth(fits):
    fitted = of(fits["data-constrained"], KNOWN["data-constrained"].truth)
    fresh = answer(fitted, Question(1e22)).best
    few = answer(fitted, Question(1e22, unique_tokens=fresh.n_tokens.value / 10))
    assert few.best.n_tokens.value > 4 * few.question.unique_tokens
    assert "passes over" in few.binding[0].message
    other = answer(of(fits["chinchilla"], KNOWN["chinchilla"].truth), Question(1e22, unique_tokens=1e10))
    assert other.best.n_tokens.value == 1e10
    assert any("knows nothing of repeated tokens" in note for note in other.notes)


def test_power_laws_of_approach_2_move_along_the_budget(fits):
    truth = {"a": 0.5, "b": 0.5, "k_N": 0.1, "k_D": 1 / 0.6}
    parameters = {name: Estimate(value, value, value) for name, value in truth.items()}
    samples = np.array([list(truth.values())])
    found = replace(fits["chinchilla"], law="approach2", parameters=parameters, samples=samples)
    plain = answer(found, Question(1e22)).best
    assert (plain.n_params.value, plain.loss) == (pytest.approx(1e10), None)
    small = answer(found, Question(1e22, max_params=1e9))
    assert small.best.n_tokens.value == pytest.approx(1e22 / 6e9)
    assert "tells no losses" in small.binding[0].message
    short = answer(found, Question(1e22, max_tokens=1e11)).best
    assert short.n_params.value == pytest.approx(1e22 / 6e11)


def test_extrapolation_is_said_by_its_factor(fits):
    fitted = fits["chinchilla"]
    largest = fitted.rows.columns["flops"].max()
    assert answer(fitted, Question(largest / 2)).extrapolation == pytest.approx(0.5)
    assert not any("extrapolating" in note for note in answer(fitted, Question(largest / 2)).notes)
    assert any("are 50 times the table's largest run" in note for note in answer(fitted, Question(50 * largest)).notes)


@pytest.mark.parametrize(
    ("law", "question", "told"),
    [
        ("kaplan-n", Question(1e20), "does not split a budget"),
        ("chinchilla", Question(-1e20), "flops = -1e[+]20: must be"),
        ("chinchilla", Question(1e20, max_tokens=0), "max_tokens = 0: must be"),
        ("approach2", Question(1e20, served_tokens=1e9), "tells no losses"),
        ("chinchilla", Question(1e20, same_loss=True), "give --served-tokens"),
        ("data-constrained", Question(1e20, served_tokens=1e9, same_loss=True), "does not answer --same-loss"),
        ("chinchilla", Question(1e20, served_tokens=1e30), "leave nothing to train with"),
        ("chinchilla", Question(1e20, served_tokens=1e9, same_loss=True, max_params=1e3), "no model within the bounds"),
    ],
)
def test_questions_without_an_answer_are_refused_in_words(law, question, told):
    table = KNOWN["chinchilla" if law not in KNOWN else law].table(0)
    with pytest.raises(ConfigError, match=told):
        optimum(table, question, law, FitOptions(resamples=0, backtest=False))


def test_days_of_hardware_are_chips_times_peak_times_mfu():
    """v5e: 197e12 bfloat16 FLOP/s a chip (Google's page of it); 8 chips for 30 days at 40%."""
    hardware = Hardware(parse_topology("v5e:2x4"), days=30, mfu=0.4)
    assert hardware.flops() == pytest.approx(30 * 86400 * 8 * 197e12 * 0.4)
    assert Hardware(parse_topology("v5e:2x4")).flops() is None


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 160 runs of a known law as CSV."""
    columns = KNOWN["chinchilla"].table(0).columns
    rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return write_table(tmp_path_factory.mktemp("table") / "runs.csv", rows)


def test_the_command_prints_the_optimum_what_binds_and_the_verdict(table, capsys):
    assert main(["sweep", "optimum", str(table), "--flops", "1e22", "--max-params", "2e9", "--resamples", "200"]) == 0
    text = capsys.readouterr().out
    assert "1e+22 FLOPs of training" in text
    assert "the size is bound: at most 2e+09 parameters" in text
    assert "Nothing found speaks against this fit" in text


def test_the_commands_json_has_every_figure(table, capsys):
    command = ["sweep", "optimum", str(table), "--topology", "v5e:2x4", "--days", "3", "--served-tokens", "1e10"]
    assert main([*command, "--resamples", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["optimum"]
    assert found["question"]["flops"] == pytest.approx(3 * 86400 * 8 * 197e12 * 0.4)
    assert "3 days of v5e:2x4 at 40% MFU" in found["question"]["reasons"]["flops"]
    assert best["n_params"]["low"] < best["n_params"]["value"] < best["n_params"]["high"]
    spent = best["training_flops"]["value"] + best["serving_flops"]["value"]
    assert spent == pytest.approx(found["question"]["flops"])
    assert [each["name"] for each in found["binding"]] == ["served_tokens"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no budget: give --flops, or --topology with --days"),
        (["--days", "3"], "name it with --topology"),
        (["--flops", "1e20", "--out", "x.yaml"], "--out needs --config"),
        (["--flops", "1e20", "--topology", "v5e:2x4"], "--topology alone says nothing"),
        (["--config", "llama-20m", "--topology", "v5e:2x4"], "no budget: give --flops, or --days"),
        (["--flops", "1e20", "--topology", "v5e:2x4", "--mfu", "0.5"], "give --days too"),
        (["--flops", "1e20", "--config", "mixtral-8x7b"], "a mixture of experts"),
        (["--flops", "1e8", "--config", "llama3-8b"], "its smallest has"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_words(table, arguments, told, capsys):
    assert main(["sweep", "optimum", str(table), "--resamples", "0", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_commands_laws_are_those_that_split_a_budget():
    assert OPTIMUM_LAW_NAMES == OPTIMUM_LAWS
