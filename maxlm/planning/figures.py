"""What a plan says, in words and tables of text: read once here, and shown by the console and the page alike.

A plan is the dict of `maxlm.plan.make_plan`. Any field may be null or missing; what is not known is a dash.
Sizes are of a device, in GiB where they lie in memory and in GB (10^9) where they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maxlm.evaluation.report import count, duration, number

Plan = dict[str, Any]

MEMORY_KINDS = ("parameters", "optimizer", "gradients", "activations", "temporaries")
RESOURCES = ("compute", "HBM", "ICI", "DCN")
BASES = {
    "compiler cycles and bytes over links": "the compiler's cycles and bytes over links",
    "roofline": "the roofline",
}
NOTHING = "–"


@dataclass(frozen=True)
class Grid:
    """A table of text.

    `align` has a letter a column, `l` or `r`; the last `n_totals` rows are sums of those above; `gives_way` names the
    column that is cut short where there is no room.
    """

    title: str
    columns: tuple[str, ...]
    align: str
    rows: list[tuple[str, ...]]
    note: str = ""
    n_totals: int = 0
    gives_way: str = ""

    def without(self, *names: str) -> Grid:
        """The table without some of its columns."""
        kept = [i for i, name in enumerate(self.columns) if name not in names]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            align="".join(self.align[i] for i in kept),
            rows=[tuple(row[i] for i in kept) for row in self.rows],
        )


def at(value: Any, *path: str) -> Any:
    """The value under nested keys, or None where one is missing or null."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def entries(value: Any, *path: str) -> list[dict[str, Any]]:
    """A list of dicts under nested keys; empty where there is none."""
    found = at(value, *path) if path else value
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def strings(value: Any) -> list[str]:
    """The items of a list as text, without those that are null."""
    return [str(each) for each in value if each is not None] if isinstance(value, list | tuple) else []


def whole(value: Any) -> str:
    """12,345."""
    finite = number(value)
    return NOTHING if finite is None else f"{round(finite):,}"


def size(n_bytes: Any) -> str:
    """Bytes in memory: 95.00 GiB, 512.0 MiB, 12.0 KiB."""
    finite = number(n_bytes)
    if finite is None:
        return NOTHING
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if abs(finite) >= unit * (0.1 if name == "GiB" else 1):
            return f"{finite / unit:,.{digits}f} {name}"
    return f"{finite:,.0f} B"


def moved(n_bytes: Any) -> str:
    """Bytes that move: 28.97 GB, 4.20 MB, 512 B."""
    finite = number(n_bytes)
    if finite is None:
        return NOTHING
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(finite) >= unit:
            return f"{finite / unit:,.2f} {name}"
    return f"{finite:,.0f} B"


def time(seconds: Any) -> str:
    """3.214 s, 412.0 ms, 35.0 µs."""
    finite = number(seconds)
    if finite is None:
        return NOTHING
    if finite == 0 or abs(finite) >= 1:
        return f"{finite:,.3f} s" if finite else "0 s"
    return f"{finite * 1e3:.1f} ms" if abs(finite) >= 1e-3 else f"{finite * 1e6:.1f} µs"


def two(values: Any, shown: Callable[[Any], str]) -> tuple[str, str]:
    """A prediction's best and worst, or two dashes."""
    best, worst = values if isinstance(values, list | tuple) and len(values) == 2 else (None, None)
    return shown(best), shown(worst)


def between(values: Any, shown: Callable[[Any], str]) -> str:
    """A range, from the smaller: 331k–368k, 58.1–64.5%; the unit once where it is one."""
    if not isinstance(values, list | tuple) or len(values) != 2 or None in map(number, values):
        return NOTHING
    low, high = (shown(value) for value in sorted(values))
    if low == high:
        return low
    unit = high.lstrip("0123456789.,")
    if unit and low.lstrip("0123456789.,") == unit:
        low = low.removesuffix(unit)
    return f"{low}–{high}"


def stages_text(stages: Any) -> str:
    """A plan's stages: how they take turns, their bubble, and both costs of bringing weights together."""
    by_layer, by_step = (number(at(stages, "gathered_bytes", when)) for when in ("layer", "step"))
    padding = number(at(stages, "padding"))
    parts = [
        f"{at(stages, 'stages')} by {at(stages, 'schedule')}",
        f"{at(stages, 'microbatches')} microbatches",
        f"{at(stages, 'ticks')} ticks",
        f"bubble {share(at(stages, 'bubble'), 1.0)}",
        f"{padding:.0f} layers of padding" if padding else "",
        f"weights gathered by {at(stages, 'gather_weights')}" if by_layer or by_step else "",
        f"{size(by_layer)} a step by layer, {size(by_step)} by step" if by_layer or by_step else "",
    ]
    return ", ".join(part for part in parts if part)


