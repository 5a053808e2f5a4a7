"""Compiled text is read as the compiler meant it: shapes and sizes, loops within loops, groups of devices, sources."""

from __future__ import annotations

import itertools
import math
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.kernels.exchange import FURTHER_ROUNDS
from maxlm.planning.device_groups import MIXED, axes_of_groups, axes_of_pairs, parse_groups
from maxlm.planning.hlo import parse
from maxlm.planning.hlo_loops import cycles_of, executions, trip_count
from maxlm.planning.hlo_shape import BITS, HOST, VMEM, parse_shape
from tests.planning import compiled

# Two loops in one: 5 times (i = 0; i < 5; i += 1) around 4 times (j = 2; j <= 8; j += 2). The inner limit comes in
# through the outer loop's tuple; a third loop counts down by 3 from 9 while above 0, its compare fused; a conditional
# has a branch of 7 cycles and one of 70.
NESTED = """HloModule nested, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %p = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %limit = s32[] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%two, %j)
  %work = f32[8,128]{1,0:T(8,128)} multiply(%x, %x), backend_config={"window_config":{"estimated_cycles":"100"}}
  %same = s32[] copy(%limit)
  ROOT %out = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%next, %work, %same)
}

%inner_condition (p: (s32[], f32[8,128], s32[])) -> pred[] {
  %p.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%p.1), index=0
  %limit.1 = s32[] get-tuple-element(%p.1), index=2
  ROOT %le = pred[] compare(%j.1, %limit.1), direction=LE
}

%outer_body (q: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %q = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %eight = s32[] get-tuple-element(%q), index=2
  %start = s32[] constant(2)
  %init = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%start, %y, %eight)
  %inner = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) while(%init), condition=%inner_condition, body=%inner_body
  %z = f32[8,128]{1,0:T(8,128)} get-tuple-element(%inner), index=1
  %one = s32[] constant(1)
  %i.next = s32[] add(%i, %one), backend_config={"estimated_cycles":"1000"}
  ROOT %out.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%i.next, %z, %eight)
}

%outer_condition (q: (s32[], f32[8,128], s32[])) -> pred[] {
  %q.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%q.1), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%five, %i.1), direction=GT
}

%fused_compare (k: s32[], zero: s32[]) -> pred[] {
  %k = s32[] parameter(0)
  %zero = s32[] parameter(1)
  ROOT %gt = pred[] compare(%k, %zero), direction=GT
}

%fused_step (k: s32[]) -> s32[] {
  %k.1 = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %minus = s32[] subtract(%k.1, %three)
}

%down_body (r: (s32[])) -> (s32[]) {
  %r = (s32[]) parameter(0)
  %k.2 = s32[] get-tuple-element(%r), index=0
  %step = s32[] fusion(%k.2), kind=kLoop, calls=%fused_step, backend_config={"estimated_cycles":"10"}
  ROOT %out.2 = (s32[]) tuple(%step)
}

%down_condition (r: (s32[])) -> pred[] {
  %r.1 = (s32[]) parameter(0)
  %k.3 = s32[] get-tuple-element(%r.1), index=0
  %zero.1 = s32[] constant(0)
  ROOT %test = pred[] fusion(%k.3, %zero.1), kind=kLoop, calls=%fused_compare
}

%small (v: f32[8,128]) -> f32[8,128] {
  %v = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%v), backend_config={"estimated_cycles":"7"}
}

%large (v: f32[8,128]) -> f32[8,128] {
  %v.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %unknown = f32[8,128]{1,0:T(8,128)} exponential(%v.1), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %n.1 = f32[8,128]{1,0:T(8,128)} negate(%unknown), backend_config={"estimated_cycles":"70"}
}

ENTRY %main (x: f32[8,128], flag: pred[]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %flag = pred[] parameter(1)
  %zero.2 = s32[] constant(0)
  %limit.2 = s32[] constant(8)
  %nine = s32[] constant(9)
  %init.1 = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) tuple(%zero.2, %x.1, /*index=2*/%limit.2)
  %outer = (s32[], f32[8,128]{1,0:T(8,128)}, s32[]) while(%init.1), condition=%outer_condition, body=%outer_body
  %w = f32[8,128]{1,0:T(8,128)} get-tuple-element(%outer), index=1
  %init.2 = (s32[]) tuple(%nine)
  %down = (s32[]) while(%init.2), condition=%down_condition, body=%down_body
  ROOT %branch = f32[8,128]{1,0:T(8,128)} conditional(%flag, %w, %w), true_computation=%small, false_computation=%large
}
"""


