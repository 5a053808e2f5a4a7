"""`maxlm train` on a token store by objectives other than the next token."""

import json
import shutil

import pytest

from maxlm.config import load_config
from maxlm.errors import ConfigError
from maxlm.train import train
from tests import runs, tiny
from tests.processes import run_processes

SIZES = {"vocab_size": 400, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "d_ff": 64, "max_seq_len": 64}
MODELS = {
    "bert": {**tiny.BERT, **SIZES, "next_sentence_head": True},
    "t5": {**tiny.T5, **SIZES, "n_encoder_layers": 1, "head_dim": 8, "logit_scale": 1.0},
    "prefixes, chunks and noisy experts": {
        **SIZES, "n_layers": 1, "attention_chunk": 24, "attention_global_tokens": 2,
        "moe": {
            "n_experts": 4, "experts_per_token": 2, "d_ff": 32, "router_noise": "jitter", "router_noise_scale": 0.1
        },
    },
}  # fmt: skip
OBJECTIVES = {"bert": {"next_sentence": True}, "prefixes, chunks and noisy experts": {"kind": "prefix_lm"}}
TRAIN = {"steps": 30, "seq_len": 64, "global_batch_tokens": 1024}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store"), packages=("json",))


def config_of(path, store, run_dir, model, **sections):
    """The sizes of a tiny model's config, and none that `runs` has of its own."""
    sections = {
        "optimizer": {"learning_rate": 1e-2},
        "train": TRAIN,
        "checkpoint": {"every": 15},
        "evaluation": {"every": 15},
        **sections,
    }
    return runs.write_config(path, store, run_dir, model=model, **sections)


@pytest.mark.processes
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_and_a_resumed_run_goes_on_bitwise_as_the_whole_one(name, store, tmp_path):
    objective, run_dir = {"objective": OBJECTIVES.get(name, {})}, tmp_path / "run"
    config = config_of(tmp_path / "tiny.yaml", store, run_dir, MODELS[name], data=objective)
    run_processes(1, runs.command(config), timeout=400)
    lines, scores = runs.training_lines(run_dir), runs.evaluation_lines(run_dir)
    assert sum(line["loss"] for line in lines[-5:]) < 0.95 * sum(line["loss"] for line in lines[:5])
    assert scores[-1]["eval_loss"] < scores[0]["eval_loss"]
    assert scores[-1]["eval_bits_per_byte"] > 0
    shutil.rmtree(run_dir / "checkpoints" / "30")
    run_processes(1, runs.command(config), timeout=400)
    resumed = runs.training_lines(run_dir)
    assert resumed[-15:] == lines[-15:]
    assert runs.evaluation_lines(run_dir)[-1]["eval_loss"] == scores[-1]["eval_loss"]
    assert json.loads((run_dir / "run.json").read_text())["n_params"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"data\.objective\.next_sentence = false: nothing would train that head"),
        ({"vocab_size": 384, "next_sentence_head": False}, r"set model\.vocab_size=385"),
    ],
    ids=["next sentences", "no place for the mask"],
)
def test_what_cannot_be_learned_is_refused_before_the_first_step(change, message, store, tmp_path):
    model = {**MODELS["bert"], **change}
    config = load_config(config_of(tmp_path / "tiny.yaml", store, tmp_path / "run", model))
    with pytest.raises(ConfigError, match=message):
        train(config)
