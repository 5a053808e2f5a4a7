"""`maxlm data prepare` and `maxlm data inspect`: documents in, token store out; and what a store holds.

Many processes tokenize items of work into parts (`parts.py`); then the parts, in the items' order, are copied into the
store's shards; the manifest comes last. Killed at any moment, it goes on with the parts that are whole, and the store's
bytes are the same, as they are with any number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maxlm.data.config import DataConfig
from maxlm.data.documents import BadDocuments
from maxlm.data.parts import Job, Shard, done_name, fill_shard, make_part, plan_shards
from maxlm.data.sources import Bad, WorkItem, describe, list_work
from maxlm.data.storage import Storage, storage_errors
from maxlm.data.store import (
    FORMAT,
    MANIFEST,
    SHARD,
    SPLITS,
    WORK,
    Manifest,
    SplitCounts,
    TokenStore,
    array_shapes,
    create_array,
    open_array,
)
from maxlm.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from maxlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.progress import Progress

_JOB_FILE = f"{WORK}/job.json"
_ARRAYS = ("tokens", "offsets", "bytes")
_INLINE_BYTES = 1 << 20  # less than this is done before other processes would have started


def prepare(
    data: DataConfig,
    tokenizer: Tokenizer | TokenizerConfig | str | Path,
    out: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Writes the token store `out` (or else `data.store`) of all of `data.sources`; returns its manifest.

    A store that is already there, of the same sources and tokenizer, is left as it is.

    Raises ConfigError without a store's name; DataError for sources that cannot be read, too many bad documents, a
    tokenizer without bos and eos, or a folder that holds something else; StorageError for a full disk or no rights.
    """
    url = out or data.store
    if url is None:
        raise ConfigError("data.store is not set. Name the folder or URL to write the token store to.")
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise DataError(
            f"{tokenizer.origin}: has neither bos nor eos, so documents could not be told apart. Name one of its "
            "tokens as tokenizer.bos or tokenizer.eos."
        )
    job = Job(url, data, tokenizer)
    items = list_work(data)
    keys = [job.key(item) for item in items]
    job_hash = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    storage = Storage(url)
    with _progress(progress) as bar:
        finished = _claim(storage, job_hash)
        if finished is None:
            n_workers = _worker_count(workers or data.workers, items, storage)
            with _pool(job, n_workers) as run:
                records = _make_parts(storage, items, keys, run, bar, data.max_bad_fraction)
                finished = _write_store(storage, job, records, job_hash, run, bar)
        storage.delete(WORK)
        bar.console.print(summary(url, finished), highlight=False, soft_wrap=True)
    return finished


def summary(url: str, manifest: Manifest) -> str:
    """A store in a line."""
    train, heldout = manifest.train, manifest.heldout
    line = (
        f"{url}: {train.documents + heldout.documents:,} documents, {train.bytes + heldout.bytes:,} bytes, "
        f"{train.tokens:,} tokens to train on, {heldout.tokens:,} held out"
    )
    left_out = sum(manifest.bad.values())
    return line + (f"; {left_out:,} documents left out, listed in bad.jsonl" if left_out else "")


def _claim(storage: Storage, job_hash: str) -> Manifest | None:
    """The manifest of a finished store of this very job; None after marking the place as ours to write.

    Raises DataError where something else is there.
    """
    if storage.read(MANIFEST) is not None:
        manifest = TokenStore(storage.url).manifest
        if manifest.job != job_hash:
            raise DataError(
                f"{storage.url}: holds a token store of other documents, another tokenizer or other settings. Name "
                "another data.store, or remove this one and run it again."
            )
        return manifest
    if storage.read(_JOB_FILE) is None:
        names = [name for folder in (*SPLITS, WORK, "tokenizer", "token_bytes") for name in storage.list(folder)]
        if names:
            raise DataError(
                f"{storage.where(names[0])}: this folder holds something that is no token store of maxlm's. Name "
                "another data.store, or clear it."
            )
    storage.write(_JOB_FILE, json.dumps({"unfinished": "maxlm token store", "job": job_hash}).encode())
    return None


def _worker_count(asked: int, items: list[WorkItem], storage: Storage) -> int:
    if storage.spec["driver"] == "memory" or sum(item.size for item in items) < _INLINE_BYTES:
        return 1
    return min(
        asked or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)),
        len(items),
    )


Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[tuple[int, Any]]]