def test_loops_within_loops_multiply_and_a_conditional_counts_its_largest_branch():
    module = parse(NESTED)
    by_name = {run.instruction.name: run for run in executions(module)}
    trips = {name: trip_count(module, by_name[name].instruction) for name in ("outer", "inner", "down")}
    assert trips == {"outer": 5, "inner": 4, "down": 3}
    assert (by_name["work"].times, by_name["work"].depth) == (20, 2)
    assert "n.1" in by_name
    assert "n" not in by_name
    total = sum((run.instruction.cycles or 0) * run.times for run in executions(module))
    assert total == 20 * 100 + 5 * 1000 + 3 * 10 + 70  # the sentinel of 2^63 - 1 is no number of cycles
    assert cycles_of(module, by_name["outer"].instruction) == 20 * 100 + 5 * 1000


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction"),
    [
        *itertools.product((0, 3), (0, 3, 10, 11), (1, 4), ("LT", "LE")),
        *itertools.product((12, 3), (0, 3), (-1, -5), ("GT", "GE")),
        *[(0, 12, 3, "NE"), (12, 0, -4, "NE")],
    ],
)
def test_a_trip_count_is_that_of_the_loop_written_out(start, limit, step, direction):
    holds = {
        "LT": lambda i: i < limit,
        "LE": lambda i: i <= limit,
        "GT": lambda i: i > limit,
        "GE": lambda i: i >= limit,
        "NE": lambda i: i != limit,
    }[direction]
    i, count = start, 0
    while holds(i):
        i, count = i + step, count + 1
    text = (
        NESTED.replace("constant(5)", f"constant({limit})")
        .replace("%zero.2 = s32[] constant(0)", f"%zero.2 = s32[] constant({start})")
        .replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
        .replace("compare(%five, %i.1), direction=GT", f"compare(%i.1, %five), direction={direction}")
    )
    module = parse(text)
    assert trip_count(module, module.entry.by_name["outer"]) == count


def test_a_loop_whose_limit_changes_or_is_data_has_no_trip_count():
    changing = parse(NESTED.replace("%same = s32[] copy(%limit)", "%same = s32[] add(%limit, %two)"))
    assert trip_count(changing, changing.computations["outer_body"].by_name["inner"]) is None
    of_data = parse(NESTED.replace("%limit.2 = s32[] constant(8)", "%limit.2 = s32[] custom-call()"))
    assert trip_count(of_data, of_data.computations["outer_body"].by_name["inner"]) is None
    assert max(run.times for run in executions(of_data)) == 5  # counted once


def test_a_loop_that_only_uneven_load_of_experts_enters_is_not_counted():
    named = 'body=%inner_body, metadata={op_name="jit(step)/' + FURTHER_ROUNDS + '/while"}'
    text = NESTED.replace("%limit.2 = s32[] constant(8)", "%limit.2 = s32[] custom-call()")
    module = parse(text.replace("body=%inner_body", named))
    loop = module.computations["outer_body"].by_name["inner"]
    assert trip_count(module, loop) == 0
    assert cycles_of(module, loop) == 0
    assert {run.times for run in executions(module) if run.depth == 2} == {0}


def test_what_the_compiler_says_of_a_loop_is_believed():
    known = ', backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}'
    module = parse(NESTED.replace("body=%outer_body", "body=%outer_body" + known))
    assert trip_count(module, module.entry.by_name["outer"]) == 6


@pytest.mark.parametrize("name", sorted(compiled.FIXTURES))
def test_real_programs_are_read_whole(name):
    """Every instruction has a shape and operands that exist, every loop a trip count, every argument its name."""
    module = compiled.module(name)
    for computation in module.computations.values():
        for one in computation.instructions:
            assert one.shape.bytes >= 0
            assert all(operand in computation.by_name for operand in one.operands), one.name
            assert all(called in module.computations for called in one.called), one.name
    loops = [run.instruction for run in executions(module) if run.instruction.opcode == "while"]
    assert loops
    assert all(trip_count(module, loop) is not None for loop in loops)
    assert all(one.op_name.startswith(("state", "batch")) for one in module.entry.parameters)
    slices = int(compiled.FIXTURES[name]["topology"].rpartition("*")[0] or 1)  # a TPU's program is that of one slice
    assert module.n_partitions * slices == math.prod(compiled.FIXTURES[name]["mesh"].values())


