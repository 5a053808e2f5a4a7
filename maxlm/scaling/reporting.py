"""The page of a sweep: what was run, what the law says of the next model, how far to believe it; one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from maxlm.errors import MaxlmError
from maxlm.evaluation.report import count
from maxlm.files import write_atomically
from maxlm.planning.page_style import STYLE as PLAN_STYLE
from maxlm.scaling import captions, report_tables
from maxlm.scaling.result import FitOptions
from maxlm.scaling.study import TITLES, Study, make_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maxlm.scaling.plots import Theme

STYLE = (
    PLAN_STYLE
    + """
.verdict { margin-bottom: 16px; } .card > .terms { margin-top: 8px; }
.summary p { margin: 10px 0; font-size: 15.5px; color: var(--ink); } .summary { padding-bottom: 14px; }
.summary b { display: block; font-size: 13px; font-weight: 600; color: var(--soft); }
h3 { font-size: 13.5px; font-weight: 600; margin: 14px 0 4px; }
figure { margin: 10px 0 0; } figure img { display: block; width: 100%; height: auto; max-width: 900px; margin: 0 auto; }
figure .scroll img { min-width: min(560px, 175vw); }
figcaption p { font-size: 14px; margin: 8px 0; max-width: 78ch; } figcaption p b { font-weight: 600; }
.card > p { max-width: 84ch; }
.warnings { list-style: none; padding: 0; font-size: 14px; }
.warnings li { border-left: 3px solid var(--rule); padding: 2px 10px; margin: 6px 0; overflow-wrap: anywhere; }
.warnings .severe { border-color: var(--bad); } .severe b { color: var(--bad); }
.terms { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: 14px; }
.terms dt { font-weight: 600; } .terms dd { margin: 0; color: var(--soft); }
.out > *, .figures tbody .out th { color: var(--bad); } .pending > *, .figures tbody .pending th { color: var(--soft); }
.law { font: 14px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.ours > * { background: color-mix(in srgb, var(--a) 9%, transparent); }
@media (max-width: 560px) { .terms { grid-template-columns: 1fr; } .terms dd { margin-bottom: 8px; } }
"""
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page, by the name of its file: what draws it, its inches, and its caption."""

    name: str
    title: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[Study, Figure, Theme], None]
    caption: Callable[[Study], list[str]]


@dataclass(frozen=True)
class Report:
    """What was written, and of what."""

    page: Path
    pictures: tuple[Path, ...]
    study: Study


def report(
    source: Path | str,
    out: Path | str | None = None,
    options: FitOptions | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> Report:
    """Fits a table of runs, or a sweep's folder, and writes report.html and its pictures as PNGs into `out`.

    `out` is by default `report` in a sweep's folder, and NAME-report beside a table. The page needs no network and no
    script. Raises DataError where the table cannot be read, MaxlmError where matplotlib is not installed, StorageError
    where nothing can be written.
    """
    pictures_of = _pictures()
    source = Path(source)
    if out is None:
        out = source / "report" if source.is_dir() else source.with_name(f"{source.stem}-report")
    study = make_study(source, options, columns=columns)
    from maxlm.scaling.plots import DARK, LIGHT, render

    drawn, files = {}, []
    for picture in pictures_of(study):
        light, dark = (
            render(lambda figure, theme, draw=picture.draw: draw(study, figure, theme), theme, picture.size)
            for theme in (LIGHT, DARK)
        )
        drawn[picture.name] = _figure(picture, light, dark, picture.caption(study))
        files.append(Path(out) / f"{picture.name}.png")
        write_atomically(files[-1], light)
    path = Path(out) / "report.html"
    write_atomically(path, page(study, drawn))
    return Report(path, tuple(files), study)


def _pictures() -> Callable[[Study], list[Picture]]:
    """What there is to draw of a study. Raises MaxlmError without matplotlib, before any work is done."""
    try:
        from maxlm.scaling import figures, figures_fit
    except ImportError as error:
        raise MaxlmError(
            f"the report's pictures need matplotlib, which is not installed ({error}): pip install 'maxlm[sweep]'"
        ) from error

    def wanted(study: Study) -> list[Picture]:
        every = [
            (bool(study.curves), Picture(
                "loss-curves", "Loss curves", "Training loss of every run over FLOPs", (8, 4.6),
                figures.loss_curves, captions.loss_curves_caption)),
            ("approach2" in study.fits, Picture(
                "isoflop", "The best size of each budget", "Loss over size for each budget, with parabolas", (8, 4.6),
                figures.isoflop, captions.isoflop_caption)),
            (study.main is not None and any(map(study.has_optimum, figures.MARKS)), Picture(
                "frontier", "The frontier: best size and tokens by compute", "N* and D* over FLOPs by three methods",
                (9.4, 4.4), figures.frontier, captions.frontier_caption)),
            (study.main is not None, Picture(
                "contours", "The law's loss over size and tokens", "Contours of loss over parameters and tokens",
                (8, 5.6), figures.contours, captions.contours_caption)),
            (study.main is not None, Picture(
                "parameters", "The law's parameters", "Parameters with their intervals", (8, 4.2),
                figures_fit.parameters, captions.parameters_caption)),
            (study.main is not None, Picture(
                "exponents", "The exponent of the best size", "The exponent a by method and paper", (8, 3.6),
                figures_fit.exponent_chart, captions.exponents_caption)),
            (study.main is not None, Picture(
                "residuals", "Residuals", "Measured over predicted loss of each run", (9.4, 3.6),
                figures_fit.residuals, captions.residuals_caption)),
            (study.main is not None and study.main.backtest is not None, Picture(
                "backtest", "Back-test: the largest runs predicted from the others", "Predicted against measured loss",
                (8, 3.6), figures_fit.backtest, captions.backtest_caption)),
        ]  # fmt: skip
        return [picture for there, picture in every if there]

    return wanted


def _figure(picture: Picture, light: bytes, dark: bytes, caption: list[str]) -> str:
    day, night = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark))
    width, height = (round(150 * inches) for inches in picture.size)
    words = "".join(
        f"<p><b>{title}</b> {escape(text)}</p>"
        for title, text in zip(("What is drawn.", "How to read it.", "Here."), caption, strict=True)
        if text
    )
    return (
        f"<section class='card' id='{picture.name}'><h2>{escape(picture.title)}</h2><figure><div "
        "class='scroll'><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{night}'>"
        f"<img src='{day}' alt='{escape(picture.alt)}' width='{width}' height='{height}'></picture></div>"
        f"<figcaption>{words}</figcaption></figure></section>"
    )


