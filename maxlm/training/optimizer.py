"""AdamW over a parameter tree, with weight decay on what is not a norm or a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from maxlm.models.config import ModelConfig
from maxlm.models.transfer import epsilon_factor, learning_rate_factor
from maxlm.models.transformer import Model
from maxlm.training.config import OptimizerConfig

# Moved by the step's own rule and not by gradients, which are zero: see `models/moe_losses.py`.
UNTRAINED = ("balance_bias",)


def make_optimizer(config: OptimizerConfig, model: Model) -> optax.GradientTransformation:
    """AdamW without its learning rate: updates are to be multiplied by -learning_rate (see `step.py`).

    With `model.transfer` each weight has its own learning rate and epsilon; the learning rate times the weight decay is
    the same for all (arXiv:2505.01618, table 1). Clipping is the step's, which needs the norm of the gradient for its
    own ends too.
    """
    # m / (sqrt(v) + eps f), of moments of g, is m / (sqrt(v) + eps) of moments of g / f.
    steps = [
        *scaled(model, lambda *weight: 1 / epsilon_factor(*weight)),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        *scaled(model, learning_rate_factor),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)),
    ]
    return optax.chain(*steps)


def scaled(
    model: Model, factor: Callable[[ModelConfig, tuple[str, ...], tuple[str, ...]], float]
) -> list[optax.GradientTransformation]:
    """What multiplies each weight's update by its own factor; nothing where all factors are 1."""
    if model.config.transfer is None:
        return []

    def of(path, logical) -> float:
        return factor(model.config, tuple(str(part.key) for part in path), logical)

    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    factors = jax.tree_util.tree_map_with_path(of, model.logical_axes(), is_leaf=is_axes)
    if all(number == 1 for number in jax.tree.leaves(factors)):
        return []
    multiply = lambda updates, _: jax.tree.map(lambda f, g: g if f == 1 else g * f, factors, updates)  # noqa: E731
    return [optax.stateless(multiply)]


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """True for each parameter that decays: those with none of the words in a part of their path."""

    def decays(path, _) -> bool:
        return not any(word in str(part.key) for part in path for word in (*no_decay, *UNTRAINED))

    return jax.tree_util.tree_map_with_path(decays, params)
