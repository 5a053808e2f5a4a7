import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm.data import prepare as preparing
from maxlm.data import store as stores
from maxlm.data.config import DataConfig
from maxlm.data.prepare import inspect, prepare
from maxlm.data.store import TokenStore
from maxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from maxlm.errors import ConfigError, DataError, StorageError
from tests.data.corpus import jsonl_config, make_texts, write_jsonl
from tests.processes import ROOT

PREPARE = """
import json, sys
from maxlm.data.config import DataConfig
from maxlm.data.prepare import prepare
from maxlm.errors import MaxlmError
if __name__ == "__main__":
    data, tokenizer, out, workers = sys.argv[1:]
    try:
        prepare(DataConfig.model_validate_json(data), tokenizer, out, int(workers), progress=False)
    except MaxlmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


def start(data: DataConfig, tokenizer: Path, out: Path, workers: int, **options) -> subprocess.Popen[str]:
    """`prepare` in a process of its own, with a process group of its own."""
    arguments = [sys.executable, "-c", PREPARE, data.model_dump_json(), str(tokenizer), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True, **options
    )


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def alive(group: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Some megabytes of JSONL with a few bad lines, and a saved tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{i} {text} {text} {text}" for i, text in enumerate(make_texts(6000, seed=3))]
    path = write_jsonl(folder / "a.jsonl", texts)
    with path.open("a") as file:
        file.write("\n{broken\n")
    assert path.stat().st_size > 4 * 2**20
    tokenizer.save(folder / "tokenizer")
    return jsonl_config(path, heldout_fraction=0.05), folder / "tokenizer"


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The store that one process makes of the corpus."""
    data, tokenizer = corpus
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    prepare(data, tokenizer, str(out), 1, progress=False)
    return out


@pytest.mark.processes
@pytest.mark.parametrize("workers", [2, 3])
def test_store_does_not_depend_on_the_number_of_processes(corpus, undisturbed, tmp_path, workers):
    prepare(*corpus, str(tmp_path / "store"), workers, progress=False)
    assert contents(tmp_path / "store") == contents(undisturbed)


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_and_run_again_gives_the_same_bytes_and_leaves_no_process(corpus, undisturbed, tmp_path):
    out = tmp_path / "store"
    process = start(*corpus, out, 2)
    deadline = time.monotonic() + 60
    while not list(out.glob("work/*/done.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="was not finished"):
        TokenStore(str(out))
    while alive(process.pid):
        assert time.monotonic() < deadline, "its workers outlive it"
        time.sleep(0.02)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("work/*/done.json")}
    made = []
    original = preparing.make_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "make_part", lambda job, n, item: made.append(n) or original(job, n, item))
        prepare(*corpus, str(out), 1, progress=False)
    assert sorted([*made, *(int(path.parent.name) for path in finished)]) == list(range(len(made) + len(finished)))
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize("write", range(1, 30, 4))
def test_stopped_at_any_write_and_run_again_gives_the_same_bytes(texts, tokenizer, tmp_path, monkeypatch, write):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts[:50]), heldout_fraction=0.2)
    prepare(data, tokenizer, str(tmp_path / "whole"), progress=False)
    written = 0
    original = preparing.Storage.write

    def stops(self, name, content):
        nonlocal written
        written += 1
        if written == write:
            raise KeyboardInterrupt
        original(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(preparing.Storage, "write", stops)
        try:
            prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
            assert written < write
        except KeyboardInterrupt:
            with pytest.raises(DataError, match=r"manifest\.json"):
                TokenStore(str(tmp_path / "store"))
    prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_many_shards_hold_what_one_does(texts, tokenizer, tmp_path, monkeypatch):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.1)
    prepare(data, tokenizer, str(tmp_path / "one"), progress=False)
    monkeypatch.setattr(stores, "CHUNK", 32)
    monkeypatch.setattr(stores, "SHARD", 128)
    monkeypatch.setattr(preparing, "SHARD", 128)
    monkeypatch.setattr("maxlm.data.parts._CHUNK_TOKENS", 700)
    monkeypatch.setattr("maxlm.data.parts._BATCH_DOCUMENTS", 3)
    prepare(data, tokenizer, str(tmp_path / "many"), progress=False)
    one, many = TokenStore(str(tmp_path / "one")), TokenStore(str(tmp_path / "many"))
    assert len(list((tmp_path / "many" / "train" / "tokens" / "c").iterdir())) > 50
    for split in ("train", "heldout"):
        for array in ("tokens", "offsets", "bytes"):
            assert (one.read(f"{split}/{array}") == many.read(f"{split}/{array}")).all()
    assert inspect(str(tmp_path / "many"))["verified"]


