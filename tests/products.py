"""FLOPs of a program's matrix products, read from its text."""

from __future__ import annotations

import math
import re

from maxlm.planning.hlo import parse
from maxlm.planning.hlo_loops import executions


def flops_of_products(program: str) -> int:
    """Of all matrix products of a step's HLO, as the compiler is given it, loops multiplied out."""
    # On a mesh of one device, placing an array does nothing.
    module = parse(re.sub(r'custom-call\((.*?)\), custom_call_target="Sharding"', r"copy(\1)", program))
    total = 0
    for run in executions(module):
        if run.instruction.opcode == "dot":
            left, _ = module.operand_shapes(run.instruction)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", run.instruction.attributes)
            over = math.prod(left.dims[int(axis)] for axis in contracted[1].split(","))
            total += run.times * 2 * math.prod(run.instruction.shape.dims) * over
    return total
