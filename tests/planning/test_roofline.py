"""The roofline against the arrays themselves, the compiler's memory and another framework's collectives."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from maxlm.config import load_config
from maxlm.kernels import cross_entropy, grouped_matmul
from maxlm.models.flops import attended_positions, training_flops_per_token
from maxlm.parallel.mesh import AXES, resolve_sizes
from maxlm.planning import memory_model
from maxlm.planning.compile import lower_on
from maxlm.planning.memory_model import predicted_memory, state_bytes
from maxlm.planning.roofline import Roofline, attention_backward, roofline
from maxlm.planning.topology import parse_topology
from tests import latents, tiny, tiny_moe
from tests.interop import ours_dense
from tests.products import flops_of_products

COMPILED = json.loads((Path(__file__).parent / "compiled_memory.json").read_text())
MESHES = {
    "one device": {},
    "fsdp": {"fsdp": 8},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x fsdp, zero 1": {"data": 2, "fsdp": 4, "zero": 1},
    "data x fsdp, zero 3": {"data": 4, "fsdp": 2, "zero": 3},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor": {"tensor": 4, "fsdp": 2},
    "data": {"data": 8, "fsdp": 1},
}
MODELS = {
    "llama": tiny.LLAMA | {"n_kv_heads": 4},
    "gpt2": tiny.GPT2,
    "gpt_neox": tiny.GPT_NEOX,
    "everything on": tiny.LLAMA
    | {"n_kv_heads": 4, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "qk_norm": "head"}
    | {"norm": "layer", "mlp": "geglu", "head_dim": 32},
    "plain mlp, tied, window": tiny.LLAMA
    | {"n_kv_heads": 4, "mlp": "relu2", "tied_embeddings": True, "attention_window": 7},
    "experts": tiny_moe.DEEPSEEK
    | {"n_kv_heads": 4, "moe": tiny_moe.DEEPSEEK["moe"] | {"n_experts": 4, "n_groups": 2, "groups_per_token": 1}},
    "bert": {**tiny.BERT, "next_sentence_head": True},
    "t5": tiny.T5,
    "bart": tiny.BART,
    "layers of two kinds": tiny.LLAMA
    | {"n_kv_heads": 4, "n_layers": 5, "attention_window": 7, "attention_pattern": ("local", "global")}
    | {"attention_chunk": 12, "attention_global_tokens": 2},
    "gemma3": ours_dense.GEMMA3 | {"n_kv_heads": 4},
    "bloom": ours_dense.BLOOM | {"n_heads": 4, "n_kv_heads": 4},
    "opt, heads normed together, embeddings normed": ours_dense.OPT | {"qk_norm": "all", "embedding_norm": True},
    "gopher": tiny.GOPHER,
    **latents.PLANNED,
}


def planned(preset: str, topology: str, *overrides: str, slices: int = 1) -> Roofline:
    config, where = load_config(preset, overrides), parse_topology(topology, slices)
    return roofline(config, where, resolve_sizes(config.mesh, where.n_devices))


def part(found: Roofline, name: str):
    return next(part for part in found.parts if part.name == name)


def bytes_on_a_device(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_state_is_as_large_as_its_arrays_on_a_device(model, mesh, precision):
    run = tiny.config(model=MODELS[model], mesh=MESHES[mesh], precision={"parameters": precision})
    program = tiny.program(run, math.prod(size for axis, size in MESHES[mesh].items() if axis in AXES))
    with jax.set_mesh(program.mesh):
        state = program.abstract_state
    found = state_bytes(run, dict(program.mesh.shape))
    assert found["parameters"] == bytes_on_a_device(state.params)
    # The optimizer also counts steps, in 4 bytes.
    assert found["optimizer"] == pytest.approx(bytes_on_a_device(state.opt_state), abs=64)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case["name"])
def test_memory_is_the_compilers(case):
    """State within 1% of the compiled arguments, and the peak, with the gaps between buffers that no formula foresees,
    within 8%: what is promised of all configs is 15%."""
    config = load_config(case["preset"], case["overrides"])
    found = predicted_memory(config, resolve_sizes(config.mesh, parse_topology(case["topology"]).n_devices))
    assert found["parameters"] + found["optimizer"] == pytest.approx(case["argument_bytes"], rel=0.01)
    assert found["total"] == pytest.approx(case["peak_bytes"], rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "fsdp2tensor2"])
def test_the_compiler_says_again_what_is_kept_of_it(name):
    pytest.importorskip("libtpu")
    from maxlm.planning.compile import compile_step, lower_step

    case = next(case for case in COMPILED if case["name"] == name)
    config, topology = load_config(case["preset"], case["overrides"]), parse_topology(case["topology"])
    memory = compile_step(lower_step(config, topology)).memory
    peak = memory["argument"] + memory["heap"]
    # Other versions of libtpu schedule otherwise; of the model it is 15% that is promised.
    assert peak == pytest.approx(case["peak_bytes"], rel=0.05)
    found = predicted_memory(config, resolve_sizes(config.mesh, topology.n_devices))
    assert found["total"] == pytest.approx(peak, rel=0.15)


def test_most_predicted_peaks_are_within_three_percent():
    errors = []
    for case in COMPILED:
        config = load_config(case["preset"], case["overrides"])
        found = predicted_memory(config, resolve_sizes(config.mesh, parse_topology(case["topology"]).n_devices))
        errors.append(abs(found["total"] / case["peak_bytes"] - 1))
    assert sorted(errors)[len(errors) // 2] < 0.03


def test_chunks_of_the_loss_are_those_of_the_kernel():
    assert memory_model.CHUNK_BYTES == cross_entropy.ACCELERATOR_CHUNK_BYTES
    assert memory_model.LEAST_CHUNK_TOKENS == cross_entropy.ACCELERATOR_LEAST_TOKENS


def test_parts_do_the_models_flops_and_those_of_recomputation():
    config = load_config("llama3-8b", ["train.global_batch_tokens=1048576", "model.remat.policy=none"])
    found = planned("llama3-8b", "v5p-128", "train.global_batch_tokens=1048576", "model.remat.policy=none")
    extra = part(found, "attention scores").flops * (3.5 - 3) / 3.5  # attention's backward makes its scores again
    model = training_flops_per_token(config.model, config.train.seq_len) * 1048576 / 64
    assert sum(part.flops for part in found.parts) - extra == pytest.approx(model, rel=1e-9)
    full = planned("llama3-8b", "v5p-128", "train.global_batch_tokens=1048576")
    names = {part.name for part in full.parts} - {part.name for part in found.parts}
    assert names == {f"{name}, recomputed" for name in ("attention projections", "attention scores", "mlp")}
    # All of attention's forward is done again, and two of the MLP's three products.
    again = {name: part(full, f"{name}, recomputed").flops / part(full, name).flops for name in ("mlp",)}
    assert again["mlp"] == pytest.approx(2 / 9)
    assert part(full, "attention projections, recomputed").flops * 3 == part(full, "attention projections").flops


def all_pairs_over_attended(run) -> float:
    """Pairs of positions in all layers, over those that the masks leave."""
    lengths, every, attended = run.row_lengths, 0.0, 0.0
    for side, kinds in run.model.sides.items():
        row = lengths.encoder if side == "encoder" else lengths.decoder
        for kind in kinds:
            cross = row * lengths.encoder if kind.cross else 0
            every += row * row + cross
            attended += row * attended_positions(run.model, row, local=kind.local, causal=kind.causal) + cross
    return every / attended


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("model", MODELS)
def test_flops_are_those_of_the_program_that_the_compiler_is_given(model, remat, monkeypatch):
    """Within 1% on a dozen configs. The reference attention does not skip what the mask hides, the roofline does.
    On a CPU the last tile of each expert's rows is not full; here they are small, and hardly count."""
    monkeypatch.setattr(grouped_matmul, "LARGEST_TILE", grouped_matmul.SMALLEST_TILE)
    shape = MODELS[model] | {"vocab_size": 384, "attention_implementation": "reference", "remat": {"policy": remat}}
    run = tiny.config(model=shape, mesh={"fsdp": 1})
    found = roofline(run, parse_topology("v5e:1x1"), resolve_sizes(run.mesh, 1))
    scores = {one.name: one.flops for one in found.parts if one.name.startswith("attention scores")}
    backward = attention_backward(run.model)
    whole = scores["attention scores"] * 3 / (1 + backward) + scores.get("attention scores, recomputed", 0)
    expected = sum(one.flops for one in found.parts) - sum(scores.values()) + whole * all_pairs_over_attended(run)
    lowered, _ = lower_on(run, jax.devices()[:1])
    assert flops_of_products(lowered.as_text(dialect="hlo")) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_distances_are_projected_once_for_all_rows(remat):
    """Forward, made again or not, and one product of the backward pass: distances have no gradient."""
    shape = tiny.GOPHER | {"vocab_size": 384, "attention_implementation": "reference", "remat": {"policy": remat}}
    found = {}
    for rows in (1, 4):
        run = tiny.config(model=shape, mesh={"fsdp": 1}, train={"global_batch_tokens": 32 * rows})
        lowered, _ = lower_on(run, jax.devices()[:1])
        plan = roofline(run, parse_topology("v5e:1x1"), resolve_sizes(run.mesh, 1))
        found[rows] = flops_of_products(lowered.as_text(dialect="hlo")), part(plan, "distance projections").flops
    assert found[1][1] == found[4][1] == (3 if remat == "full" else 2) * 3 * 2 * 32 * 64 * 64
    # What does not grow with the rows.
    assert (4 * found[1][0] - found[4][0]) / 3 == pytest.approx(found[1][1], rel=1e-6)