def test_finished_store_is_left_as_it_is(texts, tokenizer, tmp_path):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts))
    first = prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    assert prepare(data, tokenizer, str(tmp_path / "store"), progress=False) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}


def test_store_of_other_documents_is_not_overwritten(texts, tokenizer, tmp_path):
    out = str(tmp_path / "store")
    prepare(jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer, out, progress=False)
    before = contents(tmp_path / "store")
    with pytest.raises(DataError, match="holds a token store of other documents"):
        prepare(jsonl_config(write_jsonl(tmp_path / "b.jsonl", texts)), tokenizer, out, progress=False)
    assert contents(tmp_path / "store") == before


def test_folder_with_something_else_is_not_touched(texts, tokenizer, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious.txt").write_text("years of work")
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts))
    with pytest.raises(DataError, match=r"train/precious\.txt: this folder holds something"):
        prepare(data, tokenizer, str(tmp_path), progress=False)
    assert (tmp_path / "train" / "precious.txt").read_text() == "years of work"


def test_parts_of_changed_documents_are_made_anew(texts, tokenizer, tmp_path):
    out = tmp_path / "store"
    bad = write_jsonl(tmp_path / "a.jsonl", ["", *texts[:20]])
    with pytest.raises(DataError, match="cannot be used"):
        prepare(jsonl_config(bad), tokenizer, str(out), progress=False)
    manifest = prepare(jsonl_config(write_jsonl(bad, texts[:20])), tokenizer, str(out), progress=False)
    assert manifest.train.documents + manifest.heldout.documents == 20
    assert not manifest.bad


def test_bad_documents_are_counted_and_listed(corpus, undisturbed):
    manifest = TokenStore(str(undisturbed)).manifest
    assert manifest.bad == {"empty": 1, "malformed": 1}
    rows = [json.loads(line) for line in (undisturbed / "bad.jsonl").read_text().splitlines()]
    path = corpus[0].sources[0].paths[0]
    assert [(row["kind"], row["place"]) for row in rows] == [("empty", f"{path}:6001"), ("malformed", f"{path}:6002")]


def test_too_many_bad_documents_stop_the_job_and_leave_no_store(texts, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts[:90])
    with path.open("ab") as file:
        file.write(b'{"text": 1}\n{"text": "\xff"}\n\n{"text"\n[]\n{}\n' + b"\n" * 4)
    with pytest.raises(DataError) as error:
        prepare(jsonl_config(path, max_bad_fraction=0.09), tokenizer, str(tmp_path / "store"), progress=False)
    message = str(error.value)
    assert "10 of 100 documents cannot be used (5 empty, 4 malformed, 1 utf-8)" in message
    assert f"{path}:91: malformed" in message
    assert f"{path}:92: utf-8: byte 10 of the line (0xff) is not UTF-8" in message
    assert "data.max_bad_fraction (0.09)" in message
    assert not (tmp_path / "store" / "manifest.json").exists()
    allowed = jsonl_config(path, max_bad_fraction=0.1)
    assert prepare(allowed, tokenizer, str(tmp_path / "store"), progress=False).bad["empty"] == 5


def test_equal_documents_fall_on_one_side(tokenizer, tmp_path):
    texts = [f"document {i % 40}" for i in range(200)]
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.3)
    prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    store = TokenStore(str(tmp_path / "store"))
    sides = []
    for split in ("train", "heldout"):
        tokens, offsets = store.read(f"{split}/tokens"), store.read(f"{split}/offsets")
        sides.append({tokenizer.decode(tokens[a:b].tolist()) for a, b in itertools.pairwise(offsets)})
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


