"""Encoders: BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692), DistilBERT (arXiv:1910.01108). transformers'
`BertForPreTraining` (masked tokens and next sentence), `BertForMaskedLM`, `RobertaForMaskedLM`,
`DistilBertForMaskedLM`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.table import Family, Weight, plain_heads

_BRICKS = {
    "kind": "encoder",
    "norm": "layer",
    "norm_placement": "post",
    "positions": "learned",
    "embedding_norm": True,
    "mlp": "gelu_exact",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
    "head_transform": True,
    "head_bias": True,
}
_KEYS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
_DEFAULTS = {
    "vocab_size": 30522,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}
_CONSTANTS = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_HARMLESS = frozenset(
    [
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "gradient_checkpointing",
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    ]
)


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from plain_heads(config)
    if not config.token_types:
        yield "model.token_types = 0 (it has at least 1)"


def _layers(ours: str, theirs: str, names: Mapping[str, str]) -> tuple[Weight, ...]:
    """The lines of a layer, whose norms stand behind its blocks; `names` are theirs."""
    heads = {"q": "dhk -> (hk)d", "k": "dgk -> (gk)d", "v": "dgk -> (gk)d", "o": "hkd -> d(hk)"}
    biases = {"q": "hk -> (hk)", "k": "gk -> (gk)", "v": "gk -> (gk)", "o": "d -> d"}
    lines = []
    for name in heads:
        where = f"{theirs}{names[name]}"
        lines.append(Weight((f"{ours}attention.{name}",), f"{where}.weight", heads[name]))
        lines.append(Weight((f"{ours}attention.{name}_bias",), f"{where}.bias", biases[name]))
    for name, layout, bias in (("up", "df -> fd", "f -> f"), ("down", "fd -> df", "d -> d")):
        where = f"{theirs}{names[name]}"
        lines.append(Weight((f"{ours}mlp.{name}",), f"{where}.weight", layout))
        lines.append(Weight((f"{ours}mlp.{name}_bias",), f"{where}.bias", bias))
    for name in ("attention_out_norm", "mlp_out_norm"):
        lines += norm(f"{ours}{name}", f"{theirs}{names[name]}")
    return tuple(lines)


def norm(ours: str, theirs: str) -> list[Weight]:
    """The lines of a LayerNorm."""
    return [
        Weight((f"{ours}.scale",), f"{theirs}.weight", "d -> d"),
        Weight((f"{ours}.bias",), f"{theirs}.bias", "d -> d"),
    ]


def _body(prefix: str, *, types: bool = True) -> tuple[Weight, ...]:
    embeddings = f"{prefix}embeddings."
    lines = [
        Weight(("embedding.tokens",), f"{embeddings}word_embeddings.weight", "vd -> vd"),
        Weight(("embedding.positions",), f"{embeddings}position_embeddings.weight", "pd -> pd"),
        *norm("embedding.norm", f"{embeddings}LayerNorm"),
    ]
    if types:
        lines.append(Weight(("embedding.token_types",), f"{embeddings}token_type_embeddings.weight", "td -> td"))
    return tuple(lines)


_BERT_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attention_out_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_out_norm": "output.LayerNorm",
}


def _head(dense: str, layer_norm: str, bias: str) -> tuple[Weight, ...]:
    return (
        Weight(("head.transform.kernel",), f"{dense}.weight", "dD -> Dd"),
        Weight(("head.transform.bias",), f"{dense}.bias", "d -> d"),
        *norm("head.transform.norm", layer_norm),
        Weight(("head.bias",), bias, "v -> v"),
    )


_NEXT_SENTENCE = (
    Weight(("next_sentence.pooler",), "bert.pooler.dense.weight", "dD -> Dd"),
    Weight(("next_sentence.pooler_bias",), "bert.pooler.dense.bias", "d -> d"),
    Weight(("next_sentence.kernel",), "cls.seq_relationship.weight", "dy -> yd"),
    Weight(("next_sentence.bias",), "cls.seq_relationship.bias", "y -> y"),
)
_POSITION_IDS = r"\w+\.embeddings\.position_ids"


def _spell_bert(name: str) -> str:
    """The oldest files have TensorFlow's names of what a norm is made of."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _bert(architecture: str, *, next_sentence: bool) -> Family:
    return Family(
        model_type="bert",
        architecture=architecture,
        keys=_KEYS,
        defaults=_DEFAULTS,
        bricks={**_BRICKS, "next_sentence_head": next_sentence},
        constants=_CONSTANTS,
        harmless=_HARMLESS,
        # Files of all of BERT's heads are read as models of one, as transformers reads them.
        buffers=rf"{_POSITION_IDS}|cls\.predictions\.decoder\.bias|bert\.pooler\..*|cls\.seq_relationship\..*",
        spell=_spell_bert,
        misfits=_misfits,
        derived=frozenset({"n_kv_heads", "head_dim"}),
        prefix="bert.",
        embedding="bert.embeddings.word_embeddings.weight",
        head="cls.predictions.decoder.weight",
        weights=(
            *_body("bert."),
            *_layers("encoder.*.", "bert.encoder.layer.{layer}.", _BERT_NAMES),
            *_head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
            *(_NEXT_SENTENCE if next_sentence else ()),
        ),
    )


