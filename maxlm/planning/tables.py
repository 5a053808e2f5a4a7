"""The tables of a plan and of a search, as text, for the console and the page."""

from __future__ import annotations

from typing import Any

from maxlm.planning.figures import (
    MEMORY_KINDS,
    NOTHING,
    Grid,
    Plan,
    at,
    between,
    capacity,
    entries,
    flops,
    is_gpu,
    joined,
    mesh_text,
    moved,
    network_name,
    number,
    required,
    resource_name,
    scaled,
    seconds_unit,
    select,
    share,
    size,
    step_range,
    strings,
    time,
    two,
    unit_of,
    whole,
)


def memory(plan: Plan) -> Grid:
    """What a device holds by kind: the roofline's figures beside the compiler's."""
    guess = at(plan, "analytic", "memory") or {}
    kinds = at(plan, "compiled", "memory_by_kind") or at(plan, "out_of_memory", "memory_by_kind") or {}
    ran_out = number(at(plan, "out_of_memory", "used"))
    total = number(at(plan, "compiled", "memory", "required")) if ran_out is None else ran_out
    have, margin = capacity(plan), number(at(plan, "margin_bytes"))
    unit, name = unit_of([guess.get("total"), total, have])
    names = [*MEMORY_KINDS, *(kind for kind in kinds if kind not in MEMORY_KINDS)]
    rows = [
        (kind, scaled(guess.get(kind), unit), scaled(kinds.get(kind), unit))
        for kind in names
        if kind in kinds or number(guess.get(kind)) is not None
    ]
    other = None if total is None or not kinds else total - sum(number(n) or 0 for n in kinds.values())
    if other is not None and abs(other) >= 0.005 * unit:
        rows.append(("of no kind: code, gaps", NOTHING, scaled(other, unit)))
    rows.append(("needed", scaled(guess.get("total"), unit), scaled(total, unit)))
    if have is not None:
        guessed = number(guess.get("total"))
        left, sign = ("over", -1) if (required(plan) or 0) > have else ("to spare", 1)
        by_roofline = None if guessed is None else sign * (have - guessed)
        by_compiler = None if total is None else sign * (have - total if margin is None else margin)
        rows.append(("of", scaled(have, unit), NOTHING if total is None else scaled(have, unit)))
        rows.append((left, scaled(by_roofline, unit), scaled(by_compiler, unit)))
    columns = (f"memory a device, {name}", "roofline", "compiler")
    grid = Grid("Memory", columns, "lrr", rows, _memory_note(plan), n_totals=3 if have is not None else 1)
    return grid.without("compiler") if total is None else grid


def _memory_note(plan: Plan) -> str:
    compiled = at(plan, "compiled", "memory") or {}
    names = {"argument": "arguments", "heap": "temporaries", "output": "output", "alias": "aliased", "code": "code"}
    parts = [f"{size(compiled[key])} {word}" for key, word in names.items() if number(compiled.get(key)) is not None]
    parts += [f"{size(compiled['host_temp'])} on the host"] if number(compiled.get("host_temp")) else []
    guess, found = number(at(plan, "analytic", "memory", "total")), required(plan)
    measured = at(plan, "compiled") is not None or at(plan, "out_of_memory") is not None
    off = ""
    if measured and guess and found:
        way = "above" if guess > found else "below"
        off = f"The roofline's total is {100 * abs(guess / found - 1):.1f}% {way} the compiler's."
    return " ".join([f"Compiler: {', '.join(parts)}." if parts else "", off]).strip()


def buffers(plan: Plan) -> Grid:
    """The ten largest buffers, with the source line that made them; those of the error where the compiler ran out.

    Those alike in everything are one row.
    """
    ran_out = at(plan, "out_of_memory") is not None
    found = entries(plan, "out_of_memory", "buffers") if ran_out else entries(plan, "compiled", "largest_buffers")
    alike: dict[tuple[str, ...], int] = {}
    for each in found[:10]:
        words = (str(each.get(name) or NOTHING) for name in ("kind", "shape", "source"))
        row = (size(each.get("bytes")), *words, operation(each.get("what")))
        alike[row] = alike.get(row, 0) + 1
    rows = [(f"{n} × {row[0]}" if n > 1 else row[0], *row[1:]) for row, n in alike.items()]
    title = "Largest buffers" + (" when memory ran out" if ran_out else " at the peak")
    return Grid(title, ("size", "kind", "shape", "made at", "by"), "rllll", rows, gives_way="by")


