"""The coordinate check: with transfer changes do not depend on the size, without they do; and how it is shown."""

import contextlib
import importlib.util
import io
import json

import numpy as np
import pytest

from maxlm import cli
from maxlm.config import to_yaml
from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.scaling.coordinates import STABLE, coordinate_check, language, resized, verdict
from tests import tiny, tiny_moe

MODEL = {**tiny.LLAMA, "n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64}
RUN = {"model": MODEL, "optimizer": {"learning_rate": 1e-2}, "train": {"global_batch_tokens": 256}}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What the command prints as JSON, and its picture where matplotlib is there."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "tiny.yaml").write_text(to_yaml(tiny.config(**RUN)))
    command = ["sweep", "coordinates", str(folder / "tiny.yaml"), "--widths", "256,32", "--steps", "4", "--json"]
    if importlib.util.find_spec("matplotlib"):
        command += ["--png", str(folder / "check.png")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(command) == 0
    return json.loads(printed.getvalue()), folder / "check.png"


def slopes(checked, which):
    return {row["activation"]: row[f"slope_{which}"] for row in checked[0]["slopes"]}


def test_with_mup_changes_do_not_depend_on_the_width(checked):
    found = slopes(checked, "on")
    assert list(found) == ["embedding", "layer 1", "layer 2", "logits"]
    # Of three seeds at most 0.01, 0.01, 0.02, and for logits -0.07 to -0.26; without transfer 0.01, 1.9, 2.1 and 0.8.
    logits = found.pop("logits")
    assert all(abs(slope) < 0.1 for slope in found.values()), found
    # The part that the head as it started has in it falls with slope -1/2, the other stays.
    assert -0.5 < logits < 0.1


def test_without_transfer_layers_and_logits_change_more_the_wider_they_are(checked):
    found = slopes(checked, "off")
    # AdamW's step moves each of d entries by the learning rate, and a product with them by d of it: slope 1 of every
    # layer, more where layers add up; embeddings are moved alike.
    assert min(found["layer 1"], found["layer 2"], found["logits"]) > 0.5, found
    assert abs(found["embedding"]) < 0.15


def test_the_command_says_it_in_words_and_numbers(checked):
    plain, _ = checked
    rows = {row["activation"]: row for row in plain["slopes"]}
    assert rows["logits"]["verdict_off"] == "grows with width"
    assert rows["logits"]["verdict_on"] == "stable"
    assert plain["transfer"] == {"kind": "mup", "base_width": 32}
    on = plain["curves"]["on"]
    assert [curve["size"] for curve in on] == plain["sizes"] == [32, 256]
    changes = np.log([curve["activation_change"][-1][3] for curve in on])
    assert rows["logits"]["slope_on"] == pytest.approx((changes[1] - changes[0]) / np.log(8))
    assert on[0]["activation_change"][0] == [0.0] * 4  # nothing has changed yet
    assert on[0]["loss"][-1] < on[0]["loss"][0]


def test_the_base_model_is_the_same_with_transfer_and_without(checked):
    on, off = (checked[0]["curves"][which] for which in ("on", "off"))
    assert on[0] == off[0]
    assert on[1] != off[1]


def test_the_picture_is_a_png(checked):
    pytest.importorskip("matplotlib")
    assert checked[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_with_completep_changes_do_not_depend_on_the_depth():
    run = tiny.config(**RUN)
    found = coordinate_check(run, (2, 8, 16), language(run, 4), along="depth")
    assert found.transfer == {"kind": "completep", "base_width": 32, "base_depth": 2}
    assert found.names == ("embedding", "last layer", "logits")
    assert all(abs(found.slope("on", name)) < 0.15 for name in found.names)
    assert found.slope("off", "last layer") > STABLE


def test_slopes_in_words():
    assert verdict(0.0, "width") == verdict(-STABLE, "width") == "stable"
    assert verdict(1.0, "depth") == "grows with depth"
    assert verdict(-1.0, "width") == "shrinks with width"
    assert verdict(float("nan"), "width").startswith("not finite")


def test_other_sizes_are_in_proportion():
    model = ModelConfig.model_validate({**tiny_moe.MIXTRAL, "d_ff": 96})
    wide = resized(model, "width", 192, {"kind": "mup", "base_width": 64})
    assert (wide.n_heads, wide.kv_heads, wide.head_width, wide.d_ff, wide.moe.d_ff) == (12, 6, 16, 288, 144)
    assert (wide.n_layers, wide.scales.width) == (3, 3.0)
    deep = resized(model, "depth", 6, {"kind": "completep", "base_width": 64, "base_depth": 3})
    assert (deep.n_layers, deep.d_model, deep.scales.residual) == (6, 64, 0.5)


@pytest.mark.parametrize(
    ("model", "sizes", "along", "message"),
    [
        (MODEL, (32, 32), "width", "two different"),
        (MODEL, (32, 40), "width", "would be 2.5"),
        (tiny.T5, (64, 128), "width", "looks at decoders"),
        ({**MODEL, "transfer": {"kind": "mup", "base_width": 32}}, (2, 4), "depth", "says nothing of depth"),
    ],
)
def test_sizes_that_cannot_be_are_refused(model, sizes, along, message):
    with pytest.raises(ConfigError, match=message):
        coordinate_check(run := tiny.config(model=model), sizes, language(run, 1), along=along)


def test_the_made_up_language_can_be_learned_and_is_the_same_again():
    run = tiny.config(model={"vocab_size": 50, "max_seq_len": 200}, train={"seq_len": 200, "global_batch_tokens": 1600})
    (batch, other), (again, _) = language(run, 2), language(run, 2)
    assert not np.array_equal(batch["inputs"], other["inputs"])
    for name, values in batch.items():
        np.testing.assert_array_equal(values, again[name])
    followers = {}
    for token, after in zip(batch["inputs"].ravel(), batch["targets"].ravel(), strict=True):
        followers.setdefault(int(token), set()).add(int(after))
    assert max(map(len, followers.values())) <= 4


def test_the_command_says_which_option_is_wrong(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "coordinates", "quickstart", "--widths", "64,x"])
    assert "argument --widths: 'x' is not an integer" in capsys.readouterr().err
