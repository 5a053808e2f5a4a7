"""The final schedule of a TPU kernel, read from the compiler's dump: loops, branches, units. Text in, dataclasses out.

A TensorCore executes one bundle a cycle unless it stalls, so counting bundles counts cycles: *static* cycles, in which
no DMA, no HBM and no stall appears. Two files of a kernel are read, as libtpu 0.0.42.1 writes them. `final_bundles.txt`
has a line a bundle, with as many `>` as loops around it and marks at loops (`LB`) and at the places where branches land
(`PF`). `final_hlo-static-per-bundle-utilization.txt` has a row a bundle: the slots of each unit that it fills.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")
"""Columns of vector registers brought back and put away for want of registers: part of VLOAD and VSTORE."""

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(L[HBE]|P[BF]|CT)?\s*:\s*(>*)\s*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(r"(%\w+) = ([\w.]+)\s*(.*)", re.DOTALL)
_BRANCH = re.compile(r"sbr\.rel \(!?(%\w+)\) target = \$region(\d+)")
_SPILL_SLOT = re.compile(r"#allocation\d+_spill")


@dataclass(frozen=True)
class Branch:
    """Bundles that a forward branch skips where its condition says so, its own delay slots among them."""

    first: int
    last: int

    @property
    def bundles(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Loop:
    """A loop of the kernel. Bundles are numbered from 0 in the order of the file."""

    depth: int
    """1 for a loop in no other."""
    first: int
    last: int
    iterations: int | None
    """Of one run of the loop; None where its bounds are not constants."""
    parent: int | None
    """Index of the loop around it."""


@dataclass(frozen=True)
class Schedule:
    """A kernel's bundles: loops from the outside in, and what each bundle fills of each unit."""

    loops: tuple[Loop, ...]
    branches: tuple[Branch, ...]
    units: dict[str, int]
    """Slots of a bundle by unit."""
    rows: tuple[tuple[int, ...], ...]
    """Filled slots of each bundle, in the order of `units`."""

    @property
    def n_bundles(self) -> int:
        return len(self.rows)

    def own(self, loop: int | None) -> list[int]:
        """The bundles of a loop (None: of no loop) that are in no loop inside it."""
        return [bundle for bundle, around in enumerate(self._innermost) if around == loop]

    def executions(self, loop: int | None) -> int | None:
        """How often a bundle of the loop runs in all, if no branch skips it; None where a bound is not known."""
        around = self._around(loop)
        return None if None in around else math.prod(n for n in around if n is not None)

    @property
    def static_cycles(self) -> int:
        """Bundles times how often they run, every branch taken as if it skipped nothing.

        A loop whose bounds are not known counts as one iteration: see `complete`.
        """
        loops: list[int | None] = [None, *range(len(self.loops))]
        return sum(len(self.own(loop)) * math.prod(n or 1 for n in self._around(loop)) for loop in loops)

    @property
    def complete(self) -> bool:
        """Whether the number of iterations of every loop is known."""
        return all(loop.iterations is not None for loop in self.loops)

    def skippable(self, loop: int | None) -> list[Branch]:
        """The innermost branches among a loop's own bundles: what may be skipped, piece by piece."""
        own = set(self.own(loop))
        inside = [branch for branch in self.branches if branch.first in own and branch.last in own]
        return [
            branch
            for branch in inside
            if not any(other != branch and branch.first <= other.first <= branch.last for other in inside)
        ]

    def filled(self, unit: str, loop: int | None) -> int:
        """Slots of a unit that the loop's own bundles fill in one iteration."""
        column = list(self.units).index(unit)
        return sum(self.rows[bundle][column] for bundle in self.own(loop))

    def utilisation(self, unit: str, loop: int | None) -> float:
        """The share of the unit's slots that the loop's own bundles fill."""
        slots = len(self.own(loop)) * self.units[unit]
        return self.filled(unit, loop) / slots if slots else 0.0

    def _around(self, loop: int | None) -> list[int | None]:
        """The iterations of a loop and of those around it."""
        found = []
        while loop is not None:
            found.append(self.loops[loop].iterations)
            loop = self.loops[loop].parent
        return found

    @cached_property
    def _innermost(self) -> list[int | None]:
        around: list[int | None] = [None] * self.n_bundles
        for index, loop in enumerate(self.loops):  # from the outside in: the last that covers a bundle stays
            around[loop.first : loop.last + 1] = [index] * (loop.last + 1 - loop.first)
        return around


@dataclass(frozen=True)
class _Bundle:
    mark: str
    depth: int
    text: str


def parse_schedule(bundles: str, utilisation: str) -> Schedule:
    """The schedule of a kernel, from the texts of its two files. Raises ValueError where they are not of one kernel."""
    lines = _bundles(bundles)
    units, rows = _utilisation(utilisation)
    if len(lines) != len(rows):
        raise ValueError(f"{len(lines)} bundles with utilisation of {len(rows)}: not of one kernel, or a new format")
    branches = [
        (place, match[1], int(match[2])) for place, line in enumerate(lines) for match in _BRANCH.finditer(line.text)
    ]
    loops = _loops(lines, branches)
    landings = {
        int(region): place
        for place, line in enumerate(lines)
        if line.mark == "PF"
        for region in re.findall(r"Start/End empty region (\d+)", line.text)
    }
    forward = [
        Branch(place + 1, landings[region] - 1)
        for place, _, region in branches
        if region in landings and landings[region] > place + 1
    ]
    return Schedule(loops, tuple(forward), units, rows)


