"""The census of compiled steps: what is gathered and reduced over which axes, how often, beside what, in which part."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import load_config
from maxlm.planning.analysis import cost_of
from maxlm.planning.census import PARTS, Census, census
from maxlm.planning.expectations import padded_gathers, replicated_arguments, tensor_gathers, unexpected
from maxlm.planning.hlo import parse
from maxlm.planning.topology import parse_topology
from tests.planning import compiled
from tests.planning.hlo.make import MODEL


def census_of(name: str) -> Census:
    return census(compiled.module(name), compiled.FIXTURES[name]["mesh"])


def config_of(name: str, *changes: str):
    return load_config("llama-20m", f"{MODEL} {compiled.FIXTURES[name]['settings']}".split() + list(changes))


def in_layers(counted: Census, kind: str | None = None) -> int:
    """Bytes a step of the collectives in the loops over layers."""
    return sum(one.bytes_per_step for one in counted.collectives if one.in_loop and kind in (None, one.kind))


def test_twice_the_layers_are_twice_the_loops_cycles_and_bytes():
    two, four = census_of("fsdp-2-layers"), census_of("fsdp-4-layers")
    assert four.cycles_in_loops == pytest.approx(2 * two.cycles_in_loops, rel=0.01)  # fusions of stacks cost a bit more
    assert in_layers(four) == 2 * in_layers(two)
    for part in ("layers forward", "layers recomputed", "layers backward"):
        assert four.cycles_by_part[part] == pytest.approx(2 * two.cycles_by_part[part], rel=0.05)
    for part in ("embedding", "head and loss"):
        assert four.cycles_by_part[part] == pytest.approx(two.cycles_by_part[part], rel=0.05)
    assert [trips for _, trips, _ in four.loops] == [4, 4]
    assert [kernel.times for kernel in four.kernels] == [2 * kernel.times for kernel in two.kernels]


def test_parts_sum_to_the_whole():
    for name in compiled.FIXTURES:
        counted = census_of(name)
        assert set(counted.cycles_by_part) == set(PARTS)
        assert sum(counted.cycles_by_part.values()) == counted.cycles
        assert counted.cycles_by_part["other"] <= 0.03 * counted.cycles
        assert not counted.unknown_loops


def test_fsdp_gathers_each_weight_of_a_layer_once_a_pass_over_fsdp():
    """A layer's weights: q and o of 256 x 512, k and v of 256 x 256, gate, up and down of 256 x 512; 2 bytes each."""
    counted = census_of("fsdp-2-layers")
    weights = 2 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512)
    for part in ("layers forward", "layers recomputed"):
        gathers = [one for one in counted.collectives if one.part == part]
        assert {(one.kind, one.axes, one.dtype) for one in gathers} == {("all-gather", ("fsdp",), "bf16")}
        assert sum(one.bytes for one in gathers) == weights
        assert all(one.times == 2 and one.in_loop for one in gathers)
    reduced = [one for one in counted.collectives if one.part == "layers backward" and one.bytes > 10_000]
    assert sum(one.bytes for one in reduced) == weights
    assert {one.kind for one in reduced} <= {"all-reduce-scatter", "reduce-scatter", "all-reduce"}
    assert "padded all-reduce" not in counted.collective_bytes()
    assert not unexpected(counted, config_of("fsdp-2-layers"), compiled.FIXTURES["fsdp-2-layers"]["mesh"])


def test_accumulation_repeats_the_layers_collectives_for_each_microbatch():
    counted = census_of("accumulation")
    gathers = [one for one in counted.collectives if one.part == "layers forward"]
    assert {one.times for one in gathers} == {2 * 3}
    assert {one.times for one in counted.collectives if one.kind == "all-to-all"} == {2}


def test_asynchronous_fusions_are_one_collective_and_say_what_is_beside_them():
    counted = census_of("fsdp-2-layers")
    asynchronous = [one for one in counted.collectives if one.asynchronous]
    assert asynchronous
    for one in asynchronous:
        assert one.fused
        assert one.appearances >= 2  # its start and its end at least
        assert one.overlapped == (one.overlap_cycles > 0)
    assert sum(one.overlapped for one in asynchronous) >= 10
    assert max(one.overlap_cycles for one in asynchronous) < counted.cycles
    written = counted.bytes_as_written()
    assert written["all-gather"] > 2 * counted.collective_bytes()["all-gather"]
    assert written["all-reduce"] == sum(
        counted.collective_bytes()[kind] for kind in ("all-reduce", "all-reduce-scatter")
    )


