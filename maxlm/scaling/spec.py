"""A sweep's specification: one YAML file that says which runs there are, by rule."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from maxlm.config import RunConfig
from maxlm.config_file import KeyPath, Tree, dotted, find, has, presets_folder, read_tree
from maxlm.config_keys import validate
from maxlm.errors import ConfigError
from maxlm.scaling.rules import BatchRule, LearningRateRule, WarmupRule
from maxlm.scaling.shapes import ShapeConfig
from maxlm.section import Section, key

# What the rules of a sweep say of each run, and nobody else.
DERIVED: tuple[KeyPath, ...] = (
    *(("model", name) for name in ("d_model", "n_layers", "n_encoder_layers", "n_heads", "n_kv_heads", "d_ff")),
    ("model", "moe", "d_ff"),
    *(("train", name) for name in ("steps", "global_batch_tokens", "seed")),
    ("optimizer", "learning_rate"),
    ("schedule", "warmup_steps"),
    ("schedule", "decay_steps"),
    ("checkpoint", "at"),
    ("name",),
    ("run_dir",),
)

# Under the overrides: every run is scored once, at its end and on the same held-out text, and keeps one checkpoint.
DEFAULTS: dict[str, Any] = {
    "evaluation": {"every": None, "max_batches": None},
    "checkpoint": {"keep_last": 1, "keep_best": 0},
}


class DecayConfig(Section):
    """Where the final decay of schedule.kind wsd begins, and whether runs of a size share what comes before."""

    fraction: float = key(0.2, "the part of a run's steps that decays (arXiv:2405.18392, section 4)", gt=0, lt=1)
    branches: bool = key(
        False,
        "with `sizes`: only the longest run of a size begins at step 0; the others begin from its checkpoints, where "
        "their own decay does",
    )


class CapsConfig(Section):
    """What leaves a run out of the grid."""

    max_tokens: float | None = key(None, "no run trains on more tokens", unit="tokens", gt=0)
    max_memory_gib: float | None = key(
        None, "no run needs more of a device's memory; what the hardware has where not given", unit="GiB", gt=0
    )


class HardwareConfig(Section):
    """The hardware that memory, time and cost are told of."""

    topology: str | None = key(None, "as `maxlm plan --topology`: v5p:4x4x4, v6e-256, h100:16x8")
    slices: int = key(1, "TPU slices", ge=1)
    mfu: float | None = key(
        None, "the MFU that runs reach there; the roofline's time, which no run reaches, where not given", gt=0, le=1
    )
    flops_per_second: float | None = key(
        None, "in place of a topology: model FLOP/s of one run as measured on the machine at hand", gt=0
    )
    concurrent: int = key(1, "runs at once", unit="runs", ge=1)
    startup_seconds: float = key(0.0, "what a run takes besides its steps", unit="s", ge=0)
    price_per_chip_hour: float | None = key(None, "what a chip costs an hour, in any currency", gt=0)

    @model_validator(mode="after")
    def _one_machine(self) -> HardwareConfig:
        if (self.topology is None) == (self.flops_per_second is None):
            raise ValueError("give either topology or flops_per_second")
        if self.topology is None and self.mfu is not None:
            raise ValueError(f"mfu = {self.mfu:g} is of a topology, and flops_per_second is given; leave one out")
        return self


class SweepSpec(Section):
    """Everything that a sweep is made from."""

    name: str = key("sweep", "the sweep's name; the file's where not given", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    folder: str = key("runs/{name}", "its runs lie in here, and their table runs.csv; {name} stands for the name")
    base: str = key(..., "the config that every run is made from: a file (beside this one first) or a preset")
    overrides: dict[str, Any] = key({}, "lies over the base, as a config's keys do")

    budgets: tuple[float, ...] = key((), "training FLOPs of the runs, a budget each, ascending", unit="FLOPs")
    sizes_per_budget: int = key(5, "model sizes tried in each budget", unit="runs", ge=1)
    span: float = key(16.0, "with `budgets`: the most tokens a parameter over the fewest, in each budget", gt=1)
    sizes: tuple[float, ...] = key((), "in place of `budgets`: parameters of the models, ascending")
    tokens_per_parameter: tuple[float, ...] = key(
        (20.0,),
        "with `budgets`: the middle of each budget's range, one for all or one for each; with `sizes`: the lengths "
        "that every size is trained for (20: Chinchilla, arXiv:2203.15556)",
        min_length=1,
    )
    size_of: Literal["total", "non_embedding", "active"] = key(
        "total", "the parameters that `sizes` and `tokens_per_parameter` count"
    )
    seeds: tuple[int, ...] = key((0,), "every run is made once with each", min_length=1)

    shape: ShapeConfig = key(ShapeConfig(), "the shapes of the models")
    learning_rate: LearningRateRule = key(LearningRateRule(), "the peak learning rate")
    batch: BatchRule = key(BatchRule(), "tokens of a step")
    warmup: WarmupRule = key(WarmupRule(), "how long the learning rate rises")
    decay: DecayConfig = key(DecayConfig(), "the final decay where the base's schedule.kind is wsd")

    caps: CapsConfig = key(CapsConfig(), "what leaves a run out")
    hardware: HardwareConfig | None = key(None, "what memory, time and cost are told of")
    unique_tokens: float | None = key(
        None, "training tokens that there are; the token store's own count where not given", unit="tokens", gt=0
    )
    retries: int = key(0, "how often `maxlm sweep run` starts a run again that failed", ge=0)
    divergence_rise: float = key(
        0.5,
        "a run has diverged whose training loss over its last tenth is so far above the lowest of any tenth before, "
        "or whose held-out loss is not finite or not under the logarithm of the vocabulary",
        unit="nats",
        gt=0,
    )

    @field_validator("folder")
    @classmethod
    def _folder_with_name(cls, value: str, info: ValidationInfo) -> str:
        return value.replace("{name}", info.data.get("name", "{name}"))

    @field_validator("budgets", "sizes", "tokens_per_parameter")
    @classmethod
    def _are_above_zero(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in values):
            raise ValueError(f"must be above 0, and {min(values):g} is among them")
        return values

    @field_validator("budgets", "sizes")
    @classmethod
    def _ascend(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(b < 1.01 * a for a, b in itertools.pairwise(values)):
            raise ValueError("must ascend, each more than 1% above the one before")
        return values

    @field_validator("seeds")
    @classmethod
    def _differ(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(values)) != len(values) or min(values) < 0:
            raise ValueError(f"{list(values)} must differ, and be at least 0")
        return values

    def centre(self, budget: int) -> float:
        """Tokens a parameter in the middle of a budget, by its number."""
        return self.tokens_per_parameter[budget if len(self.tokens_per_parameter) > 1 else 0]


@dataclass(frozen=True)
class Sweep:
    """A specification as it was read: its values, where each was written, and the base that runs are made from."""

    path: Path
    spec: SweepSpec
    tree: Tree
    """the base with the overrides over it"""
    base: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.spec.folder)

    def config(self, derived: dict[str, Any]) -> RunConfig:
        """A run's config: the base with what the rules say laid over it. Raises ConfigError."""
        tree = self.tree.merged_with(Tree(derived, {}))
        return validate(RunConfig, tree, f"{self.path} (run {derived['name']})")


