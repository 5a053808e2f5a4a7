"""The answer to a budget, on the console."""

from __future__ import annotations

import math
from typing import Any

from maxlm.console import print_table
from maxlm.planning.hardware import GIB
from maxlm.scaling.next_model import NextModel
from maxlm.scaling.optimum import Answer
from maxlm.scaling.result import Estimate
from maxlm.training.progress import short_number

# An interval that is narrower than this is one of rounding.
A_POINT = 1e-6


def print_answer(found: Answer) -> None:
    """The optimum beside the compute-optimal split, what binds, the model, and whether to believe it."""
    question, fit = found.question, found.fit
    of = "training, whose loss is to be reached" if question.same_loss else "training"
    if question.served_tokens and not question.same_loss:
        of = "training and serving"
    why = f" ({question.reasons['flops']})" if "flops" in question.reasons else ""
    print(f"{question.flops:.4g} FLOPs of {of}{why}")
    print(f"{fit.law}: {fit.equation}, fitted to {len(fit.rows)} runs\n")
    print_table(rows_of(found), False)
    if len(fit.samples):
        print(f"\n  intervals: 95%, percentiles of {len(fit.samples):,} bootstrap fits")
    if found.binding:
        print("\nwhat binds:")
        for each in found.binding:
            print(f"  - {each.message}")
    if found.model is not None:
        print()
        print_model(found.model)
    warnings = [*found.notes, *fit.warnings]
    if warnings:
        print("\nwarnings:")
        for message in warnings:
            print(f"  - {message}")
    print(f"\n{fit.verdict}")


def rows_of(found: Answer) -> list[dict[str, Any]]:
    """The optimum with its intervals, and beside it the compute-optimal split where that is another one."""
    names = {"n_params": "parameters", "n_tokens": "tokens", "loss": "loss", "training_flops": "training FLOPs"}
    if found.question.served_tokens:
        names["serving_flops"] = "serving FLOPs"
    rows = []
    for name, label in names.items():
        best, plain = getattr(found.best, name), getattr(found.plain, name)
        if best is not None:
            digits = ".4g" if name == "loss" else ".3g"
            rows.append({"": label, "optimum": _of(best, digits), "compute-optimal": _of(plain, digits)})
    ratios = (f"{split.tokens_per_parameter:.3g}" for split in (found.best, found.plain))
    rows.insert(2, dict(zip(rows[0], ("tokens a parameter", *ratios), strict=True)))
    return rows if found.binding else [{"": row[""], "optimum": row["optimum"]} for row in rows]


def _of(estimate: Estimate, digits: str = ".3g") -> str:
    told = f"{estimate.value:{digits}}"
    if math.isnan(estimate.low) or estimate.high - estimate.low <= A_POINT * abs(estimate.value):
        return told
    return f"{told} ({estimate.low:{digits}} to {estimate.high:{digits}})"


def print_model(model: NextModel) -> None:
    """The model of the base's family: shape, steps, exact FLOPs, and what the law says of it."""
    c, train = model.config.model, model.config.train
    heads = f"{c.n_heads}" if c.kv_heads == c.n_heads else f"{c.n_heads}/{c.kv_heads}"
    print(f"the model, of the family of {model.rules.spec.base}:")
    row = {
        "layers": c.n_layers, "d_model": c.d_model, "heads": heads, "d_ff": c.d_ff,
        "params": short_number(model.count.total), "non-emb.": short_number(model.count.non_embedding),
        "tokens": short_number(model.n_tokens), "steps": train.steps, "batch": train.global_batch_tokens,
        "lr": f"{model.config.optimizer.learning_rate:.3g}", "warmup": model.config.schedule.warmup_steps,
        "loss": "" if model.loss is None else _of(model.loss, ".4g"),
    }  # fmt: skip
    print_table([row], False)
    off = abs(model.flops / model.asked_flops - 1)
    print(f"\n  exact training FLOPs, attention included: {model.flops:.4g}, {off:.2%} off what was asked for;")
    print("  its tokens are what these leave of the budget, not what 6ND does")
    if model.serving_flops:
        print(f"  serving takes {model.serving_flops:.4g} FLOPs more, at a forward pass of a full row")
    if model.topology is not None and model.memory_bytes is not None:
        where = model.topology.name + (f" --slices {n}" if (n := model.topology.slices) > 1 else "")
        print(f"  memory, good to about 15%: {model.memory_bytes / GIB:.1f} GiB a device; the compiler's, and with")
        print(f"  --search the fastest mesh: maxlm plan FILE --topology {where}")
    for what, rule in model.by_rule.items():
        print(f"  {what} by rule: {rule}")
