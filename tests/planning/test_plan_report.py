"""The console's report of a plan: every figure, in its unit, within the width, and nothing unknown made up."""

import io
import re

import pytest
from rich.console import Console

from maxlm.planning import figures, tables
from maxlm.planning.report import print_report, show, show_search
from tests.planning.sample_plans import GIB, KEPT_NAMES, NAMES, expected, load, with_holes


def printed(renderable, width: int = 120) -> str:
    text = io.StringIO()
    Console(file=text, width=width, markup=False, emoji=False, highlight=False).print(renderable)
    return text.getvalue()


def words_of(text: str) -> str:
    """The text without the line breaks that the width makes."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
def test_every_figure_of_a_plan_is_on_the_console(name):
    plan = load(name)
    # Wide, so that no cell is broken into lines.
    text = words_of(printed(show(plan), 300))
    assert [word for word in expected(plan) if word not in text] == []


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_wider_than_the_console(name, width):
    assert max(map(len, printed(show(load(name)), width).splitlines())) <= width


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
def test_a_plan_is_a_screen_and_a_half(name):
    assert len(printed(show(load(name)), 120).splitlines()) <= 80


def test_what_is_null_is_left_out_and_stops_nothing():
    for hole, plan in with_holes(missing=False):
        text = printed(show(plan))
        assert not re.search(r"\b(None|nan|inf)\b", text), hole
    assert printed(show({}))


def test_figures_that_are_not_finite_are_dashes():
    plan = load("fits")
    plan["prediction"]["step_seconds"] = [float("nan"), float("inf")]
    plan["prediction"]["mfu"] = "high"
    lines = printed(show(plan), 95).splitlines()
    assert next(line.split() for line in lines if "step time" in line) == ["step", "time", "–", "–"]
    assert next(line.split() for line in lines if "MFU" in line) == ["MFU", "–", "–"]


def test_the_first_lines_say_whether_it_fits_and_by_how_much():
    assert "Fits: 14.34 GiB of 95.00 GiB a device; 80.66 GiB (84.9%) to spare." in printed(show(load("fits")))
    text = printed(show(load("out-of-memory")))
    assert "Does not fit: needs 47.47 GiB a device, and has 15.75 GiB; 31.72 GiB too much." in text


def test_the_roofline_stands_beside_the_compiler():
    lines = printed(show(load("fits")), 95).splitlines()
    assert next(line.split() for line in lines if line.startswith(" activations ")) == ["activations", "5.50", "6.00"]
    assert next(line.split() for line in lines if line.startswith(" needed ")) == ["needed", "13.87", "14.34"]
    assert "The roofline's total is 3.3% below the compiler's." in words_of("".join(lines))


def test_memory_adds_up_to_what_is_needed():
    """Kinds, and what is of no kind, are what the compiler needs: nothing is lost between the rows."""
    grid = tables.memory(load("fits"))
    column = {row[0]: float(row[2]) for row in grid.rows}
    parts = sum(value for name, value in column.items() if name not in ("needed", "of", "to spare"))
    assert parts == pytest.approx(column["needed"], abs=0.005 * len(column))
    assert column["needed"] + column["to spare"] == pytest.approx(column["of"], abs=0.015)


def test_collectives_alike_are_one_row_and_the_sum_loses_none():
    plan = load("fits")
    grid = tables.collectives(plan)
    found = plan["compiled"]["collectives"]
    alike = [each for each in found if each["kind"] == "all-gather" and each["in_loop"]]
    total = sum(each["bytes_per_step"] for each in alike)
    row = (
        "all-gather",
        "fsdp",
        "ICI",
        "yes",
        "yes",
        f"{sum(each['times'] for each in alike):,}",
        f"{total / 1e9:.2f} GB",
    )
    assert grid.rows[0][:-1] == row
    assert grid.rows[-1][5] == f"{sum(each['times'] for each in found):,}"
    overlapped = sum(each["seconds"] for each in found if each["overlapped"]) / sum(each["seconds"] for each in found)
    assert f"{100 * overlapped:.1f}% of the seconds" in grid.note


def test_many_collectives_are_cut_and_what_is_cut_is_summed():
    plan = load("fits")
    plan["compiled"]["collectives"] = [
        {"kind": "all-gather", "axes": [f"axis{i}"], "times": 1, "bytes_per_step": 10**9, "seconds": 0.1}
        for i in range(30)
    ]
    grid = tables.collectives(plan, most=10)
    assert [row[0] for row in grid.rows[10:]] == ["20 more", "all"]
    assert grid.rows[10][5:] == ("20", "20.00 GB", "2,000.0")
    assert grid.rows[11][5:] == ("30", "30.00 GB", "3,000.0")


def test_a_padded_all_reduce_is_a_warning():
    assert "Warning: 43.98 GB a step are all-reduced as zero-padded buffers" in words_of(
        printed(show(load("two-slices")))
    )
    assert "Warning" not in printed(show(load("fits")))


def test_out_of_memory_gives_the_changes_in_order_and_the_one_that_fits():
    text = printed(show(load("out-of-memory")), 110)
    labels = ["remat keeping q, k, v", "remat full", "2 microbatches", "together: remat full, 2 microbatches"]
    places = [text.index(label) for label in labels]
    assert places == sorted(places)
    assert "Add to the command: model.remat.policy=full train.accumulation=2" in text
    assert "maxlm/models/mlp.py:52" in text
    assert text.count("too large") == 3


def test_nothing_that_fits_is_said_too():
    plan = load("out-of-memory")
    for each in plan["out_of_memory"]["relief"]:
        each["fits"] = False
    text = words_of(printed(show(plan)))
    assert "Nothing that was tried fits" in text
    assert "Add to the command" not in text


def test_a_gpu_plan_says_which_figures_are_the_rooflines():
    plan = load("gpu")
    text, took = words_of(printed(show(plan))), f"{plan['compiled']['compile_seconds']:.1f} s"
    assert f"Memory and collectives are the compiler's (XLA's CUDA compiler 0.10.2, compiled in {took}" in text
    assert "step time, tokens a second, MFU, days and chip-hours are the roofline's" in text
    assert "NVLink" in text
    assert "ICI" not in text
    assert "DCN" not in text
    assert "Mcycles" not in text


def test_a_plan_that_was_not_compiled_says_why_and_how_it_would_be():
    plan = load("analytic-only")
    text = words_of(printed(show(plan)))
    assert "Not compiled: libtpu is not installed" in text
    assert "pip install 'maxlm[tpu]'" in text
    assert "Every figure is the roofline's." in text
    assert "Fits, by the roofline (within about 15%): 13.87 GiB of" in text
    plan["not_compiled_because"] = "the roofline alone was asked for"
    text = words_of(printed(show(plan)))
    assert "Not compiled: the roofline alone was asked for." in text
    assert "pip install" not in text


def test_brackets_in_a_plan_are_not_taken_for_markup():
    plan = load("fits")
    plan["overrides"] = ["model.remat.names=[red]", "name=[/bold]"]
    assert "model.remat.names=[red] name=[/bold]" in printed(show(plan))


def test_what_is_printed_where_there_is_no_terminal_has_no_colour(capsys):
    print_report(show(load("fits")))
    out = capsys.readouterr().out
    assert "llama3-8b on v5p:4x4x4" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 120


SEARCH = {
    "config": "llama3-8b", "topology": "v5p:4x4x4", "slices": 1, "accelerator": "v5p-128", "devices": 64,
    "capacity_bytes": 95 * GIB, "considered": 1412, "refused": 38, "too_large": 61, "slower": 290, "compiled": 3,
    "ranking": [
        {
            "rank": 1, "label": "fsdp 64, remat keeping q, k", "own": False, "mesh": {"data": 1, "fsdp": 64}, "zero": 0,
            "remat": "keeping q, k", "accumulation": 1, "fits": True, "required_bytes": 40 * GIB, "failed": None,
            "changes": {"model.remat.policy": "names", "model.remat.names": ["q", "k"]}, "step_seconds": [2.51, 2.83],
            "mfu": [0.72, 0.64], "bound": "compute", "roofline": {"step_seconds": [2.31, 2.9]},
        },
        {
            "rank": None, "label": "data 8", "own": True, "mesh": {"data": 8, "fsdp": 8}, "zero": 1, "remat": "none",
            "accumulation": 2, "fits": False, "required_bytes": 104 * GIB, "step_seconds": None, "mfu": None,
            "bound": None, "roofline": {"step_seconds": [2.2, 3.5]}, "failed": None,
        },
        {
            "rank": None, "label": "tensor 4", "own": False, "mesh": {"fsdp": 16, "tensor": 4}, "zero": 0,
            "remat": "full", "accumulation": 1, "fits": False, "required_bytes": None, "step_seconds": None,
            "mfu": None, "bound": None, "roofline": {"step_seconds": [2.8, 4.5]}, "failed": "the compiler refused",
        },
    ],
}  # fmt: skip
SEARCH["best"] = SEARCH["ranking"][0]


def test_a_search_is_a_ranking_with_what_was_left_out_and_why():
    text = printed(show_search(SEARCH), 140)
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith(" 1 "))
    for words in ("fsdp 64", "keeping q, k", "40.00 GiB", "2.51–2.83 s", "64.0–72.0%", "compute", "fits"):
        assert words in first
    second = next(line for line in lines if "data 8 × fsdp 8" in line)
    assert "zero 1" in second
    assert "104.00 GiB" in second
    assert "9.00 GiB over, as given" in second
    assert "tensor 4: the compiler refused" in text
    assert "1,412 combinations priced, 3 planned; 61 too large by the roofline, 290 cannot be the fastest" in text
    assert "Add to the command: model.remat.policy=names model.remat.names=[q,k]" in text
    assert "Nothing that was planned fits." in printed(show_search({**SEARCH, "best": None}))


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (figures.size(95 * GIB), "95.00 GiB"),
        (figures.size(12345 * GIB), "12,345.00 GiB"),
        (figures.size(92 * 2**20), "92.0 MiB"),
        (figures.size(-3 * GIB), "-3.00 GiB"),
        (figures.size(0), "0 B"),
        (figures.size(None), "–"),
        (figures.moved(28_972_000_000), "28.97 GB"),
        (figures.moved(1_234_567_000_000), "1,234.57 GB"),
        (figures.moved(4), "4 B"),
        (figures.time(3.2144), "3.214 s"),
        (figures.time(0.412), "412.0 ms"),
        (figures.time(35e-6), "35.0 µs"),
        (figures.time(float("nan")), "–"),
        (figures.whole(1048576), "1,048,576"),
        (figures.flops(53.97e15), "54.0 PFLOP"),
        (figures.flops(0), "0"),
        (figures.step_range([0.93, 1.71]), "0.93–1.71 s"),
        (figures.step_range([0.035, 0.0352]), "35.0–35.2 ms"),
        (figures.step_range([12.44, 15]), "12.4–15.0 s"),
        (figures.step_range([1, None]), "–"),
        (figures.between([613_202, 1_127_501], figures.count), "613k–1.13M"),
        (figures.share(1, 0), "–"),
        (tables.operation("jit(f)/transpose(jvp())/while/body/checkpoint/dot_general"), "backward: dot_general"),
        (tables.operation("jit(f)/transpose(jvp())/while/rematted_computation/add"), "recomputed: add"),
        (tables.operation("jit(f)/jvp()/flash/pallas_call"), "forward: flash"),
        (tables.operation("jit(f)/reduce_sum"), "reduce_sum"),
        (tables.operation("state.optimizer.mu"), "state.optimizer.mu"),
        (tables.operation(None), "–"),
    ],
)
def test_numbers_have_units_and_thousands(shown, words):
    assert shown == words
