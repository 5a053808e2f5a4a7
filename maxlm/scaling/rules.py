"""Learning rate, batch and warm-up by the size of a run: published power laws, or given coefficients.

N is a model's non-embedding parameters, D the training tokens, C the training FLOPs without the head's, in every rule
that was published; `power` takes what a spec says, of all parameters and all FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key


@dataclass(frozen=True)
class Scale:
    """What rules go by."""

    n_params: int
    n_params_nonembedding: int
    n_tokens: float
    flops: float
    flops_without_head: float


@dataclass(frozen=True)
class PublishedRule:
    """A rule as its source has it."""

    equation: str
    source: str
    value: Callable[[Scale], float]


LEARNING_RATES = {
    "deepseek": PublishedRule(
        "0.3118 C^-0.1250",
        "DeepSeek LLM, arXiv:2401.02954, equation 1; C without the vocabulary's FLOPs",
        lambda s: 0.3118 * s.flops_without_head**-0.1250,
    ),
    "step_law": PublishedRule(
        "1.79 N^-0.713 D^0.307",
        "Step Law, arXiv:2503.04715, equation 1; N without embeddings",
        lambda s: 1.79 * s.n_params_nonembedding**-0.713 * s.n_tokens**0.307,
    ),
    "kaplan": PublishedRule(
        "0.003239 - 0.0001395 ln N",
        "Kaplan et al., arXiv:2001.08361, equation D.1; N without embeddings",
        lambda s: 0.003239 - 0.0001395 * math.log(s.n_params_nonembedding),
    ),
}
BATCHES = {
    "deepseek": PublishedRule(
        "0.2920 C^0.3271 tokens",
        "DeepSeek LLM, arXiv:2401.02954, equation 1; C without the vocabulary's FLOPs",
        lambda s: 0.2920 * s.flops_without_head**0.3271,
    ),
    "step_law": PublishedRule(
        "0.58 D^0.571 tokens", "Step Law, arXiv:2503.04715, equation 1", lambda s: 0.58 * s.n_tokens**0.571
    ),
}


class PowerLaw(Section):
    """value x (parameters / at)^a x (tokens / at)^b x (FLOPs / at)^c: a number, with whatever exponents are given."""

    value: float | None = key(None, "rule `power`: the value at reference_*", gt=0)
    parameters_exponent: float = key(0.0, "rule `power`: exponent of all parameters")
    tokens_exponent: float = key(0.0, "rule `power`: exponent of the training tokens")
    flops_exponent: float = key(0.0, "rule `power`: exponent of the training FLOPs")
    reference_parameters: float = key(1.0, "rule `power`: the parameters that `value` is of", gt=0)
    reference_tokens: float = key(1.0, "rule `power`: the training tokens that `value` is of", gt=0)
    reference_flops: float = key(1.0, "rule `power`: the training FLOPs that `value` is of", gt=0, unit="FLOPs")
    multiplier: float = key(1.0, "what the rule says is multiplied by this", gt=0)
    minimum: float | None = key(None, "the least that it may be", gt=0)
    maximum: float | None = key(None, "the most that it may be", gt=0)

    def evaluate(self, rule: str, published: dict[str, PublishedRule], scale: Scale) -> float:
        """What the rule gives at a scale, within minimum and maximum."""
        if rule == "power":
            assert self.value is not None  # the validators of the sections see to it
            found = (
                self.value
                * (scale.n_params / self.reference_parameters) ** self.parameters_exponent
                * (scale.n_tokens / self.reference_tokens) ** self.tokens_exponent
                * (scale.flops / self.reference_flops) ** self.flops_exponent
            )
        else:
            found = published[rule].value(scale)
        found = max(found * self.multiplier, -math.inf if self.minimum is None else self.minimum)
        return min(found, math.inf if self.maximum is None else self.maximum)

    def check(self, rule: str) -> None:
        """Raises ValueError where the keys are not those of the rule."""
        own = ("value", *(name for name in PowerLaw.model_fields if name.endswith("_exponent") or "reference" in name))
        if rule == "power" and self.value is None:
            raise ValueError("rule = 'power' needs `value`")
        if rule != "power":
            given = [name for name in own if getattr(self, name) != PowerLaw.model_fields[name].default]
            if given:
                raise ValueError(f"{given[0]} is of rule 'power', and rule = {rule!r}; leave it out")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum = {self.minimum:g} is more than maximum = {self.maximum:g}")


class LearningRateRule(PowerLaw):
    """The peak learning rate of a run."""

    rule: Literal["power", "deepseek", "step_law", "kaplan"] = key(
        "step_law", "power: by the keys below; the others as " + "; ".join(r.source for r in LEARNING_RATES.values())
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> LearningRateRule:
        self.check(self.rule)
        return self

    def at(self, scale: Scale) -> float:
        """The learning rate, to four digits. Raises ValueError where the rule gives none above 0."""
        found = self.evaluate(self.rule, LEARNING_RATES, scale)
        if not found > 0:
            raise ValueError(f"rule {self.rule!r} gives {found:.3g} for {scale.n_params_nonembedding:,} parameters")
        return float(f"{found:.4g}")


class BatchRule(PowerLaw):
    """The global batch of a run, in tokens."""

    rule: Literal["power", "deepseek", "step_law"] = key(
        "step_law", "power: by the keys below; the others as " + "; ".join(r.source for r in BATCHES.values())
    )
    multiple: int = key(1, "a microbatch is a multiple of so many rows, which the devices share out", unit="rows", ge=1)

    @model_validator(mode="after")
    def _keys_fit(self) -> BatchRule:
        self.check(self.rule)
        return self

    def at(self, scale: Scale) -> float:
        """Tokens of a batch, not yet rounded to rows."""
        return self.evaluate(self.rule, BATCHES, scale)


class WarmupRule(Section):
    """How long the learning rate of a run rises."""

    rule: Literal["fraction", "parameters", "tokens", "steps"] = key(
        "fraction",
        "fraction: of the steps; parameters: as many tokens as the model has parameters (Porian et al., "
        "arXiv:2406.19146, section 3.3); tokens, steps: so many",
    )
    value: float = key(0.02, "the fraction, tokens or steps; with rule `parameters` tokens a parameter", ge=0)
    largest_fraction: float = key(0.2, "no more than this of the steps", gt=0, lt=1)

    @model_validator(mode="after")
    def _parameters_are_whole(self) -> WarmupRule:
        if self.rule == "parameters" and "value" not in self.model_fields_set:
            raise ValueError("rule = 'parameters' needs `value`, tokens a parameter (1 in arXiv:2406.19146)")
        return self

    def at(self, n_params: int, steps: int, batch_tokens: int) -> int:
        """Steps of the warm-up."""
        wanted = {
            "fraction": self.value * steps,
            "parameters": self.value * n_params / batch_tokens,
            "tokens": self.value / batch_tokens,
            "steps": self.value,
        }[self.rule]
        return min(round(wanted), int(self.largest_fraction * steps))