def test_tensor_parallelism_gathers_the_residual_stream_twice_a_layer_and_nothing_else():
    counted = census_of("tensor")
    sizes = compiled.FIXTURES["tensor"]["mesh"]
    forward = [one for one in counted.collectives if one.part == "layers forward" and one.axes == ("tensor",)]
    assert [(one.kind, one.shape) for one in forward if one.kind == "all-gather"] == [
        ("all-gather", "bf16[8,512,256]")
    ] * 2
    assert [one.kind for one in forward if one.kind != "all-gather"] == ["all-reduce-scatter"] * 2
    assert {one.axes for one in counted.collectives} == {("fsdp",), ("tensor",), ("fsdp", "tensor")}
    assert not unexpected(counted, config_of("tensor"), sizes)


def test_between_slices_go_the_gradients_shards_and_inside_of_them_all_else():
    """The compiler's program is of one slice: 4 of the 8 devices, with transfers that the runtime does over DCN."""
    counted, sizes = census_of("two-slices"), compiled.FIXTURES["two-slices"]["mesh"]
    between = [one for one in counted.collectives if one.reach == "slices"]
    assert {(one.kind, one.axes) for one in between} == {("all-reduce", ("data",))}
    assert {(one.axes, one.reach) for one in counted.collectives if one not in between} == {(("fsdp",), "slice")}
    shards = sum(one.bytes_per_step for one in between if one.dtype == "bf16" and one.part != "head and loss")
    assert shards == 3 * 2 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512) // 4
    assert all(one.asynchronous for one in between)
    topology = parse_topology("v5e:2x2", 2)
    for one in counted.collectives:
        cost = cost_of(one, sizes, topology)
        assert (cost.dcn_seconds > 0) == (one in between)
        assert (cost.ici_seconds > 0) == (one not in between)
    assert unexpected(counted, config_of("two-slices"), sizes) == []


@pytest.mark.parametrize("name", ["fsdp-tensor", "fsdp-tensor-v5p", "accumulation", "fsdp-4-layers", "gpu"])
def test_healthy_steps_have_nothing_unexpected(name):
    assert unexpected(census_of(name), config_of(name), compiled.FIXTURES[name]["mesh"]) == []


def test_axes_are_those_of_the_mesh_whatever_the_ids_of_its_devices():
    """On v5e:2x2 the mesh runs along the torus, devices 0, 1, 3, 2; the compiler's groups count along the mesh."""
    assert ("mixed",) not in {one.axes for name in compiled.FIXTURES for one in census_of(name).collectives}


def test_a_gather_of_more_than_the_residual_stream_is_unexpected():
    counted, config, sizes = census_of("tensor"), config_of("tensor"), compiled.FIXTURES["tensor"]["mesh"]
    gather = next(one for one in counted.collectives if one.axes == ("tensor",) and one.kind == "all-gather")
    hidden = replace(gather, shape="bf16[8,512,512]", part="layers forward", in_loop=True)
    assert "more than the residual stream" in tensor_gathers(replace(counted, collectives=[hidden]), config, sizes)[0]
    again = replace(gather, part="layers forward", in_loop=True, times=5)
    assert "sequence parallelism needs" in tensor_gathers(replace(counted, collectives=[again]), config, sizes)[0]


def test_an_argument_that_is_whole_though_the_table_shards_it_is_unexpected():
    counted, config = census_of("fsdp-2-layers"), config_of("fsdp-2-layers")
    sizes = compiled.FIXTURES["fsdp-2-layers"]["mesh"]
    whole = [(name, (2, 256, 512) if name.endswith("['gate']") else dims) for name, dims in counted.arguments]
    found = replicated_arguments(replace(counted, arguments=whole), config, sizes)
    assert len(found) == 3  # the weight and its two moments
    assert all("['gate']" in line and "2 x 64 x 512" in line for line in found)
    # Under mesh.zero=1 the moments would rest in eighths over data 2 x fsdp 4, and these do not.
    wider = {**sizes, "data": 2}
    lines = replicated_arguments(counted, config_of("fsdp-2-layers", "mesh.data=2", "mesh.zero=1"), wider)
    assert lines
    assert all(line.startswith("state.opt_state") for line in lines)


