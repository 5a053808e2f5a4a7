"""The tables of the report: parameters, published laws beside ours, every run, and how it was fitted."""

from __future__ import annotations

import math
from html import escape

from maxlm.evaluation.report import count
from maxlm.scaling.captions import exponent, flops_text, loss_text, ratio, short
from maxlm.scaling.published import KAPLAN, KAPLAN_ND, PARAMETRIC, PUBLISHED
from maxlm.scaling.result import Estimate
from maxlm.scaling.show import convergence
from maxlm.scaling.study import METHODS, TITLES, Row, Study, exponents


def table(
    header: list[str],
    rows: list[list[str]],
    *,
    wraps: tuple[int, ...] = (),
    marks: list[str] | None = None,
    narrow: bool = False,
) -> str:
    """A table whose first column heads its rows; columns of `wraps` are prose, and `marks` are classes of rows."""

    def align(at: int) -> str:
        return "l wraps" if at in wraps else "l" if at == 0 else "r"

    head = "".join(f"<th scope='col' class='{align(at)}'>{escape(name)}</th>" for at, name in enumerate(header))
    body = []
    for n, row in enumerate(rows):
        cells = "".join(
            f"<th scope='row' class='{align(at)}'>{escape(cell)}</th>" if at == 0
            else f"<td class='{align(at)}'>{escape(cell)}</td>"
            for at, cell in enumerate(row)
        )  # fmt: skip
        mark = f" class='{marks[n]}'" if marks and marks[n] else ""
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f"<div class='scroll'><table class='figures{' narrow' if narrow else ''}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def parameters(study: Study) -> str:
    """The main fit's parameters at full length, and the optima asked for."""
    assert study.main is not None
    rows = [
        [name, f"{each.value:.6g}", _number(each.low), _number(each.high)]
        for name, each in study.main.parameters.items()
    ]
    points = [
        [
            flops_text(point.flops), short(point.n_params), short(point.n_tokens),
            ratio(point.n_tokens.value / point.n_params.value), short(point.loss, loss_text) if point.loss else "–",
        ]
        for point in study.main.optimum
    ]  # fmt: skip
    return (
        f"<p class='law'>{escape(study.main.equation)}</p>"
        + table(["parameter", "value", "95% from", "to"], rows, narrow=True)
        + "<h3>The best size and tokens for a budget</h3>"
        + table(["FLOPs", "N*", "D*", "D* / N*", "loss"], points)
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "–"


def comparison(study: Study) -> str:
    """Every fit here above what the papers found, and what each would train with the largest budget asked."""
    flops = study.next_flops
    rows = []
    for law, result in study.fits.items():
        a, b = exponents(result)
        size = next((each.n_params.value for each in result.optimum if each.flops == flops), math.nan)
        rows.append(
            [f"here, {TITLES[law]}", short(a, exponent), short(b, exponent), *_choice(size, flops), METHODS[law]]
        )
    ours = len(rows)
    for each in PUBLISHED:
        size = each.size(flops) if math.isfinite(flops) else None
        told = f"{each.paper}; {each.note}"
        rows.append([each.name, f"{each.a:g}", f"{each.b:g}", *_choice(size or math.nan, flops), told])
    budget = f" N* is for {flops_text(flops)} FLOPs." if math.isfinite(flops) else ""
    header = ["", "a of N* ~ C^a", "b of D* ~ C^b", "N*", "D* / N*", "what it is"]
    note = (
        f"<p>How a budget would be split, here and by the papers.{budget} A dash: the paper does not say. D* is taken "
        "to be C / 6N. Brackets hold 95% intervals. Published exponents come from other text, tokenizers and larger "
        "budgets.</p>"
    )
    marks = ["ours"] * ours + [""] * len(PUBLISHED)
    return note + table(header, rows, wraps=(5,), marks=marks) + _constants(study)


def _constants(study: Study) -> str:
    """The constants of the two parametric laws, ours above the papers'."""
    parts = []
    for law, published in (
        ("chinchilla", [(each.name, each.parameters) for each in PARAMETRIC]),
        ("kaplan-nd", [(f"{KAPLAN.name}, table 2", KAPLAN_ND)]),
    ):
        result = study.fits.get(law)
        if result is None:
            continue
        names = list(result.parameters)
        # Ours of the first law have their intervals in the table of parameters.
        show = _value if law == "chinchilla" else _with_interval
        ours = ["here", *(show(result.parameters[name]) for name in names)]
        theirs = [[name, *(f"{values[each]:g}".replace("e+", "e") for each in names)] for name, values in published]
        title = "The constants of the law" if law == "chinchilla" else "The constants of Kaplan's law"
        parts.append(f"<h3>{title}</h3><p class='law'>{escape(result.equation)}</p>")
        parts.append(table(["", *names], [ours, *theirs], marks=["ours", *("" for _ in theirs)]))
    note = "<p>Exponents can be compared between papers; the other constants belong to one text and one tokenizer.</p>"
    return "".join([*parts, note]) if parts else ""


def _value(estimate: Estimate) -> str:
    return ratio(estimate.value)


def _with_interval(estimate: Estimate) -> str:
    return short(estimate, ratio)


def _choice(size: float, flops: float) -> list[str]:
    return [count(size), ratio(flops / (6 * size**2))] if math.isfinite(size) and size > 0 else ["–", "–"]


def runs(study: Study) -> str:
    """Every run of the table, in its order, with those left out marked and the reason said."""
    rows = [
        [
            row.name, row.status, count(_known(row.n_params)), count(_known(row.n_tokens)),
            flops_text(row.flops) if math.isfinite(row.flops) else "–",
            loss_text(row.loss), loss_text(row.predicted or math.nan),
            f"{row.residual:+.2%}" if row.residual is not None else "–", _remark(row),
        ]
        for row in study.rows
    ]  # fmt: skip
    header = ["run", "status", "N", "D", "FLOPs", "loss", "the law's", "residual", "remark"]
    note = "<p>Residual: measured over predicted loss, less 1. Red: not fitted. Grey: no result yet.</p>"
    return note + table(header, rows, wraps=(8,), marks=[_mark(row) for row in study.rows])


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _remark(row: Row) -> str:
    return row.reason or ("" if row.used else "no result yet" if row.pending else "not fitted")


def _mark(row: Row) -> str:
    return "" if row.used else "pending" if row.pending else "out"


def method(study: Study) -> str:
    """Loss, starts, convergence and bootstrap of each fit; nothing hidden."""
    rows = []
    for law, result in study.fits.items():
        loss = f"Huber, delta {result.delta:g}" if result.loss == "huber" else result.loss
        drawn = f"{len(result.samples):,} ({result.resample})" if len(result.samples) else "none"
        rows.append(
            [
                TITLES[law], f"{len(result.rows)} of {result.rows_in_table}", loss, convergence(result), drawn,
                f"{result.residual_scale:.3%}", result.source,
            ]
        )  # fmt: skip
    header = ["fit", "rows", "loss of residuals", "minimum", "bootstrap", "σ", "source"]
    seed = f"<p>Seed of the bootstrap: {study.options.seed}. The same table gives the same page.</p>"
    return table(header, rows, wraps=(3, 6)) + seed