BERT = _bert("BertForMaskedLM", next_sentence=False)
BERT_PRETRAINING = _bert("BertForPreTraining", next_sentence=True)

ROBERTA_OFFSET = 2


def _read_roberta(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The table of positions begins with rows up to that of padding, which is its id."""
    if theirs.get("pad_token_id", 1) != ROBERTA_OFFSET - 1:
        raise ConfigError(
            f"pad_token_id = {theirs['pad_token_id']!r}: only {ROBERTA_OFFSET - 1}, RoBERTa's, can be read"
        )
    read, rows = dict(theirs), theirs.get("max_position_embeddings", _DEFAULTS["max_position_embeddings"])
    return read | {"max_position_embeddings": rows - ROBERTA_OFFSET if isinstance(rows, int) else rows}


ROBERTA = Family(
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    keys=_KEYS,
    defaults=_DEFAULTS | {"vocab_size": 50265},
    bricks={**_BRICKS, "position_offset": ROBERTA_OFFSET},
    constants=_CONSTANTS | {"pad_token_id": ROBERTA_OFFSET - 1},
    harmless=_HARMLESS,
    buffers=rf"{_POSITION_IDS}|lm_head\.decoder\.bias|roberta\.pooler\..*",
    read_config=_read_roberta,
    write_config=lambda config: {"max_position_embeddings": config.max_seq_len + ROBERTA_OFFSET},
    misfits=_misfits,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="roberta.",
    embedding="roberta.embeddings.word_embeddings.weight",
    head="lm_head.decoder.weight",
    weights=(
        *_body("roberta."),
        *_layers("encoder.*.", "roberta.encoder.layer.{layer}.", _BERT_NAMES),
        *_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ),
)

DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertForMaskedLM",
    keys={
        "vocab_size": "vocab_size",
        "n_layers": "n_layers",
        "dim": "d_model",
        "n_heads": "n_heads",
        "hidden_dim": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "initializer_range": "init_std",
    },
    defaults={
        "vocab_size": 30522,
        "n_layers": 6,
        "dim": 768,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
    },
    bricks={**_BRICKS, "norm_eps": 1e-12},
    constants={"activation": "gelu", "dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": True},
    # Sinusoids are what the table of positions starts from, and it is in the files.
    harmless=frozenset(
        {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"}
    ),
    buffers=_POSITION_IDS,
    misfits=plain_heads,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="distilbert.",
    embedding="distilbert.embeddings.word_embeddings.weight",
    head="vocab_projector.weight",
    weights=(
        *_body("distilbert.", types=False),
        *_layers(
            "encoder.*.",
            "distilbert.transformer.layer.{layer}.",
            {
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
                "attention_out_norm": "sa_layer_norm",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
                "mlp_out_norm": "output_layer_norm",
            },
        ),
        *_head("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    ),
)
