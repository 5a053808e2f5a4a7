"""Shapes of the models of a ladder: one family made wider and deeper in small steps, by rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.flops import ParameterCount, count_parameters
from maxlm.section import Section, key

WIDEST = 1 << 17
LARGEST_DEFAULT_MULTIPLE = 64


class ShapeConfig(Section):
    """How the base's model is made smaller and larger. What is not given is as in the base."""

    aspect_ratio: float | None = key(
        None, "d_model / n_layers (Kaplan et al., arXiv:2001.08361, figure 5: the loss hardly depends on it)", gt=0
    )
    head_dim: int | None = key(None, "width of a head; the number of heads follows", unit="channels", ge=1)
    d_model_multiple: int | None = key(
        None,
        "d_model is a multiple of this, itself one of head_dim and of the heads that share keys and values; the least "
        "such where not given",
        unit="channels",
        ge=1,
    )
    d_ff_ratio: float | None = key(None, "d_ff / d_model", gt=0)
    d_ff_multiple: int | None = key(
        None,
        "d_ff, and the width of experts, is a multiple of this; of d_model's, but no more than 64, where not given",
        unit="channels",
        ge=1,
    )
    rank_multiple: int = key(8, "ranks of latent attention are rounded to a multiple of this", unit="channels", ge=1)
    min_layers: int = key(1, "the fewest layers", unit="layers", ge=1)


@dataclass(frozen=True)
class Shape:
    """A model of the family."""

    model: ModelConfig
    changes: dict[str, Any]
    """the keys of `model` that are not the base's, as plain data"""
    count: ParameterCount

    def size(self, size_of: str) -> int:
        """Parameters: `total`, `non_embedding` or `active`."""
        return getattr(self.count, size_of)


@dataclass(frozen=True)
class Family:
    """Every shape of a base's model by a rule, smallest first: each is wider than the one before it, or deeper."""

    base: ModelConfig
    rule: ShapeConfig

    @property
    def head_dim(self) -> int:
        return self.rule.head_dim or self.base.head_width

    @property
    def d_model_multiple(self) -> int:
        """Raises ConfigError where the heads do not divide it."""
        least = self.head_dim * (self.group if self._plain_heads else 1)
        multiple = self.rule.d_model_multiple or least
        if self._plain_heads and multiple % least:
            heads = (
                f", in groups of {self.group} that share keys and values (model.n_kv_heads)" if self.group > 1 else ""
            )
            raise ConfigError(
                f"shape.d_model_multiple = {multiple} is not a multiple of {least}: heads are {self.head_dim} "
                f"wide{heads}; give a smaller shape.head_dim, or another multiple"
            )
        return multiple

    @property
    def group(self) -> int:
        """Query heads that share keys and values, in every shape as in the base; 1 too where all of them do."""
        return 1 if self.base.kv_heads == 1 else self.base.n_heads // self.base.kv_heads

    @property
    def _plain_heads(self) -> bool:
        """Whether the heads of queries are together as wide as the residual stream, as in most families."""
        return self.base.latent is None and self.base.n_heads * self.base.head_width == self.base.d_model

    def __iter__(self) -> Iterator[Shape]:
        """Raises ConfigError for a shape that no model can have."""
        multiple, ratio = self.d_model_multiple, self.rule.aspect_ratio or self.base.d_model / self.base.n_layers
        least = max(self.rule.min_layers, len(self.base.attention_pattern), 1)
        if self.base.moe is not None:
            least = max(least, self.base.moe.first_layer + 1)
        before = None
        for d_model in range(multiple, WIDEST + 1, multiple):
            n_layers = max(least, math.floor(d_model / ratio + 0.5))
            # Where both grow, depth first, a layer at a time: steps between sizes stay small.
            for depth in range((before or n_layers) + 1, n_layers + 1):
                yield self.shape(d_model - multiple, depth)
            yield self.shape(d_model, n_layers)
            before = n_layers

    def shape(self, d_model: int, n_layers: int) -> Shape:
        """The shape of this width and depth."""
        base, multiple = self.base, self.rule.d_ff_multiple or min(self.d_model_multiple, LARGEST_DEFAULT_MULTIPLE)
        growth = d_model / base.d_model
        changes: dict[str, Any] = {"d_model": d_model, "n_layers": n_layers, **self._heads(d_model)}
        d_ff = (self.rule.d_ff_ratio or base.d_ff / base.d_model) * d_model
        changes["d_ff"] = nearest_multiple(d_ff, multiple)
        if base.n_encoder_layers is not None:
            changes["n_encoder_layers"] = max(1, round(n_layers * base.n_encoder_layers / base.n_layers))
        if base.moe is not None:
            # The experts keep their width beside d_ff.
            width = base.moe.d_ff / base.d_ff * d_ff
            changes["moe"] = {"d_ff": nearest_multiple(width, multiple)}
        if base.latent is not None:
            ranks = {"kv_rank": base.latent.kv_rank, "q_rank": base.latent.q_rank}
            changes["latent"] = {
                name: nearest_multiple(rank * growth, self.rule.rank_multiple) for name, rank in ranks.items() if rank
            }
        model = _model(base, changes)
        return Shape(model, changes, count_parameters(model))

    def _heads(self, d_model: int) -> dict[str, Any]:
        base, width = self.base, self.head_dim
        n_heads = nearest_multiple(d_model / base.d_model * base.n_heads * base.head_width / width, self.group)
        changes: dict[str, Any] = {"n_heads": n_heads}
        if base.n_kv_heads is not None:
            changes["n_kv_heads"] = 1 if base.kv_heads == 1 else n_heads // self.group
        if base.latent is None and (base.head_dim is not None or n_heads * width != d_model):
            changes["head_dim"] = width
        return changes


def nearest_multiple(value: float, multiple: int) -> int:
    """The multiple nearest to a number, at least one of it."""
    return max(1, round(value / multiple)) * multiple


def _model(base: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    from pydantic import ValidationError

    data = base.model_dump()
    for name, value in changes.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    try:
        return ModelConfig.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"the rule `shape` makes no model of d_model = {changes['d_model']}, n_layers = {changes['n_layers']}: "
            f"{problem}"
        ) from None


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """A model's shape as plain data, by the config's names."""
    return {
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_kv_heads": model.kv_heads,
        "d_ff": model.d_ff,
    }
