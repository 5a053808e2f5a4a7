"""Small real runs on a real token store, in processes of their own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from maxlm.data.config import DataConfig
from maxlm.data.prepare import prepare
from maxlm.data.tokenizer import TokenizerConfig, train_from_config
from tests.processes import ROOT, environment

# What a metrics line says of the training itself; the rest of it are times.
TRAINING = ("step", "tokens", "loss", "nll", "grad_norm", "learning_rate", "skipped_steps")


def make_store(folder: Path, packages: tuple[str, ...] = ("json", "logging", "email")) -> Path:
    """A tokenizer and a token store of a few modules of the standard library, under `folder`."""
    text = Path(os.__file__).parent
    data = DataConfig(
        store=str(folder / "store"),
        sources=[{"kind": "text", "paths": [str(text / name) for name in packages], "suffixes": [".py"]}],  # type: ignore[list-item]
        heldout_fraction=0.15,
        max_bad_fraction=0.1,  # an empty __init__.py
        workers=1,
    )
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer"), vocab_size=384)
    train_from_config(tokenizer, data)
    prepare(data, tokenizer, progress=False)
    return folder


def write_config(path: Path, store: Path, run_dir: Path, **sections: Any) -> Path:
    """A config of a tiny float32 run over `store`; keyword arguments replace keys section by section."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"vocab_size": 384, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64,
                  "max_seq_len": 32},
        "tokenizer": {"path": str(store / "tokenizer"), "vocab_size": 384},
        "data": {"store": str(store / "store")},
        "train": {"steps": 20, "seq_len": 32, "global_batch_tokens": 256, "spike": {"window": 8}},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 4},
        "precision": {"compute": "float32"},
        "checkpoint": {"every": 5, "keep_last": 2},
        "metrics": {"log_every": 1, "tensorboard": False, "progress": "none"},
        "evaluation": {"every": 10, "max_batches": 2},
    }  # fmt: skip
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    """`maxlm train` as arguments of a Python."""
    return ["-m", "maxlm.cli", "train", str(config), *overrides]


def start(config: Path, *overrides: str, log: Path) -> subprocess.Popen[bytes]:
    """Starts `maxlm train` on one device in a process of its own, its output in `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *command(config, *overrides)], cwd=ROOT, env=environment(), stdout=file, stderr=file
        )


def start_until(config: Path, run_dir: Path, step: int, *, log: Path) -> subprocess.Popen[bytes]:
    """As `start`, and waits until step `step` is in the run's metrics."""
    process = start(config, log=log)
    while len(training_lines(run_dir)) < step:
        assert process.poll() is None, log.read_text()
        time.sleep(0.002)
    return process


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last one is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole]


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """What the training lines say of the training, without times."""
    return [{name: line[name] for name in TRAINING} for line in lines(run_dir) if "loss" in line]


def evaluation_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluation lines."""
    return [line for line in lines(run_dir) if "eval_loss" in line]
