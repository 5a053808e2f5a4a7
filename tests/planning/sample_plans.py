"""Plans to show: one of each kind, in the form that `maxlm plan --json` prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxlm.evaluation.report import count
from maxlm.planning import figures

FOLDER = Path(__file__).parent / "plans"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Plans that are kept for the docs, as they were made.
KEPT = Path(__file__).parents[2] / "benchmarks" / "plans"
KEPT_NAMES = sorted(path.stem for path in KEPT.glob("*.json") if '"prediction"' in path.read_text())
GIB = 2**30


def load(name: str) -> dict[str, Any]:
    """A plan of its own, to be changed at will."""
    return json.loads(((FOLDER if name in NAMES else KEPT) / f"{name}.json").read_text())


def with_holes(*, missing: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """A plan that was compiled and yet ran out, for every key in it once with that key null, or missing, everywhere."""
    plan = {**load("two-slices"), "out_of_memory": load("out-of-memory")["out_of_memory"]}
    for name in sorted(set(keys(plan))):
        yield name, without(plan, name, missing)


def keys(value: Any) -> Iterator[str]:
    """Every key inside."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def without(value: Any, name: str, missing: bool) -> Any:
    """`value` with what stands under `name` null, or missing, wherever it stands."""
    if isinstance(value, list):
        return [without(inner, name, missing) for inner in value]
    if isinstance(value, dict):
        kept = {key: without(inner, name, missing) for key, inner in value.items() if key != name}
        return kept if missing or name not in value else {**kept, name: None}
    return value


def expected(plan: dict[str, Any]) -> list[str]:
    """What must be read on any picture of a plan, from its raw figures."""
    topology, model, prediction = plan["topology"], plan["model"], plan["prediction"]
    mesh = " × ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    words = [
        plan["config"],
        topology["name"],
        f"{topology['accelerator']}: {topology['chips']:,} chip",
        f"{topology['hosts']:,} host",
        mesh,
        f"{count(model['parameters']['total'])} parameters",
        f"{count(model['parameters']['non_embedding'])} without embeddings",
        f"{model['layers']} layers, remat {'keeping' if plan['remat']['names'] else plan['remat']['policy']}",
        f"{model['tokens_per_step']:,} tokens ({model['tokens_per_device']:,} a device)",
        figures.flops(model["model_flops_per_step"]),
        f"{count(model['token_budget'])} tokens in {model['steps']:,} steps",
        *(f"{rate:,.0f}" for rate in prediction["tokens_per_second"]),
        *(f"{100 * mfu:.1f}%" for mfu in prediction["mfu"]),
        *(figures.days(days) for days in prediction["days"]),
        *(f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" for hours in prediction["chip_hours"]),
        prediction["note"],
    ]
    for seconds in [*prediction["step_seconds"], *plan["analytic"]["step_seconds"]]:
        words.append(f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms")
    resources = ("compute_seconds", "hbm_seconds", "ici_seconds", "dcn_seconds")
    unit, _, decimals = figures.seconds_unit(part[key] for part in plan["analytic"]["parts"] for key in resources)
    for part in plan["analytic"]["parts"]:
        words += [part["name"]]
        words += [f"{part[key] / unit:,.{decimals}f}" for key in resources if part[key]]
    words += [f"{n_bytes / GIB:,.2f}" for n_bytes in plan["analytic"]["memory"].values() if n_bytes]
    return words + (compiled(plan["compiled"]) if plan["compiled"] else []) + ran_out(plan["out_of_memory"])


def compiled(found: dict[str, Any]) -> list[str]:
    words = [f"{n_bytes / GIB:,.2f}" for n_bytes in found["memory_by_kind"].values()]
    words += [figures.size(found["memory"][name]) for name in ("argument", "heap", "required")]
    words += [f"compiled in {found['compile_seconds']:.1f} s"]
    for buffer in found["largest_buffers"]:
        words += [figures.size(buffer["bytes"]), buffer["shape"], buffer["source"] or "–"]
    in_all = sum(each["bytes_per_step"] for each in found["collectives"])
    for each in found["collectives"]:
        if each["bytes_per_step"] > 0.01 * in_all:  # the smallest may be summed up in a last row
            words += [each["kind"], " × ".join(each["axes"])]
    words += [f"{sum(each['times'] for each in found['collectives']):,}"]
    words += [figures.moved(sum(each["bytes_per_step"] for each in found["collectives"]))]
    if found["cycles"]:
        words += [f"{found['cycles']['total'] / 1e6:,.1f}"]
        for part, cycles in found["cycles"]["by_part"].items():
            words += [
                part,
                f"{cycles / 1e6:,.1f}" if cycles else "0",
                f"{100 * cycles / found['cycles']['total']:.1f}%",
            ]
        words += [f"{100 * found['cycles']['in_loops'] / found['cycles']['total']:.1f}% of the cycles are in loops"]
    words += [kernel["name"] for kernel in found["kernels"]]
    return words


def ran_out(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    words = [f"{found[name] / GIB:,.2f}" for name in ("used", "capacity", "over") if found[name]]
    words += [figures.size(buffer["bytes"]) for buffer in found["buffers"]]
    for each in found["relief"]:
        words += [each["label"], figures.size(each["saves_bytes"]), figures.size(each["required_bytes"])]
    return words
