"""What lies in a device's memory when it is fullest: buffers of a compiled step, live range by live range.

The compiler's own list of buffers does not come with a TPU program, but its schedule does, and the schedule says when
each buffer is made and last read. Values that share a buffer are joined first: what a loop carries, what is updated in
place (the TPU's text says so in `aliasing_operands`), what is only renamed, a donated argument and the output that
overwrites it. Then the sum of what is live is taken at each instruction, loops' bodies inside their loops.

Only the device's own memory counts: not the TPU's vector memory, not the host's. Sizes are with the padding of tiles.
Fragmentation, code and the compiler's scratch are not in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from maxlm.planning.census import origin, part_of
from maxlm.planning.hlo import Computation, Instruction, Module
from maxlm.planning.hlo_loops import branches
from maxlm.planning.hlo_shape import DEVICE, Shape

KINDS = ("parameters", "optimizer", "gradients", "activations", "temporaries")

_RENAMES = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "add-dependency", "parameter")
_ALIASING = re.compile(r'"aliasing_operands":\{"lists":\[((?:\{"indices":\[[^\]]*\]\},?)*)\]')
_OUTPUT_ALIASING = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")


@dataclass(frozen=True)
class Buffer:
    """A piece of memory at the peak. `bytes` with padding, `logical_bytes` without."""

    bytes: int
    logical_bytes: int
    shape: str
    kind: str
    what: str
    source: str


@dataclass(frozen=True)
class Memory:
    """The device's memory when it is fullest. Bytes a device."""

    peak: int
    arguments: int
    """What goes in: held all the time."""
    at: str
    """The instruction at which the peak is reached, by the program's name."""
    by_kind: dict[str, int]
    buffers: list[Buffer] = field(repr=False)
    """All that is live at the peak, largest first."""

    @property
    def temporaries(self) -> int:
        """The peak without the arguments."""
        return self.peak - self.arguments

    @property
    def largest(self) -> list[Buffer]:
        """The ten largest."""
        return self.buffers[:10]


