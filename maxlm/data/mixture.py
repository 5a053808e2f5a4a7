"""Which sample comes next: a deterministic mixture of stores, and a shuffle, both by arithmetic and in O(1) memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Mixture:
    """Deals samples to stores in proportion to their weights.

    Stores are the leaves of a binary tree. At each node, of the first i samples floor(i p + 1/2) go left, where p is
    the left side's exact share: so each side has its share of every prefix to within half a sample, each store to
    within one or two, and sample i's store and its number there follow from i alone. Weights are taken as the
    decimal fractions that they are written as, and arithmetic is on integers: nothing drifts.
    """

    def __init__(self, weights: Sequence[float]):
        """`weights` are positive; only their ratios count."""
        if not weights or any(weight <= 0 for weight in weights):
            raise ValueError(f"weights must be positive, got {list(weights)}")
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._tree = self._build(0, len(weights))

    def _build(self, first: int, last: int) -> int | tuple:
        """A leaf's store, or (numerator and denominator of the left side's share, left, right)."""
        if last - first == 1:
            return first
        middle = (first + last) // 2
        share = sum(self._weights[first:middle], Fraction()) / sum(self._weights[first:last], Fraction())
        return share.numerator, share.denominator, self._build(first, middle), self._build(middle, last)

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` samples each store gives."""
        return self._counts(self._tree, n)

    def _counts(self, node: int | tuple, n: int) -> list[int]:
        if not isinstance(node, tuple):
            return [n]
        numerator, denominator, left, right = node
        to_left = (2 * n * numerator + denominator) // (2 * denominator)
        return self._counts(left, to_left) + self._counts(right, n - to_left)

    def locate(self, index: int) -> tuple[int, int]:
        """The store of sample `index`, and how many samples that store gave before it."""
        node = self._tree
        while isinstance(node, tuple):
            numerator, denominator, left, right = node
            before = (2 * index * numerator + denominator) // (2 * denominator)
            after = (2 * (index + 1) * numerator + denominator) // (2 * denominator)
            node, index = (left, before) if after > before else (right, index - before)
        return node, index

    def locate_batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`locate` for int64[n] indices: stores int64[n] and numbers there int64[n]."""
        if not isinstance(self._tree, tuple):
            return np.zeros(len(indices), np.int64), np.asarray(indices, np.int64)
        located = np.array([self.locate(int(index)) for index in indices], np.int64).reshape(-1, 2)
        return located[:, 0], located[:, 1]


_ROUNDS = 8


def shuffle_keys(seed: int, epoch: int, name: str = "") -> np.ndarray:
    """uint64[rounds]: the keys of the permutation of one epoch."""
    digest = hashlib.shake_256(f"maxlm shuffle {seed} {epoch} {name}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, "<u8")


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of int64[k] `indices` under a permutation of range(n) that `keys` choose.

    An unbalanced Feistel network over the least power of two that holds n; what falls outside of range(n) goes round
    again, so it stays a permutation (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    bits = max(4, (n - 1).bit_length())
    result = np.asarray(indices).astype(np.uint64)
    if len(result) and (int(result.max()) >= n or np.min(indices) < 0):
        raise ValueError(f"indices must be in range({n})")
    todo = np.arange(len(result))
    while len(todo):
        result[todo] = _feistel(result[todo], bits, keys)
        todo = todo[result[todo] >= n]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(2**bits): each round changes one side by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for round_number, round_key in enumerate(keys):
        if round_number % 2:
            low ^= _mix(high + round_key) & low_mask
        else:
            high ^= _mix(low + round_key) & high_mask
    return (high << low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); the multiplications wrap round."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