def test_trip_counts_of_real_programs_are_the_layers_and_the_microbatches():
    def trips(name):
        module = compiled.module(name)
        runs = [run for run in executions(module) if run.instruction.opcode == "while"]
        return [(trip_count(module, run.instruction), run.times) for run in runs]

    assert trips("fsdp-2-layers") == [(2, 1), (2, 1)]
    assert trips("fsdp-4-layers") == [(4, 1), (4, 1)]
    assert trips("accumulation") == [(2, 1), (3, 2), (3, 2)]
    assert [trips for trips, times in trips("gpu") if times == 1 and trips == 4] == [4, 4]


def test_an_instruction_leads_to_the_line_that_made_it():
    module = compiled.module("fsdp-2-layers")
    kernels = [one for c in module.computations.values() for one in c.instructions if "pallas_call" in one.op_name]
    assert {module.source(one).split(":")[0] for one in kernels} >= {"maxlm/kernels/attention_tpu.py"}
    stack = next(module.stack(one) for one in kernels if one.opcode == "custom-call")
    assert any(function == "Block.__call__" for _, function, _ in stack)
    assert stack[-1][0].endswith(".py")  # it ends where the program was traced, and does not go round


def test_donated_arguments_are_known():
    module = compiled.module("fsdp-2-layers")
    n_state = sum(one.op_name.startswith("state") for one in module.entry.parameters)
    assert len(module.donated) == n_state
    shapes = [one.shape for one in module.entry.parameters]
    outputs = module.entry.root.shape.elements
    assert all(shapes[number].dims == outputs[output].dims for output, number in module.donated.items())


