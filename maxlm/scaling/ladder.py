"""The grid of a sweep: from budgets, or sizes and lengths, to runs with exact shapes, steps and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from maxlm.config import RunConfig
from maxlm.errors import ConfigError
from maxlm.models.flops import ParameterCount, training_flops_per_token
from maxlm.scaling.rules import Scale
from maxlm.scaling.shapes import Family, Shape, sizes_of
from maxlm.scaling.spec import Sweep

TOLERANCE = 0.01
"""how far a run's FLOPs, or its tokens, may be from what was asked"""
BATCH_RANGE = (0.8, 1.25)
"""how far from its rule a batch may go so that whole steps make up the tokens"""


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid."""

    name: str
    config: RunConfig
    count: ParameterCount
    flops: float
    """training FLOPs from step 0, of forward and backward"""
    size: int
    """the parameters that the spec's `size_of` counts"""
    budget: float | None = None
    """the FLOPs that were asked for; None in a grid of sizes"""
    trunk: str | None = None
    """the run that this one branches off, after step `begins`"""
    begins: int = 0
    memory_bytes: int | None = None
    """of a device"""
    seconds: float | None = None
    cost: float | None = None

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        return self.steps * self.config.train.global_batch_tokens

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.size

    @property
    def share(self) -> float:
        """The part of its steps that the run makes itself, and not its trunk."""
        return (self.steps - self.begins) / self.steps

    def to_dict(self) -> dict[str, Any]:
        """The run as plain data, as `maxlm sweep plan --json` prints it."""
        model, train = self.config.model, self.config.train
        return {
            "run": self.name,
            "budget": self.budget,
            **sizes_of(model),
            "n_params": self.count.total,
            "n_params_nonembedding": self.count.non_embedding,
            "n_params_active": self.count.active,
            "n_tokens": self.tokens,
            "tokens_per_parameter": self.tokens_per_parameter,
            "steps": self.steps,
            "batch_tokens": train.global_batch_tokens,
            "learning_rate": self.config.optimizer.learning_rate,
            "warmup_steps": self.config.schedule.warmup_steps,
            "seed": train.seed,
            "flops": self.flops,
            "off_budget": self.flops / self.budget - 1 if self.budget else None,
            "trunk": self.trunk,
            "begins": self.begins,
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
            "cost": self.cost,
        }


@dataclass(frozen=True)
class Ladder:
    """All runs of a sweep, in the order in which they are made, and what there is to say against them."""

    sweep: Sweep
    runs: tuple[PlannedRun, ...]
    left_out: tuple[str, ...] = ()
    """runs that the caps leave out, and why"""
    warnings: tuple[str, ...] = ()

    def run(self, name: str) -> PlannedRun:
        return next(run for run in self.runs if run.name == name)


@dataclass(frozen=True)
class Sized:
    """A shape with what a token of training costs."""

    shape: Shape
    size: int
    flops_per_token: float

    def tokens(self, flops: float) -> float:
        """Tokens that so many FLOPs train."""
        return flops / self.flops_per_token