def operation(what: Any) -> str:
    """What an operation is, from the name that JAX gave it: "backward: dot_general"; other names as they are."""
    text = str(what or "")
    names = [name for name in text.split("/") if name and name != "pallas_call"]
    if len(names) < 2:
        return text or NOTHING
    passes = (("rematted_computation", "recomputed: "), ("transpose(", "backward: "), ("jvp(", "forward: "))
    return next((words for mark, words in passes if mark in text), "") + names[-1]


def collectives(plan: Plan, most: int = 12) -> Grid:
    """The collectives of a step. Those of one kind, along the same axes, in a loop or not, hidden or not, are a row."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    found = entries(plan, "compiled", "collectives")
    for each in found:
        key = (
            str(each.get("kind") or NOTHING),
            joined(each.get("axes")),
            each.get("network"),
            each.get("in_loop"),
            each.get("overlapped"),
        )
        alike.setdefault(key, []).append(each)
    sums = [
        (key, _sum(group, "times"), _sum(group, "bytes_per_step"), _sum(group, "seconds"))
        for key, group in alike.items()
    ]
    sums.sort(key=lambda row: (-(row[2] or 0), -(row[3] or 0), row[0][:2]))
    unit, name, decimals = seconds_unit(row[3] for row in sums)
    shown, rest = select(sums, most)
    rows = [
        (kind, axes, network_name(plan, network), _yes(in_loop), _yes(hidden), whole(times), moved(n_bytes),
         scaled(seconds, unit, decimals))
        for (kind, axes, network, in_loop, hidden), times, n_bytes, seconds in shown
    ]  # fmt: skip
    if rest:
        totals = [sum(row[i] or 0 for row in rest) for i in (1, 2, 3)]
        more = (f"{len(rest)} more", "", "", "", "", whole(totals[0]), moved(totals[1]))
        rows.append((*more, scaled(totals[2], unit, decimals)))
    if len(sums) > 1:
        n_times, n_bytes, seconds = (_sum(found, key) for key in ("times", "bytes_per_step", "seconds"))
        rows.append(("all", "", "", "", "", whole(n_times), moved(n_bytes), scaled(seconds, unit, decimals)))
    columns = ("collective", "axes", "network", "in loop", "overlapped", "times", "bytes a step", name)
    return Grid(
        "Collectives of a step, a device", columns, "lllllrrr", rows, _overlap(found), n_totals=int(len(sums) > 1)
    )


def _overlap(found: list[dict[str, Any]]) -> str:
    total = _sum(found, "seconds")
    hidden = _sum([each for each in found if each.get("overlapped")], "seconds") or 0
    return f"{share(hidden, total)} of the seconds lie behind computation in the schedule." if total else ""


def _sum(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [value for value in (number(row.get(name)) for row in rows) if value is not None]
    return sum(values) if values else None


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, NOTHING) if isinstance(value, bool) else NOTHING


def every_collective(plan: Plan, most: int = 60) -> Grid:
    """One row an instruction, the most bytes a step first."""
    found = entries(plan, "compiled", "collectives")
    found = sorted(found, key=lambda each: -(number(each.get("bytes_per_step")) or 0))
    rows = [
        (
            str(each.get("kind") or NOTHING),
            joined(each.get("axes")),
            str(each.get("part") or NOTHING),
            _yes(each.get("in_loop")),
            _yes(each.get("overlapped")),
            moved(each.get("bytes")),
            whole(each.get("times")),
            moved(each.get("bytes_per_step")),
            time(each.get("seconds")),
            str(each.get("source") or NOTHING),
        )
        for each in found[:most]
    ]
    note = f"The {most} largest of {len(found):,}." if len(found) > most else ""
    columns = ("collective", "axes", "part", "in loop", "overlapped", "bytes", "times", "a step", "time", "made at")
    return Grid("Every collective", columns, "lllllrrrrl", rows, note)


def cycles(plan: Plan) -> Grid:
    """The compiler's cycles by part of the step, and the kernels, which carry none."""
    found = at(plan, "compiled", "cycles") or {}
    total, seconds = number(found.get("total")), number(found.get("seconds"))
    estimate = number(at(plan, "prediction", "kernel_seconds")) if total is not None else None
    unit, name, decimals = seconds_unit([seconds, estimate])

    def row(part: str, value: Any) -> tuple[str, ...]:
        spent = number(value)
        takes = None if spent is None or not total or seconds is None else spent / total * seconds
        return part, scaled(value, 1e6, 1), share(spent, total), scaled(takes, unit, decimals)

    by_part = at(found, "by_part") or {}
    rows = [row(part, value) for part, value in sorted(by_part.items(), key=lambda item: -(number(item[1]) or 0))]
    if estimate:
        rows.append(("kernels, estimated", NOTHING, NOTHING, scaled(estimate, unit, decimals)))
    if total is not None:
        everything = (seconds or 0) + (estimate or 0) or None
        rows.append(("all", scaled(total, 1e6, 1), share(total, total), scaled(everything, unit, decimals)))
    columns = ("part of the step", "Mcycles", "share", name)
    return Grid("Compiler's cycles", columns, "lrrr", rows, _cycles_note(plan), int(total is not None))


