"""The brick transformer: packing, remat, precision, init and decoding, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.losses import next_token_loss, token_negative_log_likelihoods
from tests import latents, tiny, tiny_moe
from tests.interop import ours_dense
from tests.processes import run_processes

BRICKS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "gpt_neox": tiny.GPT_NEOX,
    "multi-query, soft-caps, qk-norm": {
        **tiny.LLAMA, "n_kv_heads": 1, "attention_softcap": 20.0, "logit_softcap": 15.0, "qk_norm": "head"
    },
    "wide heads, geglu, biases": {
        **tiny.LLAMA, "head_dim": 32, "mlp": "geglu", "attention_bias": True, "mlp_bias": True
    },
    "layer norm, squared relu, tied": {**tiny.LLAMA, "norm": "layer", "mlp": "relu2", "tied_embeddings": True},
    "a window, a part of each head turned, by YaRN": {
        **tiny.LLAMA, "attention_window": 6, "rope_fraction": 0.5,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}
    },
    "norms before and after": {**tiny.LLAMA, "norm_placement": "sandwich"},
    "norms of results": {**tiny.LLAMA, "norm_placement": "branch"},
    "norms of sums": {**tiny.GPT2, "norm_placement": "post"},
    "layers of two kinds, each with its RoPE": {
        **tiny.LLAMA, "n_layers": 5, "attention_window": 6, "attention_pattern": ["local", "global"],
        "local_rope_theta": 100.0
    },
    "gemma3": ours_dense.GEMMA3,
    "queries and keys normed over all heads": {**ours_dense.OLMO2, "embedding_norm": True, "norm_unit_offset": True},
    "opt": ours_dense.OPT,
    "bert": tiny.BERT,
    "t5": tiny.T5,
    "bart": tiny.BART,
    "the original Transformer": tiny.TRANSFORMER,
    "bloom": {**ours_dense.BLOOM, "tied_embeddings": False},
    **latents.MODELS,
    "experts in groups, shared ones, balanced by rows": tiny_moe.DEEPSEEK,
    "experts with biases, sinks": tiny_moe.GPT_OSS,
}  # fmt: skip
MESHES = {"fsdp 8": {"fsdp": 8}, "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2}}


def loss_and_gradients(run, n_devices, batch):
    program = tiny.program(run, n_devices)
    with jax.set_mesh(program.mesh):
        params = program.init_state().params
        value_and_grad = jax.jit(
            jax.value_and_grad(lambda params, batch: next_token_loss(program.model, params, batch, run.loss)[0])
        )
        return jax.device_get(value_and_grad(params, tiny.to_mesh(program, batch)))


# In a process of its own, with the compiler as it is for a run: as `conftest.py` has it, it rounds the ends of some
# shards otherwise.
INITS = """
import jax, numpy as np
from tests import tiny
from tests.models.test_transformer import MESHES
expected = None
for mesh, devices in [({}, 1), *((mesh, 8) for mesh in MESHES.values()), ({"data": 8, "fsdp": 1, "zero": 3}, 8)]:
    program = tiny.program(tiny.config(mesh=mesh), devices)
    with jax.set_mesh(program.mesh):
        params = jax.device_get(program.init_state().params)
    expected = expected or params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
