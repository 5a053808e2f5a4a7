"""The config of the model that a law asks for: a shape of a family, with rate, batch, warm-up and steps by rule.

The law splits 6ND; the FLOPs of a shape are counted exactly (`models/flops.py`). So the shape is not the one whose N is
nearest: for every shape of the family the tokens are those that its exact FLOPs leave of the budget, and the shape is
taken whose loss is then least by the law.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import RunConfig, diff, load_config
from maxlm.config_file import Tree, dump, extended_as, find, nested, preset_names, read_tree
from maxlm.config_keys import validate
from maxlm.errors import ConfigError
from maxlm.files import write_atomically
from maxlm.models.flops import ParameterCount, training_flops_per_token
from maxlm.parallel.mesh import resolve_sizes
from maxlm.planning.candidates import divisors
from maxlm.planning.memory_model import predicted_memory
from maxlm.planning.topology import Topology
from maxlm.scaling.hardware import Hardware, placed, suits
from maxlm.scaling.ladder import BATCH_RANGE, PlannedRun, one_run
from maxlm.scaling.optimum import APPROACHES, Answer, Question, answer, surface_of, token_cap
from maxlm.scaling.result import Estimate, FitResult
from maxlm.scaling.rules import BATCHES, LEARNING_RATES, PublishedRule
from maxlm.scaling.shapes import Family, Shape, sizes_of
from maxlm.scaling.spec import DEFAULTS, Sweep, SweepSpec, load_sweep, sweep_names
from maxlm.scaling.surface import Surface

# Shapes so much larger than the optimum need not be looked at: exact FLOPs are never so far below 6ND.
BEYOND = 3.0
# How far a batch may be rounded, in logarithms, to halve more often.
ROUNDED = 0.1


@dataclass(frozen=True)
class NextModel:
    """A model, ready to train. `flops` are exact and of training, `serving_flops` those of serving's forward passes."""

    rules: Sweep
    config: RunConfig
    count: ParameterCount
    n_tokens: int
    flops: float
    asked_flops: float
    serving_flops: float
    loss: Estimate | None
    memory_bytes: int | None
    topology: Topology | None
    by_rule: dict[str, str]

    @property
    def parent(self) -> Path:
        """The config that the family is of."""
        if self.rules.spec.base == str(self.rules.path):
            return self.rules.path
        beside = self.rules.path.parent / self.rules.spec.base
        return beside if beside.is_file() else find(self.rules.spec.base)

    @property
    def keys(self) -> dict[str, Any]:
        """What is not as in the base, nested. How a sweep scores and keeps its runs is the sweep's alone."""
        ours = {f"{section}.{name}" for section, values in DEFAULTS.items() for name in values}
        given = {f"{section}.{name}" for section, values in self.rules.spec.overrides.items() for name in values or ()}
        skipped = {"name", "run_dir", *(ours - given)}
        changed = diff(load_config(self.parent), self.config)
        return nested({path: value for path, _, value in changed if path not in skipped})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        model, train = self.config.model, self.config.train
        return {
            "base": self.rules.spec.base,
            **sizes_of(model),
            "n_params": self.count.total,
            "n_params_nonembedding": self.count.non_embedding,
            "n_tokens": self.n_tokens,
            "steps": train.steps,
            "batch_tokens": train.global_batch_tokens,
            "learning_rate": self.config.optimizer.learning_rate,
            "warmup_steps": self.config.schedule.warmup_steps,
            "flops": self.flops,
            "asked_flops": self.asked_flops,
            "serving_flops": self.serving_flops,
            "loss": None if self.loss is None else asdict(self.loss),
            "memory_bytes": self.memory_bytes,
            "topology": None if self.topology is None else self.topology.name,
            "slices": None if self.topology is None else self.topology.slices,
            "rules": self.by_rule,
            "keys": self.keys,
        }


