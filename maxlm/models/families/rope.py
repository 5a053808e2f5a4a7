"""RoPE in config.json, as transformers spells it: `rope_theta` and `rope_scaling` up to version 4, which every version
reads, and `rope_parameters` from version 5 on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig

# Their `rope_type`, which is our `kind`; their dynamic and longrope change with the length of the row.
TYPES = ("linear", "llama3", "yarn")
# Their numbers, and ours.
NUMBERS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
# Those of families with latent attention.
LATENT_NUMBERS = {**NUMBERS, "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}


def read_rope(theirs: Mapping[str, Any], numbers: Mapping[str, str] = NUMBERS) -> dict[str, Any]:
    """config.json with `rope_theta` and `partial_rotary_factor` at its top, wherever they stood, and `rope_scaling` as
    our section of that name. Raises ConfigError on types and numbers that are not known."""
    read = dict(theirs)
    found = {name: read.pop(name, None) for name in ("rope_scaling", "rope_parameters")}
    given = [name for name, value in found.items() if value]
    if not given:
        return read
    if len(given) == 2:
        raise ConfigError("rope_scaling and rope_parameters are both given; keep the one that is right")
    where = given[0]
    if not isinstance(found[where], dict):
        raise ConfigError(f"{where} = {found[where]!r}: not a mapping")
    rope = {name: value for name, value in found[where].items() if value is not None}
    read |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    if kind not in ("default", *TYPES):
        raise ConfigError(f"{where}.rope_type = {kind!r}: the types that can be read are default, {', '.join(TYPES)}")
    if kind == "yarn" and rope.get("truncate") is True:
        del rope["truncate"]
    known = () if kind == "default" else numbers
    if unknown := [f"{where}.{name} = {value!r}" for name, value in sorted(rope.items()) if name not in known]:
        raise ConfigError(f"{', '.join(unknown)}: not known for rope_type {kind!r} here")
    if kind == "default":
        return read
    scaling = {numbers[name]: value for name, value in rope.items()}
    if kind != "linear":
        scaling.setdefault("original_max_seq_len", read.get("max_position_embeddings"))
    return read | {"rope_scaling": {"kind": kind, **scaling}}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_scaling` for config.json."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_scaling": None}
    numbers = {theirs: getattr(scaling, ours) for theirs, ours in LATENT_NUMBERS.items()}
    given = {theirs: number for theirs, number in numbers.items() if number is not None}
    return {"rope_scaling": {"rope_type": scaling.kind, **given}}


def rope_misfits(config: ModelConfig) -> Iterator[str]:
    """Why no family of transformers has a model's RoPE."""
    if config.rope_scaling is not None and config.rope_scaling.kind not in TYPES:
        yield (
            f"model.rope_scaling.kind = {config.rope_scaling.kind!r} (it has {', '.join(TYPES)}; static NTK is a "
            "larger rope_theta, theta * factor ** (width / (width - 2)))"
        )
