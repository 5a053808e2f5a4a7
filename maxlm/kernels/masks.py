"""Which key each query may attend to by position alone, and what that leaves of each tile of a score matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

TileKind = Literal["empty", "partial", "full"]


class Tile(NamedTuple):
    """One tile of a score matrix: its row and column among the tiles, and how much of it the mask leaves."""

    row: int
    column: int
    kind: TileKind


@dataclass(frozen=True)
class Mask:
    """A mask that depends on positions only; segments and padding are the kernel's arguments, not the mask's.

    `causal`: no key after the query. `window`: only keys less than `window` positions away, so `(q - window, q]`
    under a causal mask (Longformer, arXiv:2004.05150; Mistral, arXiv:2310.06825) and `(q - window, q + window)` else.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"a sliding window of {self.window} keys leaves nothing to attend to; give at least 1, or None"
            )

    def allows(self, q_index: Any, kv_index: Any) -> Any:
        """Element-wise: may the query at `q_index` attend to the key at `kv_index`? Arrays of NumPy or JAX."""
        ahead = kv_index - q_index
        allowed = ahead <= 0 if self.causal else ahead == ahead
        if self.window is not None:
            allowed = allowed & (ahead > -self.window)
            if not self.causal:
                allowed = allowed & (ahead < self.window)
        return allowed

    def tile_kind(self, row: int, column: int, q_tile: int, kv_tile: int) -> TileKind:
        """What the mask leaves of one tile of `q_tile` queries by `kv_tile` keys.

        `kv_index - q_index` takes every whole number between its extremes in a tile, and is allowed in one interval,
        so the extremes decide.
        """
        least = column * kv_tile - (row + 1) * q_tile + 1
        most = (column + 1) * kv_tile - 1 - row * q_tile
        infinity = q_tile * (row + 1) + kv_tile * (column + 1)
        low = -infinity if self.window is None else 1 - self.window
        high = 0 if self.causal else infinity if self.window is None else self.window - 1
        if most < low or least > high:
            return "empty"
        return "full" if low <= least and most <= high else "partial"

    def tiles(self, n_q_tiles: int, n_kv_tiles: int, q_tile: int, kv_tile: int) -> list[Tile]:
        """Every tile of the score matrix, row by row, with its kind."""
        return [
            Tile(row, column, self.tile_kind(row, column, q_tile, kv_tile))
            for row in range(n_q_tiles)
            for column in range(n_kv_tiles)
        ]
