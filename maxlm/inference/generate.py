"""Continuing prompts, in batches, with a key-value cache; an encoder-decoder's decoder continues what its encoder
reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxlm.errors import ConfigError, DataError
from maxlm.inference.sampling import Sampling, sample
from maxlm.kernels.cross_entropy import logits
from maxlm.kernels.manual import platform
from maxlm.models.block import Caches
from maxlm.models.transformer import EncodedCache, Model, Params, Transformer
from maxlm.parallel.axes import activation_spec, constrain, shards_of

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

# Prompts and caches come in lengths 32, 48, 64, 96, 128, ..., so that few programs are compiled for many prompts.
SHORTEST_BUCKET = 32
PREFILL_PIECE = 256
# From this size of model on a CPU decodes with layers of their own arrays: faster, and twice as long to compile.
APART_FROM_BYTES = 256 << 20


class Decoding(NamedTuple):
    """What goes from one token to the next: `step` tokens are chosen in every row, the last of them is `token_B`."""

    step: jax.Array
    caches: Caches
    lengths_B: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    chosen_BN: jax.Array


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    seed: int,
    first: np.ndarray | None = None,
    prefix: bool = False,
) -> list[list[int]]:
    """Up to `max_tokens` new tokens for each prompt, without the `eos_id` that ends one early. Needs the current mesh.

    An encoder-decoder's encoder reads the prompts; its decoder begins with `model.decoder_start_id`, which is not among
    the new tokens. The same seed gives a prompt the same tokens whatever else is in the batch, its own number in
    `prompts` apart.
    `first`, bool [prompts, vocab_size], says which tokens each prompt's first new one may be; any where not given.
    `prefix`: a decoder's prompts are prefixes, whose tokens see each other both ways (`data.objective.kind=prefix_lm`).
    Raises DataError for a prompt that is empty or not of the vocabulary, ConfigError for an encoder, or where positions
    are learned and what one side reads and writes passes `model.max_seq_len`.
    """
    _check(model, prompts, max_tokens)
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    before = 1 if model.config.kind == "encoder_decoder" else longest
    limit = model.config.max_seq_len if model.config.positions == "learned" else None
    width, space = bucket(longest, limit), bucket(before + max_tokens, limit)
    shards = shards_of("batch", jax.sharding.get_abstract_mesh())
    n_rows = -(-len(prompts) // shards) * shards
    tokens_BT = np.zeros((n_rows, width), np.int32)
    lengths_B = np.ones(n_rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)] = prompt
        lengths_B[i] = len(prompt)
    first_BV = np.ones((n_rows, model.config.vocab_size), bool)
    if first is not None:
        first_BV[: len(prompts)] = first
    # Rows that only fill the batch up are done from the start.
    done_B = np.arange(n_rows) >= len(prompts)
    chosen_BN = _generate(
        model, sampling, space, bucket(max_tokens), prefix, params, tokens_BT, lengths_B, done_B, first_BV,
        np.int32(max_tokens), np.int32(-1 if eos_id is None else eos_id), np.uint32(seed % 2**32),
    )  # fmt: skip
    return [_until(row[:max_tokens].tolist(), eos_id) for row in np.asarray(chosen_BN)[: len(prompts)]]


def generate_run(
    run_dir: str | Path,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """The continuations of `prompts` by a run's model at `step`, or at its newest intact checkpoint.

    A prompt gets the tokenizer's bos in front where it has one, as documents have in training. One that ends in spaces
    is continued as if they belonged to the next word (see `heal`). An encoder-decoder's encoder gets prompts as they
    are, with the tokenizer's eos behind them, as its inputs have in training. Of a run with
    `data.objective.kind=prefix_lm` a prompt is the prefix.
    """
    from maxlm.data.tokenizer import load_tokenizer
    from maxlm.inference.load import load_run

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
    run = load_run(run_dir, step)
    tokenizer = load_tokenizer(run.config.tokenizer)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = tokenizer.encode_batch(list(prompts))
    healed: list[tuple[list[int], str, list[int] | None]] = [
        (tokens + end, "", None) if run.config.model.kind == "encoder_decoder" else heal(tokenizer, start + tokens)
        for tokens in encoded
    ]
    first = np.ones((len(prompts), run.config.model.vocab_size), bool)
    for row, (_, _, allowed) in zip(first, healed, strict=True):
        if allowed is not None:
            row[:] = False
            row[allowed] = True
    with jax.set_mesh(run.mesh):
        new = generate(
            run.model,
            run.params,
            [ids for ids, _, _ in healed],
            max_tokens=max_tokens,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
            seed=seed,
            first=first,
            prefix=run.config.objective.kind == "prefix_lm",
        )
    return [tokenizer.decode(tokens)[len(spaces) :] for tokens, (_, spaces, _) in zip(new, healed, strict=True)]


def heal(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], str, list[int] | None]:
    """Takes back a last token of nothing but spaces: (tokens, the text taken back, the tokens that begin with it).

    Words carry the space before them in their token, so a model has hardly seen a space alone before a word, and goes
    on badly from one. Where nothing is to be taken back: (ids, "", None).
    """
    spaces = tokenizer.decode(ids[-1:])
    if len(ids) < 2 or not spaces or spaces.strip(" "):
        return ids, "", None
    allowed = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).startswith(spaces)]
    return ids[:-1], spaces, allowed


def bucket(length: int, limit: int | None = None) -> int:
    """The length that `length` is filled up to: the next power of two, or that and a half; at most `limit`."""
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if limit is None else min(size, limit)


def encode(module: Transformer, tokens_BS: jax.Array, lengths_B: jax.Array) -> EncodedCache:
    """What the decoder takes of prompts that an encoder-decoder's encoder reads, filled up on the right."""
    positions_BS = constrain(jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape), "batch", "length")
    segments_BS = (positions_BS < lengths_B[:, None]).astype(jnp.int32)
    return module.encoded_cache(module.encode(tokens_BS, positions_BS, segments_BS))