def next_model(fit: FitResult, question: Question, base: str | Path, hardware: Hardware | None = None) -> Answer:
    """`optimum` of a fit with a model of the family of `base`: a config, or a sweep's specification, whose rules hold.

    With `hardware`, the largest model that fits its memory bounds the size: with the batch that the rule gives it, and
    whatever mesh, recomputation and microbatches it takes. Raises ConfigError where no shape is within the bounds.
    """
    rules = load_rules(base)
    found = answer(fit, question)
    maker = _Maker(found, rules)
    best = maker.best()
    if hardware is None:
        return replace(found, model=maker.model(best, maker.run(best).config))
    config = maker.on(best, hardware)
    if config is None:
        fits = _largest_that(maker.smaller(best), lambda choice: maker.on(choice, hardware) is not None)
        if fits is None:
            raise ConfigError(
                f"no model of {base} fits {hardware.topology.name}, not even one of "
                f"{maker.choices[0].shape.count.total:,} parameters; give larger hardware, or a rule for smaller shapes"
            )
        reason = (
            f"what {hardware.topology.name} has memory for by the planner's model, with a batch that it can share out"
        )
        reasons = {**question.reasons, "max_params": reason}
        found = answer(fit, replace(question, max_params=fits.size, reasons=reasons))
        maker = _Maker(found, rules)
        best = maker.choices[-1]  # up to the optimum larger is better
        config = maker.on(best, hardware)
        assert config is not None  # it fitted before
    return replace(found, model=maker.model(best, config, hardware))


def load_rules(base: str | Path) -> Sweep:
    """A sweep's specification; or a config as one, with every rule at its default.

    Raises ConfigError where the file is neither, or the model is a mixture of experts.
    """
    text = str(base)
    packaged = text in sweep_names() and text not in preset_names()
    if packaged or (Path(text).is_file() and "base" in read_tree(Path(text)).data):
        sweep = load_sweep(base)
    else:
        path, config = find(text), load_config(text)
        tree = read_tree(path)
        sweep = Sweep(path, SweepSpec(base=text), Tree(tree.data | {"name": config.name}, tree.origins), config)
    if sweep.base.model.moe is not None:
        raise ConfigError(
            f"{base}: a mixture of experts, of which 6ND is not the cost: laws that split a budget are of dense models"
        )
    return sweep


@dataclass(frozen=True)
class _Choice:
    """A shape with the tokens that it would be trained on, and by what shapes are compared: the less the better."""

    shape: Shape
    size: float
    """the parameters that the law counts"""
    flops_per_token: float
    tokens: float
    score: float


