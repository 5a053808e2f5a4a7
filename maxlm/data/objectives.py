"""From stored tokens to a training batch.

Shapes: B rows, T tokens in a row. A window is the T + 1 tokens that a row is made from.
"""

from __future__ import annotations

import numpy as np


def document_starts(windows: np.ndarray, bos_id: int | None, eos_id: int | None) -> np.ndarray:
    """bool[B, T + 1]: where a document begins, told by bos or, without one, by the eos before it.

    The first token counts as a beginning only if it is bos: what came before the window is not seen.
    Neither token occurs inside a document (`prepare` makes sure), so this is exact.
    """
    if bos_id is not None:
        return windows == bos_id
    starts = np.zeros(windows.shape, bool)
    if eos_id is not None:
        np.equal(windows[:, :-1], eos_id, out=starts[:, 1:])
    return starts


def uniform(bits: np.ndarray) -> np.ndarray:
    """Random uint64 of any shape as float64 in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53


def causal_batch(
    windows: np.ndarray, bos_id: int | None, eos_id: int | None, lengths: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The batch for next-token prediction, of windows [B, T + 1] of stored tokens (see docs/architecture.md, Batch).

    Documents in a row are numbered from 1 in `segments` and `positions` restart at each; a document cut by the
    window's beginning starts there. The last token of a document predicts nothing. `lengths` int[B] says how many
    of a window's tokens there are; the rest is padding: segment 0, weight 0.

    Returns inputs, targets, segments, positions int32[B, T] and weights float32[B, T].
    """
    n_tokens = windows.shape[1] - 1
    starts = document_starts(windows, bos_id, eos_id)
    begins = starts[:, :-1].copy()
    begins[:, 0] = True
    column = np.arange(n_tokens, dtype=np.int32)
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    positions = column - np.maximum.accumulate(column * begins, axis=1)
    weights = np.subtract(1, starts[:, 1:], dtype=np.float32)
    inputs = windows[:, :-1].astype(np.int32)
    targets = windows[:, 1:].astype(np.int32)
    if lengths is not None:
        padding = column >= np.asarray(lengths)[:, None]
        for array in (inputs, segments, positions):
            array[padding] = 0
        no_target = column >= np.asarray(lengths)[:, None] - 1
        targets[no_target] = 0
        weights[no_target] = 0
    return {"inputs": inputs, "targets": targets, "segments": segments, "positions": positions, "weights": weights}
