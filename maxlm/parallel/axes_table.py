"""The tables from logical axes to mesh axes, apart from `axes.py` so that the planner reads them without JAX."""

from __future__ import annotations

WEIGHTS: dict[str, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "experts": (),
    "router": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    # A latent's width: as what a product makes, whole on every device; as what a product contracts, stored in pieces.
    "latent": (),
    "rank": ("fsdp",),
    "vocab": ("tensor",),
    "positions": (),
    "classes": (),
    "norm": (),
}

# Mesh axes that shard a weight only while it rests; `gather` takes them away where the weight is used.
STORAGE_AXES = ("data", "fsdp")

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    # Between the blocks of a layer each tensor-parallel device keeps its share of the positions (Megatron's
    # sequence parallelism, arXiv:2205.05198, section 4.2.2).
    "residual_length": ("tensor",),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),
    "vocab": ("tensor",),
}