def step_range(values: Any) -> str:
    """A range of step times: 0.93–1.71 s, 12.4–15.0 s, 35–412 ms."""
    known = [value for value in map(number, values) if value is not None] if isinstance(values, list | tuple) else []
    longest = max(known, default=0.0)
    unit, name, decimals = (1.0, "s", 1 if longest >= 10 else 2) if longest >= 1 else (1e-3, "ms", 1)
    return between(values, lambda value: f"{value / unit:,.{decimals}f} {name}")


def share(part: Any, total: Any) -> str:
    """12.3%."""
    part, total = number(part), number(total)
    return NOTHING if part is None or not total else f"{100 * part / total:.1f}%"


def flops(value: Any) -> str:
    """843.3 TFLOP, 54.0 PFLOP."""
    finite = number(value)
    if not finite:
        return NOTHING if finite is None else "0"
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if abs(finite) >= unit:
            return f"{finite / unit:,.1f} {name}FLOP"
    return f"{finite / 1e6:,.1f} MFLOP"


def is_gpu(plan: Plan) -> bool:
    """Whether the plan is for GPUs, whose compiler estimates no time."""
    compiler = at(plan, "compiled", "compiler")
    if isinstance(compiler, str):
        return "cuda" in compiler
    return str(at(plan, "topology", "chip")).upper().startswith(("A100", "H100", "H200", "B200"))


def required(plan: Plan) -> float | None:
    """Bytes that a device needs: by the compiler where it compiled or ran out of memory, else by the roofline."""
    for path in (("compiled", "memory", "required"), ("out_of_memory", "used"), ("analytic", "memory", "total")):
        found = number(at(plan, *path))
        if found is not None:
            return found
    return None


def capacity(plan: Plan) -> float | None:
    """Bytes that a device has; those of which the compiler disposes, where it said so when it ran out of them."""
    found = number(at(plan, "out_of_memory", "capacity"))
    return number(at(plan, "topology", "hbm_bytes_per_device")) if found is None else found


def title(plan: Plan) -> tuple[str, str]:
    """What is planned, and where: "llama3-8b on v5p:4x4x4", "v5p-128: 64 chips, 16 hosts, 1 slice"."""
    topology = at(plan, "topology") or {}
    parts = [counted(topology.get("chips"), "chip")]
    if topology.get("devices") != topology.get("chips"):
        parts.append(counted(topology.get("devices"), "device"))
    parts += [counted(topology.get("hosts"), "host"), counted(topology.get("slices"), "slice")]
    where = ", ".join(part for part in parts if part)
    slices = topology.get("slices")
    times = f"{slices} x " if isinstance(slices, int) and slices > 1 else ""
    name = f"{at(plan, 'config') or 'a config'} on {times}{topology.get('name') or 'no topology'}"
    return name, f"{times}{topology.get('accelerator') or topology.get('chip') or NOTHING}: {where}"


def counted(value: Any, noun: str) -> str:
    """1 slice, 16 hosts; nothing where it is not known."""
    return "" if number(value) is None else f"{whole(value)} {noun}{'' if value == 1 else 's'}"


def verdict(plan: Plan) -> tuple[bool | None, str]:
    """Whether it fits, and the sentence that says by how much."""
    need, have, fits = required(plan), capacity(plan), at(plan, "fits")
    by = "" if at(plan, "compiled") or at(plan, "out_of_memory") else ", by the roofline (within about 15%)"
    if need is None or have is None or not isinstance(fits, bool):
        return None, "Whether it fits is not known."
    margin = number(at(plan, "margin_bytes"))
    margin = have - need if margin is None else margin
    if fits:
        spare = f"{size(margin)} ({share(margin, have)}) to spare"
        return True, f"Fits{by}: {size(need)} of {size(have)} a device; {spare}."
    return False, f"Does not fit{by}: needs {size(need)} a device, and has {size(have)}; {size(-margin)} too much."


def speed(plan: Plan) -> Grid:
    """The prediction: all communication hidden behind computation, and none of it."""
    prediction = at(plan, "prediction") or {}

    budget = at(plan, "model", "token_budget")
    rows = [
        ("step time", *two(prediction.get("step_seconds"), time)),
        ("tokens a second", *two(prediction.get("tokens_per_second"), whole)),
        ("MFU", *two(prediction.get("mfu"), lambda value: share(value, 1))),
        (f"time for {count(budget)} tokens" if number(budget) else "time", *two(prediction.get("days"), days)),
        ("chip-hours", *two(prediction.get("chip_hours"), _hours)),
    ]
    basis = BASES.get(str(prediction.get("basis")), prediction.get("basis"))
    note = f"From {basis}. {_bound(plan)}" if basis else _bound(plan)
    return Grid("Prediction", ("prediction", "full overlap", "no overlap"), "lrr", rows, note.strip())


