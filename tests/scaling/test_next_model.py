"""The config of the next model: its exact FLOPs, its rules, what it fits; and when it is not written."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from maxlm.cli import main
from maxlm.config import load_config
from maxlm.errors import ClusterError, ConfigError
from maxlm.models.flops import count_parameters, training_flops_per_token
from maxlm.plan import make_plan
from maxlm.planning.topology import parse_topology
from maxlm.scaling.fitting import fit
from maxlm.scaling.hardware import Hardware, placed
from maxlm.scaling.next_model import load_rules, next_model, write_model
from maxlm.scaling.optimum import Question
from maxlm.scaling.result import Estimate, FitOptions, FitResult
from maxlm.scaling.shapes import Family, ShapeConfig
from maxlm.scaling.table import write_table
from tests.scaling import specs
from tests.scaling.synthetic import KNOWN


@pytest.fixture(scope="module")
def fitted() -> FitResult:
    return fit(KNOWN["chinchilla"].table(0), "chinchilla", FitOptions(resamples=200, backtest=False))


def exact_flops(config) -> float:
    """Training FLOPs of a config, and no rule: its steps, its tokens, its shape."""
    per_token = training_flops_per_token(config.model, config.train.seq_len, config.row_lengths)
    return config.train.steps * config.train.global_batch_tokens * per_token


@pytest.mark.parametrize("flops", [3e17, 2e19, 2e20])
def test_the_written_config_loads_and_its_exact_flops_are_within_a_percent_of_the_budget(fitted, tmp_path, flops):
    found = next_model(fitted, Question(flops), "llama-20m")
    out = tmp_path / "next.yaml"
    written = write_model(found, out)
    config = load_config(out)
    assert config == written
    assert (config.name, config.run_dir) == ("next", "runs/next")
    assert exact_flops(config) == pytest.approx(flops, rel=0.01)
    assert found.model is not None
    assert found.model.flops == pytest.approx(exact_flops(config), rel=1e-12)
    # What the family leaves alone is the base's, and the rest is by rule (Step Law, arXiv:2503.04715, equation 1).
    base = load_config("llama-20m")
    assert config.data == base.data
    assert config.optimizer.weight_decay == base.optimizer.weight_decay
    n, d = count_parameters(config.model).non_embedding, config.train.steps * config.train.global_batch_tokens
    assert config.optimizer.learning_rate == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=0.01)
    assert 0.8 <= config.train.global_batch_tokens / (0.58 * d**0.571) <= 1.3
    assert config.schedule.warmup_steps == pytest.approx(0.02 * config.train.steps, abs=1)


def test_the_shape_is_the_best_of_its_family_at_exact_flops(fitted):
    flops = 1e20
    found = next_model(fitted, Question(flops), "llama-20m")
    base = load_config("llama-20m")
    e, a, b, alpha, beta = (fitted.parameters[name].value for name in ("E", "A", "B", "alpha", "beta"))
    losses = {}
    for shape in Family(base.model, ShapeConfig()):
        size = shape.count.total
        tokens = flops / training_flops_per_token(shape.model, base.train.seq_len)
        losses[size] = e + a / size**alpha + b / tokens**beta
        if size > 5e9:
            break
    assert found.model is not None
    assert found.model.loss is not None
    assert found.model.count.total == min(losses, key=lambda size: losses[size])
    # Steps are whole: the tokens are up to 1% off, which is 1e-4 of the loss.
    assert found.model.loss.value == pytest.approx(min(losses.values()), rel=1e-4)
    assert found.model.loss.low < found.model.loss.value < found.model.loss.high


def test_serving_is_paid_for_at_exact_flops_too(fitted):
    base, served = load_config("llama-20m"), 2e10
    within = next_model(fitted, Question(1e20, served_tokens=served), "llama-20m").model
    plain = next_model(fitted, Question(1e20), "llama-20m").model
    assert within is not None
    assert plain is not None
    assert within.count.total < plain.count.total
    forward = training_flops_per_token(within.config.model, base.train.seq_len) / 3
    assert within.flops + served * forward == pytest.approx(1e20, rel=0.01)
    assert within.serving_flops == pytest.approx(served * forward, rel=1e-12)

    same = next_model(fitted, Question(1e20, served_tokens=served, same_loss=True), "llama-20m")
    assert same.model is not None
    assert same.model.loss is not None
    assert same.best.loss is not None
    assert same.model.loss.value == pytest.approx(same.best.loss.value, rel=1e-4)
    assert same.model.count.total < plain.count.total


def test_bounds_hold_for_the_shape_that_is_taken(fitted):
    found = next_model(fitted, Question(1e20, max_params=1e8, max_tokens=5e10), "llama-20m")
    assert found.model is not None
    assert 0.8e8 < found.model.count.total <= 1e8
    assert 0.99 * 5e10 <= found.model.n_tokens <= 5e10
    with pytest.raises(ConfigError, match="at most 1000 are allowed"):
        next_model(fitted, Question(1e20, max_params=1000), "llama-20m")


def test_a_model_on_hardware_is_the_largest_that_fits_and_its_plan_says_so(fitted, tmp_path):
    topology = parse_topology("v5e:1x1")
    found = next_model(fitted, Question(3e21), "llama-150m", Hardware(topology))
    out = tmp_path / "one-chip.yaml"
    write_model(found, out)
    plan = make_plan(load_config(out), topology, compiled=False, relief=False)
    assert plan["fits"]
    (size,) = found.binding
    assert size.name == "max_params"
    assert "v5e:1x1 has memory for" in size.message
    assert size.loss_cost is not None
    assert size.loss_cost.value > 0
    assert found.model is not None
    assert found.model.memory_bytes == plan["analytic"]["memory"]["total"]
    assert found.best.n_params.value == pytest.approx(found.model.count.total, rel=1e-9)
    # The next larger shape of the family does not fit, with every layer recomputed and a row at a time.
    larger = next(s for s in Family(load_config("llama-150m").model, ShapeConfig()) if s.count.total > size_of(found))
    config = found.model.config
    assert placed(config, topology) is not None
    assert placed(config.model_copy(update={"model": larger.model}), topology) is None


def size_of(found) -> int:
    return found.model.count.total


def test_a_model_that_fits_is_not_bound_and_its_batch_suits_the_devices(fitted, tmp_path):
    topology = parse_topology("v5e:4x4")
    found = next_model(fitted, Question(1e20), "llama-150m", Hardware(topology))
    assert found.binding == ()
    out = tmp_path / "pod.yaml"
    config = write_model(found, out)
    assert config.train.global_batch_tokens // config.train.seq_len % 16 == 0
    assert make_plan(load_config(out), topology, compiled=False, relief=False)["fits"]


def test_a_batch_too_small_for_the_devices_has_a_row_for_each_and_says_so():
    topology = parse_topology("v5e:16x16")
    fitted = fit(KNOWN["chinchilla"].table(0), "chinchilla", FitOptions(resamples=0, backtest=False))
    found = next_model(fitted, Question(1e19), "llama-1b", Hardware(topology))
    assert found.binding == ()
    assert found.model is not None
    train = found.model.config.train
    assert train.global_batch_tokens == 256 * train.seq_len
    assert "times that, for rows that the devices can share out" in found.model.by_rule["batch"]
    assert make_plan(found.model.config, topology, compiled=False, relief=False)["fits"]


def test_a_mesh_that_does_not_suit_the_devices_gives_way_to_one_that_does():
    config, topology = load_config("llama-150m", ["mesh.tensor=8"]), parse_topology("v5e:2x2")
    with pytest.raises(ClusterError):
        make_plan(config, topology, compiled=False, relief=False)
    found = placed(config, topology)
    assert found is not None
    assert make_plan(found, topology, compiled=False, relief=False)["fits"]
    assert found.mesh != config.mesh
    assert found.train.global_batch_tokens == config.train.global_batch_tokens


def test_a_model_for_which_no_hardware_is_enough_is_refused(fitted):
    with pytest.raises(ConfigError, match="no model of llama3-405b fits v5e:1x1, not even one of"):
        next_model(fitted, Question(1e24, max_params=1e12), "llama3-405b", Hardware(parse_topology("v5e:1x1")))


def test_a_specifications_shapes_and_rules_hold_for_the_next_model(fitted, tmp_path):
    spec = specs.write(tmp_path / "sweep.yaml")
    found = next_model(fitted, Question(1e12), spec)
    out = tmp_path / "next.yaml"
    config = write_model(found, out)
    assert load_config(out) == config
    assert exact_flops(config) == pytest.approx(1e12, rel=0.01)
    assert config.model.d_model // config.model.n_heads == specs.SHAPE["head_dim"]
    assert config.train.global_batch_tokens == 256
    assert config.optimizer.learning_rate == 1e-2
    assert config.model.vocab_size == 384
    # How a sweep scores its runs is not the model's: only what the specification itself overrides.
    assert config.evaluation.every == load_config("quickstart").evaluation.every
    assert config.evaluation.max_batches == 4


def test_a_specification_stands_for_its_table_and_its_family(tmp_path, capsys):
    spec = specs.write(tmp_path / "sweep.yaml")
    table = KNOWN["chinchilla"].table(0).columns
    rows = [dict(zip(table, map(float, row), strict=True)) for row in zip(*table.values(), strict=True)]
    write_table(tmp_path / "sweep" / "runs.csv", rows)
    out = tmp_path / "next.yaml"
    assert main(["sweep", "optimum", str(spec), "--flops", "1e12", "--resamples", "0", "--out", str(out)]) == 0
    assert "of the family of quickstart" in capsys.readouterr().out
    assert load_config(out).model.vocab_size == 384


def test_approach_2_takes_the_shape_whose_size_is_nearest(fitted):
    truth = {"a": 0.5, "b": 0.5, "k_N": 0.05, "k_D": 1 / 0.3}
    parameters = {name: Estimate(value, value, value) for name, value in truth.items()}
    powers = replace(fitted, law="approach2", parameters=parameters, samples=np.empty((0, 4)))
    found = next_model(powers, Question(1e20), "llama-20m")
    assert found.model is not None
    assert found.model.loss is None
    sizes = np.array(
        [s.count.total for s in itertools.islice(Family(load_config("llama-20m").model, ShapeConfig()), 99)]
    )
    assert found.model.count.total == sizes[np.argmin(np.abs(np.log(sizes / 0.05e10)))]
    assert found.model.flops == pytest.approx(1e20, rel=0.01)


def test_a_config_and_a_specification_are_told_apart(tmp_path):
    assert load_rules("llama-20m").spec.base == "llama-20m"
    assert load_rules(specs.write(tmp_path / "sweep.yaml")).spec.base == "quickstart"
    assert load_rules("ladder-cpu").spec.name == "ladder-cpu"


def test_a_fit_that_is_not_to_be_trusted_writes_nothing_unless_forced(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = np.geomspace(3e7, 3e9, 30)
    tokens = 1e20 / 6 / sizes  # one budget
    losses = 1.8 + 482 / sizes**0.35 + 2085 / tokens**0.366
    losses *= np.exp(0.003 * rng.standard_normal(30))
    rows = [
        {"n_params": n, "n_tokens": d, "loss": loss}
        for n, d, loss in zip(sizes.tolist(), tokens.tolist(), losses.tolist(), strict=True)
    ]
    table, out = write_table(tmp_path / "runs.csv", rows), tmp_path / "next.yaml"
    command = ["sweep", "optimum", str(table), "--flops", "1e20", "--config", "llama-20m", "--out", str(out)]
    assert main([*command, "--resamples", "50"]) == 3
    said = capsys.readouterr()
    assert "Do not trust this fit" in said.out
    assert "not written, since the fit is not to be trusted" in said.err
    assert "--force" in said.err
    assert not out.exists()
    assert main([*command, "--resamples", "50", "--force"]) == 0
    assert "Do not trust this fit" in out.read_text()
    assert exact_flops(load_config(out)) == pytest.approx(1e20, rel=0.01)


def test_the_base_is_not_written_over(fitted, tmp_path):
    base = tmp_path / "mine.yaml"
    base.write_text("extends: llama-20m\n")
    found = next_model(fitted, Question(1e19), base)
    with pytest.raises(ConfigError, match="give the new one another name"):
        write_model(found, base)
    write_model(found, tmp_path / "deeper.yaml")
    assert "extends: mine.yaml" in (tmp_path / "deeper.yaml").read_text()
    assert exact_flops(load_config(tmp_path / "deeper.yaml")) == pytest.approx(1e19, rel=0.01)
