"""Bytes of a training step on one device, predicted from the config: no compiler asked.

Parameters and optimizer state are exact. For the rest three moments of the step are counted, and the largest is the
peak: the loss of the last microbatch (everything kept for the backward pass, and the logits of a chunk), the backward
pass of a layer (everything kept, the gradients so far, and one layer's own arrays), and the optimizer (all gradients).
What is counted was read from compiled programs for TPUs; `tests/planning/compiled_memory.json` has their peaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.models.config import ModelConfig
from maxlm.parallel.axes_table import ACTIVATIONS
from maxlm.planning.recomputation import PRODUCTS, offloaded
from maxlm.planning.weights import weights_of

if TYPE_CHECKING:
    from maxlm.config import RunConfig

BYTES = {"float32": 4, "bfloat16": 2}
BATCH_ARRAYS_BYTES = 5 * 4  # training/program.py: five arrays of 4 bytes a token

# kernels/cross_entropy.py chooses the tokens of a chunk so (it needs JAX, and the planner's first answer has none).
CHUNK_BYTES, LEAST_CHUNK_TOKENS = 1 << 30, 1024

# Arrays of [tokens, d_ff] that the activation leaves for the backward pass where everything is kept, besides its
# inputs: outputs of its elementwise steps, and its result (jax.ad_checkpoint's list of saved residuals).
ACTIVATION_ARRAYS = {"swiglu": 4, "geglu": 6, "gelu": 5, "relu2": 2.5}


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
    vocab: int

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> Shapes:
        """Raises no error on sizes that do not divide: `parallel/support.py` does."""

        def shards(name: str) -> int:
            return math.prod(sizes.get(axis, 1) for axis in ACTIVATIONS[name])

        model, train = config.model, config.train
        tokens = train.global_batch_tokens // train.accumulation // shards("batch")
        return cls(
            tokens=tokens,
            residual_tokens=tokens // shards("residual_length"),
            heads=model.n_heads / shards("heads"),
            kv_heads=model.kv_heads / shards("kv_heads"),
            d_ff=model.d_ff / shards("mlp"),
            vocab=model.padded_vocab_size // shards("vocab"),
        )


def predicted_memory(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes a device by kind: parameters, optimizer, gradients, activations, temporaries; and total, at the peak.

    Activations are what waits for the backward pass; temporaries what lives inside a layer, a chunk of the loss, and
    the batch.
    """
    state = state_bytes(config, sizes)
    kept = kept_bytes(config, sizes)
    batch = config.train.global_batch_tokens // (sizes["data"] * sizes["fsdp"]) * BATCH_ARRAYS_BYTES
    gradients, inner = _gradient_bytes(config, sizes)
    # Each moment: activations, gradients, temporaries.
    accumulated = gradients["accumulated"]
    moments = (
        (kept, accumulated, _loss_bytes(config, sizes)),
        (kept, accumulated + gradients["layers"] + gradients["head"], inner),
        (0, accumulated or gradients["all"], 0),
    )
    activations, held, temporaries = max(moments, key=sum)
    found = {
        **state,
        "gradients": int(held),
        "activations": int(activations),
        "temporaries": int(temporaries) + batch,
    }
    return {**found, "total": sum(found.values())}


def state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Parameters, and the optimizer's two moments and counters, as they rest on a device."""
    zero, width = config.mesh.zero, BYTES[config.precision.parameters]
    weights = weights_of(config.model)
    parameters = sum(weight.at_rest(sizes, shard_over_data=zero == 3) for weight in weights)
    moments = 2 * sum(weight.at_rest(sizes, shard_over_data=zero >= 1) for weight in weights)
    return {"parameters": parameters * width, "optimizer": moments * width}