@dataclass
class _Grid:
    """The grid while it is made."""

    sweep: Sweep
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def points(self) -> Iterator[list[PlannedRun]]:
        """Runs that share a model, seed aside: one, or a trunk and its branches."""
        spec = self.sweep.spec
        yield from self._of_budgets() if spec.budgets else self._of_sizes()

    def _sized(self, shape: Shape) -> Sized:
        base = self.sweep.base
        flops = training_flops_per_token(shape.model, base.train.seq_len, base.row_lengths)
        return Sized(shape, shape.size(self.sweep.spec.size_of), flops)

    def _family(self) -> Iterator[Sized]:
        return map(self._sized, Family(self.sweep.base.model, self.sweep.spec.shape))

    def _of_budgets(self) -> Iterator[list[PlannedRun]]:
        spec = self.sweep.spec
        n = spec.sizes_per_budget
        places = [0.5 - i / (n - 1) for i in range(n)] if n > 1 else [0.0]
        targets = [[spec.centre(b) * spec.span**place for place in places] for b in range(len(spec.budgets))]
        family: list[Sized] = []
        for sized in self._family():
            family.append(sized)
            # Enough when the last one is past the largest model of every budget.
            ratios = (sized.tokens(budget) / sized.size for budget in spec.budgets)
            if all(ratio < min(wanted) / 2 for ratio, wanted in zip(ratios, targets, strict=True)):
                break
        for number, budget in enumerate(spec.budgets):
            taken: set[str] = set()
            for target in targets[number]:
                best = min(
                    family,
                    key=lambda sized: abs(math.log(sized.tokens(budget) / sized.size / target)),
                )
                name = f"c{short(budget)}-{shape_name(best.shape)}"
                if name in taken:
                    self._duplicate(f"budget {budget:.4g}: {target:.3g} tokens a parameter", best.shape)
                    continue
                taken.add(name)
                found = best.tokens(budget) / best.size
                if n > 1 and abs(math.log(found / target)) > math.log(spec.span) / (n - 1) / 2:
                    self.warnings.append(
                        f"budget {budget:.4g}: the shape nearest to {target:.3g} tokens a parameter is "
                        f"{shape_name(best.shape)} with {found:.3g}: the steps between shapes are wider than those "
                        "between the sizes asked for (shape.d_model_multiple, shape.head_dim)"
                    )
                yield self._runs(best, [best.tokens(budget)], [name], budget)

    def _of_sizes(self) -> Iterator[list[PlannedRun]]:
        spec = self.sweep.spec
        family: list[Sized] = []
        for sized in self._family():
            family.append(sized)
            if sized.size > 2 * max(spec.sizes):
                break
        taken: set[str] = set()
        for size in spec.sizes:
            best = min(family, key=lambda sized: abs(math.log(sized.size / size)))
            name = shape_name(best.shape)
            if name in taken:
                self._duplicate(f"sizes: {size:.4g} parameters", best.shape)
                continue
            taken.add(name)
            lengths = {f"{name}-t{ratio:.4g}": ratio * best.size for ratio in spec.tokens_per_parameter}
            if spec.decay.branches:
                yield self._runs(best, list(lengths.values()), list(lengths), None)
            else:
                for label, tokens in lengths.items():
                    yield self._runs(best, [tokens], [label], None)

    def _duplicate(self, what: str, shape: Shape) -> None:
        self.warnings.append(
            f"{what}: the nearest shape is {shape_name(shape)} again, and it is taken once; make the steps between "
            "shapes smaller (shape.d_model_multiple, shape.head_dim), or ask for fewer sizes or a wider span"
        )

    def _runs(self, sized: Sized, lengths: list[float], names: list[str], budget: float | None) -> list[PlannedRun]:
        """The runs of a model for `lengths` tokens, ascending, the longest first: the others are its branches."""
        spec, base = self.sweep.spec, self.sweep.base
        count = sized.shape.count
        scale = Scale(
            n_params=count.total,
            n_params_nonembedding=count.non_embedding,
            n_tokens=lengths[-1],
            flops=lengths[-1] * sized.flops_per_token,
            flops_without_head=lengths[-1] * (sized.flops_per_token - self._head_flops(sized)),
        )
        batch = self._batch(scale, lengths, names[-1])
        steps = [round(length / batch) for length in lengths]
        try:
            learning_rate = spec.learning_rate.at(scale)
        except ValueError as error:
            raise ConfigError(f"learning_rate: {error}, of run {names[-1]}; choose another rule") from None
        warmup = spec.warmup.at(count.total, steps[0], batch)
        decays = [max(1, round(spec.decay.fraction * n)) for n in steps]
        begins = [n - decay for n, decay in zip(steps, decays, strict=True)]
        runs = []
        for seed in spec.seeds:
            suffix = f"-s{seed}" if len(spec.seeds) > 1 else ""
            for i in reversed(range(len(steps))):
                name, is_trunk = names[i] + suffix, i == len(steps) - 1
                derived = {
                    "name": name,
                    "run_dir": str(self.sweep.folder / name),
                    "model": sized.shape.changes,
                    "train": {"steps": steps[i], "global_batch_tokens": batch, "seed": seed},
                    "optimizer": {"learning_rate": learning_rate},
                    "schedule": {"warmup_steps": warmup},
                }
                if base.schedule.kind == "wsd":
                    derived["schedule"]["decay_steps"] = decays[i]
                if is_trunk and len(steps) > 1:
                    derived["checkpoint"] = {"at": sorted({n for n in begins[:-1] if n})}
                runs.append(
                    PlannedRun(
                        name=name,
                        config=self.sweep.config(derived),
                        count=count,
                        flops=steps[i] * batch * sized.flops_per_token,
                        size=sized.size,
                        budget=budget,
                        trunk=None if is_trunk or not begins[i] else names[-1] + suffix,
                        begins=0 if is_trunk else begins[i],
                    )
                )
        return runs

    def _head_flops(self, sized: Sized) -> float:
        from maxlm.models.flops import forward_flops

        base = self.sweep.base
        return 3 * forward_flops(sized.shape.model, base.train.seq_len, base.row_lengths).head

    def _batch(self, scale: Scale, lengths: list[float], name: str) -> int:
        """Tokens of a step: whole rows, near the rule's, such that whole steps make up all `lengths` to TOLERANCE."""
        train, rule = self.sweep.base.train, self.sweep.spec.batch
        unit = train.seq_len * rule.multiple * train.accumulation
        wanted = rule.at(scale)
        nearest = max(1, round(wanted / unit))
        low, high = (math.ceil(BATCH_RANGE[0] * nearest), math.floor(BATCH_RANGE[1] * nearest))
        for units in sorted(range(low, high + 1), key=lambda units: abs(math.log(units / nearest))):
            batch = units * unit
            if all(abs(round(length / batch) * batch / length - 1) <= TOLERANCE for length in lengths):
                return batch
        steps, smaller = lengths[0] / (nearest * unit), "value" if rule.rule == "power" else "multiplier"
        raise ConfigError(
            f"run {name}: {lengths[0]:,.0f} tokens are {steps:.1f} steps of {nearest * unit:,} tokens, and no batch "
            f"from {BATCH_RANGE[0]:g} to {BATCH_RANGE[1]:g} times as large comes within {TOLERANCE:.0%} in "
            f"whole steps; make the batch smaller (batch.{smaller}, batch.multiple, overrides.train.seq_len), or the "
            "budget larger"
        )


