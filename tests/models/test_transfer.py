"""Transfer of hyperparameters in the model: what scales, by how much, and what is refused."""

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.models.config import ModelConfig
from maxlm.models.losses import next_token_loss
from maxlm.models.transfer import epsilon_factor
from tests import latents, tiny, tiny_moe
from tests.interop import ours_dense

MUP = {"kind": "mup", "base_width": 64}
COMPLETEP = {"kind": "completep", "base_width": 64, "base_depth": 3}
# A model of d_model 64, 3 layers and heads of 16 as one that is 4 times as wide, 3 times as deep, its heads twice.
GROWN = {"kind": "completep", "base_width": 16, "base_depth": 1, "base_head_dim": 8}


def lowered(model):
    program = tiny.program(tiny.config(model=model))
    with jax.set_mesh(program.mesh):
        return program.lower().as_text()


@pytest.mark.parametrize("transfer", [MUP, COMPLETEP], ids=["mup", "completep"])
def test_the_base_models_program_is_that_without_transfer(transfer):
    plain = lowered(tiny.LLAMA)
    assert lowered({**tiny.LLAMA, "transfer": transfer}) == plain
    assert lowered({**tiny.LLAMA, "transfer": {**transfer, "base_width": 32}}) != plain


def test_initial_weights_are_scaled_by_what_they_are():
    """tables 8 of arXiv:2203.03466 and 1 of arXiv:2505.01618, with m = 4 and l = 3"""
    run = tiny.config(model={**tiny_moe.MIXTRAL, "transfer": GROWN, "init_std": 0.1})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        params = jax.device_get(program.init_state().params)
    layer = params["decoder"]["0"]
    into_stream = 0.1 / 2 / 2**0.5  # GPT-2's factor is of the base model's one layer
    expected = [
        (params["embedding"]["tokens"], 0.1),
        (params["head"]["kernel"], 0.1),
        (layer["moe"]["router"]["kernel"], 0.1),
        *((layer["attention"][name], 0.05) for name in "qkv"),
        *((layer["moe"]["experts"][name], 0.05) for name in ("up", "gate")),
        (layer["attention"]["o"], into_stream),
        (layer["moe"]["experts"]["down"], into_stream),
    ]
    for weight, std in expected:
        # The standard error of a deviation from n values is 1 / sqrt(2 n) of it: 4 of them.
        assert weight.std() == pytest.approx(std, rel=4 / (2 * weight.size) ** 0.5)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, None),  # heads as wide as the base's: 1 / sqrt(head_dim)
        ({"base_head_dim": 4}, 4**0.5 / 16),  # 1 / head_dim, and 1 / sqrt(head_dim) at the base
        ({"base_head_dim": 4, "attention_multiplier": 3.0}, 3 * 4**0.5 / 16),
        ({"attention_multiplier": 3.0}, 3 / 4),
    ],
)
def test_scores_are_over_the_heads_width_and_as_before_at_the_base(keys, scale):
    config = ModelConfig.model_validate({**tiny.LLAMA, "transfer": {**MUP, "base_width": 16, **keys}})
    assert config.score_scale == (None if scale is None else pytest.approx(scale))


def test_a_given_scale_of_scores_is_the_base_models():
    transfer = {**MUP, "base_head_dim": 10}
    assert ModelConfig.model_validate({**tiny.T5, "transfer": transfer}).score_scale == pytest.approx(0.5)


def test_multipliers_do_what_a_hand_does_to_the_weights():
    """On the same parameters, the loss is that of a plain model whose arrays are multiplied by hand."""
    transfer = {**GROWN, "base_head_dim": 4, "attention_multiplier": 1.5, "output_multiplier": 3.0}
    transfer |= {"embedding_multiplier": 2.5}
    model = {**tiny_moe.DEEPSEEK, "moe": {**tiny_moe.DEEPSEEK["moe"], "z_loss": 0.0, "balance_loss": 0.0}}
    scaled, plain = tiny.config(model={**model, "transfer": transfer}), tiny.config(model=model)
    program, other = tiny.program(scaled), tiny.program(plain)
    batch = tiny.host_batch(plain, 0)
    by_hand = {"embedding.tokens": 2.5, "head.kernel": 3 / 4, "router.kernel": 1 / 4, "attention.q": 1.5 * 4**0.5 / 4}
    by_hand |= {"attention.o": 1 / 3, "mlp.down": 1 / 3, "experts.down": 1 / 3, "shared.down": 1 / 3}

    def multiplied(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return x * next((factor for end, factor in by_hand.items() if name.endswith(end)), 1.0)

    with jax.set_mesh(program.mesh):
        params = jax.tree.map(lambda x: x * 4, program.init_state().params)
        loss = jax.jit(
            lambda params: next_token_loss(program.model, params, tiny.to_mesh(program, batch), scaled.loss)[0]
        )
        hand = jax.jit(lambda params: next_token_loss(other.model, params, tiny.to_mesh(other, batch), plain.loss)[0])
        found, expected = float(loss(params)), float(hand(jax.tree_util.tree_map_with_path(multiplied, params)))
        without = float(hand(params))
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - without) > 1e-2 * abs(without)


