"""The page of a run: right figures, right curves, nothing from the network, and no garbage that stops it."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.errors import CheckpointError
from maxlm.evaluation.chart import MAX_POINTS, Series, line_chart, log_ticks, ticks
from maxlm.evaluation.report import count, duration, figure, number, write_report
from tests import pages

CONFIG = "name: tiny\ntrain:\n  steps: 40\n"


def train_line(step: int, **changes) -> dict:
    line = {
        "step": step,
        "tokens": step * 1000,
        "loss": 8.0 / step,
        "grad_norm": 1.0 + 1 / step,
        "learning_rate": 3e-4,
        "step_seconds": 2.0,
        "tokens_per_second": 500.0,
        "tokens_per_second_per_device": 500.0,
        "model_flops_per_second_per_device": 5e9,
        "mfu": 0.421,
        "data_wait_seconds": 0.01,
        "skipped_steps": step // 20,
    }
    return {**line, **changes}


def make_run(run_dir: Path, lines: list[dict] | bytes, *, config: str = CONFIG, **files: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    content = lines if isinstance(lines, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    (run_dir / "metrics.jsonl").write_bytes(content)
    (run_dir / "config.yaml").write_text(config)
    for name, text in files.items():
        (run_dir / name.replace("_", ".")).write_text(text)
    return run_dir


LINES = [
    train_line(1, step_seconds=None, tokens_per_second=None, mfu=None),
    *(train_line(step) for step in range(10, 41, 10)),
    {"step": 40, "tokens": 40_000, "eval_loss": 2.3456, "eval_bits_per_byte": 1.2345},
]


class Page(pages.Page):
    """A run's page with its tiles."""

    def handle_data(self, data):
        self.texts.append(data)  # styles too

    @property
    def tiles(self) -> dict[str, str]:
        texts = [text for text in self.texts if text.strip()]
        names = [
            "held-out loss",
            "bits per byte",
            "train loss",
            "tokens a second",
            "MFU",
            "training time",
            "skipped steps",
        ]
        return {name: texts[texts.index(name) + 1] for name in names}


def report(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_figures_are_those_of_the_last_lines_and_the_medians_of_the_rates(tmp_path):
    assert report(make_run(tmp_path, LINES)).tiles == {
        "held-out loss": "2.346",
        "bits per byte": "1.234",
        "train loss": "0.2000",
        "tokens a second": "500",
        "MFU": "42.1%",
        "training time": "1m 18s",  # 39 steps of 2 s; the first one's time is not known
        "skipped steps": "2",
    }


def test_the_curves_go_through_the_right_points():
    svg = line_chart(
        [Series("train", [(0.0, 4.0), (50.0, 3.0), (100.0, 2.0)]), Series("held-out", [(100.0, 2.5)], "b", dots=True)],
        title="loss",
        format_x=lambda x: f"x{x:g}",
        format_y=lambda y: f"y{y:g}",
    )
    root = ElementTree.fromstring(svg)
    line = next(each for each in root.iter("polyline") if each.get("class") == "line a")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, corner.split(",")) for corner in line.get("points").split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert (x2 > x0, y2 > y0) == (True, True)  # SVG counts y downwards: the loss falls
    # The tick that says 3 stands where the point of loss 3 is.
    labels = {each.text: float(each.get("y")) - 3.5 for each in root.iter("text")}
    assert labels["y3"] == pytest.approx(y1, abs=0.2)
    (dot,) = root.iter("circle")
    assert float(dot.get("cx")) == x2
    assert y1 < float(dot.get("cy")) < y2
    hover = json.loads(next(root.iter("metadata")).text)
    assert [point[2:] for point in hover[0]["points"]] == [["x0", "y4"], ["x50", "y3"], ["x100", "y2"]]


def test_the_report_draws_every_curve_with_its_numbers(tmp_path):
    html = write_report(make_run(tmp_path, LINES)).read_text()
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert [chart.get("aria-label").split(" against")[0] for chart in charts] == [
        *("Loss", "Loss", "Gradient norm", "Learning rate", "Throughput", "Waiting for data")
    ]
    shown = [json.loads(next(chart.iter("metadata")).text) for chart in charts]
    train, heldout = shown[0]
    assert [point[2:] for point in train["points"]] == [
        *(["1k", "8.000"], ["10k", "0.8000"], ["20k", "0.4000"], ["30k", "0.2667"], ["40k", "0.2000"])
    ]
    assert [point[2:] for point in heldout["points"]] == [["40k", "2.346"]]
    waiting = shown[5][0]["points"]
    assert waiting[0][3] == f"{100 * 0.01 / (9 * 2.0):.3g}%"  # steps 2 to 10
    assert len(waiting) == 4


def test_many_points_are_drawn_as_mean_and_range_of_neighbours():
    spiky = [(float(x), 100.0 if x == 5000 else 1.0) for x in range(20_000)]
    svg = line_chart([Series("norm", spiky)], title="t", format_x=str, format_y=str)
    root = ElementTree.fromstring(svg)
    assert len(next(root.iter("polyline")).get("points").split()) <= MAX_POINTS
    heights = [float(corner.split(",")[1]) for corner in next(root.iter("polygon")).get("points").split()]
    top = min(heights)
    assert top < 30  # the one spike is there still, in the band
    assert len(svg) < 120_000


