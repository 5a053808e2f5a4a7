import itertools

import numpy as np
import pytest

from maxlm.kernels.masks import Mask

MASKS = [Mask(causal, window) for causal in (True, False) for window in (None, 1, 3, 8, 9, 100)]
MASKS += [
    Mask(causal, window, chunk, n)
    for causal in (True, False)
    for window, chunk in ((3, None), (9, None), (None, 1), (None, 4), (None, 7), (None, 20), (6, 5), (3, 11))
    for n in (0, 1, 6, 40)
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("q_tile", "kv_tile"), [(4, 4), (4, 8), (8, 4), (5, 3), (1, 1)])
def test_census_of_tiles_agrees_with_every_element(mask: Mask, q_tile: int, kv_tile: int):
    rows, columns = 5, 6
    allowed = mask.allows(np.arange(rows * q_tile)[:, None], np.arange(columns * kv_tile)[None, :])
    allowed = np.broadcast_to(allowed, (rows * q_tile, columns * kv_tile))
    tiles = mask.tiles(rows, columns, q_tile, kv_tile)
    assert [tile[:2] for tile in tiles] == list(itertools.product(range(rows), range(columns)))
    for row, column, kind in tiles:
        part = allowed[row * q_tile : (row + 1) * q_tile, column * kv_tile : (column + 1) * kv_tile]
        assert kind == ("full" if part.all() else "partial" if part.any() else "empty"), (row, column)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_called_empty_or_full_is_so_and_without_global_tokens_nothing_else_is(mask: Mask):
    q, kv = (x.reshape(-1) for x in np.meshgrid(np.arange(0, 24, 2), np.arange(0, 24, 2), indexing="ij"))
    q_tile, kv_tile = 4, 6
    empty, full = mask.extent(q, q + q_tile, kv, kv + kv_tile)
    rows, columns = np.arange(q_tile)[:, None] + q[:, None, None], np.arange(kv_tile)[None, :] + kv[:, None, None]
    allowed = np.broadcast_to(mask.allows(rows, columns), (len(q), q_tile, kv_tile))
    # Where a window and a chunk each leave something, both together may leave nothing.
    exact = not mask.global_tokens and (mask.window is None or mask.chunk is None)
    for called, true in ((empty, ~allowed.any(axis=(1, 2))), (full, allowed.all(axis=(1, 2)))):
        assert (true | ~called).all()
        assert (called == true).all() or not exact


def test_causal_window_allows_exactly_the_last_keys_up_to_the_query():
    allowed = Mask(causal=True, window=3).allows(np.arange(10)[:, None], np.arange(10)[None, :])
    for q in range(10):
        assert list(np.flatnonzero(allowed[q])) == list(range(max(0, q - 2), q + 1))


def test_chunk_allows_exactly_the_keys_of_the_chunk_up_to_the_query():
    allowed = Mask(chunk=4).allows(np.arange(10)[:, None], np.arange(10)[None, :])
    for q in range(10):
        assert list(np.flatnonzero(allowed[q])) == list(range(q - q % 4, q + 1))


def test_global_tokens_attend_to_all_and_are_attended_by_all():
    allowed = Mask(causal=False, window=1, global_tokens=2).allows(np.arange(6)[:, None], np.arange(6)[None, :])
    assert allowed[:2].all()
    assert allowed[:, :2].all()
    assert np.array_equal(allowed[2:, 2:], np.eye(4, dtype=bool))
    causal = Mask(window=1, global_tokens=2).allows(np.arange(6)[:, None], np.arange(6)[None, :])
    assert np.array_equal(causal, np.tril(allowed))


def test_half_of_the_tiles_of_a_causal_mask_are_empty():
    kinds = [tile.kind for tile in Mask(causal=True).tiles(8, 8, 128, 128)]
    assert (kinds.count("empty"), kinds.count("partial"), kinds.count("full")) == (28, 8, 28)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window": 0}, "window of 0 keys"),
        ({"window": -1}, "window of -1 keys"),
        ({"chunk": 0}, "chunk of 0 keys"),
        ({"window": 4, "global_tokens": -1}, "-1 global tokens"),
        ({"global_tokens": 2}, "2 global tokens on top of no window"),
    ],
)
def test_mask_that_means_nothing_is_refused(keys: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Mask(**keys)
