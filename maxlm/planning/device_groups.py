"""Which devices talk to each other in a collective, and which mesh axes that is.

XLA writes groups of devices in three ways: as lists `{{0,1},{2,3}}`, as a reshaped and transposed count
`[4,2]<=[2,4]T(1,0)` (xla/hlo/ir/tile_assignment.h), or by a mesh of its own, which is not the program's:
`mesh['axis_0'=4,'axis_1'=2] {'axis_1'}` (xla/hlo/ir/mesh_and_axis.h). The numbers are partitions, counted along the
devices of the program's mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

import numpy as np

MIXED = ("mixed",)
"""The axes of groups that are no product of mesh axes."""

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_COUNTED = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, ?device_ids=\((.*)\))?\s*\{([^}]*)\}$")


def parse_groups(text: str, n_devices: int) -> np.ndarray | list[list[int]]:
    """The groups `[groups, members]` of a `replica_groups=` text, as a list of lists where their sizes differ.

    No groups at all (`{}`) is one of all devices. Raises ValueError where the text is none of the three forms.
    """
    text = text.strip()
    if text in ("{}", "{{}}"):
        return np.arange(n_devices)[None]
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if _IOTA.fullmatch(text):
        groups = _iota(text)
        return groups.reshape(groups.shape[0], -1)
    if re.fullmatch(r"\{\s*\{[\d,\s{}]*\}\s*\}", text):
        lists = [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", text)]
        return np.array(lists) if len({len(group) for group in lists}) == 1 else lists
    raise ValueError(f"not groups of devices: {text[:120]!r}")


def _iota(text: str) -> np.ndarray:
    """`[a,b]<=[c,d]T(1,0)`: count up, shape as [c,d], transpose, shape as [a,b]."""
    match = _IOTA.search(text)
    if not match:
        raise ValueError(f"not a count of devices: {text[:120]!r}")
    shape, source = _ints(match[1]), _ints(match[2])
    counted = np.arange(math.prod(source)).reshape(source)
    return (counted.transpose(_ints(match[3])) if match[3] else counted).reshape(shape)


def _mesh_groups(text: str) -> np.ndarray:
    match = _MESH.match(text)
    if not match:
        raise ValueError(f"not groups of devices: {text[:120]!r}")
    sizes = {name.strip(" '\""): int(size) for name, size in (part.split("=") for part in match[1].split(","))}
    ids = np.arange(math.prod(sizes.values()))
    if match[2] and (counted := _COUNTED.fullmatch(match[2])):  # [2,8]T(1,0): the mesh's own sizes on the left left out
        shape = _ints(counted[1])
        ids = ids.reshape(shape).transpose(_ints(counted[2]))
    elif match[2]:
        ids = np.array(_ints(re.sub(r"[^\d,]", "", match[2])))
    # Axes may be cut: 'a':(2)4 is the part of size 4 of axis a that has parts of size 2 before it.
    wanted: list[tuple[str, int, int]] = []
    for part in (part.strip(" '\"") for part in match[3].split(",") if part.strip()):
        name, _, cut = part.partition(":")
        name = name.strip(" '\"")
        before, size = re.fullmatch(r"\((\d+)\)(\d+)", cut).groups() if cut else (1, sizes[name])  # pyright: ignore
        wanted.append((name, int(before), int(size)))
    cut_shape: list[int] = []
    place: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        edges = {1, size}
        for other, before, part in wanted:
            if other == name:
                edges |= {before, before * part}
        edges = sorted(edges)
        for low, high in pairwise(edges):
            place[name, low] = len(cut_shape)
            cut_shape.append(high // low)
        place.setdefault((name, 1), -1)  # an axis of size 1 has no dimension
    inside = [place[name, before] for name, before, _ in wanted if place[name, before] >= 0]
    outside = [axis for axis in range(len(cut_shape)) if axis not in inside]
    members = math.prod(cut_shape[axis] for axis in inside)
    return ids.reshape(cut_shape).transpose(outside + inside).reshape(-1, members)


def axes_of_groups(text: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective with these groups goes over, in the mesh's order.

    Args:
        text: what stands behind `replica_groups=`.
        sizes: the mesh's axes and their sizes, in its order.

    Returns:
        () where each device is alone, `MIXED` where the groups are no product of mesh axes.
    """
    return _axes_of_groups(text, tuple(sizes.items()))


@lru_cache(maxsize=4096)
def _axes_of_groups(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    names, shape = [name for name, _ in sizes], [size for _, size in sizes]
    n_devices = math.prod(shape)
    groups = parse_groups(text, n_devices)
    if isinstance(groups, list) or groups.size != n_devices:
        return MIXED
    coordinates = np.stack(np.unravel_index(groups, shape), axis=-1)
    varies = np.any(coordinates[0] != coordinates[0, :1], axis=0)
    inside = [axis for axis in range(len(shape)) if varies[axis]]
    if groups.shape[1] != math.prod(shape[axis] for axis in inside):
        return MIXED
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    expected = np.arange(n_devices).reshape(shape).transpose(outside + inside).reshape(groups.shape)
    if _rows(expected) != _rows(groups):
        return MIXED
    return tuple(names[axis] for axis in inside)


def _rows(groups: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.sort(groups, axis=1).tolist()))


def axes_of_pairs(text: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective-permute (`source_target_pairs={{0,1},{1,2}}`) sends.

    One axis where every pair differs in it alone; `MIXED` where pairs go along different axes. A pair that sends to
    itself says nothing.
    """
    shape = list(sizes.values())
    pairs = np.array([[int(one) for one in pair] for pair in re.findall(r"\{(\d+),\s*(\d+)\}", text)]).reshape(-1, 2)
    coordinates = np.stack(np.unravel_index(pairs, shape), axis=-1)
    differs = coordinates[:, 0] != coordinates[:, 1]
    differs = differs[differs.any(axis=1)]
    if not len(differs):
        return ()
    if (differs != differs[0]).any():
        return MIXED
    return tuple(name for name, changed in zip(sizes, differs[0], strict=True) if changed)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(",") if one)