def test_padded_all_reduces_are_found_where_the_topology_lacks_its_wraparound():
    """Every gather of this program became one; its gradients' all-reduces are real sums and are not."""
    counted = census_of("padded")
    kinds = counted.collective_bytes()
    assert "all-gather" not in kinds
    layers = 2 * (2 * 1024 * 8 * 128 + 2 * 1024 * 2 * 128 + 3 * 1024 * 2048)
    padded = [one for one in counted.collectives if one.kind == "padded all-reduce"]
    assert [one.bytes for one in padded if one.in_loop] == [layers, layers]
    assert {one.part for one in padded} == {"embedding", "head and loss", "layers forward", "layers recomputed"}
    assert sum(one.bytes_per_step for one in counted.collectives if one.kind == "all-reduce") > 2 * layers
    lines = padded_gathers(counted)
    assert len(lines) == len(padded)
    assert all("zero-padded" in line for line in lines)


def test_a_gpus_collectives_are_asynchronous_pairs_without_cycles():
    counted = census_of("gpu")
    assert counted.cycles == 0
    assert all(one.asynchronous for one in counted.collectives)
    forward = next(one for one in counted.collectives if one.part == "layers forward")
    layer = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    assert (forward.kind, forward.axes, forward.bytes, forward.times) == ("all-gather", ("fsdp",), layer, 4)
    assert forward.overlapped  # something is computed between its start and its end
    assert {one.axes for one in counted.collectives} == {("data",), ("fsdp",), ("data", "fsdp")}


def test_kernels_are_counted_with_their_lines():
    kernels = {kernel.name: kernel for kernel in census_of("fsdp-4-layers").kernels}
    assert all(kernel.target == "tpu_custom_call" for kernel in kernels.values())
    assert sum(kernel.times for kernel in census_of("fsdp-4-layers").kernels) == 4 * 4  # forward twice, dq, dkv
    assert all(kernel.source.startswith("maxlm/kernels/attention") for kernel in kernels.values())


GATHER_IN_A_CALL = """HloModule wrapped, is_scheduled=true, num_partitions=4

%wrapped (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %g = f32[8,8]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%called (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %r = f32[8,8]{1,0} all-reduce(%q), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %start = ((f32[2,8]{1,0}), f32[8,8]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %work = f32[2,8]{1,0} multiply(%x, %x), backend_config={"estimated_cycles":"50"}
  %update = ((f32[2,8]{1,0}), f32[8,8]{1,0}, u32[]) async-update(%start)
  %more = f32[2,8]{1,0} multiply(%x, %x), backend_config={"estimated_cycles":"5"}
  %done = f32[8,8]{1,0} async-done(%update)
  %begin = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) call-start(%done), to_apply=%called
  %end = f32[8,8]{1,0} call-done(%begin)
  %ring = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[], u32[]) collective-permute-start(%end), PAIRS
  ROOT %last = f32[8,8]{1,0} collective-permute-done(%ring)
}
""".replace("PAIRS", "source_target_pairs={{0,2},{2,0},{1,3},{3,1}}")


def test_asynchronous_wrappers_are_looked_into():
    counted = census(parse(GATHER_IN_A_CALL), {"a": 2, "b": 2})
    gather, reduce, permute = counted.collectives
    assert (gather.kind, gather.axes, gather.bytes, gather.overlap_cycles) == ("all-gather", ("a", "b"), 256, 55)
    assert (reduce.kind, reduce.axes, reduce.asynchronous, reduce.overlapped) == ("all-reduce", ("b",), True, False)
    assert (permute.kind, permute.axes, permute.bytes) == ("collective-permute", ("a",), 256)
    assert counted.cycles == 55


@pytest.fixture
def no_compilation_cache():
    """A program for a topology cannot be read back from the cache, which warns."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU's compiler is not installed (the `tpu` extra)")
def test_the_compiler_of_today_gives_twice_the_loop_for_twice_the_layers(monkeypatch):
    """A scan over layers of weights that are gathered over four chips, of 4 layers and of 8."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setitem(os.environ, key, os.environ.get(key, value))
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(4), ("shards",))
    sharded = NamedSharding(mesh, P(None, "shards"))
    rows = NamedSharding(mesh, P("shards"))

    def step(weights, x):
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, x, weights)[0]

    counts = {}
    for n_layers in (4, 8):
        weights = jax.ShapeDtypeStruct((n_layers, 512, 512), jnp.bfloat16, sharding=sharded)
        x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=rows)
        text = jax.jit(step).lower(weights, x).compile().as_text()
        counts[n_layers] = census(parse(text), {"shards": 4})
    assert [trips for _, trips, _ in counts[8].loops] == [8]
    assert counts[8].cycles_in_loops == 2 * counts[4].cycles_in_loops > 0
    for n_layers, counted in counts.items():
        assert counted.collective_bytes() == {"all-gather": n_layers * 512 * 512 * 2}
