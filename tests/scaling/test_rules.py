"""Rules for learning rate, batch and warm-up against figures worked out by hand from their sources."""

import math

import pytest

from maxlm.scaling.rules import BatchRule, LearningRateRule, Scale, WarmupRule

# A model of 1B parameters without embeddings, 1.1B with, and 100B tokens.
SCALE = Scale(
    n_params=1_100_000_000,
    n_params_nonembedding=1_000_000_000,
    n_tokens=1e11,
    flops=7e20,
    flops_without_head=6e20,
)


def test_published_rules_give_their_sources_figures():
    # Step Law: lg 1.79 - 0.713 x 9 + 0.307 x 11 = -2.787; lg 0.58 + 0.571 x 11 = 6.044.
    assert LearningRateRule(rule="step_law").at(SCALE) == pytest.approx(10**-2.7871, rel=1e-3)
    assert BatchRule(rule="step_law").at(SCALE) == pytest.approx(10**6.0444, rel=1e-3)
    # DeepSeek: lg 0.3118 - 0.125 x 20.7782 = -3.1034; lg 0.2920 + 0.3271 x 20.7782 = 6.2619.
    assert LearningRateRule(rule="deepseek").at(SCALE) == pytest.approx(10**-3.1034, rel=1e-3)
    assert BatchRule(rule="deepseek").at(SCALE) == pytest.approx(10**6.2619, rel=1e-3)
    # Kaplan: 0.003239 - 0.0001395 x 20.7233.
    assert LearningRateRule(rule="kaplan").at(SCALE) == pytest.approx(3.481e-4, rel=1e-3)


def test_the_batch_of_deepseek_67b_is_its_papers():
    """Its table 2: 4608 rows of 4096 a batch and 3.2e-4 for 2T tokens, set by the rule in round numbers."""
    # Its equation 2, 72 n_layer d_model^2 + 12 n_layer d_model l_seq FLOPs a token, with 95 layers of 8192.
    flops = (72 * 95 * 8192**2 + 12 * 95 * 8192 * 4096) * 2e12
    scale = Scale(67_000_000_000, 65_000_000_000, 2e12, flops, flops)
    assert BatchRule(rule="deepseek").at(scale) == pytest.approx(4608 * 4096, rel=0.1)
    assert LearningRateRule(rule="deepseek").at(scale) == pytest.approx(3.2e-4, rel=0.05)


def test_a_power_law_has_its_value_at_its_reference_and_its_exponents_away_from_it():
    rule = LearningRateRule(
        rule="power", value=2e-3, reference_parameters=1.1e9, parameters_exponent=-0.5, reference_tokens=1e11,
        tokens_exponent=0.25, reference_flops=7e20, flops_exponent=0.125,
    )  # fmt: skip
    assert rule.at(SCALE) == 2e-3
    away = Scale(4 * SCALE.n_params, 0, 16e11, 256 * 7e20, 0)
    assert rule.at(away) == pytest.approx(2e-3 / 2 * 2 * 2)
    assert BatchRule(rule="power", value=100, minimum=300).at(SCALE) == 300
    assert BatchRule(rule="power", value=100, multiplier=8, maximum=300).at(SCALE) == 300


def test_warm_up_is_a_fraction_a_models_parameters_or_what_is_given_and_never_too_long():
    assert WarmupRule(value=0.02).at(10**6, 1000, 4096) == 20
    assert WarmupRule(rule="parameters", value=1).at(819_200, 10_000, 4096) == 200
    assert WarmupRule(rule="tokens", value=40_960).at(10**6, 1000, 4096) == 10
    assert WarmupRule(rule="steps", value=500).at(10**6, 1000, 4096) == 200
    assert WarmupRule(rule="parameters", value=math.pi).at(10**9, 10, 4096) == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "power"}, "needs `value`"),
        ({"rule": "deepseek", "value": 1e-3}, "value is of rule 'power'"),
        ({"rule": "kaplan", "reference_tokens": 2.0}, "reference_tokens is of rule 'power'"),
        ({"rule": "kaplan", "minimum": 2.0, "maximum": 1.0}, "minimum = 2 is more than maximum = 1"),
    ],
)
def test_keys_of_another_rule_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        LearningRateRule(**rule)


def test_a_learning_rate_that_a_rule_does_not_have_is_refused():
    with pytest.raises(ValueError, match="'kaplan' gives -"):
        LearningRateRule(rule="kaplan").at(Scale(10**11, 10**11, 1e12, 1e24, 1e24))
