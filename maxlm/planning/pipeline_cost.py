"""What a pipeline costs by formula: its bubble, and what stages pass on, gather and move. Needs no JAX.

The formulas are those of docs/parallelism-pipeline.md, as `parallel/pipeline_schedule.py` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maxlm.models.config import ModelConfig
from maxlm.models.stacks import Segment, longest, segments
from maxlm.models.weights import Weight, weights_of
from maxlm.parallel.axes_table import DATA, PIPELINE, STORED
from maxlm.parallel.pipeline_schedule import Turns
from maxlm.planning.layout import Cost
from maxlm.planning.memory_model import BYTES, Shapes

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class Pipelined:
    """The stages of a config on a mesh that has some."""

    config: RunConfig
    sizes: Mapping[str, int]
    turns: Turns

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> Pipelined | None:
        """None on a mesh without stages."""
        stages = sizes.get(PIPELINE, 1)
        if stages == 1:
            return None
        _, segment = _shared(config.model)
        return cls(config, sizes, Turns.of(config.pipeline, stages, len(segment[0].layers)))

    @property
    def stretch(self) -> float:
        """How much longer the layers of a stage take than their share of the layers: for the ticks in which it waits,
        and for repeats that are computed and passed by."""
        turns = self.turns
        padded = turns.per_turn * turns.repeats * turns.stages / turns.units
        return padded * turns.forward_ticks / (turns.repeats * turns.microbatches)

    def stage_weights(self) -> list[Weight]:
        """The weights of the layers that stages share, of all of them."""
        model = self.config.model
        side, segment = _shared(model)
        names = {f"{side}.{stack.name}" if len(model.sides) > 1 else stack.name for stack in segment}
        return [weight for weight in weights_of(model) if weight.stack in names]

    def gathered_bytes(self, when: str) -> tuple[float, float]:
        """Bytes that a device receives in a step for gathered weights of its stage, and for scattered gradients, where
        `pipeline.gather_weights` is `layer` or `step`."""
        turns, width = self.turns, BYTES[self.config.precision.compute]
        stage = sum(weight.gathered(self.sizes) * weight.layers for weight in self.stage_weights()) / turns.stages
        storing = (*STORED, *(DATA if self.config.mesh.zero == 3 else ()))
        shards = math.prod(self.sizes.get(axis, 1) for axis in storing if axis != PIPELINE)
        how = self.config.pipeline.model_copy(update={"gather_weights": when})
        return turns.gathered_bytes(how, stage * width, shards)

    def cost(self, cost: Callable[..., Cost]) -> Cost:
        """What travels between stages in a step: residual streams handed on; layers to their stages and gradients back.

        `cost(kind, bytes, *axes)` is of one collective.
        """
        config, width = self.config, BYTES[self.config.precision.compute]
        stream = Shapes.of(config, self.sizes).residual_tokens * config.model.d_model * width
        handed = cost("collective-permute", stream, PIPELINE)
        found = handed * (self.turns.passed_on * config.train.accumulation)
        zero3 = config.mesh.zero == 3
        stored = sum(weight.at_rest(self.sizes, shard_over_data=zero3) for weight in self.stage_weights())
        moved = cost("all-to-all", stored * BYTES[config.precision.parameters], PIPELINE)
        return found + moved * (2 * config.train.accumulation)

    def to_dict(self) -> dict[str, Any]:
        """For a plan: ticks, bubble, and the bytes of both kinds of gathering."""
        turns = self.turns
        return {
            "schedule": turns.schedule,
            "stages": turns.stages,
            "microbatches": turns.microbatches,
            "repeats": turns.repeats,
            "layers_a_turn": turns.per_turn,
            "padding": turns.padding,
            "ticks": turns.forward_ticks,
            "bubble": turns.bubble,
            "turns_kept": turns.kept,
            "gather_weights": self.config.pipeline.gather_weights,
            "gathered_bytes": {when: sum(self.gathered_bytes(when)) for when in ("layer", "step")},
        }


def _shared(model: ModelConfig) -> tuple[str, Segment]:
    """The side and the segment whose layers stages share; of an encoder-decoder, the decoder's."""
    side = "encoder" if model.kind == "encoder" else "decoder"
    return side, longest(segments(model.sides[side]))
