"""Which physical network each mesh axis crosses, and how long a collective over some of them takes.

Formulas are those of the scaling book (jax-ml.github.io/scaling-book, "Sharded Matrices and How to Multiply Them"): a
gather is bound by what one device receives over the links of the axes it uses. Mesh axes are laid on the torus as
`jax.experimental.mesh_utils.create_device_mesh` lays them, which is what `parallel/mesh.py` calls; slices, or hosts of
GPUs, are joined by the data-center network (DCN), and a collective over both is done in two stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from maxlm.errors import ConfigError
from maxlm.parallel.mesh import AXES, axis_over_slices
from maxlm.planning.topology import Topology

# What collectives reach of the links' rates. TPU: the scaling book's table ("How to Think About TPUs") has 4.5e10 of
# the v5e's 50 GB/s a link and direction, 9e10 of the v5p's and v6e's 100. NVLink: about 370 of an H100's 450 GB/s (same
# book, "How to Think About GPUs"). DCN rates of the pages are taken as they are.
ICI_EFFICIENCY = 0.9
NVLINK_EFFICIENCY = 0.82

# Seconds for a hop, however little is sent: 1 us on ICI (the scaling book); NVLink and DCN by order of magnitude.
HOP_SECONDS = {"ici": 1e-6, "nvlink": 2e-6, "dcn": 1e-5}

# The two dies of a tpu7x chip are joined six times as fast as a link of ICI (docs.cloud.google.com/tpu/docs/tpu7x).
DIE_LINKS = 6

KINDS = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "padded all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "all-gather",
}


@dataclass(frozen=True)
class Network:
    """What a mesh axis crosses."""

    kind: str
    """`ici`, `nvlink`, `dcn`, or `mixed`: DCN and one of the others."""
    bytes_per_s: float
    """What one device can send along it, over all links that it may use (wraparound counted); of a mixed one, what a
    gather over both stages reaches."""
    n: int

    def to_dict(self) -> dict[str, str | float | int]:
        return {"kind": self.kind, "bytes_per_s": self.bytes_per_s, "n": self.n}


@dataclass(frozen=True)
class Cost:
    """Bytes that a device receives and the time that they take, on the inner network (ICI, NVLink) and on DCN."""

    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0
    ici_seconds: float = 0.0
    dcn_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.ici_bytes + other.ici_bytes,
            self.dcn_bytes + other.dcn_bytes,
            self.ici_seconds + other.ici_seconds,
            self.dcn_seconds + other.dcn_seconds,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.ici_bytes * times, self.dcn_bytes * times, self.ici_seconds * times, self.dcn_seconds * times)

    @property
    def seconds(self) -> float:
        """Both stages, one after the other."""
        return self.ici_seconds + self.dcn_seconds


@dataclass(frozen=True)
class _Piece:
    """What a group of devices has of one physical axis: `n` of them, and what one sends along it."""

    kind: str
    n: int
    bytes_per_s: float
    ring: bool = False
    switched: bool = False


def network_of(sizes: Mapping[str, int], topology: Topology) -> dict[str, Network]:
    """The network of every mesh axis that has more than one device.

    Raises ConfigError for sizes that do not multiply to the topology's devices, or that no axis spreads over slices.
    """
    _assign(_key(sizes), topology)
    return {axis: _network(axis, sizes, topology) for axis in AXES if sizes.get(axis, 1) > 1}


def collective_seconds(
    kind: str, bytes_: float, axes: Sequence[str], sizes: Mapping[str, int], topology: Topology
) -> float:
    """Seconds of one collective over some mesh axes, nothing else on the links.

    Args:
        kind: XLA's opcode, or the census's `all-reduce-scatter` and `padded all-reduce`.
        bytes_: of the whole result for an all-gather, else of the operand; on one device.
        axes: mesh axes; those of one device count nothing, and none at all take no time.

    Raises ValueError for an unknown kind, ConfigError as `network_of`.
    """
    return collective_cost(kind, bytes_, axes, sizes, topology).seconds


def collective_cost(
    kind: str, bytes_: float, axes: Sequence[str], sizes: Mapping[str, int], topology: Topology
) -> Cost:
    """The same with both networks apart."""
    if kind not in KINDS:
        raise ValueError(f"collective kind {kind!r} is not one of {', '.join(KINDS)}")
    return _cost(KINDS[kind], bytes_, *_pieces(tuple(axes), _key(sizes), topology))


def cost_between_slices(kind: str, bytes_: float, topology: Topology) -> Cost:
    """The same of a transfer between slices alone, by every device with those that stand where it does."""
    return _cost(KINDS[kind], bytes_, (), _Piece("dcn", topology.slices, _dcn_rate(topology), switched=True))


def _cost(kind: str, bytes_: float, inner: tuple[_Piece, ...], slices: _Piece | None) -> Cost:
    if kind == "all-reduce":
        half = _gather_cost(bytes_, inner, slices)
        return half + half
    if kind in ("all-gather", "reduce-scatter"):
        return _gather_cost(bytes_, inner, slices)
    return (_exchange_cost if kind == "all-to-all" else _permute_cost)(bytes_, inner, slices)


def _gather_cost(whole: float, inner: tuple[_Piece, ...], slices: _Piece | None) -> Cost:
    """An all-gather of `whole` bytes, or a reduce-scatter of as many: first over DCN, where each device fetches only
    its own piece's counterparts, then inside."""
    m = math.prod(piece.n for piece in inner)
    dcn_bytes = dcn_seconds = 0.0
    if slices:
        dcn_bytes = whole / m * (slices.n - 1) / slices.n
        dcn_seconds = max(dcn_bytes / slices.bytes_per_s, HOP_SECONDS["dcn"])
    if m == 1:
        return Cost(0.0, dcn_bytes, 0.0, dcn_seconds)
    ici_bytes = whole * (m - 1) / m
    seconds = max(ici_bytes / sum(piece.bytes_per_s for piece in inner), sum(map(_latency, inner)))
    return Cost(ici_bytes, dcn_bytes, seconds, dcn_seconds)


