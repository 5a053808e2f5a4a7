"""What to change when a step does not fit: remedies in order, estimated by the roofline and tried by the compiler.

A remedy is a ladder: the same kind of change, further and further (2, 4, 8 microbatches). The rung that is taken is the
first that is estimated to fit, and the last one where none is. Estimates are the roofline's, corrected by what the
compiler said of the config before. The cheap remedies, which cost only some recomputation, come first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maxlm.errors import MaxlmError
from maxlm.models.config import RematConfig
from maxlm.parallel.mesh import AXES, MeshConfig
from maxlm.planning.candidates import (
    SLACK,
    Candidate,
    bias_of,
    changes,
    corrected_bytes,
    divisors,
    price,
    remat_choices,
    remat_name,
    required_bytes,
    vary,
)
from maxlm.planning.hardware import GIB
from maxlm.planning.topology import Topology

if TYPE_CHECKING:
    from maxlm.config import RunConfig


# A compilation of a large model takes a minute or two: after so many it is left at estimates.
MOST_COMPILATIONS = 6

# Each chunk of the loss reads and writes the head's gradient, 8 bytes for its 6 FLOPs a token: by the chips' rates that
# takes longer than the products below 220 (v5p) to 750 tokens (v6e).
LEAST_CHUNK_TOKENS = 256

Rung = tuple[str, Candidate]
Ladder = Callable[[Candidate, Topology], Iterator[tuple[str, "RunConfig"]]]


def relief(
    config: RunConfig,
    topology: Topology,
    plan_one: Callable[[RunConfig], dict[str, Any]],
    *,
    used: int | None = None,
) -> list[dict[str, Any]]:
    """What would free how much of a device's memory, in the order in which it was tried.

    Args:
        config: one that does not fit.
        plan_one: makes the plan of a config, and does not look for relief itself. Called until a plan fits, only for
            changes that are estimated to fit (within `SLACK`), and at most `MOST_COMPILATIONS` times.
        used: what the compiler said that the config needs, bytes a device; by the roofline where not given.

    Each remedy alone first, then together, one more at a time; at last, where nothing fits, how many devices the
    parameters and the optimizer's state ask for at least. A row has `change` (overrides), `label`, `saves_bytes`,
    `required_bytes`, `fits`, and `how` that is known: `compiled` or `estimated`.

    Raises MaxlmError where the config cannot run on the topology at all.
    """
    before = price(config, topology)
    attempt = _Attempt(before, topology, plan_one, used or before.memory_bytes)
    for ladder in LADDERS:
        attempt.climb(_rungs(ladder, before, topology))
    here, labels = before, []
    for ladder in LADDERS:
        if attempt.solved:
            break
        rungs = _rungs(ladder, here, topology)
        if not rungs:
            continue
        label, here = attempt.first_that_fits(rungs) or rungs[-1]
        labels.append(label)
        if len(labels) > 1:
            attempt.climb([("together: " + ", ".join(labels), here)])
    if not attempt.solved:
        attempt.rows.append(_least_devices(before, topology, attempt.used))
    return attempt.rows


@dataclass
class _Attempt:
    """The rows so far, and what the compiler said."""

    before: Candidate
    topology: Topology
    plan_one: Callable[[RunConfig], dict[str, Any]]
    used: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    solved: bool = False
    compilations: int = 0

    def __post_init__(self) -> None:
        self.capacity = self.topology.hbm_bytes_per_device
        self.bias = bias_of(self.before, self.used)

    def climb(self, rungs: list[Rung]) -> None:
        """Takes the first rung that is estimated to fit, and higher ones as long as the compiler finds it too large."""
        while rungs:
            label, rung = self.first_that_fits(rungs) or rungs[-1]
            rungs = rungs[[candidate for _, candidate in rungs].index(rung) + 1 :]
            estimate = corrected_bytes(rung, self.bias)
            if self.solved or estimate > self.capacity * (1 + SLACK) or self.compilations == MOST_COMPILATIONS:
                self._add(label, rung, estimate, estimate <= self.capacity, "estimated")
                return
            self.compilations += 1
            try:
                plan = self.plan_one(rung.config)
            except Exception as error:  # compilers refuse in many ways; the other remedies are tried all the same
                first_line = str(error).partition("\n")[0][:200]
                label = f"{label} (not compiled: {type(error).__name__}: {first_line})"
                self._add(label, rung, estimate, False, "estimated")
                return
            self.solved, required = bool(plan["fits"]), required_bytes(plan) or estimate
            how = "estimated" if plan["compiled"] is None and plan["out_of_memory"] is None else "compiled"
            self.bias = bias_of(rung, required)
            self._add(label, rung, required, self.solved, how)
            if self.solved:
                return

    def first_that_fits(self, rungs: list[Rung]) -> Rung | None:
        """The first rung that is estimated to fit, if there is one."""
        return next((rung for rung in rungs if corrected_bytes(rung[1], self.bias) <= self.capacity), None)

    def _add(self, label: str, rung: Candidate, required: int, fits: bool, how: str) -> None:
        self.rows.append(
            {
                "change": [
                    f"{name}={_shown(value)}" for name, value in changes(self.before.config, rung.config).items()
                ],
                "label": label,
                "saves_bytes": self.used - required,
                "required_bytes": required,
                "fits": fits,
                "how": how,
            }
        )


def _rungs(ladder: Ladder, before: Candidate, topology: Topology) -> list[Rung]:
    """The ladder's changes that the code allows and that save something more than those before them."""
    rungs: list[Rung] = []
    least = before.memory_bytes
    for label, config in ladder(before, topology):
        try:
            candidate = price(config, topology)
        except MaxlmError:
            continue
        if candidate.memory_bytes < least:
            least = candidate.memory_bytes
            rungs.append((label, candidate))
    return rungs


