"""Laws: their formulas are those of the papers, and their derivatives those of the formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import KNOWN

from maxlm.scaling.allocation import best_split
from maxlm.scaling.law import not_negative_least_squares
from maxlm.scaling.laws import LAWS, find_law


def inner(name, seed=0):
    """A law, its variables, and inner parameters scattered around the true ones, off any kink."""
    law, known = find_law(name), KNOWN[name]
    columns = known.table(seed, noise=0.0, rows=30).columns
    centre = law.centre(columns)
    natural = np.array([[known.truth[key] for key in law.parameters]])
    theta = law.internal(natural, centre) * np.random.default_rng(seed).uniform(0.9, 1.1, (4, len(law.parameters)))
    return law, columns, centre, law.variables(columns) - centre.variables, theta


def test_every_law_is_tested():
    assert set(KNOWN) == set(LAWS)


@pytest.mark.parametrize("name", LAWS)
def test_predictions_are_the_published_formula(name):
    known, law = KNOWN[name], find_law(name)
    columns = known.table(3, noise=0.0).columns
    natural = np.array([known.truth[key] for key in law.parameters])
    # Rounding of a few exponentials of exponents up to about 20.
    np.testing.assert_allclose(law.predict(natural, columns), columns[known.target], rtol=1e-12)


@pytest.mark.parametrize("name", LAWS)
def test_the_jacobian_is_the_derivative_of_the_prediction(name):
    law, _, _, z, theta = inner(name)
    _, jacobian = law.evaluate(theta, z)
    for at in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, at] = 1e-6 * np.maximum(np.abs(theta[:, at]), 0.1)
        high, low = law.evaluate(theta + step, z)[0], law.evaluate(theta - step, z)[0]
        found = (high - low) / (2 * step[:, at, None])
        # Central differences: h^2 = 1e-12 and rounding / h = 1e-10, relative to the largest derivative.
        np.testing.assert_allclose(jacobian[:, at], found, atol=1e-7 * np.abs(jacobian).max(), rtol=1e-6)


@pytest.mark.parametrize("name", LAWS)
def test_inner_parameters_and_natural_ones_are_each_other_s_inverse(name):
    law, columns, centre, z, theta = inner(name)
    natural = law.natural(theta, centre)
    np.testing.assert_allclose(law.internal(natural, centre), theta, rtol=1e-9, atol=1e-12)
    inside = law.evaluate(theta, z)[0]
    expected = np.exp(inside + centre.target) if law.logarithmic else inside
    np.testing.assert_allclose(law.predict(natural, columns), expected, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_coefficients_of_starts_are_the_least_squares_that_are_not_negative(seed, n_terms):
    from scipy.optimize import nnls

    shapes = np.random.default_rng(seed).normal(0.5, 1.0, (1, n_terms, 12))
    found = not_negative_least_squares(shapes)[0]
    expected, norm = nnls(shapes[0].T, np.ones(12))
    if norm**2 < 12 * (1 - 1e-9):  # else nothing positive is better than 0, and a start needs something
        np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("name", ["chinchilla", "over-training", "kaplan-nd"])
def test_the_split_of_a_budget_is_where_the_loss_is_least_along_it(name):
    law, truth = find_law(name), KNOWN[name].truth
    natural = np.array([[truth[key] for key in law.parameters]])
    for flops in (1e18, 1e24):
        (size,), (tokens,), (loss,) = best_split(law, natural, flops)
        assert size * tokens * 6 == pytest.approx(flops)
        sizes = size * np.exp(np.linspace(-0.5, 0.5, 1001))
        columns = {"n_params": sizes, "n_params_nonembedding": sizes, "n_tokens": flops / 6 / sizes}
        columns["flops"] = np.full_like(sizes, flops)
        losses = law.predict(natural[0], columns)
        assert np.argmin(losses) == 500
        assert losses[500] == pytest.approx(loss, rel=1e-12)
