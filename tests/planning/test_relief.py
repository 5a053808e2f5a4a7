"""Remedies for a step that does not fit: their order, their figures, and what is shown to the compiler."""

import math

import pytest

from maxlm.config import load_config
from maxlm.models.flops import count_parameters
from maxlm.planning import relief as relief_module
from maxlm.planning.candidates import SLACK, price
from maxlm.planning.relief import MOST_COMPILATIONS, relief
from maxlm.planning.topology import parse_topology

SOURCE = "llama3-8b"
# 4 rows a device, everything kept: several times too large, and most remedies alone are enough.
LARGE = ["train.global_batch_tokens=2097152", "model.remat.policy=none", "mesh.data=4"]


@pytest.fixture(scope="module")
def topology():
    return parse_topology("v5e:8x8")


class Compiler:
    """Plans whose memory is `larger` than the roofline's, and a record of what was asked for."""

    def __init__(self, topology, larger=1.0):
        self.topology, self.larger, self.asked = topology, larger, []

    def __call__(self, config):
        self.asked.append(config)
        required = self.required(config)
        fits = required <= self.topology.hbm_bytes_per_device
        return {
            "compiled": {"memory": {"required": required}} if fits else None,
            "out_of_memory": None if fits else {"used": required},
            "fits": fits,
        }

    def required(self, config):
        return int(price(config, self.topology).memory_bytes * self.larger)


def relieved(overrides, topology, compiler, source=SOURCE):
    config = load_config(source, overrides)
    used = compiler.required(config)
    return relief(config, topology, compiler, used=used), used


def test_every_row_says_what_it_saves_and_what_is_left(topology):
    rows, used = relieved(LARGE, topology, Compiler(topology))
    assert len(rows) >= 4
    for row in rows:
        assert set(row) == {"change", "label", "saves_bytes", "required_bytes", "fits", "how"}
        assert row["saves_bytes"] + row["required_bytes"] == used
        assert row["saves_bytes"] > 0
        assert row["fits"] == (row["required_bytes"] <= topology.hbm_bytes_per_device), row


def test_remedies_are_compiled_in_order_until_one_fits(topology):
    compiler = Compiler(topology)
    rows, _ = relieved(LARGE, topology, compiler)
    compiled = [row for row in rows if row["how"] == "compiled"]
    assert [row["fits"] for row in compiled] == [False] * (len(compiled) - 1) + [True]
    assert len(compiled) == len(compiler.asked)
    assert all(row["how"] == "estimated" for row in rows[rows.index(compiled[-1]) + 1 :])
    assert "remat" in rows[0]["label"]


def test_a_change_is_overrides_that_make_the_config_that_was_compiled(topology):
    compiler = Compiler(topology, larger=1.4)
    rows, _ = relieved(LARGE, topology, compiler)
    compiled = [row for row in rows if row["how"] == "compiled"]
    assert compiled
    for row, asked in zip(compiled, compiler.asked, strict=True):
        assert load_config(SOURCE, [*LARGE, *row["change"]]) == asked
    for row in rows:
        if row["change"]:
            price(load_config(SOURCE, [*LARGE, *row["change"]]), topology)


def test_what_is_hopeless_is_not_compiled(topology):
    compiler = Compiler(topology)
    rows, _ = relieved(["train.global_batch_tokens=524288"], topology, compiler, source="llama3-70b")
    for config in compiler.asked:
        assert compiler.required(config) <= topology.hbm_bytes_per_device * (1 + SLACK)
    assert not any(row["fits"] for row in rows)


def test_a_rung_that_the_compiler_finds_too_large_is_followed_by_a_higher_one(topology):
    config, capacity = load_config(SOURCE, LARGE), topology.hbm_bytes_per_device
    asked = []

    def first_is_too_large(config):
        asked.append(config)
        if len(asked) == 1:
            return {"compiled": None, "out_of_memory": {"used": capacity + 10**9}, "fits": False}
        return {"compiled": {"memory": {"required": capacity - 1}}, "out_of_memory": None, "fits": True}

    rows = relief(config, topology, first_is_too_large, used=capacity + 2 * 10**9)
    assert [(row["fits"], row["required_bytes"]) for row in rows[:2]] == [
        (False, capacity + 10**9),
        (True, capacity - 1),
    ]
    assert [row["label"][:6] for row in rows[:2]] == ["remat "] * 2
    assert price(asked[1], topology).memory_bytes < price(asked[0], topology).memory_bytes


