"""What llama.cpp has for our families: its architectures, the tensors that lie otherwise there, the numbers that it
reads from a file, and what it has no equal for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import Family, family_for
from maxlm.models.families.table import Weight

# What llama.cpp gives local layers of Gemma 3; not every version reads another base from the file.
LOCAL_ROPE_THETA = 10_000.0


def _no_misfits(config: ModelConfig) -> Iterator[str]:
    return iter(())


def _no_numbers(writer: Any, config: ModelConfig) -> None:
    pass


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp has for a family."""

    name: str
    """of gguf.MODEL_ARCH"""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """tensors that lie otherwise than transformers', by the end of their name: the right side of a `Weight.layout`"""
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """tensors with another name, by the end of it, and the end there: one, or one for each of ours that are apart"""
    cut: str = ""
    """what transformers' names begin with and those that the package gguf knows do not"""
    changes: Mapping[str, Callable[[np.ndarray, ModelConfig], np.ndarray]] = field(default_factory=dict)
    """what is done to tensors, by a pattern of transformers' name; the shape stays"""
    scalings: tuple[str, ...] = ("linear", "yarn")
    """kinds of `rope_scaling` that it has"""
    misfits: Callable[[ModelConfig], Iterator[str]] = _no_misfits
    """what else it has no equal for, a clause each"""
    numbers: Callable[[Any, ModelConfig], None] = _no_numbers
    """writes the numbers of the model that not every architecture has"""
    global_every: int | None = None
    """each so many-th layer is global and the others slide; none: it has no windows"""
    needs_head: bool = False
    """whether a tied head is written a second time"""

    def refusals(self, config: ModelConfig) -> list[str]:
        """Why llama.cpp cannot run the model; none where it can."""
        wrong = [*self.misfits(config), *self._other_windows(config)]
        if config.rope_scaling is not None and config.rope_scaling.kind not in self.scalings:
            wrong.append(f"model.rope_scaling.kind = {config.rope_scaling.kind!r} (it has {', '.join(self.scalings)})")
        return wrong + list(_own_yarn(config))

    def weights(self, family: Family) -> Iterator[Weight]:
        """The family's table as the tensors lie in llama.cpp, where all experts of a layer are one tensor."""
        for weight in family.weights:
            for part in self._parts(weight):
                if "{expert}" not in part.theirs:
                    yield part
                    continue
                ours, theirs = part.layout.split(" -> ")
                yield replace(part, theirs=part.theirs.replace("{expert}.", ""), layout=f"e{ours} -> e{theirs}")

    def _parts(self, weight: Weight) -> Iterator[Weight]:
        layout = weight.layout
        for end, theirs in self.layouts.items():
            if weight.theirs.endswith(end):
                layout = f"{layout.partition(' -> ')[0]} -> {theirs}"
        for end, names in self.renamed.items():
            if weight.theirs.endswith(end):
                stem = weight.theirs.removesuffix(end)
                for name, ours in zip(names, weight.ours, strict=True):
                    yield replace(weight, ours=(ours,), theirs=stem + name, layout=layout)
                return
        yield replace(weight, layout=layout)

    def _other_windows(self, config: ModelConfig) -> Iterator[str]:
        """Windows in other layers than llama.cpp has them: not every version reads from the file which layers slide."""
        every = self.global_every
        if every is None or config.attention_window is None:
            return
        if any(kind.local == ((layer + 1) % every == 0) for layer, kind in enumerate(config.layer_kinds)):
            pattern = ["local"] * (every - 1) + ["global"]
            yield (
                f"model.attention_pattern = {list(config.attention_pattern)!r} with n_layers = {config.n_layers} (its "
                f"layers are {', '.join(pattern)} in turn)"
            )


def architecture_for(config: ModelConfig) -> Architecture:
    """llama.cpp's architecture of a model. Raises ConfigError, naming the keys, where there is none."""
    family = family_for(config)
    architecture = ARCHITECTURES.get(family.model_type)
    if architecture is None:
        raise ConfigError(
            f"{family.model_type} models cannot be written as GGUF; these can: {', '.join(ARCHITECTURES)}"
        )
    if refusals := architecture.refusals(config):
        raise ConfigError(f"llama.cpp has no equal of this {family.model_type} model: {'; '.join(refusals)}")
    return architecture