def prefill(
    module: Transformer,
    model: Model,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    space: int,
    encoded: EncodedCache | None = None,
    *,
    prefix: bool = False,
):
    """The logits `[B, V]` after each row's own last token, and caches of `space` positions with the rows in it.

    Rows are filled up on the right. The caches then also hold keys of the filling, but no token ever attends to them:
    they come after every token of their row, and each is overwritten before the row has grown to its position.
    Long prompts go in by pieces, so that the scores of a piece against the cache are all that exists at once; but not
    as a `prefix`, whose tokens see those of later pieces.
    """
    B, T = tokens_BT.shape
    piece = PREFILL_PIECE if T % PREFILL_PIECE == 0 and not prefix else T
    prefix_BS = constrain(jnp.arange(space)[None, :] < lengths_B[:, None], "batch", "length") if prefix else None
    rows, stream = activation_spec("batch"), activation_spec("batch", "length", "embed")

    def pick(x_BTD, last_B1D, start, lengths_B):
        """Each row's last token, where it is in this piece."""
        index_B = jnp.clip(lengths_B - 1 - start, 0, piece - 1)
        here_B1D = jax.vmap(lambda x_TD, i: x_TD[i][None])(x_BTD, index_B)
        inside_B = (lengths_B > start) & (lengths_B <= start + piece)
        return jnp.where(inside_B[:, None, None], here_B1D, last_B1D)

    pick = jax.shard_map(pick, in_specs=(stream, stream, PartitionSpec(), rows), out_specs=stream)

    def one_piece(carry, start):
        caches, last_B1D = carry
        piece_BT = jax.lax.dynamic_slice_in_dim(tokens_BT, start, piece, axis=1)
        x_BTD, caches = module.decode(piece_BT, caches, jnp.zeros_like(lengths_B) + start, encoded, prefix_BS)
        return (caches, pick(constrain(x_BTD, "batch", "length", "embed"), last_B1D, start, lengths_B)), None

    last_B1D = constrain(jnp.zeros((B, 1, model.config.d_model), module.dtype), "batch", "length", "embed")
    carry = (module.empty_caches(B, space), last_B1D)
    (caches, last_B1D), _ = jax.lax.scan(one_piece, carry, jnp.arange(0, T, piece, dtype=jnp.int32))
    return next_logits(module, last_B1D), caches


