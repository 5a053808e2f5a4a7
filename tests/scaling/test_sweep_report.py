"""The page of a sweep: every part of it is there, its numbers are the fits', and nothing is hidden or fetched."""

import base64
import dataclasses
import io
import json
import re
import sys

import numpy as np
import pytest
from ladder_table import BUDGETS, ladder_rows, write_sweep
from matplotlib.figure import Figure
from PIL import Image
from synthetic import KNOWN, chinchilla

import maxlm.scaling
from maxlm.cli import main
from maxlm.errors import DataError, MaxlmError
from maxlm.evaluation.report import count
from maxlm.scaling import figures, figures_fit
from maxlm.scaling.captions import frontier_caption, the_next_model
from maxlm.scaling.fitting import fit
from maxlm.scaling.plots import DARK, LIGHT, render
from maxlm.scaling.published import HOFFMANN, KAPLAN, PARAMETRIC, PUBLISHED, REFIT
from maxlm.scaling.reporting import page, report
from maxlm.scaling.result import FitOptions
from maxlm.scaling.study import LAWS, exponents, make_study, path
from maxlm.scaling.table import write_table
from tests import pages

SECTIONS = {
    "summary", "warnings", "terms", "loss-curves", "isoflop", "frontier", "contours", "parameters", "exponents",
    "comparison", "residuals", "backtest", "runs", "method",
}  # fmt: skip
OPTIONS = FitOptions(resamples=200)


