"""What a layer's backward pass does again, under each remat policy."""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.models.config import ModelConfig
from maxlm.planning.widths import dense_width, expert_width

PRODUCTS = ("q", "k", "v", "attention_out", "mlp_gate", "mlp_up", "expert_gate", "expert_up")


@dataclass(frozen=True)
class Again:
    """Activations by name that are made again."""

    names: frozenset[str]

    @property
    def gathers(self) -> bool:
        """Whether the residual stream's positions are gathered again: they are kept by policy `none` alone."""
        return bool(self.names)

    def share(self, part: str, model: ModelConfig) -> float:
        """The share of a part's forward FLOPs in a layer that are done again.

        The MLP's last product never is: no gradient depends on its result. Nor is attention's beside a parallel MLP.
        """
        if part == "attention scores":
            return float("flash_out" in self.names)
        if part == "mlp":
            return self._share_of_mlp(model)
        heads = {"q": model.n_heads, "k": model.kv_heads, "v": model.kv_heads, "attention_out": model.n_heads}
        unneeded = {"attention_out"} if model.parallel_residual else set()
        return sum(n for name, n in heads.items() if name in self.names - unneeded) / sum(heads.values())

    def _share_of_mlp(self, model: ModelConfig) -> float:
        """Of dense blocks, routed experts and routers, by their widths; routers are kept by `none` and `dots`."""
        inner = ("gate", "up") if model.gated else ("up",)
        dense = sum(dense_width(model, kind) for kind in model.layer_kinds)
        routed = sum(expert_width(model, kind) for kind in model.layer_kinds)
        routers = sum(model.moe.n_experts for kind in model.layer_kinds if kind.experts and model.moe is not None)
        done = dense * sum(f"mlp_{name}" in self.names for name in inner)
        done += routed * sum(f"expert_{name}" in self.names for name in inner)
        if model.remat.policy not in ("none", "dots"):
            done += routers
        return done / ((dense + routed) * (len(inner) + 1) + routers)


def kept(model: ModelConfig) -> frozenset[str]:
    """Names of the products and of attention's output that are there for the backward pass, in HBM or on the host."""
    remat = model.remat
    if remat.policy == "none":
        return frozenset((*PRODUCTS, "flash_out"))
    if remat.policy == "dots":
        return frozenset(PRODUCTS)
    return frozenset(remat.names) | frozenset(remat.offload)


def again(model: ModelConfig) -> Again:
    """What is made again."""
    return Again(frozenset((*PRODUCTS, "flash_out")) - kept(model))
