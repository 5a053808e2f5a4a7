"""RunConfig: the sections composed, read from YAML and overrides, and explained.

Each section is a class beside the code that it configures; this file knows what holds between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator, model_validator

from maxlm.checkpoint import CheckpointConfig
from maxlm.config_file import apply_override, dump, find, read_tree
from maxlm.config_keys import KeyRow, flatten, flatten_plain, near, validate, walk
from maxlm.data.config import DataConfig
from maxlm.data.objective import Objective
from maxlm.data.tokenizer import TokenizerConfig
from maxlm.errors import CheckpointError, ConfigError
from maxlm.evaluation.config import EvaluationConfig
from maxlm.models.config import LossConfig, ModelConfig, PrecisionConfig
from maxlm.models.flops import RowLengths
from maxlm.parallel.distributed import DistributedConfig
from maxlm.parallel.mesh import MeshConfig
from maxlm.parallel.pipeline_schedule import PipelineConfig
from maxlm.parallel.support import check as check_support
from maxlm.section import Section, key
from maxlm.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from maxlm.training.metrics import MetricsConfig, ProfileConfig

# What a checkpoint was made with and a resumed run may not change: the shapes in it, the meaning of its token ids, and
# the order of its data. A prefix stands for everything under it.
FIXED_BY_A_CHECKPOINT = (
    "model",
    "tokenizer",
    "data",
    "train.global_batch_tokens",
    "train.seq_len",
    "train.seed",
    "train.spike.window",
    "precision.parameters",
)
FREE_WITHIN_THEM = (
    "model.remat",
    "model.attention_implementation",
    "model.context_attention",
    # Where they lie may change: what lies there is compared by its fingerprint.
    "tokenizer.path",
    "data.store",
    "data.workers",
    "data.prefetch",
    "data.cache_mib",
    "data.max_bad_fraction",
)


class RunConfig(Section):
    """Everything that a run is made from."""

    name: str = key("run", "the run's name; the config file's where not given", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = key("runs/{name}", "the run's folder; {name} stands for the name", min_length=1)

    model: ModelConfig = key(..., "sizes and bricks")
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "text to ids")
    data: DataConfig = key(DataConfig(), "documents, token stores, batches")
    train: TrainConfig = key(..., "length of the run, batch of a step")
    optimizer: OptimizerConfig = key(..., "AdamW")
    schedule: ScheduleConfig = key(ScheduleConfig(), "the learning rate by step")
    precision: PrecisionConfig = key(PrecisionConfig(), "number formats")
    loss: LossConfig = key(LossConfig(), "cross-entropy")
    mesh: MeshConfig = key(MeshConfig(), "how many devices each parallelism gets")
    pipeline: PipelineConfig = key(PipelineConfig(), "how the stages of mesh.pipeline take turns")
    distributed: DistributedConfig = key(DistributedConfig(), "how processes find each other")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "what is saved, when, and what is kept")
    metrics: MetricsConfig = key(MetricsConfig(), "what is logged, and where")
    evaluation: EvaluationConfig = key(EvaluationConfig(), "held-out loss during the run")
    profile: ProfileConfig = key(ProfileConfig(), "the profiler's window")

    @field_validator("run_dir")
    @classmethod
    def _run_dir_with_name(cls, value: str, info: ValidationInfo) -> str:
        return value.replace("{name}", info.data.get("name", "{name}"))

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        if problems := list(_misfits(self)):
            raise ValueError("\n".join(problems))
        try:
            n_special = self.objective.n_special(self.train.seq_len)
            if self.objective.special_id < n_special - 1:
                raise ConfigError(
                    f"data.objective: a row of train.seq_len = {self.train.seq_len} has {n_special} missing spans, and "
                    f"there are {self.objective.special_id + 1} tokens up to the first sentinel; give "
                    "first_sentinel_id, or a longer mean_span"
                )
            check_support(self)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def objective(self) -> Objective:
        """What the model is to tell of a row's tokens. Raises ConfigError where it is not one of such a model."""
        model = self.model
        return Objective.of(
            self.data.objective, model_kind=model.kind, vocab_size=model.vocab_size, start_id=model.decoder_start_id
        )

    @property
    def row_lengths(self) -> RowLengths:
        """What a row of train.seq_len becomes: tokens of an encoder and a decoder, prefixes."""
        objective = self.objective
        return RowLengths(*objective.lengths(self.train.seq_len), prefix=objective.kind == "prefix_lm")