def make_ladder(sweep: Sweep) -> Ladder:
    """The grid of a sweep, with memory, time and cost where its hardware is given.

    Raises ConfigError where a rule makes no model, no batch or no config, naming the run and the keys.
    """
    from maxlm.scaling.checks import check_grid, check_repeats
    from maxlm.scaling.costs import Costs

    grid, costs = _Grid(sweep), Costs(sweep)
    runs: list[PlannedRun] = []
    for group in grid.points():
        kept = [costs.priced(run) for run in group]
        reasons = {run.name: costs.over_cap(run) for run in kept}
        for run in kept:
            if reason := reasons[run.name]:
                grid.left_out.append(f"{run.name}: {reason}")
        runs += _without_lost_trunks([run for run in kept if not reasons[run.name]])
    warnings = [*grid.warnings, *check_grid(sweep.spec, runs), *check_repeats(sweep, runs), *costs.problems()]
    return Ladder(sweep, tuple(runs), tuple(grid.left_out), tuple(warnings))


def one_run(sweep: Sweep, shape: Shape, tokens: float, name: str) -> PlannedRun:
    """The run of one shape for so many tokens, by the sweep's rules, whose budgets, sizes and caps are not looked at.

    Raises ConfigError where a rule makes no batch or no config.
    """
    spec = sweep.spec.model_copy(update={"seeds": sweep.spec.seeds[:1]})
    grid = _Grid(replace(sweep, spec=spec))
    (run,) = grid._runs(grid._sized(shape), [tokens], [name], None)
    return run


def _without_lost_trunks(runs: list[PlannedRun]) -> list[PlannedRun]:
    """Branches whose trunk a cap leaves out: the longest that is left becomes the trunk of the others."""
    names = {run.name for run in runs}
    orphans = [run for run in runs if run.trunk is not None and run.trunk not in names]
    if not orphans:
        return runs
    found = [run for run in runs if run not in orphans]
    for seed in dict.fromkeys(run.config.train.seed for run in orphans):
        longest, *shorter = (run for run in orphans if run.config.train.seed == seed)
        at = tuple(sorted({run.begins for run in shorter}))
        checkpoint = longest.config.checkpoint.model_copy(update={"at": at})
        config = longest.config.model_copy(update={"checkpoint": checkpoint})
        found.append(replace(longest, config=config, trunk=None, begins=0))
        found += [replace(run, trunk=longest.name) for run in shorter]
    return found


def shape_name(shape: Shape) -> str:
    """`d256-l4`: what tells the shapes of a family apart."""
    return f"d{shape.model.d_model}-l{shape.model.n_layers}"


def short(number: float) -> str:
    """A number as it stands in names: 1e18, 3.162e15."""
    return f"{number:.4g}".replace("e+", "e").replace("e0", "e")