def _cycles_note(plan: Plan) -> str:
    """How much is in loops, which kernels there are, and what is not known."""
    if at(plan, "compiled") is None:
        return ""
    found = at(plan, "compiled", "cycles") or {}
    lines = []
    if number(found.get("total")) is None:
        lines.append(
            "This compiler estimates no cycles: times are the roofline's." if is_gpu(plan) else "No cycles were found."
        )
    elif number(found.get("in_loops")) is not None:
        lines.append(f"{share(found['in_loops'], found['total'])} of the cycles are in loops.")
    times: dict[str, float] = {}
    for kernel in entries(plan, "compiled", "kernels"):
        name = str(kernel.get("name") or "unnamed")
        times[name] = times.get(name, 0) + (number(kernel.get("times")) or 0)
    if times:
        lines.append(f"Kernels: {', '.join(f'{name} × {whole(n)}' for name, n in times.items())}.")
    return " ".join(lines)


PART_SECONDS = (("compute", "compute_seconds"), ("HBM", "hbm_seconds"), ("ICI", "ici_seconds"), ("DCN", "dcn_seconds"))


def parts(plan: Plan) -> Grid:
    """The roofline by part: the time of each resource if it were alone, and which one is the longest."""
    found = entries(plan, "analytic", "parts")
    unit, name, decimals = seconds_unit(each.get(key) for each in found for _, key in PART_SECONDS)
    rows = [
        (
            str(each.get("name") or NOTHING),
            flops(each.get("flops")),
            *(scaled(each.get(key), unit, decimals) for _, key in PART_SECONDS),
            resource_name(plan, each.get("bound")) or NOTHING,
        )
        for each in found
    ]
    sums = [_sum(found, key) for key in ("flops", *(key for _, key in PART_SECONDS))]
    if found:
        rows.append(("all", flops(sums[0]), *(scaled(value, unit, decimals) for value in sums[1:]), ""))
    columns = ("roofline, a device", "FLOPs", *(f"{resource_name(plan, r)}, {name}" for r, _ in PART_SECONDS), "bound")
    steps = at(plan, "analytic", "step_seconds")
    note = "The roofline's step: {} with full overlap, {} with none.".format(*two(steps, time)) if steps else ""
    grid = Grid("Roofline", columns, "lrrrrrl", rows, note, n_totals=int(bool(found)))
    return grid.without(*(columns[i] for i in (4, 5) if sums[i - 1] == 0))


def relief(plan: Plan) -> Grid:
    """What would free memory, in the order in which it was tried."""
    found = entries(plan, "out_of_memory", "relief")
    rows = [
        (
            str(i),
            str(each.get("label") or NOTHING),
            size(each.get("saves_bytes")),
            size(each.get("required_bytes")),
            "fits" if each.get("fits") is True else "too large" if each.get("fits") is False else NOTHING,
            {"compiled": "compiling it", "estimated": "estimate"}.get(str(each.get("how")), NOTHING),
            " ".join(strings(each.get("change"))),
        )
        for i, each in enumerate(found, 1)
    ]
    fitting = [each for each in found if each.get("fits") is True and each.get("change")]
    best = next((each for each in fitting if each.get("how") == "compiled"), fitting[0] if fitting else None)
    note = ""
    if best is not None:
        note = f"Add to the command: {' '.join(strings(best['change']))}"
    elif found:
        note = "Nothing that was tried fits: take more or larger devices, or a smaller model."
    columns = ("tried", "to free memory", "saves", "needs", "", "known by", "overrides")
    return Grid("What would free memory, in the order tried", columns, "rlrrlll", rows, note)


