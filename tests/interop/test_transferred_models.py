"""Transferred models are exported as plain ones that compute the same, or refused."""

import jax
import numpy as np
import pytest

from maxlm.errors import ConfigError
from maxlm.inference.load import load_run
from maxlm.interop.huggingface import export_run, import_model
from maxlm.models.config import ModelConfig
from maxlm.models.families import family_for
from maxlm.models.losses import token_negative_log_likelihoods
from tests import tiny
from tests.interop import ours, ours_dense, ours_moe

MUP = {"kind": "mup", "base_width": 16, "base_head_dim": 4, "attention_multiplier": 1.25, "output_multiplier": 3.0}
COMPLETEP = {**MUP, "kind": "completep", "base_depth": 2}
MODELS = {
    "llama, a head of its own": {**tiny.LLAMA, "transfer": {**COMPLETEP, "embedding_multiplier": 0.7}},
    "gpt2, tied, biases": {**tiny.GPT2, "transfer": COMPLETEP},
    "olmo2, blocks' results normed": {**ours_dense.OLMO2, "transfer": COMPLETEP},
    "mixtral, routers": {**ours_moe.MODELS["mixtral"], "transfer": MUP},
}


@pytest.mark.parametrize("model", MODELS)
def test_an_exported_model_computes_the_same_without_transfer(model, tmp_path):
    run = ours.make_run(tmp_path / "run", MODELS[model], None)
    export_run(tmp_path / "run", tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "again")
    batch, losses = tiny.host_batch(run, 0), []
    for folder in ("run", "again"):
        here = load_run(tmp_path / folder)
        with jax.set_mesh(here.mesh):
            compute = jax.jit(lambda p, b, here=here: token_negative_log_likelihoods(here.model, p, b, run.loss))
            losses.append(np.asarray(compute(here.params, batch)))
        assert (here.config.model.transfer is None) == (folder == "again")
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "transfer", "message"),
    [
        (tiny.GPT2, {**MUP, "embedding_multiplier": 2.0}, "embedding_multiplier = 2 with model.tied_embeddings"),
        (tiny.BERT, MUP, "norm_placement = 'post'"),
    ],
    ids=["tied embeddings that are scaled", "no last norm"],
)
def test_what_no_weight_can_take_is_refused(model, transfer, message):
    with pytest.raises(ConfigError, match=message):
        family_for(ModelConfig.model_validate({**model, "transfer": transfer}))
