"""Multi-token prediction against the equations of its paper, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.models.config import ModelConfig
from maxlm.models.losses import next_token_loss
from maxlm.models.mtp import MTPModule
from tests import tiny

# A Llama: what the modules do must not depend on the kind of attention.
MODEL = {**tiny.LLAMA, "mtp_layers": 2}


@pytest.fixture(scope="module")
def set_up():
    run = tiny.config(model=MODEL, loss={"mtp_weight": 0.4}, train={"global_batch_tokens": 96, "seq_len": 24})
    program = tiny.program(run)
    batch = tiny.host_batch(run, 1)
    with jax.set_mesh(program.mesh):
        params = program.init_state().params
        # Norms that scale, so that leaving one out is seen.
        params = jax.tree.map(lambda x: x * 1.5 + 0.05 if x.ndim <= 2 else x, params)
        yield run, program, params, batch


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def negative_log_likelihood(h, head, target):
    logits = h @ head[: MODEL["vocab_size"]].T
    return np.log(np.sum(np.exp(logits))) - logits[target]


def test_the_loss_is_that_of_the_papers_equations(set_up):
    """Equations 21 to 25, a document at a time, of positions whose tokens are all in it. The layers are the module's
    own: each kind is compared with transformers elsewhere."""
    run, program, params, batch = set_up
    on_mesh = tiny.to_mesh(program, batch)
    with jax.set_mesh(program.mesh):
        total, parts = jax.jit(lambda p, b: next_token_loss(program.model, p, b, run.loss))(params, on_mesh)
        module = program.model.bind(params)

        @jax.jit
        def layer(params, k, x_BTD):
            bound = program.model.bind(params)
            from maxlm.models.attention import Context

            positions = jnp.arange(x_BTD.shape[1])[None]
            context = Context(*bound._angles(positions), None)
            return jax.lax.switch(k, [lambda i=i: bound.mtp[str(i)].block(x_BTD, context, None)[0] for i in range(2)])

        trunk = jax.jit(lambda p, b: program.model.bind(p)(b["inputs"], b["positions"], b["segments"]))
        hidden = np.asarray(trunk(params, on_mesh))
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        table, head = arrays["embedding"]["tokens"], arrays["head"]["kernel"]
        length, sums, counted = batch["inputs"].shape[1], [0.0, 0.0], [0, 0]
        for row, segment in [(r, s) for r in range(4) for s in np.unique(batch["segments"][r])]:
            (places,) = np.nonzero(batch["segments"][row] == segment)
            # All tokens of the document: the last one's successor is another's.
            tokens = batch["inputs"][row, places]
            if places[-1] == length - 1 and batch["weights"][row, -1]:
                tokens = np.append(tokens, batch["targets"][row, -1])
            h = hidden[row, places].astype(np.float64)
            for k in (1, 2):
                own = arrays["mtp"][str(k - 1)]
                n = len(tokens) - k  # positions that have a token k ahead
                if n < 1:
                    break
                n = min(n, len(h))
                joined = norm(h[:n], own["hidden_norm"]["scale"]) @ own["hidden_proj"]
                joined += norm(table[tokens[k : k + n]], own["embedding_norm"]["scale"]) @ own["embedding_proj"]
                padded = np.zeros((1, length, joined.shape[1]), np.float32)
                padded[0, :n] = joined
                h = np.asarray(layer(params, k - 1, jnp.asarray(padded)))[0, :n].astype(np.float64)
                h = norm(h, own["norm"]["scale"])
                for i in range(min(n, len(tokens) - k - 1)):
                    sums[k - 1] += negative_log_likelihood(h[i], head, tokens[i + k + 1])
                    counted[k - 1] += 1
    assert min(counted) > 20
    assert float(parts["mtp_sum"]) == pytest.approx(0.4 / 2 * sum(sums), rel=1e-5)
    assert float(total) == pytest.approx(float(parts["nll_sum"] + parts["mtp_sum"]), rel=1e-6)
    assert isinstance(module.mtp["0"], MTPModule)


def test_every_weight_of_the_modules_has_a_gradient_and_the_model_has_theirs_too(set_up):
    run, program, params, batch = set_up
    on_mesh = tiny.to_mesh(program, batch)
    with jax.set_mesh(program.mesh):
        gradient = jax.jit(jax.grad(lambda p, b, loss: next_token_loss(program.model, p, b, loss)[0]), static_argnums=2)
        both, alone = (
            gradient(params, on_mesh, run.loss.model_copy(update={"mtp_weight": weight})) for weight in (0.4, 0.0)
        )
    for path, found in jax.tree_util.tree_leaves_with_path(both["mtp"]):
        assert np.abs(found).max() > 0, path
    assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(alone["mtp"]))
    for name in ("embedding", "decoder", "head"):
        differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), both[name], alone[name])
        assert all(x > 0 for x in jax.tree.leaves(differ))


def test_modules_do_not_go_with_learned_positions():
    with pytest.raises(ValidationError, match="mtp_layers = 1 with positions = 'learned'"):
        ModelConfig(**{**tiny.GPT2, "mtp_layers": 1})
