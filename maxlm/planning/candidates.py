"""The ways to run a config on a topology: every mesh, remat policy and number of microbatches, priced by the roofline.

No compiler here: thousands are priced in seconds, and what cannot fit or cannot be fastest goes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from maxlm.errors import ConfigError, MaxlmError
from maxlm.models.config import RematConfig
from maxlm.parallel import support
from maxlm.parallel.axes_table import ACTIVATIONS, PIPELINE
from maxlm.parallel.mesh import AXES, MeshConfig, resolve_sizes
from maxlm.planning.layout import network_of
from maxlm.planning.memory_model import predicted_memory
from maxlm.planning.roofline import Roofline, roofline
from maxlm.planning.topology import Topology
from maxlm.planning.widths import dense_width, expert_width

if TYPE_CHECKING:
    from maxlm.config import RunConfig

Plan = dict[str, Any]
"""What `maxlm.plan.make_plan` makes."""

# How far the roofline's total memory may be from the compiler's peak: the error that the roofline's tests allow. What
# is larger than the device by more than this is not compiled; what is smaller by more than this is taken to fit.
SLACK = 0.15

ATTENTION = ("q", "k", "v", "flash_out", "flash_lse")

# Tokens of a row whose activations fit a device beside much else.
SHORT_ROW = 32_768


@dataclass(frozen=True)
class Candidate:
    """A combination, and what the roofline says of it: its memory, and its time when that is asked for."""

    config: RunConfig
    sizes: Mapping[str, int]
    topology: Topology
    own: bool = False
    """whether it is the config as it was given"""

    @cached_property
    def memory(self) -> Mapping[str, int]:
        """The roofline's memory by kind."""
        return predicted_memory(self.config, self.sizes)

    @cached_property
    def roofline(self) -> Roofline:
        return roofline(self.config, self.topology, self.sizes)

    @property
    def memory_bytes(self) -> int:
        return self.memory["total"]

    @property
    def state_bytes(self) -> int:
        """Parameters and optimizer state: what the roofline knows exactly."""
        return self.memory["parameters"] + self.memory["optimizer"]

    @cached_property
    def seconds(self) -> float:
        """The middle of the range that the roofline gives for a step."""
        return sum(self.roofline.step_seconds) / 2

    @property
    def mesh(self) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in AXES)

    @property
    def placement(self) -> tuple[int, ...]:
        """The mesh and how it stores weights; `mesh.zero` means nothing where `data` is 1."""
        return (*self.mesh, self.config.mesh.zero if self.sizes["data"] > 1 else 0)

    @property
    def choice(self) -> tuple[Any, ...]:
        """What makes it another program than the others."""
        return (*self.placement, self.config.model.remat, self.config.train.accumulation)

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but how many of the batch's devices share out weights too: `data` against `fsdp`."""
        others = tuple(self.sizes[axis] for axis in AXES if axis not in AXES[1:3])
        return (*others, self.config.model.remat, self.config.train.accumulation)

    @property
    def label(self) -> str:
        return describe(self.config, self.sizes)


@dataclass(frozen=True)
class Shortlist:
    """The candidates worth compiling, and how many were left out for which reason."""

    pool: list[Candidate]
    considered: int
    refused: int
    too_large: int
    slower: int