@pytest.mark.parametrize(
    ("remat", "recomputed"),
    [
        ("policy=dots", {"attention scores": 1.0}),
        ("policy=names model.remat.names=[q,k,v,flash_out,flash_lse]", {"attention projections": 0.4, "mlp": 2 / 3}),
        ("policy=names model.remat.names=[mlp_up]", {"attention projections": 1, "attention scores": 1, "mlp": 1 / 3}),
    ],
)
def test_what_is_kept_is_not_recomputed(remat, recomputed):
    found = planned("llama3-8b", "v5p-128", *f"model.remat.{remat}".split())
    forward = {"attention projections": 3, "attention scores": 3.5, "mlp": 3}
    for name, times in forward.items():
        there = [part for part in found.parts if part.name == f"{name}, recomputed"]
        share = there[0].flops * times / part(found, name).flops if there else 0
        assert share == pytest.approx(recomputed.get(name, 0), rel=1e-6), name


def test_collective_bytes_are_those_that_another_framework_compiles_to():
    """MaxText's Llama-3 8B on v5p-128, fsdp 64, full recomputation, 2 rows of 8,192 a device, compiled by libtpu
    0.0.42.1: results of all-gathers are 28.97 GB a step, operands of all-reduces 15.01 GB. Here it is what is received:
    63/64 of a gather's result, and twice that of an all-reduce's operand."""
    found = planned("llama3-8b", "v5p-128", "train.seq_len=8192", "train.global_batch_tokens=1048576")
    gathered = sum(part(found, name).ici_bytes for name in ("attention projections", "mlp", "head and loss"))
    assert gathered * 64 / 63 == pytest.approx(28.97e9, rel=0.01)
    assert part(found, "gradient reduction").ici_bytes * 64 / 63 / 2 == pytest.approx(15.01e9, rel=0.01)


