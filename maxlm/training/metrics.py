"""What a run says of itself: metrics.jsonl, TensorBoard, Weights & Biases, the console, the profile."""

from typing import Literal

from maxlm.section import Section, key


class MetricsConfig(Section):
    """What a run writes down of itself, and how often."""

    log_every: int = key(
        10, "a line of metrics.jsonl every so many steps; the first and the last always", unit="steps", ge=1
    )
    tensorboard: bool = key(True, "also write TensorBoard event files, to RUN_DIR/tensorboard")
    wandb: str | None = key(None, "also send the metrics to this Weights & Biases project", min_length=1)
    progress: Literal["auto", "bar", "lines", "none"] = key(
        "auto", "how progress is shown: a bar, plain lines, nothing; auto is a bar on a terminal, else lines"
    )


class ProfileConfig(Section):
    """The window of steps that the JAX profiler traces, to RUN_DIR/profile."""

    start_step: int = key(10, "the first step that is traced, counted from 1", unit="steps", ge=1)
    steps: int = key(0, "how many steps are traced; 0 traces none", unit="steps", ge=0)