def shortlisted(config: RunConfig, topology: Topology) -> Shortlist:
    """The candidates that could fit and could be fastest, with the config's own first if it can run at all.

    Left out are those that the roofline finds too large for a device by more than `SLACK`; those that another one of
    the same mesh beats in memory and time both; and those whose best case is slower than the worst case of one that
    fits with `SLACK` to spare. Raises ConfigError where no mesh suits.
    """
    everything, refused = priced(config, topology)
    capacity = topology.hbm_bytes_per_device
    could_fit = [c for c in everything if c.memory_bytes <= capacity * (1 + SLACK)]
    sure = [c.roofline.step_seconds[1] for c in could_fit if c.memory_bytes <= capacity * (1 - SLACK)]
    limit = min(sure, default=math.inf)
    fronts: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in could_fit:
        fronts.setdefault(candidate.placement, []).append(candidate)
    pool = [c for front in fronts.values() for c in _undominated(front) if c.roofline.step_seconds[0] <= limit]
    own = [c for c in everything if c.own and c.memory_bytes <= capacity * (1 + SLACK)]
    pool = own + sorted((c for c in pool if not c.own), key=lambda c: (c.seconds, c.memory_bytes))
    # Where nothing fits by the roofline, the leanest are asked of the compiler all the same: it has the last word.
    pool = pool or sorted(everything, key=lambda c: c.memory_bytes)[:2]
    return Shortlist(
        pool=pool,
        considered=len(everything),
        refused=refused,
        too_large=len(everything) - len(could_fit),
        slower=len(could_fit) - len([c for c in pool if c.memory_bytes <= capacity * (1 + SLACK)]),
    )


def _undominated(candidates: list[Candidate]) -> Iterator[Candidate]:
    """Those that no other one beats in both time and memory, the fastest (and largest) first."""
    least = math.inf
    for candidate in sorted(candidates, key=lambda c: (c.seconds, c.memory_bytes, c.config.train.accumulation)):
        if candidate.memory_bytes < least:
            least = candidate.memory_bytes
            yield candidate