def _bundles(text: str) -> list[_Bundle]:
    """A bundle with comments on several lines has them all."""
    matches = list(_BUNDLE.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    for place, match in enumerate(matches):
        if int(match[1], 16) != place:
            raise ValueError(f"bundle {match[1]} where {place:#x} was expected: not a file of final bundles")
    return [
        _Bundle(match[2] or "", len(match[3]), text[match.end() : end])
        for match, end in zip(matches, ends, strict=True)
    ]


def _utilisation(text: str) -> tuple[dict[str, int], tuple[tuple[int, ...], ...]]:
    lines = [line for line in text.splitlines() if line.strip()]
    titles = [place for place, line in enumerate(lines) if line.startswith("==")]
    if len(titles) != 2 or titles[1] != titles[0] + 3:
        raise ValueError("not a file of utilisation by bundle: no table of capacities, then one of utilisation")
    names = [name.strip() for name in lines[titles[0] + 1].split(",")]
    capacities = [int(number) for number in lines[titles[0] + 2].split()]
    units = dict(zip(names, capacities, strict=True))
    return units, tuple(tuple(map(int, line.split())) for line in lines[titles[1] + 1 :])


def _loops(lines: list[_Bundle], branches: list[tuple[int, str, int]]) -> tuple[Loop, ...]:
    """Loops in the order of the file, which is from the outside in.

    The scheduler fills an inner loop's gaps with bundles of the outer one, so that the end of a loop is not where `>`
    becomes fewer but the last bundle that has as many, before another loop of that depth begins.
    """
    bodies = [place for place, line in enumerate(lines) if line.mark == "LB"]
    definitions = _definitions(lines)
    loops: list[Loop] = []
    for number, first in enumerate(bodies):
        depth = lines[first].depth
        until = next((other for other in bodies[number + 1 :] if lines[other].depth <= depth), len(lines))
        last = max(place for place in range(first, until) if lines[place].depth >= depth)
        regions = {int(region) for region in re.findall(r"Start region (\d+)", lines[first].text)}
        # The branch back is the one whose target begins at the loop's first bundle.
        back = [(place, condition) for place, condition, region in branches if region in regions and place > first]
        iterations = _iterations(back[-1][1], definitions) if back else None
        last = max(last, back[-1][0]) if back else last
        around = [index for index, loop in enumerate(loops) if loop.first <= first and last <= loop.last]
        loops.append(Loop(depth, first, last, iterations, around[-1] if around else None))
    return tuple(loops)


def _definitions(lines: list[_Bundle]) -> dict[str, tuple[str, list[str]]]:
    """Scalars and predicates by name: the operation, and its operands as words. Spill slots under their own names."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in lines:
        for statement in _COMMENT.sub("", line.text).split(";;"):
            match = _STATEMENT.search(statement)
            if match is None:
                continue
            name, operation, rest = match.groups()
            operands = re.sub(r"\(!?%\w+\),?", "", rest)  # a predicate: what it guards is the only definition
            if operation in ("sst", "sld") and (slot := _SPILL_SLOT.search(operands)):
                if operation == "sst":
                    found[slot[0]] = ("sst", re.findall(r"%\w+", operands))
                else:
                    found[name] = ("sld", [slot[0]])
            elif name.startswith(("%s", "%p")):
                found[name] = (operation, re.findall(r"%\w+|-?\b\d+\b", operands))
    return found


def _iterations(condition: str, definitions: dict[str, tuple[str, list[str]]]) -> int | None:
    """How often a loop runs that ends when its counter, raised at the end of the body, reaches a constant."""
    operation, operands = _definition(condition, definitions)
    if not operation.startswith("scmp.ge.s32") or len(operands) != 2 or not operands[1].isdigit():
        return None
    limit, next_name = int(operands[1]), operands[0]
    operation, operands = _definition(next_name, definitions)
    if operation != "sadd.s32" or len(operands) != 2:
        return None
    steps = [int(word) for word in operands if word.isdigit()]
    counters = [word for word in operands if word.startswith("%")]
    if len(steps) != 1 or steps[0] < 1 or len(counters) != 1:
        return None
    operation, operands = _definition(counters[0], definitions)
    if operation != "sphi" or len(operands) != 2:
        return None
    operation, start = _definition(operands[0], definitions)
    if operation != "smov" or len(start) != 1 or not start[0].isdigit():
        return None
    return max(1, -(-(limit - int(start[0])) // steps[0]))


def _definition(name: str, definitions: dict[str, tuple[str, list[str]]]) -> tuple[str, list[str]]:
    """What makes a value, followed through copies and through the memory where it was spilled."""
    for _ in range(len(definitions)):
        operation, operands = definitions.get(name, ("", []))
        copied = operation in ("sld", "sst", "smov") and len(operands) == 1 and not operands[0].isdigit()
        if not copied:
            return operation, operands
        name = operands[0]
    return "", []
