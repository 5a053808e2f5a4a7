"""Measures the input pipeline alone: tokens a second from a token store to batches, on one core. Prints JSON.

    python benchmarks/data_loading.py                          # a made-up store of 40 million tokens
    python benchmarks/data_loading.py --store runs/quickstart/store --seq-len 512 2048 --rows 8 64

Each shape is read from memory (the store fits in data.cache_mib) and from the store (cache_mib=0: every window is a
read through TensorStore), by `Loader.iterate`, which a run uses: Grain, reading ahead in threads.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time

import numpy as np

from maxlm.data.config import DataConfig, SourceConfig
from maxlm.data.loader import Loader
from maxlm.data.prepare import prepare
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer


def make_store(folder: str, n_tokens: int) -> str:
    """A store of about `n_tokens` tokens of made-up words, in documents of about 2,000."""
    generator = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in generator.integers(0, 26, 5)) for _ in range(2000)]
    lines = [json.dumps({"text": " ".join(generator.choice(words, 2000))}) for _ in range(64)]
    path = os.path.join(folder, "documents.jsonl")
    tokenizer = train_tokenizer(lines, TokenizerConfig(vocab_size=2500), os.path.join(folder, "tok"), progress=False)
    repeats = max(1, n_tokens // sum(len(ids) for ids in tokenizer.encode_batch(lines)))
    with open(path, "w") as file:
        for _ in range(repeats):
            file.write("\n".join(lines) + "\n")
    source = SourceConfig(kind="jsonl", paths=(path,))
    prepare(DataConfig(sources=(source,), heldout_fraction=0), tokenizer, os.path.join(folder, "store"), progress=False)
    return os.path.join(folder, "store")


def measure(store: str, seq_len: int, rows: int, cache_mib: int, seconds: float) -> dict[str, object]:
    """One shape: tokens a second of wall time and of this process's CPU time."""
    loader = Loader(DataConfig(store=store, cache_mib=cache_mib), seq_len=seq_len, global_batch=rows, seed=0)
    batches = loader.iterate(0, np.arange(rows))
    for _ in range(8):
        next(batches)
    n_batches, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        next(batches)
        n_batches += 1
    n_tokens, wall, cpu = n_batches * rows * seq_len, time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seq_len": seq_len,
        "rows": rows,
        "from": "memory" if cache_mib else "store",
        "tokens_per_second": round(n_tokens / wall),
        "tokens_per_cpu_second": round(n_tokens / cpu),
    }


def main() -> None:
    """Prints a JSON object with the store's size and a row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a token store; without it, one is made up")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens of the made-up store")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each shape")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or make_store(folder, arguments.tokens)
        core = {min(os.sched_getaffinity(0))}
        for thread in os.listdir("/proc/self/task"):  # those that preparing left, too
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(int(thread), core)
        manifest = Loader(DataConfig(store=store), seq_len=8, global_batch=1, seed=0).manifests[0]
        results = [
            measure(store, seq_len, rows, cache_mib, arguments.seconds)
            for seq_len in arguments.seq_len
            for rows in arguments.rows
            for cache_mib in (1024, 0)
        ]
    print(json.dumps({"cores": 1, "store_tokens": manifest.train.tokens, "results": results}, indent=1))


if __name__ == "__main__":
    main()