def test_where_no_remedy_is_enough_alone_they_are_put_together(topology):
    larger = 1.0
    while True:  # the least error of the roofline at which no single change is enough
        compiler = Compiler(topology, larger)
        rows, _ = relieved(LARGE, topology, compiler)
        if rows[-1]["label"].startswith("together") and rows[-1]["fits"]:
            break
        larger *= 1.1
        assert larger < 20, "no remedies together were ever enough"
    assert rows[-1]["how"] == "compiled"
    assert not any(row["fits"] for row in rows[:-1])
    assert len({change.partition("=")[0].rpartition(".")[0] for change in rows[-1]["change"]}) >= 2


def test_compilations_are_limited(topology, monkeypatch):
    config = load_config(SOURCE, LARGE)
    calls = []

    def never_fits(config):
        calls.append(config)
        return {"compiled": None, "out_of_memory": {"used": topology.hbm_bytes_per_device + 1}, "fits": False}

    rows = relief(config, topology, never_fits, used=topology.hbm_bytes_per_device + 2)
    assert len(calls) == MOST_COMPILATIONS
    assert not any(row["fits"] for row in rows if row["how"] == "compiled")


def test_the_last_word_is_how_many_devices_hold_the_state():
    topology = parse_topology("v5e:2x2")
    rows, _ = relieved(["train.global_batch_tokens=65536"], topology, Compiler(topology), source="llama3-70b")
    # Weights and both moments in float32; the vocabulary is a multiple of 128 already.
    state = 12 * count_parameters(load_config("llama3-70b").model).total
    assert f"at least {math.ceil(state / topology.hbm_bytes_per_device)} devices of v5e" in rows[-1]["label"]
    assert rows[-1]["change"] == []
    assert rows[-1]["required_bytes"] == pytest.approx(state / 4, rel=1e-3)


def test_a_compiler_that_refuses_does_not_hide_the_other_remedies(topology):
    config, capacity = load_config(SOURCE, LARGE), topology.hbm_bytes_per_device
    asked = []

    def refuses_once(config):
        asked.append(config)
        if len(asked) == 1:
            raise NotImplementedError("this cannot be laid out\nat all")
        return {"compiled": {"memory": {"required": capacity}}, "out_of_memory": None, "fits": True}

    rows = relief(config, topology, refuses_once, used=capacity + 10**9)
    assert rows[0]["label"].endswith("(not compiled: NotImplementedError: this cannot be laid out)")
    assert (rows[0]["fits"], rows[0]["how"]) == (False, "estimated")
    assert [(row["fits"], row["how"]) for row in rows if row["how"] == "compiled"] == [(True, "compiled")]


MADE_FOR = {
    "_less_kept": [],
    "_more_microbatches": [],
    "_smaller_loss_chunks": ["model.remat.policy=full", "model.n_layers=1", "loss.chunk_tokens=32768"],
    "_more_sharding": [],
    "_shard_over_data": [],
    "_offloaded": ["model.remat.policy=full"],
    "_more_tensor": ["mesh.data=1"],
}


@pytest.mark.parametrize("ladder", relief_module.LADDERS, ids=lambda ladder: ladder.__name__)
def test_every_kind_of_remedy_frees_memory_where_it_is_needed(ladder, topology):
    """Each is estimated to save on a config that is made for it, and each of its rungs more than those before."""
    before = price(load_config(SOURCE, [*LARGE, *MADE_FOR[ladder.__name__]]), topology)
    rungs = relief_module._rungs(ladder, before, topology)
    sizes = [before.memory_bytes, *(candidate.memory_bytes for _, candidate in rungs)]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.slow
def test_a_live_step_that_does_not_fit_is_made_to_fit_by_the_change_that_is_named(tmp_path, monkeypatch):
    """By the real compiler: a small model with 32 GiB of activations on devices of 16 GB."""
    pytest.importorskip("libtpu")
    from maxlm.plan import make_plan

    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "large.yaml").write_text(
        "model: {vocab_size: 1024, n_layers: 2, d_model: 256, n_heads: 2, d_ff: 512, max_seq_len: 256}\n"
        "train: {steps: 20, seq_len: 256, global_batch_tokens: 4194304}\noptimizer: {learning_rate: 1e-3}\n"
    )
    topology = parse_topology("v5e:2x2")
    plan = make_plan(load_config(tmp_path / "large.yaml"), topology)
    assert not plan["fits"]
    used, rows = plan["out_of_memory"]["used"], plan["out_of_memory"]["relief"]
    assert used > topology.hbm_bytes_per_device
    (solution,) = [row for row in rows if row["how"] == "compiled" and row["fits"]]
    assert solution["required_bytes"] + solution["saves_bytes"] == used
    changed = make_plan(load_config(tmp_path / "large.yaml", solution["change"]), topology)
    assert changed["fits"]
    assert changed["compiled"]["memory"]["required"] == solution["required_bytes"]
