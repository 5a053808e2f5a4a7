"""What a layer's backward pass does again, under each remat policy."""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.models.config import ModelConfig
from maxlm.planning.widths import dense_width, expert_width


def products(model: ModelConfig) -> tuple[str, ...]:
    """Names of the results of a layer's products on which gradients depend: the MLP's own where a norm is behind it."""
    found = ["q", "k", "v", "attention_out", "mlp_gate", "mlp_up"]
    if model.norms_after:
        found.append("mlp_out")
    if model.latent is not None:
        found += ["kv_latent"] if model.latent.q_rank is None else ["q_latent", "kv_latent"]
    if model.positions == "transformer_xl":
        found.append("r")
    if model.moe is not None:
        found += ["expert_gate", "expert_up"]
    return tuple(found)


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
            return self._share_of_mlp(model)
        sizes = _projections(model)
        unneeded = {"attention_out"} if model.parallel_residual else set()
        names = self.names | ({"k", "v"} if model.latent is not None and self.names & {"k", "v"} else set())
        return sum(n for name, n in sizes.items() if name in names - unneeded) / sum(sizes.values())

    def _share_of_mlp(self, model: ModelConfig) -> float:
        """Of dense blocks, routed experts and routers, by their widths; routers are kept by `none` and `dots`. Modules
        that predict further ahead have layers like the last, and two projections, of d_model, to their input."""
        inner = ("gate", "up") if model.gated else ("up",)
        kinds = [kind for side in model.sides.values() for kind in (*side, *side[-1:] * model.mtp_layers)]
        dense = sum(dense_width(model, kind) for kind in kinds)
        routed = sum(expert_width(model, kind) for kind in kinds)
        routers = sum(model.moe.n_experts for kind in kinds if kind.experts and model.moe is not None)
        once = routers + 2 * model.mtp_layers * model.d_model
        out = "mlp_out" in self.names
        done = dense * (sum(f"mlp_{name}" in self.names for name in inner) + out)
        done += routed * (sum(f"expert_{name}" in self.names for name in inner) + out)
        if model.remat.policy not in ("none", "dots"):
            done += once
        return done / ((dense + routed) * (len(inner) + 1) + once)


def _projections(model: ModelConfig) -> dict[str, int]:
    """Relative FLOPs of each of attention's projections."""
    if (latent := model.latent) is None:
        return {"q": model.n_heads, "k": model.kv_heads, "v": model.kv_heads, "attention_out": model.n_heads}
    d, h = model.d_model, model.n_heads
    return {
        "q_latent": d * (latent.q_rank or 0),
        "q": (latent.q_rank or d) * h * latent.qk_head_dim,
        "kv_latent": d * latent.cached_width,
        "k": latent.kv_rank * h * latent.nope_head_dim,  # one product with v's
        "v": latent.kv_rank * h * latent.v_head_dim,
        "attention_out": h * latent.v_head_dim * d,
    }


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
