import itertools
import json
import shutil
import time

import jax
import numpy as np
import pytest

from maxlm.data.config import DataConfig, StoreWeight
from maxlm.data.loader import Loader, device_batches, process_rows
from maxlm.data.prepare import prepare
from maxlm.data.store import TokenStore
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.errors import ConfigError, DataError
from maxlm.parallel.mesh import MeshConfig, make_mesh
from tests.data.corpus import jsonl_config, make_texts, write_jsonl
from tests.processes import run_processes

T, B = 32, 8
ROWS = np.arange(B)


def make_loader(store: str, **settings) -> Loader:
    """A loader of rows of T tokens, B at a time; keys of DataConfig and arguments of Loader, each by name."""
    arguments = {"seq_len": T, "global_batch": B, "seed": 1}
    arguments |= {name: settings.pop(name) for name in (*arguments, "split", "tokenizer") if name in settings}
    return Loader(DataConfig(store=None if "mixture" in settings else store, **settings), **arguments)


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def window_numbers(loader: Loader, store: str, steps: range) -> list[int]:
    """Which windows of the store the rows of `steps` are, found by their tokens."""
    tokens = TokenStore(store).read("train/tokens").astype(np.int32)
    n_windows = (len(tokens) - 1) // T
    known = {tokens[w * T : w * T + T + 1].tobytes(): w for w in range(n_windows)}
    assert len(known) == n_windows, "the test's windows must differ"
    batches = [loader.rows(step, ROWS) for step in steps]
    joined = [np.concatenate([b["inputs"], b["targets"][:, -1:]], axis=1) for b in batches]
    return [known[np.ascontiguousarray(row).tobytes()] for batch in joined for row in batch]


