"""The loss of next sentences: its value, on one device and on a mesh, and that it is learned."""

import jax
import numpy as np
import pytest

from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.data.sentence_pairs import FOLLOWS, Windows
from maxlm.models.losses import last_hidden, next_token_loss
from tests import tiny

MODEL = {**tiny.BERT, "n_layers": 1, "next_sentence_head": True, "init_std": 0.1}
PAIRS = {"objective": {"next_sentence": True}}


def config(mesh=None, **train):
    train = {"steps": 100, "seq_len": 16, "global_batch_tokens": 256, **train}
    return tiny.config(model=MODEL, data=PAIRS, mesh=mesh or {}, train=train, optimizer={"learning_rate": 3e-3})


def batch_of(run, step):
    """Other windows have tokens that these have not, and so tell that a second part does not follow."""
    rows, rng = 16, np.random.default_rng(step)
    first, other = (rng.integers(2, 150, (rows, 17)) + half for half in (0, 148))
    return make_batch(run.objective, first, Marks(0, 1, 299), Draws(0, 0, rows * step + np.arange(rows)), None, None,
                      Windows(other))  # fmt: skip


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=["one device", "fsdp x tensor"])
def test_the_loss_is_the_cross_entropy_of_the_heads_two_logits_by_rows_and_their_targets(mesh):
    run = config(mesh)
    program, batch = tiny.program(run, 4 if mesh else 1), batch_of(run, 0)
    batch["next_sentence"][3] = 0
    with jax.set_mesh(program.mesh):
        params, on_mesh = program.init_state().params, tiny.to_mesh(program, batch)

        @jax.jit
        def losses(params, batch):
            module = program.model.bind(params)
            total, parts = next_token_loss(program.model, params, batch, run.loss)
            return total, parts, module.next_sentence(last_hidden(module, batch)[0])

        total, parts, logits = jax.device_get(losses(params, on_mesh))
    log_p = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(axis=1, keepdims=True))
    asked = batch["next_sentence"][:, 0]
    nll = -np.where(asked == FOLLOWS, log_p[:, 0], log_p[:, 1]) * (asked > 0)
    expected = (nll * batch["weights"].sum(axis=1)).sum()
    assert parts["next_sentence_sum"] == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(parts["nll_sum"] + expected, rel=1e-5)


def test_it_is_learned():
    run = config()
    program, losses = tiny.program(run), []
    with jax.set_mesh(program.mesh):
        state, step = program.init_state(), program.train_step()
        for i in range(80):
            state, metrics = step(state, tiny.to_mesh(program, batch_of(run, i)))
            losses.append(float(metrics["next_sentence_loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)
    assert np.mean(losses[-10:]) < 0.2