"""


@pytest.mark.processes
def test_init_is_bitwise_the_same_on_every_mesh():
    run_processes(1, ["-c", INITS], devices_per_process=8)


@pytest.mark.parametrize("bricks", BRICKS)
def test_a_documents_loss_alone_is_its_loss_inside_a_packed_row(bricks):
    run = tiny.config(model=BRICKS[bricks])
    program = tiny.program(run)
    packed = tiny.host_batch(run, 3)
    with jax.set_mesh(program.mesh):
        params = program.init_state().params
        losses = jax.jit(lambda batch: token_negative_log_likelihoods(program.model, params, batch, run.loss))
        together = np.asarray(losses(tiny.to_mesh(program, packed)))
        checked = 0
        for row, segment in [(r, s) for r in range(6) for s in np.unique(packed["segments"][r])]:
            here = packed["segments"][row] == segment
            n = here.sum()
            alone = {name: np.zeros_like(value) for name, value in packed.items()}
            for name in ("inputs", "targets", "positions", "weights"):
                alone[name][0, :n] = packed[name][row, here]
            alone["segments"][0, :n] = 1
            if "encoder_inputs" in packed:
                there = packed["encoder_segments"][row] == segment
                for name in ("inputs", "positions"):
                    alone[f"encoder_{name}"][0, : there.sum()] = packed[f"encoder_{name}"][row, there]
                alone["encoder_segments"][0, : there.sum()] = 1
            # float32 with other tile boundaries around the same keys
            np.testing.assert_allclose(
                np.asarray(losses(tiny.to_mesh(program, alone)))[0, :n], together[row, here], rtol=2e-5, atol=2e-5
            )
            checked += n
    assert checked == 6 * run.train.seq_len


@pytest.mark.parametrize(
    ("mesh", "bricks"),
    [({}, tiny.LLAMA), ({"data": 2, "fsdp": 2, "tensor": 2}, tiny.LLAMA), ({}, tiny.T5)],
    ids=["one device", "mesh", "encoder-decoder"],
)
def test_remat_policies_give_equal_gradients(mesh, bricks):
    policies = [
        {"policy": "none"},
        {"policy": "full"},
        {"policy": "dots"},
        {"policy": "names", "names": ["q", "flash_out", "flash_lse", "mlp_up"]},
    ]
    batch = tiny.host_batch(tiny.config(model=bricks), 0)
    results = [
        loss_and_gradients(tiny.config(model={**bricks, "remat": p}, mesh=mesh), 8 if mesh else 1, batch)
        for p in policies
    ]
    for found in results[1:]:
        assert found[0] == pytest.approx(results[0][0], rel=1e-6)
        tiny.assert_close(found[1], results[0][1], 1e-5)


def test_remat_keeps_nothing_the_products_or_everything():
    def temporaries(policy):
        run = tiny.config(model={**tiny.LLAMA, "n_layers": 8, "remat": {"policy": policy}})
        program = tiny.program(run)
        with jax.set_mesh(program.mesh):
            step = program.train_step().lower(program.abstract_state, program.abstract_batch).compile()
        return step.memory_analysis().temp_size_in_bytes

    full, dots, none = (temporaries(policy) for policy in ("full", "dots", "none"))
    assert full < 0.6 * none
    assert 1.1 * full < dots < 0.9 * none


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    """FSDP's point: where every activation is kept, and there are few, whole layers of weights still are not."""

    def temporaries(policy):
        run = tiny.config(
            model={**tiny.LLAMA, "n_layers": 16, "d_ff": 2048, "remat": {"policy": policy}},
            mesh={"fsdp": 8},
            precision={"compute": "bfloat16"},
            train={"global_batch_tokens": 64, "seq_len": 8},
        )
        program = tiny.program(run, 8)
        with jax.set_mesh(program.mesh):
            step = program.train_step().lower(program.abstract_state, program.abstract_batch).compile()
        return step.memory_analysis().temp_size_in_bytes

    weights = 16 * 3 * 64 * 2048 * 2
    assert temporaries("none") - temporaries("full") < 0.5 * weights


def test_padding_columns_of_the_vocabulary_have_no_probability():
    run = tiny.config()
    program = tiny.program(run)
    batch = tiny.host_batch(run, 0)
    with jax.set_mesh(program.mesh):
        params = program.init_state().params
        kernel = params["head"]["kernel"]
        padding = jnp.arange(kernel.shape[0])[:, None] >= run.model.vocab_size
        pushed = {**params, "head": {"kernel": jax.jit(lambda k: jnp.where(padding, 50.0, k))(kernel)}}
        loss = jax.jit(lambda params: next_token_loss(program.model, params, tiny.to_mesh(program, batch), run.loss)[0])
        assert float(loss(params)) == float(loss(pushed))


def test_bfloat16_compute_stays_near_float32():
    batch = tiny.host_batch(tiny.config(), 0)
    loss32, _ = loss_and_gradients(tiny.config(), 1, batch)
    loss16, grads = loss_and_gradients(tiny.config(precision={"compute": "bfloat16"}), 1, batch)
    assert loss16 == pytest.approx(loss32, rel=2e-3)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_an_activation_of_the_wrong_rank_is_refused_where_it_is_written():
    from maxlm.parallel.axes import constrain

    with pytest.raises(ValueError, match="logical axes"):
        constrain(jnp.zeros((2, 3)), "batch", "length", "embed")