def sweep_names() -> list[str]:
    """The packaged specifications, sorted."""
    return sorted(path.stem for path in (presets_folder() / "sweeps").glob("*.yaml"))


def load_sweep(path_or_name: str | Path) -> Sweep:
    """Reads a specification: a YAML file, or the name of one that is packaged.

    Raises ConfigError with every problem that was found, each with its key and the line that it comes from; those of
    `overrides` too.
    """
    path = _find(str(path_or_name))
    tree = read_tree(path)
    if "name" not in tree.data:
        tree.data["name"] = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", path.stem) or "sweep"
    spec = validate(SweepSpec, tree, str(path))
    _check_keys(path, spec, tree)
    merged = _base_tree(path, spec, tree).merged_with(Tree(DEFAULTS, {})).merged_with(_overrides(tree))
    base = validate(RunConfig, merged, str(path))
    _check_base(path, spec, tree, base)
    return Sweep(path, spec, merged, base)


def _check_keys(path: Path, spec: SweepSpec, tree: Tree) -> None:
    """What holds between keys. Raises ConfigError."""

    def wrong(key: str, message: str) -> ConfigError:
        return ConfigError(f"{tree.origin(tuple(key.split('.'))) or path}: {message}")

    n_budgets, lengths = len(spec.budgets), spec.tokens_per_parameter
    if bool(spec.budgets) == bool(spec.sizes):
        raise wrong("sizes", f"budgets or sizes must be given, and {'both are' if n_budgets else 'neither is'}")
    if spec.budgets and len(lengths) not in (1, n_budgets):
        raise wrong(
            "tokens_per_parameter",
            f"tokens_per_parameter has {len(lengths)} values for {n_budgets} budgets; one for all, or one for each",
        )
    if spec.sizes and any(b < 1.01 * a for a, b in itertools.pairwise(lengths)):
        raise wrong("tokens_per_parameter", "tokens_per_parameter must ascend, each more than 1% above the one before")
    if spec.decay.branches and spec.budgets:
        raise wrong(
            "decay.branches",
            "decay.branches = true goes with `sizes`: the runs of a budget have models of different sizes, and no "
            "trunk in common",
        )


