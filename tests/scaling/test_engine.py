"""The engine: it ends at the minimum that others find, and says so truthfully."""

import numpy as np
import pytest
from scipy import optimize
from synthetic import KNOWN

from maxlm.scaling.engine import TOLERANCE, minimise
from maxlm.scaling.fitting import solve
from maxlm.scaling.laws import find_law
from maxlm.scaling.losses import Huber

DELTA = 1e-3


def problem(name="chinchilla", rows=240, noise=0.003, seed=0):
    law = find_law(name)
    columns = KNOWN[name].table(seed, rows=rows, noise=noise).columns
    return law, columns, solve(law, columns, "huber", DELTA)


def huber_of(columns, reduce):
    """The objective of Hoffmann et al. over (log E, log A, log B, alpha, beta), and its gradient, in plain NumPy."""
    n, d, y = (np.log(columns[name]) for name in ("n_params", "n_tokens", "loss"))

    def value(x):
        e, a, b, alpha, beta = x
        parts = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
        f = np.logaddexp.reduce(parts, axis=0)
        r, share = f - y, np.exp(parts - f)
        size = np.abs(r)
        loss = np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))
        jacobian = np.stack([share[0], share[1], share[2], -n * share[1], -d * share[2]])
        return reduce(loss), jacobian @ np.clip(r, -DELTA, DELTA) / (len(n) if reduce is np.mean else 1)

    return value


@pytest.mark.parametrize("noise", [0.001, 0.01])
def test_scipy_finds_nothing_lower_from_any_of_its_starts(noise):
    _, columns, found = problem(noise=noise, rows=120)
    value = huber_of(columns, np.sum)
    starts = [(e, a, b, x, x) for e in (0.0, 0.5) for a in (5, 10) for b in (5, 10) for x in (0.3, 0.6)]
    lowest = min(
        optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9}).fun for start in starts
    )
    ours = found.minima.objective[found.best]
    assert ours <= lowest * (1 + 1e-9)
    E, A, B, alpha, beta = found.natural
    # The same point in the other's words has the same objective, to the rounding of logarithms of 1e3 over 1e10^0.3.
    assert value((np.log(E), np.log(A), np.log(B), alpha, beta))[0] == pytest.approx(ours, rel=1e-8)


def test_a_mean_with_default_tolerances_stops_where_it_starts_and_ours_does_not():
    """The known trap. Runs follow the published re-fit; the start is what Hoffmann et al. published."""
    law, columns, found = problem()
    start = np.array([np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28])
    summed = huber_of(columns, np.sum)
    trapped = optimize.minimize(huber_of(columns, np.mean), start, jac=True, method="L-BFGS-B")
    best = found.minima.objective[found.best]
    assert trapped.success
    assert np.abs(trapped.x - start).max() < 0.01
    assert summed(trapped.x)[0] > 3 * best

    natural = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])
    fitted = found.fitted
    ours = minimise(law, fitted.z, fitted.y, np.ones(240), law.internal(natural, found.centre), "huber", DELTA)
    assert ours.converged[0]
    assert ours.objective[0] == pytest.approx(best, rel=1e-9)
    assert np.abs(law.natural(ours.theta, found.centre)[0, 3:] - (0.34, 0.28)).max() > 0.01


def test_least_absolute_deviations_are_those_of_linear_programming():
    """A power law is linear in logarithms, so that its LAD fit is a linear program with a known optimum."""
    law, columns, _ = problem("kaplan-n", rows=41, noise=0.01)
    found = solve(law, columns, "lad", DELTA)
    x, y = np.log(columns["n_params_nonembedding"]), np.log(columns["loss"])
    design = np.stack([np.ones_like(x), -x], axis=1)
    both = np.hstack([np.vstack([design, -design]), -np.tile(np.eye(41), (2, 1))])
    program = optimize.linprog(
        np.r_[0, 0, np.ones(41)], A_ub=both, b_ub=np.r_[y, -y], bounds=[(None, None)] * 2 + [(0, None)] * 41
    )
    assert found.minima.converged[found.best]
    # The last smoothing leaves at most 41 x 1e-7 / 2 between the two, of an objective of about 0.3.
    assert found.minima.objective[found.best] == pytest.approx(program.fun, rel=1e-5)


def test_squares_are_scipy_s_least_squares():
    law, columns, _ = problem("saturating", rows=60)
    found = solve(law, columns, "squared", DELTA)

    def residuals(x):
        return np.log(x[0] + np.exp(x[1]) * columns["n_params"] ** -x[2]) - np.log(columns["loss"])

    theirs = optimize.least_squares(residuals, (1.5, 4.0, 0.3), x_scale=(1, 1, 0.1), ftol=1e-15, xtol=1e-15, gtol=1e-15)
    assert found.minima.objective[found.best] == pytest.approx(theirs.cost, rel=1e-9)
    assert found.natural[2] == pytest.approx(theirs.x[2], rel=1e-6)


def test_converged_means_that_the_gradient_is_gone():
    """By central differences of the objective itself, in units of what the terms of its sum would give."""
    law, _, found = problem()
    fitted, loss = found.fitted, Huber(DELTA)
    _, jacobian = law.evaluate(fitted.theta[None], fitted.z)
    for at in range(5):
        step = np.zeros(5)
        step[at] = 1e-6
        high, low = (
            np.sum(loss.value(law.evaluate((fitted.theta + sign * step)[None], fitted.z)[0][0] - fitted.y))
            for sign in (1, -1)
        )
        size = np.sum(np.abs(jacobian[0, at] * loss.slope(found.residuals)))
        # Differences of an objective of 4e-4 are rounded at 1e-19 / 1e-6; curvature adds step x jumps of the slope.
        assert abs(high - low) / 2e-6 < 1e-4 * size
    assert found.minima.gradient[found.best] <= TOLERANCE


def test_problems_side_by_side_are_the_problems_one_by_one():
    law, _, found = problem(rows=60)
    fitted = found.fitted
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=7).astype(float)
    starts = np.repeat(fitted.theta[None], 7, axis=0)
    together = minimise(law, fitted.z, fitted.y, weights, starts, "huber", DELTA)
    for at in range(7):
        alone = minimise(law, fitted.z, fitted.y, weights[at], starts[at : at + 1], "huber", DELTA)
        assert together.objective[at] == pytest.approx(alone.objective[0], rel=1e-10)
    assert together.converged.all()


def test_a_weight_of_two_is_the_row_twice():
    law, _, found = problem(rows=40)
    fitted, weights = found.fitted, np.ones(40)
    weights[:5] = 2
    one = minimise(law, fitted.z, fitted.y, weights, fitted.theta[None], "huber", DELTA)
    z, y = np.vstack([fitted.z, fitted.z[:5]]), np.concatenate([fitted.y, fitted.y[:5]])
    two = minimise(law, z, y, np.ones(45), fitted.theta[None], "huber", DELTA)
    assert one.objective[0] == pytest.approx(two.objective[0], rel=1e-10)
    np.testing.assert_allclose(one.theta, two.theta, rtol=1e-6)