def _own_yarn(config: ModelConfig) -> Iterator[str]:
    """YaRN's numbers that not every llama.cpp reads from the file, and whole pairs, which all of them take."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return
    for number in ("attention_factor", "beta_fast", "beta_slow"):
        default = getattr(scaling.model_copy(update={number: None}).filled_in, number)
        if abs(getattr(scaling.filled_in, number) - default) > 1e-6 * default:
            yield f"model.rope_scaling.{number} = {getattr(scaling, number):g} (it has {default:g})"
    if not scaling.filled_in.truncate:
        yield f"model.rope_scaling.truncate = {scaling.truncate} (it has True)"


def _interleaved(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of queries or keys with the pairs that RoPE turns side by side, as llama.cpp has them for Llama; ours are in
    the first and the second half of a head."""
    k = config.head_width
    return array.reshape(-1, 2, k // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _plus_one(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """What norms multiply by, of a scale that is added to 1 (`norm_unit_offset`)."""
    return array.astype(np.float32) + 1


def _no_biases(config: ModelConfig) -> Iterator[str]:
    if config.attention_bias:
        yield "model.attention_bias = True (it has none)"


def _biases(config: ModelConfig) -> Iterator[str]:
    if not config.attention_bias:
        yield "model.attention_bias = False (it has them)"


def _wide_heads(config: ModelConfig) -> Iterator[str]:
    if config.n_heads * config.head_width != config.d_model:
        yield f"model.head_dim = {config.head_width} (it has d_model / n_heads = {config.d_model / config.n_heads:g})"


def _olmo2_misfits(config: ModelConfig) -> Iterator[str]:
    yield from _no_biases(config)
    yield from _wide_heads(config)


def _gemma_scale(config: ModelConfig, n_layers_27b: int) -> Iterator[str]:
    """llama.cpp knows the scale of scores by the size: of the 27B it is of d_model / n_heads, of others of head_dim."""
    of_27b = config.n_layers == n_layers_27b
    scalar = config.d_model // config.n_heads if of_27b else config.head_width
    scale = config.attention_scale or config.head_width**-0.5
    if not math.isclose(scale, scalar**-0.5, rel_tol=1e-6):
        of = "(d_model / n_heads)" if of_27b else "head_dim"
        has = f"with n_layers = {config.n_layers} it has {of} ** -0.5 = {scalar**-0.5:g}"
        yield f"model.attention_scale = {config.attention_scale and round(config.attention_scale, 6)} ({has})"


def _gemma2_misfits(config: ModelConfig) -> Iterator[str]:
    yield from _no_biases(config)
    yield from _gemma_scale(config, 46)
    for key in ("attention_softcap", "logit_softcap"):
        if getattr(config, key) is None:
            yield f"model.{key} = None (it has one)"
    if not config.tied_embeddings:
        yield "model.tied_embeddings = False (its head is the embedding)"


def _gemma3_misfits(config: ModelConfig) -> Iterator[str]:
    yield from _no_biases(config)
    yield from _gemma_scale(config, 62)
    if config.attention_window is None:
        return
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    if local != LOCAL_ROPE_THETA:
        yield f"model.local_rope_theta = {local:g} (it has {LOCAL_ROPE_THETA:g} in local layers)"


def _windows(writer: Any, config: ModelConfig) -> None:
    """A window as long as the context for a model without one: these architectures always have some."""
    writer.add_sliding_window(config.attention_window or config.max_seq_len)


def _gemma2_numbers(writer: Any, config: ModelConfig) -> None:
    _windows(writer, config)
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.logit_softcap)


def _gemma3_numbers(writer: Any, config: ModelConfig) -> None:
    if config.attention_window is not None:
        writer.add_sliding_window(config.attention_window)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)


