"""Bytes of a training step on one device, predicted from the config: no compiler asked.

Parameters and optimizer state are exact. For the rest three moments of the step are counted, and the largest is the
peak: the loss of the last microbatch (everything kept for the backward pass, and the logits of a chunk), the backward
pass of a layer (everything kept, the gradients so far, and one layer's own arrays), and the optimizer (all gradients).
What is counted was read from compiled programs for TPUs; `tests/planning/compiled_memory.json` has their peaks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.models.config import ModelConfig
from maxlm.models.flops import n_distances
from maxlm.models.stacks import LayerKind
from maxlm.models.weights import weights_of
from maxlm.parallel.axes_table import ACTIVATIONS, PIPELINE
from maxlm.parallel.pipeline_schedule import Turns
from maxlm.planning.recomputation import products
from maxlm.planning.widths import choices, dense_width, expert_width

if TYPE_CHECKING:
    from maxlm.config import RunConfig

BYTES = {"float32": 4, "bfloat16": 2}
BATCH_ARRAYS_BYTES = 5 * 4  # training/program.py: five arrays of 4 bytes a token

# kernels/cross_entropy.py chooses the tokens of a chunk so (it needs JAX, and the planner's first answer has none).
CHUNK_BYTES, LEAST_CHUNK_TOKENS = 512 << 20, 1024

LANES = 128

# Arrays of [tokens, d_ff] that the activation leaves for the backward pass where everything is kept, besides its
# inputs: outputs of its elementwise steps, and its result (jax.ad_checkpoint's list of saved residuals).
ACTIVATION_ARRAYS = {
    "swiglu": 4, "swiglu_clamped": 7, "geglu": 6, "gelu": 5, "gelu_exact": 3, "silu": 3, "relu": 1.5, "relu2": 2.5
}  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """What a microbatch is on one device."""

    tokens: int
    """of the rows that a device has, positions whole"""
    residual_tokens: int
    """of the residual stream, whose positions tensor parallelism shares out"""
    heads: float
    kv_heads: float
    d_ff: float
    """inside dense feed-forward blocks and shared experts, the mean over layers"""
    expert_ff: float
    """inside all the routed experts that a token goes to, the mean over layers"""
    routed: float
    """rows sorted by expert, one for each choice of a token, the mean over layers"""
    mlp_shards: int
    """of every width inside"""
    vocab: int
    distances: float
    """that layers project, the mean over them; 0 where positions are not Transformer-XL's"""

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> Shapes:
        """Raises no error on sizes that do not divide: `parallel/support.py` does."""

        def shards(name: str) -> int:
            return math.prod(sizes.get(axis, 1) for axis in ACTIVATIONS[name])

        model, train = config.model, config.train
        tokens = train.global_batch_tokens // microbatches(config, sizes) // shards("batch") // shards("length")
        return cls(
            tokens=tokens,
            residual_tokens=tokens * shards("length") // shards("residual_length"),
            heads=model.n_heads / shards("heads"),
            kv_heads=model.kv_heads / shards("kv_heads"),
            d_ff=sum(dense_width(model, kind) for kind in model.layer_kinds) / model.n_layers / shards("mlp"),
            expert_ff=sum(expert_width(model, kind) for kind in model.layer_kinds) / model.n_layers / shards("mlp"),
            routed=tokens * sum(choices(model, kind) for kind in model.layer_kinds) / model.n_layers,
            mlp_shards=shards("mlp"),
            vocab=model.padded_vocab_size // shards("vocab"),
            distances=sum(n_distances(model, kind, train.seq_len) for kind in model.layer_kinds) / model.n_layers,
        )


