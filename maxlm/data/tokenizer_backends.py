"""What reads each kind of tokenizer file: Hugging Face `tokenizers`, SentencePiece, tiktoken. Imported when needed."""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from maxlm.errors import DataError

# The splitting patterns of the public tiktoken encodings (openai/tiktoken, tiktoken_ext/openai_public.py; meta-llama/
# llama-models, llama3/tokenizer.py). A .tiktoken file holds ranks alone.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
    r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_O200K_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?",
)
_O200K = "|".join([*_O200K_CASES, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
_LLAMA3 = "|".join(
    [
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {"o200k_base": _O200K, "cl100k_base": _CL100K, "p50k_base": _GPT2, "r50k_base": _GPT2, "gpt2": _GPT2}
LLAMA3_RANKS = 128000


class Backend(Protocol):
    """What `Tokenizer` asks of a kind of tokenizer."""

    vocab_size: int
    exact_bytes: bool
    unk: str | None
    adds_specials: bool  # whether special tokens are no part of the file, and are put after its ids

    def canonical(self) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def own_special(self, name: str) -> str | None: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_specials: bool) -> str: ...
    def byte_lengths(self) -> np.ndarray: ...


def make_backend(
    backend: str, content: bytes, specials: Mapping[str, str | None], pattern: str | None, origin: str
) -> Backend:
    """The reader of `content`. Raises DataError, naming `origin`, where it is damaged or its package is missing."""
    if backend == "huggingface":
        return HuggingFaceBackend(content, origin)
    if backend == "sentencepiece":
        return SentencePieceBackend(content, origin)
    if backend == "tiktoken":
        return TiktokenBackend(content, specials, pattern or "", origin)
    raise DataError(f"{origin}: unknown kind of tokenizer {backend!r}; known are huggingface, sentencepiece, tiktoken.")


def backend_of(name: str, content: bytes, where: str) -> str:
    """Which backend reads the file `name`. Llama 3's `tokenizer.model` is tiktoken's format; the content decides."""
    if not content.strip():
        raise DataError(f"{where}: the tokenizer file is empty.")
    if name.endswith(".json"):
        return "huggingface"
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", content[:4096]):
        return "tiktoken"
    if name.endswith(".tiktoken"):
        raise DataError(f"{where}: not a tiktoken file: line 1 is not a base64 token and its rank.")
    return "sentencepiece"


def known_pattern(name: str, content: bytes, where: str) -> str:
    """The pattern of a public .tiktoken file. Raises DataError where it is not known."""
    for known, pattern in PATTERNS.items():
        if known in name:
            return pattern
    if content.count(b"\n") + (not content.endswith(b"\n")) == LLAMA3_RANKS:
        return _LLAMA3
    raise DataError(
        f"{where}: a tiktoken file does not say how text is split into words, and this one's name is none of "
        f"{', '.join(PATTERNS)}. Give the regular expression as tokenizer.pattern."
    )


def _import(module: str, origin: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{origin}: reading it needs the package {module}, which is not installed. "
            'Install it with: pip install "maxlm[data]"'
        ) from None


class HuggingFaceBackend:
    """A tokenizer.json."""

    adds_specials = False

    def __init__(self, content: bytes, origin: str):
        from tokenizers import Tokenizer

        try:
            self._spec = json.loads(content)
            self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # The Rust side raises bare Exception.
            brief = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise DataError(f"{origin}: not a tokenizer.json, or damaged: {brief}.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" in a document is plain text
        self._added = {token["id"]: token for token in self._spec.get("added_tokens", [])}
        self._vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not self._vocab:
            raise DataError(f"{origin}: the tokenizer's vocabulary is empty.")
        self.vocab_size = max(self._vocab.values()) + 1
        self.unk = self._spec["model"].get("unk_token") or None
        self._byte_level = self._has("decoder", "ByteLevel")
        self.exact_bytes = (
            self._byte_level and self._spec.get("normalizer") is None and not self._has("pre_tokenizer", None, "prefix")
        )

    def _has(self, part: str, kind: str | None, prefix: str = "") -> bool:
        """Whether a part of the pipeline is of this kind, or (`prefix`) adds a space in front of the text."""
        spec = self._spec.get(part) or {}
        steps = [spec, *spec.get("pretokenizers", []), *spec.get("decoders", [])]
        if prefix:
            return any(step.get("add_prefix_space") for step in steps)
        return any(step.get("type") == kind for step in steps)

    def canonical(self) -> str:
        return json.dumps(self._spec, sort_keys=True)

    def token_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def own_special(self, name: str) -> str | None:
        return None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_specials: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_specials)

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        byte_fallback = bool(self._spec["model"].get("byte_fallback"))
        word_piece = self._spec["model"].get("type") == "WordPiece"
        continuing = self._spec["model"].get("continuing_subword_prefix") or ""
        for token, i in self._vocab.items():
            if i in self._added:
                special = self._added[i].get("special") or token == self.unk
                lengths[i] = 0 if special else len(token.encode())
            elif self._byte_level:
                lengths[i] = len(token)  # each character stands for one byte (GPT-2's bytes_to_unicode)
            elif byte_fallback and _is_byte(token):
                lengths[i] = 1
            elif word_piece:
                lengths[i] = len(token.removeprefix(continuing).encode())
            else:
                lengths[i] = len(token.replace("▁", " ").encode())
        return lengths


def _is_byte(piece: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) is not None


class SentencePieceBackend:
    """A SentencePiece model."""

    unk: str | None = None
    adds_specials = False
    exact_bytes = False  # text is normalised, and a space is put in front of it

    def __init__(self, content: bytes, origin: str):
        self._content = content
        self._processor = _import("sentencepiece", origin).SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(content)
        except Exception as error:
            brief = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise DataError(f"{origin}: not a SentencePiece model, or damaged: {brief}.") from None
        if not loaded or not self._processor.GetPieceSize():
            raise DataError(f"{origin}: not a SentencePiece model, or damaged.")
        self.vocab_size = self._processor.GetPieceSize()

    def canonical(self) -> str:
        return self._content.hex()

    def token_id(self, token: str) -> int | None:
        i = self._processor.PieceToId(token)
        return i if self._processor.IdToPiece(i) == token else None

    def own_special(self, name: str) -> str | None:
        i = {"bos": self._processor.bos_id, "eos": self._processor.eos_id, "pad": self._processor.pad_id}[name]()
        return self._processor.IdToPiece(i) if i >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.Encode(texts, out_type=int)

    def decode(self, ids: list[int], skip_specials: bool) -> str:
        processor = self._processor
        if skip_specials:
            ids = [i for i in ids if not processor.IsControl(i)]
            return processor.Decode(ids)
        out, run = [], []
        for i in ids:
            if processor.IsControl(i):
                out += [processor.Decode(run), processor.IdToPiece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*out, processor.Decode(run)])

    def byte_lengths(self) -> np.ndarray:
        processor = self._processor
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if processor.IsByte(i):
                lengths[i] = 1
            elif not (processor.IsControl(i) or processor.IsUnknown(i) or processor.IsUnused(i)):
                lengths[i] = len(processor.IdToPiece(i).replace("▁", " ").encode())
        return lengths


class TiktokenBackend:
    """A tiktoken file: base64 tokens and their ranks. Special tokens get the ids after the last rank, in order."""

    unk: str | None = None
    adds_specials = True
    exact_bytes = True

    def __init__(self, content: bytes, specials: Mapping[str, str | None], pattern: str, origin: str):
        self._content = content
        self._ranks = _parse_ranks(content, origin)
        first = max(self._ranks.values()) + 1
        names = list(dict.fromkeys(token for token in specials.values() if token))
        self._specials = {token: first + i for i, token in enumerate(names)}
        self.vocab_size = first + len(names)
        try:
            self._encoding = _import("tiktoken", origin).Encoding(
                origin, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._specials
            )
        except (ValueError, AssertionError) as error:
            raise DataError(f"{origin}: tiktoken refuses it, or tokenizer.pattern: {error}.") from None

    def canonical(self) -> str:
        return self._content.hex()

    def token_id(self, token: str) -> int | None:
        return self._specials.get(token)

    def own_special(self, name: str) -> str | None:
        return None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: list[int], skip_specials: bool) -> str:
        if skip_specials:
            ids = [i for i in ids if i < self.vocab_size - len(self._specials)]
        return self._encoding.decode(ids, errors="replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths


def _parse_ranks(content: bytes, origin: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{origin}:{number}: not a base64 token and its rank: {line[:60]!r}.") from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DataError(
            f"{origin}: the byte {missing:#04x} has no rank, so not every text can be encoded. Is it cut off?"
        )
    return ranks