@contextlib.contextmanager
def _pool(job: Job, n_workers: int) -> Iterator[Run]:
    """Gives `run(function, tasks)`: function(job, *task) for each task, as (number, result) in any order."""
    if n_workers == 1:
        yield lambda function, tasks: ((i, function(job, *task)) for i, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")  # nothing of this process's threads is copied
    pool = ProcessPoolExecutor(n_workers, context, _start_worker, (job,))

    def run(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        numbered = enumerate(tasks)
        waiting: dict[Future, int] = {}
        while True:
            for number, task in numbered:
                waiting[pool.submit(_in_worker, function, task)] = number
                if len(waiting) >= 4 * n_workers:  # a corpus may be millions of tasks
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise DataError(
            "a process that prepares documents died; most often memory ran out. Run it again with fewer data.workers: "
            "what is finished is kept. (From a Python script, call it under `if __name__ == '__main__':`.)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_job: Job | None = None


def _start_worker(job: Job) -> None:
    global _worker_job
    _worker_job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are what runs in parallel
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:  # else a worker waits forever when its parent was killed

        def leave_with_parent() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=leave_with_parent, daemon=True).start()


def _in_worker(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(_worker_job, *task)


def _make_parts(
    storage: Storage, items: list[WorkItem], keys: list[str], run: Run, bar: Progress, max_bad_fraction: float
) -> list[dict[str, Any]]:
    """Every item's part, made or found finished; their records in order. Raises DataError for too many bad."""
    records: list[dict[str, Any] | None] = [_finished_part(storage, n, key) for n, key in _existing(storage, keys)]
    task = bar.add_task("Tokenizing", total=sum(item.size for item in items), note="")
    seen, n_tokens = BadDocuments(max_bad_fraction), 0

    def count(item: WorkItem, record: dict[str, Any]) -> None:
        nonlocal n_tokens
        _count(seen, record)
        n_tokens += sum(counts[1] for chunk in record["chunks"] for counts in chunk.values())
        n_bad = f", {seen.kinds.total():,} bad" if seen.kinds else ""
        bar.update(task, advance=item.size, note=f"{seen.good:,} documents, {n_tokens:,} tokens{n_bad}")

    for item, record in zip(items, records, strict=True):
        if record is not None:
            count(item, record)
    todo = [number for number, record in enumerate(records) if record is None]
    for place, record in run(make_part, ((number, items[number]) for number in todo)):
        records[todo[place]] = record
        count(items[todo[place]], record)
        seen.check(final=False)
    whole = [record for record in records if record is not None]
    in_order = BadDocuments(max_bad_fraction)
    for record in whole:
        _count(in_order, record)
    in_order.check(final=True)
    return whole


def _existing(storage: Storage, keys: list[str]) -> Iterator[tuple[int, str | None]]:
    """Each part's number, and its key if there is a done.json to compare it with."""
    names = set(storage.list(WORK))
    return ((n, key if done_name(n) in names else None) for n, key in enumerate(keys))


def _finished_part(storage: Storage, number: int, key: str | None) -> dict[str, Any] | None:
    if key is None:
        return None
    with contextlib.suppress(ValueError):
        record = json.loads(storage.read(done_name(number)) or b"{}")
        if record.get("key") == key:
            return record
    return None


def _count(bad: BadDocuments, record: dict[str, Any]) -> None:
    bad.good += record["good"]
    bad.kinds.update(record["bad"])
    bad.examples += [Bad(*example) for example in record["examples"]]


def _write_store(
    storage: Storage, job: Job, records: list[dict[str, Any]], job_hash: str, run: Run, bar: Progress
) -> Manifest:
    """Copies the parts into the store's arrays, then writes the rest, and the manifest last."""
    totals = {s: np.array([c[s] for r in records for c in r["chunks"]], np.int64).sum(axis=0).tolist() for s in SPLITS}
    counts = {s: SplitCounts(documents=d, tokens=t, bytes=b) for s, (d, t, b) in totals.items()}
    if not counts["train"].tokens:
        raise DataError(
            f"{job.url}: no documents to train on: data.sources have none, or all fell to the held-out split."
        )
    for folder in (*SPLITS, "token_bytes", "tokenizer"):
        storage.delete(folder)
    for split in SPLITS:
        for name, size, dtype in array_shapes(split, counts[split], job.dtype):
            create_array(storage, name, size, dtype)
    shards = [s for split in SPLITS for array in _ARRAYS for s in plan_shards(array, split, records, SHARD)]
    hashes = [""] * len(shards)
    task = bar.add_task("Writing", total=len(shards), note="")
    for number, digest in run(fill_shard, ((shard,) for shard in shards)):
        hashes[number] = digest
        bar.advance(task)
    _write_token_bytes(storage, job.tokenizer)
    for name, content in job.tokenizer.files().items():
        storage.write(f"tokenizer/{name}", content)
    storage.write("bad.jsonl", _bad_lines(records))
    bad: dict[str, int] = {}
    for record in records:
        for kind, count in record["bad"].items():
            bad[kind] = bad.get(kind, 0) + count
    manifest = Manifest(
        format=FORMAT,
        tokenizer=job.tokenizer.fingerprint,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype,  # pyright: ignore[reportArgumentType]
        bos_id=job.tokenizer.bos_id,
        eos_id=job.tokenizer.eos_id,
        exact_bytes=job.tokenizer.exact_bytes,
        train=counts["train"],
        heldout=counts["heldout"],
        bad=dict(sorted(bad.items())),
        sources=tuple(describe(source) for source in job.data.sources),
        job=job_hash,
        fingerprint=content_fingerprint(job.tokenizer.fingerprint, shards, hashes),
    )
    storage.write(MANIFEST, manifest.to_json())
    return manifest


def content_fingerprint(tokenizer: str, shards: Iterable[Shard], hashes: Iterable[str]) -> str:
    """A store's fingerprint: of its tokenizer and of each shard's content."""
    rows = [[shard.split, shard.array, shard.start, digest] for shard, digest in zip(shards, hashes, strict=True)]
    return hashlib.sha256(json.dumps([tokenizer, rows]).encode()).hexdigest()


def _write_token_bytes(storage: Storage, tokenizer: Tokenizer) -> None:
    create_array(storage, "token_bytes", tokenizer.vocab_size, "int32")
    with storage_errors(storage.where("token_bytes")):
        open_array(storage, "token_bytes", write=True)[:].write(tokenizer.token_byte_lengths()).result()


def _bad_lines(records: list[dict[str, Any]]) -> bytes:
    examples = [example for record in records for example in record["examples"]]
    rows = [dict(zip(("kind", "place", "message"), example, strict=True)) for example in examples]
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:<10}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True, quiet=not show)) as bar:
        yield bar


