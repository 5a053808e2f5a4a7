"""Documents for the tests of data."""

import json
from pathlib import Path

import numpy as np

from maxlm.data.config import DataConfig, SourceConfig

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "def",
    "return",
    "self",
    "import",
    "class",
    "tokens",
    "naïve",
    "日本",
    "😀",
    "_x",
    "42",
]


def make_texts(n: int, seed: int = 0) -> list[str]:
    """`n` different documents of 1 to 120 words."""
    generator = np.random.default_rng(seed)
    return [f"{i} " + " ".join(generator.choice(WORDS, generator.integers(1, 120))) + "\n" for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A JSONL file of the texts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def jsonl_config(path: Path, **settings) -> DataConfig:
    """A config of one JSONL source."""
    return DataConfig(sources=(SourceConfig(kind="jsonl", paths=(str(path),)),), **settings)
