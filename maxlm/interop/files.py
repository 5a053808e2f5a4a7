"""The files that models travel in: safetensors written tensor by tensor and read with care, and folders that are whole
or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from maxlm.data.storage import storage_error
from maxlm.errors import DataError, StorageError
from maxlm.files import write_synced

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Number formats that weights come in, as numpy and as safetensors call them.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FORMATS = {code: DTYPES[name] for name, code in CODES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written, and what makes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


class Stored(NamedTuple):
    """A tensor that lies in a file: its number format as safetensors call it, and where its first byte is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def write_shards(folder: Path, specs: list[TensorSpec], max_shard_bytes: int) -> None:
    """Writes tensors as `model.safetensors`, or as numbered shards of at most `max_shard_bytes` (or one tensor) and
    their index. Only one tensor is in memory at a time."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.n_bytes for s in shards[-1]) + spec.n_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, specs)
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_size": sum(spec.n_bytes for spec in specs)}, "weight_map": weight_map}
    write_synced(folder / INDEX, to_json(index))


def write_safetensors(path: Path, specs: list[TensorSpec]) -> None:
    """Writes one file, byte for byte as the safetensors package would write tensors in this order.

    That package wants all of a file's tensors at once; written by hand, one is in memory at a time. The format: eight
    bytes of the header's length, the header as JSON, filled up with spaces to a multiple of eight, and the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.n_bytes]
        }  # fmt: skip
        end += spec.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = spec.make()
            if tensor.shape != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
                raise ValueError(f"{spec.name} was made as {tensor.dtype}{tensor.shape}, not {spec.dtype}{spec.shape}")
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data if tensor.size else b"")
        file.flush()
        os.fsync(file.fileno())


def to_json(value: Any) -> bytes:
    """JSON as it is written everywhere here: indented, in the order given, with a last newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError, naming it, where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; is {path.parent} a Hugging Face model's folder?") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON, or damaged: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes when it does not.

    Raises StorageError where `out` cannot be written, or holds something already.
    """
    refuse_existing(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.writing-"))
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, out)
        _sync(out.parent)
    except OSError as error:
        raise storage_error(error, str(out)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A file to write, which becomes `out` when the block ends well and vanishes when it does not.

    Raises StorageError where `out` cannot be written, or is there already.
    """
    temporary = None
    try:
        if out.exists():
            raise StorageError(f"{out}: is there already; name another file, or move it away")
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.writing-")
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        os.rename(temporary, out)
        _sync(out.parent)
    except OSError as error:
        raise storage_error(error, str(out)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(out: Path) -> None:
    """Raises StorageError where `out` is a file, or a folder that is not empty."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StorageError(f"{out}: is there already and not an empty folder; name another, or move it away")
    except OSError as error:
        raise storage_error(error, str(out)) from error


class TensorFiles:
    """The tensors of a model's folder, by name; nothing is read before it is asked for.

    Every header is checked when the folder is opened: sizes within the file, no gaps (by the safetensors package), and
    the index against the files. Raises DataError, naming the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors: dict[str, Stored] = {}
        self.files = self._weight_map()

    def where(self, name: str) -> str:
        """The file that a tensor is in, for people."""
        return str(self.folder / self.files[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's number format, as safetensors call it."""
        return self._tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor, mapped into memory by itself: what is not used is not read, and it goes when the array goes."""
        where, dtype = self._tensors[name], FORMATS.get(self._tensors[name].dtype)
        if dtype is None:
            raise DataError(f"{self.where(name)}: {name} is of {where.dtype}; weights are read as F32, BF16 or F16")
        if 0 in where.shape:
            return np.empty(where.shape, dtype)
        try:
            path = self.folder / self.files[name]
            return np.memmap(path, dtype, mode="r", offset=where.offset, shape=where.shape)
        except (ValueError, OSError) as error:
            raise DataError(f"{self.where(name)}: {name} cannot be read: {error}") from None

    def _weight_map(self) -> dict[str, str]:
        if not (self.folder / INDEX).exists():
            if not (self.folder / SINGLE).exists():
                raise DataError(_no_weights(self.folder))
            return dict.fromkeys(self._open(SINGLE), SINGLE)
        index = read_json(self.folder / INDEX)
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(_is_file_name(file) for file in listed.values()):
            raise DataError(f"{self.folder / INDEX}: weight_map must give every tensor's file, a name in this folder")
        found = {name: file for file in sorted(set(listed.values())) for name in self._open(file)}
        for name in sorted(listed.keys() | found.keys()):
            if listed.get(name) != found.get(name):
                raise DataError(
                    f"{self.folder / INDEX}: says that {name} is in {listed.get(name, 'no file')}, and it is in "
                    f"{found.get(name, 'none')}; the index and the files are not of one model"
                )
        return found

    def _open(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            with safe_open(path, framework="np"):  # which checks the header against the file
                found = _read_header(path)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file; the model's folder is not whole") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path}: not a safetensors file, or damaged: {error}; copy it again") from None
        self._tensors |= found
        return list(found)


def _read_header(path: Path) -> dict[str, Stored]:
    """Where the tensors are in a safetensors file whose header is in order."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(tensor["dtype"], tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder"
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder / pickles[0]}: weights in PyTorch's pickle format, which can run any code when it is read; "
            "convert them to safetensors"
        )
    return f"{folder}: no weights here; expected {SINGLE} or {INDEX}"


def named_differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing from `found`, what is too much, and what has another shape than `expected`, a line each."""
    lines = [f"{name} {list(expected[name])} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} {list(found[name])} is not of this model" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            lines.append(f"{name} is {list(found[name])}, and the config makes it {list(expected[name])}")
    return lines