def _exchange_cost(operand: float, inner: tuple[_Piece, ...], slices: _Piece | None) -> Cost:
    """An all-to-all. On a ring of n the middle link carries n / 8 operands each way: n operand / (4 x both links)."""
    cost = Cost()
    if slices:
        moved = operand * (slices.n - 1) / slices.n
        cost += Cost(dcn_bytes=moved, dcn_seconds=max(moved / slices.bytes_per_s, HOP_SECONDS["dcn"]))
    m = math.prod(piece.n for piece in inner)
    if m > 1:
        seconds = max(
            operand * ((piece.n - 1) / piece.n if piece.switched else piece.n / 4) / piece.bytes_per_s
            for piece in inner
        )
        cost += Cost(ici_bytes=operand * (m - 1) / m, ici_seconds=max(seconds, sum(map(_latency, inner))))
    return cost


def _permute_cost(operand: float, inner: tuple[_Piece, ...], slices: _Piece | None) -> Cost:
    """Each device to one other: over one link of the torus, one way."""
    if inner:
        rate = max(piece.bytes_per_s / (2 if piece.ring else 1) for piece in inner)
        return Cost(ici_bytes=operand, ici_seconds=max(operand / rate, HOP_SECONDS[inner[0].kind]))
    if slices:
        return Cost(dcn_bytes=operand, dcn_seconds=max(operand / slices.bytes_per_s, HOP_SECONDS["dcn"]))
    return Cost()


def _latency(piece: _Piece) -> float:
    hops = 1 if piece.switched else piece.n // 2 if piece.ring else piece.n - 1
    return hops * HOP_SECONDS[piece.kind]


def _network(axis: str, sizes: Mapping[str, int], topology: Topology) -> Network:
    inner, slices = _pieces((axis,), _key(sizes), topology)
    if slices is None:
        return Network(inner[0].kind, sum(piece.bytes_per_s for piece in inner), sizes[axis])
    if not inner:
        return Network("dcn", slices.bytes_per_s, sizes[axis])
    whole = 1e12  # large enough that no latency counts
    return Network("mixed", whole * (1 - 1 / sizes[axis]) / _gather_cost(whole, inner, slices).seconds, sizes[axis])


def _key(sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(axis, 1) for axis in AXES)


@cache
def _pieces(
    axes: tuple[str, ...], sizes: tuple[int, ...], topology: Topology
) -> tuple[tuple[_Piece, ...], _Piece | None]:
    """What the group of devices along some mesh axes has of each inner physical axis, and of the network outside."""
    assignment, outer = _assign(sizes, topology)
    chosen = [AXES.index(axis) for axis in dict.fromkeys(axes)]
    n_outer = math.prod(outer[i] for i in chosen)
    shares = [math.prod(row[i] for i in chosen) for row in assignment]
    inner = tuple(_torus(shares, topology)) if topology.is_tpu else tuple(_switched(shares, topology))
    if n_outer == 1:
        return inner, None
    return inner, _Piece("dcn", n_outer, _dcn_rate(topology), switched=True)


