"""The grid: exact shapes, tokens, steps and FLOPs; what the caps leave out; what it warns of."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.cli import main
from maxlm.errors import ConfigError
from maxlm.models.flops import count_parameters, training_flops_per_token
from maxlm.plan import make_plan
from maxlm.planning.topology import parse_topology
from maxlm.scaling.ladder import make_ladder
from maxlm.scaling.spec import load_sweep
from tests.scaling import specs


def by_hand(d: int, n_layers: int, d_ff: int, vocab: int, seq_len: int) -> tuple[int, int, float]:
    """Parameters, those without embeddings, and training FLOPs a token of a tied Llama with as many key heads as heads.

    A layer: q, k, v, o of d x d, three matrices of d x d_ff, two norms; scores and values of (seq_len + 1) / 2
    positions, 4 d FLOPs each. The backward pass is twice the forward.
    """
    products = n_layers * (4 * d * d + 3 * d * d_ff)
    inner = products + n_layers * 2 * d + d
    forward = 2 * products + n_layers * 4 * d * (seq_len + 1) / 2 + 2 * vocab * d
    return inner + vocab * d, inner, 3 * forward


def test_the_grid_of_budgets_is_what_hand_computation_gives(tmp_path):
    ladder = specs.ladder(tmp_path / "s.yaml")
    assert len(ladder.runs) == 6
    for run in ladder.runs:
        model, train = run.config.model, run.config.train
        total, inner, flops = by_hand(model.d_model, model.n_layers, model.d_ff, 384, 32)
        assert (run.count.total, run.count.non_embedding) == (total, inner)
        assert run.flops == pytest.approx(flops * run.tokens, rel=1e-12)
        assert run.tokens == train.steps * train.global_batch_tokens
        assert run.budget is not None
        assert abs(run.flops / run.budget - 1) <= 0.01
        assert (model.n_heads, model.d_ff) == (model.d_model // 8, 2 * model.d_model)
    for budget in (2e9, 8e9):
        ratios = [run.tokens / run.count.total for run in ladder.runs if run.budget == budget]
        assert ratios == sorted(ratios, reverse=True)
        # Shapes come in steps: each wanted ratio, 4, 1 and 1/4, is met to within the neighbouring shape's.
        assert ratios == pytest.approx([4, 1, 0.25], rel=0.45)


@settings(max_examples=40, deadline=None)
@given(
    budgets=st.lists(st.floats(2e10, 1e14), min_size=1, max_size=3, unique_by=lambda x: round(math.log(x) * 20)),
    n=st.integers(2, 6),
    span=st.floats(4, 100),
    centre=st.floats(2, 40),
    batch=st.integers(64, 300),
    multiple=st.sampled_from([1, 2, 3]),
)
def test_flops_are_within_one_percent_of_the_budget_and_batches_whole(
    tmp_path_factory, budgets, n, span, centre, batch, multiple
):
    keys = {
        "budgets": sorted(budgets), "sizes_per_budget": n, "span": span, "tokens_per_parameter": [centre],
        "batch": {"rule": "power", "value": batch, "multiple": multiple},
    }  # fmt: skip
    ladder = specs.ladder(tmp_path_factory.mktemp("g") / "s.yaml", **keys)
    assert len({run.name for run in ladder.runs}) == len(ladder.runs)
    for run in ladder.runs:
        train, budget = run.config.train, run.budget
        flops = training_flops_per_token(run.config.model, train.seq_len) * train.steps * train.global_batch_tokens
        assert budget is not None
        assert abs(flops / budget - 1) <= 0.01
        assert train.global_batch_tokens % (multiple * train.seq_len) == 0
        near = max(1, round(batch / (32 * multiple))) * 32 * multiple
        assert 0.79 * near <= train.global_batch_tokens <= 1.26 * near


def test_a_budget_too_small_for_its_batch_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"steps of 32,768 tokens.*batch\.value.*budget larger"):
        specs.ladder(tmp_path / "s.yaml", budgets=[1e9], batch={"rule": "power", "value": 32768})


def test_sizes_by_lengths_make_each_of_each_and_seeds_repeat_it(tmp_path):
    ladder = specs.ladder(tmp_path / "s.yaml", sizes=[1e4, 4e4], tokens_per_parameter=[1, 3], seeds=[0, 5])
    assert len(ladder.runs) == 8
    for run in ladder.runs:
        assert run.count.total == pytest.approx(min((1e4, 4e4), key=lambda n: abs(n - run.size)), rel=0.3)
        assert min(abs(run.tokens_per_parameter / t - 1) for t in (1, 3)) <= 0.01
    assert sorted(run.config.train.seed for run in ladder.runs) == [0] * 4 + [5] * 4


def test_branches_share_all_that_a_checkpoint_fixes_and_begin_where_their_decay_does(tmp_path):
    ladder = specs.ladder(
        tmp_path / "s.yaml", sizes=[1e4], tokens_per_parameter=[1, 2, 4],
        overrides={"schedule": {"kind": "wsd"}}, decay={"branches": True, "fraction": 0.25},
    )  # fmt: skip
    trunk, *branches = ladder.runs
    assert trunk.trunk is None
    assert trunk.config.checkpoint.at == tuple(sorted(branch.begins for branch in branches))
    for branch in branches:
        assert branch.trunk == trunk.name
        assert branch.begins == branch.steps - branch.config.schedule.decay_steps
        assert branch.config.schedule.warmup_steps == trunk.config.schedule.warmup_steps < branch.begins
        for name in ("model", "data", "optimizer"):
            assert getattr(branch.config, name) == getattr(trunk.config, name)
        assert branch.share == pytest.approx(0.25, abs=0.02)


def test_caps_leave_runs_out_and_say_so_and_the_longest_branch_left_is_the_trunk(tmp_path):
    keys = {"sizes": [1e4], "tokens_per_parameter": [1, 2, 4], "decay": {"branches": True}}
    wsd = {"schedule": {"kind": "wsd"}}
    whole = specs.ladder(tmp_path / "a.yaml", **keys, overrides=wsd)
    capped = specs.ladder(tmp_path / "b.yaml", **keys, overrides=wsd, caps={"max_tokens": 25_000})
    assert [run.name for run in capped.runs] == [run.name for run in whole.runs[1:]]
    assert len(capped.left_out) == 1
    assert "caps.max_tokens = 25,000" in capped.left_out[0]
    trunk, branch = capped.runs
    assert (trunk.trunk, branch.trunk) == (None, trunk.name)
    assert trunk.config.checkpoint.at == (branch.begins,)
    small = specs.ladder(tmp_path / "c.yaml", caps={"max_memory_gib": 0.01})
    assert small.left_out
    assert all("caps.max_memory_gib" in reason for reason in small.left_out)
    assert all(run.memory_bytes is not None and run.memory_bytes <= 0.01 * 2**30 for run in small.runs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sizes_per_budget": 3}, "budget 2e+09: 3 sizes, and its parabola needs 4"),
        ({"sizes_per_budget": 5, "span": 2}, "too narrow for its parabola"),
        ({"tokens_per_parameter": [200.0], "span": 1600, "sizes_per_budget": 4}, "all fewer than the 200 in"),
        ({"tokens_per_parameter": [22.0], "span": 60, "sizes_per_budget": 4}, "off the centre, 22, by"),
        ({"sizes_per_budget": 6, "span": 2}, "the nearest shape is d24-l2 again, and it is taken once"),
        ({"sizes_per_budget": 6, "span": 40}, "the shape nearest to 6.32 tokens a parameter is d16-l1 with 4.13"),
        ({"unique_tokens": 10_000}, "more tokens than the 10,000 to train on, up to"),
        ({"batch": {"rule": "power", "value": 1024}}, "fewer than 50 steps"),
    ],
)  # fmt: skip
def test_a_grid_that_will_not_make_a_parabola_is_warned_of(keys, message, tmp_path):
    ladder = specs.ladder(tmp_path / "s.yaml", **keys)
    assert any(message in warning for warning in ladder.warnings), ladder.warnings


def test_a_good_grid_has_no_warnings():
    ladder = make_ladder(load_sweep("ladder-cpu"))
    assert len(ladder.runs) >= 20
    assert [warning for warning in ladder.warnings if "epoch" not in warning] == []
    assert not ladder.left_out


def test_memory_time_and_cost_are_the_planners(tmp_path):
    sweep = {
        "base": "llama-150m", "budgets": [1e19], "sizes_per_budget": 4,
        "shape": {"head_dim": 64, "d_model_multiple": 128, "d_ff_multiple": 128},
        "batch": {"multiple": 8},
        "hardware": {"topology": "v5e:2x4", "price_per_chip_hour": 1.2},
    }  # fmt: skip
    path = tmp_path / "v5e.yaml"
    path.write_text(json.dumps(sweep))
    ladder = make_ladder(load_sweep(path))
    topology = parse_topology("v5e:2x4")
    for run in ladder.runs:
        plan = make_plan(run.config, topology, compiled=False, relief=False)
        assert run.memory_bytes == plan["analytic"]["memory"]["total"]
        assert run.seconds == pytest.approx(plan["prediction"]["step_seconds"][1] * run.steps)
        assert run.cost == pytest.approx(run.seconds / 3600 * 8 * 1.2)
    path.write_text(json.dumps({**sweep, "hardware": {"topology": "v5e:2x4", "mfu": 0.4, "startup_seconds": 60}}))
    for run in make_ladder(load_sweep(path)).runs:
        assert run.seconds == pytest.approx(run.flops / (8 * 197e12 * 0.4) + 60)


def test_a_mesh_that_does_not_suit_the_hardware_is_a_warning_that_names_the_run(tmp_path):
    ladder = specs.ladder(
        tmp_path / "s.yaml", overrides={"mesh": {"tensor": 16, "fsdp": 1}}, hardware={"topology": "v5e:4x4"}
    )
    assert any(
        "c2e9-d16-l1 and 5 more runs cannot be on v5e:4x4" in warning and "mesh.tensor" in warning
        for warning in ladder.warnings
    )


def test_plan_prints_the_grid_and_as_json_its_exact_figures(tmp_path, capsys):
    path = specs.write(tmp_path / "s.yaml", hardware={"flops_per_second": 1e9, "concurrent": 2})
    assert main(["sweep", "plan", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "c2e9-d16-l1" in shown
    assert "6 runs" in shown
    assert main(["sweep", "plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    runs = make_ladder(load_sweep(path)).runs
    assert [run["n_params"] for run in plan["runs"]] == [count_parameters(run.config.model).total for run in runs]
    assert plan["totals"]["seconds"] == pytest.approx(sum(run.flops for run in runs) / 1e9 / 2)
