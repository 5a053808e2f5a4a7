"""The search: what it looks at, what it leaves out and why, what it compiles, and the config that it writes."""

import io
import itertools
import math
import sys
from functools import partial

import pytest

from maxlm.config import load_config
from maxlm.errors import ConfigError, MaxlmError
from maxlm.models.config import RematConfig
from maxlm.parallel import support
from maxlm.parallel.mesh import AXES, MeshConfig
from maxlm.planning import cache
from maxlm.planning import search as search_module
from maxlm.planning.candidates import SLACK, price, priced, remat_choices, shortlisted, vary
from maxlm.planning.search import A_KIND, A_MESH, search, write_config
from maxlm.planning.topology import parse_topology

SOURCE = "llama3-8b"
SHORT = ("train.global_batch_tokens=1048576",)


@pytest.fixture(scope="module")
def config():
    return load_config(SOURCE, SHORT)


@pytest.fixture(scope="module")
def topology():
    return parse_topology("v5e:8x8")


@pytest.fixture(scope="module")
def everything(config, topology):
    return priced(config, topology)


@pytest.fixture(autouse=True, scope="module")
def _priced_once():
    """The same config and topology are priced once for all tests: a second or two each."""
    kept = {}

    def shortlisted_once(config, topology):
        name = (config.model_dump_json(), topology)
        if name not in kept:
            kept[name] = shortlisted(config, topology)
        return kept[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "shortlisted", shortlisted_once)
        yield


def planner(topology, *, larger=1.0, calls=None):
    """Plans as the roofline has them, with a memory that is `larger` than it says, as a compiler's would be."""

    def plan_one(config):
        if calls is not None:
            calls.append(config)
        candidate = price(config, topology)
        required = int(candidate.memory_bytes * larger)
        fits = required <= topology.hbm_bytes_per_device
        return {
            "compiled": {"memory": {"required": required}} if fits else None,
            "out_of_memory": None if fits else {"used": required},
            "fits": fits,
            "prediction": {"basis": "a test", "step_seconds": list(candidate.roofline.step_seconds), "mfu": [0.1, 0.2]},
        }

    return plan_one


def found(config, topology, plan_one, **options):
    return search(config, topology, plan_one=plan_one, source=SOURCE, overrides=SHORT, **options)


def test_candidates_are_all_that_the_code_accepts_and_no_others(config, topology, everything):
    candidates, refused = everything
    n, rows = topology.n_devices, config.train.global_batch_tokens // config.train.seq_len
    sides = [2**i for i in range(int(math.log2(n)) + 1)]
    accepted, n_refused = set(), 0
    for data, fsdp, tensor in itertools.product(sides, repeat=3):
        if data * fsdp * tensor != n:
            continue
        for zero in (0, 1) if data > 1 else (0,):
            for accumulation in [a for a in range(1, rows + 1) if rows % a == 0]:
                mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, zero=zero)
                sizes = dict(zip(AXES, (1, data, fsdp, 1, 1, tensor), strict=True))
                try:
                    support.check_mesh(vary(config, mesh=mesh, accumulation=accumulation), sizes)
                except ConfigError:
                    n_refused += 1
                    continue
                accepted |= {(*sizes.values(), zero, remat, accumulation) for remat in remat_choices(config)}
    assert {candidate.choice for candidate in candidates} == accepted
    assert refused == n_refused > 0


def test_rows_are_shared_where_they_are_long_and_the_code_allows_it(config, monkeypatch):
    from maxlm.planning.candidates import meshes

    def contexts(*overrides):
        return {mesh.context for mesh in meshes(load_config(SOURCE, [*SHORT, *overrides]), 8)}

    long = "train.seq_len=131072", "model.max_seq_len=131072"
    assert contexts() == {1}
    assert contexts(*long) == {1, 2, 4, 8}
    refusal = support.Refusal("context", "dense", "of a test", "")
    monkeypatch.setattr(support, "REFUSALS", (*support.REFUSALS, refusal))
    assert contexts(*long) == {1}