def _dcn_rate(topology: Topology) -> float:
    rate = topology.dcn_bytes_per_s_per_device
    if rate is None:
        raise ConfigError(f"the network between slices of {topology.chip.name} is not published")
    return rate


def _torus(shares: Sequence[int], topology: Topology) -> Iterator[_Piece]:
    """The last physical axis of a chip with two devices is the pair of them. A group without it shares the chip's links
    with another group, one with it has them to itself."""
    chip, sides = topology.chip, topology.shape
    axis_rate = (chip.ici_bytes_per_s_per_axis or 0.0) * ICI_EFFICIENCY
    pair = chip.devices_per_chip if len(shares) > len(sides) and shares[-1] > 1 else 1
    for side, share, wrapped in zip(sides, shares, topology.wrap, strict=False):
        if share > 1:
            # Half a torus axis, or one without wraparound, is a line: its end has one link.
            ring = wrapped and share == side
            rate = axis_rate * pair / chip.devices_per_chip
            yield _Piece("ici", share, rate if ring else rate / 2, ring)
    if pair > 1 and not any(share > 1 for share in shares[:-1]):
        yield _Piece("ici", pair, DIE_LINKS * axis_rate / 2)


def _switched(shares: Sequence[int], topology: Topology) -> Iterator[_Piece]:
    if shares[0] > 1:
        yield _Piece("nvlink", shares[0], topology.chip.ici_bytes_per_s / 2 * NVLINK_EFFICIENCY, switched=True)


@cache
def _assign(sizes: tuple[int, ...], topology: Topology) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """For each physical axis inside a slice (or host) what every mesh axis takes of it; and what each takes outside."""
    if math.prod(sizes) != topology.n_devices:
        shown = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ConfigError(
            f"mesh {shown or 'of one device'} is of {math.prod(sizes)} devices and {topology.slices} x {topology.name} "
            f"has {topology.n_devices}; set mesh.fsdp=-1 to fill up"
        )
    if topology.is_tpu:
        outer = _over_slices(sizes, topology)
        physical = topology.shape + ((topology.chip.devices_per_chip,) if topology.chip.devices_per_chip > 1 else ())
        local = tuple(size // out for size, out in zip(sizes, outer, strict=True))
        return _on_torus(local, physical), outer
    inside, free = [1] * len(sizes), topology.shape[1]
    for i in reversed(range(len(sizes))):
        inside[i] = math.gcd(sizes[i], free)
        free //= inside[i]
        if inside[i] < sizes[i]:
            break
    return (tuple(inside),), tuple(size // n for size, n in zip(sizes, inside, strict=True))


def _over_slices(sizes: tuple[int, ...], topology: Topology) -> tuple[int, ...]:
    outer: dict[str, int] = dict.fromkeys(AXES, 1)
    if topology.slices > 1:
        outer[axis_over_slices(dict(zip(AXES, sizes, strict=True)), topology.slices)] = topology.slices
    return tuple(outer.values())


def _on_torus(sizes: tuple[int, ...], physical: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Mesh axes from the last, which talks most, to the first, each on the part of the torus that JAX prefers for it:
    whole physical axes, as many as may be, then those that other mesh axes already have a part of, as its code does."""
    taken = [1] * len(physical)
    columns: list[tuple[int, ...]] = []
    for size in reversed(sizes):

        def preference(shares: tuple[int, ...], taken=tuple(taken)) -> tuple[object, ...]:
            whole = [share for share, side in zip(shares, physical, strict=True) if share == side]
            overlapping = math.prod(share for share, used in zip(shares, taken, strict=True) if used > 1)
            return math.prod(whole), sum(share > 1 for share in whole), overlapping, shares

        free = [side // used for side, used in zip(physical, taken, strict=True)]
        best = max(_splits(size, free), key=preference)
        columns.append(best)
        taken = [used * share for used, share in zip(taken, best, strict=True)]
    return tuple(zip(*reversed(columns), strict=True))


def _splits(size: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as a product of divisors, one of each free side."""
    choices = [[d for d in range(1, side + 1) if side % d == 0 and size % d == 0] for side in free]
    for shares in itertools.product(*choices):
        if math.prod(shares) == size:
            yield shares