def _qwen3_moe_misfits(config: ModelConfig) -> Iterator[str]:
    yield from _no_biases(config)
    moe = config.moe
    if moe is None:
        return
    if not moe.normalize_weights:
        yield "model.moe.normalize_weights = False (it has True)"
    if not all(kind.experts for kind in config.layer_kinds):
        yield (
            f"model.moe.first_layer = {moe.first_layer}, model.moe.every = {moe.every} (all of its layers have experts)"
        )


def _expert_numbers(writer: Any, config: ModelConfig) -> None:
    if config.moe is not None:
        writer.add_expert_count(config.moe.n_experts)
        writer.add_expert_used_count(config.moe.experts_per_token)
        writer.add_expert_feed_forward_length(config.moe.d_ff)


def _gpt_oss_numbers(writer: Any, config: ModelConfig) -> None:
    _windows(writer, config)
    _expert_numbers(writer, config)


def _parallel(writer: Any, config: ModelConfig) -> None:
    writer.add_parallel_residual(config.parallel_residual)


_LLAMA = Architecture("LLAMA", changes={r"self_attn\.[qk]_proj": _interleaved}, scalings=("linear", "yarn", "llama3"))
_EXPERTS = "mlp.experts."
_NORMS_PLUS_ONE = {r"norm\.weight$": _plus_one}
# By `Family.model_type`.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("QWEN2", misfits=_wide_heads),
    "qwen3": Architecture("QWEN3", misfits=_no_biases),
    "gemma2": Architecture(
        "GEMMA2", changes=_NORMS_PLUS_ONE, misfits=_gemma2_misfits, numbers=_gemma2_numbers, global_every=2
    ),
    "gemma3_text": Architecture(
        "GEMMA3",
        changes=_NORMS_PLUS_ONE,
        scalings=("linear",),
        misfits=_gemma3_misfits,
        numbers=_gemma3_numbers,
        global_every=6,
    ),
    "olmo2": Architecture("OLMO2", misfits=_olmo2_misfits, needs_head=True),
    "phi3": Architecture("PHI3", misfits=_wide_heads),
    "mixtral": replace(_LLAMA, numbers=_expert_numbers),
    "qwen3_moe": Architecture("QWEN3MOE", misfits=_qwen3_moe_misfits, numbers=_expert_numbers),
    "gpt_oss": Architecture(
        "GPT_OSS",
        layouts={
            f"{_EXPERTS}gate_up_proj": "emd",
            f"{_EXPERTS}gate_up_proj_bias": "em",
            f"{_EXPERTS}down_proj": "edm",
        },
        renamed={
            "self_attn.sinks": ("self_attn.sinks.weight",),
            f"{_EXPERTS}gate_up_proj": (f"{_EXPERTS}gate_proj.weight", f"{_EXPERTS}up_proj.weight"),
            f"{_EXPERTS}gate_up_proj_bias": (f"{_EXPERTS}gate_proj.bias", f"{_EXPERTS}up_proj.bias"),
            f"{_EXPERTS}down_proj": (f"{_EXPERTS}down_proj.weight",),
            f"{_EXPERTS}down_proj_bias": (f"{_EXPERTS}down_proj.bias",),
        },
        numbers=_gpt_oss_numbers,
        global_every=2,
        needs_head=True,
    ),
    "gpt2": Architecture(
        "GPT2",
        layouts={
            "attn.c_attn.weight": "(nhk)d",
            "attn.c_proj.weight": "d(hk)",
            "mlp.c_fc.weight": "fd",
            "mlp.c_proj.weight": "df",
        },
    ),
    "gpt_neox": Architecture(
        "GPTNEOX",
        layouts={"query_key_value.weight": "(nhk)d", "query_key_value.bias": "(nhk)"},
        misfits=_biases,
        numbers=_parallel,
        needs_head=True,
    ),
    "bloom": Architecture(
        "BLOOM",
        layouts={"query_key_value.weight": "(nhk)d", "query_key_value.bias": "(nhk)"},
        cut="transformer.",
    ),
}
