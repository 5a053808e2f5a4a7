"""Which layers have experts, how many, and how tokens find them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key


class MoEConfig(Section):
    """A mixture of experts in place of the feed-forward block (arXiv:1701.06538)."""

    n_experts: int = key(..., "routed experts in a layer", ge=2)
    experts_per_token: int = key(
        ..., "experts that a token goes to; with router expert_choice how many it has on average", ge=1
    )
    d_ff: int = key(..., "width inside one expert", ge=1)
    n_shared_experts: int = key(
        0, "experts besides that every token goes through (arXiv:2401.06066), as one block n times as wide", ge=0
    )
    first_layer: int = key(0, "the first layer with experts; those before it have a block of model.d_ff", ge=0)
    every: int = key(1, "from first_layer on, each so many-th layer has experts", unit="layers", ge=1)

    router: Literal["softmax", "topk_softmax", "sigmoid", "expert_choice"] = key(
        "softmax",
        "softmax: over all experts, then the largest (Mixtral, Qwen3-MoE, DeepSeek-V2); topk_softmax: the largest "
        "logits, then softmax over those (GPT-OSS); sigmoid: of each logit, then the largest (DeepSeek-V3); "
        "expert_choice: softmax over all experts, and each expert takes the tokens of a row that score highest with it "
        "(arXiv:2202.09368). There a token's experts depend on later tokens of its row: training and held-out loss see "
        "the future, and generation, which cannot, routes otherwise",
    )
    router_bias: bool = key(False, "a trained bias on the router's logits (GPT-OSS)")
    normalize_weights: bool = key(
        True, "routers softmax and sigmoid: the weights of a token's experts are divided by their sum"
    )
    routed_scale: float = key(1.0, "what the routed experts add is multiplied by this", gt=0)
    n_groups: int = key(
        1, "experts lie in so many groups, of which a token uses groups_per_token (arXiv:2405.04434, 2.1.2)", ge=1
    )
    groups_per_token: int = key(
        1,
        "groups that a token uses: those with the largest score of an expert, or with router sigmoid the largest sum "
        "of two (arXiv:2412.19437, 2.1.2)",
        ge=1,
    )
    router_noise: Literal["none", "jitter", "gaussian"] = key(
        "none",
        "in training alone. jitter: the router's inputs are multiplied by even random numbers from 1 - "
        "router_noise_scale to 1 + router_noise_scale (Switch, arXiv:2101.03961); gaussian: normal ones of that "
        "deviation are added to its logits (V-MoE, arXiv:2106.05974, where it is 1 / n_experts). They follow from "
        "train.seed, step, microbatch and layer",
    )
    router_noise_scale: float | None = key(None, "how strong router_noise is", gt=0)
    expert_bias: bool = key(False, "biases inside the routed experts")
    capacity_factor: float | None = key(
        None,
        "in each row of a batch an expert takes at most this times its even share of tokens, the earlier first; others "
        "go without it, but not in decoding (GShard, arXiv:2006.16668). null: no token is dropped",
        gt=0,
    )

    dispatch: Literal["auto", "all_to_all", "all_gather"] = key(
        "auto",
        "with mesh.expert > 1, how tokens meet experts. all_to_all: each goes to its experts' devices and back; "
        "all_gather: all tokens go to every device of the group, which sends back sums; auto: what moves fewer bytes, "
        "all_to_all where a token's experts are fewer than mesh.expert",
    )
    exchange_factor: float = key(
        1.5,
        "with mesh.expert > 1, the rows that a device takes of the others at a time, over its even share of them. What "
        "is beyond follows in further rounds, so that none is dropped: more needs more memory, less needs more rounds "
        "where load is uneven. Under 1 there are always several, which bounds the memory",
        gt=0,
    )

    balance_loss: float = key(
        0.0,
        "weight of the load-balancing loss (Switch, arXiv:2101.03961, equation 4): n_experts times the sum over "
        "experts of the share of tokens that chose it, times its mean probability; mean over layers",
        ge=0,
    )
    balance_loss_over: Literal["batch", "sequence"] = key(
        "batch", "shares and means of balance_loss are of a whole batch, or of each row (arXiv:2412.19437, equation 17)"
    )
    balance_bias_rate: float | None = key(
        None,
        "adds a bias to the scores by which experts are chosen, not to their weights, and moves it by so much each "
        "step towards even load, without a gradient (arXiv:2408.15664); 0: a bias that stays; null: no bias",
        ge=0,
    )
    z_loss: float = key(
        0.0, "weight of the mean squared log-partition of the router's logits (ST-MoE, arXiv:2202.08906)", ge=0
    )

    @model_validator(mode="after")
    def _routing_can_be(self) -> MoEConfig:
        if self.experts_per_token > self.n_experts:
            raise ValueError(f"experts_per_token = {self.experts_per_token} is more than n_experts = {self.n_experts}")
        if self.n_experts % self.n_groups:
            raise ValueError(f"n_experts = {self.n_experts} is not a multiple of n_groups = {self.n_groups}")
        if self.groups_per_token > self.n_groups:
            raise ValueError(f"groups_per_token = {self.groups_per_token} is more than n_groups = {self.n_groups}")
        reached = self.groups_per_token * (self.n_experts // self.n_groups)
        if self.experts_per_token > reached:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} is more than the {reached} experts in "
                f"groups_per_token = {self.groups_per_token} of n_groups = {self.n_groups} groups"
            )
        if self.router == "sigmoid" and self.n_groups == self.n_experts > 1:
            raise ValueError("n_groups = n_experts: router 'sigmoid' scores a group by two experts; take fewer groups")
        return self

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> MoEConfig:
        noise, scale = self.router_noise, self.router_noise_scale
        if (noise == "none") != (scale is None):
            raise ValueError(
                f"router_noise = {noise!r} and router_noise_scale = {scale} go together; give both or none"
            )
        if noise == "jitter" and scale is not None and scale >= 1:
            raise ValueError(f"router_noise_scale = {scale:g} must be less than 1 with router_noise = 'jitter'")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_router(self) -> MoEConfig:
        if not self.normalize_weights and self.router in ("topk_softmax", "expert_choice"):
            raise ValueError(f"normalize_weights = false, and router {self.router!r} has no such choice; leave it out")
        if self.router == "expert_choice":
            for name in ("capacity_factor", "balance_bias_rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given, and with router 'expert_choice' load is even; leave it out")
            if self.balance_loss or self.n_groups > 1:
                name = "balance_loss" if self.balance_loss else "n_groups"
                raise ValueError(f"{name} is given, and router 'expert_choice' has none; leave it out")
        return self

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer >= self.first_layer and (layer - self.first_layer) % self.every == 0

    def capacity(self, length: int) -> int | None:
        """The most tokens that an expert takes of a row; None where it takes all."""
        if self.capacity_factor is None:
            return None
        return max(1, int(-(-self.capacity_factor * length * self.experts_per_token // self.n_experts)))

    @property
    def shared_width(self) -> int:
        """Width inside the shared experts together."""
        return self.n_shared_experts * self.d_ff