def test_a_part_is_bound_by_what_takes_longest():
    found = planned("llama3-8b", "v5p-128", "train.global_batch_tokens=1048576")
    for one in found.parts:
        seconds = {
            "compute": one.compute_seconds,
            "HBM": one.hbm_seconds,
            "ICI": one.ici_seconds,
            "DCN": one.dcn_seconds,
        }
        assert seconds[one.bound] == max(seconds.values())
    assert part(found, "mlp").bound == "compute"
    assert part(found, "optimizer").bound == "HBM"
    assert part(found, "gradient reduction").bound == "ICI"
    best, worst = found.step_seconds
    busy = sum(max(one.compute_seconds, one.hbm_seconds) for one in found.parts)
    assert busy == pytest.approx(best)
    assert worst == pytest.approx(busy + found.seconds_of("ici") + found.seconds_of("dcn"))


def test_few_tokens_a_device_are_bound_by_the_network():
    """The scaling book, part 5: FSDP on v5p is bound by ICI below about 850 tokens a chip with three axes."""
    rows = ["train.seq_len=512", "model.remat.policy=none"]
    few = planned("llama3-70b", "v5p:8x8x8", *rows, f"train.global_batch_tokens={512 * 512}")
    many = planned("llama3-70b", "v5p:8x8x8", *rows, f"train.global_batch_tokens={512 * 512 * 8}")
    assert part(few, "mlp").bound == "ICI"
    assert part(many, "mlp").bound == "compute"


