"""How often each instruction of a compiled program runs: trip counts of loops, nested ones multiplied.

A `while` says its trip count in its backend_config (GPU), or it is read from its parts (TPU): the condition compares a
counter with a limit, the body adds a step to it, and the start goes in with the other values that the loop carries. The
limit may itself be carried unchanged, through several loops, or be copied into the body ("sunk").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from maxlm.planning.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = {"copy", "bitcast", "reshape", "convert", "copy-done", "copy-start", "broadcast", "optimization-barrier"}
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}
# Loops that experts' tokens enter where load is uneven (`kernels/exchange.py`): a plan is of even load.
_UNEVEN = "further_rounds/while"
_DEPTH = 64  # of definitions followed; a chain of copies through nested loops is a dozen


class Execution(NamedTuple):
    """An instruction that runs `times` times a step, inside `depth` loops."""

    instruction: Instruction
    times: int
    depth: int


class _Value(NamedTuple):
    """A whole number: `offset`, or the loop's carried value number `carry` plus `offset`."""

    carry: int | None
    offset: int


def executions(module: Module) -> Iterator[Execution]:
    """Every instruction that is scheduled, with how often it runs.

    Insides of fusions are part of one kernel and are not visited, a loop's condition is not counted, a conditional
    runs its branch of most cycles, a loop whose trip count cannot be read (`trip_count` is None) runs once, and one
    that only uneven load enters never.
    """
    yield from _run(module, module.entry, 1, 0)


def _run(module: Module, computation: Computation, times: int, depth: int) -> Iterator[Execution]:
    for instruction in computation.instructions:
        yield Execution(instruction, times, depth)
        if instruction.opcode == "while":
            body = module.computations[instruction.called_as("body") or ""]
            yield from _run(module, body, times * _runs_of(module, instruction), depth + 1)
        else:
            for name in followed(module, instruction):
                yield from _run(module, module.computations[name], times, depth)


def followed(module: Module, instruction: Instruction) -> tuple[str, ...]:
    """The computations whose instructions run when this one does, loops aside: of a call, and one branch."""
    if instruction.opcode == "conditional":
        return (max(branches(instruction), key=lambda name: total_cycles(module, module.computations[name])),)
    if instruction.opcode in ("call", "call-start", "async-start"):
        return instruction.called[:1]
    return ()


def branches(instruction: Instruction) -> tuple[str, ...]:
    """The computations of a conditional, in the order in which its operands follow the predicate or index."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return tuple(re.findall(r"[\w.\-]+", listed[1]))
    return tuple(name for role in ("true", "false") if (name := instruction.called_as(f"{role}_computation")))


def total_cycles(module: Module, computation: Computation) -> int:
    """The compiler's cycles of one run of a computation, its loops multiplied out. Only the main core's."""
    if computation.name not in module.cycles:
        module.cycles[computation.name] = sum(
            run.instruction.cycles * run.times
            for run in _run(module, computation, 1, 0)
            if run.instruction.cycles and module.computation_of(run.instruction).thread == "main"
        )
    return module.cycles[computation.name]


def cycles_of(module: Module, instruction: Instruction) -> int:
    """The cycles of one execution of an instruction, with everything that it runs."""
    if instruction.opcode == "while":
        body = module.computations[instruction.called_as("body") or ""]
        return total_cycles(module, body) * _runs_of(module, instruction)
    if names := followed(module, instruction):
        return sum(total_cycles(module, module.computations[name]) for name in names)
    return instruction.cycles or 0


def _runs_of(module: Module, loop: Instruction) -> int:
    """How often the body of a `while` is counted."""
    trips = trip_count(module, loop)
    return 1 if trips is None else trips


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where the text does not tell."""
    if loop not in module.trip_counts:
        known = _KNOWN.search(loop.attributes)
        trips = int(known[1]) if known else _trip_count(module, loop)
        module.trip_counts[loop] = 0 if trips is None and loop.op_name.endswith(_UNEVEN) else trips
    return module.trip_counts[loop]


