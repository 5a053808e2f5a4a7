"""Imported models against logits and text that `transformers` gave (`make_golden.py`), without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.inference.generate import generate
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.huggingface import import_model
from maxlm.kernels.cross_entropy import logits
from tests.interop import public
from tests.interop.make_golden import NEW_TOKENS, tokens
from tests.interop.public import CASES


def our_logits(run, ids):
    """Logits `[B, T, vocab]` of a loaded run."""
    module = run.model.bind(run.params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    x_BTD = module(jnp.asarray(ids, jnp.int32), positions, None)
    config = run.model.config
    scores = logits(x_BTD, module.head_weight(), vocab_size=config.vocab_size, softcap=config.logit_softcap)
    return np.asarray(scores)[:, :, : config.vocab_size]


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_gives_the_logits_and_greedy_text_of_transformers(case, tmp_path):
    config, golden = CASES[case], public.golden(case)
    import_model(public.write_folder(tmp_path / "theirs", config), tmp_path / "run")
    run, ids = load_run(tmp_path / "run"), tokens(config)
    with jax.set_mesh(run.mesh):
        found = our_logits(run, np.tile(ids, (4, 1)))[:2]  # rows for every device
        text = generate(
            run.model, run.params, ids.tolist(), max_tokens=NEW_TOKENS, sampling=Sampling(0.0), eos_id=None, seed=0
        )
    expected = golden["logits"]
    assert np.ptp(expected) > 1
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert text == golden["greedy"].tolist()
