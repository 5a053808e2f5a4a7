"""AdamW with a learning rate and an epsilon for each weight, against NumPy with rates written by hand."""

import jax
import numpy as np
import pytest

from maxlm.training.optimizer import make_optimizer
from tests import tiny, tiny_moe

M, DEPTH, RATE, DECAY, EPSILON, BETA1, BETA2 = 4.0, 3.0, 1e-2, 0.1, 1e-3, 0.9, 0.95
# By the last names of a path: the learning rate's factor, epsilon's, and whether the weight decays. Of the table of
# arXiv:2505.01618 with m_N = 4, m_L = 3, alpha = 1.
HIDDEN, VECTOR = (1 / M, 1 / (M * DEPTH), True), (1.0, 1 / (M * DEPTH), False)
BY_HAND = {
    "embedding.tokens": (1.0, 1 / M, True),
    "head.kernel": (1.0, 1 / M, True),
    "head.bias": (1.0, 1.0, False),
    "final_norm.scale": (1.0, 1 / M, False),
    "attention.q": HIDDEN,
    "attention.k": HIDDEN,
    "attention.v": HIDDEN,
    "attention.o": HIDDEN,
    "attention.q_bias": VECTOR,
    "attention.k_bias": VECTOR,
    "attention.v_bias": VECTOR,
    "q_norm.scale": (1.0, 1 / DEPTH, False),
    "k_norm.scale": (1.0, 1 / DEPTH, False),
    "attention_norm.scale": VECTOR,
    "mlp_norm.scale": VECTOR,
    "mlp.up": HIDDEN,
    "mlp.gate": HIDDEN,
    "mlp.down": HIDDEN,
    "experts.up": HIDDEN,
    "experts.gate": HIDDEN,
    "experts.down": HIDDEN,
    "shared.up": HIDDEN,
    "shared.gate": HIDDEN,
    "shared.down": HIDDEN,
    "router.kernel": (1.0, 1 / (M * DEPTH), True),
}
MODEL = {
    **tiny.LLAMA, "head_bias": True, "attention_bias": True, "qk_norm": "head",
    "moe": {"n_experts": 4, "experts_per_token": 2, "d_ff": 32, "n_shared_experts": 1, "first_layer": 1},
}  # fmt: skip
TRANSFER = {"kind": "completep", "base_width": 16, "base_depth": 1}


def by_hand(weight, grads, rate, epsilon, decay):
    """Loshchilov and Hutter's AdamW (arXiv:1711.05101, algorithm 2), whose decay is the learning rate's times the
    base's, whatever the weight's own learning rate."""
    mean = square = np.zeros_like(weight)
    for i, g in enumerate(grads, start=1):
        mean, square = BETA1 * mean + (1 - BETA1) * g, BETA2 * square + (1 - BETA2) * g**2
        step = mean / (1 - BETA1**i) / (np.sqrt(square / (1 - BETA2**i)) + EPSILON * epsilon)
        weight = weight - RATE * rate * step - RATE * DECAY * decay * weight
    return weight


def test_every_weight_has_its_own_rate_and_epsilon_and_all_the_same_decay():
    keys = {"learning_rate": RATE, "weight_decay": DECAY, "epsilon": EPSILON, "beta1": BETA1, "beta2": BETA2}
    run = tiny.config(model={**MODEL, "transfer": TRANSFER}, optimizer=keys)
    program, rng = tiny.program(run), np.random.default_rng(0)
    with jax.set_mesh(program.mesh):
        optimizer = make_optimizer(run.optimizer, program.model)
        shapes = program.abstract_state.params
        params = start = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
        # As small as epsilon, which so bears on every step.
        grads = [jax.tree.map(lambda x: rng.normal(0, 1e-3, x.shape), start) for _ in range(4)]
        state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
        for g in grads:
            updates, state = update(jax.tree.map(np.float32, g), state, params)
            params = jax.tree.map(lambda p, u: p - RATE * np.asarray(u), params, updates)
    used = set()
    for (path, found), weight, *of in zip(
        jax.tree_util.tree_leaves_with_path(params), *map(jax.tree.leaves, [start, *grads]), strict=True
    ):
        name = ".".join(part.key for part in path)
        [end] = [end for end in BY_HAND if name == end or name.endswith(f".{end}")]
        used.add(end)
        rate, epsilon, decay = BY_HAND[end]
        expected = by_hand(np.float64(weight), of, rate, epsilon, decay)
        # float32's rounding of a few steps of 1e-2
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7, err_msg=name)
    assert used == BY_HAND.keys()


@pytest.mark.parametrize("transfer", [None, {"kind": "mup", "base_width": 64}], ids=["none", "the base model"])
def test_without_transfer_there_is_one_rate(transfer):
    program = tiny.program(tiny.config(model={**tiny_moe.MIXTRAL, "transfer": transfer}))
    with jax.set_mesh(program.mesh):
        params = program.abstract_state.params
        state = jax.eval_shape(make_optimizer(program.config.optimizer, program.model).init, params)
    assert len(state) == 2  # AdamW's moments, and the decay: nothing that scales
