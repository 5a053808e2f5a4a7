"""What a process of `prepare` does: turns an item of documents into a part, and parts into shards of the store.

A part lies under STORE/work/NUMBER/: tokens, documents' lengths and bytes for each split, in chunks that bound memory,
and done.json, written last. A part that has no done.json, or one of other work, is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maxlm.data.config import DataConfig
from maxlm.data.documents import BadDocuments, is_heldout
from maxlm.data.sources import Bad, Document, WorkItem, read_item
from maxlm.data.storage import Storage, storage_errors
from maxlm.data.store import FORMAT, SPLITS, WORK, open_array
from maxlm.data.tokenizer import Tokenizer
from maxlm.errors import DataError

_CHUNK_TOKENS = 1 << 22
_BATCH_DOCUMENTS, _BATCH_BYTES = 256, 1 << 20
KINDS = ("tokens", "lengths", "bytes")


@dataclass(frozen=True)
class Job:
    """What all processes of one `prepare` know."""

    url: str
    data: DataConfig
    tokenizer: Tokenizer

    @property
    def dtype(self) -> str:
        """What a token is stored as."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def key(self, item: WorkItem) -> str:
        """By what a finished part is known to be of this item, these files and these settings."""
        source = self.data.sources[item.source].model_dump(mode="json")
        facts = [FORMAT, self.tokenizer.fingerprint, self.data.heldout_fraction, source, item.fingerprint()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class _Rows:
    """A split's documents that are not written yet."""

    tokens: list[np.ndarray] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def arrays(self, dtype: str) -> dict[str, np.ndarray]:
        lengths = np.array([len(tokens) for tokens in self.tokens], np.int64)
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, dtype)
        return {"tokens": tokens, "lengths": lengths, "bytes": np.array(self.bytes, np.int64)}


def done_name(number: int) -> str:
    """The file that says that part `number` is whole."""
    return f"{WORK}/{number:06d}/done.json"


def chunk_name(number: int, chunk: int, split: str, kind: str) -> str:
    """The file of one chunk of part `number`."""
    return f"{WORK}/{number:06d}/{chunk}.{split}.{kind}"


def make_part(job: Job, number: int, item: WorkItem) -> dict[str, Any]:
    """Tokenizes an item's documents into part `number`; returns what its done.json says.

    Raises DataError where files cannot be read or too many documents are bad; StorageError where it cannot be written.
    """
    storage = Storage(job.url)
    bad = BadDocuments(job.data.max_bad_fraction)
    rows = {split: _Rows() for split in SPLITS}
    chunks: list[dict[str, list[int]]] = []
    waiting = 0
    for documents in _batches(read_item(item, job.data), bad):
        for document, ids in zip(documents, job.tokenizer.encode_batch([d.text for d in documents]), strict=True):
            row = rows["heldout" if is_heldout(document, job.data.heldout_fraction) else "train"]
            row.tokens.append(_frame(document, ids, job))
            row.bytes.append(len(document.raw))
            waiting += len(row.tokens[-1])
        if waiting >= _CHUNK_TOKENS:
            chunks.append(_write_chunk(storage, job.dtype, number, len(chunks), rows))
            rows, waiting = {split: _Rows() for split in SPLITS}, 0
    chunks.append(_write_chunk(storage, job.dtype, number, len(chunks), rows))
    record = {
        "key": job.key(item),
        "chunks": chunks,
        "good": bad.good,
        "bad": dict(bad.kinds),
        "examples": [[example.kind, example.place, example.message] for example in bad.examples],
    }
    storage.write(done_name(number), json.dumps(record).encode())
    return record