def inspect(url: str, *, samples: int = 3, verify: bool = True) -> dict[str, Any]:
    """What a store holds, in plain values: counts, bytes a token, bad documents, decoded beginnings of documents.

    With `verify`, every token is read and the store's fingerprint computed again.

    Raises DataError, which names the array, where the store is damaged.
    """
    store = TokenStore(url)
    manifest = store.manifest
    tokenizer = store.tokenizer()
    facts: dict[str, Any] = {"store": url, **manifest.model_dump(mode="json")}
    tokens = manifest.train.tokens + manifest.heldout.tokens
    facts["bytes_per_token"] = (manifest.train.bytes + manifest.heldout.bytes) / tokens if tokens else None
    facts["samples"] = [_sample(store, tokenizer, split, i) for split, i in _sample_documents(manifest, samples)]
    if verify:
        _verify(store)
    facts["verified"] = verify
    return facts


def _sample_documents(manifest: Manifest, samples: int) -> list[tuple[str, int]]:
    n_documents = manifest.train.documents
    chosen = [("train", i * n_documents // samples) for i in range(min(samples, n_documents))]
    return [*chosen, ("heldout", 0)] if manifest.heldout.documents else chosen


def _sample(store: TokenStore, tokenizer: Tokenizer, split: str, document: int) -> dict[str, Any]:
    start, stop = store.read(f"{split}/offsets", document, document + 2).tolist()
    tokens = store.read(f"{split}/tokens", start, min(stop, start + 64)).tolist()
    text = tokenizer.decode(tokens, skip_specials=False)
    return {"split": split, "document": document, "tokens": stop - start, "text": text}


def _verify(store: TokenStore) -> None:
    manifest = store.manifest
    shards, hashes = [], []
    for split in SPLITS:
        for name, size, _ in array_shapes(split, manifest.counts(split), manifest.dtype):
            for start in range(0, size, SHARD):
                content = store.read(name, start, min(start + SHARD, size))
                shards.append(Shard(split, name.split("/")[1], start, ()))
                hashes.append(hashlib.sha256(content.tobytes()).hexdigest())
    if content_fingerprint(manifest.tokenizer, shards, hashes) != manifest.fingerprint:
        raise DataError(
            f"{store.url}: the tokens are not those that were prepared: the store's fingerprint differs. Remove the "
            "store and make it again with `maxlm data prepare`."
        )
