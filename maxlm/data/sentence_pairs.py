"""Rows of two parts, of which the second follows the first or does not: BERT's next sentences (arXiv:1810.04805, A.2).

Shapes: B rows, T tokens in a row, of windows of T + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maxlm.data.objectives import uniform
from maxlm.errors import DataError

# What `next_sentence` says of a row; 0 is nothing.
FOLLOWS, DOES_NOT_FOLLOW = 1, 2

N_DRAWS = 3
"""random numbers that a pair takes"""


class Windows(NamedTuple):
    """Stored tokens [B, T + 1]; how many of each window there are, int[B], all unless given; and each token's bytes."""

    tokens: np.ndarray
    lengths: np.ndarray | None = None
    sizes: np.ndarray | None = None


def pair_batch(
    first: Windows, other: Windows | None, bos_id: int | None, eos_id: int | None, bits: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Rows `[bos] A [eos] B [eos]`, before tokens are masked, and the bytes of their tokens where windows have these.

    The longest piece of a document in a window is cut at an even random place into A and what follows. That is B, or
    for every second row, by chance, as many tokens of the longest piece of another window, from an even random place;
    that may by chance be of the same document. A piece of one token is A alone. `bits` uint64[B, 3].

    Returns inputs, segments, positions, token_types (0 to the first eos, then 1) and next_sentence (at a row's first
    token FOLLOWS or DOES_NOT_FOLLOW, else 0), int32[B, T]. Raises DataError for a tokenizer without bos or eos.
    """
    if bos_id is None or eos_id is None:
        raise DataError(
            f"data.objective.next_sentence = true needs a tokenizer with bos and eos, which frame the parts; it has "
            f"bos {bos_id} and eos {eos_id}. Set it to false, or prepare the store with another tokenizer."
        )
    n_rows, length = first.tokens.shape[0], first.tokens.shape[1] - 1
    inputs, types, asked = (np.zeros((n_rows, length), np.int32) for _ in range(3))
    sizes, n_tokens = np.zeros((n_rows, length), np.float32), np.zeros(n_rows, int)
    for row in range(n_rows):
        piece = _longest_piece(first, row, (bos_id, eos_id))[: length - 3]
        if not len(piece):
            continue
        cut, elsewhere, place = uniform(bits[row])
        split = 1 + int(cut * (len(piece) - 1))
        a, b, source = piece[:split], piece[split:], first
        if other is not None and len(b):
            asked[row, 0] = FOLLOWS
            strange = _longest_piece(other, row, (bos_id, eos_id))
            if elsewhere < 0.5 and len(strange):
                start = int(place * (max(len(strange) - len(b), 0) + 1))
                b, source, asked[row, 0] = strange[start : start + len(b)], other, DOES_NOT_FOLLOW
        tokens = [bos_id, *first.tokens[row, a].tolist(), eos_id]
        behind = [*source.tokens[row, b].tolist(), eos_id] if len(b) else []
        n_tokens[row] = len(tokens) + len(behind)
        inputs[row, : n_tokens[row]] = tokens + behind
        types[row, len(tokens) : n_tokens[row]] = 1
        if first.sizes is not None and source.sizes is not None:
            sizes[row, 1 : 1 + len(a)] = first.sizes[row, a]
            sizes[row, len(tokens) : len(tokens) + len(b)] = source.sizes[row, b]
    here = np.arange(length) < n_tokens[:, None]
    batch = {
        "inputs": inputs,
        "segments": here.astype(np.int32),
        "positions": np.where(here, np.arange(length), 0).astype(np.int32),
        "token_types": types,
        "next_sentence": asked,
    }
    return batch, None if first.sizes is None else sizes


def _longest_piece(windows: Windows, row: int, marks: tuple[int, int]) -> np.ndarray:
    """Where the longest run of tokens between marks lies in a window: places, the first run's of equal ones."""
    length = windows.tokens.shape[1] if windows.lengths is None else int(windows.lengths[row])
    ends = np.flatnonzero(np.isin(windows.tokens[row, :length], marks))
    starts, stops = np.append(0, ends + 1), np.append(ends, length)
    longest = int(np.argmax(stops - starts))
    return np.arange(starts[longest], stops[longest])
