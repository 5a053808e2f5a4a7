"""How the stages of a pipeline take turns: its config section, and ticks, bubble and memory by formula. Needs no JAX.

P stages lie along the mesh axis `pipeline`, M microbatches are what a batch is cut into, V is how often a microbatch
goes around all stages. A tick is what all stages do at once, each with another microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key


class PipelineConfig(Section):
    """How layers that `mesh.pipeline` splits into stages take turns."""

    schedule: Literal["gpipe", "interleaved", "1f1b"] = key(
        "1f1b",
        "gpipe: all forward, then all backward (arXiv:1811.06965); interleaved: the same, with each microbatch going "
        "around the stages `repeats` times (arXiv:2104.04473); 1f1b: one forward and one backward in turn, with "
        "activations of 2 stages - 1 microbatches whatever their number (arXiv:2006.09503)",
    )
    microbatches: int | None = key(
        None, "microbatches of a batch (of one of train.accumulation); twice the stages where not given", ge=1
    )
    repeats: int = key(1, "schedule interleaved: how often a microbatch goes around all stages", ge=1)
    gather_weights: Literal["layer", "step"] = key(
        "layer",
        "when the pieces of stages' weights that mesh.fsdp stores come together: layer by layer for every microbatch, "
        "or once a step, which holds a whole stage's weights in the compute format",
    )

    @model_validator(mode="after")
    def _repeats_are_interleaved(self) -> PipelineConfig:
        if (self.repeats > 1) != (self.schedule == "interleaved"):
            raise ValueError(
                f"schedule = {self.schedule!r} with repeats = {self.repeats}: interleaved has 2 repeats or more, "
                "gpipe and 1f1b have 1"
            )
        return self


@dataclass(frozen=True)
class Turns:
    """The turns of P `stages` with M `microbatches`, V `repeats` and layers in `units` that are passed on whole."""

    schedule: str
    stages: int
    microbatches: int
    repeats: int
    units: int
    """repeats of the segment's pattern of layers: one layer each where all are alike"""

    @classmethod
    def of(cls, config: PipelineConfig, stages: int, units: int) -> Turns:
        """The turns of a config."""
        return cls(config.schedule, stages, config.microbatches or 2 * stages, config.repeats, units)

    @property
    def per_turn(self) -> int:
        """Units that a stage runs in a tick: `ceil(units / (V P))`."""
        return -(-self.units // (self.repeats * self.stages))

    @property
    def padding(self) -> int:
        """Units that are computed and thrown away, so that all stages have equally many."""
        return self.per_turn * self.repeats * self.stages - self.units

    @property
    def forward_ticks(self) -> int:
        """Ticks with a forward pass: `V M + P - 1`, of whatever schedule."""
        return self.repeats * self.microbatches + self.stages - 1

    @property
    def scans(self) -> tuple[int, ...]:
        """Lengths of the scans over ticks. 1f1b: P - 1 of forward, M of forward and backward, P - 1 of backward. The
        others: forward; autodiff makes another of backward that is as long."""
        if self.schedule == "1f1b":
            return self.stages - 1, self.microbatches, self.stages - 1
        return (self.forward_ticks,)

    @property
    def bubble(self) -> float:
        """The share of its time that a stage waits: `(P - 1) / (V M + P - 1)`. Of 1f1b too, whose forward and backward
        ticks are each `M + P - 1`."""
        return (self.stages - 1) / self.forward_ticks

    @property
    def kept(self) -> int:
        """Turns whose activations a stage keeps at once: every tick's of gpipe and interleaved, `2 P - 1` of 1f1b."""
        return 2 * self.stages - 1 if self.schedule == "1f1b" else self.forward_ticks

    @property
    def passed_on(self) -> int:
        """How often a stage hands a microbatch's residual stream (or its gradient) to the next in a step."""
        return 2 * self.forward_ticks

    def gathers(self, config: PipelineConfig) -> tuple[int, int]:
        """How often a step gathers the weights of a turn, a V-th of the stage's, and how often it scatters gradients.

        By `layer` a tick gathers in forward and in backward (gathered weights are never kept), by `step` each weight
        once. Gradients are scattered in every tick of backward.
        """
        ticks = self.forward_ticks
        return (self.repeats if config.gather_weights == "step" else 2 * ticks), ticks

    def gathered_bytes(self, config: PipelineConfig, stage_bytes: float, shards: int) -> tuple[float, float]:
        """Bytes that a device receives in a step for gathered weights, and for scattered gradients.

        `stage_bytes` are those of a stage's weights once gathered, in the compute format; `shards` the devices that
        store them in pieces (`mesh.fsdp` and what stores besides, stages apart).
        """
        turn_bytes = stage_bytes / self.repeats * (shards - 1) / shards
        gathers, scatters = self.gathers(config)
        return gathers * turn_bytes, scatters * turn_bytes
