"""What the tests of data share: a small tokenizer, and a store of a few hundred documents."""

import pytest

from maxlm.data.prepare import prepare
from maxlm.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tests.data.corpus import jsonl_config, make_texts, write_jsonl


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(make_texts(100), TokenizerConfig(vocab_size=300), folder, progress=False)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """400 documents, all different."""
    return make_texts(400)


@pytest.fixture(scope="session")
def store(tmp_path_factory, tokenizer, texts) -> str:
    """A store of `texts`, a tenth of them held out."""
    folder = tmp_path_factory.mktemp("store")
    data = jsonl_config(write_jsonl(folder / "documents.jsonl", texts), heldout_fraction=0.1)
    prepare(data, tokenizer, str(folder / "store"), progress=False)
    return str(folder / "store")
