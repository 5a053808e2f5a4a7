"""Imported encoders and encoder-decoders against what `transformers` gave (`make_golden.py`), without it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.errors import ConfigError
from maxlm.inference.generate import generate
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.huggingface import import_model
from maxlm.kernels.cross_entropy import logits
from maxlm.models.transformer import Model
from tests import tiny
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


def test_the_oldest_names_of_berts_norms_are_read_and_other_heads_are_passed_over(tmp_path):
    config = ENCODERS["bert, masked tokens alone"]
    tensors = public.weights(ENCODERS["bert"])
    expected = import_and_load(public.write_folder(tmp_path / "theirs", config, public.weights(config)), tmp_path / "a")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    assert old.keys() > {"bert.pooler.dense.weight", "bert.embeddings.LayerNorm.gamma"}
    found = import_and_load(public.write_folder(tmp_path / "old", config, old), tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def import_and_load(folder, run_dir):
    import_model(folder, run_dir)
    return jax.device_get(load_run(run_dir).params)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id = 0"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu'"),
        ("bart", {"decoder_ffn_dim": 96}, "encoder_ffn_dim = 80, decoder_ffn_dim = 96"),
        ("bart", {"normalize_before": True}, "normalize_before = True"),
        ("marian", {"decoder_vocab_size": 100}, "decoder_vocab_size = 100"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForMaskedLM and BertForPreTraining can be read"),
    ],
)
def test_a_config_with_no_equal_here_is_refused_by_name(case, change, message, tmp_path):
    config = public.EVERY[case] | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path, tmp_path / "run")


def test_encoders_do_not_continue_text(tmp_path):
    model = Model(tiny.config(model=tiny.BERT).model, tiny.config().precision)
    with pytest.raises(ConfigError, match=r"model\.kind = 'encoder'"):
        generate(model, {}, [[5]], max_tokens=1, sampling=Sampling(0.0), eos_id=None, seed=0)
