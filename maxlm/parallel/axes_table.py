"""The tables from logical axes to mesh axes, apart from `axes.py` so that the planner reads them without JAX."""

from __future__ import annotations

PIPELINE = "pipeline"
"""The mesh axis of stages."""

# Axes that shard a weight only while it rests; `gather` takes them away where the weight is used.
STORED = (PIPELINE, "fsdp", "expert", "context")
# That does so besides under `mesh.zero`.
DATA = ("data",)

WEIGHTS: dict[str, tuple[str, ...]] = {
    "layers": (),
    "embed": STORED,
    "mlp": ("tensor",),
    "experts": ("expert",),
    # Of experts' weights, which the axis of experts shards by expert.
    "expert_embed": tuple(axis for axis in STORED if axis != "expert"),
    "router": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    # A latent's width: as what a product makes, whole on every device; as what a product contracts, stored in pieces.
    "latent": (),
    "rank": STORED,
    "vocab": ("tensor",),
    "positions": (),
    "classes": (),
    "norm": (),
}

STORAGE_NAMES = ("embed", "expert_embed", "rank")
"""Logical axes of weights that are whole where the weight is used."""

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": (*DATA, "fsdp", "expert"),
    "length": ("context",),
    # Between the blocks of a layer each tensor-parallel device keeps its share of the positions (Megatron's
    # sequence parallelism, arXiv:2205.05198, section 4.2.2).
    "residual_length": ("context", "tensor"),
    "embed": (),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    # Of attention whose positions are whole, and whose heads are shared by the devices that else share positions
    # (DeepSpeed-Ulysses, arXiv:2309.14509).
    "exchanged_heads": ("tensor", "context"),
    "head_dim": (),
    "latent": (),
    # Where tokens are looked up and predicted, stages do an equal share each (arXiv:2411.05288).
    "vocab": (PIPELINE, "tensor"),
}

TOKENS = ACTIVATIONS["batch"] + ACTIVATIONS["length"]
"""The mesh axes that each have other tokens."""
SEQUENCE = tuple(axis for axis in ACTIVATIONS["residual_length"] if axis not in ACTIVATIONS["length"])
"""Those that share the residual stream's positions, and not those of attention and feed-forward blocks."""
IF_SEVERAL = (PIPELINE, *ACTIVATIONS["length"])
"""Those that shardings name only where the mesh has several devices along them."""
