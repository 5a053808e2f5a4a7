import gzip
import json
import os
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maxlm.data.config import DataConfig, SourceConfig
from maxlm.data.sources import Bad, Document, list_work, read_item, source_files, stdlib_files
from maxlm.errors import DataError
from tests.data.corpus import make_texts, write_jsonl


def read_all(*sources: SourceConfig) -> list[Document | Bad]:
    data = DataConfig(sources=sources)
    return [document for item in list_work(data) for document in read_item(item, data)]


def texts_of(documents: list[Document | Bad]) -> list[str]:
    return [document.text for document in documents if isinstance(document, Document)]


def bad_of(documents: list[Document | Bad]) -> list[tuple[str, str]]:
    return [(bad.kind, os.path.basename(bad.place)) for bad in documents if isinstance(bad, Bad)]


def test_text_tree_gives_each_file_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "b/1.md", "a.txt", ".hidden", ".git/x"):
        (tmp_path / name).write_text(f"\ufeffI am {name}\r\n")
    everything = SourceConfig(kind="text", paths=(str(tmp_path),))
    assert texts_of(read_all(everything)) == ["I am a.txt\r\n", "I am b/1.md\r\n", "I am b/2.txt\r\n"]
    some = SourceConfig(kind="text", paths=(str(tmp_path),), suffixes=(".txt",))
    assert texts_of(read_all(some)) == ["I am a.txt\r\n", "I am b/2.txt\r\n"]


