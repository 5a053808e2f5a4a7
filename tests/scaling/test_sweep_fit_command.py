"""`maxlm sweep fit` on the command line."""

import json

import pytest
from synthetic import KNOWN

from maxlm.cli import main
from maxlm.cli_sweep import LAW_NAMES
from maxlm.scaling.frontier import APPROACHES
from maxlm.scaling.laws import LAWS
from maxlm.scaling.table import write_table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    made = KNOWN["chinchilla"].table(0, rows=60)
    rows = [{name: float(values[i]) for name, values in made.columns.items()} for i in range(60)]
    return write_table(tmp_path_factory.mktemp("sweep") / "runs.csv", rows)


def test_json_is_one_object_with_what_other_tools_rely_on(table, capsys):
    assert main(["sweep", "fit", str(table), "--law", "chinchilla", "--json", "--resamples", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["parameters"]) == ["E", "A", "B", "alpha", "beta"]
    for estimate in found["parameters"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert found["converged"] is True
    assert (found["starts"], found["starts_agreeing"]) == (64, 64)
    assert found["warnings"] == []
    assert 0 < found["objective"] < 1e-2
    assert [point["flops"] for point in found["optimum"]][1] == pytest.approx(10 * found["optimum"][0]["flops"])


def test_json_without_resamples_has_no_intervals(table, capsys):
    assert main(["sweep", "fit", str(table), "--json", "--resamples", "0"]) == 0
    alpha = json.loads(capsys.readouterr().out)["parameters"]["alpha"]
    assert (alpha["low"], alpha["high"]) == (None, None)


def test_people_read_parameters_optimum_back_test_and_verdict(table, capsys):
    assert main(["sweep", "fit", str(table), "--resamples", "100", "--budget", "1e21", "--budget", "1e27"]) == 0
    text = capsys.readouterr().out
    for part in (
        "L(N, D) = E + A / N^alpha",
        "64 of 64 starts agree",
        " alpha ",
        "1e+21",
        "back-test:",
        "extrapolating",
    ):
        assert part in text


@pytest.mark.parametrize("loss", ["lad", "squared"])
def test_other_losses_are_options(table, capsys, loss):
    assert main(["sweep", "fit", str(table), "--loss", loss, "--json", "--resamples", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["converged"], found["delta"]) == (loss, True, None)
    assert found["parameters"]["alpha"]["value"] == pytest.approx(0.35, abs=0.03)


def test_laws_are_listed_with_equation_source_and_columns(capsys):
    assert set(LAW_NAMES) == {*LAWS, *APPROACHES}
    assert main(["sweep", "fit", "--laws", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["law"] for row in rows} == set(LAW_NAMES)
    assert all(row["equation"] and "arXiv" in row["source"] and row["columns"] for row in rows)
    with pytest.raises(SystemExit):
        main(["sweep", "fit", "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in LAW_NAMES)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.csv"], 3, "no such file"),
        ([], 2, "no table"),
        (["TABLE", "--law", "moe"], 3, "no column n_params_active; there are n_params, n_tokens, loss"),
        (["TABLE", "--column", "n_params=Size"], 3, "no column 'Size', which was to be n_params"),
    ],
)
def test_errors_name_what_is_wrong(table, capsys, arguments, code, message):
    assert main(["sweep", "fit", *(str(table) if each == "TABLE" else each for each in arguments)]) == code
    assert message in capsys.readouterr().err
