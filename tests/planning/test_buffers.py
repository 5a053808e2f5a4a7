"""Memory at its peak: what is live when, in whose buffer, of which kind; and what is said where it is too much."""

from __future__ import annotations

import pytest

from maxlm.planning.buffers import KINDS, parse_out_of_memory, peak
from maxlm.planning.hlo import parse
from tests.planning import compiled

KB4 = 4 * 1024  # of f32[8,128]

# x is 4 kB; x, a, b and z live together: 16 kB. The loop carries 4 kB and makes 16 kB inside, and updates what it
# carries in place: with x 24 kB. Buffers in vector memory and on the host do not count.
PROGRAM = """HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %c = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %t = f32[32,128]{1,0:T(8,128)} pad(%c, %c), metadata={op_name="jit(step)/transpose(jvp())/while/body/pad"}
  %v = f32[32,128]{1,0:T(8,128)S(1)} copy(%t)
  %u = f32[8,128]{1,0:T(8,128)} fusion(%c, %v), kind=kLoop, calls=%f, BACKEND
  ROOT %r = (s32[]{:S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %u)
}

%f (a: f32[8,128], b: f32[32,128]) -> f32[8,128] {
  %fa = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fb = f32[32,128]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %fc = f32[8,128]{1,0:T(8,128)} add(%fa, %fa)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:S(6)} get-tuple-element(%p.1), index=0
  %n = s32[]{:S(6)} constant(3)
  ROOT %lt = pred[]{:S(6)} compare(%i.1, %n), direction=LT
}

ENTRY %main (x: f32[8,128]) -> (f32[8,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params['w']"}
  %host = f32[8,128]{1,0:T(8,128)S(5)} copy(%x)
  %a = f32[8,128]{1,0:T(8,128)} negate(%x), metadata={op_name="jit(step)/jvp()/while/body/neg"}
  %b = f32[8,128]{1,0:T(8,128)} negate(%a)
  %z = f32[8,128]{1,0:T(8,128)} add(%a, %b)
  %zero = s32[]{:S(6)} constant(0)
  %init = (s32[]{:S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %z)
  %loop = (s32[]{:S(6)}, f32[8,128]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %w = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %new = f32[8,128]{1,0:T(8,128)} subtract(%x, %w)
  ROOT %out = (f32[8,128]{1,0:T(8,128)}) tuple(%new)
}
"""
IN_PLACE = 'backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}'


def test_the_peak_is_inside_the_loop_and_counts_what_lives_around_it():
    memory = peak(parse(PROGRAM.replace("BACKEND", IN_PLACE)))
    assert memory.arguments == KB4
    assert memory.peak == KB4 + KB4 + 4 * KB4  # x, what the loop carries, %t
    assert memory.by_kind["parameters"] == KB4
    assert sum(memory.by_kind.values()) == memory.peak == sum(one.bytes for one in memory.buffers)
    assert memory.at.endswith("while/body/pad")
    assert memory.largest[0].shape == "f32[32,128]"


def test_more_in_the_loops_body_or_before_it_moves_the_peak():
    longer = PROGRAM.replace("BACKEND", IN_PLACE).replace("f32[32,128]", "f32[64,128]")
    assert peak(parse(longer)).peak == 2 * KB4 + 8 * KB4
    before = PROGRAM.replace("BACKEND", IN_PLACE).replace("%b = f32[8,128]", "%b = f32[64,128]")
    assert peak(parse(before)).peak == KB4 + KB4 + 8 * KB4 + KB4  # x, a, b, z


def test_a_donated_argument_and_its_output_are_one_buffer():
    wide = (
        PROGRAM.replace("BACKEND", IN_PLACE)
        .replace("%x = f32[8,128]", "%x = f32[64,128]")
        .replace("%new = f32[8,128]", "%new = f32[64,128]")
        .replace("(f32[8,128]{1,0:T(8,128)}) tuple(%new)", "(f32[64,128]{1,0:T(8,128)}) tuple(%new)")
    )
    assert peak(parse(wide)).peak == 8 * KB4 + KB4 + 4 * KB4  # x, which new overwrites; in the loop, as before
    kept = wide.replace(", input_output_alias={ {0}: (0, {}, may-alias) }", "")
    assert peak(parse(kept)).peak == 8 * KB4 + KB4 + 8 * KB4  # x, w and new


LARGE = ("fsdp-13-gib", "fsdp-large-batch", "fsdp-tensor", "fsdp-tensor-v5p")


