"""A specification is read strictly: what is wrong is named with its key, its file and its line."""

import re
from pathlib import Path

import pytest

from maxlm.errors import ConfigError
from maxlm.scaling.spec import load_sweep, sweep_names

SPEC = """\
base: quickstart
folder: runs/x
overrides:
  train:
    seq_len: 64
budgets: [1e15, 1e16]
batch: {rule: power, value: 4096}
"""


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_sweep(path)
    return str(error.value)


def test_a_specification_is_its_values_its_base_and_its_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text(SPEC)
    sweep = load_sweep(tmp_path / "mine.yaml")
    assert (sweep.spec.name, str(sweep.folder)) == ("mine", "runs/x")
    assert sweep.spec.budgets == (1e15, 1e16)
    assert sweep.base.train.seq_len == 64
    # All held-out text at the end of a run, and nothing before: every run is scored on the same.
    assert (sweep.base.evaluation.every, sweep.base.evaluation.max_batches) == (None, None)


def test_the_base_may_be_a_file_beside_the_specification(tmp_path):
    (tmp_path / "small.yaml").write_text("extends: quickstart\nmodel: {d_model: 64, n_heads: 2}\n")
    (tmp_path / "spec.yaml").write_text(SPEC.replace("base: quickstart", "base: small.yaml"))
    assert load_sweep(tmp_path / "spec.yaml").base.model.d_model == 64


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("budgets:", "budget:"), 6, "unknown key `budget`; did you mean `budgets`"),
        (("[1e15, 1e16]", "[1e16, 1e15]"), 6, "budgets: must ascend"),
        (("[1e15, 1e16]", "[1e16, 1.001e16]"), 6, "budgets: must ascend"),
        (("[1e15, 1e16]", "[0, 1e15]"), 6, "budgets: must be above 0"),
        (("value: 4096", "valu: 4096"), 7, "unknown key `batch.valu`; did you mean `batch.value`"),
        (("rule: power, value: 4096", "rule: power"), 7, "rule = 'power' needs `value`"),
        (("rule: power", "rule: powr"), 7, "batch.rule.*did you mean `power`"),
        (("seq_len: 64", "seq_length: 64"), 5, "unknown key `train.seq_length`; did you mean `train.seq_len`"),
        (("seq_len: 64", "steps: 64"), 5, "overrides.train.steps = 64: the sweep itself says this.*budgets"),
        (("base: quickstart", "base: quikstart"), 1, "base: quikstart: not a file.*did you mean `quickstart`"),
        (("folder: runs/x", "sizes: [1e6]"), 2, "budgets or sizes must be given, and both are"),
        (("folder: runs/x", "decay: {branches: true}"), 2, "decay.branches = true goes with `sizes`"),
        (("folder: runs/x", "decay: {fraction: 0.1}"), 2, "decay is of schedule.kind = 'wsd'.*'cosine'"),
        (("folder: runs/x", "tokens_per_parameter: [1, 2, 3]"), 2, "has 3 values for 2 budgets"),
        (("folder: runs/x", "seeds: [1, 1]"), 2, r"seeds: \[1, 1\] must differ"),
        (("folder: runs/x", "hardware: {mfu: 0.4}"), 2, "either topology or flops_per_second"),
        (("folder: runs/x", "learning_rate: {value: 1e-3}"), 2, "value is of rule 'power', and rule = 'step_law'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_file_and_line(change, line, message, tmp_path):
    said = refused(tmp_path, SPEC.replace(*change))
    assert re.search(message, said), said
    assert re.search(rf"spec\.yaml:{line}\b", said), said


def test_several_problems_are_told_at_once(tmp_path):
    said = refused(tmp_path, SPEC.replace("budgets", "budgetts").replace("value: 4096", "value: many"))
    assert "budgetts" in said
    assert 'batch.value = "many": expected number' in said


def test_no_held_out_text_is_refused(tmp_path):
    said = refused(tmp_path, SPEC.replace("train:\n    seq_len: 64", "data:\n    heldout_fraction: 0"))
    assert "data.heldout_fraction = 0" in said


def test_packaged_sweeps_are_found_by_name():
    assert "ladder-cpu" in sweep_names()
    for name in sweep_names():
        assert load_sweep(name).spec.name == name
    with pytest.raises(ConfigError, match=r"they are .*ladder-cpu"):
        load_sweep("laddder")