def test_slices_add_dcn_and_nothing_else():
    options = ("train.global_batch_tokens=2097152", "mesh.fsdp=256")
    one = planned("llama3-8b", "v6e-256", "train.global_batch_tokens=1048576", "mesh.fsdp=256")
    two = planned("llama3-8b", "v6e-256", *options, "mesh.data=2", slices=2)
    assert one.seconds_of("dcn") == 0
    assert two.seconds_of("dcn") > 0
    assert two.seconds_of("compute") == pytest.approx(one.seconds_of("compute"))
    # Each device sums its 256th of the gradients (15.0 GB in all) with its counterpart: half comes, half comes back.
    assert part(two, "gradient reduction").dcn_bytes == pytest.approx(15.0e9 / 256, rel=0.01)


def test_memory_grows_with_what_is_kept_and_falls_with_what_is_shared():
    def total(*overrides):
        return planned("llama3-8b", "v5p-128", "train.global_batch_tokens=1048576", *overrides).memory["total"]

    names = "model.remat.names=[q,k,v,flash_out,flash_lse]"
    policies = [
        total(f"model.remat.policy={policy}", *more)
        for policy, more in (("full", ()), ("names", (names,)), ("dots", ()), ("none", ()))
    ]
    assert policies == sorted(policies)
    assert len(set(policies)) == 4
    assert total("mesh.data=4", "mesh.fsdp=16") > total("mesh.data=4", "mesh.fsdp=16", "mesh.zero=1") > total()
    assert total("train.accumulation=2", "model.remat.policy=none") < total("model.remat.policy=none")


def test_a_plan_is_plain_data():
    found = planned("llama3-8b", "h100-128", "train.global_batch_tokens=1048576", "mesh.data=16")
    again = json.loads(json.dumps(found.to_dict()))
    assert again["memory"] == found.memory
    assert again["step_seconds"] == list(found.step_seconds)
    assert [one["name"] for one in again["parts"]] == [one.name for one in found.parts]
    kinds = ["parameters", "optimizer", "gradients", "activations", "temporaries"]
    assert sum(again["memory"][kind] for kind in kinds) == again["memory"]["total"]


def test_the_roofline_of_70b_takes_no_jax_and_under_two_seconds():
    """From a fresh process: imports, config and roofline. Of the processor, as other processes may share it."""
    program = """
import os, sys
from maxlm.config import load_config
from maxlm.parallel.mesh import resolve_sizes
from maxlm.planning.roofline import roofline
from maxlm.planning.topology import parse_topology
config, topology = load_config("llama3-70b"), parse_topology("v5p-2048")
found = roofline(config, topology, resolve_sizes(config.mesh, topology.n_devices))
assert found.memory["total"] > 0
assert "jax" not in sys.modules, "jax was imported"
assert "flax" not in sys.modules, "flax was imported"
times = os.times()
print(times.user + times.system)
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 2
