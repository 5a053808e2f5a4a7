"""Where documents come from: text files, JSONL, Parquet, Python's own library, TFDS and Hugging Face data sets.

A source is first cut into pieces of work (`list_work`) by its files and their sizes alone, so that any number of
processes makes the same store; then each item is read (`read_item`), document by document.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from maxlm.data.config import DataConfig, SourceConfig
from maxlm.errors import DataError

MIB = 1 << 20
SUFFIXES = {
    "text": (),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
    "parquet": (".parquet",),
}
_EXAMPLES_A_ITEM = 20_000  # of a tfds or huggingface data set
_FILES_AN_ITEM = 2_000


@dataclass(frozen=True)
class Document:
    """A document, and the place (file, or file:line) that it came from. `raw` is its UTF-8."""

    text: str
    raw: bytes
    place: str


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used: its kind ("utf-8", "empty", "malformed"), where it is, and what is wrong."""

    kind: str
    place: str
    message: str


@dataclass(frozen=True)
class Piece:
    """A file or part of one: bytes [start, stop) of a JSONL file, row groups of Parquet, examples of a data set."""

    path: str
    start: int = 0
    stop: int = -1  # -1: to the end
    stamp: str = ""  # the file's size and time, by which a change is seen


@dataclass(frozen=True)
class WorkItem:
    """What one process reads at a time. `size` is in bytes, or an estimate, for the progress bar."""

    source: int
    pieces: tuple[Piece, ...]
    size: int

    def fingerprint(self) -> str:
        """Changes when the files change."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def list_work(data: DataConfig) -> list[WorkItem]:
    """Cuts all sources into items, in a fixed order. Raises DataError where there is nothing to read."""
    if not data.sources:
        raise DataError(
            "data.sources is empty. Name at least one, such as {kind: python-stdlib} or {kind: text, paths: [...]}."
        )
    items = [item for number, source in enumerate(data.sources) for item in _list_source(number, source)]
    if not items:
        raise DataError("data.sources: no documents at all.")
    return items


def describe(source: SourceConfig) -> str:
    """A source in a few words, for the manifest."""
    library = ", ".join(["the library of Python", *source.packages])
    return f"{source.kind}: {', '.join(source.paths) or source.dataset or library}"


def _list_source(number: int, source: SourceConfig) -> list[WorkItem]:
    if source.kind in ("tfds", "huggingface"):
        dataset = _load_dataset(source.model_dump_json(), number)
        n_examples, stamp = len(dataset), f"{source.split} {source.subset} {getattr(dataset, '_fingerprint', '')}"
        starts = range(0, n_examples, _EXAMPLES_A_ITEM)
        pieces = [Piece(str(source.dataset), i, min(i + _EXAMPLES_A_ITEM, n_examples), stamp) for i in starts]
        return [WorkItem(number, (piece,), (piece.stop - piece.start) * 1024) for piece in pieces]
    files = [(path, *_stat(path, number)) for path in source_files(source, number)]
    if not files:
        raise DataError(f"data.sources[{number}]: no files in {', '.join(source.paths)}.")
    # Items by the sources' size, never by the number of processes, and small enough that all processes have work.
    target = min(64 * MIB, max(MIB, sum(size for _, size, _ in files) // 64))
    if source.kind == "jsonl":
        return _list_jsonl(number, files, target)
    if source.kind == "parquet":
        return [item for file in files for item in _list_parquet(number, file, target)]
    return _group(number, files, target)


def _stat(path: str, number: int) -> tuple[int, str]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"data.sources[{number}]: {path}: {error.strerror}.") from None
    return stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"


def _group(number: int, files: list[tuple[str, int, str]], target: int) -> list[WorkItem]:
    """Neighbouring whole files, together up to `target` bytes."""
    items: list[WorkItem] = []
    pieces: list[Piece] = []
    total = 0
    for path, size, stamp in files:
        if pieces and (total + size > target or len(pieces) >= _FILES_AN_ITEM):
            items.append(WorkItem(number, tuple(pieces), total))
            pieces, total = [], 0
        pieces.append(Piece(path, stamp=stamp))
        total += size
    return [*items, WorkItem(number, tuple(pieces), total)]


def _list_jsonl(number: int, files: list[tuple[str, int, str]], target: int) -> list[WorkItem]:
    items = []
    for path, size, stamp in files:
        if path.endswith((".gz", ".zst")):  # a compressed stream can only be read from its beginning
            items.append(WorkItem(number, (Piece(path, stamp=stamp),), size))
            continue
        for start in range(0, size, target):
            stop = min(start + target, size)
            items.append(WorkItem(number, (Piece(path, start, stop, stamp),), stop - start))
    return items


def _list_parquet(number: int, file: tuple[str, int, str], target: int) -> Iterator[WorkItem]:
    path, _, stamp = file
    with _open_parquet(path) as parquet:
        first, total = 0, 0
        for group in range(parquet.num_row_groups):
            total += parquet.metadata.row_group(group).total_byte_size
            if total >= target or group == parquet.num_row_groups - 1:
                yield WorkItem(number, (Piece(path, first, group + 1, stamp),), total)
                first, total = group + 1, 0


def source_files(source: SourceConfig, number: int = 0) -> list[str]:
    """All files of a source of files, sorted, each once. Raises DataError where a path leads nowhere."""
    if source.kind == "python-stdlib":
        return [*stdlib_files(), *(path for name in source.packages for path in package_files(name, number))]
    suffixes = source.suffixes or SUFFIXES[source.kind]
    found: list[str] = []
    for pattern in source.paths:
        expanded = os.path.expanduser(pattern)
        matches = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not matches:
            raise DataError(
                f"data.sources[{number}].paths: {pattern}: no such file or folder, and as a pattern it matches nothing."
            )
        for match in matches:
            if os.path.isdir(match) and glob.has_magic(expanded) and not os.path.exists(expanded):
                continue  # `**` gives folders too; their files are matched by themselves
            found += _walk(match, suffixes) if os.path.isdir(match) else [match]
    return list(dict.fromkeys(found))


def _walk(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                yield os.path.join(here, name)


# Folders of tests and of others' code, and files that are generated tables rather than written text.
_STDLIB_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "_bundled",
}  # fmt: skip
_STDLIB_TABLES = {"stringprep.py", "entities.py", "_casefix.py", "_opcode_metadata.py", "schema.py", "sequence.py"}


@functools.cache
def _stdlib() -> str:
    return sysconfig.get_path("stdlib")


def stdlib_files() -> list[str]:
    """The .py files of the running Python's library, sorted; without tests, generated tables and empty files.

    Raises DataError where this Python came without its sources.
    """
    files = _python_files(_stdlib())
    if not files:
        raise DataError(f"{_stdlib()}: this Python has no library sources (.py files). Use another source.")
    return files


def package_files(name: str, number: int = 0) -> list[str]:
    """The .py files of an installed package, sorted, as those of the library; it is not imported.

    Raises DataError where there is no such package.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    files = [path for folder in (spec and spec.submodule_search_locations) or () for path in _python_files(folder)]
    if not files:
        raise DataError(
            f"data.sources[{number}].packages: {name}: no installed package of this name has sources; install it, or "
            "leave it out."
        )
    return files


