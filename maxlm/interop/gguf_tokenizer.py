"""Tokenizers as llama.cpp's `tokenizer.ggml.*`: byte-level BPE, whose splitting into words it knows by a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maxlm.data.tokenizer import Tokenizer
from maxlm.errors import ConfigError

# llama.cpp's types of tokens (llama.h, enum llama_token_type).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The regular expressions that split text into words: llama.cpp's name for each (llama-vocab.cpp), and whether a word
# that is a token is taken as that token, whatever the merges make of it (`ignore_merges` of tokenizer.json).
PATTERNS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: ("llama-bpe", True),
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: ("qwen2", False),
}
# What tokenizer.json calls ByteLevel with `use_regex`.
GPT2_PATTERN = ("gpt-2", False)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms; ids are places in `tokens` and `types`."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: bool


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer, filled up to `size` ids with tokens that no text gives.

    Raises ConfigError where llama.cpp would give other ids than the tokenizer does: for all but byte-level BPE with a
    splitting that llama.cpp knows. Text is not brought to Unicode's NFC by llama.cpp, as Qwen's tokenizer does; nearly
    all text is in it.
    """
    if tokenizer.backend != "huggingface":
        raise _refusal(tokenizer, f"a {tokenizer.backend} tokenizer")
    spec = json.loads(tokenizer.content)
    model = spec["model"]
    if model.get("type") != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise _refusal(tokenizer, f"{model.get('type')} with the decoder {(spec.get('decoder') or {}).get('type')}")
    if (spec.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        raise _refusal(tokenizer, f"the normalizer {spec['normalizer'].get('type')}")
    if given := [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]:
        raise _refusal(tokenizer, f"{', '.join(given)} of its model")
    pre, ignores_merges = _splitting(tokenizer, spec)
    if bool(model.get("ignore_merges")) != ignores_merges:
        raise _refusal(tokenizer, f"ignore_merges = {model.get('ignore_merges')!r} with the splitting of {pre}")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in spec.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(pre, tokens, types, merges, _adds_bos(tokenizer))


def _splitting(tokenizer: Tokenizer, spec: Mapping[str, Any]) -> tuple[str, bool]:
    found = spec.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refusal(tokenizer, f"the pre_tokenizer {[step.get('type') for step in steps]}")
    if not splits and last.get("use_regex", True):
        return GPT2_PATTERN
    pattern = splits[0].get("pattern", {}).get("Regex") if len(splits) == 1 else None
    plain = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in splits)
    if pattern not in PATTERNS or not plain or last.get("use_regex", True):
        raise _refusal(tokenizer, f"words split by {pattern or [step.get('type') for step in steps]}")
    return PATTERNS[pattern]


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer by itself begins a text with bos."""
    from tokenizers import Tokenizer as Reader

    return (
        tokenizer.bos_id is not None and tokenizer.bos_id in Reader.from_str(tokenizer.content.decode()).encode("").ids
    )


def _refusal(tokenizer: Tokenizer, what: str) -> ConfigError:
    return ConfigError(
        f"{tokenizer.origin}: {what} cannot be written as GGUF: llama.cpp would give other tokens. What it can have is "
        "byte-level BPE whose words are split as GPT-2's, Llama 3's or Qwen2's; export with --to hf"
    )
