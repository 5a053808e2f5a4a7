"""Parameters and FLOPs, counted once: metrics, planner and scaling laws all read this file.

Conventions: a multiply-add is 2 FLOPs; only matmuls count; attention counts the pairs of positions that the mask
leaves; of routed experts those count that a token goes to, none dropped; the backward pass is twice the forward;
recomputation (remat) is not model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from maxlm.kernels.masks import Mask
from maxlm.models.config import ModelConfig, PrecisionConfig
from maxlm.models.masking import mask_of
from maxlm.models.stacks import LayerKind
from maxlm.models.weights import weights_of


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, without the rows that pad the vocabulary."""

    total: int
    embedding: int
    """vectors of tokens and positions, and what a head has of its own (Kaplan et al., arXiv:2001.08361, leave these out
    of N)"""
    active: int
    """those that one token uses: all, but of routed experts only those that it goes to, and none that only predict
    further ahead"""
    mtp: int = 0
    """of the modules that predict further ahead, which published sizes leave out"""

    @property
    def non_embedding(self) -> int:
        """All but the embeddings and the head."""
        return self.total - self.embedding


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model with its true vocabulary."""
    padding = config.padded_vocab_size - config.vocab_size
    counted = [
        (weight, weight.size - padding * weight.size // config.padded_vocab_size * ("vocab" in weight.logical))
        for weight in weights_of(config)
    ]
    return ParameterCount(
        total=sum(size for _, size in counted),
        embedding=sum(size for weight, size in counted if weight.part in ("embedding", "head")),
        active=round(sum(size * weight.used for weight, size in counted if not weight.mtp)),
        mtp=sum(size for weight, size in counted if weight.mtp),
    )


@dataclass(frozen=True)
class ForwardFlops:
    """Matmul FLOPs of the forward pass for one token, all layers together, by what does them."""

    attention_projections: float
    attention_scores: float
    """scores and values"""
    mlp: float
    """experts and routers too"""
    head: float

    @property
    def total(self) -> float:
        return self.attention_projections + self.attention_scores + self.mlp + self.head


def attended_positions(
    config: ModelConfig, seq_len: int, *, local: bool, causal: bool = True, prefix: bool = False
) -> float:
    """To how many positions one of a full row of `seq_len` attends on average, in a local or global layer.

    What the layer's mask leaves of the row as one document. `prefix`: the mean over its prefixes of 1 to `seq_len`
    tokens, all equally likely, whose tokens a causal mask also leaves to those before them.
    """
    return _attended(mask_of(config, LayerKind(local=local, causal=causal)), seq_len, prefix)


@cache
def _attended(mask: Mask, length: int, prefix: bool) -> float:
    behind = mask.behind(length)
    pairs = float(behind.sum())
    if not mask.causal:
        pairs = 2 * pairs - length
    elif prefix:
        # Position t, when it is in the prefix, is seen from as many before it as it sees there.
        pairs += sum((int(seen) - 1) * (length - t) for t, seen in enumerate(behind)) / length
    return pairs / length


class RowLengths(NamedTuple):
    """What becomes of a row: tokens of an encoder-decoder's sides; whether a decoder's documents have a prefix."""

    encoder: int
    decoder: int
    prefix: bool = False


def forward_flops(config: ModelConfig, seq_len: int, lengths: RowLengths | None = None) -> ForwardFlops:
    """Matmul FLOPs of training's forward pass for one token of a full row of `seq_len`, by part.

    Scores and values take 2 FLOPs each for every pair of positions that the mask leaves, head and channel; scores twice
    where queries are multiplied by distances too. The projection of distances, once for all rows of a batch, does not
    count (see `distance_flops`). `lengths` are what an objective makes of such a row: of an encoder-decoder's sides,
    both `seq_len` unless given; and whether a decoder sees prefixes both ways, counted as `attended_positions` says.
    Modules that predict further ahead are layers like the last one, whose projections of two vectors to one count with
    the MLP's, and use the head again.
    """
    c = config
    prefix = lengths is not None and lengths.prefix
    lengths = lengths if lengths is not None and c.kind == "encoder_decoder" else RowLengths(seq_len, seq_len)
    shares = lengths.encoder / seq_len, lengths.decoder / seq_len
    pairs = 0.0
    for side, kinds in c.sides.items():
        length, share = (lengths.encoder, shares[0]) if side == "encoder" else (lengths.decoder, shares[1])
        for kind in (*kinds, *kinds[-1:] * c.mtp_layers):
            pairs += share * attended_positions(c, length, local=kind.local, causal=kind.causal, prefix=prefix)
            pairs += share * lengths.encoder if kind.cross else 0
    scored = 2 if c.positions == "transformer_xl" else 1
    head = c.vocab_size * c.d_model * (1 + c.mtp_layers) + (c.d_model**2 if c.head_transform else 0)
    return ForwardFlops(
        attention_projections=_product_flops(c, "attention", *shares),
        attention_scores=2 * c.n_heads * (scored * c.head_width + c.value_width) * pairs,
        mlp=_product_flops(c, "mlp", *shares),
        head=shares[1] * 2 * head,
    )


def forward_flops_per_token(config: ModelConfig, seq_len: int, lengths: RowLengths | None = None) -> float:
    """The same in one number, the head included."""
    return forward_flops(config, seq_len, lengths).total


def training_flops_per_token(config: ModelConfig, seq_len: int, lengths: RowLengths | None = None) -> float:
    """Model FLOPs of forward and backward for one token: three times the forward's."""
    return 3 * forward_flops_per_token(config, seq_len, lengths)


def n_distances(config: ModelConfig, kind: LayerKind, seq_len: int) -> int:
    """How many distances between query and key a layer projects; 0 where positions are not Transformer-XL's."""
    if config.positions != "transformer_xl":
        return 0
    behind = min(config.attention_window or seq_len, seq_len) if kind.local else seq_len
    return behind if kind.causal else 2 * behind - 1


def distance_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of a forward pass's projections of distances in all layers, which do not depend on the number of rows."""
    kinds = (*config.layer_kinds, *config.layer_kinds[-1:] * config.mtp_layers)
    inner = config.n_heads * config.head_width
    return sum(2 * config.d_model * inner * n_distances(config, kind, seq_len) for kind in kinds)


def cache_bytes_per_token(config: ModelConfig, precision: PrecisionConfig) -> int:
    """Bytes that decoding keeps for a token: keys and values of all layers, or their latents and the shared key. What
    all rows share, the projected distances of Transformer-XL's positions, is not a token's."""
    width = 2 * config.kv_heads * config.head_width if config.latent is None else config.latent.cached_width
    return config.n_layers * width * {"float32": 4, "bfloat16": 2}[precision.compute]


def _product_flops(config: ModelConfig, part: str, encoder_share: float, decoder_share: float) -> float:
    """Of the products of a token with the weights of a part, in all layers; an encoder's and a decoder's by their
    shares of the tokens."""
    weights = (weight for weight in weights_of(config) if weight.part == part and weight.product)
    return sum(
        2 * weight.size * weight.used * (encoder_share if weight.of_encoder else decoder_share) for weight in weights
    )
