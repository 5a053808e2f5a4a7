"""What hardware allows: FLOPs in so many days, and whether a run fits its memory, by the planner's roofline."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maxlm.errors import MaxlmError
from maxlm.models.config import RematConfig
from maxlm.planning.candidates import Candidate, divisors, meshes, price, vary
from maxlm.planning.topology import Topology

if TYPE_CHECKING:
    from maxlm.config import RunConfig

SECONDS_A_DAY = 86400
DEFAULT_MFU = 0.4


@dataclass(frozen=True)
class Hardware:
    """Devices, and for how long."""

    topology: Topology
    days: float | None = None
    mfu: float = DEFAULT_MFU

    def flops(self) -> float | None:
        """Model FLOPs of the days at the MFU; None where no days are given."""
        if self.days is None:
            return None
        peak = self.topology.peak_flops_per_device("bfloat16") * self.topology.n_devices
        return self.days * SECONDS_A_DAY * peak * self.mfu

    @property
    def label(self) -> str:
        """The devices and the days in words."""
        slices = f"{n} slices of " if (n := self.topology.slices) > 1 else ""
        name = f"{slices}{self.topology.name}"
        return name if self.days is None else f"{self.days:g} days of {name} at {self.mfu:.0%} MFU in bfloat16"


def suits(config: RunConfig, topology: Topology) -> bool:
    """Whether the code allows any mesh of the devices for this model and batch, whatever it needs of memory."""
    rows = divisors(config.train.global_batch_tokens // config.train.seq_len)
    for varied in (config, *(vary(config, mesh=mesh) for mesh in meshes(config, topology.n_devices))):
        for accumulation in rows:
            with contextlib.suppress(MaxlmError):
                price(vary(varied, accumulation=accumulation), topology)
                return True
    return False


def placed(config: RunConfig, topology: Topology) -> RunConfig | None:
    """The config as it fits the devices, by the roofline's memory: itself where it does, else with more microbatches,
    then with everything recomputed, then on the mesh that is fastest by the roofline of those on which it fits.

    None where it fits on none.
    """
    rows = divisors(config.train.global_batch_tokens // config.train.seq_len)
    full = RematConfig(policy="full")
    for remat in dict.fromkeys((config.model.remat, full)):
        varied = vary(config, remat=remat)
        if found := _first_that_fits(varied, topology, [n for n in rows if n >= config.train.accumulation]):
            return found.config
    fitting = []
    for mesh in meshes(config, topology.n_devices):
        varied = vary(config, mesh=mesh, remat=full)
        # The most microbatches that the mesh allows need the least memory.
        if _first_that_fits(varied, topology, rows[::-1], stop_at_first=True) and (
            found := _first_that_fits(varied, topology, rows)
        ):
            fitting.append(found)
    return min(fitting, key=lambda candidate: candidate.seconds).config if fitting else None


def _first_that_fits(
    config: RunConfig, topology: Topology, accumulations: list[int], *, stop_at_first: bool = False
) -> Candidate | None:
    """With the first of these numbers of microbatches that fits; `stop_at_first`: the first allowed or none."""
    for accumulation in accumulations:
        try:
            candidate = price(vary(config, accumulation=accumulation), topology)
        except MaxlmError:
            continue
        if candidate.memory_bytes <= topology.hbm_bytes_per_device:
            return candidate
        if stop_at_first:
            return None
    return None