def _batches(documents: Iterator[Document | Bad], bad: BadDocuments) -> Iterator[list[Document]]:
    """Documents enough to tokenize at a time; bad ones are counted and left out."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if isinstance(document, Bad):
            bad.add(document)
            bad.check(final=False)
            continue
        bad.good += 1
        batch.append(document)
        size += len(document.raw)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _frame(document: Document, ids: list[int], job: Job) -> np.ndarray:
    """[bos] ids [eos]. Raises DataError where the text itself gave either, since they must tell documents apart."""
    bos, eos = job.tokenizer.bos_id, job.tokenizer.eos_id
    inside = np.array(ids, job.dtype)
    if any(i is not None and (inside == i).any() for i in (bos, eos)):
        raise DataError(
            f"{document.place or 'a document'}: its text gives the tokenizer's bos or eos token, which must only stand "
            "between documents. Choose other tokens for tokenizer.bos and tokenizer.eos."
        )
    ends = [np.array([] if i is None else [i], job.dtype) for i in (bos, eos)]
    return np.concatenate([ends[0], inside, ends[1]])


def _write_chunk(storage: Storage, dtype: str, number: int, chunk: int, rows: dict[str, _Rows]) -> dict[str, list[int]]:
    """Writes a chunk's files; returns each split's documents, tokens and bytes."""
    counts = {}
    for split in SPLITS:
        arrays = rows[split].arrays(dtype)
        counts[split] = [len(arrays["lengths"]), len(arrays["tokens"]), int(arrays["bytes"].sum())]
        if counts[split][0]:
            for kind in KINDS:
                storage.write(chunk_name(number, chunk, split, kind), arrays[kind].tobytes())
    return counts


@dataclass(frozen=True)
class Take:
    """Documents or tokens [skip, skip + count) of one chunk of a part; `base` is the tokens of the split before it."""

    number: int
    chunk: int
    size: int
    skip: int
    count: int
    base: int


@dataclass(frozen=True)
class Shard:
    """One shard of one array of the store, and what it is made from."""

    split: str
    array: str  # tokens, offsets or bytes
    start: int
    takes: tuple[Take, ...]
    last: tuple[int, ...] = ()  # what follows the takes: the offsets array ends with the number of tokens


def plan_shards(array: str, split: str, records: list[dict[str, Any]], shard_size: int) -> list[Shard]:
    """Cuts an array of the store into shards, and says which chunks of which parts each is made from."""
    chunks = [(n, c, *counts[split]) for n, record in enumerate(records) for c, counts in enumerate(record["chunks"])]
    sizes = np.array([tokens if array == "tokens" else documents for _, _, documents, tokens, _ in chunks], np.int64)
    ends = np.cumsum(sizes)
    bases = np.cumsum([0, *(tokens for _, _, _, tokens, _ in chunks)])
    total = int(ends[-1])
    whole = total + (array == "offsets")
    shards = []
    for start in range(0, whole, shard_size):
        stop = min(start + shard_size, whole)
        takes = []
        first = int(np.searchsorted(ends, start, side="right"))
        for i in range(first, int(np.searchsorted(ends - sizes, stop, side="left"))):
            begin = int(ends[i] - sizes[i])
            skip, end = max(0, start - begin), min(int(sizes[i]), stop - begin)
            if end > skip:
                takes.append(Take(*chunks[i][:2], int(sizes[i]), skip, end - skip, int(bases[i])))
        shards.append(Shard(split, array, start, tuple(takes), (int(bases[-1]),) if stop > total else ()))
    return shards


def fill_shard(job: Job, shard: Shard) -> str:
    """Writes a shard from the parts; returns the sha256 of its content."""
    storage = Storage(job.url)
    dtype = job.dtype if shard.array == "tokens" else "int64"
    content = np.concatenate(
        [*(_taken(job, storage, shard, take) for take in shard.takes), np.array(shard.last, dtype)]
    )
    name = f"{shard.split}/{shard.array}"
    with storage_errors(storage.where(name)):
        open_array(storage, name, write=True)[shard.start : shard.start + len(content)].write(content).result()
    return hashlib.sha256(content.tobytes()).hexdigest()


def _taken(job: Job, storage: Storage, shard: Shard, take: Take) -> np.ndarray:
    kind = {"tokens": "tokens", "offsets": "lengths", "bytes": "bytes"}[shard.array]
    name = chunk_name(take.number, take.chunk, shard.split, kind)
    raw = storage.read(name) or b""
    dtype = np.dtype(job.dtype if kind == "tokens" else np.int64)
    if len(raw) != take.size * dtype.itemsize:
        raise DataError(
            f"{storage.where(name)}: has {len(raw)} bytes, expected {take.size * dtype.itemsize}. Is another "
            f"`maxlm data prepare` at work here, or was it edited? Remove {storage.where(WORK)} and run it again."
        )
    values = np.frombuffer(raw, dtype)
    if shard.array == "offsets":
        values = take.base + np.cumsum(values) - values
    return values[take.skip : take.skip + take.count]
