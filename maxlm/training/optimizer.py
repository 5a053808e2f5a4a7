"""AdamW over a parameter tree, with weight decay on what is not a norm or a bias."""

from __future__ import annotations

from typing import Any

import jax
import optax

from maxlm.training.config import OptimizerConfig

# Moved by the step's own rule and not by gradients, which are zero: see `models/moe_losses.py`.
UNTRAINED = ("balance_bias",)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate: updates are to be multiplied by -learning_rate (see `step.py`).

    Clipping is the step's, which needs the norm of the gradient for its own ends too.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.no_decay)),
    )


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """True for each parameter that decays: those with none of the words in a part of their path."""

    def decays(path, _) -> bool:
        return not any(word in str(part.key) for part in path for word in (*no_decay, *UNTRAINED))

    return jax.tree_util.tree_map_with_path(decays, params)
