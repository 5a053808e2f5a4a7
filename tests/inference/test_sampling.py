"""What may be sampled and how often, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.errors import ConfigError
from maxlm.inference.sampling import Sampling, filtered, sample
from maxlm.parallel.mesh import MeshConfig, make_mesh


def allowed_tokens(logits, sampling):
    """The tokens that may be sampled and their probabilities, one row, by the definitions."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    kept = []
    for i in range(len(order)):
        kept.append(i)
        if sampling.top_p is not None and probabilities[: i + 1].sum() >= sampling.top_p:
            break
    return {int(order[i]): probabilities[i] / probabilities[kept].sum() for i in kept}


def draw(logits_BV, sampling, *, seed=0, rows=None, positions=None, n_devices=1):
    B = len(logits_BV)
    with jax.set_mesh(make_mesh(MeshConfig(data=n_devices, fsdp=1), jax.devices()[:n_devices])):
        chosen = jax.jit(sample, static_argnums=1)(
            jnp.asarray(logits_BV),
            sampling,
            jnp.uint32(seed),
            jnp.arange(B) if rows is None else jnp.asarray(rows),
            jnp.zeros(B, jnp.int32) if positions is None else jnp.asarray(positions),
        )
        return np.asarray(chosen)


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1e-6, top_p=0.5),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=1000),
    Sampling(top_p=0.3),
    Sampling(top_p=0.95),
    Sampling(top_p=1.0),
    Sampling(top_p=1e-6),
    Sampling(temperature=1.7, top_k=9, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_tokens_left_and_their_probabilities_are_those_of_the_definition(sampling):
    logits = np.random.default_rng(1).normal(0, 3, (20, 50)).astype(np.float32)
    values, tokens = (np.asarray(x) for x in filtered(jnp.asarray(logits), sampling))
    for row in range(len(logits)):
        expected = allowed_tokens(logits[row], sampling)
        probabilities = np.asarray(jax.nn.softmax(values[row]))
        found = {int(t): p for t, p in zip(tokens[row], probabilities, strict=True) if p > 0}
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[t] for t in expected], list(expected.values()), rtol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.7)], ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling):
    n = 4000
    logits = np.random.default_rng(2).normal(0, 1.5, 8).astype(np.float32)
    drawn = draw(np.tile(logits, (n, 1)), sampling, rows=np.arange(n))
    expected = allowed_tokens(logits, sampling)
    for token in range(8):
        p = expected.get(token, 0.0)
        assert abs((drawn == token).mean() - p) <= 4.5 * np.sqrt(p * (1 - p) / n), token


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    logits = np.array([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, -1.0, 0.0]], np.float32)
    assert draw(logits, Sampling(temperature=0.0)).tolist() == [1, 0]


def test_a_draw_depends_on_seed_row_and_position_and_on_nothing_else():
    logits = np.random.default_rng(3).normal(0, 1, (8, 64)).astype(np.float32)
    positions = np.arange(8) + 5
    whole = draw(logits, Sampling(), positions=positions)
    halves = [
        draw(logits[i : i + 4], Sampling(), rows=np.arange(i, i + 4), positions=positions[i : i + 4]) for i in (0, 4)
    ]
    assert whole.tolist() == np.concatenate(halves).tolist()
    assert whole.tolist() == draw(logits, Sampling(), positions=positions, n_devices=8).tolist()
    same = np.tile(logits[0], (200, 1))
    for changed in ({"seed": 1}, {"rows": np.arange(200) + 1}, {"positions": np.full(200, 1)}):
        assert (draw(same, Sampling()) != draw(same, Sampling(), **changed)).mean() > 0.5, changed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(ConfigError, match=setting):
        Sampling(**{setting: value})