def _python_files(folder: str) -> list[str]:
    files: list[str] = []
    for here, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if n not in _STDLIB_SKIPPED_FOLDERS and not n.startswith(("config-", "."))]
        files += [os.path.join(here, name) for name in names if name.endswith(".py") and not _is_table(here, name)]
    return sorted(files)


def _is_table(here: str, name: str) -> bool:
    path = os.path.join(here, name)
    if name in _STDLIB_TABLES or name.startswith("_sysconfigdata") or os.path.getsize(path) == 0:
        return True
    if os.path.basename(here) != "encodings":
        return False
    with open(path, "rb") as file:  # a charmap: an alphabet written out
        content = file.read()
    return b"decoding_table" in content or b"decoding_map" in content


def read_item(item: WorkItem, data: DataConfig) -> Iterator[Document | Bad]:
    """The documents of an item, in order, and in their places those that cannot be used.

    Raises DataError where a file is missing or as a whole unreadable.
    """
    source = data.sources[item.source]
    for piece in item.pieces:
        try:
            if source.kind in ("text", "python-stdlib"):
                yield _read_text(piece.path)
            elif source.kind == "jsonl":
                yield from _read_jsonl(piece, source.field)
            elif source.kind == "parquet":
                yield from _read_parquet(piece, source.field, item.source)
            else:
                yield from _read_dataset(piece, source, item.source)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{piece.path}: cannot be read to its end: {reason}.") from None


def _document(content: Any, place: str) -> Document | Bad:
    """Checks a document's text or bytes."""
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Bad("utf-8", place, f"byte {error.start} ({content[error.start]:#04x}) is not UTF-8")
    if not isinstance(content, str):
        return Bad("malformed", place, f"the text is {type(content).__name__}, not a string")
    try:
        raw = content.encode()
    except UnicodeEncodeError as error:
        return Bad("utf-8", place, f"character {error.start} is half of a surrogate pair")
    if not content.strip():
        return Bad("empty", place, "no text")
    return Document(content, raw, place)


def _read_text(path: str) -> Document | Bad:
    with open(path, "rb") as file:
        return _document(file.read(), path)


