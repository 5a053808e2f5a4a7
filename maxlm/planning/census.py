"""What a compiled step does: its collectives, its kernels, and where its cycles go.

Cycles are summed over the instructions of the schedule, times the trip counts of their loops; insides of fusions are
not counted as instructions of their own. Collectives count by the bytes of what comes out (all-gather, all-to-all,
permute) or of what goes in (all-reduce, reduce-scatter), per device. The figures that maxlm's plans are compared with
were counted in the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

from maxlm.parallel.mesh import axis_over_slices
from maxlm.planning.device_groups import axes_of_groups, axes_of_pairs
from maxlm.planning.hlo import Computation, Instruction, Module
from maxlm.planning.hlo_loops import Execution, cycles_of, executions, total_cycles, trip_count
from maxlm.planning.hlo_shape import Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BY_OPERANDS = ("all-reduce", "reduce-scatter")
PARTS = ("embedding", "layers forward", "layers backward", "layers recomputed", "head and loss", "optimizer", "other")

_KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "__cudnn$", "__cublas$")
_COMPUTES = ("fusion", "custom-call", "while", "dot", "convolution", "call", "conditional", "sort", "scatter")
_CHAIN = re.compile(r'chain_id="([^"]*)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# XLA's names for what the runtime between slices (megascale) does; anything else goes from one to one.
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
}
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRANSFORMED = re.compile(r"(transpose\()?jvp\([^)]*\)+/?")
_MOVES = ("bitcast", "copy", "reshape", "convert", "transpose", "copy-done", "copy-start")


Reach = Literal["mesh", "slice", "slices"]


@dataclass(frozen=True)
class Collective:
    """One collective of the program, executed `times` times a step."""

    kind: str
    """XLA's name; `all-reduce-scatter` for a TPU fusion that keeps a shard of the sum; `padded all-reduce` for a gather
    done as the sum of buffers that are zero but for one shard."""
    axes: tuple[str, ...]
    bytes: int
    """Of one execution, per device: results, or operands of a reduction."""
    times: int
    in_loop: bool
    overlapped: bool
    """The compiler has put computation between its start and its end."""
    asynchronous: bool
    dtype: str
    shape: str
    what: str
    source: str
    part: str
    fused: bool
    reach: Reach = "mesh"
    """Where the mesh is spread over slices a TPU's program is that of one slice: a collective is inside of it, over the
    part of `axes` that the slice has, or between slices."""
    overlap_cycles: int = 0
    """Cycles that one execution has beside it, from start to end. What two collectives share is in both."""
    appearances: int = 1
    """How often it stands in the text: an asynchronous fusion's start, its steps and its end each name it."""

    @property
    def bytes_per_step(self) -> int:
        return self.bytes * self.times


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel that the compiler did not make: Pallas, Triton, cuDNN."""

    name: str
    times: int
    target: str
    flops: int | None
    """Of one call, if the program gave an estimate."""
    what: str
    source: str
    part: str


@dataclass(frozen=True)
class Census:
    """The counts of one step on one device. Cycles are the compiler's estimates; kernels and collectives have none."""

    cycles: int
    cycles_by_part: dict[str, int]
    cycles_in_loops: int
    collectives: list[Collective]
    kernels: list[Kernel]
    loops: list[tuple[str, int | None, int]]
    """(op_name, trip count or None where it could not be read, times that the loop is entered)."""
    arguments: list[tuple[str, tuple[int, ...]]]
    """(the program's name, sizes on a device) of what goes in."""
    n_unknown_cycles: int = 0
    """Instructions whose estimate is the compiler's "unknown": not in `cycles`."""

    def collective_bytes(self) -> dict[str, int]:
        """Bytes of a step by kind, each collective once."""
        totals: dict[str, int] = {}
        for one in self.collectives:
            totals[one.kind] = totals.get(one.kind, 0) + one.bytes_per_step
        return totals

    def bytes_as_written(self) -> dict[str, int]:
        """Bytes of a step by XLA's own kinds, a collective counted wherever the text names it.

        For figures that were made by counting lines: an asynchronous fusion then counts three times or more (its start,
        each step, its end), and fused reduce-scatters count as the all-reduce that they contain.
        """
        totals: dict[str, int] = {}
        for one in self.collectives:
            kind = "all-reduce" if one.kind in ("all-reduce-scatter", "padded all-reduce") else one.kind
            totals[kind] = totals.get(kind, 0) + one.bytes_per_step * one.appearances
        return totals

    @property
    def unknown_loops(self) -> list[str]:
        """Loops whose trip count the text does not tell; they are counted once."""
        return [name for name, trips, _ in self.loops if trips is None]


