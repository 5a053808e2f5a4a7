"""What is hidden of a row: rates, shares, and that nothing of the row is lost; always the same for a seed and a row."""

import numpy as np
import pytest

from maxlm.data.config import ObjectiveConfig
from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.data.objective import Objective
from maxlm.errors import ConfigError

BOS, EOS, V = 0, 1, 60
MARKS = Marks(BOS, EOS, V)


def windows_of(rows, length, seed=0):
    windows = np.random.default_rng(seed).integers(2, V, (rows, length + 1))
    windows[:, 7], windows[:, 8] = EOS, BOS
    return windows


def draws(rows, first=0, seed=3, stream=0):
    return Draws(seed, stream, np.arange(first, first + rows))


def test_masked_tokens_are_of_berts_shares_and_the_others_stand_as_they_were():
    how, windows = Objective("mlm", special_id=V), windows_of(200, 128)
    batch = make_batch(how, windows, MARKS, draws(200))
    tokens, told = windows[:, :-1], batch["weights"] == 1
    ordinary = ~np.isin(tokens, [BOS, EOS])
    assert not told[~ordinary].any()
    assert (told.sum(axis=1) == np.rint(0.15 * ordinary.sum(axis=1))).all()
    np.testing.assert_array_equal(batch["targets"], np.where(told, tokens, 0))
    np.testing.assert_array_equal(batch["inputs"][~told], tokens[~told])
    inputs, n = batch["inputs"][told], told.sum()
    # Three standard deviations of a share of n draws.
    assert abs((inputs == V).sum() / n - 0.8) < 3 * (0.8 * 0.2 / n) ** 0.5
    kept = 0.1 + 0.1 / V  # also where any token is by chance the same
    assert abs((inputs == tokens[told]).sum() / n - kept) < 3 * (kept * (1 - kept) / n) ** 0.5
    # Every place is chosen about equally often.
    assert np.ptp(told.sum(axis=0)[9:] / 200) < 0.3


@pytest.mark.parametrize("length", [32, 113, 568])
def test_sentinels_and_the_spans_behind_them_put_the_row_together_again(length):
    how = Objective("span_corruption", special_id=99, start_id=5)
    windows, n_windows = windows_of(20, length), 20
    batch = make_batch(how, windows, MARKS, draws(n_windows))
    missing, spans = how.spans(length)
    assert (missing, spans) == (round(0.15 * length), round(round(0.15 * length) / 3))
    encoder_length, decoder_length = how.lengths(length)
    assert batch["encoder_inputs"].shape == (n_windows, encoder_length)
    assert batch["targets"].shape == (n_windows, decoder_length)
    for row in range(n_windows):
        encoder = batch["encoder_inputs"][row][batch["encoder_segments"][row] == 1].tolist()
        targets = batch["targets"][row][batch["weights"][row] == 1].tolist()
        assert batch["inputs"][row, : len(targets)].tolist() == [5, *targets[:-1]]
        assert (encoder.pop(), targets.pop()) == (EOS, EOS)
        assert len(targets) == missing + spans
        starts = [at for at, token in enumerate(targets) if token > V]
        behind = {targets[a]: targets[a:b] for a, b in zip(starts, [*starts[1:], len(targets)], strict=True)}
        assert list(behind) == [99 - i for i in range(spans)]
        whole = [x for token in encoder for x in (behind[token][1:] if token > V else [token])]
        assert whole == windows[row, :length].tolist()
        assert all(len(span) > 1 for span in behind.values())


def test_a_documents_first_tokens_are_its_prefix_and_what_is_told_begins_behind_it():
    windows = windows_of(2000, 40)
    plain = make_batch(Objective(), windows, MARKS, draws(2000), np.full(2000, 30))
    batch = make_batch(Objective("prefix_lm"), windows, MARKS, draws(2000), np.full(2000, 30))
    for name in ("inputs", "targets", "segments", "positions"):
        np.testing.assert_array_equal(batch[name], plain[name])
    assert batch["prefix"].dtype == bool
    counts = {1: np.zeros(9, int), 2: np.zeros(23, int)}
    for row, segments in enumerate(batch["segments"]):
        assert not batch["prefix"][row][segments == 0].any()
        for segment, count in counts.items():
            here = segments == segment
            length, told = batch["prefix"][row][here].sum(), plain["weights"][row][here].sum()
            assert batch["prefix"][row][here][:length].all()
            first = np.arange(here.sum()) >= length - 1
            np.testing.assert_array_equal(batch["weights"][row][here], plain["weights"][row][here] * first)
            assert 1 <= length <= told
            count[length] += 1
    # Documents of 8 tokens, 7 of them told, and of 22, 21 told: every length is about equally frequent.
    for count, told in zip(counts.values(), (7, 21), strict=True):
        expected = 2000 / told
        assert count[0] == count[told + 1 :].sum() == 0
        assert np.abs(count[1 : told + 1] - expected).max() < 4 * expected**0.5


