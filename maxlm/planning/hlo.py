"""Compiled HLO as data: what `compiled.as_text()` says, for the TPU's compiler and for the GPU's.

The text is a list of computations. The instructions of the entry and of loop bodies stand in the order in which they
run (`is_scheduled=true`); a fusion calls a computation whose instructions are one kernel together. Read here: names,
shapes, operands, attributes, and the tables that lead from an instruction to the source line that made it. How often
an instruction runs is in `hlo_loops.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from maxlm.planning.hlo_shape import Shape, parse_shape

UNKNOWN_CYCLES = 2**63 - 1
"""What the compiler writes where its cost model has no answer (sparse programs): dropped from every sum."""

HELPERS = ("maxlm/parallel/axes.py", "maxlm/kernels/manual.py")
"""Files whose lines say little of where something comes from: they gather, constrain and exchange for others."""

_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_TUPLE_OPCODE = re.compile(r"\) ([a-z][\w\-]*)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'source_file="([^"]*)"(?:[^}]*?source_line=(\d+))?')
_FRAME = re.compile(r"stack_frame_id=(\d+)")


@dataclass(eq=False)
class Instruction:
    """One line of a computation. `attributes` is what stands behind the operands, unread."""

    name: str
    opcode: str
    shape_text: str
    operand_text: str
    attributes: str
    computation: str
    index: int
    """Its place in its computation, which is the schedule where the module is scheduled."""
    is_root: bool = False

    @cached_property
    def shape(self) -> Shape:
        """Of the result."""
        return parse_shape(self.shape_text)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results go in."""
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        if "%" in self.operand_text:
            return tuple(_NAME.findall(self.operand_text))
        text = re.sub(r"/\*[^*]*\*/", "", self.operand_text)
        return tuple(part.split()[-1] for part in text.split(",") if part.strip())

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in the order of the text."""
        return tuple(name for group in _CALLED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", group))

    def called_as(self, role: str) -> str | None:
        """The computation called as `body`, `condition`, `calls` or `to_apply`."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @cached_property
    def op_name(self) -> str:
        """What the program called it: JAX's path of transformations and primitives. Empty where nobody did."""
        match = _OP_NAME.search(self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution; None where it gives none."""
        match = _CYCLES.search(self.attributes)
        value = int(match[1]) if match else None
        return None if value is None or value >= UNKNOWN_CYCLES else value

    def attribute(self, key: str) -> str | None:
        """The value of `key=value`, with its brackets: `{{0,1},{2,3}}`, `mesh['x'=2,'y'=4] {'x'}`, `LT`."""
        match = re.search(rf"(?:^|[ ,]){re.escape(key)}=", self.attributes)
        return _value(self.attributes, match.end()) if match else None

    @property
    def parameter_number(self) -> int:
        return int(self.operand_text)

    @property
    def tuple_index(self) -> int:
        """Of a get-tuple-element."""
        match = re.search(r"\bindex=(\d+)", self.attributes)
        if not match:
            raise ValueError(f"{self.name} is no get-tuple-element")
        return int(match[1])


@dataclass(eq=False)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    is_entry: bool = False
    thread: str = "main"
    """`main`, or the other processor that it runs on: `sparsecore`, `host`."""
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def instructions(self) -> list[Instruction]:
        return list(self.by_name.values())

    @cached_property
    def root(self) -> Instruction:
        return next((one for one in self.by_name.values() if one.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [one for one in self.by_name.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: one.parameter_number)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes each instruction's result, in order."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.by_name.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    def operand(self, instruction: Instruction, number: int = 0) -> Instruction:
        return self.by_name[instruction.operands[number]]


@dataclass(eq=False)
class Module:
    """A compiled program: its computations, and the tables of source lines."""

    name: str
    header: str
    computations: dict[str, Computation]
    files: dict[int, str] = field(default_factory=dict)
    functions: dict[int, str] = field(default_factory=dict)
    locations: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """File, function and line by the location's number."""
    frames: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Location and parent by the frame's number."""
    trip_counts: dict[Instruction, int | None] = field(default_factory=dict)
    """What `hlo_loops.trip_count` has read."""
    cycles: dict[str, int] = field(default_factory=dict)
    """What `hlo_loops.total_cycles` has summed, by computation."""

    @cached_property
    def entry(self) -> Computation:
        return next(one for one in self.computations.values() if one.is_entry)

    @cached_property
    def callers(self) -> dict[str, Instruction]:
        """The instruction that calls each computation (the first, where several do)."""
        callers: dict[str, Instruction] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions:
                for name in instruction.called:
                    callers.setdefault(name, instruction)
        return callers

    def computation_of(self, instruction: Instruction) -> Computation:
        return self.computations[instruction.computation]

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        by_name = self.computations[instruction.computation].by_name
        return tuple(by_name[name].shape for name in instruction.operands)

    def stack(self, instruction: Instruction) -> list[tuple[str, str, int]]:
        """Where the program made an instruction: (file, function, line), the innermost first. Empty where unknown."""
        match = _FRAME.search(instruction.attributes)
        if match:
            return self._stack(int(match[1]))
        match = _SOURCE.search(instruction.attributes)
        return [(match[1], "", int(match[2] or 0))] if match else []

    def _stack(self, frame: int) -> list[tuple[str, str, int]]:
        # A parent comes before its child, so the first frame has none; some versions write "none" as 1, not as 0.
        none = self.frames.get(1, (0, 0))[1]
        found = []
        while frame in self.frames:
            location, parent = self.frames[frame]
            frame = parent - none
            file, function, line = self.locations.get(location, (0, 0, 0))
            found.append((self.files.get(file, ""), self.functions.get(function, ""), line))
        return found

    def source(self, instruction: Instruction) -> str:
        """`maxlm/models/block.py:48`: the innermost line of maxlm, else of any file; empty where unknown.

        Lines that only carry out what another asked for (`HELPERS`) give way to the one that did.
        """
        stack = self.stack(instruction)
        ours = [
            f"maxlm/{file.rpartition('maxlm/')[2]}:{line}"
            for file, _, line in stack
            if "/site-packages/" not in file and "maxlm/" in file
        ]
        if ours:
            return next((line for line in ours if not line.startswith(HELPERS)), ours[0])
        return f"{stack[0][0].rpartition('/site-packages/')[2]}:{stack[0][2]}" if stack else ""

    @cached_property
    def donated(self) -> dict[int, int]:
        """Parameter number by index of the output that overwrites it (`input_output_alias`)."""
        table = self.header.partition("input_output_alias={")[2].partition(" }")[0]
        return {int(out or 0): int(number) for out, number in re.findall(r"\{([\d]*)\}: \((\d+), \{\}", table)}

    @property
    def n_partitions(self) -> int:
        match = re.search(r"num_partitions=(\d+)", self.header)
        return int(match[1]) if match else 1


def parse(text: str) -> Module:
    """The module that a text of HLO says. Raises ValueError where it has no entry computation."""
    lines = text.split("\n")
    header = next((line for line in lines if line.startswith("HloModule")), "")
    module = Module(header.removeprefix("HloModule ").split(",")[0].strip(), header, {})
    current: Computation | None = None
    table: str | None = None
    for line in _joined(lines):
        if current is not None:
            if line.startswith("}"):
                match = re.search(r'execution_thread="([^"]*)"', line)
                current.thread = match[1] if match else "main"
                current = None
            else:
                _add_instruction(current, line)
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif line[:1].isdigit() and table:
            _add_row(module, table, line)
        elif match := _HEADER.match(line):
            current = Computation(match[2], is_entry=bool(match[1]))
            module.computations[current.name] = current
    if not any(one.is_entry for one in module.computations.values()):
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return module


def _joined(lines: list[str]) -> Iterator[str]:
    """The lines, an instruction on one: a kernel's metadata in JSON is printed over several."""
    inside = False
    held: str | None = None
    for line in lines:
        if not inside:
            inside = line.endswith("{") and not line.startswith("HloModule")
            yield line
        elif line == "}" or line.startswith("}, execution_thread"):
            if held is not None:
                yield held
            held, inside = None, False
            yield line
        elif held is None or _INSTRUCTION.match(line):
            if held is not None:
                yield held
            held = line
        else:
            held += line


def _add_instruction(computation: Computation, line: str) -> None:
    match = _INSTRUCTION.match(line)
    if not match:
        return
    start = match.end()
    if line.startswith("(", start):
        opcode = _TUPLE_OPCODE.search(line, start)
        end_of_shape = opcode.start() + 1 if opcode else start
    else:
        end_of_shape = line.index(" ", start)
        opcode = _OPCODE.match(line, end_of_shape)
    if not opcode:
        raise ValueError(f"not an instruction of HLO: {line.strip()[:120]!r}")
    close = _closing(line, opcode.end())
    name = match[2]
    computation.by_name[name] = Instruction(
        name=name,
        opcode=opcode[1],
        shape_text=line[start:end_of_shape],
        operand_text=line[opcode.end() : close],
        attributes=line[close + 2 :].lstrip(),
        computation=computation.name,
        index=len(computation.by_name),
        is_root=bool(match[1]),
    )


def _closing(line: str, start: int) -> int:
    """Where the bracket closes that was opened before `start`."""
    close = line.index(")", start)
    depth = line.count("(", start, close)
    while depth:
        following = line.index(")", close + 1)
        depth += line.count("(", close + 1, following) - 1
        close = following
    return close


def _value(text: str, start: int) -> str:
    """The value that begins at `start`: up to the comma that is in no bracket."""
    depth = 0
    for position in range(start, len(text)):
        letter = text[position]
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0 and not text.startswith(", device_ids=", position):
            return text[start:position]
    return text[start:]


def _add_row(module: Module, table: str, line: str) -> None:
    number, _, rest = line.partition(" ")
    if table in ("FileNames", "FunctionNames"):
        (module.files if table == "FileNames" else module.functions)[int(number)] = rest.strip('"')
        return
    values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", rest)}
    if table == "FileLocations":
        module.locations[int(number)] = (
            values.get("file_name_id", 0),
            values.get("function_name_id", 0),
            values.get("line", 0),
        )
    else:
        module.frames[int(number)] = (values.get("file_location_id", 0), values.get("parent_frame_id", 0))
