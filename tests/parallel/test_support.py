"""What cannot go together is refused by name, and the docs show what is refused."""

from pathlib import Path

import pytest

from maxlm.parallel import support
from maxlm.parallel.features import FEATURES
from tests import tiny, tiny_moe

PIPELINE = {"mesh": {"pipeline": 2}}
GPIPE = {**PIPELINE, "pipeline": {"schedule": "gpipe"}}
PREFIX = {"data": {"objective": {"kind": "prefix_lm"}}}
BALANCED = {"model": {**tiny_moe.MIXTRAL, "moe": {**tiny_moe.MIXTRAL["moe"], "balance_loss": 0.01}}}
REFUSED = {
    ("1f1b", "encoder-decoder"): {**PIPELINE, "model": tiny.BART},
    ("1f1b", "T5 bias"): {**PIPELINE, "model": {**tiny.LLAMA, "positions": "relative"}},
    ("pipeline", "offload"): {
        **GPIPE, "model": {**tiny.LLAMA, "remat": {"policy": "names", "offload": ["layer_input"]}}
    },
    ("pipeline", "balance over a batch"): {**GPIPE, **BALANCED},
    ("accumulation", "balance over a batch"): {"train": {"accumulation": 2}, **BALANCED},
    ("expert", "dense"): {"mesh": {"expert": 2}},
    ("context", "expert choice"): {"mesh": {"context": 2}, "model": tiny_moe.EXPERT_CHOICE},
    ("ring", "chosen kernel"): {
        "mesh": {"context": 2}, "model": {**tiny.LLAMA, "attention_implementation": "reference"}
    },
    ("prefix", "MTP"): {**PREFIX, "model": {**tiny.LLAMA, "mtp_layers": 1}},
    ("prefix", "ALiBi"): {**PREFIX, "model": {**tiny.LLAMA, "positions": "alibi"}},
    ("prefix", "T5 bias"): {**PREFIX, "model": {**tiny.LLAMA, "positions": "relative"}},
    ("prefix", "Transformer-XL"): {**PREFIX, "model": tiny.GOPHER},
}  # fmt: skip


def test_every_refusal_has_an_example_here():
    assert list(REFUSED) == [(refusal.first, refusal.second) for refusal in support.REFUSALS]


@pytest.mark.parametrize("pair", REFUSED, ids=" with ".join)
def test_a_pair_is_refused_with_both_keys_the_reason_and_what_to_do(pair):
    (refusal,) = (one for one in support.REFUSALS if (one.first, one.second) == pair)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tiny.config(**REFUSED[pair])
    for words in (*(FEATURES[name].keys for name in pair), refusal.reason, refusal.remedy):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted({name for pair in REFUSED for name in pair}))
def test_each_side_of_a_refused_pair_is_allowed_alone(name):
    """Or nothing would say that it is the pair."""
    alone = {
        "1f1b": PIPELINE, "pipeline": GPIPE, "encoder-decoder": {"model": tiny.BART},
        "T5 bias": {"model": {**tiny.LLAMA, "positions": "relative"}},
        "offload": {"model": {**tiny.LLAMA, "remat": {"policy": "names", "offload": ["layer_input"]}}},
        "balance over a batch": BALANCED, "accumulation": {"train": {"accumulation": 2}},
        "expert": {"mesh": {"expert": 2}, "model": tiny_moe.MIXTRAL}, "dense": {}, "context": {"mesh": {"context": 2}},
        "expert choice": {"model": tiny_moe.EXPERT_CHOICE}, "ring": {"mesh": {"context": 2}},
        "chosen kernel": {"model": {**tiny.LLAMA, "attention_implementation": "reference"}},
        "prefix": PREFIX, "MTP": {"model": {**tiny.LLAMA, "mtp_layers": 1}},
        "ALiBi": {"model": {**tiny.LLAMA, "positions": "alibi"}}, "Transformer-XL": {"model": tiny.GOPHER},
    }[name]  # fmt: skip
    assert FEATURES[name].used(tiny.config(**alone))


def test_the_docs_have_the_table_as_it_is():
    text = (Path(__file__).parents[2] / "docs/parallelism.md").read_text()
    shown = text.split("<!-- support: begin -->\n")[1].split("<!-- support: end -->")[0]
    assert shown == support.markdown()
