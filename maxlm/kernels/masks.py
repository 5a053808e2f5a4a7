"""Which key each query may attend to by position alone, and what that leaves of each tile of a score matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

TileKind = Literal["empty", "partial", "full"]


class Tile(NamedTuple):
    """One tile of a score matrix: its row and column among the tiles, and how much of it the mask leaves."""

    row: int
    column: int
    kind: TileKind


class _Rectangle(NamedTuple):
    """A part of a score matrix: queries `[q_start, q_stop)` by keys `[kv_start, kv_stop)`."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int


@dataclass(frozen=True)
class Mask:
    """A mask that depends on positions only; segments, prefixes and padding are the kernel's arguments, not the mask's.

    `causal`: no key after the query. `window`: only keys less than `window` positions away, so `(q - window, q]`
    under a causal mask (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825) and `(q - window, q + window)` else.
    `chunk`: only keys of the query's own chunk of `chunk` positions, `q // chunk == k // chunk` (Llama 4).
    `global_tokens`: window and chunk do not bind the first n positions, neither as queries nor as keys
    (Longformer's global attention, section 3.1); a causal mask still does.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    global_tokens: int = 0

    def __post_init__(self):
        for name, length in (("a sliding window", self.window), ("an attention chunk", self.chunk)):
            if length is not None and length < 1:
                raise ValueError(f"{name} of {length} keys leaves nothing to attend to; give at least 1, or None")
        if self.global_tokens < 0:
            raise ValueError(f"{self.global_tokens} global tokens; give 0 or more")
        if self.global_tokens and self.window is None and self.chunk is None:
            raise ValueError(
                f"{self.global_tokens} global tokens on top of no window: every token attends to all; give a window or "
                "a chunk, or 0 global tokens"
            )

    @property
    def both_ways(self) -> Mask:
        """The same mask without its causal part: what it leaves of the keys of a prefix."""
        return replace(self, causal=False)

    def allows(self, q_index: Any, kv_index: Any) -> Any:
        """Element-wise: may the query at `q_index` attend to the key at `kv_index`? Arrays of NumPy or JAX."""
        ahead = kv_index - q_index
        if not self.global_tokens:
            return self._allows_locally(ahead, q_index, kv_index)
        is_global = (q_index < self.global_tokens) | (kv_index < self.global_tokens)
        allowed = self.both_ways._allows_locally(ahead, q_index, kv_index) | is_global
        return allowed & (ahead <= 0) if self.causal else allowed

    def _allows_locally(self, ahead: Any, q_index: Any, kv_index: Any) -> Any:
        allowed = ahead <= 0 if self.causal else ahead == ahead
        if self.window is not None:
            allowed = allowed & (ahead > -self.window)
            if not self.causal:
                allowed = allowed & (ahead < self.window)
        if self.chunk is not None:
            allowed = allowed & (q_index // self.chunk == kv_index // self.chunk)
        return allowed

    def behind(self, length: int) -> np.ndarray:
        """int64[length]: how many of itself and the positions before it each position of a row may attend to.

        Without causality it may attend to as many ahead as it is seen from there, since masks are symmetric.
        """
        import numpy as np

        position, n = np.arange(length), min(self.global_tokens, length)
        first = np.full(length, n)
        if self.window is not None:
            first = np.maximum(first, position - self.window + 1)
        if self.chunk is not None:
            first = np.maximum(first, position // self.chunk * self.chunk)
        return np.where(position < n, position + 1, n + position - first + 1)

    def tile_kind(self, row: int, column: int, q_tile: int, kv_tile: int) -> TileKind:
        """What the mask leaves of one tile of `q_tile` queries by `kv_tile` keys."""
        tile = _Rectangle(row * q_tile, (row + 1) * q_tile, column * kv_tile, (column + 1) * kv_tile)
        kinds = set(self._kinds(tile))
        return kinds.pop() if len(kinds) == 1 else "partial"

    def _kinds(self, tile: _Rectangle) -> Iterator[TileKind]:
        """What the mask leaves of each of the disjoint parts that make up a tile, each in one band of the matrix."""
        q_start, q_stop, kv_start, kv_stop = tile
        n = self.global_tokens
        if q_start < n or kv_start < n:
            q_split, kv_split = min(max(q_start, n), q_stop), min(max(kv_start, n), kv_stop)
            for part in (
                _Rectangle(q_start, q_split, kv_start, kv_stop),
                _Rectangle(q_split, q_stop, kv_start, kv_split),
            ):
                if _has_elements(part):
                    yield self._band_kind(part, None)
            tile = _Rectangle(q_split, q_stop, kv_split, kv_stop)
            if not _has_elements(tile):
                return
        if self.chunk is None:
            yield self._band_kind(tile, self.window)
            return
        q_chunks = list(_pieces(tile.q_start, tile.q_stop, self.chunk))
        kv_chunks = list(_pieces(tile.kv_start, tile.kv_stop, self.chunk))
        for q_chunk, *q_piece in q_chunks:
            for kv_chunk, *kv_piece in kv_chunks:
                part = _Rectangle(*q_piece, *kv_piece)
                yield self._band_kind(part, self.window) if q_chunk == kv_chunk else "empty"

    def _band_kind(self, part: _Rectangle, window: int | None) -> TileKind:
        """What causality and a window leave of a part.

        `kv_index - q_index` takes every whole number between its extremes, and is allowed in one interval, so the
        extremes decide.
        """
        least, most = part.kv_start - part.q_stop + 1, part.kv_stop - 1 - part.q_start
        low = least if window is None else 1 - window
        high = 0 if self.causal else most if window is None else window - 1
        if most < low or least > high:
            return "empty"
        return "full" if low <= least and most <= high else "partial"

    def extent(self, q_start: Any, q_stop: Any, kv_start: Any, kv_stop: Any) -> tuple[Any, Any]:
        """Of queries `[q_start, q_stop)` by keys `[kv_start, kv_stop)`: does the mask leave nothing, does it leave all?

        Element-wise, arrays of NumPy or JAX, of which the second may be traced. Both are sure where they are true; a
        part with global tokens may be full or empty without being called so.
        """
        least, most = kv_start - q_stop + 1, kv_stop - 1 - q_start
        whatever = least == least
        ahead = least > 0 if self.causal else ~whatever
        empty, full = ahead, most <= 0 if self.causal else whatever
        if self.window is not None:
            empty, full = empty | (most <= -self.window), full & (least > -self.window)
            if not self.causal:
                empty, full = empty | (least >= self.window), full & (most < self.window)
        if self.chunk is not None:
            first_q, last_q = q_start // self.chunk, (q_stop - 1) // self.chunk
            first_kv, last_kv = kv_start // self.chunk, (kv_stop - 1) // self.chunk
            empty = empty | (first_q > last_kv) | (first_kv > last_q)
            full = full & (first_q == last_kv) & (first_kv == last_q)
        if self.global_tokens:
            is_global = (q_start < self.global_tokens) | (kv_start < self.global_tokens)
            empty = ahead | (empty & ~is_global)
        return empty, full

    def tiles(self, n_q_tiles: int, n_kv_tiles: int, q_tile: int, kv_tile: int) -> list[Tile]:
        """Every tile of the score matrix, row by row, with its kind."""
        return [
            Tile(row, column, self.tile_kind(row, column, q_tile, kv_tile))
            for row in range(n_q_tiles)
            for column in range(n_kv_tiles)
        ]


def _has_elements(part: _Rectangle) -> bool:
    return part.q_start < part.q_stop and part.kv_start < part.kv_stop


def _pieces(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """The chunks that `[start, stop)` touches: each one's number, and the first and last + 1 position in both."""
    for number in range(start // chunk, (stop - 1) // chunk + 1):
        yield number, max(start, number * chunk), min(stop, (number + 1) * chunk)