def test_a_candidate_is_left_out_only_for_memory_or_time(config, topology, everything):
    capacity = topology.hbm_bytes_per_device
    shortlist = shortlisted(config, topology)
    candidates = {c.choice: c for c in everything[0]}
    kept = {c.choice for c in shortlist.pool}
    surest = min(c.roofline.step_seconds[1] for c in candidates.values() if c.memory_bytes <= capacity * (1 - SLACK))
    too_large = 0
    for choice, candidate in candidates.items():
        if choice in kept:
            assert candidate.memory_bytes <= capacity * (1 + SLACK)
            continue
        if candidate.memory_bytes > capacity * (1 + SLACK):
            too_large += 1
            continue
        beaten = any(
            other.placement == candidate.placement
            and other.choice != choice
            and other.seconds <= candidate.seconds
            and other.memory_bytes <= candidate.memory_bytes
            for other in candidates.values()
        )
        assert beaten or candidate.roofline.step_seconds[0] > surest, candidate.label
    assert shortlist.too_large == too_large > 0
    assert shortlist.considered == len(candidates) == len(kept) + too_large + shortlist.slower


def test_the_config_as_it_was_given_is_planned_first(config, topology):
    calls = []
    result = found(config, topology, planner(topology, calls=calls), compile_best=3)
    assert calls[0] == config
    assert [trial.candidate.own for trial in result.trials].count(True) == 1
    assert result.best.rank_by <= next(trial.rank_by for trial in result.trials if trial.candidate.own)


def test_what_is_compiled_is_not_near_copies(config, topology):
    calls = []
    result = found(config, topology, planner(topology, calls=calls))
    assert len(calls) == len(result.trials) == 8
    tried = [trial.candidate.mesh for trial in result.trials]
    assert max(tried.count(mesh) for mesh in tried) <= A_MESH
    kinds = [trial.candidate.kind for trial in result.trials]
    assert max(kinds.count(kind) for kind in kinds) <= A_KIND
    with_remat = [(trial.candidate.mesh, trial.candidate.config.model.remat) for trial in result.trials]
    assert len(set(with_remat)) == 8


def test_those_that_fit_are_ranked_by_the_middle_of_their_range_and_then_its_worst(config, topology):
    ranges = iter([[5.0, 9.0], [6.0, 8.0], [1.0, 12.0], [0.1, 0.2], [7.0, 8.0]])
    plan_one = planner(topology)

    def with_range(config):
        plan = plan_one(config)
        plan["prediction"]["step_seconds"] = step = next(ranges)
        plan.update(fits=True, compiled={"memory": {"required": 1}})
        return plan | ({"fits": False, "compiled": None, "out_of_memory": {"used": 10**12}} if step[1] < 1 else {})

    result = found(config, topology, with_range, compile_best=5)
    ranking = result.to_dict()["ranking"]
    assert [row["step_seconds"] for row in ranking] == [[1.0, 12.0], [6.0, 8.0], [5.0, 9.0], [7.0, 8.0], None]
    assert [row["rank"] for row in ranking] == [1, 2, 3, 4, None]
    assert ranking[-1]["required_bytes"] == 10**12
    assert result.best.step_seconds == (1.0, 12.0)


def test_where_one_did_not_fit_no_larger_one_of_its_mesh_is_tried(config, topology):
    calls = []
    result = found(config, topology, planner(topology, larger=1.3, calls=calls))
    order = {id(call): i for i, call in enumerate(calls)}
    trials = sorted(result.trials, key=lambda trial: order[id(trial.candidate.config)])
    for before, after in itertools.combinations(trials, 2):
        if before.candidate.placement == after.candidate.placement and not before.fits:
            assert after.candidate.memory_bytes < before.candidate.memory_bytes
    assert result.best is not None
    assert not all(trial.fits for trial in trials)


def test_a_search_finds_what_fits_where_the_compiler_needs_half_as_much_again(config, topology):
    result = found(config, topology, planner(topology, larger=1.5), compile_best=6)
    assert result.best is not None
    assert result.best.candidate.memory_bytes * 1.5 <= topology.hbm_bytes_per_device