def kept_bytes(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Activations of all layers that wait for the backward pass of a microbatch, in device memory."""
    shapes = Shapes.of(config, sizes)
    carry = shapes.residual_tokens * config.model.d_model * BYTES[config.precision.compute]
    return int(config.model.n_layers * (carry + kept_per_layer(config, shapes)))


def kept_per_layer(config: RunConfig, shapes: Shapes) -> float:
    """Bytes of a layer that its remat policy keeps, besides the layer's input."""
    model, width = config.model, BYTES[config.precision.compute]
    named = named_bytes(model, shapes, width)
    if model.remat.policy == "full":
        return 0
    if model.remat.policy == "names":
        return sum(named[name] for name in set(model.remat.names) - set(offloaded(model)))
    if model.remat.policy == "dots":
        return sum(named[name] for name in PRODUCTS)
    return _everything(model, shapes, named, width)


def named_bytes(model: ModelConfig, shapes: Shapes, width: int) -> dict[str, float]:
    """Bytes of each activation that a remat policy can name, one layer."""
    q = shapes.tokens * shapes.heads * model.head_width * width
    kv = shapes.tokens * shapes.kv_heads * model.head_width * width
    residual = shapes.residual_tokens * model.d_model * width
    inner = shapes.tokens * shapes.d_ff * width
    lse = shapes.tokens * shapes.heads * 4
    return {
        "q": q,
        "k": kv,
        "v": kv,
        "flash_out": q + lse,  # the TPU kernel names both so
        "flash_lse": 0,
        "attention_out": residual,
        "mlp_gate": inner if model.gated else 0,
        "mlp_up": inner,
        "mlp_out": residual,
    }


def _everything(model: ModelConfig, shapes: Shapes, named: Mapping[str, float], width: int) -> float:
    """Policy none: each norm leaves float32 arrays of the width of the residual stream, and the normed input is kept as
    the matmuls take it; attention's output is kept in two layouts and with the mask of padding."""
    residual32 = shapes.residual_tokens * model.d_model * 4
    norms = 2 * (3 if model.norm == "layer" else 2) * residual32
    normed = 2 * shapes.tokens * model.d_model * width
    if model.qk_norm:
        norms += (named["q"] + named["k"]) * (1 + 2 * 4 / width)
    attention = named["q"] + named["k"] + named["v"] + named["flash_out"] + named["q"] * (1 + 1 / width)
    between = named["attention_out"] if model.norm == "rms" else 0
    mlp = named["mlp_up"] + named["mlp_gate"] + ACTIVATION_ARRAYS[model.mlp] * named["mlp_up"]
    return norms + normed + attention + between + mlp


def _gradient_bytes(config: RunConfig, sizes: Mapping[str, int]) -> tuple[Mapping[str, float], float]:
    """Gradients that are held during the backward pass, and the bytes that one layer's backward pass needs inside.

    Gradients rest as the parameters do. With accumulation their float32 sums are held besides those of the microbatch.
    """
    model, zero3 = config.model, config.mesh.zero == 3
    compute, stored = BYTES[config.precision.compute], BYTES[config.precision.parameters]
    weights = weights_of(model)
    at_rest = {weight: weight.at_rest(sizes, shard_over_data=zero3) for weight in weights}
    everything = sum(at_rest[weight] for weight in weights)
    outer = sum(at_rest[weight] for weight in weights if weight.part in ("embedding", "head"))
    gradients = {
        "accumulated": 4 * everything if config.train.accumulation > 1 else 0,
        "layers": stored * (everything - outer),
        "head": stored * at_rest[weights[-1 if not model.tied_embeddings else 0]],
        "all": stored * everything,
    }
    shapes = Shapes.of(config, sizes)
    # A layer's gathered weights, and as many bytes of their gradients before those are scattered.
    layer = [weight for weight in weights if weight.part in ("attention", "mlp")]
    inside = 2 * compute * sum(weight.gathered(sizes) for weight in layer)
    named = named_bytes(model, shapes, compute)
    normed = shapes.tokens * model.d_model * compute
    attention = 2 * (2 * named["q"] + named["k"] + named["v"])
    # up, gate and their product, and the gradients of the three.
    mlp = 2 * (named["mlp_up"] * 2 + named["mlp_gate"])
    return gradients, inside + max(attention / 2 + mlp, attention) + 4 * normed - kept_again(config, shapes)


def kept_again(config: RunConfig, shapes: Shapes) -> float:
    """Bytes of one layer that are not made again in its backward pass, since they were kept."""
    named = named_bytes(config.model, shapes, BYTES[config.precision.compute])
    policy = config.model.remat.policy
    if policy == "full":
        return 0
    if policy == "names":
        return sum(named[name] for name in config.model.remat.names if name not in ("attention_out", "mlp_out"))
    return sum(named[name] for name in ("q", "k", "v", "mlp_gate", "mlp_up"))


def _loss_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Head and loss of a microbatch: the gathered head, its gradient, a chunk of float32 logits, and the residual
    stream with its gradient. The gradient is added up in float32 over chunks; where there is one, it never is."""
    model, compute = config.model, BYTES[config.precision.compute]
    shapes = Shapes.of(config, sizes)
    chunk = chunk_tokens(config, shapes)
    head = shapes.vocab * model.d_model
    gradient = head * (compute if chunk >= shapes.tokens else 4)
    rests = next(weight for weight in weights_of(model) if weight.part == "embedding")
    scattered = rests.at_rest(sizes, shard_over_data=config.mesh.zero == 3) * BYTES[config.precision.parameters]
    residual = shapes.tokens * model.d_model * compute
    return head * compute + gradient + chunk * shapes.vocab * 4 + 2 * residual + scattered


def chunk_tokens(config: RunConfig, shapes: Shapes) -> int:
    """Tokens whose logits exist at once on a device."""
    at_once = config.loss.chunk_tokens or max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * shapes.vocab) // 64 * 64)
    return math.ceil(shapes.tokens / n_chunks(shapes.tokens, at_once))


def n_chunks(tokens: int, at_once: int) -> int:
    return -(-tokens // at_once)
