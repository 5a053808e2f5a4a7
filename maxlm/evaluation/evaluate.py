"""Held-out loss in nats a token and bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from maxlm.data.loader import Loader, device_batches, process_rows
from maxlm.errors import DataError
from maxlm.inference.load import load_run
from maxlm.models.config import LossConfig
from maxlm.models.losses import Batch, next_token_loss
from maxlm.models.transformer import Model, Params
from maxlm.parallel.axes import activation_spec, shards_of


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
            raise DataError(
                "there are no held-out tokens to evaluate on; raise data.heldout_fraction and prepare again"
            )
        return {
            "eval_loss": nll / tokens,
            "eval_bits_per_byte": nll / math.log(2) / size if size else math.nan,
            "eval_tokens": round(tokens),
            "eval_bytes": round(size),
        }


def evaluate_run(run_dir: str | Path, step: int | None = None) -> dict[str, float]:
    """The scores of a run's checkpoint (the newest intact one) on all of its held-out documents, on this machine.

    Raises CheckpointError or DataError where the checkpoint or the token store is missing or damaged.
    """
    run = load_run(run_dir, step)
    train = run.config.train
    shards = shards_of("batch", run.mesh)
    rows = -(-train.global_batch_tokens // train.seq_len // shards) * shards
    loader = Loader(
        run.config.data, seq_len=train.seq_len, global_batch=rows, seed=train.seed, objective=run.config.objective
    )
    sharding = jax.NamedSharding(run.mesh, activation_spec("batch", "length"))
    batches = device_batches(loader.eval_batches(process_rows(sharding, rows)), sharding, rows)
    with jax.set_mesh(run.mesh):
        return {"step": run.step, **Evaluator(run.model, run.config.loss)(run.params, batches)}


def _sums(model: Model, params: Params, batch: Batch, loss: LossConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, parts = next_token_loss(model, params, batch, loss)
    return parts["nll_sum"], jnp.sum(batch["weights"]), jnp.sum(batch["target_bytes"])
