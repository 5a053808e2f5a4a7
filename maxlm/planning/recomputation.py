"""What a layer's backward pass does again, under each remat policy."""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.models.config import ModelConfig


def products(model: ModelConfig) -> tuple[str, ...]:
    """Names of the results of a layer's products on which gradients depend: the MLP's own where a norm is behind it."""
    return ("q", "k", "v", "attention_out", "mlp_gate", "mlp_up", *(("mlp_out",) if model.norms_after else ()))


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

        The MLP's last product is where a norm is behind it; else no gradient depends on its result. Nor on attention's
        beside a parallel MLP.
        """
        if part == "attention scores":
            return float("flash_out" in self.names)
        if part == "mlp":
            inner = ("mlp_gate", "mlp_up") if model.gated else ("mlp_up",)
            return sum(name in self.names for name in (*inner, "mlp_out")) / (len(inner) + 1)
        heads = {"q": model.n_heads, "k": model.kv_heads, "v": model.kv_heads, "attention_out": model.n_heads}
        unneeded = {"attention_out"} if model.parallel_residual else set()
        return sum(n for name, n in heads.items() if name in self.names - unneeded) / sum(heads.values())


def kept(model: ModelConfig) -> frozenset[str]:
    """Names of the products and of attention's output that are there for the backward pass, in HBM or on the host."""
    remat = model.remat
    if remat.policy == "none":
        return frozenset((*products(model), "flash_out"))
    if remat.policy == "dots":
        return frozenset(products(model))
    return frozenset(remat.names) | frozenset(remat.offload)


def again(model: ModelConfig) -> Again:
    """What is made again."""
    return Again(frozenset((*products(model), "flash_out")) - kept(model))
