"""Held-out loss in nats a token and bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from maxlm.errors import DataError
from maxlm.models.config import LossConfig
from maxlm.models.losses import Batch, next_token_loss
from maxlm.models.transformer import Model, Params


class Evaluator:
    """Sums losses over batches on the mesh, with one program compiled at first use."""

    def __init__(self, model: Model, loss: LossConfig):
        self.step = jax.jit(lambda params, batch: _sums(model, params, batch, loss))

    def __call__(self, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
        """`eval_loss` (nats a target token), `eval_bits_per_byte`, and how many tokens and bytes were predicted.

        Bits per byte, the loss in bits over the bytes of text that the predicted tokens stand for, compares models
        whatever their tokenizers. A batch has, beside a training batch's arrays, `target_bytes`.
        """
        totals = [self.step(params, batch) for batch in batches]
        nll, tokens, size = (math.fsum(float(part[i]) for part in totals) for i in range(3))
        if not tokens:
            raise DataError("there are no held-out tokens to evaluate on; raise data.heldout_fraction and prepare again")
        return {
            "eval_loss": nll / tokens,
            "eval_bits_per_byte": nll / math.log(2) / size if size else math.nan,
            "eval_tokens": tokens,
            "eval_bytes": size,
        }


def _sums(model: Model, params: Params, batch: Batch, loss: LossConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, parts = next_token_loss(model, params, batch, loss)
    return parts["nll_sum"], jnp.sum(batch["weights"]), jnp.sum(batch["target_bytes"])
