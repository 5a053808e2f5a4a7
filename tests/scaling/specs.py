"""Small specifications of sweeps, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from maxlm.scaling.ladder import Ladder, make_ladder
from maxlm.scaling.spec import load_sweep
from tests import runs

SHAPE = {"aspect_ratio": 16, "head_dim": 8, "d_model_multiple": 8, "d_ff_ratio": 2, "d_ff_multiple": 8}


def tree(folder: Path | str = "runs/tiny", store: Path | str = "runs/store", **keys: Any) -> dict[str, Any]:
    """A specification of tiny models; keyword arguments replace its keys, and `overrides` section by section."""
    sections = {
        "tokenizer": {"path": f"{store}/tokenizer", "vocab_size": 384},
        "data": {"store": f"{store}/store", "sources": []},
        "model": {"vocab_size": 384, "max_seq_len": 32},
        "train": {"seq_len": 32, "spike": {"window": 8}},
        "evaluation": {"max_batches": 4},
        "checkpoint": {"every": 5},
        "metrics": {"log_every": 1, "tensorboard": False, "progress": "none"},
    }
    for section, values in keys.pop("overrides", {}).items():
        sections[section] = {**sections.get(section, {}), **values}
    return {
        "base": "quickstart",
        "folder": str(folder),
        "overrides": sections,
        "shape": dict(SHAPE),
        "learning_rate": {"rule": "power", "value": 1e-2},
        "batch": {"rule": "power", "value": 256},
        **({} if "sizes" in keys else {"budgets": [2e9, 8e9], "sizes_per_budget": 3, "tokens_per_parameter": [1.0]}),
        **keys,
    }


def write(path: Path, **keys: Any) -> Path:
    """The specification as a file, whose runs lie beside it unless `folder` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree(**{"folder": path.parent / "sweep", **keys})))
    return path


def ladder(path: Path, **keys: Any) -> Ladder:
    """The grid of a specification that is written to `path`."""
    return make_ladder(load_sweep(write(path, **keys)))


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """What a run's metrics say of the training, evaluation included, without times."""
    evaluations = [(line["step"], line["eval_loss"]) for line in runs.evaluation_lines(run_dir)]
    return [*runs.training_lines(run_dir), {"evaluations": evaluations}]