def test_where_nothing_fits_there_is_no_best_and_no_config(config, topology, tmp_path):
    result = found(config, topology, planner(topology, larger=100.0), compile_best=4)
    assert result.best is None
    assert result.to_dict()["best"] is None
    assert all(row["required_bytes"] > topology.hbm_bytes_per_device for row in result.to_dict()["ranking"])
    with pytest.raises(ConfigError, match="nothing that was planned fits v5e:8x8"):
        write_config(result, tmp_path / "best.yaml")


def test_a_model_too_large_by_the_roofline_is_still_shown_to_the_compiler():
    config, topology = load_config("llama3-70b", SHORT), parse_topology("v5e:4x4")
    result = search(config, topology, plan_one=planner(topology), source="llama3-70b", overrides=SHORT)
    assert result.shortlist.too_large == result.shortlist.considered > 0
    assert 1 <= len(result.trials) <= 2
    assert result.best is None


def test_one_plan_that_fails_does_not_lose_the_others(config, topology):
    plan_one, broken = planner(topology), []

    def sometimes(config):
        if len(broken) < 2:
            broken.append(config.mesh)
            raise NotImplementedError("this mesh cannot be laid\nout")
        return plan_one(config)

    result = found(config, topology, sometimes, compile_best=5)
    assert len(result.trials) == 5
    assert [trial.failed for trial in result.trials[3:]] == ["NotImplementedError: this mesh cannot be laid"] * 2
    assert result.best.fits
    assert broken[0] != broken[1], "a mesh that failed is not tried again"


def test_where_every_plan_fails_the_first_error_is_raised(config, topology):
    def broken(config):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        found(config, topology, broken)


def test_a_search_that_was_interrupted_goes_on_where_it_stopped(config, topology, tmp_path, monkeypatch):
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path))
    compiled = []
    plan_one = planner(topology)

    def cached(config):
        def compile_it():
            if len(compiled) == 3:
                compiled.append(None)
                raise KeyboardInterrupt
            compiled.append(config)
            return plan_one(config)

        return cache.remember(cache.key(config.model_dump_json(), {}, topology.name, {}), compile_it)

    with pytest.raises(KeyboardInterrupt):
        found(config, topology, cached, compile_best=6)
    result = found(config, topology, cached, compile_best=6)
    assert len(compiled) - 1 == 6
    assert result.to_dict() == found(config, topology, plan_one, compile_best=6).to_dict()