def options(plan: Plan) -> list[tuple[str, str]]:
    """What the figures can be had again with: versions, the program's hash, the compiler's options."""
    compiled = at(plan, "compiled") or {}
    versions = ", ".join(f"{name} {text}" for name, text in (at(plan, "versions") or {}).items() if text)
    maxlm, options, loops = at(plan, "maxlm"), compiled.get("options") or {}, entries(compiled, "loops")
    rows = [
        ("versions", ", ".join(part for part in (f"maxlm {maxlm}" if maxlm else "", versions) if part)),
        ("program", str(compiled.get("program_sha256") or "")),
        ("lowered in", time(compiled.get("lower_seconds")) if compiled.get("lower_seconds") else ""),
        ("compiled in", time(compiled.get("compile_seconds")) if compiled.get("compile_seconds") else ""),
        ("CPU time", time(compiled.get("cpu_seconds")) if compiled.get("cpu_seconds") else ""),
        ("peak of the process", size(compiled.get("peak_rss_bytes")) if compiled.get("peak_rss_bytes") else ""),
        ("loops", ", ".join(f"{operation(loop.get('what'))} × {whole(loop.get('trips'))}" for loop in loops)),
        ("options", " ".join(f"{name}={str(value).lower()}" for name, value in options.items() if value is not None)),
        ("figures from", "; ".join(strings(at(plan, "topology", "sources")))),
    ]
    return [(name, text) for name, text in rows if text]


def ranking(result: dict[str, Any]) -> Grid:
    """A search's plans: those that fit by predicted time, then those that do not, and why."""
    rows = [
        (
            str(each.get("rank") or NOTHING),
            mesh_text(each.get("mesh")) + (f", zero {each['zero']}" if each.get("zero") else ""),
            str(each.get("remat") or NOTHING),
            whole(each.get("accumulation")),
            size(each.get("required_bytes")),
            step_range(each.get("step_seconds")),
            between(each.get("mfu"), lambda value: share(value, 1)),
            str(each.get("bound") or NOTHING),
            step_range(at(each, "roofline", "step_seconds")),
            _outcome(each, result.get("capacity_bytes")),
        )
        for each in entries(result, "ranking")
    ]
    columns = ("", "mesh", "remat", "batches", "memory", "step time", "MFU", "bound", "roofline", "outcome")
    return Grid("Ranking", columns, "rllrrrrlrl", rows, left_out(result))


def _outcome(row: dict[str, Any], have: Any) -> str:
    """One or two words: how its time is known, or by how much it does not fit."""
    need, have = number(row.get("required_bytes")), number(have)
    if row.get("failed"):
        word = "failed"
    elif row.get("fits"):
        word = "fits"
    else:
        word = "does not fit" if need is None or have is None else f"{size(need - have)} over"
    return word + (", as given" if row.get("own") else "")


def failures(result: dict[str, Any]) -> list[str]:
    """Why those plans failed that failed otherwise than by their size."""
    failed = [each for each in entries(result, "ranking") if each.get("failed")]
    return [f"{each.get('label') or mesh_text(each.get('mesh'))}: {each['failed']}" for each in failed]


def left_out(result: dict[str, Any]) -> str:
    """How many candidates were priced, and why most were not planned."""
    reasons = (
        ("too_large", "too large by the roofline"),
        ("slower", "cannot be the fastest"),
        ("refused", "more that the code does not allow"),
    )
    words = [f"{whole(result[key])} {why}" for key, why in reasons if number(result.get(key))]
    text = f"{whole(result.get('considered'))} combinations priced, {whole(result.get('compiled'))} planned"
    return text + (f"; {', '.join(words)}." if words else ".")
