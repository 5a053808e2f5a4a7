"""What cannot go together, with the reason. A pair that is not refused here is tested.

`check` looks at a config alone, before any device work; `check_mesh` once the axis sizes are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.errors import ConfigError
from maxlm.parallel.axes_table import ACTIVATIONS, DATA, PIPELINE, STORED
from maxlm.parallel.features import FEATURES
from maxlm.parallel.pipeline_schedule import Turns

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class Refusal:
    """Two features, by their names, that do not go together, and what to do."""

    first: str
    second: str
    reason: str
    remedy: str

    def applies(self, config: RunConfig) -> bool:
        """Whether the config uses both."""
        return FEATURES[self.first].used(config) and FEATURES[self.second].used(config)

    def __str__(self) -> str:
        first, second = FEATURES[self.first].keys, FEATURES[self.second].keys
        return f"{first} with {second} is refused: {self.reason}; {self.remedy}"


_IN_TURN = "the load of a batch is known when the last microbatch is done, and its gradient is needed in the first"
_NOTHING_AHEAD = "a decoder's distances have nothing to say of tokens ahead, which a prefix sees"

REFUSALS = (
    Refusal(
        "1f1b",
        "encoder-decoder",
        "every stage of the decoder gives the encoder's result a gradient, and backward of the encoder waits for all",
        "set pipeline.schedule=gpipe or interleaved",
    ),
    Refusal(
        "1f1b",
        "T5 bias",
        "layers of all stages share the table of distances, and its gradient is not passed on",
        "set pipeline.schedule=gpipe or interleaved",
    ),
    Refusal(
        "pipeline",
        "offload",
        "a pipeline keeps activations from tick to tick in arrays of its own, which lie in the device's memory",
        "set model.remat.offload=[] or mesh.pipeline=1",
    ),
    Refusal("pipeline", "balance over a batch", _IN_TURN, "set model.moe.balance_loss_over=sequence"),
    Refusal(
        "accumulation",
        "balance over a batch",
        _IN_TURN,
        "set model.moe.balance_loss_over=sequence or train.accumulation=1",
    ),
    Refusal(
        "expert",
        "dense",
        "there are no experts to spread over devices, and for all else this axis is one of mesh.fsdp",
        "set mesh.expert=1 and use mesh.fsdp",
    ),
    Refusal(
        "context",
        "expert choice",
        "an expert chooses among all tokens of a row, of which a device has a piece",
        "set mesh.context=1; mesh.tensor shards the residual stream by sequence",
    ),
    Refusal(
        "ring",
        "chosen kernel",
        "a ring needs the log-sum-exp of keys at an offset that only the device knows, which the chunked one gives",
        "set model.attention_implementation=auto or model.context_attention=all_to_all",
    ),
    Refusal(
        "prefix",
        "MTP",
        "a module's keys of the prefix hold tokens behind it, which are to be predicted",
        "set model.mtp_layers=0",
    ),
    Refusal("prefix", "ALiBi", _NOTHING_AHEAD, "set model.positions=rope"),
    Refusal("prefix", "T5 bias", _NOTHING_AHEAD, "set model.positions=rope"),
    Refusal("prefix", "Transformer-XL", _NOTHING_AHEAD, "set model.positions=rope"),
)


def check(config: RunConfig) -> None:
    """Raises ConfigError with every refusal that applies to the config."""
    problems = [str(refusal) for refusal in REFUSALS if refusal.applies(config)]
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
        (
            "model.moe.n_experts",
            model.moe.n_experts if model.moe is not None else 0,
            "mesh.expert",
            sizes.get("expert", 1),
        ),
        ("model.moe.d_ff", model.moe.d_ff if model.moe is not None else tensor, "mesh.tensor", tensor),
        ("the padded vocabulary of model.vocab_size", model.padded_vocab_size, vocab_keys, vocab),
        *((name, length, piece_keys, pieces) for name, length in _lengths(config)),
        *_context_needs(config, sizes),
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


def _lengths(config: RunConfig) -> list[tuple[str, int]]:
    """The lengths of rows that are shared by position, and what to call them."""
    if config.model.kind != "encoder_decoder":
        return [("train.seq_len", config.train.seq_len)]
    lengths = config.row_lengths
    return [(f"the {side}'s row of train.seq_len", getattr(lengths, side)) for side in ("encoder", "decoder")]


def _context_needs(config: RunConfig, sizes: dict[str, int]) -> list[tuple[str, int, str, int]]:
    """What attention over rows shared by position wants of its sizes."""
    context = sizes.get("context", 1)
    if context == 1:
        return []
    if config.model.context_attention == "ring":
        return [(name, length, "2 x mesh.context", 2 * context) for name, length in _lengths(config)]
    keys, devices = "mesh.tensor x mesh.context (model.context_attention = all_to_all)", sizes["tensor"] * context
    return [("model.n_heads", config.model.n_heads, keys, devices)]


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
    """Every feature against every other, as rows: `+` where they go together, else the number of the reason."""
    numbers = {frozenset((refusal.first, refusal.second)): str(i) for i, refusal in enumerate(REFUSALS, start=1)}
    letters = [chr(ord("a") + i) for i in range(len(FEATURES))]
    return [
        {"": letter, "feature": row}
        | {
            other: "" if row == column else numbers.get(frozenset((row, column)), "+")
            for other, column in zip(letters, FEATURES, strict=True)
        }
        for letter, row in zip(letters, FEATURES, strict=True)
    ]


def reasons() -> list[dict[str, str]]:
    """The refusals as rows, with their numbers in `table`."""
    return [
        {
            "": str(i),
            "refused": f"{FEATURES[refusal.first].keys} with {FEATURES[refusal.second].keys}",
            "because": refusal.reason,
            "instead": refusal.remedy,
        }
        for i, refusal in enumerate(REFUSALS, start=1)
    ]


def markdown() -> str:
    """Both tables as they stand in docs/parallelism.md: `python -c 'from maxlm.parallel import support;
    print(support.markdown())'`."""
    found = []
    for rows in (table(), reasons()):
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        found.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(found)
