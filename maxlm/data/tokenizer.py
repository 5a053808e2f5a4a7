"""Tokenizers: text to ids and back. One class over Hugging Face `tokenizers`, SentencePiece and tiktoken."""

from __future__ import annotations

from typing import Literal

from maxlm.section import Section, key


class TokenizerConfig(Section):
    """The tokenizer: where it lies, and how `maxlm tokenizer train` makes it."""

    path: str | None = key(
        None,
        "A folder with tokenizer.json (as `maxlm tokenizer train` writes, or any Hugging Face tokenizer's), or a "
        "tokenizer.json, SentencePiece .model or .tiktoken file.",
    )
    kind: Literal["bpe", "wordpiece", "unigram"] = key(
        "bpe", "What to train. bpe and unigram work on bytes and lose nothing; wordpiece loses spaces."
    )
    vocab_size: int = key(32768, "How many tokens to train, special ones included.", unit="tokens", ge=8)
    min_frequency: int = key(2, "How often a pair must occur to become a token; for bpe and wordpiece.", ge=0)
    bos: str | None = key("<|bos|>", "The token that begins a document.", min_length=1)
    eos: str | None = key("<|eos|>", "The token that ends a document.", min_length=1)
    pad: str | None = key("<|pad|>", "The token that fills up rows.", min_length=1)
    unk: str = key(
        "<|unk|>", "The token for what the vocabulary cannot spell; for wordpiece and unigram.", min_length=1
    )
    pattern: str | None = key(
        None,
        "The regular expression that splits text into words, for a .tiktoken file, which does not say it. None: "
        "known by the file's name (cl100k_base, o200k_base, ...) or, for Llama 3, by its size.",
    )
