"""What the compiler's text says of a step, put into figures: the `compiled` part of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from maxlm.planning.buffers import Memory, peak
from maxlm.planning.census import Census, Collective, census, sizes_in_a_slice
from maxlm.planning.device_groups import MIXED
from maxlm.planning.hlo import parse
from maxlm.planning.layout import Cost, collective_cost, cost_between_slices, network_of
from maxlm.planning.topology import Topology

if TYPE_CHECKING:
    from maxlm.planning.compile import CompiledStep, LoweredStep


def analyse(step: LoweredStep, compiled: CompiledStep, topology: Topology) -> dict[str, Any]:
    """The compiler's figures of a step as plain data (docs/planning.md explains them). Bytes are of one device."""
    module = parse(compiled.text)
    counts = census(module, step.sizes)
    memory = peak(module)
    return {
        "compiler": "libtpu" if topology.is_tpu else "xla-cuda",
        "program_sha256": step.program_sha256,
        "options": dict(step.options),
        "lower_seconds": round(step.seconds, 3),
        "compile_seconds": round(compiled.compile_seconds, 3),
        "cpu_seconds": round(compiled.cpu_seconds, 3),
        "peak_rss_bytes": compiled.peak_rss_bytes,
        "flops_loops_once": compiled.flops,
        "memory": compiled.memory,
        "memory_by_kind": dict(memory.by_kind),
        "largest_buffers": largest_buffers(memory),
        "cycles": _cycles(counts, topology),
        "loops": [{"what": what, "trips": trips, "entered": times} for what, trips, times in counts.loops],
        "collectives": [_collective(one, step.sizes, topology) for one in counts.collectives],
        "collective_bytes": counts.collective_bytes(),
        "collective_bytes_as_written": counts.bytes_as_written(),
        "kernels": [
            {"name": one.name, "times": one.times, "flops": one.flops, "part": one.part, "source": one.source}
            for one in counts.kernels
        ],
    }


def largest_buffers(memory: Memory) -> list[dict[str, Any]]:
    """The ten largest buffers at the peak, with the line of the program that made each."""
    return [
        {"bytes": one.bytes, "shape": one.shape, "kind": one.kind, "what": one.what, "source": one.source}
        for one in memory.largest
    ]


def _cycles(counts: Census, topology: Topology) -> dict[str, Any] | None:
    """The compiler's cycles, and the seconds that they take at the chip's clock; None where it estimates none."""
    if not counts.cycles or topology.chip.clock_hz is None:
        return None
    return {
        "total": counts.cycles,
        "in_loops": counts.cycles_in_loops,
        "by_part": dict(counts.cycles_by_part),
        "seconds": counts.cycles / topology.chip.clock_hz,
    }


def _collective(one: Collective, sizes: dict[str, int], topology: Topology) -> dict[str, Any]:
    cost = cost_of(one, sizes, topology)
    return {
        "kind": one.kind,
        "axes": list(one.axes),
        "dtype": one.dtype,
        "bytes": one.bytes,
        "times": one.times,
        "bytes_per_step": one.bytes_per_step,
        "seconds": cost.seconds * one.times,
        "ici_seconds": cost.ici_seconds * one.times,
        "dcn_seconds": cost.dcn_seconds * one.times,
        "in_loop": one.in_loop,
        "overlapped": one.overlapped,
        "asynchronous": one.asynchronous,
        "fused": one.fused,
        "network": _network(one, sizes, topology),
        "part": one.part,
        "what": one.what,
        "source": one.source,
    }


def cost_of(one: Collective, sizes: dict[str, int], topology: Topology) -> Cost:
    """What one execution costs the networks. Groups that are no product of mesh axes count as if over all of them."""
    if one.reach == "slices":
        return cost_between_slices(one.kind, one.bytes, topology)
    sizes, topology = _reached(one, sizes, topology)
    return collective_cost(one.kind, one.bytes, _known_axes(one.axes, sizes), sizes, topology)


def _network(one: Collective, sizes: dict[str, int], topology: Topology) -> str:
    if one.reach == "slices":
        return "dcn"
    sizes, topology = _reached(one, sizes, topology)
    axes = _known_axes(one.axes, sizes)
    kinds = {network.kind for axis, network in network_of(sizes, topology).items() if axis in axes}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""


def _reached(one: Collective, sizes: dict[str, int], topology: Topology) -> tuple[dict[str, int], Topology]:
    """The mesh and the devices that a collective's axes are of: all, or those of a slice."""
    if one.reach == "mesh":
        return sizes, topology
    return sizes_in_a_slice(sizes, topology.slices), replace(topology, slices=1)


def _known_axes(axes: Sequence[str], sizes: dict[str, int]) -> tuple[str, ...]:
    return tuple(sizes) if tuple(axes) == MIXED else tuple(axes)