def priced(config: RunConfig, topology: Topology) -> tuple[list[Candidate], int]:
    """Every combination that the code allows, with its roofline, and the number of those that it refuses.

    Raises ConfigError where all are refused, with the reason of the refusal.
    """
    found: dict[tuple[Any, ...], Candidate] = {}
    refused, reason = 0, ""
    with contextlib.suppress(MaxlmError):
        own = price(config, topology, own=True)
        found[own.choice] = own
    remats = remat_choices(config)
    for mesh in meshes(config, topology.n_devices):
        for accumulation in divisors(config.train.global_batch_tokens // config.train.seq_len):
            try:
                for remat in remats:
                    varied = vary(config, mesh=mesh, accumulation=accumulation, remat=remat)
                    candidate = price(varied, topology)
                    found.setdefault(candidate.choice, candidate)
            except MaxlmError as error:
                refused, reason = refused + 1, reason or str(error)
    if not found:
        raise ConfigError(f"no mesh of the {topology.n_devices} devices of {topology.name} suits this config; {reason}")
    return list(found.values()), refused


def price(config: RunConfig, topology: Topology, *, own: bool = False) -> Candidate:
    """The config as a candidate. Raises MaxlmError where the code, the mesh or the network refuses it."""
    support.check(config)
    sizes = resolve_sizes(config.mesh, topology.n_devices)
    support.check_mesh(config, sizes)
    network_of(sizes, topology)
    return Candidate(config, sizes, topology, own)


def meshes(config: RunConfig, n_devices: int) -> Iterator[MeshConfig]:
    """Every mesh of so many devices on the axes that `parallel/support.py` allows.

    Stages are left out: the fewest of them that a step needs is a choice of networks, which the plan of one mesh shows.
    `mesh.zero` = 3 is left out: it places everything as `data` = 1 with a larger `fsdp` does. So are axes that share
    rows by position, where rows are short: whole rows ask for nothing to be sent.
    """
    short = config.train.seq_len <= SHORT_ROW
    left_out = (PIPELINE, *(ACTIVATIONS["length"] if short else ()))
    axes = [axis for axis in AXES if axis not in left_out and _allowed(config, axis)]
    for sizes in factorizations(n_devices, len(axes)):
        named = dict.fromkeys(AXES, 1) | dict(zip(axes, sizes, strict=True))
        for zero in (0, 1) if named["data"] > 1 else (0,):
            yield MeshConfig.model_validate(named | {"zero": zero})


def _allowed(config: RunConfig, axis: str) -> bool:
    try:
        support.check(vary(config, mesh=MeshConfig.model_validate(dict.fromkeys(AXES, 1) | {axis: 2})))
    except ConfigError:
        return False
    return True


def factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `n` as an ordered product of `parts` positive integers."""
    if parts == 1:
        yield (n,)
        return
    for first in divisors(n):
        for rest in factorizations(n // first, parts - 1):
            yield (first, *rest)


def divisors(n: int) -> list[int]:
    """The divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def remat_choices(config: RunConfig) -> list[RematConfig]:
    """Policies worth a look: everything kept, matmuls kept, attention and (or) the MLP's middle kept, nothing kept."""
    model = config.model
    blocks = [
        block
        for block, width in (("mlp", dense_width), ("expert", expert_width))
        if any(width(model, kind) for kind in model.layer_kinds)
    ]
    mlp = tuple(f"{block}_{name}" for block in blocks for name in (("gate", "up") if model.gated else ("up",)))
    attention = (*ATTENTION, "r") if model.positions == "transformer_xl" else ATTENTION
    kept = (ATTENTION[3:], attention, (*attention, "attention_out"), mlp, (*attention, *mlp))
    choices = [RematConfig(policy=policy) for policy in ("none", "dots", "full")]
    return choices + [RematConfig(policy="names", names=names) for names in kept]


def required_bytes(plan: Plan | None) -> int | None:
    """What a plan needs on a device: the compiler's figure where it compiled or ran out, else the roofline's."""
    if plan is None:
        return None
    if plan["compiled"] is not None:
        return plan["compiled"]["memory"]["required"]
    if plan["out_of_memory"] is not None:
        return plan["out_of_memory"]["used"]
    return plan["analytic"]["memory"]["total"]


def bias_of(candidate: Candidate, required: int) -> float:
    """By what the roofline was wrong on all but the state, where the compiler said that `required` bytes are needed."""
    rest = candidate.memory_bytes - candidate.state_bytes
    return max(required - candidate.state_bytes, 0) / rest if rest else 1.0


def corrected_bytes(candidate: Candidate, bias: float) -> int:
    """The roofline's memory with all but the state multiplied by the bias that was found on another candidate."""
    return round(candidate.state_bytes + bias * (candidate.memory_bytes - candidate.state_bytes))


def vary(
    config: RunConfig,
    *,
    mesh: MeshConfig | None = None,
    remat: RematConfig | None = None,
    accumulation: int | None = None,
    chunk_tokens: int | None = None,
) -> RunConfig:
    """The config with other choices. They are not checked against the rest of it: `price` does."""
    model, train, loss = config.model, config.train, config.loss
    if remat is not None:
        model = model.model_copy(update={"remat": remat})
    if accumulation is not None:
        train = train.model_copy(update={"accumulation": accumulation})
    if chunk_tokens is not None:
        loss = loss.model_copy(update={"chunk_tokens": chunk_tokens})
    return config.model_copy(update={"mesh": mesh or config.mesh, "model": model, "train": train, "loss": loss})


def changes(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """The keys whose values differ, with those of `after`."""
    from maxlm.config import diff

    return {key: value for key, _, value in diff(before, after)}


def describe(config: RunConfig, sizes: Mapping[str, int]) -> str:
    """The choices in a line: `data 4 x fsdp 64 (zero 1), remat full, 2 microbatches`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    zero = f" (zero {config.mesh.zero})" if config.mesh.zero and sizes["data"] > 1 else ""
    n = config.train.accumulation
    return f"{mesh}{zero}, remat {remat_name(config.model.remat)}" + (f", {n} microbatches" if n > 1 else "")


def remat_name(remat: RematConfig) -> str:
    """The policy in words: `full`, or what is kept: `q, k, v`."""
    return "keeping " + ", ".join(remat.names) if remat.names else remat.policy