def page(study: Study, drawn: Mapping[str, str]) -> str:
    """The HTML of a study, with its pictures by name."""
    at = drawn.get
    no_curves = _card("Loss curves", f"<p>Left out: {escape(study.no_curves)}.</p>", "loss-curves")
    sections = [
        _header(study),
        _summary(study),
        _tiles(study),
        _warnings(study),
        _terms(),
        at("loss-curves") or no_curves,
        at("isoflop") or _missing(study, "approach2", "The best size of each budget", "isoflop"),
        at("frontier") or _card("The frontier", "<p>Left out: no fit has a best size.</p>", "frontier"),
        at("contours", ""),
        at("parameters", "") + (_card("Parameters in numbers", report_tables.parameters(study)) if study.main else ""),
        at("exponents", ""),
        _card("Beside what was published", report_tables.comparison(study), "comparison"),
        at("residuals", ""),
        at("backtest") or _card("Back-test", "<p>Left out: too few runs to hold the largest out.</p>", "backtest"),
        _card("Every run", report_tables.runs(study), "runs"),
        _card("How it was fitted", report_tables.method(study), "method"),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(study.name)} · maxlm sweep</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _card(title: str, body: str, name: str = "") -> str:
    return f"<section class='card'{f' id={name!r}' if name else ''}><h2>{escape(title)}</h2>{body}</section>"


def _missing(study: Study, law: str, title: str, name: str) -> str:
    return _card(title, f"<p>Left out: {escape(study.refused[law])}.</p>", name)


def _header(study: Study) -> str:
    rows = study.rows
    states: dict[str, int] = {}
    for row in rows:
        states[row.status] = states.get(row.status, 0) + 1
    joined = " <i>·</i> ".join(
        escape(fact) for fact in (captions.plural(len(rows), "run"), *(f"{n} {state}" for state, n in states.items()))
    )
    good = study.main is not None and study.main.trusted
    sentence = study.main.verdict if study.main is not None else "No law could be fitted to this table."
    return (
        f"<header><p class='brand'>maxlm sweep</p><h1>{escape(study.name)}</h1><p class='facts'>{joined}</p>"
        f"<p class='verdict {'good' if good else 'bad'}'>{escape(sentence)}</p></header>"
    )


def _summary(study: Study) -> str:
    parts = [
        ("What was run", captions.what_was_run(study)),
        ("What the law says", captions.what_the_law_says(study)),
        ("The next model", captions.the_next_model(study)),
        ("How far to trust it", captions.trust(study)),
    ]
    body = "".join(f"<p><b>{title}</b>{escape(text)}</p>" for title, text in parts if text)
    return f"<section class='card summary' id='summary'><h2>In short</h2>{body}</section>"


def _tiles(study: Study) -> str:
    if study.main is None or not study.has_optimum("chinchilla"):
        return ""
    point = max(study.main.optimum, key=lambda each: each.flops)
    at = f"for {captions.flops_text(point.flops)} FLOPs"
    loss = point.loss
    test = study.main.backtest
    tiles = [
        ("best size N*", count(point.n_params.value), at),
        ("best tokens D*", count(point.n_tokens.value), at),
        ("tokens a parameter", captions.ratio(point.n_tokens.value / point.n_params.value), at),
        ("loss expected", captions.loss_text(loss.value) if loss else "–", "nats a token"),
        ("back-test", f"{test.mean_error:+.2%}" if test else "–", "mean error, largest runs"),
    ]
    cells = "".join(
        f"<div class='tile'><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>"


def _warnings(study: Study) -> str:
    """Every finding of every fit, under the fit's name; what several fits say of the table is said once."""
    seen: set[str] = set()
    parts = []
    for law, result in study.fits.items():
        found = [each for each in sorted(result.findings, key=lambda each: not each.severe) if each.message not in seen]
        seen |= {each.message for each in found}
        items = "".join(
            f"<li class='severe'><b>Severe.</b> {escape(each.message)}</li>"
            if each.severe
            else f"<li>{escape(each.message)}</li>"
            for each in found
        )
        parts.append(f"<h3>{escape(TITLES[law].capitalize())}: {escape(result.verdict)}</h3>")
        parts.append(f"<ul class='warnings'>{items}</ul>" if items else "")
    for law, reason in study.refused.items():
        parts.append(f"<h3>{escape(TITLES[law].capitalize())} could not be fitted</h3>")
        parts.append(f"<ul class='warnings'><li class='severe'>{escape(reason)}</li></ul>")
    intro = (
        "<p>All that was found wrong with the table and the fits. What is severe is a reason not to trust a fit.</p>"
    )
    return _card("Warnings", intro + "".join(parts), "warnings")


def _terms() -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in captions.TERMS)
    return _card("Terms", f"<dl class='terms'>{items}</dl>", "terms")