def test_five_megabytes_are_read_in_two_seconds():
    text = compiled.text("fsdp-tensor")
    head, _, body = text.partition("\n%")
    copies = [body.replace("ENTRY ", "", 1) if n else body for n in range(5 * 10**6 // len(text) + 1)]
    large = head + "".join(f"\n%{copy.replace('_spmd', f'_spmd{n}')}" for n, copy in enumerate(copies))
    assert len(large) > 4e6
    start = time.process_time()
    parse(large)
    assert time.process_time() - start < 2


# Shapes

NUMPY = {
    "pred": np.bool_,
    **{f"s{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"f16": "float16", "f32": "float32", "f64": "float64", "c64": "complex64", "c128": "complex128"},
    **{"bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "f8e4m3": "float8_e4m3"},
    **{"f8e8m0fnu": "float8_e8m0fnu", "f8e3m4": "float8_e3m4", "f8e4m3b11fnuz": "float8_e4m3b11fnuz"},
    **{"f8e4m3fnuz": "float8_e4m3fnuz", "f8e5m2fnuz": "float8_e5m2fnuz"},
}
PACKED = {"s1": 1, "u1": 1, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4}


def test_every_element_type_has_the_size_that_numpy_gives_it():
    for name, dtype in NUMPY.items():
        itemsize = np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype).itemsize
        assert parse_shape(f"{name}[3,5]{{1,0}}").bytes == 15 * itemsize, name
    for name, bits in PACKED.items():
        assert parse_shape(f"{name}[16,4]").bytes == 64 * bits // 8
    assert set(NUMPY) | set(PACKED) | {"token", "opaque"} == set(BITS)


def tiled(shape: tuple[int, ...], order: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """Elements of an array laid out by hand: its dimensions slowest first, the last ones rounded up to tiles."""
    physical = [shape[axis] for axis in reversed(order)]
    for back, side in enumerate(reversed(tile)):
        physical[-1 - back] = math.ceil(physical[-1 - back] / side) * side
    return math.prod(physical)


@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=4), st.randoms(), st.sampled_from([(8, 128), (2, 128), (128,)])
)
@settings(max_examples=60, deadline=None)
def test_padding_is_that_of_whole_tiles(dims, random, tile):
    order = list(range(len(dims)))
    random.shuffle(order)
    layout = f"{','.join(map(str, order))}:T({','.join(map(str, tile))})"
    shape = parse_shape(f"f32[{','.join(map(str, dims))}]{{{layout}}}")
    assert shape.bytes == 4 * math.prod(dims)
    assert shape.padded_bytes == 4 * tiled(tuple(dims), tuple(order), tile)


@pytest.mark.parametrize(
    ("text", "logical", "padded"),
    [
        ("f32[2,4096]{1,0:T(8,128)}", 2 * 4096 * 4, 8 * 4096 * 4),
        ("bf16[1,4096]{1,0:T(2,128)(2,1)}", 4096 * 2, 2 * 4096 * 2),
        ("f32[128256,64]{1,0:T(8,128)}", 128256 * 64 * 4, 128256 * 128 * 4),
        ("f32[128256,64]{0,1:T(8,128)}", 128256 * 64 * 4, 128256 * 64 * 4),
        ("s32[]{:T(128)}", 4, 512),
        ("f32[4096]{0:T(1024)S(1)}", 4096 * 4, 4096 * 4),
        ("pred[2,512]{1,0:T(4,128)(4,1)}", 1024, 2048),
        ("s4[64,128]{1,0:T(64,128)(8,1)E(4)}", 4096, 4096),
        ("(f32[2]{0}, (bf16[4]{0}, s32[]))", 8 + 8 + 4, 8 + 8 + 4),
    ],
)
def test_sizes_of_tiled_and_packed_shapes(text, logical, padded):
    shape = parse_shape(text)
    assert (shape.bytes, shape.padded_bytes) == (logical, padded)


def test_the_compilers_own_sum_of_the_arguments_is_that_of_padded_sizes():
    for name, fixture in compiled.FIXTURES.items():
        arguments = sum(one.shape.padded_bytes for one in compiled.module(name).entry.parameters)
        slack = 4096 if name == "gpu" else 0  # the GPU aligns each of its scalars
        assert abs(arguments - fixture["memory"]["argument_size_in_bytes"]) <= slack, name


def test_memory_spaces_are_told_apart():
    assert parse_shape("bf16[1,4096,8]{2,1,0:T(8,128)(2,1)S(1)}").space == VMEM
    assert parse_shape("f32[8]{0:S(5)}").space == HOST
    assert parse_shape("f32[8]{0}").space == 0
    with pytest.raises(ValueError, match="not a shape"):
        parse_shape("bf17[3]")


# Groups of devices


@st.composite
def meshes(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4))
    names = [f"axis{n}" for n in range(len(sizes))]
    chosen = draw(st.sets(st.sampled_from(range(len(sizes)))))
    return dict(zip(names, sizes, strict=True)), sorted(chosen)


@given(meshes())
@settings(max_examples=150, deadline=None)
def test_groups_along_mesh_axes_are_found_in_any_order(case):
    sizes, chosen = case
    shape = tuple(sizes.values())
    outside = [axis for axis in range(len(shape)) if axis not in chosen]
    ids = np.arange(math.prod(shape)).reshape(shape)
    groups = ids.transpose(outside + chosen).reshape(-1, math.prod(shape[axis] for axis in chosen))
    text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups.tolist()) + "}"
    wanted = tuple(name for n, name in enumerate(sizes) if n in chosen and sizes[name] > 1)
    assert axes_of_groups(text, sizes) == wanted
    for rows in (groups[::-1], groups[:, ::-1]):  # neither the order of groups nor that inside them matters
        text = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in rows.tolist()) + "}"
        assert axes_of_groups(text, sizes) == wanted


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_counted_groups_expand_as_numpy_reshapes_and_transposes(source, data):
    permutation = data.draw(st.permutations(range(len(source))))
    n = math.prod(source)
    members = data.draw(st.sampled_from([size for size in range(1, n + 1) if n % size == 0]))
    text = f"[{n // members},{members}]<=[{','.join(map(str, source))}]T({','.join(map(str, permutation))})"
    expected = np.arange(n).reshape(source).transpose(permutation).reshape(-1, members)
    assert np.array_equal(parse_groups(text, n), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=({0,2,1,3}) {'b'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_written_in_three_ways(text, expected):
    assert np.array_equal(parse_groups(text, 8), expected)


def test_groups_that_are_no_product_of_axes_are_called_mixed():
    sizes = {"a": 4, "b": 2}
    assert axes_of_groups("{{0,1,2,3},{4,5,6,7}}", sizes) == MIXED  # half of a, and b
    assert axes_of_groups("{{0,3},{1,2},{4,5},{6,7}}", sizes) == MIXED
    assert axes_of_groups("{{0,1,2},{3}}", sizes) == MIXED
    assert axes_of_groups("{{0},{1},{2},{3},{4},{5},{6},{7}}", sizes) == ()


def test_a_permute_goes_along_the_axis_in_which_its_pairs_differ():
    sizes = {"a": 4, "b": 2}
    assert axes_of_pairs("{{0,2},{2,4},{4,6},{6,0}}", sizes) == ("a",)
    assert axes_of_pairs("{{0,1},{1,0},{3,3}}", sizes) == ("b",)
    assert axes_of_pairs("{{0,2},{0,1}}", sizes) == MIXED
    assert axes_of_pairs("{{0,3},{2,5}}", sizes) == ("a", "b")
    assert axes_of_pairs("{{1,1}}", sizes) == ()


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule empty\n")
