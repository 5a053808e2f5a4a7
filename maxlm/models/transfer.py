"""Which weight is what to `model.transfer`: what the optimizer scales, and what an export multiplies into the weights.

`transfer_config.py` has the table and its sources.
"""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.models.config import ModelConfig

# Logical axes that grow with the model, those of one width together: a weight with two of these widths is a hidden
# matrix, and one with less is an embedding, an output head, a router, a norm or a bias.
WIDTHS = (
    {"embed", "expert_embed"},
    {"norm"},
    {"mlp"},
    {"heads", "kv_heads", "head_dim"},
)
# Norms over one head, which all heads share: `base_head_dim` or not, their width is not the model's.
OF_ONE_HEAD = ("q_norm", "k_norm")
# What layers are made of; the residual stream sees it divided by the depth.
LAYERS = ("encoder", "decoder", "block")

Path = tuple[str, ...]


def n_widths(path: Path, logical: tuple[str, ...]) -> int:
    """How many dimensions of a weight grow with the model."""
    if path[-2:-1] and path[-2] in OF_ONE_HEAD and "norm" in logical:
        return 0
    return sum(1 for width in WIDTHS if width & set(logical))


def learning_rate_factor(config: ModelConfig, path: Path, logical: tuple[str, ...]) -> float:
    """What the learning rate of a weight is multiplied by."""
    return 1 / config.scales.width if n_widths(path, logical) == 2 else 1.0


def epsilon_factor(config: ModelConfig, path: Path, logical: tuple[str, ...]) -> float:
    """What AdamW's epsilon for a weight is multiplied by: how its gradients' size follows the model's. A number of the
    logits' own, such as a bias of the output head, has gradients of one size at all widths."""
    scales = config.scales
    factor = 1 / scales.width if n_widths(path, logical) else 1.0
    return factor / scales.depth if any(part in LAYERS for part in path) else factor


def folded(config: ModelConfig, path: str) -> float:
    """What a weight, by its path with dots, is multiplied by in a model that is equal to this one and has no transfer.

    Both sides of RoPE's rotation are linear, so that scores are scaled in queries; a head of its own takes what logits
    are multiplied by, and where it is the embedding, the last norm does.
    """
    *parents, name = path.split(".")
    scales, parent = config.scales, parents[-1] if parents else ""
    if path == "embedding.tokens":
        return scales.embedding
    if path.endswith("router.kernel"):
        return scales.router
    if path == "head.kernel" or (config.tied_embeddings and path.startswith("final_norm.")):
        return scales.output
    if parent == "q_norm" or (config.qk_norm == "none" and name in ("q", "q_bias")):
        return scales.scores
    ends_block = ("attention_out_norm", "mlp_out_norm", "cross_out_norm")
    if parent in ends_block if config.norms_after else name in ("o", "o_bias", "down", "down_bias"):
        return scales.residual
    return 1.0


def unfoldable(config: ModelConfig) -> Iterator[str]:
    """What of a model's transfer cannot be multiplied into its weights, a clause each."""
    if not config.tied_embeddings:
        return
    transfer, scales = config.transfer, config.scales
    if transfer is not None and scales.embedding != 1:
        yield (
            f"model.transfer.embedding_multiplier = {scales.embedding:g} with model.tied_embeddings (token vectors "
            "cannot take it, the head is the same array)"
        )
    between = {"norm_placement": config.norm_placement == "post"}
    between |= {name: bool(getattr(config, name)) for name in ("head_transform", "mtp_layers")}
    if scales.output != 1 and any(between.values()):
        names = ", ".join(f"model.{name} = {getattr(config, name)!r}" for name, here in between.items() if here)
        yield (
            f"model.transfer, whose logits are multiplied by {scales.output:g}, with model.tied_embeddings and {names} "
            "(there is neither a head of its own to take it, nor one last norm)"
        )
