"""Pairs of parts for next sentences: where their tokens come from, in what shares, and always the same for a row."""

import numpy as np
import pytest

from maxlm.data.config import DataConfig
from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.data.loader import Loader
from maxlm.data.objective import Objective
from maxlm.data.sentence_pairs import DOES_NOT_FOLLOW, FOLLOWS, Windows, pair_batch
from maxlm.errors import DataError

BOS, EOS, V, T = 0, 1, 4000, 40
HOW = Objective("mlm", special_id=V, next_sentence=True)


def windows_of(rows, base):
    """Each token stands once in a window, and tells by its size which window it is of: a document of 12, then of 25."""
    windows = base + np.arange(T + 1) + 50 * np.arange(rows)[:, None]
    windows[:, 12], windows[:, 13], windows[:, 39], windows[:, 40] = EOS, BOS, EOS, BOS
    return windows


def draws(rows, first=0, seed=3):
    return Draws(seed, 0, np.arange(first, first + rows))


def parts_of(row):
    """A and B of a row, without what frames them."""
    assert row[0] == BOS
    ends = np.flatnonzero(row == EOS)
    return row[1 : ends[0]], row[ends[0] + 1 : ends[-1]] if len(ends) > 1 else row[:0]


def test_the_second_part_follows_the_first_or_is_of_another_window():
    n = 2000
    first, other = windows_of(n, 10), windows_of(n, 10 + 50 * n)
    batch, _ = pair_batch(Windows(first), Windows(other), BOS, EOS, draws(n).of_pairs()[:, 1:])
    splits = []
    for row in range(n):
        here = batch["segments"][row] == 1
        tokens, asked = batch["inputs"][row][here], batch["next_sentence"][row]
        a, b = parts_of(tokens)
        assert asked[0] in (FOLLOWS, DOES_NOT_FOLLOW)
        assert not asked[1:].any()
        # The longer document of the window, cut in two; the second part is as long where it is another's.
        assert len(a) + len(b) == 25
        assert a.tolist() == first[row, 14 : 14 + len(a)].tolist()
        if asked[0] == FOLLOWS:
            assert b.tolist() == first[row, 14 + len(a) : 39].tolist()
        else:
            start = int(b[0] - other[row, 0])
            assert b.tolist() == other[row, start : start + len(b)].tolist()
            assert 14 <= start <= 39 - len(b)
        assert batch["token_types"][row][here].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert batch["positions"][row][here].tolist() == list(range(here.sum()))
        splits.append(len(a))
    # Three standard deviations of a share of n draws.
    assert abs((batch["next_sentence"][:, 0] == FOLLOWS).mean() - 0.5) < 3 * 0.5 / n**0.5
    assert set(splits) == set(range(1, 25))


def test_masked_tokens_are_of_both_parts_and_bytes_those_of_the_masked():
    n = 50
    first, other = windows_of(n, 10), windows_of(n, 10 + 50 * n)
    sizes = (np.where(first > EOS, first, 0), np.where(other > EOS, other, 0))
    others = Windows(other, np.full(n, T + 1), sizes[1])
    batch = make_batch(HOW, first, Marks(BOS, EOS, V), draws(n), np.full(n, T + 1), sizes[0], others)
    told = batch["weights"] == 1
    assert (told.sum(axis=1) == round(0.15 * 25)).all()
    assert np.all(batch["segments"][told] == 1)
    np.testing.assert_array_equal(batch["target_bytes"], np.where(told, batch["targets"], 0))
    assert set(batch["token_types"][told]) == {0, 1}


def test_short_and_empty_windows_ask_nothing():
    windows = np.full((2, T + 1), EOS)
    windows[0, :3] = [BOS, 7, EOS]
    first = Windows(windows, np.array([3, 0]))
    batch, _ = pair_batch(first, Windows(windows_of(2, 10)), BOS, EOS, draws(2).of_pairs()[:, 1:])
    assert not batch["next_sentence"].any()
    assert batch["inputs"][0, :4].tolist() == [BOS, 7, EOS, 0]
    assert batch["segments"].sum(axis=1).tolist() == [3, 0]


def test_a_tokenizer_that_frames_nothing_is_refused():
    with pytest.raises(DataError, match=r"next_sentence = true needs a tokenizer with bos and eos.*bos None"):
        pair_batch(Windows(windows_of(1, 10)), None, None, EOS, draws(1).of_pairs()[:, 1:])


def test_a_loaders_pairs_are_a_pure_function_of_seed_and_step_in_training_and_evaluation(store):
    def loader(seed=1):
        return Loader(DataConfig(store=store), seq_len=32, global_batch=8, seed=seed, objective=HOW)

    rows = np.arange(8)
    whole, again = loader().rows(5, rows), loader().rows(5, rows[3:])
    assert set(whole["next_sentence"][:, 0]) >= {FOLLOWS, DOES_NOT_FOLLOW}
    for name, array in whole.items():
        np.testing.assert_array_equal(array[3:], again[name])
    assert not np.array_equal(whole["inputs"], loader(seed=2).rows(5, rows)["inputs"])
    held_out = list(loader().eval_batches(rows))
    asked = np.concatenate([batch["next_sentence"][:, 0] for batch in held_out])
    assert set(asked) >= {FOLLOWS, DOES_NOT_FOLLOW}
    assert all(batch["target_bytes"].sum() > 0 for batch in held_out)
