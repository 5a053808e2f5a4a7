"""Shapes of compiled HLO: how many bytes an array has, and how many the compiler sets aside for it.

The text of a shape is `bf16[2,8192,4096]{2,1,0:T(8,128)(2,1)S(1)}`: type, sizes, then the layout: which dimension is
the fastest, the next ..., the tiles that the array is cut into, and the memory that it lies in. A tile is never cut, so
a TPU array takes up whole tiles: `f32[2,4096]{1,0:T(8,128)}` has 8 rows in memory. The notation is that of XLA's
`Shape::ToString` (xla/shape.cc) and xla/layout.cc.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

BITS: dict[str, int] = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **{"f4e2m1fn": 4, "f8e8m0fnu": 8, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3fnuz": 8},
    **{"f8e4m3b11fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8},
}
"""Bits of an element, by XLA's name of the type (xla/xla_data.proto, PrimitiveType). A predicate takes a byte."""

DEVICE, VMEM, HOST = 0, 1, 5
"""Memory spaces: S(0) or none is the device's own memory, S(1) the TPU's vector memory, S(5) the host's."""

_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_LAYOUT_FIELD = re.compile(r"([A-Z]+)((?:\([^)]*\))+)")
_COMMENT = re.compile(r"/\*[^*]*\*/")


@dataclass(frozen=True)
class Shape:
    """The shape of an array, or of a tuple (`elements`), with its layout.

    Two shapes are equal when type, sizes and layout are.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] | None = None
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = DEVICE
    element_bits: int | None = None
    """Bits of an element in memory where the layout says so (`E(4)`)."""
    elements: tuple[Shape, ...] | None = None

    @property
    def is_tuple(self) -> bool:
        return self.elements is not None

    @cached_property
    def leaves(self) -> tuple[Shape, ...]:
        """The arrays of a tuple, those of nested tuples too, in order; the shape itself where it is an array."""
        return tuple(self._leaves())

    def _leaves(self) -> Iterator[Shape]:
        if self.elements is None:
            yield self
        else:
            for element in self.elements:
                yield from element._leaves()

    @cached_property
    def bytes(self) -> int:
        """What the elements take, without padding: of a tuple, of all its arrays."""
        if self.elements is not None:
            return sum(element.bytes for element in self.elements)
        return -(-math.prod(self.dims) * BITS[self.dtype] // 8)

    @cached_property
    def padded_bytes(self) -> int:
        """What the compiler sets aside: whole tiles. The same as `bytes` without tiles."""
        if self.elements is not None:
            return sum(element.padded_bytes for element in self.elements)
        bits = self.element_bits or max(BITS[self.dtype], 8 if BITS[self.dtype] else 0)
        return -(-math.prod(self._tiled_dims()) * bits // 8)

    def _tiled_dims(self) -> list[int]:
        """Sizes in memory, slowest first: each tile cuts the fastest dimensions that the one before left."""
        order = self.minor_to_major if self.minor_to_major is not None else tuple(reversed(range(len(self.dims))))
        dims = [self.dims[axis] for axis in reversed(order)]
        for tile in self.tiles:
            dims = [1] * (len(tile) - len(dims)) + dims
            outer, cut = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
            if 0 in cut:
                return [0]
            dims = [*outer, *(-(-size // side) for size, side in zip(cut, tile, strict=True)), *tile]
        return dims

    def __str__(self) -> str:
        if self.elements is not None:
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@lru_cache(maxsize=65536)
def parse_shape(text: str) -> Shape:
    """The shape that a text says, of an array or of a tuple. Raises ValueError where it is none."""
    text = text.strip()
    if text.startswith("("):
        parts = _split(_COMMENT.sub("", text)[1:-1])
        return Shape("tuple", elements=tuple(parse_shape(part) for part in parts))
    match = _ARRAY.fullmatch(text)
    if not match or match[1] not in BITS:
        raise ValueError(f"not a shape: {text[:100]!r}")
    # A dynamic size is written "<=1024", and is at most that.
    dims = tuple(int(size.strip().removeprefix("<=")) for size in match[2].split(",") if size.strip())
    order, tiles, space, bits = _layout(match[3] or "")
    return Shape(match[1], dims, order, tiles, space, bits)


def _layout(text: str) -> tuple[tuple[int, ...] | None, tuple[tuple[int, ...], ...], int, int | None]:
    """(minor_to_major, tiles, memory space, bits of an element) of what stands in a layout's braces."""
    order, _, rest = text.partition(":")
    minor_to_major = tuple(int(axis) for axis in order.split(",")) if order.strip() else None
    fields: dict[str, str] = dict(_LAYOUT_FIELD.findall(rest))
    tiles = tuple(
        # "*" joins a dimension with the next faster one, which the compilers here do not use for what they allocate.
        tuple(1 if side.strip() == "*" else int(side) for side in tile.split(","))
        for tile in re.findall(r"\(([^)]*)\)", fields.get("T", ""))
    )
    space = int(fields["S"].strip("()")) if "S" in fields else DEVICE
    bits = int(fields["E"].strip("()")) if "E" in fields else None
    return minor_to_major, tiles, space, bits


def _split(text: str) -> list[str]:
    """The parts of a list at its commas, those inside brackets left alone."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if text[start:].strip():
        parts.append(text[start:])
    return parts