def test_inspect_shows_counts_and_samples(store, texts):
    facts = inspect(store)
    assert facts["train"]["documents"] + facts["heldout"]["documents"] == len(texts)
    assert facts["samples"][0]["text"].startswith("<|bos|>")
    assert [sample["split"] for sample in facts["samples"]] == ["train", "train", "train", "heldout"]
    assert facts["verified"] is True
    assert 1 < facts["bytes_per_token"] < 8
    json.dumps(facts)


def test_inspect_notices_exchanged_tokens(texts, tokenizer, tmp_path):
    for name, chosen in (("a", texts[:20]), ("b", [texts[1], texts[0], *texts[2:20]])):
        data = jsonl_config(write_jsonl(tmp_path / f"{name}.jsonl", chosen), heldout_fraction=0)
        prepare(data, tokenizer, str(tmp_path / name), progress=False)
    tokens = Path("train") / "tokens" / "c" / "0"
    (tmp_path / "a" / tokens).write_bytes((tmp_path / "b" / tokens).read_bytes())
    with pytest.raises(DataError, match="fingerprint differs"):
        inspect(str(tmp_path / "a"))


def test_tokenizer_must_tell_documents_apart(texts, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    bare = load_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer"), bos=None, eos=None))
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts))
    with pytest.raises(DataError, match="neither bos nor eos"):
        prepare(data, bare, str(tmp_path / "store"), progress=False)
    word = load_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer"), bos="e"))
    with pytest.raises(DataError, match=r"its text gives the tokenizer's bos or eos"):
        prepare(data, word, str(tmp_path / "store"), progress=False)


def test_nothing_to_train_on_is_refused(tokenizer, tmp_path):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", [f"{i}" for i in range(3)]), heldout_fraction=0.999999)
    with pytest.raises(DataError, match="no documents to train on"):
        prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    with pytest.raises(ConfigError, match=r"data\.store is not set"):
        prepare(data, tokenizer, progress=False)


@pytest.fixture
def tiny_disk(tmp_path):
    """A tmpfs of one MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_a_storage_error_and_leaves_nothing_to_trust(corpus, undisturbed, tiny_disk, workers):
    data, tokenizer = corpus
    with pytest.raises(StorageError, match=r"disk/store/.*the disk is full \(No space left on device\)"):
        prepare(data, tokenizer, str(tiny_disk / "store"), workers, progress=False)
    with pytest.raises(DataError, match="not finished"):
        TokenStore(str(tiny_disk / "store"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    prepare(data, tokenizer, str(tiny_disk / "store"), workers, progress=False)
    assert contents(tiny_disk / "store") == contents(undisturbed)


def test_read_only_folder_is_a_storage_error(texts, tokenizer, tmp_path):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts))
    if os.geteuid():
        (tmp_path / "sealed").mkdir(mode=0o500)
        folder = tmp_path / "sealed"
    else:
        folder = Path("/sys")  # where even root may not make a folder
    with pytest.raises(StorageError, match="may not be written"):
        prepare(data, tokenizer, str(folder / "store"), progress=False)


def test_store_where_a_file_lies_is_a_storage_error(texts, tokenizer, tmp_path):
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts))
    with pytest.raises(StorageError, match=r"a\.jsonl/store"):
        prepare(data, tokenizer, str(tmp_path / "a.jsonl" / "store"), progress=False)


def test_wordpiece_stores_record_the_bytes_of_documents(texts, tmp_path):
    config = TokenizerConfig(kind="wordpiece", vocab_size=300)
    tokenizer = train_tokenizer(texts, config, tmp_path / "tokenizer", progress=False)
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.2)
    manifest = prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    assert not manifest.exact_bytes
    assert manifest.train.bytes + manifest.heldout.bytes == sum(len(text.encode()) for text in texts)
