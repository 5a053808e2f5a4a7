"""The plan, top to bottom: config and topology, roofline, the compiled step, what it needs and how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import maxlm
from maxlm.config import RunConfig
from maxlm.errors import MaxlmError
from maxlm.models.flops import count_parameters, forward_flops, training_flops_per_token
from maxlm.parallel import support
from maxlm.parallel.mesh import resolve_sizes
from maxlm.planning import cache
from maxlm.planning.compile import CompilerMissingError, OutOfMemoryError, compile_step, lower_step, versions
from maxlm.planning.layout import network_of
from maxlm.planning.pipeline_cost import Pipelined
from maxlm.planning.roofline import Roofline, roofline
from maxlm.planning.topology import Topology

Plan = dict[str, Any]

# Pallas kernels carry no cycles. The share of the peak at which attention is counted is what brings the compiler's
# cycles of seven runs that MaxText published to within -9% and +11% of the time measured (the seventh: +23%).
KERNEL_SHARE_OF_PEAK = 0.5

CYCLES, ROOFLINE = "compiler cycles and bytes over links", "roofline"
NOTES = {
    CYCLES: "Good for ranking and for gross regressions, not for differences under 10%: memory and collectives are the "
    "compiler's, its cycles are estimates, attention is counted at half of the peak, links at their full rate.",
    ROOFLINE: "Every part at the full rate of the hardware: a bound from below, which no run reaches.",
}


def make_plan(config: RunConfig, topology: Topology, *, compiled: bool = True, relief: bool = True) -> Plan:
    """What would happen if `config` ran on `topology`, as plain data; docs/planning.md explains every figure.

    Args:
        compiled: ask the real compiler; else the roofline alone answers, in a second.
        relief: where the step does not fit, look for what would make it fit, by compiling.

    Raises MaxlmError where mesh, model, batch and topology do not suit each other. A compiler that is not installed and
    a step that does not fit are no errors: the plan says so.
    """
    support.check(config)
    sizes = resolve_sizes(config.mesh, topology.n_devices)
    support.check_mesh(config, sizes)
    analytic = roofline(config, topology, sizes)
    said: dict[str, Any] = {"compiled": None, "out_of_memory": None, "not_compiled_because": None}
    if not compiled:
        said["not_compiled_because"] = "the roofline alone was asked for"
    else:
        try:
            said |= compiled_part(config, topology)
        except CompilerMissingError as error:
            said["not_compiled_because"] = str(error)
    plan: Plan = {
        "maxlm": maxlm.__version__,
        "versions": versions(topology),
        "config": config.name,
        "overrides": [],
        "topology": about_topology(topology, config.precision.compute),
        "mesh": sizes,
        "networks": {axis: network.to_dict() for axis, network in network_of(sizes, topology).items()},
        "model": about_model(config, topology),
        "remat": config.model.remat.model_dump(mode="json"),
        "accumulation": config.train.accumulation,
        "stages": pipelined.to_dict() if (pipelined := Pipelined.of(config, sizes)) else None,
        "analytic": analytic.to_dict(),
        **said,
    }
    required = required_bytes(plan, analytic)
    capacity = topology.hbm_bytes_per_device
    plan["margin_bytes"] = capacity - required
    plan["fits"] = plan["out_of_memory"] is None and required <= capacity
    if not plan["fits"] and plan["out_of_memory"] is None and plan["compiled"] is not None:
        plan["out_of_memory"] = {
            "used": required,
            "capacity": capacity,
            "over": required - capacity,
            "memory_by_kind": plan["compiled"]["memory_by_kind"],
            "buffers": plan["compiled"]["largest_buffers"],
            "relief": [],
        }
    plan["prediction"] = prediction(config, topology, plan, analytic)
    if plan["out_of_memory"] is not None and relief:
        plan["out_of_memory"]["relief"] = find_relief(config, topology, plan["out_of_memory"]["used"])
    return plan


def compiled_part(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """What the compiler says of the config's step, kept from an earlier time where it has been asked before."""
    step = lower_step(config, topology)
    where = f"{topology.name}*{topology.slices} {step.device_order}"
    name = cache.key(step.program_sha256, step.options, where, versions(topology))

    def compile_it() -> dict[str, Any]:
        from maxlm.planning.analysis import analyse, largest_buffers
        from maxlm.planning.buffers import OutOfMemory, parse_out_of_memory, peak
        from maxlm.planning.hlo import parse

        try:
            return {"compiled": analyse(step, compile_step(step), topology), "out_of_memory": None}
        except OutOfMemoryError as error:
            found = parse_out_of_memory(str(error)) or OutOfMemory(None, None, None)
            memory = peak(parse(error.text)) if error.text else None
            held = {
                "memory_by_kind": dict(memory.by_kind) if memory else None,
                "buffers": largest_buffers(memory) if memory else [],
            }
            return {"compiled": None, "out_of_memory": {**asdict(found), **held, "relief": []}}

    return cache.remember(name, compile_it)


