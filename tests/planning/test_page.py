"""The page of a plan: right figures, right bars, nothing from the network, no script, and no hole that stops it."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from maxlm.errors import StorageError
from maxlm.planning.bars import Bar, Segment, bars
from maxlm.planning.page import page, write_page
from tests.pages import Page
from tests.planning.sample_plans import GIB, KEPT_NAMES, NAMES, expected, load, with_holes


def charts(html: str) -> dict[str, ElementTree.Element]:
    """The pictures of a page by what they are called."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]
    return {re.split("[:,;]", svg.attrib["aria-label"])[0]: svg for svg in found}


def widths(svg: ElementTree.Element) -> dict[str, float]:
    """The bars of a chart by their titles, in pixels."""
    return {
        title.text or "": float(rect.attrib["width"])
        for rect in svg.iter("rect")
        for title in rect.iter("title")
    }  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
def test_every_figure_of_a_plan_is_on_the_page(name):
    plan = load(name)
    text = Page(page(plan)).text
    assert [word for word in expected(plan) if word not in text] == []


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
def test_the_page_needs_no_network_and_no_script(name):
    html = page(load(name))
    found = Page(html)
    assert found.loads == []
    assert not set(found.tags) & {"script", "link", "img", "iframe", "object", "embed"}
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_follows_the_readers_scheme_and_can_be_printed():
    html = page(load("fits"))
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media print" in html
    assert '<meta name="color-scheme" content="light dark">' in html


@pytest.mark.parametrize("name", [*NAMES, *KEPT_NAMES])
def test_every_picture_has_a_name_and_a_table_beside_it(name):
    html = page(load(name))
    for card in re.findall(r"<section class='card'>.*?</section>", html, re.DOTALL):
        if "<svg" in card:
            assert re.search(r'<svg [^>]*role="img" aria-label="[^"]{20,}"', card)
            assert "<table" in card
            assert "scope='row'" in card
            assert "scope='col'" in card


def test_what_is_missing_is_left_out_and_stops_nothing():
    for hole, plan in with_holes(missing=True):
        text = Page(page(plan)).text
        assert not re.search(r"\b(None|nan|inf)\b", text), hole
    Page(page({}))


def test_the_memory_stack_is_as_long_as_the_bytes_and_the_limit_where_the_device_ends():
    plan = load("fits")
    svg = charts(page(plan))["Memory a device"]
    kinds = plan["compiled"]["memory_by_kind"]
    drawn = widths(svg)
    scale = drawn[f"activations: {kinds['activations'] / GIB:.2f} GiB"] / kinds["activations"]
    for kind, n_bytes in kinds.items():
        assert drawn[f"{kind}: {n_bytes / GIB:.2f} GiB"] == pytest.approx(n_bytes * scale, abs=0.11)
    start = min(float(rect.attrib["x"]) for rect in svg.iter("rect"))
    limit = next(float(line.attrib["x1"]) for line in svg.iter("line") if line.attrib["class"] == "limit")
    assert limit - start == pytest.approx(plan["topology"]["hbm_bytes_per_device"] * scale, rel=0.01)


def test_bars_of_parts_compare_across_resources():
    plan = load("fits")
    drawn = widths(charts(page(plan))["Roofline time of each part by resource"])
    mlp = next(part for part in plan["analytic"]["parts"] if part["name"] == "mlp")
    compute = drawn[f"compute: {mlp['compute_seconds']:.3f} s"]
    ici = drawn[f"ICI: {mlp['ici_seconds'] * 1e3:.1f} ms"]
    assert ici / compute == pytest.approx(mlp["ici_seconds"] / mlp["compute_seconds"], rel=0.005)


def test_the_step_is_drawn_from_full_overlap_to_none():
    plan = load("fits")
    svg = charts(page(plan))["Step time"]
    best, worst = plan["prediction"]["step_seconds"]
    drawn = widths(svg)
    known = drawn[f"full overlap: {plan['analytic']['step_seconds'][0]:.3f} s"] / plan["analytic"]["step_seconds"][0]
    assert drawn[f"full overlap: {best:.3f} s"] == pytest.approx(best * known, abs=0.11)
    assert drawn[f"up to no overlap: {worst:.3f} s"] == pytest.approx((worst - best) * known, abs=0.11)


def test_out_of_memory_is_drawn_with_what_each_change_would_leave():
    plan = load("out-of-memory")
    html = page(plan)
    drawn = widths(charts(html)["What each change needs"])
    relief = plan["out_of_memory"]["relief"]
    by_number = {int(title.split(".")[0]): width for title, width in drawn.items() if title[0].isdigit()}
    scale = drawn["as it is: 47.47 GiB"] / plan["out_of_memory"]["used"]
    assert list(by_number) == [1, 2, 3, 4]
    for i, each in enumerate(relief, 1):
        assert by_number[i] == pytest.approx(each["required_bytes"] * scale, abs=0.11)
    assert "verdict bad" in html
    assert "verdict good" not in html


def test_a_gpu_page_names_its_own_networks():
    text = Page(page(load("gpu"))).text
    assert "NVLink" in text
    assert "network" in text
    assert not re.search(r"\b(ICI|DCN)\b", text)


def test_names_from_the_plan_are_escaped():
    plan = load("fits")
    plan["config"] = "<script>alert(1)</script>"
    plan["analytic"]["parts"][0]["name"] = "<b>&\"'"
    plan["compiled"]["largest_buffers"][0]["what"] = "a/<i>b"
    plan["overrides"] = ["name=</main>"]
    found = Page(page(plan))
    assert not set(found.tags) & {"script", "b"}
    assert "<script>alert(1)</script>" in found.text
    assert "<b>&\"'" in found.text
    assert "name=</main>" in found.text


def test_the_page_is_written_whole(tmp_path):
    path = tmp_path / "plan.html"
    write_page(load("fits"), path)
    assert path.read_text(encoding="utf-8") == page(load("fits"))
    with pytest.raises(StorageError):
        write_page(load("fits"), path / "inside-a-file.html")


def test_a_chart_of_nothing_is_still_a_picture():
    svg = ElementTree.fromstring(bars([Bar("none")], title="nothing", unit=(1.0, "s")))
    assert svg.attrib["aria-label"] == "nothing"
    assert not list(svg.iter("rect"))


def test_segments_lie_end_to_end():
    row = Bar("a", [Segment("x", 1.0, "compute", "1 s"), Segment("y", 3.0, "hbm", "3 s")], "4 s")
    first, second = ElementTree.fromstring(bars([row], title="t", unit=(1.0, "s"))).iter("rect")
    assert float(first.attrib["x"]) + float(first.attrib["width"]) == pytest.approx(float(second.attrib["x"]), abs=0.11)
    assert float(second.attrib["width"]) == pytest.approx(3 * float(first.attrib["width"]), abs=0.3)