@pytest.mark.parametrize("name", LARGE)
def test_temporaries_are_within_5_percent_of_the_heap_that_the_compiler_made(name):
    """libtpu logs how large its heap is: larger by its fragmentation, which is not in a sum of what lives."""
    memory = peak(compiled.module(name))
    heap = compiled.FIXTURES[name]["heap"]
    assert 0.95 * heap < memory.temporaries <= 1.005 * heap
    assert memory.arguments == compiled.FIXTURES[name]["memory"]["argument_size_in_bytes"]


@pytest.mark.parametrize(("name", "tolerance"), [("fsdp-13-gib", 0.01), ("gpu", 0.01), ("fsdp-tensor", 0.1)])
def test_the_peak_is_the_compilers_own(name, tolerance):
    """The TPU's figure has the code in it and some of the vector memory, 128 MiB at most: little only of gigabytes."""
    memory = peak(compiled.module(name))
    said = compiled.FIXTURES[name]["memory"]
    code = said.get("generated_code_size_in_bytes", 0)
    assert memory.peak + code == pytest.approx(said["peak_memory_in_bytes"], rel=tolerance)


def test_twice_the_layers_add_their_parameters_and_activations():
    two, four = peak(compiled.module("fsdp-2-layers")), peak(compiled.module("fsdp-4-layers"))
    stored = lambda memory: memory.by_kind["parameters"]  # noqa: E731
    layer = 4 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512) // 4  # float32, a quarter on each device
    assert stored(four) - stored(two) == pytest.approx(2 * layer, rel=0.01)  # norms besides
    assert four.by_kind["optimizer"] - two.by_kind["optimizer"] == pytest.approx(4 * layer, rel=0.01)


@pytest.mark.parametrize("name", sorted(compiled.FIXTURES))
def test_what_lies_there_is_named(name):
    memory = peak(compiled.module(name))
    assert sum(memory.by_kind.values()) == memory.peak
    assert tuple(memory.by_kind) == KINDS
    assert memory.by_kind["optimizer"] == pytest.approx(2 * memory.by_kind["parameters"], rel=0.02)  # two moments
    assert memory.largest == memory.buffers[:10]
    assert all(one.bytes >= one.logical_bytes for one in memory.buffers)
    named = [one for one in memory.buffers if "/" in one.what or one.what.startswith(("state", "batch"))]
    assert sum(one.bytes for one in named) > 0.9 * memory.peak


def test_saved_inputs_of_layers_are_activations_and_their_gradients_gradients():
    memory = peak(compiled.module("fsdp-large-batch"))
    saved = [one for one in memory.buffers if one.kind == "activations" and one.bytes > 10**6]
    assert [one.shape for one in saved] == ["bf16[2,32,512,256]"]  # layers, rows on a device, positions, width
    assert saved[0].source.startswith("maxlm/models/block.py")
    # At most the parameters in float32 once, and the head's whole before it is scattered.
    assert 0 < memory.by_kind["gradients"] < 3 * memory.by_kind["parameters"]


WITH_ARGUMENTS = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 16.35G of 15.75G hbm. Exceeded hbm capacity by 613.31M.

Total hbm usage >= 16.60G:
    reserved        258.00M
    program          16.10G
    arguments       250.00M

Output size 0B; shares 0B with arguments.

Program hbm requirement 16.10G:
    global            1.14M
    HLO temp         16.09G (100.0% utilization: Unpadded (15.58G) Padded (16.58G), 0.3% fragmentation (210.89M))

"""
# As libtpu says it where the temporaries alone are too many.
ALONE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (247.17G) exceeds "
    "available HBM (15.75G)."
)


def test_a_compilers_message_says_how_much_too_much():
    found = parse_out_of_memory(WITH_ARGUMENTS)
    assert (found.used, found.capacity) == (round(16.35 * 2**30), round(15.75 * 2**30))
    assert found.over == round(613.31 * 2**20)
    found = parse_out_of_memory(ALONE)
    assert found.over == found.used - found.capacity == round(247.17 * 2**30) - round(15.75 * 2**30)
    asked = parse_out_of_memory("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.")
    assert (asked.used, asked.capacity, asked.over) == (80 * 2**30, None, None)


def test_other_errors_are_not_of_memory():
    assert parse_out_of_memory("INVALID_ARGUMENT: Mosaic failed to compile TPU kernel") is None