def days(value: Any) -> str:
    """471.5 days; shorter times in hours, minutes or seconds."""
    finite = number(value)
    return NOTHING if finite is None else f"{finite:,.1f} days" if finite >= 2 else duration(finite * 86400)


def _hours(value: Any) -> str:
    finite = number(value)
    return NOTHING if finite is None else f"{finite:,.0f}" if finite >= 100 else f"{finite:.3g}"


def _bound(plan: Plan) -> str:
    prediction = at(plan, "prediction") or {}
    made_of = [
        (name, number(at(prediction, *path)))
        for name, path in (
            ("compute", ("compute_seconds",)),
            ("kernels", ("kernel_seconds",)),
            ("ICI", ("communication_seconds", "ici")),
            ("DCN", ("communication_seconds", "dcn")),
        )
    ]
    parts = ", ".join(f"{resource_name(plan, name)} {time(seconds)}" for name, seconds in made_of if seconds)
    bound = resource_name(plan, prediction.get("bound"))
    return " ".join([f"Bound by {bound}." if bound else "", f"A step: {parts}." if parts else ""]).strip()


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What is planned: mesh, networks, model, batch, remat, and with what it was compiled."""
    model, topology = at(plan, "model") or {}, at(plan, "topology") or {}
    parameters = at(model, "parameters") or {}
    split = [
        f"{count(parameters.get(key))} {words}"
        for key, words in (("active", "active"), ("non_embedding", "without embeddings"))
        if number(parameters.get(key)) is not None
    ]
    steps = model.get("steps")
    run = f"{count(model.get('token_budget'))} tokens in {whole(steps)} steps" if number(steps) else ""
    per_device = number(model.get("tokens_per_device"))
    batch = [
        f"{whole(model.get('tokens_per_step'))} tokens" + (f" ({whole(per_device)} a device)" if per_device else ""),
        f"rows of {whole(model.get('seq_len'))}" if model.get("seq_len") else "",
        flops(model.get("model_flops_per_step")) + " of the model" if model.get("model_flops_per_step") else "",
        counted(at(plan, "accumulation"), "microbatch")
        if at(plan, "accumulation") in (None, 1) and not at(plan, "stages")
        else "",
        f"{at(plan, 'accumulation')} microbatches" if at(plan, "accumulation") not in (None, 1) else "",
    ]
    hbm, peak = topology.get("hbm_bytes_per_device"), number(topology.get("peak_flops_per_device"))
    device = [f"{size(hbm)} of HBM" if hbm else "", f"{flops(peak)}/s" if peak else ""]
    rows = [
        ("device", ", ".join(part for part in device if part)),
        ("mesh", mesh_text(at(plan, "mesh"))),
        ("networks", networks_text(plan)),
        ("model", f"{count(parameters.get('total'))} parameters" + (f" ({', '.join(split)})" if split else "")),
        ("", f"{whole(model.get('layers'))} layers, remat {remat_text(plan) or NOTHING}" if model else ""),
        ("step", ", ".join(part for part in batch if part)),
        *([("stages", stages_text(at(plan, "stages")))] if at(plan, "stages") else []),
        ("run", run),
        ("overrides", " ".join(strings(at(plan, "overrides")))),
    ]
    if not rows[4][1] or not model:
        rows.pop(4)
    return [(name, text) for name, text in rows if text]


def remat_text(plan: Plan) -> str:
    """The policy in words: `full`, or what is kept: `keeping q, k, v`."""
    remat = at(plan, "remat")
    names = strings(at(remat, "names"))
    policy = at(remat, "policy") if isinstance(remat, dict) else remat
    return f"keeping {', '.join(names)}" if names else str(policy or "")


def mesh_text(mesh: Any) -> str:
    """The axes that are more than one device long: "data 4 × fsdp 16"."""
    if not isinstance(mesh, dict):
        return ""
    return " × ".join(f"{axis} {n}" for axis, n in mesh.items() if n not in (1, None)) or "one device"


def networks_text(plan: Plan) -> str:
    """What each axis crosses, and how fast a device sends along it."""
    found, mesh = at(plan, "networks") or {}, at(plan, "mesh") or {}
    parts = []
    for axis, network in found.items():
        if mesh.get(axis) == 1:
            continue
        rate = number(at(network, "bytes_per_s"))
        parts.append(
            f"{axis} over {network_name(plan, at(network, 'kind'))}" + (f" at {moved(rate)}/s" if rate else "")
        )
    return ", ".join(parts)


def network_name(plan: Plan, kind: Any) -> str:
    """ICI, DCN, NVLink; a mixed network as it is."""
    names = {"ici": "ICI", "dcn": resource_name(plan, "DCN"), "nvlink": "NVLink"}
    return names.get(str(kind), str(kind)) if kind else NOTHING


def resource_name(plan: Plan, resource: Any) -> str:
    """A resource as the topology has it: what is ICI and DCN for a TPU is NVLink and the network for a GPU."""
    name = str(resource or "")
    return {"ICI": "NVLink", "DCN": "network"}.get(name, name) if is_gpu(plan) else name


def compiler_name(plan: Plan) -> str:
    """The compiler, with its version where the plan has it."""
    compiler = at(plan, "compiled", "compiler")
    name = {"libtpu": "libtpu", "xla-cuda": "XLA's CUDA compiler"}.get(str(compiler), str(compiler or ""))
    # The versions are jax's and the compiler's, under its package's name.
    version = next((text for key, text in (at(plan, "versions") or {}).items() if key != "jax"), None)
    return f"{name} {version}" if name and version else name


def origins(plan: Plan) -> list[str]:
    """Which figures are the compiler's and which the roofline's, as sentences; what else must be known to read them."""
    compiled, lines = at(plan, "compiled"), []
    if compiled is not None and is_gpu(plan):
        lines.append(
            f"Memory and collectives are the compiler's ({compiler_name(plan)}{_cost(compiled)}). It estimates no "
            "time: step time, tokens a second, MFU, days and chip-hours are the roofline's."
        )
    elif compiled is not None:
        lines.append(
            f"Memory, collectives and cycles are the compiler's ({compiler_name(plan)}{_cost(compiled)}). Seconds of "
            "collectives are bytes over published link rates, those of Pallas kernels an estimate."
        )
    elif at(plan, "out_of_memory") is not None:
        lines.append("The compiler ran out of memory, so there is no program: what is used and by which buffers is its "
                     "word, every time is the roofline's.")  # fmt: skip
    else:
        because = at(plan, "not_compiled_because")
        lines.append(
            f"Not compiled{': ' + str(because).rstrip('.') if because else ''}. Every figure is the roofline's."
        )
    note = at(plan, "prediction", "note")
    return [*lines, str(note)] if note else lines


def _cost(compiled: Plan) -> str:
    seconds, rss = number(compiled.get("compile_seconds")), number(compiled.get("peak_rss_bytes"))
    took = f", compiled in {seconds:.1f} s" if seconds is not None else ""
    return took + (f" with {size(rss)}" if took and rss else "")


def warnings(plan: Plan) -> list[str]:
    """What should not be, in a plan that otherwise looks well."""
    found = []
    padded = [each for each in entries(plan, "compiled", "collectives") if "padded" in str(each.get("kind"))]
    if padded:
        n_bytes = sum(number(each.get("bytes_per_step")) or 0 for each in padded)
        found.append(
            f"{moved(n_bytes)} a step are all-reduced as zero-padded buffers in place of all-gathers, twice "
            "the bytes or more: the device order or the wraparound is not what the compiler wants."
        )
    host = number(at(plan, "compiled", "memory", "host_temp"))
    if host:
        found.append(f"{size(host)} of temporaries lie in the host's memory.")
    return found


def unit_of(values: Iterable[Any]) -> tuple[float, str]:
    """The unit that a column of bytes in memory is read in best: of its largest."""
    largest = max((abs(value) for value in map(number, values) if value is not None), default=0)
    return (2**30, "GiB") if largest >= 2**30 or not largest else (2**20, "MiB") if largest >= 2**20 else (2**10, "KiB")


def seconds_unit(values: Iterable[Any]) -> tuple[float, str, int]:
    """The unit that a column of times is read in best, and its decimals."""
    largest = max((abs(value) for value in map(number, values) if value is not None), default=0)
    if largest >= 100:
        return 1, "s", 2
    if largest >= 1e-3 or not largest:
        return 1e-3, "ms", 1 if largest >= 1e-2 else 3
    return 1e-6, "µs", 1


def scaled(value: Any, unit: float, decimals: int = 2) -> str:
    """A cell of a column whose head names the unit."""
    finite = number(value)
    if not finite:
        return NOTHING if finite is None else "0"
    return f"{finite / unit:,.{decimals}f}"


def joined(names: Any) -> str:
    """The axes of a collective."""
    return " × ".join(strings(names)) or NOTHING


def select(rows: Sequence[Any], n: int) -> tuple[list[Any], list[Any]]:
    """The first `n`, and the rest; the rest is empty where it would be one row that fits in its own summary."""
    return (list(rows), []) if len(rows) <= n + 1 else (list(rows[:n]), list(rows[n:]))