def microbatches(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Into how many a step's batch is cut, by accumulation and by a pipeline."""
    stages = sizes.get(PIPELINE, 1)
    turns = Turns.of(config.pipeline, stages, 1).microbatches if stages > 1 else 1
    return config.train.accumulation * turns


def predicted_memory(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes a device by kind: parameters, optimizer, gradients, activations, temporaries; and total, at the peak.

    Activations are what waits for the backward pass; temporaries what lives inside a layer or a chunk of the loss,
    the layers' weights in the compute format (cast once for all, as they rest), and the batch.
    """
    kept, gradients = kept_bytes(config, sizes), _Gradients.of(config, sizes)
    cast = _cast_bytes(config, sizes)
    # Each moment: activations, gradients, temporaries.
    moments = (
        (kept, gradients.accumulated + gradients.whole_head, cast + _loss_bytes(config, sizes)),
        (
            kept,
            gradients.accumulated + gradients.layers + gradients.head,
            cast + _layer_bytes(config, sizes),
        ),
        (0, gradients.accumulated or gradients.all, 0),
    )
    activations, held, temporaries = max(moments, key=sum)
    batch = Shapes.of(config, sizes).tokens * microbatches(config, sizes) * BATCH_ARRAYS_BYTES
    found = {
        **state_bytes(config, sizes),
        "gradients": int(held),
        "activations": int(activations),
        "temporaries": int(temporaries) + batch + _staged_bytes(config, sizes),
    }
    return {**found, "total": sum(found.values())}


def state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Parameters, and the optimizer's two moments and counters, as they rest on a device."""
    zero, stored = config.mesh.zero, BYTES[config.precision.parameters]
    widths = [(weight, 4 if weight.float32 else stored) for weight in weights_of(config.model)]
    parameters = sum(weight.at_rest(sizes, shard_over_data=zero == 3) * width for weight, width in widths)
    moments = 2 * sum(weight.at_rest(sizes, shard_over_data=zero >= 1) * width for weight, width in widths)
    return {"parameters": parameters, "optimizer": moments}


def kept_bytes(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Activations of all layers that wait for the backward pass of a microbatch, in device memory."""
    shapes = Shapes.of(config, sizes)
    carry = shapes.residual_tokens * config.model.d_model * BYTES[config.precision.compute]
    if "layer_input" in config.model.remat.offload or (
        config.model.remat.policy == "none" and config.model.norm == "layer"
    ):
        # On the host; or not asked for, where a layer norm has kept what it subtracted the mean from.
        carry = 0
    kept = config.model.total_layers * (carry + kept_per_layer(config, shapes))
    if (stages := sizes.get(PIPELINE, 1)) > 1:
        kept *= Turns.of(config.pipeline, stages, 1).kept / config.pipeline.repeats / stages
    return int(kept)


def kept_per_layer(config: RunConfig, shapes: Shapes) -> float:
    """Bytes of a layer that its remat policy keeps, besides the layer's input."""
    model, width = config.model, BYTES[config.precision.compute]
    named = named_bytes(model, shapes, width)
    if model.remat.policy == "full":
        return 0
    if model.remat.policy == "names":
        return sum(named[name] for name in set(model.remat.names) - set(model.remat.offload))
    if model.remat.policy == "dots":
        return sum(named[name] for name in products(model))
    return _everything(model, shapes, named, width)


def named_bytes(model: ModelConfig, shapes: Shapes, width: int) -> dict[str, float]:
    """Bytes of each activation that a remat policy can name, one layer."""
    q = shapes.tokens * shapes.heads * model.head_width * width
    k = shapes.tokens * shapes.kv_heads * model.head_width * width
    v = shapes.tokens * shapes.kv_heads * model.value_width * width
    out = shapes.tokens * shapes.heads * model.value_width * width
    q_latent = kv_latent = 0
    if model.latent is not None:
        q_latent, kv_latent = (
            shapes.tokens * rank * width for rank in (model.latent.q_rank or 0, model.latent.cached_width)
        )
    residual = shapes.residual_tokens * model.d_model * width
    inner = shapes.tokens * shapes.d_ff * width
    lse = shapes.tokens * shapes.heads * 4
    return {
        "layer_input": 0,  # kept whatever the policy, and counted there
        "q_latent": q_latent,
        "kv_latent": kv_latent,
        "q": q,
        "k": k,
        "v": v,
        "r": shapes.distances * shapes.heads * model.head_width * width,
        "flash_out": out * lane_padding(model) + lse,  # the TPU kernel names both so
        "flash_lse": 0,
        "attention_out": 0 if model.parallel_residual else residual,  # no gradient needs it beside a parallel MLP
        "mlp_gate": inner if model.gated else 0,
        "mlp_up": inner,
        "mlp_out": residual,
        "expert_gate": shapes.tokens * shapes.expert_ff * width if model.gated else 0,
        "expert_up": shapes.tokens * shapes.expert_ff * width,
    }


def lane_padding(model: ModelConfig) -> float:
    """How much larger the attention kernel's arrays are for filling the 128 lanes of a TPU with narrower heads."""
    return -(-model.head_width // LANES) * LANES / model.head_width


def _everything(model: ModelConfig, shapes: Shapes, named: Mapping[str, float], width: int) -> float:
    """Policy none: each norm leaves float32 arrays of the width of the residual stream, and the normed input is kept as
    the matmuls take it; attention's output is kept in two layouts."""
    residual32 = shapes.residual_tokens * model.d_model * 4
    norms = 2 * (model.norms_before + model.norms_after) * (3 if model.norm == "layer" else 2) * residual32
    normed = 2 * shapes.tokens * model.d_model * width
    if model.qk_norm != "none":
        norms += (named["q"] + named["k"]) * (1 + 2 * 4 / width)
    attention = lane_padding(model) * (named["q"] + named["k"] + named["v"]) + named["flash_out"] + named["q"]
    if shapes.distances:  # queries of distances, beside those of keys
        attention += named["q"] + named["r"]
    between = named["attention_out"] if model.norm == "rms" else 0
    mlp = named["mlp_up"] + named["mlp_gate"] + ACTIVATION_ARRAYS[model.mlp] * named["mlp_up"]
    mlp += named["expert_up"] + named["expert_gate"] + ACTIVATION_ARRAYS[model.mlp] * named["expert_up"]
    # Tokens as they are sorted, and the inside times their shares.
    routed = shapes.routed * model.d_model * width + named["expert_up"]
    return norms + normed + attention + between + mlp + routed


@dataclass(frozen=True)
class _Gradients:
    """Bytes of the gradients that are held at some moment."""

    accumulated: int
    """float32 sums over microbatches, besides the gradients of the present one; 0 without accumulation"""
    layers: int
    """of all layers, as the backward pass stacks them: where and in the format in which the parameters rest"""
    whole_head: int
    """of the head while the loss makes it: added up in float32 over chunks; where there is one chunk, it never is"""
    head: int
    """of the head after that, as it rests"""
    all: int

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> _Gradients:
        model, stored = config.model, BYTES[config.precision.parameters]
        at_rest = [
            (weight, weight.at_rest(sizes, shard_over_data=config.mesh.zero == 3)) for weight in weights_of(model)
        ]
        everything = sum(size for _, size in at_rest)
        layers = sum(size for weight, size in at_rest if weight.part not in ("embedding", "head"))
        shapes = Shapes.of(config, sizes)
        width = BYTES[config.precision.compute] if chunk_tokens(config, shapes) >= shapes.tokens else 4
        return cls(
            accumulated=4 * everything if config.train.accumulation > 1 else 0,
            layers=stored * layers,
            whole_head=width * shapes.vocab * model.d_model,
            head=stored * next(size for weight, size in at_rest if weight.part == "embedding"),
            all=stored * everything,
        )


def _cast_bytes(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """The layers' weights as they rest, in the compute format: loops over layers find them cast."""
    if config.precision.compute == config.precision.parameters:
        return 0
    weights = (weight for weight in weights_of(config.model) if weight.part in ("attention", "distances", "mlp"))
    elements = sum(weight.at_rest(sizes, shard_over_data=config.mesh.zero == 3) for weight in weights)
    return BYTES[config.precision.compute] * elements


def _staged_bytes(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Layers' weights as stages take turns with them, and their gradients in float32, beside what rests."""
    if sizes.get(PIPELINE, 1) == 1:
        return 0
    layers = (weight for weight in weights_of(config.model) if weight.stack is not None)
    elements = sum(weight.at_rest(sizes, shard_over_data=config.mesh.zero == 3) for weight in layers)
    return elements * (BYTES[config.precision.parameters] + 4)


def _layer_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """What lives in the middle of a layer's backward pass, at the gradient of the MLP's inside: that and what it is
    made from; attention's arrays for later; the residual stream's; gathered weights, or gradients in their place."""
    model, width = config.model, BYTES[config.precision.compute]
    shapes = Shapes.of(config, sizes)
    named = named_bytes(model, shapes, width)
    inner = max(_inner_bytes(model, shapes, kind, width) for kind in set(model.layer_kinds))
    # Attention's output in two layouts; its log-sum-exp leaves the kernel once for each of 128 lanes.
    lse = shapes.tokens * shapes.heads * LANES * 4
    attention = named["q"] + lane_padding(model) * (2 * named["q"] + named["k"] + named["v"]) + lse
    rope = shapes.tokens * model.rope_width * 4 if model.positions == "rope" else 0
    if shapes.distances:
        # Queries of distances and their gradients; projected distances, and their gradients in float32, of the cut
        # diagonals of the scores; the sinusoids.
        attention += 2 * named["q"] + named["r"] * (2 + 2 * 4 / width) + shapes.distances * model.d_model * width
    residual = (3 * shapes.residual_tokens + 2 * shapes.tokens) * model.d_model * width
    gathered = Counter[str | None]()
    for weight in weights_of(model):
        if weight.part in ("attention", "mlp"):
            gathered[weight.stack] += weight.gathered(sizes) * width
    return inner + attention + rope + residual + max(gathered.values())


def _inner_bytes(model: ModelConfig, shapes: Shapes, kind: LayerKind, width: int) -> float:
    """The inside of a layer's feed-forward block with its gradient, and of routed experts their sorted tokens too."""
    inside = shapes.tokens * (dense_width(model, kind) + expert_width(model, kind)) / shapes.mlp_shards
    sorted_rows = 2 * shapes.tokens * choices(model, kind) * model.d_model
    return (inside * (3 if model.gated else 2) + sorted_rows) * width


def _loss_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """The gathered head, a chunk of float32 logits, and the residual stream; its gradient where there are chunks."""
    model, width = config.model, BYTES[config.precision.compute]
    shapes = Shapes.of(config, sizes)
    chunk = chunk_tokens(config, shapes)
    copies = 1 + (chunk < shapes.tokens) + (shapes.residual_tokens < shapes.tokens)
    residual = copies * shapes.tokens * model.d_model * width
    return shapes.vocab * model.d_model * width + chunk * shapes.vocab * 4 + residual


def chunk_tokens(config: RunConfig, shapes: Shapes) -> int:
    """Tokens whose logits exist at once on a device."""
    at_once = config.loss.chunk_tokens or max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * shapes.vocab) // 64 * 64)
    return math.ceil(shapes.tokens / n_chunks(shapes.tokens, at_once))


def n_chunks(tokens: int, at_once: int) -> int:
    return -(-tokens // at_once)