def test_on_a_log_axis_early_points_stay_apart():
    points = [(float(x), 1.0 / x) for x in range(1, 50_000)]
    svg = line_chart([Series("loss", points)], title="t", format_x=count, format_y=str, log_x=True)
    shown = json.loads(next(ElementTree.fromstring(svg).iter("metadata")).text)[0]["points"]
    assert [point[2] for point in shown[:4]] == ["1", "2", "3", "4"]


def test_the_page_needs_no_network_and_no_jax(tmp_path):
    make_run(tmp_path, LINES)
    page = report(tmp_path)
    assert page.loads == []
    html = (tmp_path / "report.html").read_text()
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html
    program = (
        "import sys; from maxlm.evaluation.report import write_report; write_report(sys.argv[1]); "
        "assert not {'jax', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_text_is_escaped_wherever_it_comes_from(tmp_path):
    nasty = "</script><script>alert(1)</script><b a=\"'>&"
    about = {"n_params": 4_065_536, "devices": nasty, "versions": {nasty: nasty}, nasty: nasty, "mesh": {nasty: 2}}
    make_run(
        tmp_path,
        LINES,
        config=f"name: {json.dumps(nasty)}\n# {nasty}\n",
        run_json=json.dumps(about),
        samples_json=json.dumps([{"prompt": nasty, "continuation": nasty}]),
    )
    page = report(tmp_path)
    assert page.tags.count("script") == 1
    assert page.tags.count("b") == 1  # the prompt
    text = "".join(page.texts)
    assert text.count("alert(1)") >= 7
    assert "4.07M parameters" in text


def test_samples_config_and_run_are_on_the_page(tmp_path):
    about = {"n_params": 1234, "devices": "8 x cpu", "mesh": {"data": 2, "fsdp": 4}, "versions": {"jax": "0.10.2"}}
    about["command"] = ["/somewhere/bin/maxlm", "train", "quickstart"]
    samples = json.dumps([{"prompt": "def ", "continuation": "main():\n    pass"}])
    make_run(tmp_path, LINES, run_json=json.dumps(about), samples_json=samples)
    text = "".join(report(tmp_path).texts)
    for expected in ("1.23k parameters", "8 x cpu", "mesh data 2 × fsdp 4", "jax 0.10.2", "maxlm train quickstart"):
        assert expected in text
    assert "def main():\n    pass" in text
    assert CONFIG in text
    (tmp_path / "samples.json").unlink()
    (tmp_path / "samples.txt").write_text("once upon a time")
    assert "once upon a time" in "".join(report(tmp_path).texts)


def test_a_run_without_steps_or_evaluations_has_a_page_that_says_so(tmp_path):
    text = "".join(report(make_run(tmp_path / "none", b"")).texts)
    assert "No step has been logged yet" in text
    page = report(make_run(tmp_path / "one", LINES[:1]))
    assert page.tiles["held-out loss"] == "–"
    assert page.tiles["training time"] == "–"


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused_by_what_it_lacks_and_nothing_is_written(tmp_path, missing):
    make_run(tmp_path, LINES)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is not the folder of a run: it has no {missing}\. "):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


def test_lines_that_are_torn_are_left_out_and_counted(tmp_path):
    good = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    page = report(make_run(tmp_path, good + b'{"step": 41, "tok'))
    assert "Lines of metrics.jsonl that could not be read, and are left out: 1." in "".join(page.texts)
    assert page.tiles["train loss"] == "0.2000"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
wild_lines = st.dictionaries(st.sampled_from([*LINES[1], *LINES[-1], "nonfinite"]), json_values, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=40) | wild_lines.map(lambda line: json.dumps(line).encode()), max_size=12),
    json_values,
    st.text(max_size=40),
)
def test_no_garbage_stops_the_report(tmp_path_factory, garbage, about, config):
    run_dir = tmp_path_factory.mktemp("run")
    lines = [json.dumps(line).encode() for line in LINES]
    content = b"\n".join(
        each for pair in zip(lines, [*garbage, b"", b"", b"", b"", b""][:5], strict=False) for each in pair
    )
    content += b"\n" + b"\n".join(garbage)
    make_run(run_dir, content, config="x", run_json=json.dumps(about), samples_json=json.dumps(about))
    (run_dir / "config.yaml").write_bytes(config.encode("utf-8", "surrogatepass"))
    page = report(run_dir)
    assert page.tags.count("svg") == 6
    assert "nan" not in re.findall(r'points="([^"]*)"', (run_dir / "report.html").read_text())


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 9))
def test_ticks_are_round_inside_and_about_as_many_as_asked(low, span, wanted):
    high = low + span
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return
    found = ticks(low, high, wanted)
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    assert wanted / 2 - 1 <= len(found) <= 2 * wanted + 1


def test_log_ticks_are_round_and_inside():
    assert log_ticks(900, 90_000) == [1000, 2000, 5000, 10_000, 20_000, 50_000]
    assert log_ticks(1, 1e6) == [10.0**power for power in range(7)]


def test_figures_are_short_and_never_nan():
    assert [figure(value, 4) for value in (2.34567, 0.000123456, 0, float("nan"), None, "x", 10**400)] == [
        *("2.346", "1.235e-04", "0", "–", "–", "–", "–")
    ]
    assert [count(value) for value in (7, 950, 4_065_536, 8.03e9)] == ["7", "950", "4.07M", "8.03B"]
    assert [duration(value) for value in (12.34, 245, 12_000, 360_000)] == ["12.3 s", "4m 05s", "3h 20m", "4d 4h"]
    assert number(True) is None
