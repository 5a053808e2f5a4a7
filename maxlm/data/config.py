"""The `data` section of the config: where documents come from, where their tokens lie, how batches are drawn."""

from typing import Literal

from pydantic import model_validator

from maxlm.section import Section, key

SourceKind = Literal["text", "jsonl", "parquet", "python-stdlib", "tfds", "huggingface"]


class SourceConfig(Section):
    """One source of documents."""

    kind: SourceKind = key(
        ...,
        "what the documents are read from: text (a file is a document), jsonl (a line is one; plain, .gz or .zst), "
        "parquet (a row is one), python-stdlib (the running Python's own library), tfds (TensorFlow Datasets) or "
        "huggingface (a data set of the `datasets` package)",
    )
    paths: tuple[str, ...] = key((), "files, folders and glob patterns (`**` too); for text, jsonl and parquet")
    packages: tuple[str, ...] = key((), "installed packages whose sources are read too, such as numpy; python-stdlib")
    suffixes: tuple[str, ...] = key(
        (),
        "endings of the file names to take from a folder. Empty: every file for text; .jsonl, .jsonl.gz, .jsonl.zst, "
        ".json.gz and .json.zst for jsonl; .parquet for parquet. Hidden files are never taken",
    )
    field: str = key("text", "the field or column that holds a document's text; all kinds but text and python-stdlib")
    dataset: str | None = key(None, "the data set's name, or its folder; for tfds and huggingface")
    subset: str | None = key(None, "the data set's configuration, where it has several; for huggingface")
    split: str = key("train", "the data set's split; for tfds and huggingface")

    @model_validator(mode="after")
    def _says_where(self) -> "SourceConfig":
        if self.kind in ("text", "jsonl", "parquet") and not self.paths:
            raise ValueError(f"a source of kind {self.kind} needs `paths`")
        if self.kind in ("tfds", "huggingface") and not self.dataset:
            raise ValueError(f"a source of kind {self.kind} needs `dataset`, the data set's name")
        if self.kind == "python-stdlib" and self.paths:
            raise ValueError("a source of kind python-stdlib takes no `paths`: it is the running Python's own library")
        if self.kind != "python-stdlib" and self.packages:
            raise ValueError(f"`packages` are of a source of kind python-stdlib, and this one is of kind {self.kind}")
        return self


class StoreWeight(Section):
    """A token store's share of a mixture."""

    store: str = key(..., "the token store: a path, or a gs://, s3:// or file:// URL")
    weight: float = key(..., "its share of the samples, relative to the other weights", gt=0)


class ObjectiveConfig(Section):
    """What a model is to tell of a row's tokens."""

    kind: Literal["causal", "prefix_lm", "mlm", "span_corruption"] | None = key(
        None,
        "causal: each next token; prefix_lm: each next token behind a document's first ones, which see each other both "
        "ways; how many is drawn evenly from 1 to all but the last, anew each time a row comes (T5, arXiv:1910.10683, "
        "section 3.2.3); mlm: tokens that are masked (arXiv:1810.04805); span_corruption: spans that are missing (T5). "
        "Decoders have the first two, encoders mlm, encoder_decoders span_corruption; null: the first of these",
    )
    mask_rate: float = key(0.15, "mlm, span_corruption: the part of a row's tokens that is to be told", gt=0, lt=1)
    mean_span: float = key(3.0, "span_corruption: mean length of a missing span", unit="tokens", ge=1)
    mask_id: int | None = key(None, "mlm: the token for a masked one; null: the last of model.vocab_size", ge=0)
    next_sentence: bool = key(
        False,
        "mlm: a row is two parts of one document, or by chance, every second time, of two, and "
        "model.next_sentence_head is to tell which (arXiv:1810.04805, section A.2); its mean cross-entropy is added to "
        "the loss",
    )
    first_sentinel_id: int | None = key(
        None,
        "span_corruption: the token for the first missing span, the next ones are those below it; null: the last of "
        "model.vocab_size",
        ge=0,
    )


class DataConfig(Section):
    """Documents, token store and batches."""

    store: str | None = key(
        None, "the token store: a path, or a gs://, s3://, file:// or memory:// URL. `maxlm data prepare` writes it"
    )
    sources: tuple[SourceConfig, ...] = key((), "where `maxlm data prepare` and `maxlm tokenizer train` find documents")
    heldout_fraction: float = key(
        0.01,
        "the share of documents that is kept for evaluation. A document's own text decides, by its hash, so equal "
        "documents are never on both sides",
        ge=0,
        lt=1,
    )
    max_bad_fraction: float = key(
        0.01,
        "the share of bad documents (broken UTF-8, empty, malformed) past which preparing stops; below it they are "
        "left out, counted and listed in the store's bad.jsonl",
        ge=0,
        le=1,
    )
    workers: int = key(0, "how many processes prepare documents; 0 is one a CPU core", ge=0)
    mixture: tuple[StoreWeight, ...] = key(
        (), "several stores to train on, with their weights, in place of `store`. Each counts its own epochs"
    )
    objective: ObjectiveConfig = key(ObjectiveConfig(), "what a model is to tell of a row's tokens")
    shuffle: bool = key(True, "whether windows come in a shuffled order, another one each epoch, by train.seed")
    prefetch: int = key(4, "how many batches are read ahead", unit="batches", ge=1)
    cache_mib: int = key(
        1024,
        "stores whose tokens fit in this much memory together are read into it whole; larger ones are read as needed, "
        "with this much memory for their chunks. For each process",
        unit="MiB",
        ge=0,
    )

    @model_validator(mode="after")
    def _one_place(self) -> "DataConfig":
        if self.store is not None and self.mixture:
            raise ValueError("`store` and `mixture` are both given; put the store in the mixture, or leave one of them")
        return self
