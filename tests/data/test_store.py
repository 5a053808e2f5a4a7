import json
import shutil

import pytest

from maxlm.data.prepare import prepare
from maxlm.data.storage import Storage, kvstore_spec
from maxlm.data.store import TokenStore
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.errors import ConfigError, DataError
from tests.data.corpus import jsonl_config, make_texts, write_jsonl


@pytest.mark.parametrize(
    ("url", "spec"),
    [
        ("/data/store", {"driver": "file", "path": "/data/store/"}),
        ("/data/store/", {"driver": "file", "path": "/data/store/"}),
        ("file:///data/store", {"driver": "file", "path": "/data/store/"}),
        ("memory://name", {"driver": "memory", "path": "name/"}),
        ("gs://bucket-1/a/b", {"driver": "gcs", "bucket": "bucket-1", "path": "a/b/"}),
        ("s3://bucket-1/a/b/", {"driver": "s3", "bucket": "bucket-1", "path": "a/b/"}),
    ],
)
def test_url_becomes_a_spec_that_tensorstore_takes(url, spec):
    import tensorstore as ts

    assert kvstore_spec(url) == spec
    assert ts.KvStore.Spec(spec).to_json()["driver"] == spec["driver"]


def test_relative_path_is_of_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kvstore_spec("runs/store")["path"] == f"{tmp_path}/runs/store/"


@pytest.mark.parametrize("url", ["ftp://host/x", "gs://bucket", "s3://", "file://relative", "", "https://host/store"])
def test_url_that_cannot_be_a_store_is_refused(url):
    with pytest.raises(ConfigError, match=r"store|needs|path"):
        kvstore_spec(url)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_store_lies_at_a_url(scheme, tmp_path, tokenizer, texts):
    url = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}/at url"
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", texts), heldout_fraction=0.1)
    manifest = prepare(data, tokenizer, url, progress=False)
    store = TokenStore(url, tokenizer=tokenizer)
    assert store.manifest == manifest
    assert not Storage(url).list("work")
    assert len(store.read("train/tokens")) == manifest.train.tokens


def test_store_holds_every_document_framed_and_in_order(store, tokenizer, texts):
    opened = TokenStore(store)
    seen = []
    for split in ("train", "heldout"):
        tokens, offsets = opened.read(f"{split}/tokens").tolist(), opened.read(f"{split}/offsets").tolist()
        sizes = opened.read(f"{split}/bytes").tolist()
        found = []
        for start, stop, size in zip(offsets, offsets[1:], sizes, strict=False):
            assert tokens[start] == tokenizer.bos_id
            assert tokens[stop - 1] == tokenizer.eos_id
            found.append(tokenizer.decode(tokens[start + 1 : stop - 1]))
            assert len(found[-1].encode()) == size
        assert offsets[-1] == len(tokens)
        counts = opened.manifest.counts(split)
        assert (counts.documents, counts.tokens, counts.bytes) == (len(found), len(tokens), sum(sizes))
        assert found == sorted(found, key=texts.index)
        seen += found
    assert sorted(seen) == sorted(texts)
    assert 15 < opened.manifest.heldout.documents < 75, "a tenth of 400"
    assert opened.manifest.dtype == "uint16"


def test_store_carries_its_tokenizer(store, tokenizer):
    own = TokenStore(store).tokenizer()
    assert own.fingerprint == tokenizer.fingerprint
    assert (TokenStore(store).read("token_bytes") == tokenizer.token_byte_lengths()).all()


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, texts):
    words = " ".join(chr(0x4E00 + i % 20000) + chr(0x4E00 + i // 4) for i in range(70_000))
    config = TokenizerConfig(kind="wordpiece", vocab_size=70_000, min_frequency=0)
    tokenizer = train_tokenizer([words], config, tmp_path / "tokenizer", progress=False)
    if tokenizer.vocab_size <= 65536:
        pytest.fail(f"the test's vocabulary is too small: {tokenizer.vocab_size}")
    data = jsonl_config(write_jsonl(tmp_path / "a.jsonl", [words]), heldout_fraction=0)
    manifest = prepare(data, tokenizer, str(tmp_path / "store"), progress=False)
    tokens = TokenStore(str(tmp_path / "store")).read("train/tokens")
    assert manifest.dtype == tokens.dtype.name == "uint32"
    assert tokens.max() > 65535


def test_other_tokenizer_is_refused(store, tmp_path):
    other = train_tokenizer(make_texts(50, seed=5), TokenizerConfig(vocab_size=290), tmp_path, progress=False)
    with pytest.raises(DataError, match=r"made with another tokenizer .*290 tokens"):
        TokenStore(store, tokenizer=other)


def damage(folder, case):
    manifest = folder / "manifest.json"
    if case == "no manifest":
        manifest.unlink()
        return manifest
    if case == "manifest cut off":
        manifest.write_bytes(manifest.read_bytes()[:100])
        return manifest
    if case == "manifest edited":
        manifest.write_text(manifest.read_text().replace('"vocab_size": 300', '"vocab_size": 301'))
        return manifest
    if case == "manifest of another version":
        fields = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**fields, "format": 99}))
        return manifest
    if case == "array gone":
        shutil.rmtree(folder / "train" / "offsets")
        return folder / "train" / "offsets"
    if case == "array damaged":
        (folder / "heldout" / "tokens" / "zarr.json").write_text("{")
        return folder / "heldout" / "tokens"
    if case == "array of another store":
        path = folder / "train" / "tokens" / "zarr.json"
        path.write_text(path.read_text().replace('"shape":[', '"shape":[1'))
        return folder / "train" / "tokens"
    raise ValueError(case)


@pytest.mark.parametrize(
    "case",
    [
        "no manifest",
        "manifest cut off",
        "manifest edited",
        "manifest of another version",
        "array gone",
        "array damaged",
        "array of another store",
    ],
)
def test_damaged_store_is_refused_by_name(store, tmp_path, case):
    shutil.copytree(store, tmp_path / "copy")
    place = damage(tmp_path / "copy", case)
    with pytest.raises(DataError) as error:
        TokenStore(str(tmp_path / "copy"))
    assert str(place) in str(error.value)
    assert "maxlm data prepare" in str(error.value)


def test_damaged_token_is_noticed_when_read(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    path = tmp_path / "copy" / "train" / "tokens" / "c" / "0"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    opened = TokenStore(str(tmp_path / "copy"))
    with pytest.raises(DataError, match="train/tokens: damaged"):
        opened.read("train/tokens")