def test_an_epoch_is_every_window_once_in_another_order_each_time(store):
    loader = make_loader(store)
    n_windows = (loader.manifests[0].train.tokens - 1) // T
    seen = window_numbers(loader, store, range(2 * n_windows // B + 1))
    first, second = seen[:n_windows], seen[n_windows : 2 * n_windows]
    assert sorted(first) == sorted(second) == list(range(n_windows))
    assert first != second
    assert first != sorted(first)


def test_without_shuffling_windows_come_in_order(store):
    assert window_numbers(make_loader(store, shuffle=False), store, range(3)) == list(range(3 * B))


def test_rows_are_a_pure_function_of_seed_and_step(store):
    one, other = make_loader(store), make_loader(store)
    assert equal(one.rows(9, ROWS), other.rows(9, ROWS))
    assert not equal(one.rows(9, ROWS), one.rows(10, ROWS))
    assert not equal(one.rows(9, ROWS), make_loader(store, seed=2).rows(9, ROWS))


@pytest.mark.parametrize("start", [0, 3, 10**9])
def test_iterator_starts_at_any_step(store, start):
    loader = make_loader(store)
    batches = loader.iterate(start, ROWS)
    for step in range(start, start + 6):
        assert equal(next(batches), loader.rows(step, ROWS))
    batches.close()


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_processes_together_read_the_global_batch(store, n_processes):
    whole = make_loader(store).rows(5, ROWS)
    parts = [make_loader(store).rows(5, rows) for rows in np.split(ROWS, n_processes)]
    assert equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_reading_from_the_store_equals_reading_from_memory(store):
    in_memory, by_reads = make_loader(store), make_loader(store, cache_mib=0)
    for step in range(5):
        assert equal(in_memory.rows(step, ROWS), by_reads.rows(step, ROWS))
    evaluated = zip(in_memory.eval_batches(ROWS), by_reads.eval_batches(ROWS), strict=True)
    assert all(equal(one, other) for one, other in evaluated)


def test_documents_in_a_row_are_told_apart(store, tokenizer):
    batch = make_loader(store, shuffle=False).rows(0, ROWS)
    inputs, segments, positions = (batch[name] for name in ("inputs", "segments", "positions"))
    begins = inputs == tokenizer.bos_id
    assert begins[:, 1:].any()
    assert (np.diff(segments, axis=1) == begins[:, 1:]).all()
    assert (segments[:, 0] == 1).all()
    assert (positions[begins] == 0).all()
    assert (batch["weights"][inputs == tokenizer.eos_id] == 0).all()
    assert (batch["weights"][inputs != tokenizer.eos_id] == 1).all()


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory, tokenizer):
    """Two stores of different size and text."""
    folder = tmp_path_factory.mktemp("two")
    urls = []
    for name, n in (("small", 40), ("large", 300)):
        path = write_jsonl(folder / f"{name}.jsonl", make_texts(n, seed=n))
        prepare(jsonl_config(path, heldout_fraction=0.2), tokenizer, str(folder / name), progress=False)
        urls.append(str(folder / name))
    return urls


def mixture_of(urls: list[str], weights: list[float]) -> tuple[StoreWeight, ...]:
    return tuple(StoreWeight(store=url, weight=weight) for url, weight in zip(urls, weights, strict=True))


def test_mixture_has_its_proportions_and_each_store_its_own_epochs(two_stores):
    loader = make_loader("", mixture=mixture_of(two_stores, [3, 1]))
    sizes = [(manifest.train.tokens - 1) // T for manifest in loader.manifests]
    known = {}
    for number, (url, size) in enumerate(zip(two_stores, sizes, strict=True)):
        tokens = TokenStore(url).read("train/tokens").astype(np.int32)
        known |= {tokens[w * T : w * T + T].tobytes(): (number, w) for w in range(size)}
    steps = 4 * sizes[0] // B
    found = [known[row.tobytes()] for step in range(steps) for row in loader.rows(step, ROWS)["inputs"]]
    small = [window for number, window in found if number == 0]
    assert abs(len(small) - 0.75 * len(found)) < 2
    assert sorted(small[: sizes[0]]) == sorted(small[sizes[0] : 2 * sizes[0]]) == list(range(sizes[0]))
    assert loader.epochs(steps) == [len(small) / sizes[0], (len(found) - len(small)) / sizes[1]]


def test_evaluation_predicts_every_heldout_token_once(two_stores):
    loader = make_loader("", mixture=mixture_of(two_stores, [1, 1]))
    batches = list(loader.eval_batches(ROWS))
    targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    stored = [TokenStore(url).read("heldout/tokens") for url in two_stores]
    bos = loader.manifests[0].bos_id
    assert targets.tolist() == np.concatenate([tokens[tokens != bos] for tokens in stored]).tolist()
    last = batches[-1]
    padding = last["segments"] == 0
    assert padding.any()
    assert not last["weights"][padding].any()
    assert not last["inputs"][padding].any()


def test_target_bytes_add_up_to_the_heldout_bytes(store):
    batches = list(make_loader(store).eval_batches(ROWS))
    total = sum(float(batch["target_bytes"].sum()) for batch in batches)
    assert total == TokenStore(store).manifest.heldout.bytes
    assert all(batch["target_bytes"].dtype == np.float32 for batch in batches)
    assert not any(batch["target_bytes"][batch["weights"] == 0].any() for batch in batches)


def test_target_bytes_add_up_for_tokenizers_that_lose_spaces(texts, tmp_path):
    config = TokenizerConfig(kind="wordpiece", vocab_size=300)
    tokenizer = train_tokenizer(texts, config, tmp_path / "tokenizer", progress=False)
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.2)
    manifest = prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    batches = make_loader(str(tmp_path / "store")).eval_batches(ROWS)
    assert sum(float(b["target_bytes"].sum()) for b in batches) == pytest.approx(manifest.heldout.bytes, rel=1e-5)


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_processes_together_evaluate_the_same_batches(store, n_processes):
    whole = list(make_loader(store).eval_batches(ROWS))
    parts = [list(make_loader(store).eval_batches(rows)) for rows in np.split(ROWS, n_processes)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batch}
        assert equal(batch, joined)


def test_evaluation_may_be_cut_short(store):
    loader = make_loader(store)
    short = list(loader.eval_batches(ROWS, max_batches=2))
    assert len(short) == 2
    assert all(equal(one, other) for one, other in zip(short, loader.eval_batches(ROWS), strict=False))


def test_fingerprint_changes_with_whatever_changes_the_batches(store, two_stores):
    base = make_loader(store).fingerprint
    assert base == make_loader(store, prefetch=9, cache_mib=0).fingerprint
    assert json.loads(json.dumps(base)) == base
    others = [
        make_loader(store, seed=2),
        make_loader(store, seq_len=16),
        make_loader(store, global_batch=4),
        make_loader(store, shuffle=False),
        make_loader(store, split="heldout"),
        make_loader(two_stores[0]),
        make_loader("", mixture=mixture_of(two_stores, [1, 2])),
        make_loader("", mixture=mixture_of(two_stores, [2, 1])),
    ]
    assert len({json.dumps(loader.fingerprint) for loader in others} | {json.dumps(base)}) == 9


def test_what_cannot_be_loaded_is_refused(store, two_stores, tmp_path, texts):
    with pytest.raises(ConfigError, match=r"data\.store is not set"):
        Loader(DataConfig(), seq_len=T, global_batch=B, seed=0)
    with pytest.raises(ValueError, match="both given"):
        DataConfig(store=store, mixture=mixture_of(two_stores, [1, 1]))
    with pytest.raises(DataError, match=r"no such file, so there is no token store"):
        make_loader(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"train\.seq_len"):
        make_loader(store, seq_len=10**6)
    other = train_tokenizer(texts[:50], TokenizerConfig(vocab_size=280), tmp_path / "tokenizer", progress=False)
    with pytest.raises(DataError, match="made with another tokenizer"):
        make_loader(store, tokenizer=other)
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0)
    prepare(data, other, str(tmp_path / "other"), progress=False)
    with pytest.raises(DataError, match="different tokenizers"):
        make_loader("", mixture=mixture_of([store, str(tmp_path / "other")], [1, 1]))
    loader = make_loader(str(tmp_path / "other"))
    assert not loader.has_heldout
    with pytest.raises(DataError, match=r"data\.heldout_fraction"):
        loader.eval_batches(ROWS)


