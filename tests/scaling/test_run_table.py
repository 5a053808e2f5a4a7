"""Tables of runs: read as they are, written whole, and what is wrong with them said in words."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.errors import DataError
from maxlm.scaling.table import RunTable, binned, budgets, contradictions, read_table, usable, write_table

ROWS = [
    {"run": "a", "n_params": 10**7, "n_tokens": 2 * 10**8, "loss": 3.25, "status": "done"},
    {"run": "b", "n_params": 10**8, "n_tokens": 2 * 10**9, "loss": 2.75, "status": "done"},
    {"run": "c", "n_params": 10**9, "n_tokens": 2 * 10**10, "loss": None, "status": "failed"},
]


@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet"])
def test_a_table_is_read_as_it_was_written(tmp_path, name):
    table = read_table(write_table(tmp_path / name, ROWS))
    assert table.columns["n_params"].tolist() == [1e7, 1e8, 1e9]
    assert table.columns["loss"][:2].tolist() == [3.25, 2.75]
    assert math.isnan(table.columns["loss"][2])
    assert table.text == {"run": ["a", "b", "c"], "status": ["done", "done", "failed"]}


def test_a_sweep_s_folder_is_its_table(tmp_path):
    write_table(tmp_path / "runs.csv", ROWS)
    assert len(read_table(tmp_path)) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(min_value=1e-300, max_value=1e300), min_size=1, max_size=8))
def test_numbers_come_back_to_the_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("t") / "runs.csv"
    write_table(path, [{"loss": value} for value in values])
    assert read_table(path).columns["loss"].tolist() == values


def test_columns_of_others_are_known_by_their_names(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text('\ufeffModel Size,Training FLOP,loss,eval_loss\n"1,000,000",6e15,3.5,9\n2e6,n/a,3.0,9\n')
    table = read_table(path)
    assert table.columns["n_params"].tolist() == [1e6, 2e6]
    assert table.columns["loss"].tolist() == [3.5, 3.0]
    assert table.columns["flops"][0] == 6e15
    assert np.isnan(table.columns["flops"][1])


def test_columns_can_be_named(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text("Größe,tokens,loss,final\n1e6,2e7,9,3.5\n")
    table = read_table(path, {"n_params": "Größe", "loss": "final"})
    assert (table.columns["n_params"][0], table.columns["n_tokens"][0], table.columns["loss"][0]) == (1e6, 2e7, 3.5)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("n_params,loss\n", {}, "no rows"),
        ("n_params,loss\n1e6,3\n2e6,low\n", {}, "line 3, column loss: 'low' is not a number"),
        ("n_params,loss\n1e6\n", {}, "line 2: 1 cells under a header of 2"),
        ("n_params,loss\n1e6,3\n", {"n_tokens": "D"}, "no column 'D'"),
        ("n_params,loss\n1e6,3\n", {"size": "loss"}, "size is not a column that a law reads"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path, content, columns, message):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_table(path, columns)


def test_files_that_are_no_tables_say_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv")
    for name in ("x.csv", "x.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x93")
        with pytest.raises(DataError, match=r"not a text file|not a Parquet file"):
            read_table(tmp_path / name)


def test_what_is_left_out_is_named_with_its_reason():
    table = RunTable(
        {
            "n_params": np.array([1e6, 1e6, 2e6, 3e6, 4e6, 5e6]),
            "n_tokens": np.array([1e8, 1e8, 1e8, -1, 1e8, 1e8]),
            "loss": np.array([3.0, 3.0, np.nan, 3.0, 2.5, 2.25]),
        },
        {"run": list("abcdef"), "status": ["done"] * 5 + ["diverged"]},
    )
    rows, findings = usable(table, ("n_params", "n_tokens", "loss"))
    assert rows.text["run"] == ["a", "e"]
    assert [finding.message for finding in findings] == [
        "run f: left out, the runs are not done (diverged)",
        "run d: left out, n_tokens is -1",
        "run c: left out, loss is missing or not a number",
        "run b: left out, equal in every column to a row above",
    ]


def test_runs_of_other_seeds_are_not_duplicates():
    columns = {"n_params": np.full(3, 1e6), "loss": np.full(3, 3.0), "seed": np.array([1.0, 2.0, 3.0])}
    assert len(usable(RunTable(columns), ("n_params", "loss"))[0]) == 3


def test_tokens_that_are_missing_are_derived_from_flops():
    rows, findings = usable(
        RunTable({"n_params": np.array([1e6]), "flops": np.array([6e14]), "loss": np.array([3.0])}),
        ("n_params", "n_tokens", "loss"),
    )
    assert rows.columns["n_tokens"][0] == pytest.approx(1e8)
    assert "FLOPs / 6N" in findings[0].message


def test_a_missing_column_names_those_there_are():
    with pytest.raises(DataError, match="no column unique_tokens; there are n_params, loss"):
        usable(RunTable({"n_params": np.ones(1), "loss": np.ones(1)}), ("n_params", "unique_tokens", "loss"))


def test_flops_that_contradict_6nd_are_named():
    size, tokens = np.geomspace(1e6, 1e9, 20), np.full(20, 1e9)
    flops = 6 * size * tokens
    assert contradictions(RunTable({"n_params": size, "n_tokens": tokens, "flops": flops})) == []
    flops[3] *= 10
    (found,) = contradictions(RunTable({"n_params": size, "n_tokens": tokens, "flops": flops}))
    assert found.rows == (4,)
    assert found.message.startswith("line 4: flops contradict 6ND, they are 10 times it")
    whole, one = contradictions(RunTable({"n_params": size, "n_tokens": tokens, "flops": flops / 3}))
    assert "throughout, they are about 0.333 times" in whole.message
    assert one.rows == (4,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30), st.floats(1.01, 2.0))
def test_bins_are_no_wider_than_they_may_be_and_keep_the_order(values, spread):
    values = np.array(values)
    found = binned(values, spread)
    for at in range(found.max() + 1):
        inside = values[found == at]
        assert len(inside)
        assert inside.max() <= inside.min() * spread
    assert np.all(np.diff(found[np.argsort(values, kind="stable")]) >= 0)


def test_a_declared_budget_goes_before_flops():
    flops = np.array([1e18, 1.2e18, 1.4e18, 1.6e18])
    assert budgets(RunTable({"flops": flops, "budget": np.array([1e18, 1e18, 2e18, 2e18])}), 1.05).tolist() == [
        0,
        0,
        1,
        1,
    ]