def _trip_count(module: Module, loop: Instruction) -> int | None:
    condition = module.computations[loop.called_as("condition") or ""]
    body = module.computations[loop.called_as("body") or ""]
    compare = _compare(module, condition)
    if compare is None:
        return None
    inside = module.computation_of(compare)
    left, right = (_value(module, inside, name, None, (condition,)) for name in compare.operands)
    direction = compare.attribute("direction") or ""
    if left is not None and left.carry is None:
        left, right, direction = right, left, _MIRRORED[direction]
    if left is None or right is None or left.carry is None:
        return None
    if right.carry is not None:  # the limit is carried too: it must not change
        right = _carried_in(module, loop, body, right)
    start = _value(module, module.computation_of(loop), loop.operands[0], left.carry, ())
    after = _value(module, body, body.root.name, left.carry, (body,))
    if right is None or start is None or start.carry is not None or after is None or after.carry != left.carry:
        return None
    return _count(start.offset + left.offset, right.offset, after.offset, direction)


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
    """Of `for (i = start; i <direction> limit; i += step)`; None where it would not end."""
    if direction == "NE":
        return (
            (limit - start) // step if step and (limit - start) % step == 0 and (limit - start) // step >= 0 else None
        )
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(limit - start + (direction == "LE")) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(start - limit + (direction == "GE")) // -step))
    return None


def _compare(module: Module, computation: Computation) -> Instruction | None:
    """The comparison that a condition's root is, also where it is fused."""
    one = computation.root
    for _ in range(_DEPTH):
        if one.opcode == "compare":
            return one
        if one.opcode == "fusion":
            one = module.computations[one.called[0]].root
        elif one.opcode in _SAME and one.operands:
            one = module.computation_of(one).operand(one)
        else:
            return None
    return None


def _carried_in(module: Module, loop: Instruction, body: Computation, value: _Value) -> _Value | None:
    """A carried value that no iteration changes, as it came in."""
    after = _value(module, body, body.root.name, value.carry, (body,))
    if after is None or after.carry != value.carry or after.offset:
        return None
    start = _value(module, module.computation_of(loop), loop.operands[0], value.carry, ())
    return None if start is None or start.carry is not None else _Value(None, start.offset + value.offset)


def _value(
    module: Module,
    computation: Computation,
    name: str,
    element: int | None,
    stop: tuple[Computation, ...],
    depth: int = 0,
) -> _Value | None:
    """What an instruction's result (or element of it) is: a constant, or a carried value of the loop of `stop`."""
    one = computation.by_name.get(name)
    if one is None or depth > _DEPTH:
        return None

    def of(operand: str, element: int | None = None) -> _Value | None:
        return _value(module, computation, operand, element, stop, depth + 1)

    if one.opcode == "constant":
        text = one.operand_text.strip()
        return _Value(None, int(text)) if re.fullmatch(r"-?\d+", text) else None
    if one.opcode in _SAME:
        return of(one.operands[0], element if one.opcode == "optimization-barrier" else None)
    if one.opcode == "get-tuple-element":
        return of(one.operands[0], one.tuple_index)
    if one.opcode == "tuple" and element is not None:
        return of(one.operands[element])
    if one.opcode in ("add", "subtract"):
        return _sum(of(one.operands[0]), of(one.operands[1]), minus=one.opcode == "subtract")
    if one.opcode in ("fusion", "call"):
        called = module.computations[one.called[0]]
        return _value(module, called, called.root.name, element, stop, depth + 1)
    if one.opcode == "while" and element is not None:
        return _unchanged(module, one, element, stop, depth)
    return _argument(module, computation, one, element, stop, depth) if one.opcode == "parameter" else None


def _argument(
    module: Module, computation: Computation, one: Instruction, element: int | None, stop: tuple, depth: int
) -> _Value | None:
    """A parameter's value, from where its computation is called."""
    if computation in stop:
        return _Value(element, 0) if element is not None else None
    caller = module.callers.get(computation.name)
    if caller is None:
        return None
    if caller.opcode == "while":
        return _unchanged(module, caller, element, stop, depth) if element is not None else None
    if one.parameter_number >= len(caller.operands):
        return None
    operand = caller.operands[one.parameter_number]
    return _value(module, module.computation_of(caller), operand, element, stop, depth + 1)


def _unchanged(module: Module, loop: Instruction, element: int, stop: tuple, depth: int) -> _Value | None:
    """What a loop carries in its element, if no iteration changes it."""
    body = module.computations[loop.called_as("body") or ""]
    if _value(module, body, body.root.name, element, (body,), depth + 1) != _Value(element, 0):
        return None
    return _value(module, module.computation_of(loop), loop.operands[0], element, stop, depth + 1)


def _sum(left: _Value | None, right: _Value | None, *, minus: bool) -> _Value | None:
    if left is None or right is None or (right.carry is not None and (minus or left.carry is not None)):
        return None
    carry = left.carry if left.carry is not None else right.carry
    return _Value(carry, left.offset - right.offset if minus else left.offset + right.offset)