class Page(pages.Page):
    """A page with its ids and the rows of its tables."""

    def __init__(self, html: str):
        self.ids: set[str] = set()
        self.rows: list[list[str]] = []
        super().__init__(html)

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        self.ids |= {value for name, value in attrs if name == "id"}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        super().handle_data(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report(write_sweep(tmp_path_factory.mktemp("ladder"), ladder_rows()), options=OPTIONS)


@pytest.fixture(scope="module")
def html(written):
    return written.page.read_text(encoding="utf-8")


def drawn(study, draw):
    figure = Figure()
    draw(study, figure, LIGHT)
    return figure.axes


def points(axes, marker):
    """What is drawn with a marker, as `[n, 2]`."""
    lines = [line.get_xydata() for line in axes.lines if line.get_marker() == marker]
    return np.concatenate(lines)


def test_every_section_is_there_and_every_tag_is_closed(html):
    assert Page(html).ids >= SECTIONS


def test_the_page_needs_neither_network_nor_script(html):
    found = Page(html)
    assert "script" not in found.tags
    assert all(load.startswith("data:image/png;base64,") for load in found.loads)
    assert not re.search(r"https?:|@import|url\(", html)


def test_the_pictures_lie_beside_the_page_and_are_those_in_it(written, html):
    embedded = {base64.b64decode(load.partition(",")[2]) for load in Page(html).loads}
    assert {path.stem for path in written.pictures} == SECTIONS & {path.stem for path in written.pictures}
    assert len(written.pictures) == 8
    for file in written.pictures:
        assert file.parent == written.page.parent
        assert file.read_bytes() in embedded
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            assert picture.width >= 1000
            # Lines, words and a ground: a picture that is blank has a colour or two.
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_page_in_the_dark_has_pictures_on_a_dark_ground(html):
    dark = [base64.b64decode(load.partition(",")[2]) for load in re.findall(r"srcset='([^']*)'", html)]
    assert len(dark) == 8
    for png in dark:
        with Image.open(io.BytesIO(png)) as picture:
            assert max(picture.convert("RGB").getpixel((0, 0))) < 64


def test_the_summary_says_the_optimum_of_the_fit(written, html):
    """N* from the parameters by the closed form of arXiv:2203.15556, eq. 4, written out here."""
    named = {name: estimate.value for name, estimate in written.study.fits["chinchilla"].parameters.items()}
    alpha, beta = named["alpha"], named["beta"]
    g = (alpha * named["A"] / (beta * named["B"])) ** (1 / (alpha + beta))
    size = g * (10 * BUDGETS[-1] / 6) ** (beta / (alpha + beta))
    tokens = 10 * BUDGETS[-1] / 6 / size
    loss = chinchilla(size, tokens, **named)
    said = the_next_model(written.study)
    assert f"For 1e21 FLOPs, 10 times the largest run, train {count(size)} " in said
    assert f"parameters on {count(tokens)} " in said
    assert f"Its loss should be {loss:.3f} " in said
    assert said in Page(html).text


def test_the_parameters_on_the_page_are_those_of_fit(written, html):
    fitted = fit(written.study.table, "chinchilla", OPTIONS)
    found = Page(html)
    for name, estimate in fitted.parameters.items():
        assert found.row(name)[1:] == [f"{each:.6g}" for each in (estimate.value, estimate.low, estimate.high)]


def test_every_warning_of_every_fit_is_on_the_page(written, html):
    text = Page(html).text
    assert set(written.study.fits) == set(LAWS)
    messages = [message for result in written.study.fits.values() for message in result.warnings]
    assert len(messages) > 3
    for message in messages:
        assert message in text
    for result in written.study.fits.values():
        assert result.verdict in text


def test_every_run_is_in_the_table_and_those_that_failed_or_diverged_are_shown(written, html):
    found, rows = Page(html), ladder_rows()
    for row in rows:
        assert found.row(row["run"])[1] == row["status"]
    failed, diverged = rows[7]["run"], rows[17]["run"]
    assert found.row(failed)[5] == "–"
    assert found.row(diverged)[5] == "6.900"
    assert found.row(failed)[-1] == "exit code 5: disk full"
    assert "not done" in found.row(diverged)[-1]
    assert "1 failed and 1 diverged, left out" in found.text
    assert f"Dashed with a cross: {failed} (failed) and {diverged} (diverged)" in found.text
    (axes,) = drawn(written.study, figures.isoflop)
    crosses = points(axes, "X")
    assert sorted(crosses[crosses[:, 0] > 0, 0]) == sorted([rows[7]["n_params"], rows[17]["n_params"]])


def test_the_parabolas_are_drawn_through_the_runs_and_their_stars_are_the_minima_of_approach_2(written):
    (axes,) = drawn(written.study, figures.isoflop)
    done = [row for row in ladder_rows() if row["status"] == "done"]
    runs = [(row["n_params"], row["loss"]) for row in done]
    assert np.array(sorted(map(tuple, points(axes, "o")))) == pytest.approx(np.array(sorted(runs)))
    minima = fit(written.study.table, "approach2", OPTIONS).details["minima"]
    assert points(axes, "*")[:, 0] == pytest.approx([each["n_params"] for each in minima])
    for star, budget in zip(points(axes, "*"), BUDGETS, strict=True):
        here = [row for row in done if row["budget"] == budget]
        assert star[1] <= min(row["loss"] for row in here) * 1.005


def test_the_frontier_passes_through_the_optimum_and_its_band_is_the_bootstraps(written):
    result = written.study.fits["chinchilla"]
    point = result.optimum[-1]
    sizes, tokens = path(result, np.array([point.flops]))
    assert np.exp(sizes[0, 0]) == pytest.approx(point.n_params.value)
    assert np.quantile(np.exp(tokens[1:, 0]), [0.025, 0.975]) == pytest.approx(
        [point.n_tokens.low, point.n_tokens.high]
    )
    left, right = drawn(written.study, figures.frontier)
    for axes, name in ((left, "n_params"), (right, "n_tokens")):
        x, y = axes.lines[0].get_xydata().T
        assert np.exp(np.interp(np.log(point.flops), np.log(x), np.log(y))) == pytest.approx(getattr(point, name).value)
        low, high = axes.get_ylim()
        assert low < y.min() < y.max() < high


def test_residuals_are_measured_over_predicted_by_the_formula_itself(written):
    named = {name: estimate.value for name, estimate in written.study.fits["chinchilla"].parameters.items()}
    done = [row for row in ladder_rows() if row["status"] == "done"]
    truth = [100 * (row["loss"] / chinchilla(row["n_params"], row["n_tokens"], **named) - 1) for row in done]
    first, *_ = drawn(written.study, figures_fit.residuals)
    found = points(first, "o")
    assert sorted(found[:, 1]) == pytest.approx(sorted(truth), abs=1e-9)


def test_the_back_test_draws_the_runs_of_the_largest_budget(written, html):
    (axes,) = drawn(written.study, figures_fit.backtest)
    measured = points(axes, "D")[:, 0]
    assert sorted(measured) == pytest.approx(
        sorted(row["loss"] for row in ladder_rows() if row["budget"] == BUDGETS[-1])
    )
    test = written.study.fits["chinchilla"].backtest
    assert f"misses the loss of the largest by {test.mean_error:+.2%} on average" in Page(html).text


def test_curves_end_where_the_run_ends_and_keep_the_mean_of_what_was_logged(written):
    curves = {curve.run: curve for curve in written.study.curves}
    rows = ladder_rows()
    assert set(curves) == {row["run"] for row in rows}
    curve = curves[rows[0]["run"]]
    assert curve.flops[-1] == pytest.approx(rows[0]["flops"], rel=0.02)
    assert curve.held_out == rows[0]["loss"]
    truth = chinchilla(curve.n_params, curve.tokens, **KNOWN["chinchilla"].truth)
    # The noise of a logged line is 0.03, and a point is the mean of one or more.
    assert np.abs(curve.loss - truth).max() < 5 * 0.03
    assert curves[rows[7]["run"]].flops[-1] == pytest.approx(0.4 * rows[7]["flops"], rel=0.02)


def test_approach_1_takes_training_curves_where_sizes_do_not_recur(tmp_path):
    rows = [row for row in ladder_rows() if row["status"] == "done"]
    for n, row in enumerate(rows):
        row["n_params"] *= 1 + n / 100
        row["flops"] = 6 * row["n_params"] * row["n_tokens"]
    study = make_study(write_sweep(tmp_path, rows), FitOptions(resamples=0))
    assert study.envelope_of_curves
    # The curves follow the law itself, whose a is 0.513; sizes stand a fifth apart, so the envelope is coarse.
    assert exponents(study.fits["approach1"])[0].value == pytest.approx(0.513, abs=0.1)
    assert "Approach 1 is of the runs' training curves" in frontier_caption(study)[-1]


def test_the_same_table_gives_the_same_page_and_the_same_pixels(written, html):
    again = make_study(written.page.parent.parent, OPTIONS)
    sections = dict.fromkeys(SECTIONS, "<p>drawn</p>")
    assert page(again, sections) == page(written.study, sections)

    def draw(figure, theme):
        figures.isoflop(again, figure, theme)

    png = (written.page.parent / "isoflop.png").read_bytes()
    assert render(draw, LIGHT, (8, 4.6)) == png
    assert render(draw, DARK, (8, 4.6)) != png


def test_a_bare_csv_makes_a_page_without_curves(tmp_path, capsys):
    bare = [{name: row[name] for name in ("n_params", "n_tokens", "loss")} for row in ladder_rows()]
    table = write_table(tmp_path / "mine.csv", [row for row in bare if row["loss"]])
    main(["sweep", "report", str(table), "--resamples", "50", "--json", "--budget", "1e22"])
    said = json.loads(capsys.readouterr().out)
    found = Page((tmp_path / "mine-report" / "report.html").read_text(encoding="utf-8"))
    assert said["page"] == str(tmp_path / "mine-report" / "report.html")
    assert said["fits"]["chinchilla"]["optimum"][0]["flops"] == 1e22
    assert "a table of results has no training curves" in found.text
    assert "For 1e22 FLOPs" in found.text
    assert found.ids >= SECTIONS
    assert not (tmp_path / "mine-report" / "loss-curves.png").exists()


def test_a_table_too_small_for_a_law_says_so_and_still_lists_its_runs(tmp_path):
    table = write_table(tmp_path / "three.csv", ladder_rows()[:3])
    written = report(table, tmp_path / "out", OPTIONS)
    found = Page(written.page.read_text(encoding="utf-8"))
    assert written.pictures == ()
    assert "No law could be fitted" in found.text
    assert "needs more rows than that, 3 can be fitted" in found.text
    assert found.row(ladder_rows()[0]["run"])[1] == "done"


def test_a_table_without_losses_is_refused_before_anything_is_written(tmp_path):
    table = write_table(tmp_path / "t.csv", [{"n_params": 1e8, "n_tokens": 1e9}])
    with pytest.raises(DataError, match="no column loss"):
        report(table)
    assert not (tmp_path / "t-report").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("figures", "figures_fit", "plots"):
        monkeypatch.delitem(sys.modules, f"maxlm.scaling.{name}", raising=False)
        monkeypatch.delattr(maxlm.scaling, name, raising=False)
    with pytest.raises(MaxlmError, match=r"pip install 'maxlm\[sweep\]'"):
        report(tmp_path / "t.csv")


def test_untrusted_fits_are_not_called_good(tmp_path):
    """All runs at one size: the law's A and alpha mean nothing, and the page's first words say so."""
    rows = [
        {**row, "n_params": 1e8, "flops": 6e8 * row["n_tokens"], "loss": 1.8 + 2000 / row["n_tokens"] ** 0.36}
        for row in ladder_rows()
        if row["status"] == "done"
    ]
    study = make_study(write_table(tmp_path / "one-size.csv", rows), FitOptions(resamples=0))
    html = page(study, dict.fromkeys(SECTIONS, "<p>drawn</p>"))
    assert "<p class='verdict bad'>Do not trust this fit" in html
    assert "all runs have one size" in Page(html).text


def test_published_exponents_are_those_that_their_constants_imply():
    """a = beta / (alpha + beta): 0.4566 of Hoffmann et al.'s unrounded constants, so within 0.01 of rounded ones."""
    for each in PARAMETRIC:
        alpha, beta = each.parameters["alpha"], each.parameters["beta"]
        assert each.a == pytest.approx(beta / (alpha + beta), abs=0.01)
    assert all(each.a + each.b == pytest.approx(1.0) for each in PUBLISHED)


def test_published_laws_give_the_sizes_that_their_papers_state():
    # arXiv:2203.15556, table A3: approach 3 puts 5.76e23 FLOPs, Gopher's budget, on about 40 billion parameters.
    assert HOFFMANN[2].size(5.76e23) == pytest.approx(40e9, rel=0.25)
    # arXiv:2404.10102 finds the policy of 20 tokens a parameter, which Chinchilla's 70 billion followed.
    assert REFIT.size(5.76e23) == pytest.approx(70e9, rel=0.1)
    # arXiv:2001.08361, figure 14: 1.3e9 parameters at one PF-day.
    assert KAPLAN.size(8.64e19) == pytest.approx(1.3e9)
    assert HOFFMANN[0].size(1e20) is None


def test_the_comparison_holds_every_paper_and_every_fit(written, html):
    found = Page(html)
    for each in PUBLISHED:
        assert found.row(each.name)[1:3] == [f"{each.a:g}", f"{each.b:g}"]
    a, _ = exponents(written.study.fits["chinchilla"])
    assert found.row("here, approach 3")[1] == f"{a.value:.3f} ({a.low:.3f} to {a.high:.3f})"
    assert found.row("Kaplan et al. 2020, table 2")[1:] == ["6.4e13", "1.8e13", "0.076", "0.103"]


def test_a_run_that_is_an_outlier_is_ringed_and_said(tmp_path):
    rows = [row for row in ladder_rows() if row["status"] == "done"]
    rows[4]["loss"] *= 1.06
    study = make_study(write_table(tmp_path / "t.csv", rows), FitOptions(resamples=0))
    odd = next(row for row in study.rows if row.name == rows[4]["run"])
    assert "outliers" in odd.reason
    assert odd.used
    first, *_ = drawn(study, figures_fit.residuals)
    rings = [line for line in first.lines if line.get_markerfacecolor() == "none" and line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in rings] == [[odd.n_params]]


def test_a_law_without_an_optimum_is_drawn_without_a_frontier(written):
    """B = 0: more data never helps, and no split is best. The page must say that rather than stop."""
    result = written.study.fits["chinchilla"]
    none = dataclasses.replace(result.parameters["B"], value=0.0)
    broken = dataclasses.replace(
        result, parameters={**result.parameters, "B": none}, samples=result.samples[:0],
        optimum=tuple(
            dataclasses.replace(point, n_params=dataclasses.replace(point.n_params, value=float("nan")))
            for point in result.optimum
        ),
    )  # fmt: skip
    study = dataclasses.replace(written.study, fits={**written.study.fits, "chinchilla": broken})
    assert "the law has no best size" in the_next_model(study)
    assert len(drawn(study, figures.frontier)) == 2
    assert len(drawn(study, figures.contours)) == 2


def test_exponents_are_the_slopes_of_the_frontier_that_is_drawn(written):
    flops = np.array([1e18, 1e21])
    for result in written.study.fits.values():
        for exponent, logs in zip(exponents(result), path(result, flops), strict=True):
            slopes = (logs[:, 1] - logs[:, 0]) / np.log(flops[1] / flops[0])
            assert slopes[0] == pytest.approx(exponent.value)
            assert np.nanquantile(slopes[1:], [0.025, 0.975]) == pytest.approx([exponent.low, exponent.high], abs=1e-9)


def test_runs_without_a_result_yet_are_listed_and_not_called_failures(tmp_path):
    rows = ladder_rows()
    rows[3] |= {"status": "waiting", "loss": None}
    rows[12] |= {"status": "running", "loss": None}
    study = make_study(write_table(tmp_path / "t.csv", rows), FitOptions(resamples=0))
    found = Page(page(study, dict.fromkeys(SECTIONS, "<p>drawn</p>")))
    assert "23 runs, of which 19 are fitted; 1 failed and 1 diverged" in found.text
    assert "1 waiting and 1 running, with no result yet" in found.text
    assert found.row(rows[3]["run"])[-1] != ""
    (axes,) = drawn(study, figures.isoflop)
    crosses = points(axes, "X")
    assert sorted(crosses[:, 0]) == sorted([rows[7]["n_params"], rows[17]["n_params"]])
