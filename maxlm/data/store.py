"""The token store: zarr3 arrays through TensorStore, and a manifest, written last, that says they are whole.

    STORE/
      manifest.json            what is in it; there only when everything else is
      bad.jsonl                documents left out, and why
      tokenizer/               the tokenizer's files
      token_bytes/             int32[vocab]: bytes of UTF-8 of each token
      {train,heldout}/
        tokens/                uint16 or uint32[tokens]: each document is [bos] tokens [eos]
        offsets/               int64[documents + 1]: where documents begin, then the number of tokens
        bytes/                 int64[documents]: each document's bytes of UTF-8

Arrays are sharded: a shard is one file or object of many small chunks, each with its own crc32c, so that a window of
tokens is one small read. Chunks are not compressed: see docs/performance-log.md for what that buys.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from maxlm.data.storage import Storage, shared_context, storage_errors
from maxlm.errors import DataError
from maxlm.section import Section

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
WORK = "work"
SPLITS = ("train", "heldout")
SHARD = 1 << 24  # elements a shard: 32 or 64 MiB of tokens
CHUNK = 1 << 13  # elements a chunk: 16 or 32 KiB of tokens, the least that is read


class SplitCounts(Section):
    """What a split holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class Manifest(Section):
    """What a store holds, and by what it is known."""

    format: int
    tokenizer: str  # the tokenizer's fingerprint
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    bos_id: int | None
    eos_id: int | None
    exact_bytes: bool  # whether token_bytes adds up to each document's bytes
    train: SplitCounts
    heldout: SplitCounts
    bad: dict[str, int]  # documents left out, by kind
    sources: tuple[str, ...]
    job: str  # hash of the work that made it: sources, their files' sizes and times, settings
    fingerprint: str  # hash of the tokens

    def counts(self, split: str) -> SplitCounts:
        """The counts of "train" or "heldout"."""
        return {"train": self.train, "heldout": self.heldout}[split]

    def to_json(self) -> bytes:
        """The manifest file: the fields, and a checksum over them."""
        fields = self.model_dump(mode="json")
        return (json.dumps({**fields, "checksum": _checksum(fields)}, indent=2, sort_keys=True) + "\n").encode()


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Reads a manifest file. Raises DataError, naming it, where it is damaged or of another version."""
    again = "Remove the store and make it again with `maxlm data prepare`."
    try:
        fields = json.loads(content)
        checksum = fields.pop("checksum")
    except (ValueError, KeyError, AttributeError):
        raise DataError(f"{where}: the token store's manifest is damaged. {again}") from None
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{where}: the token store is of format {fields.get('format')!r}, this maxlm reads format {FORMAT}. {again}"
        )
    if checksum != _checksum(fields):
        raise DataError(f"{where}: the token store's manifest is damaged or was edited: its checksum is wrong. {again}")
    return Manifest.model_validate(fields)


def array_spec(storage: Storage, name: str) -> dict[str, Any]:
    """The TensorStore spec of the array `name`."""
    return {"driver": "zarr3", "kvstore": {**storage.spec, "path": f"{storage.spec['path']}{name}/"}}


def create_array(storage: Storage, name: str, size: int, dtype: str) -> None:
    """Makes an empty sharded array."""
    import tensorstore as ts

    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [CHUNK],
        "codecs": [little, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    metadata = {
        "shape": [size],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {**array_spec(storage, name), "metadata": metadata, "create": True}
    with storage_errors(storage.where(name)):
        ts.open(spec, context=shared_context()).result()


def open_array(storage: Storage, name: str, *, write: bool = False, context: Any = None) -> Any:
    """Opens an array. Raises DataError where it is missing or its metadata is damaged."""
    import tensorstore as ts

    spec = array_spec(storage, name)
    try:
        return ts.open(spec, context=context or shared_context(), read=True, write=write).result()
    except ValueError as error:
        message = str(error).split(" [", 1)[0]
        raise DataError(
            f"{storage.where(name)}: an array of the token store is missing or damaged ({message}). Remove the store "
            "and make it again with `maxlm data prepare`, or copy it again."
        ) from None


def read_array(storage: Storage, array: Any, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Elements [start, stop) of an array. Raises DataError where a chunk's checksum is wrong."""
    with storage_errors(storage.where(name)):
        return array[start : array.shape[0] if stop is None else stop].read().result()


class TokenStore:
    """A whole token store, open for reading.

    Raises DataError, naming the file, where the store is missing, unfinished, damaged or made with another tokenizer.
    """

    def __init__(self, url: str, *, tokenizer: Tokenizer | None = None):
        self.url = url
        self.storage = Storage(url)
        content = self.storage.read(MANIFEST)
        if content is None:
            unfinished = bool(self.storage.list(WORK))
            raise DataError(
                f"{self.storage.where(MANIFEST)}: missing, so preparing this token store was not finished. Run "
                "`maxlm data prepare` again: it goes on where it stopped."
                if unfinished
                else f"{self.storage.where(MANIFEST)}: no such file, so there is no token store here. Make it with "
                "`maxlm data prepare`, or mend data.store."
            )
        self.manifest = parse_manifest(content, self.storage.where(MANIFEST))
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        for split in SPLITS:
            counts = self.manifest.counts(split)
            for name, size, dtype in array_shapes(split, counts, self.manifest.dtype):
                self._check_array(name, size, dtype)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises DataError where the store was made with another tokenizer."""
        if tokenizer.fingerprint == self.manifest.tokenizer:
            return
        raise DataError(
            f"{self.url}: the token store was made with another tokenizer (fingerprint {self.manifest.tokenizer[:12]}, "
            f"{self.manifest.vocab_size} tokens) than {tokenizer.origin} (fingerprint {tokenizer.fingerprint[:12]}, "
            f"{tokenizer.vocab_size} tokens). Point tokenizer.path at the store's, or prepare a store with this one."
        )

    def _check_array(self, name: str, size: int, dtype: str) -> None:
        array = open_array(self.storage, name)
        if array.shape != (size,) or array.dtype.name != dtype:
            raise DataError(
                f"{self.storage.where(name)}: holds {array.dtype.name}{list(array.shape)}, the manifest says "
                f"{dtype}[{size}]. The store is damaged; remove it and make it again with `maxlm data prepare`."
            )

    def array(self, name: str, *, context: Any = None) -> Any:
        """The TensorStore of an array, such as "train/tokens"."""
        return open_array(self.storage, name, context=context)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of an array, such as "heldout/offsets"."""
        return read_array(self.storage, self.array(name), name, start, stop)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with, from the store's own copy."""
        from maxlm.data.tokenizer import tokenizer_from_files

        names = self.storage.list("tokenizer")
        files = {name.split("/", 1)[1]: self.storage.read(name) or b"" for name in names}
        tokenizer = tokenizer_from_files(files, self.storage.where("tokenizer"))
        self.check_tokenizer(tokenizer)
        return tokenizer


def array_shapes(split: str, counts: SplitCounts, dtype: str) -> list[tuple[str, int, str]]:
    """Name, size and dtype of each of a split's arrays."""
    return [
        (f"{split}/tokens", counts.tokens, dtype),
        (f"{split}/offsets", counts.documents + 1, "int64"),
        (f"{split}/bytes", counts.documents, "int64"),
    ]
