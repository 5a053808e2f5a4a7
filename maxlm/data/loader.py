"""Batches from token stores: a pure function of (seed, step, rows), and an iterator that reads ahead.

Row r of step s is sample s * global_batch + r. The mixture says which store it comes from and how many samples that
store gave before; that number over the store's windows is the epoch, and the rest, shuffled with the epoch's key, the
window. Window w is the stored tokens [w T, w T + T]: T inputs and T targets. So a resume needs the step alone, and any
number of processes can each make its own rows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from maxlm.data.config import DataConfig
from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.data.mixture import Mixture, permute, shuffle_keys
from maxlm.data.objective import Objective
from maxlm.data.sentence_pairs import Windows
from maxlm.data.storage import shared_context, storage_errors
from maxlm.data.store import SPLITS, TokenStore
from maxlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

_FOREVER = 1 << 60  # steps: what the iterator's range ends at


class TokenReader:
    """Windows of one split's tokens, from memory where they are kept there, else by small reads."""

    def __init__(self, store: TokenStore, split: str, *, in_memory: bool, context: Any):
        self.store, self.split = store, split
        self.n_tokens = store.manifest.counts(split).tokens
        self._dtype = np.dtype(store.manifest.dtype)
        self._in_memory, self._context = in_memory, context
        self._lock = threading.Lock()

    @functools.cached_property
    def _array(self) -> Any:
        return self.store.array(f"{self.split}/tokens", context=self._context)

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        return self.store.read(f"{self.split}/tokens")

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of int64[n] `starts`: uint16 or uint32 [n, length].

        Raises DataError where a chunk is damaged.
        """
        if self._in_memory:
            with self._lock:
                tokens = self._tokens
            return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]
        import tensorstore as ts

        with self._lock:
            array = self._array
        windows = np.empty((len(starts), length), self._dtype)
        with storage_errors(self.store.storage.where(f"{self.split}/tokens")):
            batch = ts.Batch()
            reads = [array[start : start + length].read(batch=batch) for start in starts.tolist()]
            batch.submit()
            for row, read in zip(windows, reads, strict=True):
                row[:] = read.result()
        return windows


class Loader:
    """Batches for training (`iterate`, `rows`) and for evaluation (`eval_batches`).

    Attributes:
        manifests: the stores' manifests.
        vocab_size: the tokenizer's.
        has_heldout: whether there are held-out documents to evaluate on.
        fingerprint: what the batches depend on, in plain JSON values: equal fingerprints, equal batches.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        split: str = "train",
        tokenizer: Tokenizer | None = None,
        objective: Objective | None = None,
    ):
        """`seq_len` in tokens, `global_batch` in rows over all processes; `tokenizer`, if given, must be the stores';
        `objective` is next tokens unless given.

        Raises ConfigError where `data` names no store; DataError where a store is missing, damaged, made with another
        tokenizer, or shorter than a window.
        """
        if data.store is None and not data.mixture:
            raise ConfigError("data.store is not set, nor data.mixture. Name the token store to train on.")
        urls = [entry.store for entry in data.mixture] or [str(data.store)]
        weights = [entry.weight for entry in data.mixture] or [1.0]
        self.seq_len, self.global_batch, self.seed, self.split = seq_len, global_batch, seed, split
        self._objective = objective or Objective()
        self._prefetch, self._shuffle = data.prefetch, data.shuffle
        self._stores = [TokenStore(url, tokenizer=tokenizer) for url in urls]
        self.manifests = [store.manifest for store in self._stores]
        self._check_stores()
        self._readers = {name: self._make_readers(name, data.cache_mib << 20) for name in SPLITS}
        self._n_windows = [max(0, reader.n_tokens - 1) // seq_len for reader in self._readers[split]]
        needed = 2 if self._objective.next_sentence else 1
        for store, n_windows in zip(self._stores, self._n_windows, strict=True):
            if n_windows < needed:
                raise DataError(
                    f"{store.url}: the {split} split has {store.manifest.counts(split).tokens} tokens, fewer than the "
                    f"{needed * seq_len + 1} of {'one row' if needed == 1 else 'two rows, of which pairs are made'}. "
                    "Prepare more documents, or lower train.seq_len."
                )
        self._mixture = Mixture(weights)
        self.vocab_size = self.manifests[0].vocab_size
        self.has_heldout = any(manifest.heldout.tokens > 1 for manifest in self.manifests)
        self.fingerprint: dict[str, Any] = {
            "tokenizer": self.manifests[0].tokenizer,
            "seq_len": seq_len,
            "global_batch": global_batch,
            "seed": seed,
            "split": split,
            "shuffle": data.shuffle,
            "stores": [manifest.fingerprint for manifest in self.manifests],
            "weights": weights,
            **self._objective.fingerprint(),
        }
        first = self.manifests[0]
        self._marks = Marks(first.bos_id, first.eos_id, first.vocab_size)

    def _check_stores(self) -> None:
        first = self._stores[0]
        for store in self._stores[1:]:
            if store.manifest.tokenizer != first.manifest.tokenizer:
                raise DataError(
                    f"{store.url} and {first.url}, both in data.mixture, were made with different tokenizers. Prepare "
                    "them with one."
                )

    def _make_readers(self, split: str, cache_bytes: int) -> list[TokenReader]:
        import tensorstore as ts

        sizes = [
            manifest.counts(name).tokens * np.dtype(manifest.dtype).itemsize
            for manifest in self.manifests
            for name in SPLITS
        ]
        in_memory = sum(sizes) <= cache_bytes
        # A shard's index is needed at each read from it, so some cache there must be.
        pool = ts.Context({"cache_pool": {"total_bytes_limit": max(cache_bytes, 64 << 20)}}, shared_context())
        return [TokenReader(store, split, in_memory=in_memory, context=pool) for store in self._stores]

    def rows(self, step: int, row_indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows int[n] `row_indices` of step `step`'s batch: a pure function of them and of the fingerprint.

        Returns inputs, targets, segments, positions int32[n, T] and weights float32[n, T], and for encoder-decoders
        the encoder's (see docs/architecture.md, Batch).
        """
        samples = step * self.global_batch + np.asarray(row_indices, np.int64)
        stores, numbers = self._mixture.locate_batch(samples)
        places, draws, others = np.empty_like(numbers), Draws(self.seed, 0, samples), None
        for store in np.unique(stores).tolist():
            chosen = stores == store
            places[chosen] = self._window_numbers(store, numbers[chosen])
        if self._objective.next_sentence:
            others = Windows(self._windows(stores, _another(places, np.array(self._n_windows)[stores], draws)))
        return make_batch(self._objective, self._windows(stores, places), self._marks, draws, others=others)

    def _windows(self, stores: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The windows [n, T + 1] of numbers `places` in their stores."""
        windows = np.empty((len(stores), self.seq_len + 1), self.manifests[0].dtype)
        for store in np.unique(stores).tolist():
            chosen = np.flatnonzero(stores == store)
            windows[chosen] = self._readers[self.split][store].windows(places[chosen] * self.seq_len, self.seq_len + 1)
        return windows

    def _window_numbers(self, store: int, numbers: np.ndarray) -> np.ndarray:
        """Which windows a store's samples `numbers` are."""
        n_windows = self._n_windows[store]
        epochs, places = np.divmod(numbers, n_windows)
        if not self._shuffle:
            return places
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = permute(places[chosen], n_windows, self._keys(store, epoch))
        return places

    def _keys(self, store: int, epoch: int) -> np.ndarray:
        return shuffle_keys(self.seed, epoch, self.manifests[store].fingerprint)

    def epochs(self, step: int) -> list[float]:
        """How often each store's windows have been seen before step `step`."""
        given = self._mixture.counts(step * self.global_batch)
        return [count / n_windows for count, n_windows in zip(given, self._n_windows, strict=True)]

    def iterate(self, start_step: int, row_indices: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """`rows` of steps `start_step` and on, without end, read ahead in threads. Starts at any step at once."""
        return self._read_ahead(lambda step: self.rows(step, row_indices), start_step, _FOREVER)

    def _read_ahead(self, make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
        import grain

        options = grain.ReadOptions(num_threads=min(self._prefetch, 8), prefetch_buffer_size=self._prefetch)
        iterator = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def eval_batches(self, row_indices: np.ndarray, max_batches: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The held-out tokens in order, each predicted once: rows `row_indices` of each batch, all stores in turn.

        Every process gets equally many batches; the last is filled up with padding. Beside a batch's arrays there is
        `target_bytes` float32[n, T]: the bytes of UTF-8 that each target stands for, 0 where its weight is 0.
        For tokenizers whose tokens have no exact bytes, a document's bytes are spread evenly over its tokens.

        Raises DataError where there are no held-out documents.
        """
        if not self.has_heldout:
            urls = ", ".join(store.url for store in self._stores)
            raise DataError(f"{urls}: no held-out documents. Raise data.heldout_fraction, and prepare the store again.")
        total = int(self._eval_windows()[-1])
        n_batches = -(-total // self.global_batch)
        if max_batches is not None:
            n_batches = min(n_batches, max_batches)
        return self._read_ahead(lambda batch: self.eval_rows(batch, row_indices), 0, n_batches)

    def _eval_windows(self) -> np.ndarray:
        """int64[stores + 1]: how many held-out windows there are before each store's."""
        counts = [-(-max(0, reader.n_tokens - 1) // self.seq_len) for reader in self._readers["heldout"]]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def eval_rows(self, batch_number: int, row_indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one of the batches of `eval_batches`."""
        numbers = batch_number * self.global_batch + np.asarray(row_indices, np.int64)
        draws, total, others = Draws(self.seed, 1, numbers), int(self._eval_windows()[-1]), None
        if self._objective.next_sentence and total > 1:
            others = self._read_eval(_another(numbers, np.full(len(numbers), total), draws))
        windows, lengths, text_bytes = self._read_eval(numbers)
        return make_batch(self._objective, windows, self._marks, draws, lengths, text_bytes, others)

    def _read_eval(self, numbers: np.ndarray) -> Windows:
        """The held-out windows of these numbers, with their lengths and bytes; empty behind the last."""
        firsts = self._eval_windows()
        width = self.seq_len + 1
        windows = np.zeros((len(numbers), width), self.manifests[0].dtype)
        lengths = np.zeros(len(numbers), np.int64)
        text_bytes = np.zeros((len(numbers), width), np.float32)
        for store, reader in enumerate(self._readers["heldout"]):
            for row in np.flatnonzero((numbers >= firsts[store]) & (numbers < firsts[store + 1])).tolist():
                start = int(numbers[row] - firsts[store]) * self.seq_len
                lengths[row] = min(width, reader.n_tokens - start)
                windows[row, : lengths[row]] = reader.windows(np.array([start]), int(lengths[row]))[0]
                text_bytes[row, : lengths[row]] = self._bytes_of(store, windows[row, : lengths[row]], start)
        return Windows(windows, lengths, text_bytes)

    def _bytes_of(self, store: int, tokens: np.ndarray, start: int) -> np.ndarray:
        """float32[n]: the bytes that held-out `tokens`, which begin at `start`, stand for."""
        manifest = self.manifests[store]
        if manifest.exact_bytes:
            return self._token_bytes[tokens].astype(np.float32)
        offsets, bytes_a_token = self._document_bytes(store)
        documents = np.searchsorted(offsets, np.arange(start, start + len(tokens)), side="right") - 1
        special = np.isin(tokens, [i for i in (manifest.bos_id, manifest.eos_id) if i is not None])
        return np.where(special, 0, bytes_a_token[documents])

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return self._stores[0].read("token_bytes")

    @functools.cache  # noqa: B019 (a loader lives as long as the run)
    def _document_bytes(self, store: int) -> tuple[np.ndarray, np.ndarray]:
        """Where held-out documents begin, and each one's bytes a token."""
        manifest, token_store = self.manifests[store], self._stores[store]
        offsets = token_store.read("heldout/offsets")
        special = sum(i is not None for i in (manifest.bos_id, manifest.eos_id))
        text_tokens = np.maximum(np.diff(offsets) - special, 1)
        return offsets, (token_store.read("heldout/bytes") / text_tokens).astype(np.float32)


def _another(numbers: np.ndarray, counts: np.ndarray, draws: Draws) -> np.ndarray:
    """For each of int64[n] numbers under its count another such number, each equally likely."""
    away = 1 + (draws.of_pairs()[:, 0] % (counts - 1).astype(np.uint64)).astype(np.int64)
    return (numbers + away) % counts


def process_rows(sharding: Any, global_batch: int) -> np.ndarray:
    """int64[n], ascending: the rows of a [global_batch, T] batch that this process's devices hold under `sharding`.

    Processes that share rows (a tensor axis between them) each get them.
    """
    shape = (global_batch, len(sharding.device_set))  # any length that the devices divide
    spans = {index[0].indices(global_batch)[:2] for index in sharding.addressable_devices_indices_map(shape).values()}
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def device_batches(
    batches: Iterable[dict[str, np.ndarray]], sharding: Any, global_batch: int
) -> Iterator[dict[str, Any]]:
    """Makes global arrays [global_batch, T] of this process's rows (`process_rows`), one batch ahead.

    The transfer of the next batch is started before this one is handed out, so it runs while the step does.
    """
    import jax

    rows = process_rows(sharding, global_batch)

    def place(local: np.ndarray) -> Any:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(global_batch)
            first = int(np.searchsorted(rows, start))
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((global_batch, *local.shape[1:]), sharding, part)

    iterator = iter(batches)
    try:
        ahead: dict[str, Any] | None = None
        for batch in iterator:
            placed = {name: place(array) for name, array in batch.items()}
            if ahead is not None:
                yield ahead
            ahead = placed
        if ahead is not None:
            yield ahead
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
