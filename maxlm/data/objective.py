"""What a row's tokens are trained for: the choice of an objective, without NumPy, so that configs can say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maxlm.data.config import ObjectiveConfig
from maxlm.errors import ConfigError

OBJECTIVES_OF = {
    "decoder": ("causal", "prefix_lm"),
    "encoder": ("mlm",),
    "encoder_decoder": ("span_corruption",),
}
"""the objectives of each `model.kind`; the first where none is named"""

SPECIAL_KEY = {"mlm": "mask_id", "span_corruption": "first_sentinel_id"}
"""the key of the token that an objective needs for itself"""

# Rows of encoder-decoders are filled up to a multiple of this, so that meshes share them out.
LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class Objective:
    """What is made of a row's tokens: `causal`, `prefix_lm`, `mlm` or `span_corruption`."""

    kind: str = "causal"
    mask_rate: float = 0.15
    mean_span: float = 3.0
    special_id: int = 0
    """the mask, or the first sentinel"""
    start_id: int = 0
    """the first of a decoder's inputs"""
    next_sentence: bool = False
    """whether a row of `mlm` is a pair of parts (see `sentence_pairs.py`)"""

    @classmethod
    def of(cls, config: ObjectiveConfig, *, model_kind: str, vocab_size: int, start_id: int) -> Objective:
        """The objective of a config for a model. Raises ConfigError where they do not go together."""
        possible = OBJECTIVES_OF[model_kind]
        kind = config.kind or possible[0]
        if kind not in possible:
            raise ConfigError(
                f"data.objective.kind = {kind!r} and model.kind = {model_kind!r}: such a model is trained by "
                f"{' or '.join(map(repr, possible))}; leave data.objective.kind out"
            )
        key = SPECIAL_KEY.get(kind)
        for name in SPECIAL_KEY.values():
            if name != key and getattr(config, name) is not None:
                raise ConfigError(f"data.objective.{name} is not of kind = {kind!r}; leave it out")
        if config.next_sentence and kind != "mlm":
            raise ConfigError(f"data.objective.next_sentence = true is not of kind = {kind!r}; leave it out")
        special = getattr(config, key) if key else 0
        special = vocab_size - 1 if special is None else special
        if special >= vocab_size:
            raise ConfigError(f"data.objective.{key} = {special} is not under model.vocab_size = {vocab_size}")
        return cls(kind, config.mask_rate, config.mean_span, special, start_id, config.next_sentence)

    def n_special(self, seq_len: int) -> int:
        """How many tokens of the vocabulary a row of `seq_len` needs for itself: from `special_id` down."""
        return {"causal": 0, "prefix_lm": 0, "mlm": 1}.get(self.kind, self.spans(seq_len)[1])

    def spans(self, length: int) -> tuple[int, int]:
        """Missing tokens of a row, and the spans that they are in (arXiv:1910.10683, section 3.1.4)."""
        if length < 2:
            return 0, 0
        missing = min(max(round(length * self.mask_rate), 1), length - 1)
        return missing, min(max(round(missing / self.mean_span), 1), length - missing)

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Tokens in a row of the encoder's inputs and of the decoder's, made of `seq_len`; both that for others."""
        if self.kind != "span_corruption":
            return seq_len, seq_len
        missing, spans = self.spans(seq_len)
        return _filled(seq_len - missing + spans + 1), _filled(missing + spans + 1)

    def fingerprint(self) -> dict[str, Any]:
        """What batches depend on; nothing for the causal one, whose runs are older than this."""
        if self.kind == "causal":
            return {}
        objective = [self.kind, self.mask_rate, self.mean_span, self.special_id]
        return {"objective": [*objective, "next_sentence"] if self.next_sentence else objective}


def _filled(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
