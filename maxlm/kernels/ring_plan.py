"""What goes round the ring of `ring_attention.py`: where each device's positions lie, and the steps that a mask leaves.
Needs no JAX; positions may be traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from maxlm.kernels.masks import Mask

PIECES = 2
"""Runs of positions that a device has of a row."""


def zigzag(length: int, devices: int) -> np.ndarray:
    """int64[length]: the position of a row that lies at each place, when devices share rows in equal parts.

    Device i of n has the chunks i and 2 n - 1 - i of 2 n. Raises ValueError where they do not divide the length.
    """
    if length % (PIECES * devices):
        raise ValueError(f"a row of {length} positions is not a multiple of 2 x {devices} devices")
    chunks = np.arange(length).reshape(PIECES * devices, -1)
    first = np.arange(devices)
    return chunks[np.stack([first, PIECES * devices - 1 - first], axis=1).reshape(-1)].reshape(-1)


class Step(NamedTuple):
    """What a device has of the one `shift` places before it: keys' tiles `[first, stop)`; and how many of its tiles of
    scores are full and how many are masked in part, where these are the same on all devices."""

    shift: Any
    first: int
    stop: int
    counts: tuple[int, int] | None


class Plan(NamedTuple):
    """The steps of a ring. `whole`: all of them, each passing on what the step before had, and one `Step` standing for
    all but the first; else each sends at once."""

    steps: tuple[Step, ...]
    whole: bool


@dataclass(frozen=True)
class Tiling:
    """A device's share of rows in tiles: `n` tiles of `size` places, in `PIECES` runs of `positions` in all."""

    n: int
    size: int
    positions: int

    @property
    def padded(self) -> bool:
        """Whether the last tile of a run has fewer positions than places."""
        return self.n * self.size != self.positions

    def starts(self, device: Any, devices: int) -> Any:
        """Where a device's tiles begin in their rows, `[n]`; or `[..., n]` of devices `[..., 1]`."""
        piece, number = np.divmod(np.arange(self.n, dtype=np.int32), self.n // PIECES)
        chunk = device + piece * (PIECES * devices - 1 - 2 * device)
        return chunk * (self.positions // PIECES) + number * self.size


@dataclass(frozen=True)
class Ring:
    """Who has which tiles of queries and keys, and what hides keys from queries."""

    devices: int
    queries: Tiling
    keys: Tiling
    mask: Mask
    segments: bool = False
    prefix: bool = False

    @property
    def plan(self) -> Plan:
        """The steps that some device needs: each alone where that sends less over each link than the whole ring."""
        return _plan(self)

    def extent(self, q_starts: Any, kv_starts: Any) -> tuple[Any, Any]:
        """Which tiles `[..., queries, keys]` are empty, and which are full."""
        q, kv = q_starts[..., :, None], kv_starts[..., None, :]
        bounds = q, q + self.queries.size, kv, kv + self.keys.size
        empty, full = self.mask.extent(*bounds)
        if self.prefix:
            # Any key may be of a prefix.
            empty, _ = self.mask.both_ways.extent(*bounds)
        if self.segments or self.keys.padded:
            full = full & False
        return empty, full


@lru_cache(maxsize=256)
def _plan(ring: Ring) -> Plan:
    n, n_kv, devices = ring.devices, ring.keys.n, np.arange(ring.devices, dtype=np.int64)[:, None]
    halves = ((0, n_kv // PIECES), (n_kv // PIECES, n_kv))

    def step(shift: int) -> Step | None:
        empty, full = ring.extent(ring.queries.starts(devices, n), ring.keys.starts((devices - shift) % n, n))
        needed = [half for half in halves if not empty[..., slice(*half)].all()]
        if not needed:
            return None
        each = np.stack([np.sum(x, axis=(1, 2)) for x in (full, ~full & ~empty)], axis=1)
        alike = np.all(each == each[0])
        return Step(shift, needed[0][0], needed[-1][1], (int(each[0, 0]), int(each[0, 1])) if alike else None)

    steps = [found for shift in range(n) if (found := step(shift)) is not None]
    over_links = sum(min(each.shift, n - each.shift) * (each.stop - each.first) for each in steps)
    if over_links < (n - 1) * n_kv:
        return Plan(tuple(steps), whole=False)
    # One program serves all steps but that of a device's own keys.
    own = [each.counts for each in steps if each.shift == 0]
    counts = {each.counts for each in steps if each.shift}
    common = counts.pop() if len(counts) == 1 and len(steps) == n else None
    return Plan((Step(0, 0, n_kv, own[0] if own else (0, 0)), Step(1, 0, n_kv, common)), whole=True)
