"""Exported encoders and encoder-decoders in the hands of `transformers` itself, and its models in ours; skipped where
it or torch is not installed."""

import json

import jax
import pytest

from maxlm.inference.generate import generate
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.huggingface import export_run, import_model
from tests import tiny
from tests.interop import ours, public_sides
from tests.interop.make_golden_sides import LENGTHS, NEW_TOKENS, outputs, rows
from tests.interop.test_golden_sides import assert_equal_outputs, our_outputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GATED = {"mlp": "geglu", "tied_embeddings": False, "logit_scale": 1.0}
MODELS = {
    "bert": tiny.BERT,
    "bert, next sentences": {**tiny.BERT, "next_sentence_head": True},
    "roberta": {**tiny.BERT, "token_types": 1, "position_offset": 2},
    "distilbert": {**tiny.BERT, "token_types": 0, "norm_eps": 1e-12},
    "t5": tiny.T5,
    "t5 1.1": {**tiny.T5, **GATED},
    "bart": tiny.BART,
    "bart, scaled embeddings": {**tiny.BART, "embedding_scale": True, "n_encoder_layers": 1, "mlp": "relu"},
    "marian": {
        **tiny.BART, "positions": "sinusoidal", "position_offset": 0, "embedding_norm": False, "mlp": "silu"
    },
}  # fmt: skip


def assert_equal_models(run_dir, theirs, config):
    """Hidden states, logits, what other heads say, and the greedy text of a decoder, with padding behind a row."""
    expected, run, given = outputs(theirs.eval(), config), load_run(run_dir), rows(config)
    with jax.set_mesh(run.mesh):
        assert_equal_outputs(our_outputs(run, given), expected)
        if "greedy" in expected:
            prompts = [row[:n].tolist() for row, n in zip(given["inputs"], LENGTHS, strict=True)]
            sampling = Sampling(temperature=0.0)
            text = generate(
                run.model, run.params, prompts, max_tokens=NEW_TOKENS, sampling=sampling, eos_id=None, seed=0
            )
            assert text == expected["greedy"].tolist()


@pytest.mark.parametrize("case", MODELS)
def test_transformers_gives_the_hidden_states_heads_and_greedy_text_of_an_exported_run(case, tmp_path):
    ours.make_run(tmp_path / "run", MODELS[case], None)
    export_run(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs, found = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert_equal_models(tmp_path / "run", theirs, config)


# Of T5 1.1 and mT5 it ties the heads that it makes itself, and takes those of files: `test_golden_sides` has them.
@pytest.mark.parametrize("case", [case for case in public_sides.CASES if case not in ("t5 1.1", "mt5")])
def test_what_transformers_saves_is_read_back_with_the_same_outputs(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(public_sides.CASES[case]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs = getattr(transformers, config.architectures[0])(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # sinusoids are none of ours
                parameter += 0.2 * torch.randn_like(parameter)
    # Shards, so that the index which transformers writes is read too.
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert_equal_models(tmp_path / "run", theirs, public_sides.CASES[case])