def find_relief(config: RunConfig, topology: Topology, used: int) -> list[dict[str, Any]]:
    """What would make a step fit that does not, tried in order."""
    from maxlm.planning.relief import relief

    plan_one: Callable[[RunConfig], Plan] = partial(make_plan, topology=topology, relief=False)
    try:
        return relief(config, topology, plan_one, used=used)
    except MaxlmError as error:
        return [{"change": [], "label": str(error), "saves_bytes": 0, "required_bytes": used, "fits": False, "how": ""}]


def required_bytes(plan: Plan, analytic: Roofline) -> int:
    """What a device needs: by the compiler where it was asked, else by the roofline."""
    if plan["compiled"] is not None:
        return plan["compiled"]["memory"]["required"]
    if plan["out_of_memory"] is not None:
        return plan["out_of_memory"]["used"] or analytic.memory["total"]
    return analytic.memory["total"]


def prediction(config: RunConfig, topology: Topology, plan: Plan, analytic: Roofline) -> dict[str, Any]:
    """The time of a step, from all communication hidden behind computation to none, and what follows from it."""
    compiled = plan["compiled"]
    if compiled is not None and compiled["cycles"] is not None:
        basis = CYCLES
        compute = compiled["cycles"]["seconds"]
        kernels = attention_seconds(config, topology) if compiled["kernels"] else 0.0
        ici = sum(one["ici_seconds"] for one in compiled["collectives"])
        dcn = sum(one["dcn_seconds"] for one in compiled["collectives"])
        best, worst = max(compute + kernels, ici, dcn), compute + kernels + ici + dcn
    else:
        basis = ROOFLINE
        compute = sum(max(part.compute_seconds, part.hbm_seconds) for part in analytic.parts)
        kernels = 0.0
        ici = sum(part.ici_seconds for part in analytic.parts)
        dcn = sum(part.dcn_seconds for part in analytic.parts)
        best, worst = analytic.step_seconds
    tokens, budget = config.train.global_batch_tokens, config.train.global_batch_tokens * config.train.steps
    peak = topology.peak_flops_per_device(config.precision.compute) * topology.n_devices
    flops = tokens * training_flops_per_token(config.model, config.train.seq_len, config.row_lengths)
    on_chip = "compute"
    if sum(part.hbm_seconds for part in analytic.parts) > sum(part.compute_seconds for part in analytic.parts):
        on_chip = "HBM"
    bound = max(((compute + kernels, on_chip), (ici, "ICI"), (dcn, "DCN")))[1]
    step = [best, worst]
    return {
        "basis": basis,
        "step_seconds": step,
        "compute_seconds": compute,
        "kernel_seconds": kernels,
        "communication_seconds": {"ici": ici, "dcn": dcn},
        "tokens_per_second": [tokens / seconds for seconds in step],
        "mfu": [flops / seconds / peak for seconds in step],
        "days": [seconds * config.train.steps / 86400 for seconds in step],
        "chip_hours": [seconds * config.train.steps / 3600 * topology.n_chips for seconds in step],
        "token_budget": budget,
        "bound": bound,
        "note": NOTES[basis],
    }


def attention_seconds(config: RunConfig, topology: Topology) -> float:
    """Seconds of a device in attention's kernels: the model's FLOPs of scores and values at a share of the peak."""
    per_token = 3 * forward_flops(config.model, config.train.seq_len, config.row_lengths).attention_scores
    tokens = config.train.global_batch_tokens / topology.n_devices
    return per_token * tokens / (topology.peak_flops_per_device(config.precision.compute) * KERNEL_SHARE_OF_PEAK)


def about_topology(topology: Topology, dtype: str) -> dict[str, Any]:
    """The hardware's figures that a plan rests on."""
    return {
        "name": topology.name,
        "accelerator": topology.accelerator,
        "chip": topology.chip.name,
        "slices": topology.slices,
        "chips": topology.n_chips,
        "devices": topology.n_devices,
        "hosts": topology.hosts,
        "wrap": list(topology.wrap),
        "hbm_bytes_per_device": topology.hbm_bytes_per_device,
        "peak_flops_per_device": topology.peak_flops_per_device(dtype),
        "sources": [topology.chip.source],
    }


def about_model(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """The model's size, and what a step does."""
    count, train = count_parameters(config.model), config.train
    flops = training_flops_per_token(config.model, train.seq_len, config.row_lengths)
    return {
        "parameters": {"total": count.total, "active": count.active, "non_embedding": count.non_embedding},
        "layers": config.model.total_layers,
        "seq_len": train.seq_len,
        "tokens_per_step": train.global_batch_tokens,
        "tokens_per_device": train.global_batch_tokens // topology.n_devices,
        "model_flops_per_step": train.global_batch_tokens * flops,
        "steps": train.steps,
        "token_budget": train.steps * train.global_batch_tokens,
    }
