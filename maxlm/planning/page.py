"""The page of a plan: whether it fits, how long it takes and why, on one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from maxlm.evaluation.report import count, number
from maxlm.files import write_atomically
from maxlm.planning import figures, tables
from maxlm.planning.bars import Bar, Segment, bars
from maxlm.planning.figures import MEMORY_KINDS, Grid, Plan, at, between, entries, resource_name, size, step_range, time
from maxlm.planning.page_style import STYLE

COMPUTATION = (("compute", "compute"), ("kernels", "kernel"))
TOO_SHORT = 0.004
"""A resource that takes less than this share of the longest bar is not drawn; the table has it."""


def write_page(plan: Plan, path: str | Path) -> None:
    """Writes a plan, the dict that `maxlm.plan.make_plan` gives, as a page: no network, no script, no library.

    Raises StorageError where it cannot be written.
    """
    write_atomically(Path(path), page(plan))


def page(plan: Plan) -> str:
    """The HTML of a plan. Any field of it may be null; what is not known is a dash or left out."""
    name, where = figures.title(plan)
    sections = [
        _header(plan, name, where),
        _tiles(plan),
        _notes(plan),
        _relief(plan),
        _memory(plan),
        _step(plan),
        _parts(plan),
        _cycles(plan),
        _collectives(plan),
        _buffers(plan),
        _facts(plan),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)} · maxlm plan</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(plan: Plan, name: str, where: str) -> str:
    fits, sentence = figures.verdict(plan)
    facts = [where, f"mesh {figures.mesh_text(at(plan, 'mesh'))}" if at(plan, "mesh") else ""]
    remat = figures.remat_text(plan)
    facts.append(f"remat {remat}" if remat else "")
    joined = " <i>·</i> ".join(escape(fact) for fact in facts if fact)
    kind = {True: " good", False: " bad", None: ""}[fits]
    return (
        f"<header><p class='brand'>maxlm plan</p><h1>{escape(name)}</h1><p class='facts'>{joined}</p>"
        f"<p class='verdict{kind}'>{escape(sentence)}</p></header>"
    )


def _tiles(plan: Plan) -> str:
    prediction = at(plan, "prediction") or {}
    budget = at(plan, "model", "token_budget")
    bound = resource_name(plan, prediction.get("bound"))
    tiles = [
        ("step time", step_range(prediction.get("step_seconds")), f"bound by {bound}" if bound else ""),
        ("tokens a second", between(prediction.get("tokens_per_second"), count), "all devices"),
        ("MFU", between(prediction.get("mfu"), lambda value: figures.share(value, 1)), "of the peak"),
        ("time", between(prediction.get("days"), _days), f"for {count(budget)} tokens" if number(budget) else ""),
        ("chip-hours", between(prediction.get("chip_hours"), count), "for all of it"),
        ("memory", size(figures.required(plan)), f"of {size(figures.capacity(plan))} a device"),
    ]
    cells = "".join(
        f"<div class='tile'><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>"


def _days(value: Any) -> str:
    """Years, days, hours or minutes, in few letters."""
    found = number(value) or 0.0
    if found >= 1000:
        return f"{found / 365.25:,.1f} years"
    if found >= 2:
        return f"{found:,.0f} days" if found >= 100 else f"{found:.1f} days"
    return f"{found * 24:.1f} h" if found >= 2 / 24 else f"{found * 1440:.1f} min"


def _notes(plan: Plan) -> str:
    lines = [("warning", f"Warning: {text}") for text in figures.warnings(plan)]
    lines += [("origin", text) for text in figures.origins(plan)]
    return "".join(f"<p class='note {kind}'>{escape(text)}</p>" for kind, text in lines)


def _card(title: str, small: str, *parts: str) -> str:
    body = "".join(part for part in parts if part)
    note = f" <small>{escape(small)}</small>" if small else ""
    return f"<section class='card'><h2>{escape(title)}{note}</h2>{body}</section>" if body else ""


def _table(grid: Grid, *, narrow: bool = False) -> str:
    """A table with its note below it; the first column heads the rows. Columns of prose may break lines."""
    if not grid.rows:
        return ""
    head = "".join(
        f"<th scope='col' class='{align}'>{escape(name)}</th>"
        for name, align in zip(grid.columns, grid.align, strict=True)
    )
    body = []
    for i, row in enumerate(grid.rows):
        cells = []
        for j, (cell, align, column) in enumerate(zip(row, grid.align, grid.columns, strict=True)):
            wraps = " wraps" if column in ("by", "overrides", "to free memory") else ""
            tag, scope = ("th", " scope='row'") if j == 0 else ("td", "")
            cells.append(f"<{tag}{scope} class='{align}{wraps}'>{escape(cell)}</{tag}>")
        total = " class='total'" if i >= len(grid.rows) - grid.n_totals else ""
        body.append(f"<tr{total}>{''.join(cells)}</tr>")
    note = f"<p>{escape(grid.note)}</p>" if grid.note else ""
    return (
        f"<div class='scroll'><table class='figures{' narrow' if narrow else ''}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _keys(names: list[tuple[str, str]]) -> str:
    return (
        "<p class='keys'>" + "".join(f"<span class='{color}'>{escape(name)}</span>" for name, color in names) + "</p>"
    )


def _memory(plan: Plan) -> str:
    """The stacks of the compiler and of the roofline against what a device has."""
    grid = tables.memory(plan)
    ran_out = {} if at(plan, "compiled") else at(plan, "out_of_memory") or {}
    rows = [
        _stack("compiler", at(plan, "compiled", "memory_by_kind"), at(plan, "compiled", "memory", "required")),
        _stack("compiler, ran out", ran_out.get("memory_by_kind"), ran_out.get("used")),
        _stack("roofline", at(plan, "analytic", "memory"), at(plan, "analytic", "memory", "total")),
    ]
    drawn = [row for row in rows if row is not None]
    if not drawn:
        return ""
    keys = [(kind, kind) for kind in MEMORY_KINDS]
    if any(segment.color == "rest" for row in drawn for segment in row.segments):
        keys.append(("of no kind", "rest"))
    return _card("Memory", "a device", _keys(keys), _against(plan, drawn, "Memory a device"), _table(grid, narrow=True))


def _stack(label: str, kinds: Any, total: Any) -> Bar | None:
    known = [(kind, number(at(kinds, kind))) for kind in MEMORY_KINDS]
    segments = [Segment(kind, value, kind, size(value)) for kind, value in known if value]
    found = number(total)
    rest = 0.0 if found is None else found - sum(segment.value for segment in segments)
    if rest > 0:
        segments.append(Segment("of no kind" if segments else "used", rest, "rest", size(rest)))
    words = size(sum(segment.value for segment in segments) if found is None else found)
    return Bar(label, segments, words) if segments else None


def _against(plan: Plan, rows: list[Bar], title: str) -> str:
    """Bars of bytes, and what a device has as their limit."""
    have = figures.capacity(plan)
    listed = "; ".join(f"{row.label} {row.words}" for row in rows)
    svg = bars(
        rows,
        title=f"{title}: {listed}; a device has {size(have)}",
        unit=figures.unit_of([*(row.total for row in rows), have]),
        limit=have,
        limit_words=f"a device has {size(have)}",
    )
    return f"<div class='scroll'>{svg}</div>"


def _relief(plan: Plan) -> str:
    """What each change would leave, in the order tried, against what a device has."""
    found = entries(plan, "out_of_memory", "relief")
    if not found:
        return ""
    rows = [_one("as it is", figures.required(plan) or 0.0, "rest", size)]
    for i, each in enumerate(found, 1):
        color = "ici" if each.get("fits") is True else "hbm"
        rows.append(_one(f"{i}. {each.get('label') or ''}", number(each.get("required_bytes")) or 0.0, color, size))
    keys, svg = _keys([("fits", "ici"), ("too large", "hbm")]), _against(plan, rows, "What each change needs")
    return _card("What would free memory", "in the order tried", keys, svg, _table(tables.relief(plan)))


def _one(label: str, value: float, color: str, shown: Any, name: str = "", *, thin: bool = False) -> Bar:
    """A bar of one segment."""
    return Bar(label, [Segment(name or label, value, color, shown(value))], shown(value), thin)


def _step(plan: Plan) -> str:
    """What a step is made of, and how long it is with all communication hidden, and with none."""
    prediction = at(plan, "prediction") or {}
    within = at(prediction, "communication_seconds")
    made_of = {
        "computation": [(name, name, prediction.get(f"{key}_seconds")) for name, key in COMPUTATION],
        "communication": [(resource_name(plan, name.upper()), name, at(within, name)) for name in ("ici", "dcn")],
    }
    rows = []
    for label, pieces in made_of.items():
        segments = [Segment(name, value, color, time(value)) for name, color, raw in pieces if (value := number(raw))]
        if segments:
            rows.append(Bar(label, segments, time(sum(segment.value for segment in segments))))
    ranges = {"predicted step": prediction.get("step_seconds")}
    if prediction.get("basis") != "roofline":
        ranges["roofline's step"] = at(plan, "analytic", "step_seconds")
    for label, values in ranges.items():
        if isinstance(values, list | tuple) and len(values) == 2 and None not in map(number, values):
            best, worst = sorted(values)
            more = Segment("up to no overlap", worst - best, "maybe", time(worst))
            rows.append(Bar(label, [Segment("full overlap", best, "rest", time(best)), more], step_range(values)))
    if not rows:
        return ""
    keys = list({segment.color: (segment.name, segment.color) for row in rows for segment in row.segments}.values())
    svg = _seconds(rows, f"Step time: {'; '.join(f'{row.label} {row.words}' for row in rows)}")
    return _card("Step time", "", _keys(keys), svg, _table(figures.speed(plan), narrow=True))


def _seconds(rows: list[Bar], title: str) -> str:
    longest = max((row.total for row in rows), default=0.0)
    unit = (1.0, "s") if longest >= 1 else (1e-3, "ms") if longest >= 1e-3 else (1e-6, "µs")
    return f"<div class='scroll'>{bars(rows, title=title, unit=unit)}</div>"


def _parts(plan: Plan) -> str:
    """The roofline by part: how long each resource would take alone. The longest bar of a part bounds it."""
    found = entries(plan, "analytic", "parts")
    longest = max((number(each.get(key)) or 0.0 for each in found for _, key in tables.PART_SECONDS), default=0.0)
    rows: list[Bar] = []
    for each in found:
        label = str(each.get("name") or "")
        for resource, key in tables.PART_SECONDS:
            value = number(each.get(key))
            if value and value >= TOO_SHORT * longest:
                rows.append(_one(label, value, resource.lower(), time, resource_name(plan, resource), thin=True))
                label = ""
        if label:
            rows.append(Bar(label, [], f"under {TOO_SHORT:.1%} of the longest", thin=True))
    if not rows:
        return ""
    used = {segment.color for row in rows for segment in row.segments}
    keys = [(resource_name(plan, name), name.lower()) for name, _ in tables.PART_SECONDS if name.lower() in used]
    svg = _seconds(rows, "Roofline time of each part by resource; the table below has the figures")
    small = "each resource as if alone; the longest bounds the part"
    return _card("Roofline by part", small, _keys(keys), svg, _table(tables.parts(plan)))


def _cycles(plan: Plan) -> str:
    """The compiler's cycles as time, and the kernels' estimates."""
    grid = tables.cycles(plan)
    if not grid.rows:
        return ""
    total, seconds = (number(at(plan, "compiled", "cycles", name)) for name in ("total", "seconds"))
    by_part = at(plan, "compiled", "cycles", "by_part") or {}
    spent = {name: (number(n) or 0.0) / total * seconds for name, n in by_part.items()} if total and seconds else {}
    rows = [_one(name, value, "compute", time) for name, value in sorted(spent.items(), key=lambda item: -item[1])]
    estimate = number(at(plan, "prediction", "kernel_seconds"))
    rows += [_one("kernels", estimate, "kernels", time)] if estimate and rows else []
    svg = _seconds(rows, "The compiler's cycles as time by part; the table below has the figures") if rows else ""
    keys = _keys([("by cycles", "compute"), ("kernels, estimated", "kernels")])
    return _card("Compiler's cycles by part", "loops times their trip counts", keys, svg, _table(grid))


def _collectives(plan: Plan) -> str:
    grid, every = tables.collectives(plan, 40), tables.every_collective(plan)
    if not grid.rows:
        return ""
    details = f"<details><summary>Every collective</summary>{_table(every)}</details>"
    return _card("Collectives", "of a step, a device", _table(grid)) + details


def _buffers(plan: Plan) -> str:
    grid = tables.buffers(plan)
    return _card(grid.title, "with the source line that made them", _table(grid))


def _facts(plan: Plan) -> str:
    rows = [*figures.facts(plan), *tables.options(plan)]
    cells = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return _card("What was planned, and with what", "", f"<div class='scroll'><table>{cells}</table></div>")
