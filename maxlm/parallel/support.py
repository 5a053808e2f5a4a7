"""What cannot go together, with the reason. A pair that is not refused here is tested.

`check` looks at a config alone, before any device work; `check_mesh` once the axis sizes are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.errors import ConfigError
from maxlm.parallel.axes_table import ACTIVATIONS, DATA, STORED

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class Refusal:
    """A setting, or a pair of them, that is refused."""

    feature: str
    reason: str
    applies: Callable[[RunConfig], bool]
    remedy: str


REFUSALS = (
    Refusal(
        "mesh.expert > 1",
        "experts are not yet spread over devices",
        lambda config: config.mesh.expert != 1,
        "set mesh.expert=1; mesh.fsdp and mesh.tensor shard experts' weights",
    ),
    Refusal(
        "model.moe.balance_loss over a batch with train.accumulation > 1",
        "the load of a batch is known when the last microbatch is done, and its gradient is needed in the first",
        lambda config: (
            config.model.moe is not None
            and config.model.moe.balance_loss > 0
            and config.model.moe.balance_loss_over == "batch"
            and config.train.accumulation > 1
        ),
        "set model.moe.balance_loss_over=sequence or train.accumulation=1",
    ),
    Refusal(
        "data.objective.kind = 'prefix_lm' with model.mtp_layers",
        "a module's keys of the prefix hold tokens behind it, which are to be predicted",
        lambda config: config.data.objective.kind == "prefix_lm" and config.model.mtp_layers > 0,
        "set model.mtp_layers=0",
    ),
    Refusal(
        "data.objective.kind = 'prefix_lm' with positions of distances backwards (alibi, relative, transformer_xl)",
        "a decoder's have nothing to say of tokens ahead, which a prefix sees",
        lambda config: (
            config.data.objective.kind == "prefix_lm"
            and config.model.positions not in ("rope", "learned", "sinusoidal")
        ),
        "set model.positions=rope",
    ),
    Refusal(
        "mesh.context > 1",
        "attention over pieces of a sequence is not there yet",
        lambda config: config.mesh.context != 1,
        "set mesh.context=1; mesh.tensor shards the residual stream by sequence",
    ),
)


def check(config: RunConfig) -> None:
    """Raises ConfigError with every refusal that applies to the config."""
    problems = [f"{r.feature} is refused: {r.reason}; {r.remedy}" for r in REFUSALS if r.applies(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_mesh(config: RunConfig, sizes: dict[str, int]) -> None:
    """Raises ConfigError for every size of the model or the batch that the mesh does not divide, naming both keys."""
    model, tensor = config.model, sizes["tensor"]
    stored = (*DATA, *STORED) if config.mesh.zero else STORED
    storage, storage_keys = _product(sizes, stored)
    storage_keys += " (mesh.zero > 0)" if config.mesh.zero and sizes.get("data", 1) > 1 else ""
    shards, shard_keys = _product(sizes, ACTIVATIONS["batch"])
    pieces, piece_keys = _product(sizes, ACTIVATIONS["residual_length"])
    rows = config.train.global_batch_tokens // config.train.seq_len
    needs = (
        ("model.d_model", model.d_model, storage_keys, storage),
        ("model.n_heads", model.n_heads, "mesh.tensor", tensor),
        ("model.n_kv_heads", model.kv_heads, "mesh.tensor", tensor),
        ("model.d_ff", model.d_ff, "mesh.tensor", tensor),
        ("model.moe.d_ff", model.moe.d_ff if model.moe is not None else tensor, "mesh.tensor", tensor),
        ("the padded vocabulary of model.vocab_size", model.padded_vocab_size, "mesh.tensor", tensor),
        ("train.seq_len", config.train.seq_len, piece_keys, pieces),
        (
            "the rows of a microbatch (train.global_batch_tokens / train.seq_len / train.accumulation)",
            rows // config.train.accumulation,
            shard_keys,
            shards,
        ),
    )
    if model.latent is not None:
        ranks = (("model.latent.kv_rank", model.latent.kv_rank), ("model.latent.q_rank", model.latent.q_rank or 0))
        needs += tuple((name, rank, storage_keys, storage) for name, rank in ranks)
    if model.mtp_layers:
        needs += (("model.d_model, with mtp_layers,", model.d_model, "mesh.tensor", tensor),)
    problems = [
        f"{what} = {value} is not a multiple of {axis} = {size}" for what, value, axis, size in needs if value % size
    ]
    if problems:
        raise ConfigError("the mesh does not divide the model or the batch:\n" + "\n".join(problems))


def _product(sizes: dict[str, int], axes: tuple[str, ...]) -> tuple[int, str]:
    """The devices along some mesh axes, and the keys of those that have more than one."""
    named = [axis for axis in axes if sizes.get(axis, 1) > 1]
    return math.prod(sizes[axis] for axis in named), " x ".join(f"mesh.{axis}" for axis in named)


def table() -> list[dict[str, str]]:
    """The refusals as rows, for `maxlm config --support`."""
    return [{"refused": r.feature, "because": r.reason, "instead": r.remedy} for r in REFUSALS]
