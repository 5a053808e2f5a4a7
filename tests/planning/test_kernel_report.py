"""Reports of kernels: the parser on dumps of two small kernels, and a kernel of ours compiled for a TPU.

The dumps in `bundles/` are libtpu 0.0.42.1's for one v5e. `loops`: a grid of 3 x 5, in its body a loop of n[0] steps,
in that one of 3 steps with a 128 x 128 matrix product. `softmax`: a grid of 6, in its body exp(x @ y) over its sum over
528 rows, all of which are kept in more registers than there are.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from maxlm.errors import ConfigError, MaxlmError
from maxlm.planning.bundles import parse_schedule
from maxlm.planning.kernel_compile import kernels_of
from maxlm.planning.kernel_report import CompiledKernel, KernelReport, Shape, kernel_report, read_schedule, show
from maxlm.planning.topology import parse_topology

DUMPS = Path(__file__).parent / "bundles"
V5E = parse_topology("v5e:2x2")


@pytest.fixture(scope="module")
def loops():
    return read_schedule(DUMPS, "loops.1")


@pytest.fixture(scope="module")
def softmax():
    return read_schedule(DUMPS, "softmax.1")


def rows_between(name: str, first: int, last: int) -> list[list[int]]:
    """The rows of bundles first to last (inclusive) of the utilisation file, by hand."""
    (file,) = DUMPS.glob(f"*-{name}-*-utilization.txt")
    return [list(map(int, line.split())) for line in file.read_text().splitlines()[4:]][first : last + 1]


def test_loops_are_nested_as_in_the_kernel_and_counted_by_their_bounds(loops):
    # The grid's 15 steps take two more to fill and drain the pipeline; n[0] is not known to the compiler.
    assert [(loop.depth, loop.parent, loop.iterations) for loop in loops.loops] == [
        (1, None, 17),
        (2, 0, None),
        (3, 1, 3),
    ]


def test_every_bundle_is_in_one_loop_or_in_none(loops):
    parts = [loops.own(loop) for loop in (None, 0, 1, 2)]
    assert sorted(bundle for part in parts for bundle in part) == list(range(loops.n_bundles))
    # From the file: its LB marks are at 0xb, 0x42 and 0x43; `>>>` is last at 0x77 and `>>` at 0x79.
    assert loops.own(2) == list(range(0x43, 0x78))
    assert loops.own(1) == [0x42, 0x78, 0x79]


def test_static_cycles_are_bundles_times_iterations_of_the_loops_around_them(softmax):
    (loop,) = softmax.loops
    assert loop.iterations == 6 + 2
    inside = len(softmax.own(0))
    assert softmax.complete
    assert softmax.static_cycles == 8 * inside + (softmax.n_bundles - inside)


def test_a_loop_without_known_bounds_counts_once_and_the_sum_is_said_to_be_incomplete(loops):
    assert not loops.complete
    assert loops.executions(2) is None
    own = [len(loops.own(loop)) for loop in (None, 0, 1, 2)]
    assert loops.static_cycles == own[0] + 17 * (own[1] + own[2] + 3 * own[3])


def test_utilisation_is_the_share_of_a_units_slots_in_the_loop(loops):
    rows = rows_between("loops.1", 0x43, 0x77)
    assert loops.units["MXU"] == 4
    assert loops.filled("MXU", 2) == sum(row[0] for row in rows)
    assert loops.utilisation("MXU", 2) == pytest.approx(sum(row[0] for row in rows) / (4 * len(rows)))
    assert loops.utilisation("MXU", 2) > 0.3
    assert loops.utilisation("MXU", None) == 0


def test_spills_and_fills_are_counted_where_registers_run_out(loops, softmax):
    (loop,) = softmax.loops
    rows = rows_between("softmax.1", loop.first, loop.last)
    assert softmax.filled("VSTORE:SPILL", 0) == sum(row[8] for row in rows) > 0
    assert softmax.filled("VLOAD:FILL", 0) == sum(row[6] for row in rows) > 0
    assert loops.filled("VSTORE:SPILL", 2) == 0


def test_what_a_branch_may_skip_is_listed_by_the_innermost_branches(loops):
    # 0x39 branches over the loops to 0x7d; the branch around it, from 0x2a to 0x91, is not innermost.
    assert [(branch.first, branch.last) for branch in loops.branches] == [(0x2B, 0x90), (0x3A, 0x7C)]
    assert [branch.bundles for branch in loops.skippable(0)] == [0x7C - 0x3A + 1]


def test_files_of_two_kernels_or_of_another_kind_are_refused(loops):
    texts = {
        (kernel, kind): next(DUMPS.glob(f"*-{kernel}.1-*-{kind}.txt")).read_text()
        for kernel in ("loops", "softmax")
        for kind in ("final_bundles", "utilization")
    }
    with pytest.raises(ValueError, match="not of one kernel"):
        parse_schedule(texts["loops", "final_bundles"], texts["softmax", "utilization"])
    with pytest.raises(ValueError, match="not a file of utilisation"):
        parse_schedule(texts["loops", "final_bundles"], texts["loops", "final_bundles"])
    missing_a_bundle = texts["loops", "final_bundles"].replace("0x11  ", "0x99  ", 1)
    with pytest.raises(ValueError, match="bundle 0x99 where 0x11 was expected"):
        parse_schedule(missing_a_bundle, texts["loops", "utilization"])


def test_a_dump_without_the_kernel_says_so(tmp_path):
    with pytest.raises(MaxlmError, match=r"dumped 0 files final_bundles of kernel loops\.1"):
        read_schedule(tmp_path, "loops.1")


def test_the_text_shows_cycles_units_and_spills_and_speaks_of_no_time(loops, softmax):
    report = KernelReport(
        "attention-forward",
        V5E,
        Shape(),
        (CompiledKernel("softmax.1", {"block_q": 528}, softmax), CompiledKernel("loops.1", {}, loops)),
    )
    text = show(report)
    told = report.to_dict()["kernels"][0]
    assert f"{told['static_cycles']:,} static cycles in all" in text
    assert f"at least {loops.static_cycles:,} static cycles" in text
    assert "block_q 528" in text
    loop = told["loops"][0]
    row = next(line for line in text.splitlines() if line.split()[:1] == [">"])
    assert row.split()[1:4] == [f"{loop['bundles']:,}", "8", f"{loop['static_cycles']:,}"]
    assert row.split()[-2:] == [str(loop["fills"]), str(loop["spills"])]
    assert "so they are no time" in text
    assert not any(unit in text for unit in (" ms", " us", "seconds"))
    assert max(map(len, text.splitlines())) <= 112


def test_where_a_device_is_two_cores_the_text_says_whose_cycles_they_are(softmax):
    def text(topology: str) -> str:
        report = KernelReport(
            "attention-forward", parse_topology(topology), Shape(), (CompiledKernel("softmax.1", {}, softmax),)
        )
        return show(report)

    assert "A device of v5p is 2 cores. Runs and cycles are one core's" in text("v5p:2x2x2")
    assert "cores" not in text("v5e:2x2")
    assert "cores" not in text("tpu7x:2x2x1")  # two cores a chip, but two devices as well


def test_an_unknown_kernel_names_those_that_there_are():
    with pytest.raises(ConfigError, match="no kernel 'attention'; they are attention-forward, attention-backward"):
        kernel_report("attention", V5E)


def test_gpus_are_refused():
    with pytest.raises(ConfigError, match="h100:1x8: reports of kernels are of TPUs"):
        kernel_report("attention-forward", parse_topology("h100:1x8"))


def test_kernels_are_found_in_the_compiled_text_with_their_notes():
    text = (
        '  %scale.2 = f32[8]{0} custom-call(%x), custom_call_target="other", metadata={op_name="jit(f)/scale"}\n'
        '  %splash.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 256}"\n}}, '
        'metadata={op_name="jit(f)/transpose(jvp())/splash/pallas_call"}, backend_config={}\n'
        '  ROOT %plain = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/jvp()/plain"}, backend_config={}\n'
    )
    assert kernels_of(text) == [
        {"name": "splash.1", "settings": {"block_q": 256}, "backward": True},
        {"name": "plain", "settings": {}, "backward": False},
    ]


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")


@needs_libtpu
def test_attention_compiles_for_a_tpu_and_its_schedule_is_read():
    heads = 2
    report = kernel_report("attention-forward", V5E, seq_len=256, heads=heads, kv_heads=1, head_dim=128)
    (kernel,) = report.kernels
    assert kernel.settings["block_q"] == 256
    (loop,) = report.to_dict()["kernels"][0]["loops"]
    assert loop["iterations"] == heads + 2  # one tile a head, and the pipeline's fill and drain
    assert loop["utilisation"]["MXU"] > 0.2
    assert kernel.schedule.static_cycles > heads * loop["bundles"]


@needs_libtpu
def test_a_shape_that_the_kernel_does_not_take_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match="100 queries are not a multiple of 128"):
        kernel_report("attention-forward", V5E, seq_len=100)
