"""Memory, time and cost of a run on the hardware that a sweep names, by the planner's roofline: no compiler asked."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from maxlm.errors import MaxlmError
from maxlm.parallel import support
from maxlm.parallel.mesh import resolve_sizes
from maxlm.planning.hardware import GIB
from maxlm.planning.memory_model import predicted_memory
from maxlm.planning.roofline import roofline
from maxlm.planning.topology import parse_topology
from maxlm.scaling.spec import Sweep

if TYPE_CHECKING:
    from maxlm.scaling.ladder import PlannedRun


class Costs:
    """What runs need on a sweep's hardware; without a topology memory is that of one device."""

    def __init__(self, sweep: Sweep):
        """Raises ConfigError for a topology that there is not."""
        self.spec = sweep.spec
        hardware = sweep.spec.hardware
        self.topology = None
        if hardware is not None and hardware.topology is not None:
            self.topology = parse_topology(hardware.topology, hardware.slices)
        self._misfits: dict[str, str] = {}

    def priced(self, run: PlannedRun) -> PlannedRun:
        """The run with its memory, and with seconds and cost where the hardware gives them."""
        config, hardware = run.config, self.spec.hardware
        n_devices = self.topology.n_devices if self.topology else 1
        try:
            sizes = resolve_sizes(config.mesh, n_devices)
            support.check_mesh(config, sizes)
        except MaxlmError as error:
            self._misfits[run.name] = str(error)
            return run
        run = replace(run, memory_bytes=predicted_memory(config, sizes)["total"])
        if hardware is None:
            return run
        flops, chips = run.flops * run.share, self.topology.n_chips if self.topology else 1
        if self.topology is None:
            assert hardware.flops_per_second is not None
            seconds = flops / hardware.flops_per_second
        elif hardware.mfu is not None:
            peak = self.topology.peak_flops_per_device(config.precision.compute) * n_devices
            seconds = flops / (peak * hardware.mfu)
        else:
            seconds = roofline(config, self.topology, sizes).step_seconds[1] * run.steps * run.share
        seconds += hardware.startup_seconds
        price = hardware.price_per_chip_hour
        return replace(run, seconds=seconds, cost=price and price * chips * seconds / 3600)

    def problems(self) -> list[str]:
        """Which runs cannot be on the hardware, and why the first of them cannot."""
        if self.topology is None or not self._misfits:
            return []
        first, *others = self._misfits
        more = f" and {len(others)} more runs" if others else ""
        return [f"{first}{more} cannot be on {self.topology.name}, of {first}: {self._misfits[first]}"]

    def over_cap(self, run: PlannedRun) -> str | None:
        """Which cap leaves the run out, in words."""
        caps = self.spec.caps
        if caps.max_tokens is not None and run.tokens > caps.max_tokens:
            return f"{run.tokens:,} tokens, and caps.max_tokens = {caps.max_tokens:,.0f}"
        limit, whose = None, "caps.max_memory_gib"
        if caps.max_memory_gib is not None:
            limit = caps.max_memory_gib * GIB
        elif self.topology is not None:
            limit, whose = self.topology.hbm_bytes_per_device, f"a device of {self.topology.name}"
        if limit is not None and run.memory_bytes is not None and run.memory_bytes > limit:
            return f"{run.memory_bytes / GIB:.1f} GiB a device, and {whose} = {limit / GIB:.1f}"
        return None