def test_a_document_of_which_nothing_is_told_has_no_prefix():
    windows = np.array([[BOS, 5, 6, EOS, BOS, EOS, BOS, 7]])
    batch = make_batch(Objective("prefix_lm"), windows[:, :7], MARKS, draws(1))
    assert batch["weights"][0, 5] == 0
    alone = make_batch(Objective("prefix_lm"), windows[:, 3:7], MARKS, draws(1))
    assert alone["segments"][0].tolist() == [1, 2, 2]
    assert not alone["prefix"][0, 0]


def test_t5s_rows_of_568_tokens_fill_512_of_the_encoder():
    """arXiv:1910.10683's code: 512 and 114 of 568; the decoder's are filled up to 128."""
    assert Objective("span_corruption").lengths(568) == (512, 128)
    assert sum(Objective("span_corruption").spans(568)) + 1 == 114


@pytest.mark.parametrize("kind", ["prefix_lm", "mlm", "span_corruption"])
def test_what_is_drawn_is_a_pure_function_of_seed_and_row(kind):
    how, windows = Objective(kind, special_id=99), np.repeat(windows_of(1, 64), 6, axis=0)
    batch = make_batch(how, windows, MARKS, draws(6))
    later = make_batch(how, windows[:2], MARKS, draws(2, first=4))
    for name, array in batch.items():
        np.testing.assert_array_equal(array[4:], later[name])
    name = {"prefix_lm": "prefix", "mlm": "weights", "span_corruption": "encoder_inputs"}[kind]
    assert len({row.tobytes() for row in batch[name]}) == 6
    for other in (draws(6, seed=4), draws(6, stream=1)):
        assert not np.array_equal(batch[name], make_batch(how, windows, MARKS, other)[name])


@pytest.mark.parametrize("kind", ["causal", "prefix_lm", "mlm", "span_corruption"])
def test_bytes_are_those_of_the_tokens_to_be_told_and_padding_is_told_nowhere(kind):
    how, windows = Objective(kind, special_id=99), windows_of(3, 64)
    lengths = np.array([65, 30, 0])
    sizes = np.where(np.isin(windows, [BOS, EOS]), 0, windows).astype(np.float32)
    batch = make_batch(how, windows, MARKS, draws(3), lengths, sizes)
    ordinary = (batch["targets"] > 1) & (batch["targets"] < V)
    np.testing.assert_array_equal(batch["target_bytes"], np.where(ordinary, batch["targets"] * batch["weights"], 0))
    assert batch["weights"][0].sum() > batch["weights"][1].sum() > 0
    assert batch["weights"][2].sum() == batch["segments"][2].sum() == 0


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"kind": "mlm"}, "decoder", "data.objective.kind = 'mlm' and model.kind = 'decoder'"),
        ({"kind": "causal"}, "encoder", "trained by 'mlm'"),
        ({"kind": "prefix_lm"}, "encoder", "trained by 'mlm'"),
        ({"kind": "prefix_lm", "mask_id": 3}, "decoder", "data.objective.mask_id is not of kind = 'prefix_lm'"),
        ({"mask_id": 300}, "encoder", "data.objective.mask_id = 300 is not under model.vocab_size = 300"),
        ({"mask_id": 3}, "encoder_decoder", "data.objective.mask_id is not of kind = 'span_corruption'"),
    ],
)
def test_an_objective_that_does_not_fit_the_model_is_refused_by_its_keys(given, kind, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        Objective.of(ObjectiveConfig(**given), model_kind=kind, vocab_size=300, start_id=0)
