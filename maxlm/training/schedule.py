"""Learning rates by step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maxlm.training.config import ScheduleConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> Schedule:
    """The learning rate of the step numbered from 0, float32.

    Step s of the warm-up has peak * (s + 1) / warmup_steps. The decay ends at `final_fraction` of the peak on the last
    step. Shapes: cosine (arXiv:1608.03983, eq. 5), linear, wsd (constant, then linear), inverse_sqrt
    (arXiv:1706.03762, eq. 3: peak * sqrt(warmup / step)), constant.
    """
    warmup = config.warmup_steps
    decay_start = warmup
    if config.kind == "wsd":
        decay_start = max(warmup, total_steps - (config.decay_steps or max(1, total_steps // 10)))
    floor = config.final_fraction

    def schedule(step: jax.Array) -> jax.Array:
        now = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((now - decay_start) / max(1, total_steps - decay_start), 0, 1)
        if config.kind == "cosine":
            scale = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif config.kind in ("linear", "wsd"):
            scale = 1 - (1 - floor) * progress
        elif config.kind == "inverse_sqrt":
            scale = jnp.sqrt(max(1, warmup) / jnp.maximum(now, max(1, warmup)))
        else:
            scale = jnp.ones(())
        warm = now / max(1, warmup)
        return jnp.float32(peak) * jnp.where(now <= warmup, warm, scale)

    return schedule