@pytest.mark.parametrize("cache_mib", [0, 100])
def test_damaged_tokens_are_named_when_a_batch_needs_them(store, tmp_path, cache_mib):
    shutil.copytree(store, tmp_path / "copy")
    path = tmp_path / "copy" / "train" / "tokens" / "c" / "0"
    content = bytearray(path.read_bytes())
    content[50] ^= 255
    path.write_bytes(content)
    loader = make_loader(str(tmp_path / "copy"), cache_mib=cache_mib, shuffle=False)
    with pytest.raises(DataError, match="train/tokens: damaged"):
        next(loader.iterate(0, ROWS))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, context=2)]
)
def test_batches_on_devices_hold_the_rows(store, mesh):
    made = make_mesh(mesh)
    sharding = jax.NamedSharding(made, jax.P(("data", "fsdp"), "context"))
    loader = make_loader(store)
    rows = process_rows(sharding, B)
    assert rows.tolist() == ROWS.tolist()
    with jax.set_mesh(made):
        batches = device_batches(loader.iterate(4, rows), sharding, B)
        for step, batch in zip(range(4, 7), batches, strict=False):
            assert all(array.sharding == sharding and array.shape == (B, T) for array in batch.values())
            assert equal({name: np.asarray(array) for name, array in batch.items()}, loader.rows(step, ROWS))
        batches.close()


def test_the_next_batch_is_sent_before_this_one_is_handed_out():
    sharding = jax.NamedSharding(make_mesh(MeshConfig(data=8, fsdp=1)), jax.P("data"))
    pulled = []

    def source():
        for number in range(4):
            pulled.append(number)
            yield {"inputs": np.full((B, T), number, np.int32)}

    for number, batch in enumerate(device_batches(source(), sharding, B)):
        assert (np.asarray(batch["inputs"]) == number).all()
        assert pulled == list(range(min(number + 2, 4)))
    assert len(pulled) == 4


def test_closing_the_batches_closes_their_source():
    sharding = jax.NamedSharding(make_mesh(MeshConfig(data=8, fsdp=1)), jax.P("data"))
    closed = []

    def source():
        try:
            for number in itertools.count():
                yield {"inputs": np.full((B, T), number, np.int32)}
        finally:
            closed.append(True)

    batches = device_batches(source(), sharding, B)
    next(batches)
    batches.close()
    assert closed == [True]


ACROSS_PROCESSES = """
import sys
import numpy as np
from maxlm.parallel import distributed
distributed.initialize(distributed.DistributedConfig(timeout_seconds=60))
import jax
from maxlm.data.config import DataConfig
from maxlm.data.loader import Loader, device_batches, process_rows
loader = Loader(DataConfig(store=sys.argv[1]), seq_len=32, global_batch=8, seed=1)
whole = loader.rows(7, np.arange(8))
devices = np.array(sorted(jax.devices(), key=lambda d: d.id)).reshape(jax.process_count(), -1)
for order, n_rows in ((devices, 8 // jax.process_count()), (devices.T, 8)):  # tensor within processes, then across them
    mesh = jax.sharding.Mesh(order, ("data", "tensor"))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    rows = process_rows(sharding, 8)
    assert len(rows) == n_rows, rows
    batch = next(device_batches(loader.iterate(7, rows), sharding, 8))
    for name, array in batch.items():
        assert array.shape == (8, 32)
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), whole[name][shard.index]), name
print("RESULT ok")
"""


@pytest.mark.processes
def test_processes_hold_their_rows_of_the_global_batch_even_with_tensor_between_them(store):
    results = run_processes(2, ["-c", ACROSS_PROCESSES, store], devices_per_process=2)
    assert [result.stdout.count("RESULT ok") for result in results] == [1, 1]


@pytest.mark.parametrize("cache_mib", [64, 0], ids=["from memory", "from the store"])
def test_the_pipeline_alone_gives_five_million_tokens_for_each_second_of_a_core(store, cache_mib):
    """CPU time of the whole process, all threads of it, so that other work on the machine does not count."""
    rows, seq_len, n_batches = 64, 512, 60
    loader = make_loader(store, seq_len=seq_len, global_batch=rows, cache_mib=cache_mib)
    rates = []
    for _ in range(3):
        batches = loader.iterate(0, np.arange(rows))
        next(batches)
        began = time.process_time()
        for _ in range(n_batches):
            next(batches)
        rates.append(n_batches * rows * seq_len / (time.process_time() - began))
        batches.close()
    assert max(rates) > 5e6, rates
