"""How long, on how much data at a time, and with which optimizer and schedule a run trains."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key


class SpikeConfig(Section):
    """Steps whose loss or gradient norm is not finite, or leaps, change nothing and are counted."""

    sigmas: float | None = key(
        6.0,
        "skip a step whose loss or gradient norm is this many standard deviations above the recent mean; null: never",
        gt=0,
    )
    window: int = key(
        128, "recent steps that make the mean and deviation; none is skipped before it is full", unit="steps", ge=8
    )


class TrainConfig(Section):
    """The length of the run and the batch of a step."""

    steps: int = key(..., "optimizer steps of the whole run", unit="steps", ge=1)
    seq_len: int = key(..., "tokens of a row; documents are packed into rows", unit="tokens", ge=1)
    global_batch_tokens: int = key(..., "tokens of one optimizer step over all devices", unit="tokens", ge=1)
    accumulation: int = key(1, "microbatches that a step's batch is cut into, one after the other", ge=1)
    seed: int = key(0, "seed of the initial weights and of the order of the data", ge=0)
    spike: SpikeConfig = key(SpikeConfig(), "which steps are skipped")


class OptimizerConfig(Section):
    """AdamW (arXiv:1711.05101) with clipping of the global gradient norm."""

    learning_rate: float = key(..., "peak learning rate", gt=0)
    beta1: float = key(0.9, "decay of the mean of gradients", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the mean of squared gradients", ge=0, lt=1)
    epsilon: float = key(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay, times the learning rate", ge=0)
    no_decay: tuple[str, ...] = key(
        ("norm", "bias", "scale"),
        "parameters without weight decay: those with one of these words in a part of their name",
    )
    clip_norm: float | None = key(1.0, "largest global gradient norm; null: no clipping", gt=0)


class ScheduleConfig(Section):
    """The learning rate by step: a linear warm-up, then one of five shapes."""

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = key(
        "cosine", "shape after the warm-up; wsd is warmup-stable-decay (arXiv:2404.06395)"
    )
    warmup_steps: int = key(0, "steps of linear warm-up from zero", unit="steps", ge=0)
    decay_steps: int | None = key(
        None, "wsd: steps of the final decay, a tenth of the run where not given", unit="steps", ge=1
    )
    final_fraction: float = key(
        0.1, "cosine, linear, wsd: learning rate at the end of the decay, as a fraction of the peak", ge=0, le=1
    )

    @model_validator(mode="after")
    def _decay_steps_are_wsd(self) -> ScheduleConfig:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(f"decay_steps = {self.decay_steps} is a key of kind 'wsd', and kind is {self.kind!r}")
        return self
