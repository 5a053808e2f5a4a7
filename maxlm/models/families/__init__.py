"""Families of public models: which bricks they are, and what their configs and weights are called.

A new family is one file with its `Family`, and its place in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.bart import BART, MARIAN
from maxlm.models.families.bert import BERT, BERT_PRETRAINING, DISTILBERT, ROBERTA
from maxlm.models.families.bloom import BLOOM
from maxlm.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from maxlm.models.families.gemma2 import GEMMA2
from maxlm.models.families.gemma3 import GEMMA3
from maxlm.models.families.gpt2 import GPT2
from maxlm.models.families.gpt_neox import GPT_NEOX
from maxlm.models.families.gpt_oss import GPT_OSS
from maxlm.models.families.llama import LLAMA
from maxlm.models.families.mistral import MISTRAL
from maxlm.models.families.mixtral import MIXTRAL
from maxlm.models.families.olmo import OLMO2
from maxlm.models.families.opt import OPT
from maxlm.models.families.phi3 import PHI3
from maxlm.models.families.qwen import QWEN2, QWEN3
from maxlm.models.families.qwen_moe import QWEN3_MOE
from maxlm.models.families.t5 import MT5, T5
from maxlm.models.families.table import Family

# A model of two families is exported as the first of them.
FAMILIES = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3, DEEPSEEK_V3, DEEPSEEK_V2, GPT_NEOX, GPT2, OPT, BLOOM,
    MIXTRAL, QWEN3_MOE, GPT_OSS, BERT, BERT_PRETRAINING, ROBERTA, DISTILBERT, T5, MT5, BART, MARIAN,
)  # fmt: skip


def family_for(config: ModelConfig) -> Family:
    """The family that a model is of. Raises ConfigError that says, for each family, which keys do not fit it."""
    misfits = [(family, family.misfits_of(config)) for family in FAMILIES]
    for family, wrong in misfits:
        if not wrong:
            return family
    lines = [f"  {family.model_type}: {'; '.join(wrong)}" for family, wrong in misfits]
    raise ConfigError("this model has no equal among the families that can be exported:\n" + "\n".join(lines))


def family_of(theirs: Mapping[str, Any], origin: str) -> Family:
    """The family that a config.json is of, by its `model_type` and, where two have the same, its architecture. Raises
    ConfigError, naming the file `origin`."""
    name, architectures = theirs.get("model_type"), theirs.get("architectures")
    known = [family for family in FAMILIES if family.model_type == name]
    if not known:
        types = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
        raise ConfigError(f"{origin}: model_type = {name!r}; the types that can be read are {types}")
    for family in known:
        if architectures is None or family.architecture in architectures:
            return family
    readable = " and ".join(family.architecture for family in known)
    raise ConfigError(f"{origin}: architectures = {architectures!r}; of {name} models {readable} can be read")
