"""The data of a sweep: its tokenizer and token store, made once before the runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from maxlm.config import RunConfig
from maxlm.data.config import DataConfig


def train_tokens(data: DataConfig) -> int | None:
    """Training tokens of the stores of `data`; None where one is not prepared yet, or lies on no disk of this machine.

    Raises DataError where a store is damaged.
    """
    from maxlm.data.store import MANIFEST, parse_manifest

    total = 0
    for store in [entry.store for entry in data.mixture] or [data.store or ""]:
        path = Path(store.removeprefix("file://")) / MANIFEST
        if not path.is_file():
            return None
        total += parse_manifest(path.read_bytes(), str(path)).train.tokens
    return total


def prepare_data(config: RunConfig, say: Callable[[str], None]) -> None:
    """Trains the tokenizer and prepares the token store where they are not there yet; once they are, does nothing.

    Without sources there is nothing to make them from: the runs say what is missing. Raises as `maxlm data prepare`.
    """
    if not config.data.sources:
        return
    if config.data.store is not None and train_tokens(config.data) is not None:
        return
    from maxlm.data.prepare import prepare
    from maxlm.data.tokenizer import train_from_config

    if config.tokenizer.path is not None and not Path(config.tokenizer.path).exists():
        say(f"training a tokenizer of {config.tokenizer.vocab_size:,} tokens, {config.tokenizer.path}")
        train_from_config(config.tokenizer, config.data)
    say(f"preparing the token store, {config.data.store}")
    prepare(config.data, config.tokenizer)