def _misfits(c: RunConfig) -> Iterator[str]:
    """Settings of different sections that do not fit each other, a sentence each, which names keys and values."""
    seq_len, tokens, accumulation = c.train.seq_len, c.train.global_batch_tokens, c.train.accumulation
    rows = tokens // seq_len
    if seq_len > c.model.max_seq_len:
        yield (
            f"train.seq_len = {seq_len} is more than model.max_seq_len = {c.model.max_seq_len}, "
            "the longest sequence that the model is made for"
        )
    if tokens % seq_len:
        whole = " or ".join(str(n * seq_len) for n in (rows, rows + 1) if n)
        yield (
            f"train.global_batch_tokens = {tokens} is not a multiple of train.seq_len = {seq_len}, "
            f"and a batch is whole rows: take {whole}"
        )
    elif rows % accumulation:
        yield (
            f"train.accumulation = {accumulation} does not divide the {rows} rows of a batch "
            f"(train.global_batch_tokens = {tokens} / train.seq_len = {seq_len})"
        )
    warmup, steps = c.schedule.warmup_steps, c.train.steps
    if warmup >= steps:
        yield f"schedule.warmup_steps = {warmup} is not less than train.steps = {steps}: the warm-up would never end"
    elif c.schedule.decay_steps is not None and warmup + c.schedule.decay_steps > steps:
        yield (
            f"schedule.warmup_steps = {warmup} and schedule.decay_steps = {c.schedule.decay_steps} "
            f"do not fit into train.steps = {steps}"
        )
    if c.profile.steps and c.profile.start_step > steps:
        yield (
            f"profile.start_step = {c.profile.start_step} is after train.steps = {steps}, the end of the run: "
            "nothing would be traced"
        )
    if c.data.objective.next_sentence and not (c.model.next_sentence_head and c.model.token_types >= 2):
        yield (
            f"data.objective.next_sentence = true with model.next_sentence_head = {c.model.next_sentence_head} and "
            f"model.token_types = {c.model.token_types}: rows of two parts need the head, and 2 types"
        )
    save, evaluate = c.checkpoint.every, c.evaluation.every
    if c.checkpoint.keep_best and (evaluate is None or math.lcm(save, evaluate) > steps):
        yield (
            f"checkpoint.keep_best = {c.checkpoint.keep_best} goes by the held-out loss of saved steps, and with "
            f"evaluation.every = {'null' if evaluate is None else evaluate} and checkpoint.every = {save} no step but "
            "the last is both evaluated and saved"
        )


def load_config(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config: a YAML file, a run folder or a preset's name, with `a.b=c` overrides laid over it in order.

    Raises ConfigError with every problem that was found, each with its key and the line or override it comes from.
    """
    path = find(path_or_preset)
    tree = read_tree(path)
    for text in overrides:
        tree = apply_override(tree, text)
    if "name" not in tree.data:
        tree.data["name"] = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", path.stem) or "run"
    return validate(RunConfig, tree, str(path))


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, every key in it; reading it gives an equal config."""
    return dump(config.model_dump(mode="json"))


def explain(prefix: str | None = None) -> list[KeyRow]:
    """Every key, or those under `prefix` (a section or one key), with type, default, unit and meaning.

    Raises ConfigError for a prefix that names no key.
    """
    rows = list(walk(RunConfig))
    if prefix is None:
        return rows
    rows = [row for row in rows if row.key == prefix or row.key.startswith(prefix + ".")]
    if not rows:
        hint = near(RunConfig, prefix)
        raise ConfigError(f"no key `{prefix}`" + (f"; did you mean `{hint}`?" if hint else ""))
    return rows


def diff(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; None for the keys of a section that is not there."""
    left, right = flatten(a), flatten(b)
    names = dict.fromkeys((*left, *right))
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def check_resume(old: dict[str, Any], new: RunConfig) -> None:
    """Raises CheckpointError where `new` cannot go on from a checkpoint that was made with the config `old`.

    `old` is the plain data of a RunConfig (`model_dump(mode="json")`), as checkpoints keep it. Everything outside
    FIXED_BY_A_CHECKPOINT may change. A key that `old`, from an earlier version, does not have counts as its default.
    """
    then, now = flatten_plain(RunConfig, old), flatten(new)
    defaults = {row.key: row.default for row in walk(RunConfig)}
    changed = [
        f"  {name}: the checkpoint has {before!r}, the config {after!r}"
        for name in dict.fromkeys((*now, *then))
        if _is_fixed(name) and (before := then.get(name, defaults.get(name))) != (after := now.get(name))
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoints in {new.run_dir} were made with other settings, which a resumed run cannot change:\n"
            + "\n".join(changed)
            + "\nPut the old values back, or start anew in another folder (run_dir=...)."
        )


def _is_fixed(name: str) -> bool:
    def under(prefixes: tuple[str, ...]) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)

    return under(FIXED_BY_A_CHECKPOINT) and not under(FREE_WITHIN_THEM)