class _Maker:
    """The family of a base under an answer's constraints."""

    def __init__(self, found: Answer, rules: Sweep):
        self.found, self.question, self.fit, self.rules = found, found.question, found.fit, rules
        self.size_of = "non_embedding" if self.fit.law == "kaplan-nd" else "total"
        self.choices = self._choices()

    def _choices(self) -> list[_Choice]:
        """Every shape within the bounds, smallest first, and past the optimum no further than need be."""
        base, wanted = self.rules.base, self.found.best.n_params.value
        most = self.question.max_params or np.inf
        shapes: list[Shape] = []
        for shape in Family(base.model, self.rules.spec.shape):
            if shape.size(self.size_of) > min(most * (1 + 1e-9), BEYOND * wanted):
                break
            shapes.append(shape)
        costs = np.array([training_flops_per_token(s.model, base.train.seq_len, base.row_lengths) for s in shapes])
        sizes = np.array([float(s.size(self.size_of)) for s in shapes])
        tokens = self._tokens(sizes, costs)
        scores = self._scores(sizes, tokens, costs) if shapes else sizes
        there = [i for i in range(len(shapes)) if np.isfinite(scores[i]) and tokens[i] > 0]
        if not there:
            raise ConfigError(
                f"{self.rules.path}: no shape of this family is within the bounds: its smallest has "
                f"{next(iter(Family(base.model, self.rules.spec.shape))).size(self.size_of):,} parameters, the optimum "
                f"{wanted:.4g}" + ("" if np.isinf(most) else f", and at most {most:.4g} are allowed")
            )
        return [_Choice(shapes[i], sizes[i], costs[i], tokens[i], scores[i]) for i in there]

    def _tokens(self, sizes: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """The training tokens of each shape, as its exact FLOPs have it; serving is a forward pass, a third of them."""
        if self.question.same_loss:
            assert self.found.best.loss is not None
            found = self._point().tokens_for(sizes[None], np.array([[self.found.best.loss.value]]))[0]
            return np.where(found <= token_cap(self.fit.law, self.question) * (1 + 1e-9), found, np.nan)
        left = (self.question.flops - costs / 3 * self.question.served_tokens) / costs
        return np.minimum(left, token_cap(self.fit.law, self.question))

    def _scores(self, sizes: np.ndarray, tokens: np.ndarray, costs: np.ndarray) -> np.ndarray:
        if self.fit.law in APPROACHES:
            return np.abs(np.log(sizes / self.found.best.n_params.value))
        if self.question.same_loss:
            return costs * (tokens + self.question.served_tokens / 3)
        return self._point().loss(sizes[None], np.where(tokens > 0, tokens, np.nan)[None])[0]

    def _point(self) -> Surface:
        surface = surface_of(self.fit, self.question.unique_tokens)
        return replace(surface, natural=surface.natural[:1])

    def best(self) -> _Choice:
        """The shape to train."""
        return min(self.choices, key=lambda choice: choice.score)

    def smaller(self, than: _Choice) -> list[_Choice]:
        """The shapes that are smaller, smallest first."""
        return [choice for choice in self.choices if choice.size < than.size]

    def run(self, choice: _Choice, rules: Sweep | None = None, n_devices: int = 1) -> PlannedRun:
        """The run of a choice by the rules. Raises ConfigError where they make none.

        Where the rules do not say of how many rows a batch is a multiple, it is rounded to rows that the devices share
        out evenly, as far as that is within the range that any batch may be in, and to a number that halves often.
        """
        rules = rules or self.rules
        run = self._within(choice, rules)
        if "multiple" in rules.spec.batch.model_fields_set:
            return run
        rows = run.config.train.global_batch_tokens // run.config.train.seq_len // run.config.train.accumulation

        def off(multiple: int) -> float:
            return abs(math.log(max(1, round(rows / multiple)) * multiple / rows))

        shared = max(n for n in divisors(n_devices) if off(n) <= math.log(BATCH_RANGE[1]))
        while off(2 * shared) <= ROUNDED:
            shared *= 2
        batch = rules.spec.batch.model_copy(update={"multiple": shared})
        try:
            return self._within(choice, replace(rules, spec=rules.spec.model_copy(update={"batch": batch})))
        except ConfigError:  # too few steps for a batch of so many rows
            return run

    def _within(self, choice: _Choice, rules: Sweep) -> PlannedRun:
        """The run, whose whole steps take no more tokens than there are."""
        run = one_run(rules, choice.shape, choice.tokens, "next")
        if run.tokens > token_cap(self.fit.law, self.question) and run.steps > 1:
            fewer = (run.steps - 1) * run.config.train.global_batch_tokens
            run = one_run(rules, choice.shape, fewer, "next")
        return run

    def on(self, choice: _Choice, hardware: Hardware) -> RunConfig | None:
        """The run of a choice as it fits the hardware; None where it does not.

        Where the devices cannot share out the batch of the rule in any way, it has a row for each, whatever the rule.
        """
        topology = hardware.topology
        tree = self.rules.tree.merged_with(Tree({"train": {"accumulation": 1}}, {}))
        rules = replace(self.rules, tree=tree, base=validate(RunConfig, tree, str(self.rules.path)))
        config = self.run(choice, rules, topology.n_devices).config
        if not suits(config, topology):
            batch = rules.spec.batch.model_copy(update={"multiple": topology.n_devices})
            rules = replace(rules, spec=rules.spec.model_copy(update={"batch": batch}))
            try:
                config = self._within(choice, rules).config
            except ConfigError:  # too few steps
                return None
        return placed(config, topology)

    def _other_batch(self, choice: _Choice, config: RunConfig) -> str:
        """What is to be said of a batch that is not the rule's."""
        batch = self._within(choice, self.rules).config.train.global_batch_tokens
        ratio = config.train.global_batch_tokens / batch
        if BATCH_RANGE[0] <= ratio <= BATCH_RANGE[1]:
            return ""
        return f", and {ratio:.3g} times that, for rows that the devices can share out"

    def model(self, choice: _Choice, config: RunConfig, hardware: Hardware | None = None) -> NextModel:
        """The model as it is written, with what the law says of it."""
        spec, loss, memory = self.rules.spec, None, None
        steps = config.train.steps * config.train.global_batch_tokens
        if self.fit.law not in APPROACHES:
            surface = surface_of(self.fit, self.question.unique_tokens)
            rows = len(surface.natural)
            losses = surface.loss(np.full(rows, choice.size), np.full(rows, float(steps)))
            loss = Estimate.of(losses[0], losses[1:])
        if hardware is not None:
            sizes = resolve_sizes(config.mesh, hardware.topology.n_devices)
            memory = predicted_memory(config, sizes)["total"]
        return NextModel(
            rules=self.rules,
            config=config,
            count=choice.shape.count,
            n_tokens=steps,
            flops=steps * choice.flops_per_token,
            asked_flops=choice.tokens * choice.flops_per_token,
            serving_flops=self.question.served_tokens * choice.flops_per_token / 3,
            loss=loss,
            memory_bytes=memory,
            topology=None if hardware is None else hardware.topology,
            by_rule={
                "learning rate": _rule(spec.learning_rate.rule, LEARNING_RATES),
                "batch": _rule(spec.batch.rule, BATCHES) + self._other_batch(choice, config),
                "warm-up": f"{spec.warmup.rule} {spec.warmup.value:g}",
            },
        )


def _rule(name: str, published: dict[str, PublishedRule]) -> str:
    return f"{published[name].equation} ({published[name].source})" if name in published else name


def _largest_that(choices: list[_Choice], fits: Callable[[_Choice], bool]) -> _Choice | None:
    """The largest of choices, smallest first, that fits, as long as larger ones need more; None where none does."""
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(choices[middle]) else (low, middle)
    return choices[low - 1] if low else None


def write_model(found: Answer, path: str | Path) -> RunConfig:
    """Writes the answer's model as a config that extends its base, for `maxlm train` and `maxlm plan`; the config.

    Raises ConfigError where the file is the base itself or what would be written is not a config, StorageError where it
    cannot be written.
    """
    model, path = found.model, Path(path)
    assert model is not None
    parent = model.parent
    if path.exists() and path.samefile(parent):
        raise ConfigError(f"{path}: is the config that the model is made from; give the new one another name")
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", path.stem) or "model"
    tree = {"name": name, "run_dir": "runs/{name}", **model.keys}
    below = read_tree(parent)
    config = validate(RunConfig, below.merged_with(Tree(tree, {})), str(path))
    write_atomically(path, _header(found, model) + dump({"extends": extended_as(parent, path), **tree}))
    return config


def _header(found: Answer, model: NextModel) -> str:
    question, best = found.question, found.best
    count, flops = model.count, f"{model.flops:.4g} training FLOPs of {model.asked_flops:.4g} asked for"
    lines = [
        f"{count.total:,} parameters, {count.non_embedding:,} without embeddings and head; {model.n_tokens:,} tokens.",
        f"The model for {question.flops:.4g} FLOPs by {found.fit.law} of {len(found.fit.rows)} runs, whose optimum is "
        f"{best.n_params.value:.4g} parameters and {best.n_tokens.value:.4g} tokens at 6ND.",
        f"Exactly {flops}.",
        *(each.message[0].upper() + each.message[1:] + "." for each in found.binding),
    ]
    if model.loss is not None:
        low, high = model.loss.low, model.loss.high
        inside = "" if np.isnan(low) else f", {low:.4f} to {high:.4f} (95%)"
        lines.append(f"Predicted loss: {model.loss.value:.4f}{inside}.")
    lines += [f"By rule, {what}: {rule}." for what, rule in model.by_rule.items()]
    lines += [f"Mind: {note}." for note in found.notes]
    if not found.fit.trusted:
        lines.append(found.fit.verdict)
    return "".join(f"# {line}\n" for line in lines)