def next_logits(module: Transformer, x_BTD: jax.Array) -> jax.Array:
    """The float32 logits `[B, V]` of the last position of `x_BTD`."""
    config = module.config
    scores = logits(
        module.head_input(x_BTD[:, -1:]),
        module.head_weight(),
        vocab_size=config.vocab_size,
        bias_V=module.head_bias(),
        softcap=config.logit_softcap,
    )
    return scores[:, 0]


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    model: Model,
    sampling: Sampling,
    space: int,
    n_out: int,
    prefix: bool,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    done_B: jax.Array,
    first_BV: jax.Array,
    max_tokens: jax.Array,
    eos_id: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    """The chosen tokens `[B, n_out]`, of which `max_tokens` are made; a row that is done goes on with `eos_id`."""
    module = model.bind(_in_compute_format(model, params))
    tokens_BT = constrain(tokens_BT, "batch", "length")
    lengths_B, done_B = constrain(lengths_B, "batch"), constrain(done_B, "batch")
    rows_B = constrain(jnp.arange(tokens_BT.shape[0], dtype=jnp.int32), "batch")

    def choose(logits_BV, lengths_B, done_B):
        token_B = jnp.where(done_B, eos_id, sample(logits_BV, sampling, seed, rows_B, lengths_B))
        return token_B, done_B | (token_B == eos_id)

    def unfinished(state: Decoding):
        return (state.step < max_tokens) & ~jnp.all(state.done_B)

    def one_token(state: Decoding) -> Decoding:
        # A row that is done goes on in place of its last position, so that its cache never overflows.
        x_BTD, caches = module.decode(jnp.maximum(state.token_B, 0)[:, None], state.caches, state.lengths_B, encoded)
        lengths_B = state.lengths_B + ~state.done_B
        token_B, done_B = choose(next_logits(module, x_BTD), lengths_B, state.done_B)
        chosen_BN = jax.lax.dynamic_update_slice_in_dim(state.chosen_BN, token_B[:, None], state.step, axis=1)
        return Decoding(state.step + 1, caches, lengths_B, token_B, done_B, chosen_BN)

    encoded = None
    if model.config.kind == "encoder_decoder":
        encoded = encode(module, tokens_BT, lengths_B)
        tokens_BT = jnp.full_like(tokens_BT[:, :1], model.config.decoder_start_id)
        lengths_B = jnp.ones_like(lengths_B)
    logits_BV, caches = prefill(module, model, tokens_BT, lengths_B, space, encoded, prefix=prefix)
    logits_BV = jnp.where(constrain(first_BV, "batch", None), logits_BV, -jnp.inf)
    token_B, done_B = choose(logits_BV, lengths_B, done_B)
    chosen_BN = constrain(jnp.full((tokens_BT.shape[0], n_out), eos_id, jnp.int32), "batch", "length")
    chosen_BN = jax.lax.dynamic_update_slice_in_dim(chosen_BN, token_B[:, None], 0, axis=1)
    if platform() == "cpu" and _bytes(params) >= APART_FROM_BYTES:
        module.take_apart()
    start = Decoding(jnp.int32(1), caches, lengths_B, token_B, done_B, chosen_BN)
    return jax.lax.while_loop(unfinished, one_token, start).chosen_BN


def _bytes(params: Params) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(params))


def _in_compute_format(model: Model, params: Params) -> Params:
    """The weights of matmuls cast once, and not again with every token. Norms and routers stay: they compute in
    float32."""

    def cast(logical: tuple[str, ...], weight: jax.Array) -> jax.Array:
        return weight if {"norm", "router"} & set(logical) else weight.astype(model.precision.compute)

    return jax.tree.map(cast, model.logical_axes(), params, is_leaf=lambda node: isinstance(node, tuple))


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def _check(model: Model, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if model.config.kind == "encoder":
        raise ConfigError(
            "model.kind = 'encoder': an encoder sees all of a text at once and does not continue it; generate with a "
            "decoder or an encoder_decoder"
        )
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}: at least 1 token must be asked for")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {i} is empty, and the tokenizer has no bos to begin with; give it some text")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise DataError(
                f"prompt {i} has token {max(prompt) if min(prompt) >= 0 else min(prompt)}, and the model has "
                f"{model.config.vocab_size} tokens: the tokenizer is of another model"
            )
        limit = model.config.max_seq_len
        together = len(prompt) + max_tokens
        if model.config.kind == "encoder_decoder":
            together = max(len(prompt), 1 + max_tokens)
        if model.config.positions == "learned" and together > limit:
            raise ConfigError(
                f"prompt {i} of {len(prompt)} tokens and {max_tokens} new ones pass model.max_seq_len = {limit}, and "
                "the model has learned no positions after that; ask for fewer tokens, or shorten the prompt"
            )
