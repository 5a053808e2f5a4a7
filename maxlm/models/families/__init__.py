"""Families of public models: which bricks they are, and what their configs and weights are called.

A new family is one file with its `Family`, and its place in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from maxlm.models.families.gpt2 import GPT2
from maxlm.models.families.gpt_neox import GPT_NEOX
from maxlm.models.families.llama import LLAMA
from maxlm.models.families.mistral import MISTRAL
from maxlm.models.families.mixtral import MIXTRAL
from maxlm.models.families.qwen import QWEN2, QWEN3
from maxlm.models.families.qwen_moe import QWEN3_MOE
from maxlm.models.families.table import Family

# A model of two families is exported as the first of them.
FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, DEEPSEEK_V3, DEEPSEEK_V2),
    *(GPT_NEOX, GPT2, MIXTRAL, QWEN3_MOE),
)


def family_for(config: ModelConfig) -> Family:
    """The family that a model is of. Raises ConfigError that says, for each family, which keys do not fit it."""
    misfits = {family.model_type: family.misfits_of(config) for family in FAMILIES}
    for family in FAMILIES:
        if not misfits[family.model_type]:
            return family
    lines = [f"  {name}: {'; '.join(wrong)}" for name, wrong in misfits.items()]
    raise ConfigError("this model has no equal among the families that can be exported:\n" + "\n".join(lines))


def family_of(theirs: Mapping[str, Any], origin: str) -> Family:
    """The family that a config.json is of, by its `model_type`. Raises ConfigError, naming the file `origin`."""
    known = {family.model_type: family for family in FAMILIES}
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{origin}: model_type = {name!r}; the types that can be read are {', '.join(known)}")
    family, architectures = known[name], theirs.get("architectures")
    if architectures is not None and family.architecture not in architectures:
        raise ConfigError(
            f"{origin}: architectures = {architectures!r}; of {name} models {family.architecture} can be read"
        )
    return family