def test_no_mesh_that_suits_is_an_error_that_says_what_does_not_divide(topology):
    config = load_config(SOURCE, ["train.global_batch_tokens=8191", "train.seq_len=8191"])
    with pytest.raises(MaxlmError, match=r"no mesh of the 64 devices of v5e:8x8 suits(.|\n)*not a multiple"):
        found(config, topology, planner(topology))


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals_alone(config, topology, monkeypatch, wanted, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    found(config, topology, planner(topology), compile_best=2, progress=wanted)
    assert ("microbatches" in stream.getvalue() or "fsdp" in stream.getvalue()) == (wanted and terminal)


def best_other_than_own(config, topology, source, overrides):
    """A result whose best is not the config as given."""

    def plan_one(candidate):
        plan = planner(topology)(candidate)
        plan["fits"] = plan["fits"] and candidate != config
        return plan

    result = search(config, topology, plan_one=plan_one, source=source, overrides=overrides, compile_best=3)
    assert result.best.candidate.config != config
    return result


def test_the_written_config_is_the_chosen_one(tmp_path, monkeypatch):
    """Of a preset, of a file beside it and elsewhere, and of a run's folder, each with its own way to `extends`."""
    monkeypatch.chdir(tmp_path)
    topology = parse_topology("v5e:2x4")
    (tmp_path / "mine.yaml").write_text(
        "extends: llama-1b\ntrain: {global_batch_tokens: 65536}\n"
        "model: {remat: {policy: names, names: [q, k]}}\ndata: {sources: [{kind: text, paths: [a.txt]}]}\n"
    )
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").write_text("name: one\nextends: ../../mine.yaml\n")
    reach_into_list = ("data.sources.0.paths=[b.txt]", "optimizer={learning_rate: 1e-4}")
    for source, overrides, out, extends in (
        ("llama-1b", ("train.global_batch_tokens=65536",), "best.yaml", "llama-1b"),
        ("mine.yaml", reach_into_list, "best.yaml", "mine.yaml"),
        ("mine.yaml", (), "deep/er/best.yaml", "../../mine.yaml"),
        (str(tmp_path / "mine.yaml"), ("name=other",), "best.yaml", "mine.yaml"),
        ("runs/one", (), "best.yaml", "runs/one/config.yaml"),
    ):
        config = load_config(source, overrides)
        result = best_other_than_own(config, topology, source, overrides)
        write_config(result, out)
        assert load_config(out) == result.best.candidate.config, (source, out)
        text = (tmp_path / out).read_text()
        assert f"\nextends: {extends}\n" in text
        assert "n_layers" not in text, "only what was chosen or overridden is written"


def test_the_written_configs_header_says_what_was_predicted(config, topology, tmp_path):
    result = found(config, topology, planner(topology), compile_best=3)
    write_config(result, tmp_path / "best.yaml")
    header = [line for line in (tmp_path / "best.yaml").read_text().splitlines() if line.startswith("#")]
    low, high = result.best.step_seconds
    required = search_module.required_bytes(result.best.plan)
    text = "\n".join(header)
    assert f"`maxlm plan llama3-8b --topology v5e:8x8 --search {SHORT[0]}`" in text
    assert f"{low:.4g} to {high:.4g} s (a test)" in text
    assert f"{required / 2**30:.2f} of {topology.hbm_bytes_per_device / 2**30:.2f} GiB" in text
    assert str(tmp_path) not in text
    write_config(result, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "best.yaml").read_text()


def test_the_original_config_is_not_overwritten(topology, tmp_path):
    original = tmp_path / "mine.yaml"
    original.write_text("extends: llama3-8b\ntrain: {global_batch_tokens: 1048576}\n")
    config = load_config(original)
    result = search(config, topology, plan_one=planner(topology), source=original, compile_best=1)
    with pytest.raises(ConfigError, match="another name"):
        write_config(result, original)


def test_remat_choices_name_only_what_the_model_has():
    for preset in ("llama3-8b", "gpt2-124m"):
        config = load_config(preset)
        for remat in remat_choices(config):
            assert RematConfig.model_validate(remat.model_dump()) == remat
            assert config.model.gated or "mlp_gate" not in remat.names


@pytest.mark.slow
def test_a_live_search_compiles_ranks_and_writes_what_it_planned(tmp_path, monkeypatch):
    """By the real compiler; and again out of the cache, which is not written to a second time."""
    pytest.importorskip("libtpu")
    from maxlm.plan import make_plan

    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(
        "model: {vocab_size: 1024, n_layers: 2, d_model: 256, n_heads: 2, d_ff: 512, max_seq_len: 256}\n"
        "train: {steps: 20, seq_len: 256, global_batch_tokens: 4096}\noptimizer: {learning_rate: 1e-3}\n"
    )
    config, topology = load_config(tmp_path / "tiny.yaml"), parse_topology("v5e:2x2")

    def run():
        plan_one = partial(make_plan, topology=topology, relief=False)
        return search(config, topology, plan_one=plan_one, source=tmp_path / "tiny.yaml", compile_best=2)

    result = run()
    assert [trial.fits for trial in result.trials] == [True, True]
    assert result.trials[0].plan["compiled"]["program_sha256"] != result.trials[1].plan["compiled"]["program_sha256"]
    assert result.trials[0].rank_by <= result.trials[1].rank_by
    write_config(result, tmp_path / "best.yaml")
    kept = {path: path.stat().st_mtime_ns for path in cache.folder().iterdir()}
    assert len(kept) == 2
    assert run().to_dict() == result.to_dict()
    again = make_plan(load_config(tmp_path / "best.yaml"), topology)
    assert again["compiled"] == result.best.plan["compiled"]
    assert {path: path.stat().st_mtime_ns for path in cache.folder().iterdir()} == kept
