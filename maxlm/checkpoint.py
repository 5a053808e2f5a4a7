"""Checkpoints over Orbax: asynchronous save, retention, resume, falling back to the last good one."""

from __future__ import annotations

from maxlm.section import Section, key


class CheckpointConfig(Section):
    """When the run is saved, and which of its checkpoints are kept."""

    every: int = key(1000, "steps between two saves; the last step and a stop by signal save as well", unit="steps", ge=1)
    keep_last: int = key(3, "newest checkpoints that are kept", unit="checkpoints", ge=1)
    keep_every: int | None = key(None, "checkpoints at multiples of this step are kept for ever", unit="steps", ge=1)
    keep_best: int = key(0, "checkpoints of lowest evaluation loss that are kept besides", unit="checkpoints", ge=0)
    asynchronous: bool = key(True, "write in the background while training goes on")
