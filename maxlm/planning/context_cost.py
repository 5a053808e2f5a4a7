"""What attention sends where rows are shared by position: keys round a ring, or heads for positions. Needs no JAX.

Bytes of a pass are those of `kernels/ring_attention.py`, by its own plan of steps, and `kernels/attention_exchange.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from maxlm.kernels.masks import Mask
from maxlm.kernels.ring_plan import PIECES, Ring, Tiling
from maxlm.models.masking import mask_of
from maxlm.parallel.axes_table import ACTIVATIONS
from maxlm.planning.layout import Cost
from maxlm.planning.memory_model import BYTES, Shapes
from maxlm.planning.recomputation import again

if TYPE_CHECKING:
    from maxlm.config import RunConfig

FLOAT32 = 4


def context_cost(config: RunConfig, sizes: Mapping[str, int], cost: Callable[..., Cost]) -> Cost:
    """The communication of all layers' attention in a microbatch, forward, backward and what is done again.

    `cost(kind, bytes, *axes)` is of one collective. Raises ValueError where rows are no multiple of the chunks.
    """
    axes = ACTIVATIONS["length"]
    devices = math.prod(sizes.get(axis, 1) for axis in axes)
    total = Cost()
    if devices == 1:
        return total
    model, width, shapes = config.model, BYTES[config.precision.compute], Shapes.of(config, sizes)
    passes = 1 + again(model).share("attention scores", model)
    rows = shapes.tokens * devices / config.train.seq_len
    both = model.head_width + model.value_width
    for (mask, n_queries, n_keys), layers in Counter(_attentions(config)).items():
        keys = rows * n_keys / devices * shapes.kv_heads * both
        if model.context_attention == "all_to_all":
            heads = shapes.kv_heads * _repeats(shapes.heads, shapes.kv_heads, devices)
            elements = rows / devices * (n_queries * shapes.heads + n_keys * heads) * both
            total += cost("all-to-all", elements * width, *axes) * (layers * (passes + 1))
            continue
        sent, home = ring_shares(mask, devices, n_queries, n_keys)
        total += cost("collective-permute", keys * width, *axes) * (layers * sent * (passes + 1))
        total += cost("collective-permute", keys * FLOAT32, *axes) * (layers * home)
    return total


@cache
def ring_shares(mask: Mask, devices: int, n_queries: int, n_keys: int) -> tuple[float, float]:
    """How often a device sends as much as its own keys and values are in a pass; and their gradients, in backward."""
    queries, keys = (Tiling(PIECES, n // (PIECES * devices), n // devices) for n in (n_queries, n_keys))
    plan = Ring(devices, queries, keys, mask).plan
    if plan.whole:
        return devices - 1, devices
    share = sum(step.stop - step.first for step in plan.steps if step.shift) / PIECES
    return share, share


def _attentions(config: RunConfig) -> Iterator[tuple[Mask, int, int]]:
    """Of every layer's attentions the mask and the lengths of its rows of queries and of keys."""
    model, lengths = config.model, config.row_lengths
    for side, kinds in model.sides.items():
        length = lengths.encoder if side == "encoder" else lengths.decoder
        for kind in (*kinds, *(kinds[-1:] * model.mtp_layers)):
            yield mask_of(model, kind), length, length
            if kind.cross:
                yield Mask(causal=False), length, lengths.encoder


def _repeats(heads: float, kv_heads: float, devices: int) -> int:
    """As `attention_exchange.repeats`."""
    group = round(heads / kv_heads)
    return next((n for n in range(1, group + 1) if group % n == 0 and round(kv_heads * n) % devices == 0), group)