def census(module: Module, sizes: Mapping[str, int]) -> Census:
    """Counts a compiled step.

    Args:
        module: the parsed text.
        sizes: the mesh's axes and sizes, in its order. The text counts partitions along the flattened mesh, so that
            the ids of the devices in it do not matter.
    """
    runs = list(executions(module))
    by_part: dict[str, int] = dict.fromkeys(PARTS, 0)
    in_loops = n_unknown = 0
    for run in runs:
        one = run.instruction
        if module.computation_of(one).thread != "main":
            continue
        if one.cycles:
            by_part[part_of(module, one)] += one.cycles * run.times
            in_loops += one.cycles * run.times if run.depth else 0
        elif '"estimated_cycles"' in one.attributes and one.cycles is None:
            n_unknown += 1
    counter = _Collectives(module, *_of_program(module, sizes))
    return Census(
        cycles=sum(by_part.values()),
        cycles_by_part=by_part,
        cycles_in_loops=in_loops,
        collectives=counter.count(runs),
        kernels=list(_kernels(module, runs)),
        loops=[
            (run.instruction.op_name, trip_count(module, run.instruction), run.times)
            for run in runs
            if run.instruction.opcode == "while"
        ],
        arguments=[(one.op_name, one.shape.dims) for one in module.entry.parameters],
        n_unknown_cycles=n_unknown,
    )