def _find(text: str) -> Path:
    packaged = presets_folder() / "sweeps" / f"{text}.yaml"
    if Path(text).is_file():
        return Path(text)
    if "/" not in text and packaged.is_file():
        return packaged
    raise ConfigError(f"{text}: not a file, and no packaged sweep has this name; they are {', '.join(sweep_names())}")


def _base_tree(path: Path, spec: SweepSpec, tree: Tree) -> Tree:
    beside = path.parent / spec.base
    try:
        base = read_tree(beside if beside.is_file() else find(spec.base))
    except ConfigError as error:
        raise ConfigError(f"{tree.origin(('base',)) or path}: base: {error}") from None
    # Every run has a name of its own.
    return Tree(base.data | {"name": "base"}, base.origins)


def _overrides(tree: Tree) -> Tree:
    """The overrides as a config's tree. Raises ConfigError where one is what the rules say."""
    data = tree.data.get("overrides") or {}
    for path in DERIVED:
        here: Any = data
        for part in path:
            here = here[part] if has(here, part) else None
        if here is not None:
            full = ("overrides", *path)
            raise ConfigError(
                f"{tree.origin(full)}: {dotted(full)} = {here!r}: the sweep itself says this of each run; leave it out "
                f"({_rule_of(path)})"
            )
    return Tree(data, {path[1:]: origin for path, origin in tree.origins.items() if path[0:1] == ("overrides",)})


def _rule_of(path: KeyPath) -> str:
    rules = {
        ("model",): "`shape` has the rule for shapes",
        ("train", "steps"): "steps follow from budgets and tokens_per_parameter",
        ("train", "global_batch_tokens"): "`batch` has the rule",
        ("train", "seed"): "`seeds` has them",
        ("optimizer",): "`learning_rate` has the rule",
        ("schedule", "warmup_steps"): "`warmup` has the rule",
        ("schedule", "decay_steps"): "`decay` has the rule",
        ("checkpoint",): "`decay.branches` says which are needed",
    }
    return next((text for prefix, text in rules.items() if path[: len(prefix)] == prefix), "`name` and `folder` do")


def _check_base(path: Path, spec: SweepSpec, tree: Tree, base: RunConfig) -> None:
    if spec.decay.branches and base.schedule.kind != "wsd":
        where = tree.origin(("decay", "branches")) or path
        raise ConfigError(
            f"{where}: decay.branches = true needs schedule.kind = 'wsd', and the base has {base.schedule.kind!r}; "
            "set overrides.schedule.kind: wsd"
        )
    if "decay" in tree.data and base.schedule.kind != "wsd":
        raise ConfigError(
            f"{tree.origin(('decay',))}: decay is of schedule.kind = 'wsd', and the base has {base.schedule.kind!r}; "
            "leave it out, or set overrides.schedule.kind: wsd"
        )
    if base.data.sources and not base.data.heldout_fraction:
        raise ConfigError(
            f"{path}: data.heldout_fraction = 0 of the base leaves no held-out text, and runs are compared by their "
            "loss on it; set overrides.data.heldout_fraction"
        )
