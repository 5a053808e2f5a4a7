"""How tokens reach experts on other devices: what each way moves, which moves least, and how large buffers are.

Needs no JAX, so that the planner may ask. Letters: N tokens of a device, A experts of a token, n devices that the
experts are spread over, D d_model.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from maxlm.models.moe_config import MoEConfig

Dispatch = Literal["all_to_all", "all_gather"]

# Rows of a tile: buffers of fewer would be padded to it.
_TILE = 8


def rows_moved(
    dispatch: Dispatch, *, tokens: float, experts_per_token: int, devices: int, padding: float = 1.0
) -> float:
    """Rows of D numbers that a device receives from others in one direction, with even load.

    all_to_all: `padding N A (n - 1) / n`, each choice travelling alone; all_gather: `N (n - 1)`, each token to all. A
    layer moves them twice forward (there and back) and twice backward; where its results are made again for the
    backward pass, there once more.
    """
    if dispatch == "all_gather":
        return tokens * (devices - 1)
    return padding * tokens * experts_per_token * (devices - 1) / devices


def chosen(config: MoEConfig, devices: int, *, ragged: bool) -> Dispatch:
    """The dispatch that `model.moe.dispatch` means on so many devices: with auto the one that moves fewer rows, of
    equals all_gather, whose collectives are plain. `ragged`: whether no padding travels (TPU)."""
    if config.dispatch != "auto":
        return config.dispatch
    padded = not ragged and config.router != "expert_choice"
    padding = config.exchange_factor * ceil(1 / config.exchange_factor) if padded else 1.0

    def moved(dispatch: Dispatch) -> float:
        return rows_moved(
            dispatch, tokens=1.0, experts_per_token=config.experts_per_token, devices=devices, padding=padding
        )

    return "all_to_all" if moved("all_to_all") < moved("all_gather") else "all_gather"


def most_rows(tokens: int, rows: int, experts: int, experts_per_token: int, capacity: int | None) -> int:
    """The most choices that `tokens` in so many rows of a batch can have of so many `experts`: each token takes an
    expert at most once, and an expert at most `capacity` tokens of a row."""
    worst = tokens * min(experts_per_token, experts)
    return worst if capacity is None else min(worst, rows * experts * capacity)


def round_rows(even: float, most: int, factor: float) -> int:
    """Rows of a buffer: `factor` times its even share, and never more than there can be."""
    return min(most, ceil(factor * even / _TILE) * _TILE)
