"""The cache of compilations: what is kept comes back, what is damaged does not, and processes share it."""

import json
import os
import subprocess
import sys

import pytest

from maxlm.planning import cache

KEY = cache.key("module @step {}", {"xla_a": True}, "v5e:2x2", {"jax": "0.10.2"})
COMPILED = {"peak": 12345678901234, "cycles": {"seconds": 0.1 + 0.2}, "axes": ["fsdp"], "kernels": [], "gpu": None}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache of the test's own."""
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path))
    return tmp_path / "plans"


def entry(folder):
    (path,) = folder.iterdir()
    return path


def test_what_was_kept_comes_back_exactly(folder):
    cache.store(KEY, COMPILED)
    assert cache.load(KEY) == COMPILED
    assert entry(folder).name == f"{KEY}.json"
    json.loads(entry(folder).read_text())


def test_a_compilation_is_made_once_and_is_the_same_made_or_read():
    made = []

    def compile_it():
        made.append(1)
        return {"axes": ("data", "fsdp"), "trips": {80: 2}}

    first = cache.remember(KEY, compile_it)
    assert cache.remember(KEY, compile_it) == first == {"axes": ["data", "fsdp"], "trips": {"80": 2}}
    assert len(made) == 1


def test_the_folder_is_under_the_users_cache_where_the_variable_is_not_set(monkeypatch, tmp_path):
    monkeypatch.delenv("MAXLM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "maxlm" / "plans"


def test_every_part_that_decides_the_result_is_in_the_key(monkeypatch):
    base = ("module", {"a": 1, "b": "x"}, "v5e:2x2", {"jax": "1"})
    others = [
        ("module2", *base[1:]),
        (base[0], {"a": 2, "b": "x"}, *base[2:]),
        (*base[:2], "v5e:4x4", base[3]),
        (*base[:3], {"jax": "2"}),
    ]
    keys = {cache.key(*base), *(cache.key(*other) for other in others)}
    for name, value in (("SCHEMA", cache.SCHEMA + 1), ("__version__", "another")):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            keys.add(cache.key(*base))
    for name in cache.COMPILER_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, os.environ.get(name, "") + " --xla_another=1")
            keys.add(cache.key(*base))
    assert len(keys) == 1 + 4 + 2 + 2
    assert cache.key("module", {"b": "x", "a": 1}, *base[2:]) == cache.key(*base)


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_emptied(path):
    path.write_bytes(b"")


def damage_other_number(path):
    path.write_text(path.read_text().replace("12345678901234", "12345678901235"))


def damage_not_utf8(path):
    path.write_bytes(b"\xff" + path.read_bytes())


def damage_not_a_mapping(path):
    path.write_text("[1, 2]")


def damage_nested_too_deep(path):
    path.write_text("[" * 100_000)


def damage_folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def damage_another_programs(path):
    other = cache.key("another module", {}, "v5e:2x2", {})
    cache.store(other, COMPILED)
    os.replace(path.with_name(f"{other}.json"), path)


DAMAGES = [function for name, function in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_a_damaged_entry_is_made_again(folder, damage, capsys):
    cache.store(KEY, COMPILED)
    damage(entry(folder))
    assert cache.load(KEY) is None
    assert cache.remember(KEY, lambda: {"again": True}) == {"again": True}
    if damage is damage_folder_in_its_place:
        assert "not kept" in capsys.readouterr().err
    else:
        assert cache.load(KEY) == {"again": True}


def test_a_write_that_was_cut_off_leaves_what_was_there(folder, monkeypatch):
    cache.store(KEY, COMPILED)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("maxlm.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cache.store(KEY, {"half": True})
    assert cache.load(KEY) == COMPILED
    assert len(list(folder.iterdir())) == 1


def test_a_cache_that_cannot_be_written_does_not_lose_the_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path / "file"))
    assert cache.remember(KEY, lambda: COMPILED) == COMPILED
    assert "MAXLM_CACHE" in capsys.readouterr().err


def test_an_interrupted_compilation_keeps_nothing(folder):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.remember(KEY, interrupted)
    assert not folder.exists()


WRITER = """
import sys
from maxlm.planning import cache
me = int(sys.argv[1])
print(cache.key("module @step {}", {"xla_a": True}, "v5e:2x2", {"jax": "0.10.2"}), flush=True)
sys.stdin.readline()
names = [cache.key(str(i), {}, "v5e:2x2", {}) for i in range(3)]
for turn in range(150):
    for name in names:
        cache.store(name, {"by": me, "filler": [me * 1000 + turn] * 2000})
        value = cache.load(name)
        assert value is not None, "a reader saw half an entry"
        assert len(set(value["filler"])) == 1 and value["filler"][0] // 1000 == value["by"]
"""


@pytest.mark.processes
def test_two_processes_name_entries_alike_and_never_see_half_of_one(folder):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(i)},
        )
        for i in (1, 2)
    ]
    try:
        assert [process.stdout.readline().strip() for process in processes] == [KEY, KEY]
        for process in processes:  # both are up: now they write at the same time
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 3