def _read_jsonl(piece: Piece, field: str) -> Iterator[Document | Bad]:
    """The lines that begin in the piece. Line numbers are counted only when one is asked for."""
    if piece.path.endswith((".gz", ".zst")):
        for number, line in enumerate(_compressed_lines(piece.path), 1):
            yield _json_line(line, field, lambda n=number: f"{piece.path}:{n}")
        return
    with open(piece.path, "rb") as file:
        file.seek(max(0, piece.start - 1))
        if piece.start:
            file.readline()  # the rest of a line that began before
        while (begin := file.tell()) < piece.stop:
            line = file.readline()
            if not line:
                return
            yield _json_line(line, field, lambda at=begin: f"{piece.path}:{_line_number(piece.path, at)}")


def _line_number(path: str, at: int) -> int:
    """The number of the line that begins at byte `at`."""
    number = 1
    with open(path, "rb") as file:
        while at > 0 and (block := file.read(min(at, MIB))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _json_line(line: bytes, field: str, place: Any) -> Document | Bad:
    if not line.strip():
        return Bad("empty", place(), "an empty line")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad("utf-8", place(), f"byte {error.start} of the line ({line[error.start]:#04x}) is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Bad("malformed", place(), f"not JSON: {error}")
    if not isinstance(value, dict) or field not in value:
        found = (
            f"an object with {', '.join(map(repr, value)) or 'no fields'}" if isinstance(value, dict) else "no object"
        )
        return Bad("malformed", place(), f"no field {field!r} (data.sources[].field): it is {found}")
    document = _document(value[field], "")
    if isinstance(document, Bad):
        return Bad(document.kind, place(), document.message)
    return document


def _compressed_lines(path: str) -> Iterator[bytes]:
    """The lines of a .gz or .zst file. Raises OSError, EOFError or zlib.error where it is damaged or cut off."""
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield from file
        return
    rest = b""
    for block in _zstd_blocks(path):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zstd_blocks(path: str) -> Iterator[bytes]:
    """Decompresses frame by frame: zstandard's own reader takes a file that is cut off for a whole one."""
    zstandard = _need("zstandard", "maxlm[data]", path)
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    with open(path, "rb") as file:
        while block := file.read(MIB):
            while block:
                frame = frame or decompressor.decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise OSError(0, str(error)) from None
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside of a compressed frame")


def _need(module: str, extra: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f'{where}: reading it needs the package {module}. Install it with: pip install "{extra}"'
        ) from None


def _open_parquet(path: str) -> Any:
    _need("pyarrow", "maxlm[data]", path)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {str(error).splitlines()[0]}.") from None


def _read_parquet(piece: Piece, field: str, number: int) -> Iterator[Document | Bad]:
    with _open_parquet(piece.path) as parquet:
        import pyarrow

        names = parquet.schema_arrow.names
        if field not in names:
            raise DataError(
                f"{piece.path}: no column {field!r}; there are {', '.join(names)}. Set data.sources[{number}].field."
            )
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        try:
            for batch in parquet.iter_batches(1024, row_groups=groups, columns=[field]):
                for value in _column(batch.column(0)):
                    row += 1
                    yield _document(value, f"{piece.path}:row {row}")
        except pyarrow.ArrowException as error:
            raise DataError(f"{piece.path}: damaged: {str(error).splitlines()[0]}.") from None


def _column(column: Any) -> Iterable[Any]:
    """Strings as bytes, since Arrow does not check that they are UTF-8."""
    import pyarrow

    if pyarrow.types.is_string(column.type):
        column = column.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.view(pyarrow.large_binary())
    return column.to_pylist()


@functools.lru_cache(8)
def _load_dataset(source_json: str, number: int) -> Any:
    """A tfds or huggingface data set with `len` and `[i]`. Raises DataError where it or its package is missing."""
    source = SourceConfig.model_validate_json(source_json)
    where = f"data.sources[{number}] ({source.kind} {source.dataset})"
    try:
        if source.kind == "huggingface":
            datasets = _need("datasets", "maxlm[datasets]", where)
            return datasets.load_dataset(source.dataset, source.subset, split=source.split)
        tfds = _need("tensorflow_datasets", "maxlm[datasets]", where)
        if os.path.isdir(os.path.expanduser(str(source.dataset))):
            builder = tfds.builder_from_directory(os.path.expanduser(str(source.dataset)))
            return builder.as_data_source(split=source.split)
        return tfds.data_source(source.dataset, split=source.split)
    except DataError:
        raise
    except Exception as error:  # Either package raises errors of many kinds.
        raise DataError(
            f"{where}: cannot be loaded: {str(error).splitlines()[0] if str(error) else error!r}."
        ) from None


def _read_dataset(piece: Piece, source: SourceConfig, number: int) -> Iterator[Document | Bad]:
    dataset = _load_dataset(source.model_dump_json(), number)
    for i in range(piece.start, piece.stop):
        example = dataset[i]
        if source.field not in example:
            fields = ", ".join(map(str, example))
            raise DataError(
                f"{piece.path}: no field {source.field!r}; there are {fields}. Set data.sources[{number}].field."
            )
        yield _document(example[source.field], f"{piece.path}:example {i}")
