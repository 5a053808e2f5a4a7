"""What a config may use that bears on how it is spread over devices, each by a name: the rows of the support table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class Feature:
    """Something that a config may use; `keys` say how."""

    name: str
    keys: str
    used: Callable[[RunConfig], bool]


def _balances_a_batch(config: RunConfig) -> bool:
    moe = config.model.moe
    return moe is not None and moe.balance_loss > 0 and moe.balance_loss_over == "batch"


def _experts_choose(config: RunConfig) -> bool:
    return config.model.moe is not None and config.model.moe.router == "expert_choice"


def _on(axis: str) -> Callable[[RunConfig], bool]:
    return lambda config: getattr(config.mesh, axis) != 1


def _context(kind: str) -> Callable[[RunConfig], bool]:
    return lambda config: config.mesh.context != 1 and config.model.context_attention == kind


_ALL = (
    Feature("data", "mesh.data > 1", _on("data")),
    Feature("fsdp", "mesh.fsdp > 1", _on("fsdp")),
    Feature("zero", "mesh.zero > 0", lambda c: c.mesh.zero > 0),
    Feature("tensor", "mesh.tensor > 1", _on("tensor")),
    Feature("expert", "mesh.expert > 1", _on("expert")),
    Feature("context", "mesh.context > 1", _on("context")),
    Feature("ring", "mesh.context > 1 and model.context_attention = ring", _context("ring")),
    Feature("all to all", "mesh.context > 1 and model.context_attention = all_to_all", _context("all_to_all")),
    Feature("pipeline", "mesh.pipeline > 1", _on("pipeline")),
    Feature(
        "1f1b",
        "mesh.pipeline > 1 and pipeline.schedule = 1f1b",
        lambda c: c.mesh.pipeline != 1 and c.pipeline.schedule == "1f1b",
    ),
    Feature("accumulation", "train.accumulation > 1", lambda c: c.train.accumulation > 1),
    Feature("offload", "model.remat.offload", lambda c: bool(c.model.remat.offload)),
    Feature("dense", "model.moe = null", lambda c: c.model.moe is None),
    Feature("experts", "model.moe", lambda c: c.model.moe is not None),
    Feature("expert choice", "model.moe.router = expert_choice", _experts_choose),
    Feature("balance over a batch", "model.moe.balance_loss_over = batch", _balances_a_batch),
    Feature("latent attention", "model.latent", lambda c: c.model.latent is not None),
    Feature("window", "model.attention_window", lambda c: c.model.attention_window is not None),
    Feature(
        "chosen kernel",
        "model.attention_implementation = reference or pallas",
        lambda c: c.model.attention_implementation in ("reference", "pallas"),
    ),
    Feature("ALiBi", "model.positions = alibi", lambda c: c.model.positions == "alibi"),
    Feature("T5 bias", "model.positions = relative", lambda c: c.model.positions == "relative"),
    Feature("Transformer-XL", "model.positions = transformer_xl", lambda c: c.model.positions == "transformer_xl"),
    Feature("MTP", "model.mtp_layers > 0", lambda c: c.model.mtp_layers > 0),
    Feature("prefix", "data.objective.kind = prefix_lm", lambda c: c.data.objective.kind == "prefix_lm"),
    Feature("encoder", "model.kind = encoder", lambda c: c.model.kind == "encoder"),
    Feature("encoder-decoder", "model.kind = encoder_decoder", lambda c: c.model.kind == "encoder_decoder"),
)
FEATURES = {feature.name: feature for feature in _ALL}
