"""Tokenizers: text to ids and back, one class over Hugging Face `tokenizers`, SentencePiece and tiktoken.

A tokenizer is the bytes of its file and the names of its special tokens; nothing in a tokenizer's folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maxlm.errors import ConfigError, DataError, MaxlmError
from maxlm.section import Section, key

if TYPE_CHECKING:
    import numpy as np

    from maxlm.data.config import DataConfig
    from maxlm.data.tokenizer_backends import Backend

SIDECAR = "maxlm_tokenizer.json"
SPECIALS = ("bos", "eos", "pad")
# A tokenizer's own file, by what reads it.
FILE_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.tiktoken"}


class TokenizerConfig(Section):
    """The tokenizer: where it lies, and how `maxlm tokenizer train` makes it."""

    path: str | None = key(
        None,
        "a folder with tokenizer.json (as `maxlm tokenizer train` writes, or any Hugging Face tokenizer's), or a "
        "tokenizer.json, SentencePiece .model or .tiktoken file",
    )
    kind: Literal["bpe", "wordpiece", "unigram"] = key(
        "bpe", "what to train. bpe and unigram work on bytes and lose nothing; wordpiece loses spaces"
    )
    vocab_size: int = key(32768, "how many tokens to train, special ones included", unit="tokens", ge=8)
    min_frequency: int = key(2, "how often a pair must occur to become a token; for bpe and wordpiece", ge=0)
    bos: str | None = key("<|bos|>", "the token that begins a document", min_length=1)
    eos: str | None = key("<|eos|>", "the token that ends a document", min_length=1)
    pad: str | None = key("<|pad|>", "the token that fills up rows", min_length=1)
    unk: str = key("<|unk|>", "the token for what the vocabulary cannot spell; for wordpiece and unigram", min_length=1)
    pattern: str | None = key(
        None,
        "the regular expression that splits text into words, for a .tiktoken file, which does not say it. None: "
        "known by the file's name (cl100k_base, o200k_base, ...) or, for Llama 3, by its size",
    )


class Tokenizer:
    """Text to ids and back. Special tokens are never read out of text: `"<|eos|>"` in a document is plain text.

    Made by `load_tokenizer` and `train_tokenizer`. Pickles to its file's bytes, so it travels between processes.

    Attributes:
        vocab_size: one past the largest id.
        bos_id, eos_id, pad_id: ids of the special tokens, or None.
        exact_bytes: whether `token_byte_lengths` of a text's ids adds up to the text's UTF-8 bytes. True for byte-level
            tokenizers; False where text is normalised or spaces are lost (WordPiece, SentencePiece), for which the
            token store records each document's bytes instead.
        chat_template: how a conversation becomes text, as Hugging Face's tokenizer_config.json has it, or None. It is
            carried, and nothing here uses it.
        fingerprint: sha256 of what decides the ids.
    """

    def __init__(
        self,
        backend: str,
        content: bytes,
        specials: Mapping[str, str | None],
        *,
        pattern: str | None = None,
        origin: str = "tokenizer",
        chat_template: Any = None,
        reader: Backend | None = None,
    ):
        """`backend` is a key of `FILE_NAMES`, `content` its file's bytes, `specials` names by `SPECIALS`.

        `reader` is what already reads `content`, if it was made.
        """
        from maxlm.data.tokenizer_backends import make_backend

        self.backend = backend
        self.content = content
        self.pattern = pattern
        self.origin = origin
        self.chat_template = chat_template
        self.specials = {name: specials.get(name) for name in SPECIALS}
        self._backend = reader or make_backend(backend, content, self.specials, pattern, origin)
        ids = {name: self._special_id(name) for name in SPECIALS}
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self.vocab_size: int = self._backend.vocab_size
        self.exact_bytes: bool = self._backend.exact_bytes
        canonical = [backend, self._backend.canonical(), pattern, self.specials]
        self.fingerprint = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def _special_id(self, name: str) -> int | None:
        token = self.specials[name]
        if token is None:
            return None
        token_id = self._backend.token_id(token)
        if token_id is None:
            raise DataError(
                f"{self.origin}: tokenizer.{name} is {token!r}, which is not in its vocabulary. Name a token that it "
                f"has, or leave tokenizer.{name} out to take the tokenizer's own."
            )
        return token_id

    def __reduce__(self):
        return _remake, (self.backend, self.content, self.specials, self.pattern, self.origin, self.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos."""
        return self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without bos or eos."""
        return self._backend.encode_batch(list(texts))

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_specials)

    def token_byte_lengths(self) -> np.ndarray:
        """int32[vocab_size]: the bytes of UTF-8 that each id stands for; 0 for special tokens."""
        return self._backend.byte_lengths()

    def files(self) -> dict[str, bytes]:
        """The files of the tokenizer's folder, by name; the sidecar, by which damage is seen, comes last."""
        files = {FILE_NAMES[self.backend]: self.content}
        names = {f"{name}_token": token for name, token in self.specials.items() if token is not None}
        if self.backend == "huggingface":
            names |= {"unk_token": self._backend.unk} if self._backend.unk else {}
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 10**30,
                **names,
            }
            if self.chat_template is not None:
                config["chat_template"] = self.chat_template
            files["tokenizer_config.json"] = _json(config)
            files["special_tokens_map.json"] = _json(names)
        sidecar = {
            "format": 1,
            "backend": self.backend,
            "specials": self.specials,
            "pattern": self.pattern,
            "fingerprint": self.fingerprint,
        }
        files[SIDECAR] = _json(sidecar)
        return files

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's folder, which `load_tokenizer` and, for tokenizer.json, `transformers` read.

        Raises StorageError where the folder cannot be written.
        """
        from maxlm.files import write_atomically

        for name, content in self.files().items():
            write_atomically(Path(folder) / name, content)


def _remake(
    backend: str, content: bytes, specials: dict, pattern: str | None, origin: str, chat_template: Any
) -> Tokenizer:
    return Tokenizer(backend, content, specials, pattern=pattern, origin=origin, chat_template=chat_template)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def load_tokenizer(source: str | Path | TokenizerConfig) -> Tokenizer:
    """Loads a tokenizer from a folder or a file; see `TokenizerConfig.path`.

    Special tokens are, in this order: the config's, where they differ from the defaults; those saved with the
    tokenizer (maxlm's sidecar, Hugging Face's tokenizer_config.json, the SentencePiece model's own); the config's
    defaults, where the vocabulary has them.

    Raises DataError, which names the file, where it is missing or damaged.
    """
    config = source if isinstance(source, TokenizerConfig) else TokenizerConfig(path=str(source))
    if config.path is None:
        raise DataError(
            "tokenizer.path is not set. Give a tokenizer's folder or file, or train one with `maxlm tokenizer train`."
        )
    path = Path(config.path).expanduser()
    try:
        if path.is_dir():
            names = [*FILE_NAMES.values(), *_ASIDE]
            files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
        else:
            files = {path.name: path.read_bytes()}
    except FileNotFoundError:
        raise DataError(
            f"{path}: no tokenizer here. Check tokenizer.path, or train one there with `maxlm tokenizer train CONFIG`."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}.") from None
    return tokenizer_from_files(files, str(path), config)


def tokenizer_from_files(files: Mapping[str, bytes], origin: str, config: TokenizerConfig | None = None) -> Tokenizer:
    """The tokenizer of a folder's `files` (name to bytes), which lies at `origin`. Raises as `load_tokenizer`."""
    from maxlm.data.tokenizer_backends import backend_of, known_pattern, make_backend

    config = config or TokenizerConfig()
    name = next((n for n in FILE_NAMES.values() if n in files), None)
    if name is None:
        name = next((n for n in files if n.endswith((".json", ".model", ".tiktoken")) and n not in _ASIDE), None)
    if name is None:
        expected = ", ".join(FILE_NAMES.values())
        raise DataError(f"{origin}: no tokenizer here. Expected one of {expected}, or a .model or .tiktoken file.")
    where = origin if len(files) == 1 else f"{origin}/{name}"
    content = files[name]
    backend = backend_of(name, content, where)
    sidecar = _parse(files, SIDECAR, origin)
    pattern = config.pattern or sidecar.get("pattern")
    if backend == "tiktoken" and pattern is None:
        pattern = known_pattern(origin if len(files) == 1 else name, content, where)
    try:
        reader = make_backend(backend, content, {}, pattern, where)
        specials = _resolve_specials(files, origin, config, reader, sidecar)
        if backend == "tiktoken":  # Its special tokens are not in the file: now that they are known, it is made anew.
            reader = None
        tokenizer = Tokenizer(
            backend,
            content,
            specials,
            pattern=pattern,
            origin=where,
            chat_template=_chat_template(files, origin),
            reader=reader,
        )
    except MaxlmError:
        raise
    except Exception as error:  # Rust and C++ raise bare Exception and RuntimeError on a damaged file.
        raise DataError(f"{where}: not a {backend} tokenizer, or damaged: {_brief(error)}.") from None
    if sidecar and sidecar.get("specials") == tokenizer.specials and pattern == sidecar.get("pattern"):
        _check_fingerprint(sidecar, tokenizer, where)
    return tokenizer


CHAT_TEMPLATE = "chat_template.jinja"
_ASIDE = (SIDECAR, "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _parse(files: Mapping[str, bytes], name: str, origin: str) -> dict[str, Any]:
    """The JSON object in `files[name]`, or {} where there is no such file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise DataError(f"{origin}/{name}: not JSON, or damaged: {_brief(error)}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{origin}/{name}: expected a JSON object, not {type(value).__name__}.")
    return value


def _chat_template(files: Mapping[str, bytes], origin: str) -> Any:
    """The chat template: in a file of its own since version 5 of transformers, which goes before the older place."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode("utf-8", errors="replace")
    return _parse(files, "tokenizer_config.json", origin).get("chat_template")


def _check_fingerprint(sidecar: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> None:
    if sidecar.get("fingerprint") != tokenizer.fingerprint:
        raise DataError(
            f"{where}: the tokenizer is not the one that was saved here ({SIDECAR} beside it has another fingerprint): "
            "a file was edited, damaged or half-copied. Copy the folder again, or remove that file to take the "
            "tokenizer as it is."
        )


def _resolve_specials(
    files: Mapping[str, bytes], origin: str, config: TokenizerConfig, reader: Backend, sidecar: Mapping[str, Any]
) -> dict[str, str | None]:
    """Which tokens are bos, eos and pad; the order of precedence is `load_tokenizer`'s."""
    theirs = _parse(files, "special_tokens_map.json", origin) | _parse(files, "tokenizer_config.json", origin)
    specials: dict[str, str | None] = {}
    for name in SPECIALS:
        default = TokenizerConfig.model_fields[name].default
        chosen = getattr(config, name)
        saved = theirs.get(f"{name}_token")
        saved = saved.get("content") if isinstance(saved, dict) else saved
        if chosen != default:
            specials[name] = chosen
        elif sidecar:
            specials[name] = sidecar.get("specials", {}).get(name)
        elif isinstance(saved, str) and reader.token_id(saved) is not None:
            specials[name] = saved
        elif reader.adds_specials or reader.token_id(default) is not None:
            specials[name] = default
        else:
            specials[name] = reader.own_special(name)
    return specials


def train_tokenizer(
    documents: Iterable[str], config: TokenizerConfig, out: str | Path, *, progress: bool = True
) -> Tokenizer:
    """Trains a tokenizer on `documents` and saves it in the folder `out`.

    The same documents give the same tokenizer; but for unigram, whose scores `tokenizers` sums in an order that changes
    from run to run, so that they differ by about 0.01 (its store and its fingerprint are then others, too).

    Raises ConfigError where `vocab_size` is too small, DataError where there is no text, StorageError where `out`
    cannot be written.
    """
    names = [config.bos, config.eos, config.pad, *([] if config.kind == "bpe" else [config.unk])]
    special = list(dict.fromkeys(name for name in names if name))
    alphabet = 0 if config.kind == "wordpiece" else 256
    if config.vocab_size < alphabet + len(special):
        raise ConfigError(
            f"tokenizer.vocab_size is {config.vocab_size}, less than the {alphabet} bytes and {len(special)} special "
            f"tokens that it begins with. Give at least {alphabet + len(special)}."
        )
    if not (config.bos or config.eos):
        raise ConfigError("tokenizer.bos and tokenizer.eos are both left out: nothing would tell documents apart.")
    if config.kind == "wordpiece" and isinstance(documents, Iterator):
        documents = list(documents)  # they are read twice
    trained, trainer = _untrained(config, special, documents, progress)
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for document in documents:
            seen += 1
            yield document

    trained.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("there are no documents to train a tokenizer on. Check data.sources.")
    if config.bos:  # so that `transformers` begins a prompt as documents begin
        from tokenizers import processors

        bos = (config.bos, trained.token_to_id(config.bos))
        trained.post_processor = processors.TemplateProcessing(
            single=f"{config.bos} $A", pair=f"{config.bos} $A {config.bos} $B", special_tokens=[bos]
        )
    specials = {name: getattr(config, name) for name in SPECIALS}
    content = _only_added(trained.to_str(), special)
    tokenizer = Tokenizer("huggingface", content, specials, origin=str(Path(out) / FILE_NAMES["huggingface"]))
    tokenizer.save(out)
    return tokenizer


def _only_added(spec: str, special: list[str]) -> bytes:
    """A tokenizer.json in which only `special` tokens are special; see `_continuations`."""
    fields = json.loads(spec)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in special]
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _continuations(documents: Iterable[str], pre_tokenizer: Any) -> list[str]:
    """The `##c` that words need, sorted.

    Left to itself, WordPieceTrainer numbers them in the order of a hash map, another one in each run, and breaks ties
    by their numbers. Named as special tokens they come first, in this order.
    """
    words = {word for text in documents for word, _ in pre_tokenizer.pre_tokenize_str(text)}
    return [f"##{character}" for character in sorted({character for word in words for character in word[1:]})]


def _untrained(
    config: TokenizerConfig, special: list[str], documents: Iterable[str], progress: bool
) -> tuple[Any, Any]:
    """An empty `tokenizers` tokenizer of the config's kind, and its trainer."""
    from tokenizers import Tokenizer as Empty
    from tokenizers import decoders, models, pre_tokenizers, trainers

    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "special_tokens": special,
        "show_progress": progress,
    }
    if config.kind == "wordpiece":
        tokenizer = Empty(models.WordPiece(unk_token=config.unk))  # pyright: ignore[reportCallIssue]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        common["special_tokens"] = special + _continuations(documents, tokenizer.pre_tokenizer)
        return tokenizer, trainers.WordPieceTrainer(min_frequency=config.min_frequency, **common)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.kind == "unigram":
        tokenizer = Empty(models.Unigram())
        trainer = trainers.UnigramTrainer(initial_alphabet=alphabet, unk_token=config.unk, **common)
    else:
        tokenizer = Empty(models.BPE())
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, min_frequency=config.min_frequency, **common)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainer


def train_from_config(
    tokenizer: TokenizerConfig, data: DataConfig, out: str | Path | None = None, *, progress: bool = True
) -> Tokenizer:
    """Trains on the documents of `data.sources`, held-out ones aside, and saves to `out` or else `tokenizer.path`.

    Raises as `train_tokenizer` and, for documents, as `maxlm data prepare`.
    """
    from maxlm.data.documents import TrainingTexts

    folder = out or tokenizer.path
    if folder is None:
        raise ConfigError("tokenizer.path is not set: name the folder to save the tokenizer in.")
    if Path(folder).is_file():
        raise ConfigError(f"tokenizer.path is {folder}, a file. Name the folder to save the trained tokenizer in.")
    return train_tokenizer(TrainingTexts(data), tokenizer, folder, progress=progress)
