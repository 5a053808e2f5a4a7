"""Imported encoders and encoder-decoders against what `transformers` gave (`make_golden.py`), without it."""

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
from tests.interop.make_golden_sides import LENGTHS, NEW_TOKENS, rows
from tests.interop.public_sides import ENCODER_DECODERS, ENCODERS


def our_outputs(run, given):
    """Hidden states of the encoder, logits and, of BERT, next-sentence logits, of two rows, zeros at padding."""
    # Rows for every device.
    given = {name: jnp.asarray(np.tile(array, (4, 1))) for name, array in given.items()}
    module, config = run.model.bind(run.params), run.model.config
    inputs, segments, types = (
        given["inputs"],
        given["segments"],
        given["types"] if run.model.config.token_types > 1 else None,
    )
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), inputs.shape)
    found = {}
    if config.kind == "encoder":
        x_BTD = hidden = module(inputs, positions, segments, types_BT=types)
    else:
        encoded = module.encode(inputs, positions, segments)
        hidden = encoded.x_BSD
        # Filled up for the devices; no token sees a later one.
        decoder_inputs = jnp.pad(given["decoder_inputs"], ((0, 0), (0, 7)))
        x_BTD = module(decoder_inputs, positions, jnp.ones_like(inputs), encoded=encoded)
    found["hidden"] = np.asarray(hidden * segments[..., None])
    scores = logits(
        module.head_input(x_BTD), module.head_weight(), vocab_size=config.vocab_size, bias_V=module.head_bias()
    )
    found["logits"] = np.asarray(scores * segments[..., None] if config.kind == "encoder" else scores[:, :9])
    if config.next_sentence_head:
        found["next_sentence"] = np.asarray(module.next_sentence(x_BTD))
    return {name: array[:2] for name, array in found.items()}


def assert_equal_outputs(found, expected):
    for name in expected.keys() - {"shapes", "greedy"}:
        assert np.ptp(expected[name]) > 0.5, name
        assert np.abs(found[name] - expected[name]).max() < 2e-5 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("case", ENCODERS)
def test_an_imported_encoder_gives_the_hidden_states_and_heads_of_transformers(case, tmp_path):
    config, golden = ENCODERS[case], public.golden(case)
    import_model(public.write_folder(tmp_path / "theirs", config), tmp_path / "run")
    run = load_run(tmp_path / "run")
    with jax.set_mesh(run.mesh):
        assert_equal_outputs(our_outputs(run, rows(config)), golden)
    assert ("next_sentence" in golden) == (case == "bert")


@pytest.mark.parametrize("case", ENCODER_DECODERS)
def test_an_imported_encoder_decoder_gives_the_logits_and_greedy_text_of_transformers(case, tmp_path):
    config, golden = ENCODER_DECODERS[case], public.golden(case)
    import_model(public.write_folder(tmp_path / "theirs", config), tmp_path / "run")
    run, given = load_run(tmp_path / "run"), rows(config)
    prompts = [row[:n].tolist() for row, n in zip(given["inputs"], LENGTHS, strict=True)]
    with jax.set_mesh(run.mesh):
        assert_equal_outputs(our_outputs(run, given), golden)
        text = generate(
            run.model, run.params, prompts, max_tokens=NEW_TOKENS, sampling=Sampling(0.0), eos_id=None, seed=0
        )
    assert text == golden["greedy"].tolist()
