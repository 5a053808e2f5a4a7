"""Routers, groups and capacity against float64 NumPy, and the balancing loss against transformers' formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.models.config import ModelConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.moe_losses import balance_loss
from maxlm.models.routing import choose_experts, choose_tokens, load_of, within_capacity
from tests import tiny

RNG = np.random.default_rng(20261121)
B, T, E = 3, 17, 12
LOGITS = RNG.standard_normal((B, T, E)) * 2
BIAS = RNG.standard_normal(E) * 0.3
VALID = np.arange(T)[None] < np.array([17, 9, 1])[:, None]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def moe(**keys):
    return MoEConfig(**{"n_experts": E, "experts_per_token": 3, "d_ff": 8, **keys})


def reference(logits, config, bias):
    """The experts and weights of one token, by the words of the papers: all in float64, one token at a time."""
    scores = {"softmax": softmax(logits), "sigmoid": 1 / (1 + np.exp(-logits)), "topk_softmax": logits}[config.router]
    choice = scores + (0 if bias is None else bias)
    size = E // config.n_groups
    groups = choice.reshape(config.n_groups, size)
    best = 2 if config.router == "sigmoid" else 1
    group_scores = np.sort(groups, axis=1)[:, -best:].sum(axis=1)
    allowed = np.argsort(-group_scores)[: config.groups_per_token]
    candidates = [e for e in np.argsort(-choice) if e // size in allowed]
    experts = candidates[: config.experts_per_token]
    weights = scores[experts]
    if config.router == "topk_softmax":
        weights = softmax(weights)
    elif config.normalize_weights:
        weights = weights / weights.sum()
    return experts, weights * config.routed_scale


CHOICES = {
    "mixtral": (moe(), False),
    "deepseek-v2, groups by their best": (
        moe(n_groups=4, groups_per_token=2, normalize_weights=False, routed_scale=16.0), False
    ),
    "gpt-oss": (moe(router="topk_softmax"), False),
    "deepseek-v3, groups by their two best, biased": (
        moe(router="sigmoid", n_groups=3, groups_per_token=2, routed_scale=2.5, balance_bias_rate=0.001), True
    ),
    "softmax, biased": (moe(balance_bias_rate=0.001), True),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_experts_and_weights_are_those_of_a_float64_reference(case):
    config, biased = CHOICES[case]
    bias = BIAS if biased else None
    f = jax.jit(lambda logits, bias, valid: choose_experts(logits, bias, valid, config))
    experts, weights = map(np.asarray, f(LOGITS.astype(np.float32), None if bias is None else jnp.float32(bias), VALID))
    for b, t in np.ndindex(B, T):
        if not VALID[b, t]:
            assert (experts[b, t] == E).all()
            assert (weights[b, t] == 0).all()
            continue
        expected_experts, expected_weights = reference(LOGITS[b, t], config, bias)
        assert experts[b, t].tolist() == expected_experts
        np.testing.assert_allclose(weights[b, t], expected_weights, rtol=2e-6)
    load = np.asarray(load_of(jnp.asarray(experts), E))
    np.testing.assert_array_equal(load, [[(experts[b] == e).sum() for e in range(E)] for b in range(B)])


def test_the_balancing_bias_has_no_gradient_and_weights_have_that_of_their_scores():
    config = moe(router="sigmoid", normalize_weights=False, balance_bias_rate=0.001)
    logits = jnp.asarray(LOGITS, jnp.float32)

    def total(logits, bias):
        return jnp.sum(choose_experts(logits, bias, VALID, config)[1])

    dlogits, dbias = jax.jit(jax.grad(total, (0, 1)))(logits, jnp.asarray(BIAS, jnp.float32))
    assert not np.asarray(dbias).any()
    sigmoid = 1 / (1 + np.exp(-LOGITS))
    chosen = np.zeros((B, T, E))
    for b, t in np.argwhere(VALID):
        chosen[b, t, reference(LOGITS[b, t], config, BIAS)[0]] = 1
    np.testing.assert_allclose(dlogits, chosen * sigmoid * (1 - sigmoid), atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 100.0])
def test_each_expert_takes_the_first_tokens_of_a_row_up_to_its_capacity(factor):
    config = moe(capacity_factor=factor)
    experts = np.argsort(-LOGITS, axis=-1)[..., :3].astype(np.int32)
    experts[~VALID] = E
    found = np.asarray(jax.jit(lambda x: within_capacity(x, config))(experts))
    capacity = int(np.ceil(factor * T * 3 / E))
    dropped = 0
    for b in range(B):
        taken = np.zeros(E + 1, int)
        for t, a in np.ndindex(T, 3):
            expert = experts[b, t, a]
            full = expert < E and taken[expert] >= capacity
            assert found[b, t, a] == (E if full else expert)
            taken[expert] += 1
            dropped += full
    assert (dropped > 0) == (factor < 2)


def test_experts_choose_their_best_tokens_of_each_row_and_never_padding():
    config = moe(router="expert_choice", experts_per_token=2)
    tokens, weights = map(np.asarray, jax.jit(lambda x: choose_tokens(x, VALID, config))(LOGITS.astype(np.float32)))
    scores = softmax(LOGITS)
    capacity = -(-T * 2 // E)
    assert tokens.shape == (B, E, capacity)
    for b, e in np.ndindex(B, E):
        n = min(capacity, VALID[b].sum())
        best = [t for t in np.argsort(-scores[b, :, e]) if VALID[b, t]][:n]
        assert tokens[b, e, :n].tolist() == best
        np.testing.assert_allclose(weights[b, e, :n], scores[b, best, e], rtol=2e-6)
        assert not weights[b, e, n:].any()


def test_the_balancing_loss_is_the_number_of_choices_when_even_and_grows_to_the_number_of_experts():
    even = balance_loss(jnp.full(8, 25.0), jnp.full(8, 12.5), jnp.float32(100))
    assert float(even) == pytest.approx(2)
    one = jnp.zeros(8).at[3].set(100.0)
    assert float(balance_loss(one, one, jnp.float32(100))) == pytest.approx(8)


def test_the_balancing_loss_is_that_of_transformers_for_one_layer():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = LOGITS.astype(np.float32)
    expected = load_balancing_loss_func((torch.from_numpy(logits.reshape(-1, E)),), E, 3, torch.from_numpy(VALID))
    experts, _ = choose_experts(jnp.asarray(logits), None, jnp.asarray(VALID), moe())
    load = load_of(experts, E).sum(0).astype(jnp.float32)
    probability = jnp.where(VALID[..., None], jax.nn.softmax(logits), 0).sum((0, 1))
    assert float(balance_loss(load, probability, jnp.float32(VALID.sum()))) == pytest.approx(float(expected), rel=1e-6)


def test_groups_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import DeepseekV2Config, DeepseekV3Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"hidden_size": E, "n_routed_experts": E, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    made = {
        "softmax": DeepseekV2TopkRouter(
            DeepseekV2Config(**sizes, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
        ),
        "sigmoid": DeepseekV3TopkRouter(DeepseekV3Config(**sizes, routed_scaling_factor=2.5, norm_topk_prob=True)),
    }
    x = LOGITS.astype(np.float32).reshape(-1, E)
    for kind, router in made.items():
        with torch.no_grad():
            router.weight.copy_(torch.eye(E))
            if kind == "sigmoid":
                router.e_score_correction_bias.copy_(torch.from_numpy(BIAS.astype(np.float32)))
            _, their_weights, their_experts = router(torch.from_numpy(x))
        v3 = kind == "sigmoid"
        config = moe(
            router=kind, n_groups=4, groups_per_token=2, routed_scale=2.5 if v3 else 16.0, normalize_weights=v3,
            balance_bias_rate=0.0 if v3 else None,
        )  # fmt: skip
        bias = jnp.asarray(BIAS, jnp.float32) if v3 else None
        experts, weights = choose_experts(jnp.asarray(x)[None], bias, jnp.ones((1, len(x)), bool), config)
        dense = np.zeros((len(x), E)), np.zeros((len(x), E))
        for n in range(len(x)):
            dense[0][n, np.asarray(experts)[0, n]] = np.asarray(weights)[0, n]
            dense[1][n, their_experts[n].numpy()] = their_weights[n].numpy()
        np.testing.assert_allclose(*dense, rtol=2e-6)


# What is refused: the keys of the section, and what the message says.
REFUSED = {
    "more than there are": ({"experts_per_token": 13}, "experts_per_token = 13 is more than n_experts = 12"),
    "groups of unequal size": ({"n_groups": 5}, "n_experts = 12 is not a multiple of n_groups = 5"),
    "more groups than there are": ({"n_groups": 2, "groups_per_token": 3}, "groups_per_token = 3 is more than"),
    "groups too small": ({"n_groups": 6, "experts_per_token": 3}, "more than the 2 experts in groups_per_token = 1"),
    "two of one": ({"n_groups": 12, "groups_per_token": 3, "router": "sigmoid"}, "scores a group by two experts"),
    "no sum to divide by": ({"normalize_weights": False, "router": "topk_softmax"}, "normalize_weights = false"),
    "capacity twice": ({"capacity_factor": 1.0, "router": "expert_choice"}, "capacity_factor is given"),
    "balance of what is even": ({"balance_loss": 0.1, "router": "expert_choice"}, "balance_loss is given"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_routing_that_cannot_be_is_refused_by_name(case):
    keys, message = REFUSED[case]
    with pytest.raises(ValidationError) as caught:
        moe(**keys)
    assert message in str(caught.value)


def test_layers_with_experts_are_those_that_the_config_says():
    def kinds(n_layers, **keys):
        section = {"n_experts": 4, "experts_per_token": 2, "d_ff": 8, **keys}
        config = ModelConfig(**{**tiny.LLAMA, "n_layers": n_layers, "moe": section})
        return [kind.experts for kind in config.layer_kinds]

    assert kinds(3) == [True] * 3
    assert kinds(5, first_layer=2) == [False, False, True, True, True]
    assert kinds(5, first_layer=1, every=2) == [False, True, False, True, False]
    with pytest.raises(ValidationError, match=r"moe.first_layer = 3 is behind the last of n_layers = 3"):
        kinds(3, first_layer=3)