def test_patterns_match_files_once(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "b/1.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    patterns = (f"{tmp_path}/**/*.txt", f"{tmp_path}/b", f"{tmp_path}/a.txt")
    files = source_files(SourceConfig(kind="text", paths=patterns))
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a.txt", "b/1.txt", "b/2.txt"]


def test_names_with_glob_signs_are_taken_as_they_are(tmp_path):
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.txt").write_text("inside")
    assert texts_of(read_all(SourceConfig(kind="text", paths=(str(tmp_path / "[x]"),)))) == ["inside"]


def test_jsonl_in_any_packing_gives_the_same_documents(tmp_path):
    texts = make_texts(50)
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    frames = zstandard.compress(content[:500]) + zstandard.compress(content[500:])
    (tmp_path / "c.jsonl.zst").write_bytes(frames)
    (tmp_path / "ignored.txt").write_text("no")
    assert texts_of(read_all(SourceConfig(kind="jsonl", paths=(str(tmp_path),)))) == texts * 3


def test_large_jsonl_is_cut_into_items_without_losing_a_line(tmp_path):
    texts = [f"{i} " + "word " * (3 * i) for i in range(700)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    source = SourceConfig(kind="jsonl", paths=(str(path),))
    items = list_work(DataConfig(sources=(source,)))
    assert len(items) == -(-path.stat().st_size // 2**20) > 3
    assert texts_of(read_all(source)) == texts


def test_bad_lines_are_named_by_file_and_line(tmp_path):
    good = json.dumps({"text": "x" * 3000}).encode()
    lines = [
        *[good] * 900,
        b'{"text": "cut',
        b"",
        b'{"text": "   "}',
        b'{"title": "no text"}',
        b"[1, 2]",
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents = read_all(SourceConfig(kind="jsonl", paths=(str(tmp_path / "a.jsonl"),)))
    assert len(texts_of(documents)) == 901
    kinds = ["malformed", "empty", "empty", "malformed", "malformed", "malformed", "utf-8", "utf-8", "malformed"]
    assert bad_of(documents) == [(kind, f"a.jsonl:{901 + i}") for i, kind in enumerate(kinds)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    packed = read_all(SourceConfig(kind="jsonl", paths=(str(tmp_path / "b.jsonl.gz"),)))
    assert bad_of(packed) == [(kind, f"b.jsonl.gz:{901 + i}") for i, kind in enumerate(kinds)]


def test_bad_text_files_are_named(tmp_path):
    (tmp_path / "1").write_bytes(b"caf\xe9")
    (tmp_path / "2").write_bytes(b" \n")
    (tmp_path / "3").write_bytes(b"good")
    documents = read_all(SourceConfig(kind="text", paths=(str(tmp_path),)))
    assert bad_of(documents) == [("utf-8", "1"), ("empty", "2")]
    assert isinstance(documents[0], Bad)
    assert documents[0].message == "byte 3 (0xe9) is not UTF-8"


def test_parquet_rows_are_documents(tmp_path):
    texts = make_texts(5000)
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        column = pa.array([text.encode() if kind == pa.binary() else text for text in texts] + [None], kind)
        table = pa.table({"id": range(5001), "body": column})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        documents = read_all(SourceConfig(kind="parquet", paths=(str(tmp_path),), field="body"))
        assert texts_of(documents) == texts
        assert bad_of(documents) == [("malformed", "a.parquet:row 5001")]


def test_parquet_is_cut_by_row_groups(tmp_path):
    table = pa.table({"text": ["0123456789 " * 200_000] * 8})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, use_dictionary=False, compression="none")
    source = SourceConfig(kind="parquet", paths=(str(tmp_path),))
    assert len(list_work(DataConfig(sources=(source,)))) == 8
    assert len(read_all(source)) == 8


def test_python_stdlib_is_text_that_people_wrote():
    files = stdlib_files()
    names = {os.path.basename(file) for file in files}
    folders = {part for file in files for part in os.path.dirname(file).split(os.sep)[-2:]}
    assert files == sorted(files)
    assert len(files) > 400
    assert {"argparse.py", "utf_8.py", "turtle.py"} <= names
    assert not {"cp437.py", "topics.py", "stringprep.py"} & names
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & folders
    assert all(os.path.getsize(file) for file in files)
    assert not bad_of(read_all(SourceConfig(kind="python-stdlib")))


def test_packages_are_read_after_the_library_without_their_tests():
    source = SourceConfig(kind="python-stdlib", packages=("yaml", "numpy"))
    files = source_files(source)[len(stdlib_files()) :]
    assert {"/".join(file.split(os.sep)[-2:]) for file in files} >= {"yaml/constructor.py", "numpy/version.py"}
    assert not [file for file in files if "tests" in file.split(os.sep)]
    assert source_files(source) == source_files(source)
    with pytest.raises(DataError, match=r"data\.sources\[3\]\.packages: no_such_package"):
        source_files(SourceConfig(kind="python-stdlib", packages=("no_such_package",)), 3)
    with pytest.raises(ValueError, match=r"packages.*kind text"):
        SourceConfig(kind="text", paths=("a",), packages=("yaml",))


def test_items_do_not_depend_on_anything_but_the_files(tmp_path):
    data = DataConfig(sources=(SourceConfig(kind="python-stdlib"),))
    assert list_work(data) == list_work(data.model_copy(update={"workers": 7}))
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    data = DataConfig(sources=(SourceConfig(kind="jsonl", paths=(str(path),)),))
    before = list_work(data)[0].fingerprint()
    path.write_text('{"text": "two"}\n')
    os.utime(path, ns=(1, 1))
    assert list_work(data)[0].fingerprint() != before


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-20], "jsonl"),
        ("a.jsonl.gz", b"no gzip at all", "jsonl"),
        ("a.jsonl.zst", b"no zstandard", "jsonl"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9999 + os.urandom(99))[:-9], "jsonl"),
        ("a.parquet", b"PAR1 no parquet", "parquet"),
    ],
)
def test_damaged_files_stop_the_job_by_name(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_all(SourceConfig(kind=kind, paths=(str(tmp_path),)))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        list_work(DataConfig())
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.paths: .*nowhere"):
        read_all(SourceConfig(kind="text", paths=(str(tmp_path / "nowhere"),)))
    with pytest.raises(DataError, match="no files"):
        read_all(SourceConfig(kind="jsonl", paths=(str(tmp_path),)))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; there are body"):
        read_all(SourceConfig(kind="parquet", paths=(str(tmp_path),)))


@pytest.mark.parametrize(("kind", "package"), [("tfds", "tensorflow_datasets"), ("huggingface", "datasets")])
def test_optional_data_sets_say_what_to_install(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(DataError, match=rf'package {package}.*pip install "maxlm\[datasets\]"'):
        read_all(SourceConfig(kind=kind, dataset="nothing"))


@pytest.mark.parametrize("kind", ["tfds", "huggingface"])
def test_data_sets_of_optional_packages_are_read_example_by_example(kind, monkeypatch):
    """By stand-ins for the packages: bytes, as TFDS gives text, and strings."""
    examples = [{"body": b"one"}, {"body": "two"}, {"body": b"\xff"}, {"body": ""}]
    asked = []

    def load(*arguments, **keys):
        asked.append((*arguments, *keys.values()))
        return examples

    packages = {"tfds": "tensorflow_datasets", "huggingface": "datasets"}
    stand_in = types.SimpleNamespace(data_source=load, load_dataset=load)
    monkeypatch.setitem(sys.modules, packages[kind], stand_in)
    documents = read_all(SourceConfig(kind=kind, dataset=f"a {kind} set", split="validation", field="body"))
    assert texts_of(documents) == ["one", "two"]
    assert [kind for kind, _ in bad_of(documents)] == ["utf-8", "empty"]
    assert asked == [(f"a {kind} set", *([None] if kind == "huggingface" else []), "validation")]
    with pytest.raises(DataError, match=r"no field 'text'; there are body"):
        read_all(SourceConfig(kind=kind, dataset=f"a {kind} set"))


def test_huggingface_data_set_on_disk_is_read(tmp_path):
    pytest.importorskip("datasets")
    pq.write_table(pa.table({"text": ["one", "two", " "]}), tmp_path / "train.parquet")
    documents = read_all(SourceConfig(kind="huggingface", dataset=str(tmp_path)))
    assert texts_of(documents) == ["one", "two"]
    assert [kind for kind, _ in bad_of(documents)] == ["empty"]


@pytest.mark.parametrize("bad", [{"kind": "text"}, {"kind": "tfds"}, {"kind": "python-stdlib", "paths": ["x"]}])
def test_sources_that_do_not_say_where_are_refused(bad):
    with pytest.raises(ValueError, match=r"python-stdlib|needs"):
        SourceConfig(**bad)
