"""What cannot go together, with the reason. A pair that is not refused here is tested.

`check` looks at a config alone, before any device work; `check_mesh` once the axis sizes are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.errors import ConfigError
from maxlm.parallel.axes_table import ACTIVATIONS, DATA, PIPELINE, STORED
from maxlm.parallel.pipeline_schedule import Turns

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class Refusal:
    """A setting, or a pair of them, that is refused."""

    feature: str
    reason: str
    applies: Callable[[RunConfig], bool]
    remedy: str


def _staged(config: RunConfig) -> bool:
    return config.mesh.pipeline != 1


def _balances_batches(config: RunConfig) -> bool:
    moe = config.model.moe
    return moe is not None and moe.balance_loss > 0 and moe.balance_loss_over == "batch"


REFUSALS = (
    Refusal(
        "pipeline.schedule = '1f1b' with mesh.pipeline > 1 and an encoder-decoder",
        "every stage of the decoder gives the encoder's result a gradient, and backward of the encoder waits for all",
        lambda config: (
            _staged(config) and config.pipeline.schedule == "1f1b" and config.model.kind == "encoder_decoder"
        ),
        "set pipeline.schedule=gpipe or interleaved",
    ),
    Refusal(
        "pipeline.schedule = '1f1b' with mesh.pipeline > 1 and model.positions = 'relative'",
        "layers of all stages share the table of distances, and its gradient is not passed on",
        lambda config: _staged(config) and config.pipeline.schedule == "1f1b" and config.model.positions == "relative",
        "set pipeline.schedule=gpipe or interleaved",
    ),
    Refusal(
        "mesh.pipeline > 1 with model.remat.offload",
        "a pipeline keeps activations from tick to tick in arrays of its own, which lie in the device's memory",
        lambda config: _staged(config) and bool(config.model.remat.offload),
        "set model.remat.offload=[] or mesh.pipeline=1",
    ),
    Refusal(
        "model.moe.balance_loss over a batch with mesh.pipeline > 1",
        "the load of a batch is known when the last microbatch is done, and its gradient is needed in the first",
        lambda config: _staged(config) and _balances_batches(config),
        "set model.moe.balance_loss_over=sequence",
    ),
    Refusal(
        "mesh.expert > 1",
        "experts are not yet spread over devices",
        lambda config: config.mesh.expert != 1,
        "set mesh.expert=1; mesh.fsdp and mesh.tensor shard experts' weights",
    ),
    Refusal(
        "model.moe.balance_loss over a batch with train.accumulation > 1",
        "the load of a batch is known when the last microbatch is done, and its gradient is needed in the first",
        lambda config: config.train.accumulation > 1 and _balances_batches(config),
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
    rows = config.train.global_batch_tokens // config.train.seq_len // config.train.accumulation
    cut_by, microbatches = "train.accumulation", 1
    if (stages := sizes.get(PIPELINE, 1)) > 1:
        microbatches = Turns.of(config.pipeline, stages, 1).microbatches
        cut_by += f" / pipeline.microbatches = {microbatches}"
    vocab, vocab_keys = _product(sizes, ACTIVATIONS["vocab"])
    needs = (
        ("model.d_model", model.d_model, storage_keys, storage),
        ("model.n_heads", model.n_heads, "mesh.tensor", tensor),
        ("model.n_kv_heads", model.kv_heads, "mesh.tensor", tensor),
        ("model.d_ff", model.d_ff, "mesh.tensor", tensor),
        ("model.moe.d_ff", model.moe.d_ff if model.moe is not None else tensor, "mesh.tensor", tensor),
        ("the padded vocabulary of model.vocab_size", model.padded_vocab_size, vocab_keys, vocab),
        ("train.seq_len", config.train.seq_len, piece_keys, pieces),
        (
            f"the rows of a microbatch (train.global_batch_tokens / train.seq_len / {cut_by})",
            rows // microbatches,
            shard_keys,
            shards,
        ),
    )
    if model.latent is not None:
        ranks = (("model.latent.kv_rank", model.latent.kv_rank), ("model.latent.q_rank", model.latent.q_rank or 0))
        needs += tuple((name, rank, storage_keys, storage) for name, rank in ranks)
    if model.mtp_layers:
        needs += (("model.d_model, with mtp_layers,", model.d_model, "mesh.tensor", tensor),)
    problems = list(_cannot_take_turns(config, stages, rows, microbatches))
    problems += [
        f"{what} = {value} is not a multiple of {axis} = {size}" for what, value, axis, size in needs if value % size
    ]
    if problems:
        raise ConfigError("the mesh does not divide the model or the batch:\n" + "\n".join(problems))


def _cannot_take_turns(config: RunConfig, stages: int, rows: int, microbatches: int) -> Iterator[str]:
    if rows % microbatches:
        yield (
            f"pipeline.microbatches = {microbatches} (twice mesh.pipeline where not given) does not divide the {rows} "
            "rows of a batch (train.global_batch_tokens / train.seq_len / train.accumulation)"
        )
    if stages > microbatches and config.pipeline.repeats > 1:
        yield (
            f"pipeline.microbatches = {microbatches} is less than mesh.pipeline = {stages}: with pipeline.repeats = "
            f"{config.pipeline.repeats} a microbatch would come around before the last has entered"
        )


def _product(sizes: dict[str, int], axes: tuple[str, ...]) -> tuple[int, str]:
    """The devices along some mesh axes, and the keys of those that have more than one."""
    named = [axis for axis in axes if sizes.get(axis, 1) > 1]
    return math.prod(sizes[axis] for axis in named), " x ".join(f"mesh.{axis}" for axis in named)


def table() -> list[dict[str, str]]:
    """The refusals as rows, for `maxlm config --support`."""
    return [{"refused": r.feature, "because": r.reason, "instead": r.remedy} for r in REFUSALS]