def _less_kept(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """Remat policies by the time of the step."""
    varied = [vary(before.config, remat=remat) for remat in remat_choices(before.config)]
    for candidate in sorted((price(config, topology) for config in varied), key=lambda c: c.seconds):
        yield f"remat {remat_name(candidate.config.model.remat)}", candidate.config


def _more_microbatches(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """Every number of microbatches that is a multiple of the present one and divides the rows."""
    train = before.config.train
    for n in divisors(train.global_batch_tokens // train.seq_len):
        if n > train.accumulation and n % train.accumulation == 0:
            yield f"{n} microbatches", vary(before.config, accumulation=n)


def _smaller_loss_chunks(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """Chunks of half as many tokens, and half again, down to `LEAST_CHUNK_TOKENS`."""
    from maxlm.kernels.cross_entropy import ACCELERATOR_CHUNK_BYTES

    logits_bytes = 4 * before.config.model.padded_vocab_size // before.sizes[AXES[5]]
    tokens = before.config.loss.chunk_tokens or ACCELERATOR_CHUNK_BYTES // logits_bytes
    while (tokens := tokens // 2) >= LEAST_CHUNK_TOKENS:
        yield f"loss in chunks of {tokens:,} tokens", vary(before.config, chunk_tokens=tokens)


def _more_sharding(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """`fsdp` grown by a factor, taken from `data` first, else from `tensor`."""
    data, fsdp, tensor = (before.sizes[axis] for axis in (AXES[1], AXES[2], AXES[5]))
    zero = before.config.mesh.zero
    for factor in divisors(data)[1:]:
        mesh = MeshConfig(**{**before.sizes, AXES[1]: data // factor, AXES[2]: fsdp * factor}, zero=zero)
        yield f"fsdp {fsdp * factor}, taken from data", vary(before.config, mesh=mesh)
    for factor in divisors(tensor)[1:]:
        mesh = MeshConfig(**{**before.sizes, AXES[5]: tensor // factor, AXES[2]: fsdp * factor}, zero=zero)
        yield f"fsdp {fsdp * factor}, taken from tensor", vary(before.config, mesh=mesh)


def _shard_over_data(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """The optimizer's state, then the weights, sharded over `data` too."""
    if before.sizes[AXES[1]] == 1:
        return
    for zero, what in ((1, "the optimizer state"), (3, "weights and optimizer state")):
        if zero > before.config.mesh.zero:
            mesh = before.config.mesh.model_copy(update={"zero": zero})
            yield f"{what} sharded over data (zero {zero})", vary(before.config, mesh=mesh)


def _more_tensor(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """`tensor` grown by a factor taken from `fsdp`, with as many more microbatches: a device's rows stay as many, and
    each is cut by position among more devices. For batches of a row a device, which microbatches cannot make smaller.
    """
    fsdp, tensor, accumulation = before.sizes[AXES[2]], before.sizes[AXES[5]], before.config.train.accumulation
    for factor in divisors(fsdp)[1:]:
        sizes = {**before.sizes, AXES[2]: fsdp // factor, AXES[5]: tensor * factor}
        mesh = MeshConfig(**sizes, zero=before.config.mesh.zero)
        label = f"tensor {tensor * factor}, taken from fsdp, {accumulation * factor} microbatches"
        yield label, vary(before.config, mesh=mesh, accumulation=accumulation * factor)


def _offloaded(before: Candidate, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """What the backward pass needs of a layer, its input alone, waits in the host's memory."""
    remat = RematConfig(policy="names", offload=("layer_input",))
    yield "remat full, layers' inputs kept in the host's memory", vary(before.config, remat=remat)


LADDERS: tuple[Ladder, ...] = (
    _less_kept,
    _more_microbatches,
    _smaller_loss_chunks,
    _more_sharding,
    _shard_over_data,
    _offloaded,
    _more_tensor,
)


def _least_devices(before: Candidate, topology: Topology, used: int) -> dict[str, Any]:
    """How many devices hold the parameters and the optimizer's state, everything sharded over all of them."""
    sizes, zero, memory = before.sizes, before.config.mesh.zero, before.memory
    data, shards = sizes[AXES[1]], sizes[AXES[2]] * sizes[AXES[5]]
    state = memory["parameters"] * shards * (data if zero == 3 else 1)
    state += memory["optimizer"] * shards * (data if zero >= 1 else 1)
    n = math.ceil(state / topology.hbm_bytes_per_device)
    return {
        "change": [],
        "label": f"parameters and optimizer state are {state / GIB:,.1f} GiB: this model needs at least {n:,} "
        f"{'device' if n == 1 else 'devices'} of {topology.chip.name}, and room for activations beside that",
        "saves_bytes": used - state // topology.n_devices,
        "required_bytes": state // topology.n_devices,
        "fits": False,
        "how": "estimated",
    }


def _shown(value: Any) -> str:
    """A value as an override has it, without spaces."""
    return (
        "[" + ",".join(map(_shown, value)) + "]"
        if isinstance(value, list)
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )
