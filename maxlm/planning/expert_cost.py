"""What tokens send on their way to experts on other devices and back. Needs no JAX.

Rows are those of `kernels/exchange.py`, where load is even: they travel there and back in the forward pass, there again
where experts' products are made again, and both ways once more in the backward pass (docs/parallelism-expert.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from maxlm.models.moe_exchange import chosen
from maxlm.parallel.axes_table import WEIGHTS
from maxlm.planning.layout import Cost
from maxlm.planning.memory_model import BYTES, Shapes
from maxlm.planning.recomputation import again

if TYPE_CHECKING:
    from maxlm.config import RunConfig

SHARE_BYTES = 4


def expert_cost(config: RunConfig, sizes: Mapping[str, int], cost: Callable[..., Cost], *, ragged: bool) -> Cost:
    """The communication of all layers' experts in a microbatch, forward, backward and what is done again.

    `cost(kind, bytes, *axes)` is of one collective; `ragged`: rows travel without padding, as on TPUs.
    """
    model, axes = config.model, WEIGHTS["experts"]
    devices = math.prod(sizes.get(axis, 1) for axis in axes)
    total = Cost()
    if model.moe is None or devices == 1:
        return total
    tokens, width = Shapes.of(config, sizes).tokens, BYTES[config.precision.compute]
    layers = sum(kind.experts for side in model.sides.values() for kind in (*side, *side[-1:] * model.mtp_layers))
    there = 2 + bool(again(model).names & {"expert_up", "expert_gate"})
    if chosen(model.moe, devices, ragged=ragged) == "all_gather":
        everything = tokens * devices * model.d_model * width
        total += cost("all-gather", everything, *axes) * there
        return (total + cost("reduce-scatter", everything, *axes) * 2) * layers
    rows = tokens * model.moe.experts_per_token * (1 if ragged else model.moe.exchange_factor)
    total += cost("all-to-all", rows * (model.d_model * width + SHARE_BYTES), *axes) * there
    return (total + cost("all-to-all", rows * model.d_model * width, *axes) * 2) * layers