@dataclass(frozen=True)
class OutOfMemory:
    """What a compiler said when a program did not fit. Bytes a device; None where the message does not say."""

    used: int | None
    capacity: int | None
    over: int | None


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)(?:i?B)?"
_USED = (
    rf"Used {_SIZE} of {_SIZE} \w+",
    rf"total memory required for [\w ]+ \({_SIZE}\) exceeds available \w+ \({_SIZE}\)",
)
_OVER = rf"Exceeded \w+ capacity by {_SIZE}"
_ASKED = r"Out of memory (?:while trying to allocate|allocating) (\d+) bytes"


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Reads a compiler's or a runtime's complaint that memory does not suffice; None where it is another error.

    A GPU's compiler does not refuse a program that is too large; there the message is of the allocation that failed
    when it ran.
    """
    if "ut of memory" not in message and "RESOURCE_EXHAUSTED" not in message:
        return None
    used = capacity = None
    for form in _USED:
        if match := re.search(form, message):
            used, capacity = _bytes(match[1], match[2]), _bytes(match[3], match[4])
            break
    if used is None and (asked := re.search(_ASKED, message)):
        used = int(asked[1])
    over = re.search(_OVER, message)
    excess = _bytes(over[1], over[2]) if over else None
    if excess is None and used is not None and capacity is not None:
        excess = used - capacity
    return OutOfMemory(used, capacity, excess)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def peak(module: Module) -> Memory:
    """The fullest moment of a scheduled program, with what is live then."""
    return _Liveness(module).memory()


class _Liveness:
    """Values are numbered leaf by leaf; `parent` joins those that share a buffer."""

    def __init__(self, module: Module):
        self.module = module
        self.parent: list[int] = []
        self.leaf: list[tuple[Instruction, Shape]] = []
        self.first: dict[tuple[str, str], int] = {}
        self.depth: dict[str, int] = {}
        self.shared_is_told = any('"aliasing_operands"' in one.attributes for one in module.entry.instructions)
        self._number(module.entry, 0)
        for name in self.depth:
            for instruction in module.computations[name].instructions:
                self._join(module.computations[name], instruction)
        self._join_donated()
        self._collect()

    # Values

    def _number(self, computation: Computation, depth: int) -> None:
        """Gives numbers to the values of a computation and of those that it runs."""
        if computation.name in self.depth:
            return
        self.depth[computation.name] = depth
        for one in computation.instructions:
            self.first[computation.name, one.name] = len(self.parent)
            for leaf in one.shape.leaves:
                self.parent.append(len(self.parent))
                self.leaf.append((one, leaf))
        for one in computation.instructions:
            for name in self._runs(one):
                self._number(self.module.computations[name], depth + 1)

    @staticmethod
    def _runs(one: Instruction) -> tuple[str, ...]:
        if one.opcode == "while":
            return tuple(name for role in ("body", "condition") if (name := one.called_as(role)))
        if one.opcode == "conditional":
            return branches(one)
        return one.called[:1] if one.opcode == "call" else ()

    def _values(self, one: Instruction) -> range:
        start = self.first[one.computation, one.name]
        return range(start, start + len(one.shape.leaves))

    def _find(self, value: int) -> int:
        while self.parent[value] != value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value

    def _unite(self, these, those) -> None:
        for a, b in zip(these, those, strict=False):
            if self.leaf[a][1].space == self.leaf[b][1].space:
                self.parent[self._find(a)] = self._find(b)

    # Who shares

    def _join(self, computation: Computation, one: Instruction) -> None:
        values = self._values(one)
        operands = [self._values(computation.by_name[name]) for name in one.operands if name in computation.by_name]
        opcode = one.opcode
        together = [value for operand in operands for value in operand]
        if opcode == "get-tuple-element":
            elements = computation.operand(one).shape.elements or ()
            skip = sum(len(element.leaves) for element in elements[: one.tuple_index])
            self._unite(values, operands[0][skip:])
        elif opcode in _RENAMES:
            self._unite(values, together)
        elif opcode.endswith("-start") and one.shape.elements:
            # (result, operand, context) of a copy, (operands, results, ...) of others
            self._unite(values[1:] if opcode == "copy-start" else values, together)
        elif opcode.endswith(("-done", "-update")) and operands:
            self._join_end(computation, one, values, operands[0])
        elif opcode in ("while", "conditional", "call"):
            self._join_called(one, values, operands)
        else:
            self._join_in_place(computation, one, values, operands)

    def _join_end(self, computation: Computation, one: Instruction, values: range, start: range) -> None:
        """What a `-done` gives out: of its `-start`'s (operands, results, ...), or a copy's (result, operand, ...)."""
        elements = computation.operand(one).shape.elements
        if elements is None or len(values) == len(start) or one.opcode.startswith("copy"):
            self._unite(values, start)
        else:
            self._unite(values, start[len(elements[0].leaves) :])

    def _join_called(self, one: Instruction, values: range, operands: list[range]) -> None:
        if one.opcode == "while":
            self._unite(values, operands[0])
        for number, name in enumerate(self._runs(one)):
            called = self.module.computations[name]
            if one.opcode == "call":
                given = operands
            else:
                given = [operands[0 if one.opcode == "while" else number + 1]]
            for parameter, operand in zip(called.parameters, given, strict=False):
                self._unite(self._values(parameter), operand)
            if name != one.called_as("condition"):
                self._unite(self._values(called.root), values)

    def _join_in_place(self, computation: Computation, one: Instruction, values: range, operands: list[range]) -> None:
        every = [*(operand[0] if len(operand) else -1 for operand in operands), *values]
        if lists := _ALIASING.search(one.attributes):
            for group in re.findall(r"\[([^\]]*)", lists[1]):
                same = [every[int(index)] for index in re.findall(r"\d+", group) if int(index) < len(every)]
                self._unite(same[1:], same[:1] * len(same))
        table = one.attribute("output_to_operand_aliasing")
        for output, operand, _ in _OUTPUT_ALIASING.findall(table or ""):
            index = int(output) if output.strip() else 0
            if index < len(values) and int(operand) < len(operands):
                self._unite(values[index : index + 1], operands[int(operand)])
        if one.opcode == "dynamic-update-slice":
            self._unite(values, operands[0])
        elif not self.shared_is_told and one.opcode == "fusion":
            for value, number in self._updated(computation, one):
                self._unite([values[value]], operands[number])

    def _updated(self, computation: Computation, one: Instruction) -> Iterator[tuple[int, int]]:
        """(output, operand) of a fusion that writes a slice into its operand, as a GPU does in place."""
        called = self.module.computations[one.called[0]]
        roots = (
            [called.by_name[name] for name in called.root.operands] if called.root.opcode == "tuple" else [called.root]
        )
        for number, root in enumerate(roots):
            while root.opcode in ("bitcast", "copy", "convert") and root.operands:
                root = called.operand(root)
            if root.opcode != "dynamic-update-slice":
                continue
            target = called.operand(root)
            while target.opcode == "bitcast":
                target = called.operand(target)
            if target.opcode == "parameter":
                source = computation.operand(one, target.parameter_number)
                if len(computation.users[source.name]) == 1:
                    yield number, target.parameter_number

    def _join_donated(self) -> None:
        parameters = self.module.entry.parameters
        outputs = self._values(self.module.entry.root)
        for output, number in self.module.donated.items():
            if output < len(outputs) and number < len(parameters):
                self._unite(outputs[output : output + 1], self._values(parameters[number]))

    # Live ranges

    def _collect(self) -> None:
        """For each buffer: its size, where it belongs (the outermost computation that holds it), from when to when."""
        self.members: dict[int, list[int]] = defaultdict(list)
        for value, (_, shape) in enumerate(self.leaf):
            if shape.space == DEVICE:
                self.members[self._find(value)].append(value)
        self.owner: dict[int, str] = {}
        for root, members in self.members.items():
            self.owner[root] = min((self.leaf[value][0].computation for value in members), key=self.depth.__getitem__)
        self.range: dict[int, tuple[int, int]] = {}
        for name in self.depth:
            computation = self.module.computations[name]
            for one in computation.instructions:
                for value in self._values(one):
                    self._extend(value, name, one.index)
                for operand in dict.fromkeys(one.operands):
                    for value in self._read(computation, one, operand):
                        self._extend(value, name, one.index)
            for value in self._values(computation.root):
                self._extend(value, name, len(computation.instructions))

    def _read(self, computation: Computation, one: Instruction, operand: str) -> range:
        """The values of an operand that an instruction reads: of a tuple, the one that it takes out."""
        values = self._values(computation.by_name[operand])
        if one.opcode != "get-tuple-element":
            return values
        elements = computation.by_name[operand].shape.elements or ()
        skip = sum(len(element.leaves) for element in elements[: one.tuple_index])
        return values[skip : skip + len(one.shape.leaves)]

    def _extend(self, value: int, name: str, index: int) -> None:
        root = self._find(value)
        if self.owner.get(root) != name:
            return
        low, high = self.range.get(root, (index, index))
        self.range[root] = (min(low, index), max(high, index))

    def _size(self, root: int) -> int:
        """A constant lies with the code; of several shapes in one buffer the largest counts."""
        members = self.members[root]
        if all(self.leaf[value][0].opcode in ("constant", *_RENAMES[:-1]) for value in members):
            return 0
        return max(self.leaf[value][1].padded_bytes for value in members)

    # The peak

    def memory(self) -> Memory:
        entry = self.module.entry
        arguments = {self._find(value) for one in entry.parameters for value in self._values(one)}
        arguments &= self.members.keys()
        buffers_of: dict[str, list[int]] = defaultdict(list)
        for root, name in self.owner.items():
            if root not in arguments and root in self.range and self._size(root):
                buffers_of[name].append(root)
        held = sum(self._size(root) for root in arguments)
        inside, live, at = self._peak(entry, buffers_of)
        parameter_dims = _parameter_dims(self.module)
        buffers = [self._buffer(root, parameter_dims) for root in [*arguments, *live]]
        buffers.sort(key=lambda one: -one.bytes)
        by_kind: dict[str, int] = dict.fromkeys(KINDS, 0)
        for one in buffers:
            by_kind[one.kind] += one.bytes
        return Memory(held + inside, held, at.op_name or at.name, by_kind, buffers)

    def _peak(self, computation: Computation, buffers_of: dict[str, list[int]]) -> tuple[int, list[int], Instruction]:
        """(bytes, buffers, instruction) of the fullest moment of one run, of buffers that begin and end in it."""
        n = len(computation.instructions)
        changes = [0] * (n + 2)
        for root in buffers_of[computation.name]:
            low, high = self.range[root]
            changes[low] += self._size(root)
            changes[high + 1] -= self._size(root)
        best: tuple[int, int, list[int], Instruction] = (-1, 0, [], computation.root)
        live = 0
        for one in computation.instructions:
            live += changes[one.index]
            inner: tuple[int, list[int], Instruction] = (0, [], one)
            for name in self._runs(one):
                found = self._peak(self.module.computations[name], buffers_of)
                inner = max(inner, found, key=lambda each: each[0])
            if live + inner[0] > best[0]:
                best = (live + inner[0], one.index, inner[1], inner[2])
        here = [root for root in buffers_of[computation.name] if self.range[root][0] <= best[1] <= self.range[root][1]]
        return best[0], [*here, *best[2]], best[3]

    # What a buffer is

    def _buffer(self, root: int, parameter_dims: set[tuple[int, ...]]) -> Buffer:
        members = self.members[root]
        owner = self.owner[root]
        size = self._size(root)
        here = [value for value in members if self.leaf[value][0].computation == owner]
        made = [value for value in here if self.leaf[value][0].opcode not in _RENAMES[:-1]] or here
        best = max(made, key=lambda value: (self.leaf[value][1].padded_bytes, -value))
        one, shape = self.leaf[best]
        named = next((each for value in made if (each := self.leaf[value][0]).op_name), one)
        kind = self._kind(root, one, shape, parameter_dims)
        what = origin(self.module, named)[0] or one.name
        return Buffer(size, shape.bytes, str(shape), kind, what, self.module.source(named))

    def _kind(self, root: int, one: Instruction, shape: Shape, parameter_dims: set[tuple[int, ...]]) -> str:
        if one.opcode == "parameter" and one.computation == self.module.entry.name:
            name = one.op_name
            if name.startswith("batch"):
                return "activations"
            return "parameters" if ".params" in name else "optimizer"
        made = [self.leaf[value][0] for value in self.members[root]]
        parts = {part_of(self.module, each) for each in made[:40]}
        if _core(shape.dims) in parameter_dims and _is_gradient(made, parts):
            return "gradients"
        forward = parts & {"layers forward", "embedding", "head and loss"}
        carried = self._readers(root) & {"layers backward", "layers recomputed"}
        return "activations" if forward and carried else "temporaries"

    def _readers(self, root: int) -> set[str]:
        """The parts of the step that read a buffer, in the computation that it belongs to."""
        computation = self.module.computations[self.owner[root]]
        parts = set()
        for value in self.members[root]:
            one = self.leaf[value][0]
            if one.computation == computation.name:
                parts |= {part_of(self.module, user) for user in computation.users[one.name]}
        return parts


def _is_gradient(made: list[Instruction], parts: set[str]) -> bool:
    """Of buffers with a parameter's sizes: whether it is not the parameter, gathered or converted."""
    if any(one.opcode.startswith("all-gather") for one in made):
        return False
    products = ("dot_general", "scatter-add", "reduce_scatter", "psum_invariant", "add_any", "mul")
    backward = parts & {"layers backward", "optimizer"} or any("transpose(" in one.op_name for one in made)
    return bool(backward) or ("head and loss" in parts and any(one.op_name.endswith(products) for one in made))


def _parameter_dims(module: Module) -> set[tuple[int, ...]]:
    """Sizes of the parameters: as stored, a layer of them, and gathered (what all-gathers make of these)."""
    stored = [one.shape.dims for one in module.entry.parameters if ".params" in one.op_name]
    found = {_core(dims) for dims in stored} | {_core(dims[1:]) for dims in stored if len(dims) > 2}
    for computation in module.computations.values():
        for one in computation.instructions:
            base = one.opcode.removesuffix("-start")
            if base == "all-gather":
                taken = [leaf for shape in module.operand_shapes(one) for leaf in shape.leaves]
                results = one.shape.leaves[-len(taken) :]
                found |= {_core(b.dims) for a, b in zip(taken, results, strict=False) if _core(a.dims) in found}
    return {dims for dims in found if len(dims) > 1}


def _core(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes without order and ones, which layouts and reshapes change."""
    return tuple(sorted(size for size in dims if size > 1))
