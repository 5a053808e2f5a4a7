from fractions import Fraction

import numpy as np
import pytest

from maxlm.data.mixture import Mixture, permute, shuffle_keys


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 100, 255, 256, 257, 1000, 4097, 65537])
def test_shuffle_is_a_permutation(n):
    for epoch in range(3):
        images = permute(np.arange(n), n, shuffle_keys(7, epoch))
        assert sorted(images.tolist()) == list(range(n))


def test_shuffle_of_a_number_does_not_depend_on_its_company():
    keys, n = shuffle_keys(1, 0), 12345
    whole = permute(np.arange(n), n, keys)
    chosen = np.array([9, 0, 12344, 77, 9])
    assert np.array_equal(permute(chosen, n, keys), whole[chosen])


def test_shuffle_reaches_trillions_of_windows():
    n = 3 * 10**12
    images = permute(np.arange(n - 1000, n), n, shuffle_keys(0, 0))
    assert len(set(images.tolist())) == 1000
    assert 0.4 < images.mean() / n < 0.6


def test_shuffle_differs_by_seed_epoch_and_store():
    n = 1000
    orders = {
        tuple(permute(np.arange(n), n, shuffle_keys(seed, epoch, name)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
        for name in ("a", "b")
    }
    assert len(orders) == 8


def test_shuffle_looks_random():
    n = 10_000
    images = permute(np.arange(n), n, shuffle_keys(3, 0))
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.05
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    assert (images == np.arange(n)).sum() < 10  # a random permutation has 1 fixed point on average
    assert abs((np.diff(images) > 0).mean() - 0.5) < 0.02


def test_shuffle_refuses_numbers_outside():
    with pytest.raises(ValueError, match="range"):
        permute(np.array([5]), 5, shuffle_keys(0, 0))


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [3, 1], [0.7, 0.2, 0.1], [0.5, 0.3, 0.15, 0.05], [1e-3, 1], [1, 2, 3, 4, 5, 6, 7], [1 / 3, 2 / 3]],
)
def test_mixture_proportions_hold_at_every_prefix(weights):
    mixture = Mixture(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts = [0] * len(weights)
    for sample in range(3000):
        store, number = mixture.locate(sample)
        assert number == counts[store], "each store's samples are numbered without gaps"
        counts[store] += 1
        assert all(abs(c - (sample + 1) * s) < 2 for c, s in zip(counts, shares, strict=True))
        assert mixture.counts(sample + 1) == counts


def test_mixture_does_not_drift_far_out():
    mixture = Mixture([0.7, 0.2, 0.1])
    assert mixture.counts(10**15) == [7 * 10**14, 2 * 10**14, 10**14]


def test_mixture_locates_batches_as_it_locates_samples():
    mixture = Mixture([0.6, 0.3, 0.1])
    samples = np.arange(10**9, 10**9 + 50)
    stores, numbers = mixture.locate_batch(samples)
    assert list(zip(stores.tolist(), numbers.tolist(), strict=True)) == [mixture.locate(int(s)) for s in samples]


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1]])
def test_mixture_refuses_weights_that_are_no_shares(weights):
    with pytest.raises(ValueError, match="positive"):
        Mixture(weights)