def sizes_in_a_slice(sizes: Mapping[str, int], n_slices: int) -> dict[str, int]:
    """The mesh that one slice has of a mesh over several."""
    over = axis_over_slices(dict(sizes), n_slices)
    return {axis: size // n_slices if axis == over else size for axis, size in sizes.items()}


def _of_program(module: Module, sizes: Mapping[str, int]) -> tuple[Mapping[str, int], str | None]:
    """The mesh whose devices the text counts, and the axis that goes over slices, where the text is of one of them."""
    n_slices = math.prod(sizes.values()) // module.n_partitions
    if n_slices <= 1 or math.prod(sizes.values()) % module.n_partitions:
        return sizes, None
    return sizes_in_a_slice(sizes, n_slices), axis_over_slices(dict(sizes), n_slices)


# What part of the step an instruction belongs to


def part_of(module: Module, instruction: Instruction) -> str:
    """One of `PARTS`, by the program's name for the instruction and the lines that made it.

    What the compiler made has no name, and belongs where its operands or the loop around it do.
    """
    name, stack = origin(module, instruction)
    if match := re.search(r"(?:state|batch)\.?(\w*)(.*)", name) if name.startswith(("state", "batch")) else None:
        return _part_of_argument(match[1], match[2])
    transformed = _TRANSFORMED.search(name)
    if transformed is None:
        return "optimizer" if name and "/while/body" not in name else "other"
    inside = name[transformed.end() :]
    layers = "layers backward" if transformed[1] else "layers forward"
    if inside.startswith("while"):  # the loop over layers; the loss's own stands inside its shard_map
        return "layers recomputed" if "rematted_computation" in inside else layers
    for file, function, _ in stack:
        if "embedding" in file or function.startswith("Embedding"):
            return "embedding"
        if file.endswith(("models/positions.py", "models/block.py")):
            return layers
    return "head and loss"


def _part_of_argument(field_name: str, path: str) -> str:
    """Of a move of an argument: where the argument is used."""
    if field_name in ("opt_state", "guard", "step"):
        return "optimizer"
    if "embedding" in path or "inputs" in path:
        return "embedding"
    return "layers forward" if "decoder" in path else "head and loss"


def origin(module: Module, instruction: Instruction) -> tuple[str, list[tuple[str, str, int]]]:
    """(op_name, stack) of an instruction, else of what feeds it or takes it, else of the loop around it."""
    computation = module.computation_of(instruction)
    for one in _near(computation, instruction):
        if _is_told(one.op_name):
            return one.op_name, module.stack(one)
        for name in one.called if one.opcode == "fusion" else ():
            inner = module.computations[name].root
            if _is_told(inner.op_name):
                return inner.op_name, module.stack(inner)
    caller = module.callers.get(instruction.computation)
    if caller is not None and caller.opcode == "while" and not _is_told(caller.op_name):
        # A loop that the compiler made anew may have lost its name, which those inside of it still have.
        for one in computation.instructions:
            loop, found, _ = one.op_name.partition("/while")
            if found and _is_told(one.op_name):
                return loop + found, module.stack(one)
    return origin(module, caller) if caller is not None else ("", [])


def _is_told(name: str) -> bool:
    """Whether it is the program that named it: a path, or an argument. The compiler names some after themselves."""
    return "/" in name or name.startswith(("state", "batch"))


def _near(computation: Computation, instruction: Instruction) -> Iterator[Instruction]:
    """The instruction, what feeds it (first operands; not constants, which anyone may share), and who takes it."""
    one: Instruction | None = instruction
    for _ in range(6):
        if one is None or (one is not instruction and one.opcode in ("constant", "iota", "parameter")):
            break
        yield one
        one = computation.by_name.get(one.operands[0]) if one.operands else None
    one = instruction
    for _ in range(4):
        users = computation.users[one.name]
        if not users:
            break
        one = users[0]
        yield one


def _kernels(module: Module, runs: Sequence[Execution]) -> Iterator[Kernel]:
    for run in runs:
        one = run.instruction
        target = (one.attribute("custom_call_target") or "").strip('"') if one.opcode == "custom-call" else ""
        if not any(known in target for known in _KERNEL_TARGETS):
            continue
        flops = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
        name = re.sub(r"\.\d+$", "", one.name)
        inside = int(flops[1]) if flops else None
        yield Kernel(name, run.times, target, inside, one.op_name, module.source(one), part_of(module, one))


# Collectives


@dataclass
class _Chain:
    """An asynchronous collective fusion: found at its start, closed at its end."""

    found: Collective
    number: int
    """Of the execution that starts it."""
    first: Instruction
    last: Instruction
    appearances: int = 1


@dataclass
class _Collectives:
    module: Module
    sizes: Mapping[str, int]
    over_slices: str | None
    chains: dict[tuple[str, str], _Chain] = field(default_factory=dict)
    prefix: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def has_cycles(self) -> bool:
        """The GPU's compiler estimates nothing."""
        return total_cycles(self.module, self.module.entry) > 0

    def count(self, runs: Sequence[Execution]) -> list[Collective]:
        """All collectives of the executions, in the order in which they begin; none of one device alone."""
        found: list[tuple[int, Collective]] = []
        for number, run in enumerate(runs):
            if run.instruction.opcode == "fusion":
                found += [(number, one) for one in self._fused(run, number)]
            elif one := self._plain(run):
                found.append((number, one))
        for chain in self.chains.values():
            closed = self._beside(chain.found, chain.first, chain.last)
            found.append((chain.number, replace(closed, appearances=chain.appearances)))
        return [one for _, one in sorted(found, key=lambda pair: pair[0]) if one.axes]

    def _plain(self, run: Execution) -> Collective | None:
        """A collective that stands in the schedule itself: whole, or its start."""
        one = run.instruction
        inner, start = one, one
        base = one.opcode.removesuffix("-start")
        if one.opcode == "send":
            return self._between_slices(run)
        if base not in COLLECTIVES:
            return None
        if one.called_as("calls") and (wrapped := self._inside(one)):
            inner = wrapped[0]
        end = self._end(one)
        if end is None and (caller := self._wrapper(one)) is not None:
            start, end = caller, self._end(caller)
        found = self._collective(run, inner, base, fused=False)
        return found if end is None else self._beside(replace(found, asynchronous=True), start, end)

    def _between_slices(self, run: Execution) -> Collective | None:
        """A transfer that the program hands to the runtime between slices, and waits for at the receiving end."""
        one = run.instruction
        transfer, name = _BETWEEN_SLICES.search(one.attributes), _RENDEZVOUS.search(one.attributes)
        if transfer is None or name is None:
            return None
        computation, rendezvous = self.module.computation_of(one), name[0]
        receives = (each for each in computation.instructions if each.opcode == "recv")
        received = next((each for each in receives if rendezvous in each.attributes), None)
        users = computation.users[received.name] if received else ()
        end = next((user for user in users if user.opcode == "recv-done"), None)
        kind = _TRANSFERS.get(transfer[1], "collective-permute")
        # The first of (array, context, token); what is gathered is as large as what comes.
        counted = one if received is None or kind in BY_OPERANDS else received
        whole = counted.shape.leaves[0]
        op_name, _ = origin(self.module, one)
        found = Collective(
            kind=kind,
            axes=(self.over_slices or "",),
            bytes=whole.bytes,
            times=run.times,
            in_loop=run.depth > 0,
            overlapped=False,
            asynchronous=True,
            dtype=whole.dtype,
            shape=str(whole),
            what=op_name,
            source=self.module.source(one),
            part=part_of(self.module, one),
            fused=False,
            reach="slices",
        )
        return found if end is None else self._beside(found, one, end)

    def _wrapper(self, one: Instruction) -> Instruction | None:
        """The asynchronous call around a collective."""
        caller = self.module.callers.get(one.computation)
        return caller if caller is not None and caller.opcode in ("call-start", "async-start") else None

    def _end(self, start: Instruction) -> Instruction | None:
        """The `-done` of a `-start`, through its updates."""
        users = self.module.computation_of(start).users
        queue, seen = [start], {start.name}
        while queue and start.opcode.endswith("-start"):
            for user in users[queue.pop().name]:
                if user.opcode.endswith("-done"):
                    return user
                if user.opcode.endswith("-update") and user.name not in seen:
                    seen.add(user.name)
                    queue.append(user)
        return None

    def _inside(self, one: Instruction) -> list[Instruction]:
        """The collectives in the computations that an instruction calls, fusions in them too."""
        found = []
        for name in one.called:
            for inner in self.module.computations[name].instructions:
                if inner.opcode in COLLECTIVES:
                    found.append(inner)
                elif inner.opcode == "fusion":
                    found += self._inside(inner)
        return found

    def _fused(self, run: Execution, number: int) -> Iterator[Collective]:
        """Collectives inside of a fusion: on their own, or the start, a step or the end of a chain of fusions."""
        one = run.instruction
        for inner in self._inside(one):
            name = _CHAIN.search(inner.attributes) or _CHANNEL.search(inner.attributes)
            targets = {
                (each.attribute("custom_call_target") or "").strip('"')
                for each in self.module.computation_of(inner).instructions
                if each.opcode == "custom-call"
            }
            key = (one.computation, name[0] if name else inner.name)
            known = self.chains.get(key)
            if "AsyncCollectiveStart" in targets:
                found = self._collective(run, inner, inner.opcode, fused=True)
                self.chains[key] = _Chain(replace(found, asynchronous=True), number, one, one)
            elif known is not None and _CHAIN.search(inner.attributes):
                known.appearances += 1
                known.last = one
            else:
                kind = self._fused_kind(inner)
                yield self._collective(run, inner, kind, fused=True)

    def _fused_kind(self, inner: Instruction) -> str:
        computation = self.module.computation_of(inner)
        if inner.opcode != "all-reduce":
            return inner.opcode
        queue = list(computation.users[inner.name])
        while queue:
            user = queue.pop()
            if user.opcode == "dynamic-slice":
                return "all-reduce-scatter"
            if user.opcode in ("get-tuple-element", *_MOVES):
                queue += computation.users[user.name]
        return inner.opcode

    def _collective(self, run: Execution, inner: Instruction, kind: str, *, fused: bool) -> Collective:
        module, outer = self.module, run.instruction
        if kind == "all-reduce" and is_padded(module, inner):
            kind = "padded all-reduce"
        shapes = _moved(module, inner)
        named = inner if inner.op_name else outer
        name, _ = origin(module, named)
        return Collective(
            kind=kind,
            axes=self._axes(inner),
            bytes=sum(shape.bytes for shape in shapes),
            times=run.times,
            in_loop=run.depth > 0,
            overlapped=False,
            asynchronous=False,
            dtype=max(shapes, key=lambda shape: shape.bytes).dtype if shapes else "",
            shape=", ".join(map(str, shapes)),
            what=name,
            source=module.source(inner) or module.source(outer),
            part=part_of(module, named),
            fused=fused,
            reach="mesh" if self.over_slices is None else "slice",
        )

    def _axes(self, inner: Instruction) -> tuple[str, ...]:
        pairs = inner.attribute("source_target_pairs")
        if pairs is not None:
            return axes_of_pairs(pairs, self.sizes)
        return axes_of_groups(inner.attribute("replica_groups") or "{}", self.sizes)

    def _beside(self, found: Collective, first: Instruction, last: Instruction) -> Collective:
        """With what stands between its start and its end: cycles, or where the compiler gives none, any computation."""
        between = self.module.computations[first.computation].instructions[first.index + 1 : last.index]
        cycles = self._cycles_before(last) - self._cycles_before(first) - cycles_of(self.module, first)
        computes = cycles > 0 or (not self.has_cycles and any(one.opcode in _COMPUTES for one in between))
        return replace(found, overlap_cycles=max(0, cycles), overlapped=computes)

    def _cycles_before(self, one: Instruction) -> int:
        """Cycles of one run of its computation before an instruction, loops multiplied out."""
        if one.computation not in self.prefix:
            instructions = self.module.computations[one.computation].instructions
            self.prefix[one.computation] = [0, *accumulate(cycles_of(self.module, each) for each in instructions)]
        return self.prefix[one.computation][one.index]


def _moved(module: Module, one: Instruction) -> tuple[Shape, ...]:
    """The arrays whose bytes count: operands of a reduction, else results."""
    base = one.opcode.removesuffix("-start")
    if base in BY_OPERANDS:
        return tuple(leaf for shape in module.operand_shapes(one) for leaf in shape.leaves)
    if one.opcode.endswith("-start") and one.shape.elements:
        return one.shape.elements[1].leaves  # (operands, results, contexts...)
    return one.shape.leaves


def is_padded(module: Module, one: Instruction) -> bool:
    """Whether an all-reduce adds buffers that are zeros but for one shard: a gather that sends twice the bytes."""
    computation = module.computation_of(one)
    return any(_in_zeros(module, computation, computation.by_name[name], None, 0) for name in one.operands)


def _in_zeros(module: Module, computation: Computation, one: Instruction, element: int | None, depth: int) -> bool:
    """Whether a value is a shard written into zeros."""
    if depth > 12:
        return False
    if one.opcode in _MOVES:
        return _in_zeros(module, computation, computation.operand(one), None, depth + 1)
    if one.opcode == "get-tuple-element":
        return _in_zeros(module, computation, computation.operand(one), one.tuple_index, depth + 1)
    if one.opcode == "tuple" and element is not None:
        return _in_zeros(module, computation, computation.operand(one, element), None, depth + 1)
    if one.opcode == "fusion":
        called = module.computations[one.called[0]]
        return _in_zeros(module, called, called.root, element, depth + 1)
    if one.opcode == "dynamic-update-slice":
        return _is_zero(module, computation, computation.operand(one), 0)
    if one.opcode == "pad":
        return _is_zero(module, computation, computation.operand(one, 1), 0)
    return False


def _is_zero(module: Module, computation: Computation, one: Instruction, depth: int) -> bool:
    """Whether a value is a constant zero, broadcast or moved."""
    if one.opcode == "constant":
        return re.fullmatch(r"-?0(\.0*)?|false", one.operand_text.strip()) is not None
    if depth > 12:
        return False
    if one.opcode in ("broadcast", *_MOVES) and one.operands:
        return _is_zero(module, computation, computation.operand(one), depth + 1)
    if one.opcode == "fusion":
        root = module.computations[one.called[0]].root
        return _is_zero(module, module.computations[one.called[0]], root, depth + 1)
    caller = module.callers.get(computation.name)
    if one.opcode == "parameter" and caller is not None and caller.opcode in ("fusion", "call"):
        outer = module.computation_of(caller)
        return _is_zero(module, outer, outer.operand(caller, one.parameter_number), depth + 1)
    return False