def test_a_transferred_model_learns_alike_on_one_device_and_on_a_mesh():
    keys = {"model": {**tiny.LLAMA, "transfer": {**GROWN, "embedding_multiplier": 2.0}}}
    one, _ = tiny.train_losses(tiny.config(**keys), 1, 2)
    mesh, _ = tiny.train_losses(tiny.config(**keys, mesh={"data": 2, "fsdp": 2, "tensor": 2}), 8, 2)
    # AdamW's first steps are signs of gradients, of which those near 0 turn over with the order of sums.
    np.testing.assert_allclose(mesh, one, rtol=2e-5)


def test_epsilon_follows_the_size_of_gradients():
    """Root mean square gradients of a model 16 times as wide and 8 times as deep, at the start, weight by weight."""
    base = {**tiny.LLAMA, "n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64, "init_std": 0.1}
    base |= {"head_bias": True, "attention_bias": True, "qk_norm": "head", "residual_init_scaling": False}
    wide = {**base, "n_layers": 8, "d_model": 512, "n_heads": 32, "n_kv_heads": 32, "d_ff": 1024}
    wide |= {"transfer": {"kind": "completep", "base_width": 32, "base_depth": 1}}

    def sizes(model):
        program = tiny.program(run := tiny.config(model=model, train={"global_batch_tokens": 128}))
        with jax.set_mesh(program.mesh):
            batch, params = tiny.to_mesh(program, tiny.host_batch(run, 0)), program.init_state().params
            loss = lambda params: next_token_loss(program.model, params, batch, run.loss)[0]  # noqa: E731
            grads = jax.device_get(jax.jit(jax.grad(loss))(params))
        return jax.tree.map(lambda g: float(np.sqrt(np.mean(np.square(g)))), grads), program.model

    small, (large, model) = sizes(base)[0], sizes(wide)
    axes = jax.tree.leaves(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    arrays = zip(jax.tree_util.tree_leaves_with_path(small), jax.tree.leaves(large), axes, strict=True)
    for (path, a), b, logical in arrays:
        names = tuple(part.key for part in path)
        factor = epsilon_factor(model.config, names, logical)
        # A head's norm is shared by all heads, whose gradients add up as noise at the start, later perhaps in step.
        noise = 1 / 16**0.5 if names[-2] in ("q_norm", "k_norm") else 1.0
        assert factor in ((1 / 8,) if noise < 1 else (1, 1 / 16, 1 / 128))
        # Nearer to it than to the others.
        assert noise / 8**0.5 < b / a / factor < 8**0.5, names


REFUSED = {
    "mup with a depth": (tiny.LLAMA, {**MUP, "base_depth": 2}, "mup has none"),
    "completep without": (tiny.LLAMA, {"kind": "completep", "base_width": 64}, "completep needs it"),
    "scaled embeddings": ({**tiny.LLAMA, "embedding_scale": True}, MUP, "transfer.embedding_multiplier to sqrt"),
    "latent attention": (latents.DEEPSEEK_V3, MUP, "transfer with latent"),
    "sentences": ({**tiny.BERT, "next_sentence_head": True}, MUP, "next_sentence_head"),
    "normed streams in depth": (tiny.BERT, COMPLETEP, "norm_placement = 'post'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_transferred_is_refused_by_name(case):
    model, transfer, message = REFUSED[case]
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**model, "transfer": transfer})


@pytest.mark.parametrize("model", [tiny.BERT, tiny.GPT2, ours_dense.OLMO2], ids=["bert", "gpt2", "olmo2"])
def test_other_bricks_take_mup(model):
    assert ModelConfig.model_validate({**model, "transfer": {**MUP, "base_width": 16}}).scales.output == 1 / 4
